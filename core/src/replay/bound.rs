//! A lower bound on what any policy must pay: the flow-based offline optimum, weighted by cost.
//!
//! Berger, Beckmann and Harchol-Balter, "Practical Bounds on Optimal Caching with Variable Object Sizes", SIGMETRICS 2018: each span
//! between two uses of a component is kept or not, and may be kept in part; what is kept at any time must fit. The paper lets
//! a cache pass a component through; here what a request asks for is in memory while it is served, so it is
//! taken off the room that is left for spans.
//!
//! The linear programme: for each span `i` a share `x` in 0..=1 at the cost `c` of not keeping it; for each request `t` the bytes that
//! are kept over it, `sum s x <= capacity - bytes of the request`. Each row minus the one before has one entry where a
//! span begins and one where it ends, so it is a flow along the requests. Solved by Clarabel's interior-point method; the
//! value is that of the dual, which bounds from below whatever the primal's rounding.

use std::collections::HashMap;

use clarabel::algebra::CscMatrix;
use clarabel::solver::SupportedConeT::{NonnegativeConeT, ZeroConeT};
use clarabel::solver::{DefaultSettings, DefaultSolver, IPSolver, SolverStatus};
use serde::Serialize;

use super::{Machine, Trace, first_measured, load_seconds};
use crate::units::Bytes;

/// What no policy can do better than.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bound {
    /// The tier.
    pub capacity_bytes: Bytes,
    /// The least cost miss ratio.
    pub cmr: f64,
}

/// No bound was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "no bound for {capacity}: the solver stopped with {status}; try another capacity, or leave --bound out"
)]
pub struct BoundError {
    /// The tier.
    pub capacity: Bytes,
    /// What the solver said.
    pub status: String,
}

/// A time between two uses of a component over at least one other request.
struct Span {
    /// The requests over which it would be kept, first and last.
    over: (usize, usize),
    gb: f64,
    cost_s: f64,
}

/// The least that any policy pays on one tier of `machine.ram`, as a cost miss ratio over the measured requests.
///
/// # Errors
/// [`BoundError`] where the solver does not come to an end.
pub fn bound(trace: &Trace, machine: &Machine) -> Result<Bound, BoundError> {
    let load_s = load_seconds(trace, machine);
    let first = first_measured(trace, machine.measured);
    let capacity_gb = machine.ram.as_f64() / 1e9;
    let gb = |place: usize| trace.components()[place].bytes.as_f64() / 1e9;

    let mut last_use: HashMap<usize, usize> = HashMap::new();
    let (mut uncached_s, mut first_uses_s) = (0.0, 0.0);
    let mut spans = Vec::new();
    for (number, request) in trace.requests().iter().enumerate() {
        for place in &request.components {
            let before = last_use.insert(*place, number);
            if number < first {
                continue;
            }
            uncached_s += load_s[*place];
            match before {
                None => first_uses_s += load_s[*place],
                // Kept at no cost from one request to the next: it fits while both are served.
                Some(before) if before + 1 == number => {}
                Some(before) => spans.push(Span {
                    over: (before + 1, number - 1),
                    gb: gb(*place),
                    cost_s: load_s[*place],
                }),
            }
        }
    }
    let missed_s = if spans.is_empty() {
        0.0
    } else {
        let room: Vec<f64> = trace
            .requests()
            .iter()
            .map(|request| {
                let asked: f64 = request.components.iter().map(|place| gb(*place)).sum();
                // A set that does not fit is passed through: then the row says nothing but the capacity.
                capacity_gb - if asked <= capacity_gb { asked } else { 0.0 }
            })
            .collect();
        least_missed(&spans, &room).map_err(|status| BoundError {
            capacity: machine.ram,
            status,
        })?
    };
    let cmr = if uncached_s > 0.0 {
        (first_uses_s + missed_s) / uncached_s
    } else {
        0.0
    };
    Ok(Bound {
        capacity_bytes: machine.ram,
        cmr,
    })
}

