//! What policies are told, and what is loaded before anybody asks: on what grounds, in whose place, and what came of it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use hotset::core::plan::{Fit, LINK_PER_S};
use hotset::core::policy::{Candidate, EvictionPolicy, Victim, lru::Lru};
use hotset::core::predict::{Grounds, GuessResults, Observed};
use hotset::{Act, Bytes, ComponentSet, Config, EvictCause, GpuIndex, Hotset, Target, Tier};

use crate::library::{Gambler, Library, Rig, outcome, until};

fn guessing(mut config: Config) -> Config {
    config.predict.enabled = true;
    config
}

const GPU: Tier = Tier::Vram(GpuIndex(0));

fn in_ram(hotset: &Hotset) -> Vec<String> {
    resident(hotset, Tier::Ram)
}

fn resident(hotset: &Hotset, tier: Tier) -> Vec<String> {
    let view = hotset.ledger().view(tier).unwrap();
    let resident = view.residencies.iter().filter(|r| !r.loading);
    let mut names: Vec<String> = resident.map(|r| r.component.id.to_string()).collect();
    names.sort();
    names
}

fn results(hotset: &Hotset, grounds: Grounds) -> GuessResults {
    results_in(hotset, Tier::Ram, grounds)
}

fn results_in(hotset: &Hotset, tier: Tier, grounds: Grounds) -> GuessResults {
    let mut all = hotset.guesses().into_iter();
    let of = all.find(|of| (of.tier, of.grounds) == (tier, grounds));
    of.unwrap()
}

async fn load(hotset: &Hotset, names: &[&str]) {
    load_on(hotset, Target::Ram, names).await;
}

