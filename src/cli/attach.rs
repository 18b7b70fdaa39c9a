//! `hotset bench attach`: how long it takes to lease and map what is resident already, in this process, from another one, and from Python.

mod killed;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use hotset::bridge::Bridge;
use hotset::client::{Client, LoadOptions, RemoteLease};
use hotset::core::device::cuda::{Cuda, Imported};
use hotset::{Bytes, ComponentSet, Config, Hotset, Target, Tier};
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use super::output::{self, line, table};
use super::{CliError, Global, serve};

/// How to measure attaching.
#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// Where the set is: `ram`, or a GPU such as `vram:0`
    #[arg(long, default_value = "ram")]
    tier: Tier,
    /// Components in the set; a diffusion pipeline with its adapters has seven
    #[arg(long, default_value_t = 7)]
    components: usize,
    /// Tensors in each
    #[arg(long, default_value_t = 200)]
    tensors: usize,
    /// Size of each component
    #[arg(long, default_value = "8MiB")]
    size: Bytes,
    /// Connections that ask at the same time, for the rate
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Sessions that are open in this process, and ask in turn
    #[arg(long, default_value_t = 10_000)]
    sessions: usize,
    /// Requests of theirs
    #[arg(long, default_value_t = 100_000)]
    requests: usize,
    /// Size of the file for `load_file` in Python, which needs twice as much memory; 0: none. It is written as holes
    #[arg(long, default_value = "4GiB")]
    file: Bytes,
    /// Tensors in it
    #[arg(long, default_value_t = 400)]
    file_tensors: usize,
    /// How long each measurement takes
    #[arg(long, default_value = "3s", value_parser = humantime::parse_duration)]
    time: Duration,
    /// The Python with the hotset package
    #[arg(long, default_value = "python3", value_name = "FILE")]
    python: PathBuf,
    /// Measure as a client of the server on this socket; this is what the command itself starts
    #[arg(long, hide = true, value_name = "SOCKET")]
    against: Option<PathBuf>,
    /// With that: lease the set, and wait
    #[arg(long, hide = true, requires = "against")]
    hold: bool,
}

/// Times of one operation.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Times {
    p50_us: f64,
    p99_us: f64,
    count: usize,
}

/// What sessions in this process measure.
#[derive(Debug, Serialize)]
struct Embedded {
    #[serde(flatten)]
    times: Times,
    /// Loads of the whole set, one after the other, released each.
    requests_per_s: f64,
    sessions: usize,
    /// What an idle session takes of this process's memory.
    bytes_per_session: f64,
}

/// What a client in a process of its own measures.
#[derive(Debug, Serialize, Deserialize)]
struct Remote {
    #[serde(flatten)]
    times: Times,
    /// The round trip that carries nothing: what of it the socket and two processes cost.
    ping_p50_us: f64,
    connections: usize,
    /// Loads of one resident component and releases, each answered.
    requests_per_s: f64,
    /// Of which loads that were answered with a lease, and mapped.
    leases_per_s: f64,
}

/// What a client in Python measures.
#[derive(Debug, Serialize)]
struct Python {
    #[serde(flatten)]
    times: Times,
    /// `hotset.safetensors.load_file` beside `safetensors.torch.load_file`, both warm: the script's report.
    load_file: Option<serde_json::Value>,
    /// Why there is none.
    load_file_missing: Option<String>,
}

#[derive(Debug, Serialize)]
struct Report {
    tier: Tier,
    components: usize,
    tensors: usize,
    bytes: Bytes,
    embedded: Embedded,
    bridge: Remote,
    /// From SIGKILL of a client that leases and maps the set until its leases are back.
    killed: Times,
    python: Option<Python>,
    /// Why there is no figure for Python.
    python_missing: Option<String>,
}

fn times(mut seconds: Vec<f64>) -> Times {
    seconds.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let index = (seconds.len().saturating_sub(1) as f64 * share).round() as usize;
        seconds.get(index).copied().unwrap_or(f64::NAN) * 1e6
    };
    Times {
        p50_us: at(0.50),
        p99_us: at(0.99),
        count: seconds.len(),
    }
}

fn name(component: usize) -> String {
    format!("component-{component}")
}

