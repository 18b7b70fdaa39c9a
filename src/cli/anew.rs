//! Replaces this process by a fresh start of the same program, with the same arguments and the same id.

use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::io::{FdFlags, fcntl_setfd};

use super::CliError;

/// Does so; comes back only where that fails. The running program is started, also where its file was replaced meanwhile.
pub(crate) fn start() -> CliError {
    let mut arguments = std::env::args_os();
    let mut command = Command::new(program());
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    command.args(arguments);
    let source = match close_all_on_exec() {
        Ok(()) => command.exec(),
        Err(error) => error,
    };
    CliError::Anew { source }
}

/// The program's own file, by whose name the process is known, or the kernel's link to it where that is another one by now.
fn program() -> PathBuf {
    let link = PathBuf::from("/proc/self/exe");
    let which = |path: &Path| {
        let metadata = std::fs::metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    match std::env::current_exe() {
        Ok(path) if which(&path).is_some() && which(&path) == which(&link) => path,
        _ => link,
    }
}

/// Libraries may have opened descriptors that would go on into the new program, and memory of a GPU lives as long as one of them.
fn close_all_on_exec() -> io::Result<()> {
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        let Some(number) = name.to_str().and_then(|name| name.parse::<RawFd>().ok()) else {
            continue;
        };
        if number > 2 {
            // SAFETY: only borrowed for the call. Where it was closed since it was listed, the call fails, and nothing was to be done.
            let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
            let _ = fcntl_setfd(descriptor, FdFlags::CLOEXEC);
        }
    }
    Ok(())
}
