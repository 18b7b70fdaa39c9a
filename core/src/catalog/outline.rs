//! The outline of a file: its keys with all numbers made equal, so that twenty-four blocks are seen as one.

use std::collections::BTreeMap;
use std::ops::Bound;

use super::signatures::{Dims, Pattern, normalise};

/// The keys of a file in outline.
#[derive(Debug, Default)]
pub(super) struct Outline {
    /// In order, so that a pattern looks only at the keys that begin as it does.
    keys: BTreeMap<Box<str>, Vec<u64>>,
    pub(super) tensors: usize,
    dtypes: Vec<&'static str>,
    scratch: String,
}

impl Outline {
    /// Adds a tensor.
    pub(super) fn add(
        &mut self,
        name: &str,
        shape: impl Iterator<Item = u64>,
        dtype: &'static str,
    ) {
        self.tensors += 1;
        if !self.dtypes.contains(&dtype) {
            self.dtypes.push(dtype);
        }
        normalise(name, &mut self.scratch);
        if !self.keys.contains_key(self.scratch.as_str()) {
            self.keys
                .insert(self.scratch.as_str().into(), shape.collect());
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

    /// Whether such a key has this shape.
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
        scratch.clear();
        scratch.push_str(prefix);
        scratch.push_str(pattern.start());
        let start = scratch.as_str();
        if matches!(pattern, Pattern::Exact(_)) {
            return self.keys.get(start).is_some_and(|shape| test(shape));
        }
        self.keys
            .range::<str, _>((Bound::Included(start), Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(start))
            .any(|(key, shape)| pattern.matches(&key[prefix.len()..]) && test(shape))
    }

    /// Keys and shapes in outline.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &[u64])> {
        self.keys.iter().map(|(key, shape)| (&**key, &**shape))
    }
}
