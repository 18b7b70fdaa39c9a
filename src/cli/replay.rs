//! `hotset replay`: policies against a recorded trace. Needs no running system and no models.

mod plot;

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use clap::Args;
use hotset::Bytes;
use hotset::core::replay::{
    Bound, Comparison, LoadCost, Machine, Mean, Measured, Outcome, PolicyName, Run, Stress, Trace,
    bound, compare, replay,
};
use serde_json::{Value, json};

use super::output::{self, line, table};
use super::{CliError, Global};

/// What to replay, and on what.
#[derive(Debug, Args)]
pub(crate) struct ReplayArgs {
    /// Requests: a CSV table with t_s, session and components (ids joined by |), as `hotset record` writes it; or the requests of
    /// GenTD26 (CSV) or Katz (JSON) as they were published
    requests: PathBuf,
    /// Components: a CSV table with id, kind, bytes and, where it was measured, load_s. GenTD26 and Katz can do without: then all
    /// of a kind are of one size
    #[arg(long, value_name = "FILE")]
    components: Option<PathBuf>,
    /// RAM tier; several sizes are replayed in turn [default: 5, 10, 20 and 40 % of what the trace asks for]
    #[arg(long, value_delimiter = ',', value_name = "SIZE")]
    ram: Vec<Bytes>,
    /// VRAM tier over it; without it there is one tier
    #[arg(long, value_name = "SIZE")]
    vram: Option<Bytes>,
    /// Policies by name, or all
    #[arg(
        long = "policy",
        value_delimiter = ',',
        default_value = "all",
        value_name = "NAME"
    )]
    policies: Vec<String>,
    /// Load cost of components without load_s
    #[arg(long, default_value_t = LoadCost::default(), value_name = "COST")]
    cost: LoadCost,
    /// Upload cost from RAM to VRAM
    #[arg(long, default_value = "0.05s+0.05s/GB", value_name = "COST")]
    upload: LoadCost,
    /// Sizes drawn anew so many times, among components of the same kind; 0: as the table has them
    #[arg(long, default_value_t = 0, value_name = "N")]
    draws: u64,
    /// A variant of the trace that is hard to learn: relabel, shuffle, one-hit or loop
    #[arg(long, value_name = "NAME")]
    stress: Option<String>,
    /// Also find what no policy can do better than, by linear programming; one tier only
    #[arg(long, conflicts_with = "vram")]
    bound: bool,
    /// Draw the cost miss ratio over the capacity, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Leave out requests from this time of the trace on
    #[arg(long, value_parser = humantime_duration, value_name = "DURATION")]
    until: Option<Duration>,
    /// Share of the requests at the start that only warms up
    #[arg(
        long,
        default_value_t = 0.1,
        value_name = "SHARE",
        conflicts_with = "from"
    )]
    warmup: f64,
    /// Count only requests from this time of the trace on, such as 9d
    #[arg(long, value_parser = humantime_duration, value_name = "DURATION")]
    from: Option<Duration>,
}

fn humantime_duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| error.to_string())
}

/// Shares of the footprint that are replayed where no size is given.
const SHARES: [f64; 4] = [0.05, 0.1, 0.2, 0.4];

/// `hotset replay REQUESTS --components FILE`
pub(crate) fn run(args: &ReplayArgs, global: &Global) -> Result<(), CliError> {
    if !(0.0..1.0).contains(&args.warmup) {
        return Err(CliError::Usage(
            "--warmup is a share of the requests: write a number from 0 up to, but not, 1".into(),
        ));
    }
    let policies = policies(&args.policies)?;
    let stress = args.stress.as_deref().map(str::parse::<Stress>).transpose();
    let stress = stress.map_err(|error| CliError::Usage(error.to_string()))?;
    let components = args.components.as_deref().map(read).transpose()?;
    let trace = Trace::read(&read(&args.requests)?, components.as_deref())
        .map_err(|error| CliError::Usage(error.to_string()))?;
    let trace = args.until.map_or(trace.clone(), |end| trace.until(end));
    let draws = draws(&trace, args, stress);
    let jobs: Vec<Job> = draws
        .iter()
        .flat_map(|draw| {
            let machines = draw.machines.iter().enumerate();
            let policies = &policies;
            machines.flat_map(move |(capacity, machine)| {
                let policies = policies.iter().map(|policy| Work::Policy(*policy));
                let works = policies.chain(args.bound.then_some(Work::Bound));
                works.map(move |work| Job {
                    draw,
                    capacity,
                    machine,
                    work,
                })
            })
        })
        .collect();
    let (runs, bounds) = run_all(&jobs)?;
    let least = |draw: usize, capacity: usize| {
        let mut found = bounds.iter().filter(|b| b.0 == draw && b.1 == capacity);
        found.next().map(|(_, _, bound)| bound.cmr)
    };
    let compared = compare(&runs, least);
    if let Some(path) = &args.plot {
        let lines = plot::lines(&compared, &draws[0].machines, &bounds);
        plot::write(path, &lines)?;
    }
    if global.json {
        return output::json(&document(&trace, args, &runs, &bounds, &compared));
    }
    print(&trace, &runs, &compared, &draws[0].machines, &bounds)
}

