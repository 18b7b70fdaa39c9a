//! The driver's functions, found once by name in `libcuda.so.1`.
//!
//! cudarc finds the library and knows its types. Its own functions are not used: each panics where its symbol is missing,
//! and takes the driver's answer for one of the codes that it knows, which a newer driver need not keep to.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::Arc;

use cudarc::driver::sys::{
    self, CUdevice_attribute, CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationHandleType,
    CUmemAllocationProp, CUmemAllocationType, CUmemLocation, CUmemLocationType, CUuuid,
};

use crate::device::Link;

/// Why there is no CUDA here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// No driver is installed, or it is not where the dynamic loader looks.
    #[error(
        "there is no libcuda.so.1; install the NVIDIA driver, or set LD_LIBRARY_PATH to where it is"
    )]
    NoLibrary,
    /// The driver lacks a function.
    #[error("the CUDA driver lacks {symbol}; hotset needs one of CUDA 12 or newer")]
    TooOld {
        /// What is missing.
        symbol: &'static str,
    },
    /// The driver refuses to work.
    #[error("{call} failed with {code}; `nvidia-smi` may say why")]
    Refused {
        /// Its function.
        call: &'static str,
        /// Its name for what is wrong.
        code: Arc<str>,
    },
    /// The GPU cannot share its memory with other processes.
    #[error("{name} cannot export its memory as file descriptors, which hotset needs")]
    CannotShare {
        /// The GPU.
        name: String,
    },
}

/// A call that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call} failed with {name}")]
pub(super) struct Fault {
    pub(super) call: &'static str,
    pub(super) code: u32,
    pub(super) name: Arc<str>,
}

impl Fault {
    /// Too little memory; everything else goes on.
    pub(super) const fn is_out_of_memory(&self) -> bool {
        self.code == 2
    }

    /// Nothing works any more until the context is made anew: the "sticky" errors, a context or device that is gone, and
    /// what the driver itself calls unknown.
    pub(super) const fn is_fatal(&self) -> bool {
        matches!(
            self.code,
            4 | 46 | 100 | 101 | 201 | 214 | 220 | 226 | 700 | 702 | 709 | 710 | 714
                ..=719 | 721 | 911 | 999
        )
    }

    /// What the driver answers to every call of this process on this GPU from now on: also in other contexts, and in those
    /// that would be made anew. Measured for 700, 716 and 719 (docs/gpu.md); the others are likely to be so.
    pub(super) const fn is_sticky(&self) -> bool {
        matches!(
            self.code,
            214 | 220 | 226 | 700 | 702 | 710 | 714..=719 | 721 | 911
        )
    }
}

pub(super) type Outcome<T> = Result<T, Fault>;

macro_rules! functions {
    ($($name:ident($($argument:ty),*);)*) => {
        #[allow(non_snake_case)]
        struct Functions {
            $($name: unsafe extern "C" fn($($argument),*) -> u32,)*
        }

        impl Functions {
            #[allow(non_snake_case)]
            fn load() -> Result<Self, CudaError> {
                // SAFETY: the library is the system's CUDA driver, whose start-up code we have to trust.
                if !unsafe { sys::is_culib_present() } {
                    return Err(CudaError::NoLibrary);
                }
                // SAFETY: as above; it was there a moment ago, and cudarc keeps it open for good.
                let library = unsafe { sys::culib() };
                $(
                    let symbol = concat!(stringify!($name), "\0").as_bytes();
                    // SAFETY: the signatures below are those of the driver's header, which never change for a name. The
                    // library is never closed, so the function outlives its symbol.
                    let $name = *unsafe {
                        library.get::<unsafe extern "C" fn($($argument),*) -> u32>(symbol)
                    }
                    .map_err(|_| CudaError::TooOld { symbol: stringify!($name) })?;
                )*
                Ok(Self { $($name),* })
            }
        }
    };
}

