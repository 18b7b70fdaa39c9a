//! What a system says of itself.

use std::sync::Arc;

use hotset_core::breaks::{self, Break};
use hotset_core::device::{DeviceDescription, Figures};
use hotset_core::memory::{ArenaView, TierView};
use hotset_core::usage::Patterns;
use hotset_core::{Bytes, ComponentId, SessionId, Tier};
use serde::Serialize;

use crate::counters::CounterValues;
use crate::monitor::MonitorView;
use crate::phases::PhaseTimes;
use crate::predictor::PredictorView;
use crate::supervisor::ActorName;
use crate::system::ScanSummary;

/// The whole system at one time.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// Whether the load path works.
    pub health: Health,
    /// Time since the start, in seconds.
    pub uptime_s: f64,
    /// It takes no new work.
    pub draining: bool,
    /// How files are read, and what led to it.
    pub reader: String,
    /// Host memory that is in use, and that is kept warm.
    pub arena: ArenaView,
    /// The most memory that this process may lock (`RLIMIT_MEMLOCK`). `None`: no limit. NVIDIA's driver pins beside it; where
    /// one does not, this is what it may pin.
    pub lockable: Option<Bytes>,
    /// Which policy evicts.
    pub eviction: String,
    /// The catalogue.
    pub catalogue: CatalogueStatus,
    /// The tiers, in the order in which memory is reserved.
    pub tiers: Vec<TierStatus>,
    /// The open sessions.
    pub sessions: Vec<SessionStatus>,
    /// Loads under way, over all sessions.
    pub loads: usize,
    /// The actors.
    pub actors: Vec<ActorStatus>,
    /// Counts since the start.
    pub counters: CounterValues,
    /// How long loads spent in each of their phases, since the start.
    pub phases: Vec<PhaseTimes>,
    /// Host memory. `None` while Monitor does not answer.
    pub monitor: Option<MonitorView>,
    /// The predictor. `None` while it does not answer.
    pub predictor: Option<PredictorView>,
}

/// Whether the load path works: every actor on it was asked and answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Health {
    /// It does.
    Green,
    /// It does in part.
    Yellow {
        /// What does not.
        problems: Vec<String>,
    },
    /// It does not.
    Red {
        /// Why.
        problems: Vec<String>,
    },
}

/// The catalogue.
#[derive(Debug, Clone, Serialize)]
pub struct CatalogueStatus {
    /// Entries.
    pub models: usize,
    /// Entries that cannot be loaded.
    pub with_error: usize,
    /// Counts the published snapshots.
    pub generation: u64,
    /// A scan is running.
    pub scanning: bool,
    /// Changes are seen as they happen.
    pub watching: bool,
    /// Folders whose changes are seen by scans at intervals only, and why.
    pub polling: Vec<String>,
    /// What the last scan found.
    pub last_scan: Option<ScanSummary>,
}

/// One tier.
#[derive(Debug, Clone, Serialize)]
pub struct TierStatus {
    /// Which.
    pub tier: Tier,
    /// The device behind it.
    pub device: Option<DeviceDescription>,
    /// What hotset may use.
    pub budget: Bytes,
    /// What it uses or has promised.
    pub committed: Bytes,
    /// The part of it that is about to be freed.
    pub evicting: Bytes,
    /// The part of it that leases hold.
    pub leased: Bytes,
    /// Sets that wait for memory here. `None` while the keeper does not answer.
    pub waiting: Option<usize>,
    /// Why it is out of service, where it is.
    pub out_of_service: Option<Arc<str>>,
    /// What the device behind it said last.
    pub figures: Option<Figures>,
    /// What is there or on its way, largest first.
    pub components: Vec<ComponentStatus>,
}

/// One residency.
#[derive(Debug, Clone, Serialize)]
pub struct ComponentStatus {
    /// Which component.
    pub component: ComponentId,
    /// `loading` or `resident`.
    pub residency: &'static str,
    /// What it takes in the tier.
    pub bytes: Bytes,
    /// Leases on it.
    pub leases: u32,
    /// How often it was asked for since it came.
    pub uses: u64,
    /// Time since it was last asked for, in seconds.
    pub idle_s: f64,
    /// How long its load took, in seconds.
    pub load_s: Option<f64>,
    /// Loaded on a guess, and not asked for since.
    pub prefetched: bool,
}

/// One session.
#[derive(Debug, Clone, Serialize)]
pub struct SessionStatus {
    /// Its number.
    pub id: SessionId,
    /// What its client calls it.
    pub label: String,
    /// Leases that it holds.
    pub leases: usize,
    /// Time since it was opened, in seconds.
    pub age_s: f64,
}

/// Whether an actor works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServiceState {
    /// It does.
    Running,
    /// It failed and is about to be started again.
    Restarting,
    /// It failed too often and stays down.
    OutOfService,
}

impl std::fmt::Display for ServiceState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Running => "running",
            Self::Restarting => "restarting",
            Self::OutOfService => "out of service",
        })
    }
}

/// One actor.
#[derive(Debug, Clone, Serialize)]
pub struct ActorStatus {
    /// Which.
    pub name: ActorName,
    /// Whether it works.
    pub state: ServiceState,
    /// How often it was started again.
    pub restarts: u64,
    /// Why it ended last.
    pub last_failure: Option<String>,
    /// Messages that may be waiting for it.
    pub mailbox: u64,
}

/// How components are used: the answer to "analyse usage patterns".
#[derive(Debug, Clone, Serialize)]
pub struct UsageReport {
    /// Counts since the start.
    pub counters: CounterValues,
    /// Share of requested components that were resident already, 0 to 1; `None` before the first request.
    pub hit_share: Option<f64>,
    /// The components that are resident, most used first.
    pub hot: Vec<UsageRow>,
    /// What is used together, how soon again, what was evicted too early, loaded in vain, and waited for.
    pub patterns: Patterns,
    /// What the predictor knows.
    pub predictor: Option<PredictorView>,
}

/// The use of one resident component.
#[derive(Debug, Clone, Serialize)]
pub struct UsageRow {
    /// Which.
    pub component: ComponentId,
    /// Where.
    pub tier: Tier,
    /// How large.
    pub bytes: Bytes,
    /// How often it was asked for since it came.
    pub uses: u64,
    /// Time since it was last asked for, in seconds.
    pub idle_s: f64,
}

impl TierStatus {
    pub(crate) fn new(
        view: TierView,
        device: Option<DeviceDescription>,
        waiting: Option<usize>,
        figures: Option<Figures>,
        now: std::time::Duration,
    ) -> Self {
        Self {
            tier: view.tier,
            device,
            budget: view.budget,
            committed: view.committed + Bytes(u64::from(breaks::is(Break::WrongStatus))),
            evicting: view.evicting,
            leased: view
                .residencies
                .iter()
                .filter(|residency| residency.leases > 0)
                .map(|residency| residency.bytes)
                .sum(),
            waiting,
            out_of_service: view.out_of_service,
            figures,
            components: view
                .residencies
                .iter()
                .map(|residency| ComponentStatus {
                    component: residency.component.id.clone(),
                    residency: if residency.loading {
                        "loading"
                    } else {
                        "resident"
                    },
                    bytes: residency.bytes,
                    leases: residency.leases,
                    uses: residency.uses,
                    idle_s: now.saturating_sub(residency.last_used).as_secs_f64(),
                    load_s: residency.load_time.map(|time| time.as_secs_f64()),
                    prefetched: residency.prefetched,
                })
                .collect(),
        }
    }
}
