use proptest::prelude::*;

use super::*;
use crate::catalog::Kind;
use crate::device::{Granules, Link};
use crate::memory::ResidencyView;
use crate::plan::{resolve, test_utils};
use crate::policy::lru::Lru;

const GPU: Tier = Tier::Vram(GpuIndex(0));
const OTHER: Tier = Tier::Vram(GpuIndex(1));

fn component(number: u8, kib: u64) -> Arc<Component> {
    test_utils::component(&format!("m{number}"), "weights", Kind::Unknown, number, kib)
}

static NO_LINKS: Links = Links::new();

fn no_rates() -> &'static Rates {
    static NONE: std::sync::OnceLock<Rates> = std::sync::OnceLock::new();
    NONE.get_or_init(Rates::default)
}

/// A graph of components that have nothing to do with each other.
fn set(components: &[Arc<Component>]) -> DependencyGraph {
    let catalogue = test_utils::catalogue(components.iter().map(|component| {
        let name = component.id.model.as_str();
        test_utils::model(name, Kind::Unknown, None, vec![component.clone()])
    }));
    let names: Vec<String> = components.iter().map(|c| c.id.model.to_string()).collect();
    resolve(&catalogue, &[], &names, true).unwrap()
}

/// A tier of this budget in MiB that holds these components; those with `true` are leased.
fn tier(tier: Tier, mib: u64, holds: &[(&Arc<Component>, bool)]) -> TierView {
    let residencies: Vec<ResidencyView> = (0..)
        .zip(holds)
        .map(|(i, (component, leased))| ResidencyView {
            component: Arc::clone(component),
            bytes: component.bytes,
            loading: false,
            pins: u32::from(*leased),
            leases: u32::from(*leased),
            uses: 1,
            admitted: Duration::ZERO,
            last_used: Duration::from_secs(i),
            load_time: None,
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

fn planner<'a>(tiers: &'a [TierView], granules: &'a BTreeMap<GpuIndex, Granules>) -> Planner<'a> {
    Planner {
        tiers,
        granules,
        links: &NO_LINKS,
        rates: no_rates(),
        ring: Bytes::mib(1),
        now: Duration::from_secs(100),
    }
}

fn plan(
    tiers: &[TierView],
    components: &[Arc<Component>],
    target: Target,
) -> Result<Plan, PlanError> {
    planner(tiers, &BTreeMap::new()).plan(&set(components), target)
}

#[test]
fn what_is_there_costs_nothing_and_decides_the_place() {
    let (a, b) = (component(1, 2048), component(2, 1024));
    let tiers = [
        tier(GPU, 8, &[]),
        tier(OTHER, 4, &[(&a, false)]),
        tier(Tier::Ram, 16, &[]),
    ];
    let plan = plan(&tiers, &[a, b], Target::Best).unwrap();
    assert_eq!(
        plan.tier, OTHER,
        "it holds most of the set, though it has less room"
    );
    assert_eq!(plan.needs[&OTHER], Bytes::mib(1));
    assert_eq!(plan.needs[&Tier::Ram], Bytes::mib(1));
    assert_eq!(plan.fit, Fit::Now);
    assert_eq!(plan.steps[0].route, Route::None);
    assert_eq!(plan.steps[1].route, Route::ViaRam);
}

#[test]
fn without_a_gpu_the_best_place_is_ram() {
    let a = component(1, 1024);
    let tiers = [tier(Tier::Ram, 16, &[])];
    assert_eq!(
        plan(&tiers, std::slice::from_ref(&a), Target::Best)
            .unwrap()
            .tier,
        Tier::Ram
    );
    let missing = plan(&tiers, &[a], Target::AnyGpu).unwrap_err();
    assert_eq!(
        missing.to_string(),
        "there is no vram; this machine has ram"
    );
}

#[test]
fn the_arithmetic_of_a_refusal_adds_up() {
    let parts = [component(1, 3072), component(2, 6144)];
    let tiers = [tier(GPU, 8, &[]), tier(Tier::Ram, 16, &[])];
    let refused = plan(&tiers, &parts, Target::Best).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the set can never fit: vram:0 has a budget of 8.0 MiB, and the set needs 9.0 MiB there \
         (m2/weights 6.0 MiB + m1/weights 3.0 MiB), 1.0 MiB too much; it fits in ram; \
         it fits where it may be split: the most of it in vram:0, 1.0 MiB streamed from RAM; \
         without m1 the rest fits in vram:0"
    );
}

#[test]
fn what_is_left_out_takes_what_needs_it_along_and_leaves_what_others_share() {
    let base = |name: &str, first: u8, unet| {
        let part = |part, kind, n, kib| test_utils::component(name, part, kind, n, kib);
        let parts = vec![
            part("text_encoder", Kind::TextEncoder, 1, 2048),
            part("unet", Kind::Unet, first, unet),
        ];
        test_utils::model(name, Kind::Pipeline, Some("sdxl"), parts)
    };
    let catalogue = test_utils::catalogue([
        base("large", 2, 6144),
        base("small", 3, 3072),
        test_utils::adapter("style", Kind::Lora, 4, Some("sdxl"), Some("small")),
    ]);
    let names = ["large", "small", "style"].map(String::from);
    let set = resolve(&catalogue, &[], &names, true).unwrap();
    let none = BTreeMap::new();
    let refused = |mib| {
        let tiers = [tier(GPU, mib, &[]), tier(Tier::Ram, 1, &[])];
        planner(&tiers, &none)
            .plan(&set, Target::Best)
            .unwrap_err()
            .to_string()
    };
    // 11.06 MiB in all: without the adapter alone it is too much still, and its base goes with it.
    let text = refused(9);
    assert!(
        text.ends_with("without small and style the rest fits in vram:0"),
        "{text}"
    );
    // The text encoder is needed by the other one as well.
    let text = refused(6);
    assert!(
        text.ends_with("without large the rest fits in vram:0"),
        "{text}"
    );
    let text = refused(4);
    assert!(
        text.ends_with("raise the budget, or choose another tier"),
        "{text}"
    );
}

#[test]
fn device_memory_is_counted_in_granules() {
    let granules = BTreeMap::from([(GpuIndex(0), Granules::whole(Bytes::mib(2)))]);
    let tiers = [tier(GPU, 8, &[]), tier(Tier::Ram, 16, &[])];
    let plan = planner(&tiers, &granules)
        .plan(&set(&[component(1, 10), component(2, 2049)]), Target::Best)
        .unwrap();
    assert_eq!(plan.steps[0].bytes, Bytes::mib(2));
    assert_eq!(plan.steps[1].bytes, Bytes::mib(4));
}

#[test]
fn evictions_are_foreseen_and_spare_what_the_set_itself_wants() {
    let (a, b, c) = (component(1, 3072), component(2, 3072), component(3, 3072));
    // Both are held by nobody; `a` is older, but wanted.
    let tiers = [
        tier(GPU, 8, &[(&a, false), (&b, false)]),
        tier(Tier::Ram, 16, &[]),
    ];
    let wanted = [a.clone(), c.clone()];
    let plan_of_both = plan(&tiers, &wanted, Target::Best).unwrap();
    assert_eq!(plan_of_both.fit, Fit::AfterEviction);
    let none = BTreeMap::new();
    let evictions = planner(&tiers, &none).foresee(&plan_of_both, &mut Lru);
    let gone: Vec<_> = evictions.iter().map(|e| e.component.to_string()).collect();
    assert_eq!(gone, ["m2/weights"]);

    let tiers = [
        tier(GPU, 8, &[(&a, false), (&b, true)]),
        tier(Tier::Ram, 16, &[]),
    ];
    let waits = plan(&tiers, &wanted, Target::Best).unwrap();
    assert_eq!(waits.fit, Fit::AfterOthers);
}

#[test]
fn what_is_in_ram_and_the_rest_of_the_set_fit_together_or_one_is_streamed() {
    let (small, large) = (component(1, 3072), component(2, 6144));
    // Nobody holds the large one, so it could make room; but the set wants it too.
    let tiers = [tier(GPU, 16, &[]), tier(Tier::Ram, 8, &[(&large, false)])];
    let together = plan(&tiers, &[small.clone(), large.clone()], Target::Best).unwrap();
    let routes: Vec<Route> = together.steps.iter().map(|step| step.route).collect();
    assert_eq!(routes, [Route::Ring, Route::ViaRam]);
    assert_eq!(together.needs[&Tier::Ram], Bytes::mib(1), "the ring alone");
    // Others hold it, and beside it the ring has no room: then it is not waited for either.
    let small = component(3, 1024);
    let tight = component(4, 7680);
    let tiers = [tier(GPU, 16, &[]), tier(Tier::Ram, 8, &[(&tight, true)])];
    let alone = plan(&tiers, &[small, tight], Target::Best).unwrap();
    let routes: Vec<Route> = alone.steps.iter().map(|step| step.route).collect();
    assert_eq!(routes, [Route::Ring, Route::Ring]);
}

#[test]
fn what_ram_has_no_room_for_is_streamed() {
    let (a, b, held) = (component(1, 2048), component(2, 6144), component(3, 3072));
    let tiers = [tier(GPU, 16, &[]), tier(Tier::Ram, 8, &[(&held, true)])];
    let plan = plan(&tiers, &[a, b], Target::Best).unwrap();
    assert_eq!(plan.steps[0].route, Route::ViaRam);
    assert_eq!(plan.steps[1].route, Route::Ring);
    assert_eq!(plan.ring, Bytes::mib(1));
    assert_eq!(
        plan.needs[&Tier::Ram],
        Bytes::mib(3),
        "the slab of the first, and the ring"
    );
    assert_eq!(plan.stage_wants().len(), 2);
}

#[test]
fn a_gpu_out_of_service_is_not_chosen() {
    let a = component(1, 1024);
    let mut broken = tier(GPU, 64, &[(&a, false)]);
    broken.out_of_service = Some("Xid 79".into());
    let tiers = [
        broken.clone(),
        tier(OTHER, 8, &[]),
        tier(Tier::Ram, 16, &[]),
    ];
    assert_eq!(
        plan(&tiers, std::slice::from_ref(&a), Target::Best)
            .unwrap()
            .tier,
        OTHER
    );
    let alone = [broken, tier(Tier::Ram, 16, &[])];
    let refused = plan(&alone, &[a], Target::Best).unwrap_err();
    assert!(refused.to_string().contains("Xid 79"), "{refused}");
}

proptest! {
    /// Whatever the machine holds: a plan never promises more than a budget, lists each component once, and what it
    /// foresees to evict frees enough and nothing that is leased or wanted.
    #[test]
    fn a_plan_keeps_its_promises(
        sizes in proptest::collection::vec(1_u64..5000, 1..8),
        there in proptest::collection::vec((0_u8..12, any::<bool>()), 0..6),
        vram in 1_u64..16,
        ram in 1_u64..16,
    ) {
        let all: Vec<_> = (0..12).map(|n| component(n, *sizes.get(usize::from(n)).unwrap_or(&500))).collect();
        let wanted = &all[..sizes.len()];
        let mut held: Vec<(&Arc<Component>, bool)> = Vec::new();
        let mut used = 0;
        for (n, leased) in &there {
            let component = &all[usize::from(*n)];
            let fits = used + component.bytes.get() <= Bytes::mib(vram).get();
            if fits && !held.iter().any(|(h, _)| h.id == component.id) {
                used += component.bytes.get();
                held.push((component, *leased));
            }
        }
        let tiers = [tier(GPU, vram, &held), tier(Tier::Ram, ram, &[])];
        let Ok(made) = plan(&tiers, wanted, Target::Best) else {
            let whole: u64 = wanted.iter().map(|c| c.bytes.get()).sum();
            prop_assert!(whole > Bytes::mib(vram).get(), "refused what fits");
            return Ok(());
        };
        prop_assert_eq!(made.steps.len(), wanted.len());
        for (tier, needed) in &made.needs {
            let view = tiers.iter().find(|view| view.tier == *tier).unwrap();
            prop_assert!(*needed <= view.budget);
        }
        let none = BTreeMap::new();
        let evictions = planner(&tiers, &none).foresee(&made, &mut Lru);
        let on_gpu: Bytes = evictions.iter().filter(|e| e.tier == GPU).map(|e| e.bytes).sum();
        if made.fit == Fit::AfterEviction {
            prop_assert!(on_gpu + tiers[0].free() >= made.needs[&GPU]);
        }
        for eviction in &evictions {
            prop_assert!(!wanted.iter().any(|c| c.id == eviction.component));
            prop_assert!(!held.iter().any(|(c, leased)| *leased && c.id == eviction.component));
        }
    }
}

const THIRD: Tier = Tier::Vram(GpuIndex(2));

fn link(direct: bool, distance: u32) -> Link {
    Link { direct, distance }
}

#[test]
fn what_another_gpu_holds_comes_from_there() {
    let (a, b) = (component(1, 512), component(2, 512));
    let tiers = [
        tier(GPU, 4, &[(&a, false)]),
        tier(OTHER, 4, &[]),
        tier(Tier::Ram, 4, &[]),
    ];
    let granules = BTreeMap::new();
    let plan = |tiers: &[TierView], links: &Links| {
        let planner = Planner {
            links,
            ..planner(tiers, &granules)
        };
        let set = set(&[a.clone(), b.clone()]);
        planner.plan(&set, Target::Gpu(GpuIndex(1))).unwrap()
    };
    let way = |plan: &Plan, component: &Arc<Component>| {
        let found = plan
            .steps
            .iter()
            .find(|step| step.component.id == component.id);
        found.map(|step| (step.route, step.peer)).unwrap()
    };
    let pair = (GpuIndex(0), GpuIndex(1));
    let peer = (Route::Peer, Some(GpuIndex(0)));
    for direct in [true, false] {
        let plan = plan(&tiers, &Links::from([(pair, link(direct, 0))]));
        assert_eq!(way(&plan, &a), peer);
        assert_eq!(way(&plan, &b), (Route::ViaRam, None));
        assert_eq!(plan.stage_wants().len(), 1, "RAM is only needed for one");
        assert_eq!(plan.needs[&Tier::Ram], b.ram_bytes());
    }
    assert_eq!(way(&plan(&tiers, &NO_LINKS), &a), (Route::ViaRam, None));
    // Where RAM has it as well, only a link of their own is better.
    let mut in_ram = tiers;
    in_ram[2] = tier(Tier::Ram, 4, &[(&a, false)]);
    let through_host = plan(&in_ram, &Links::from([(pair, link(false, 0))]));
    assert_eq!(way(&through_host, &a), (Route::ViaRam, None));
    let direct = plan(&in_ram, &Links::from([(pair, link(true, 0))]));
    assert_eq!(way(&direct, &a), peer);
    // A GPU that is out of service gives nothing.
    in_ram[0].out_of_service = Some("it is lost".into());
    let lost = plan(&in_ram, &Links::from([(pair, link(true, 0))]));
    assert_eq!(way(&lost, &a), (Route::ViaRam, None));
}

#[test]
fn of_equal_gpus_the_nearest_to_what_others_hold_is_chosen() {
    let (a, b) = (component(1, 512), component(2, 512));
    // The holder of one has no room for both.
    let tiers = [
        tier(GPU, 0, &[(&a, true)]),
        tier(OTHER, 4, &[]),
        tier(THIRD, 4, &[]),
        tier(Tier::Ram, 4, &[]),
    ];
    let granules = BTreeMap::new();
    let chosen = |links: &Links| {
        let planner = Planner {
            links,
            ..planner(&tiers, &granules)
        };
        let set = set(&[a.clone(), b.clone()]);
        planner.plan(&set, Target::Best).unwrap().tier
    };
    let links = |second: Link, third: Link| {
        Links::from([
            ((GpuIndex(0), GpuIndex(1)), second),
            ((GpuIndex(0), GpuIndex(2)), third),
        ])
    };
    assert_eq!(chosen(&NO_LINKS), OTHER, "the first");
    assert_eq!(chosen(&links(link(true, 3), link(true, 1))), THIRD);
    assert_eq!(chosen(&links(link(true, 1), link(true, 3))), OTHER);
    assert_eq!(chosen(&links(link(false, 0), link(true, 9))), THIRD);
}
