//! The embedding API: a builder and a handle over the actor system.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use hotset_actors::{Parts, System};
use hotset_core::catalog::{Catalogue, Change};
use hotset_core::config::{Config, DeviceKind, GpuConfig};
use hotset_core::decision::{Act, Decision, EvictCause};
use hotset_core::device::cuda::{Cuda, CudaError};
use hotset_core::device::sim::SimDevice;
use hotset_core::device::{Device, DeviceError};
use hotset_core::io::{DiskReader, Reader};
use hotset_core::machine::Machine;
use hotset_core::memory::{Charge, OfferedMemory};
use hotset_core::plan::{ComponentSet, DependencyGraph, MixPlan, Plan, resolve};
use hotset_core::policy::pressure::ram_budget;
use hotset_core::predict::GuessResults;
use hotset_core::{Bytes, ComponentId, GpuIndex, ModelName, Tier};

use crate::decisions_file;
use crate::{
    ActorName, Adoption, EvictionPolicyFactory, GpuChoice, GpuEvent, LoadError, MonitorView,
    ScanSummary, Session, SessionError, Shortage, Status, UsageReport,
};

/// Why hotset could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The file for decisions cannot be written.
    #[error("cannot write decisions to {}: {source}; see monitor.decisions_file", path.display())]
    DecisionsFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The system did not start.
    #[error(transparent)]
    System(#[from] hotset_actors::StartError),
    /// No budget is set, and the machine's memory cannot be told.
    #[error("cannot read the machine's memory from /proc/meminfo ({reason}); set ram.budget")]
    HostMemory {
        /// What is wrong with it.
        reason: String,
    },
    /// A GPU is configured that cannot be had.
    #[error("gpu[{gpu}] is configured as an NVIDIA GPU: {source}")]
    Cuda {
        /// Which entry of the configuration.
        gpu: GpuIndex,
        /// Why not.
        source: CudaError,
    },
    /// A GPU is configured that this machine does not have.
    #[error("gpu[{gpu}] selects `{wanted}`, but there are only {}; see `nvidia-smi -L`", .present.join(", "))]
    NoSuchGpu {
        /// Which entry of the configuration.
        gpu: GpuIndex,
        /// What it selects.
        wanted: String,
        /// The GPUs that there are.
        present: Vec<String>,
    },
    /// A configured GPU does not work.
    #[error("gpu[{gpu}]: {source}")]
    Gpu {
        /// Which entry of the configuration.
        gpu: GpuIndex,
        /// What is wrong with it.
        source: DeviceError,
    },
    /// Files cannot be read.
    #[error(transparent)]
    Reader(#[from] hotset_core::io::StartReaderError),
    /// The first scan did not end.
    #[error("the first scan did not end: {0}")]
    Scan(#[from] SessionError),
}

/// Makes a [`Hotset`].
#[derive(Default)]
#[must_use = "nothing happens before start()"]
pub struct HotsetBuilder {
    config: Config,
    reader: Option<Arc<dyn Reader>>,
    devices: Option<Vec<Arc<dyn Device>>>,
    eviction: Option<EvictionPolicyFactory>,
    scan_later: bool,
    machine: Option<Machine>,
}

impl std::fmt::Debug for HotsetBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HotsetBuilder")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl HotsetBuilder {
    /// With this configuration.
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// With these devices instead of the configuration's, one for each GPU.
    pub fn devices(mut self, devices: Vec<Arc<dyn Device>>) -> Self {
        self.devices = Some(devices);
        self
    }

    /// With another way of reading files.
    pub fn reader(mut self, reader: Arc<dyn Reader>) -> Self {
        self.reader = Some(reader);
        self
    }

    /// With another eviction policy than the configuration names.
    pub fn eviction(mut self, policy: EvictionPolicyFactory) -> Self {
        self.eviction = Some(policy);
        self
    }

    /// On this machine instead of the one that it runs on: the memory that it has, and what others do to it.
    pub fn machine(mut self, machine: Machine) -> Self {
        self.machine = Some(machine);
        self
    }

    /// Does not wait for the first scan; models appear as they are found.
    pub const fn scan_later(mut self) -> Self {
        self.scan_later = true;
        self
    }

    /// Starts the actor system on the current tokio runtime, and waits for the first scan.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(mut self) -> Result<Hotset, StartError> {
        let machine = self.machine.unwrap_or_else(Machine::here);
        let host_memory = match (self.config.ram.budget, host_memory(&machine)) {
            (_, Ok(bytes)) => {
                warn_of_budget(&self.config, bytes);
                Some(bytes)
            }
            // It is not needed.
            (Some(_), Err(_)) => None,
            (None, Err(reason)) => return Err(StartError::HostMemory { reason }),
        };
        let devices = match self.devices {
            Some(devices) => devices,
            None if self.config.gpu.is_empty() && self.config.cuda.detect => {
                let (configs, devices) = detected(&self.config).await;
                self.config.gpu = configs;
                devices
            }
            None => configured(&self.config).await?,
        };
        let reader: Arc<dyn Reader> = match self.reader {
            Some(reader) => reader,
            None => Arc::new(DiskReader::start(&self.config.load)?),
        };
        let decisions_file = match &self.config.monitor.decisions_file {
            None => None,
            Some(path) => {
                let file = decisions_file::open(path);
                Some(file.map_err(|source| StartError::DecisionsFile {
                    path: path.clone(),
                    source,
                })?)
            }
        };
        let system = System::start(Parts {
            reader,
            devices,
            eviction: self.eviction,
            host_memory,
            machine,
            config: self.config,
        })
        .await?;
        let hotset = Hotset { system };
        if let Some(file) = decisions_file
            && let Err(error) = decisions_file::start(file, hotset.subscribe_decisions())
        {
            tracing::error!(%error, "no thread for decisions; they are not written");
        }
        if !self.scan_later {
            hotset.system.catalogued().await?;
        }
        Ok(hotset)
    }
}

