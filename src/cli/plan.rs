//! `hotset plan`: what a load would do.

use clap::Args;
use hotset::{ComponentSet, Hotset, Plan, Target};

use super::output::{self, line, table};
use super::{CliError, Global, config_with_models, serve};

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
    let hotset = serve::start(config_with_models(global)?).await?;
    let set = ComponentSet::new(args.names.iter().cloned()).on(args.target);
    let plan = hotset.plan(&set)?;
    Hotset::drain(hotset).await;
    if global.json {
        return output::json(&plan);
    }
    print(&plan)
}

fn print(plan: &Plan) -> Result<(), CliError> {
    let mut rows = table(&["#", "component", "size", "there", "way"], &["#", "size"]);
    for (i, step) in plan.steps.iter().enumerate() {
        rows.add_row([
            (i + 1).to_string(),
            step.component.id.to_string(),
            step.bytes.to_string(),
            step.there.to_string(),
            step.route.to_string(),
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
    line(format!("goes to {}: {}", plan.tier, plan.fit))
}