/// `hotset bench attach`
pub(crate) async fn run(args: &AttachArgs, global: &Global) -> Result<(), CliError> {
    let asked = [
        args.components,
        args.tensors,
        args.connections,
        args.sessions,
        args.requests,
    ];
    if asked.contains(&0) {
        return Err(CliError::Usage(
            "there is nothing to measure with 0 components, tensors, connections, sessions or requests".into(),
        ));
    }
    if let Some(socket) = &args.against {
        if args.hold {
            return killed::hold(args, socket).await;
        }
        return output::json(&remote(args, socket).await?);
    }
    let folder = tempfile::tempdir().map_err(CliError::Output)?;
    library(args, folder.path())?;
    let file = file(args, folder.path())?;
    let mut config = Config::default();
    config.catalog.roots = vec![folder.path().join("models")];
    config.catalog.watch = false;
    config.cuda.detect = args.tier != Tier::Ram;
    config.sessions.max_sessions = args.sessions + args.connections + 16;
    // With as much again as a quarter, so that nothing has to go to stay below the high watermark.
    let wanted =
        args.size.get() * args.components as u64 * 2 + file.as_ref().map_or(0, |f| f.1) + (1 << 26);
    config.ram.budget = Some(Bytes(wanted + wanted / 4));
    let socket = folder.path().join("run/hotset.sock");
    config.bridge.socket = Some(socket.clone());
    let hotset = Arc::new(serve::start(config).await?);
    let bridge = Bridge::open(hotset.clone()).await?;
    let embedded = embedded(args, &hotset).await?;
    let remote = child(args, &socket).await?;
    let killed = killed::measure(args, &hotset, &socket).await?;
    let (python, python_missing) = match python(args, &socket).await {
        Ok(times) => {
            let loaded = match &file {
                None => Err("there is no such file, or no memory for it twice".to_owned()),
                Some((path, bytes)) => load_file(args, &socket, path, *bytes).await,
            };
            let (load_file, load_file_missing) = match loaded {
                Ok(report) => (Some(report), None),
                Err(reason) => (None, Some(reason)),
            };
            let python = Python {
                times,
                load_file,
                load_file_missing,
            };
            (Some(python), None)
        }
        Err(reason) => (None, Some(reason)),
    };
    bridge.close().await;
    if let Some(hotset) = Arc::into_inner(hotset) {
        hotset.drain().await;
    }
    let report = Report {
        tier: args.tier,
        components: args.components,
        tensors: args.tensors,
        bytes: args.size,
        embedded,
        bridge: remote,
        killed,
        python,
        python_missing,
    };
    if global.json {
        return output::json(&report);
    }
    print(&report)
}

/// Files of one component each.
fn library(args: &AttachArgs, folder: &Path) -> Result<(), CliError> {
    let models = folder.join("models");
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| CliError::File { path, source }
    };
    std::fs::create_dir_all(&models).map_err(at(&models))?;
    let each = usize::try_from(args.size.get()).unwrap_or(usize::MAX) / args.tensors / 2 * 2;
    for component in 0..args.components {
        let bytes = vec![component as u8; each];
        let names = (0..args.tensors).map(|i| format!("model.layers.{i}.self_attn.q_proj.weight"));
        let tensors: Result<Vec<_>, _> = names
            .map(|name| {
                TensorView::new(Dtype::F16, vec![each / 2], &bytes).map(|view| (name, view))
            })
            .collect();
        let path = models.join(format!("{}.safetensors", name(component)));
        tensors
            .and_then(|tensors| safetensors::serialize_to_file(tensors, None, &path))
            .map_err(|error| at(&path)(std::io::Error::other(error)))?;
    }
    Ok(())
}

