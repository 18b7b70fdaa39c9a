//! The configuration as values, with its defaults. Reading it from files, the environment and flags is the host's work.

mod validate;

pub use validate::InvalidConfig;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::GpuIndex;
use crate::plan::KeepAlive;
use crate::units::Bytes;

/// Everything that a hotset system can be told. Each field's default is what `Config::default()` gives.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where models are found.
    pub catalog: CatalogConfig,
    /// The RAM tier.
    pub ram: RamConfig,
    /// The VRAM tier: one entry for each GPU.
    pub gpu: Vec<GpuConfig>,
    /// GPUs that are found, where none is configured.
    pub cuda: CudaConfig,
    /// Sets that have a name of their own.
    pub set: Vec<SetConfig>,
    /// Loading.
    pub load: LoadConfig,
    /// Sessions and their bounds.
    pub sessions: SessionsConfig,
    /// Bounds of those who share a label. The first that matches holds.
    pub quota: Vec<QuotaConfig>,
    /// Eviction.
    pub policy: PolicyConfig,
    /// Prediction and prefetch.
    pub predict: PredictConfig,
    /// Restarts of failed actors.
    pub supervision: SupervisionConfig,
    /// Decisions and measurements.
    pub monitor: MonitorConfig,
    /// The bridge to other processes.
    pub bridge: BridgeConfig,
    /// The HTTP face.
    pub http: HttpConfig,
}

/// Where models are found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CatalogConfig {
    /// The folders to scan.
    pub roots: Vec<PathBuf>,
    /// Whether to watch the folders and follow changes.
    pub watch: bool,
    /// How long a file must rest after its last change before it is read.
    #[serde(with = "humantime_serde")]
    pub settle: Duration,
    /// How deep folders are followed below a root.
    pub max_depth: usize,
    /// Threads that read headers; 0 means one for each core.
    pub threads: usize,
    /// How often folders are looked at whose file system reports no changes (network mounts).
    #[serde(with = "humantime_serde")]
    pub poll: Duration,
    /// How fast components that look alike are read in the background, each second, to find out whether they hold the same
    /// bytes and can share memory. Zero: never.
    pub digest_rate: Bytes,
    /// Where the catalogue is kept across restarts, so that they cost stat calls and no header reads. `None`: nowhere.
    pub database: Option<PathBuf>,
    /// Files of signatures that add to what hotset knows of model files (docs/identification.md).
    pub signatures: Vec<PathBuf>,
}

impl Default for CatalogConfig {
    fn default() -> Self {
        Self {
            roots: Vec::new(),
            watch: true,
            settle: Duration::from_millis(500),
            max_depth: 16,
            threads: 0,
            poll: Duration::from_secs(30),
            digest_rate: Bytes::mib(200),
            database: None,
            signatures: Vec::new(),
        }
    }
}

/// The RAM tier.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RamConfig {
    /// The most host memory that slabs may take. `None`: half of what this process may use.
    pub budget: Option<Bytes>,
    /// The most memory that is kept, beside what is resident, for components to come. It counts towards the budget.
    /// `None`: as much as the budget leaves.
    pub keep_warm: Option<Bytes>,
    /// Memory that is made ready after the first scan, in the background.
    pub prewarm: Bytes,
    /// Eviction starts when this share of the budget is used, in the background.
    pub high_watermark: f64,
    /// Background eviction stops when no more than this share is used.
    pub low_watermark: f64,
}

impl Default for RamConfig {
    fn default() -> Self {
        Self {
            budget: None,
            keep_warm: None,
            prewarm: Bytes::ZERO,
            high_watermark: 0.95,
            low_watermark: 0.85,
        }
    }
}

/// One GPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GpuConfig {
    /// Which device stands behind it.
    pub device: DeviceKind,
    /// Which CUDA GPU it is: its ordinal, its UUID, or the beginning of that. `None`: the one with this entry's index.
    pub select: Option<String>,
    /// The most VRAM that hotset may use. `None`: `share` of the device's memory.
    pub budget: Option<Bytes>,
    /// The share of the device's memory that hotset may use where no budget is set.
    pub share: f64,
    /// VRAM that stays free, whatever the budget says, for others and for what the driver takes by itself.
    pub headroom: Bytes,
    /// Background eviction starts when this share of the budget is used.
    pub high_watermark: f64,
    /// Background eviction stops when no more than this share is used.
    pub low_watermark: f64,
    /// What a simulated device is like.
    pub sim: SimDeviceConfig,
}

