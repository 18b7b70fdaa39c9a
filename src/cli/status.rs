//! `hotset status`: tiers, sessions, actors, health.

use hotset::core::device::FigureSource;
use hotset::{Bytes, Health, Hotset, Status, TierStatus};

use super::catalog::bytes_or_dash;
use super::output::{self, gauge, line, table};
use super::{CliError, Global, config, serve};

/// `hotset status`
pub(crate) async fn run(global: &Global) -> Result<(), CliError> {
    let mut config = config(global)?;
    config.catalog.watch = false;
    let hotset = serve::start(config).await?;
    let status = hotset.status().await;
    Hotset::drain(hotset).await;
    if global.json {
        return output::json(&status);
    }
    print(&status)
}

fn print(status: &Status) -> Result<(), CliError> {
    match &status.health {
        Health::Green => line("health: green")?,
        Health::Yellow { problems } => line(format!("health: yellow: {}", problems.join("; ")))?,
        Health::Red { problems } => line(format!("health: red: {}", problems.join("; ")))?,
    }
    line(format!(
        "catalogue: {} models ({} with errors); reader: {}; eviction: {}",
        status.catalogue.models, status.catalogue.with_error, status.reader, status.eviction
    ))?;
    let arena = &status.arena;
    line(format!(
        "host memory: {} in use, {} warm, {} lingering; {} pages",
        arena.live, arena.warm, arena.lingering, arena.pages
    ))?;
    tiers(&status.tiers)?;
    devices(&status.tiers)?;
    if !status.sessions.is_empty() {
        let mut rows = table(&["session", "label", "leases", "age"], &["leases", "age"]);
        for session in &status.sessions {
            rows.add_row([
                session.id.to_string(),
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
            actor.name.to_string(),
            actor.state.to_string(),
            actor.restarts.to_string(),
            actor.last_failure.clone().unwrap_or_else(|| "-".into()),
        ]);
    }
    line(rows.to_string())
}

/// The GPUs behind the tiers, and what they said last.
fn devices(tiers: &[TierStatus]) -> Result<(), CliError> {
    for tier in tiers {
        let (Some(device), Some(figures)) = (&tier.device, &tier.figures) else {
            continue;
        };
        let mut parts = vec![
            format!("{} free of {}", figures.free, figures.total),
            format!("others use {}", figures.foreign),
        ];
        parts.extend(figures.context.map(|bytes| format!("context {bytes}")));
        parts.extend(figures.temperature_c.map(|degrees| format!("{degrees} °C")));
        parts.extend(
            figures
                .pcie
                .map(|(generation, lanes)| format!("PCIe {generation} x{lanes}")),
        );
        if !figures.throttling.is_empty() {
            parts.push(format!("slowed down: {}", figures.throttling.join(", ")));
        }
        parts.extend(
            figures
                .ecc_uncorrected
                .filter(|errors| *errors > 0)
                .map(|errors| format!("{errors} uncorrected memory errors")),
        );
        if figures.mig == Some(true) {
            parts.push("divided by MIG".into());
        }
        let source = match figures.source {
            FigureSource::Sim => "the simulation",
            FigureSource::Nvml => "NVML",
            FigureSource::Driver => "the driver, since NVML is missing",
        };
        line(format!(
            "{}: {}: {} (says {source})",
            tier.tier,
            device.name,
            parts.join("; ")
        ))?;
    }
    Ok(())
}

/// The tiers, and what is in each.
pub(crate) fn tiers(tiers: &[TierStatus]) -> Result<(), CliError> {
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
                let leased = if component.leases > 0 {
                    " (leased)"
                } else {
                    ""
                };
                format!("{} {}{leased}", component.component, component.bytes)
            })
            .collect();
        let name = match &tier.out_of_service {
            None => tier.tier.to_string(),
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
