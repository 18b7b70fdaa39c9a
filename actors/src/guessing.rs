//! What is loaded into one tier before anybody asks for it: one after the other, and out of the way of whoever waits. Not an
//! actor, but what the keepers of all tiers (RamCache, each VramManager) have in common.
//!
//! A component that is on disk alone comes to RAM first, and goes on to the GPU where it is expected once it is there.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use hotset_core::catalog::Component;
use hotset_core::decision::Act;
use hotset_core::device::Device;
use hotset_core::io::Urgency;
use hotset_core::memory::{Claim, FlightTicket, Reservation, Reserved, ResidencyState, Want};
use hotset_core::plan::restore_s;
use hotset_core::policy::Guess;
use hotset_core::predict::{Grounds, Position};
use hotset_core::{Bytes, ContentId, GpuIndex, Tier};

use crate::admission::{Admission, Request, Room};
use crate::counters::add;
use crate::house::House;
use crate::monitor::Pressure;
use crate::ram_cache::{RamCacheMessage, read_component};
use crate::vram_manager::{Source, Upload, VramManagerMessage};

/// A component that nobody has asked for yet.
#[derive(Debug)]
pub(crate) struct GuessedLoad {
    pub(crate) component: Arc<Component>,
    pub(crate) grounds: Grounds,
    /// How likely it is to be wanted.
    pub(crate) probability: f64,
    /// What loading it takes, in seconds.
    pub(crate) load_s: f64,
    /// Requests within which it has to be asked for, or it was wrong.
    pub(crate) within: u64,
    /// Where it goes once it is in RAM.
    pub(crate) onto: Option<GpuIndex>,
}

impl GuessedLoad {
    fn content(&self) -> ContentId {
        self.component.content_id
    }
}

/// What a keeper is told of guesses.
#[derive(Debug)]
pub(crate) enum GuessMessage {
    /// Load this, if there is room that nobody needs, or what goes for it is worth far less.
    Propose(Arc<GuessedLoad>),
    /// What went for it has given its memory back.
    Emptied(Arc<GuessedLoad>),
    /// It has ended, one way or the other, after so much of its time that nobody waited for it: 1 where nobody came.
    Ended(Arc<GuessedLoad>, f64),
    /// What was called off should have ended by now.
    Overdue,
    /// Nothing is guessed any more, or memory is short in another tier, which those under way hold as well.
    CallOff {
        /// Somebody waits for it there.
        waited_for: bool,
    },
}

/// How a keeper hears of its guesses.
type Tell = Arc<dyn Fn(GuessMessage) + Send + Sync>;

/// A guess whose bytes move.
struct UnderWay {
    guess: Arc<GuessedLoad>,
    /// Until it is called off: who drops this calls the load off, unless somebody demands it by now.
    reservation: Option<Reservation>,
    /// Raised by whoever wants it before it is there.
    urgency: Urgency,
    /// When it was called off, since the start of the system, and whether somebody waited for what it holds.
    called_off: Option<(Duration, bool)>,
}

/// How long others wait for the memory of a guess that was called off, before anything else goes for them: a disk may hang.
const GIVEN: Duration = Duration::from_millis(250);

impl UnderWay {
    /// Nor did anybody come who wants it after all.
    fn is_called_off(&self) -> bool {
        self.reservation.is_none() && self.urgency.is_prefetch()
    }
}

/// How a component comes to a tier on a guess.
enum Route {
    /// From disk to RAM.
    Read,
    /// To a GPU, from RAM, where this claim holds it.
    Upload(Arc<dyn Device>, Claim),
}

/// A guess for which others went.
struct Emptying {
    guess: Arc<GuessedLoad>,
    route: Route,
}

/// Guesses under way at most, the one that waits for room included. A disk or a link moves a piece of one at a time.
const MOST_GUESSES: usize = 4;

/// The guesses of one tier.
pub(crate) struct Guessing {
    house: Arc<House>,
    tier: Tier,
    high_watermark: f64,
    tell: Tell,
    /// Holds each until it lands. In the order in which they began, which content ids have not: those differ from run to run of a
    /// simulation, as its files do.
    under_way: Vec<UnderWay>,
    /// The one for which others went whose memory is not back yet, and those after it.
    emptying: Option<Emptying>,
    next: VecDeque<Arc<GuessedLoad>>,
}

