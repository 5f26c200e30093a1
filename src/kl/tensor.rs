//! The candle functions.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Shape, Tensor, WithDType};
use half::{bf16, f16};

use super::cpu::{self, FullInputs, TokenInputs, STATS};
use super::{FullKlOptions, KlOptions, FULL_OP, TOKEN_OP};
use crate::cpu::Logit;
use crate::error::{Error, Result};
use crate::tensor::{
    check_arg, check_dtype, constant, no_kernels, optional_arg, optional_view, slice, view,
};

/// The sampled KL of every token: f32, of the shape of `logp`.
///
/// `logp` and `ref_logp` are f32 of any one shape, and both take a gradient; `mask` is u8 of that
/// shape, where 0 makes the result and the gradient 0. See [the module](super) for the formulas.
///
/// # Errors
/// If a shape, dtype or device does not fit, or a clamp is not positive.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ppo_kernels::kl::{token_kl, KlEstimator, KlOptions};
///
/// # fn main() -> ppo_kernels::Result<()> {
/// let logp = Tensor::new(&[-1f32, -2.0], &Device::Cpu)?;
/// let ref_logp = Tensor::new(&[-1.5f32, -2.0], &Device::Cpu)?;
/// let options = KlOptions { estimator: KlEstimator::K2, ..KlOptions::default() };
/// let kl = token_kl(&logp, &ref_logp, None, &options)?;
/// assert_eq!(kl.to_vec1::<f32>()?, [0.125, 0.0]);
/// # Ok(())
/// # }
/// ```
pub fn token_kl(
    logp: &Tensor,
    ref_logp: &Tensor,
    mask: Option<&Tensor>,
    options: &KlOptions,
) -> Result<Tensor> {
    options.validate(TOKEN_OP)?;
    check_dtype(TOKEN_OP, "logp", logp, &[DType::F32])?;
    let (shape, device) = (logp.dims(), logp.device());
    check_arg(TOKEN_OP, "ref_logp", ref_logp, shape, &[DType::F32], device)?;
    let mask = optional_arg(TOKEN_OP, "mask", mask, shape, DType::U8, device)?;
    if !device.is_cpu() {
        return Err(no_kernels(TOKEN_OP, "logp", device));
    }
    let op = TokenKl { mask, options: *options };
    Ok(logp.contiguous()?.apply_op2(&ref_logp.contiguous()?, op)?)
}

/// The exact KL of every row over the vocabulary: f32 `[..]`.
///
/// `logits` and `ref_logits` are `[.., V]`, both f32, f16 or bf16, and both take a gradient in that
/// dtype; `mask` is u8 `[..]`, where 0 makes the result and the gradient 0 and the row is not read.
/// See [the module](super) for the formulas and special values.
///
/// # Errors
/// If a shape, dtype or device does not fit, V is 0, or the temperature is out of range.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use ppo_kernels::kl::{full_kl, FullKlOptions};
///
/// # fn main() -> ppo_kernels::Result<()> {
/// let logits = Tensor::new(&[[0f32, 0.0], [1.0, 2.0]], &Device::Cpu)?;
/// let ref_logits = Tensor::new(&[[3f32.ln(), 0.0], [1.0, 2.0]], &Device::Cpu)?;
/// let kl = full_kl(&logits, &ref_logits, None, &FullKlOptions::default())?.to_vec1::<f32>()?;
/// assert!((kl[0] - 0.5 * (4f32 / 3.0).ln()).abs() < 1e-6);
/// assert_eq!(kl[1], 0.0);
/// # Ok(())
/// # }
/// ```
pub fn full_kl(
    logits: &Tensor,
    ref_logits: &Tensor,
    mask: Option<&Tensor>,
    options: &FullKlOptions,
) -> Result<Tensor> {
    options.validate(FULL_OP)?;
    check_dtype(FULL_OP, "logits", logits, &[DType::F32, DType::F16, DType::BF16])?;
    let (shape, device) = (logits.dims(), logits.device());
    let Some((_, leading)) = shape.split_last().filter(|(&v, _)| v > 0) else {
        return Err(Error::Shape {
            op: FULL_OP,
            arg: "logits",
            expected: "[.., V] with V > 0".into(),
            got: format!("{shape:?}"),
        });
    };
    check_arg(FULL_OP, "ref_logits", ref_logits, shape, &[logits.dtype()], device)?;
    let mask = optional_arg(FULL_OP, "mask", mask, leading, DType::U8, device)?;
    if !device.is_cpu() {
        return Err(no_kernels(FULL_OP, "logits", device));
    }
    let op = FullKl { mask, options: *options };
    // In their own shape: of a reshape candle would make a pass of its own over the gradient.
    let stats = logits.contiguous()?.apply_op2(&ref_logits.contiguous()?, op)?;
    Ok(stats.get(0)?.reshape(leading)?)
}

/// logp and ref_logp to the KL, all of one shape.
struct TokenKl {
    mask: Option<Tensor>,
    options: KlOptions,
}

