//! How components are used: what is asked for together, how long until it is asked for again, what was evicted too early, what
//! was loaded in vain, and what was waited for.
//!
//! Everything is bounded: what is used least lately is forgotten first.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::decision::{Act, Decision};
use crate::ids::{ComponentId, Tier};
use crate::predict::{GuessResults, Guesses};
use crate::units::Bytes;

/// Ends of the classes of reuse intervals.
pub const INTERVALS: [Duration; 5] = [
    Duration::from_secs(1),
    Duration::from_secs(10),
    Duration::from_secs(60),
    Duration::from_secs(600),
    Duration::from_secs(3600),
];
/// What is loaded again within this time after its eviction was evicted too early.
pub const CHURN_WITHIN: Duration = Duration::from_secs(600);
/// Components that are remembered.
const MOST_COMPONENTS: usize = 4096;
/// Pairs that are remembered.
const MOST_PAIRS: usize = 4096;
/// Components of one set whose pairs are counted: the number of pairs grows with its square.
const MOST_IN_A_SET: usize = 16;

/// The least share of a component's uses for which another one usually goes with it, and the uses from which that can be told.
const USUAL: f64 = 0.5;
const USUAL_FROM: u64 = 4;

/// What a load waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// Memory in a tier, which others held.
    Memory(Tier),
    /// Bytes from a disk.
    Disk,
    /// Bytes from RAM on their way to a GPU.
    Link,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory(tier) => write!(f, "memory in {tier}"),
            Self::Disk => f.pad("disk"),
            Self::Link => f.pad("link to a GPU"),
        }
    }
}

#[derive(Debug, Clone, Default)]
struct Row {
    uses: u64,
    last: Duration,
    /// By [`INTERVALS`]; the last class is what takes longer.
    intervals: [u64; INTERVALS.len() + 1],
}

#[derive(Debug, Clone, Copy, Default)]
struct Waited {
    loads: u64,
    seconds: f64,
    longest_s: f64,
}

/// See the module's page.
#[derive(Debug, Default)]
pub struct Usage {
    rows: HashMap<ComponentId, Row>,
    pairs: HashMap<(ComponentId, ComponentId), u64>,
    evicted: HashMap<(Tier, ComponentId), (Duration, Bytes)>,
    evictions: u64,
    churn: u64,
    churn_bytes: Bytes,
    by_component: HashMap<ComponentId, u64>,
    guesses: Guesses,
    waited: BTreeMap<Cause, Waited>,
}

impl Usage {
    /// A set was granted.
    pub fn used(&mut self, at: Duration, components: &[ComponentId]) {
        for id in components {
            let row = self.rows.entry(id.clone()).or_default();
            if row.uses > 0 {
                let gap = at.saturating_sub(row.last);
                let class = INTERVALS.partition_point(|end| *end <= gap);
                if let Some(count) = row.intervals.get_mut(class) {
                    *count += 1;
                }
            }
            row.uses += 1;
            row.last = at;
        }
        for (i, a) in components.iter().enumerate().take(MOST_IN_A_SET) {
            for b in components.iter().take(MOST_IN_A_SET).skip(i + 1) {
                let pair = if a < b { (a, b) } else { (b, a) };
                *self
                    .pairs
                    .entry((pair.0.clone(), pair.1.clone()))
                    .or_default() += 1;
            }
        }
        if self.rows.len() > MOST_COMPONENTS {
            keep_half(&mut self.rows, |row| row.last);
        }
        if self.pairs.len() > MOST_PAIRS {
            keep_half(&mut self.pairs, |count| *count);
        }
    }

    /// These components began to load in a tier.
    pub fn loads(&mut self, at: Duration, tier: Tier, components: &[ComponentId]) {
        for id in components {
            let Some((since, bytes)) = self.evicted.remove(&(tier, id.clone())) else {
                continue;
            };
            if at.saturating_sub(since) <= CHURN_WITHIN {
                self.churn += 1;
                self.churn_bytes = self.churn_bytes.saturating_add(bytes);
                *self.by_component.entry(id.clone()).or_default() += 1;
            }
        }
        if self.by_component.len() > MOST_COMPONENTS {
            keep_half(&mut self.by_component, |count| *count);
        }
    }

    /// A load waited.
    pub fn waited(&mut self, cause: Cause, time: Duration) {
        let waited = self.waited.entry(cause).or_default();
        waited.loads += 1;
        waited.seconds += time.as_secs_f64();
        waited.longest_s = waited.longest_s.max(time.as_secs_f64());
    }

