//! The same onto a GPU: from RAM beside raw copies out of pinned memory, and from disk beside the slower of disk and link.
//!
//! Everything is measured in turns in one run. What came is read back from the GPU and compared with the files.

use std::sync::Arc;

use hotset::core::device::cuda::{Cuda, PinnedCopy};
use hotset::core::device::layout::DeviceLayout;
use hotset::core::device::{FigureSource, Figures, Piece};
use hotset::core::memory::HostRange;
use hotset::{Bytes, ComponentSet, GpuIndex, Hotset, Lease, Session, Target, Tier};
use serde::Serialize;

use super::super::super::output::{self, line, table};
use super::super::super::{CliError, Global};
use super::compare::compare;
use super::files::{Library, Shape};
use super::floor::{self, Cost, Floor, median};
use super::{Figure, LoadArgs, Spread, bench_config, blocking, peers, print_peers, shapes};

/// Pinned memory of the raw copies: far more than what any cache holds.
const PINNED: Bytes = Bytes::mib(256);

/// What was measured. Rates in GB (10^9 bytes) each second, medians of the rounds; ratios are medians of the ratios of
/// each round.
#[derive(Debug, Serialize)]
struct Report {
    tier: Tier,
    device: String,
    uuid: String,
    /// Who told the figures of the GPU.
    source: Option<FigureSource>,
    /// PCIe generation and lanes: in use while copies ran, and the most there are.
    pcie: Option<(u32, u32)>,
    pcie_most: Option<(u32, u32)>,
    /// From the registered arena to memory that is allocated already: the first shape.
    upload_gbps: f64,
    /// Plain asynchronous copies out of pinned memory.
    raw_gbps: f64,
    /// The first over the second. Wanted: 0.95.
    upload_over_raw: f64,
    /// Cold, from disk to the leases.
    cold_gbps: f64,
    /// The disk alone: plain direct reads.
    disk_gbps: f64,
    /// The cold load over the slower of disk and link. Wanted: 0.90.
    cold_over_slower: f64,
    /// The Python loaders, on the first shape.
    peers: Vec<peers::Peer>,
    /// How files were read.
    reader: String,
    /// The pages that host memory was on.
    pages: String,
    shapes: Vec<ShapeReport>,
}

/// One shape.
#[derive(Debug, Serialize)]
struct ShapeReport {
    shape: Shape,
    files: usize,
    bytes: Bytes,
    /// Bytes that were read back from the GPU, and equal those of the files.
    compared: Bytes,
    /// The first load from RAM: host memory is registered on the way.
    first: Figure,
    /// From RAM to leases: plan, reservation, allocation, copies.
    from_ram: Figure,
    /// The copies alone, of the same bytes to the same places.
    upload: Figure,
    /// The same number of bytes out of pinned memory, in one piece.
    raw: Figure,
    /// From disk to leases.
    cold: Figure,
    /// The disk.
    disk: Figure,
    upload_over_raw: Spread,
    from_ram_over_raw: Spread,
    cold_over_slower: Spread,
    /// Leasing what is resident on the GPU, through a session, in microseconds: the median of a thousand.
    resident_lease_us: f64,
}

struct Bench<'a> {
    hotset: &'a Hotset,
    session: Session,
    library: &'a Library,
    tier: Tier,
    on_ram: ComponentSet,
    on_gpu: ComponentSet,
    raw: Arc<PinnedCopy>,
}

struct Measured {
    report: ShapeReport,
    device: String,
    uuid: String,
    figures: Option<Figures>,
    reader: String,
    pages: String,
}

