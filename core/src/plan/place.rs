//! Where a set goes, whether it fits, and what would have to go.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::allocate::{Mix, Offer, Part, Resident, Wanted, prices};
use super::graph::DependencyGraph;
use super::rates::{Rates, Way};
use super::refusal::{PlanError, shortage};
use super::set::Target;
use super::split::BlocksOf;
use super::steps::{Eviction, Fit, Plan, Route, Step, There};
use crate::catalog::Component;
use crate::decision::Alternative;
use crate::device::{Granules, Links};
use crate::ids::{ContentId, GpuIndex, Tier};
use crate::memory::{ResidencyView, TierView};
use crate::policy::worth::expected_loss_s;
use crate::policy::{Candidate, EvictionPolicy, select};
use crate::units::Bytes;

/// Makes plans out of the books as they are.
#[derive(Clone, Copy)]
pub struct Planner<'a> {
    /// All tiers, at one instant.
    pub tiers: &'a [TierView],
    /// How each GPU rounds allocations up.
    pub granules: &'a BTreeMap<GpuIndex, Granules>,
    /// How the GPUs reach each other's memory; empty where none may.
    pub links: &'a Links,
    /// How fast bytes move, as far as that was measured.
    pub rates: &'a Rates,
    /// Host memory for a streamed component.
    pub ring: Bytes,
    /// Time since the start of the system.
    pub now: Duration,
}

