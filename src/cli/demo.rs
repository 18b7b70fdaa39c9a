//! `hotset demo`: a library, a system, two pipelines that do not fit beside each other, and what happened and why.

pub(crate) mod library;

use std::path::PathBuf;

use clap::Args;
use hotset::core::config::GpuConfig;
use hotset::{Act, Bytes, ComponentSet, Config, Hotset, documents};
use indicatif::{ProgressBar, ProgressStyle};
use library::Scale;
use serde_json::json;

use super::output::{self, line};
use super::{CliError, Global, load, serve, status};

/// How to demonstrate.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Keep the library in this folder instead of a temporary one
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// How large the library becomes
    #[arg(long, default_value = "full")]
    scale: Scale,
}

/// `hotset demo`
pub(crate) async fn run(args: &DemoArgs, global: &Global) -> Result<(), CliError> {
    let temporary = match args.keep {
        Some(_) => None,
        None => Some(tempfile::tempdir().map_err(|source| CliError::File {
            path: std::env::temp_dir(),
            source,
        })?),
    };
    let root = match (&args.keep, &temporary) {
        (Some(keep), _) => keep.clone(),
        (None, Some(folder)) => folder.path().to_owned(),
        (None, None) => return Ok(()),
    };
    let say = |text: &str| if global.json { Ok(()) } else { line(text) };
    say(&format!("1. A small model library in {}", root.display()))?;
    let library = make_library(root.clone(), args.scale, global.json).await?;

    let config = demo_config(root, args.scale);
    let hotset = serve::start(config).await?;
    let models = hotset.catalogue();
    say(&format!(
        "\n2. The system runs, as in `hotset serve`, and knows {} models",
        models.len()
    ))?;
    if !global.json {
        super::catalog::list(models.models().map(|model| documents::model(model)))?;
        say("\n3. Before: nothing is resident")?;
        status::tiers(&hotset.status().await.tiers)?;
        say(&format!(
            "\n4. Load {} with {} and {}, all or nothing",
            library.pipeline, library.lora, library.controlnet
        ))?;
    }
    let before = hotset.status().await.tiers;
    let session = hotset.session("demo").await?;
    let first = ComponentSet::new([library.pipeline, library.lora, library.controlnet]);
    let leases = load::load(&session, first, global.json).await?;
    let after_first = hotset.status().await.tiers;
    say("\n5. After: leased on the GPU, and kept in RAM")?;
    if !global.json {
        status::tiers(&after_first)?;
    }
    drop(leases);

    say(&format!(
        "\n6. The leases are released. Load {}, for which the GPU has no room beside the first",
        library.second_pipeline
    ))?;
    let second = ComponentSet::new([library.second_pipeline]);
    let leases = load::load(&session, second, global.json).await?;
    let after_second = hotset.status().await.tiers;
    if !global.json {
        status::tiers(&after_second)?;
    }
    let mut evictions: Vec<_> = hotset
        .decisions(100)
        .into_iter()
        .filter(|decision| matches!(decision.act, Act::Evict { .. }))
        .collect();
    evictions.reverse();
    say("\n7. What was evicted, and why")?;
    for decision in &evictions {
        say(&format!("   {}", decision.act.sentence()))?;
    }
    drop((leases, session));
    Hotset::drain(hotset).await;
    say("\n8. Drained. Try it on your own models: hotset --models DIR ls")?;
    if global.json {
        output::json(&json!({
            "models": models.models().map(|model| documents::model(model)).collect::<Vec<_>>(),
            "before": before,
            "after_first": after_first,
            "after_second": after_second,
            "evictions": evictions,
        }))?;
    }
    Ok(())
}

async fn make_library(
    root: PathBuf,
    scale: Scale,
    quiet: bool,
) -> Result<library::Library, CliError> {
    let bar = if quiet {
        ProgressBar::hidden()
    } else {
        ProgressBar::new_spinner()
    };
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
        bar.set_style(style);
    }
    let shown = bar.clone();
    let folder = root.clone();
    let made = tokio::task::spawn_blocking(move || {
        library::make(&folder, scale, |name| {
            shown.set_message(format!("made {name}"));
            shown.tick();
        })
    })
    .await;
    bar.finish_and_clear();
    made.unwrap_or_else(|panic| Err(std::io::Error::other(panic)))
        .map_err(|source| CliError::File { path: root, source })
}

/// A machine on which the two pipelines do not fit beside each other: a simulated GPU, since there may be no real one.
fn demo_config(root: PathBuf, scale: Scale) -> Config {
    let mut config = Config::default();
    config.catalog.roots = vec![root];
    config.catalog.watch = false;
    let (ram, vram, granularity) = match scale {
        Scale::Full => (Bytes::gib(1), Bytes::mib(400), Bytes::mib(2)),
        Scale::Tiny => (Bytes::mib(64), Bytes::mib(7), Bytes::kib(64)),
    };
    config.ram.budget = Some(ram);
    let mut gpu = GpuConfig {
        budget: Some(vram),
        headroom: Bytes::ZERO,
        ..GpuConfig::default()
    };
    gpu.sim.memory = vram;
    gpu.sim.granularity = granularity;
    // Slow enough to be seen.
    gpu.sim.bandwidth = Bytes::mib(400);
    config.gpu = vec![gpu];
    config
}
