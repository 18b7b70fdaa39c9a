//! `hotset bench`: measurements of this machine.

mod load;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use hotset::core::catalog::bench;

use super::output::{self, line, table};
use super::{CliError, Global};

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Scan a made-up library of sparse files with true headers
    Scan(ScanArgs),
    /// Load made-up weights into RAM or onto a GPU, with the speed of the disk and of the link beside it
    Load(load::LoadArgs),
    /// Lease and map what is resident: in process, over the bridge, from Python
    Attach(super::attach::AttachArgs),
}

/// How to measure scanning.
#[derive(Debug, Args)]
pub(crate) struct ScanArgs {
    /// Files in the library
    #[arg(long, default_value_t = 50_000)]
    files: u64,
    /// Folder for the library, which is removed at the end [default: the system's temporary folder]
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
    /// Threads; 0 means one for each core
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

/// Runs a measurement.
pub(crate) async fn run(command: &BenchCommand, global: &Global) -> Result<(), CliError> {
    match command {
        BenchCommand::Scan(args) => scan(args, global).await,
        BenchCommand::Attach(args) => super::attach::run(args, global).await,
        BenchCommand::Load(args) => load::run(args, global).await,
    }
}

async fn scan(args: &ScanArgs, global: &Global) -> Result<(), CliError> {
    let mut options = bench::Options {
        files: args.files,
        threads: args.threads,
        ..bench::Options::default()
    };
    if let Some(folder) = &args.folder {
        options.folder.clone_from(folder);
    }
    let measured = tokio::task::spawn_blocking(move || bench::run(&options)).await;
    let report =
        measured.map_err(|error| CliError::Usage(format!("the measurement failed: {error}")))??;
    if global.json {
        return output::json(&report);
    }
    let mut rows = table(&["what", "measured", "beside it"], &["measured"]);
    let mut row = |what: &str, measured: String, beside: String| {
        rows.add_row([what.to_owned(), measured, beside]);
    };
    row(
        "cold scan",
        format!("{:.3} s", report.cold_s),
        format!(
            "floor {:.3} s: the same walk, one open and pread of each header ({:.2} x)",
            report.floor_s, report.cold_over_floor
        ),
    );
    row(
        "restart",
        format!("{:.3} s", report.restart_s),
        format!("{} entries from the store", report.entries),
    );
    row(
        "refresh, nothing changed",
        format!("{:.3} s", report.refresh_s),
        format!("walk alone {:.3} s", report.walk_s),
    );
    row(
        "a new file, once it rests",
        format!("{:.1} ms", report.event_ms_p50),
        format!("slowest of a hundred {:.1} ms", report.event_ms_p99),
    );
    row(
        "lookup by name",
        format!("{:.0} ns", report.lookup_ns),
        String::new(),
    );
    row(
        "ranked query",
        format!("{:.2} ms", report.query_ms),
        format!("fuzzy {:.2} ms", report.fuzzy_ms),
    );
    row(
        "memory for each entry",
        format!("{:.0} B", report.bytes_per_entry),
        format!(
            "of which name and path {:.0} B",
            report.name_bytes_per_entry
        ),
    );
    line(rows.to_string())
}
