//! One run: the system over its doubles, the clients, the faults, and the quiet afterwards.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hotset_core::config::GpuConfig;
use hotset_core::device::sim::SimDevice;
use hotset_core::machine::Machine;
use hotset_core::policy::pressure::{CgroupEvents, CgroupMemory, HostMemory};
use hotset_core::policy::{self, Candidate, EvictionPolicy, Prefetch, Victim};
use hotset_core::predict::{Observed, PrefetchScore};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::SeedableRng;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::check::{Before, Invariant, Violation, check};
use super::clients::{Order, Workload, live, word};
use super::disk::Disk;
use super::faults::{self, Fault, PlannedFault};
use super::library::{FILES, Library, name};
use super::{ChaosError, Outcome, Scenario};
use crate::{
    ActorName, Bytes, ComponentSet, ContentId, Device, GpuIndex, Hotset, Lease, LeaseId, Target,
    Tier,
};

const CLIENTS: usize = 6;
const GPUS: u32 = 2;
/// Less than the library, so that there is always something to evict.
const RAM: Bytes = Bytes::kib(640);
const VRAM: Bytes = Bytes::kib(512);
const SMALL_VRAM: Bytes = Bytes::kib(240);
/// The most violations of one run: one cause is seen at each event from then on.
const MOST_VIOLATIONS: usize = 20;

/// What changes during a run.
pub(super) struct State {
    hasher: DefaultHasher,
    log: VecDeque<String>,
    kept: usize,
    pub(super) events: u64,
    requests: u64,
    granted: u64,
    pub(super) held: BTreeMap<LeaseId, Arc<Lease>>,
    pub(super) before: Before,
    /// Since then what is on GPUs may go without a decision.
    pub(super) gpu_was_lost: bool,
    violations: Vec<Violation>,
    orders: BTreeMap<usize, Order>,
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
}

/// See the module's page.
pub(super) struct World {
    pub(super) hotset: Hotset,
    pub(super) disk: Disk,
    pub(super) gpus: Vec<Arc<SimDevice>>,
    pub(super) workload: Workload,
    library: Mutex<Library>,
    host: Arc<Mutex<HostMemory>>,
    panics: Arc<AtomicBool>,
    broken: Option<Invariant>,
    state: Mutex<State>,
    stopped: AtomicBool,
    jumped_ms: AtomicU64,
    started: Instant,
}

impl World {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn library(&self) -> MutexGuard<'_, Library> {
        self.library.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn host(&self) -> MutexGuard<'_, HostMemory> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_broken(&self, invariant: Invariant) -> bool {
        self.broken == Some(invariant)
    }

    pub(super) fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
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

    pub(super) fn hold(&self, leases: &[Arc<Lease>]) {
        let mut state = self.state();
        state.granted += 1;
        state
            .held
            .extend(leases.iter().map(|lease| (lease.id(), lease.clone())));
        if self.is_broken(Invariant::LeasedStays) {
            self.hotset.ledger().forget_tier(Tier::Ram);
        }
    }

    pub(super) fn let_go(&self, leases: &[Arc<Lease>]) {
        if self.is_broken(Invariant::NoOrphans) {
            return;
        }
        let gone: Vec<_> = {
            let mut state = self.state();
            leases
                .iter()
                .map(|lease| state.held.remove(&lease.id()))
                .collect()
        };
        drop(gone);
    }

    pub(super) fn order(&self, client: usize) -> Option<Order> {
        self.state().orders.remove(&client)
    }
}

/// The configured policy, which panics once when it is told to.
struct Panicking {
    inner: Box<dyn EvictionPolicy>,
    panics: Arc<AtomicBool>,
}

impl EvictionPolicy for Panicking {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn on_capacity(&mut self, capacity: Bytes) {
        self.inner.on_capacity(capacity);
    }
    fn observe(&mut self, now: Duration, request: &Observed<'_>) {
        self.inner.observe(now, request);
    }
    fn on_request(&mut self, now: Duration, content: &ContentId, bytes: Bytes, hit: bool) {
        self.inner.on_request(now, content, bytes, hit);
    }
    fn on_evict(&mut self, now: Duration, content: &ContentId) {
        self.inner.on_evict(now, content);
    }
    fn rank(&mut self, now: Duration, candidates: &[Candidate]) -> Vec<Victim> {
        self.inner.rank(now, candidates)
    }
    fn choose(&mut self, now: Duration, candidates: &[Candidate], needed: Bytes) -> Vec<Victim> {
        if self.panics.swap(false, Ordering::Relaxed) {
            std::panic::resume_unwind(Box::new("the policy of the simulation panics"));
        }
        self.inner.choose(now, candidates, needed)
    }
    fn prefetch(
        &mut self,
        now: Duration,
        residents: &[Candidate],
        free: Bytes,
    ) -> Option<Prefetch> {
        self.inner.prefetch(now, residents, free)
    }
    fn on_prefetch_cancelled(&mut self, content: &ContentId, delay_s: f64) {
        self.inner.on_prefetch_cancelled(content, delay_s);
    }
    fn prefetch_score(&self) -> Option<PrefetchScore> {
        self.inner.prefetch_score()
    }
    fn max_residents(&self) -> Option<usize> {
        self.inner.max_residents()
    }
}

