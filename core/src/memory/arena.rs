//! Host memory that is kept warm: what a slab leaves behind serves the next one.
//!
//! Fresh memory costs more than the read that fills it: each page is found, zeroed and entered into the page table, and
//! a virtual machine has to ask its host for it besides. So memory that a slab gives back stays mapped, and is found
//! again by segregated fits: lengths come in steps of at most an eighth, a slab takes the shortest mapping that fits,
//! and what the mapping has beyond the slab goes back to the system. No mapping is ever split or joined, so nothing
//! fragments: whatever is not in use can always be given back whole.
//!
//! A mapping is used again only when nobody else has it: not while any process has a descriptor of it or maps it. Until
//! then it *lingers*, and counts as used.

use std::sync::{Arc, PoisonError, Weak};
use std::time::Instant;

use serde::Serialize;

use super::mapping::{HUGE_FROM, HUGE_PAGE, Mapping, Pages, Withheld};
use super::slab::{Slab, SlabError};
use super::writer::SlabWriter;
use crate::machine::{Machine, NumaNode};
use crate::sync::{Mutex, MutexGuard};
use crate::units::{Bytes, KIB};

/// Lengths are at least this far apart; less would not be worth a mapping of its own.
const SMALLEST_STEP: u64 = 64 * KIB;
/// Lengths between two powers of two: a mapping is at most an eighth longer than its first slab.
const STEPS: u64 = 8;
/// Mappings that are kept warm at most, since each one is a descriptor.
const MAX_WARM: usize = 512;

/// How an arena takes memory.
#[derive(Clone, Debug)]
pub struct ArenaOptions {
    /// The most memory that the arena holds: slabs, what lingers, and what is kept warm. Where slabs alone need more, they
    /// get it, and nothing is kept warm.
    pub limit: Bytes,
    /// The most memory that is kept warm for slabs to come.
    pub keep_warm: Bytes,
    /// Whether to take reserved huge pages where there are some.
    pub hugetlb: bool,
    /// What the machine has, asked before fresh memory is taken. `None`: take it unasked.
    pub machine: Option<Machine>,
}

impl Default for ArenaOptions {
    fn default() -> Self {
        Self {
            limit: Bytes(u64::MAX),
            keep_warm: Bytes(u64::MAX),
            hugetlb: true,
            machine: None,
        }
    }
}

/// What an arena holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ArenaView {
    /// Memory of slabs that are in use.
    pub live: Bytes,
    /// Memory that is kept for slabs to come.
    pub warm: Bytes,
    /// Memory of slabs that are gone, but that another process still has, or a GPU that is lost.
    pub lingering: Bytes,
    /// All mappings behind these: so many memfds are open, and for each that was handed out one descriptor more.
    pub mappings: usize,
    /// Slabs that were made on warm memory, since the start.
    pub reused: u64,
    /// Slabs that were made on fresh memory, since the start.
    pub fresh: u64,
    /// The pages that memory is on where no huge pages are reserved.
    pub pages: Pages,
}

/// See the module's page. Cheap to clone; all clones are one arena.
#[derive(Clone, Debug)]
pub struct Arena {
    shared: Arc<Shared>,
}

/// The way of a slab's memory back to its arena, which lives as long as any slab of it.
#[derive(Debug)]
pub(super) struct Home(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    pages: Pages,
    hugetlb: bool,
    machine: Option<Machine>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    limit: Bytes,
    keep_warm: Bytes,
    live: Bytes,
    /// Mappings of slabs that are in use.
    live_mappings: usize,
    /// Ready for use, by length.
    warm: Vec<Kept>,
    /// Not ours alone yet.
    lingering: Vec<Kept>,
    /// Registered with a GPU that is lost, until its context is gone.
    withheld: Withheld,
    /// Others need memory: nothing is kept warm.
    pressed: bool,
    /// Slabs on fresh memory that may not be filled yet: what they still need is not free, though nobody has it.
    filling: Vec<Weak<Slab>>,
    reused: u64,
    fresh: u64,
}

#[derive(Debug)]
struct Kept {
    mapping: Mapping,
    since: Instant,
}

fn held(kept: &[Kept]) -> Bytes {
    kept.iter().map(|kept| kept.mapping.held()).sum()
}