impl Default for GpuConfig {
    fn default() -> Self {
        Self {
            device: DeviceKind::Sim,
            select: None,
            budget: None,
            share: 1.0,
            headroom: Bytes::mib(512),
            high_watermark: 1.0,
            low_watermark: 0.9,
            sim: SimDeviceConfig::default(),
        }
    }
}

/// The kinds of device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    /// The simulated device: host memory with a GPU's capacity, granularity, bandwidth and latency.
    #[default]
    Sim,
    /// An NVIDIA GPU.
    Cuda,
}

/// GPUs that are found, where none is configured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CudaConfig {
    /// Whether to use the machine's NVIDIA GPUs where no GPU is configured.
    pub detect: bool,
    /// Only these of them: ordinals, UUIDs or beginnings of UUIDs, with commas between; empty: all.
    pub include: String,
    /// Not these of them, written alike.
    pub exclude: String,
    /// The share of each one's memory that hotset may use.
    pub share: f64,
    /// VRAM that stays free on each.
    pub headroom: Bytes,
    /// How long one call of the driver may take. A GPU whose driver takes longer is out of service until the call returns.
    #[serde(with = "humantime_serde")]
    pub call_timeout: Duration,
    /// Whether `hotset serve` starts itself anew when an error has left a GPU unusable to its process, which only a new
    /// process can mend; at most once in `supervision.retry`.
    pub restart: bool,
}

impl Default for CudaConfig {
    fn default() -> Self {
        let gpu = GpuConfig::default();
        Self {
            detect: true,
            include: String::new(),
            exclude: String::new(),
            share: gpu.share,
            headroom: gpu.headroom,
            call_timeout: Duration::from_secs(30),
            restart: true,
        }
    }
}

impl CudaConfig {
    /// Whether a GPU is to be used, which `is_meant_by` a user's word or is not.
    pub fn wants(&self, is_meant_by: impl Fn(&str) -> bool) -> bool {
        let named = |list: &str| list.split(',').any(|word| is_meant_by(word.trim()));
        (self.include.trim().is_empty() || named(&self.include)) && !named(&self.exclude)
    }

    /// The entry for a GPU that was found.
    #[must_use]
    pub fn found(&self, uuid: String) -> GpuConfig {
        GpuConfig {
            device: DeviceKind::Cuda,
            select: Some(uuid),
            share: self.share,
            headroom: self.headroom,
            ..GpuConfig::default()
        }
    }
}

/// A simulated device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SimDeviceConfig {
    /// Capacity.
    pub memory: Bytes,
    /// Allocations are rounded up to this.
    pub granularity: Bytes,
    /// Upload rate in bytes each second.
    pub bandwidth: Bytes,
    /// Time that each upload takes beside its bytes.
    #[serde(with = "humantime_serde")]
    pub latency: Duration,
    /// Whether uploaded bytes are kept, so that they can be read back.
    pub keep_bytes: bool,
}

impl Default for SimDeviceConfig {
    fn default() -> Self {
        Self {
            memory: Bytes::gib(24),
            granularity: Bytes::mib(2),
            bandwidth: Bytes::gib(24),
            latency: Duration::from_micros(10),
            keep_bytes: false,
        }
    }
}

/// A set with a name, which is loaded like a model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SetConfig {
    /// Its name. Models of the same name are hidden by it.
    pub name: String,
    /// Models, components (`MODEL/COMPONENT`), or other sets.
    pub models: Vec<String>,
    /// Some of them in the order in which they are used, where hotset cannot know it.
    pub order: Vec<String>,
    /// Small language models among them that guess tokens for a larger one of the set.
    pub drafts: Vec<String>,
}

