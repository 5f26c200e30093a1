//! The C entry points of the op.

use super::{
    cpu, cuda, EpsPlacement, GradOutputs, Inputs, MomentsInputs, MomentsOutputs, Outputs,
    OwnBackwardInputs, WhitenOptions, WithBackwardInputs, OP,
};
use crate::capi::arguments::{choices, list_of, options, Memory, Raw};
use crate::capi::{self, call, run, On, Pass, Result};
use crate::error::Error;
use crate::memory::{Array, Host, Reads, Writes};
use crate::moments::Moments;

/// `eps` is added to the variance (TRL, verl, NeMo, OpenRLHF, lm-human-preferences).
pub const PPOK_WHITEN_EPS_IN_VARIANCE: i32 = 0;
/// `eps` is added to the standard deviation (CleanRL).
pub const PPOK_WHITEN_EPS_IN_STD: i32 = 1;

/// `Ok` when a C caller's moments can be those of anything.
fn check_counts(moments: Option<&[Moments]>) -> Result<()> {
    // No loop over what may be absent, which is compiled to a look at the length of nothing.
    let Some(moments) = moments else {
        return Ok(());
    };
    let count = moments[0].count;
    if (0.0..=9_007_199_254_740_992.0).contains(&count) && count.fract() == 0.0 {
        return Ok(());
    }
    let (option, expected) = ("moments.count", "a whole number from 0 to 2^53".into());
    Err(Error::Option { op: OP, option, expected, got: format!("{count:?}") }.into())
}

/// Options of ppok_whiten_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_whiten_options {
    pub struct_size: usize,
    /// Keeps the divisor from 0; above 1.2e-38, or 0; 1e-8 by default.
    pub eps: f64,
    /// `PPOK_WHITEN_EPS_IN_VARIANCE`, the default, or `PPOK_WHITEN_EPS_IN_STD`.
    pub eps_placement: i32,
    /// 1, the default: the sum of squares is divided by n - 1; 0: by n.
    pub unbiased: i32,
    /// 1, the default: the result has mean 0; 0: the mean is added back after scaling.
    pub shift_mean: i32,
    pub reserved: i32,
}

choices! {
    EpsPlacement { Variance, Std }
}

options!(ppok_whiten_options, WhitenOptions, OP, [reserved], {
    eps => eps,
    eps_placement => eps_placement,
    unbiased => unbiased,
    shift_mean => shift_mean,
});

/// Arguments of ppok_whiten_moments_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_whiten_moments_args {
    pub struct_size: usize,
    /// How many there are.
    pub elements: usize,
    /// `[elements]`.
    pub x: *const f32,
    /// `[elements]`; null if all count.
    pub mask: *const u8,
    /// Count, mean and sum of squared deviations of the unmasked elements, one; written.
    pub moments: *mut Moments,
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_whiten_moments_args {
    const OP: &'static str = OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        let elements = self.elements;
        run!(
            (on, memory),
            [list_of!(self, MomentsInputs, [x], [mask]), &[elements]],
            [list_of!(self, MomentsOutputs, [moments], []), ()],
            |i, o| cpu::masked_moments(i, elements, o),
            |stream, w| cuda::masked_moments(stream, i, elements, o, w),
        )
    }

    fn workspace_size(&self, _: &Memory) -> Result<usize> {
        Ok(size_of::<f64>().saturating_mul(cuda::workspace_len(self.elements)))
    }
}

/// Arguments of ppok_whiten_forward_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_whiten_forward_args {
    pub struct_size: usize,
    /// How many there are.
    pub elements: usize,
    /// `[elements]`.
    pub x: *const f32,
    /// `[elements]`; null if all count.
    pub mask: *const u8,
    /// The moments to whiten with, one: those of x itself, or of a larger set. Of 2 elements or more, or
    /// 1 where not `unbiased`.
    pub moments: *const Moments,
    pub options: *const ppok_whiten_options,
    /// `[elements]`, written; 0 where masked. For CUDA it may be `x`.
    pub y: *mut f32,
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_whiten_forward_args {
    const OP: &'static str = OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        let (elements, options) = (self.elements, memory.options(self.options)?);
        run!(
            (on, memory),
            [list_of!(self, Inputs, [x], [mask, moments]), &[elements]],
            [list_of!(self, Outputs, [y], []), &[elements]],
            |i, o| {
                check_counts(i.moments)?;
                cpu::masked_whiten(i, elements, &options, o)
            },
            |stream| cuda::masked_whiten(stream, i, None, elements, &options, o),
        )
    }
}

