//! NVIDIA GPUs by the CUDA driver, loaded at run time: the same binary works where there is none.
//!
//! [`Cuda::detect`] finds the driver and its GPUs, [`Cuda::open`] makes a [`CudaDevice`] of one. All calls are made on
//! threads of the device's own (`engine`); device memory is managed in `heap`, pinned host memory in `pins`.

mod copier;
mod driver;
mod engine;
mod heap;
mod import;
mod pins;
mod raw;
#[cfg(test)]
mod tests;
mod worker;

pub use driver::CudaError;
pub use import::Imported;
pub use raw::PinnedCopy;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::oneshot;

use self::copier::Part;
use self::driver::Driver;
use self::engine::{Block, Engine, Shared};
use self::import::Contexts;
use self::pins::{Pinned, Pins};
use super::nvml::{Answer, NvmlWatch, Reading};
use super::{
    Allocation, Device, DeviceDescription, DeviceError, Export, FigureSource, Figures, Kept, Link,
    Piece,
};
use crate::ids::GpuIndex;
use crate::machine::NumaNode;
use crate::memory::HostRange;
use crate::units::Bytes;

/// Xid errors after which a GPU does nothing any more: uncontained memory error, fallen off the bus, and the firmware's
/// processor not answering. All others end the process that caused them, at most.
const FATAL_XIDS: [u64; 3] = [79, 95, 119];

/// How long the threads of a lost context may take to end. Calls to a lost device return at once, unless the driver hangs.
const THREADS_END: Duration = Duration::from_secs(5);

/// Readings that may be spoilt by allocations at the same time, before one is taken as it is.
const READINGS: usize = 4;

/// How long one call of the driver may take where nothing else is said: registering a TiB on small pages takes 20 s.
const PATIENCE: Duration = Duration::from_secs(30);

/// One GPU as the driver lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaGpu {
    /// Its place in the driver's list, which `CUDA_VISIBLE_DEVICES` changes.
    pub ordinal: u32,
    /// The maker's number of this very GPU, as `nvidia-smi -L` writes it.
    pub uuid: String,
    /// The maker's name for it.
    pub name: String,
    /// All its memory.
    pub memory: Bytes,
    /// The node of host memory that it is at, where the machine has several.
    pub node: Option<NumaNode>,
}

impl CudaGpu {
    /// Whether a user's word means this GPU: its ordinal, its UUID, or the UUID's beginning.
    #[must_use]
    pub fn is_meant_by(&self, word: &str) -> bool {
        let word = word.trim();
        match word.parse::<u32>() {
            Ok(ordinal) => ordinal == self.ordinal,
            // Shorter beginnings fit every GPU.
            Err(_) => word.len() > "GPU-".len() && self.uuid.starts_with(word),
        }
    }
}

/// What all GPUs of one process share.
#[derive(Debug, Default)]
struct Fleet {
    pins: Arc<Pins>,
    devices: Mutex<BTreeMap<GpuIndex, Weak<CudaDevice>>>,
}

/// The CUDA driver of this machine.
#[derive(Debug)]
pub struct Cuda {
    driver: Arc<Driver>,
    gpus: Vec<CudaGpu>,
    fleet: Arc<Fleet>,
    contexts: Contexts,
    patience: Duration,
}

/// The UUID in the maker's writing.
fn uuid_text(prefix: &str, uuid: &[u8; 16]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let parts = [
        &uuid[..4],
        &uuid[4..6],
        &uuid[6..8],
        &uuid[8..10],
        &uuid[10..],
    ];
    format!("{prefix}-{}", parts.map(hex).join("-"))
}

impl Cuda {
    /// Finds the driver and its GPUs. May take a second; makes no context.
    ///
    /// # Errors
    /// [`CudaError::NoLibrary`] where there is no driver or no GPU, others where there is one that cannot be used.
    pub fn detect() -> Result<Self, CudaError> {
        let driver = Arc::new(Driver::load()?);
        let mut gpus = Vec::new();
        for ordinal in 0..driver.count()? {
            let device = driver.device(ordinal)?;
            let name = driver.name(device)?;
            if !driver.can_share(device)? {
                return Err(CudaError::CannotShare { name });
            }
            gpus.push(CudaGpu {
                ordinal: ordinal.unsigned_abs(),
                uuid: uuid_text("GPU", &driver.uuid(device)?),
                name,
                memory: Bytes(driver.total(device)?),
                node: NumaNode::of_pci(&driver.pci(device)?),
            });
        }
        Ok(Self {
            contexts: Contexts::new(driver.clone()),
            driver,
            gpus,
            fleet: Arc::default(),
            patience: PATIENCE,
        })
    }

