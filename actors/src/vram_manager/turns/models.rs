//! What turns on a link promise to uploads that come, wait and give up at once. `just models`.

use std::sync::atomic::AtomicUsize as Count;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use futures::FutureExt;
use shuttle::future::block_on;
use shuttle::{check_pct, check_random, thread};

use super::*;

fn explore(model: impl Fn() + Send + Sync + Copy + 'static) {
    check_random(model, 2_000);
    check_pct(model, 2_000, 3);
}

#[test]
fn no_turn_is_lost_and_no_more_are_given_than_there_are() {
    explore(|| {
        let turns = Arc::new(Turns::default());
        let on_the_link = Arc::new(Count::new(0));
        // All but one are taken, so that few uploads are many.
        let blocker = turns.ticket(Urgency::demand(Some(Duration::from_secs(1))));
        let held: Vec<_> = (1..BATCHES)
            .map(|_| blocker.turn().now_or_never().unwrap())
            .collect();
        let uploads: Vec<_> = (0..3)
            .map(|upload| {
                let (turns, on_the_link) = (turns.clone(), on_the_link.clone());
                thread::spawn(move || {
                    let deadline = Duration::from_secs(10 - upload);
                    let ticket = turns.ticket(Urgency::demand(Some(deadline)));
                    let mut waits = ticket.turn().boxed();
                    // One gives up where it would have to wait.
                    if upload == 1 {
                        drop((&mut waits).now_or_never());
                        return;
                    }
                    let turn = block_on(waits);
                    assert_eq!(on_the_link.fetch_add(1, SeqCst), 0, "two have one turn");
                    thread::yield_now();
                    on_the_link.fetch_sub(1, SeqCst);
                    drop(turn);
                })
            })
            .collect();
        for upload in uploads {
            upload.join().unwrap();
        }
        drop(held);
        let state = turns.lock();
        assert_eq!((state.under_way, state.waiting.len()), (0, 0));
    });
}

#[test]
fn a_guess_has_its_turn_once_the_link_is_idle_or_somebody_wants_it() {
    for wanted in [false, true] {
        let model = move || {
            let turns = Arc::new(Turns::default());
            let first = turns.ticket(Urgency::demand(Some(Duration::from_secs(1))));
            let held = first.turn().now_or_never().unwrap();
            let urgency = Urgency::prefetch();
            let guess = {
                let ticket = turns.ticket(urgency.clone());
                thread::spawn(move || drop(block_on(ticket.turn())))
            };
            let other = {
                let ticket = turns.ticket(Urgency::demand(None));
                thread::spawn(move || drop(block_on(ticket.turn())))
            };
            if wanted {
                // Whoever wants it need not wait for the first.
                urgency.raise(None);
                guess.join().unwrap();
                drop(held);
            } else {
                drop(held);
                guess.join().unwrap();
            }
            other.join().unwrap();
            let state = turns.lock();
            assert_eq!((state.under_way, state.waiting.len()), (0, 0));
        };
        explore(model);
    }
}
