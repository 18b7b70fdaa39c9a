//! Device memory: physical handles, address ranges, and the mappings between them.

use std::ffi::{c_int, c_uint, c_ulonglong, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use cudarc::driver::sys::{
    CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationHandleType, CUmemAllocationProp,
    CUmemAllocationType, CUmemLocation, CUmemLocationType,
};
use hotset_double_machine::{Call, Machine};

use crate::state::{Handle, Mapping, Reservation, State, state};
use crate::{
    Answer, Code, INVALID_DEVICE, INVALID_HANDLE, INVALID_VALUE, OUT_OF_MEMORY, answer, device,
    fault, misuse, store,
};

/// The GPU of a location.
fn located(machine: &Machine, location: &CUmemLocation) -> Result<usize, Code> {
    if location.type_ != CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE {
        return Err(misuse(
            machine,
            INVALID_DEVICE,
            "memory that is not on a device",
        ));
    }
    device(machine, location.id)
}

fn granular(machine: &Machine, gpu: usize, what: &str, bytes: u64) -> Answer {
    let granularity = machine.gpu(gpu).granularity.load(SeqCst);
    if bytes == 0 || !bytes.is_multiple_of(granularity) {
        let text = format!("{what} of {bytes} bytes, which is no multiple of {granularity}");
        return Err(misuse(machine, INVALID_VALUE, text));
    }
    Ok(())
}

fn checked<'a>(
    machine: &Machine,
    prop: *const CUmemAllocationProp,
) -> Result<&'a CUmemAllocationProp, Code> {
    // SAFETY: the contract of the driver's function: `prop` is null or points to properties that live through the call.
    let prop = unsafe { prop.as_ref() }
        .ok_or_else(|| misuse(machine, INVALID_VALUE, "no properties for an allocation"))?;
    if prop.type_ != CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED {
        return Err(misuse(
            machine,
            INVALID_VALUE,
            "an allocation that is not pinned",
        ));
    }
    if prop.requestedHandleTypes
        != CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    {
        return Err(misuse(
            machine,
            INVALID_VALUE,
            "an allocation that cannot be exported as a descriptor",
        ));
    }
    Ok(prop)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemGetAllocationGranularity(
    granularity: *mut usize,
    prop: *const CUmemAllocationProp,
    _option: c_uint,
) -> Code {
    answer(Call::cuMemGetAllocationGranularity, |machine| {
        let gpu = located(machine, &checked(machine, prop)?.location)?;
        let bytes = machine.gpu(gpu).granularity.load(SeqCst);
        store(machine, granularity, bytes as usize)
    })
}

/// Takes one of a counter that stands for the next calls.
pub(crate) fn take_one(counter: &std::sync::atomic::AtomicU32) -> bool {
    counter
        .fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1))
        .is_ok()
}

