//! What it costs to find places for many sets on many GPUs.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use hotset::core::catalog::{
    Catalogue, Component, Facts, FileIdentity, Format, Kind, Model, Presence, SourceFile,
};
use hotset::core::memory::{ResidencyView, TierView};
use hotset::core::plan::allocate::{Mix, Offer, Part, Resident, Wanted, allocate, best_fit};
use hotset::core::plan::rates::Rates;
use hotset::core::plan::{MixSet, Planner, resolve};
use hotset::core::policy::lru::Lru;
use hotset::{Bytes, ComponentId, ContentId, GpuIndex, Target, Tier};
use rand::{Rng, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;

/// 1,000 components of 0.1 to 12 GB, 64 GPUs of 80 GB that hold some of them, 100 sets of 5 to 15.
fn large(seed: u64) -> Mix {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let parts: Vec<Part> = (0..1000)
        .map(|_| Part {
            bytes: Bytes::mib(random.gen_range(100..12_000)),
            read_s: if random.gen_bool(0.5) {
                0.0
            } else {
                random.gen_range(0.1..4.0)
            },
        })
        .collect();
    let offers = (0..64)
        .map(|gpu| {
            let mut free = Bytes::gib(80);
            let mut residents: Vec<Resident> = Vec::new();
            while residents.len() < 30 {
                let part = random.gen_range(0..parts.len());
                let bytes = parts[part].bytes;
                if bytes > free {
                    break;
                }
                if residents.iter().all(|one| one.part != part) {
                    free = free.saturating_sub(bytes);
                    let loss_s = random.gen_bool(0.7).then(|| random.gen_range(0.0..3.0));
                    residents.push(Resident { part, loss_s });
                }
            }
            Offer {
                gpu: GpuIndex(gpu),
                free,
                bytes_per_s: 25e9,
                residents,
                near: Vec::new(),
            }
        })
        .collect();
    let sets = (0..100)
        .map(|_| {
            let count = random.gen_range(5..=15);
            let mut chosen: Vec<usize> = (0..count)
                .map(|_| random.gen_range(0..parts.len()))
                .collect();
            chosen.sort_unstable();
            chosen.dedup();
            Wanted {
                parts: chosen,
                among: Vec::new(),
            }
        })
        .collect();
    Mix {
        parts,
        offers,
        sets,
    }
}

/// A component of 0.1 to 12 GB.
fn component(model: &str, number: usize, random: &mut Xoshiro256PlusPlus) -> Arc<Component> {
    let bytes = Bytes::mib(random.gen_range(100..12_000));
    let kinds = [Kind::TextEncoder, Kind::Transformer, Kind::Vae];
    let mut content = [0; 32];
    content[..8].copy_from_slice(&number.to_le_bytes());
    Arc::new(Component {
        id: ComponentId {
            model: model.into(),
            component: number.to_string().into(),
        },
        kind: kinds[number % kinds.len()],
        architecture: None,
        dtype: None,
        bytes,
        tensors: 500,
        content_id: ContentId::File(content),
        files: vec![SourceFile {
            path: Path::new("/models").join(number.to_string()).into(),
            identity: FileIdentity {
                device: 1,
                inode: number as u64,
                size: bytes,
                mtime_ns: 0,
            },
        }],
        selection: None,
        part: None,
    })
}

/// A hundred models of ten components.
fn catalogue(random: &mut Xoshiro256PlusPlus) -> Catalogue {
    let models = (0..100).map(|i| {
        let name = format!("model-{i}");
        let parts = 10 * i..10 * (i + 1);
        let components: Vec<_> = parts.map(|n| component(&name, n, random)).collect();
        Arc::new(Model {
            name: name.as_str().into(),
            path: Path::new("/models").join(&name).into(),
            format: Format::Diffusers,
            kind: Kind::Pipeline,
            architecture: None,
            bytes: components.iter().map(|c| c.bytes).sum(),
            components,
            base: None,
            error: None,
            facts: Facts::default(),
            inputs: Vec::new(),
            presence: Presence::Present,
        })
    });
    Catalogue::new(1, models.collect())
}

/// What a tier of this budget has: components at random, two of ten of them leased.
fn filled(
    tier: Tier,
    budget: Bytes,
    catalogue: &Catalogue,
    random: &mut Xoshiro256PlusPlus,
) -> TierView {
    let all: Vec<&Arc<Component>> = catalogue.models().flat_map(|m| &m.components).collect();
    let mut residencies: Vec<ResidencyView> = Vec::new();
    let mut committed = Bytes::ZERO;
    loop {
        let component = all[random.gen_range(0..all.len())];
        if committed.saturating_add(component.bytes) > budget {
            break;
        }
        if residencies.iter().all(|r| r.component.id != component.id) {
            committed += component.bytes;
            let leases = u32::from(random.gen_bool(0.2));
            residencies.push(ResidencyView {
                component: component.clone(),
                bytes: component.bytes,
                loading: false,
                pins: leases,
                leases,
                uses: 3,
                admitted: Duration::ZERO,
                last_used: Duration::from_secs(random.gen_range(0..1000)),
                load_time: None,
                prefetched: false,
            });
        }
    }
    TierView {
        tier,
        budget,
        committed,
        evicting: Bytes::ZERO,
        out_of_service: None,
        residencies,
    }
}

/// All that `hotset plan .. --gpus all` does between the names and the answer.
fn whole_plan(criterion: &mut Criterion) {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(2);
    let catalogue = catalogue(&mut random);
    let ram = filled(Tier::Ram, Bytes::gib(1024), &catalogue, &mut random);
    let gpus = (0..64).map(|gpu| {
        let tier = Tier::Vram(GpuIndex(gpu));
        filled(tier, Bytes::gib(141), &catalogue, &mut random)
    });
    let tiers: Vec<TierView> = gpus.chain([ram]).collect();
    let planner = Planner {
        tiers: &tiers,
        granules: &BTreeMap::new(),
        links: &BTreeMap::new(),
        rates: &Rates::default(),
        ring: Bytes::gib(1),
        now: Duration::from_secs(1000),
    };
    let plan = || {
        let names = catalogue.models().map(|model| model.name.to_string());
        let sets = names.filter_map(|name| {
            Some(MixSet {
                graph: resolve(&catalogue, &[], std::slice::from_ref(&name), true).ok()?,
                name,
                target: Target::AnyGpu,
            })
        });
        let sets: Vec<MixSet> = sets.collect();
        assert_eq!(sets.len(), 100);
        planner.plan_mix(&sets, || Box::new(Lru))
    };
    let planned = plan();
    let left_out = planned.sets.iter().filter(|set| set.plan.is_none());
    println!("plan_mix: {} left out", left_out.count());
    criterion.bench_function("100 sets from names to plans, 64 GPUs", |bencher| {
        bencher.iter(plan);
    });
}

fn places(criterion: &mut Criterion) {
    let mix = large(1);
    let (found, simple) = (allocate(&mix), best_fit(&mix));
    println!(
        "allocate: {:.1} s, {} left out; best fit: {:.1} s, {} left out",
        found.seconds,
        found.left_out(),
        simple.seconds,
        simple.left_out()
    );
    criterion.bench_function("100 sets on 64 GPUs, 1,000 components", |bencher| {
        bencher.iter(|| allocate(std::hint::black_box(&mix)));
    });
}

criterion_group!(benches, places, whole_plan);
criterion_main!(benches);
