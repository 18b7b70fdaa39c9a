//! What policies and Predictor have learned: from an actor to the one after it, and from one start of the system to the next.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::Duration;

use hotset_core::config::PredictConfig;
use hotset_core::predict::{Learned, UnsoundStateError};
use hotset_core::sync::Mutex;
use hotset_core::{GpuIndex, Tier};

/// Requests after which what was learned is kept again.
pub(crate) const KEPT_EVERY: usize = 2_048;

/// Who learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Learner {
    /// The policy of a tier.
    Policy(Tier),
    /// Predictor.
    Predictor,
}

impl fmt::Display for Learner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(tier) => tier.fmt(f),
            Self::Predictor => f.pad("predictor"),
        }
    }
}

impl Learner {
    /// Its file: `ram.learned`, `vram-0.learned`, `predictor.learned`.
    fn path(self, folder: &Path) -> PathBuf {
        folder.join(format!("{}.learned", self.to_string().replace(':', "-")))
    }
}

/// By the clock of this system.
#[derive(Debug, Clone)]
struct Kept {
    bytes: Vec<u8>,
    /// When it was kept, or came here.
    at: Duration,
    /// How long before that it was learned, in a system before this one.
    away: Duration,
    /// Whether no file has it.
    is_new: bool,
}

/// See the module's page.
#[derive(Debug, Default)]
pub(crate) struct LearnedHere(Mutex<BTreeMap<Learner, Kept>>);

impl LearnedHere {
    /// What was learned when the system ended last. Blocks: it is read before anything runs.
    pub(crate) fn before(config: &PredictConfig, gpus: impl Iterator<Item = GpuIndex>) -> Self {
        let Some(folder) = &config.folder else {
            return Self::default();
        };
        let tiers = std::iter::once(Tier::Ram).chain(gpus.map(Tier::Vram));
        let learners = tiers.map(Learner::Policy).chain([Learner::Predictor]);
        let read = |learner: Learner| match Learned::read(&learner.path(folder)) {
            Ok(learned) => learned.map(|learned| {
                let kept = Kept {
                    away: learned.ago(),
                    bytes: learned.bytes,
                    at: Duration::ZERO,
                    is_new: false,
                };
                (learner, kept)
            }),
            Err(error) => {
                tracing::warn!(%learner, %error, "what was learned is of no use; it learns anew");
                None
            }
        };
        Self(Mutex::new(learners.filter_map(read).collect()))
    }

    /// Gives a learner how long ago its predecessor's was kept, and what, where there is one.
    pub(crate) fn resume(
        &self,
        learner: Learner,
        now: Duration,
        resume: impl FnOnce(Duration, &[u8]) -> Result<(), UnsoundStateError>,
    ) {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(kept) = kept.get(&learner) else {
            return;
        };
        let away = kept.away + now.saturating_sub(kept.at);
        if let Err(error) = resume(away, &kept.bytes) {
            tracing::warn!(%learner, %error, "it learns anew");
        }
    }

    /// Keeps what somebody has learned.
    pub(crate) fn keep(&self, learner: Learner, at: Duration, bytes: Vec<u8>) {
        let kept = Kept {
            bytes,
            at,
            away: Duration::ZERO,
            is_new: true,
        };
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(learner, kept);
    }

    /// Writes what is new to this folder. Blocks.
    pub(crate) fn write(&self, folder: &Path) {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all = all.clone();
        for (learner, kept) in all.into_iter().filter(|(_, kept)| kept.is_new) {
            let learned = Learned::now(kept.bytes);
            if let Err(error) = learned.write(&learner.path(folder)) {
                tracing::warn!(%learner, %error, "what was learned could not be kept; see predict.folder");
            }
        }
    }
}
