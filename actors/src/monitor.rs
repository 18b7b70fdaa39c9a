//! Monitor: measures what others on the machine do to host memory, and tells the tiers.
//!
//! The decision log and the counters are kept in the house, so that they outlive this actor.

use std::sync::Arc;
use std::time::Duration;

use hotset_core::decision::EvictCause;
use hotset_core::policy::pressure::{HostMemory, Judgement, judge};
use ractor::{ActorProcessingErr, ActorRef, RpcReplyPort};
use serde::Serialize;
use tokio_util::task::AbortOnDropHandle;

use crate::house::House;
use crate::ram_cache::RamCacheMessage;

/// What Monitor is asked.
#[derive(Debug)]
pub(crate) enum MonitorMessage {
    /// A measurement is there.
    Measured(HostMemory),
    /// The state.
    Observe(RpcReplyPort<MonitorView>),
}

/// How host memory stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pressure {
    /// Not measured yet, or it cannot be.
    #[default]
    Unknown,
    /// Enough.
    None,
    /// Others need memory: unleased slabs go.
    High,
}

/// What Monitor has measured last.
#[derive(Debug, Clone, Default, Serialize)]
pub struct MonitorView {
    /// The figures.
    pub host: Option<HostMemory>,
    /// What they mean.
    pub pressure: Pressure,
}

pub(crate) struct Monitor;

pub(crate) struct State {
    house: Arc<House>,
    view: MonitorView,
    _measuring: AbortOnDropHandle<()>,
}

/// What may stay of the RAM budget under pressure: half of what is there goes, then half of the rest, until it ends.
const KEEP_UNDER_PRESSURE: f64 = 0.5;

#[ractor::actor(message = MonitorMessage, state = State, arguments = Arc<House>)]
impl Monitor {
    async fn pre_start(
        &self,
        myself: ActorRef<MonitorMessage>,
        house: Arc<House>,
    ) -> Result<State, ActorProcessingErr> {
        let measuring = measure_every(house.config.monitor.interval, myself);
        Ok(State {
            house,
            view: MonitorView::default(),
            _measuring: measuring,
        })
    }

    #[ractor::message(MonitorMessage::Measured(host))]
    fn measured(&self, host: HostMemory, state: &mut State) {
        let before = state.view.pressure;
        state.view = MonitorView {
            host: Some(host),
            pressure: match judge(&host) {
                Judgement::Enough => Pressure::None,
                Judgement::Pressure => Pressure::High,
            },
        };
        state.house.measured.send_replace(state.view.clone());
        if state.view.pressure == Pressure::High {
            if before != Pressure::High {
                tracing::warn!(?host, "others need host memory; dropping what nobody holds");
            }
            let used = state
                .house
                .ledger
                .view(hotset_core::Tier::Ram)
                .map_or(0.0, |view| {
                    view.committed.as_f64() / view.budget.as_f64().max(1.0)
                });
            let _ = state.house.ram.cast(RamCacheMessage::Relieve {
                keep: used * KEEP_UNDER_PRESSURE,
                cause: EvictCause::Pressure,
                reply: None,
            });
        }
    }

    #[ractor::message(MonitorMessage::Observe(reply))]
    fn observe(&self, reply: RpcReplyPort<MonitorView>, state: &mut State) {
        let _ = reply.send(state.view.clone());
    }
}

/// Reads the kernel's figures on a blocking thread, since `/proc` can be slow on a machine in trouble.
fn measure_every(interval: Duration, monitor: ActorRef<MonitorMessage>) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        let mut ticks = tokio::time::interval(interval.max(Duration::from_millis(10)));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            ticks.tick().await;
            let read = || {
                let meminfo = std::fs::read_to_string("/proc/meminfo").ok();
                let pressure = std::fs::read_to_string("/proc/pressure/memory").ok();
                (meminfo, pressure)
            };
            let Ok((meminfo, pressure)) = tokio::task::spawn_blocking(read).await else {
                continue;
            };
            if let Some(host) =
                HostMemory::parse(meminfo.as_deref().unwrap_or_default(), pressure.as_deref())
                && monitor
                    .send_message(MonitorMessage::Measured(host))
                    .is_err()
            {
                return;
            }
        }
    }))
}
