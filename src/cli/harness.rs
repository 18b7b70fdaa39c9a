//! `hotset chaos --processes` and `hotset chaos --soak`: a real server, real workers on real sockets and files, and whatever can
//! happen to them.

mod checks;
mod crowd;
mod digest;
mod doubles;
mod faults;
mod group;
mod holdings;
mod inject;
mod library;
mod own;
mod report;
mod run;
mod server;
pub(crate) mod worker;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::Args;
use hotset::bridge::default_socket;
use hotset::client::ClientError;

use super::serve::Stop;
use super::{CliError, Global, output};
use report::Report;
use run::Run;

/// Options of `chaos`.
#[derive(Debug, Args)]
pub(crate) struct ChaosArgs {
    /// Simulation: these seeds under each profile, in virtual time
    #[arg(long, value_name = "FROM..TO", value_parser = super::simulate::seeds, conflicts_with_all = ["processes", "soak"])]
    seeds: Option<std::ops::Range<u64>>,
    /// Simulation: this load alone
    #[arg(long, value_parser = super::simulate::profile, conflicts_with_all = ["processes", "soak"])]
    profile: Option<hotset::chaos::Profile>,
    /// Simulation: print every event to stderr
    #[arg(long, conflicts_with_all = ["processes", "soak"])]
    trace: bool,
    /// Real processes: a server of this run's own and workers, killed, stopped and disturbed at random moments
    #[arg(long, conflicts_with = "soak")]
    processes: bool,
    /// So long, workers come, go and die at the running server; at the end it must hold what it held before
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    soak: Option<Duration>,
    /// How long `--processes` runs, or each seed in its own time
    #[arg(long, value_name = "MINUTES", default_value = "1")]
    minutes: f64,
    /// Faults each second of simulated time
    #[arg(long, value_name = "FAULTS", default_value_t = hotset::chaos::Scenario::RATE)]
    rate: u64,
    /// Simulation: recorded requests as load, as `hotset replay` reads them
    #[arg(long, value_name = "FILE", requires = "components", conflicts_with_all = ["profile", "processes", "soak"])]
    requests: Option<PathBuf>,
    /// Their components
    #[arg(long, value_name = "FILE", requires = "requests")]
    components: Option<PathBuf>,
    /// Workers at the same time
    #[arg(long, default_value = "6")]
    workers: usize,
    /// Where the run's choices begin
    #[arg(long, default_value = "0")]
    seed: u64,
    /// Use the GPUs that are found, instead of a simulated one
    #[arg(long)]
    gpus: bool,
    /// First, servers are killed under the load of so many sessions, and it is measured how soon all work again
    #[arg(
        long,
        value_name = "SESSIONS",
        default_value = "0",
        conflicts_with = "soak"
    )]
    sessions: usize,
    /// Work in this folder, and leave it with the server's log
    #[arg(long, value_name = "FOLDER", conflicts_with = "soak")]
    keep: Option<PathBuf>,
    /// GPUs that are doubles, as hotset's own tests have built them in this folder (target/release), and what happens to GPUs
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["soak", "gpus"])]
    doubles: Option<PathBuf>,
    /// Python with the hotset package, for workers of its kind
    #[arg(long, value_name = "PYTHON")]
    python: Option<PathBuf>,
}

/// `hotset chaos`
pub(crate) async fn chaos(args: &ChaosArgs, global: &Global) -> Result<(), CliError> {
    let one = args.trace || args.profile.is_some() || args.requests.is_some();
    let seeds = args.seeds.clone();
    let seeds = seeds.or_else(|| one.then(|| args.seed..args.seed.saturating_add(1)));
    if let Some(seeds) = seeds {
        let profiles = args
            .profile
            .map_or_else(|| hotset::chaos::Profile::ALL.to_vec(), |p| vec![p]);
        let requests = args.requests.as_deref().zip(args.components.as_deref());
        let simulation = super::simulate::Simulation {
            seeds,
            profiles,
            requests,
            minutes: args.minutes,
            rate: args.rate,
            trace: args.trace,
        };
        return super::simulate::simulate(&simulation, global);
    }
    if let Some(python) = &args.python {
        has_package(python)?;
    }
    let run = async {
        match (args.processes, args.soak) {
            (_, Some(time)) => {
                let config = super::config(global)?;
                let socket = config.bridge.socket.clone().or_else(default_socket);
                let socket = socket.ok_or(ClientError::NoPlace)?;
                Run::soak(args, socket, time).await
            }
            (true, None) => Run::processes(args).await,
            (false, None) => Err(CliError::Usage(
                "say what to put under chaos: --seeds 0..1000, a simulation; --processes, a server of its own; or --soak 30m, the running server"
                    .into(),
            )),
        }
    };
    let mut stop = Stop::listen()?;
    let report = tokio::select! {
        report = run => report?,
        // Who drops a run ends its processes, unmounts what it mounted and removes its control group.
        why = stop.told() => return Err(CliError::Stopped { why }),
    };
    if global.json {
        output::json(&report)?;
    } else {
        print(&report)?;
    }
    match report.violated {
        0 => Ok(()),
        violated => Err(CliError::Violations { violated }),
    }
}

