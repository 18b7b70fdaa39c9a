//! The messages of the bridge: their one definition. docs/protocol.md is made from these types.
//!
//! Every message is a MessagePack map with `id`, `type` and the fields of its body. Fields that are not known are ignored,
//! so that a later version may add some.

mod catalogue;
mod loading;
mod mapped;
mod watching;

use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};

pub use self::catalogue::*;
pub use self::loading::*;
pub use self::mapped::*;
pub use self::watching::*;
use super::frame::{FrameError, join, read, split};

/// The protocol versions that this build speaks, newest first.
pub const VERSIONS: [u32; 1] = [1];
/// The longest frame that a client may send. Requests are names and numbers; a thousand long names fit.
pub const MAX_REQUEST_BYTES: usize = 1 << 20;
/// The longest frame that a server sends. A page of the catalogue and the tensors of a large set stay far below.
pub const MAX_REPLY_BYTES: usize = 64 << 20;
/// The most names in one request.
pub const MAX_NAMES: usize = 256;
/// The longest name, label or query, in bytes: the longest path of the system.
pub const MAX_TEXT_BYTES: usize = 4096;
/// The most models in one page of the catalogue.
pub const MAX_PAGE: usize = 10_000;
/// The most decisions in one answer.
pub const MAX_DECISIONS: usize = 10_000;

