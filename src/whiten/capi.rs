//! The C entry points of the op.

use std::ffi::c_void;

#[cfg(any(feature = "cuda", feature = "simt"))]
use super::cuda;
use super::{
    cpu, EpsPlacement, GradOutputs, Inputs, MomentsInputs, MomentsOutputs, Outputs,
    OwnBackwardInputs, WhitenOptions, WithBackwardInputs, OP,
};
#[cfg(any(feature = "cuda", feature = "simt"))]
use crate::capi::arguments::Workspace;
use crate::capi::arguments::{check_reserved, choose, flag, Given, Growing, Memory, Options, Raw};
use crate::capi::{self, call, Pass, Result};
#[cfg(any(feature = "cuda", feature = "simt"))]
use crate::cuda::{Device, Stream};
use crate::error::Error;
use crate::memory::{Host, Reads, Writes};
use crate::moments::Moments;

/// `eps` is added to the variance (TRL, verl, NeMo, OpenRLHF, lm-human-preferences).
pub const PPOK_WHITEN_EPS_IN_VARIANCE: i32 = 0;
/// `eps` is added to the standard deviation (CleanRL).
pub const PPOK_WHITEN_EPS_IN_STD: i32 = 1;

/// `Ok` when a C caller's moments can be those of anything.
fn check_counts(moments: Option<&[Moments]>) -> Result<()> {
    for &Moments { count, .. } in moments.into_iter().flatten() {
        let valid = (0.0..=9_007_199_254_740_992.0).contains(&count) && count.fract() == 0.0;
        if !valid {
            let (option, expected) = ("moments.count", "a whole number from 0 to 2^53".into());
            return Err(
                Error::Option { op: OP, option, expected, got: format!("{count:?}") }.into()
            );
        }
    }
    Ok(())
}

/// Options of ppok_whiten_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
#[allow(non_camel_case_types)]
pub struct ppok_whiten_options {
    /// `sizeof` of this struct.
    pub struct_size: usize,
    /// Keeps the divisor from 0; above 1.2e-38, 1e-8 by default.
    pub eps: f64,
    /// `PPOK_WHITEN_EPS_IN_VARIANCE`, the default, or `PPOK_WHITEN_EPS_IN_STD`.
    pub eps_placement: i32,
    /// 1, the default: the sum of squares is divided by n - 1; 0: by n.
    pub unbiased: i32,
    /// 1, the default: the result has mean 0; 0: the mean is added back after scaling.
    pub shift_mean: i32,
    /// 0.
    pub reserved: i32,
}

// SAFETY: of numbers without padding, its size first.
unsafe impl Growing for ppok_whiten_options {
    const FIRST_SIZE: usize = size_of::<Self>();

    fn initial() -> Self {
        let WhitenOptions { eps, eps_placement, unbiased, shift_mean } = WhitenOptions::default();
        Self {
            struct_size: size_of::<Self>(),
            eps,
            eps_placement: eps_placement as i32,
            unbiased: i32::from(unbiased),
            shift_mean: i32::from(shift_mean),
            reserved: 0,
        }
    }
}

impl Options for ppok_whiten_options {
    type Options = WhitenOptions;

    fn options(&self) -> Result<WhitenOptions> {
        check_reserved(OP, "options", self.reserved)?;
        let placements = [EpsPlacement::Variance, EpsPlacement::Std];
        Ok(WhitenOptions {
            eps: self.eps,
            eps_placement: choose(OP, "eps_placement", self.eps_placement, &placements)?,
            unbiased: flag(OP, "unbiased", self.unbiased)?,
            shift_mean: flag(OP, "shift_mean", self.shift_mean)?,
        })
    }
}

/// Arguments of ppok_whiten_moments_*. Set `struct_size`, and everything that is not used to zero.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
#[allow(non_camel_case_types)]
pub struct ppok_whiten_moments_args {
    /// `sizeof` of this struct.
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
unsafe impl Growing for ppok_whiten_moments_args {
    const FIRST_SIZE: usize = size_of::<Self>();
}

impl ppok_whiten_moments_args {
    fn inputs(&self) -> MomentsInputs<'_, Raw> {
        MomentsInputs { x: self.x, mask: self.mask.given() }
    }