/// Looks for the driver, off the async workers, since that may take a second.
async fn detect(config: &Config) -> Result<Cuda, CudaError> {
    tokio::task::spawn_blocking(Cuda::detect)
        .await
        .unwrap_or(Err(CudaError::NoLibrary))
        .map(|cuda| cuda.patience(config.cuda.call_timeout))
}

/// The NVIDIA GPUs that are there and wanted. One that does not work is left out.
async fn detected(config: &Config) -> (Vec<GpuConfig>, Vec<Arc<dyn Device>>) {
    let (mut configs, mut devices): (Vec<GpuConfig>, Vec<Arc<dyn Device>>) = Default::default();
    let cuda = match detect(config).await {
        Ok(cuda) => cuda,
        Err(error) => {
            match error {
                CudaError::NoLibrary => tracing::info!("no NVIDIA GPU; everything stays in RAM"),
                error => tracing::error!(%error, "NVIDIA GPUs cannot be used"),
            }
            return (configs, devices);
        }
    };
    let wanted = cuda.gpus().iter();
    for gpu in wanted.filter(|gpu| config.cuda.wants(|word| gpu.is_meant_by(word))) {
        let index = GpuIndex(u32::try_from(devices.len()).unwrap_or(u32::MAX));
        match cuda.open(index, gpu).await {
            Ok(device) => {
                configs.push(config.cuda.found(gpu.uuid.clone()));
                devices.push(device);
            }
            Err(error) => tracing::error!(%error, uuid = gpu.uuid, "a GPU is left out"),
        }
    }
    (configs, devices)
}

/// The GPUs that the configuration names, one for each entry.
async fn configured(config: &Config) -> Result<Vec<Arc<dyn Device>>, StartError> {
    let mut cuda = None;
    let mut devices: Vec<Arc<dyn Device>> = Vec::new();
    for (gpu, entry) in (0..).map(GpuIndex).zip(&config.gpu) {
        if entry.device == DeviceKind::Sim {
            devices.push(SimDevice::new(gpu, entry.sim.clone()));
            continue;
        }
        let cuda = match &cuda {
            Some(cuda) => cuda,
            None => {
                let found = detect(config).await;
                cuda.insert(found.map_err(|source| StartError::Cuda { gpu, source })?)
            }
        };
        let wanted = entry.select.clone().unwrap_or_else(|| gpu.to_string());
        let meant = cuda.gpus().iter().find(|gpu| gpu.is_meant_by(&wanted));
        let meant = meant.ok_or_else(|| StartError::NoSuchGpu {
            gpu,
            wanted,
            present: cuda.gpus().iter().map(|gpu| gpu.uuid.clone()).collect(),
        })?;
        let device = cuda.open(gpu, meant).await;
        devices.push(device.map_err(|source| StartError::Gpu { gpu, source })?);
    }
    Ok(devices)
}

/// What this process may use of the machine's memory: all of it, or what its control groups allow.
fn host_memory(machine: &Machine) -> Result<Bytes, String> {
    machine
        .memory()
        .map(|host| host.usable())
        .ok_or_else(|| "it is missing, or has no MemTotal".into())
}

/// Says so where the budget is more than the process may use at all; what is used follows what is allowed.
fn warn_of_budget(config: &Config, host_memory: Bytes) {
    if let Some(budget) = config.ram.budget {
        let most = ram_budget(Some(budget), host_memory);
        if most < budget {
            tracing::warn!(%budget, allowed = %host_memory, "ram.budget is more than this process may use; it is {most}");
        }
    }
}

