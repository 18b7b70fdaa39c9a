use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::catalog::{FileIdentity, Kind, SourceFile};
use crate::ids::ComponentId;
use crate::memory::{FlightFailure, FlightState, Lease, Slab};

/// A component of this many bytes; equal numbers are equal content.
pub(super) fn component(number: u8, bytes: u64) -> Arc<Component> {
    Arc::new(Component {
        id: ComponentId {
            model: format!("m{number}").into(),
            component: "weights".into(),
        },
        kind: Kind::Unknown,
        architecture: None,
        dtype: None,
        bytes: Bytes(bytes),
        tensors: 0,
        content_id: ContentId::File([number; 32]),
        files: vec![SourceFile {
            path: std::path::Path::new("/nowhere").into(),
            identity: FileIdentity {
                device: 0,
                inode: u64::from(number),
                size: Bytes(bytes),
                mtime_ns: 0,
            },
        }],
        selection: None,
        part: None,
    })
}

pub(super) fn want(component: &Arc<Component>) -> Want {
    Want::Component(component.clone(), component.bytes)
}

pub(super) fn ledger(budget: u64) -> Arc<Ledger> {
    let ledger = Ledger::new();
    ledger.open_tier(Tier::Ram, Bytes(budget));
    ledger
}

fn reserve(ledger: &Arc<Ledger>, wants: &[Want]) -> Option<Reservation> {
    match ledger.reserve(Tier::Ram, wants, false).unwrap() {
        Reserved::Granted(reservation) => Some(reservation),
        Reserved::Short(_) => None,
    }
}

fn land(ledger: &Arc<Ledger>, component: &Arc<Component>) {
    let ticket = ledger.start(Tier::Ram, &component.content_id).unwrap();
    let slab = Slab::create("test", Bytes::ZERO).unwrap().seal().unwrap();
    ticket.land(Memory::Host(slab), Arc::default());
}

fn committed(ledger: &Ledger) -> u64 {
    ledger.view(Tier::Ram).unwrap().committed.get()
}

#[test]
fn a_reservation_is_all_or_nothing_and_comes_back() {
    let ledger = ledger(100);
    let (a, b) = (component(1, 60), component(2, 50));
    let refused = ledger.reserve(Tier::Ram, &[want(&a), want(&b)], false);
    assert_eq!(
        refused.unwrap_err(),
        Never::TooLarge {
            tier: Tier::Ram,
            needed: Bytes(110),
            budget: Bytes(100)
        }
    );
    let first = reserve(&ledger, &[want(&a)]).unwrap();
    match ledger.reserve(Tier::Ram, &[want(&b)], false).unwrap() {
        Reserved::Short(shortfall) => {
            assert_eq!(shortfall.needed, Bytes(50));
            assert_eq!(shortfall.free, Bytes(40));
            assert_eq!(shortfall.evictable, Bytes::ZERO);
            assert_eq!(shortfall.missing(), Bytes(10));
        }
        Reserved::Granted(_) => panic!("there is no room"),
    }
    assert_eq!(committed(&ledger), 60);
    drop(first);
    assert_eq!(committed(&ledger), 0);
    assert!(ledger.view(Tier::Ram).unwrap().residencies.is_empty());
}

#[test]
fn one_content_is_promised_and_started_once() {
    let ledger = ledger(100);
    let a = component(1, 60);
    let first = reserve(&ledger, &[want(&a)]).unwrap();
    let second = reserve(&ledger, &[want(&a), want(&a)]).unwrap();
    assert_eq!(committed(&ledger), 60);
    let ticket = ledger.start(Tier::Ram, &a.content_id).unwrap();
    assert!(ledger.start(Tier::Ram, &a.content_id).is_none());
    drop(first);
    assert!(!ticket.cancelled().is_cancelled(), "somebody still waits");
    drop(second);
    assert!(ticket.cancelled().is_cancelled(), "nobody waits any more");
    assert_eq!(committed(&ledger), 60, "the reader still writes");
    drop(ticket);
    assert_eq!(committed(&ledger), 0);
}

