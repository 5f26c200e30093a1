//! Whitening of candle tensors.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Tensor};

use super::{cpu, Moments, WhitenOptions, OP};
use crate::error::Result;
use crate::tensor::{check_dtype, constant, no_kernels, optional_arg, optional_view, slice, view};

/// Count, mean and sum of squared deviations of the unmasked elements of `x` (f32, any shape).
/// `mask` is u8 of the same shape; without it every element counts.
///
/// # Errors
/// If a shape, dtype or device does not fit.
pub fn masked_moments(x: &Tensor, mask: Option<&Tensor>) -> Result<Moments> {
    let (x, mask) = arguments(x, mask)?;
    moments(&x, &mask)
}

/// Whitens `x` (f32, any shape) over its unmasked elements. `mask` is u8 of the same shape; masked
/// elements come out as 0. The gradient goes through mean and variance.
///
/// # Errors
/// If a shape, dtype or device does not fit, `eps` is out of range, or fewer than two elements (one,
/// if the variance is biased) are unmasked.
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
    options.divisor(if mask.is_some() { "mask" } else { "x" }, &moments)?;
    whiten(&x, mask, moments, true, options)
}

/// Whitens `x` (f32, any shape) with the given moments, those of all shards for instance, which are
/// constants to the gradient. `mask` is u8 of the same shape; masked elements come out as 0.
///
/// # Errors
/// As [`masked_whiten`]; it is the moments that must be of enough elements.
pub fn masked_whiten_with(
    x: &Tensor,
    mask: Option<&Tensor>,
    moments: &Moments,
    options: &WhitenOptions,
) -> Result<Tensor> {
    options.validate()?;
    let (x, mask) = arguments(x, mask)?;
    options.divisor("moments", moments)?;
    whiten(&x, mask, *moments, false, options)
}

fn arguments(x: &Tensor, mask: Option<&Tensor>) -> Result<(Tensor, Option<Tensor>)> {
    check_dtype(OP, "x", x, &[DType::F32])?;
    if !x.device().is_cpu() {
        return Err(no_kernels(OP, "x", x.device()));
    }
    let mask = optional_arg(OP, "mask", mask, x.dims(), DType::U8, x.device())?;
    Ok((x.contiguous()?, mask))
}

fn moments(x: &Tensor, mask: &Option<Tensor>) -> Result<Moments> {
    let x = view::<f32>(OP, "x", x)?;
    let mask = optional_view(OP, "mask", mask)?;
    cpu::masked_moments(&x, mask.as_deref())
}

fn whiten(
    x: &Tensor,
    mask: Option<Tensor>,
    moments: Moments,
    through_moments: bool,
    options: &WhitenOptions,
) -> Result<Tensor> {
    let op = Whiten { mask, moments, through_moments, options: *options };
    Ok(x.apply_op1(op)?)
}

struct Whiten {
    mask: Option<Tensor>,
    moments: Moments,
    /// Whether the moments are x's own, and so take part in the gradient.
    through_moments: bool,
    options: WhitenOptions,
}

impl CustomOp1 for Whiten {
    fn name(&self) -> &'static str {
        "ppo-whiten"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = slice::<f32>(storage, layout)?;
        let mask = optional_view(OP, "mask", &self.mask)?;
        let mut out = vec![0.0; x.len()];
        cpu::masked_whiten(x, mask.as_deref(), &self.moments, &self.options, &mut out)?;
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        _out: &Tensor,
        grad_out: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        let grad_out = grad_out.contiguous()?;
        let grad = view::<f32>(OP, "grad_out", &grad_out)?;
        let mask = optional_view(OP, "mask", &self.mask)?;
        let mask = mask.as_deref();
        let mut grad_x = vec![0.0; grad.len()];
        let (moments, options) = (&self.moments, &self.options);
        if self.through_moments {
            let x = view::<f32>(OP, "x", x)?;
            cpu::masked_whiten_backward(&x, mask, moments, &grad, options, &mut grad_x)?;
        } else {
            cpu::masked_whiten_with_backward(mask, moments, &grad, options, &mut grad_x)?;
        }
        Ok(Some(constant(grad_x, x.shape())))
    }
}