pub(super) async fn run(args: &LoadArgs, global: &Global) -> Result<(), CliError> {
    // Said before anything is written to the disk.
    let cuda = Arc::new(blocking(|| Ok(Cuda::detect()?)).await?);
    let folder = args.folder.clone().unwrap_or_else(std::env::temp_dir);
    let (mut reports, mut peers, mut last) = (Vec::new(), Vec::new(), None);
    for shape in shapes(args) {
        let (size, within, file) = (args.size, folder.clone(), args.file.clone());
        output::note(global, format!("making {shape}"));
        let library =
            blocking(move || Library::make(shape, size, &within, file.as_deref())).await?;
        let measured = measure(&cuda, args, &library, global).await?;
        if reports.is_empty()
            && let Some(python) = &args.peers
        {
            output::note(global, "measuring the Python loaders".into());
            let (python, script) = (python.clone(), args.peers_script.clone());
            let (files, uuid) = (library.files.clone(), measured.uuid.clone());
            let place = cuda.gpus().iter().position(|gpu| gpu.uuid == uuid);
            let device = format!("cuda:{}", place.unwrap_or(0));
            peers =
                blocking(move || peers::measure(&python, &script, &files, Some(&device))).await?;
        }
        reports.push(measured.report);
        last = Some((
            measured.device,
            measured.uuid,
            measured.figures,
            measured.reader,
            measured.pages,
        ));
    }
    let (Some(first), Some((device, uuid, figures, reader, pages))) = (reports.first(), last)
    else {
        return Err(CliError::Usage("there is nothing to measure".into()));
    };
    let report = Report {
        tier: Tier::Vram(GpuIndex(args.gpu)),
        device,
        uuid,
        source: figures.as_ref().map(|figures| figures.source),
        pcie: figures.as_ref().and_then(|figures| figures.pcie),
        pcie_most: figures.as_ref().and_then(|figures| figures.pcie_most),
        upload_gbps: first.upload.gbps.median,
        raw_gbps: first.raw.gbps.median,
        upload_over_raw: first.upload_over_raw.median,
        cold_gbps: first.cold.gbps.median,
        disk_gbps: first.disk.gbps.median,
        cold_over_slower: first.cold_over_slower.median,
        peers,
        reader,
        pages,
        shapes: reports,
    };
    if global.json {
        return output::json(&report);
    }
    print(&report)
}