#[test]
fn a_failed_flight_is_told_to_all_and_leaves_nothing() {
    let ledger = ledger(100);
    let a = component(1, 60);
    let mut reservation = reserve(&ledger, &[want(&a)]).unwrap();
    let claim = reservation.claims.pop().unwrap();
    let ResidencyState::Loading(flight) = claim.state() else {
        panic!("it is promised");
    };
    let ticket = ledger.start(Tier::Ram, &a.content_id).unwrap();
    ticket.fail(FlightFailure::Cancelled);
    assert!(matches!(
        *flight.subscribe().borrow(),
        FlightState::Failed(FlightFailure::Cancelled)
    ));
    assert!(matches!(claim.state(), ResidencyState::Absent));
    assert_eq!(committed(&ledger), 0);

    // The same content comes again: the old claim has nothing to do with it.
    let again = reserve(&ledger, &[want(&a)]).unwrap();
    drop(claim);
    assert_eq!(ledger.view(Tier::Ram).unwrap().residencies[0].pins, 1);
    drop(again);
    assert_eq!(committed(&ledger), 0);
}

#[test]
fn what_is_leased_stays_and_what_is_evicted_comes_back_when_it_is_freed() {
    let ledger = ledger(100);
    let a = component(1, 60);
    let mut reservation = reserve(&ledger, &[want(&a)]).unwrap();
    land(&ledger, &a);
    let lease = Lease::new(reservation.claims.pop().unwrap(), SessionId(7)).unwrap();
    assert_eq!(ledger.leases(), BTreeMap::from([(SessionId(7), 1)]));
    assert!(ledger.evict(Tier::Ram, &a.content_id).is_none());
    assert!(ledger.evictable(Tier::Ram).is_empty());
    drop(lease);
    assert!(ledger.leases().is_empty());

    let evicted = ledger.evict(Tier::Ram, &a.content_id).unwrap();
    let view = ledger.view(Tier::Ram).unwrap();
    assert_eq!((view.committed, view.evicting), (Bytes(60), Bytes(60)));
    let b = component(2, 90);
    let Reserved::Short(shortfall) = ledger.reserve(Tier::Ram, &[want(&b)], false).unwrap() else {
        panic!("the memory is not free yet");
    };
    assert_eq!(shortfall.missing(), Bytes::ZERO, "it is on its way");
    drop(evicted);
    let view = ledger.view(Tier::Ram).unwrap();
    assert_eq!((view.committed, view.evicting), (Bytes::ZERO, Bytes::ZERO));
    assert!(reserve(&ledger, &[want(&b)]).is_some());
}

#[test]
fn the_fast_path_claims_all_or_none() {
    let ledger = ledger(100);
    let (a, b) = (component(1, 10), component(2, 10));
    let reservation = reserve(&ledger, &[want(&a)]).unwrap();
    assert!(
        ledger
            .claim_resident(Tier::Ram, std::slice::from_ref(&a), None)
            .is_none()
    );
    land(&ledger, &a);
    drop(reservation);
    assert!(
        ledger
            .claim_resident(Tier::Ram, &[a.clone(), b], None)
            .is_none()
    );
    let claims = ledger.claim_resident(Tier::Ram, &[a], None).unwrap();
    assert!(matches!(claims[0].state(), ResidencyState::Resident { .. }));
}

#[test]
fn a_residency_is_found_under_the_content_that_a_digest_has_shown() {
    let ledger = ledger(100);
    let a = component(1, 60);
    let reservation = reserve(&ledger, &[want(&a)]).unwrap();
    land(&ledger, &a);
    let mut named = (*a).clone();
    named.content_id = ContentId::Blake3([9; 32]);
    let named = Arc::new(named);
    ledger.identified(&a.content_id, &named);
    // Under both names, and once.
    for known in [&a, &named] {
        let claims = ledger.claim_resident(Tier::Ram, std::slice::from_ref(known), None);
        assert!(claims.is_some());
        assert_eq!(ledger.needed(Tier::Ram, &[want(known)]), Bytes::ZERO);
    }
    assert_eq!(committed(&ledger), 60);
    assert!(
        ledger.evict(Tier::Ram, &named.content_id).is_none(),
        "it is held"
    );
    drop(reservation);
    drop(ledger.evict(Tier::Ram, &named.content_id).unwrap());
    assert_eq!(committed(&ledger), 0);
    assert_eq!(
        ledger.needed(Tier::Ram, &[want(&a)]),
        Bytes(60),
        "both names are gone"
    );
}

