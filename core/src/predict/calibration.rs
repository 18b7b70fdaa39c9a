//! Isotonic calibration: what a model's probabilities have turned out to mean.
//!
//! Zadrozny and Elkan, "Transforming Classifier Scores into Accurate Multiclass Probability Estimates" (KDD 2002). A map is fitted to the
//! latest predictions once their expected calibration error (Naeini et al., AAAI 2015) is too large, and used while it loses less than
//! the plain probabilities by more than chance.
//!
//! Adjacent violators are pooled here and not by linfa-linear 0.8.1: its `pva` goes on with the weight of the block before when it begins
//! a new one, so that the means of all blocks but the last are wrong.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::record::Record;

/// Predictions that a map is fitted to.
const KEPT: usize = 2_048;
/// Labels from one look at the error to the next.
const EVERY: u64 = 1_024;
/// The expected calibration error above which a map is fitted.
const TOO_LARGE: f64 = 0.03;
/// Bins of equal width that the error is taken over.
const BINS: usize = 10;
/// Knots of a map, at equal distances in log odds.
const KNOTS: usize = 33;
/// Log odds of the outermost knots: probabilities of 1 in 3,000.
const ODDS: f64 = 8.0;

/// See the module's page.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Calibration {
    /// What was predicted of late, and what came. Those of before a restart are not needed.
    #[serde(skip)]
    recent: VecDeque<(f32, bool)>,
    since: u64,
    map: Option<Map>,
    record: Record,
    /// Which model's predictions these are: another one's mean something else.
    #[serde(default)]
    of: Model,
}

/// A model whose predictions are told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Model {
    #[default]
    Online,
    /// The batch model of this fit.
    Batch(u64),
}

/// A rising curve through [`KNOTS`] points.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Map(Vec<f64>);

fn odds(p: f64) -> f64 {
    (p / (1.0 - p)).ln().clamp(-ODDS, ODDS)
}

fn knot(at: usize) -> f64 {
    let odds = ODDS * (2.0 * at as f64 / (KNOTS - 1) as f64 - 1.0);
    1.0 / (1.0 + (-odds).exp())
}

impl Map {
    fn is_sound(&self) -> bool {
        let all = self.0.iter().all(|p| (0.0..=1.0).contains(p));
        self.0.len() == KNOTS && all && self.0.is_sorted()
    }

    /// What a probability means.
    fn of(&self, p: f64) -> f64 {
        let place = (odds(p) + ODDS) / (2.0 * ODDS) * (KNOTS - 1) as f64;
        let below = (place as usize).min(KNOTS - 2);
        let (Some(low), Some(high)) = (self.0.get(below), self.0.get(below + 1)) else {
            return p;
        };
        low + (place - below as f64) * (high - low)
    }

    /// The rising curve that is nearest to what came of these predictions; `None` where there is none that rises.
    pub(super) fn fit(mut recent: Vec<(f32, bool)>) -> Option<Self> {
        recent.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let blocks = pooled(&recent);
        let mut points: Vec<(f64, f64)> = blocks.iter().map(|b| (b.place(), b.mean())).collect();
        if let ([first, .., last], [low, inner @ .., high]) = (&*blocks, &mut *points) {
            let [lowest, highest] = [inner.first(), inner.last()].map(|p| p.map(|p| p.1));
            low.1 = first.cautious().min(lowest.unwrap_or(1.0));
            high.1 = last.cautious().max(highest.unwrap_or(0.0)).max(low.1);
        }
        let (first, last) = (points.first()?, points.last()?);
        let curve = (0..KNOTS).map(knot).map(|at| {
            let above = points.partition_point(|point| point.0 < at);
            match (above.checked_sub(1).map(|i| points[i]), points.get(above)) {
                (None, _) => first.1,
                (_, None) => last.1,
                (Some(low), Some(high)) => {
                    low.1 + (at - low.0) / (high.0 - low.0) * (high.1 - low.1)
                }
            }
        });
        let map = Self(curve.collect());
        (map.is_sound() && map.0.first() < map.0.last()).then_some(map)
    }
}

/// Predictions next to each other for which the curve has one value.
#[derive(Debug, Clone, Copy)]
struct Block {
    predicted: f64,
    came: f64,
    count: f64,
}

