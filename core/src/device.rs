//! The contract with a GPU's memory, whoever implements it.
//!
//! * [`Device::allocate`] gives memory that is read and written by nobody else. It is freed when the [`Allocation`] is
//!   dropped, at some time soon after; what the allocation [keeps](Allocation::keep_until_freed) is dropped once the driver
//!   has confirmed it, so that bytes are promised again only then.
//! * [`Device::upload_all`] copies bytes that stay alive and unchanged (a [`HostRange`] guarantees both) to ranges that
//!   must lie inside the allocation. When its future ends with `Ok`, the bytes are there. Dropping the future leaves
//!   the ranges undefined, never memory outside of them, but for what lies between pieces closer together than the
//!   alignment of tensors. Several may be under way for one allocation.
//! * An error leaves the allocation as it is and its contents undefined.
//! * After [`DeviceError::Lost`] every call gives it, until [`Device::recover`] succeeds. What was allocated before is gone
//!   for good; its allocations may still be dropped.
//! * No call blocks the async worker that polls it.
//!
//! The device's own errors are values that all waiters share, so they are `Clone`.

pub mod budget;
#[cfg(test)]
mod contract;
pub mod cuda;
pub mod layout;
mod nvml;
pub mod sim;

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use futures::FutureExt;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

use crate::ids::GpuIndex;
use crate::machine::NumaNode;
use crate::memory::HostRange;
use crate::units::Bytes;

/// Why a device refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// Not enough memory, whatever the books say.
    #[error(
        "GPU {gpu} cannot allocate {wanted}: the device has {free} free; another process may have taken it, see `hotset status`"
    )]
    OutOfMemory {
        /// Which GPU.
        gpu: GpuIndex,
        /// What was wanted.
        wanted: Bytes,
        /// What the device says is free.
        free: Bytes,
    },
    /// A range that is not inside the allocation.
    #[error("bytes {offset}..{end} are outside of an allocation of {bytes} on GPU {gpu}")]
    OutOfRange {
        /// Which GPU.
        gpu: GpuIndex,
        /// First byte.
        offset: u64,
        /// End of the range.
        end: u64,
        /// Size of the allocation.
        bytes: Bytes,
    },
    /// The device no longer answers.
    #[error("GPU {gpu} is lost: {reason}")]
    Lost {
        /// Which GPU.
        gpu: GpuIndex,
        /// What it said last.
        reason: Arc<str>,
    },
    /// The driver gives this process nothing on this device any more: an error has broken all its contexts there, and no new
    /// one can be made. Other processes can use it.
    #[error(
        "GPU {gpu} is lost to this process until it ends: {reason}; restart it, a new process can use the GPU"
    )]
    Spent {
        /// Which GPU.
        gpu: GpuIndex,
        /// What broke it.
        reason: Arc<str>,
    },
    /// The driver refused a call, without being broken by it.
    #[error("GPU {gpu}: {call} failed with {code}; see docs/gpu.md")]
    Driver {
        /// Which GPU.
        gpu: GpuIndex,
        /// The driver's function.
        call: &'static str,
        /// The driver's name for what is wrong.
        code: Arc<str>,
    },
    /// The device cannot do this.
    #[error("GPU {gpu} ({driver}) cannot {what}")]
    Unsupported {
        /// Which GPU.
        gpu: GpuIndex,
        /// The driver behind it.
        driver: &'static str,
        /// What was asked for.
        what: &'static str,
    },
    /// The simulated device was told not to keep bytes.
    #[error("GPU {gpu} is simulated without contents; set gpu.sim.keep_bytes = true to read back")]
    NoContents {
        /// Which GPU.
        gpu: GpuIndex,
    },
}

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceDescription {
    /// As hotset counts it.
    pub gpu: GpuIndex,
    /// The maker's name for it.
    pub name: String,
    /// The maker's number of this very device. Empty where it has none.
    pub uuid: String,
    /// `sim`, or the driver behind it.
    pub driver: &'static str,
    /// All its memory.
    pub memory: Bytes,
    /// How allocations are rounded up.
    pub granules: Granules,
    /// The node of host memory that it is at, where the machine has several.
    pub node: Option<NumaNode>,
}

/// How a device rounds allocations up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Granules {
    /// The granule of physical memory; never zero.
    pub page: Bytes,
    /// Allocations smaller than this share pages.
    pub shared_below: Bytes,
    /// What those are rounded up to; never zero.
    pub part: Bytes,
}

impl Granules {
    /// Every allocation takes whole pages.
    #[must_use]
    pub const fn whole(page: Bytes) -> Self {
        Self {
            page,
            shared_below: Bytes::ZERO,
            part: page,
        }
    }

    /// What an allocation of this many bytes takes.
    #[must_use]
    pub fn footprint(&self, bytes: Bytes) -> Bytes {
        let bytes = Bytes(bytes.get().max(1));
        if bytes < self.shared_below {
            bytes.round_up(self.part.get().max(1))
        } else {
            bytes.round_up(self.page.get().max(1))
        }
    }
}

