//! How long a demand waits at a disk that is busy with prefetches.

use std::sync::Arc;
use std::time::Duration;

use hotset::core::catalog::Component;
use hotset::core::io::{DiskReader, ReadError, Reader, Urgency};
use hotset::core::memory::{Arena, ArenaOptions};
use hotset::{Bytes, Hotset};
use serde::Serialize;
use tokio::task::AbortHandle;

use super::files::{Library, Shape};
use super::{Bench, Cost, LoadArgs, Spread, bench_config, blocking, drop_cached, median};
use crate::cli::output::{self, line, table};
use crate::cli::{CliError, Global};

/// Bytes that are demanded: a fifth of a second of a fast disk.
const DEMAND: Bytes = Bytes::mib(700);
/// Memory that a prefetch is read into, over and over.
const STAGE: Bytes = Bytes::mib(64);
/// Prefetches are under way for this long before the demand comes.
const LEAD: Duration = Duration::from_millis(300);

/// A demand alone, and the same demand while prefetches are queued. Times in milliseconds.
#[derive(Debug, Serialize)]
pub(super) struct DemandReport {
    /// What is demanded.
    bytes: Bytes,
    /// What is queued as a prefetch.
    queued: Bytes,
    /// Its load, cold, with an idle disk.
    alone_ms: Spread,
    /// The same behind the prefetches.
    behind_ms: Spread,
    /// The median of the differences in each round.
    waits_ms: f64,
    /// What one piece takes at the rate of the load alone.
    piece_ms: f64,
}

impl DemandReport {
    pub(super) fn print(&self) -> Result<(), CliError> {
        let mut rows = table(&["what", "ms", "lowest to highest"], &["ms"]);
        let mut row = |what: String, spread: &Spread| {
            rows.add_row([
                what,
                format!("{:.1}", spread.median),
                format!("{:.1} to {:.1}", spread.lowest, spread.highest),
            ]);
        };
        row(format!("{} on demand, alone", self.bytes), &self.alone_ms);
        row(
            format!("  behind {} of prefetch", self.queued),
            &self.behind_ms,
        );
        line(rows.to_string())?;
        line(format!(
            "waits {:.1} ms; a piece takes {:.1} ms",
            self.waits_ms, self.piece_ms
        ))
    }
}

/// Measures it in turns.
pub(super) async fn measure(
    args: &LoadArgs,
    queued: Bytes,
    global: &Global,
) -> Result<DemandReport, CliError> {
    let folder = args.folder.clone().unwrap_or_else(std::env::temp_dir);
    let (size, rounds) = (args.size.min(queued), args.rounds);
    output::note(
        global,
        "making what is prefetched and what is demanded".into(),
    );
    let (library, other) = blocking(move || {
        let library = Library::make(Shape::One, DEMAND, &folder, None)?;
        let other = Library::make(Shape::Prefetch, size, &folder, None)?;
        Ok((library, other))
    })
    .await?;
    let mut config = bench_config(global, &library)?;
    config.gpu.clear();
    config.cuda.detect = false;
    config.ram.budget = Some(Bytes(2 * DEMAND.get()));
    config.catalog.roots = vec![library.root.clone(), other.root.clone()];
    let piece = config.load.piece;
    let reader: Arc<dyn Reader> = Arc::new(
        DiskReader::start(&config.load).map_err(|error| CliError::Usage(error.to_string()))?,
    );
    let builder = Hotset::builder().config(config).reader(reader.clone());
    let hotset = builder.start().await?;
    let guessed = hotset
        .catalogue()
        .models()
        .find(|model| other.names.iter().any(|name| model.name.as_str() == name))
        .and_then(|model| model.components.first().cloned())
        .ok_or_else(|| {
            CliError::Usage("what was to be prefetched is not in the catalogue".into())
        })?;
    let bench = Bench::new(&hotset, &library).await?;
    drop_cached(&library).await?;
    // Memory becomes warm.
    bench.load().await?;
    let (mut alone, mut behind) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        output::note(global, format!("round {} of {rounds}", round + 1));
        drop_cached(&library).await?;
        alone.push(bench.load().await?);
        drop_cached(&library).await?;
        drop_cached(&other).await?;
        let guesses: Vec<Guess> = (0..queued.get().div_ceil(other.bytes.get().max(1)))
            .map(|_| Guess::start(reader.clone(), guessed.clone(), piece))
            .collect();
        tokio::time::sleep(LEAD).await;
        if let Some(failed) = guesses.iter().position(|guess| guess.0.is_finished()) {
            return Err(CliError::Usage(format!(
                "prefetch {failed} ended before the demand came; give a larger --size"
            )));
        }
        behind.push(bench.load().await?);
    }
    drop(bench);
    hotset.drain().await;
    let ms = |costs: &[Cost]| {
        costs
            .iter()
            .map(|cost| cost.wall_s * 1e3)
            .collect::<Vec<_>>()
    };
    let (alone, behind) = (ms(&alone), ms(&behind));
    let waits: Vec<f64> = behind.iter().zip(&alone).map(|(b, a)| b - a).collect();
    Ok(DemandReport {
        bytes: library.bytes,
        queued,
        waits_ms: median(&waits),
        piece_ms: median(&alone) * piece.as_f64() / library.bytes.as_f64(),
        alone_ms: Spread::of(&alone),
        behind_ms: Spread::of(&behind),
    })
}

/// A prefetch that is under way until this is dropped.
struct Guess(AbortHandle);

impl Guess {
    fn start(reader: Arc<dyn Reader>, component: Arc<Component>, piece: Bytes) -> Self {
        let task = tokio::spawn(async move {
            if let Err(error) = read(&*reader, component, piece).await {
                tracing::warn!(%error, "a prefetch of the measurement failed");
            }
        });
        Self(task.abort_handle())
    }
}

impl Drop for Guess {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Reads a component as a prefetch, through a little memory.
async fn read(
    reader: &dyn Reader,
    component: Arc<Component>,
    piece: Bytes,
) -> Result<(), ReadError> {
    let mut open = reader.open_as(component, Urgency::prefetch()).await?;
    let arena = Arena::new(ArenaOptions::default());
    let mut left = open.image_bytes().get();
    let Ok(mut stage) = arena.slab("prefetch", STAGE) else {
        return Ok(());
    };
    while left > 0 {
        let enough = left.min(STAGE.get());
        while stage.filled().get() < enough {
            let missing = Bytes(enough - stage.filled().get());
            (open, stage) = open.read(stage, piece.min(missing)).await?;
        }
        left -= enough;
        let Ok(again) = stage.rewind() else {
            return Ok(());
        };
        stage = again;
    }
    Ok(())
}
