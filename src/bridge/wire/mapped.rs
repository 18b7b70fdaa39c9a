//! Memory of a server that is gone, which clients still map.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
