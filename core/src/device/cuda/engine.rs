//! One life of a GPU's context: the threads that work in it, the heap, and the streams. A context that was lost is
//! replaced by a new engine.
//!
//! Three threads: *control* allocates, frees and registers; *copier* queues copies; *waiter* sleeps on their events and
//! reports. They end in the order copier, waiter, control, so that the context goes last.
//!
//! A driver may never return from a call. Whoever waits for an answer watches the threads' pulses meanwhile, and after too
//! long gives the GPU up; the threads are left where they are, and end once the call returns.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use super::driver::{Driver, Fault, Opaque, Outcome};
use super::heap::{Heap, Place, granules};
use super::pins::Pins;
use super::worker::{Pulse, Worker};
use crate::catalog::DEVICE_TENSOR_ALIGN;
use crate::device::{DeviceError, Granules, Kept};
use crate::ids::GpuIndex;
use crate::memory::HostRange;
use crate::units::{Bytes, KIB, MIB};

/// Size of a pinned buffer, through which memory that cannot be registered is copied. From 4 MiB on a copy by DMA runs at
/// full speed.
const BUFFER: usize = 4 * MIB as usize;
/// While one is filled, the other is read by the GPU.
const BUFFERS: usize = 2;
/// Neighbours up to this size are put together in a pinned buffer, and go as one copy: for the host that is less work than
/// queueing one more, and for the link less time.
const SMALL: u64 = 16 * KIB;
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
    pulses: [Arc<Pulse>; 3],
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
    /// Recorded behind the last copy that reads it.
    event: Opaque,
    /// What is in use from its beginning.
    used: usize,
    /// It is full, and copies may still read it.
    busy: bool,
}

/// A part of an upload: host bytes, where they go, and whether the GPU reads them by itself.
pub(super) struct Part {
    pub(super) to: u64,
    pub(super) from: HostRange,
    pub(super) registered: bool,
}

impl Part {
    fn end(&self) -> u64 {
        self.to + self.from.bytes().get()
    }
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
        let [.., pulse] = shared.pulses.clone();
        std::thread::Builder::new()
            .name(format!("cuda-{}-wait", shared.gpu))
            .spawn(move || wait_for_events(&shared, &pulse, context, &queue, &spare))
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
    let [_, pulse, _] = shared.pulses.clone();
    Worker::start(
        format!("cuda-{gpu}-copy"),
        pulse,
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
    pulse: &Pulse,
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
        let outcome = pulse.during(|| shared.driver.wait(event));
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

    /// Copies parts, in rising order of their places, and calls `done` when all are there. Until then their bytes live.
    pub(super) fn upload(
        &mut self,
        parts: Vec<Part>,
        done: impl FnOnce(Outcome<()>) + Send + 'static,
    ) {
        let queued = self.queue(&parts);
        // Also after a failure: some may be under way.
        self.report(self.up, move |waited| {
            drop(parts);
            done(queued.and(waited));
        });
    }

    fn queue(&mut self, mut parts: &[Part]) -> Outcome<()> {
        while let Some(part) = parts.first() {
            let (near, rest) = parts.split_at(neighbours(parts));
            if part.registered && near.len() == 1 {
                let bytes = part.from.as_slice();
                let driver = &self.shared.driver;
                driver.upload(part.to, bytes.as_ptr() as usize, bytes.len(), self.up)?;
            } else {
                self.through_buffers(near)?;
            }
            parts = rest;
        }
        Ok(())
    }

    /// Puts neighbours together in pinned buffers as they will lie on the GPU, and copies them from there.
    fn through_buffers(&mut self, near: &[Part]) -> Outcome<()> {
        let (Some(first), Some(last)) = (near.first(), near.last()) else {
            return Ok(());
        };
        let (mut at, end) = (first.to, last.end());
        while at < end {
            let bytes = (end - at).min(BUFFER as u64) as usize;
            let address = self.room(bytes)?;
            // SAFETY: `room` gives that many bytes of a pinned buffer, which no copy reads; only this thread writes there.
            let into = unsafe { std::slice::from_raw_parts_mut(address as *mut u8, bytes) };
            if near.len() > 1 {
                // What lies between tensors shall not be what lay here before.
                into.fill(0);
            }
            for part in near {
                let (from, until) = (part.to.max(at), part.end().min(at + bytes as u64));
                if from < until {
                    let source = (from - part.to) as usize..(until - part.to) as usize;
                    let target = (from - at) as usize..(until - at) as usize;
                    into[target].copy_from_slice(&part.from.as_slice()[source]);
                }
            }
            self.shared.driver.upload(at, address, bytes, self.up)?;
            at += bytes as u64;
        }
        Ok(())
    }

    /// So many bytes of a pinned buffer that no copy uses; at most a whole one.
    fn room(&mut self, bytes: usize) -> Outcome<usize> {
        let driver = &self.shared.driver;
        if let Some(buffer) = self.buffers.get_mut(self.next) {
            let start = buffer.used.next_multiple_of(DEVICE_TENSOR_ALIGN as usize);
            if start + bytes <= BUFFER {
                buffer.used = start + bytes;
                return Ok(buffer.address + start);
            }
            // Full; free again once all that was queued until now has been read.
            driver.record(buffer.event, self.up)?;
            buffer.busy = true;
        }
        let next = if self.buffers.len() < BUFFERS {
            let event = driver.event()?;
            match driver.host_alloc(BUFFER) {
                Ok(address) => self.buffers.push(Buffer {
                    address,
                    event,
                    used: 0,
                    busy: false,
                }),
                Err(fault) => {
                    let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
                    spare.push(event);
                    return Err(fault);
                }
            }
            self.buffers.len() - 1
        } else {
            (self.next + 1) % BUFFERS
        };
        let buffer = &mut self.buffers[next];
        if buffer.busy {
            driver.wait(buffer.event)?;
            buffer.busy = false;
        }
        buffer.used = bytes;
        self.next = next;
        Ok(buffer.address)
    }

    /// Reads at most one buffer's bytes back. The thread waits for them.
    pub(super) fn download(&mut self, from: u64, bytes: usize) -> Outcome<Vec<u8>> {
        let bytes = bytes.min(BUFFER);
        let address = self.room(bytes)?;
        let event = self.event()?;
        let driver = &self.shared.driver;
        let copied = driver
            .download(address, from, bytes, self.down)
            .and_then(|()| driver.record(event, self.down))
            .and_then(|()| driver.wait(event));
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        spare.push(event);
        drop(spare);
        copied?;
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

/// How many parts at the beginning go as one copy: small ones, and those that the GPU cannot read by itself, which lie so
/// close together on the GPU that nothing else is between them.
fn neighbours(parts: &[Part]) -> usize {
    let small = |part: &Part| !part.registered || part.from.bytes().get() <= SMALL;
    let near = |pair: &&[Part]| {
        small(&pair[0])
            && small(&pair[1])
            && pair[1].to >= pair[0].end()
            && pair[1].to - pair[0].end() < DEVICE_TENSOR_ALIGN
    };
    1 + parts.windows(2).take_while(near).count()
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
