//! The VRAM tier on a real NVIDIA GPU. Where there is none, each test says so and passes; with `HOTSET_REQUIRE_GPU=1` it
//! fails instead. `scripts/gpu-bundle` packs this binary for a machine without a toolchain.
// Clippy's own exemption reaches `#[test]` functions only, not what they call.
#![allow(clippy::unwrap_used)]

#[path = "../it/library.rs"]
#[allow(dead_code)]
mod library;

mod kernels;

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hotset::core::device::cuda::{Cuda, CudaDevice, Imported};
use hotset::core::device::{Allocation, Export};
use hotset::core::memory::{HostRange, Slab};
use hotset::{Bytes, ComponentSet, Device, DeviceError, GpuIndex, Hotset, Target};
use kernels::{Breaking, Functions};
use library::{Library, assert_tensors, contents, outcome, soon, until};

/// One test at a time: they measure free memory.
static ONE: Mutex<()> = Mutex::new(());

/// The role of a second process of the same test.
const ROLE: &str = "HOTSET_GPU_ROLE";

/// Runs a body with the driver, or says why it does not.
fn with_gpu(body: impl AsyncFnOnce(Cuda)) {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    match Cuda::detect() {
        Ok(cuda) if !cuda.gpus().is_empty() => {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(body(cuda));
        }
        other => {
            let why = other.map_or_else(|error| error.to_string(), |_| "no GPU".into());
            assert!(
                std::env::var("HOTSET_REQUIRE_GPU").as_deref() != Ok("1"),
                "a GPU is required, but: {why}"
            );
            println!("skipped: {why}");
        }
    }
}

async fn open(cuda: &Cuda) -> Arc<CudaDevice> {
    cuda.open(GpuIndex(0), &cuda.gpus()[0]).await.unwrap()
}

fn slab(bytes: &[u8]) -> Arc<Slab> {
    let mut writer = Slab::create("gpu-test", Bytes(bytes.len() as u64)).unwrap();
    writer.spare().copy_from_slice(bytes);
    writer.advance(bytes.len());
    writer.seal().unwrap()
}

async fn uploaded(device: &Arc<CudaDevice>, bytes: &[u8]) -> Allocation {
    let to = device
        .clone()
        .allocate(Bytes(bytes.len() as u64))
        .await
        .unwrap();
    let from = HostRange::new(slab(bytes), 0, bytes.len() as u64).unwrap();
    device.upload(&to, 0, from).await.unwrap();
    to
}

#[test]
fn bytes_come_back_as_they_went() {
    with_gpu(async |cuda| {
        let device = open(&cuda).await;
        println!("{:?}", device.describe());
        println!("{:?}", device.figures().await.unwrap());
        // Through pinned buffers, out of registered memory, and with an odd end.
        for bytes in [1, 5000, 300_000, (64 << 20) + 13] {
            let bytes = contents(7, bytes);
            let there = uploaded(&device, &bytes).await;
            let back = device
                .download(&there, 0, bytes.len() as u64)
                .await
                .unwrap();
            assert!(back == bytes, "{} bytes differ", bytes.len());
        }
    });
}

#[test]
fn all_memory_comes_back_and_too_much_is_refused() {
    with_gpu(async |cuda| {
        let device = open(&cuda).await;
        let before = device.figures().await.unwrap();
        let mut held = Vec::new();
        for _ in 0..200 {
            held.push(device.clone().allocate(Bytes::kib(150)).await.unwrap());
        }
        held.push(device.clone().allocate(Bytes::mib(300)).await.unwrap());
        let during = device.figures().await.unwrap();
        let taken = before.free.saturating_sub(during.free);
        assert!(
            taken >= Bytes::mib(300) && taken <= Bytes::mib(400),
            "{taken}"
        );
        let too_much = device.clone().allocate(device.describe().memory).await;
        assert!(
            matches!(too_much, Err(DeviceError::OutOfMemory { .. })),
            "{too_much:?}"
        );
        drop(held);
        device.settle().await;
        // Freeing is asynchronous in the driver.
        until("the memory to be free", async || {
            let now = device.figures().await.unwrap();
            now.allocated.is_zero() && now.free + Bytes::mib(64) >= before.free
        })
        .await;
    });
}

