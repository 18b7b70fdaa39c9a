//! Time that passes at once: hours of waiting in milliseconds, and the same every time.

use std::time::Duration;

use hotset::{Bytes, ComponentSet, LoadError, Target};
use tokio::time::Instant;

use crate::library::{Library, Rig, until};

#[tokio::test(start_paused = true)]
async fn no_load_waits_longer_than_its_deadline() {
    let library = Library::new();
    library.single("a", 1, 700);
    library.single("b", 2, 700);
    let rig = Rig::start(library.config(Bytes::mib(1))).await;
    let session = rig.hotset.session("test").await.unwrap();
    let held = session
        .load(ComponentSet::new(["a"]))
        .leases()
        .await
        .unwrap();
    for (asked, expected) in [
        (None, rig.hotset.config().load.deadline),
        (Some(Duration::from_secs(3600)), Duration::from_secs(3600)),
    ] {
        let mut set = ComponentSet::new(["b"]);
        set.deadline = asked;
        let began = Instant::now();
        let error = session.load(set).leases().await.unwrap_err();
        let LoadError::TimedOut { waited, .. } = error else {
            panic!("{error}");
        };
        assert_eq!(waited, expected);
        assert_eq!(began.elapsed(), expected);
    }
    drop(held);
    assert!(
        session
            .load(ComponentSet::new(["b"]))
            .leases()
            .await
            .is_ok()
    );
}

#[tokio::test(start_paused = true)]
async fn a_read_that_hangs_ends_with_the_deadline_and_blocks_nobody_else() {
    let library = Library::new();
    library.single("stuck", 1, 300);
    library.single("fine", 2, 300);
    let rig = Rig::start(library.config(Bytes::mib(1))).await;
    let session = rig.hotset.session("test").await.unwrap();
    let fine = session
        .load(ComponentSet::new(["fine"]))
        .leases()
        .await
        .unwrap();
    rig.reader.close();
    let stuck = session
        .load(ComponentSet::new(["stuck"]))
        .leases()
        .await
        .unwrap_err();
    assert!(matches!(stuck, LoadError::TimedOut { .. }), "{stuck}");
    // What is there is leased as ever.
    let again = session
        .load(ComponentSet::new(["fine"]))
        .leases()
        .await
        .unwrap();
    drop((fine, again));
    rig.reader.open_wide();
    rig.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn uploads_share_the_link_and_take_the_time_that_it_takes() {
    let library = Library::new();
    library.pipeline("base", 1, 512);
    let mut config = library.config_with_gpu(Bytes::mib(8), Bytes::mib(8));
    config.gpu[0].sim.bandwidth = Bytes::mib(1);
    config.gpu[0].sim.latency = Duration::ZERO;
    let rig = Rig::start(config).await;
    let session = rig.hotset.session("test").await.unwrap();
    let set = ComponentSet::new(["base"]).on(Target::Ram);
    let in_ram = session.load(set.clone()).leases().await.unwrap();
    let bytes: Bytes = in_ram.iter().map(|lease| lease.component().bytes).sum();
    let began = Instant::now();
    let leases = session.load(set.on(Target::AnyGpu)).leases().await.unwrap();
    let seconds = bytes.as_f64() / Bytes::mib(1).as_f64();
    // Virtual time, rounded up to its milliseconds at each copy.
    let took = began.elapsed().as_secs_f64();
    assert!(
        took >= seconds && took < seconds * 1.1,
        "{took} s for {seconds} s"
    );
    assert_eq!(leases.len(), 4);
}

#[tokio::test(start_paused = true)]
async fn memory_that_others_take_is_given_up_within_a_second() {
    let library = Library::new();
    library.single("held", 1, 1000);
    library.single("idle", 2, 2500);
    let mut config = library.config_with_gpu(Bytes::mib(8), Bytes::mib(10));
    config.gpu[0].headroom = Bytes::mib(1);
    let rig = Rig::start(config).await;
    let session = rig.hotset.session("test").await.unwrap();
    let on_gpu = |name: &str| ComponentSet::new([name]).on(Target::AnyGpu);
    drop(session.load(on_gpu("idle")).leases().await.unwrap());
    let held = session.load(on_gpu("held")).leases().await.unwrap();
    // With the interval that is the default: 6 of 10 MiB go to another process, and with them the headroom.
    let began = Instant::now();
    rig.gpus[0].set_foreign_use(Bytes::mib(6));
    while rig.gpus[0].allocated() > Bytes::mib(2) {
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(
            began.elapsed() < Duration::from_secs(1),
            "not within a second"
        );
    }
    assert_eq!(held[0].revoked(), None);
    drop(held);
    rig.assert_empty().await;
}

// In real time: files are read by threads that a paused clock would not wait for.
#[tokio::test]
async fn the_budget_follows_the_limit_of_the_container_both_ways() {
    use hotset::core::machine::Machine;
    use hotset::core::policy::pressure::{CgroupEvents, CgroupMemory, HostMemory};
    use std::sync::{Arc, Mutex};

    let library = Library::new();
    library.single("a", 1, 700);
    library.single("b", 2, 700);
    let limited = |kib: u64| HostMemory {
        total: Bytes::gib(1),
        available: Bytes::gib(1),
        full_avg10: None,
        cgroup: Some(CgroupMemory {
            limit: Bytes::kib(kib),
            room: Bytes::kib(kib),
            events: CgroupEvents::default(),
        }),
    };
    let figures = Arc::new(Mutex::new(limited(500)));
    // Wanted are 2 MiB, and what is allowed at the start is far less.
    let mut config = library.config(Bytes::mib(2));
    config.monitor.interval = Duration::from_millis(20);
    let hotset = hotset::Hotset::builder()
        .config(config)
        .machine(Machine::simulated(figures.clone()))
        .devices(Vec::new())
        .start()
        .await
        .unwrap();
    let budget = || hotset.ledger().view(hotset::Tier::Ram).unwrap().budget;
    let committed = || hotset.ledger().view(hotset::Tier::Ram).unwrap().committed;
    assert_eq!(budget(), Bytes::kib(450));
    let session = hotset.session("test").await.unwrap();
    let both = ComponentSet::new(["a", "b"]);
    assert!(session.load(both.clone()).leases().await.is_err());

    *figures.lock().unwrap() = limited(1 << 20);
    until("the budget is what is wanted", async || {
        budget() == Bytes::mib(2)
    })
    .await;
    drop(session.load(both).leases().await.unwrap());
    assert!(committed() > Bytes::kib(1390));

    *figures.lock().unwrap() = limited(1000);
    until("what nobody holds went", async || {
        budget() == Bytes::kib(900) && committed() <= budget()
    })
    .await;
    hotset.drain().await;
}
