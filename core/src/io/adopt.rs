//! Finding out that memory which another process offers holds a component, before anybody else sees it.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::image::check_identity;
use super::{ImagePlan, ReadError, Verifier, owned};
use crate::catalog::Component;
use crate::memory::{FrozenError, OfferedMemory, Slab};
use crate::tensor::TensorTable;
use crate::units::{Bytes, MIB};

/// What is looked at between two looks at whether anybody still wants it.
const STEP: usize = (4 * MIB) as usize;

/// Why offered memory is not a component's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// It cannot be taken, whatever it holds.
    #[error(transparent)]
    Memory(#[from] FrozenError),
    /// The component's files cannot be looked at, or are not those of the catalogue any more.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It holds other bytes.
    #[error("it holds other bytes, the first at {offset}")]
    OtherBytes {
        /// Where the difference was found.
        offset: u64,
    },
    /// Nobody wants it any more.
    #[error("nobody wants it any more")]
    CalledOff,
}

/// How the bytes were compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// By the digest that the catalogue has of the component: nothing but headers was read.
    Digest,
    /// With the files, which were read once more, into no memory that is kept.
    Files,
}

/// A component in memory that was offered.
#[derive(Debug)]
pub struct Adopted {
    /// The memory; nobody can write it.
    pub slab: Arc<Slab>,
    /// The tensors in it.
    pub table: Arc<TensorTable>,
    /// How that is known.
    pub proof: Proof,
}

/// Takes offered memory for a component, where every byte of it is the component's. `going_on` is asked between two pieces.
/// Blocks.
///
/// # Errors
/// [`AdoptError`].
pub fn adopt(
    component: &Component,
    offered: &OfferedMemory,
    going_on: &dyn Fn(Bytes) -> bool,
) -> Result<Adopted, AdoptError> {
    let plan = ImagePlan::open(component)?;
    let frozen = offered.freeze(plan.bytes)?;
    let proof = match Verifier::new(component) {
        Some(verifier) => by_digest(verifier, frozen.as_slice(), going_on)?,
        None => by_files(&plan, frozen.as_slice(), going_on)?,
    };
    Ok(Adopted {
        slab: frozen.accept(),
        table: plan.table,
        proof,
    })
}

fn wanted(at: usize, going_on: &dyn Fn(Bytes) -> bool) -> Result<(), AdoptError> {
    match going_on(Bytes(at as u64)) {
        true => Ok(()),
        false => Err(AdoptError::CalledOff),
    }
}

fn by_digest(
    mut verifier: Verifier,
    image: &[u8],
    going_on: &dyn Fn(Bytes) -> bool,
) -> Result<Proof, AdoptError> {
    let mut at = 0;
    while at < image.len() {
        wanted(at, going_on)?;
        at = at.saturating_add(STEP).min(image.len());
        verifier.take(&image[..at]);
    }
    match verifier.finish() {
        Ok(()) => Ok(Proof::Digest),
        // The digest says that it is another one, not where.
        Err(ReadError::WrongBytes { .. }) => Err(AdoptError::OtherBytes { offset: 0 }),
        Err(error) => Err(error.into()),
    }
}

fn by_files(
    plan: &ImagePlan,
    image: &[u8],
    going_on: &dyn Fn(Bytes) -> bool,
) -> Result<Proof, AdoptError> {
    let mut buffer = vec![0; STEP];
    for extent in &plan.extents {
        let Some((source, file)) = plan.files.get(extent.file) else {
            continue;
        };
        let (mut from, mut at) = (extent.start, extent.image_offset as usize);
        while from < extent.end {
            wanted(at, going_on)?;
            let length = (extent.end - from).min(STEP as u64) as usize;
            let piece = &mut buffer[..length];
            file.read_exact_at(piece, from)
                .map_err(|error| ReadError::Io {
                    path: owned(&source.path),
                    offset: from,
                    source: error,
                })?;
            // The plan's extents end within its image.
            let found = &image[at..at + length];
            if found != piece {
                let differs = found.iter().zip(&*piece).position(|(a, b)| a != b);
                return Err(AdoptError::OtherBytes {
                    offset: (at + differs.unwrap_or(0)) as u64,
                });
            }
            from += length as u64;
            at += length;
        }
    }
    for (source, file) in &plan.files {
        check_identity(file, source, "while it was compared")?;
    }
    Ok(Proof::Files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::content::{Unhurried, digest};
    use crate::catalog::test_utils::{put, safetensors};
    use crate::catalog::{ScanOptions, scan};

    /// A component of one file, and the memory of a server that read it and is gone, with one byte spoilt perhaps.
    fn offered(spoil: Option<usize>) -> (tempfile::TempDir, Component, OfferedMemory) {
        let folder = tempfile::tempdir().unwrap();
        put(
            folder.path(),
            "one.safetensors",
            safetensors(&[("a", &[9000]), ("b", &[100])], &[]),
        );
        let options = ScanOptions::new(vec![folder.path().to_owned()]);
        let report = scan(&options, None, &|_| {});
        let model = report.catalogue.models().next().cloned().unwrap();
        let component = (*model.components[0]).clone();
        let mut image = std::fs::read(folder.path().join("one.safetensors")).unwrap();
        image.resize(image.len().next_multiple_of(4096), 0);
        if let Some(at) = spoil {
            image[at] ^= 1;
        }
        let mut writer = Slab::create("test", Bytes(image.len() as u64)).unwrap();
        writer.spare().copy_from_slice(&image);
        writer.advance(image.len());
        let slab = writer.seal().unwrap();
        let offered = OfferedMemory::new(slab.read_only_descriptor().unwrap()).unwrap();
        (folder, component, offered)
    }

    #[test]
    fn a_components_bytes_are_taken_and_no_others() {
        for digested in [false, true] {
            for spoil in [None, Some(10), Some(9001)] {
                let (_folder, mut component, offered) = offered(spoil);
                if digested {
                    component.content_id = digest(&component, &mut Unhurried).unwrap();
                }
                match (adopt(&component, &offered, &|_| true), spoil) {
                    (Ok(adopted), None) => {
                        let proof = if digested {
                            Proof::Digest
                        } else {
                            Proof::Files
                        };
                        assert_eq!(adopted.proof, proof);
                        assert_eq!(adopted.table.len(), 2);
                    }
                    (Err(AdoptError::OtherBytes { offset }), Some(at)) => {
                        assert_eq!(offset, if digested { 0 } else { at as u64 });
                    }
                    (other, _) => panic!("{spoil:?} {digested}: {other:?}"),
                }
            }
        }
    }

    #[test]
    fn it_ends_when_nobody_wants_it_and_when_the_file_is_another_one() {
        let (folder, component, offered) = offered(None);
        let off = adopt(&component, &offered, &|_| false).unwrap_err();
        assert!(matches!(off, AdoptError::CalledOff), "{off}");
        put(folder.path(), "one.safetensors", vec![1; 20_000]);
        let changed = adopt(&component, &offered, &|_| true).unwrap_err();
        let is_changed = matches!(&changed, AdoptError::Read(ReadError::SourceChanged { .. }));
        assert!(is_changed, "{changed}");
    }
}
