//! Locks and atomics of what several threads use at once: those of the standard library, or shuttle's, under which the models of
//! `memory/models.rs` and its like explore interleavings (`just models`).

#[cfg(not(feature = "models"))]
pub use std::sync::{Condvar, Mutex, MutexGuard, atomic};

#[cfg(feature = "models")]
pub use shuttle::sync::{Condvar, Mutex, MutexGuard, atomic};
