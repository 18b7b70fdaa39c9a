//! A worker: a process of its own that leases, checks and lets go, over and over, and says what it saw.

use std::convert::Infallible;
use std::io::Read;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use clap::Args;
use hotset::bridge::wire::List;
use hotset::client::{Client, ClientError, LoadOptions, RemoteLease, RemoteTensor};
use hotset::core::device::cuda::{Cuda, Imported};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::digest::Sum;
use crate::cli::{CliError, output};

/// How long a worker waits before it looks for a server again, twice as long each time ...
const PAUSE: Duration = Duration::from_millis(5);
/// ... up to this, so that a hundred of them leave the processor to the server that is about to start.
const LONGEST_PAUSE: Duration = Duration::from_millis(80);
/// Every request has a deadline; beyond it and this, it is lost.
const GRACE: Duration = Duration::from_secs(10);

/// Options of the hidden `chaos-worker` command.
#[derive(Debug, Args)]
pub(crate) struct WorkerArgs {
    /// The server's socket
    #[arg(long)]
    pub(super) socket: PathBuf,
    /// What the server calls this worker
    #[arg(long)]
    pub(super) label: String,
    /// Where its choices begin
    #[arg(long)]
    pub(super) seed: u64,
    /// Sessions, each with a connection of its own
    #[arg(long, default_value = "1")]
    pub(super) sessions: u64,
}

/// A line of a worker.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "said", rename_all = "kebab-case")]
pub(super) enum Said {
    /// It has a connection; `after_ms` since it lost the last one.
    Connected { after_ms: Option<f64> },
    /// The connection is gone.
    Lost,
    /// It asked for a set.
    Asked,
    /// It got one component, and this is what its bytes are.
    Leased {
        component: String,
        content: String,
        /// `None` where it lies where this worker cannot read it.
        digest: Option<String>,
        bytes: u64,
    },
    /// The server refused.
    Refused { code: String },
    /// What must not be.
    Wrong { invariant: String, message: String },
}

/// `hotset chaos-worker`: runs until its standard input ends.
pub(crate) async fn run(args: &WorkerArgs) -> Result<(), CliError> {
    // The one that started it is gone, or wants no more of it: then this ends as it is, like any process that is ended.
    std::thread::spawn(|| {
        let mut buffer = [0; 64];
        while std::io::stdin().read(&mut buffer).is_ok_and(|n| n > 0) {}
        std::process::exit(0);
    });
    let mut sessions = JoinSet::new();
    for session in 0..args.sessions.max(1) {
        let label = match args.sessions {
            0 | 1 => args.label.clone(),
            _ => format!("{}.{session}", args.label),
        };
        let seed = args.seed.wrapping_add(session << 48);
        sessions.spawn(work(args.socket.clone(), label, seed));
    }
    match sessions.join_next().await {
        Some(Ok(ended)) => ended.map(|never| match never {}),
        // A session that panics has said so.
        Some(Err(_)) | None => Ok(()),
    }
}

async fn work(socket: PathBuf, label: String, seed: u64) -> Result<Infallible, CliError> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut lost: Option<Instant> = None;
    let mut pause = PAUSE;
    loop {
        let Ok(client) = Client::connect_to(&socket, &label).await else {
            tokio::time::sleep(pause).await;
            pause = LONGEST_PAUSE.min(pause * 2);
            continue;
        };
        pause = PAUSE;
        say(&Said::Connected {
            after_ms: lost.map(|at| at.elapsed().as_secs_f64() * 1e3),
        })?;
        lost = None;
        if use_it(&client, &label, &mut rng).await? == Ended::Lost {
            lost = Some(Instant::now());
            say(&Said::Lost)?;
        }
    }
}

fn say(said: &Said) -> Result<(), CliError> {
    output::line(serde_json::to_string(said).map_err(|error| CliError::Output(error.into()))?)
}

/// How the use of a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    Done,
    Lost,
}

