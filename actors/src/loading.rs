//! What a client sees of a load: a stream of progress and leases, and an end that always comes.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{Stream, StreamExt};
use hotset_core::memory::{FlightFailure, Lease, Never};
use hotset_core::plan::{Plan, PlanError, ResolveError};
use hotset_core::{Bytes, ComponentId, RequestId, Tier};
use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::sessions::OpenSession;

/// Why a session could not be opened, or a system not be asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// Too many already.
    #[error("busy: {what} ({limit} at most); try again in {retry_after:?}")]
    Busy {
        /// What there is too much of.
        what: &'static str,
        /// The bound.
        limit: usize,
        /// When to try again.
        retry_after: Duration,
    },
    /// The system is ending.
    #[error("the system is draining and takes no new work")]
    Draining,
    /// The part of the system that was asked is out of service or did not answer in time.
    #[error("{actor} did not answer in time; see `hotset status`")]
    NotAnswering {
        /// Which part.
        actor: &'static str,
    },
}

/// Why a load ended without its leases.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// Not taken on.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The names do not make a set.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// The set can never fit.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A tier refused for good.
    #[error(transparent)]
    Never(#[from] Never),
    /// It is more than its session or its label may have.
    #[error("{whose} may have {quota} leased, {held} are leased or under way, and the set takes {needed}: {}", match retry_after {
        Some(after) => format!("release some, or try again in {after:?}"),
        None => "load less, or raise the quota".into(),
    })]
    Quota {
        /// Whose bound it is.
        whose: String,
        /// The bound.
        quota: Bytes,
        /// What is leased or under way.
        held: Bytes,
        /// What the set takes.
        needed: Bytes,
        /// When to try again; `None`: it never fits.
        retry_after: Option<Duration>,
    },
    /// A component's bytes did not arrive.
    #[error("{component}: {failure}")]
    Component {
        /// Which.
        component: ComponentId,
        /// Why.
        failure: FlightFailure,
    },
    /// The deadline passed.
    #[error("timed out after {waited:?} while {stage}{}", holders(held))]
    TimedOut {
        /// How long it was tried.
        waited: Duration,
        /// What it was doing.
        stage: Stage,
        /// Bytes that others hold in the tiers that it waited for.
        held: Vec<(Tier, Bytes)>,
    },
    /// The client cancelled.
    #[error("cancelled by the client")]
    Cancelled,
    /// The loader of the session failed in the middle; ask again.
    #[error("the loader was restarted while it worked on this; ask again")]
    Restarted,
}

fn holders(held: &[(Tier, Bytes)]) -> String {
    let parts: Vec<String> = held
        .iter()
        .map(|(tier, bytes)| format!("{bytes} of {tier} are held by other leases"))
        .collect();
    if parts.is_empty() {
        String::new()
    } else {
        format!(
            " ({}); release some, or ask for a longer deadline",
            parts.join(", ")
        )
    }
}

/// What a load does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Names are resolved, the plan is made.
    Planning,
    /// It waits for memory in this tier.
    WaitingFor(Tier),
    /// Bytes move.
    Loading,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Planning => f.write_str("planning"),
            Self::WaitingFor(tier) => write!(f, "waiting for memory in {tier}"),
            Self::Loading => f.write_str("loading"),
        }
    }
}

/// How far one component is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Nothing moved yet.
    Waiting,
    /// Bytes arrive.
    Loading,
    /// Leased.
    Ready,
}

/// One component's progress.
#[derive(Debug, Clone, Serialize)]
pub struct ComponentProgress {
    /// Which.
    pub component: ComponentId,
    /// How far.
    pub phase: Phase,
    /// It was there already, or on its way for somebody else.
    pub shared: bool,
    /// What has arrived.
    pub done: Bytes,
    /// What will.
    pub total: Bytes,
}

