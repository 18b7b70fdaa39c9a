//! Host memory that the GPUs read by themselves: each mapping is registered with the driver once, at its first use, for
//! all GPUs, and unregistered before it is unmapped.
//!
//! A registration for all GPUs lives in the context of one of them, and ends with it. So a copy holds a [`Pinned`] as long as it lasts,
//! an engine that ends waits for the copies of the others, and what it cannot unregister on a GPU that is lost is used by nobody
//! until its context is gone. Where the memory goes before that, its addresses are withheld: other memory that came to lie
//! there could be registered by nobody.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use super::driver::{Driver, Fault, Outcome};
use super::engine::{Control, Shared};
use super::worker::Worker;
use crate::ids::GpuIndex;
use crate::machine::Machine;
use crate::memory::{Addresses, HostRange, MappedRange, MappingId, MappingObserver, Unmapping};
use crate::units::MIB;

/// Smaller mappings go through pinned buffers: a registration costs more than copying them does.
pub(super) const SMALLEST: usize = MIB as usize;

/// How often one who waits for memory to be unregistered looks whether the driver still returns from its calls.
const LOOK: Duration = Duration::from_millis(50);

/// How long an engine that ends waits for copies of others from what was registered in its context. One of them may hang.
const COPIES_END: Duration = Duration::from_secs(2);

/// How often a lock is tried that is held for an instant, or else by a registration.
const TRIES: u32 = 100;

/// All registered mappings of the process.
#[derive(Debug, Default)]
pub(super) struct Pins {
    slots: Mutex<HashMap<MappingId, Arc<Slot>>>,
    withheld: Mutex<Withheld>,
}

/// Memory that went while a GPU had it registered.
#[derive(Debug, Default)]
struct Withheld {
    /// With its addresses, once they are withheld.
    memory: HashMap<MappingId, (GpuIndex, Option<Arc<Addresses>>)>,
    /// How many contexts of each GPU are gone.
    gone: BTreeMap<GpuIndex, u64>,
}

#[derive(Debug)]
struct Slot {
    range: MappedRange,
    state: Mutex<Option<Pin>>,
    /// Whose engine is undoing the registration now, since it ends. Nobody unmaps what is being registered: whoever does that holds
    /// the memory.
    ending: Mutex<Option<Arc<Shared>>>,
    /// One more holder for each copy that relies on the registration.
    copies: Arc<()>,
}

#[derive(Debug)]
enum Pin {
    Registered(Registered),
    /// The driver does not want it; it is not asked again.
    Refused,
    /// Its engine has ended, and this GPU could not undo it: it is there until the context is gone.
    Stranded(GpuIndex),
}

/// Host memory that every GPU reads by itself, as long as this lives.
#[derive(Debug, Clone)]
pub(super) struct Pinned {
    _copies: Arc<()>,
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

    /// The same, where a lock that is held for an instant is waited for.
    fn lock_soon(&self) -> Option<MutexGuard<'_, Option<Pin>>> {
        (0..TRIES).find_map(|_| {
            let state = self.try_lock();
            if state.is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
            state
        })
    }

    fn ending(&self, by: Option<&Arc<Shared>>) {
        let mut ending = self.ending.lock().unwrap_or_else(PoisonError::into_inner);
        *ending = by.cloned();
    }

    /// Takes the state, where no engine is in the middle of ending; the GPU whose driver hangs in that is an error.
    fn take(&self) -> Result<Option<Pin>, GpuIndex> {
        loop {
            if let Some(mut state) = self.lock_soon() {
                return Ok(state.take());
            }
            let ending = self.ending.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(by) = ending.as_ref().filter(|by| by.hangs().is_some()) {
                return Err(by.gpu);
            }
        }
    }

    /// For a copy, under the lock of the state.
    fn pinned(&self, pin: &Pin) -> Option<Pinned> {
        match pin {
            Pin::Registered(_) => Some(Pinned {
                _copies: self.copies.clone(),
            }),
            Pin::Refused | Pin::Stranded(_) => None,
        }
    }
}

