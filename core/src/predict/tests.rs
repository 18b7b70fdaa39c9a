use proptest::prelude::*;

use super::*;

fn content(n: u8) -> ContentId {
    ContentId::File([n; 32])
}

fn seen(n: u8, kind: Kind) -> Seen {
    Seen {
        content: content(n),
        kind,
        bytes: Bytes::gib(u64::from(n % 7) + 1),
    }
}

fn config(horizon_s: u64) -> PredictConfig {
    PredictConfig {
        enabled: true,
        horizon: Duration::from_secs(horizon_s),
        ..PredictConfig::default()
    }
}

fn ask(predictor: &mut Predictor, at_s: u64, session: u64, wanted: &[u8]) {
    let components: Vec<Seen> = wanted.iter().map(|n| seen(*n, Kind::Checkpoint)).collect();
    predictor.observe(
        Duration::from_secs(at_s),
        &Observed {
            session: SessionId(session),
            components: &components,
        },
    );
}

fn candidate(n: u8) -> Candidate {
    Candidate {
        content: content(n),
        bytes: Bytes::gib(1),
        load_s: 2.0,
    }
}

/// One is asked for every ten minutes, forty others once a day, in turn; the horizon is a quarter of an hour.
fn periodic(until_s: u64) -> Predictor {
    let mut predictor = Predictor::new(&config(900));
    let mut at = 0;
    while at < until_s {
        ask(&mut predictor, at, 1, &[0]);
        ask(&mut predictor, at + 120, 2, &[10 + (at / 600 % 40) as u8]);
        at += 600;
    }
    predictor
}

#[test]
fn learns_what_comes_regularly() {
    let mut predictor = periodic(4 * 86_400);
    let now = Duration::from_secs(4 * 86_400);
    let regular = predictor.probability(now, &content(0));
    assert!(regular > 0.9, "{regular}");
    // All others but the two whose turn comes within the horizon; some of them were used more lately than that one.
    let others = (10..50)
        .filter(|n| !matches!(n, 26 | 27))
        .map(|n| predictor.probability(now, &content(n)))
        .fold(0.0, f64::max);
    assert!(others < 0.3, "{others}");
    let all: Vec<Candidate> = (0..50).map(candidate).collect();
    let proposals = predictor.proposals(now, &all, 5);
    assert_eq!(proposals.len(), 1);
    assert_eq!(proposals[0].content, content(0));
    assert!((proposals[0].expected_seconds_saved - 2.0 * proposals[0].probability).abs() < 1e-9);
    let stats = predictor.stats();
    assert!(
        stats.log_loss_ewma < 0.5 * stats.base_log_loss_ewma,
        "{stats:?}"
    );
    assert!(stats.calibration_error < 0.03, "{stats:?}");
}

#[test]
fn knows_nothing_at_first() {
    let mut predictor = Predictor::new(&config(900));
    assert_eq!(predictor.probability(Duration::ZERO, &content(0)), 0.0);
    ask(&mut predictor, 1, 1, &[0]);
    let p = predictor.probability(Duration::from_secs(2), &content(0));
    assert!(p > 0.0 && p < 1.0);
    assert!(!predictor.is_trained());
    let proposals = predictor.proposals(Duration::from_secs(2), &[candidate(0)], 5);
    assert!(proposals.is_empty());
}

/// Each half hour, one component is asked for by a session that is new and comes back for the same ten minutes later,
/// and one by a session that goes on to something else at once. Recency, counts and gaps are the same.
#[test]
fn learns_that_sessions_stick() {
    let mut predictor = Predictor::new(&config(900));
    let round = |predictor: &mut Predictor, round: u64, whole: bool| {
        let at = round * 1800;
        let (stays, leaves) = ((round % 40) as u8, 100 + (round % 40) as u8);
        ask(predictor, at, 10_000 + round, &[stays]);
        ask(predictor, at + 1, 90_000 + round, &[leaves]);
        ask(predictor, at + 2, 90_000 + round, &[200]);
        if whole {
            ask(predictor, at + 600, 10_000 + round, &[stays]);
        }
        (
            content(stays),
            content(leaves),
            Duration::from_secs(at + 10),
        )
    };
    for number in 0..1500 {
        round(&mut predictor, number, true);
    }
    let (stays, leaves, now) = round(&mut predictor, 1500, false);
    let [stays, leaves] = [stays, leaves].map(|content| predictor.probability(now, &content));
    assert!(stays > leaves + 0.2, "{stays} {leaves}");
}

