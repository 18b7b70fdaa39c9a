//! One memfd and its mapping in this process: the memory behind a slab, used by one slab after another.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, PoisonError};

use rustix::fs::{FallocateFlags, MemfdFlags, Mode, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use serde::{Deserialize, Serialize};

use super::slab::SlabError;
use crate::machine::NumaNode;
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::units::{Bytes, MIB};

/// Bytes of a huge page on every machine that hotset runs on with 4 KiB base pages.
pub const HUGE_PAGE: u64 = 2 * MIB;

/// Bytes of an ordinary page.
const PAGE: u64 = 4096;

/// From this size on a slab lies on huge pages, where there are any: below, rounding up to them would cost more than an
/// eighth of the slab.
pub(super) const HUGE_FROM: u64 = 16 * MIB;

/// The pages that host memory lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pages {
    /// 2 MiB pages that the administrator reserved (`vm.nr_hugepages`).
    Hugetlb,
    /// 2 MiB pages where the kernel finds some, since it may give them to shared memory.
    Transparent,
    /// 2 MiB pages that the kernel makes of small ones when asked to (`MADV_COLLAPSE`), whatever is configured for shared
    /// memory; the rest behind the last whole one is on 4 KiB pages.
    Collapsed,
    /// 4 KiB pages.
    Small,
}

impl std::fmt::Display for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Hugetlb => "reserved 2 MiB",
            Self::Transparent => "2 MiB",
            Self::Collapsed => "collapsed 2 MiB",
            Self::Small => "4 KiB",
        })
    }
}

impl Pages {
    /// The unit in which memory is taken.
    pub(super) const fn granule(self) -> u64 {
        match self {
            Self::Hugetlb | Self::Transparent => HUGE_PAGE,
            Self::Collapsed | Self::Small => PAGE,
        }
    }

    /// What the kernel allows for shared memory without reserved pages.
    pub(super) fn of_shared_memory() -> Self {
        let read = |name: &str| {
            std::fs::read_to_string(format!("/sys/kernel/mm/transparent_hugepage/{name}"))
                .unwrap_or_default()
        };
        let allowed = Self::parse(
            &read("shmem_enabled"),
            &read("hugepages-2048kB/shmem_enabled"),
        );
        // Where pages are huge from the start there is nothing to collapse.
        if allowed == Self::Small && can_collapse() {
            Self::Collapsed
        } else {
            allowed
        }
    }

    /// The two texts are the setting for all sizes and the one for 2 MiB, which may defer to the first. The chosen word
    /// of each is in brackets.
    fn parse(overall: &str, huge: &str) -> Self {
        let chosen = |text: &str| -> Option<String> {
            let (_, rest) = text.split_once('[')?;
            Some(rest.split_once(']')?.0.to_owned())
        };
        let setting = match chosen(huge).as_deref() {
            None | Some("inherit") => chosen(overall),
            Some(own) => Some(own.to_owned()),
        };
        match setting.as_deref() {
            Some("always" | "within_size" | "advise" | "force") => Self::Transparent,
            _ => Self::Small,
        }
    }
}

/// `madvise(2)`, Linux 6.1 and later.
const MADV_COLLAPSE: libc::c_int = 25;

/// Bytes that one thread makes present at once: as many as make a call worth while, as few as let several threads share
/// the work on a slab that somebody waits for.
const STRIDE: usize = 16 << 20;

/// Whether the kernel makes huge pages of shared memory when asked to.
fn can_collapse() -> bool {
    let huge = HUGE_PAGE as usize;
    Mapping::create("hotset-probe", huge, Pages::Small).is_ok_and(|probe| {
        // SAFETY: a mapping of one huge page, on its border, that nobody else knows.
        unsafe {
            probe.start.as_ptr().write_volatile(0);
            libc::madvise(probe.start.as_ptr().cast(), huge, MADV_COLLAPSE) == 0
        }
    })
}