    /// With this much time for each call of the driver. A device whose driver takes longer counts as lost, until the call
    /// returns.
    #[must_use]
    pub const fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The GPUs, in the driver's order.
    #[must_use]
    pub fn gpus(&self) -> &[CudaGpu] {
        &self.gpus
    }

    /// Makes a device of a GPU, which from then on holds a context on it.
    ///
    /// # Errors
    /// [`DeviceError`] where the GPU does not work, or cannot hold one more context.
    pub async fn open(
        &self,
        index: GpuIndex,
        gpu: &CudaGpu,
    ) -> Result<Arc<CudaDevice>, DeviceError> {
        let uuid = gpu.uuid.clone();
        // A slice of a GPU has a name of its own in NVML.
        let names = vec![uuid.clone(), uuid.replacen("GPU-", "MIG-", 1)];
        let nvml = NvmlWatch::start(index.to_string(), names, self.patience);
        let before = nvml.ask().await;
        let ordinal = i32::try_from(gpu.ordinal).unwrap_or(i32::MAX);
        let (driver, pins) = (self.driver.clone(), self.fleet.pins.clone());
        let patience = self.patience;
        let mut starting = None;
        let engine =
            Engine::start(index, driver, ordinal, pins, false, patience, &mut starting).await?;
        let after = nvml.ask().await;
        let context = match (before, after) {
            (Answer::Read(before), Answer::Read(after)) => {
                Some(Bytes(before.free.saturating_sub(after.free)))
            }
            _ => None,
        };
        let device = Arc::new(CudaDevice {
            index,
            gpu: gpu.clone(),
            ordinal,
            context,
            granules: engine.granules,
            engine: RwLock::new(Arc::new(engine)),
            patience,
            recovering: tokio::sync::Mutex::default(),
            nvml,
            next: AtomicU64::new(1),
            blocks: Mutex::default(),
            fleet: self.fleet.clone(),
        });
        self.fleet
            .devices
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(index, Arc::downgrade(&device));
        Ok(device)
    }
}

/// An NVIDIA GPU.
#[derive(Debug)]
pub struct CudaDevice {
    index: GpuIndex,
    gpu: CudaGpu,
    ordinal: i32,
    /// What the context cost when it was made.
    context: Option<Bytes>,
    granules: super::Granules,
    /// Replaced when a lost device comes back.
    engine: RwLock<Arc<Engine>>,
    patience: Duration,
    /// Held while the device is brought back; an attempt whose driver never returned is left here.
    recovering: tokio::sync::Mutex<Option<Arc<Shared>>>,
    nvml: NvmlWatch,
    next: AtomicU64,
    /// By the number of the allocation.
    blocks: Mutex<HashMap<u64, Arc<Block>>>,
    fleet: Arc<Fleet>,
}

