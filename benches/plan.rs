//! What it costs to find places for many sets on many GPUs.

use criterion::{Criterion, criterion_group, criterion_main};
use hotset::core::plan::allocate::{Mix, Offer, Part, Resident, Wanted, allocate, best_fit};
use hotset::{Bytes, GpuIndex};
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

criterion_group!(benches, places);
criterion_main!(benches);