    fn outputs(&self) -> MomentsOutputs<'_, Raw> {
        MomentsOutputs { moments: self.moments }
    }
}

impl Pass for ppok_whiten_moments_args {
    const OP: &'static str = OP;

    fn on_cpu(&self, memory: &mut Memory) -> Result<()> {
        let (inputs, mut outputs) = (self.inputs(), self.outputs());
        let inputs = inputs.try_map(&[self.elements], memory)?;
        let outputs = outputs.try_map(memory)?;
        Ok(cpu::masked_moments(inputs, self.elements, outputs)?)
    }

    #[cfg(any(feature = "cuda", feature = "simt"))]
    fn on_cuda(&self, memory: &mut Memory, stream: &Stream, workspace: Workspace) -> Result<()> {
        let (inputs, mut outputs) = (self.inputs(), self.outputs());
        let inputs = inputs.try_map(&[self.elements], memory)?;
        let outputs = outputs.try_map(memory)?;
        Ok(cuda::masked_moments(
            stream,
            inputs,
            self.elements,
            outputs,
            memory.workspace(workspace)?,
        )?)
    }

    #[cfg(any(feature = "cuda", feature = "simt"))]
    fn workspace_size(&self, _: &Memory, _: Device) -> Result<usize> {
        Ok(size_of::<f64>().saturating_mul(cuda::workspace_len(self.elements)))
    }
}

/// Arguments of ppok_whiten_forward_*. Set `struct_size`, and everything that is not used to zero.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
#[allow(non_camel_case_types)]
pub struct ppok_whiten_forward_args {
    /// `sizeof` of this struct.
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
    /// Null for the defaults. In the process's memory, also for CUDA.
    pub options: *const ppok_whiten_options,
    /// `[elements]`, written; 0 where masked. For CUDA it may be `x`.
    pub y: *mut f32,
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Growing for ppok_whiten_forward_args {
    const FIRST_SIZE: usize = size_of::<Self>();
}

impl ppok_whiten_forward_args {
    fn inputs(&self) -> Inputs<'_, Raw> {
        Inputs { x: self.x, mask: self.mask.given(), moments: self.moments.given() }
    }

    fn outputs(&self) -> Outputs<'_, Raw> {
        Outputs { y: self.y }
    }
}

impl Pass for ppok_whiten_forward_args {
    const OP: &'static str = OP;

    fn on_cpu(&self, memory: &mut Memory) -> Result<()> {
        let options = memory.options(self.options)?;
        let (inputs, mut outputs) = (self.inputs(), self.outputs());
        let inputs = inputs.try_map(&[self.elements], memory)?;
        let outputs = outputs.try_map(&[self.elements], memory)?;
        check_counts(inputs.moments)?;
        Ok(cpu::masked_whiten(inputs, self.elements, &options, outputs)?)
    }

    #[cfg(any(feature = "cuda", feature = "simt"))]
    fn on_cuda(&self, memory: &mut Memory, stream: &Stream, _: Workspace) -> Result<()> {
        let options = memory.options(self.options)?;
        let (inputs, mut outputs) = (self.inputs(), self.outputs());
        let inputs = inputs.try_map(&[self.elements], memory)?;
        let outputs = outputs.try_map(&[self.elements], memory)?;
        Ok(cuda::masked_whiten(stream, inputs, None, self.elements, &options, outputs)?)
    }
}

/// Arguments of ppok_whiten_backward_*. Set `struct_size`, and everything that is not used to zero.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
#[allow(non_camel_case_types)]
pub struct ppok_whiten_backward_args {
    /// `sizeof` of this struct.
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
    /// Null for the defaults. In the process's memory, also for CUDA.
    pub options: *const ppok_whiten_options,
    /// `[elements]`, written; 0 where masked. For CUDA it may be `grad_y`.
    pub grad_x: *mut f32,
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Growing for ppok_whiten_backward_args {
    const FIRST_SIZE: usize = size_of::<Self>();
}

impl ppok_whiten_backward_args {
    fn inputs(&self) -> OwnBackwardInputs<'_, Raw> {
        OwnBackwardInputs {
            x: self.x,
            mask: self.mask.given(),
            moments: self.moments.given(),
            grad_y: self.grad_y,
        }
    }

    fn outputs(&self) -> GradOutputs<'_, Raw> {
        GradOutputs { grad_x: self.grad_x }
    }
}