async fn measure(
    cuda: &Arc<Cuda>,
    args: &LoadArgs,
    library: &Library,
    global: &Global,
) -> Result<Measured, CliError> {
    let rounds = args.rounds;
    let mut config = bench_config(global, library)?;
    let bytes = library.bytes;
    // Room for what is loaded and for what its memory is rounded up to.
    config.ram.budget = Some(Bytes(bytes.get() + bytes.get() / 4 + (1 << 30)));
    config.catalog.roots = vec![library.root.clone()];
    let hotset = Hotset::builder().config(config).start().await?;
    let tier = Tier::Vram(GpuIndex(args.gpu));
    let status = hotset.status().await;
    let device = status.tiers.into_iter().find(|status| status.tier == tier);
    let device = device.and_then(|tier| tier.device);
    let device = device
        .filter(|device| device.driver == "cuda")
        .ok_or_else(|| {
            CliError::Usage(format!(
                "{tier} is no NVIDIA GPU that hotset uses here; `hotset status` lists them"
            ))
        })?;
    let gpu = cuda.gpus().iter().find(|gpu| gpu.uuid == device.uuid);
    let gpu = gpu
        .cloned()
        .ok_or_else(|| CliError::Usage(format!("the driver no longer lists {}", device.uuid)))?;
    let with = cuda.clone();
    let raw = blocking(move || Ok(PinnedCopy::new(&with, &gpu, PINNED.min(bytes))?)).await?;
    let set = ComponentSet::new(library.names.clone());
    let bench = Bench {
        session: hotset.session("bench").await?,
        on_ram: set.clone().on(Target::Ram),
        on_gpu: set.on(Target::Gpu(GpuIndex(args.gpu))),
        hotset: &hotset,
        library,
        tier,
        raw: Arc::new(raw),
    };

    output::note(
        global,
        "from RAM: the first load, read back and compared".into(),
    );
    let in_ram = bench.session.load(bench.on_ram.clone()).leases().await?;
    // A GPU that slept has to wake up, and no figure shall show that.
    bench.raw().await?;
    let (first, leases) = bench.load().await?;
    let compared = compare(library, &leases).await?;
    bench.drop_from(leases, tier).await?;
    let (mut from_ram, mut upload, mut raw) = (vec![], vec![], vec![]);
    let mut figures = None;
    for round in 0..rounds {
        output::note(global, format!("from RAM: round {} of {rounds}", round + 1));
        for turn in 0..2 {
            if (turn + round) % 2 == 0 {
                raw.push(bench.raw().await?);
                figures = bench.figures().await;
            } else {
                let (cost, leases) = bench.load().await?;
                from_ram.push(cost);
                upload.push(bench.copy(&in_ram, &leases).await?);
                bench.drop_from(leases, tier).await?;
            }
        }
    }
    bench.drop_from(in_ram, Tier::Ram).await?;

    let files = library.files.clone();
    let mut floor = blocking(move || Floor::new(files)).await?;
    let (mut cold, mut disk, mut slower) = (vec![], vec![], vec![]);
    for round in 0..rounds {
        output::note(
            global,
            format!("from disk: round {} of {rounds}", round + 1),
        );
        for turn in 0..2 {
            let files = library.files.clone();
            blocking(move || floor::drop_cached(&files)).await?;
            if (turn + round) % 2 == 0 {
                let cost;
                (floor, cost) = blocking(move || floor.direct()).await?;
                disk.push(cost);
                slower.push(cost.wall_s.max(bench.raw().await?.wall_s));
            } else {
                let (cost, leases) = bench.load().await?;
                cold.push(cost);
                bench.drop_from(leases, tier).await?;
                bench.drop_from(Vec::new(), Tier::Ram).await?;
            }
        }
    }
    drop(floor);
    let resident_lease_us = bench.lease_resident().await?;
    let ratios = |floor: &[f64], costs: &[Cost]| {
        let ratios: Vec<f64> = floor
            .iter()
            .zip(costs)
            .map(|(floor, cost)| floor / cost.wall_s)
            .collect();
        Spread::of(&ratios)
    };
    let raw_s: Vec<f64> = raw.iter().map(|cost| cost.wall_s).collect();
    let report = ShapeReport {
        shape: library.shape,
        files: library.files.len(),
        bytes,
        compared,
        first: Figure::of(&[first], bytes),
        from_ram: Figure::of(&from_ram, bytes),
        upload: Figure::of(&upload, bytes),
        raw: Figure::of(&raw, bytes),
        cold: Figure::of(&cold, bytes),
        disk: Figure::of(&disk, bytes),
        upload_over_raw: ratios(&raw_s, &upload),
        from_ram_over_raw: ratios(&raw_s, &from_ram),
        cold_over_slower: ratios(&slower, &cold),
        resident_lease_us,
    };
    let status = hotset.status().await;
    drop(bench);
    hotset.drain().await;
    Ok(Measured {
        report,
        device: device.name,
        uuid: device.uuid,
        figures,
        reader: status.reader,
        pages: status.arena.pages.to_string(),
    })
}

