//! What the arena promises to those who take and give back memory at once. `just models`.

use shuttle::{check_pct, check_random, thread};

use super::*;
use crate::memory::MappingId;

fn explore(runs: usize, model: impl Fn() + Send + Sync + Copy + 'static) {
    check_random(model, runs);
    check_pct(model, runs, 3);
}

fn arena(limit: Bytes) -> Arena {
    Arena::new(ArenaOptions {
        limit,
        hugetlb: false,
        ..ArenaOptions::default()
    })
}

fn filled(arena: &Arena, value: u8) -> Arc<Slab> {
    let mut writer = arena.slab("model", Bytes(4096)).unwrap();
    writer.spare().fill(value);
    writer.advance(4096);
    writer.seal().unwrap()
}

#[test]
fn no_two_slabs_share_memory_and_every_byte_comes_back() {
    explore(500, || {
        let arena = arena(Bytes(3 * 4096));
        let threads: Vec<_> = (1..=3)
            .map(|value| {
                let arena = arena.clone();
                thread::spawn(move || {
                    for _ in 0..2 {
                        let slab = filled(&arena, value);
                        thread::yield_now();
                        assert!(slab.filled().iter().all(|byte| *byte == value));
                        // As a client does that reads for a moment.
                        let shared = slab.read_only_descriptor().unwrap();
                        drop(slab);
                        thread::yield_now();
                        drop(shared);
                    }
                })
            })
            .collect();
        arena.set_pressed(true);
        arena.set_pressed(false);
        arena.release(Bytes(4096));
        for thread in threads {
            thread.join().unwrap();
        }
        let view = arena.view();
        assert_eq!((view.live, view.lingering), (Bytes::ZERO, Bytes::ZERO));
        assert!(view.warm <= Bytes(3 * 4096));
        arena.release(Bytes::ZERO);
        assert_eq!(arena.view().mappings, 0);
    });
}

#[test]
fn memory_that_others_populate_is_all_there_for_each() {
    // Each touches 40 MiB.
    explore(40, || {
        let mut mapping = Mapping::create("model", 40 << 20, Pages::Small).unwrap();
        mapping.fit(40 << 20);
        let mapping = Arc::new(mapping);
        let threads: Vec<_> = [10 << 20, 40 << 20]
            .into_iter()
            .map(|to| {
                let mapping = mapping.clone();
                thread::spawn(move || {
                    mapping.populate(to).unwrap();
                    assert!(mapping.present() >= to);
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

/// The models above can fail: memory that is looked at and taken in two steps is taken twice.
#[test]
#[should_panic(expected = "two have the same memory")]
fn a_mistake_is_found() {
    explore(500, || {
        let arena = arena(Bytes::mib(1));
        drop(filled(&arena, 1));
        let taken: Arc<Mutex<Vec<MappingId>>> = Arc::default();
        let careless = |arena: &Arena, taken: &Mutex<Vec<MappingId>>| {
            let found = {
                let state = arena.shared.lock();
                state.warm.first().map(|kept| kept.mapping.range().mapping)
            };
            let Some(found) = found else { return };
            let mut taken = taken.lock().unwrap();
            assert!(!taken.contains(&found), "two have the same memory");
            taken.push(found);
            arena.shared.lock().warm.clear();
        };
        let other = {
            let (arena, taken) = (arena.clone(), taken.clone());
            thread::spawn(move || careless(&arena, &taken))
        };
        careless(&arena, &taken);
        other.join().unwrap();
    });
}
