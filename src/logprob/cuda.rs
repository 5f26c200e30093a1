//! Launches of `kernels/logprob.cu` on device memory and the caller's stream. Nothing is allocated
//! and nothing waits for the device.
//!
//! Refuses what [`cpu`](super::cpu) refuses, but for targets: to look at them here would cost a wait.
//! The row of a target that is neither in the vocabulary nor `ignore_index` comes out as NaN. A
//! vocabulary may have up to 2^32 - 1 columns.

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use super::{check_logits, LogprobOptions, OP};
use crate::cpu::{Logit, TokenId};
use crate::cuda::rows::{check_vocab, Map, Passes, Reduction};
use crate::cuda::{Args, Device, Kernel, Slice, SliceMut, Stream};
use crate::error::{Error, Result};

/// Values of f32 that a part of a row leaves for the merge.
const PARTIAL: usize = 3;

/// What the forward pass writes, one value a row.
pub struct Outputs<'a> {
    /// Log-probability of the target.
    pub logp: SliceMut<'a, f32>,
    /// Entropy of the row's distribution.
    pub entropy: Option<SliceMut<'a, f32>>,
    /// What [`backward`] needs to know of the rows.
    pub stats: Option<RowStatsMut<'a>>,
}

/// Where the forward pass leaves what the backward pass needs.
pub struct RowStatsMut<'a> {
    /// The row's largest logit.
    pub max: SliceMut<'a, f32>,
    /// ln Σ e^{(z - max) / temperature}.
    pub log_sum: SliceMut<'a, f32>,
}

/// What the forward pass left.
#[derive(Clone, Copy)]
pub struct RowStats<'a> {
    /// The row's largest logit.
    pub max: Slice<'a, f32>,
    /// ln Σ e^{(z - max) / temperature}.
    pub log_sum: Slice<'a, f32>,
    /// The row's entropy.
    pub entropy: Slice<'a, f32>,
}

/// Upstream gradients, one value a row; `None` stands for zeros.
#[derive(Clone, Copy)]
pub struct Upstream<'a> {
    /// With respect to the log-probabilities.
    pub logp: Option<Slice<'a, f32>>,
    /// With respect to the entropies.
    pub entropy: Option<Slice<'a, f32>>,
}

/// The least length of the workspace of [`forward`]: 0 where blocks can read each other's shared
/// memory, and else 12 bytes for every 32 KiB of logits or less.
pub fn workspace_len<T: Logit>(device: Device, rows: usize, vocab: usize) -> usize {
    Reduction::new::<T>(device, rows, vocab).workspace_len(PARTIAL)
}

/// Log-probabilities of the targets, and the entropies if asked for, from `logits [N, vocab]` and
/// `targets [N]`. Reads the logits once. `workspace` has [`workspace_len`] elements or more, of any
/// content, and can be used again for the next call on the same stream.
///
/// # Errors
/// If a length does not fit, an option is out of range, or a kernel cannot be launched.
pub fn forward<T: Logit, I: TokenId>(
    stream: &Stream,
    logits: Slice<T>,
    targets: Slice<I>,
    vocab: usize,
    options: &LogprobOptions,
    outputs: Outputs,
    workspace: SliceMut<f32>,
) -> Result<()> {
    let rows = targets.len();
    options.validate()?;
    check_logits(logits.len(), rows, vocab)?;
    check_vocab(OP, vocab)?;
    let Outputs { logp, entropy, stats } = outputs;
    Error::check_len(OP, "logp", logp.len(), rows)?;
    if let Some(entropy) = &entropy {
        Error::check_len(OP, "entropy", entropy.len(), rows)?;
    }
    if let Some(stats) = &stats {
        Error::check_len(OP, "max", stats.max.len(), rows)?;
        Error::check_len(OP, "log_sum", stats.log_sum.len(), rows)?;
    }
    let reduction = Reduction::new::<T>(stream.device(), rows, vocab);
    reduction.check_workspace(OP, workspace.len(), PARTIAL)?;
    if rows == 0 {
        return Ok(());
    }

    let stats = stats.as_ref();
    let args = ForwardArgs {
        logits: logits.as_ptr().cast(),
        logp: logp.as_mut_ptr(),
        entropy: entropy.map_or(null_mut(), |slice| slice.as_mut_ptr()),
        max: stats.map_or(null_mut(), |stats| stats.max.as_mut_ptr()),
        log_sum: stats.map_or(null_mut(), |stats| stats.log_sum.as_mut_ptr()),
        partials: if reduction.through_workspace { workspace.as_mut_ptr() } else { null_mut() },
        targets: Targets::new(targets, options),
        rows: rows as i64,
        vocab: vocab as i64,
        part_groups: reduction.part_groups,
        parts: reduction.parts,
        inverse_temperature: (1.0 / options.temperature) as f32,
    };
    let kernel = |pass| Kernel { op: OP, pass, dtype: T::NAME };
    let passes = Passes {
        warp: kernel("forward_warp"),
        block: kernel("forward_block"),
        merge: kernel("forward_merge"),
    };
    reduction.launch(stream, &passes, &args)
}

