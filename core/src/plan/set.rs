//! What a session asks to have resident together.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

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
    /// Nobody waits for it.
    Batch,
    /// Somebody waits for it.
    #[default]
    Interactive,
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

    /// The same set, without the bases of its adapters.
    #[must_use]
    pub const fn without_dependencies(mut self) -> Self {
        self.dependencies = false;
        self
    }
}
