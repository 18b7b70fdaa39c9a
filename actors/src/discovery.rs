//! Discovery: scans the model folders, watches them, publishes the catalogue.
//!
//! Readers take the published snapshot without a message; when Discovery dies, the last one stays. Scans run on a
//! blocking thread, one at a time; changes that come in meanwhile are looked at afterwards.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hotset_core::catalog::scan::{ScanOptions, ScanReport, rescan, scan};
use notify_debouncer_full::notify::{RecommendedWatcher, RecursiveMode};
use notify_debouncer_full::{DebounceEventResult, Debouncer, RecommendedCache, new_debouncer};
use ractor::{ActorProcessingErr, ActorRef, RpcReplyPort};
use tokio::time::Instant;

use crate::house::House;
use crate::system::ScanSummary;

/// What Discovery is asked.
#[derive(Debug)]
pub(crate) enum DiscoveryMessage {
    /// Scan all folders; the reply comes when a scan that began after this message is published.
    Scan(Option<RpcReplyPort<ScanSummary>>),
    /// A scan has ended.
    Scanned(Finished),
    /// These paths changed.
    Changed(Vec<PathBuf>),
    /// The watcher lost events: look at everything.
    Overflow(String),
    /// What the last scan found.
    Observe(RpcReplyPort<DiscoveryView>),
}

/// The end of a scan. `report` is missing where it panicked.
#[derive(Debug)]
pub(crate) struct Finished {
    report: Option<ScanReport>,
    took: Duration,
}

/// Discovery's state, for status.
#[derive(Debug, Clone, Default)]
pub(crate) struct DiscoveryView {
    pub(crate) scanning: bool,
    pub(crate) watching: bool,
    pub(crate) last: Option<ScanSummary>,
}

pub(crate) struct Discovery;

type Watcher = Debouncer<RecommendedWatcher, RecommendedCache>;

pub(crate) struct State {
    house: Arc<House>,
    /// Stops watching when dropped.
    watcher: Option<Watcher>,
    running: Option<Vec<RpcReplyPort<ScanSummary>>>,
    /// Asked for while a scan was running: the next one is for them.
    next: Option<Vec<RpcReplyPort<ScanSummary>>>,
    /// Changed while a scan was running. Bounded by [`CHANGES_KEPT`].
    changed: BTreeSet<PathBuf>,
    last: Option<ScanSummary>,
}

/// Changed paths that are looked at one by one; beyond this a whole scan is cheaper.
const CHANGES_KEPT: usize = 10_000;
/// How long a scan that panicked is left alone before the next.
const AFTER_PANIC: Duration = Duration::from_secs(1);

#[ractor::actor(message = DiscoveryMessage, state = State, arguments = Arc<House>)]
impl Discovery {
    async fn pre_start(
        &self,
        myself: ActorRef<DiscoveryMessage>,
        house: Arc<House>,
    ) -> Result<State, ActorProcessingErr> {
        // Watch first, scan second: nothing falls between the two.
        let watcher = if house.config.catalog.watch {
            watch(&house, &myself)
        } else {
            None
        };
        myself.send_message(DiscoveryMessage::Scan(None))?;
        Ok(State {
            house,
            watcher,
            running: None,
            next: None,
            changed: BTreeSet::new(),
            last: None,
        })
    }

    #[ractor::message(DiscoveryMessage::Scan(reply))]
    fn scan(
        &self,
        myself: ActorRef<DiscoveryMessage>,
        reply: Option<RpcReplyPort<ScanSummary>>,
        state: &mut State,
    ) {
        if state.running.is_some() {
            state.next.get_or_insert_default().extend(reply);
        } else {
            begin(&myself, state, reply.into_iter().collect(), None);
        }
    }

    #[ractor::message(DiscoveryMessage::Scanned(finished))]
    fn scanned(&self, myself: ActorRef<DiscoveryMessage>, finished: Finished, state: &mut State) {
        let waiting = state.running.take().unwrap_or_default();
        match finished.report {
            Some(report) => {
                for problem in &report.problems {
                    tracing::warn!("{problem}");
                }
                let summary = ScanSummary {
                    models: report.catalogue.len(),
                    files: report.files,
                    problems: report.problems.iter().map(ToString::to_string).collect(),
                    took: finished.took,
                };
                tracing::info!(
                    models = summary.models,
                    files = summary.files,
                    problems = summary.problems.len(),
                    took = ?summary.took,
                    "catalogue published"
                );
                state.house.catalogue.publish(report.catalogue);
                for reply in waiting {
                    let _ = reply.send(summary.clone());
                }
                state.last = Some(summary);
            }
            None => {
                tracing::error!("a scan panicked; the last catalogue stays");
                // Their replies are dropped, and they ask again.
                drop(waiting);
                drop(myself.send_after(AFTER_PANIC, || DiscoveryMessage::Scan(None)));
                return;
            }
        }
        if let Some(next) = state.next.take() {
            state.changed.clear();
            begin(&myself, state, next, None);
        } else if !state.changed.is_empty() {
            let changed = std::mem::take(&mut state.changed).into_iter().collect();
            begin(&myself, state, Vec::new(), Some(changed));
        }
    }

