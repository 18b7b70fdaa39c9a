//! `hotset load`: loads a component set, shows its progress, and holds it on request.

use std::path::Path;
use std::time::{Duration, Instant};

use clap::Args;
use futures::StreamExt;
use hotset::client::{Client, LoadOptions, RemoteEvent};
use hotset::{
    Bytes, ComponentSet, Config, Hotset, KeepAlive, Lease, LoadError, LoadEvent, Place, Priority,
    Session, Target,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::output::{self, Bars, line, table};
use super::{CliError, Global, config, serve, server};

/// What to load.
#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// Models, components (MODEL/COMPONENT), or paths of model files and folders
    #[arg(required = true)]
    names: Vec<String>,
    /// Where to: best, ram, vram, vram:N
    #[arg(long, default_value = "best")]
    target: Target,
    /// How long it may take, such as 30s [default: load.deadline of the configuration]
    #[arg(long, value_parser = humantime::parse_duration)]
    deadline: Option<Duration>,
    /// Leave the bases of adapters out
    #[arg(long)]
    without_dependencies: bool,
    /// Where no GPU has room for a component: as many of its blocks as fit there, and the others in RAM
    #[arg(long)]
    split: bool,
    /// Whose turn it is when memory is short: interactive, batch, or prefetch for idle links
    #[arg(long, default_value = "interactive", value_parser = parse_priority)]
    priority: Priority,
    /// How long it stays after its last lease: 5m, 0, or -1 for as long as nobody needs the memory [default: load.keep_alive of the
    /// configuration]
    #[arg(long, allow_hyphen_values = true)]
    keep_alive: Option<KeepAlive>,
    /// Hold the leases until ctrl-c
    #[arg(long)]
    hold: bool,
    /// Print the SHA-256 of every tensor, computed from the leased bytes
    #[arg(long)]
    digest: bool,
}

fn parse_priority(text: &str) -> Result<Priority, String> {
    match text {
        "interactive" => Ok(Priority::Interactive),
        "batch" => Ok(Priority::Batch),
        "prefetch" => Ok(Priority::Prefetch),
        _ => Err("there are interactive, batch and prefetch".into()),
    }
}

#[derive(Serialize)]
struct Loaded {
    components: Vec<LoadedComponent>,
    bytes: Bytes,
    elapsed_s: f64,
    bytes_per_s: f64,
}

#[derive(Serialize)]
struct LoadedComponent {
    component: String,
    tier: String,
    bytes: Bytes,
    /// Of what lies on a device, only a server's own process knows them.
    tensors: Vec<LoadedTensor>,
    /// The blocks, where it is split.
    #[serde(skip_serializing_if = "Option::is_none")]
    part: Option<Part>,
}

/// Some blocks of a component that is split.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Part {
    of: String,
    blocks: Vec<String>,
    first: u64,
    of_blocks: u64,
}

/// Says which blocks of split components are where, in the order of use.
pub(crate) fn blocks<'a>(parts: impl Iterator<Item = (&'a Part, &'a str)>) -> Result<(), CliError> {
    for (part, tier) in parts {
        let streamed = if tier == "ram" {
            ", to be streamed"
        } else {
            ""
        };
        let names = match &part.blocks[..] {
            [] => "none".to_owned(),
            [only] => only.clone(),
            [first, .., last] => format!("{first} to {last}"),
        };
        line(format!(
            "{}: {} of {} blocks in {tier}{streamed} ({names})",
            part.of,
            part.blocks.len(),
            part.of_blocks
        ))?;
    }
    Ok(())
}

#[derive(Serialize)]
struct LoadedTensor {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: Bytes,
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
}

/// `hotset load NAME..`
pub(crate) async fn run(args: &LoadArgs, global: &Global) -> Result<(), CliError> {
    let mut config = config(global)?;
    if let Some(client) = server::connect(&config, global).await?
        && let Some(names) = known_to(&client, &args.names).await?
    {
        return from_server(args, &client, names, global).await;
    }
    config.catalog.watch = false;
    let names = names_of(&args.names, &mut config)?;
    if config.catalog.roots.is_empty() {
        return Err(CliError::Usage(
            "no model folder is configured: give a path, --models DIR, or set catalog.roots".into(),
        ));
    }
    if args.digest {
        for gpu in &mut config.gpu {
            gpu.sim.keep_bytes = true;
        }
    }
    let hotset = serve::start(config).await?;
    let session = hotset.session("hotset load").await?;
    let mut set = ComponentSet::new(names).on(args.target);
    set.deadline = args.deadline;
    set.dependencies = !args.without_dependencies;
    set.split = args.split;
    set.priority = args.priority;
    set.keep_alive = args.keep_alive;

    let began = Instant::now();
    let leases = load(&session, set, global.json).await?;
    let elapsed_s = began.elapsed().as_secs_f64();
    let bytes: Bytes = leases.iter().map(|lease| lease.component().bytes).sum();
    let loaded = Loaded {
        components: describe(&leases, args.digest).await?,
        bytes,
        elapsed_s,
        bytes_per_s: bytes.as_f64() / elapsed_s.max(1e-9),
    };
    tell(&loaded, args, global).await?;
    drop((leases, session));
    Hotset::drain(hotset).await;
    Ok(())
}