/// The length of the mapping for a slab of this many bytes.
fn class_of(bytes: u64) -> u64 {
    let bytes = bytes.max(1);
    // The highest power of two that is not above it.
    let octave = 1 << bytes.ilog2();
    bytes
        .checked_next_multiple_of((octave / STEPS).max(SMALLEST_STEP))
        .unwrap_or(bytes)
}

impl State {
    /// Puts a mapping to those that wait for a slab.
    fn keep(&mut self, mapping: Mapping) {
        let place = self
            .warm
            .partition_point(|kept| kept.mapping.len() < mapping.len());
        self.warm.insert(
            place,
            Kept {
                mapping,
                since: Instant::now(),
            },
        );
    }

    /// Moves what nobody else has any more from the lingering to the warm.
    fn reclaim(&mut self) {
        let (alone, others): (Vec<_>, Vec<_>) = std::mem::take(&mut self.lingering)
            .into_iter()
            .partition(|kept| kept.mapping.is_alone());
        self.lingering = others;
        for kept in alone {
            self.keep(kept.mapping);
        }
    }

    /// Takes out what is warm beyond `most`, longest unused first, for the caller to drop without the lock.
    fn surplus(&mut self, most: Bytes) -> Vec<Mapping> {
        let mut gone = Vec::new();
        let mut warm = held(&self.warm);
        while warm > most || self.warm.len() > MAX_WARM {
            let oldest = (0..self.warm.len()).min_by_key(|i| self.warm.get(*i).map(|k| k.since));
            let Some(oldest) = oldest else { break };
            let mapping = self.warm.remove(oldest).mapping;
            warm = warm.saturating_sub(mapping.held());
            gone.push(mapping);
        }
        gone
    }

    /// What may be kept warm beside slabs and `more` bytes to come.
    fn warm_room(&self, more: Bytes) -> Bytes {
        if self.pressed {
            return Bytes::ZERO;
        }
        self.limit
            .saturating_sub(self.live)
            .saturating_sub(held(&self.lingering))
            .saturating_sub(self.withheld.bytes())
            .saturating_sub(more)
            .min(self.keep_warm)
    }

