//! The messages of the bridge: their one definition. docs/protocol.md is made from these types.
//!
//! Every message is a MessagePack map with `id`, `type` and the fields of its body. Fields that are not known are ignored,
//! so that a later version may add some.

use schemars::{JsonSchema, Schema, schema_for};
use serde::{Deserialize, Serialize};
use serde_json::Value;

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

/// What to list.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct List {
    /// Words in any order, and fields such as `kind:lora base:sdxl size:<200MiB`; best matches first. Empty: everything, by name.
    #[serde(default)]
    pub query: String,
    /// How many to leave out at the front.
    #[serde(default)]
    pub offset: u64,
    /// How many to give at most; 0: as many as a page holds.
    #[serde(default)]
    pub limit: u64,
}

/// A page of the catalogue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Models {
    /// Counts the published catalogues.
    pub generation: u64,
    /// How many fit, over all pages.
    pub total: u64,
    /// The models, as `hotset ls --json` prints them.
    pub models: Vec<Value>,
}

/// Which model.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Show {
    /// Its name, or the last part of it where that is enough. The path of its file or folder is understood too: it is
    /// looked up in the catalogue, and never opened.
    pub name: String,
}

/// One model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ModelReply {
    /// The model, as `hotset show --json` prints it; `resident` has the tiers in which each component is, by its name.
    pub model: Value,
}

/// A component set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Set {
    /// Models (`sdxl-base`: all components) and components (`sdxl-base/unet`), by their names in the catalogue.
    pub names: Vec<String>,
    /// Where to: `best`, `ram`, `vram` or `vram:N`.
    #[serde(default = "best")]
    pub target: String,
    /// Whether the bases of adapters are part of the set.
    #[serde(default = "yes")]
    pub dependencies: bool,
    /// Whether components that no GPU has room for may be split.
    #[serde(default)]
    pub split: bool,
}

/// Several sets that are wanted together.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PlanMix {
    /// The sets.
    pub sets: Vec<Set>,
    /// The GPUs that they may have, by number. Empty: all.
    #[serde(default)]
    pub gpus: Vec<u32>,
    /// Instead of these: empty GPUs of so many bytes each, which need not exist.
    #[serde(default)]
    pub imagined: Vec<u64>,
}

/// A plan for several sets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct MixReply {
    /// The plan, as `hotset plan --gpus .. --json` prints it.
    pub mix: Value,
}

fn best() -> String {
    "best".into()
}

const fn yes() -> bool {
    true
}

/// A plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PlanReply {
    /// The plan, as `hotset plan --json` prints it.
    pub plan: Value,
}

/// What to load.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Load {
    /// Models (`sdxl-base`: all components) and components (`sdxl-base/unet`), by their names in the catalogue.
    pub names: Vec<String>,
    /// Where to: `best`, `ram`, `vram` or `vram:N`.
    #[serde(default = "best")]
    pub target: String,
    /// Whether the bases of adapters are part of the set.
    #[serde(default = "yes")]
    pub dependencies: bool,
    /// `interactive`: somebody waits for it; `batch`: nobody does, and others go first; `prefetch`: nobody may ever, and it is loaded
    /// when links are idle.
    #[serde(default = "interactive")]
    pub priority: String,
    /// How long it may take, in milliseconds; the server's `load.deadline` where it is not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Whether to send `planned` and `progress`.
    #[serde(default)]
    pub progress: bool,
    /// Whether the client lets go when it is asked to (`revoke`), so that others may have the memory.
    #[serde(default)]
    pub preemptible: bool,
    /// Whether the client takes components that are split between a GPU and RAM (`part` in their leases), where they are too
    /// large for any GPU.
    #[serde(default)]
    pub split: bool,
    /// How long the components stay after their last lease: `5m`, `90s`, a number of seconds, `0` for none, `-1` for as long as nobody
    /// needs the memory. The server's `load.keep_alive` where it is not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive: Option<String>,
    /// Whether leases are sent as they come, in loading order, while the rest still loads. A load that fails after that takes none
    /// of them back.
    #[serde(default)]
    pub parts: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
const fn is_false(value: &bool) -> bool {
    !*value
}

fn interactive() -> String {
    "interactive".into()
}

