//! `hotset scan`, `ls` and `show`: the catalogue.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use hotset::core::catalog::query::Query;
use hotset::core::catalog::{ScanOptions, ScanReport};
use hotset::core::config::CatalogConfig;
use hotset::{Bytes, Catalogue, Component, ComponentSet, Model};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::kept::scan_from;
use super::output::{self, line, table};
use super::{CliError, Global, config, config_with_models};

/// What to scan.
#[derive(Debug, Args)]
pub(crate) struct ScanArgs {
    /// Folders with models [default: the configuration's]
    dirs: Vec<PathBuf>,
}

/// What to list.
#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    /// Words in any order, and fields such as kind:lora base:sdxl size:<200MiB; best matches first
    query: Vec<String>,
}

/// What to show.
#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// A model's name, the last part of it where that is enough, or its path
    model: String,
    /// Print the signatures that say what it is
    #[arg(long)]
    why_identified: bool,
    /// Compute the SHA-256 of its files, as catalogues on the web list them
    #[arg(long)]
    sha256: bool,
}

/// Scans, with a spinner on a terminal.
async fn scanned(config: &CatalogConfig, quiet: bool) -> Result<ScanReport, CliError> {
    let spinner = if quiet {
        ProgressBar::hidden()
    } else {
        ProgressBar::new_spinner()
    };
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
        spinner.set_style(style);
    }
    let shown = spinner.clone();
    let options = ScanOptions::from_config(config)?;
    let database = config.database.clone();
    let scanned = tokio::task::spawn_blocking(move || {
        scan_from(&options, database, &|progress| {
            shown.set_message(format!("{progress}"));
            shown.tick();
        })
    })
    .await;
    spinner.finish_and_clear();
    scanned.map_err(|error| CliError::Usage(format!("the scan failed: {error}")))
}

/// `hotset scan DIR..`
pub(crate) async fn scan(args: &ScanArgs, global: &Global) -> Result<(), CliError> {
    let mut config = config(global)?;
    if !args.dirs.is_empty() {
        config.catalog.roots.clone_from(&args.dirs);
    }
    if config.catalog.roots.is_empty() {
        return Err(CliError::Usage(
            "name the folders to scan, or set catalog.roots in the configuration".into(),
        ));
    }
    let began = Instant::now();
    let report = scanned(&config.catalog, global.json).await?;
    let elapsed_s = began.elapsed().as_secs_f64();
    for problem in &report.problems {
        eprintln!("warning: {problem}");
    }
    if global.json {
        let models: Vec<_> = report
            .catalogue
            .models()
            .map(|model| model_json(model))
            .collect();
        return output::json(&json!({
            "models": models,
            "files": report.files,
            "elapsed_s": elapsed_s,
        }));
    }
    list(report.catalogue.models())?;
    line(format!(
        "{} models in {} files, {elapsed_s:.2} s",
        report.catalogue.len(),
        report.files
    ))
}

/// `hotset ls [QUERY]`
pub(crate) async fn ls(args: &LsArgs, global: &Global) -> Result<(), CliError> {
    let config = config_with_models(global)?;
    let report = scanned(&config.catalog, global.json).await?;
    let query = Query::parse(&args.query.join(" ")).map_err(|e| CliError::Usage(e.to_string()))?;
    let hits = report.catalogue.search(&query, usize::MAX);
    let found: Vec<&Arc<Model>> = hits.iter().map(|hit| &hit.model).collect();
    if global.json {
        let models: Vec<_> = found.iter().map(|model| model_json(model)).collect();
        return output::json(&json!({ "models": models }));
    }
    list(found.iter().copied())?;
    line(format!(
        "{} of {} models",
        found.len(),
        report.catalogue.len()
    ))
}

