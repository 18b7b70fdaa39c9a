//! What a run found: counts, times, violations.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::holdings::Holdings;

/// The most violations that are told one by one; one cause tends to be seen again and again.
const TOLD: usize = 100;

/// Something that must never be.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Violation {
    /// Seconds since the start of the run.
    pub(super) at_s: f64,
    pub(super) invariant: &'static str,
    pub(super) message: String,
}

/// Times of one kind, in milliseconds.
#[derive(Debug, Clone, Default)]
pub(super) struct Times(Vec<f64>);

impl Times {
    pub(super) fn add(&mut self, time: Duration) {
        self.0.push(time.as_secs_f64() * 1e3);
    }

    pub(super) fn summary(&self) -> Option<TimesSummary> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let index = (sorted.len() as f64 * share).ceil() as usize;
            sorted.get(index.saturating_sub(1)).copied()
        };
        Some(TimesSummary {
            count: sorted.len(),
            p50_ms: at(0.5)?,
            p99_ms: at(0.99)?,
            max_ms: sorted.last().copied()?,
        })
    }
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct TimesSummary {
    pub(super) count: usize,
    pub(super) p50_ms: f64,
    pub(super) p99_ms: f64,
    pub(super) max_ms: f64,
}

/// A quiet server at the start and at the end of its life.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Life {
    pub(super) seconds: f64,
    /// How long it took at the end until nothing was more than at the start.
    pub(super) returned_after_s: f64,
    pub(super) start: Holdings,
    pub(super) end: Holdings,
}

/// Servers that were killed under the load of many sessions.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Crowd {
    pub(super) sessions: usize,
    /// Those of them whose clients are Python's.
    pub(super) in_python: usize,
    pub(super) models: usize,
    pub(super) kills: usize,
    /// From the death of a server until the next one has handed out a lease.
    pub(super) serving: Option<TimesSummary>,
    /// From the death until as many sessions are open as before.
    pub(super) all_reconnected: Option<TimesSummary>,
    /// Requests that workers made meanwhile.
    pub(super) requests: u64,
}

/// The run.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) faults: BTreeMap<&'static str, u64>,
    /// Faults that this machine does not allow, and why.
    pub(super) skipped: BTreeMap<&'static str, String>,
    pub(super) requests: u64,
    pub(super) leases: u64,
    pub(super) refusals: BTreeMap<String, u64>,
    pub(super) checked_bytes: u64,
    pub(super) returned: Times,
    pub(super) restarted: Times,
    pub(super) reconnected: Times,
    pub(super) crowd: Option<Crowd>,
    pub(super) lives: Vec<Life>,
    violations: Vec<Violation>,
    violated: u64,
}

impl Findings {
    pub(super) fn violation(&mut self, at: Duration, invariant: &'static str, message: String) {
        self.violated += 1;
        if self.violations.len() < TOLD {
            self.violations.push(Violation {
                at_s: at.as_secs_f64(),
                invariant,
                message,
            });
        }
    }

    pub(super) fn fault(&mut self, name: &'static str) {
        *self.faults.entry(name).or_default() += 1;
    }

    pub(super) fn finish(self, seed: u64, time: Duration) -> Report {
        Report {
            seed,
            seconds: time.as_secs_f64(),
            faults_injected: self.faults.values().sum(),
            faults: self.faults,
            skipped: self.skipped,
            requests: self.requests,
            leases: self.leases,
            refusals: self.refusals,
            checked_bytes: self.checked_bytes,
            leases_returned: self.returned.summary(),
            server_restarted: self.restarted.summary(),
            clients_reconnected: self.reconnected.summary(),
            crowd: self.crowd,
            lives: self.lives,
            violated: self.violated,
            violations: self.violations,
        }
    }
}

/// The one document of a run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) seed: u64,
    pub(super) seconds: f64,
    pub(super) faults_injected: u64,
    pub(super) faults: BTreeMap<&'static str, u64>,
    pub(super) skipped: BTreeMap<&'static str, String>,
    pub(super) requests: u64,
    pub(super) leases: u64,
    pub(super) refusals: BTreeMap<String, u64>,
    pub(super) checked_bytes: u64,
    /// From the death of a worker until the server holds nothing for it.
    pub(super) leases_returned: Option<TimesSummary>,
    /// From the death of a server until the next one has handed out a lease.
    pub(super) server_restarted: Option<TimesSummary>,
    /// From the loss of a connection until the worker's next one.
    pub(super) clients_reconnected: Option<TimesSummary>,
    /// Where `--sessions` asks for it.
    pub(super) crowd: Option<Crowd>,
    pub(super) lives: Vec<Life>,
    /// All of them; the list has the first ones.
    pub(super) violated: u64,
    pub(super) violations: Vec<Violation>,
}
