//! Tensor tables as they go over the wire: written once for each residency, however many clients lease it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use hotset_core::tensor::TensorTable;
use serde::Serialize;
use serde::ser::SerializeSeq;

/// Tables looked through for dead ones at least this often: an entry of a dead table is a few hundred kilobytes at most.
const PRUNE_ABOVE: usize = 64;

/// The written tables of what is resident and was leased.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    written: Mutex<HashMap<usize, Written>>,
}

#[derive(Debug)]
struct Written {
    /// The key is this address; it cannot be another table's while the weak handle lives.
    table: Weak<TensorTable>,
    bytes: Arc<[u8]>,
}

struct Rows<'a>(&'a TensorTable);

impl Serialize for Rows<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut rows = serializer.serialize_seq(Some(self.0.len()))?;
        for tensor in self.0.iter() {
            rows.serialize_element(&(
                &*tensor.name,
                dtype_name(tensor.dtype),
                &tensor.shape,
                tensor.offset,
                tensor.bytes,
            ))?;
        }
        rows.end()
    }
}

fn dtype_name(dtype: hotset_core::tensor::Dtype) -> String {
    dtype.to_string()
}

impl Tables {
    /// The table as a `tables` entry carries it.
    pub(crate) fn write(
        &self,
        table: &Arc<TensorTable>,
    ) -> Result<Arc<[u8]>, rmp_serde::encode::Error> {
        let key = Arc::as_ptr(table) as usize;
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = written.get(&key)
            && known.table.strong_count() > 0
        {
            return Ok(known.bytes.clone());
        }
        let bytes: Arc<[u8]> = rmp_serde::to_vec(&Rows(table))?.into();
        if written.len() >= PRUNE_ABOVE && written.len().is_power_of_two() {
            written.retain(|_, entry| entry.table.strong_count() > 0);
        }
        written.insert(
            key,
            Written {
                table: Arc::downgrade(table),
                bytes: bytes.clone(),
            },
        );
        Ok(bytes)
    }
}
