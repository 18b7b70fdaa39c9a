//! Who may be granted memory before those that wait ahead of it: only who delays none of them by anything.
//!
//! A set that waits gets its memory as soon as what others hold leaves room for it. Nobody knows in which order they let go,
//! so passing it is harmless only where, whatever is left of what they hold, there is room for it with the one who passes
//! just where there is room without. What passes is taken to be held for ever.

use std::collections::{BTreeSet, HashSet};

use crate::ids::ContentId;
use crate::memory::Want;
use crate::units::Bytes;

/// Sums that are looked at for one waiting set. More are taken for one that would delay it.
const MOST_SUMS: usize = 2048;

/// What others hold in a tier.
#[derive(Debug, Clone, Default)]
pub struct Held {
    /// Components, each of which may be let go by itself.
    pub components: Vec<(ContentId, Bytes)>,
    /// What is held beside them, and may become less by any amount.
    pub loose: Bytes,
}

/// Whether a set may be granted what it wants before those ahead of it, who wait in this order.
#[must_use]
pub fn passes(budget: Bytes, held: &Held, ahead: &[&[Want]], wants: &[Want]) -> bool {
    let wanted = contents(wants);
    (0..ahead.len()).all(|i| {
        let (before, Some(mine)) = (ahead.iter().take(i), ahead.get(i)) else {
            return false;
        };
        let own = contents(mine);
        let needed: Bytes = mine.iter().map(Want::bytes).sum();
        let taken: Bytes = wants
            .iter()
            .filter(|want| want.content().is_none_or(|c| !own.contains(&c)))
            .map(Want::bytes)
            .sum();
        if taken.is_zero() {
            return true;
        }
        // It does not fit at all: what will be when the budget has grown, nobody can tell.
        let Some(room) = budget.get().checked_sub(needed.get()) else {
            return false;
        };
        let Some(room_beside) = room.checked_sub(taken.get()) else {
            return false;
        };
        // Those ahead of it will hold what they wait for, when their turn has come.
        let theirs = before.flat_map(|wants| wants.iter());
        let theirs = theirs.map(|want| (want.content(), want.bytes()));
        let holders = held.components.iter().map(|(c, bytes)| (Some(*c), *bytes));
        let mut seen = HashSet::new();
        let others = holders.chain(theirs).filter(|(content, _)| {
            content.is_none_or(|c| !own.contains(&c) && !wanted.contains(&c) && seen.insert(c))
        });
        let others: Vec<u64> = others.map(|(_, bytes)| bytes.get()).collect();
        !some_add_up(&others, held.loose.get(), room_beside, room)
    })
}

fn contents(wants: &[Want]) -> HashSet<ContentId> {
    wants.iter().filter_map(Want::content).collect()
}

/// Whether some of these, with any part of what is loose, add up to more than `low` and no more than `high`.
fn some_add_up(parts: &[u64], loose: u64, low: u64, high: u64) -> bool {
    let mut sums = BTreeSet::from([0_u64]);
    let within = |sum: u64| sum <= high && sum.saturating_add(loose) > low;
    if within(0) {
        return true;
    }
    for part in parts {
        let more: Vec<u64> = sums
            .iter()
            .map(|sum| sum.saturating_add(*part))
            .filter(|sum| *sum <= high)
            .collect();
        if more.iter().any(|sum| within(*sum)) {
            return true;
        }
        sums.extend(more);
        if sums.len() > MOST_SUMS {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::catalog::Kind;
    use crate::plan::test_utils::component;

    fn want((number, kib): (u8, u64)) -> Want {
        let component = component("m", "weights", Kind::Unknown, number, kib);
        Want::Component(component, Bytes::kib(kib))
    }

    fn held(parts: &[(u8, u64)], loose: u64) -> Held {
        let parts = parts.iter();
        Held {
            components: parts
                .map(|(number, kib)| (ContentId::File([*number; 32]), Bytes::kib(*kib)))
                .collect(),
            loose: Bytes::kib(loose),
        }
    }

    fn may(budget: u64, held: &Held, ahead: &[(u8, u64)], small: (u8, u64)) -> bool {
        let ahead: Vec<Want> = ahead.iter().copied().map(want).collect();
        passes(Bytes::kib(budget), held, &[&ahead], &[want(small)])
    }

    #[test]
    fn a_small_set_passes_where_the_large_one_waits_for_somebody_else_in_any_case() {
        // 5 wait for 6 to go; 4 have room beside either.
        assert!(may(10, &held(&[(1, 6)], 0), &[(2, 5)], (3, 4)));
        // Not where the two together are too large,
        assert!(!may(10, &held(&[(1, 6)], 0), &[(2, 7)], (3, 4)));
        // nor where half of what is held will be enough for the large one alone.
        assert!(!may(10, &held(&[(1, 3), (4, 3)], 0), &[(2, 5)], (3, 4)));
        assert!(!may(10, &held(&[], 6), &[(2, 5)], (3, 4)));
        // What the large one wants too, takes nothing from it.
        assert!(may(10, &held(&[(1, 3), (4, 3)], 0), &[(2, 5)], (2, 5)));
        // What is held anyhow, but not for ever, counts as if it were.
        assert!(!may(10, &held(&[(1, 6)], 0), &[(2, 5)], (1, 6)));
    }

    #[test]
    fn who_waits_second_is_not_delayed_either() {
        let (first, second) = ([want((2, 5))], [want((5, 5))]);
        let ahead: [&[Want]; 2] = [&first, &second];
        let may = |kib| {
            passes(
                Bytes::kib(10),
                &held(&[(1, 6)], 0),
                &ahead,
                &[want((3, kib))],
            )
        };
        // Both fit at once when the six have gone, but not beside one more.
        assert!(!may(1));
        assert!(passes(
            Bytes::kib(11),
            &held(&[(1, 7)], 0),
            &ahead,
            &[want((3, 1))]
        ));
    }

    proptest! {
        #[test]
        fn it_is_exactly_what_trying_all_ways_to_let_go_says(
            budget in 1_u64..40,
            parts in proptest::collection::vec(1_u64..12, 0..7),
            needed in 1_u64..30,
            small in 1_u64..20,
        ) {
            let held_parts: Vec<(u8, u64)> = (10..).zip(parts.iter().copied()).collect();
            let found = may(budget, &held(&held_parts, 0), &[(1, needed)], (2, small));
            let ways = 0..1_u32 << parts.len();
            let delayed = ways.into_iter().any(|way| {
                let left = |(i, part): (usize, &u64)| if way & (1 << i) == 0 { 0 } else { *part };
                let left: u64 = parts.iter().enumerate().map(left).sum();
                left + needed <= budget && left + needed + small > budget
            });
            prop_assert_eq!(found, !delayed && needed <= budget && needed + small <= budget);
        }
    }
}
