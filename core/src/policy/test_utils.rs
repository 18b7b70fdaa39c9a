//! Candidates for tests, and what holds for every policy.

use std::collections::HashSet;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::{Candidate, EvictionPolicy, Victim, select};
use crate::ids::ContentId;
use crate::units::Bytes;

/// A candidate that was last used at this second.
pub(crate) fn candidate(number: u8, bytes: u64, last_used_s: u64) -> Candidate {
    Candidate {
        content: ContentId::File([number; 32]),
        bytes: Bytes(bytes),
        admitted: Duration::ZERO,
        last_used: Duration::from_secs(last_used_s),
        uses: 1,
        restore_s: 1.0,
        whole_s: 1.0,
        prefetched: false,
        above: false,
    }
}

pub(crate) fn content(number: u8) -> ContentId {
    ContentId::File([number; 32])
}

/// The numbers of ranked candidates, as [`candidate`] gave them.
pub(crate) fn order_of(ranked: &[Victim]) -> Vec<u8> {
    (0..=u8::MAX)
        .flat_map(|n| {
            ranked
                .iter()
                .position(|v| v.content == content(n))
                .map(|at| (at, n))
        })
        .collect::<std::collections::BTreeMap<_, _>>()
        .into_values()
        .collect()
}

/// A stream of requests for few components often and for many seldom.
pub(crate) fn zipf_like(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / f64::from(1_u32 << 31)
    };
    (0..length)
        .map(|_| (60.0_f64.powf(next()) - 1.0) as u8)
        .collect()
}

/// The misses of a policy on components of one size, in a cache for `capacity` of them.
pub(crate) fn misses_of(policy: &mut dyn EvictionPolicy, stream: &[u8], capacity: usize) -> usize {
    let mut resident: Vec<Candidate> = Vec::new();
    let mut misses = 0;
    for (at, n) in (0..).zip(stream) {
        let now = Duration::from_secs(at);
        let found = resident.iter_mut().find(|c| c.content == content(*n));
        let hit = found.is_some();
        if let Some(candidate) = found {
            candidate.last_used = now;
            candidate.uses += 1;
        } else {
            misses += 1;
            if resident.len() == capacity {
                for victim in select(policy, now, &resident, Bytes(1)) {
                    resident.retain(|c| c.content != victim.content);
                    policy.on_evict(now, &victim.content);
                }
            }
            resident.push(candidate(*n, 1, at));
        }
        policy.on_request(now, &content(*n), Bytes(1), hit);
    }
    misses
}

/// Runs the properties that every policy must have.
pub(crate) fn check_policy(make: impl Fn() -> Box<dyn EvictionPolicy>) {
    let sets = proptest::collection::vec((1_u64..1000, 0_u64..1000), 0..40);
    TestRunner::default()
        .run(&(sets, 0_u64..30_000), |(sizes, needed)| {
            let candidates: Vec<_> = (0..)
                .zip(sizes)
                .map(|(i, (bytes, used))| candidate(i, bytes, used))
                .collect();
            let now = Duration::from_secs(2000);
            let ranked = make().rank(now, &candidates);
            let distinct: HashSet<_> = ranked.iter().map(|v| v.content).collect();
            prop_assert_eq!(distinct.len(), candidates.len(), "each candidate once");
            prop_assert!(ranked.iter().all(|v| v.score.is_finite()));
            prop_assert_eq!(&ranked, &make().rank(now, &candidates), "repeatable");

            let victims = select(make().as_mut(), now, &candidates, Bytes(needed));
            let bytes_of = |id| {
                candidates
                    .iter()
                    .find(|c| c.content == id)
                    .map(|c| c.bytes.get())
            };
            let freed: u64 = victims.iter().filter_map(|v| bytes_of(v.content)).sum();
            let total: u64 = candidates.iter().map(|c| c.bytes.get()).sum();
            if needed <= total {
                prop_assert!(freed >= needed);
                let last = victims
                    .last()
                    .and_then(|v| bytes_of(v.content))
                    .unwrap_or(0);
                prop_assert!(needed == 0 || freed - last < needed, "no more than needed");
            } else {
                prop_assert!(victims.is_empty());
            }
            Ok(())
        })
        .unwrap();
}
