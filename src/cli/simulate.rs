//! `hotset chaos --seeds 0..1000`: the system in simulation.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hotset::chaos::{Outcome, PlannedFault, Profile, Scenario, run, shrink};
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
    faults: BTreeMap<&'static str, u64>,
    requests: u64,
    granted: u64,
    events: u64,
    violations: Vec<Told>,
}

/// Seeds that are told with their log; one cause breaks many.
const TOLD: usize = 5;

/// Runs the seeds under each profile, on all cores.
pub(super) fn simulate(
    seeds: &Range<u64>,
    profiles: &[Profile],
    minutes: f64,
    rate: u64,
    trace: bool,
    global: &Global,
) -> Result<(), CliError> {
    let config = super::config(global)?;
    let report = Mutex::new(Report::default());
    let failed = Mutex::new(None);
    for profile in profiles {
        let scenario = Scenario {
            config: config.clone(),
            time: Duration::from_secs_f64(minutes.max(0.0) * 60.0),
            rate,
            log: if trace { usize::MAX } else { 200 },
            ..Scenario::of(*profile)
        };
        let next = AtomicU64::new(seeds.start);
        let work = || {
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= seeds.end {
                    return;
                }
                match run(&scenario, seed) {
                    Ok(outcome) => add(&report, &scenario, *profile, outcome, trace),
                    Err(error) => {
                        *lock(&failed) = Some(error);
                        return;
                    }
                }
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    }
    if let Some(error) = lock(&failed).take() {
        return Err(CliError::Usage(error.to_string()));
    }
    let report = std::mem::take(&mut *lock(&report));
    if global.json {
        output::json(&report)?;
    } else {
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
            "{} seeds, {} faults, {} requests ({} granted), {} events, {} violations",
            report.seeds,
            report.faults_injected,
            report.requests,
            report.granted,
            report.events,
            report.violations.len()
        ))?;
    }
    match report.violations.len() as u64 {
        0 => Ok(()),
        violated => Err(CliError::Violations { violated }),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn add(
    report: &Mutex<Report>,
    scenario: &Scenario,
    profile: Profile,
    outcome: Outcome,
    trace: bool,
) {
    if trace {
        for line in &outcome.log {
            eprintln!("{line}");
        }
    }
    let told = {
        let mut report = lock(report);
        report.seeds += 1;
        report.faults_injected += outcome.faults.len() as u64;
        for planned in &outcome.faults {
            *report.faults.entry(planned.fault.kind()).or_default() += 1;
        }
        report.requests += outcome.requests;
        report.granted += outcome.granted;
        report.events += outcome.events;
        report.violations.len()
    };
    if outcome.violations.is_empty() {
        return;
    }
    let first = outcome.clone();
    let small = if told < TOLD {
        shrink(scenario, outcome).unwrap_or(first)
    } else {
        first
    };
    if let Some(violation) = small.violations.first().cloned() {
        lock(report).violations.push(Told {
            profile: profile.name(),
            seed: small.seed,
            invariant: violation.invariant.name(),
            message: violation.message,
            faults: small.faults,
            log: if told < TOLD { small.log } else { Vec::new() },
        });
    }
}
