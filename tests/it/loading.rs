//! Loads that go well, and loads that are refused, cancelled or run out of time.

use std::time::Duration;

use futures::StreamExt;
use hotset::{
    Act, Bytes, ComponentSet, GpuIndex, LoadError, LoadEvent, Phase, PlanError, Target, Tier,
};

use crate::library::{Library, Rig, assert_tensors, outcome, soon, until};

const GPU: Tier = Tier::Vram(GpuIndex(0));

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_is_leased_with_the_right_bytes_in_ram_and_vram() {
    let library = Library::new();
    let tensors = library.pipeline("base", 1, 300);
    let rig = Rig::start(library.config_with_gpu(Bytes::mib(8), Bytes::mib(8))).await;
    let session = rig.hotset.session("test").await.unwrap();
    for target in [Target::Ram, Target::Best] {
        let leases = outcome(session.load(ComponentSet::new(["base"]).on(target)))
            .await
            .unwrap();
        assert_eq!(leases.len(), 4);
        for lease in &leases {
            let name = &*lease.component().id.component;
            assert_tensors(lease, &tensors[name]).await;
            let tier = if target == Target::Ram {
                Tier::Ram
            } else {
                GPU
            };
            assert_eq!(lease.tier(), tier);
        }
        // The order of first use: text encoders, then the UNet, then the VAE.
        let order: Vec<_> = leases
            .iter()
            .map(|l| l.component().id.component.to_string())
            .collect();
        assert_eq!(order, ["text_encoder", "text_encoder_2", "unet", "vae"]);
        let status = rig.hotset.status().await;
        assert_eq!(status.sessions[0].leases, 4);
    }
    assert_eq!(rig.reader.opened(), 4, "what is in RAM is not read again");
    drop(session);
    rig.assert_empty().await;
    soon("drain", rig.hotset.drain()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_comes_first_then_the_leases() {
    let library = Library::new();
    library.single("one", 1, 512);
    let rig = Rig::start(library.config(Bytes::mib(4))).await;
    rig.reader.close();
    let session = rig.hotset.session("test").await.unwrap();
    let mut loading = session.load(ComponentSet::new(["one"]));
    let Some(Ok(LoadEvent::Planned(plan))) = soon("plan", loading.next()).await else {
        panic!("the plan comes first");
    };
    assert_eq!(plan.steps.len(), 1);
    rig.reader.pass(2);
    // Two pieces of 64 KiB are shown before the file is whole.
    soon("progress", async {
        loop {
            let Some(Ok(LoadEvent::Progress(progress))) = loading.next().await else {
                panic!("nothing is leased yet");
            };
            if progress.done == Bytes::kib(128) {
                assert_eq!(progress.components[0].phase, Phase::Loading);
                break;
            }
        }
    })
    .await;
    rig.reader.open_wide();
    let mut leased = 0;
    loop {
        match soon("events", loading.next()).await {
            Some(Ok(LoadEvent::Leased(_))) => leased += 1,
            Some(Ok(LoadEvent::Done)) => break,
            Some(Ok(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(leased, 1);
    assert!(soon("end", loading.next()).await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_sessions_that_want_one_component_cause_one_read_and_one_upload() {
    let library = Library::new();
    let tensors = library.single("one", 1, 512);
    let rig = Rig::start(library.config_with_gpu(Bytes::mib(2), Bytes::mib(2))).await;
    rig.reader.close();
    let mut loads = Vec::new();
    for i in 0..10 {
        let session = rig.hotset.session(format!("s{i}")).await.unwrap();
        loads.push(session.load(ComponentSet::new(["one"])));
    }
    until("all to wait", async || {
        let views = rig.hotset.ledger().views();
        views[0].residencies.first().is_some_and(|r| r.pins == 10)
    })
    .await;
    // Nine of them walk away: the load goes on for the last.
    let last = loads.pop().unwrap();
    drop(loads);
    rig.reader.open_wide();
    let leases = outcome(last).await.unwrap();
    assert_tensors(&leases[0], &tensors).await;
    assert_eq!(rig.reader.opened(), 1);
    assert_eq!(rig.hotset.status().await.counters.uploads, 1);
    drop(leases);
    rig.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_load_gives_its_bytes_back() {
    let library = Library::new();
    library.pipeline("base", 1, 300);
    let rig = Rig::start(library.config_with_gpu(Bytes::mib(8), Bytes::mib(8))).await;
    rig.reader.close();
    let session = rig.hotset.session("test").await.unwrap();
    let loading = session.load(ComponentSet::new(["base"]));
    rig.reader.pass(3);
    until("reads to begin", async || rig.reader.opened() > 0).await;
    loading.cancel();
    assert!(matches!(outcome(loading).await, Err(LoadError::Cancelled)));
    rig.reader.open_wide();
    rig.assert_empty().await;
    // And nothing is broken by it.
    assert_eq!(
        outcome(session.load(ComponentSet::new(["base"])))
            .await
            .unwrap()
            .len(),
        4
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_that_can_never_fit_is_refused_at_once_with_the_arithmetic() {
    let library = Library::new();
    library.pipeline("base", 1, 512);
    let rig = Rig::start(library.config_with_gpu(Bytes::mib(8), Bytes::mib(1))).await;
    let session = rig.hotset.session("test").await.unwrap();
    for target in [Target::Best, Target::Gpu(GpuIndex(0))] {
        let error = outcome(session.load(ComponentSet::new(["base"]).on(target)))
            .await
            .unwrap_err();
        let LoadError::Plan(PlanError::NeverFits { shortages, .. }) = &error else {
            panic!("{error}");
        };
        assert_eq!(shortages[0].budget, Bytes::mib(1));
        let sum: Bytes = shortages[0].parts.iter().map(|(_, bytes)| *bytes).sum();
        assert_eq!(shortages[0].needed, sum);
        assert!(error.to_string().contains("base/unet"), "{error}");
        assert!(error.to_string().contains("too much"), "{error}");
    }
    assert_eq!(rig.reader.opened(), 0, "nothing was read for it");
    let status = rig.hotset.status().await;
    assert_eq!(status.counters.loads_refused, 2);
    let refused = |act: &Act| matches!(act, Act::Refuse { .. });
    assert_eq!(
        rig.hotset
            .decisions(10)
            .iter()
            .filter(|d| refused(&d.act))
            .count(),
        2
    );
    let missing = outcome(session.load(ComponentSet::new(["bsae"])))
        .await
        .unwrap_err();
    assert!(
        missing.to_string().contains("base"),
        "the nearest name is told: {missing}"
    );
    let no_gpu = ComponentSet::new(["base"]).on(Target::Gpu(GpuIndex(7)));
    assert!(
        outcome(session.load(no_gpu))
            .await
            .unwrap_err()
            .to_string()
            .contains("vram:7")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn two_sets_that_want_the_same_memory_take_turns() {
    let library = Library::new();
    for (i, name) in ["a", "b", "c", "d"].into_iter().enumerate() {
        library.single(name, i as u64, 700);
    }
    // Room for two of the four, in both tiers.
    let rig = Rig::start(library.config_with_gpu(Bytes::mib(2), Bytes::mib(2))).await;
    let mut workers = Vec::new();
    for (i, names) in [["a", "b"], ["c", "d"], ["b", "c"], ["d", "a"]]
        .into_iter()
        .enumerate()
    {
        let session = rig.hotset.session(format!("w{i}")).await.unwrap();
        workers.push(tokio::spawn(async move {
            for _ in 0..5 {
                let leases = session
                    .load(ComponentSet::new(names))
                    .leases()
                    .await
                    .unwrap();
                assert_eq!(leases.len(), 2);
            }
        }));
    }
    for worker in workers {
        soon("the worker", worker).await.unwrap();
    }
    let status = rig.hotset.status().await;
    assert_eq!(status.counters.loads_granted, 20);
    rig.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_that_waits_for_others_too_long_says_who_holds_the_memory() {
    let library = Library::new();
    library.single("a", 1, 700);
    library.single("b", 2, 700);
    let rig = Rig::start(library.config(Bytes::mib(1))).await;
    let session = rig.hotset.session("test").await.unwrap();
    let held = outcome(session.load(ComponentSet::new(["a"])))
        .await
        .unwrap();
    let set = ComponentSet::new(["b"]).within(Duration::from_millis(50));
    let error = outcome(session.load(set.clone())).await.unwrap_err();
    assert!(matches!(error, LoadError::TimedOut { .. }), "{error}");
    assert!(
        error.to_string().contains("held by other leases"),
        "{error}"
    );
    // One that waits is granted as soon as the holder lets go.
    let waiting = session.load(ComponentSet::new(["b"]));
    until("it to wait", async || {
        rig.hotset.status().await.tiers[0].waiting == Some(1)
    })
    .await;
    drop(held);
    assert_eq!(outcome(waiting).await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_eviction_is_decided_by_use_and_recorded_with_its_reason() {
    let library = Library::new();
    for (i, name) in ["a", "b", "c"].into_iter().enumerate() {
        library.single(name, i as u64, 700);
    }
    let rig = Rig::start(library.config_with_gpu(Bytes::mib(16), Bytes::mib(2))).await;
    let session = rig.hotset.session("test").await.unwrap();
    for name in ["a", "b", "a", "c"] {
        outcome(session.load(ComponentSet::new([name])))
            .await
            .unwrap();
    }
    let why = rig.hotset.why("b", 10);
    let Act::Evict {
        tier, component, ..
    } = &why[0].act
    else {
        panic!("{why:?}");
    };
    assert_eq!(
        (*tier, component.model.as_str()),
        (GPU, "b"),
        "a was used after b"
    );
    assert!(why[0].act.sentence().contains("least recently used"));
    assert!(
        rig.hotset
            .why("a", 10)
            .iter()
            .all(|d| !matches!(d.act, Act::Evict { .. }))
    );
    // From RAM, where it still is, without a read.
    outcome(session.load(ComponentSet::new(["b"])))
        .await
        .unwrap();
    assert_eq!(rig.reader.opened(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_component_larger_than_ram_streams_to_the_gpu_through_the_ring() {
    let library = Library::new();
    let tensors = library.pipeline("base", 1, 1024);
    let mut config = library.config_with_gpu(Bytes::kib(512), Bytes::mib(8));
    config.load.ring = Bytes::kib(256);
    let rig = Rig::start(config).await;
    let session = rig.hotset.session("test").await.unwrap();
    let leases = outcome(session.load(ComponentSet::new(["base"])))
        .await
        .unwrap();
    for lease in &leases {
        assert_tensors(lease, &tensors[&*lease.component().id.component]).await;
    }
    let ram = rig.hotset.ledger().view(Tier::Ram).unwrap();
    assert_eq!(ram.committed, Bytes::ZERO, "the ring came back");
    drop(leases);
    rig.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_component_can_be_loaded_alone_and_dependencies_come_along() {
    let library = Library::new();
    library.pipeline("base", 1, 100);
    let rig = Rig::start(library.config(Bytes::mib(8))).await;
    let session = rig.hotset.session("test").await.unwrap();
    let leases = outcome(session.load(ComponentSet::new(["base/vae"])))
        .await
        .unwrap();
    assert_eq!(leases.len(), 1);
    let wrong = outcome(session.load(ComponentSet::new(["base/vea"])))
        .await
        .unwrap_err();
    assert!(wrong.to_string().contains("text_encoder_2"), "{wrong}");
}

#[tokio::test]
async fn decisions_are_appended_to_a_file_where_one_is_named() {
    let library = Library::new();
    library.single("a", 1, 700);
    library.single("b", 2, 700);
    let path = library.path("decisions.jsonl");
    std::fs::write(&path, "{\"before\":1}\n").unwrap();
    let mut config = library.config(Bytes::mib(1));
    config.monitor.decisions_file = Some(path.clone());
    let rig = Rig::start(config.clone()).await;
    let session = rig.hotset.session("test").await.unwrap();
    for name in ["a", "b"] {
        drop(outcome(session.load(ComponentSet::new([name]))).await);
    }
    let read = || -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(&path).unwrap();
        // The last line may not be whole yet.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    let decided = rig.hotset.decisions(usize::MAX);
    until("all decisions to be written", async || {
        read().len() == decided.len() + 1
    })
    .await;
    let lines = read();
    assert_eq!(lines[0]["before"], 1, "it is appended to");
    for (line, decision) in lines[1..].iter().zip(decided.iter().rev()) {
        assert_eq!(*line, serde_json::json!(decision));
    }
    assert!(decided.len() >= 3, "two admissions and an eviction");
    drop((session, rig));

    config.monitor.decisions_file = Some(library.path("no/such/folder/file"));
    let error = hotset::Hotset::builder()
        .config(config)
        .start()
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("monitor.decisions_file"),
        "{error}"
    );
}
