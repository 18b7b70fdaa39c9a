//! Listing folders: which weight files and configurations there are, and in which state.
//!
//! Every file costs one `stat` relative to its open folder and nothing else, so that a scan that finds nothing new is as fast
//! as the file system allows. Folders are listed in parallel.

use std::ffi::{OsStr, OsString};
use std::fs::Metadata;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking::Sink;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};

use super::model::{FileIdentity, SourceFile};
use super::settle;
use crate::units::Bytes;

/// Whether an error says nothing of the file, and may be gone when it is looked at again.
pub(super) fn passes(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    let errno = Errno::from_io_error(error);
    errno.is_some_and(|errno| {
        [
            Errno::MFILE,
            Errno::NFILE,
            Errno::NOMEM,
            Errno::AGAIN,
            Errno::INTR,
        ]
        .contains(&errno)
    })
}

/// Something that kept a scan from seeing all there is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ScanProblem {
    /// A folder that cannot be listed.
    #[error("folder {} cannot be read ({reason}): its models are missing; check its permissions", path.display())]
    UnreadableFolder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// A file whose state cannot be asked for.
    #[error("{} cannot be examined ({reason}); it was left out", path.display())]
    UnreadableFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// A link to a folder that it lies in.
    #[error("{} links to a folder that it lies in; it was not followed", path.display())]
    SymlinkLoop {
        /// The link.
        path: PathBuf,
    },
    /// A link that leads nowhere.
    #[error("{} links to a file that is not there; remove the link or fetch the file again", path.display())]
    DanglingLink {
        /// The link.
        path: PathBuf,
    },
    /// A folder deeper than the configuration allows.
    #[error("folder {} lies deeper than {max_depth} levels and was not followed; raise catalog.max_depth", path.display())]
    TooDeep {
        /// The folder.
        path: PathBuf,
        /// The limit.
        max_depth: usize,
    },
    /// A file or folder that is still being written.
    #[error("{} is not whole yet ({reason}); it is listed once it is", path.display())]
    Incomplete {
        /// The entry's file or folder.
        path: PathBuf,
        /// What is missing.
        reason: Arc<str>,
    },
    /// The system had nothing left to look with: descriptors, memory.
    #[error("{} could not be looked at ({reason}): what was known below it stays, and it is looked at again", path.display())]
    Interrupted {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        reason: Arc<str>,
    },
    /// More files than a catalogue holds.
    #[error("more than {limit} files below {}: the rest was left out; scan fewer folders", path.display())]
    TooManyFiles {
        /// The root.
        path: PathBuf,
        /// The limit.
        limit: u64,
    },
}

/// The most files that one scan takes in, so that a root set to `/` by mistake ends.
const MAX_FILES: u64 = 4_000_000;

/// A folder as it was found.
#[derive(Debug)]
pub(super) struct Folder {
    /// Its absolute path.
    pub(super) path: Arc<Path>,
    /// Index of the root that it lies below.
    pub(super) root: usize,
    /// The files that matter, by name.
    pub(super) files: Vec<FoundFile>,
}

/// A file that matters: weights, an index or a configuration.
#[derive(Clone, Debug)]
pub(super) struct FoundFile {
    pub(super) name: OsString,
    pub(super) identity: FileIdentity,
}

impl Folder {
    /// The file of this name.
    pub(super) fn file(&self, name: &str) -> Option<&FoundFile> {
        self.files
            .binary_search_by(|file| file.name.as_bytes().cmp(name.as_bytes()))
            .ok()
            .map(|i| &self.files[i])
    }

    /// The same with its path.
    pub(super) fn source(&self, file: &FoundFile) -> SourceFile {
        SourceFile {
            path: self.path.join(&file.name).into(),
            identity: file.identity,
        }
    }
}

/// The identity of a file with this metadata.
#[must_use]
pub fn identity_of(metadata: &Metadata) -> FileIdentity {
    FileIdentity {
        device: metadata.dev(),
        inode: metadata.ino(),
        size: Bytes(metadata.len()),
        mtime_ns: metadata
            .mtime()
            .saturating_mul(1_000_000_000)
            .saturating_add(metadata.mtime_nsec()),
    }
}

fn identity_of_stat(stat: &Stat) -> FileIdentity {
    FileIdentity {
        device: stat.st_dev,
        inode: stat.st_ino,
        size: Bytes(u64::try_from(stat.st_size).unwrap_or(0)),
        mtime_ns: stat
            .st_mtime
            .saturating_mul(1_000_000_000)
            .saturating_add(stat.st_mtime_nsec as i64),
    }
}

