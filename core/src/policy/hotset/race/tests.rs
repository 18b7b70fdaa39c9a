use super::*;
use crate::catalog::Kind;
use crate::config::PredictConfig;
use crate::ids::ContentId;
use crate::ids::SessionId;
use crate::predict::{Observed, Seen};

/// What both paid, where LRU paid so much and GDSF so much.
const fn paid(lru_s: f64, gdsf_s: f64) -> Paid {
    Paid { lru_s, gdsf_s }
}

/// Who is followed once LRU, GDSF and the predictor have paid so much, and LRU and GDSF so much in the smaller tier, so many times.
fn beside(race: &mut Race, whole: [f64; 3], smaller: Paid, times: usize) -> Leader {
    for _ in 0..times {
        race.note(paid(whole[0], whole[1]), whole[2], smaller);
        race.elect();
    }
    race.leader()
}

/// The same, where the smaller tier paid nothing.
fn after(race: &mut Race, whole: [f64; 3], times: usize) -> Leader {
    beside(race, whole, Paid::default(), times)
}

#[test]
fn it_follows_what_pays_least() {
    let race = &mut Race::default();
    assert_eq!(race.leader(), Leader::Lru, "nothing tells yet");
    assert_eq!(after(race, [0.0, 5.0, 5.0], 1), Leader::Lru);
    assert!(race.believes_predictor(), "one load tells nothing");
    assert_eq!(after(race, [0.0, 5.0, 5.0], 9), Leader::Lru);
    assert!(!race.believes_predictor());
    assert_eq!(after(race, [5.0, 5.0, 0.0], 2), Leader::Predictor);
    assert!(race.believes_predictor());
    // Against the predictor one load decides nothing, nor do a few that go either way.
    assert_eq!(after(race, [0.0, 5.0, 5.0], 1), Leader::Predictor);
    assert_eq!(after(race, [5.0, 5.0, 0.0], 1), Leader::Predictor);
    assert_eq!(after(race, [1.0, 2.0, 2.0], 60), Leader::Lru);
    assert!(!race.believes_predictor());
    assert_eq!(after(race, [2.0, 1.0, 2.0], 200), Leader::Gdsf);
    assert_eq!(after(race, [2.0, 2.0, 2.0], 4_000), Leader::Gdsf);
    assert_eq!(after(race, [2.0, 2.0, 1.0], 400), Leader::Predictor);
}

#[test]
fn in_a_large_tier_the_predictor_has_to_prove_more() {
    let (small, large) = (&mut Race::default(), &mut Race::default());
    large.whole.lru_age = 1_000.0;
    assert_eq!(after(small, [5.0, 5.0, 0.0], 1), Leader::Predictor);
    assert_eq!(after(large, [5.0, 5.0, 0.0], 2), Leader::Lru);
    assert_eq!(after(large, [5.0, 5.0, 0.0], 1), Leader::Predictor);
    // And loses the lead sooner.
    assert_eq!(after(small, [0.0, 5.0, 5.0], 3), Leader::Predictor);
    assert_eq!(after(large, [0.0, 5.0, 5.0], 3), Leader::Lru);
    // GDSF has not: it looks at no horizon.
    let (small, large) = (&mut Race::default(), &mut Race::default());
    large.whole.lru_age = 1_000.0;
    for race in [small, large] {
        assert_eq!(after(race, [5.0, 0.0, 5.0], 1), Leader::Lru);
        assert_eq!(after(race, [5.0, 0.0, 5.0], 1), Leader::Gdsf);
    }
}

