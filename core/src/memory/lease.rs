//! The right to use a residency, and typed views into its bytes.

use std::sync::Arc;

use super::ledger::{Claim, Held, Memory, ResidencyState};
use super::slab::Slab;
use crate::catalog::Component;
use crate::ids::{GpuIndex, LeaseId, SessionId, Tier};
use crate::tensor::{Dtype, TensorEntry, TensorTable};
use crate::units::Bytes;

/// Why a lease does not give what was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseError {
    /// The component has no such tensor.
    #[error("{component} has no tensor `{tensor}`{}; it has {tensors} tensors, see `hotset show`", .nearest.as_ref().map(|name| format!(" (nearest: `{name}`)")).unwrap_or_default())]
    NoTensor {
        /// The component.
        component: String,
        /// What was asked for.
        tensor: String,
        /// A tensor whose name begins or ends alike.
        nearest: Option<Arc<str>>,
        /// How many tensors there are.
        tensors: usize,
    },
}

/// The right to use one component in one tier. While it lives, the bytes stay where they are; dropping it gives them
/// free for eviction, though not before the last user is gone.
#[derive(Debug)]
pub struct Lease {
    id: LeaseId,
    session: SessionId,
    claim: Claim,
    held: Arc<Held>,
    table: Arc<TensorTable>,
}

/// Where a tensor's bytes are.
#[derive(Debug, Clone, Copy)]
pub enum Place<'a> {
    /// In host memory, read-only.
    Host(&'a [u8]),
    /// In the memory of a GPU.
    Device {
        /// Which GPU.
        gpu: GpuIndex,
        /// The device pointer of the first byte.
        address: u64,
        /// How many bytes.
        bytes: Bytes,
    },
}

/// One tensor of a leased component.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// Its name.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost dimension first, in elements; row-major without gaps.
    pub shape: &'a [usize],
    /// Its bytes.
    pub place: Place<'a>,
}

impl<'a> TensorView<'a> {
    /// The bytes, where they are in host memory.
    #[must_use]
    pub const fn host_bytes(&self) -> Option<&'a [u8]> {
        match self.place {
            Place::Host(bytes) => Some(bytes),
            Place::Device { .. } => None,
        }
    }
}

impl Lease {
    /// Makes a lease out of a claim whose component is resident; gives the claim back where it is not.
    ///
    /// # Errors
    /// The claim, unchanged.
    pub fn new(claim: Claim, session: SessionId) -> Result<Self, Claim> {
        match claim.state() {
            ResidencyState::Resident { held, table } => Ok(Self {
                id: claim.lease_opened(session),
                session,
                claim,
                held,
                table,
            }),
            ResidencyState::Absent | ResidencyState::Loading(_) => Err(claim),
        }
    }

    /// From what the ledger opened under its lock.
    pub(super) const fn opened(
        id: LeaseId,
        session: SessionId,
        claim: Claim,
        held: Arc<Held>,
        table: Arc<TensorTable>,
    ) -> Self {
        Self {
            id,
            session,
            claim,
            held,
            table,
        }
    }

    /// Its number, unique for the life of the system.
    #[must_use]
    pub const fn id(&self) -> LeaseId {
        self.id
    }

    /// Whose it is.
    #[must_use]
    pub const fn session(&self) -> SessionId {
        self.session
    }

    /// Why its bytes are gone, where they are: the device that held them was lost.
    #[must_use]
    pub fn revoked(&self) -> Option<Arc<str>> {
        self.claim.ledger().revoked(self.id)
    }

    /// The component.
    #[must_use]
    pub const fn component(&self) -> &Arc<Component> {
        self.claim.component()
    }

    /// Where it is resident.
    #[must_use]
    pub const fn tier(&self) -> Tier {
        self.claim.tier()
    }

    /// The slab, where the tier is RAM: its descriptor can be handed to another process.
    #[must_use]
    pub fn slab(&self) -> Option<&Arc<Slab>> {
        match self.held.memory() {
            Memory::Host(slab) => Some(slab),
            Memory::Device(_) => None,
        }
    }

    /// The device memory, where the tier is VRAM.
    #[must_use]
    pub fn allocation(&self) -> Option<&crate::device::Allocation> {
        match self.held.memory() {
            Memory::Host(_) => None,
            Memory::Device(allocation) => Some(allocation),
        }
    }

    /// The tensors, with offsets into the memory that they lie in. The same value as long as the residency lasts.
    #[must_use]
    pub const fn table(&self) -> &Arc<TensorTable> {
        &self.table
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// [`LeaseError::NoTensor`] where the component has none of that name.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, LeaseError> {
        self.table
            .get(name)
            .map(|entry| self.view(entry))
            .ok_or_else(|| LeaseError::NoTensor {
                component: self.component().id.to_string(),
                tensor: name.to_owned(),
                nearest: self
                    .table
                    .iter()
                    .find(|entry| entry.name.ends_with(name) || name.ends_with(&*entry.name))
                    .map(|entry| entry.name.clone()),
                tensors: self.table.len(),
            })
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.table.iter().map(|entry| self.view(entry))
    }

    fn view<'a>(&'a self, entry: &'a TensorEntry) -> TensorView<'a> {
        let place = match self.held.memory() {
            Memory::Host(slab) => {
                // The table was checked against the image before the component became resident.
                let start = entry.offset as usize;
                Place::Host(&slab.filled()[start..start + entry.bytes as usize])
            }
            Memory::Device(allocation) => Place::Device {
                gpu: allocation.gpu(),
                address: allocation.address() + entry.offset,
                bytes: Bytes(entry.bytes),
            },
        };
        TensorView {
            name: &entry.name,
            dtype: entry.dtype,
            shape: &entry.shape,
            place,
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.claim.lease_closed(self.id);
    }
}
