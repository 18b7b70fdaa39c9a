//! The outline of a file: its keys with all numbers made equal, so that twenty-four blocks are seen as one.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::OnceLock;

use memchr::memmem;
use smallvec::SmallVec;

use super::signatures::{Dims, Pattern, normalise};

/// The shapes that are kept of one outlined key; more say nothing that these don't.
const SHAPES_KEPT: usize = 6;

/// The different shapes of the tensors behind one outlined key.
type Shapes = SmallVec<[Box<[u64]>; 1]>;

/// The keys of a file in outline.
#[derive(Debug, Default)]
pub(super) struct Outline {
    /// In order, so that a pattern looks only at the keys that begin as it does. With the shapes that stand for them.
    keys: BTreeMap<Box<str>, Shapes>,
    pub(super) tensors: usize,
    dtypes: Vec<&'static str>,
    /// All keys, one a line: shows at once that no key has a text in it, which is so for most patterns.
    lines: OnceLock<String>,
    scratch: String,
}

impl Outline {
    /// Adds a tensor.
    pub(super) fn add(
        &mut self,
        name: &str,
        shape: impl Iterator<Item = u64> + Clone,
        dtype: &'static str,
    ) {
        self.tensors += 1;
        if !self.dtypes.contains(&dtype) {
            self.dtypes.push(dtype);
        }
        normalise(name, &mut self.scratch);
        let Some(known) = self.keys.get_mut(self.scratch.as_str()) else {
            let shapes = SmallVec::from_iter([shape.collect()]);
            self.keys.insert(self.scratch.as_str().into(), shapes);
            self.lines.take();
            return;
        };
        let again = known.iter().any(|k| shape.clone().eq(k.iter().copied()));
        if !again && known.len() < SHAPES_KEPT {
            known.push(shape.collect());
        }
    }

    pub(super) fn has_dtype(&self, names: &[String]) -> bool {
        names
            .iter()
            .any(|name| self.dtypes.contains(&name.as_str()))
    }

    /// Whether a key that begins with `prefix` goes on as the pattern says.
    pub(super) fn has(&self, prefix: &str, pattern: &Pattern, scratch: &mut String) -> bool {
        self.shape_where(prefix, pattern, scratch, |_| true)
    }

    /// Whether a tensor with such a key has this shape.
    pub(super) fn has_shape(
        &self,
        prefix: &str,
        pattern: &Pattern,
        dims: &Dims,
        scratch: &mut String,
    ) -> bool {
        self.shape_where(prefix, pattern, scratch, |shape| {
            shape.len() == dims.len()
                && shape
                    .iter()
                    .zip(dims)
                    .all(|(have, want)| want.is_none_or(|want| want == *have))
        })
    }

    fn shape_where(
        &self,
        prefix: &str,
        pattern: &Pattern,
        scratch: &mut String,
        test: impl Fn(&[u64]) -> bool,
    ) -> bool {
        if let Some(part) = pattern.longest_part()
            && memmem::find(self.lines().as_bytes(), part.as_bytes()).is_none()
        {
            return false;
        }
        scratch.clear();
        scratch.push_str(prefix);
        scratch.push_str(pattern.start());
        let start = scratch.as_str();
        if matches!(pattern, Pattern::Exact(_)) {
            let shapes = self.keys.get(start);
            return shapes.is_some_and(|shapes| shapes.iter().any(|shape| test(shape)));
        }
        self.keys
            .range::<str, _>((Bound::Included(start), Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(start))
            .any(|(key, shapes)| {
                pattern.matches(&key[prefix.len()..]) && shapes.iter().any(|shape| test(shape))
            })
    }

    fn lines(&self) -> &str {
        self.lines.get_or_init(|| {
            let mut lines = String::new();
            for key in self.keys.keys() {
                lines.push_str(key);
                lines.push('\n');
            }
            lines
        })
    }

    /// Keys in outline, each with its first shape.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &[u64])> {
        self.keys.iter().map(|(key, shapes)| {
            let shape: &[u64] = shapes.first().map_or(&[], |shape| shape);
            (&**key, shape)
        })
    }
}