/// Whether a file of this name matters to the catalogue.
pub(super) fn is_relevant(name: &[u8]) -> bool {
    let dot = name.iter().rposition(|&b| b == b'.');
    let Some(dot) = dot else { return false };
    let suffix = &name[dot + 1..];
    let any = |known: &[&[u8]]| known.iter().any(|k| suffix.eq_ignore_ascii_case(k));
    if suffix.eq_ignore_ascii_case(b"json") {
        return matches!(
            name,
            b"config.json" | b"model_index.json" | b"adapter_config.json" | b"modules.json"
        ) || name.windows(6).any(|w| w == b".index");
    }
    if suffix.starts_with(b"onnx_data") || name.ends_with(b".onnx.data") {
        return true;
    }
    any(&[
        b"safetensors",
        b"sft",
        b"gguf",
        b"onnx",
        b"ckpt",
        b"pt",
        b"pth",
        b"bin",
        b"pkl",
    ])
}

/// Where a walk starts.
pub(super) struct Start {
    pub(super) path: PathBuf,
    pub(super) root: usize,
    /// Levels that are left below it.
    pub(super) depth: usize,
    /// Whether to go into its sub-folders.
    pub(super) recursive: bool,
}

/// The folders that lie one inside the other on the way to here, as (device, inode).
struct Chain<'a> {
    here: (u64, u64),
    above: Option<&'a Chain<'a>>,
}

impl Chain<'_> {
    fn contains(&self, folder: (u64, u64)) -> bool {
        self.here == folder || self.above.is_some_and(|above| above.contains(folder))
    }
}

/// Everything that a walk shares between its threads.
struct Walk<'a> {
    folders: Sink<Folder>,
    problems: Sink<ScanProblem>,
    files: AtomicU64,
    max_depth: usize,
    on_files: &'a (dyn Fn(u64) + Sync),
}

/// Lists these folders. The result is sorted by path.
pub(super) fn walk(
    starts: &[Start],
    max_depth: usize,
    on_files: &(dyn Fn(u64) + Sync),
) -> (Vec<Folder>, Vec<ScanProblem>) {
    let walk = Walk {
        folders: Sink::default(),
        problems: Sink::default(),
        files: AtomicU64::new(0),
        max_depth,
        on_files,
    };
    rayon::scope(|_| {
        use rayon::prelude::*;
        starts.par_iter().for_each(|start| walk.start(start));
    });
    let mut folders = walk.folders.into_inner();
    folders.sort_by(|a, b| (a.root, &a.path).cmp(&(b.root, &b.path)));
    let mut problems = walk.problems.into_inner();
    problems.sort_by_key(ToString::to_string);
    (folders, problems)
}

