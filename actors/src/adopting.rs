//! Takes memory over that an earlier server's clients still map: a component is resident again without having been read.
//!
//! The bytes are charged before this begins, since they are taken of the machine whatever comes of it. From the first moment on
//! the component is on its way in the ledger, so that whoever wants it waits for this instead of reading it once more; nobody
//! sees a byte of it before it is known that nobody can write it, and that every byte is the file's.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use hotset_core::catalog::Component;
use hotset_core::decision::Act;
use hotset_core::io::{AdoptError, Adopted, Proof, adopt};
use hotset_core::memory::{
    Charge, Claim, FlightFailure, FlightTicket, Image, Memory, OfferedMemory, ResidencyState,
};
use hotset_core::{Bytes, Tier};

use crate::counters::add;
use crate::house::House;
use crate::system::System;

/// How often memory is asked for that is in use still: a server that was killed leaves pages behind that its disk reads and its
/// GPU's driver let go a little later.
const TRIES: u32 = 6;
/// Wait before it is asked again; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(20);

/// What became of offered memory.
#[derive(Debug)]
pub enum Adoption {
    /// The component is resident in it. It stays as long as the claim is held.
    Resident(Claim),
    /// It is not taken over, for this reason. It is charged as before.
    Refused {
        /// Why.
        reason: String,
        /// Whether its bytes were looked at, so that others may have waited for that.
        looked: bool,
        /// What it was charged with.
        charge: Option<Charge>,
    },
}

impl System {
    /// Takes offered memory over, which `charge` stands for, where it holds this component of the catalogue (`model/component`). When
    /// this returns, the component is on its way; what comes then goes on to its end also where nobody waits for it.
    pub fn adopt(
        &self,
        memory: Arc<OfferedMemory>,
        component: &str,
        charge: Charge,
    ) -> BoxFuture<'static, Adoption> {
        let house = &self.house;
        let done = |adoption| std::future::ready(adoption).boxed();
        let refused = |reason: String, charge| Adoption::Refused {
            reason,
            looked: false,
            charge,
        };
        let found = component.rsplit_once('/').and_then(|(model, part)| {
            let catalogue = house.catalogue.load();
            let model = catalogue.get(&model.into())?;
            let mut parts = model.components.iter();
            parts.find(|c| &*c.id.component == part).cloned()
        });
        let Some(component) = found else {
            let reason = format!("the catalogue has no {component}");
            return done(refused(reason, Some(charge)));
        };
        // A client of this very server that lost its connection and is back: its memory is in the books as it is.
        if let Some(claim) = resident_in(house, &component, &memory) {
            drop(charge);
            return done(Adoption::Resident(claim));
        }
        let (ticket, claim) = match house.ledger.adopt(&component, charge) {
            Ok(begun) => begun,
            Err(charge) => {
                let reason = format!("{} is there already, or on its way", component.id);
                return done(refused(reason, Some(charge)));
            }
        };
        let work = run(house.clone(), component, memory, ticket, claim);
        let working = house.tasks.spawn(work);
        let interrupted = move |_| refused("it was interrupted".into(), None);
        working
            .map(move |outcome| outcome.unwrap_or_else(interrupted))
            .boxed()
    }
}

/// A claim on the component where it is resident in just this memory.
fn resident_in(house: &House, component: &Arc<Component>, memory: &OfferedMemory) -> Option<Claim> {
    let components = std::slice::from_ref(component);
    let claims = house.ledger.claim_resident(Tier::Ram, components, None)?;
    let claim = claims.into_iter().next()?;
    let ResidencyState::Resident { held, .. } = claim.state() else {
        return None;
    };
    let Memory::Host(slab) = held.memory() else {
        return None;
    };
    (slab.identity() == Some(memory.identity())).then_some(claim)
}

#[tracing::instrument(name = "adopt", skip_all, fields(component = %component.id))]
async fn run(
    house: Arc<House>,
    component: Arc<Component>,
    memory: Arc<OfferedMemory>,
    ticket: FlightTicket,
    claim: Claim,
) -> Adoption {
    let began = house.ledger.now();
    let (ticket, outcome) = match look(&house, &component, &memory, ticket).await {
        Some(seen) => seen,
        None => {
            let reason = "the look at its bytes was interrupted".into();
            return Adoption::Refused {
                reason,
                looked: true,
                charge: None,
            };
        }
    };
    match outcome {
        Ok(Adopted { slab, table, proof }) => {
            let bytes = slab.bytes();
            add(&house.counters.adoptions, 1);
            add(&house.counters.bytes_adopted, bytes.get());
            ticket.show(Image {
                slab: slab.clone(),
                table: table.clone(),
            });
            ticket.land(Memory::Host(slab), table);
            house.decide(Act::Adopt {
                component: component.id.clone(),
                tier: Tier::Ram,
                bytes,
                read: proof == Proof::Files,
                took: house.ledger.now().saturating_sub(began),
            });
            Adoption::Resident(claim)
        }
        Err(error) => {
            tracing::info!(%error, "memory of an earlier server is not taken over");
            // Who waits reads it.
            let charge = ticket.fail_charged(FlightFailure::Interrupted);
            drop(claim);
            Adoption::Refused {
                reason: error.to_string(),
                looked: true,
                charge,
            }
        }
    }
}

type Looked = (FlightTicket, Result<Adopted, AdoptError>);

/// Looks at every byte, where blocking is allowed.
async fn look(
    house: &Arc<House>,
    component: &Arc<Component>,
    memory: &Arc<OfferedMemory>,
    mut ticket: FlightTicket,
) -> Option<Looked> {
    let mut pause = FIRST_PAUSE;
    for left in (0..TRIES).rev() {
        let (component, memory, stop) = (component.clone(), memory.clone(), house.stop.clone());
        let looking = house.off_thread(move || {
            let cancelled = ticket.cancelled();
            let outcome = adopt(&component, &memory, &|at: Bytes| {
                ticket.progress(at);
                !cancelled.is_cancelled() && !stop.is_cancelled()
            });
            (ticket, outcome)
        });
        let seen: Looked = looking.await.ok()?;
        match seen.1 {
            Err(AdoptError::Memory(error)) if error.is_passing() && left > 0 => {
                tracing::debug!(%error, "not yet");
                ticket = seen.0;
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
            _ => return Some(seen),
        }
    }
    None
}
