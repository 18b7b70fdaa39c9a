//! `/metrics`: the state and the counts of the system in Prometheus's text format.
//!
//! Gauges and counts are taken from the status at each scrape; what happens between two scrapes is followed through the decisions.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU64};
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use hotset_core::decision::{Act, Decision, EvictCause};
use hotset_core::predict::GuessResults;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::Face;
use crate::{Bytes, Health, Hotset, PhaseTimes, Pressure, Status, TierStatus};

type Labels = Vec<(&'static str, String)>;
type Gauges = Family<Labels, Gauge<i64, AtomicI64>>;
type Counters = Family<Labels, Counter<u64, AtomicU64>>;
type Histograms = Family<Labels, Histogram, fn() -> Histogram>;

/// First bucket of the waits: a load that need not wait is granted within microseconds.
const FIRST_WAIT_S: f64 = 0.0001;
/// Buckets, each four times the last: up to half an hour.
const WAITS: u16 = 12;

fn waits() -> Histogram {
    Histogram::new(exponential_buckets(FIRST_WAIT_S, 4.0, WAITS))
}

/// Evictions and their bytes, by tier and cause.
type Evicted = BTreeMap<(String, &'static str), (u64, u64)>;

/// What is followed between scrapes.
#[derive(Debug, Clone)]
pub(super) struct Metrics {
    waited: Histograms,
    evicted: Arc<Mutex<Evicted>>,
    missed: Counter,
    /// Guesses that were evicted without use.
    wasted: Counter,
}

impl Metrics {
    /// Follows the decisions of a system until `stop`.
    pub(super) fn follow(hotset: &Hotset, stop: CancellationToken) -> Self {
        let metrics = Self {
            waited: Family::new_with_constructor(waits),
            evicted: Arc::default(),
            missed: Counter::default(),
            wasted: Counter::default(),
        };
        let (mut decisions, following) = (hotset.subscribe_decisions(), metrics.clone());
        tokio::spawn(async move {
            loop {
                let heard = tokio::select! {
                    () = stop.cancelled() => return,
                    heard = decisions.recv() => heard,
                };
                match heard {
                    Ok(decision) => following.take(&decision),
                    Err(tokio::sync::broadcast::error::RecvError::Lagged(missed)) => {
                        following.missed.inc_by(missed);
                    }
                    Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
                }
            }
        });
        metrics
    }

    fn take(&self, decision: &Decision) {
        match &decision.act {
            Act::Admit { tier, waited, .. } => {
                let labels = vec![("tier", tier.to_string())];
                self.waited
                    .get_or_create(&labels)
                    .observe(waited.as_secs_f64());
            }
            Act::Evict {
                tier,
                bytes,
                cause,
                wasted,
                ..
            } => {
                if *wasted {
                    self.wasted.inc();
                }
                let cause = match cause {
                    EvictCause::Demand { .. } => "demand",
                    EvictCause::Watermark { .. } => "watermark",
                    EvictCause::Pressure => "pressure",
                    EvictCause::Requested => "requested",
                    EvictCause::Guess { .. } => "guess",
                    EvictCause::Foreign { .. } => "foreign",
                    EvictCause::OutOfMemory { .. } => "out-of-memory",
                    EvictCause::KeptLongEnough { .. } => "kept-long-enough",
                    _ => "other",
                };
                let mut evicted = self.evicted.lock().unwrap_or_else(PoisonError::into_inner);
                let (count, sum) = evicted.entry((tier.to_string(), cause)).or_default();
                *count += 1;
                *sum += bytes.get();
            }
            _ => {}
        }
    }
}

/// `GET /metrics`
pub(super) async fn scrape(State(face): State<Arc<Face>>) -> Response {
    let status = face.hotset.status().await;
    let mut text = String::new();
    match encode(&mut text, &registry(&face, &status)) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => super::refusal(StatusCode::INTERNAL_SERVER_ERROR, error),
    }
}

/// How long loads spent in each phase, as the system counts it.
#[derive(Debug)]
struct LoadSeconds(Vec<PhaseTimes>);

impl EncodeMetric for LoadSeconds {
    fn encode(&self, mut encoder: MetricEncoder) -> Result<(), std::fmt::Error> {
        for times in &self.0 {
            let labels = [("phase", word(&times.phase))];
            let mut buckets = times.buckets.clone();
            let within: u64 = buckets.iter().map(|(_, count)| count).sum();
            buckets.push((f64::INFINITY, times.count.saturating_sub(within)));
            encoder
                .encode_family(&labels)?
                .encode_histogram::<NoLabelSet>(times.sum_s, times.count, &buckets, None)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

/// A unit variant as documents write it.
fn word(value: &impl serde::Serialize) -> String {
    let value = serde_json::to_value(value).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

/// The figures of what serialises as a flat map of numbers and flags, each under its own name, so that no list here could miss
/// one.
fn figures(registry: &mut Registry, prefix: &str, of: &impl serde::Serialize) {
    let Ok(Value::Object(figures)) = serde_json::to_value(of) else {
        return;
    };
    for (name, value) in figures {
        let number = match &value {
            Value::Bool(on) => Some(f64::from(u8::from(*on))),
            value => value.as_f64(),
        };
        if let Some(number) = number {
            let gauge: Gauge<f64, AtomicU64> = Gauge::default();
            gauge.set(number);
            let help = format!("{prefix}: {}", name.replace('_', " "));
            registry.register(format!("{prefix}_{name}"), help, gauge);
        }
    }
}

/// What came of loading what nobody had asked for, each figure under its own name, by tier and grounds.
fn guesses(registry: &mut Registry, results: &[GuessResults]) {
    let mut families: BTreeMap<String, Family<Labels, Gauge<f64, AtomicU64>>> = BTreeMap::new();
    for of in results {
        let Ok(Value::Object(figures)) = serde_json::to_value(of) else {
            continue;
        };
        for (name, value) in figures {
            let number = match &value {
                Value::Bool(on) => Some(f64::from(u8::from(*on))),
                value => value.as_f64(),
            };
            if let Some(number) = number {
                let labels = vec![
                    ("tier", of.tier.to_string()),
                    ("grounds", of.grounds.to_string()),
                ];
                let family = families.entry(name).or_default();
                family.get_or_create(&labels).set(number);
            }
        }
    }
    for (name, family) in families {
        let help = format!("Loaded before anybody asked: {}", name.replace('_', " "));
        registry.register(format!("guesses_{name}"), help, family);
    }
}

/// What the GPUs say of themselves.
fn gpus(registry: &mut Registry, status: &Status) {
    let (memory, others) = (Gauges::default(), Gauges::default());
    for tier in &status.tiers {
        let Some(figures) = &tier.figures else {
            continue;
        };
        let of = |key: &'static str, name: &str| {
            vec![("tier", tier.tier.to_string()), (key, name.to_owned())]
        };
        for (state, bytes) in [
            ("total", figures.total),
            ("free", figures.free),
            ("allocated", figures.allocated),
            ("overhead", figures.overhead),
            ("foreign", figures.foreign),
        ] {
            memory
                .get_or_create(&of("state", state))
                .set(number(bytes.get()));
        }
        let pcie = figures.pcie;
        for (figure, value) in [
            ("temperature_c", figures.temperature_c.map(u64::from)),
            ("throttling", Some(figures.throttling.len() as u64)),
            (
                "pcie_generation",
                pcie.map(|(generation, _)| generation.into()),
            ),
            ("pcie_lanes", pcie.map(|(_, lanes)| lanes.into())),
            ("ecc_uncorrected", figures.ecc_uncorrected),
            ("xids", Some(figures.xids.len() as u64)),
            ("processes", Some(figures.processes.len() as u64)),
        ] {
            if let Some(value) = value {
                others
                    .get_or_create(&of("figure", figure))
                    .set(number(value));
            }
        }
    }
    let help = "Memory of each GPU, as its driver tells it";
    registry.register("gpu_memory_bytes", help, memory);
    let help = "Other figures of each GPU: degrees, reasons to throttle, link, errors";
    registry.register("gpu", help, others);
}

fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn of_residency(tier: &TierStatus, state: &str) -> Bytes {
    let components = tier.components.iter();
    let there = components.filter(|component| component.residency == state);
    there.map(|component| component.bytes).sum()
}

fn registry(face: &Face, status: &Status) -> Registry {
    let mut all = Registry::with_prefix("hotset");
    let gauge = |registry: &mut Registry, name: &str, help: &str, value: u64| {
        let gauge: Gauge = Gauge::default();
        gauge.set(number(value));
        registry.register(name, help, gauge);
    };

    let bytes = Gauges::default();
    let (leases, waiting, components) = (Gauges::default(), Gauges::default(), Gauges::default());
    for tier in &status.tiers {
        let name = tier.tier.to_string();
        let of = |state: &str| vec![("tier", name.clone()), ("state", state.to_owned())];
        for (state, value) in [
            ("budget", tier.budget),
            ("committed", tier.committed),
            ("leased", tier.leased),
            ("evicting", tier.evicting),
            ("free", tier.budget.saturating_sub(tier.committed)),
            ("resident", of_residency(tier, "resident")),
            ("loading", of_residency(tier, "loading")),
        ] {
            bytes.get_or_create(&of(state)).set(number(value.get()));
        }
        let label = vec![("tier", name.clone())];
        let held: u32 = tier.components.iter().map(|c| c.leases).sum();
        leases.get_or_create(&label).set(held.into());
        waiting
            .get_or_create(&label)
            .set(tier.waiting.map_or(-1, |sets| number(sets as u64)));
        for component in &tier.components {
            components.get_or_create(&of(component.residency)).inc();
        }
    }
    all.register("tier_bytes", "Bytes of each tier by state", bytes);
    all.register("leases", "Leases that are held", leases);
    all.register(
        "waiting_sets",
        "Sets that wait for memory; -1 where the tier's keeper does not answer",
        waiting,
    );
    all.register("components", "Components in each tier by state", components);
    all.register(
        "queue_seconds",
        "Time that sets waited for memory",
        face.metrics.waited.clone(),
    );
    all.register(
        "decisions_missed",
        "Decisions that came too fast to be counted here",
        face.metrics.missed.clone(),
    );

    all.register(
        "prefetches_wasted",
        "Components that were loaded on a guess and evicted without use",
        face.metrics.wasted.clone(),
    );

    let (evictions, evicted_bytes) = (Counters::default(), Counters::default());
    for ((tier, cause), (count, sum)) in &*face
        .metrics
        .evicted
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
    {
        let labels = vec![("tier", tier.clone()), ("cause", (*cause).to_owned())];
        evictions.get_or_create(&labels).inc_by(*count);
        evicted_bytes.get_or_create(&labels).inc_by(*sum);
    }
    all.register("evictions", "Components evicted, by cause", evictions);
    all.register("evicted_bytes", "Bytes evicted, by cause", evicted_bytes);

    // Every count of the system under its own name, without a list here that could miss one.
    if let Ok(Value::Object(counts)) = serde_json::to_value(status.counters) {
        for (name, value) in counts {
            let counter: Counter = Counter::default();
            counter.inc_by(value.as_u64().unwrap_or(0));
            let help = name.replace('_', " ");
            all.register(name, help, counter);
        }
    }
    let (restarts, mailboxes) = (Counters::default(), Gauges::default());
    for actor in &status.actors {
        let label = vec![("actor", actor.name.to_string())];
        restarts.get_or_create(&label).inc_by(actor.restarts);
        mailboxes.get_or_create(&label).set(number(actor.mailbox));
    }
    all.register("restarts", "Restarts of each actor", restarts);
    let help = "Messages that may be waiting for each actor";
    all.register("mailbox_depth", help, mailboxes);
    let help = "Time that loads and components spent in each phase";
    all.register("load_seconds", help, LoadSeconds(status.phases.clone()));
    let arena = Gauges::default();
    for (state, bytes) in [
        ("live", status.arena.live),
        ("warm", status.arena.warm),
        ("lingering", status.arena.lingering),
    ] {
        arena
            .get_or_create(&vec![("state", state.to_owned())])
            .set(number(bytes.get()));
    }
    let help =
        "Host memory of slabs: in use, kept for later ones, and gone but still mapped by others";
    all.register("arena_bytes", help, arena);
    if let Some(predictor) = &status.predictor {
        let enabled = u64::from(predictor.enabled);
        gauge(
            &mut all,
            "predictor_enabled",
            "1 where guesses are made",
            enabled,
        );
        figures(&mut all, "predictor", &predictor.stats);
    }
    guesses(&mut all, &face.hotset.guesses());
    let unused = Gauges::default();
    for tier in &status.tiers {
        let guesses = tier.components.iter().filter(|c| c.prefetched).count();
        unused
            .get_or_create(&vec![("tier", tier.tier.to_string())])
            .set(number(guesses as u64));
    }
    let help = "Components that were loaded on a guess and not asked for since";
    all.register("prefetched_unused", help, unused);
    gpus(&mut all, status);
    let health = match status.health {
        Health::Green => 2,
        Health::Yellow { .. } => 1,
        Health::Red { .. } => 0,
    };
    gauge(&mut all, "health", "2 green, 1 yellow, 0 red", health);
    let monitor = status.monitor.clone().unwrap_or_default();
    let high = u64::from(monitor.pressure == Pressure::High);
    gauge(
        &mut all,
        "pressure",
        "1 while others need host memory",
        high,
    );
    if let Some(host) = monitor.host {
        let available = host.available.get();
        gauge(
            &mut all,
            "host_available_bytes",
            "Host memory that can be had",
            available,
        );
        figures(
            &mut all,
            "host",
            &json!({ "total_bytes": host.total, "stalled_percent": host.full_avg10 }),
        );
        if let Some(cgroup) = host.cgroup {
            let bytes = json!({ "limit_bytes": cgroup.limit, "room_bytes": cgroup.room });
            figures(&mut all, "cgroup", &bytes);
            figures(&mut all, "cgroup_events", &cgroup.events);
        }
    }
    let sessions = status.sessions.len() as u64;
    gauge(&mut all, "sessions", "Open sessions", sessions);
    gauge(&mut all, "loads", "Loads under way", status.loads as u64);
    let models = status.catalogue.models as u64;
    gauge(&mut all, "models", "Entries of the catalogue", models);
    let broken = status.catalogue.with_error as u64;
    gauge(
        &mut all,
        "models_broken",
        "Entries that cannot be loaded",
        broken,
    );
    gauge(
        &mut all,
        "uptime_seconds",
        "Time since the start",
        status.uptime_s as u64,
    );
    all
}