/// Who says what is free on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FigureSource {
    /// The simulation itself.
    Sim,
    /// NVML, which sees all processes.
    Nvml,
    /// The CUDA driver alone, since NVML is missing or does not know the device.
    Driver,
}

/// What a process uses on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessUse {
    /// Its id, in the machine's own counting.
    pub pid: u32,
    /// How much, where that is told.
    pub bytes: Option<Bytes>,
}

/// The state of a device, measured at one instant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// Who says so.
    pub source: FigureSource,
    /// All memory.
    pub total: Bytes,
    /// What nobody uses.
    pub free: Bytes,
    /// What hotset's allocations take there, by their footprints.
    pub allocated: Bytes,
    /// What hotset takes beside them: its context, and pages of which only a part is in use.
    pub overhead: Bytes,
    /// The part of the overhead that is the context. `None` where nobody can tell it.
    pub context: Option<Bytes>,
    /// What others use. Where NVML does not tell the driver's own reserve, that is among it.
    pub foreign: Bytes,
    /// The processes that compute on it, where that is told.
    pub processes: Vec<ProcessUse>,
    /// Degrees Celsius.
    pub temperature_c: Option<u32>,
    /// Why it runs slower than it could, in the maker's words; empty where it does not.
    pub throttling: Vec<String>,
    /// PCIe generation and lanes in use now; a GPU that idles saves power with fewer.
    pub pcie: Option<(u32, u32)>,
    /// The most of both that the GPU and its slot allow.
    #[serde(default)]
    pub pcie_most: Option<(u32, u32)>,
    /// Uncorrected memory errors since the driver was loaded.
    pub ecc_uncorrected: Option<u64>,
    /// Whether it is divided into instances.
    pub mig: Option<bool>,
    /// Xid errors since the last measurement; in status the last ones since the start.
    pub xids: Vec<u64>,
}

impl Figures {
    /// What the PCIe link carries each second when all its lanes work, before the protocol's own share. `None` where the
    /// link is not told.
    #[must_use]
    pub fn link_rate(&self) -> Option<Bytes> {
        let (generation, lanes) = self.pcie_most.or(self.pcie)?;
        // Gigatransfers each second and lane, with 8 of 10 or 128 of 130 bits of payload.
        let gigabits = match generation {
            1 => 2.5 * 0.8,
            2 => 5.0 * 0.8,
            3..=5 => f64::from(1_u32 << generation) * 128.0 / 130.0,
            6.. => 64.0,
            0 => return None,
        };
        Some(Bytes((gigabits * f64::from(lanes) / 8.0 * 1e9) as u64))
    }
}

/// Memory of a device as another process can map it.
#[derive(Debug)]
pub struct Export {
    /// Stands for the physical memory; whoever holds it can map it.
    pub descriptor: OwnedFd,
    /// Size of that memory, which has to be mapped whole.
    pub mapped: Bytes,
    /// Where in it the allocation begins. Small allocations share their memory with others.
    pub offset: u64,
    /// Size of the allocation.
    pub bytes: Bytes,
    /// On which device, by the maker's number.
    pub uuid: String,
}

/// One piece of an upload.
#[derive(Debug, Clone)]
pub struct Piece {
    /// First byte in the allocation.
    pub to: u64,
    /// The bytes.
    pub from: HostRange,
}

/// How the memory of another device is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Link {
    /// Whether the devices reach each other by themselves. Where they do not, the driver copies through host memory.
    pub direct: bool,
    /// The driver's rank of it among the links of this machine: the less, the faster.
    pub distance: u32,
}

/// The links of all devices: from which to which.
pub type Links = BTreeMap<(GpuIndex, GpuIndex), Link>;

/// The links between these devices, as each says itself.
pub async fn links(devices: &BTreeMap<GpuIndex, Arc<dyn Device>>) -> Links {
    let mut links = Links::new();
    for (to, device) in devices {
        for from in devices.keys().filter(|from| *from != to) {
            if let Some(link) = device.link(*from).await {
                links.insert((*from, *to), link);
            }
        }
    }
    links
}

