//! What goes wrong, and when.

use rand_xoshiro::Xoshiro256PlusPlus;
use serde::Serialize;

use super::library::FILES;
use super::workload::below;

/// One thing that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Fault {
    /// The actor of this number (see `ActorName`) is killed where it stands.
    KillActor(usize),
    /// All actors are killed at once.
    KillAll,
    /// A handler of this actor takes so many milliseconds.
    SlowActor(usize, u64),
    /// The eviction policy panics in its actor, the next time it is asked.
    Panic,
    /// The next reads fail with EIO.
    ReadErrors(u32),
    /// The next reads fail with ENOSPC.
    NoSpace(u32),
    /// The next reads give a few bytes only.
    ShortReads(u32),
    /// The task of the next read panics.
    ReadPanics,
    /// The disk stands still for so many milliseconds.
    StallDisk(u64),
    /// A file of the library loses its end.
    Truncate(usize),
    /// A file is replaced by another version.
    Replace(usize),
    /// A file is deleted.
    Delete(usize),
    /// The first half of a file is overwritten in place.
    HalfWrite(usize),
    /// The file is whole again.
    Mend(usize),
    /// The watcher loses count: this file and the next are replaced, and all that it says is that something has changed.
    WatcherOverflow(usize),
    /// The index of the catalogue is overwritten.
    CorruptIndex,
    /// The index has no room for another entry.
    FullIndex,
    /// It has room again.
    MendIndex,
    /// A GPU refuses the next allocations, whatever the books say.
    DeviceOutOfMemory(usize, u32),
    /// A GPU refuses the next uploads.
    UploadErrors(usize, u32),
    /// A GPU's context breaks, with all that is in it, until another one is made.
    StickyError(usize),
    /// Other processes take so many KiB of a GPU; 0: they let go.
    Foreign(usize, u64),
    /// A GPU is lost.
    LoseGpu(usize),
    /// It answers again.
    ReturnGpu(usize),
    /// Others need host memory.
    Pressure,
    /// The machine has no memory for anything new.
    NoHostMemory,
    /// The container may use only so many KiB from now on.
    ShrinkLimit(u64),
    /// All of that is over.
    Relief,
    /// A client dies with all that it holds.
    ClientDies(usize),
    /// A client holds what it has for so many milliseconds, silently.
    ClientSleeps(usize, u64),
    /// A client looks at the answer to its next load, and at all that it hears of, only after so many milliseconds.
    SlowReader(usize, u64),
    /// A client asks for many sets at once, and reads no answer.
    Flood(usize),
    /// A client asks for what does not exist, and for the same thing twice.
    Nonsense(usize),
    /// Two sessions of the same name ask for the same set, each of them twice, at the same instant.
    DuplicateIds(usize),
    /// So many milliseconds pass at once.
    ClockJump(u64),
    /// The system drains while everything goes on.
    Drain,
}

/// A fault with its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PlannedFault {
    /// Milliseconds since the start.
    pub at_ms: u64,
    /// What.
    pub fault: Fault,
}

impl Fault {
    /// The names of all kinds, as [`kind`](Self::kind) gives them.
    pub const KINDS: [&str; 36] = [
        "kill-actor",
        "kill-all",
        "slow-actor",
        "panic",
        "read-errors",
        "no-space",
        "short-reads",
        "read-panics",
        "stall-disk",
        "truncate",
        "replace",
        "delete",
        "half-write",
        "mend",
        "watcher-overflow",
        "corrupt-index",
        "full-index",
        "mend-index",
        "device-out-of-memory",
        "upload-errors",
        "sticky-error",
        "foreign",
        "lose-gpu",
        "return-gpu",
        "pressure",
        "no-host-memory",
        "shrink-limit",
        "relief",
        "client-dies",
        "client-sleeps",
        "slow-reader",
        "flood",
        "nonsense",
        "duplicate-ids",
        "clock-jump",
        "drain",
    ];

