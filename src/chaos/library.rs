//! The simulation's models: real files of a few pages, each version of which is known by its digests; and the catalogue's
//! index beside them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Error, Result, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use safetensors::tensor::TensorView;
use twox_hash::XxHash3_128;

use crate::Lease;

/// How many files there are: single models, of which the last two are large.
pub(super) const FILES: usize = 8;
const KIB: [usize; FILES] = [24, 32, 40, 48, 64, 96, 200, 260];
const TENSORS: usize = 4;
/// Versions of a file that differ; after these they come again.
const VERSIONS: usize = 16;

/// Digests of a version's tensors, by name.
type Digests = BTreeMap<String, u128>;

/// One version of a file: made once for all seeds.
struct Version {
    contents: Vec<u8>,
    digests: Digests,
}

static KNOWN: [[OnceLock<Option<Version>>; VERSIONS]; FILES] =
    [const { [const { OnceLock::new() }; VERSIONS] }; FILES];

fn version(file: usize, number: usize) -> Option<&'static Version> {
    KNOWN
        .get(file)?
        .get(number % VERSIONS)?
        .get_or_init(|| make(file, number % VERSIONS))
        .as_ref()
}

fn make(file: usize, number: usize) -> Option<Version> {
    let bytes = KIB.get(file)? << 10;
    let tensors: BTreeMap<String, Vec<u8>> = (0..TENSORS)
        .map(|i| {
            let start = (file as u64 + 1) << 40 | (number as u64) << 20 | i as u64;
            let mut state = start.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let words = (0..bytes / TENSORS / 8).flat_map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()
            });
            (format!("block.{i}.weight"), words.collect())
        })
        .collect();
    let views: Option<Vec<_>> = tensors
        .iter()
        .map(|(name, bytes)| {
            let view = TensorView::new(safetensors::Dtype::F16, vec![bytes.len() / 2], bytes);
            Some((name.clone(), view.ok()?))
        })
        .collect();
    Some(Version {
        contents: safetensors::serialize(views?, None).ok()?,
        digests: tensors
            .iter()
            .map(|(name, bytes)| (name.clone(), XxHash3_128::oneshot(bytes)))
            .collect(),
    })
}

/// The files, and every version that each of them ever had.
pub(super) struct Library {
    dir: tempfile::TempDir,
    /// How often each file was written.
    written: [usize; FILES],
    writes: u64,
}

pub(super) fn name(file: usize) -> String {
    format!("model-{file}")
}

/// The number of the file behind a model.
pub(super) fn file_of(model: &str) -> Option<usize> {
    model.strip_prefix("model-")?.parse().ok()
}

/// A folder in memory, where there is one: the files are small, and written often.
fn folder() -> Result<tempfile::TempDir> {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())
}

impl Library {
    pub(super) fn new() -> Result<Self> {
        let mut library = Self {
            dir: folder()?,
            written: [0; FILES],
            writes: 0,
        };
        std::fs::create_dir(library.root())?;
        for file in 0..FILES {
            library.write(file)?;
        }
        Ok(library)
    }

    pub(super) fn root(&self) -> PathBuf {
        self.dir.path().join("models")
    }

    /// The catalogue's database.
    pub(super) fn index(&self) -> PathBuf {
        self.dir.path().join("index").join("catalogue.db")
    }

    pub(super) fn path(&self, file: usize) -> PathBuf {
        self.root().join(format!("{}.safetensors", name(file)))
    }

    /// A new version, in one piece.
    pub(super) fn write(&mut self, file: usize) -> Result<bool> {
        let number = self.written.get(file).copied().unwrap_or_default();
        let version = version(file, number).ok_or_else(|| Error::other("no such version"))?;
        let partial = self.path(file).with_extension("part");
        let mut open = File::create(&partial)?;
        open.write_all(&version.contents)?;
        self.stamp(&open)?;
        std::fs::rename(partial, self.path(file))?;
        if let Some(written) = self.written.get_mut(file) {
            *written += 1;
        }
        Ok(true)
    }

