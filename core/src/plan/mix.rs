//! Several sets that are wanted at the same time: which GPU each gets, what goes for them, how long it takes, and what one
//! would have to give up where not all of them fit.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::Serialize;

use super::allocate::{Allocation, Mix, allocate};
use super::estimate::Estimate;
use super::graph::DependencyGraph;
use super::place::Planner;
use super::rates::Way;
use super::refusal::PlanError;
use super::set::Target;
use super::steps::{Fit, Plan};
use crate::catalog::Component;
use crate::ids::{ComponentId, Tier};
use crate::memory::{ResidencyView, TierView};
use crate::policy::EvictionPolicy;
use crate::units::Bytes;

/// A set of a mix.
#[derive(Debug, Clone)]
pub struct MixSet {
    /// What it is called in the answer.
    pub name: String,
    /// Its components.
    pub graph: DependencyGraph,
    /// Where it may go.
    pub target: Target,
}

/// What is proposed for a mix.
#[derive(Debug, Clone, Serialize)]
pub struct MixPlan {
    /// Whether all sets can be there at the same time, without anybody letting go of what he holds.
    pub fits: bool,
    /// How long it takes to load them all.
    pub estimate: Estimate,
    /// Each set, as it was asked for.
    pub sets: Vec<SetPlan>,
    /// What would help those that are left out: any one of these does.
    pub give_up: Vec<GiveUp>,
}

/// One set of a mix.
#[derive(Debug, Clone, Serialize)]
pub struct SetPlan {
    /// What it is called.
    pub name: String,
    /// Its plan, beside those of the sets before it. `None`: it is left out.
    pub plan: Option<Plan>,
    /// Why it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What one could do without.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "give_up", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum GiveUp {
    /// Without these sets, all others fit.
    Sets {
        /// Their names.
        names: Vec<String>,
    },
    /// Once these leases are released, all sets fit.
    Leases {
        /// Where.
        tier: Tier,
        /// On what, the largest first.
        components: Vec<ComponentId>,
        /// What they hold there.
        bytes: Bytes,
    },
}

/// What is looked into for a set that is left out: more sets than this are not tried one by one.
const MOST_TRIED: usize = 64;

