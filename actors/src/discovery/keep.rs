//! The catalogue's database, opened when a scan first needs it, and used on threads that may block.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use hotset_core::ContentId;
use hotset_core::catalog::Catalogue;
use hotset_core::catalog::store::Store;

/// The database, where there is one. What is wrong with it is told and never stops a scan.
pub(super) struct Keep {
    path: Option<PathBuf>,
    store: Mutex<Option<Store>>,
}

impl Keep {
    pub(super) const fn new(path: Option<PathBuf>) -> Self {
        Self {
            path,
            store: Mutex::new(None),
        }
    }

    /// The catalogue as it was saved last.
    pub(super) fn load(&self) -> Option<Catalogue> {
        let path = self.path.as_ref()?;
        let mut slot = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        let opened = Store::open(path).and_then(|mut store| {
            let catalogue = store.load()?;
            *slot = Some(store);
            Ok(catalogue)
        });
        opened
            .inspect_err(|error| tracing::warn!(%error, "the catalogue is not kept"))
            .ok()
    }

    pub(super) fn save(&self, catalogue: &Catalogue) {
        let mut slot = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = slot.as_mut()
            && let Err(error) = store.save(catalogue)
        {
            tracing::warn!(%error, "the catalogue could not be saved; it will be at the next change");
        }
    }

    /// The digest that was made for a file content id before.
    pub(super) fn digest(&self, file: ContentId) -> Option<ContentId> {
        let slot = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        slot.as_ref()?.digest(file).ok().flatten()
    }

    /// Remembers the digest of a file content id.
    pub(super) fn remember(&self, file: ContentId, digest: ContentId) {
        let slot = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(error)) = slot
            .as_ref()
            .map(|store| store.remember_digest(file, digest))
        {
            tracing::warn!(%error, "a digest could not be kept; it is made again after a restart");
        }
    }
}
