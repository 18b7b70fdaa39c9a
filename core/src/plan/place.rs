//! Where a set goes and by which way, whether it fits, and what would have to go.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::allocate::{Mix, Offer, Part, Resident, Wanted, prices};
use super::estimate::Estimate;
use super::graph::DependencyGraph;
use super::nearest::Nearest;
use super::rates::{Rates, Way};
use super::set::Target;
use super::split::BlocksOf;
use crate::catalog::{self, Component};
use crate::decision::Alternative;
use crate::device::{Granules, Link, Links};
use crate::ids::{ComponentId, ContentId, GpuIndex, Tier};
use crate::memory::{ResidencyView, TierView, Want};
use crate::policy::worth::expected_loss_s;
use crate::policy::{Candidate, EvictionPolicy, select};
use crate::units::Bytes;

/// How a component stands in a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum There {
    /// It is there: it costs nothing.
    Resident,
    /// It is on its way for somebody else: it costs nothing more.
    Loading,
    /// It has to be loaded.
    Absent,
}

/// By which way a component comes to its tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Route {
    /// It is there, or on its way.
    None,
    /// From disk into RAM, and stays there.
    Ram,
    /// From disk into RAM, where it is kept as long as nobody needs the memory, and from there to the GPU.
    ViaRam,
    /// Through a bounded ring of host memory to the GPU, since RAM has no room for all of it.
    Ring,
    /// From another GPU, where it is resident.
    Peer,
}

impl fmt::Display for There {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Resident => "resident",
            Self::Loading => "loading",
            Self::Absent => "absent",
        })
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "-",
            Self::Ram => "disk to RAM",
            Self::ViaRam => "through RAM",
            Self::Ring => "streamed",
            Self::Peer => "from another GPU",
        })
    }
}

impl fmt::Display for Fit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Now => "fits now",
            Self::AfterEviction => "fits once the evictions are made",
            Self::AfterOthers => "fits once others release what they hold",
        })
    }
}

/// One component of a plan.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    /// Which.
    #[serde(serialize_with = "id_of")]
    pub component: Arc<Component>,
    /// Where it goes: the plan's tier, or RAM for blocks that a GPU has no room for.
    pub tier: Tier,
    /// What it takes there.
    pub bytes: Bytes,
    /// How it stands there.
    pub there: There,
    /// How it gets there.
    pub route: Route,
    /// The GPU that it comes from, with [`Route::Peer`].
    pub peer: Option<GpuIndex>,
    /// How long it takes alone, in seconds. Filled in where a plan is asked for.
    pub seconds: f64,
}

/// How much of a component is where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement<'a> {
    /// All of it in one tier.
    Whole,
    /// These blocks of it; the others are another step.
    Split(&'a catalog::Part),
}

impl Step {
    /// How much of its component the step brings.
    #[must_use]
    pub fn placement(&self) -> Placement<'_> {
        match &self.component.part {
            None => Placement::Whole,
            Some(part) => Placement::Split(part),
        }
    }
}

fn id_of<S: serde::Serializer>(
    component: &Arc<Component>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&component.id)
}

/// One eviction that the plan would cause, as things stand.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Eviction {
    /// From where.
    pub tier: Tier,
    /// What.
    pub component: ComponentId,
    /// How much.
    pub bytes: Bytes,
    /// Why this one.
    pub reason: String,
}

/// Whether a plan can be carried out at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fit {
    /// There is room.
    Now,
    /// There is room once the named evictions are made.
    AfterEviction,
    /// Others hold the memory; the set waits until they let go.
    AfterOthers,
}

/// The loading order and placement of a component set, before anything moves.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// Where the set will be.
    pub tier: Tier,
    /// The components in loading order.
    pub steps: Vec<Step>,
    /// Bytes that the set needs in each tier beyond what is there.
    #[serde(serialize_with = "tiers")]
    pub needs: BTreeMap<Tier, Bytes>,
    /// What would go, as things stand. Filled in where a plan is asked for, not where it is carried out.
    pub evictions: Vec<Eviction>,
    /// Whether it can begin at once.
    pub fit: Fit,
    /// Host memory through which the steps with [`Route::Ring`] are streamed; zero where there are none.
    pub ring: Bytes,
    /// How long it takes. Filled in where a plan is asked for.
    pub estimate: Option<Estimate>,
    /// The tiers that it was chosen from.
    pub alternatives: Vec<Alternative>,
}

fn tiers<S: serde::Serializer>(
    needs: &BTreeMap<Tier, Bytes>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(needs.iter().map(|(tier, bytes)| (tier.to_string(), bytes)))
}

impl Plan {
    /// What is to be reserved for leases in a tier.
    #[must_use]
    pub fn wants(&self, tier: Tier) -> Vec<Want> {
        self.steps
            .iter()
            .filter(|step| step.tier == tier)
            .map(|step| Want::Component(step.component.clone(), step.bytes))
            .collect()
    }

