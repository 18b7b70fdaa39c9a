//! `hotset serve`: runs the system until it is told to stop. Every command that needs a system starts it here.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use futures::FutureExt;
use hotset::bridge::Bridge;
use hotset::http::Http;
use hotset::{Config, Hotset, Status};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::output::{line, tell};
use super::{CliError, Global, config};

/// Starts the system, and waits for its first scan.
pub(crate) async fn start(config: Config) -> Result<Hotset, CliError> {
    Ok(Hotset::builder().config(config).start().await?)
}

/// As many descriptors as this process may have at all: each client is one, and each memory that is leased is another.
fn allow_descriptors() {
    let limits = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: limits.maximum,
        maximum: limits.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, all) {
        tracing::debug!(%error, "the limit on descriptors stays as it is");
    }
}

/// `hotset serve`
pub(crate) async fn run(global: &Global) -> Result<(), CliError> {
    let began = Instant::now();
    allow_descriptors();
    let mut config = config(global)?;
    if config.catalog.database.is_none() {
        config.catalog.database = super::kept::database(&config.catalog.roots);
    }
    if config.predict.folder.is_none() {
        let database = config.catalog.database.as_deref();
        config.predict.folder = database.map(|path| path.with_extension("learned"));
    }
    if config.catalog.roots.is_empty() {
        tell("warning: no model folder is configured; set catalog.roots or give --models DIR");
    }
    // Before anything else: a signal that comes during the first scan is heard too.
    let mut stop = Stop::listen()?;
    let hotset = tokio::select! {
        started = start(config) => Arc::new(started?),
        why = stop.told() => {
            tell(format_args!("{why}: ending before the first scan did"));
            return Ok(());
        }
    };
    let bridge = match hotset.config().bridge.enabled {
        true => Some(Bridge::open(hotset.clone()).await?),
        false => None,
    };
    let http = match hotset.config().http.enabled {
        true => Http::open(hotset.clone()).await?,
        false => None,
    };
    let status = hotset.status().await;
    let http_at = http.as_ref().map(Http::address);
    // Whoever reads it may have gone; those who are served have not.
    let _ = greet(global, &status, bridge.as_ref(), http_at);
    let (why, mut anew) = tokio::select! {
        why = stop.told() => (why.to_owned(), false),
        () = asked(bridge.as_ref()) => ("a client asked for the end".to_owned(), false),
        reason = spent(global, &hotset, began) => (reason.to_string(), true),
        never = super::heap::give_back() => match never {},
    };
    tell(format_args!("{why}: draining"));
    hotset.quiesce().await;
    if let Some(http) = http {
        http.close().await;
    }
    // Who asks for the end meanwhile means it.
    anew &= asked(bridge.as_ref()).now_or_never().is_none();
    if let Some(bridge) = bridge {
        bridge.close().await;
    }
    if let Some(hotset) = Arc::into_inner(hotset) {
        hotset.drain().await;
    }
    match anew && stop.told().now_or_never().is_none() {
        true => Err(super::anew::start()),
        false => Ok(()),
    }
}

/// Waits until a GPU is lost to this process and to no other, and this process has run long enough not to begin anew all the time;
/// gives the reason.
async fn spent(global: &Global, hotset: &Hotset, began: Instant) -> Arc<str> {
    let own = hotset.config();
    if !own.cuda.restart {
        return std::future::pending().await;
    }
    let reason = hotset.spent().await;
    tokio::time::sleep_until((began + own.supervision.retry).into()).await;
    if let Err(error) = config(global) {
        tracing::error!(%error, %reason, "a new start would fail; mend the configuration, and restart the server");
        return std::future::pending().await;
    }
    reason
}

async fn asked(bridge: Option<&Bridge>) {
    match bridge {
        Some(bridge) => bridge.drain_requested().await,
        None => std::future::pending().await,
    }
}

/// Says what is served and where.
fn greet(
    global: &Global,
    status: &Status,
    bridge: Option<&Bridge>,
    http: Option<SocketAddr>,
) -> Result<(), CliError> {
    if global.json {
        return super::output::json(status);
    }
    line(format!(
        "serving {} models; ctrl-c drains and ends",
        status.catalogue.models
    ))?;
    if let Some(bridge) = bridge {
        line(format!("bridge: {}", bridge.socket().display()))?;
    }
    if let Some(address) = http {
        line(format!("http: http://{address}"))?;
    }
    super::status::tiers(&status.tiers)
}

/// `hotset drain`
pub(crate) async fn drain(global: &Global) -> Result<(), CliError> {
    let client = super::server::required(global).await?;
    client.drain().await?;
    if global.json {
        super::output::json(&serde_json::json!({ "draining": true }))?;
    } else {
        line("the server drains and ends")?;
    }
    Ok(())
}

/// The signals that end a command gracefully: SIGTERM, ctrl-c, and the end of its terminal, unless it is to outlive that (`nohup`).
pub(crate) struct Stop {
    terminate: Signal,
    interrupt: Signal,
    hangup: Option<Signal>,
}

/// Whether a process ignores a signal, by what `/proc/PID/status` says of it.
fn ignores(status: &str, signal: SignalKind) -> bool {
    let mut lines = status.lines();
    let mask = lines.find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal.as_raw_value() - 1) & 1 == 1)
}

impl Stop {
    /// Listens from now on, instead of ending at once.
    pub(crate) fn listen() -> Result<Self, CliError> {
        let listen = |kind| signal(kind).map_err(|source| CliError::Runtime { source });
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let hangup = match ignores(&status, SignalKind::hangup()) {
            true => None,
            false => Some(listen(SignalKind::hangup())?),
        };
        Ok(Self {
            hangup,
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    /// Waits for one of them; gives its name.
    pub(crate) async fn told(&mut self) -> &'static str {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "interrupted",
            _ = hangup => "its terminal is gone",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ignored_is_read_from_the_kernels_word() {
        let status =
            "SigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000000002\n";
        assert!(ignores(status, SignalKind::hangup()));
        assert!(ignores(status, SignalKind::pipe()));
        assert!(!ignores(status, SignalKind::interrupt()));
        assert!(!ignores("", SignalKind::hangup()));
        assert!(!ignores("SigIgn: none", SignalKind::hangup()));
    }
}
