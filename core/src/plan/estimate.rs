//! How long a plan takes, by the rates that were measured.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Serialize, Serializer};

use super::place::{Planner, there};
use super::rates::{Rates, Way};
use super::steps::{Plan, Route, Step, There};
use crate::catalog::Component;
use crate::ids::{GpuIndex, Tier};

/// How long a plan takes once it begins to load, if nobody else loads meanwhile.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Estimate {
    /// Until all is there, in seconds.
    pub seconds: f64,
    /// Until the first component is there and can be used, in seconds.
    pub first_s: f64,
    /// Ways whose rate is not measured yet, and was taken to be [`DISK_PER_S`], or [`LINK_PER_S`] for links.
    #[serde(serialize_with = "by_name")]
    pub assumed: BTreeSet<Way>,
}

fn by_name<S: Serializer>(ways: &BTreeSet<Way>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(ways.iter().map(ToString::to_string))
}

/// Bytes each second of a disk that nothing was read from yet.
pub const DISK_PER_S: f64 = 1e9;
/// Bytes each second of a link that carried nothing yet.
pub const LINK_PER_S: f64 = 10e9;

impl Planner<'_> {
    /// The rate of a way, measured or assumed.
    pub(super) fn per_s(&self, way: Way) -> f64 {
        per_s(self.rates, way)
    }

    /// Seconds until a component is in RAM, if nothing else is read.
    pub(super) fn read_s(&self, component: &Component) -> f64 {
        read_s(self.rates, component)
    }

    /// Seconds until a component is on a GPU to which it comes from another one.
    pub(super) fn peer_s(&self, component: &Component, from: GpuIndex, to: GpuIndex) -> f64 {
        component.bytes.as_f64() / self.per_s(Way::Peer { from, to })
    }

    /// Seconds until a component is in a tier, if nothing else moves; 0 where it is there.
    pub(super) fn alone_s(&self, tier: Tier, component: &Component) -> f64 {
        let content = &component.content_id;
        let is_there = |view| there(view, content) == There::Resident;
        if self.view(tier).is_some_and(is_there) {
            return 0.0;
        }
        let read_s = match self.is_in_ram(content) {
            true => 0.0,
            false => self.read_s(component),
        };
        match tier {
            Tier::Ram => read_s,
            Tier::Vram(gpu) => {
                let link = self.per_s(Way::Link(gpu));
                read_s.max(component.bytes.as_f64() / link)
            }
        }
    }

    /// On which ways a step's bytes move, and for how long on each.
    pub(super) fn moves(&self, step: &Step) -> Vec<(Way, f64)> {
        let component = &*step.component;
        if step.there == There::Resident {
            return Vec::new();
        }
        if let (Route::Peer, Some(from), Tier::Vram(to)) = (step.route, step.peer, step.tier) {
            let way = Way::Peer { from, to };
            return vec![(way, self.peer_s(component, from, to))];
        }
        let mut moves = Vec::new();
        if !self.is_in_ram(&component.content_id) {
            moves.push((disk(component), self.read_s(component)));
        }
        if let Tier::Vram(gpu) = step.tier {
            let way = Way::Link(gpu);
            moves.push((way, component.bytes.as_f64() / self.per_s(way)));
        }
        moves
    }

    /// Seconds for one step alone: the ways that it takes work at the same time.
    #[must_use]
    pub fn step_s(&self, step: &Step) -> f64 {
        let moves = self.moves(step);
        moves.iter().map(|(_, s)| *s).fold(0.0, f64::max)
    }

    /// Fills in how long a plan and each of its steps take.
    pub fn time(&self, plan: &mut Plan) {
        for step in &mut plan.steps {
            step.seconds = self.step_s(step);
        }
        plan.estimate = Some(self.estimate(plan));
    }

    /// How long a plan takes: as long as the way that is busy longest. What is on its way for somebody else is counted as if
    /// it had just begun.
    #[must_use]
    pub fn estimate(&self, plan: &Plan) -> Estimate {
        let mut busy: BTreeMap<Way, f64> = BTreeMap::new();
        for step in &plan.steps {
            for (way, seconds) in self.moves(step) {
                *busy.entry(way).or_default() += seconds;
            }
        }
        Estimate {
            seconds: busy.values().copied().fold(0.0, f64::max),
            first_s: plan.steps.first().map_or(0.0, |step| self.step_s(step)),
            assumed: busy
                .keys()
                .copied()
                .filter(|way| self.rates.per_s(*way).is_none())
                .collect(),
        }
    }
}

fn per_s(rates: &Rates, way: Way) -> f64 {
    rates.per_s(way).unwrap_or(match way {
        Way::Disk(_) => DISK_PER_S,
        Way::Link(_) | Way::Peer { .. } => LINK_PER_S,
    })
}

/// Seconds until a component would be in RAM again, if nothing else is read.
#[must_use]
pub fn read_s(rates: &Rates, component: &Component) -> f64 {
    component.ram_bytes().as_f64() / per_s(rates, disk(component))
}

/// Seconds until a component would be on a GPU again, if nothing else moves: from RAM where that has it, else from its disk.
#[must_use]
pub fn restore_s(rates: &Rates, gpu: GpuIndex, component: &Component, in_ram: bool) -> f64 {
    let link_s = component.bytes.as_f64() / per_s(rates, Way::Link(gpu));
    if in_ram {
        link_s
    } else {
        read_s(rates, component).max(link_s)
    }
}

/// The disk that a component is read from. All files of one lie in one folder, and so on one file system but for links.
#[must_use]
pub fn disk(component: &Component) -> Way {
    let file = component.files.first();
    Way::Disk(file.map_or(0, |file| file.identity.device))
}
