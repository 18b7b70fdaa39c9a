//! `hotset status` and `top`: tiers, sessions, actors, health, of the running server where there is one.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use hotset::client::Client;
use hotset::core::device::{FigureSource, Figures};
use hotset::core::memory::Pages;
use hotset::{Bytes, ComponentId, Hotset};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::catalog::bytes_or_dash;
use super::output::{self, gauge, line, table};
use super::{CliError, Global, config, serve, server};

/// What to show live.
#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// Time between two looks
    #[arg(long, default_value = "1s", value_parser = humantime::parse_duration)]
    every: Duration,
    /// Looks; 0: until ctrl-c
    #[arg(long, default_value_t = 0)]
    count: u64,
}

/// `hotset status`
pub(crate) async fn run(global: &Global) -> Result<(), CliError> {
    let mut config = config(global)?;
    let status = match server::connect(&config, global).await? {
        Some(client) => client.status().await?,
        None => {
            config.catalog.watch = false;
            let hotset = serve::start(config).await?;
            let status = json!(hotset.status().await);
            Hotset::drain(hotset).await;
            status
        }
    };
    if global.json {
        return output::json(&status);
    }
    print(&output::view(status)?)
}

/// `hotset top`
pub(crate) async fn top(args: &TopArgs, global: &Global) -> Result<(), CliError> {
    let client = server::required(global).await?;
    let mut stop = serve::Stop::listen()?;
    let mut looks = 0;
    loop {
        look(&client, global).await?;
        looks += 1;
        if looks == args.count {
            return Ok(());
        }
        tokio::select! {
            _ = stop.told() => return Ok(()),
            () = tokio::time::sleep(args.every) => {}
        }
    }
}

async fn look(client: &Client, global: &Global) -> Result<(), CliError> {
    let status = client.status().await?;
    if global.json {
        // One document on a line for each look.
        return line(status.to_string());
    }
    if std::io::stdout().is_terminal() {
        // Home, and clear to the end: the terminal does not flicker.
        print!("\x1b[H\x1b[J");
        std::io::stdout().flush().map_err(CliError::Output)?;
    }
    print(&output::view(status)?)
}

/// A status, as far as tables show it.
#[derive(Deserialize)]
struct View {
    health: HealthView,
    uptime_s: f64,
    reader: String,
    eviction: String,
    catalogue: CatalogueView,
    tiers: Vec<TierView>,
    sessions: Vec<SessionView>,
    loads: usize,
    actors: Vec<ActorView>,
    arena: ArenaView,
    #[serde(default)]
    lockable: Option<Bytes>,
}

#[derive(Deserialize)]
struct HealthView {
    state: String,
    #[serde(default)]
    problems: Vec<String>,
}

#[derive(Deserialize)]
struct ArenaView {
    live: Bytes,
    warm: Bytes,
    lingering: Bytes,
    pages: Pages,
}

#[derive(Deserialize)]
struct CatalogueView {
    models: usize,
    with_error: usize,
}

#[derive(Deserialize)]
struct TierView {
    tier: String,
    budget: Bytes,
    committed: Bytes,
    leased: Bytes,
    out_of_service: Option<String>,
    device: Option<DeviceView>,
    figures: Option<Figures>,
    components: Vec<ResidencyView>,
}

#[derive(Deserialize)]
struct DeviceView {
    name: String,
}

#[derive(Deserialize)]
struct ResidencyView {
    component: ComponentId,
    bytes: Bytes,
    leases: u32,
    residency: String,
}

#[derive(Deserialize)]
struct SessionView {
    id: u64,
    label: String,
    leases: usize,
    age_s: f64,
}

#[derive(Deserialize)]
struct ActorView {
    name: String,
    state: String,
    restarts: u64,
    last_failure: Option<String>,
}

