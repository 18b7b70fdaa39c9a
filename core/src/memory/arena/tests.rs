use proptest::prelude::*;

use super::*;
use crate::memory::{Addresses, HostRange, MappedRange, MappingId, MappingObserver, Unmapping};
use crate::units::{GIB, MIB};

fn arena(limit: Bytes) -> Arena {
    Arena::new(ArenaOptions {
        limit,
        hugetlb: false,
        ..ArenaOptions::default()
    })
}

/// A finished slab with this byte all over.
fn filled(arena: &Arena, bytes: u64, value: u8) -> Arc<Slab> {
    let mut writer = arena.slab("test", Bytes(bytes)).unwrap();
    writer.spare().fill(value);
    writer.advance(bytes as usize);
    writer.seal().unwrap()
}

proptest! {
    #[test]
    fn a_length_is_at_most_an_eighth_too_long(bytes in 1..64 * GIB) {
        let class = class_of(bytes);
        prop_assert!(class >= bytes);
        prop_assert!(class - bytes <= (bytes / STEPS).max(SMALLEST_STEP));
        prop_assert_eq!(class_of(class), class);
        if class >= HUGE_FROM {
            prop_assert_eq!(class % super::super::mapping::HUGE_PAGE, 0);
        }
    }
}

#[test]
fn warm_memory_of_another_node_is_no_memory_near_a_gpu() {
    let arena = arena(Bytes::gib(1));
    let (here, there) = (NumaNode::new(0), NumaNode::new(1));
    let at = |near| {
        let mut writer = arena.slab_near("test", Bytes(MIB), near).unwrap();
        writer.advance(MIB as usize);
        writer.seal().unwrap().range().mapping
    };
    let first = at(here);
    let second = at(there);
    assert_ne!(first, second);
    assert_eq!(at(here), first);
    assert_eq!(at(there), second);
    let any = at(None);
    assert!([first, second].contains(&any), "whatever is warm");
}

#[test]
fn memory_of_a_slab_that_is_gone_serves_the_next_one() {
    let arena = arena(Bytes::gib(1));
    let first = filled(&arena, MIB, 1);
    let range = first.range();
    assert_eq!(arena.view().live, Bytes::mib(1));
    drop(first);
    assert_eq!(
        (arena.view().live, arena.view().warm),
        (Bytes::ZERO, Bytes::mib(1))
    );
    let second = filled(&arena, MIB - 5000, 2);
    assert_eq!(second.range().mapping, range.mapping);
    assert_eq!(second.range().address, range.address);
    assert_eq!(second.held(), Bytes::mib(1) - Bytes::kib(4));
    assert_eq!(second.filled().len() as u64, MIB - 5000);
    let view = arena.view();
    assert_eq!((view.reused, view.fresh, view.mappings), (1, 1, 1));
    assert_eq!((view.live, view.warm), (second.held(), Bytes::ZERO));
    let range = second.range();
    drop(second);
    let second = filled(&arena, MIB - 5000, 2);
    assert_eq!(second.range(), range, "a device need not register it again");
    let third = filled(&arena, MIB, 3);
    assert_ne!(third.range().mapping, range.mapping);
    assert!(second.filled().iter().all(|byte| *byte == 2));
    assert_eq!(arena.view().mappings, 2);
    drop((second, third));
    assert_eq!(arena.view().mappings, 2, "kept warm");
    arena.release(Bytes::ZERO);
    assert_eq!(arena.view().mappings, 0);
}

#[test]
fn much_smaller_slabs_leave_warm_memory_for_those_of_its_size() {
    let arena = arena(Bytes::gib(1));
    drop(filled(&arena, 4 * MIB, 1));
    let small = filled(&arena, MIB, 1);
    assert_eq!(arena.view().warm, Bytes::mib(4));
    drop(small);
}

