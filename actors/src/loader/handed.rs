//! Leases on their way from a load to its client.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use hotset_core::ContentId;
use hotset_core::breaks::{self, Break};
use hotset_core::memory::Lease;
use hotset_core::plan::Plan;

use crate::loading::{LoadEvent, Outlet};

/// The leases of a load on their way to its client.
///
/// Memory for all was promised before the first byte moved, so what is there can be handed out while the rest still comes:
/// the set is all or nothing by then, but for files that cannot be read.
#[derive(Default)]
pub(super) struct Handed {
    /// Not handed out yet: one before it is not there, or the reader is behind.
    pub(super) ready: BTreeMap<ContentId, Lease>,
    pub(super) sent: HashSet<ContentId>,
    /// The plan that they belong to, and the generation of the catalogue that it was made by.
    pub(super) plan: Option<(Arc<Plan>, u64)>,
}

impl Handed {
    /// Hands out what may go, in loading order, without waiting for the reader.
    pub(super) fn on(&mut self, plan: &Plan, outlet: &Outlet) {
        for step in &plan.steps {
            let content = step.component.content_id;
            if self.sent.contains(&content) {
                continue;
            }
            let Some(lease) = self.ready.remove(&content) else {
                return;
            };
            if let Err(lease) = outlet.try_lease(lease) {
                self.ready.insert(content, lease);
                return;
            }
            self.sent.insert(content);
        }
    }

    /// Hands out all that is left.
    pub(super) async fn rest(&mut self, plan: &Plan, outlet: &Outlet) {
        for step in &plan.steps {
            if let Some(lease) = self.ready.remove(&step.component.content_id) {
                if breaks::is(Break::LostLease) && self.ready.is_empty() {
                    return;
                }
                self.sent.insert(step.component.content_id);
                outlet.send(LoadEvent::Leased(lease)).await;
            }
        }
    }
}