#[test]
fn another_process_maps_it_read_only() {
    const TEST: &str = "another_process_maps_it_read_only";
    let bytes = contents(3, 40 << 20);
    if std::env::var_os(ROLE).is_some() {
        let number = |name| std::env::var(name).unwrap().parse::<u64>().unwrap();
        let cuda = Cuda::detect().unwrap();
        let export = Export {
            // SAFETY: the descriptor that the parent left open for this process alone.
            descriptor: unsafe { OwnedFd::from_raw_fd(number("EXPORT_FD") as i32) },
            mapped: Bytes(number("EXPORT_MAPPED")),
            offset: number("EXPORT_OFFSET"),
            bytes: Bytes(number("EXPORT_BYTES")),
            uuid: cuda.gpus()[0].uuid.clone(),
        };
        let imported = Imported::open(&cuda, &cuda.gpus()[0], export).unwrap();
        assert!(imported.read().unwrap()[..bytes.len()] == bytes);
        println!(
            "a write through it: {:?}",
            imported.overwrite().unwrap_err()
        );
        return;
    }
    with_gpu(async |cuda| {
        let device = open(&cuda).await;
        let there = uploaded(&device, &bytes).await;
        let export = device.export(&there).await.unwrap();
        let descriptor = export.descriptor.as_raw_fd();
        let mut command = Command::new("/proc/self/exe");
        command
            .args([TEST, "--exact", "--nocapture"])
            .env(ROLE, "client")
            .env("EXPORT_FD", descriptor.to_string())
            .env("EXPORT_MAPPED", export.mapped.get().to_string())
            .env("EXPORT_OFFSET", export.offset.to_string())
            .env("EXPORT_BYTES", export.bytes.get().to_string());
        // The standard library closes descriptors on exec, this one must stay.
        let stays = stays_open_on_exec(descriptor);
        assert!(stays, "the descriptor cannot be inherited");
        let status = command.status().unwrap();
        assert!(status.success(), "{status}");
        let back = device
            .download(&there, 0, bytes.len() as u64)
            .await
            .unwrap();
        assert!(back == bytes, "another process wrote to it");
    });
}

fn stays_open_on_exec(descriptor: i32) -> bool {
    // SAFETY: a plain system call on a descriptor that is open.
    unsafe { libc::fcntl(descriptor, libc::F_SETFD, 0) == 0 }
}

#[test]
fn a_pipeline_is_loaded_shared_and_attached() {
    with_gpu(async |cuda| {
        drop(cuda);
        let library = Library::new();
        let tensors = library.pipeline("base", 1, 60_000);
        let mut config = library.config(Bytes::gib(1));
        config.cuda.detect = true;
        config.cuda.include = "0".into();
        config.load.piece = Bytes::mib(8);
        let hotset = soon("the start", Hotset::builder().config(config).start())
            .await
            .unwrap();
        let session = hotset.session("test").await.unwrap();
        let set = || ComponentSet::new(["base"]).on(Target::AnyGpu);
        let leases = outcome(session.load(set())).await.unwrap();
        for lease in &leases {
            assert_tensors(lease, &tensors[&*lease.component().id.component]).await;
        }
        let started = Instant::now();
        let rounds: u32 = 100;
        for _ in 0..rounds {
            assert_eq!(outcome(session.load(set())).await.unwrap().len(), 4);
        }
        println!(
            "attach of a resident pipeline of 4: {:?}",
            started.elapsed() / rounds
        );
        assert_eq!(hotset.status().await.counters.uploads, 4);
        drop(leases);
        soon("the drain", hotset.drain()).await;
    });
}

/// Not an assertion, but the figure that one comes for.
#[test]
fn speed_of_uploads() {
    with_gpu(async |cuda| {
        let device = open(&cuda).await;
        const PIECE: u64 = 8 << 20;
        let bytes: u64 = 1 << 30;
        let from = slab(&contents(1, bytes as usize));
        let to = device.clone().allocate(Bytes(bytes)).await.unwrap();
        let upload = async || {
            let started = Instant::now();
            let mut moving = std::collections::VecDeque::new();
            for i in 0..bytes / PIECE {
                let part = HostRange::new(from.clone(), i * PIECE, (i + 1) * PIECE).unwrap();
                let (device, to) = (&device, &to);
                moving.push_back(Box::pin(device.upload(to, i * PIECE, part)));
                if moving.len() == 4 {
                    futures::future::try_join_all(moving.drain(..))
                        .await
                        .unwrap();
                }
            }
            futures::future::try_join_all(moving).await.unwrap();
            started.elapsed()
        };
        let first = upload().await;
        let mut best = Duration::MAX;
        for _ in 0..5 {
            best = best.min(upload().await);
        }
        let rate = |took: Duration| bytes as f64 / took.as_secs_f64() / 1e9;
        println!(
            "1 GiB to the GPU: first, with the registration of its memory, {:.2} GB/s; best of five {:.2} GB/s",
            rate(first),
            rate(best)
        );
        let whole = HostRange::new(from.clone(), 0, bytes).unwrap();
        let mut raw = Duration::MAX;
        for _ in 0..5 {
            let started = Instant::now();
            device.upload(&to, 0, whole.clone()).await.unwrap();
            raw = raw.min(started.elapsed());
        }
        println!(
            "one cuMemcpyHtoDAsync of 1 GiB from registered memory: {:.2} GB/s; in pieces that is {:.3} of it",
            rate(raw),
            raw.as_secs_f64() / best.as_secs_f64()
        );
    });
}

