//! The bytes of a set, component by component, once their memory is promised.

use std::collections::VecDeque;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hotset_core::decision::Act;
use hotset_core::memory::{
    Claim, FlightFailure, FlightState, Lease, Reserved, ResidencyState, Want,
};
use hotset_core::plan::Priority;
use hotset_core::{Bytes, Tier};
use tokio::sync::watch;

use super::{Attempt, Job, Way};
use crate::loader::handed::Handed;
use crate::loader::progress::Board;
use crate::loader::restarts::Restarts;
use crate::loader::staging::Staging;
use crate::loading::{LoadError, Phase};
use crate::ram_cache::RamCacheMessage;
use crate::vram_manager::{Ring, Source, VramManagerMessage};

impl Job {
    /// Moves all components, several at a time, in loading order, and hands out each lease as soon as all before it are,
    /// where somebody waits for it.
    pub(super) async fn move_all(
        &self,
        way: &Way<'_>,
        claims: Vec<Claim>,
        mut staging: Staging,
        board: &mut Board,
        handed: &mut Handed,
    ) -> Result<Attempt, LoadError> {
        let Way {
            plan,
            outlet,
            may_yield,
        } = *way;
        let mut waiting = claims.into_iter().enumerate().collect::<VecDeque<_>>();
        let mut moving = FuturesUnordered::new();
        let (told, mut tells) = watch::channel(vec![Bytes::ZERO; waiting.len()]);
        let told = Arc::new(told);
        let concurrency = self.house.config.load.concurrency.max(1);
        loop {
            if waiting.is_empty() && moving.is_empty() {
                return Ok(Attempt::Done);
            }
            let yields = may_yield && self.must_yield(plan);
            // A guess stops at once; what is wanted at some time finishes the components that are under way.
            if yields && (moving.is_empty() || self.set.priority == Priority::Prefetch) {
                self.house.decide(Act::Yield {
                    session: self.session,
                    request: self.request,
                    tier: plan.tier,
                    components: plan.ids(),
                });
                return Ok(Attempt::Yielded);
            }
            while !yields
                && moving.len() < concurrency
                && let Some((i, claim)) = waiting.pop_front()
            {
                let (source, ring) = staging.take(&claim);
                moving.push(self.move_one(i, claim, source, ring, told.clone()));
            }
            tokio::select! {
                biased;
                Some(moved) = moving.next() => {
                    let (i, lease) = moved?;
                    if let Some(progress) = board.components.get_mut(i) {
                        progress.phase = Phase::Ready;
                        progress.done = progress.total;
                    }
                    let content = lease.component().content_id;
                    // What the client has by an attempt before, it does not get twice.
                    if !handed.sent.contains(&content) {
                        handed.ready.insert(content, lease);
                    }
                    // Who may have to give way hands out nothing before all is there.
                    if self.set.priority == Priority::Interactive {
                        handed.on(plan, outlet);
                    }
                    outlet.show(board.progress(self.started));
                }
                Ok(()) = tells.changed() => {
                    board.take(&tells.borrow_and_update());
                    outlet.show(board.progress(self.started));
                }
            }
        }
    }

    /// Moves one component, or waits while others do, and leases it.
    async fn move_one(
        &self,
        i: usize,
        claim: Claim,
        mut source: Option<Source>,
        ring: Option<Ring>,
        told: Arc<watch::Sender<Vec<Bytes>>>,
    ) -> Result<(usize, Lease), LoadError> {
        let id = claim.component().id.clone();
        let failed = |failure| LoadError::Component {
            component: id.clone(),
            failure,
        };
        if let ResidencyState::Loading(flight) = claim.state() {
            // A batch load's bytes come when nobody else's do.
            let due = self.asked.saturating_add(self.deadline());
            match self.set.priority {
                Priority::Interactive => flight.urgency().raise(Some(due)),
                Priority::Batch => flight.urgency().raise(None),
                Priority::Prefetch => {}
            }
            let mut states = flight.subscribe();
            let mut restarts = Restarts::of(&self.house, claim.tier());
            loop {
                let state = states.borrow_and_update().clone();
                match state {
                    FlightState::Landed => break,
                    FlightState::Failed(failure) => return Err(failed(failure)),
                    FlightState::Moving(done) => told.send_modify(|all| {
                        if let Some(mine) = all.get_mut(i) {
                            *mine = done;
                        }
                    }),
                    FlightState::Waiting => self.start(&claim, &mut source),
                }
                tokio::select! {
                    biased;
                    changed = states.changed() => {
                        changed.map_err(|_| failed(FlightFailure::Interrupted))?;
                    }
                    () = restarts.changed() => {
                        // The message may have been lost with the actor, and the claim on the slab with it.
                        let waiting = matches!(*states.borrow(), FlightState::Waiting);
                        if waiting && source.is_none() && claim.tier() != Tier::Ram {
                            source = self.supply_again(&claim, ring.clone());
                            if source.is_none() {
                                return Err(failed(FlightFailure::Interrupted));
                            }
                        }
                    }
                }
            }
        }
        Lease::new(claim, self.session)
            .map(|lease| (i, lease))
            .map_err(|_| failed(FlightFailure::Interrupted))
    }

    /// The source of an upload once more, after the first one was lost with its message. Never waits for memory: that
    /// would be waiting while holding some, and two loads could wait for each other.
    fn supply_again(&self, claim: &Claim, ring: Option<Ring>) -> Option<Source> {
        if let Some(ring) = ring {
            return Some(Source::Ring(ring));
        }
        let component = claim.component();
        let wants = [Want::Component(component.clone(), component.ram_bytes())];
        match self.house.ledger.reserve(Tier::Ram, &wants, false) {
            Ok(Reserved::Granted(mut reservation)) => reservation.claims.pop().map(Source::Ram),
            _ => None,
        }
    }

    /// Asks for the movement of a component. Whoever asks first starts it; the others' messages change nothing.
    fn start(&self, claim: &Claim, source: &mut Option<Source>) {
        let component = claim.component().clone();
        // Where the actor is not there now, its restart brings us here again.
        match claim.tier() {
            Tier::Ram => {
                let _ = self.house.ram.cast(RamCacheMessage::Fetch(component, None));
            }
            Tier::Vram(gpu) => {
                if let (Some(slot), Some(from)) = (self.house.vram.get(&gpu), source.take()) {
                    let _ = slot.cast(VramManagerMessage::Upload(component, from));
                }
            }
        }
    }
}
