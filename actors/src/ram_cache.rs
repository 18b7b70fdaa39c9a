//! The RAM tier: admits sets, starts reads from disk, evicts.
//!
//! It owns no byte: slabs belong to the ledger. It never reads a file itself, and waits for nobody; reads run in tasks
//! that hold their [`FlightTicket`] and report to the ledger. Loaders and VramManagers talk to it.

mod read;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hotset_core::breaks::{self, Break};
use hotset_core::catalog::Component;
use hotset_core::decision::{Act, EvictCause};
use hotset_core::machine::NumaNode;
use hotset_core::memory::{FlightTicket, Memory, Reservation, Reserved, Want};
use hotset_core::{Bytes, ContentId, Tier};
use ractor::{ActorProcessingErr, ActorRef, RpcReplyPort};
use tokio_util::task::AbortOnDropHandle;

use crate::admission::{Admission, Request};
use crate::counters::add;
use crate::house::House;
use crate::monitor::Pressure;
use crate::phases::LoadPhase;

/// What the RAM tier is asked.
#[derive(Debug)]
pub(crate) enum RamCacheMessage {
    /// Memory for a set.
    Reserve(Request),
    /// Read this component, which is promised; nothing where it is there or under way. Into memory at this node, where it
    /// goes on to a GPU.
    Fetch(Arc<Component>, Option<NumaNode>),
    /// Read this component on a guess, if there is room that nobody needs.
    Prefetch {
        /// Which.
        component: Arc<Component>,
        /// How likely it is to be wanted.
        probability: f64,
    },
    /// The prefetch of this content has ended, one way or the other.
    Prefetched(ContentId),
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
    /// Holds each prefetch until it lands. Who drops one of these calls its read off, unless somebody demands it by now.
    guesses: BTreeMap<ContentId, Reservation>,
    _wake: AbortOnDropHandle<()>,
}

impl State {
    /// Guesses give back their memory as soon as somebody waits for some.
    fn yield_to_demand(&mut self) {
        if self.admission.waiting() > 0 {
            self.guesses.clear();
        }
    }
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
        let wake = wake_on(&house, Tier::Ram, myself, || RamCacheMessage::Woken);
        Ok(State {
            house,
            admission,
            guesses: BTreeMap::new(),
            _wake: wake,
        })
    }

    #[ractor::message(RamCacheMessage::Reserve(request))]
    fn reserve(&self, request: Request, state: &mut State) {
        state.admission.submit(request);
        state.yield_to_demand();
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

    #[ractor::message(RamCacheMessage::Prefetch { component, probability })]
    fn prefetch(
        &self,
        myself: ActorRef<RamCacheMessage>,
        component: Arc<Component>,
        probability: f64,
        state: &mut State,
    ) {
        let house = &state.house;
        let bytes = component.ram_bytes();
        // Guesses take free memory only, below the watermark and never while somebody waits.
        let Some(view) = house.ledger.view(Tier::Ram) else {
            return;
        };
        let high = view.budget.share(house.config.ram.high_watermark);
        if *house.pressure.borrow() == Pressure::High {
            return;
        }
        if state.admission.waiting() > 0 || view.committed.saturating_add(bytes) > high {
            return;
        }
        let wants = [Want::Component(component.clone(), bytes)];
        if house.ledger.needed(Tier::Ram, &wants).is_zero() {
            return;
        }
        let Ok(Reserved::Granted(reservation)) = house.ledger.reserve(Tier::Ram, &wants, true)
        else {
            return;
        };
        let Some(ticket) = house.ledger.start(Tier::Ram, &component.content_id) else {
            return;
        };
        add(&house.counters.prefetches, 1);
        house.decide(Act::Prefetch {
            component: component.id.clone(),
            tier: Tier::Ram,
            bytes,
            probability,
        });
        let content = component.content_id;
        state.guesses.insert(content, reservation);
        let read = read_component(house.clone(), component, None, ticket);
        house.tasks.spawn(async move {
            read.await;
            let _ = myself.send_message(RamCacheMessage::Prefetched(content));
        });
    }

    #[ractor::message(RamCacheMessage::Prefetched(content))]
    fn prefetched(&self, content: ContentId, state: &mut State) {
        // What has landed may be evicted at any time.
        state.guesses.remove(&content);
    }

    #[ractor::message(RamCacheMessage::Woken)]
    fn woken(&self, state: &mut State) {
        state.admission.retry();
        state.yield_to_demand();
    }

    #[ractor::message(RamCacheMessage::Relieve { keep, cause, reply })]
    fn relieve(
        &self,
        keep: f64,
        cause: EvictCause,
        reply: Option<RpcReplyPort<Bytes>>,
        state: &mut State,
    ) {
        state.guesses.clear();
        let surplus = state
            .house
            .ledger
            .view(Tier::Ram)
            .map_or(Bytes::ZERO, |view| {
                view.committed
                    .saturating_sub(view.evicting)
                    .saturating_sub(view.budget.share(keep))
            });
        let freed = state.admission.evict_up_to(surplus, &cause);
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
async fn read_component(
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
