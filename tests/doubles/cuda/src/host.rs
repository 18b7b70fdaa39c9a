//! Host memory that the GPU reaches by itself.

use std::ffi::{c_uint, c_void};
use std::sync::atomic::Ordering::SeqCst;

use hotset_double_machine::{Call, Machine};

use crate::context::current;
use crate::state::{Registration, State, state};
use crate::{
    ALREADY_REGISTERED, Code, INVALID_VALUE, NOT_PERMITTED, NOT_REGISTERED, OUT_OF_MEMORY, answer,
    fault, misuse, store,
};

/// `CU_MEMHOSTREGISTER_PORTABLE`: registered for all GPUs.
const PORTABLE: c_uint = 1;
/// `CU_MEMHOSTREGISTER_READ_ONLY`: only read by the GPU, which is all that may be done with what is mapped for reading.
const READ_ONLY: c_uint = 8;

/// What is mapped at an address.
enum Backing {
    /// The kernel's list could not be read: the process has no descriptor left for it.
    Unseen,
    /// Nothing, or not all of it.
    Nothing,
    /// Files and offsets into them, and whether this process may write there.
    Files(String, bool),
}

/// What is mapped at this address now, by the kernel's own list.
fn backing(at: u64, bytes: u64) -> Backing {
    match std::fs::read_to_string("/proc/self/maps") {
        Err(_) => Backing::Unseen,
        Ok(maps) => files(&maps, at, bytes).map_or(Backing::Nothing, |(files, write)| {
            Backing::Files(files, write)
        }),
    }
}

