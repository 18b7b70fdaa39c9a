//! What must always hold.

use std::fmt;
use std::sync::Arc;

use hotset_core::breaks::Break;
use hotset_core::memory::TierView;
use serde::Serialize;
use tokio::sync::broadcast::error::TryRecvError;

use super::world::{RAM, State, VRAM, Vanished, World};
use crate::{Act, Bytes, Component, ComponentId, Tier};

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
    /// When all is quiet, the index on disk has what the catalogue has.
    IndexIsCatalogue,
}

impl Invariant {
    /// All of them.
    pub const ALL: [Self; 13] = [
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
        Self::IndexIsCatalogue,
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
            Self::IndexIsCatalogue => "index-is-catalogue",
        }
    }

    /// The part of the system that is broken to see that this one notices; `None`: a double is.
    pub(super) const fn broken_by(self) -> Option<Break> {
        Some(match self {
            Self::WithinBudget => Break::OverCommit,
            Self::LedgerIsDevice => Break::FreedTooEarly,
            Self::LeasedStays => Break::LeasesIgnored,
            Self::EveryRequestEnds => Break::LateAnswer,
            Self::AllOrNothing => Break::LostLease,
            Self::SingleFlight => Break::TwoFlights,
            Self::NoOrphans => Break::LostRelease,
            Self::Progress => Break::NoRestart,
            Self::Fairness => Break::LastComesFirst,
            Self::DecisionsRecorded => Break::LostDecision,
            Self::StatusIsLedger => Break::WrongStatus,
            // The disk's bytes are wrong, and the index stays full.
            Self::LeasedBytes | Self::IndexIsCatalogue => return None,
        })
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

/// The books as they were at the last event.
#[derive(Default)]
pub(super) struct Before {
    tiers: Vec<(Tier, Bytes, Bytes)>,
    resident: Vec<(Tier, Arc<Component>)>,
    /// The number of the last decision that was heard of.
    pub(super) decision: u64,
}

/// Checks what can be seen at one instant.
pub(super) fn check(world: &World, state: &mut State) -> Vec<(Invariant, String)> {
    let mut found = Vec::new();
    let views = world.hotset.ledger().views();
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
        note_effects(view, state);
        let Tier::Vram(gpu) = view.tier else { continue };
        let gpu = gpu.0 as usize;
        if let Some(device) = world.gpus.get(gpu)
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
    decisions(state, views, &mut found);
    state
        .vanished
        .retain(|_, vanished| *vanished != Vanished::Over);
    found
}

/// What of the faults shows in the books.
fn note_effects(view: &TierView, state: &mut State) {
    match view.tier {
        Tier::Ram if view.budget < RAM => state.note("shrink-limit"),
        Tier::Vram(gpu) => {
            let full = VRAM.get(gpu.0 as usize).copied().unwrap_or_default();
            if view.budget < full {
                state.note("foreign");
            }
            if let Some(vanished) = state.vanished.get_mut(&gpu) {
                *vanished = match (*vanished, view.out_of_service.is_some()) {
                    (_, true) => Vanished::Noticed,
                    (Vanished::Unnoticed, false) => Vanished::Unnoticed,
                    (_, false) => Vanished::Over,
                };
            }
        }
        _ => {}
    }
}

/// What is gone has a decision; and all decisions become part of the trace.
fn decisions(state: &mut State, views: Vec<TierView>, found: &mut Vec<(Invariant, String)>) {
    let mut evicted: Vec<(Tier, ComponentId)> = Vec::new();
    let mut missed = false;
    loop {
        let decision = match state.decisions.try_recv() {
            Ok(decision) => decision,
            Err(TryRecvError::Lagged(_)) => {
                missed = true;
                continue;
            }
            Err(_) => break,
        };
        state.before.decision = decision.number;
        match decision.act {
            // Its reason has paths and inodes.
            Act::Refuse {
                session, request, ..
            } => state.trace(format!("refused {session}/{request}")),
            act => {
                state.trace(act.sentence());
                if let Act::Evict {
                    component, tier, ..
                } = act
                {
                    evicted.push((tier, component));
                }
            }
        }
    }
    let mut tiers = std::mem::take(&mut state.before.tiers);
    tiers.clear();
    let mut resident = Vec::with_capacity(state.before.resident.len());
    for view in views {
        let tier = view.tier;
        tiers.push((tier, view.budget, view.committed));
        let there = view.residencies.into_iter().filter(|r| !r.loading);
        resident.extend(there.map(|r| (tier, r.component)));
    }
    let is_in = |list: &[(Tier, Arc<Component>)], tier, component: &Arc<Component>| {
        let same =
            |other: &Arc<Component>| Arc::ptr_eq(other, component) || other.id == component.id;
        list.iter().any(|(t, other)| *t == tier && same(other))
    };
    for (tier, component) in &state.before.resident {
        if missed || is_in(&resident, *tier, component) {
            continue;
        }
        if matches!(tier, Tier::Vram(gpu) if state.vanished.contains_key(gpu)) {
            continue;
        }
        if !evicted
            .iter()
            .any(|(t, id)| t == tier && *id == component.id)
        {
            let id = &component.id;
            found.push((
                Invariant::DecisionsRecorded,
                format!("{id} is gone from {tier} without a decision"),
            ));
        }
    }
    state.before.tiers = tiers;
    state.before.resident = resident;
}
