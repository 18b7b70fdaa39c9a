//! What a plan says: the components in loading order, where each goes and by which way.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use super::estimate::Estimate;
use crate::catalog::{self, Component};
use crate::decision::Alternative;
use crate::ids::{ComponentId, GpuIndex, Tier};
use crate::memory::Want;
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
    /// Which blocks these are, of a component that is split.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub part: Option<Arc<catalog::Part>>,
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
        match &self.part {
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

    /// The components, in the order of the steps.
    #[must_use]
    pub fn ids(&self) -> Vec<ComponentId> {
        let ids = self.steps.iter().map(|step| &step.component.id);
        ids.cloned().collect()
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
