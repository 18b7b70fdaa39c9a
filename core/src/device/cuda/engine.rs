//! One life of a GPU's context: the threads that work in it, the heap, and the streams. A context that was lost is
//! replaced by a new engine.
//!
//! Three threads: *control* allocates, frees and registers; *copier* queues copies; *waiter* sleeps on their events and
//! reports. They end in the order copier, waiter, control, so that the context goes last.
//!
//! A driver may never return from a call. Whoever waits for an answer watches the threads' pulses meanwhile, and after too
//! long gives the GPU up; the threads are left where they are, and end once the call returns.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use super::copier::{self, Copier};
use super::driver::{Driver, Fault, Opaque, Outcome};
use super::heap::{Heap, Place, granules};
use super::pins::Pins;
use super::worker::{Pulse, Worker};
use crate::device::{DeviceError, Granules, Kept};
use crate::ids::GpuIndex;
use crate::memory::HostRange;
use crate::units::Bytes;

/// How often those who wait look whether the driver still returns from its calls.
const LOOK: Duration = Duration::from_millis(50);

/// Engines started in this process so far. Only used to tell them apart.
static ENGINES: AtomicU64 = AtomicU64::new(0);

/// What the threads of an engine share with whoever asks them.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) gpu: GpuIndex,
    pub(super) driver: Arc<Driver>,
    pub(super) device: i32,
    pub(super) number: u64,
    /// How long one call of the driver may take.
    patience: Duration,
    /// Of the control thread, the copier and the waiter.
    pub(super) pulses: [Arc<Pulse>; 3],
    lost: Mutex<Option<Arc<str>>>,
    /// Whether it is lost by an error that stays with the process.
    sticky: AtomicBool,
    /// Odd while memory is being allocated or freed.
    sequence: AtomicU64,
    allocated: AtomicU64,
    slack: AtomicU64,
}

impl Shared {
    /// What an error of the driver means; remembers it where nothing works any more.
    pub(super) fn error(&self, fault: &Fault) -> DeviceError {
        if let Some(reason) = self.lost() {
            return self.lost_error(reason);
        }
        if fault.is_fatal() {
            self.sticky.fetch_or(fault.is_sticky(), Ordering::AcqRel);
            return self.lost_error(self.lose(fault.to_string()));
        }
        DeviceError::Driver {
            gpu: self.gpu,
            call: fault.call,
            code: fault.name.clone(),
        }
    }

    /// Notes that nothing works any more; the first reason stays.
    pub(super) fn lose(&self, reason: String) -> Arc<str> {
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        lost.get_or_insert_with(|| {
            tracing::error!(gpu = %self.gpu, reason, "a GPU is lost");
            reason.into()
        })
        .clone()
    }

