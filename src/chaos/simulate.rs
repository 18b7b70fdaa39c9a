//! One run: the clients, the faults, and the quiet afterwards.

use std::collections::BTreeMap;
use std::hash::Hasher;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hotset_core::policy::pressure::{CgroupEvents, CgroupMemory};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::SeedableRng;
use tokio_util::task::AbortOnDropHandle;

use super::after;
use super::check::Invariant;
use super::clients::{Order, live};
use super::faults::{self, Fault, PlannedFault};
use super::library::{FILES, Library, name};
use super::world::{BOUNDS_EVERY, CLIENTS, HOST, VRAM, Vanished, World, build};
use super::{ChaosError, Outcome, Scenario};
use crate::{ActorName, Bytes, GpuIndex};

/// The generator of one part of the run.
fn stream(seed: u64, part: u64) -> Xoshiro256PlusPlus {
    Xoshiro256PlusPlus::seed_from_u64(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(part))
}

/// How often the figures of status are looked at: once in so many faults.
const STATUS_EVERY: u64 = 16;

pub(super) async fn simulate(scenario: &Scenario, seed: u64) -> Result<Outcome, ChaosError> {
    let world = build(scenario, seed).await?;
    let time_ms = scenario.time.as_millis() as u64;
    let plan = scenario.faults.clone().unwrap_or_else(|| {
        let mut rng = stream(seed, 0);
        faults::draw(&mut rng, time_ms, scenario.rate, CLIENTS, VRAM.len())
    });
    let begin = |client: usize, life: u64| {
        let rng = stream(seed, 1 + client as u64 + 1000 * life);
        AbortOnDropHandle::new(tokio::spawn(live(world.clone(), client, rng)))
    };
    let mut clients: Vec<_> = (0..CLIENTS).map(|client| begin(client, 0)).collect();
    let mut draining = None;
    for (life, planned) in (1..).zip(&plan) {
        tokio::time::sleep_until(world.started + Duration::from_millis(planned.at_ms)).await;
        match planned.fault {
            Fault::ClientDies(client) => {
                if world.holds(client) {
                    world.effect("client-dies");
                }
                if let Some(task) = clients.get_mut(client) {
                    *task = begin(client, life);
                }
            }
            Fault::Drain => draining = Some(tokio::spawn(drain(world.clone()))),
            fault => inject(&world, fault).await,
        }
        world.event(format!("fault: {:?}", planned.fault));
        if life % STATUS_EVERY == 0 {
            after::status(&world).await;
        }
    }
    tokio::time::sleep_until(world.end).await;
    let drained = draining.is_some();
    world.stop();
    quiet(&world)?;
    for client in clients {
        ends(&world, "a client", client).await;
    }
    if let Some(draining) = draining {
        ends(&world, "the drain", draining).await;
    }
    // Long enough for what was out of service to be tried again.
    let rest = if seed.is_multiple_of(BOUNDS_EVERY) {
        150
    } else {
        20
    };
    tokio::time::sleep(Duration::from_secs(rest)).await;
    world.event("all clients are gone, and nothing goes wrong any more".into());
    if !drained {
        after::progress(&world).await;
        if seed % 4 == 1 || world.is_broken(Invariant::Fairness) {
            after::fairness(&world).await;
        }
    }
    after::orphans(&world).await;
    after::status(&world).await;
    after::index(&world).await;
    Ok(outcome(&world, seed, plan).await)
}

async fn drain(world: Arc<World>) {
    world.event("it drains in the middle of everything".into());
    world.hotset.quiesce().await;
    world.event("it has drained".into());
}

/// Waits for the end of something, which must come.
async fn ends(world: &World, who: &str, task: impl Future) {
    if tokio::time::timeout(Duration::from_secs(120), task)
        .await
        .is_err()
    {
        let what = format!("{who} still waits after two minutes");
        world.violated(Invariant::EveryRequestEnds, what);
    }
}

