//! The catalogue as readers see it: immutable, shared, taken without a message.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;

use super::model::Model;
use super::naming::last_segment;
use super::query;
use crate::ids::ModelName;

/// How many near names an error offers.
const NEAREST: usize = 5;

/// Every model that was found, as of one scan. Cloning is cheap: clones share everything.
#[derive(Clone)]
pub struct Catalogue {
    inner: Arc<Inner>,
}

/// Places in the list of models. Names come from strangers' files, so the hash is seeded at random.
type Numbers<K> = HashMap<K, u32, foldhash::quality::RandomState>;

#[derive(Default)]
struct Inner {
    generation: u64,
    /// Sorted by name; names and paths are unique.
    models: Vec<Arc<Model>>,
    by_name: Numbers<ModelName>,
    by_path: Numbers<PathKey>,
    /// What free words are looked for in, made at the first search.
    haystacks: OnceLock<Vec<query::Haystack>>,
}

/// A path compared by its bytes: quicker than `Path`, which takes it apart first.
struct PathKey(Arc<Path>);

impl PartialEq for PathKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_os_str() == other.0.as_os_str()
    }
}

impl Eq for PathKey {}

impl std::hash::Hash for PathKey {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.as_os_str().hash(state);
    }
}

impl std::borrow::Borrow<std::ffi::OsStr> for PathKey {
    fn borrow(&self) -> &std::ffi::OsStr {
        self.0.as_os_str()
    }
}

/// A text that names no model, or several.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FindError {
    /// There is none of this name.
    #[error("there is no model `{name}`{}", did_you_mean(nearest))]
    NotFound {
        /// What was asked for.
        name: String,
        /// Names that are like it, nearest first.
        nearest: Vec<ModelName>,
    },
    /// Several names end like this.
    #[error(
        "`{name}` can be any of {}: write more of the name",
        listed(candidates)
    )]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// Everything that it can mean, sorted.
        candidates: Vec<ModelName>,
    },
}

fn listed(names: &[ModelName]) -> String {
    let mut text: Vec<String> = names
        .iter()
        .take(NEAREST)
        .map(|n| format!("`{n}`"))
        .collect();
    if names.len() > NEAREST {
        text.push(format!("{} more", names.len() - NEAREST));
    }
    text.join(", ")
}

fn did_you_mean(nearest: &[ModelName]) -> String {
    match nearest {
        [] => "; `hotset ls` lists what there is".to_owned(),
        names => format!("; is it {}?", listed(names)),
    }
}