/// A trace as it is replayed, and on what.
struct Draw {
    number: usize,
    trace: Trace,
    machines: Vec<Machine>,
}

/// What is found out about a draw on a machine.
#[derive(Clone, Copy)]
enum Work {
    Policy(PolicyName),
    Bound,
}

struct Job<'a> {
    draw: &'a Draw,
    capacity: usize,
    machine: &'a Machine,
    work: Work,
}

/// The traces with their capacities, which are shares of what the trace asks for before any stress.
fn draws(trace: &Trace, args: &ReplayArgs, stress: Option<Stress>) -> Vec<Draw> {
    let draw = |number: usize, trace: Trace| {
        let rams = if args.ram.is_empty() {
            SHARES.map(|share| trace.footprint().share(share)).to_vec()
        } else {
            args.ram.clone()
        };
        let machine = |ram: Bytes| Machine {
            ram,
            vram: args.vram,
            load: args.cost,
            upload: args.upload,
            measured: args
                .from
                .map_or(Measured::AfterShare(args.warmup), Measured::From),
        };
        Draw {
            number,
            machines: rams.into_iter().map(machine).collect(),
            trace: stress.map_or(trace.clone(), |stress| {
                trace.stressed(stress, number as u64)
            }),
        }
    };
    if args.draws == 0 {
        return vec![draw(0, trace.clone())];
    }
    (0..args.draws)
        .map(|seed| draw(seed as usize, trace.drawn(seed)))
        .collect()
}

/// A bound with its draw and the place of its capacity.
type PlacedBound = (usize, usize, Bound);