impl Planner<'_> {
    /// The plan for a set. What it would evict is not in it; see [`foresee`](Self::foresee).
    ///
    /// # Errors
    /// [`PlanError`] where it could never be carried out.
    pub fn plan(&self, set: &DependencyGraph, target: Target) -> Result<Plan, PlanError> {
        let (tier, alternatives) = self
            .choose(&set.order(), target)
            .map_err(|error| self.with_nearest(error, set, target, true))?;
        let order = set.order_by(|component| self.alone_s(tier, component));
        let places = order.into_iter().map(|component| (component, tier));
        let mut plan = self.lay_out(tier, places)?;
        plan.alternatives = alternatives;
        Ok(plan)
    }

    /// The plan for a set that may be divided where no GPU has room for all of it: components of which the blocks are known
    /// go there in part, and the rest of them into RAM.
    ///
    /// # Errors
    /// [`PlanError`] where it could never be carried out that way either.
    pub fn plan_split(
        &self,
        set: &DependencyGraph,
        target: Target,
        blocks: &BlocksOf,
    ) -> Result<Plan, PlanError> {
        let order = set.order();
        let considered = self.considered(target)?;
        if self.choose(&order, target).is_ok() || considered.iter().any(|v| v.tier == Tier::Ram) {
            return self.plan(set, target);
        }
        let (tier, divided) = self
            .divide(&order, &considered, blocks)
            .map_err(|error| self.with_nearest(error, set, target, false))?;
        self.lay_out(tier, divided)
    }

    fn lay_out(
        &self,
        tier: Tier,
        places: impl IntoIterator<Item = (Arc<Component>, Tier)>,
    ) -> Result<Plan, PlanError> {
        let steps = places
            .into_iter()
            .map(|(component, tier)| Step {
                bytes: self.bytes_in(tier, &component),
                tier,
                there: There::Absent,
                route: Route::None,
                peer: None,
                seconds: 0.0,
                part: component.part.clone(),
                component,
            })
            .collect();
        let mut plan = Plan {
            tier,
            steps,
            needs: BTreeMap::new(),
            evictions: Vec::new(),
            fit: Fit::Now,
            ring: Bytes::ZERO,
            estimate: None,
            alternatives: Vec::new(),
        };
        self.route(&mut plan)?;
        Ok(plan)
    }

    pub(super) fn view(&self, tier: Tier) -> Option<&TierView> {
        self.tiers.iter().find(|view| view.tier == tier)
    }

    pub(super) fn bytes_in(&self, tier: Tier, component: &Component) -> Bytes {
        match tier {
            Tier::Ram => component.ram_bytes(),
            Tier::Vram(gpu) => {
                let bytes = component.device_bytes();
                self.granules
                    .get(&gpu)
                    .map_or(bytes, |granules| granules.footprint(bytes))
            }
        }
    }

    /// What a set takes in a tier.
    pub(super) fn whole(&self, view: &TierView, order: &[Arc<Component>]) -> Bytes {
        order.iter().map(|c| self.bytes_in(view.tier, c)).sum()
    }

    /// The tiers that a target leaves open.
    pub(super) fn considered(&self, target: Target) -> Result<Vec<&TierView>, PlanError> {
        let gpus = || {
            self.tiers
                .iter()
                .filter(|view| matches!(view.tier, Tier::Vram(_)))
        };
        let considered: Vec<&TierView> = match target {
            Target::Ram => self.view(Tier::Ram).into_iter().collect(),
            Target::Gpu(gpu) => self.view(Tier::Vram(gpu)).into_iter().collect(),
            Target::AnyGpu => gpus().collect(),
            Target::Best if gpus().next().is_some() => gpus().collect(),
            Target::Best => self.view(Tier::Ram).into_iter().collect(),
        };
        if considered.is_empty() {
            return Err(PlanError::NoSuchTier {
                target,
                available: self.tiers.iter().map(|view| view.tier).collect(),
            });
        }
        Ok(considered)
    }

    /// The tier for the set: of those that can hold it, the one where it is there soonest, what has to be evicted for it
    /// counted as what it will take to bring it back. Where none has room without waiting, or several are as good: the
    /// one that holds most of it already, then the one with most free bytes, then the one that is nearest to what others
    /// hold of it, then the first.
    fn choose(
        &self,
        order: &[Arc<Component>],
        target: Target,
    ) -> Result<(Tier, Vec<Alternative>), PlanError> {
        let considered = self.considered(target)?;
        let whole = |view: &TierView| self.whole(view, order);
        let mut fitting: Vec<&TierView> = considered
            .iter()
            .filter(|view| view.out_of_service.is_none() && whole(view) <= view.budget)
            .copied()
            .collect();
        fitting.sort_by_cached_key(|view| {
            let held: Bytes = order
                .iter()
                .filter(|c| there(view, &c.content_id) != There::Absent)
                .map(|c| self.bytes_in(view.tier, c))
                .sum();
            let most = std::cmp::Reverse((held, view.free()));
            (most, self.distance(view, order), view.tier)
        });
        let prices = match fitting.len() {
            0 | 1 => vec![None; fitting.len()],
            _ => prices(&self.mix(&[order], &fitting)),
        };
        let alternatives: Vec<Alternative> = fitting
            .iter()
            .zip(&prices)
            .map(|(view, seconds)| Alternative {
                tier: view.tier,
                seconds: *seconds,
                free: view.free(),
            })
            .collect();
        let soonest = prices
            .iter()
            .enumerate()
            .filter_map(|(at, price)| Some((at, (*price)?)))
            // The first of equals.
            .min_by(|(_, a), (_, b)| a.total_cmp(b))
            .map_or(0, |(at, _)| at);
        match fitting.get(soonest) {
            Some(view) => Ok((view.tier, alternatives)),
            None => Err(PlanError::never(
                considered
                    .iter()
                    .map(|view| shortage(view, whole(view), order, |c| self.bytes_in(view.tier, c)))
                    .collect(),
            )),
        }
    }

    /// Sets that are wanted in these tiers, and what is there, in seconds. Components are numbered as they come.
    pub(super) fn mix(&self, sets: &[&[Arc<Component>]], views: &[&TierView]) -> Mix {
        let mut places: HashMap<ContentId, usize> = HashMap::new();
        let mut parts: Vec<Part> = Vec::new();
        let mut components: Vec<Arc<Component>> = Vec::new();
        let mut place = |component: &Arc<Component>, parts: &mut Vec<Part>, bytes: Bytes| {
            *places.entry(component.content_id).or_insert_with(|| {
                let in_ram = self.is_in_ram(&component.content_id);
                let read_s = if in_ram { 0.0 } else { self.read_s(component) };
                parts.push(Part { bytes, read_s });
                components.push(component.clone());
                parts.len() - 1
            })
        };
        let largest = |c: &Arc<Component>| {
            let bytes = views.iter().map(|view| self.bytes_in(view.tier, c)).max();
            bytes.unwrap_or(Bytes::ZERO)
        };
        let wanted: Vec<Wanted> = sets
            .iter()
            .map(|set| {
                let mut wanted = Wanted::default();
                for component in *set {
                    let i = place(component, &mut parts, largest(component));
                    if !wanted.parts.contains(&i) {
                        wanted.parts.push(i);
                    }
                }
                wanted
            })
            .collect();
        let wanted_parts = parts.len();
        let mut offers: Vec<Offer> = views
            .iter()
            .map(|view| Offer {
                gpu: match view.tier {
                    Tier::Vram(gpu) => gpu,
                    Tier::Ram => GpuIndex(u32::MAX),
                },
                free: view.free().saturating_add(view.evicting),
                bytes_per_s: match view.tier {
                    Tier::Vram(gpu) => self.per_s(Way::Link(gpu)),
                    Tier::Ram => f64::INFINITY,
                },
                residents: view
                    .residencies
                    .iter()
                    .map(|residency| Resident {
                        part: place(&residency.component, &mut parts, residency.bytes),
                        loss_s: residency
                            .may_go()
                            .then(|| expected_loss_s(&self.candidate(residency), self.now)),
                    })
                    .collect(),
                near: Vec::new(),
            })
            .collect();
        for (offer, view) in offers.iter_mut().zip(views) {
            let Tier::Vram(to) = view.tier else { continue };
            for (i, component) in components.iter().enumerate().take(wanted_parts) {
                if let Some((from, link)) = self.peer(to, &component.content_id)
                    && link.direct
                {
                    offer.near.push((i, self.peer_s(component, from, to)));
                }
            }
        }
        Mix {
            parts,
            offers,
            sets: wanted,
        }
    }

    pub(super) fn is_in_ram(&self, content: &ContentId) -> bool {
        let ram = self.view(Tier::Ram);
        ram.is_some_and(|ram| there(ram, content) == There::Resident)
    }

    /// The tiers in which the plan needs more than is free, with what is missing and what could go there.
    fn short<'a>(
        &'a self,
        plan: &'a Plan,
    ) -> impl Iterator<Item = (&'a TierView, Bytes, Vec<Candidate>)> {
        plan.needs.iter().filter_map(|(tier, needed)| {
            let view = self.view(*tier).filter(|view| *needed > view.free())?;
            // What it wants elsewhere alone may go from here.
            let through = |step: &Step| *tier == Tier::Ram && step.route == Route::ViaRam;
            let own: HashSet<ContentId> = plan
                .steps
                .iter()
                .filter(|step| step.tier == *tier || through(step))
                .map(|step| step.component.content_id)
                .collect();
            let mut others: Vec<Candidate> = evictable(view)
                .map(|residency| self.candidate(residency))
                .collect();
            others.retain(|c| !own.contains(&c.content));
            Some((view, needed.saturating_sub(view.free()), others))
        })
    }

    pub(super) fn fit(&self, plan: &Plan) -> Fit {
        let mut fit = Fit::Now;
        for (_, missing, others) in self.short(plan) {
            let evictable: Bytes = others.iter().map(|c| c.bytes).sum();
            if evictable < missing {
                return Fit::AfterOthers;
            }
            fit = Fit::AfterEviction;
        }
        fit
    }

    /// What this policy would evict for the plan, as things stand.
    #[must_use]
    pub fn foresee(&self, plan: &Plan, policy: &mut dyn EvictionPolicy) -> Vec<Eviction> {
        let mut evictions = Vec::new();
        for (view, missing, others) in self.short(plan) {
            for victim in select(policy, self.now, &others, missing) {
                let residency = view
                    .residencies
                    .iter()
                    .find(|r| r.component.content_id == victim.content);
                evictions.extend(residency.map(|residency| Eviction {
                    tier: view.tier,
                    component: residency.component.id.clone(),
                    bytes: residency.bytes,
                    reason: victim.reason,
                }));
            }
        }
        evictions
    }
}

pub(super) fn there(view: &TierView, content: &ContentId) -> There {
    match view
        .residencies
        .iter()
        .find(|residency| residency.component.content_id == *content)
    {
        None => There::Absent,
        Some(residency) if residency.loading => There::Loading,
        Some(_) => There::Resident,
    }
}

/// What could be evicted from a tier.
pub(super) fn evictable(view: &TierView) -> impl Iterator<Item = &ResidencyView> {
    let residencies = view.residencies.iter();
    residencies.filter(|residency| residency.may_go())
}

impl Planner<'_> {
    /// A residency as policies see it. Restoring it is taken to last as long as its load did, where there was one.
    fn candidate(&self, residency: &ResidencyView) -> Candidate {
        let took = residency.load_time.map(|took| took.as_secs_f64());
        residency.candidate(took.unwrap_or_else(|| self.read_s(&residency.component)))
    }
}

#[cfg(test)]
mod tests;
