//! The VRAM tier of one GPU: admits sets, starts uploads, evicts.
//!
//! It owns no byte: allocations belong to the ledger. Uploads run in tasks that hold their [`FlightTicket`]; they follow
//! the reader's watermark, so that the link works while the disk still does. Loaders talk to it, and it talks to
//! RamCache.
//!
//! It asks the device at intervals how it is. What other processes have taken lowers the budget, and what nobody holds is
//! evicted for them; whoever holds leases is asked when that does not suffice. A device that is lost goes out of service
//! with all its leases; the actor ends, and after its restart tries to bring the device back.

mod turns;
mod upload;

pub(crate) use turns::Turns;
pub(crate) use upload::{Ring, Source, Upload};

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use hotset_core::catalog::Component;
use hotset_core::config::GpuConfig;
use hotset_core::decision::EvictCause;
use hotset_core::device::{Device, DeviceError, Figures, budget};
use hotset_core::{Bytes, GpuIndex, RequestId, SessionId, Tier};
use ractor::{ActorProcessingErr, ActorRef, RpcReplyPort};
use tokio_util::task::AbortOnDropHandle;

use crate::admission::{Admission, Request};
use crate::guessing::{GuessMessage, Guessing};
use crate::house::{GpuEvent, House, Shortage};
use crate::ram_cache::wake_on;

/// Xid errors that status shows, the last ones.
const XIDS_SHOWN: usize = 16;

/// What the VRAM tier of one GPU is asked.
#[derive(Debug)]
pub(crate) enum VramManagerMessage {
    /// Memory for a set.
    Reserve(Request),
    /// Upload this component, which is promised; nothing where it is there or under way.
    Upload(Arc<Component>, Source),
    /// Something about what nobody has asked for.
    Guess(GuessMessage),
    /// Bytes came back, or a pin was lifted.
    Woken,
    /// Evict down to this share of the budget.
    Relieve {
        /// What may stay.
        keep: f64,
        /// Why.
        cause: EvictCause,
        /// How many bytes are coming back.
        reply: Option<RpcReplyPort<Bytes>>,
    },
    /// An allocation found less memory than the books say: evict what nobody holds, until this much comes back.
    MakeRoom {
        /// How much.
        missing: Bytes,
        /// Why.
        cause: EvictCause,
        /// How many bytes are coming back.
        reply: RpcReplyPort<Bytes>,
    },
    /// How the device is.
    Measured(Result<Figures, DeviceError>),
    /// Whether a lost device could be brought back.
    Recovered(Result<(), DeviceError>),
    /// The state.
    Observe(RpcReplyPort<VramView>),
    /// Be busy for so long, as with a handler that is slow. For tests and chaos.
    Dawdle(Duration),
}

/// The state of a VRAM tier beside its books.
#[derive(Debug, Clone, Default)]
pub(crate) struct VramView {
    /// How many sets wait.
    pub(crate) waiting: usize,
    /// What the device said last.
    pub(crate) figures: Option<Figures>,
}

pub(crate) struct VramManager;

pub(crate) struct State {
    house: Arc<House>,
    tier: Tier,
    device: Arc<dyn Device>,
    config: GpuConfig,
    admission: Admission,
    guessing: Guessing,
    figures: Option<Figures>,
    /// The last Xid errors, of which each measurement tells only the new ones.
    xids: VecDeque<u64>,
    /// What leases hold beyond the budget, so that their holders are asked once for each change.
    wanted: Bytes,
    /// This process cannot use the device any more.
    spent: bool,
    _wake: AbortOnDropHandle<()>,
    _measuring: AbortOnDropHandle<()>,
}

