//! What must hold when nothing goes wrong any more, and of status at any time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hotset_core::catalog::store::Store;
use tokio::time::{Instant, timeout};

use super::check::Invariant;
use super::clients::word;
use super::library::{FILES, Library, name};
use super::world::World;
use crate::{ActorName, Bytes, ComponentSet, Target};

/// How long an answer may take that comes at once in a system that works.
const ANSWER: Duration = Duration::from_secs(30);
/// How long anybody may wait for what others use in turn.
const BOUND: Duration = Duration::from_secs(60);

/// Status has the ledger's figures, where nothing changed while it was asked; and the log has the last decision.
pub(super) async fn status(world: &World) {
    let figures = || -> Vec<_> {
        let views = world.hotset.ledger().views();
        views
            .iter()
            .map(|v| (v.tier, v.budget, v.committed, v.residencies.len()))
            .collect()
    };
    let before = figures();
    let Ok(status) = timeout(ANSWER, world.hotset.status()).await else {
        world.violated(Invariant::StatusIsLedger, "status does not answer".into());
        return;
    };
    let told: Vec<_> = status
        .tiers
        .iter()
        .map(|t| (t.tier, t.budget, t.committed, t.components.len()))
        .collect();
    if figures() == before && told != before {
        world.violated(
            Invariant::StatusIsLedger,
            format!("status says {told:?}, the ledger {before:?}"),
        );
    }
    world.event("status was asked".into());
    let heard = world.state().before.decision;
    let logged = world.hotset.decisions(1).first().map_or(0, |d| d.number);
    if heard != logged {
        world.violated(
            Invariant::DecisionsRecorded,
            format!("decision {heard} was heard of, and {logged} is the last in the log"),
        );
    }
}

/// Every model can be loaded again, and nobody waits long where several take turns.
pub(super) async fn progress(world: &World) {
    if !matches!(timeout(BOUND, world.hotset.scan()).await, Ok(Ok(_))) {
        world.violated(Invariant::Progress, "it does not scan any more".into());
        return;
    }
    let Ok(session) = world.hotset.session("after the faults").await else {
        world.violated(Invariant::Progress, "it opens no session any more".into());
        return;
    };
    let turns = (0..FILES * 2).map(|turn| {
        let target = if turn < FILES {
            Target::Ram
        } else {
            Target::AnyGpu
        };
        let model = name(turn % FILES);
        let set = ComponentSet::new([model.as_str()]).on(target);
        let loading = session.load(set.within(Duration::from_secs(600)));
        async move {
            let began = Instant::now();
            let leases = loading.leases().await;
            match &leases {
                Err(error) => world.violated(
                    Invariant::Progress,
                    format!("{model} does not load to {target:?} any more: {error}"),
                ),
                Ok(_) if began.elapsed() > BOUND => world.violated(
                    Invariant::Fairness,
                    format!("{model} waited {:?}", began.elapsed()),
                ),
                Ok(_) => {}
            }
            let outcome = leases.as_ref().map_or_else(word, |_| "granted".into());
            world.event(format!("{model} to {target:?}: {outcome}"));
        }
    });
    futures::future::join_all(turns).await;
}

/// Six clients use a small model each, again and again, and leave too little for the two large ones, which somebody asks for
/// at last.
pub(super) async fn fairness(world: &World) {
    const GREEDY: usize = 6;
    let over = AtomicBool::new(false);
    let greedy = (0..GREEDY).map(|client| {
        let over = &over;
        async move {
            let Ok(session) = world.hotset.session(format!("greedy {client}")).await else {
                return;
            };
            while !over.load(Ordering::Relaxed) {
                let set = ComponentSet::new([name(client)]).on(Target::Ram);
                let leases = session.load(set.within(BOUND)).leases().await;
                tokio::time::sleep(Duration::from_millis(500)).await;
                drop(leases);
            }
        }
    });
    let patient = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let large = ComponentSet::new([name(FILES - 2), name(FILES - 1)]).on(Target::Ram);
        let outcome = match world.hotset.session("patient").await {
            Ok(session) => session.load(large.within(BOUND)).leases().await,
            Err(error) => Err(error.into()),
        };
        over.store(true, Ordering::Relaxed);
        match outcome {
            Ok(leases) => world.event(format!("the patient one has {} leases", leases.len())),
            Err(error) => world.violated(
                Invariant::Fairness,
                format!("a large set among small ones that come again and again: {error}"),
            ),
        }
    };
    tokio::join!(biased; futures::future::join_all(greedy), patient);
    world.event("all have had their turn".into());
}

/// Nobody holds anything any more, and all of it goes when it is told to.
pub(super) async fn orphans(world: &World) {
    tokio::time::sleep(Duration::from_secs(30)).await;
    let status = world.hotset.status().await;
    let orphan = |what: String| world.violated(Invariant::NoOrphans, what);
    if !status.sessions.is_empty() || status.loads > 0 {
        orphan(format!(
            "{} session(s) and {} load(s) are left",
            status.sessions.len(),
            status.loads
        ));
    }
    for tier in &status.tiers {
        if tier.waiting.is_some_and(|sets| sets > 0) {
            orphan(format!("{:?} set(s) wait in {}", tier.waiting, tier.tier));
        }
    }
    for view in world.hotset.ledger().views() {
        let pinned = view
            .residencies
            .iter()
            .filter(|r| r.pins > 0 || r.loading)
            .count();
        let resident: Bytes = view.residencies.iter().map(|r| r.bytes).sum();
        if pinned > 0 || resident != view.committed {
            orphan(format!(
                "{}: {pinned} pinned, {} committed and {resident} resident",
                view.tier, view.committed
            ));
        }
        let _ = world.hotset.optimise_cache(view.tier, 0.0).await;
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    world.event("everything was told to go".into());
    for view in world.hotset.ledger().views() {
        if view.committed > Bytes::ZERO {
            orphan(format!(
                "{} has {} committed for nothing",
                view.tier, view.committed
            ));
        }
    }
    for gpu in &world.gpus {
        if gpu.allocated() > Bytes::ZERO && !world.is_broken(Invariant::NoOrphans) {
            world.violated(
                Invariant::LedgerIsDevice,
                format!("{} are left on a GPU", gpu.allocated()),
            );
        }
    }
    let arena = world.hotset.arena().view().live;
    let reading = world.disk.faults().reading();
    if arena > Bytes::ZERO || reading > 0 {
        orphan(format!("{arena} of slabs and {reading} read(s) are left"));
    }
}

/// Whether the index lacks what the catalogue has.
pub(super) fn index_is_behind(world: &World, library: &Library) -> bool {
    let catalogue = world.hotset.catalogue();
    let kept = Store::open(&library.index()).and_then(|mut store| store.load());
    !kept.is_ok_and(|kept| {
        kept.len() == catalogue.len() && kept.models().zip(catalogue.models()).all(|(a, b)| a == b)
    })
}

/// Once Discovery was started again, and has scanned, the next start of the system finds what there is.
pub(super) async fn index(world: &World) {
    // A database that was spoilt under an open connection is noticed by whoever opens it.
    world.hotset.kill(ActorName::Discovery);
    let scanned = timeout(BOUND, world.hotset.scan()).await;
    if !matches!(scanned, Ok(Ok(_))) {
        return;
    }
    let library = world.library();
    if index_is_behind(world, &library) {
        world.violated(
            Invariant::IndexIsCatalogue,
            "a restart would find other entries than there are".into(),
        );
    }
}
