//! One life of a GPU's context: the threads that work in it, the heap, and the streams. A context that was lost is
//! replaced by a new engine.
//!
//! Three threads: *control* allocates, frees and registers; *copier* queues copies; *waiter* sleeps on their events and
//! reports. They end in the order copier, waiter, control, so that the context goes last.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use tokio::sync::{oneshot, watch};

use super::driver::{Driver, Fault, Opaque, Outcome};
use super::heap::{Heap, Place, granules};
use super::pins::Pins;
use super::worker::Worker;
use crate::device::{DeviceError, Granules, Kept};
use crate::ids::GpuIndex;
use crate::memory::HostRange;
use crate::units::{Bytes, MIB};

/// Size of a pinned buffer, through which memory that cannot be registered is copied. From 4 MiB on a copy by DMA runs at
/// full speed.
const BUFFER: usize = 4 * MIB as usize;
/// While one is filled, the other is read by the GPU.
const BUFFERS: usize = 2;

/// Engines started in this process so far. Only used to tell them apart.
static ENGINES: AtomicU64 = AtomicU64::new(0);

/// What the threads of an engine share with whoever asks them.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) gpu: GpuIndex,
    pub(super) driver: Arc<Driver>,
    pub(super) device: i32,
    pub(super) number: u64,
    lost: Mutex<Option<Arc<str>>>,
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
            return self
                .lost_error(self.lose(format!("{} failed with {}", fault.call, fault.name)));
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

    /// Lets go of host memory. Not here: where this was the last to hold it, it goes back to its arena, whose lock may be
    /// held by one who waits for this thread to unregister other memory.
    pub(super) fn let_go(&self, of: HostRange) {
        self.copier.discard(of);
    }

    pub(super) const fn heap(&self) -> &Heap {
        &self.heap
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
        if let Err(fault) = driver.release_context(self.shared.device) {
            tracing::error!(?fault, "cannot release a context");
        }
        for (address, bytes) in stranded {
            if let Err(fault) = driver.unreserve(address, bytes) {
                tracing::warn!(?fault, "addresses of a lost context stay reserved");
            }
        }
    }
}

/// A copy whose event somebody waits for.
struct Waiting {
    event: Opaque,
    done: Box<dyn FnOnce(Outcome<()>) + Send>,
}

/// A pinned buffer.
struct Buffer {
    address: usize,
    event: Opaque,
    busy: bool,
}

