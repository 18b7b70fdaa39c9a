use super::populate::STRIDE;
use super::*;

#[test]
fn another_holder_is_noticed_however_it_holds() {
    let mapping = Mapping::create("test", 1 << 20, Pages::Small).unwrap();
    assert!(mapping.is_alone());
    let descriptor = mapping.share().unwrap();
    assert!(!mapping.is_alone(), "a descriptor is out");
    // SAFETY: a read-only mapping of a file of this length that cannot shrink, unmapped below.
    let mapped = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            1 << 20,
            ProtFlags::READ,
            MapFlags::SHARED,
            &descriptor,
            0,
        )
    }
    .unwrap();
    drop(descriptor);
    assert!(!mapping.is_alone(), "it is still mapped");
    // SAFETY: made above, and not used any more.
    unsafe { rustix::mm::munmap(mapped, 1 << 20) }.unwrap();
    assert!(mapping.is_alone());
}

#[test]
fn what_an_earlier_slab_left_is_gone_behind_the_next_ones_end() {
    let mut mapping = Mapping::create("test", 1 << 20, Pages::Small).unwrap();
    assert!(mapping.fit(1 << 20));
    // SAFETY: the whole mapping, which nobody else uses.
    unsafe { mapping.start().as_ptr().write_bytes(7, 1 << 20) };
    assert!(mapping.fit(10_000));
    assert_eq!(mapping.held(), Bytes(12_288));
    // SAFETY: as above.
    let seen = unsafe { std::slice::from_raw_parts(mapping.start().as_ptr(), 1 << 20) };
    assert!(seen[..10_000].iter().all(|byte| *byte == 7));
    assert!(seen[10_000..].iter().all(|byte| *byte == 0));
    assert!(!mapping.fit((1 << 20) + 1));
}

#[test]
fn memory_may_be_asked_for_from_a_node() {
    let create = || Mapping::create("test", 1 << 20, Pages::Small).unwrap();
    // Every machine has the first one, unless its kernel knows no nodes at all.
    let first = NumaNode::new(0).unwrap();
    match prefer(create().start, 1 << 20, first) {
        Ok(()) => {}
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOSYS), "{error}"),
    }
    let last = NumaNode::new(1023).unwrap();
    assert!(prefer(create().start, 1 << 20, last).is_err());
    // What the kernel refuses is memory from anywhere.
    let mut mapping = create().placed(Some(last));
    assert!(mapping.fit(1 << 20));
    assert_eq!(mapping.populate(1 << 20), Ok(()));
}

#[test]
fn the_end_of_a_slab_takes_no_more_than_it_needs() {
    let (huge, len) = (HUGE_PAGE as usize, 4 * HUGE_PAGE as usize);
    let mut mapping = Mapping::create("test", len, Pages::Collapsed).unwrap();
    let bytes = 3 * huge + 5000;
    assert!(mapping.fit(bytes));
    assert_eq!(mapping.populate(bytes), Ok(()));
    assert_eq!(mapping.held(), Bytes(3 * HUGE_PAGE + 8192));
    let blocks = std::fs::File::from(mapping.memfd().try_clone_to_owned().unwrap())
        .metadata()
        .map(|metadata| std::os::unix::fs::MetadataExt::blocks(&metadata) * 512)
        .unwrap();
    assert_eq!(Bytes(blocks), mapping.held(), "what the kernel counts");
}

#[test]
fn mappings_begin_on_a_border_of_huge_pages() {
    let mapping = Mapping::create("test", 3 << 20, Pages::Small).unwrap();
    assert_eq!(mapping.range().address % HUGE_PAGE as usize, 0);
}

#[test]
fn threads_share_the_work_on_one_mapping() {
    let len = 5 * STRIDE + 12_345;
    let mut mapping = Mapping::create("test", len, Pages::Small).unwrap();
    assert!(mapping.fit(len));
    std::thread::scope(|scope| {
        for to in [1, STRIDE, 2 * STRIDE + 1, len, len] {
            let mapping = &mapping;
            scope.spawn(move || {
                assert_eq!(mapping.populate(to), Ok(()));
                assert!(mapping.present() >= to);
            });
        }
    });
    assert_eq!(mapping.present(), mapping.wholly(len));
    // Less is needed, then more again: what was given back is made present anew.
    assert!(mapping.fit(STRIDE));
    assert_eq!(mapping.present(), STRIDE);
    assert!(mapping.fit(len));
    assert_eq!(mapping.populate(len), Ok(()));
    assert_eq!(mapping.held(), Bytes(mapping.present() as u64));
}

#[test]
fn memory_is_there_before_it_is_written_and_is_still_zero() {
    for pages in [Pages::Small, Pages::Collapsed, Pages::Transparent] {
        let len = 5 << 20;
        let mut mapping = Mapping::create("test", len, pages).unwrap();
        assert!(mapping.fit(len));
        assert_eq!(mapping.present(), 0);
        // Where the kernel has no huge pages, small ones do.
        assert_eq!(mapping.populate(1 << 20), Ok(()));
        assert_eq!(mapping.present(), len);
        // SAFETY: the whole mapping, which nobody else uses.
        let seen = unsafe { std::slice::from_raw_parts(mapping.start().as_ptr(), len) };
        assert!(seen.iter().all(|byte| *byte == 0));
    }
}