/// A GPU's memory. See the module's page for the contract.
pub trait Device: Send + Sync + fmt::Debug + 'static {
    /// What it is.
    fn describe(&self) -> DeviceDescription;

    /// Its state now.
    ///
    /// # Errors
    /// [`DeviceError::Lost`], [`DeviceError::Driver`].
    fn figures(&self) -> BoxFuture<'_, Result<Figures, DeviceError>>;

    /// New memory, at least this many bytes.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], [`DeviceError::Lost`].
    fn allocate(
        self: Arc<Self>,
        bytes: Bytes,
    ) -> BoxFuture<'static, Result<Allocation, DeviceError>>;

    /// Copies host bytes to `offset` in `to`.
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`], [`DeviceError::Lost`].
    fn upload<'a>(
        &'a self,
        to: &'a Allocation,
        offset: u64,
        from: HostRange,
    ) -> BoxFuture<'a, Result<(), DeviceError>>;

    /// Copies pieces of host memory to `to`, in rising order of [`Piece::to`]; ends when all are there.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    fn upload_all<'a>(
        &'a self,
        to: &'a Allocation,
        pieces: Vec<Piece>,
    ) -> BoxFuture<'a, Result<(), DeviceError>> {
        let uploads = pieces
            .into_iter()
            .map(|piece| self.upload(to, piece.to, piece.from));
        futures::future::try_join_all(uploads)
            .map(|outcome| outcome.map(drop))
            .boxed()
    }

    /// How it reaches the memory of this other device of the same process. `None`: not at all.
    fn link(&self, _from: GpuIndex) -> BoxFuture<'_, Option<Link>> {
        std::future::ready(None).boxed()
    }

    /// Copies the first bytes of another device's allocation to the beginning of one of this.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`] where there is no [link](Self::link); [`DeviceError::Lost`] for either.
    fn copy_peer<'a>(
        &'a self,
        to: &'a Allocation,
        _from: &'a Allocation,
        _bytes: u64,
    ) -> BoxFuture<'a, Result<(), DeviceError>> {
        let refused = DeviceError::Unsupported {
            gpu: to.gpu(),
            driver: self.describe().driver,
            what: "copy from another device",
        };
        async move { Err(refused) }.boxed()
    }

    /// Reads `bytes` from `offset` in `from` back to the host.
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`], [`DeviceError::NoContents`], [`DeviceError::Lost`].
    fn download<'a>(
        &'a self,
        from: &'a Allocation,
        offset: u64,
        bytes: u64,
    ) -> BoxFuture<'a, Result<Vec<u8>, DeviceError>>;

    /// A descriptor with which another process can map an allocation.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`], [`DeviceError::Lost`].
    fn export<'a>(
        &'a self,
        allocation: &'a Allocation,
    ) -> BoxFuture<'a, Result<Export, DeviceError>> {
        let refused = DeviceError::Unsupported {
            gpu: allocation.gpu(),
            driver: self.describe().driver,
            what: "share its memory with other processes",
        };
        async move { Err(refused) }.boxed()
    }

    /// Ends when everything that was dropped before is free.
    fn settle(&self) -> BoxFuture<'_, ()> {
        std::future::ready(()).boxed()
    }

    /// Why the device is lost, if it is known to be; asks nobody.
    fn lost(&self) -> Option<Arc<str>>;

    /// Brings a lost device back, empty. Nothing where it is not lost.
    ///
    /// # Errors
    /// [`DeviceError::Lost`] where it stays lost, [`DeviceError::Spent`] where it does so for this process alone.
    fn recover(&self) -> BoxFuture<'_, Result<(), DeviceError>>;

    /// Frees memory, and then drops `kept`; called once for each allocation, when it is dropped. Never blocks.
    fn release(&self, id: u64, kept: Kept);
}

/// What is dropped once memory is free.
pub type Kept = Option<Box<dyn Any + Send>>;

/// Device memory, freed when this is dropped.
pub struct Allocation {
    device: Arc<dyn Device>,
    gpu: GpuIndex,
    id: u64,
    address: u64,
    bytes: Bytes,
    kept: Mutex<Kept>,
}

impl Allocation {
    /// Takes charge of memory that `device` has just allocated at `address`, and that it knows by `id`.
    #[must_use]
    pub fn new(
        device: Arc<dyn Device>,
        gpu: GpuIndex,
        id: u64,
        address: u64,
        bytes: Bytes,
    ) -> Self {
        Self {
            device,
            gpu,
            id,
            address,
            bytes,
            kept: Mutex::new(None),
        }
    }

    /// Keeps a value until the device has confirmed that the memory is free. One value at most; a second replaces it.
    pub fn keep_until_freed(&self, value: Box<dyn Any + Send>) {
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
    }

    /// The number by which the device knows it.
    #[must_use]
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// The device pointer of the first byte.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// The size, rounded up as the device does.
    #[must_use]
    pub const fn bytes(&self) -> Bytes {
        self.bytes
    }

    /// On which GPU.
    #[must_use]
    pub const fn gpu(&self) -> GpuIndex {
        self.gpu
    }

    /// The device.
    #[must_use]
    pub const fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Whether `offset..offset + bytes` lies inside.
    ///
    /// # Errors
    /// [`DeviceError::OutOfRange`] where it does not.
    pub fn check(&self, offset: u64, bytes: u64) -> Result<(), DeviceError> {
        let end = offset.saturating_add(bytes);
        if end <= self.bytes.get() {
            Ok(())
        } else {
            Err(DeviceError::OutOfRange {
                gpu: self.gpu,
                offset,
                end,
                bytes: self.bytes,
            })
        }
    }
}

impl fmt::Debug for Allocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Allocation(gpu {} {:#x} {})",
            self.gpu, self.address, self.bytes
        )
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let kept = self
            .kept
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        self.device.release(self.id, kept);
    }
}
