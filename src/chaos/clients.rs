//! The clients: what they do with what they ask for.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{RngCore, SeedableRng};
use tokio::sync::broadcast::error::TryRecvError;
use tokio::time::Instant;

use super::check::Invariant;
use super::library::{name, read};
use super::workload::below;
use super::world::World;
use crate::{ComponentSet, Lease, LoadError, Loading, Session, SessionError, Target};

/// What a fault tells a client to do next.
#[derive(Debug, Clone, Copy)]
pub(super) enum Order {
    Sleep(u64),
    ReadLate(u64),
    Flood,
    Nonsense,
    Duplicate,
}

impl Order {
    const fn kind(self) -> &'static str {
        match self {
            Self::Sleep(_) => "client-sleeps",
            Self::ReadLate(_) => "slow-reader",
            Self::Flood => "flood",
            Self::Nonsense => "nonsense",
            Self::Duplicate => "duplicate-ids",
        }
    }
}

/// Leases in the world's list of what is held, for as long as the client has them.
struct Held {
    world: Arc<World>,
    client: usize,
    leases: Vec<Arc<Lease>>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.world.let_go(self.client, &self.leases);
    }
}

/// One client's life.
pub(super) async fn live(world: Arc<World>, client: usize, mut rng: Xoshiro256PlusPlus) {
    let mut turn = 0;
    while !world.stopped() {
        let session = match world.hotset.session(format!("client {client}")).await {
            Ok(session) => session,
            Err(error) => {
                note_draining(&world, &error);
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
            let order = world.order(client);
            if let Some(order) = order {
                world.effect(order.kind());
            }
            match order {
                Some(Order::Sleep(ms)) => tokio::time::sleep(Duration::from_millis(ms)).await,
                Some(Order::Flood) => flood(&world, &session, client, turn, &mut rng).await,
                Some(Order::Nonsense) => nonsense(&world, &session, client, &mut rng).await,
                Some(Order::Duplicate) => {
                    let set = next(&world, client, &mut turn, &mut rng).await;
                    duplicate(&world, &session, set, client, &mut rng).await;
                }
                Some(Order::ReadLate(ms)) => {
                    let set = next(&world, client, &mut turn, &mut rng).await;
                    let late = Duration::from_millis(ms);
                    let held = load(&world, &session, set, client, &mut rng, late).await;
                    drop(held);
                }
                None => {
                    let set = next(&world, client, &mut turn, &mut rng).await;
                    use_set(&world, &session, set, client, &mut rng).await;
                }
            }
            tokio::time::sleep(world.workload.pause(&mut rng)).await;
        }
        world.event(format!("client {client} closes its session"));
        drop(session);
    }
}

/// What the client asks for now; waits for it where its time is recorded.
async fn next(
    world: &World,
    client: usize,
    turn: &mut usize,
    rng: &mut Xoshiro256PlusPlus,
) -> ComponentSet {
    loop {
        let (set, at) = world.workload.ask(client, *turn, rng);
        let set = set.within(Duration::from_millis(1000 + below(rng, 20_000) as u64));
        let due = at.map(|at| world.started + at);
        // Who has slept, or died, goes on where the others are.
        let missed = due.is_some_and(|due| due + Duration::from_secs(1) < Instant::now());
        if missed && !world.stopped() {
            *turn += 1;
            continue;
        }
        if let Some(due) = due {
            tokio::time::sleep_until(due.min(world.end)).await;
        }
        return set;
    }
}

async fn flood(
    world: &World,
    session: &Session,
    client: usize,
    turn: usize,
    rng: &mut Xoshiro256PlusPlus,
) {
    let asked: Vec<_> = (0..30)
        .map(|i| session.load(world.workload.ask(client, turn + i, rng).0))
        .collect();
    world.event(format!("client {client} floods"));
    tokio::time::sleep(Duration::from_millis(300)).await;
    drop(asked);
}

async fn nonsense(
    world: &Arc<World>,
    session: &Session,
    client: usize,
    rng: &mut Xoshiro256PlusPlus,
) {
    let twice = ComponentSet::new([name(1), name(1), name(1)]);
    for set in [
        ComponentSet::new(["no-such-model"]),
        ComponentSet::new(Vec::<String>::new()),
        ComponentSet::new(["../../etc/passwd", "\u{0}"]),
        twice.on(Target::Gpu(crate::GpuIndex(77))),
    ] {
        let set = set.within(Duration::from_secs(10));
        let answer = load(world, session, set, client, rng, Duration::ZERO).await;
        drop(answer);
    }
}

/// Another session by the same name, and the same request four times at once.
async fn duplicate(
    world: &Arc<World>,
    session: &Session,
    set: ComponentSet,
    client: usize,
    rng: &mut Xoshiro256PlusPlus,
) {
    let Ok(other) = world.hotset.session(session.label()).await else {
        return;
    };
    let mut draws = || Xoshiro256PlusPlus::seed_from_u64(rng.next_u64());
    let (mut a, mut b, mut c, mut d) = (draws(), draws(), draws(), draws());
    let now = Duration::ZERO;
    let held = tokio::join!(
        biased;
        load(world, session, set.clone(), client, &mut a, now),
        load(world, &other, set.clone(), client, &mut b, now),
        load(world, session, set.clone(), client, &mut c, now),
        load(world, &other, set.clone(), client, &mut d, now),
    );
    drop(other);
    // The other session's leases are its own: they outlive its handle.
    tokio::time::sleep(world.workload.pause(rng)).await;
    drop(held);
}

/// The first word of an error's debug form: its kind, without paths and figures that differ between runs.
pub(super) fn word(error: &impl fmt::Debug) -> String {
    let text = format!("{error:?}");
    let end = text.find([' ', '{', '(']).unwrap_or(text.len());
    text[..end].to_owned()
}

fn note_draining(world: &World, error: &SessionError) {
    if matches!(error, SessionError::Draining) {
        world.effect("drain");
    }
}

/// Which faults a refusal tells of.
fn note_refusal(world: &World, names: &[String], error: &LoadError) {
    match error {
        // The catalogue knows by now that the file is gone, or not whole.
        LoadError::Resolve(_) => {
            let damage = |name| world.disk.faults().damage.get(name).copied();
            names
                .iter()
                .filter_map(damage)
                .for_each(|kind| world.effect(kind));
        }
        LoadError::Session(error) => note_draining(world, error),
        LoadError::Component { failure, .. } if format!("{failure:?}").contains("NoRoom") => {
            world.effect("no-host-memory");
        }
        _ => {}
    }
}

/// What a load may end later than its deadline: the steps of the clock.
const MARGIN: Duration = Duration::from_millis(20);

/// Hears of everything, looks at nothing for a while, and then at all of it.
async fn look_late(world: &World, late: Duration) {
    let (mut decisions, mut changes) =
        (world.hotset.subscribe_decisions(), world.hotset.subscribe());
    tokio::time::sleep(late).await;
    let mut last = 0;
    loop {
        match decisions.try_recv() {
            Ok(decision) if decision.number <= last => {
                let (number, at) = (decision.number, Invariant::DecisionsRecorded);
                world.violated(at, format!("decision {number} came after {last}"));
            }
            Ok(decision) => last = decision.number,
            Err(TryRecvError::Lagged(_)) => {}
            Err(_) => break,
        }
    }
    while matches!(changes.try_recv(), Ok(_) | Err(TryRecvError::Lagged(_))) {}
}

/// Loads, within the deadline of the set. Looks at the answer after `late`, at the earliest.
async fn load(
    world: &Arc<World>,
    session: &Session,
    set: ComponentSet,
    client: usize,
    rng: &mut Xoshiro256PlusPlus,
    late: Duration,
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
    if !late.is_zero() {
        look_late(world, late).await;
    }
    let answer = answer(world, loading, deadline.saturating_sub(late), jumped).await;
    let took = began.elapsed().saturating_sub(world.jumped() - jumped);
    let is_late = took > deadline.max(late) + MARGIN;
    match answer {
        None => {
            world.violated(
                Invariant::EveryRequestEnds,
                format!("client {client} had no answer within {deadline:?}"),
            );
            None
        }
        Some(_) if is_late => {
            world.violated(
                Invariant::EveryRequestEnds,
                format!("client {client} waited {took:?}, and its deadline was {deadline:?}"),
            );
            None
        }
        Some(Err(error)) => {
            note_refusal(world, &names, &error);
            world.event(format!("client {client} is refused: {}", word(&error)));
            None
        }
        Some(Ok(leases)) => {
            check_whole(world, client, &names, &leases);
            let leases: Vec<_> = leases.into_iter().map(Arc::new).collect();
            world.hold(client, &leases);
            world.event(format!("client {client} has {} lease(s)", leases.len()));
            Some(Held {
                world: world.clone(),
                client,
                leases,
            })
        }
    }
}

/// The answer, where it comes within this time and a margin.
async fn answer(
    world: &World,
    loading: Loading,
    within: Duration,
    jumped: Duration,
) -> Option<Result<Vec<Lease>, LoadError>> {
    let mut leases = std::pin::pin!(loading.leases());
    match tokio::time::timeout(within + 2 * MARGIN, leases.as_mut()).await {
        Ok(answer) => Some(answer),
        // A jump brought the end of the load and that of this patience to the same instant.
        Err(_) if world.jumped() > jumped => tokio::time::timeout(2 * MARGIN, leases).await.ok(),
        Err(_) => None,
    }
}

/// A granted set has all of its models, and of what is split all blocks.
fn check_whole(world: &World, client: usize, names: &[String], leases: &[Lease]) {
    let parts = || leases.iter().filter_map(|l| l.component().part.as_deref());
    let there: usize = parts().map(|part| part.blocks.len()).sum();
    let first = parts().filter(|part| part.first == 0);
    let wanted: usize = first.map(|part| part.of_blocks).sum();
    if there != wanted {
        world.violated(
            Invariant::AllOrNothing,
            format!("client {client} was granted {there} blocks of {wanted}"),
        );
    }
    let is_there = |name: &String| {
        let mut models = leases
            .iter()
            .map(|lease| lease.component().id.model.as_str());
        models.any(|model| model == name)
    };
    for name in names.iter().filter(|name| !is_there(name)) {
        world.violated(
            Invariant::AllOrNothing,
            format!("client {client} was granted a set without {name}"),
        );
    }
}

/// Whether the GPU that has these bytes is lost.
fn is_lost(lease: &Lease) -> bool {
    lease
        .allocation()
        .is_some_and(|memory| memory.device().lost().is_some())
}

/// Loads a set, looks at its bytes, holds it for a while, and looks again.
async fn use_set(
    world: &Arc<World>,
    session: &Session,
    set: ComponentSet,
    client: usize,
    rng: &mut Xoshiro256PlusPlus,
) {
    let Some(held) = load(world, session, set, client, rng, Duration::ZERO).await else {
        return;
    };
    for _ in 0..2 {
        for lease in &held.leases {
            let seen = read(lease).await;
            // What a lost GPU gives is no matter: its leases are revoked, or are about to be.
            if lease.revoked().is_some() || is_lost(lease) {
                continue;
            }
            let what = match seen {
                Some(seen) if world.library().is_version(lease, &seen) => continue,
                Some(_) => "has bytes that no version of its file has",
                None => "is leased, and its bytes are gone",
            };
            let id = &lease.component().id;
            world.violated(Invariant::LeasedBytes, format!("{id} {what}"));
        }
        tokio::time::sleep(world.workload.pause(rng)).await;
        if let Some(Order::Sleep(ms)) = world.sleep_order(client) {
            world.effect("client-sleeps");
            tokio::time::sleep(Duration::from_millis(ms)).await;
        }
    }
    drop(held);
    world.event(format!("client {client} lets go"));
}
