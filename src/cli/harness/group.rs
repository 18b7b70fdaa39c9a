//! A control group for the server, so that its memory can be made to shrink.

use std::fs;
use std::io;
use std::path::PathBuf;

use hotset::Bytes;
use hotset::core::machine::Cgroup;

/// A group below this process's own; removed when it is dropped.
#[derive(Debug)]
pub(super) struct Group {
    folder: PathBuf,
    limit: &'static str,
}

impl Group {
    /// Makes one, or says why it may not.
    pub(super) fn make() -> Result<Self, String> {
        let own = Cgroup::of_this_process().ok_or("no control group with a memory controller")?;
        let parent = own.folder().ok_or("no folder of the control group")?;
        let folder = parent.join(format!("hotset-chaos-{}", std::process::id()));
        fs::create_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let old = folder.join("memory.limit_in_bytes").exists();
        let limit = match old {
            true => "memory.limit_in_bytes",
            false => "memory.max",
        };
        let group = Self { folder, limit };
        // Whether it can be set at all is seen before it is relied upon.
        group
            .set(None)
            .map_err(|error| format!("{}: {error}", group.folder.display()))?;
        Ok(group)
    }

    pub(super) fn take(&self, pid: u32) -> io::Result<()> {
        fs::write(self.folder.join("cgroup.procs"), pid.to_string())
    }

    /// Sets the limit; `None` takes it away.
    pub(super) fn set(&self, limit: Option<Bytes>) -> io::Result<()> {
        let text = match limit {
            Some(limit) => limit.get().to_string(),
            None if self.limit == "memory.max" => "max".to_owned(),
            None => "-1".to_owned(),
        };
        fs::write(self.folder.join(self.limit), text)
    }

    /// Sets the limit at which the kernel slows down and tells, instead of killing; version 1 has none.
    pub(super) fn slow_above(&self, limit: Option<Bytes>) -> io::Result<()> {
        if self.limit != "memory.max" {
            return Ok(());
        }
        let text = limit.map_or("max".to_owned(), |limit| limit.get().to_string());
        fs::write(self.folder.join("memory.high"), text)
    }

    /// What the group uses now.
    pub(super) fn used(&self) -> io::Result<Bytes> {
        let file = match self.limit {
            "memory.max" => "memory.current",
            _ => "memory.usage_in_bytes",
        };
        let text = fs::read_to_string(self.folder.join(file))?;
        text.trim()
            .parse()
            .map(Bytes)
            .map_err(|_| io::ErrorKind::InvalidData.into())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.folder);
    }
}