/// The state of the copying thread.
pub(super) struct Copier {
    shared: Arc<Shared>,
    up: Opaque,
    down: Opaque,
    peer: Opaque,
    buffers: Vec<Buffer>,
    next: usize,
    spare: Arc<Mutex<Vec<Opaque>>>,
    waiter: mpsc::Sender<Waiting>,
    waiting: std::thread::JoinHandle<()>,
    control: Worker<Control>,
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
    ) -> Result<Self, DeviceError> {
        let no_thread = |error: std::io::Error| DeviceError::Lost {
            gpu,
            reason: format!("no thread for its driver: {error}").into(),
        };
        let (begun, begins) = oneshot::channel::<Result<(Arc<Shared>, Begun), DeviceError>>();
        let (ended, ends) = watch::channel(false);
        let (own, handle) = mpsc::channel::<Worker<Control>>();
        let control = Worker::start(
            format!("cuda-{gpu}"),
            move || {
                let myself = handle.recv().ok()?;
                let shared = Arc::new(Shared {
                    gpu,
                    driver,
                    device: ordinal,
                    number: ENGINES.fetch_add(1, Ordering::Relaxed),
                    lost: Mutex::new(None),
                    sequence: AtomicU64::new(0),
                    allocated: AtomicU64::new(0),
                    slack: AtomicU64::new(0),
                });
                match begin(&shared, &pins, myself, reset) {
                    Ok((control, found)) => {
                        let _ = begun.send(Ok((shared, found)));
                        Some(control)
                    }
                    Err(fault) => {
                        let _ = begun.send(Err(shared.error(&fault)));
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
        let (shared, (copier, context, granules)) =
            begins.await.map_err(|_| DeviceError::Lost {
                gpu,
                reason: "its driver thread ended at its start".into(),
            })??;
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
    }
    let context = driver.retain_context(device)?;
    let begun = driver.enter(context).and_then(|()| {
        let page = driver.granularity(device)?;
        let (granules, chunk) = granules(driver.total(device)?, page);
        let copier = start_copier(shared, context, myself.clone())?;
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

fn start_copier(
    shared: &Arc<Shared>,
    context: Opaque,
    control: Worker<Control>,
) -> Outcome<Worker<Copier>> {
    let no_thread = |error: std::io::Error| Fault {
        call: "starting a thread",
        code: 0,
        name: error.to_string().into(),
    };
    let driver = &shared.driver;
    let (up, down, peer) = (driver.stream()?, driver.stream()?, driver.stream()?);
    let spare = Arc::new(Mutex::new(Vec::new()));
    let (waiter, queue) = mpsc::channel::<Waiting>();
    let waiting = {
        let (shared, spare) = (shared.clone(), spare.clone());
        std::thread::Builder::new()
            .name(format!("cuda-{}-wait", shared.gpu))
            .spawn(move || wait_for_events(&shared, context, &queue, &spare))
            .map_err(no_thread)?
    };
    let copier = Copier {
        shared: shared.clone(),
        up,
        down,
        peer,
        buffers: Vec::new(),
        next: 0,
        spare,
        waiter,
        waiting,
        control,
    };
    let gpu = shared.gpu;
    let shared = shared.clone();
    Worker::start(
        format!("cuda-{gpu}-copy"),
        move || {
            if let Err(fault) = shared.driver.enter(context) {
                // Each copy will say so again.
                let _ = shared.error(&fault);
            }
            Some(copier)
        },
        Copier::end,
    )
    .map_err(no_thread)
}

fn wait_for_events(
    shared: &Shared,
    context: Opaque,
    queue: &mpsc::Receiver<Waiting>,
    spare: &Mutex<Vec<Opaque>>,
) {
    if let Err(fault) = shared.driver.enter(context) {
        let _ = shared.error(&fault);
    }
    while let Ok(Waiting { event, done }) = queue.recv() {
        // Events are waited for in the order of their copies, over all streams: a copy that has ended may be reported
        // late, never early.
        let outcome = shared.driver.wait(event);
        spare
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(event);
        done(outcome);
    }
}

impl Copier {
    fn event(&self) -> Outcome<Opaque> {
        let spare = self
            .spare
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        spare.map_or_else(|| self.shared.driver.event(), Ok)
    }

    /// Calls `done` when everything that was queued on this stream has happened.
    fn report(&self, on: Opaque, done: impl FnOnce(Outcome<()>) + Send + 'static) {
        let recorded = self.event().and_then(|event| {
            let recorded = self.shared.driver.record(event, on);
            if recorded.is_err() {
                let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
                spare.push(event);
            }
            recorded.map(|()| event)
        });
        match recorded {
            Err(fault) => done(Err(fault)),
            Ok(event) => {
                let done = Box::new(done);
                if let Err(mpsc::SendError(waiting)) = self.waiter.send(Waiting { event, done }) {
                    (waiting.done)(self.shared.driver.wait(event));
                }
            }
        }
    }

    /// Copies host bytes to a device address, and calls `done` when they are there. Until then `from` lives.
    pub(super) fn upload(
        &mut self,
        to: u64,
        from: HostRange,
        registered: bool,
        done: impl FnOnce(Outcome<()>) + Send + 'static,
    ) {
        let queued = if registered {
            let bytes = from.as_slice();
            let driver = &self.shared.driver;
            driver.upload(to, bytes.as_ptr() as usize, bytes.len(), self.up)
        } else {
            self.through_buffers(to, from.as_slice())
        };
        // Also after a failure: a part may be under way.
        self.report(self.up, move |waited| {
            drop(from);
            done(queued.and(waited));
        });
    }

    fn through_buffers(&mut self, to: u64, bytes: &[u8]) -> Outcome<()> {
        let mut at = to;
        for piece in bytes.chunks(BUFFER) {
            let (i, address) = self.buffer()?;
            // SAFETY: the buffer has `BUFFER` bytes, which `piece` does not exceed; the copy that read it last is done,
            // since `buffer` waits for that, and only this thread writes to buffers.
            unsafe {
                std::ptr::copy_nonoverlapping(piece.as_ptr(), address as *mut u8, piece.len());
            }
            let driver = &self.shared.driver;
            driver.upload(at, address, piece.len(), self.up)?;
            let buffer = &mut self.buffers[i];
            buffer.busy = true;
            driver.record(buffer.event, self.up)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// The next pinned buffer that no copy uses: which, and where.
    fn buffer(&mut self) -> Outcome<(usize, usize)> {
        let driver = &self.shared.driver;
        if self.buffers.len() < BUFFERS {
            let event = driver.event()?;
            match driver.host_alloc(BUFFER) {
                Ok(address) => self.buffers.push(Buffer {
                    address,
                    event,
                    busy: false,
                }),
                Err(fault) => {
                    let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
                    spare.push(event);
                    return Err(fault);
                }
            }
            let last = self.buffers.len() - 1;
            return Ok((last, self.buffers[last].address));
        }
        self.next = (self.next + 1) % BUFFERS;
        let buffer = &mut self.buffers[self.next];
        if buffer.busy {
            driver.wait(buffer.event)?;
            buffer.busy = false;
        }
        Ok((self.next, buffer.address))
    }

    /// Reads at most one buffer's bytes back. The thread waits for them.
    pub(super) fn download(&mut self, from: u64, bytes: usize) -> Outcome<Vec<u8>> {
        let bytes = bytes.min(BUFFER);
        let (i, address) = self.buffer()?;
        let driver = &self.shared.driver;
        driver.download(address, from, bytes, self.down)?;
        let buffer = &mut self.buffers[i];
        buffer.busy = true;
        driver.record(buffer.event, self.down)?;
        driver.wait(buffer.event)?;
        buffer.busy = false;
        let mut read = vec![0; bytes];
        // SAFETY: the buffer has `BUFFER` bytes, of which the copy that has just ended wrote `bytes`.
        unsafe {
            std::ptr::copy_nonoverlapping(address as *const u8, read.as_mut_ptr(), bytes);
        }
        Ok(read)
    }

    /// Copies from another GPU, and calls `done` when the bytes are there.
    pub(super) fn copy_peer(
        &self,
        to: (u64, Opaque),
        from: (u64, Opaque),
        bytes: usize,
        done: impl FnOnce(Outcome<()>) + Send + 'static,
    ) {
        let queued = self.shared.driver.copy_peer(to, from, bytes, self.peer);
        self.report(self.peer, move |waited| done(queued.and(waited)));
    }

    fn end(self) {
        let Self {
            shared,
            up,
            down,
            peer,
            buffers,
            spare,
            waiter,
            waiting,
            control,
            ..
        } = self;
        drop(waiter);
        if waiting.join().is_err() {
            tracing::error!("the thread that waits for copies panicked");
        }
        let driver = &shared.driver;
        let mut outcomes: Vec<Outcome<()>> = Vec::new();
        for buffer in buffers {
            if buffer.busy {
                outcomes.push(driver.wait(buffer.event));
            }
            outcomes.push(driver.host_free(buffer.address));
            outcomes.push(driver.end_event(buffer.event));
        }
        let events = std::mem::take(&mut *spare.lock().unwrap_or_else(PoisonError::into_inner));
        outcomes.extend(events.into_iter().map(|event| driver.end_event(event)));
        outcomes.extend([up, down, peer].map(|stream| driver.end_stream(stream)));
        for fault in outcomes.into_iter().filter_map(Result::err) {
            if shared.lost().is_none() {
                tracing::error!(?fault, "cannot give driver resources back");
            }
        }
        control.stop();
    }
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
