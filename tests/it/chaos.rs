//! The whole system under faults, in virtual time.

use std::time::Duration;

use hotset::chaos::{Invariant, Outcome, Profile, Scenario, run, shrink};

fn seed(scenario: &Scenario, seed: u64) -> Outcome {
    run(scenario, seed).unwrap()
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
            time: Duration::from_secs(20),
            ..Scenario::of(profile)
        };
        for n in 0..1 {
            let (a, b) = (seed(&scenario, n), seed(&scenario, n));
            let differs = a.log.iter().zip(&b.log).find(|(a, b)| a != b);
            assert_eq!(a.trace, b.trace, "{profile:?}, seed {n}: {differs:?}");
            assert!(a.events > 50, "{}", a.events);
        }
        assert_ne!(seed(&scenario, 0).trace, seed(&scenario, 1).trace);
    }
}

#[test]
fn nothing_breaks_under_all_faults_and_every_load() {
    for profile in Profile::ALL {
        let scenario = Scenario::of(profile);
        let mut granted = 0;
        for n in 0..4 {
            let outcome = seed(&scenario, n);
            assert_clean(&scenario, &outcome);
            granted += outcome.granted;
        }
        assert!(granted > 20, "{profile:?} granted only {granted}");
    }
}

/// What a seed once found stays mended: blocks of two plans in one load (28), and two ends at the same instant (66).
#[test]
fn seeds_that_found_something_stay_clean() {
    for (profile, n) in [(Profile::Language, 28), (Profile::Thrash, 66)] {
        let scenario = Scenario::of(profile);
        assert_clean(&scenario, &seed(&scenario, n));
    }
}

/// A double that breaks just one thing is noticed by the invariant that is there for it.
#[test]
fn every_invariant_notices_what_it_is_there_for() {
    for invariant in Invariant::ALL {
        let scenario = Scenario {
            broken: Some(invariant),
            ..Scenario::of(Profile::Thrash)
        };
        let found = (0..200).any(|n| {
            let outcome = seed(&scenario, n);
            outcome.violations.iter().any(|v| v.invariant == invariant)
        });
        assert!(found, "{invariant} was broken, and 200 seeds passed");
    }
}

#[test]
fn a_failing_list_of_faults_is_shrunk() {
    let scenario = Scenario {
        broken: Some(Invariant::StatusIsLedger),
        time: Duration::from_secs(10),
        ..Scenario::of(Profile::Hot)
    };
    let found = seed(&scenario, 1);
    assert!(!found.faults.is_empty());
    // It breaks by itself, so that no fault is needed for it.
    let shrunk = shrink(&scenario, found).unwrap();
    assert!(shrunk.faults.is_empty(), "{:?}", shrunk.faults);
    assert!(!shrunk.violations.is_empty());
}
