//! What a process holds of the machine, by kind, so that growth has a name.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

/// What the kernel calls the memory of slabs, as it calls every memfd.
const MEMFD: &str = "/memfd:";
/// What the doubles of NVIDIA's libraries call theirs; with a real driver there are none. Their bytes are counted elsewhere.
const DEVICE_MEMORY: &str = "/memfd:device memory";
/// What the kernel calls a descriptor of the NVIDIA driver, and of GPU memory that was exported: of each piece of that one is kept.
const NVIDIA: &str = "/dev/nvidiactl";

/// What the kernel calls the threads that it makes for io_uring.
const KERNELS: &str = "iou-wrk-";

/// What a process holds of the machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Holdings {
    /// Descriptors by what they are of, without those of memory.
    pub(super) descriptors: BTreeMap<String, u64>,
    /// Memories (memfds) that it has descriptors of.
    pub(super) memories: u64,
    /// Threads by name.
    pub(super) threads: BTreeMap<String, u64>,
    /// Memory of its own, without slabs, in bytes.
    pub(super) anonymous_bytes: u64,
    /// Tiers that it says it has.
    pub(super) tiers: u64,
    /// VRAM that its books say is in use, over all GPUs, in bytes.
    pub(super) vram_bytes: u64,
    /// Components on GPUs by its books, each in one piece of memory at most.
    pub(super) vram_components: u64,
    /// Memories that its own books say it has.
    pub(super) kept_memories: u64,
}

impl Holdings {
    /// Reads what a process holds from `/proc`, and what it says of it from its status.
    pub(super) fn of(pid: u32, status: &Value) -> io::Result<Self> {
        let process = Path::new("/proc").join(pid.to_string());
        let mut holdings = Self::default();
        let mut memories = BTreeSet::new();
        for entry in std::fs::read_dir(process.join("fd"))? {
            let path = entry?.path();
            // One that is closed meanwhile is held no more.
            let Ok(target) = std::fs::read_link(&path) else {
                continue;
            };
            let target = target.to_string_lossy();
            if target.starts_with(DEVICE_MEMORY) {
                continue;
            }
            if target.starts_with(MEMFD) {
                if let Ok(metadata) = std::fs::metadata(&path) {
                    memories.insert(metadata.ino());
                }
                continue;
            }
            // `socket:[4711]`: the number tells nothing here.
            let kind = target.split(":[").next().unwrap_or_default();
            *holdings.descriptors.entry(kind.to_owned()).or_default() += 1;
        }
        holdings.memories = memories.len() as u64;
        for entry in std::fs::read_dir(process.join("task"))? {
            let Ok(name) = std::fs::read_to_string(entry?.path().join("comm")) else {
                continue;
            };
            let name = name.trim();
            // The kernel's own, of which it keeps one for each ring after the first time that a read had to wait.
            if !name.starts_with(KERNELS) {
                *holdings.threads.entry(name.to_owned()).or_default() += 1;
            }
        }
        let own = std::fs::read_to_string(process.join("status"))?;
        let anonymous = own
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"))
            .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        holdings.anonymous_bytes = anonymous.unwrap_or(0) << 10;
        let tiers = status["tiers"].as_array();
        holdings.tiers = tiers.map_or(0, Vec::len) as u64;
        for tier in tiers
            .into_iter()
            .flatten()
            .filter(|tier| tier["tier"] != "ram")
        {
            holdings.vram_bytes += tier["committed"].as_u64().unwrap_or(0);
            let components = tier["components"].as_array().map_or(0, Vec::len);
            holdings.vram_components += components as u64;
        }
        holdings.kept_memories = status["arena"]["mappings"].as_u64().unwrap_or(0);
        Ok(holdings)
    }