/// How far a load is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Progress {
    /// What it does, in words.
    pub stage: String,
    /// What has arrived, in bytes.
    pub done: u64,
    /// What will have, in bytes.
    pub total: u64,
    /// Time since the load was asked for, in seconds.
    pub elapsed_s: f64,
    /// Mean rate since the first byte, in bytes each second.
    pub bytes_per_s: f64,
    /// What is left at that rate, in seconds.
    pub eta_s: Option<f64>,
    /// Each component, in loading order.
    pub components: Vec<ComponentProgress>,
}

/// How far one component is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ComponentProgress {
    /// Which: `model/component`.
    pub component: String,
    /// `waiting`, `loading` or `ready`.
    pub phase: String,
    /// It was there already, or on its way for somebody else.
    pub shared: bool,
    /// What has arrived, in bytes.
    pub done: u64,
    /// What will have, in bytes.
    pub total: u64,
}

/// The leases of a set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Leased {
    /// One for each component, in loading order.
    pub leases: Vec<LeasedComponent>,
    /// Memory that this connection has no number for yet. A number holds until the last lease that names it is `released`.
    #[serde(default)]
    pub memories: Vec<Memory>,
    /// Tensor tables that this connection has no number for yet. A number holds for the rest of the connection.
    #[serde(default)]
    pub tables: Vec<Table>,
    /// How many descriptors travel with this message.
    #[serde(default)]
    pub descriptors: u64,
    /// Whether further leases of this load follow.
    #[serde(default, skip_serializing_if = "is_false")]
    pub more: bool,
}

/// One lease.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LeasedComponent {
    /// Its number.
    pub lease: u64,
    /// The component: `model/component`.
    pub component: String,
    /// The identity of its bytes.
    pub content: String,
    /// Where it is: `ram` or `vram:N`.
    pub tier: String,
    /// Bytes of its tensors.
    pub bytes: u64,
    /// The memory that it lies in.
    pub memory: u64,
    /// The table of its tensors.
    pub table: u64,
    /// Of a component that is split: which blocks of it these are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<Part>,
}

/// Some blocks of a component that is split between a GPU and RAM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Part {
    /// The whole component: `model/component`.
    pub of: String,
    /// What the names of each block's tensors begin with, in the order in which blocks are used.
    pub blocks: Vec<String>,
    /// The place of the first of them among all blocks.
    pub first: u64,
    /// How many blocks the whole has.
    pub of_blocks: u64,
    /// Whether the tensors that belong to no block are here.
    pub shared: bool,
}

/// Memory that can be mapped.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Memory {
    /// Its number on this connection.
    pub memory: u64,
    /// `ram` or `vram:N`.
    pub tier: String,
    /// How much there is to map, in bytes.
    pub bytes: u64,
    /// Where in the descriptor it begins: in host memory a multiple of the page size.
    #[serde(default)]
    pub offset: u64,
    /// Of a device's memory: the size of all that the descriptor stands for, which has to be imported and mapped whole
    /// (`cuMemImportFromShareableHandle`, `cuMemMap`). 0 for host memory.
    #[serde(default)]
    pub mapped: u64,
    /// Of a device's memory: the UUID of the GPU that it lies on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<String>,
    /// Whether a descriptor comes with it. Without one it cannot be mapped by others: `reason` says why.
    pub descriptor: bool,
    /// Why there is no descriptor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// The tensors of a component.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Table {
    /// Its number on this connection.
    pub table: u64,
    /// MessagePack in a binary field, so that a client may leave it unread until a tensor is asked for: an array with, for each
    /// tensor, `[name, dtype, shape, offset, bytes]`, by name. `offset` counts from the start of the memory.
    #[serde(with = "serde_bytes")]
    #[schemars(with = "Vec<u8>")]
    pub tensors: Vec<u8>,
}

/// Which load to stop.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Cancel {
    /// The `id` of its request.
    pub request: u64,
}

/// Whether there was a load to stop.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Cancelled {
    /// It was under way.
    pub found: bool,
}

/// Which leases to end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Release {
    /// Their numbers. Unknown ones are no error: they have ended.
    pub leases: Vec<u64>,
}

/// Which leases ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Released {
    /// Their numbers.
    pub leases: Vec<u64>,
}

/// What to hear of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Subscribe {
    /// `catalogue`, `decisions`, `granted`, `pressure`.
    pub topics: Vec<String>,
}

