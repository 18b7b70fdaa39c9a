//! Components that are too large for a GPU: as many of their blocks as fit go there, the others into host memory, from where
//! a worker streams them in their order.
//!
//! Each half is a component of its own to everybody but its client: it has its bytes, its residency and its lease. Where the
//! border lies depends on the budget alone, not on what is free, so that all who split a component share the halves.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::place::Planner;
use super::refusal::{PlanError, shortage};
use crate::catalog::{Component, FileRange, IMAGE_ALIGN, Part, Selection};
use crate::ids::{ComponentId, ContentId, Tier};
use crate::memory::TierView;
use crate::tensor::TensorTable;
use crate::units::Bytes;

/// Tensors that are used together, such as a transformer block.
#[derive(Debug, Clone, Default)]
struct Block {
    prefixes: Vec<Arc<str>>,
    ranges: Vec<FileRange>,
    bytes: u64,
    tensors: u32,
}

impl Block {
    fn add(&mut self, range: FileRange, bytes: u64) {
        self.ranges.push(range);
        self.bytes = self.bytes.saturating_add(bytes);
        self.tensors = self.tensors.saturating_add(1);
    }
}

/// The blocks of a component, in the order in which they are used.
#[derive(Debug, Clone)]
pub struct Blocks {
    whole: Arc<Component>,
    /// What belongs to no block: embeddings, norms, heads.
    shared: Block,
    blocks: Vec<Block>,
}

impl Blocks {
    /// Finds the blocks of a component by the names of its tensors: what begins alike up to the first number is a block.
    /// `None`: there are not two, or they cannot be told apart by how their names begin.
    #[must_use]
    pub fn of(component: &Arc<Component>, table: &TensorTable) -> Option<Self> {
        let places = Places::of(component);
        let mut shared = Block::default();
        let mut found: HashMap<(&str, u64), Block> = HashMap::new();
        for tensor in table.iter() {
            let range = places.range(tensor.offset, tensor.bytes)?;
            match numbered(&tensor.name) {
                None => {
                    shared.prefixes.push(tensor.name.clone());
                    shared.add(range, tensor.bytes);
                }
                Some((prefix, number)) => {
                    let block = found.entry((prefix, number)).or_insert_with(|| Block {
                        prefixes: vec![format!("{prefix}{number}.").into()],
                        ..Block::default()
                    });
                    block.add(range, tensor.bytes);
                }
            }
        }
        let blocks = sorted(found);
        let begins = |name: &str| {
            blocks
                .iter()
                .flat_map(|b| &b.prefixes)
                .any(|p| p.starts_with(name))
        };
        if blocks.len() < 2 || shared.prefixes.iter().any(|name| begins(name)) {
            return None;
        }
        Some(Self {
            whole: component.clone(),
            shared,
            blocks,
        })
    }

    /// How many blocks there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Never: it takes two.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// These blocks as a component, with what belongs to none where they begin with the first.
    fn part(&self, blocks: Range<usize>) -> Component {
        let shared = blocks.start == 0;
        let mine = self.blocks.get(blocks.clone()).unwrap_or_default();
        let mut all = Block::default();
        for block in mine.iter().chain(shared.then_some(&self.shared)) {
            all.prefixes.extend(block.prefixes.iter().cloned());
            all.ranges.extend_from_slice(&block.ranges);
            all.bytes = all.bytes.saturating_add(block.bytes);
            all.tensors = all.tensors.saturating_add(block.tensors);
        }
        let names: Vec<Arc<str>> = mine.iter().flat_map(|b| &b.prefixes).cloned().collect();
        let whole = &*self.whole;
        Component {
            id: ComponentId {
                model: whole.id.model.clone(),
                component: format!("{}[{}..{}]", whole.id.component, blocks.start, blocks.end)
                    .into(),
            },
            content_id: content(&whole.content_id, &all.prefixes),
            bytes: Bytes(all.bytes),
            tensors: all.tensors,
            selection: Some(Arc::new(Selection {
                prefixes: all.prefixes,
                ranges: joined(all.ranges),
            })),
            part: Some(Arc::new(Part {
                of: whole.id.clone(),
                content: whole.content_id,
                blocks: names,
                first: blocks.start,
                of_blocks: self.blocks.len(),
                shared,
            })),
            ..whole.clone()
        }
    }
}