#[test]
fn a_slab_that_another_process_may_still_have_is_not_used_again() {
    let arena = arena(Bytes::gib(1));
    let first = filled(&arena, MIB, 1);
    let descriptor = first.read_only_descriptor().unwrap();
    let mapping = first.range().mapping;
    drop(first);
    let view = arena.view();
    assert_eq!((view.warm, view.lingering), (Bytes::ZERO, Bytes::mib(1)));
    assert_eq!(view.mappings, 1);
    assert_ne!(filled(&arena, MIB, 2).range().mapping, mapping);
    let mut bytes = vec![0; MIB as usize];
    std::os::unix::fs::FileExt::read_exact_at(&std::fs::File::from(descriptor), &mut bytes, 0)
        .unwrap();
    assert!(
        bytes.iter().all(|byte| *byte == 1),
        "its bytes stay as they were"
    );
    // The descriptor is closed by now.
    assert_eq!(arena.view().lingering, Bytes::ZERO);
    let mut live = Vec::new();
    while live.len() < 2 {
        live.push(filled(&arena, MIB, 3));
    }
    assert!(live.iter().any(|slab| slab.range().mapping == mapping));
}

#[test]
fn sealed_memory_is_used_again_only_by_slabs_that_take_all_of_it() {
    let arena = arena(Bytes::gib(1));
    let first = filled(&arena, MIB, 1);
    let mapping = first.range().mapping;
    drop(first.read_only_descriptor().unwrap());
    drop(first);
    let smaller = filled(&arena, MIB - 20_000, 2);
    assert_ne!(
        smaller.range().mapping,
        mapping,
        "its rest could not be given back"
    );
    assert_eq!(filled(&arena, MIB, 2).range().mapping, mapping);
}

#[test]
fn the_limit_bounds_what_is_kept() {
    let arena = arena(Bytes::mib(4));
    let slabs: Vec<_> = (0..4).map(|_| filled(&arena, MIB, 1)).collect();
    drop(slabs);
    assert_eq!(arena.view().warm, Bytes::mib(4));
    // Of another size: it cannot use what is warm, and takes its place.
    let other = filled(&arena, 2 * MIB, 1);
    let view = arena.view();
    assert_eq!((view.live, view.warm), (Bytes::mib(2), Bytes::mib(2)));
    assert_eq!(arena.release(Bytes::mib(1)), Bytes::mib(1));
    arena.set_limit(Bytes::mib(2));
    assert_eq!(arena.view().warm, Bytes::ZERO);
    drop(other);
    assert_eq!(arena.view().warm, Bytes::mib(2));
}

#[test]
fn memory_can_be_warm_before_the_first_slab() {
    let arena = arena(Bytes::mib(8));
    assert!(arena.prewarm(Bytes::mib(5), &|| true).unwrap());
    assert_eq!(arena.view().warm, Bytes::mib(5));
    assert!(!arena.prewarm(Bytes::mib(5), &|| true).unwrap(), "no room");
    assert!(
        !arena.prewarm(Bytes::mib(1), &|| false).unwrap(),
        "called off"
    );
    drop(filled(&arena, 5 * MIB, 1));
    assert_eq!(arena.view().reused, 1);
}

#[test]
fn addresses_that_a_device_has_registered_still_are_nobodys() {
    #[derive(Debug, Default)]
    struct Withholding(Mutex<Vec<Arc<Addresses>>>);
    impl MappingObserver for Withholding {
        fn unmapping(&self, _: MappedRange) -> Unmapping {
            Unmapping::Withhold
        }

        fn withheld(&self, _: MappingId, addresses: Arc<Addresses>) {
            self.0.lock().unwrap().push(addresses);
        }
    }
    let withholding = Arc::new(Withholding::default());
    let arena = arena(Bytes::gib(1));
    let watched = || {
        let slab = filled(&arena, MIB, 1);
        let range = HostRange::new(slab.clone(), 0, 1).unwrap();
        range.observe(withholding.clone());
        slab.range()
    };
    let has = |what: &str, range: MappedRange| {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        // Neighbours without memory may have become one.
        maps.lines().any(|line| {
            let (from, rest) = line.split_once('-').unwrap();
            let (to, rest) = rest.split_once(' ').unwrap();
            let [from, to] = [from, to].map(|at| usize::from_str_radix(at, 16).unwrap());
            from <= range.address && range.address + range.bytes <= to && rest.starts_with(what)
        })
    };
    let dropped = watched();
    assert!(has("rw-s", dropped));
    arena.release(Bytes::ZERO);
    assert!(has("---p", dropped));
    // Nor is it made to fit a smaller slab.
    let refused = watched();
    drop(filled(&arena, MIB - 8192, 1));
    arena.release(Bytes::ZERO);
    assert!(has("---p", refused));
    let (live, held) = (arena.view().live, arena.view().mappings);
    assert_eq!((live, held), (Bytes::ZERO, 0));
    let both = Bytes((dropped.bytes + refused.bytes) as u64);
    assert_eq!(arena.view().lingering, both, "a GPU has it");
    withholding.0.lock().unwrap().clear();
    assert_eq!(arena.view().lingering, Bytes::ZERO);
    assert!(!has("---p", dropped) && !has("---p", refused));
}

