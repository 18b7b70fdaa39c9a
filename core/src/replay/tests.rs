use proptest::prelude::*;

use super::*;
use crate::config::EvictionPolicyName;

const COMPONENTS: &str =
    "id,kind,bytes,load_s\nA,checkpoint,4,4\nB,checkpoint,4,2\nC,lora,2,1\nD,vae,20,9\n";

fn machine(ram: u64, vram: Option<u64>) -> Machine {
    Machine {
        ram: Bytes(ram),
        vram: vram.map(Bytes),
        load: LoadCost::default(),
        upload: "0.5s".parse().unwrap(),
        measured: Measured::AfterShare(0.0),
    }
}

fn run(requests: &str, machine: &Machine, policy: &str) -> Outcome {
    let trace = Trace::parse(requests, COMPONENTS).unwrap();
    let policy: PolicyName = policy.parse().unwrap();
    replay(&trace, machine, || policy.make(&trace), &|| Duration::ZERO)
}

fn about(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-9
}

#[test]
fn one_tier_by_hand() {
    let requests = "t_s,session,components\n0,s,A\n1,s,B\n2,s,A|C\n3,t,B\n4,,D\n5,s,A\n";
    // 8 bytes: A and B fit, C drives out B, B drives out nobody but C and A (needs 4 of 2 free + 2 of C: LRU takes A first).
    let lru = run(requests, &machine(8, None), "lru");
    // Loads: A 4, B 2, C 1, B 2, D 9 (never fits, passed through), A 4 (evicted for B at 3).
    assert!(
        about(lru.cmr, 22.0 / (4.0 + 2.0 + 5.0 + 2.0 + 9.0 + 4.0)),
        "{lru:?}"
    );
    assert_eq!(lru.requests, 6);
    assert!(about(lru.object_miss_ratio, 6.0 / 7.0));
    assert!(about(lru.zero_wait_share, 0.0));
    let plenty = run(requests, &machine(1000, None), "lru");
    assert!(about(plenty.cmr, 16.0 / 26.0));
    assert!(about(plenty.cold_start_s.p99, 9.0) && about(plenty.cold_start_s.p50, 1.0));
    // Only what follows the third second counts.
    let late = Machine {
        measured: Measured::From(Duration::from_secs(3)),
        ..machine(1000, None)
    };
    assert!(about(run(requests, &late, "lru").cmr, 9.0 / 15.0));
}

#[test]
fn two_tiers_by_hand() {
    let requests = "t_s,session,components\n0,s,A\n1,s,B\n2,s,A\n3,s,A\n";
    // VRAM has room for one: A and B cost load and upload, then A an upload, then nothing.
    let outcome = run(requests, &machine(100, Some(4)), "lru");
    assert!(
        about(outcome.cmr, (4.5 + 2.5 + 0.5) / (4.5 * 3.0 + 2.5)),
        "{outcome:?}"
    );
    // Without RAM to speak of, each is read from disk.
    let outcome = run(requests, &machine(1, Some(4)), "lru");
    assert!(
        about(outcome.cmr, (4.5 + 2.5 + 4.5) / (4.5 * 3.0 + 2.5)),
        "{outcome:?}"
    );
}

#[test]
fn a_set_is_pinned_together() {
    // B is least recently used, but is asked for with C.
    let requests = "t_s,session,components\n0,s,B\n1,s,A\n2,s,B|C\n3,s,B\n";
    let outcome = run(requests, &machine(8, None), "lru");
    assert!(about(outcome.zero_wait_share, 0.25), "{outcome:?}");
    assert!(about(outcome.cmr, 7.0 / (2.0 + 4.0 + 3.0 + 2.0)));
}

#[test]
fn wrong_tables_are_named() {
    let requests = "t_s,session,components\n0,s,A\n";
    let error = |requests: &str, components: &str| Trace::parse(requests, components).unwrap_err();
    assert!(matches!(
        error(requests, "id,kind\n"),
        TraceError::MissingColumn {
            column: "bytes",
            ..
        }
    ));
    assert!(matches!(
        error(requests, "id,kind,bytes\nA,vae,x\n"),
        TraceError::BadValue { line: 2, .. }
    ));
    assert!(matches!(
        error(requests, "id,kind,bytes\nA,vae,1\nA,vae,1\n"),
        TraceError::DuplicateComponent { line: 3, .. }
    ));
    assert!(matches!(
        error(requests, "id,kind,bytes\nB,vae,1\n"),
        TraceError::UnknownComponent { line: 2, .. }
    ));
    let back = "t_s,session,components\n5,s,A\n4,s,A\n";
    assert_eq!(error(back, COMPONENTS), TraceError::NotInOrder { line: 3 });
    let nan = "t_s,session,components\nNaN,s,A\n";
    assert!(matches!(
        error(nan, COMPONENTS),
        TraceError::BadValue { column: "t_s", .. }
    ));
    assert!(
        "lruu"
            .parse::<PolicyName>()
            .unwrap_err()
            .to_string()
            .contains("s3-fifo")
    );
}