#[test]
fn the_seed_decides_everything() {
    let text = |predictor: &Predictor| serde_json::to_string(predictor).unwrap();
    assert_eq!(text(&periodic(86_400)), text(&periodic(86_400)));
    let mut other = Predictor::new(&PredictConfig {
        seed: 7,
        ..config(900)
    });
    ask(&mut other, 0, 1, &[0]);
    assert_ne!(text(&other), text(&periodic(1)));
}

#[test]
fn a_saved_predictor_goes_on_as_if_nothing_happened() {
    let mut here = periodic(86_400);
    let saved = serde_json::to_string(&here).unwrap();
    let mut there: Predictor = serde_json::from_str(&saved).unwrap();
    for at in (86_400..2 * 86_400).step_by(137) {
        let wanted = [(at % 60) as u8];
        ask(&mut here, at, at % 5, &wanted);
        ask(&mut there, at, at % 5, &wanted);
        let now = Duration::from_secs(at);
        assert_eq!(
            here.probability(now, &content(0)).to_bits(),
            there.probability(now, &content(0)).to_bits()
        );
    }
    assert_eq!(here.stats(), there.stats());
}

#[test]
fn a_new_process_starts_its_clock_anew() {
    let mut predictor = periodic(86_400);
    let before = predictor.probability(Duration::from_secs(86_400), &content(0));
    let saved = serde_json::to_string(&predictor).unwrap();
    let mut later: Predictor = serde_json::from_str(&saved).unwrap();
    later.resume(Duration::from_secs(3), Duration::ZERO);
    let after = later.probability(Duration::from_secs(3), &content(0));
    assert!((before - after).abs() < 1e-9, "{before} {after}");
    later.resume(Duration::from_secs(3), Duration::from_secs(86_400));
    // Time passes by requests: what was wanted is still expected after a day without any.
    assert!(later.probability(Duration::from_secs(3), &content(0)) > 0.5 * before);
    assert_eq!(later.stats().pending, 0);
}

#[test]
fn nonsense_is_not_restored() {
    let saved = serde_json::to_string(&periodic(7200)).unwrap();
    assert!(serde_json::from_str::<Predictor>(&saved).is_ok());
    let mut value: serde_json::Value = serde_json::from_str(&saved).unwrap();
    value["ladder"]["learners"][0]["weights"]
        .as_array_mut()
        .unwrap()
        .pop();
    let error = serde_json::from_value::<Predictor>(value).unwrap_err();
    assert!(error.to_string().contains("learns anew"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_stream_is_taken_within_bounds(
        stream in proptest::collection::vec(
            (0_u64..100_000_000, 0_u64..u64::MAX, proptest::collection::vec(any::<u8>(), 0..80), 0_u8..4),
            0..300,
        ),
        max_tracked in 0_usize..40,
        horizon_ms in 0_u64..10_000_000,
        load_s in prop_oneof![Just(f64::NAN), Just(f64::INFINITY), Just(-1.0), 0.0..100.0],
    ) {
        let mut predictor = Predictor::new(&PredictConfig {
            max_tracked,
            horizon: Duration::from_millis(horizon_ms),
            threshold: 0.0,
            ..config(1)
        });
        let kinds = [Kind::Checkpoint, Kind::Lora, Kind::Vae, Kind::Unknown];
        for (at_ms, session, wanted, kind) in stream {
            let now = Duration::from_millis(at_ms);
            let components: Vec<Seen> = wanted
                .iter()
                .map(|n| seen(*n, kinds[usize::from(n.wrapping_add(kind) % 4)]))
                .collect();
            let session = SessionId(session);
            predictor.observe(now, &Observed { session, components: &components });
            for n in [0, 1, 77, 255] {
                let p = predictor.probability(now, &content(n));
                prop_assert!((0.0..=1.0).contains(&p));
            }
            let all: Vec<Candidate> = (0..9).map(|n| Candidate { load_s, ..candidate(n) }).collect();
            for proposal in predictor.proposals(now, &all, 4) {
                prop_assert!(proposal.expected_seconds_saved.is_finite());
            }
            let stats = predictor.stats();
            prop_assert!(stats.tracked <= max_tracked.max(1));
            prop_assert!(stats.pending <= ladder::MAX_PENDING);
            prop_assert!(stats.log_loss_ewma.is_finite() && stats.base_log_loss_ewma.is_finite());
        }
        let saved = serde_json::to_string(&predictor).unwrap();
        prop_assert!(serde_json::from_str::<Predictor>(&saved).is_ok());
    }
}
