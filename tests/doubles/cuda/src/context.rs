//! Devices and their primary contexts.

use std::ffi::{c_char, c_int, c_uint};
use std::sync::atomic::Ordering::SeqCst;

use cudarc::driver::sys::{CUdevice_attribute, CUuuid};
use hotset_double_machine::{Call, Machine};

use crate::state::{CURRENT, State, state};
use crate::{
    Answer, Code, INVALID_CONTEXT, INVALID_VALUE, NOT_INITIALIZED, answer, device, fault, misuse,
    store,
};

/// The handle of a GPU's primary context in its present life.
fn handle(gpu: usize, generation: u32) -> u64 {
    0xc0de_0000_0000 | (u64::from(generation) << 8) | (gpu as u64 + 1)
}

/// The GPU of a context that lives.
pub(crate) fn gpu_of(machine: &Machine, state: &State, context: u64) -> Result<usize, Code> {
    let live = (0..machine.gpus()).find(|gpu| {
        let known = &state.contexts[*gpu];
        known.retained > 0 && handle(*gpu, known.generation) == context
    });
    live.ok_or_else(|| {
        misuse(
            machine,
            INVALID_CONTEXT,
            format!("context {context:#x} is used, but does not live"),
        )
    })
}

/// Does not return while the GPU whose context is current on this thread hangs.
pub(crate) fn hang(machine: &Machine) {
    let gpu = (CURRENT.get() & 0xff) as usize;
    while gpu > 0 && machine.gpu(gpu - 1).hang.load(SeqCst) != 0 {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// The GPU whose context is current on this thread; misuse where none is.
pub(crate) fn current(machine: &Machine, state: &State, call: &str) -> Result<usize, Code> {
    match CURRENT.get() {
        0 => Err(misuse(
            machine,
            INVALID_CONTEXT,
            format!("{call} on a thread without a current context"),
        )),
        context => gpu_of(machine, state, context),
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuInit(_flags: c_uint) -> Code {
    answer(Call::cuInit, |machine| {
        state().initialised = true;
        // Takes this process's place in the machine.
        let _place = machine.process();
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Code {
    answer(Call::cuDriverGetVersion, |machine| {
        store(machine, version, 12080)
    })
}

fn initialised(machine: &Machine) -> Answer {
    if state().initialised {
        Ok(())
    } else {
        Err(misuse(machine, NOT_INITIALIZED, "a call before cuInit"))
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Code {
    answer(Call::cuDeviceGetCount, |machine| {
        initialised(machine)?;
        store(machine, count, machine.gpus() as c_int)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGet(to: *mut c_int, ordinal: c_int) -> Code {
    answer(Call::cuDeviceGet, |machine| {
        initialised(machine)?;
        store(machine, to, device(machine, ordinal)? as c_int)
    })
}

/// Writes text with its closing zero into a buffer of the caller.
fn text(machine: &Machine, to: *mut c_char, len: c_int, text: &str) -> Answer {
    if text.len() as c_int >= len {
        return Err(misuse(
            machine,
            INVALID_VALUE,
            "a buffer too short for its text",
        ));
    }
    for (i, byte) in text.bytes().chain([0]).enumerate() {
        // SAFETY: the caller's buffer has `len` bytes, which is more than the text has.
        unsafe { to.add(i).write(byte as c_char) };
    }
    Ok(())
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, dev: c_int) -> Code {
    answer(Call::cuDeviceGetName, |machine| {
        let gpu = device(machine, dev)?;
        text(machine, name, len, &format!("Double {gpu}"))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetPCIBusId(id: *mut c_char, len: c_int, dev: c_int) -> Code {
    answer(Call::cuDeviceGetPCIBusId, |machine| {
        let gpu = device(machine, dev)?;
        text(machine, id, len, &format!("0000:{gpu:02x}:00.0"))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetUuid_v2(to: *mut CUuuid, dev: c_int) -> Code {
    answer(Call::cuDeviceGetUuid, |machine| {
        let bytes = Machine::uuid(device(machine, dev)?).map(|byte| byte as c_char);
        store(machine, to, CUuuid { bytes })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, dev: c_int) -> Code {
    answer(Call::cuDeviceTotalMem, |machine| {
        let gpu = device(machine, dev)?;
        store(machine, bytes, machine.gpu(gpu).total.load(SeqCst) as usize)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, dev: c_int) -> Code {
    answer(Call::cuDeviceGetAttribute, |machine| {
        device(machine, dev)?;
        let known = [
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED as c_uint,
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
                as c_uint,
        ];
        store(machine, value, c_int::from(known.contains(&attribute)))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetP2PAttribute(
    value: *mut c_int,
    attribute: c_uint,
    source: c_int,
    destination: c_int,
) -> Code {
    answer(Call::cuDeviceGetP2PAttribute, |machine| {
        let from = device(machine, source)?;
        let to = device(machine, destination)?;
        if from == to {
            return Err(misuse(machine, INVALID_VALUE, "a GPU's link to itself"));
        }
        let gpu = machine.gpu(from);
        let figure = match attribute {
            1 => &gpu.distance[to],
            2 => &gpu.direct[to],
            _ => return Err(INVALID_VALUE),
        };
        store(machine, value, figure.load(SeqCst) as c_int)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRetain(to: *mut u64, dev: c_int) -> Code {
    answer(Call::cuDevicePrimaryCtxRetain, |machine| {
        initialised(machine)?;
        let gpu = device(machine, dev)?;
        fault(machine, gpu)?;
        let mut state = state();
        let context = &mut state.contexts[gpu];
        if context.retained == 0 {
            if machine.free(gpu) < machine.gpu(gpu).context.load(SeqCst) {
                return Err(crate::OUT_OF_MEMORY);
            }
            context.generation += 1;
            machine.process().contexts[gpu].store(1, SeqCst);
        }
        context.retained += 1;
        store(machine, to, handle(gpu, context.generation))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(dev: c_int) -> Code {
    answer(Call::cuDevicePrimaryCtxRelease, |machine| {
        let gpu = device(machine, dev)?;
        let last = {
            let mut state = state();
            let context = &mut state.contexts[gpu];
            if context.retained == 0 {
                return Err(misuse(
                    machine,
                    INVALID_CONTEXT,
                    "a context is released twice",
                ));
            }
            context.retained -= 1;
            context.retained == 0
        };
        if last {
            destroy(machine, gpu);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxReset_v2(dev: c_int) -> Code {
    answer(Call::cuDevicePrimaryCtxReset, |machine| {
        let gpu = device(machine, dev)?;
        if machine.gpu(gpu).lost.load(SeqCst) != 0 {
            return fault(machine, gpu);
        }
        state().contexts[gpu].retained = 0;
        destroy(machine, gpu);
        Ok(())
    })
}

/// Ends a context with everything in it.
fn destroy(machine: &Machine, gpu: usize) {
    let mut state = state();
    let streams: Vec<_> = state
        .streams
        .extract_if(|_, stream| stream.gpu == gpu)
        .collect();
    state.events.retain(|_, event| event.gpu != gpu);
    // Copies that have not begun never will.
    state.pending.retain(|_, copy| copy.gpu != gpu);
    crate::host::forget(machine, &mut state, gpu);
    crate::memory::forget(machine, &mut state, gpu);
    let process = machine.process();
    process.contexts[gpu].store(0, SeqCst);
    process.streams.store(state.streams.len() as u32, SeqCst);
    process.events.store(state.events.len() as u32, SeqCst);
    drop(state);
    for (_, stream) in streams {
        stream.end();
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: u64) -> Code {
    answer(Call::cuCtxSetCurrent, |machine| {
        if context != 0 {
            gpu_of(machine, &state(), context)?;
        }
        CURRENT.set(context);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Code {
    answer(Call::cuMemGetInfo, |machine| {
        let gpu = current(machine, &state(), "cuMemGetInfo")?;
        fault(machine, gpu)?;
        store(machine, free, machine.free(gpu) as usize)?;
        store(machine, total, machine.gpu(gpu).total.load(SeqCst) as usize)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorName(code: Code, to: *mut *const c_char) -> Code {
    let name = match code {
        1 => c"CUDA_ERROR_INVALID_VALUE",
        2 => c"CUDA_ERROR_OUT_OF_MEMORY",
        214 => c"CUDA_ERROR_ECC_UNCORRECTABLE",
        700 => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        719 => c"CUDA_ERROR_LAUNCH_FAILED",
        800 => c"CUDA_ERROR_NOT_PERMITTED",
        999 => c"CUDA_ERROR_UNKNOWN",
        _ => return INVALID_VALUE,
    };
    // SAFETY: the contract of the function: `to` is valid for a write.
    unsafe { to.write(name.as_ptr()) };
    0
}
