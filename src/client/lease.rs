//! Leases of a server's memory, and the tensors in it.

use std::sync::{Arc, OnceLock};

use hotset_core::device::Export;
use serde::Deserialize;

use super::ClientError;
use super::link::Link;
use super::mapping::Mapping;
use crate::bridge::frame::read;
use crate::bridge::wire::LeasedComponent;

/// One row of a tensor table.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Row {
    pub(super) name: Box<str>,
    dtype: Box<str>,
    shape: Vec<u64>,
    offset: u64,
    bytes: u64,
}

/// A tensor table as it came, read when a tensor is asked for.
#[derive(Debug)]
pub(super) struct Table {
    written: Vec<u8>,
    rows: OnceLock<Result<Vec<Row>, String>>,
}

impl Table {
    pub(super) const fn new(written: Vec<u8>) -> Self {
        Self {
            written,
            rows: OnceLock::new(),
        }
    }

    fn rows(&self) -> Result<&[Row], ClientError> {
        self.rows
            .get_or_init(|| read(&self.written).map_err(|error| error.to_string()))
            .as_deref()
            .map_err(|reason| ClientError::Protocol {
                reason: format!("a tensor table is malformed: {reason}"),
            })
    }
}

/// What a lease's memory is to this client.
#[derive(Debug, Clone)]
pub(super) enum Memory {
    Mapped(Arc<Mapping>),
    /// On a GPU; it can be imported there.
    Device(Arc<Export>),
    /// It cannot be mapped, for this reason.
    Elsewhere(Arc<str>),
}

/// The right to use one component in the server's memory. Dropping it ends the lease.
#[derive(Debug)]
pub struct RemoteLease {
    pub(super) link: Arc<Link>,
    pub(super) leased: LeasedComponent,
    pub(super) memory: Memory,
    pub(super) table: Arc<Table>,
}

/// One tensor of a leased component.
#[derive(Debug, Clone, Copy)]
pub struct RemoteTensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// Element type, in safetensors notation.
    pub dtype: &'a str,
    /// Shape, outermost dimension first, in elements; row-major without gaps.
    pub shape: &'a [u64],
    /// Its bytes, where they lie.
    pub bytes: &'a [u8],
}

impl RemoteLease {
    /// What the server said of it: numbers, component, content, tier, bytes.
    #[must_use]
    pub const fn leased(&self) -> &LeasedComponent {
        &self.leased
    }

    /// The mapped memory.
    ///
    /// # Errors
    /// [`ClientError::Map`] where it lies where this process cannot map it.
    pub fn mapping(&self) -> Result<&Arc<Mapping>, ClientError> {
        match &self.memory {
            Memory::Mapped(mapping) => Ok(mapping),
            Memory::Device(export) => Err(self.cannot_map(&format!(
                "it lies on the GPU {}; import it there (RemoteLease::export)",
                export.uuid
            ))),
            Memory::Elsewhere(reason) => Err(self.cannot_map(reason)),
        }
    }

    fn cannot_map(&self, reason: &str) -> ClientError {
        ClientError::Map {
            component: self.leased.component.clone(),
            reason: reason.to_owned(),
        }
    }

    /// The memory on its GPU, for [`Imported`](hotset_core::device::cuda::Imported) to map. What is imported may be used as
    /// long as this lease lives.
    ///
    /// # Errors
    /// [`ClientError::Map`] where it lies in host memory, or cannot be shared, or descriptors ran out.
    pub fn export(&self) -> Result<Export, ClientError> {
        let export = match &self.memory {
            Memory::Device(export) => export,
            Memory::Mapped(_) => return Err(self.cannot_map("it lies in host memory")),
            Memory::Elsewhere(reason) => return Err(self.cannot_map(reason)),
        };
        let descriptor = export.descriptor.try_clone();
        Ok(Export {
            descriptor: descriptor.map_err(|error| self.cannot_map(&error.to_string()))?,
            mapped: export.mapped,
            offset: export.offset,
            bytes: export.bytes,
            uuid: export.uuid.clone(),
        })
    }

    /// Where each tensor lies in [`export`](Self::export)ed memory: name, offset from its first byte, and bytes.
    ///
    /// # Errors
    /// [`ClientError::Protocol`].
    pub fn places(&self) -> Result<Vec<(&str, u64, u64)>, ClientError> {
        let rows = self.table.rows()?.iter();
        Ok(rows
            .map(|row| (&*row.name, row.offset, row.bytes))
            .collect())
    }

    /// All tensors in a copy of [`export`](Self::export)ed memory, such as
    /// [`Imported::read`](hotset_core::device::cuda::Imported::read) makes.
    ///
    /// # Errors
    /// [`ClientError::Protocol`], where the copy is too short too.
    pub fn tensors_in<'a>(&'a self, copy: &'a [u8]) -> Result<Vec<RemoteTensor<'a>>, ClientError> {
        let rows = self.table.rows()?.iter();
        rows.map(|row| view(copy, row)).collect()
    }

    /// All tensors, by name.
    ///
    /// # Errors
    /// [`ClientError::Map`], [`ClientError::Protocol`].
    pub fn tensors(&self) -> Result<Vec<RemoteTensor<'_>>, ClientError> {
        self.tensors_in(self.mapping()?.as_slice())
    }

    /// The tensor of this name, where there is one.
    ///
    /// # Errors
    /// [`ClientError::Map`], [`ClientError::Protocol`].
    pub fn tensor(&self, name: &str) -> Result<Option<RemoteTensor<'_>>, ClientError> {
        let memory = self.mapping()?.as_slice();
        let rows = self.table.rows()?;
        let found = rows.binary_search_by(|row| (*row.name).cmp(name)).ok();
        found.map(|at| view(memory, &rows[at])).transpose()
    }
}

fn view<'a>(memory: &'a [u8], row: &'a Row) -> Result<RemoteTensor<'a>, ClientError> {
    let end = row.offset.checked_add(row.bytes);
    let range = |from, to| Some(usize::try_from(from).ok()?..usize::try_from(to).ok()?);
    let bytes = end
        .and_then(|end| range(row.offset, end))
        .and_then(|range| memory.get(range))
        .ok_or_else(|| ClientError::Protocol {
            reason: format!("tensor `{}` lies outside of its memory", row.name),
        })?;
    Ok(RemoteTensor {
        name: &row.name,
        dtype: &row.dtype,
        shape: &row.shape,
        bytes,
    })
}

impl Drop for RemoteLease {
    fn drop(&mut self) {
        self.link.release(self.leased.lease);
    }
}