/// Arguments of ppok_whiten_backward_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_whiten_backward_args {
    pub struct_size: usize,
    /// How many there are.
    pub elements: usize,
    /// `[elements]`.
    pub x: *const f32,
    /// `[elements]`; null if all count.
    pub mask: *const u8,
    /// The moments of x, one.
    pub moments: *const Moments,
    /// The upstream gradient, `[elements]`.
    pub grad_y: *const f32,
    pub options: *const ppok_whiten_options,
    /// `[elements]`, written; 0 where masked. For CUDA it may be `grad_y`.
    pub grad_x: *mut f32,
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_whiten_backward_args {
    const OP: &'static str = OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        let (elements, options) = (self.elements, memory.options(self.options)?);
        run!(
            (on, memory),
            [list_of!(self, OwnBackwardInputs, [x, grad_y], [mask, moments]), &[elements]],
            [list_of!(self, GradOutputs, [grad_x], []), &[elements]],
            |i, o| {
                check_counts(i.moments)?;
                cpu::masked_whiten_backward(i, elements, &options, o)
            },
            |stream, w| cuda::masked_whiten_backward(stream, i, None, elements, &options, o, w),
        )
    }

    fn workspace_size(&self, _: &Memory) -> Result<usize> {
        Ok(size_of::<f64>().saturating_mul(cuda::workspace_len(self.elements)))
    }
}

/// Arguments of ppok_whiten_with_backward_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_whiten_with_backward_args {
    pub struct_size: usize,
    /// How many there are.
    pub elements: usize,
    /// `[elements]`; null if all count.
    pub mask: *const u8,
    /// The moments that were whitened with, one.
    pub moments: *const Moments,
    /// The upstream gradient, `[elements]`.
    pub grad_y: *const f32,
    pub options: *const ppok_whiten_options,
    /// `[elements]`, written; 0 where masked. For CUDA it may be `grad_y`.
    pub grad_x: *mut f32,
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_whiten_with_backward_args {
    const OP: &'static str = OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        let (elements, options) = (self.elements, memory.options(self.options)?);
        run!(
            (on, memory),
            [list_of!(self, WithBackwardInputs, [grad_y], [mask, moments]), &[elements]],
            [list_of!(self, GradOutputs, [grad_x], []), &[elements]],
            |i, o| {
                check_counts(i.moments)?;
                cpu::masked_whiten_with_backward(i, elements, &options, o)
            },
            |stream| cuda::masked_whiten_with_backward(stream, i, None, elements, &options, o),
        )
    }
}

/// The moments of both sets together, for shards and data parallelism, in the process's memory.
/// `merged` may be `a` or `b`.
#[no_mangle]
pub unsafe extern "C" fn ppok_moments_merge(
    a: *const Moments,
    b: *const Moments,
    mut merged: *mut Moments,
) -> i32 {
    call(|| {
        let one = |name| Array { name, shape: &[&[1]], over: &[] };
        // SAFETY: the header's.
        let mut memory = unsafe { Memory::of(OP) };
        let mut read = |arg, from| -> Result<Moments> {
            let moments = Reads::<Raw, Host>::input(&mut memory, &one(arg), &from)?;
            check_counts(Some(moments))?;
            Ok(moments[0])
        };
        let of_both = read("a", a)?.merge(read("b", b)?);
        // SAFETY: the header's. Another one, for it may be `a` or `b`.
        let mut memory = unsafe { Memory::of(OP) };
        Writes::<Raw, Host>::output(&mut memory, &one("merged"), &mut merged)?[0] = of_both;
        Ok(())
    })
}

/// Count, mean and sum of squared deviations of the unmasked elements.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_moments_cpu(args: *const ppok_whiten_moments_args) -> i32 {
    capi::cpu(args)
}

/// Masked whitening: y = (x - mean) / sqrt(var + eps) where unmasked, else 0, with the mean and the
/// variance of `moments`. If those are of too few elements, `PPOK_STATUS_MASK`; on CUDA y is NaN then
/// where not masked.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_forward_cpu(args: *const ppok_whiten_forward_args) -> i32 {
    capi::cpu(args)
}

/// Gradient with respect to `x` of ppok_whiten_forward_cpu() with the moments of `x` itself, through
/// which it goes too.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_backward_cpu(args: *const ppok_whiten_backward_args) -> i32 {
    capi::cpu(args)
}

/// Gradient with respect to `x` of ppok_whiten_forward_cpu() with moments that are constants.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_with_backward_cpu(
    args: *const ppok_whiten_with_backward_args,
) -> i32 {
    capi::cpu(args)
}
