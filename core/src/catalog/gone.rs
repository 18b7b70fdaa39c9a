//! What stays visible although its files are gone.

use std::collections::HashSet;
use std::sync::Arc;

use super::model::{Model, Presence};
use super::snapshot::Catalogue;
use crate::ids::ModelName;

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
    use crate::catalog::snapshot::Change;
    use crate::catalog::test_utils::{put, safetensors};
    use crate::catalog::{ScanOptions, scan};

    #[test]
    fn leased_entries_stay_as_gone() {
        let folder = tempfile::tempdir().unwrap();
        let weights = |n: usize| safetensors(&[("t", &[n])], &[]);
        let options = ScanOptions::new(vec![folder.path().to_owned()]);
        let look = |before: &Catalogue| scan(&options, Some(before), &|_| {}).catalogue;
        for name in ["same", "changes", "goes", "leased"] {
            put(folder.path(), &format!("{name}.safetensors"), weights(10));
        }
        let old = look(&Catalogue::empty());
        assert!(look(&old).changes_since(&old).is_empty());

        put(folder.path(), "changes.safetensors", weights(11));
        put(folder.path(), "new.safetensors", weights(12));
        for name in ["goes", "leased"] {
            std::fs::remove_file(folder.path().join(format!("{name}.safetensors"))).unwrap();
        }
        let leased = HashSet::from([ModelName::from("leased"), "same".into()]);
        let new = keep_leased(&old, &look(&old), &leased);
        let changes: Vec<String> = new
            .changes_since(&old)
            .iter()
            .map(|change| match change {
                Change::Added(model) => format!("+{}", model.name),
                Change::Changed(model) => format!("~{}", model.name),
                Change::Removed(model) => format!("-{}", model.name),
            })
            .collect();
        assert_eq!(changes, ["~changes", "~leased", "+new", "-goes"]);
        let gone = new.get(&"leased".into()).unwrap();
        assert_eq!(gone.presence, Presence::Gone);

        // The lease has ended: now it goes.
        let later = keep_leased(&new, &look(&new), &HashSet::new());
        assert!(later.get(&"leased".into()).is_none());
    }
}
