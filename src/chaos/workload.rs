//! What the clients ask for.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hotset_core::replay::Trace;
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::RngCore;
use serde::Serialize;

use super::library::{FILES, name};
use super::world::CLIENTS;
use crate::{ComponentSet, GpuIndex, KeepAlive, Priority, Target};

/// A number below the bound.
pub(super) fn below(rng: &mut Xoshiro256PlusPlus, bound: usize) -> usize {
    (rng.next_u64() % bound.max(1) as u64) as usize
}

/// The loads that hotset comes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Profile {
    /// A base and an adapter at a time, on a GPU, the base for longer.
    Diffusion,
    /// One large model at a time, held for long.
    Language,
    /// Nearly everybody wants the same model.
    Hot,
    /// Everybody wants another model each time, and all of them are more than memory holds.
    Thrash,
    /// All clients ask for the same model at the same instant, again and again.
    Herd,
    /// Recorded requests, at their times, twenty times as fast.
    Recorded,
}

impl Profile {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Diffusion,
        Self::Language,
        Self::Hot,
        Self::Thrash,
        Self::Herd,
        Self::Recorded,
    ];

    /// Its name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Diffusion => "diffusion",
            Self::Language => "language",
            Self::Hot => "hot",
            Self::Thrash => "thrash",
            Self::Herd => "herd",
            Self::Recorded => "recorded",
        }
    }

    /// Its load.
    ///
    /// # Panics
    /// Never: the recorded requests that hotset comes with can be read.
    #[must_use]
    pub fn workload(self) -> Workload {
        match self {
            Self::Recorded => {
                let requests = include_str!("recorded/requests.csv");
                let components = include_str!("recorded/components.csv");
                let trace = Trace::parse(requests, components).unwrap_or_default();
                Workload::Recorded(Arc::new(trace))
            }
            profile => Workload::Profile(profile),
        }
    }
}

/// A host's own load: which of `models` the client of this number asks for at its n-th turn. `draw` gives numbers below a
/// bound, from the seed.
pub type Ask = Arc<
    dyn Fn(usize, usize, &[String], &mut dyn FnMut(usize) -> usize) -> ComponentSet + Send + Sync,
>;

/// What clients ask for.
#[derive(Clone)]
pub enum Workload {
    /// One of hotset's own.
    Profile(Profile),
    /// Recorded requests, as `hotset replay` reads them, twenty times as fast and again and again. Their components are mapped
    /// to the simulation's models, and their sessions to its clients.
    Recorded(Arc<Trace>),
    /// A host's own.
    Own(Ask),
}

impl fmt::Debug for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Profile(profile) => profile.fmt(f),
            Self::Recorded(_) => Profile::Recorded.fmt(f),
            Self::Own(_) => f.write_str("Own"),
        }
    }
}

/// Recorded time passes so much faster.
const FASTER: u32 = 20;

impl Workload {
    /// What a client asks for next, and when, since the start, where that is recorded.
    pub(super) fn ask(
        &self,
        client: usize,
        turn: usize,
        rng: &mut Xoshiro256PlusPlus,
    ) -> (ComponentSet, Option<Duration>) {
        let one = |file: usize| ComponentSet::new([name(file)]);
        let small = Target::Gpu(GpuIndex(1));
        let anywhere = [Target::Ram, Target::AnyGpu, Target::Best, small][below(rng, 4)];
        let (mut set, at) = match self {
            Self::Own(ask) => {
                let models: Vec<String> = (0..FILES).map(name).collect();
                return (
                    ask(client, turn, &models, &mut |bound| below(rng, bound)),
                    None,
                );
            }
            Self::Recorded(trace) => match recorded(trace, client, turn) {
                Some((files, at)) => {
                    let set = ComponentSet::new(files.into_iter().map(name)).on(anywhere);
                    (set, Some(at))
                }
                None => (one(client).on(anywhere), None),
            },
            Self::Profile(Profile::Diffusion) => {
                let (base, adapter) = (5 + client % 2, below(rng, 5));
                let set = ComponentSet::new([name(base), name(adapter)]);
                (set.on(Target::AnyGpu), None)
            }
            Self::Profile(Profile::Language) => (one(6 + below(rng, 2)).on(anywhere), None),
            Self::Profile(Profile::Hot) => {
                let other = below(rng, 8) == 0;
                let file = if other { below(rng, FILES) } else { 4 };
                (one(file).on(anywhere), None)
            }
            Self::Profile(Profile::Thrash) => (one((client + turn) % FILES).on(anywhere), None),
            Self::Profile(Profile::Herd | Profile::Recorded) => {
                (one(turn % FILES).on(anywhere), None)
            }
        };
        set.priority = match below(rng, 8) {
            0 => Priority::Prefetch,
            1 | 2 => Priority::Batch,
            _ => Priority::Interactive,
        };
        set.split = below(rng, 2) == 0;
        set.keep_alive = match below(rng, 4) {
            0 => Some(KeepAlive::For(Duration::from_millis(
                below(rng, 5000) as u64
            ))),
            1 => Some(KeepAlive::Unlimited),
            _ => None,
        };
        (set, at)
    }

    pub(super) fn pause(&self, rng: &mut Xoshiro256PlusPlus) -> Duration {
        let most = match self {
            Self::Profile(Profile::Language) => 1000,
            Self::Profile(Profile::Thrash) => 50,
            _ => 400,
        };
        Duration::from_millis(below(rng, most) as u64)
    }

    /// Whether the predictor is to learn and prefetch: always where there is something to learn, else with every other seed.
    pub(super) fn predicts(&self, seed: u64) -> bool {
        matches!(self, Self::Recorded(_)) || seed % 2 == 1
    }
}

/// The files of a client's n-th request, and its time.
fn recorded(trace: &Trace, client: usize, turn: usize) -> Option<(Vec<usize>, Duration)> {
    let own = |session: u64| session % CLIENTS as u64 == client as u64;
    let requests = trace.requests();
    let of_client = requests.iter().filter(|request| own(request.session.0));
    let count = of_client.clone().count();
    let round = turn.checked_div(count)?;
    let request = of_client.clone().nth(turn % count)?;
    let length = requests.last()?.at + Duration::from_secs(1);
    let at = (length * round as u32 + request.at) / FASTER;
    let mut files: Vec<usize> = request.components.iter().map(|c| c % FILES).collect();
    files.sort_unstable();
    files.dedup();
    Some((files, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recorded_requests_are_read_in_their_order_and_again() {
        let Workload::Recorded(trace) = Profile::Recorded.workload() else {
            panic!("it is recorded");
        };
        assert!(trace.requests().len() > 300);
        for client in 0..CLIENTS {
            let turns: Vec<_> = (0..200)
                .filter_map(|n| recorded(&trace, client, n))
                .collect();
            assert_eq!(turns.len(), 200);
            assert!(turns.is_sorted_by_key(|(_, at)| *at));
            assert!(turns.iter().all(|(files, _)| !files.is_empty()));
        }
    }
}
