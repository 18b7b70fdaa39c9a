//! What one connection holds: its leases, and the numbers under which its client knows memory and tensor tables.
//!
//! A memory number dies with the last lease that names it, on both sides at the same place in the stream: the server forgets it when
//! it writes `released`, the client when it reads it.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hotset_core::Tier;
use hotset_core::device::Export;
use hotset_core::memory::{Lease, Slab};
use hotset_core::tensor::TensorTable;

use super::tables::Tables;
use super::wire::{ErrorReply, Leased, LeasedComponent, Memory, Part, Table};

/// The most tensor tables that a connection remembers. Beyond it, tables get new numbers and are sent again.
const MAX_TABLES: usize = 4096;

/// See the module's page.
#[derive(Debug, Default)]
pub(super) struct Leases {
    held: BTreeMap<u64, Held>,
    memories: HashMap<usize, Numbered>,
    tables: HashMap<usize, (u64, Arc<TensorTable>)>,
    next_memory: u64,
    next_table: u64,
}

#[derive(Debug)]
struct Held {
    lease: Lease,
    memory: usize,
    preemptible: bool,
}

#[derive(Debug)]
struct Numbered {
    number: u64,
    leases: u32,
    /// Keeps the address that is the key from being another slab's.
    _slab: Option<Arc<Slab>>,
}

/// The key of a lease's memory: where it lies in this process, or on the device.
fn key(lease: &Lease) -> usize {
    match (lease.slab(), lease.allocation()) {
        (Some(slab), _) => Arc::as_ptr(slab) as usize,
        (None, Some(allocation)) => std::ptr::from_ref(allocation) as usize,
        (None, None) => 0,
    }
}

impl Leases {
    /// Takes the leases of a load over; gives the reply and the descriptors that go with it. Where that fails, none of them
    /// is held, and no number is given that the client would not hear of.
    pub(super) fn add(
        &mut self,
        leases: Vec<(Lease, Option<Exported>)>,
        preemptible: bool,
        tables: &Tables,
    ) -> Result<(Leased, Vec<OwnedFd>), ErrorReply> {
        let mut reply = Leased {
            leases: Vec::with_capacity(leases.len()),
            ..Leased::default()
        };
        let descriptors = self
            .take(leases, preemptible, tables, &mut reply)
            .inspect_err(|_| {
                let taken: Vec<u64> = reply.leases.iter().map(|leased| leased.lease).collect();
                self.release(&taken);
                let unheard = reply.tables.iter().map(|table| table.table);
                let unheard: Vec<u64> = unheard.collect();
                self.tables
                    .retain(|_, (number, _)| !unheard.contains(number));
            })?;
        reply.descriptors = descriptors.len() as u64;
        Ok((reply, descriptors))
    }

    fn take(
        &mut self,
        leases: Vec<(Lease, Option<Exported>)>,
        preemptible: bool,
        tables: &Tables,
        reply: &mut Leased,
    ) -> Result<Vec<OwnedFd>, ErrorReply> {
        let mut descriptors = Vec::new();
        if self.tables.len() + leases.len() > MAX_TABLES {
            self.tables.clear();
        }
        for (lease, exported) in leases {
            let memory_key = key(&lease);
            let table = self.table(&lease, tables, reply)?;
            let memory = match self.memories.get_mut(&memory_key) {
                Some(known) => {
                    known.leases += 1;
                    known.number
                }
                None => {
                    self.next_memory += 1;
                    let number = self.next_memory;
                    let (memory, descriptor) = describe(number, &lease, exported)?;
                    descriptors.extend(descriptor);
                    reply.memories.push(memory);
                    let slab = lease.slab().cloned();
                    self.memories.insert(
                        memory_key,
                        Numbered {
                            number,
                            leases: 1,
                            _slab: slab,
                        },
                    );
                    number
                }
            };
            let component = lease.component();
            reply.leases.push(LeasedComponent {
                lease: lease.id().0,
                component: component.id.to_string(),
                content: component.content_id.to_string(),
                tier: lease.tier().to_string(),
                bytes: component.bytes.get(),
                memory,
                table,
                part: component.part.as_deref().map(part),
            });
            self.held.insert(
                lease.id().0,
                Held {
                    memory: memory_key,
                    lease,
                    preemptible,
                },
            );
        }
        Ok(descriptors)
    }

