//! What a decision of each policy takes, with a thousand components resident: one eviction, and one request learned from.
#![allow(missing_docs)]

use std::collections::{BTreeMap, VecDeque};
use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use hotset::Bytes;
use hotset::core::catalog::Kind;
use hotset::core::config::EvictionPolicyName;
use hotset::core::policy::hotset::{HotsetRetention, Leader};
use hotset::core::policy::{Candidate, EvictionPolicy, by_name, select};
use hotset::core::predict::{Observed, Seen};
use hotset::core::{ContentId, SessionId};

const RESIDENT: u64 = 1_000;
const WARM_UP: u64 = 40_000;
/// Requests after which it begins anew where one leader is looked at.
const AGAIN: u64 = 2_000;
/// Components that are not resident at a time, of those listed at first.
const ABSENT: usize = 20;

fn content(n: u64) -> ContentId {
    let mut digest = [0; 32];
    digest[..8].copy_from_slice(&n.to_le_bytes());
    ContentId::File(digest)
}

/// A number that looks random, below one.
fn drawn(number: u64) -> f64 {
    let mixed = (number ^ number >> 7).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((mixed ^ mixed >> 32) >> 11) as f64 / (1_u64 << 53) as f64
}

/// What is asked for, few often and many seldom.
#[derive(Clone, Copy)]
struct Stream {
    /// How many there are.
    components: u64,
    capacity: Bytes,
}

impl Stream {
    const PLAIN: Self = Self {
        components: RESIDENT * 12 / 10,
        capacity: Bytes::gib(600),
    };

    fn seen(n: u64) -> Seen {
        Seen {
            content: content(n),
            kind: if n.is_multiple_of(3) {
                Kind::Checkpoint
            } else {
                Kind::Lora
            },
            bytes: Bytes::mib(100 + n % 1_000),
        }
    }

    fn request(self, policy: &mut dyn EvictionPolicy, number: u64) -> u64 {
        let n = (self.components as f64).powf(drawn(number)) as u64;
        let now = Duration::from_secs(number * 4);
        let components = [Self::seen(n)];
        let session = SessionId(number % 50);
        policy.on_cost(&components[0].content, 0.5);
        policy.observe(
            now,
            &Observed {
                session,
                components: &components,
            },
        );
        policy.on_request(now, &components[0].content, components[0].bytes, true);
        n
    }

    /// Has a policy see many requests, and gives what is resident then.
    fn warm(self, policy: &mut dyn EvictionPolicy) -> Vec<Candidate> {
        policy.on_capacity(self.capacity);
        let mut last_used = BTreeMap::new();
        for number in 0..WARM_UP {
            last_used.insert(self.request(policy, number), number);
        }
        let mut latest: Vec<_> = last_used.into_iter().map(|(n, last)| (last, n)).collect();
        latest.sort_unstable();
        let first = latest.len().saturating_sub(RESIDENT as usize);
        let candidate = |(last, n): (u64, u64)| Candidate {
            content: content(n),
            bytes: Self::seen(n).bytes,
            admitted: Duration::ZERO,
            last_used: Duration::from_secs(last * 4),
            uses: 1,
            restore_s: 0.5,
            whole_s: 0.5,
            prefetched: false,
            above: false,
        };
        let mut candidates: Vec<_> = latest.drain(first..).map(candidate).collect();
        // In a lasting order.
        candidates.sort_by_key(|candidate| candidate.content);
        candidates
    }
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

/// A tier under a policy that has seen requests.
#[derive(Clone)]
struct Tier<P> {
    policy: P,
    candidates: Vec<Candidate>,
    /// What went; it comes again once so many others have gone.
    gone: VecDeque<Candidate>,
    /// The last request.
    number: u64,
}

impl<P> Tier<P> {
    fn warm(policy: P, candidates: &[Candidate]) -> Self {
        Self {
            policy,
            candidates: candidates.to_vec(),
            gone: VecDeque::new(),
            number: WARM_UP,
        }
    }

    /// A request, and an eviction; gives what choosing took. As in service, requests come between evictions; they are not part of the decision.
    fn evict(&mut self, stream: Stream, policy: fn(&mut P) -> &mut dyn EvictionPolicy) -> Duration {
        self.number += 1;
        let policy = policy(&mut self.policy);
        stream.request(policy, self.number);
        let now = Duration::from_secs(self.number * 4);
        // The tier lists them for each eviction.
        let listed = self.candidates.clone();
        let start = std::time::Instant::now();
        let victims = black_box(select(policy, now, &listed, Bytes(1)));
        let took = start.elapsed();
        for victim in victims {
            policy.on_evict(now, &victim.content);
            let held = &mut self.candidates;
            let place = held.iter().position(|c| c.content == victim.content);
            self.gone.extend(place.map(|place| held.remove(place)));
        }
        if self.gone.len() > ABSENT
            && let Some(mut back) = self.gone.pop_front()
        {
            (back.last_used, back.uses) = (now, 1);
            // As the ledger lists them: by admission.
            self.candidates.push(back);
        }
        took
    }
}

fn decisions(criterion: &mut Criterion) {
    for name in EvictionPolicyName::ALL {
        let mut policy = by_name(name);
        let name = policy.name();
        let candidates = Stream::PLAIN.warm(policy.as_mut());
        let mut tier = Tier::warm(policy, &candidates);
        criterion.bench_function(&format!("evict one of {RESIDENT}/{name}"), |bench| {
            bench.iter_custom(|times| {
                let took = |_| tier.evict(Stream::PLAIN, |policy| policy.as_mut());
                (0..times).map(took).sum()
            });
        });
        criterion.bench_function(&format!("learn one request/{name}"), |bench| {
            bench.iter(|| {
                tier.number += 1;
                Stream::PLAIN.request(tier.policy.as_mut(), tier.number);
            });
        });
    }
}

/// What hotset's own takes depends on whom it follows, and that on the stream.
fn leaders(criterion: &mut Criterion) {
    // As long as all of it has room there is nothing to elect anybody by.
    let roomy = Stream {
        capacity: Bytes::gib(10_000),
        ..Stream::PLAIN
    };
    let many = Stream {
        components: 4 * RESIDENT,
        capacity: Bytes::gib(300),
    };
    for (leader, stream) in [
        (Leader::Lru, roomy),
        (Leader::Gdsf, Stream::PLAIN),
        (Leader::Predictor, many),
    ] {
        let mut policy = HotsetRetention::new(1);
        let candidates = stream.warm(&mut policy);
        let (below, above) = (elsewhere(&candidates, false), elsewhere(&candidates, true));
        assert_eq!(
            policy.leader(),
            leader,
            "the stream does not suit it any more"
        );
        for (which, candidates) in [
            ("", &candidates),
            (", half in RAM too", &below),
            (", half on a GPU too", &above),
        ] {
            let warm = Tier::warm(policy.clone(), candidates);
            let mut tier = warm.clone();
            let label = format!("evict one of {RESIDENT}, {leader:?} leads{which}");
            criterion.bench_function(&label, |bench| {
                bench.iter_custom(|times| {
                    let evict = |_| {
                        // Of much more of the same stream another may come to lead.
                        if tier.number > WARM_UP + AGAIN {
                            tier = warm.clone();
                        }
                        let took = tier.evict(stream, |policy| policy);
                        assert_eq!(tier.policy.leader(), leader, "another leads by now");
                        took
                    };
                    (0..times).map(evict).sum()
                });
            });
        }
    }
}

criterion_group!(benches, decisions, leaders);
criterion_main!(benches);
