//! The reader of a running system: all components through one queue, past the page cache where that is faster.

use std::fmt;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;

use super::image::ImagePlan;
use super::pool;
use super::queue::{Duty, Limits, Queue};
use super::stream::OpenStream;
use super::urgency::Urgency;
use super::uring::Ring;
use super::{OpenComponent, ReadError, Reader};
use crate::catalog::Component;
use crate::config::{LoadConfig, ReaderKind};

/// Threads that copy from the page cache: two reach the memory's bandwidth where one does not, more change nothing.
const COPIES: usize = 2;
/// Threads that read where there is no ring, at most. Each has one piece under way.
const MOST_READERS: u64 = 16;

/// A reader could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartReaderError {
    /// The configuration names io_uring, and the kernel refuses it.
    #[error("io_uring is refused here ({source}); set load.reader to \"auto\" or \"pread\"")]
    NoRing {
        /// What the system said.
        source: std::io::Error,
    },
    /// No threads.
    #[error("cannot start the threads that read: {source}")]
    Threads {
        /// What the system said.
        source: std::io::Error,
    },
}

/// A queue that ends, with its threads, when nobody can ask for a piece any more.
pub(super) struct Service(Arc<Queue>);

impl std::ops::Deref for Service {
    type Target = Queue;
    fn deref(&self) -> &Queue {
        &self.0
    }
}

impl Service {
    pub(super) const fn new(queue: Arc<Queue>) -> Self {
        Self(queue)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// See the module's page.
pub struct DiskReader {
    service: Arc<Service>,
    name: &'static str,
    description: String,
    direct: bool,
}

impl fmt::Debug for DiskReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DiskReader")
            .field(&self.description)
            .finish()
    }
}

impl DiskReader {
    /// Starts the threads that read, in the way that the configuration names, or in the best one that the kernel allows.
    ///
    /// # Errors
    /// [`StartReaderError`].
    pub fn start(config: &LoadConfig) -> Result<Self, StartReaderError> {
        let limits = Limits {
            in_flight: config.in_flight.get(),
            copies: COPIES,
            prefetch_rate: config.prefetch_rate.get(),
        };
        let ring = match config.reader {
            ReaderKind::Auto | ReaderKind::IoUring => Some(Ring::new()),
            ReaderKind::Pread | ReaderKind::Buffered => None,
        };
        let threads = |source| StartReaderError::Threads { source };
        let depth = format!("{} in flight", config.in_flight);
        let (queue, name, description) = match ring {
            Some(Ok(ring)) => {
                let queue = ring.start(limits).map_err(threads)?;
                pool::start(&queue, COPIES, Duty::BesideRing).map_err(threads)?;
                let description = format!("io-uring, direct, {depth}");
                (queue, "io-uring", description)
            }
            Some(Err(source)) if config.reader == ReaderKind::IoUring => {
                return Err(StartReaderError::NoRing { source });
            }
            refused => {
                let queue = Arc::new(Queue::new(limits, None));
                let readers = config.in_flight.get() / config.piece.get().max(1);
                let readers = readers.clamp(COPIES as u64, MOST_READERS) as usize;
                pool::start(&queue, readers, Duty::All).map_err(threads)?;
                let (name, how) = match config.reader {
                    ReaderKind::Buffered => ("buffered", "through the page cache"),
                    _ => ("pread", "direct"),
                };
                let why = match refused {
                    Some(Err(error)) => format!(" (io_uring is refused: {error})"),
                    _ => String::new(),
                };
                let description = format!("{name}, {how}, {readers} threads, {depth}{why}");
                (queue, name, description)
            }
        };
        Ok(Self {
            service: Arc::new(Service::new(queue)),
            name,
            description,
            direct: config.reader != ReaderKind::Buffered,
        })
    }
}

impl Reader for DiskReader {
    fn name(&self) -> &'static str {
        self.name
    }

    fn describe(&self) -> String {
        self.description.clone()
    }

    fn open(
        &self,
        component: Arc<Component>,
    ) -> BoxFuture<'static, Result<Box<dyn OpenComponent>, ReadError>> {
        self.open_as(component, Urgency::default())
    }

    fn open_as(
        &self,
        component: Arc<Component>,
        urgency: Urgency,
    ) -> BoxFuture<'static, Result<Box<dyn OpenComponent>, ReadError>> {
        let (service, direct) = (self.service.clone(), self.direct);
        async move {
            let name = component.id.to_string();
            let lost = name.clone();
            let opening = tokio::task::spawn_blocking(move || {
                let plan = ImagePlan::open(&component)?;
                Ok(OpenStream::new(name, plan, service, urgency, direct))
            });
            let open = opening
                .await
                .map_err(|_| ReadError::Interrupted { component: lost })??;
            Ok(Box::new(open) as Box<dyn OpenComponent>)
        }
        .boxed()
    }
}
