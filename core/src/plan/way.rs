//! By which way each component of a plan gets to its tier: from another GPU, through RAM, or streamed.

use std::collections::HashSet;
use std::sync::Arc;

use super::place::{Planner, evictable, there};
use super::refusal::{PlanError, Shortage};
use super::set::Target;
use super::steps::{Plan, Route, Step, There};
use crate::catalog::Component;
use crate::device::Link;
use crate::ids::{ContentId, GpuIndex, Tier};
use crate::memory::TierView;
use crate::units::Bytes;

/// The most of the RAM budget that one ring takes, so that several sets can stream at once on a small machine.
const RING_SHARE: f64 = 0.25;

impl Planner<'_> {
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

    /// The nearest other GPU on which a component is resident, with the link from there.
    pub(super) fn peer(&self, gpu: GpuIndex, content: &ContentId) -> Option<(GpuIndex, Link)> {
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
    pub(super) fn distance(&self, view: &TierView, order: &[Arc<Component>]) -> u128 {
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
        let evictable: Bytes = evictable(ram).map(|residency| residency.bytes).sum();
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
    let evictable: HashSet<ContentId> = evictable(ram)
        .map(|residency| residency.component.content_id)
        .collect();
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

fn absent_bytes(steps: &[Step], tier: Tier) -> Bytes {
    steps
        .iter()
        .filter(|step| step.tier == tier && step.there == There::Absent)
        .map(|step| step.bytes)
        .sum()
}
