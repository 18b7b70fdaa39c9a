//! The sessions: opens them up to a bound, gives each its loader, closes them.
//!
//! It owns the loaders, not what they hold. A loader that dies takes its loads with it, but not its session: the next load
//! gets a new loader. Nor do sessions end when this actor is restarted: each comes back with its next load.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hotset_core::SessionId;
use hotset_core::Tier;
use hotset_core::plan::{ComponentSet, Priority, Target};
use ractor::{Actor, ActorProcessingErr, ActorRef, MessagingErr, RpcReplyPort, SupervisionEvent};

use tokio::sync::Notify;

use crate::counters::add;
use crate::house::House;
use crate::loader::{Loader, LoaderMessage};
use crate::loading::{LoadError, Loading, SessionError, Stage};
use crate::phases::LoadPhase;
use crate::quotas::Bounds;
use crate::slot::Slot;

/// How long opening a session may take before the caller is told that nobody answers. Opening takes microseconds; this
/// is the longest restart backoff and a margin.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// What the sessions actor is asked.
#[derive(Debug)]
pub(crate) enum SessionsMessage {
    /// Open this session.
    Open(Arc<Record>, RpcReplyPort<Result<(), SessionError>>),
    /// Give this session a loader, if it has none. Not every session needs one: what is resident is leased without.
    Employ(Arc<Record>, RpcReplyPort<Result<(), SessionError>>),
    /// It has ended.
    Close(SessionId),
    /// Cancel all loads of all sessions.
    CancelAll,
    /// The open sessions.
    Observe(RpcReplyPort<Vec<Arc<Record>>>),
    /// Be busy for so long, as with a handler that is slow. For tests and chaos.
    Dawdle(Duration),
}

/// What is known of a session.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) id: SessionId,
    pub(crate) label: String,
    /// What it may have.
    pub(crate) bounds: Bounds,
    pub(crate) opened: Duration,
    pub(crate) loader: Slot<LoaderMessage>,
}

pub(crate) struct Sessions;

pub(crate) struct State {
    house: Arc<House>,
    open: BTreeMap<SessionId, Arc<Record>>,
}

#[ractor::actor(message = SessionsMessage, state = State, arguments = Arc<House>)]
impl Sessions {
    async fn pre_start(
        &self,
        _myself: ActorRef<SessionsMessage>,
        house: Arc<House>,
    ) -> Result<State, ActorProcessingErr> {
        Ok(State {
            house,
            open: BTreeMap::new(),
        })
    }

    #[ractor::message(SessionsMessage::Open(record, reply))]
    fn open(
        &self,
        record: Arc<Record>,
        reply: RpcReplyPort<Result<(), SessionError>>,
        state: &mut State,
    ) {
        let _ = reply.send(open(record, state));
    }

    #[ractor::message(SessionsMessage::Employ(record, reply))]
    async fn employ(
        &self,
        myself: ActorRef<SessionsMessage>,
        record: Arc<Record>,
        reply: RpcReplyPort<Result<(), SessionError>>,
        state: &mut State,
    ) {
        let outcome = employ(myself, record, state).await;
        let _ = reply.send(outcome);
    }

    #[ractor::message(SessionsMessage::Close(session))]
    fn close(&self, session: SessionId, state: &mut State) {
        if let Some(record) = state.open.remove(&session)
            && let Some(loader) = record.loader.get()
        {
            record.loader.set(None);
            loader.stop(Some("session closed".into()));
        }
    }

    #[ractor::message(SessionsMessage::CancelAll)]
    fn cancel_all(&self, state: &mut State) {
        for record in state.open.values() {
            let _ = record.loader.cast(LoaderMessage::CancelAll);
        }
    }

    #[ractor::message(SessionsMessage::Dawdle(time))]
    async fn dawdle(&self, time: Duration, _state: &mut State) {
        tokio::time::sleep(time).await;
    }

    #[ractor::message(SessionsMessage::Observe(reply))]
    fn observe(&self, reply: RpcReplyPort<Vec<Arc<Record>>>, state: &mut State) {
        let mut open: Vec<_> = state.open.values().cloned().collect();
        open.sort_by_key(|record| record.id);
        let _ = reply.send(open);
    }

    async fn handle_supervisor_evt(
        &self,
        _myself: ActorRef<SessionsMessage>,
        event: SupervisionEvent,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        let (who, why) = match event {
            SupervisionEvent::ActorFailed(who, error) => (who, error.to_string()),
            SupervisionEvent::ActorTerminated(who, _, reason) => (who, reason.unwrap_or_default()),
            _ => return Ok(()),
        };
        // A loader that was stopped with its session is no longer among the open ones.
        let dead = state.open.values().find(|record| {
            record
                .loader
                .get()
                .is_some_and(|loader| loader.get_id() == who.get_id())
        });
        if let Some(record) = dead {
            tracing::warn!(session = %record.id, reason = %why, "a loader ended; its loads with it");
            record.loader.set(None);
        }
        Ok(())
    }
}

