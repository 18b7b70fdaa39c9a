//! The image of a component: which bytes of which file lie where.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use super::{ReadError, owned};
use crate::catalog::safetensors::read_header;
use crate::catalog::{Component, IMAGE_ALIGN, SourceFile, identity_of};
use crate::tensor::{TensorEntry, TensorTable};
use crate::units::Bytes;

/// One file's place in the image.
#[derive(Debug)]
pub struct Extent {
    /// The file as it was scanned.
    pub source: SourceFile,
    /// Open since the plan was made, so that a file replaced by another one is not half of each.
    pub file: File,
    /// Where its first byte goes, a multiple of [`IMAGE_ALIGN`].
    pub image_offset: u64,
}

/// All files of a component, open and checked, with the places of their tensors.
#[derive(Debug)]
pub struct ImagePlan {
    /// The files, in the order of the image.
    pub extents: Vec<Extent>,
    /// The tensors, with offsets into the image.
    pub table: Arc<TensorTable>,
    /// Length of the image.
    pub bytes: Bytes,
}

impl ImagePlan {
    /// Opens the component's files, checks that each is the one that was scanned, and reads their headers. Blocks.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn open(component: &Component) -> Result<Self, ReadError> {
        let mut extents = Vec::with_capacity(component.files.len());
        let mut entries = Vec::with_capacity(component.tensors as usize);
        let mut image_offset = 0_u64;
        for source in &component.files {
            let file = open_checked(source)?;
            let size = source.identity.size.get();
            let header = read_header(&file, size).map_err(|error| ReadError::Header {
                path: owned(&source.path),
                source: error,
            })?;
            // The header is valid for `size`, so each tensor ends within the file, and the sums cannot overflow: the
            // image is as long as files that exist.
            for tensor in header.tensors {
                entries.push(TensorEntry {
                    name: tensor.name,
                    dtype: tensor.dtype,
                    shape: tensor.shape,
                    offset: image_offset + header.data_start + tensor.start,
                    bytes: tensor.end - tensor.start,
                });
            }
            extents.push(Extent {
                source: source.clone(),
                file,
                image_offset,
            });
            image_offset = Bytes(image_offset)
                .saturating_add(source.identity.size.round_up(IMAGE_ALIGN))
                .get();
        }
        let table = TensorTable::new(entries).map_err(|tensor| ReadError::DuplicateTensor {
            component: component.id.to_string(),
            tensor,
        })?;
        Ok(Self {
            extents,
            table: Arc::new(table),
            bytes: Bytes(image_offset),
        })
    }
}

/// Opens a file for reading and makes sure that it is the one that was scanned.
fn open_checked(source: &SourceFile) -> Result<File, ReadError> {
    // Without NONBLOCK, a FIFO that took the file's place would hold the thread for ever.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open(&source.path)
        .map_err(|error| ReadError::Open {
            path: owned(&source.path),
            source: error,
        })?;
    check_identity(&file, source, "since it was scanned")?;
    Ok(file)
}

/// Whether an open file is still in the state in which it was scanned.
pub(super) fn check_identity(
    file: &File,
    source: &SourceFile,
    when: &'static str,
) -> Result<(), ReadError> {
    let metadata = file.metadata().map_err(|error| ReadError::Io {
        path: owned(&source.path),
        offset: 0,
        source: error,
    })?;
    if !metadata.is_file() {
        return Err(ReadError::NotAFile {
            path: owned(&source.path),
        });
    }
    let found = identity_of(&metadata);
    if found == source.identity {
        Ok(())
    } else {
        Err(ReadError::SourceChanged {
            path: owned(&source.path),
            when,
            expected: source.identity,
            found,
        })
    }
}
