//! `hotset plan`: what a load would do, in the running server where there is one.

use std::collections::BTreeMap;

use clap::Args;
use hotset::bridge::wire::Set;
use hotset::{Bytes, ComponentId, ComponentSet, Hotset, Target};
use serde::Deserialize;
use serde_json::json;

use super::output::{self, line, table};
use super::{CliError, Global, config, config_with_models, serve, server};

/// What to plan.
#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// Models or components (MODEL/COMPONENT)
    #[arg(required = true)]
    names: Vec<String>,
    /// Where to: best, ram, vram, vram:N
    #[arg(long, default_value = "best")]
    target: Target,
}

/// `hotset plan NAME..`
pub(crate) async fn run(args: &PlanArgs, global: &Global) -> Result<(), CliError> {
    let plan = match server::connect(&config(global)?, global).await? {
        Some(client) => {
            let set = Set {
                names: args.names.clone(),
                target: args.target.to_string(),
                dependencies: true,
            };
            client.plan(set).await?
        }
        None => {
            let hotset = serve::start(config_with_models(global)?).await?;
            let set = ComponentSet::new(args.names.iter().cloned()).on(args.target);
            let plan = hotset.plan(&set)?;
            Hotset::drain(hotset).await;
            json!(plan)
        }
    };
    if global.json {
        return output::json(&plan);
    }
    print(&output::view(plan)?)
}

/// A plan, as far as tables show it.
#[derive(Deserialize)]
struct View {
    tier: String,
    steps: Vec<StepView>,
    needs: BTreeMap<String, Bytes>,
    evictions: Vec<EvictionView>,
    fit: String,
}

#[derive(Deserialize)]
struct StepView {
    component: String,
    bytes: Bytes,
    there: String,
    route: String,
}

#[derive(Deserialize)]
struct EvictionView {
    tier: String,
    component: ComponentId,
    bytes: Bytes,
    reason: String,
}

fn print(plan: &View) -> Result<(), CliError> {
    let mut rows = table(&["#", "component", "size", "there", "way"], &["#", "size"]);
    for (i, step) in plan.steps.iter().enumerate() {
        let way = match step.route.as_str() {
            "none" => "-",
            "ram" => "disk to RAM",
            "via-ram" => "through RAM",
            "ring" => "streamed",
            other => other,
        };
        rows.add_row([
            (i + 1).to_string(),
            step.component.clone(),
            step.bytes.to_string(),
            step.there.clone(),
            way.to_owned(),
        ]);
    }
    line(rows.to_string())?;
    for (tier, bytes) in &plan.needs {
        line(format!("{tier}: {bytes} more needed"))?;
    }
    for eviction in &plan.evictions {
        line(format!(
            "would evict {} from {}, {} ({})",
            eviction.component, eviction.tier, eviction.bytes, eviction.reason
        ))?;
    }
    let fit = match plan.fit.as_str() {
        "now" => "fits now",
        "after-eviction" => "fits once the evictions are made",
        "after-others" => "fits once others release what they hold",
        other => other,
    };
    line(format!("goes to {}: {fit}", plan.tier))
}
