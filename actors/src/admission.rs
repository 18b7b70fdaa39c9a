//! Who gets memory in one tier, and when: the queue of waiting sets, and the evictions made for them. Not an actor, but
//! what the keepers of all tiers (RamCache, each VramManager) have in common.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use hotset_core::breaks::{self, Break};
use hotset_core::catalog::Component;
use hotset_core::decision::{Act, EvictCause};
use hotset_core::memory::{
    Evicted, Never, Reservation, Reserved, ResidencyView, Shortfall, TierSums, WakeWhen, Want,
};
use hotset_core::plan::rates::Rates;
use hotset_core::plan::{Priority, newcomers_wait, passing, read_s, restore_s};
use hotset_core::policy::{Candidate, EvictionPolicy, Guess, Victim, select};
use hotset_core::predict::{Observed, Seen, Studied};
use hotset_core::{Bytes, ComponentId, ContentId, RequestId, SessionId, Tier};
use ractor::RpcReplyPort;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_util::task::AbortOnDropHandle;

use crate::counters::add;
use crate::house::{House, Shortage};
use crate::learned::{KEPT_EVERY, Learner};

/// Sets that one may pass at most: each is looked at by itself, whenever memory comes back.
const MOST_PASSED: usize = 16;

/// A set that wants memory in a tier.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) session: SessionId,
    pub(crate) request: RequestId,
    pub(crate) priority: Priority,
    pub(crate) wants: Vec<Want>,
    /// When it was asked first, since the start of the system: a request that is sent again after a restart keeps its age.
    pub(crate) asked: Duration,
    /// Answered once: granted, or never. Who no longer waits has dropped the other end.
    pub(crate) reply: RpcReplyPort<Result<Reservation, Never>>,
}

/// The admission of one tier.
pub(crate) struct Admission {
    house: Arc<House>,
    tier: Tier,
    policy: Box<dyn EvictionPolicy>,
    high_watermark: f64,
    low_watermark: f64,
    /// By place, which is by priority and age. Bounded by `sessions.max_loads`, since each load waits in one queue at most.
    waiting: VecDeque<Request>,
    /// A guess waits for memory that is on its way out.
    guess_waits: bool,
    /// What guesses that were called off still hold.
    coming: Bytes,
    /// Wakes the keeper when the first who waits has aged.
    alarm: Option<AbortOnDropHandle<()>>,
    /// Requests that the policy can still be told of, as of then.
    allowance: f64,
    counted: Duration,
    /// Requests that it was told of since what it has learned was kept.
    since_kept: usize,
    /// What came of the policy's study, which goes on elsewhere.
    studied: (UnboundedSender<Studied>, UnboundedReceiver<Studied>),
}

/// The most requests that a policy with an appetite is told of at once: its actor answers nobody meanwhile, for some 15 ms.
const MOST_AT_ONCE: f64 = 256.0;

impl Drop for Admission {
    fn drop(&mut self) {
        if self.since_kept > 0 {
            self.keep_learned();
        }
    }
}

/// What may go for a guess.
#[derive(Default)]
pub(crate) struct Room {
    victims: Vec<Victim>,
    candidates: usize,
    /// The seconds that restoring each would take.
    pub(crate) costs: Vec<(ContentId, f64)>,
}

enum Attempt {
    Answered,
    Waits(Request),
}

fn grant(request: Request, reservation: Reservation) -> Attempt {
    // Dropped with the port where nobody waits any more: the bytes come back.
    let _ = request.reply.send(Ok(reservation));
    Attempt::Answered
}

impl Admission {
    /// The admission of a tier, with an empty queue: requests that a predecessor had are sent again by their owners.
    pub(crate) fn new(
        house: Arc<House>,
        tier: Tier,
        high_watermark: f64,
        low_watermark: f64,
    ) -> Self {
        let policy = house.policy_of(tier);
        let mut admission = Self {
            house,
            tier,
            policy,
            high_watermark,
            low_watermark,
            waiting: VecDeque::new(),
            guess_waits: false,
            coming: Bytes::ZERO,
            alarm: None,
            allowance: f64::MAX,
            counted: Duration::ZERO,
            since_kept: 0,
            studied: unbounded_channel(),
        };
        admission.set_wake();
        admission
    }

