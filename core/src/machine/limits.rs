//! Word of a control group's limits: somebody changed one, or the kernel had to keep one.
//!
//! A limit that falls leaves as much time as the kernel takes to find memory; a look at it once a second would come too late.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, poll};
use rustix::fs::inotify;
use rustix::time::Timespec;

use super::cgroup::Cgroup;

/// A watch on the limits of a control group and of all above it; ends when dropped.
#[derive(Debug)]
pub struct LimitWatch {
    /// Hears of files that are written: limits by whoever sets them, and of version 2 the counts of events by the kernel.
    written: OwnedFd,
    /// Version 1: the kernel looks for memory in vain.
    strained: Option<OwnedFd>,
}

impl LimitWatch {
    /// Watches.
    ///
    /// # Errors
    /// The system has no more watches, or none of the files is there.
    pub fn watch(cgroup: &Cgroup) -> io::Result<Self> {
        let written =
            inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        let mut watched = 0;
        for file in cgroup.told_by() {
            match inotify::add_watch(&written, &file, inotify::WatchFlags::MODIFY) {
                Ok(_) => watched += 1,
                Err(error) => tracing::debug!(%error, file = %file.display(), "not watched"),
            }
        }
        if watched == 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
        let strained = cgroup.folder().and_then(|folder| {
            strained(folder)
                .inspect_err(|error| tracing::debug!(%error, "no word of a group's strain"))
                .ok()
        });
        Ok(Self { written, strained })
    }

    /// Waits until there is word, at most `most`. Blocks. `false` where the time passed.
    #[must_use]
    pub fn wait(&self, most: Duration) -> bool {
        let timeout = Timespec::try_from(most).ok();
        let told = |polled: &PollFd<'_>| polled.revents().contains(PollFlags::IN);
        let (written, strained) = match &self.strained {
            None => {
                let mut polled = [PollFd::new(&self.written, PollFlags::IN)];
                // Where it fails, nothing is told.
                let _ = poll(&mut polled, timeout.as_ref());
                (told(&polled[0]), false)
            }
            Some(strained) => {
                let mut polled = [
                    PollFd::new(&self.written, PollFlags::IN),
                    PollFd::new(strained, PollFlags::IN),
                ];
                let _ = poll(&mut polled, timeout.as_ref());
                (told(&polled[0]), told(&polled[1]))
            }
        };
        if written {
            self.forget_written();
        }
        if let Some(counter) = self.strained.as_ref().filter(|_| strained) {
            // What it counts does not matter.
            let _ = rustix::io::read(counter, &mut [0; 8]);
        }
        written || strained
    }

    /// Takes in what was told, so that the next wait waits. What it says does not matter: the files are read again anyway.
    fn forget_written(&self) {
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(self.written.as_fd(), &mut space);
        while reader.next().is_ok() {}
    }
}

impl Cgroup {
    /// Files that are written when a limit changes or is met.
    fn told_by(&self) -> impl Iterator<Item = PathBuf> {
        let names = self.limit_files();
        self.folders()
            .iter()
            .flat_map(move |folder| names.iter().map(|name| folder.join(name)))
            .filter(|file| file.exists())
    }
}

/// An event counter of version 1 that goes up when the group's tasks find memory only with difficulty.
fn strained(folder: &Path) -> io::Result<OwnedFd> {
    let level = File::open(folder.join("memory.pressure_level"))?;
    let counter = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let registered = format!("{} {} medium", counter.as_raw_fd(), level.as_raw_fd());
    std::fs::write(folder.join("cgroup.event_control"), registered)?;
    Ok(counter)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(root: &Path, files: &[&str]) -> Cgroup {
        std::fs::create_dir_all(root.join("a")).unwrap();
        for file in files {
            std::fs::write(root.join(file), "1\n").unwrap();
        }
        let mounts = format!(
            "31 22 0:27 / {} rw - cgroup2 cgroup rw\n",
            root.to_str().unwrap()
        );
        Cgroup::find("0::/a\n", &mounts).unwrap()
    }

    #[test]
    fn a_limit_that_changes_is_told_at_any_level() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let files = [
            "a/memory.current",
            "a/memory.max",
            "memory.high",
            "a/memory.events",
        ];
        let watch = LimitWatch::watch(&group(root, &files)).unwrap();
        assert!(!watch.wait(Duration::ZERO));
        for told in ["a/memory.max", "memory.high", "a/memory.events"] {
            std::fs::write(root.join(told), "2\n").unwrap();
            assert!(watch.wait(Duration::from_secs(10)), "{told}");
            assert!(!watch.wait(Duration::ZERO), "{told} is told once");
        }
        // What is used changes all the time.
        std::fs::write(root.join("a/memory.current"), "2\n").unwrap();
        assert!(!watch.wait(Duration::ZERO));
    }

    #[test]
    fn a_group_without_limits_cannot_be_watched() {
        let folder = tempfile::tempdir().unwrap();
        let group = group(folder.path(), &["a/memory.current"]);
        assert!(LimitWatch::watch(&group).is_err());
    }

    #[test]
    fn the_real_group_tells_where_it_can_be_made() {
        // Whatever this machine has is watched without a complaint.
        if let Some(group) = Cgroup::of_this_process() {
            let _ = LimitWatch::watch(&group).map(|watch| watch.wait(Duration::ZERO));
        }
    }
}