async fn outcome(world: &World, seed: u64, plan: Vec<PlannedFault>) -> Outcome {
    let counters = world.hotset.status().await.counters;
    let set_aside = world.library().set_aside() as u64;
    let met = std::mem::take(&mut world.disk.faults().met);
    let mut state = world.state();
    let mut effects: BTreeMap<_, _> = std::mem::take(&mut state.effects);
    let mut add = |kind, count| *effects.entry(kind).or_default() += count;
    met.into_iter().for_each(|(kind, count)| add(kind, count));
    for gpu in &world.gpus {
        let met = gpu.met();
        add("device-out-of-memory", met.refused_allocations);
        add("upload-errors", met.refused_uploads);
        add("sticky-error", met.sticky);
        add("lose-gpu", met.lost);
    }
    add("panic", world.panics.been.load(Ordering::Relaxed));
    add("corrupt-index", set_aside);
    effects.retain(|_, count| *count > 0);
    let outcome = Outcome {
        seed,
        trace: state.hasher.finish(),
        faults: plan,
        effects,
        requests: state.requests,
        granted: state.granted,
        prefetches: counters.prefetches,
        events: state.events,
        time: world.started.elapsed(),
        violations: std::mem::take(&mut state.violations),
        log: state.log.drain(..).collect(),
    };
    state.held.clear();
    outcome
}

async fn inject(world: &World, fault: Fault) {
    let gpu = |at: usize| world.gpus.get(at);
    match fault {
        Fault::KillActor(actor) => {
            if world.hotset.kill(actor_of(actor)) {
                world.effect("kill-actor");
            }
        }
        Fault::KillAll => {
            for actor in 0..5 + world.gpus.len() {
                if world.hotset.kill(actor_of(actor)) {
                    world.effect("kill-all");
                }
            }
        }
        Fault::SlowActor(actor, ms) => {
            if world
                .hotset
                .dawdle(actor_of(actor), Duration::from_millis(ms))
            {
                world.effect("slow-actor");
            }
        }
        Fault::Panic => world.panics.due.store(1, Ordering::Relaxed),
        Fault::ReadErrors(_)
        | Fault::NoSpace(_)
        | Fault::ShortReads(_)
        | Fault::ReadPanics
        | Fault::StallDisk(_) => spoil_disk(world, fault),
        Fault::Truncate(_)
        | Fault::Replace(_)
        | Fault::Delete(_)
        | Fault::HalfWrite(_)
        | Fault::Mend(_)
        | Fault::WatcherOverflow(_) => change_files(world, fault),
        Fault::CorruptIndex => drop(world.library().corrupt_index()),
        Fault::FullIndex => drop(world.library().fill_index(true)),
        Fault::MendIndex => {
            if world.library().fill_index(false) {
                world.effect("mend-index");
            }
        }
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
        Fault::StickyError(at) => {
            vanishes(world, at);
            gpu(at).into_iter().for_each(|gpu| {
                gpu.break_context(Some("CUDA error 700: an illegal memory access".into()));
            });
        }
        Fault::LoseGpu(at) => {
            vanishes(world, at);
            gpu(at)
                .into_iter()
                .for_each(|gpu| gpu.set_lost(Some("Xid 79".into())));
        }
        Fault::ReturnGpu(at) => {
            if let Some(gpu) = gpu(at) {
                if crate::Device::lost(gpu.as_ref()).is_some() {
                    world.effect("return-gpu");
                }
                gpu.set_lost(None);
            }
        }
        Fault::Pressure => world.host().available = Bytes::mib(100),
        Fault::NoHostMemory => world.host().available = Bytes::ZERO,
        Fault::Relief => {
            if *world.host() != HOST {
                world.effect("relief");
            }
            *world.host() = HOST;
        }
        Fault::ShrinkLimit(kib) => {
            let limit = Bytes::kib(kib);
            world.host().cgroup = Some(CgroupMemory {
                limit,
                room: limit,
                events: CgroupEvents::default(),
            });
        }
        Fault::ClientSleeps(client, ms) => world.give_order(client, Order::Sleep(ms)),
        Fault::SlowReader(client, ms) => world.give_order(client, Order::ReadLate(ms)),
        Fault::Flood(client) => world.give_order(client, Order::Flood),
        Fault::Nonsense(client) => world.give_order(client, Order::Nonsense),
        Fault::DuplicateIds(client) => world.give_order(client, Order::Duplicate),
        Fault::ClockJump(ms) => {
            world.jumped_ms.fetch_add(ms, Ordering::Relaxed);
            world.effect("clock-jump");
            tokio::time::advance(Duration::from_millis(ms)).await;
        }
        // By whoever has the clients and the system.
        Fault::ClientDies(_) | Fault::Drain => {}
    }
    if *world.hotset.pressure().borrow() == crate::Pressure::High {
        world.effect("pressure");
    }
}