    /// How many sets wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether the wants of a set are more than is free, though they could be had.
    pub(crate) fn is_short(&self, request: &Request) -> bool {
        let ledger = &self.house.ledger;
        let whole: Bytes = request.wants.iter().map(Want::bytes).sum();
        let sums = ledger.sums(self.tier);
        let sums = sums.filter(|sums| sums.in_service && whole <= sums.budget);
        sums.is_some_and(|sums| ledger.needed(self.tier, &request.wants) > sums.free())
    }

    /// What is taken, without what comes back anyhow.
    fn used(&self, sums: TierSums) -> Bytes {
        sums.used().saturating_sub(self.coming)
    }

    /// Evicts what nobody holds until no more than this share of the budget is taken; gives what is coming back by that.
    pub(crate) fn relieve(&mut self, keep: f64, cause: &EvictCause) -> Bytes {
        let sums = self.house.ledger.sums(self.tier);
        let surplus = sums.map_or(Bytes::ZERO, |sums| {
            self.used(sums).saturating_sub(sums.budget.share(keep))
        });
        self.evict_up_to(surplus, cause)
    }

    /// So much comes back without any eviction, since guesses were called off.
    pub(crate) const fn expect(&mut self, coming: Bytes) {
        self.coming = coming;
    }

    /// From now on the keeper is woken for a guess, too, when bytes come back, or no longer.
    pub(crate) fn wake_for_guess(&mut self, wake: bool) {
        if self.guess_waits != wake {
            self.guess_waits = wake;
            self.set_wake();
        }
    }

    /// Whether a set that waits needs this component.
    pub(crate) fn is_waited_for(&self, content: &ContentId) -> bool {
        let mut wants = self.waiting.iter().flat_map(|request| &request.wants);
        wants.any(|want| want.content() == Some(*content))
    }

    /// Grants a set its memory, or queues it.
    pub(crate) fn submit(&mut self, request: Request) {
        let place = self.place(&request);
        let ahead = self.waiting.iter().take_while(|w| self.place(w) <= place);
        let ahead = ahead.count();
        let request = if self.passes(&request, ahead) {
            match self.attempt(request, ahead) {
                Attempt::Answered => return,
                Attempt::Waits(request) => request,
            }
        } else {
            request
        };
        let at = self
            .waiting
            .iter()
            .position(|w| self.place(w) > place)
            .unwrap_or(self.waiting.len());
        self.waiting.insert(at, request);
        self.set_wake();
        // Bytes that came back between the attempt and the flag woke nobody.
        self.retry();
    }

    /// Whether a set may be tried before the first so many that wait. What costs nothing passes them, since it takes no
    /// memory from them, and so does what delays none of them (see [`passing`]); but see [`newcomers_wait`]. Nor does that pass
    /// which nobody waits for: what it would hold may be what they need.
    fn passes(&self, request: &Request, ahead: usize) -> bool {
        if ahead == 0 {
            return true;
        }
        let ledger = &self.house.ledger;
        if request.priority != Priority::Interactive || ledger.must_wait(self.tier, request.session)
        {
            return false;
        }
        ledger.needed(self.tier, &request.wants).is_zero() || self.delays_none(request, ahead)
    }

    fn delays_none(&self, request: &Request, ahead: usize) -> bool {
        if ahead > MOST_PASSED {
            return false;
        }
        let Some(view) = self.house.ledger.view(self.tier) else {
            return false;
        };
        let all: Bytes = view.residencies.iter().map(|r| r.bytes).sum();
        let held = view
            .residencies
            .iter()
            .filter(|r| r.pins > 0 || r.loading)
            .map(|r| (r.component.content_id, r.bytes));
        let held = passing::Held {
            components: held.collect(),
            loose: view.committed.saturating_sub(all),
        };
        let waiting: Vec<&[Want]> = self
            .waiting
            .iter()
            .take(ahead)
            .map(|waiting| waiting.wants.as_slice())
            .collect();
        passing::passes(view.budget, &held, &waiting, &request.wants)
    }

    fn place(&self, request: &Request) -> Duration {
        if breaks::is(Break::LastComesFirst) {
            return Duration::MAX.saturating_sub(request.asked);
        }
        let aging = self.house.config.load.aging;
        request.priority.place(request.asked, aging)
    }

