//! Filling a slab: from start to end, or in pieces that are under way at the same time.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::slab::{Slab, SlabError};
use crate::units::Bytes;

/// The one writer of a [`Slab`].
///
/// It is filled either from the front, with [`spare`](Self::spare) and [`advance`](Self::advance), or by pieces that
/// are [lent](Self::lend) out, written by whoever holds them, and [taken back](Self::take_back) in any order. The
/// watermark rises over what is written without a gap.
#[derive(Debug)]
pub struct SlabWriter {
    slab: Arc<Slab>,
    /// Everything below is written, or lent out.
    lent: usize,
    /// Pieces that came back before one in front of them: start and end, by start.
    ahead: Vec<(usize, usize)>,
}

/// Bytes of a slab that somebody writes. As long as it lives, so does the memory, and nobody else touches these bytes. A
/// piece that is dropped instead of given back leaves the watermark below it for good.
#[derive(Debug)]
pub struct SlabPiece {
    slab: Arc<Slab>,
    start: usize,
    end: usize,
}

impl SlabPiece {
    /// Where in the slab it begins.
    #[must_use]
    pub const fn start(&self) -> u64 {
        self.start as u64
    }

    /// How long it is.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether it has no bytes; the writer lends none such.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Its bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `SlabWriter::lend` hands out each range once until the slab is rewound, which needs all pieces gone;
        // it lies inside the live mapping and above the watermark, where nobody reads.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.slab.mapping().start().as_ptr().add(self.start),
                self.len(),
            )
        }
    }

    /// Whether memory may be missing behind its bytes.
    #[must_use]
    pub fn is_cold(&self) -> bool {
        self.end > self.slab.mapping().present()
    }

    /// Puts memory behind its bytes, so that writing them need not wait for it. Blocks. Writing does the same where this
    /// fails, only later.
    pub fn populate(&mut self) {
        if let Err(error) = self.slab.mapping().populate(self.end) {
            tracing::debug!(%error, bytes = self.len(), "cannot populate a piece of a slab");
        }
    }
}

impl SlabWriter {
    pub(super) const fn new(slab: Arc<Slab>) -> Self {
        Self {
            slab,
            lent: 0,
            ahead: Vec::new(),
        }
    }

    /// The slab, for those who follow its watermark.
    #[must_use]
    pub const fn slab(&self) -> &Arc<Slab> {
        &self.slab
    }

    fn watermark(&self) -> usize {
        self.slab.filled.load(Ordering::Relaxed)
    }

    fn end(&self) -> usize {
        self.slab.bytes().get() as usize
    }

    /// How many bytes are written without a gap.
    #[must_use]
    pub fn filled(&self) -> Bytes {
        Bytes(self.watermark() as u64)
    }

    /// How many bytes are written or lent out.
    #[must_use]
    pub const fn lent(&self) -> Bytes {
        Bytes(self.lent as u64)
    }

