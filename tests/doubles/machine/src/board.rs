//! The machine's file: plain atomics at fixed places.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// The most GPUs that a machine has.
pub const MAX_GPUS: usize = 8;
/// The most processes that use doubles at the same time.
pub const MAX_PROCESSES: usize = 32;
/// The most allocations that live at the same time, over all processes.
const MAX_ROWS: usize = 4096;
/// Xid events that wait to be heard.
const MAX_XIDS: usize = 16;

macro_rules! calls {
    ($($name:ident),* $(,)?) => {
        /// The functions of both doubles, for their counts.
        #[allow(non_camel_case_types, missing_docs)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Call { $($name),* }

        const CALLS: usize = [$(stringify!($name)),*].len();
    };
}

calls! {
    cuInit, cuDriverGetVersion, cuDeviceGetCount, cuDeviceGet, cuDeviceGetName, cuDeviceGetUuid, cuDeviceTotalMem,
    cuDeviceGetAttribute, cuDeviceGetP2PAttribute, cuDeviceGetPCIBusId, cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxRelease,
    cuDevicePrimaryCtxReset, cuCtxSetCurrent, cuMemGetInfo, cuMemGetAllocationGranularity, cuMemCreate, cuMemRelease,
    cuMemAddressReserve, cuMemAddressFree, cuMemMap, cuMemUnmap, cuMemSetAccess, cuMemExportToShareableHandle,
    cuMemImportFromShareableHandle, cuMemHostRegister, cuMemHostUnregister, cuMemHostAlloc, cuMemFreeHost,
    cuMemcpyHtoDAsync, cuMemcpyDtoHAsync, cuMemcpyPeerAsync, cuStreamCreate, cuStreamDestroy, cuStreamSynchronize,
    cuEventCreate, cuEventDestroy, cuEventRecord, cuEventQuery, cuEventSynchronize, nvmlInit,
    nvmlDeviceGetMemoryInfo, nvmlEventSetWait,
}

/// One GPU. Everything may be changed at any time, by any process.
#[repr(C)]
#[derive(Debug)]
pub struct Gpu {
    /// All its memory.
    pub total: AtomicU64,
    /// Granule of physical memory.
    pub granularity: AtomicU64,
    /// What the driver keeps for itself.
    pub reserved: AtomicU64,
    /// What a context costs in each process.
    pub context: AtomicU64,
    /// What processes hold that are no doubles.
    pub foreign: AtomicU64,
    /// Alive physical memory of all processes of the double.
    pub allocated: AtomicU64,
    /// Copy rate in bytes each second; 0: at once.
    pub bandwidth: AtomicU64,
    /// Time of each copy beside its bytes, in nanoseconds.
    pub latency_ns: AtomicU64,
    /// So many of the next allocations fail for want of memory, whatever is free.
    pub refuse_allocations: AtomicU32,
    /// Host memory cannot be registered while this is not 0.
    pub refuse_registration: AtomicU32,
    /// Copies do not begin while this is not 0.
    pub hold_copies: AtomicU32,
    /// Copies that may still begin although they are held.
    pub pass_copies: AtomicU32,
    /// Calls of threads in its context do not return while this is not 0.
    pub hang: AtomicU32,
    /// Calls of NVML about it do not return while this is not 0.
    pub hang_nvml: AtomicU32,
    /// Copies to it from other GPUs are refused while this is not 0.
    pub refuse_peer_copies: AtomicU32,
    /// How far away the memory of each other GPU is, by the driver's rank.
    pub distance: [AtomicU32; MAX_GPUS],
    /// Whether it reaches each other GPU's memory by itself.
    pub direct: [AtomicU32; MAX_GPUS],
    /// The error that the next process to call gets, from then on for every call; 0: none.
    pub sticky: AtomicU32,
    /// The GPU is gone: every call fails, a reset too.
    pub lost: AtomicU32,
    /// NVML's figures of it.
    pub temperature: AtomicU32,
    /// Reasons for throttling, NVML's bits.
    pub throttle: AtomicU64,
    /// PCIe generation now.
    pub pcie_generation: AtomicU32,
    /// PCIe lanes now.
    pub pcie_width: AtomicU32,
    /// Uncorrected ECC errors since the driver was loaded.
    pub ecc_uncorrected: AtomicU64,
    /// Not 0: MIG is on.
    pub mig: AtomicU32,
    /// Not 0: NVML tells no process's memory, as on WDDM.
    pub hide_processes: AtomicU32,
    xid_written: AtomicU32,
    xids: [AtomicU64; MAX_XIDS],
}

