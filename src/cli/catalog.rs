//! `hotset scan`, `ls` and `show`: the catalogue.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use hotset::bridge::wire::List;
use hotset::client::Client;
use hotset::core::catalog::query::Query;
use hotset::core::catalog::{Facts, ScanOptions, ScanReport};
use hotset::core::config::CatalogConfig;
use hotset::core::plan::{Edge, resolve};
use hotset::{Bytes, ContentId, documents};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::{Value, json};

use super::kept::scan_from;
use super::output::{self, line, table, tell};
use super::{CliError, Global, config, config_with_models, server};

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
    /// Print what it consists of with what it depends on, in loading order, and what comes before what; takes declared sets
    #[arg(long, conflicts_with_all = ["why_identified", "sha256"])]
    graph: bool,
    /// The same in the language of Graphviz: `hotset show NAME --dot | dot -Tsvg > set.svg`
    #[arg(long, conflicts_with_all = ["why_identified", "sha256", "graph"])]
    dot: bool,
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
        tell(format_args!("warning: {problem}"));
    }
    if global.json {
        let models: Vec<_> = report
            .catalogue
            .models()
            .map(|model| documents::model(model))
            .collect();
        return output::json(&json!({
            "models": models,
            "files": report.files,
            "elapsed_s": elapsed_s,
        }));
    }
    list(
        report
            .catalogue
            .models()
            .map(|model| documents::model(model)),
    )?;
    line(format!(
        "{} models in {} files, {elapsed_s:.2} s",
        report.catalogue.len(),
        report.files
    ))
}

/// `hotset ls [QUERY]`
pub(crate) async fn ls(args: &LsArgs, global: &Global) -> Result<(), CliError> {
    let text = args.query.join(" ");
    let query = Query::parse(&text).map_err(|e| CliError::Usage(e.to_string()))?;
    let (found, all) = match server::connect(&config(global)?, global).await? {
        Some(client) => listed_by(&client, &text).await?,
        None => {
            let config = config_with_models(global)?;
            let report = scanned(&config.catalog, global.json).await?;
            let hits = report.catalogue.search(&query, usize::MAX);
            let found = hits.iter().map(|hit| documents::model(&hit.model));
            (found.collect(), report.catalogue.len())
        }
    };
    if global.json {
        return output::json(&json!({ "models": found }));
    }
    let count = found.len();
    list(found.into_iter())?;
    line(format!("{count} of {all} models"))
}

/// What the running server finds, page by page, and how many models it has.
async fn listed_by(client: &Client, query: &str) -> Result<(Vec<Value>, usize), CliError> {
    let mut found = Vec::new();
    loop {
        let page = List {
            query: query.to_owned(),
            offset: found.len() as u64,
            limit: 0,
        };
        let page = client.list(page).await?;
        let last = page.models.is_empty();
        found.extend(page.models);
        if last || found.len() as u64 >= page.total {
            break;
        }
    }
    let all = List {
        limit: 1,
        ..List::default()
    };
    let all = client.list(all).await?.total;
    Ok((found, usize::try_from(all).unwrap_or(usize::MAX)))
}

/// A model, as far as the list shows it.
#[derive(Deserialize)]
struct Row {
    name: String,
    kind: String,
    architecture: Option<String>,
    format: String,
    bytes: Bytes,
    components: Vec<Value>,
    error: Option<String>,
}

