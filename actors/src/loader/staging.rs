//! Where the components of a load come from on their way to a GPU.

use std::collections::BTreeMap;

use hotset_core::ContentId;
use hotset_core::memory::Claim;

use crate::vram_manager::{Ring, Source};

/// What is reserved in RAM on the way to a GPU.
#[derive(Default)]
pub(super) struct Staging {
    pub(super) claims: BTreeMap<ContentId, Claim>,
    pub(super) ring: Option<Ring>,
    /// What is resident on other GPUs.
    pub(super) peers: BTreeMap<ContentId, Claim>,
}

impl Staging {
    /// The source for a component: another GPU, its slab where one is promised, else the ring, which is given for later as
    /// well.
    pub(super) fn take(&mut self, claim: &Claim) -> (Option<Source>, Option<Ring>) {
        if let Some(peer) = self.peers.remove(&claim.component().content_id) {
            return (Some(Source::Peer(peer)), None);
        }
        match self.claims.remove(&claim.component().content_id) {
            Some(claim) => (Some(Source::Ram(claim)), None),
            None => (self.ring.clone().map(Source::Ring), self.ring.clone()),
        }
    }
}
