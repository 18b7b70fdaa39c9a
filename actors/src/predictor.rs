//! Predictor: learns from the request stream and proposes prefetches, off until it is switched on, and sums up how components
//! are used.
//!
//! What it has learned is kept in memory and lost with it; it then learns anew. Its guesses go to RamCache, which takes
//! them only into memory that nobody needs.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use hotset_core::catalog::Component;
use hotset_core::predict::{Candidate, Observed, Predictor, PredictorStats, Seen};
use hotset_core::{ComponentId, ContentId, Tier};
use ractor::{ActorProcessingErr, ActorRef, RpcReplyPort};
use serde::Serialize;

use crate::house::House;
use crate::ram_cache::RamCacheMessage;

/// What Predictor is told and asked.
#[derive(Debug)]
pub(crate) enum PredictorMessage {
    /// Sessions were granted components; they lie in the house, and are taken from there.
    Requested,
    /// Switch it on or off.
    SetEnabled(bool, RpcReplyPort<()>),
    /// The state.
    Observe(RpcReplyPort<PredictorView>),
    /// Be busy for so long, as with a handler that is slow. For tests and chaos.
    Dawdle(Duration),
}

/// Predictor's state.
#[derive(Debug, Clone, Serialize)]
pub struct PredictorView {
    /// Whether it learns and proposes.
    pub enabled: bool,
    /// What it has learned.
    pub stats: PredictorStats,
}

pub(crate) struct PredictorActor;

pub(crate) struct State {
    house: Arc<House>,
    enabled: bool,
    predictor: Predictor,
}

/// Prefetches proposed after one request: more would only queue behind the first.
const PROPOSALS: usize = 2;
/// Read rate that is assumed for a component whose load was never measured, in bytes each second: a plain SSD.
const ASSUMED_RATE: f64 = 1e9;

#[ractor::actor(message = PredictorMessage, state = State, arguments = Arc<House>)]
impl PredictorActor {
    async fn pre_start(
        &self,
        _myself: ActorRef<PredictorMessage>,
        house: Arc<House>,
    ) -> Result<State, ActorProcessingErr> {
        Ok(State {
            enabled: house.predicting.load(std::sync::atomic::Ordering::Relaxed),
            predictor: Predictor::new(&house.config.predict),
            house,
        })
    }

    #[ractor::message(PredictorMessage::Requested)]
    fn requested(&self, state: &mut State) {
        if learn(state) && state.enabled {
            propose(state);
        }
    }

    #[ractor::message(PredictorMessage::SetEnabled(enabled, reply))]
    fn set_enabled(&self, enabled: bool, reply: RpcReplyPort<()>, state: &mut State) {
        learn(state);
        state.enabled = enabled;
        // For its own next start.
        state
            .house
            .predicting
            .store(enabled, std::sync::atomic::Ordering::Relaxed);
        let _ = reply.send(());
    }

    #[ractor::message(PredictorMessage::Dawdle(time))]
    async fn dawdle(&self, time: Duration, _state: &mut State) {
        tokio::time::sleep(time).await;
    }

    #[ractor::message(PredictorMessage::Observe(reply))]
    fn observe(&self, reply: RpcReplyPort<PredictorView>, state: &mut State) {
        learn(state);
        let _ = reply.send(PredictorView {
            enabled: state.enabled,
            stats: state.predictor.stats(),
        });
    }
}

/// Takes what was granted meanwhile; gives whether there was anything.
fn learn(state: &mut State) -> bool {
    let granted = state.house.asked.take();
    for used in &granted {
        let seen: Vec<Seen> = used
            .components
            .iter()
            .map(|(component, _)| Seen {
                content: component.content_id,
                kind: component.kind,
                bytes: component.bytes,
            })
            .collect();
        let observed = Observed {
            session: used.session,
            components: &seen,
        };
        if state.enabled {
            state.predictor.observe(used.at, &observed);
        }
        let ids = used
            .components
            .iter()
            .map(|(component, _)| component.id.clone());
        let ids: Vec<ComponentId> = ids.collect();
        state.house.usage().used(used.at, &ids);
    }
    !granted.is_empty()
}

/// Proposes what is not in RAM.
fn propose(state: &mut State) {
    let there: HashSet<ContentId> = state
        .house
        .ledger
        .view(Tier::Ram)
        .map(|view| {
            view.residencies
                .iter()
                .map(|residency| residency.component.content_id)
                .collect()
        })
        .unwrap_or_default();
    let catalogue = state.house.catalogue.load();
    let absent: Vec<&Arc<Component>> = catalogue
        .models()
        .flat_map(|model| &model.components)
        .filter(|component| !there.contains(&component.content_id))
        .collect();
    let candidates: Vec<Candidate> = absent
        .iter()
        .map(|component| Candidate {
            content: component.content_id,
            bytes: component.bytes,
            load_s: component.bytes.as_f64() / ASSUMED_RATE,
        })
        .collect();
    let now = state.house.ledger.now();
    for proposal in state.predictor.proposals(now, &candidates, PROPOSALS) {
        let Some(component) = absent.iter().find(|c| c.content_id == proposal.content) else {
            continue;
        };
        let _ = state.house.ram.cast(RamCacheMessage::Prefetch {
            component: Arc::clone(component),
            probability: proposal.probability,
        });
    }
}
