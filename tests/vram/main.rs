//! The VRAM tier on NVIDIA GPUs, with doubles for `libcuda.so.1` and `libnvidia-ml.so.1`: everything of hotset is real,
//! from the file to the driver's call. Each test runs in a process of its own, and fails where the driver is used wrongly
//! or anything is left behind.
// Clippy's own exemption reaches `#[test]` functions only, not what they call.
#![allow(clippy::unwrap_used)]

#[path = "../it/library.rs"]
#[allow(dead_code)]
mod library;

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use hotset::bridge::Bridge;
use hotset::bridge::wire::ServerMessage;
use hotset::client::{Client, LoadOptions};
use hotset::core::device::FigureSource;
use hotset::core::device::cuda::{Cuda, Imported};
use hotset::{
    Act, ActorName, Bytes, ComponentSet, Config, EvictCause, GpuEvent, GpuIndex, Health, Hotset,
    Lease, LoadError, Session, Target, Tier, TierStatus,
};
use hotset_double_machine::{Call, Isolated, Machine, in_role, run, run_role, this_test};

use library::{Library, Tensors, assert_tensors, outcome, soon, until};

const GPU: Tier = Tier::Vram(GpuIndex(0));

/// Runs a body that needs tokio.
fn block_on(body: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(body);
}

fn gpus(gpus: usize) -> Isolated {
    Isolated {
        gpus,
        ..Isolated::default()
    }
}

/// A machine whose GPUs have so many MiB for hotset, beside the driver's and the context's.
fn set_room(machine: &Machine, mib: u64) {
    for i in 0..machine.gpus() {
        let gpu = machine.gpu(i);
        let taken = gpu.reserved.load(SeqCst) + gpu.context.load(SeqCst);
        gpu.total.store(taken + (mib << 20), SeqCst);
    }
}

fn config(library: &Library) -> Config {
    let mut config = library.config(Bytes::mib(64));
    config.cuda.detect = true;
    config.cuda.headroom = Bytes::ZERO;
    config.monitor.gpu_interval = Duration::from_millis(20);
    config
}

async fn start(config: Config) -> Hotset {
    let start = Hotset::builder().config(config).start();
    soon("the start", start).await.unwrap()
}

async fn tier(hotset: &Hotset, tier: Tier) -> TierStatus {
    let tiers = hotset.status().await.tiers;
    tiers
        .into_iter()
        .find(|status| status.tier == tier)
        .unwrap()
}

async fn load(session: &Session, name: &str) -> Vec<Lease> {
    outcome(session.load(ComponentSet::new([name])))
        .await
        .unwrap()
}

/// Everything goes, and is gone when this ends.
async fn end(hotset: Hotset) {
    soon("the drain", hotset.drain()).await;
}

#[test]
fn a_pipeline_is_uploaded_once_and_shared() {
    run(this_test!(), gpus(1), |machine| {
        let library = Library::new();
        let tensors = library.pipeline("base", 1, 900);
        let large = library.single("large", 2, 9000);
        block_on(async {
            let hotset = start(config(&library)).await;
            let (one, two) = (
                hotset.session("one").await.unwrap(),
                hotset.session("two").await.unwrap(),
            );
            let (a, b) = tokio::join!(load(&one, "base"), load(&two, "base"));
            for leases in [&a, &b] {
                assert_eq!(leases.len(), 4);
                for lease in leases {
                    assert_eq!(lease.tier(), GPU);
                    assert_tensors(lease, &tensors[&*lease.component().id.component]).await;
                }
            }
            for lease in &a {
                let same = b
                    .iter()
                    .find(|other| other.component().id == lease.component().id);
                let address = |lease: &Lease| lease.allocation().unwrap().address();
                assert_eq!(same.map(address), Some(address(lease)), "one residency");
            }
            let third = load(&one, "large").await;
            assert_tensors(&third[0], &large).await;
            let status = hotset.status().await;
            assert_eq!(status.health, Health::Green);
            assert_eq!(status.counters.uploads, 5);
            // What the books say is what the driver gave.
            until("the figures to be told", async || {
                tier(&hotset, GPU).await.figures.is_some()
            })
            .await;
            let vram = tier(&hotset, GPU).await;
            assert_eq!(vram.device.unwrap().driver, "cuda");
            let figures = vram.figures.unwrap();
            assert_eq!(figures.source, FigureSource::Nvml);
            assert_eq!(figures.context, Some(Bytes::mib(32)));
            let spare = vram.committed.saturating_sub(figures.allocated);
            assert!(
                vram.committed >= figures.allocated && spare <= Bytes::kib(5 * 4),
                "{spare} promised beyond what was allocated: a page for each component at most"
            );
            let physical = machine.gpu(0).allocated.load(SeqCst);
            assert_eq!(
                figures.allocated + figures.overhead,
                Bytes(physical) + Bytes::mib(32)
            );
            drop((a, b, third));
            end(hotset).await;
        });
    });
}

