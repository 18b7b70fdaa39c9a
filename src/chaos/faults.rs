//! What goes wrong, and when.

use rand_xoshiro::Xoshiro256PlusPlus;
use serde::Serialize;

use super::clients::below;
use super::library::FILES;

/// One thing that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Fault {
    /// The actor of this number (see `ActorName`) is killed where it stands.
    KillActor(usize),
    /// All actors are killed at once.
    KillAll,
    /// The eviction policy panics in its actor, the next time it is asked.
    Panic,
    /// The next reads fail with EIO.
    ReadErrors(u32),
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
    /// All files are whole again, and the folders are scanned.
    Mend,
    /// A GPU refuses the next allocations, whatever the books say.
    DeviceOutOfMemory(usize, u32),
    /// A GPU refuses the next uploads.
    UploadErrors(usize, u32),
    /// Other processes take so many KiB of a GPU.
    Foreign(usize, u64),
    /// A GPU is lost.
    LoseGpu(usize),
    /// All GPUs answer again, and others have left them.
    ReturnGpus,
    /// Others need host memory.
    Pressure,
    /// They no longer do.
    Relief,
    /// The container may use only so many KiB from now on.
    ShrinkLimit(u64),
    /// A client dies with all that it holds.
    ClientDies(usize),
    /// A client holds what it has for so many milliseconds, silently.
    ClientSleeps(usize, u64),
    /// A client asks for many sets at once, and reads no answer.
    Flood(usize),
    /// A client asks for what does not exist, and for the same thing twice.
    Nonsense(usize),
    /// So many milliseconds pass at once.
    ClockJump(u64),
}

/// A fault with its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PlannedFault {
    /// Milliseconds since the start.
    pub at_ms: u64,
    /// What.
    pub fault: Fault,
}

/// Names of the kinds, for reports.
impl Fault {
    /// The kind, without its figures.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::KillActor(_) => "kill-actor",
            Self::KillAll => "kill-all",
            Self::Panic => "panic",
            Self::ReadErrors(_) => "read-errors",
            Self::ShortReads(_) => "short-reads",
            Self::ReadPanics => "read-panics",
            Self::StallDisk(_) => "stall-disk",
            Self::Truncate(_) => "truncate",
            Self::Replace(_) => "replace",
            Self::Delete(_) => "delete",
            Self::HalfWrite(_) => "half-write",
            Self::Mend => "mend",
            Self::DeviceOutOfMemory(..) => "device-out-of-memory",
            Self::UploadErrors(..) => "upload-errors",
            Self::Foreign(..) => "foreign",
            Self::LoseGpu(_) => "lose-gpu",
            Self::ReturnGpus => "return-gpus",
            Self::Pressure => "pressure",
            Self::Relief => "relief",
            Self::ShrinkLimit(_) => "shrink-limit",
            Self::ClientDies(_) => "client-dies",
            Self::ClientSleeps(..) => "client-sleeps",
            Self::Flood(_) => "flood",
            Self::Nonsense(_) => "nonsense",
            Self::ClockJump(_) => "clock-jump",
        }
    }
}

/// The faults of a seed, `rate` each second on average: most seeds have all kinds, every fourth has few.
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
        (time_ms / 1000 * rate) as usize
    };
    let mut plan: Vec<_> = (0..count)
        .map(|_| PlannedFault {
            at_ms: below(rng, time_ms.max(1) as usize) as u64,
            fault: one(rng, clients, gpus),
        })
        .collect();
    plan.sort_by_key(|planned| planned.at_ms);
    plan
}

fn one(rng: &mut Xoshiro256PlusPlus, clients: usize, gpus: usize) -> Fault {
    match below(rng, 27) {
        0 | 1 => Fault::KillActor(below(rng, 5 + gpus)),
        2 => Fault::KillAll,
        3 => Fault::Panic,
        4 => Fault::ReadErrors(1 + below(rng, 3) as u32),
        5 => Fault::ShortReads(1 + below(rng, 20) as u32),
        6 => Fault::ReadPanics,
        7 => Fault::StallDisk(below(rng, 5000) as u64),
        8 => Fault::Truncate(below(rng, FILES)),
        9 => Fault::Replace(below(rng, FILES)),
        10 => Fault::Delete(below(rng, FILES)),
        11 => Fault::HalfWrite(below(rng, FILES)),
        12 | 13 => Fault::Mend,
        14 => Fault::DeviceOutOfMemory(below(rng, gpus), 1 + below(rng, 4) as u32),
        15 => Fault::UploadErrors(below(rng, gpus), 1 + below(rng, 2) as u32),
        16 => Fault::Foreign(below(rng, gpus), below(rng, 1024) as u64),
        17 => Fault::LoseGpu(below(rng, gpus)),
        18 => Fault::ReturnGpus,
        19 => Fault::Pressure,
        20 => Fault::Relief,
        21 => Fault::ClientDies(below(rng, clients)),
        22 => Fault::ClientSleeps(below(rng, clients), below(rng, 10_000) as u64),
        23 => Fault::Flood(below(rng, clients)),
        24 => Fault::Nonsense(below(rng, clients)),
        25 => Fault::ShrinkLimit(200 + below(rng, 600) as u64),
        _ => Fault::ClockJump(below(rng, 2000) as u64),
    }
}
