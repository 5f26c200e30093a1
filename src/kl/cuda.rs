//! Launches of `kernels/kl.cu` on device memory and the caller's stream. Nothing is allocated and
//! nothing waits for the device.
//!
//! Refuses what [`cpu`](super::cpu) refuses. A vocabulary may have up to 2^32 - 1 columns.

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use super::{
    check_full_grads, check_rows, check_stats, check_token_grads, check_tokens, FullKlOptions,
    KlOptions, FULL_OP, TOKEN_OP,
};
use crate::cpu::Logit;
use crate::cuda::rows::{check_vocab, launch_over_tokens, Map, Passes, Reduction};
use crate::cuda::{Args, Device, Kernel, Slice, SliceMut, Stream};
use crate::error::{Error, Result};

/// The name of the kernels' file.
const FILE: &str = "kl";

/// Values of f32 that a part of a row leaves for the merge.
const PARTIAL: usize = 5;

/// What the sampled KL is computed from, one value a token.
#[derive(Clone, Copy)]
pub struct TokenInputs<'a> {
    /// Log-probabilities under the policy.
    pub logp: Slice<'a, f32>,
    /// Log-probabilities under the reference.
    pub ref_logp: Slice<'a, f32>,
    /// Which tokens count; 0 does not.
    pub mask: Option<Slice<'a, u8>>,
}

/// Writes the sampled KL of every token to `kl`, which may be the memory of an input.
///
/// # Errors
/// If a length does not fit, an option is out of range, or a kernel cannot be launched.
pub fn token_forward(
    stream: &Stream,
    inputs: TokenInputs,
    options: &KlOptions,
    kl: SliceMut<f32>,
) -> Result<()> {
    let tokens = inputs.validate(options)?;
    Error::check_len(TOKEN_OP, "kl", kl.len(), tokens)?;
    if tokens == 0 {
        return Ok(());
    }
    let args = TokenForwardArgs {
        logp: inputs.logp.as_ptr(),
        ref_logp: inputs.ref_logp.as_ptr(),
        mask: pointer(inputs.mask),
        kl: kl.as_mut_ptr(),
        tokens: tokens as i64,
        options: TokenKl::new(options),
    };
    let kernel = Kernel { op: FILE, pass: "token_forward", dtype: "f32" };
    launch_over_tokens(stream, &kernel, tokens, 2, &args)
}

/// Writes the gradient to `logp` and to `ref_logp`, as far as wanted, from the upstream gradient
/// `grad_kl`; each may be the memory of an input. A token with upstream gradient 0 gets 0 whatever
/// it holds.
///
/// # Errors
/// As [`token_forward`].
pub fn token_backward(
    stream: &Stream,
    inputs: TokenInputs,
    options: &KlOptions,
    grad_kl: Slice<f32>,
    grad_logp: Option<SliceMut<f32>>,
    grad_ref_logp: Option<SliceMut<f32>>,
) -> Result<()> {
    let tokens = inputs.validate(options)?;
    check_token_grads(tokens, grad_kl.len(), len(&grad_logp), len(&grad_ref_logp))?;
    if tokens == 0 || (grad_logp.is_none() && grad_ref_logp.is_none()) {
        return Ok(());
    }
    let args = TokenBackwardArgs {
        logp: inputs.logp.as_ptr(),
        ref_logp: inputs.ref_logp.as_ptr(),
        mask: pointer(inputs.mask),
        grad_kl: grad_kl.as_ptr(),
        grad_logp: pointer_mut(grad_logp),
        grad_ref_logp: pointer_mut(grad_ref_logp),
        tokens: tokens as i64,
        options: TokenKl::new(options),
    };
    let kernel = Kernel { op: FILE, pass: "token_backward", dtype: "f32" };
    launch_over_tokens(stream, &kernel, tokens, 3, &args)
}

impl TokenInputs<'_> {
    /// The number of tokens.
    fn validate(&self, options: &KlOptions) -> Result<usize> {
        let mask = self.mask.map(|mask| mask.len());
        check_tokens(options, self.logp.len(), self.ref_logp.len(), mask)
    }
}