    pub(super) fn lost(&self) -> Option<Arc<str>> {
        self.lost
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn is_sticky(&self) -> bool {
        self.sticky.load(Ordering::Acquire)
    }

    pub(super) const fn lost_error(&self, reason: Arc<str>) -> DeviceError {
        DeviceError::Lost {
            gpu: self.gpu,
            reason,
        }
    }

    /// The error for an answer that never came: the engine has ended.
    pub(super) fn ended(&self) -> DeviceError {
        let reason = self
            .lost()
            .unwrap_or_else(|| "its context has ended".into());
        self.lost_error(reason)
    }

    pub(super) fn alive(&self) -> Result<(), DeviceError> {
        self.lost()
            .map_or(Ok(()), |reason| Err(self.lost_error(reason)))
    }

    /// How long the driver has not returned from a call, where that is too long.
    pub(super) fn hangs(&self) -> Option<Duration> {
        let busy = self.pulses.iter().map(|pulse| pulse.busy()).max()?;
        (busy > self.patience).then_some(busy)
    }

    /// Waits for the answer of one of the threads, as long as the driver returns from its calls.
    pub(super) async fn answer<R>(
        &self,
        mut receiver: oneshot::Receiver<R>,
    ) -> Result<R, DeviceError> {
        loop {
            match tokio::time::timeout(LOOK, &mut receiver).await {
                Ok(answer) => return answer.map_err(|_| self.ended()),
                Err(_) => {
                    if let Some(busy) = self.hangs() {
                        let reason =
                            format!("the driver has not returned from a call for {busy:.1?}");
                        return Err(self.lost_error(self.lose(reason)));
                    }
                }
            }
        }
    }

    /// Allocated bytes, bytes lost to chunks that are not full, and a number that changes whenever they do. `None` while
    /// they change.
    pub(super) fn steady(&self) -> Option<(u64, u64, u64)> {
        let sequence = self.sequence.load(Ordering::Acquire);
        let (allocated, slack) = self.held();
        (sequence.is_multiple_of(2) && self.sequence.load(Ordering::Acquire) == sequence)
            .then_some((allocated, slack, sequence))
    }

    /// Allocated bytes, and bytes lost to chunks that are not full.
    pub(super) fn held(&self) -> (u64, u64) {
        (
            self.allocated.load(Ordering::Acquire),
            self.slack.load(Ordering::Acquire),
        )
    }
}

/// The state of the control thread.
pub(super) struct Control {
    shared: Arc<Shared>,
    heap: Heap,
    pins: Arc<Pins>,
    myself: Worker<Control>,
    copier: Worker<Copier>,
}

impl Control {
    pub(super) fn driver(&self) -> &Arc<Driver> {
        &self.shared.driver
    }

    pub(super) fn engine(&self) -> u64 {
        self.shared.number
    }

    pub(super) fn worker(&self) -> Worker<Self> {
        self.myself.clone()
    }

    pub(super) const fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Lets go of host memory. Not here: where this was the last to hold it, it goes back to its arena, whose lock may be
    /// held by one who waits for this thread to unregister other memory.
    pub(super) fn let_go(&self, of: HostRange) {
        self.copier.discard(of);
    }

    pub(super) const fn heap(&self) -> &Heap {
        &self.heap
    }

    /// As [`Heap::export`].
    pub(super) fn export(&mut self, place: Place) -> Outcome<Option<(OwnedFd, u64, u64)>> {
        self.heap.export(place)
    }

    /// Changes the heap, so that figures taken meanwhile are known to be of no use.
    pub(super) fn change<R>(&mut self, change: impl FnOnce(&mut Heap) -> R) -> R {
        let shared = &self.shared;
        shared.sequence.fetch_add(1, Ordering::AcqRel);
        let result = change(&mut self.heap);
        shared
            .allocated
            .store(self.heap.allocated(), Ordering::Release);
        shared.slack.store(self.heap.slack(), Ordering::Release);
        shared.sequence.fetch_add(1, Ordering::AcqRel);
        result
    }

    /// Ends the context. On a lost device every call fails, and whatever is left goes with the context.
    fn end(mut self) {
        let driver = self.shared.driver.clone();
        self.pins.forget(self.shared.number);
        let stranded = self.change(Heap::clear);
        match driver.release_context(self.shared.device) {
            Ok(()) => self.pins.context_gone(self.shared.gpu),
            Err(fault) if fault.is_fatal() => tracing::debug!(?fault, "a context is lost"),
            Err(fault) => tracing::error!(?fault, "cannot release a context"),
        }
        for (address, bytes) in stranded {
            if let Err(fault) = driver.unreserve(address, bytes) {
                tracing::warn!(?fault, "addresses of a lost context stay reserved");
            }
        }
    }
}

/// A running engine. Dropping it ends the threads, once they have done what they were told before.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) shared: Arc<Shared>,
    pub(super) context: Opaque,
    pub(super) granules: Granules,
    pub(super) control: Worker<Control>,
    pub(super) copier: Worker<Copier>,
    pub(super) ended: watch::Receiver<bool>,
}

/// What the control thread finds at its start.
type Begun = (Worker<Copier>, Opaque, Granules);