impl Catalogue {
    /// A catalogue of nothing, generation 0.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            inner: Arc::default(),
        }
    }

    /// A catalogue of these models, which must have names of their own.
    #[must_use]
    pub fn new(generation: u64, mut models: Vec<Arc<Model>>) -> Self {
        // Found sorted in most cases, which costs one pass.
        models.sort_by(|a, b| a.name.cmp(&b.name));
        let numbered = || (0_u32..).zip(&models);
        let by_name = numbered().map(|(i, m)| (m.name.clone(), i)).collect();
        let by_path = numbered()
            .map(|(i, m)| (PathKey(m.path.clone()), i))
            .collect();
        Self {
            inner: Arc::new(Inner {
                generation,
                models,
                by_name,
                by_path,
                haystacks: OnceLock::new(),
            }),
        }
    }

    /// A number that grows with every change.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.inner.generation
    }

    /// All models, by name.
    pub fn models(&self) -> impl Iterator<Item = &Arc<Model>> {
        self.inner.models.iter()
    }

    /// How many models there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.inner.models.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.inner.models.is_empty()
    }

    /// The model of exactly this name.
    #[must_use]
    pub fn get(&self, name: &ModelName) -> Option<&Arc<Model>> {
        self.at(*self.inner.by_name.get(name)?)
    }

    /// The model whose file or folder has this path.
    #[must_use]
    pub fn at_path(&self, path: &Path) -> Option<&Arc<Model>> {
        self.at(*self.inner.by_path.get(path.as_os_str())?)
    }

    pub(super) fn haystacks(&self) -> &[query::Haystack] {
        self.inner
            .haystacks
            .get_or_init(|| self.models().map(|model| query::haystack(model)).collect())
    }

    fn at(&self, index: u32) -> Option<&Arc<Model>> {
        self.inner.models.get(index as usize)
    }

    /// The model that a user means: by its full name, its path, or the last part of its name where only one model has
    /// it.
    ///
    /// # Errors
    /// That there is none, with the nearest names, or that there are several.
    pub fn find(&self, text: &str) -> Result<&Arc<Model>, FindError> {
        let exact = self.get(&ModelName::from(text));
        if let Some(model) = exact.or_else(|| self.at_path(Path::new(text))) {
            return Ok(model);
        }
        let candidates: Vec<&Arc<Model>> = self
            .models()
            .filter(|model| last_segment(model.name.as_str()) == text)
            .collect();
        match candidates.as_slice() {
            [one] => Ok(one),
            [] => Err(FindError::NotFound {
                name: text.to_owned(),
                nearest: self.nearest(text),
            }),
            several => Err(FindError::Ambiguous {
                name: text.to_owned(),
                candidates: several.iter().map(|m| m.name.clone()).collect(),
            }),
        }
    }

    fn nearest(&self, text: &str) -> Vec<ModelName> {
        let wanted = text.to_lowercase();
        let mut scored: Vec<(f64, &ModelName)> = self
            .models()
            .filter_map(|model| {
                let name = model.name.as_str().to_lowercase();
                let whole = strsim::jaro_winkler(&name, &wanted);
                let last = strsim::jaro_winkler(last_segment(&name), &wanted);
                let contained = if !wanted.is_empty() && name.contains(&wanted) {
                    0.95
                } else {
                    0.0
                };
                let score = whole.max(last).max(contained);
                (score > 0.8).then_some((score, &model.name))
            })
            .collect();
        scored.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(b.1)));
        scored
            .into_iter()
            .take(NEAREST)
            .map(|(_, name)| name.clone())
            .collect()
    }
}

/// What differs between two catalogues, by path.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// An entry that was not there before.
    Added(Arc<Model>),
    /// An entry whose files, name or identification changed.
    Changed(Arc<Model>),
    /// An entry whose files are gone.
    Removed(Arc<Model>),
}

impl Catalogue {
    /// What changed since an earlier catalogue, by name; what was removed comes last. Costs a look-up for each entry.
    #[must_use]
    pub fn changes_since(&self, earlier: &Self) -> Vec<Change> {
        if Arc::ptr_eq(&self.inner, &earlier.inner) {
            return Vec::new();
        }
        let new = self
            .models()
            .filter_map(|model| match earlier.at_path(&model.path) {
                None => Some(Change::Added(Arc::clone(model))),
                Some(before) if Arc::ptr_eq(before, model) || before == model => None,
                Some(_) => Some(Change::Changed(Arc::clone(model))),
            });
        let gone = earlier
            .models()
            .filter(|model| self.at_path(&model.path).is_none())
            .map(|model| Change::Removed(Arc::clone(model)));
        new.chain(gone).collect()
    }
}

impl fmt::Debug for Catalogue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Catalogue")
            .field("generation", &self.generation())
            .field("models", &self.len())
            .finish()
    }
}

impl Default for Catalogue {
    fn default() -> Self {
        Self::empty()
    }
}

/// The place where the latest catalogue is published. Readers take it without waiting for anybody, and keep theirs for
/// as long as they like.
#[derive(Debug)]
pub struct CatalogueCell(ArcSwap<Catalogue>);

impl Default for CatalogueCell {
    fn default() -> Self {
        Self(ArcSwap::from_pointee(Catalogue::empty()))
    }
}

impl CatalogueCell {
    /// A cell with nothing published yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The latest catalogue.
    #[must_use]
    pub fn load(&self) -> Arc<Catalogue> {
        self.0.load_full()
    }

    /// Makes this the latest catalogue.
    pub fn publish(&self, catalogue: Catalogue) {
        self.0.store(Arc::new(catalogue));
    }
}