fn open(record: Arc<Record>, state: &mut State) -> Result<(), SessionError> {
    let config = &state.house.config.sessions;
    if state.house.draining.load(Ordering::Acquire) {
        return Err(SessionError::Draining);
    }
    if !state.open.contains_key(&record.id) && state.open.len() >= config.max_sessions {
        return Err(SessionError::Busy {
            what: "too many sessions are open",
            limit: config.max_sessions,
            retry_after: config.retry_after,
        });
    }
    state.open.insert(record.id, record);
    Ok(())
}

async fn employ(
    myself: ActorRef<SessionsMessage>,
    record: Arc<Record>,
    state: &mut State,
) -> Result<(), SessionError> {
    open(record.clone(), state)?;
    let alive = record
        .loader
        .get()
        .is_some_and(|loader| loader.get_status() <= ractor::ActorStatus::Upgrading);
    if !alive {
        // No name: the registry is global, and nobody looks for a loader there.
        let arguments = (state.house.clone(), record.clone());
        let (loader, _) = Actor::spawn_linked(None, Loader, arguments, myself.get_cell())
            .await
            .map_err(|_| SessionError::NotAnswering { actor: "loader" })?;
        record.loader.set(Some(loader));
    }
    Ok(())
}

/// An open session; it ends when the last handle and the last load are gone.
#[derive(Debug)]
pub(crate) struct OpenSession {
    house: Arc<House>,
    record: Arc<Record>,
    /// Loads that came while a loader is being got, in their order; `None` while none is. A load never passes one that
    /// came before it.
    unsent: Mutex<Option<Vec<LoaderMessage>>>,
    /// One more came, whose deadline may be the next.
    one_more: Notify,
}

impl Drop for OpenSession {
    fn drop(&mut self) {
        let _ = self
            .house
            .sessions
            .cast(SessionsMessage::Close(self.record.id));
    }
}

/// A client's session: what it asks for is loaded in its name, and shown under its label.
///
/// Cheap to clone. It closes when the last clone and the last [`Loading`] are dropped. Leases are held on their own: each
/// is released when it is dropped.
#[derive(Debug, Clone)]
pub struct Session {
    open: Arc<OpenSession>,
}

impl Session {
    /// `tenant` is the label whose quota it counts against, `label` what it is called.
    pub(crate) async fn open(
        house: Arc<House>,
        tenant: &str,
        label: String,
    ) -> Result<Self, SessionError> {
        let id = house.next_session();
        let record = Arc::new(Record {
            id,
            bounds: house.quotas.open(id, tenant),
            label,
            opened: house.ledger.now(),
            loader: Slot::new(),
        });
        let open = Arc::new(OpenSession {
            house,
            record,
            unsent: Mutex::new(None),
            one_more: Notify::new(),
        });
        open.ask(SessionsMessage::Open).await?;
        Ok(Self { open })
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> SessionId {
        self.open.record.id
    }

    /// What it is called in status.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.open.record.label
    }

    /// Loads a component set: a stream of progress, then the leases. Refusals come through the stream too.
    pub fn load(&self, set: ComponentSet) -> Loading {
        if let Some(loading) = self.lease_hot(&set) {
            return loading;
        }
        let open = self.open.clone();
        let request = open.house.next_request();
        let (loading, outlet) = Loading::new(request, Some(open.clone()));
        let message = LoaderMessage::Load {
            request,
            set,
            asked: open.house.ledger.now(),
            outlet,
        };
        let mut unsent = open.unsent();
        if let Some(before) = unsent.as_mut() {
            before.push(message);
            open.one_more.notify_one();
        } else if let Err(message) = open.send(message) {
            // There is none yet, or it is gone: get one, then send again. Bounded by the time for opening.
            *unsent = Some(vec![*message]);
            let open = open.clone();
            let house = open.house.clone();
            house.tasks.spawn(async move { open.send_late().await });
        }
        drop(unsent);
        loading
    }
}

