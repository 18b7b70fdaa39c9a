//! What this process may really use of the machine's memory, by the kernel's own word.
//!
//! A container sees all of the machine's memory in `/proc/meminfo` and is killed long before it has used it; so the control
//! groups count as well, from the process's own up to the root. Reads files of `/proc` and `/sys`, and nothing else.

mod cgroup;
mod limits;
mod numa;
mod psi;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

pub use cgroup::Cgroup;
pub use limits::LimitWatch;
pub use numa::NumaNode;
pub use psi::{PressureTrigger, TriggerError};

use crate::policy::pressure::HostMemory;
use crate::units::Bytes;

/// Where the process stands on the machine: found once, read as often as wanted.
#[derive(Debug, Clone)]
pub struct Machine {
    cgroup: Option<Cgroup>,
    simulated: Option<Arc<Mutex<HostMemory>>>,
}

impl Machine {
    /// The machine, and the control group that the process is in now.
    #[must_use]
    pub fn here() -> Self {
        Self {
            cgroup: Cgroup::of_this_process(),
            simulated: None,
        }
    }

    /// A machine that has these figures, whatever the real one's are.
    #[must_use]
    pub const fn simulated(figures: Arc<Mutex<HostMemory>>) -> Self {
        Self {
            cgroup: None,
            simulated: Some(figures),
        }
    }

    /// Whether it is made up.
    #[must_use]
    pub const fn is_simulated(&self) -> bool {
        self.simulated.is_some()
    }

    /// The control group that bounds the process's memory, where one does.
    #[must_use]
    pub const fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// Reads the figures. `None` where `/proc/meminfo` is missing or says nothing.
    #[must_use]
    pub fn memory(&self) -> Option<HostMemory> {
        if let Some(figures) = &self.simulated {
            return Some(*figures.lock().unwrap_or_else(PoisonError::into_inner));
        }
        let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
        let pressure = std::fs::read_to_string(self.pressure_file()).ok();
        let mut host = HostMemory::parse(&meminfo, pressure.as_deref())?;
        if let Some(cgroup) = &self.cgroup {
            host.cgroup = cgroup.memory();
        }
        Some(host)
    }

    /// The file that tells of stalls: the control group's own, where it has one, else the machine's.
    #[must_use]
    pub fn pressure_file(&self) -> &Path {
        self.cgroup
            .as_ref()
            .and_then(Cgroup::pressure_file)
            .unwrap_or(Path::new("/proc/pressure/memory"))
    }

    /// The most memory that this process may lock, and a device pin for it. `None`: no limit.
    #[must_use]
    pub fn lockable() -> Option<Bytes> {
        rustix::process::getrlimit(rustix::process::Resource::Memlock)
            .current
            .map(Bytes)
    }
}