/// Gradient with respect to the logits, in their own type, from what [`forward`] left in `stats`.
/// Reads the logits once and writes `grad_logits [N, vocab]` once; they may be the same memory.
///
/// # Errors
/// As [`forward`].
#[allow(clippy::too_many_arguments)] // those of the CPU's, and the stream
pub fn backward<T: Logit, I: TokenId>(
    stream: &Stream,
    logits: Slice<T>,
    targets: Slice<I>,
    vocab: usize,
    options: &LogprobOptions,
    stats: RowStats,
    upstream: Upstream,
    grad_logits: SliceMut<T>,
) -> Result<()> {
    let rows = targets.len();
    options.validate()?;
    check_logits(logits.len(), rows, vocab)?;
    check_vocab(OP, vocab)?;
    Error::check_len(OP, "max", stats.max.len(), rows)?;
    Error::check_len(OP, "log_sum", stats.log_sum.len(), rows)?;
    Error::check_len(OP, "entropy", stats.entropy.len(), rows)?;
    let given = |slice: Option<Slice<f32>>| slice.map_or(rows, |slice| slice.len());
    Error::check_len(OP, "grad_logp", given(upstream.logp), rows)?;
    Error::check_len(OP, "grad_entropy", given(upstream.entropy), rows)?;
    Error::check_len(OP, "grad_logits", grad_logits.len(), logits.len())?;
    if rows == 0 {
        return Ok(());
    }

    let map = Map::new::<T>(rows, vocab, 1);
    let pointer = |slice: Option<Slice<f32>>| slice.map_or(null(), |slice| slice.as_ptr());
    let args = BackwardArgs {
        logits: logits.as_ptr().cast(),
        max: stats.max.as_ptr(),
        log_sum: stats.log_sum.as_ptr(),
        entropy: stats.entropy.as_ptr(),
        grad_logp: pointer(upstream.logp),
        grad_entropy: pointer(upstream.entropy),
        grad_logits: grad_logits.as_mut_ptr().cast(),
        targets: Targets::new(targets, options),
        rows: rows as i64,
        vocab: vocab as i64,
        chunks: map.chunks,
        chunk_threads: map.threads,
        inverse_temperature: (1.0 / options.temperature) as f32,
    };
    map.launch(stream, &Kernel { op: OP, pass: "backward", dtype: T::NAME }, &args)
}

/// As in the kernels, and so are the next two.
#[repr(C)]
#[derive(Clone, Copy)]
struct Targets {
    ids: *const c_void,
    ignore_index: i64,
    wide: i32,
    has_ignore: i32,
}

impl Targets {
    fn new<I: TokenId>(ids: Slice<I>, options: &LogprobOptions) -> Self {
        Self {
            ids: ids.as_ptr().cast(),
            ignore_index: options.ignore_index.unwrap_or_default(),
            wide: i32::from(I::WIDE),
            has_ignore: i32::from(options.ignore_index.is_some()),
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ForwardArgs {
    logits: *const c_void,
    logp: *mut f32,
    entropy: *mut f32,
    max: *mut f32,
    log_sum: *mut f32,
    partials: *mut f32,
    targets: Targets,
    rows: i64,
    vocab: i64,
    part_groups: i32,
    parts: i32,
    inverse_temperature: f32,
}

// SAFETY: the fields of the kernels' struct, in order.
unsafe impl Args for ForwardArgs {}

#[repr(C)]
#[derive(Clone, Copy)]
struct BackwardArgs {
    logits: *const c_void,
    max: *const f32,
    log_sum: *const f32,
    entropy: *const f32,
    grad_logp: *const f32,
    grad_entropy: *const f32,
    grad_logits: *mut c_void,
    targets: Targets,
    rows: i64,
    vocab: i64,
    chunks: i32,
    chunk_threads: i32,
    inverse_temperature: f32,
}

// SAFETY: the fields of the kernels' struct, in order.
unsafe impl Args for BackwardArgs {}