/// A running hotset. Dropping it stops everything at once; [`drain`](Self::drain) ends it gracefully.
#[derive(Debug)]
pub struct Hotset {
    system: System,
}

impl Hotset {
    /// A builder with the default configuration.
    pub fn builder() -> HotsetBuilder {
        HotsetBuilder::default()
    }

    /// Opens a session; `label` is how status calls it.
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn session(&self, label: impl Into<String>) -> Result<Session, SessionError> {
        self.system.session(label).await
    }

    /// Opens a session that counts against the quota of the label `tenant`, and that status calls `label`.
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn session_of(
        &self,
        tenant: &str,
        label: impl Into<String>,
    ) -> Result<Session, SessionError> {
        self.system.session_of(tenant, label).await
    }

    /// Takes memory over that clients of an earlier server still map.
    pub(crate) fn adopt(
        &self,
        memory: Arc<OfferedMemory>,
        component: &str,
        charge: Charge,
    ) -> BoxFuture<'static, Adoption> {
        self.system.adopt(memory, component, charge)
    }

    /// Records that a client was asked for its leases.
    pub(crate) fn record(&self, act: Act) {
        self.system.record(act);
    }

    /// The catalogue as it is now. Takes no message and no lock.
    #[must_use]
    pub fn catalogue(&self) -> Arc<Catalogue> {
        self.system.catalogue()
    }

    /// Hears of every change of the catalogue from now on. A listener that is far behind gets
    /// [`Lagged`](tokio::sync::broadcast::error::RecvError::Lagged) and looks at [`catalogue`](Self::catalogue).
    #[must_use]
    pub fn subscribe(&self) -> tokio::sync::broadcast::Receiver<Arc<[Change]>> {
        self.system.subscribe()
    }

    /// Hears of what happens to GPUs from now on: which are lost with which leases, which are back, and where other
    /// processes have taken memory that leases hold.
    #[must_use]
    pub fn subscribe_gpus(&self) -> tokio::sync::broadcast::Receiver<GpuEvent> {
        self.system.subscribe_gpus()
    }

    /// Waits until an error has left one of the GPUs unusable to this process, and to no other; gives the reason, at once where that
    /// has happened before. Only a new process helps.
    pub async fn spent(&self) -> Arc<str> {
        self.system.spent().await
    }

    /// Hears of every decision from now on, in their order.
    #[must_use]
    pub fn subscribe_decisions(&self) -> tokio::sync::broadcast::Receiver<Decision> {
        self.system.subscribe_decisions()
    }

    /// Hears of every set that a session is granted from now on.
    #[must_use]
    pub fn subscribe_granted(&self) -> tokio::sync::broadcast::Receiver<hotset_actors::Used> {
        self.system.subscribe_granted()
    }

    /// Hears of every set that has to wait because leases hold the memory.
    #[must_use]
    pub fn subscribe_shortages(&self) -> tokio::sync::broadcast::Receiver<Shortage> {
        self.system.subscribe_shortages()
    }

    /// What is measured of host memory, as it is.
    #[must_use]
    pub fn subscribe_pressure(&self) -> tokio::sync::watch::Receiver<MonitorView> {
        self.system.subscribe_pressure()
    }

    /// Scans all folders and waits until the result is published. Files that did not change are not read again.
    ///
    /// # Errors
    /// [`SessionError::Draining`] where the system ends first.
    pub async fn scan(&self) -> Result<ScanSummary, SessionError> {
        self.system.scan().await
    }

    /// The components of a set and what comes before what.
    ///
    /// # Errors
    /// [`LoadError::Resolve`].
    pub fn dependencies(&self, set: &ComponentSet) -> Result<DependencyGraph, LoadError> {
        Ok(resolve(
            &self.catalogue(),
            &self.config().set,
            &set.names,
            set.dependencies,
        )?)
    }

    /// What loading a set would do as things stand: where it would go, what would be evicted. Moves nothing.
    ///
    /// # Errors
    /// [`LoadError::Resolve`], [`LoadError::Plan`].
    pub fn plan(&self, set: &ComponentSet) -> Result<Plan, LoadError> {
        self.system.plan(set)
    }

    /// The same, for a set that is split where it may be ([`ComponentSet::may_split`]) and has to be: then the headers of its
    /// files are read.
    ///
    /// # Errors
    /// [`LoadError::Resolve`], [`LoadError::Plan`], [`LoadError::Component`].
    pub async fn plan_split(&self, set: &ComponentSet) -> Result<Plan, LoadError> {
        self.system.plan_split(set).await
    }

    /// What loading several sets together would do: which GPU each gets, what goes for them, how long it takes, and what one
    /// would have to give up where not all fit. Moves nothing.
    ///
    /// # Errors
    /// [`LoadError::Resolve`]; [`LoadError::Plan`] where there is no such GPU.
    pub fn plan_mix(&self, sets: &[ComponentSet], gpus: &GpuChoice) -> Result<MixPlan, LoadError> {
        self.system.plan_mix(sets, gpus)
    }

    /// Tells that files have changed, as a watcher does: these paths, or, with `None`, nobody knows which. For folders whose
    /// file system reports nothing. They are looked at once they have come to rest. Gives whether somebody heard of it; if
    /// not, a scan of everything begins soon anyhow.
    pub fn files_changed(&self, paths: Option<Vec<PathBuf>>) -> bool {
        self.system.files_changed(paths)
    }

    /// The state of everything.
    pub async fn status(&self) -> Status {
        self.system.status().await
    }

    /// The last decisions that concern a model or one of its components, newest first.
    #[must_use]
    pub fn why(&self, name: &str, limit: usize) -> Vec<Decision> {
        let catalogue = self.catalogue();
        let model = |name: &str| catalogue.find(name).ok().map(|found| found.name.clone());
        let whole = model(name);
        let part = name
            .rsplit_once('/')
            .and_then(|(of, component)| Some((model(of)?, component)));
        self.system.decisions(limit, |id: &ComponentId| {
            let is_part = |(of, component): &(ModelName, &str)| {
                id.model == *of && &*id.component == *component
            };
            // What is gone from the catalogue is known by its full name.
            whole.as_ref() == Some(&id.model)
                || part.as_ref().is_some_and(is_part)
                || id.to_string() == name
                || id.model.as_str() == name
        })
    }

    /// The last decisions, newest first.
    #[must_use]
    pub fn decisions(&self, limit: usize) -> Vec<Decision> {
        self.system.all_decisions(limit)
    }

    /// Evicts what nobody holds until a tier uses no more than `keep` (0 to 1) of its budget; gives the bytes that come
    /// back.
    ///
    /// # Errors
    /// [`SessionError::NotAnswering`].
    pub async fn optimise_cache(&self, tier: Tier, keep: f64) -> Result<Bytes, SessionError> {
        self.system.relieve(tier, keep, EvictCause::Requested).await
    }

    /// Gives host memory back at once: everything that nobody holds goes.
    ///
    /// # Errors
    /// [`SessionError::NotAnswering`].
    pub async fn handle_memory_pressure(&self) -> Result<Bytes, SessionError> {
        self.system
            .relieve(Tier::Ram, 0.0, EvictCause::Pressure)
            .await
    }

    /// Switches learning from requests and prefetching on or off.
    ///
    /// # Errors
    /// [`SessionError::NotAnswering`].
    pub async fn enable_predictive_caching(&self, enabled: bool) -> Result<(), SessionError> {
        self.system.set_prediction(enabled).await
    }

    /// What came of loading what nobody had asked for, by its grounds: bytes used and in vain, seconds saved and lost.
    #[must_use]
    pub fn guesses(&self) -> Vec<GuessResults> {
        self.system.guesses()
    }

    /// How components are used: what is hot, what hits, what the predictor has learned.
    pub async fn analyse_usage(&self) -> UsageReport {
        self.system.usage().await
    }

    /// The configuration in force.
    #[must_use]
    pub fn config(&self) -> &Config {
        self.system.config()
    }

    /// The host memory that slabs lie in, for devices that register it.
    #[must_use]
    pub fn arena(&self) -> &hotset_core::memory::Arena {
        self.system.arena()
    }

    /// Whether others need host memory, and each change of that. Under pressure what nobody holds goes; who holds leases
    /// that can be had again may want to drop them.
    #[must_use]
    pub fn pressure(&self) -> tokio::sync::watch::Receiver<hotset_actors::Pressure> {
        self.system.pressure()
    }

    /// The books of all tiers, for whoever checks them.
    #[must_use]
    pub fn ledger(&self) -> &Arc<hotset_core::memory::Ledger> {
        self.system.ledger()
    }

    /// Keeps an actor busy for so long, as a slow handler would. For tests and chaos. Gives whether there was one.
    pub fn dawdle(&self, actor: ActorName, time: Duration) -> bool {
        self.system.dawdle(actor, time)
    }

    /// Kills an actor where it stands, as a fault would; its supervisor starts it again. For tests and chaos. Gives
    /// whether there was one to kill.
    pub fn kill(&self, actor: ActorName) -> bool {
        self.system.kill(actor)
    }

    /// Takes no new work from now on, and waits for loads under way as [`drain`](Self::drain) does; everything else goes on.
    pub async fn quiesce(&self) {
        self.system.quiesce().await;
    }

    /// Ends gracefully: no new work, loads under way may finish for `supervision.drain`, then everything stops. Leases
    /// stay valid until they are dropped.
    pub async fn drain(self) {
        self.system.drain().await;
    }
}