/// Tells one mapping from every other one of this process, for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MappingId(u64);

/// Somebody who has to know when host memory goes: a device that has it pinned.
pub trait MappingObserver: Send + Sync + std::fmt::Debug {
    /// The pages of the range are about to go, or to become others. Nobody uses its bytes now; who registered the range
    /// must undo that before this returns, or have the addresses withheld. Called once, from the thread that is about to change
    /// them.
    fn unmapping(&self, range: MappedRange) -> Unmapping;

    /// The addresses that were to be withheld, once the pages have gone.
    fn withheld(&self, mapping: MappingId, addresses: Arc<Addresses>);
}

/// What becomes of the addresses of memory that goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Unmapping {
    /// The kernel may give them to others.
    Free,
    /// A device has them registered still and can't undo it: nothing may lie there before it has forgotten them.
    Withhold,
}

/// Addresses of this process without memory, which nobody else gets as long as this lives.
#[derive(Debug)]
pub struct Addresses {
    start: NonNull<u8>,
    len: usize,
    counted: Option<Withheld>,
}

/// Bytes whose addresses are withheld. A device that has them registered keeps their memory as well, although nobody maps it.
#[derive(Clone, Debug, Default)]
pub(super) struct Withheld(Arc<AtomicU64>);

impl Withheld {
    pub(super) fn bytes(&self) -> Bytes {
        Bytes(self.0.load(Ordering::Relaxed))
    }
}

// SAFETY: nobody reads or writes through the pointer; it is only given back.
unsafe impl Send for Addresses {}
// SAFETY: as above.
unsafe impl Sync for Addresses {}

impl Drop for Addresses {
    fn drop(&mut self) {
        if let Some(Withheld(bytes)) = &self.counted {
            bytes.fetch_sub(self.len as u64, Ordering::Relaxed);
        }
        // SAFETY: made in `Mapping::drop` in the place of the mapping, and without access, so that nobody uses it.
        if let Err(error) = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) } {
            tracing::error!(%error, bytes = self.len, "munmap of withheld addresses failed");
        }
    }
}

/// Where the memory of a mapping lies in this process. It stays there until [`MappingObserver::unmapping`], however many
/// slabs use it one after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedRange {
    /// Which mapping.
    pub mapping: MappingId,
    /// The address of its first byte.
    pub address: usize,
    /// How long it is: the slab's bytes in whole pages.
    pub bytes: usize,
}

