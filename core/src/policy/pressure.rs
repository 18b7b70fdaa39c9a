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
        })
    }
}

/// Judges the figures.
#[must_use]
pub fn judge(host: &HostMemory) -> Judgement {
    let low = host.available < host.total.share(LOW_SHARE);
    let stalled = host.full_avg10.is_some_and(|percent| percent > STALLED);
    if low || stalled {
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
        assert_eq!(judge(&host), Judgement::Enough);
        assert_eq!(HostMemory::parse("MemTotal: x kB", None), None);
    }

    #[test]
    fn scarcity_and_stalls_are_pressure() {
        let mut host = HostMemory::parse(MEMINFO, None).unwrap();
        host.available = Bytes::kib(100_000);
        assert_eq!(judge(&host), Judgement::Pressure);
        host.available = host.total;
        host.full_avg10 = Some(20.0);
        assert_eq!(judge(&host), Judgement::Pressure);
    }
}