/// Does all jobs on all cores; the answers are in the order of the jobs.
fn run_all(jobs: &[Job<'_>]) -> Result<(Vec<Run>, Vec<PlacedBound>), CliError> {
    let start = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let waiting = Mutex::new(jobs.iter().enumerate());
    let done = Mutex::new((Vec::new(), Vec::new(), None));
    std::thread::scope(|scope| {
        let work = || {
            loop {
                // A panic in another thread ends the command anyhow when the scope ends.
                let next = waiting
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .next();
                let Some((number, job)) = next else {
                    return;
                };
                let (draw, trace) = (job.draw.number, &job.draw.trace);
                match job.work {
                    Work::Policy(policy) => {
                        let make = || policy.make(trace);
                        let outcome = replay(trace, job.machine, make, &|| start.elapsed());
                        let run = Run {
                            draw,
                            capacity: job.capacity,
                            outcome,
                        };
                        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                        done.0.push((number, run));
                    }
                    Work::Bound => {
                        let found = bound(trace, job.machine);
                        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
                        match found {
                            Ok(bound) => done.1.push((number, (draw, job.capacity, bound))),
                            Err(error) => done.2 = Some(error),
                        }
                    }
                }
            }
        };
        for _ in 0..threads.min(jobs.len()) {
            scope.spawn(work);
        }
    });
    let (mut runs, mut bounds, error) = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(error) = error {
        return Err(CliError::Usage(error.to_string()));
    }
    runs.sort_by_key(|(number, _)| *number);
    bounds.sort_by_key(|(number, _)| *number);
    Ok((
        runs.into_iter().map(|(_, run)| run).collect(),
        bounds.into_iter().map(|(_, bound)| bound).collect(),
    ))
}

fn document(
    trace: &Trace,
    args: &ReplayArgs,
    runs: &[Run],
    bounds: &[PlacedBound],
    compared: &[Comparison],
) -> Value {
    let with_draw = |draw: usize, value: Value| {
        let mut value = value;
        if args.draws > 0 {
            value["draw"] = json!(draw);
        }
        value
    };
    let runs: Vec<Value> = runs
        .iter()
        .map(|run| with_draw(run.draw, json!(run.outcome)))
        .collect();
    let bounds: Vec<Value> = bounds
        .iter()
        .map(|(draw, _, bound)| with_draw(*draw, json!(bound)))
        .collect();
    json!({
        "requests": trace.requests().len(),
        "components": trace.components().len(),
        "footprint_bytes": trace.footprint(),
        "runs": runs,
        "bound": bounds,
        "compared": compared,
    })
}

fn policies(names: &[String]) -> Result<Vec<PolicyName>, CliError> {
    if names.iter().any(|name| name == "all") {
        return Ok(PolicyName::all().collect());
    }
    let named = names.iter().map(|name| name.parse::<PolicyName>());
    named
        .collect::<Result<_, _>>()
        .map_err(|error| CliError::Usage(error.to_string()))
}

fn read(path: &Path) -> Result<String, CliError> {
    std::fs::read_to_string(path).map_err(|source| CliError::File {
        path: path.to_owned(),
        source,
    })
}

/// A mean with its interval, to so many digits.
fn shown(mean: Option<Mean>, digits: usize) -> String {
    match mean {
        None => String::new(),
        Some(Mean {
            mean,
            interval: None,
        }) => format!("{mean:.digits$}"),
        Some(Mean {
            mean,
            interval: Some(half),
        }) => format!("{mean:.digits$} ± {half:.digits$}"),
    }
}

fn print(
    trace: &Trace,
    runs: &[Run],
    compared: &[Comparison],
    machines: &[Machine],
    bounds: &[PlacedBound],
) -> Result<(), CliError> {
    line(format!(
        "{} requests for {} of components",
        trace.requests().len(),
        trace.footprint()
    ))?;
    let right = [
        "tier", "CMR", "of LRU", "of best", "gap", "misses", "no wait", "mean s", "p99 s", "µs",
    ];
    let mut columns = right.to_vec();
    columns.insert(1, "policy");
    let mut rows = table(&columns, &right);
    for row in compared {
        let own: Vec<&Outcome> = runs
            .iter()
            .filter(|run| run.capacity == row.capacity && run.outcome.policy == row.policy)
            .map(|run| &run.outcome)
            .collect();
        let mean = |value: &dyn Fn(&Outcome) -> f64| {
            own.iter().map(|outcome| value(outcome)).sum::<f64>() / own.len().max(1) as f64
        };
        rows.add_row([
            tier(machines, row.capacity),
            row.policy.clone(),
            shown(Some(row.cmr), 4),
            shown(row.of_lru, 3),
            shown(row.of_best_simple, 3),
            row.gap_closed
                .map_or_else(String::new, |gap| format!("{:.0} %", gap.mean * 100.0)),
            format!("{:.1} %", mean(&|o| o.object_miss_ratio) * 100.0),
            format!("{:.1} %", mean(&|o| o.zero_wait_share) * 100.0),
            format!("{:.2}", mean(&|o| o.cold_start_s.mean)),
            format!("{:.2}", mean(&|o| o.cold_start_s.p99)),
            format!("{:.1}", mean(&|o| o.ns_per_request) / 1e3),
        ]);
    }
    line(rows.to_string())?;
    for capacity in 0..machines.len() {
        let of_capacity = bounds.iter().filter(|b| b.1 == capacity);
        let values: Vec<f64> = of_capacity.map(|(_, _, bound)| bound.cmr).collect();
        if let Some(least) = Mean::of(&values) {
            let tier = tier(machines, capacity);
            line(format!(
                "no policy below {} at {tier}",
                shown(Some(least), 4)
            ))?;
        }
    }
    for run in runs {
        let Some(score) = run.outcome.prefetch else {
            continue;
        };
        line(format!(
            "{} at {}: {} prefetched, {} used and {} wasted, {:.1} s saved, {:.1} s lost, {} loads delayed by {:.2} s",
            run.outcome.policy,
            run.outcome.capacity_bytes,
            score.loads,
            score.used_bytes,
            score.wasted_bytes,
            score.saved_s,
            score.lost_s,
            score.delayed_loads,
            score.delayed_s,
        ))?;
    }
    Ok(())
}

fn tier(machines: &[Machine], capacity: usize) -> String {
    let machine = machines.get(capacity);
    machine.map_or_else(String::new, |m| m.vram.unwrap_or(m.ram).to_string())
}
