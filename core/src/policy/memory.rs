//! What policies remember of components beyond their residency, with a bound.

use std::collections::BTreeMap;

use super::Candidate;
use super::lowest::Scores;
use super::slots::Slots;
use crate::ids::ContentId;

/// Components remembered; past it, what was put longest ago is forgotten.
const MAX_REMEMBERED: usize = 16_384;

/// A map that forgets what was put longest ago.
#[derive(Debug, Clone)]
pub(super) struct Memory<T> {
    values: Slots<(u64, T)>,
    by_age: BTreeMap<u64, ContentId>,
    puts: u64,
}

impl<T> Default for Memory<T> {
    fn default() -> Self {
        Self {
            values: Slots::default(),
            by_age: BTreeMap::new(),
            puts: 0,
        }
    }
}

impl<T> Memory<T> {
    pub(super) fn get(&self, content: &ContentId) -> Option<&T> {
        self.values.get(content).map(|(_, value)| value)
    }

    /// As [`Slots::score`].
    #[inline(always)]
    pub(super) fn score(
        &mut self,
        scores: &mut Scores<'_>,
        mut score: impl FnMut(&Candidate, Option<&T>) -> f64,
    ) {
        self.values.score(scores, |candidate, known| {
            score(candidate, known.map(|(_, value)| &*value))
        });
    }

    pub(super) fn put(&mut self, content: ContentId, value: T) {
        self.puts += 1;
        if let Some((age, _)) = self.values.insert(content, (self.puts, value)) {
            self.by_age.remove(&age);
        }
        self.by_age.insert(self.puts, content);
        if self.values.len() > MAX_REMEMBERED
            && let Some((_, oldest)) = self.by_age.pop_first()
        {
            self.values.remove(&oldest);
        }
    }

    pub(super) fn remove(&mut self, content: &ContentId) -> Option<T> {
        let (age, value) = self.values.remove(content)?;
        self.by_age.remove(&age);
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_forgets_the_oldest() {
        let id = |n: usize| {
            let mut digest = [0; 32];
            digest[..8].copy_from_slice(&n.to_le_bytes());
            ContentId::File(digest)
        };
        let mut memory = Memory::default();
        for n in 0..=MAX_REMEMBERED {
            memory.put(id(n), n);
            memory.put(id(1), n);
        }
        assert_eq!(memory.get(&id(0)), None);
        assert_eq!(memory.get(&id(1)), Some(&MAX_REMEMBERED));
        assert_eq!(memory.remove(&id(1)), Some(MAX_REMEMBERED));
        assert_eq!(memory.values.len(), memory.by_age.len());
    }
}
