//! Whether prefetching pays: what was bought on a guess, what came of it, and whether to go on.
//!
//! Every guess is a position: it is *used* when its component is asked for within the horizon, and *wasted* when the horizon passes, or
//! its bytes go, before that. What its victims cost when they are asked for meanwhile counts against it. Where guesses lose,
//! prefetching turns itself off; positions are then held on paper, without moving a byte, until they would have won.

use serde::{Deserialize, Serialize};

use crate::ids::ContentId;
use crate::units::Bytes;

/// Positions held at once; further guesses are not made.
const MAX_OPEN: usize = 64;
/// Settled positions before the score is believed.
const MIN_SETTLED: u64 = 12;
/// Share of the score that is remembered from one settled position to the next.
const MEMORY: f64 = 0.97;
/// Share of the bytes that must be used to go on, and to begin again.
const KEEP_ON: f64 = 0.5;
const BEGIN_AGAIN: f64 = 0.6;

/// A guess.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// What is loaded.
    pub content: ContentId,
    /// Its bytes.
    pub bytes: Bytes,
    /// Seconds that its load takes.
    pub load_s: f64,
    /// What went for it, and the seconds to load that again.
    pub victims: Vec<(ContentId, f64)>,
    /// The request by which it must have been asked for.
    pub until: u64,
}

/// What came of all prefetches that were really made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct PrefetchScore {
    /// Components loaded on a guess.
    pub loads: u64,
    /// Bytes of these that were asked for in time.
    pub used_bytes: Bytes,
    /// Bytes of these that were not.
    pub wasted_bytes: Bytes,
    /// Seconds of loading that requests did not have to wait for.
    pub saved_s: f64,
    /// Seconds paid for victims that were asked for after all.
    pub lost_s: f64,
    /// Demand loads that found the link busy with a prefetch.
    pub delayed_loads: u64,
    /// Seconds for which they waited until it had stopped.
    pub delayed_s: f64,
}

impl PrefetchScore {
    /// What was added since an earlier score.
    #[must_use]
    pub fn since(self, earlier: Option<Self>) -> Self {
        let Some(earlier) = earlier else {
            return self;
        };
        Self {
            loads: self.loads.saturating_sub(earlier.loads),
            used_bytes: self.used_bytes.saturating_sub(earlier.used_bytes),
            wasted_bytes: self.wasted_bytes.saturating_sub(earlier.wasted_bytes),
            saved_s: self.saved_s - earlier.saved_s,
            lost_s: self.lost_s - earlier.lost_s,
            delayed_loads: self.delayed_loads.saturating_sub(earlier.delayed_loads),
            delayed_s: self.delayed_s - earlier.delayed_s,
        }
    }

    /// Share of the prefetched bytes that were used; `None` where nothing was prefetched.
    #[must_use]
    pub fn precision(&self) -> Option<f64> {
        let all = self.used_bytes.saturating_add(self.wasted_bytes);
        (!all.is_zero()).then(|| self.used_bytes.as_f64() / all.as_f64())
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Open {
    position: Position,
    real: bool,
    /// The share of its load that whoever asks now need not wait for.
    there: f64,
    lost_s: f64,
}

/// The books of prefetching.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Scoreboard {
    open: Vec<Open>,
    score: PrefetchScore,
    settled: u64,
    // Of late, real and on paper.
    used: f64,
    wasted: f64,
    gain_s: f64,
    on: bool,
}

impl Default for Scoreboard {
    fn default() -> Self {
        Self {
            open: Vec::new(),
            score: PrefetchScore::default(),
            settled: 0,
            used: 0.0,
            wasted: 0.0,
            gain_s: 0.0,
            on: true,
        }
    }
}

impl Scoreboard {
    /// Whether guesses may move bytes. Where not, [`Self::open`] holds them on paper.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// The score of what was really done.
    #[must_use]
    pub fn score(&self) -> PrefetchScore {
        self.score
    }

    /// Whether there is a position for this component.
    #[must_use]
    pub fn holds(&self, content: &ContentId) -> bool {
        self.open
            .iter()
            .any(|open| open.position.content == *content)
    }

    /// Opens a position. Returns whether its bytes are to be moved; `None` where there are too many.
    pub fn open(&mut self, position: Position) -> Option<bool> {
        if self.open.len() >= MAX_OPEN || self.holds(&position.content) {
            return None;
        }
        if self.on {
            self.score.loads += 1;
        }
        self.open.push(Open {
            position,
            real: self.on,
            there: 1.0,
            lost_s: 0.0,
        });
        Some(self.on)
    }

    /// Says which share of the load of a real position whoever asks need not wait for. All of it where nobody says so.
    pub fn set_landed(&mut self, content: &ContentId, share: f64) {
        let found = self.open.iter_mut();
        let mut real = found.filter(|open| open.real && open.position.content == *content);
        if let Some(open) = real.next() {
            open.there = share.clamp(0.0, 1.0);
        }
    }

