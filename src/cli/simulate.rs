//! `hotset chaos --seeds 0..1000`: the system in simulation.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hotset::chaos::{Outcome, PlannedFault, Profile, Scenario, Workload, run, shrink};
use hotset::core::replay::Trace;
use serde::Serialize;

use super::{CliError, Global, output};

/// `0..1000`
pub(super) fn seeds(text: &str) -> Result<Range<u64>, String> {
    let (from, to) = text
        .split_once("..")
        .ok_or("write FROM..TO, such as 0..1000")?;
    let number = |text: &str| {
        text.trim()
            .parse()
            .map_err(|_| format!("`{text}` is no number"))
    };
    Ok(number(from)?..number(to)?)
}

/// A profile by its name.
pub(super) fn profile(text: &str) -> Result<Profile, String> {
    let found = Profile::ALL.into_iter().find(|p| p.name() == text);
    found.ok_or_else(|| format!("one of {}", Profile::ALL.map(Profile::name).join(", ")))
}

/// What is to be simulated.
pub(super) struct Simulation<'a> {
    pub(super) seeds: Range<u64>,
    pub(super) profiles: Vec<Profile>,
    /// Recorded requests in the place of those that hotset comes with, and their components.
    pub(super) requests: Option<(&'a Path, &'a Path)>,
    pub(super) minutes: f64,
    pub(super) rate: u64,
    pub(super) trace: bool,
}

/// One load under which the seeds are run.
struct Load {
    name: &'static str,
    scenario: Scenario,
}

#[derive(Serialize)]
struct Told {
    profile: &'static str,
    seed: u64,
    invariant: &'static str,
    message: String,
    /// As few of the faults, and as early, as still break it.
    faults: Vec<PlannedFault>,
    log: Vec<String>,
}

#[derive(Default, Serialize)]
struct Report {
    seeds: u64,
    faults_injected: u64,
    /// The same by kind.
    faults: BTreeMap<&'static str, u64>,
    /// How often a fault of each kind showed.
    effects: BTreeMap<&'static str, u64>,
    requests: u64,
    granted: u64,
    prefetches: u64,
    events: u64,
    /// Hours of service that were simulated.
    hours: f64,
    /// Seconds that it took.
    took_s: f64,
    violations: Vec<Told>,
}

/// Seeds that are told with their log; one cause breaks many.
const TOLD: usize = 5;

/// How often it is told how far it has come.
const TELL: Duration = Duration::from_secs(30);

fn loads(simulation: &Simulation<'_>, config: &hotset::Config) -> Result<Vec<Load>, CliError> {
    let scenario = |workload| Scenario {
        workload,
        config: config.clone(),
        time: Duration::from_secs_f64(simulation.minutes.max(0.0) * 60.0),
        rate: simulation.rate,
        log: if simulation.trace { usize::MAX } else { 200 },
        ..Scenario::of(Profile::Hot)
    };
    if let Some((requests, components)) = simulation.requests {
        let read = |path: &Path| {
            std::fs::read_to_string(path).map_err(|source| CliError::File {
                path: path.to_owned(),
                source,
            })
        };
        let trace = Trace::read(&read(requests)?, Some(&read(components)?))
            .map_err(|error| CliError::Usage(error.to_string()))?;
        return Ok(vec![Load {
            name: Profile::Recorded.name(),
            scenario: scenario(Workload::Recorded(Arc::new(trace))),
        }]);
    }
    let of = |profile: &Profile| Load {
        name: profile.name(),
        scenario: scenario(profile.workload()),
    };
    Ok(simulation.profiles.iter().map(of).collect())
}

/// Runs the seeds under each load, on all cores.
pub(super) fn simulate(simulation: &Simulation<'_>, global: &Global) -> Result<(), CliError> {
    let loads = loads(simulation, &super::config(global)?)?;
    let (report, failed) = (Mutex::new(Report::default()), Mutex::new(None));
    let (next, began) = (AtomicU64::new(0), Instant::now());
    let seeds = simulation.seeds.end.saturating_sub(simulation.seeds.start);
    let jobs = seeds * loads.len() as u64;
    let told = AtomicU64::new(0);
    let work = || {
        loop {
            // One seed under each load in turn, so that a run that is stopped has seen all of them.
            let job = next.fetch_add(1, Ordering::Relaxed);
            let Some(load) = loads.get((job % loads.len().max(1) as u64) as usize) else {
                return;
            };
            if job >= jobs || lock(&failed).is_some() {
                return;
            }
            let seed = simulation.seeds.start + job / loads.len() as u64;
            match run(&load.scenario, seed) {
                Ok(outcome) => add(&report, load, outcome, simulation.trace),
                Err(error) => *lock(&failed) = Some(error),
            }
            let due = began.elapsed().as_secs() / TELL.as_secs();
            if told.fetch_max(due, Ordering::Relaxed) < due {
                let report = lock(&report);
                output::tell(format_args!(
                    "{} of {jobs} seeds, {} faults, {} violations",
                    report.seeds,
                    report.faults_injected,
                    report.violations.len()
                ));
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    if let Some(error) = lock(&failed).take() {
        return Err(CliError::Usage(error.to_string()));
    }
    let mut report = std::mem::take(&mut *lock(&report));
    report.took_s = began.elapsed().as_secs_f64();
    tell(&report, global)?;
    match report.violations.len() as u64 {
        0 => Ok(()),
        violated => Err(CliError::Violations { violated }),
    }
}

fn tell(report: &Report, global: &Global) -> Result<(), CliError> {
    if global.json {
        return output::json(report);
    }
    for told in &report.violations {
        for line in &told.log {
            output::line(line)?;
        }
        output::line(format!("faults that are needed: {:?}", told.faults))?;
        output::line(format!(
            "{}, seed {}: {}: {}; again: hotset chaos --profile {} --seed {} --trace",
            told.profile, told.seed, told.invariant, told.message, told.profile, told.seed
        ))?;
    }
    output::line(format!(
        "{} seeds, {:.1} h of service in {:.1} s, {} faults, {} requests ({} granted), {} events, {} violations",
        report.seeds,
        report.hours,
        report.took_s,
        report.faults_injected,
        report.requests,
        report.granted,
        report.events,
        report.violations.len()
    ))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn add(report: &Mutex<Report>, load: &Load, outcome: Outcome, trace: bool) {
    if trace {
        for line in &outcome.log {
            output::tell(line);
        }
    }
    let told = {
        let mut report = lock(report);
        report.seeds += 1;
        report.faults_injected += outcome.faults.len() as u64;
        for planned in &outcome.faults {
            *report.faults.entry(planned.fault.kind()).or_default() += 1;
        }
        for (kind, count) in &outcome.effects {
            *report.effects.entry(kind).or_default() += count;
        }
        report.requests += outcome.requests;
        report.granted += outcome.granted;
        report.prefetches += outcome.prefetches;
        report.events += outcome.events;
        report.hours += outcome.time.as_secs_f64() / 3600.0;
        report.violations.len()
    };
    if outcome.violations.is_empty() {
        return;
    }
    let first = outcome.clone();
    let small = if told < TOLD {
        shrink(&load.scenario, outcome).unwrap_or(first)
    } else {
        first
    };
    if let Some(violation) = small.violations.first().cloned() {
        lock(report).violations.push(Told {
            profile: load.name,
            seed: small.seed,
            invariant: violation.invariant.name(),
            message: violation.message,
            faults: small.faults,
            log: if told < TOLD { small.log } else { Vec::new() },
        });
    }
}
