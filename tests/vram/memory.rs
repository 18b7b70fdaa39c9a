//! What is uploaded, what goes, and what others take.

use crate::*;

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
fn another_process_takes_60_percent_while_loads_go_on() {
    run(this_test!(), gpus(1), |machine| {
        set_room(machine, 100);
        let library = Library::new();
        let held = library.single("held", 1, 10_000);
        let models: Vec<Tensors> = (0..5)
            .map(|i| library.single(&format!("m{i}"), 10 + i, 5_000))
            .collect();
        block_on(async {
            let mut config = config(&library);
            // The room in which a process that starts finds its first bytes.
            config.cuda.headroom = Bytes::mib(10);
            let hotset = start(config).await;
            let session = hotset.session("holder").await.unwrap();
            let leases = load(&session, "held").await;
            let gpu = machine.gpu(0);
            let stop = std::sync::atomic::AtomicBool::new(false);
            // Two clients that load one model after the other, so that more and more stays there.
            let client = async |first: usize| {
                let session = hotset.session("client").await.unwrap();
                let mut round = 0;
                while !stop.load(SeqCst) {
                    let i = (first + round) % models.len();
                    let leases = load(&session, &format!("m{i}")).await;
                    assert_eq!(leases[0].tier(), GPU, "round {round}");
                    assert_tensors(&leases[0], &models[i]).await;
                    round += 1;
                }
                round
            };
            let other = async {
                // In mid-run: both have loaded several times, and hotset holds 40 MiB.
                until("the caches to fill", async || {
                    hotset.status().await.counters.uploads >= 6
                })
                .await;
                let before = tier(&hotset, GPU).await;
                assert_eq!(before.committed, Bytes::mib(40));
                // The other process takes 60 of 100 MiB at once: all that is free, headroom included.
                gpu.foreign.store(60 << 20, SeqCst);
                let took = Instant::now();
                until("the headroom to be free again", async || {
                    // Never more than there is, at any time.
                    let used = gpu.allocated.load(SeqCst) + gpu.foreign.load(SeqCst);
                    assert!(used <= 100 << 20, "{used} bytes of 100 MiB");
                    machine.free(0) >= 10 << 20
                })
                .await;
                println!("given up for another process after {:?}", took.elapsed());
                // And it stays so, while loads go on.
                let loads = hotset.status().await.counters.loads_granted;
                until("twenty more loads", async || {
                    let vram = tier(&hotset, GPU).await;
                    let sure = vram.committed.saturating_sub(vram.evicting);
                    assert!(sure <= Bytes::mib(30), "{sure} promised of 30 MiB");
                    hotset.status().await.counters.loads_granted >= loads + 20
                })
                .await;
                stop.store(true, SeqCst);
            };
            let (first, second, ()) = futures::join!(client(0), client(3), other);
            println!("{first} and {second} loads, none failed");
            let status = hotset.status().await;
            assert_eq!(status.counters.loads_refused, 0);
            assert_eq!(status.counters.uploads_failed, 0);
            let because = |decision: &hotset::Decision| match &decision.act {
                Act::Evict { cause, .. } => matches!(cause, EvictCause::Foreign { .. }),
                _ => false,
            };
            let decisions = (0..5).map(|i| hotset.why(&format!("m{i}"), 1000));
            assert!(decisions.flatten().any(|decision| because(&decision)));
            // What was leased all the time is untouched.
            assert_eq!(leases[0].revoked(), None);
            assert_tensors(&leases[0], &held).await;
            drop(leases);
            end(hotset).await;
        });
    });
}

#[test]
fn small_tensors_go_in_few_copies() {
    run(this_test!(), gpus(1), |machine| {
        let library = Library::new();
        // No two neighbours keep their distance on the GPU, and each would be a copy of its own.
        let path = library.path("small.safetensors");
        let tensors = library::write_weights(&path, 1, 800, 800 * 5002);
        block_on(async {
            let mut config = config(&library);
            config.load.piece = Bytes::mib(8);
            let hotset = start(config).await;
            let session = hotset.session("test").await.unwrap();
            let leases = load(&session, "small").await;
            let copies = machine.calls(Call::cuMemcpyHtoDAsync);
            let waits = machine.calls(Call::cuEventSynchronize);
            // One read, which the upload follows in a batch or two, through pinned buffers of 4 MiB.
            assert!(copies <= 4 && waits <= 4, "{copies} copies, {waits} waits");
            assert_tensors(&leases[0], &tensors).await;
            drop(leases);
            end(hotset).await;
        });
    });
}

#[test]
fn a_guess_waits_until_the_gpu_has_freed_what_goes_for_it() {
    run(this_test!(), gpus(1), |machine| {
        let library = Library::new();
        let parts = [
            ("text_encoder", "CLIPTextModel", 1000),
            ("unet", "UNet2DConditionModel", 9000),
        ];
        library.pipeline_of("base", 1, &parts);
        library.single("old", 2, 9000);
        set_room(machine, 25);
        block_on(async {
            let policy = || -> Box<dyn EvictionPolicy> { Box::new(Gambler { generous: true }) };
            let started = Hotset::builder()
                .config(config(&library))
                .eviction(Arc::new(policy))
                .start();
            let hotset = soon("the start", started).await.unwrap();
            let session = hotset.session("test").await.unwrap();
            let on_gpu = async |name: &str| {
                let set = ComponentSet::new([name]).on(Target::AnyGpu);
                drop(outcome(session.load(set)).await.unwrap());
            };
            let there = || {
                let view = hotset.ledger().view(GPU).unwrap();
                let whole = view.residencies.iter().filter(|r| !r.loading);
                let mut names: Vec<_> = whole.map(|r| r.component.id.to_string()).collect();
                names.sort();
                names
            };
            drop(outcome(session.load(ComponentSet::new(["base"]).on(Target::Ram))).await);
            on_gpu("old").await;
            on_gpu("base/text_encoder").await;
            hotset.enable_predictive_caching(true).await.unwrap();

            // Another process was faster than the books: nothing goes for a guess.
            machine.gpu(0).refuse_allocations.store(1, SeqCst);
            on_gpu("base/text_encoder").await;
            until("the guess to be refused", async || {
                machine.gpu(0).refuse_allocations.load(SeqCst) == 0
                    && hotset.status().await.counters.prefetches == 1
                    && there().len() == 2
                    && hotset.guesses()[0].score.wasted_bytes > Bytes::ZERO
            })
            .await;
            assert_eq!(there(), ["base/text_encoder", "old/weights"]);
            machine.gpu(0).foreign.store(9 << 20, SeqCst);
            until("less room", async || {
                tier(&hotset, GPU).await.budget <= Bytes::mib(16)
            })
            .await;

            // One that the machine's own memory pressure forbids is made again at the next request.
            until("the guess", async || {
                on_gpu("base/text_encoder").await;
                there() == ["base/text_encoder", "base/unet"]
            })
            .await;
            drop(session);
            end(hotset).await;
        });
    });
}