    /// The number of a lease's table; it goes into the reply where the client does not know it.
    fn table(
        &mut self,
        lease: &Lease,
        tables: &Tables,
        reply: &mut Leased,
    ) -> Result<u64, ErrorReply> {
        let table = lease.table();
        let key = Arc::as_ptr(table) as usize;
        if let Some((number, _)) = self.tables.get(&key) {
            return Ok(*number);
        }
        let written = tables.write(table).map_err(|error| ErrorReply {
            code: "internal".into(),
            message: format!(
                "the tensors of {} cannot be written: {error}",
                lease.component().id
            ),
            ..ErrorReply::default()
        })?;
        self.next_table += 1;
        reply.tables.push(Table {
            table: self.next_table,
            tensors: written.to_vec(),
        });
        self.tables.insert(key, (self.next_table, table.clone()));
        Ok(self.next_table)
    }

    /// Ends leases; gives those that were there.
    pub(super) fn release(&mut self, numbers: &[u64]) -> Vec<u64> {
        numbers
            .iter()
            .copied()
            .filter(|number| {
                let Some(held) = self.held.remove(number) else {
                    return false;
                };
                if let Some(memory) = self.memories.get_mut(&held.memory) {
                    memory.leases -= 1;
                    if memory.leases == 0 {
                        self.memories.remove(&held.memory);
                    }
                }
                true
            })
            .collect()
    }

    /// The leases that may be taken back in a tier.
    pub(super) fn preemptible(&self, tier: Tier) -> Vec<u64> {
        self.held
            .iter()
            .filter(|(_, held)| held.preemptible && held.lease.tier() == tier)
            .map(|(number, _)| *number)
            .collect()
    }

    /// What these leases are on.
    pub(super) fn components(&self, numbers: &[u64]) -> Vec<hotset_core::ComponentId> {
        let held = numbers.iter().filter_map(|number| self.held.get(number));
        held.map(|held| held.lease.component().id.clone()).collect()
    }

    /// Whether one of these is still held.
    pub(super) fn holds_any(&self, numbers: &[u64]) -> bool {
        numbers.iter().any(|number| self.held.contains_key(number))
    }
}

fn part(part: &hotset_core::catalog::Part) -> Part {
    Part {
        of: part.of.to_string(),
        blocks: part.blocks.iter().map(ToString::to_string).collect(),
        first: part.first as u64,
        of_blocks: part.of_blocks as u64,
        shared: part.shared,
    }
}

/// A device's memory as a client can import it, or why it cannot.
pub(super) type Exported = Result<Export, String>;

/// Has the leases that lie on a device exported by it. In host memory a slab's descriptor is made when a client needs it.
pub(super) async fn exported(leases: Vec<Lease>) -> Vec<(Lease, Option<Exported>)> {
    let mut out = Vec::with_capacity(leases.len());
    for lease in leases {
        let export = match lease.allocation() {
            None => None,
            Some(allocation) => Some(
                allocation
                    .device()
                    .export(allocation)
                    .await
                    .map_err(|error| format!("{error}; load to ram to map it")),
            ),
        };
        out.push((lease, export));
    }
    out
}

/// New memory for the client, with its descriptor where it can be mapped.
fn describe(
    number: u64,
    lease: &Lease,
    exported: Option<Exported>,
) -> Result<(Memory, Option<OwnedFd>), ErrorReply> {
    let tier = lease.tier().to_string();
    let Some(slab) = lease.slab() else {
        let memory = Memory {
            memory: number,
            tier,
            bytes: lease.allocation().map_or(0, |held| held.bytes().get()),
            ..Memory::default()
        };
        return Ok(match exported {
            Some(Ok(export)) => (
                Memory {
                    descriptor: true,
                    bytes: export.bytes.get(),
                    offset: export.offset,
                    mapped: export.mapped.get(),
                    gpu: Some(export.uuid),
                    ..memory
                },
                Some(export.descriptor),
            ),
            refused => {
                let reason = refused.and_then(Result::err);
                (Memory { reason, ..memory }, None)
            }
        });
    };
    let descriptor = slab.read_only_descriptor().map_err(|error| ErrorReply {
        code: "internal".into(),
        message: error.to_string(),
        ..ErrorReply::default()
    })?;
    let memory = Memory {
        memory: number,
        tier,
        bytes: slab.bytes().get(),
        descriptor: true,
        ..Memory::default()
    };
    Ok((memory, Some(descriptor)))
}
