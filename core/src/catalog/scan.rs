//! Scanning: from folders to a catalogue. Blocks; runs on threads of its own.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use rayon::prelude::*;

use super::contents::Known;
use super::inspect::inspect;
use super::layout::{self, Shape, Unit};
use super::model::{Model, Presence, SourceFile};
use super::naming::{self, Named};
use super::signatures::{SignatureError, Signatures};
use super::snapshot::Catalogue;
pub use super::walk::identity_of;
use super::walk::{ScanProblem, Start, walk};
use crate::config::CatalogConfig;
use crate::ids::ModelName;

/// Where and how to scan.
#[derive(Clone, Debug)]
pub struct ScanOptions {
    /// The folders that hold models.
    pub roots: Vec<PathBuf>,
    /// How deep folders are followed below a root.
    pub max_depth: usize,
    /// Threads that read; 0 means one for each core.
    pub threads: usize,
    /// What is known of model files.
    pub signatures: Arc<Signatures>,
    /// An entry of which something is missing is left out as [`ScanProblem::Incomplete`] while its files have changed in
    /// this time; `None` lists it with its error.
    pub patience: Option<Duration>,
}

impl ScanOptions {
    /// The options of a configuration, with the signatures that it adds.
    ///
    /// # Errors
    /// The first signature file that cannot be read or is wrong.
    pub fn from_config(config: &CatalogConfig) -> Result<Self, SignatureError> {
        Self::from(config).with_signatures(&config.signatures)
    }
}

/// Without the configuration's own signatures, which have to be read: [`ScanOptions::from_config`] does that.
impl From<&CatalogConfig> for ScanOptions {
    fn from(config: &CatalogConfig) -> Self {
        Self {
            roots: config.roots.clone(),
            max_depth: config.max_depth,
            threads: config.threads,
            signatures: Signatures::builtin(),
            patience: None,
        }
    }
}

impl ScanOptions {
    /// These folders, with the defaults of the configuration.
    #[must_use]
    pub fn new(roots: Vec<PathBuf>) -> Self {
        Self {
            roots,
            ..Self::from(&CatalogConfig::default())
        }
    }
}

impl ScanOptions {
    /// Adds the signatures in these files to the built-in ones.
    ///
    /// # Errors
    /// The first file that cannot be read or is wrong.
    pub fn with_signatures(mut self, files: &[PathBuf]) -> Result<Self, SignatureError> {
        self.signatures = Signatures::with_files(files)?;
        Ok(self)
    }
}

/// How far a scan has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScanProgress {
    /// Weight files and configurations seen.
    pub files: u64,
    /// Entries whose headers have to be read; 0 until the folders have been listed.
    pub entries: u64,
    /// Entries of these that are done.
    pub done: u64,
}

impl std::fmt::Display for ScanProgress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} files", self.files)?;
        if self.entries > 0 {
            write!(f, ", {} of {} headers read", self.done, self.entries)?;
        }
        Ok(())
    }
}

/// What a scan found.
#[derive(Clone, Debug)]
pub struct ScanReport {
    /// Everything that was found. Its generation is that of the previous catalogue where nothing changed.
    pub catalogue: Catalogue,
    /// Weight files and configurations that were seen.
    pub files: u64,
    /// Entries whose headers were read in this scan; the others were known already.
    pub inspected: u64,
    /// What kept the scan from seeing all.
    pub problems: Vec<ScanProblem>,
}

/// Scans the roots. Entries of `previous` whose files have not changed are taken over without being opened.
pub fn scan(
    options: &ScanOptions,
    previous: Option<&Catalogue>,
    progress: &(dyn Fn(ScanProgress) + Sync),
) -> ScanReport {
    let roots = absolute_roots(&options.roots);
    let starts: Vec<Start> = roots
        .iter()
        .enumerate()
        .map(|(root, path)| Start {
            path: path.clone(),
            root,
            depth: options.max_depth,
            recursive: true,
        })
        .collect();
    in_pool(options.threads, || {
        run(
            options,
            &roots,
            &starts,
            previous,
            Vec::new(),
            None,
            progress,
        )
    })
}

