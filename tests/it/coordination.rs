//! Sets together: how long they take, and who waits for whom. In virtual time, on simulated machines.

use std::time::Duration;

use futures::StreamExt;
use hotset::{Bytes, ComponentSet, Config, Lease, LoadEvent, Loading, Priority, Target};
use tokio::time::Instant;

use crate::library::{Library, Rig, until};

/// What a pipeline of seven components consists of, in the order of first use where there is one: part, class and KiB.
const SEVEN: [(&str, &str, usize); 7] = [
    ("text_encoder", "CLIPTextModel", 256),
    ("text_encoder_2", "CLIPTextModelWithProjection", 512),
    ("text_encoder_3", "T5EncoderModel", 1536),
    ("image_encoder", "CLIPVisionModelWithProjection", 384),
    ("transformer", "SD3Transformer2DModel", 4096),
    ("controlnet", "SD3ControlNetModel", 640),
    ("vae", "AutoencoderKL", 320),
];

/// A machine with this many simulated GPUs.
fn machine(library: &Library, ram: Bytes, gpus: usize, vram: Bytes) -> Config {
    let mut config = library.config_with_gpu(ram, vram);
    config.gpu[0].sim.latency = Duration::from_micros(10);
    config.gpu = vec![config.gpu[0].clone(); gpus];
    config
}

/// Waits for the end of a load; gives its leases, and when each came.
async fn timed(mut loading: Loading) -> (Vec<Lease>, Vec<Duration>) {
    let began = Instant::now();
    let (mut leases, mut times) = (Vec::new(), Vec::new());
    while let Some(event) = loading.next().await {
        if let LoadEvent::Leased(lease) = event.unwrap() {
            leases.push(lease);
            times.push(began.elapsed());
        }
    }
    (leases, times)
}

fn total(leases: &[Lease]) -> Bytes {
    leases.iter().map(|lease| lease.component().bytes).sum()
}

#[tokio::test(start_paused = true)]
async fn a_pipeline_takes_as_long_as_its_bytes_and_its_first_component_as_long_as_that_alone() {
    let library = Library::new();
    library.pipeline_of("seven", 1, &SEVEN);
    let mut config = machine(&library, Bytes::mib(32), 4, Bytes::mib(16));
    for gpu in &mut config.gpu {
        gpu.sim.bandwidth = Bytes::mib(1);
    }
    // Small beside the components, as it is on a real link.
    config.load.piece = Bytes::kib(8);
    config.load.concurrency = 7;
    config.load.reads = 7;
    let rig = Rig::start(config).await;
    let session = rig.hotset.session("test").await.unwrap();
    let set = ComponentSet::new(["seven"]);
    // From RAM, since files are read in real time.
    let ram = session.load(set.clone().on(Target::Ram)).leases().await;
    assert_eq!(ram.unwrap().len(), 7);
    let (leases, times) = timed(session.load(set.on(Target::AnyGpu))).await;
    assert_eq!(leases.len(), 7);
    let rate = Bytes::mib(1).as_f64();
    let all = total(&leases).as_f64() / rate;
    let took = times[6].as_secs_f64();
    assert!(took < 1.1 * all, "{took} s for {all} s of the link");
    // Each in its turn: what comes first is there as if it were alone, and so on.
    let mut before = 0.0;
    for (lease, time) in leases.iter().zip(&times) {
        before += lease.component().bytes.as_f64() / rate;
        let took = time.as_secs_f64();
        // What is under way already when a component begins.
        let allowed = 1.1 * before + 8.0 * Bytes::kib(8).as_f64() / rate;
        assert!(
            took < allowed,
            "{} after {took} s, {before} s of the link",
            lease.component().id
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_slow_disk_and_a_link_work_at_the_same_time() {
    let library = Library::new();
    library.pipeline_of("seven", 1, &SEVEN);
    let mut config = machine(&library, Bytes::mib(32), 4, Bytes::mib(16));
    for gpu in &mut config.gpu {
        gpu.sim.bandwidth = Bytes::mib(1);
    }
    let rig = Rig::start(config).await;
    let session = rig.hotset.session("test").await.unwrap();
    // The disk gives a piece of 64 KiB every 62.5 ms: as much as the link takes.
    rig.reader.close();
    let reader = rig.reader.clone();
    let disk = tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_micros(62_500)).await;
            reader.pass(1);
        }
    });
    let set = ComponentSet::new(["seven"]).on(Target::AnyGpu);
    let (leases, times) = timed(session.load(set)).await;
    let all = total(&leases).as_f64() / Bytes::mib(1).as_f64();
    let took = times[6].as_secs_f64();
    assert!(took < 1.1 * all, "{took} s for {all} s of disk and link");
    disk.abort();
}

