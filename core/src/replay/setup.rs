//! Policies for replays: those of the service, and the clairvoyant one.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use serde::de::IntoDeserializer;

use super::Trace;
use crate::config::EvictionPolicyName;
use crate::policy::belady_size::BeladySize;
use crate::policy::hotset::HotsetRetention;
use crate::policy::{EvictionPolicy, by_name};

/// A policy that can be replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyName {
    /// One of the service's.
    Service(EvictionPolicyName),
    /// hotset with prefetch on the idle link.
    HotsetPrefetch,
    /// Belady by size and cost, which sees the future.
    BeladySize,
}

impl PolicyName {
    /// All of them, the clairvoyant last.
    pub fn all() -> impl Iterator<Item = Self> {
        let service = EvictionPolicyName::ALL.into_iter().map(Self::Service);
        service.chain([Self::HotsetPrefetch, Self::BeladySize])
    }

    /// A fresh policy for a replay of this trace.
    #[must_use]
    pub fn make(self, trace: &Trace) -> Box<dyn EvictionPolicy> {
        match self {
            Self::Service(name) => by_name(name),
            Self::HotsetPrefetch => Box::new(HotsetRetention::with_prefetch(0)),
            Self::BeladySize => Box::new(BeladySize::new(trace.uses())),
        }
    }
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Service(name) => by_name(*name).name(),
            Self::HotsetPrefetch => "hotset-prefetch",
            Self::BeladySize => "belady-size",
        })
    }
}

/// A name that no policy has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no policy: the policies are {known}")]
pub struct UnknownPolicyError {
    /// What was written.
    pub text: String,
    /// All names.
    pub known: String,
}

impl FromStr for PolicyName {
    type Err = UnknownPolicyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        for name in [Self::HotsetPrefetch, Self::BeladySize] {
            if name.to_string() == text {
                return Ok(name);
            }
        }
        let name: Result<_, serde::de::value::Error> =
            EvictionPolicyName::deserialize(text.into_deserializer());
        name.map(Self::Service).map_err(|_| UnknownPolicyError {
            text: text.to_owned(),
            known: Self::all()
                .map(|name| name.to_string())
                .collect::<Vec<_>>()
                .join(", "),
        })
    }
}
