//! Discovery: scans the model folders, watches them, publishes the catalogue.
//!
//! Readers take the published snapshot without a message; when Discovery dies, the last one stays. Scans run on a
//! blocking thread, one at a time; changes that come in meanwhile are looked at afterwards. Changed paths rest in a
//! [`Settler`] until their writers are done.

use std::collections::{BTreeSet, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hotset_core::ModelName;
use hotset_core::catalog::scan::{ScanOptions, ScanReport, rescan, scan};
use hotset_core::catalog::settle::{Ready, Settler};
use hotset_core::catalog::{Change, ScanProblem, keep_leased};
use ractor::{ActorProcessingErr, ActorRef, RpcReplyPort};
use tokio::time::Instant;

use self::identify::{Identified, Known};
use self::keep::Keep;
use self::watch::{Changes, Watch};
use crate::house::House;
use crate::system::ScanSummary;

mod identify;
mod keep;
mod watch;

/// What Discovery is asked.
#[derive(Debug)]
pub(crate) enum DiscoveryMessage {
    /// Scan all folders; the reply comes when a scan that began after this message is published.
    Scan(Option<RpcReplyPort<ScanSummary>>),
    /// Tell when a catalogue is published; at once where one is.
    Published(RpcReplyPort<ScanSummary>),
    /// A scan has ended.
    Scanned(Finished),
    /// Components were compared.
    Identified(Known, Identified),
    /// The watcher has seen changes.
    Changed,
    /// Somebody else has: these paths, or nobody knows which.
    Told(Option<Vec<PathBuf>>),
    /// Something may have come to rest.
    Look,
    /// What has come to rest.
    Looked(Settler, Ready),
    /// Folders without events are due.
    Poll,
    /// What the last scan found.
    Observe(RpcReplyPort<DiscoveryView>),
    /// Be busy for so long, as with a handler that is slow. For tests and chaos.
    Dawdle(Duration),
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
    pub(crate) polling: Vec<String>,
    pub(crate) last: Option<ScanSummary>,
}

/// What a scan is to look at.
#[derive(Debug)]
enum Scope {
    Everything,
    Paths(BTreeSet<PathBuf>),
}

impl Scope {
    fn add(&mut self, paths: impl IntoIterator<Item = PathBuf>) {
        if let Self::Paths(known) = self {
            known.extend(paths);
            if known.len() > PATHS_KEPT {
                *self = Self::Everything;
            }
        }
    }
}

/// A scan that waits for the one that runs.
#[derive(Debug)]
struct Next {
    scope: Scope,
    waiting: Vec<RpcReplyPort<ScanSummary>>,
}

pub(crate) struct Discovery;

pub(crate) struct State {
    house: Arc<House>,
    keep: Arc<Keep>,
    watch: Option<Watch>,
    /// What was told of by others than the watcher, until the settler takes it.
    told: Changes,
    /// Away while a task looks at what has come to rest.
    settler: Option<Settler>,
    /// When the next [`DiscoveryMessage::Look`] comes, where one is on its way.
    looking: Option<Instant>,
    running: Option<Vec<RpcReplyPort<ScanSummary>>>,
    next: Option<Next>,
    last: Option<ScanSummary>,
    /// Entries that are not whole, until the settler takes them.
    unfinished: Vec<PathBuf>,
    /// Away while a thread compares components.
    known: Option<Known>,
    /// The catalogue has changed since that began.
    compare_again: bool,
}

/// Changed paths that are looked at one by one; beyond this a whole scan is cheaper.
const PATHS_KEPT: usize = 10_000;
/// What is not whole while it is being written is left out of the catalogue for so long after its last change.
const PATIENCE: Duration = Duration::from_secs(60);
/// How soon what is not whole is looked at again where no event comes first.
const AGAIN: Duration = Duration::from_secs(2);
/// How long a scan that panicked is left alone before the next.
const AFTER_PANIC: Duration = Duration::from_secs(1);

#[ractor::actor(message = DiscoveryMessage, state = State, arguments = Arc<House>)]
impl Discovery {
    async fn pre_start(
        &self,
        myself: ActorRef<DiscoveryMessage>,
        house: Arc<House>,
    ) -> Result<State, ActorProcessingErr> {
        let config = &house.config.catalog;
        // Watch first, scan second: nothing falls between the two.
        let watch = config.watch.then(|| Watch::start(config, &myself));
        if watch
            .as_ref()
            .is_some_and(|watch| !watch.polled().is_empty())
        {
            drop(myself.send_interval(config.poll, || DiscoveryMessage::Poll));
        }
        myself.send_message(DiscoveryMessage::Scan(None))?;
        Ok(State {
            keep: Arc::new(Keep::new(config.database.clone())),
            settler: Some(Settler::new(config.settle)),
            watch,
            told: Changes::default(),
            looking: None,
            running: None,
            next: None,
            last: None,
            unfinished: Vec::new(),
            known: Some(Known::default()),
            compare_again: false,
            house,
        })
    }

    #[ractor::message(DiscoveryMessage::Scan(reply))]
    fn scan(
        &self,
        myself: ActorRef<DiscoveryMessage>,
        reply: Option<RpcReplyPort<ScanSummary>>,
        state: &mut State,
    ) {
        request(
            &myself,
            state,
            Scope::Everything,
            reply.into_iter().collect(),
        );
    }

    #[ractor::message(DiscoveryMessage::Published(reply))]
    fn published(
        &self,
        myself: ActorRef<DiscoveryMessage>,
        reply: RpcReplyPort<ScanSummary>,
        state: &mut State,
    ) {
        match (&state.last, &mut state.running) {
            (Some(last), _) => {
                let _ = reply.send(last.clone());
            }
            (None, Some(waiting)) => waiting.push(reply),
            (None, None) => request(&myself, state, Scope::Everything, vec![reply]),
        }
    }

    #[ractor::message(DiscoveryMessage::Scanned(finished))]
    fn scanned(&self, myself: ActorRef<DiscoveryMessage>, finished: Finished, state: &mut State) {
        let waiting = state.running.take().unwrap_or_default();
        let Some(report) = finished.report else {
            tracing::error!("a scan panicked; the last catalogue stays");
            // Their replies are dropped with them, and they ask again.
            drop(myself.send_after(AFTER_PANIC, || DiscoveryMessage::Scan(None)));
            return;
        };
        state
            .unfinished
            .extend(report.problems.iter().filter_map(|problem| match problem {
                ScanProblem::Incomplete { path, .. } | ScanProblem::Interrupted { path, .. } => {
                    Some(path.clone())
                }
                _ => None,
            }));
        take_changes(state);
        look_later(&myself, state);
        let (summary, changed) = publish(&state.house, report, finished.took);
        if changed {
            compare(&myself, state);
        }
        for reply in waiting {
            let _ = reply.send(summary.clone());
        }
        state.last = Some(summary);
        if let Some(next) = state.next.take() {
            begin(&myself, state, next);
        }
    }

    #[ractor::message(DiscoveryMessage::Identified(known, identified))]
    fn identified(
        &self,
        myself: ActorRef<DiscoveryMessage>,
        known: Known,
        identified: Identified,
        state: &mut State,
    ) {
        identify::publish(&state.house, &identified);
        state.known = Some(known);
        if std::mem::take(&mut state.compare_again) {
            compare(&myself, state);
        }
    }

    #[ractor::message(DiscoveryMessage::Changed)]
    fn changed(&self, myself: ActorRef<DiscoveryMessage>, state: &mut State) {
        // While the settler is away, the changes stay where they are.
        take_changes(state);
        look_later(&myself, state);
    }

    #[ractor::message(DiscoveryMessage::Told(paths))]
    fn told(
        &self,
        myself: ActorRef<DiscoveryMessage>,
        paths: Option<Vec<PathBuf>>,
        state: &mut State,
    ) {
        match (paths, &mut state.told) {
            (None, told) => *told = Changes::Lost,
            (Some(_), Changes::Lost) => {}
            (Some(paths), Changes::Paths(told)) => told.extend(paths),
        }
        take_changes(state);
        look_later(&myself, state);
    }

    #[ractor::message(DiscoveryMessage::Look)]
    fn look(&self, myself: ActorRef<DiscoveryMessage>, state: &mut State) {
        state.looking = None;
        let Some(mut settler) = state.settler.take() else {
            return;
        };
        let now = Instant::now().into_std();
        let house = state.house.clone();
        state.house.tasks.spawn(async move {
            let looked = house.aside(move || {
                let size = |path: &std::path::Path| path.metadata().ok().map(|found| found.len());
                let ready = settler.ready(now, size, std::path::Path::exists);
                (settler, ready)
            });
            if let Ok((settler, ready)) = looked.await {
                // Lost where Discovery has died since: its successor scans anyhow.
                let _ = myself.send_message(DiscoveryMessage::Looked(settler, ready));
            }
        });
    }

    #[ractor::message(DiscoveryMessage::Looked(settler, ready))]
    fn looked(
        &self,
        myself: ActorRef<DiscoveryMessage>,
        settler: Settler,
        ready: Ready,
        state: &mut State,
    ) {
        state.settler = Some(settler);
        take_changes(state);
        if ready.everything {
            request(&myself, state, Scope::Everything, Vec::new());
        } else if !ready.paths.is_empty() {
            let paths = ready.paths.into_iter().collect();
            request(&myself, state, Scope::Paths(paths), Vec::new());
        }
        look_later(&myself, state);
    }

    #[ractor::message(DiscoveryMessage::Poll)]
    fn poll(&self, myself: ActorRef<DiscoveryMessage>, state: &mut State) {
        let polled = state.watch.as_ref().map_or_else(Vec::new, |watch| {
            watch
                .polled()
                .iter()
                .map(|(root, _)| root.clone())
                .collect()
        });
        // One that waits already will do.
        if !polled.is_empty() && state.next.is_none() {
            let paths = Scope::Paths(polled.into_iter().collect());
            request(&myself, state, paths, Vec::new());
        }
    }

    #[ractor::message(DiscoveryMessage::Dawdle(time))]
    async fn dawdle(&self, time: Duration, _state: &mut State) {
        tokio::time::sleep(time).await;
    }

    #[ractor::message(DiscoveryMessage::Observe(reply))]
    fn observe(&self, reply: RpcReplyPort<DiscoveryView>, state: &mut State) {
        let polled = state.watch.iter().flat_map(Watch::polled);
        let _ = reply.send(DiscoveryView {
            scanning: state.running.is_some(),
            watching: state.watch.as_ref().is_some_and(Watch::sees_events),
            polling: polled
                .map(|(root, why)| format!("{} ({why})", root.display()))
                .collect(),
            last: state.last.clone(),
        });
    }
}

/// Compares components in the background, now or once the comparison that runs has ended.
fn compare(myself: &ActorRef<DiscoveryMessage>, state: &mut State) {
    if state.house.config.catalog.digest_rate.is_zero() {
        return;
    }
    match state.known.take() {
        Some(known) => Discovery::identify(&state.house, &state.keep, known, myself.clone()),
        None => state.compare_again = true,
    }
}

/// Moves what the watcher has gathered, and what is to be looked at again, into the settler, if that is here.
fn take_changes(state: &mut State) {
    let Some(settler) = &mut state.settler else {
        return;
    };
    let now = Instant::now().into_std();
    for path in state.unfinished.drain(..) {
        settler.postponed(path, now, AGAIN);
    }
    let watched = state.watch.as_ref().map(Watch::take);
    for changes in watched.into_iter().chain([std::mem::take(&mut state.told)]) {
        match changes {
            Changes::Lost => settler.lost(now),
            Changes::Paths(paths) => {
                for path in paths {
                    settler.changed(&path, now);
                }
            }
        }
    }
}

/// Looks at the settler when something in it may have come to rest.
fn look_later(myself: &ActorRef<DiscoveryMessage>, state: &mut State) {
    let Some(next) = state.settler.as_ref().and_then(Settler::next) else {
        return;
    };
    let next = Instant::from(next);
    // One that comes later than something may rest is no reason to let that wait.
    if state.looking.is_none_or(|looking| next < looking) {
        state.looking = Some(next);
        let wait = next.saturating_duration_since(Instant::now());
        drop(myself.send_after(wait, || DiscoveryMessage::Look));
    }
}

/// Begins a scan, or lets it wait for the one that runs.
fn request(
    myself: &ActorRef<DiscoveryMessage>,
    state: &mut State,
    scope: Scope,
    waiting: Vec<RpcReplyPort<ScanSummary>>,
) {
    let next = Next { scope, waiting };
    match (&state.running, &mut state.next) {
        (None, _) => begin(myself, state, next),
        (Some(_), slot @ None) => *slot = Some(next),
        (Some(_), Some(known)) => {
            known.waiting.extend(next.waiting);
            match next.scope {
                Scope::Everything => known.scope = Scope::Everything,
                Scope::Paths(paths) => known.scope.add(paths),
            }
        }
    }
}

fn begin(myself: &ActorRef<DiscoveryMessage>, state: &mut State, next: Next) {
    state.running = Some(next.waiting);
    let (house, keep) = (state.house.clone(), state.keep.clone());
    let myself = myself.clone();
    let began = Instant::now();
    house.clone().tasks.spawn(async move {
        let work = house.clone().aside(move || {
            let mut options = options(&house);
            let mut previous = house.catalogue.load();
            if house.config.catalog.watch {
                // Without a watch nobody would look again, so what is not whole is listed with its error at once.
                options.patience = Some(PATIENCE);
            }
            if previous.generation() == 0
                && let Some(kept) = keep.load()
            {
                previous = Arc::new(kept);
            }
            let silent = |_| {};
            let mut report = match next.scope {
                Scope::Paths(paths) => {
                    let paths: Vec<PathBuf> = paths.into_iter().collect();
                    rescan(&options, &previous, &paths, &silent)
                }
                Scope::Everything => scan(&options, Some(&previous), &silent),
            };
            let saved = keep.save(report.catalogue);
            report.catalogue = keep_leased(&previous, &saved, &leased(&house));
            report
        });
        let finished = Finished {
            report: work.await.ok(),
            took: began.elapsed(),
        };
        // Lost where Discovery has died since: its successor scans anyhow.
        let _ = myself.send_message(DiscoveryMessage::Scanned(finished));
    });
}

/// The scan's options; signatures of the user's that are wrong are told and left out.
fn options(house: &House) -> ScanOptions {
    let config = &house.config.catalog;
    ScanOptions::from_config(config).unwrap_or_else(|error| {
        tracing::error!(%error, "catalog.signatures is not used");
        ScanOptions::from(config)
    })
}

/// The models of which something is leased.
fn leased(house: &House) -> HashSet<ModelName> {
    let views = house.ledger.views();
    let residencies = views.iter().flat_map(|view| &view.residencies);
    residencies
        .filter(|residency| residency.leases > 0)
        .map(|residency| residency.component.id.model.clone())
        .collect()
}

/// Publishes what a scan found; gives the summary, and whether anything changed.
fn publish(house: &House, report: ScanReport, took: Duration) -> (ScanSummary, bool) {
    for problem in &report.problems {
        tracing::warn!("{problem}");
    }
    let summary = ScanSummary {
        models: report.catalogue.len(),
        files: report.files,
        inspected: report.inspected,
        problems: report.problems.iter().map(ToString::to_string).collect(),
        took,
    };
    let changes: Arc<[Change]> = report
        .catalogue
        .changes_since(&house.catalogue.load())
        .into();
    house.catalogue.publish(report.catalogue);
    tracing::info!(
        models = summary.models,
        files = summary.files,
        changes = changes.len(),
        ?took,
        "catalogue published"
    );
    let changed = !changes.is_empty();
    if changed {
        // Nobody listens: nobody misses it.
        let _ = house.catalogue_changes.send(changes);
    }
    (summary, changed)
}
