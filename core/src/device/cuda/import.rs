//! The other end of an export: device memory of another process, mapped read-only.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

use super::driver::{Driver, Opaque, Outcome};
use super::{Cuda, CudaError, CudaGpu};
use crate::device::Export;

/// Primary contexts of this process that stay once memory was mapped in them: one that went with the last mapping would have to
/// be made anew for the next, which takes a tenth of a second on an H200.
#[derive(Debug)]
pub(super) struct Contexts {
    driver: Arc<Driver>,
    /// The devices, by the driver's handles.
    held: Mutex<BTreeSet<i32>>,
}

impl Contexts {
    pub(super) fn new(driver: Arc<Driver>) -> Self {
        Self {
            driver,
            held: Mutex::default(),
        }
    }

    fn hold(&self, device: i32) -> Outcome<()> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if !held.contains(&device) {
            self.driver.retain_context(device)?;
            held.insert(device);
        }
        Ok(())
    }
}

impl Drop for Contexts {
    fn drop(&mut self) {
        let held = self.held.get_mut().unwrap_or_else(PoisonError::into_inner);
        for device in std::mem::take(held) {
            if let Err(fault) = self.driver.release_context(device) {
                tracing::warn!(?fault, "cannot release a context");
            }
        }
    }
}

/// Physical memory mapped in this process, with the primary context that it needs. Calls block, and leave that context
/// current on the calling thread.
#[derive(Debug)]
pub(super) struct Mapped {
    pub(super) driver: Arc<Driver>,
    device: i32,
    context: Opaque,
    handle: u64,
    pub(super) address: u64,
    pub(super) bytes: u64,
}

impl Mapped {
    /// Maps the physical memory that `make` gives: a handle, and how many bytes it stands for.
    pub(super) fn new(
        cuda: &Cuda,
        gpu: &CudaGpu,
        write: bool,
        make: impl FnOnce(&Driver, i32) -> Outcome<(u64, u64)>,
    ) -> Outcome<Self> {
        let driver = cuda.driver.clone();
        let device = driver.device(i32::try_from(gpu.ordinal).unwrap_or(i32::MAX))?;
        cuda.contexts.hold(device)?;
        let context = driver.retain_context(device)?;
        let placed = driver
            .enter(context)
            .and_then(|()| make(&driver, device))
            .and_then(|(handle, bytes)| {
                let left = |fault| tracing::warn!(?fault, "cannot unmap device memory");
                let address = driver.place(device, handle, bytes, write, left);
                address
                    .map(|address| (handle, address, bytes))
                    .inspect_err(|_| drop(driver.release(handle)))
            });
        match placed {
            Ok((handle, address, bytes)) => Ok(Self {
                driver,
                device,
                context,
                handle,
                address,
                bytes,
            }),
            Err(fault) => {
                let _ = driver.release_context(device);
                Err(fault)
            }
        }
    }

    /// Makes the context current on this thread.
    pub(super) fn enter(&self) -> Outcome<()> {
        self.driver.enter(self.context)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let driver = &self.driver;
        let ended = self
            .enter()
            .and_then(|()| driver.unmap(self.address, self.bytes))
            .and_then(|()| driver.release(self.handle))
            .and_then(|()| driver.unreserve(self.address, self.bytes))
            .and_then(|()| driver.release_context(self.device));
        if let Err(fault) = ended {
            tracing::warn!(?fault, "cannot unmap device memory");
        }
    }
}

/// Device memory that another process leased to this one. Calls block, and leave this process's primary context current
/// on the calling thread.
#[derive(Debug)]
pub struct Imported {
    mapped: Mapped,
    offset: u64,
    bytes: u64,
}

impl Imported {
    /// Maps what was exported, on the GPU that it lies on. From then on `cuda` keeps this process's primary context there.
    ///
    /// # Errors
    /// [`CudaError::Refused`] where the driver does not take it.
    pub fn open(cuda: &Cuda, gpu: &CudaGpu, export: Export) -> Result<Self, CudaError> {
        let Export {
            descriptor,
            mapped,
            offset,
            bytes,
            ..
        } = export;
        let import = |driver: &Driver, _: i32| {
            let handle = driver.import(descriptor.as_raw_fd())?;
            Ok((handle, mapped.get()))
        };
        Ok(Self {
            mapped: Mapped::new(cuda, gpu, false, import)?,
            offset,
            bytes: bytes.get(),
        })
    }

    /// The device pointer of the first byte, in this process.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.mapped.address + self.offset
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
        let bytes = self.bytes as usize;
        Ok(self.copy(bytes, |driver, pinned, stream| {
            driver.download(pinned, self.address(), bytes, stream)
        })?)
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
        let driver = &self.mapped.driver;
        self.mapped.enter()?;
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
