//! The replay laboratory: recorded requests against simulated tiers, with the policies of the service.
//!
//! A [`Trace`] says who asked for which components when; [`replay`] runs it through one tier, or through RAM and VRAM, under
//! one [`EvictionPolicy`], and returns an [`Outcome`]. The main figure is the cost miss ratio: the seconds of loading
//! that were paid, over the seconds that would have been paid with no cache at all.
//!
//! Replays are deterministic: no clock is read but the one that a caller hands in to time decisions.

#[cfg(feature = "bound")]
mod bound;
mod compare;
mod cost;
mod link;
mod native;
mod outcome;
mod setup;
#[cfg(test)]
mod tests;
mod tier;
mod trace;
mod variants;

use std::time::Duration;

use crate::policy::EvictionPolicy;
use crate::predict::{Observed, Seen};
use crate::units::Bytes;
#[cfg(feature = "bound")]
pub use bound::{Bound, BoundError, bound};
pub use compare::{Comparison, Mean, Run, compare};
pub use cost::{LoadCost, ParseLoadCostError};
use link::Link;
use outcome::Tally;
pub use outcome::{Outcome, Seconds};
pub use setup::{PolicyName, UnknownPolicyError};
use tier::{SimulatedTier, Wanted};
pub use trace::{Trace, TraceComponent, TraceError, TraceRequest};
pub use variants::{Stress, UnknownStressError};

/// Which requests count. The others only warm the tiers and the predictor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Measured {
    /// Those after this share (0 to 1) of the requests.
    AfterShare(f64),
    /// Those from this time on.
    From(Duration),
}

/// What a trace is replayed on.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    /// The RAM tier.
    pub ram: Bytes,
    /// The VRAM tier over it; `None`: one tier, in which components are used.
    pub vram: Option<Bytes>,
    /// Loading from disk to RAM, where a component has no `load_s` of its own.
    pub load: LoadCost,
    /// Uploading from RAM to VRAM.
    pub upload: LoadCost,
    /// Which requests count.
    pub measured: Measured,
}

/// Runs the trace. `clock`, any monotonic clock, times the decisions; it does not influence them.
///
/// With two tiers, each has a policy of its own, made by the same constructor.
pub fn replay(
    trace: &Trace,
    machine: &Machine,
    mut policy: impl FnMut() -> Box<dyn EvictionPolicy>,
    clock: &dyn Fn() -> Duration,
) -> Outcome {
    let mut ram = SimulatedTier::new(machine.ram, policy());
    let mut vram = machine
        .vram
        .map(|capacity| SimulatedTier::new(capacity, policy()));
    let mut tally = Tally::new(ram.policy_name());
    let first = first_measured(trace, machine.measured);
    let load_s = load_seconds(trace, machine);
    let mut link = Link::new(trace, &load_s);
    let mut score_before = None;
    let mut seen = Vec::new();
    for (number, request) in trace.requests().iter().enumerate() {
        seen.clear();
        seen.extend(request.components.iter().map(|place| {
            let component = &trace.components()[*place];
            Seen {
                content: component.content,
                kind: component.kind,
                bytes: component.bytes,
            }
        }));
        let observed = Observed {
            session: request.session,
            components: &seen,
        };
        let wanted = |restore_s: &dyn Fn(usize, &Seen) -> f64| -> Vec<Wanted> {
            let all = request.components.iter().zip(&seen);
            all.map(|(place, seen)| Wanted {
                content: seen.content,
                bytes: seen.bytes,
                restore_s: restore_s(*place, seen),
            })
            .collect()
        };
        let before = clock();
        if number == first {
            score_before = ram.prefetch_score();
        }
        // What the link did since the request before, and what is left of it for this one.
        let held = link.until(request.at, &mut ram, &request.components);
        let mut paid = vec![0.0; seen.len()];
        match &mut vram {
            None => {
                let missed = ram.request(request.at, &observed, &wanted(&|place, _| load_s[place]));
                for at in missed {
                    paid[at] = load_s[request.components[at]];
                }
            }
            Some(vram) => {
                let upload = |seen: &Seen| machine.upload.seconds(seen.bytes);
                // What eviction from VRAM costs depends on whether RAM has it as well.
                vram.price(|content, bytes, whole| {
                    let upload = machine.upload.seconds(bytes);
                    if ram.has(content) { upload } else { whole }
                });
                let above = wanted(&|place, seen| load_s[place] + upload(seen));
                let missed = vram.request(request.at, &observed, &above);
                // RAM sees what VRAM lacks, as it does in service: nobody would miss there what a GPU has.
                ram.mark_above(|content| vram.has(content));
                let below = wanted(&|place, _| load_s[place]);
                let lacking: Vec<Seen> = missed.iter().map(|at| seen[*at]).collect();
                let asked = Observed {
                    session: request.session,
                    components: &lacking,
                };
                let absent = match missed.is_empty() {
                    true => Vec::new(),
                    false => ram.request_some(request.at, &asked, &below, &missed),
                };
                for at in missed {
                    paid[at] = upload(&seen[at]);
                }
                for at in absent {
                    paid[at] += load_s[request.components[at]];
                }
            }
        }
        link.settle(held, &seen, &mut paid, &mut ram, request.at);
        let took = clock().saturating_sub(before);
        if number >= first {
            let uncached = request.components.iter().zip(&seen).map(|(place, seen)| {
                let upload = vram
                    .as_ref()
                    .map_or(0.0, |_| machine.upload.seconds(seen.bytes));
                (seen.bytes, load_s[*place] + upload)
            });
            tally.count(uncached.zip(paid), took);
        }
    }
    let score = ram.prefetch_score();
    tally.outcome(
        machine.ram,
        machine.vram,
        score.map(|s| s.since(score_before)),
    )
}

/// The number of the first request that counts.
fn first_measured(trace: &Trace, measured: Measured) -> usize {
    match measured {
        Measured::AfterShare(share) => {
            (trace.requests().len() as f64 * share.clamp(0.0, 1.0)) as usize
        }
        Measured::From(start) => trace.requests().partition_point(|r| r.at < start),
    }
}

/// What loading each component from disk takes, in seconds.
fn load_seconds(trace: &Trace, machine: &Machine) -> Vec<f64> {
    let seconds = |c: &TraceComponent| c.load_s.unwrap_or_else(|| machine.load.seconds(c.bytes));
    trace.components().iter().map(seconds).collect()
}
