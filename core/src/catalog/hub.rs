//! The cache of the Hugging Face hub: `models--org--name/snapshots/<revision>/...`, links to `blobs/<hash>`.
//!
//! A blob is named by the SHA-256 of its content where it is a large file, so a weight file's content id is known without
//! reading it.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use crate::ids::ContentId;
use crate::units::Bytes;

/// How many digits of a revision tell two of them apart in a name.
const SHORT_REVISION: usize = 8;

/// Where in a hub cache a path lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Location {
    /// The repository, `org/name`.
    pub(super) repo: String,
    pub(super) revision: String,
    /// What follows inside the snapshot.
    pub(super) rest: PathBuf,
}

/// Finds the snapshot that a path lies in.
pub(super) fn locate(path: &Path) -> Option<Location> {
    const MARK: &[u8] = b"models--";
    // Nearly no path is one of a cache, and every entry is asked.
    let bytes = path.as_os_str().as_bytes();
    bytes.windows(MARK.len()).find(|window| *window == MARK)?;
    let parts: Vec<&OsStr> = path
        .components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect();
    let at = parts.windows(3).position(|w| {
        w[1] == "snapshots"
            && w[0]
                .to_str()
                .is_some_and(|name| name.starts_with("models--"))
    })?;
    let repo = parts[at]
        .to_str()?
        .strip_prefix("models--")?
        .replace("--", "/");
    Some(Location {
        repo,
        revision: parts[at + 2].to_str()?.to_owned(),
        rest: parts[at + 3..].iter().collect(),
    })
}

/// The name with the revision, for where a repository is there in several.
pub(super) fn name_with_revision(name: &str, path: &Path) -> Option<String> {
    let location = locate(path)?;
    let short: String = location.revision.chars().take(SHORT_REVISION).collect();
    let rest = name.strip_prefix(&location.repo)?;
    Some(format!("{}@{short}{rest}", location.repo))
}

/// The content id that the hub gives to a file of its cache; `None` outside a cache or where the blob is not named by a
/// SHA-256.
pub(super) fn blob_id(path: &Path) -> Option<[u8; 32]> {
    locate(path)?;
    let target = std::fs::read_link(path).ok()?;
    let in_blobs = target.parent().and_then(Path::file_name) == Some(OsStr::new("blobs"));
    let id: ContentId = format!("sha256:{}", target.file_name()?.to_str()?)
        .parse()
        .ok()?;
    match id {
        ContentId::Sha256(digest) if in_blobs => Some(digest),
        _ => None,
    }
}

/// A repository in a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedRepo {
    /// Its name, `org/name`.
    pub repo: String,
    /// Its folder.
    pub path: PathBuf,
    /// Its revisions, by their hash.
    pub revisions: Vec<CachedRevision>,
    /// Bytes of all its blobs, each once.
    pub bytes: Bytes,
}

/// A revision of a repository in a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedRevision {
    /// Its commit.
    pub revision: String,
    /// Bytes of the blobs that it shows, each once.
    pub bytes: Bytes,
    /// How many files it shows.
    pub files: u64,
}

/// The models of a hub cache with their revisions and sizes, every blob counted once.
///
/// # Errors
/// That the cache's folder cannot be listed. What cannot be read inside it is left out.
pub fn repositories(cache: &Path) -> io::Result<Vec<CachedRepo>> {
    let mut repos = Vec::new();
    for entry in std::fs::read_dir(cache)? {
        let path = entry?.path();
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        let Some(repo) = name.strip_prefix("models--") else {
            continue;
        };
        let repo = repo.replace("--", "/");
        let Ok(snapshots) = std::fs::read_dir(path.join("snapshots")) else {
            continue;
        };
        let mut all: HashMap<(u64, u64), u64> = HashMap::new();
        let mut revisions: BTreeMap<String, CachedRevision> = BTreeMap::new();
        for snapshot in snapshots.flatten() {
            let mut blobs = HashMap::new();
            let mut files = 0;
            collect(&snapshot.path(), &mut blobs, &mut files, 16);
            let revision = snapshot.file_name().to_string_lossy().into_owned();
            revisions.insert(
                revision.clone(),
                CachedRevision {
                    revision,
                    bytes: Bytes(blobs.values().sum()),
                    files,
                },
            );
            all.extend(blobs);
        }
        repos.push(CachedRepo {
            repo,
            revisions: revisions.into_values().collect(),
            bytes: Bytes(all.values().sum()),
            path,
        });
    }
    repos.sort_by(|a, b| a.repo.cmp(&b.repo));
    Ok(repos)
}

fn collect(folder: &Path, blobs: &mut HashMap<(u64, u64), u64>, files: &mut u64, depth: u32) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        // Follows the link to the blob.
        let Ok(metadata) = std::fs::metadata(entry.path()) else {
            continue;
        };
        if metadata.is_dir() && depth > 0 {
            collect(&entry.path(), blobs, files, depth - 1);
        } else if metadata.is_file() {
            *files += 1;
            blobs.insert((metadata.dev(), metadata.ino()), metadata.len());
        }
    }
}
