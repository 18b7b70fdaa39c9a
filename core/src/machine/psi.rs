//! The kernel's own alarm for stalls on memory.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

/// The alarm goes when tasks have waited for memory for so long ...
const STALL: Duration = Duration::from_millis(150);
/// ... within this time. Who is not privileged may ask for multiples of two seconds only.
const WINDOW: Duration = Duration::from_secs(2);

/// The alarm cannot be set.
#[derive(Debug, thiserror::Error)]
#[error("cannot watch {} for memory pressure: {source}; it is measured at intervals instead", path.display())]
pub struct TriggerError {
    /// The file of the kernel.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

/// A watch on stalls; ends when dropped.
#[derive(Debug)]
pub struct PressureTrigger {
    file: File,
}

impl PressureTrigger {
    /// Watches this file, `/proc/pressure/memory` or a control group's `memory.pressure`.
    ///
    /// # Errors
    /// [`TriggerError`]: the kernel has no pressure information, or this process may not ask.
    pub fn watch(path: &Path) -> Result<Self, TriggerError> {
        let failed = |source| TriggerError {
            path: path.to_owned(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(failed)?;
        let trigger = format!("some {} {}\0", STALL.as_micros(), WINDOW.as_micros());
        file.write_all(trigger.as_bytes()).map_err(failed)?;
        Ok(Self { file })
    }

    /// Waits until tasks stall, at most `most`. Blocks. `false` where the time passed, or the control group is gone.
    #[must_use]
    pub fn wait(&self, most: Duration) -> bool {
        let mut polled = [PollFd::new(&self.file, PollFlags::PRI)];
        let timeout = Timespec::try_from(most).ok();
        match poll(&mut polled, timeout.as_ref()) {
            Ok(1..) => polled
                .iter()
                .all(|polled| polled.revents().contains(PollFlags::PRI)),
            Ok(0) | Err(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alarm_can_be_set_where_the_kernel_has_one() {
        let path = Path::new("/proc/pressure/memory");
        match PressureTrigger::watch(path) {
            // Whether this machine is short of memory right now is not ours to say.
            Ok(trigger) => drop(trigger.wait(Duration::from_millis(1))),
            Err(error) => eprintln!("SKIPPED: {error}"),
        }
        let folder = tempfile::tempdir().unwrap();
        assert!(PressureTrigger::watch(&folder.path().join("none")).is_err());
    }
}