pub(super) fn list<'a>(models: impl Iterator<Item = &'a Arc<Model>>) -> Result<(), CliError> {
    let mut rows = table(
        &[
            "model",
            "kind",
            "architecture",
            "format",
            "size",
            "components",
        ],
        &["size", "components"],
    );
    for model in models {
        let name = match &model.error {
            None => model.name.to_string(),
            Some(error) => format!("{}\n  ! {error}", model.name),
        };
        rows.add_row([
            name,
            model.kind.to_string(),
            model.architecture.as_deref().unwrap_or("-").to_owned(),
            model.format.to_string(),
            model.bytes.to_string(),
            model.components.len().to_string(),
        ]);
    }
    if rows.is_empty() {
        return Ok(());
    }
    line(rows.to_string())
}

/// `hotset show MODEL`
pub(crate) async fn show(args: &ShowArgs, global: &Global) -> Result<(), CliError> {
    let config = config_with_models(global)?;
    let report = scanned(&config.catalog, global.json).await?;
    let model = report.catalogue.find(&args.model)?;
    let sha256 = match args.sha256 {
        true => sha256_of(model).await?,
        false => Vec::new(),
    };
    if global.json {
        let mut document = model_json(model);
        document["facts"] = json!(model.facts);
        if args.sha256 {
            let digests: serde_json::Map<String, serde_json::Value> = sha256
                .iter()
                .map(|(path, digest)| (path.to_string_lossy().into_owned(), json!(digest)))
                .collect();
            document["sha256"] = json!(digests);
        }
        document["base"] = json!(model.base);
        document["dependencies"] = dependencies(&report.catalogue, model);
        return output::json(&document);
    }
    line(format!("{}  {}", model.name, model.path.display()))?;
    line(format!(
        "{} {} ({}), {}",
        model.architecture.as_deref().unwrap_or("unknown"),
        model.kind,
        model.format,
        model.bytes
    ))?;
    if let Some(error) = &model.error {
        line(format!("cannot be loaded: {error}"))?;
    }
    if let Some(base) = &model.base {
        line(format!(
            "needs a base: {}",
            [base.architecture.as_deref(), base.name.as_deref()]
                .into_iter()
                .flatten()
                .collect::<Vec<_>>()
                .join(", ")
        ))?;
    }
    for fact in facts(model) {
        line(fact)?;
    }
    if args.why_identified {
        why(model)?;
    }
    for (path, digest) in &sha256 {
        line(format!("sha256 {digest}  {}", path.display()))?;
    }
    let mut rows = table(
        &[
            "component",
            "kind",
            "dtype",
            "size",
            "tensors",
            "content id",
            "files",
        ],
        &["size", "tensors"],
    );
    for component in &model.components {
        rows.add_row([
            component.id.component.to_string(),
            component.kind.to_string(),
            component.dtype.as_deref().unwrap_or("-").to_owned(),
            component.bytes.to_string(),
            component.tensors.to_string(),
            component.content_id.short(),
            file_names(component).join("\n"),
        ]);
    }
    line(rows.to_string())?;
    let order = dependencies(&report.catalogue, model);
    match order.get("error").and_then(|error| error.as_str()) {
        Some(error) => line(format!("dependencies: {error}")),
        None => {
            let order: Vec<&str> = order["loading_order"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|id| id.as_str())
                .collect();
            line(format!("loading order: {}", order.join(" → ")))
        }
    }
}