fn unit_trace(stream: &[u8]) -> Trace {
    let components: String = (0..=u8::MAX)
        .map(|n| format!("\nC{n:03},checkpoint,1000,1"))
        .collect();
    let requests: String = (0..)
        .zip(stream)
        .map(|(at, n): (u32, &u8)| format!("\n{},{},C{n:03}", at * 60, n % 3))
        .collect();
    Trace::parse(
        &format!("t_s,session,components{requests}"),
        &format!("id,kind,bytes,load_s{components}"),
    )
    .unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Sizes and costs being one, Belady's rule is optimal, so no policy may load less; and LRU never gets worse with
    /// more memory (its stack property).
    #[test]
    fn what_must_hold_on_units(stream in proptest::collection::vec(0_u8..30, 1..300), capacity in 1_u64..20) {
        let trace = unit_trace(&stream);
        let loads = |policy: PolicyName, capacity: u64| {
            let machine = machine(capacity * 1000, None);
            let outcome = replay(&trace, &machine, || policy.make(&trace), &|| Duration::ZERO);
            outcome.cmr * stream.len() as f64
        };
        let best = loads(PolicyName::BeladySize, capacity);
        // Prefetch loads while nobody waits, which no policy without it can.
        for policy in PolicyName::all().filter(|p| *p != PolicyName::HotsetPrefetch) {
            let loads = loads(policy, capacity);
            prop_assert!(loads >= best - 1e-6, "{policy} {loads} {best}");
        }
        let lru = PolicyName::Service(EvictionPolicyName::Lru);
        prop_assert!(loads(lru, capacity + 1) <= loads(lru, capacity) + 1e-6);
    }

    #[test]
    fn a_replay_repeats(stream in proptest::collection::vec(any::<u8>(), 1..300), vram in proptest::option::of(1_u64..9)) {
        let trace = unit_trace(&stream);
        for policy in PolicyName::all() {
            let machine = machine(12_000, vram.map(|n| n * 1000));
            let run = || replay(&trace, &machine, || policy.make(&trace), &|| Duration::ZERO);
            prop_assert_eq!(run(), run());
        }
    }
}

/// Two-thirds of the requests for a few components, the rest for many; after each thousand others are the few.
fn changing() -> Trace {
    let stream: Vec<u8> = (0..6_000_u64)
        .map(|i| {
            let drawn = crate::random::scramble(5, i);
            let shift = (i / 1_000) as u8 * 37;
            if drawn % 3 < 2 {
                (drawn / 7 % 12) as u8 + shift
            } else {
                (drawn / 7 % 256) as u8
            }
        })
        .collect();
    unit_trace(&stream)
}

#[test]
fn a_changing_world_costs_hotset_little() {
    let trace = changing();
    for capacity in [10, 20, 40, 80] {
        let cmr = |policy: &str| {
            let policy: PolicyName = policy.parse().unwrap();
            let machine = machine(capacity * 1_000, None);
            replay(&trace, &machine, || policy.make(&trace), &|| Duration::ZERO).cmr
        };
        let (hotset, lru, gdsf) = (cmr("hotset"), cmr("lru"), cmr("gdsf"));
        assert!(
            hotset <= 1.02 * lru.min(gdsf),
            "{capacity}: {hotset} {lru} {gdsf}"
        );
    }
}

#[test]
fn guesses_are_counted() {
    let trace = changing();
    let policy = PolicyName::HotsetPrefetch;
    let machine = machine(20_000, None);
    let outcome = replay(&trace, &machine, || policy.make(&trace), &|| Duration::ZERO);
    let score = outcome.prefetch.unwrap();
    let settled = score.used_bytes.saturating_add(score.wasted_bytes);
    assert!(settled <= Bytes(1_000 * score.loads), "{score:?}");
    let without = PolicyName::Service(EvictionPolicyName::Hotset);
    let without = replay(&trace, &machine, || without.make(&trace), &|| {
        Duration::ZERO
    });
    assert_eq!(without.prefetch, None);
    assert!(
        outcome.cmr < 1.02 * without.cmr,
        "{} {}",
        outcome.cmr,
        without.cmr
    );
}
