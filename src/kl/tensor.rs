//! The candle functions.

use candle_core::{DType, Tensor};
use half::{bf16, f16};

use super::cpu::{self, STATS};
#[cfg(feature = "cuda")]
use super::cuda;
use super::{FullKlOptions, KlOptions, FULL_OP, TOKEN_OP};
use crate::cpu::Logit;
use crate::error::{Error, Result};
#[cfg(feature = "cuda")]
use crate::tensor::cuda_buffers;
use crate::tensor::{
    buffers, check_arg, check_dtype, cpu_buffers, node, optional_arg, optional_view, view, Backend,
    Buffer, View,
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
    TokenKl { mask, options: *options }.apply(&logp.contiguous()?, &ref_logp.contiguous()?)
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
    let Some((&vocab, leading)) = shape.split_last().filter(|(&v, _)| v > 0) else {
        return Err(Error::Shape {
            op: FULL_OP,
            arg: "logits",
            expected: "[.., V] with V > 0".into(),
            got: format!("{shape:?}"),
        });
    };
    check_arg(FULL_OP, "ref_logits", ref_logits, shape, &[logits.dtype()], device)?;
    let mask = optional_arg(FULL_OP, "mask", mask, leading, DType::U8, device)?;
    // In their own shape: of a reshape candle would make a pass of its own over the gradient.
    let (logits, ref_logits) = (logits.contiguous()?, ref_logits.contiguous()?);
    let pass = FullKl { mask, vocab, options: *options };
    let stats = match logits.dtype() {
        DType::F32 => pass.apply::<f32>(&logits, &ref_logits),
        DType::F16 => pass.apply::<f16>(&logits, &ref_logits),
        _ => pass.apply::<bf16>(&logits, &ref_logits),
    }?;
    Ok(stats.get(0)?.reshape(leading)?)
}

/// What both passes over logp and ref_logp, of one shape, need to know.
struct TokenKl {
    mask: Option<Tensor>,
    options: KlOptions,
}

impl TokenKl {
    fn apply(self, logp: &Tensor, ref_logp: &Tensor) -> Result<Tensor> {
        let kl = self.forward(logp, ref_logp)?;
        let wanted = [logp.track_op(), ref_logp.track_op()];
        let (a, b) = (logp.detach(), ref_logp.detach());
        node("ppo-token-kl", &[logp, ref_logp], kl, logp.shape(), move |_, grad| {
            self.backward(&a, &b, grad, wanted)
        })
    }

