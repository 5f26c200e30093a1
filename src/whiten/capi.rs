//! The C entry points of the op.

use std::ffi::c_void;

#[cfg(any(feature = "cuda", feature = "simt"))]
use super::cuda;
use super::{cpu, EpsPlacement, WhitenOptions, OP};
use crate::capi::arguments::{
    check_reserved, choose, flag, initialise, read_or_default, Growing, Host, Memory, Space,
    Workspace,
};
#[cfg(any(feature = "cuda", feature = "simt"))]
use crate::capi::arguments::{write_no_size, write_size, Device};
use crate::capi::{call, on_device, Result};
use crate::error::Error;
use crate::moments::Moments;

/// `eps` is added to the variance (TRL, verl, NeMo, OpenRLHF, lm-human-preferences).
pub const PPOK_WHITEN_EPS_IN_VARIANCE: i32 = 0;
/// `eps` is added to the standard deviation (CleanRL).
pub const PPOK_WHITEN_EPS_IN_STD: i32 = 1;

impl Moments {
    /// What a C caller gave, if it can be.
    fn checked(self) -> Result<Self> {
        let valid =
            (0.0..=9_007_199_254_740_992.0).contains(&self.count) && self.count.fract() == 0.0;
        if !valid {
            let (option, expected) = ("moments.count", "a whole number from 0 to 2^53".into());
            let got = format!("{:?}", self.count);
            return Err(Error::Option { op: OP, option, expected, got }.into());
        }
        Ok(self)
    }
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

impl ppok_whiten_options {
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

/// Sets the defaults. `struct_size` is `sizeof *options`.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_options_init(
    options: *mut ppok_whiten_options,
    struct_size: usize,
) -> i32 {
    // SAFETY: the header's.
    call(|| unsafe { initialise(OP, "options", options, struct_size) })
}

/// The moments of both sets together, for shards and data parallelism, in the process's memory.
/// `merged` may be `a` or `b`.
#[no_mangle]
pub unsafe extern "C" fn ppok_moments_merge(
    a: *const Moments,
    b: *const Moments,
    merged: *mut Moments,
) -> i32 {
    call(|| {
        // SAFETY: the header's.
        let mut memory = unsafe { Memory::<Host>::new(OP) };
        let (a, b) = (memory.input("a", a, 1)?[0], memory.input("b", b, 1)?[0]);
        // SAFETY: the header's. In a room of its own, since it may be one of the others.
        let mut memory = unsafe { Memory::<Host>::new(OP) };
        memory.output("merged", merged, 1)?[0] = a.checked()?.merge(b.checked()?);
        Ok(())
    })
}

/// Count, mean and sum of squared deviations of the unmasked elements.
///
/// - `x`: `[elements]`.
/// - `mask`: `[elements]`; null if all count.
/// - `moments`: one, written.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_moments_cpu(
    x: *const f32,
    mask: *const u8,
    elements: usize,
    moments: *mut Moments,
) -> i32 {
    call(|| {
        // SAFETY: the header's.
        let mut memory = unsafe { Memory::<Host>::new(OP) };
        let x = memory.input("x", x, elements)?;
        let mask = memory.optional_input("mask", mask, elements)?;
        let moments = memory.output("moments", moments, 1)?;
        moments[0] = cpu::masked_moments(x, mask)?;
        Ok(())
    })
}

/// ppok_whiten_moments_cpu() on device memory and `stream`. `workspace` has the bytes that
/// ppok_whiten_moments_cuda_workspace_size() says.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_moments_cuda(
    x: *const f32,
    mask: *const u8,
    elements: usize,
    moments: *mut Moments,
    workspace: *mut c_void,
    workspace_size: usize,
    stream: *mut c_void,
) -> i32 {
    let workspace = Workspace { address: workspace, bytes: workspace_size };
    call(|| {
        on_device!(OP, stream, [x, mask, elements, moments, workspace], |stream| {
            // SAFETY: the header's.
            let mut memory = unsafe { Memory::<Device>::new(OP) };
            let x = memory.input("x", x, elements)?;
            let mask = memory.optional_input("mask", mask, elements)?;
            let moments = memory.output("moments", moments, 1)?;
            let workspace = memory.workspace(workspace, cuda::workspace_len(elements))?;
            Ok(cuda::masked_moments(stream, x, mask, moments, workspace)?)
        })
    })
}

/// Writes the bytes of workspace that ppok_whiten_moments_cuda() needs to `size`.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_moments_cuda_workspace_size(
    elements: usize,
    stream: *mut c_void,
    size: *mut usize,
) -> i32 {
    call(|| {
        on_device!(OP, stream, [elements, size], |_stream| {
            // SAFETY: the header's.
            unsafe { write_size::<f64>(OP, size, cuda::workspace_len(elements)) }
        })
    })
}