/// The one large file, where one is wanted and there is memory for it in the server's RAM tier and in the page cache.
fn file(args: &AttachArgs, folder: &Path) -> Result<Option<(PathBuf, u64)>, CliError> {
    let available = hotset::core::machine::Machine::here()
        .memory()
        .map_or(0, |host| host.room().get());
    if args.file.is_zero() || args.file_tensors == 0 || args.tier != Tier::Ram {
        return Ok(None);
    }
    if available / 5 * 2 < args.file.get() {
        return Ok(None);
    }
    let each = args.file.get() / args.file_tensors as u64 / 4096 * 4096;
    let mut header = serde_json::Map::new();
    for i in 0..args.file_tensors as u64 {
        header.insert(
            format!("model.layers.{i:04}.mlp.down_proj.weight"),
            serde_json::json!({
                "dtype": "F16",
                "shape": [each / 2],
                "data_offsets": [i * each, (i + 1) * each],
            }),
        );
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    header.resize((header.len() + 8).next_multiple_of(4096) - 8, b' ');
    let path = folder.join("models/file.safetensors");
    let bytes = 8 + header.len() as u64 + each * args.file_tensors as u64;
    let mut start = (header.len() as u64).to_le_bytes().to_vec();
    start.append(&mut header);
    std::fs::write(&path, start)
        .and_then(|()| std::fs::OpenOptions::new().write(true).open(&path))
        .and_then(|file| file.set_len(bytes))
        .map_err(|source| CliError::File {
            path: path.clone(),
            source,
        })?;
    Ok(Some((path, bytes)))
}

/// In this process.
async fn embedded(args: &AttachArgs, hotset: &Hotset) -> Result<Embedded, CliError> {
    let target = match args.tier {
        Tier::Ram => Target::Ram,
        Tier::Vram(gpu) => Target::Gpu(gpu),
    };
    let set = ComponentSet::new((0..args.components).map(name)).on(target);
    let first = hotset.session("bench").await?;
    first.load(set.clone()).leases().await?;
    let before = own_bytes();
    let mut sessions = Vec::with_capacity(args.sessions);
    for _ in 0..args.sessions {
        sessions.push(hotset.session("bench").await?);
    }
    let bytes_per_session = own_bytes().saturating_sub(before) as f64 / args.sessions as f64;
    let mut seconds = Vec::with_capacity(args.requests);
    let all = Instant::now();
    for session in sessions.iter().cycle().take(args.requests) {
        let set = set.clone();
        let began = Instant::now();
        let leases = session.load(set).leases().await?;
        let first = leases
            .iter()
            .filter_map(|lease| lease.slab()?.filled().first());
        std::hint::black_box(first.fold(0_u8, |sum, byte| sum ^ byte));
        let places = leases.iter().filter_map(|lease| lease.allocation());
        std::hint::black_box(places.fold(0, |sum, place| sum ^ place.address()));
        seconds.push(began.elapsed().as_secs_f64());
        drop(leases);
    }
    let requests_per_s = args.requests as f64 / all.elapsed().as_secs_f64();
    Ok(Embedded {
        times: times(seconds),
        requests_per_s,
        sessions: args.sessions,
        bytes_per_session,
    })
}

/// Memory of this process's own, without slabs.
fn own_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kib| kib << 10)
}

/// This command once more, as a client in a process of its own.
async fn child(args: &AttachArgs, socket: &Path) -> Result<Remote, CliError> {
    let program = std::env::current_exe().map_err(CliError::Output)?;
    let mut command = std::process::Command::new(program);
    command
        .args(["--json", "bench", "attach", "--against"])
        .arg(socket)
        .args(["--tier", &args.tier.to_string()])
        .args(["--components", &args.components.to_string()])
        .args(["--connections", &args.connections.to_string()])
        .args(["--time", &format!("{}ms", args.time.as_millis())])
        .stderr(Stdio::inherit());
    let output = tokio::task::spawn_blocking(move || command.output()).await;
    let output = output
        .map_err(|error| CliError::Usage(format!("the client failed: {error}")))?
        .map_err(CliError::Output)?;
    serde_json::from_slice(&output.stdout).map_err(CliError::Answer)
}

