//! `hotset serve`: runs the system until it is told to stop. Every command that needs a system starts it here.

use std::path::PathBuf;

use hotset::{Config, Hotset};
use tokio::signal::unix::{SignalKind, signal};

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
        config.catalog.database = default_database();
    }
    if config.catalog.roots.is_empty() {
        eprintln!("warning: no model folder is configured; set catalog.roots or give --models DIR");
    }
    let hotset = start(config).await?;
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
    let why = until_told_to_stop().await?;
    eprintln!("{why}: draining");
    hotset.drain().await;
    Ok(())
}

/// Waits for SIGTERM or ctrl-c; gives its name.
pub(crate) async fn until_told_to_stop() -> Result<&'static str, CliError> {
    let listen = |kind| signal(kind).map_err(|source| CliError::Runtime { source });
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    Ok(tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "interrupted",
    })
}

/// Where `hotset serve` keeps the catalogue where the configuration does not say: in the user's cache folder.
fn default_database() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    set("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| set("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .map(|cache| cache.join("hotset/catalogue.db"))
}
