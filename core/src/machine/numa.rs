//! Nodes of memory: on a machine with several, a GPU reads memory at its own node faster.

use std::fs;
use std::path::Path;

use serde::Serialize;

/// A node of memory, as the kernel counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct NumaNode(u16);

impl std::fmt::Display for NumaNode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// The kernel takes nodes below this (`MAX_NUMNODES` is 1024 at most).
const MOST: u16 = 1024;

impl NumaNode {
    /// The node with this number. `None` where no kernel has one.
    #[must_use]
    pub const fn new(node: u16) -> Option<Self> {
        if node < MOST { Some(Self(node)) } else { None }
    }

    /// Its number.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// The node at which a PCI device (`0000:3b:00.0`) is. `None` where the kernel does not say, or has one node only: then
    /// no place is better than another.
    #[must_use]
    pub fn of_pci(device: &str) -> Option<Self> {
        Self::of_pci_in(Path::new("/sys"), device)
    }

    fn of_pci_in(sys: &Path, device: &str) -> Option<Self> {
        let read = |path: &str| fs::read_to_string(sys.join(path)).ok();
        // "0", or a list such as "0-1" or "0,2".
        let online = read("devices/system/node/online")?;
        online.trim().parse::<u16>().is_err().then_some(())?;
        // A name of the driver's becomes a part of a path: letters and digits alone.
        let plain = |c: char| c.is_ascii_hexdigit() || c == ':' || c == '.';
        if !device.chars().all(plain) || device.contains("..") {
            return None;
        }
        let device = device.to_ascii_lowercase();
        // -1: the firmware did not say.
        let node = read(&format!("bus/pci/devices/{device}/numa_node"))?;
        Self::new(node.trim().parse().ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_has_a_node_where_there_are_several() {
        let folder = tempfile::tempdir().unwrap();
        let sys = folder.path();
        let put = |path: &str, text: &str| {
            fs::create_dir_all(sys.join(path).parent().unwrap()).unwrap();
            fs::write(sys.join(path), text).unwrap();
        };
        put("bus/pci/devices/0000:3b:00.0/numa_node", "1\n");
        put("bus/pci/devices/0000:5e:00.0/numa_node", "-1\n");
        let node = |device: &str| NumaNode::of_pci_in(sys, device).map(NumaNode::get);
        assert_eq!(node("0000:3B:00.0"), None, "the kernel has no nodes");
        put("devices/system/node/online", "0\n");
        assert_eq!(node("0000:3B:00.0"), None, "there is one");
        put("devices/system/node/online", "0-1\n");
        assert_eq!(node("0000:3B:00.0"), Some(1));
        assert_eq!(node("0000:5e:00.0"), None, "the firmware did not say");
        assert_eq!(node("0000:ff:00.0"), None, "there is no such device");
        assert_eq!(node("../0000:3b:00.0"), None, "no name of a device");
    }
}
