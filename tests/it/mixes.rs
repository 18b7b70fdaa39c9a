//! Random machines and random mixes of requests, in virtual time: every request ends well, nothing is promised twice,
//! nothing that is leased goes, and all bytes come back.

use std::cell::Cell;
use std::time::Duration;

use hotset::{Bytes, ComponentSet, Hotset, KeepAlive, LoadError, Priority, Session, Target, Tier};
use proptest::prelude::*;
use tokio::time::Instant;

use crate::library::{Library, Rig, until};

/// Models and their KiB in all; `pipe` has four components, and `ink` is an adapter for it.
const MODELS: [(&str, u64); 8] = [
    ("m0", 90),
    ("m1", 180),
    ("m2", 270),
    ("m3", 400),
    ("m4", 520),
    ("m5", 700),
    ("pipe", 480),
    ("ink", 30),
];
/// How long a request may wait at most: what all others hold one after the other, and several turns of aging.
const BOUND: Duration = Duration::from_secs(600);

#[derive(Debug, Clone)]
struct Wish {
    models: Vec<usize>,
    target: usize,
    priority: usize,
    split: bool,
    /// Milliseconds.
    keep_alive: Option<u64>,
    pause: u64,
    hold: u64,
    /// Cancelled after so many milliseconds.
    give_up: Option<u64>,
    /// Dropped in mid-load instead of cancelled.
    rude: bool,
}

#[derive(Debug, Clone)]
struct Mix {
    ram_kib: u64,
    gpus_kib: Vec<u64>,
    sessions: Vec<Vec<Wish>>,
}

fn wish() -> impl Strategy<Value = Wish> {
    (
        prop::collection::vec(0..MODELS.len(), 1..4),
        0_usize..6,
        (0_usize..4, any::<bool>(), prop::option::of(0_u64..2000)),
        0_u64..1500,
        0_u64..3000,
        prop::option::weighted(0.2, 0_u64..800),
        any::<bool>(),
    )
        .prop_map(|(models, target, how, pause, hold, give_up, rude)| Wish {
            models,
            target,
            priority: how.0,
            split: how.1,
            keep_alive: how.2,
            pause,
            hold,
            give_up,
            rude,
        })
}

fn mix() -> impl Strategy<Value = Mix> {
    (
        400_u64..2500,
        prop::collection::vec(300_u64..2000, 0..4),
        prop::collection::vec(prop::collection::vec(wish(), 1..6), 1..7),
    )
        .prop_map(|(ram_kib, gpus_kib, sessions)| Mix {
            ram_kib,
            gpus_kib,
            sessions,
        })
}

/// Fails where a tier has promised more than it has.
fn check(rig: &Rig) {
    for view in rig.hotset.ledger().views() {
        assert!(
            view.committed <= view.budget,
            "{}: {} of {}",
            view.tier,
            view.committed,
            view.budget
        );
        if let Tier::Vram(gpu) = view.tier {
            let allocated = rig.gpus[gpu.0 as usize].allocated();
            assert!(allocated <= view.budget, "{}: {allocated}", view.tier);
        }
    }
}

/// Whether refusing it for good is right: no tier that it may be in is large enough.
fn can_never_fit(hotset: &Hotset, set: &ComponentSet) -> bool {
    let parts = hotset.dependencies(set).unwrap().order();
    let ram: Bytes = parts.iter().map(|part| part.ram_bytes()).sum();
    let any_gpu = hotset
        .ledger()
        .views()
        .iter()
        .any(|view| matches!(view.tier, Tier::Vram(_)));
    hotset
        .ledger()
        .views()
        .iter()
        .filter(|view| match (set.target, view.tier) {
            (Target::Ram, tier) => tier == Tier::Ram,
            (Target::Best, tier) => (tier == Tier::Ram) != any_gpu,
            (Target::AnyGpu, tier) => tier != Tier::Ram,
            (Target::Gpu(gpu), tier) => tier == Tier::Vram(gpu),
        })
        // On a GPU, allocations are rounded up to its granules of 64 KiB and tensors are aligned.
        .all(|view| match view.tier {
            Tier::Ram => ram > view.budget,
            Tier::Vram(_) => {
                let rounded: Bytes = parts
                    .iter()
                    .map(|part| part.device_bytes().round_up(64 << 10))
                    .sum();
                rounded > view.budget
            }
        })
}

fn set_of(wish: &Wish, gpus: usize) -> ComponentSet {
    let names = wish.models.iter().map(|i| MODELS[*i].0);
    let target = match wish.target {
        0 | 1 => Target::Ram,
        2 => Target::Best,
        3 if gpus > 0 => Target::AnyGpu,
        n if gpus > 0 => Target::Gpu(hotset::GpuIndex((n % gpus) as u32)),
        _ => Target::Ram,
    };
    let priority = match wish.priority {
        0 => Priority::Batch,
        1 => Priority::Prefetch,
        _ => Priority::Interactive,
    };
    let mut set = ComponentSet::new(names)
        .on(target)
        .with_priority(priority)
        .within(Duration::from_secs(3600));
    set.split = wish.split;
    set.keep_alive = wish
        .keep_alive
        .map(|ms| KeepAlive::For(Duration::from_millis(ms)));
    set
}