#[ractor::actor(message = VramManagerMessage, state = State, arguments = (Arc<House>, GpuIndex))]
impl VramManager {
    async fn pre_start(
        &self,
        myself: ActorRef<VramManagerMessage>,
        (house, gpu): (Arc<House>, GpuIndex),
    ) -> Result<State, ActorProcessingErr> {
        let device = house
            .devices
            .get(&gpu)
            .cloned()
            .ok_or_else(|| format!("there is no device for GPU {gpu}"))?;
        let config = house
            .config
            .gpu
            .get(gpu.0 as usize)
            .cloned()
            .unwrap_or_default();
        let tier = Tier::Vram(gpu);
        let mut admission = Admission::new(
            house.clone(),
            tier,
            config.high_watermark,
            config.low_watermark,
        );
        match device.lost() {
            None => house.ledger.set_service(tier, None),
            // Until it is back, loads are refused instead of waiting. It may have been lost while nobody was here to see it:
            // what was in it is gone with that, however soon it is back.
            Some(reason) => lost(&house, tier, &reason),
        }
        admission.trim();
        let wake = wake_on(&house, tier, myself.clone(), || VramManagerMessage::Woken);
        let measuring = watch_device(
            house.config.monitor.gpu_interval,
            device.clone(),
            myself.clone(),
        );
        let tell = move |message| {
            let _ = myself.send_message(VramManagerMessage::Guess(message));
        };
        let guessing = Guessing::new(house.clone(), tier, config.high_watermark, tell);
        Ok(State {
            figures: house.first_figures.get(&gpu).cloned(),
            house,
            tier,
            device,
            config,
            admission,
            guessing,
            xids: VecDeque::new(),
            wanted: Bytes::ZERO,
            spent: false,
            _wake: wake,
            _measuring: measuring,
        })
    }

    #[ractor::message(VramManagerMessage::Measured(measured))]
    fn measured(
        &self,
        myself: ActorRef<VramManagerMessage>,
        measured: Result<Figures, DeviceError>,
        state: &mut State,
    ) {
        match measured {
            Ok(figures) => state.measured(figures),
            // That is known, and an upload that was under way meets it only now.
            Err(DeviceError::Lost { .. }) if state.spent => {}
            Err(DeviceError::Lost { reason, .. }) => {
                lost(&state.house, state.tier, &reason);
                // The supervisor starts it again, and it tries to bring the device back.
                myself.stop(Some(format!("its GPU is lost: {reason}")));
            }
            Err(error) => tracing::warn!(%error, "a GPU does not say how it is"),
        }
    }

    #[ractor::message(VramManagerMessage::Recovered(recovered))]
    fn recovered(
        &self,
        myself: ActorRef<VramManagerMessage>,
        recovered: Result<(), DeviceError>,
        state: &mut State,
    ) {
        let tier = state.tier;
        match recovered {
            Ok(()) => {
                let house = state.house.clone();
                state
                    .house
                    .tasks
                    .spawn(async move { house.open_links().await });
                state.house.ledger.set_service(tier, None);
                let _ = state.house.gpu_events.send(GpuEvent::Back { tier });
            }
            Err(error) => {
                let reason: Arc<str> = error.to_string().into();
                let house = &state.house;
                house.ledger.set_service(tier, Some(reason.clone()));
                if let DeviceError::Spent { .. } = error {
                    // Nothing is left to try in this process, so the manager stays and refuses.
                    tracing::error!(%tier, %reason, "a GPU is out of service for good");
                    state.spent = true;
                    house.spent.send_replace(Some(reason.clone()));
                    let _ = house.gpu_events.send(GpuEvent::Spent { tier, reason });
                } else {
                    myself.stop(Some(reason.to_string()));
                }
            }
        }
    }

    #[ractor::message(VramManagerMessage::MakeRoom { missing, cause, reply })]
    fn make_room(
        &self,
        missing: Bytes,
        cause: EvictCause,
        reply: RpcReplyPort<Bytes>,
        state: &mut State,
    ) {
        state.guessing.call_off(&mut state.admission);
        let _ = reply.send(state.admission.evict_up_to(missing, &cause));
    }

    #[ractor::message(VramManagerMessage::Reserve(request))]
    fn reserve(&self, request: Request, state: &mut State) {
        state.guessing.make_way(&request, &mut state.admission);
        state.admission.submit(request);
        state.guessing.look(&mut state.admission);
    }

    #[ractor::message(VramManagerMessage::Guess(message))]
    fn guess(&self, message: GuessMessage, state: &mut State) {
        state.guessing.told(message, &mut state.admission);
    }

    #[ractor::message(VramManagerMessage::Upload(component, source))]
    fn upload(&self, component: Arc<Component>, source: Source, state: &mut State) {
        if let Some(ticket) = state.house.ledger.start(state.tier, &component.content_id) {
            let upload = Upload {
                house: state.house.clone(),
                device: state.device.clone(),
                component,
                ticket,
            };
            // Not tied to the actor: an upload outlives its restart.
            state.house.tasks.spawn(upload.run(source));
        }
    }

