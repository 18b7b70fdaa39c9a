//! What a decision of each policy takes, with a thousand components resident: one eviction, and one request learned from.
#![allow(missing_docs)]

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use hotset::Bytes;
use hotset::core::catalog::Kind;
use hotset::core::config::EvictionPolicyName;
use hotset::core::policy::{Candidate, EvictionPolicy, by_name, select};
use hotset::core::predict::{Observed, Seen};
use hotset::core::{ContentId, SessionId};

const RESIDENT: u64 = 1_000;
const WARM_UP: u64 = 20_000;

fn content(n: u64) -> ContentId {
    let mut digest = [0; 32];
    digest[..8].copy_from_slice(&n.to_le_bytes());
    ContentId::File(digest)
}

/// Few often, many seldom.
fn asked(number: u64) -> u64 {
    let drawn = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    let share = (drawn % 10_000) as f64 / 10_000.0;
    (RESIDENT as f64 * 1.2).powf(share) as u64
}

fn seen(n: u64) -> Seen {
    Seen {
        content: content(n),
        kind: if n.is_multiple_of(3) {
            Kind::Checkpoint
        } else {
            Kind::Lora
        },
        bytes: Bytes::mib(100 + n),
    }
}

/// A policy that has seen a day's requests, and what is resident then.
fn warm(name: EvictionPolicyName) -> (Box<dyn EvictionPolicy>, Vec<Candidate>) {
    let mut policy = by_name(name);
    policy.on_capacity(Bytes::gib(600));
    let mut last_used = vec![0; RESIDENT as usize];
    for number in 0..WARM_UP {
        request(policy.as_mut(), number);
        if let Some(last) = last_used.get_mut(asked(number) as usize) {
            *last = number;
        }
    }
    let candidates = (0..).zip(last_used).map(|(n, last)| Candidate {
        content: content(n),
        bytes: Bytes::mib(100 + n),
        admitted: Duration::ZERO,
        last_used: Duration::from_secs(last * 4),
        uses: 1,
        restore_s: 0.5,
        whole_s: 0.5,
        prefetched: false,
        above: false,
    });
    (policy, candidates.collect())
}

fn request(policy: &mut dyn EvictionPolicy, number: u64) {
    let now = Duration::from_secs(number * 4);
    let components = [seen(asked(number))];
    let session = SessionId(number % 50);
    policy.observe(
        now,
        &Observed {
            session,
            components: &components,
        },
    );
    policy.on_request(now, &components[0].content, components[0].bytes, true);
}

/// Of every other one another tier has a copy: a tier above, or one below from which it is soon restored.
fn elsewhere(candidates: &[Candidate], above: bool) -> Vec<Candidate> {
    let mut candidates = candidates.to_vec();
    for candidate in candidates.iter_mut().step_by(2) {
        candidate.above = above;
        candidate.restore_s = if above { 0.5 } else { 0.05 };
    }
    candidates
}

fn decisions(criterion: &mut Criterion) {
    for name in EvictionPolicyName::ALL {
        let (mut policy, candidates) = warm(name);
        let label = policy.name();
        let mut number = WARM_UP;
        let mut evict = |what: &str, candidates: &[Candidate]| {
            criterion.bench_function(&format!("evict one of 1000{what}/{label}"), |bench| {
                bench.iter_custom(|times| {
                    let mut took = Duration::ZERO;
                    for _ in 0..times {
                        // As in service, requests come between evictions; they are not part of the decision.
                        number += 1;
                        request(policy.as_mut(), number);
                        let now = Duration::from_secs(number * 4);
                        let start = std::time::Instant::now();
                        black_box(select(policy.as_mut(), now, candidates, Bytes(1)));
                        took += start.elapsed();
                    }
                    took
                });
            });
        };
        evict("", &candidates);
        if label == "hotset" {
            evict(", half in RAM too", &elsewhere(&candidates, false));
            evict(", half on a GPU too", &elsewhere(&candidates, true));
        }
        criterion.bench_function(&format!("learn one request/{label}"), |bench| {
            bench.iter(|| {
                number += 1;
                request(policy.as_mut(), number);
            });
        });
    }
}

criterion_group!(benches, decisions);
criterion_main!(benches);
