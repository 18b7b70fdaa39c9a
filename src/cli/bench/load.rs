//! `hotset bench load`: how fast weights come from disk into leased memory, with the disk's own speed beside it; `vram` does
//! the same for a GPU.
//!
//! Every load goes the whole way, through a session to its leases, and ends with the bytes in memory. What is loaded is
//! evicted again, so that each load reads; its memory stays warm, as it does in a system that runs.

mod compare;
mod demand;
mod files;
mod floor;
mod peers;
mod vram;

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use hotset::{Bytes, ComponentSet, Config, Hotset, Lease, Session, Target, Tier};
use serde::Serialize;

use super::super::output::{self, line, table};
use super::super::{CliError, Global, config};
use files::{Library, Shape};
use floor::{Cost, Floor, median};

/// Where to load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum BenchTier {
    /// Into host memory
    Ram,
    /// Onto a GPU
    Vram,
}

/// How to measure loading.
#[derive(Debug, Clone, Args)]
pub(crate) struct LoadArgs {
    /// Where to load
    #[arg(long, value_enum, default_value_t = BenchTier::Ram)]
    tier: BenchTier,
    /// Which GPU, as hotset counts them
    #[arg(long, default_value_t = 0)]
    gpu: u32,
    /// Bytes that each shape has in all
    #[arg(long, default_value = "4GiB", value_name = "SIZE")]
    size: Bytes,
    /// What to load: one file, 40 shards of one model, or 300 LoRAs; may be repeated
    #[arg(long, value_enum, default_values_t = [Shape::One])]
    shape: Vec<Shape>,
    /// All three shapes
    #[arg(long, conflicts_with = "shape")]
    all: bool,
    /// Safetensors file to load instead of made-up ones; it is only read
    #[arg(long, value_name = "FILE", conflicts_with_all = ["shape", "all", "size"])]
    file: Option<PathBuf>,
    /// Rounds of each measurement, taken in turns with the floor
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Folder for the files, which are removed at the end [default: the system's temporary folder]
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
    /// Measure how long a demand waits while as much as this is queued as prefetches, instead
    #[arg(long, value_name = "SIZE", num_args = 0..=1, default_missing_value = "20GB", conflicts_with_all = ["shape", "all", "file", "peers"])]
    behind_prefetch: Option<Bytes>,
    /// Measure the Python loaders that are installed as well, with this interpreter
    #[arg(long, value_name = "PYTHON", num_args = 0..=1, default_missing_value = "python3")]
    peers: Option<PathBuf>,
    /// Script that measures them
    #[arg(long, value_name = "FILE", default_value = "benches/peers/load.py")]
    peers_script: PathBuf,
}

/// What was measured. Rates in GB (10^9 bytes) each second, medians of the rounds; ratios are medians of the ratios of
/// each round, since a shared disk changes its speed between rounds.
#[derive(Debug, Serialize)]
struct Report {
    /// Cold, from disk into warm memory: the first shape.
    load_gbps: f64,
    /// The floor beside it: plain direct reads of the same files into memory that is there.
    raw_gbps: f64,
    /// The first over the second.
    ratio: f64,
    /// CPU seconds for each GB of such a load, all threads, user and system.
    cpu_s_per_gb: f64,
    /// The Python loaders, on the first shape.
    peers: Vec<peers::Peer>,
    /// How files were read.
    reader: String,
    /// The pages that the memory was on.
    pages: String,
    /// Each shape.
    shapes: Vec<ShapeReport>,
    /// Leasing what is resident, through a session, in microseconds: the median of a thousand.
    resident_lease_us: f64,
}

/// One shape.
#[derive(Debug, Serialize)]
struct ShapeReport {
    shape: Shape,
    files: usize,
    bytes: Bytes,
    /// The very first load after a start: memory is found on the way.
    first: Figure,
    /// From disk into warm memory.
    cold: Figure,
    /// From the page cache into warm memory.
    cached: Figure,
    /// The disk.
    raw: Figure,
    /// The page cache: plain reads of one thread into memory that is there.
    raw_cached: Figure,
    /// Direct reads into fresh memory on 4 KiB pages that can be shared.
    raw_fresh: Figure,
    /// Cold load over the disk, round by round.
    cold_over_raw: Spread,
    /// First load over direct reads into fresh memory.
    first_over_fresh: f64,
    /// The most memory that the process held while it loaded, beside the bytes themselves.
    peak_beside: Bytes,
}

/// A rate with its cost.
#[derive(Debug, Clone, Copy, Serialize)]
struct Figure {
    gbps: Spread,
    cpu_s_per_gb: f64,
}

/// A median with what lies around it.
#[derive(Debug, Clone, Copy, Serialize)]
struct Spread {
    median: f64,
    lowest: f64,
    highest: f64,
}

impl Spread {
    fn of(values: &[f64]) -> Self {
        Self {
            median: median(values),
            lowest: values.iter().copied().fold(f64::INFINITY, f64::min),
            highest: values.iter().copied().fold(0.0, f64::max),
        }
    }
}

impl Figure {
    fn of(costs: &[Cost], bytes: Bytes) -> Self {
        let gb = bytes.as_f64() / 1e9;
        let rates: Vec<f64> = costs.iter().map(|cost| gb / cost.wall_s).collect();
        let cpu: Vec<f64> = costs.iter().map(|cost| cost.cpu_s / gb).collect();
        Self {
            gbps: Spread::of(&rates),
            cpu_s_per_gb: median(&cpu),
        }
    }
}

/// Runs the measurement.
pub(crate) async fn run(args: &LoadArgs, global: &Global) -> Result<(), CliError> {
    match args.tier {
        BenchTier::Ram => ram(args, global).await,
        BenchTier::Vram => vram::run(args, global).await,
    }
}

/// The shapes that were asked for.
fn shapes(args: &LoadArgs) -> Vec<Shape> {
    match (&args.file, args.all) {
        (Some(_), _) => vec![Shape::Given],
        (None, true) => vec![Shape::One, Shape::Shards, Shape::Loras],
        (None, false) => args.shape.clone(),
    }
}

async fn ram(args: &LoadArgs, global: &Global) -> Result<(), CliError> {
    if let Some(queued) = args.behind_prefetch {
        let report = demand::measure(args, queued, global).await?;
        return if global.json {
            output::json(&report)
        } else {
            report.print()
        };
    }
    let folder = args.folder.clone().unwrap_or_else(std::env::temp_dir);
    let mut reports = Vec::new();
    let mut peers = Vec::new();
    let mut last = None;
    for shape in shapes(args) {
        let (size, within, file) = (args.size, folder.clone(), args.file.clone());
        output::note(global, format!("making {shape}"));
        let library =
            blocking(move || Library::make(shape, size, &within, file.as_deref())).await?;
        let measured = measure(&library, args.rounds, global).await?;
        if reports.is_empty()
            && let Some(python) = &args.peers
        {
            output::note(global, "measuring the Python loaders".into());
            let (python, script) = (python.clone(), args.peers_script.clone());
            let files = library.files.clone();
            peers = blocking(move || peers::measure(&python, &script, &files, None)).await?;
        }
        reports.push(measured.report);
        last = Some((measured.reader, measured.pages, measured.resident_lease_us));
    }
    let (Some(first), Some((reader, pages, resident_lease_us))) = (reports.first(), last) else {
        return Err(CliError::Usage("there is nothing to measure".into()));
    };
    let report = Report {
        load_gbps: first.cold.gbps.median,
        raw_gbps: first.raw.gbps.median,
        ratio: first.cold_over_raw.median,
        cpu_s_per_gb: first.cold.cpu_s_per_gb,
        peers,
        reader,
        pages,
        shapes: reports,
        resident_lease_us,
    };
    if global.json {
        return output::json(&report);
    }
    print(&report)
}

struct Measured {
    report: ShapeReport,
    reader: String,
    pages: String,
    resident_lease_us: f64,
}

/// Runs on a thread where blocking is allowed.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CliError> + Send + 'static,
) -> Result<T, CliError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| CliError::Usage(format!("the measurement failed: {error}")))?
}