impl CustomOp2 for TokenKl {
    fn name(&self) -> &'static str {
        "ppo-token-kl"
    }

    fn cpu_fwd(
        &self,
        logp: &CpuStorage,
        l1: &Layout,
        ref_logp: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let mask = optional_view(TOKEN_OP, "mask", &self.mask)?;
        let (logp, ref_logp) = (slice::<f32>(logp, l1)?, slice::<f32>(ref_logp, l2)?);
        let mut kl = vec![0.0; logp.len()];
        let inputs = TokenInputs { logp, ref_logp, mask: mask.as_deref() };
        cpu::token_forward(inputs, &self.options, &mut kl)?;
        Ok((CpuStorage::F32(kl), l1.shape().clone()))
    }

    fn bwd(
        &self,
        logp: &Tensor,
        ref_logp: &Tensor,
        _kl: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let mask = optional_view(TOKEN_OP, "mask", &self.mask)?;
        let a = view::<f32>(TOKEN_OP, "logp", logp)?;
        let b = view::<f32>(TOKEN_OP, "ref_logp", ref_logp)?;
        let inputs = TokenInputs { logp: &a, ref_logp: &b, mask: mask.as_deref() };
        let mut grad_logp = gradient_of::<f32>(logp);
        let mut grad_ref_logp = gradient_of::<f32>(ref_logp);
        cpu::token_backward(
            inputs,
            &self.options,
            &view::<f32>(TOKEN_OP, "grad_kl", &grad)?,
            grad_logp.as_deref_mut(),
            grad_ref_logp.as_deref_mut(),
        )?;
        let tensor = |grad: Vec<f32>| constant(grad, logp.shape());
        Ok((grad_logp.map(tensor), grad_ref_logp.map(tensor)))
    }
}

/// Logits and reference logits `[.., V]` of N rows to `[STATS, N]`, of which the caller sees the first row:
/// candle gives an op one output, and backward needs the rest.
struct FullKl {
    mask: Option<Tensor>,
    options: FullKlOptions,
}

impl CustomOp2 for FullKl {
    fn name(&self) -> &'static str {
        "ppo-full-kl"
    }

    fn cpu_fwd(
        &self,
        logits: &CpuStorage,
        l1: &Layout,
        ref_logits: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let stats = match logits {
            CpuStorage::F32(_) => self.forward::<f32>(logits, l1, ref_logits, l2),
            CpuStorage::F16(_) => self.forward::<f16>(logits, l1, ref_logits, l2),
            CpuStorage::BF16(_) => self.forward::<bf16>(logits, l1, ref_logits, l2),
            _ => unreachable!("checked by full_kl"),
        }?;
        let rows = stats.len() / STATS;
        Ok((CpuStorage::F32(stats), Shape::from((STATS, rows))))
    }

    fn bwd(
        &self,
        logits: &Tensor,
        ref_logits: &Tensor,
        stats: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let grad_kl = grad.get(0)?.contiguous()?;
        let grads = match logits.dtype() {
            DType::F32 => self.backward::<f32>(logits, ref_logits, stats, &grad_kl),
            DType::F16 => self.backward::<f16>(logits, ref_logits, stats, &grad_kl),
            DType::BF16 => self.backward::<bf16>(logits, ref_logits, stats, &grad_kl),
            _ => unreachable!("checked by full_kl"),
        }?;
        Ok(grads)
    }
}

impl FullKl {
    fn forward<T: Logit + WithDType>(
        &self,
        logits: &CpuStorage,
        l1: &Layout,
        ref_logits: &CpuStorage,
        l2: &Layout,
    ) -> Result<Vec<f32>> {
        let mask = optional_view(FULL_OP, "mask", &self.mask)?;
        let vocab = vocab(l1.dims());
        let rows = l1.shape().elem_count() / vocab;
        let inputs = FullInputs {
            logits: slice::<T>(logits, l1)?,
            ref_logits: slice::<T>(ref_logits, l2)?,
            vocab,
            mask: mask.as_deref(),
        };
        let mut stats = vec![0.0; STATS * rows];
        cpu::full_forward(inputs, &self.options, &mut stats)?;
        Ok(stats)
    }

    fn backward<T: Logit + WithDType>(
        &self,
        logits: &Tensor,
        ref_logits: &Tensor,
        stats: &Tensor,
        grad_kl: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mask = optional_view(FULL_OP, "mask", &self.mask)?;
        let z = view::<T>(FULL_OP, "logits", logits)?;
        let w = view::<T>(FULL_OP, "ref_logits", ref_logits)?;
        let vocab = vocab(logits.dims());
        let inputs = FullInputs { logits: &z, ref_logits: &w, vocab, mask: mask.as_deref() };
        let mut grad_logits = gradient_of::<T>(logits);
        let mut grad_ref_logits = gradient_of::<T>(ref_logits);
        cpu::full_backward(
            inputs,
            &self.options,
            &view::<f32>(FULL_OP, "stats", stats)?,
            &view::<f32>(FULL_OP, "grad_kl", grad_kl)?,
            grad_logits.as_deref_mut(),
            grad_ref_logits.as_deref_mut(),
        )?;
        let tensor = |grad: Vec<T>| constant(grad, logits.shape());
        Ok((grad_logits.map(tensor), grad_ref_logits.map(tensor)))
    }
}

/// Room for the gradient of an argument, if it takes one.
fn gradient_of<T: Logit>(argument: &Tensor) -> Option<Vec<T>> {
    argument.track_op().then(|| T::zeros(argument.elem_count()))
}

/// The columns of a row.
fn vocab(dims: &[usize]) -> usize {
    *dims.last().expect("checked by full_kl")
}
