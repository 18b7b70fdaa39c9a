//! Control groups, version 2 and the memory controller of version 1.

use std::fs;
use std::path::{Path, PathBuf};

use crate::policy::pressure::{CgroupEvents, CgroupMemory};
use crate::units::Bytes;

/// The control group of a process, with all those above it that this process can see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    version: Version,
    /// From the process's own up to the root of the mount.
    folders: Vec<PathBuf>,
    pressure: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// Version 1 says "no limit" with a number near the largest one.
const NO_LIMIT: u64 = 1 << 60;

impl Cgroup {
    /// The group of this process. `None` where there is none with a memory controller.
    #[must_use]
    pub fn of_this_process() -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        Self::find(&own, &mounts)
    }

    /// The same from the texts of `/proc/self/cgroup` and `/proc/self/mountinfo`.
    pub(super) fn find(own: &str, mounts: &str) -> Option<Self> {
        let memory_of = |version: Version| {
            let group = own.lines().find_map(|line| {
                let mut fields = line.splitn(3, ':');
                let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
                let is = match version {
                    Version::Two => controllers.is_empty(),
                    Version::One => controllers.split(',').any(|name| name == "memory"),
                };
                is.then_some(path)
            })?;
            let (root, mounted) = mounts.lines().find_map(|line| mount(line, version))?;
            // Inside of a container the mount shows a part of the tree only.
            let below = Path::new(group).strip_prefix(root).unwrap_or(Path::new(""));
            let leaf = Path::new(mounted).join(below);
            let folders: Vec<PathBuf> = leaf
                .ancestors()
                .take_while(|folder| folder.starts_with(mounted))
                .map(Path::to_owned)
                .collect();
            let pressure = folders.first().map(|folder| folder.join("memory.pressure"));
            Some(Self {
                version,
                pressure: pressure.filter(|path| version == Version::Two && path.exists()),
                folders,
            })
        };
        // On a machine with both, the controller is in one of them.
        [Version::Two, Version::One]
            .into_iter()
            .filter_map(memory_of)
            .find(|group| group.folders.iter().any(|folder| group.has_memory(folder)))
    }

    fn has_memory(&self, folder: &Path) -> bool {
        folder.join(self.usage_file()).exists()
    }

    const fn usage_file(&self) -> &'static str {
        match self.version {
            Version::One => "memory.usage_in_bytes",
            Version::Two => "memory.current",
        }
    }

    /// From the process's own group up to the root.
    pub(super) fn folders(&self) -> &[PathBuf] {
        &self.folders
    }

    /// Files of a group that are written when its limit changes, or when the kernel has to keep it.
    pub(super) const fn limit_files(&self) -> &'static [&'static str] {
        match self.version {
            Version::One => &["memory.limit_in_bytes"],
            Version::Two => &["memory.max", "memory.high", "memory.events"],
        }
    }

    /// The group's own `memory.pressure`, where it has one.
    #[must_use]
    pub fn pressure_file(&self) -> Option<&Path> {
        self.pressure.as_deref()
    }

    /// The folder of the process's own group.
    #[must_use]
    pub fn folder(&self) -> Option<&Path> {
        self.folders.first().map(PathBuf::as_path)
    }

    /// The figures now. `None` where no group has a limit.
    #[must_use]
    pub fn memory(&self) -> Option<CgroupMemory> {
        let bounds: Vec<CgroupMemory> = self
            .folders
            .iter()
            .filter_map(|folder| self.bound(folder))
            .collect();
        let limit = bounds.iter().map(|bound| bound.limit).min()?;
        let room = bounds.iter().map(|bound| bound.room).min()?;
        let mut events = CgroupEvents::default();
        for bound in &bounds {
            events.high += bound.events.high;
            events.max += bound.events.max;
            events.oom_kill += bound.events.oom_kill;
        }
        Some(CgroupMemory {
            limit,
            room,
            events,
        })
    }

    /// One group's own bound.
    fn bound(&self, folder: &Path) -> Option<CgroupMemory> {
        let number = |name: &str| -> Option<u64> {
            let text = fs::read_to_string(folder.join(name)).ok()?;
            // `max` is no number, and no limit.
            text.trim().parse().ok().filter(|n| *n < NO_LIMIT)
        };
        let fields = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
        let limits = match self.version {
            Version::One => [number("memory.limit_in_bytes"), None],
            Version::Two => [number("memory.max"), number("memory.high")],
        };
        let limit = limits.into_iter().flatten().min()?;
        let used = number(self.usage_file())?;
        let stat = fields("memory.stat");
        let cached = match self.version {
            Version::One => ["total_active_file", "total_inactive_file"],
            Version::Two => ["active_file", "inactive_file"],
        }
        .iter()
        .map(|name| field(&stat, name))
        .sum();
        let events = match self.version {
            Version::One => CgroupEvents {
                high: 0,
                max: number("memory.failcnt").unwrap_or(0),
                oom_kill: field(&fields("memory.oom_control"), "oom_kill"),
            },
            Version::Two => {
                let text = fields("memory.events");
                CgroupEvents {
                    high: field(&text, "high"),
                    max: field(&text, "max"),
                    oom_kill: field(&text, "oom_kill"),
                }
            }
        };
        Some(CgroupMemory {
            limit: Bytes(limit),
            room: Bytes(limit).saturating_sub(Bytes(used).saturating_sub(Bytes(cached))),
            events,
        })
    }
}

