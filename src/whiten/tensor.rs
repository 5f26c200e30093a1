//! Whitening of candle tensors.

use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{cpu, WhitenOptions, OP};
use crate::error::Result;
use crate::moments::{Moments, MomentsTensor};
use crate::tensor::{
    check_device, check_dtype, node, optional_arg, optional_view, view, Backend, Buffer, View,
};

/// Count, mean and sum of squared deviations of the unmasked elements of `x` (f32, any shape).
/// `mask` is u8 of the same shape; without it every element counts.
///
/// # Errors
/// If a shape, dtype or device does not fit.
pub fn masked_moments(x: &Tensor, mask: Option<&Tensor>) -> Result<MomentsTensor> {
    let (x, mask) = arguments(x, mask)?;
    moments(&x, &mask)
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
    let (x, mask) = arguments(x, mask)?;
    let moments = moments(&x, &mask)?;
    let counted = if mask.is_some() { "mask" } else { "x" };
    Pass { mask, moments, own: true, counted, options: *options }.apply(&x)
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
    let (x, mask) = arguments(x, mask)?;
    check_device(OP, "moments", moments.tensor(), x.device())?;
    let moments = moments.clone();
    Pass { mask, moments, own: false, counted: "moments", options: *options }.apply(&x)
}

fn arguments(x: &Tensor, mask: Option<&Tensor>) -> Result<(Tensor, Option<Tensor>)> {
    check_dtype(OP, "x", x, &[DType::F32])?;
    let mask = optional_arg(OP, "mask", mask, x.dims(), DType::U8, x.device())?;
    Ok((x.contiguous()?, mask))
}

fn moments(x: &Tensor, mask: &Option<Tensor>) -> Result<MomentsTensor> {
    let backend = Backend::of(OP, "x", x.device())?;
    let x = view::<f32>(OP, "x", x)?;
    let mask = optional_view::<u8>(OP, "mask", mask)?;
    let mut moments = backend.buffer::<Moments>(1)?;
    match &backend {
        Backend::Cpu => {
            let mask = mask.as_ref().map(View::cpu);
            moments.cpu()[0] = cpu::masked_moments(x.cpu(), mask)?;
        }
        #[cfg(feature = "cuda")]
        Backend::Cuda(backend) => {
            let (stream, x, mask) = (backend.stream()?, x.cuda(), mask.as_ref().map(View::cuda));
            let mut workspace = backend.buffer(cuda::workspace_len(x.len()))?;
            cuda::masked_moments(&stream, x, mask, moments.cuda(), workspace.slice())?;
        }
    }
    Ok(MomentsTensor::from_buffer(moments))
}

/// What whitening and its backward need to know.
struct Pass {
    mask: Option<Tensor>,
    moments: MomentsTensor,
    /// Whether the moments are x's own, and so take part in the gradient.
    own: bool,
    /// The argument that has too few elements if there are too few.
    counted: &'static str,
    options: WhitenOptions,
}

impl Pass {
    fn apply(self, x: &Tensor) -> Result<Tensor> {
        let (out, constant) = (self.forward(x)?, x.detach());
        node("ppo-whiten", &[x], out, x.shape(), move |_, grad| {
            Ok(vec![Some(self.backward(&constant, grad)?)])
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Buffer<f32>> {
        let backend = Backend::of(OP, "x", x.device())?;
        let mut out = backend.buffer::<f32>(x.elem_count())?;
        let x = view::<f32>(OP, "x", x)?;
        let mask = optional_view::<u8>(OP, "mask", &self.mask)?;
        let moments = view::<Moments>(OP, "moments", self.moments.tensor())?;
        match &backend {
            Backend::Cpu => {
                let moments = moments.cpu()[0];
                self.options.divisor(self.counted, &moments)?;
                let mask = mask.as_ref().map(View::cpu);
                cpu::masked_whiten(x.cpu(), mask, &moments, &self.options, out.cpu())?;
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(backend) => {
                let (stream, mask) = (backend.stream()?, mask.as_ref().map(View::cuda));
                let moments = cuda::Given::OnDevice(moments.cuda());
                cuda::masked_whiten(&stream, x.cuda(), mask, moments, &self.options, out.cuda())?;
            }
        }
        Ok(out)
    }

    fn backward(&self, x: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let shape = x.shape();
        let backend = Backend::of(OP, "x", x.device())?;
        let mut out = backend.buffer::<f32>(x.elem_count())?;
        let x = view::<f32>(OP, "x", x)?;
        let mask = optional_view::<u8>(OP, "mask", &self.mask)?;
        let moments = view::<Moments>(OP, "moments", self.moments.tensor())?;
        let grad = view::<f32>(OP, "grad_out", grad)?;
        match &backend {
            Backend::Cpu => {
                let moments = moments.cpu()[0];
                let (mask, grad, out) = (mask.as_ref().map(View::cpu), grad.cpu(), out.cpu());
                if self.own {
                    let x = x.cpu();
                    cpu::masked_whiten_backward(x, mask, &moments, grad, &self.options, out)?;
                } else {
                    cpu::masked_whiten_with_backward(mask, &moments, grad, &self.options, out)?;
                }
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(backend) => {
                let (stream, options) = (backend.stream()?, &self.options);
                let moments = cuda::Given::OnDevice(moments.cuda());
                let (mask, grad, out) = (mask.as_ref().map(View::cuda), grad.cuda(), out.cuda());
                if self.own {
                    let x = x.cuda();
                    let mut room = backend.buffer(cuda::workspace_len(x.len()))?;
                    let workspace = room.slice();
                    cuda::masked_whiten_backward(
                        &stream, x, mask, moments, grad, options, out, workspace,
                    )?;
                } else {
                    cuda::masked_whiten_with_backward(&stream, mask, moments, grad, options, out)?;
                }
            }
        }
        Ok(out.into_tensor(shape))
    }
}