/// What a name begins with up to its first number, and the number.
fn numbered(name: &str) -> Option<(&str, u64)> {
    let mut start = 0;
    for segment in name.split('.') {
        let end = start + segment.len();
        // The last one names the tensor itself.
        if end < name.len() && segment.bytes().all(|b| b.is_ascii_digit()) {
            // `01` would be found again as `1`.
            let number: u64 = segment.parse().ok()?;
            return (number.to_string() == segment).then(|| (&name[..start], number));
        }
        start = end + 1;
    }
    None
}

/// In the order of use, as far as names tell it: what goes down or in comes first, what comes up or out last.
fn sorted(found: HashMap<(&str, u64), Block>) -> Vec<Block> {
    const EARLY: [&str; 5] = ["down", "input", "encoder", "double", "transformer_blocks"];
    const LATE: [&str; 4] = ["up", "output", "decoder", "single"];
    let rank = |prefix: &str| {
        let mut segments = prefix.split('.');
        let begins = |words: &[&str], segment: &str| words.iter().any(|w| segment.starts_with(w));
        segments
            .find_map(|segment| {
                (begins(&EARLY, segment).then_some(0)).or(begins(&LATE, segment).then_some(2))
            })
            .unwrap_or(1)
    };
    let mut blocks: Vec<_> = found.into_iter().collect();
    blocks.sort_by(|((a, i), _), ((b, j), _)| (rank(a), a, i).cmp(&(rank(b), b, j)));
    blocks.into_iter().map(|(_, block)| block).collect()
}

fn content(whole: &ContentId, prefixes: &[Arc<str>]) -> ContentId {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"hotset part 1");
    hasher.update(whole.to_string().as_bytes());
    for prefix in prefixes {
        hasher.update(&(prefix.len() as u64).to_le_bytes());
        hasher.update(prefix.as_bytes());
    }
    ContentId::File(*hasher.finalize().as_bytes())
}

fn joined(mut ranges: Vec<FileRange>) -> Vec<FileRange> {
    ranges.retain(|range| range.end > range.start);
    ranges.sort_unstable_by_key(|range| (range.file, range.start));
    let mut out: Vec<FileRange> = Vec::new();
    for range in ranges {
        // Ranges that share a page would put it twice into the image.
        let page = |at: u64| at / IMAGE_ALIGN;
        match out.last_mut() {
            Some(last) if last.file == range.file && page(last.end) >= page(range.start) => {
                last.end = last.end.max(range.end);
            }
            _ => out.push(range),
        }
    }
    out
}

/// Where the bytes of an image come from.
struct Places {
    /// Where each extent begins in the image, and what it is.
    extents: Vec<(u64, FileRange)>,
}

impl Places {
    fn of(component: &Component) -> Self {
        let ranges: Vec<FileRange> = match &component.selection {
            Some(selection) => selection
                .ranges
                .iter()
                .map(|range| FileRange {
                    start: range.start / IMAGE_ALIGN * IMAGE_ALIGN,
                    ..*range
                })
                .collect(),
            None => (0..)
                .zip(&component.files)
                .map(|(file, source)| FileRange {
                    file,
                    start: 0,
                    end: source.identity.size.get(),
                })
                .collect(),
        };
        let mut at = 0_u64;
        let extents = ranges.into_iter().map(|range| {
            let begins = at;
            let bytes = Bytes(range.end.saturating_sub(range.start)).round_up(IMAGE_ALIGN);
            at = at.saturating_add(bytes.get());
            (begins, range)
        });
        Self {
            extents: extents.collect(),
        }
    }

    fn range(&self, offset: u64, bytes: u64) -> Option<FileRange> {
        let after = self
            .extents
            .partition_point(|(begins, _)| *begins <= offset);
        let (begins, extent) = self.extents.get(after.checked_sub(1)?)?;
        let start = extent.start.checked_add(offset - begins)?;
        let end = start.checked_add(bytes)?;
        (end <= extent.end).then_some(FileRange {
            file: extent.file,
            start,
            end,
        })
    }
}

/// The blocks of the components that have some, by their content.
pub type BlocksOf = HashMap<ContentId, Arc<Blocks>>;

