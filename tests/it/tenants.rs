//! Whose turn it is, and how much anybody may have: keep-alive, quotas, and loads that give way.

use std::time::Duration;

use hotset::core::config::QuotaConfig;
use hotset::{
    Act, Bytes, ComponentSet, EvictCause, KeepAlive, LoadError, Priority, SessionError, Tier,
};

use crate::library::{Library, Rig, outcome, until};

fn resident(rig: &Rig) -> usize {
    rig.hotset
        .ledger()
        .view(Tier::Ram)
        .unwrap()
        .residencies
        .len()
}

#[tokio::test(start_paused = true)]
async fn what_nobody_holds_goes_when_its_keep_alive_is_over() {
    let library = Library::new();
    library.single("a", 1, 64);
    library.single("b", 2, 64);
    let rig = Rig::start(library.config(Bytes::mib(4))).await;
    let session = rig.hotset.session("test").await.unwrap();
    let keep = |name: &str, keep| ComponentSet::new([name]).keep_alive(keep);
    let minute = KeepAlive::For(Duration::from_secs(60));
    let held = session.load(keep("a", minute)).leases().await.unwrap();
    drop(
        session
            .load(ComponentSet::new(["b"]))
            .leases()
            .await
            .unwrap(),
    );
    // Not while it is held, and a minute after that.
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(resident(&rig), 2);
    drop(held);
    tokio::time::sleep(Duration::from_secs(59)).await;
    assert_eq!(resident(&rig), 2);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(
        resident(&rig),
        1,
        "a has gone, b stays as long as nobody needs the memory"
    );
    let why = rig.hotset.why("a", 1);
    let Act::Evict {
        cause: EvictCause::KeptLongEnough { idle },
        ..
    } = &why[0].act
    else {
        panic!("{why:?}")
    };
    assert!(*idle >= Duration::from_secs(60));
    // Each request sets it anew, also one that finds everything there.
    for _ in 0..3 {
        drop(session.load(keep("b", minute)).leases().await.unwrap());
        tokio::time::sleep(Duration::from_secs(40)).await;
    }
    assert_eq!(resident(&rig), 1);
    drop(
        session
            .load(keep("b", KeepAlive::Unlimited))
            .leases()
            .await
            .unwrap(),
    );
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(resident(&rig), 1);
    drop(
        session
            .load(keep("b", KeepAlive::For(Duration::ZERO)))
            .leases()
            .await
            .unwrap(),
    );
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(resident(&rig), 0);
    rig.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_label_has_its_quota_and_what_its_sessions_share_counts_once() {
    let library = Library::new();
    for (i, name) in ["a", "b", "c"].into_iter().enumerate() {
        library.single(name, i as u64, 64);
    }
    let mut config = library.config(Bytes::mib(4));
    config.quota = vec![QuotaConfig {
        label: "team-*".into(),
        leased: Some(Bytes::kib(130)),
        loads: Some(1),
    }];
    let rig = Rig::start(config).await;
    let session = async |label: &str| rig.hotset.session(label).await.unwrap();
    let load =
        |session: &hotset::Session, name: &str| outcome(session.load(ComponentSet::new([name])));
    let (one, two) = (session("team-red").await, session("team-red").await);
    let a = load(&one, "a").await.unwrap();
    let shared = load(&two, "a").await.unwrap();
    let b = load(&two, "b").await.unwrap();
    let refused = load(&one, "c").await.unwrap_err();
    let LoadError::Quota {
        retry_after, held, ..
    } = &refused
    else {
        panic!("{refused}")
    };
    assert_eq!(*held, Bytes::kib(128));
    assert!(retry_after.is_some(), "it fits once something is released");
    // Other labels have theirs, and those without a quota none.
    let other = session("team-blue").await;
    let blue = [
        load(&other, "c").await.unwrap(),
        load(&other, "a").await.unwrap(),
    ];
    let free = session("nobody").await;
    drop(
        outcome(free.load(ComponentSet::new(["a", "b", "c"])))
            .await
            .unwrap(),
    );
    let never = outcome(one.load(ComponentSet::new(["a", "b", "c"])))
        .await
        .unwrap_err();
    assert!(
        matches!(
            never,
            LoadError::Quota {
                retry_after: None,
                ..
            }
        ),
        "{never}"
    );
    drop(b);
    let c = load(&one, "c").await.unwrap();
    drop((a, shared, blue, c));

    // One load at a time.
    for view in rig.hotset.ledger().views() {
        rig.hotset.optimise_cache(view.tier, 0.0).await.unwrap();
    }
    rig.reader.close();
    let under_way = one.load(ComponentSet::new(["a"]));
    until("it reads", async || {
        rig.hotset.status().await.loads == 1 && resident(&rig) == 1
    })
    .await;
    let busy = load(&two, "b").await.unwrap_err();
    assert!(
        matches!(
            busy,
            LoadError::Session(SessionError::Busy { limit: 1, .. })
        ),
        "{busy}"
    );
    rig.reader.open_wide();
    drop(outcome(under_way).await.unwrap());
    drop(load(&two, "b").await.unwrap());
    rig.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_load_gives_way_between_components() {
    let library = Library::new();
    for (i, name) in ["a", "b", "c", "d", "urgent"].into_iter().enumerate() {
        library.single(name, i as u64, 248);
    }
    for priority in [Priority::Batch, Priority::Prefetch] {
        let mut config = library.config(Bytes::mib(1));
        config.load.concurrency = 1;
        let rig = Rig::start(config).await;
        let slow = rig.hotset.session("slow").await.unwrap();
        let fast = rig.hotset.session("fast").await.unwrap();
        rig.reader.close();
        let four = ComponentSet::new(["a", "b", "c", "d"]).with_priority(priority);
        let batch = slow.load(four);
        until("memory for four is promised", async || resident(&rig) == 4).await;
        let urgent = fast.load(ComponentSet::new(["urgent"]));
        until("the other waits", async || {
            let status = rig.hotset.status().await;
            status.tiers.iter().any(|tier| tier.waiting == Some(1))
        })
        .await;
        rig.reader.open_wide();
        let urgent = outcome(urgent).await.unwrap();
        let yielded = rig.hotset.decisions(100);
        assert!(
            yielded
                .iter()
                .any(|decision| matches!(decision.act, Act::Yield { .. })),
            "{yielded:?}"
        );
        // It is not lost, and has its turn when there is room.
        drop(urgent);
        assert_eq!(outcome(batch).await.unwrap().len(), 4);
        rig.assert_empty().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_sets_are_planned_together() {
    use hotset::GpuChoice;
    let library = Library::new();
    for (i, name) in ["a", "b", "c"].into_iter().enumerate() {
        library.single(name, i as u64, 600);
    }
    let mut config = library.config_with_gpu(Bytes::mib(8), Bytes::mib(1));
    config.gpu = vec![config.gpu[0].clone(); 2];
    let rig = Rig::start(config).await;
    let session = rig.hotset.session("test").await.unwrap();
    let sets = ["a", "b", "c"].map(|name| ComponentSet::new([name]));
    let mix = rig.hotset.plan_mix(&sets[..2], &GpuChoice::All).unwrap();
    assert!(mix.fits);
    let tier = |i: usize| mix.sets[i].plan.as_ref().unwrap().tier;
    assert_ne!(tier(0), tier(1));
    assert!(mix.estimate.seconds > 0.0 && !mix.estimate.assumed.is_empty());
    let three = rig.hotset.plan_mix(&sets, &GpuChoice::All).unwrap();
    assert!(!three.fits && !three.give_up.is_empty(), "{three:?}");
    // On GPUs that are not there they would.
    let imagined = GpuChoice::Imagined(vec![Bytes::mib(1), Bytes::mib(2)]);
    assert!(rig.hotset.plan_mix(&sets, &imagined).unwrap().fits);
    // What was loaded once has been measured.
    drop(outcome(session.load(sets[0].clone())).await.unwrap());
    drop(outcome(session.load(sets[1].clone())).await.unwrap());
    drop(outcome(session.load(sets[2].clone())).await.unwrap());
    let plan = rig.hotset.plan(&sets[0]).unwrap();
    let placed = rig
        .hotset
        .decisions(100)
        .into_iter()
        .rev()
        .find_map(|d| match d.act {
            Act::Place { alternatives, .. } => Some(alternatives),
            _ => None,
        });
    assert_eq!(placed.unwrap().len(), 2);
    drop(plan);
    rig.assert_empty().await;
}
