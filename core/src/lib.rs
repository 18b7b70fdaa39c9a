//! The floors of hotset that need no actor: what models are made of, where their bytes are, what to keep and
//! what to drop.
//!
//! * [`catalog`] knows model files: formats, layouts on disk, scanning, the immutable catalogue snapshot;
//! * [`memory`] owns bytes: slabs, the ledger of residencies, reservations and leases;
//! * [`io`] reads files into slabs;
//! * [`machine`] tells what this process may really use of the machine's memory;
//! * [`device`] is the contract with a GPU, and its simulation;
//! * [`policy`], [`plan`] and [`predict`] are pure: state and `now` in, decisions out.
//! * [`usage`] sums up how components are used.
//! * [`replay`] runs recorded requests through simulated tiers, with the same policies.
//!
//! Nothing here spawns an actor or knows one. `policy`, `plan` and `predict` read no clock and touch no file.

#[doc(hidden)]
pub mod breaks;
pub mod catalog;
pub mod config;
pub mod decision;
pub mod device;
pub mod ids;
pub mod io;
pub mod machine;
pub mod memory;
pub mod plan;
pub mod policy;
pub mod predict;
mod random;
pub mod replay;
#[doc(hidden)]
pub mod sync;
pub mod tensor;
pub mod units;
pub mod usage;
pub mod watch;

pub use ids::{ComponentId, ContentId, GpuIndex, LeaseId, ModelName, RequestId, SessionId, Tier};
pub use units::Bytes;
