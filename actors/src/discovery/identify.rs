//! Finding out, in the background, which components hold the same bytes.
//!
//! Components that agree in size are sampled, and those whose samples agree are digested, slowly and behind everybody
//! else. What a digest was made for once is remembered, in memory and in the catalogue's database.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use hotset_core::catalog::content::{Pace, digest, twins};
use hotset_core::catalog::{Catalogue, Component};
use hotset_core::io::idle_io_priority;
use hotset_core::units::MIB;
use hotset_core::{Bytes, ContentId};
use ractor::ActorRef;

use super::keep::found;
use super::{Discovery, DiscoveryMessage, Keep};
use crate::house::House;

/// What was read so far. Bounded by the catalogue: 64 bytes for each component that has its size in common with another.
#[derive(Debug, Default)]
pub(crate) struct Known {
    samples: HashMap<ContentId, [u8; 32]>,
    digests: HashMap<ContentId, ContentId>,
}

/// What the digests say: the better content id for each that stood for files only.
pub(crate) type Identified = HashMap<ContentId, ContentId>;

/// How long a digest rests after each megabyte while a load is under way: it then takes 20 MB/s of a disk at most.
const REST_UNDER_LOAD: Duration = Duration::from_millis(50);

struct Slowly<'a> {
    house: &'a House,
    each_mib: Duration,
}

impl Pace for Slowly<'_> {
    fn rest(&mut self) -> Option<Duration> {
        let house = self.house;
        if house.stop.is_cancelled() {
            return None;
        }
        let busy = house.loads.available_permits() < house.config.sessions.max_loads.max(1);
        Some(if busy {
            self.each_mib.max(REST_UNDER_LOAD)
        } else {
            self.each_mib
        })
    }
}

impl Discovery {
    /// Begins on a thread of its own, which tells Discovery when it is done.
    pub(super) fn identify(
        house: &Arc<House>,
        keep: &Arc<Keep>,
        known: Known,
        discovery: ActorRef<DiscoveryMessage>,
    ) {
        if house.machine.is_simulated() {
            // It reads at the pace of real time; equal components are loaded twice meanwhile.
            return;
        }
        let (house, keep) = (house.clone(), keep.clone());
        let started = std::thread::Builder::new()
            .name("hotset-identify".into())
            .spawn(move || {
                idle_io_priority();
                let mut known = known;
                let identified = compare(&house, &keep, &mut known);
                if !identified.is_empty() {
                    // Before anybody sees it: whoever knows a component by its better name now must find it under that name in the first
                    // catalogue after a restart. Memory that a client offers then is proven by the digest, and no file is read.
                    keep.learn(&identified);
                    keep.save(Catalogue::clone(&house.catalogue.load()));
                }
                // Lost where Discovery has died since: its successor compares again.
                let _ = discovery.send_message(DiscoveryMessage::Identified(known, identified));
            });
        if let Err(error) = started {
            tracing::warn!(%error, "no thread to compare components on; equal ones are loaded twice until the next scan");
        }
    }
}

fn compare(house: &House, keep: &Keep, known: &mut Known) -> Identified {
    let rate = house.config.catalog.digest_rate.max(Bytes(1)).as_f64();
    let mut pace = Slowly {
        house,
        each_mib: Duration::from_secs_f64((MIB as f64 / rate).min(60.0)),
    };
    let mut identified = Identified::new();
    for group in twins(&house.catalogue.load(), &mut known.samples) {
        let mut classes: HashMap<ContentId, Vec<Arc<Component>>> = HashMap::new();
        for component in group {
            if house.stop.is_cancelled() {
                return identified;
            }
            let file = component.content_id;
            let digested = match known
                .digests
                .get(&file)
                .copied()
                .or_else(|| keep.digest(file))
            {
                Some(digested) => digested,
                None => match digest(&component, &mut pace) {
                    Ok(digested) => {
                        keep.remember(file, digested);
                        digested
                    }
                    Err(error) => {
                        tracing::debug!(component = %component.id, %error, "not digested");
                        continue;
                    }
                },
            };
            known.digests.insert(file, digested);
            classes.entry(digested).or_default().push(component);
        }
        for (digested, members) in classes {
            // A name that the hub gave is as good as a digest of our own, and known to others.
            let named = members
                .iter()
                .map(|component| component.content_id)
                .find(|id| !matches!(id, ContentId::File(_)))
                .unwrap_or(digested);
            for member in members {
                if matches!(member.content_id, ContentId::File(_)) {
                    identified.insert(member.content_id, named);
                }
            }
        }
    }
    identified
}

/// Publishes what was found, and tells the ledger, so that what is resident stays so under its better name.
pub(super) fn publish(house: &House, identified: &Identified) {
    let before = house.catalogue.load();
    let found = found(&before, identified);
    if found.is_empty() {
        return;
    }
    let after = before.with_content_ids(&found);
    let components = before.models().flat_map(|model| &model.components);
    for component in components.filter(|component| found.contains_key(&component.id)) {
        let renamed = after
            .get(&component.id.model)
            .and_then(|model| model.component(&component.id.component));
        if let Some(renamed) = renamed {
            house.ledger.identified(&component.content_id, renamed);
        }
    }
    tracing::info!(components = found.len(), "equal components were found");
    let changes = after.changes_since(&before);
    house.catalogue.publish(after);
    let _ = house.catalogue_changes.send(changes.into());
}
