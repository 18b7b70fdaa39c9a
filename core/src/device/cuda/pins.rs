//! Host memory that the GPUs read by themselves: each mapping is registered with the driver once, at its first use, for
//! all GPUs, and unregistered before it is unmapped.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::ThreadId;
use std::time::Duration;

use super::driver::{Driver, Fault, Outcome};
use super::engine::{Control, Shared};
use super::worker::Worker;
use crate::machine::Machine;
use crate::memory::{HostRange, MappedRange, MappingId, MappingObserver};
use crate::units::MIB;

/// Smaller mappings go through pinned buffers: a registration costs more than copying them does.
pub(super) const SMALLEST: usize = MIB as usize;

/// How often one who waits for memory to be unregistered looks whether the driver still returns from its calls.
const LOOK: Duration = Duration::from_millis(50);

/// How often a lock is tried that is held for an instant, or else by a registration.
const TRIES: u32 = 100;

/// All registered mappings of the process.
#[derive(Debug, Default)]
pub(super) struct Pins {
    slots: Mutex<HashMap<MappingId, Arc<Slot>>>,
}

#[derive(Debug)]
struct Slot {
    range: MappedRange,
    state: Mutex<Option<Pin>>,
}

#[derive(Debug)]
enum Pin {
    Registered(Registered),
    /// The driver does not want it; it is not asked again.
    Refused,
}

#[derive(Debug)]
struct Registered {
    /// The engine in whose context it was registered.
    engine: u64,
    control: Worker<Control>,
    shared: Arc<Shared>,
    thread: ThreadId,
    driver: Arc<Driver>,
}

impl Slot {
    /// The state, where no thread is in the middle of registering; that takes as long as the driver likes.
    fn try_lock(&self) -> Option<MutexGuard<'_, Option<Pin>>> {
        match self.state.try_lock() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

impl Registered {
    fn end(&self, range: MappedRange) {
        if let Err(fault) = self.driver.unregister(range.address) {
            tracing::error!(?range, ?fault, "cannot unregister host memory");
        }
    }
}

impl Pins {
    fn slot(self: &Arc<Self>, from: &HostRange) -> Arc<Slot> {
        let range = from.mapping();
        let (slot, new) = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            let before = slots.len();
            let slot = slots.entry(range.mapping).or_insert_with(|| {
                Arc::new(Slot {
                    range,
                    state: Mutex::new(None),
                })
            });
            (slot.clone(), slots.len() > before)
        };
        if new {
            from.observe(self.clone());
        }
        slot
    }

    /// Whether this memory is registered or not, where that is known already.
    pub(super) fn known(self: &Arc<Self>, from: &HostRange) -> Option<bool> {
        if from.mapping().bytes < SMALLEST {
            return Some(false);
        }
        let slot = self.slot(from);
        let state = slot.try_lock()?;
        state.as_ref().map(|pin| matches!(pin, Pin::Registered(_)))
    }

    /// Registers the mapping of `from` in the context of this engine, on whose thread this runs; gives whether it is
    /// registered now. While the thread of another GPU is about it, it is not: its driver may hang.
    pub(super) fn register(self: &Arc<Self>, from: &HostRange, control: &Control) -> Outcome<bool> {
        let slot = self.slot(from);
        let Some(mut state) = slot.try_lock() else {
            return Ok(false);
        };
        if let Some(pin) = &*state {
            return Ok(matches!(pin, Pin::Registered(_)));
        }
        let driver = control.driver();
        let pin = match driver.register(slot.range.address, slot.range.bytes) {
            Ok(()) => Pin::Registered(Registered {
                engine: control.engine(),
                control: control.worker(),
                shared: control.shared().clone(),
                thread: std::thread::current().id(),
                driver: driver.clone(),
            }),
            Err(fault) if fault.is_fatal() => return Err(fault),
            Err(Fault { call, name, .. }) => {
                let lockable = Machine::lockable().map(|bytes| bytes.to_string());
                tracing::warn!(
                    call,
                    %name,
                    bytes = slot.range.bytes,
                    lockable,
                    "host memory cannot be registered, and uploads from it go through pinned buffers; where `lockable` is \
                     small, raise it (ulimit -l)"
                );
                Pin::Refused
            }
        };
        let registered = matches!(pin, Pin::Registered(_));
        *state = Some(pin);
        Ok(registered)
    }

    /// An engine ends: what was registered in its context is registered no more. Runs on its thread, in its context.
    pub(super) fn forget(&self, engine: u64) {
        let slots: Vec<Arc<Slot>> = {
            let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            slots.values().cloned().collect()
        };
        for slot in slots {
            let locked = (0..TRIES).find_map(|_| {
                let state = slot.try_lock();
                if state.is_none() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                state
            });
            // Another engine is registering it, so it is not this one's.
            let Some(mut state) = locked else {
                continue;
            };
            if let Some(Pin::Registered(pin)) = &*state
                && pin.engine == engine
            {
                pin.end(slot.range);
                *state = None;
            }
        }
    }
}

impl MappingObserver for Pins {
    fn unmapping(&self, range: MappedRange) {
        let slot = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            slots.remove(&range.mapping)
        };
        let pin = slot.and_then(|slot| {
            slot.state
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take()
        });
        let Some(Pin::Registered(pin)) = pin else {
            return;
        };
        if std::thread::current().id() == pin.thread {
            pin.end(range);
            return;
        }
        // The addresses may be somebody else's as soon as this returns, so it waits; an engine that has ended has
        // unregistered everything. One that hangs is not waited for, and must not do it later.
        let (done, wait) = std::sync::mpsc::channel();
        let (control, shared) = (pin.control.clone(), pin.shared.clone());
        let taken = Arc::new(AtomicBool::new(false));
        let by_thread = taken.clone();
        control.tell(move |_| {
            if !by_thread.swap(true, Ordering::AcqRel) {
                pin.end(range);
            }
            let _ = done.send(());
        });
        while let Err(RecvTimeoutError::Timeout) = wait.recv_timeout(LOOK) {
            if shared.hangs().is_some() {
                taken.store(true, Ordering::Release);
                tracing::error!(
                    ?range,
                    "host memory stays registered with a driver that hangs"
                );
                return;
            }
        }
    }
}