/// What the exact KL is computed from: two tensors `[N, vocab]`.
#[derive(Clone, Copy)]
pub struct FullInputs<'a, T> {
    /// Logits of the policy.
    pub logits: Slice<'a, T>,
    /// Logits of the reference.
    pub ref_logits: Slice<'a, T>,
    /// Columns of a row; above 0.
    pub vocab: usize,
    /// Which of the N rows count; 0 does not.
    pub mask: Option<Slice<'a, u8>>,
}

/// The least length of the workspace of [`full_forward`]: 0 where blocks can read each other's
/// shared memory, and else 20 bytes for every 32 KiB of logits or less in each tensor.
pub fn full_workspace_len<T: Logit>(device: Device, rows: usize, vocab: usize) -> usize {
    Reduction::new::<T>(device, rows, vocab).workspace_len(PARTIAL)
}

/// Writes `stats` `[6, N]` as [`cpu::STATS`](super::cpu::STATS) lists them; the first N values are
/// the KL. Reads both logits once. `workspace` has [`full_workspace_len`] elements or more, of any
/// content, and can be used again for the next call on the same stream.
///
/// # Errors
/// As [`token_forward`].
pub fn full_forward<T: Logit>(
    stream: &Stream,
    inputs: FullInputs<T>,
    options: &FullKlOptions,
    stats: SliceMut<f32>,
    workspace: SliceMut<f32>,
) -> Result<()> {
    let rows = inputs.validate(options)?;
    check_stats(stats.len(), rows)?;
    let reduction = Reduction::new::<T>(stream.device(), rows, inputs.vocab);
    reduction.check_workspace(FULL_OP, workspace.len(), PARTIAL)?;
    if rows == 0 {
        return Ok(());
    }
    let (z, w) = options.order(inputs.logits, inputs.ref_logits);
    let args = FullForwardArgs {
        z: z.as_ptr().cast(),
        w: w.as_ptr().cast(),
        mask: pointer(inputs.mask),
        stats: stats.as_mut_ptr(),
        partials: if reduction.through_workspace { workspace.as_mut_ptr() } else { null_mut() },
        rows: rows as i64,
        vocab: inputs.vocab as i64,
        part_groups: reduction.part_groups,
        parts: reduction.parts,
        inverse_temperature: (1.0 / options.temperature) as f32,
    };
    let passes = Passes {
        warp: Kernel { op: FILE, pass: "full_forward_warp", dtype: T::NAME },
        block: Kernel { op: FILE, pass: "full_forward_block", dtype: T::NAME },
        // Of sums, whatever the logits were.
        merge: Kernel { op: FILE, pass: "full_forward_merge", dtype: "f32" },
    };
    reduction.launch(stream, &passes, &args)
}

/// Writes the gradient to `logits` and to `ref_logits` `[N, vocab]`, as far as wanted, in their own
/// type, from the upstream gradient `grad_kl [N]` and what [`full_forward`] left in `stats`. Reads
/// both logits once, whether one gradient is wanted or both; each may be the memory of its logits.
///
/// # Errors
/// As [`token_forward`].
pub fn full_backward<T: Logit>(
    stream: &Stream,
    inputs: FullInputs<T>,
    options: &FullKlOptions,
    stats: Slice<f32>,
    grad_kl: Slice<f32>,
    grad_logits: Option<SliceMut<T>>,
    grad_ref_logits: Option<SliceMut<T>>,
) -> Result<()> {
    let rows = inputs.validate(options)?;
    check_stats(stats.len(), rows)?;
    let (logits, vocab) = (inputs.logits.len(), inputs.vocab);
    check_full_grads(rows, logits, grad_kl.len(), len(&grad_logits), len(&grad_ref_logits))?;
    if rows == 0 || (grad_logits.is_none() && grad_ref_logits.is_none()) {
        return Ok(());
    }
    let (z, w) = options.order(inputs.logits, inputs.ref_logits);
    let (grad_z, grad_w) = options.order(pointer_mut(grad_logits), pointer_mut(grad_ref_logits));
    let map = Map::new::<T>(rows, vocab, 2);
    let args = FullBackwardArgs {
        z: z.as_ptr().cast(),
        w: w.as_ptr().cast(),
        mask: pointer(inputs.mask),
        stats: stats.as_ptr(),
        grad_kl: grad_kl.as_ptr(),
        grad_z: grad_z.cast(),
        grad_w: grad_w.cast(),
        rows: rows as i64,
        vocab: vocab as i64,
        chunks: map.chunks,
        chunk_threads: map.threads,
        inverse_temperature: (1.0 / options.temperature) as f32,
    };
    map.launch(stream, &Kernel { op: FILE, pass: "full_backward", dtype: T::NAME }, &args)
}

