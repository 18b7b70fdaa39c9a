//! What the ledger promises to those who use it at once, under every interleaving that shuttle finds of their locks. `just models`.

use std::sync::atomic::AtomicBool as Seen;
use std::sync::atomic::Ordering::SeqCst;

use shuttle::{check_pct, check_random, thread};

use super::tests::{component, ledger, want};
use super::*;
use crate::memory::{Lease, Slab};

/// Interleavings by chance, and as many with few, well-placed switches, which find what needs a certain order.
const RUNS: usize = 2_000;
const SWITCHES: usize = 3;

fn explore(model: impl Fn() + Send + Sync + Copy + 'static) {
    check_random(model, RUNS);
    check_pct(model, RUNS, SWITCHES);
}

fn granted(ledger: &Arc<Ledger>, wants: &[Want]) -> Option<Reservation> {
    match ledger.reserve(Tier::Ram, wants, false) {
        Ok(Reserved::Granted(reservation)) => Some(reservation),
        _ => None,
    }
}

fn land(ticket: FlightTicket) {
    let slab = Slab::create("model", Bytes::ZERO).unwrap().seal().unwrap();
    ticket.land(Memory::Host(slab), Arc::default());
}

/// Nothing is held, and nothing is charged but what is listed.
fn assert_quiet(ledger: &Ledger) {
    let view = ledger.view(Tier::Ram).unwrap();
    let listed: Bytes = view.residencies.iter().map(|row| row.bytes).sum();
    assert_eq!((view.committed, view.evicting), (listed, Bytes::ZERO));
    assert!(view.committed <= view.budget);
    assert!(
        view.residencies
            .iter()
            .all(|row| row.pins == 0 && row.leases == 0)
    );
    assert!(view.residencies.iter().all(|row| !row.loading));
    assert!(ledger.leases().is_empty());
}

/// One session's load: reserve, move the bytes if nobody else does, lease, let go.
fn load(ledger: &Arc<Ledger>, components: &[&Arc<Component>], session: u64, give_up: bool) {
    let wants: Vec<_> = components.iter().map(|component| want(component)).collect();
    let Some(reservation) = granted(ledger, &wants) else {
        return;
    };
    let view = ledger.view(Tier::Ram).unwrap();
    assert!(
        view.committed <= view.budget,
        "more is promised than there is"
    );
    for component in components {
        if let Some(ticket) = ledger.start(Tier::Ram, &component.content_id) {
            match give_up {
                true => drop(ticket),
                false => land(ticket),
            }
        }
    }
    for claim in reservation.claims {
        if let Ok(lease) = Lease::new(claim, SessionId(session)) {
            assert!(
                ledger
                    .evict(Tier::Ram, &lease.component().content_id)
                    .is_none(),
                "what is leased was evicted"
            );
        }
    }
}

#[test]
fn loads_flights_and_evictions_lose_no_byte() {
    explore(|| {
        let ledger = ledger(100);
        let (a, b) = (component(1, 60), component(2, 50));
        let one = {
            let (ledger, a) = (ledger.clone(), a.clone());
            thread::spawn(move || load(&ledger, &[&a], 1, false))
        };
        let other = {
            let (ledger, a) = (ledger.clone(), a.clone());
            thread::spawn(move || load(&ledger, &[&a], 2, true))
        };
        let third = {
            let (ledger, b) = (ledger.clone(), b.clone());
            thread::spawn(move || load(&ledger, &[&b], 3, false))
        };
        for component in [&a, &b] {
            drop(ledger.evict(Tier::Ram, &component.content_id));
            let view = ledger.view(Tier::Ram).unwrap();
            assert!(view.committed <= view.budget && view.evicting <= view.committed);
        }
        for thread in [one, other, third] {
            thread.join().unwrap();
        }
        assert_quiet(&ledger);
    });
}

#[test]
fn one_content_is_moved_by_one() {
    explore(|| {
        let ledger = ledger(100);
        let a = component(1, 60);
        let moving = Arc::new(Seen::new(false));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let (ledger, a, moving) = (ledger.clone(), a.clone(), moving.clone());
                thread::spawn(move || {
                    let reservation = granted(&ledger, &[want(&a)]).unwrap();
                    if let Some(ticket) = ledger.start(Tier::Ram, &a.content_id) {
                        assert!(!moving.swap(true, SeqCst), "two move the same bytes");
                        thread::yield_now();
                        moving.store(false, SeqCst);
                        land(ticket);
                    }
                    drop(reservation);
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_quiet(&ledger);
    });
}

#[test]
fn a_lease_on_a_lost_tier_is_always_told() {
    explore(|| {
        let ledger = ledger(100);
        let a = component(1, 60);
        let reservation = granted(&ledger, &[want(&a)]).unwrap();
        land(ledger.start(Tier::Ram, &a.content_id).unwrap());
        let leasing = {
            let ledger = ledger.clone();
            thread::spawn(move || {
                let mut leases = Vec::new();
                for claim in reservation.claims {
                    leases.extend(Lease::new(claim, SessionId(1)));
                }
                let fast = ledger.lease_resident(
                    Tier::Ram,
                    &[component(1, 60)],
                    SessionId(2),
                    KeepAlive::Unlimited,
                );
                leases.extend(fast.into_iter().flatten());
                leases
            })
        };
        ledger.revoke_tier(Tier::Ram, &"lost".into());
        let leases = leasing.join().unwrap();
        for lease in &leases {
            assert!(
                lease.revoked().is_some(),
                "it holds nothing, and nobody says so"
            );
        }
        drop(leases);
        assert_quiet(&ledger);
    });
}

/// The models above can fail: a look and an act with the lock let go in between let two sets have the same bytes.
#[test]
#[should_panic(expected = "more is promised than there is")]
fn a_mistake_is_found() {
    explore(|| {
        let ledger = ledger(100);
        let careless = |ledger: &Arc<Ledger>, bytes: u64| {
            let free = ledger.lock().tiers[&Tier::Ram].free();
            if Bytes(bytes) <= free {
                let mut books = ledger.lock();
                let tier = books.tiers.get_mut(&Tier::Ram).unwrap();
                tier.committed += Bytes(bytes);
                assert!(
                    tier.committed <= tier.budget,
                    "more is promised than there is"
                );
            }
        };
        let other = {
            let ledger = ledger.clone();
            thread::spawn(move || careless(&ledger, 60))
        };
        careless(&ledger, 60);
        other.join().unwrap();
    });
}
