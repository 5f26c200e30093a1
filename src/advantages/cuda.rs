//! Launches of `kernels/advantages.cu` on device memory and the caller's stream. Nothing is allocated and
//! nothing waits for the device.
//!
//! Refuses what [`cpu`](super::cpu) refuses, but for groups of one row by their ids where the baseline is
//! [`Baseline::RunnerUp`]: to look for them here would cost a wait. Their rows come out as NaN.

use super::{
    AdvantageOptions, Baseline, Scale, Singleton, Sizes, TokenBaselineOptions, TokenStep, OP,
};
use crate::cuda::rows::Map;
use crate::cuda::{Args, Kernel, SliceMut, Stream};
use crate::error::{Error, Result};
use crate::memory::{in_space, Lengths, Pointers};
use crate::moments::Moments;
use crate::whiten::EpsPlacement;

/// Threads of a block, warps of it, and threads of the block that takes all rows.
const BLOCK: usize = 256;
const WARPS: usize = BLOCK / 32;
const BATCH_BLOCK: usize = 512;

/// Pairs that a block sorts, and places of a warp, as in the kernels.
const TILE: usize = 1024;
const PLACES: usize = 8;

/// The most blocks that go through groups, each of whose warps leaves counts of them.
const MOST_BLOCKS: usize = 1024;

in_space!(Device: Inputs, Outputs, TokenInputs, TokenOutputs);

/// The least length of the workspace of [`outcome_advantages`] for so many rows: 32 bytes a row, and 128
/// KiB of f64 at most.
pub fn workspace_len(batch: usize) -> usize {
    let words = |bytes: usize| bytes / size_of::<f64>();
    let counts = words(size_of::<Counts>()) * WARPS * blocks(batch);
    let keys = (2 * words(size_of::<Key>())).saturating_mul(batch);
    (words(size_of::<Batch>()) + counts).saturating_add(keys)
}

/// The advantages of a batch, on its tokens too if wanted, and statistics of the scores. See
/// [the module](super). `workspace` has [`workspace_len`] values or more, of any content, and can be used
/// again for the next call on the same stream.
///
/// # Errors
/// If a length does not fit, an option is out of range, what it looks at is not there, or a kernel cannot be
/// launched.
pub fn outcome_advantages(
    stream: &Stream,
    inputs: Inputs,
    sizes: Sizes,
    options: &AdvantageOptions,
    mut outputs: Outputs,
    workspace: SliceMut<f64>,
) -> Result<()> {
    options.check(&inputs, sizes)?;
    let shape = sizes.shape(inputs.offsets.is_some());
    let inputs = inputs.try_map(shape, &mut Lengths(OP))?;
    let outputs = outputs.try_map(shape, &mut Lengths(OP))?;
    let Sizes { batch: rows, seq_len, group_size } = sizes;
    Error::check_workspace(OP, workspace.len(), workspace_len(rows))?;

    let (wants_stats, wants_tokens) = (outputs.stats.is_some(), outputs.token_advantages.is_some());
    let grouped = inputs.groups.is_some() || group_size > 0;
    let by_group = options.by_group() || (wants_stats && grouped);
    let blocks = blocks(rows).min(stream.device().max_blocks as usize);
    let batch: *mut Batch = workspace.as_mut_ptr().cast();
    let counts: *mut Counts = batch.wrapping_add(1).cast();
    let sorted = counts.wrapping_add(WARPS * self::blocks(rows)).cast();
    let keys = match inputs.groups {
        Some(groups) if by_group => sort(stream, groups.as_ptr(), rows, sorted)?,
        _ => std::ptr::null(),
    };
    // Of a pack the mean.
    let width = if shape.is_packed() { seq_len.div_ceil(rows.max(1)) } else { seq_len };
    let map = Map::new::<f32>(stream.device(), rows, width, 1);
    let args = PassArgs {
        inputs,
        outputs,
        keys,
        batch,
        counts,
        rows: rows as i64,
        tokens: seq_len as i64,
        group_size: if by_group { group_size as i64 } else { 0 },
        units: (WARPS * blocks) as i64,
        options: OptionsArgs::new(options, by_group),
        chunks: map.chunks,
        chunk_threads: map.threads,
    };
    if options.by_batch() || wants_stats {
        stream.launch_f32([OP, "batch"], 1, BATCH_BLOCK, &args)?;
    }
    if rows > 0 {
        stream.launch_f32([OP, "rows"], blocks, BLOCK, &args)?;
    }
    if wants_stats {
        stream.launch_f32([OP, "finish"], 1, 32, &args)?;
    }
    if wants_tokens && rows > 0 && seq_len > 0 {
        map.launch(stream, &Kernel { op: OP, pass: "spread", dtype: "f32" }, &args)?;
    }
    Ok(())
}

/// The least length of the workspace of [`optimal_token_baseline`] for so many rows with so many tokens in all: 16
/// bytes a token, and 40 a row.
pub fn token_workspace_len(batch: usize, tokens: usize) -> usize {
    let of_row = 1 + 2 * size_of::<Key>() / size_of::<f64>();
    tokens.saturating_mul(2).saturating_add(batch.saturating_mul(of_row))
}

