//! The simulation's models: real files of a few pages, each version of which is known by its digests.

use std::collections::BTreeMap;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use safetensors::tensor::TensorView;

use crate::Lease;

/// How many files there are: single models, of which the last two are large.
pub(super) const FILES: usize = 8;
const TENSORS: usize = 4;

/// Digests of a version's tensors, by name.
type Version = BTreeMap<String, u64>;

/// The files, and every version that each of them ever had.
pub(super) struct Library {
    dir: tempfile::TempDir,
    versions: Vec<Vec<Version>>,
    writes: u64,
}

pub(super) fn name(file: usize) -> String {
    format!("model-{file}")
}

fn digest(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

impl Library {
    pub(super) fn new() -> std::io::Result<Self> {
        let mut library = Self {
            dir: tempfile::tempdir()?,
            versions: vec![Vec::new(); FILES],
            writes: 0,
        };
        for file in 0..FILES {
            library.write(file)?;
        }
        Ok(library)
    }

    pub(super) fn root(&self) -> PathBuf {
        self.dir.path().to_owned()
    }

    fn path(&self, file: usize) -> PathBuf {
        self.dir.path().join(format!("{}.safetensors", name(file)))
    }

    /// A new version, in one piece.
    pub(super) fn write(&mut self, file: usize) -> std::io::Result<()> {
        let version = self.versions[file].len() as u64;
        let bytes = [24, 32, 40, 48, 64, 96, 200, 260][file % FILES] << 10;
        let tensors: BTreeMap<String, Vec<u8>> = (0..TENSORS)
            .map(|i| {
                let start = (file as u64 + 1) << 40 | version << 20 | i as u64;
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
        let views = tensors.iter().map(|(name, bytes)| {
            let view = TensorView::new(safetensors::Dtype::F16, vec![bytes.len() / 2], bytes);
            (name.clone(), view)
        });
        let views: Vec<_> = views
            .filter_map(|(name, view)| Some((name, view.ok()?)))
            .collect();
        let contents = safetensors::serialize(views, None).map_err(std::io::Error::other)?;
        let partial = self.path(file).with_extension("part");
        std::fs::write(&partial, contents)?;
        self.stamp(&File::options().write(true).open(&partial)?)?;
        std::fs::rename(partial, self.path(file))?;
        let version = tensors
            .iter()
            .map(|(name, bytes)| (name.clone(), digest(bytes)))
            .collect();
        self.versions[file].push(version);
        Ok(())
    }

    /// The time of change that the file would have if real time passed: a run takes less than a tick of the kernel's clock.
    fn stamp(&mut self, file: &File) -> std::io::Result<()> {
        self.writes += 1;
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + self.writes);
        file.set_modified(time)
    }

    pub(super) fn truncate(&mut self, file: usize) -> std::io::Result<()> {
        let Ok(open) = File::options().write(true).open(self.path(file)) else {
            return Ok(());
        };
        open.set_len(open.metadata()?.len() / 2)?;
        self.stamp(&open)
    }

    pub(super) fn half_write(&mut self, file: usize) -> std::io::Result<()> {
        let Ok(mut open) = File::options().write(true).open(self.path(file)) else {
            return Ok(());
        };
        open.write_all(&[0xee; 4096])?;
        self.stamp(&open)
    }

    pub(super) fn delete(&self, file: usize) {
        // It may be gone already.
        let _ = std::fs::remove_file(self.path(file));
    }

    pub(super) fn mend(&mut self) -> std::io::Result<()> {
        (0..FILES).try_for_each(|file| self.write(file))
    }

    /// Whether the tensors of a lease, as `read` gives them, are those of one version of its file.
    pub(super) fn is_version(&self, lease: &Lease, read: &BTreeMap<String, u64>) -> bool {
        let model = lease.component().id.model.to_string();
        // Of what is split, a half has some of them.
        let tensors = lease.component().tensors as usize;
        let within = |version: &Version| {
            read.len() == tensors
                && read
                    .iter()
                    .all(|(name, digest)| version.get(name) == Some(digest))
        };
        (0..FILES)
            .find(|file| name(*file) == model)
            .is_some_and(|file| self.versions[file].iter().any(within))
    }
}

/// The digests of what a lease shows. `None` where a device does not give it.
pub(super) async fn read(lease: &Lease) -> Option<BTreeMap<String, u64>> {
    let mut read = BTreeMap::new();
    for tensor in lease.tensors() {
        let digest = match tensor.place {
            crate::Place::Host(bytes) => digest(bytes),
            crate::Place::Device { address, bytes, .. } => {
                let from = lease.allocation()?;
                let offset = address - from.address();
                digest(
                    &from
                        .device()
                        .download(from, offset, bytes.get())
                        .await
                        .ok()?,
                )
            }
        };
        read.insert(tensor.name.to_owned(), digest);
    }
    Some(read)
}
