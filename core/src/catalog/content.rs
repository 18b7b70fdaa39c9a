//! The identity of bytes: digests of whole components, and samples that tell quickly which ones may be equal.
//!
//! Digests read every byte, so they are made in the background and slowly; a scan never waits for one. A sample reads a
//! few blocks: different samples mean different bytes, equal ones ask for a digest before any memory is shared.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::model::{Component, FileRange, Model, SourceFile};
use super::safetensors;
use super::snapshot::Catalogue;
use super::walk::identity_of;
use crate::ids::{ComponentId, ContentId};

/// Bytes that are read at once.
const CHUNK: usize = 1 << 20;

/// Blocks that a sample reads, spread evenly.
const SAMPLE_BLOCKS: u64 = 16;

/// Bytes of a sampled block.
const SAMPLE_BLOCK: u64 = 4096;

/// A digest that could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DigestError {
    /// A file could not be read.
    #[error("{} cannot be read: {source}", path.display())]
    Io {
        /// The file.
        path: Arc<Path>,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file is not what it was when it was scanned.
    #[error("{} changed since it was scanned; the next scan gives it a new identity", path.display())]
    Changed {
        /// The file.
        path: Arc<Path>,
    },
    /// A header is no longer what the scan saw.
    #[error("{}: {source}", path.display())]
    Header {
        /// The file.
        path: Arc<Path>,
        /// What is wrong with it.
        #[source]
        source: safetensors::HeaderError,
    },
    /// The one who asked wants it no more.
    #[error("the digest was called off")]
    CalledOff,
}

/// What a digest waits for after each megabyte: the pace, and whether it is still wanted.
pub trait Pace {
    /// How long to rest before the next megabyte; `None` calls the digest off.
    fn rest(&mut self) -> Option<Duration>;
}

/// As fast as the disk gives.
#[derive(Debug, Default, Clone, Copy)]
pub struct Unhurried;

impl Pace for Unhurried {
    fn rest(&mut self) -> Option<Duration> {
        Some(Duration::ZERO)
    }
}

/// The BLAKE3 digest of a component's bytes. Blocks, for as long as reading all of them takes.
///
/// Whole files are digested as they are, header and all. A part of a file is digested by its tensors' names, dtypes and
/// shapes and then their bytes, so that equal parts of different checkpoints are equal.
///
/// # Errors
/// That a file cannot be read or is not what it was.
pub fn digest(component: &Component, pace: &mut dyn Pace) -> Result<ContentId, DigestError> {
    let mut hasher = blake3::Hasher::new();
    for (index, source) in component.files.iter().enumerate() {
        let file = open(source)?;
        match &component.selection {
            None => {
                let size = source.identity.size.get();
                hasher.update(&size.to_le_bytes());
                read_range(source, &file, 0, size, &mut hasher, pace)?;
            }
            Some(selection) => {
                let header = safetensors::read_header(&file, source.identity.size.get()).map_err(
                    |error| DigestError::Header {
                        path: source.path.clone(),
                        source: error,
                    },
                )?;
                let mut held: Vec<_> = header
                    .tensors
                    .iter()
                    .filter(|tensor| selection.holds(&tensor.name))
                    .collect();
                held.sort_by(|a, b| a.name.cmp(&b.name));
                for tensor in held {
                    let text = format!("{}\0{:?}\0{:?}\0", tensor.name, tensor.dtype, tensor.shape);
                    hasher.update(text.as_bytes());
                    let start = header.data_start + tensor.start;
                    let end = header.data_start + tensor.end;
                    read_range(source, &file, start, end, &mut hasher, pace)?;
                }
                hasher.update(&(index as u64).to_le_bytes());
            }
        }
        unchanged(source, &file)?;
    }
    Ok(ContentId::Blake3(*hasher.finalize().as_bytes()))
}