fn print(status: &View) -> Result<(), CliError> {
    let problems = match status.health.problems.as_slice() {
        [] => String::new(),
        problems => format!(": {}", problems.join("; ")),
    };
    line(format!(
        "health: {}{problems}; up {:.0} s, {} loads under way",
        status.health.state, status.uptime_s, status.loads
    ))?;
    line(format!(
        "catalogue: {} models ({} with errors); reader: {}; eviction: {}",
        status.catalogue.models, status.catalogue.with_error, status.reader, status.eviction
    ))?;
    let arena = &status.arena;
    let locked = status
        .lockable
        .map_or_else(String::new, |most| format!("; {most} may be locked"));
    line(format!(
        "host memory: {} in use, {} warm, {} lingering; {} pages{locked}",
        arena.live, arena.warm, arena.lingering, arena.pages
    ))?;
    tier_table(&status.tiers)?;
    devices(&status.tiers)?;
    if !status.sessions.is_empty() {
        let mut rows = table(&["session", "label", "leases", "age"], &["leases", "age"]);
        for session in &status.sessions {
            rows.add_row([
                format!("s{}", session.id),
                session.label.clone(),
                session.leases.to_string(),
                format!("{:.0} s", session.age_s),
            ]);
        }
        line(rows.to_string())?;
    }
    let mut rows = table(
        &["actor", "state", "restarts", "last failure"],
        &["restarts"],
    );
    for actor in &status.actors {
        rows.add_row([
            actor.name.clone(),
            actor.state.replace('-', " "),
            actor.restarts.to_string(),
            actor.last_failure.clone().unwrap_or_else(|| "-".into()),
        ]);
    }
    line(rows.to_string())
}

/// The GPUs behind the tiers, and what they said last.
fn devices(tiers: &[TierView]) -> Result<(), CliError> {
    for tier in tiers {
        if let (Some(device), Some(figures)) = (&tier.device, &tier.figures) {
            line(format!(
                "{}: {}: {}",
                tier.tier,
                device.name,
                sentence(figures)
            ))?;
        }
    }
    Ok(())
}

fn sentence(figures: &Figures) -> String {
    let mut parts = vec![
        format!("{} free of {}", figures.free, figures.total),
        format!("others use {}", figures.foreign),
    ];
    parts.extend(figures.context.map(|bytes| format!("context {bytes}")));
    parts.extend(figures.temperature_c.map(|degrees| format!("{degrees} °C")));
    let link = |(generation, lanes)| format!("{generation} x{lanes}");
    parts.extend(figures.pcie.map(|now| {
        // A GPU that idles takes lanes and speed back; one that works with fewer has a bad slot.
        match figures.pcie_most.filter(|most| *most != now) {
            Some(most) => format!("PCIe {} of {}", link(now), link(most)),
            None => format!("PCIe {}", link(now)),
        }
    }));
    if !figures.throttling.is_empty() {
        parts.push(format!("slowed down: {}", figures.throttling.join(", ")));
    }
    let errors = figures.ecc_uncorrected.filter(|errors| *errors > 0);
    parts.extend(errors.map(|errors| format!("{errors} uncorrected memory errors")));
    if !figures.xids.is_empty() {
        let xids: Vec<String> = figures.xids.iter().map(ToString::to_string).collect();
        parts.push(format!("the driver reported Xid {}", xids.join(", ")));
    }
    if figures.mig == Some(true) {
        parts.push("divided by MIG".into());
    }
    let source = match figures.source {
        FigureSource::Sim => "the simulation",
        FigureSource::Nvml => "NVML",
        FigureSource::Driver => "the driver, since NVML is missing",
    };
    format!("{} (says {source})", parts.join("; "))
}

/// The tiers of a status, and what is in each.
pub(crate) fn tiers(tiers: &impl Serialize) -> Result<(), CliError> {
    let tiers: Vec<TierView> = output::view(json!(tiers))?;
    tier_table(&tiers)
}

fn tier_table(tiers: &[TierView]) -> Result<(), CliError> {
    const GAUGE: usize = 16;
    let mut rows = table(
        &["tier", "used", "of", "", "leased", "resident components"],
        &["used", "of", "leased"],
    );
    for tier in tiers {
        let components: Vec<String> = tier
            .components
            .iter()
            .map(|component| {
                let state = match (component.residency.as_str(), component.leases) {
                    ("loading", _) => " (loading)",
                    (_, 0) => "",
                    _ => " (leased)",
                };
                format!("{} {}{state}", component.component, component.bytes)
            })
            .collect();
        let name = match &tier.out_of_service {
            None => tier.tier.clone(),
            Some(reason) => format!("{} out of service: {reason}", tier.tier),
        };
        rows.add_row([
            name,
            tier.committed.to_string(),
            tier.budget.to_string(),
            gauge(tier.committed, tier.budget.max(Bytes(1)), GAUGE),
            bytes_or_dash(tier.leased),
            if components.is_empty() {
                "-".to_owned()
            } else {
                components.join("\n")
            },
        ]);
    }
    line(rows.to_string())
}
