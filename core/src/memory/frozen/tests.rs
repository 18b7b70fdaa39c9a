use super::*;
use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

const LEN: usize = 1 << 16;

fn sealed(flags: MemfdFlags, more: SealFlags) -> OwnedFd {
    let memfd = rustix::fs::memfd_create("test", flags | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&memfd, LEN as u64).unwrap();
    rustix::io::pwrite(&memfd, &vec![7; LEN], 0).unwrap();
    let seals = SealFlags::SHRINK | SealFlags::GROW | more;
    rustix::fs::fcntl_add_seals(&memfd, seals).unwrap();
    memfd
}

fn read_only(memfd: impl AsFd) -> OwnedFd {
    let named = format!("/proc/self/fd/{}", memfd.as_fd().as_raw_fd());
    File::open(named).unwrap().into()
}

fn freeze(descriptor: OwnedFd, bytes: usize) -> Result<FrozenSlab, FrozenError> {
    OfferedMemory::new(descriptor)?.freeze(Bytes(bytes as u64))
}

/// A writable mapping of a memfd, such as a client could have kept to change the bytes after they were looked at.
struct Writer(*mut std::ffi::c_void);

impl Writer {
    fn new(memfd: impl AsFd) -> Self {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping of a file of this length, unmapped in `drop`.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                LEN,
                protection,
                MapFlags::SHARED,
                memfd,
                0,
            )
        };
        Self(start.unwrap())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // SAFETY: made in `new`, and not used any more.
        unsafe { rustix::mm::munmap(self.0, LEN) }.unwrap();
    }
}

#[test]
fn the_slab_of_a_server_that_is_gone_is_taken_and_a_living_ones_is_not() {
    let mut writer = Slab::create("test", Bytes(10_000)).unwrap();
    writer.spare().fill(9);
    writer.advance(10_000);
    let slab = writer.seal().unwrap();
    let offered = OfferedMemory::new(slab.read_only_descriptor().unwrap()).unwrap();
    assert_eq!(offered.held(), slab.held());
    let error = offered.freeze(Bytes(10_000)).unwrap_err();
    assert_eq!(error, FrozenError::Writable(Errno::BUSY));
    assert!(error.is_passing());
    // A client's own mapping is no hindrance.
    let kept = slab.read_only_descriptor().unwrap();
    drop(slab);
    let frozen = offered.freeze(Bytes(10_000)).unwrap();
    assert!(frozen.as_slice().iter().all(|byte| *byte == 9));
    let again = OfferedMemory::new(kept).unwrap();
    assert_eq!(again.identity(), offered.identity());
    let slab = frozen.accept();
    assert_eq!(
        (slab.bytes(), slab.held()),
        (Bytes(10_000), Bytes(12_288)),
        "whole pages"
    );
    // It is shared as any slab is, and can be taken once more by the server after this one.
    drop(slab.read_only_descriptor().unwrap());
    assert_eq!(
        again.freeze(Bytes(10_000)).unwrap().as_slice(),
        slab.filled()
    );
}

#[test]
fn who_may_still_write_cannot_offer() {
    let memfd = sealed(MemfdFlags::CLOEXEC, SealFlags::empty());
    let writer = Writer::new(&memfd);
    rustix::fs::fcntl_add_seals(&memfd, SealFlags::FUTURE_WRITE).unwrap();
    let busy = freeze(read_only(&memfd), LEN).unwrap_err();
    assert_eq!(busy, FrozenError::Writable(Errno::BUSY));
    // Nor by the seal that brings the one we ask for with it.
    if rustix::fs::fcntl_add_seals(&memfd, SealFlags::from_bits_retain(0x20)).is_ok() {
        let refused = freeze(read_only(&memfd), LEN).unwrap_err();
        assert!(matches!(refused, FrozenError::Writable(_)), "{refused}");
    }
    drop(writer);
    // Nor where no seal can be added any more, so that nothing can be shown.
    let last = SealFlags::FUTURE_WRITE | SealFlags::SEAL;
    let memfd = sealed(MemfdFlags::CLOEXEC, last);
    let refused = freeze(memfd, LEN).unwrap_err();
    assert_eq!(refused, FrozenError::Writable(Errno::PERM));
}

#[test]
fn what_is_no_slab_is_refused() {
    let unsealed = sealed(MemfdFlags::CLOEXEC, SealFlags::empty());
    assert_eq!(freeze(unsealed, LEN).unwrap_err(), FrozenError::NoSlab);
    let file = OwnedFd::from(File::open("/proc/self/exe").unwrap());
    assert_eq!(freeze(file, 1).unwrap_err(), FrozenError::NoSlab);
    let short = sealed(MemfdFlags::CLOEXEC, SealFlags::FUTURE_WRITE);
    assert!(matches!(
        freeze(short, LEN + 1).unwrap_err(),
        FrozenError::Short { .. }
    ));
    // Reading a hole takes memory, which there may be none of.
    let memfd = rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&memfd, LEN as u64).unwrap();
    rustix::io::pwrite(&memfd, &[1; 100], 0).unwrap();
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE;
    rustix::fs::fcntl_add_seals(&memfd, seals).unwrap();
    assert_eq!(freeze(memfd, LEN).unwrap_err(), FrozenError::Hole);
}