impl Guessing {
    pub(crate) fn new(
        house: Arc<House>,
        tier: Tier,
        high_watermark: f64,
        tell: impl Fn(GuessMessage) + Send + Sync + 'static,
    ) -> Self {
        Self {
            house,
            tier,
            high_watermark,
            tell: Arc::new(tell),
            under_way: Vec::new(),
            emptying: None,
            next: VecDeque::new(),
        }
    }

    pub(crate) fn told(&mut self, message: GuessMessage, admission: &mut Admission) {
        match message {
            GuessMessage::Propose(guess) => {
                // Never while somebody waits, nor what was on its way when guessing ended.
                let wanted = self.house.predicting.load(Ordering::Relaxed);
                let emptying = usize::from(self.emptying.is_some());
                let many = self.under_way.len() + self.next.len() + emptying >= MOST_GUESSES;
                if wanted && !many && admission.waiting() == 0 {
                    self.next.push_back(guess);
                    self.consider_next(admission);
                }
            }
            GuessMessage::Emptied(guess) => {
                // Unless it was given up meanwhile.
                let is_it = |emptying: &mut Emptying| Arc::ptr_eq(&emptying.guess, &guess);
                if let Some(Emptying { guess, route }) = self.emptying.take_if(is_it) {
                    self.begin(guess, route);
                    self.consider_next(admission);
                }
            }
            GuessMessage::Ended(guess, share) => {
                self.ended(&guess, share, admission.waiting() > 0);
                self.expect_less(admission);
            }
            GuessMessage::Overdue => self.expect_less(admission),
            GuessMessage::CallOff { waited_for } => {
                self.drop_reservations(waited_for, |_| false);
                self.give_up_emptying(admission);
            }
        }
    }

    /// Bytes came back, or somebody began to wait: guesses give back their memory as soon as somebody waits for some, but for
    /// what is waited for itself.
    pub(crate) fn look(&mut self, admission: &mut Admission) {
        if admission.waiting() == 0 {
            self.consider_next(admission);
            return;
        }
        let all = self.under_way.iter().map(|one| one.guess.content());
        let waited_for: HashSet<ContentId> = all
            .filter(|content| admission.is_waited_for(content))
            .collect();
        self.give_way(admission, |content| waited_for.contains(content));
    }

    /// Before anything goes for a set: guesses are the first to give, but for what it wants itself.
    pub(crate) fn make_way(&mut self, request: &Request, admission: &mut Admission) {
        let none = self.under_way.is_empty() && self.emptying.is_none();
        if !none && admission.is_short(request) {
            let wanted: HashSet<ContentId> =
                request.wants.iter().filter_map(Want::content).collect();
            self.give_way(admission, |content| wanted.contains(content));
        }
    }

    /// What was expected has come, or never will.
    fn expect_less(&self, admission: &mut Admission) {
        admission.expect(self.coming());
        admission.retry();
    }

    /// Somebody waits for what they hold.
    fn give_way(&mut self, admission: &mut Admission, but: impl Fn(&ContentId) -> bool) {
        self.drop_reservations(true, but);
        self.give_up_emptying(admission);
    }

    fn drop_reservations(&mut self, waited_for: bool, but: impl Fn(&ContentId) -> bool) {
        let now = self.house.ledger.now();
        let mut any = false;
        for under_way in &mut self.under_way {
            if !but(&under_way.guess.content()) && under_way.reservation.take().is_some() {
                under_way.called_off = Some((now, waited_for));
                any = true;
            }
        }
        if any {
            let tell = self.tell.clone();
            // Nor does the end of the system wait for it.
            drop(tokio::spawn(async move {
                tokio::time::sleep(GIVEN).await;
                tell(GuessMessage::Overdue);
            }));
        }
    }

