//! The one queue of all reads: pieces of components, in the order of their urgency.
//!
//! Reads wait here and not at the disk, since the disk knows no urgency: what it has been told to read, it reads. So only
//! as many bytes are in flight as keep it busy, and of prefetches a single piece, so that a demand waits for one piece at
//! most.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::opened::Opened;
use super::urgency::Urgency;
use super::{ReadError, owned};
use crate::memory::SlabPiece;
use crate::units::Bytes;

/// How a piece is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Not yet: its memory has to be found first, beside a ring that would wait for it.
    Cold,
    /// Past the page cache.
    Direct,
    /// From the page cache, where it is.
    Cached,
    /// Through the page cache, from the disk.
    Buffered,
    /// However it goes, after a failure that may pass.
    Again,
}

/// A piece to read.
pub(super) struct Task {
    pub(super) piece: SlabPiece,
    pub(super) file: Arc<Opened>,
    /// Index of the file in its component.
    pub(super) index: usize,
    /// Where in the file the piece begins.
    pub(super) offset: u64,
    /// Bytes that have to come. The rest of the piece is padding.
    pub(super) wanted: usize,
    /// Bytes that came.
    pub(super) done: usize,
    pub(super) way: Way,
    /// Its memory may have to be found first.
    pub(super) cold: bool,
    /// How often it failed in a way that may pass.
    pub(super) failures: u32,
    pub(super) stream: StreamId,
    /// It was begun as a prefetch, whatever it has become since.
    pub(super) guessed: bool,
    pub(super) reply: mpsc::UnboundedSender<Done>,
}

/// A piece that was read, or could not be.
pub(super) struct Done {
    pub(super) piece: SlabPiece,
    pub(super) index: usize,
    pub(super) wanted: usize,
    pub(super) result: Result<(), ReadError>,
}

impl Task {
    /// The error for this place in the file.
    pub(super) fn failed(&self, source: std::io::Error) -> ReadError {
        ReadError::Io {
            path: owned(&self.file.source.path),
            offset: self.offset + self.done as u64,
            source,
        }
    }

    pub(super) fn truncated(&self) -> ReadError {
        ReadError::Truncated {
            path: owned(&self.file.source.path),
            offset: self.offset + self.done as u64,
            missing: Bytes(self.file.source.identity.size.get())
                .saturating_sub(Bytes(self.offset + self.done as u64)),
        }
    }
}

/// An open component, as the queue knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StreamId(u64);

/// What a thread is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Duty {
    /// Direct reads alone: the thread of the ring.
    Ring,
    /// All but direct reads, beside a ring.
    BesideRing,
    /// Everything.
    All,
}

/// What the queue allows.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    /// Bytes that the disk is asked for at the same time.
    pub(super) in_flight: u64,
    /// Pieces that are copied from the page cache at the same time.
    pub(super) copies: usize,
    /// Bytes that prefetches read each second; 0: as the disk gives.
    pub(super) prefetch_rate: u64,
}

/// What a thread that asked is given.
pub(super) enum Turn {
    Take(Task),
    /// Nothing now; ask again after this time, where it is known, or when woken.
    Wait(Option<Duration>),
    /// No more reads, ever.
    End,
}

/// Called when there may be work for the ring.
pub(super) type Waker = Box<dyn Fn() + Send + Sync>;

pub(super) struct Queue {
    state: Mutex<State>,
    work: Condvar,
    wake_ring: Option<Waker>,
    limits: Limits,
}

#[derive(Default)]
struct State {
    streams: Vec<Stream>,
    next: u64,
    /// Bytes under way from the disk.
    in_flight: u64,
    /// Pieces under way for prefetches.
    prefetching: usize,
    copying: usize,
    buffered: usize,
    /// No prefetch before this time.
    prefetch_from: Option<Instant>,
    ended: bool,
    /// The ring does not work any more.
    lost_ring: bool,
    direct: Meter,
    cached: Meter,
    choices: u64,
}

struct Stream {
    id: StreamId,
    urgency: Urgency,
    waiting: VecDeque<Task>,
}

/// Bytes and busy time of one way of reading.
#[derive(Default)]
struct Meter {
    bytes: f64,
    seconds: f64,
    busy: usize,
    since: Option<Instant>,
}

/// Older bytes count half when this many have come.
const METER_BYTES: f64 = 1e9;
/// A rate is believed from this many bytes on.
const METER_BELIEVED: f64 = 128e6;
/// One of so many choices tries the way that seems slower, so that the rates stay true.
const TRY_OTHER: u64 = 64;
/// How much faster the disk has to be than the page cache to be preferred, since copies leave the disk to others.
const CLEARLY_FASTER: f64 = 1.2;