    fn forward(&self, logp: &Tensor, ref_logp: &Tensor) -> Result<Buffer<f32>> {
        let backend = Backend::of(TOKEN_OP, "logp", logp.device())?;
        let mut kl = backend.buffer(logp.elem_count())?;
        let logp = view::<f32>(TOKEN_OP, "logp", logp)?;
        let ref_logp = view::<f32>(TOKEN_OP, "ref_logp", ref_logp)?;
        let mask = optional_view::<u8>(TOKEN_OP, "mask", &self.mask)?;
        match &backend {
            Backend::Cpu => {
                let (logp, ref_logp) = (logp.cpu(), ref_logp.cpu());
                let inputs =
                    cpu::TokenInputs { logp, ref_logp, mask: mask.as_ref().map(View::cpu) };
                cpu::token_forward(inputs, &self.options, kl.cpu())?;
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(backend) => {
                let (logp, ref_logp) = (logp.cuda(), ref_logp.cuda());
                let mask = mask.as_ref().map(View::cuda);
                let inputs = cuda::TokenInputs { logp, ref_logp, mask };
                cuda::token_forward(&backend.stream()?, inputs, &self.options, kl.cuda())?;
            }
        }
        Ok(kl)
    }

    /// The gradients of logp and ref_logp, where wanted.
    fn backward(
        &self,
        logp: &Tensor,
        ref_logp: &Tensor,
        grad: &Tensor,
        wanted: [bool; 2],
    ) -> Result<Vec<Option<Tensor>>> {
        let shape = logp.shape();
        let backend = Backend::of(TOKEN_OP, "logp", logp.device())?;
        let mut grads = buffers::<f32, 2>(&backend, wanted, shape.elem_count())?;
        let logp = view::<f32>(TOKEN_OP, "logp", logp)?;
        let ref_logp = view::<f32>(TOKEN_OP, "ref_logp", ref_logp)?;
        let mask = optional_view::<u8>(TOKEN_OP, "mask", &self.mask)?;
        let grad = view::<f32>(TOKEN_OP, "grad_kl", grad)?;
        match &backend {
            Backend::Cpu => {
                let (logp, ref_logp) = (logp.cpu(), ref_logp.cpu());
                let inputs =
                    cpu::TokenInputs { logp, ref_logp, mask: mask.as_ref().map(View::cpu) };
                let [a, b] = cpu_buffers(&mut grads);
                cpu::token_backward(inputs, &self.options, grad.cpu(), a, b)?;
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(backend) => {
                let (logp, ref_logp) = (logp.cuda(), ref_logp.cuda());
                let mask = mask.as_ref().map(View::cuda);
                let inputs = cuda::TokenInputs { logp, ref_logp, mask };
                let ([a, b], stream) = (cuda_buffers(&mut grads), backend.stream()?);
                cuda::token_backward(&stream, inputs, &self.options, grad.cuda(), a, b)?;
            }
        }
        Ok(grads.map(|grad| grad.map(|grad| grad.into_tensor(shape))).into())
    }
}

/// What both passes over logits and reference logits, `[.., V]` of N rows each, need to know. The
/// node's output is `[STATS, N]`, of which the caller sees the first row: it is one output, and
/// backward needs the rest.
struct FullKl {
    mask: Option<Tensor>,
    vocab: usize,
    options: FullKlOptions,
}

impl FullKl {
    fn apply<T: Logit + crate::memory::Element>(
        self,
        logits: &Tensor,
        ref_logits: &Tensor,
    ) -> Result<Tensor> {
        let stats = self.forward::<T>(logits, ref_logits)?;
        let wanted = [logits.track_op(), ref_logits.track_op()];
        let shape = (STATS, logits.elem_count() / self.vocab);
        let (z, w) = (logits.detach(), ref_logits.detach());
        node("ppo-full-kl", &[logits, ref_logits], stats, shape, move |stats, grad| {
            self.backward::<T>(&z, &w, stats, &grad.get(0)?, wanted)
        })
    }

    fn forward<T: Logit + crate::memory::Element>(
        &self,
        logits: &Tensor,
        ref_logits: &Tensor,
    ) -> Result<Buffer<f32>> {
        let (rows, vocab) = (logits.elem_count() / self.vocab, self.vocab);
        let backend = Backend::of(FULL_OP, "logits", logits.device())?;
        let mut stats = backend.buffer(STATS * rows)?;
        let z = view::<T>(FULL_OP, "logits", logits)?;
        let w = view::<T>(FULL_OP, "ref_logits", ref_logits)?;
        let mask = optional_view::<u8>(FULL_OP, "mask", &self.mask)?;
        match &backend {
            Backend::Cpu => {
                let (logits, ref_logits) = (z.cpu(), w.cpu());
                let mask = mask.as_ref().map(View::cpu);
                let inputs = cpu::FullInputs { logits, ref_logits, vocab, mask };
                cpu::full_forward(inputs, &self.options, stats.cpu())?;
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(backend) => {
                let stream = backend.stream()?;
                let (logits, ref_logits) = (z.cuda(), w.cuda());
                let mask = mask.as_ref().map(View::cuda);
                let inputs = cuda::FullInputs { logits, ref_logits, vocab, mask };
                let len = cuda::full_workspace_len::<T>(stream.device(), rows, vocab);
                let mut workspace = backend.buffer(len)?;
                let (stats, workspace) = (stats.cuda(), workspace.slice());
                cuda::full_forward(&stream, inputs, &self.options, stats, workspace)?;
            }
        }
        Ok(stats)
    }

    /// The gradients of logits and ref_logits, where wanted.
    fn backward<T: Logit + crate::memory::Element>(
        &self,
        logits: &Tensor,
        ref_logits: &Tensor,
        stats: &Tensor,
        grad_kl: &Tensor,
        wanted: [bool; 2],
    ) -> Result<Vec<Option<Tensor>>> {
        let (shape, vocab) = (logits.shape(), self.vocab);
        let backend = Backend::of(FULL_OP, "logits", logits.device())?;
        let mut grads = buffers::<T, 2>(&backend, wanted, shape.elem_count())?;
        let z = view::<T>(FULL_OP, "logits", logits)?;
        let w = view::<T>(FULL_OP, "ref_logits", ref_logits)?;
        let mask = optional_view::<u8>(FULL_OP, "mask", &self.mask)?;
        let stats = view::<f32>(FULL_OP, "stats", stats)?;
        let grad_kl = view::<f32>(FULL_OP, "grad_kl", grad_kl)?;
        match &backend {
            Backend::Cpu => {
                let (logits, ref_logits) = (z.cpu(), w.cpu());
                let mask = mask.as_ref().map(View::cpu);
                let inputs = cpu::FullInputs { logits, ref_logits, vocab, mask };
                let [grad_logits, grad_ref_logits] = cpu_buffers(&mut grads);
                cpu::full_backward(
                    inputs,
                    &self.options,
                    stats.cpu(),
                    grad_kl.cpu(),
                    grad_logits,
                    grad_ref_logits,
                )?;
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(backend) => {
                let (logits, ref_logits) = (z.cuda(), w.cuda());
                let mask = mask.as_ref().map(View::cuda);
                let inputs = cuda::FullInputs { logits, ref_logits, vocab, mask };
                let [grad_logits, grad_ref_logits] = cuda_buffers(&mut grads);
                cuda::full_backward(
                    &backend.stream()?,
                    inputs,
                    &self.options,
                    stats.cuda(),
                    grad_kl.cuda(),
                    grad_logits,
                    grad_ref_logits,
                )?;
            }
        }
        Ok(grads.map(|grad| grad.map(|grad| grad.into_tensor(shape))).into())
    }
}
