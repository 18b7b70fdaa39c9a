//! From names to a plan: which components a set consists of, in which order they are wanted, where they go, and whether
//! they fit. Pure: catalogue and books in, a [`Plan`] or a refusal with the arithmetic out.

pub mod allocate;
mod graph;
mod place;
mod set;
#[cfg(test)]
mod test_utils;

pub use graph::{DependencyGraph, Edge, ResolveError, resolve};
pub use place::{Eviction, Fit, Plan, PlanError, Planner, Route, Shortage, Step, There};
pub use set::{ComponentSet, Priority, Target, newcomers_wait};
