//! Parts that can be broken on purpose, so that a simulation can show that its invariants notice.
//!
//! Only with the feature `breaks`, which this project's tests alone switch on, and then only on a thread that asked for it:
//! without the feature [`is`] is a constant `false`, and nothing of this is in a build.

/// One part that no longer does what it must.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Break {
    /// The ledger promises more than a tier's budget.
    OverCommit,
    /// Bytes of a tier count as free while their memory still exists.
    FreedTooEarly,
    /// What is leased is evicted like the rest.
    LeasesIgnored,
    /// A lease that ends lifts no pin.
    LostRelease,
    /// Each read from disk is done twice.
    TwoFlights,
    /// A deadline passes and nobody is told.
    LateAnswer,
    /// A set is granted without its last component.
    LostLease,
    /// An actor that ended is not started again.
    NoRestart,
    /// Whoever asked last is served first.
    LastComesFirst,
    /// Evictions are not recorded.
    LostDecision,
    /// Status tells a byte more than the ledger has.
    WrongStatus,
}

#[cfg(feature = "breaks")]
mod broken {
    use super::Break;
    use std::cell::Cell;

    thread_local! {
        static BROKEN: Cell<Option<Break>> = const { Cell::new(None) };
    }

    /// Breaks a part on this thread, or mends it.
    pub fn set(broken: Option<Break>) {
        BROKEN.set(broken);
    }

    /// Whether this part is broken on this thread.
    #[must_use]
    pub fn is(part: Break) -> bool {
        BROKEN.get() == Some(part)
    }
}

#[cfg(not(feature = "breaks"))]
mod broken {
    use super::Break;

    /// Does nothing: there is nothing to break in this build.
    pub const fn set(_: Option<Break>) {}

    /// Never.
    #[must_use]
    pub const fn is(_: Break) -> bool {
        false
    }
}

pub use broken::{is, set};

/// Whether parts can be broken in this build at all.
pub const POSSIBLE: bool = cfg!(feature = "breaks");