#[test]
fn a_tier_out_of_service_says_why() {
    let ledger = ledger(100);
    ledger.set_service(Tier::Ram, Some("broken".into()));
    let refused = ledger.reserve(Tier::Ram, &[], false).unwrap_err();
    assert_eq!(refused.to_string(), "ram is out of service: broken");
    let gone = Tier::Vram(crate::GpuIndex(3));
    assert!(ledger.reserve(gone, &[], false).is_err());
}

/// What a random client does next.
#[derive(Debug, Clone)]
enum Deed {
    Reserve(Vec<u8>),
    DropReservation(usize),
    Start(u8),
    LandOrFail(usize, bool),
    Lease(usize),
    DropLease(usize),
    Evict(u8),
    DropEvicted(usize),
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        proptest::collection::vec(0..6_u8, 1..4).prop_map(Deed::Reserve),
        any::<usize>().prop_map(Deed::DropReservation),
        (0..6_u8).prop_map(Deed::Start),
        any::<(usize, bool)>().prop_map(|(i, ok)| Deed::LandOrFail(i, ok)),
        any::<usize>().prop_map(Deed::Lease),
        any::<usize>().prop_map(Deed::DropLease),
        (0..6_u8).prop_map(Deed::Evict),
        any::<usize>().prop_map(Deed::DropEvicted),
    ]
}

fn take<T>(from: &mut Vec<T>, i: usize) -> Option<T> {
    (!from.is_empty()).then(|| from.swap_remove(i % from.len()))
}

proptest! {
    /// Whatever clients, readers and keepers do, and in whichever order: the budget holds at every step, what is leased
    /// is never evicted, and when all let go, all bytes are back.
    #[test]
    fn the_books_balance(deeds in proptest::collection::vec(deed(), 0..120)) {
        const BUDGET: u64 = 100;
        let ledger = ledger(BUDGET);
        let components: Vec<_> = (0..6).map(|n| component(n, 10 + 7 * u64::from(n))).collect();
        let (mut reservations, mut tickets) = (Vec::new(), Vec::new());
        let (mut leases, mut evicted) = (Vec::<Lease>::new(), Vec::new());
        for deed in deeds {
            match deed {
                Deed::Reserve(numbers) => {
                    let wants: Vec<_> = numbers.iter().map(|n| want(&components[*n as usize])).collect();
                    if let Ok(Reserved::Granted(reservation)) = ledger.reserve(Tier::Ram, &wants, false) {
                        reservations.push(reservation);
                    }
                }
                Deed::DropReservation(i) => drop(take(&mut reservations, i)),
                Deed::Start(n) => tickets.extend(ledger.start(Tier::Ram, &components[n as usize].content_id)),
                Deed::LandOrFail(i, ok) => match take(&mut tickets, i) {
                    Some(ticket) if ok => {
                        let slab = Slab::create("test", Bytes::ZERO).unwrap().seal().unwrap();
                        ticket.land(Memory::Host(slab), Arc::default());
                    }
                    other => drop(other),
                },
                Deed::Lease(i) => {
                    if let Some(claim) = take(&mut reservations, i).and_then(|mut r| r.claims.pop()) {
                        leases.extend(Lease::new(claim, SessionId(1)));
                    }
                }
                Deed::DropLease(i) => drop(take(&mut leases, i)),
                Deed::Evict(n) => {
                    let content = components[n as usize].content_id;
                    let held = leases.iter().any(|l| l.component().content_id == content);
                    let gone = ledger.evict(Tier::Ram, &content);
                    prop_assert!(!(held && gone.is_some()), "evicted what is leased");
                    evicted.extend(gone);
                }
                Deed::DropEvicted(i) => drop(take(&mut evicted, i)),
            }
            let view = ledger.view(Tier::Ram).unwrap();
            prop_assert!(view.committed <= view.budget, "over budget");
            let there: u64 = view.residencies.iter().map(|r| r.bytes.get()).sum();
            prop_assert!(view.committed.get() >= there);
            let of_leases: u32 = view.residencies.iter().map(|r| r.leases).sum();
            prop_assert_eq!(of_leases as usize, leases.len());
        }
        drop((reservations, leases, evicted));
        drop(tickets);
        for component in &components {
            drop(ledger.evict(Tier::Ram, &component.content_id));
        }
        let view = ledger.view(Tier::Ram).unwrap();
        prop_assert_eq!(view.committed, Bytes::ZERO);
        prop_assert_eq!(view.evicting, Bytes::ZERO);
        prop_assert!(view.residencies.is_empty());
    }
}

