//! The server's own heap: what past requests left free in it goes back to the system.
//!
//! A server lives for months, and a minute of many clients leaves a hundred megabytes in the allocator's pools. A host that embeds
//! hotset decides for itself.

use std::convert::Infallible;
use std::time::Duration;

/// How often.
const EVERY: Duration = Duration::from_secs(10);

/// Gives back, now and then, for ever.
pub(crate) async fn give_back() -> Infallible {
    let mut now_and_then = tokio::time::interval(EVERY);
    loop {
        now_and_then.tick().await;
        // Walking through the pools takes a few milliseconds, during which others wait for their memory; not a worker's thread.
        let trimmed = tokio::task::spawn_blocking(trim).await;
        tracing::trace!(?trimmed, "the heap");
    }
}

/// Whether something could be given back.
#[cfg(target_env = "gnu")]
fn trim() -> bool {
    // SAFETY: It takes no pointer, and takes the allocator's own locks for what it looks at.
    unsafe { libc::malloc_trim(0) == 1 }
}

/// Other allocators give back by themselves.
#[cfg(not(target_env = "gnu"))]
const fn trim() -> bool {
    false
}
