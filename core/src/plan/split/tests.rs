use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::catalog::Kind;
use crate::ids::GpuIndex;
use crate::memory::ResidencyView;
use crate::plan::rates::Rates;
use crate::plan::{Placement, Plan, Target, resolve, test_utils};
use crate::tensor::{Dtype, TensorEntry};

/// A component of one file with these tensors one after the other, behind a header of 1000 bytes.
fn component(tensors: &[(String, u64)]) -> (Arc<Component>, TensorTable) {
    let mut offset = 1000;
    let entries = tensors.iter().map(|(name, bytes)| {
        let entry = TensorEntry {
            name: name.as_str().into(),
            dtype: Dtype::U8,
            shape: vec![*bytes as usize],
            offset,
            bytes: *bytes,
        };
        offset += bytes;
        entry
    });
    let table = TensorTable::new(entries.collect()).unwrap();
    let mut component = Component::clone(&test_utils::component("m", "unet", Kind::Unet, 1, 0));
    component.bytes = Bytes(offset - 1000);
    component.tensors = tensors.len() as u32;
    component.files[0].identity.size = Bytes(offset);
    (Arc::new(component), table)
}

fn named(names: &[&str]) -> Option<Blocks> {
    let tensors: Vec<_> = names.iter().map(|name| ((*name).to_owned(), 100)).collect();
    let (component, table) = component(&tensors);
    Blocks::of(&component, &table)
}

fn order(names: &[&str]) -> Vec<String> {
    let blocks = named(names).unwrap();
    let part = blocks.part(0..blocks.len());
    part.part
        .unwrap()
        .blocks
        .iter()
        .map(ToString::to_string)
        .collect()
}

#[test]
fn blocks_come_in_the_order_in_which_they_are_used() {
    assert_eq!(
        order(&[
            "model.embed.weight",
            "model.layers.10.a",
            "model.layers.2.a",
            "model.layers.2.b",
            "norm"
        ]),
        ["model.layers.2.", "model.layers.10."]
    );
    assert_eq!(
        order(&[
            "single_transformer_blocks.0.a",
            "transformer_blocks.0.a",
            "x_embedder.weight"
        ]),
        ["transformer_blocks.0.", "single_transformer_blocks.0."]
    );
    assert_eq!(
        order(&[
            "up_blocks.0.a",
            "mid_block.resnets.0.a",
            "down_blocks.1.resnets.0.a",
            "conv_in.weight"
        ]),
        ["down_blocks.1.", "mid_block.resnets.0.", "up_blocks.0."]
    );
}

#[test]
fn what_cannot_be_told_apart_is_not_divided() {
    assert!(named(&["a", "b.c"]).is_none());
    assert!(named(&["layers.0.a", "norm"]).is_none(), "one block");
    assert!(
        named(&["h", "h.0.a", "h.1.a"]).is_none(),
        "`h` begins like the blocks"
    );
    assert!(named(&["layers.00.a", "layers.01.a"]).is_none());
    assert!(
        named(&["layers.0", "layers.1"]).is_none(),
        "numbers that name tensors"
    );
}

fn plan(
    component: &Arc<Component>,
    table: &TensorTable,
    vram: Bytes,
    ram: Bytes,
) -> Result<Plan, PlanError> {
    let open = |tier, budget| TierView {
        tier,
        budget,
        committed: Bytes::ZERO,
        evicting: Bytes::ZERO,
        out_of_service: None,
        residencies: Vec::new(),
    };
    let tiers = [open(Tier::Vram(GpuIndex(0)), vram), open(Tier::Ram, ram)];
    let (granules, links, rates) = (BTreeMap::new(), BTreeMap::new(), Rates::default());
    let planner = Planner {
        tiers: &tiers,
        granules: &granules,
        links: &links,
        rates: &rates,
        ring: Bytes::kib(8),
        now: Duration::ZERO,
    };
    let model = test_utils::model("m", Kind::Unet, None, vec![component.clone()]);
    let set = resolve(&test_utils::catalogue([model]), &[], &["m".into()], true).unwrap();
    let blocks =
        Blocks::of(component, table).map(|blocks| (component.content_id, Arc::new(blocks)));
    planner.plan_split(&set, Target::Best, &blocks.into_iter().collect())
}

fn blocks_of_100_kib(count: u64) -> (Arc<Component>, TensorTable) {
    let mut tensors = vec![("embed".to_owned(), 50 << 10)];
    tensors.extend((0..count).map(|i| (format!("layers.{i}.w"), 100 << 10)));
    component(&tensors)
}

#[test]
fn as_many_blocks_as_fit_go_to_the_gpu_and_the_rest_to_ram() {
    let (whole, table) = blocks_of_100_kib(10);
    let split = plan(&whole, &table, Bytes::kib(400), Bytes::mib(8)).unwrap();
    let [first, rest] = &split.steps[..] else {
        panic!("{split:?}")
    };
    let (Placement::Split(kept), Placement::Split(streamed)) =
        (first.placement(), rest.placement())
    else {
        panic!("{split:?}");
    };
    assert_eq!(
        (first.tier, rest.tier),
        (Tier::Vram(GpuIndex(0)), Tier::Ram)
    );
    assert_eq!((kept.first, kept.blocks.len(), kept.shared), (0, 3, true));
    assert_eq!(
        (streamed.first, streamed.blocks.len(), streamed.shared),
        (3, 7, false)
    );
    assert_eq!(&*first.component.id.component, "unet[0..3]");
    assert_eq!(first.component.bytes + rest.component.bytes, whole.bytes);
    assert_ne!(first.component.content_id, rest.component.content_id);
    // Where all of it fits, nothing is divided.
    let whole_plan = plan(&whole, &table, Bytes::mib(2), Bytes::mib(8)).unwrap();
    assert_eq!(whole_plan.steps.len(), 1);
    assert_eq!(whole_plan.steps[0].placement(), Placement::Whole);
    // Not even one block: all of it is streamed.
    let none = plan(&whole, &table, Bytes::kib(100), Bytes::mib(8)).unwrap();
    assert_eq!(none.steps[0].tier, Tier::Ram);
}

