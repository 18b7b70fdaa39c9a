//! What the headers of a set of weights say, in sum, and a memory of headers that were seen before.
//!
//! Most files of a library have the tensors of many others: the same trainer, base and rank give the same names, shapes
//! and places, and only the metadata differ. A scan takes such a header apart once and knows the others by their hash.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, PoisonError};

use twox_hash::XxHash3_128;

use super::identify::{self, Clues, Identity};
use super::model::FileRange;
use super::outline::Outline;
use super::signatures::Signatures;

/// The most outlined keys that are remembered, of all headers together: some tens of megabytes.
const MAX_REMEMBERED_KEYS: usize = 400_000;

/// The most identities that are remembered.
const MAX_IDENTITIES: usize = 20_000;

/// What the headers of a set of weights say, in sum. Places are counted from the start of each file's data.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub(super) outline: Outline,
    /// Bytes for each dtype, most first.
    pub(super) dtypes: Vec<(&'static str, u64)>,
    pub(super) bytes: u64,
    pub(super) parameters: u64,
    pub(super) parts: Vec<Part>,
    /// Its number among the remembered; `None` where it is not.
    number: Option<u64>,
}

/// The tensors of one component inside a single-file checkpoint.
#[derive(Debug, Default)]
pub(super) struct Part {
    /// Index of the rule in [`Signatures::components`].
    pub(super) rule: usize,
    /// Which of the rule's prefixes occur.
    pub(super) prefixes: Vec<usize>,
    /// Joined once it is whole.
    pub(super) ranges: Vec<FileRange>,
    pub(super) dtypes: Vec<(&'static str, u64)>,
    pub(super) bytes: u64,
    pub(super) tensors: u32,
}

impl Contents {
    /// Adds a tensor. `file` counts the files of the set.
    pub(super) fn add(
        &mut self,
        signatures: &Signatures,
        name: &str,
        dtype: &'static str,
        shape: impl Iterator<Item = u64> + Clone,
        range: FileRange,
    ) {
        let bytes = range.end.saturating_sub(range.start);
        self.bytes = self.bytes.saturating_add(bytes);
        let elements = shape.clone().fold(1_u64, u64::saturating_mul);
        self.parameters = self.parameters.saturating_add(elements);
        count(&mut self.dtypes, dtype, bytes);
        self.outline.add(name, shape, dtype);
        let first = name.as_bytes().first();
        // Most keys begin as no prefix does, and one byte shows it.
        let begins = |prefix: &str| prefix.as_bytes().first() == first && name.starts_with(prefix);
        let mut rules = signatures.components.iter().enumerate();
        let found = rules.find_map(|(i, rule)| {
            let prefix = rule.prefixes.iter().position(|prefix| begins(prefix))?;
            Some((i, prefix))
        });
        if let Some((rule, prefix)) = found {
            self.add_to_part(rule, prefix, dtype, range);
        }
    }

    fn add_to_part(&mut self, rule: usize, prefix: usize, dtype: &'static str, range: FileRange) {
        let at = match self.parts.iter().position(|part| part.rule == rule) {
            Some(at) => at,
            None => {
                self.parts.push(Part {
                    rule,
                    ..Part::default()
                });
                self.parts.len() - 1
            }
        };
        let part = &mut self.parts[at];
        let bytes = range.end.saturating_sub(range.start);
        part.bytes = part.bytes.saturating_add(bytes);
        part.tensors = part.tensors.saturating_add(1);
        count(&mut part.dtypes, dtype, bytes);
        if !part.prefixes.contains(&prefix) {
            part.prefixes.push(prefix);
        }
        match part.ranges.last_mut() {
            Some(last) if last.file == range.file && last.end == range.start => {
                last.end = range.end;
            }
            _ => part.ranges.push(range),
        }
    }

