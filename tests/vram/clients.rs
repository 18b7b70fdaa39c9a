//! Other processes: what they import, and what they hear.

use crate::*;

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

/// Memory of a GPU lives as long as anybody has imported it, and anybody who has can write it: it is counted, and not taken over.
#[test]
fn what_a_worker_keeps_of_a_server_that_was_killed_counts_against_the_next() {
    let test = this_test!();
    run(test, gpus(1), |machine| {
        let library = Library::new();
        library.single("kept", 1, 20_000);
        library.single("large", 2, 30_000);
        // Beside the context of a worker.
        let context = machine.gpu(0).context.load(SeqCst) >> 20;
        set_room(machine, 40 + context);
        let place = tempfile::tempdir().unwrap();
        let file = |name: &str| place.path().join(name);
        let role = |role: &'static str| {
            let facts = [("PLACE", place.path()), ("MODELS", library.dir.path())];
            let facts = facts.map(|(name, path)| (name, path.to_string_lossy().into_owned()));
            std::thread::spawn(move || run_role(test, role, &facts))
        };
        let server = role("server");
        let worker = role("worker");
        block_on(async {
            until("the worker to import", async || file("imported").exists()).await;
            let pid = std::fs::read_to_string(file("pid")).unwrap();
            let killed = Command::new("kill").args(["-9", &pid]).status().unwrap();
            assert!(killed.success());
            let killed = tokio::task::spawn_blocking(move || server.join());
            assert!(killed.await.unwrap().is_err(), "it was killed");
            machine.reap();

            let hotset = start(config(&library)).await;
            let session = hotset.session("test").await.unwrap();
            let on_gpu = || ComponentSet::new(["large"]).on(Target::AnyGpu);
            let gpu = tier(&hotset, GPU).await;
            let foreign = gpu.figures.unwrap().foreign;
            assert!(foreign >= Bytes::kib(20_000), "{foreign}");
            assert!(gpu.budget < Bytes::mib(21), "{}", gpu.budget);
            let refused = outcome(session.load(on_gpu())).await.unwrap_err();
            assert!(refused.to_string().contains("20.0"), "{refused}");

            std::fs::write(file("enough"), "").unwrap();
            let done = tokio::task::spawn_blocking(move || worker.join());
            done.await.unwrap().unwrap();
            machine.reap();
            until("the budget to rise", async || {
                tier(&hotset, GPU).await.budget >= Bytes::mib(30)
            })
            .await;
            drop(outcome(session.load(on_gpu())).await.unwrap());
            drop(session);
            end(hotset).await;
        });
    });
    let place = || std::path::PathBuf::from(std::env::var_os("PLACE").unwrap());
    let served = |config: &mut Config| {
        config.catalog.roots = vec![std::env::var_os("MODELS").unwrap().into()];
        config.bridge.socket = Some(place().join("run/hotset.sock"));
    };
    in_role("server", || {
        let mut config = config(&Library::new());
        served(&mut config);
        block_on(async {
            let hotset = Arc::new(start(config).await);
            let _bridge = Bridge::open(hotset.clone()).await.unwrap();
            std::fs::write(place().join("pid"), std::process::id().to_string()).unwrap();
            until("to be killed", async || false).await;
        });
    });
    in_role("worker", || {
        block_on(async {
            let socket = place().join("run/hotset.sock");
            until("the server", async || place().join("pid").exists()).await;
            let client = Client::connect_to(&socket, "worker").await.unwrap();
            let cuda = Cuda::detect().unwrap();
            let options = LoadOptions::new(["kept"]);
            let leases = client.load(&options).await.unwrap();
            assert_eq!(leases[0].leased().tier, "vram:0");
            let export = leases[0].export().unwrap();
            let imported = Imported::open(&cuda, &cuda.gpus()[0], export).unwrap();
            let before = imported.read().unwrap();
            std::fs::write(place().join("imported"), "").unwrap();
            until("to be told", async || place().join("enough").exists()).await;
            assert!(imported.read().unwrap() == before, "it outlives the server");
        });
    });
}

/// An interpreter with the Python package and what it needs, or why there is none.
pub(crate) fn python() -> Result<std::path::PathBuf, String> {
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