/// A component, or a half of one, and where it goes.
type Place = (Arc<Component>, Tier);

impl Planner<'_> {
    /// Divides a set that is too large for any of these GPUs: what comes first in the order of use goes to the largest of
    /// them, and the last blocks of the largest components into RAM. Gives the tier, and each component or half of one
    /// with the tier that it goes to, in the order of use.
    ///
    /// # Errors
    /// [`PlanError::NeverFits`] where RAM has no room for the rest either.
    pub(super) fn divide(
        &self,
        order: &[Arc<Component>],
        gpus: &[&TierView],
        blocks: &BlocksOf,
    ) -> Result<(Tier, Vec<Place>), PlanError> {
        let never = |tier: &TierView, needed| {
            PlanError::never(vec![shortage(tier, needed, order, |c| {
                self.bytes_in(tier.tier, c)
            })])
        };
        let mut working = gpus.iter().filter(|view| view.out_of_service.is_none());
        let most = working.clone().map(|view| view.budget).max();
        let Some(view) = working.find(|view| Some(view.budget) == most) else {
            let shortages = gpus
                .iter()
                .map(|view| shortage(view, Bytes::ZERO, order, |c| self.bytes_in(view.tier, c)));
            return Err(PlanError::never(shortages.collect()));
        };
        let bytes = |c: &Component| self.bytes_in(view.tier, c);
        let whole: Bytes = order.iter().map(|c| bytes(c)).sum();
        let mut over = whole.saturating_sub(view.budget);
        let mut largest: Vec<usize> = (0..order.len()).collect();
        largest.sort_by_key(|i| std::cmp::Reverse(order.get(*i).map(|c| bytes(c))));
        // How many blocks of a component stay, and what they take.
        let mut kept: HashMap<usize, (usize, Bytes)> = HashMap::new();
        // Of each at least one, so that its client gets all of them in their order; none where that is too much.
        for least in [1, 0] {
            for i in &largest {
                let Some(component) = order.get(*i).filter(|_| !over.is_zero()) else {
                    break;
                };
                let Some(blocks) = blocks.get(&component.content_id) else {
                    continue;
                };
                let before = kept
                    .get(i)
                    .map_or_else(|| bytes(component), |(_, kept)| *kept);
                let allowed = before.saturating_sub(over);
                // More blocks never take less, so the most that fit are found by halving.
                let counts: Vec<usize> = (1..blocks.len()).collect();
                let fit = counts.partition_point(|n| bytes(&blocks.part(0..*n)) <= allowed);
                let stay = match fit.max(least) {
                    0 => Bytes::ZERO,
                    n => bytes(&blocks.part(0..n)),
                };
                over = over.saturating_sub(before.saturating_sub(stay));
                kept.insert(*i, (fit.max(least), stay));
            }
        }
        if !over.is_zero() {
            return Err(never(view, whole));
        }
        let divided: Vec<Place> = order
            .iter()
            .enumerate()
            .flat_map(
                |(i, component)| match (kept.get(&i), blocks.get(&component.content_id)) {
                    (Some((0, _)), _) => vec![(component.clone(), Tier::Ram)],
                    (Some((n, _)), Some(blocks)) => {
                        let (first, rest) = (blocks.part(0..*n), blocks.part(*n..blocks.len()));
                        vec![(Arc::new(first), view.tier), (Arc::new(rest), Tier::Ram)]
                    }
                    _ => vec![(component.clone(), view.tier)],
                },
            )
            .collect();
        let spilled = || {
            divided
                .iter()
                .filter(|(_, tier)| *tier == Tier::Ram)
                .map(|(c, _)| c.clone())
        };
        let needed: Bytes = spilled().map(|c| c.ram_bytes()).sum();
        if let Some(ram) = self.view(Tier::Ram)
            && needed > ram.budget
        {
            let spilled: Vec<_> = spilled().collect();
            let ram = shortage(ram, needed, &spilled, Component::ram_bytes);
            let gpu = shortage(view, whole, order, |c| self.bytes_in(view.tier, c));
            return Err(PlanError::never(vec![gpu, ram]));
        }
        Ok((view.tier, divided))
    }
}

#[cfg(test)]
mod tests;
