//! The RAM tier: admits sets, starts reads from disk, evicts.
//!
//! It owns no byte: slabs belong to the ledger. It never reads a file itself, and waits for nobody; reads run in tasks
//! that hold their [`FlightTicket`] and report to the ledger. Loaders and VramManagers talk to it.

mod read;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use hotset_core::breaks::{self, Break};
use hotset_core::catalog::Component;
use hotset_core::decision::{Act, EvictCause};
use hotset_core::machine::NumaNode;
use hotset_core::memory::{FlightTicket, Memory, Reservation, Reserved, Want};
use hotset_core::policy::Guess;
use hotset_core::predict::{Grounds, Position};
use hotset_core::{Bytes, ContentId, Tier};
use ractor::{ActorProcessingErr, ActorRef, RpcReplyPort};
use tokio_util::task::AbortOnDropHandle;

use crate::admission::{Admission, Request, Room};
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
    /// Read this component on a guess, if there is room that nobody needs, or what goes for it is worth far less.
    Prefetch(Arc<GuessedRead>),
    /// What went for a guess has given its memory back.
    Emptied(Arc<GuessedRead>),
    /// This prefetch has ended, one way or the other.
    Prefetched(Arc<GuessedRead>),
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

/// A component that nobody has asked for yet.
#[derive(Debug)]
pub(crate) struct GuessedRead {
    pub(crate) component: Arc<Component>,
    pub(crate) grounds: Grounds,
    /// How likely it is to be wanted.
    pub(crate) probability: f64,
    /// What reading it takes, in seconds.
    pub(crate) load_s: f64,
    /// Requests within which it has to be asked for, or it was wrong.
    pub(crate) within: u64,
}

/// A guess that is read.
struct Guessing {
    guess: Arc<GuessedRead>,
    /// Until it is called off: who drops this calls the read off, unless somebody demands it by now.
    reservation: Option<Reservation>,
    /// When somebody waited for what it holds, since the start of the system.
    in_the_way: Option<Duration>,
}

/// Guesses under way at most, the one that waits for room included. The disk reads a piece of one at a time.
const MOST_GUESSES: usize = 4;

pub(crate) struct RamCache;

pub(crate) struct State {
    house: Arc<House>,
    admission: Admission,
    /// Holds each prefetch until it lands.
    guesses: BTreeMap<ContentId, Guessing>,
    /// The guess for which others went whose memory is not back yet, and those after it.
    emptying: Option<Arc<GuessedRead>>,
    next: VecDeque<Arc<GuessedRead>>,
    _wake: AbortOnDropHandle<()>,
}

impl State {
    /// Guesses give back their memory as soon as somebody waits for some, but for what is waited for itself.
    fn yield_to_demand(&mut self) {
        if self.admission.waiting() == 0 {
            return;
        }
        let now = self.house.ledger.now();
        for (content, guessing) in &mut self.guesses {
            if !self.admission.is_waited_for(content) && guessing.reservation.take().is_some() {
                guessing.in_the_way = Some(now);
            }
        }
        self.give_up_emptying();
    }

    fn give_up_emptying(&mut self) {
        self.next.clear();
        self.admission.wake_for_guess(false);
        if let Some(guess) = self.emptying.take() {
            let content = guess.component.content_id;
            self.house.usage().guesses().withdraw(&content);
        }
    }

    /// One after the other where memory has to come back for one.
    fn consider_next(&mut self, myself: &ActorRef<RamCacheMessage>) {
        while self.emptying.is_none()
            && let Some(guess) = self.next.pop_front()
        {
            if self.is_evicting() {
                // It has to be back before anything can be told. Looked at again, since what came back before the flag woke nobody.
                self.admission.wake_for_guess(true);
                if self.is_evicting() {
                    self.next.push_front(guess);
                    return;
                }
            }
            self.consider(myself, guess);
        }
        self.admission.wake_for_guess(false);
    }

    /// Whether memory is on its way out.
    fn is_evicting(&self) -> bool {
        let view = self.house.ledger.view(Tier::Ram);
        view.is_some_and(|view| !view.evicting.is_zero())
    }

    /// Makes room for a guess and begins to read it, where it is worth that.
    fn consider(&mut self, myself: &ActorRef<RamCacheMessage>, guess: Arc<GuessedRead>) {
        let house = self.house.clone();
        let component = &guess.component;
        let bytes = component.ram_bytes();
        let wants = [Want::Component(component.clone(), bytes)];
        let Some(view) = house.ledger.view(Tier::Ram) else {
            return;
        };
        if *house.pressure.borrow() == Pressure::High
            || house.ledger.needed(Tier::Ram, &wants).is_zero()
            || house.usage().guesses().holds(&component.content_id)
        {
            return;
        }
        let high = view.budget.share(house.config.ram.high_watermark);
        let over = view.committed.saturating_add(bytes).saturating_sub(high);
        let asked = Guess {
            content: component.content_id,
            restore_s: guess.load_s,
            certain: guess.grounds == Grounds::Declared,
        };
        let room = match over.is_zero() {
            true => Some(Room::default()),
            false => self.admission.room_for(&asked, over),
        };
        let Some(room) = room.filter(|_| bytes <= high) else {
            return;
        };
        let position = Position {
            content: component.content_id,
            bytes,
            load_s: guess.load_s,
            victims: room.costs.clone(),
            until: 0,
        };
        let real = {
            let mut usage = house.usage();
            usage.guesses().open(guess.grounds, guess.within, position)
        };
        if !real {
            return;
        }
        if room.costs.is_empty() {
            self.begin(myself, guess);
            return;
        }
        let evicted = self.admission.make(room, &component.id);
        self.emptying = Some(guess.clone());
        let dropped = house.off_thread(move || drop(evicted));
        let myself = myself.clone();
        house.tasks.spawn(async move {
            let _ = dropped.await;
            let _ = myself.send_message(RamCacheMessage::Emptied(guess));
        });
    }

