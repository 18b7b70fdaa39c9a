//! The root: starts the others, starts them again when they fail, and takes them out of service when they keep failing.
//!
//! One for one: an actor's death concerns nobody else, since what they share is in the [`House`]. Restarts back off, and
//! are counted over a window; beyond the limit the actor is out of service, with the reason in status, and the rest of the
//! machine goes on. From then on it is tried now and then, since what broke it may have been mended. A GPU whose
//! VramManager is down is out of service in the ledger.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hotset_core::breaks::{self, Break};
use hotset_core::config::SupervisionConfig;
use hotset_core::{GpuIndex, Tier};
use ractor::{
    Actor, ActorCell, ActorProcessingErr, ActorRef, RpcReplyPort, SpawnErr, SupervisionEvent,
};
use serde::{Serialize, Serializer};
use tokio::time::Instant;

use crate::counters::add;
use crate::discovery::Discovery;
use crate::house::House;
use crate::monitor::Monitor;
use crate::predictor::PredictorActor;
use crate::ram_cache::RamCache;
use crate::sessions::Sessions;
use crate::status::{ActorStatus, ServiceState};
use crate::vram_manager::VramManager;

/// The actors of the tree, without the loaders.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ActorName {
    /// Scans and watches model folders.
    Discovery,
    /// The RAM tier.
    RamCache,
    /// The VRAM tier of one GPU.
    VramManager(GpuIndex),
    /// Learns and proposes prefetches.
    Predictor,
    /// Measures pressure.
    Monitor,
    /// Opens sessions.
    Sessions,
}

impl fmt::Display for ActorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Discovery => f.pad("discovery"),
            Self::RamCache => f.pad("ram-cache"),
            Self::VramManager(gpu) => f.pad(&format!("vram-manager-{gpu}")),
            Self::Predictor => f.pad("predictor"),
            Self::Monitor => f.pad("monitor"),
            Self::Sessions => f.pad("sessions"),
        }
    }
}

impl Serialize for ActorName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What the supervisor is asked.
#[derive(Debug)]
pub(crate) enum SupervisorMessage {
    /// Start this actor now; its backoff is over.
    Start(ActorName),
    /// The state of each actor.
    Observe(RpcReplyPort<Vec<ActorStatus>>),
}

pub(crate) struct Supervisor;

pub(crate) struct State {
    house: Arc<House>,
    children: BTreeMap<ActorName, Child>,
}

#[derive(Default)]
struct Child {
    cell: Option<ActorCell>,
    restarts: Restarts,
    last_failure: Option<String>,
    out_of_service: bool,
}

/// The restarts of one actor, within the window.
#[derive(Default)]
struct Restarts {
    recent: VecDeque<Instant>,
    total: u64,
}

impl Restarts {
    /// The wait before the next quick restart, or `None` where there were too many.
    fn next(&mut self, now: Instant, config: &SupervisionConfig) -> Option<Duration> {
        while self
            .recent
            .front()
            .is_some_and(|first| now.duration_since(*first) > config.window)
        {
            self.recent.pop_front();
        }
        if self.recent.len() >= config.max_restarts {
            return None;
        }
        let doublings = u32::try_from(self.recent.len()).unwrap_or(u32::MAX).min(16);
        self.recent.push_back(now);
        self.total += 1;
        Some(
            config
                .backoff
                .saturating_mul(1 << doublings)
                .min(config.max_backoff),
        )
    }
}

#[ractor::actor(message = SupervisorMessage, state = State, arguments = Arc<House>)]
impl Supervisor {
    async fn pre_start(
        &self,
        myself: ActorRef<SupervisorMessage>,
        house: Arc<House>,
    ) -> Result<State, ActorProcessingErr> {
        let names = [
            ActorName::Monitor,
            ActorName::RamCache,
            ActorName::Predictor,
            ActorName::Discovery,
            ActorName::Sessions,
        ];
        let gpus = house.devices.keys().map(|gpu| ActorName::VramManager(*gpu));
        let children: BTreeMap<_, _> = names
            .into_iter()
            .chain(gpus)
            .map(|name| (name, Child::default()))
            .collect();
        // Started by message: an actor that cannot start is a failed one, not the end of the system.
        for name in children.keys() {
            myself.send_message(SupervisorMessage::Start(*name))?;
        }
        Ok(State { house, children })
    }

    #[ractor::message(SupervisorMessage::Start(name))]
    async fn start(&self, myself: ActorRef<SupervisorMessage>, name: ActorName, state: &mut State) {
        match spawn(&state.house, name, myself.get_cell()).await {
            Ok(cell) => {
                if let Some(child) = state.children.get_mut(&name) {
                    child.cell = Some(cell);
                    child.out_of_service = false;
                }
            }
            Err(error) => restart(state, &myself, name, error.to_string()),
        }
    }

