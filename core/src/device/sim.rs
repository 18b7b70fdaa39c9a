//! A GPU without a GPU: capacity, allocation granularity, bandwidth and latency in tokio time, so that a paused clock
//! makes it deterministic. Keeps real bytes on request.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::time::Instant;

use super::{
    Allocation, Device, DeviceDescription, DeviceError, FigureSource, Figures, Granules, Kept,
};
use crate::config::SimDeviceConfig;
use crate::ids::GpuIndex;
use crate::memory::HostRange;
use crate::units::Bytes;

/// The simulated device.
#[derive(Debug)]
pub struct SimDevice {
    gpu: GpuIndex,
    config: SimDeviceConfig,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    used: Bytes,
    foreign: Bytes,
    lost: Option<Arc<str>>,
    next_address: u64,
    allocations: HashMap<u64, Block>,
    /// The link carries one upload after the other; this is when it is free again.
    link_free: Option<Instant>,
    uploaded: Bytes,
    /// The next allocations that fail although there is memory.
    refused_allocations: u32,
    /// The next uploads that the driver refuses.
    refused_uploads: u32,
    /// The context is broken: every call fails until another one is made.
    sticky: Option<Arc<str>>,
    met: Met,
}

/// How often a call met with what it was told to fail by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Met {
    /// An allocation that was refused although there was memory.
    pub refused_allocations: u64,
    /// An upload that was refused.
    pub refused_uploads: u64,
    /// A call in a broken context.
    pub sticky: u64,
    /// A call to a device that is lost.
    pub lost: u64,
}

#[derive(Debug)]
struct Block {
    bytes: Bytes,
    contents: Option<Vec<u8>>,
}

/// The first device address, in a range where no host pointer lies, so that mistaking one for the other shows.
const FIRST_ADDRESS: u64 = 0x0070_0000_0000_0000;

impl SimDevice {
    /// A device of this configuration.
    #[must_use]
    pub fn new(gpu: GpuIndex, config: SimDeviceConfig) -> Arc<Self> {
        Arc::new(Self {
            gpu,
            config,
            state: Mutex::new(State {
                used: Bytes::ZERO,
                foreign: Bytes::ZERO,
                lost: None,
                next_address: FIRST_ADDRESS,
                allocations: HashMap::new(),
                link_free: None,
                uploaded: Bytes::ZERO,
                refused_allocations: 0,
                refused_uploads: 0,
                sticky: None,
                met: Met::default(),
            }),
        })
    }

    /// Another process takes this much of the memory, from now on.
    pub fn set_foreign_use(&self, bytes: Bytes) {
        self.lock().foreign = bytes;
    }

    /// The device stops answering, or answers again.
    pub fn set_lost(&self, reason: Option<Arc<str>>) {
        self.lock().lost = reason;
    }

    /// An error that sticks to the context, as CUDA's do: every call gives it until the context is made anew by
    /// [`Device::recover`], and then what was allocated before is gone.
    pub fn break_context(&self, reason: Option<Arc<str>>) {
        self.lock().sticky = reason;
    }

    /// How often calls met with what was made to go wrong.
    #[must_use]
    pub fn met(&self) -> Met {
        self.lock().met
    }

    /// The next `count` allocations fail, whatever is free.
    pub fn refuse_allocations(&self, count: u32) {
        self.lock().refused_allocations = count;
    }

    /// The driver refuses the next `count` uploads.
    pub fn refuse_uploads(&self, count: u32) {
        self.lock().refused_uploads = count;
    }

    /// Bytes that are allocated now, over all allocations.
    #[must_use]
    pub fn allocated(&self) -> Bytes {
        self.lock().used
    }