const HOST: HostMemory = HostMemory {
    total: Bytes::gib(64),
    available: Bytes::gib(48),
    full_avg10: None,
    cgroup: None,
};

async fn build(scenario: &Scenario) -> Result<Arc<World>, ChaosError> {
    let library = Library::new()?;
    let mut config = scenario.config.clone();
    config.catalog.roots = vec![library.root()];
    config.catalog.watch = false;
    config.catalog.database = None;
    config.ram.budget = Some(RAM);
    config.ram.prewarm = Bytes::ZERO;
    config.load.piece = Bytes::kib(16);
    config.load.ring = Bytes::kib(64);
    config.cuda.detect = false;
    config.bridge.enabled = false;
    config.http.enabled = false;
    if scenario.broken == Some(Invariant::DecisionsRecorded) {
        config.monitor.decisions = 0;
    }
    let mut gpu = GpuConfig {
        budget: Some(VRAM),
        headroom: Bytes::ZERO,
        ..GpuConfig::default()
    };
    gpu.sim.memory = VRAM;
    gpu.sim.granularity = Bytes::kib(4);
    gpu.sim.bandwidth = Bytes::mib(20);
    gpu.sim.latency = Duration::from_millis(1);
    gpu.sim.keep_bytes = true;
    config.gpu = vec![gpu; GPUS as usize];
    // No room for the largest model: it is split there, or refused.
    if let Some(last) = config.gpu.last_mut() {
        (last.budget, last.sim.memory) = (Some(SMALL_VRAM), SMALL_VRAM);
    }
    let gpus: Vec<_> = (0..GPUS)
        .zip(&config.gpu)
        .map(|(i, gpu)| SimDevice::new(GpuIndex(i), gpu.sim.clone()))
        .collect();
    let devices = gpus.iter().map(|gpu| gpu.clone() as Arc<dyn Device>);
    let (disk, host, panics) = (
        Disk::default(),
        Arc::new(Mutex::new(HOST)),
        Arc::new(AtomicBool::new(false)),
    );
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
    disk.faults().doubles = scenario.broken == Some(Invariant::SingleFlight);
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
            before: Before::default(),
            gpu_was_lost: false,
            violations: Vec::new(),
            orders: BTreeMap::new(),
        }),
        stopped: AtomicBool::new(false),
        jumped_ms: AtomicU64::new(0),
        started,
    }))
}

/// The generator of one part of the run.
fn stream(seed: u64, part: u64) -> Xoshiro256PlusPlus {
    Xoshiro256PlusPlus::seed_from_u64(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(part))
}

