//! From the names that somebody writes to those of models: declared sets stand for theirs.

use std::collections::HashMap;

use super::ResolveError;
use crate::config::SetConfig;

/// A name that stands for models, and the declared sets that it is in.
pub(super) struct Name {
    pub(super) text: String,
    pub(super) path: Vec<String>,
}

/// Names without those of sets, and what these say of the order and of drafts.
#[derive(Default)]
pub(super) struct Expanded {
    pub(super) names: Vec<Name>,
    pub(super) orders: Vec<Vec<Vec<String>>>,
    /// The drafts of each set, and all names of it.
    pub(super) drafts: Vec<(Vec<String>, Vec<String>)>,
}

impl Expanded {
    /// Adds a name; `path` are the sets that it is in. Gives the names that it stands for.
    pub(super) fn add(
        &mut self,
        sets: &[SetConfig],
        name: &str,
        path: &mut Vec<String>,
    ) -> Result<Vec<String>, ResolveError> {
        let Some(set) = sets.iter().find(|set| set.name == name) else {
            if !self.names.iter().any(|known| known.text == name) {
                self.names.push(Name {
                    text: name.to_owned(),
                    path: path.clone(),
                });
            }
            return Ok(vec![name.to_owned()]);
        };
        if let Some(at) = path.iter().position(|outer| outer == name) {
            let mut path = path.split_off(at);
            path.push(name.to_owned());
            return Err(ResolveError::SetCycle { path });
        }
        path.push(name.to_owned());
        let mut all = Vec::new();
        let mut parts = HashMap::new();
        for inner in &set.models {
            let names = self.add(sets, inner, path)?;
            all.extend(names.iter().cloned());
            parts.insert(inner, names);
        }
        path.pop();
        let within = |names: &[String]| -> Vec<Vec<String>> {
            let names = names.iter().filter_map(|name| parts.get(name).cloned());
            names.collect()
        };
        self.orders.push(within(&set.order));
        let drafts = within(&set.drafts).concat();
        if !drafts.is_empty() {
            self.drafts.push((drafts, all.clone()));
        }
        Ok(all)
    }
}
