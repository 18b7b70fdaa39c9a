//! A file that is open for reading past the page cache and through it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::OFlags;

use super::ReadError;
use super::image::check_identity;
use crate::catalog::{IMAGE_ALIGN, SourceFile};

/// Reads at an offset; what is in the way between the reader and a file, for tests.
pub(super) trait ReadAt: Send + Sync {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize>;
}

impl ReadAt for File {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, into, offset)
    }
}

/// See the module's page.
pub(super) struct Opened {
    pub(super) source: SourceFile,
    file: File,
    /// The same file with `O_DIRECT`. `None` where its file system has none.
    direct: Option<File>,
    /// The file system took `O_DIRECT` and then refused the read.
    refuses_direct: AtomicBool,
    /// Reads through the page cache in the place of `file`.
    double: Option<Box<dyn ReadAt>>,
}

impl Opened {
    /// Opens `file` once more, past the page cache, if that is wanted.
    pub(super) fn new(source: SourceFile, file: File, direct: bool) -> Self {
        let direct = direct.then(|| reopen_direct(&file)).and_then(|opened| {
            opened
                .inspect_err(|error| {
                    tracing::debug!(path = %source.path.display(), %error, "no O_DIRECT");
                })
                .ok()
        });
        Self {
            source,
            file,
            direct,
            refuses_direct: AtomicBool::new(false),
            double: None,
        }
    }

    #[cfg(test)]
    pub(super) fn with_double(source: SourceFile, file: File, double: Box<dyn ReadAt>) -> Self {
        Self {
            double: Some(double),
            ..Self::new(source, file, false)
        }
    }

    /// The descriptor for direct reads, while they work.
    pub(super) fn direct(&self) -> Option<&File> {
        self.direct
            .as_ref()
            .filter(|_| !self.refuses_direct.load(Ordering::Relaxed))
    }

    /// The same as a number, for the kernel.
    pub(super) fn direct_fd(&self) -> Option<RawFd> {
        self.direct().map(AsRawFd::as_raw_fd)
    }

    /// Direct reads of this file do not work after all.
    pub(super) fn give_up_direct(&self) {
        self.refuses_direct.store(true, Ordering::Relaxed);
    }

    pub(super) fn buffered(&self) -> &dyn ReadAt {
        match &self.double {
            Some(double) => &**double,
            None => &self.file,
        }
    }

    /// Whether the file is still as it was scanned.
    pub(super) fn check(&self, when: &'static str) -> Result<(), ReadError> {
        check_identity(&self.file, &self.source, when)
    }

    /// The share of these bytes, 0 to 1, that is in the page cache. Costs microseconds and reads nothing. `None` where the
    /// kernel does not tell.
    pub(super) fn cached_share(&self, offset: u64, bytes: u64) -> Option<f64> {
        let pages = bytes.div_ceil(IMAGE_ALIGN).max(1);
        let cached =
            cachestat(&self.file, offset, bytes).or_else(|| mincore(&self.file, offset, bytes))?;
        Some(cached as f64 / pages as f64)
    }
}

/// The share of a file, 0 to 1, that is in the page cache. `None` where the kernel does not tell. For measurements.
#[must_use]
pub fn cached_share(file: &File) -> Option<f64> {
    let bytes = file.metadata().ok()?.len();
    let cached = cachestat(file, 0, bytes).or_else(|| mincore(file, 0, bytes))?;
    Some(cached as f64 / bytes.div_ceil(IMAGE_ALIGN).max(1) as f64)
}

fn reopen_direct(file: &File) -> io::Result<File> {
    // By its descriptor, so that it is this file and not what has its name by now.
    OpenOptions::new()
        .read(true)
        .custom_flags((OFlags::DIRECT | OFlags::NONBLOCK).bits().cast_signed())
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Pages of a range that are in the page cache, by `cachestat(2)`: Linux 6.5 and later.
fn cachestat(file: &File, offset: u64, bytes: u64) -> Option<u64> {
    /// `cachestat(2)` has one number on every architecture.
    const SYS_CACHESTAT: libc::c_long = 451;
    #[repr(C)]
    struct Range {
        offset: u64,
        bytes: u64,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Stat {
        cached: u64,
        dirty: u64,
        writeback: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    let range = Range { offset, bytes };
    let mut stat = Stat::default();
    // SAFETY: both structs are laid out as the kernel's and live across the call; the descriptor is open.
    let failed = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            &raw const range,
            &raw mut stat,
            0,
        )
    };
    (failed == 0).then_some(stat.cached)
}

/// The same by `mincore(2)`, which every kernel has. It says "all of it" of files that the caller could not write.
fn mincore(file: &File, offset: u64, bytes: u64) -> Option<u64> {
    use rustix::mm::{MapFlags, ProtFlags};
    let start = offset / IMAGE_ALIGN * IMAGE_ALIGN;
    let len = usize::try_from(offset + bytes - start).ok()?;
    let mut pages = vec![0_u8; len.div_ceil(IMAGE_ALIGN as usize)];
    // SAFETY: a fresh mapping at an address of the kernel's choice that is never read through, so that a truncated file
    // does no harm; `pages` has a byte for each of its pages; unmapped before it is forgotten.
    let told = unsafe {
        let mapped = rustix::mm::mmap(
            std::ptr::null_mut(),
            len,
            ProtFlags::READ,
            MapFlags::SHARED,
            file,
            start,
        )
        .ok()?;
        let told = libc::mincore(mapped, len, pages.as_mut_ptr()) == 0;
        let _ = rustix::mm::munmap(mapped, len);
        told
    };
    told.then(|| pages.iter().filter(|page| **page & 1 == 1).count() as u64)
}

/// Asks the kernel to drop a file from the page cache; what is dirty is written first. For measurements.
///
/// # Errors
/// What the system said.
pub fn drop_from_cache(file: &File) -> io::Result<()> {
    file.sync_data()?;
    Ok(rustix::fs::fadvise(
        file,
        0,
        None,
        rustix::fs::Advice::DontNeed,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_asking_agree_on_what_is_cached() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let file = File::open(&path).unwrap();
        let ask = || {
            let by_map = mincore(&file, 0, 1 << 20).unwrap();
            if let Some(pages) = cachestat(&file, 0, 1 << 20) {
                assert_eq!(pages, by_map);
            }
            by_map
        };
        assert_eq!(ask(), 256, "it was just written");
        drop_from_cache(&file).unwrap();
        let pages = ask();
        // Something else may read the folder meanwhile; a file system in memory keeps all.
        assert!(pages == 0 || pages == 256, "{pages}");
    }
}