/// A digest over a few blocks of a component, spread evenly over its bytes. Components with different samples differ.
///
/// # Errors
/// That a file cannot be read or is not what it was.
pub fn sample(component: &Component) -> Result<[u8; 32], DigestError> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&component.bytes.get().to_le_bytes());
    hasher.update(&component.tensors.to_le_bytes());
    let whole: Vec<FileRange>;
    let ranges = match &component.selection {
        Some(selection) => &selection.ranges,
        None => {
            whole = (0..)
                .zip(&component.files)
                .map(|(file, source)| FileRange {
                    file,
                    start: 0,
                    end: source.identity.size.get(),
                })
                .collect();
            &whole
        }
    };
    let total: u64 = ranges.iter().map(|r| r.end.saturating_sub(r.start)).sum();
    let mut block = vec![0; SAMPLE_BLOCK as usize];
    for i in 0..SAMPLE_BLOCKS {
        // The first and the last block are among them: headers and tails differ most.
        let last = total.saturating_sub(SAMPLE_BLOCK);
        let mut at = u128::from(last) * u128::from(i) / u128::from(SAMPLE_BLOCKS - 1);
        for range in ranges {
            let length = range.end.saturating_sub(range.start);
            if at >= u128::from(length) {
                at -= u128::from(length);
                continue;
            }
            let Some(source) = component.files.get(range.file as usize) else {
                break;
            };
            let file = open(source)?;
            let start = range.start + u64::try_from(at).unwrap_or(0);
            let want = (range.end - start).min(SAMPLE_BLOCK) as usize;
            file.read_exact_at(&mut block[..want], start)
                .map_err(|error| io_error(source, error))?;
            hasher.update(&block[..want]);
            break;
        }
    }
    Ok(*hasher.finalize().as_bytes())
}

/// Components that may hold the same bytes: as many bytes, tensors and dtypes, and equal samples. Each group has at
/// least two, none of which has a digest of its content yet in common with another.
///
/// Reads a few blocks of the components that agree in size, and of no others; what was sampled once is remembered in
/// `samples`. What cannot be read is left out.
#[must_use]
pub fn twins(
    catalogue: &Catalogue,
    samples: &mut HashMap<ContentId, [u8; 32]>,
) -> Vec<Vec<Arc<Component>>> {
    let mut alike: HashMap<_, Vec<&Arc<Component>>> = HashMap::new();
    for component in catalogue.models().flat_map(|model| &model.components) {
        let key = (component.bytes, component.tensors, component.dtype.clone());
        alike.entry(key).or_default().push(component);
    }
    let mut groups = Vec::new();
    for mut candidates in alike.into_values() {
        // Links to one file are known to be equal without a look.
        candidates.sort_by_key(|c| (c.content_id, c.id.clone()));
        candidates.dedup_by_key(|c| c.content_id);
        // Digests that differ are known to be different bytes.
        let open = |c: &&Arc<Component>| matches!(c.content_id, ContentId::File(_));
        if candidates.len() < 2 || !candidates.iter().any(open) {
            continue;
        }
        let mut sampled: HashMap<[u8; 32], Vec<Arc<Component>>> = HashMap::new();
        for component in candidates {
            let known = samples.get(&component.content_id).copied();
            if let Some(sample) = known.or_else(|| sample(component).ok()) {
                samples.insert(component.content_id, sample);
                let group = sampled.entry(sample).or_default();
                group.push(Arc::clone(component));
            }
        }
        groups.extend(sampled.into_values().filter(|group| group.len() > 1));
    }
    for group in &mut groups {
        group.sort_by(|a, b| a.id.cmp(&b.id));
    }
    groups.sort_by_key(|group| group.first().map(|c| c.id.clone()));
    groups
}

impl Catalogue {
    /// The same catalogue with other content ids for some components: what digests found.
    #[must_use]
    pub fn with_content_ids(&self, found: &HashMap<ComponentId, ContentId>) -> Self {
        let models = self
            .models()
            .map(|model| {
                if !model.components.iter().any(|c| found.contains_key(&c.id)) {
                    return Arc::clone(model);
                }
                let components = model
                    .components
                    .iter()
                    .map(|component| match found.get(&component.id) {
                        None => Arc::clone(component),
                        Some(content_id) => Arc::new(Component {
                            content_id: *content_id,
                            ..Component::clone(component)
                        }),
                    })
                    .collect();
                Arc::new(Model {
                    components,
                    ..Model::clone(model)
                })
            })
            .collect();
        Self::new(self.generation() + 1, models)
    }
}