/// Masked whitening: y = (x - mean) / sqrt(var + eps) where unmasked, else 0, with the mean and the
/// variance of `moments`: those of x itself, or of a larger set.
///
/// - `x`: `[elements]`.
/// - `mask`: `[elements]`; null if all count.
/// - `options`: null for the defaults.
/// - `moments`: one; of 2 elements or more, or 1 where not `unbiased`, else `PPOK_STATUS_MASK`.
/// - `y`: `[elements]`, written.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_forward_cpu(
    x: *const f32,
    mask: *const u8,
    elements: usize,
    options: *const ppok_whiten_options,
    moments: *const Moments,
    y: *mut f32,
) -> i32 {
    let inputs = Whiten { mask, elements, options, moments };
    call(|| {
        // SAFETY: the header's.
        let mut memory = unsafe { Memory::<Host>::new(OP) };
        let x = memory.input("x", x, elements)?;
        let (mask, options, moments) = inputs.on_cpu(&mut memory)?;
        let y = memory.output("y", y, elements)?;
        Ok(cpu::masked_whiten(x, mask, &moments, &options, y)?)
    })
}

/// ppok_whiten_forward_cpu() on device memory, moments included, and `stream`; `y` may be `x`. Moments
/// of too few elements are no error here: y is NaN then where not masked. `workspace` has the bytes
/// that ppok_whiten_forward_cuda_workspace_size() says.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_forward_cuda(
    x: *const f32,
    mask: *const u8,
    elements: usize,
    options: *const ppok_whiten_options,
    moments: *const Moments,
    y: *mut f32,
    workspace: *mut c_void,
    workspace_size: usize,
    stream: *mut c_void,
) -> i32 {
    let inputs = Whiten { mask, elements, options, moments };
    let workspace = Workspace { address: workspace, bytes: workspace_size };
    call(|| {
        on_device!(OP, stream, [x, inputs, y, workspace], |stream| {
            // SAFETY: the header's.
            let mut memory = unsafe { Memory::<Device>::new(OP) };
            let x = memory.input("x", x, elements)?;
            let (mask, options, moments) = inputs.on_cuda(&mut memory)?;
            let y = memory.output_over("y", y, elements, &["x"])?;
            memory.workspace::<f64>(workspace, 0)?;
            Ok(cuda::masked_whiten(stream, x, mask, moments, &options, y)?)
        })
    })
}

/// Writes the bytes of workspace that ppok_whiten_forward_cuda() needs to `size`: 0 in this version.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_forward_cuda_workspace_size(
    elements: usize,
    stream: *mut c_void,
    size: *mut usize,
) -> i32 {
    call(|| {
        on_device!(OP, stream, [elements, size], |_stream| {
            // SAFETY: the header's.
            unsafe { write_no_size::<f64>(OP, &[elements], size) }
        })
    })
}

/// Gradient with respect to `x` of ppok_whiten_forward_cpu() with the moments of `x` itself, through
/// which it goes too.
///
/// - `x` to `moments`: as in the forward pass.
/// - `grad_y`: `[elements]`, the upstream gradient.
/// - `grad_x`: `[elements]`, written; 0 where masked.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_backward_cpu(
    x: *const f32,
    mask: *const u8,
    elements: usize,
    options: *const ppok_whiten_options,
    moments: *const Moments,
    grad_y: *const f32,
    grad_x: *mut f32,
) -> i32 {
    let inputs = Whiten { mask, elements, options, moments };
    call(|| {
        // SAFETY: the header's.
        let mut memory = unsafe { Memory::<Host>::new(OP) };
        let x = memory.input("x", x, elements)?;
        let (mask, options, moments) = inputs.on_cpu(&mut memory)?;
        let grad_y = memory.input("grad_y", grad_y, elements)?;
        let grad_x = memory.output("grad_x", grad_x, elements)?;
        Ok(cpu::masked_whiten_backward(x, mask, &moments, grad_y, &options, grad_x)?)
    })
}

/// ppok_whiten_backward_cpu() on device memory, moments included, and `stream`; `grad_x` may be
/// `grad_y`. `workspace` has the bytes that ppok_whiten_backward_cuda_workspace_size() says.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_backward_cuda(
    x: *const f32,
    mask: *const u8,
    elements: usize,
    options: *const ppok_whiten_options,
    moments: *const Moments,
    grad_y: *const f32,
    grad_x: *mut f32,
    workspace: *mut c_void,
    workspace_size: usize,
    stream: *mut c_void,
) -> i32 {
    let inputs = Whiten { mask, elements, options, moments };
    let workspace = Workspace { address: workspace, bytes: workspace_size };
    call(|| {
        on_device!(OP, stream, [x, inputs, grad_y, grad_x, workspace], |stream| {
            // SAFETY: the header's.
            let mut memory = unsafe { Memory::<Device>::new(OP) };
            let x = memory.input("x", x, elements)?;
            let (mask, options, given) = inputs.on_cuda(&mut memory)?;
            let grad_y = memory.input("grad_y", grad_y, elements)?;
            let grad_x = memory.output_over("grad_x", grad_x, elements, &["grad_y"])?;
            let room = memory.workspace(workspace, cuda::workspace_len(elements))?;
            let backward = cuda::masked_whiten_backward;
            Ok(backward(stream, x, mask, given, grad_y, &options, grad_x, room)?)
        })
    })
}