functions! {
    cuInit(c_uint);
    cuGetErrorName(u32, *mut *const c_char);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGet(*mut c_int, c_int);
    cuDeviceGetName(*mut c_char, c_int, c_int);
    cuDeviceGetUuid_v2(*mut CUuuid, c_int);
    cuDeviceGetPCIBusId(*mut c_char, c_int, c_int);
    cuDeviceTotalMem_v2(*mut usize, c_int);
    cuDeviceGetAttribute(*mut c_int, c_uint, c_int);
    cuDeviceGetP2PAttribute(*mut c_int, c_uint, c_int, c_int);
    cuDevicePrimaryCtxRetain(*mut *mut c_void, c_int);
    cuDevicePrimaryCtxRelease_v2(c_int);
    cuDevicePrimaryCtxReset_v2(c_int);
    cuCtxSetCurrent(*mut c_void);
    cuMemGetInfo_v2(*mut usize, *mut usize);
    cuMemGetAllocationGranularity(*mut usize, *const CUmemAllocationProp, c_uint);
    cuMemCreate(*mut u64, usize, *const CUmemAllocationProp, c_ulonglong);
    cuMemRelease(u64);
    cuMemAddressReserve(*mut u64, usize, usize, u64, c_ulonglong);
    cuMemAddressFree(u64, usize);
    cuMemMap(u64, usize, usize, u64, c_ulonglong);
    cuMemUnmap(u64, usize);
    cuMemSetAccess(u64, usize, *const CUmemAccessDesc, usize);
    cuMemExportToShareableHandle(*mut c_void, u64, c_uint, c_ulonglong);
    cuMemImportFromShareableHandle(*mut u64, *mut c_void, c_uint);
    cuMemHostRegister_v2(*mut c_void, usize, c_uint);
    cuMemHostUnregister(*mut c_void);
    cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
    cuMemFreeHost(*mut c_void);
    cuMemcpyHtoDAsync_v2(u64, *const c_void, usize, *mut c_void);
    cuMemcpyDtoHAsync_v2(*mut c_void, u64, usize, *mut c_void);
    cuMemcpyPeerAsync(u64, *mut c_void, u64, *mut c_void, usize, *mut c_void);
    cuStreamCreate(*mut *mut c_void, c_uint);
    cuStreamDestroy_v2(*mut c_void);
    cuEventCreate(*mut *mut c_void, c_uint);
    cuEventDestroy_v2(*mut c_void);
    cuEventRecord(*mut c_void, *mut c_void);
    cuEventSynchronize(*mut c_void);
}

/// The driver, initialised.
pub(super) struct Driver {
    functions: Functions,
}

/// An opaque handle of the driver: a context, a stream or an event. Only a number to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Opaque(*mut c_void);

// SAFETY: the driver's handles are valid in every thread of the process; it locks for itself.
unsafe impl Send for Opaque {}
// SAFETY: as above.
unsafe impl Sync for Opaque {}