#[test]
fn the_books_say_what_memory_takes_once_it_is_there() {
    let ledger = ledger(100);
    let component = component(1, 40);
    let reservation = reserve(&ledger, &[want(&component)]).unwrap();
    let mut ticket = ledger.start(Tier::Ram, &component.content_id).unwrap();
    for held in [64, 120, 48] {
        ticket.settle(Bytes(held));
        let view = ledger.view(Tier::Ram).unwrap();
        assert_eq!(
            (view.committed, view.residencies[0].bytes),
            (Bytes(held), Bytes(held))
        );
        assert_eq!(ticket.promised(), Bytes(held));
    }
    drop(ticket);
    drop(reservation);
    assert_eq!(ledger.view(Tier::Ram).unwrap().committed, Bytes::ZERO);
}

#[test]
fn a_demand_makes_a_prefetch_urgent() {
    let ledger = ledger(100);
    let component = component(1, 40);
    let Ok(Reserved::Granted(_guess)) = ledger.reserve(Tier::Ram, &[want(&component)], true) else {
        panic!("there is room");
    };
    let ticket = ledger.start(Tier::Ram, &component.content_id).unwrap();
    assert!(ticket.urgency().is_prefetch());
    let _demand = reserve(&ledger, &[want(&component)]).unwrap();
    assert!(!ticket.urgency().is_prefetch());
}

#[test]
fn memory_that_turns_up_is_a_flight_that_others_join() {
    let ledger = ledger(100);
    let (here, other) = (component(1, 40), component(2, 70));
    let charge = ledger.charge(Tier::Ram, Bytes(48)).unwrap();
    let (ticket, claim) = ledger.adopt(&here, charge).unwrap();
    assert_eq!(committed(&ledger), 48);
    // Who wants it waits for that flight, and nobody else begins one.
    let joined = reserve(&ledger, &[want(&here)]).unwrap();
    assert_eq!(committed(&ledger), 48);
    assert!(ledger.start(Tier::Ram, &here.content_id).is_none());
    let slab = Slab::create("test", Bytes::ZERO).unwrap().seal().unwrap();
    ticket.land(Memory::Host(slab), Arc::default());
    let [ref wanted] = joined.claims[..] else {
        panic!("one claim")
    };
    assert!(matches!(wanted.state(), ResidencyState::Resident { .. }));
    assert_eq!(
        ledger.load_time(Tier::Ram, &here.content_id),
        None,
        "nothing was loaded"
    );
    // A second one of the same content is charged, and no more than that: beyond the budget too.
    let more = ledger.charge(Tier::Ram, Bytes(60)).unwrap();
    let more = ledger.adopt(&here, more).unwrap_err();
    assert_eq!(committed(&ledger), 108);
    assert!(reserve(&ledger, &[want(&other)]).is_none());
    drop((joined, claim));
    assert!(ledger.evict(Tier::Ram, &here.content_id).is_some());
    drop(more);
    assert_eq!(committed(&ledger), 0);
}

#[test]
fn memory_that_holds_something_else_stays_charged_and_who_waits_hears_of_it() {
    let ledger = ledger(100);
    let component = component(1, 40);
    let charge = ledger.charge(Tier::Ram, Bytes(48)).unwrap();
    let (ticket, claim) = ledger.adopt(&component, charge).unwrap();
    let joined = reserve(&ledger, &[want(&component)]).unwrap();
    let charge = ticket.fail_charged(FlightFailure::Interrupted);
    assert!(matches!(joined.claims[0].state(), ResidencyState::Absent));
    drop(claim);
    assert_eq!(committed(&ledger), 48);
    let again = reserve(&ledger, &[want(&component)]).unwrap();
    assert!(ledger.start(Tier::Ram, &component.content_id).is_some());
    drop((charge, joined, again));
    assert_eq!(committed(&ledger), 0);
}
