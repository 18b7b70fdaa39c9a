//! `hotset why` and `hotset analyse`: what a running server decided, and how its models are used.

use clap::Args;
use hotset::{Bytes, ComponentId};
use serde::Deserialize;
use serde_json::{Value, json};

use super::output::{self, line, table};
use super::{CliError, Global, server};

/// What to explain.
#[derive(Debug, Args)]
pub(crate) struct WhyArgs {
    /// A model or a component (MODEL/COMPONENT) [default: everything]
    name: Option<String>,
    /// Decisions at most, newest first
    #[arg(long, default_value_t = 20)]
    limit: u64,
}

/// `hotset why [NAME]`
pub(crate) async fn run(args: &WhyArgs, global: &Global) -> Result<(), CliError> {
    let client = server::required(global).await?;
    let name = args.name.as_deref().unwrap_or_default();
    let decisions = client.why(name, args.limit.max(1)).await?;
    if global.json {
        let decisions: Vec<&Value> = decisions.iter().map(|(decision, _)| decision).collect();
        return output::json(&json!({ "decisions": decisions }));
    }
    if decisions.is_empty() {
        return line(match args.name.as_deref() {
            None => "nothing was decided yet".to_owned(),
            Some(name) => format!("nothing that is remembered concerns {name}"),
        });
    }
    for (decision, sentence) in &decisions {
        let at = decision["at_s"].as_f64().unwrap_or_default();
        line(format!("{at:>10.3} s  {sentence}"))?;
    }
    Ok(())
}

#[derive(Deserialize)]
struct Usage {
    hit_share: Option<f64>,
    hot: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    component: ComponentId,
    tier: String,
    bytes: Bytes,
    uses: u64,
    idle_s: f64,
}

/// `hotset analyse`
pub(crate) async fn analyse(global: &Global) -> Result<(), CliError> {
    let usage = server::required(global).await?.analyse().await?;
    if global.json {
        return output::json(&usage);
    }
    let usage: Usage = output::view(usage)?;
    if let Some(share) = usage.hit_share {
        let percent = share * 100.0;
        line(format!(
            "{percent:.1} % of the requested components were resident"
        ))?;
    }
    let right = ["size", "uses", "idle"];
    let mut rows = table(&["component", "tier", "size", "uses", "idle"], &right);
    for row in &usage.hot {
        rows.add_row([
            row.component.to_string(),
            row.tier.clone(),
            row.bytes.to_string(),
            row.uses.to_string(),
            format!("{:.0} s", row.idle_s),
        ]);
    }
    line(rows.to_string())
}
