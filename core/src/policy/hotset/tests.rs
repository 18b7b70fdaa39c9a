use super::*;
use crate::catalog::Kind;
use crate::ids::SessionId;
use crate::policy::select;
use crate::policy::test_utils::{candidate, check_policy, content, order_of};
use crate::predict::Seen;
use crate::units::Bytes;

#[test]
fn keeps_what_comes_again() {
    let mut policy = HotsetRetention::new(1);
    let gb = 1_000_000_000;
    // What comes each sixth time is gone under LRU.
    policy.on_capacity(Bytes(3 * gb));
    let ask = |policy: &mut HotsetRetention, at: u64, n: u8| {
        let components = [Seen {
            content: content(n),
            kind: Kind::Checkpoint,
            bytes: Bytes(gb),
        }];
        let session = SessionId(u64::from(n));
        policy.observe(
            Duration::from_secs(at),
            &Observed {
                session,
                components: &components,
            },
        );
    };
    let rare = |i: u64| 10 + (i * 7 % 40) as u8;
    for i in 0..4_000 {
        ask(&mut policy, i * 200, if i % 6 == 0 { 1 } else { rare(i) });
    }
    assert_eq!(policy.leader(), Leader::Predictor);
    let at = 3_999 * 200;
    let last = rare(3_999);
    // The regular one is idle for longer than the one that comes each two hours.
    let regular = candidate(1, gb, at - 600);
    let rare = candidate(last, gb, at);
    let ranked = policy.rank(Duration::from_secs(at), &[regular.clone(), rare.clone()]);
    assert_eq!(order_of(&ranked), [last, 1]);
    // A million times the bytes for the same seconds are not worth it.
    let large = Candidate {
        bytes: Bytes(1_000_000 * gb),
        ..regular
    };
    let ranked = policy.rank(Duration::from_secs(at), &[large, rare]);
    assert_eq!(order_of(&ranked), [1, last]);
}

#[test]
fn a_choice_does_not_depend_on_those_before() {
    let mut policy = HotsetRetention::new(1);
    let mut held: Vec<Candidate> = (0..250)
        .map(|n| candidate(n, 1 + u64::from(n) * 97 % 50, 0))
        .collect();
    for round in 0..200_usize {
        let now = Duration::from_secs(1_000 + 7 * round as u64);
        let used = round * 31 % held.len();
        held[used].last_used = now;
        let (at, count) = (round % 50, held.len());
        held[at * 3 % count].prefetched = round % 40 == 3;
        // From one to nearly all.
        let needed = Bytes(if round % 20 == 9 {
            5_000
        } else {
            1 + round as u64
        });
        let mut anew = policy.clone();
        anew.bar = None;
        let victims = policy.choose(now, &held, needed);
        assert_eq!(victims, anew.choose(now, &held, needed), "{round}");
        assert!(!victims.is_empty());
    }
}

#[test]
fn what_it_has_learned_outlives_it() {
    let ask = |policy: &mut HotsetRetention, number: u64| {
        let components = [Seen {
            content: content((number % 4 * (number % 3)) as u8),
            kind: Kind::Checkpoint,
            bytes: Bytes(1_000),
        }];
        let session = SessionId(number % 5);
        let request = Observed {
            session,
            components: &components,
        };
        policy.observe(Duration::from_secs(number), &request);
    };
    let mut before = HotsetRetention::new(1);
    before.on_capacity(Bytes(3_000));
    (0..3_000).for_each(|number| ask(&mut before, number));
    let learned = before.learned().unwrap();
    let mut after = HotsetRetention::new(1);
    after
        .resume(Duration::ZERO, Duration::from_secs(60), &learned)
        .unwrap();
    assert!(before.stats().trained && after.stats().trained);
    assert_eq!(before.leader(), Leader::Predictor);
    assert_eq!(after.leader(), Leader::Predictor);
    assert_eq!(before.stats().labelled, after.stats().labelled);
    after.on_capacity(Bytes(3_000));
    ask(&mut after, 3_000);
    assert_eq!(after.stats().observed, 3_001);
    // What is not whole, or another thing, changes nothing.
    for spoilt in [&learned[..learned.len() / 2], &[], &[0xff; 40]] {
        let mut fresh = HotsetRetention::new(1);
        assert!(
            fresh
                .resume(Duration::ZERO, Duration::ZERO, spoilt)
                .is_err()
        );
        assert_eq!(fresh.stats().observed, 0);
    }
}

#[test]
fn it_is_a_policy() {
    check_policy(|| Box::new(HotsetRetention::new(0)));
}

