//! A client of a running server, over the [bridge](crate::bridge): leases of another process's slabs, without a copy.
//!
//! ```no_run
//! use hotset::client::{Client, LoadOptions};
//!
//! # async fn example() -> Result<(), hotset::client::ClientError> {
//! let client = Client::connect("my worker").await?;
//! for lease in client.load(&LoadOptions::new(["sdxl-base"]).on("ram")).await? {
//!     for tensor in lease.tensors()? {
//!         println!("{} {:?} {} bytes", tensor.name, tensor.shape, tensor.bytes.len());
//!     }
//! }
//! # Ok(())
//! # }
//! ```

mod lease;
mod link;
mod mapping;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hotset_core::plan::KeepAlive;
use serde_json::Value;
use tokio::sync::{broadcast, mpsc};

pub use lease::{RemoteLease, RemoteTensor};
pub use mapping::Mapping;

use crate::bridge::wire::{
    Cancel, ClientMessage, Counted, Empty, ErrorReply, Hello, List, Load, MappedMemory, Models,
    PlanMix, Progress, ServerMessage, Set, Show, StillMapped, Subscribe, Unmapped, VERSIONS,
    Welcome, Why,
};
use crate::bridge::{ChannelError, FrameError, default_socket};
use link::Link;

/// Why a client did not get what it asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody said where the server listens, and the environment does not tell.
    #[error("there is no place for the socket: set bridge.socket, XDG_RUNTIME_DIR or HOME")]
    NoPlace,
    /// No server listens there.
    #[error("no server answers on {}: {source}; start one with `hotset serve`", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The connection ended. Leases of it have ended too; mappings stay valid.
    #[error("connection lost: {reason}; mappings stay valid, connect again for new leases")]
    Lost {
        /// Why, as far as it is known.
        reason: Arc<str>,
    },
    /// The server refused.
    #[error("{} ({})", .0.message, .0.code)]
    Refused(ErrorReply),
    /// The server's answer makes no sense.
    #[error("the server's answer makes no sense: {reason}")]
    Protocol {
        /// What is wrong with it.
        reason: String,
    },
    /// Leased memory could not be mapped.
    #[error("{component} cannot be mapped: {reason}")]
    Map {
        /// The component.
        component: String,
        /// Why.
        reason: String,
    },
}

impl ClientError {
    /// The server's code, where it refused.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Refused(error) => Some(&error.code),
            _ => None,
        }
    }
}

impl From<ChannelError> for ClientError {
    fn from(error: ChannelError) -> Self {
        Self::Lost {
            reason: error.to_string().into(),
        }
    }
}

impl From<FrameError> for ClientError {
    fn from(error: FrameError) -> Self {
        Self::Protocol {
            reason: error.to_string(),
        }
    }
}

/// What to load, and how.
#[derive(Debug, Clone)]
pub struct LoadOptions(Load);

impl LoadOptions {
    /// These models or components, wherever they fit best.
    #[must_use]
    pub fn new<I: IntoIterator<Item = S>, S: Into<String>>(names: I) -> Self {
        Self(Load {
            names: names.into_iter().map(Into::into).collect(),
            target: "best".into(),
            dependencies: true,
            priority: "interactive".into(),
            ..Load::default()
        })
    }

    /// To this target: `best`, `ram`, `vram`, `vram:N`.
    #[must_use]
    pub fn on(mut self, target: impl Into<String>) -> Self {
        self.0.target = target.into();
        self
    }

    /// Within this time.
    #[must_use]
    pub fn within(mut self, deadline: std::time::Duration) -> Self {
        self.0.deadline_ms = Some(u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX));
        self
    }

    /// With nobody waiting for it.
    #[must_use]
    pub fn batch(mut self) -> Self {
        self.0.priority = "batch".into();
        self
    }

    /// With nobody waiting for it, now or perhaps ever: it is loaded when links are idle.
    #[must_use]
    pub fn prefetch(mut self) -> Self {
        self.0.priority = "prefetch".into();
        self
    }

    /// With components that may be split between a GPU and RAM, where they are too large for any GPU.
    #[must_use]
    pub const fn may_split(mut self) -> Self {
        self.0.split = true;
        self
    }

    /// With components that stay for so long after their last lease.
    #[must_use]
    pub fn keep_alive(mut self, keep: KeepAlive) -> Self {
        self.0.keep_alive = Some(keep.to_string());
        self
    }

    /// With leases as they come, while the rest still loads ([`RemoteEvent::Part`]).
    #[must_use]
    pub const fn in_parts(mut self) -> Self {
        self.0.parts = true;
        self
    }

    /// Without the bases of adapters.
    #[must_use]
    pub const fn without_dependencies(mut self) -> Self {
        self.0.dependencies = false;
        self
    }

    /// With leases that are given back when the server asks ([`ServerMessage::Revoke`]).
    #[must_use]
    pub const fn preemptible(mut self) -> Self {
        self.0.preemptible = true;
        self
    }
}

