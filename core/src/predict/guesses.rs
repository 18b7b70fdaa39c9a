//! Guesses of a running system: on what grounds each was made, and what came of all that had the same.
//!
//! Each kind of grounds has a [`Scoreboard`] of its own in each tier, so that bad predictions do not end what is certain, nor what
//! loses on a GPU ends what pays in RAM.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::scoreboard::{Position, PrefetchScore, Scoreboard};
use crate::ids::{ContentId, Tier};

/// Why a component is loaded before anybody asks for it. In the order in which guesses are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grounds {
    /// A session uses a part of its model, and the dependency graph says that the rest comes after it: the VAE while the
    /// denoiser runs.
    Declared,
    /// It mostly goes with what was just asked for: the usual adapters of a base.
    Usual,
    /// The predictor expects it.
    Predicted,
}

impl Grounds {
    /// All of them, in their order.
    pub const ALL: [Self; 3] = [Self::Declared, Self::Usual, Self::Predicted];
}

impl fmt::Display for Grounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Declared => "declared",
            Self::Usual => "usual",
            Self::Predicted => "predicted",
        })
    }
}

/// See the module's page.
#[derive(Debug, Clone, Default)]
pub struct Guesses {
    boards: BTreeMap<(Tier, Grounds), Scoreboard>,
    /// Requests so far: what positions are timed by.
    requests: u64,
}

impl Guesses {
    /// A set was granted in this tier. What is in RAM serves all; what is on a GPU serves that alone.
    pub fn asked<'a>(
        &mut self,
        used_in: Tier,
        contents: impl Iterator<Item = &'a ContentId> + Clone,
    ) {
        self.requests += 1;
        for ((tier, _), board) in &mut self.boards {
            if *tier == Tier::Ram || *tier == used_in {
                board.asked(self.requests, contents.clone());
            } else {
                board.asked(self.requests, std::iter::empty());
            }
        }
    }

    fn boards(&mut self, tier: Tier) -> impl Iterator<Item = &mut Scoreboard> {
        let boards = self.boards.iter_mut();
        boards.filter_map(move |((of, _), board)| (*of == tier).then_some(board))
    }

    /// Whether somebody's guess is this component in this tier.
    #[must_use]
    pub fn holds(&self, tier: Tier, content: &ContentId) -> bool {
        let mut boards = self.boards.iter();
        boards.any(|((of, _), board)| *of == tier && board.holds(content))
    }

    /// Opens a position, which has to be used within `within` requests; its `until` is set by that. Returns whether its bytes are
    /// to be moved: not where such guesses have lost of late, where it is held already, or where there are too many.
    pub fn open(&mut self, tier: Tier, grounds: Grounds, within: u64, position: Position) -> bool {
        if self.holds(tier, &position.content) {
            return false;
        }
        let until = self.requests.saturating_add(within.max(1));
        let content = position.content;
        let board = self.boards.entry((tier, grounds)).or_default();
        let real = board.open(Position { until, ..position }) == Some(true);
        board.set_landed(&content, false);
        real
    }

    /// The bytes of a guess are there.
    pub fn landed(&mut self, tier: Tier, content: &ContentId) {
        for board in self.boards(tier) {
            board.set_landed(content, true);
        }
    }

    /// Nothing was moved for a guess, since others were faster.
    pub fn withdraw(&mut self, tier: Tier, content: &ContentId) {
        for board in self.boards(tier) {
            board.withdraw(content);
        }
    }

    /// The bytes of a guess went before they were used, or never came.
    pub fn gone(&mut self, tier: Tier, content: &ContentId) {
        for board in self.boards(tier) {
            board.gone(content);
        }
    }

    /// All that was in a tier is gone.
    pub fn lost(&mut self, tier: Tier) {
        for board in self.boards(tier) {
            board.lost();
        }
    }

    /// A demand waited until a guess had given back what it held.
    pub fn delayed(&mut self, tier: Tier, grounds: Grounds, seconds: f64) {
        let board = self.boards.entry((tier, grounds)).or_default();
        board.delayed(seconds);
    }

    /// What came of all, by their tiers and grounds: all grounds of RAM, and of each GPU that anything was guessed for.
    #[must_use]
    pub fn results(&self) -> Vec<GuessResults> {
        let mut tiers: Vec<Tier> = self.boards.keys().map(|(tier, _)| *tier).collect();
        tiers.push(Tier::Ram);
        tiers.sort_unstable();
        tiers.dedup();
        let all = tiers
            .iter()
            .flat_map(|tier| Grounds::ALL.map(|grounds| (*tier, grounds)));
        all.map(|(tier, grounds)| {
            let board = self.boards.get(&(tier, grounds));
            let score = board.map(Scoreboard::score).unwrap_or_default();
            GuessResults {
                tier,
                grounds,
                on: board.is_none_or(Scoreboard::is_on),
                score,
                precision: score.precision(),
            }
        })
        .collect()
    }
}