async fn one_wish(rig: &Rig, session: &Session, wish: &Wish, granted: &Cell<u32>) {
    tokio::time::sleep(Duration::from_millis(wish.pause)).await;
    let set = set_of(wish, rig.gpus.len());
    let asked = Instant::now();
    let loading = session.load(set.clone());
    let canceller = async {
        match wish.give_up {
            Some(after) => tokio::time::sleep(Duration::from_millis(after)).await,
            None => std::future::pending().await,
        }
    };
    let outcome = tokio::select! {
        biased;
        // What is rude drops the loading in the middle.
        outcome = loading.leases() => outcome,
        () = canceller, if wish.rude => return,
    };
    let waited = asked.elapsed();
    let error = outcome.as_ref().err().map(ToString::to_string);
    assert!(waited < BOUND, "{wish:?} waited {waited:?}: {error:?}");
    let leases = match outcome {
        Ok(leases) => leases,
        Err(error @ (LoadError::Plan(_) | LoadError::Never(_))) => {
            assert!(can_never_fit(&rig.hotset, &set), "{wish:?}: {error}");
            return;
        }
        Err(error) => panic!("{wish:?}: {error}"),
    };
    granted.set(granted.get() + 1);
    // All or nothing: every component of the set, in one place but for what no GPU has room for.
    let wanted = rig.hotset.dependencies(&set).unwrap().order();
    let bytes: Bytes = leases.iter().map(|lease| lease.component().bytes).sum();
    assert_eq!(
        bytes,
        wanted.iter().map(|c| c.bytes).sum::<Bytes>(),
        "{wish:?}"
    );
    let halves = leases
        .iter()
        .filter(|lease| lease.component().part.is_some())
        .count();
    let place = |lease: &hotset::Lease| lease.tier();
    let one_place = leases.iter().all(|lease| place(lease) == place(&leases[0]));
    assert!(
        one_place && leases.len() == wanted.len() || set.split,
        "{wish:?}"
    );
    assert_eq!(halves % 2, 0, "{wish:?}");
    let sums = || -> Vec<u64> {
        let sum = |lease: &hotset::Lease| {
            let slab = lease.slab()?;
            Some(slab.filled().iter().map(|byte| u64::from(*byte)).sum())
        };
        leases.iter().filter_map(sum).collect()
    };
    let before = sums();
    tokio::time::sleep(Duration::from_millis(wish.hold)).await;
    for lease in &leases {
        assert_eq!(lease.revoked(), None, "{wish:?}");
    }
    assert_eq!(before, sums(), "leased bytes changed");
}

async fn run(library: &Library, mix: &Mix) -> u32 {
    let mut config = library.config_with_gpu(Bytes::kib(mix.ram_kib), Bytes::mib(1));
    let template = config.gpu[0].clone();
    config.gpu = mix
        .gpus_kib
        .iter()
        .map(|kib| {
            let mut gpu = template.clone();
            gpu.budget = Some(Bytes::kib(*kib));
            gpu.sim.memory = Bytes::kib(*kib);
            gpu.sim.bandwidth = Bytes::mib(4);
            gpu.sim.keep_bytes = false;
            gpu
        })
        .collect();
    let rig = Rig::start(config).await;
    let adapter = rig
        .hotset
        .dependencies(&ComponentSet::new(["ink"]))
        .unwrap();
    assert!(adapter.len() > 1, "it comes with its base");
    let granted = Cell::new(0);
    let users = mix.sessions.iter().enumerate().map(|(i, wishes)| {
        let (rig, granted) = (&rig, &granted);
        async move {
            let session = rig.hotset.session(format!("user {i}")).await.unwrap();
            for wish in wishes {
                one_wish(rig, &session, wish, granted).await;
            }
        }
    });
    let all = futures::future::join_all(users);
    let watch = async {
        loop {
            check(&rig);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        _ = all => {}
        () = watch => {}
    }
    check(&rig);
    // A load that was dropped gives back in its own time.
    until("all leases to end", async || {
        rig.hotset.ledger().leases().is_empty()
    })
    .await;
    rig.assert_empty().await;
    rig.hotset.drain().await;
    granted.get()
}

#[test]
fn random_mixes_on_random_machines_end_well() {
    let library = Library::new();
    for (i, (name, kib)) in MODELS.iter().enumerate() {
        if *name == "pipe" {
            library.pipeline(name, i as u64, *kib as usize / 4);
        } else if *name == "ink" {
            let folder = library.path(name);
            let config =
                serde_json::json!({"peft_type": "LORA", "base_model_name_or_path": "pipe"});
            crate::library::write_json(&folder.join("adapter_config.json"), &config);
            let weights = folder.join("adapter_model.safetensors");
            crate::library::write_weights(&weights, i as u64, 2, (*kib as usize) << 10);
        } else {
            library.single(name, i as u64, *kib as usize);
        }
    }
    let granted = Cell::new(0);
    let cases = std::env::var("PROPTEST_CASES").ok();
    let config = ProptestConfig {
        cases: cases.and_then(|cases| cases.parse().ok()).unwrap_or(60),
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest!(config, |(mix in mix())| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        granted.set(granted.get() + runtime.block_on(run(&library, &mix)));
    });
    assert!(granted.get() > 100, "only {} were granted", granted.get());
}
