//! The story of one load: resolve the names, plan, reserve in every tier, move the bytes, hand out the leases.
//!
//! Everything that it holds on the way, it holds by handles: wherever it is dropped, the bytes come back.

mod moving;
mod reserving;

use std::sync::Arc;
use std::time::Duration;

use hotset_core::breaks::{self, Break};
use hotset_core::decision::Act;
use hotset_core::memory::Want;
use hotset_core::plan::{ComponentSet, Plan, Priority, Route, Step, There};
use hotset_core::usage::Cause;
use hotset_core::{Bytes, RequestId, SessionId, Tier};
use tokio::time::Instant;

use super::handed::Handed;
use super::progress::Board;
use crate::counters::add;
use crate::house::House;
use crate::loading::{ComponentProgress, LoadError, LoadEvent, Outlet, Phase, Stage};
use crate::phases::LoadPhase;
use crate::plan;
use crate::quotas::Counted;
use crate::sessions::Record;
use crate::uses::UsedSet;

/// How often a load begins again when what it waited for was interrupted, by a restart or by another client's cancel.
const ATTEMPTS: u32 = 5;
/// Wait before it begins again; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// How often a load gives way to others; then it goes on.
const YIELDS: u32 = 8;

/// Thirty years.
const FOR_EVER: Duration = Duration::from_secs(30 * 365 * 86_400);

/// One load.
pub(super) struct Job {
    house: Arc<House>,
    session: SessionId,
    record: Arc<Record>,
    request: RequestId,
    set: ComponentSet,
    asked: Duration,
    started: Instant,
}

/// How an attempt ended, where it did not fail.
enum Attempt {
    Done,
    /// It gave its memory back to a set that somebody waits for.
    Yielded,
}

/// What moves, and who hears of it.
struct Way<'a> {
    plan: &'a Plan,
    outlet: &'a Outlet,
    may_yield: bool,
}

impl Job {
    pub(super) fn new(
        house: Arc<House>,
        record: Arc<Record>,
        request: RequestId,
        set: ComponentSet,
        asked: Duration,
    ) -> Self {
        let late = house.ledger.now().saturating_sub(asked);
        let now = Instant::now();
        Self {
            house,
            session: record.id,
            record,
            request,
            set,
            asked,
            started: now.checked_sub(late).unwrap_or(now),
        }
    }

    #[tracing::instrument(name = "load", skip_all, fields(session = %self.session, request = %self.request))]
    pub(super) async fn run(self, outlet: Outlet) {
        let counters = &self.house.counters;
        add(&counters.loads_requested, 1);
        // Longer than any system runs, where it is too long for a clock.
        let due = self.started.checked_add(self.deadline());
        let mut due = due.unwrap_or_else(|| self.started + FOR_EVER);
        if breaks::is(Break::LateAnswer) {
            due += Duration::from_secs(1);
        }
        let mut board = Board::new(self.started);
        let outcome = tokio::select! {
            biased;
            () = outlet.cancel.cancelled() => Err(LoadError::Cancelled),
            () = self.house.stop.cancelled() => Err(crate::SessionError::Draining.into()),
            outcome = tokio::time::timeout_at(due, self.attempts(&outlet, &mut board)) => {
                outcome.unwrap_or_else(|_| Err(self.timed_out(&board)))
            }
        };
        match &outcome {
            Ok(()) => {
                add(&counters.loads_granted, 1);
                board.leave(&self.house.phases);
                let whole = self.started.elapsed();
                self.house.phases.record(LoadPhase::Whole, whole);
            }
            Err(LoadError::Cancelled) => add(&counters.loads_cancelled, 1),
            Err(error) => {
                let counter = match error {
                    LoadError::TimedOut { .. } => &counters.loads_timed_out,
                    _ => &counters.loads_refused,
                };
                add(counter, 1);
                let planned = board.components.iter().map(|c| c.component.clone());
                let mut components: Vec<_> = planned.collect();
                if components.is_empty() {
                    components = plan::concerned(&self.house, &self.set);
                }
                self.house.decide(Act::Refuse {
                    session: self.session,
                    request: self.request,
                    components,
                    reason: error.to_string(),
                });
            }
        }
        outlet.end(outcome);
    }

