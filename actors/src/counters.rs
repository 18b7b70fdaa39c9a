//! What is counted, for status and metrics. Plain atomics: counting never waits.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counts since the start of the system.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: AtomicU64,)*
        }

        /// The counts at one time.
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
        pub struct CounterValues {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// The counts now.
            #[must_use]
            pub fn values(&self) -> CounterValues {
                CounterValues { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Loads that were asked for.
    loads_requested,
    /// Loads whose leases were all granted.
    loads_granted,
    /// Loads that were refused or failed.
    loads_refused,
    /// Loads that ran out of time.
    loads_timed_out,
    /// Loads that were cancelled.
    loads_cancelled,
    /// Requested components that were resident already.
    component_hits,
    /// Requested components that had to be loaded or were on their way.
    component_misses,
    /// Components read from disk.
    reads,
    /// Bytes read from disk.
    bytes_read,
    /// Reads that failed.
    reads_failed,
    /// Components that were taken over in memory of an earlier server.
    adoptions,
    /// Their bytes.
    bytes_adopted,
    /// Components uploaded to a GPU.
    uploads,
    /// Bytes uploaded.
    bytes_uploaded,
    /// Of them, bytes that came from other GPUs.
    bytes_from_peers,
    /// Uploads that failed.
    uploads_failed,
    /// Components evicted from RAM.
    evictions_ram,
    /// Components evicted from VRAM.
    evictions_vram,
    /// Components prefetched.
    prefetches,
    /// Actors restarted.
    actor_restarts,
}

/// Adds to a counter.
pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}
