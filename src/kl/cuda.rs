//! Launches of `kernels/kl.cu` on device memory and the caller's stream. Nothing is allocated and
//! nothing waits for the device.
//!
//! Refuses what [`cpu`](super::cpu) refuses. A vocabulary may have up to 2^32 - 1 columns.

use super::{limit, FullKlOptions, KlEstimator, KlOptions, FULL_OP, TOKEN_OP};
use crate::cpu::Logit;
use crate::cuda::rows::{check_logits, launch_over_tokens, Map, Passes, Reduction};
use crate::cuda::{Args, Kernel, Stream};
use crate::error::Result;
use crate::memory::{in_space, Element, Lengths, Pointers, Space};

/// The name of the kernels' file.
const FILE: &str = "kl";

/// Parts of a long row, as in the kernels.
const MOST_PARTS: i32 = 2;

in_space!(
    Device:
    TokenForwardInputs, TokenForwardOutputs, TokenBackwardInputs, TokenBackwardOutputs,
    FullForwardInputs<T>, FullForwardOutputs, FullBackwardInputs<T>, FullBackwardOutputs<T>
);

/// Sampled KL of every one of `tokens` tokens.
///
/// # Errors
/// If a length does not fit, an option is out of range, or a kernel cannot be launched.
pub fn token_forward(
    stream: &Stream,
    inputs: TokenForwardInputs,
    tokens: usize,
    options: &KlOptions,
    mut outputs: TokenForwardOutputs,
) -> Result<()> {
    options.validate(TOKEN_OP)?;
    let inputs = inputs.try_map(&[tokens], &mut Lengths(TOKEN_OP))?;
    let outputs = outputs.try_map(&[tokens], &mut Lengths(TOKEN_OP))?;
    if tokens == 0 {
        return Ok(());
    }
    let options = TokenKl::new(options);
    let args = TokenForwardArgs { inputs, outputs, tokens: tokens as i64, options };
    launch_over_tokens(stream, [FILE, "token_forward"], tokens, 2, &args)
}

/// Gradients of the sampled KL of every one of `tokens` tokens, as far as wanted.
///
/// # Errors
/// As [`token_forward`].
pub fn token_backward(
    stream: &Stream,
    inputs: TokenBackwardInputs,
    tokens: usize,
    options: &KlOptions,
    mut outputs: TokenBackwardOutputs,
) -> Result<()> {
    options.validate(TOKEN_OP)?;
    let inputs = inputs.try_map(&[tokens], &mut Lengths(TOKEN_OP))?;
    let outputs = outputs.try_map(&[tokens], &mut Lengths(TOKEN_OP))?;
    if tokens == 0 || (outputs.grad_logp.is_none() && outputs.grad_ref_logp.is_none()) {
        return Ok(());
    }
    let options = TokenKl::new(options);
    let args = TokenBackwardArgs { inputs, outputs, tokens: tokens as i64, options };
    launch_over_tokens(stream, [FILE, "token_backward"], tokens, 3, &args)
}

/// Exact KL of every one of `rows` rows, with what the backward pass needs to know of them. Reads both
/// logits once.
///
/// # Errors
/// As [`token_forward`].
pub fn full_forward<T: Logit>(
    stream: &Stream,
    inputs: FullForwardInputs<T>,
    rows: usize,
    vocab: usize,
    options: &FullKlOptions,
    mut outputs: FullForwardOutputs,
) -> Result<()> {
    options.validate(FULL_OP)?;
    check_logits(FULL_OP, inputs.logits.len(), rows, vocab)?;
    let inputs = inputs.try_map((&[rows], vocab), &mut Lengths(FULL_OP))?;
    let outputs = outputs.try_map(&[rows], &mut Lengths(FULL_OP))?;
    if rows == 0 {
        return Ok(());
    }
    let (z, w) = options.order(inputs.logits, inputs.ref_logits);
    let reduction = Reduction::new::<T>(stream.device(), rows, vocab, MOST_PARTS);
    let args = FullForwardArgs::<Pointers, T> {
        z,
        w,
        mask: inputs.mask,
        stats: outputs.stats,
        rows: rows as i64,
        vocab: vocab as i64,
        parts: reduction.parts,
        ahead: reduction.ahead.into(),
        inverse_temperature: (1.0 / options.temperature) as f32,
        divergence: Divergence::new(options),
    };
    let passes = Passes {
        warp: Kernel { op: FILE, pass: "full_forward_warp", dtype: T::NAME },
        block: Kernel { op: FILE, pass: "full_forward_block", dtype: T::NAME },
        wide: Kernel { op: FILE, pass: "full_forward_wide", dtype: T::NAME },
    };
    reduction.launch(stream, &passes, &args)?;
    if options.is_kl() {
        return Ok(());
    }
    let passes = Passes {
        warp: Kernel { op: FILE, pass: "divergence_warp", dtype: T::NAME },
        block: Kernel { op: FILE, pass: "divergence_block", dtype: T::NAME },
        wide: Kernel { op: FILE, pass: "divergence_wide", dtype: T::NAME },
    };
    reduction.launch(stream, &passes, &args)
}