/// The SHA-256 of a file, in hexadecimal digits, as the catalogues on the web list it. Blocks.
///
/// # Errors
/// What the system said.
pub fn sha256(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => hasher.update(&buffer[..n]),
        }
    }
    Ok(hasher
        .finalize()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect())
}

fn io_error(source: &SourceFile, error: io::Error) -> DigestError {
    DigestError::Io {
        path: source.path.clone(),
        source: error,
    }
}

fn open(source: &SourceFile) -> Result<File, DigestError> {
    let file = File::open(&source.path).map_err(|error| io_error(source, error))?;
    unchanged(source, &file)?;
    Ok(file)
}

fn unchanged(source: &SourceFile, file: &File) -> Result<(), DigestError> {
    let metadata = file.metadata().map_err(|error| io_error(source, error))?;
    if identity_of(&metadata) == source.identity {
        Ok(())
    } else {
        Err(DigestError::Changed {
            path: source.path.clone(),
        })
    }
}

fn read_range(
    source: &SourceFile,
    file: &File,
    mut at: u64,
    end: u64,
    hasher: &mut blake3::Hasher,
    pace: &mut dyn Pace,
) -> Result<(), DigestError> {
    let mut buffer = vec![0; CHUNK.min(usize::try_from(end - at).unwrap_or(CHUNK))];
    while at < end {
        let rest = pace.rest().ok_or(DigestError::CalledOff)?;
        if !rest.is_zero() {
            std::thread::sleep(rest);
        }
        let want = (end - at).min(CHUNK as u64) as usize;
        file.read_exact_at(&mut buffer[..want], at)
            .map_err(|error| io_error(source, error))?;
        hasher.update(&buffer[..want]);
        at += want as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::scan::{ScanOptions, scan};
    use super::super::test_utils::{put, safetensors};
    use super::*;

    #[test]
    fn equal_components_are_recognised_and_confirmed() {
        let root = tempfile::tempdir().unwrap();
        let file = safetensors(&[("w", &[4000])], &[]);
        let mut other = file.clone();
        *other.last_mut().unwrap() = 1;
        put(root.path(), "a.safetensors", &file);
        put(root.path(), "b.safetensors", &file);
        put(root.path(), "c.safetensors", &other);
        let options = ScanOptions::new(vec![root.path().to_path_buf()]);
        let catalogue = scan(&options, None, &|_| {}).catalogue;
        let groups = twins(&catalogue, &mut HashMap::new());
        assert_eq!(groups.len(), 1);
        let names: Vec<&str> = groups[0].iter().map(|c| c.id.model.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        let found: HashMap<ComponentId, ContentId> = catalogue
            .models()
            .flat_map(|model| &model.components)
            .map(|c| (c.id.clone(), digest(c, &mut Unhurried).unwrap()))
            .collect();
        let catalogue = catalogue.with_content_ids(&found);
        let id = |name: &str| catalogue.find(name).unwrap().components[0].content_id;
        assert_eq!(id("a"), id("b"));
        assert_ne!(id("a"), id("c"));
        // What is known stays known while the file is as it was.
        let again = scan(&options, Some(&catalogue), &|_| {}).catalogue;
        assert_eq!(again.find("a").unwrap().components[0].content_id, id("a"));
    }

    #[test]
    fn a_changed_file_gives_no_digest() {
        let root = tempfile::tempdir().unwrap();
        put(
            root.path(),
            "a.safetensors",
            safetensors(&[("w", &[40])], &[]),
        );
        let options = ScanOptions::new(vec![root.path().to_path_buf()]);
        let catalogue = scan(&options, None, &|_| {}).catalogue;
        put(
            root.path(),
            "a.safetensors",
            safetensors(&[("w", &[50])], &[]),
        );
        let component = &catalogue.find("a").unwrap().components[0];
        assert!(matches!(
            digest(component, &mut Unhurried),
            Err(DigestError::Changed { .. })
        ));
        let path = root.path().join("abc");
        std::fs::write(&path, "abc").unwrap();
        assert!(sha256(&path).unwrap().starts_with("ba7816bf"));
    }
}