impl Session {
    /// Leases a set at once, where all of it is there and its plan is known: this takes no memory from anybody and waits for
    /// nobody, so no actor need be asked.
    fn lease_hot(&self, set: &ComponentSet) -> Option<Loading> {
        let house = &self.open.house;
        if house.draining.load(Ordering::Acquire) {
            return None;
        }
        let began = house.ledger.now();
        let hot = house.hot.get(set, house.catalogue.load().generation())?;
        // In RAM for want of a GPU that could hold it: that may have changed.
        if hot.plan.tier == Tier::Ram && set.target == Target::Best && !house.devices.is_empty() {
            return None;
        }
        let (session, tier) = (self.id(), hot.plan.tier);
        // What nobody waits for passes nobody: what it would hold may be what they need.
        if set.priority != Priority::Interactive {
            let aging = house.config.load.aging;
            let place = set.priority.place(house.ledger.now(), aging);
            if house.ledger.somebody_waits_before(&[tier], place) {
                return None;
            }
        }
        let bounds = &self.open.record.bounds;
        let _counted = if bounds.is_empty() {
            None
        } else {
            let wanted = hot
                .components
                .iter()
                .map(|component| (tier, component.clone()));
            let wanted: Vec<_> = wanted.collect();
            // The loader says why not.
            Some(house.quotas.count(bounds, &house.ledger, &wanted).ok()?)
        };
        let keep = house.keep_alive_of(set);
        let leases = house
            .ledger
            .lease_resident(tier, &hot.components, session, keep)?;
        let counters = &house.counters;
        add(&counters.loads_requested, 1);
        add(&counters.loads_granted, 1);
        // Without a phase of its own: nothing is planned, waited for or moved.
        house
            .phases
            .record(LoadPhase::Whole, house.ledger.now().saturating_sub(began));
        add(&counters.component_hits, leases.len() as u64);
        house.note_use(session, tier, hot.used.clone());
        house.note_granted(session, tier, hot.used.clone());
        Some(Loading::granted(
            house.next_request(),
            hot.plan.clone(),
            leases,
        ))
    }
}

impl OpenSession {
    fn send(&self, message: LoaderMessage) -> Result<(), Box<LoaderMessage>> {
        let Some(loader) = self.record.loader.get() else {
            return Err(Box::new(message));
        };
        match loader.send_message(message) {
            Ok(()) => Ok(()),
            Err(MessagingErr::SendErr(message)) => Err(Box::new(message)),
            // The message is lost with its outlet, which is an answer to the stream.
            Err(_) => Ok(()),
        }
    }

    fn unsent(&self) -> MutexGuard<'_, Option<Vec<LoaderMessage>>> {
        // Nothing under the lock can panic half-way through a change.
        self.unsent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gets a loader and sends what waits for it, as far as its deadline has not passed.
    async fn send_late(&self) {
        let employ = self.ask(SessionsMessage::Employ);
        tokio::pin!(employ);
        let employed = loop {
            let now = self.house.ledger.now();
            let due = self.end_overdue(now).unwrap_or(OPEN_TIMEOUT);
            tokio::select! {
                biased;
                employed = &mut employ => break employed,
                () = self.one_more.notified() => {}
                () = tokio::time::sleep(due) => {}
            }
        };
        // Sent under the lock, so that no load comes between these.
        let mut unsent = self.unsent();
        for message in unsent.take().unwrap_or_default() {
            let (message, error) = match &employed {
                Ok(()) => match self.send(message) {
                    Ok(()) => continue,
                    Err(message) => (*message, LoadError::Restarted),
                },
                Err(error) => (message, error.clone().into()),
            };
            if let LoaderMessage::Load { outlet, .. } = message {
                outlet.end(Err(error));
            }
        }
    }

    /// Ends the loads that wait for a loader and whose time is over; gives how long the next one has.
    fn end_overdue(&self, now: Duration) -> Option<Duration> {
        let mut unsent = self.unsent();
        let waiting = unsent.take()?;
        let (mut kept, mut next) = (Vec::new(), None::<Duration>);
        for message in waiting {
            match message {
                LoaderMessage::Load {
                    set, asked, outlet, ..
                } if asked.saturating_add(self.house.deadline_of(&set)) <= now => {
                    outlet.end(Err(LoadError::TimedOut {
                        waited: now.saturating_sub(asked),
                        stage: Stage::Planning,
                        held: Vec::new(),
                    }));
                }
                message => {
                    if let LoaderMessage::Load { set, asked, .. } = &message {
                        let left = asked
                            .saturating_add(self.house.deadline_of(set))
                            .saturating_sub(now);
                        next = Some(next.map_or(left, |next| next.min(left)));
                    }
                    kept.push(message);
                }
            }
        }
        *unsent = Some(kept);
        next
    }

    async fn ask(
        &self,
        message: fn(Arc<Record>, RpcReplyPort<Result<(), SessionError>>) -> SessionsMessage,
    ) -> Result<(), SessionError> {
        let answer = self
            .house
            .sessions
            .insist(|reply| message(self.record.clone(), reply));
        tokio::select! {
            biased;
            () = self.house.stop.cancelled() => Err(SessionError::Draining),
            answer = tokio::time::timeout(OPEN_TIMEOUT, answer) => {
                answer.unwrap_or(Err(SessionError::NotAnswering { actor: "sessions" }))
            }
        }
    }
}
