//! The CPU stand-in's side of a stream, for tests: kernels compiled by a C++ compiler, every CUDA
//! thread a fiber (simt.cpp). Device pointers are pointers.

use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::sync::{Mutex, PoisonError};

use super::{Device, Kernel, Launch};
use crate::error::{Error, Result};

/// The order in which threads and blocks get to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Who could go on first, goes on first.
    Fifo,
    /// Who could go on last, goes on first; blocks from the last to the first.
    Lifo,
    /// At random, by this seed.
    Random(u64),
}

/// The device to stand in for.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// The order in which threads run.
    pub order: Order,
    /// The device that launches see.
    pub device: Device,
    /// The name of a bug of `tests/planted_bugs.txt` to run the kernels with, or nothing.
    pub planted_bug: &'static str,
}

/// `simt_run` of simt.cpp.
type Run = unsafe extern "C" fn(
    variant: *const c_char,
    name: *const c_char,
    grid: u32,
    threads: u32,
    dynamic_shared: usize,
    args: *const c_void,
    args_bytes: usize,
    order: c_int,
    seed: u64,
    report: *mut c_char,
    report_bytes: usize,
) -> c_int;

extern "C" {
    fn simt_launcher() -> Run;
}

/// The scheduler, of which there is one a process.
static SCHEDULER: Mutex<Option<Run>> = Mutex::new(None);

impl Machine {
    pub(super) fn launch(
        &self,
        kernel: &Kernel,
        launch: Launch,
        args: *const c_void,
        args_bytes: usize,
    ) -> Result<()> {
        let variant = CString::new(self.planted_bug).expect("names hold no zero");
        let name = CString::new(kernel.symbol()).expect("names hold no zero");
        let (order, seed) = match self.order {
            Order::Fifo => (0, 0),
            Order::Lifo => (1, 0),
            Order::Random(seed) => (2, seed),
        };
        let mut report: [c_char; 4096] = [0; 4096];
        let mut scheduler = SCHEDULER.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: it looks at the environment, and may load a library.
        let run = *scheduler.get_or_insert_with(|| unsafe { simt_launcher() });
        // SAFETY: strings end in zero, the scheduler writes no more than the report's size, and it
        // compares `args_bytes` with the size of the struct that the kernel takes.
        let failed = unsafe {
            run(
                variant.as_ptr(),
                name.as_ptr(),
                launch.blocks,
                launch.threads,
                launch.shared_bytes as usize,
                args,
                args_bytes,
                order,
                seed,
                report.as_mut_ptr(),
                report.len(),
            )
        };
        if failed == 0 {
            return Ok(());
        }
        // SAFETY: the scheduler ends it with zero.
        let reason = unsafe { CStr::from_ptr(report.as_ptr()) }.to_string_lossy().into_owned();
        Err(Error::CudaLaunch { op: kernel.op, kernel: kernel.symbol(), reason })
    }
}
