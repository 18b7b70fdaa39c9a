//! Reading the JSON files beside the weights: bounded in size and depth, since anybody may have written them.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::walk::passes;

/// The longest configuration that is read. Real ones have kilobytes.
pub(super) const MAX_CONFIG_BYTES: u64 = 8 << 20;

/// The longest shard index that is read. One line for each tensor; real ones have at most a few megabytes.
pub(super) const MAX_INDEX_BYTES: u64 = 64 << 20;

/// A JSON file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum ConfigError {
    #[error("{} cannot be read: {source}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is longer than the {limit} bytes that such a file may have; it is no configuration", path.display())]
    TooLong { path: PathBuf, limit: u64 },
    #[error("{} is not valid JSON ({source}); fetch it again", path.display())]
    Json {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

impl ConfigError {
    /// Whether it says nothing of the file.
    pub(super) fn passes(&self) -> bool {
        matches!(self, Self::Io { source, .. } if passes(source))
    }
}

/// Reads a JSON file of at most `limit` bytes. Nesting is bounded by serde_json.
pub(super) fn read(path: &Path, limit: u64) -> Result<Value, ConfigError> {
    let io_error = |source| ConfigError::Io {
        path: path.to_path_buf(),
        source,
    };
    // Non-blocking, so that a pipe put in the file's place cannot hold up the scan.
    let file = File::options()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32)
        .open(path)
        .map_err(io_error)?;
    let mut text = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut text)
        .map_err(io_error)?;
    if text.len() as u64 > limit {
        return Err(ConfigError::TooLong {
            path: path.to_path_buf(),
            limit,
        });
    }
    serde_json::from_slice(&text).map_err(|source| ConfigError::Json {
        path: path.to_path_buf(),
        source,
    })
}