impl<T> FullInputs<'_, T> {
    /// The number of rows.
    fn validate(&self, options: &FullKlOptions) -> Result<usize> {
        let (logits, ref_logits) = (self.logits.len(), self.ref_logits.len());
        let mask = self.mask.as_ref().map(|mask| mask.len());
        let rows = check_rows(options, logits, ref_logits, self.vocab, mask)?;
        check_vocab(FULL_OP, self.vocab)?;
        Ok(rows)
    }
}

fn len<T>(slice: &Option<SliceMut<T>>) -> Option<usize> {
    slice.as_ref().map(|slice| slice.len())
}

fn pointer<T>(slice: Option<Slice<T>>) -> *const T {
    slice.map_or(null(), |slice| slice.as_ptr())
}

fn pointer_mut<T>(slice: Option<SliceMut<T>>) -> *mut T {
    slice.map_or(null_mut(), |slice| slice.as_mut_ptr())
}

/// As in `kernels/common/token_kl.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct TokenKl {
    estimator: i32,
    log_ratio_limit: f32,
    output_limit: f32,
}

impl TokenKl {
    /// Of validated options.
    pub(crate) fn new(options: &KlOptions) -> Self {
        let limit = |clamp: Option<f64>| clamp.map_or(f32::INFINITY, |c| c as f32);
        Self {
            estimator: options.estimator as i32,
            log_ratio_limit: limit(options.log_ratio_clamp),
            output_limit: limit(options.output_clamp),
        }
    }
}

/// As in the kernels, and so are the next three.
#[repr(C)]
#[derive(Clone, Copy)]
struct TokenForwardArgs {
    logp: *const f32,
    ref_logp: *const f32,
    mask: *const u8,
    kl: *mut f32,
    tokens: i64,
    options: TokenKl,
}

// SAFETY: the fields of the kernels' struct, in order.
unsafe impl Args for TokenForwardArgs {}

#[repr(C)]
#[derive(Clone, Copy)]
struct TokenBackwardArgs {
    logp: *const f32,
    ref_logp: *const f32,
    mask: *const u8,
    grad_kl: *const f32,
    grad_logp: *mut f32,
    grad_ref_logp: *mut f32,
    tokens: i64,
    options: TokenKl,
}

// SAFETY: the fields of the kernels' struct, in order.
unsafe impl Args for TokenBackwardArgs {}

#[repr(C)]
#[derive(Clone, Copy)]
struct FullForwardArgs {
    z: *const c_void,
    w: *const c_void,
    mask: *const u8,
    stats: *mut f32,
    partials: *mut f32,
    rows: i64,
    vocab: i64,
    part_groups: i32,
    parts: i32,
    inverse_temperature: f32,
}

// SAFETY: the fields of the kernels' struct, in order.
unsafe impl Args for FullForwardArgs {}

#[repr(C)]
#[derive(Clone, Copy)]
struct FullBackwardArgs {
    z: *const c_void,
    w: *const c_void,
    mask: *const u8,
    stats: *const f32,
    grad_kl: *const f32,
    grad_z: *mut c_void,
    grad_w: *mut c_void,
    rows: i64,
    vocab: i64,
    chunks: i32,
    chunk_threads: i32,
    inverse_temperature: f32,
}

// SAFETY: the fields of the kernels' struct, in order.
unsafe impl Args for FullBackwardArgs {}
