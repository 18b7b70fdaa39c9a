//! The bridge: other processes use the same system over a Unix socket.
//!
//! A connection is a session; its leases end with it, for whatever reason it ends. Each connection is one task: it reads requests
//! ([`wire`]), hands them to the embedding API, and writes replies and events. It decides nothing. Bytes never pass through it: what
//! is leased travels as a read-only descriptor of the slab, once for each connection and memory, and is a number from then on.
//!
//! `docs/protocol.md` is the page for writers of clients; [`client`](crate::client) is the one for Rust.

mod answers;
pub(crate) mod channel;
mod connection;
pub(crate) mod events;
pub mod frame;
mod leases;
mod mapped;
mod socket;
mod tables;
pub mod wire;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hotset_core::config::BridgeConfig;
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub(crate) use answers::load_error;
pub use channel::ChannelError;
pub use frame::FrameError;
pub use socket::default_socket;

use crate::Hotset;
use connection::Connection;
use tables::Tables;

/// Why there is no bridge.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BridgeError {
    /// Nobody said where, and the environment does not tell.
    #[error("there is no place for the socket: set bridge.socket, XDG_RUNTIME_DIR or HOME")]
    NoPlace,
    /// The path does not fit in a socket's address.
    #[error(
        "{} is too long for a socket, {limit} bytes at most; set a shorter bridge.socket", path.display()
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// The longest that fits.
        limit: usize,
    },
    /// Others could put a socket of theirs in the place of ours.
    #[error(
        "{} belongs to user {owner} and has mode {mode:o}: it must be your own and closed to others (chmod 700), or set bridge.socket",
        folder.display()
    )]
    UnsafeFolder {
        /// The socket's folder.
        folder: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who may do what.
        mode: u32,
    },
    /// Another server has it.
    #[error("another server listens on {}; stop it, or set another bridge.socket", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot {step} {}: {source}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Pause after a refused `accept`: descriptors ran out, and come back as clients go.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long a connection that is ended may take to read its farewell.
const FAREWELL: Duration = Duration::from_secs(5);

/// What all connections share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) hotset: Arc<Hotset>,
    pub(crate) config: BridgeConfig,
    /// Tells two runs of a server apart.
    pub(crate) instance: String,
    pub(crate) tables: Tables,
    /// What clients map of earlier servers.
    elsewhere: Arc<mapped::Elsewhere>,
    /// A client asked for the end.
    drain: Notify,
    /// The bridge closes.
    pub(crate) stop: CancellationToken,
}

/// An open bridge. Dropping it ends every connection.
#[derive(Debug)]
pub struct Bridge {
    shared: Arc<Shared>,
    path: PathBuf,
    accepting: Option<tokio::task::JoinHandle<()>>,
}

impl Bridge {
    /// Opens the bridge to a running system, where its configuration says.
    ///
    /// # Errors
    /// [`BridgeError`].
    pub async fn open(hotset: Arc<Hotset>) -> Result<Self, BridgeError> {
        let config = hotset.config().bridge.clone();
        let path = config
            .socket
            .clone()
            .or_else(default_socket)
            .ok_or(BridgeError::NoPlace)?;
        let place = socket::open(&path, !config.allow_uids.is_empty())?;
        let since_epoch = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        let shared = Arc::new(Shared {
            hotset,
            config,
            instance: format!("{:x}-{:x}", std::process::id(), since_epoch.as_nanos()),
            tables: Tables::default(),
            elsewhere: Arc::default(),
            drain: Notify::new(),
            stop: CancellationToken::new(),
        });
        let accepting = tokio::spawn(accept(shared.clone(), place));
        Ok(Self {
            shared,
            path,
            accepting: Some(accepting),
        })
    }

    /// The socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.path
    }

    /// Waits until a client asks the server to end.
    pub async fn drain_requested(&self) {
        self.shared.drain.notified().await;
    }

    /// Ends every connection, each with a farewell, and removes the socket.
    pub async fn close(mut self) {
        self.shared.stop.cancel();
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.await;
        }
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        self.shared.stop.cancel();
    }
}

/// Takes connections until the end, and waits for theirs.
async fn accept(shared: Arc<Shared>, place: socket::Place) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = shared.stop.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = place.listener.accept() => match accepted {
                Ok((stream, _)) => {
                    if let Some(connection) = admit(&shared, stream) {
                        connections.spawn(connection.run());
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(place);
    while connections.join_next().await.is_some() {}
}

/// Looks at who connects.
fn admit(shared: &Arc<Shared>, stream: UnixStream) -> Option<Connection> {
    let peer = stream
        .peer_cred()
        .inspect_err(|error| tracing::warn!(%error, "a client's user cannot be told"))
        .ok()?;
    let own = rustix::process::geteuid().as_raw();
    if peer.uid() != own && !shared.config.allow_uids.contains(&peer.uid()) {
        tracing::warn!(
            uid = peer.uid(),
            pid = peer.pid(),
            "refused a client: its user is not in bridge.allow_uids"
        );
        return None;
    }
    Connection::new(shared.clone(), stream, peer.pid())
        .inspect_err(|error| tracing::warn!(%error, "a client's connection cannot be watched"))
        .ok()
}
