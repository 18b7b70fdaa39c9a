//! Which GPU for which set, when several sets are wanted together.
//!
//! What counts is time: the seconds until all sets are there, and the seconds that it will take to bring back what was
//! evicted for them. Sets that share components are better off on one GPU, and a set where most of it is already, unless that
//! costs somebody else more. Small cases are searched exactly (branch and bound, bounded by a count of nodes, so that the
//! same books give the same answer on every machine); larger ones start from the better of best fit and the largest regret
//! first, and are mended by moves and swaps until none helps. Never worse than best fit.

use crate::ids::GpuIndex;
use crate::units::Bytes;

/// A component, as far as it matters here. Components are known by their place in [`Mix::parts`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Part {
    /// What it takes on a GPU.
    pub bytes: Bytes,
    /// Seconds until it is in RAM; 0 where it is.
    pub read_s: f64,
}

/// A component that is on a GPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Resident {
    /// Which.
    pub part: usize,
    /// What it would cost to lose it: seconds to bring it back times the chance that it is wanted. `None` where it is held,
    /// and cannot go.
    pub loss_s: Option<f64>,
}

/// A GPU and what it has.
#[derive(Debug, Clone, PartialEq)]
pub struct Offer {
    /// Which GPU.
    pub gpu: GpuIndex,
    /// Memory that is neither used nor promised.
    pub free: Bytes,
    /// What its link carries each second; more than 0.
    pub bytes_per_s: f64,
    /// What is there, each component once.
    pub residents: Vec<Resident>,
    /// Components that another GPU has, with the seconds that they take from there.
    pub near: Vec<(usize, f64)>,
}

/// A set that is wanted on one GPU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Its components, each once.
    pub parts: Vec<usize>,
    /// The places in [`Mix::offers`] that it may have; empty: all.
    pub among: Vec<usize>,
}

/// Sets that are wanted together, and what there is for them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Mix {
    /// All components that occur.
    pub parts: Vec<Part>,
    /// The GPUs.
    pub offers: Vec<Offer>,
    /// The sets.
    pub sets: Vec<Wanted>,
}

/// What is proposed for a mix.
#[derive(Debug, Clone, PartialEq)]
pub struct Allocation {
    /// The place in [`Mix::offers`] of each set. `None`: not all fit together, and this one is left out.
    pub places: Vec<Option<usize>>,
    /// What has to go from each GPU.
    pub evictions: Vec<Vec<usize>>,
    /// Seconds of loading, over all GPUs, and of bringing back what goes.
    pub seconds: f64,
}

impl Allocation {
    /// How many sets are left out.
    #[must_use]
    pub fn left_out(&self) -> usize {
        self.places.iter().filter(|place| place.is_none()).count()
    }

    /// Whether it is better: more sets have a place, or as many in less time.
    fn is_better_than(&self, other: &Self) -> bool {
        (self.left_out(), self.seconds) < (other.left_out(), other.seconds)
    }
}

/// Nodes of the exact search at most. One costs about a microsecond.
const NODES: usize = 20_000;
/// Rounds of mending at most. Two or three are usual.
const ROUNDS: usize = 20;
/// Less is no gain: sums of seconds in another order differ by as much.
const GAIN_S: f64 = 1e-9;

/// One GPU with the sets that it has so far.
#[derive(Clone)]
struct Board<'a> {
    offer: &'a Offer,
    /// The places in `offer.residents` by what goes first: the cheapest for its bytes. Held ones are not in it.
    cheapest: Vec<usize>,
    resident: Vec<bool>,
    /// How many of its sets want each component.
    wanted: Vec<u16>,
    new_bytes: Bytes,
    load_s: f64,
    seconds: f64,
}

impl<'a> Board<'a> {
    fn new(mix: &Mix, offer: &'a Offer) -> Self {
        let mut resident = vec![false; mix.parts.len()];
        for one in &offer.residents {
            if let Some(there) = resident.get_mut(one.part) {
                *there = true;
            }
        }
        let density = |i: &usize| {
            let one = offer.residents.get(*i)?;
            let bytes = mix.parts.get(one.part)?.bytes.as_f64().max(1.0);
            Some(one.loss_s? / bytes)
        };
        let mut cheapest: Vec<usize> = (0..offer.residents.len())
            .filter(|i| density(i).is_some())
            .collect();
        cheapest.sort_by(|a, b| {
            let (a, b) = (density(a).unwrap_or(0.0), density(b).unwrap_or(0.0));
            a.total_cmp(&b)
        });
        Self {
            offer,
            cheapest,
            resident,
            wanted: vec![0; mix.parts.len()],
            new_bytes: Bytes::ZERO,
            load_s: 0.0,
            seconds: 0.0,
        }
    }

