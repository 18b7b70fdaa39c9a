//! hotset's supervision tree and the messages between its actors.
//!
//! One actor, one file: a private struct behind the messages that it takes. Actors decide nothing (that is
//! `hotset_core::policy`, `plan` and `predict`), parse no file and call no device; they keep order, and they survive.
//!
//! Two rules shape every file here:
//!
//! * no handler waits: what takes long runs in a task that reports back, to the [ledger](hotset_core::memory::Ledger)
//!   first and by message second, so that a killed actor loses no byte and no result;
//! * no correctness rests on a message arriving: each request carries a deadline, and a reply port that is dropped is an
//!   answer, "the actor restarted", after which the request is sent again.

mod admission;
mod adopting;
mod counters;
mod discovery;
mod guessing;
mod hot;
mod house;
mod learned;
mod loader;
mod loading;
mod monitor;
mod phases;
mod plan;
mod predictor;
mod prewarm;
mod quotas;
mod ram_cache;
mod sessions;
mod slot;
mod status;
mod supervisor;
mod system;
mod uses;
mod vram_manager;

pub use adopting::Adoption;
pub use counters::{CounterValues, Counters};
pub use house::{EvictionPolicyFactory, GpuEvent, Shortage};
pub use loading::{
    ComponentProgress, LoadError, LoadEvent, LoadProgress, Loading, Phase, SessionError,
};
pub use monitor::{MonitorView, Pressure};
pub use phases::{LoadPhase, PhaseTimes};
pub use plan::GpuChoice;
pub use predictor::PredictorView;
pub use sessions::Session;
pub use status::{
    ActorStatus, CatalogueStatus, ComponentStatus, Health, ServiceState, SessionStatus, Status,
    TierStatus, UsageReport, UsageRow,
};
pub use supervisor::ActorName;
pub use system::{Parts, ScanSummary, StartError, System};
pub use uses::{Used, UsedSet};