impl Bench<'_> {
    /// Loads everything onto the GPU from wherever it is.
    async fn load(&self) -> Result<(Cost, Vec<Lease>), CliError> {
        let began = Cost::begin();
        let leases = self.session.load(self.on_gpu.clone()).leases().await?;
        Ok((began.end(), leases))
    }

    /// Lets go of leases, and of what they held in a tier; ends when its memory is free.
    async fn drop_from(&self, leases: Vec<Lease>, tier: Tier) -> Result<(), CliError> {
        drop(leases);
        loop {
            let _ = self.hotset.optimise_cache(tier, 0.0).await?;
            let view = self.hotset.ledger().view(tier);
            if view.is_none_or(|view| view.committed.is_zero()) {
                return Ok(());
            }
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    }

    /// As many bytes as the files have, out of pinned memory.
    async fn raw(&self) -> Result<Cost, CliError> {
        let (raw, bytes) = (self.raw.clone(), self.library.bytes);
        blocking(move || {
            let began = Cost::begin();
            let took = raw.run(bytes)?;
            Ok(Cost {
                wall_s: took.as_secs_f64(),
                ..began.end()
            })
        })
        .await
    }

    /// The copies of a load alone: from the slabs to the same places once more.
    async fn copy(&self, in_ram: &[Lease], on_gpu: &[Lease]) -> Result<Cost, CliError> {
        let piece = self.hotset.config().load.piece.get();
        let mut batches = Vec::new();
        for lease in on_gpu {
            let content = &lease.component().content_id;
            let source = in_ram
                .iter()
                .find(|other| other.component().content_id == *content);
            let (Some(slab), Some(to)) = (source.and_then(Lease::slab), lease.allocation()) else {
                continue;
            };
            let table = source.map_or(lease.table(), Lease::table);
            let mut batch = Vec::new();
            for copy in DeviceLayout::new(table, piece).copies {
                let from = HostRange::new(slab.clone(), copy.from, copy.from + copy.bytes);
                batch.extend(from.map(|from| Piece { to: copy.to, from }));
            }
            batches.push((to, batch));
        }
        let began = Cost::begin();
        let uploads = batches
            .into_iter()
            .map(|(to, batch)| to.device().upload_all(to, batch));
        futures::future::try_join_all(uploads).await?;
        Ok(began.end())
    }

    /// The GPU's figures, right after a copy.
    async fn figures(&self) -> Option<Figures> {
        let status = self.hotset.status().await;
        let tier = status.tiers.into_iter().find(|tier| tier.tier == self.tier);
        tier.and_then(|tier| tier.figures)
    }

    /// The median time to lease one component that is resident on the GPU.
    async fn lease_resident(&self) -> Result<f64, CliError> {
        const TIMES: usize = 1000;
        let one = ComponentSet {
            names: self.on_gpu.names.iter().take(1).cloned().collect(),
            ..self.on_gpu.clone()
        };
        let held = self.session.load(one.clone()).leases().await?;
        let mut times = Vec::with_capacity(TIMES);
        for _ in 0..TIMES {
            let began = std::time::Instant::now();
            let leases = self.session.load(one.clone()).leases().await?;
            times.push(began.elapsed().as_secs_f64() * 1e6);
            drop(leases);
        }
        self.drop_from(held, self.tier).await?;
        Ok(median(&times))
    }
}

fn print(report: &Report) -> Result<(), CliError> {
    let pcie = |link: Option<(u32, u32)>| {
        link.map_or_else(
            || "unknown".into(),
            |(generation, lanes)| format!("{generation} x{lanes}"),
        )
    };
    line(format!(
        "{}: {} ({}); PCIe {} of {}; reader: {}; host memory on {} pages",
        report.tier,
        report.device,
        report.uuid,
        pcie(report.pcie),
        pcie(report.pcie_most),
        report.reader,
        report.pages
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
        let of = |ratio: &Spread, what: &str| {
            format!(
                "{:.3} x {what} ({:.3} to {:.3})",
                ratio.median, ratio.lowest, ratio.highest
            )
        };
        row(
            format!(
                "{} ({}, {} files)\n  upload from the arena",
                shape.shape, shape.bytes, shape.files
            ),
            &shape.upload,
            of(&shape.upload_over_raw, "the raw copy"),
        );
        row(
            "  raw copy from pinned memory".into(),
            &shape.raw,
            String::new(),
        );
        row(
            "  load from RAM, plan to leases".into(),
            &shape.from_ram,
            of(&shape.from_ram_over_raw, "the raw copy"),
        );
        row(
            "  first load, host memory is registered".into(),
            &shape.first,
            String::new(),
        );
        row(
            "  cold, disk to leases".into(),
            &shape.cold,
            of(&shape.cold_over_slower, "the slower of disk and link"),
        );
        row("  the disk itself".into(), &shape.disk, String::new());
    }
    line(rows.to_string())?;
    for shape in &report.shapes {
        line(format!(
            "{}: {} read back and equal to the files; leasing what is resident: {:.1} us",
            shape.shape, shape.compared, shape.resident_lease_us
        ))?;
    }
    print_peers(&report.peers)
}
