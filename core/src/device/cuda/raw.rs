//! What the link gives: plain asynchronous copies out of pinned memory, with nothing of hotset around them. The floor that
//! uploads are measured against.

use std::time::{Duration, Instant};

use super::driver::{Driver, Opaque, Outcome};
use super::import::Mapped;
use super::{Cuda, CudaError, CudaGpu};
use crate::units::Bytes;

/// Pinned host memory, and as much memory of a GPU. Calls block, and leave this process's primary context current on the
/// calling thread.
#[derive(Debug)]
pub struct PinnedCopy {
    to: Mapped,
    from: usize,
    stream: Opaque,
    event: Opaque,
}

impl PinnedCopy {
    /// Takes this much memory on both sides, rounded up to the GPU's granule.
    ///
    /// # Errors
    /// [`CudaError::Refused`], above all where there is not so much.
    pub fn new(cuda: &Cuda, gpu: &CudaGpu, bytes: Bytes) -> Result<Self, CudaError> {
        let create = |driver: &Driver, device: i32| {
            let page = driver.granularity(device)?.max(1);
            let bytes = bytes.get().max(1).next_multiple_of(page);
            Ok((driver.create(device, bytes)?, bytes))
        };
        let to = Mapped::new(cuda, gpu, true, create)?;
        let driver = to.driver.clone();
        let from = driver.host_alloc(to.bytes as usize)?;
        let made = driver.stream().and_then(|stream| {
            let event = driver.event();
            event
                .map(|event| (stream, event))
                .inspect_err(|_| drop(driver.end_stream(stream)))
        });
        match made {
            Ok((stream, event)) => Ok(Self {
                to,
                from,
                stream,
                event,
            }),
            Err(fault) => {
                let _ = driver.host_free(from);
                Err(fault.into())
            }
        }
    }

    /// Copies until so many bytes have gone, all queued at once, and says how long it took.
    ///
    /// # Errors
    /// [`CudaError::Refused`].
    pub fn run(&self, bytes: Bytes) -> Result<Duration, CudaError> {
        let driver = &self.to.driver;
        self.to.enter()?;
        let began = Instant::now();
        let mut left = bytes.get();
        let mut queued: Outcome<()> = Ok(());
        while left > 0 && queued.is_ok() {
            let now = left.min(self.to.bytes);
            queued = driver.upload(self.to.address, self.from, now as usize, self.stream);
            left -= now;
        }
        // Also after a failure: some may be under way.
        let ended = driver
            .record(self.event, self.stream)
            .and_then(|()| driver.wait(self.event));
        let took = began.elapsed();
        queued.and(ended)?;
        Ok(took)
    }
}

impl Drop for PinnedCopy {
    fn drop(&mut self) {
        let driver = &self.to.driver;
        let ended = self
            .to
            .enter()
            .and_then(|()| driver.end_event(self.event))
            .and_then(|()| driver.end_stream(self.stream))
            .and_then(|()| driver.host_free(self.from));
        if let Err(fault) = ended {
            tracing::warn!(?fault, "cannot give pinned memory back");
        }
    }
}