impl Walk<'_> {
    fn start(&self, start: &Start) {
        match rustix::fs::stat(&start.path) {
            Ok(stat) => {
                let chain = Chain {
                    here: (stat.st_dev, stat.st_ino),
                    above: None,
                };
                self.list(&start.path, start, start.depth, &chain);
            }
            Err(error) => self.unreadable(&start.path, error),
        }
    }

    fn unreadable(&self, path: &Path, error: rustix::io::Errno) {
        if passes(&error.into()) {
            self.problems.push(ScanProblem::Interrupted {
                path: path.to_path_buf(),
                reason: std::io::Error::from(error).to_string().into(),
            });
            return;
        }
        self.problems.push(ScanProblem::UnreadableFolder {
            path: path.to_path_buf(),
            reason: std::io::Error::from(error).to_string(),
        });
    }

    fn list(&self, path: &Path, start: &Start, depth: usize, chain: &Chain<'_>) {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let listed = rustix::fs::open(path, flags, Mode::empty())
            .and_then(|folder| Dir::read_from(&folder).map(|dir| (folder, dir)));
        let (folder, dir) = match listed {
            Ok(listed) => listed,
            Err(error) => return self.unreadable(path, error),
        };
        let mut files = Vec::new();
        let mut unfinished: Vec<OsString> = Vec::new();
        let mut inner: Vec<(OsString, (u64, u64))> = Vec::new();
        for entry in dir {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => {
                    self.unreadable(path, error);
                    break;
                }
            };
            let name = entry.file_name().to_bytes();
            if name.first() == Some(&b'.') {
                // `.` and `..`, and what hidden folders hold (`.git`, `.cache`, trash) is no library.
                continue;
            }
            let kind = entry.file_type();
            let maybe_folder = !matches!(kind, FileType::RegularFile);
            let path_name = Path::new(OsStr::from_bytes(name));
            if !maybe_folder && settle::is_partial(path_name) {
                // The file beside its download's control file may have its full length and none of its bytes.
                unfinished.extend(path_name.file_stem().map(OsStr::to_os_string));
                continue;
            }
            if !maybe_folder && !is_relevant(name) {
                continue;
            }
            if matches!(
                kind,
                FileType::Socket
                    | FileType::Fifo
                    | FileType::CharacterDevice
                    | FileType::BlockDevice
            ) {
                continue;
            }
            let os_name = || OsString::from_vec(name.to_vec());
            let stat = match rustix::fs::statat(&folder, entry.file_name(), AtFlags::empty()) {
                Ok(stat) => stat,
                Err(rustix::io::Errno::LOOP) => {
                    self.problems.push(ScanProblem::SymlinkLoop {
                        path: path.join(os_name()),
                    });
                    continue;
                }
                Err(rustix::io::Errno::NOENT) => {
                    // A link that leads nowhere is worth telling; a file that vanished just now is not.
                    if kind == FileType::Symlink && is_relevant(name) {
                        self.problems.push(ScanProblem::DanglingLink {
                            path: path.join(os_name()),
                        });
                    }
                    continue;
                }
                Err(error) if passes(&error.into()) => {
                    self.unreadable(&path.join(os_name()), error);
                    continue;
                }
                Err(error) => {
                    self.problems.push(ScanProblem::UnreadableFile {
                        path: path.join(os_name()),
                        reason: std::io::Error::from(error).to_string(),
                    });
                    continue;
                }
            };
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile if is_relevant(name) => files.push(FoundFile {
                    name: os_name(),
                    identity: identity_of_stat(&stat),
                }),
                FileType::Directory => inner.push((os_name(), (stat.st_dev, stat.st_ino))),
                _ => {}
            }
        }
        drop(folder);
        files.retain(|file: &FoundFile| !unfinished.contains(&file.name));
        files.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let count = files.len() as u64;
        let so_far = self.files.fetch_add(count, Ordering::Relaxed) + count;
        (self.on_files)(count);
        self.folders.push(Folder {
            path: path.into(),
            root: start.root,
            files,
        });
        if so_far > MAX_FILES {
            self.problems.push(ScanProblem::TooManyFiles {
                path: start.path.clone(),
                limit: MAX_FILES,
            });
            return;
        }
        self.descend(path, start, depth, chain, inner);
    }

    fn descend(
        &self,
        path: &Path,
        start: &Start,
        depth: usize,
        chain: &Chain<'_>,
        mut inner: Vec<(OsString, (u64, u64))>,
    ) {
        if !start.recursive {
            return;
        }
        // A hub cache keeps its files in `blobs` and shows them by name in `snapshots`.
        if inner.iter().any(|(name, _)| name == "snapshots") {
            inner.retain(|(name, _)| name != "blobs" && name != "refs");
        }
        rayon::scope(|scope| {
            for (name, id) in inner {
                let below = path.join::<&OsStr>(name.as_ref());
                if chain.contains(id) {
                    self.problems.push(ScanProblem::SymlinkLoop { path: below });
                } else if depth == 0 {
                    self.problems.push(ScanProblem::TooDeep {
                        path: below,
                        max_depth: self.max_depth,
                    });
                } else {
                    scope.spawn(move |_| {
                        let chain = Chain {
                            here: id,
                            above: Some(chain),
                        };
                        self.list(&below, start, depth - 1, &chain);
                    });
                }
            }
        });
    }
}

/// A list that several threads add to.
mod parking {
    use std::sync::{Mutex, PoisonError};

    #[derive(Debug)]
    pub(super) struct Sink<T>(Mutex<Vec<T>>);

    impl<T> Default for Sink<T> {
        fn default() -> Self {
            Self(Mutex::new(Vec::new()))
        }
    }

    impl<T> Sink<T> {
        pub(super) fn push(&self, value: T) {
            // A push leaves the list whole whatever happens, so a poisoned lock is still good.
            self.0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(value);
        }

        pub(super) fn into_inner(self) -> Vec<T> {
            self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
        }
    }
}
