//! The Python loaders on the same files: `benches/peers/load.py` measures, this asks.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::cli::CliError;

/// One Python loader.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Peer {
    /// Its name, with what it loads into.
    pub(super) name: String,
    /// Its version.
    #[serde(default)]
    pub(super) version: Option<String>,
    /// From disk, until all bytes were touched.
    #[serde(default)]
    pub(super) cold_gbps: Option<f64>,
    /// From the page cache, until all bytes were touched.
    #[serde(default)]
    pub(super) cached_gbps: Option<f64>,
    /// Cold over plain direct reads in the same run.
    #[serde(default)]
    pub(super) cold_over_raw: Option<f64>,
    /// Why it was not measured.
    #[serde(default)]
    pub(super) skipped: Option<String>,
}

/// Measures all that are installed, into host memory or onto a GPU as PyTorch names it (`cuda:0`); those that are not are listed with the reason.
pub(super) fn measure(
    python: &Path,
    script: &Path,
    files: &[PathBuf],
    device: Option<&str>,
) -> Result<Vec<Peer>, CliError> {
    let output = Command::new(python)
        .arg(script)
        .args(device.map(|device| format!("--device={device}")))
        .args(files)
        .output()
        .map_err(|source| CliError::File {
            path: python.to_owned(),
            source,
        })?;
    if !output.status.success() {
        return Err(CliError::Usage(format!(
            "{} {} failed: {}",
            python.display(),
            script.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        )));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| {
        CliError::Usage(format!(
            "{} printed no list of peers: {error}",
            script.display()
        ))
    })
}
