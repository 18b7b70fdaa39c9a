//! Predictor: learns from the request stream and proposes prefetches, off until it is switched on, and sums up how components
//! are used.
//!
//! It goes on with what its predecessor had learned. Its guesses go to the keepers of the tiers, which take them into memory that
//! nobody needs, or in the place of what is worth far less. What comes of them is counted in the house, by tier and grounds.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use hotset_core::catalog::{Catalogue, Component};
use hotset_core::plan::{read_s, resolve, restore_s};
use hotset_core::predict::{
    Candidate, Grounds, Observed, Predictor, PredictorStats, Seen, Studied,
};
use hotset_core::{Bytes, ComponentId, ContentId, GpuIndex, ModelName, Tier};
use ractor::{ActorProcessingErr, ActorRef, RpcReplyPort};
use serde::Serialize;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::guessing::{self, GuessedLoad};
use crate::house::House;
use crate::learned::{KEPT_EVERY, Learner};
use crate::uses::Used;

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
    /// Requests that it learned from since what it has learned was kept.
    since_kept: usize,
    /// What came of its studies, which go on elsewhere.
    studied: (UnboundedSender<Studied>, UnboundedReceiver<Studied>),
}

/// Prefetches proposed after one request, since some may not be worth what would go for them: more would only queue behind the first.
const PROPOSALS: usize = 4;
/// Requests that a guess has at least until it was wrong.
const LEAST_WITHIN: f64 = 64.0;

impl State {
    /// Has the longer work done where that keeps nobody waiting, and takes what came of the last.
    fn let_study(&mut self) {
        while let Ok(studied) = self.studied.1.try_recv() {
            self.predictor.studied(studied);
        }
        if let Some(study) = self.predictor.study() {
            let to = self.studied.0.clone();
            // Lost with the system's end: nobody waits for it.
            self.house.aside(move || to.send(study.run()));
        }
    }

    /// Gives what was learned to whoever comes after.
    fn keep_learned(&mut self) {
        self.since_kept = 0;
        if let Some(learned) = self.predictor.learned() {
            self.house.keep_learned(Learner::Predictor, learned);
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if self.since_kept > 0 {
            self.keep_learned();
        }
    }
}

#[ractor::actor(message = PredictorMessage, state = State, arguments = Arc<House>)]
impl PredictorActor {
    async fn pre_start(
        &self,
        _myself: ActorRef<PredictorMessage>,
        house: Arc<House>,
    ) -> Result<State, ActorProcessingErr> {
        Ok(State {
            enabled: house.predicting.load(std::sync::atomic::Ordering::Relaxed),
            predictor: house.predictor_before(),
            since_kept: 0,
            studied: unbounded_channel(),
            house,
        })
    }

    #[ractor::message(PredictorMessage::Requested)]
    fn requested(&self, state: &mut State) {
        if let Some(used) = learn(state)
            && state.enabled
        {
            propose(state, &used);
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
        if !enabled {
            guessing::call_off_all(&state.house);
        }
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

/// Takes what was granted meanwhile; gives the latest of it.
fn learn(state: &mut State) -> Option<Used> {
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
            state.since_kept += 1;
        }
        let ids: Vec<ComponentId> = ids(used).collect();
        let mut usage = state.house.usage();
        usage.used(used.at, &ids);
        let contents = seen.iter().map(|seen| &seen.content);
        if used.tier != Tier::Ram {
            state.house.ledger.used_elsewhere(contents.clone());
        }
        usage.guesses().asked(used.at, used.tier, contents);
    }
    state.let_study();
    if state.since_kept >= KEPT_EVERY {
        state.keep_learned();
    }
    granted.into_iter().next_back()
}

fn ids(used: &Used) -> impl Iterator<Item = ComponentId> {
    used.components
        .iter()
        .map(|(component, _)| component.id.clone())
}

/// Where a guess would put each component after a set was granted: what is in no tier goes to RAM, and what is there alone, to
/// the GPU that the set is on, unless it is used where it is. Nothing where it would not fit, nor what is on its way.
struct Places {
    ram: HashSet<ContentId>,
    gpus: HashSet<ContentId>,
    /// Whoever wants these is served already, or will be.
    settled: HashSet<ContentId>,
    most_in_ram: Bytes,
    /// The GPU, and the most that may be there.
    onto: Option<(GpuIndex, Bytes)>,
}

impl Places {
    fn new(house: &House, used: &Used) -> Self {
        let config = &house.config;
        let mut places = Self {
            ram: HashSet::new(),
            gpus: HashSet::new(),
            settled: HashSet::new(),
            most_in_ram: Bytes::ZERO,
            onto: None,
        };
        for view in house.ledger.views() {
            let there = match view.tier {
                Tier::Ram => {
                    places.most_in_ram = view.budget.share(config.ram.high_watermark);
                    &mut places.ram
                }
                Tier::Vram(gpu) => {
                    if used.tier == view.tier && view.out_of_service.is_none() {
                        let config = config.gpu.get(gpu.0 as usize).cloned().unwrap_or_default();
                        places.onto = Some((gpu, view.budget.share(config.high_watermark)));
                    }
                    &mut places.gpus
                }
            };
            for residency in &view.residencies {
                let content = residency.component.content_id;
                there.insert(content);
                if residency.loading || residency.leases > 0 {
                    places.settled.insert(content);
                }
            }
        }
        places
    }

