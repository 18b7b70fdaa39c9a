//! Which of the candidates that are worth least go, so that enough bytes come back.
//!
//! Taking them in the order of their worth for each byte frees too much: the last one is often large, and what went before it
//! went in vain. Taking the least worth in sum leaves room for nothing else, and the next load has to evict again. So this
//! weighs both: what goes costs its worth, and what is freed beyond the need earns half of what bytes are worth at the margin.

/// A candidate: what keeping it is worth, and its bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Item {
    pub(super) worth: f64,
    pub(super) bytes: f64,
}

/// Share of the marginal worth of a byte that a byte freed beyond the need earns. Measured: from 0 to 0.8 within a percent.
const SPARE: f64 = 0.5;
/// Items that are weighed against each other; those before them go in any case.
const WEIGHED: usize = 12;
/// Steps of the search; the best that was found by then stands.
const STEPS: usize = 1_024;

/// The places of the items that go, rising. `items` stand in the order of their worth for each byte, the least first, and the
/// first `greedy` of them free at least `needed` bytes.
pub(super) fn choose(items: &[Item], greedy: usize, needed: f64) -> Vec<usize> {
    let greedy = greedy.clamp(1, items.len().max(1));
    let Some(marginal) = items.get(greedy - 1) else {
        return Vec::new();
    };
    let first = items.len().saturating_sub(WEIGHED).min(greedy);
    let fixed: f64 = items[..first].iter().map(|item| item.bytes).sum();
    let weighed = &items[first..];
    let mut left = vec![0.0; weighed.len() + 1];
    for at in (0..weighed.len()).rev() {
        left[at] = left[at + 1] + weighed[at].bytes;
    }
    let mut search = Search {
        items: weighed,
        left,
        needed: needed - fixed,
        price: SPARE * marginal.worth / marginal.bytes.max(1.0),
        best: ((1 << (greedy - first)) - 1, f64::INFINITY),
        steps: STEPS,
    };
    search.best.1 = search.cost_of(search.best.0);
    search.go(0, 0, 0.0, 0.0);
    let chosen = search.best.0;
    (0..first)
        .chain(
            (0..weighed.len())
                .filter(|at| chosen >> at & 1 == 1)
                .map(|at| first + at),
        )
        .collect()
}

struct Search<'a> {
    items: &'a [Item],
    /// Bytes of the items from a place on.
    left: Vec<f64>,
    needed: f64,
    price: f64,
    /// The best set, as bits, and its cost.
    best: (u32, f64),
    steps: usize,
}

impl Search<'_> {
    fn cost_of(&self, set: u32) -> f64 {
        let chosen = (0..self.items.len()).filter(|at| set >> at & 1 == 1);
        let (worth, bytes) = chosen.fold((0.0, 0.0), |(worth, bytes), at| {
            (worth + self.items[at].worth, bytes + self.items[at].bytes)
        });
        worth - self.price * (bytes - self.needed)
    }

    /// With and without the item at this place.
    fn go(&mut self, at: usize, set: u32, worth: f64, bytes: f64) {
        if self.steps == 0 || bytes + self.left[at] < self.needed {
            return;
        }
        self.steps -= 1;
        if bytes >= self.needed {
            let cost = worth - self.price * (bytes - self.needed);
            if cost < self.best.1 {
                self.best = (set, cost);
            }
        }
        let Some(item) = self.items.get(at) else {
            return;
        };
        // Each further item is worth at least its bytes at the price of this one, which rises.
        let least = item.worth / item.bytes.max(1.0);
        let short = (self.needed - bytes).max(0.0);
        let gain = (self.price - least).max(0.0) * self.left[at];
        if worth + short * least - gain - self.price * (bytes - self.needed).max(0.0) >= self.best.1
        {
            return;
        }
        self.go(
            at + 1,
            set | 1 << at,
            worth + item.worth,
            bytes + item.bytes,
        );
        self.go(at + 1, set, worth, bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn item(worth: f64, bytes: f64) -> Item {
        Item { worth, bytes }
    }

    #[test]
    fn what_would_go_in_vain_stays() {
        // Small ones first by worth for each byte, and then one that frees all that is needed by itself.
        let items = [item(0.1, 1.0), item(0.6, 1.0), item(7.0, 10.0)];
        assert_eq!(choose(&items, 3, 10.0), [0, 2]);
        // Nothing is worth anything: all of it may go.
        let worthless = [item(0.0, 1.0), item(0.0, 2.0)];
        assert!(!choose(&worthless, 2, 2.0).is_empty());
        assert!(choose(&[], 0, 1.0).is_empty());
    }

    #[test]
    fn a_smaller_one_beyond_may_do() {
        let items = [item(1.0, 10.0), item(3.0, 20.0), item(0.9, 5.0)];
        assert_eq!(choose(&items, 2, 15.0), [0, 2]);
    }

    proptest! {
        #[test]
        fn it_is_the_best_of_all_and_frees_enough(
            mut items in prop::collection::vec((0.0..10.0_f64, 1.0..100.0_f64), 1..9),
            share in 0.05..1.0_f64,
        ) {
            items.sort_by(|a, b| (a.0 / a.1).total_cmp(&(b.0 / b.1)));
            let items: Vec<Item> = items.into_iter().map(|(w, b)| item(w, b)).collect();
            let needed = share * items.iter().map(|i| i.bytes).sum::<f64>();
            let mut freed = 0.0;
            let greedy = items.iter().take_while(|i| { let more = freed < needed; freed += i.bytes; more }).count();
            let chosen = choose(&items, greedy, needed);
            let bytes: f64 = chosen.iter().map(|at| items[*at].bytes).sum();
            prop_assert!(bytes >= needed - 1e-9);
            let price = SPARE * items[greedy - 1].worth / items[greedy - 1].bytes.max(1.0);
            let cost = |set: &dyn Fn(usize) -> bool| {
                let all = (0..items.len()).filter(|at| set(*at));
                let (w, b) = all.fold((0.0, 0.0), |(w, b), at| (w + items[at].worth, b + items[at].bytes));
                (b >= needed).then_some(w - price * (b - needed))
            };
            let ours = cost(&|at| chosen.contains(&at)).unwrap_or(f64::INFINITY);
            let best = (0..1_u32 << items.len())
                .filter_map(|set| cost(&|at| set >> at & 1 == 1))
                .fold(f64::INFINITY, f64::min);
            prop_assert!(ours <= best + 1e-6, "{ours} {best}");
        }
    }
}