#[test]
fn what_nobody_holds_goes_and_its_memory_is_free_before_it_is_promised() {
    run(this_test!(), gpus(1), |machine| {
        set_room(machine, 20);
        let library = Library::new();
        let tensors: Vec<Tensors> = (0..6)
            .map(|i| library.single(&format!("m{i}"), i, 5000))
            .collect();
        block_on(async {
            let hotset = start(config(&library)).await;
            let session = hotset.session("test").await.unwrap();
            for round in 0..3 {
                for (i, tensors) in tensors.iter().enumerate() {
                    let leases = load(&session, &format!("m{i}")).await;
                    assert_eq!(leases[0].tier(), GPU, "round {round}");
                    assert_tensors(&leases[0], tensors).await;
                }
            }
            let status = hotset.status().await;
            assert!(status.counters.evictions_vram >= 3, "three of six fit");
            // Not one allocation was refused: what was promised was free.
            assert_eq!(machine.calls(Call::cuMemCreate), status.counters.uploads);
            // From RAM, the second time on.
            assert_eq!(status.counters.reads, 6);
            end(hotset).await;
        });
    });
}

#[test]
fn an_unexpected_refusal_makes_room_and_tries_once_more() {
    run(this_test!(), gpus(1), |machine| {
        set_room(machine, 20);
        let library = Library::new();
        library.single("old", 1, 5000);
        let tensors = library.single("new", 2, 5000);
        library.single("never", 3, 5000);
        block_on(async {
            let hotset = start(config(&library)).await;
            let session = hotset.session("test").await.unwrap();
            drop(load(&session, "old").await);
            machine.gpu(0).refuse_allocations.store(1, SeqCst);
            let leases = load(&session, "new").await;
            assert_tensors(&leases[0], &tensors).await;
            let because = |decision: &hotset::Decision| match &decision.act {
                Act::Evict { cause, .. } => matches!(cause, EvictCause::OutOfMemory { .. }),
                _ => false,
            };
            assert!(
                hotset.why("old", 10).iter().any(because),
                "it went for that"
            );

            machine.gpu(0).refuse_allocations.store(u32::MAX, SeqCst);
            let creates = machine.calls(Call::cuMemCreate);
            let refused = outcome(session.load(ComponentSet::new(["never"]))).await;
            let error = refused.unwrap_err();
            assert!(matches!(error, LoadError::Component { .. }), "{error}");
            let said = error.to_string();
            assert!(
                said.contains("cannot allocate") && said.contains("free"),
                "{said}"
            );
            assert_eq!(machine.calls(Call::cuMemCreate), creates + 2);
            // What is leased was not touched, and the books are right.
            assert_tensors(&leases[0], &tensors).await;
            until("the promise to be taken back", async || {
                tier(&hotset, GPU).await.committed == leases[0].allocation().unwrap().bytes()
            })
            .await;
            drop(leases);
            end(hotset).await;
        });
    });
}