/// Loading.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoadConfig {
    /// How many components one request loads at the same time.
    pub concurrency: usize,
    /// How many files are read from disk at the same time, over all requests.
    pub reads: usize,
    /// How long a request may take where it says nothing itself.
    #[serde(with = "humantime_serde")]
    pub deadline: Duration,
    /// How long a batch set that waits for memory lets interactive ones pass.
    #[serde(with = "humantime_serde")]
    pub aging: Duration,
    /// How files are read.
    pub reader: ReaderKind,
    /// Length of one read.
    pub piece: Bytes,
    /// Bytes that the disk is asked for at the same time, over all components.
    pub in_flight: Bytes,
    /// How fast prefetches read, each second. Zero: as the disk gives.
    pub prefetch_rate: Bytes,
    /// Whether bytes are checked against the digest of their content, where it is known, while they are read.
    pub verify: bool,
    /// Host memory through which one component is streamed to a GPU when it is larger than the RAM tier can hold.
    pub ring: Bytes,
    /// How long components stay after their last lease where a request does not say: `5m`, `0` for none, or `-1` for as long as
    /// nobody needs the memory.
    pub keep_alive: KeepAlive,
}

impl Default for LoadConfig {
    fn default() -> Self {
        Self {
            concurrency: 4,
            reads: 4,
            deadline: Duration::from_secs(300),
            aging: Duration::from_secs(30),
            reader: ReaderKind::Auto,
            piece: Bytes::mib(8),
            in_flight: Bytes::mib(32),
            prefetch_rate: Bytes::ZERO,
            verify: false,
            ring: Bytes::mib(64),
            keep_alive: KeepAlive::Unlimited,
        }
    }
}

/// The ways in which files are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReaderKind {
    /// The first of the others that the kernel allows.
    #[default]
    Auto,
    /// Past the page cache (`O_DIRECT`), through io_uring.
    IoUring,
    /// Past the page cache, by threads.
    Pread,
    /// Through the page cache.
    Buffered,
}

/// Sessions and their bounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SessionsConfig {
    /// How many sessions may be open.
    pub max_sessions: usize,
    /// How many loads of one session may be under way.
    pub max_loads_per_session: usize,
    /// How many loads may be under way over all sessions.
    pub max_loads: usize,
    /// What a refused client is told to wait before it tries again.
    #[serde(with = "humantime_serde")]
    pub retry_after: Duration,
    /// What one session may have leased. `None`: no bound.
    pub quota: Option<Bytes>,
}

/// What all sessions of a label may have together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuotaConfig {
    /// The label that clients give themselves. With a `*` at its end, each label that begins so has this quota for itself.
    pub label: String,
    /// What its sessions may have leased, what several of them share counted once. `None`: no bound.
    pub leased: Option<Bytes>,
    /// How many loads of its sessions may be under way. `None`: no bound.
    pub loads: Option<usize>,
}

impl Default for SessionsConfig {
    fn default() -> Self {
        Self {
            max_sessions: 10_000,
            max_loads_per_session: 16,
            max_loads: 4_096,
            retry_after: Duration::from_secs(1),
            quota: None,
        }
    }
}

/// Eviction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PolicyConfig {
    /// The policy that chooses what to evict.
    pub eviction: EvictionPolicyName,
}

/// The eviction policies, by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EvictionPolicyName {
    /// Least recently used first.
    Lru,
    /// Least frequently used first, with counts that halve each hour.
    Lfu,
    /// Greedy-Dual-Size-Frequency.
    Gdsf,
    /// SIEVE.
    Sieve,
    /// S3-FIFO.
    #[serde(rename = "s3-fifo")]
    S3Fifo,
    /// LRU-2.
    #[serde(rename = "lru-2")]
    Lru2,
    /// The hybrid histogram of serverless platforms.
    HybridHistogram,
    /// As Ollama does.
    Ollama,
    /// As InvokeAI does.
    #[serde(rename = "invokeai")]
    InvokeAi,
    /// As llama.cpp's router does.
    LlamaCpp,
    /// As Lemonade does.
    Lemonade,
    /// By predicted use, restore time and bytes.
    #[default]
    Hotset,
}

impl EvictionPolicyName {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Lru,
        Self::Lfu,
        Self::Gdsf,
        Self::Sieve,
        Self::S3Fifo,
        Self::Lru2,
        Self::HybridHistogram,
        Self::Ollama,
        Self::InvokeAi,
        Self::LlamaCpp,
        Self::Lemonade,
        Self::Hotset,
    ];
}