    /// The bytes that are neither written nor lent out.
    pub fn spare(&mut self) -> &mut [u8] {
        // SAFETY: only this writer touches bytes at or above `lent`, it is unique and borrowed mutably, and the range
        // ends inside a live mapping.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.slab.mapping().start().as_ptr().add(self.lent),
                self.end() - self.lent,
            )
        }
    }

    /// Raises the watermark by `bytes`, which the caller has just written at the start of [`spare`](Self::spare).
    ///
    /// # Panics
    /// If that would pass the end, or while pieces are out.
    pub fn advance(&mut self, bytes: usize) {
        assert_eq!(self.lent, self.watermark(), "pieces of the slab are out");
        assert!(
            bytes <= self.end() - self.lent,
            "watermark past the end of a slab"
        );
        self.lent += bytes;
        self.slab.filled.store(self.lent, Ordering::Release);
    }

    /// Lends out the next bytes, as many as asked for or as there are. `None` where there are none.
    pub fn lend(&mut self, most: usize) -> Option<SlabPiece> {
        let end = self.lent.saturating_add(most).min(self.end());
        if end == self.lent {
            return None;
        }
        let start = std::mem::replace(&mut self.lent, end);
        Some(SlabPiece {
            slab: self.slab.clone(),
            start,
            end,
        })
    }

    /// Takes back a piece all of whose bytes are written. The watermark rises as far as there is no gap.
    ///
    /// # Panics
    /// If the piece is of another slab.
    pub fn take_back(&mut self, piece: SlabPiece) {
        assert!(
            Arc::ptr_eq(&piece.slab, &self.slab),
            "a piece of another slab"
        );
        let place = self
            .ahead
            .partition_point(|(start, _)| *start < piece.start);
        self.ahead.insert(place, (piece.start, piece.end));
        drop(piece);
        let mut filled = self.watermark();
        let joined = self
            .ahead
            .iter()
            .take_while(|(start, end)| {
                let next = *start == filled;
                if next {
                    filled = *end;
                }
                next
            })
            .count();
        self.ahead.drain(..joined);
        self.slab.filled.store(filled, Ordering::Release);
    }

    /// Ends writing for good: nobody in this process can write the slab any more. What other processes get is sealed by
    /// the kernel; see [`Slab::read_only_descriptor`].
    ///
    /// # Errors
    /// [`SlabError::Incomplete`] where bytes are missing.
    pub fn seal(self) -> Result<Arc<Slab>, SlabError> {
        let (bytes, filled) = (self.slab.bytes(), self.filled());
        if filled == bytes {
            Ok(self.slab)
        } else {
            Err(SlabError::Incomplete { bytes, filled })
        }
    }

    /// Starts again from the first byte, for memory that is used over and over as a stage.
    ///
    /// # Errors
    /// The writer itself, unchanged, while somebody else still holds the slab or a piece of it.
    pub fn rewind(mut self) -> Result<Self, Self> {
        if Arc::strong_count(&self.slab) == 1 {
            // No other handle exists and none can appear, since this one is owned.
            self.slab.filled.store(0, Ordering::Release);
            self.lent = 0;
            self.ahead.clear();
            Ok(self)
        } else {
            Err(self)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_come_back_in_any_order(
            lengths in prop::collection::vec(1_usize..5000, 1..20),
            order in prop::collection::vec(any::<prop::sample::Index>(), 20),
        ) {
            let total: usize = lengths.iter().sum();
            let mut writer = Slab::create("test", Bytes(total as u64)).unwrap();
            let slab = writer.slab().clone();
            let mut out: Vec<_> = lengths.iter().map(|n| writer.lend(*n).unwrap()).collect();
            prop_assert!(writer.lend(1).is_none());
            let mut back = vec![false; total];
            for index in order {
                if out.is_empty() { break; }
                let mut piece = out.swap_remove(index.index(out.len()));
                let start = piece.start() as usize;
                back[start..start + piece.len()].fill(true);
                piece.bytes().fill(9);
                writer.take_back(piece);
                let expected = back.iter().take_while(|is| **is).count();
                prop_assert_eq!(slab.filled().len(), expected);
                prop_assert!(slab.filled().iter().all(|byte| *byte == 9));
            }
            prop_assert_eq!(out.is_empty(), writer.seal().is_ok());
        }
    }

    #[test]
    fn a_piece_keeps_the_memory_and_stops_a_rewind() {
        let mut writer = Slab::create("test", Bytes(100)).unwrap();
        let mut piece = writer.lend(60).unwrap();
        let writer = writer.rewind().unwrap_err();
        drop(writer);
        piece.bytes().fill(1);
    }

    #[test]
    fn what_is_lent_is_not_spare() {
        let mut writer = Slab::create("test", Bytes(100)).unwrap();
        let piece = writer.lend(60).unwrap();
        assert_eq!(writer.spare().len(), 40);
        assert_eq!(writer.lent(), Bytes(60));
        drop(piece);
        assert!(matches!(
            writer.seal(),
            Err(SlabError::Incomplete {
                filled: Bytes(0),
                ..
            })
        ));
    }
}
