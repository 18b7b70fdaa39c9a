//! Guesses of a running system: on what grounds each was made, and what came of all that had the same.
//!
//! Each kind of grounds has a [`Scoreboard`] of its own in each tier, so that bad predictions do not end what is certain, nor what
//! loses on a GPU ends what pays in RAM.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::time::Duration;

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

/// How long a guess has once its requests have come: at a thousand requests a second they come before anybody could have used it.
const GRACE: Duration = Duration::from_secs(30);
/// How exactly that is kept.
const MARK: Duration = Duration::from_secs(1);

/// See the module's page.
#[derive(Debug, Clone, Default)]
pub struct Guesses {
    boards: BTreeMap<(Tier, Grounds), Scoreboard>,
    /// Requests so far: what positions are timed by.
    requests: u64,
    /// How many had come at times within the grace, and when; and how many had come before that.
    marks: VecDeque<(Duration, u64)>,
    past: u64,
}

impl Guesses {
    /// Takes note of a request, and gives how many had come when the grace began that is over now.
    fn past(&mut self, now: Duration) -> u64 {
        self.requests += 1;
        let recent = self.marks.back().is_some_and(|(at, _)| *at + MARK > now);
        if !recent {
            self.marks.push_back((now, self.requests));
        }
        while let Some((_, requests)) = self.marks.front().filter(|(at, _)| *at + GRACE < now) {
            self.past = *requests;
            self.marks.pop_front();
        }
        self.past
    }

    /// A set was granted in this tier. What is in RAM serves all; what is on a GPU serves that alone.
    pub fn asked<'a>(
        &mut self,
        now: Duration,
        used_in: Tier,
        contents: impl Iterator<Item = &'a ContentId> + Clone,
    ) {
        let past = self.past(now);
        for ((tier, _), board) in &mut self.boards {
            if *tier == Tier::Ram || *tier == used_in {
                board.asked(past, contents.clone());
            } else {
                board.asked(past, std::iter::empty());
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

    /// Opens a position, which has to be used within `within` requests and half a minute; its `until` is set by that. Returns whether its bytes are
    /// to be moved: not where such guesses have lost of late, where it is held already, or where there are too many.
    pub fn open(&mut self, tier: Tier, grounds: Grounds, within: u64, position: Position) -> bool {
        if self.holds(tier, &position.content) {
            return false;
        }
        let until = self.requests.saturating_add(within.max(1));
        let content = position.content;
        let board = self.boards.entry((tier, grounds)).or_default();
        let real = board.open(Position { until, ..position }) == Some(true);
        board.set_landed(&content, 0.0);
        real
    }

    /// The bytes of a guess are there. Whoever wanted them before that, after this share of the time that they took, waited for the
    /// rest; 1 where nobody did.
    pub fn landed(&mut self, tier: Tier, content: &ContentId, share: f64) {
        for board in self.boards(tier) {
            board.set_landed(content, share);
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
        for minute in 0..20 {
            guesses.open(Tier::Ram, Grounds::Predicted, 1, position(1));
            guesses.open(Tier::Ram, Grounds::Declared, 1, position(2));
            assert!(
                !guesses.open(Tier::Ram, Grounds::Usual, 1, position(2)),
                "it is held already"
            );
            guesses.landed(Tier::Ram, &id(2), 1.0);
            for (content, second) in [(2, 0), (3, 10), (3, 50)] {
                let now = Duration::from_secs(60 * minute + second);
                guesses.asked(now, Tier::Ram, [id(content)].iter());
            }
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
        guesses.asked(Duration::ZERO, Tier::Ram, [id(1)].iter());
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
        guesses.asked(Duration::ZERO, Tier::Ram, [id(9)].iter());
        guesses.withdraw(Tier::Ram, &id(3));
        let declared = guesses.results()[Grounds::Declared as usize].score;
        assert_eq!((declared.wasted_bytes, declared.lost_s), (Bytes(10), 2.0));
    }

    #[test]
    fn who_waits_for_the_rest_of_a_guess_is_saved_what_was_there() {
        let mut guesses = Guesses::default();
        guesses.open(Tier::Ram, Grounds::Usual, 9, position(1));
        guesses.landed(Tier::Ram, &id(1), 0.75);
        guesses.asked(Duration::ZERO, Tier::Ram, [id(1)].iter());
        let usual = guesses.results()[Grounds::Usual as usize];
        assert_eq!((usual.score.saved_s, usual.precision), (0.75, Some(1.0)));
    }

    #[test]
    fn a_guess_has_its_time_from_when_it_was_made() {
        let mut guesses = Guesses::default();
        let ask = |guesses: &mut Guesses, ms| {
            let now = Duration::from_millis(ms);
            guesses.asked(now, Tier::Ram, [id(9)].iter());
            guesses.holds(Tier::Ram, &id(1))
        };
        for ms in 0..100 {
            ask(&mut guesses, ms);
        }
        assert!(guesses.open(Tier::Ram, Grounds::Usual, 2, position(1)));
        // A thousand requests in a second.
        assert!((100..1_100).all(|ms| ask(&mut guesses, ms)));
        assert!(ask(&mut guesses, 29_000));
        assert!(!ask(&mut guesses, 33_000));
        // Two requests that take two hours.
        assert!(guesses.open(Tier::Ram, Grounds::Usual, 2, position(1)));
        assert!(ask(&mut guesses, 3_600_000) && ask(&mut guesses, 7_200_000));
        assert!(ask(&mut guesses, 10_800_000), "the third has just come");
        assert!(!ask(&mut guesses, 10_900_000));
        guesses.delayed(Tier::Ram, Grounds::Usual, 0.25);
        guesses.gone(Tier::Ram, &id(1));
        let usual = guesses.results()[Grounds::Usual as usize];
        assert_eq!(
            (usual.score.wasted_bytes, usual.score.delayed_s),
            (Bytes(20), 0.25)
        );
    }
    #[test]
    fn what_is_on_a_gpu_serves_that_alone() {
        let (first, second) = (Tier::Vram(GpuIndex(0)), Tier::Vram(GpuIndex(1)));
        let mut guesses = Guesses::default();
        for tier in [Tier::Ram, first, second] {
            assert!(guesses.open(tier, Grounds::Usual, 9, position(1)));
            guesses.landed(tier, &id(1), 1.0);
        }
        guesses.asked(Duration::ZERO, first, [id(1)].iter());
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