/// The number behind a name at the start of a line; 0 where there is none.
fn field(text: &str, name: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0)
}

/// Root and mount point of a line of mountinfo, if it is a mount of this version's hierarchy with the memory controller.
fn mount(line: &str, version: Version) -> Option<(&str, &str)> {
    let (front, back) = line.split_once(" - ")?;
    let mut front = front.split(' ').skip(3);
    let (root, point) = (front.next()?, front.next()?);
    let mut back = back.split(' ');
    let (kind, options) = (back.next()?, back.nth(1).unwrap_or_default());
    let is = match version {
        Version::Two => kind == "cgroup2",
        Version::One => kind == "cgroup" && options.split(',').any(|name| name == "memory"),
    };
    is.then_some((root, point))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn mounts(root: &Path, kind: &str, options: &str) -> String {
        let root = root.display();
        format!(
            "22 1 254:0 / / rw - ext4 /dev/vda rw\n31 22 0:27 / {root} rw,relatime shared:9 - {kind} cgroup {options}\n"
        )
    }

    #[test]
    fn the_tightest_bound_of_all_levels_counts() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        put(root, "a/b/memory.current", "700\n");
        put(root, "a/b/memory.max", "max\n");
        put(root, "a/b/memory.high", "1000\n");
        put(
            root,
            "a/b/memory.stat",
            "anon 400\nactive_file 30\ninactive_file 70\n",
        );
        put(
            root,
            "a/b/memory.events",
            "low 0\nhigh 3\nmax 0\noom 0\noom_kill 0\n",
        );
        put(root, "a/b/memory.pressure", "some avg10=0.00\n");
        put(root, "a/memory.current", "1900\n");
        put(root, "a/memory.max", "2000\n");
        put(root, "a/memory.high", "max\n");
        put(root, "a/memory.events", "high 0\nmax 5\noom_kill 1\n");
        let group = Cgroup::find("0::/a/b\n", &mounts(root, "cgroup2", "rw")).unwrap();
        assert_eq!(group.folder(), Some(&*root.join("a/b")));
        assert_eq!(
            group.pressure_file(),
            Some(&*root.join("a/b/memory.pressure"))
        );
        let memory = group.memory().unwrap();
        assert_eq!((memory.limit, memory.room), (Bytes(1000), Bytes(100)));
        let events = CgroupEvents {
            high: 3,
            max: 5,
            oom_kill: 1,
        };
        assert_eq!(memory.events, events);
        assert!(events.is_worse_than(&CgroupEvents::default()));
        assert!(!events.is_worse_than(&events));
    }

    #[test]
    fn the_older_version_is_read_where_it_has_the_controller() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        put(root, "x/memory.usage_in_bytes", "500\n");
        put(root, "x/memory.limit_in_bytes", "2000\n");
        put(
            root,
            "x/memory.stat",
            "cache 9\ntotal_active_file 10\ntotal_inactive_file 90\n",
        );
        put(root, "memory.usage_in_bytes", "9000\n");
        put(root, "memory.limit_in_bytes", "9223372036854771712\n");
        let own = "5:cpu,cpuacct:/y\n4:memory:/x\n0::/\n";
        let group = Cgroup::find(own, &mounts(root, "cgroup", "rw,memory")).unwrap();
        let memory = group.memory().unwrap();
        assert_eq!((memory.limit, memory.room), (Bytes(2000), Bytes(1600)));
        assert_eq!(group.pressure_file(), None);
    }

    #[test]
    fn a_group_without_limits_bounds_nothing() {
        let folder = tempfile::tempdir().unwrap();
        put(folder.path(), "memory.current", "500\n");
        put(folder.path(), "memory.max", "max\n");
        let group = Cgroup::find("0::/\n", &mounts(folder.path(), "cgroup2", "rw")).unwrap();
        assert_eq!(group.memory(), None);
        assert_eq!(Cgroup::find("", ""), None);
        assert_eq!(Cgroup::find("0::/\n", "nonsense"), None);
        // And whatever this machine has is read without a complaint.
        let _ = Cgroup::of_this_process().map(|group| group.memory());
    }
}
