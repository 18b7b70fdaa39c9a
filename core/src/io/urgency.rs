//! Whose turn it is at the disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// How urgent a read is: demand before prefetch, and the earlier deadline first. Shared with the reader, so that it can
/// be raised, or the read called off, while it is under way. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Urgency {
    place: Arc<AtomicU64>,
    demanded: CancellationToken,
    called_off: CancellationToken,
}

/// The place of a prefetch: behind every demand, whatever its deadline.
const PREFETCH: u64 = u64::MAX;
/// The place of a demand without a deadline: behind all that have one.
const NO_DEADLINE: u64 = u64::MAX - 1;

fn place(deadline: Option<Duration>) -> u64 {
    deadline.map_or(NO_DEADLINE, |at| {
        u64::try_from(at.as_nanos()).map_or(NO_DEADLINE, |at| at.min(NO_DEADLINE))
    })
}

impl Urgency {
    fn at(place: u64) -> Self {
        let urgency = Self {
            place: Arc::new(AtomicU64::new(place)),
            demanded: CancellationToken::new(),
            called_off: CancellationToken::new(),
        };
        if place != PREFETCH {
            urgency.demanded.cancel();
        }
        urgency
    }

    /// Somebody waits for it, until this time since the start of the system.
    #[must_use]
    pub fn demand(deadline: Option<Duration>) -> Self {
        Self::at(place(deadline))
    }

    /// Nobody waits for it yet.
    #[must_use]
    pub fn prefetch() -> Self {
        Self::at(PREFETCH)
    }

    /// Somebody waits for it now, whoever did before. Never makes it less urgent.
    pub fn raise(&self, deadline: Option<Duration>) {
        self.place.fetch_min(place(deadline), Ordering::Relaxed);
        self.demanded.cancel();
    }

    /// Nobody wants it any more: a read under way ends with [`ReadError::Interrupted`](super::ReadError::Interrupted).
    pub fn call_off(&self) {
        self.called_off.cancel();
    }

    /// Whether it is a guess that nobody waits for.
    #[must_use]
    pub fn is_prefetch(&self) -> bool {
        self.place() == PREFETCH
    }

    /// Waits until somebody waits for it.
    pub async fn demanded(&self) {
        self.demanded.cancelled().await;
    }

    /// Whether nobody wants it any more.
    #[must_use]
    pub fn is_called_off(&self) -> bool {
        self.called_off.is_cancelled()
    }

    /// Waits until nobody wants it any more.
    pub async fn called_off(&self) {
        self.called_off.cancelled().await;
    }

    /// Its place among others: the smaller, the earlier. May become smaller at any time.
    #[must_use]
    pub fn place(&self) -> u64 {
        self.place.load(Ordering::Relaxed)
    }
}

impl Default for Urgency {
    fn default() -> Self {
        Self::demand(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demand_comes_before_prefetch_and_the_earlier_deadline_first() {
        let soon = Urgency::demand(Some(Duration::from_secs(1)));
        let late = Urgency::demand(Some(Duration::from_secs(9)));
        let any = Urgency::default();
        let guess = Urgency::prefetch();
        let mut order = [&guess, &any, &late, &soon];
        order.sort_by_key(|urgency| urgency.place());
        let places: Vec<u64> = order.iter().map(|urgency| urgency.place()).collect();
        assert_eq!(
            places,
            [soon.place(), late.place(), any.place(), guess.place()]
        );
        guess.clone().raise(Some(Duration::from_secs(1)));
        assert!(!guess.is_prefetch());
        guess.raise(None);
        assert_eq!(guess.place(), soon.place(), "it is never lowered");
    }
}