    /// How long it may take.
    fn deadline(&self) -> Duration {
        self.house.deadline_of(&self.set)
    }

    fn timed_out(&self, board: &Board) -> LoadError {
        let held = match board.stage {
            Stage::WaitingFor(waited_for) => self
                .house
                .ledger
                .view(waited_for)
                .map(|view| {
                    let held = view
                        .residencies
                        .iter()
                        .filter(|residency| residency.leases > 0)
                        .map(|residency| residency.bytes)
                        .sum();
                    (waited_for, held)
                })
                .into_iter()
                .collect(),
            Stage::Planning | Stage::Loading => Vec::new(),
        };
        LoadError::TimedOut {
            waited: self.started.elapsed(),
            stage: board.stage,
            held,
        }
    }

    /// Tries until it is done, or fails in a way that trying again does not mend.
    async fn attempts(&self, outlet: &Outlet, board: &mut Board) -> Result<(), LoadError> {
        let mut pause = FIRST_PAUSE;
        let mut handed = Handed::default();
        let mut shown = false;
        let mut yields = match self.set.priority {
            Priority::Interactive => 0,
            Priority::Batch | Priority::Prefetch => YIELDS,
        };
        let mut left = ATTEMPTS;
        loop {
            let may_yield = yields > 0;
            match self
                .attempt(outlet, board, &mut handed, &mut shown, may_yield)
                .await
            {
                Err(LoadError::Component { failure, .. }) if failure.is_passing() && left > 1 => {
                    tracing::debug!(%failure, "beginning again");
                    left -= 1;
                    // Who waits for memory holds none, but for what its client has by now: who is before it may need just
                    // that.
                    handed.ready.clear();
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                Ok(Attempt::Done) => return Ok(()),
                Ok(Attempt::Yielded) => {
                    yields -= 1;
                    handed.ready.clear();
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn attempt(
        &self,
        outlet: &Outlet,
        board: &mut Board,
        handed: &mut Handed,
        shown: &mut bool,
        may_yield: bool,
    ) -> Result<Attempt, LoadError> {
        board.enter(Stage::Planning, &self.house.phases);
        // What the client has of an attempt before belongs to this one only where it is carried out by the same plan.
        let (plan, generation) = match &handed.plan {
            Some(before) if !handed.sent.is_empty() => before.clone(),
            _ => {
                let (plan, generation) = plan::make(&self.house, &self.set).await?;
                (Arc::new(plan), generation)
            }
        };
        handed.plan = Some((plan.clone(), generation));
        board.components = plan
            .steps
            .iter()
            .map(|step| ComponentProgress {
                component: step.component.id.clone(),
                phase: Phase::Waiting,
                shared: step.there != There::Absent,
                done: Bytes::ZERO,
                total: step.component.bytes,
            })
            .collect();
        if !*shown {
            *shown = true;
            self.count_hits(&plan);
            self.note_uses(&plan);
            self.note_place(&plan);
            self.note_loads(&plan);
            outlet.send(LoadEvent::Planned(plan.clone())).await;
        }
        let _counted = self.count(&plan)?;

        let (claims, staging) = self.reserve(&plan, outlet, board).await?;
        for tier in plan.tiers() {
            let keep = self.house.keep_alive_of(&self.set);
            let components = plan.components(tier);
            self.house.ledger.set_keep_alive(tier, &components, keep);
        }
        board.enter(Stage::Loading, &self.house.phases);
        let began = Instant::now();
        let way = Way {
            plan: &plan,
            outlet,
            may_yield,
        };
        if let Attempt::Yielded = self.move_all(&way, claims, staging, board, handed).await? {
            return Ok(Attempt::Yielded);
        }
        if !plan.moving().is_zero() {
            let read = plan
                .needs
                .get(&Tier::Ram)
                .is_some_and(|bytes| !bytes.is_zero());
            let cause = if read { Cause::Disk } else { Cause::Link };
            self.house.usage().waited(cause, began.elapsed());
        }
        handed.rest(&plan, outlet).await;
        self.house
            .note_granted(self.session, plan.tier, used(&plan));
        self.house.hot.remember(&self.set, generation, &plan);
        Ok(Attempt::Done)
    }

    /// Counts the load against what its session and its label may have.
    fn count(&self, plan: &Plan) -> Result<Option<Counted>, LoadError> {
        let bounds = &self.record.bounds;
        if bounds.is_empty() {
            return Ok(None);
        }
        let steps = plan.steps.iter();
        let wanted: Vec<_> = steps
            .map(|step| (step.tier, step.component.clone()))
            .collect();
        let counted = self
            .house
            .quotas
            .count(bounds, &self.house.ledger, &wanted)?;
        Ok(Some(counted))
    }

    /// Tells each tier's policy what is wanted of it. That is RAM as well where a GPU does not have something: then it comes
    /// through RAM, and had better be there. What a GPU has is nothing to RAM, since nobody would miss it there.
    fn note_uses(&self, plan: &Plan) {
        let (ledger, mut tiers) = (&self.house.ledger, plan.tiers());
        let through_ram = |step: &Step| {
            step.tier != Tier::Ram && matches!(step.route, Route::ViaRam | Route::Ring)
        };
        if !tiers.contains(&Tier::Ram) && plan.steps.iter().any(through_ram) {
            tiers.push(Tier::Ram);
        }
        for tier in tiers {
            let wanted = plan.steps.iter().filter_map(|step| {
                let component = step.component.clone();
                if step.tier == tier {
                    return Some((component, step.there != There::Absent));
                }
                let asked = tier == Tier::Ram && through_ram(step);
                asked.then(|| {
                    let wants = [Want::Component(component.clone(), component.ram_bytes())];
                    (component, ledger.needed(tier, &wants).is_zero())
                })
            });
            self.house.note_use(self.session, tier, wanted.collect());
        }
    }

    /// Records where the set goes, unless it is all there.
    fn note_place(&self, plan: &Plan) {
        // Where there is one place alone, nothing is decided.
        if plan.alternatives.len() < 2 || plan.moving().is_zero() {
            return;
        }
        self.house.decide(Act::Place {
            session: self.session,
            request: self.request,
            tier: plan.tier,
            components: plan.ids(),
            moving: plan.moving(),
            alternatives: plan.alternatives.clone(),
        });
    }

    fn note_loads(&self, plan: &Plan) {
        let now = self.house.ledger.now();
        for tier in plan.tiers() {
            let absent = plan
                .steps
                .iter()
                .filter(|s| s.tier == tier && s.there == There::Absent);
            let absent: Vec<_> = absent.map(|step| step.component.id.clone()).collect();
            if !absent.is_empty() {
                self.house.usage().loads(now, tier, &absent);
            }
        }
    }

    /// Whether a set that comes before this one waits for memory that this one has. Between two components that is where a
    /// set that nobody waits for gives way.
    fn must_yield(&self, plan: &Plan) -> bool {
        let place = self
            .set
            .priority
            .place(self.asked, self.house.config.load.aging);
        let tiers = [plan.tier, Tier::Ram];
        self.house.ledger.somebody_waits_before(&tiers, place)
    }

    fn count_hits(&self, plan: &Plan) {
        let hits = plan
            .steps
            .iter()
            .filter(|s| s.there == There::Resident)
            .count() as u64;
        add(&self.house.counters.component_hits, hits);
        add(
            &self.house.counters.component_misses,
            plan.steps.len() as u64 - hits,
        );
    }
}

/// What a plan uses.
fn used(plan: &Plan) -> UsedSet {
    let steps = plan.steps.iter();
    steps
        .map(|step| (step.component.clone(), step.there != There::Absent))
        .collect()
}
