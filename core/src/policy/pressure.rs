//! Whether somebody else on the machine needs memory, by the kernel's own figures. Pure: texts in, a judgement out.

use serde::Serialize;

use crate::units::{Bytes, KIB};

/// Host memory as the kernel sees it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct HostMemory {
    /// `MemTotal` of `/proc/meminfo`.
    pub total: Bytes,
    /// `MemAvailable`: what can be had without swapping.
    pub available: Bytes,
    /// Share of the last ten seconds in which every task waited for memory, in percent: `full avg10` of
    /// `/proc/pressure/memory`. `None` where the kernel has no PSI.
    pub full_avg10: Option<f64>,
    /// The bound of the control groups that this process is in, where one has a limit.
    pub cgroup: Option<CgroupMemory>,
}

/// The tightest bound of all groups that the process is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct CgroupMemory {
    /// The least of all limits, `memory.high` among them, since the kernel slows down whoever passes that one.
    pub limit: Bytes,
    /// What is left in the group that has least left. The page cache counts as left, as far as it can be dropped.
    pub room: Bytes,
    /// What has happened since the groups were made.
    pub events: CgroupEvents,
}

/// What the kernel had to do to keep groups within their limits, counted since they were made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct CgroupEvents {
    /// Processes were slowed down at `memory.high`.
    pub high: u64,
    /// Memory was reclaimed at `memory.max`.
    pub max: u64,
    /// Processes were killed.
    pub oom_kill: u64,
}

impl CgroupEvents {
    /// Whether more has happened than by `before`.
    #[must_use]
    pub const fn is_worse_than(&self, before: &Self) -> bool {
        self.high > before.high || self.max > before.max || self.oom_kill > before.oom_kill
    }
}

/// What the figures mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judgement {
    /// There is enough.
    Enough,
    /// Somebody waits for memory, or soon will.
    Pressure,
}

/// Below this share of the total, what is available counts as used up: the kernel begins to reclaim in earnest.
const LOW_SHARE: f64 = 0.03;
/// The least that stays free where so much can be spared: buffers of some hundred clients come and go ...
const LEAST_RESERVE: Bytes = Bytes::mib(16);
/// ... and the most of what is usable that this may be.
const MOST_RESERVE_SHARE: f64 = 0.125;
/// Below this share of its limit, a control group that has just met it has too little.
const TIGHT_SHARE: f64 = 0.1;
/// Below this share of what is usable, waiting for memory means that there is too little of it.
const SCARCE_SHARE: f64 = 0.2;
/// Percent of time stalled from which the machine counts as thrashing; systemd-oomd's default for `MemoryPressure` is in
/// the same region for a far longer window.
const STALLED: f64 = 10.0;

impl HostMemory {
    /// Reads the texts of `/proc/meminfo` and `/proc/pressure/memory`. `None` where the first lacks its figures.
    #[must_use]
    pub fn parse(meminfo: &str, pressure: Option<&str>) -> Option<Self> {
        let figure = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
            Some(Bytes(kib.saturating_mul(KIB)))
        };
        let full_avg10 = pressure
            .and_then(|text| text.lines().find_map(|line| line.strip_prefix("full ")))
            .and_then(|line| {
                line.split_whitespace()
                    .find_map(|field| field.strip_prefix("avg10="))
            })
            .and_then(|value| value.parse().ok());
        Some(Self {
            total: figure("MemTotal:")?,
            available: figure("MemAvailable:")?,
            full_avg10,
            cgroup: None,
        })
    }
}

/// The share of what is usable that hotset takes where no budget is set.
const UNASKED_SHARE: f64 = 0.5;
/// The most of what is usable that a budget may take: more would be reclaimed or killed for.
const MOST_SHARE: f64 = 0.9;

/// The budget of the RAM tier for what is wanted and what this process may use at the time.
#[must_use]
pub fn ram_budget(wanted: Option<Bytes>, usable: Bytes) -> Bytes {
    wanted.map_or(usable.share(UNASKED_SHARE), |wanted| {
        wanted.min(usable.share(MOST_SHARE))
    })
}

impl HostMemory {
    /// What this process may use in all: the machine's memory, or what its control groups allow of it.
    #[must_use]
    pub fn usable(&self) -> Bytes {
        self.cgroup
            .map_or(self.total, |cgroup| cgroup.limit.min(self.total))
    }

    /// What it can have beyond what it has.
    #[must_use]
    pub fn room(&self) -> Bytes {
        self.cgroup
            .map_or(self.available, |cgroup| cgroup.room.min(self.available))
    }

