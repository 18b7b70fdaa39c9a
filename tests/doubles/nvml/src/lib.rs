//! Stands in for `libnvidia-ml.so.1`: exactly the functions that hotset calls, with the figures of the machine on which
//! the CUDA double runs.
#![allow(non_snake_case)]

use std::ffi::{CStr, c_char, c_uint, c_ulonglong};
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use hotset_double_machine::{Call, Gpu, Machine};
use nvml_wrapper_sys::bindings as nvml;
use nvml_wrapper_sys::bindings::{
    nvmlEventData_t, nvmlMemory_v2_t, nvmlProcessInfo_t, nvmlReturn_t,
};

const SUCCESS: nvmlReturn_t = nvml::nvmlReturn_enum_NVML_SUCCESS;
const UNINITIALIZED: nvmlReturn_t = nvml::nvmlReturn_enum_NVML_ERROR_UNINITIALIZED;
const INVALID_ARGUMENT: nvmlReturn_t = nvml::nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT;
const NOT_FOUND: nvmlReturn_t = nvml::nvmlReturn_enum_NVML_ERROR_NOT_FOUND;
const INSUFFICIENT_SIZE: nvmlReturn_t = nvml::nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE;
const GPU_IS_LOST: nvmlReturn_t = nvml::nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST;
const TIMEOUT: nvmlReturn_t = nvml::nvmlReturn_enum_NVML_ERROR_TIMEOUT;
/// NVML's own word for a figure that it does not tell.
const NOT_AVAILABLE: c_ulonglong = c_ulonglong::MAX;

type Answer = Result<(), nvmlReturn_t>;

static USERS: AtomicU32 = AtomicU32::new(0);

fn machine() -> Result<&'static Machine, nvmlReturn_t> {
    static MACHINE: OnceLock<Option<Machine>> = OnceLock::new();
    let machine = MACHINE.get_or_init(Machine::of_environment).as_ref();
    if USERS.load(SeqCst) == 0 {
        if let Some(machine) = machine {
            machine.report("NVML is used without nvmlInit");
        }
        return Err(UNINITIALIZED);
    }
    machine.ok_or(UNINITIALIZED)
}

fn code(answer: Answer) -> nvmlReturn_t {
    answer.err().unwrap_or(SUCCESS)
}

fn store<T>(to: *mut T, value: T) -> Answer {
    if to.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: the contract of every NVML function: a result's pointer is valid for a write of its type.
    unsafe { to.write_unaligned(value) };
    Ok(())
}

/// A device's handle is its index and one, so that none is null.
fn index(device: usize) -> Result<usize, nvmlReturn_t> {
    let machine = machine()?;
    let index = device
        .checked_sub(1)
        .filter(|index| *index < machine.gpus());
    let index = index.ok_or_else(|| {
        machine.report("NVML is asked of a device that does not exist");
        INVALID_ARGUMENT
    })?;
    while machine.gpu(index).hang_nvml.load(SeqCst) != 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    if machine.gpu(index).lost.load(SeqCst) != 0 {
        return Err(GPU_IS_LOST);
    }
    Ok(index)
}

