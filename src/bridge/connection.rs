//! One connection: one task that reads requests, has them done, and writes replies and events.
//!
//! Requests are taken in their order; those that take long (loads, questions to actors) go on beside the reading, each as a future of
//! this task, so that nothing here needs a lock and all of it ends with the task.

mod talk;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;

use super::answers::{self, refusal};
use super::channel::{ChannelError, Inbox, Outbox, halves};
use super::wire::{
    ClientMessage, ErrorReply, Goodbye, Hello, Limits, MAX_NAMES, MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES, MAX_TEXT_BYTES, ServerMessage, VERSIONS, Welcome,
};
use super::{FAREWELL, Shared};
use crate::Session;

use self::talk::Talk;

/// How long a client may take to say `hello`.
const HELLO_TIME: Duration = Duration::from_secs(10);
/// The longest promise; a longer one is as good as none.
const LONGEST_PROMISE: Duration = Duration::from_secs(24 * 3600);

/// A connection that was let in.
#[derive(Debug)]
pub(super) struct Connection {
    shared: Arc<Shared>,
    inbox: Inbox,
    outbox: Arc<Outbox>,
    pid: Option<i32>,
}

/// Why a connection ends.
enum End {
    /// The client is gone, or the socket is.
    Gone(ChannelError),
    /// With a farewell.
    Told(&'static str, String),
}

impl From<ChannelError> for End {
    fn from(error: ChannelError) -> Self {
        match error {
            ChannelError::Closed | ChannelError::Io(_) => Self::Gone(error),
            ChannelError::SlowReader { .. } => Self::Told("slow-reader", error.to_string()),
            ChannelError::Frame(_) | ChannelError::Descriptors { .. } => {
                Self::Told("protocol", error.to_string())
            }
        }
    }
}

impl Connection {
    /// Fails where the runtime cannot watch the socket.
    pub(super) fn new(
        shared: Arc<Shared>,
        stream: UnixStream,
        pid: Option<i32>,
    ) -> io::Result<Self> {
        let behind = usize::try_from(shared.config.max_behind.get()).unwrap_or(usize::MAX);
        let (inbox, outbox) = halves(stream, MAX_REQUEST_BYTES, behind)?;
        Ok(Self {
            inbox,
            outbox: Arc::new(outbox),
            shared,
            pid,
        })
    }

    /// The whole of it. What the connection holds is dropped with it.
    pub(super) async fn run(mut self) {
        let end = match self.greet().await {
            Ok((session, promise)) => {
                Talk::new(&self, session, promise)
                    .run(&mut self.inbox)
                    .await
            }
            Err(end) => end,
        };
        match end {
            End::Gone(error) => {
                tracing::debug!(pid = self.pid, reason = %error, "a client is gone");
            }
            End::Told(code, message) => {
                tracing::info!(pid = self.pid, code, message, "ended a client's connection");
                let goodbye = ServerMessage::Goodbye(Goodbye {
                    code: code.into(),
                    message,
                });
                if let Ok(frame) = goodbye.encode(0) {
                    self.outbox.send_last(frame);
                    let read = async {
                        tokio::select! {
                            () = self.outbox.drained() => {}
                            () = self.inbox.discard() => {}
                        }
                    };
                    let _ = tokio::time::timeout(FAREWELL, read).await;
                }
            }
        }
    }

    /// Waits for `hello`, and opens the session.
    async fn greet(&mut self) -> Result<(Session, Option<Duration>), End> {
        let waited = tokio::time::timeout(HELLO_TIME, self.hello()).await;
        let (id, hello) =
            waited.map_err(|_| End::Told("refused", "`hello` did not come in time".into()))??;
        let refuse = |connection: &Self, error: ErrorReply| {
            let message = error.message.clone();
            let _ = send(&connection.outbox, id, &ServerMessage::Error(error));
            End::Told("refused", message)
        };
        let Some(version) = VERSIONS.into_iter().find(|v| hello.versions.contains(v)) else {
            let error = refusal(
                "version",
                format!(
                    "this server speaks versions {VERSIONS:?} of the protocol, the client {:?}",
                    hello.versions
                ),
            );
            return Err(refuse(self, error));
        };
        if let Err(error) = answers::check_text("the label", &hello.label) {
            return Err(refuse(self, error));
        }
        let label = match (hello.label.as_str(), self.pid) {
            ("", Some(pid)) => format!("pid {pid}"),
            (label, Some(pid)) => format!("{label} (pid {pid})"),
            (label, None) => label.to_owned(),
        };
        let session = match self.shared.hotset.session_of(&hello.label, label).await {
            Ok(session) => session,
            Err(error) => return Err(refuse(self, answers::session_error(&error))),
        };
        let config = &self.shared.config;
        let welcome = Welcome {
            version,
            server: concat!("hotset ", env!("CARGO_PKG_VERSION")).into(),
            instance: self.shared.instance.clone(),
            session: session.id().0,
            limits: Limits {
                request_bytes: MAX_REQUEST_BYTES as u64,
                reply_bytes: MAX_REPLY_BYTES as u64,
                names: MAX_NAMES as u64,
                text_bytes: MAX_TEXT_BYTES as u64,
                requests: config.max_requests as u64,
                behind_bytes: config.max_behind.get(),
                quota_bytes: self
                    .shared
                    .hotset
                    .config()
                    .sessions
                    .quota
                    .map(crate::Bytes::get),
            },
        };
        tracing::debug!(session = %session.id(), pid = self.pid, software = hello.software, "a client is here");
        send(&self.outbox, id, &ServerMessage::Welcome(welcome))?;
        let promise = (hello.keep_alive_ms > 0)
            .then(|| Duration::from_millis(hello.keep_alive_ms).min(LONGEST_PROMISE));
        Ok((session, promise))
    }

    async fn hello(&mut self) -> Result<(u64, Hello), End> {
        loop {
            match self.inbox.next_frame()? {
                None => self.inbox.receive().await?,
                Some(frame) => {
                    return match ClientMessage::decode(frame) {
                        Ok((id, ClientMessage::Hello(hello))) => Ok((id, hello)),
                        Ok((id, other)) => {
                            let message =
                                format!("the first message is `hello`, not `{}`", other.kind());
                            let error = refusal("hello-first", message.clone());
                            send(&self.outbox, id, &ServerMessage::Error(error))?;
                            Err(End::Told("refused", message))
                        }
                        Err(error) => {
                            let (id, reply) = answers::frame_error(&error);
                            send(&self.outbox, id, &ServerMessage::Error(reply))?;
                            Err(End::Told("refused", error.to_string()))
                        }
                    };
                }
            }
        }
    }
}

/// Sends a message without descriptors.
fn send(outbox: &Outbox, id: u64, message: &ServerMessage) -> Result<(), ChannelError> {
    outbox.send(message.encode(id)?)
}