    /// Bytes uploaded since the start.
    #[must_use]
    pub fn uploaded(&self) -> Bytes {
        self.lock().uploaded
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn free_in(&self, state: &State) -> Bytes {
        self.config
            .memory
            .saturating_sub(state.used)
            .saturating_sub(state.foreign)
    }

    fn alive(&self, state: &mut State) -> Result<(), DeviceError> {
        let reason = match (&state.lost, &state.sticky) {
            (Some(reason), _) => {
                state.met.lost += 1;
                reason.clone()
            }
            (None, Some(reason)) => {
                state.met.sticky += 1;
                reason.clone()
            }
            (None, None) => return Ok(()),
        };
        Err(DeviceError::Lost {
            gpu: self.gpu,
            reason,
        })
    }

    /// When an upload of this many bytes, queued now, is done.
    fn book_link(&self, bytes: Bytes) -> Result<Instant, DeviceError> {
        let mut state = self.lock();
        self.alive(&mut state)?;
        let rate = self.config.bandwidth.get().max(1) as f64;
        let duration = self.config.latency + Duration::from_secs_f64(bytes.as_f64() / rate);
        let now = Instant::now();
        let done = state.link_free.map_or(now, |free| free.max(now)) + duration;
        state.link_free = Some(done);
        Ok(done)
    }
}

impl Device for SimDevice {
    fn describe(&self) -> DeviceDescription {
        DeviceDescription {
            gpu: self.gpu,
            name: format!("simulated GPU of {}", self.config.memory),
            uuid: String::new(),
            driver: "sim",
            memory: self.config.memory,
            granules: Granules::whole(Bytes(self.config.granularity.get().max(1))),
            node: None,
        }
    }

    fn figures(&self) -> BoxFuture<'_, Result<Figures, DeviceError>> {
        async move {
            let mut state = self.lock();
            self.alive(&mut state)?;
            Ok(Figures {
                source: FigureSource::Sim,
                total: self.config.memory,
                free: self.free_in(&state),
                allocated: state.used,
                overhead: Bytes::ZERO,
                context: None,
                foreign: state.foreign,
                processes: Vec::new(),
                temperature_c: None,
                throttling: Vec::new(),
                pcie: None,
                pcie_most: None,
                ecc_uncorrected: None,
                mig: None,
                xids: Vec::new(),
            })
        }
        .boxed()
    }

