//! Stands in for `libcuda.so.1`: exactly the functions that hotset calls, with a memfd behind each allocation, threads
//! behind streams, and the checks that a driver makes or leaves to undefined behaviour.
//!
//! What goes wrong is answered with the driver's own error code. What a correct program would never ask for is written
//! down as misuse besides ([`Machine::report`](hotset_double_machine::Machine::report)), and fails the test.
//!
//! What it cannot show: the speed of DMA, real pinning, and the order in which a GPU sees unsynchronised accesses.
#![allow(non_snake_case)]

mod context;
mod host;
mod memory;
mod state;
mod stream;

use std::ffi::c_int;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;

use hotset_double_machine::{Call, MAX_GPUS, Machine};

/// Result codes as the driver returns them; plain numbers, since a driver may return others than we know.
type Code = u32;

const SUCCESS: Code = 0;
const INVALID_VALUE: Code = 1;
const OUT_OF_MEMORY: Code = 2;
const NOT_INITIALIZED: Code = 3;
const INVALID_DEVICE: Code = 101;
const INVALID_CONTEXT: Code = 201;
const INVALID_HANDLE: Code = 400;
const NOT_READY: Code = 600;
const ALREADY_REGISTERED: Code = 712;
const NOT_REGISTERED: Code = 713;
const NOT_PERMITTED: Code = 800;
const UNKNOWN: Code = 999;

type Answer = Result<(), Code>;

/// Counts the call, and turns its answer into a code.
fn answer(call: Call, body: impl FnOnce(&'static Machine) -> Answer) -> Code {
    let Some(machine) = state::machine() else {
        return NOT_INITIALIZED;
    };
    machine.count(call);
    context::hang(machine);
    body(machine).err().unwrap_or(SUCCESS)
}

/// Writes misuse down, and gives the code that the driver would answer with.
fn misuse(machine: &Machine, code: Code, what: impl AsRef<str>) -> Code {
    machine.report(what.as_ref());
    code
}

/// What every call to a broken GPU answers.
fn fault(machine: &Machine, gpu: usize) -> Answer {
    if machine.gpu(gpu).lost.load(SeqCst) != 0 {
        return Err(UNKNOWN);
    }
    // The process that meets it keeps it, whatever is reset, and no other has it: so does the driver 580 on an H200.
    static MET: [AtomicU32; MAX_GPUS] = [const { AtomicU32::new(0) }; MAX_GPUS];
    let now = machine.gpu(gpu).sticky.swap(0, SeqCst);
    if now != 0 {
        MET[gpu].store(now, SeqCst);
    }
    match MET[gpu].load(SeqCst) {
        0 => Ok(()),
        code => Err(code),
    }
}

/// The GPU that this ordinal names.
fn device(machine: &Machine, device: c_int) -> Result<usize, Code> {
    usize::try_from(device)
        .ok()
        .filter(|gpu| *gpu < machine.gpus())
        .ok_or(INVALID_DEVICE)
}

/// Stores a result through a pointer that the caller gave.
fn store<T>(machine: &Machine, to: *mut T, value: T) -> Answer {
    if to.is_null() {
        return Err(misuse(
            machine,
            INVALID_VALUE,
            "a null pointer for a result",
        ));
    }
    // SAFETY: the contract of every driver function: a result's pointer is valid for a write of its type.
    unsafe { to.write_unaligned(value) };
    Ok(())
}
