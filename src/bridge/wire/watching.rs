//! Subscriptions, their events, and questions about the system.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

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