#[tokio::test(start_paused = true)]
async fn the_first_leases_come_while_the_rest_still_loads() {
    let library = Library::new();
    library.pipeline_of("seven", 1, &SEVEN);
    let mut config = library.config(Bytes::mib(32));
    config.load.concurrency = 1;
    let rig = Rig::start(config).await;
    let session = rig.hotset.session("test").await.unwrap();
    rig.reader.close();
    let mut loading = session.load(ComponentSet::new(["seven"]));
    // The pieces of the encoder that takes longest, and one of the next.
    rig.reader.pass(26);
    let first = loop {
        match loading.next().await.unwrap().unwrap() {
            LoadEvent::Leased(lease) => break lease,
            LoadEvent::Done => panic!("done without a lease"),
            LoadEvent::Planned(_) | LoadEvent::Progress(_) => {}
        }
    };
    assert_eq!(first.component().id.component.to_string(), "text_encoder_3");
    // It is whole and can be used; what is cancelled now takes it from nobody.
    drop(loading);
    assert_eq!(first.revoked(), None);
    let ledger = rig.hotset.ledger();
    rig.reader.open_wide();
    until("the rest to be given back", async || {
        ledger.leases().len() == 1
            && ledger.views()[0]
                .residencies
                .iter()
                .all(|residency| !residency.loading)
    })
    .await;
    drop(first);
    rig.assert_empty().await;
}

/// Leases a component for a while, in a session of its own.
async fn use_once(hotset: &hotset::Hotset, set: ComponentSet, hold: Duration) -> Duration {
    let session = hotset.session("once").await.unwrap();
    let asked = Instant::now();
    let leases = session.load(set).leases().await.unwrap();
    let waited = asked.elapsed();
    tokio::time::sleep(hold).await;
    drop(leases);
    waited
}

