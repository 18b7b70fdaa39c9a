//! The system as a whole: starts the tree, answers questions about it, ends it.

mod report;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hotset_core::catalog::{Catalogue, Change};
use hotset_core::config::Config;
use hotset_core::decision::{Act, Decision, EvictCause};
use hotset_core::device::{self, Device, DeviceError, budget};
use hotset_core::io::Reader;
use hotset_core::machine::Machine;
use hotset_core::memory::{Arena, Ledger};
use hotset_core::plan::{ComponentSet, MixPlan, Plan};
use hotset_core::policy::pressure::ram_budget;
use hotset_core::predict::GuessResults;
use hotset_core::{Bytes, ComponentId, GpuIndex, Tier};
use ractor::{Actor, ActorRef};
use serde::Serialize;
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;

use crate::discovery::DiscoveryMessage;
use crate::house::{EvictionPolicyFactory, GpuEvent, Gpus, House, Shortage};
use crate::loading::{LoadError, SessionError};
use crate::monitor::{MonitorMessage, MonitorView, Pressure};
use crate::plan::{self, GpuChoice};
use crate::predictor::PredictorMessage;
use crate::ram_cache::RamCacheMessage;
use crate::sessions::{Session, SessionsMessage};
use crate::supervisor::{ActorName, Supervisor, SupervisorMessage};
use crate::vram_manager::VramManagerMessage;

/// How long an actor may take to answer a question about its state. Handlers take microseconds, and a restart far less
/// than this.
const ANSWER_TIME: Duration = Duration::from_secs(1);
/// The same for what it is told to evict: its answer is waited for by somebody who needs the memory, and on a machine that does much else
/// it may be late.
const RELIEVE_TIME: Duration = Duration::from_secs(10);

/// What a system is made of.
pub struct Parts {
    /// The configuration; checked by whoever read it.
    pub config: Config,
    /// Reads files.
    pub reader: Arc<dyn Reader>,
    /// The GPUs, one for each entry of `config.gpu`, in the same order.
    pub devices: Vec<Arc<dyn Device>>,
    /// Another eviction policy than the configuration's.
    pub eviction: Option<EvictionPolicyFactory>,
    /// Host memory that this process may use in all, at the start. `None`: it cannot be told, and a budget is configured.
    pub host_memory: Option<Bytes>,
    /// The machine. With a simulated one everything runs on the runtime's own thread, one after the other, so that a paused
    /// clock makes runs repeat.
    pub machine: Machine,
}

/// Why a system could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A device does not answer.
    #[error("GPU {gpu} cannot be used: {source}")]
    Device {
        /// Which.
        gpu: GpuIndex,
        /// What it said.
        source: DeviceError,
    },
    /// The root of the tree did not start.
    #[error("the actor system did not start: {reason}")]
    Actors {
        /// What it said.
        reason: String,
    },
}

/// What a scan found.
#[derive(Debug, Clone, Serialize)]
pub struct ScanSummary {
    /// Entries of the catalogue.
    pub models: usize,
    /// Files that were looked at.
    pub files: u64,
    /// Entries whose headers were read; the others were known already.
    pub inspected: u64,
    /// What went wrong on the way, a sentence each.
    pub problems: Vec<String>,
    /// How long it took.
    #[serde(rename = "took_s", serialize_with = "seconds")]
    pub took: Duration,
}

fn seconds<S: serde::Serializer>(took: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(took.as_secs_f64())
}

/// How long a drain waits for tasks that were told to end. They look at it between two pieces of a read, so only a disk
/// that hangs takes longer.
const TASKS_END: Duration = Duration::from_secs(10);

/// A running system. Dropping it stops everything at once; [`drain`](Self::drain) ends it gracefully.
pub struct System {
    pub(crate) house: Arc<House>,
    supervisor: ActorRef<SupervisorMessage>,
    ended: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for System {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("System")
            .field("id", &self.house.id)
            .finish_non_exhaustive()
    }
}