impl Pass for ppok_whiten_backward_args {
    const OP: &'static str = OP;

    fn on_cpu(&self, memory: &mut Memory) -> Result<()> {
        let options = memory.options(self.options)?;
        let (inputs, mut outputs) = (self.inputs(), self.outputs());
        let inputs = inputs.try_map(&[self.elements], memory)?;
        let outputs = outputs.try_map(&[self.elements], memory)?;
        check_counts(inputs.moments)?;
        Ok(cpu::masked_whiten_backward(inputs, self.elements, &options, outputs)?)
    }

    #[cfg(any(feature = "cuda", feature = "simt"))]
    fn on_cuda(&self, memory: &mut Memory, stream: &Stream, workspace: Workspace) -> Result<()> {
        let (elements, options) = (self.elements, memory.options(self.options)?);
        let (inputs, mut outputs) = (self.inputs(), self.outputs());
        let inputs = inputs.try_map(&[elements], memory)?;
        let outputs = outputs.try_map(&[elements], memory)?;
        let workspace = memory.workspace(workspace)?;
        let backward = cuda::masked_whiten_backward;
        Ok(backward(stream, inputs, None, elements, &options, outputs, workspace)?)
    }

    #[cfg(any(feature = "cuda", feature = "simt"))]
    fn workspace_size(&self, _: &Memory, _: Device) -> Result<usize> {
        Ok(size_of::<f64>().saturating_mul(cuda::workspace_len(self.elements)))
    }
}

/// Arguments of ppok_whiten_with_backward_*. Set `struct_size`, and everything that is not used to zero.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
#[allow(non_camel_case_types)]
pub struct ppok_whiten_with_backward_args {
    /// `sizeof` of this struct.
    pub struct_size: usize,
    /// How many there are.
    pub elements: usize,
    /// `[elements]`; null if all count.
    pub mask: *const u8,
    /// The moments that were whitened with, one.
    pub moments: *const Moments,
    /// The upstream gradient, `[elements]`.
    pub grad_y: *const f32,
    /// Null for the defaults. In the process's memory, also for CUDA.
    pub options: *const ppok_whiten_options,
    /// `[elements]`, written; 0 where masked. For CUDA it may be `grad_y`.
    pub grad_x: *mut f32,
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Growing for ppok_whiten_with_backward_args {
    const FIRST_SIZE: usize = size_of::<Self>();
}

impl ppok_whiten_with_backward_args {
    fn inputs(&self) -> WithBackwardInputs<'_, Raw> {
        WithBackwardInputs {
            mask: self.mask.given(),
            moments: self.moments.given(),
            grad_y: self.grad_y,
        }
    }

    fn outputs(&self) -> GradOutputs<'_, Raw> {
        GradOutputs { grad_x: self.grad_x }
    }
}

impl Pass for ppok_whiten_with_backward_args {
    const OP: &'static str = OP;

    fn on_cpu(&self, memory: &mut Memory) -> Result<()> {
        let options = memory.options(self.options)?;
        let (inputs, mut outputs) = (self.inputs(), self.outputs());
        let inputs = inputs.try_map(&[self.elements], memory)?;
        let outputs = outputs.try_map(&[self.elements], memory)?;
        check_counts(inputs.moments)?;
        Ok(cpu::masked_whiten_with_backward(inputs, self.elements, &options, outputs)?)
    }

    #[cfg(any(feature = "cuda", feature = "simt"))]
    fn on_cuda(&self, memory: &mut Memory, stream: &Stream, _: Workspace) -> Result<()> {
        let (elements, options) = (self.elements, memory.options(self.options)?);
        let (inputs, mut outputs) = (self.inputs(), self.outputs());
        let inputs = inputs.try_map(&[elements], memory)?;
        let outputs = outputs.try_map(&[elements], memory)?;
        let backward = cuda::masked_whiten_with_backward;
        Ok(backward(stream, inputs, None, elements, &options, outputs)?)
    }
}

