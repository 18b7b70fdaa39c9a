//! How long loads spend in each of their phases: counts in buckets, for status and metrics. Plain atomics, as for the counters.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;

/// A phase of a load, or of one component of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LoadPhase {
    /// Of a load: names are resolved, and it is planned.
    Planning,
    /// Of a load: it waits for memory.
    Waiting,
    /// Of a load: bytes move.
    Loading,
    /// A load from its asking to its last lease.
    Whole,
    /// Of a component: it is read from disk, the wait for a place among the reads included.
    Read,
    /// Of a component: it is uploaded to a GPU, the wait for the link included.
    Upload,
}

const PHASES: [LoadPhase; 6] = [
    LoadPhase::Planning,
    LoadPhase::Waiting,
    LoadPhase::Loading,
    LoadPhase::Whole,
    LoadPhase::Read,
    LoadPhase::Upload,
];

/// Upper bounds of the buckets: each four times the last, from what a lease of resident components takes up to a quarter of an
/// hour; beyond is a bucket without one.
const FIRST_BOUND_US: u64 = 10;
const BOUNDS: usize = 14;

fn bound_us(bucket: usize) -> u64 {
    FIRST_BOUND_US << (2 * bucket)
}

#[derive(Debug, Default)]
struct Times {
    buckets: [AtomicU64; BOUNDS + 1],
    sum_us: AtomicU64,
}

/// The times of all phases since the start.
#[derive(Debug, Default)]
pub(crate) struct Phases([Times; PHASES.len()]);

/// The times of one phase.
#[derive(Debug, Clone, Serialize)]
pub struct PhaseTimes {
    /// Which phase.
    pub phase: LoadPhase,
    /// How often it was gone through.
    pub count: u64,
    /// All times together, in seconds.
    pub sum_s: f64,
    /// How many took no longer than so many seconds, and longer than the bound before. The rest took longer than the last bound.
    pub buckets: Vec<(f64, u64)>,
}

impl Phases {
    pub(crate) fn record(&self, phase: LoadPhase, took: Duration) {
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = (0..BOUNDS).find(|bucket| took_us <= bound_us(*bucket));
        let Some(times) = self.0.get(phase as usize) else {
            return;
        };
        if let Some(bucket) = times.buckets.get(bucket.unwrap_or(BOUNDS)) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        times.sum_us.fetch_add(took_us, Ordering::Relaxed);
    }

    /// The times now.
    pub(crate) fn view(&self) -> Vec<PhaseTimes> {
        PHASES
            .iter()
            .zip(&self.0)
            .map(|(phase, times)| {
                let counts: Vec<u64> = times
                    .buckets
                    .iter()
                    .map(|bucket| bucket.load(Ordering::Relaxed))
                    .collect();
                let bounds = (0..BOUNDS).map(|bucket| bound_us(bucket) as f64 / 1e6);
                PhaseTimes {
                    phase: *phase,
                    count: counts.iter().sum(),
                    sum_s: times.sum_us.load(Ordering::Relaxed) as f64 / 1e6,
                    buckets: bounds.zip(counts.iter().copied()).collect(),
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_fall_into_their_buckets() {
        let phases = Phases::default();
        for us in [0, 10, 11, 40, 41, 3_600_000_000] {
            phases.record(LoadPhase::Read, Duration::from_micros(us));
        }
        let view = phases.view();
        let read = view.iter().find(|times| times.phase == LoadPhase::Read);
        let read = read.unwrap();
        assert_eq!((read.count, read.sum_s), (6, 3600.000102));
        let counts: Vec<u64> = read.buckets.iter().map(|(_, count)| *count).collect();
        // The last one took longer than the last bound.
        assert_eq!(counts[..4], [2, 2, 1, 0]);
        assert_eq!(counts.iter().sum::<u64>(), 5);
        assert!(view.iter().filter(|times| times.count > 0).count() == 1);
    }
}
