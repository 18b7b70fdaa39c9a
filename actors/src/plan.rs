//! Plans as loads and clients ask for them: names in, by the catalogue and the books as they are.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use hotset_core::catalog::Component;
use hotset_core::io::ReadError;
use hotset_core::memory::{FlightFailure, TierView};
use hotset_core::plan::{
    Blocks, BlocksOf, ComponentSet, MixPlan, MixSet, Plan, PlanError, Target, resolve,
    suggest_variant,
};
use hotset_core::{Bytes, ComponentId, ContentId, GpuIndex, Tier};

use tokio::sync::OnceCell;

use crate::house::House;
use crate::loading::LoadError;

/// The GPUs that a mix may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GpuChoice {
    /// All.
    All,
    /// These, as they are.
    Only(Vec<GpuIndex>),
    /// Empty ones of these budgets, that need not exist.
    Imagined(Vec<Bytes>),
}

/// Components whose blocks are remembered.
const MOST_KEPT: usize = 256;

/// The blocks of a component; `None`: it has none.
type Found = Arc<OnceCell<Option<Arc<Blocks>>>>;

/// Blocks of components that had to be split, so that their headers are read once.
#[derive(Debug, Default)]
pub(crate) struct KnownBlocks {
    kept: Mutex<HashMap<ContentId, Found>>,
}

impl KnownBlocks {
    fn cell(&self, content: ContentId) -> Found {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= MOST_KEPT && !kept.contains_key(&content) {
            kept.clear();
        }
        kept.entry(content).or_default().clone()
    }

    /// The blocks of a component, by the headers of its files where they are not known. Who asks while they are being read
    /// waits for that.
    async fn of(
        &self,
        house: &House,
        component: &Arc<Component>,
    ) -> Result<Option<Arc<Blocks>>, LoadError> {
        let read = async || {
            let open = house.reader.open(component.clone()).await?;
            Ok(Blocks::of(component, open.table()).map(Arc::new))
        };
        let cell = self.cell(component.content_id);
        let known = cell.get_or_try_init(read).await;
        known
            .cloned()
            .map_err(|error: ReadError| LoadError::Component {
                component: component.id.clone(),
                failure: FlightFailure::Read(Arc::new(error)),
            })
    }
}

/// The plan for a set as things stand, whole, and the generation of the catalogue that it is made by.
pub(crate) fn whole(house: &House, set: &ComponentSet) -> Result<(Plan, u64), LoadError> {
    let catalogue = house.catalogue.load();
    let graph = resolve(&catalogue, &house.config.set, &set.names, set.dependencies)?;
    let plan = house.outlook().planner().plan(&graph, set.target);
    let plan = plan.map_err(|mut error| {
        suggest_variant(&mut error, &catalogue, &graph.order());
        error
    })?;
    Ok((plan, catalogue.generation()))
}

/// The same, where the set may be split, with the blocks of its components where it has to be.
pub(crate) async fn make(house: &House, set: &ComponentSet) -> Result<(Plan, u64), LoadError> {
    match whole(house, set) {
        Err(LoadError::Plan(PlanError::NeverFits { .. })) if set.split => {}
        planned => return planned,
    }
    let catalogue = house.catalogue.load();
    let graph = resolve(&catalogue, &house.config.set, &set.names, set.dependencies)?;
    let mut blocks = BlocksOf::new();
    for component in graph.order() {
        if let Some(found) = house.blocks.of(house, &component).await? {
            blocks.insert(component.content_id, found);
        }
    }
    let outlook = house.outlook();
    let plan = outlook.planner().plan_split(&graph, set.target, &blocks)?;
    Ok((plan, catalogue.generation()))
}

/// The components that a set's names mean, as far as that is known: for the record of a set that there is no plan for.
pub(crate) fn concerned(house: &House, set: &ComponentSet) -> Vec<ComponentId> {
    let catalogue = house.catalogue.load();
    let of = |names: &[String], dependencies| {
        let graph = resolve(&catalogue, &house.config.set, names, dependencies);
        let components = graph.map(|graph| graph.order()).unwrap_or_default();
        components.into_iter().map(|c| c.id.clone())
    };
    let all: Vec<ComponentId> = of(&set.names, set.dependencies).collect();
    if !all.is_empty() {
        return all;
    }
    // They make no set together, but each may mean something.
    let each = set
        .names
        .iter()
        .flat_map(|name| of(std::slice::from_ref(name), false));
    each.collect()
}

/// A plan with what it would evict and how long it takes.
pub(crate) fn foreseen(house: &House, mut plan: Plan) -> Plan {
    let outlook = house.outlook();
    let planner = outlook.planner();
    plan.evictions = planner.foresee(&plan, (house.eviction)().as_mut());
    planner.time(&mut plan);
    plan
}

/// A plan for several sets together.
pub(crate) fn mix(
    house: &House,
    sets: &[ComponentSet],
    gpus: &GpuChoice,
) -> Result<MixPlan, LoadError> {
    let catalogue = house.catalogue.load();
    let mut mix = Vec::with_capacity(sets.len());
    for set in sets {
        mix.push(MixSet {
            name: set.names.join(" + "),
            graph: resolve(&catalogue, &house.config.set, &set.names, set.dependencies)?,
            target: set.target,
        });
    }
    let mut outlook = house.outlook();
    outlook.tiers = chosen(outlook.tiers, gpus)?;
    let policy = || (house.eviction)();
    Ok(outlook.planner().plan_mix(&mix, policy))
}

/// The tiers with these GPUs alone.
fn chosen(mut tiers: Vec<TierView>, gpus: &GpuChoice) -> Result<Vec<TierView>, PlanError> {
    match gpus {
        GpuChoice::All => {}
        GpuChoice::Only(gpus) => {
            let missing = gpus
                .iter()
                .find(|gpu| tiers.iter().all(|view| view.tier != Tier::Vram(**gpu)));
            if let Some(missing) = missing {
                return Err(PlanError::NoSuchTier {
                    target: Target::Gpu(*missing),
                    available: tiers.iter().map(|view| view.tier).collect(),
                });
            }
            tiers.retain(|view| match view.tier {
                Tier::Ram => true,
                Tier::Vram(gpu) => gpus.contains(&gpu),
            });
        }
        GpuChoice::Imagined(budgets) => {
            tiers.retain(|view| view.tier == Tier::Ram);
            let imagined = (0..)
                .map(GpuIndex)
                .zip(budgets)
                .map(|(gpu, budget)| TierView {
                    tier: Tier::Vram(gpu),
                    budget: *budget,
                    committed: Bytes::ZERO,
                    evicting: Bytes::ZERO,
                    out_of_service: None,
                    residencies: Vec::new(),
                });
            tiers.extend(imagined);
            tiers.sort_by_key(|view| view.tier);
        }
    }
    Ok(tiers)
}
