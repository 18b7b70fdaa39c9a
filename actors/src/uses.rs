//! Who used what, until somebody has to know.
//!
//! A policy has to know before it decides, and not earlier: a message for each request would wake an actor for nothing, many
//! thousand times a second. So uses lie here in their order, and whoever decides takes them first.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use hotset_core::catalog::Component;
use hotset_core::sync::Mutex;
use hotset_core::{SessionId, Tier};

/// So many may lie here before the one who takes them is woken for them alone.
const MANY: usize = 1024;
/// Beyond these the oldest are forgotten: who should take them does not work.
const MOST: usize = 16 * MANY;

/// The components of a set, and whether each was there already or on its way.
pub type UsedSet = Arc<[(Arc<Component>, bool)]>;

/// What a session was granted.
#[derive(Debug, Clone)]
pub struct Used {
    /// When, since the start of the system.
    pub at: Duration,
    /// Who asked.
    pub session: SessionId,
    /// Where it is used.
    pub tier: Tier,
    /// What for, and whether it was there already or on its way.
    pub components: UsedSet,
}

/// What a push calls for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pushed {
    /// It is the only one.
    First,
    Further,
    /// There are so many that they should be taken now.
    Many,
}

/// See the module's page.
#[derive(Debug, Default)]
pub(crate) struct Uses {
    waiting: Mutex<Vec<Used>>,
}

impl Uses {
    /// Adds one. `now` is asked under the lock, so that times never go back.
    pub(crate) fn push(
        &self,
        now: impl FnOnce() -> Duration,
        session: SessionId,
        tier: Tier,
        components: UsedSet,
    ) -> Pushed {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= MOST {
            waiting.drain(..MOST / 2);
        }
        waiting.push(Used {
            at: now(),
            session,
            tier,
            components,
        });
        match waiting.len() {
            1 => Pushed::First,
            count if count % MANY == 0 => Pushed::Many,
            _ => Pushed::Further,
        }
    }

    /// Takes all.
    pub(crate) fn take(&self) -> Vec<Used> {
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uses_keep_their_order_and_are_bounded() {
        let uses = Uses::default();
        let mut many = 0;
        for i in 0..MOST as u64 + 10 {
            let pushed = uses.push(
                || Duration::from_secs(i),
                SessionId(i),
                Tier::Ram,
                Arc::default(),
            );
            assert_eq!(pushed == Pushed::First, i == 0);
            many += usize::from(pushed == Pushed::Many);
        }
        assert!(many >= MOST / MANY);
        let taken = uses.take();
        assert_eq!(taken.len(), MOST / 2 + 10);
        assert!(taken.is_sorted_by_key(|used| used.at));
        assert_eq!(taken.last().unwrap().session, SessionId(MOST as u64 + 9));
        assert!(uses.take().is_empty());
    }
}
