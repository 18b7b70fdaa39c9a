//! Reading a component's files into a slab.
//!
//! The slab is the byte image of the files, headers included, each file on a page border, so that direct reads need no
//! second copy; of a component that shares its file with others, it is the image of its own ranges. A [`Reader`] opens a
//! component, which checks that the files are still those of the catalogue and where each tensor lies; the [`OpenComponent`] then fills a slab piece by piece. Identity is checked again when a file has
//! been read: a file that changed in between gives [`ReadError::SourceChanged`], and its bytes are shown to nobody.

mod adopt;
mod disk;
mod image;
mod opened;
mod pool;
mod pread;
mod priority;
mod queue;
mod stream;
mod urgency;
mod uring;
mod verify;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::future::BoxFuture;

pub use adopt::{AdoptError, Adopted, Proof, adopt};
pub use disk::{DiskReader, StartReaderError};
pub use image::ImagePlan;
pub use opened::{cached_share, drop_from_cache};
pub use pread::PreadReader;
pub use priority::idle_io_priority;
pub use urgency::Urgency;
pub use verify::Verifier;

use crate::catalog::{Component, FileIdentity, HeaderError};
use crate::ids::ContentId;
use crate::memory::SlabWriter;
use crate::tensor::TensorTable;
use crate::units::Bytes;

/// Why a component could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The file could not be opened.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The path no longer leads to a plain file.
    #[error("{} is not a regular file any more; scan again", path.display())]
    NotAFile {
        /// Which path.
        path: PathBuf,
    },
    /// The file is not the one that was scanned, or changed while it was read.
    #[error("{} changed {when} (was {}, is {}); it is loaded again once the catalogue has seen the change", path.display(), describe(expected), describe(found))]
    SourceChanged {
        /// Which file.
        path: PathBuf,
        /// When that was noticed.
        when: &'static str,
        /// As it was scanned.
        expected: FileIdentity,
        /// As it is.
        found: FileIdentity,
    },
    /// The file ended early.
    #[error("{} ends at byte {offset}, {missing} before its end; it was truncated while it was read", path.display())]
    Truncated {
        /// Which file.
        path: PathBuf,
        /// Where it ended.
        offset: u64,
        /// What is missing.
        missing: Bytes,
    },
    /// The device or the file system failed.
    #[error("reading {} failed at byte {offset}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The header is broken.
    #[error("{}: {source}", path.display())]
    Header {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: HeaderError,
    },
    /// The header has a tensor of the component where the catalogue knows none.
    #[error("{}: the tensor `{tensor}` is not where the catalogue has it; scan again", path.display())]
    Unplaced {
        /// Which file.
        path: PathBuf,
        /// Which tensor.
        tensor: Arc<str>,
    },
    /// Two files of one component name the same tensor.
    #[error(
        "{component}: the tensor `{tensor}` is in two files; the index and its shards do not belong together"
    )]
    DuplicateTensor {
        /// Which component.
        component: String,
        /// Which tensor.
        tensor: Arc<str>,
    },
    /// The bytes are not those of the digest that the catalogue has of them.
    #[error(
        "{component}: its bytes have the digest {found}, not {expected}; the disk or the file is damaged, fetch it again"
    )]
    WrongBytes {
        /// Which component.
        component: String,
        /// The digest in the catalogue.
        expected: ContentId,
        /// The digest of what was read.
        found: ContentId,
    },
    /// The read was called off, or its task was lost with its thread.
    #[error("the reading of {component} was interrupted")]
    Interrupted {
        /// Which component.
        component: String,
    },
}

fn describe(identity: &FileIdentity) -> String {
    format!("{}, inode {}", identity.size, identity.inode)
}

impl ReadError {
    /// Whether the same read may succeed when it is tried again soon.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::Io { source, .. } | Self::Open { source, .. }
                if matches!(source.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
        )
    }
}

/// Opens components for reading. Never blocks the async worker that polls it.
pub trait Reader: Send + Sync + fmt::Debug + 'static {
    /// The name of the way in which it reads, for status.
    fn name(&self) -> &'static str;

    /// The same with what led to it, in words.
    fn describe(&self) -> String {
        self.name().to_owned()
    }

    /// Opens a component: its files are those of the catalogue, and the header of each is valid.
    ///
    /// # Errors
    /// [`ReadError`].
    fn open(
        &self,
        component: Arc<Component>,
    ) -> BoxFuture<'static, Result<Box<dyn OpenComponent>, ReadError>>;

    /// The same for a reader that knows what is urgent; others take all alike.
    ///
    /// # Errors
    /// [`ReadError`].
    fn open_as(
        &self,
        component: Arc<Component>,
        urgency: Urgency,
    ) -> BoxFuture<'static, Result<Box<dyn OpenComponent>, ReadError>> {
        let _ = urgency;
        self.open(component)
    }
}

/// A component that is open for reading, from the first byte of its image to the last.
pub trait OpenComponent: Send + 'static {
    /// How long the image is.
    fn image_bytes(&self) -> Bytes;

    /// The tensors, with offsets into the image. Each lies within it.
    fn table(&self) -> &Arc<TensorTable>;

    /// Reads on, in pieces of at most `most` bytes, until the watermark of `into` has risen. At the end of the image, or
    /// where `into` has nothing spare, it reads none. More pieces may be under way when it returns; so the next call takes
    /// the same writer until that is full. On an error the writer is gone.
    ///
    /// # Errors
    /// [`ReadError`].
    fn read(
        self: Box<Self>,
        into: SlabWriter,
        most: Bytes,
    ) -> BoxFuture<'static, Result<ReadOn, ReadError>>;

    /// Ends reading early: when the future ends, nobody writes the slab any more. Dropping both instead is as safe, since
    /// pieces under way keep their memory, but leaves it in use for a while.
    fn stop(self: Box<Self>, into: SlabWriter) -> BoxFuture<'static, ()> {
        drop(into);
        futures::FutureExt::boxed(std::future::ready(()))
    }
}

/// What a read gives back: the component and the writer, both one piece further.
pub type ReadOn = (Box<dyn OpenComponent>, SlabWriter);

/// The path as errors carry it.
fn owned(path: &Path) -> PathBuf {
    path.to_path_buf()
}

#[cfg(test)]
mod tests;
