//! What the machine gives: plain reads of the same files, and the cost of a stretch of work.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use hotset::Bytes;
use hotset::core::io::{cached_share, drop_from_cache};
use hotset::core::memory::{Arena, ArenaOptions, Slab, SlabWriter};

use crate::cli::CliError;

/// Bytes of one plain read: as large as the loader's own.
const PIECE: usize = 8 << 20;
/// Plain reads that are under way at the same time.
const DEPTH: usize = 4;
/// A file counts as out of the page cache up to this share: its header is read by whoever opens it.
const COLD: f64 = 0.02;
const PAGE: usize = 4096;
/// Bytes that are read into fresh memory at most.
const FRESH: Bytes = Bytes::gib(1);

/// Time and CPU time of a stretch of work.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cost {
    pub(super) wall_s: f64,
    pub(super) cpu_s: f64,
}

/// The start of a stretch of work.
pub(super) struct Began {
    at: Instant,
    cpu_s: f64,
}

impl Cost {
    pub(super) fn begin() -> Began {
        Began {
            at: Instant::now(),
            cpu_s: cpu_s(),
        }
    }
}

impl Began {
    pub(super) fn end(&self) -> Cost {
        Cost {
            wall_s: self.at.elapsed().as_secs_f64(),
            cpu_s: cpu_s() - self.cpu_s,
        }
    }
}

/// CPU seconds of all threads of this process so far, those of the kernel on its behalf among them.
fn cpu_s() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Behind the name, which is in parentheses and may hold anything.
    let fields: Vec<&str> = text
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace().collect())
        .unwrap_or_default();
    // utime and stime are the fields 14 and 15, and the first two are gone.
    let ticks = |i: usize| {
        fields
            .get(i)
            .and_then(|n| n.parse::<f64>().ok())
            .unwrap_or(0.0)
    };
    // The kernel counts for users in hundredths, whatever it does inside.
    (ticks(11) + ticks(12)) / 100.0
}

fn status_field(name: &str) -> Bytes {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|line| line.trim_start_matches(':').trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok());
    Bytes::kib(kib.unwrap_or(0))
}

/// Forgets the peak of resident memory; gives what is resident now.
pub(super) fn resident_peak_reset() -> Bytes {
    // Where the kernel refuses, the peak is that of the whole run, which is no less.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    status_field("VmRSS")
}

/// The most memory that was resident since.
pub(super) fn resident_peak() -> Bytes {
    status_field("VmHWM")
}

fn failed(path: &Path) -> impl Fn(std::io::Error) -> CliError + '_ {
    move |source| CliError::File {
        path: path.to_owned(),
        source,
    }
}

/// Takes the files out of the page cache, and makes sure that they are.
pub(super) fn drop_cached(files: &[PathBuf]) -> Result<(), CliError> {
    for path in files {
        let file = File::open(path).map_err(failed(path))?;
        drop_from_cache(&file).map_err(failed(path))?;
        if let Some(share) = cached_share(&file)
            && share > COLD
        {
            return Err(CliError::Usage(format!(
                "{} does not leave the page cache ({:.0} % are there); give --folder on a disk",
                path.display(),
                share * 100.0
            )));
        }
    }
    Ok(())
}

/// Brings the files into the page cache.
pub(super) fn warm(files: &[PathBuf]) -> Result<(), CliError> {
    let mut buffer = vec![0; PIECE];
    for path in files {
        let file = File::open(path).map_err(failed(path))?;
        let mut at = 0;
        loop {
            match file.read_at(&mut buffer, at).map_err(failed(path))? {
                0 => break,
                read => at += read as u64,
            }
        }
    }
    Ok(())
}

/// A part of a file and where it goes.
struct Part<'a> {
    file: &'a File,
    path: &'a Path,
    offset: u64,
    into: &'a mut [u8],
}

/// Plain reads into memory that is there, of the same kind as the loader's.
pub(super) struct Floor {
    files: Vec<PathBuf>,
    memory: SlabWriter,
    _arena: Arena,
}

impl Floor {
    /// Memory for all files, touched.
    pub(super) fn new(files: Vec<PathBuf>) -> Result<Self, CliError> {
        let arena = Arena::new(ArenaOptions::default());
        let room = room(&files)?;
        // On the pages that the loader's memory is on: the disk is slower into scattered small ones.
        arena.prewarm(room, &|| true).map_err(no_memory)?;
        let memory = arena.slab("floor", room).map_err(no_memory)?;
        Ok(Self {
            files,
            memory,
            _arena: arena,
        })
    }