    #[ractor::message(VramManagerMessage::Woken)]
    fn woken(&self, state: &mut State) {
        state.admission.retry();
        state.guessing.look(&mut state.admission);
    }

    #[ractor::message(VramManagerMessage::Relieve { keep, cause, reply })]
    fn relieve(
        &self,
        keep: f64,
        cause: EvictCause,
        reply: Option<RpcReplyPort<Bytes>>,
        state: &mut State,
    ) {
        state.guessing.call_off(&mut state.admission);
        let freed = state.admission.relieve(keep, &cause);
        if let Some(reply) = reply {
            let _ = reply.send(freed);
        }
    }

    #[ractor::message(VramManagerMessage::Dawdle(time))]
    async fn dawdle(&self, time: Duration, _state: &mut State) {
        tokio::time::sleep(time).await;
    }

    #[ractor::message(VramManagerMessage::Observe(reply))]
    fn observe(&self, reply: RpcReplyPort<VramView>, state: &mut State) {
        let _ = reply.send(VramView {
            waiting: state.admission.waiting(),
            figures: state.figures.clone().map(|figures| Figures {
                xids: state.xids.iter().copied().collect(),
                ..figures
            }),
        });
    }
}

impl State {
    /// Keeps within what others leave.
    fn measured(&mut self, figures: Figures) {
        let allowed = budget::allowed(&self.config, &figures);
        let cause = EvictCause::Foreign {
            foreign: figures.foreign,
            allowed,
        };
        let ledger = &self.house.ledger;
        if ledger.budget(self.tier) != Some(allowed) {
            ledger.open_tier(self.tier, allowed);
        }
        if !figures.xids.is_empty() {
            tracing::warn!(tier = %self.tier, xids = ?figures.xids, "the driver reports errors of a GPU");
            self.xids.extend(&figures.xids);
            let surplus = self.xids.len().saturating_sub(XIDS_SHOWN);
            self.xids.drain(..surplus);
        }
        self.figures = Some(figures);
        self.guessing.keep_within_budget(&mut self.admission);
        let missing = self.admission.keep_within_budget(&cause);
        if missing > self.wanted {
            let leases = self.house.ledger.leases_in(self.tier);
            tracing::warn!(tier = %self.tier, %missing, leases = leases.len(), "others took memory that leases hold");
            let _ = self.house.gpu_events.send(GpuEvent::Wanted {
                tier: self.tier,
                missing,
                leases,
            });
            // Clients that let go when they are asked hear of it like of any other shortage. Nobody's load is behind it.
            let _ = self.house.shortages.send(Shortage {
                tier: self.tier,
                session: SessionId(0),
                request: RequestId(0),
                missing,
            });
        }
        self.wanted = missing;
        // What was lowered may have risen again.
        self.admission.retry();
        self.guessing.look(&mut self.admission);
    }
}

/// Takes a tier out of service, with everything that was in it. Once for each loss: a manager that is started again while the
/// GPU is lost has nothing more to tell.
fn lost(house: &House, tier: Tier, reason: &Arc<str>) {
    let ledger = &house.ledger;
    let known = ledger.sums(tier).is_some_and(|sums| !sums.in_service);
    ledger.set_service(tier, Some(reason.clone()));
    let leases = ledger.revoke_tier(tier, reason);
    house.usage().guesses().lost(tier);
    if known && leases.is_empty() {
        return;
    }
    tracing::error!(%tier, %reason, leases = leases.len(), "a GPU is out of service");
    let _ = house.gpu_events.send(GpuEvent::Lost {
        tier,
        reason: reason.clone(),
        leases,
    });
}

/// Brings the device back where it is lost, and then asks it at intervals how it is. Ends with the manager.
fn watch_device(
    interval: Duration,
    device: Arc<dyn Device>,
    manager: ActorRef<VramManagerMessage>,
) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        if device.lost().is_some() {
            let recovered = device.recover().await;
            let failed = recovered.is_err();
            let told = manager.send_message(VramManagerMessage::Recovered(recovered));
            if failed || told.is_err() {
                return;
            }
        }
        let mut ticks = tokio::time::interval(interval.max(Duration::from_millis(10)));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            ticks.tick().await;
            let measured = device.figures().await;
            if manager
                .send_message(VramManagerMessage::Measured(measured))
                .is_err()
            {
                return;
            }
        }
    }))
}