impl Engine {
    /// Starts an engine; with `reset`, after everything that is left of an earlier context was thrown away.
    pub(super) async fn start(
        gpu: GpuIndex,
        driver: Arc<Driver>,
        ordinal: i32,
        pins: Arc<Pins>,
        reset: bool,
        patience: Duration,
        starting: &mut Option<Arc<Shared>>,
    ) -> Result<Self, DeviceError> {
        let no_thread = |error: std::io::Error| DeviceError::Lost {
            gpu,
            reason: format!("no thread for its driver: {error}").into(),
        };
        let shared = Arc::new(Shared {
            gpu,
            driver,
            device: ordinal,
            number: ENGINES.fetch_add(1, Ordering::Relaxed),
            patience,
            pulses: Default::default(),
            lost: Mutex::new(None),
            sticky: AtomicBool::new(false),
            sequence: AtomicU64::new(0),
            allocated: AtomicU64::new(0),
            slack: AtomicU64::new(0),
        });
        *starting = Some(shared.clone());
        let (begun, begins) = oneshot::channel::<Result<Begun, DeviceError>>();
        let (ended, ends) = watch::channel(false);
        let (own, handle) = mpsc::channel::<Worker<Control>>();
        let [pulse, ..] = shared.pulses.clone();
        let of_thread = shared.clone();
        let control = Worker::start(
            format!("cuda-{gpu}"),
            pulse,
            move || {
                let shared = of_thread;
                let myself = handle.recv().ok()?;
                match begin(&shared, &pins, myself, reset) {
                    Ok((control, found)) => {
                        if let Err(Ok((copier, ..))) = begun.send(Ok(found)) {
                            // It took so long that nobody wants it any more.
                            copier.stop();
                        }
                        Some(control)
                    }
                    Err(fault) => {
                        let error = match reset && fault.is_sticky() {
                            true => DeviceError::Spent {
                                gpu,
                                reason: shared.lose(fault.to_string()),
                            },
                            false => shared.error(&fault),
                        };
                        let _ = begun.send(Err(error));
                        None
                    }
                }
            },
            move |control: Control| {
                control.end();
                tracing::debug!(%gpu, "a context has ended");
                let _ = ended.send(true);
            },
        )
        .map_err(no_thread)?;
        let _ = own.send(control.clone());
        let (copier, context, granules) = shared.answer(begins).await??;
        *starting = None;
        Ok(Self {
            shared,
            context,
            granules,
            control,
            copier,
            ended: ends,
        })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.copier.stop();
    }
}

/// Makes the context, and starts the other threads in it.
fn begin(
    shared: &Arc<Shared>,
    pins: &Arc<Pins>,
    myself: Worker<Control>,
    reset: bool,
) -> Outcome<(Control, Begun)> {
    let driver = &shared.driver;
    let device = driver.device(shared.device)?;
    if reset {
        driver.reset_context(device)?;
        pins.context_gone(shared.gpu);
    }
    let context = driver.retain_context(device)?;
    let begun = driver.enter(context).and_then(|()| {
        let page = driver.granularity(device)?;
        let (granules, chunk) = granules(driver.total(device)?, page);
        let copier = copier::start(shared, context, myself.clone())?;
        let heap = Heap::new(driver.clone(), device, granules, chunk);
        let control = Control {
            shared: shared.clone(),
            heap,
            pins: pins.clone(),
            myself,
            copier: copier.clone(),
        };
        Ok((control, (copier, context, granules)))
    });
    begun.inspect_err(|_| {
        if let Err(fault) = driver.release_context(device) {
            tracing::error!(?fault, "cannot release a context");
        }
    })
}

/// An allocation as its engine knows it; freed when the last copy that uses it is done.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) engine: Arc<Engine>,
    pub(super) place: Place,
    pub(super) bytes: Bytes,
    pub(super) kept: Mutex<Kept>,
}

impl Drop for Block {
    fn drop(&mut self) {
        let place = self.place;
        let kept = self
            .kept
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        self.engine.control.tell(move |control| {
            control.change(|heap| heap.free(place));
            drop(kept);
        });
    }
}