/// Looks again at what these paths touch and takes the rest of `previous` as it is. A path may be a file or a folder that
/// appeared, changed or went away.
pub fn rescan(
    options: &ScanOptions,
    previous: &Catalogue,
    changed: &[PathBuf],
    progress: &(dyn Fn(ScanProgress) + Sync),
) -> ScanReport {
    let roots = absolute_roots(&options.roots);
    let scope = Scope::of(options, &roots, previous, changed);
    let kept: Vec<Arc<Model>> = previous
        .models()
        .filter(|model| !scope.wants(&model.path, model.format.is_folder()))
        .cloned()
        .collect();
    in_pool(options.threads, || {
        run(
            options,
            &roots,
            &scope.starts,
            Some(previous),
            kept,
            Some(&scope),
            progress,
        )
    })
}

/// The roots as absolute paths, each once, none below another: a folder is scanned once.
fn absolute_roots(roots: &[PathBuf]) -> Vec<PathBuf> {
    let absolute: Vec<PathBuf> = roots
        .iter()
        .map(|root| {
            std::fs::canonicalize(root)
                .or_else(|_| std::path::absolute(root))
                .unwrap_or_else(|_| root.clone())
        })
        .collect();
    let mut kept: Vec<PathBuf> = Vec::new();
    for (i, root) in absolute.iter().enumerate() {
        let covered = absolute
            .iter()
            .enumerate()
            .any(|(j, other)| root.starts_with(other) && (other != root || j < i));
        if !covered {
            kept.push(root.clone());
        }
    }
    kept
}

/// Runs `work` on as many threads as were asked for.
fn in_pool<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("hotset-scan-{i}"))
        .build();
    match pool {
        Ok(pool) => pool.install(work),
        Err(error) => {
            tracing::warn!(%error, "no threads for the scan; it runs on the shared pool");
            work()
        }
    }
}

fn run(
    options: &ScanOptions,
    roots: &[PathBuf],
    starts: &[Start],
    previous: Option<&Catalogue>,
    mut kept: Vec<Arc<Model>>,
    scope: Option<&Scope>,
    progress: &(dyn Fn(ScanProgress) + Sync),
) -> ScanReport {
    let files = AtomicU64::new(0);
    let (folders, mut problems) = walk(starts, options.max_depth, &|more| {
        let files = files.fetch_add(more, Ordering::Relaxed) + more;
        progress(ScanProgress {
            files,
            ..ScanProgress::default()
        });
    });
    let files = files.into_inner();
    let mut units = layout::units(&folders);
    if let Some(scope) = scope {
        units.retain(|unit| scope.wants(&unit.path, !matches!(unit.shape, Shape::Weights(_))));
    }
    if let Some(previous) = previous {
        let stays = not_looked_at(previous, &problems, &units, &kept);
        kept.extend(stays);
    }
    let entries = units.len() as u64;
    let knowledge = Known::new(&options.signatures);
    let (done, inspected) = (AtomicU64::new(0), AtomicU64::new(0));
    let known: Vec<Option<&Arc<Model>>> = units
        .par_iter()
        .map(|unit| {
            previous
                .and_then(|previous| previous.at_path(&unit.path))
                .filter(|model| is_unchanged(unit, model))
        })
        .collect();
    if let Some(previous) = previous
        && known.len() + kept.len() == previous.len()
        && known.iter().all(Option::is_some)
    {
        // Paths are unique, so as many unchanged entries as there were are the same entries.
        return ScanReport {
            catalogue: previous.clone(),
            files,
            inspected: 0,
            problems,
        };
    }
    let mut named: Vec<Named> = units
        .par_iter()
        .zip(known)
        .map(|(unit, known)| {
            let root = roots
                .get(unit.root)
                .map_or(Path::new("/"), PathBuf::as_path);
            let natural = layout::natural_name(unit, root);
            let model = match known {
                Some(model) => model.clone(),
                None => {
                    inspected.fetch_add(1, Ordering::Relaxed);
                    let name = ModelName::from(natural.as_str());
                    let model = Arc::new(inspect(unit, name, &knowledge));
                    progress(ScanProgress {
                        files,
                        entries,
                        done: done.fetch_add(1, Ordering::Relaxed) + 1,
                    });
                    model
                }
            };
            Named {
                natural,
                root: unit.root,
                model,
            }
        })
        .collect();
    let unread = named
        .iter()
        .filter(|named| named.model.presence == Presence::Unread);
    problems.extend(unread.map(|Named { model, .. }| ScanProblem::Interrupted {
        path: model.path.to_path_buf(),
        reason: model.error.clone().unwrap_or_default(),
    }));
    if let Some(patience) = options.patience {
        problems.extend(hold_back(&mut named, patience));
    }
    drop_claimed(&mut named);
    for model in kept {
        let root = roots
            .iter()
            .position(|root| model.path.starts_with(root))
            .unwrap_or(0);
        named.push(Named {
            // An entry that was told apart from others keeps that name: what it collided with may still be there.
            // A full scan gives the plain name back.
            natural: model.name.as_str().to_owned(),
            root,
            model,
        });
    }
    let models = naming::settle(named, roots);
    let catalogue = match previous {
        Some(previous) if is_same(previous, &models) => previous.clone(),
        _ => Catalogue::new(previous.map_or(0, Catalogue::generation) + 1, models),
    };
    ScanReport {
        catalogue,
        files,
        inspected: inspected.into_inner(),
        problems,
    }
}

