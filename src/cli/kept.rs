//! The catalogue that is kept between commands: what has not changed since the last one costs a `stat`, not a header.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use hotset::core::catalog::store::Store;
use hotset::core::catalog::{ScanOptions, ScanProgress, ScanReport, scan};
use sha2::{Digest, Sha256};

/// A library of fewer entries is read anew as quickly, and is no reason to write into the user's cache folder.
const WORTH_KEEPING: usize = 200;

/// Where the catalogue of these folders is kept where the configuration does not say: in the user's cache folder.
pub(crate) fn database(roots: &[PathBuf]) -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let cache = set("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| set("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    let mut hasher = Sha256::new();
    for root in roots {
        let root = std::path::absolute(root).unwrap_or_else(|_| root.clone());
        hasher.update(root.as_os_str().as_bytes());
        hasher.update([0]);
    }
    let number = hasher.finalize();
    let name: String = number[..8].iter().map(|b| format!("{b:02x}")).collect();
    Some(
        cache
            .join(OsStr::new("hotset"))
            .join(format!("catalogue-{name}.db")),
    )
}

/// Scans, from what the database knows. What is wrong with the database is told and never stops the scan. Blocks.
pub(crate) fn scan_from(
    options: &ScanOptions,
    database: Option<PathBuf>,
    progress: &(dyn Fn(ScanProgress) + Sync),
) -> ScanReport {
    let database = database.or_else(|| self::database(&options.roots));
    let (mut store, previous) = match database.as_deref().filter(|path| path.exists()) {
        None => (None, None),
        Some(path) => match Store::open(path).and_then(|mut store| {
            let previous = store.load()?;
            Ok((store, previous))
        }) {
            Ok((store, previous)) => (Some(store), Some(previous)),
            Err(error) => {
                tracing::warn!(%error, "the kept catalogue is not used");
                (None, None)
            }
        },
    };
    let report = scan(options, previous.as_ref(), progress);
    let changed = previous.is_none_or(|p| p.generation() != report.catalogue.generation());
    if changed && report.catalogue.len() >= WORTH_KEEPING {
        let saved = match (&mut store, database) {
            (Some(store), _) => store.save(&report.catalogue),
            (None, Some(path)) => {
                Store::open(&path).and_then(|mut store| store.save(&report.catalogue))
            }
            (None, None) => Ok(()),
        };
        if let Err(error) = saved {
            tracing::warn!(%error, "the catalogue could not be kept");
        }
    }
    report
}