    /// What was loaded before anybody asked for it.
    pub fn guesses(&mut self) -> &mut Guesses {
        &mut self.guesses
    }

    /// What mostly goes with these and is not among them, with the share of their uses in which it did: the most usual first.
    #[must_use]
    pub fn usual(&self, with: &[ComponentId]) -> Vec<(ComponentId, f64)> {
        let mut usual: BTreeMap<&ComponentId, f64> = BTreeMap::new();
        for ((a, b), times) in &self.pairs {
            let other = match (with.contains(a), with.contains(b)) {
                (true, false) => (a, b),
                (false, true) => (b, a),
                _ => continue,
            };
            let uses = self.rows.get(other.0).map_or(0, |row| row.uses);
            let share = *times as f64 / uses.max(1) as f64;
            if uses >= USUAL_FROM && share >= USUAL {
                let most = usual.entry(other.1).or_default();
                *most = most.max(share.min(1.0));
            }
        }
        let mut usual: Vec<_> = usual.into_iter().map(|(id, p)| (id.clone(), p)).collect();
        usual.sort_by(|(a, p), (b, q)| q.total_cmp(p).then(a.cmp(b)));
        usual
    }

    /// Something was decided.
    pub fn decided(&mut self, decision: &Decision) {
        match &decision.act {
            Act::Evict {
                component,
                tier,
                bytes,
                ..
            } => {
                self.evictions += 1;
                let key = (*tier, component.clone());
                self.evicted.insert(key, (decision.at, *bytes));
                if self.evicted.len() > MOST_COMPONENTS {
                    keep_half(&mut self.evicted, |(at, _)| *at);
                }
            }
            Act::Admit { tier, waited, .. } => self.waited(Cause::Memory(*tier), *waited),
            _ => {}
        }
    }

    /// What was found, the `most` frequent of each kind.
    #[must_use]
    pub fn patterns(&self, most: usize) -> Patterns {
        let mut intervals = [0; INTERVALS.len() + 1];
        for row in self.rows.values() {
            for (sum, count) in intervals.iter_mut().zip(row.intervals) {
                *sum += count;
            }
        }
        let ends = INTERVALS
            .iter()
            .map(|end| Some(end.as_secs()))
            .chain([None]);
        Patterns {
            reuse: ends
                .zip(intervals)
                .map(|(within_s, count)| Reuse { within_s, count })
                .collect(),
            together: top(self.pairs.iter(), most)
                .into_iter()
                .map(|((a, b), count)| Together {
                    components: [a.to_string(), b.to_string()],
                    count,
                })
                .collect(),
            churn: Churn {
                within_s: CHURN_WITHIN.as_secs(),
                evictions: self.evictions,
                reloads: self.churn,
                bytes: self.churn_bytes,
                components: top(self.by_component.iter(), most)
                    .into_iter()
                    .map(|(id, count)| (id.to_string(), count))
                    .collect(),
            },
            guesses: self.guesses.results(),
            waiting: self
                .waited
                .iter()
                .map(|(cause, waited)| Waiting {
                    cause: cause.to_string(),
                    loads: waited.loads,
                    seconds: waited.seconds,
                    longest_s: waited.longest_s,
                })
                .collect(),
        }
    }
}

/// Forgets the half with the least keys.
fn keep_half<K: std::hash::Hash + Eq + Clone + Ord, V, O: Ord + Copy>(
    map: &mut HashMap<K, V>,
    order: impl Fn(&V) -> O,
) {
    let mut keys: Vec<(O, K)> = map.iter().map(|(k, v)| (order(v), k.clone())).collect();
    keys.sort();
    let half = keys.len() / 2;
    for (_, key) in keys.into_iter().take(half) {
        map.remove(&key);
    }
}

fn top<'a, K: Ord>(rows: impl Iterator<Item = (&'a K, &'a u64)>, most: usize) -> Vec<(&'a K, u64)> {
    let mut rows: Vec<_> = rows.map(|(key, count)| (key, *count)).collect();
    rows.sort_by(|a, b| (b.1, a.0).cmp(&(a.1, b.0)));
    rows.truncate(most);
    rows
}

/// How components are used, in sum.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Patterns {
    /// How long it took until a component was asked for again, over all components.
    pub reuse: Vec<Reuse>,
    /// What is asked for together, most often first.
    pub together: Vec<Together>,
    /// What was evicted and had to be loaded again soon.
    pub churn: Churn,
    /// What came of loading what nobody had asked for, by its grounds.
    pub guesses: Vec<GuessResults>,
    /// What loads waited for.
    pub waiting: Vec<Waiting>,
}

