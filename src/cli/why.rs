//! `hotset why` and `hotset analyse`: what a running server decided, and how its models are used.

use std::time::Duration;

use clap::Args;
use hotset::core::predict::GuessResults;
use hotset::core::usage::Patterns;
use hotset::{Bytes, ComponentId};
use serde::Deserialize;
use serde_json::{Value, json};

use super::output::{self, gauge, line, table};
use super::{CliError, Global, server};

/// Rows of a table that is one of several.
const SHOWN: usize = 8;

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
    patterns: Patterns,
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
    line(rows.to_string())?;
    patterns(&usage.patterns)
}

fn patterns(patterns: &Patterns) -> Result<(), CliError> {
    if !patterns.together.is_empty() {
        let mut rows = table(&["asked for together", "", "times"], &["times"]);
        for pair in patterns.together.iter().take(SHOWN) {
            let [a, b] = &pair.components;
            rows.add_row([a.clone(), b.clone(), pair.count.to_string()]);
        }
        line(rows.to_string())?;
    }
    let known: u64 = patterns.reuse.iter().map(|reuse| reuse.count).sum();
    if known > 0 {
        let mut rows = table(&["asked for again", "times", "share"], &["times"]);
        for reuse in &patterns.reuse {
            let within = match reuse.within_s {
                Some(s) => format!(
                    "within {}",
                    humantime::format_duration(Duration::from_secs(s))
                ),
                None => "later".into(),
            };
            let (count, all) = (Bytes(reuse.count), Bytes(known));
            rows.add_row([within, reuse.count.to_string(), gauge(count, all, 16)]);
        }
        line(rows.to_string())?;
    }
    let waited = patterns
        .waiting
        .iter()
        .filter(|waiting| waiting.seconds > 0.0);
    let waited: Vec<_> = waited.collect();
    if !waited.is_empty() {
        let columns = ["waited for", "loads", "in all", "mean", "longest"];
        let mut rows = table(&columns, &columns[1..]);
        for waiting in waited {
            let mean = waiting.seconds / waiting.loads.max(1) as f64;
            rows.add_row([
                waiting.cause.clone(),
                waiting.loads.to_string(),
                format!("{:.2} s", waiting.seconds),
                format!("{:.1} ms", mean * 1e3),
                format!("{:.1} ms", waiting.longest_s * 1e3),
            ]);
        }
        line(rows.to_string())?;
    }
    let churn = &patterns.churn;
    line(format!(
        "{} evictions, {} of them loaded again within {} ({})",
        churn.evictions,
        churn.reloads,
        humantime::format_duration(Duration::from_secs(churn.within_s)),
        churn.bytes
    ))?;
    for (component, times) in churn.components.iter().take(SHOWN) {
        line(format!("  {component}: {times} times"))?;
    }
    guesses(&patterns.guesses)
}

/// What came of loading what nobody had asked for.
fn guesses(guesses: &[GuessResults]) -> Result<(), CliError> {
    let made: Vec<_> = guesses.iter().filter(|g| g.score.loads > 0).collect();
    if made.is_empty() {
        return Ok(());
    }
    let columns = [
        "loaded before asked for",
        "into",
        "times",
        "used",
        "in vain",
        "saved",
        "lost",
        "delayed",
        "",
    ];
    let mut rows = table(&columns, &columns[2..8]);
    for guesses in made {
        let score = &guesses.score;
        rows.add_row([
            guesses.grounds.to_string(),
            guesses.tier.to_string(),
            score.loads.to_string(),
            score.used_bytes.to_string(),
            score.wasted_bytes.to_string(),
            format!("{:.1} s", score.saved_s),
            format!("{:.1} s", score.lost_s),
            format!("{:.3} s", score.delayed_s),
            (if guesses.on { "" } else { "off: they lose" }).to_owned(),
        ]);
    }
    line(rows.to_string())
}
