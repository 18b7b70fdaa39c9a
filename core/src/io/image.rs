//! The image of a component: which bytes of which file lie where.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use super::{ReadError, owned};
use crate::catalog::{Component, IMAGE_ALIGN, SourceFile, identity_of, read_tensors};
use crate::tensor::{TensorEntry, TensorTable};
use crate::units::Bytes;

/// Bytes of one file and their place in the image.
#[derive(Debug)]
pub struct Extent {
    /// Index into [`ImagePlan::files`].
    pub file: usize,
    /// First byte in the file, a multiple of [`IMAGE_ALIGN`].
    pub start: u64,
    /// End in the file.
    pub end: u64,
    /// Where the first byte goes, a multiple of [`IMAGE_ALIGN`].
    pub image_offset: u64,
}

/// All files of a component, open and checked, with the places of their bytes and tensors.
#[derive(Debug)]
pub struct ImagePlan {
    /// The files as they were scanned; open since the plan was made, so that a file replaced by another one is not half
    /// of each.
    pub files: Vec<(SourceFile, File)>,
    /// What is read, in the order of the image, without gaps but the padding between two extents.
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
        let mut plan = Self {
            files: Vec::with_capacity(component.files.len()),
            extents: Vec::with_capacity(component.files.len()),
            table: Arc::default(),
            bytes: Bytes::ZERO,
        };
        for source in &component.files {
            plan.files.push((source.clone(), open_checked(source)?));
        }
        match &component.selection {
            None => {
                for (file, (source, _)) in plan.files.iter().enumerate() {
                    push_extent(
                        &mut plan.extents,
                        &mut plan.bytes,
                        file,
                        0,
                        source.identity.size.get(),
                    );
                }
            }
            Some(selection) => {
                for range in &selection.ranges {
                    let start = range.start / IMAGE_ALIGN * IMAGE_ALIGN;
                    push_extent(
                        &mut plan.extents,
                        &mut plan.bytes,
                        range.file as usize,
                        start,
                        range.end,
                    );
                }
            }
        }
        let mut entries = Vec::with_capacity(component.tensors as usize);
        for (index, (source, file)) in plan.files.iter().enumerate() {
            let broken = |error| ReadError::Header {
                path: owned(&source.path),
                source: error,
            };
            let (data_start, tensors) =
                read_tensors(file, source.identity.size.get()).map_err(broken)?;
            for tensor in tensors {
                if component
                    .selection
                    .as_ref()
                    .is_some_and(|s| !s.holds(&tensor.name))
                {
                    continue;
                }
                // The header is valid for the file's size, so this cannot overflow.
                let (start, end) = (data_start + tensor.start, data_start + tensor.end);
                // Sorted by file and start, so the only candidate is the last that begins no later.
                let after = plan
                    .extents
                    .partition_point(|extent| (extent.file, extent.start) <= (index, start));
                let extent = after
                    .checked_sub(1)
                    .and_then(|i| plan.extents.get(i))
                    .filter(|extent| extent.file == index && end <= extent.end);
                let Some(extent) = extent else {
                    return Err(ReadError::Unplaced {
                        path: owned(&source.path),
                        tensor: tensor.name,
                    });
                };
                entries.push(TensorEntry {
                    name: tensor.name,
                    dtype: tensor.dtype,
                    shape: tensor.shape,
                    offset: extent.image_offset + (start - extent.start),
                    bytes: end - start,
                });
            }
        }
        for (_, file) in &plan.files {
            // Who reads the rest through the page cache wants it read ahead.
            advise(file, rustix::fs::Advice::Normal);
        }
        let table = TensorTable::new(entries).map_err(|tensor| ReadError::DuplicateTensor {
            component: component.id.to_string(),
            tensor,
        })?;
        plan.table = Arc::new(table);
        Ok(plan)
    }

    /// Where the extent after this one begins, or the image ends.
    #[must_use]
    pub fn next_offset(&self, extent: usize) -> u64 {
        self.extents
            .get(extent + 1)
            .map_or(self.bytes.get(), |next| next.image_offset)
    }
}

/// Adds bytes `start..end` of a file at the end of the image, and pads the image to the next border.
fn push_extent(extents: &mut Vec<Extent>, image: &mut Bytes, file: usize, start: u64, end: u64) {
    let image_offset = image.get();
    *image = image.saturating_add(Bytes(end.saturating_sub(start)).round_up(IMAGE_ALIGN));
    extents.push(Extent {
        file,
        start,
        end,
        image_offset,
    });
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
    // The header alone is read through the page cache: reading ahead could be megabytes of every small file.
    advise(&file, rustix::fs::Advice::Random);
    Ok(file)
}

/// Advice that a file system may ignore.
fn advise(file: &File, advice: rustix::fs::Advice) {
    if let Err(error) = rustix::fs::fadvise(file, 0, None, advice) {
        tracing::debug!(%error, ?advice, "fadvise");
    }
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