fn figure<T>(device: usize, to: *mut T, read: impl FnOnce(&Gpu) -> T) -> nvmlReturn_t {
    code(index(device).and_then(|index| store(to, read(machine()?.gpu(index)))))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlInit_v2() -> nvmlReturn_t {
    USERS.fetch_add(1, SeqCst);
    code(machine().map(|machine| machine.count(Call::nvmlInit)))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlShutdown() -> nvmlReturn_t {
    match USERS.fetch_update(SeqCst, SeqCst, |users| users.checked_sub(1)) {
        Ok(_) => SUCCESS,
        Err(_) => UNINITIALIZED,
    }
}

#[unsafe(no_mangle)]
extern "C" fn nvmlErrorString(_code: nvmlReturn_t) -> *const c_char {
    c"an error of the NVML double".as_ptr()
}

fn text(to: *mut c_char, length: c_uint, text: &str) -> Answer {
    if text.len() as c_uint >= length {
        return Err(INSUFFICIENT_SIZE);
    }
    for (i, byte) in text.bytes().chain([0]).enumerate() {
        // SAFETY: the caller's buffer has `length` bytes, which is more than the text has.
        unsafe { to.add(i).write(byte as c_char) };
    }
    Ok(())
}

#[unsafe(no_mangle)]
extern "C" fn nvmlSystemGetDriverVersion(version: *mut c_char, length: c_uint) -> nvmlReturn_t {
    code(text(version, length, "570.00.00"))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetCount_v2(count: *mut c_uint) -> nvmlReturn_t {
    code(machine().and_then(|machine| store(count, machine.gpus() as c_uint)))
}

/// The name by which CUDA and NVML know the same GPU.
fn uuid(index: usize) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let uuid = Machine::uuid(index);
    let parts = [
        &uuid[..4],
        &uuid[4..6],
        &uuid[6..8],
        &uuid[8..10],
        &uuid[10..],
    ];
    format!("GPU-{}", parts.map(hex).join("-"))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetHandleByUUID(wanted: *const c_char, device: *mut usize) -> nvmlReturn_t {
    code(machine().and_then(|machine| {
        // SAFETY: the contract of the function: `wanted` is text with a closing zero.
        let wanted = unsafe { CStr::from_ptr(wanted) }.to_string_lossy();
        let found = (0..machine.gpus()).find(|index| uuid(*index) == wanted);
        store(device, found.ok_or(NOT_FOUND)? + 1)
    }))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetMemoryInfo_v2(
    device: usize,
    memory: *mut nvmlMemory_v2_t,
) -> nvmlReturn_t {
    code(index(device).and_then(|index| {
        let machine = machine()?;
        machine.count(Call::nvmlDeviceGetMemoryInfo);
        let gpu = machine.gpu(index);
        let (total, reserved) = (gpu.total.load(SeqCst), gpu.reserved.load(SeqCst));
        let free = machine.free(index);
        let version = (size_of::<nvmlMemory_v2_t>() | (2 << 24)) as c_uint;
        // SAFETY: the contract of the function: `memory` is valid and its version filled in.
        if unsafe { (*memory).version } != version {
            machine.report("nvmlDeviceGetMemoryInfo_v2 with a wrong version of its struct");
            return Err(INVALID_ARGUMENT);
        }
        store(
            memory,
            nvmlMemory_v2_t {
                version,
                total,
                reserved,
                free,
                used: total.saturating_sub(reserved).saturating_sub(free),
            },
        )
    }))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    device: usize,
    count: *mut c_uint,
    to: *mut nvmlProcessInfo_t,
) -> nvmlReturn_t {
    code(index(device).and_then(|index| {
        let machine = machine()?;
        let gpu = machine.gpu(index);
        let hidden = gpu.hide_processes.load(SeqCst) != 0;
        let tell = |bytes| if hidden { NOT_AVAILABLE } else { bytes };
        let mut rows: Vec<(c_uint, c_ulonglong)> = machine
            .processes()
            .iter()
            .filter(|process| process.contexts[index].load(SeqCst) != 0)
            .map(|process| {
                let bytes = process.memory[index].load(SeqCst) + gpu.context.load(SeqCst);
                (process.pid.load(SeqCst), tell(bytes))
            })
            .collect();
        let foreign = gpu.foreign.load(SeqCst);
        if foreign > 0 {
            // The first process of a machine is never one that computes.
            rows.push((1, tell(foreign)));
        }
        // SAFETY: the contract of the function: `count` holds the length of `to`.
        let room = unsafe { count.read() } as usize;
        store(count, rows.len() as c_uint)?;
        if room < rows.len() {
            return Err(INSUFFICIENT_SIZE);
        }
        for (i, (pid, usedGpuMemory)) in rows.into_iter().enumerate() {
            let row = nvmlProcessInfo_t {
                pid,
                usedGpuMemory,
                gpuInstanceId: c_uint::MAX,
                computeInstanceId: c_uint::MAX,
            };
            // SAFETY: `to` has room for `room` rows, and there are no more.
            unsafe { to.add(i).write(row) };
        }
        Ok(())
    }))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetTemperature(
    device: usize,
    _sensor: c_uint,
    to: *mut c_uint,
) -> nvmlReturn_t {
    figure(device, to, |gpu| gpu.temperature.load(SeqCst))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetCurrentClocksThrottleReasons(
    device: usize,
    to: *mut c_ulonglong,
) -> nvmlReturn_t {
    figure(device, to, |gpu| gpu.throttle.load(SeqCst))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetCurrPcieLinkGeneration(device: usize, to: *mut c_uint) -> nvmlReturn_t {
    figure(device, to, |gpu| gpu.pcie_generation.load(SeqCst))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetCurrPcieLinkWidth(device: usize, to: *mut c_uint) -> nvmlReturn_t {
    figure(device, to, |gpu| gpu.pcie_width.load(SeqCst))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetMaxPcieLinkGeneration(device: usize, to: *mut c_uint) -> nvmlReturn_t {
    figure(device, to, |_| 4)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetMaxPcieLinkWidth(device: usize, to: *mut c_uint) -> nvmlReturn_t {
    figure(device, to, |_| 16)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetMigMode(
    device: usize,
    now: *mut c_uint,
    pending: *mut c_uint,
) -> nvmlReturn_t {
    figure(device, now, |gpu| gpu.mig.load(SeqCst))
        .max(figure(device, pending, |gpu| gpu.mig.load(SeqCst)))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetTotalEccErrors(
    device: usize,
    _kind: c_uint,
    _counter: c_uint,
    to: *mut c_ulonglong,
) -> nvmlReturn_t {
    figure(device, to, |gpu| gpu.ecc_uncorrected.load(SeqCst))
}

/// The devices that a set listens to, with the events that it has heard of each.
type Listening = Mutex<Vec<(usize, u32)>>;

#[unsafe(no_mangle)]
extern "C" fn nvmlEventSetCreate(set: *mut *mut Listening) -> nvmlReturn_t {
    code(machine().and_then(|_| store(set, Box::into_raw(Box::default()))))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlEventSetFree(set: *mut Listening) -> nvmlReturn_t {
    if set.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: the contract of the function: `set` comes from `nvmlEventSetCreate` and is freed once.
    drop(unsafe { Box::from_raw(set) });
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceRegisterEvents(
    device: usize,
    _events: c_ulonglong,
    set: *mut Listening,
) -> nvmlReturn_t {
    code(index(device).and_then(|index| {
        // SAFETY: the contract of the function: `set` comes from `nvmlEventSetCreate` and lives.
        let listening = unsafe { set.as_ref() }.ok_or(INVALID_ARGUMENT)?;
        let heard = machine()?.gpu(index).xid_count();
        listening
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((index, heard));
        Ok(())
    }))
}

#[unsafe(no_mangle)]
extern "C" fn nvmlEventSetWait_v2(
    set: *mut Listening,
    data: *mut nvmlEventData_t,
    timeout_ms: c_uint,
) -> nvmlReturn_t {
    code(machine().and_then(|machine| {
        machine.count(Call::nvmlEventSetWait);
        // SAFETY: the contract of the function: `set` comes from `nvmlEventSetCreate` and lives.
        let listening = unsafe { set.as_ref() }.ok_or(INVALID_ARGUMENT)?;
        let deadline = Instant::now() + Duration::from_millis(u64::from(timeout_ms));
        loop {
            for (index, heard) in listening
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .iter_mut()
            {
                if let Some(xid) = machine.gpu(*index).xids_after(*heard).first() {
                    *heard += 1;
                    return store(
                        data,
                        nvmlEventData_t {
                            device: (*index + 1) as nvml::nvmlDevice_t,
                            eventType: c_ulonglong::from(nvml::nvmlEventTypeXidCriticalError),
                            eventData: *xid,
                            gpuInstanceId: c_uint::MAX,
                            computeInstanceId: c_uint::MAX,
                        },
                    );
                }
            }
            if Instant::now() >= deadline {
                return Err(TIMEOUT);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }))
}
