//! The CUDA device on the doubles of the driver and of NVML: the same code, the same libraries' names, no GPU.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use futures::FutureExt;
use hotset_double_machine::{Call, Isolated, Machine, in_role, run, run_role, this_test};

use super::{Cuda, CudaDevice, CudaError, Imported};
use crate::device::contract::{self, host_bytes, host_slab};
use crate::device::{Allocation, Device, DeviceError, Export, FigureSource};
use crate::ids::GpuIndex;
use crate::memory::{HostRange, OfferedMemory, Slab};
use crate::units::Bytes;

/// Runs a body that needs tokio.
fn block_on(body: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(60), body)
            .await
            .expect("a step did not end");
    });
}

async fn open(cuda: &Cuda, index: u32) -> Arc<CudaDevice> {
    let gpu = &cuda.gpus()[index as usize];
    cuda.open(GpuIndex(index), gpu).await.unwrap()
}

fn two() -> Isolated {
    Isolated {
        gpus: 2,
        ..Isolated::default()
    }
}

async fn first() -> Arc<CudaDevice> {
    open(&Cuda::detect().unwrap(), 0).await
}

/// Bytes that differ from place to place and from seed to seed.
fn contents(seed: u64, bytes: usize) -> Vec<u8> {
    let at = |i: u64| (i.wrapping_add(seed)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    (0..bytes as u64).map(|i| at(i) as u8).collect()
}

async fn uploaded(device: &Arc<CudaDevice>, bytes: &[u8]) -> Allocation {
    let size = Bytes(bytes.len() as u64);
    let to = device.clone().allocate(size).await.unwrap();
    device.upload(&to, 0, host_bytes(bytes)).await.unwrap();
    to
}

async fn read(device: &CudaDevice, from: &Allocation, bytes: usize) -> Vec<u8> {
    device.download(from, 0, bytes as u64).await.unwrap()
}

/// Waits until the machine is as wanted.
async fn until(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..4000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{what} did not come");
}

#[test]
fn it_keeps_the_contract() {
    run(this_test!(), Isolated::default(), |_| {
        block_on(async { contract::check(first().await).await });
    });
}

#[test]
fn without_a_driver_there_is_no_gpu_and_no_panic() {
    let without = Isolated {
        cuda: false,
        ..Isolated::default()
    };
    run(this_test!(), without, |_| {
        assert_eq!(Cuda::detect().unwrap_err(), CudaError::NoLibrary);
    });
}

#[test]
fn gpus_are_known_by_ordinal_and_uuid() {
    run(this_test!(), two(), |_| {
        let cuda = Cuda::detect().unwrap();
        let [first, second] = cuda.gpus() else {
            panic!("two GPUs");
        };
        assert_eq!(first.memory, Bytes::gib(1));
        assert!(first.is_meant_by("0") && !first.is_meant_by("1"));
        assert!(second.is_meant_by(&second.uuid) && !first.is_meant_by(&second.uuid));
        assert!(second.is_meant_by(second.uuid.strip_suffix("01").unwrap()));
        assert!(!first.is_meant_by("GPU-") && !first.is_meant_by(""));
    });
}

#[test]
fn hundreds_of_small_components_share_pages() {
    run(this_test!(), Isolated::default(), |machine| {
        block_on(async {
            let device = first().await;
            let mut held = Vec::new();
            for i in 0..300 {
                held.push((uploaded(&device, &contents(i, 40_000)).await, i));
            }
            // 300 x 40 KiB in pages of 2 MiB, instead of a page for each.
            let taken = machine.gpu(0).allocated.load(SeqCst);
            assert!(taken <= 14 << 20, "{taken} bytes for 12 MB of components");
            let figures = device.figures().await.unwrap();
            assert_eq!(figures.allocated, Bytes(300 * 40_960));
            assert_eq!(
                figures.allocated + figures.overhead,
                Bytes(taken) + figures.context.unwrap(),
                "what shared pages lose is counted"
            );
            // Every second goes; the others keep their bytes, and the holes are used again.
            let mut kept = Vec::new();
            for (i, (allocation, seed)) in held.into_iter().enumerate() {
                if i % 2 == 0 {
                    kept.push((allocation, seed));
                }
            }
            device.settle().await;
            for i in 1000..1100 {
                kept.push((uploaded(&device, &contents(i, 40_000)).await, i));
            }
            assert_eq!(machine.gpu(0).allocated.load(SeqCst), taken);
            for (allocation, seed) in &kept {
                assert!(read(&device, allocation, 40_000).await == contents(*seed, 40_000));
            }
        });
    });
}

#[test]
fn host_memory_is_registered_once_and_unregistered_before_it_goes() {
    run(this_test!(), Isolated::default(), |machine| {
        block_on(async {
            let device = first().await;
            let bytes = contents(1, 5 << 20);
            let slab = host_slab(&bytes);
            let to = device.clone().allocate(Bytes::mib(5)).await.unwrap();
            let pieces = (0..5_u64).map(|i| {
                let from = HostRange::new(slab.clone(), i << 20, (i + 1) << 20).unwrap();
                device.upload(&to, i << 20, from)
            });
            for outcome in futures::future::join_all(pieces).await {
                outcome.unwrap();
            }
            assert!(read(&device, &to, bytes.len()).await == bytes);
            assert_eq!(machine.calls(Call::cuMemHostRegister), 1);
            assert_eq!(machine.calls(Call::cuMemHostUnregister), 0);
            drop(slab);
            // The double reports memory that is unmapped while it is registered.
            assert_eq!(machine.calls(Call::cuMemHostUnregister), 1);
        });
    });
}

#[test]
fn memory_that_cannot_be_registered_goes_through_pinned_buffers() {
    run(this_test!(), Isolated::default(), |machine| {
        machine.gpu(0).refuse_registration.store(1, SeqCst);
        block_on(async {
            let device = first().await;
            let bytes = contents(2, (13 << 20) + 7);
            let slab = host_slab(&bytes);
            let to = device.clone().allocate(Bytes::mib(14)).await.unwrap();
            for _ in 0..2 {
                let from = HostRange::new(slab.clone(), 0, bytes.len() as u64).unwrap();
                device.upload(&to, 0, from).await.unwrap();
            }
            assert!(read(&device, &to, bytes.len()).await == bytes);
            assert_eq!(machine.calls(Call::cuMemHostRegister), 1, "asked once");
        });
    });
}

#[test]
fn another_process_maps_it_read_only() {
    let test = this_test!();
    let bytes = contents(3, 3 << 20);
    run(test, Isolated::default(), |machine| {
        block_on(async {
            let device = first().await;
            let large = uploaded(&device, &bytes).await;
            let small = uploaded(&device, &bytes[..5000]).await;
            let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
            let at_first = open();
            drop(device.export(&large).await.unwrap());
            drop(device.export(&large).await.unwrap());
            let made = machine.calls(Call::cuMemExportToShareableHandle);
            assert_eq!((made, open()), (1, at_first + 1), "made once, and kept");
            for (allocation, len) in [(&large, bytes.len()), (&small, 5000)] {
                let before = machine.gpu(0).allocated.load(SeqCst);
                let export = device.export(allocation).await.unwrap();
                // Inherited, for want of a socket.
                let descriptor = export.descriptor.as_raw_fd();
                // SAFETY: a plain system call on a descriptor that is open.
                assert_eq!(unsafe { libc::fcntl(descriptor, libc::F_SETFD, 0) }, 0);
                let facts = [
                    ("EXPORT_FD", descriptor.to_string()),
                    ("EXPORT_MAPPED", export.mapped.get().to_string()),
                    ("EXPORT_OFFSET", export.offset.to_string()),
                    ("EXPORT_BYTES", export.bytes.get().to_string()),
                    ("EXPORT_WANTED", len.to_string()),
                ];
                run_role(test, "client", &facts);
                assert_eq!(machine.gpu(0).allocated.load(SeqCst), before, "shared");
                assert!(
                    read(&device, allocation, len).await == bytes[..len],
                    "as it was"
                );
            }
            // What is kept of it would hold the memory as well.
            drop((large, small));
            device.settle().await;
            assert!(open() < at_first, "descriptors go with the memory");
        });
    });
    in_role("client", || {
        let number = |name| std::env::var(name).unwrap().parse::<u64>().unwrap();
        let cuda = Cuda::detect().unwrap();
        let export = Export {
            // SAFETY: the descriptor that the other process left open for this one alone.
            descriptor: unsafe { OwnedFd::from_raw_fd(number("EXPORT_FD") as i32) },
            mapped: Bytes(number("EXPORT_MAPPED")),
            offset: number("EXPORT_OFFSET"),
            bytes: Bytes(number("EXPORT_BYTES")),
            uuid: cuda.gpus()[0].uuid.clone(),
        };
        let imported = Imported::open(&cuda, &cuda.gpus()[0], export).unwrap();
        let wanted = number("EXPORT_WANTED") as usize;
        assert!(imported.read().unwrap()[..wanted] == bytes[..wanted]);
        assert!(imported.overwrite().is_err(), "a client must not write");
        drop((imported, cuda));
        let machine = Machine::of_environment().unwrap();
        assert_eq!(machine.live(), hotset_double_machine::Live::default());
    });
}

/// Memory of a server that is gone can only be read, and is registered all the same.
#[test]
fn what_was_taken_over_is_read_by_dma_too() {
    run(this_test!(), Isolated::default(), |machine| {
        block_on(async {
            let device = first().await;
            let bytes = contents(9, 4 << 20);
            let slab = host_slab(&bytes);
            let kept = slab.read_only_descriptor().unwrap();
            drop(slab);
            let offered = OfferedMemory::new(kept).unwrap();
            let slab = offered.freeze(Bytes::mib(4)).unwrap().accept();
            let to = device.clone().allocate(Bytes::mib(4)).await.unwrap();
            let from = HostRange::new(slab, 0, 4 << 20).unwrap();
            device.upload(&to, 0, from.clone()).await.unwrap();
            assert!(read(&device, &to, bytes.len()).await == bytes);
            let pinned = || machine.process().registrations.load(SeqCst);
            let with = pinned();
            drop(from);
            device.settle().await;
            assert_eq!(pinned() + 1, with, "it was registered");
        });
    });
}

#[test]
fn too_much_is_refused_with_the_figures_and_others_use_is_seen() {
    run(this_test!(), Isolated::default(), |machine| {
        block_on(async {
            let device = first().await;
            let before = device.figures().await.unwrap();
            assert_eq!(before.source, FigureSource::Nvml);
            assert_eq!(before.context, Some(Bytes::mib(32)), "measured");
            // 1 GiB less the driver's 4 MiB and the context.
            assert_eq!(before.free, Bytes::mib(1024 - 4 - 32));
            assert_eq!(
                before.foreign,
                Bytes::ZERO,
                "the driver's own is nobody's use"
            );
            let gpu = machine.gpu(0);
            gpu.foreign.store(600 << 20, SeqCst);
            gpu.throttle.store(0x40, SeqCst);
            gpu.raise_xid(31);
            let after = device.figures().await.unwrap();
            assert_eq!(after.foreign, Bytes::mib(600));
            assert_eq!(after.temperature_c, Some(41));
            assert_eq!(after.pcie, Some((4, 16)));
            assert_eq!(after.throttling, ["hw thermal slowdown"]);
            assert_eq!(after.xids, [31]);
            assert_eq!(after.mig, Some(false));
            let others = |figures: &crate::device::Figures| -> Vec<Option<Bytes>> {
                let own = std::process::id();
                let others = figures
                    .processes
                    .iter()
                    .filter(|process| process.pid != own);
                others.map(|process| process.bytes).collect()
            };
            assert_eq!(others(&after), [Some(Bytes::mib(600))]);
            gpu.hide_processes.store(1, SeqCst);
            assert_eq!(others(&device.figures().await.unwrap()), [None]);
            let refused = device.clone().allocate(Bytes::mib(500)).await;
            let free = Bytes::mib(1024 - 4 - 32 - 600);
            assert_eq!(
                refused.unwrap_err(),
                DeviceError::OutOfMemory {
                    gpu: GpuIndex(0),
                    wanted: Bytes::mib(500),
                    free
                }
            );
            let lost = device.figures().await.unwrap();
            assert_eq!(lost.xids, Vec::<u64>::new(), "heard once");
        });
    });
}

#[test]
fn without_nvml_the_drivers_own_figures_are_used() {
    let without = Isolated {
        nvml: false,
        ..Isolated::default()
    };
    run(this_test!(), without, |machine| {
        block_on(async {
            let device = first().await;
            machine.gpu(0).foreign.store(100 << 20, SeqCst);
            let held = device.clone().allocate(Bytes::mib(10)).await.unwrap();
            let figures = device.figures().await.unwrap();
            assert_eq!(figures.source, FigureSource::Driver);
            assert_eq!(figures.free, Bytes::mib(1024 - 4 - 32 - 100 - 10));
            assert_eq!(figures.allocated, Bytes::mib(10));
            // Nobody can tell the context from what others use.
            assert_eq!(figures.context, None);
            assert_eq!(figures.foreign, Bytes::mib(4 + 32 + 100));
            drop(held);
        });
    });
}

#[test]
fn memory_outlives_the_copies_that_nobody_waits_for() {
    run(this_test!(), Isolated::default(), |machine| {
        block_on(async {
            let device = first().await;
            let gpu = machine.gpu(0);
            for bytes in [2 << 20, 100_000] {
                gpu.hold_copies.store(1, SeqCst);
                let to = device.clone().allocate(Bytes(bytes)).await.unwrap();
                let from = host_bytes(&contents(4, bytes as usize));
                let before = machine.calls(Call::cuEventRecord);
                let mut upload = device.upload(&to, 0, from);
                assert!((&mut upload).now_or_never().is_none());
                // The registration, where there is one, is answered before the copy is queued.
                while machine.calls(Call::cuEventRecord) == before {
                    assert!((&mut upload).now_or_never().is_none());
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                drop(upload);
                drop(to);
                device.settle().await;
                assert!(gpu.allocated.load(SeqCst) > 0, "a copy still writes there");
                gpu.hold_copies.store(0, SeqCst);
                until("the memory to be free", || gpu.allocated.load(SeqCst) == 0).await;
            }
        });
    });
}

#[test]
fn a_sticky_error_takes_the_device_from_this_process() {
    run(this_test!(), Isolated::default(), |machine| {
        block_on(async {
            let device = first().await;
            let gpu = machine.gpu(0);
            let slab = host_slab(&contents(5, 4 << 20));
            let from = || HostRange::new(slab.clone(), 0, 4 << 20).unwrap();
            let to = device.clone().allocate(Bytes::mib(4)).await.unwrap();
            let small = uploaded(&device, b"small").await;
            device.upload(&to, 0, from()).await.unwrap();
            let before = machine.calls(Call::cuEventRecord);
            gpu.hold_copies.store(1, SeqCst);
            let upload = tokio::spawn({
                let (device, from) = (device.clone(), from());
                async move {
                    let outcome = device.upload(&to, 0, from).await;
                    (to, outcome)
                }
            });
            until("the copy to be queued", || {
                machine.calls(Call::cuEventRecord) > before || upload.is_finished()
            })
            .await;
            gpu.sticky.store(700, SeqCst);
            let (to, outcome) = upload.await.unwrap();
            let Err(DeviceError::Lost { reason, .. }) = outcome else {
                panic!("{outcome:?}");
            };
            assert!(reason.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{reason}");
            assert_eq!(device.lost(), Some(reason));
            let refused = device.clone().allocate(Bytes(1)).await;
            assert!(matches!(refused, Err(DeviceError::Lost { .. })));
            assert!(matches!(
                device.figures().await,
                Err(DeviceError::Lost { .. })
            ));

            gpu.hold_copies.store(0, SeqCst);
            for _ in 0..2 {
                let spent = device.recover().await.unwrap_err();
                assert!(matches!(spent, DeviceError::Spent { .. }), "{spent}");
                assert!(spent.to_string().contains("restart it"), "{spent}");
            }
            drop((to, small));
            device.settle().await;
            assert_eq!(gpu.allocated.load(SeqCst), 0);
        });
    });
}

#[test]
fn a_gpu_that_fell_off_the_bus_stays_lost() {
    run(this_test!(), Isolated::default(), |machine| {
        block_on(async {
            let device = first().await;
            let held = uploaded(&device, b"weights").await;
            machine.gpu(0).raise_xid(79);
            let lost = device.figures().await.unwrap_err();
            assert!(lost.to_string().contains("Xid 79"), "{lost}");
            machine.gpu(0).lost.store(1, SeqCst);
            let still = device.recover().await.unwrap_err();
            assert!(matches!(still, DeviceError::Lost { .. }), "{still}");
            // Somebody pushed it back in.
            machine.gpu(0).lost.store(0, SeqCst);
            device.recover().await.unwrap();
            assert_eq!(device.lost(), None);
            // What was there is gone, and says so.
            let gone = device.download(&held, 0, 1).await;
            assert!(matches!(gone, Err(DeviceError::Lost { .. })), "{gone:?}");
            let again = uploaded(&device, b"again").await;
            drop(held);
            assert!(read(&device, &again, 5).await == b"again");
        });
    });
}

/// What is pinned for both GPUs is registered in the context of one, which may end at any time.
#[test]
fn host_memory_stays_pinned_for_the_copies_of_others_when_its_gpu_is_lost() {
    run(this_test!(), two(), |machine| {
        block_on(async {
            let cuda = Cuda::detect().unwrap();
            let (a, b) = (open(&cuda, 0).await, open(&cuda, 1).await);
            let bytes = contents(7, 4 << 20);
            let slab = host_slab(&bytes);
            let from = || HostRange::new(slab.clone(), 0, bytes.len() as u64).unwrap();
            let own = a.clone().allocate(Bytes::mib(4)).await.unwrap();
            a.upload(&own, 0, from()).await.unwrap();
            assert_eq!(machine.calls(Call::cuMemHostRegister), 1);
            let mut to = b.clone().allocate(Bytes::mib(4)).await.unwrap();
            for broken in [&machine.gpu(0).lost, &machine.gpu(0).sticky] {
                let before = machine.calls(Call::cuEventRecord);
                machine.gpu(1).hold_copies.store(1, SeqCst);
                let upload = tokio::spawn({
                    let (b, to, from) = (b.clone(), to, from());
                    async move {
                        b.upload(&to, 0, from).await.unwrap();
                        to
                    }
                });
                until("the copy to be queued", || {
                    machine.calls(Call::cuEventRecord) > before
                })
                .await;
                broken.store(700, SeqCst);
                assert!(a.figures().await.is_err());
                let recovering = tokio::spawn({
                    let a = a.clone();
                    async move { a.recover().await }
                });
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                machine.gpu(1).hold_copies.store(0, SeqCst);
                to = upload.await.unwrap();
                assert!(read(&b, &to, bytes.len()).await == bytes);
                // Lost for good for now, or back: the other one goes on all the same.
                let _ = recovering.await.unwrap();
                b.upload(&to, 0, from()).await.unwrap();
                machine.gpu(0).lost.store(0, SeqCst);
                if let Err(error) = a.recover().await {
                    assert!(matches!(error, DeviceError::Spent { .. }), "{error}");
                    continue;
                }
                let again = a.clone().allocate(Bytes::mib(4)).await.unwrap();
                a.upload(&again, 0, from()).await.unwrap();
                b.upload(&to, 0, from()).await.unwrap();
                assert!(read(&a, &again, bytes.len()).await == bytes);
            }
        });
    });
}

/// What a lost GPU has registered stays so until its context is gone, whatever becomes of the memory.
#[test]
fn nothing_comes_to_lie_where_a_lost_gpu_has_memory_registered() {
    run(this_test!(), two(), |machine| {
        block_on(async {
            let cuda = Cuda::detect().unwrap().patience(Duration::from_millis(300));
            let (a, b) = (open(&cuda, 0).await, open(&cuda, 1).await);
            let bytes = contents(7, 4 << 20);
            let all =
                |slab: &Arc<Slab>| HostRange::new(slab.clone(), 0, bytes.len() as u64).unwrap();
            let to = b.clone().allocate(Bytes::mib(4)).await.unwrap();
            for broken in [&machine.gpu(0).lost, &machine.gpu(0).hang] {
                let own = a.clone().allocate(Bytes::mib(4)).await.unwrap();
                let slab = host_slab(&bytes);
                a.upload(&own, 0, all(&slab)).await.unwrap();
                let address = slab.range().address;
                broken.store(700, SeqCst);
                assert!(a.figures().await.is_err());
                // It waits as long as the driver may take.
                tokio::task::spawn_blocking(move || drop(slab))
                    .await
                    .unwrap();
                let others: Vec<_> = (0..4).map(|_| host_slab(&bytes)).collect();
                for other in &others {
                    let at = other.range().address;
                    assert!(
                        at.abs_diff(address) >= 4 << 20,
                        "the addresses were withheld"
                    );
                    b.upload(&to, 0, all(other)).await.unwrap();
                    assert!(read(&b, &to, bytes.len()).await == bytes);
                }
                drop((own, others));
                broken.store(0, SeqCst);
                a.recover().await.unwrap();
                // They are anybody's again.
                let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
                let there = maps.lines().find(|line| {
                    let (from, rest) = line.split_once('-').unwrap();
                    let (to, _) = rest.split_once(' ').unwrap();
                    let [from, to] = [from, to].map(|at| usize::from_str_radix(at, 16).unwrap());
                    // But for what the allocator keeps for a thread, which is 64 MiB.
                    (from..to).contains(&address) && to - from < 32 << 20
                });
                let withheld = there.is_some_and(|line| line.contains(" ---p "));
                assert!(!withheld, "the addresses stay withheld: {there:?}");
            }
        });
    });
}

#[test]
fn a_component_comes_from_a_neighbour_without_the_host() {
    run(this_test!(), two(), |machine| {
        block_on(async {
            let cuda = Cuda::detect().unwrap();
            let (a, b) = (open(&cuda, 0).await, open(&cuda, 1).await);
            let bytes = contents(6, 3 << 20);
            let source = uploaded(&a, &bytes).await;
            let to = b.clone().allocate(Bytes::mib(3)).await.unwrap();
            let uploads = machine.calls(Call::cuMemcpyHtoDAsync);
            b.copy_peer(&to, &source, bytes.len() as u64).await.unwrap();
            assert!(read(&b, &to, bytes.len()).await == bytes);
            assert_eq!(machine.calls(Call::cuMemcpyHtoDAsync), uploads);
            // One slab, registered once, feeds both.
            let slab = host_slab(&bytes);
            let from = || HostRange::new(slab.clone(), 0, bytes.len() as u64).unwrap();
            let registered = machine.calls(Call::cuMemHostRegister);
            a.upload(&source, 0, from()).await.unwrap();
            b.upload(&to, 0, from()).await.unwrap();
            assert_eq!(machine.calls(Call::cuMemHostRegister), registered + 1);
        });
    });
}

/// The doubles are only worth as much as they notice.
#[test]
fn the_double_notices_what_a_driver_would_not_forgive() {
    let wrong = Isolated {
        misuse: &[
            "cuMemGetInfo on a thread without a current context",
            "an allocation of 5 bytes",
            "cuMemMap outside of any reserved range",
            "cuMemMap over another mapping",
            "cuMemAddressFree of a range with a mapping in it",
            "that is not registered",
            "cuMemUnmap of memory that a copy still uses",
            "cuMemHostUnregister of memory that a copy still uses",
            "where no device memory is mapped",
            "cuMemUnmap of",
            "which does not live",
            "cuMemHostRegister of memory that is not mapped",
            "cuMemHostRegister of memory that is not mapped",
            "unmapped or replaced while it was registered",
            "a context is released twice",
        ],
        ..Isolated::default()
    };
    run(this_test!(), wrong, |machine| {
        let driver = super::Driver::load().unwrap();
        driver.memory().unwrap_err();
        let context = driver.retain_context(0).unwrap();
        driver.enter(context).unwrap();
        driver.create(0, 5).unwrap_err();
        let page = driver.granularity(0).unwrap();
        let handle = driver.create(0, page).unwrap();
        driver.map(1 << 40, page, handle).unwrap_err();
        let address = driver.reserve(page, 0).unwrap();
        driver.map(address, page, handle).unwrap();
        driver.map(address, page, handle).unwrap_err();
        driver.grant(0, address, page, true).unwrap();
        driver.unreserve(address, page).unwrap_err();
        let stream = driver.stream().unwrap();
        let slab = host_slab(&contents(7, 1 << 20));
        let from = slab.range();
        driver
            .upload(address, from.address, 100, stream)
            .unwrap_err();
        driver.register(from.address, from.bytes).unwrap();
        machine.gpu(0).hold_copies.store(1, SeqCst);
        driver.upload(address, from.address, 100, stream).unwrap();
        driver.unmap(address, page).unwrap();
        driver.unregister(from.address).unwrap();
        machine.gpu(0).hold_copies.store(0, SeqCst);
        let event = driver.event().unwrap();
        driver.record(event, stream).unwrap();
        driver.wait(event).unwrap();
        driver.end_event(event).unwrap();
        driver
            .upload(address, from.address, 100, stream)
            .unwrap_err();
        driver.unmap(address, page).unwrap_err();
        driver.release(handle).unwrap();
        driver.release(handle).unwrap_err();
        driver.unreserve(address, page).unwrap();
        driver.end_stream(stream).unwrap();
        // Addresses that only the kernel has.
        driver.register(usize::MAX - (1 << 30), 4096).unwrap_err();
        driver.register(from.address, from.bytes).unwrap();
        drop(slab);
        driver.unregister(from.address).unwrap();
        driver.release_context(0).unwrap();
        driver.release_context(0).unwrap_err();
    });
}
