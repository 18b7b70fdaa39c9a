//! Variants of a trace: other sizes, a part of the requests, and streams made to be hard.
//!
//! One trace with one table of sizes is one observation. Sizes drawn anew among components of the same kind give as many
//! as are wanted, and show whether a difference between policies is more than luck with the sizes of ten large
//! checkpoints.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::trace::content_of;
use super::{Trace, TraceComponent, TraceRequest};
use crate::ids::SessionId;
use crate::random::scramble;

/// Requests after which [`Stress::Relabel`] gives all components other names.
const RELABEL_EVERY: usize = 3_000;
/// Share of requests after which [`Stress::OneHit`] puts one for a component that is never asked for again.
const ONE_HIT_SHARE: f64 = 0.5;

/// A stream that is made to be hard for policies that learn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stress {
    /// Every 3,000 requests, all components of a kind change their popularity with each other.
    Relabel,
    /// The requests in random order: nothing but popularity can be learned.
    Shuffle,
    /// After every second request on average, one for a component that is never asked for again.
    OneHit,
    /// All components in turn, again and again: more than any tier holds that is smaller than all of them.
    Loop,
}

impl Stress {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Relabel, Self::Shuffle, Self::OneHit, Self::Loop];

    const fn name(self) -> &'static str {
        match self {
            Self::Relabel => "relabel",
            Self::Shuffle => "shuffle",
            Self::OneHit => "one-hit",
            Self::Loop => "loop",
        }
    }
}

impl fmt::Display for Stress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that no stress has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no stress: write relabel, shuffle, one-hit or loop")]
pub struct UnknownStressError {
    /// What was written.
    pub text: String,
}

impl FromStr for Stress {
    type Err = UnknownStressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let named = Self::ALL.into_iter().find(|stress| stress.name() == text);
        named.ok_or_else(|| UnknownStressError {
            text: text.to_owned(),
        })
    }
}

/// Random numbers from a seed.
struct Dice {
    seed: u64,
    thrown: u64,
}

impl Dice {
    fn new(seed: u64) -> Self {
        Self { seed, thrown: 0 }
    }

    /// Below `end`, which is not zero.
    fn below(&mut self, end: usize) -> usize {
        self.thrown += 1;
        (scramble(self.seed, self.thrown) % end.max(1) as u64) as usize
    }

    fn shuffle<T>(&mut self, values: &mut [T]) {
        for end in (2..=values.len()).rev() {
            values.swap(end - 1, self.below(end));
        }
    }
}

/// Places of components by kind.
fn by_kind(components: &[TraceComponent]) -> Vec<Vec<usize>> {
    let mut kinds: Vec<(_, Vec<usize>)> = Vec::new();
    for (place, component) in components.iter().enumerate() {
        match kinds.iter_mut().find(|(kind, _)| *kind == component.kind) {
            Some((_, places)) => places.push(place),
            None => kinds.push((component.kind, vec![place])),
        }
    }
    kinds.into_iter().map(|(_, places)| places).collect()
}

impl Trace {
    /// The same requests, with bytes and load times drawn anew for each component from those of its kind (with
    /// replacement).
    #[must_use]
    pub fn drawn(&self, seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let mut components = self.components.clone();
        for places in by_kind(&self.components) {
            for place in &places {
                let from = &self.components[places[dice.below(places.len())]];
                components[*place].bytes = from.bytes;
                components[*place].load_s = from.load_s;
            }
        }
        Self {
            components,
            requests: self.requests.clone(),
        }
    }

    /// The requests before this time.
    #[must_use]
    pub fn until(&self, end: Duration) -> Self {
        let count = self.requests.partition_point(|r| r.at < end);
        Self {
            components: self.components.clone(),
            requests: self.requests[..count].to_vec(),
        }
    }