#[test]
fn of_each_that_is_divided_a_block_stays_and_what_is_on_the_gpu_in_vain_may_go() {
    let (large, large_table) = blocks_of_100_kib(10);
    let (mut small, small_table) = blocks_of_100_kib(9);
    let renamed = Arc::make_mut(&mut small);
    renamed.id.model = "small".into();
    renamed.content_id = ContentId::File([9; 32]);
    let of = |name, component: &Arc<Component>| {
        test_utils::model(name, Kind::Unet, None, vec![component.clone()])
    };
    let catalogue = test_utils::catalogue([of("m", &large), of("small", &small)]);
    let names = ["m".to_owned(), "small".to_owned()];
    let set = resolve(&catalogue, &[], &names, true).unwrap();
    let found = |component, table| Arc::new(Blocks::of(component, table).unwrap());
    let blocks = BlocksOf::from([
        (large.content_id, found(&large, &large_table)),
        (small.content_id, found(&small, &small_table)),
    ]);
    let plan = |tiers: &[TierView]| {
        let planner = Planner {
            tiers,
            granules: &BTreeMap::new(),
            links: &BTreeMap::new(),
            rates: &Rates::default(),
            ring: Bytes::mib(1),
            now: Duration::ZERO,
        };
        planner.plan_split(&set, Target::AnyGpu, &blocks).unwrap()
    };
    let open = |tier, kib, residencies: Vec<ResidencyView>| TierView {
        tier,
        budget: Bytes::kib(kib),
        committed: residencies.iter().map(|r| r.bytes).sum(),
        evicting: Bytes::ZERO,
        out_of_service: None,
        residencies,
    };
    let gpu = Tier::Vram(GpuIndex(0));
    // 1.9 MiB in all, of which 1 MiB has no room: the larger one alone would have to go altogether.
    let empty = [open(Tier::Ram, 8192, vec![]), open(gpu, 900, vec![])];
    let steps = plan(&empty).steps;
    let parts: Vec<&str> = steps
        .iter()
        .map(|step| &*step.component.id.component)
        .collect();
    assert_eq!(
        parts,
        ["unet[0..1]", "unet[1..10]", "unet[0..6]", "unet[6..9]"]
    );
    // What is there in one piece is of no use for a set that wants it in two, so it may go.
    let whole = ResidencyView {
        component: large.clone(),
        bytes: large.bytes,
        loading: false,
        pins: 0,
        leases: 0,
        uses: 1,
        admitted: Duration::ZERO,
        last_used: Duration::ZERO,
        load_time: None,
        prefetched: false,
    };
    let full = [open(Tier::Ram, 8192, vec![]), open(gpu, 1100, vec![whole])];
    assert_eq!(plan(&full).fit, crate::plan::Fit::AfterEviction);
}

#[test]
fn it_is_refused_where_ram_has_no_room_for_the_rest() {
    let (whole, table) = blocks_of_100_kib(10);
    let error = plan(&whole, &table, Bytes::kib(400), Bytes::kib(600)).unwrap_err();
    let said = error.to_string();
    assert!(said.contains("ram has a budget of 600"), "{said}");
    assert!(plan(&whole, &table, Bytes::kib(400), Bytes::kib(800)).is_ok());
}

proptest! {
    #[test]
    fn each_tensor_is_in_one_half_and_its_bytes_are_read(
        sizes in prop::collection::vec((0_u64..12, prop::option::of(0_u64..8), 1_u64..9000), 1..40),
        vram in 1_u64..200_000,
    ) {
        let mut names = std::collections::BTreeMap::new();
        for (i, (number, block, bytes)) in sizes.iter().enumerate() {
            let name = match block {
                Some(block) => format!("layers.{block}.{i}_{number}"),
                None => format!("other_{i}"),
            };
            names.insert(name, *bytes);
        }
        let tensors: Vec<_> = names.into_iter().collect();
        let (whole, table) = component(&tensors);
        let Ok(plan) = plan(&whole, &table, Bytes(vram), Bytes::gib(1)) else { return Ok(()) };
        let gpu: Bytes = plan.steps.iter().filter(|s| s.tier != Tier::Ram).map(|s| s.bytes).sum();
        prop_assert!(gpu <= Bytes(vram));
        let mut seen = 0;
        for tensor in table.iter() {
            let holders: Vec<_> = plan.steps.iter().filter(|step| {
                step.component.selection.as_ref().is_none_or(|s| s.holds(&tensor.name))
            }).collect();
            prop_assert_eq!(holders.len(), 1, "{}", tensor.name);
            seen += 1;
            if let Some(selection) = &holders[0].component.selection {
                let within = selection.ranges.iter().any(|range| {
                    range.start <= tensor.offset && tensor.offset + tensor.bytes <= range.end
                });
                prop_assert!(within, "{}", tensor.name);
            }
        }
        let tensors: u32 = plan.steps.iter().map(|s| s.component.tensors).sum();
        prop_assert_eq!(tensors as usize, seen);
        let bytes: Bytes = plan.steps.iter().map(|s| s.component.bytes).sum();
        prop_assert_eq!(bytes, whole.bytes);
    }
}
