//! The C library, shared by all ops: status codes, the last error, versions, and the one function through
//! which every call goes. It knows nothing of any op.
//!
//! `include/ppo_kernels.h` is made of this module and of every op's `capi.rs` by cbindgen, with
//! `include/cbindgen.toml`, whose first page says what holds for all functions; names and comments are
//! written for its readers. An op's `capi.rs` has the functions for the CPU, with what there is to say
//! of the pass; those that follow from its structs, for CUDA and for defaults, are in [`functions`].
//!
//! # Safety
//! Every exported function asks of its pointers what that page says, which is what `cpu` and
//! `cuda` ask for: it hands them on and does nothing else.

pub(crate) mod arguments;
#[allow(missing_docs, clippy::missing_safety_doc)]
pub mod functions;

use std::any::Any;
use std::cell::Cell;
use std::ffi::{c_char, c_uint, c_void, CStr};
use std::panic::{catch_unwind, AssertUnwindSafe};

use self::arguments::{check_pointer, initialise, read, Growing, Memory, Options, Workspace};
use crate::cpu::{num_threads, use_team};
use crate::cuda::Stream;
use crate::error::Error;

/// The version of this header: 10000 times the major number, 100 times the minor one, and the patch.
pub const PPOK_VERSION: i32 = 100;

/// Everything went well.
pub const PPOK_STATUS_OK: i32 = 0;
/// A size is not one that the op takes, or does not go with another, or is more than a process can
/// address.
pub const PPOK_STATUS_SHAPE: i32 = 1;
/// An element type is none of those that the op takes.
pub const PPOK_STATUS_DTYPE: i32 = 2;
/// An option is out of its range, not finite, or does not go with the arguments given, or an array holds
/// a label or a length that is none.
pub const PPOK_STATUS_OPTION: i32 = 3;
/// A target is neither in the vocabulary nor `ignore_index`.
pub const PPOK_STATUS_TARGET: i32 = 4;
/// Too few elements are unmasked for the result to be defined.
pub const PPOK_STATUS_MASK: i32 = 5;
/// A pointer that is needed is null.
pub const PPOK_STATUS_NULL_POINTER: i32 = 6;
/// A pointer is not aligned to the size of an element.
pub const PPOK_STATUS_MISALIGNED: i32 = 7;
/// Memory that is written overlaps another argument.
pub const PPOK_STATUS_OVERLAP: i32 = 8;
/// The `struct_size` of a struct is none that this library knows, or the struct sets fields that only
/// a later version has.
pub const PPOK_STATUS_STRUCT_SIZE: i32 = 9;
/// The workspace is smaller than the function's `_workspace_size` says.
pub const PPOK_STATUS_WORKSPACE: i32 = 10;
/// The library was built without CUDA.
pub const PPOK_STATUS_UNSUPPORTED: i32 = 11;
/// There is no CUDA driver on this machine, or it is too old.
pub const PPOK_STATUS_CUDA_DRIVER: i32 = 12;
/// The driver has no device or no context to offer.
pub const PPOK_STATUS_CUDA_DEVICE: i32 = 13;
/// The kernels were not compiled for the device's architecture.
pub const PPOK_STATUS_CUDA_IMAGE: i32 = 14;
/// The device is out of memory.
pub const PPOK_STATUS_CUDA_MEMORY: i32 = 15;
/// A kernel could not be launched, or an earlier one failed.
pub const PPOK_STATUS_CUDA_LAUNCH: i32 = 16;
/// A mistake in the library. Please report it, with what ppok_last_error() says.
pub const PPOK_STATUS_INTERNAL: i32 = 17;

/// Logits in IEEE single precision.
pub const PPOK_F32: i32 = 0;
/// Logits in IEEE half precision.
pub const PPOK_F16: i32 = 1;
/// Logits in bfloat16: the upper half of single precision.
pub const PPOK_BF16: i32 = 2;

/// Token ids as `uint32_t`.
pub const PPOK_U32: i32 = 0;
/// Token ids as `int64_t`, as PyTorch has them.
pub const PPOK_I64: i32 = 1;

/// The value of an option that is left out, where it may be. So a clamp of `PPOK_NONE` clamps nothing.
pub const PPOK_NONE: f64 = -1.0;

