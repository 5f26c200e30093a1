//! Whitening of candle tensors.

use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{
    cpu, GradOutputs, Inputs, MomentsInputs, MomentsOutputs, Outputs, OwnBackwardInputs,
    WhitenOptions, WithBackwardInputs, OP,
};
use crate::error::Result;
use crate::memory::Tensors;
use crate::moments::MomentsTensor;
use crate::tensor::{check_dtype, node, run, Backend, Constants, Owned};

/// Count, mean and sum of squared deviations of the unmasked elements of `x` (f32, any shape).
/// `mask` is u8 of the same shape; without it every element counts.
///
/// # Errors
/// If a shape, dtype or device does not fit.
pub fn masked_moments(x: &Tensor, mask: Option<&Tensor>) -> Result<MomentsTensor> {
    check_dtype(OP, "x", x, &[DType::F32])?;
    let (dims, elements) = (x.dims(), x.elem_count());
    let backend = Backend::of(OP, "x", x.device())?;
    let inputs = MomentsInputs::<Tensors> { x, mask };
    let tensors = inputs.try_map(dims, &mut Constants::new(OP, x.device()))?;
    let mut buffers = MomentsOutputs::<Owned> { moments: backend.buffer(1)? };
    run!(
        (OP, backend),
        [tensors, dims],
        [buffers, ()],
        |i, o| cpu::masked_moments(i, elements, o),
        |stream, w = [cuda::workspace_len(elements)]| {
            cuda::masked_moments(stream, i, elements, o, w)
        },
    );
    Ok(MomentsTensor::from_buffer(buffers.moments))
}

/// Whitens `x` (f32, any shape) over its unmasked elements. `mask` is u8 of the same shape; masked
/// elements come out as 0. The gradient goes through mean and variance.
///
/// # Errors
/// If a shape, dtype or device does not fit, `eps` is out of range, or fewer than two elements (one,
/// if the variance is biased) are unmasked. To count them on CUDA would cost a wait for the device:
/// the unmasked elements come out as NaN there.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ppo_kernels::whiten::{masked_whiten, WhitenOptions};
///
/// # fn main() -> ppo_kernels::Result<()> {
/// let x = Tensor::new(&[[1f32, 3.0, f32::NAN], [5.0, f32::NAN, f32::NAN]], &Device::Cpu)?;
/// let mask = Tensor::new(&[[1u8, 1, 0], [1, 0, 0]], &Device::Cpu)?;
/// let y = masked_whiten(&x, Some(&mask), &WhitenOptions::default())?;
/// assert_eq!(y.to_vec2::<f32>()?, [[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]);
/// # Ok(())
/// # }
/// ```
pub fn masked_whiten(x: &Tensor, mask: Option<&Tensor>, options: &WhitenOptions) -> Result<Tensor> {
    options.validate()?;
    let moments = masked_moments(x, mask)?;
    let counted = if mask.is_some() { "mask" } else { "x" };
    whiten(x, mask, &moments, counted, options, backward)
}

/// Whitens `x` (f32, any shape) with the given moments, those that [`gae`](crate::gae::gae) made or
/// those of all shards, which are constants to the gradient. `mask` is u8 of the same shape; masked
/// elements come out as 0.
///
/// # Errors
/// As [`masked_whiten`]; it is the moments that must be of enough elements.
pub fn masked_whiten_with(
    x: &Tensor,
    mask: Option<&Tensor>,
    moments: &MomentsTensor,
    options: &WhitenOptions,
) -> Result<Tensor> {
    options.validate()?;
    check_dtype(OP, "x", x, &[DType::F32])?;
    whiten(x, mask, moments, "moments", options, with_backward)
}

/// The gradient of a whitening of these inputs, from the upstream one.
type Gradient = fn(&Inputs<Owned>, &Tensor, &WhitenOptions) -> Result<Tensor>;

/// Whitens with given moments; `counted` is the argument that has too few elements if they are of too
/// few.
fn whiten(
    x: &Tensor,
    mask: Option<&Tensor>,
    moments: &MomentsTensor,
    counted: &'static str,
    options: &WhitenOptions,
    gradient: Gradient,
) -> Result<Tensor> {
    let (dims, elements) = (x.dims(), x.elem_count());
    let backend = Backend::of(OP, "x", x.device())?;
    let inputs = Inputs::<Tensors> { x, mask, moments: Some(moments.tensor()) };
    let tensors = inputs.try_map(dims, &mut Constants::new(OP, x.device()))?;
    let mut buffers = Outputs::<Owned> { y: backend.buffer(elements)? };
    run!(
        (OP, backend),
        [tensors, dims],
        [buffers, dims],
        |i, o| {
            for moments in i.moments.into_iter().flatten() {
                options.divisor(counted, moments)?;
            }
            cpu::masked_whiten(i, elements, options, o)
        },
        |stream| cuda::masked_whiten(stream, i, None, elements, options, o),
    );
    let (Inputs { x: constant, mask, moments }, options) = (tensors, *options);
    node("ppo-whiten", &[x], buffers.y, dims, move |_, grad_y| {
        let (x, mask, moments) = (constant.clone(), mask.clone(), moments.clone());
        Ok(vec![Some(gradient(&Inputs { x, mask, moments }, grad_y, &options)?)])
    })
}

/// The gradient with moments that are x's own.
fn backward(inputs: &Inputs<Owned>, grad_y: &Tensor, options: &WhitenOptions) -> Result<Tensor> {
    let (dims, elements) = (grad_y.dims(), grad_y.elem_count());
    let backend = Backend::of(OP, "grad_y", grad_y.device())?;
    let Inputs { x, mask, moments } = inputs.clone();
    let tensors = OwnBackwardInputs::<Owned> { x, mask, moments, grad_y: grad_y.clone() };
    let mut buffers = GradOutputs::<Owned> { grad_x: backend.buffer(elements)? };
    run!(
        (OP, backend),
        [tensors, dims],
        [buffers, dims],
        |i, o| cpu::masked_whiten_backward(i, elements, options, o),
        |stream, w = [cuda::workspace_len(elements)]| {
            cuda::masked_whiten_backward(stream, i, None, elements, options, o, w)
        },
    );
    Ok(buffers.grad_x.into_tensor(dims))
}

/// The gradient with moments that are constants.
fn with_backward(
    inputs: &Inputs<Owned>,
    grad_y: &Tensor,
    options: &WhitenOptions,
) -> Result<Tensor> {
    let (dims, elements) = (grad_y.dims(), grad_y.elem_count());
    let backend = Backend::of(OP, "grad_y", grad_y.device())?;
    let Inputs { mask, moments, .. } = inputs.clone();
    let tensors = WithBackwardInputs::<Owned> { mask, moments, grad_y: grad_y.clone() };
    let mut buffers = GradOutputs::<Owned> { grad_x: backend.buffer(elements)? };
    run!(
        (OP, backend),
        [tensors, dims],
        [buffers, dims],
        |i, o| cpu::masked_whiten_with_backward(i, elements, options, o),
        |stream| cuda::masked_whiten_with_backward(stream, i, None, elements, options, o),
    );
    Ok(buffers.grad_x.into_tensor(dims))
}
