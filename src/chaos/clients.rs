//! The clients: what they ask for, and what they do with it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::RngCore;
use serde::Serialize;
use tokio::time::Instant;

use super::check::Invariant;
use super::library::{FILES, name, read};
use super::world::World;
use crate::{ComponentSet, GpuIndex, KeepAlive, Lease, Priority, Session, Target};

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
}

impl Profile {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Diffusion,
        Self::Language,
        Self::Hot,
        Self::Thrash,
        Self::Herd,
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
    /// A host's own.
    Own(Ask),
}

impl fmt::Debug for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Profile(profile) => profile.fmt(f),
            Self::Own(_) => f.write_str("Own"),
        }
    }
}

impl Workload {
    fn ask(&self, client: usize, turn: usize, rng: &mut Xoshiro256PlusPlus) -> ComponentSet {
        let one = |file: usize| ComponentSet::new([name(file)]);
        let profile = match self {
            Self::Profile(profile) => *profile,
            Self::Own(ask) => {
                let models: Vec<String> = (0..FILES).map(name).collect();
                return ask(client, turn, &models, &mut |bound| below(rng, bound));
            }
        };
        let small = Target::Gpu(GpuIndex(1));
        let anywhere = [Target::Ram, Target::AnyGpu, Target::Best, small][below(rng, 4)];
        let mut set = match profile {
            Profile::Diffusion => {
                let (base, adapter) = (5 + client % 2, below(rng, 5));
                ComponentSet::new([name(base), name(adapter)]).on(Target::AnyGpu)
            }
            Profile::Language => one(6 + below(rng, 2)).on(anywhere),
            Profile::Hot => one(if below(rng, 8) == 0 {
                below(rng, FILES)
            } else {
                4
            })
            .on(anywhere),
            Profile::Thrash => one((client + turn) % FILES).on(anywhere),
            Profile::Herd => one(turn % FILES).on(anywhere),
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
        set
    }

    fn pause(&self, rng: &mut Xoshiro256PlusPlus) -> Duration {
        let most = match self {
            Self::Profile(Profile::Language) => 2000,
            Self::Profile(Profile::Thrash) => 50,
            _ => 400,
        };
        Duration::from_millis(below(rng, most) as u64)
    }
}

/// What a fault tells a client to do next.
#[derive(Debug, Clone, Copy)]
pub(super) enum Order {
    Sleep(u64),
    Flood,
    Nonsense,
}

/// Leases in the world's list of what is held, for as long as the client has them.
struct Held {
    world: Arc<World>,
    leases: Vec<Arc<Lease>>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.world.let_go(&self.leases);
    }
}

