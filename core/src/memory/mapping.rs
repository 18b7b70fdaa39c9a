//! One memfd and its mapping in this process: the memory behind a slab, used by one slab after another.

mod observe;
mod pages;
mod populate;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, PoisonError};

use rustix::fs::{FallocateFlags, MemfdFlags, Mode, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

pub(super) use self::observe::Withheld;
pub use self::observe::{Addresses, MappedRange, MappingId, MappingObserver, Unmapping};
pub(super) use self::pages::HUGE_FROM;
pub use self::pages::{HUGE_PAGE, Pages};
use self::populate::Populating;
use super::slab::SlabError;
use crate::machine::NumaNode;
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::units::Bytes;

/// A memfd, mapped. Unmapped and closed when dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    id: MappingId,
    start: NonNull<u8>,
    len: usize,
    pages: Pages,
    /// The node that its memory is to come from.
    near: Option<NumaNode>,
    memfd: OwnedFd,
    /// Nothing at or above this has memory behind it.
    touched: AtomicUsize,
    /// Everything below this has memory behind it.
    present: AtomicUsize,
    populating: Mutex<Populating>,
    /// A stride was made present, or could not be.
    populated: Condvar,
    /// A descriptor left this process's hands: from then on nobody can write through a new one.
    shared: AtomicBool,
    /// What was handed out last, to be handed out again: opening it by name costs ten times a duplicate.
    handed_out: Mutex<Option<OwnedFd>>,
    /// One for each device that has the memory pinned.
    observers: Mutex<Vec<Arc<dyn MappingObserver>>>,
    /// Those who want its addresses withheld.
    withholding: Vec<Arc<dyn MappingObserver>>,
    /// Where its bytes are counted while its addresses are withheld.
    counted: Option<Withheld>,
}

// SAFETY: the mapping is owned by this value for its whole life and is not tied to a thread; who may touch which bytes
// is the business of `Slab` and its writer.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// Mappings made in this process so far. Only used to tell them apart.
static MAPPINGS: AtomicU64 = AtomicU64::new(0);

impl Mapping {
    /// A new one of this many bytes, without memory yet, on pages of this kind. It never changes its length.
    pub(super) fn create(label: &str, len: usize, pages: Pages) -> Result<Self, SlabError> {
        let refused = |step| {
            move |error| SlabError::Allocate {
                bytes: Bytes(len as u64),
                step,
                error,
            }
        };
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        if pages == Pages::Hugetlb {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        // Weights are nothing to be executed; kernels before 6.3 do not know the flag.
        let memfd = rustix::fs::memfd_create(label, flags | MemfdFlags::NOEXEC_SEAL)
            .or_else(|_| rustix::fs::memfd_create(label, flags))
            .map_err(refused("memfd_create"))?;
        // What is handed out is opened for reading. Other users cannot open it anew.
        rustix::fs::fchmod(&memfd, Mode::RUSR | Mode::WUSR).map_err(refused("fchmod"))?;
        rustix::fs::ftruncate(&memfd, len as u64).map_err(refused("ftruncate"))?;
        // Sealed from the first byte on: nothing can pull pages away under a reader.
        rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW)
            .map_err(refused("seal"))?;
        let start = map(&memfd, len, pages).map_err(refused("mmap"))?;
        let mapping = Self {
            id: MappingId(MAPPINGS.fetch_add(1, Ordering::Relaxed)),
            start,
            len,
            pages,
            near: None,
            memfd,
            touched: AtomicUsize::new(0),
            present: AtomicUsize::new(0),
            populating: Mutex::default(),
            populated: Condvar::new(),
            shared: AtomicBool::new(false),
            handed_out: Mutex::default(),
            observers: Mutex::default(),
            withholding: Vec::new(),
            counted: None,
        };
        if pages == Pages::Transparent {
            mapping.advise(Advice::LinuxHugepage);
        }
        // A forked child needs none of it, and pages that a device has pinned must not be copied on write.
        mapping.advise(Advice::LinuxDontFork);
        Ok(mapping)
    }

