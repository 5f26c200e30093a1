//! The candle functions.

use candle_core::{DType, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;
use super::{
    cpu, FullBackwardInputs, FullBackwardOutputs, FullForwardInputs, FullForwardOutputs,
    FullKlOptions, KlOptions, TokenBackwardInputs, TokenBackwardOutputs, TokenForwardInputs,
    TokenForwardOutputs, FULL_OP, KL, STATS, TOKEN_OP,
};
use crate::cpu::Logit;
use crate::error::Result;
use crate::memory::{Element, Tensors};
use crate::tensor::{
    check_dtype, leading_and_vocab, node, row, run, with_logits, Backend, Buffer, Constants, Owned,
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
    let inputs = TokenForwardInputs::<Tensors> { logp, ref_logp, mask };
    let constants = inputs.try_map(logp.dims(), &mut Constants::new(TOKEN_OP, logp.device()))?;
    let TokenForwardInputs { logp: a, ref_logp: b, mask } = constants;
    let inputs = TokenForwardInputs::<Owned> { logp: a, ref_logp: b, mask };

    let tokens = logp.elem_count();
    let backend = Backend::of(TOKEN_OP, "logp", logp.device())?;
    let mut buffers = TokenForwardOutputs::<Owned> { kl: backend.buffer(tokens)? };
    run!(
        (TOKEN_OP, backend),
        [inputs, &[tokens]],
        [buffers, &[tokens]],
        |i, o| cpu::token_forward(i, tokens, options, o),
        |stream| cuda::token_forward(stream, i, tokens, options, o),
    );
    let (options, wanted) = (*options, [logp.track_op(), ref_logp.track_op()]);
    node("ppo-token-kl", &[logp, ref_logp], buffers.kl, logp.shape(), move |_, grad| {
        let inputs = TokenBackwardInputs { forward: inputs.clone(), grad_kl: grad.clone() };
        token_backward(&inputs, &options, wanted)
    })
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
    let (leading, vocab) = leading_and_vocab(FULL_OP, "logits", logits)?;
    let inputs = [logits, ref_logits];
    let stats = with_logits!(logits, T => full_stats::<T>(inputs, mask, leading, vocab, options))?;
    Ok(row(&stats, KL)?.reshape(leading)?)
}

/// The gradients of logp and ref_logp, where wanted.
fn token_backward(
    inputs: &TokenBackwardInputs<Owned>,
    options: &KlOptions,
    wanted: [bool; 2],
) -> Result<Vec<Option<Tensor>>> {
    let logp = &inputs.forward.logp;
    let tokens = logp.elem_count();
    let backend = Backend::of(TOKEN_OP, "logp", logp.device())?;
    let mut buffers = TokenBackwardOutputs::<Owned> {
        grad_logp: backend.optional_buffer(wanted[0], tokens)?,
        grad_ref_logp: backend.optional_buffer(wanted[1], tokens)?,
    };
    run!(
        (TOKEN_OP, backend),
        [inputs, &[tokens]],
        [buffers, &[tokens]],
        |i, o| cpu::token_backward(i, tokens, options, o),
        |stream| cuda::token_backward(stream, i, tokens, options, o),
    );
    let TokenBackwardOutputs { grad_logp, grad_ref_logp } = buffers;
    Ok(tensors([grad_logp, grad_ref_logp], logp))
}

/// `[STATS, N]` as a function of the logits and the reference's, of which the caller sees the first
/// row: a node has one output, and its backward needs the rest.
fn full_stats<T: Logit>(
    [logits, ref_logits]: [&Tensor; 2],
    mask: Option<&Tensor>,
    leading: &[usize],
    vocab: usize,
    options: &FullKlOptions,
) -> Result<Tensor> {
    let inputs = FullForwardInputs::<Tensors, T> { logits, ref_logits, mask };
    let device = logits.device();
    let constants = inputs.try_map((leading, vocab), &mut Constants::new(FULL_OP, device))?;
    let FullForwardInputs { logits: z, ref_logits: w, mask } = constants;
    let inputs = FullForwardInputs::<Owned, T> { logits: z, ref_logits: w, mask };

    let rows = logits.elem_count() / vocab;
    let backend = Backend::of(FULL_OP, "logits", device)?;
    let mut buffers = FullForwardOutputs::<Owned> { stats: backend.buffer(STATS * rows)? };
    run!(
        (FULL_OP, backend),
        [inputs, (&[rows], vocab)],
        [buffers, &[rows]],
        |i, o| cpu::full_forward(i, rows, vocab, options, o),
        |stream| cuda::full_forward(stream, i, rows, vocab, options, o),
    );
    let (options, wanted) = (*options, [logits.track_op(), ref_logits.track_op()]);
    let (args, stats) = ([logits, ref_logits], buffers.stats);
    node("ppo-full-kl", &args, stats, (STATS, rows), move |stats, grad| {
        let (forward, stats, grad_kl) = (inputs.clone(), stats.clone(), row(grad, KL)?);
        full_backward(&FullBackwardInputs { forward, stats, grad_kl }, vocab, &options, wanted)
    })
}

/// The gradients of logits and ref_logits, where wanted.
fn full_backward<T: Logit>(
    inputs: &FullBackwardInputs<Owned, T>,
    vocab: usize,
    options: &FullKlOptions,
    wanted: [bool; 2],
) -> Result<Vec<Option<Tensor>>> {
    let logits = &inputs.forward.logits;
    let (elements, rows) = (logits.elem_count(), logits.elem_count() / vocab);
    let backend = Backend::of(FULL_OP, "logits", logits.device())?;
    let mut buffers = FullBackwardOutputs::<Owned, T> {
        grad_logits: backend.optional_buffer(wanted[0], elements)?,
        grad_ref_logits: backend.optional_buffer(wanted[1], elements)?,
    };
    run!(
        (FULL_OP, backend),
        [inputs, (&[rows], vocab)],
        [buffers, (&[rows], vocab)],
        |i, o| cpu::full_backward(i, rows, vocab, options, o),
        |stream| cuda::full_backward(stream, i, rows, vocab, options, o),
    );
    let FullBackwardOutputs { grad_logits, grad_ref_logits } = buffers;
    Ok(tensors([grad_logits, grad_ref_logits], logits))
}

/// Gradients in the shape of the argument that both arguments have.
fn tensors<T: Element>(grads: [Option<Buffer<T>>; 2], like: &Tensor) -> Vec<Option<Tensor>> {
    grads.map(|grad| grad.map(|grad| grad.into_tensor(like.shape()))).into()
}