    /// The time of change that the file would have if real time passed: a run takes less than a tick of the kernel's clock.
    fn stamp(&mut self, file: &File) -> Result<()> {
        self.writes += 1;
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + self.writes);
        file.set_modified(time)
    }

    /// Gives whether there was such a file.
    pub(super) fn truncate(&mut self, file: usize) -> Result<bool> {
        let Ok(open) = File::options().write(true).open(self.path(file)) else {
            return Ok(false);
        };
        open.set_len(open.metadata()?.len() / 2)?;
        self.stamp(&open)?;
        Ok(true)
    }

    pub(super) fn half_write(&mut self, file: usize) -> Result<bool> {
        let Ok(mut open) = File::options().write(true).open(self.path(file)) else {
            return Ok(false);
        };
        open.write_all(&[0xee; 4096])?;
        self.stamp(&open)?;
        Ok(true)
    }

    pub(super) fn delete(&self, file: usize) -> Result<bool> {
        Ok(std::fs::remove_file(self.path(file)).is_ok())
    }

    /// Overwrites the index and what SQLite keeps beside it. Gives whether there was one.
    pub(super) fn corrupt_index(&self) -> bool {
        let spoil = |path: &Path| {
            let Ok(file) = File::options().write(true).open(path) else {
                return false;
            };
            file.write_all_at(&[0xee; 4096], 0).is_ok()
        };
        let index = self.index();
        spoil(&index.with_extension("db-wal"));
        spoil(&index)
    }

    /// Makes the index refuse new entries as a full disk would, or take them again.
    pub(super) fn fill_index(&self, full: bool) -> bool {
        let sql = if full {
            "CREATE TRIGGER IF NOT EXISTS full BEFORE INSERT ON entry
             BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END"
        } else {
            "DROP TRIGGER IF EXISTS full"
        };
        let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE;
        // One that is corrupt refuses as well.
        rusqlite::Connection::open_with_flags(self.index(), flags)
            .and_then(|index| index.execute_batch(sql))
            .is_ok()
    }

    /// How many corrupt indices were set aside.
    pub(super) fn set_aside(&self) -> usize {
        let index = self.index();
        let beside = index.parent().and_then(|dir| std::fs::read_dir(dir).ok());
        let names = beside.into_iter().flatten().flatten();
        names
            .filter(|entry| entry.file_name().to_string_lossy().contains("corrupt"))
            .count()
    }

    /// Whether the tensors of a lease, as `read` gives them, are those of one version of its file.
    pub(super) fn is_version(&self, lease: &Lease, read: &Digests) -> bool {
        let component = lease.component();
        // Of what is split, a half has some of them.
        let tensors = component.tensors as usize;
        let Some(file) = file_of(component.id.model.as_str()) else {
            return false;
        };
        let written = self.written.get(file).copied().unwrap_or_default();
        let mut versions = (0..written.min(VERSIONS)).filter_map(|number| version(file, number));
        read.len() == tensors
            && versions.any(|version| {
                read.iter()
                    .all(|(name, digest)| version.digests.get(name) == Some(digest))
            })
    }
}

/// The digests of what a lease shows. `None` where a device does not give it.
pub(super) async fn read(lease: &Lease) -> Option<Digests> {
    let mut read = BTreeMap::new();
    for tensor in lease.tensors() {
        let digest = match tensor.place {
            crate::Place::Host(bytes) => XxHash3_128::oneshot(bytes),
            crate::Place::Device { address, bytes, .. } => {
                let from = lease.allocation()?;
                let offset = address - from.address();
                let bytes = from.device().download(from, offset, bytes.get()).await;
                XxHash3_128::oneshot(&bytes.ok()?)
            }
        };
        read.insert(tensor.name.to_owned(), digest);
    }
    Some(read)
}