impl Block {
    /// Where its value stands: in the middle of its predictions.
    fn place(&self) -> f64 {
        self.predicted / self.count
    }

    fn mean(&self) -> f64 {
        self.came / self.count
    }

    /// The mean, as far as so many labels can tell: that all went one way makes nothing certain (Jeffreys' prior).
    fn cautious(&self) -> f64 {
        (self.came + 0.5) / (self.count + 1.0)
    }
}

/// Pools adjacent violators: predictions in rising order become blocks whose means rise (Best and Chakravarti, "Active set algorithms
/// for isotonic regression", 1990).
fn pooled(sorted: &[(f32, bool)]) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    for (predicted, came) in sorted {
        let mut block = Block {
            predicted: f64::from(*predicted),
            came: f64::from(u8::from(*came)),
            count: 1.0,
        };
        while let Some(before) = blocks.last()
            // Equal means are one block, and so are equal predictions, whatever came of them.
            && (before.mean() >= block.mean() || before.place() >= block.place())
        {
            block.predicted += before.predicted;
            block.came += before.came;
            block.count += before.count;
            blocks.pop();
        }
        blocks.push(block);
    }
    blocks
}

/// The expected calibration error: by how much the mean prediction of a bin is off what came, over all bins.
fn error(recent: impl ExactSizeIterator<Item = (f32, bool)>) -> f64 {
    let count = recent.len().max(1) as f64;
    let mut off = [0.0; BINS];
    for (predicted, came) in recent {
        let bin = (f64::from(predicted) * BINS as f64) as usize;
        off[bin.min(BINS - 1)] += f64::from(predicted) - f64::from(u8::from(came));
    }
    off.iter().map(|off| off.abs()).sum::<f64>() / count
}

impl Calibration {
    pub(super) fn is_sound(&self) -> bool {
        self.map.as_ref().is_none_or(Map::is_sound) && self.record.is_sound()
    }

    /// The probability that is to be told for a model's own.
    pub(super) fn told(&self, of: Model, p: f64) -> f64 {
        match &self.map {
            Some(map) if self.record.leads() && of == self.of => map.of(p),
            _ => p,
        }
    }

    /// A label came for what this model predicted. `loss` judges a probability.
    pub(super) fn note(
        &mut self,
        of: Model,
        predicted: f64,
        came: bool,
        loss: impl Fn(f64) -> f64,
    ) {
        if of != self.of {
            *self = Self {
                of,
                ..Self::default()
            };
        }
        if self.recent.len() == KEPT {
            self.recent.pop_front();
        }
        self.recent.push_back((predicted as f32, came));
        self.since += 1;
        if let Some(map) = &self.map {
            self.record.note(loss(predicted) - loss(map.of(predicted)));
        }
    }

    /// What to fit a map to, where it is time and the error calls for it.
    pub(super) fn study(&mut self) -> Option<Vec<(f32, bool)>> {
        if self.since < EVERY || self.recent.len() < EVERY as usize {
            return None;
        }
        self.since = 0;
        let recent = self.recent.iter().copied();
        (error(recent.clone()) > TOO_LARGE).then(|| recent.collect())
    }