    /// Tries again for those who wait, in their order, and keeps below the watermark.
    pub(crate) fn retry(&mut self) {
        self.learn();
        self.let_go();
        self.waiting.retain(|request| !request.reply.is_closed());
        while let Some(request) = self.waiting.pop_front() {
            if let Attempt::Waits(request) = self.attempt(request, 0) {
                self.waiting.push_front(request);
                break;
            }
        }
        let mut i = 1;
        while let Some(request) = self.waiting.get(i) {
            if self.passes(request, i)
                && let Some(request) = self.waiting.remove(i)
            {
                match self.attempt(request, i) {
                    Attempt::Answered => continue,
                    Attempt::Waits(request) => self.waiting.insert(i, request),
                }
            }
            i += 1;
        }
        self.set_wake();
        self.trim();
    }

    /// Evicts what nobody has held for as long as it was to be kept alive.
    fn let_go(&mut self) {
        let (gone, _) = self.house.ledger.outlived(self.tier);
        let count = gone.len();
        for (content, idle) in gone {
            let victim = Victim {
                content,
                score: 0.0,
                reason: "its keep-alive is over".into(),
            };
            self.evict(vec![victim], count, &EvictCause::KeptLongEnough { idle });
        }
    }

    /// Evicts what nobody holds, down to the low watermark, where the high one is passed.
    pub(crate) fn trim(&mut self) {
        let Some(sums) = self.house.ledger.sums(self.tier) else {
            return;
        };
        let high = sums.budget.share(self.high_watermark);
        let used = self.used(sums);
        if used > high {
            let surplus = used.saturating_sub(sums.budget.share(self.low_watermark));
            self.evict_up_to(
                surplus,
                &EvictCause::Watermark {
                    committed: used,
                    high,
                },
            );
        }
    }

    /// Evicts what nobody holds where more is committed than the budget allows, which may have become less. Gives what
    /// remains too much, since it is held.
    pub(crate) fn keep_within_budget(&mut self, cause: &EvictCause) -> Bytes {
        let Some(sums) = self.house.ledger.sums(self.tier) else {
            return Bytes::ZERO;
        };
        let surplus = self.used(sums).saturating_sub(sums.budget);
        if surplus.is_zero() {
            return surplus;
        }
        surplus.saturating_sub(self.evict_up_to(surplus, cause))
    }

    /// Evicts what nobody holds until `surplus` bytes are coming back, or all of it; gives what is coming back.
    pub(crate) fn evict_up_to(&mut self, surplus: Bytes, cause: &EvictCause) -> Bytes {
        self.learn();
        let candidates = self.candidates(&HashSet::new());
        let all: Bytes = candidates.iter().map(|c| c.bytes).sum();
        let count = candidates.len();
        let now = self.house.ledger.now();
        let victims = select(self.policy.as_mut(), now, &candidates, surplus.min(all));
        self.evict(victims, count, cause)
    }

    /// Tries to grant a set its memory, before the first so many that wait.
    fn attempt(&mut self, request: Request, passed: usize) -> Attempt {
        let ahead = request.priority == Priority::Prefetch;
        match self.house.ledger.reserve(self.tier, &request.wants, ahead) {
            Err(never) => {
                let _ = request.reply.send(Err(never));
                Attempt::Answered
            }
            Ok(Reserved::Granted(reservation)) => grant(request, reservation),
            Ok(Reserved::Short(shortfall)) => {
                self.make_room(&request, &shortfall, passed);
                // Host memory is freed by a task and comes back with a wake; what is freed at once can be had at once.
                match self.house.ledger.reserve(self.tier, &request.wants, ahead) {
                    Ok(Reserved::Granted(reservation)) => grant(request, reservation),
                    _ => Attempt::Waits(request),
                }
            }
        }
    }

    /// Tells the policy what was used here since it was last told.
    fn learn(&mut self) {
        let Some(uses) = self.house.uses.get(&self.tier) else {
            return;
        };
        let uses = uses.take();
        if uses.is_empty() {
            return;
        }
        if let Some(budget) = self.house.ledger.budget(self.tier) {
            self.policy.on_capacity(budget);
        }
        self.let_study();
        let step = self.step(uses.len());
        self.since_kept += uses.len() / step;
        let rates = self.house.rates().clone();
        for used in uses.into_iter().step_by(step) {
            for (component, _) in used.components.iter() {
                let content = &component.content_id;
                let took = || self.house.ledger.load_time(self.tier, content);
                let whole_s = self.whole_s(&rates, component, took);
                self.policy.on_cost(content, whole_s);
            }
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
            self.policy.observe(used.at, &observed);
            for (component, hit) in used.components.iter() {
                self.policy
                    .on_request(used.at, &component.content_id, component.bytes, *hit);
            }
        }
        if self.since_kept >= KEPT_EVERY {
            self.keep_learned();
        }
    }

