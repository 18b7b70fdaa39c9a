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
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::Face;
use crate::{Health, Hotset, Pressure, Status};

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
}

impl Metrics {
    /// Follows the decisions of a system until `stop`.
    pub(super) fn follow(hotset: &Hotset, stop: CancellationToken) -> Self {
        let metrics = Self {
            waited: Family::new_with_constructor(waits),
            evicted: Arc::default(),
            missed: Counter::default(),
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
                tier, bytes, cause, ..
            } => {
                let cause = match cause {
                    EvictCause::Demand { .. } => "demand",
                    EvictCause::Watermark { .. } => "watermark",
                    EvictCause::Pressure => "pressure",
                    EvictCause::Requested => "requested",
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

fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
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
    let restarts = Counters::default();
    for actor in &status.actors {
        let label = vec![("actor", actor.name.to_string())];
        restarts.get_or_create(&label).inc_by(actor.restarts);
    }
    all.register("restarts", "Restarts of each actor", restarts);
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