    /// The trace under stress.
    #[must_use]
    pub fn stressed(&self, stress: Stress, seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let mut trace = self.clone();
        match stress {
            Stress::Relabel => {
                let kinds = by_kind(&self.components);
                for block in trace.requests.chunks_mut(RELABEL_EVERY).skip(1) {
                    let mut names: Vec<usize> = (0..self.components.len()).collect();
                    for places in &kinds {
                        let mut shuffled = places.clone();
                        dice.shuffle(&mut shuffled);
                        for (from, to) in places.iter().zip(shuffled) {
                            names[*from] = to;
                        }
                    }
                    for place in block.iter_mut().flat_map(|r| &mut r.components) {
                        *place = names[*place];
                    }
                }
            }
            Stress::Shuffle => {
                let mut asked: Vec<_> = self
                    .requests
                    .iter()
                    .map(|r| (r.session, r.components.clone()))
                    .collect();
                dice.shuffle(&mut asked);
                for (request, (session, components)) in trace.requests.iter_mut().zip(asked) {
                    request.session = session;
                    request.components = components;
                }
            }
            Stress::OneHit => {
                trace.requests.clear();
                for request in &self.requests {
                    trace.requests.push(request.clone());
                    if self.components.is_empty() || dice.below(1_000) as f64 >= ONE_HIT_SHARE * 1e3
                    {
                        continue;
                    }
                    let like = &self.components[dice.below(self.components.len())];
                    let id = format!("one-hit-{}", trace.components.len());
                    trace.requests.push(TraceRequest {
                        at: request.at,
                        session: SessionId(u64::MAX - trace.components.len() as u64),
                        components: vec![trace.components.len()],
                    });
                    trace.components.push(TraceComponent {
                        content: content_of(&id),
                        id: id.into(),
                        ..like.clone()
                    });
                }
            }
            Stress::Loop => {
                for (number, request) in trace.requests.iter_mut().enumerate() {
                    request.components = vec![number % self.components.len().max(1)];
                }
            }
        }
        trace
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes;

    fn trace() -> Trace {
        let components: String = (0..20)
            .map(|n| {
                format!(
                    "C{n},{},{}\n",
                    if n < 10 { "lora" } else { "checkpoint" },
                    n + 1
                )
            })
            .collect();
        let requests: String = (0..7_000)
            .map(|n| format!("{n},s{},C{}|C{}\n", n % 5, n % 3, 10 + n % 4))
            .collect();
        Trace::parse(
            &format!("t_s,session,components\n{requests}"),
            &format!("id,kind,bytes\n{components}"),
        )
        .unwrap()
    }

    #[test]
    fn sizes_stay_within_their_kind() {
        let (trace, drawn) = (trace(), trace().drawn(7));
        assert_ne!(trace, drawn);
        assert_eq!(drawn, self::trace().drawn(7));
        let (small, large) = drawn.components().split_at(10);
        assert!(small.iter().all(|c| c.bytes <= Bytes(10)));
        assert!(large.iter().all(|c| c.bytes > Bytes(10)));
    }

    #[test]
    fn stresses_are_what_they_say() {
        let trace = trace();
        for stress in Stress::ALL {
            assert_eq!(stress.to_string().parse(), Ok(stress));
            assert_eq!(trace.stressed(stress, 1), trace.stressed(stress, 1));
        }
        let relabelled = trace.stressed(Stress::Relabel, 1);
        assert_eq!(relabelled.requests()[..3_000], trace.requests()[..3_000]);
        assert_ne!(relabelled.requests()[3_000..], trace.requests()[3_000..]);
        let kinds = |trace: &Trace, at: usize| -> Vec<_> {
            let places = &trace.requests()[at].components;
            places
                .iter()
                .map(|place| trace.components()[*place].kind)
                .collect()
        };
        assert!((0..7_000).all(|at| kinds(&trace, at) == kinds(&relabelled, at)));
        let shuffled = trace.stressed(Stress::Shuffle, 1);
        assert_eq!(shuffled.footprint(), trace.footprint());
        let times = |trace: &Trace| trace.requests().iter().map(|r| r.at).collect::<Vec<_>>();
        assert_eq!(times(&shuffled), times(&trace));
        let wonders = trace.stressed(Stress::OneHit, 1);
        let added = wonders.requests().len() - trace.requests().len();
        assert!((3_200..3_800).contains(&added), "{added}");
        assert_eq!(wonders.components().len(), trace.components().len() + added);
        let looped = trace.stressed(Stress::Loop, 1);
        assert_eq!(looped.requests()[25].components, [5]);
    }

    #[test]
    fn a_part_ends_where_it_is_cut() {
        assert_eq!(
            trace().until(Duration::from_secs(100)).requests().len(),
            100
        );
    }
}
