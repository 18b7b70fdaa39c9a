//! What is compared: a digest over a component's tensors, as a client sees them and as its file has them.

use std::io;
use std::path::Path;

use sha2::{Digest, Sha256};

/// Tensors up to this size are compared whole; of larger ones the first, middle and last bytes.
const WHOLE: usize = 4 << 20;
/// So many of each.
const PART: usize = 1 << 18;

/// Says of each tensor what is compared of it, so that the same can be said of a lease and of a file.
#[derive(Default)]
pub(super) struct Sum {
    tensors: Vec<(String, [u8; 32])>,
    bytes: u64,
}

impl Sum {
    /// Adds a tensor.
    pub(super) fn add(&mut self, name: &str, dtype: &str, shape: &[u64], bytes: &[u8]) {
        let mut hash = Sha256::new();
        hash.update(dtype);
        for dimension in shape {
            hash.update(dimension.to_le_bytes());
        }
        for part in compared(bytes) {
            hash.update(part);
            self.bytes += part.len() as u64;
        }
        self.tensors.push((name.to_owned(), hash.finalize().into()));
    }

    /// Bytes that were compared.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn finish(mut self) -> String {
        self.tensors.sort();
        let mut hash = Sha256::new();
        for (name, digest) in &self.tensors {
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name);
            hash.update(digest);
        }
        let digest: [u8; 32] = hash.finalize().into();
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The parts of a tensor that count.
fn compared(bytes: &[u8]) -> Vec<&[u8]> {
    if bytes.len() <= WHOLE {
        return vec![bytes];
    }
    let middle = (bytes.len() - PART) / 2;
    let starts = [0, middle, bytes.len() - PART];
    starts.map(|start| &bytes[start..start + PART]).to_vec()
}

/// The digest of a whole safetensors file, read without hotset's own reader.
pub(super) fn of_file(path: &Path) -> io::Result<String> {
    let file = std::fs::read(path)?;
    let file = safetensors::SafeTensors::deserialize(&file).map_err(io::Error::other)?;
    let mut sum = Sum::default();
    for (name, tensor) in file.iter() {
        let shape: Vec<u64> = tensor.shape().iter().map(|d| *d as u64).collect();
        let (dtype, bytes) = (tensor.dtype().to_string(), tensor.data());
        sum.add(name, &dtype, &shape, bytes);
    }
    Ok(sum.finish())
}