    fn begin(&mut self, myself: &ActorRef<RamCacheMessage>, guess: Arc<GuessedRead>) {
        let house = &self.house;
        let component = guess.component.clone();
        let (content, bytes) = (component.content_id, component.ram_bytes());
        let wants = [Want::Component(component.clone(), bytes)];
        let begun = match house.ledger.reserve(Tier::Ram, &wants, true) {
            Ok(Reserved::Granted(reservation)) => {
                let ticket = house.ledger.start(Tier::Ram, &content);
                ticket.map(|ticket| (reservation, ticket))
            }
            _ => None,
        };
        // Others were faster: with the memory, or with the component itself.
        let Some((reservation, ticket)) = begun else {
            house.usage().guesses().withdraw(&content);
            return;
        };
        add(&house.counters.prefetches, 1);
        house.decide(Act::Prefetch {
            component: component.id.clone(),
            tier: Tier::Ram,
            bytes,
            probability: guess.probability,
            grounds: guess.grounds,
        });
        let guessing = Guessing {
            guess: guess.clone(),
            reservation: Some(reservation),
            in_the_way: None,
        };
        self.guesses.insert(content, guessing);
        let read = read_component(house.clone(), component, None, ticket);
        let myself = myself.clone();
        house.tasks.spawn(async move {
            read.await;
            let _ = myself.send_message(RamCacheMessage::Prefetched(guess));
        });
    }
}

impl Drop for State {
    fn drop(&mut self) {
        // What is read for them ends with their reservations, and nobody hears of it.
        self.give_up_emptying();
        let mut usage = self.house.usage();
        for content in self.guesses.keys() {
            usage.guesses().withdraw(content);
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
            emptying: None,
            next: VecDeque::new(),
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

    #[ractor::message(RamCacheMessage::Prefetch(guess))]
    fn prefetch(
        &self,
        myself: ActorRef<RamCacheMessage>,
        guess: Arc<GuessedRead>,
        state: &mut State,
    ) {
        // Never while somebody waits.
        let emptying = usize::from(state.emptying.is_some());
        let many = state.guesses.len() + state.next.len() + emptying >= MOST_GUESSES;
        if many || state.admission.waiting() > 0 {
            return;
        }
        state.next.push_back(guess);
        state.consider_next(&myself);
    }

    #[ractor::message(RamCacheMessage::Emptied(guess))]
    fn emptied(
        &self,
        myself: ActorRef<RamCacheMessage>,
        guess: Arc<GuessedRead>,
        state: &mut State,
    ) {
        // Unless it was given up meanwhile.
        let is_it = |emptying: &Arc<GuessedRead>| Arc::ptr_eq(emptying, &guess);
        if state.emptying.as_ref().is_some_and(is_it) {
            state.emptying = None;
            state.begin(&myself, guess);
            state.consider_next(&myself);
        }
    }

    #[ractor::message(RamCacheMessage::Prefetched(guess))]
    fn prefetched(&self, guess: Arc<GuessedRead>, state: &mut State) {
        let component = guess.component.clone();
        let content = component.content_id;
        let is_it = |guessing: &Guessing| Arc::ptr_eq(&guessing.guess, &guess);
        if !state.guesses.get(&content).is_some_and(is_it) {
            return;
        }
        // What has landed may be evicted at any time.
        let Some(guessing) = state.guesses.remove(&content) else {
            return;
        };
        let house = &state.house;
        let bytes = component.ram_bytes();
        let wants = [Want::Component(component, bytes)];
        let there = house.ledger.needed(Tier::Ram, &wants).is_zero();
        let now = house.ledger.now();
        let mut usage = house.usage();
        if there {
            usage.guesses().landed(&content);
            return;
        }
        // Whoever waited did so for all of them together: until the last.
        let others = state.guesses.values().any(|g| g.in_the_way.is_some());
        if let Some(since) = guessing.in_the_way.filter(|_| !others) {
            let held_s = now.saturating_sub(since).as_secs_f64();
            usage.guesses().delayed(guess.grounds, held_s);
        }
        usage.guesses().gone(&content);
    }

    #[ractor::message(RamCacheMessage::Woken)]
    fn woken(&self, myself: ActorRef<RamCacheMessage>, state: &mut State) {
        state.admission.retry();
        state.yield_to_demand();
        state.consider_next(&myself);
    }

    #[ractor::message(RamCacheMessage::Relieve { keep, cause, reply })]
    fn relieve(
        &self,
        keep: f64,
        cause: EvictCause,
        reply: Option<RpcReplyPort<Bytes>>,
        state: &mut State,
    ) {
        for guess in state.guesses.values_mut() {
            guess.reservation = None;
        }
        state.give_up_emptying();
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
