//! Streams and events: each stream is a thread that copies in order, in its own time.

use std::collections::VecDeque;
use std::ffi::{c_uint, c_void};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use hotset_double_machine::{Call, Machine};

use crate::context::{current, gpu_of};
use crate::state::{Pending, State, state};
use crate::{
    Answer, Code, INVALID_HANDLE, NOT_PERMITTED, NOT_READY, answer, fault, host, memory, misuse,
    store,
};

/// How often waiting threads look whether the GPU broke meanwhile.
const LOOK: Duration = Duration::from_millis(1);

/// What a stream does next.
#[derive(Debug)]
enum Work {
    Copy {
        number: u64,
        to: u64,
        from: u64,
        bytes: u64,
    },
    Record(Arc<Event>),
    End,
}

/// A stream.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) gpu: usize,
    queue: Mutex<VecDeque<Work>>,
    more: Condvar,
}

/// An event.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) gpu: usize,
    /// Records that are on their way.
    waiting: Mutex<u32>,
    came: Condvar,
}

impl Stream {
    fn push(&self, work: Work) {
        self.queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(work);
        self.more.notify_one();
    }

    /// Ends the thread once it has done what is queued.
    pub(crate) fn end(&self) {
        self.push(Work::End);
    }

    fn run(&self, machine: &Machine) {
        loop {
            let work = {
                let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
                loop {
                    if let Some(work) = queue.pop_front() {
                        break work;
                    }
                    queue = self
                        .more
                        .wait(queue)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            };
            match work {
                Work::End => return,
                Work::Record(event) => {
                    *event.waiting.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
                    event.came.notify_all();
                }
                Work::Copy {
                    number,
                    to,
                    from,
                    bytes,
                } => {
                    self.wait_for_turn(machine, bytes);
                    // Under the lock, so that nothing is unmapped in the middle of it.
                    let mut state = state();
                    // A context that ended took its memory with it.
                    let there = state.pending.remove(&number).is_some()
                        && fault(machine, self.gpu).is_ok()
                        && !self.context_ended(&state)
                        && [to, from].iter().all(|at| still_there(&state, *at, bytes));
                    if there {
                        // SAFETY: both ranges were checked when the copy was queued, and are still in the books, which
                        // are locked.
                        unsafe {
                            std::ptr::copy(from as *const u8, to as *mut u8, bytes as usize);
                        }
                    }
                }
            }
        }
    }

    fn context_ended(&self, state: &State) -> bool {
        state.contexts[self.gpu].retained == 0
    }

    /// The link's time, and as long as the test holds copies back.
    fn wait_for_turn(&self, machine: &Machine, bytes: u64) {
        let gpu = machine.gpu(self.gpu);
        while gpu.hold_copies.load(SeqCst) != 0
            && fault(machine, self.gpu).is_ok()
            && !memory::take_one(&gpu.pass_copies)
        {
            std::thread::sleep(LOOK);
        }
        let mut time = Duration::from_nanos(gpu.latency_ns.load(SeqCst));
        let rate = gpu.bandwidth.load(SeqCst);
        if rate > 0 {
            time += Duration::from_secs_f64(bytes as f64 / rate as f64);
        }
        if !time.is_zero() {
            std::thread::sleep(time);
        }
    }
}

/// Whether nobody took a side of a copy away meanwhile. Who did has been reported.
fn still_there(state: &State, at: u64, bytes: u64) -> bool {
    State::containing(&state.mappings, |known| known.bytes, at, bytes).is_some()
        || State::containing(&state.registrations, |known| known.bytes, at, bytes).is_some()
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreate(to: *mut u64, _flags: c_uint) -> Code {
    answer(Call::cuStreamCreate, |machine| {
        let mut state = state();
        let gpu = current(machine, &state, "cuStreamCreate")?;
        fault(machine, gpu)?;
        let stream = Arc::new(Stream {
            gpu,
            queue: Mutex::default(),
            more: Condvar::new(),
        });
        let number = state.number();
        state.streams.insert(number, stream.clone());
        machine.process().streams.fetch_add(1, SeqCst);
        std::thread::spawn(move || stream.run(machine));
        store(machine, to, number)
    })
}

fn stream(machine: &Machine, state: &State, number: u64) -> Result<Arc<Stream>, Code> {
    state.streams.get(&number).cloned().ok_or_else(|| {
        misuse(
            machine,
            INVALID_HANDLE,
            format!("stream {number:#x} is used, but does not live"),
        )
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(number: u64) -> Code {
    answer(Call::cuStreamDestroy, |machine| {
        let mut state = state();
        let stream = stream(machine, &state, number)?;
        state.streams.remove(&number);
        machine.process().streams.fetch_sub(1, SeqCst);
        drop(state);
        stream.end();
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(number: u64) -> Code {
    answer(Call::cuStreamSynchronize, |machine| {
        let stream = stream(machine, &state(), number)?;
        let event = Arc::new(Event::new(stream.gpu));
        event.record(&stream);
        event.wait(machine)
    })
}

/// Queues a copy, once both sides were checked.
fn enqueue(
    machine: &Machine,
    mut state: std::sync::MutexGuard<'_, State>,
    on: u64,
    copy: Pending,
) -> Answer {
    let stream = stream(machine, &state, on)?;
    let number = state.number();
    let Pending {
        to, from, bytes, ..
    } = copy;
    state.pending.insert(number, copy);
    drop(state);
    stream.push(Work::Copy {
        number,
        to,
        from,
        bytes,
    });
    Ok(())
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, on: u64) -> Code {
    answer(Call::cuMemcpyHtoDAsync, |machine| {
        let (from, bytes, state) = (from as u64, bytes as u64, state());
        let gpu = current(machine, &state, "cuMemcpyHtoDAsync")?;
        fault(machine, gpu)?;
        memory::accessible(machine, &state, to, bytes, libc::PROT_WRITE)?;
        host::reachable(machine, &state, gpu, from, bytes)?;
        enqueue(
            machine,
            state,
            on,
            Pending {
                gpu,
                to,
                from,
                bytes,
            },
        )
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, on: u64) -> Code {
    answer(Call::cuMemcpyDtoHAsync, |machine| {
        let (to, bytes, state) = (to as u64, bytes as u64, state());
        let gpu = current(machine, &state, "cuMemcpyDtoHAsync")?;
        fault(machine, gpu)?;
        memory::accessible(machine, &state, from, bytes, libc::PROT_READ)?;
        host::reachable(machine, &state, gpu, to, bytes)?;
        enqueue(
            machine,
            state,
            on,
            Pending {
                gpu,
                to,
                from,
                bytes,
            },
        )
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyPeerAsync(
    to: u64,
    to_context: u64,
    from: u64,
    from_context: u64,
    bytes: usize,
    on: u64,
) -> Code {
    answer(Call::cuMemcpyPeerAsync, |machine| {
        let (bytes, state) = (bytes as u64, state());
        let gpu = gpu_of(machine, &state, to_context)?;
        for context in [to_context, from_context] {
            let gpu = gpu_of(machine, &state, context)?;
            fault(machine, gpu)?;
        }
        if machine.gpu(gpu).refuse_peer_copies.load(SeqCst) != 0 {
            return Err(NOT_PERMITTED);
        }
        memory::accessible(machine, &state, to, bytes, libc::PROT_WRITE)?;
        memory::accessible(machine, &state, from, bytes, libc::PROT_READ)?;
        enqueue(
            machine,
            state,
            on,
            Pending {
                gpu,
                to,
                from,
                bytes,
            },
        )
    })
}

impl Event {
    const fn new(gpu: usize) -> Self {
        Self {
            gpu,
            waiting: Mutex::new(0),
            came: Condvar::new(),
        }
    }

    fn record(self: &Arc<Self>, stream: &Stream) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        stream.push(Work::Record(self.clone()));
    }

    fn wait(&self, machine: &Machine) -> Answer {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        while *waiting > 0 {
            fault(machine, self.gpu)?;
            (waiting, _) = self
                .came
                .wait_timeout(waiting, LOOK)
                .unwrap_or_else(PoisonError::into_inner);
        }
        fault(machine, self.gpu)
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuEventCreate(to: *mut u64, _flags: c_uint) -> Code {
    answer(Call::cuEventCreate, |machine| {
        let mut state = state();
        let gpu = current(machine, &state, "cuEventCreate")?;
        fault(machine, gpu)?;
        let number = state.number();
        state.events.insert(number, Arc::new(Event::new(gpu)));
        machine.process().events.fetch_add(1, SeqCst);
        store(machine, to, number)
    })
}

fn event(machine: &Machine, state: &State, number: u64) -> Result<Arc<Event>, Code> {
    state.events.get(&number).cloned().ok_or_else(|| {
        misuse(
            machine,
            INVALID_HANDLE,
            format!("event {number:#x} is used, but does not live"),
        )
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(number: u64) -> Code {
    answer(Call::cuEventDestroy, |machine| {
        let mut state = state();
        event(machine, &state, number)?;
        state.events.remove(&number);
        machine.process().events.fetch_sub(1, SeqCst);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(number: u64, on: u64) -> Code {
    answer(Call::cuEventRecord, |machine| {
        let state = state();
        let event = event(machine, &state, number)?;
        let stream = stream(machine, &state, on)?;
        fault(machine, stream.gpu)?;
        drop(state);
        event.record(&stream);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(number: u64) -> Code {
    answer(Call::cuEventQuery, |machine| {
        let event = event(machine, &state(), number)?;
        fault(machine, event.gpu)?;
        match *event.waiting.lock().unwrap_or_else(PoisonError::into_inner) {
            0 => Ok(()),
            _ => Err(NOT_READY),
        }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(number: u64) -> Code {
    answer(Call::cuEventSynchronize, |machine| {
        let event = event(machine, &state(), number)?;
        event.wait(machine)
    })
}