/// Writes the bytes of workspace that ppok_whiten_backward_cuda() needs to `size`.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_backward_cuda_workspace_size(
    elements: usize,
    stream: *mut c_void,
    size: *mut usize,
) -> i32 {
    call(|| {
        on_device!(OP, stream, [elements, size], |_stream| {
            // SAFETY: the header's.
            unsafe { write_size::<f64>(OP, size, cuda::workspace_len(elements)) }
        })
    })
}

/// Gradient with respect to `x` of ppok_whiten_forward_cpu() with moments that are constants.
///
/// - `mask` to `moments`: as in the forward pass.
/// - `grad_y`: `[elements]`, the upstream gradient.
/// - `grad_x`: `[elements]`, written; 0 where masked.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_with_backward_cpu(
    mask: *const u8,
    elements: usize,
    options: *const ppok_whiten_options,
    moments: *const Moments,
    grad_y: *const f32,
    grad_x: *mut f32,
) -> i32 {
    let inputs = Whiten { mask, elements, options, moments };
    call(|| {
        // SAFETY: the header's.
        let mut memory = unsafe { Memory::<Host>::new(OP) };
        let (mask, options, moments) = inputs.on_cpu(&mut memory)?;
        let grad_y = memory.input("grad_y", grad_y, elements)?;
        let grad_x = memory.output("grad_x", grad_x, elements)?;
        Ok(cpu::masked_whiten_with_backward(mask, &moments, grad_y, &options, grad_x)?)
    })
}

/// ppok_whiten_with_backward_cpu() on device memory, moments included, and `stream`; `grad_x` may be
/// `grad_y`. `workspace` has the bytes that ppok_whiten_with_backward_cuda_workspace_size() says.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_with_backward_cuda(
    mask: *const u8,
    elements: usize,
    options: *const ppok_whiten_options,
    moments: *const Moments,
    grad_y: *const f32,
    grad_x: *mut f32,
    workspace: *mut c_void,
    workspace_size: usize,
    stream: *mut c_void,
) -> i32 {
    let inputs = Whiten { mask, elements, options, moments };
    let workspace = Workspace { address: workspace, bytes: workspace_size };
    call(|| {
        on_device!(OP, stream, [inputs, grad_y, grad_x, workspace], |stream| {
            // SAFETY: the header's.
            let mut memory = unsafe { Memory::<Device>::new(OP) };
            let (mask, options, moments) = inputs.on_cuda(&mut memory)?;
            let grad_y = memory.input("grad_y", grad_y, elements)?;
            let grad_x = memory.output_over("grad_x", grad_x, elements, &["grad_y"])?;
            memory.workspace::<f64>(workspace, 0)?;
            let backward = cuda::masked_whiten_with_backward;
            Ok(backward(stream, mask, moments, grad_y, &options, grad_x)?)
        })
    })
}

/// Writes the bytes of workspace that ppok_whiten_with_backward_cuda() needs to `size`: 0 in this version.
#[no_mangle]
pub unsafe extern "C" fn ppok_whiten_with_backward_cuda_workspace_size(
    elements: usize,
    stream: *mut c_void,
    size: *mut usize,
) -> i32 {
    call(|| {
        on_device!(OP, stream, [elements, size], |_stream| {
            // SAFETY: the header's.
            unsafe { write_no_size::<f64>(OP, &[elements], size) }
        })
    })
}

/// What every pass but the moments' is about, as it came.
#[derive(Clone, Copy)]
struct Whiten {
    mask: *const u8,
    elements: usize,
    options: *const ppok_whiten_options,
    moments: *const Moments,
}

impl Whiten {
    fn on_cpu<'a>(
        &self,
        memory: &mut Memory<'a, Host>,
    ) -> Result<(Option<&'a [u8]>, WhitenOptions, Moments)> {
        let (mask, options) = self.take(memory)?;
        Ok((mask, options, memory.input("moments", self.moments, 1)?[0].checked()?))
    }

    #[cfg(any(feature = "cuda", feature = "simt"))]
    fn on_cuda<'a>(
        &self,
        memory: &mut Memory<'a, Device>,
    ) -> Result<(Option<crate::cuda::Slice<'a, u8>>, WhitenOptions, cuda::Given<'a>)> {
        let (mask, options) = self.take(memory)?;
        let moments = memory.input("moments", self.moments, 1)?;
        Ok((mask, options, cuda::Given::OnDevice(moments)))
    }

    fn take<'a, S: Space>(
        &self,
        memory: &mut Memory<'a, S>,
    ) -> Result<(Option<S::In<'a, u8>>, WhitenOptions)> {
        // SAFETY: the header's.
        let options = unsafe { read_or_default(OP, "options", self.options) }?.options()?;
        Ok((memory.optional_input("mask", self.mask, self.elements)?, options))
    }
}
