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
use crate::cuda::{Args, Device, Kernel, Launch, Slice, SliceMut, Stream};
use crate::error::{Error, Result};

/// How rows of up to so many bytes are shared out. It must not depend on the number of rows, nor on
/// the device: it decides the order of additions.
struct Geometry {
    max_row_bytes: usize,
    /// Threads for each part of a row: a warp, or all of a block.
    threads: usize,
    /// Blocks for a row.
    parts: usize,
}

const FORWARD: [Geometry; 6] = [
    Geometry { max_row_bytes: 2 << 10, threads: WARP, parts: 1 },
    Geometry { max_row_bytes: 16 << 10, threads: 128, parts: 1 },
    Geometry { max_row_bytes: 64 << 10, threads: 256, parts: 1 },
    Geometry { max_row_bytes: 128 << 10, threads: 256, parts: 2 },
    Geometry { max_row_bytes: 256 << 10, threads: 256, parts: 4 },
    Geometry { max_row_bytes: usize::MAX, threads: 256, parts: 8 },
];

/// Threads that share a range of columns, by the row's bytes; no sum depends on it.
const BACKWARD: [Geometry; 3] = [
    Geometry { max_row_bytes: 2 << 10, threads: WARP, parts: 1 },
    Geometry { max_row_bytes: 8 << 10, threads: 128, parts: 1 },
    Geometry { max_row_bytes: usize::MAX, threads: BLOCK, parts: 1 },
];

const WARP: usize = 32;

/// Threads of a block that several rows or ranges share.
const BLOCK: usize = 256;

/// Bytes of a load, and how many a thread has in flight, as in the kernels.
const VECTOR: usize = 16;
const IN_FLIGHT: usize = 4;

/// Values of f32 that a part of a row leaves for the merge.
const PARTIAL: usize = 3;

fn geometry<T>(table: &'static [Geometry], vocab: usize) -> &'static Geometry {
    let bytes = vocab.saturating_mul(size_of::<T>());
    let last = table.len() - 1;
    table.iter().find(|entry| bytes <= entry.max_row_bytes).unwrap_or(&table[last])
}

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
    let parts = geometry::<T>(&FORWARD, vocab).parts;
    if parts == 1 || device.has_clusters() {
        return 0;
    }
    rows.saturating_mul(parts * PARTIAL)
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
    check_vocab(vocab)?;
    let Outputs { logp, entropy, stats } = outputs;
    Error::check_len(OP, "logp", logp.len(), rows)?;
    if let Some(entropy) = &entropy {
        Error::check_len(OP, "entropy", entropy.len(), rows)?;
    }
    if let Some(stats) = &stats {
        Error::check_len(OP, "max", stats.max.len(), rows)?;
        Error::check_len(OP, "log_sum", stats.log_sum.len(), rows)?;
    }
    let device = stream.device();
    let needed = workspace_len::<T>(device, rows, vocab);
    Error::check_workspace(OP, workspace.len(), needed)?;
    if rows == 0 {
        return Ok(());
    }

    let &Geometry { threads, parts, .. } = geometry::<T>(&FORWARD, vocab);
    let groups = vocab.div_ceil(VECTOR / size_of::<T>());
    let stats = stats.as_ref();
    let args = ForwardArgs {
        logits: logits.as_ptr().cast(),
        logp: logp.as_mut_ptr(),
        entropy: entropy.map_or(null_mut(), |slice| slice.as_mut_ptr()),
        max: stats.map_or(null_mut(), |stats| stats.max.as_mut_ptr()),
        log_sum: stats.map_or(null_mut(), |stats| stats.log_sum.as_mut_ptr()),
        partials: if needed > 0 { workspace.as_mut_ptr() } else { null_mut() },
        targets: Targets::new(targets, options),
        rows: rows as i64,
        vocab: vocab as i64,
        // A warp's load is whole in one part.
        part_groups: groups.div_ceil(parts).next_multiple_of(WARP) as i32,
        parts: parts as i32,
        inverse_temperature: (1.0 / options.temperature) as f32,
    };
    let kernel = |pass| Kernel { op: OP, pass, dtype: T::NAME };
    if threads == WARP {
        let blocks = rows.div_ceil(BLOCK / WARP);
        let launch = Launch::new(device, blocks, 1, BLOCK as u32);
        return stream.launch(&kernel("forward_warp"), launch, &args);
    }
    let launch = Launch::new(device, rows, parts as u32, threads as u32);
    if needed == 0 {
        return stream.launch(&kernel("forward_block"), launch, &args);
    }
    // Without clusters: the same blocks, and a second launch that merges what they left.
    stream.launch(&kernel("forward_block"), launch.without_clusters(), &args)?;
    let launch = Launch::new(device, rows.div_ceil(BLOCK), 1, BLOCK as u32);
    stream.launch(&kernel("forward_merge"), launch, &args)
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
    check_vocab(vocab)?;
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

    let threads = geometry::<T>(&BACKWARD, vocab).threads;
    let chunks = vocab.div_ceil(threads * IN_FLIGHT * VECTOR / size_of::<T>());
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
        chunks: chunks as i32,
        chunk_threads: threads as i32,
        inverse_temperature: (1.0 / options.temperature) as f32,
    };
    let blocks = rows.saturating_mul(chunks).div_ceil(BLOCK / threads);
    let launch = Launch::new(stream.device(), blocks, 1, BLOCK as u32);
    let kernel = Kernel { op: OP, pass: "backward", dtype: T::NAME };
    stream.launch(&kernel, launch, &args)
}

/// `Ok` when the vectors of a row can be counted in 32 bits.
fn check_vocab(vocab: usize) -> Result<()> {
    if u32::try_from(vocab).is_ok() {
        return Ok(());
    }
    Err(Error::Shape {
        op: OP,
        arg: "logits",
        expected: format!("[N, {}] or narrower", u32::MAX),
        got: format!("[N, {vocab}]"),
    })
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