/// A load under way. Dropping it cancels the load.
#[derive(Debug)]
pub struct RemoteLoading {
    link: Arc<Link>,
    id: u64,
    replies: mpsc::UnboundedReceiver<link::Reply>,
    ended: bool,
}

/// What happens in a load.
#[derive(Debug)]
pub enum RemoteEvent {
    /// The plan is made.
    Planned(Value),
    /// Progress.
    Progress(Progress),
    /// Some are there, while the rest still loads. Only where [`LoadOptions::in_parts`] asks for it.
    Part(Vec<RemoteLease>),
    /// All are there; these were not handed out before.
    Leased(Vec<RemoteLease>),
}

impl RemoteLoading {
    fn begin(link: Arc<Link>, load: Load) -> Result<Self, ClientError> {
        let (id, replies) = link.ask(&ClientMessage::Load(load))?;
        Ok(Self {
            link,
            id,
            replies,
            ended: false,
        })
    }

    /// The next event; `Leased` is the last one.
    ///
    /// # Errors
    /// [`ClientError`]; then no lease is held.
    pub async fn next(&mut self) -> Result<RemoteEvent, ClientError> {
        let event = match self.link.reply(&mut self.replies).await {
            Ok(link::Reply::Message(ServerMessage::Planned(reply))) => {
                return Ok(RemoteEvent::Planned(reply.plan));
            }
            Ok(link::Reply::Message(ServerMessage::Progress(progress))) => {
                return Ok(RemoteEvent::Progress(progress));
            }
            Ok(link::Reply::Part(Ok(leases))) => return Ok(RemoteEvent::Part(leases)),
            Ok(link::Reply::Part(Err(error))) => Err(error),
            Ok(link::Reply::Leased(leases)) => leases.map(RemoteEvent::Leased),
            Ok(link::Reply::Message(other)) => Err(unexpected(other)),
            Err(error) => Err(error),
        };
        self.ended = true;
        event
    }

    /// Stops it; it ends with the code `cancelled`, unless it is done already.
    pub fn cancel(&self) {
        // Where the connection is gone, so is the load.
        let _ = self
            .link
            .tell(&ClientMessage::Cancel(Cancel { request: self.id }));
    }
}

impl Drop for RemoteLoading {
    fn drop(&mut self) {
        if !self.ended {
            self.cancel();
        }
    }
}

/// A connection to a server; cheap to clone. It closes with the last clone, the last lease and the last load.
///
/// Where the connection is lost, whoever asks first hears of it ([`ClientError::Lost`]); the next request connects again, and tells the
/// server what this process still maps. A server that was started anew takes that memory over, as far as it can show what it
/// holds ([`ServerMessage::Adopted`] in [`events`](Self::events)): a component that is loaded again is then on the same bytes, at
/// the same address. Subscriptions end with their connection.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    hello: Hello,
    link: Mutex<Arc<Link>>,
    /// Held while one connects again; the others wait for it.
    connecting: tokio::sync::Mutex<()>,
    events: broadcast::Sender<ServerMessage>,
}

/// Events that a slow listener may be behind.
const EVENTS_KEPT: usize = 256;
/// Between two tries to connect again.
const RETRY: Duration = Duration::from_millis(20);

