//! How fast bytes move, as it was measured: for each disk, for each GPU's link, and between GPUs.
//!
//! What counts is the time in which anything moved on a way, not the time that each component took, since several share it.
//! Older measurements count less and less, by the bytes that moved since.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::ids::GpuIndex;
use crate::units::Bytes;

/// Where bytes move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// From the file system of this device number to RAM.
    Disk(u64),
    /// From RAM to a GPU.
    Link(GpuIndex),
    /// From one GPU to another.
    Peer {
        /// From which.
        from: GpuIndex,
        /// To which.
        to: GpuIndex,
    },
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // As `lsblk` and `mountinfo` write it; see makedev(3).
            Self::Disk(device) => {
                let major = (device >> 8 & 0xfff) | (device >> 32 & !0xfff);
                let minor = (device & 0xff) | (device >> 12 & !0xff);
                write!(f, "disk {major}:{minor}")
            }
            Self::Link(gpu) => write!(f, "link to vram:{gpu}"),
            Self::Peer { from, to } => write!(f, "vram:{from} to vram:{to}"),
        }
    }
}

/// What moved before the last so many bytes hardly counts any more.
const MEMORY: f64 = 16.0 * 1024.0 * 1024.0 * 1024.0;
/// A measurement over less says more about latency than about the rate.
const LEAST: f64 = 1024.0 * 1024.0;

/// One way.
#[derive(Debug, Clone, Copy, Default)]
struct Meter {
    /// Movements under way.
    moving: u32,
    /// Since when anything moves.
    since: Duration,
    bytes: f64,
    busy_s: f64,
}

impl Meter {
    fn settle(&mut self, now: Duration) {
        if self.moving > 0 {
            self.busy_s += now.saturating_sub(self.since).as_secs_f64();
        }
        self.since = now;
    }
}

/// See the module's page.
#[derive(Debug, Clone, Default)]
pub struct Rates {
    meters: BTreeMap<Way, Meter>,
}

impl Rates {
    /// Something begins to move.
    pub fn begin(&mut self, way: Way, now: Duration) {
        let meter = self.meters.entry(way).or_default();
        meter.settle(now);
        meter.moving += 1;
    }

    /// What began has ended, one way or the other, after so many bytes.
    pub fn end(&mut self, way: Way, now: Duration, bytes: Bytes) {
        let Some(meter) = self.meters.get_mut(&way) else {
            return;
        };
        meter.settle(now);
        meter.moving = meter.moving.saturating_sub(1);
        let keep = (-bytes.as_f64() / MEMORY).exp();
        // Both fade alike, so the rate does not change by it.
        meter.bytes = (meter.bytes + bytes.as_f64()) * keep;
        meter.busy_s *= keep;
    }

    /// Bytes each second. `None`: not measured yet.
    #[must_use]
    pub fn per_s(&self, way: Way) -> Option<f64> {
        let meter = self.meters.get(&way)?;
        (meter.bytes >= LEAST && meter.busy_s > 0.0).then(|| meter.bytes / meter.busy_s)
    }

    /// All that is measured.
    pub fn iter(&self) -> impl Iterator<Item = (Way, f64)> {
        self.meters
            .keys()
            .filter_map(|way| Some((*way, self.per_s(*way)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAY: Way = Way::Link(GpuIndex(0));

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn movements_that_share_a_way_share_its_rate() {
        let mut rates = Rates::default();
        assert_eq!(rates.per_s(WAY), None);
        // Two of 100 MiB each within the same two seconds, after a long silence.
        rates.begin(WAY, at(100));
        rates.begin(WAY, at(100));
        rates.end(WAY, at(102), Bytes::mib(100));
        rates.end(WAY, at(102), Bytes::mib(100));
        let rate = rates.per_s(WAY).unwrap();
        assert!(
            (rate / Bytes::mib(100).as_f64() - 1.0).abs() < 0.01,
            "{rate}"
        );
        // Silence costs nothing.
        rates.begin(WAY, at(1000));
        rates.end(WAY, at(1001), Bytes::mib(100));
        let rate = rates.per_s(WAY).unwrap();
        assert!(
            (rate / Bytes::mib(100).as_f64() - 1.0).abs() < 0.01,
            "{rate}"
        );
    }

    #[test]
    fn what_was_measured_long_ago_fades() {
        let mut rates = Rates::default();
        let mut now = 0;
        let mut moved = |rates: &mut Rates, mib: u64, times: u64| {
            for _ in 0..times {
                rates.begin(WAY, at(now));
                now += 1;
                rates.end(WAY, at(now), Bytes::mib(mib));
            }
        };
        moved(&mut rates, 1000, 100);
        moved(&mut rates, 500, 400);
        let rate = rates.per_s(WAY).unwrap() / Bytes::mib(500).as_f64();
        assert!((0.99..1.01).contains(&rate), "{rate}");
    }

    #[test]
    fn small_and_failed_movements_measure_nothing() {
        let mut rates = Rates::default();
        rates.begin(WAY, at(0));
        rates.end(WAY, at(10), Bytes::ZERO);
        rates.begin(WAY, at(10));
        rates.end(WAY, at(11), Bytes::kib(1));
        assert_eq!(rates.per_s(WAY), None);
        rates.end(Way::Disk(7), at(11), Bytes::gib(1));
        assert_eq!(rates.per_s(Way::Disk(7)), None);
    }

    #[test]
    fn a_disk_is_named_as_the_system_does() {
        assert_eq!(
            Way::Disk(rustix::fs::makedev(259, 3)).to_string(),
            "disk 259:3"
        );
    }
}
