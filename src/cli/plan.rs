//! `hotset plan`: what a load would do, in the running server where there is one.

use std::collections::BTreeMap;

use clap::Args;
use hotset::bridge::wire::{PlanMix, Set};
use hotset::{Bytes, ComponentId, ComponentSet, GpuChoice, GpuIndex, Hotset, Target};
use serde::Deserialize;
use serde_json::json;

use super::load::{Part, blocks};
use super::output::{self, line, table};
use super::{CliError, Global, config, config_with_models, serve, server};

/// What to plan.
#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// Models or components (MODEL/COMPONENT): one set of all of them, or with --gpus a set of each (MODEL+MODEL for several
    /// in one)
    #[arg(required = true)]
    names: Vec<String>,
    /// Where to: best, ram, vram, vram:N
    #[arg(long, default_value = "best")]
    target: Target,
    /// Plan sets that are wanted at the same time, on these GPUs: `all`, numbers (0,1), or sizes of GPUs that need not exist
    /// (24GiB,24GiB)
    #[arg(long, value_parser = parse_gpus)]
    gpus: Option<GpuChoice>,
    /// Where no GPU has room for a component: as many of its blocks as fit there, and the others in RAM
    #[arg(long, conflicts_with = "gpus")]
    split: bool,
}

fn parse_gpus(text: &str) -> Result<GpuChoice, String> {
    if text == "all" {
        return Ok(GpuChoice::All);
    }
    let parts = || text.split(',').map(str::trim);
    let numbers: Result<Vec<u32>, _> = parts().map(str::parse).collect();
    if let Ok(numbers) = numbers {
        return Ok(GpuChoice::Only(numbers.into_iter().map(GpuIndex).collect()));
    }
    let sizes: Result<Vec<Bytes>, _> = parts().map(str::parse).collect();
    sizes
        .map(GpuChoice::Imagined)
        .map_err(|_| "write all, numbers such as 0,1, or sizes such as 24GiB,24GiB".into())
}

/// `hotset plan NAME..`
pub(crate) async fn run(args: &PlanArgs, global: &Global) -> Result<(), CliError> {
    match &args.gpus {
        Some(gpus) => run_mix(args, gpus, global).await,
        None => run_one(args, global).await,
    }
}

async fn run_one(args: &PlanArgs, global: &Global) -> Result<(), CliError> {
    let plan = match server::connect(&config(global)?, global).await? {
        Some(client) => client.plan(remote(&args.names, args)).await?,
        None => {
            let hotset = serve::start(config_with_models(global)?).await?;
            let plan = hotset.plan_split(&local(&args.names, args)).await?;
            Hotset::drain(hotset).await;
            json!(plan)
        }
    };
    if global.json {
        return output::json(&plan);
    }
    print(&output::view(plan)?)
}

async fn run_mix(args: &PlanArgs, gpus: &GpuChoice, global: &Global) -> Result<(), CliError> {
    let sets: Vec<Vec<String>> = args
        .names
        .iter()
        .map(|set| set.split('+').map(|name| name.trim().to_owned()).collect())
        .collect();
    let mix = match server::connect(&config(global)?, global).await? {
        Some(client) => {
            let (mut numbers, mut imagined) = (Vec::new(), Vec::new());
            match gpus {
                GpuChoice::All => {}
                GpuChoice::Only(gpus) => numbers.extend(gpus.iter().map(|gpu| gpu.0)),
                GpuChoice::Imagined(sizes) => imagined.extend(sizes.iter().map(|b| b.get())),
            }
            let mix = PlanMix {
                sets: sets.iter().map(|names| remote(names, args)).collect(),
                gpus: numbers,
                imagined,
            };
            client.plan_mix(mix).await?
        }
        None => {
            let hotset = serve::start(config_with_models(global)?).await?;
            let sets: Vec<ComponentSet> = sets.iter().map(|names| local(names, args)).collect();
            let mix = hotset.plan_mix(&sets, gpus)?;
            Hotset::drain(hotset).await;
            json!(mix)
        }
    };
    if global.json {
        return output::json(&mix);
    }
    print_mix(&output::view(mix)?)
}

fn remote(names: &[String], args: &PlanArgs) -> Set {
    Set {
        names: names.to_vec(),
        target: args.target.to_string(),
        dependencies: true,
        split: args.split,
    }
}

fn local(names: &[String], args: &PlanArgs) -> ComponentSet {
    let mut set = ComponentSet::new(names.iter().cloned()).on(args.target);
    set.split = args.split;
    set
}

/// A plan, as far as tables show it.
#[derive(Deserialize)]
struct View {
    tier: String,
    steps: Vec<StepView>,
    needs: BTreeMap<String, Bytes>,
    evictions: Vec<EvictionView>,
    fit: String,
    estimate: Option<EstimateView>,
}

#[derive(Deserialize)]
struct StepView {
    component: String,
    tier: String,
    bytes: Bytes,
    there: String,
    route: String,
    seconds: f64,
    part: Option<Part>,
}

#[derive(Deserialize)]
struct EvictionView {
    tier: String,
    component: ComponentId,
    bytes: Bytes,
    reason: String,
}

#[derive(Deserialize)]
struct EstimateView {
    seconds: f64,
    first_s: f64,
    assumed: Vec<String>,
}

#[derive(Deserialize)]
struct MixView {
    fits: bool,
    estimate: EstimateView,
    sets: Vec<SetView>,
    give_up: Vec<GiveUpView>,
}