    /// The components that go to a tier.
    #[must_use]
    pub fn components(&self, tier: Tier) -> Vec<Arc<Component>> {
        self.steps
            .iter()
            .filter(|step| step.tier == tier)
            .map(|step| step.component.clone())
            .collect()
    }

    /// The tiers that leases of this plan are in.
    #[must_use]
    pub fn tiers(&self) -> Vec<Tier> {
        let spills = self.tier != Tier::Ram && self.steps.iter().any(|s| s.tier == Tier::Ram);
        let mut tiers = vec![self.tier];
        tiers.extend(spills.then_some(Tier::Ram));
        tiers
    }

    /// What is to be reserved in RAM on the way to a GPU.
    #[must_use]
    pub fn stage_wants(&self) -> Vec<Want> {
        let mut wants: Vec<Want> = self
            .steps
            .iter()
            .filter(|step| step.route == Route::ViaRam)
            .map(|step| Want::Component(step.component.clone(), step.component.ram_bytes()))
            .collect();
        if !self.ring.is_zero() {
            wants.push(Want::Scratch(self.ring));
        }
        wants
    }

    /// Bytes that have to move into the plan's tier.
    #[must_use]
    pub fn moving(&self) -> Bytes {
        self.steps
            .iter()
            .filter(|step| step.there != There::Resident)
            .map(|step| step.component.bytes)
            .sum()
    }
}

/// One tier that is too small, with the sum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// Which tier.
    pub tier: Tier,
    /// What the set takes there.
    pub needed: Bytes,
    /// What hotset may use there.
    pub budget: Bytes,
    /// The parts of the sum, largest first.
    pub parts: Vec<(ComponentId, Bytes)>,
    /// Why the tier is out of service, where it is.
    pub out_of_service: Option<Arc<str>>,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(reason) = &self.out_of_service {
            return write!(f, "{} is out of service ({reason})", self.tier);
        }
        const SHOWN: usize = 6;
        write!(
            f,
            "{} has a budget of {}, and the set needs {} there (",
            self.tier, self.budget, self.needed
        )?;
        for (i, (component, bytes)) in self.parts.iter().take(SHOWN).enumerate() {
            write!(f, "{}{component} {bytes}", if i == 0 { "" } else { " + " })?;
        }
        if self.parts.len() > SHOWN {
            write!(f, " + {} more", self.parts.len() - SHOWN)?;
        }
        write!(f, "), {} too much", self.needed.saturating_sub(self.budget))
    }
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// It fits nowhere, whatever is evicted.
    #[error("the set can never fit: {}; {}", sentence(shortages), mend(nearest))]
    NeverFits {
        /// Each tier that was considered, with the sum.
        shortages: Vec<Shortage>,
        /// What would fit.
        nearest: Vec<Nearest>,
    },
    /// The target does not exist.
    #[error("there is no {target}; this machine has {}", available.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))]
    NoSuchTier {
        /// What was asked for.
        target: Target,
        /// What there is.
        available: Vec<Tier>,
    },
}