/// Prediction and prefetch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PredictConfig {
    /// Whether to load before anybody asks: the rest of a model of which a part is used, what usually goes with what was asked
    /// for, and what the predictor expects.
    pub enabled: bool,
    /// What the predictor expects is loaded when it is wanted within this time with at least `threshold` probability.
    #[serde(with = "humantime_serde")]
    pub horizon: Duration,
    /// The least probability for a prefetch.
    pub threshold: f64,
    /// The most components whose use is remembered.
    pub max_tracked: usize,
    /// Seed of the model's random start.
    pub seed: u64,
    /// A folder for what was learned, from one start to the next. `None`: they learn anew.
    pub folder: Option<PathBuf>,
}

impl Default for PredictConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            horizon: Duration::from_secs(15 * 60),
            threshold: 0.5,
            max_tracked: 10_000,
            seed: 0,
            folder: None,
        }
    }
}

/// Restarts of failed actors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SupervisionConfig {
    /// An actor that fails more often than this within `window` is taken out of service.
    pub max_restarts: usize,
    /// The time over which restarts are counted.
    #[serde(with = "humantime_serde")]
    pub window: Duration,
    /// Wait before the first restart; doubled for each further one within the window.
    #[serde(with = "humantime_serde")]
    pub backoff: Duration,
    /// The longest wait before a restart.
    #[serde(with = "humantime_serde")]
    pub max_backoff: Duration,
    /// How long an actor that was taken out of service stays down before it is tried once more.
    #[serde(with = "humantime_serde")]
    pub retry: Duration,
    /// How long a drain waits for loads under way before it cancels them.
    #[serde(with = "humantime_serde")]
    pub drain: Duration,
}

impl Default for SupervisionConfig {
    fn default() -> Self {
        Self {
            max_restarts: 10,
            window: Duration::from_secs(60),
            backoff: Duration::from_millis(20),
            max_backoff: Duration::from_secs(5),
            retry: Duration::from_secs(60),
            drain: Duration::from_secs(30),
        }
    }
}

/// Decisions and measurements.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MonitorConfig {
    /// How many decisions are kept in memory.
    pub decisions: usize,
    /// A file to which each decision is appended, a line of JSON each. `None`: no file.
    pub decisions_file: Option<PathBuf>,
    /// How often memory pressure is measured.
    #[serde(with = "humantime_serde")]
    pub interval: Duration,
    /// How often each GPU is asked how it is, and how much others use of it.
    #[serde(with = "humantime_serde")]
    pub gpu_interval: Duration,
}

impl Default for MonitorConfig {
    fn default() -> Self {
        Self {
            decisions: 10_000,
            decisions_file: None,
            interval: Duration::from_secs(1),
            gpu_interval: Duration::from_millis(250),
        }
    }
}

/// The bridge to other processes: a Unix socket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BridgeConfig {
    /// Whether `hotset serve` opens it, and commands look for it.
    pub enabled: bool,
    /// The socket. `None`: `$XDG_RUNTIME_DIR/hotset/hotset.sock`, or `~/.local/state/hotset/hotset.sock`.
    pub socket: Option<PathBuf>,
    /// Users beside the server's own that may connect, by number.
    pub allow_uids: Vec<u32>,
    /// Requests of one client that may be unanswered at a time.
    pub max_requests: usize,
    /// What may wait for a client that does not read, before its connection is ended.
    pub max_behind: Bytes,
    /// How long a client has to let go of leases that are taken back.
    #[serde(with = "humantime_serde")]
    pub grace: Duration,
}

impl Default for BridgeConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            socket: None,
            allow_uids: Vec::new(),
            max_requests: 64,
            max_behind: Bytes::mib(8),
            grace: Duration::from_secs(10),
        }
    }
}

/// The HTTP face: model repository, health, metrics, events.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HttpConfig {
    /// Whether `hotset serve` opens it.
    pub enabled: bool,
    /// Where it listens. `None`: on 127.0.0.1:7420, and nowhere where that is taken.
    pub listen: Option<SocketAddr>,
    /// What clients must send (`Authorization: Bearer ..`). Needed where `listen` is not of this machine alone.
    pub token: Option<String>,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            listen: None,
            token: None,
        }
    }
}

impl GpuConfig {
    /// The name of this GPU's table in messages.
    #[must_use]
    pub fn label(index: GpuIndex) -> String {
        format!("gpu[{index}]")
    }
}