    /// The shortest warm mapping for a slab of `bytes`, made to fit.
    fn find(
        &mut self,
        bytes: usize,
        most: usize,
        near: Option<NumaNode>,
        gone: &mut Vec<Mapping>,
    ) -> Option<Mapping> {
        let from = self.warm.partition_point(|kept| kept.mapping.len() < bytes);
        let at = self
            .warm
            .iter()
            .skip(from)
            .take_while(|kept| kept.mapping.len() <= most)
            .position(|kept| {
                kept.mapping.suits(bytes) && (near.is_none() || kept.mapping.near() == near)
            })?;
        let mut mapping = self.warm.remove(from + at).mapping;
        if mapping.fit(bytes) {
            return Some(mapping);
        }
        gone.push(mapping);
        None
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock can panic half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Home {
    pub(super) fn take_back(&self, mapping: Mapping) {
        let shared = &self.0;
        let gone = {
            let mut state = shared.lock();
            state.live = state.live.saturating_sub(mapping.held());
            state.live_mappings = state.live_mappings.saturating_sub(1);
            if mapping.is_alone() {
                state.keep(mapping);
            } else {
                state.lingering.push(Kept {
                    mapping,
                    since: Instant::now(),
                });
            }
            let room = state.warm_room(Bytes::ZERO);
            state.surplus(room)
        };
        drop(gone);
    }
}

impl Arena {
    /// An arena without memory yet.
    #[must_use]
    pub fn new(options: ArenaOptions) -> Self {
        Self {
            shared: Arc::new(Shared {
                pages: Pages::of_shared_memory(),
                hugetlb: options.hugetlb,
                machine: options.machine,
                state: Mutex::new(State {
                    limit: options.limit,
                    keep_warm: options.keep_warm,
                    live: Bytes::ZERO,
                    live_mappings: 0,
                    warm: Vec::new(),
                    lingering: Vec::new(),
                    withheld: Withheld::default(),
                    pressed: false,
                    filling: Vec::new(),
                    reused: 0,
                    fresh: 0,
                }),
            }),
        }
    }

    /// A slab of this many bytes with its one writer, on warm memory where there is some of its size. May unmap other
    /// warm memory to stay within the limit, which takes long: call it where blocking is allowed.
    ///
    /// # Errors
    /// [`SlabError::Allocate`] where the system has no more memory or descriptors.
    pub fn slab(&self, label: &str, bytes: Bytes) -> Result<SlabWriter, SlabError> {
        self.slab_near(label, bytes, None)
    }

    /// The same at a node of memory, for a GPU that is there. Without one, wherever there is warm memory.
    ///
    /// # Errors
    /// As [`slab`](Self::slab).
    pub fn slab_near(
        &self,
        label: &str,
        bytes: Bytes,
        near: Option<NumaNode>,
    ) -> Result<SlabWriter, SlabError> {
        let refused = || SlabError::Allocate {
            bytes,
            step: "size",
            error: rustix::io::Errno::NOMEM,
        };
        let len = usize::try_from(bytes.get()).map_err(|_| refused())?;
        let class = usize::try_from(class_of(bytes.get())).map_err(|_| refused())?;
        // A mapping one step longer than this slab's own is still no waste of warm memory.
        let most = class + class / STEPS as usize;
        let most = if class as u64 >= HUGE_PAGE {
            most.next_multiple_of(HUGE_PAGE as usize)
        } else {
            most
        };
        let (found, gone) = {
            let mut state = self.shared.lock();
            state.reclaim();
            let mut gone = Vec::new();
            let found = state.find(len, most, near, &mut gone);
            let mut taken = Bytes::ZERO;
            if let Some(mapping) = &found {
                taken = mapping.held();
                state.reused += 1;
                state.live += taken;
                state.live_mappings += 1;
            }
            let room = state.warm_room(bytes.saturating_sub(taken));
            gone.extend(state.surplus(room));
            (found, gone)
        };
        // Without the lock, since to unmap gigabytes takes long.
        drop(gone);
        let fresh = found.is_none();
        let mapping = match found {
            Some(mapping) => mapping,
            None => self.fresh(label, len, class, near)?,
        };
        let writer = Slab::on(mapping, len, Some(Home(self.shared.clone())));
        if fresh {
            let mut state = self.shared.lock();
            state.filling.retain(|slab| slab.strong_count() > 0);
            state.filling.push(Arc::downgrade(writer.slab()));
        }
        Ok(writer)
    }

    /// Makes sure that the machine has this much and its reserve; gives warm memory back where it has not.
    fn ask_machine(&self, bytes: Bytes) -> Result<(), SlabError> {
        let Some(machine) = &self.shared.machine else {
            return Ok(());
        };
        let mut released = false;
        loop {
            let Some(host) = machine.memory() else {
                return Ok(());
            };
            // What others here have begun to fill is as good as gone.
            let filling: Vec<Arc<Slab>> = {
                let state = self.shared.lock();
                state.filling.iter().filter_map(Weak::upgrade).collect()
            };
            let promised: Bytes = filling.iter().map(|slab| slab.unfilled()).sum();
            drop(filling);
            let room = host
                .room()
                .saturating_sub(host.reserve())
                .saturating_sub(promised);
            if bytes <= room {
                return Ok(());
            }
            if released || self.release(Bytes::ZERO).is_zero() {
                return Err(SlabError::NoRoom {
                    bytes,
                    room,
                    reserve: host.reserve(),
                });
            }
            released = true;
        }
    }

    fn fresh(
        &self,
        label: &str,
        bytes: usize,
        class: usize,
        near: Option<NumaNode>,
    ) -> Result<Mapping, SlabError> {
        self.ask_machine(Bytes(bytes as u64))?;
        let mut mapping = self.map_of_any(label, class)?.placed(near);
        mapping.fit(bytes);
        let mut state = self.shared.lock();
        state.fresh += 1;
        state.live += mapping.held();
        state.live_mappings += 1;
        Ok(mapping)
    }

    /// A new mapping; where descriptors have run out, those of warm memory are given up for it.
    fn map_of_any(&self, label: &str, class: usize) -> Result<Mapping, SlabError> {
        use rustix::io::Errno;
        match self.map(label, class) {
            Err(SlabError::Allocate {
                error: Errno::MFILE | Errno::NFILE,
                ..
            }) if !self.release(Bytes::ZERO).is_zero() => self.map(label, class),
            mapped => mapped,
        }
    }

    /// A new mapping on the best pages that there are.
    fn map(&self, label: &str, class: usize) -> Result<Mapping, SlabError> {
        let withheld = self.shared.lock().withheld.clone();
        self.map_on_best(label, class)
            .map(|mapping| mapping.counted(&withheld))
    }

    fn map_on_best(&self, label: &str, class: usize) -> Result<Mapping, SlabError> {
        if (class as u64) < HUGE_FROM {
            // Pages that are collapsed waste nothing, however small the slab is.
            if self.shared.pages == Pages::Collapsed && class as u64 >= HUGE_PAGE {
                // Room for a huge page at the end of the slab as well.
                let len = class.next_multiple_of(HUGE_PAGE as usize);
                return Mapping::create(label, len, Pages::Collapsed);
            }
            return Mapping::create(label, class, Pages::Small);
        }
        if self.shared.hugetlb && reserved_huge_pages() > 0 {
            match Mapping::create(label, class, Pages::Hugetlb) {
                Ok(mapping) => return Ok(mapping),
                // Not enough of them: the others will do.
                Err(error) => tracing::debug!(%error, "no reserved huge pages for a slab"),
            }
        }
        Mapping::create(label, class, self.shared.pages)
    }

    /// Makes memory warm for a slab of this many bytes to come. Blocks for as long as the system takes to find it; looks
    /// at `wanted` on the way. Gives whether it is there: not where it would pass the limit.
    ///
    /// # Errors
    /// [`SlabError::Allocate`].
    pub fn prewarm(&self, bytes: Bytes, wanted: &dyn Fn() -> bool) -> Result<bool, SlabError> {
        const STEP: usize = 32 << 20;
        let Ok(len) = usize::try_from(bytes.get()) else {
            return Ok(false);
        };
        let room = {
            let state = self.shared.lock();
            state
                .warm_room(Bytes::ZERO)
                .saturating_sub(held(&state.warm))
        };
        if bytes > room || self.ask_machine(bytes).is_err() {
            return Ok(false);
        }
        let class = usize::try_from(class_of(bytes.get())).unwrap_or(len);
        let mut mapping = self.map("hotset-warm", class)?;
        mapping.fit(len);
        let mut at = 0;
        while at < len && wanted() {
            let end = (at + STEP).min(len);
            mapping.populate(end).map_err(|error| SlabError::Allocate {
                bytes,
                step: "populate",
                error,
            })?;
            at = end;
        }
        if at < len {
            return Ok(false);
        }
        self.shared.lock().keep(mapping);
        Ok(true)
    }

    /// Sets the limit anew, for a budget that changed.
    pub fn set_limit(&self, limit: Bytes) {
        let gone = {
            let mut state = self.shared.lock();
            state.limit = limit;
            let room = state.warm_room(Bytes::ZERO);
            state.surplus(room)
        };
        // Without the lock, since to unmap gigabytes takes long.
        drop(gone);
    }

    /// Others need memory, or no longer do. While they do, nothing is kept warm, and what is goes back to the system; gives
    /// how much went. Blocks.
    pub fn set_pressed(&self, pressed: bool) -> Bytes {
        self.shared.lock().pressed = pressed;
        if pressed {
            self.release(Bytes::ZERO)
        } else {
            Bytes::ZERO
        }
    }

    /// Gives warm memory back to the system until no more than `keep` is left of it; gives how much went. Blocks.
    pub fn release(&self, keep: Bytes) -> Bytes {
        let gone = {
            let mut state = self.shared.lock();
            state.reclaim();
            state.surplus(keep)
        };
        let bytes = gone.iter().map(Mapping::held).sum();
        // Without the lock, since to unmap gigabytes takes long.
        drop(gone);
        bytes
    }

    /// What it holds.
    #[must_use]
    pub fn view(&self) -> ArenaView {
        let mut state = self.shared.lock();
        state.reclaim();
        ArenaView {
            live: state.live,
            warm: held(&state.warm),
            lingering: held(&state.lingering).saturating_add(state.withheld.bytes()),
            mappings: state.live_mappings + state.warm.len() + state.lingering.len(),
            reused: state.reused,
            fresh: state.fresh,
            pages: self.shared.pages,
        }
    }
}

/// Huge pages that are reserved and free, or may be had on demand.
fn reserved_huge_pages() -> u64 {
    let read = |name: &str| -> u64 {
        std::fs::read_to_string(format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}"))
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    };
    read("free_hugepages") + read("nr_overcommit_hugepages")
}

#[cfg(all(test, feature = "models"))]
mod models;
#[cfg(test)]
mod tests;