/// Works for a while, or until the connection is lost.
async fn use_it(
    client: &Client,
    label: &str,
    rng: &mut Xoshiro256PlusPlus,
) -> Result<Ended, CliError> {
    let Ok(listed) = client
        .list(List {
            limit: 200,
            ..List::default()
        })
        .await
    else {
        return Ok(Ended::Lost);
    };
    let names: Vec<&str> = listed
        .models
        .iter()
        .filter(|model| model["error"].is_null())
        .filter_map(|model| model["name"].as_str())
        .collect();
    if names.is_empty() {
        tokio::time::sleep(Duration::from_millis(100)).await;
        return Ok(Ended::Done);
    }
    // Now and then anew: the catalogue changes meanwhile, and connections come and go.
    for _ in 0..50 {
        let chosen: Vec<&str> = (0..1 + below(rng, 3))
            .filter_map(|_| names.get(below(rng, names.len())).copied())
            .collect();
        let deadline = match below(rng, 10) {
            0 => Duration::from_millis(20),
            _ => Duration::from_secs(10),
        };
        let mut options = LoadOptions::new(chosen.iter().copied()).within(deadline);
        if below(rng, 4) > 0 {
            options = options.on("ram");
        }
        if below(rng, 5) == 0 {
            options = options.batch();
        }
        if below(rng, 5) == 0 {
            options = options.preemptible();
        }
        let give_up =
            (below(rng, 10) == 0).then(|| Duration::from_micros(below(rng, 20_000) as u64));
        say(&Said::Asked)?;
        let asked = Instant::now();
        let answer = match give_up {
            Some(after) => {
                // Dropping a load under way cancels it.
                let asked = client.load(&options);
                tokio::time::timeout(after, asked).await.ok()
            }
            None => {
                let patience = deadline + GRACE;
                let answer = tokio::time::timeout(patience, client.load(&options)).await;
                if answer.is_err() {
                    say(&Said::Wrong {
                        invariant: "every-request-ends".into(),
                        message: format!(
                            "{label} waited {:.1} s for {chosen:?} with a deadline of {:.1} s",
                            asked.elapsed().as_secs_f64(),
                            deadline.as_secs_f64()
                        ),
                    })?;
                }
                answer.ok()
            }
        };
        match answer {
            None => {}
            Some(Ok(leases)) => {
                let before = checked(&leases)?;
                tokio::time::sleep(Duration::from_millis(below(rng, 50) as u64)).await;
                let after = checked(&leases)?;
                // Where a GPU is lost meanwhile, there is nothing to compare.
                let differs = before
                    .iter()
                    .zip(&after)
                    .any(|pair| matches!(pair, (Some(a), Some(b)) if a != b));
                if differs {
                    say(&Said::Wrong {
                        invariant: "leased-bytes-stay".into(),
                        message: format!("{label}: {chosen:?} changed while it was leased"),
                    })?;
                }
            }
            Some(Err(ClientError::Refused(error))) => say(&Said::Refused { code: error.code })?,
            Some(Err(ClientError::Lost { .. } | ClientError::Connect { .. })) => {
                return Ok(Ended::Lost);
            }
            Some(Err(error)) => say(&Said::Wrong {
                invariant: "answers-make-sense".into(),
                message: format!("{label}: {chosen:?}: {error}"),
            })?,
        }
    }
    Ok(Ended::Done)
}

/// Reads what is leased, and says it.
fn checked(leases: &[RemoteLease]) -> Result<Vec<Option<String>>, CliError> {
    let mut digests = Vec::with_capacity(leases.len());
    for lease in leases {
        let leased = lease.leased();
        let sum = digest(lease);
        let (digest, bytes) = match sum {
            Ok(Some(sum)) => {
                let bytes = sum.bytes();
                (Some(sum.finish()), bytes)
            }
            Ok(None) => (None, 0),
            Err(error) => {
                say(&Said::Wrong {
                    invariant: "leases-can-be-read".into(),
                    message: format!("{}: {error}", leased.component),
                })?;
                (None, 0)
            }
        };
        say(&Said::Leased {
            component: leased.component.clone(),
            content: leased.content.clone(),
            digest: digest.clone(),
            bytes,
        })?;
        digests.push(digest);
    }
    Ok(digests)
}

/// The digest of a leased component; `None` where it lies where it cannot be read.
fn digest(lease: &RemoteLease) -> Result<Option<Sum>, ClientError> {
    if lease.mapping().is_ok() {
        return Ok(Some(sum(&lease.tensors()?)));
    }
    match copy_of_gpu(lease) {
        Some(copy) => Ok(Some(sum(&lease.tensors_in(&copy)?))),
        None => Ok(None),
    }
}

/// What a lease has on a GPU, read back; `None` where there is no GPU, or it is lost meanwhile.
fn copy_of_gpu(lease: &RemoteLease) -> Option<Vec<u8>> {
    static CUDA: OnceLock<Option<Cuda>> = OnceLock::new();
    let export = lease.export().ok()?;
    let cuda = CUDA.get_or_init(|| Cuda::detect().ok()).as_ref()?;
    let gpu = cuda.gpus().iter().find(|gpu| gpu.uuid == export.uuid)?;
    Imported::open(cuda, gpu, export).ok()?.read().ok()
}

fn sum(tensors: &[RemoteTensor<'_>]) -> Sum {
    let mut sum = Sum::default();
    for tensor in tensors {
        sum.add(tensor.name, tensor.dtype, tensor.shape, tensor.bytes);
    }
    sum
}

/// A number below `bound`, which is not 0.
pub(super) fn below(rng: &mut Xoshiro256PlusPlus, bound: usize) -> usize {
    (rng.next_u64() % bound as u64) as usize
}
