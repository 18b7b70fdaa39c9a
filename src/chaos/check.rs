//! What must always hold.

use std::collections::BTreeSet;
use std::fmt;

use hotset_core::memory::TierView;
use serde::Serialize;

use super::world::{State, World};
use crate::{Act, Bytes, ComponentId, Tier};

/// Something that always holds. docs/reliability.md has a sentence for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Invariant {
    /// No tier is over its budget, unless the budget has shrunk below what is held; then nothing is added.
    WithinBudget,
    /// A device has no more allocated than the books say, and at the end nothing.
    LedgerIsDevice,
    /// What is leased and not revoked is resident.
    LeasedStays,
    /// Leased bytes are those of one version of the file, from the first look to the last.
    LeasedBytes,
    /// Every request ends within its deadline.
    EveryRequestEnds,
    /// A granted set is whole.
    AllOrNothing,
    /// Nobody reads a component that is being read for the same tier.
    SingleFlight,
    /// When all is quiet nothing is held: no session, lease, load, pin, charge or memory.
    NoOrphans,
    /// When faults have stopped, every model can be loaded.
    Progress,
    /// Then nobody waits longer than a bound for what others use in turn.
    Fairness,
    /// Nothing goes from a tier that works without a decision.
    DecisionsRecorded,
    /// Status has the figures of the ledger.
    StatusIsLedger,
}

impl Invariant {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::WithinBudget,
        Self::LedgerIsDevice,
        Self::LeasedStays,
        Self::LeasedBytes,
        Self::EveryRequestEnds,
        Self::AllOrNothing,
        Self::SingleFlight,
        Self::NoOrphans,
        Self::Progress,
        Self::Fairness,
        Self::DecisionsRecorded,
        Self::StatusIsLedger,
    ];

    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::WithinBudget => "within-budget",
            Self::LedgerIsDevice => "ledger-is-device",
            Self::LeasedStays => "leased-stays",
            Self::LeasedBytes => "leased-bytes",
            Self::EveryRequestEnds => "every-request-ends",
            Self::AllOrNothing => "all-or-nothing",
            Self::SingleFlight => "single-flight",
            Self::NoOrphans => "no-orphans",
            Self::Progress => "progress",
            Self::Fairness => "fairness",
            Self::DecisionsRecorded => "decisions-recorded",
            Self::StatusIsLedger => "status-is-ledger",
        }
    }
}

impl fmt::Display for Invariant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Something that must never be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// Milliseconds of virtual time since the start.
    pub at_ms: u64,
    /// What does not hold.
    pub invariant: Invariant,
    /// How it shows.
    pub message: String,
}

type Resident = BTreeSet<(Tier, ComponentId)>;

/// The books as they were at the last event.
#[derive(Default)]
pub(super) struct Before {
    tiers: Vec<(Tier, Bytes, Bytes)>,
    resident: Resident,
    decision: u64,
}

/// Checks what can be seen at one instant.
pub(super) fn check(world: &World, state: &mut State) -> Vec<(Invariant, String)> {
    let mut found = Vec::new();
    let mut views = world.hotset.ledger().views();
    if world.is_broken(Invariant::WithinBudget) {
        for view in &mut views {
            view.committed = view.budget + Bytes(state.events);
        }
    }
    for view in &views {
        let before = state
            .before
            .tiers
            .iter()
            .find(|(tier, ..)| *tier == view.tier);
        let most = before.map_or(view.budget, |(_, budget, committed)| {
            view.budget.max(*budget).max(*committed)
        });
        if view.committed > most {
            found.push((
                Invariant::WithinBudget,
                format!(
                    "{} has {} committed of {}",
                    view.tier, view.committed, view.budget
                ),
            ));
        }
        if let Tier::Vram(gpu) = view.tier
            && let Some(device) = world.gpus.get(gpu.0 as usize)
            && device.allocated() > view.committed
        {
            found.push((
                Invariant::LedgerIsDevice,
                format!(
                    "{} has {} allocated and {} committed",
                    view.tier,
                    device.allocated(),
                    view.committed
                ),
            ));
        }
    }
    for lease in state
        .held
        .values()
        .filter(|lease| lease.revoked().is_none())
    {
        let content = lease.component().content_id;
        let there = views.iter().any(|view| {
            view.tier == lease.tier()
                && view
                    .residencies
                    .iter()
                    .any(|r| r.component.content_id == content && r.leases > 0 && !r.loading)
        });
        if !there {
            found.push((
                Invariant::LeasedStays,
                format!(
                    "{} is leased in {} and not resident there",
                    lease.component().id,
                    lease.tier()
                ),
            ));
        }
    }
    if let Some((name, times)) = world.disk.faults().most_at_once()
        && times > 1 + world.gpus.len()
    {
        found.push((
            Invariant::SingleFlight,
            format!("{name} is read {times} times at once"),
        ));
    }
    found.extend(decisions(world, state, &views));
    found
}

/// What is gone has a decision; and all decisions become part of the trace.
fn decisions(world: &World, state: &mut State, views: &[TierView]) -> Vec<(Invariant, String)> {
    let last = state.before.decision;
    let mut new = world.hotset.decisions(16);
    if new.last().is_some_and(|oldest| oldest.number > last + 1) {
        new = world.hotset.decisions(usize::MAX);
    }
    new.retain(|decision| decision.number > last);
    new.reverse();
    let mut evicted = Resident::new();
    for decision in &new {
        match &decision.act {
            Act::Evict {
                component, tier, ..
            } => {
                evicted.insert((*tier, component.clone()));
                state.trace(decision.act.sentence());
            }
            // Its reason has paths and inodes.
            Act::Refuse {
                session, request, ..
            } => state.trace(format!("refused {session}/{request}")),
            act => state.trace(act.sentence()),
        }
    }
    let resident: Resident = views
        .iter()
        .flat_map(|view| view.residencies.iter().map(move |r| (view.tier, r)))
        .filter(|(_, r)| !r.loading)
        .map(|(tier, r)| (tier, r.component.id.clone()))
        .collect();
    let mut found = Vec::new();
    for gone in state.before.resident.difference(&resident) {
        if matches!(gone.0, Tier::Vram(_)) && state.gpu_was_lost {
            continue;
        }
        if !evicted.contains(gone) {
            found.push((
                Invariant::DecisionsRecorded,
                format!("{} is gone from {} without a decision", gone.1, gone.0),
            ));
        }
    }
    state.before = Before {
        tiers: views
            .iter()
            .map(|v| (v.tier, v.budget, v.committed))
            .collect(),
        resident,
        decision: new.last().map_or(last, |decision| decision.number),
    };
    found
}