    /// The memory itself is short, whoever waits.
    pub(crate) fn call_off(&mut self, admission: &mut Admission) {
        self.drop_reservations(false, |_| false);
        self.give_up_emptying(admission);
    }

    /// The same where more is committed than the budget allows, which may have become less. Gives whether it is.
    pub(crate) fn keep_within_budget(&mut self, admission: &mut Admission) -> bool {
        let sums = self.house.ledger.sums(self.tier);
        let over = sums.is_some_and(|sums| sums.used() > sums.budget);
        if over {
            self.call_off(admission);
        }
        over
    }

    fn give_up_emptying(&mut self, admission: &mut Admission) {
        self.next.clear();
        admission.wake_for_guess(false);
        if let Some(emptying) = self.emptying.take() {
            self.withdraw(&emptying.guess.content());
        }
        admission.expect(self.coming());
    }

    /// What those that were called off still hold, as long as it may be expected.
    fn coming(&self) -> Bytes {
        let now = self.house.ledger.now();
        let soon = |under_way: &&UnderWay| {
            let since = under_way.called_off.map(|(since, _)| since);
            under_way.is_called_off() && since.is_some_and(|since| now < since + GIVEN)
        };
        let all = self.under_way.iter();
        all.filter(soon)
            .map(|under_way| self.want(&under_way.guess.component).bytes())
            .sum()
    }

    fn withdraw(&self, content: &ContentId) {
        self.house.usage().guesses().withdraw(self.tier, content);
    }

    /// One after the other where memory has to come back for one.
    fn consider_next(&mut self, admission: &mut Admission) {
        while self.emptying.is_none()
            && let Some(guess) = self.next.pop_front()
        {
            if self.is_evicting() {
                // It has to be back before anything can be told. Looked at again, since what came back before the flag woke nobody.
                admission.wake_for_guess(true);
                if self.is_evicting() {
                    self.next.push_front(guess);
                    return;
                }
            }
            self.consider(guess, admission);
        }
        admission.wake_for_guess(false);
    }

    /// Whether memory is on its way out.
    fn is_evicting(&self) -> bool {
        let sums = self.house.ledger.sums(self.tier);
        sums.is_some_and(|sums| !sums.evicting.is_zero())
    }

    /// Whether a GPU's guess would hold what somebody waits for in RAM.
    fn is_in_the_way(&self) -> bool {
        let ledger = &self.house.ledger;
        self.tier != Tier::Ram && ledger.somebody_waits_before(&[Tier::Ram], Duration::MAX)
    }

    fn want(&self, component: &Arc<Component>) -> Want {
        let bytes = match self.tier {
            Tier::Ram => component.ram_bytes(),
            Tier::Vram(gpu) => {
                let bytes = component.device_bytes();
                let device = self.house.devices.get(&gpu);
                device.map_or(bytes, |device| device.describe().granules.footprint(bytes))
            }
        };
        Want::Component(component.clone(), bytes)
    }

    /// Makes room for a guess and begins to load it, where it is worth that.
    fn consider(&mut self, guess: Arc<GuessedLoad>, admission: &mut Admission) {
        let house = self.house.clone();
        let (component, content) = (&guess.component, guess.content());
        let want = self.want(component);
        let bytes = want.bytes();
        let Some(sums) = house.ledger.sums(self.tier) else {
            return;
        };
        if *house.pressure.borrow() == Pressure::High
            || self.is_in_the_way()
            || house.ledger.needed(self.tier, &[want]).is_zero()
            || house.usage().guesses().holds(self.tier, &content)
        {
            return;
        }
        let high = sums.budget.share(self.high_watermark);
        let over = sums.committed.saturating_add(bytes).saturating_sub(high);
        let asked = Guess {
            content,
            restore_s: guess.load_s,
            certain: guess.grounds == Grounds::Declared,
        };
        let room = match over.is_zero() {
            true => Some(Room::default()),
            false => admission.room_for(&asked, over),
        };
        let Some(room) = room.filter(|_| bytes <= high) else {
            return;
        };
        // Before anything goes for it: what it comes from stays there.
        let Some(route) = self.route(component) else {
            return;
        };
        let position = Position {
            content,
            bytes,
            load_s: guess.load_s,
            victims: room.costs.clone(),
            until: 0,
        };
        let real = {
            let mut usage = house.usage();
            let guesses = usage.guesses();
            guesses.open(self.tier, guess.grounds, guess.within, position)
        };
        if !real {
            return;
        }
        if room.costs.is_empty() {
            self.begin(guess, route);
            return;
        }
        let evicted = admission.make(room, &component.id);
        let dropped = house.off_thread(move || drop(evicted));
        let device = match &route {
            Route::Read => None,
            Route::Upload(device, _) => Some(device.clone()),
        };
        self.emptying = Some(Emptying {
            guess: guess.clone(),
            route,
        });
        let tell = self.tell.clone();
        house.tasks.spawn(async move {
            let _ = dropped.await;
            if let Some(device) = device {
                // It frees memory in its own time.
                device.settle().await;
            }
            tell(GuessMessage::Emptied(guess));
        });
    }

