//! The catalogue's database, opened when a scan first needs it, and used on threads that may block.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use hotset_core::catalog::Catalogue;
use hotset_core::catalog::store::Store;
use hotset_core::{ComponentId, ContentId};

use super::Identified;

/// The database, where there is one. What is wrong with it is told and never stops a scan.
pub(super) struct Keep {
    path: Option<PathBuf>,
    store: Mutex<Option<Store>>,
    /// What comparisons have found so far. A scan that began before knows files only.
    identified: Mutex<Identified>,
}

/// The better content id of each component of a catalogue for which there is one.
pub(super) fn found(
    catalogue: &Catalogue,
    identified: &Identified,
) -> HashMap<ComponentId, ContentId> {
    let components = catalogue.models().flat_map(|model| &model.components);
    components
        .filter_map(|component| {
            let named = identified.get(&component.content_id)?;
            Some((component.id.clone(), *named))
        })
        .collect()
}

impl Keep {
    pub(super) fn new(path: Option<PathBuf>) -> Self {
        Self {
            path,
            store: Mutex::new(None),
            identified: Mutex::default(),
        }
    }

    /// Hears what a comparison found.
    pub(super) fn learn(&self, identified: &Identified) {
        let mut known = self.names();
        known.extend(identified);
    }

    fn names(&self) -> std::sync::MutexGuard<'_, Identified> {
        self.identified
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The catalogue by the best content ids that are known.
    fn named(&self, catalogue: Catalogue) -> Catalogue {
        let found = found(&catalogue, &self.names());
        if found.is_empty() {
            return catalogue;
        }
        catalogue.with_content_ids(&found)
    }

    /// The catalogue as it was saved last.
    pub(super) fn load(&self) -> Option<Catalogue> {
        let mut slot = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        self.open(&mut slot)
    }

    /// Opens the database, and a new one in the place of one that is corrupt.
    fn open(&self, slot: &mut Option<Store>) -> Option<Catalogue> {
        let path = self.path.as_ref()?;
        match Store::open_loaded(path) {
            Ok((store, catalogue)) => {
                *slot = Some(store);
                Some(catalogue)
            }
            Err(error) => {
                tracing::warn!(%error, "the catalogue is not kept");
                None
            }
        }
    }

    /// Gives the catalogue by the best content ids, and saves it. A comparison that ends beside a scan saves after it, or is known here.
    pub(super) fn save(&self, catalogue: Catalogue) -> Catalogue {
        let mut slot = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        let catalogue = self.named(catalogue);
        self.write(&mut slot, &catalogue);
        catalogue
    }

    /// A Discovery that was started again has not opened the database yet; and where it is corrupt, another takes its place.
    fn write(&self, slot: &mut Option<Store>, catalogue: &Catalogue) {
        if slot.is_none() && self.open(slot).is_none() {
            return;
        }
        let (Some(path), Some(store)) = (&self.path, slot.as_mut()) else {
            return;
        };
        let mut saved = store.save(catalogue);
        if let Err(error) = &saved
            && error.is_corrupt()
        {
            *slot = None;
            saved = Store::anew(path, error).and_then(|mut store| {
                store.save(catalogue)?;
                *slot = Some(store);
                Ok(())
            });
        }
        if let Err(error) = saved {
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

#[cfg(test)]
mod tests {
    use hotset_core::catalog::{ScanOptions, scan};

    use super::*;

    #[test]
    fn a_database_that_could_not_be_opened_at_first_is_kept_later() {
        let folder = tempfile::tempdir().unwrap();
        let models = folder.path().join("models");
        std::fs::create_dir(&models).unwrap();
        std::fs::write(models.join("broken.safetensors"), b"\0").unwrap();
        let catalogue = scan(&ScanOptions::new(vec![models]), None, &|_| {}).catalogue;
        assert_eq!(catalogue.len(), 1);
        // No folder can be made where a file is.
        let state = folder.path().join("state");
        std::fs::write(&state, "").unwrap();
        let path = Some(state.join("catalogue.db"));
        let keep = Keep::new(path.clone());
        assert!(keep.load().is_none());
        let catalogue = keep.save(catalogue);
        std::fs::remove_file(&state).unwrap();
        keep.save(catalogue);
        assert_eq!(Keep::new(path).load().unwrap().len(), 1);
    }

    #[test]
    fn a_scan_that_began_before_a_comparison_ended_saves_its_names() {
        let folder = tempfile::tempdir().unwrap();
        let header = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.bytes().chain([7]));
        std::fs::write(folder.path().join("a.safetensors"), file).unwrap();
        let roots = vec![folder.path().to_path_buf()];
        let scanned = scan(&ScanOptions::new(roots), None, &|_| {}).catalogue;
        let content = |catalogue: &Catalogue| {
            let mut components = catalogue.models().flat_map(|model| &model.components);
            components.next().unwrap().content_id
        };
        let (file, named) = (content(&scanned), ContentId::Blake3([7; 32]));
        let path = Some(folder.path().join("catalogue.db"));
        let keep = Keep::new(path.clone());
        keep.learn(&Identified::from([(file, named)]));
        assert_eq!(content(&keep.save(scanned)), named);
        assert_eq!(content(&Keep::new(path).load().unwrap()), named);
    }
}