    /// Sorts what was added.
    pub(super) fn finish(&mut self) {
        most_first(&mut self.dtypes);
        self.parts.sort_by_key(|part| part.rule);
        for part in &mut self.parts {
            most_first(&mut part.dtypes);
            part.prefixes.sort_unstable();
            part.ranges = joined(std::mem::take(&mut part.ranges));
        }
    }
}

fn count(sums: &mut Vec<(&'static str, u64)>, dtype: &'static str, bytes: u64) {
    match sums.iter_mut().find(|(known, _)| *known == dtype) {
        Some((_, sum)) => *sum = sum.saturating_add(bytes),
        None => sums.push((dtype, bytes)),
    }
}

fn most_first(sums: &mut [(&'static str, u64)]) {
    sums.sort_by(|a, b| (b.1, a.0).cmp(&(a.1, b.0)));
}

/// Sorts ranges and joins neighbours.
fn joined(mut ranges: Vec<FileRange>) -> Vec<FileRange> {
    ranges.sort_unstable_by_key(|r| (r.file, r.start));
    let mut out: Vec<FileRange> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if last.file == range.file && last.end >= range.start => {
                last.end = last.end.max(range.end);
            }
            _ => out.push(range),
        }
    }
    out
}

/// The identity of bytes that describe tensors: hash, length, and the length of the data that they fill.
pub(super) type Described = (u128, usize, u64);

/// The identity of a header's tensors.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Mark {
    Safetensors(Described),
    /// With what else says how the bytes are read.
    Gguf(Described, (bool, u64)),
}

/// Remembered contents by their number, and what the metadata say under the keys that signatures look at.
type SaidOf = (u64, Vec<Option<String>>);

/// What a scan knows: the signatures, and the headers that it has seen.
#[derive(Debug)]
pub(super) struct Known<'s> {
    pub(super) signatures: &'s Signatures,
    /// Differs for each scan, so that nobody can prepare two headers with one hash.
    seed: u64,
    seen: Mutex<Seen>,
    identities: Mutex<HashMap<SaidOf, Arc<Identity>>>,
}

#[derive(Debug, Default)]
struct Seen {
    contents: HashMap<Mark, Arc<Contents>>,
    keys: usize,
}

impl<'s> Known<'s> {
    pub(super) fn new(signatures: &'s Signatures) -> Self {
        Self {
            signatures,
            seed: std::hash::RandomState::new().hash_one(0),
            seen: Mutex::default(),
            identities: Mutex::default(),
        }
    }

    /// The mark of a header's tensors, given as the bytes that describe them.
    pub(super) fn mark(&self, tensors: &[u8], data_len: u64) -> Described {
        (
            XxHash3_128::oneshot_with_seed(self.seed, tensors),
            tensors.len(),
            data_len,
        )
    }

    pub(super) fn get(&self, mark: &Mark) -> Option<Arc<Contents>> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.contents.get(mark).cloned()
    }

    /// Remembers a header while there is room.
    pub(super) fn remember(&self, mark: Mark, mut contents: Contents) -> Arc<Contents> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.keys > MAX_REMEMBERED_KEYS {
            return Arc::new(contents);
        }
        seen.keys += contents.outline.iter().count() + 1;
        contents.number = Some(seen.contents.len() as u64);
        let contents = Arc::new(contents);
        // Another thread may have read the same header meanwhile: the first stays, whose number is taken.
        let known = seen.contents.entry(mark).or_insert(contents);
        Arc::clone(known)
    }

    /// Identifies weights without a configuration; contents and metadata that were seen before cost a look-up.
    pub(super) fn identify(&self, contents: &Contents, clues: &Clues<'_>) -> Identity {
        let known_as = contents
            .number
            .filter(|_| clues.config.is_none() && clues.class.is_none());
        let Some(number) = known_as else {
            return identify::identify(self.signatures, clues);
        };
        let said = self
            .signatures
            .metadata_keys
            .iter()
            .map(|key| {
                clues
                    .metadata
                    .and_then(|metadata| metadata.get(key))
                    .cloned()
            })
            .collect();
        let key = (number, said);
        let lock = || {
            self.identities
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        let known = lock().get(&key).cloned();
        if let Some(identity) = known {
            return identify::rebased(&identity, clues);
        }
        let identity = identify::identify(self.signatures, clues);
        let mut identities = lock();
        if identities.len() < MAX_IDENTITIES {
            identities.insert(key, Arc::new(identity.clone()));
        }
        identity
    }
}