pub(super) fn list(models: impl Iterator<Item = Value>) -> Result<(), CliError> {
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
        let model: Row = output::view(model)?;
        let name = match &model.error {
            None => model.name.clone(),
            Some(error) => format!("{}\n  ! {error}", model.name),
        };
        rows.add_row([
            name,
            model.kind,
            model.architecture.unwrap_or_else(|| "-".into()),
            model.format,
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
    if args.graph || args.dot {
        return show_graph(args, global).await;
    }
    let mut document = match server::connect(&config(global)?, global).await? {
        Some(client) => client.show(&name_or_path(&args.model)).await?,
        None => {
            let config = config_with_models(global)?;
            let report = scanned(&config.catalog, global.json).await?;
            let model = report.catalogue.find(&args.model)?;
            documents::model_in(&report.catalogue, model)
        }
    };
    if args.sha256 {
        document["sha256"] = json!(sha256_of(&document).await?);
    }
    if global.json {
        return output::json(&document);
    }
    print(output::view(document)?, args.why_identified)
}

/// What depends on what, by the folders alone: no server need run.
async fn show_graph(args: &ShowArgs, global: &Global) -> Result<(), CliError> {
    let config = config_with_models(global)?;
    let report = scanned(&config.catalog, global.json).await?;
    let names = [args.model.clone()];
    let graph =
        resolve(&report.catalogue, &config.set, &names, true).map_err(hotset::LoadError::from)?;
    if args.dot {
        return line(graph.dot().trim_end());
    }
    let edges: Vec<_> = graph
        .edges()
        .map(|(from, to, edge)| json!({"from": from.id, "to": to.id, "why": edge.to_string()}))
        .collect();
    if global.json {
        return output::json(&json!({"components": graph.order(), "edges": edges}));
    }
    let mut rows = table(&["#", "component", "kind", "size", "after"], &["#", "size"]);
    for (i, component) in graph.order().iter().enumerate() {
        let mut after: Vec<String> = graph
            .edges()
            .filter(|(_, to, _)| to.id == component.id)
            .map(|(from, _, edge)| match edge {
                Edge::UsedBefore => from.id.to_string(),
                Edge::Adapts => format!("{} (adapts it)", from.id),
                Edge::Drafts => format!("{} (drafts for it)", from.id),
                Edge::Declared => format!("{} (declared)", from.id),
            })
            .collect();
        after.sort();
        rows.add_row([
            (i + 1).to_string(),
            component.id.to_string(),
            component.kind.to_string(),
            component.bytes.to_string(),
            after.join(", "),
        ]);
    }
    line(rows.to_string())
}

/// A path as the server's catalogue has it, where the text is one.
fn name_or_path(text: &str) -> String {
    match std::path::absolute(text) {
        Ok(path) if path.exists() && text.contains('/') => path.to_string_lossy().into_owned(),
        _ => text.to_owned(),
    }
}

/// A model, as far as tables show it.
#[derive(Deserialize)]
struct View {
    #[serde(flatten)]
    row: Row,
    path: String,
    base: Option<Base>,
    facts: Facts,
    dependencies: Dependencies,
    #[serde(default)]
    sha256: BTreeMap<String, String>,
    #[serde(default)]
    resident: BTreeMap<String, Vec<String>>,
}

#[derive(Deserialize)]
struct Base {
    architecture: Option<String>,
    name: Option<String>,
}

#[derive(Deserialize)]
struct Dependencies {
    error: Option<String>,
    #[serde(default)]
    loading_order: Vec<String>,
}

#[derive(Deserialize)]
struct Part {
    name: String,
    kind: String,
    dtype: Option<String>,
    bytes: Bytes,
    tensors: u64,
    content_id: ContentId,
    files: Vec<PathBuf>,
}

fn print(model: View, why_identified: bool) -> Result<(), CliError> {
    let row = model.row;
    line(format!("{}  {}", row.name, model.path))?;
    line(format!(
        "{} {} ({}), {}",
        row.architecture.as_deref().unwrap_or("unknown"),
        row.kind,
        row.format,
        row.bytes
    ))?;
    if let Some(error) = &row.error {
        line(format!("cannot be loaded: {error}"))?;
    }
    if let Some(base) = model.base {
        let base: Vec<String> = [base.architecture, base.name]
            .into_iter()
            .flatten()
            .collect();
        line(format!("needs a base: {}", base.join(", ")))?;
    }
    for fact in facts(&model.facts) {
        line(fact)?;
    }
    if why_identified {
        why(&model.facts)?;
    }
    for (path, digest) in &model.sha256 {
        line(format!("sha256 {digest}  {path}"))?;
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
    for part in row.components {
        let part: Part = output::view(part)?;
        let files: Vec<_> = part
            .files
            .iter()
            .map(|path| {
                path.file_name()
                    .unwrap_or(path.as_os_str())
                    .to_string_lossy()
            })
            .collect();
        rows.add_row([
            part.name,
            part.kind,
            part.dtype.unwrap_or_else(|| "-".into()),
            part.bytes.to_string(),
            part.tensors.to_string(),
            part.content_id.short(),
            files.join("\n"),
        ]);
    }
    line(rows.to_string())?;
    for (component, tiers) in &model.resident {
        line(format!("{component} is resident in {}", tiers.join(", ")))?;
    }
    match model.dependencies.error {
        Some(error) => line(format!("dependencies: {error}")),
        None => line(format!(
            "loading order: {}",
            model.dependencies.loading_order.join(" → ")
        )),
    }
}

/// What is known of a model beside kind and architecture, a line each.
fn facts(facts: &Facts) -> Vec<String> {
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
fn why(facts: &Facts) -> Result<(), CliError> {
    if facts.evidence.is_empty() {
        return line(
            "no signature matched: nothing is known of its keys, metadata or configuration",
        );
    }
    let mut rows = table(&["signature", "says", "score", "because"], &["score"]);
    for evidence in facts.evidence.iter() {
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
async fn sha256_of(model: &Value) -> Result<BTreeMap<String, String>, CliError> {
    let files = model["components"]
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|component| component["files"].as_array().into_iter().flatten());
    let paths: BTreeSet<PathBuf> = files
        .filter_map(|file| file.as_str().map(PathBuf::from))
        .collect();
    let digests = tokio::task::spawn_blocking(move || {
        paths
            .into_iter()
            .map(|path| match hotset::core::catalog::content::sha256(&path) {
                Ok(digest) => Ok((path.to_string_lossy().into_owned(), digest)),
                Err(source) => Err(CliError::File { path, source }),
            })
            .collect::<Result<BTreeMap<_, _>, _>>()
    })
    .await;
    digests.map_err(|error| CliError::Usage(format!("the digest failed: {error}")))?
}

/// Bytes as tables show them, with `-` for none.
pub(crate) fn bytes_or_dash(bytes: Bytes) -> String {
    if bytes.is_zero() {
        "-".into()
    } else {
        bytes.to_string()
    }
}