/// A load's progress.
#[derive(Debug, Clone, Serialize)]
pub struct LoadProgress {
    /// What it does.
    pub stage: Stage,
    /// Each component, in loading order. Empty before the plan is made.
    pub components: Vec<ComponentProgress>,
    /// What has arrived, over all components.
    pub done: Bytes,
    /// What will have.
    pub total: Bytes,
    /// Time since the load was asked for, in seconds.
    pub elapsed_s: f64,
    /// Mean rate since the first byte, in bytes each second; 0 before.
    pub bytes_per_s: f64,
    /// What is left at that rate, in seconds, where there is a rate.
    pub eta_s: Option<f64>,
}

/// What happens in a load.
#[derive(Debug)]
pub enum LoadEvent {
    /// The plan is made and memory is being reserved.
    Planned(Arc<Plan>),
    /// Progress. Only the latest is kept for a slow reader.
    Progress(LoadProgress),
    /// A component is there, and leased: each in loading order, while the rest still comes. A load that fails after that,
    /// since a file cannot be read, takes none of them back.
    Leased(Lease),
    /// All are.
    Done,
}

/// A load under way: a stream of [`LoadEvent`]s that ends with `Done` or with the error. Dropping it cancels the load and
/// gives everything back, leases that were not taken out of the stream included.
#[must_use = "dropping a Loading cancels the load"]
pub struct Loading {
    request: RequestId,
    state: State,
}

enum State {
    /// It was all there: events that are still to be taken.
    Granted(std::vec::IntoIter<LoadEvent>),
    UnderWay(Box<UnderWay>),
}

/// The client's end of a load that a loader runs.
struct UnderWay {
    progress: watch::Receiver<Option<LoadProgress>>,
    events: mpsc::Receiver<LoadEvent>,
    outcome: oneshot::Receiver<Result<(), LoadError>>,
    cancel: CancellationToken,
    ended: bool,
    changed: Option<Changed>,
    /// Keeps the session open as long as its load is under way.
    _session: Option<Arc<OpenSession>>,
}

type Changed = Pin<Box<dyn Future<Output = (watch::Receiver<Option<LoadProgress>>, bool)> + Send>>;

/// Events that a slow reader may be behind before the load waits for it. Progress is not counted.
const EVENTS_AHEAD: usize = 64;

impl Loading {
    pub(crate) fn new(request: RequestId, session: Option<Arc<OpenSession>>) -> (Self, Outlet) {
        let (progress, progress_seen) = watch::channel(None);
        let (events, events_seen) = mpsc::channel(EVENTS_AHEAD);
        let (outcome, outcome_seen) = oneshot::channel();
        let cancel = CancellationToken::new();
        let state = UnderWay {
            progress: progress_seen,
            events: events_seen,
            outcome: outcome_seen,
            cancel: cancel.clone(),
            ended: false,
            changed: None,
            _session: session,
        };
        let loading = Self {
            request,
            state: State::UnderWay(Box::new(state)),
        };
        let outlet = Outlet {
            progress,
            events,
            outcome: Some(outcome),
            cancel,
        };
        (loading, outlet)
    }

    /// A load that is done already.
    pub(crate) fn granted(request: RequestId, plan: Arc<Plan>, leases: Vec<Lease>) -> Self {
        let mut events = Vec::with_capacity(leases.len() + 2);
        events.push(LoadEvent::Planned(plan));
        events.extend(leases.into_iter().map(LoadEvent::Leased));
        events.push(LoadEvent::Done);
        Self {
            request,
            state: State::Granted(events.into_iter()),
        }
    }

    /// Its number.
    #[must_use]
    pub const fn request(&self) -> RequestId {
        self.request
    }

    /// Stops the load; it ends with [`LoadError::Cancelled`], unless it was done already.
    pub fn cancel(&self) {
        if let State::UnderWay(load) = &self.state {
            load.cancel.cancel();
        }
    }