#[test]
fn another_process_takes_most_of_the_gpu() {
    run(this_test!(), gpus(1), |machine| {
        set_room(machine, 100);
        let library = Library::new();
        let held = library.single("held", 1, 20_000);
        let also = library.single("also", 2, 20_000);
        for i in 0..2 {
            library.single(&format!("idle{i}"), 10 + i, 20_000);
        }
        block_on(async {
            let mut config = config(&library);
            // What others can take before anything is given up for them.
            config.cuda.headroom = Bytes::mib(10);
            let hotset = start(config).await;
            let mut events = hotset.subscribe_gpus();
            let session = hotset.session("test").await.unwrap();
            for i in 0..2 {
                drop(load(&session, &format!("idle{i}")).await);
            }
            let leases = load(&session, "held").await;
            let more = load(&session, "also").await;
            assert_eq!(tier(&hotset, GPU).await.committed, Bytes::mib(80));

            // 20 MiB are free; the other process takes them, and everything that comes free.
            let gpu = machine.gpu(0);
            let took = Instant::now();
            until("the other process to get 60 MiB", async || {
                let foreign = gpu.foreign.load(SeqCst);
                gpu.foreign
                    .store(foreign + machine.free(0).min((60 << 20) - foreign), SeqCst);
                // Never more than there is.
                assert!(tier(&hotset, GPU).await.committed <= Bytes::mib(100));
                gpu.foreign.load(SeqCst) == 60 << 20
            })
            .await;
            println!("given up for another process after {:?}", took.elapsed());
            // What nobody held went, what is leased stayed.
            for (lease, tensors) in [(&leases[0], &held), (&more[0], &also)] {
                assert_tensors(lease, tensors).await;
                assert_eq!(lease.revoked(), None);
            }
            let vram = tier(&hotset, GPU).await;
            assert_eq!(vram.committed, Bytes::mib(40));
            let refused = outcome(session.load(ComponentSet::new(["idle0", "held", "also"]))).await;
            assert!(refused.unwrap_err().to_string().contains("vram:0"));

            // The headroom is gone as well, and only leases are left: their holders are asked.
            let event = soon("the question", async {
                loop {
                    match events.recv().await.unwrap() {
                        GpuEvent::Wanted {
                            missing, leases, ..
                        } => break (missing, leases),
                        _ => continue,
                    }
                }
            })
            .await;
            assert_eq!(event.0, Bytes::mib(10));
            let ids = [leases[0].id(), more[0].id()];
            assert_eq!(event.1, ids.map(|id| (id, session.id())));
            assert_tensors(&leases[0], &held).await;
            drop(more);
            until("the budget to be kept", async || {
                let vram = tier(&hotset, GPU).await;
                vram.committed <= vram.budget
            })
            .await;

            // The other process ends, and its memory can be had again.
            gpu.foreign.store(0, SeqCst);
            until("the memory to be back", async || {
                tier(&hotset, GPU).await.budget >= Bytes::mib(80)
            })
            .await;
            drop(load(&session, "idle0").await);
            drop(leases);
            end(hotset).await;
        });
    });
}

#[test]
fn a_manager_that_is_killed_in_mid_upload_loses_nothing() {
    run(this_test!(), gpus(1), |machine| {
        let library = Library::new();
        let tensors = library.single("model", 1, 5000);
        block_on(async {
            let hotset = start(config(&library)).await;
            let session = hotset.session("test").await.unwrap();
            let gpu = machine.gpu(0);
            gpu.hold_copies.store(1, SeqCst);
            let loading = session.load(ComponentSet::new(["model"]));
            gpu.pass_copies.store(3, SeqCst);
            until("the upload to begin", async || {
                machine.calls(Call::cuMemcpyHtoDAsync) >= 4
            })
            .await;
            for round in 1..=3 {
                assert!(hotset.kill(ActorName::VramManager(GpuIndex(0))));
                until("the manager to be back", async || {
                    let status = hotset.status().await;
                    let manager = ActorName::VramManager(GpuIndex(0));
                    let row = status
                        .actors
                        .iter()
                        .find(|row| row.name == manager)
                        .unwrap();
                    row.restarts == round && tier(&hotset, GPU).await.waiting.is_some()
                })
                .await;
            }
            gpu.hold_copies.store(0, SeqCst);
            let leases = outcome(loading).await.unwrap();
            assert_tensors(&leases[0], &tensors).await;
            assert_eq!(hotset.status().await.counters.uploads, 1);
            assert_eq!(machine.calls(Call::cuMemCreate), 1);
            drop(leases);
            end(hotset).await;
        });
    });
}

#[test]
fn a_cancelled_upload_gives_its_memory_back_once_the_copies_are_done() {
    run(this_test!(), gpus(1), |machine| {
        let library = Library::new();
        library.single("model", 1, 5000);
        block_on(async {
            let hotset = start(config(&library)).await;
            let session = hotset.session("test").await.unwrap();
            let gpu = machine.gpu(0);
            gpu.hold_copies.store(1, SeqCst);
            let loading = session.load(ComponentSet::new(["model"]));
            until("the upload to begin", async || {
                machine.calls(Call::cuMemcpyHtoDAsync) >= 2
            })
            .await;
            drop(loading);
            gpu.pass_copies.store(1, SeqCst);
            tokio::time::sleep(Duration::from_millis(20)).await;
            assert!(gpu.allocated.load(SeqCst) > 0, "copies still write there");
            gpu.hold_copies.store(0, SeqCst);
            until("the memory to be free", async || {
                gpu.allocated.load(SeqCst) == 0 && tier(&hotset, GPU).await.committed.is_zero()
            })
            .await;
            end(hotset).await;
        });
    });
}