    fn begin(&mut self, guess: Arc<GuessedLoad>, route: Route) {
        let house = &self.house;
        let component = &guess.component;
        let (content, want) = (guess.content(), self.want(component));
        let bytes = want.bytes();
        let begun = match house.ledger.reserve(self.tier, &[want], true) {
            Ok(Reserved::Granted(reservation)) => {
                let ticket = house.ledger.start(self.tier, &content);
                ticket.map(|ticket| (reservation, ticket))
            }
            _ => None,
        };
        // Others were faster: with the memory, or with the component itself.
        let Some((reservation, ticket)) = begun else {
            self.withdraw(&content);
            return;
        };
        let urgency = ticket.urgency().clone();
        let moving = self.moving(component, route, ticket);
        add(&house.counters.prefetches, 1);
        house.decide(Act::Prefetch {
            component: component.id.clone(),
            tier: self.tier,
            bytes,
            probability: guess.probability,
            grounds: guess.grounds,
        });
        let under_way = UnderWay {
            guess: guess.clone(),
            reservation: Some(reservation),
            urgency: urgency.clone(),
            called_off: None,
        };
        self.under_way.push(under_way);
        let tell = self.tell.clone();
        // Not tied to the actor, like every load.
        let task = house.clone();
        house.tasks.spawn(async move {
            let mut ending = Ending {
                tell,
                guess,
                share: 0.0,
            };
            ending.share = alone(&task, &urgency, moving).await;
        });
    }

    /// How it would come here; `None` where it is not where it comes from.
    fn route(&self, component: &Arc<Component>) -> Option<Route> {
        let Tier::Vram(gpu) = self.tier else {
            return Some(Route::Read);
        };
        let wants = [Want::Component(component.clone(), component.ram_bytes())];
        // As a guess, since nobody has used it by that.
        let Ok(Reserved::Granted(mut held)) = self.house.ledger.reserve(Tier::Ram, &wants, true)
        else {
            return None;
        };
        let there = |claim: &Claim| matches!(claim.state(), ResidencyState::Resident { .. });
        let claim = held.claims.pop().filter(there)?;
        Some(Route::Upload(self.house.devices.get(&gpu)?.clone(), claim))
    }

