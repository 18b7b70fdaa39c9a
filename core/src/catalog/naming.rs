//! Giving every entry a name of its own.
//!
//! An entry is called by its path below its root without the suffix. Where several come to the same name, all of them but folders
//! take their suffix back, and what still collides is told apart by its root's name, then by a number in the order
//! of the paths. The same files give the same names whatever order they were found in.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::hub;
use super::model::{Component, Model};
use crate::ids::{ComponentId, ModelName};

/// An entry and the name that it would have alone.
pub(super) struct Named {
    pub(super) natural: String,
    pub(super) root: usize,
    pub(super) model: Arc<Model>,
}

/// Renames the entries that need it and sorts all by name.
pub(super) fn settle(mut entries: Vec<Named>, roots: &[PathBuf]) -> Vec<Arc<Model>> {
    entries.par_sort_by(in_order);
    tell_apart(&mut entries, |entry| {
        let suffix = entry.model.path.extension().and_then(OsStr::to_str)?;
        (!entry.model.format.is_folder()).then(|| format!("{}.{suffix}", entry.natural))
    });
    tell_apart(&mut entries, |entry| {
        hub::name_with_revision(&entry.natural, &entry.model.path)
    });
    tell_apart(&mut entries, |entry| {
        let root = roots.get(entry.root)?.file_name()?.to_string_lossy();
        Some(format!("{root}/{}", entry.natural))
    });
    let mut seen: HashMap<String, u32, foldhash::quality::RandomState> =
        HashMap::with_capacity_and_hasher(entries.len(), foldhash::quality::RandomState::default());
    let mut models: Vec<Arc<Model>> = Vec::with_capacity(entries.len());
    for entry in entries {
        let mut name = entry.natural;
        while let Some(times) = seen.get_mut(&name) {
            *times += 1;
            name = format!("{name}#{times}");
        }
        seen.insert(name.clone(), 1);
        models.push(renamed(entry.model, &name));
    }
    models.par_sort_by(|a, b| a.name.cmp(&b.name));
    models
}

fn in_order(a: &Named, b: &Named) -> Ordering {
    let natural = a.natural.cmp(&b.natural);
    natural.then_with(|| a.model.path.as_os_str().cmp(b.model.path.as_os_str()))
}

/// Gives entries of one natural name another one each, where `other` has one.
fn tell_apart(entries: &mut [Named], other: impl Fn(&Named) -> Option<String>) {
    let mut start = 0;
    let mut any = false;
    while start < entries.len() {
        let same = entries[start..]
            .iter()
            .take_while(|entry| entry.natural == entries[start].natural)
            .count();
        if same > 1 {
            for entry in &mut entries[start..start + same] {
                if let Some(name) = other(entry) {
                    entry.natural = name;
                    any = true;
                }
            }
        }
        start += same;
    }
    if any {
        entries.par_sort_by(in_order);
    }
}

fn renamed(model: Arc<Model>, name: &str) -> Arc<Model> {
    if model.name.as_str() == name {
        return model;
    }
    let name = ModelName::from(name);
    let components = model
        .components
        .iter()
        .map(|component| {
            Arc::new(Component {
                id: ComponentId {
                    model: name.clone(),
                    component: component.id.component.clone(),
                },
                ..Component::clone(component)
            })
        })
        .collect();
    Arc::new(Model {
        name,
        components,
        ..Model::clone(&model)
    })
}

/// The last part of a name.
pub(super) fn last_segment(name: &str) -> &str {
    Path::new(name)
        .file_name()
        .and_then(OsStr::to_str)
        .unwrap_or(name)
}