/// `CU_STREAM_NON_BLOCKING`: no waiting for the legacy default stream.
const STREAM_NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING`: who waits sleeps, and no clock is read.
const EVENT_FLAGS: c_uint = 1 | 2;
/// `CU_MEMHOSTREGISTER_PORTABLE`: registered for every GPU of the process.
const REGISTER_PORTABLE: c_uint = 1;
/// `CU_MEMHOSTREGISTER_READ_ONLY`: the GPU only reads it.
const REGISTER_READ_ONLY: c_uint = 8;
/// `CUDA_ERROR_INVALID_VALUE`.
const INVALID_VALUE: u32 = 1;

macro_rules! call {
    ($self:ident.$function:ident($($argument:expr),* $(,)?)) => {{
        // SAFETY: the arguments are what the driver's header asks for: live handles that the caller owns, and pointers
        // that are valid for the call. What the driver finds wrong with them it answers with a code.
        let code = unsafe { ($self.functions.$function)($($argument),*) };
        $self.judge(stringify!($function), code)
    }};
}

impl Driver {
    /// Loads and initialises the driver. Takes some hundred milliseconds where there is one.
    pub(super) fn load() -> Result<Self, CudaError> {
        let driver = Self {
            functions: Functions::load()?,
        };
        call!(driver.cuInit(0)).map_err(|fault| match fault.code {
            // The driver is there and finds no GPU: the same as none.
            100 => CudaError::NoLibrary,
            _ => fault.into(),
        })?;
        Ok(driver)
    }

    fn judge(&self, call: &'static str, code: u32) -> Outcome<()> {
        if code == 0 {
            return Ok(());
        }
        let mut name = std::ptr::null();
        // SAFETY: `name` is valid for a write; the driver stores a pointer to constant text, or null.
        let known = unsafe { (self.functions.cuGetErrorName)(code, &raw mut name) } == 0;
        let name = if known && !name.is_null() {
            // SAFETY: the driver's constant, closed by a zero.
            unsafe { CStr::from_ptr(name) }
                .to_string_lossy()
                .into_owned()
        } else {
            format!("error {code}")
        };
        Err(Fault {
            call,
            code,
            name: name.into(),
        })
    }

    pub(super) fn count(&self) -> Outcome<i32> {
        let mut count = 0;
        call!(self.cuDeviceGetCount(&raw mut count))?;
        Ok(count)
    }

    pub(super) fn device(&self, ordinal: i32) -> Outcome<i32> {
        let mut device = 0;
        call!(self.cuDeviceGet(&raw mut device, ordinal))?;
        Ok(device)
    }

    pub(super) fn name(&self, device: i32) -> Outcome<String> {
        let mut name = [0 as c_char; 128];
        call!(self.cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device))?;
        Ok(text(&name))
    }

    /// Its place on the bus, such as `0000:3B:00.0`.
    pub(super) fn pci(&self, device: i32) -> Outcome<String> {
        let mut id = [0 as c_char; 32];
        call!(self.cuDeviceGetPCIBusId(id.as_mut_ptr(), id.len() as c_int, device))?;
        Ok(text(&id))
    }

    pub(super) fn uuid(&self, device: i32) -> Outcome<[u8; 16]> {
        let mut uuid = CUuuid { bytes: [0; 16] };
        call!(self.cuDeviceGetUuid_v2(&raw mut uuid, device))?;
        Ok(uuid.bytes.map(|byte| byte as u8))
    }

    pub(super) fn total(&self, device: i32) -> Outcome<u64> {
        let mut total = 0;
        call!(self.cuDeviceTotalMem_v2(&raw mut total, device))?;
        Ok(total as u64)
    }

    /// Whether the device can share physical memory as descriptors.
    pub(super) fn can_share(&self, device: i32) -> Outcome<bool> {
        let wanted = [
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
        ];
        for attribute in wanted {
            let mut value = 0;
            call!(self.cuDeviceGetAttribute(&raw mut value, attribute as c_uint, device))?;
            if value == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// How the second device reaches the memory of the first.
    pub(super) fn link(&self, from: i32, to: i32) -> Link {
        /// `CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK`: the less, the faster.
        const RANK: c_uint = 1;
        /// `CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED`.
        const ACCESS: c_uint = 2;
        let ask = |attribute| {
            let mut value = 0;
            // Whoever reads is the source to the driver.
            call!(self.cuDeviceGetP2PAttribute(&raw mut value, attribute, to, from))
                .ok()
                .map(|()| value)
        };
        Link {
            direct: ask(ACCESS) == Some(1),
            distance: ask(RANK).map_or(u32::MAX, i32::unsigned_abs),
        }
    }

    pub(super) fn retain_context(&self, device: i32) -> Outcome<Opaque> {
        let mut context = std::ptr::null_mut();
        call!(self.cuDevicePrimaryCtxRetain(&raw mut context, device))?;
        Ok(Opaque(context))
    }

    pub(super) fn release_context(&self, device: i32) -> Outcome<()> {
        call!(self.cuDevicePrimaryCtxRelease_v2(device))
    }

    pub(super) fn reset_context(&self, device: i32) -> Outcome<()> {
        call!(self.cuDevicePrimaryCtxReset_v2(device))
    }

    /// Makes a context current on this thread.
    pub(super) fn enter(&self, context: Opaque) -> Outcome<()> {
        call!(self.cuCtxSetCurrent(context.0))
    }

    /// Free memory and all memory of the current context's device.
    pub(super) fn memory(&self) -> Outcome<(u64, u64)> {
        let (mut free, mut total) = (0, 0);
        call!(self.cuMemGetInfo_v2(&raw mut free, &raw mut total))?;
        Ok((free as u64, total as u64))
    }

    fn location(device: i32) -> CUmemLocation {
        CUmemLocation {
            type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: device,
        }
    }

    fn properties(device: i32) -> CUmemAllocationProp {
        // SAFETY: a plain C struct, for which zeros mean "nothing special".
        let mut properties: CUmemAllocationProp = unsafe { std::mem::zeroed() };
        properties.type_ = CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.requestedHandleTypes =
            CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        properties.location = Self::location(device);
        properties
    }

    /// The granule of physical memory with which mappings are fast.
    pub(super) fn granularity(&self, device: i32) -> Outcome<u64> {
        /// `CU_MEM_ALLOC_GRANULARITY_RECOMMENDED`.
        const RECOMMENDED: c_uint = 1;
        let (mut granularity, properties) = (0, Self::properties(device));
        call!(self.cuMemGetAllocationGranularity(
            &raw mut granularity,
            &raw const properties,
            RECOMMENDED
        ))?;
        Ok(granularity as u64)
    }

    pub(super) fn create(&self, device: i32, bytes: u64) -> Outcome<u64> {
        let (mut handle, properties) = (0, Self::properties(device));
        call!(self.cuMemCreate(&raw mut handle, bytes as usize, &raw const properties, 0))?;
        Ok(handle)
    }

    pub(super) fn release(&self, handle: u64) -> Outcome<()> {
        call!(self.cuMemRelease(handle))
    }

    pub(super) fn reserve(&self, bytes: u64, alignment: u64) -> Outcome<u64> {
        let mut address = 0;
        call!(self.cuMemAddressReserve(
            &raw mut address,
            bytes as usize,
            alignment as usize,
            0,
            0
        ))?;
        Ok(address)
    }

    pub(super) fn unreserve(&self, address: u64, bytes: u64) -> Outcome<()> {
        call!(self.cuMemAddressFree(address, bytes as usize))
    }

    pub(super) fn map(&self, address: u64, bytes: u64, handle: u64) -> Outcome<()> {
        call!(self.cuMemMap(address, bytes as usize, 0, handle, 0))
    }

    /// Maps physical memory at a new address, for this device. Nothing is left behind where a step fails, unless what undoes
    /// it fails as well, which `left` is told.
    pub(super) fn place(
        &self,
        device: i32,
        handle: u64,
        bytes: u64,
        write: bool,
        left: impl Fn(Fault),
    ) -> Outcome<u64> {
        let undo = |undone: Outcome<()>| {
            if let Err(fault) = undone {
                left(fault);
            }
        };
        let address = self.reserve(bytes, 0)?;
        self.map(address, bytes, handle)
            .and_then(|()| {
                self.grant(device, address, bytes, write)
                    .inspect_err(|_| undo(self.unmap(address, bytes)))
            })
            .inspect_err(|_| undo(self.unreserve(address, bytes)))?;
        Ok(address)
    }

    pub(super) fn unmap(&self, address: u64, bytes: u64) -> Outcome<()> {
        call!(self.cuMemUnmap(address, bytes as usize))
    }

    pub(super) fn grant(&self, device: i32, address: u64, bytes: u64, write: bool) -> Outcome<()> {
        let description = CUmemAccessDesc {
            location: Self::location(device),
            flags: if write {
                CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            } else {
                CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READ
            },
        };
        call!(self.cuMemSetAccess(address, bytes as usize, &raw const description, 1))
    }

    /// A descriptor of physical memory; the caller owns it.
    pub(super) fn export(&self, handle: u64) -> Outcome<c_int> {
        let mut descriptor: c_int = -1;
        call!(self.cuMemExportToShareableHandle(
            (&raw mut descriptor).cast(),
            handle,
            CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR.0,
            0
        ))?;
        Ok(descriptor)
    }

    /// A handle of memory that another process exported. The descriptor stays the caller's.
    pub(super) fn import(&self, descriptor: c_int) -> Outcome<u64> {
        let mut handle = 0;
        call!(self.cuMemImportFromShareableHandle(
            &raw mut handle,
            descriptor as usize as *mut c_void,
            CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR.0
        ))?;
        Ok(handle)
    }

    /// Makes host memory readable by all GPUs of the process. Memory that this process may only read, as what was taken over
    /// from another server, needs a flag that not every driver and GPU has, so it is the second try.
    pub(super) fn register(&self, address: usize, bytes: usize) -> Outcome<()> {
        let try_with =
            |flags| call!(self.cuMemHostRegister_v2(address as *mut c_void, bytes, flags));
        try_with(REGISTER_PORTABLE).or_else(|fault| match fault.code {
            INVALID_VALUE => try_with(REGISTER_PORTABLE | REGISTER_READ_ONLY).map_err(|_| fault),
            _ => Err(fault),
        })
    }

    pub(super) fn unregister(&self, address: usize) -> Outcome<()> {
        call!(self.cuMemHostUnregister(address as *mut c_void))
    }

    /// Pinned host memory. Cached, unlike cudarc's, since it is read as well.
    pub(super) fn host_alloc(&self, bytes: usize) -> Outcome<usize> {
        let mut address = std::ptr::null_mut();
        call!(self.cuMemHostAlloc(&raw mut address, bytes, REGISTER_PORTABLE))?;
        Ok(address as usize)
    }

    pub(super) fn host_free(&self, address: usize) -> Outcome<()> {
        call!(self.cuMemFreeHost(address as *mut c_void))
    }

    pub(super) fn upload(&self, to: u64, from: usize, bytes: usize, on: Opaque) -> Outcome<()> {
        call!(self.cuMemcpyHtoDAsync_v2(to, from as *const c_void, bytes, on.0))
    }

    pub(super) fn download(&self, to: usize, from: u64, bytes: usize, on: Opaque) -> Outcome<()> {
        call!(self.cuMemcpyDtoHAsync_v2(to as *mut c_void, from, bytes, on.0))
    }

    pub(super) fn copy_peer(
        &self,
        to: (u64, Opaque),
        from: (u64, Opaque),
        bytes: usize,
        on: Opaque,
    ) -> Outcome<()> {
        call!(self.cuMemcpyPeerAsync(to.0, to.1.0, from.0, from.1.0, bytes, on.0))
    }

    pub(super) fn stream(&self) -> Outcome<Opaque> {
        let mut stream = std::ptr::null_mut();
        call!(self.cuStreamCreate(&raw mut stream, STREAM_NON_BLOCKING))?;
        Ok(Opaque(stream))
    }

    pub(super) fn end_stream(&self, stream: Opaque) -> Outcome<()> {
        call!(self.cuStreamDestroy_v2(stream.0))
    }

    pub(super) fn event(&self) -> Outcome<Opaque> {
        let mut event = std::ptr::null_mut();
        call!(self.cuEventCreate(&raw mut event, EVENT_FLAGS))?;
        Ok(Opaque(event))
    }

    pub(super) fn end_event(&self, event: Opaque) -> Outcome<()> {
        call!(self.cuEventDestroy_v2(event.0))
    }

    pub(super) fn record(&self, event: Opaque, on: Opaque) -> Outcome<()> {
        call!(self.cuEventRecord(event.0, on.0))
    }

    /// Sleeps until everything before the event's record is done.
    pub(super) fn wait(&self, event: Opaque) -> Outcome<()> {
        call!(self.cuEventSynchronize(event.0))
    }
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Driver")
    }
}

impl From<Fault> for CudaError {
    fn from(fault: Fault) -> Self {
        Self::Refused {
            call: fault.call,
            code: fault.name,
        }
    }
}

/// What C wrote, up to its end.
fn text(written: &[c_char]) -> String {
    let bytes: Vec<u8> = written
        .iter()
        .take_while(|c| **c != 0)
        .map(|c| *c as u8)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