impl Client {
    /// Connects to the server of this user, and opens a session.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn connect(label: &str) -> Result<Self, ClientError> {
        let path = default_socket().ok_or(ClientError::NoPlace)?;
        Self::connect_to(&path, label).await
    }

    /// Connects to the server that listens on this socket, and opens a session.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn connect_to(path: &Path, label: &str) -> Result<Self, ClientError> {
        let hello = Hello {
            versions: VERSIONS.to_vec(),
            label: label.to_owned(),
            software: concat!("hotset-rust ", env!("CARGO_PKG_VERSION")).into(),
            keep_alive_ms: 0,
        };
        let events = broadcast::Sender::new(EVENTS_KEPT);
        let link = Link::open(path, hello.clone(), events.clone(), Vec::new()).await?;
        Ok(Self {
            shared: Arc::new(Shared {
                path: path.to_owned(),
                hello,
                link: Mutex::new(link),
                connecting: tokio::sync::Mutex::default(),
                events,
            }),
        })
    }

    /// The connection as it is.
    fn link(&self) -> Arc<Link> {
        let link = self.shared.link.lock();
        link.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A connection that works, as far as is known; a new one where the last was lost, and that was told.
    async fn working(&self) -> Result<Arc<Link>, ClientError> {
        let link = self.link();
        match link.is_lost() {
            None => return Ok(link),
            Some(false) => return Err(link.lost_error()),
            Some(true) => {}
        }
        let _alone = self.shared.connecting.lock().await;
        let before = self.link();
        if before.is_lost().is_none() {
            return Ok(before);
        }
        let shared = &self.shared;
        let (hello, events) = (shared.hello.clone(), shared.events.clone());
        let link = Link::open(&shared.path, hello, events, before.mapped()).await?;
        *shared.link.lock().unwrap_or_else(PoisonError::into_inner) = link.clone();
        Ok(link)
    }

    /// Connects again after a lost connection, and tries for so long where no server answers yet.
    ///
    /// # Errors
    /// [`ClientError`], the last one.
    pub async fn reconnect(&self, within: Duration) -> Result<(), ClientError> {
        let until = tokio::time::Instant::now() + within;
        loop {
            match self.ping().await {
                Err(ClientError::Lost { .. } | ClientError::Connect { .. })
                    if tokio::time::Instant::now() < until =>
                {
                    tokio::time::sleep(RETRY).await;
                }
                other => return other,
            }
        }
    }

    /// What the server said at the beginning of this connection.
    #[must_use]
    pub fn welcome(&self) -> Welcome {
        self.link().welcome().clone()
    }

    /// Waits until the connection is lost; gives the reason.
    pub async fn closed(&self) -> ClientError {
        self.link().lost().await
    }

    /// Events that belong to no request, and those of subscriptions, over all connections of this client. A receiver that is far
    /// behind misses some, and is told.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<ServerMessage> {
        self.shared.events.subscribe()
    }

    /// Loads a set and waits for its leases.
    ///
    /// # Errors
    /// [`ClientError`]; then no lease is held.
    pub async fn load(&self, options: &LoadOptions) -> Result<Vec<RemoteLease>, ClientError> {
        let link = self.working().await?;
        let mut loading = RemoteLoading::begin(link, options.0.clone())?;
        let mut all = Vec::new();
        loop {
            match loading.next().await? {
                RemoteEvent::Part(leases) => all.extend(leases),
                RemoteEvent::Leased(leases) => {
                    all.extend(leases);
                    return Ok(all);
                }
                RemoteEvent::Planned(_) | RemoteEvent::Progress(_) => {}
            }
        }
    }

    /// Loads a set with progress, over the connection as it is.
    ///
    /// # Errors
    /// [`ClientError::Lost`].
    pub fn loading(&self, options: &LoadOptions) -> Result<RemoteLoading, ClientError> {
        let load = Load {
            progress: true,
            ..options.0.clone()
        };
        RemoteLoading::begin(self.link(), load)
    }

    async fn call(&self, message: ClientMessage) -> Result<ServerMessage, ClientError> {
        let link = self.working().await?;
        let (_, mut replies) = link.ask(&message)?;
        match link.reply(&mut replies).await? {
            link::Reply::Message(message) => Ok(message),
            link::Reply::Leased(_) | link::Reply::Part(_) => Err(ClientError::Protocol {
                reason: format!("leases in answer to `{}`", message.kind()),
            }),
        }
    }

    /// Whether the server answers.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn ping(&self) -> Result<(), ClientError> {
        match self.call(ClientMessage::Ping(Empty {})).await? {
            ServerMessage::Pong(_) => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// A page of the catalogue.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn list(&self, list: List) -> Result<Models, ClientError> {
        match self.call(ClientMessage::List(list)).await? {
            ServerMessage::Models(models) => Ok(models),
            other => Err(unexpected(other)),
        }
    }

    /// One model, as `hotset show --json` prints it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn show(&self, name: &str) -> Result<Value, ClientError> {
        let name = name.to_owned();
        match self.call(ClientMessage::Show(Show { name })).await? {
            ServerMessage::Model(reply) => Ok(reply.model),
            other => Err(unexpected(other)),
        }
    }

    /// A plan, as `hotset plan --json` prints it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn plan(&self, set: Set) -> Result<Value, ClientError> {
        match self.call(ClientMessage::Plan(set)).await? {
            ServerMessage::Plan(reply) => Ok(reply.plan),
            other => Err(unexpected(other)),
        }
    }

    /// A plan for several sets together, as `hotset plan --gpus .. --json` prints it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn plan_mix(&self, mix: PlanMix) -> Result<Value, ClientError> {
        match self.call(ClientMessage::PlanMix(mix)).await? {
            ServerMessage::Mix(reply) => Ok(reply.mix),
            other => Err(unexpected(other)),
        }
    }

    /// The state of everything, as `hotset status --json` prints it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn status(&self) -> Result<Value, ClientError> {
        match self.call(ClientMessage::Status(Empty {})).await? {
            ServerMessage::Status(reply) => Ok(reply.status),
            other => Err(unexpected(other)),
        }
    }

    /// The last decisions that concern a model or component, newest first: each as a document and as a sentence.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn why(&self, name: &str, limit: u64) -> Result<Vec<(Value, String)>, ClientError> {
        let name = name.to_owned();
        match self.call(ClientMessage::Why(Why { name, limit })).await? {
            ServerMessage::Decisions(reply) => {
                Ok(reply.decisions.into_iter().zip(reply.sentences).collect())
            }
            other => Err(unexpected(other)),
        }
    }

    /// How components are used.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn analyse(&self) -> Result<Value, ClientError> {
        match self.call(ClientMessage::Analyse(Empty {})).await? {
            ServerMessage::Usage(reply) => Ok(reply.usage),
            other => Err(unexpected(other)),
        }
    }

    /// Scans the model folders now, and waits until the result is published.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn scan(&self) -> Result<Value, ClientError> {
        match self.call(ClientMessage::Scan(Empty {})).await? {
            ServerMessage::Scanned(reply) => Ok(reply.summary),
            other => Err(unexpected(other)),
        }
    }

    /// Hears of changes from now on, through [`events`](Self::events): `catalogue`, `decisions`, `granted`,
    /// `pressure`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn subscribe(&self, topics: &[&str]) -> Result<(), ClientError> {
        let topics = topics.iter().map(|topic| (*topic).to_owned()).collect();
        let subscribe = ClientMessage::Subscribe(Subscribe { topics });
        match self.call(subscribe).await? {
            ServerMessage::Subscribed(_) => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Tells the server, after a reconnection, what memory of an earlier one this process still maps: read-only descriptors of
    /// slabs, in the order of what is said of them. It is counted until [`unmapped`](Self::unmapped) or the end of the connection.
    /// For what this client itself has mapped that is done at each reconnection.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn still_mapped(
        &self,
        memories: Vec<MappedMemory>,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Counted, ClientError> {
        let message = ClientMessage::StillMapped(StillMapped { memories });
        let link = self.working().await?;
        let (_, mut replies) = link.ask_with(&message, descriptors)?;
        match link.reply(&mut replies).await? {
            link::Reply::Message(ServerMessage::Counted(counted)) => Ok(counted),
            link::Reply::Message(other) => Err(unexpected(other)),
            link::Reply::Leased(_) | link::Reply::Part(_) => Err(ClientError::Protocol {
                reason: "leases in answer to `still-mapped`".into(),
            }),
        }
    }

    /// Some of what was counted is mapped no more.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn unmapped(&self, mappings: Vec<u64>) -> Result<Counted, ClientError> {
        match self
            .call(ClientMessage::Unmapped(Unmapped { mappings }))
            .await?
        {
            ServerMessage::Counted(counted) => Ok(counted),
            other => Err(unexpected(other)),
        }
    }

    /// Asks the server to end gracefully.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn drain(&self) -> Result<(), ClientError> {
        match self.call(ClientMessage::Drain(Empty {})).await? {
            ServerMessage::Draining(_) => Ok(()),
            other => Err(unexpected(other)),
        }
    }
}

fn unexpected(message: ServerMessage) -> ClientError {
    match message {
        ServerMessage::Error(error) => ClientError::Refused(error),
        other => ClientError::Protocol {
            reason: format!("`{}` is no answer to this", other.kind()),
        },
    }
}