/// The least cost of spans that are not kept.
fn least_missed(spans: &[Span], room: &[f64]) -> Result<f64, String> {
    // Rows only where a span begins: between two of these the kept bytes only fall, but the room changes, so the least room of the
    // stretch stands for all of it. That would bind what has ended before; so a stretch ends where a span ends, too.
    let mut cuts: Vec<usize> = spans
        .iter()
        .flat_map(|span| [span.over.0, span.over.1 + 1])
        .collect();
    cuts.sort_unstable();
    cuts.dedup();
    let row_of = |request: usize| {
        cuts.partition_point(|cut| *cut <= request)
            .saturating_sub(1)
    };
    let rows = cuts.len().saturating_sub(1);
    let least_room = |row: usize| {
        room[cuts[row]..cuts[row + 1]]
            .iter()
            .copied()
            .fold(f64::INFINITY, f64::min)
    };
    let rooms: Vec<f64> = (0..rows).map(least_room).collect();

    // Columns: the share of each span, then the room left in each row. Rows: the flow, then x <= 1, x >= 0, left >= 0.
    let (n, m) = (spans.len() + rows, rows + 2 * spans.len() + rows);
    let mut entries: Vec<(usize, usize, f64)> = Vec::with_capacity(6 * spans.len() + 3 * rows);
    let mut b = vec![0.0; m];
    let mut q = vec![0.0; n];
    for (column, span) in spans.iter().enumerate() {
        let (begins, ends) = (row_of(span.over.0), row_of(span.over.1 + 1));
        entries.push((begins, column, span.gb));
        if ends < rows {
            entries.push((ends, column, -span.gb));
        }
        entries.push((rows + column, column, 1.0));
        b[rows + column] = 1.0;
        entries.push((rows + spans.len() + column, column, -1.0));
        q[column] = -span.cost_s;
    }
    for row in 0..rows {
        let column = spans.len() + row;
        entries.push((row, column, 1.0));
        if row + 1 < rows {
            entries.push((row + 1, column, -1.0));
        }
        b[row] = rooms[row] - if row > 0 { rooms[row - 1] } else { 0.0 };
        entries.push((rows + 2 * spans.len() + row, column, -1.0));
    }
    entries.sort_by_key(|(row, column, _)| (*column, *row));
    let a = CscMatrix::new_from_triplets(
        m,
        n,
        entries.iter().map(|e| e.0).collect(),
        entries.iter().map(|e| e.1).collect(),
        entries.iter().map(|e| e.2).collect(),
    );
    let cones = [ZeroConeT(rows), NonnegativeConeT(2 * spans.len() + rows)];
    let settings = DefaultSettings {
        verbose: false,
        ..DefaultSettings::default()
    };
    let p = CscMatrix::zeros((n, n));
    let mut solver =
        DefaultSolver::new(&p, &q, &a, &b, &cones, settings).map_err(|error| error.to_string())?;
    solver.solve();
    match solver.solution.status {
        SolverStatus::Solved | SolverStatus::AlmostSolved => {
            let all: f64 = spans.iter().map(|span| span.cost_s).sum();
            Ok((all + solver.solution.obj_val_dual).max(0.0))
        }
        status => Err(format!("{status:?}")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::replay::{LoadCost, Measured, PolicyName, replay};

    fn machine(ram: u64) -> Machine {
        Machine {
            ram: Bytes(ram),
            vram: None,
            load: LoadCost::default(),
            upload: LoadCost::default(),
            measured: Measured::AfterShare(0.0),
        }
    }

    fn trace(stream: &[u8], sizes: &[u64]) -> Trace {
        let components: String = (0..)
            .zip(sizes)
            .map(|(n, gb): (u32, _)| {
                format!("C{n},checkpoint,{},{}\n", gb * 1_000_000_000, n % 3 + 1)
            })
            .collect();
        let requests: String = (0..)
            .zip(stream)
            .map(|(at, n): (u32, _)| format!("{at},s,C{}\n", usize::from(*n) % sizes.len()))
            .collect();
        Trace::parse(
            &format!("t_s,session,components\n{requests}"),
            &format!("id,kind,bytes,load_s\n{components}"),
        )
        .unwrap()
    }

    #[test]
    fn worked_by_hand() {
        // A and B of 1 GB and 2 GB, C of 1 GB; load times 1, 2, 3 s.
        let trace = trace(&[0, 1, 2, 0, 1, 2], &[1, 2, 1]);
        let gb = |n: u64| machine(n * 1_000_000_000);
        // All fits: first uses alone. 6 of 12 s.
        assert!((bound(&trace, &gb(4)).unwrap().cmr - 0.5).abs() < 1e-6);
        // 3 GB: over B and C two of A's bytes are too many: while C (1 GB) is served A (1) and B (2) have 2 GB of room, while A is,
        // B and C have 2, while B (2) is, C has 1. Half of B is missed: 1 s.
        let half = bound(&trace, &gb(3)).unwrap().cmr;
        assert!((half - 7.0 / 12.0).abs() < 1e-6, "{half}");
        // 2 GB: while B is served there is room for nothing else, so A and C go; half of B stays over C and A.
        let most = bound(&trace, &gb(2)).unwrap().cmr;
        assert!((most - 11.0 / 12.0).abs() < 1e-6, "{most}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn it_is_below_every_policy(
            stream in proptest::collection::vec(0_u8..12, 1..150),
            sizes in proptest::collection::vec(1_u64..6, 12),
            capacity in 1_u64..30,
            start in 0.0_f64..0.9,
        ) {
            let trace = trace(&stream, &sizes);
            let machine = Machine {
                measured: Measured::AfterShare(start),
                ..machine(capacity * 1_000_000_000)
            };
            let least = bound(&trace, &machine).unwrap().cmr;
            for policy in PolicyName::all().filter(|p| *p != PolicyName::HotsetPrefetch) {
                let outcome = replay(&trace, &machine, || policy.make(&trace), &|| std::time::Duration::ZERO);
                prop_assert!(outcome.cmr >= least - 1e-6, "{} {} {}", policy, outcome.cmr, least);
            }
        }
    }
}
