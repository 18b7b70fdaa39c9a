//! Who owns which bytes.
//!
//! [`Slab`] is host memory that other processes can map, from an [`Arena`] that keeps it warm; [`Ledger`] knows the budget, the residencies, the
//! reservations and the leases of every tier. Both outlive every actor: what an actor holds about memory is a copy of
//! what the ledger says, and all bytes come back by dropping a handle, never by a message that might not arrive.

mod arena;
mod flight;
mod frozen;
mod lease;
mod ledger;
mod mapping;
mod slab;
mod writer;

pub use arena::{Arena, ArenaOptions, ArenaView};
pub use flight::{Flight, FlightFailure, FlightState, FlightTicket, Image};
pub use frozen::{FrozenError, FrozenSlab, MemoryIdentity, OfferedMemory};
pub use lease::{Lease, LeaseError, Place, TensorView};
pub use ledger::{
    Charge, Claim, Evicted, Held, Ledger, Memory, Never, Reservation, Reserved, ResidencyState,
    ResidencyView, Shortfall, TierSums, TierView, WakeWhen, Want,
};
pub use mapping::{
    Addresses, HUGE_PAGE, MappedRange, MappingId, MappingObserver, Pages, Unmapping,
};
pub use slab::{HostRange, Slab, SlabError};
pub use writer::{SlabPiece, SlabWriter};
