//! The machine behind the driver doubles: GPUs, their memory, their faults and who uses them, in one file that every
//! process maps.
//!
//! A test owns a [`Machine`]; the doubles of `libcuda.so.1` and `libnvidia-ml.so.1`, in the same process or another, find
//! the file by [`BOARD_VARIABLE`] and look at it in each call. So a test can take a GPU away while a copy runs, and two
//! processes see one GPU. What a driver would only answer with undefined behaviour, the doubles write down as misuse;
//! [`Machine::misuse`] reads it, and [`run`] fails the test for it.

mod board;
mod isolate;

pub use board::{Call, Gpu, Live, MAX_GPUS, MAX_PROCESSES, Machine, Process, Row, Xid};
pub use isolate::{Isolated, in_role, run, run_role};

/// Names the machine's file to the doubles.
pub const BOARD_VARIABLE: &str = "HOTSET_DOUBLE";

/// The path of the test function in which this stands, as the test harness knows it.
#[macro_export]
macro_rules! this_test {
    () => {{
        fn here() {}
        let path = std::any::type_name_of_val(&here);
        let path = path.strip_suffix("::here").unwrap_or(path);
        path.split_once("::").map_or(path, |(_, test)| test)
    }};
}
