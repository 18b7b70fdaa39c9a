//! Components that no GPU has room for: some blocks there, the others in RAM.

use hotset::core::catalog::Part;
use hotset::{Bytes, ComponentSet, Lease, LoadError, PlanError, Target, Tier};

use crate::library::{Library, Rig, Tensors, assert_tensors, outcome, write_weights};

/// Ten blocks of 100 KiB.
fn large(library: &Library) -> Tensors {
    write_weights(&library.path("large.safetensors"), 7, 10, 1000 << 10)
}

fn parts(leases: &[Lease]) -> Vec<(Tier, &Part)> {
    let parts = leases.iter().map(|lease| {
        let part = lease.component().part.as_deref().unwrap();
        (lease.tier(), part)
    });
    parts.collect()
}

/// The tensors of the blocks that a lease holds.
fn of(tensors: &Tensors, lease: &Lease) -> Tensors {
    let part = lease.component().part.as_deref().unwrap();
    let mine = tensors
        .iter()
        .filter(|(name, _)| part.blocks.iter().any(|block| name.starts_with(&**block)));
    mine.map(|(name, bytes)| (name.clone(), bytes.clone()))
        .collect()
}

fn split() -> ComponentSet {
    ComponentSet::new(["large"]).on(Target::AnyGpu).may_split()
}

#[tokio::test(flavor = "multi_thread")]
async fn as_many_blocks_as_fit_are_on_the_gpu_and_the_others_in_ram() {
    let library = Library::new();
    let tensors = large(&library);
    let rig = Rig::start(library.config_with_gpu(Bytes::mib(4), Bytes::kib(512))).await;
    let session = rig.hotset.session("test").await.unwrap();
    // Without leave it is refused, and what would help is said.
    let whole = ComponentSet::new(["large"]).on(Target::AnyGpu);
    let refused = outcome(session.load(whole)).await.unwrap_err();
    assert!(matches!(
        refused,
        LoadError::Plan(PlanError::NeverFits { .. })
    ));
    assert!(refused.to_string().contains("may be split"), "{refused}");

    let plan = rig.hotset.plan_split(&split()).await.unwrap();
    assert_eq!(plan.steps.len(), 2);
    let leases = outcome(session.load(split())).await.unwrap();
    let [(gpu, kept), (ram, streamed)] = parts(&leases)[..] else {
        panic!("{leases:?}")
    };
    assert!(matches!(gpu, Tier::Vram(_)));
    assert_eq!(ram, Tier::Ram);
    assert_eq!(
        (kept.first, kept.of_blocks, streamed.of_blocks),
        (0, 10, 10)
    );
    assert_eq!(streamed.first, kept.blocks.len());
    assert_eq!(kept.blocks.len() + streamed.blocks.len(), 10);
    assert!(kept.blocks.len() >= 4, "{kept:?}");
    for lease in &leases {
        assert_tensors(lease, &of(&tensors, lease)).await;
    }
    // Who comes second shares both halves.
    let reads = rig.hotset.status().await.counters.reads;
    let second = rig.hotset.session("second").await.unwrap();
    let shared = outcome(second.load(split())).await.unwrap();
    assert_eq!(shared.len(), 2);
    assert_eq!(rig.hotset.status().await.counters.reads, reads);
    // Nothing of it can be evicted while it is held.
    for tier in [gpu, ram] {
        rig.hotset.optimise_cache(tier, 0.0).await.unwrap();
    }
    for lease in &leases {
        assert_tensors(lease, &of(&tensors, lease)).await;
    }
    drop((leases, shared));
    rig.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_ram_has_no_room_for_the_rest_it_is_refused() {
    let library = Library::new();
    large(&library);
    let rig = Rig::start(library.config_with_gpu(Bytes::kib(300), Bytes::kib(512))).await;
    let session = rig.hotset.session("test").await.unwrap();
    let refused = outcome(session.load(split()))
        .await
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("ram has a budget of 300.0 KiB"),
        "{refused}"
    );
    rig.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_split_load_that_is_cancelled_gives_both_halves_back() {
    let library = Library::new();
    large(&library);
    let rig = Rig::start(library.config_with_gpu(Bytes::mib(4), Bytes::kib(512))).await;
    let session = rig.hotset.session("test").await.unwrap();
    rig.reader.close();
    let loading = session.load(split());
    crate::library::until("memory in both tiers", async || {
        let views = rig.hotset.ledger().views();
        views.iter().all(|view| !view.committed.is_zero())
    })
    .await;
    loading.cancel();
    assert!(matches!(outcome(loading).await, Err(LoadError::Cancelled)));
    rig.reader.open_wide();
    rig.assert_empty().await;
}
