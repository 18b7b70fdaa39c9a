//! The driver's functions that hotset itself does not need: kernels that break a context, and registration by itself.

#![allow(non_snake_case)] // the driver's names

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;

/// Kernels, each of which breaks the context that it runs in. For every GPU that CUDA 12 knows.
const BREAKING: &CStr = c"
.version 7.0
.target sm_50
.address_size 64
.visible .entry store(.param .u64 at)
{
    .reg .u64 %at;
    .reg .u32 %one;
    ld.param.u64 %at, [at];
    mov.u32 %one, 1;
    st.global.u32 [%at], %one;
    ret;
}
.visible .entry stop(.param .u64 at)
{
    trap;
    ret;
}
";

/// Ways to break a context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Breaking {
    /// A store to an address where nothing is.
    StrayStore,
    /// A store to an address that no word may have.
    MisalignedStore,
    /// An instruction that ends the kernel.
    Trap,
}

macro_rules! functions {
    ($($name:ident($($argument:ty),*);)*) => {
        pub(crate) struct Functions {
            $($name: unsafe extern "C" fn($($argument),*) -> u32,)*
        }

        impl Functions {
            /// `None` on the doubles, which run no kernels.
            pub(crate) fn find() -> Option<Self> {
                // SAFETY: the library is the system's driver, which hotset has loaded already.
                let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW) };
                if library.is_null() {
                    return None;
                }
                $(
                    let name = concat!(stringify!($name), "\0").as_ptr().cast::<c_char>();
                    // SAFETY: a live library, and a name closed by a zero.
                    let found = unsafe { libc::dlsym(library, name) };
                    if found.is_null() {
                        return None;
                    }
                    // SAFETY: the signatures below are those of the driver's header. The library is never closed.
                    let $name = unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> u32>(found)
                    };
                )*
                Some(Self { $($name),* })
            }
        }
    };
}

functions! {
    cuDevicePrimaryCtxRetain(*mut *mut c_void, c_int);
    cuDevicePrimaryCtxRelease_v2(c_int);
    cuCtxSetCurrent(*mut c_void);
    cuCtxSynchronize();
    cuModuleLoadData(*mut *mut c_void, *const c_void);
    cuModuleGetFunction(*mut *mut c_void, *mut c_void, *const c_char);
    cuLaunchKernel(*mut c_void, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, *mut c_void, *mut *mut c_void, *mut *mut c_void);
    cuMemHostRegister_v2(*mut c_void, usize, c_uint);
    cuMemHostUnregister(*mut c_void);
}

macro_rules! must {
    ($self:ident.$function:ident($($argument:expr),* $(,)?)) => {{
        // SAFETY: live handles, and pointers that are valid for the call.
        let code = unsafe { ($self.$function)($($argument),*) };
        assert_eq!(code, 0, stringify!($function));
    }};
}

impl Functions {
    /// Breaks the first GPU's primary context, and says with which code. Blocks.
    pub(crate) fn break_context(&self, how: Breaking) -> u32 {
        let (mut context, mut module, mut kernel) = (null_mut(), null_mut(), null_mut());
        must!(self.cuDevicePrimaryCtxRetain(&raw mut context, 0));
        must!(self.cuCtxSetCurrent(context));
        must!(self.cuModuleLoadData(&raw mut module, BREAKING.as_ptr().cast()));
        let name = match how {
            Breaking::StrayStore | Breaking::MisalignedStore => c"store",
            Breaking::Trap => c"stop",
        };
        must!(self.cuModuleGetFunction(&raw mut kernel, module, name.as_ptr()));
        let mut at: u64 = match how {
            Breaking::StrayStore | Breaking::Trap => 0x10,
            Breaking::MisalignedStore => 0x11,
        };
        let mut parameters = [(&raw mut at).cast::<c_void>()];
        let stream = null_mut();
        must!(self.cuLaunchKernel(
            kernel,
            1,
            1,
            1,
            1,
            1,
            1,
            0,
            stream,
            parameters.as_mut_ptr(),
            null_mut()
        ));
        // SAFETY: no arguments.
        let code = unsafe { (self.cuCtxSynchronize)() };
        // SAFETY: retained above.
        unsafe { (self.cuDevicePrimaryCtxRelease_v2)(0) };
        // SAFETY: no context is current afterwards.
        unsafe { (self.cuCtxSetCurrent)(null_mut()) };
        code
    }

    /// How long it takes to register a range of memory with the driver, and to unregister it. Blocks.
    pub(crate) fn registering(&self, memory: &mut [u8]) -> [std::time::Duration; 2] {
        let mut context = null_mut();
        must!(self.cuDevicePrimaryCtxRetain(&raw mut context, 0));
        must!(self.cuCtxSetCurrent(context));
        let at = memory.as_mut_ptr().cast();
        let began = std::time::Instant::now();
        must!(self.cuMemHostRegister_v2(at, memory.len(), 1));
        let registered = began.elapsed();
        let began = std::time::Instant::now();
        must!(self.cuMemHostUnregister(at));
        let unregistered = began.elapsed();
        must!(self.cuCtxSetCurrent(null_mut()));
        must!(self.cuDevicePrimaryCtxRelease_v2(0));
        [registered, unregistered]
    }
}