    /// What there is more of than at the `start`, by name; empty where everything has returned. `spare_bytes`: memory of its own
    /// that it may have more.
    pub(super) fn growth(&self, start: &Self, spare_bytes: u64) -> Vec<String> {
        let mut grown = Vec::new();
        for (what, now, before) in [
            ("descriptors of", &self.descriptors, &start.descriptors),
            ("threads", &self.threads, &start.threads),
        ] {
            for (name, count) in now {
                let before = before.get(name).copied().unwrap_or(0);
                // How many pieces of what stays resident were exported differs, as its bytes do.
                let spare = if name == NVIDIA {
                    self.vram_components
                } else {
                    0
                };
                if *count > before + spare {
                    grown.push(format!("{what} {name}: {before} before, {count} now"));
                }
            }
        }
        // Memory that is kept warm is no growth, and its amount differs; but it has to be in the books to the last one.
        if self.memories != self.kept_memories {
            grown.push(format!(
                "memory: {} memfds are open, and the books have {}",
                self.memories, self.kept_memories
            ));
        }
        let most = start.anonymous_bytes + spare_bytes;
        if self.anonymous_bytes > most {
            grown.push(format!(
                "memory of its own: {} before, {} now",
                hotset::Bytes(start.anonymous_bytes),
                hotset::Bytes(self.anonymous_bytes)
            ));
        }
        grown
    }

    /// All descriptors but those of memory.
    pub(super) fn other_descriptors(&self) -> u64 {
        self.descriptors.values().sum()
    }

    /// All threads.
    pub(super) fn all_threads(&self) -> u64 {
        self.threads.values().sum()
    }
}

/// What a process that does not answer is doing, as far as the kernel tells: each thread's name, state and place in the kernel.
pub(super) fn whereabouts(pid: u32) -> String {
    let process = Path::new("/proc").join(pid.to_string());
    let Ok(tasks) = std::fs::read_dir(process.join("task")) else {
        return "the process is gone".to_owned();
    };
    let read = |path: &Path, name: &str| std::fs::read_to_string(path.join(name));
    let mut threads = BTreeMap::<String, u64>::new();
    for task in tasks.flatten() {
        let path = task.path();
        let state = read(&path, "stat").unwrap_or_default();
        let state = state
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next())
            .unwrap_or('?');
        let name = read(&path, "comm").unwrap_or_default();
        let place = read(&path, "wchan").unwrap_or_default();
        let thread = format!("{} {state} {place}", name.trim());
        *threads.entry(thread).or_default() += 1;
    }
    let threads = threads
        .into_iter()
        .map(|(thread, count)| format!("{count} x {thread}"));
    threads.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_told_by_name_and_memory_against_the_books() {
        let start = Holdings {
            descriptors: [("socket".to_owned(), 2)].into(),
            threads: [("worker".to_owned(), 2)].into(),
            memories: 3,
            kept_memories: 3,
            anonymous_bytes: 100,
            ..Holdings::default()
        };
        assert!(start.growth(&start, 0).is_empty());
        let mut end = start.clone();
        end.memories = 9;
        end.kept_memories = 9;
        end.threads.clear();
        assert!(end.growth(&start, 0).is_empty(), "kept warm");
        end.descriptors.insert("socket".into(), 3);
        end.descriptors.insert("/some/file".into(), 1);
        end.memories = 10;
        end.anonymous_bytes = 111;
        let grown = end.growth(&start, 10);
        assert_eq!(grown.len(), 4, "{grown:?}");
    }

    #[test]
    fn of_each_component_on_a_gpu_one_descriptor_may_stay() {
        let held = |descriptors, vram_components| Holdings {
            descriptors: [(NVIDIA.to_owned(), descriptors)].into(),
            vram_components,
            ..Holdings::default()
        };
        let start = held(5, 0);
        assert!(held(7, 2).growth(&start, 0).is_empty());
        assert_eq!(held(8, 2).growth(&start, 0).len(), 1);
    }

    #[test]
    fn this_process_has_what_it_opens() {
        let memfd = |_| rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let status = serde_json::json!({"arena": {"mappings": 0}});
        let kept: Vec<_> = (0..2).map(memfd).collect();
        let held = Holdings::of(std::process::id(), &status).unwrap();
        assert!(held.memories >= 2);
        assert!(held.all_threads() >= 1 && held.anonymous_bytes > 0);
        assert!(whereabouts(std::process::id()).contains(" x "));
        drop(kept);
    }
}
