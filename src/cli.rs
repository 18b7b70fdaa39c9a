//! The command line: tables and progress bars for people, one JSON document with `--json`.

mod anew;
mod attach;
mod bench;
mod catalog;
mod config;
mod demo;
mod harness;
mod heap;
mod kept;
mod load;
pub(crate) mod log;
mod output;
mod plan;
mod record;
mod replay;
mod serve;
mod server;
mod simulate;
mod status;
mod why;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use hotset::{Bytes, Config, LoadError, SessionError, StartError};

/// hotset keeps the right model weights resident: disk, RAM and VRAM of a machine under one owner.
#[derive(Debug, Parser)]
#[command(
    name = "hotset",
    version,
    propagate_version = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// Configuration file [default: $HOTSET_CONFIG, ~/.config/hotset/hotset.toml, /etc/hotset/hotset.toml]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Set one configuration value, such as ram.budget=16GiB; may be repeated
    #[arg(long = "set", global = true, value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) set: Vec<(String, String)>,
    /// Folder with models, instead of the configuration's; may be repeated
    #[arg(long = "models", global = true, value_name = "DIR")]
    pub(crate) models: Vec<PathBuf>,
    /// VRAM that stays free on each GPU, for others [default: the configuration's]
    #[arg(long, global = true, value_name = "SIZE")]
    pub(crate) vram_headroom: Option<Bytes>,
    /// Run a system of this command's own, also where a server runs
    #[arg(long, global = true)]
    pub(crate) alone: bool,
    /// Print one JSON document instead of tables
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// How logs are written to stderr; RUST_LOG says how much
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub(crate) log: log::Format,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()))
        .filter(|(key, _)| !key.is_empty())
        .ok_or_else(|| "write KEY=VALUE, such as ram.budget=16GiB".to_owned())
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a small model library, serve it, load pipelines, and show what happened
    Demo(demo::DemoArgs),
    /// Run the system until it is told to stop (SIGTERM, ctrl-c, the end of its terminal, `hotset drain`)
    Serve,
    /// Discover and identify the models in folders
    Scan(catalog::ScanArgs),
    /// List the catalogue
    Ls(catalog::LsArgs),
    /// Show one model: its components, files and dependencies
    Show(catalog::ShowArgs),
    /// Say what loading a component set would do, without doing it
    Plan(plan::PlanArgs),
    /// Load a component set and show its progress
    Load(load::LoadArgs),
    /// Show tiers, sessions, actors and health
    Status,
    /// The same, live
    Top(status::TopArgs),
    /// Say what the running server decided, and why
    Why(why::WhyArgs),
    /// Show how the running server's models are used
    Analyse,
    /// End the running server gracefully
    Drain,
    /// Write down what the running server grants, for `replay`
    Record(record::RecordArgs),
    /// Replay recorded requests on simulated tiers, under each policy
    Replay(replay::ReplayArgs),
    /// Show the configuration in force, and where each value was said
    Config,
    /// Disturb a system on purpose, and check that nothing is lost
    Chaos(harness::ChaosArgs),
    /// A worker of `chaos`
    #[command(hide = true)]
    ChaosWorker(harness::worker::WorkerArgs),
    /// Measure this machine, with the physical limit beside each figure
    #[command(subcommand)]
    Bench(bench::BenchCommand),
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// The async runtime did not start.
    #[error("cannot start the runtime: {source}")]
    Runtime {
        /// What the system said.
        source: io::Error,
    },
    /// The program could not be started again in this process.
    #[error("cannot start anew: {source}; start it by hand")]
    Anew {
        /// What the system said.
        source: io::Error,
    },
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] hotset::ConfigError),
    /// What was asked for makes no sense.
    #[error("{0}")]
    Usage(String),
    /// The system did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A session was refused.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A load was refused.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The bridge could not be opened.
    #[error(transparent)]
    Bridge(#[from] hotset::bridge::BridgeError),
    /// The HTTP face could not be opened.
    #[error(transparent)]
    Http(#[from] hotset::http::HttpError),
    /// The running server refused, or is gone.
    #[error(transparent)]
    Client(#[from] hotset::client::ClientError),
    /// The running server says what this command does not understand.
    #[error("the server's answer is not understood ({0}); is it of another version?")]
    Answer(serde_json::Error),
    /// No such model.
    #[error(transparent)]
    Find(#[from] hotset::core::catalog::FindError),
    /// A file of signatures is wrong.
    #[error(transparent)]
    Signatures(#[from] hotset::core::catalog::SignatureError),
    /// A measurement could not be made.
    #[error(transparent)]
    Bench(#[from] hotset::core::catalog::bench::BenchError),
    /// What was loaded is not what was on disk.
    #[error("wrong contents: {0}")]
    Different(String),
    /// The CUDA driver refused.
    #[error(transparent)]
    Cuda(#[from] hotset::core::device::cuda::CudaError),
    /// Reading back from a device failed.
    #[error(transparent)]
    Device(#[from] hotset::DeviceError),
    /// A file could not be written or read.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What must never be was seen.
    #[error("{violated} violation(s); the report names each")]
    Violations {
        /// How many.
        violated: u64,
    },
    /// A signal came before the end.
    #[error("{why}: ended early, without a report")]
    Stopped {
        /// The signal.
        why: &'static str,
    },
    /// Standard output is gone.
    #[error("cannot write the output: {0}")]
    Output(io::Error),
}

impl CliError {
    /// Prints the error, and gives the exit status: 1 failed, 2 wrong usage. A reader that went away is no error.
    pub(crate) fn report(&self) -> ExitCode {
        if let Self::Output(error) = self
            && error.kind() == io::ErrorKind::BrokenPipe
        {
            return ExitCode::SUCCESS;
        }
        output::tell(format_args!("error: {self}"));
        match self {
            Self::Config(_) | Self::Usage(_) | Self::Signatures(_) => ExitCode::from(2),
            _ => ExitCode::FAILURE,
        }
    }
}

/// Runs a command.
pub(crate) async fn run(cli: Cli) -> Result<(), CliError> {
    let global = &cli.global;
    match cli.command {
        Command::Demo(args) => demo::run(&args, global).await,
        Command::Serve => serve::run(global).await,
        Command::Scan(args) => catalog::scan(&args, global).await,
        Command::Ls(args) => catalog::ls(&args, global).await,
        Command::Show(args) => catalog::show(&args, global).await,
        Command::Plan(args) => plan::run(&args, global).await,
        Command::Load(args) => load::run(&args, global).await,
        Command::Status => status::run(global).await,
        Command::Top(args) => status::top(&args, global).await,
        Command::Why(args) => why::run(&args, global).await,
        Command::Analyse => why::analyse(global).await,
        Command::Drain => serve::drain(global).await,
        Command::Record(args) => record::run(&args, global).await,
        Command::Replay(args) => replay::run(&args, global),
        Command::Config => config::run(global),
        Command::Chaos(args) => harness::chaos(&args, global).await,
        Command::ChaosWorker(args) => harness::worker::run(&args).await,
        Command::Bench(command) => bench::run(&command, global).await,
    }
}

/// The configuration of a command that runs the system for itself: file, environment and flags, without watching, since
/// it ends before anything changes.
fn config(global: &Global) -> Result<Config, CliError> {
    let mut config = hotset::load_config(&hotset::ConfigSources {
        file: global.config.clone(),
        overrides: global.set.clone(),
    })?
    .config;
    if !global.models.is_empty() {
        config.catalog.roots.clone_from(&global.models);
    }
    if let Some(headroom) = global.vram_headroom {
        config.cuda.headroom = headroom;
        for gpu in &mut config.gpu {
            gpu.headroom = headroom;
        }
    }
    Ok(config)
}

/// The same, where there must be something to look at.
fn config_with_models(global: &Global) -> Result<Config, CliError> {
    let mut config = config(global)?;
    if config.catalog.roots.is_empty() {
        return Err(CliError::Usage(
            "no model folder is configured: give --models DIR, or set catalog.roots in the configuration".into(),
        ));
    }
    config.catalog.watch = false;
    Ok(config)
}
