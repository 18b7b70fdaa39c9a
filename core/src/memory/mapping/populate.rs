//! Memory behind a mapping before anybody writes there, by several threads, on huge pages where the kernel makes some.

use std::sync::{MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::mm::Advice;

use super::Mapping;
use super::pages::{HUGE_PAGE, PAGE, Pages};
use crate::sync::atomic::Ordering;

/// `madvise(2)`, Linux 6.1 and later.
const MADV_COLLAPSE: libc::c_int = 25;

/// Bytes that one thread makes present at once: as many as make a call worth while, as few as let several threads share
/// the work on a slab that somebody waits for.
pub(super) const STRIDE: usize = 16 << 20;

/// Whether the kernel makes huge pages of shared memory when asked to.
pub(super) fn can_collapse() -> bool {
    let huge = HUGE_PAGE as usize;
    Mapping::create("hotset-probe", huge, Pages::Small).is_ok_and(|probe| {
        // SAFETY: a mapping of one huge page, on its border, that nobody else knows.
        unsafe {
            probe.start.as_ptr().write_volatile(0);
            libc::madvise(probe.start.as_ptr().cast(), huge, MADV_COLLAPSE) == 0
        }
    })
}

/// Who makes which part of a mapping present.
#[derive(Debug, Default)]
pub(super) struct Populating {
    /// Everything below this is present, or somebody is at it.
    pub(super) claimed: usize,
    /// Where the strides begin that somebody is at.
    under_way: Vec<usize>,
}

impl Mapping {
    /// Everything below this has memory behind it.
    pub(in crate::memory) fn present(&self) -> usize {
        self.present.load(Ordering::Relaxed)
    }

    /// Everything below `bytes` was written, or made present.
    pub(in crate::memory) fn is_present(&self, bytes: usize) {
        self.present.fetch_max(bytes, Ordering::Relaxed);
    }

    /// Puts memory behind everything below `to` now, so that who writes there later need not wait for it. Blocks. Several
    /// threads that ask share the work, and go ahead of what they were asked for meanwhile: who asks for some soon wants
    /// the rest.
    pub(in crate::memory) fn populate(&self, to: usize) -> Result<(), Errno> {
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
}