#[tokio::test(start_paused = true)]
async fn what_is_always_in_use_starves_nobody() {
    let library = Library::new();
    library.single("large", 1, 900);
    library.single("hot", 2, 400);
    let mut config = library.config(Bytes::mib(1));
    config.load.aging = Duration::from_secs(30);
    let rig = Rig::start(config).await;
    // Each second somebody new leases what is resident, for two seconds: it is never free to go.
    let uses = async {
        let mut uses = Vec::new();
        for _ in 0..60 {
            uses.push(use_once(
                &rig.hotset,
                ComponentSet::new(["hot"]),
                Duration::from_secs(2),
            ));
        }
        let delayed = (0..).zip(uses).map(|(i, one)| async move {
            tokio::time::sleep(Duration::from_secs(i)).await;
            one.await
        });
        futures::future::join_all(delayed).await
    };
    let large = async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        use_once(
            &rig.hotset,
            ComponentSet::new(["large"]).within(Duration::from_secs(3600)),
            Duration::from_secs(1),
        )
        .await
    };
    let (waits, large) = tokio::join!(uses, large);
    assert!(large >= Duration::from_secs(30), "{large:?}");
    assert!(large < Duration::from_secs(33), "{large:?}");
    // And nobody else waited for longer than it took.
    let longest = waits.iter().max().unwrap();
    assert!(*longest < Duration::from_secs(5), "{waits:?}");
    rig.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn who_holds_leases_is_let_through_so_that_it_can_finish() {
    let library = Library::new();
    library.single("large", 1, 900);
    library.single("a", 2, 300);
    library.single("b", 3, 300);
    let mut config = library.config(Bytes::mib(1));
    config.load.aging = Duration::from_secs(30);
    let rig = Rig::start(config).await;
    let holder = rig.hotset.session("holder").await.unwrap();
    drop(
        holder
            .load(ComponentSet::new(["b"]))
            .leases()
            .await
            .unwrap(),
    );
    let a = holder
        .load(ComponentSet::new(["a"]))
        .leases()
        .await
        .unwrap();
    let waiting = rig.hotset.session("waiting").await.unwrap();
    let other = rig.hotset.session("other").await.unwrap();
    let large = waiting.load(ComponentSet::new(["large"]).within(Duration::from_secs(3600)));
    tokio::time::sleep(Duration::from_secs(40)).await;
    // The tier is closed to newcomers, but not to one that holds something.
    let newcomer = other.load(ComponentSet::new(["a"]).within(Duration::from_secs(5)));
    assert!(newcomer.leases().await.is_err());
    let both = holder
        .load(ComponentSet::new(["a"]))
        .leases()
        .await
        .unwrap();
    // And it opens again, since this one goes on for long.
    tokio::time::sleep(Duration::from_secs(20)).await;
    let newcomer = other.load(ComponentSet::new(["a"]).within(Duration::from_secs(5)));
    drop(newcomer.leases().await.unwrap());
    drop((a, both));
    assert_eq!(large.leases().await.unwrap().len(), 1);
    rig.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_batch_set_lets_interactive_ones_pass_until_it_has_aged() {
    let library = Library::new();
    for (i, name) in ["batch", "early", "late"].into_iter().enumerate() {
        library.single(name, i as u64, 700);
    }
    library.single("held", 9, 700);
    let mut config = library.config(Bytes::mib(1));
    config.load.aging = Duration::from_secs(30);
    let rig = Rig::start(config).await;
    let holder = rig.hotset.session("holder").await.unwrap();
    let held = holder
        .load(ComponentSet::new(["held"]))
        .leases()
        .await
        .unwrap();
    let began = Instant::now();
    let hotset = &rig.hotset;
    // Asked for at 0 s, 20 s and 40 s; memory comes free at 50 s.
    let one = |name: &'static str, priority, after| async move {
        tokio::time::sleep(Duration::from_secs(after)).await;
        let set = ComponentSet::new([name]).with_priority(priority);
        use_once(hotset, set, Duration::from_secs(1)).await;
        began.elapsed()
    };
    let free = async {
        tokio::time::sleep(Duration::from_secs(50)).await;
        drop(held);
    };
    let (batch, early, late, ()) = tokio::join!(
        one("batch", Priority::Batch, 0),
        one("early", Priority::Interactive, 20),
        one("late", Priority::Interactive, 40),
        free
    );
    assert!(early < batch, "{early:?} {batch:?}");
    assert!(batch < late, "{batch:?} {late:?}");
    rig.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn seven_components_on_four_gpus_take_as_long_as_the_link_that_has_most_to_carry() {
    let library = Library::new();
    library.pipeline_of("seven", 1, &SEVEN);
    let mut config = machine(&library, Bytes::mib(32), 4, Bytes::mib(16));
    for gpu in &mut config.gpu {
        gpu.sim.bandwidth = Bytes::mib(1);
    }
    config.load.piece = Bytes::kib(8);
    let rig = Rig::start(config).await;
    let session = rig.hotset.session("test").await.unwrap();
    let ram = ComponentSet::new(["seven"]).on(Target::Ram);
    let ram = session.load(ram).leases().await.unwrap();
    // Two links carry one component each, the others two or three.
    let places = [0, 1, 2, 0, 3, 1, 2];
    let loads = SEVEN.iter().zip(places).map(|((part, ..), gpu)| {
        let gpu = Target::Gpu(hotset::GpuIndex(gpu));
        timed(session.load(ComponentSet::new([format!("seven/{part}")]).on(gpu)))
    });
    let loads = futures::future::join_all(loads).await;
    let rate = Bytes::mib(1).as_f64();
    let mut links = [0.0; 4];
    for ((leases, _), gpu) in loads.iter().zip(places) {
        links[gpu as usize] += total(leases).as_f64() / rate;
    }
    let busiest = links.into_iter().fold(0.0, f64::max);
    let took = loads.iter().map(|(_, times)| times[0].as_secs_f64());
    let took = took.fold(0.0, f64::max);
    assert!(
        took < 1.1 * busiest,
        "{took} s for {busiest} s of the busiest link"
    );
    drop((ram, loads));
    rig.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_small_set_passes_a_large_one_where_it_delays_it_by_nothing() {
    let library = Library::new();
    for (i, (name, kib)) in [
        ("held", 600),
        ("large", 500),
        ("small", 400),
        ("other", 450),
    ]
    .into_iter()
    .enumerate()
    {
        library.single(name, i as u64, kib);
    }
    let rig = Rig::start(library.config(Bytes::mib(1))).await;
    let session = async |label: &str| rig.hotset.session(label).await.unwrap();
    let set = |name: &str, s| ComponentSet::new([name]).within(Duration::from_secs(s));
    let (holder, first, second) = (session("a").await, session("b").await, session("c").await);
    let held = holder.load(set("held", 5)).leases().await.unwrap();
    let large = first.load(set("large", 3600));
    tokio::time::sleep(Duration::from_secs(1)).await;
    // The large one waits for what is held, with the small one as without.
    let began = Instant::now();
    let small = second.load(set("small", 5)).leases().await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1));
    // Of this one and the small one, one would be too much for it.
    assert!(second.load(set("other", 5)).leases().await.is_err());
    drop(held);
    let began = Instant::now();
    let large = large.leases().await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1));
    drop((small, large));
    rig.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn who_passes_takes_nothing_that_the_large_one_wants() {
    let library = Library::new();
    for (i, (name, kib)) in [("held", 600), ("x", 300), ("y", 200), ("small", 200)]
        .into_iter()
        .enumerate()
    {
        library.single(name, i as u64, kib);
    }
    let rig = Rig::start(library.config(Bytes::mib(1))).await;
    let session = rig.hotset.session("test").await.unwrap();
    let other = rig.hotset.session("other").await.unwrap();
    let set =
        |names: &[&str], s| ComponentSet::new(names.iter().copied()).within(Duration::from_secs(s));
    drop(session.load(set(&["x"], 5)).leases().await.unwrap());
    let held = session.load(set(&["held"], 5)).leases().await.unwrap();
    let large = session.load(set(&["x", "y"], 3600));
    tokio::time::sleep(Duration::from_secs(1)).await;
    // There is room for it beside both, but only where `x` goes first.
    assert!(other.load(set(&["small"], 5)).leases().await.is_err());
    let reads = rig.hotset.status().await.counters.reads;
    drop(held);
    drop(large.leases().await.unwrap());
    assert_eq!(
        rig.hotset.status().await.counters.reads,
        reads + 1,
        "`y` alone"
    );
    rig.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_found_by_the_name_of_what_was_refused() {
    let library = Library::new();
    library.single("large", 1, 2000);
    library.single("small", 2, 100);
    let mut config = library.config(Bytes::mib(1));
    config.sessions.max_loads_per_session = 1;
    let rig = Rig::start(config).await;
    let session = rig.hotset.session("test").await.unwrap();
    let both = session.load(ComponentSet::new(["large", "small"])).leases();
    assert!(both.await.is_err());
    let reason = |name: &str| match &rig.hotset.why(name, 1)[..] {
        [decision] => match &decision.act {
            hotset::Act::Refuse { reason, .. } => reason.clone(),
            act => panic!("{act:?}"),
        },
        none => panic!("{none:?}"),
    };
    let told = reason("large");
    assert!(told.contains("budget of 1.0 MiB"), "{told}");
    assert!(
        told.contains("without large the rest fits in ram"),
        "{told}"
    );
    assert_eq!(reason("small"), told);
    // So is one for which there are too many.
    rig.reader.close();
    let under_way = session.load(ComponentSet::new(["small"]));
    until("it reads", async || rig.hotset.status().await.loads == 1).await;
    assert!(
        session
            .load(ComponentSet::new(["large"]))
            .leases()
            .await
            .is_err()
    );
    assert!(reason("large").starts_with("busy: this session has too many loads"));
    rig.reader.open_wide();
    drop(under_way.leases().await.unwrap());
    rig.assert_empty().await;
}
