//! The world of one run: the system over its doubles, what its clients hold, and what was seen of it.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{DefaultHasher, Hash};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hotset_core::config::GpuConfig;
use hotset_core::device::sim::SimDevice;
use hotset_core::machine::Machine;
use hotset_core::policy;
use hotset_core::policy::pressure::HostMemory;
use tokio::sync::broadcast;
use tokio::time::Instant;

use super::check::{Before, Invariant, Violation, check};
use super::clients::Order;
use super::disk::Disk;
use super::library::Library;
use super::panicking::{Panicking, Panics};
use super::workload::Workload;
use super::{ChaosError, Scenario};
use crate::{Bytes, Decision, Device, GpuIndex, Hotset, Lease, LeaseId};

pub(super) const CLIENTS: usize = 6;
/// Less than the library, so that there is always something to evict.
pub(super) const RAM: Bytes = Bytes::kib(640);
/// The last has no room for the largest model: it is split there, or refused.
pub(super) const VRAM: [Bytes; 2] = [Bytes::kib(512), Bytes::kib(240)];
/// Every so many seeds have the configuration's own bounds on restarts.
pub(super) const BOUNDS_EVERY: u64 = 8;
/// The most violations of one run: one cause is seen at each event from then on.
const MOST_VIOLATIONS: usize = 20;

pub(super) const HOST: HostMemory = HostMemory {
    total: Bytes::gib(64),
    available: Bytes::gib(48),
    full_avg10: None,
    cgroup: None,
};

/// How far the system is with a GPU that was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Vanished {
    Unnoticed,
    /// It is out of service.
    Noticed,
    /// It is back in service: what was in it may have gone since the look before, and from now on needs a decision again.
    Over,
}

/// What changes during a run.
pub(super) struct State {
    pub(super) hasher: DefaultHasher,
    pub(super) log: VecDeque<String>,
    kept: usize,
    pub(super) events: u64,
    pub(super) requests: u64,
    pub(super) granted: u64,
    pub(super) held: BTreeMap<LeaseId, Arc<Lease>>,
    /// How many leases each client has.
    holding: [usize; CLIENTS],
    pub(super) before: Before,
    pub(super) decisions: broadcast::Receiver<Decision>,
    /// GPUs whose memory may go without a decision, since they were lost.
    pub(super) vanished: BTreeMap<GpuIndex, Vanished>,
    pub(super) violations: Vec<Violation>,
    orders: BTreeMap<usize, Order>,
    pub(super) effects: BTreeMap<&'static str, u64>,
}

impl State {
    /// Makes a line part of the trace.
    pub(super) fn trace(&mut self, line: String) {
        line.hash(&mut self.hasher);
        if self.log.len() == self.kept {
            self.log.pop_front();
        }
        self.log.push_back(line);
    }

    /// A fault of this kind showed.
    pub(super) fn note(&mut self, kind: &'static str) {
        *self.effects.entry(kind).or_default() += 1;
    }
}

/// See the module's page.
pub(super) struct World {
    pub(super) hotset: Hotset,
    pub(super) disk: Disk,
    pub(super) gpus: Vec<Arc<SimDevice>>,
    pub(super) workload: Workload,
    library: Mutex<Library>,
    host: Arc<Mutex<HostMemory>>,
    pub(super) panics: Arc<Panics>,
    broken: Option<Invariant>,
    state: Mutex<State>,
    stopped: AtomicBool,
    pub(super) jumped_ms: AtomicU64,
    pub(super) started: Instant,
    /// When faults and clients stop.
    pub(super) end: Instant,
}

impl World {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn library(&self) -> MutexGuard<'_, Library> {
        self.library.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn host(&self) -> MutexGuard<'_, HostMemory> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_broken(&self, invariant: Invariant) -> bool {
        self.broken == Some(invariant)
    }

    pub(super) fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// How much time was skipped so far: nobody could act in it.
    pub(super) fn jumped(&self) -> Duration {
        Duration::from_millis(self.jumped_ms.load(Ordering::Relaxed))
    }

    fn at_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Notes an event, and checks everything.
    pub(super) fn event(&self, text: String) {
        let mut state = self.state();
        state.events += 1;
        state.trace(format!("{} ms: {text}", self.at_ms()));
        for (invariant, message) in check(self, &mut state) {
            self.note(&mut state, invariant, message);
        }
    }

    pub(super) fn asked(&self, text: String) {
        self.state().requests += 1;
        self.event(text);
    }

    /// A fault of this kind showed.
    pub(super) fn effect(&self, kind: &'static str) {
        self.state().note(kind);
    }

    pub(super) fn violated(&self, invariant: Invariant, message: String) {
        self.note(&mut self.state(), invariant, message);
    }

    fn note(&self, state: &mut State, invariant: Invariant, message: String) {
        if state.violations.len() < MOST_VIOLATIONS {
            state.violations.push(Violation {
                at_ms: self.at_ms(),
                invariant,
                message,
            });
        }
    }

    pub(super) fn hold(&self, client: usize, leases: &[Arc<Lease>]) {
        let mut state = self.state();
        state.granted += 1;
        if let Some(holding) = state.holding.get_mut(client) {
            *holding += leases.len();
        }
        let held = leases.iter().map(|lease| (lease.id(), lease.clone()));
        state.held.extend(held);
    }

    pub(super) fn let_go(&self, client: usize, leases: &[Arc<Lease>]) {
        let gone: Vec<_> = {
            let mut state = self.state();
            if let Some(holding) = state.holding.get_mut(client) {
                *holding = holding.saturating_sub(leases.len());
            }
            leases
                .iter()
                .map(|lease| state.held.remove(&lease.id()))
                .collect()
        };
        drop(gone);
    }

    /// Whether a client holds anything.
    pub(super) fn holds(&self, client: usize) -> bool {
        self.state().holding.get(client).is_some_and(|n| *n > 0)
    }

    pub(super) fn give_order(&self, client: usize, order: Order) {
        self.state().orders.insert(client, order);
    }

    pub(super) fn order(&self, client: usize) -> Option<Order> {
        self.state().orders.remove(&client)
    }

    /// The order to sleep, where it is that.
    pub(super) fn sleep_order(&self, client: usize) -> Option<Order> {
        let mut state = self.state();
        match state.orders.get(&client) {
            Some(Order::Sleep(_)) => state.orders.remove(&client),
            _ => None,
        }
    }
}