impl Registered {
    /// Gives whether it is registered no more.
    fn end(&self, range: MappedRange) -> bool {
        let ended = self.driver.unregister(range.address);
        match &ended {
            // The GPU is lost, which others report; its context takes the registration with it.
            Err(fault) if fault.is_fatal() => tracing::debug!(?range, %fault, "still registered"),
            Err(fault) => tracing::error!(?range, %fault, "cannot unregister host memory"),
            Ok(()) => {}
        }
        ended.is_ok()
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
                    ending: Mutex::new(None),
                    copies: Arc::default(),
                })
            });
            (slot.clone(), slots.len() > before)
        };
        if new {
            from.observe(self.clone());
        }
        slot
    }

    /// This memory for a copy, and `None` where it goes through buffers; nothing at all where that is not known yet.
    pub(super) fn known(self: &Arc<Self>, from: &HostRange) -> Option<Option<Pinned>> {
        if from.mapping().bytes < SMALLEST {
            return Some(None);
        }
        let slot = self.slot(from);
        let state = slot.try_lock()?;
        state.as_ref().map(|pin| slot.pinned(pin))
    }

    /// Registers the mapping of `from` in the context of this engine, on whose thread this runs; gives it for a copy where it is
    /// registered now. While the thread of another GPU is about it, it is not: its driver may hang.
    pub(super) fn register(
        self: &Arc<Self>,
        from: &HostRange,
        control: &Control,
    ) -> Outcome<Option<Pinned>> {
        let slot = self.slot(from);
        let Some(mut state) = slot.try_lock() else {
            return Ok(None);
        };
        if let Some(pin) = &*state {
            return Ok(slot.pinned(pin));
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
        Ok(slot.pinned(state.insert(pin)))
    }

    fn all(&self) -> Vec<Arc<Slot>> {
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.values().cloned().collect()
    }

    /// An engine ends: what was registered in its context is registered no more. Runs on its thread, in its context.
    pub(super) fn forget(&self, engine: u64) {
        let until = Instant::now() + COPIES_END;
        for slot in self.all() {
            // Another engine is registering it, so it is not this one's.
            let Some(mut state) = slot.lock_soon() else {
                continue;
            };
            let Some(Pin::Registered(pin)) = &*state else {
                continue;
            };
            if pin.engine != engine {
                continue;
            }
            slot.ending(Some(&pin.shared));
            // No copy begins while the lock is held.
            while Arc::strong_count(&slot.copies) > 1 && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            *state = match pin.end(slot.range) {
                true => None,
                false => Some(Pin::Stranded(pin.shared.gpu)),
            };
            slot.ending(None);
        }
    }

    /// The context of an engine that has ended is gone, and all registrations in it.
    pub(super) fn context_gone(&self, gpu: GpuIndex) {
        for slot in self.all() {
            if let Some(mut state) = slot.lock_soon()
                && matches!(&*state, Some(Pin::Stranded(of)) if *of == gpu)
            {
                *state = None;
            }
        }
        let mut withheld = self.withheld();
        *withheld.gone.entry(gpu).or_default() += 1;
        let gone: Vec<_> = withheld
            .memory
            .extract_if(|_, (of, _)| *of == gpu)
            .collect();
        drop(withheld);
        // Unmapping takes its time.
        drop(gone);
    }

    fn withheld(&self) -> MutexGuard<'_, Withheld> {
        self.withheld.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Undoes a registration, before its memory goes. The GPU that has it registered still is an error.
    fn undo(pin: Registered, range: MappedRange) -> Result<(), GpuIndex> {
        let gpu = pin.shared.gpu;
        if std::thread::current().id() == pin.thread {
            return pin.end(range).then_some(()).ok_or(gpu);
        }
        // An engine that hangs is not waited for, and must not do it later.
        let (done, wait) = std::sync::mpsc::channel();
        let (control, shared) = (pin.control.clone(), pin.shared.clone());
        let taken = Arc::new(AtomicBool::new(false));
        let by_thread = taken.clone();
        control.tell(move |_| {
            if !by_thread.swap(true, Ordering::AcqRel) {
                let _ = done.send(pin.end(range));
            }
        });
        loop {
            match wait.recv_timeout(LOOK) {
                Ok(ended) => return ended.then_some(()).ok_or(gpu),
                // The engine has ended, and its context may not be gone yet.
                Err(RecvTimeoutError::Disconnected) => return Err(gpu),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if shared.hangs().is_some() {
                taken.store(true, Ordering::Release);
                return Err(gpu);
            }
        }
    }
}

impl MappingObserver for Pins {
    fn unmapping(&self, range: MappedRange) -> Unmapping {
        let before = self.withheld().gone.clone();
        let slot = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            slots.remove(&range.mapping)
        };
        // The addresses may be somebody else's as soon as this returns, so it waits.
        let undone = match slot.map_or(Ok(None), |slot| slot.take()) {
            Ok(Some(Pin::Registered(pin))) => Self::undo(pin, range),
            Ok(Some(Pin::Stranded(gpu))) | Err(gpu) => Err(gpu),
            Ok(Some(Pin::Refused) | None) => Ok(()),
        };
        let Err(gpu) = undone else {
            return Unmapping::Free;
        };
        let mut withheld = self.withheld();
        if withheld.gone.get(&gpu) != before.get(&gpu) {
            // With its context.
            return Unmapping::Free;
        }
        withheld.memory.insert(range.mapping, (gpu, None));
        drop(withheld);
        tracing::warn!(?range, %gpu, "host memory stays registered with a GPU that is lost; its addresses are withheld");
        Unmapping::Withhold
    }

    fn withheld(&self, mapping: MappingId, addresses: Arc<Addresses>) {
        // Else the context has gone meanwhile.
        if let Some((_, kept)) = Self::withheld(self).memory.get_mut(&mapping) {
            *kept = Some(addresses);
        }
    }
}