    #[ractor::message(SupervisorMessage::Observe(reply))]
    fn observe(&self, reply: RpcReplyPort<Vec<ActorStatus>>, state: &mut State) {
        let children = state
            .children
            .iter()
            .map(|(name, child)| ActorStatus {
                name: *name,
                state: match (&child.cell, child.out_of_service) {
                    (Some(_), _) => ServiceState::Running,
                    (None, false) => ServiceState::Restarting,
                    (None, true) => ServiceState::OutOfService,
                },
                restarts: child.restarts.total,
                last_failure: child.last_failure.clone(),
                mailbox: 0,
            })
            .collect();
        let _ = reply.send(children);
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<SupervisorMessage>,
        event: SupervisionEvent,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        let (who, why) = match event {
            SupervisionEvent::ActorFailed(who, error) => (who, error.to_string()),
            SupervisionEvent::ActorTerminated(who, _, reason) => {
                (who, reason.unwrap_or_else(|| "it ended".into()))
            }
            _ => return Ok(()),
        };
        let name = state.children.iter().find_map(|(name, child)| {
            let cell = child.cell.as_ref()?;
            (cell.get_id() == who.get_id()).then_some(*name)
        });
        if let Some(name) = name {
            restart(state, &myself, name, why);
        }
        Ok(())
    }
}

/// Plans the restart of an actor that is gone, or takes it out of service.
fn restart(state: &mut State, myself: &ActorRef<SupervisorMessage>, name: ActorName, why: String) {
    clear(&state.house, name);
    let Some(child) = state.children.get_mut(&name) else {
        return;
    };
    child.cell = None;
    if state.house.stop.is_cancelled() || breaks::is(Break::NoRestart) {
        return;
    }
    add(&state.house.counters.actor_restarts, 1);
    match child
        .restarts
        .next(Instant::now(), &state.house.config.supervision)
    {
        Some(wait) => {
            tracing::warn!(actor = %name, reason = %why, ?wait, "an actor ended; restarting it");
            drop(myself.send_after(wait, move || SupervisorMessage::Start(name)));
        }
        None => {
            let retry = state.house.config.supervision.retry;
            tracing::error!(actor = %name, reason = %why, ?retry, "an actor keeps failing; it is out of service");
            child.out_of_service = true;
            drop(myself.send_after(retry, move || SupervisorMessage::Start(name)));
            if let ActorName::VramManager(gpu) = name {
                let reason = format!("its manager keeps failing: {why}");
                state
                    .house
                    .ledger
                    .set_service(Tier::Vram(gpu), Some(reason.into()));
            }
        }
    }
    child.last_failure = Some(why);
}

fn clear(house: &House, name: ActorName) {
    match name {
        ActorName::Discovery => house.discovery.set(None),
        ActorName::RamCache => house.ram.set(None),
        ActorName::VramManager(gpu) => {
            if let Some(slot) = house.vram.get(&gpu) {
                slot.set(None);
            }
        }
        ActorName::Predictor => house.predictor.set(None),
        ActorName::Monitor => house.monitor.set(None),
        ActorName::Sessions => house.sessions.set(None),
    }
}

async fn spawn(
    house: &Arc<House>,
    name: ActorName,
    supervisor: ActorCell,
) -> Result<ActorCell, SpawnErr> {
    let title = Some(house.actor_name(name));
    macro_rules! start {
        ($slot:expr, $actor:expr, $arguments:expr) => {{
            let (actor, _) = Actor::spawn_linked(title, $actor, $arguments, supervisor).await?;
            let cell = actor.get_cell();
            $slot.set(Some(actor));
            Ok(cell)
        }};
    }
    let shared = house.clone();
    match name {
        ActorName::Discovery => start!(house.discovery, Discovery, shared),
        ActorName::RamCache => start!(house.ram, RamCache, shared),
        ActorName::VramManager(gpu) => match house.vram.get(&gpu) {
            Some(slot) => start!(slot, VramManager, (shared, gpu)),
            None => Err(SpawnErr::StartupFailed(
                format!("there is no device for GPU {gpu}").into(),
            )),
        },
        ActorName::Predictor => start!(house.predictor, PredictorActor, shared),
        ActorName::Monitor => start!(house.monitor, Monitor, shared),
        ActorName::Sessions => start!(house.sessions, Sessions, shared),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn restarts_back_off_and_end() {
        let config = SupervisionConfig {
            max_restarts: 3,
            window: Duration::from_secs(10),
            backoff: Duration::from_millis(10),
            max_backoff: Duration::from_millis(25),
            ..SupervisionConfig::default()
        };
        let mut restarts = Restarts::default();
        let start = Instant::now();
        let waits: Vec<_> = (0..4).map(|_| restarts.next(start, &config)).collect();
        let ms = |n| Some(Duration::from_millis(n));
        assert_eq!(waits, [ms(10), ms(20), ms(25), None]);
        // A quiet window later everything is forgiven.
        let later = start + Duration::from_secs(11);
        assert_eq!(restarts.next(later, &config), ms(10));
        assert_eq!(restarts.total, 4);
    }
}