/// From now on what is on this GPU may go without a decision.
fn vanishes(world: &World, gpu: usize) {
    let gpu = GpuIndex(gpu as u32);
    world.state().vanished.insert(gpu, Vanished::Unnoticed);
}

fn spoil_disk(world: &World, fault: Fault) {
    let mut faults = world.disk.faults();
    match fault {
        Fault::ReadErrors(count) => (faults.errors, faults.error) = (count, libc::EIO),
        Fault::NoSpace(count) => (faults.errors, faults.error) = (count, libc::ENOSPC),
        Fault::ShortReads(count) => faults.short = count,
        Fault::ReadPanics => faults.panics = 1,
        Fault::StallDisk(ms) => {
            faults.stalled_until = Some(tokio::time::Instant::now() + Duration::from_millis(ms));
        }
        _ => {}
    }
}

/// Changes files, and tells the system of it as a watcher would.
fn change_files(world: &World, fault: Fault) {
    let change = |file: usize, change: &dyn Fn(&mut Library) -> std::io::Result<bool>| {
        let changed = change(&mut world.library());
        let changed = changed.unwrap_or_else(|error| {
            world.event(format!("a file could not be changed: {:?}", error.kind()));
            false
        });
        if changed {
            let mut faults = world.disk.faults();
            faults.damage.insert(name(file), fault.kind());
        }
        changed
    };
    let changed = match fault {
        Fault::Truncate(file) => (change(file, &|l| l.truncate(file)), file),
        Fault::Replace(file) => (change(file, &|l| l.write(file)), file),
        Fault::Delete(file) => (change(file, &|l| l.delete(file)), file),
        Fault::HalfWrite(file) => (change(file, &|l| l.half_write(file)), file),
        Fault::Mend(file) => {
            let done = change(file, &|l| l.write(file));
            let was = world.disk.faults().damage.remove(&name(file));
            if was.is_some() {
                world.effect("mend");
            }
            (done, file)
        }
        Fault::WatcherOverflow(file) => {
            for file in [file, (file + 1) % FILES] {
                change(file, &|l| l.write(file));
            }
            if world.hotset.files_changed(None) {
                world.effect("watcher-overflow");
            }
            return;
        }
        _ => return,
    };
    if let (true, file) = changed {
        let path = world.library().path(file);
        world.hotset.files_changed(Some(vec![path]));
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
fn quiet(world: &World) -> Result<(), ChaosError> {
    {
        let mut faults = world.disk.faults();
        (faults.errors, faults.short, faults.panics) = (0, 0, 0);
        faults.stalled_until = None;
        faults.damage.clear();
    }
    world.panics.due.store(0, Ordering::Relaxed);
    for gpu in &world.gpus {
        gpu.set_lost(None);
        gpu.set_foreign_use(Bytes::ZERO);
        gpu.refuse_allocations(0);
        gpu.refuse_uploads(0);
    }
    *world.host() = HOST;
    let mut library = world.library();
    for file in 0..FILES {
        library.write(file)?;
    }
    if after::index_is_behind(world, &library) {
        world.effect("full-index");
    }
    library.fill_index(world.is_broken(Invariant::IndexIsCatalogue));
    drop(library);
    world.hotset.files_changed(None);
    Ok(())
}