/// Advantages against verl's optimal token baseline, and returns. See [the module](super). `workspace` has
/// [`token_workspace_len`] values or more, of any content, and can be used again for the next call on the same
/// stream.
///
/// # Errors
/// If a length does not fit, an option is out of range, rows are in no groups, or a kernel cannot be launched.
pub fn optimal_token_baseline(
    stream: &Stream,
    inputs: TokenInputs,
    sizes: Sizes,
    options: &TokenBaselineOptions,
    mut outputs: TokenOutputs,
    workspace: SliceMut<f64>,
) -> Result<()> {
    options.check(&inputs, sizes)?;
    let shape = sizes.shape(inputs.offsets.is_some());
    let inputs = inputs.try_map(shape, &mut Lengths(OP))?;
    let outputs = outputs.try_map(shape, &mut Lengths(OP))?;
    let Sizes { batch: rows, seq_len, group_size } = sizes;
    let tokens = shape.count_tokens();
    Error::check_workspace(OP, workspace.len(), token_workspace_len(rows, tokens))?;
    if rows == 0 || tokens == 0 {
        return Ok(());
    }
    let step_returns = workspace.as_mut_ptr();
    let step_weights = step_returns.wrapping_add(tokens);
    let lengths = step_weights.wrapping_add(tokens);
    let keys = lengths.wrapping_add(rows).cast();
    let args = TokenArgs {
        inputs,
        outputs,
        keys: match inputs.groups {
            Some(groups) => sort(stream, groups.as_ptr(), rows, keys)?,
            None => std::ptr::null(),
        },
        step_returns,
        step_weights,
        lengths: lengths.cast(),
        eps: options.eps,
        rows: rows as i64,
        tokens: seq_len as i64,
        group_size: group_size as i64,
        by_unmasked: i32::from(options.step == TokenStep::Unmasked),
        lone_tail: i32::from(options.lone_tail),
    };
    stream.launch_f32([OP, "steps"], rows.div_ceil(WARPS), BLOCK, &args)?;
    stream.launch_f32([OP, "baselines"], rows, BLOCK, &args)?;
    stream.launch_f32([OP, "less_baselines"], rows.div_ceil(WARPS), BLOCK, &args)
}

/// Launches what puts the rows in the order of their groups into one of two arrays of so many pairs, and
/// returns it.
fn sort(stream: &Stream, groups: *const i64, rows: usize, keys: *mut Key) -> Result<*const Key> {
    let (mut from, mut to, mut run) = (keys.wrapping_add(rows), keys, TILE);
    let args = |from: *mut Key, to, run| SortArgs {
        groups,
        from,
        to,
        count: rows as i64,
        run: run as i64,
    };
    if rows > 0 {
        stream.launch_f32([OP, "sort"], rows.div_ceil(TILE), BLOCK, &args(from, to, run))?;
    }
    while run < rows {
        (from, to) = (to, from);
        stream.launch_f32([OP, "merge"], rows.div_ceil(BLOCK), BLOCK, &args(from, to, run))?;
        run *= 2;
    }
    Ok(to)
}

/// Blocks that go through the groups of so many rows.
fn blocks(rows: usize) -> usize {
    rows.div_ceil(PLACES * WARPS).min(MOST_BLOCKS)
}

/// The options as the kernels take them.
#[repr(C)]
#[derive(Clone, Copy)]
struct OptionsArgs {
    eps: f64,
    score_min: f64,
    score_max: f64,
    baseline: Baseline,
    scale: Scale,
    singleton: Singleton,
    eps_at_std: i32,
    unbiased: i32,
    by_group: i32,
}

impl OptionsArgs {
    fn new(options: &AdvantageOptions, by_group: bool) -> Self {
        Self {
            eps: options.eps,
            score_min: options.score_min,
            score_max: options.score_max,
            baseline: options.baseline,
            scale: options.scale,
            singleton: options.singleton,
            eps_at_std: i32::from(options.eps_placement == EpsPlacement::Std),
            unbiased: i32::from(options.unbiased),
            by_group: i32::from(by_group),
        }
    }
}

/// A row by its group.
#[repr(C)]
#[derive(Clone, Copy)]
struct Key {
    id: i64,
    row: i64,
}

/// Statistics of all rows.
#[repr(C)]
#[derive(Clone, Copy)]
struct Batch {
    moments: Moments,
    nonzero: f64,
}

/// Groups with a score, and those of them in which all scores are equal.
#[repr(C)]
#[derive(Clone, Copy)]
struct Counts {
    scored: f64,
    zero_std: f64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SortArgs {
    groups: *const i64,
    from: *const Key,
    to: *mut Key,
    count: i64,
    run: i64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PassArgs<'a> {
    inputs: super::Inputs<'a, Pointers>,
    outputs: super::Outputs<'a, Pointers>,
    keys: *const Key,
    batch: *mut Batch,
    counts: *mut Counts,
    rows: i64,
    tokens: i64,
    group_size: i64,
    units: i64,
    options: OptionsArgs,
    chunks: i32,
    chunk_threads: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct TokenArgs<'a> {
    inputs: super::TokenInputs<'a, Pointers>,
    outputs: super::TokenOutputs<'a, Pointers>,
    keys: *const Key,
    step_returns: *mut f64,
    step_weights: *mut f64,
    lengths: *mut i64,
    eps: f64,
    rows: i64,
    tokens: i64,
    group_size: i64,
    by_unmasked: i32,
    lone_tail: i32,
}

// SAFETY: each has the kernels' fields, in order; tests/kernel_arguments.rs compares them.
unsafe impl Args for SortArgs {}
unsafe impl Args for TokenArgs<'_> {}
unsafe impl Args for PassArgs<'_> {}
