//! The models that a run is about, what their bytes are, and what is done to some of them meanwhile.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hotset::core::catalog::{ScanOptions, scan};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{RngCore, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::digest;
use crate::cli::demo::library as demo;

/// Single files that are left alone.
const SINGLES: usize = 10;
/// Single files that are truncated, replaced and deleted.
const VICTIMS: usize = 3;

/// What is done to a victim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Harm {
    Truncate,
    Replace,
    Delete,
    HalfWrite,
}

/// A library in a folder.
#[derive(Debug)]
pub(super) struct Library {
    /// Digests that a component may have: a victim has one for each of its versions.
    expected: HashMap<String, HashSet<String>>,
    versions: u64,
    victims: Vec<PathBuf>,
    /// The victim that is on a disk of its own, which can be full.
    tight: PathBuf,
    /// Victims to be made whole again, and when.
    mending: Vec<(PathBuf, Instant)>,
}

impl Library {
    /// Makes one; a part of it in `small`.
    pub(super) fn make(folder: &Path, small: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        demo::make(folder, demo::Scale::Tiny, |_| {})?;
        let mut library = Self {
            expected: HashMap::new(),
            versions: 0,
            victims: (0..VICTIMS)
                .map(|i| folder.join(format!("victim-{i}.safetensors")))
                .collect(),
            tight: small.join("tight.safetensors"),
            mending: Vec::new(),
        };
        for i in 0..SINGLES {
            let path = folder.join(format!("single-{i}.safetensors"));
            fs::write(path, contents(1000 + i as u64, 1 + (i as u64 * 5) % 8)?)?;
        }
        let report = scan(&ScanOptions::new(vec![folder.to_owned()]), None, &|_| {});
        for component in report
            .catalogue
            .models()
            .flat_map(|model| &model.components)
        {
            // Parts of files and sets of shards are held against each other by their content alone.
            if let ([file], None) = (&component.files[..], &component.selection) {
                let digest = digest::of_file(&file.path)?;
                library.allow(&component.id.to_string(), digest);
            }
        }
        library.victims.push(library.tight.clone());
        for path in library.victims.clone() {
            library.write(&path)?;
        }
        Ok(library)
    }

    /// So many small models more, in a folder of their own.
    pub(super) fn many(&self, folder: &Path, count: usize) -> io::Result<()> {
        fs::create_dir_all(folder)?;
        for i in 0..count {
            let value = (i as u64).to_le_bytes();
            let tensor = TensorView::new(Dtype::U8, vec![value.len()], &value);
            let tensor = tensor.map_err(io::Error::other)?;
            let file = safetensors::serialize([("weight", tensor)], None);
            let file = file.map_err(io::Error::other)?;
            fs::write(folder.join(format!("small-{i}.safetensors")), file)?;
        }
        Ok(())
    }

    fn allow(&mut self, component: &str, digest: String) {
        self.expected
            .entry(component.to_owned())
            .or_default()
            .insert(digest);
    }

    /// Whether a component may have these bytes; `None` where nothing is known of it.
    pub(super) fn allows(&self, component: &str, digest: &str) -> Option<bool> {
        Some(self.expected.get(component)?.contains(digest))
    }

    /// Writes a new version of a victim, as a downloader does: beside it, then in its place.
    fn write(&mut self, path: &Path) -> io::Result<()> {
        self.versions += 1;
        let beside = path.with_extension("part");
        fs::write(&beside, contents(self.versions, 2)?)?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        // Allowed before it can be seen.
        let digest = digest::of_file(&beside)?;
        self.allow(&format!("{name}/model"), digest);
        fs::rename(&beside, path)
    }

    /// Harms a victim; it is made whole again a little later.
    pub(super) fn harm(&mut self, i: usize, harm: Harm) -> io::Result<()> {
        let Some(path) = self.victims.get(i % self.victims.len()).cloned() else {
            return Ok(());
        };
        match harm {
            Harm::Replace => return self.write(&path),
            Harm::Delete => match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            },
            Harm::Truncate => match File::options().write(true).open(&path) {
                Ok(file) => file.set_len(file.metadata()?.len() / 2)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            },
            Harm::HalfWrite => {
                self.versions += 1;
                let whole = contents(self.versions, 2)?;
                // A file of its own, so that nothing that is mapped or read changes under its reader.
                let _ = fs::remove_file(&path);
                File::create(&path)?.write_all(&whole[..whole.len() / 2])?;
            }
        }
        let at = Instant::now() + Duration::from_millis(700);
        self.mending.push((path, at));
        Ok(())
    }

    /// On a full disk: half of a new version is there, and the rest never comes.
    pub(super) fn download_fails(&mut self) -> io::Result<()> {
        self.versions += 1;
        let whole = contents(self.versions, 2)?;
        let beside = self.tight.with_extension("part");
        match fs::write(&beside, &whole) {
            // As one does who does not look at what his write said.
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                fs::rename(&beside, &self.tight)?;
            }
            Err(error) => return Err(error),
            // Where the disk is not full after all, nothing has happened.
            Ok(()) => fs::remove_file(&beside)?,
        }
        let at = Instant::now() + Duration::from_millis(700);
        self.mending.push((self.tight.clone(), at));
        Ok(())
    }

    /// Makes whole what is due; all of it where `all`.
    pub(super) fn mend(&mut self, all: bool) -> io::Result<()> {
        let now = Instant::now();
        let due = |entry: &(PathBuf, Instant)| all || entry.1 <= now;
        let mending = std::mem::take(&mut self.mending);
        let (due, later): (Vec<_>, Vec<_>) = mending.into_iter().partition(due);
        self.mending = later;
        for (path, _) in due {
            self.write(&path)?;
        }
        Ok(())
    }
}

/// A file of so many MiB whose bytes belong to this version alone.
fn contents(version: u64, mib: u64) -> io::Result<Vec<u8>> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(version);
    let mut tensors = Vec::new();
    for i in 0..mib * 4 {
        let mut bytes = vec![0; 256 << 10];
        rng.fill_bytes(&mut bytes);
        tensors.push((format!("blocks.{i}.weight"), bytes));
    }
    let views = tensors.iter().map(|(name, bytes)| {
        TensorView::new(Dtype::U8, vec![bytes.len()], bytes).map(|view| (name.as_str(), view))
    });
    let views: Vec<_> = views.collect::<Result<_, _>>().map_err(io::Error::other)?;
    safetensors::serialize(views, None).map_err(io::Error::other)
}
