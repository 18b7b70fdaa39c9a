//! The `hotset` command.

mod cli;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

/// How long a thread for blocking work waits for more. Something is measured each second: with tokio's ten seconds, ten threads would
/// take turns at it for ever.
const THREAD_KEEP_ALIVE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    cli::log::init(&cli.global);
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_keep_alive(THREAD_KEEP_ALIVE)
        .build()
        .map_err(|error| cli::CliError::Runtime { source: error })
        .and_then(|runtime| runtime.block_on(cli::run(cli)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(),
    }
}
