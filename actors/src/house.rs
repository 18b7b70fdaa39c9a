//! What all actors of one system share: the configuration, the ledger, the published catalogue, the devices, and the
//! addresses of the others. It is owned by the system and outlives every actor.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use hotset_core::breaks::{self, Break};
use hotset_core::catalog::{CatalogueCell, Change};
use hotset_core::config::Config;
use hotset_core::decision::{Act, Decision, DecisionLog};
use hotset_core::device::{self, Device, Figures, Granules, Links};
use hotset_core::io::Reader;
use hotset_core::machine::Machine;
use hotset_core::memory::{Arena, ArenaOptions, Ledger, TierView};
use hotset_core::plan::rates::{Rates, Way};
use hotset_core::plan::{ComponentSet, KeepAlive, Planner};
use hotset_core::policy::pressure::{HostMemory, ram_budget};
use hotset_core::policy::{self, EvictionPolicy};
use hotset_core::predict::Predictor;
use hotset_core::usage::Usage;
use hotset_core::{Bytes, GpuIndex, LeaseId, RequestId, SessionId, Tier};
use tokio::sync::{Semaphore, broadcast, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::counters::Counters;
use crate::discovery::DiscoveryMessage;
use crate::hot::HotSets;
use crate::learned::{LearnedHere, Learner};
use crate::monitor::{MonitorMessage, MonitorView, Pressure};
use crate::phases::Phases;
use crate::plan::KnownBlocks;
use crate::predictor::PredictorMessage;
use crate::quotas::Quotas;
use crate::ram_cache::RamCacheMessage;
use crate::sessions::SessionsMessage;
use crate::slot::Slot;
use crate::supervisor::{ActorName, SupervisorMessage};
use crate::uses::{Pushed, Used, UsedSet, Uses};
use crate::vram_manager::{Turns, VramManagerMessage};

/// Makes the eviction policy of a tier, at each start of its keeper.
pub type EvictionPolicyFactory = Arc<dyn Fn() -> Box<dyn EvictionPolicy> + Send + Sync>;

/// What happens to a GPU that its users have to know.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum GpuEvent {
    /// It is lost, and what was in its memory with it. These leases hold nothing any more.
    Lost {
        /// Which tier.
        tier: Tier,
        /// Why.
        reason: Arc<str>,
        /// The leases, with the sessions that hold them.
        leases: Vec<(LeaseId, SessionId)>,
    },
    /// It works again, empty.
    Back {
        /// Which tier.
        tier: Tier,
    },
    /// This process cannot use it any more; another process could. Who runs hotset in a process of its own, restarts it, as
    /// `hotset serve` does.
    Spent {
        /// Which tier.
        tier: Tier,
        /// Why.
        reason: Arc<str>,
    },
    /// Other processes have taken so much of its memory that only leases are left to give some back. Whoever holds one of
    /// these and can do without it should let go.
    Wanted {
        /// Which tier.
        tier: Tier,
        /// How much is missing.
        missing: Bytes,
        /// The leases, with the sessions that hold them.
        leases: Vec<(LeaseId, SessionId)>,
    },
}

/// A set waits for memory that leases hold, and nothing that could be evicted would help it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// Where.
    pub tier: Tier,
    /// Whose set it is; session and request 0 where it is another process that has taken the memory.
    pub session: SessionId,
    /// Which load.
    pub request: RequestId,
    /// What is missing beyond all that could be evicted.
    pub missing: Bytes,
}

