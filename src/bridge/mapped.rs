//! Memory of a server that is gone, which a client still maps: counted against the budgets until it is let go.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use hotset_core::memory::{Charge, Ledger, Reserved, Want};
use hotset_core::{Bytes, Tier};
use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use std::sync::Arc;

use super::wire::{Counted, ErrorReply, MappedMemory};

/// The most mappings of one client that are counted.
const MAX_MAPPED: usize = 4096;

/// The mappings of one connection.
#[derive(Debug, Default)]
pub(super) struct Mapped {
    counted: BTreeMap<u64, Mapping>,
    next: u64,
}

#[derive(Debug)]
struct Mapping {
    bytes: u64,
    /// `None` where the budget had no room: the memory is taken all the same.
    charge: Option<Charge>,
}

impl Mapped {
    /// Counts what a client says it maps; what it sends along must bear it out.
    pub(super) fn add(
        &mut self,
        ledger: &Arc<Ledger>,
        memories: &[MappedMemory],
        descriptors: &[OwnedFd],
    ) -> Result<Counted, ErrorReply> {
        let refused = |message: String| ErrorReply {
            code: "malformed".into(),
            message,
            ..ErrorReply::default()
        };
        if memories.len() != descriptors.len() {
            return Err(refused(format!(
                "`still-mapped` names {} memories, and {} descriptors came with it",
                memories.len(),
                descriptors.len()
            )));
        }
        if self.counted.len() + memories.len() > MAX_MAPPED {
            return Err(refused(format!(
                "more than {MAX_MAPPED} mappings on one connection"
            )));
        }
        let mut bytes = Vec::with_capacity(memories.len());
        for (memory, descriptor) in memories.iter().zip(descriptors) {
            bytes.push(slab_bytes(memory, descriptor).map_err(refused)?);
        }
        let mut mappings = Vec::with_capacity(memories.len());
        for (memory, bytes) in memories.iter().zip(bytes) {
            let wanted = [Want::Scratch(Bytes(bytes))];
            let charge = match ledger.reserve(Tier::Ram, &wanted, false) {
                Ok(Reserved::Granted(reservation)) => reservation.scratch,
                Ok(Reserved::Short(_)) | Err(_) => {
                    tracing::warn!(
                        component = memory.component,
                        bytes,
                        "a client maps memory of an earlier server for which the budget has no room"
                    );
                    None
                }
            };
            self.next += 1;
            self.counted.insert(self.next, Mapping { bytes, charge });
            mappings.push(self.next);
        }
        Ok(self.told(mappings))
    }

    /// Some is mapped no more.
    pub(super) fn remove(&mut self, numbers: &[u64]) -> Counted {
        for number in numbers {
            self.counted.remove(number);
        }
        self.told(Vec::new())
    }

    fn told(&self, mappings: Vec<u64>) -> Counted {
        let sum = |charged: bool| {
            self.counted
                .values()
                .filter(|mapping| mapping.charge.is_some() == charged)
                .map(|mapping| mapping.bytes)
                .sum()
        };
        Counted {
            mappings,
            bytes: sum(true),
            over_budget: sum(false),
        }
    }
}

/// The memory behind a slab, by the descriptor and not by what the client says of it.
fn slab_bytes(memory: &MappedMemory, descriptor: &OwnedFd) -> Result<u64, String> {
    let wanted = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE;
    let is_slab = fcntl_get_seals(descriptor).is_ok_and(|seals| seals.contains(wanted));
    if memory.tier != "ram" || !is_slab {
        return Err(format!(
            "the descriptor for {} is none of a slab",
            memory.component
        ));
    }
    let stat = fstat(descriptor).map_err(|error| format!("{}: {error}", memory.component))?;
    // Its length has room for larger slabs; what is taken is what has pages.
    let blocks = u64::try_from(stat.st_blocks);
    blocks
        .map(|blocks| blocks.saturating_mul(512))
        .map_err(|_| format!("{}: its size is negative", memory.component))
}