impl Planner<'_> {
    /// Plans several sets together. `policy` gives a new policy, for what it would evict.
    #[must_use]
    pub fn plan_mix(
        &self,
        sets: &[MixSet],
        mut policy: impl FnMut() -> Box<dyn EvictionPolicy>,
    ) -> MixPlan {
        let orders: Vec<Vec<Arc<Component>>> = sets.iter().map(|set| set.graph.order()).collect();
        let (mix, views, on_gpus) = self.mix_of(sets, &orders);
        let allocation = allocate(&mix);
        let mut tiers = self.tiers.to_vec();
        let mut places: Vec<Option<Target>> = sets.iter().map(|set| Some(set.target)).collect();
        for (at, set) in on_gpus.iter().enumerate() {
            let place = allocation.places.get(at).copied().flatten();
            let tier = place.and_then(|place| Some(views.get(place)?.tier));
            if let Some(slot) = places.get_mut(*set) {
                *slot = tier.map(target_of);
            }
            // What a set of the mix wants is not evicted for another one.
            for component in orders.get(*set).into_iter().flatten() {
                pin(&mut tiers, tier, component);
            }
        }
        let mut busy: BTreeMap<Way, f64> = BTreeMap::new();
        let mut assumed = BTreeSet::new();
        let mut first_s = f64::INFINITY;
        let mut planned = Vec::with_capacity(sets.len());
        for ((set, place), order) in sets.iter().zip(&places).zip(&orders) {
            let planner = Planner {
                tiers: &tiers,
                ..*self
            };
            let plan = place
                .ok_or_else(|| planner.why_not(order, set))
                .and_then(|target| planner.plan(&set.graph, target).map_err(|e| e.to_string()));
            let plan = plan.and_then(|mut plan| match plan.fit {
                Fit::AfterOthers => Err(planner.why_not(order, set)),
                Fit::Now | Fit::AfterEviction => {
                    plan.evictions = planner.foresee(&plan, policy().as_mut());
                    planner.time(&mut plan);
                    for step in &plan.steps {
                        for (way, seconds) in planner.moves(step) {
                            *busy.entry(way).or_default() += seconds;
                        }
                    }
                    if let Some(estimate) = &plan.estimate {
                        assumed.extend(estimate.assumed.iter().copied());
                        first_s = first_s.min(estimate.first_s);
                    }
                    Ok(plan)
                }
            });
            if let Ok(plan) = &plan {
                carry_out(&mut tiers, plan);
            }
            let (plan, reason) = match plan {
                Ok(plan) => (Some(plan), None),
                Err(reason) => (None, Some(reason)),
            };
            planned.push(SetPlan {
                name: set.name.clone(),
                plan,
                reason,
            });
        }
        let fits = planned.iter().all(|set| set.plan.is_some());
        MixPlan {
            fits,
            estimate: Estimate {
                seconds: busy.values().copied().fold(0.0, f64::max),
                first_s: if first_s.is_finite() { first_s } else { 0.0 },
                assumed,
            },
            give_up: if fits {
                Vec::new()
            } else {
                self.give_up(sets, &on_gpus, &mix, &views, &allocation)
            },
            sets: planned,
        }
    }

    /// The sets that go to GPUs, what there is for them, and which sets they are.
    fn mix_of(
        &self,
        sets: &[MixSet],
        orders: &[Vec<Arc<Component>>],
    ) -> (Mix, Vec<&TierView>, Vec<usize>) {
        let views: Vec<&TierView> = self
            .tiers
            .iter()
            .filter(|view| view.tier != Tier::Ram && view.out_of_service.is_none())
            .collect();
        let on_gpus: Vec<usize> = (0..sets.len())
            .filter(|i| match sets.get(*i).map(|set| set.target) {
                Some(Target::Ram) | None => false,
                Some(Target::Best) => !views.is_empty(),
                Some(Target::AnyGpu | Target::Gpu(_)) => true,
            })
            .collect();
        let wanted: Vec<&[Arc<Component>]> = on_gpus
            .iter()
            .filter_map(|i| orders.get(*i).map(Vec::as_slice))
            .collect();
        let mut mix = self.mix(&wanted, &views);
        for (wanted, set) in mix.sets.iter_mut().zip(&on_gpus) {
            if let Some(Target::Gpu(gpu)) = sets.get(*set).map(|set| set.target) {
                let at = views.iter().position(|view| view.tier == Tier::Vram(gpu));
                // One that is not there is a place that no offer has.
                wanted.among = vec![at.unwrap_or(usize::MAX)];
            }
        }
        (mix, views, on_gpus)
    }

    fn why_not(&self, order: &[Arc<Component>], set: &MixSet) -> String {
        match self.plan(&set.graph, set.target) {
            Err(error @ PlanError::NeverFits { .. } | error @ PlanError::NoSuchTier { .. }) => {
                error.to_string()
            }
            Ok(plan) => {
                let needed: Bytes = order.iter().map(|c| self.bytes_in(plan.tier, c)).sum();
                format!(
                    "no tier has room for its {needed} beside the other sets and what is leased"
                )
            }
        }
    }

    fn give_up(
        &self,
        sets: &[MixSet],
        on_gpus: &[usize],
        mix: &Mix,
        views: &[&TierView],
        allocation: &Allocation,
    ) -> Vec<GiveUp> {
        let mut found = Vec::new();
        let name = |at: &usize| {
            let set = on_gpus.get(*at).and_then(|set| sets.get(*set));
            set.map(|set| set.name.clone()).unwrap_or_default()
        };
        let bytes = |at: &usize| -> Bytes {
            let parts = mix.sets.get(*at).into_iter().flat_map(|set| &set.parts);
            parts
                .filter_map(|i| mix.parts.get(*i))
                .map(|p| p.bytes)
                .sum()
        };
        let fits_without = |gone: &[usize]| {
            let mut rest = mix.clone();
            for at in gone {
                if let Some(set) = rest.sets.get_mut(*at) {
                    set.parts.clear();
                    set.among.clear();
                }
            }
            allocate(&rest).left_out() == 0
        };
        if allocation.left_out() > 0 {
            let mut by_bytes: Vec<usize> = (0..on_gpus.len().min(MOST_TRIED)).collect();
            by_bytes.sort_by_key(bytes);
            let alone = by_bytes.iter().filter(|at| fits_without(&[**at]));
            found.extend(alone.map(|at| GiveUp::Sets {
                names: vec![name(at)],
            }));
            if found.is_empty() {
                // Those that found no place are always enough.
                let left = (0..on_gpus.len())
                    .filter(|at| allocation.places.get(*at).is_some_and(Option::is_none));
                let names: Vec<String> = left.map(|at| name(&at)).collect();
                // Without any there is nothing to fit.
                if names.len() < sets.len() {
                    found.push(GiveUp::Sets { names });
                }
            }
            for (at, view) in views.iter().enumerate() {
                let mut released = mix.clone();
                if let Some(offer) = released.offers.get_mut(at) {
                    for resident in &mut offer.residents {
                        resident.loss_s.get_or_insert(0.0);
                    }
                }
                let held: Vec<&ResidencyView> =
                    view.residencies.iter().filter(|r| r.leases > 0).collect();
                if !held.is_empty() && allocate(&released).left_out() == 0 {
                    found.push(GiveUp::Leases {
                        tier: view.tier,
                        components: held.iter().map(|r| r.component.id.clone()).collect(),
                        bytes: held.iter().map(|r| r.bytes).sum(),
                    });
                }
            }
        }
        found
    }
}

const fn target_of(tier: Tier) -> Target {
    match tier {
        Tier::Ram => Target::Ram,
        Tier::Vram(gpu) => Target::Gpu(gpu),
    }
}

fn pin(tiers: &mut [TierView], tier: Option<Tier>, component: &Component) {
    let view = tiers.iter_mut().find(|view| Some(view.tier) == tier);
    for residency in view.into_iter().flat_map(|view| &mut view.residencies) {
        if residency.component.content_id == component.content_id {
            residency.pins = residency.pins.max(1);
        }
    }
}

/// The books as they are once a plan is carried out.
fn carry_out(tiers: &mut [TierView], plan: &Plan) {
    for eviction in &plan.evictions {
        let Some(view) = tiers.iter_mut().find(|view| view.tier == eviction.tier) else {
            continue;
        };
        view.residencies
            .retain(|r| r.component.id != eviction.component);
        view.committed = view.committed.saturating_sub(eviction.bytes);
    }
    for step in &plan.steps {
        let Some(view) = tiers.iter_mut().find(|view| view.tier == step.tier) else {
            continue;
        };
        let content = step.component.content_id;
        match view
            .residencies
            .iter_mut()
            .find(|r| r.component.content_id == content)
        {
            Some(residency) => residency.pins = residency.pins.max(1),
            None => {
                view.committed = view.committed.saturating_add(step.bytes);
                view.residencies.push(ResidencyView {
                    component: step.component.clone(),
                    bytes: step.bytes,
                    loading: false,
                    pins: 1,
                    leases: 1,
                    uses: 1,
                    admitted: std::time::Duration::ZERO,
                    last_used: std::time::Duration::ZERO,
                    load_time: None,
                    prefetched: false,
                });
            }
        }
    }
}

#[cfg(test)]
mod tests;