    fn load_s(&self, i: usize, part: &Part) -> f64 {
        let near = self.offer.near.iter().find(|(near, _)| *near == i);
        // Disk and link work at the same time.
        let through_ram = part
            .read_s
            .max(part.bytes.as_f64() / self.offer.bytes_per_s);
        near.map_or(through_ram, |(_, seconds)| seconds.min(through_ram))
    }

    /// What goes for this many new bytes, by places in the offer's residents. `None` where all that may go is too little.
    fn evict(&self, mix: &Mix, new_bytes: Bytes, mut gone: impl FnMut(&Resident)) -> Option<()> {
        let mut missing = new_bytes.saturating_sub(self.offer.free);
        for i in &self.cheapest {
            if missing.is_zero() {
                break;
            }
            let one = self.offer.residents.get(*i)?;
            if self.wanted.get(one.part).is_some_and(|wanted| *wanted > 0) {
                continue;
            }
            missing = missing.saturating_sub(mix.parts.get(one.part)?.bytes);
            gone(one);
        }
        missing.is_zero().then_some(())
    }

    fn count(&mut self, mix: &Mix) -> bool {
        let mut loss_s = 0.0;
        let fits = self
            .evict(mix, self.new_bytes, |one| {
                loss_s += one.loss_s.unwrap_or(0.0);
            })
            .is_some();
        self.seconds = self.load_s + loss_s;
        fits
    }

    /// Takes a set on; gives whether it fits.
    fn add(&mut self, mix: &Mix, set: &Wanted) -> bool {
        for &i in &set.parts {
            let (Some(part), Some(wanted)) = (mix.parts.get(i), self.wanted.get_mut(i)) else {
                continue;
            };
            *wanted += 1;
            if *wanted == 1 && !self.resident.get(i).copied().unwrap_or(false) {
                self.new_bytes += part.bytes;
                self.load_s += self.load_s(i, part);
            }
        }
        self.count(mix)
    }

    /// The counterpart of [`add`](Self::add).
    fn remove(&mut self, mix: &Mix, set: &Wanted) {
        for &i in &set.parts {
            let (Some(part), Some(wanted)) = (mix.parts.get(i), self.wanted.get_mut(i)) else {
                continue;
            };
            *wanted -= 1;
            if *wanted == 0 && !self.resident.get(i).copied().unwrap_or(false) {
                self.new_bytes = self.new_bytes.saturating_sub(part.bytes);
                self.load_s -= self.load_s(i, part);
            }
        }
        self.count(mix);
    }

    /// The seconds that a set would add here. `None` where it does not fit.
    fn price(&mut self, mix: &Mix, set: &Wanted) -> Option<f64> {
        let (before, load_s, new_bytes) = (self.seconds, self.load_s, self.new_bytes);
        let fits = self.add(mix, set);
        let price = self.seconds - before;
        for &i in &set.parts {
            if let Some(wanted) = self.wanted.get_mut(i) {
                *wanted -= 1;
            }
        }
        // Exactly as it was, which subtracting would not give.
        (self.seconds, self.load_s, self.new_bytes) = (before, load_s, new_bytes);
        fits.then_some(price)
    }
}

/// A proposal under way.
#[derive(Clone)]
struct Draft<'a> {
    mix: &'a Mix,
    boards: Vec<Board<'a>>,
    places: Vec<Option<usize>>,
}

impl<'a> Draft<'a> {
    fn new(mix: &'a Mix) -> Self {
        Self {
            mix,
            boards: mix
                .offers
                .iter()
                .map(|offer| Board::new(mix, offer))
                .collect(),
            places: vec![None; mix.sets.len()],
        }
    }