/// A class of reuse intervals.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reuse {
    /// Its end, in seconds; `null` for what takes longer than the class before.
    pub within_s: Option<u64>,
    /// How many intervals.
    pub count: u64,
}

/// Two components that are asked for together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Together {
    /// Which.
    pub components: [String; 2],
    /// How often.
    pub count: u64,
}

/// What was evicted too early.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Churn {
    /// What counts as soon, in seconds.
    pub within_s: u64,
    /// Evictions in all.
    pub evictions: u64,
    /// Evicted components that were loaded again within that time.
    pub reloads: u64,
    /// Their bytes.
    pub bytes: Bytes,
    /// Those that it happened to most often.
    pub components: Vec<(String, u64)>,
}

/// What loads waited for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Waiting {
    /// In words.
    pub cause: String,
    /// How many loads, those that did not have to wait included.
    pub loads: u64,
    /// How long in all, in seconds.
    pub seconds: f64,
    /// How long at most, in seconds.
    pub longest_s: f64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decision::EvictCause;

    fn id(name: &str) -> ComponentId {
        ComponentId {
            model: name.into(),
            component: "weights".into(),
        }
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn evict(usage: &mut Usage, name: &str, seconds: u64, wasted: bool) {
        usage.decided(&Decision {
            number: 1,
            at: at(seconds),
            act: Act::Evict {
                component: id(name),
                tier: Tier::Ram,
                bytes: Bytes::mib(1),
                policy: "lru".into(),
                score: 0.0,
                reason: String::new(),
                cause: EvictCause::Pressure,
                candidates: 1,
                wasted,
            },
        });
    }

    #[test]
    fn intervals_pairs_and_churn_are_counted() {
        let mut usage = Usage::default();
        usage.used(at(0), &[id("a"), id("b")]);
        usage.used(at(5), &[id("b"), id("a"), id("c")]);
        usage.used(at(5000), &[id("a")]);
        evict(&mut usage, "a", 5100, false);
        evict(&mut usage, "b", 5100, true);
        usage.loads(at(5200), Tier::Ram, &[id("a"), id("c")]);
        usage.loads(at(9000), Tier::Ram, &[id("b")]);
        usage.waited(Cause::Disk, at(2));
        usage.waited(Cause::Disk, at(3));
        let patterns = usage.patterns(1);
        let counts: Vec<u64> = patterns.reuse.iter().map(|reuse| reuse.count).collect();
        assert_eq!(counts, [0, 2, 0, 0, 0, 1]);
        assert_eq!(patterns.reuse[5].within_s, None);
        let pair = Together {
            components: ["a/weights".into(), "b/weights".into()],
            count: 2,
        };
        assert_eq!(patterns.together, [pair]);
        assert_eq!((patterns.churn.evictions, patterns.churn.reloads), (2, 1));
        assert_eq!(patterns.churn.bytes, Bytes::mib(1));
        assert_eq!(patterns.churn.components, [("a/weights".to_owned(), 1)]);
        let [disk] = &patterns.waiting[..] else {
            panic!("{patterns:?}")
        };
        assert_eq!((disk.loads, disk.longest_s), (2, 3.0));
    }

    #[test]
    fn the_usual_adapters_of_a_base_are_known() {
        let mut usage = Usage::default();
        for i in 0..8 {
            let style = if i % 4 == 3 { "rare" } else { "style" };
            usage.used(at(i), &[id("base"), id(style)]);
            usage.used(at(i), &[id("alone")]);
        }
        assert_eq!(usage.usual(&[id("base")]), [(id("style"), 0.75)]);
        assert_eq!(usage.usual(&[id("rare")]), [], "twice is no habit");
        assert_eq!(usage.usual(&[id("style"), id("base")]), []);
        assert_eq!(usage.usual(&[id("alone")]), []);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut usage = Usage::default();
        for i in 0..3 * MOST_COMPONENTS as u64 {
            let name = i.to_string();
            usage.used(at(i), &[id(&name), id("always")]);
            evict(&mut usage, &name, i, false);
        }
        assert!(usage.rows.len() <= MOST_COMPONENTS + 1);
        assert!(usage.pairs.len() <= MOST_PAIRS + 1);
        assert!(usage.evicted.len() <= MOST_COMPONENTS + 1);
        assert!(usage.rows.contains_key(&id("always")));
    }
}
