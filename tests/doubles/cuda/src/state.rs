//! What the driver knows of this process.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use hotset_double_machine::{MAX_GPUS, Machine};

use crate::stream::{Event, Stream};

/// The machine, where the environment names one.
pub(crate) fn machine() -> Option<&'static Machine> {
    static MACHINE: OnceLock<Option<Machine>> = OnceLock::new();
    MACHINE.get_or_init(Machine::of_environment).as_ref()
}

/// A handle of physical memory.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) gpu: usize,
    pub(crate) bytes: u64,
    pub(crate) memfd: Arc<OwnedFd>,
    pub(crate) inode: u64,
}

/// A reserved range of addresses.
#[derive(Debug)]
pub(crate) struct Reservation {
    pub(crate) bytes: u64,
}

/// Physical memory at an address.
#[derive(Debug)]
pub(crate) struct Mapping {
    pub(crate) bytes: u64,
    pub(crate) gpu: usize,
    pub(crate) inode: u64,
    /// `PROT_*` bits that were granted.
    pub(crate) access: i32,
}

/// Host memory that the GPU may reach by itself.
#[derive(Debug)]
pub(crate) struct Registration {
    pub(crate) bytes: u64,
    /// Memory that the driver allocated.
    pub(crate) owned: bool,
    /// Whether it is registered for all GPUs.
    pub(crate) portable: bool,
    /// What was mapped there when it was registered.
    pub(crate) backing: Option<String>,
    pub(crate) gpu: usize,
}

/// A primary context.
#[derive(Debug, Default)]
pub(crate) struct Context {
    pub(crate) retained: u32,
    /// Goes up with each life of the context, so that a handle of an earlier one is known.
    pub(crate) generation: u32,
}

/// A copy that has not ended.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) gpu: usize,
    pub(crate) to: u64,
    pub(crate) from: u64,
    pub(crate) bytes: u64,
}

/// Everything.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) initialised: bool,
    pub(crate) next: u64,
    pub(crate) contexts: [Context; MAX_GPUS],
    pub(crate) handles: HashMap<u64, Handle>,
    pub(crate) reservations: BTreeMap<u64, Reservation>,
    pub(crate) mappings: BTreeMap<u64, Mapping>,
    pub(crate) registrations: BTreeMap<u64, Registration>,
    pub(crate) streams: HashMap<u64, Arc<Stream>>,
    pub(crate) events: HashMap<u64, Arc<Event>>,
    pub(crate) pending: HashMap<u64, Pending>,
}

impl State {
    pub(crate) fn number(&mut self) -> u64 {
        self.next += 1;
        // Looks like no pointer and no small integer.
        0x00d0_0000 + self.next * 16
    }

    /// A copy that touches this range and has not ended.
    pub(crate) fn pending_in(&self, start: u64, bytes: u64) -> Option<&Pending> {
        let overlaps = |at: u64, n: u64| at < start + bytes && start < at + n;
        self.pending
            .values()
            .find(|copy| overlaps(copy.to, copy.bytes) || overlaps(copy.from, copy.bytes))
    }

    /// The entry of `map` that contains all of this range.
    pub(crate) fn containing<T>(
        map: &BTreeMap<u64, T>,
        size: impl Fn(&T) -> u64,
        start: u64,
        bytes: u64,
    ) -> Option<(u64, &T)> {
        let (at, entry) = map.range(..=start).next_back()?;
        (start.checked_add(bytes)? <= at + size(entry)).then_some((*at, entry))
    }

    /// Whether an entry of `map` touches this range.
    pub(crate) fn touches<T>(
        map: &BTreeMap<u64, T>,
        size: impl Fn(&T) -> u64,
        start: u64,
        bytes: u64,
    ) -> bool {
        map.range(..start + bytes)
            .next_back()
            .is_some_and(|(at, entry)| at + size(entry) > start)
    }
}

/// The state, locked.
pub(crate) fn state() -> MutexGuard<'static, State> {
    static STATE: OnceLock<Mutex<State>> = OnceLock::new();
    STATE
        .get_or_init(Mutex::default)
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    /// The context that is current on this thread, as its handle.
    pub(crate) static CURRENT: Cell<u64> = const { Cell::new(0) };
}