/// Who makes which part of a mapping present.
#[derive(Debug, Default)]
struct Populating {
    /// Everything below this is present, or somebody is at it.
    claimed: usize,
    /// Where the strides begin that somebody is at.
    under_way: Vec<usize>,
}

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

    /// Everything below this has memory behind it.
    pub(super) fn present(&self) -> usize {
        self.present.load(Ordering::Relaxed)
    }

    /// Everything below `bytes` was written, or made present.
    pub(super) fn is_present(&self, bytes: usize) {
        self.present.fetch_max(bytes, Ordering::Relaxed);
    }

    fn punch(&self, from: usize, to: usize) -> bool {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.memfd, hole, from as u64, (to - from) as u64)
            .inspect_err(|error| tracing::warn!(%error, from, to, "cannot give memory back"))
            .is_ok()
    }

    /// Puts memory behind everything below `to` now, so that who writes there later need not wait for it. Blocks. Several
    /// threads that ask share the work, and go ahead of what they were asked for meanwhile: who asks for some soon wants
    /// the rest.
    pub(super) fn populate(&self, to: usize) -> Result<(), Errno> {
        let most = self.touched.load(Ordering::Relaxed);
        let to = to.min(most);
        let mut populating = self.populating();
        loop {
            let present = self.present();
            if present >= to {
                return Ok(());
            }
            let from = populating.claimed.max(present);
            if from >= most {
                // Others are at the last of it.
                populating = self
                    .populated
                    .wait(populating)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let end = from.saturating_add(STRIDE).min(most);
            populating.claimed = end;
            populating.under_way.push(from);
            drop(populating);
            let done = self.populate_stride(from, end);
            populating = self.populating();
            populating.under_way.retain(|start| *start != from);
            if done.is_err() {
                // To be tried again by whoever asks next.
                populating.claimed = populating.claimed.min(from);
            }
            let first = populating.under_way.iter().copied().min();
            self.is_present(populating.claimed.min(first.unwrap_or(usize::MAX)));
            self.populated.notify_all();
            done?;
        }
    }

    fn populating(&self) -> MutexGuard<'_, Populating> {
        // Nothing under the lock can panic half-way through a change.
        self.populating
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn populate_stride(&self, from: usize, end: usize) -> Result<(), Errno> {
        let huge = HUGE_PAGE as usize;
        if self.pages == Pages::Collapsed {
            let whole = end.next_multiple_of(huge);
            let last = end == self.touched.load(Ordering::Relaxed);
            // What is sealed can take no hole.
            if last && whole <= self.len && !self.is_shared() {
                // The end of a slab as well, and what lies behind it goes back at once: the pages that stay are small again,
                // but lie in a row, and a disk is as fast into these as into a huge one.
                self.collapse(from.next_multiple_of(huge), whole);
                if end < whole {
                    self.punch(end, whole);
                }
            } else {
                self.collapse(from.next_multiple_of(huge), end / huge * huge);
            }
        }
        // SAFETY: the range is inside the mapping; the call makes pages present without changing what they hold.
        unsafe {
            rustix::mm::madvise(
                self.start.as_ptr().add(from).cast(),
                end - from,
                Advice::LinuxPopulateWrite,
            )
        }
    }

    /// Asks for huge pages behind a range that nobody has written yet. Where there are none, small ones come as they are
    /// needed.
    fn collapse(&self, from: usize, to: usize) {
        // The kernel collapses no hole, so there has to be something of each page.
        for page in (from..to).step_by(HUGE_PAGE as usize) {
            // SAFETY: a page inside the mapping; the call makes it present without changing what it holds.
            let touched = unsafe {
                rustix::mm::madvise(
                    self.start.as_ptr().add(page).cast(),
                    PAGE as usize,
                    Advice::LinuxPopulateRead,
                )
            };
            if let Err(error) = touched {
                tracing::debug!(%error, "no page for a slab");
                return;
            }
        }
        if from < to {
            // SAFETY: the range is inside the mapping; collapsing changes the pages, not what they hold.
            let failed = unsafe {
                libc::madvise(
                    self.start.as_ptr().add(from).cast(),
                    to - from,
                    MADV_COLLAPSE,
                )
            };
            if failed != 0 {
                let error = std::io::Error::last_os_error();
                tracing::debug!(%error, bytes = to - from, "no huge pages for a slab");
            }
        }
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
        if let Some(Withheld(bytes)) = &counted {
            bytes.fetch_add(self.len as u64, Ordering::Relaxed);
        }
        let addresses = Arc::new(Addresses {
            start: self.start,
            len: self.len,
            counted,
        });
        for observer in self.withholding.drain(..) {
            observer.withheld(self.id, addresses.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_word_on_huge_pages_is_read() {
        let overall = "always within_size advise [never] deny force\n";
        let advise = "always within_size [advise] never deny force\n";
        let inherit = "always [inherit] within_size advise never\n";
        let own = "always inherit within_size [advise] never\n";
        assert_eq!(Pages::parse(overall, inherit), Pages::Small);
        assert_eq!(Pages::parse(overall, own), Pages::Transparent);
        assert_eq!(Pages::parse(advise, inherit), Pages::Transparent);
        assert_eq!(Pages::parse(advise, ""), Pages::Transparent);
        assert_eq!(Pages::parse("", ""), Pages::Small);
    }

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
}
