//! How far a load is.

use hotset_core::Bytes;
use tokio::time::Instant;

use crate::loading::{ComponentProgress, LoadProgress, Phase, Stage};
use crate::phases::{LoadPhase, Phases};

/// What the load knows of itself for its progress and its errors.
pub(super) struct Board {
    pub(super) stage: Stage,
    /// When that began.
    entered: Instant,
    pub(super) components: Vec<ComponentProgress>,
    first_byte: Option<Instant>,
    moved_before: Bytes,
}

impl Board {
    pub(super) const fn new(now: Instant) -> Self {
        Self {
            stage: Stage::Planning,
            entered: now,
            components: Vec::new(),
            first_byte: None,
            moved_before: Bytes::ZERO,
        }
    }

    pub(super) fn take(&mut self, moved: &[Bytes]) {
        for (progress, moved) in self.components.iter_mut().zip(moved) {
            if progress.phase != Phase::Ready && !moved.is_zero() {
                progress.phase = Phase::Loading;
                // The image in RAM has headers and padding beside the tensors.
                progress.done = (*moved).min(progress.total);
            }
        }
    }

    /// A stage begins; what the last one took is recorded.
    pub(super) fn enter(&mut self, stage: Stage, phases: &Phases) {
        if stage != self.stage {
            self.leave(phases);
            self.stage = stage;
        }
    }

    /// The stage is over; what it took is recorded.
    pub(super) fn leave(&mut self, phases: &Phases) {
        let now = Instant::now();
        let phase = match self.stage {
            Stage::Planning => LoadPhase::Planning,
            Stage::WaitingFor(_) => LoadPhase::Waiting,
            Stage::Loading => LoadPhase::Loading,
        };
        phases.record(phase, now.saturating_duration_since(self.entered));
        self.entered = now;
    }

    pub(super) fn progress(&mut self, started: Instant) -> LoadProgress {
        let now = Instant::now();
        let done: Bytes = self.components.iter().map(|c| c.done).sum();
        let total: Bytes = self.components.iter().map(|c| c.total).sum();
        if self.first_byte.is_none() && !done.is_zero() {
            self.first_byte = Some(now);
            self.moved_before = done;
        }
        let moving_s = self
            .first_byte
            .map_or(0.0, |first| now.duration_since(first).as_secs_f64());
        let bytes_per_s = if moving_s > 0.0 {
            done.saturating_sub(self.moved_before).as_f64() / moving_s
        } else {
            0.0
        };
        LoadProgress {
            stage: self.stage,
            components: self.components.clone(),
            done,
            total,
            elapsed_s: now.duration_since(started).as_secs_f64(),
            bytes_per_s,
            eta_s: (bytes_per_s > 0.0).then(|| total.saturating_sub(done).as_f64() / bytes_per_s),
        }
    }
}