#[unsafe(no_mangle)]
extern "C" fn cuMemCreate(
    handle: *mut u64,
    bytes: usize,
    prop: *const CUmemAllocationProp,
    _flags: c_ulonglong,
) -> Code {
    answer(Call::cuMemCreate, |machine| {
        let gpu = located(machine, &checked(machine, prop)?.location)?;
        let bytes = bytes as u64;
        fault(machine, gpu)?;
        granular(machine, gpu, "an allocation", bytes)?;
        let mut state = state();
        if take_one(&machine.gpu(gpu).refuse_allocations) || bytes > machine.free(gpu) {
            return Err(OUT_OF_MEMORY);
        }
        // SAFETY: a plain system call with a literal name; the result is checked.
        let fd = unsafe { libc::memfd_create(c"device memory".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(OUT_OF_MEMORY);
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let memfd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: a plain system call on a descriptor that is open.
        if unsafe { libc::ftruncate(fd, bytes as libc::off_t) } != 0 {
            return Err(OUT_OF_MEMORY);
        }
        let inode = inode(fd).ok_or(OUT_OF_MEMORY)?;
        machine.gpu(gpu).allocated.fetch_add(bytes, SeqCst);
        let _row = machine.add_row(inode, bytes, gpu);
        let number = add_handle(machine, &mut state, gpu, bytes, memfd, inode);
        store(machine, handle, number)
    })
}

fn add_handle(
    machine: &Machine,
    state: &mut State,
    gpu: usize,
    bytes: u64,
    memfd: OwnedFd,
    inode: u64,
) -> u64 {
    let number = state.number();
    let memfd = Arc::new(memfd);
    state.handles.insert(
        number,
        Handle {
            gpu,
            bytes,
            memfd,
            inode,
        },
    );
    let process = machine.process();
    process.handles.fetch_add(1, SeqCst);
    process.memory[gpu].fetch_add(bytes, SeqCst);
    number
}

fn inode(fd: c_int) -> Option<u64> {
    // SAFETY: all zeros is a valid `stat`, which the call fills.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` is a valid place for the result; a wrong descriptor is an error.
    (unsafe { libc::fstat(fd, &raw mut stat) } == 0).then_some(stat.st_ino)
}

fn wrong_handle(machine: &Machine, call: &str, handle: u64) -> Code {
    misuse(
        machine,
        INVALID_VALUE,
        format!("{call} of handle {handle:#x}, which does not live"),
    )
}

#[unsafe(no_mangle)]
extern "C" fn cuMemRelease(handle: u64) -> Code {
    answer(Call::cuMemRelease, |machine| {
        let mut state = state();
        let Some(known) = state.handles.get(&handle) else {
            return Err(wrong_handle(machine, "cuMemRelease", handle));
        };
        fault(machine, known.gpu)?;
        release(machine, &mut state, handle);
        Ok(())
    })
}

fn release(machine: &Machine, state: &mut State, handle: u64) {
    if let Some(handle) = state.handles.remove(&handle) {
        let process = machine.process();
        process.handles.fetch_sub(1, SeqCst);
        process.memory[handle.gpu].fetch_sub(handle.bytes, SeqCst);
        machine.drop_reference(handle.inode);
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemExportToShareableHandle(
    to: *mut c_void,
    handle: u64,
    kind: c_uint,
    _flags: c_ulonglong,
) -> Code {
    answer(Call::cuMemExportToShareableHandle, |machine| {
        if kind != CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR.0 {
            return Err(misuse(
                machine,
                INVALID_VALUE,
                "an export that is no descriptor",
            ));
        }
        let state = state();
        let Some(known) = state.handles.get(&handle) else {
            return Err(wrong_handle(
                machine,
                "cuMemExportToShareableHandle",
                handle,
            ));
        };
        fault(machine, known.gpu)?;
        let copy = known.memfd.try_clone().map_err(|_| INVALID_VALUE)?;
        store(machine, to.cast::<c_int>(), copy.into_raw_fd())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemImportFromShareableHandle(
    handle: *mut u64,
    os: *mut c_void,
    _kind: c_uint,
) -> Code {
    answer(Call::cuMemImportFromShareableHandle, |machine| {
        let fd = os as usize as c_int;
        let Some(row) = inode(fd).and_then(|inode| machine.row(inode)) else {
            // The driver would have kept it for a descriptor that is still on its way when all who had it let go, as they do when
            // their GPU is lost. The books do not see such a descriptor: who comes that late is refused.
            let path = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_default();
            return match path.to_string_lossy().starts_with(DEVICE_MEMORY) {
                true => Err(INVALID_VALUE),
                false => Err(misuse(
                    machine,
                    INVALID_VALUE,
                    "an import of no device memory",
                )),
            };
        };
        let gpu = row.gpu.load(SeqCst) as usize;
        fault(machine, gpu)?;
        // SAFETY: `inode` has just used the descriptor, and the caller keeps it open through the call.
        let memfd = unsafe { BorrowedFd::borrow_raw(fd) }
            .try_clone_to_owned()
            .map_err(|_| INVALID_VALUE)?;
        row.references.fetch_add(1, SeqCst);
        let (bytes, inode) = (row.bytes.load(SeqCst), row.inode.load(SeqCst));
        let number = add_handle(machine, &mut state(), gpu, bytes, memfd, inode);
        store(machine, handle, number)
    })
}

/// What the kernel calls the files that `cuMemCreate` makes.
const DEVICE_MEMORY: &str = "/memfd:device memory";

/// Maps nothing that anybody may touch, at an address that is the caller's, or where there is room.
fn reserve_host(at: u64, bytes: u64) -> Option<u64> {
    let fixed = if at == 0 { 0 } else { libc::MAP_FIXED };
    // SAFETY: without MAP_FIXED the kernel chooses a free place; with it, the range is one that this function reserved.
    let start = unsafe {
        libc::mmap(
            at as *mut c_void,
            bytes as usize,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | fixed,
            -1,
            0,
        )
    };
    (start != libc::MAP_FAILED).then_some(start as u64)
}

fn unmap_host(start: u64, bytes: u64) {
    if bytes > 0 {
        // SAFETY: a range that `reserve_host` made and that the books no longer hold.
        unsafe { libc::munmap(start as *mut c_void, bytes as usize) };
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAddressReserve(
    to: *mut u64,
    bytes: usize,
    alignment: usize,
    _address: u64,
    _flags: c_ulonglong,
) -> Code {
    answer(Call::cuMemAddressReserve, |machine| {
        let bytes = bytes as u64;
        granular(machine, 0, "an address range", bytes)?;
        let alignment = (alignment as u64).max(machine.gpu(0).granularity.load(SeqCst));
        let start = reserve_host(0, bytes + alignment).ok_or(OUT_OF_MEMORY)?;
        let aligned = start.next_multiple_of(alignment);
        unmap_host(start, aligned - start);
        unmap_host(aligned + bytes, start + alignment - aligned);
        state().reservations.insert(aligned, Reservation { bytes });
        machine.process().reservations.fetch_add(1, SeqCst);
        store(machine, to, aligned)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAddressFree(at: u64, bytes: usize) -> Code {
    answer(Call::cuMemAddressFree, |machine| {
        let (mut state, bytes) = (state(), bytes as u64);
        if state
            .reservations
            .get(&at)
            .is_none_or(|known| known.bytes != bytes)
        {
            let text =
                format!("cuMemAddressFree of {at:#x}, {bytes} bytes, which is no reserved range");
            return Err(misuse(machine, INVALID_VALUE, text));
        }
        if State::touches(&state.mappings, |mapping| mapping.bytes, at, bytes) {
            return Err(misuse(
                machine,
                INVALID_VALUE,
                "cuMemAddressFree of a range with a mapping in it",
            ));
        }
        state.reservations.remove(&at);
        machine.process().reservations.fetch_sub(1, SeqCst);
        unmap_host(at, bytes);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemMap(
    at: u64,
    bytes: usize,
    offset: usize,
    handle: u64,
    _flags: c_ulonglong,
) -> Code {
    answer(Call::cuMemMap, |machine| {
        let (mut state, bytes) = (state(), bytes as u64);
        let Some(known) = state.handles.get(&handle) else {
            return Err(wrong_handle(machine, "cuMemMap", handle));
        };
        let (gpu, inode, memfd) = (known.gpu, known.inode, known.memfd.clone());
        fault(machine, gpu)?;
        if offset != 0 || bytes != known.bytes {
            return Err(misuse(
                machine,
                INVALID_VALUE,
                "cuMemMap of a part of an allocation",
            ));
        }
        if State::containing(&state.reservations, |range| range.bytes, at, bytes).is_none() {
            return Err(misuse(
                machine,
                INVALID_VALUE,
                "cuMemMap outside of any reserved range",
            ));
        }
        if State::touches(&state.mappings, |mapping| mapping.bytes, at, bytes) {
            return Err(misuse(
                machine,
                INVALID_VALUE,
                "cuMemMap over another mapping",
            ));
        }
        // SAFETY: the range lies inside one that `reserve_host` made, and no mapping lies in it.
        let start = unsafe {
            libc::mmap(
                at as *mut c_void,
                bytes as usize,
                libc::PROT_NONE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                memfd.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(OUT_OF_MEMORY);
        }
        if let Some(row) = machine.row(inode) {
            row.references.fetch_add(1, SeqCst);
        }
        state.mappings.insert(
            at,
            Mapping {
                bytes,
                gpu,
                inode,
                access: libc::PROT_NONE,
            },
        );
        machine.process().mappings.fetch_add(1, SeqCst);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemSetAccess(
    at: u64,
    bytes: usize,
    desc: *const CUmemAccessDesc,
    count: usize,
) -> Code {
    answer(Call::cuMemSetAccess, |machine| {
        if desc.is_null() || count != 1 {
            return Err(misuse(
                machine,
                INVALID_VALUE,
                "cuMemSetAccess without a single description",
            ));
        }
        // SAFETY: the contract of the driver's function: `desc` points to `count` descriptions.
        let desc = unsafe { &*desc };
        let gpu = located(machine, &desc.location)?;
        let access = match desc.flags {
            CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READ => libc::PROT_READ,
            CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE => {
                libc::PROT_READ | libc::PROT_WRITE
            }
            _ => libc::PROT_NONE,
        };
        let mut state = state();
        let Some(mapping) = state
            .mappings
            .get_mut(&at)
            .filter(|known| known.bytes == bytes as u64)
        else {
            return Err(misuse(
                machine,
                INVALID_VALUE,
                "cuMemSetAccess of no mapping",
            ));
        };
        fault(machine, gpu)?;
        mapping.access = access;
        // SAFETY: the range is a live mapping of this library.
        match unsafe { libc::mprotect(at as *mut c_void, bytes, access) } {
            0 => Ok(()),
            _ => Err(INVALID_VALUE),
        }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemUnmap(at: u64, bytes: usize) -> Code {
    answer(Call::cuMemUnmap, |machine| {
        let (mut state, bytes) = (state(), bytes as u64);
        let Some(mapping) = state.mappings.get(&at).filter(|known| known.bytes == bytes) else {
            let text = format!("cuMemUnmap of {at:#x}, {bytes} bytes, which is no mapping");
            return Err(misuse(machine, INVALID_VALUE, text));
        };
        fault(machine, mapping.gpu)?;
        if state.pending_in(at, bytes).is_some() {
            machine.report("cuMemUnmap of memory that a copy still uses");
        }
        unmap(machine, &mut state, at);
        Ok(())
    })
}

fn unmap(machine: &Machine, state: &mut State, at: u64) {
    if let Some(mapping) = state.mappings.remove(&at) {
        let _ = reserve_host(at, mapping.bytes);
        machine.process().mappings.fetch_sub(1, SeqCst);
        machine.drop_reference(mapping.inode);
    }
}

/// A context of this GPU ends: its memory goes with it.
pub(crate) fn forget(machine: &Machine, state: &mut State, gpu: usize) {
    let gone: Vec<u64> = state
        .mappings
        .iter()
        .filter(|(_, m)| m.gpu == gpu)
        .map(|(at, _)| *at)
        .collect();
    for at in gone {
        unmap(machine, state, at);
    }
    let gone: Vec<u64> = state
        .handles
        .iter()
        .filter(|(_, h)| h.gpu == gpu)
        .map(|(n, _)| *n)
        .collect();
    for handle in gone {
        release(machine, state, handle);
    }
}

/// Whether a GPU may do this to a range of its memory.
pub(crate) fn accessible(
    machine: &Machine,
    state: &State,
    at: u64,
    bytes: u64,
    access: i32,
) -> Answer {
    let Some((_, mapping)) = State::containing(&state.mappings, |mapping| mapping.bytes, at, bytes)
    else {
        let text =
            format!("a copy to or from {at:#x}, {bytes} bytes, where no device memory is mapped");
        return Err(misuse(machine, INVALID_VALUE, text));
    };
    // What a careful program may try: a client's mapping is read-only, and a write through it is refused.
    if mapping.access & access == access {
        Ok(())
    } else {
        Err(INVALID_HANDLE)
    }
}