    fn allocate(
        self: Arc<Self>,
        bytes: Bytes,
    ) -> BoxFuture<'static, Result<Allocation, DeviceError>> {
        async move {
            let bytes = self.describe().granules.footprint(bytes);
            let address = {
                let mut state = self.lock();
                self.alive(&mut state)?;
                let free = self.free_in(&state);
                let refused = state.refused_allocations > 0;
                state.refused_allocations = state.refused_allocations.saturating_sub(1);
                state.met.refused_allocations += u64::from(refused && bytes <= free);
                if refused || bytes > free {
                    return Err(DeviceError::OutOfMemory {
                        gpu: self.gpu,
                        wanted: bytes,
                        free,
                    });
                }
                let address = state.next_address;
                state.next_address += bytes.get();
                state.used += bytes;
                let contents = self
                    .config
                    .keep_bytes
                    .then(|| vec![0; usize::try_from(bytes.get()).unwrap_or(0)]);
                state.allocations.insert(address, Block { bytes, contents });
                address
            };
            let gpu = self.gpu;
            Ok(Allocation::new(self, gpu, address, address, bytes))
        }
        .boxed()
    }

    fn upload<'a>(
        &'a self,
        to: &'a Allocation,
        offset: u64,
        from: HostRange,
    ) -> BoxFuture<'a, Result<(), DeviceError>> {
        async move {
            to.check(offset, from.bytes().get())?;
            tokio::time::sleep_until(self.book_link(from.bytes())?).await;
            let mut state = self.lock();
            self.alive(&mut state)?;
            if state.refused_uploads > 0 {
                state.refused_uploads -= 1;
                state.met.refused_uploads += 1;
                return Err(DeviceError::Driver {
                    gpu: self.gpu,
                    call: "upload",
                    code: "refused by the simulation".into(),
                });
            }
            state.uploaded += from.bytes();
            if let Some(contents) = state
                .allocations
                .get_mut(&to.address())
                .and_then(|block| block.contents.as_mut())
            {
                let start = offset as usize;
                contents[start..start + from.as_slice().len()].copy_from_slice(from.as_slice());
            }
            Ok(())
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
            tokio::time::sleep_until(self.book_link(Bytes(bytes))?).await;
            let mut state = self.lock();
            self.alive(&mut state)?;
            let contents = state
                .allocations
                .get(&from.address())
                .and_then(|block| block.contents.as_ref())
                .ok_or(DeviceError::NoContents { gpu: self.gpu })?;
            Ok(contents[offset as usize..(offset + bytes) as usize].to_vec())
        }
        .boxed()
    }

    fn lost(&self) -> Option<Arc<str>> {
        let state = self.lock();
        state.lost.clone().or_else(|| state.sticky.clone())
    }

    fn recover(&self) -> BoxFuture<'_, Result<(), DeviceError>> {
        async move {
            let (mut state, mut gone) = (self.lock(), HashMap::new());
            if state.lost.is_none() && state.sticky.take().is_some() {
                // With its context went all that was allocated in it.
                gone = std::mem::take(&mut state.allocations);
                state.used = Bytes::ZERO;
            }
            let alive = self.alive(&mut state);
            drop(state);
            drop(gone);
            alive
        }
        .boxed()
    }

    fn release(&self, id: u64, kept: Kept) {
        let gone = {
            let mut state = self.lock();
            let gone = state.allocations.remove(&id);
            if let Some(block) = &gone {
                state.used -= block.bytes;
            }
            gone
        };
        drop((gone, kept));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::contract;

    fn device(memory: Bytes) -> Arc<SimDevice> {
        SimDevice::new(
            GpuIndex(0),
            SimDeviceConfig {
                memory,
                granularity: Bytes::mib(2),
                bandwidth: Bytes::gib(1),
                latency: Duration::from_millis(1),
                keep_bytes: true,
            },
        )
    }

    #[tokio::test(start_paused = true)]
    async fn it_keeps_the_contract() {
        contract::check(device(Bytes::mib(64))).await;
    }

    #[tokio::test(start_paused = true)]
    async fn uploads_take_the_time_of_the_link_one_after_the_other() {
        let device = device(Bytes::mib(64));
        let to = device.clone().allocate(Bytes::mib(8)).await.unwrap();
        let source = contract::host_bytes(&vec![7; 4 << 20]);
        let started = Instant::now();
        let (a, b) = tokio::join!(
            device.upload(&to, 0, source.clone()),
            device.upload(&to, 4 << 20, source)
        );
        a.unwrap();
        b.unwrap();
        // Virtual time: two latencies and 8 MiB at 1 GiB/s.
        let expected = Duration::from_millis(2) + Duration::from_secs_f64(8.0 / 1024.0);
        let took = started.elapsed();
        assert!(
            took >= expected && took < expected + Duration::from_millis(3),
            "{took:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn foreign_use_and_loss_show() {
        let device = device(Bytes::mib(64));
        device.set_foreign_use(Bytes::mib(60));
        assert!(matches!(
            device.clone().allocate(Bytes::mib(8)).await,
            Err(DeviceError::OutOfMemory { free, .. }) if free == Bytes::mib(4)
        ));
        device.set_foreign_use(Bytes::ZERO);
        device.refuse_allocations(1);
        let refused = device.clone().allocate(Bytes::mib(2)).await;
        assert!(matches!(refused, Err(DeviceError::OutOfMemory { .. })));
        let to = device.clone().allocate(Bytes::mib(2)).await.unwrap();
        device.refuse_uploads(1);
        let source = contract::host_bytes(&[7; 4096]);
        let refused = device.upload(&to, 0, source.clone()).await;
        assert!(matches!(refused, Err(DeviceError::Driver { .. })));
        device.upload(&to, 0, source).await.unwrap();
        device.break_context(Some("error 700".into()));
        let broken = device.clone().allocate(Bytes::mib(1)).await;
        assert!(matches!(broken, Err(DeviceError::Lost { .. })));
        device.recover().await.unwrap();
        assert_eq!((device.allocated(), device.lost()), (Bytes::ZERO, None));
        drop(to);
        assert_eq!(device.allocated(), Bytes::ZERO);
        device.set_lost(Some("Xid 79".into()));
        assert!(device.recover().await.is_err());
        assert!(matches!(
            device.clone().allocate(Bytes::mib(1)).await,
            Err(DeviceError::Lost { .. })
        ));
    }
}