/// The configuration: the host's where it matters to policy, and the simulation's own folders, budgets and GPUs.
fn config(scenario: &Scenario, seed: u64, library: &Library) -> crate::Config {
    let mut config = scenario.config.clone();
    config.catalog.roots = vec![library.root()];
    // The simulation tells of changes by itself; the kernel's events come when they come.
    config.catalog.watch = false;
    config.catalog.database = Some(library.index());
    config.catalog.threads = 1;
    config.ram.budget = Some(RAM);
    config.ram.prewarm = Bytes::ZERO;
    config.load.piece = Bytes::kib(16);
    config.load.ring = Bytes::kib(64);
    config.cuda.detect = false;
    config.bridge.enabled = false;
    config.http.enabled = false;
    config.monitor.decisions_file = None;
    if scenario.workload.predicts(seed) {
        config.predict.enabled = true;
        config.predict.horizon = Duration::from_secs(5);
        config.predict.threshold = 0.2;
    }
    if !seed.is_multiple_of(BOUNDS_EVERY) {
        // An actor dies more often in a minute here than on any machine in a year. With the bounds of the configuration, which
        // every eighth seed has, most of them would be out of service most of the time, and little be left to break.
        config.supervision.max_restarts = 1000;
        config.supervision.max_backoff = Duration::from_millis(200);
    }
    let gpu = |memory: Bytes| {
        let mut gpu = GpuConfig {
            budget: Some(memory),
            headroom: Bytes::ZERO,
            ..GpuConfig::default()
        };
        gpu.sim.memory = memory;
        gpu.sim.granularity = Bytes::kib(4);
        gpu.sim.bandwidth = Bytes::mib(20);
        gpu.sim.latency = Duration::from_millis(1);
        gpu.sim.keep_bytes = true;
        gpu
    };
    config.gpu = VRAM.map(gpu).to_vec();
    config
}

/// Starts the system over its doubles.
pub(super) async fn build(scenario: &Scenario, seed: u64) -> Result<Arc<World>, ChaosError> {
    let library = Library::new()?;
    let config = config(scenario, seed, &library);
    let gpus: Vec<_> = (0..)
        .zip(&config.gpu)
        .map(|(i, gpu)| SimDevice::new(GpuIndex(i), gpu.sim.clone()))
        .collect();
    let devices = gpus.iter().map(|gpu| gpu.clone() as Arc<dyn Device>);
    let (disk, host) = (Disk::default(), Arc::new(Mutex::new(HOST)));
    let panics = Arc::<Panics>::default();
    let (policy, may_panic) = (config.policy.eviction, panics.clone());
    let started = Instant::now();
    let hotset = Hotset::builder()
        .config(config)
        .devices(devices.collect())
        .reader(Arc::new(disk.clone()))
        .machine(Machine::simulated(host.clone()))
        .eviction(Arc::new(move || {
            Box::new(Panicking {
                inner: policy::by_name(policy),
                panics: may_panic.clone(),
            })
        }))
        .start()
        .await?;
    disk.faults().lies = scenario.broken == Some(Invariant::LeasedBytes);
    let decisions = hotset.subscribe_decisions();
    Ok(Arc::new(World {
        hotset,
        disk,
        gpus,
        workload: scenario.workload.clone(),
        library: Mutex::new(library),
        host,
        panics,
        broken: scenario.broken,
        state: Mutex::new(State {
            hasher: DefaultHasher::new(),
            log: VecDeque::new(),
            kept: scenario.log.max(1),
            events: 0,
            requests: 0,
            granted: 0,
            held: BTreeMap::new(),
            holding: [0; CLIENTS],
            before: Before::default(),
            decisions,
            vanished: BTreeMap::new(),
            violations: Vec::new(),
            orders: BTreeMap::new(),
            effects: BTreeMap::new(),
        }),
        stopped: AtomicBool::new(false),
        jumped_ms: AtomicU64::new(0),
        started,
        end: started + scenario.time,
    }))
}