/// Prints what was loaded, and holds it where that is wanted.
async fn tell(loaded: &Loaded, args: &LoadArgs, global: &Global) -> Result<(), CliError> {
    if global.json {
        output::json(loaded)?;
    } else {
        print(loaded, args.digest)?;
    }
    if args.hold {
        output::tell(format_args!("holding {}; ctrl-c lets go", loaded.bytes));
        serve::Stop::listen()?.told().await;
    }
    Ok(())
}

/// The names for the running server. A path becomes the name that its catalogue has for it; `None` where it has none.
async fn known_to(client: &Client, names: &[String]) -> Result<Option<Vec<String>>, CliError> {
    let mut known = Vec::with_capacity(names.len());
    for name in names {
        let path = Path::new(name);
        if !path.exists() || !(name.contains('/') || name.contains('.')) {
            known.push(name.clone());
            continue;
        }
        let path = std::path::absolute(path).map_err(|source| CliError::File {
            path: path.to_owned(),
            source,
        })?;
        match client.show(&path.to_string_lossy()).await {
            Ok(model) => known.push(model["name"].as_str().unwrap_or_default().to_owned()),
            Err(error) if error.code() == Some("not-found") => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Some(known))
}

/// Loads in the running server, and holds its leases.
async fn from_server(
    args: &LoadArgs,
    client: &Client,
    names: Vec<String>,
    global: &Global,
) -> Result<(), CliError> {
    let mut options = LoadOptions::new(names).on(args.target.to_string());
    if let Some(deadline) = args.deadline {
        options = options.within(deadline);
    }
    if args.without_dependencies {
        options = options.without_dependencies();
    }
    if args.split {
        options = options.may_split();
    }
    if let Some(keep) = args.keep_alive {
        options = options.keep_alive(keep);
    }
    options = match args.priority {
        Priority::Interactive => options,
        Priority::Batch => options.batch(),
        Priority::Prefetch => options.prefetch(),
    };
    let began = Instant::now();
    let mut bars = Bars::new(global.json);
    let mut loading = client.loading(&options)?;
    let leases = loop {
        tokio::select! {
            biased;
            event = loading.next() => match event? {
                RemoteEvent::Progress(progress) => bars.show(&progress),
                RemoteEvent::Leased(leases) => break leases,
                // It was not asked for.
                RemoteEvent::Planned(_) | RemoteEvent::Part(_) => {}
            },
            _ = tokio::signal::ctrl_c() => loading.cancel(),
        }
    };
    bars.finish();
    let elapsed_s = began.elapsed().as_secs_f64();
    let bytes: Bytes = leases.iter().map(|lease| Bytes(lease.leased().bytes)).sum();
    let mut components = Vec::with_capacity(leases.len());
    for lease in &leases {
        let leased = lease.leased();
        // What lies on a device has no bytes here, and is listed without its tensors.
        let tensors = match lease.mapping() {
            Ok(_) => lease.tensors()?,
            Err(error) if args.digest => return Err(error.into()),
            Err(_) => Vec::new(),
        };
        components.push(LoadedComponent {
            component: leased.component.clone(),
            tier: leased.tier.clone(),
            bytes: Bytes(leased.bytes),
            tensors: tensors
                .iter()
                .map(|tensor| LoadedTensor {
                    name: tensor.name.to_owned(),
                    dtype: tensor.dtype.to_owned(),
                    shape: tensor.shape.iter().map(|d| *d as usize).collect(),
                    bytes: Bytes(tensor.bytes.len() as u64),
                    sha256: args.digest.then(|| hex(&Sha256::digest(tensor.bytes))),
                })
                .collect(),
            part: leased.part.as_ref().map(|part| Part {
                of: part.of.clone(),
                blocks: part.blocks.clone(),
                first: part.first,
                of_blocks: part.of_blocks,
            }),
        });
    }
    let loaded = Loaded {
        components,
        bytes,
        elapsed_s,
        bytes_per_s: bytes.as_f64() / elapsed_s.max(1e-9),
    };
    tokio::select! {
        told = tell(&loaded, args, global) => told,
        lost = client.closed() => Err(lost.into()),
    }
}

/// Loads with progress bars.
pub(crate) async fn load(
    session: &Session,
    set: ComponentSet,
    quiet: bool,
) -> Result<Vec<Lease>, CliError> {
    let mut bars = Bars::new(quiet);
    let mut loading = session.load(set);
    let mut leases = Vec::new();
    // A cancelled command gives everything back before it ends.
    let outcome = loop {
        tokio::select! {
            biased;
            event = loading.next() => match event {
                Some(Ok(LoadEvent::Progress(progress))) => bars.show(&(&progress).into()),
                Some(Ok(LoadEvent::Leased(lease))) => leases.push(lease),
                Some(Ok(LoadEvent::Done)) => break Ok(leases),
                Some(Ok(_)) => {}
                Some(Err(error)) => break Err(error),
                None => break Err(LoadError::Restarted),
            },
            _ = tokio::signal::ctrl_c() => loading.cancel(),
        }
    };
    if let Some(progress) = loading.progress() {
        bars.show(&(&progress).into());
    }
    bars.finish();
    Ok(outcome?)
}

/// The names to load: a path of a model becomes the name that the catalogue gives it, and its folder a root.
fn names_of(names: &[String], config: &mut Config) -> Result<Vec<String>, CliError> {
    names
        .iter()
        .map(|name| {
            let path = Path::new(name);
            // A name without a separator is a model's, also where a file of that name lies about.
            if !path.exists() || !(name.contains('/') || name.contains('.')) {
                return Ok(name.clone());
            }
            let source = |source| CliError::File {
                path: path.to_owned(),
                source,
            };
            let path = std::path::absolute(path).map_err(source)?;
            let known = config.catalog.roots.iter().any(|root| {
                std::path::absolute(root).is_ok_and(|root| path.starts_with(&root) && path != root)
            });
            if !known && let Some(parent) = path.parent() {
                config.catalog.roots.push(if path.is_dir() {
                    path.clone()
                } else {
                    parent.to_owned()
                });
            }
            Ok(path.to_string_lossy().into_owned())
        })
        .collect()
}

async fn describe(leases: &[Lease], digest: bool) -> Result<Vec<LoadedComponent>, CliError> {
    let mut components = Vec::with_capacity(leases.len());
    for lease in leases {
        let mut tensors = Vec::new();
        for view in lease.tensors() {
            let bytes = match view.place {
                Place::Host(bytes) => Bytes(bytes.len() as u64),
                Place::Device { bytes, .. } => bytes,
            };
            let sha256 = match (digest, view.place, lease.allocation()) {
                (true, Place::Host(bytes), _) => Some(hex(&Sha256::digest(bytes))),
                (true, Place::Device { address, bytes, .. }, Some(allocation)) => {
                    let offset = address - allocation.address();
                    let device = allocation.device();
                    let read = device.download(allocation, offset, bytes.get()).await?;
                    Some(hex(&Sha256::digest(read)))
                }
                _ => None,
            };
            tensors.push(LoadedTensor {
                name: view.name.to_owned(),
                dtype: view.dtype.to_string(),
                shape: view.shape.to_vec(),
                bytes,
                sha256,
            });
        }
        components.push(LoadedComponent {
            component: lease.component().id.to_string(),
            tier: lease.tier().to_string(),
            bytes: lease.component().bytes,
            tensors,
            part: lease.component().part.as_ref().map(|part| Part {
                of: part.of.to_string(),
                blocks: part.blocks.iter().map(ToString::to_string).collect(),
                first: part.first as u64,
                of_blocks: part.of_blocks as u64,
            }),
        });
    }
    Ok(components)
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn print(loaded: &Loaded, digest: bool) -> Result<(), CliError> {
    if digest {
        let mut rows = table(&["component", "tensor", "dtype", "shape", "sha256"], &[]);
        for component in &loaded.components {
            for tensor in &component.tensors {
                rows.add_row([
                    component.component.clone(),
                    tensor.name.clone(),
                    tensor.dtype.clone(),
                    format!("{:?}", tensor.shape),
                    tensor.sha256.clone().unwrap_or_default(),
                ]);
            }
        }
        line(rows.to_string())?;
    } else {
        let mut rows = table(
            &["component", "tier", "size", "tensors"],
            &["size", "tensors"],
        );
        for component in &loaded.components {
            rows.add_row([
                component.component.clone(),
                component.tier.clone(),
                component.bytes.to_string(),
                match component.tensors.len() {
                    0 => "-".to_owned(),
                    count => count.to_string(),
                },
            ]);
        }
        line(rows.to_string())?;
        let parts = loaded.components.iter();
        blocks(parts.filter_map(|c| Some((c.part.as_ref()?, c.tier.as_str()))))?;
    }
    line(format!(
        "{} in {:.2} s, {}/s",
        loaded.bytes,
        loaded.elapsed_s,
        Bytes(loaded.bytes_per_s as u64)
    ))
}