/// Its workers would end at once else, and a run without them prove less than it seems to.
fn has_package(python: &Path) -> Result<(), CliError> {
    let shown = python.display();
    let output = Command::new(python).args(["-c", "import hotset"]).output();
    let output = output.map_err(|error| CliError::Usage(format!("--python {shown}: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().next_back().unwrap_or("it says nothing");
    Err(CliError::Usage(format!(
        "--python {shown} cannot import hotset ({last}); install it with `{shown} -m pip install ./python`, or name the folder that holds it in PYTHONPATH"
    )))
}

fn print(report: &Report) -> Result<(), CliError> {
    let mut table = output::table(&["fault", "times"], &["times"]);
    for (fault, times) in &report.faults {
        table.add_row([(*fault).to_owned(), times.to_string()]);
    }
    for (fault, reason) in &report.skipped {
        table.add_row([(*fault).to_owned(), format!("not here: {reason}")]);
    }
    output::line(table.to_string())?;
    let mut table = output::table(
        &["time", "count", "p50 ms", "p99 ms", "max ms"],
        &["count", "p50 ms", "p99 ms", "max ms"],
    );
    let crowd = report.crowd.as_ref();
    for (name, times) in [
        ("a dead worker's leases are back", &report.leases_returned),
        ("a dead server's successor leases", &report.server_restarted),
        ("a worker has a server again", &report.clients_reconnected),
        (
            "the successor leases, under a crowd",
            &crowd.and_then(|crowd| crowd.serving.clone()),
        ),
        (
            "all of the crowd are back",
            &crowd.and_then(|crowd| crowd.all_reconnected.clone()),
        ),
    ] {
        if let Some(times) = times {
            table.add_row([
                name.to_owned(),
                times.count.to_string(),
                format!("{:.1}", times.p50_ms),
                format!("{:.1}", times.p99_ms),
                format!("{:.1}", times.max_ms),
            ]);
        }
    }
    output::line(table.to_string())?;
    let columns = [
        "server's life",
        "descriptors",
        "threads",
        "own memory",
        "VRAM",
        "kept memories",
        "returned after",
    ];
    let mut table = output::table(&columns, &columns);
    for life in &report.lives {
        let (start, end) = (&life.start, &life.end);
        let bytes = |a: u64, b: u64| format!("{} → {}", hotset::Bytes(a), hotset::Bytes(b));
        table.add_row([
            format!("{:.0} s", life.seconds),
            format!(
                "{} → {}",
                start.other_descriptors(),
                end.other_descriptors()
            ),
            format!("{} → {}", start.all_threads(), end.all_threads()),
            bytes(start.anonymous_bytes, end.anonymous_bytes),
            bytes(start.vram_bytes, end.vram_bytes),
            format!("{} → {}", start.kept_memories, end.kept_memories),
            format!("{:.1} s", life.returned_after_s),
        ]);
    }
    output::line(table.to_string())?;
    for violation in &report.violations {
        output::line(format!(
            "{:.1} s: {}: {}",
            violation.at_s, violation.invariant, violation.message
        ))?;
    }
    output::line(format!(
        "seed {}: {:.0} s, {} faults, {} requests, {} leases read ({}), {} violations",
        report.seed,
        report.seconds,
        report.faults_injected,
        report.requests,
        report.leases,
        hotset::Bytes(report.checked_bytes),
        report.violated
    ))
}
