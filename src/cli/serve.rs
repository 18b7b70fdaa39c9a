//! `hotset serve`: runs the system until it is told to stop. Every command that needs a system starts it here.

use hotset::{Config, Hotset};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::output::line;
use super::{CliError, Global, config};

/// Starts the system, and waits for its first scan.
pub(crate) async fn start(config: Config) -> Result<Hotset, CliError> {
    Ok(Hotset::builder().config(config).start().await?)
}

/// `hotset serve`
pub(crate) async fn run(global: &Global) -> Result<(), CliError> {
    let mut config = config(global)?;
    if config.catalog.database.is_none() {
        config.catalog.database = super::kept::database(&config.catalog.roots);
    }
    if config.catalog.roots.is_empty() {
        eprintln!("warning: no model folder is configured; set catalog.roots or give --models DIR");
    }
    // Before anything else: a signal that comes during the first scan is heard too.
    let mut stop = Stop::listen()?;
    let hotset = tokio::select! {
        started = start(config) => started?,
        why = stop.told() => {
            eprintln!("{why}: ending before the first scan did");
            return Ok(());
        }
    };
    let status = hotset.status().await;
    if global.json {
        super::output::json(&status)?;
    } else {
        line(format!(
            "serving {} models; ctrl-c drains and ends",
            status.catalogue.models
        ))?;
        super::status::tiers(&status.tiers)?;
    }
    let why = stop.told().await;
    eprintln!("{why}: draining");
    hotset.drain().await;
    Ok(())
}

/// The signals that end a command gracefully: SIGTERM and ctrl-c.
pub(crate) struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    /// Listens from now on, instead of ending at once.
    pub(crate) fn listen() -> Result<Self, CliError> {
        let listen = |kind| signal(kind).map_err(|source| CliError::Runtime { source });
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    /// Waits for one of them; gives its name.
    pub(crate) async fn told(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "interrupted",
        }
    }
}
