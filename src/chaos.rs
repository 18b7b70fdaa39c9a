//! The whole system under faults, in virtual time, from one seed.
//!
//! The real actors, messages, policy and planner run on one thread with a paused clock, over simulated GPUs, a simulated
//! disk and simulated clients. The same seed gives the same events, bit for bit, so a seed that breaks an invariant breaks it
//! again. After every event the [`Invariant`]s are checked, and once more when faults have stopped and clients have gone.
//!
//! A host brings its own load by a [`Workload`]: which sets its clients ask for. [`run`] takes one seed, [`shrink`] finds a
//! smaller list of faults that breaks the same invariant.
//!
//! ```
//! use hotset::chaos::{Profile, Scenario, run};
//!
//! let outcome = run(&Scenario::of(Profile::Thrash), 7)?;
//! assert!(outcome.violations.is_empty());
//! assert_eq!(outcome.trace, run(&Scenario::of(Profile::Thrash), 7)?.trace);
//! # Ok::<(), hotset::chaos::ChaosError>(())
//! ```

mod after;
mod check;
mod clients;
mod disk;
mod faults;
mod library;
mod panicking;
mod simulate;
mod workload;
mod world;

use std::collections::BTreeMap;
use std::time::Duration;

use hotset_core::breaks;
use serde::Serialize;

pub use check::{Invariant, Violation};
pub use faults::{Fault, PlannedFault};
pub use workload::{Ask, Profile, Workload};

/// Why a run could not begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChaosError {
    /// The simulated library could not be written.
    #[error("cannot write the models of a simulation: {0}; is the temporary folder full?")]
    Library(#[from] std::io::Error),
    /// The system did not start.
    #[error(transparent)]
    Start(#[from] crate::StartError),
    /// A part was to be broken in a build that has nothing to break.
    #[error(
        "nothing can be broken on purpose in this build: it lacks hotset-core's feature `breaks`"
    )]
    Unbreakable,
}

/// What every seed of a run has in common.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// What the clients ask for.
    pub workload: Workload,
    /// Values that matter to a host: policy, watermarks, bounds. Folders, budgets and GPUs are the simulation's, and so are, but
    /// for every eighth seed, the bounds on restarts.
    pub config: crate::Config,
    /// How long faults and clients go on, in virtual time.
    pub time: Duration,
    /// Faults each second, on average; every fourth seed has few whatever this says.
    pub rate: u64,
    /// These faults, instead of those that the seed draws.
    pub faults: Option<Vec<PlannedFault>>,
    /// The last events that an outcome keeps.
    pub log: usize,
    /// A part that is broken on purpose, to see that the invariant notices.
    pub broken: Option<Invariant>,
}

impl Scenario {
    /// Faults each second where nobody says otherwise: as many as leave most loads to be granted.
    pub const RATE: u64 = 12;

    /// A profile, with the default configuration, for a minute.
    #[must_use]
    pub fn of(profile: Profile) -> Self {
        Self {
            workload: profile.workload(),
            config: crate::Config::default(),
            time: Duration::from_secs(60),
            rate: Self::RATE,
            faults: None,
            log: 200,
            broken: None,
        }
    }
}

/// What one seed gave.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// A digest of all events with their times and of all decisions. Equal seeds have equal ones.
    pub trace: u64,
    /// The faults, in their order.
    pub faults: Vec<PlannedFault>,
    /// How often a fault of each kind showed: in a read or a call that failed by it, in an actor that ended, in the books.
    pub effects: BTreeMap<&'static str, u64>,
    /// Loads that clients asked for.
    pub requests: u64,
    /// Loads that were granted.
    pub granted: u64,
    /// Loads on a guess.
    pub prefetches: u64,
    /// Time that passed in the simulation.
    pub time: Duration,
    /// Events, after each of which the invariants were checked.
    pub events: u64,
    /// What must never be.
    pub violations: Vec<Violation>,
    /// The last events.
    pub log: Vec<String>,
}

/// Runs one seed, on a runtime and a thread of its own.
///
/// # Errors
/// [`ChaosError`].
pub fn run(scenario: &Scenario, seed: u64) -> Result<Outcome, ChaosError> {
    let part = scenario.broken.and_then(Invariant::broken_by);
    if part.is_some() && !breaks::POSSIBLE {
        return Err(ChaosError::Unbreakable);
    }
    let simulate = || {
        // For this thread alone.
        breaks::set(part);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()?;
        runtime.block_on(simulate::simulate(scenario, seed))
    };
    // Its own thread: a run may be asked for from inside of another runtime.
    std::thread::scope(|scope| scope.spawn(simulate).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The most runs to find a smaller list of faults: some minutes, for a long list that hardly gets smaller.
const SHRINK_RUNS: usize = 300;

/// Finds a smaller list of faults with which the seed still breaks the invariant: half of them, then single ones, and each
/// as early as it may be. Gives the outcome with the smallest list that was found in some hundred runs.
///
/// # Errors
/// [`ChaosError`].
pub fn shrink(scenario: &Scenario, found: Outcome) -> Result<Outcome, ChaosError> {
    let Some(broken) = found.violations.first().map(|v| v.invariant) else {
        return Ok(found);
    };
    let mut best = found;
    let mut left = SHRINK_RUNS;
    let again = |faults: Vec<PlannedFault>, seed| {
        let scenario = Scenario {
            faults: Some(faults),
            ..scenario.clone()
        };
        run(&scenario, seed)
    };
    let breaks = |outcome: &Outcome| outcome.violations.iter().any(|v| v.invariant == broken);
    let mut piece = best.faults.len().div_ceil(2);
    while piece > 0 {
        let mut at = 0;
        while at < best.faults.len() && left > 0 {
            left -= 1;
            let mut fewer = best.faults.clone();
            fewer.drain(at..(at + piece).min(fewer.len()));
            let outcome = again(fewer, best.seed)?;
            if breaks(&outcome) {
                best = outcome;
            } else {
                at += piece;
            }
        }
        piece /= 2;
    }
    for i in 0..best.faults.len().min(left) {
        let mut earlier = best.faults.clone();
        if let Some(fault) = earlier.get_mut(i) {
            fault.at_ms /= 2;
        }
        earlier.sort_by_key(|fault| fault.at_ms);
        let outcome = again(earlier, best.seed)?;
        if breaks(&outcome) {
            best = outcome;
        }
    }
    Ok(best)
}