    fn set(&self, set: usize) -> Option<&'a Wanted> {
        self.mix.sets.get(set)
    }

    fn may(&self, set: usize, place: usize) -> bool {
        self.set(set)
            .is_some_and(|set| set.among.is_empty() || set.among.contains(&place))
    }

    fn price(&mut self, set: usize, place: usize) -> Option<f64> {
        if !self.may(set, place) {
            return None;
        }
        let wanted = self.set(set)?;
        self.boards.get_mut(place)?.price(self.mix, wanted)
    }

    fn put(&mut self, set: usize, place: Option<usize>) {
        let Some(wanted) = self.set(set) else { return };
        let before = self.places.get(set).copied().flatten();
        if let Some(board) = before.and_then(|place| self.boards.get_mut(place)) {
            board.remove(self.mix, wanted);
        }
        if let Some(board) = place.and_then(|place| self.boards.get_mut(place)) {
            board.add(self.mix, wanted);
        }
        if let Some(mine) = self.places.get_mut(set) {
            *mine = place;
        }
    }

    fn seconds(&self) -> f64 {
        self.boards.iter().map(|board| board.seconds).sum()
    }

    fn done(&self) -> Allocation {
        let evictions = self
            .boards
            .iter()
            .map(|board| {
                let mut gone = Vec::new();
                let _ = board.evict(self.mix, board.new_bytes, |one| gone.push(one.part));
                gone
            })
            .collect();
        Allocation {
            places: self.places.clone(),
            evictions,
            seconds: self.seconds(),
        }
    }

    /// The cheapest places of a set, with the first two prices.
    fn cheapest(&self, prices: &[Option<f64>]) -> Option<(usize, f64, f64)> {
        let (mut best, mut second) = (None, f64::INFINITY);
        for (place, price) in prices.iter().enumerate() {
            let Some(price) = *price else { continue };
            match best {
                Some((_, least)) if price >= least => second = second.min(price),
                _ => {
                    second = best.map_or(second, |(_, least)| least);
                    best = Some((place, price));
                }
            }
        }
        best.map(|(place, price)| (place, price, second))
    }

    /// Places set after set, always the one that would lose most if it did not get its best place now.
    fn by_regret(mix: &'a Mix) -> Self {
        let mut draft = Self::new(mix);
        let places = mix.offers.len();
        let mut prices: Vec<Vec<Option<f64>>> = (0..mix.sets.len())
            .map(|set| (0..places).map(|place| draft.price(set, place)).collect())
            .collect();
        let mut left: Vec<usize> = (0..mix.sets.len()).collect();
        while !left.is_empty() {
            let mut next: Option<(usize, usize, f64, f64)> = None;
            for (at, set) in left.iter().enumerate() {
                let Some((place, price, second)) =
                    prices.get(*set).and_then(|prices| draft.cheapest(prices))
                else {
                    continue;
                };
                let regret = second - price;
                // Equal regret, which is the rule where GPUs are alike: the larger set first.
                if next.is_none_or(|(_, _, most, dearest)| (regret, price) > (most, dearest)) {
                    next = Some((at, place, regret, price));
                }
            }
            let Some((at, place, ..)) = next else { break };
            let set = left.swap_remove(at);
            draft.put(set, Some(place));
            for other in &left {
                let price = draft.price(*other, place);
                if let Some(slot) = prices.get_mut(*other).and_then(|row| row.get_mut(place)) {
                    *slot = price;
                }
            }
        }
        draft
    }

    /// Places set after set as they come: where most of it is, then where least memory is left.
    fn best_fit(mix: &'a Mix) -> Self {
        let mut draft = Self::new(mix);
        for set in 0..mix.sets.len() {
            let mut best: Option<((Bytes, std::cmp::Reverse<Bytes>), usize)> = None;
            for place in 0..mix.offers.len() {
                if draft.price(set, place).is_none() {
                    continue;
                }
                let (Some(board), Some(wanted)) = (draft.boards.get(place), draft.set(set)) else {
                    continue;
                };
                let there = wanted.parts.iter().filter(|i| {
                    board.resident.get(**i).copied().unwrap_or(false)
                        || board.wanted.get(**i).is_some_and(|wanted| *wanted > 0)
                });
                let held: Bytes = there
                    .filter_map(|i| mix.parts.get(*i))
                    .map(|part| part.bytes)
                    .sum();
                let free = board.offer.free.saturating_sub(board.new_bytes);
                let key = (held, std::cmp::Reverse(free));
                if best.is_none_or(|(most, _)| key > most) {
                    best = Some((key, place));
                }
            }
            draft.put(set, best.map(|(_, place)| place));
        }
        draft
    }

    /// Moves single sets, and swaps two, as long as that helps.
    fn mend(&mut self) {
        for _ in 0..ROUNDS {
            let mut better = false;
            for set in 0..self.places.len() {
                better |= self.move_one(set);
            }
            for first in 0..self.places.len() {
                for second in first + 1..self.places.len() {
                    better |= self.swap(first, second);
                }
            }
            if !better {
                return;
            }
        }
    }

    fn move_one(&mut self, set: usize) -> bool {
        let before = self.places.get(set).copied().flatten();
        let seconds = self.seconds();
        self.put(set, None);
        let without = self.seconds();
        let mut best = before.map(|place| (place, seconds - without));
        for place in 0..self.boards.len() {
            if Some(place) != before
                && let Some(price) = self.price(set, place)
                && best.is_none_or(|(_, least)| price + GAIN_S < least)
            {
                best = Some((place, price));
            }
        }
        let place = best.map(|(place, _)| place);
        self.put(set, place);
        place != before
    }

    fn swap(&mut self, first: usize, second: usize) -> bool {
        let at = |draft: &Self, set: usize| draft.places.get(set).copied().flatten();
        let (a, b) = (at(self, first), at(self, second));
        if a == b {
            return false;
        }
        // A set without a place gets the other's, if that finds one elsewhere.
        let (Some(a), Some(b)) = (a, b) else {
            return self.give_way(first, second);
        };
        let before = self.seconds();
        self.put(first, None);
        self.put(second, None);
        let fits = self.price(first, b).is_some() && {
            self.put(first, Some(b));
            self.price(second, a).is_some()
        };
        if fits {
            self.put(second, Some(a));
            if self.seconds() + GAIN_S < before {
                return true;
            }
        }
        self.put(first, Some(a));
        self.put(second, Some(b));
        false
    }

    fn give_way(&mut self, first: usize, second: usize) -> bool {
        let (out, place) = match (self.places.get(first), self.places.get(second)) {
            (Some(None), Some(Some(place))) => ((first, second), *place),
            (Some(Some(place)), Some(None)) => ((second, first), *place),
            _ => return false,
        };
        let (out, has) = out;
        self.put(has, None);
        if self.price(out, place).is_some() {
            self.put(out, Some(place));
            let prices: Vec<Option<f64>> = (0..self.boards.len())
                .map(|place| self.price(has, place))
                .collect();
            if let Some((elsewhere, ..)) = self.cheapest(&prices) {
                self.put(has, Some(elsewhere));
                return true;
            }
            self.put(out, None);
        }
        self.put(has, Some(place));
        false
    }
}

