//! The record of what was decided and why: bounded, in memory, newest last.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::ids::{ComponentId, RequestId, SessionId, Tier};
use crate::predict::Grounds;
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
    /// A tier was chosen for a set.
    Place {
        /// Whose.
        session: SessionId,
        /// Which load.
        request: RequestId,
        /// Where to.
        tier: Tier,
        /// The components of the set.
        components: Vec<ComponentId>,
        /// The bytes that have to move there.
        moving: Bytes,
        /// What there was to choose from.
        alternatives: Vec<Alternative>,
    },
    /// A set that others do not wait for gave back what it had been promised, since somebody waits for that memory.
    Yield {
        /// Whose.
        session: SessionId,
        /// Which load.
        request: RequestId,
        /// Where from.
        tier: Tier,
        /// The components of the set.
        components: Vec<ComponentId>,
    },
    /// Leases were asked back.
    Revoke {
        /// From whom.
        session: SessionId,
        /// Where.
        tier: Tier,
        /// On what.
        components: Vec<ComponentId>,
        /// How long the holder has, in seconds.
        #[serde(rename = "grace_s", serialize_with = "seconds")]
        grace: Duration,
        /// Why.
        reason: String,
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
        /// It was loaded on a guess, and never used.
        wasted: bool,
    },
    /// A component is loaded on a guess.
    Prefetch {
        /// Which.
        component: ComponentId,
        /// Where to.
        tier: Tier,
        /// How much.
        bytes: Bytes,
        /// How likely it is to be wanted soon.
        probability: f64,
        /// How that is known.
        grounds: Grounds,
    },
    /// A component was taken over in memory of an earlier server, which clients had kept mapped.
    Adopt {
        /// Which.
        component: ComponentId,
        /// Where.
        tier: Tier,
        /// How much.
        bytes: Bytes,
        /// Whether its files were read, to compare; otherwise its digest was known.
        read: bool,
        /// How long it took to look at every byte, in seconds.
        #[serde(rename = "took_s", serialize_with = "seconds")]
        took: Duration,
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
    /// Another one that nobody has asked for yet is worth much more.
    Guess {
        /// Which.
        component: ComponentId,
    },
    /// Nobody has held it for as long as it was to be kept alive.
    KeptLongEnough {
        /// Since when nobody has, in seconds.
        #[serde(rename = "idle_s", serialize_with = "seconds")]
        idle: Duration,
    },
}

/// A tier that a set could have gone to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Alternative {
    /// Which.
    pub tier: Tier,
    /// Expected seconds: of loading, and of bringing back what would be evicted. `None`: there is no room without waiting.
    pub seconds: Option<f64>,
    /// What is free there.
    pub free: Bytes,
}

impl Act {
    /// Whether it concerns this component.
    #[must_use]
    pub fn concerns(&self, matches: impl Fn(&ComponentId) -> bool) -> bool {
        match self {
            Self::Admit { components, .. }
            | Self::Place { components, .. }
            | Self::Yield { components, .. }
            | Self::Revoke { components, .. }
            | Self::Refuse { components, .. } => components.iter().any(matches),
            Self::Evict { component, .. }
            | Self::Prefetch { component, .. }
            | Self::Adopt { component, .. } => matches(component),
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
            Self::Place {
                session,
                request,
                tier,
                moving,
                alternatives,
                ..
            } => {
                let others = alternatives.iter().map(|other| match other.seconds {
                    Some(seconds) => format!("{} in {seconds:.3} s", other.tier),
                    None => format!("{} after others let go", other.tier),
                });
                let others: Vec<String> = others.collect();
                format!(
                    "placed {session}/{request} in {tier}, {moving} to move, out of: {}",
                    others.join(", ")
                )
            }
            Self::Yield {
                session,
                request,
                tier,
                ..
            } => format!("{session}/{request} gave way in {tier} to a set that somebody waits for"),
            Self::Revoke {
                session,
                tier,
                components,
                grace,
                reason,
            } => format!(
                "asked {session} for {} lease(s) in {tier} back within {} s: {reason}",
                components.len(),
                grace.as_secs()
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
                    EvictCause::Guess { component } => {
                        format!("{component} will be wanted sooner, though nobody has asked yet")
                    }
                    EvictCause::KeptLongEnough { idle } => format!(
                        "nobody has held it for {:.1} s, as long as it was to be kept alive",
                        idle.as_secs_f64()
                    ),
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
                grounds,
            } => {
                let known = match grounds {
                    Grounds::Declared => "a session uses another part of its model",
                    Grounds::Usual => "it goes with what was just asked for",
                    Grounds::Predicted => "it is expected",
                };
                format!(
                    "prefetched {component} to {tier}, {bytes}: {known}, with probability {probability:.2}"
                )
            }
            Self::Adopt {
                component,
                tier,
                bytes,
                read,
                took,
            } => format!(
                "took {component} over in {tier}, {bytes} that clients of an earlier server had mapped, after comparing them with {} in {:.3} s",
                if *read { "the files" } else { "their digest" },
                took.as_secs_f64()
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

    /// Adds one, and gives it with its number.
    pub fn push(&mut self, at: Duration, act: Act) -> Decision {
        let decision = Decision {
            number: self.next,
            at,
            act,
        };
        self.next += 1;
        if self.bound > 0 {
            if self.kept.len() == self.bound {
                self.kept.pop_front();
            }
            self.kept.push_back(decision.clone());
        }
        decision
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
        // Where none is kept, whoever writes them down gets them all the same.
        let mut none = DecisionLog::new(0);
        let made = none.push(Duration::ZERO, Act::clone(&log.kept[0].act));
        assert_eq!((made.number, none.total()), (1, 1));
        assert_eq!(none.newest_first().count(), 0);
    }
}