#[derive(Deserialize)]
struct SetView {
    name: String,
    plan: Option<View>,
    reason: Option<String>,
}

#[derive(Deserialize)]
#[serde(tag = "give_up", rename_all = "kebab-case")]
enum GiveUpView {
    Sets {
        names: Vec<String>,
    },
    Leases {
        tier: String,
        components: Vec<String>,
        bytes: Bytes,
    },
}

fn seconds(seconds: f64) -> String {
    match seconds {
        s if s <= 0.0 => "-".into(),
        s if s < 0.1 => format!("{:.1} ms", s * 1e3),
        s if s < 10.0 => format!("{s:.2} s"),
        s => format!("{s:.0} s"),
    }
}

fn print(plan: &View) -> Result<(), CliError> {
    let mut rows = table(
        &["#", "component", "to", "size", "there", "way", "time"],
        &["#", "size", "time"],
    );
    for (i, step) in plan.steps.iter().enumerate() {
        let way = match step.route.as_str() {
            "none" => "-",
            "ram" => "disk to RAM",
            "via-ram" => "through RAM",
            "ring" => "streamed",
            "peer" => "from another GPU",
            other => other,
        };
        rows.add_row([
            (i + 1).to_string(),
            step.component.clone(),
            step.tier.clone(),
            step.bytes.to_string(),
            step.there.clone(),
            way.to_owned(),
            seconds(step.seconds),
        ]);
    }
    line(rows.to_string())?;
    shared(plan)?;
    let parts = plan.steps.iter();
    blocks(parts.filter_map(|step| Some((step.part.as_ref()?, step.tier.as_str()))))?;
    for (tier, bytes) in &plan.needs {
        line(format!("{tier}: {bytes} more needed"))?;
    }
    evictions(plan)?;
    let fit = match plan.fit.as_str() {
        "now" => "fits now",
        "after-eviction" => "fits once the evictions are made",
        "after-others" => "fits once others release what they hold",
        other => other,
    };
    line(format!("goes to {}: {fit}", plan.tier))?;
    plan.estimate.as_ref().map_or(Ok(()), estimate)
}

/// Says what costs nothing.
fn shared(plan: &View) -> Result<(), CliError> {
    for (there, why) in [
        ("resident", "there already"),
        ("loading", "on their way for others"),
    ] {
        let of = plan.steps.iter().filter(|step| step.there == there);
        let (count, bytes) = of.fold((0, 0), |(n, sum), step| (n + 1, sum + step.bytes.get()));
        if count > 0 {
            line(format!(
                "{count} of {} components are {why} and cost nothing ({})",
                plan.steps.len(),
                Bytes(bytes)
            ))?;
        }
    }
    Ok(())
}

fn evictions(plan: &View) -> Result<(), CliError> {
    for eviction in &plan.evictions {
        line(format!(
            "would evict {} from {}, {} ({})",
            eviction.component, eviction.tier, eviction.bytes, eviction.reason
        ))?;
    }
    Ok(())
}

fn estimate(estimate: &EstimateView) -> Result<(), CliError> {
    if estimate.seconds > 0.0 {
        let first = match estimate.first_s {
            s if s <= 0.0 => "at once".to_owned(),
            s => format!("in {}", seconds(s)),
        };
        line(format!(
            "all there in about {}, the first component {first}",
            seconds(estimate.seconds)
        ))?;
    }
    if !estimate.assumed.is_empty() {
        line(format!(
            "not measured yet, so guessed: the rate of {}",
            estimate.assumed.join(", ")
        ))?;
    }
    Ok(())
}

fn print_mix(mix: &MixView) -> Result<(), CliError> {
    let mut rows = table(
        &["set", "goes to", "new", "evicts", "time", "fits"],
        &["new", "evicts", "time"],
    );
    for set in &mix.sets {
        let row = match &set.plan {
            None => [
                set.name.clone(),
                "-".into(),
                "-".into(),
                "-".into(),
                "-".into(),
                "no".into(),
            ],
            Some(plan) => {
                let evicted: u64 = plan.evictions.iter().map(|e| e.bytes.get()).sum();
                let new = plan.needs.get(&plan.tier).copied().unwrap_or_default();
                let time = plan.estimate.as_ref().map_or(0.0, |e| e.seconds);
                [
                    set.name.clone(),
                    plan.tier.clone(),
                    new.to_string(),
                    Bytes(evicted).to_string(),
                    seconds(time),
                    "yes".into(),
                ]
            }
        };
        rows.add_row(row);
    }
    line(rows.to_string())?;
    for set in &mix.sets {
        if let Some(plan) = &set.plan {
            evictions(plan)?;
        }
        if let Some(reason) = &set.reason {
            line(format!("{}: {reason}", set.name))?;
        }
    }
    if mix.fits {
        line("all fit together")?;
    } else {
        line("they do not all fit together")?;
        for give_up in &mix.give_up {
            line(match give_up {
                GiveUpView::Sets { names } => {
                    format!("without {} the others fit", names.join(" and "))
                }
                GiveUpView::Leases {
                    tier,
                    components,
                    bytes,
                } => format!(
                    "all fit once {tier} is released by those who hold {} there ({bytes})",
                    components.join(", ")
                ),
            })?;
        }
    }
    estimate(&mix.estimate)
}
