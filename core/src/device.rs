//! The contract with a GPU's memory, whoever implements it.
//!
//! * [`Device::allocate`] gives memory that is read and written by nobody else. It is freed when the [`Allocation`] is
//!   dropped, at some time soon after: the only proof of free memory is an allocation that succeeds.
//! * [`Device::upload`] copies bytes that stay alive and unchanged (a [`HostRange`] guarantees both) to a range that
//!   must lie inside the allocation. When its future ends with `Ok`, the bytes are there. Dropping the future leaves
//!   the range undefined, never memory outside of it.
//! * An error leaves the allocation as it is and its contents undefined.
//! * No call blocks the async worker that polls it.
//!
//! The device's own errors are values that all waiters share, so they are `Clone`.

#[cfg(test)]
mod contract;
pub mod layout;
pub mod sim;

use std::fmt;
use std::sync::Arc;

use futures::future::BoxFuture;
use serde::Serialize;

use crate::ids::GpuIndex;
use crate::memory::HostRange;
use crate::units::Bytes;

/// Why a device refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// Not enough memory, whatever the books say.
    #[error(
        "GPU {gpu} cannot allocate {wanted}: the device has {free} free; another process may have taken it"
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
    /// `sim`, or the driver behind it.
    pub driver: &'static str,
    /// All its memory.
    pub memory: Bytes,
    /// Allocations are rounded up to this; never zero.
    pub granularity: Bytes,
}

/// A GPU's memory. See the module's page for the contract.
pub trait Device: Send + Sync + fmt::Debug + 'static {
    /// What it is.
    fn describe(&self) -> DeviceDescription;

    /// Memory that the device itself says is free now.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    fn free(&self) -> Result<Bytes, DeviceError>;

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

    /// Frees memory; called once for each allocation, when it is dropped. Never blocks.
    fn release(&self, address: u64);
}

/// Device memory, freed when this is dropped.
pub struct Allocation {
    device: Arc<dyn Device>,
    gpu: GpuIndex,
    address: u64,
    bytes: Bytes,
}

impl Allocation {
    /// Takes charge of memory that `device` has just allocated at `address`.
    #[must_use]
    pub fn new(device: Arc<dyn Device>, address: u64, bytes: Bytes) -> Self {
        let gpu = device.describe().gpu;
        Self {
            device,
            gpu,
            address,
            bytes,
        }
    }

    /// The device pointer of the first byte.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// The size, a multiple of the device's granularity.
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
        self.device.release(self.address);
    }
}