/// What came of the guesses with the same grounds in one tier.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct GuessResults {
    /// Where to.
    pub tier: Tier,
    /// On which grounds.
    pub grounds: Grounds,
    /// Whether they are made; else they lost, and are held on paper until they would have won.
    pub on: bool,
    /// The sums of those that were really made.
    #[serde(flatten)]
    pub score: PrefetchScore,
    /// Share of the bytes that were used, 0 to 1; `None` before the first one is settled.
    pub precision: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::GpuIndex;
    use crate::units::Bytes;

    fn id(n: u8) -> ContentId {
        ContentId::File([n; 32])
    }

    fn position(n: u8) -> Position {
        Position {
            content: id(n),
            bytes: Bytes(10),
            load_s: 1.0,
            victims: Vec::new(),
            until: 0,
        }
    }

    #[test]
    fn bad_predictions_do_not_end_what_is_certain() {
        let mut guesses = Guesses::default();
        for _ in 0..20 {
            guesses.open(Tier::Ram, Grounds::Predicted, 1, position(1));
            guesses.open(Tier::Ram, Grounds::Declared, 1, position(2));
            assert!(
                !guesses.open(Tier::Ram, Grounds::Usual, 1, position(2)),
                "it is held already"
            );
            guesses.landed(Tier::Ram, &id(2));
            guesses.asked(Tier::Ram, [id(2)].iter());
            guesses.asked(Tier::Ram, [id(3)].iter());
        }
        let results = guesses.results();
        let of = |grounds: Grounds| results.iter().find(|r| r.grounds == grounds).unwrap();
        assert!(of(Grounds::Declared).on && !of(Grounds::Predicted).on);
        assert_eq!(of(Grounds::Declared).precision, Some(1.0));
        assert_eq!(of(Grounds::Declared).score.saved_s, 20.0);
        assert_eq!(of(Grounds::Predicted).precision, Some(0.0));
        assert_eq!(of(Grounds::Usual).precision, None);
    }

    #[test]
    fn what_comes_too_late_saves_nothing_and_what_never_began_counts_for_nothing() {
        let mut guesses = Guesses::default();
        guesses.open(Tier::Ram, Grounds::Declared, 9, position(1));
        guesses.asked(Tier::Ram, [id(1)].iter());
        guesses.open(Tier::Ram, Grounds::Declared, 9, position(2));
        guesses.withdraw(Tier::Ram, &id(2));
        let declared = guesses.results()[Grounds::Declared as usize].score;
        assert_eq!((declared.loads, declared.used_bytes), (1, Bytes(10)));
        assert_eq!(
            (declared.saved_s, declared.wasted_bytes),
            (0.0, Bytes::ZERO)
        );
        // Others went for it in vain.
        let victims = vec![(id(9), 2.0)];
        guesses.open(
            Tier::Ram,
            Grounds::Declared,
            9,
            Position {
                victims,
                ..position(3)
            },
        );
        guesses.asked(Tier::Ram, [id(9)].iter());
        guesses.withdraw(Tier::Ram, &id(3));
        let declared = guesses.results()[Grounds::Declared as usize].score;
        assert_eq!((declared.wasted_bytes, declared.lost_s), (Bytes(10), 2.0));
    }

    #[test]
    fn a_guess_has_its_time_from_when_it_was_made() {
        let mut guesses = Guesses::default();
        (0..100).for_each(|_| guesses.asked(Tier::Ram, [id(9)].iter()));
        assert!(guesses.open(Tier::Ram, Grounds::Usual, 2, position(1)));
        guesses.asked(Tier::Ram, [id(9)].iter());
        guesses.asked(Tier::Ram, [id(9)].iter());
        assert!(guesses.holds(Tier::Ram, &id(1)));
        guesses.asked(Tier::Ram, [id(9)].iter());
        assert!(!guesses.holds(Tier::Ram, &id(1)));
        guesses.delayed(Tier::Ram, Grounds::Usual, 0.25);
        guesses.gone(Tier::Ram, &id(1));
        let usual = guesses.results()[Grounds::Usual as usize];
        assert_eq!(
            (usual.score.wasted_bytes, usual.score.delayed_s),
            (Bytes(10), 0.25)
        );
    }
    #[test]
    fn what_is_on_a_gpu_serves_that_alone() {
        let (first, second) = (Tier::Vram(GpuIndex(0)), Tier::Vram(GpuIndex(1)));
        let mut guesses = Guesses::default();
        for tier in [Tier::Ram, first, second] {
            assert!(guesses.open(tier, Grounds::Usual, 9, position(1)));
            guesses.landed(tier, &id(1));
        }
        guesses.asked(first, [id(1)].iter());
        assert!(guesses.holds(second, &id(1)));
        assert!(!guesses.holds(first, &id(1)) && !guesses.holds(Tier::Ram, &id(1)));
        guesses.lost(second);
        let usual: Vec<_> = guesses
            .results()
            .into_iter()
            .filter(|of| of.grounds == Grounds::Usual)
            .map(|of| (of.tier, of.precision))
            .collect();
        let expected = [
            (first, Some(1.0)),
            (second, Some(0.0)),
            (Tier::Ram, Some(1.0)),
        ];
        assert_eq!(usual, expected);
    }
}