/// Takes the library out of the page cache.
async fn drop_cached(library: &Library) -> Result<(), CliError> {
    let files = library.files.clone();
    blocking(move || floor::drop_cached(&files)).await
}

/// First loads of systems that have just started, and what fresh memory costs beside them.
struct Firsts {
    loads: Vec<Cost>,
    fresh: Vec<Cost>,
    fresh_bytes: Bytes,
    peak_beside: Bytes,
}

/// Measures the first load of as many systems, in turns with plain reads into fresh memory.
async fn firsts(
    library: &Library,
    config: &Config,
    rounds: u32,
    global: &Global,
) -> Result<Firsts, CliError> {
    output::note(global, "first loads".into());
    // A virtual machine's host takes back what its guest has freed for a second or two, and giving it again would be all
    // that is measured: so as much as is needed is held, and freed just before.
    let hold = || {
        let files = library.files.clone();
        blocking(move || Floor::new(files))
    };
    let mut firsts = Firsts {
        loads: Vec::new(),
        fresh: Vec::new(),
        fresh_bytes: Bytes::ZERO,
        peak_beside: Bytes::ZERO,
    };
    for _ in 0..rounds {
        let hotset = Hotset::builder().config(config.clone()).start().await?;
        let bench = Bench::new(&hotset, library).await?;
        drop_cached(library).await?;
        drop(hold().await?);
        let before = floor::resident_peak_reset();
        firsts.loads.push(bench.load().await?);
        let beside = floor::resident_peak()
            .saturating_sub(before)
            .saturating_sub(library.bytes);
        firsts.peak_beside = firsts.peak_beside.max(beside);
        drop(bench);
        hotset.drain().await;
        drop_cached(library).await?;
        drop(hold().await?);
        let files = library.files.clone();
        let (cost, bytes) = blocking(move || floor::fresh(&files)).await?;
        firsts.fresh.push(cost);
        firsts.fresh_bytes = bytes;
    }
    Ok(firsts)
}