    fn moving(
        &self,
        component: &Arc<Component>,
        route: Route,
        ticket: FlightTicket,
    ) -> BoxFuture<'static, ()> {
        let (house, component) = (self.house.clone(), component.clone());
        match route {
            Route::Read => read_component(house, component, None, ticket).boxed(),
            Route::Upload(device, claim) => {
                let upload = Upload {
                    house,
                    device,
                    component,
                    ticket,
                };
                upload.run(Source::Ram(claim)).boxed()
            }
        }
    }

    fn ended(&mut self, guess: &Arc<GuessedLoad>, share: f64, somebody_waits: bool) {
        let content = guess.content();
        let is_it = |under_way: &UnderWay| Arc::ptr_eq(&under_way.guess, guess);
        let Some(at) = self.under_way.iter().position(is_it) else {
            return;
        };
        // What has landed may be evicted at any time.
        let under_way = self.under_way.remove(at);
        let house = &self.house;
        let wants = [self.want(&guess.component)];
        let there = house.ledger.needed(self.tier, &wants).is_zero();
        if there && !under_way.is_called_off() {
            house.usage().guesses().landed(self.tier, &content, share);
            // Whoever wanted it meanwhile has it where it is to be.
            if under_way.urgency.is_prefetch() {
                self.send_on(guess);
            }
            return;
        }
        let now = house.ledger.now();
        let mut usage = house.usage();
        // Whoever waited did so for all of them together: until the last.
        let in_the_way = |under_way: &UnderWay| under_way.called_off.filter(|(_, waited)| *waited);
        let others = self.under_way.iter().any(|u| in_the_way(u).is_some());
        if let Some((since, _)) = in_the_way(&under_way).filter(|_| !others) {
            let held = now.saturating_sub(since);
            // Others went for those who have been served meanwhile.
            let held = if somebody_waits {
                held
            } else {
                held.min(GIVEN)
            };
            let held_s = held.as_secs_f64();
            usage.guesses().delayed(self.tier, guess.grounds, held_s);
        }
        usage.guesses().gone(self.tier, &content);
    }

    /// To the GPU where it is expected.
    fn send_on(&self, guess: &GuessedLoad) {
        if let (Tier::Ram, Some(gpu)) = (self.tier, guess.onto) {
            let load_s = restore_s(&self.house.rates(), gpu, &guess.component, true);
            let further = GuessedLoad {
                component: guess.component.clone(),
                load_s,
                ..*guess
            };
            propose(&self.house, Tier::Vram(gpu), further);
        }
    }
}

impl Drop for Guessing {
    fn drop(&mut self) {
        // What is loaded for them ends with their reservations, and nobody hears of it.
        let emptying = self.emptying.take().map(|emptying| emptying.guess);
        let under_way = self.under_way.iter().map(|one| &one.guess);
        for guess in under_way.chain(&emptying) {
            self.withdraw(&guess.content());
        }
    }
}

/// Proposes a guess to the keeper of a tier. A guess less where it is not there.
pub(crate) fn propose(house: &House, tier: Tier, guess: GuessedLoad) {
    let message = GuessMessage::Propose(Arc::new(guess));
    match tier {
        Tier::Ram => drop(house.ram.cast(RamCacheMessage::Guess(message))),
        Tier::Vram(gpu) => {
            if let Some(slot) = house.vram.get(&gpu) {
                let _ = slot.cast(VramManagerMessage::Guess(message));
            }
        }
    }
}

/// Tells of the end of a guess when it is dropped: whatever becomes of its load, what it held is expected no more.
struct Ending {
    tell: Tell,
    guess: Arc<GuessedLoad>,
    share: f64,
}

impl Drop for Ending {
    fn drop(&mut self) {
        (self.tell)(GuessMessage::Ended(self.guess.clone(), self.share));
    }
}

/// Waits for a load to end; gives the share of its time in which nobody waited for it.
async fn alone(house: &House, urgency: &Urgency, mut moving: BoxFuture<'static, ()>) -> f64 {
    let began = house.ledger.now();
    let demanded = tokio::select! {
        biased;
        () = &mut moving => return 1.0,
        () = urgency.demanded() => house.ledger.now(),
    };
    moving.await;
    let whole = house.ledger.now().saturating_sub(began).as_secs_f64();
    let before = demanded.saturating_sub(began).as_secs_f64();
    if whole > 0.0 { before / whole } else { 1.0 }
}

/// Nothing is guessed any more.
pub(crate) fn call_off_all(house: &House) {
    let call_off = GuessMessage::CallOff { waited_for: false };
    let _ = house.ram.cast(RamCacheMessage::Guess(call_off));
    call_off_uploads(house, false);
}

/// RAM is short: uploads on a guess let go of what they hold there.
pub(crate) fn call_off_uploads(house: &House, waited_for: bool) {
    for slot in house.vram.values() {
        let call_off = GuessMessage::CallOff { waited_for };
        let _ = slot.cast(VramManagerMessage::Guess(call_off));
    }
}
