//! The C functions against the Rust ones that they call: every type, every option, the same bits; on
//! the CPU, and with the feature `simt` on the stand-in for CUDA. What they refuse is in tests/capi.c.
#![cfg(feature = "capi")]

mod advantages;
#[path = "../common/mod.rs"]
mod common;
mod correction;
mod gae;
mod kl;
mod logprob;
mod ppo_loss;
mod preference;
mod whiten;

use std::ptr::{null, null_mut};

use common::{random_mask, rng, uniform};
use half::{bf16, f16};
use ppo_kernels::capi::*;
use ppo_kernels::cpu::{Logit, TokenId};
use ppo_kernels::moments::Moments;

#[track_caller]
fn ok(status: i32) {
    // SAFETY: the text ends in zero.
    let said = unsafe { std::ffi::CStr::from_ptr(ppok_last_error()) };
    assert_eq!(status, PPOK_STATUS_OK, "{said:?}");
}

/// Asserts that an option was refused by its name.
#[track_caller]
fn refused(status: i32, option: &str) {
    // SAFETY: the text ends in zero.
    let said = unsafe { std::ffi::CStr::from_ptr(ppok_last_error()) }.to_str().unwrap();
    assert_eq!(status, PPOK_STATUS_OPTION, "{option}: {said}");
    assert!(said.contains(&format!(": option `{option}` is ")), "{option}: {said}");
}

/// A struct of options with its defaults.
fn defaults<T>(init: unsafe extern "C" fn(*mut T, usize) -> i32) -> T {
    let mut options = std::mem::MaybeUninit::<T>::uninit();
    // SAFETY: there is room, and all of it is written.
    unsafe {
        ok(init(options.as_mut_ptr(), size_of::<T>()));
        options.assume_init()
    }
}

fn or_none(option: Option<f64>) -> f64 {
    option.unwrap_or(PPOK_NONE)
}

fn pointer<T>(slice: Option<&[T]>) -> *const T {
    slice.map_or(null(), <[T]>::as_ptr)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn narrow<T: Logit>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&x| T::from_f32(x)).collect()
}

fn wide<T: Logit>(values: &[T]) -> Vec<f32> {
    values.iter().map(|x| x.to_f32()).collect()
}

fn logits_type<T: Logit>() -> i32 {
    match T::NAME {
        "f32" => PPOK_F32,
        "f16" => PPOK_F16,
        _ => PPOK_BF16,
    }
}

fn targets_type<I: TokenId>() -> i32 {
    if I::WIDE {
        PPOK_I64
    } else {
        PPOK_U32
    }
}

/// Runs `$test::<T>` for every type of logits.
macro_rules! every_type {
    ($test:ident) => {
        $test::<f32>();
        $test::<f16>();
        $test::<bf16>();
    };
}
use every_type;

/// The `_cuda` functions against those of `cuda.rs`, which tests/OP_cuda.rs hold to the references.
#[cfg(feature = "simt")]
mod on_the_stand_in {
    use std::ffi::c_void;

    pub use ppo_kernels::cuda::simt::Machine;
    use ppo_kernels::cuda::simt::Order;
    use ppo_kernels::cuda::{Device, Slice, SliceMut};

    use super::ok;

    /// With many multiprocessors and few: parts of a row side by side, and one after the other.
    pub fn machines() -> [Machine; 2] {
        [132, 0].map(|multiprocessors| {
            let device = Device {
                compute_capability: (9, 0),
                max_blocks: 64,
                multiprocessors,
                shared_bytes: 232_448,
            };
            Machine { order: Order::Lifo, device, planted_bug: "" }
        })
    }

    pub fn handle(machine: &Machine) -> *mut c_void {
        std::ptr::from_ref(machine).cast_mut().cast()
    }

    pub fn slice<T>(values: &[T]) -> Slice<'_, T> {
        // SAFETY: a launch has ended when the call returns.
        unsafe { Slice::from_raw(values.as_ptr(), values.len()) }
    }

    pub fn out<T>(values: &mut [T]) -> SliceMut<'_, T> {
        // SAFETY: as above.
        unsafe { SliceMut::from_raw(values.as_mut_ptr(), values.len()) }
    }

    /// The `_cuda` function of a pass.
    type Launch<A> = unsafe extern "C" fn(*const A, *mut c_void, usize, *mut c_void) -> i32;

    /// Its `_cuda_workspace_size` function.
    type Size<A> = unsafe extern "C" fn(*const A, *mut c_void, *mut usize) -> i32;

    /// Runs a pass with as much workspace as it asks for, and returns how much that was.
    ///
    /// # Safety
    /// The arguments are as the header asks.
    #[track_caller]
    pub unsafe fn run<A>(pass: Launch<A>, size: Size<A>, args: &A, machine: &Machine) -> usize {
        let (stream, mut bytes) = (handle(machine), usize::MAX);
        // SAFETY: the caller's.
        unsafe {
            ok(size(args, stream, &mut bytes));
            let mut workspace = vec![f64::NAN; bytes.div_ceil(size_of::<f64>()) + 1];
            // From a multiple of 16 on.
            let first = usize::from(!(workspace.as_ptr() as usize).is_multiple_of(16));
            ok(pass(args, workspace[first..].as_mut_ptr().cast(), bytes, stream));
        }
        bytes
    }
}