#[test]
fn an_observer_hears_of_each_mapping_that_ends() {
    #[derive(Debug, Default)]
    struct Ended(Mutex<Vec<MappedRange>>);
    impl MappingObserver for Ended {
        fn unmapping(&self, range: MappedRange) -> Unmapping {
            self.0.lock().unwrap().push(range);
            Unmapping::Free
        }

        fn withheld(&self, _: MappingId, _: Arc<Addresses>) {
            unreachable!("nothing is");
        }
    }
    let ended = Arc::new(Ended::default());
    let arena = arena(Bytes::gib(1));
    let watched = || {
        let slab = filled(&arena, MIB, 1);
        HostRange::new(slab.clone(), 0, 1)
            .unwrap()
            .observe(ended.clone());
        slab
    };
    let slab = watched();
    let range = slab.range();
    drop(slab);
    assert!(ended.0.lock().unwrap().is_empty());
    arena.release(Bytes::ZERO);
    assert_eq!(*ended.0.lock().unwrap(), [range]);
    // What is punched out for a smaller slab is no longer what a device has pinned.
    let shrunk = watched();
    let range = shrunk.range();
    drop(shrunk);
    let smaller = filled(&arena, MIB - 8192, 1);
    if smaller.range().mapping == range.mapping {
        assert_eq!(ended.0.lock().unwrap().last(), Some(&range));
    }
    drop(smaller);
    let last = watched();
    let range = last.range();
    drop(last);
    drop(arena);
    assert_eq!(ended.0.lock().unwrap().last(), Some(&range));
}

#[test]
fn a_slab_outlives_its_arena() {
    let arena = arena(Bytes::gib(1));
    let slab = filled(&arena, MIB, 7);
    drop(arena);
    assert!(slab.filled().iter().all(|byte| *byte == 7));
}

#[test]
fn nothing_is_kept_while_others_need_memory() {
    let arena = arena(Bytes::gib(1));
    let slab = filled(&arena, MIB, 1);
    drop(filled(&arena, 2 * MIB, 1));
    assert_eq!(arena.set_pressed(true), Bytes::mib(2));
    drop(slab);
    assert_eq!(arena.view().warm, Bytes::ZERO);
    arena.set_pressed(false);
    drop(filled(&arena, MIB, 1));
    assert_eq!(arena.view().warm, Bytes::mib(1));
}

#[test]
fn more_than_the_machine_has_is_refused_before_it_is_touched() {
    let machine = Machine::here();
    let Some(host) = machine.memory() else {
        eprintln!("SKIPPED: no /proc/meminfo");
        return;
    };
    let arena = Arena::new(ArenaOptions {
        hugetlb: false,
        machine: Some(machine),
        ..ArenaOptions::default()
    });
    drop(arena.slab("fits", Bytes(1)).unwrap());
    match arena.slab("far too large", host.total) {
        Err(SlabError::NoRoom { bytes, room, .. }) => assert!(room < bytes),
        other => panic!("{other:?}"),
    }
    // What is promised to a slab that is still empty counts as gone.
    let half = Bytes(host.room().get() / 3 * 2);
    let first = arena.slab("first", half).unwrap();
    assert!(matches!(
        arena.slab("second", half),
        Err(SlabError::NoRoom { .. })
    ));
    drop(first);
}