#[test]
fn what_was_won_in_another_world_is_no_excuse() {
    let race = &mut Race::default();
    // The predictor wins for long, then loses against LRU: some dozens of loads tell.
    assert_eq!(after(race, [2.0, 2.0, 1.0], 1_000), Leader::Predictor);
    assert_eq!(after(race, [1.0, 2.0, 2.0], 3), Leader::Predictor);
    assert_eq!(after(race, [1.0, 2.0, 2.0], 77), Leader::Lru);
    assert_eq!(after(race, [2.0, 2.0, 1.0], 30), Leader::Predictor);
    // What a third won then is none either.
    assert_eq!(after(race, [2.0, 1.5, 1.0], 1_000), Leader::Predictor);
    assert_eq!(after(race, [1.0, 2.0, 2.0], 90), Leader::Lru);
    assert_eq!(after(race, [2.0, 2.0, 1.0], 30), Leader::Predictor);
    // Against GDSF the whole counts.
    assert_eq!(after(race, [2.0, 2.0, 1.0], 1_000), Leader::Predictor);
    assert_eq!(after(race, [2.0, 1.0, 2.0], 100), Leader::Predictor);
    assert_eq!(after(race, [2.0, 1.0, 2.0], 4_000), Leader::Gdsf);
}

#[test]
fn a_smaller_tier_tells_sooner_which_of_lru_and_gdsf_suits() {
    let race = &mut Race::default();
    let level = [0.0; 3];
    assert_eq!(beside(race, level, paid(2.0, 1.0), 40), Leader::Gdsf);
    assert_eq!(beside(race, level, paid(1.0, 2.0), 60), Leader::Lru);
    // Of the predictor it says nothing.
    assert_eq!(after(race, [2.0, 2.0, 1.0], 30), Leader::Predictor);
    assert_eq!(
        beside(race, level, paid(1.0, 9.0), 400),
        Leader::Predictor,
        "neither for LRU"
    );
    assert_eq!(beside(race, level, paid(9.0, 1.0), 400), Leader::Predictor);
}

#[test]
fn what_the_whole_tier_says_outlives_the_smaller() {
    // GDSF is right for the smaller tier, and LRU for the whole.
    for predicted_s in [1.1, 1.3] {
        let race = &mut Race::default();
        let whole = [1.0, 1.2, predicted_s];
        assert_ne!(beside(race, whole, paid(3.0, 2.0), 2), Leader::Lru);
        beside(race, whole, paid(3.0, 2.0), 4_000);
        for _ in 0..1_000 {
            assert_eq!(beside(race, whole, paid(3.0, 2.0), 1), Leader::Lru);
        }
    }
}

#[test]
fn what_both_tiers_won_in_another_world_is_no_excuse() {
    let race = &mut Race::default();
    let old = beside(race, [2.0, 1.0, 2.0], paid(2.0, 1.0), 1_000);
    assert_eq!(old, Leader::Gdsf);
    let new = beside(race, [1.0, 2.0, 2.0], paid(1.0, 2.0), 30);
    assert_eq!(new, Leader::Lru);
}

#[test]
fn beside_large_losses_of_another_time_small_ones_still_tell() {
    let race = &mut Race::default();
    let level = [0.0; 3];
    assert_eq!(beside(race, level, paid(20.0, 0.0), 4), Leader::Gdsf);
    assert_eq!(beside(race, level, paid(0.0, 20.0), 4), Leader::Lru);
    // The eight differ by 20 s each: 57 s are a deviation, were all of them remembered.
    assert_eq!(after(race, [1.0, 0.0, 1.0], 50), Leader::Gdsf);
}

#[test]
fn a_predictor_that_lost_nothing_is_believed_beside_gdsf() {
    let race = &mut Race::default();
    let resumed = |race: &Race| {
        let mut resumed = Race::default();
        resumed.resume(race.standing());
        assert_eq!(resumed.leader(), race.leader());
        resumed.believes_predictor()
    };
    assert_eq!(beside(race, [0.0; 3], paid(2.0, 1.0), 40), Leader::Gdsf);
    assert!(race.believes_predictor() && resumed(race));
    assert_eq!(beside(race, [0.0; 3], paid(1.0, 2.0), 60), Leader::Lru);
    assert!(race.believes_predictor() && resumed(race));
    assert_eq!(after(race, [3.0, 3.0, 1.0], 400), Leader::Predictor);
    assert_eq!(after(race, [1.0, 3.0, 3.0], 100), Leader::Lru);
    assert!(!race.believes_predictor(), "it had the lead, and lost it");
    assert!(!resumed(race));
}