async fn load_on(hotset: &Hotset, target: Target, names: &[&str]) {
    let session = hotset.session("test").await.unwrap();
    let set = ComponentSet::new(names.iter().copied()).on(target);
    outcome(session.load(set)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_rest_of_a_pipeline_comes_while_its_first_part_runs() {
    let library = Library::new();
    library.pipeline("base", 1, 100);
    library.single("other", 2, 100);
    let rig = Rig::start(guessing(library.config(Bytes::mib(8)))).await;
    load(&rig.hotset, &["base/text_encoder", "base/text_encoder_2"]).await;
    let all = ["text_encoder", "text_encoder_2", "unet", "vae"].map(|name| format!("base/{name}"));
    until("the rest", async || in_ram(&rig.hotset) == all).await;
    let opened = rig.reader.opened();
    load(&rig.hotset, &["base/unet"]).await;
    load(&rig.hotset, &["base/vae"]).await;
    assert_eq!(rig.reader.opened(), opened, "nobody waits for the disk");
    until("both to be counted", async || {
        // Who asks for the figures has what was used counted first.
        let _ = rig.hotset.analyse_usage().await;
        results(&rig.hotset, Grounds::Declared).score.used_bytes > Bytes::kib(190)
    })
    .await;
    let declared = results(&rig.hotset, Grounds::Declared);
    assert!(declared.on);
    assert_eq!(declared.score.loads, 2);
    assert_eq!(declared.precision, Some(1.0));
    assert!(declared.score.saved_s > 0.0);
    let grounds = rig
        .hotset
        .decisions(100)
        .into_iter()
        .filter_map(|d| match d.act {
            Act::Prefetch { grounds, .. } => Some(grounds),
            _ => None,
        });
    assert_eq!(grounds.collect::<Vec<_>>(), [Grounds::Declared; 2]);
}

#[tokio::test(start_paused = true)]
async fn what_usually_goes_with_a_base_comes_with_it() {
    let library = Library::new();
    for (name, seed) in [("base", 1), ("style", 2), ("rare", 3)] {
        library.single(name, seed, 100);
    }
    let rig = Rig::start(guessing(library.config(Bytes::mib(8)))).await;
    for i in 0..6 {
        let with = if i == 5 { "rare" } else { "style" };
        load(&rig.hotset, &["base", with]).await;
    }
    let _ = rig.hotset.analyse_usage().await;
    let _ = rig.hotset.optimise_cache(Tier::Ram, 0.0).await;
    until("all to go", async || in_ram(&rig.hotset).is_empty()).await;
    load(&rig.hotset, &["base"]).await;
    let both = ["base/weights", "style/weights"];
    until("what goes with it", async || in_ram(&rig.hotset) == both).await;
    assert_eq!(results(&rig.hotset, Grounds::Usual).score.loads, 1);
}

#[test]
fn a_guess_waits_until_what_was_evicted_is_back() {
    // A single thread frees memory, and this test has it when it likes.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .max_blocking_threads(1)
        .build()
        .unwrap();
    runtime.block_on(async {
        let library = Library::new();
        for (name, seed) in [("base", 1), ("style", 2)] {
            library.single(name, seed, 100);
        }
        let rig = Rig::start(guessing(library.config(Bytes::mib(8)))).await;
        for _ in 0..6 {
            load(&rig.hotset, &["base", "style"]).await;
        }
        let session = rig.hotset.session("test").await.unwrap();
        let held = outcome(session.load(ComponentSet::new(["base"]))).await;
        let _ = rig.hotset.analyse_usage().await;

        let (busy, free) = std::sync::mpsc::channel::<()>();
        let freeing = tokio::task::spawn_blocking(move || free.recv());
        let _ = rig.hotset.optimise_cache(Tier::Ram, 0.0).await;
        assert_eq!(in_ram(&rig.hotset), ["base/weights"]);
        let evicting = || rig.hotset.ledger().view(Tier::Ram).unwrap().evicting;
        assert!(!evicting().is_zero());
        load(&rig.hotset, &["base"]).await;
        // Whoever answers these has seen what was asked before.
        let _ = rig.hotset.analyse_usage().await;
        let _ = rig.hotset.status().await;
        assert_eq!(results(&rig.hotset, Grounds::Usual).score.loads, 0);
        assert!(!evicting().is_zero());

        busy.send(()).unwrap();
        freeing.await.unwrap().unwrap();
        let both = ["base/weights", "style/weights"];
        until("what goes with it", async || in_ram(&rig.hotset) == both).await;
        assert_eq!(results(&rig.hotset, Grounds::Usual).score.loads, 1);
        drop(held);
    });
}

#[tokio::test(start_paused = true)]
async fn nothing_is_guessed_where_that_is_off() {
    let library = Library::new();
    library.pipeline("base", 1, 100);
    let rig = Rig::start(library.config(Bytes::mib(8))).await;
    load(&rig.hotset, &["base/text_encoder"]).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(in_ram(&rig.hotset), ["base/text_encoder"]);
    assert!(rig.hotset.guesses().iter().all(|of| of.score.loads == 0));
}

#[tokio::test(start_paused = true)]
async fn only_what_is_worth_far_less_goes_for_a_guess() {
    for generous in [true, false] {
        let library = Library::new();
        library.pipeline("base", 1, 300);
        library.single("old", 2, 900);
        let policy = move || -> Box<dyn EvictionPolicy> { Box::new(Gambler { generous }) };
        let hotset = Hotset::builder()
            .config(guessing(library.config(Bytes::kib(1_500))))
            .eviction(Arc::new(policy))
            .start()
            .await
            .unwrap();
        load(&hotset, &["old"]).await;
        load(&hotset, &["base/text_encoder"]).await;
        let evicted = || {
            let all = hotset.decisions(100);
            let guessed = |act: &Act| match act {
                Act::Evict { cause, .. } => matches!(cause, EvictCause::Guess { .. }),
                _ => false,
            };
            all.iter().filter(|d| guessed(&d.act)).count()
        };
        if generous {
            until("the rest", async || in_ram(&hotset).len() == 4).await;
            assert_eq!(evicted(), 1, "{:?}", in_ram(&hotset));
            assert!(!in_ram(&hotset).contains(&"old/weights".to_owned()));
        } else {
            tokio::time::sleep(Duration::from_secs(60)).await;
            assert_eq!(evicted(), 0);
            assert!(in_ram(&hotset).contains(&"old/weights".to_owned()));
        }
        hotset.drain().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_guess_gives_way_to_whoever_waits() {
    let library = Library::new();
    library.pipeline_of(
        "base",
        1,
        &[
            ("text_encoder", "CLIPTextModel", 100),
            ("unet", "UNet2DConditionModel", 600),
        ],
    );
    library.single("wanted", 2, 800);
    let rig = Rig::start(library.config(Bytes::mib(1))).await;
    load(&rig.hotset, &["base/text_encoder"]).await;
    // Whatever is read from now on stops half-way.
    rig.reader.close();
    rig.hotset.enable_predictive_caching(true).await.unwrap();
    load(&rig.hotset, &["base/text_encoder"]).await;
    until("the guess to be read", async || rig.reader.opened() == 2).await;
    assert_eq!(results(&rig.hotset, Grounds::Declared).score.loads, 1);
    tokio::time::sleep(Duration::from_millis(10)).await;
    let session = rig.hotset.session("test").await.unwrap();
    let loading = session.load(ComponentSet::new(["wanted"]));
    tokio::time::sleep(Duration::from_millis(10)).await;
    rig.reader.open_wide();
    let leases = outcome(loading).await.unwrap();
    until("the guess to be over", async || {
        !results(&rig.hotset, Grounds::Declared)
            .score
            .wasted_bytes
            .is_zero()
    })
    .await;
    let declared = results(&rig.hotset, Grounds::Declared);
    assert_eq!(declared.score.delayed_loads, 1);
    assert!(declared.score.delayed_s >= 0.009, "{declared:?}");
    drop(leases);
    rig.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn what_comes_to_ram_on_a_guess_goes_on_to_the_gpu() {
    let library = Library::new();
    library.pipeline("base", 1, 100);
    let config = library.config_with_gpu(Bytes::mib(8), Bytes::mib(4));
    let rig = Rig::start(guessing(config)).await;
    load_on(&rig.hotset, Target::AnyGpu, &["base/text_encoder"]).await;
    let all = ["text_encoder", "text_encoder_2", "unet", "vae"].map(|name| format!("base/{name}"));
    until("the rest", async || resident(&rig.hotset, GPU) == all).await;
    for tier in [Tier::Ram, GPU] {
        assert_eq!(
            results_in(&rig.hotset, tier, Grounds::Declared).score.loads,
            3
        );
    }
    let uploads = async || rig.hotset.status().await.counters.uploads;
    let (opened, uploaded) = (rig.reader.opened(), uploads().await);
    load_on(&rig.hotset, Target::AnyGpu, &["base"]).await;
    assert_eq!((rig.reader.opened(), uploads().await), (opened, uploaded));
    until("all to be counted", async || {
        let _ = rig.hotset.analyse_usage().await;
        let precision = |tier| results_in(&rig.hotset, tier, Grounds::Declared).precision;
        precision(GPU) == Some(1.0) && precision(Tier::Ram) == Some(1.0)
    })
    .await;
    // What came of them is the same in every figure, although RAM was asked for none of them.
    let unused = rig.hotset.ledger().view(Tier::Ram).unwrap();
    assert!(unused.residencies.iter().all(|r| !r.prefetched));
    let _ = rig.hotset.optimise_cache(Tier::Ram, 0.0).await;
    let wasted = |d: &hotset::Decision| matches!(d.act, Act::Evict { wasted: true, .. });
    assert!(!rig.hotset.decisions(100).iter().any(wasted));
    rig.assert_empty().await;
}

/// A pipeline whose larger part is in RAM and on its way to the GPU on a guess, which takes ten seconds.
async fn uploading(ram: Bytes, vram: Bytes, others: &[(&str, usize)]) -> (Library, Rig) {
    let library = Library::new();
    let parts = [
        ("text_encoder", "CLIPTextModel", 100),
        ("unet", "UNet2DConditionModel", 600),
    ];
    library.pipeline_of("base", 1, &parts);
    for (i, (name, kib)) in others.iter().enumerate() {
        library.single(name, 2 + i as u64, *kib);
    }
    let mut config = library.config_with_gpu(ram, vram);
    config.gpu[0].sim.bandwidth = Bytes::kib(60);
    config.gpu[0].sim.latency = Duration::ZERO;
    let rig = Rig::start(config).await;
    load(&rig.hotset, &["base"]).await;
    load_on(&rig.hotset, Target::AnyGpu, &["base/text_encoder"]).await;
    rig.hotset.enable_predictive_caching(true).await.unwrap();
    load_on(&rig.hotset, Target::AnyGpu, &["base/text_encoder"]).await;
    let prefetches = async || rig.hotset.status().await.counters.prefetches;
    until("the guess", async || prefetches().await == 1).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(
        results_in(&rig.hotset, GPU, Grounds::Declared).score.loads,
        1
    );
    (library, rig)
}

#[tokio::test(start_paused = true)]
async fn an_upload_on_a_guess_gives_way_to_whoever_waits_for_memory() {
    // The GPU has no room for both, or RAM has not; the upload would take eight more seconds.
    let roomy = Bytes::mib(4);
    for (ram, vram, target) in [
        (roomy, Bytes::mib(1), Target::AnyGpu),
        (Bytes::mib(1), roomy, Target::Ram),
    ] {
        let (_library, rig) = uploading(ram, vram, &[("wanted", 800)]).await;
        let session = rig.hotset.session("test").await.unwrap();
        let loading = session.load(ComponentSet::new(["wanted"]).on(target));
        until("the guess to be over", async || {
            let declared = results_in(&rig.hotset, GPU, Grounds::Declared);
            !declared.score.wasted_bytes.is_zero()
        })
        .await;
        assert!(
            rig.hotset.ledger().now() < Duration::from_secs(9),
            "{target:?}"
        );
        let leases = outcome(loading).await.unwrap();
        assert_eq!(leases.len(), 1);
        drop((leases, session));
        rig.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_guess_goes_before_anything_that_is_there() {
    // 700 KiB of 1.5 MiB are a guess's and 500 are free: without it there is room.
    let others = [("idle", 300), ("wanted", 900)];
    let (_library, rig) = uploading(Bytes::mib(4), Bytes::kib(1536), &others).await;
    let session = rig.hotset.session("test").await.unwrap();
    let set = ComponentSet::new(["wanted"]).on(Target::AnyGpu);
    let plan = rig.hotset.plan(&set).unwrap();
    assert_ne!(plan.fit, Fit::AfterOthers, "it gives way");
    let leases = outcome(session.load(set)).await.unwrap();
    assert_eq!(leases.len(), 1);
    let evicted = |d: &hotset::Decision| matches!(d.act, Act::Evict { tier, .. } if tier == GPU);
    assert!(!rig.hotset.decisions(100).iter().any(evicted));
    drop((leases, session));
    rig.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_a_guess_whose_disk_hangs() {
    let library = Library::new();
    let parts = [
        ("text_encoder", "CLIPTextModel", 100),
        ("unet", "UNet2DConditionModel", 400),
    ];
    library.pipeline_of("base", 1, &parts);
    library.single("idle", 2, 300);
    library.single("wanted", 3, 500);
    let rig = Rig::start(library.config(Bytes::mib(1))).await;
    load(&rig.hotset, &["idle"]).await;
    load(&rig.hotset, &["base/text_encoder"]).await;
    rig.reader.close();
    rig.hotset.enable_predictive_caching(true).await.unwrap();
    load(&rig.hotset, &["base/text_encoder"]).await;
    until("the guess to be read", async || rig.reader.opened() == 3).await;
    tokio::time::sleep(Duration::from_millis(10)).await;
    let session = rig.hotset.session("test").await.unwrap();
    let loading = session.load(ComponentSet::new(["wanted"]));
    until("something else to go", async || rig.reader.opened() == 4).await;
    assert!(!in_ram(&rig.hotset).contains(&"idle/weights".to_owned()));
    rig.reader.open_wide();
    drop(outcome(loading).await.unwrap());
    drop(session);
    rig.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn guesses_end_where_they_are_switched_off() {
    let (_library, rig) = uploading(Bytes::mib(4), Bytes::mib(4), &[]).await;
    rig.hotset.enable_predictive_caching(false).await.unwrap();
    until("the guess to be over", async || {
        resident(&rig.hotset, GPU) == ["base/text_encoder"]
            && rig.gpus[0].allocated() < Bytes::kib(200)
    })
    .await;
    assert!(rig.hotset.ledger().now() < Duration::from_secs(9));
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(resident(&rig.hotset, GPU), ["base/text_encoder"]);
    rig.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_used_in_ram_stays_there_alone() {
    let library = Library::new();
    library.pipeline("base", 1, 100);
    let config = library.config_with_gpu(Bytes::mib(8), Bytes::mib(4));
    let rig = Rig::start(guessing(config)).await;
    let session = rig.hotset.session("test").await.unwrap();
    let vae = ComponentSet::new(["base/vae"]).on(Target::Ram);
    let held = outcome(session.load(vae)).await.unwrap();
    load_on(&rig.hotset, Target::AnyGpu, &["base/text_encoder"]).await;
    let rest = ["text_encoder", "text_encoder_2", "unet"].map(|name| format!("base/{name}"));
    until("the rest", async || resident(&rig.hotset, GPU) == rest).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(resident(&rig.hotset, GPU), rest);
    drop((held, session));
    rig.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn whoever_wants_what_is_uploaded_on_a_guess_waits_for_the_rest_of_it() {
    let (_library, rig) = uploading(Bytes::mib(4), Bytes::mib(4), &[]).await;
    let began = rig.hotset.ledger().now();
    load_on(&rig.hotset, Target::AnyGpu, &["base/unet"]).await;
    let took = rig.hotset.ledger().now() - began;
    assert!(took < Duration::from_millis(9_500), "{took:?}");
    assert_eq!(rig.hotset.status().await.counters.uploads, 2);
    let _ = rig.hotset.analyse_usage().await;
    let declared = results_in(&rig.hotset, GPU, Grounds::Declared);
    assert_eq!(declared.precision, Some(1.0));
    // A second of ten or more; the rest was waited for.
    let whole_s = Bytes::kib(600).as_f64() / LINK_PER_S;
    let saved = declared.score.saved_s / whole_s;
    assert!(saved > 0.05 && saved < 0.3, "{saved}");
    rig.assert_empty().await;
}

/// Notes which tier, by its capacity, is told of how many components and how many of them were there.
struct Noting {
    capacity: Bytes,
    told: Arc<Mutex<Vec<(Bytes, usize, usize)>>>,
}

impl EvictionPolicy for Noting {
    fn name(&self) -> &'static str {
        "noting"
    }

    fn on_capacity(&mut self, capacity: Bytes) {
        self.capacity = capacity;
    }

    fn observe(&mut self, _now: Duration, request: &Observed<'_>) {
        let told = (self.capacity, request.components.len(), 0);
        self.told.lock().unwrap().push(told);
    }

    fn on_request(
        &mut self,
        _now: Duration,
        _content: &hotset::ContentId,
        _bytes: Bytes,
        hit: bool,
    ) {
        if let Some(last) = self.told.lock().unwrap().last_mut() {
            last.2 += usize::from(hit);
        }
    }

    fn rank(&mut self, now: Duration, candidates: &[Candidate]) -> Vec<Victim> {
        // A GPU's is soon there again as long as RAM has it; nobody asks RAM for what a GPU has.
        for candidate in candidates {
            assert_eq!(candidate.above, self.capacity == RAM);
            assert!(candidate.restore_s > 0.0);
        }
        Lru.rank(now, candidates)
    }
}

const RAM: Bytes = Bytes::mib(8);
const VRAM: Bytes = Bytes::mib(4);

#[tokio::test(start_paused = true)]
async fn ram_is_told_of_what_a_gpu_does_not_have() {
    let library = Library::new();
    library.pipeline("base", 1, 100);
    let told = Arc::new(Mutex::new(Vec::new()));
    let noted = told.clone();
    let policy = move || -> Box<dyn EvictionPolicy> {
        Box::new(Noting {
            capacity: Bytes::ZERO,
            told: noted.clone(),
        })
    };
    let hotset = Hotset::builder()
        .config(library.config_with_gpu(RAM, VRAM))
        .eviction(Arc::new(policy))
        .start()
        .await
        .unwrap();
    let load = async |names: &[&str]| {
        let session = hotset.session("test").await.unwrap();
        let set = ComponentSet::new(names.iter().copied()).on(Target::AnyGpu);
        outcome(session.load(set)).await.unwrap();
        // Policies are told when they may have to choose.
        for tier in [Tier::Ram, GPU] {
            hotset.optimise_cache(tier, 1.0).await.unwrap();
        }
        let mut told = std::mem::take(&mut *told.lock().unwrap());
        told.sort_unstable();
        told
    };
    let (unet, all) = (["base/unet"], ["base"]);
    assert_eq!(load(&unet).await, [(VRAM, 1, 0), (RAM, 1, 0)]);
    assert_eq!(load(&unet).await, [(VRAM, 1, 1)], "RAM is not asked");
    assert_eq!(load(&all).await, [(VRAM, 4, 1), (RAM, 3, 0)]);
    hotset.optimise_cache(GPU, 0.1).await.unwrap();
    until("it to go", async || {
        hotset.ledger().view(GPU).unwrap().residencies.len() < 4
    })
    .await;
    let again = load(&all).await;
    let missing = again.iter().find(|told| told.0 == RAM).unwrap();
    assert!(
        missing.1 > 0 && missing.1 == missing.2,
        "RAM has them: {again:?}"
    );
    hotset.drain().await;
}