/// An Xid event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Xid {
    /// Which GPU.
    pub gpu: usize,
    /// The number.
    pub xid: u64,
}

impl Gpu {
    fn set_defaults(&self) {
        self.total.store(1 << 30, SeqCst);
        self.granularity.store(2 << 20, SeqCst);
        self.reserved.store(4 << 20, SeqCst);
        self.context.store(32 << 20, SeqCst);
        self.temperature.store(41, SeqCst);
        self.pcie_generation.store(4, SeqCst);
        self.pcie_width.store(16, SeqCst);
        for direct in &self.direct {
            direct.store(1, SeqCst);
        }
    }

    /// An Xid event, for whoever listens.
    pub fn raise_xid(&self, xid: u64) {
        let at = self.xid_written.load(SeqCst);
        self.xids[at as usize % MAX_XIDS].store(xid, SeqCst);
        self.xid_written.store(at + 1, SeqCst);
    }

    /// The events after the first `heard`.
    pub fn xids_after(&self, heard: u32) -> Vec<u64> {
        let written = self.xid_written.load(SeqCst);
        (heard.max(written.saturating_sub(MAX_XIDS as u32))..written)
            .map(|i| self.xids[i as usize % MAX_XIDS].load(SeqCst))
            .collect()
    }

    /// How many events there were.
    pub fn xid_count(&self) -> u32 {
        self.xid_written.load(SeqCst)
    }
}

/// One process that uses doubles.
#[repr(C)]
#[derive(Debug)]
pub struct Process {
    /// Its id; 0 where the place is free.
    pub pid: AtomicU32,
    /// Which program it runs, since one that replaces itself keeps its id.
    image: AtomicU64,
    /// Whether it has a context on each GPU.
    pub contexts: [AtomicU32; MAX_GPUS],
    /// Physical memory that it created or imported, on each GPU.
    pub memory: [AtomicU64; MAX_GPUS],
    /// Alive handles of physical memory.
    pub handles: AtomicU32,
    /// Alive mappings.
    pub mappings: AtomicU32,
    /// Reserved address ranges.
    pub reservations: AtomicU32,
    /// Registered or pinned host ranges.
    pub registrations: AtomicU32,
    /// Streams.
    pub streams: AtomicU32,
    /// Events.
    pub events: AtomicU32,
}

impl Process {
    /// What it held went with its end.
    fn forget(&self) {
        for counter in self.contexts.iter().chain([
            &self.handles,
            &self.mappings,
            &self.reservations,
            &self.registrations,
            &self.streams,
            &self.events,
        ]) {
            counter.store(0, SeqCst);
        }
        for bytes in &self.memory {
            bytes.store(0, SeqCst);
        }
    }
}

/// A number that the kernel draws for each program that a process runs.
fn image() -> u64 {
    // SAFETY: asks for a value of this process; no memory is touched.
    let drawn = unsafe { libc::getauxval(libc::AT_RANDOM) } as *const u64;
    if drawn.is_null() {
        return 0;
    }
    // SAFETY: 16 bytes that the kernel put there before the program began, and that stay as long as it runs.
    unsafe { drawn.read_unaligned() }
}

/// One allocation of physical memory.
#[repr(C)]
#[derive(Debug)]
pub struct Row {
    /// The number of the file behind it, 0 where the row is free.
    pub inode: AtomicU64,
    /// Its size.
    pub bytes: AtomicU64,
    /// On which GPU.
    pub gpu: AtomicU32,
    /// Handles and mappings, over all processes.
    pub references: AtomicU32,
}

#[repr(C)]
struct Board {
    gpus: AtomicU32,
    gpu: [Gpu; MAX_GPUS],
    processes: [Process; MAX_PROCESSES],
    rows: [Row; MAX_ROWS],
    calls: [AtomicU64; CALLS],
}

/// What one process has not given back.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Live {
    /// Primary contexts.
    pub contexts: u32,
    /// Handles of physical memory.
    pub handles: u32,
    /// Mappings.
    pub mappings: u32,
    /// Reserved address ranges.
    pub reservations: u32,
    /// Registered or pinned host ranges.
    pub registrations: u32,
    /// Streams.
    pub streams: u32,
    /// Events.
    pub events: u32,
}

/// The machine, mapped into this process.
#[derive(Debug, Clone)]
pub struct Machine {
    map: Arc<Map>,
}

#[derive(Debug)]
struct Map {
    board: NonNull<Board>,
    path: PathBuf,
}