#[test]
fn a_lost_gpu_is_out_of_service_and_the_rest_goes_on() {
    run(this_test!(), gpus(2), |machine| {
        let library = Library::new();
        let (a, b) = (library.single("a", 1, 5000), library.single("b", 2, 5000));
        block_on(async {
            let hotset = start(config(&library)).await;
            let mut events = hotset.subscribe_gpus();
            let session = hotset.session("test").await.unwrap();
            let on = |name: &str, gpu| ComponentSet::new([name]).on(Target::Gpu(GpuIndex(gpu)));
            let on_first = outcome(session.load(on("a", 0))).await.unwrap();
            let on_second = outcome(session.load(on("b", 1))).await.unwrap();

            machine.gpu(0).sticky.store(700, SeqCst);
            let event = soon("the loss", events.recv()).await.unwrap();
            let GpuEvent::Lost {
                tier: lost,
                reason,
                leases,
            } = event
            else {
                panic!("{event:?}");
            };
            assert_eq!(lost, GPU);
            // Xid and sticky errors are not told apart by who notices first.
            assert!(reason.contains("CUDA_ERROR"), "{reason}");
            assert_eq!(leases, [(on_first[0].id(), session.id())]);
            assert_eq!(on_first[0].revoked(), Some(reason));
            assert_eq!(on_second[0].revoked(), None);
            assert_tensors(&on_second[0], &b).await;

            // The supervisor brings it back, empty, and it is loaded again on demand.
            let back = soon("the return", events.recv()).await.unwrap();
            assert_eq!(back, GpuEvent::Back { tier: GPU });
            let again = outcome(session.load(on("a", 0))).await.unwrap();
            assert_tensors(&again[0], &a).await;
            assert_eq!(again[0].revoked(), None);
            drop((on_first, on_second, again));
            end(hotset).await;
        });
    });
}

#[test]
fn a_gpu_that_fell_off_the_bus_leaves_the_others_to_work() {
    run(this_test!(), gpus(2), |machine| {
        let library = Library::new();
        let tensors = library.single("a", 1, 5000);
        block_on(async {
            let mut config = config(&library);
            config.supervision.max_restarts = 2;
            config.supervision.backoff = Duration::from_millis(1);
            config.supervision.max_backoff = Duration::from_millis(2);
            let hotset = start(config).await;
            let session = hotset.session("test").await.unwrap();
            let held =
                outcome(session.load(ComponentSet::new(["a"]).on(Target::Gpu(GpuIndex(0))))).await;
            machine.gpu(0).hold_copies.store(1, SeqCst);
            machine.gpu(0).lost.store(1, SeqCst);
            until("the GPU to be given up", async || {
                let reason = tier(&hotset, GPU).await.out_of_service;
                reason.is_some_and(|reason| reason.contains("keeps failing"))
            })
            .await;
            let status = hotset.status().await;
            let Health::Yellow { problems } = status.health else {
                panic!("{:?}", status.health);
            };
            assert!(
                problems.iter().any(|problem| problem.contains("vram:0")),
                "{problems:?}"
            );
            let refused =
                outcome(session.load(ComponentSet::new(["a"]).on(Target::Gpu(GpuIndex(0)))));
            assert!(refused.await.is_err());
            // Wherever it is best is elsewhere now.
            let leases = load(&session, "a").await;
            assert_eq!(leases[0].tier(), Tier::Vram(GpuIndex(1)));
            assert_tensors(&leases[0], &tensors).await;
            let in_ram = outcome(session.load(ComponentSet::new(["a"]).on(Target::Ram))).await;
            assert_tensors(&in_ram.unwrap()[0], &tensors).await;
            drop((held, leases));
            end(hotset).await;
        });
    });
}