    #[ractor::message(DiscoveryMessage::Changed(paths))]
    fn changed(&self, myself: ActorRef<DiscoveryMessage>, paths: Vec<PathBuf>, state: &mut State) {
        if state.running.is_none() {
            begin(&myself, state, Vec::new(), Some(paths));
        } else if state.changed.len() + paths.len() <= CHANGES_KEPT {
            state.changed.extend(paths);
        } else {
            state.changed.clear();
            state.next.get_or_insert_default();
        }
    }

    #[ractor::message(DiscoveryMessage::Overflow(reason))]
    fn overflow(&self, myself: ActorRef<DiscoveryMessage>, reason: String, state: &mut State) {
        tracing::warn!(%reason, "file events were lost; scanning again");
        self.scan(myself, None, state);
    }

    #[ractor::message(DiscoveryMessage::Observe(reply))]
    fn observe(&self, reply: RpcReplyPort<DiscoveryView>, state: &mut State) {
        let _ = reply.send(DiscoveryView {
            scanning: state.running.is_some(),
            watching: state.watcher.is_some(),
            last: state.last.clone(),
        });
    }
}

/// Begins a scan of everything, or of what these paths touch.
fn begin(
    myself: &ActorRef<DiscoveryMessage>,
    state: &mut State,
    waiting: Vec<RpcReplyPort<ScanSummary>>,
    changed: Option<Vec<PathBuf>>,
) {
    state.running = Some(waiting);
    let house = state.house.clone();
    let myself = myself.clone();
    let began = Instant::now();
    house.clone().tasks.spawn(async move {
        let work = tokio::task::spawn_blocking(move || {
            let options = ScanOptions::from(&house.config.catalog);
            let previous = house.catalogue.load();
            let silent = |_| {};
            match changed {
                Some(paths) => rescan(&options, &previous, &paths, &silent),
                None => scan(&options, Some(&previous), &silent),
            }
        });
        let finished = Finished {
            report: work.await.ok(),
            took: began.elapsed(),
        };
        // Lost where Discovery has died since: its successor scans anyhow.
        let _ = myself.send_message(DiscoveryMessage::Scanned(finished));
    });
}

/// Watches the roots. A root that cannot be watched is said so, and found by scans alone.
fn watch(house: &House, myself: &ActorRef<DiscoveryMessage>) -> Option<Watcher> {
    let config = &house.config.catalog;
    let sender = myself.clone();
    let forward = move |result: DebounceEventResult| {
        let message = match result {
            Ok(events) if events.iter().any(|event| event.need_rescan()) => {
                DiscoveryMessage::Overflow("the event queue overflowed".into())
            }
            Ok(events) => {
                let paths: BTreeSet<PathBuf> = events
                    .into_iter()
                    // Reading a model is no change.
                    .filter(|event| !event.kind.is_access())
                    .flat_map(|event| event.event.paths)
                    .collect();
                if paths.is_empty() {
                    return;
                }
                DiscoveryMessage::Changed(paths.into_iter().collect())
            }
            Err(errors) => DiscoveryMessage::Overflow(
                errors
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join("; "),
            ),
        };
        let _ = sender.send_message(message);
    };
    let mut watcher = match new_debouncer(config.settle, None, forward) {
        Ok(watcher) => watcher,
        Err(error) => {
            tracing::warn!(%error, "cannot watch folders; changes are seen by scans only");
            return None;
        }
    };
    let mut watched = false;
    for root in &config.roots {
        match watcher.watch(root, RecursiveMode::Recursive) {
            Ok(()) => watched = true,
            Err(error) => {
                tracing::warn!(root = %root.display(), %error, "cannot watch this folder; its changes are seen by scans only");
            }
        }
    }
    watched.then_some(watcher)
}