    /// Seconds that loading a component takes where no tier has it: into RAM what its last load took, where it is there.
    fn whole_s(
        &self,
        rates: &Rates,
        component: &Component,
        took: impl FnOnce() -> Option<Duration>,
    ) -> f64 {
        match self.tier {
            Tier::Vram(gpu) => restore_s(rates, gpu, component, false),
            Tier::Ram => took().map_or_else(|| read_s(rates, component), |took| took.as_secs_f64()),
        }
    }

    /// Does the policy's longer work where that keeps nobody waiting, and gives it what came of the last.
    fn let_study(&mut self) {
        while let Ok(studied) = self.studied.1.try_recv() {
            self.policy.studied(studied);
        }
        if let Some(study) = self.policy.study() {
            let to = self.studied.0.clone();
            // Lost with the system's end: nobody waits for it.
            self.house.aside(move || to.send(study.run()));
        }
    }

    /// So many requests of a few are one too many for the policy's appetite: one in each so many is told.
    fn step(&mut self, asked: usize) -> usize {
        let Some(appetite) = self.policy.appetite().map(f64::from) else {
            return 1;
        };
        let now = self.house.ledger.now();
        let passed = now.saturating_sub(self.counted).as_secs_f64();
        self.counted = now;
        self.allowance = (self.allowance + passed * appetite).min(MOST_AT_ONCE);
        let step = (asked as f64 / self.allowance.max(1.0)).ceil().max(1.0);
        self.allowance = (self.allowance - asked as f64 / step).max(0.0);
        step as usize
    }

    /// Gives what the policy has learned to whoever comes after it.
    fn keep_learned(&mut self) {
        self.since_kept = 0;
        if let Some(learned) = self.policy.learned() {
            self.house.keep_learned(Learner::Policy(self.tier), learned);
        }
    }

    /// Evicts for a set, if that suffices together with what is about to come back anyhow.
    fn make_room(&mut self, request: &Request, shortfall: &Shortfall, passed: usize) {
        let missing = shortfall.missing().saturating_sub(self.coming);
        if missing.is_zero() || (passed > 0 && missing > shortfall.evictable) {
            return;
        }
        if missing > shortfall.evictable {
            // Whoever holds leases that may be taken back hears of it; nobody need listen.
            let _ = self.house.shortages.send(Shortage {
                tier: self.tier,
                session: request.session,
                request: request.request,
                missing: missing.saturating_sub(shortfall.evictable),
            });
            return;
        }
        // Nor what those want whom it passes: they would have to load it again.
        let passed = self.waiting.iter().take(passed);
        let spared: HashSet<ContentId> = passed
            .chain([request])
            .flat_map(|request| request.wants.iter().filter_map(Want::content))
            .collect();
        self.learn();
        let candidates = self.candidates(&spared);
        let enough = candidates.iter().map(|c| c.bytes).sum::<Bytes>() >= missing;
        if !enough {
            return;
        }
        let now = self.house.ledger.now();
        let victims = select(self.policy.as_mut(), now, &candidates, missing);
        let cause = EvictCause::Demand {
            session: request.session,
            request: request.request,
            missing,
        };
        self.evict(victims, candidates.len(), &cause);
    }

    /// What may go, with what the other tiers mean for it: a GPU's component is soon there again where RAM has it, and nobody asks
    /// RAM for what a GPU has.
    fn candidates(&self, except: &HashSet<ContentId>) -> Vec<Candidate> {
        let (ledger, in_ram) = (&self.house.ledger, self.tier == Tier::Ram);
        let elsewhere = ledger.resident(|tier| (tier == Tier::Ram) != in_ram);
        let rates = self.house.rates().clone();
        let restored = |view: ResidencyView| {
            let mut candidate =
                view.candidate(self.whole_s(&rates, &view.component, || view.load_time));
            let there = elsewhere.contains(&candidate.content);
            match self.tier {
                Tier::Ram => candidate.above = there,
                Tier::Vram(gpu) => {
                    candidate.restore_s = restore_s(&rates, gpu, &view.component, there);
                }
            }
            candidate
        };
        let candidates = ledger.evictable(self.tier).into_iter().map(restored);
        candidates
            .filter(|candidate| !except.contains(&candidate.content))
            .collect()
    }