/// What to hear of no more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Unsubscribe {
    /// Of these. Empty: of nothing.
    #[serde(default)]
    pub topics: Vec<String>,
}

/// What the connection hears of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Subscribed {
    /// The topics.
    pub topics: Vec<String>,
}

/// The catalogue changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CatalogueEvent {
    /// What changed. Empty where `missed` is not 0.
    pub changes: Vec<ModelChange>,
    /// This connection was too far behind and missed so many changes: list again.
    #[serde(default)]
    pub missed: u64,
}

/// A changed catalogue entry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ModelChange {
    /// `added`, `changed` or `removed`.
    pub change: String,
    /// The model's name.
    pub name: String,
}

/// Something was decided.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DecisionEvent {
    /// The decision, as `hotset why --json` prints it. `null` where `missed` is not 0.
    pub decision: Value,
    /// The same as one sentence.
    pub sentence: String,
    /// This connection was too far behind and missed so many.
    #[serde(default)]
    pub missed: u64,
}

/// A session was granted components: what `hotset record` writes down.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct GrantedEvent {
    /// When, in seconds since the start of the server.
    pub at_s: f64,
    /// The session's number.
    pub session: u64,
    /// What it was granted.
    pub components: Vec<GrantedComponent>,
    /// This connection was too far behind and missed so many; the rest is empty then.
    #[serde(default)]
    pub missed: u64,
}

/// A component that was granted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GrantedComponent {
    /// Its name, `MODEL/COMPONENT`.
    pub component: String,
    /// Its content id.
    pub content: String,
    /// Its kind.
    pub kind: String,
    /// Its bytes.
    pub bytes: u64,
}

/// How host memory stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PressureEvent {
    /// `unknown`, `none` or `high`.
    pub pressure: String,
    /// The kernel's figures.
    pub host: Value,
}

/// Let go.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Revoke {
    /// Of these leases.
    pub leases: Vec<u64>,
    /// Within this time, in milliseconds; 0 where their memory is gone already, with its GPU.
    pub grace_ms: u64,
    /// Why.
    pub reason: String,
}

/// Memory of a server that is gone, which is still mapped.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StillMapped {
    /// One entry for each descriptor, in their order.
    pub memories: Vec<MappedMemory>,
}

/// One mapping of a client.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MappedMemory {
    /// The component that lies in it: `model/component`.
    pub component: String,
    /// The identity of its bytes.
    pub content: String,
    /// `ram` or `vram:N`.
    pub tier: String,
    /// How much is mapped, in bytes.
    pub bytes: u64,
}

/// What is no longer mapped.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Unmapped {
    /// Numbers from `counted`.
    pub mappings: Vec<u64>,
}

/// What the server counts for this client.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Counted {
    /// A number for each entry of `still-mapped`, in their order. Empty in the answer to `unmapped`.
    pub mappings: Vec<u64>,
    /// Bytes that are charged to the budget for the mappings of this connection now. What several connections map counts once.
    pub bytes: u64,
    /// Of them, bytes by which the budget is passed: nothing more is granted until so much has come back.
    #[serde(default)]
    pub over_budget: u64,
}

/// What became of a mapping.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Adopted {
    /// Its number from `counted`.
    pub mapping: u64,
    /// The component: `model/component`.
    pub component: String,
    /// The component is resident in that memory, leased to this connection until it is `unmapped`, and loaded without being read. Otherwise
    /// it is counted and no more.
    pub resident: bool,
    /// Why it is not taken over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StatusReply {
    /// The document.
    pub status: Value,
}

/// Which decisions.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Why {
    /// A model or a component (`model/component`). Empty: all.
    #[serde(default)]
    pub name: String,
    /// How many at most; 0: a hundred.
    #[serde(default)]
    pub limit: u64,
}

/// Decisions, newest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Decisions {
    /// As `hotset why --json` prints them.
    pub decisions: Vec<Value>,
    /// Each as one sentence.
    pub sentences: Vec<String>,
}

/// How components are used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct UsageReply {
    /// The document.
    pub usage: Value,
}

/// What a scan found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Scanned {
    /// Entries, files, problems and time.
    pub summary: Value,
}

/// Why the connection ends.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Goodbye {
    /// `draining`, `slow-reader`, `silent`, `revoked`, `protocol` or `refused`.
    pub code: String,
    /// In words.
    pub message: String,
}
