//! Actors that are killed or panic in the middle of a load: leases live on, no byte is lost, every load ends.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hotset::core::device::sim::SimDevice;
use hotset::core::policy::{Candidate, EvictionPolicy, Victim, lru::Lru};
use hotset::core::predict::{Observed, UnsoundStateError};
use hotset::{
    ActorName, Bytes, ComponentSet, ContentId, Device, GpuIndex, Health, Hotset, LoadError,
    ServiceState, Target,
};

use crate::library::{Library, Rig, assert_tensors, outcome, soon, until};

const ALL: [ActorName; 6] = [
    ActorName::Discovery,
    ActorName::RamCache,
    ActorName::VramManager(GpuIndex(0)),
    ActorName::Predictor,
    ActorName::Monitor,
    ActorName::Sessions,
];

async fn restarted(hotset: &Hotset, actor: ActorName, before: u64) {
    until("the actor to be back", async || {
        let status = hotset.status().await;
        let row = status.actors.iter().find(|row| row.name == actor).unwrap();
        row.state == ServiceState::Running && row.restarts > before
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_actor_can_be_killed_in_mid_load() {
    for actor in ALL {
        let library = Library::new();
        let held_tensors = library.single("held", 9, 200);
        let tensors = library.pipeline("base", 1, 300);
        let rig = Rig::start(library.config_with_gpu(Bytes::mib(8), Bytes::mib(8))).await;
        let session = rig.hotset.session("test").await.unwrap();
        let held = outcome(session.load(ComponentSet::new(["held"])))
            .await
            .unwrap();

        rig.reader.close();
        let loading = session.load(ComponentSet::new(["base"]));
        rig.reader.pass(2);
        until("reads to begin", async || rig.reader.opened() > 1).await;
        assert!(rig.hotset.kill(actor), "{actor} is there");
        restarted(&rig.hotset, actor, 0).await;
        rig.reader.open_wide();

        // Granted, or refused in so many words; the loads of a session die with its loader alone.
        match outcome(loading).await {
            Ok(leases) => {
                for lease in &leases {
                    assert_tensors(lease, &tensors[&*lease.component().id.component]).await;
                }
            }
            Err(LoadError::Restarted) => assert_eq!(actor, ActorName::Sessions),
            Err(error) => panic!("{actor}: {error}"),
        }
        // What was leased before is untouched, and nothing was loaded twice.
        assert_tensors(&held[0], &held_tensors).await;
        let again = outcome(session.load(ComponentSet::new(["base"]))).await;
        assert_eq!(again.unwrap_or_else(|e| panic!("{actor}: {e}")).len(), 4);
        if actor != ActorName::Sessions {
            assert_eq!(rig.reader.opened(), 5, "{actor}: something was read twice");
        }
        drop(held);
        rig.assert_empty().await;
        soon("drain", rig.hotset.drain()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_that_waits_for_memory_survives_the_restart_of_the_keeper() {
    let library = Library::new();
    library.single("a", 1, 700);
    library.single("b", 2, 700);
    let rig = Rig::start(library.config(Bytes::mib(1))).await;
    let session = rig.hotset.session("test").await.unwrap();
    let held = outcome(session.load(ComponentSet::new(["a"])))
        .await
        .unwrap();
    let waiting = session.load(ComponentSet::new(["b"]));
    let waits = async || rig.hotset.status().await.tiers[0].waiting == Some(1);
    until("it to wait", waits).await;
    for round in 0..3 {
        assert!(rig.hotset.kill(ActorName::RamCache));
        restarted(&rig.hotset, ActorName::RamCache, round).await;
        until("it to wait again", waits).await;
    }
    drop(held);
    assert_eq!(outcome(waiting).await.unwrap().len(), 1);
}

/// Panics when it is asked to choose, as often as it is told to.
struct Panicking(Arc<AtomicUsize>);

impl EvictionPolicy for Panicking {
    fn name(&self) -> &'static str {
        "panicking"
    }

    fn rank(&mut self, now: Duration, candidates: &[Candidate]) -> Vec<Victim> {
        let left = self
            .0
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        assert!(left.is_err(), "a policy with a bug");
        Lru.rank(now, candidates)
    }
}

async fn with_panicking_policy(panics: usize) -> (Library, Hotset) {
    let library = Library::new();
    library.single("a", 1, 700);
    library.single("b", 2, 700);
    let mut config = library.config(Bytes::mib(1));
    config.supervision.max_restarts = 5;
    config.supervision.backoff = Duration::from_millis(1);
    let left = Arc::new(AtomicUsize::new(0));
    let policy = left.clone();
    let hotset = Hotset::builder()
        .config(config)
        .eviction(Arc::new(move || Box::new(Panicking(policy.clone()))))
        .start()
        .await
        .unwrap();
    let session = hotset.session("first").await.unwrap();
    outcome(session.load(ComponentSet::new(["a"])))
        .await
        .unwrap();
    left.store(panics, Ordering::SeqCst);
    (library, hotset)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_in_an_actor_is_a_restart_and_the_load_is_granted() {
    let (_library, hotset) = with_panicking_policy(4).await;
    let session = hotset.session("second").await.unwrap();
    outcome(session.load(ComponentSet::new(["b"])))
        .await
        .unwrap();
    let status = hotset.status().await;
    assert_eq!(status.counters.actor_restarts, 4);
    let failure = |row: &hotset::ActorStatus| row.last_failure.clone().unwrap_or_default();
    assert!(
        status
            .actors
            .iter()
            .any(|row| failure(row).contains("a policy with a bug"))
    );
    assert_eq!(status.health, Health::Green);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_actor_that_keeps_failing_is_taken_out_of_service_and_the_rest_goes_on() {
    let library = Library::new();
    library.single("a", 1, 100);
    let mut config = library.config_with_gpu(Bytes::mib(1), Bytes::mib(1));
    config.supervision.max_restarts = 3;
    config.supervision.backoff = Duration::from_millis(1);
    let rig = Rig::start(config).await;
    let manager = ActorName::VramManager(GpuIndex(0));
    for round in 0..4 {
        until("it to run", async || rig.hotset.kill(manager)).await;
        if round < 3 {
            restarted(&rig.hotset, manager, round).await;
        }
    }
    let down = async || {
        let status = rig.hotset.status().await;
        status
            .actors
            .iter()
            .any(|a| a.state == ServiceState::OutOfService)
    };
    until("it to be given up", down).await;
    let status = rig.hotset.status().await;
    assert!(
        matches!(&status.health, Health::Red { .. }),
        "{:?}",
        status.health
    );
    let session = rig.hotset.session("test").await.unwrap();
    let error = outcome(session.load(ComponentSet::new(["a"])))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("out of service"), "{error}");
    let ram = ComponentSet::new(["a"]).on(hotset::Target::Ram);
    assert_eq!(outcome(session.load(ram)).await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_lets_loads_finish_and_refuses_new_ones() {
    let library = Library::new();
    let tensors = library.single("a", 1, 500);
    let rig = Rig::start(library.config(Bytes::mib(1))).await;
    let session = rig.hotset.session("test").await.unwrap();
    rig.reader.close();
    let loading = session.load(ComponentSet::new(["a"]));
    until("the read to begin", async || rig.reader.opened() == 1).await;
    let (hotset, reader) = (rig.hotset, rig.reader);
    let drain = tokio::spawn(hotset.drain());
    until("new work to be refused", async || {
        // One that slipped in before the drain began is cancelled by dropping it.
        let refused = session.load(ComponentSet::new(["a"]).within(Duration::from_millis(20)));
        let error = outcome(refused).await.unwrap_err();
        error.to_string().contains("draining")
    })
    .await;
    reader.open_wide();
    let leases = outcome(loading).await.unwrap();
    soon("drain", drain).await.unwrap();
    // The system is gone, the lease is not.
    assert_tensors(&leases[0], &tensors).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_cancels_what_does_not_finish() {
    let library = Library::new();
    library.single("a", 1, 500);
    let mut config = library.config(Bytes::mib(1));
    config.supervision.drain = Duration::from_millis(50);
    let rig = Rig::start(config).await;
    let session = rig.hotset.session("test").await.unwrap();
    rig.reader.close();
    let loading = session.load(ComponentSet::new(["a"]));
    until("the read to begin", async || rig.reader.opened() == 1).await;
    // The disk comes back only after the load was given up.
    let reader = rig.reader.clone();
    let drain = tokio::spawn(rig.hotset.drain());
    assert!(outcome(loading).await.is_err());
    reader.open_wide();
    soon("drain", drain).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_systems_live_in_one_process() {
    let library = Library::new();
    library.single("a", 1, 100);
    let first = Rig::start(library.config(Bytes::mib(1))).await;
    let second = Rig::start(library.config(Bytes::mib(1))).await;
    for rig in [&first, &second] {
        let session = rig.hotset.session("test").await.unwrap();
        outcome(session.load(ComponentSet::new(["a"])))
            .await
            .unwrap();
    }
    drop(first);
    let session = second.hotset.session("again").await.unwrap();
    outcome(session.load(ComponentSet::new(["a"])))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_and_loads_are_bounded_and_say_when_to_come_again() {
    let library = Library::new();
    library.single("a", 1, 100);
    let mut config = library.config(Bytes::mib(1));
    config.sessions.max_sessions = 2;
    config.sessions.max_loads_per_session = 1;
    let rig = Rig::start(config).await;
    let first = rig.hotset.session("1").await.unwrap();
    let second = rig.hotset.session("2").await.unwrap();
    let busy = rig.hotset.session("3").await.unwrap_err();
    assert!(busy.to_string().contains("try again in 1s"), "{busy}");
    drop(second);
    until("a place to be free", async || {
        rig.hotset.session("3").await.is_ok()
    })
    .await;

    rig.reader.close();
    let running = first.load(ComponentSet::new(["a"]));
    let refused = outcome(first.load(ComponentSet::new(["a"])))
        .await
        .unwrap_err();
    assert!(refused.to_string().starts_with("busy"), "{refused}");
    rig.reader.open_wide();
    outcome(running).await.unwrap();
}

/// A GPU that breaks and is back before its manager, which was killed, could see it: what was in it is gone all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_loss_that_the_manager_did_not_see_revokes_the_leases() {
    let library = Library::new();
    library.single("a", 1, 100);
    let config = library.config_with_gpu(Bytes::mib(8), Bytes::mib(8));
    let device = SimDevice::new(GpuIndex(0), config.gpu[0].sim.clone());
    let hotset = Hotset::builder()
        .config(config)
        .devices(vec![device.clone()])
        .start()
        .await
        .unwrap();
    let session = hotset.session("test").await.unwrap();
    let set = ComponentSet::new(["a"]).on(Target::Gpu(GpuIndex(0)));
    let held = outcome(session.load(set.clone())).await.unwrap();
    assert!(hotset.kill(ActorName::VramManager(GpuIndex(0))));
    device.break_context(Some("error 700".into()));
    // Its manager hears of the new context a moment after there is one.
    until("its context to be made anew", async || {
        let tiers = hotset.status().await.tiers;
        device.lost().is_none() && tiers.iter().all(|tier| tier.out_of_service.is_none())
    })
    .await;
    assert!(held[0].revoked().is_some(), "its memory is gone");
    let again = outcome(session.load(set)).await.unwrap();
    assert!(again[0].revoked().is_none());
}

/// Remembers how many requests it was told of, over all its successors, and of what all that they ask for costs.
struct Remembering {
    told: u64,
    costs: HashSet<ContentId>,
    shown: Arc<AtomicUsize>,
}

impl EvictionPolicy for Remembering {
    fn name(&self) -> &'static str {
        "remembering"
    }

    fn on_cost(&mut self, content: &ContentId, whole_s: f64) {
        if whole_s > 0.0 {
            self.costs.insert(*content);
        }
    }

    fn observe(&mut self, _now: Duration, request: &Observed<'_>) {
        let mut asked = request.components.iter();
        assert!(asked.all(|seen| self.costs.contains(&seen.content)));
        self.told += 1;
        self.shown.store(self.told as usize, Ordering::SeqCst);
    }

    fn appetite(&self) -> Option<u32> {
        Some(10)
    }

    fn learned(&self) -> Option<Vec<u8>> {
        Some(self.told.to_le_bytes().to_vec())
    }

    fn resume(
        &mut self,
        _now: Duration,
        _away: Duration,
        learned: &[u8],
    ) -> Result<(), UnsoundStateError> {
        let what = "it is no count";
        let told = learned.try_into().map_err(|_| UnsoundStateError { what })?;
        self.told = u64::from_le_bytes(told);
        self.shown.store(self.told as usize, Ordering::SeqCst);
        Ok(())
    }

    fn rank(&mut self, now: Duration, candidates: &[Candidate]) -> Vec<Victim> {
        Lru.rank(now, candidates)
    }
}

#[tokio::test]
async fn what_a_policy_has_learned_outlives_its_actor_and_the_system() {
    let library = Library::new();
    library.single("a", 1, 700);
    library.single("b", 2, 700);
    let kept = tempfile::tempdir().unwrap();
    let shown = Arc::new(AtomicUsize::new(0));
    let start = async || {
        let mut config = library.config(Bytes::mib(1));
        config.predict.folder = Some(kept.path().join("learned"));
        let shown = shown.clone();
        let policy = move || -> Box<dyn EvictionPolicy> {
            Box::new(Remembering {
                told: 0,
                costs: HashSet::new(),
                shown: shown.clone(),
            })
        };
        let started = Hotset::builder().config(config).eviction(Arc::new(policy));
        started.start().await.unwrap()
    };
    let load = async |hotset: &Hotset, name: &str| {
        let session = hotset.session("s").await.unwrap();
        drop(
            session
                .load(ComponentSet::new([name]))
                .leases()
                .await
                .unwrap(),
        );
    };
    let told = || shown.load(Ordering::SeqCst);

    let hotset = start().await;
    load(&hotset, "a").await;
    // It is told when it has to choose.
    load(&hotset, "b").await;
    let first = told();
    assert!(first >= 2, "{first}");
    assert!(hotset.kill(ActorName::RamCache));
    restarted(&hotset, ActorName::RamCache, 0).await;
    load(&hotset, "a").await;
    let second = told();
    assert!(second > first, "{second} after {first}");
    // More than it can take: some are left out.
    for _ in 0..2_000 {
        load(&hotset, "a").await;
    }
    load(&hotset, "b").await;
    let third = told();
    assert!(third > second && third < second + 1_500, "{third}");
    hotset.drain().await;

    let hotset = start().await;
    assert_eq!(told(), third);
    // A damaged file is no reason not to start.
    hotset.drain().await;
    std::fs::write(kept.path().join("learned/ram.learned"), b"nonsense").unwrap();
    shown.store(0, Ordering::SeqCst);
    let hotset = start().await;
    load(&hotset, "a").await;
    load(&hotset, "b").await;
    assert!(told() < third);
    hotset.drain().await;
}