/// See the module's page.
pub(crate) struct House {
    /// Tells two systems in one process apart; prefixes the names of actors, which are global.
    pub(crate) id: u64,
    pub(crate) config: Arc<Config>,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) catalogue: Arc<CatalogueCell>,
    /// Each change of the published catalogue.
    pub(crate) catalogue_changes: broadcast::Sender<Arc<[Change]>>,
    /// What happens to GPUs.
    pub(crate) gpu_events: broadcast::Sender<GpuEvent>,
    /// Why this process cannot use one of its GPUs any more.
    pub(crate) spent: watch::Sender<Option<Arc<str>>>,
    /// Each decision, as it is recorded.
    pub(crate) decided: broadcast::Sender<Decision>,
    /// What sessions are granted, for who records it.
    pub(crate) granted: broadcast::Sender<Used>,
    /// What was learned, for those that come after.
    learned: LearnedHere,
    /// Each set that has to wait because others hold the memory.
    pub(crate) shortages: broadcast::Sender<Shortage>,
    /// What Monitor has measured last.
    pub(crate) measured: watch::Sender<MonitorView>,
    pub(crate) reader: Arc<dyn Reader>,
    /// Host memory, kept warm between components.
    pub(crate) arena: Arena,
    pub(crate) machine: Machine,
    /// Whether others need host memory, for whoever wants to let go of something.
    pub(crate) pressure: watch::Sender<Pressure>,
    pub(crate) devices: BTreeMap<GpuIndex, Arc<dyn Device>>,
    pub(crate) granules: BTreeMap<GpuIndex, Granules>,
    /// Whose batches the link to each GPU carries.
    pub(crate) turns: BTreeMap<GpuIndex, Arc<Turns>>,
    /// How the GPUs reach each other's memory. Replaced when a link turns out not to work.
    links: ArcSwap<Links>,
    /// What sessions may have.
    pub(crate) quotas: Quotas,
    /// What components can be split into.
    pub(crate) blocks: KnownBlocks,
    /// How fast bytes move on each of them, and from each disk. A short lock.
    rates: Mutex<Rates>,
    /// How components are used. A short lock, taken under that of the decisions.
    usage: Mutex<Usage>,
    /// What each device said at the start.
    pub(crate) first_figures: BTreeMap<GpuIndex, Figures>,
    pub(crate) eviction: EvictionPolicyFactory,
    pub(crate) counters: Counters,
    pub(crate) phases: Phases,
    /// Sets that can be leased without a plan.
    pub(crate) hot: HotSets,
    /// What was used in each tier, for its keeper's policy, and in all, for Predictor.
    pub(crate) uses: BTreeMap<Tier, Uses>,
    pub(crate) asked: Uses,
    /// Beside the ledger's the one lock that several actors take, for one push.
    decisions: Mutex<DecisionLog>,

    // How many may do something at once, over all actors and their restarts.
    pub(crate) reads: Arc<Semaphore>,
    /// Prefetches have places of their own, so that no demand waits for one.
    pub(crate) prefetches: Arc<Semaphore>,
    pub(crate) loads: Arc<Semaphore>,

    // Ends.
    pub(crate) stop: CancellationToken,
    pub(crate) draining: AtomicBool,
    /// Whether Predictor learns and proposes; kept here for its restarts.
    pub(crate) predicting: AtomicBool,
    pub(crate) tasks: TaskTracker,

    // Addresses.
    pub(crate) supervisor: Slot<SupervisorMessage>,
    pub(crate) discovery: Slot<DiscoveryMessage>,
    pub(crate) ram: Slot<RamCacheMessage>,
    pub(crate) vram: BTreeMap<GpuIndex, Slot<VramManagerMessage>>,
    pub(crate) predictor: Slot<PredictorMessage>,
    pub(crate) monitor: Slot<MonitorMessage>,
    pub(crate) sessions: Slot<SessionsMessage>,

    next_session: AtomicU64,
    next_request: AtomicU64,
}

