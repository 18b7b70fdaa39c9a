//! Memory of servers that are gone, which clients still map: counted until it is let go, and taken over where that can be.
//!
//! Several clients map the same memory, each through descriptors of its own: it is counted once, by what the kernel says of it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use hotset_core::catalog::Component;
use hotset_core::memory::{Charge, Claim, Lease, MemoryIdentity, OfferedMemory};
use hotset_core::{Bytes, SessionId, Tier};
use tokio::sync::{mpsc, watch};

use super::answers::{check_text, refusal};
use super::wire::{Adopted, Counted, ErrorReply, MappedMemory};
use crate::{Adoption, Hotset};

/// The most mappings of one client that are counted.
const MAX_MAPPED: usize = 4096;

/// What became of memory that was offered.
#[derive(Debug, Clone)]
enum Outcome {
    /// This component is resident in it.
    Resident(Arc<Component>),
    /// It is counted and no more, for this reason.
    Counted(Arc<str>),
}

/// All such memory, over all connections.
#[derive(Debug, Default)]
pub(super) struct Elsewhere {
    known: Mutex<HashMap<MemoryIdentity, Weak<Memory>>>,
    /// Components for which something was offered that did not hold them. Whoever wants one of these is not kept waiting once more
    /// by another offer: it is counted and no more. As many as the catalogue has components.
    disproved: Mutex<HashSet<String>>,
}

/// One memory that somebody maps.
#[derive(Debug)]
struct Memory {
    offered: Arc<OfferedMemory>,
    held: Mutex<Hold>,
    outcome: watch::Sender<Option<Outcome>>,
}

/// What keeps its bytes in the books.
#[derive(Debug, Default)]
struct Hold {
    charge: Option<Charge>,
    claim: Option<Claim>,
}

impl Memory {
    fn hold(&self) -> std::sync::MutexGuard<'_, Hold> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a connection hears of its mappings after they were counted.
#[derive(Debug)]
pub(super) struct Took {
    /// The request that told of it.
    pub(super) id: u64,
    mapping: u64,
    outcome: Outcome,
}

/// The mappings of one connection.
#[derive(Debug)]
pub(super) struct Mapped {
    counted: BTreeMap<u64, Mapping>,
    next: u64,
    /// Bounded by the mappings that there may be.
    told: mpsc::UnboundedSender<Took>,
}

#[derive(Debug)]
struct Mapping {
    memory: Arc<Memory>,
    component: String,
    /// Once it is taken over.
    lease: Option<Lease>,
}

impl Elsewhere {
    fn disproved(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.disproved
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory behind a descriptor; counted from now on, where it was not before.
    fn memory(&self, hotset: &Hotset, offered: OfferedMemory) -> (Arc<Memory>, bool) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let identity = offered.identity();
        if let Some(memory) = known.get(&identity).and_then(Weak::upgrade) {
            return (memory, false);
        }
        known.retain(|_, memory| memory.strong_count() > 0);
        let charge = hotset.ledger().charge(Tier::Ram, offered.held());
        let memory = Arc::new(Memory {
            offered: Arc::new(offered),
            held: Mutex::new(Hold {
                charge,
                claim: None,
            }),
            outcome: watch::Sender::new(None),
        });
        known.insert(identity, Arc::downgrade(&memory));
        (memory, true)
    }
}

/// Has memory taken over that is counted. From now on its component is on its way; the rest goes on beside the connection that told
/// of it.
fn take_over(hotset: &Hotset, elsewhere: &Arc<Elsewhere>, memory: Arc<Memory>, component: &str) {
    let counted = |reason: &str| {
        let outcome = Outcome::Counted(reason.into());
        memory.outcome.send_replace(Some(outcome));
    };
    if elsewhere.disproved().contains(component) {
        return counted("an earlier offer of this component did not hold it");
    }
    let charge = memory.hold().charge.take();
    let Some(charge) = charge else {
        return counted("there is no RAM tier");
    };
    let adopting = hotset.adopt(memory.offered.clone(), component, charge);
    let ledger = hotset.ledger().clone();
    let (elsewhere, component) = (elsewhere.clone(), component.to_owned());
    tokio::spawn(async move {
        let outcome = match adopting.await {
            Adoption::Resident(claim) => {
                let component = claim.component().clone();
                memory.hold().claim = Some(claim);
                Outcome::Resident(component)
            }
            Adoption::Refused {
                reason,
                looked,
                charge,
            } => {
                if looked {
                    elsewhere.disproved().insert(component);
                }
                let held = memory.offered.held();
                memory.hold().charge = charge.or_else(|| ledger.charge(Tier::Ram, held));
                Outcome::Counted(reason.into())
            }
        };
        memory.outcome.send_replace(Some(outcome));
    });
}

impl Mapped {
    pub(super) fn new() -> (Self, mpsc::UnboundedReceiver<Took>) {
        let (told, hears) = mpsc::unbounded_channel();
        let mapped = Self {
            counted: BTreeMap::new(),
            next: 0,
            told,
        };
        (mapped, hears)
    }

