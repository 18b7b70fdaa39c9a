use std::time::Duration;

use super::*;
use crate::catalog::Kind;
use crate::ids::GpuIndex;
use crate::plan::rates::Rates;
use crate::plan::{resolve, test_utils};
use crate::policy::lru::Lru;

const FIRST: Tier = Tier::Vram(GpuIndex(0));
const SECOND: Tier = Tier::Vram(GpuIndex(1));

fn component(number: u8, mib: u64) -> Arc<Component> {
    test_utils::component(
        &format!("m{number}"),
        "weights",
        Kind::Unknown,
        number,
        mib << 10,
    )
}

fn set(name: &str, components: &[&Arc<Component>]) -> MixSet {
    let catalogue = test_utils::catalogue(components.iter().map(|component| {
        let name = component.id.model.as_str();
        test_utils::model(name, Kind::Unknown, None, vec![Arc::clone(component)])
    }));
    let names: Vec<String> = components.iter().map(|c| c.id.model.to_string()).collect();
    MixSet {
        name: name.into(),
        graph: resolve(&catalogue, &[], &names, true).unwrap(),
        target: Target::Best,
    }
}

fn tier(tier: Tier, mib: u64, holds: &[(&Arc<Component>, bool)]) -> TierView {
    let residencies: Vec<ResidencyView> = holds
        .iter()
        .map(|(component, leased)| ResidencyView {
            component: Arc::clone(component),
            bytes: component.bytes,
            loading: false,
            pins: u32::from(*leased),
            leases: u32::from(*leased),
            uses: 1,
            admitted: Duration::ZERO,
            last_used: Duration::ZERO,
            load_time: Some(Duration::from_secs(1)),
            prefetched: false,
        })
        .collect();
    TierView {
        tier,
        budget: Bytes::mib(mib),
        committed: residencies.iter().map(|r| r.bytes).sum(),
        evicting: Bytes::ZERO,
        out_of_service: None,
        residencies,
    }
}

fn plan(tiers: &[TierView], sets: &[MixSet]) -> MixPlan {
    let (granules, links, rates) = (BTreeMap::new(), BTreeMap::new(), Rates::default());
    let planner = Planner {
        tiers,
        granules: &granules,
        links: &links,
        rates: &rates,
        ring: Bytes::mib(1),
        now: Duration::from_secs(10),
    };
    planner.plan_mix(sets, || Box::new(Lru))
}

fn places(plan: &MixPlan) -> Vec<Option<Tier>> {
    let plans = plan.sets.iter().map(|set| set.plan.as_ref());
    plans.map(|plan| plan.map(|plan| plan.tier)).collect()
}

#[test]
fn sets_that_share_are_put_together_and_what_they_share_is_loaded_once() {
    let (base, a, b, c) = (
        component(1, 6),
        component(2, 1),
        component(3, 1),
        component(4, 7),
    );
    let tiers = [
        tier(FIRST, 8, &[]),
        tier(SECOND, 8, &[]),
        tier(Tier::Ram, 64, &[]),
    ];
    let sets = [
        set("a", &[&base, &a]),
        set("c", &[&c]),
        set("b", &[&base, &b]),
    ];
    let plan = plan(&tiers, &sets);
    let places = places(&plan);
    assert!(plan.fits, "{plan:?}");
    assert_eq!(places[0], places[2]);
    assert_ne!(places[0], places[1]);
    let third = plan.sets[2].plan.as_ref().unwrap();
    assert_eq!(
        third.needs[&third.tier],
        Bytes::mib(1),
        "the base costs nothing any more"
    );
    // 15 MiB from a disk that was never measured.
    let seconds = Bytes::mib(15).as_f64() / crate::plan::DISK_PER_S;
    assert!(
        (plan.estimate.seconds - seconds).abs() < 1e-6,
        "{:?}",
        plan.estimate
    );
    assert!(
        plan.estimate
            .assumed
            .iter()
            .any(|way| matches!(way, Way::Disk(_)))
    );
}

#[test]
fn what_another_set_of_the_mix_wants_is_not_evicted() {
    let (old, new, other) = (component(1, 4), component(2, 4), component(3, 4));
    let tiers = [
        tier(FIRST, 8, &[(&old, false), (&other, false)]),
        tier(Tier::Ram, 64, &[]),
    ];
    let plan = plan(&tiers, &[set("new", &[&new]), set("old", &[&old])]);
    assert!(plan.fits, "{plan:?}");
    let evicted = &plan.sets[0].plan.as_ref().unwrap().evictions;
    assert_eq!(evicted.len(), 1);
    assert_eq!(evicted[0].component, other.id);
    assert!(plan.sets[1].plan.as_ref().unwrap().evictions.is_empty());
}

#[test]
fn what_one_would_have_to_give_up_is_named() {
    let (a, b, c, held) = (
        component(1, 6),
        component(2, 3),
        component(3, 6),
        component(4, 5),
    );
    let tiers = [
        tier(FIRST, 8, &[]),
        tier(SECOND, 8, &[(&held, true)]),
        tier(Tier::Ram, 64, &[]),
    ];
    let sets = [set("a", &[&a]), set("b", &[&b]), set("c", &[&c])];
    let plan = plan(&tiers, &sets);
    assert!(!plan.fits);
    assert_eq!(places(&plan).iter().flatten().count(), 2);
    let without = |name: &str| GiveUp::Sets {
        names: vec![name.into()],
    };
    assert!(
        plan.give_up.contains(&without("a")) && plan.give_up.contains(&without("c")),
        "{:?}",
        plan.give_up
    );
    assert!(!plan.give_up.contains(&without("b")));
    let none_left = plan
        .give_up
        .iter()
        .any(|give| matches!(give, GiveUp::Leases { .. }));
    assert!(
        !none_left,
        "three GPUs would be needed even then: {:?}",
        plan.give_up
    );
    // Without `b` there is room once the lease is released.
    let plan = self::plan(
        &tiers,
        &sets[..1]
            .iter()
            .chain(&sets[2..])
            .cloned()
            .collect::<Vec<_>>(),
    );
    let leases = GiveUp::Leases {
        tier: SECOND,
        components: vec![held.id.clone()],
        bytes: Bytes::mib(5),
    };
    assert!(plan.give_up.contains(&leases), "{:?}", plan.give_up);
}

#[test]
fn a_set_that_never_fits_says_so() {
    let a = component(1, 60);
    let tiers = [tier(FIRST, 8, &[]), tier(Tier::Ram, 64, &[])];
    let plan = plan(&tiers, &[set("a", &[&a])]);
    assert!(!plan.fits);
    let reason = plan.sets[0].reason.as_ref().unwrap();
    assert!(
        reason.contains("never fit") && reason.contains("it fits in ram"),
        "{reason}"
    );
}