pub(super) async fn simulate(scenario: &Scenario, seed: u64) -> Result<Outcome, ChaosError> {
    let world = build(scenario).await?;
    let time_ms = scenario.time.as_millis() as u64;
    let plan = scenario.faults.clone().unwrap_or_else(|| {
        faults::draw(
            &mut stream(seed, 0),
            time_ms,
            scenario.rate,
            CLIENTS,
            GPUS as usize,
        )
    });
    let rogue = if scenario.broken == Some(Invariant::LedgerIsDevice) {
        world.gpus[0].clone().allocate(Bytes::kib(64)).await.ok()
    } else {
        None
    };
    let begin = |client: usize, life: u64| {
        let rng = stream(seed, 1 + client as u64 + 1000 * life);
        AbortOnDropHandle::new(tokio::spawn(live(world.clone(), client, rng)))
    };
    let mut clients: Vec<_> = (0..CLIENTS).map(|client| begin(client, 0)).collect();
    for (life, planned) in (1..).zip(&plan) {
        let due = world.started + Duration::from_millis(planned.at_ms);
        tokio::time::sleep_until(due).await;
        if let Fault::ClientDies(client) = planned.fault
            && let Some(task) = clients.get_mut(client)
        {
            *task = begin(client, life);
        }
        inject(&world, planned).await;
        if life % 8 == 0 {
            status(&world).await;
        }
    }
    let end = world.started + Duration::from_millis(time_ms);
    tokio::time::sleep_until(end).await;
    let draining = seed % 8 == 7;
    if draining {
        world.event("it drains in the middle of everything".into());
        world.hotset.quiesce().await;
        world.event("it has drained".into());
    }
    world.stopped.store(true, Ordering::Relaxed);
    quiet(&world).await?;
    for client in clients {
        if tokio::time::timeout(Duration::from_secs(120), client)
            .await
            .is_err()
        {
            world.violated(
                Invariant::EveryRequestEnds,
                "a client still waits after two minutes".into(),
            );
        }
    }
    // Long enough for what was out of service to be tried again.
    tokio::time::sleep(Duration::from_secs(150)).await;
    world.event("all clients are gone, and nothing goes wrong any more".into());
    if !draining {
        progress(&world).await;
    }
    orphans(&world).await;
    status(&world).await;
    drop(rogue);
    let mut state = world.state();
    let outcome = Outcome {
        seed,
        trace: state.hasher.finish(),
        faults: plan,
        requests: state.requests,
        granted: state.granted,
        events: state.events,
        violations: std::mem::take(&mut state.violations),
        log: state.log.drain(..).collect(),
    };
    state.held.clear();
    Ok(outcome)
}

async fn inject(world: &World, planned: &PlannedFault) {
    let library = |change: &dyn Fn(&mut Library) -> std::io::Result<()>| {
        if let Err(error) = change(&mut world.library()) {
            world.event(format!("a file could not be changed: {:?}", error.kind()));
        }
    };
    let gpu = |at: usize| world.gpus.get(at);
    match planned.fault {
        Fault::KillActor(actor) => {
            let _ = world.hotset.kill(actor_of(actor));
        }
        Fault::KillAll => (0..5 + world.gpus.len()).for_each(|actor| {
            let _ = world.hotset.kill(actor_of(actor));
        }),
        Fault::Panic => world.panics.store(true, Ordering::Relaxed),
        Fault::ReadErrors(count) => world.disk.faults().errors = count,
        Fault::ShortReads(count) => world.disk.faults().short = count,
        Fault::ReadPanics => world.disk.faults().panics = 1,
        Fault::StallDisk(ms) => {
            world.disk.faults().stalled_until = Some(Instant::now() + Duration::from_millis(ms));
        }
        Fault::Truncate(file) => library(&|l| l.truncate(file)),
        Fault::Replace(file) => library(&|l| l.write(file)),
        Fault::Delete(file) => world.library().delete(file),
        Fault::HalfWrite(file) => library(&|l| l.half_write(file)),
        Fault::Mend => library(&Library::mend),
        Fault::DeviceOutOfMemory(at, count) => {
            gpu(at)
                .into_iter()
                .for_each(|gpu| gpu.refuse_allocations(count));
        }
        Fault::UploadErrors(at, count) => {
            gpu(at)
                .into_iter()
                .for_each(|gpu| gpu.refuse_uploads(count));
        }
        Fault::Foreign(at, kib) => {
            gpu(at)
                .into_iter()
                .for_each(|gpu| gpu.set_foreign_use(Bytes::kib(kib)));
        }
        Fault::LoseGpu(at) => {
            world.state().gpu_was_lost = true;
            gpu(at)
                .into_iter()
                .for_each(|gpu| gpu.set_lost(Some("Xid 79".into())));
        }
        Fault::ReturnGpus => return_gpus(world),
        Fault::Pressure => world.host().available = Bytes::mib(100),
        Fault::Relief => *world.host() = HOST,
        Fault::ShrinkLimit(kib) => {
            let limit = Bytes::kib(kib);
            world.host().cgroup = Some(CgroupMemory {
                limit,
                room: limit,
                events: CgroupEvents::default(),
            });
        }
        Fault::ClientDies(_) => {}
        Fault::ClientSleeps(client, ms) => order(world, client, Order::Sleep(ms)),
        Fault::Flood(client) => order(world, client, Order::Flood),
        Fault::Nonsense(client) => order(world, client, Order::Nonsense),
        Fault::ClockJump(ms) => {
            world.jumped_ms.fetch_add(ms, Ordering::Relaxed);
            tokio::time::advance(Duration::from_millis(ms)).await;
        }
    }
    world.event(format!("fault: {:?}", planned.fault));
    if matches!(
        planned.fault,
        Fault::Mend | Fault::Replace(_) | Fault::Truncate(_) | Fault::Delete(_)
    ) {
        let scan = tokio::time::timeout(Duration::from_secs(30), world.hotset.scan());
        let done = matches!(scan.await, Ok(Ok(_)));
        world.event(format!("scanned: {done}"));
    }
}

