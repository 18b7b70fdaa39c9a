//! The link between disk and RAM, on which guesses are loaded while nobody needs it.
//!
//! One load at a time. A demand load takes the link at once, but for the piece that is under way: a prefetch can
//! only be cancelled between two pieces. What is asked for while it is on its way is joined, not loaded again.

use std::collections::HashMap;
use std::time::Duration;

use super::Trace;
use super::tier::{SimulatedTier, Wanted};
use crate::ids::ContentId;
use crate::predict::Seen;

/// Bytes of a piece, as the service reads them.
const PIECE_BYTES: f64 = 8.0 * 1024.0 * 1024.0;
/// Prefetches between two requests. What is worth loading is loaded in the first few.
const MAX_AT_ONCE: usize = 16;

/// A prefetch that is under way when a request comes.
pub(super) struct Held {
    place: usize,
    /// Seconds until it would have landed.
    left_s: f64,
    /// Seconds until the piece under way is through.
    piece_s: f64,
}

/// The link and the time until which it is busy, in seconds since the start.
pub(super) struct Link<'a> {
    trace: &'a Trace,
    load_s: &'a [f64],
    places: HashMap<ContentId, usize>,
    busy_until_s: f64,
}

impl<'a> Link<'a> {
    pub(super) fn new(trace: &'a Trace, load_s: &'a [f64]) -> Self {
        let components = trace.components().iter().enumerate();
        Self {
            trace,
            load_s,
            places: components.map(|(place, c)| (c.content, place)).collect(),
            busy_until_s: 0.0,
        }
    }

    /// Prefetches until the next request comes. A prefetch that is then under way is landed at once if the request wants
    /// it, and what is left of it is owed.
    pub(super) fn until(
        &mut self,
        next: Duration,
        ram: &mut SimulatedTier,
        wanted: &[usize],
    ) -> Option<Held> {
        let next_s = next.as_secs_f64();
        for _ in 0..MAX_AT_ONCE {
            if self.busy_until_s >= next_s {
                return None;
            }
            let now = Duration::try_from_secs_f64(self.busy_until_s).unwrap_or(next);
            let (content, bytes) = ram.prefetch(now)?;
            let place = *self.places.get(&content)?;
            let ends_s = self.busy_until_s + self.load_s[place];
            let landing = Wanted {
                content,
                bytes,
                restore_s: self.load_s[place],
            };
            if ends_s <= next_s {
                self.busy_until_s = ends_s;
                ram.land(
                    Duration::try_from_secs_f64(ends_s).unwrap_or(next),
                    &landing,
                );
                continue;
            }
            let pieces = (bytes.as_f64() / PIECE_BYTES).ceil().max(1.0);
            let held = Held {
                place,
                left_s: ends_s - next_s,
                piece_s: (self.load_s[place] / pieces).min(ends_s - next_s),
            };
            if wanted.contains(&place) {
                ram.land(next, &landing);
            }
            return Some(held);
        }
        None
    }

    /// Adds to what the request pays: the rest of the prefetch that it joined, or the piece for which it waited.
    pub(super) fn settle(
        &mut self,
        held: Option<Held>,
        seen: &[Seen],
        paid: &mut [f64],
        ram: &mut SimulatedTier,
        at: Duration,
    ) {
        if let Some(held) = held {
            let content = self.trace.components()[held.place].content;
            let joined = seen.iter().position(|seen| seen.content == content);
            let waiting = paid.iter().position(|paid_s| *paid_s > 0.0);
            match (joined, waiting) {
                (Some(at), _) => paid[at] += held.left_s,
                (None, Some(at)) => {
                    paid[at] += held.piece_s;
                    ram.cancelled(&content, held.piece_s);
                }
                // Nobody needs the link: cancelled all the same, since what comes next is decided anew.
                (None, None) => ram.cancelled(&content, 0.0),
            }
        }
        let start_s = at.as_secs_f64().max(self.busy_until_s);
        self.busy_until_s = start_s + paid.iter().sum::<f64>();
    }
}