fn is_same(previous: &Catalogue, models: &[Arc<Model>]) -> bool {
    previous.len() == models.len()
        && previous
            .models()
            .zip(models)
            .all(|(a, b)| Arc::ptr_eq(a, b) || a == b)
}

/// Entries below folders that could not be looked at, for a reason that says nothing of them: they stay as they were.
fn not_looked_at(
    previous: &Catalogue,
    problems: &[ScanProblem],
    units: &[Unit],
    kept: &[Arc<Model>],
) -> Vec<Arc<Model>> {
    let interrupted: Vec<&Path> = problems
        .iter()
        .filter_map(|problem| match problem {
            ScanProblem::Interrupted { path, .. } => Some(&**path),
            _ => None,
        })
        .collect();
    if interrupted.is_empty() {
        return Vec::new();
    }
    let found = units.iter().map(|unit| &*unit.path);
    let found: HashSet<&Path> = found.chain(kept.iter().map(|model| &*model.path)).collect();
    previous
        .models()
        .filter(|model| interrupted.iter().any(|path| model.path.starts_with(path)))
        .filter(|model| !found.contains(&*model.path))
        .cloned()
        .collect()
}

/// Whether an entry is still what its files say.
fn is_unchanged(unit: &Unit, model: &Model) -> bool {
    // What was gone and is back is looked at again, as what could not be read.
    if matches!(model.presence, Presence::Unread | Presence::Gone) {
        return false;
    }
    if model.error.is_some() && reads_more_than_listed(unit) {
        return false;
    }
    let inputs = unit.inputs();
    if model.inputs.len() < inputs.len() {
        return false;
    }
    let (listed, further) = model.inputs.split_at(inputs.len());
    listed.iter().zip(inputs).all(|(a, b)| a == b) && further.iter().all(still_there)
}

/// Whether the entry rests on files that the listing of its folder does not show, so that one that was missing may have
/// appeared.
fn reads_more_than_listed(unit: &Unit) -> bool {
    match &unit.shape {
        Shape::Weights(part) | Shape::Folder { part, .. } => part.index.is_some(),
        Shape::Pipeline { .. } => true,
    }
}

fn still_there(source: &SourceFile) -> bool {
    std::fs::metadata(&source.path).is_ok_and(|metadata| identity_of(&metadata) == source.identity)
}

/// Leaves out what is not whole and has changed a short time ago.
fn hold_back(named: &mut Vec<Named>, patience: Duration) -> Vec<ScanProblem> {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .saturating_sub(patience);
    let since = i64::try_from(since.as_nanos()).unwrap_or(i64::MAX);
    let mut problems = Vec::new();
    named.retain(|Named { model, .. }| {
        let waits = model.presence == Presence::Incomplete
            && model
                .inputs
                .iter()
                .any(|file| file.identity.mtime_ns >= since);
        if waits {
            problems.push(ScanProblem::Incomplete {
                path: model.path.to_path_buf(),
                reason: model.error.clone().unwrap_or_default(),
            });
        }
        !waits
    });
    problems
}

/// Shards whose names only an index tells were listed as files of their own: they are not.
fn drop_claimed(named: &mut Vec<Named>) {
    let claimed: HashSet<Arc<Path>> = named
        .iter()
        .filter(|entry| entry.model.inputs.len() > 1)
        .flat_map(|entry| {
            let own = entry.model.path.clone();
            entry
                .model
                .inputs
                .iter()
                .map(|input| input.path.clone())
                .filter(move |path| *path != own)
        })
        .collect();
    if !claimed.is_empty() {
        named.retain(|entry| !claimed.contains(&entry.model.path));
    }
}