/// Loads of the whole set, one after the other, and round trips that carry nothing.
async fn one_by_one(
    socket: &Path,
    components: usize,
    tier: Tier,
    time: Duration,
) -> Result<(Times, f64), CliError> {
    let client = Client::connect_to(socket, "bench").await?;
    let set = LoadOptions::new((0..components).map(name)).on(tier.to_string());
    let cuda = match tier {
        Tier::Ram => None,
        Tier::Vram(_) => Some(Cuda::detect()?),
    };
    let first = client.load(&set).await?;
    // Held meanwhile, as a worker holds what it works with. It makes the context, which takes longer than all that is measured.
    let held = attach(&first, cuda.as_ref())?;
    let mut seconds = Vec::new();
    let end = Instant::now() + time;
    while Instant::now() < end {
        let began = Instant::now();
        let leases = client.load(&set).await?;
        let attached = attach(&leases, cuda.as_ref())?;
        seconds.push(began.elapsed().as_secs_f64());
        drop((attached, leases));
        // The release is its own request, and not timed: let it be done before the next one begins.
        client.ping().await?;
    }
    drop((held, first));
    let mut pings = Vec::new();
    for _ in 0..2000 {
        let began = Instant::now();
        client.ping().await?;
        pings.push(began.elapsed().as_secs_f64());
    }
    Ok((times(seconds), times(pings).p50_us))
}

/// As a client.
async fn remote(args: &AttachArgs, socket: &Path) -> Result<Remote, CliError> {
    let (own, components, tier, time) = (socket.to_owned(), args.components, args.tier, args.time);
    // As a task, which is where a client's work is: waking this function's own thread for each answer is no part of it.
    let alone = tokio::spawn(async move { one_by_one(&own, components, tier, time).await });
    let (alone_times, ping_p50_us) = alone
        .await
        .map_err(|error| CliError::Usage(format!("the client failed: {error}")))??;
    let mut asking = Vec::new();
    let began = Instant::now();
    let end = began + args.time;
    for i in 0..args.connections {
        let client = Client::connect_to(socket, "bench").await?;
        let one = LoadOptions::new([name(i % args.components)]).on(tier.to_string());
        asking.push(tokio::spawn(async move {
            let mut leases = 0_u64;
            while Instant::now() < end {
                let leased = client.load(&one).await?;
                std::hint::black_box(
                    leased
                        .first()
                        .map(|lease| lease.mapping().is_ok() || lease.export().is_ok()),
                );
                leases += 1;
            }
            // Releases are answered in order: after this, all are.
            client.ping().await?;
            Ok::<u64, hotset::client::ClientError>(leases)
        }));
    }
    let mut leases = 0;
    for asked in asking {
        leases += asked
            .await
            .map_err(|error| CliError::Usage(format!("a client failed: {error}")))??;
    }
    let elapsed_s = began.elapsed().as_secs_f64();
    Ok(Remote {
        times: alone_times,
        ping_p50_us,
        connections: args.connections,
        requests_per_s: 2.0 * leases as f64 / elapsed_s,
        leases_per_s: leases as f64 / elapsed_s,
    })
}

/// Maps what was leased, and reads a byte of each where it is host memory.
fn attach(leases: &[RemoteLease], cuda: Option<&Cuda>) -> Result<Vec<Imported>, CliError> {
    let (mut imported, mut seen) = (Vec::new(), 0_u8);
    for lease in leases {
        let Some(cuda) = cuda else {
            seen ^= lease.mapping()?.as_slice().first().copied().unwrap_or(0);
            continue;
        };
        let export = lease.export()?;
        let gpu = cuda.gpus().iter().find(|gpu| gpu.uuid == export.uuid);
        let gpu =
            gpu.ok_or_else(|| CliError::Usage(format!("{} is not visible here", export.uuid)))?;
        imported.push(Imported::open(cuda, gpu, export)?);
    }
    std::hint::black_box(seen);
    Ok(imported)
}

/// The same in Python: lease, and one byte of each memory, or one tensor of each on the GPU.
const SCRIPT: &str = r#"
import json, sys, time
import hotset
socket, components, seconds, device = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
hs = hotset.connect(socket, "bench")
names = [f"component-{i}" for i in range(components)]
first = lambda component: component.memory()[0] if device == "cpu" else component.device_array(next(iter(component)))
# Held meanwhile, as a worker holds what it works with: each memory is mapped once. It also makes the context on the GPU.
held = hs.load(*names, device=device)
kept = [first(component) for component in held.components]
times, end = [], time.monotonic() + seconds
while time.monotonic() < end:
    began = time.perf_counter()
    leased = hs.load(*names, device=device)
    seen = [first(component) for component in leased.components]
    times.append(time.perf_counter() - began)
    leased.release()
    del leased, seen
    hs._call("ping")
times.sort()
at = lambda share: times[round((len(times) - 1) * share)] * 1e6
print(json.dumps({"p50_us": at(0.5), "p99_us": at(0.99), "count": len(times)}))
"#;

