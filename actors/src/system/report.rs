//! What the system says of itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hotset_core::Tier;
use hotset_core::machine::Machine;

use super::{ANSWER_TIME, System};
use crate::discovery::{DiscoveryMessage, DiscoveryView};
use crate::monitor::MonitorMessage;
use crate::predictor::PredictorMessage;
use crate::ram_cache::RamCacheMessage;
use crate::sessions::{Record, SessionsMessage};
use crate::status::{
    ActorStatus, CatalogueStatus, Health, ServiceState, SessionStatus, Status, TierStatus,
    UsageReport, UsageRow,
};
use crate::supervisor::SupervisorMessage;
use crate::vram_manager::VramManagerMessage;

/// Rows of each kind in a report of usage.
const TOP: usize = 20;

impl System {
    /// How components are used.
    pub async fn usage(&self) -> UsageReport {
        let counters = self.house.counters.values();
        let asked = counters.component_hits + counters.component_misses;
        let now = self.house.ledger.now();
        let mut hot: Vec<UsageRow> = self
            .house
            .ledger
            .views()
            .iter()
            .flat_map(|view| {
                view.residencies
                    .iter()
                    .map(|residency| (view.tier, residency))
            })
            .map(|(tier, residency)| UsageRow {
                component: residency.component.id.clone(),
                tier,
                bytes: residency.bytes,
                uses: residency.uses,
                idle_s: now.saturating_sub(residency.last_used).as_secs_f64(),
            })
            .collect();
        hot.sort_by(|a, b| b.uses.cmp(&a.uses).then(a.idle_s.total_cmp(&b.idle_s)));
        // First, since it takes what was used since it was last told.
        let predictor = answer(self.house.predictor.call(PredictorMessage::Observe)).await;
        UsageReport {
            patterns: self.house.usage().patterns(TOP),
            hit_share: (asked > 0).then(|| counters.component_hits as f64 / asked as f64),
            counters,
            hot,
            predictor,
        }
    }

    /// The state of everything. Asks every actor, and says which does not answer.
    pub async fn status(&self) -> Status {
        let house = &self.house;
        let now = house.ledger.now();
        let mut waiting = BTreeMap::new();
        waiting.insert(
            Tier::Ram,
            answer(house.ram.call(RamCacheMessage::Observe)).await,
        );
        let mut figures = BTreeMap::new();
        for (gpu, slot) in &house.vram {
            let view = answer(slot.call(VramManagerMessage::Observe)).await;
            waiting.insert(Tier::Vram(*gpu), view.as_ref().map(|view| view.waiting));
            figures.insert(Tier::Vram(*gpu), view.and_then(|view| view.figures));
        }
        let discovery = answer(house.discovery.call(DiscoveryMessage::Observe)).await;
        let sessions = answer(house.sessions.call(SessionsMessage::Observe)).await;
        let monitor = answer(house.monitor.call(MonitorMessage::Observe)).await;
        let predictor = answer(house.predictor.call(PredictorMessage::Observe)).await;
        let actors = answer(house.supervisor.call(SupervisorMessage::Observe)).await;
        let actors = actors.map(|mut actors: Vec<ActorStatus>| {
            for actor in &mut actors {
                actor.mailbox = house.mailbox(actor.name);
            }
            actors
        });
        let catalogue = house.catalogue.load();
        let tiers: Vec<TierStatus> = house
            .ledger
            .views()
            .into_iter()
            .map(|view| {
                let device = match view.tier {
                    Tier::Vram(gpu) => house.devices.get(&gpu).map(|d| d.describe()),
                    Tier::Ram => None,
                };
                let sets = waiting.get(&view.tier).copied().flatten();
                let figures = figures.remove(&view.tier).flatten();
                TierStatus::new(view, device, sets, figures, now)
            })
            .collect();
        let health = health(&tiers, actors.as_deref(), sessions.is_some());
        let leases = house.ledger.leases();
        let discovery: DiscoveryView = discovery.unwrap_or_default();
        Status {
            health,
            uptime_s: now.as_secs_f64(),
            draining: house.draining.load(Ordering::Acquire),
            reader: house.reader.describe(),
            arena: house.arena.view(),
            lockable: Machine::lockable(),
            eviction: (house.eviction)().name().to_owned(),
            catalogue: CatalogueStatus {
                models: catalogue.len(),
                with_error: catalogue.models().filter(|m| m.error.is_some()).count(),
                generation: catalogue.generation(),
                scanning: discovery.scanning,
                watching: discovery.watching,
                polling: discovery.polling,
                last_scan: discovery.last,
            },
            tiers,
            sessions: sessions
                .unwrap_or_default()
                .iter()
                .map(|record: &Arc<Record>| SessionStatus {
                    id: record.id,
                    label: record.label.clone(),
                    leases: leases.get(&record.id).copied().unwrap_or(0),
                    age_s: now.saturating_sub(record.opened).as_secs_f64(),
                })
                .collect(),
            loads: house.config.sessions.max_loads.max(1) - house.loads.available_permits(),
            actors: actors.unwrap_or_default(),
            counters: house.counters.values(),
            phases: house.phases.view(),
            monitor,
            predictor,
        }
    }
}

/// An answer, if it comes in time.
async fn answer<R>(call: impl Future<Output = Result<R, crate::slot::Unavailable>>) -> Option<R> {
    tokio::time::timeout(ANSWER_TIME, call)
        .await
        .ok()
        .and_then(Result::ok)
}

/// Judges the load path: sessions, RAM and at least one tier beside it must answer.
fn health(tiers: &[TierStatus], actors: Option<&[ActorStatus]>, sessions: bool) -> Health {
    let mut problems = Vec::new();
    let mut red = !sessions;
    if !sessions {
        problems.push("sessions cannot be opened".to_owned());
    }
    for tier in tiers {
        if let Some(reason) = &tier.out_of_service {
            problems.push(format!("{} is out of service: {reason}", tier.tier));
        } else if tier.waiting.is_none() {
            problems.push(format!("the keeper of {} does not answer", tier.tier));
            red |= tier.tier == Tier::Ram;
        }
    }
    let gpus = || tiers.iter().filter(|tier| tier.tier != Tier::Ram);
    let broken = |tier: &TierStatus| tier.out_of_service.is_some() || tier.waiting.is_none();
    red |= gpus().next().is_some() && gpus().all(broken);
    match actors {
        None => {
            red = true;
            problems.push("the supervisor does not answer".into());
        }
        Some(actors) => {
            for actor in actors
                .iter()
                .filter(|a| a.state == ServiceState::OutOfService)
            {
                problems.push(format!(
                    "{} is out of service: {}",
                    actor.name,
                    actor.last_failure.as_deref().unwrap_or("it keeps failing")
                ));
            }
        }
    }
    match (red, problems.is_empty()) {
        (true, _) => Health::Red { problems },
        (false, false) => Health::Yellow { problems },
        (false, true) => Health::Green,
    }
}