impl CudaDevice {
    fn engine(&self) -> Arc<Engine> {
        self.engine
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn blocks(&self) -> MutexGuard<'_, HashMap<u64, Arc<Block>>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The block of an allocation of this device that is not lost.
    fn block(&self, of: &Allocation) -> Result<Arc<Block>, DeviceError> {
        let block = self.blocks().get(&of.id()).cloned();
        let block = block.ok_or(DeviceError::Unsupported {
            gpu: self.index,
            driver: "cuda",
            what: "use an allocation of another device",
        })?;
        block.engine.shared.alive()?;
        Ok(block)
    }

    /// What lets `from` be read by DMA, where it can be; registers its mapping at first.
    async fn pinned(
        &self,
        engine: &Engine,
        from: &HostRange,
    ) -> Result<Option<Pinned>, DeviceError> {
        let pins = &self.fleet.pins;
        if let Some(known) = pins.known(from) {
            return Ok(known);
        }
        let (pins, from) = (pins.clone(), from.clone());
        let asked = engine.control.ask(move |control| {
            let pinned = pins.register(&from, control);
            control.let_go(from);
            pinned
        });
        let pinned = engine.shared.answer(asked).await?;
        pinned.map_err(|fault| engine.shared.error(&fault))
    }

    /// A reading during which nothing was allocated or freed, with what was allocated then.
    async fn read(&self, engine: &Engine) -> Result<(Option<Reading>, u64, u64, u64), DeviceError> {
        let shared = &engine.shared;
        for left in (0..READINGS).rev() {
            let before = shared.steady();
            match self.nvml.ask().await {
                Answer::Absent => break,
                Answer::Gone(reason) => {
                    return Err(shared.lost_error(shared.lose(format!("NVML says: {reason}"))));
                }
                Answer::Read(reading) => {
                    let after = shared.steady();
                    let steady = before.is_some() && before == after;
                    if let Some(xid) = reading.xids.iter().find(|xid| FATAL_XIDS.contains(xid)) {
                        return Err(shared.lost_error(shared.lose(format!("Xid {xid}"))));
                    }
                    if steady || left == 0 || !reading.xids.is_empty() {
                        // NVML hears nothing of a context that no longer works.
                        let probe = engine.control.ask(|control| control.driver().memory());
                        let probe = shared.answer(probe).await?;
                        probe.map_err(|fault| shared.error(&fault))?;
                        let (allocated, slack) = shared.held();
                        // The less is allocated, the less may be promised.
                        let allocated =
                            before.map_or(allocated, |(before, ..)| before.min(allocated));
                        let free = reading.free;
                        return Ok((Some(*reading), free, allocated, slack));
                    }
                }
            }
        }
        // The control thread allocates nothing while it asks.
        let asked = engine.control.ask(|control| {
            let memory = control.driver().memory();
            memory.map(|(free, _)| (free, control.heap().allocated(), control.heap().slack()))
        });
        let read = shared.answer(asked).await?;
        let (free, allocated, slack) = read.map_err(|fault| shared.error(&fault))?;
        Ok((None, free, allocated, slack))
    }

    /// The device of this process with that index.
    fn peer(&self, gpu: GpuIndex) -> Option<Arc<Self>> {
        let devices = &self.fleet.devices;
        let devices = devices.lock().unwrap_or_else(PoisonError::into_inner);
        devices.get(&gpu).and_then(Weak::upgrade)
    }
}

impl Device for CudaDevice {
    fn describe(&self) -> DeviceDescription {
        DeviceDescription {
            gpu: self.index,
            name: self.gpu.name.clone(),
            uuid: self.gpu.uuid.clone(),
            driver: "cuda",
            memory: self.gpu.memory,
            granules: self.granules,
            node: self.gpu.node,
        }
    }

    fn figures(&self) -> BoxFuture<'_, Result<Figures, DeviceError>> {
        async move {
            let engine = self.engine();
            engine.shared.alive()?;
            let (reading, free, allocated, slack) = self.read(&engine).await?;
            let source = match reading {
                Some(_) => FigureSource::Nvml,
                None => FigureSource::Driver,
            };
            let reading = reading.unwrap_or_default();
            let total = if reading.total > 0 {
                Bytes(reading.total)
            } else {
                self.gpu.memory
            };
            let (free, allocated) = (Bytes(free), Bytes(allocated));
            let overhead = Bytes(slack).saturating_add(self.context.unwrap_or(Bytes::ZERO));
            Ok(Figures {
                source,
                total,
                free,
                allocated,
                overhead,
                context: self.context,
                foreign: total
                    .saturating_sub(free)
                    .saturating_sub(allocated)
                    .saturating_sub(overhead),
                processes: reading.processes,
                temperature_c: reading.temperature_c,
                throttling: reading.throttling,
                pcie: reading.pcie,
                pcie_most: reading.pcie_most,
                ecc_uncorrected: reading.ecc_uncorrected,
                mig: reading.mig,
                xids: reading.xids,
            })
        }
        .boxed()
    }

