//! The RAM tier: admits sets, starts reads from disk, evicts.
//!
//! It owns no byte: slabs belong to the ledger. It never reads a file itself, and waits for nobody; reads run in tasks
//! that hold their [`FlightTicket`] and report to the ledger. Loaders and VramManagers talk to it.

mod read;

use std::sync::Arc;
use std::time::Duration;

use hotset_core::breaks::{self, Break};
use hotset_core::catalog::Component;
use hotset_core::decision::EvictCause;
use hotset_core::machine::NumaNode;
use hotset_core::memory::{FlightTicket, Memory};
use hotset_core::{Bytes, Tier};
use ractor::{ActorProcessingErr, ActorRef, RpcReplyPort};
use tokio_util::task::AbortOnDropHandle;

use crate::admission::{Admission, Request};
use crate::counters::add;
use crate::guessing::{GuessMessage, Guessing, call_off_uploads};
use crate::house::House;
use crate::phases::LoadPhase;

/// What the RAM tier is asked.
#[derive(Debug)]
pub(crate) enum RamCacheMessage {
    /// Memory for a set.
    Reserve(Request),
    /// Read this component, which is promised; nothing where it is there or under way. Into memory at this node, where it
    /// goes on to a GPU.
    Fetch(Arc<Component>, Option<NumaNode>),
    /// Something about what nobody has asked for.
    Guess(GuessMessage),
    /// Bytes came back, or a pin was lifted.
    Woken,
    /// Others need memory: evict down to this share of the budget.
    Relieve {
        /// What may stay.
        keep: f64,
        /// Why.
        cause: EvictCause,
        /// How many bytes are coming back.
        reply: Option<RpcReplyPort<Bytes>>,
    },
    /// How many sets wait.
    Observe(RpcReplyPort<usize>),
    /// Be busy for so long, as with a handler that is slow. For tests and chaos.
    Dawdle(Duration),
}

pub(crate) struct RamCache;

pub(crate) struct State {
    house: Arc<House>,
    admission: Admission,
    guessing: Guessing,
    _wake: AbortOnDropHandle<()>,
}

#[ractor::actor(message = RamCacheMessage, state = State, arguments = Arc<House>)]
impl RamCache {
    async fn pre_start(
        &self,
        myself: ActorRef<RamCacheMessage>,
        house: Arc<House>,
    ) -> Result<State, ActorProcessingErr> {
        let config = &house.config.ram;
        let mut admission = Admission::new(
            house.clone(),
            Tier::Ram,
            config.high_watermark,
            config.low_watermark,
        );
        admission.trim();
        let wake = wake_on(&house, Tier::Ram, myself.clone(), || RamCacheMessage::Woken);
        let tell = move |message| {
            let _ = myself.send_message(RamCacheMessage::Guess(message));
        };
        let guessing = Guessing::new(house.clone(), Tier::Ram, config.high_watermark, tell);
        Ok(State {
            house,
            admission,
            guessing,
            _wake: wake,
        })
    }

    #[ractor::message(RamCacheMessage::Reserve(request))]
    fn reserve(&self, request: Request, state: &mut State) {
        state.guessing.make_way(&request, &mut state.admission);
        state.admission.submit(request);
        state.guessing.look(&mut state.admission);
        if state.admission.waiting() > 0 {
            call_off_uploads(&state.house, true);
        }
    }

    #[ractor::message(RamCacheMessage::Fetch(component, near))]
    fn fetch(&self, component: Arc<Component>, near: Option<NumaNode>, state: &mut State) {
        if let Some(ticket) = state.house.ledger.start(Tier::Ram, &component.content_id) {
            if breaks::is(Break::TwoFlights) {
                for _ in 0..state.house.devices.len() + 1 {
                    let again = read::twice(state.house.clone(), component.clone());
                    state.house.tasks.spawn(again);
                }
            }
            let read = read_component(state.house.clone(), component, near, ticket);
            // Not tied to the actor: a read outlives its restart.
            state.house.tasks.spawn(read);
        }
    }

    #[ractor::message(RamCacheMessage::Guess(message))]
    fn guess(&self, message: GuessMessage, state: &mut State) {
        state.guessing.told(message, &mut state.admission);
    }

    #[ractor::message(RamCacheMessage::Woken)]
    fn woken(&self, state: &mut State) {
        if state.guessing.keep_within_budget(&mut state.admission) {
            call_off_uploads(&state.house, false);
        }
        state.admission.retry();
        state.guessing.look(&mut state.admission);
    }

    #[ractor::message(RamCacheMessage::Relieve { keep, cause, reply })]
    fn relieve(
        &self,
        keep: f64,
        cause: EvictCause,
        reply: Option<RpcReplyPort<Bytes>>,
        state: &mut State,
    ) {
        state.guessing.call_off(&mut state.admission);
        call_off_uploads(&state.house, false);
        let freed = state.admission.relieve(keep, &cause);
        if let Some(reply) = reply {
            let _ = reply.send(freed);
        }
    }

    #[ractor::message(RamCacheMessage::Dawdle(time))]
    async fn dawdle(&self, time: Duration, _state: &mut State) {
        tokio::time::sleep(time).await;
    }

    #[ractor::message(RamCacheMessage::Observe(reply))]
    fn observe(&self, reply: RpcReplyPort<usize>, state: &mut State) {
        let _ = reply.send(state.admission.waiting());
    }
}

/// Sends a message to the keeper of a tier whenever the ledger has something for it. Ends with the keeper.
pub(crate) fn wake_on<M: ractor::Message>(
    house: &House,
    tier: Tier,
    keeper: ActorRef<M>,
    message: fn() -> M,
) -> AbortOnDropHandle<()> {
    let wake = house.ledger.wake(tier);
    AbortOnDropHandle::new(tokio::spawn(async move {
        if let Some(wake) = wake {
            loop {
                wake.notified().await;
                if keeper.send_message(message()).is_err() {
                    return;
                }
            }
        }
    }))
}

#[tracing::instrument(name = "read", skip_all, fields(component = %component.id))]
pub(crate) async fn read_component(
    house: Arc<House>,
    component: Arc<Component>,
    near: Option<NumaNode>,
    mut ticket: FlightTicket,
) {
    let began = house.ledger.now();
    match read::run(&house, &component, near, &mut ticket).await {
        Ok((slab, table)) => {
            let took = house.ledger.now().saturating_sub(began);
            house.phases.record(LoadPhase::Read, took);
            add(&house.counters.reads, 1);
            add(&house.counters.bytes_read, slab.bytes().get());
            tracing::debug!(bytes = %slab.bytes(), "read");
            ticket.land(Memory::Host(slab), table);
        }
        Err(failure) => {
            if !failure.is_passing() {
                add(&house.counters.reads_failed, 1);
                tracing::warn!(error = %failure, "read failed");
            }
            ticket.fail(failure);
        }
    }
}