    /// What has to stay free, so that the kernel need not find memory by killing. What a process takes beside its slabs does not
    /// shrink with its container, so a small one has to keep a larger share.
    #[must_use]
    pub fn reserve(&self) -> Bytes {
        let usable = self.usable();
        let small = LEAST_RESERVE.min(usable.share(MOST_RESERVE_SHARE));
        usable.share(LOW_SHARE).max(small)
    }
}

/// Judges the figures, beside those of the last time. `alarm`: the kernel says that tasks wait for memory just now.
#[must_use]
pub fn judge(host: &HostMemory, before: Option<&HostMemory>, alarm: bool) -> Judgement {
    let low = host.available < host.total.share(LOW_SHARE);
    let stalled = alarm || host.full_avg10.is_some_and(|percent| percent > STALLED);
    // Tasks also wait for memory where there is plenty, while the kernel drops cached files for them.
    let stalled = stalled && host.room() < host.usable().share(SCARCE_SHARE);
    let bounded = host.cgroup.is_some_and(|cgroup| {
        let before = before.and_then(|before| before.cgroup);
        let worse = before.is_some_and(|before| cgroup.events.is_worse_than(&before.events));
        // The kernel meets a limit all the time where a group reads files, and drops some of them: no harm in that.
        let tight = cgroup
            .limit
            .share(if worse { TIGHT_SHARE } else { LOW_SHARE });
        cgroup.room < tight.max(host.reserve())
    });
    if low || stalled || bounded {
        Judgement::Pressure
    } else {
        Judgement::Enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str =
        "MemTotal:       24000000 kB\nMemFree: 1 kB\nMemAvailable:    1200000 kB\n";

    #[test]
    fn figures_are_read_from_the_kernels_texts() {
        let pressure = "some avg10=12.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=3.50 avg60=0.00 avg300=0.00 total=0\n";
        let host = HostMemory::parse(MEMINFO, Some(pressure)).unwrap();
        assert_eq!(host.available, Bytes::kib(1_200_000));
        assert_eq!(host.full_avg10, Some(3.5));
        assert_eq!(judge(&host, None, false), Judgement::Enough);
        assert_eq!(HostMemory::parse("MemTotal: x kB", None), None);
    }

    #[test]
    fn scarcity_and_stalls_are_pressure() {
        let mut host = HostMemory::parse(MEMINFO, None).unwrap();
        host.available = Bytes::kib(100_000);
        assert_eq!(judge(&host, None, false), Judgement::Pressure);
        host.available = host.total;
        host.full_avg10 = Some(20.0);
        assert_eq!(
            judge(&host, None, true),
            Judgement::Enough,
            "there is plenty"
        );
        host.available = host.total.share(0.1);
        host.full_avg10 = None;
        assert_eq!(judge(&host, None, false), Judgement::Enough);
        assert_eq!(judge(&host, None, true), Judgement::Pressure);
        host.full_avg10 = Some(20.0);
        assert_eq!(judge(&host, None, false), Judgement::Pressure);
    }

    #[test]
    fn a_control_group_bounds_what_the_machine_has() {
        let mut host = HostMemory::parse(MEMINFO, None).unwrap();
        let group = |room, max| CgroupMemory {
            limit: Bytes::gib(2),
            room,
            events: CgroupEvents {
                max,
                ..CgroupEvents::default()
            },
        };
        assert_eq!((host.usable(), host.room()), (host.total, host.available));
        host.cgroup = Some(group(Bytes::mib(100), 7));
        assert_eq!(
            (host.usable(), host.room()),
            (Bytes::gib(2), Bytes::mib(100))
        );
        assert_eq!(judge(&host, None, false), Judgement::Enough);
        let before = HostMemory {
            cgroup: Some(group(Bytes::gib(1), 6)),
            ..host
        };
        assert_eq!(
            judge(&host, Some(&before), false),
            Judgement::Pressure,
            "it met its limit"
        );
        assert_eq!(judge(&host, Some(&host), false), Judgement::Enough);
        host.cgroup = Some(group(Bytes::mib(10), 7));
        assert_eq!(judge(&host, Some(&host), false), Judgement::Pressure);
        // A small group keeps more than three in a hundred.
        let small = |limit, room| HostMemory {
            cgroup: Some(CgroupMemory {
                limit,
                ..group(room, 7)
            }),
            ..host
        };
        let host = small(Bytes::mib(160), Bytes::mib(15));
        assert_eq!(host.reserve(), Bytes::mib(16));
        assert_eq!(judge(&host, Some(&host), false), Judgement::Pressure);
        let host = small(Bytes::mib(160), Bytes::mib(17));
        assert_eq!(judge(&host, Some(&host), false), Judgement::Enough);
        assert_eq!(small(Bytes::mib(80), Bytes::ZERO).reserve(), Bytes::mib(10));
    }
}
