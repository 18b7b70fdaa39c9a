//! The header of a weight file of either format, told apart by how the file begins.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::{gguf, safetensors};
use crate::tensor::HeaderTensor;

/// What is wrong with the header of a weight file.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
#[non_exhaustive]
pub enum HeaderError {
    /// Of a safetensors file.
    Safetensors(#[from] safetensors::HeaderError),
    /// Of a GGUF file.
    Gguf(#[from] gguf::GgufError),
}

/// Reads and checks the header of an open file of `file_len` bytes: where its data begin, and its tensors. Blocks.
///
/// # Errors
/// What is wrong with the file, or that it cannot be read.
pub fn read_tensors(file: &File, file_len: u64) -> Result<(u64, Vec<HeaderTensor>), HeaderError> {
    let mut magic = [0; 4];
    // A safetensors file begins with its header's length, which is never as large as these bytes would make it.
    if file_len >= 4 {
        file.read_exact_at(&mut magic, 0)
            .map_err(safetensors::HeaderError::from)?;
    }
    if &magic == b"GGUF" {
        let header = gguf::read_header(file, file_len)?;
        Ok((header.data_start, header.tensors))
    } else {
        let header = safetensors::read_header(file, file_len)?;
        Ok((header.data_start, header.tensors))
    }
}
