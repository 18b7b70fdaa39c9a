//! Policies against each other over several draws of sizes: means of paired ratios, with 95 % intervals.

use serde::Serialize;

use super::Outcome;

/// A mean and half the width of its 95 % interval (Student's t).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Mean {
    /// The mean.
    pub mean: f64,
    /// Half the interval's width; none where there is one value only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<f64>,
}

/// Quantiles of Student's t at 0.975 for 1 to 30 degrees of freedom.
const T_975: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
];

impl Mean {
    /// Of these values; `None` where there are none.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        let n = values.len() as f64;
        if values.is_empty() {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n;
        let interval = (values.len() > 1).then(|| {
            let squares: f64 = values.iter().map(|v| (v - mean) * (v - mean)).sum();
            let t = T_975.get(values.len() - 2).copied().unwrap_or(1.96);
            t * (squares / (n - 1.0) / n).sqrt()
        });
        Some(Self { mean, interval })
    }
}

/// A policy at one capacity, over all draws.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// The policy.
    pub policy: String,
    /// The place of the capacity among those replayed.
    pub capacity: usize,
    /// Cost miss ratio.
    pub cmr: Mean,
    /// Over LRU's on the same draw.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of_lru: Option<Mean>,
    /// Over that of the best simple policy at each draw: neither hotset's own nor clairvoyant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of_best_simple: Option<Mean>,
    /// Share of the way from LRU to the bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gap_closed: Option<Mean>,
}

/// One replay of a comparison.
#[derive(Debug, Clone)]
pub struct Run {
    /// Which draw of sizes.
    pub draw: usize,
    /// The place of the capacity.
    pub capacity: usize,
    /// What came of it.
    pub outcome: Outcome,
}

/// Compares policies draw by draw. `bound` gives the least cost miss ratio of a draw at a capacity, where it is known.
#[must_use]
pub fn compare(runs: &[Run], bound: impl Fn(usize, usize) -> Option<f64>) -> Vec<Comparison> {
    let cmr_of = |policy: &str, draw: usize, capacity: usize| {
        let mut all = runs.iter();
        all.find(|r| r.draw == draw && r.capacity == capacity && r.outcome.policy == policy)
            .map(|r| r.outcome.cmr)
    };
    let is_simple = |policy: &str| !policy.starts_with("hotset") && policy != "belady-size";
    let best_simple = |draw: usize, capacity: usize| {
        runs.iter()
            .filter(|r| r.draw == draw && r.capacity == capacity && is_simple(&r.outcome.policy))
            .map(|r| r.outcome.cmr)
            .min_by(f64::total_cmp)
    };
    let mut groups: Vec<(usize, &str)> = Vec::new();
    for run in runs {
        let group = (run.capacity, run.outcome.policy.as_str());
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    let of_group = |(capacity, policy): (usize, &str)| {
        let own: Vec<&Run> = runs
            .iter()
            .filter(|r| r.capacity == capacity && r.outcome.policy == policy)
            .collect();
        let paired = |value: &dyn Fn(&Run) -> Option<f64>| {
            let values: Option<Vec<f64>> = own.iter().map(|run| value(run)).collect();
            values.and_then(|values| Mean::of(&values))
        };
        let over = |run: &Run, other: Option<f64>| {
            other
                .filter(|cmr| *cmr > 0.0)
                .map(|cmr| run.outcome.cmr / cmr)
        };
        Some(Comparison {
            policy: policy.to_owned(),
            capacity,
            cmr: paired(&|run| Some(run.outcome.cmr))?,
            of_lru: paired(&|run| over(run, cmr_of("lru", run.draw, capacity))),
            of_best_simple: paired(&|run| over(run, best_simple(run.draw, capacity))),
            gap_closed: paired(&|run| {
                let lru = cmr_of("lru", run.draw, capacity)?;
                let gap = lru - bound(run.draw, capacity)?;
                (gap > 0.0).then(|| (lru - run.outcome.cmr) / gap)
            }),
        })
    };
    groups.into_iter().filter_map(of_group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes;

    fn run(draw: usize, policy: &str, cmr: f64) -> Run {
        let seconds = super::super::Seconds::default();
        Run {
            draw,
            capacity: 0,
            outcome: Outcome {
                policy: policy.to_owned(),
                capacity_bytes: Bytes(1),
                ram_bytes: Bytes(1),
                requests: 1,
                cmr,
                object_miss_ratio: 0.0,
                byte_miss_ratio: 0.0,
                zero_wait_share: 0.0,
                cold_start_s: seconds,
                cold_start_of_cold_s: seconds,
                prefetch: None,
                ns_per_request: 0.0,
            },
        }
    }

    #[test]
    fn means_by_hand() {
        assert_eq!(Mean::of(&[]), None);
        assert_eq!(Mean::of(&[2.0]).unwrap().interval, None);
        let mean = Mean::of(&[1.0, 2.0, 3.0]).unwrap();
        assert!((mean.mean - 2.0).abs() < 1e-12);
        // 4.303 * 1 / sqrt(3)
        assert!((mean.interval.unwrap() - 2.4843).abs() < 1e-3);
    }

    #[test]
    fn ratios_are_paired() {
        let runs = [
            run(0, "lru", 0.4),
            run(0, "gdsf", 0.2),
            run(0, "hotset", 0.1),
            run(1, "lru", 0.1),
            run(1, "gdsf", 0.2),
            run(1, "hotset", 0.1),
        ];
        let compared = compare(&runs, |draw, _| (draw < 2).then_some(0.0));
        let hotset = compared.iter().find(|c| c.policy == "hotset").unwrap();
        let near = |mean: Option<Mean>, value: f64| (mean.unwrap().mean - value).abs() < 1e-12;
        assert!(near(hotset.of_lru, 0.625));
        assert!(near(hotset.of_best_simple, 0.75));
        assert!(near(hotset.gap_closed, 0.375));
        assert!(compare(&runs, |_, _| None)[0].gap_closed.is_none());
    }
}