/// The exact search: sets one after the other, the largest first, each in all its places.
struct Search<'a> {
    draft: Draft<'a>,
    order: Vec<usize>,
    best: Allocation,
    nodes: usize,
}

impl Search<'_> {
    /// `false` where it took too many nodes.
    fn go(&mut self, depth: usize, left_out: usize) -> bool {
        let Some(&set) = self.order.get(depth) else {
            let found = self.draft.done();
            if found.is_better_than(&self.best) {
                self.best = found;
            }
            return true;
        };
        let prices: Vec<(usize, f64)> = (0..self.draft.boards.len())
            .filter_map(|place| Some((place, self.draft.price(set, place)?)))
            .collect();
        for (place, _) in prices {
            self.nodes += 1;
            if self.nodes > NODES {
                return false;
            }
            self.draft.put(set, Some(place));
            // More sets on a GPU never cost less, but for evictions that they make needless: those count as nothing here.
            let load_s: f64 = self.draft.boards.iter().map(|board| board.load_s).sum();
            let hopeless = (left_out, load_s) >= (self.best.left_out(), self.best.seconds);
            let whole = hopeless || self.go(depth + 1, left_out);
            self.draft.put(set, None);
            if !whole {
                return false;
            }
        }
        // Without this one.
        left_out + 1 > self.best.left_out() || self.go(depth + 1, left_out + 1)
    }
}

/// Proposes a GPU for each set. `effort`: whether small cases are searched exactly.
fn search(mix: &Mix, exactly: bool) -> Allocation {
    let mut best: Option<Allocation> = None;
    for mut draft in [Draft::by_regret(mix), Draft::best_fit(mix)] {
        draft.mend();
        let done = draft.done();
        if best.as_ref().is_none_or(|best| done.is_better_than(best)) {
            best = Some(done);
        }
    }
    let best = best.unwrap_or_else(|| Draft::new(mix).done());
    let choices = mix.sets.iter().try_fold(1_usize, |all, set| {
        let places = if set.among.is_empty() {
            mix.offers.len()
        } else {
            set.among.len()
        };
        all.checked_mul(places + 1).filter(|all| *all <= 50 * NODES)
    });
    if !exactly || choices.is_none() {
        return best;
    }
    let mut order: Vec<usize> = (0..mix.sets.len()).collect();
    let bytes = |set: &usize| -> Bytes {
        let parts = mix.sets.get(*set).map(|set| set.parts.as_slice());
        parts
            .unwrap_or_default()
            .iter()
            .filter_map(|i| mix.parts.get(*i))
            .map(|part| part.bytes)
            .sum()
    };
    order.sort_by_key(|set| std::cmp::Reverse(bytes(set)));
    let mut search = Search {
        draft: Draft::new(mix),
        order,
        best,
        nodes: 0,
    };
    // What was found before the nodes ran out is no worse than what it began with.
    let _ = search.go(0, 0);
    search.best
}

/// The GPU for each set of a mix.
#[must_use]
pub fn allocate(mix: &Mix) -> Allocation {
    search(mix, true)
}

/// The seconds that the first set of a mix would take at each offer, were it the only one. `None` where it has no room there.
#[must_use]
pub fn prices(mix: &Mix) -> Vec<Option<f64>> {
    let mut draft = Draft::new(mix);
    (0..mix.offers.len())
        .map(|place| draft.price(0, place))
        .collect()
}

/// What comes out without any search: each set in turn where most of it is, then where least memory is left over. For
/// comparison.
#[must_use]
pub fn best_fit(mix: &Mix) -> Allocation {
    Draft::best_fit(mix).done()
}

#[cfg(test)]
mod tests;