/// Gradients of the exact KL of every one of `rows` rows, as far as wanted, in the type of the logits.
/// Reads both logits once, whether one gradient is wanted or both; each may be the memory of its logits.
///
/// # Errors
/// As [`token_forward`].
pub fn full_backward<T: Logit>(
    stream: &Stream,
    inputs: FullBackwardInputs<T>,
    rows: usize,
    vocab: usize,
    options: &FullKlOptions,
    mut outputs: FullBackwardOutputs<T>,
) -> Result<()> {
    options.validate(FULL_OP)?;
    check_logits(FULL_OP, inputs.forward.logits.len(), rows, vocab)?;
    let inputs = inputs.try_map((&[rows], vocab), &mut Lengths(FULL_OP))?;
    let outputs = outputs.try_map((&[rows], vocab), &mut Lengths(FULL_OP))?;
    if rows == 0 || (outputs.grad_logits.is_none() && outputs.grad_ref_logits.is_none()) {
        return Ok(());
    }
    let (z, w) = options.order(inputs.forward.logits, inputs.forward.ref_logits);
    let (grad_z, grad_w) = options.order(outputs.grad_logits, outputs.grad_ref_logits);
    let map = Map::new::<T>(stream.device(), rows, vocab, 2);
    let args = FullBackwardArgs::<Pointers, T> {
        z,
        w,
        mask: inputs.forward.mask,
        stats: inputs.stats,
        grad_kl: inputs.grad_kl,
        grad_z,
        grad_w,
        rows: rows as i64,
        vocab: vocab as i64,
        chunks: map.chunks,
        chunk_threads: map.threads,
        inverse_temperature: (1.0 / options.temperature) as f32,
        divergence: Divergence::new(options),
    };
    let pass = if options.is_kl() { "full_backward" } else { "divergence_backward" };
    map.launch(stream, &Kernel { op: FILE, pass, dtype: T::NAME }, &args)
}

/// The struct of that name in `kernels/common/token_kl.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct TokenKl {
    estimator: KlEstimator,
    log_ratio_limit: f32,
    output_limit: f32,
}

impl TokenKl {
    /// The kernels' form of validated options.
    pub(crate) fn new(options: &KlOptions) -> Self {
        Self {
            estimator: options.estimator,
            log_ratio_limit: limit(options.log_ratio_clamp),
            output_limit: limit(options.output_clamp),
        }
    }
}

/// The kernels' form of what is no KL; of a KL it is not looked at.
#[repr(C)]
#[derive(Clone, Copy)]
struct Divergence {
    share: f32,
    rest: f32,
    coef_z: f32,
    coef_w: f32,
    is_total_variation: i32,
}

impl Divergence {
    fn new(options: &FullKlOptions) -> Self {
        let mixture = options.mixture();
        let [share, rest, coef_z, coef_w] = mixture.map_or([0.0; 4], |mixture| mixture.in_f32());
        let is_total_variation = options.divergence == super::Divergence::TotalVariation;
        Self { share, rest, coef_z, coef_w, is_total_variation: is_total_variation.into() }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct TokenForwardArgs<'a> {
    inputs: super::TokenForwardInputs<'a, Pointers>,
    outputs: super::TokenForwardOutputs<'a, Pointers>,
    tokens: i64,
    options: TokenKl,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct TokenBackwardArgs<'a> {
    inputs: super::TokenBackwardInputs<'a, Pointers>,
    outputs: super::TokenBackwardOutputs<'a, Pointers>,
    tokens: i64,
    options: TokenKl,
}

/// Without the op's own list: the kernels know no direction, and z is the policy's logits or the
/// reference's. The same holds for the next one.
#[repr(C)]
#[derive(Clone, Copy)]
struct FullForwardArgs<'a, S: Space, T: Element> {
    z: S::In<'a, T>,
    w: S::In<'a, T>,
    mask: Option<S::In<'a, u8>>,
    stats: S::Out<'a, f32>,
    rows: i64,
    vocab: i64,
    parts: i32,
    ahead: i32,
    inverse_temperature: f32,
    divergence: Divergence,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct FullBackwardArgs<'a, S: Space, T: Element> {
    z: S::In<'a, T>,
    w: S::In<'a, T>,
    mask: Option<S::In<'a, u8>>,
    stats: S::In<'a, f32>,
    grad_kl: S::In<'a, f32>,
    grad_z: Option<S::Out<'a, T>>,
    grad_w: Option<S::Out<'a, T>>,
    rows: i64,
    vocab: i64,
    chunks: i32,
    chunk_threads: i32,
    inverse_temperature: f32,
    divergence: Divergence,
}

// SAFETY: each has the kernels' fields, in order; tests/kernel_arguments.rs compares them.
unsafe impl Args for TokenForwardArgs<'_> {}
unsafe impl Args for TokenBackwardArgs<'_> {}
unsafe impl<T: Element> Args for FullForwardArgs<'_, Pointers, T> {}
unsafe impl<T: Element> Args for FullBackwardArgs<'_, Pointers, T> {}