/// What is known of a model beside kind and architecture, a line each.
fn facts(model: &Model) -> Vec<String> {
    let facts = &model.facts;
    let text = |name: &str, value: Option<&str>| value.map(|value| format!("{name}: {value}"));
    let parameters = facts.parameters.map(|n| match n {
        1_000_000_000.. => format!("parameters: {:.1} billion", n as f64 / 1e9),
        _ => format!("parameters: {:.1} million", n as f64 / 1e6),
    });
    let dtypes: Vec<String> = facts
        .dtypes
        .iter()
        .map(|(dtype, bytes)| format!("{dtype} {bytes}"))
        .collect();
    let dtypes = (!dtypes.is_empty()).then(|| format!("dtypes: {}", dtypes.join(", ")));
    [
        text("variant", facts.variant.as_deref()),
        parameters,
        dtypes,
        text("quantisation", facts.quantization.as_deref()),
        text("dialect", facts.dialect.as_deref()),
        facts.rank.map(|rank| format!("rank: {rank}")),
        text("repository", facts.repo.as_deref()),
        text("revision", facts.revision.as_deref()),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The signatures that matched, best first.
fn why(model: &Model) -> Result<(), CliError> {
    if model.facts.evidence.is_empty() {
        return line(
            "no signature matched: nothing is known of its keys, metadata or configuration",
        );
    }
    let mut rows = table(&["signature", "says", "score", "because"], &["score"]);
    for evidence in model.facts.evidence.iter() {
        rows.add_row([
            evidence.source.to_string(),
            evidence.says.to_string(),
            evidence.score.to_string(),
            evidence.reason.to_string(),
        ]);
    }
    line(rows.to_string())
}

/// The SHA-256 of each weight file of a model.
async fn sha256_of(model: &Arc<Model>) -> Result<Vec<(PathBuf, String)>, CliError> {
    let mut paths: Vec<PathBuf> = model
        .components
        .iter()
        .flat_map(|component| component.files.iter().map(|file| file.path.to_path_buf()))
        .collect();
    paths.sort();
    paths.dedup();
    let digests = tokio::task::spawn_blocking(move || {
        paths
            .into_iter()
            .map(|path| match hotset::core::catalog::content::sha256(&path) {
                Ok(digest) => Ok((path, digest)),
                Err(source) => Err(CliError::File { path, source }),
            })
            .collect::<Result<Vec<_>, _>>()
    })
    .await;
    digests.map_err(|error| CliError::Usage(format!("the digest failed: {error}")))?
}

fn dependencies(catalogue: &Catalogue, model: &Model) -> serde_json::Value {
    let set = ComponentSet::new([model.name.as_str()]);
    match hotset::core::plan::resolve(catalogue, &set.names, set.dependencies) {
        Err(error) => json!({ "error": error.to_string() }),
        Ok(graph) => json!({
            "loading_order": graph.order().iter().map(|c| c.id.to_string()).collect::<Vec<_>>(),
            "edges": graph.edges().map(|(before, after, why)| json!({
                "before": before.id.to_string(),
                "after": after.id.to_string(),
                "why": format!("{why}"),
            })).collect::<Vec<_>>(),
        }),
    }
}

fn file_names(component: &Component) -> Vec<String> {
    component
        .files
        .iter()
        .map(|file| {
            file.path
                .file_name()
                .unwrap_or(file.path.as_os_str())
                .to_string_lossy()
                .into_owned()
        })
        .collect()
}

/// A model as the commands' JSON has it. Paths that are not UTF-8 are written with replacement characters.
pub(crate) fn model_json(model: &Model) -> serde_json::Value {
    json!({
        "path": model.path.to_string_lossy(),
        "name": model.name,
        "format": model.format,
        "kind": model.kind,
        "architecture": model.architecture,
        "bytes": model.bytes,
        "components": model.components.iter().map(|component| json!({
            "name": component.id.component,
            "kind": component.kind,
            "architecture": component.architecture,
            "dtype": component.dtype,
            "bytes": component.bytes,
            "tensors": component.tensors,
            "content_id": component.content_id,
            "files": component.files.iter().map(|file| file.path.to_string_lossy()).collect::<Vec<_>>(),
        })).collect::<Vec<_>>(),
        "error": model.error,
    })
}

/// Bytes as tables show them, with `-` for none.
pub(crate) fn bytes_or_dash(bytes: Bytes) -> String {
    if bytes.is_zero() {
        "-".into()
    } else {
        bytes.to_string()
    }
}
