//! Restarts, cancelled loads, broken and lost GPUs.

use crate::*;

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

            machine.gpu(0).lost.store(1, SeqCst);
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
            // The driver and NVML both know; either may be asked first.
            let known = ["CUDA_ERROR", "NVML says"];
            assert!(known.iter().any(|word| reason.contains(word)), "{reason}");
            assert_eq!(leases, [(on_first[0].id(), session.id())]);
            assert_eq!(on_first[0].revoked(), Some(reason));
            assert_eq!(on_second[0].revoked(), None);
            assert_tensors(&on_second[0], &b).await;

            // Somebody reset it: the supervisor brings it back, empty, and it is loaded again on demand.
            machine.gpu(0).lost.store(0, SeqCst);
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
fn a_gpu_that_an_error_took_from_this_process_is_refused_with_what_to_do() {
    run(this_test!(), gpus(2), |machine| {
        let library = Library::new();
        let tensors = library.single("a", 1, 5000);
        block_on(async {
            let hotset = start(config(&library)).await;
            let mut events = hotset.subscribe_gpus();
            let session = hotset.session("test").await.unwrap();
            let on = |gpu| ComponentSet::new(["a"]).on(Target::Gpu(GpuIndex(gpu)));
            let held = outcome(session.load(on(0))).await.unwrap();
            machine.gpu(0).sticky.store(700, SeqCst);
            let lost = soon("the loss", events.recv()).await.unwrap();
            assert!(matches!(lost, GpuEvent::Lost { .. }), "{lost:?}");
            let spent = soon("the end", events.recv()).await.unwrap();
            let GpuEvent::Spent { tier: GPU, reason } = spent else {
                panic!("{spent:?}");
            };
            assert!(reason.contains("restart it"), "{reason}");
            assert_eq!(tier(&hotset, GPU).await.out_of_service, Some(reason));
            let refused = outcome(session.load(on(0))).await.unwrap_err();
            assert!(refused.to_string().contains("restart it"), "{refused}");
            let elsewhere = outcome(session.load(on(1))).await.unwrap();
            assert_tensors(&elsewhere[0], &tensors).await;
            // Once, and nothing that is tried in vain over and over.
            let restarts = async || {
                let actors = hotset.status().await.actors;
                actors.iter().map(|actor| actor.restarts).sum::<u64>()
            };
            let before = restarts().await;
            tokio::time::sleep(Duration::from_millis(300)).await;
            assert!(events.try_recv().is_err());
            assert_eq!(restarts().await, before);
            drop((held, elsewhere));
            end(hotset).await;
        });
    });
}

/// The program itself, with its socket and its index in this folder.
fn serve(library: &Library, place: &std::path::Path, set: &[&str]) -> std::process::Child {
    let own = [
        "http.enabled=false".to_owned(),
        "monitor.gpu_interval=20ms".to_owned(),
        format!("catalog.database={}", place.join("index").display()),
        format!("bridge.socket={}", place.join("run/hotset.sock").display()),
    ];
    let all = own.iter().map(String::as_str).chain(set.iter().copied());
    Command::new(env!("CARGO_BIN_EXE_hotset"))
        .arg("serve")
        .arg("--models")
        .arg(library.dir.path())
        .args(all.flat_map(|value| ["--set", value]))
        .spawn()
        .unwrap()
}

#[test]
fn a_server_that_is_not_to_start_anew_serves_on_without_the_gpu() {
    run(this_test!(), gpus(1), |machine| {
        let library = Library::new();
        library.single("a", 1, 5000);
        let place = tempfile::tempdir().unwrap();
        let socket = place.path().join("run/hotset.sock");
        let set = ["cuda.restart=false", "supervision.retry=50ms"];
        let mut server = serve(&library, place.path(), &set);
        block_on(async {
            until("the server", async || socket.exists()).await;
            let client = Client::connect_to(&socket, "worker").await.unwrap();
            let on = |target| LoadOptions::new(["a"]).on(target);
            let held = client.load(&on("ram")).await.unwrap();
            machine.gpu(0).sticky.store(700, SeqCst);
            until("what to do", async || {
                let refused = client.load(&on("vram:0")).await.err();
                refused.is_some_and(|error| error.to_string().contains("restart it"))
            })
            .await;
            tokio::time::sleep(Duration::from_millis(500)).await;
            let again = client.load(&on("ram")).await.unwrap();
            assert_eq!(again[0].leased().tier, "ram");
            // Had it begun anew, it would have the GPU again.
            assert!(client.load(&on("vram:0")).await.is_err());
            drop((held, again, client));
        });
        let asked = Command::new("kill").arg(server.id().to_string()).status();
        assert!(asked.unwrap().success());
        assert!(server.wait().unwrap().success());
        machine.reap();
    });
}