fn files(maps: &str, at: u64, bytes: u64) -> Option<(String, bool)> {
    let (mut found, mut write) = (Vec::new(), true);
    let mut reached = at;
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let end = u64::from_str_radix(end, 16).ok()?;
        if end <= reached || start > reached {
            continue;
        }
        write &= fields.next()?.contains('w');
        let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
        let _device = fields.next()?;
        let inode = fields.next()?;
        // Anonymous neighbours are merged and split by the kernel as it likes.
        let place = if inode == "0" {
            0
        } else {
            offset + (reached - start)
        };
        found.push(format!("{inode}+{place:x}"));
        reached = end;
        if reached >= at + bytes {
            found.dedup();
            return Some((found.join(" "), write));
        }
    }
    None
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostRegister_v2(at: *mut c_void, bytes: usize, flags: c_uint) -> Code {
    answer(Call::cuMemHostRegister, |machine| {
        let (at, bytes, mut state) = (at as u64, bytes as u64, state());
        let gpu = current(machine, &state, "cuMemHostRegister")?;
        fault(machine, gpu)?;
        if machine.gpu(gpu).refuse_registration.load(SeqCst) != 0 {
            return Err(NOT_PERMITTED);
        }
        if bytes == 0 {
            return Err(misuse(
                machine,
                INVALID_VALUE,
                "cuMemHostRegister of nothing",
            ));
        }
        let backing = match backing(at, bytes) {
            // As the driver 580 on an H200 answers.
            Backing::Files(_, false) if flags & READ_ONLY == 0 => return Err(INVALID_VALUE),
            Backing::Files(files, _) => Some(files),
            Backing::Unseen => None,
            Backing::Nothing => {
                return Err(misuse(
                    machine,
                    INVALID_VALUE,
                    "cuMemHostRegister of memory that is not mapped",
                ));
            }
        };
        if State::touches(&state.registrations, |known| known.bytes, at, bytes) {
            return Err(misuse(
                machine,
                ALREADY_REGISTERED,
                "cuMemHostRegister of registered memory",
            ));
        }
        state.registrations.insert(
            at,
            Registration {
                bytes,
                owned: false,
                portable: flags & PORTABLE != 0,
                backing,
                gpu,
            },
        );
        machine.process().registrations.fetch_add(1, SeqCst);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostUnregister(at: *mut c_void) -> Code {
    answer(Call::cuMemHostUnregister, |machine| {
        let (at, mut state) = (at as u64, state());
        let gpu = current(machine, &state, "cuMemHostUnregister")?;
        let Some(known) = state.registrations.get(&at).filter(|known| !known.owned) else {
            return Err(misuse(
                machine,
                NOT_REGISTERED,
                "cuMemHostUnregister of memory that is not registered",
            ));
        };
        check_backing(machine, at, known);
        fault(machine, gpu)?;
        let bytes = known.bytes;
        if state.pending_in(at, bytes).is_some() {
            machine.report("cuMemHostUnregister of memory that a copy still uses");
        }
        state.registrations.remove(&at);
        machine.process().registrations.fetch_sub(1, SeqCst);
        Ok(())
    })
}

/// The driver holds the pages that it pinned, not the address: memory that was unmapped or replaced in the meantime would
/// be read from where it was.
fn check_backing(machine: &Machine, at: u64, known: &Registration) {
    let Some(before) = &known.backing else { return };
    let same = match backing(at, known.bytes) {
        Backing::Files(now, _) => now == *before,
        Backing::Unseen => true,
        Backing::Nothing => false,
    };
    if !same {
        machine.report("memory was unmapped or replaced while it was registered");
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostAlloc(to: *mut *mut c_void, bytes: usize, _flags: c_uint) -> Code {
    answer(Call::cuMemHostAlloc, |machine| {
        let mut state = state();
        let gpu = current(machine, &state, "cuMemHostAlloc")?;
        fault(machine, gpu)?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(OUT_OF_MEMORY);
        }
        let registration = Registration {
            bytes: bytes as u64,
            owned: true,
            portable: false,
            backing: None,
            gpu,
        };
        state.registrations.insert(start as u64, registration);
        machine.process().registrations.fetch_add(1, SeqCst);
        store(machine, to, start)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeHost(at: *mut c_void) -> Code {
    answer(Call::cuMemFreeHost, |machine| {
        let (start, mut state) = (at as u64, state());
        let gpu = current(machine, &state, "cuMemFreeHost")?;
        let Some(bytes) = state
            .registrations
            .get(&start)
            .filter(|known| known.owned)
            .map(|k| k.bytes)
        else {
            return Err(misuse(
                machine,
                INVALID_VALUE,
                "cuMemFreeHost of memory that the driver did not allocate",
            ));
        };
        fault(machine, gpu)?;
        if state.pending_in(start, bytes).is_some() {
            machine.report("cuMemFreeHost of memory that a copy still uses");
        }
        state.registrations.remove(&start);
        machine.process().registrations.fetch_sub(1, SeqCst);
        free(start, bytes);
        Ok(())
    })
}

fn free(start: u64, bytes: u64) {
    // SAFETY: a range that `cuMemHostAlloc` mapped and that the books no longer hold.
    unsafe { libc::munmap(start as *mut c_void, bytes as usize) };
}

/// A context of this GPU ends: what was registered in it is no longer.
pub(crate) fn forget(machine: &Machine, state: &mut State, gpu: usize) {
    let gone: Vec<u64> = state
        .registrations
        .iter()
        .filter(|(_, known)| known.gpu == gpu)
        .map(|(at, _)| *at)
        .collect();
    for at in gone {
        let Some(known) = state.registrations.remove(&at) else {
            continue;
        };
        machine.process().registrations.fetch_sub(1, SeqCst);
        if known.owned {
            free(at, known.bytes);
        }
    }
}

/// Whether an asynchronous copy may touch this host memory.
pub(crate) fn reachable(
    machine: &Machine,
    state: &State,
    gpu: usize,
    at: u64,
    bytes: u64,
) -> Result<(), Code> {
    match State::containing(&state.registrations, |known| known.bytes, at, bytes) {
        Some((start, known)) => {
            if known.gpu != gpu && !known.portable {
                machine.report("host memory is used by a GPU for which it is not registered");
            }
            check_backing(machine, start, known);
            Ok(())
        }
        None => Err(misuse(
            machine,
            INVALID_VALUE,
            format!("an asynchronous copy of {bytes} bytes of host memory that is not registered"),
        )),
    }
}