    /// What may go for a guess; `None` where it is not worth that.
    pub(crate) fn room_for(&mut self, guess: &Guess, needed: Bytes) -> Option<Room> {
        self.learn();
        let mut candidates = self.candidates(&HashSet::from([guess.content]));
        {
            // One guess is not to drive out the other, which would then drive out the one.
            let mut usage = self.house.usage();
            let guesses = usage.guesses();
            candidates.retain(|candidate| !guesses.holds(self.tier, &candidate.content));
        }
        let now = self.house.ledger.now();
        let policy = self.policy.as_mut();
        let victims = policy.room_for_guess(now, guess, &candidates, needed)?;
        let cost = |victim: &Victim| {
            let held = candidates.iter().find(|c| c.content == victim.content);
            (victim.content, held.map_or(0.0, |c| c.restore_s))
        };
        Some(Room {
            costs: victims.iter().map(cost).collect(),
            victims,
            candidates: candidates.len(),
        })
    }

    /// Evicts it for this component. The memory comes back as the result is dropped.
    pub(crate) fn make(&mut self, room: Room, guess: &ComponentId) -> Vec<Evicted> {
        let component = guess.clone();
        let cause = EvictCause::Guess { component };
        self.take_out(room.victims, room.candidates, &cause)
    }

    fn evict(&mut self, victims: Vec<Victim>, candidates: usize, cause: &EvictCause) -> Bytes {
        let evicted = self.take_out(victims, candidates, cause);
        let freed = evicted.iter().map(|evicted| evicted.bytes).sum();
        for evicted in evicted {
            match self.tier {
                // Unmapping gigabytes takes long.
                Tier::Ram => drop(self.house.off_thread(move || drop(evicted))),
                Tier::Vram(_) => drop(evicted),
            }
        }
        freed
    }

    fn take_out(
        &mut self,
        victims: Vec<Victim>,
        candidates: usize,
        cause: &EvictCause,
    ) -> Vec<Evicted> {
        let mut out = Vec::with_capacity(victims.len());
        for victim in victims {
            // Somebody may have claimed it since: then it stays.
            let Some(evicted) = self.house.ledger.evict(self.tier, &victim.content) else {
                continue;
            };
            // A guess that went on to a GPU is there, whatever becomes of its source.
            let went_on =
                || self.tier == Tier::Ram && self.house.ledger.is_on_a_gpu(&victim.content);
            let wasted = evicted.prefetched() && !went_on();
            if wasted {
                let mut usage = self.house.usage();
                usage.guesses().gone(self.tier, &victim.content);
            }
            self.policy
                .on_evict(self.house.ledger.now(), &victim.content);
            let counter = match self.tier {
                Tier::Ram => &self.house.counters.evictions_ram,
                Tier::Vram(_) => &self.house.counters.evictions_vram,
            };
            add(counter, 1);
            self.house.decide(Act::Evict {
                component: evicted.component.id.clone(),
                tier: self.tier,
                bytes: evicted.bytes,
                policy: self.policy.name().into(),
                score: victim.score,
                reason: victim.reason,
                cause: cause.clone(),
                candidates,
                wasted,
            });
            out.push(evicted);
        }
        out
    }

    /// Wakes the keeper when bytes come back while somebody waits, when there is something to trim, when the first who
    /// waits has aged, and when the next keep-alive is over.
    fn set_wake(&mut self) {
        let ledger = &self.house.ledger;
        let (close, alarm) = self.waiting.front().map_or((false, None), |first| {
            let waited = ledger.now().saturating_sub(first.asked);
            newcomers_wait(waited, self.house.config.load.aging)
        });
        ledger.set_newcomers_wait(self.tier, close);
        let first = self.waiting.front().map(|first| self.place(first));
        ledger.set_first_waiting(self.tier, first);
        let (_, next) = ledger.outlived(self.tier);
        let next = next.map(|next| next.saturating_sub(ledger.now()));
        let alarm = alarm.into_iter().chain(next).min();
        self.alarm = alarm.zip(ledger.wake(self.tier)).map(|(after, wake)| {
            AbortOnDropHandle::new(tokio::spawn(async move {
                tokio::time::sleep(after).await;
                wake.notify_one();
            }))
        });
        let budget = self.house.ledger.budget(self.tier);
        let high = budget.map_or(Bytes(u64::MAX), |budget| budget.share(self.high_watermark));
        self.house.ledger.set_wake_when(
            self.tier,
            WakeWhen {
                waiting: self.guess_waits || !self.waiting.is_empty(),
                above: high,
            },
        );
    }
}