    /// Memory of a server that is gone, which nobody can write any more: `len` bytes of it, mapped for reading. All of
    /// them are there.
    pub(super) fn adopted(memfd: OwnedFd, len: usize, pages: Pages) -> Result<Self, Errno> {
        // SAFETY: a fresh mapping at an address of the kernel's choice, of a file that is sealed against writing and shrinking.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ,
                MapFlags::SHARED,
                &memfd,
                0,
            )
        }?;
        let mapping = Self {
            id: MappingId(MAPPINGS.fetch_add(1, Ordering::Relaxed)),
            start: NonNull::new(start.cast()).ok_or(Errno::NOMEM)?,
            len,
            pages,
            near: None,
            memfd,
            touched: AtomicUsize::new(len),
            present: AtomicUsize::new(len),
            populating: Mutex::default(),
            populated: Condvar::new(),
            shared: AtomicBool::new(true),
            handed_out: Mutex::default(),
            observers: Mutex::default(),
            withholding: Vec::new(),
            counted: None,
        };
        mapping.advise(Advice::LinuxDontFork);
        Ok(mapping)
    }

    /// The same, counted here once its addresses are withheld.
    pub(super) fn counted(mut self, counted: &Withheld) -> Self {
        self.counted = Some(counted.clone());
        self
    }

    /// The same, with memory from this node as long as it has some.
    pub(super) fn placed(mut self, near: Option<NumaNode>) -> Self {
        self.near = near;
        if let Some(node) = near
            && let Err(error) = prefer(self.start, self.len, node)
        {
            tracing::debug!(%error, %node, "mbind");
        }
        self
    }

    /// The node that its memory is to come from.
    pub(super) const fn near(&self) -> Option<NumaNode> {
        self.near
    }

    /// Gives advice for the whole mapping; a kernel that knows it not goes without.
    fn advise(&self, advice: Advice) {
        let start = self.start.as_ptr().cast();
        // SAFETY: the range is this mapping, and none of the advice changes what it holds.
        let advised = unsafe { rustix::mm::madvise(start, self.len, advice) };
        if let Err(error) = advised {
            tracing::debug!(%error, ?advice, "madvise");
        }
    }

    pub(super) fn range(&self) -> MappedRange {
        MappedRange {
            mapping: self.id,
            address: self.start.as_ptr() as usize,
            bytes: match self.touched.load(Ordering::Relaxed) {
                // Made without a slab: nobody has been told how long one will be.
                0 => self.len,
                touched => touched,
            },
        }
    }

    /// Tells `observer` before the pages go.
    pub(super) fn observe(&self, observer: Arc<dyn MappingObserver>) {
        let observers = self.observers.lock();
        observers
            .unwrap_or_else(PoisonError::into_inner)
            .push(observer);
    }

    /// Tells all observers that the pages go. They are asked anew before anybody uses what comes. Gives whether something may
    /// come.
    fn tell(&mut self) -> bool {
        let range = self.range();
        let observers = self.observers.get_mut();
        for observer in observers.unwrap_or_else(PoisonError::into_inner).drain(..) {
            if observer.unmapping(range) == Unmapping::Withhold {
                self.withholding.push(observer);
            }
        }
        self.withholding.is_empty()
    }

    pub(super) const fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    pub(super) const fn pages(&self) -> Pages {
        self.pages
    }

    pub(super) fn memfd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }

    /// The memory that it takes, or will take once it is filled.
    pub(super) fn held(&self) -> Bytes {
        Bytes(match self.pages {
            // Reserved by the mapping, whether used or not.
            Pages::Hugetlb => self.len as u64,
            Pages::Transparent | Pages::Collapsed | Pages::Small => {
                self.touched.load(Ordering::Relaxed) as u64
            }
        })
    }

    /// The memory that a slab of `bytes` takes: whole pages.
    pub(super) fn wholly(&self, bytes: usize) -> usize {
        bytes
            .next_multiple_of(self.pages.granule() as usize)
            .min(self.len)
    }

    /// Whether descriptors of it were handed out.
    pub(super) fn is_shared(&self) -> bool {
        self.shared.load(Ordering::Acquire)
    }

    /// Whether a slab of `bytes` can lie here without holding more memory than it needs.
    pub(super) fn suits(&self, bytes: usize) -> bool {
        // Seals against writers forbid holes as well, so what lies behind the slab could not be given back.
        bytes <= self.len
            && (!self.is_shared() || self.touched.load(Ordering::Relaxed) <= self.wholly(bytes))
    }

    /// Makes ready for a slab of `bytes`: memory behind it goes back to the system, and what else an earlier slab left
    /// behind the new one's end is zeroed. `false` where that cannot be, and the mapping is of no use for this size.
    pub(super) fn fit(&mut self, bytes: usize) -> bool {
        let (kept, touched) = (self.wholly(bytes), self.touched.load(Ordering::Relaxed));
        if kept != touched {
            // A device that has pinned pages would go on with those that are punched out, and lacks those that come.
            self.tell();
        }
        if !self.withholding.is_empty() {
            return false;
        }
        if !self.suits(bytes) || (kept < touched && !self.punch(kept, touched)) {
            return false;
        }
        let stale = touched.min(kept);
        if bytes < stale {
            // SAFETY: `bytes..stale` is inside the mapping, and nobody else can see it: the mapping is owned mutably
            // here, so no slab has it.
            unsafe { self.start.as_ptr().add(bytes).write_bytes(0, stale - bytes) };
        }
        self.touched.store(kept, Ordering::Relaxed);
        let present = self.present.get_mut();
        *present = (*present).min(kept);
        let populating = self.populating.get_mut();
        populating.unwrap_or_else(PoisonError::into_inner).claimed = *present;
        true
    }

    fn punch(&self, from: usize, to: usize) -> bool {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.memfd, hole, from as u64, (to - from) as u64)
            .inspect_err(|error| tracing::warn!(%error, from, to, "cannot give memory back"))
            .is_ok()
    }

    /// A descriptor through which another process can map the bytes, but never write them. From the first one on, the
    /// kernel refuses every new writer.
    pub(super) fn share(&self) -> Result<OwnedFd, SlabError> {
        if !self.shared.swap(true, Ordering::AcqRel) {
            // Plain WRITE would fail with EBUSY while the owner's own writable mapping lives.
            // Not SEAL: the next server asks for WRITE, which the kernel grants once this process is gone (`frozen`).
            rustix::fs::fcntl_add_seals(&self.memfd, SealFlags::FUTURE_WRITE).map_err(|error| {
                SlabError::Seal {
                    bytes: Bytes(self.len as u64),
                    error,
                }
            })?;
        }
        let mut kept = self.handed_out();
        let descriptor = match &*kept {
            Some(descriptor) => descriptor,
            None => kept.insert(self.reopen().map_err(|error| SlabError::Reopen { error })?),
        };
        rustix::io::fcntl_dupfd_cloexec(descriptor, 0).map_err(|error| SlabError::Reopen { error })
    }

    fn handed_out(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.handed_out
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn reopen(&self) -> Result<OwnedFd, Errno> {
        File::open(format!("/proc/self/fd/{}", self.memfd.as_raw_fd()))
            .map(OwnedFd::from)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::NOENT))
    }

    /// Whether nobody else has a descriptor of it or maps it any more, in any process.
    ///
    /// The kernel grants a write lease (`fcntl(F_SETLEASE)`) on the only open description of a file alone, and a mapping
    /// keeps its description open. The memfd itself does not count, since it was not opened by name.
    pub(super) fn is_alone(&self) -> bool {
        if !self.is_shared() {
            return true;
        }
        // Our own one would count as a holder.
        drop(self.handed_out().take());
        let Ok(probe) = self.reopen() else {
            return false;
        };
        // SAFETY: the call takes a live descriptor and plain numbers. The lease ends with the descriptor, below.
        unsafe { libc::fcntl(probe.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) == 0 }
    }
}

