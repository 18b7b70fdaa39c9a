//! Plans, loads and leases.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

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

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
const fn is_false(value: &bool) -> bool {
    !*value
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
