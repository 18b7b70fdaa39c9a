//! The other end of an export: device memory of another process, mapped read-only.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use super::driver::{Driver, Opaque, Outcome};
use super::{Cuda, CudaError, CudaGpu};
use crate::device::Export;

/// Device memory that another process leased to this one. Calls block, and leave this process's primary context current
/// on the calling thread.
#[derive(Debug)]
pub struct Imported {
    driver: Arc<Driver>,
    device: i32,
    context: Opaque,
    handle: u64,
    address: u64,
    mapped: u64,
    offset: u64,
    bytes: u64,
}

impl Imported {
    /// Maps what was exported, on the GPU that it lies on.
    ///
    /// # Errors
    /// [`CudaError::Refused`] where the driver does not take it.
    pub fn open(cuda: &Cuda, gpu: &CudaGpu, export: Export) -> Result<Self, CudaError> {
        let driver = cuda.driver.clone();
        let device = driver.device(i32::try_from(gpu.ordinal).unwrap_or(i32::MAX))?;
        let context = driver.retain_context(device)?;
        let Export {
            descriptor,
            mapped,
            offset,
            bytes,
            ..
        } = export;
        match Self::map(&driver, device, context, &descriptor, mapped.get()) {
            Ok((handle, address)) => Ok(Self {
                driver,
                device,
                context,
                handle,
                address,
                mapped: mapped.get(),
                offset,
                bytes: bytes.get(),
            }),
            Err(fault) => {
                let _ = driver.release_context(device);
                Err(fault.into())
            }
        }
    }

    fn map(
        driver: &Driver,
        device: i32,
        context: Opaque,
        descriptor: &OwnedFd,
        mapped: u64,
    ) -> Outcome<(u64, u64)> {
        driver.enter(context)?;
        let handle = driver.import(descriptor.as_raw_fd())?;
        let address = driver.reserve(mapped, 0).and_then(|address| {
            let made = driver.map(address, mapped, handle).and_then(|()| {
                driver
                    .grant(device, address, mapped, false)
                    .inspect_err(|_| drop(driver.unmap(address, mapped)))
            });
            made.map(|()| address)
                .inspect_err(|_| drop(driver.unreserve(address, mapped)))
        });
        address
            .map(|address| (handle, address))
            .inspect_err(|_| drop(driver.release(handle)))
    }

    /// The device pointer of the first byte, in this process.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.address + self.offset
    }

    /// How many bytes there are.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// All bytes, read back.
    ///
    /// # Errors
    /// [`CudaError::Refused`].
    pub fn read(&self) -> Result<Vec<u8>, CudaError> {
        let mut read = vec![0; self.bytes as usize];
        self.copy(self.bytes as usize, |driver, pinned, stream| {
            driver.download(pinned, self.address(), read.len(), stream)
        })
        .map(|pinned| read.copy_from_slice(&pinned))?;
        Ok(read)
    }

    /// Tries to write zeros over all of it, which a correct driver refuses. For checking one.
    ///
    /// # Errors
    /// [`CudaError::Refused`], as it should be.
    pub fn overwrite(&self) -> Result<(), CudaError> {
        self.copy(self.bytes as usize, |driver, pinned, stream| {
            driver.upload(self.address(), pinned, self.bytes as usize, stream)
        })?;
        Ok(())
    }

    /// Makes one copy to or from pinned memory, waits for it, and gives that memory's contents.
    fn copy(
        &self,
        bytes: usize,
        copy: impl FnOnce(&Driver, usize, Opaque) -> Outcome<()>,
    ) -> Outcome<Vec<u8>> {
        let driver = &self.driver;
        driver.enter(self.context)?;
        let pinned = driver.host_alloc(bytes.max(1))?;
        let copied = driver.stream().and_then(|stream| {
            let copied = driver.event().and_then(|event| {
                let copied = copy(driver, pinned, stream)
                    .and_then(|()| driver.record(event, stream))
                    .and_then(|()| driver.wait(event));
                copied.and(driver.end_event(event))
            });
            copied.and(driver.end_stream(stream))
        });
        // SAFETY: `pinned` has `bytes` bytes, and the copy has ended.
        let read = unsafe { std::slice::from_raw_parts(pinned as *const u8, bytes) }.to_vec();
        driver.host_free(pinned)?;
        copied.map(|()| read)
    }
}

impl Drop for Imported {
    fn drop(&mut self) {
        let driver = &self.driver;
        let ended = driver
            .enter(self.context)
            .and_then(|()| driver.unmap(self.address, self.mapped))
            .and_then(|()| driver.release(self.handle))
            .and_then(|()| driver.unreserve(self.address, self.mapped))
            .and_then(|()| driver.release_context(self.device));
        if let Err(fault) = ended {
            tracing::warn!(?fault, "cannot unmap imported device memory");
        }
    }
}
