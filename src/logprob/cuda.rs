//! Launches of `kernels/logprob.cu` on device memory and the caller's stream. Nothing is allocated
//! and nothing waits for the device.
//!
//! Refuses what [`cpu`](super::cpu) refuses, but for targets: to look at them here would cost a wait.
//! The row of a target that is neither in the vocabulary nor `ignore_index` comes out as NaN. A
//! vocabulary may have up to 2^32 - 1 columns.

use super::{LogprobOptions, OP};
use crate::cpu::{Logit, TokenId};
use crate::cuda::rows::{check_logits, Map, Passes, Reduction};
use crate::cuda::{Args, Kernel, Stream};
use crate::error::Result;
use crate::memory::{in_space, Element, Lengths, Pointers};

/// Parts of a long row, as in the kernels.
pub(crate) const MOST_PARTS: i32 = 3;

in_space!(Device: ForwardInputs<T, I>, ForwardOutputs, BackwardInputs<T, I>, BackwardOutputs<T>);

/// Log-probabilities of the targets of `rows` rows, and the entropies if asked for. Reads the logits
/// once.
///
/// # Errors
/// If a length does not fit, an option is out of range, one of `max` and `log_sum` is missing, or a
/// kernel cannot be launched.
pub fn forward<T: Logit, I: TokenId>(
    stream: &Stream,
    inputs: ForwardInputs<T, I>,
    rows: usize,
    vocab: usize,
    options: &LogprobOptions,
    mut outputs: ForwardOutputs,
) -> Result<()> {
    options.validate()?;
    check_logits(OP, inputs.logits.len(), rows, vocab)?;
    let inputs = inputs.try_map((&[rows], vocab), &mut Lengths(OP))?;
    let outputs = outputs.try_map(&[rows], &mut Lengths(OP))?;
    outputs.check_pair()?;
    if rows == 0 {
        return Ok(());
    }

    let reduction = Reduction::new::<T>(stream.device(), rows, vocab, MOST_PARTS);
    let args = ForwardArgs::new(inputs, [rows, vocab], options, outputs, &reduction);
    let kernel = |pass| Kernel { op: OP, pass, dtype: T::NAME };
    let passes = Passes {
        warp: kernel("forward_warp"),
        block: kernel("forward_block"),
        wide: kernel("forward_wide"),
    };
    reduction.launch(stream, &passes, &args)
}

/// Gradient of the logits of `rows` rows, in their own type. Reads the logits once and writes their
/// gradient once; they may be the same memory.
///
/// # Errors
/// As [`forward`]; it is `entropy` that may be missing, where `grad_entropy` needs it.
pub fn backward<T: Logit, I: TokenId>(
    stream: &Stream,
    inputs: BackwardInputs<T, I>,
    rows: usize,
    vocab: usize,
    options: &LogprobOptions,
    mut outputs: BackwardOutputs<T>,
) -> Result<()> {
    options.validate()?;
    check_logits(OP, inputs.forward.logits.len(), rows, vocab)?;
    let mut inputs = inputs.try_map((&[rows], vocab), &mut Lengths(OP))?;
    inputs.entropy = Some(inputs.entropy_or_any()?);
    let outputs = outputs.try_map((&[rows], vocab), &mut Lengths(OP))?;
    if rows == 0 {
        return Ok(());
    }

    let map = Map::new::<T>(stream.device(), rows, vocab, 1);
    let args = BackwardArgs {
        inputs,
        outputs,
        target_format: TargetFormat::new::<I>(options),
        rows: rows as i64,
        vocab: vocab as i64,
        chunks: map.chunks,
        chunk_threads: map.threads,
        inverse_temperature: (1.0 / options.temperature) as f32,
    };
    map.launch(stream, &Kernel { op: OP, pass: "backward", dtype: T::NAME }, &args)
}

/// How the kernels read targets.
#[repr(C)]
#[derive(Clone, Copy)]
struct TargetFormat {
    ignore_index: i64,
    wide: i32,
    has_ignore: i32,
}

impl TargetFormat {
    fn new<I: TokenId>(options: &LogprobOptions) -> Self {
        Self {
            ignore_index: options.ignore_index.unwrap_or_default(),
            wide: i32::from(I::WIDE),
            has_ignore: i32::from(options.ignore_index.is_some()),
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ForwardArgs<'a, T: Element, I: Element> {
    inputs: super::ForwardInputs<'a, Pointers, T, I>,
    outputs: super::ForwardOutputs<'a, Pointers>,
    target_format: TargetFormat,
    rows: i64,
    vocab: i64,
    parts: i32,
    ahead: i32,
    inverse_temperature: f32,
}

impl<'a, T: Logit, I: TokenId> ForwardArgs<'a, T, I> {
    pub fn new(
        inputs: super::ForwardInputs<'a, Pointers, T, I>,
        [rows, vocab]: [usize; 2],
        options: &LogprobOptions,
        outputs: super::ForwardOutputs<'a, Pointers>,
        reduction: &Reduction,
    ) -> Self {
        Self {
            inputs,
            outputs,
            target_format: TargetFormat::new::<I>(options),
            rows: rows as i64,
            vocab: vocab as i64,
            parts: reduction.parts,
            ahead: reduction.ahead.into(),
            inverse_temperature: (1.0 / options.temperature) as f32,
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct BackwardArgs<'a, T: Element, I: Element> {
    inputs: super::BackwardInputs<'a, Pointers, T, I>,
    outputs: super::BackwardOutputs<'a, Pointers, T>,
    target_format: TargetFormat,
    rows: i64,
    vocab: i64,
    chunks: i32,
    chunk_threads: i32,
    inverse_temperature: f32,
}

// SAFETY: each has the kernels' fields, in order; tests/kernel_arguments.rs compares them.
unsafe impl<T: Element, I: Element> Args for ForwardArgs<'_, T, I> {}
unsafe impl<T: Element, I: Element> Args for BackwardArgs<'_, T, I> {}
