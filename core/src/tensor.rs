//! Tensors as the weight files describe them: names, dtypes, shapes, places. No arithmetic.

mod dtype;

use std::sync::Arc;

pub use dtype::Dtype;

/// One tensor as the header of a weight file describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderTensor {
    /// Its name, unique in the file.
    pub name: Arc<str>,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// First byte, counted from where the file's data begin.
    pub start: u64,
    /// End, counted likewise.
    pub end: u64,
}

impl HeaderTensor {
    /// Length in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.end - self.start
    }
}

/// One tensor of a component and where its bytes lie in the component's image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// The tensor's name in its file.
    pub name: Arc<str>,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost dimension first, in elements.
    pub shape: Vec<usize>,
    /// First byte, counted from the start of the image.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// The tensors of one component, sorted by name, each within `image_bytes`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TensorTable {
    entries: Vec<TensorEntry>,
}

impl TensorTable {
    /// A table of these tensors. Names must be unique; where they are not, the error names the first one.
    ///
    /// # Errors
    /// The name that occurs twice.
    pub fn new(mut entries: Vec<TensorEntry>) -> Result<Self, Arc<str>> {
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        match entries.windows(2).find(|pair| pair[0].name == pair[1].name) {
            Some(pair) => Err(pair[0].name.clone()),
            None => Ok(Self { entries }),
        }
    }

    /// The tensor of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&TensorEntry> {
        self.entries
            .binary_search_by(|entry| (*entry.name).cmp(name))
            .ok()
            .map(|i| &self.entries[i])
    }

    /// All tensors, by name.
    pub fn iter(&self) -> std::slice::Iter<'_, TensorEntry> {
        self.entries.iter()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}