impl System {
    /// Starts the tree. The first scan begins at once; [`scan`](Self::scan) waits for one.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(parts: Parts) -> Result<Self, StartError> {
        let Parts {
            config,
            reader,
            devices,
            eviction,
            host_memory,
            machine,
        } = parts;
        let ledger = Ledger::new();
        let wanted = config.ram.budget;
        let ram = host_memory.map_or(wanted.unwrap_or(Bytes::ZERO), |usable| {
            ram_budget(wanted, usable)
        });
        ledger.open_tier(Tier::Ram, ram);
        let (mut by_index, mut first_figures) = (BTreeMap::new(), BTreeMap::new());
        for (i, device) in (0..).zip(devices) {
            let gpu = GpuIndex(i);
            let set = config.gpu.get(i as usize).cloned().unwrap_or_default();
            let figures = device
                .figures()
                .await
                .map_err(|source| StartError::Device { gpu, source })?;
            ledger.open_tier(Tier::Vram(gpu), budget::allowed(&set, &figures));
            by_index.insert(gpu, device);
            first_figures.insert(gpu, figures);
        }
        let links = device::links(&by_index).await;
        let house = Arc::new(House::new(
            Arc::new(config),
            ledger,
            reader,
            Gpus {
                devices: by_index,
                links,
                first_figures,
            },
            eviction,
            machine,
        ));
        let name = house.actor_name("supervisor");
        let (supervisor, ended) = Actor::spawn(Some(name), Supervisor, house.clone())
            .await
            .map_err(|error| StartError::Actors {
                reason: error.to_string(),
            })?;
        house.supervisor.set(Some(supervisor.clone()));
        crate::prewarm::start(&house);
        Ok(Self {
            house,
            supervisor,
            ended: Some(ended),
        })
    }

    /// Host memory, for a device that has to register where it lies.
    #[must_use]
    pub fn arena(&self) -> &Arena {
        &self.house.arena
    }

    /// Whether others need host memory, and each change of that: who holds leases may want to let go of some.
    #[must_use]
    pub fn pressure(&self) -> watch::Receiver<Pressure> {
        self.house.pressure.subscribe()
    }

    /// The catalogue as it is now; without a message, and never torn.
    #[must_use]
    pub fn catalogue(&self) -> Arc<Catalogue> {
        self.house.catalogue.load()
    }

    /// Hears of every change of the catalogue from now on. A listener that is far behind is told how much it missed, and
    /// looks at the snapshot.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<[Change]>> {
        self.house.catalogue_changes.subscribe()
    }

    /// Hears of what happens to GPUs from now on: losses, returns, and memory that others need.
    #[must_use]
    pub fn subscribe_gpus(&self) -> broadcast::Receiver<GpuEvent> {
        self.house.gpu_events.subscribe()
    }

    /// Waits until an error has left one of the GPUs unusable to this process, and to no other; gives the reason, at once where that
    /// has happened before.
    pub async fn spent(&self) -> Arc<str> {
        let mut spent = self.house.spent.subscribe();
        let reason = spent.wait_for(Option::is_some).await;
        match reason.ok().and_then(|reason| reason.clone()) {
            Some(reason) => reason,
            None => std::future::pending().await,
        }
    }

    /// Hears of every decision from now on, in their order.
    #[must_use]
    pub fn subscribe_decisions(&self) -> broadcast::Receiver<Decision> {
        self.house.decided.subscribe()
    }

    /// Hears of every set that a session is granted from now on.
    #[must_use]
    pub fn subscribe_granted(&self) -> broadcast::Receiver<crate::Used> {
        self.house.granted.subscribe()
    }

    /// Hears of every set that has to wait because leases hold the memory, at each try.
    #[must_use]
    pub fn subscribe_shortages(&self) -> broadcast::Receiver<Shortage> {
        self.house.shortages.subscribe()
    }

    /// What Monitor measures, as it does.
    #[must_use]
    pub fn subscribe_pressure(&self) -> watch::Receiver<MonitorView> {
        self.house.measured.subscribe()
    }

    /// Scans all folders now, and waits until what was found is published.
    ///
    /// # Errors
    /// [`SessionError::Draining`] where the system ends first.
    pub async fn scan(&self) -> Result<ScanSummary, SessionError> {
        tokio::select! {
            biased;
            () = self.house.stop.cancelled() => Err(SessionError::Draining),
            summary = self.house.discovery.insist(|reply| DiscoveryMessage::Scan(Some(reply))) => {
                Ok(summary)
            }
        }
    }

    /// Tells that files have changed, as a watcher does: these paths, or, with `None`, nobody knows which. They are looked at
    /// once they have come to rest. Gives whether somebody heard of it; if not, a scan of everything begins soon anyhow.
    pub fn files_changed(&self, paths: Option<Vec<PathBuf>>) -> bool {
        let told = DiscoveryMessage::Told(paths);
        self.house.discovery.cast(told).is_ok()
    }

    /// Waits until the first scan is published.
    ///
    /// # Errors
    /// [`SessionError::Draining`] where the system ends first.
    pub async fn catalogued(&self) -> Result<ScanSummary, SessionError> {
        tokio::select! {
            biased;
            () = self.house.stop.cancelled() => Err(SessionError::Draining),
            summary = self.house.discovery.insist(DiscoveryMessage::Published) => Ok(summary),
        }
    }

    /// Opens a session.
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn session(&self, label: impl Into<String>) -> Result<Session, SessionError> {
        let label = label.into();
        Session::open(self.house.clone(), &label.clone(), label).await
    }

    /// Opens a session that counts against the quota of `tenant`, and is called `label`.
    ///
    /// # Errors
    /// [`SessionError`].
    pub async fn session_of(
        &self,
        tenant: &str,
        label: impl Into<String>,
    ) -> Result<Session, SessionError> {
        Session::open(self.house.clone(), tenant, label.into()).await
    }

    /// Records a decision that was made outside of the system, such as to ask a client for its leases.
    pub fn record(&self, act: Act) {
        self.house.decide(act);
    }

    /// The plan for a set as things stand, undivided; nothing is reserved or moved.
    ///
    /// # Errors
    /// [`LoadError::Resolve`], [`LoadError::Plan`].
    pub fn plan(&self, set: &ComponentSet) -> Result<Plan, LoadError> {
        let (plan, _) = plan::whole(&self.house, set)?;
        Ok(plan::foreseen(&self.house, plan))
    }

    /// The plan for a set that is split where it may be and has to be: then the headers of its files are read.
    ///
    /// # Errors
    /// [`LoadError::Resolve`], [`LoadError::Plan`], [`LoadError::Component`].
    pub async fn plan_split(&self, set: &ComponentSet) -> Result<Plan, LoadError> {
        let (plan, _) = plan::make(&self.house, set).await?;
        Ok(plan::foreseen(&self.house, plan))
    }

    /// A plan for several sets together, on these GPUs; nothing is reserved or moved.
    ///
    /// # Errors
    /// [`LoadError::Resolve`]; [`LoadError::Plan`] where there is no such GPU.
    pub fn plan_mix(&self, sets: &[ComponentSet], gpus: &GpuChoice) -> Result<MixPlan, LoadError> {
        plan::mix(&self.house, sets, gpus)
    }

    /// The last decisions that concern the components for which `concerns` holds, newest first.
    #[must_use]
    pub fn decisions(
        &self,
        limit: usize,
        concerns: impl Fn(&ComponentId) -> bool,
    ) -> Vec<Decision> {
        self.house
            .decisions(limit, |decision| decision.act.concerns(&concerns))
    }

    /// All the last decisions, newest first.
    #[must_use]
    pub fn all_decisions(&self, limit: usize) -> Vec<Decision> {
        self.house.decisions(limit, |_| true)
    }

    /// Evicts what nobody holds in a tier, until it uses no more than `keep` (0 to 1) of its budget. Gives the bytes that
    /// are coming back.
    ///
    /// # Errors
    /// [`SessionError::NotAnswering`] where the tier's keeper does not answer, or there is no such tier.
    pub async fn relieve(
        &self,
        tier: Tier,
        keep: f64,
        cause: EvictCause,
    ) -> Result<Bytes, SessionError> {
        let missing = SessionError::NotAnswering { actor: "the tier" };
        let answer = match tier {
            Tier::Ram => {
                let call = self.house.ram.call(|reply| RamCacheMessage::Relieve {
                    keep,
                    cause,
                    reply: Some(reply),
                });
                tokio::time::timeout(RELIEVE_TIME, call).await
            }
            Tier::Vram(gpu) => {
                let slot = self.house.vram.get(&gpu).ok_or_else(|| missing.clone())?;
                let call = slot.call(|reply| VramManagerMessage::Relieve {
                    keep,
                    cause,
                    reply: Some(reply),
                });
                tokio::time::timeout(RELIEVE_TIME, call).await
            }
        };
        answer.ok().and_then(Result::ok).ok_or(missing)
    }

    /// Switches learning and prefetching on or off.
    ///
    /// # Errors
    /// [`SessionError::NotAnswering`].
    pub async fn set_prediction(&self, enabled: bool) -> Result<(), SessionError> {
        self.house.predicting.store(enabled, Ordering::Relaxed);
        let call = self
            .house
            .predictor
            .insist(|reply| PredictorMessage::SetEnabled(enabled, reply));
        tokio::time::timeout(ANSWER_TIME, call)
            .await
            .map_err(|_| SessionError::NotAnswering { actor: "predictor" })
    }

    /// What came of loading what nobody had asked for, by its grounds.
    #[must_use]
    pub fn guesses(&self) -> Vec<GuessResults> {
        self.house.usage().guesses().results()
    }

    /// Takes no new work from now on, and lets loads under way finish for as long as the configuration says; what is left
    /// then is cancelled. Everything else goes on: [`drain`](Self::drain) ends it.
    pub async fn quiesce(&self) {
        let house = &self.house;
        house.draining.store(true, Ordering::Release);
        tracing::info!("draining");
        let all = u32::try_from(house.config.sessions.max_loads.max(1)).unwrap_or(u32::MAX);
        let patience = house.config.supervision.drain;
        let idle = tokio::time::timeout(patience, house.loads.acquire_many(all)).await;
        if idle.is_err() {
            tracing::warn!(?patience, "loads were still under way; cancelling them");
            let _ = house.sessions.cast(SessionsMessage::CancelAll);
            // Each ends as soon as it is polled.
            let _ = tokio::time::timeout(ANSWER_TIME, house.loads.acquire_many(all)).await;
        }
    }

    /// Ends gracefully: takes no new work, lets loads under way finish for as long as the configuration says, cancels the
    /// rest, stops all actors and waits for their tasks. Leases stay valid until they are dropped.
    pub async fn drain(mut self) {
        self.quiesce().await;
        let house = self.house.clone();
        house.stop.cancel();
        self.supervisor.stop(Some("drained".into()));
        if let Some(ended) = self.ended.take() {
            let _ = ended.await;
        }
        house.tasks.close();
        if tokio::time::timeout(TASKS_END, house.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                left = house.tasks.len(),
                "tasks are stuck in the system, in a read that does not return perhaps; leaving them"
            );
        }
        let kept = house.clone();
        let _ = house.aside(move || kept.write_learned()).await;
        let ledger = house.ledger.clone();
        let _ = house.aside(move || forget_everything(&ledger)).await;
        tracing::info!("drained");
    }

    /// Keeps an actor busy for so long, as a slow handler would. For tests and chaos.
    ///
    /// Gives whether there was one.
    pub fn dawdle(&self, actor: ActorName, time: Duration) -> bool {
        let house = &self.house;
        let told = match actor {
            ActorName::Discovery => house.discovery.cast(DiscoveryMessage::Dawdle(time)),
            ActorName::RamCache => house.ram.cast(RamCacheMessage::Dawdle(time)),
            ActorName::VramManager(gpu) => {
                return house
                    .vram
                    .get(&gpu)
                    .is_some_and(|slot| slot.cast(VramManagerMessage::Dawdle(time)).is_ok());
            }
            ActorName::Predictor => house.predictor.cast(PredictorMessage::Dawdle(time)),
            ActorName::Monitor => house.monitor.cast(MonitorMessage::Dawdle(time)),
            ActorName::Sessions => house.sessions.cast(SessionsMessage::Dawdle(time)),
        };
        told.is_ok()
    }

    /// Kills an actor where it stands, as a fault would. For tests and chaos.
    ///
    /// Gives whether there was one.
    pub fn kill(&self, actor: ActorName) -> bool {
        macro_rules! kill {
            ($slot:expr) => {
                $slot.get().map(|actor| actor.kill()).is_some()
            };
        }
        let house = &self.house;
        match actor {
            ActorName::Discovery => kill!(house.discovery),
            ActorName::RamCache => kill!(house.ram),
            ActorName::VramManager(gpu) => house.vram.get(&gpu).is_some_and(|slot| kill!(slot)),
            ActorName::Predictor => kill!(house.predictor),
            ActorName::Monitor => kill!(house.monitor),
            ActorName::Sessions => {
                // Its loaders die with it. One after the other, by age: left to ractor, it would be by chance.
                let sessions = house.sessions.get();
                let mut loaders = sessions.map_or_else(Vec::new, |actor| actor.get_children());
                loaders.sort_by_key(ractor::ActorCell::get_id);
                for loader in loaders {
                    loader.kill();
                }
                kill!(house.sessions)
            }
        }
    }

    /// The books, for whoever checks them.
    #[must_use]
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.house.ledger
    }

    /// The configuration in force.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.house.config
    }
}

impl Drop for System {
    fn drop(&mut self) {
        self.house.draining.store(true, Ordering::Release);
        self.house.stop.cancel();
        self.supervisor.stop(Some("the system was dropped".into()));
        let ledger = self.house.ledger.clone();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            if self.house.machine.is_simulated() {
                forget_everything(&ledger);
            } else {
                drop(runtime.spawn_blocking(move || forget_everything(&ledger)));
            }
        }
    }
}

/// Frees everything that no lease holds, in every tier: nobody will ask for it any more. Unmapping gigabytes takes long.
fn forget_everything(ledger: &Ledger) {
    for view in ledger.views() {
        ledger.forget_tier(view.tier);
    }
}
