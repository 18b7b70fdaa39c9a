//! Candidates for tests, and what holds for every policy.

use std::collections::HashSet;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::{Candidate, EvictionPolicy, select};
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
        prefetched: false,
    }
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