    /// Counts what a client says it maps; what it sends along must bear it out.
    pub(super) fn add(
        &mut self,
        hotset: &Hotset,
        elsewhere: &Arc<Elsewhere>,
        id: u64,
        memories: &[MappedMemory],
        descriptors: Vec<OwnedFd>,
    ) -> Result<Counted, ErrorReply> {
        let malformed = |message: String| refusal("malformed", message);
        if memories.len() != descriptors.len() {
            return Err(malformed(format!(
                "`still-mapped` names {} memories, and {} descriptors came with it",
                memories.len(),
                descriptors.len()
            )));
        }
        if self.counted.len() + memories.len() > MAX_MAPPED {
            return Err(malformed(format!(
                "more than {MAX_MAPPED} mappings on one connection"
            )));
        }
        let mut offered = Vec::with_capacity(memories.len());
        for (memory, descriptor) in memories.iter().zip(descriptors) {
            check_text("a component's name", &memory.component)?;
            match OfferedMemory::new(descriptor) {
                Ok(one) if memory.tier == "ram" => offered.push(one),
                _ => {
                    return Err(malformed(format!(
                        "the descriptor for {} is none of a slab",
                        memory.component
                    )));
                }
            }
        }
        let more: Bytes = offered.iter().map(OfferedMemory::held).sum();
        let quota = hotset.config().sessions.quota;
        let whole = more.saturating_add(self.bytes());
        if let Some(quota) = quota.filter(|quota| whole > *quota) {
            return Err(refusal(
                "quota",
                format!("{whole} are mapped, and a client may have {quota}"),
            ));
        }
        let mut mappings = Vec::with_capacity(memories.len());
        for (named, offered) in memories.iter().zip(offered) {
            let (memory, is_new) = elsewhere.memory(hotset, offered);
            if is_new {
                take_over(hotset, elsewhere, memory.clone(), &named.component);
            }
            self.next += 1;
            self.follow(id, self.next, &memory);
            self.counted.insert(
                self.next,
                Mapping {
                    memory,
                    component: named.component.clone(),
                    lease: None,
                },
            );
            mappings.push(self.next);
        }
        Ok(self.count(hotset, mappings))
    }

    /// Tells of the outcome when it is there.
    fn follow(&self, id: u64, mapping: u64, memory: &Arc<Memory>) {
        let (mut outcome, told) = (memory.outcome.subscribe(), self.told.clone());
        tokio::spawn(async move {
            let known = tokio::select! {
                () = told.closed() => return,
                known = outcome.wait_for(Option::is_some) => known,
            };
            if let Ok(Some(outcome)) = known.map(|known| known.clone()) {
                let _ = told.send(Took {
                    id,
                    mapping,
                    outcome,
                });
            }
        });
    }

    /// An outcome is there: where the memory was taken over, its mapping is a lease of this session from now on. Gives what to
    /// tell the client; nothing where it has let go meanwhile.
    pub(super) fn took(
        &mut self,
        hotset: &Hotset,
        session: SessionId,
        took: Took,
    ) -> Option<Adopted> {
        let mapping = self.counted.get_mut(&took.mapping)?;
        let reason = match took.outcome {
            Outcome::Counted(reason) => Some(reason.to_string()),
            Outcome::Resident(component) => {
                let claims = hotset
                    .ledger()
                    .claim_resident(Tier::Ram, &[component], None);
                mapping.lease = claims
                    .and_then(|mut claims| claims.pop())
                    .and_then(|claim| Lease::new(claim, session).ok());
                None
            }
        };
        Some(Adopted {
            mapping: took.mapping,
            component: mapping.component.clone(),
            resident: mapping.lease.is_some(),
            reason,
        })
    }

    /// Some is mapped no more.
    pub(super) fn remove(&mut self, hotset: &Hotset, numbers: &[u64]) -> Counted {
        for number in numbers {
            self.counted.remove(number);
        }
        self.count(hotset, Vec::new())
    }

    /// What is mapped; what one client maps twice is taken once.
    fn bytes(&self) -> Bytes {
        let memories: HashMap<MemoryIdentity, Bytes> = self
            .counted
            .values()
            .map(|mapping| &mapping.memory.offered)
            .map(|offered| (offered.identity(), offered.held()))
            .collect();
        memories.into_values().sum()
    }

    fn count(&self, hotset: &Hotset, mappings: Vec<u64>) -> Counted {
        let bytes = self.bytes();
        let over = hotset.ledger().sums(Tier::Ram).map_or(Bytes::ZERO, |ram| {
            ram.committed.saturating_sub(ram.budget).min(bytes)
        });
        Counted {
            mappings,
            bytes: bytes.get(),
            over_budget: over.get(),
        }
    }
}