/// What a tier with this policy would load, in seconds, over the last half of a stream.
fn seconds_paid(policy: &mut HotsetRetention, stream: &[u8], capacity: u64) -> (u64, Vec<Leader>) {
    policy.on_capacity(Bytes(capacity));
    let mut resident: Vec<Candidate> = Vec::new();
    let mut leaders = Vec::new();
    let mut paid = 0;
    for (at, n) in (0..).zip(stream) {
        let now = Duration::from_secs(at * 40);
        let components = [Seen {
            content: content(*n),
            kind: Kind::Checkpoint,
            bytes: Bytes(1),
        }];
        policy.observe(
            now,
            &Observed {
                session: SessionId(0),
                components: &components,
            },
        );
        leaders.push(policy.leader());
        if let Some(held) = resident.iter_mut().find(|c| c.content == content(*n)) {
            held.last_used = now;
            continue;
        }
        paid += u64::from(at as usize >= stream.len() / 2);
        if resident.len() as u64 == capacity {
            for victim in select(policy, now, &resident, Bytes(1)) {
                resident.retain(|c| c.content != victim.content);
            }
        }
        resident.push(candidate(*n, 1, at * 40));
    }
    (paid, leaders)
}

#[test]
fn it_learns_to_keep_part_of_a_loop() {
    // LRU and GDSF miss always; whoever keeps anything at all does better.
    let stream: Vec<u8> = (0..8_000).map(|i| (i % 20) as u8).collect();
    let (paid, leaders) = seconds_paid(&mut HotsetRetention::new(1), &stream, 10);
    assert!(paid < 3_000, "{paid} of 4000");
    assert_eq!(leaders[0], Leader::Lru, "at first it knows nothing");
    assert_eq!(leaders.last(), Some(&Leader::Predictor));
}

#[test]
fn few_rates_give_the_same_choice_as_all() {
    let stream: Vec<u8> = crate::policy::test_utils::zipf_like(3, 4_000);
    let mut policy = HotsetRetention::new(1);
    seconds_paid(&mut policy, &stream, 30);
    let now = Duration::from_secs(4_000 * 40);
    let candidates: Vec<Candidate> = (0..60).map(|n| candidate(n, 1, u64::from(n))).collect();
    let chosen = select(&mut policy, now, &candidates, Bytes(5));
    let ranked = policy.rank(now, &candidates);
    assert_eq!(order_of(&chosen), order_of(&ranked)[..5]);
    // A guess that was never used goes before everything.
    let mut guessed = candidates.clone();
    guessed[1].prefetched = true;
    assert_eq!(
        select(&mut policy, now, &guessed, Bytes(1))[0].content,
        content(1)
    );
}

/// One that has learned from 4,000 requests, one each second: for 1 each other time, 2 each tenth, 20 and above now and then.
fn trained() -> HotsetRetention {
    let mut policy = HotsetRetention::new(1);
    policy.on_capacity(Bytes(10_000));
    for number in 0..4_000 {
        let n = match number % 10 {
            0 => 2,
            odd if odd % 2 == 1 => 1,
            _ => 20 + (number / 10 % 40) as u8,
        };
        let components = [Seen {
            content: content(n),
            kind: Kind::Checkpoint,
            bytes: Bytes(1_000),
        }];
        let request = Observed {
            session: SessionId(0),
            components: &components,
        };
        policy.observe(Duration::from_secs(number), &request);
    }
    assert_eq!(policy.leader(), Leader::Predictor);
    policy
}

#[test]
fn what_a_tier_above_has_is_worth_less_here() {
    let (mut policy, now) = (trained(), Duration::from_secs(4_000));
    let mut held = candidate(1, 1_000, 3_999);
    let alone = policy.rank(now, &[held.clone()])[0].score;
    held.above = true;
    let above = policy.rank(now, &[held])[0].score;
    assert!(0.0 < above && above < alone, "{above} {alone}");
}

#[test]
fn for_a_guess_only_what_is_worth_far_less_goes() {
    let now = Duration::from_secs(4_000);
    let guess = |n: u8, certain: bool| Guess {
        content: content(n),
        restore_s: 1.0,
        certain,
    };
    let (hot, cold) = (candidate(1, 1_000, 3_999), candidate(25, 1_000, 3_800));
    let both = [hot.clone(), cold];
    let room = |policy: &mut HotsetRetention, guess: &Guess, residents: &[Candidate]| {
        let victims = policy.room_for_guess(now, guess, residents, Bytes(1_000));
        victims.map(|victims| order_of(&victims))
    };
    let knows_nothing = &mut HotsetRetention::new(1);
    assert_eq!(room(knows_nothing, &guess(2, true), &both), None);
    let policy = &mut trained();
    assert_eq!(room(policy, &guess(2, false), &both), Some(vec![25]));
    assert_eq!(room(policy, &guess(26, false), &both), None);
    assert_eq!(room(policy, &guess(2, true), &[hot]), None);
    assert_eq!(room(policy, &guess(2, true), &[]), None);
}