/// Asks for memory from this node: `mbind(2)`, with the policy `MPOL_PREFERRED`, so that another node serves where this
/// one has none. It is kept with the memfd, for whoever touches a page first.
fn prefer(start: NonNull<u8>, len: usize, node: NumaNode) -> std::io::Result<()> {
    let mut mask = [0_u64; 16];
    if let Some(word) = mask.get_mut(usize::from(node.get() / 64)) {
        *word = 1 << (node.get() % 64);
    }
    // SAFETY: the range is a whole mapping of this process; the mask lives across the call and has as many bits as it says,
    // the last of which the kernel does not look at. No memory is read or written.
    let failed = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            start.as_ptr(),
            len,
            libc::MPOL_PREFERRED,
            mask.as_ptr(),
            mask.len() * 64 + 1,
            0,
        )
    };
    if failed == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// A fresh shared mapping, on a border of huge pages where it is long enough for one.
fn map(memfd: &OwnedFd, len: usize, pages: Pages) -> Result<NonNull<u8>, Errno> {
    let huge = HUGE_PAGE as usize;
    let aligned = pages != Pages::Hugetlb && len >= huge;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    if !aligned {
        // SAFETY: a fresh mapping at an address of the kernel's choice, of a memfd that nobody else knows yet and that
        // can no longer shrink.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                protection,
                MapFlags::SHARED,
                memfd,
                0,
            )
        }?;
        return NonNull::new(start.cast()).ok_or(Errno::NOMEM);
    }
    // Addresses with room for the border, then the mapping inside of them.
    // SAFETY: a fresh anonymous mapping without access, at an address of the kernel's choice.
    let room = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            len + huge,
            ProtFlags::empty(),
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }?;
    let before = (room as usize).next_multiple_of(huge) - room as usize;
    let start = room.cast::<u8>().wrapping_add(before);
    // SAFETY: replaces a part of the anonymous mapping made above, which nobody else knows. The rest of it, before and
    // behind, is unmapped; what fails there costs addresses only.
    let mapped = unsafe {
        let mapped = rustix::mm::mmap(
            start.cast(),
            len,
            protection,
            MapFlags::SHARED | MapFlags::FIXED,
            memfd,
            0,
        );
        if before > 0 {
            let _ = rustix::mm::munmap(room, before);
        }
        let _ = rustix::mm::munmap(start.wrapping_add(len).cast(), huge - before);
        if mapped.is_err() {
            let _ = rustix::mm::munmap(start.cast(), len);
        }
        mapped
    }?;
    NonNull::new(mapped.cast()).ok_or(Errno::NOMEM)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let at = self.start.as_ptr().cast();
        if self.tell() {
            // SAFETY: this is the mapping made in `create`; the slab that used it is gone, and with it every borrow.
            if let Err(error) = unsafe { rustix::mm::munmap(at, self.len) } {
                tracing::error!(%error, bytes = self.len, "munmap of a slab failed");
            }
            return;
        }
        // SAFETY: as above. Another mapping takes its place, without memory and without access.
        let replaced = unsafe {
            rustix::mm::mmap_anonymous(
                at,
                self.len,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
            )
        };
        if let Err(error) = replaced {
            // It stays as it is.
            tracing::error!(%error, bytes = self.len, "a slab that a device has registered cannot be unmapped");
            return;
        }
        let counted = self.counted.take();
        let held = self.held();
        if let Some(Withheld(bytes)) = &counted {
            bytes.fetch_add(held.get(), Ordering::Relaxed);
        }
        let addresses = Arc::new(Addresses {
            start: self.start,
            len: self.len,
            held,
            counted,
        });
        for observer in self.withholding.drain(..) {
            observer.withheld(self.id, addresses.clone());
        }
    }
}

#[cfg(test)]
mod tests;