    /// The kind, without its figures.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::KillActor(_) => "kill-actor",
            Self::KillAll => "kill-all",
            Self::SlowActor(..) => "slow-actor",
            Self::Panic => "panic",
            Self::ReadErrors(_) => "read-errors",
            Self::NoSpace(_) => "no-space",
            Self::ShortReads(_) => "short-reads",
            Self::ReadPanics => "read-panics",
            Self::StallDisk(_) => "stall-disk",
            Self::Truncate(_) => "truncate",
            Self::Replace(_) => "replace",
            Self::Delete(_) => "delete",
            Self::HalfWrite(_) => "half-write",
            Self::Mend(_) => "mend",
            Self::WatcherOverflow(_) => "watcher-overflow",
            Self::CorruptIndex => "corrupt-index",
            Self::FullIndex => "full-index",
            Self::MendIndex => "mend-index",
            Self::DeviceOutOfMemory(..) => "device-out-of-memory",
            Self::UploadErrors(..) => "upload-errors",
            Self::StickyError(_) => "sticky-error",
            Self::Foreign(..) => "foreign",
            Self::LoseGpu(_) => "lose-gpu",
            Self::ReturnGpu(_) => "return-gpu",
            Self::Pressure => "pressure",
            Self::NoHostMemory => "no-host-memory",
            Self::ShrinkLimit(_) => "shrink-limit",
            Self::Relief => "relief",
            Self::ClientDies(_) => "client-dies",
            Self::ClientSleeps(..) => "client-sleeps",
            Self::SlowReader(..) => "slow-reader",
            Self::Flood(_) => "flood",
            Self::Nonsense(_) => "nonsense",
            Self::DuplicateIds(_) => "duplicate-ids",
            Self::ClockJump(_) => "clock-jump",
            Self::Drain => "drain",
        }
    }

    /// What ends it, and the most milliseconds that it goes on, where it would go on for ever.
    const fn end(&self) -> Option<(Self, usize)> {
        match self {
            Self::Truncate(file) | Self::Delete(file) | Self::HalfWrite(file) => {
                Some((Self::Mend(*file), 5000))
            }
            Self::FullIndex => Some((Self::MendIndex, 5000)),
            Self::Foreign(gpu, 1..) => Some((Self::Foreign(*gpu, 0), 5000)),
            Self::LoseGpu(gpu) => Some((Self::ReturnGpu(*gpu), 3000)),
            Self::Pressure | Self::NoHostMemory => Some((Self::Relief, 3000)),
            Self::ShrinkLimit(_) => Some((Self::Relief, 5000)),
            _ => None,
        }
    }
}

/// The faults of a seed, `rate` each second on average, some of them several at once: most seeds have all kinds, every fourth
/// has few. What would go on for ever has an end, which is one of them.
pub(super) fn draw(
    rng: &mut Xoshiro256PlusPlus,
    time_ms: u64,
    rate: u64,
    clients: usize,
    gpus: usize,
) -> Vec<PlannedFault> {
    let few = below(rng, 4) == 0;
    let count = if few {
        3
    } else {
        (time_ms * rate / 1000) as usize
    };
    let mut plan = Vec::with_capacity(count + 8);
    while plan.len() < count {
        let at_ms = below(rng, time_ms.max(1) as usize) as u64;
        let together = match below(rng, 8) {
            0 => 2 + below(rng, 5),
            _ => 1,
        };
        for _ in 0..together {
            let fault = one(rng, rate, clients, gpus);
            plan.push(PlannedFault { at_ms, fault });
            if let Some((fault, most)) = fault.end() {
                let at_ms = at_ms + 100 + below(rng, most) as u64;
                if at_ms < time_ms {
                    plan.push(PlannedFault { at_ms, fault });
                }
            }
        }
    }
    if below(rng, 8) == 0 && !few {
        let at_ms = time_ms / 2 + below(rng, (time_ms / 2).max(1) as usize) as u64;
        let fault = Fault::Drain;
        plan.push(PlannedFault { at_ms, fault });
    }
    plan.sort_by_key(|planned| planned.at_ms);
    plan
}

/// Faults each second that may make loads fail, or last; the rest of a higher rate only slows things down, or kills what no load
/// waits for. Else nothing would be granted, and little be left to break.
const HARD: usize = 10;