/// One client's life.
pub(super) async fn live(world: Arc<World>, client: usize, mut rng: Xoshiro256PlusPlus) {
    let mut turn = 0;
    while !world.stopped() {
        let session = match world.hotset.session(format!("client {client}")).await {
            Ok(session) => session,
            Err(error) => {
                world.event(format!("client {client} has no session: {}", word(&error)));
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        for _ in 0..1 + below(&mut rng, 8) {
            if world.stopped() {
                break;
            }
            turn += 1;
            match world.order(client) {
                Some(Order::Sleep(ms)) => tokio::time::sleep(Duration::from_millis(ms)).await,
                Some(Order::Flood) => {
                    let asked: Vec<_> = (0..30)
                        .map(|i| session.load(world.workload.ask(client, turn + i, &mut rng)))
                        .collect();
                    world.event(format!("client {client} floods"));
                    tokio::time::sleep(Duration::from_millis(300)).await;
                    drop(asked);
                }
                Some(Order::Nonsense) => {
                    let twice = ComponentSet::new([name(1), name(1), name(1)]);
                    for set in [
                        ComponentSet::new(["no-such-model"]),
                        ComponentSet::new(Vec::<String>::new()),
                        ComponentSet::new(["../../etc/passwd", "\u{0}"]),
                        twice.on(Target::Gpu(crate::GpuIndex(77))),
                    ] {
                        let set = set.within(Duration::from_secs(10));
                        let answer = load(&world, &session, set, client, &mut rng).await;
                        drop(answer);
                    }
                }
                None => {
                    let set = world.workload.ask(client, turn, &mut rng);
                    let deadline = Duration::from_millis(1000 + below(&mut rng, 20_000) as u64);
                    use_set(&world, &session, set.within(deadline), client, &mut rng).await;
                }
            }
            tokio::time::sleep(world.workload.pause(&mut rng)).await;
        }
        world.event(format!("client {client} closes its session"));
        drop(session);
    }
}

/// The first word of an error's debug form: its kind, without paths and figures that differ between runs.
pub(super) fn word(error: &impl fmt::Debug) -> String {
    let text = format!("{error:?}");
    let end = text.find([' ', '{', '(']).unwrap_or(text.len());
    text[..end].to_owned()
}

/// What a load may end later than its deadline: the steps of the clock.
const MARGIN: Duration = Duration::from_millis(20);

/// Loads, within the deadline of the set.
async fn load(
    world: &Arc<World>,
    session: &Session,
    set: ComponentSet,
    client: usize,
    rng: &mut Xoshiro256PlusPlus,
) -> Option<Held> {
    let deadline = set.deadline.unwrap_or_default();
    let names: Vec<String> = set.names.iter().map(ToString::to_string).collect();
    let (began, jumped) = (Instant::now(), world.jumped());
    let loading = session.load(set);
    world.asked(format!("client {client} asks for {}", names.join("+")));
    if below(rng, 10) == 0 {
        tokio::time::sleep(Duration::from_millis(below(rng, 100) as u64)).await;
        drop(loading);
        world.event(format!("client {client} cancels"));
        return None;
    }
    if world.is_broken(Invariant::EveryRequestEnds) {
        tokio::time::sleep(deadline + 2 * MARGIN).await;
    }
    let mut leases = std::pin::pin!(loading.leases());
    let mut answer = tokio::time::timeout(deadline + 2 * MARGIN, leases.as_mut()).await;
    if answer.is_err() && world.jumped() > jumped {
        // The jump brought the end of the load and that of this patience to the same instant.
        answer = tokio::time::timeout(2 * MARGIN, leases).await;
    }
    let took = began.elapsed().saturating_sub(world.jumped() - jumped);
    let late = took > deadline + MARGIN;
    match answer {
        Err(_) => {
            world.violated(
                Invariant::EveryRequestEnds,
                format!("client {client} had no answer within {deadline:?}"),
            );
            None
        }
        Ok(_) if late => {
            world.violated(
                Invariant::EveryRequestEnds,
                format!("client {client} waited {took:?}, and its deadline was {deadline:?}"),
            );
            None
        }
        Ok(Err(error)) => {
            world.event(format!("client {client} is refused: {}", word(&error)));
            None
        }
        Ok(Ok(mut leases)) => {
            if world.is_broken(Invariant::AllOrNothing) {
                leases.pop();
            }
            // Of what is split, all blocks.
            let blocks = |lease: &Lease| lease.component().part.as_ref().map(|p| p.blocks.len());
            let there: usize = leases.iter().filter_map(blocks).sum();
            let whole = leases
                .iter()
                .filter_map(|lease| lease.component().part.as_deref());
            let wanted: usize = whole.filter(|p| p.first == 0).map(|p| p.of_blocks).sum();
            if there != wanted {
                world.violated(
                    Invariant::AllOrNothing,
                    format!("client {client} was granted {there} blocks of {wanted}"),
                );
            }
            for name in &names {
                if !leases
                    .iter()
                    .any(|lease| lease.component().id.model.as_str() == name)
                {
                    world.violated(
                        Invariant::AllOrNothing,
                        format!("client {client} was granted a set without {name}"),
                    );
                }
            }
            let leases: Vec<_> = leases.into_iter().map(Arc::new).collect();
            world.hold(&leases);
            world.event(format!("client {client} has {} lease(s)", leases.len()));
            Some(Held {
                world: world.clone(),
                leases,
            })
        }
    }
}

/// Loads a set, looks at its bytes, holds it for a while, and looks again.
async fn use_set(
    world: &Arc<World>,
    session: &Session,
    set: ComponentSet,
    client: usize,
    rng: &mut Xoshiro256PlusPlus,
) {
    let Some(held) = load(world, session, set, client, rng).await else {
        return;
    };
    for _ in 0..2 {
        for lease in &held.leases {
            let seen = read(lease).await;
            // What a lost GPU gives is no matter: its leases are revoked.
            let Some(seen) = seen.filter(|_| lease.revoked().is_none()) else {
                continue;
            };
            if !world.library().is_version(lease, &seen) {
                world.violated(
                    Invariant::LeasedBytes,
                    format!(
                        "{} has bytes that no version of its file has",
                        lease.component().id
                    ),
                );
            }
        }
        tokio::time::sleep(world.workload.pause(rng)).await;
        if let Some(Order::Sleep(ms)) = world.order(client) {
            tokio::time::sleep(Duration::from_millis(ms)).await;
        }
    }
    drop(held);
    world.event(format!("client {client} lets go"));
}
