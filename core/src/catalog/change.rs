//! What differs between two snapshots, and what stays visible although its files are gone.

use std::collections::HashSet;
use std::sync::Arc;

use serde::Serialize;

use super::model::{Model, Presence};
use super::snapshot::Catalogue;
use crate::ids::ModelName;

/// The difference of a snapshot to the one before it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CatalogueChange {
    /// The new snapshot's generation.
    pub generation: u64,
    /// Entries that are new.
    pub added: Vec<ModelName>,
    /// Entries that are not as they were.
    pub changed: Vec<ModelName>,
    /// Entries that are no more.
    pub removed: Vec<ModelName>,
}

impl CatalogueChange {
    /// What makes `new` different from `old`.
    #[must_use]
    pub fn between(old: &Catalogue, new: &Catalogue) -> Self {
        let mut change = Self {
            generation: new.generation(),
            ..Self::default()
        };
        for model in new.models() {
            match old.get(&model.name) {
                None => change.added.push(model.name.clone()),
                // An entry that was taken over is the same value.
                Some(before) if Arc::ptr_eq(before, model) || before == model => {}
                Some(_) => change.changed.push(model.name.clone()),
            }
        }
        let gone = |model: &&Arc<Model>| new.get(&model.name).is_none();
        change.removed = old.models().filter(gone).map(|m| m.name.clone()).collect();
        change
    }

    /// Whether nothing differs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.changed.is_empty() && self.removed.is_empty()
    }
}

/// The new snapshot, with the entries of the old one that are gone from disk but still leased: they are shown as
/// [`Presence::Gone`] until the last lease ends.
#[must_use]
pub fn keep_leased(old: &Catalogue, new: &Catalogue, leased: &HashSet<ModelName>) -> Catalogue {
    let gone: Vec<Arc<Model>> = old
        .models()
        .filter(|model| leased.contains(&model.name))
        .filter(|model| new.get(&model.name).is_none() && new.at_path(&model.path).is_none())
        .map(|model| match model.presence {
            Presence::Gone => Arc::clone(model),
            _ => Arc::new(Model {
                presence: Presence::Gone,
                ..(**model).clone()
            }),
        })
        .collect();
    if gone.is_empty() {
        return new.clone();
    }
    let models = new.models().cloned().chain(gone).collect();
    Catalogue::new(new.generation(), models)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::test_utils::{put, safetensors};
    use crate::catalog::{ScanOptions, scan};

    #[test]
    fn changes_are_told_and_leased_entries_stay_as_gone() {
        let folder = tempfile::tempdir().unwrap();
        let weights = |n: usize| safetensors(&[("t", &[n])], &[]);
        let options = ScanOptions::new(vec![folder.path().to_owned()]);
        let look = |before: &Catalogue| scan(&options, Some(before), &|_| {}).catalogue;
        for name in ["same", "changes", "goes", "leased"] {
            put(folder.path(), &format!("{name}.safetensors"), weights(10));
        }
        let old = look(&Catalogue::empty());
        assert!(CatalogueChange::between(&old, &look(&old)).is_empty());

        put(folder.path(), "changes.safetensors", weights(11));
        put(folder.path(), "new.safetensors", weights(12));
        for name in ["goes", "leased"] {
            std::fs::remove_file(folder.path().join(format!("{name}.safetensors"))).unwrap();
        }
        let leased = HashSet::from([ModelName::from("leased"), "same".into()]);
        let new = keep_leased(&old, &look(&old), &leased);
        let change = CatalogueChange::between(&old, &new);
        assert_eq!(change.added, ["new".into()]);
        assert_eq!(change.changed, ["changes".into(), "leased".into()]);
        assert_eq!(change.removed, ["goes".into()]);
        let gone = new.get(&"leased".into()).unwrap();
        assert_eq!(gone.presence, Presence::Gone);

        // The lease has ended: now it goes.
        let later = keep_leased(&new, &look(&new), &HashSet::new());
        assert!(later.get(&"leased".into()).is_none());
    }
}