    /// The progress now, where there is some.
    #[must_use]
    pub fn progress(&self) -> Option<LoadProgress> {
        match &self.state {
            State::Granted(_) => None,
            State::UnderWay(load) => load.progress.borrow().clone(),
        }
    }

    /// Waits for all leases, in loading order.
    ///
    /// # Errors
    /// [`LoadError`]; then no lease is held.
    pub async fn leases(mut self) -> Result<Vec<Lease>, LoadError> {
        let mut leases = Vec::new();
        while let Some(event) = self.next().await {
            match event? {
                LoadEvent::Leased(lease) => leases.push(lease),
                LoadEvent::Done => return Ok(leases),
                LoadEvent::Planned(_) | LoadEvent::Progress(_) => {}
            }
        }
        Err(LoadError::Restarted)
    }
}

impl Stream for Loading {
    type Item = Result<LoadEvent, LoadError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match &mut self.state {
            State::Granted(events) => Poll::Ready(events.next().map(Ok)),
            State::UnderWay(load) => load.poll_next(cx),
        }
    }
}

impl UnderWay {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<LoadEvent, LoadError>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        // Leases and the plan first: they must not wait behind progress.
        let drained = match self.events.poll_recv(cx) {
            Poll::Ready(Some(event)) => return Poll::Ready(Some(Ok(event))),
            Poll::Ready(None) => true,
            Poll::Pending => false,
        };
        if drained {
            self.ended = true;
            // The outlet sends the outcome before it closes the events; none means that it was lost with its loader.
            let end = match self.outcome.try_recv() {
                Ok(Ok(())) => Ok(LoadEvent::Done),
                Ok(Err(error)) => Err(error),
                Err(_) => Err(LoadError::Restarted),
            };
            return Poll::Ready(Some(end));
        }
        let mut changed = self.changed.take().unwrap_or_else(|| {
            let mut progress = self.progress.clone();
            Box::pin(async move {
                let alive = progress.changed().await.is_ok();
                (progress, alive)
            })
        });
        match changed.as_mut().poll(cx) {
            Poll::Pending => {
                self.changed = Some(changed);
                Poll::Pending
            }
            Poll::Ready((mut progress, alive)) => {
                let latest = progress.borrow_and_update().clone();
                self.progress = progress;
                match latest {
                    Some(latest) if alive => Poll::Ready(Some(Ok(LoadEvent::Progress(latest)))),
                    // The outlet is closing: the events channel has woken us or will.
                    _ => Poll::Pending,
                }
            }
        }
    }
}

impl std::fmt::Debug for Loading {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loading")
            .field("request", &self.request)
            .finish_non_exhaustive()
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// The loader's end of a [`Loading`].
#[derive(Debug)]
pub(crate) struct Outlet {
    progress: watch::Sender<Option<LoadProgress>>,
    events: mpsc::Sender<LoadEvent>,
    outcome: Option<oneshot::Sender<Result<(), LoadError>>>,
    pub(crate) cancel: CancellationToken,
}

impl Outlet {
    /// Sends an event; waits for a reader that is far behind. Lost where nobody reads any more.
    pub(crate) async fn send(&self, event: LoadEvent) {
        let _ = self.events.send(event).await;
    }

    /// Hands out a lease; gives it back where the reader is too far behind. Lost where nobody reads any more.
    pub(crate) fn try_lease(&self, lease: Lease) -> Result<(), Lease> {
        use mpsc::error::TrySendError;
        match self.events.try_send(LoadEvent::Leased(lease)) {
            Err(TrySendError::Full(LoadEvent::Leased(lease))) => Err(lease),
            _ => Ok(()),
        }
    }

    pub(crate) fn show(&self, progress: LoadProgress) {
        self.progress.send_replace(Some(progress));
    }

    /// Ends the load.
    pub(crate) fn end(mut self, outcome: Result<(), LoadError>) {
        if let Some(sender) = self.outcome.take() {
            let _ = sender.send(outcome);
        }
    }
}
