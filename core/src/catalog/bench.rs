//! Measuring the catalogue on a library of sparse files, with the floor of the same machine beside each figure.

mod library;

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Instant;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::SeedableRng;
use rayon::prelude::*;
use serde::Serialize;

use super::query::Query;
use super::scan::{ScanOptions, ScanReport, rescan, scan};
use super::store::{Store, StoreError};
use super::walk::{Start, walk};
use crate::ids::ModelName;

/// How many times each scan is measured; the median is reported.
const RUNS: usize = 3;

/// How many files appear one after the other to measure events.
const EVENTS: u64 = 100;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// Files in the library.
    pub files: u64,
    /// Where the library is made; it is removed at the end.
    pub folder: PathBuf,
    /// Threads; 0 means one for each core.
    pub threads: usize,
    /// Seed of the library.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            files: 50_000,
            folder: std::env::temp_dir(),
            threads: 0,
            seed: 1,
        }
    }
}

/// What was measured. Times are medians with the page cache warm.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// Files in the library.
    pub files: u64,
    /// Entries of the catalogue.
    pub entries: u64,
    /// Threads that were used.
    pub threads: usize,
    /// Bytes of all headers.
    pub header_bytes: u64,
    /// A scan that knows nothing.
    pub cold_s: f64,
    /// The same walk with one `open` and one `pread` of each header, and nothing else.
    pub floor_s: f64,
    /// `cold_s` over `floor_s`.
    pub cold_over_floor: f64,
    /// Opening the store, loading the catalogue and looking at every file.
    pub restart_s: f64,
    /// A scan of what has not changed.
    pub refresh_s: f64,
    /// The walk alone: listing the folders and one `stat` of each file.
    pub walk_s: f64,
    /// From a new file at rest to the catalogue that has it, without the settling time.
    pub event_ms_p50: f64,
    /// The same, the slowest of a hundred.
    pub event_ms_p99: f64,
    /// One lookup by name.
    pub lookup_ns: f64,
    /// A ranked query of three words.
    pub query_ms: f64,
    /// A query that falls back to fuzzy matching.
    pub fuzzy_ms: f64,
    /// Growth of resident memory for each entry when the catalogue is loaded from the store, names and paths included.
    pub bytes_per_entry: f64,
    /// Bytes of names and paths for each entry.
    pub name_bytes_per_entry: f64,
    /// The most memory that the process had.
    pub peak_rss_bytes: u64,
    /// How many entries have a kind.
    pub identified: u64,
}

/// A measurement that could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// The library cannot be made or read.
    #[error("the library for the measurement: {0}")]
    Io(#[from] io::Error),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Threads cannot be had.
    #[error("threads for the measurement: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

/// Makes the library, measures, removes it.
///
/// # Errors
/// What could not be made.
pub fn run(options: &Options) -> Result<Report, BenchError> {
    let name = format!("hotset-bench-{}", std::process::id());
    let folder = options.folder.join(name);
    std::fs::create_dir_all(&folder)?;
    let folder = std::fs::canonicalize(folder)?;
    let measured = measure(options, &folder);
    std::fs::remove_dir_all(&folder)?;
    measured
}

fn measure(options: &Options, folder: &std::path::Path) -> Result<Report, BenchError> {
    let root = folder.join("models");
    std::fs::create_dir_all(&root)?;
    let made = library::make(&root, options.files, options.seed)?;
    let mut scan_options = ScanOptions::new(vec![root.clone()]);
    scan_options.threads = options.threads;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads)
        .build()?;
    let header_bytes = made.iter().map(|file| file.header_bytes).sum();
    let lengths: HashMap<OsString, u64> = made
        .iter()
        .map(|file| (file.path.clone().into_os_string(), file.header_bytes))
        .collect();
    drop(made);
    let start = Start {
        path: root.clone(),
        root: 0,
        depth: 16,
        recursive: true,
    };
    let starts = [start];
    let quiet = |_| {};
    let fresh = || scan(&scan_options, None, &quiet);
    // The first pass warms the page cache for both.
    fresh();
    let mut colds = Vec::new();
    let mut floors = Vec::new();
    let mut walks = Vec::new();
    for _ in 0..RUNS {
        floors.push(timed(|| pool.install(|| floor(&starts, &lengths))).0);
        colds.push(timed(fresh).0);
        walks.push(timed(|| pool.install(|| walk(&starts, 16, &|_| {}))).0);
    }
    let report: ScanReport = fresh();
    let catalogue = report.catalogue;
    let refreshes: Vec<f64> = (0..RUNS)
        .map(|_| timed(|| scan(&scan_options, Some(&catalogue), &quiet)).0)
        .collect();
    let state = folder.join("catalogue.sqlite");
    Store::open(&state)?.save(&catalogue)?;
    let name_bytes: usize = catalogue
        .models()
        .map(|m| m.name.as_str().len() + m.path.as_os_str().len())
        .sum();
    let identified = catalogue
        .models()
        .filter(|m| m.kind != super::Kind::Unknown)
        .count() as u64;
    let entries = catalogue.len() as u64;
    let (lookup_ns, query_ms, fuzzy_ms) = reads(&catalogue);
    drop(catalogue);
    let mut restarts = Vec::new();
    let mut loaded = None;
    for _ in 0..RUNS {
        drop(loaded.take());
        let began = Instant::now();
        let previous = Store::open(&state)?.load()?;
        loaded = Some(scan(&scan_options, Some(&previous), &quiet).catalogue);
        restarts.push(began.elapsed().as_secs_f64());
    }
    drop(loaded);
    let bytes_per_entry = loaded_bytes(&state)? / entries.max(1) as f64;
    let (p50, p99) = events(&scan_options, &root)?;
    let (cold_s, floor_s) = (median(colds), median(floors));
    Ok(Report {
        files: options.files,
        entries,
        threads: pool.current_num_threads(),
        header_bytes,
        cold_s,
        floor_s,
        cold_over_floor: cold_s / floor_s,
        restart_s: median(restarts),
        refresh_s: median(refreshes),
        walk_s: median(walks),
        event_ms_p50: p50,
        event_ms_p99: p99,
        lookup_ns,
        query_ms,
        fuzzy_ms,
        bytes_per_entry,
        name_bytes_per_entry: name_bytes as f64 / entries.max(1) as f64,
        peak_rss_bytes: status_bytes("VmHWM:"),
        identified,
    })
}