/// Another user of this process's context, such as PyTorch in a host that embeds hotset, breaks it: the driver gives this
/// process nothing more on that GPU, and other processes go on.
#[test]
fn a_context_that_a_kernel_broke_is_lost_to_its_process_alone() {
    const TEST: &str = "a_context_that_a_kernel_broke_is_lost_to_its_process_alone";
    const ALL: [Breaking; 3] = [
        Breaking::StrayStore,
        Breaking::MisalignedStore,
        Breaking::Trap,
    ];
    let bytes = contents(11, 4 << 20);
    let role = std::env::var(ROLE).ok();
    with_gpu(async |cuda| {
        let Some(functions) = Functions::find() else {
            println!("left out: this driver runs no kernels");
            return;
        };
        let device = open(&cuda).await;
        let there = uploaded(&device, &bytes).await;
        let Some(role) = role else {
            let before = device.figures().await.unwrap();
            for how in ALL {
                let mut command = Command::new("/proc/self/exe");
                command.args([TEST, "--exact", "--nocapture"]);
                command.env(ROLE, format!("{how:?}"));
                let ended = tokio::task::spawn_blocking(move || command.status());
                let status = ended.await.unwrap().unwrap();
                assert!(status.success(), "{how:?}: {status}");
                let back = device.download(&there, 0, bytes.len() as u64).await;
                assert!(back.unwrap() == bytes, "{how:?}");
                until("its memory to be free", async || {
                    device.figures().await.unwrap().free + Bytes::mib(64) >= before.free
                })
                .await;
            }
            return;
        };
        let how = ALL
            .into_iter()
            .find(|how| format!("{how:?}") == role)
            .unwrap();
        let held = device.clone().allocate(Bytes::gib(1)).await.unwrap();
        println!("{how:?}: before: {}", used());
        let code = tokio::task::spawn_blocking(move || functions.break_context(how))
            .await
            .unwrap();
        assert_ne!(code, 0, "{how:?} broke nothing");
        let lost = device.download(&there, 0, bytes.len() as u64).await;
        assert!(matches!(lost, Err(DeviceError::Lost { .. })), "{lost:?}");
        for _ in 0..2 {
            let spent = device.recover().await.unwrap_err();
            println!("code {code}: {spent}");
            assert!(matches!(spent, DeviceError::Spent { .. }), "{spent}");
        }
        println!("with all that it held: {}", used());
        drop((held, there));
        device.settle().await;
        println!("without: {}", used());
    });
}

/// What NVML says of the GPU's used memory.
fn used() -> String {
    let mut command = Command::new("nvidia-smi");
    command.args(["--query-gpu=memory.used", "--format=csv,noheader"]);
    match command.output() {
        Ok(output) => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        Err(error) => format!("no nvidia-smi: {error}"),
    }
}

/// Not an assertion either: what it costs to take memory on both sides.
#[test]
fn time_of_taking_memory() {
    with_gpu(async |cuda| {
        let device = open(&cuda).await;
        for gib in [1, 8, 32] {
            let bytes = Bytes::gib(gib);
            if device.figures().await.unwrap().free < bytes + Bytes::gib(1) {
                break;
            }
            let began = Instant::now();
            let held = device.clone().allocate(bytes).await.unwrap();
            let allocated = began.elapsed();
            let began = Instant::now();
            drop(held);
            device.settle().await;
            println!(
                "{bytes} on the GPU: allocated in {allocated:.1?}, freed in {:.1?}",
                began.elapsed()
            );
        }
        let Some(functions) = Functions::find() else {
            return;
        };
        for (pages, advice) in [
            ("4 KiB", libc::MADV_NOHUGEPAGE),
            ("2 MiB", libc::MADV_HUGEPAGE),
        ] {
            let mut memory = Anonymous::new(1 << 30, advice);
            let [registered, unregistered] = functions.registering(memory.bytes());
            println!(
                "1 GiB on pages of {pages}: registered in {registered:.1?}, unregistered in {unregistered:.1?}"
            );
        }
    });
}

/// Memory of this process, whose pages are all there.
struct Anonymous {
    at: *mut libc::c_void,
    bytes: usize,
}

impl Anonymous {
    fn new(bytes: usize, advice: i32) -> Self {
        let (access, kind) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: new memory, wherever there is room.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, kind, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED, "no memory");
        // SAFETY: all of the mapping above. Where the kernel has no such pages, it is a matter of speed only.
        unsafe { libc::madvise(at, bytes, advice) };
        let mut made = Self { at, bytes };
        made.bytes().fill(1);
        made
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: mapped in `new` for reading and writing, zeroed by the kernel, and borrowed from nobody else.
        unsafe { std::slice::from_raw_parts_mut(self.at.cast(), self.bytes) }
    }
}

impl Drop for Anonymous {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and nothing borrows it any more.
        unsafe { libc::munmap(self.at, self.bytes) };
    }
}