#[test]
fn what_another_tier_has_goes_before_what_is_idle_for_longer() {
    let now = Duration::from_secs(100);
    let gb = 1_000_000_000;
    let idle = candidate(1, gb, 60);
    // Idle for 10 seconds, and restored in a tenth of the time.
    let below = Candidate {
        restore_s: 0.1,
        ..candidate(2, gb, 90)
    };
    let above = Candidate {
        above: true,
        ..candidate(3, gb, 91)
    };
    let mut policy = HotsetRetention::new(0);
    let all = [idle, below, above];
    assert_eq!(order_of(&policy.rank(now, &all)), [2, 3, 1]);
    let victims = policy.choose(now, &all, Bytes(gb));
    assert_eq!(order_of(&victims), [2]);
    // It is told from what is offered, RAM by what a GPU has too.
    assert_eq!(policy.race.place, Place::UnderAnother);
    let reason = &victims[0].reason;
    assert!(
        reason.contains("counted 10.0 times since another tier has it"),
        "{reason}"
    );
}

#[test]
fn gdsf_keeps_books_of_its_own_where_costs_are_discounted() {
    let now = Duration::from_secs(100);
    let gb = 1_000_000_000;
    let follows_gdsf = |first_s: f64| {
        let learned = HotsetRetention::new(0).learned().unwrap();
        let end = learned.iter().position(|byte| *byte == b'\n').unwrap();
        let standing = br#"{"elected":"gdsf","predictor_lost":true}"#;
        let state = [standing, &learned[end..]].concat();
        let mut policy = HotsetRetention::new(0);
        policy.resume(now, Duration::ZERO, &state).unwrap();
        policy.on_capacity(Bytes(10 * gb));
        let ask = move |policy: &mut HotsetRetention, number: u8| {
            let components = [Seen {
                content: content(number),
                kind: Kind::Unet,
                bytes: Bytes(gb),
            }];
            let request = Observed {
                session: SessionId(1),
                components: &components,
            };
            let whole_s = if number == 1 { first_s } else { 1.0 };
            policy.on_cost(&content(number), whole_s);
            policy.observe(now, &request);
            policy.on_request(now, &content(number), Bytes(gb), false);
        };
        for number in [1, 1, 1, 2] {
            ask(&mut policy, number);
        }
        assert_eq!(policy.leader(), Leader::Gdsf);
        (policy, ask)
    };
    let all = [candidate(1, gb, 0), candidate(2, gb, 0)];
    let (mut policy, _) = follows_gdsf(1.0);
    assert_eq!(order_of(&policy.choose(now, &all, Bytes(1))), [2]);
    assert!(policy.gdsf.is_none(), "its shadow will do");
    // What loading takes is told with each request: nothing had to be chosen before, and nothing is in a large tier.
    let (mut policy, _) = follows_gdsf(0.1);
    assert_eq!(order_of(&policy.choose(now, &all, Bytes(1))), [1]);
    assert_eq!(policy.race.place, Place::Alone);
    // Restored in a tenth of the time, three uses are worth less than one.
    let below = Candidate {
        restore_s: 0.1,
        ..all[0].clone()
    };
    let (mut policy, ask) = follows_gdsf(1.0);
    let victims = policy.choose(now, &[below, all[1].clone()], Bytes(1));
    assert_eq!(order_of(&victims), [1]);
    assert_eq!(policy.race.place, Place::OverAnother);
    assert!(
        (victims[0].score - 0.3).abs() < 1e-9,
        "{}",
        victims[0].score
    );
    // The clock rose to that.
    policy.on_evict(now, &content(1));
    ask(&mut policy, 3);
    let gdsf = policy.gdsf.as_mut().unwrap();
    let held = [candidate(3, gb, 0), all[1].clone()];
    let mut scores = Scores::of(&held, 0.0);
    gdsf.score(&mut scores);
    let priorities: Vec<f64> = scores.iter().collect();
    assert!((priorities[0] - 1.3).abs() < 1e-9);
    assert!((priorities[1] - 1.0).abs() < 1e-9);
}

#[test]
fn no_cost_is_believed_that_is_none() {
    let mut policy = HotsetRetention::new(0);
    let seconds =
        |policy: &HotsetRetention| policy.asked(content(1), Bytes(2_000_000_000)).restore_s;
    assert_eq!(seconds(&policy), 2.0, "nobody told");
    policy.on_cost(&content(1), 0.5);
    for unsound in [f64::NAN, f64::INFINITY, -1.0] {
        policy.on_cost(&content(1), unsound);
    }
    assert_eq!(seconds(&policy), 0.5);
}