impl fmt::Debug for House {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("House")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// Prefetches that are read at the same time: while one reads its last piece, the next one opens its files.
const PREFETCHES: usize = 2;

/// Changes and events that a slow listener may be behind.
const CHANGES_KEPT: usize = 256;
/// The same for decisions.
const DECISIONS_KEPT: usize = 4096;

/// Systems started in this process so far. Only used to name actors.
static SYSTEMS: AtomicU64 = AtomicU64::new(0);

/// The GPUs as they were found at the start.
pub(crate) struct Gpus {
    pub(crate) devices: BTreeMap<GpuIndex, Arc<dyn Device>>,
    pub(crate) links: Links,
    pub(crate) first_figures: BTreeMap<GpuIndex, Figures>,
}

impl House {
    pub(crate) fn new(
        config: Arc<Config>,
        ledger: Arc<Ledger>,
        reader: Arc<dyn Reader>,
        gpus: Gpus,
        eviction: Option<EvictionPolicyFactory>,
        machine: Machine,
    ) -> Self {
        let Gpus {
            devices,
            links,
            first_figures,
        } = gpus;
        let name = config.policy.eviction;
        let ram_budget = ledger.budget(Tier::Ram).unwrap_or_default();
        Self {
            id: SYSTEMS.fetch_add(1, Ordering::Relaxed),
            catalogue: Arc::new(CatalogueCell::default()),
            catalogue_changes: broadcast::Sender::new(CHANGES_KEPT),
            gpu_events: broadcast::Sender::new(CHANGES_KEPT),
            spent: watch::Sender::new(None),
            // A set of hundreds evicts as many at once.
            decided: broadcast::Sender::new(DECISIONS_KEPT),
            granted: broadcast::Sender::new(DECISIONS_KEPT),
            shortages: broadcast::Sender::new(CHANGES_KEPT),
            measured: watch::Sender::new(MonitorView::default()),
            reader,
            granules: devices
                .iter()
                .map(|(gpu, device)| (*gpu, device.describe().granules))
                .collect(),
            turns: devices.keys().map(|gpu| (*gpu, Arc::default())).collect(),
            links: ArcSwap::from_pointee(links),
            rates: Mutex::default(),
            usage: Mutex::default(),
            blocks: KnownBlocks::default(),
            quotas: Quotas::new(&config),
            hot: HotSets::default(),
            uses: std::iter::once(Tier::Ram)
                .chain(devices.keys().map(|gpu| Tier::Vram(*gpu)))
                .map(|tier| (tier, Uses::default()))
                .collect(),
            asked: Uses::default(),
            vram: devices.keys().map(|gpu| (*gpu, Slot::new())).collect(),
            learned: LearnedHere::before(&config.predict, devices.keys().copied()),
            devices,
            first_figures,
            eviction: eviction.unwrap_or_else(|| Arc::new(move || policy::by_name(name))),
            counters: Counters::default(),
            phases: Phases::default(),
            decisions: Mutex::new(DecisionLog::new(config.monitor.decisions)),
            reads: Arc::new(Semaphore::new(config.load.reads.max(1))),
            prefetches: Arc::new(Semaphore::new(PREFETCHES)),
            arena: Arena::new(ArenaOptions {
                limit: ram_budget,
                keep_warm: config.ram.keep_warm.unwrap_or(Bytes(u64::MAX)),
                machine: Some(machine.clone()),
                ..ArenaOptions::default()
            }),
            machine,
            pressure: watch::Sender::new(Pressure::Unknown),
            loads: Arc::new(Semaphore::new(config.sessions.max_loads.max(1))),
            stop: CancellationToken::new(),
            draining: AtomicBool::new(false),
            predicting: AtomicBool::new(config.predict.enabled),
            tasks: TaskTracker::new(),
            supervisor: Slot::new(),
            discovery: Slot::new(),
            ram: Slot::new(),
            predictor: Slot::new(),
            monitor: Slot::new(),
            sessions: Slot::new(),
            next_session: AtomicU64::new(1),
            next_request: AtomicU64::new(1),
            config,
            ledger,
        }
    }

    /// Does work that blocks where that is allowed, and counts it among the system's tasks.
    pub(crate) fn off_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        if self.machine.is_simulated() {
            self.tasks.spawn(async move { work() })
        } else {
            self.tasks.spawn_blocking(work)
        }
    }