    /// Past the page cache.
    pub(super) fn direct(mut self) -> Result<(Self, Cost), CliError> {
        let cost = read_direct(&self.files, self.memory.spare())?;
        Ok((self, cost))
    }

    /// From the page cache, by one thread.
    pub(super) fn cached(mut self) -> Result<(Self, Cost), CliError> {
        let began = Cost::begin();
        let mut rest = self.memory.spare();
        for path in &self.files {
            let file = File::open(path).map_err(failed(path))?;
            let mut at = 0;
            loop {
                let now = rest.len().min(PIECE);
                match file.read_at(&mut rest[..now], at).map_err(failed(path))? {
                    0 => break,
                    read => {
                        rest = rest.split_at_mut(read).1;
                        at += read as u64;
                    }
                }
            }
        }
        Ok((self, began.end()))
    }
}

/// Direct reads into fresh memory on ordinary pages that another process could map.
///
/// Of no more than the first GiB, since it takes long; gives how much that was. The files are out of the page cache.
pub(super) fn fresh(files: &[PathBuf]) -> Result<(Cost, Bytes), CliError> {
    let room = room(files)?.min(FRESH);
    let mut memory = Slab::create("fresh", room).map_err(no_memory)?;
    Ok((read_direct(files, memory.spare())?, room))
}

fn no_memory(error: hotset::core::memory::SlabError) -> CliError {
    CliError::Usage(error.to_string())
}

/// What the files take, each on a border of pages.
fn room(files: &[PathBuf]) -> Result<Bytes, CliError> {
    let mut room = Bytes::ZERO;
    for path in files {
        let bytes = path.metadata().map_err(failed(path))?.len();
        room += Bytes(bytes).round_up(PAGE as u64);
    }
    Ok(room)
}

/// Reads all files past the page cache, a few pieces at a time.
fn read_direct(files: &[PathBuf], mut memory: &mut [u8]) -> Result<Cost, CliError> {
    let began = Cost::begin();
    let mut opened = Vec::new();
    for path in files {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)
            .map_err(|source| {
                CliError::Usage(format!(
                    "{}: no direct reads on this file system ({source}); give --folder on a disk",
                    path.display()
                ))
            })?;
        let bytes = file.metadata().map_err(failed(path))?.len();
        opened.push((file, path.as_path(), bytes));
    }
    let mut parts = Vec::new();
    for (file, path, bytes) in &opened {
        let mut offset = 0;
        while offset < *bytes && !memory.is_empty() {
            let len = usize::try_from(*bytes - offset)
                .unwrap_or(PIECE)
                .min(PIECE)
                .next_multiple_of(PAGE)
                .min(memory.len());
            let (into, rest) = memory.split_at_mut(len);
            memory = rest;
            parts.push(Part {
                file,
                path,
                offset,
                into,
            });
            offset += len as u64;
        }
    }
    // The first part is at the end, for threads to take from there.
    parts.reverse();
    let parts = std::sync::Mutex::new(parts);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..DEPTH)
            .map(|_| {
                scope.spawn(|| {
                    loop {
                        let part = parts
                            .lock()
                            .unwrap_or_else(std::sync::PoisonError::into_inner)
                            .pop();
                        let Some(part) = part else {
                            return Ok::<(), CliError>(());
                        };
                        let mut done = 0;
                        while done < part.into.len() {
                            let at = part.offset + done as u64;
                            match part
                                .file
                                .read_at(&mut part.into[done..], at)
                                .map_err(failed(part.path))?
                            {
                                0 => break,
                                read => done += read,
                            }
                        }
                    }
                })
            })
            .collect();
        for reader in readers {
            reader
                .join()
                .map_err(|_| CliError::Usage("a reader of the floor failed".into()))??;
        }
        Ok::<(), CliError>(())
    })?;
    Ok(began.end())
}

/// The middle of the values, or the mean of the two in the middle.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (
        sorted.get(middle),
        middle.checked_sub(1).and_then(|i| sorted.get(i)),
    ) {
        (Some(value), Some(below)) if sorted.len().is_multiple_of(2) => (value + below) / 2.0,
        (Some(value), _) => *value,
        (None, _) => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_is_the_middle() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((median(&[4.0, 1.0]) - 2.5).abs() < f64::EPSILON);
        assert!(median(&[]).abs() < f64::EPSILON);
    }
}