    fn of(&self, component: &Component) -> Option<Tier> {
        let content = &component.content_id;
        if self.settled.contains(content) || self.gpus.contains(content) {
            return None;
        }
        if self.ram.contains(content) {
            let (gpu, most) = self.onto?;
            return (component.device_bytes() <= most).then_some(Tier::Vram(gpu));
        }
        (component.ram_bytes() <= self.most_in_ram).then_some(Tier::Ram)
    }
}

/// Proposes what would have to be moved: what is certain first, then what is usual, then what is expected.
fn propose(state: &mut State, used: &Used) {
    let house = state.house.clone();
    let places = Places::new(&house, used);
    let catalogue = house.catalogue.load();
    let mut proposals: Vec<(Arc<Component>, Grounds, f64)> = Vec::new();
    let rest = rest_of_models(&house, &catalogue, used);
    proposals.extend(rest.into_iter().map(|c| (c, Grounds::Declared, 1.0)));
    let asked: Vec<ComponentId> = ids(used).collect();
    let usual = house.usage().usual(&asked);
    proposals.extend(usual.into_iter().filter_map(|(id, share)| {
        let component = catalogue.get(&id.model)?.component(&id.component)?.clone();
        Some((component, Grounds::Usual, share))
    }));
    {
        // Nor what is guessed already, on paper or not.
        let mut usage = house.usage();
        let guesses = usage.guesses();
        proposals.retain(|(component, ..)| {
            let tier = places.of(component);
            tier.is_some_and(|tier| !guesses.holds(tier, &component.content_id))
        });
    }
    let load_s = {
        let rates = house.rates().clone();
        move |component: &Component, tier: Tier| match tier {
            Tier::Vram(gpu) => restore_s(&rates, gpu, component, true),
            Tier::Ram => read_s(&rates, component),
        }
    };
    if proposals.len() < PROPOSALS {
        let movable: Vec<(&Arc<Component>, Tier)> = catalogue
            .models()
            .flat_map(|model| &model.components)
            .filter_map(|component| Some((component, places.of(component)?)))
            .collect();
        let candidates: Vec<Candidate> = movable
            .iter()
            .map(|(component, tier)| Candidate {
                content: component.content_id,
                bytes: component.bytes,
                load_s: load_s(component, *tier),
            })
            .collect();
        let now = house.ledger.now();
        for proposal in state.predictor.proposals(now, &candidates, PROPOSALS) {
            let mut movable = movable.iter();
            if let Some((component, _)) = movable.find(|(c, _)| c.content_id == proposal.content) {
                let component = Arc::clone(component);
                proposals.push((component, Grounds::Predicted, proposal.probability));
            }
        }
    }
    let mut named = HashSet::new();
    proposals.retain(|(component, ..)| named.insert(component.content_id));
    let within = (2.0 * state.predictor.horizon()).max(LEAST_WITHIN) as u64;
    for (component, grounds, probability) in proposals.into_iter().take(PROPOSALS) {
        let Some(tier) = places.of(&component) else {
            continue;
        };
        let guess = GuessedLoad {
            load_s: load_s(&component, tier),
            component,
            grounds,
            probability,
            within,
            onto: places.onto.map(|(gpu, _)| gpu),
        };
        guessing::propose(&house, tier, guess);
    }
}

/// What comes with the components of a set that are a part of their model, in the order of its use.
fn rest_of_models(house: &House, catalogue: &Catalogue, used: &Used) -> Vec<Arc<Component>> {
    let mut of_model: BTreeMap<&ModelName, usize> = BTreeMap::new();
    for (component, _) in used.components.iter() {
        *of_model.entry(&component.id.model).or_default() += 1;
    }
    let is_part = |name: &ModelName, count: usize| {
        let model = catalogue.get(name);
        model.is_some_and(|model| model.components.len() > count)
    };
    let asked: HashSet<ContentId> = used
        .components
        .iter()
        .map(|(component, _)| component.content_id)
        .collect();
    let mut rest = Vec::new();
    for (name, count) in of_model {
        if is_part(name, count)
            && let Ok(graph) = resolve(catalogue, &house.config.set, &[name.to_string()], false)
        {
            let order = graph.order().into_iter();
            rest.extend(order.filter(|component| !asked.contains(&component.content_id)));
        }
    }
    rest
}