    pub(super) fn take(&mut self, map: Option<Map>) {
        if map.is_some() {
            self.map = map;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::scramble;

    fn uniform(i: u64) -> f64 {
        (scramble(9, i) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn loss(p: f64, came: bool) -> f64 {
        let p = p.clamp(1e-6, 1.0 - 1e-6);
        if came { -p.ln() } else { -(1.0 - p).ln() }
    }

    /// A model that says `p` for what has the probability `truth(p)`.
    fn told_to(calibration: &mut Calibration, labels: u64, truth: impl Fn(f64) -> f64) -> u32 {
        let mut fits = 0;
        for i in 0..labels {
            let said = uniform(2 * i);
            let came = uniform(2 * i + 1) < truth(said);
            calibration.note(Model::Online, said, came, |p| loss(p, came));
            if let Some(recent) = calibration.study() {
                calibration.take(Map::fit(recent));
                fits += 1;
            }
        }
        assert!(calibration.is_sound());
        fits
    }

    #[test]
    fn what_is_too_sure_is_corrected() {
        let mut calibration = Calibration::default();
        let truth = |p: f64| 0.3 + 0.3 * p;
        assert!(told_to(&mut calibration, 10_000, truth) > 5);
        for p in [0.1, 0.3, 0.5, 0.7, 0.9] {
            let told = calibration.told(Model::Online, p);
            assert!((told - truth(p)).abs() < 0.08, "{p}: {told}");
        }
        // It never falls.
        let told: Vec<f64> = (1..1000)
            .map(|i| calibration.told(Model::Online, f64::from(i) / 1e3))
            .collect();
        assert!(told.is_sorted());
        assert!(told.iter().all(|p| (0.0..=1.0).contains(p)));
    }

    #[test]
    fn what_is_right_is_left_alone() {
        let mut calibration = Calibration::default();
        told_to(&mut calibration, 20_000, |p| p);
        assert!(
            [0.0, 0.2, 0.99, 1.0]
                .iter()
                .all(|p| (calibration.told(Model::Online, *p) - p).abs() < 1e-12)
        );
    }

    #[test]
    fn what_was_learned_of_one_model_is_not_told_of_another() {
        let mut calibration = Calibration::default();
        told_to(&mut calibration, 10_000, |p| 0.3 + 0.3 * p);
        let far = |calibration: &Calibration, of| (calibration.told(of, 0.9) - 0.9).abs() > 0.1;
        assert!(far(&calibration, Model::Online));
        assert!(!far(&calibration, Model::Batch(1)));
        calibration.note(Model::Batch(1), 0.9, true, |p| loss(p, true));
        assert!(!far(&calibration, Model::Batch(1)) && !far(&calibration, Model::Online));
    }

    #[test]
    fn what_is_the_wrong_way_round_is_no_calibration() {
        let falling = (0..2_000).map(|i| uniform(i) as f32).map(|p| (p, p < 0.5));
        assert!(Map::fit(falling.collect()).is_none());
        assert!(Map::fit(Vec::new()).is_none());
        assert!(Map::fit(vec![(0.5, true); 2_000]).is_none());
        assert!(Map::fit((0..2_000).map(|i| (f32::NAN, i % 2 == 0)).collect()).is_none());
    }

    #[test]
    fn blocks_are_pooled_as_by_hand() {
        // 0 at 0.1, then 1 and 0 at 0.4 and 0.5, then 1 at 0.9, in any order.
        let given = [(0.9, true), (0.5, false), (0.1, false), (0.4, true)].repeat(100);
        let map = Map::fit(given).unwrap();
        // Between the blocks at 0.1, 0.45 and 0.9, whose means are 0, a half and 1.
        for (p, means) in [
            (0.05, 0.0),
            (0.1, 0.0),
            (0.45, 0.5),
            (0.9, 1.0),
            (0.99, 1.0),
        ] {
            assert!((map.of(p) - means).abs() < 0.03, "{p}: {}", map.of(p));
        }
    }

    proptest::proptest! {
        /// No rising curve is nearer: the mean of a block is that of its labels, and no way to cut it rises.
        #[test]
        fn blocks_are_the_nearest_rising_curve(given in proptest::collection::vec((0_u16..50, proptest::bool::ANY), 1..60)) {
            let mut sorted: Vec<(f32, bool)> = given.iter().map(|(p, came)| (f32::from(*p) / 50.0, *came)).collect();
            sorted.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
            let blocks = pooled(&sorted);
            proptest::prop_assert!(blocks.windows(2).all(|pair| pair[0].mean() < pair[1].mean() && pair[0].place() < pair[1].place()));
            proptest::prop_assert_eq!(blocks.iter().map(|block| block.count as usize).sum::<usize>(), sorted.len());
            let mut rest = sorted.as_slice();
            for block in &blocks {
                let (own, others) = rest.split_at(block.count as usize);
                rest = others;
                let mean = |part: &[(f32, bool)]| part.iter().filter(|(_, came)| *came).count() as f64 / part.len() as f64;
                proptest::prop_assert!((mean(own) - block.mean()).abs() < 1e-9);
                for cut in 1..own.len() {
                    // Between equal predictions there is no cut.
                    if own[cut - 1].0 < own[cut].0 {
                        proptest::prop_assert!(mean(&own[..cut]) >= mean(&own[cut..]) - 1e-9);
                    }
                }
            }
        }
    }
}