    /// The same for work that the end of the system does not wait for.
    pub(crate) fn aside<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        if self.machine.is_simulated() {
            tokio::spawn(async move { work() })
        } else {
            tokio::task::spawn_blocking(work)
        }
    }

    /// Messages that may be waiting for an actor.
    pub(crate) fn mailbox(&self, actor: ActorName) -> u64 {
        match actor {
            ActorName::Discovery => self.discovery.depth(),
            ActorName::RamCache => self.ram.depth(),
            ActorName::VramManager(gpu) => self.vram.get(&gpu).map_or(0, Slot::depth),
            ActorName::Predictor => self.predictor.depth(),
            ActorName::Monitor => self.monitor.depth(),
            ActorName::Sessions => self.sessions.depth(),
        }
    }

    pub(crate) fn next_session(&self) -> SessionId {
        SessionId(self.next_session.fetch_add(1, Ordering::Relaxed))
    }

    pub(crate) fn next_request(&self) -> RequestId {
        RequestId(self.next_request.fetch_add(1, Ordering::Relaxed))
    }

    /// A policy for a tier, with what its predecessor had learned, in this system or the one before.
    pub(crate) fn policy_of(&self, tier: Tier) -> Box<dyn EvictionPolicy> {
        let mut policy = (self.eviction)();
        let now = self.ledger.now();
        self.learned
            .resume(Learner::Policy(tier), now, |away, learned| {
                policy.resume(now, away, learned)
            });
        policy
    }

    /// A predictor for prefetches, with what its predecessor had learned.
    pub(crate) fn predictor_before(&self) -> Predictor {
        let config = &self.config.predict;
        let mut predictor = Predictor::new(config);
        let now = self.ledger.now();
        self.learned
            .resume(Learner::Predictor, now, |away, learned| {
                predictor = Predictor::restored(config, now, away, learned)?;
                Ok(())
            });
        predictor
    }

    /// Keeps what somebody has learned.
    pub(crate) fn keep_learned(&self, learner: Learner, bytes: Vec<u8>) {
        self.learned.keep(learner, self.ledger.now(), bytes);
    }

    /// Writes what was learned to the folder of the configuration, where there is one. Blocks.
    pub(crate) fn write_learned(&self) {
        if let Some(folder) = &self.config.predict.folder {
            self.learned.write(folder);
        }
    }

    /// A name for an actor that no other system in the process has.
    pub(crate) fn actor_name(&self, name: impl fmt::Display) -> String {
        format!("hotset{}.{name}", self.id)
    }

    /// Notes for the policy of a tier what a session uses there.
    pub(crate) fn note_use(&self, session: SessionId, tier: Tier, components: UsedSet) {
        let Some(uses) = self.uses.get(&tier) else {
            return;
        };
        if uses.push(|| self.ledger.now(), session, tier, components) == Pushed::Many
            && let Some(wake) = self.ledger.wake(tier)
        {
            wake.notify_one();
        }
    }

    /// Notes for Predictor what a session was granted.
    pub(crate) fn note_granted(&self, session: SessionId, tier: Tier, components: UsedSet) {
        if self.granted.receiver_count() > 0 {
            // Nobody may listen any more.
            let _ = self.granted.send(Used {
                at: self.ledger.now(),
                session,
                tier,
                components: components.clone(),
            });
        }
        let pushed = self
            .asked
            .push(|| self.ledger.now(), session, tier, components);
        let wanted = match pushed {
            // Nobody is in a hurry but who predicts.
            Pushed::First => self.predicting.load(Ordering::Relaxed),
            Pushed::Many => true,
            Pushed::Further => false,
        };
        if wanted {
            // A guess less where it is not there.
            let _ = self.predictor.cast(PredictorMessage::Requested);
        }
    }

    /// Records a decision.
    pub(crate) fn decide(&self, act: Act) {
        if breaks::is(Break::LostDecision) && matches!(act, Act::Evict { .. }) {
            return;
        }
        tracing::info!(target: "hotset::decision", "{}", act.sentence());
        let at = self.ledger.now();
        let mut log = self
            .decisions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let decision = log.push(at, act);
        // Under the lock, so that listeners hear of decisions in their order.
        self.usage().decided(&decision);
        if self.decided.receiver_count() > 0 {
            let _ = self.decided.send(decision);
        }
    }

    /// The decisions that `wanted` holds for, newest first, at most `limit`.
    pub(crate) fn decisions(
        &self,
        limit: usize,
        wanted: impl Fn(&Decision) -> bool,
    ) -> Vec<Decision> {
        self.decisions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .newest_first()
            .filter(|decision| wanted(decision))
            .take(limit)
            .cloned()
            .collect()
    }

    /// Makes the budget of the RAM tier what this process may use now, since the limits of a container can change while it
    /// runs, without the memory that clients still have though its lease has ended.
    pub(crate) fn settle_budget(self: &Arc<Self>, host: &HostMemory) {
        let allowed = ram_budget(self.config.ram.budget, host.usable());
        let budget = allowed.saturating_sub(self.arena.view().lingering);
        let Some(current) = self.ledger.budget(Tier::Ram) else {
            return;
        };
        if current == budget {
            return;
        }
        self.ledger.open_tier(Tier::Ram, budget);
        if budget < current {
            // What nobody holds goes, down to what is allowed.
            let _ = self.ram.cast(RamCacheMessage::Woken);
        }
        let arena = self.arena.clone();
        // Unmapping gigabytes takes long.
        self.off_thread(move || arena.set_limit(allowed));
    }

    /// How the GPUs reach each other's memory now.
    pub(crate) fn links(&self) -> Arc<Links> {
        self.links.load_full()
    }

    /// Asks the devices once more how they reach each other.
    pub(crate) async fn open_links(&self) {
        self.links
            .store(Arc::new(device::links(&self.devices).await));
    }

    /// A link does not work, whatever the devices say: nothing goes that way any more.
    pub(crate) fn close_link(&self, from: GpuIndex, to: GpuIndex) {
        self.links.rcu(|links| {
            let mut links = Links::clone(links);
            links.remove(&(from, to));
            links
        });
    }

    /// How long a load of this set may take.
    pub(crate) fn deadline_of(&self, set: &ComponentSet) -> Duration {
        set.deadline.unwrap_or(self.config.load.deadline)
    }

    /// The state of everything that plans are made by.
    pub(crate) fn outlook(&self) -> Outlook<'_> {
        Outlook {
            house: self,
            tiers: self.ledger.views(),
            links: self.links(),
            rates: self.rates().clone(),
        }
    }

    /// How long what a set uses stays after its last lease.
    pub(crate) fn keep_alive_of(&self, set: &ComponentSet) -> KeepAlive {
        set.keep_alive.unwrap_or(self.config.load.keep_alive)
    }

    pub(crate) fn usage(&self) -> MutexGuard<'_, Usage> {
        // Nothing under the lock can panic.
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn rates(&self) -> MutexGuard<'_, Rates> {
        // Nothing under the lock can panic.
        self.rates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something begins to move on a way; the time until the value is dropped counts.
    pub(crate) fn moving(self: &Arc<Self>, way: Way) -> Moving {
        self.rates().begin(way, self.ledger.now());
        Moving {
            house: self.clone(),
            way,
            moved: Bytes::ZERO,
        }
    }
}

/// Bytes on their way, for the measurement of rates.
pub(crate) struct Moving {
    house: Arc<House>,
    way: Way,
    pub(crate) moved: Bytes,
}

impl Drop for Moving {
    fn drop(&mut self) {
        let now = self.house.ledger.now();
        self.house.rates().end(self.way, now, self.moved);
    }
}

/// See [`House::outlook`].
pub(crate) struct Outlook<'a> {
    house: &'a House,
    pub(crate) tiers: Vec<TierView>,
    links: Arc<Links>,
    rates: Rates,
}

impl Outlook<'_> {
    /// How the GPUs reach each other is forgotten.
    pub(crate) fn without_links(mut self) -> Self {
        self.links = Arc::default();
        self
    }

    pub(crate) fn planner(&self) -> Planner<'_> {
        Planner {
            tiers: &self.tiers,
            granules: &self.house.granules,
            links: &self.links,
            rates: &self.rates,
            ring: self.house.config.load.ring,
            now: self.house.ledger.now(),
        }
    }
}