/// Why a call was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    #[error(transparent)]
    Op(#[from] Error),
    #[error("{op}: `{arg}` is null")]
    Null { op: &'static str, arg: &'static str },
    #[error("{op}: `{arg}` is at {address:#x}, expected a multiple of {align}")]
    Misaligned { op: &'static str, arg: &'static str, address: usize, align: usize },
    #[error("{op}: `{arg}` overlaps `{other}`")]
    Overlap { op: &'static str, arg: &'static str, other: &'static str },
    #[error("{op}: `{arg}` has struct_size {got}, expected {least} to {most}")]
    StructSize { op: &'static str, arg: &'static str, least: usize, most: usize, got: usize },
    #[error("{op}: `{arg}` sets fields that version {} does not have", env!("CARGO_PKG_VERSION"))]
    UnknownFields { op: &'static str, arg: &'static str },
    #[error("{op}: the workspace has {got} bytes, expected {needed} or more")]
    Workspace { op: &'static str, needed: usize, got: usize },
    #[error("{op}: this library was built without CUDA; build it with `--features capi,cuda`")]
    Unsupported { op: &'static str },
    #[error("a mistake in ppo-kernels {}: {message}", env!("CARGO_PKG_VERSION"))]
    Panic { message: String },
}

impl Fault {
    fn status(&self) -> i32 {
        match self {
            Fault::Op(error) => match error {
                Error::Shape { .. } => PPOK_STATUS_SHAPE,
                Error::Dtype { .. } => PPOK_STATUS_DTYPE,
                Error::Option { .. } | Error::Value { .. } => PPOK_STATUS_OPTION,
                Error::Missing { .. } => PPOK_STATUS_NULL_POINTER,
                Error::Target { .. } => PPOK_STATUS_TARGET,
                Error::Mask { .. } => PPOK_STATUS_MASK,
                Error::CudaDriver { .. } => PPOK_STATUS_CUDA_DRIVER,
                Error::CudaDevice { .. } => PPOK_STATUS_CUDA_DEVICE,
                Error::CudaImage { .. } => PPOK_STATUS_CUDA_IMAGE,
                Error::CudaMemory { .. } => PPOK_STATUS_CUDA_MEMORY,
                Error::CudaLaunch { .. } => PPOK_STATUS_CUDA_LAUNCH,
                // These are of tensors, which C has none of.
                Error::Device { .. } => PPOK_STATUS_INTERNAL,
                #[cfg(feature = "candle")]
                Error::Candle(_) => PPOK_STATUS_INTERNAL,
            },
            Fault::Null { .. } => PPOK_STATUS_NULL_POINTER,
            Fault::Misaligned { .. } => PPOK_STATUS_MISALIGNED,
            Fault::Overlap { .. } => PPOK_STATUS_OVERLAP,
            Fault::StructSize { .. } | Fault::UnknownFields { .. } => PPOK_STATUS_STRUCT_SIZE,
            Fault::Workspace { .. } => PPOK_STATUS_WORKSPACE,
            Fault::Unsupported { .. } => PPOK_STATUS_UNSUPPORTED,
            Fault::Panic { .. } => PPOK_STATUS_INTERNAL,
        }
    }
}

pub(crate) type Result<T> = std::result::Result<T, Fault>;

/// Every function of the library runs in this. No panic leaves it: unwinding into C is undefined.
pub(crate) fn call(body: impl FnOnce() -> Result<()>) -> i32 {
    // What a panic may leave half done is the caller's memory, which is not looked at again.
    let fault = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return PPOK_STATUS_OK,
        Ok(Err(fault)) => fault,
        Err(panic) => Fault::Panic { message: message(&*panic) },
    };
    let (mut text, mut bytes) = (fault.to_string(), [0; TEXT]);
    if let Fault::Op(Error::Option { option, .. }) = fault {
        // Options within options have a name of their own here.
        text = text.replacen(option, &option.replace('.', "_"), 1);
    }
    // Cut off at a character where it is too long, so that it ends in zero.
    let len = (0..TEXT).rev().find(|&len| text.is_char_boundary(len)).unwrap_or(0);
    bytes[..len].copy_from_slice(&text.as_bytes()[..len]);
    LAST_ERROR.set(bytes);
    fault.status()
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("panic").to_string()
}

/// Bytes of the last error, its zero included.
const TEXT: usize = 512;

thread_local! {
    /// Without a destructor, so that it is there for as long as the thread is.
    static LAST_ERROR: Cell<[u8; TEXT]> = const { Cell::new([0; TEXT]) };
}

/// The error of this thread's last call that returned anything but `PPOK_STATUS_OK`: the op,
/// the argument, what was expected and what came, in UTF-8. Empty before the first. A call that goes
/// well leaves it as it is. The text is the library's, and stays until the thread's next failing
/// call.
#[no_mangle]
pub extern "C" fn ppok_last_error() -> *const c_char {
    LAST_ERROR.with(|text| text.as_ptr().cast_const().cast())
}

/// The meaning of a status, in a few words: a string of the library's, never null.
#[no_mangle]
pub extern "C" fn ppok_status_string(status: i32) -> *const c_char {
    let text: &CStr = match status {
        PPOK_STATUS_OK => c"ok",
        PPOK_STATUS_SHAPE => c"a size does not fit",
        PPOK_STATUS_DTYPE => c"unknown element type",
        PPOK_STATUS_OPTION => c"option out of range",
        PPOK_STATUS_TARGET => c"target outside the vocabulary",
        PPOK_STATUS_MASK => c"too few unmasked elements",
        PPOK_STATUS_NULL_POINTER => c"null pointer",
        PPOK_STATUS_MISALIGNED => c"misaligned pointer",
        PPOK_STATUS_OVERLAP => c"overlapping memory",
        PPOK_STATUS_STRUCT_SIZE => c"unknown size of a struct",
        PPOK_STATUS_WORKSPACE => c"workspace too small",
        PPOK_STATUS_UNSUPPORTED => c"built without CUDA",
        PPOK_STATUS_CUDA_DRIVER => c"no CUDA driver",
        PPOK_STATUS_CUDA_DEVICE => c"no CUDA device",
        PPOK_STATUS_CUDA_IMAGE => c"kernels not built for this device",
        PPOK_STATUS_CUDA_MEMORY => c"CUDA device out of memory",
        PPOK_STATUS_CUDA_LAUNCH => c"kernel launch failed",
        PPOK_STATUS_INTERNAL => c"mistake in the library",
        _ => c"unknown status",
    };
    text.as_ptr()
}

/// The library's version, in the form of `PPOK_VERSION`, which is the header's.
#[no_mangle]
pub extern "C" fn ppok_version() -> i32 {
    PPOK_VERSION
}

/// The library's version as text: "major.minor.patch", never null.
#[no_mangle]
pub extern "C" fn ppok_version_string() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// The vector instructions that the functions for the CPU use on this machine: "avx512", "avx2", "neon" or
/// "scalar", never null. The results are the same.
#[no_mangle]
pub extern "C" fn ppok_instruction_set() -> *const c_char {
    match crate::cpu::instruction_set() {
        "avx512" => c"avx512",
        "avx2" => c"avx2",
        "neon" => c"neon",
        _ => c"scalar",
    }
    .as_ptr()
}

/// From now on the functions for the CPU work with threads of the program's: `team` has as many of them
/// as it likes call `work(state)`, the caller's among them, and returns when all those calls have. It is
/// called with 0 for `threads` and `flags`, from any thread that calls the library, and its threads need
/// as much stack as that one. `GOMP_parallel` of the OpenMP runtimes is such a function: so a program
/// whose OpenMP threads wait by spinning has no second set of threads that does. Null brings back the
/// library's own pool. What is returned was in use before.
#[no_mangle]
#[allow(clippy::missing_safety_doc)]
pub unsafe extern "C" fn ppok_set_team(team: ppok_team) -> ppok_team {
    // SAFETY: by the description of this function.
    unsafe { use_team(team) }
}

/// Threads of the program's: see ppok_set_team().
#[allow(non_camel_case_types)]
pub type ppok_team = Option<
    unsafe extern "C" fn(
        work: unsafe extern "C" fn(state: *mut c_void),
        state: *mut c_void,
        threads: c_uint,
        flags: c_uint,
    ),
>;

/// How many threads a call by this thread would work with at most, its own included.
#[no_mangle]
pub extern "C" fn ppok_num_threads() -> usize {
    num_threads()
}

/// The arguments of one pass, as the header has them: sizes, inputs, options and outputs of the pass, all
/// in one growing struct, for which [`cpu`], [`cuda`] and [`workspace_size`] do what all passes do.
///
/// Its methods turn the struct into the op's own lists, which `memory` checks on the way.
///
/// # Safety
/// As of [`Growing`].
pub(crate) unsafe trait Pass: Copy {
    /// The op as errors name it.
    const OP: &'static str;

    /// Runs the pass where the caller wants it, by [`run!`].
    fn run(&self, memory: &mut Memory, on: On) -> Result<()>;

    /// The bytes of workspace that the pass needs on CUDA, by sizes and options, and by which pointers
    /// are null.
    fn workspace_size(&self, _: &Memory) -> Result<usize> {
        Ok(0)
    }
}

// SAFETY: the pass's.
unsafe impl<A: Pass> Growing for A {}

/// Where a pass runs. The stream lives as long as the call, by the promise of [`cuda`].
#[derive(Clone, Copy)]
pub(crate) enum On {
    Cpu,
    Cuda(Stream<'static>, Workspace),
}

/// Runs a pass: takes its inputs and outputs, of the sizes of their `try_map`, into the memory of the
/// backend, the workspace too if the pass names one, and calls the op's function for it.
macro_rules! run {
    (
        ($on:expr, $memory:expr),
        [$inputs:expr, $in_sizes:expr], [$outputs:expr, $out_sizes:expr],
        |$i:ident, $o:ident| $cpu:expr,
        |$stream:ident $(, $workspace:ident)?| $cuda:expr $(,)?
    ) => {{
        let (inputs, mut outputs) = ($inputs, $outputs);
        match $on {
            $crate::capi::On::Cpu => {
                let $i = inputs.try_map($in_sizes, $memory)?;
                let $o = outputs.try_map($out_sizes, $memory)?;
                $cpu?;
            }
            $crate::capi::On::Cuda($stream, _given) => {
                let $stream = &$stream;
                let $i = inputs.try_map($in_sizes, $memory)?;
                let $o = outputs.try_map($out_sizes, $memory)?;
                $(let $workspace = $memory.workspace(_given)?;)?
                $cuda?;
            }
        }
        Ok(())
    }};
}
pub(crate) use run;

/// Gives options, of `size` bytes, their defaults.
///
/// # Safety
/// The pointer is null or misaligned, or leads to as many bytes.
pub(crate) unsafe fn init<T: Options>(options: *mut T, size: usize) -> i32 {
    // SAFETY: the caller's.
    call(|| unsafe { initialise(T::OP, "options", options, size, T::initial()) })
}

/// Gives options, of `size` bytes, what `of` makes of a name.
///
/// # Safety
/// As of [`init`]; the name is null, or a string that ends.
pub(crate) unsafe fn init_named<T: Options>(
    options: *mut T,
    size: usize,
    name: *const c_char,
    of: impl FnOnce(&str) -> crate::Result<T::Options>,
) -> i32 {
    call(|| {
        check_pointer(T::OP, "name", name)?;
        // SAFETY: the caller's.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        let value = T::encoded(of(&name)?);
        // SAFETY: the caller's.
        unsafe { initialise(T::OP, "options", options, size, value) }
    })
}

/// Runs a pass on the CPU.
///
/// # Safety
/// The pointers are what the header asks for: those to structs null or misaligned or to as many bytes as
/// `struct_size` says, those to arrays null or misaligned or to as many elements as the sizes say.
pub(crate) unsafe fn cpu<A: Pass>(args: *const A) -> i32 {
    call(|| {
        // SAFETY: the caller's.
        let (args, mut memory) = unsafe { (read(A::OP, "args", args)?, Memory::new::<A>()) };
        args.run(&mut memory, On::Cpu)
    })
}

/// Launches a pass on the caller's stream.
///
/// # Safety
/// As of [`cpu`], the arrays and the workspace being the device's, and the stream one that lives.
pub(crate) unsafe fn cuda<A: Pass>(
    args: *const A,
    workspace: *mut c_void,
    bytes: usize,
    handle: *mut c_void,
) -> i32 {
    call(|| {
        // SAFETY: the caller's.
        let (args, stream, mut memory) = unsafe {
            check_cuda(A::OP)?;
            (read(A::OP, "args", args)?, stream(handle)?, Memory::new::<A>())
        };
        let needed = args.workspace_size(&memory)?;
        let workspace = Workspace { address: workspace, bytes, needed };
        args.run(&mut memory, On::Cuda(stream, workspace))
    })
}

/// Writes the bytes of workspace that a pass needs to `size`.
///
/// # Safety
/// As of [`cuda`], and `size` is null or misaligned or leads to memory for the number. Arrays are not looked
/// at.
pub(crate) unsafe fn workspace_size<A: Pass>(
    args: *const A,
    handle: *mut c_void,
    size: *mut usize,
) -> i32 {
    call(|| {
        check_cuda(A::OP)?;
        check_pointer(A::OP, "size", size)?;
        // SAFETY: the caller's.
        unsafe {
            let args = read(A::OP, "args", args)?;
            // Only looked at: a later version may ask the device.
            stream(handle)?;
            size.write(args.workspace_size(&Memory::new::<A>())?);
        }
        Ok(())
    })
}

/// `Ok` in a library with CUDA.
fn check_cuda(op: &'static str) -> Result<()> {
    if cfg!(any(feature = "cuda", feature = "simt")) {
        return Ok(());
    }
    Err(Fault::Unsupported { op })
}

/// # Safety
/// The handle is of a stream that lives for as long as the result is used.
#[cfg(not(feature = "simt"))]
unsafe fn stream<'a>(handle: *mut c_void) -> Result<Stream<'a>> {
    // SAFETY: the caller's.
    Ok(unsafe { Stream::from_raw(handle) }?)
}

/// The stream of a handle, for tests: the address of a [`Machine`](crate::cuda::simt::Machine), null one that is
/// like an H100.
///
/// # Safety
/// The handle is null or as above.
#[cfg(feature = "simt")]
unsafe fn stream<'a>(handle: *mut c_void) -> Result<Stream<'a>> {
    use crate::cuda::simt::{Machine, Order};
    use crate::cuda::Device;
    let device = Device {
        compute_capability: (9, 0),
        max_blocks: i32::MAX as u32,
        multiprocessors: 132,
        shared_bytes: 232_448,
    };
    let machine = Machine { order: Order::Fifo, device, planted_bug: "" };
    // SAFETY: the caller's.
    let given = unsafe { handle.cast::<Machine>().as_ref() };
    Ok(Stream::simt(given.copied().unwrap_or(machine)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last_error() -> String {
        // SAFETY: it ends in zero.
        unsafe { CStr::from_ptr(ppok_last_error()) }.to_str().unwrap().to_string()
    }

    #[test]
    fn header_and_pkg_config_have_the_version_of_the_package() {
        let number = |text: &str| text.parse::<i32>().unwrap();
        let major = number(env!("CARGO_PKG_VERSION_MAJOR"));
        let minor = number(env!("CARGO_PKG_VERSION_MINOR"));
        let patch = number(env!("CARGO_PKG_VERSION_PATCH"));
        assert_eq!(PPOK_VERSION, 10000 * major + 100 * minor + patch);
        let version = concat!("Version: ", env!("CARGO_PKG_VERSION"), "\n");
        assert!(include_str!("../../include/ppo_kernels.pc.in").contains(version));
    }

    #[test]
    fn a_panic_becomes_a_status() {
        assert_eq!(call(|| panic!("{} is odd", 3)), PPOK_STATUS_INTERNAL);
        assert!(last_error().ends_with(": 3 is odd"), "{}", last_error());
        assert_eq!(call(|| Ok(())), PPOK_STATUS_OK);
        assert!(last_error().ends_with(": 3 is odd"), "{}", last_error());
        std::thread::spawn(|| assert_eq!(last_error(), "")).join().unwrap();
    }

    #[test]
    fn a_long_error_is_cut_off_at_a_character() {
        for shift in 0..4 {
            let panic = format!("{}{}", "x".repeat(shift), "\u{1d11e}".repeat(1000));
            assert_eq!(call(|| panic!("{panic}")), PPOK_STATUS_INTERNAL);
            assert!((TEXT - 4..TEXT).contains(&last_error().len()));
        }
    }

    #[test]
    fn every_status_has_its_own_text() {
        // SAFETY: they end in zero.
        let text = |status| unsafe { CStr::from_ptr(ppok_status_string(status)) }.to_owned();
        let mut texts: Vec<_> = (PPOK_STATUS_OK - 1..=PPOK_STATUS_INTERNAL).map(text).collect();
        assert_eq!(texts[0], text(i32::MAX));
        texts.sort();
        texts.dedup();
        assert_eq!(texts.len() as i32, PPOK_STATUS_INTERNAL + 2);
    }
}