impl Meter {
    fn begin(&mut self, now: Instant) {
        if self.busy == 0 {
            self.since = Some(now);
        }
        self.busy += 1;
    }

    fn end(&mut self, now: Instant, bytes: usize) {
        self.busy = self.busy.saturating_sub(1);
        self.bytes += bytes as f64;
        if let Some(since) = self.since {
            self.seconds += now.duration_since(since).as_secs_f64();
            self.since = (self.busy > 0).then_some(now);
        }
        if self.bytes > METER_BYTES {
            self.bytes /= 2.0;
            self.seconds /= 2.0;
        }
    }

    /// Bytes each second, once enough were seen.
    fn rate(&self) -> Option<f64> {
        (self.bytes >= METER_BELIEVED && self.seconds > 0.0).then(|| self.bytes / self.seconds)
    }
}

fn answer(task: Task, result: Result<(), ReadError>) {
    let Task {
        piece,
        index,
        wanted,
        reply,
        ..
    } = task;
    // Nobody waits any more where the component was dropped: the memory goes with the piece.
    let _ = reply.send(Done {
        piece,
        index,
        wanted,
        result,
    });
}

impl State {
    fn index_of(&self, id: StreamId) -> Option<usize> {
        self.streams.iter().position(|stream| stream.id == id)
    }

    /// Whether a read of this kind may begin now, on a thread with this duty.
    fn may_begin(&self, task: &Task, duty: Duty, limits: &Limits) -> bool {
        let fits = self.in_flight == 0
            || self.in_flight.saturating_add(task.piece.len() as u64) <= limits.in_flight;
        match task.way {
            Way::Direct => (duty != Duty::BesideRing || self.lost_ring) && fits,
            Way::Cold => duty != Duty::Ring,
            Way::Again => duty != Duty::Ring && fits,
            Way::Cached => duty != Duty::Ring && self.copying < limits.copies,
            // Two threads that read a cold file through the page cache are slower than one.
            Way::Buffered => duty != Duty::Ring && self.buffered == 0 && fits,
        }
    }

    /// Takes the most urgent piece that may begin.
    fn turn(&mut self, duty: Duty, limits: &Limits) -> Turn {
        if self.ended {
            return Turn::End;
        }
        let now = Instant::now();
        let mut order: Vec<(u64, u64, usize)> = self
            .streams
            .iter()
            .enumerate()
            .filter(|(_, stream)| !stream.waiting.is_empty())
            .map(|(at, stream)| (stream.urgency.place(), stream.id.0, at))
            .collect();
        order.sort_unstable();
        let mut rest = None;
        for (_, _, at) in order {
            let Some(stream) = self.streams.get(at) else {
                continue;
            };
            let guessed = stream.urgency.is_prefetch();
            if guessed {
                rest = self
                    .prefetch_from
                    .and_then(|from| from.checked_duration_since(now))
                    .filter(|rest| !rest.is_zero());
                if self.prefetching > 0 || rest.is_some() {
                    break;
                }
            }
            let found = stream
                .waiting
                .iter()
                .position(|task| self.may_begin(task, duty, limits));
            let taken = found.and_then(|i| self.streams.get_mut(at)?.waiting.remove(i));
            if let Some(mut task) = taken {
                task.guessed = guessed;
                self.began(&task, now, limits);
                return Turn::Take(task);
            }
        }
        Turn::Wait(rest)
    }

    fn began(&mut self, task: &Task, now: Instant, limits: &Limits) {
        let bytes = task.piece.len() as u64;
        if task.guessed {
            self.prefetching += 1;
            if limits.prefetch_rate > 0 && task.way != Way::Cold {
                let pause = Duration::from_secs_f64(bytes as f64 / limits.prefetch_rate as f64);
                self.prefetch_from = Some(self.prefetch_from.unwrap_or(now).max(now) + pause);
            }
        }
        match task.way {
            Way::Cold => {}
            Way::Cached => {
                self.copying += 1;
                self.cached.begin(now);
            }
            Way::Direct => {
                self.in_flight += bytes;
                self.direct.begin(now);
            }
            Way::Buffered => {
                self.in_flight += bytes;
                self.buffered += 1;
            }
            Way::Again => self.in_flight += bytes,
        }
    }

    /// The counterpart of `began`.
    fn left(&mut self, task: &Task, now: Instant) {
        let bytes = task.piece.len() as u64;
        self.prefetching -= usize::from(task.guessed);
        match task.way {
            Way::Cold => {}
            Way::Cached => {
                self.copying -= 1;
                self.cached.end(now, task.done);
            }
            Way::Direct => {
                self.in_flight -= bytes;
                self.direct.end(now, task.done);
            }
            Way::Buffered => {
                self.in_flight -= bytes;
                self.buffered -= 1;
            }
            Way::Again => self.in_flight -= bytes,
        }
    }
}