/// What an incremental scan looks at.
struct Scope {
    starts: Vec<Start>,
    /// Folders that are looked at whole, with all below them.
    deep: Vec<PathBuf>,
    /// Folders of which only the entries directly in them are looked at.
    shallow: Vec<PathBuf>,
}

impl Scope {
    fn of(
        options: &ScanOptions,
        roots: &[PathBuf],
        previous: &Catalogue,
        changed: &[PathBuf],
    ) -> Self {
        // Shards may have any name, so a file that belongs to an entry with several is that entry's business.
        let mut owners: HashMap<&Path, &Path> = HashMap::new();
        for model in previous.models().filter(|m| m.inputs.len() > 1) {
            for input in &model.inputs {
                owners.insert(&input.path, &model.path);
            }
        }
        let mut scope = Self {
            starts: Vec::new(),
            deep: Vec::new(),
            shallow: Vec::new(),
        };
        for path in changed {
            let path = with_real_parent(path);
            let Some(root) = roots.iter().find(|root| path.starts_with(root)) else {
                continue;
            };
            if let Some(model) = enclosing_model(&path, root, previous) {
                scope.deep.push(model);
            } else if path == *root || path.is_dir() {
                scope.deep.push(path);
            } else if let Some(owner) = owners.get(&*path) {
                scope.shallow.extend(owner.parent().map(Path::to_path_buf));
            } else {
                if !path.exists() {
                    // It may have been a folder with models in it.
                    scope.deep.push(path.clone());
                }
                scope.shallow.extend(path.parent().map(Path::to_path_buf));
            }
        }
        scope.reduce();
        let depth_of = |path: &Path| {
            let root = roots
                .iter()
                .position(|root| path.starts_with(root))
                .unwrap_or(0);
            let below = roots
                .get(root)
                .and_then(|root| path.strip_prefix(root).ok())
                .map_or(0, |below| below.components().count());
            (root, options.max_depth.saturating_sub(below))
        };
        let folders = scope.deep.iter().map(|path| (path, true));
        let folders = folders.chain(scope.shallow.iter().map(|path| (path, false)));
        let starts = folders
            .filter(|(path, _)| path.is_dir())
            .map(|(path, recursive)| {
                let (root, depth) = depth_of(path);
                Start {
                    path: path.clone(),
                    root,
                    depth,
                    recursive,
                }
            })
            .collect();
        scope.starts = starts;
        scope
    }

    /// Drops what is covered by something larger.
    fn reduce(&mut self) {
        self.deep.sort();
        self.deep.dedup();
        let mut kept: Vec<PathBuf> = Vec::new();
        for path in self.deep.drain(..) {
            if !kept.last().is_some_and(|last| path.starts_with(last)) {
                kept.push(path);
            }
        }
        self.deep = kept;
        self.shallow.sort();
        self.shallow.dedup();
        let deep = &self.deep;
        self.shallow
            .retain(|path| !deep.iter().any(|above| path.starts_with(above)));
    }

    /// Whether an entry at this path is looked at again.
    fn wants(&self, path: &Path, is_folder: bool) -> bool {
        let in_folder = |path: &Path| self.shallow.iter().any(|folder| folder == path);
        self.deep.iter().any(|above| path.starts_with(above))
            || in_folder(path)
            || (!is_folder && path.parent().is_some_and(in_folder))
    }
}

/// The path with its parent's links resolved, as the walk sees it. The last part may be gone, so it stays.
fn with_real_parent(path: &Path) -> PathBuf {
    let parent = path.parent().and_then(|p| std::fs::canonicalize(p).ok());
    match (parent, path.file_name()) {
        (Some(parent), Some(name)) => parent.join::<&OsStr>(name),
        _ => path.to_path_buf(),
    }
}

/// The outermost folder on the way to `path` that is a model, or is about to become one.
fn enclosing_model(path: &Path, root: &Path, previous: &Catalogue) -> Option<PathBuf> {
    let mut found = None;
    for folder in path.ancestors().skip(1) {
        if !folder.starts_with(root) {
            break;
        }
        if previous.at_path(folder).is_some()
            || folder.join("model_index.json").exists()
            || (folder.join("config.json").exists() && path.parent() == Some(folder))
        {
            found = Some(folder.to_path_buf());
        }
    }
    found
}

#[cfg(test)]
mod tests;