// SAFETY: the mapping lives as long as `Map`, is not tied to a thread, and holds atomics alone.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `open`, which nobody borrows any more.
        unsafe { libc::munmap(self.board.as_ptr().cast(), size_of::<Board>()) };
    }
}

/// The files without a name that any process has open or maps.
fn held_inodes() -> HashSet<u64> {
    let mut held = HashSet::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let process = process.path();
        for entry in std::fs::read_dir(process.join("fd"))
            .into_iter()
            .flatten()
            .flatten()
        {
            if let Ok(metadata) = std::fs::metadata(entry.path()) {
                held.insert(std::os::unix::fs::MetadataExt::ino(&metadata));
            }
        }
        let maps = std::fs::read_to_string(process.join("maps")).unwrap_or_default();
        let inodes = maps
            .lines()
            .filter_map(|line| line.split_whitespace().nth(4));
        held.extend(inodes.filter_map(|inode| inode.parse::<u64>().ok()));
    }
    held
}

impl Machine {
    /// A new machine of this many GPUs, 1 GiB each, in a new file.
    ///
    /// # Panics
    /// Where the file cannot be made.
    #[must_use]
    pub fn create(path: &Path, gpus: usize) -> Self {
        let file = File::create_new(path).expect("a new file for the machine");
        file.set_len(size_of::<Board>() as u64).expect("its size");
        let machine = Self::open(path).expect("the file that was just made");
        machine.board().gpus.store(gpus as u32, SeqCst);
        for gpu in 0..gpus.min(MAX_GPUS) {
            machine.gpu(gpu).set_defaults();
        }
        machine
    }

