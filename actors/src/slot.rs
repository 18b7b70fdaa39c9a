//! Where an actor can be reached, across its restarts.

use std::sync::atomic::{AtomicU64, Ordering};
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
    /// Messages that were sent.
    sent: AtomicU64,
    /// Of them, those that are known to be handled: an answer says so of all that were sent before its question.
    handled: AtomicU64,
}

impl<M: Message> Slot<M> {
    pub(crate) fn new() -> Self {
        Self {
            current: watch::Sender::new(None),
            sent: AtomicU64::new(0),
            handled: AtomicU64::new(0),
        }
    }

    pub(crate) fn set(&self, actor: Option<ActorRef<M>>) {
        // A mailbox goes with its actor.
        let sent = self.sent.load(Ordering::Relaxed);
        self.handled.fetch_max(sent, Ordering::Relaxed);
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
            .map_err(|_| Unavailable)?;
        self.sent.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// How many messages may be waiting in its mailbox: those that are not known to be handled. Exact right after an answer, and
    /// while it is stuck.
    pub(crate) fn depth(&self) -> u64 {
        let handled = self.handled.load(Ordering::Relaxed);
        self.sent.load(Ordering::Relaxed).saturating_sub(handled)
    }

    /// Sends a message and waits for its answer, once.
    pub(crate) async fn call<R: Send + 'static>(
        &self,
        message: impl FnOnce(RpcReplyPort<R>) -> M + Send,
    ) -> Result<R, Unavailable> {
        let (sender, receiver) = oneshot::channel();
        self.cast(message(sender.into()))?;
        let sent = self.sent.load(Ordering::Relaxed);
        let answer = receiver.await.map_err(|_| Unavailable)?;
        self.handled.fetch_max(sent, Ordering::Relaxed);
        Ok(answer)
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

#[cfg(test)]
mod tests {
    use super::*;
    use ractor::{Actor, ActorProcessingErr};
    use tokio::sync::Semaphore;

    struct Slow;

    #[derive(Debug)]
    enum SlowMessage {
        Work,
        Ask(RpcReplyPort<()>),
    }

    impl Actor for Slow {
        type Msg = SlowMessage;
        type State = std::sync::Arc<Semaphore>;
        type Arguments = std::sync::Arc<Semaphore>;

        async fn pre_start(
            &self,
            _myself: ActorRef<SlowMessage>,
            gate: Self::Arguments,
        ) -> Result<Self::State, ActorProcessingErr> {
            Ok(gate)
        }

        async fn handle(
            &self,
            _myself: ActorRef<SlowMessage>,
            message: SlowMessage,
            gate: &mut Self::State,
        ) -> Result<(), ActorProcessingErr> {
            match message {
                SlowMessage::Work => gate.acquire().await?.forget(),
                SlowMessage::Ask(reply) => reply.send(())?,
            }
            Ok(())
        }
    }

    #[tokio::test]
    async fn what_waits_in_a_mailbox_is_counted() {
        let gate = std::sync::Arc::new(Semaphore::new(0));
        let (actor, ended) = Actor::spawn(None, Slow, gate.clone()).await.unwrap();
        let slot = Slot::new();
        slot.set(Some(actor.clone()));
        for _ in 0..5 {
            slot.cast(SlowMessage::Work).unwrap();
        }
        assert_eq!(slot.depth(), 5);
        gate.add_permits(5);
        slot.call(SlowMessage::Ask).await.unwrap();
        assert_eq!(slot.depth(), 0);
        slot.cast(SlowMessage::Work).unwrap();
        actor.kill();
        ended.await.unwrap();
        slot.set(None);
        assert_eq!(slot.depth(), 0, "a mailbox goes with its actor");
    }
}
