//! Watching folders: gathers changed paths without bound on events and with one on memory.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use hotset_core::catalog::settle::lacks_events;
use hotset_core::config::CatalogConfig;
use notify::{Event, RecommendedWatcher, RecursiveMode, Watcher, recommended_watcher};
use ractor::ActorRef;

use super::{DiscoveryMessage, PATHS_KEPT};

/// What has changed since it was last asked.
#[derive(Debug)]
pub(super) enum Changes {
    /// These paths, as far as they are known one by one.
    Paths(HashSet<PathBuf>),
    /// Too much, or nobody knows what.
    Lost,
}

impl Default for Changes {
    fn default() -> Self {
        Self::Paths(HashSet::new())
    }
}

/// The watcher of all roots; stops when dropped.
pub(super) struct Watch {
    _watcher: Option<RecommendedWatcher>,
    changes: Arc<Mutex<Changes>>,
    watched: usize,
    polled: Vec<(PathBuf, String)>,
}

impl Watch {
    /// Watches the roots. One that cannot be watched, or whose file system reports nothing, is polled instead.
    pub(super) fn start(config: &CatalogConfig, discovery: &ActorRef<DiscoveryMessage>) -> Self {
        let changes = Arc::new(Mutex::new(Changes::default()));
        let (gathered, discovery) = (changes.clone(), discovery.clone());
        let gather = move |event: notify::Result<Event>| {
            // One message for however many events come before it is taken.
            if add(&gathered, event) {
                let _ = discovery.send_message(DiscoveryMessage::Changed);
            }
        };
        let mut watch = Self {
            _watcher: None,
            changes,
            watched: 0,
            polled: Vec::new(),
        };
        let mut watcher = match recommended_watcher(gather) {
            Ok(watcher) => watcher,
            Err(error) => {
                let why = format!("cannot watch: {error}");
                watch.polled = config
                    .roots
                    .iter()
                    .map(|root| (root.clone(), why.clone()))
                    .collect();
                watch.tell();
                return watch;
            }
        };
        for root in &config.roots {
            match watch_root(&mut watcher, root) {
                Ok(()) => watch.watched += 1,
                Err(why) => watch.polled.push((root.clone(), why)),
            }
        }
        watch._watcher = Some(watcher);
        watch.tell();
        watch
    }

    fn tell(&self) {
        for (root, why) in &self.polled {
            tracing::warn!(root = %root.display(), %why, "changes in this folder are seen by scans at intervals only");
        }
    }

    /// Whether any root reports changes as they happen.
    pub(super) const fn sees_events(&self) -> bool {
        self.watched > 0
    }

    /// The roots that have to be polled, and why.
    pub(super) fn polled(&self) -> &[(PathBuf, String)] {
        &self.polled
    }

    /// What has changed since the last time.
    pub(super) fn take(&self) -> Changes {
        let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *changes)
    }
}

fn watch_root(watcher: &mut RecommendedWatcher, root: &Path) -> Result<(), String> {
    if let Some(file_system) = lacks_events(root) {
        return Err(format!("{file_system} reports no changes made elsewhere"));
    }
    // Events carry paths as they were watched, and the catalogue has them absolute.
    let root = std::fs::canonicalize(root).map_err(|error| error.to_string())?;
    watcher
        .watch(&root, RecursiveMode::Recursive)
        .map_err(|error| error.to_string())
}

/// Adds an event; gives whether these are the first changes since they were last taken.
fn add(changes: &Mutex<Changes>, event: notify::Result<Event>) -> bool {
    let mut changes = changes.lock().unwrap_or_else(PoisonError::into_inner);
    let Changes::Paths(paths) = &mut *changes else {
        return false;
    };
    let first = paths.is_empty();
    match event {
        Ok(event) if event.need_rescan() => *changes = Changes::Lost,
        // Reading a model is no change.
        Ok(event) if event.kind.is_access() => return false,
        Ok(event) => {
            paths.extend(event.paths);
            if paths.len() > PATHS_KEPT {
                *changes = Changes::Lost;
            } else if paths.is_empty() {
                return false;
            }
        }
        Err(error) => {
            tracing::warn!(%error, "file events were lost");
            *changes = Changes::Lost;
        }
    }
    first
}