#[test]
fn gpus_are_chosen_by_ordinal_and_uuid() {
    run(this_test!(), gpus(3), |_| {
        let library = Library::new();
        block_on(async {
            let all = start(config(&library)).await;
            let uuids: Vec<String> = all.status().await.tiers[..3]
                .iter()
                .map(|tier| tier.device.as_ref().unwrap().uuid.clone())
                .collect();
            end(all).await;
            let chosen = async |include: &str, exclude: &str| {
                let mut config = config(&library);
                config.cuda.include = include.to_owned();
                config.cuda.exclude = exclude.to_owned();
                let hotset = start(config).await;
                let tiers = hotset.status().await.tiers;
                let devices = tiers.iter().filter_map(|tier| tier.device.as_ref());
                let found = devices
                    .map(|device| device.uuid.clone())
                    .collect::<Vec<_>>();
                end(hotset).await;
                found
            };
            assert_eq!(chosen("", "").await, uuids);
            assert_eq!(chosen("2, 0", "").await, [&*uuids[0], &uuids[2]]);
            assert_eq!(chosen(&uuids[1], "").await, [&*uuids[1]]);
            assert_eq!(chosen("", &format!("0,{}", uuids[2])).await, [&*uuids[1]]);
            assert!(chosen("7", "").await.is_empty());

            let mut config = config(&library);
            config.gpu = vec![config.cuda.found("GPU-nothing-like-it".into())];
            let error = Hotset::builder().config(config).start().await.unwrap_err();
            let said = error.to_string();
            assert!(
                said.contains("GPU-nothing-like-it") && said.contains(&uuids[0]),
                "{said}"
            );
        });
    });
}

#[test]
fn the_binary_finds_the_gpu_and_says_what_it_knows() {
    run(this_test!(), gpus(1), |machine| {
        machine.gpu(0).foreign.store(300 << 20, SeqCst);
        let output = Command::new(env!("CARGO_BIN_EXE_hotset"))
            .args(["status", "--json", "--vram-headroom", "100MiB"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let vram = &status["tiers"][0];
        assert_eq!(vram["device"]["driver"], "cuda");
        // 1 GiB less the driver's 4 MiB, the context's 32, others' 300 and the headroom.
        assert_eq!(vram["budget"], (1024 - 4 - 32 - 300 - 100) << 20);
        assert_eq!(vram["figures"]["source"], "nvml");
        assert_eq!(vram["figures"]["temperature_c"], 41);
    });
}

#[test]
fn workers_import_what_they_lease_over_the_bridge() {
    let test = this_test!();
    run(test, gpus(1), |machine| {
        let library = Library::new();
        library.single("large", 1, 90_000);
        library.single("small", 2, 900);
        let mut config = config(&library);
        let place = tempfile::tempdir().unwrap();
        config.bridge.socket = Some(place.path().join("run/hotset.sock"));
        block_on(async {
            let hotset = Arc::new(start(config.clone()).await);
            let bridge = Bridge::open(hotset.clone()).await.unwrap();
            let mut taken = None;
            for _ in 0..2 {
                let facts = [
                    ("SOCKET", config.bridge.socket.clone().unwrap()),
                    ("MODELS", library.path("")),
                ];
                let facts = facts.map(|(name, path)| (name, path.to_string_lossy().into_owned()));
                let worker = tokio::task::spawn_blocking(move || run_role(test, "worker", &facts));
                worker.await.unwrap();
                let now = machine.gpu(0).allocated.load(SeqCst);
                assert_eq!(
                    *taken.get_or_insert(now),
                    now,
                    "the second one costs nothing"
                );
            }
            assert_eq!(hotset.status().await.counters.uploads, 2);
            until("leases to end", async || {
                hotset.ledger().leases().values().sum::<usize>() == 0
            })
            .await;
            soon("close", bridge.close()).await;
            end(Arc::into_inner(hotset).unwrap()).await;
        });
    });
    in_role("worker", || {
        let place = |name| std::path::PathBuf::from(std::env::var_os(name).unwrap());
        block_on(async {
            let client = Client::connect_to(&place("SOCKET"), "worker")
                .await
                .unwrap();
            let cuda = Cuda::detect().unwrap();
            for name in ["large", "small"] {
                let leases = client.load(&LoadOptions::new([name])).await.unwrap();
                assert_eq!(leases[0].leased().tier, "vram:0");
                assert!(
                    leases[0].tensors().is_err(),
                    "nothing to map in host memory"
                );
                let export = leases[0].export().unwrap();
                assert_eq!(export.uuid, cuda.gpus()[0].uuid);
                let imported = Imported::open(&cuda, &cuda.gpus()[0], export).unwrap();
                let bytes = imported.read().unwrap();
                let file =
                    std::fs::read(place("MODELS").join(format!("{name}.safetensors"))).unwrap();
                let file = safetensors::SafeTensors::deserialize(&file).unwrap();
                let places = leases[0].places().unwrap();
                assert_eq!(places.len(), file.len());
                for (tensor, offset, length) in places {
                    let seen = &bytes[offset as usize..(offset + length) as usize];
                    assert!(
                        seen == file.tensor(tensor).unwrap().data(),
                        "{name}: {tensor}"
                    );
                }
                assert!(imported.overwrite().is_err(), "a worker must not write");
            }
        });
    });
}

#[test]
fn clients_hear_that_their_leases_are_lost_with_the_gpu() {
    run(this_test!(), gpus(1), |machine| {
        let library = Library::new();
        library.single("a", 1, 5000);
        let mut config = config(&library);
        let place = tempfile::tempdir().unwrap();
        let socket = place.path().join("run/hotset.sock");
        config.bridge.socket = Some(socket.clone());
        block_on(async {
            let hotset = Arc::new(start(config).await);
            let bridge = Bridge::open(hotset.clone()).await.unwrap();
            let client = Client::connect_to(&socket, "worker").await.unwrap();
            let mut events = client.events();
            let held = client.load(&LoadOptions::new(["a"])).await.unwrap();
            machine.gpu(0).sticky.store(700, SeqCst);
            let ServerMessage::Revoke(revoke) = soon("the loss", events.recv()).await.unwrap()
            else {
                panic!("its leases are gone");
            };
            assert_eq!(revoke.leases, [held[0].leased().lease]);
            assert_eq!(revoke.grace_ms, 0);
            assert!(
                revoke.reason.contains("vram:0 is lost"),
                "{}",
                revoke.reason
            );
            drop((held, client, events));
            soon("close", bridge.close()).await;
            end(Arc::into_inner(hotset).unwrap()).await;
        });
    });
}

/// An interpreter with the Python package and what it needs, or why there is none.
fn python() -> Result<std::path::PathBuf, String> {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("python-vram");
    let python = folder.join("bin/python");
    let complete = folder.join("complete");
    if complete.exists() {
        return Ok(python);
    }
    let mut venv = Command::new("python3");
    venv.args(["-m", "venv"]).arg(&folder);
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "install", "--quiet", "msgpack", "numpy"]);
    for command in [&mut venv, &mut pip] {
        let output = command.output().map_err(|error| error.to_string())?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
    }
    std::fs::write(&complete, "").map_err(|error| error.to_string())?;
    Ok(python)
}