/// The program itself: it begins anew, under its old id, and a client that was there before has the GPU again.
#[test]
fn a_server_whose_gpu_an_error_took_starts_itself_anew() {
    run(this_test!(), gpus(1), |machine| {
        let library = Library::new();
        library.single("a", 1, 5000);
        let place = tempfile::tempdir().unwrap();
        let socket = place.path().join("run/hotset.sock");
        let mut server = serve(&library, place.path(), &["supervision.retry=1s"]);
        block_on(async {
            until("the server", async || socket.exists()).await;
            let client = Client::connect_to(&socket, "worker").await.unwrap();
            let on = |target| LoadOptions::new(["a"]).on(target);
            let in_ram = client.load(&on("ram")).await.unwrap();
            let before = in_ram[0].mapping().unwrap().as_slice().to_vec();
            let lost = client.load(&on("vram:0")).await.unwrap();
            machine.gpu(0).sticky.store(700, SeqCst);
            let contexts = || machine.calls(Call::cuDevicePrimaryCtxRetain);
            let first = contexts();
            until("the loss to be met", async || {
                machine.calls(Call::cuDevicePrimaryCtxReset) > 0
            })
            .await;
            until("a new start", async || contexts() > first + 1).await;
            // While it starts, the socket is not there.
            let mut again = Vec::new();
            until("a lease on the GPU", async || {
                if let Ok(leases) = client.load(&on("vram:0")).await {
                    again = leases;
                }
                !again.is_empty()
            })
            .await;
            assert_eq!(again[0].leased().tier, "vram:0");
            assert_eq!(server.try_wait().unwrap(), None, "the same process");
            let address = |lease: &RemoteLease| lease.mapping().unwrap().as_slice().as_ptr();
            let in_ram_again = client.load(&on("ram")).await.unwrap();
            assert_eq!(
                address(&in_ram_again[0]),
                address(&in_ram[0]),
                "the new server took over what the client had kept"
            );
            assert!(in_ram[0].mapping().unwrap().as_slice() == before);
            drop(in_ram_again);
            drop((in_ram, lost, again, client));
        });
        let asked = Command::new("kill").arg(server.id().to_string()).status();
        assert!(asked.unwrap().success());
        assert!(server.wait().unwrap().success());
        machine.reap();
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

/// A configuration with which a driver that hangs is noticed soon.
fn impatient(library: &Library) -> Config {
    let mut config = config(library);
    config.cuda.call_timeout = Duration::from_secs(1);
    config.supervision.max_restarts = 1;
    config.supervision.backoff = Duration::from_millis(1);
    config.supervision.max_backoff = Duration::from_millis(2);
    config.supervision.retry = Duration::from_millis(50);
    config
}

async fn lost(events: &mut tokio::sync::broadcast::Receiver<GpuEvent>) -> Arc<str> {
    soon("the loss", async {
        loop {
            if let GpuEvent::Lost { tier, reason, .. } = events.recv().await.unwrap() {
                assert_eq!(tier, GPU);
                break reason;
            }
        }
    })
    .await
}

async fn out_of_service(hotset: &Hotset) -> Option<Arc<str>> {
    tier(hotset, GPU).await.out_of_service
}

#[test]
fn a_driver_that_hangs_takes_its_gpu_out_of_service_and_no_other() {
    run(this_test!(), gpus(2), |machine| {
        let library = Library::new();
        let (a, b) = (library.single("a", 1, 5000), library.single("b", 2, 5000));
        block_on(async {
            let hotset = start(impatient(&library)).await;
            let mut events = hotset.subscribe_gpus();
            let session = hotset.session("test").await.unwrap();
            let on = |name: &str, gpu| ComponentSet::new([name]).on(Target::Gpu(GpuIndex(gpu)));
            let held = outcome(session.load(on("a", 0))).await.unwrap();

            machine.gpu(0).hang.store(1, SeqCst);
            let reason = lost(&mut events).await;
            assert!(reason.contains("has not returned from a call"), "{reason}");
            assert_eq!(held[0].revoked(), Some(reason));
            // The rest goes on.
            let elsewhere = outcome(session.load(on("b", 1))).await.unwrap();
            assert_tensors(&elsewhere[0], &b).await;
            let best = load(&session, "a").await;
            assert_eq!(best[0].tier(), Tier::Vram(GpuIndex(1)));
            assert_tensors(&best[0], &a).await;
            let refused = outcome(session.load(on("a", 0))).await.unwrap_err();
            assert!(refused.to_string().contains("out of service"), "{refused}");

            // It is given up, and tried again now and then; once the call returns, it is back.
            until("it to be given up", async || {
                out_of_service(&hotset)
                    .await
                    .is_some_and(|reason| reason.contains("keeps failing"))
            })
            .await;
            machine.gpu(0).hang.store(0, SeqCst);
            until("it to be back", async || {
                out_of_service(&hotset).await.is_none()
            })
            .await;
            let again = outcome(session.load(on("a", 0))).await.unwrap();
            assert_tensors(&again[0], &a).await;
            assert_eq!(again[0].revoked(), None);
            drop((held, elsewhere, best, again));
            end(hotset).await;
        });
    });
}

#[test]
fn a_copy_that_never_ends_fails_its_load_and_is_survived() {
    run(this_test!(), gpus(1), |machine| {
        let library = Library::new();
        let tensors = library.single("a", 1, 5000);
        block_on(async {
            let hotset = start(impatient(&library)).await;
            let mut events = hotset.subscribe_gpus();
            let session = hotset.session("test").await.unwrap();
            let gpu = machine.gpu(0);
            gpu.hold_copies.store(1, SeqCst);
            let set = ComponentSet::new(["a"]).on(Target::Gpu(GpuIndex(0)));
            let error = outcome(session.load(set.clone())).await.unwrap_err();
            let said = error.to_string();
            assert!(
                said.contains("has not returned") || said.contains("out of service"),
                "{said}"
            );
            lost(&mut events).await;
            // RAM does not need the GPU.
            let in_ram = outcome(session.load(set.clone().on(Target::Ram)))
                .await
                .unwrap();
            assert_tensors(&in_ram[0], &tensors).await;
            gpu.hold_copies.store(0, SeqCst);
            until("it to be back", async || {
                out_of_service(&hotset).await.is_none()
            })
            .await;
            let leases = outcome(session.load(set)).await.unwrap();
            assert_tensors(&leases[0], &tensors).await;
            drop((in_ram, leases));
            end(hotset).await;
        });
    });
}

#[test]
fn nvml_that_hangs_counts_as_absent_until_it_answers() {
    run(this_test!(), gpus(1), |machine| {
        let library = Library::new();
        let tensors = library.single("a", 1, 5000);
        block_on(async {
            let hotset = start(impatient(&library)).await;
            let source = async || {
                tier(&hotset, GPU)
                    .await
                    .figures
                    .map(|figures| figures.source)
            };
            let gpu = machine.gpu(0);
            gpu.hang_nvml.store(1, SeqCst);
            until("the driver's own figures", async || {
                source().await == Some(FigureSource::Driver)
            })
            .await;
            let session = hotset.session("test").await.unwrap();
            let leases = load(&session, "a").await;
            assert_eq!(leases[0].tier(), GPU);
            assert_tensors(&leases[0], &tensors).await;
            gpu.hang_nvml.store(0, SeqCst);
            until("NVML's figures", async || {
                source().await == Some(FigureSource::Nvml)
            })
            .await;
            drop(leases);
            end(hotset).await;
        });
    });
}

/// Real processes, which lease from GPUs that are lost, refuse and hang under them.
#[test]
#[ignore = "half a minute of real processes: cargo test --test vram -- --ignored"]
fn nothing_is_lost_while_gpus_are() {
    let binary = std::env::current_exe().unwrap();
    // Where cargo has put the doubles and what steers them: `target/debug` and its folders.
    let built = binary.parent().and_then(std::path::Path::parent).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_hotset"))
        .args(["chaos", "--processes", "--minutes", "0.4", "--json"])
        .arg("--doubles")
        .arg(built)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(output.status.success(), "{said}\n{report:#}");
    assert!(report["skipped"]["lose-gpu"].is_null(), "{report:#}");
    let faults = report["faults"].as_object().unwrap();
    let of_gpus = [
        "lose-gpu",
        "sticky-gpu-error",
        "gpu-out-of-memory",
        "foreign-gpu-use",
        "gpu-hangs",
        "xid",
    ];
    assert!(
        of_gpus.iter().any(|name| faults.contains_key(*name)),
        "{report:#}"
    );
}