fn one(rng: &mut Xoshiro256PlusPlus, rate: u64, clients: usize, gpus: usize) -> Fault {
    if below(rng, rate as usize) < HARD {
        hard(rng, clients, gpus)
    } else {
        light(rng, clients, gpus)
    }
}

fn light(rng: &mut Xoshiro256PlusPlus, clients: usize, gpus: usize) -> Fault {
    match below(rng, 20) {
        0..5 => Fault::ShortReads(1 + below(rng, 20) as u32),
        5..8 => Fault::StallDisk(below(rng, 30) as u64),
        8..11 => Fault::SlowActor(below(rng, 5 + gpus), below(rng, 100) as u64),
        11..13 => Fault::KillActor(2 + below(rng, 3)),
        13..15 => Fault::SlowReader(below(rng, clients), below(rng, 300) as u64),
        15 => Fault::DuplicateIds(below(rng, clients)),
        16 => Fault::ClientSleeps(below(rng, clients), below(rng, 300) as u64),
        17 => Fault::DeviceOutOfMemory(below(rng, gpus), 1),
        _ => Fault::ClockJump(below(rng, 20) as u64),
    }
}

fn hard(rng: &mut Xoshiro256PlusPlus, clients: usize, gpus: usize) -> Fault {
    let actors = 5 + gpus;
    match below(rng, 100) {
        0..4 => Fault::KillActor(below(rng, actors)),
        4 => Fault::KillAll,
        5..8 => Fault::SlowActor(below(rng, actors), below(rng, 1000) as u64),
        8..11 => Fault::Panic,
        11..16 => Fault::ReadErrors(1 + below(rng, 3) as u32),
        16..19 => Fault::NoSpace(1 + below(rng, 3) as u32),
        19..26 => Fault::ShortReads(1 + below(rng, 20) as u32),
        26..29 => Fault::ReadPanics,
        29..32 => Fault::StallDisk(match below(rng, 4) {
            0 => below(rng, 5000) as u64,
            _ => below(rng, 300) as u64,
        }),
        32..34 => Fault::Truncate(below(rng, FILES)),
        34..38 => Fault::Replace(below(rng, FILES)),
        38 => Fault::Delete(below(rng, FILES)),
        39..41 => Fault::HalfWrite(below(rng, FILES)),
        41 => Fault::WatcherOverflow(below(rng, FILES)),
        42 => Fault::CorruptIndex,
        43 => Fault::FullIndex,
        44..50 => Fault::DeviceOutOfMemory(below(rng, gpus), 1 + below(rng, 4) as u32),
        50..55 => Fault::UploadErrors(below(rng, gpus), 1 + below(rng, 2) as u32),
        55..57 => Fault::StickyError(below(rng, gpus)),
        57..60 => Fault::Foreign(below(rng, gpus), 1 + below(rng, 400) as u64),
        60 => Fault::LoseGpu(below(rng, gpus)),
        61 => Fault::Pressure,
        62 => Fault::NoHostMemory,
        63 => Fault::ShrinkLimit(300 + below(rng, 400) as u64),
        64..70 => Fault::ClientDies(below(rng, clients)),
        70..75 => Fault::ClientSleeps(below(rng, clients), below(rng, 3000) as u64),
        75..80 => Fault::SlowReader(below(rng, clients), below(rng, 2000) as u64),
        80..83 => Fault::Flood(below(rng, clients)),
        83..89 => Fault::Nonsense(below(rng, clients)),
        89..95 => Fault::DuplicateIds(below(rng, clients)),
        _ => Fault::ClockJump(below(rng, 500) as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_xoshiro::rand_core::SeedableRng;

    #[test]
    fn every_kind_is_drawn_and_what_goes_on_ends() {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
        let mut kinds = std::collections::BTreeSet::new();
        for _ in 0..40 {
            let plan = draw(&mut rng, 60_000, 12, 6, 2);
            assert!(plan.is_sorted_by_key(|planned| planned.at_ms));
            kinds.extend(plan.iter().map(|planned| planned.fault.kind()));
        }
        let all: std::collections::BTreeSet<_> = Fault::KINDS.into_iter().collect();
        assert_eq!(kinds, all);
    }
}
