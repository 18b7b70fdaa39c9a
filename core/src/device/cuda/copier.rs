//! The copying thread of an engine, and the thread that waits for its copies.

use std::sync::{Arc, Mutex, PoisonError, mpsc};

use super::driver::{Fault, Opaque, Outcome};
use super::engine::{Control, Shared};
use super::pins::Pinned;
use super::worker::{Pulse, Worker};
use crate::catalog::DEVICE_TENSOR_ALIGN;
use crate::memory::HostRange;
use crate::units::{KIB, MIB};

/// Size of a pinned buffer, through which memory that cannot be registered is copied. From 4 MiB on a copy by DMA runs at
/// full speed.
const BUFFER: usize = 4 * MIB as usize;
/// While one is filled, the other is read by the GPU.
const BUFFERS: usize = 2;
/// Neighbours up to this size are put together in a pinned buffer, and go as one copy: for the host that is less work than
/// queueing one more, and for the link less time.
const SMALL: u64 = 16 * KIB;
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

/// A part of an upload: host bytes, where they go, and what lets the GPU read them by itself.
pub(super) struct Part {
    pub(super) to: u64,
    pub(super) from: HostRange,
    pub(super) pinned: Option<Pinned>,
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

/// Starts both threads in a context.
pub(super) fn start(
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
        mut parts: Vec<Part>,
        done: impl FnOnce(Outcome<()>) + Send + 'static,
    ) {
        let queued = self.queue(&parts);
        // Also after a failure: some may be under way.
        self.report(self.up, move |waited| {
            // First: to let go of host memory may wait for an engine that ends, which waits for these.
            parts.iter_mut().for_each(|part| part.pinned = None);
            drop(parts);
            done(queued.and(waited));
        });
    }

    fn queue(&mut self, mut parts: &[Part]) -> Outcome<()> {
        while let Some(part) = parts.first() {
            let (near, rest) = parts.split_at(neighbours(parts));
            if part.pinned.is_some() && near.len() == 1 {
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
            // On a GPU that is lost they go with the context, and where the process ends, the driver may have ended before.
            if shared.lost().is_some() || fault.is_fatal() {
                tracing::debug!(?fault, "driver resources are lost");
            } else {
                tracing::error!(?fault, "cannot give driver resources back");
            }
        }
        control.stop();
    }
}

/// How many parts at the beginning go as one copy: small ones, and those that the GPU cannot read by itself, which lie so
/// close together on the GPU that nothing else is between them.
fn neighbours(parts: &[Part]) -> usize {
    let small = |part: &Part| part.pinned.is_none() || part.from.bytes().get() <= SMALL;
    let near = |pair: &&[Part]| {
        small(&pair[0])
            && small(&pair[1])
            && pair[1].to >= pair[0].end()
            && pair[1].to - pair[0].end() < DEVICE_TENSOR_ALIGN
    };
    1 + parts.windows(2).take_while(near).count()
}