impl Firsts {
    /// The rate of first loads over that of plain reads into fresh memory.
    fn ratio(&self, bytes: Bytes) -> f64 {
        let share = bytes.as_f64() / self.fresh_bytes.as_f64().max(1.0);
        let ratios: Vec<f64> = self
            .loads
            .iter()
            .zip(&self.fresh)
            .map(|(load, fresh)| share * fresh.wall_s / load.wall_s)
            .collect();
        median(&ratios)
    }
}

async fn measure(library: &Library, rounds: u32, global: &Global) -> Result<Measured, CliError> {
    let mut config = bench_config(global, library)?;
    config.gpu.clear();
    config.cuda.detect = false;
    let bytes = library.bytes;
    // Room for what is loaded and for what its memory is rounded up to.
    config.ram.budget = Some(Bytes(bytes.get() + bytes.get() / 4 + (1 << 30)));
    config.catalog.roots = vec![library.root.clone()];
    let firsts = firsts(library, &config, rounds, global).await?;
    let hotset = Hotset::builder().config(config).start().await?;
    let bench = Bench::new(&hotset, library).await?;
    // Memory becomes warm, as it is in a system that runs.
    drop_cached(library).await?;
    bench.load().await?;

    let files = library.files.clone();
    let mut floor = blocking(move || Floor::new(files)).await?;
    let (mut cold, mut raw, mut cached, mut raw_cached) = (vec![], vec![], vec![], vec![]);
    for round in 0..rounds {
        output::note(global, format!("round {} of {rounds}", round + 1));
        // In turns, and in another order each time: a disk that slows down is then nobody's fault.
        for turn in 0..2 {
            drop_cached(library).await?;
            if (turn + round) % 2 == 0 {
                let cost;
                (floor, cost) = blocking(move || floor.direct()).await?;
                raw.push(cost);
            } else {
                cold.push(bench.load().await?);
            }
        }
    }
    bench.warm().await?;
    for _ in 0..rounds {
        cached.push(bench.load().await?);
        let cost;
        (floor, cost) = blocking(move || floor.cached()).await?;
        raw_cached.push(cost);
    }
    drop(floor);
    let resident_lease_us = bench.lease_resident().await?;
    let ratios: Vec<f64> = cold
        .iter()
        .zip(&raw)
        .map(|(load, raw)| raw.wall_s / load.wall_s)
        .collect();
    let report = ShapeReport {
        shape: library.shape,
        files: library.files.len(),
        bytes,
        first: Figure::of(&firsts.loads, bytes),
        cold: Figure::of(&cold, bytes),
        cached: Figure::of(&cached, bytes),
        raw: Figure::of(&raw, bytes),
        raw_cached: Figure::of(&raw_cached, bytes),
        raw_fresh: Figure::of(&firsts.fresh, firsts.fresh_bytes),
        cold_over_raw: Spread::of(&ratios),
        first_over_fresh: firsts.ratio(bytes),
        peak_beside: firsts.peak_beside,
    };
    let status = hotset.status().await;
    drop(bench);
    hotset.drain().await;
    Ok(Measured {
        report,
        reader: status.reader,
        pages: status.arena.pages.to_string(),
        resident_lease_us,
    })
}

/// The configuration in force, with nothing in the background that would disturb.
fn bench_config(global: &Global, library: &Library) -> Result<Config, CliError> {
    let mut config = config(global)?;
    config.catalog.watch = false;
    config.catalog.database = None;
    config.catalog.digest_rate = Bytes::ZERO;
    config.catalog.settle = std::time::Duration::ZERO;
    config.ram.high_watermark = 1.0;
    config.ram.low_watermark = 1.0;
    config.predict.enabled = false;
    if library.shape == Shape::Loras {
        // A set that large is asked for at once.
        config.load.concurrency = config.load.concurrency.max(8);
    }
    Ok(config)
}

struct Bench<'a> {
    hotset: &'a Hotset,
    session: Session,
    set: ComponentSet,
    library: &'a Library,
}

