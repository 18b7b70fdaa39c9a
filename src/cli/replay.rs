//! `hotset replay`: policies against a recorded trace. Needs no running system and no models.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use hotset::Bytes;
use hotset::core::replay::{LoadCost, Machine, Measured, Outcome, PolicyName, Trace, replay};
use serde_json::json;

use super::output::{self, line, table};
use super::{CliError, Global};

/// What to replay, and on what.
#[derive(Debug, Args)]
pub(crate) struct ReplayArgs {
    /// Requests: a CSV table with t_s, session and components (ids joined by |)
    requests: PathBuf,
    /// Components: a CSV table with id, kind, bytes and, where it was measured, load_s
    #[arg(long, value_name = "FILE")]
    components: PathBuf,
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
    let trace = Trace::parse(&read(&args.requests)?, &read(&args.components)?)
        .map_err(|error| CliError::Usage(error.to_string()))?;
    let rams = if args.ram.is_empty() {
        SHARES.map(|share| trace.footprint().share(share)).to_vec()
    } else {
        args.ram.clone()
    };
    let start = Instant::now();
    let runs: Vec<Outcome> = rams
        .iter()
        .flat_map(|ram| {
            let machine = Machine {
                ram: *ram,
                vram: args.vram,
                load: args.cost,
                upload: args.upload,
                measured: args
                    .from
                    .map_or(Measured::AfterShare(args.warmup), Measured::From),
            };
            let (trace, policies) = (&trace, &policies);
            policies.iter().map(move |policy| {
                replay(trace, &machine, || policy.make(trace), &|| start.elapsed())
            })
        })
        .collect();
    if global.json {
        return output::json(&json!({
            "requests": trace.requests().len(),
            "components": trace.components().len(),
            "footprint_bytes": trace.footprint(),
            "runs": runs,
        }));
    }
    print(&trace, &runs)
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

fn print(trace: &Trace, runs: &[Outcome]) -> Result<(), CliError> {
    line(format!(
        "{} requests for {} of components",
        trace.requests().len(),
        trace.footprint()
    ))?;
    let mut rows = table(
        &[
            "tier", "policy", "CMR", "of LRU", "misses", "no wait", "mean s", "p95 s", "p99 s",
            "µs",
        ],
        &[
            "tier", "CMR", "of LRU", "misses", "no wait", "mean s", "p95 s", "p99 s", "µs",
        ],
    );
    for run in runs {
        let lru = runs.iter().find(|other| {
            other.policy == "lru"
                && other.ram_bytes == run.ram_bytes
                && other.capacity_bytes == run.capacity_bytes
        });
        let of_lru = lru.filter(|lru| lru.cmr > 0.0).map(|lru| run.cmr / lru.cmr);
        rows.add_row([
            run.capacity_bytes.to_string(),
            run.policy.clone(),
            format!("{:.4}", run.cmr),
            of_lru.map_or_else(String::new, |ratio| format!("{ratio:.3}")),
            format!("{:.1} %", run.object_miss_ratio * 100.0),
            format!("{:.1} %", run.zero_wait_share * 100.0),
            format!("{:.2}", run.cold_start_s.mean),
            format!("{:.2}", run.cold_start_s.p95),
            format!("{:.2}", run.cold_start_s.p99),
            format!("{:.1}", run.ns_per_request / 1e3),
        ]);
    }
    line(rows.to_string())
}