#[test]
fn python_workers_map_what_they_lease_on_a_gpu() {
    let required = std::env::var_os("HOTSET_REQUIRE_PYTHON").is_some_and(|value| value == "1");
    let python = match python() {
        Ok(python) => python,
        Err(reason) if required => panic!("HOTSET_REQUIRE_PYTHON=1, and: {reason}"),
        Err(reason) => {
            eprintln!("SKIPPED, the Python package needs python3 with venv, and PyPI: {reason}");
            return;
        }
    };
    run(this_test!(), gpus(1), |_| {
        let library = Library::new();
        library.single("large", 1, 90_000);
        library.single("small", 2, 900);
        let mut config = config(&library);
        let place = tempfile::tempdir().unwrap();
        let socket = place.path().join("run/hotset.sock");
        config.bridge.socket = Some(socket.clone());
        block_on(async {
            let hotset = Arc::new(start(config).await);
            let bridge = Bridge::open(hotset.clone()).await.unwrap();
            let sources = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("python");
            let models = library.path("");
            let worker = tokio::task::spawn_blocking(move || {
                Command::new(python)
                    .arg(sources.join("tests/test_cuda.py"))
                    .args(["large", "small"])
                    .env("PYTHONPATH", sources.join("src"))
                    .env("PYTHONDONTWRITEBYTECODE", "1")
                    .env("HOTSET_SOCKET", socket)
                    .env("MODELS", models)
                    .output()
                    .unwrap()
            });
            let output = worker.await.unwrap();
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
            assert_eq!(output.stdout, b"ok large\nok small\n");
            soon("close", bridge.close()).await;
            end(Arc::into_inner(hotset).unwrap()).await;
        });
    });
}
