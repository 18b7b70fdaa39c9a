//! Host memory that the GPUs read by themselves: each mapping is registered with the driver once, at its first use, for
//! all GPUs, and unregistered before it is unmapped.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ThreadId;

use super::driver::{Driver, Fault, Outcome};
use super::engine::Control;
use super::worker::Worker;
use crate::memory::{HostRange, MappedRange, MappingId, MappingObserver};
use crate::units::MIB;

/// Smaller mappings go through pinned buffers: a registration costs more than copying them does.
pub(super) const SMALLEST: usize = MIB as usize;

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
    thread: ThreadId,
    driver: Arc<Driver>,
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
        let state = slot.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.as_ref().map(|pin| matches!(pin, Pin::Registered(_)))
    }

    /// Registers the mapping of `from` in the context of this engine, on whose thread this runs; gives whether it is
    /// registered now.
    pub(super) fn register(self: &Arc<Self>, from: &HostRange, control: &Control) -> Outcome<bool> {
        let slot = self.slot(from);
        let mut state = slot.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pin) = &*state {
            return Ok(matches!(pin, Pin::Registered(_)));
        }
        let driver = control.driver();
        let pin = match driver.register(slot.range.address, slot.range.bytes) {
            Ok(()) => Pin::Registered(Registered {
                engine: control.engine(),
                control: control.worker(),
                thread: std::thread::current().id(),
                driver: driver.clone(),
            }),
            Err(fault) if fault.is_fatal() => return Err(fault),
            Err(Fault { call, name, .. }) => {
                tracing::warn!(
                    call,
                    %name,
                    bytes = slot.range.bytes,
                    "host memory cannot be registered; uploads from it go through pinned buffers"
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
            let mut state = slot.state.lock().unwrap_or_else(PoisonError::into_inner);
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
        // unregistered everything.
        let (done, wait) = std::sync::mpsc::channel();
        let control = pin.control.clone();
        control.tell(move |_| {
            pin.end(range);
            let _ = done.send(());
        });
        let _ = wait.recv();
    }
}
