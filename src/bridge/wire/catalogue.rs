//! What is there, and what of it changed.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

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

/// What a scan found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Scanned {
    /// Entries, files, problems and time.
    pub summary: Value,
}
