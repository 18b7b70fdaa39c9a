//! The whole system under faults, in virtual time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use hotset::chaos::{Fault, Invariant, Outcome, Profile, Scenario, run, shrink};

fn seed(scenario: &Scenario, seed: u64) -> Outcome {
    run(scenario, seed).unwrap()
}

fn short(profile: Profile) -> Scenario {
    Scenario {
        time: Duration::from_secs(20),
        ..Scenario::of(profile)
    }
}

fn assert_clean(scenario: &Scenario, outcome: &Outcome) {
    assert!(
        outcome.violations.is_empty(),
        "{:?}, seed {}: {:#?}\n{}",
        scenario.workload,
        outcome.seed,
        outcome.violations,
        outcome.log[outcome.log.len().saturating_sub(40)..].join("\n")
    );
}

#[test]
fn the_same_seed_gives_the_same_events_bit_for_bit() {
    for profile in Profile::ALL {
        let scenario = Scenario {
            log: usize::MAX,
            ..short(profile)
        };
        for n in [1, 2] {
            let (a, b) = (seed(&scenario, n), seed(&scenario, n));
            let differs = a.log.iter().zip(&b.log).find(|(a, b)| a != b);
            assert_eq!(a.trace, b.trace, "{profile:?}, seed {n}: {differs:?}");
            assert_eq!(a.effects, b.effects, "{profile:?}, seed {n}");
            assert!(a.events > 50, "{}", a.events);
        }
        assert_ne!(seed(&scenario, 1).trace, seed(&scenario, 3).trace);
    }
}

/// A seed that drains in the middle.
const DRAINS: u64 = 10;

/// All loads under all faults; and each kind of fault was injected, and showed.
#[test]
fn nothing_breaks_under_all_faults_and_every_load_and_every_fault_shows() {
    let (mut injected, mut showed) = (BTreeSet::new(), BTreeMap::<_, u64>::new());
    let mut prefetches = 0;
    for profile in Profile::ALL {
        let scenario = Scenario {
            time: Duration::from_secs(30),
            ..Scenario::of(profile)
        };
        let (mut granted, mut requests) = (0, 0);
        for n in (1..6).chain([DRAINS]) {
            let outcome = seed(&scenario, n);
            assert_clean(&scenario, &outcome);
            granted += outcome.granted;
            requests += outcome.requests;
            prefetches += outcome.prefetches;
            injected.extend(outcome.faults.iter().map(|planned| planned.fault.kind()));
            for (kind, count) in outcome.effects {
                *showed.entry(kind).or_default() += count;
            }
        }
        assert!(
            granted * 5 > requests,
            "{profile:?} granted only {granted} of {requests}"
        );
    }
    let all: BTreeSet<_> = Fault::KINDS.into_iter().collect();
    let never: Vec<_> = all.difference(&injected).collect();
    assert!(never.is_empty(), "never injected: {never:?}");
    let silent: Vec<_> = all
        .iter()
        .filter(|kind| !showed.contains_key(*kind))
        .collect();
    assert!(silent.is_empty(), "injected, and never showed: {silent:?}");
    assert!(prefetches > 0, "nothing was loaded on a guess");
}

/// What a seed once found stays mended: blocks of two plans in one load (28), and two ends at the same instant (66).
#[test]
fn seeds_that_found_something_stay_clean() {
    for (profile, n) in [(Profile::Language, 28), (Profile::Thrash, 66)] {
        let scenario = Scenario::of(profile);
        assert_clean(&scenario, &seed(&scenario, n));
    }
    // A database that is corrupt inside; a GPU that breaks and is back while nobody looks.
    for (profile, n, rate) in [
        (Profile::Thrash, 105, 12),
        (Profile::Diffusion, 24, 12),
        (Profile::Diffusion, 32, 12),
    ] {
        let scenario = Scenario {
            time: Duration::from_secs(30),
            rate,
            ..Scenario::of(profile)
        };
        assert_clean(&scenario, &seed(&scenario, n));
    }
}

/// A build in which just one thing is broken is noticed by the invariant that is there for it.
#[test]
fn every_invariant_notices_what_it_is_there_for() {
    for invariant in Invariant::ALL {
        let scenario = Scenario {
            broken: Some(invariant),
            ..short(Profile::Thrash)
        };
        let found = (1..200).find(|n| {
            let outcome = seed(&scenario, *n);
            outcome.violations.iter().any(|v| v.invariant == invariant)
        });
        assert!(
            found.is_some(),
            "{invariant} was broken, and 200 seeds passed"
        );
    }
}

#[test]
fn a_failing_list_of_faults_is_shrunk() {
    let scenario = Scenario {
        broken: Some(Invariant::StatusIsLedger),
        time: Duration::from_secs(5),
        ..Scenario::of(Profile::Hot)
    };
    let found = seed(&scenario, 1);
    assert!(!found.faults.is_empty());
    // It breaks by itself, so that no fault is needed for it.
    let shrunk = shrink(&scenario, found).unwrap();
    assert!(shrunk.faults.is_empty(), "{:?}", shrunk.faults);
    assert!(!shrunk.violations.is_empty());
}
