//! Monitor: measures what others on the machine do to host memory, and tells the tiers.
//!
//! It measures at intervals, more often under pressure, and at once when the kernel says that tasks wait for memory or that a
//! limit of the control group has changed or was met. Under pressure prefetches end, what nobody holds is evicted half by half,
//! and memory that was kept warm goes back to the system.
//!
//! The decision log and the counters are kept in the house, so that they outlive this actor.

use std::sync::Arc;
use std::time::Duration;

use hotset_core::Tier;
use hotset_core::decision::EvictCause;
use hotset_core::machine::{LimitWatch, Machine, PressureTrigger};
use hotset_core::policy::pressure::{HostMemory, Judgement, judge};
use ractor::{ActorProcessingErr, ActorRef, RpcReplyPort};
use serde::Serialize;
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;

use crate::house::House;
use crate::ram_cache::RamCacheMessage;

/// What Monitor is asked.
#[derive(Debug)]
pub(crate) enum MonitorMessage {
    /// A measurement is there; `alarm` where the kernel asked for it.
    Measured {
        /// The figures.
        host: HostMemory,
        /// Tasks wait for memory just now.
        alarm: bool,
    },
    /// The state.
    Observe(RpcReplyPort<MonitorView>),
    /// Be busy for so long, as with a handler that is slow. For tests and chaos.
    Dawdle(Duration),
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
/// How many times as often is measured while there is pressure: what went last time is gone soon, and may not have been enough.
const OFTENER: u32 = 10;

#[ractor::actor(message = MonitorMessage, state = State, arguments = Arc<House>)]
impl Monitor {
    async fn pre_start(
        &self,
        myself: ActorRef<MonitorMessage>,
        house: Arc<House>,
    ) -> Result<State, ActorProcessingErr> {
        let measuring = measure_every(&house, myself);
        Ok(State {
            house,
            view: MonitorView::default(),
            _measuring: measuring,
        })
    }

    #[ractor::message(MonitorMessage::Measured { host, alarm })]
    fn measured(&self, host: HostMemory, alarm: bool, state: &mut State) {
        let house = &state.house;
        let before = state.view.pressure;
        let judgement = judge(&host, state.view.host.as_ref(), alarm);
        let pressure = if judgement == Judgement::Pressure {
            Pressure::High
        } else {
            Pressure::None
        };
        state.view = MonitorView {
            host: Some(host),
            pressure,
        };
        house.measured.send_replace(state.view.clone());
        house.settle_budget(&host);
        if pressure != before {
            house.pressure.send_replace(pressure);
            let arena = house.arena.clone();
            // Unmapping gigabytes takes long.
            house.off_thread(move || {
                let released = arena.set_pressed(pressure == Pressure::High);
                if !released.is_zero() {
                    tracing::info!(%released, "warm memory went back to the system");
                }
            });
        }
        if pressure == Pressure::High {
            if before != Pressure::High {
                tracing::warn!(
                    ?host,
                    alarm,
                    "others need host memory; dropping what nobody holds"
                );
            }
            let used = house.ledger.sums(Tier::Ram).map_or(0.0, |sums| {
                sums.committed.as_f64() / sums.budget.as_f64().max(1.0)
            });
            let _ = house.ram.cast(RamCacheMessage::Relieve {
                keep: used * KEEP_UNDER_PRESSURE,
                cause: EvictCause::Pressure,
                reply: None,
            });
        }
    }

    #[ractor::message(MonitorMessage::Dawdle(time))]
    async fn dawdle(&self, time: Duration, _state: &mut State) {
        tokio::time::sleep(time).await;
    }

    #[ractor::message(MonitorMessage::Observe(reply))]
    fn observe(&self, reply: RpcReplyPort<MonitorView>, state: &mut State) {
        let _ = reply.send(state.view.clone());
    }
}

/// Reads the kernel's figures on a blocking thread, since `/proc` can be slow on a machine in trouble.
fn measure_every(house: &Arc<House>, monitor: ActorRef<MonitorMessage>) -> AbortOnDropHandle<()> {
    let (house, machine) = (house.clone(), house.machine.clone());
    let interval = house.config.monitor.interval;
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    AbortOnDropHandle::new(tokio::spawn(async move {
        let alarms = Alarms::listen(&machine);
        loop {
            let pressed = *house.pressure.borrow() == Pressure::High;
            let alarm = tokio::select! {
                biased;
                () = alarms.stalled.notified() => true,
                () = alarms.limits.notified() => false,
                () = tokio::time::sleep(interval / OFTENER), if pressed => false,
                _ = ticks.tick() => false,
            };
            let machine = machine.clone();
            let Ok(host) = house.aside(move || machine.memory()).await else {
                continue;
            };
            if let Some(host) = host
                && monitor
                    .send_message(MonitorMessage::Measured { host, alarm })
                    .is_err()
            {
                return;
            }
        }
    }))
}

/// The kernel's alarms, each on a thread of its own. They never ring where the kernel has none.
struct Alarms {
    /// Tasks wait for memory.
    stalled: Arc<Notify>,
    /// A limit of the control group has changed, or was met.
    limits: Arc<Notify>,
    /// The threads end some time after this is gone.
    alive: Arc<()>,
}

impl Alarms {
    /// How often a thread looks whether it is still wanted.
    const LOOK: Duration = Duration::from_secs(2);
    /// Pause after word of limits: a group that reads files meets its own all the time, and a look costs several files.
    const PAUSE: Duration = Duration::from_millis(10);

    /// Listens to what the machine has.
    fn listen(machine: &Machine) -> Self {
        let alarms = Self {
            stalled: Arc::new(Notify::new()),
            limits: Arc::new(Notify::new()),
            alive: Arc::new(()),
        };
        if machine.is_simulated() {
            return alarms;
        }
        match PressureTrigger::watch(machine.pressure_file()) {
            Ok(trigger) => {
                let wait = move || trigger.wait(Self::LOOK);
                alarms.rings("hotset-psi", alarms.stalled.clone(), wait);
            }
            Err(error) => tracing::debug!("{error}"),
        }
        match machine.cgroup().map(LimitWatch::watch) {
            Some(Ok(watch)) => {
                let wait = move || {
                    let told = watch.wait(Self::LOOK);
                    if told {
                        std::thread::sleep(Self::PAUSE);
                    }
                    told
                };
                alarms.rings("hotset-limits", alarms.limits.clone(), wait);
            }
            Some(Err(error)) => {
                tracing::debug!(%error, "limits of the control group are read at intervals");
            }
            None => {}
        }
        alarms
    }

    /// Rings each time that `wait` says so.
    fn rings(&self, name: &str, bell: Arc<Notify>, wait: impl Fn() -> bool + Send + 'static) {
        let alive = Arc::downgrade(&self.alive);
        let listen = move || {
            while alive.strong_count() > 0 {
                if wait() {
                    bell.notify_one();
                }
            }
        };
        let thread = std::thread::Builder::new().name(name.into());
        if let Err(error) = thread.spawn(listen) {
            tracing::warn!(%error, name, "no thread for the kernel's alarms; memory is measured at intervals");
        }
    }
}