macro_rules! messages {
    ($(#[$doc:meta])* $name:ident { $($(#[doc = $text:literal])+ $variant:ident($body:ty) = $kind:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq)]
        #[non_exhaustive]
        pub enum $name { $($(#[doc = $text])+ $variant($body),)+ }

        impl $name {
            /// The message's `type`.
            #[must_use]
            pub const fn kind(&self) -> &'static str {
                match self { $(Self::$variant(_) => $kind,)+ }
            }

            /// The message as a whole frame, its length included.
            ///
            /// # Errors
            /// [`FrameError::Encode`].
            pub fn encode(&self, id: u64) -> Result<Vec<u8>, FrameError> {
                match self { $(Self::$variant(body) => join(id, $kind, body),)+ }
            }

            /// Reads the payload of a frame; gives the message with its `id`.
            ///
            /// # Errors
            /// [`FrameError::Head`], [`FrameError::UnknownType`], [`FrameError::Body`].
            pub fn decode(payload: &[u8]) -> Result<(u64, Self), FrameError> {
                let head = split(payload)?;
                let body = |error: rmp_serde::decode::Error| FrameError::Body {
                    id: head.id,
                    kind: head.kind.to_owned(),
                    reason: error.to_string(),
                };
                match head.kind {
                    $($kind => read(payload).map(|message| (head.id, Self::$variant(message))).map_err(body),)+
                    other => Err(FrameError::UnknownType { id: head.id, kind: other.to_owned() }),
                }
            }

            /// Each message: its `type`, what it is for, and the schema of its body.
            #[must_use]
            pub fn schemas() -> Vec<(&'static str, String, Schema)> {
                vec![$(($kind, [$($text),+].map(str::trim).join(" "), schema_for!($body)),)+]
            }
        }
    };
}

messages! {
    /// What a client says.
    ClientMessage {
        /// The first message of a connection: opens the session and agrees on the version. Answered by `welcome`.
        Hello(Hello) = "hello",
        /// Asks for a sign of life. Answered by `pong`.
        Ping(Empty) = "ping",
        /// Answers the server's `ping`; no answer.
        Pong(Empty) = "pong",
        /// Lists the catalogue, or searches it. Answered by `models`.
        List(List) = "list",
        /// One model with its components, what it depends on, and where it is resident. Answered by `model`.
        Show(Show) = "show",
        /// What a load would do as things stand, without doing it. Answered by `plan`.
        Plan(Set) = "plan",
        /// What loading several sets together would do: which GPU each gets, and what one would have to give up where not all fit.
        /// Answered by `mix`.
        PlanMix(PlanMix) = "plan-mix",
        /// Loads a component set and leases it, all or nothing. Answered by `leased`, after `planned` and `progress` where they
        /// were asked for.
        Load(Load) = "load",
        /// Stops a load that is under way; the load is then answered by an error with the code `cancelled`, unless it was
        /// done already. Answered by `cancelled`.
        Cancel(Cancel) = "cancel",
        /// Ends leases. Send it when no mapping of them is used any more: from then on the memory may be given to others. Answered by
        /// `released`.
        Release(Release) = "release",
        /// Hears of changes from now on. Answered by `subscribed`, then by events with the id of this request.
        Subscribe(Subscribe) = "subscribe",
        /// Ends a subscription. Answered by `subscribed` with what is left.
        Unsubscribe(Unsubscribe) = "unsubscribe",
        /// After a reconnection: memory of a server that is gone, which this client still maps. Its read-only descriptors travel
        /// with the message, one for each entry. The server counts the bytes until they are let go, and takes the memory over where
        /// it holds a component of the catalogue. Answered by `counted`, and by `adopted` for each entry when that is known.
        StillMapped(StillMapped) = "still-mapped",
        /// Some of what was `still-mapped` is mapped no more. Answered by `counted` with what is left.
        Unmapped(Unmapped) = "unmapped",
        /// The state of everything. Answered by `status`.
        Status(Empty) = "status",
        /// The last decisions that concern a model or a component, newest first. Answered by `decisions`.
        Why(Why) = "why",
        /// How components are used. Answered by `usage`.
        Analyse(Empty) = "analyse",
        /// Scans the model folders now. Answered by `scanned` when the result is published.
        Scan(Empty) = "scan",
        /// Ends the server gracefully: no new work, loads under way may finish. Answered by `draining`.
        Drain(Empty) = "drain",
    }
}

messages! {
    /// What a server says: replies, with the id of their request, and events.
    ServerMessage {
        /// The session is open.
        Welcome(Welcome) = "welcome",
        /// A request was refused or failed. The connection goes on, unless `goodbye` follows.
        Error(ErrorReply) = "error",
        /// Asks a client that promised signs of life for one; answer `pong`. The id is 0.
        Ping(Empty) = "ping",
        /// Answers `ping`.
        Pong(Empty) = "pong",
        /// A page of the catalogue.
        Models(Models) = "models",
        /// One model.
        Model(ModelReply) = "model",
        /// A plan.
        Plan(PlanReply) = "plan",
        /// A plan for several sets.
        Mix(MixReply) = "mix",
        /// Event of a load: the plan is made, and memory is being reserved.
        Planned(PlanReply) = "planned",
        /// Event of a load: how far it is. Only the latest is sent to a slow reader.
        Progress(Progress) = "progress",
        /// The set is resident and leased. The descriptors of new memory travel with it, in the order of `memories`. Where the load
        /// asked for `parts`, several come, each with what is there by then, and `more` in all but the last.
        Leased(Leased) = "leased",
        /// Answers `cancel`.
        Cancelled(Cancelled) = "cancelled",
        /// These leases have ended. A memory number dies with the last lease that names it, a table number never.
        Released(Released) = "released",
        /// Answers `subscribe` and `unsubscribe`.
        Subscribed(Subscribed) = "subscribed",
        /// Event: the catalogue changed.
        Catalogue(CatalogueEvent) = "catalogue",
        /// Event: something was decided.
        Decision(DecisionEvent) = "decision",
        /// Event: a session was granted components.
        Granted(GrantedEvent) = "granted",
        /// Event: how host memory stands, after each change.
        Pressure(PressureEvent) = "pressure",
        /// Event, id 0: let go of these leases within the grace period. After it they end, and the connection with them.
        Revoke(Revoke) = "revoke",
        /// Answers `still-mapped` and `unmapped`.
        Counted(Counted) = "counted",
        /// Event of a `still-mapped`: what became of one mapping.
        Adopted(Adopted) = "adopted",
        /// The state of everything, as `hotset status --json` prints it.
        Status(StatusReply) = "status",
        /// Decisions.
        Decisions(Decisions) = "decisions",
        /// How components are used, as `hotset analyse --json` prints it.
        Usage(UsageReply) = "usage",
        /// A scan is published.
        Scanned(Scanned) = "scanned",
        /// The server ends.
        Draining(Empty) = "draining",
        /// The last message of a connection that the server ends, with the reason.
        Goodbye(Goodbye) = "goodbye",
    }
}

/// Nothing beside `id` and `type`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Empty {}

/// Opens a session.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Hello {
    /// The protocol versions that the client speaks.
    pub versions: Vec<u32>,
    /// What status calls the session.
    #[serde(default)]
    pub label: String,
    /// The client's software, for the log.
    #[serde(default)]
    pub software: String,
    /// The client promises to send something at least this often, in milliseconds; after three times that in silence the
    /// server takes it for hung and ends the connection. 0: no promise, and only the end of the process ends the session.
    #[serde(default)]
    pub keep_alive_ms: u64,
}

/// The session is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Welcome {
    /// The version of all further messages.
    pub version: u32,
    /// The server's software.
    pub server: String,
    /// Tells two runs of a server apart: another value after a reconnection means that all leases are gone.
    pub instance: String,
    /// The session's number.
    pub session: u64,
    /// What the client must keep to.
    pub limits: Limits,
}

/// Bounds of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Limits {
    /// The longest frame from the client, in bytes.
    pub request_bytes: u64,
    /// The longest frame from the server, in bytes.
    pub reply_bytes: u64,
    /// The most names in one request.
    pub names: u64,
    /// The longest text, in bytes.
    pub text_bytes: u64,
    /// Requests that may be unanswered at a time, over all types.
    pub requests: u64,
    /// What may wait for a slow reader, in bytes, before the connection is ended.
    pub behind_bytes: u64,
    /// Bytes that the client may have leased, where there is a bound.
    pub quota_bytes: Option<u64>,
}

/// Why a request was refused or failed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorReply {
    /// What kind of error, for programs: see the table of codes.
    pub code: String,
    /// What happened, to what, and what to do, for people.
    pub message: String,
    /// When to try again, in milliseconds, where that helps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// Names that are like the one that was asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nearest: Vec<String>,
}

/// Why the connection ends.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Goodbye {
    /// `draining`, `slow-reader`, `silent`, `revoked`, `protocol` or `refused`.
    pub code: String,
    /// In words.
    pub message: String,
}
