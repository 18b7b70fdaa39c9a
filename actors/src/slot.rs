//! Where an actor can be reached, across its restarts.

use std::time::Duration;

use hotset_core::watch;
use ractor::{ActorRef, Message, RpcReplyPort};
use tokio::sync::oneshot;

/// The actor is not there now: it is being restarted, is out of service, or ended before it answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the actor does not answer now")]
pub(crate) struct Unavailable;

/// First wait after a call that was not answered; doubled up to [`LONGEST_WAIT`]. Short, since a restart takes
/// milliseconds.
const FIRST_WAIT: Duration = Duration::from_millis(5);
/// The longest wait between two tries, so that a recovered actor is noticed at once by human measure.
const LONGEST_WAIT: Duration = Duration::from_millis(200);

/// The address of one actor of the tree. The supervisor fills it at each start and empties it at each death.
#[derive(Debug)]
pub(crate) struct Slot<M: Message> {
    current: watch::Sender<Option<ActorRef<M>>>,
}

impl<M: Message> Slot<M> {
    pub(crate) fn new() -> Self {
        Self {
            current: watch::Sender::new(None),
        }
    }

    pub(crate) fn set(&self, actor: Option<ActorRef<M>>) {
        self.current.send_replace(actor);
    }

    pub(crate) fn get(&self) -> Option<ActorRef<M>> {
        self.current.borrow().clone()
    }

    /// Tells of each restart.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Option<ActorRef<M>>> {
        self.current.subscribe()
    }

    /// Sends a message, if the actor is there.
    pub(crate) fn cast(&self, message: M) -> Result<(), Unavailable> {
        self.get()
            .ok_or(Unavailable)?
            .send_message(message)
            .map_err(|_| Unavailable)
    }

    /// Sends a message and waits for its answer, once.
    pub(crate) async fn call<R: Send + 'static>(
        &self,
        message: impl FnOnce(RpcReplyPort<R>) -> M + Send,
    ) -> Result<R, Unavailable> {
        let (sender, receiver) = oneshot::channel();
        self.cast(message(sender.into()))?;
        receiver.await.map_err(|_| Unavailable)
    }

    /// Sends a message and waits for its answer, again and again until one comes. The caller bounds the time.
    pub(crate) async fn insist<R: Send + 'static>(
        &self,
        message: impl Fn(RpcReplyPort<R>) -> M + Send + Sync,
    ) -> R {
        let mut wait = FIRST_WAIT;
        loop {
            let mut restarts = self.subscribe();
            restarts.mark_unchanged();
            match self.call(&message).await {
                Ok(answer) => return answer,
                Err(Unavailable) => {
                    let _ = tokio::time::timeout(wait, restarts.changed()).await;
                    wait = (wait * 2).min(LONGEST_WAIT);
                }
            }
        }
    }
}