impl<'a> Bench<'a> {
    async fn new(hotset: &'a Hotset, library: &'a Library) -> Result<Self, CliError> {
        Ok(Self {
            session: hotset.session("bench").await?,
            set: ComponentSet::new(library.names.clone()).on(Target::Ram),
            hotset,
            library,
        })
    }

    /// Loads everything, and evicts it again.
    async fn load(&self) -> Result<Cost, CliError> {
        let began = Cost::begin();
        let leases = self.session.load(self.set.clone()).leases().await?;
        let cost = began.end();
        let there: Bytes = leases
            .iter()
            .filter_map(Lease::slab)
            .map(|slab| slab.bytes())
            .sum();
        if there < self.library.bytes {
            return Err(CliError::Usage(format!(
                "only {there} of {} came; other models lie beside the file",
                self.library.bytes
            )));
        }
        drop(leases);
        self.evict().await?;
        Ok(cost)
    }

    async fn evict(&self) -> Result<(), CliError> {
        loop {
            let _ = self.hotset.optimise_cache(Tier::Ram, 0.0).await?;
            let ram = self.hotset.ledger().sums(Tier::Ram);
            if ram.is_none_or(|ram| ram.committed.is_zero()) {
                return Ok(());
            }
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    }

    /// Brings the files into the page cache.
    async fn warm(&self) -> Result<(), CliError> {
        let files = self.library.files.clone();
        blocking(move || floor::warm(&files)).await
    }

    /// The median time to lease one component that is resident.
    async fn lease_resident(&self) -> Result<f64, CliError> {
        const TIMES: usize = 1000;
        let Some(name) = self.library.names.first() else {
            return Ok(0.0);
        };
        let one = ComponentSet::new([name.clone()]).on(Target::Ram);
        let held = self.session.load(one.clone()).leases().await?;
        let mut times = Vec::with_capacity(TIMES);
        for _ in 0..TIMES {
            let began = Instant::now();
            let leases = self.session.load(one.clone()).leases().await?;
            times.push(began.elapsed().as_secs_f64() * 1e6);
            drop(leases);
        }
        drop(held);
        self.evict().await?;
        Ok(median(&times))
    }
}

fn print(report: &Report) -> Result<(), CliError> {
    line(format!(
        "reader: {}; memory on {} pages",
        report.reader, report.pages
    ))?;
    let mut rows = table(
        &["what", "GB/s", "lowest to highest", "CPU s/GB", "beside it"],
        &["GB/s", "CPU s/GB"],
    );
    for shape in &report.shapes {
        let mut row = |what: String, figure: &Figure, beside: String| {
            rows.add_row([
                what,
                format!("{:.2}", figure.gbps.median),
                format!("{:.2} to {:.2}", figure.gbps.lowest, figure.gbps.highest),
                format!("{:.3}", figure.cpu_s_per_gb),
                beside,
            ]);
        };
        let what = format!("{} ({}, {} files)", shape.shape, shape.bytes, shape.files);
        let ratio = &shape.cold_over_raw;
        row(
            format!("{what}\n  cold"),
            &shape.cold,
            format!(
                "{:.2} x the disk ({:.2} to {:.2})",
                ratio.median, ratio.lowest, ratio.highest
            ),
        );
        row("  the disk itself".into(), &shape.raw, String::new());
        row(
            "  first load, memory still to be found".into(),
            &shape.first,
            format!(
                "{:.2} x plain reads into fresh memory",
                shape.first_over_fresh
            ),
        );
        row(
            "  plain reads into fresh 4 KiB pages".into(),
            &shape.raw_fresh,
            String::new(),
        );
        row(
            "  from the page cache".into(),
            &shape.cached,
            format!("memory beside the bytes at most {}", shape.peak_beside),
        );
        row(
            "  plain buffered reads, one thread".into(),
            &shape.raw_cached,
            String::new(),
        );
    }
    line(rows.to_string())?;
    line(format!(
        "leasing what is resident: {:.1} us",
        report.resident_lease_us
    ))?;
    print_peers(&report.peers)
}

fn print_peers(peers: &[peers::Peer]) -> Result<(), CliError> {
    if !peers.is_empty() {
        let mut rows = table(
            &["Python loader", "cold GB/s", "cached GB/s", ""],
            &["cold GB/s", "cached GB/s"],
        );
        let rate = |rate: Option<f64>| rate.map_or_else(|| "-".into(), |rate| format!("{rate:.2}"));
        for peer in peers {
            rows.add_row([
                format!(
                    "{} {}",
                    peer.name,
                    peer.version.as_deref().unwrap_or_default()
                ),
                rate(peer.cold_gbps),
                rate(peer.cached_gbps),
                peer.skipped.clone().unwrap_or_default(),
            ]);
        }
        line(rows.to_string())?;
    }
    Ok(())
}
