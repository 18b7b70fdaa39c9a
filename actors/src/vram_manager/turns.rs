//! Whose turn it is on the link to one GPU: the batches of the most urgent upload first, so that its component is there as
//! soon as if it were alone, and the others after it. A guess has the link while nobody else does, one batch at a time.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use hotset_core::io::Urgency;
use hotset_core::sync::{Mutex, MutexGuard};
use tokio::sync::oneshot;

/// Batches that the link has at the same time. It carries one of them; the others keep it busy while the news of its end
/// comes here and the next is queued, which takes 100 µs: with batches of 8 MiB as many as that feed a link of 500 GB/s.
const BATCHES: usize = 8;

/// The turns on one link. Beside the actors, since uploads outlive them.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    under_way: usize,
    next: u64,
    /// By place in the queue.
    waiting: BTreeMap<(Place, u64), oneshot::Sender<Turn>>,
}

/// An upload's place among all: guesses last, the earlier deadline first, then the earlier upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    guess: bool,
    urgency: u64,
    upload: u64,
}

impl Place {
    /// Batches that may be on the link before this one.
    const fn most_before(self) -> usize {
        if self.guess { 0 } else { BATCHES - 1 }
    }
}

/// One upload's way to its turns.
#[derive(Debug)]
pub(super) struct Ticket {
    turns: Arc<Turns>,
    urgency: Urgency,
    upload: u64,
}

/// The right to have one batch on the link, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    /// `None` where it was passed on.
    turns: Option<Arc<Turns>>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(turns) = self.turns.take() {
            turns.pass_on();
        }
    }
}

impl Turns {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock can panic half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place in the queue for one upload, behind those that are as urgent.
    pub(super) fn ticket(self: &Arc<Self>, urgency: Urgency) -> Ticket {
        let mut state = self.lock();
        state.next += 1;
        Ticket {
            turns: self.clone(),
            urgency,
            upload: state.next,
        }
    }

    /// A turn ended: the first who waits has it now, where it may.
    fn pass_on(self: Arc<Self>) {
        let mut state = self.lock();
        state.under_way -= 1;
        while let Some(((place, number), next)) = state.waiting.pop_first() {
            if state.under_way > place.most_before() {
                state.waiting.insert((place, number), next);
                return;
            }
            let turn = Turn {
                turns: Some(self.clone()),
            };
            // Who no longer waits gives the turn back in the answer; it must not come here again while this has the lock.
            match next.send(turn) {
                Ok(()) => {
                    state.under_way += 1;
                    return;
                }
                Err(mut turn) => turn.turns = None,
            }
        }
    }
}

impl Ticket {
    /// Waits for a turn.
    pub(super) async fn turn(&self) -> Turn {
        let guess = self.urgency.is_prefetch();
        let turn = self.queued(guess);
        if guess {
            tokio::select! {
                biased;
                turn = turn => return turn,
                // It has its place among the others from now on.
                () = self.urgency.demanded() => {}
            }
            return self.queued(false).await;
        }
        turn.await
    }

    async fn queued(&self, guess: bool) -> Turn {
        let place = Place {
            guess,
            urgency: self.urgency.place(),
            upload: self.upload,
        };
        let turn = {
            let mut state = self.turns.lock();
            if state.under_way <= place.most_before() {
                state.under_way += 1;
                return Turn {
                    turns: Some(self.turns.clone()),
                };
            }
            let (given, turn) = oneshot::channel();
            state.next += 1;
            let number = state.next;
            state.waiting.insert((place, number), given);
            turn
        };
        match turn.await {
            Ok(turn) => turn,
            // Only a queue that is gone drops its end, and this holds the queue.
            Err(_) => Turn { turns: None },
        }
    }
}

#[cfg(all(test, feature = "models"))]
mod models;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::FutureExt;

    use super::*;

    fn demand(deadline: u64) -> Urgency {
        Urgency::demand(Some(Duration::from_secs(deadline)))
    }

    #[tokio::test]
    async fn the_most_urgent_upload_is_first_and_no_turn_is_lost() {
        let turns = Arc::new(Turns::default());
        let late = turns.ticket(demand(9));
        let first = turns.ticket(demand(5));
        let second = turns.ticket(demand(5));
        let mut held = Vec::new();
        for _ in 0..BATCHES {
            held.push(late.turn().await);
        }
        let mut waiting = [
            late.turn().boxed(),
            second.turn().boxed(),
            first.turn().boxed(),
        ];
        for one in &mut waiting {
            assert!(one.now_or_never().is_none());
        }
        let [late_waits, second_waits, first_waits] = waiting;
        held.pop();
        let turn = first_waits.now_or_never().unwrap();
        // Who gives up is passed over.
        drop(second_waits);
        drop(turn);
        let turn = late_waits.now_or_never().unwrap();
        drop((turn, held));
        assert_eq!(turns.lock().under_way, 0);
        assert!(turns.lock().waiting.is_empty());
    }

    #[tokio::test]
    async fn a_guess_has_the_link_while_nobody_else_has_it() {
        let turns = Arc::new(Turns::default());
        let demanded = turns.ticket(demand(5));
        let urgency = Urgency::prefetch();
        let guess = turns.ticket(urgency.clone());
        let held = (demanded.turn().await, demanded.turn().await);
        let mut waits = guess.turn().boxed();
        assert!((&mut waits).now_or_never().is_none());
        drop(held.0);
        assert!((&mut waits).now_or_never().is_none());
        drop(held.1);
        let turn = (&mut waits).now_or_never().unwrap();
        let mut waits = guess.turn().boxed();
        assert!((&mut waits).now_or_never().is_none(), "one at a time");
        let others: Vec<_> = (1..BATCHES)
            .map(|_| demanded.turn().now_or_never().unwrap())
            .collect();
        let mut last = demanded.turn().boxed();
        assert!((&mut last).now_or_never().is_none());
        drop(turn);
        let last = last.now_or_never().unwrap();
        assert!((&mut waits).now_or_never().is_none());
        // Somebody wants it now: it is one of them.
        drop(last);
        urgency.raise(Some(Duration::from_secs(9)));
        let turn = waits.now_or_never().unwrap();
        drop((turn, others));
        assert_eq!(turns.lock().under_way, 0);
        assert!(turns.lock().waiting.is_empty());
    }

    #[tokio::test]
    async fn a_turn_that_was_given_to_nobody_goes_on() {
        let turns = Arc::new(Turns::default());
        let upload = turns.ticket(demand(1));
        let mut held = Vec::new();
        for _ in 0..BATCHES {
            held.push(upload.turn().await);
        }
        let mut given_up = upload.turn().boxed();
        assert!((&mut given_up).now_or_never().is_none());
        let mut waits = upload.turn().boxed();
        assert!((&mut waits).now_or_never().is_none());
        held.pop();
        // It has its turn, and goes without having looked.
        drop(given_up);
        assert!((&mut waits).now_or_never().is_some());
        drop(held);
        assert_eq!(turns.lock().under_way, 0);
    }
}
