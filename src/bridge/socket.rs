//! The socket's place: a folder that nobody else can enter, one server at a time, and who may connect.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use tokio::net::UnixListener;

use super::BridgeError;

/// The longest path that a socket address holds, its closing zero included.
const LONGEST_PATH: usize = 108;

/// The default socket: `$XDG_RUNTIME_DIR/hotset/hotset.sock`, or where that is not set `~/.local/state/hotset/hotset.sock`.
#[must_use]
pub fn default_socket() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    set("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .or_else(|| set("HOME").map(|home| PathBuf::from(home).join(".local/state")))
        .map(|folder| folder.join("hotset/hotset.sock"))
}

/// A listening socket. Its lock is held, and the file removed at the end.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) listener: UnixListener,
    pub(super) path: PathBuf,
    _lock: File,
}

/// Opens the socket. `shared`: other users may connect, as far as the list of users allows.
pub(super) fn open(path: &Path, shared: bool) -> Result<Place, BridgeError> {
    let failed = |step: &'static str| {
        let path = path.to_owned();
        move |source: io::Error| BridgeError::Socket { path, step, source }
    };
    if path.as_os_str().len() >= LONGEST_PATH {
        return Err(BridgeError::PathTooLong {
            path: path.to_owned(),
            limit: LONGEST_PATH - 1,
        });
    }
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(failed("create its folder"))?;
    let metadata = std::fs::metadata(folder).map_err(failed("look at its folder"))?;
    let own = rustix::process::geteuid().as_raw();
    // Others may enter a folder that is shared on purpose, but never write into it.
    let forbidden = if shared { 0o022 } else { 0o077 };
    if metadata.uid() != own || metadata.mode() & forbidden != 0 {
        return Err(BridgeError::UnsafeFolder {
            folder: folder.to_owned(),
            owner: metadata.uid(),
            mode: metadata.mode() & 0o777,
        });
    }
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path.with_extension("lock"))
        .map_err(failed("open its lock"))?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(
        |error| match error {
            rustix::io::Errno::WOULDBLOCK => BridgeError::InUse {
                path: path.to_owned(),
            },
            error => failed("lock")(error.into()),
        },
    )?;
    // The lock is ours, so whoever made this file is gone.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed("remove the one of a server that is gone")(error));
        }
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed("bind"))?;
    let mode = if shared { 0o666 } else { 0o600 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .map_err(failed("set its mode"))?;
    Ok(Place {
        listener,
        path: path.to_owned(),
        _lock: lock,
    })
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_place_is_private_and_taken_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/hotset.sock");
        let place = open(&path, false).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        assert_eq!(mode(&path), 0o600);
        assert!(matches!(
            open(&path, false).unwrap_err(),
            BridgeError::InUse { .. }
        ));
        drop(place);
        assert!(!path.exists());
        // What a killed server leaves behind is no hindrance.
        std::fs::write(&path, "").unwrap();
        open(&path, false).unwrap();
    }

    #[tokio::test]
    async fn a_folder_that_others_may_enter_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let open_to_all = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(folder.path(), open_to_all).unwrap();
        let path = folder.path().join("hotset.sock");
        assert!(matches!(
            open(&path, false).unwrap_err(),
            BridgeError::UnsafeFolder { mode: 0o755, .. }
        ));
        open(&path, true).unwrap();
    }
}
