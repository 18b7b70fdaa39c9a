//! What a replay measures.

use std::time::Duration;

use serde::Serialize;

use crate::predict::PrefetchScore;
use crate::units::Bytes;

/// Seconds over many requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Seconds {
    /// The mean.
    pub mean: f64,
    /// The median.
    pub p50: f64,
    /// The 95th percentile.
    pub p95: f64,
    /// The 99th percentile.
    pub p99: f64,
}

impl Seconds {
    /// By the nearest rank.
    fn of(mut values: Vec<f64>) -> Self {
        if values.is_empty() {
            return Self::default();
        }
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let rank = (share * values.len() as f64).ceil() as usize;
            values[rank.clamp(1, values.len()) - 1]
        };
        Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: at(0.5),
            p95: at(0.95),
            p99: at(0.99),
        }
    }
}

/// One policy on one machine.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// The policy's name.
    pub policy: String,
    /// The tier in which components are used: VRAM where there are two.
    pub capacity_bytes: Bytes,
    /// The RAM tier.
    pub ram_bytes: Bytes,
    /// Requests measured.
    pub requests: u64,
    /// Cost miss ratio: seconds of loading paid over seconds with no cache.
    pub cmr: f64,
    /// Components loaded over components asked for.
    pub object_miss_ratio: f64,
    /// Bytes loaded over bytes asked for.
    pub byte_miss_ratio: f64,
    /// Share of the requests that waited for nothing.
    pub zero_wait_share: f64,
    /// Seconds of loading in each request.
    pub cold_start_s: Seconds,
    /// The same over the requests that waited.
    pub cold_start_of_cold_s: Seconds,
    /// What came of prefetches, where the policy makes any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefetch: Option<PrefetchScore>,
    /// Time for learning, lookup and eviction in each request.
    pub ns_per_request: f64,
}

/// Sums up requests.
pub(super) struct Tally {
    policy: String,
    paid_s: f64,
    uncached_s: f64,
    asked: (u64, f64),
    loaded: (u64, f64),
    waits: Vec<f64>,
    took: Duration,
}

impl Tally {
    pub(super) fn new(policy: &str) -> Self {
        Self {
            policy: policy.to_owned(),
            paid_s: 0.0,
            uncached_s: 0.0,
            asked: (0, 0.0),
            loaded: (0, 0.0),
            waits: Vec::new(),
            took: Duration::ZERO,
        }
    }

    /// One request: for each component its bytes and its cost with no cache, and the seconds paid.
    pub(super) fn count(
        &mut self,
        components: impl Iterator<Item = ((Bytes, f64), f64)>,
        took: Duration,
    ) {
        let mut wait = 0.0;
        for ((bytes, uncached_s), paid_s) in components {
            self.uncached_s += uncached_s;
            self.asked.0 += 1;
            self.asked.1 += bytes.as_f64();
            if paid_s > 0.0 {
                wait += paid_s;
                self.loaded.0 += 1;
                self.loaded.1 += bytes.as_f64();
            }
        }
        self.paid_s += wait;
        self.waits.push(wait);
        self.took += took;
    }

    pub(super) fn outcome(
        self,
        ram: Bytes,
        vram: Option<Bytes>,
        prefetch: Option<PrefetchScore>,
    ) -> Outcome {
        let ratio = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let requests = self.waits.len() as f64;
        let cold: Vec<f64> = self.waits.iter().copied().filter(|w| *w > 0.0).collect();
        Outcome {
            policy: self.policy,
            capacity_bytes: vram.unwrap_or(ram),
            ram_bytes: ram,
            requests: self.waits.len() as u64,
            cmr: ratio(self.paid_s, self.uncached_s),
            object_miss_ratio: ratio(self.loaded.0 as f64, self.asked.0 as f64),
            byte_miss_ratio: ratio(self.loaded.1, self.asked.1),
            zero_wait_share: ratio(requests - cold.len() as f64, requests),
            prefetch,
            ns_per_request: ratio(self.took.as_nanos() as f64, requests),
            cold_start_s: Seconds::of(self.waits),
            cold_start_of_cold_s: Seconds::of(cold),
        }
    }
}