async fn python(args: &AttachArgs, socket: &Path) -> Result<Times, String> {
    let mut command = std::process::Command::new(&args.python);
    command
        .args(["-c", SCRIPT])
        .arg(socket)
        .arg(args.components.to_string())
        .arg(args.time.as_secs_f64().to_string())
        .arg(match args.tier {
            Tier::Ram => "cpu".to_owned(),
            Tier::Vram(gpu) => format!("cuda:{gpu}"),
        });
    answer(args, command).await
}

/// Rounds in which both loaders take turns.
const ROUNDS: &str = "7";

async fn load_file(
    args: &AttachArgs,
    socket: &Path,
    file: &Path,
    bytes: u64,
) -> Result<serde_json::Value, String> {
    let mut command = std::process::Command::new(&args.python);
    command
        .args(["-c", include_str!("attach/file_load.py")])
        .args([socket, file])
        .args([&bytes.to_string(), ROUNDS]);
    answer(args, command).await
}

/// What a script prints, or the last line of its complaint.
async fn answer<T: serde::de::DeserializeOwned>(
    args: &AttachArgs,
    mut command: std::process::Command,
) -> Result<T, String> {
    let output = tokio::task::spawn_blocking(move || command.output()).await;
    let output = output
        .map_err(|error| error.to_string())?
        .map_err(|error| format!("{}: {error}", args.python.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().last().unwrap_or("it failed");
        return Err(format!(
            "{}: {last}; pip install ./python, or give --python",
            args.python.display()
        ));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())
}

/// The large file, in words.
fn loaded(python: &Python) -> String {
    let Some(report) = &python.load_file else {
        let reason = python.load_file_missing.as_deref().unwrap_or_default();
        return format!("load_file in Python was not measured: {reason}");
    };
    let mut text = format!(
        "load_file of {} in {} tensors, hotset / held by the process already / safetensors.torch, all warm:",
        Bytes(report["bytes"].as_u64().unwrap_or(0)),
        report["tensors"]
    );
    for way in [
        "call",
        "all_tensors",
        "each_page_touched",
        "all_bytes_copied",
    ] {
        let us = |who: &str| report[who][way]["median_us"].as_f64().unwrap_or(f64::NAN);
        text += &format!(
            "\n  {}: {:.0} / {:.0} / {:.0} us",
            way.replace('_', " "),
            us("hotset"),
            us("hotset_held"),
            us("safetensors")
        );
    }
    text
}

fn print(report: &Report) -> Result<(), CliError> {
    let right = ["p50", "p99"];
    let what = format!("{} components in {}, from", report.components, report.tier);
    let mut rows = table(&[&what, "p50", "p99", "beside it"], &right);
    let us = |figure: f64| format!("{figure:.1} us");
    let (embedded, hosted) = (&report.embedded.times, &report.embedded);
    rows.add_row([
        "this process",
        &us(embedded.p50_us),
        &us(embedded.p99_us),
        &format!(
            "{:.0} requests/s, {} sessions of {:.0} bytes each",
            hosted.requests_per_s, hosted.sessions, hosted.bytes_per_session
        ),
    ]);
    let bridge = &report.bridge;
    rows.add_row([
        "another process",
        &us(bridge.times.p50_us),
        &us(bridge.times.p99_us),
        &format!("an empty round trip takes {}", us(bridge.ping_p50_us)),
    ]);
    rows.add_row([
        "a killed process, leases back",
        &us(report.killed.p50_us),
        &us(report.killed.p99_us),
        &format!("{} processes killed", report.killed.count),
    ]);
    match (&report.python, &report.python_missing) {
        (Some(Python { times, .. }), _) => {
            rows.add_row(["Python", &us(times.p50_us), &us(times.p99_us), ""]);
        }
        (None, reason) => {
            rows.add_row(["Python", "-", "-", reason.as_deref().unwrap_or_default()]);
        }
    }
    line(rows.to_string())?;
    if let Some(python) = &report.python {
        line(loaded(python))?;
    }
    line(format!(
        "{:.0} requests/s over {} connections, half of them leases of one component, half releases",
        bridge.requests_per_s, bridge.connections
    ))
}