    /// Takes a real position back of which no byte was moved; where others went for it, it was wasted all the same.
    pub fn withdraw(&mut self, content: &ContentId) {
        let place = |open: &Open| open.real && open.position.content == *content;
        let Some(at) = self.open.iter().position(place) else {
            return;
        };
        if self.open[at].position.victims.is_empty() {
            self.open.swap_remove(at);
            self.score.loads = self.score.loads.saturating_sub(1);
        } else {
            self.settle(at, false);
        }
    }

    /// A demand load found the link busy with a prefetch.
    pub fn delayed(&mut self, seconds: f64) {
        if seconds <= 0.0 {
            return;
        }
        self.score.delayed_loads += 1;
        self.score.delayed_s += seconds;
        self.gain_s -= seconds;
    }

    /// A request came: the `number`-th, for these.
    pub fn asked<'a>(
        &mut self,
        number: u64,
        contents: impl Iterator<Item = &'a ContentId> + Clone,
    ) {
        let mut at = 0;
        while at < self.open.len() {
            let open = &mut self.open[at];
            for (victim, restore_s) in &mut open.position.victims {
                if *restore_s > 0.0 && contents.clone().any(|content| content == victim) {
                    open.lost_s += *restore_s;
                    // Loaded again by now: it is lost once.
                    *restore_s = 0.0;
                }
            }
            let content = open.position.content;
            if contents.clone().any(|asked| *asked == content) {
                self.settle(at, true);
            } else if open.position.until < number {
                self.settle(at, false);
            } else {
                at += 1;
            }
        }
    }

    /// The bytes of a component went, or never came.
    pub fn gone(&mut self, content: &ContentId) {
        let place = |open: &Open| open.real && open.position.content == *content;
        if let Some(at) = self.open.iter().position(place) {
            self.settle(at, false);
        }
    }

    /// All bytes went.
    pub fn lost(&mut self) {
        while let Some(at) = self.open.iter().position(|open| open.real) {
            self.settle(at, false);
        }
    }

    fn settle(&mut self, at: usize, used: bool) {
        let Open {
            position,
            real,
            there,
            lost_s,
        } = self.open.swap_remove(at);
        let saved_s = if used { there * position.load_s } else { 0.0 };
        if real {
            let to = if used {
                &mut self.score.used_bytes
            } else {
                &mut self.score.wasted_bytes
            };
            *to = to.saturating_add(position.bytes);
            self.score.saved_s += saved_s;
            self.score.lost_s += lost_s;
        }
        self.settled += 1;
        for sum in [&mut self.used, &mut self.wasted, &mut self.gain_s] {
            *sum *= MEMORY;
        }
        self.gain_s += saved_s - lost_s;
        if used {
            self.used += position.bytes.as_f64();
        } else {
            self.wasted += position.bytes.as_f64();
        }
        if self.settled >= MIN_SETTLED {
            let precision = self.used / (self.used + self.wasted).max(1.0);
            let enough = if self.on { KEEP_ON } else { BEGIN_AGAIN };
            self.on = precision >= enough && self.gain_s > 0.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> ContentId {
        ContentId::File([n; 32])
    }

    fn position(n: u8, until: u64) -> Position {
        Position {
            content: id(n),
            bytes: Bytes(100),
            load_s: 2.0,
            victims: vec![(id(n + 100), 0.5)],
            until,
        }
    }

    #[test]
    fn each_guess_is_used_or_wasted_once() {
        let mut board = Scoreboard::default();
        assert_eq!(board.open(position(1, 10)), Some(true));
        assert_eq!(board.open(position(1, 10)), None, "it is held already");
        assert_eq!(board.open(position(2, 10)), Some(true));
        assert_eq!(board.open(position(3, 10)), Some(true));
        // A victim is missed twice, but was loaded again after the first time.
        board.asked(1, [id(101)].iter());
        board.asked(2, [id(101)].iter());
        board.asked(3, [id(1), id(9)].iter());
        board.gone(&id(2));
        board.asked(10, [id(9)].iter());
        assert!(board.holds(&id(3)));
        board.asked(11, [id(9)].iter());
        board.delayed(0.1);
        let score = board.score();
        assert_eq!(score.loads, 3);
        assert_eq!(
            (score.used_bytes, score.wasted_bytes),
            (Bytes(100), Bytes(200))
        );
        assert_eq!((score.saved_s, score.lost_s), (2.0, 0.5));
        assert_eq!((score.delayed_loads, score.delayed_s), (1, 0.1));
        assert!((score.precision().unwrap() - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!(PrefetchScore::default().precision(), None);
    }

    #[test]
    fn who_loses_goes_on_with_paper_until_it_would_have_won() {
        let mut board = Scoreboard::default();
        let mut number = 0;
        let mut guess = |board: &mut Scoreboard, right: bool| {
            number += 10;
            board.open(position(1, number + 5));
            board.asked(
                number + if right { 1 } else { 6 },
                [id(if right { 1 } else { 9 })].iter(),
            );
        };
        (0..20).for_each(|_| guess(&mut board, false));
        assert!(!board.is_on());
        let loads = board.score().loads;
        assert!((12..=13).contains(&loads), "{loads}");
        (0..100).for_each(|_| guess(&mut board, true));
        assert!(board.is_on());
        assert!(board.score().loads > loads);
        assert_eq!(board.score().wasted_bytes, Bytes(100 * loads.min(13)));
    }
}
