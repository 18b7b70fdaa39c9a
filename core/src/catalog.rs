//! Knowing every model for what it is: formats, layouts on disk, scanning, and the snapshot that readers take.
//!
//! A scan has four steps, each in a file of its own: `walk` lists folders and takes the identity of every file,
//! `layout` sees which files make one entry, `inspect` reads the headers and configurations of the entries
//! that are new, and `naming` gives every entry a name of its own. [`snapshot`] is what comes out.

pub mod bench;
mod config_json;
pub mod content;
mod contents;
pub mod gguf;
mod gone;
mod header;
pub mod hub;
mod identify;
mod inspect;
mod layout;
mod model;
mod naming;
mod outline;
pub mod query;
mod read;
pub mod safetensors;
pub mod scan;
pub mod settle;
mod signatures;
pub mod snapshot;
pub mod store;
#[cfg(test)]
pub(crate) mod test_utils;
mod walk;
mod weights;

pub use gone::keep_leased;
pub use header::{HeaderError, read_tensors};
pub use model::{
    BaseModel, Component, DEVICE_TENSOR_ALIGN, Evidence, Facts, FileIdentity, FileRange, Format,
    IMAGE_ALIGN, Kind, Model, Part, Presence, Selection, SourceFile, Tokenizer,
};
pub use scan::{ScanOptions, ScanProgress, ScanReport, identity_of, rescan, scan};
pub use signatures::{SignatureError, Signatures};
pub use snapshot::{Catalogue, CatalogueCell, Change, FindError};
pub use walk::ScanProblem;