fn sentence<T: ToString>(parts: &[T]) -> String {
    parts
        .iter()
        .map(T::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}

fn mend(nearest: &[Nearest]) -> String {
    if nearest.is_empty() {
        "load fewer components, raise the budget, or choose another tier".into()
    } else {
        sentence(nearest)
    }
}

impl PlanError {
    /// It never fits, and nobody has looked yet what would.
    pub(super) const fn never(shortages: Vec<Shortage>) -> Self {
        Self::NeverFits {
            shortages,
            nearest: Vec::new(),
        }
    }
}

/// The most of the RAM budget that one ring takes, so that several sets can stream at once on a small machine.
const RING_SHARE: f64 = 0.25;

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
        let (tier, alternatives) = self.choose(&set.order(), target)?;
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
        let (tier, divided) = self.divide(&order, &considered, blocks)?;
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

    /// Fills in again how each component of a plan stands in its tier and by which way it gets there, by the books as
    /// they are now.
    ///
    /// # Errors
    /// [`PlanError`] where a component can get there by no way.
    pub fn route(&self, plan: &mut Plan) -> Result<(), PlanError> {
        for step in &mut plan.steps {
            let Some(view) = self.view(step.tier) else {
                return Err(PlanError::NoSuchTier {
                    target: Target::Best,
                    available: self.tiers.iter().map(|view| view.tier).collect(),
                });
            };
            step.there = there(view, &step.component.content_id);
            step.route = match (step.tier, step.there) {
                (Tier::Ram, There::Absent) => Route::Ram,
                _ => Route::None,
            };
            step.peer = None;
        }
        plan.ring = Bytes::ZERO;
        let tiers = plan.tiers().into_iter();
        plan.needs = tiers
            .map(|tier| (tier, absent_bytes(&plan.steps, tier)))
            .collect();
        if let Tier::Vram(gpu) = plan.tier {
            self.route_from_peers(gpu, &mut plan.steps);
            let (slabs, ring) = self.route_to_gpu(&mut plan.steps)?;
            plan.ring = ring;
            let needed = plan.needs.entry(Tier::Ram).or_default();
            *needed = needed.saturating_add(slabs).saturating_add(ring);
        }
        plan.fit = self.fit(plan);
        Ok(())
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
        let whole = |view: &TierView| order.iter().map(|c| self.bytes_in(view.tier, c)).sum();
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
            None => Err(PlanError::NeverFits {
                shortages: considered
                    .iter()
                    .map(|view| shortage(view, whole(view), order, |c| self.bytes_in(view.tier, c)))
                    .collect(),
                nearest: self.nearest(order, &considered),
            }),
        }
    }

    /// What would fit where a set does not.
    fn nearest(&self, order: &[Arc<Component>], considered: &[&TierView]) -> Vec<Nearest> {
        let whole =
            |view: &TierView| -> Bytes { order.iter().map(|c| self.bytes_in(view.tier, c)).sum() };
        let others = self.tiers.iter().filter(|view| {
            view.out_of_service.is_none()
                && whole(view) <= view.budget
                && !considered.iter().any(|c| c.tier == view.tier)
        });
        let mut nearest: Vec<Nearest> = others.map(|view| Nearest::Elsewhere(view.tier)).collect();
        let largest = considered
            .iter()
            .filter(|view| view.tier != Tier::Ram && view.out_of_service.is_none())
            .max_by_key(|view| (view.budget, std::cmp::Reverse(view.tier)));
        if let (Some(view), Some(ram)) = (largest, self.view(Tier::Ram)) {
            let in_ram = whole(view).saturating_sub(view.budget);
            let split = in_ram <= ram.budget && !view.budget.is_zero();
            let split = split.then_some(Nearest::Split {
                tier: view.tier,
                in_ram,
            });
            nearest.extend(split);
        }
        nearest
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
                        loss_s: (residency.pins == 0 && !residency.loading)
                            .then(|| expected_loss_s(&residency.candidate(), self.now)),
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

    /// The nearest other GPU on which a component is resident, with the link from there.
    fn peer(&self, gpu: GpuIndex, content: &ContentId) -> Option<(GpuIndex, Link)> {
        let holders = self.tiers.iter().filter_map(|view| match view.tier {
            Tier::Vram(from) if from != gpu && view.out_of_service.is_none() => {
                let link = self.links.get(&(from, gpu))?;
                (there(view, content) == There::Resident).then_some((from, *link))
            }
            _ => None,
        });
        holders.min_by_key(|(from, link)| (!link.direct, link.distance, *from))
    }

    /// How far away what a set lacks in a tier is on other GPUs: the sum over its bytes. What no GPU holds is equally far
    /// from all.
    fn distance(&self, view: &TierView, order: &[Arc<Component>]) -> u128 {
        let Tier::Vram(gpu) = view.tier else {
            return 0;
        };
        let lacking = order
            .iter()
            .filter(|c| there(view, &c.content_id) == There::Absent);
        lacking
            .filter_map(|c| {
                let (_, link) = self.peer(gpu, &c.content_id)?;
                // Through the host is further than any link.
                let rank = if link.direct {
                    u64::from(link.distance)
                } else {
                    u64::from(u32::MAX) + 1
                };
                Some(u128::from(c.bytes.get()) * u128::from(rank))
            })
            .sum()
    }

    /// Takes what is not there from other GPUs: where those reach each other by themselves, and else where RAM does not
    /// have the component either, since the driver's way through the host is no faster than the one from RAM.
    fn route_from_peers(&self, gpu: GpuIndex, steps: &mut [Step]) {
        let own = |step: &&mut Step| step.tier != Tier::Ram && step.there != There::Resident;
        for step in steps.iter_mut().filter(own) {
            let content = &step.component.content_id;
            if let Some((from, link)) = self.peer(gpu, content)
                && (link.direct || !self.is_in_ram(content))
            {
                (step.route, step.peer) = (Route::Peer, Some(from));
            }
        }
    }

    /// Chooses the way of each absent component to its GPU, and gives the bytes that RAM must provide for slabs and for
    /// the ring.
    ///
    /// RAM on the way to a GPU is a convenience: a component goes through it as long as there is room that nobody holds,
    /// and through the ring where there is not, so that a full RAM tier does not keep a GPU waiting.
    fn route_to_gpu(&self, steps: &mut [Step]) -> Result<(Bytes, Bytes), PlanError> {
        let Some(ram) = self.view(Tier::Ram) else {
            return Err(PlanError::NoSuchTier {
                target: Target::Ram,
                available: self.tiers.iter().map(|view| view.tier).collect(),
            });
        };
        let evictable: Bytes = candidates(ram).iter().map(|c| c.bytes).sum();
        // What stays in RAM comes before what passes through it.
        let staying = absent_bytes(steps, Tier::Ram);
        let room = ram.free().saturating_add(evictable).saturating_sub(staying);
        let (needed, streamed) = route_through(ram, steps, room, Bytes::ZERO);
        if streamed == 0 {
            return Ok((needed, Bytes::ZERO));
        }
        let ring = self.ring.min(ram.budget.share(RING_SHARE));
        if ring.is_zero() {
            let parts = steps
                .iter()
                .filter(|step| step.route == Route::Ring)
                .map(|step| (step.component.id.clone(), step.component.ram_bytes()))
                .collect();
            return Err(PlanError::never(vec![Shortage {
                tier: Tier::Ram,
                needed: self.ring,
                budget: ram.budget,
                parts,
                out_of_service: ram.out_of_service.clone(),
            }]));
        }
        // The ring needs room of its own, beside the slabs.
        let (needed, _) = route_through(ram, steps, room, ring);
        Ok((needed, ring))
    }

    /// The tiers in which the plan needs more than is free, with what is missing and what could go there.
    fn short<'a>(
        &'a self,
        plan: &'a Plan,
    ) -> impl Iterator<Item = (&'a TierView, Bytes, Vec<Candidate>)> {
        let own: HashSet<ContentId> = plan
            .steps
            .iter()
            .map(|step| step.component.content_id)
            .collect();
        plan.needs.iter().filter_map(move |(tier, needed)| {
            let view = self.view(*tier).filter(|view| *needed > view.free())?;
            let mut others = candidates(view);
            others.retain(|c| !own.contains(&c.content));
            Some((view, needed.saturating_sub(view.free()), others))
        })
    }

    fn fit(&self, plan: &Plan) -> Fit {
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

/// Sends each component that has to move through RAM as long as there is room, and through the ring after that. Gives the
/// bytes of new slabs, and how many components are streamed.
///
/// What is there already has to stay to be of use, so it counts as well, and first: against what the tier can hold at all,
/// and, where it could be evicted for the others, against the room.
fn route_through(ram: &TierView, steps: &mut [Step], room: Bytes, ring: Bytes) -> (Bytes, usize) {
    let staying = steps.iter().filter(|step| step.tier == Tier::Ram);
    let staying: Bytes = staying.map(|step| step.bytes).sum();
    let mut room = room.saturating_sub(ring);
    let mut whole = ram.budget.saturating_sub(ring).saturating_sub(staying);
    let evictable: HashSet<ContentId> = candidates(ram).iter().map(|c| c.content).collect();
    let (mut needed, mut streamed) = (Bytes::ZERO, 0);
    for kept in [true, false] {
        for step in steps.iter_mut().filter(|step| {
            let moves = step.there != There::Resident && step.route != Route::Peer;
            step.tier != Tier::Ram && moves
        }) {
            let content = step.component.content_id;
            let absent = there(ram, &content) == There::Absent;
            if absent == kept {
                continue;
            }
            let bytes = step.component.ram_bytes();
            // What others hold costs no room.
            let free = !absent && !evictable.contains(&content);
            if bytes > whole || (bytes > room && !free) {
                step.route = Route::Ring;
                streamed += 1;
                continue;
            }
            step.route = Route::ViaRam;
            whole = whole.saturating_sub(bytes);
            if !free {
                room = room.saturating_sub(bytes);
            }
            if absent {
                needed += bytes;
            }
        }
    }
    (needed, streamed)
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

fn absent_bytes(steps: &[Step], tier: Tier) -> Bytes {
    steps
        .iter()
        .filter(|step| step.tier == tier && step.there == There::Absent)
        .map(|step| step.bytes)
        .sum()
}

/// What could be evicted from a tier, as policies see it.
#[must_use]
pub(super) fn candidates(view: &TierView) -> Vec<Candidate> {
    view.residencies
        .iter()
        .filter(|residency| residency.pins == 0 && !residency.loading)
        .map(ResidencyView::candidate)
        .collect()
}

pub(super) fn shortage(
    view: &TierView,
    needed: Bytes,
    order: &[Arc<Component>],
    bytes_of: impl Fn(&Component) -> Bytes,
) -> Shortage {
    let mut parts: Vec<(ComponentId, Bytes)> = order
        .iter()
        .map(|component| (component.id.clone(), bytes_of(component)))
        .collect();
    parts.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    Shortage {
        tier: view.tier,
        needed,
        budget: view.budget,
        parts,
        out_of_service: view.out_of_service.clone(),
    }
}

#[cfg(test)]
mod tests;