fn timed<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let began = Instant::now();
    let value = work();
    (began.elapsed().as_secs_f64(), value)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The walk, and every header read once into a buffer that each thread keeps.
fn floor(starts: &[Start], lengths: &HashMap<OsString, u64>) -> u64 {
    let (folders, _) = walk(starts, 16, &|_| {});
    let files: Vec<PathBuf> = folders
        .iter()
        .flat_map(|folder| folder.files.iter().map(|file| folder.path.join(&file.name)))
        .collect();
    files
        .par_iter()
        .map_init(Vec::new, |buffer, path| {
            let length = lengths.get(path.as_os_str()).copied().unwrap_or(0);
            buffer.resize((length as usize).max(buffer.len()), 0);
            let read = File::open(path)
                .and_then(|file| file.read_at(&mut buffer[..length as usize], 0))
                .unwrap_or(0);
            read as u64
        })
        .sum()
}

fn reads(catalogue: &super::Catalogue) -> (f64, f64, f64) {
    let names: Vec<ModelName> = catalogue.models().map(|m| m.name.clone()).collect();
    let (lookups, _) = timed(|| names.iter().filter(|n| catalogue.get(n).is_some()).count());
    let query = |text: &str| {
        let query = Query::parse(text).unwrap_or_default();
        // The first search makes the haystacks.
        let _ = catalogue.search(&query, 20);
        let times = (0..9).map(|_| timed(|| catalogue.search(&query, 20)).0);
        median(times.collect()) * 1e3
    };
    (
        lookups * 1e9 / names.len().max(1) as f64,
        query("sdxl lora fp16"),
        query("sxlora 4242"),
    )
}

/// How much memory the catalogue takes when it is loaded.
fn loaded_bytes(state: &std::path::Path) -> Result<f64, BenchError> {
    // A first load grows the heap to what it needs; the figure is what the catalogue itself then holds.
    let before = status_bytes("VmRSS:");
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(Store::open(state)?.load()?);
    }
    let after = status_bytes("VmRSS:");
    // The first copies may fill memory that was freed before; so this is a mean and errs low. Four copies bound that.
    Ok(after.saturating_sub(before) as f64 / held.len() as f64)
}

fn events(options: &ScanOptions, root: &std::path::Path) -> Result<(f64, f64), BenchError> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(99);
    let mut catalogue = scan(options, None, &|_| {}).catalogue;
    let mut times = Vec::new();
    for i in 0..EVENTS {
        let made = library::one(&root.join("folder-0000"), 10_000_000 + i, &mut rng)?;
        let (time, report) = timed(|| rescan(options, &catalogue, &[made.path], &|_| {}));
        catalogue = report.catalogue;
        times.push(time * 1e3);
    }
    times.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let index = ((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1));
        times.get(index).copied().unwrap_or(f64::NAN)
    };
    Ok((at(0.5), at(0.99)))
}

/// A figure of `/proc/self/status` in bytes; 0 where there is none.
fn status_bytes(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_library_is_measured_and_known_for_what_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let report = run(&Options {
            files: 60,
            folder: folder.path().to_path_buf(),
            ..Options::default()
        })
        .unwrap();
        assert_eq!((report.entries, report.identified), (60, 60));
        assert!(report.floor_s > 0.0 && report.refresh_s > 0.0);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