fn order(world: &World, client: usize, order: Order) {
    world.state().orders.insert(client, order);
}

fn return_gpus(world: &World) {
    for gpu in &world.gpus {
        gpu.set_lost(None);
        gpu.set_foreign_use(Bytes::ZERO);
        gpu.refuse_allocations(0);
        gpu.refuse_uploads(0);
    }
}

fn actor_of(number: usize) -> ActorName {
    match number {
        0 => ActorName::RamCache,
        1 => ActorName::Sessions,
        2 => ActorName::Discovery,
        3 => ActorName::Predictor,
        4 => ActorName::Monitor,
        n => ActorName::VramManager(GpuIndex(n as u32 - 5)),
    }
}

/// Nothing goes wrong from now on.
async fn quiet(world: &World) -> Result<(), ChaosError> {
    {
        let mut faults = world.disk.faults();
        (faults.errors, faults.short, faults.panics) = (0, 0, 0);
        faults.stalled_until = None;
    }
    world.panics.store(false, Ordering::Relaxed);
    return_gpus(world);
    *world.host() = HOST;
    world.library().mend()?;
    Ok(())
}

/// Status has the ledger's figures, where nothing changed while it was asked.
async fn status(world: &World) {
    let figures = || -> Vec<_> {
        let views = world.hotset.ledger().views();
        views
            .iter()
            .map(|v| (v.tier, v.budget, v.committed, v.residencies.len()))
            .collect()
    };
    let before = figures();
    let Ok(status) = tokio::time::timeout(Duration::from_secs(30), world.hotset.status()).await
    else {
        world.violated(Invariant::StatusIsLedger, "status does not answer".into());
        return;
    };
    let mut told: Vec<_> = status
        .tiers
        .iter()
        .map(|t| (t.tier, t.budget, t.committed, t.components.len()))
        .collect();
    if world.is_broken(Invariant::StatusIsLedger)
        && let Some(first) = told.first_mut()
    {
        first.2 += Bytes(1);
    }
    if figures() == before && told != before {
        world.violated(
            Invariant::StatusIsLedger,
            format!("status says {told:?}, the ledger {before:?}"),
        );
    }
}

/// Every model can be loaded again, and nobody waits long where several take turns.
async fn progress(world: &World) {
    if world.is_broken(Invariant::Progress) || world.is_broken(Invariant::Fairness) {
        let stall = if world.is_broken(Invariant::Progress) {
            100_000
        } else {
            100
        };
        world.disk.faults().stalled_until = Some(Instant::now() + Duration::from_secs(stall));
    }
    if world.hotset.scan().await.is_err() {
        world.violated(Invariant::Progress, "it does not scan any more".into());
        return;
    }
    let Ok(session) = world.hotset.session("after the faults").await else {
        world.violated(Invariant::Progress, "it opens no session any more".into());
        return;
    };
    const BOUND: Duration = Duration::from_secs(60);
    let turns = (0..FILES * 2).map(|turn| {
        let target = if turn < FILES {
            Target::Ram
        } else {
            Target::AnyGpu
        };
        let set = ComponentSet::new([name(turn % FILES)]).on(target);
        let loading = session.load(set.within(Duration::from_secs(600)));
        async move {
            let began = Instant::now();
            let leases = loading.leases().await;
            match &leases {
                Err(error) => world.violated(
                    Invariant::Progress,
                    format!(
                        "{} does not load to {target:?} any more: {error}",
                        name(turn % FILES)
                    ),
                ),
                Ok(_) if began.elapsed() > BOUND => world.violated(
                    Invariant::Fairness,
                    format!("{} waited {:?}", name(turn % FILES), began.elapsed()),
                ),
                Ok(_) => {}
            }
            let outcome = leases.as_ref().map_or_else(word, |_| "granted".into());
            world.event(format!("{} to {target:?}: {outcome}", name(turn % FILES)));
        }
    });
    futures::future::join_all(turns).await;
}

/// Nobody holds anything any more, and all of it goes when it is told to.
async fn orphans(world: &World) {
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
