//! What a session asks to have resident together.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::keep_alive::KeepAlive;
use crate::ids::{GpuIndex, ParseTierError, Tier};

/// Where a set is wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// On a GPU where there is one, else in RAM.
    #[default]
    Best,
    /// In host memory.
    Ram,
    /// On the GPU that suits best.
    AnyGpu,
    /// On this GPU.
    Gpu(GpuIndex),
}

impl FromStr for Target {
    type Err = ParseTierError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "best" => Ok(Self::Best),
            "vram" => Ok(Self::AnyGpu),
            _ => text.parse().map(|tier| match tier {
                Tier::Ram => Self::Ram,
                Tier::Vram(gpu) => Self::Gpu(gpu),
            }),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Best => f.pad("best"),
            Self::Ram => f.pad("ram"),
            Self::AnyGpu => f.pad("vram"),
            Self::Gpu(gpu) => f.pad(&format!("vram:{gpu}")),
        }
    }
}

/// Whose turn it is when memory is short.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Priority {
    /// Nobody waits for it, and perhaps nobody ever will: it is loaded when links are idle.
    Prefetch,
    /// Nobody waits for it.
    Batch,
    /// Somebody waits for it.
    #[default]
    Interactive,
}

impl Priority {
    /// The place of a set that waits for memory, in the order of a queue: the least is next. A batch set stands where an
    /// interactive one would that was asked for `aging` later, and one that is prefetched twice as much later, so that it lets
    /// others pass for that long and no longer: whatever comes afterwards is behind it.
    #[must_use]
    pub const fn place(self, asked: Duration, aging: Duration) -> Duration {
        match self {
            Self::Interactive => asked,
            Self::Batch => asked.saturating_add(aging),
            Self::Prefetch => asked.saturating_add(aging).saturating_add(aging),
        }
    }
}

/// Whether newcomers wait behind a set that has waited this long itself, and for how long that stays so.
///
/// What is resident costs nothing, so leases on it pass every queue, and a component that somebody always holds would never
/// make room for a larger one. So after `aging` a set closes the tier to sessions that hold nothing, for as long again:
/// holders finish, and it has its turn. Where they do not, the tier is open for the next `aging`, and so on. Zero: never.
#[must_use]
pub fn newcomers_wait(waited: Duration, aging: Duration) -> (bool, Option<Duration>) {
    if aging.is_zero() {
        return (false, None);
    }
    let periods = waited.as_nanos() / aging.as_nanos();
    let into = waited.as_nanos() % aging.as_nanos();
    let left = aging.as_nanos() - into;
    let left = u64::try_from(left).map_or(Duration::MAX, Duration::from_nanos);
    (periods % 2 == 1, Some(left))
}

/// A component set: what is to be resident together, all or nothing.
///
/// Each name is a model's (`sdxl-base`: all its components) or one component's (`sdxl-base/unet`). What an adapter
/// depends on is added, unless `dependencies` is off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ComponentSet {
    /// The names.
    pub names: Vec<String>,
    /// Where to.
    #[serde(default)]
    pub target: Target,
    /// Whose turn it is when memory is short.
    #[serde(default)]
    pub priority: Priority,
    /// How long it may take; the configuration's `load.deadline` where it is not said.
    #[serde(default, with = "humantime_serde::option")]
    pub deadline: Option<Duration>,
    /// Whether the bases of adapters are part of the set.
    #[serde(default = "yes")]
    pub dependencies: bool,
    /// Whether components that no GPU has room for may be split: as many blocks as fit go there, and the others into RAM, from
    /// where whoever uses them streams them in their order.
    #[serde(default)]
    pub split: bool,
    /// How long the components stay after their last lease; the configuration's `load.keep_alive` where it is not said.
    #[serde(default)]
    pub keep_alive: Option<KeepAlive>,
}

const fn yes() -> bool {
    true
}

impl ComponentSet {
    /// These models or components, wherever they fit best.
    #[must_use]
    pub fn new<I: IntoIterator<Item = S>, S: Into<String>>(names: I) -> Self {
        Self {
            names: names.into_iter().map(Into::into).collect(),
            target: Target::Best,
            priority: Priority::Interactive,
            deadline: None,
            dependencies: true,
            split: false,
            keep_alive: None,
        }
    }

    /// The same set, somewhere else.
    #[must_use]
    pub const fn on(mut self, target: Target) -> Self {
        self.target = target;
        self
    }

    /// The same set, within this time.
    #[must_use]
    pub const fn within(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// The same set, with this priority.
    #[must_use]
    pub const fn with_priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// The same set, split where it is too large for any GPU.
    #[must_use]
    pub const fn may_split(mut self) -> Self {
        self.split = true;
        self
    }

    /// The same set, whose components stay for so long after their last lease.
    #[must_use]
    pub const fn keep_alive(mut self, keep_alive: KeepAlive) -> Self {
        self.keep_alive = Some(keep_alive);
        self
    }

    /// The same set, without the bases of its adapters.
    #[must_use]
    pub const fn without_dependencies(mut self) -> Self {
        self.dependencies = false;
        self
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_tier_is_closed_and_open_in_turns() {
        let at = |seconds| newcomers_wait(Duration::from_secs(seconds), Duration::from_secs(30));
        let left = |seconds| Some(Duration::from_secs(seconds));
        assert_eq!(at(0), (false, left(30)));
        assert_eq!(at(29), (false, left(1)));
        assert_eq!(at(30), (true, left(30)));
        assert_eq!(at(59), (true, left(1)));
        assert_eq!(at(60), (false, left(30)));
        assert_eq!(newcomers_wait(Duration::MAX, Duration::ZERO), (false, None));
    }

    proptest! {
        #[test]
        fn a_set_is_passed_by_those_alone_that_come_before_it_has_aged(
            asked in 0_u64..1000, later in 0_u64..1000, aging in 0_u64..100,
        ) {
            let place = |priority: Priority, at| priority.place(Duration::from_secs(at), Duration::from_secs(aging));
            let later = asked + later;
            // Who is as urgent never passes.
            for priority in [Priority::Prefetch, Priority::Batch, Priority::Interactive] {
                prop_assert!(place(priority, asked) <= place(priority, later));
            }
            prop_assert!(place(Priority::Interactive, asked) <= place(Priority::Batch, later));
            let passes = place(Priority::Interactive, later) < place(Priority::Batch, asked);
            prop_assert_eq!(passes, later - asked < aging);
        }
    }
}