    fn allocate(
        self: Arc<Self>,
        bytes: Bytes,
    ) -> BoxFuture<'static, Result<Allocation, DeviceError>> {
        async move {
            let engine = self.engine();
            engine.shared.alive()?;
            let footprint = self.granules.footprint(bytes);
            let (gpu, block_engine) = (self.index, engine.clone());
            let asked = engine.control.ask(move |control| {
                match control.change(|heap| heap.allocate(footprint.get())) {
                    // Made here, so that it is freed even where nobody waits for it any more.
                    Ok(place) => Ok(Block {
                        engine: block_engine,
                        place,
                        bytes: footprint,
                        kept: Mutex::new(None),
                    }),
                    Err(fault) if fault.is_out_of_memory() => {
                        let free = control.driver().memory().map_or(0, |(free, _)| free);
                        Err(DeviceError::OutOfMemory {
                            gpu,
                            wanted: footprint,
                            free: Bytes(free),
                        })
                    }
                    Err(fault) => Err(block_engine.shared.error(&fault)),
                }
            });
            let block = engine.shared.answer(asked).await??;
            let id = self.next.fetch_add(1, Ordering::Relaxed);
            let (address, bytes) = (block.place.address(), block.bytes);
            self.blocks().insert(id, Arc::new(block));
            Ok(Allocation::new(self, gpu, id, address, bytes))
        }
        .boxed()
    }

    fn upload<'a>(
        &'a self,
        to: &'a Allocation,
        offset: u64,
        from: HostRange,
    ) -> BoxFuture<'a, Result<(), DeviceError>> {
        self.upload_all(to, vec![Piece { to: offset, from }])
    }

    fn upload_all<'a>(
        &'a self,
        to: &'a Allocation,
        pieces: Vec<Piece>,
    ) -> BoxFuture<'a, Result<(), DeviceError>> {
        async move {
            let block = self.block(to)?;
            let engine = block.engine.clone();
            let mut parts: Vec<Part> = Vec::with_capacity(pieces.len());
            for Piece { to: offset, from } in pieces {
                to.check(offset, from.bytes().get())?;
                if from.bytes().is_zero() {
                    continue;
                }
                let before = parts.last();
                let pinned = match before {
                    // Most pieces come from one slab.
                    Some(part) if part.from.mapping() == from.mapping() => part.pinned.clone(),
                    _ => self.pinned(&engine, &from).await?,
                };
                parts.push(Part {
                    to: block.place.address() + offset,
                    from,
                    pinned,
                });
            }
            if parts.is_empty() {
                return Ok(());
            }
            let (done, wait) = oneshot::channel();
            engine.copier.tell(move |copier| {
                copier.upload(parts, move |outcome| {
                    drop(block);
                    let _ = done.send(outcome);
                });
            });
            let outcome = engine.shared.answer(wait).await?;
            outcome.map_err(|fault| engine.shared.error(&fault))
        }
        .boxed()
    }

    fn link(&self, from: GpuIndex) -> BoxFuture<'_, Option<Link>> {
        async move {
            let other = self.peer(from)?.ordinal;
            let (engine, own) = (self.engine(), self.ordinal);
            let ask = move |control: &mut engine::Control| control.driver().link(other, own);
            let asked = engine.control.ask(ask);
            engine.shared.answer(asked).await.ok()
        }
        .boxed()
    }

    fn copy_peer<'a>(
        &'a self,
        to: &'a Allocation,
        from: &'a Allocation,
        bytes: u64,
    ) -> BoxFuture<'a, Result<(), DeviceError>> {
        async move {
            to.check(0, bytes)?;
            from.check(0, bytes)?;
            let other = self.peer(from.gpu()).ok_or(DeviceError::Unsupported {
                gpu: self.index,
                driver: "cuda",
                what: "copy from a device of another kind",
            })?;
            let (to, from) = (self.block(to)?, other.block(from)?);
            let engine = to.engine.clone();
            let (done, wait) = oneshot::channel();
            engine.copier.tell(move |copier| {
                let to_at = (to.place.address(), to.engine.context);
                let from_at = (from.place.address(), from.engine.context);
                copier.copy_peer(to_at, from_at, bytes as usize, move |outcome| {
                    drop((to, from));
                    let _ = done.send(outcome);
                });
            });
            let outcome = engine.shared.answer(wait).await?;
            outcome.map_err(|fault| engine.shared.error(&fault))
        }
        .boxed()
    }

    fn download<'a>(
        &'a self,
        from: &'a Allocation,
        offset: u64,
        bytes: u64,
    ) -> BoxFuture<'a, Result<Vec<u8>, DeviceError>> {
        async move {
            from.check(offset, bytes)?;
            let mut read = Vec::new();
            while (read.len() as u64) < bytes {
                let block = self.block(from)?;
                let engine = block.engine.clone();
                let at = block.place.address() + offset + read.len() as u64;
                let left = (bytes - read.len() as u64) as usize;
                let asked = engine.copier.ask(move |copier| {
                    let piece = copier.download(at, left);
                    drop(block);
                    piece
                });
                let piece = engine.shared.answer(asked).await?;
                read.extend(piece.map_err(|fault| engine.shared.error(&fault))?);
            }
            Ok(read)
        }
        .boxed()
    }

    fn export<'a>(
        &'a self,
        allocation: &'a Allocation,
    ) -> BoxFuture<'a, Result<Export, DeviceError>> {
        async move {
            let block = self.block(allocation)?;
            let (engine, bytes) = (block.engine.clone(), block.bytes);
            let asked = engine.control.ask(move |control| {
                let exported = control.export(block.place);
                drop(block);
                exported
            });
            let exported = engine.shared.answer(asked).await?;
            let (descriptor, mapped, offset) = exported
                .map_err(|fault| engine.shared.error(&fault))?
                .ok_or_else(|| engine.shared.ended())?;
            Ok(Export {
                descriptor,
                mapped: Bytes(mapped),
                offset,
                bytes,
                uuid: self.gpu.uuid.clone(),
            })
        }
        .boxed()
    }

    fn settle(&self) -> BoxFuture<'_, ()> {
        async move {
            let engine = self.engine();
            // Frees are queued in the order of the drops.
            let asked = engine.control.ask(|_| ());
            let _ = engine.shared.answer(asked).await;
        }
        .boxed()
    }

    fn lost(&self) -> Option<Arc<str>> {
        self.engine().shared.lost()
    }

    fn recover(&self) -> BoxFuture<'_, Result<(), DeviceError>> {
        async move {
            let mut starting = self.recovering.lock().await;
            let old = self.engine();
            let Some(reason) = old.shared.lost() else {
                return Ok(());
            };
            let hangs = || {
                let reason = format!("{reason}; the driver does not return from a call");
                old.shared.lost_error(reason.into())
            };
            if starting
                .as_ref()
                .is_some_and(|attempt| attempt.hangs().is_some())
            {
                return Err(hangs());
            }
            old.copier.stop();
            let mut ended = old.ended.clone();
            let waited = tokio::time::timeout(THREADS_END, ended.wait_for(|ended| *ended))
                .await
                .is_ok();
            if !waited {
                return Err(hangs());
            }
            let (driver, pins) = (old.shared.driver.clone(), self.fleet.pins.clone());
            let (ordinal, patience) = (self.ordinal, self.patience);
            let engine = Engine::start(
                self.index,
                driver,
                ordinal,
                pins,
                true,
                patience,
                &mut starting,
            )
            .await
            .map_err(|error| match error {
                // It was the process's own fault, and not the hardware's.
                DeviceError::Spent { gpu, .. } if old.shared.is_sticky() => {
                    DeviceError::Spent { gpu, reason }
                }
                DeviceError::Spent { gpu, reason } => DeviceError::Lost { gpu, reason },
                other => other,
            })?;
            *self.engine.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(engine);
            tracing::warn!(gpu = %self.index, "a GPU that was lost is back, empty");
            Ok(())
        }
        .boxed()
    }

    fn release(&self, id: u64, kept: Kept) {
        let block = self.blocks().remove(&id);
        match block {
            // Copies under way hold it too; it is freed after the last of them.
            Some(block) => *block.kept.lock().unwrap_or_else(PoisonError::into_inner) = kept,
            None => drop(kept),
        }
    }
}
