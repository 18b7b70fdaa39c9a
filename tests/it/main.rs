//! hotset through its public API: real files, real memory, a simulated GPU.
// Clippy's own exemption reaches `#[test]` functions only, not what they call.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod bridge;
mod chaos;
mod coordination;
mod faults;
mod guesses;
mod library;
mod loading;
mod memory_limit;
mod mixes;
mod protocol;
mod split;
mod survivors;
mod tenants;
mod virtual_time;
mod watching;