#[test]
fn a_predictor_that_was_behind_is_not_believed_because_another_leads() {
    let race = &mut Race::default();
    assert_eq!(after(race, [3.0, 1.0, 3.0], 20), Leader::Gdsf);
    assert!(!race.believes_predictor());
    // LRU and the predictor stand level once LRU leads.
    assert_eq!(after(race, [1.0, 3.0, 3.0], 60), Leader::Lru);
    assert!(!race.believes_predictor());
}

#[test]
fn nobody_is_elected_before_the_tier_is_short() {
    // Three components that take long to load are asked for in turn, each fifth time, between twenty others: GDSF keeps the three.
    let asked = |number: u8, restore_s| Asked {
        content: ContentId::File([number; 32]),
        bytes: Bytes::gib(1),
        restore_s,
    };
    let mut race = Race::default();
    let mut predictor = Predictor::new(&PredictConfig::default());
    let mut rates = Rates::default();
    let mut run = |race: &mut Race, capacity| {
        for number in 0..200 {
            let one = match number % 5 {
                0 => asked(number / 5 % 3, 10.0),
                _ => asked(number % 20 + 100, 0.1),
            };
            let seen = Seen {
                content: one.content,
                kind: Kind::Checkpoint,
                bytes: one.bytes,
            };
            let request = Observed {
                session: SessionId(1),
                components: &[seen],
            };
            predictor.observe(Duration::ZERO, &request);
            race.run(Duration::ZERO, capacity, &[one], &mut predictor, &mut rates);
        }
    };
    run(&mut race, Bytes::gib(23));
    let lag = &race.lags[Leader::Lru as usize][Leader::Gdsf as usize];
    assert!(
        lag.is_plain(Place::Alone.gdsf_ahead_of_lru()),
        "the smaller tier tells"
    );
    assert_eq!(race.standing().elected, None);
    assert!(race.believes_predictor());
    run(&mut race, Bytes::gib(5));
    assert!(matches!(
        race.standing().elected,
        Some(Leader::Gdsf | Leader::Predictor)
    ));
}

#[test]
fn losing_the_lead_by_little_is_no_loss_of_faith() {
    let race = &mut Race::default();
    assert_eq!(after(race, [3.0, 3.0, 1.0], 10), Leader::Predictor);
    // LRU keeps things for so long that the predictor sees little of it: half a deviation will do for GDSF.
    race.whole.lru_age = 10_000.0;
    assert_eq!(after(race, [9.0, 1.0, 9.0], 3), Leader::Predictor);
    assert_eq!(after(race, [9.0, 1.0, 9.0], 1), Leader::Gdsf);
    assert!(race.believes_predictor(), "by less than a deviation");
    assert_eq!(after(race, [9.0, 1.0, 9.0], 1), Leader::Gdsf);
    assert!(!race.believes_predictor(), "by more than a deviation");
}

#[test]
fn where_there_are_two_tiers_gdsf_takes_the_lead_sooner_and_keeps_it_longer() {
    let [lru, gdsf, predictor] = Leader::ALL;
    // Who leads at a place where the leader has paid so many seconds more than another at one request, and so many at the next.
    let lead = |place, leader, other: Leader, more_s: [f64; 2]| {
        let mut race = Race {
            place,
            ..Race::default()
        };
        race.standing.elected = Some(leader);
        for more_s in more_s {
            race.lags[leader as usize][other as usize].note(more_s);
        }
        race.elect();
        race.leader()
    };
    let [alone, over, under] = [Place::Alone, Place::OverAnother, Place::UnderAnother];
    // A quarter of a deviation.
    assert_eq!(lead(alone, lru, gdsf, [1.0, -0.7]), lru);
    // Nine tenths.
    assert_eq!(lead(alone, gdsf, lru, [1.0, -0.1]), lru);
    for place in [over, under] {
        assert_eq!(lead(place, lru, gdsf, [1.0, -0.7]), gdsf);
        assert_eq!(lead(place, gdsf, lru, [1.0, -0.1]), gdsf);
    }
    // 1.4.
    assert_eq!(lead(alone, gdsf, predictor, [1.0, 1.0]), predictor);
    assert_eq!(lead(under, gdsf, predictor, [1.0, 1.0]), predictor);
    assert_eq!(lead(over, gdsf, predictor, [1.0, 1.0]), gdsf);
}
