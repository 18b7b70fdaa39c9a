//! hotset keeps the right model weights resident: it is the one owner of weight bytes on a machine.
//!
//! This crate is what a host embeds. A [`Hotset`] discovers models, moves component sets from disk to RAM to VRAM, all or
//! nothing, and leases the bytes zero-copy:
//!
//! ```no_run
//! use hotset::{ComponentSet, Config, Hotset};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let mut config = Config::default();
//! config.catalog.roots = vec!["models".into()];
//! let hotset = Hotset::builder().config(config).start().await?;
//! let session = hotset.session("my worker").await?;
//! let leases = session.load(ComponentSet::new(["sdxl-base"])).leases().await?;
//! for lease in &leases {
//!     println!("{}: {} tensors", lease.component().id, lease.tensors().count());
//! }
//! drop(leases);
//! hotset.drain().await;
//! # Ok(())
//! # }
//! ```
//!
//! What a host may want, and where it is:
//!
//! | wish | call |
//! |---|---|
//! | load a component set | [`Session::load`] |
//! | analyse component dependencies | [`Hotset::dependencies`] |
//! | execute parallel component loading | [`Session::load`], `load.concurrency` in the configuration |
//! | optimise component allocation | [`Hotset::plan`], [`Hotset::plan_mix`]; every load is placed by it |
//! | optimise the cache | [`Hotset::optimise_cache`] |
//! | enable predictive caching | [`Hotset::enable_predictive_caching`] |
//! | analyse usage patterns | [`Hotset::analyse_usage`] |
//! | handle memory pressure | [`Hotset::handle_memory_pressure`]; the monitor calls it by itself |
//! | optimise discovery | unchanged files are not read again; `catalog.threads`, `catalog.watch` |
//! | execute an optimised scan | [`Hotset::scan`] |
//! | enhance metadata, build the model index | every scan does; [`Hotset::catalogue`] is the index |

pub mod bridge;
pub mod chaos;
pub mod client;
mod config;
mod decisions_file;
pub mod documents;
mod embed;
pub mod http;

pub use config::{ConfigError, ConfigSources, Loaded, Origin, load_config};
pub use embed::{Hotset, HotsetBuilder, StartError};
pub(crate) use hotset_actors::Adoption;
pub use hotset_actors::{
    ActorName, ActorStatus, CatalogueStatus, ComponentProgress, ComponentStatus, CounterValues,
    EvictionPolicyFactory, GpuChoice, GpuEvent, Health, LoadError, LoadEvent, LoadPhase,
    LoadProgress, Loading, MonitorView, Phase, PhaseTimes, PredictorView, Pressure, ScanSummary,
    ServiceState, Session, SessionError, SessionStatus, Shortage, Status, TierStatus, UsageReport,
    UsageRow, Used, UsedSet,
};
/// The floors below, for hosts that bring their own device, reader or eviction policy.
pub use hotset_core as core;
pub use hotset_core::catalog::{Catalogue, Change, Component, Format, Kind, Model};
pub use hotset_core::config::Config;
pub use hotset_core::decision::{Act, Decision, EvictCause};
pub use hotset_core::device::{Device, DeviceError};
pub use hotset_core::memory::{Lease, LeaseError, Place, TensorView};
pub use hotset_core::plan::{
    ComponentSet, DependencyGraph, KeepAlive, MixPlan, Plan, PlanError, Priority, Target,
};
pub use hotset_core::tensor::Dtype;
pub use hotset_core::{
    Bytes, ComponentId, ContentId, GpuIndex, LeaseId, ModelName, RequestId, SessionId, Tier,
};
