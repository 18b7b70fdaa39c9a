//! The record of what was decided and why: bounded, in memory, newest last.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::ids::{ComponentId, RequestId, SessionId, Tier};
use crate::units::Bytes;

/// One act of policy, with its inputs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Decision {
    /// Counts up from 1, without gaps.
    pub number: u64,
    /// When, since the start of the system.
    #[serde(rename = "at_s", serialize_with = "seconds")]
    pub at: Duration,
    /// What.
    #[serde(flatten)]
    pub act: Act,
}

fn seconds<S: serde::Serializer>(at: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(at.as_secs_f64())
}

/// What was decided.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "act", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Act {
    /// A set got its reservation in a tier.
    Admit {
        /// Whose.
        session: SessionId,
        /// Which load.
        request: RequestId,
        /// Where.
        tier: Tier,
        /// The components of the set.
        components: Vec<ComponentId>,
        /// What the set needed beyond what was there.
        needed: Bytes,
        /// What was free before.
        free: Bytes,
        /// How long it waited for memory.
        #[serde(serialize_with = "seconds")]
        waited: Duration,
    },
    /// A set was refused.
    Refuse {
        /// Whose.
        session: SessionId,
        /// Which load.
        request: RequestId,
        /// The components of the set, as far as they are known.
        components: Vec<ComponentId>,
        /// Why, with the arithmetic.
        reason: String,
    },
    /// A component was evicted.
    Evict {
        /// Which.
        component: ComponentId,
        /// From where.
        tier: Tier,
        /// What came free.
        bytes: Bytes,
        /// By which policy.
        policy: Arc<str>,
        /// The policy's figure.
        score: f64,
        /// The figure in words.
        reason: String,
        /// Why anything had to go.
        cause: EvictCause,
        /// How many candidates there were.
        candidates: usize,
    },
    /// A component is loaded on a guess.
    Prefetch {
        /// Which.
        component: ComponentId,
        /// Where to.
        tier: Tier,
        /// How much.
        bytes: Bytes,
        /// How likely it is to be wanted within the horizon.
        probability: f64,
    },
}

/// Why something had to go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "cause", rename_all = "snake_case")]
#[non_exhaustive]
pub enum EvictCause {
    /// A set needed the bytes.
    Demand {
        /// Whose.
        session: SessionId,
        /// Which load.
        request: RequestId,
        /// What was missing.
        missing: Bytes,
    },
    /// The high watermark was passed.
    Watermark {
        /// What was committed.
        committed: Bytes,
        /// What it may be at most.
        high: Bytes,
    },
    /// Somebody else on the machine needs memory.
    Pressure,
    /// Other processes have taken memory of the GPU.
    Foreign {
        /// What they use now.
        foreign: Bytes,
        /// What is left for hotset.
        allowed: Bytes,
    },
    /// The device had less than the books said.
    OutOfMemory {
        /// What was to be allocated.
        wanted: Bytes,
        /// What was free.
        free: Bytes,
    },
    /// A client or an embedder asked for it.
    Requested,
}

impl Act {
    /// Whether it concerns this component.
    #[must_use]
    pub fn concerns(&self, matches: impl Fn(&ComponentId) -> bool) -> bool {
        match self {
            Self::Admit { components, .. } | Self::Refuse { components, .. } => {
                components.iter().any(matches)
            }
            Self::Evict { component, .. } | Self::Prefetch { component, .. } => matches(component),
        }
    }

    /// The act as one sentence.
    #[must_use]
    pub fn sentence(&self) -> String {
        match self {
            Self::Admit {
                session,
                request,
                tier,
                components,
                needed,
                free,
                waited,
            } => format!(
                "admitted {} component(s) for {session}/{request} to {tier}: {needed} more needed, {free} free, waited {:.3} s",
                components.len(),
                waited.as_secs_f64()
            ),
            Self::Refuse {
                session,
                request,
                reason,
                ..
            } => format!("refused {session}/{request}: {reason}"),
            Self::Evict {
                component,
                tier,
                bytes,
                policy,
                reason,
                cause,
                candidates,
                ..
            } => {
                let cause = match cause {
                    EvictCause::Demand {
                        session,
                        request,
                        missing,
                    } => format!("{session}/{request} was missing {missing}"),
                    EvictCause::Watermark { committed, high } => {
                        format!("{committed} were committed, above the high watermark of {high}")
                    }
                    EvictCause::Pressure => "others on the machine need memory".into(),
                    EvictCause::Foreign { foreign, allowed } => {
                        format!("others use {foreign} of the GPU, which leaves {allowed}")
                    }
                    EvictCause::OutOfMemory { wanted, free } => {
                        format!("the GPU had only {free} free for {wanted}")
                    }
                    EvictCause::Requested => "it was asked for".into(),
                };
                format!(
                    "evicted {component} from {tier}, {bytes}, because {cause}; {policy} chose it out of {candidates} ({reason})"
                )
            }
            Self::Prefetch {
                component,
                tier,
                bytes,
                probability,
            } => format!(
                "prefetched {component} to {tier}, {bytes}: wanted soon with probability {probability:.2}"
            ),
        }
    }
}

/// The last decisions, up to a bound.
#[derive(Debug)]
pub struct DecisionLog {
    bound: usize,
    next: u64,
    kept: VecDeque<Decision>,
}

impl DecisionLog {
    /// An empty log that keeps at most `bound` decisions.
    #[must_use]
    pub const fn new(bound: usize) -> Self {
        Self {
            bound,
            next: 1,
            kept: VecDeque::new(),
        }
    }

    /// Adds one.
    pub fn push(&mut self, at: Duration, act: Act) {
        if self.bound == 0 {
            return;
        }
        if self.kept.len() == self.bound {
            self.kept.pop_front();
        }
        self.kept.push_back(Decision {
            number: self.next,
            at,
            act,
        });
        self.next += 1;
    }

    /// What is kept, newest first.
    pub fn newest_first(&self) -> impl Iterator<Item = &Decision> {
        self.kept.iter().rev()
    }

    /// How many were ever made.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.next - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_bounded_and_newest_first() {
        let mut log = DecisionLog::new(2);
        for request in 0..3 {
            log.push(
                Duration::from_secs(request),
                Act::Refuse {
                    session: SessionId(1),
                    request: RequestId(request),
                    components: vec![],
                    reason: "no".into(),
                },
            );
        }
        let numbers: Vec<_> = log.newest_first().map(|d| d.number).collect();
        assert_eq!(numbers, [3, 2]);
        assert_eq!(log.total(), 3);
    }
}