/// Sets the defaults. `struct_size` is `sizeof *options`.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_options_init(
    options: *mut ppok_whiten_options,
    struct_size: usize,
) -> i32 {
    capi::init(OP, options, struct_size)
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
        // SAFETY: the header's.
        let mut memory = unsafe { Memory::of(OP) };
        let mut read = |arg, from| -> Result<Moments> {
            let moments = Reads::<Raw, Host>::input(&mut memory, arg, &[&[1]], &from)?;
            check_counts(Some(moments))?;
            Ok(moments[0])
        };
        let of_both = read("a", a)?.merge(read("b", b)?);
        // SAFETY: the header's. Another one, for it may be `a` or `b`.
        let mut memory = unsafe { Memory::of(OP) };
        Writes::<Raw, Host>::output(&mut memory, "merged", &[&[1]], &[], &mut merged)?[0] = of_both;
        Ok(())
    })
}

/// Count, mean and sum of squared deviations of the unmasked elements.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_moments_cpu(args: *const ppok_whiten_moments_args) -> i32 {
    capi::cpu(args)
}

/// ppok_whiten_moments_cpu() on device memory and `stream`.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_moments_cuda(
    args: *const ppok_whiten_moments_args,
    workspace: *mut c_void,
    bytes: usize,
    stream: *mut c_void,
) -> i32 {
    capi::cuda(args, workspace, bytes, stream)
}

/// Writes the bytes of workspace that ppok_whiten_moments_cuda() needs to `bytes`.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_moments_cuda_workspace_size(
    args: *const ppok_whiten_moments_args,
    stream: *mut c_void,
    bytes: *mut usize,
) -> i32 {
    capi::workspace_size(args, stream, bytes)
}

/// Masked whitening: y = (x - mean) / sqrt(var + eps) where unmasked, else 0, with the mean and the
/// variance of `moments`. If those are of too few elements, `PPOK_STATUS_MASK`.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_forward_cpu(args: *const ppok_whiten_forward_args) -> i32 {
    capi::cpu(args)
}

/// ppok_whiten_forward_cpu() on device memory, moments included, and `stream`. Moments of too few
/// elements are no error here: y is NaN then where not masked.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_forward_cuda(
    args: *const ppok_whiten_forward_args,
    workspace: *mut c_void,
    bytes: usize,
    stream: *mut c_void,
) -> i32 {
    capi::cuda(args, workspace, bytes, stream)
}

/// Writes the bytes of workspace that ppok_whiten_forward_cuda() needs to `bytes`: 0 in this version.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_forward_cuda_workspace_size(
    args: *const ppok_whiten_forward_args,
    stream: *mut c_void,
    bytes: *mut usize,
) -> i32 {
    capi::workspace_size(args, stream, bytes)
}

/// Gradient with respect to `x` of ppok_whiten_forward_cpu() with the moments of `x` itself, through
/// which it goes too.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_backward_cpu(args: *const ppok_whiten_backward_args) -> i32 {
    capi::cpu(args)
}

/// ppok_whiten_backward_cpu() on device memory, moments included, and `stream`.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_backward_cuda(
    args: *const ppok_whiten_backward_args,
    workspace: *mut c_void,
    bytes: usize,
    stream: *mut c_void,
) -> i32 {
    capi::cuda(args, workspace, bytes, stream)
}

/// Writes the bytes of workspace that ppok_whiten_backward_cuda() needs to `bytes`.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_backward_cuda_workspace_size(
    args: *const ppok_whiten_backward_args,
    stream: *mut c_void,
    bytes: *mut usize,
) -> i32 {
    capi::workspace_size(args, stream, bytes)
}

/// Gradient with respect to `x` of ppok_whiten_forward_cpu() with moments that are constants.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_with_backward_cpu(
    args: *const ppok_whiten_with_backward_args,
) -> i32 {
    capi::cpu(args)
}

/// ppok_whiten_with_backward_cpu() on device memory, moments included, and `stream`.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_with_backward_cuda(
    args: *const ppok_whiten_with_backward_args,
    workspace: *mut c_void,
    bytes: usize,
    stream: *mut c_void,
) -> i32 {
    capi::cuda(args, workspace, bytes, stream)
}

/// Writes the bytes of workspace that ppok_whiten_with_backward_cuda() needs to `bytes`: 0 in this version.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_with_backward_cuda_workspace_size(
    args: *const ppok_whiten_with_backward_args,
    stream: *mut c_void,
    bytes: *mut usize,
) -> i32 {
    capi::workspace_size(args, stream, bytes)
}