    /// The machine in this file.
    ///
    /// # Errors
    /// Where there is no such file, or a wrong one.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        if file.metadata()?.len() != size_of::<Board>() as u64 {
            return Err(std::io::Error::other("not a machine of these doubles"));
        }
        // SAFETY: a new shared mapping of a file of exactly this size, at an address of the kernel's choice.
        let board = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Board>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if board == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let board =
            NonNull::new(board.cast()).ok_or_else(|| std::io::Error::other("no mapping"))?;
        Ok(Self {
            map: Arc::new(Map {
                board,
                path: path.to_owned(),
            }),
        })
    }

    /// The machine that the environment names.
    #[must_use]
    pub fn of_environment() -> Option<Self> {
        Self::open(Path::new(&std::env::var_os(crate::BOARD_VARIABLE)?)).ok()
    }

    fn board(&self) -> &Board {
        // SAFETY: the mapping lives as long as `self.map`, has the size of a `Board`, and any bytes are valid atomics.
        unsafe { self.map.board.as_ref() }
    }

    /// How many GPUs there are.
    #[must_use]
    pub fn gpus(&self) -> usize {
        (self.board().gpus.load(SeqCst) as usize).min(MAX_GPUS)
    }

    /// One GPU.
    ///
    /// # Panics
    /// Where there cannot be so many.
    #[must_use]
    pub fn gpu(&self, index: usize) -> &Gpu {
        &self.board().gpu[index]
    }

    /// The GPU's name to CUDA and NVML: the same for a machine's whole life, and different for each GPU.
    #[must_use]
    pub fn uuid(index: usize) -> [u8; 16] {
        let mut uuid = *b"\x0d\x0b\x1e\0hotset-dbl\0\0";
        uuid[15] = index as u8;
        uuid
    }

    /// Memory of a GPU that nobody uses.
    #[must_use]
    pub fn free(&self, gpu: usize) -> u64 {
        let g = self.gpu(gpu);
        let contexts: u64 = self
            .board()
            .processes
            .iter()
            .map(|process| u64::from(process.contexts[gpu].load(SeqCst).min(1)))
            .sum();
        let used = [&g.reserved, &g.foreign, &g.allocated]
            .iter()
            .map(|bytes| bytes.load(SeqCst))
            .sum::<u64>()
            + contexts * g.context.load(SeqCst);
        g.total.load(SeqCst).saturating_sub(used)
    }

    /// All places for processes.
    #[must_use]
    pub fn processes(&self) -> &[Process] {
        &self.board().processes
    }

    /// This process's place.
    ///
    /// # Panics
    /// Where there are too many processes.
    #[must_use]
    pub fn process(&self) -> &Process {
        let pid = std::process::id();
        let processes = &self.board().processes;
        let process = processes
            .iter()
            .find(|process| process.pid.load(SeqCst) == pid)
            .or_else(|| {
                processes
                    .iter()
                    .find(|process| process.pid.compare_exchange(0, pid, SeqCst, SeqCst).is_ok())
            })
            .expect("fewer processes than the machine has places for");
        if process.image.swap(image(), SeqCst) != image() {
            process.forget();
        }
        process
    }

    /// Writes down a new allocation.
    ///
    /// # Panics
    /// Where there are too many.
    #[must_use]
    pub fn add_row(&self, inode: u64, bytes: u64, gpu: usize) -> &Row {
        let row = self
            .board()
            .rows
            .iter()
            .find(|row| row.inode.compare_exchange(0, inode, SeqCst, SeqCst).is_ok())
            .expect("fewer allocations than the machine has rows for");
        row.bytes.store(bytes, SeqCst);
        row.gpu.store(gpu as u32, SeqCst);
        row.references.store(1, SeqCst);
        row
    }

    /// The allocation behind this file.
    #[must_use]
    pub fn row(&self, inode: u64) -> Option<&Row> {
        let mut rows = self.board().rows.iter();
        rows.find(|row| row.inode.load(SeqCst) == inode)
    }

    /// One reference less; the last one frees the memory.
    pub fn drop_reference(&self, inode: u64) {
        if let Some(row) = self.row(inode)
            && row.references.fetch_sub(1, SeqCst) == 1
        {
            let bytes = row.bytes.load(SeqCst);
            let gpu = row.gpu.load(SeqCst) as usize;
            row.inode.store(0, SeqCst);
            self.gpu(gpu).allocated.fetch_sub(bytes, SeqCst);
        }
    }

    /// Gives back what processes had that are gone, as a driver does: their contexts, and memory that no process has a descriptor of
    /// or maps any more.
    pub fn reap(&self) {
        for process in self.processes() {
            let pid = process.pid.load(SeqCst);
            if pid == 0 || Path::new(&format!("/proc/{pid}")).exists() {
                continue;
            }
            process.forget();
            process.pid.store(0, SeqCst);
        }
        // The rows first: what is made meanwhile is not among them.
        let rows = self.board().rows.iter();
        let rows: Vec<(u64, &Row)> = rows
            .map(|row| (row.inode.load(SeqCst), row))
            .filter(|(inode, _)| *inode != 0)
            .collect();
        let held = held_inodes();
        for (inode, row) in rows {
            if held.contains(&inode) {
                continue;
            }
            let (bytes, gpu) = (row.bytes.load(SeqCst), row.gpu.load(SeqCst) as usize);
            if row.inode.compare_exchange(inode, 0, SeqCst, SeqCst).is_ok() {
                self.gpu(gpu).allocated.fetch_sub(bytes, SeqCst);
            }
        }
    }

    /// Counts a call.
    pub fn count(&self, call: Call) {
        self.board().calls[call as usize].fetch_add(1, SeqCst);
    }

    /// How often a function was called, over all processes.
    #[must_use]
    pub fn calls(&self, call: Call) -> u64 {
        self.board().calls[call as usize].load(SeqCst)
    }

    /// Writes down that the driver was used wrongly.
    pub fn report(&self, what: &str) {
        let line = format!("process {}: {what}\n", std::process::id());
        // One write, so that lines of several processes do not mix.
        let written = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.report_path())
            .and_then(|mut file| file.write_all(line.as_bytes()));
        if written.is_err() {
            eprint!("driver double: {line}");
        }
    }

    fn report_path(&self) -> PathBuf {
        self.map.path.with_extension("misuse")
    }

    /// What was done wrongly so far, a line each; empty where nothing was.
    #[must_use]
    pub fn misuse(&self) -> String {
        std::fs::read_to_string(self.report_path()).unwrap_or_default()
    }

    /// What this process has not given back.
    #[must_use]
    pub fn live(&self) -> Live {
        let process = self.process();
        let get = |count: &AtomicU32| count.load(SeqCst);
        Live {
            contexts: process.contexts.iter().map(get).sum(),
            handles: get(&process.handles),
            mappings: get(&process.mappings),
            reservations: get(&process.reservations),
            registrations: get(&process.registrations),
            streams: get(&process.streams),
            events: get(&process.events),
        }
    }

    /// Waits until this process has given everything back, and no memory is left on any GPU.
    ///
    /// # Panics
    /// With what is left, where that does not come.
    pub fn assert_nothing_left(&self) {
        // Only a leak ever waits so long.
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let allocated: u64 = (0..self.gpus())
                .map(|gpu| self.gpu(gpu).allocated.load(SeqCst))
                .sum();
            let live = self.live();
            if live == Live::default() && allocated == 0 {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "leaked: {live:?}, and {allocated} bytes of device memory"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
