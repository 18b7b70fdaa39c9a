//! What came onto a GPU, read back and compared with the files.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use hotset::{Bytes, Lease};

use super::blocking;
use super::files::Library;
use crate::cli::CliError;

/// Reads every tensor back from the GPU, and compares it with its file, which is read anew.
pub(super) async fn compare(library: &Library, leases: &[Lease]) -> Result<Bytes, CliError> {
    let mut compared = Bytes::ZERO;
    for path in &library.files {
        let lease = leases.iter().find(|lease| {
            let files = &lease.component().files;
            files.iter().any(|file| *file.path == **path)
        });
        let lease = lease.ok_or_else(|| differs(path, "none of the leases holds it"))?;
        let allocation = lease
            .allocation()
            .ok_or_else(|| differs(path, "it is not on the GPU"))?;
        for (name, start, bytes) in tensors(path)? {
            let place = lease.table().get(&name);
            let place = place.filter(|place| place.bytes == bytes);
            let place = place.ok_or_else(|| differs(path, &format!("`{name}` is missing")))?;
            let device = allocation.device();
            let on_gpu = device.download(allocation, place.offset, bytes).await?;
            let file = path.clone();
            let same = blocking(move || {
                let mut on_disk = vec![0; on_gpu.len()];
                let opened = File::open(&file).map_err(at(&file))?;
                opened
                    .read_exact_at(&mut on_disk, start)
                    .map_err(at(&file))?;
                Ok(on_disk == on_gpu)
            });
            if !same.await? {
                return Err(differs(
                    path,
                    &format!("`{name}` has other bytes on the GPU"),
                ));
            }
            compared += Bytes(bytes);
        }
    }
    Ok(compared)
}

fn at(path: &Path) -> impl Fn(std::io::Error) -> CliError + '_ {
    move |source| CliError::File {
        path: path.to_owned(),
        source,
    }
}

fn differs(path: &Path, how: &str) -> CliError {
    CliError::Different(format!("{}: {how}", path.display()))
}

/// The tensors of a file: name, first byte and length.
fn tensors(path: &Path) -> Result<Vec<(String, u64, u64)>, CliError> {
    let file = File::open(path).map_err(at(path))?;
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0).map_err(at(path))?;
    let start = 8 + u64::from_le_bytes(length);
    let size = file.metadata().map_err(at(path))?.len();
    if start > size {
        return Err(differs(path, "it is no safetensors file"));
    }
    let mut header = vec![0; (start - 8) as usize];
    file.read_exact_at(&mut header, 8).map_err(at(path))?;
    let header: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(&header).map_err(|error| differs(path, &error.to_string()))?;
    let places = header
        .into_iter()
        .filter(|(name, _)| name != "__metadata__");
    places
        .map(|(name, tensor)| {
            let offset = |i| tensor["data_offsets"][i].as_u64();
            match (offset(0), offset(1)) {
                (Some(from), Some(end)) if from <= end => Ok((name, start + from, end - from)),
                _ => Err(differs(path, &format!("`{name}` has no place"))),
            }
        })
        .collect()
}