impl Queue {
    pub(super) fn new(limits: Limits, wake_ring: Option<Waker>) -> Self {
        Self {
            state: Mutex::default(),
            work: Condvar::new(),
            wake_ring,
            limits,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock can panic half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        self.work.notify_all();
        if let Some(wake) = &self.wake_ring {
            wake();
        }
    }

    /// Wakes those who may have something to do now: nobody without need, since pieces come by the thousand. `by_ring`
    /// where the ring's own thread asks, which looks for itself.
    fn wake_for(&self, state: &State, by_ring: bool) {
        let (mut ring, mut pool) = (false, false);
        for task in state.streams.iter().flat_map(|stream| &stream.waiting) {
            let for_ring = task.way == Way::Direct && self.has_ring() && !state.lost_ring;
            ring |= for_ring;
            pool |= !for_ring;
        }
        if pool {
            self.work.notify_all();
        }
        if ring
            && !by_ring
            && let Some(wake) = &self.wake_ring
        {
            wake();
        }
    }

    pub(super) const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Whether direct reads go through a ring.
    pub(super) const fn has_ring(&self) -> bool {
        self.wake_ring.is_some()
    }

    /// A new component that will be read.
    pub(super) fn open(&self, urgency: Urgency) -> StreamId {
        let mut state = self.lock();
        state.next += 1;
        let id = StreamId(state.next);
        state.streams.push(Stream {
            id,
            urgency,
            waiting: VecDeque::new(),
        });
        id
    }

    /// Queues a piece of an open component.
    pub(super) fn push(&self, task: Task) {
        let mut state = self.lock();
        if let Some(index) = state.index_of(task.stream)
            && let Some(stream) = state.streams.get_mut(index)
        {
            stream.waiting.push_back(task);
            self.wake_for(&state, false);
        }
    }

    /// Forgets a component; gives how many of its pieces nobody had begun. Those under way are still read.
    pub(super) fn close(&self, id: StreamId) -> usize {
        let gone = {
            let mut state = self.lock();
            state
                .index_of(id)
                .map(|index| state.streams.swap_remove(index))
        };
        gone.map_or(0, |stream| stream.waiting.len())
    }

    /// Whether what is in the page cache is best taken from there.
    pub(super) fn prefers_cache(&self) -> bool {
        let mut state = self.lock();
        state.choices += 1;
        let cache = match (state.cached.rate(), state.direct.rate()) {
            (Some(cached), Some(direct)) => direct < cached * CLEARLY_FASTER,
            _ => true,
        };
        cache != state.choices.is_multiple_of(TRY_OTHER) || state.direct.rate().is_none()
    }

    /// The next piece for a thread with this duty, which counts as under way until [`end`](Self::end) or
    /// [`back`](Self::back).
    pub(super) fn turn(&self, duty: Duty) -> Turn {
        self.lock().turn(duty, &self.limits)
    }

    /// The same, but waits until there is one. `None` at the end.
    pub(super) fn wait_turn(&self, duty: Duty) -> Option<Task> {
        let mut state = self.lock();
        loop {
            state = match state.turn(duty, &self.limits) {
                Turn::Take(task) => return Some(task),
                Turn::End => return None,
                Turn::Wait(None) => self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Turn::Wait(Some(rest)) => {
                    self.work
                        .wait_timeout(state, rest)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
    }

    /// A piece is read, or failed for good.
    pub(super) fn end(&self, task: Task, result: Result<(), ReadError>) {
        {
            let mut state = self.lock();
            state.left(&task, Instant::now());
            let by_ring = task.way == Way::Direct && self.has_ring() && !state.lost_ring;
            self.wake_for(&state, by_ring);
        }
        answer(task, result);
    }

    /// A piece goes on another way. It keeps its place before the others of its component.
    pub(super) fn back(&self, mut task: Task, way: Way) {
        let orphan = {
            let mut state = self.lock();
            state.left(&task, Instant::now());
            task.way = way;
            let orphan = match state
                .index_of(task.stream)
                .and_then(|index| state.streams.get_mut(index))
            {
                Some(stream) => {
                    stream.waiting.push_front(task);
                    None
                }
                None => Some(task),
            };
            self.wake_for(&state, false);
            orphan
        };
        if let Some(task) = orphan {
            // Its component was closed, and counts the pieces that come back.
            let error = task.failed(std::io::ErrorKind::Interrupted.into());
            answer(task, Err(error));
        }
    }

    /// From now on the threads beside the ring read in its place.
    pub(super) fn lose_ring(&self) {
        self.lock().lost_ring = true;
        self.wake();
    }

    /// Ends all threads once they have done what they are at.
    pub(super) fn stop(&self) {
        self.lock().ended = true;
        self.wake();
    }
}

#[cfg(test)]
mod tests;
