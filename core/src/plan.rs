//! From names to a plan: which components a set consists of, in which order they are wanted, where they go, and whether
//! they fit. Pure: catalogue and books in, a [`Plan`] or a refusal with the arithmetic out.

pub mod allocate;
mod estimate;
mod graph;
mod keep_alive;
mod mix;
mod nearest;
pub mod passing;
mod place;
pub mod rates;
mod refusal;
mod set;
mod split;
mod steps;
#[cfg(test)]
mod test_utils;
mod way;

pub use estimate::{DISK_PER_S, Estimate, LINK_PER_S, disk, read_s, restore_s};
pub use graph::{DependencyGraph, Edge, ResolveError, resolve};
pub use keep_alive::{KeepAlive, ParseKeepAliveError};
pub use mix::{GiveUp, MixPlan, MixSet, SetPlan};
pub use nearest::{Nearest, suggest_variant};
pub use place::Planner;
pub use refusal::{PlanError, Shortage};
pub use set::{ComponentSet, Priority, Target, newcomers_wait};
pub use split::{Blocks, BlocksOf};
pub use steps::{Eviction, Fit, Placement, Plan, Route, Step, There};
