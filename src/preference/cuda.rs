//! Launches of `kernels/preference.cu` on device memory and the caller's stream. Nothing is allocated
//! and nothing waits for the device.
//!
//! Refuses what [`cpu`](super::cpu) refuses, but for what arrays hold: to look at them here would cost a
//! wait. Where every weight is 0 and the denominator is not given, or the likelihood term has no token, the
//! loss comes out as NaN, and that part of the gradients as 0. A label other than 0 and 1 makes the loss NaN,
//! and so does a length below 0 that something is divided by. Rows of a pack are brought back into the tokens
//! that there are.
//!
//! Three launches, and one more each for the gradient, for LD-DPO and for losses of sorted log-ratios.

use super::{PreferenceOptions, RewardModelOptions, Sorted, Terms, OP};
use crate::cuda::{Args, SliceMut, Stream};
use crate::error::{Error, Result};
use crate::memory::{in_space, Lengths, Pointers};
use crate::pack::BatchShape;

/// Threads of a block.
const THREADS: usize = 256;

const WARP: usize = 32;

/// Pairs that a block adds up. It must not depend on the device: it decides the order of additions.
const PART_UNITS: usize = 1024;

/// Numbers that a part leaves.
const PARTIAL_SUMS: usize = 11;

/// The longest rows of a warp.
const WARP_ROW: usize = 2048;

in_space!(Device: Inputs, Outputs, RewardModelInputs, RewardModelOutputs);

/// The least length of the workspace of [`preference_loss`]: 56 bytes a row, 16 more a row for losses of
/// sorted log-ratios, and 1 KiB for every 11,000 pairs.
pub fn workspace_len(rows: usize, options: &PreferenceOptions) -> usize {
    workspace_of(rows, options.units(rows).unwrap_or(rows), Terms::new(options).sorted)
}

/// The least length of the workspace of [`reward_model_loss`].
pub fn reward_model_workspace_len(pairs: usize) -> usize {
    workspace_of(pairs.saturating_mul(2), pairs, Sorted::Nothing)
}

/// Values of f64: sums and gradients of rows, sorted values and ranks, partial sums, factors.
fn workspace_of(rows: usize, units: usize, sorted: Sorted) -> usize {
    let of_row = if sorted == Sorted::Nothing { ROW } else { ROW + SORTED };
    let parts = units.div_ceil(PART_UNITS);
    rows.saturating_mul(of_row).saturating_add(parts * PARTIAL_SUMS + 1)
}

const DOUBLE: usize = size_of::<f64>();
const ROW: usize = (size_of::<RowSums>() + size_of::<RowGradient>()) / DOUBLE;
const SORTED: usize = 2;

/// Loss, statistics and the gradient, for an upstream gradient of 1, of `rows` responses of up to `seq_len`
/// tokens, or with offsets, of `seq_len` tokens in all.
///
/// `workspace` has [`workspace_len`] elements or more, of any content, and can be used again for the
/// next call on the same stream.
///
/// # Errors
/// If a length does not fit, the rows are no pairs, an option is out of range, something is given that does
/// not go with the loss, there is no pair and the denominator is not given, or a kernel cannot be launched.
pub fn preference_loss(
    stream: &Stream,
    inputs: Inputs,
    rows: usize,
    seq_len: usize,
    options: &PreferenceOptions,
    mut outputs: Outputs,
    workspace: SliceMut<f64>,
) -> Result<()> {
    options.validate()?;
    let units = options.units(rows)?;
    let shape = (BatchShape::new(rows, seq_len, inputs.offsets.is_some()), units);
    inputs.check_given(options)?;
    let inputs = inputs.try_map(shape, &mut Lengths(OP))?;
    let outputs = outputs.try_map(shape, &mut Lengths(OP))?;
    let scales = Scales {
        denominator: options.denominator.unwrap_or(0.0),
        sft_coef: options.sft_coef,
        sft_denominator: options.sft_denominator.unwrap_or(0.0),
    };
    run(stream, inputs, shape, Terms::new(options), scales, outputs, &workspace)
}

/// Loss, statistics and the gradient, for an upstream gradient of 1, of the rewards of `pairs` pairs:
/// the mean of -ls(chosen - rejected - margin) + center_coef (chosen + rejected)². `workspace` has
/// [`reward_model_workspace_len`] elements or more, of any content.
///
/// # Errors
/// If a length does not fit, an option is out of range, there is no pair and the denominator is not given,
/// or a kernel cannot be launched.
pub fn reward_model_loss(
    stream: &Stream,
    inputs: RewardModelInputs,
    pairs: usize,
    options: &RewardModelOptions,
    mut outputs: RewardModelOutputs,
    workspace: SliceMut<f64>,
) -> Result<()> {
    options.validate()?;
    let super::RewardModelInputs { rewards, margin, weights } =
        inputs.try_map(pairs, &mut Lengths(OP))?;
    let super::RewardModelOutputs { stats, loss, losses, grad_rewards } =
        outputs.try_map(pairs, &mut Lengths(OP))?;
    let inputs = super::Inputs { margin, weights, ..super::Inputs::new(rewards) };
    let outputs =
        super::Outputs { loss, losses, grad_logp: grad_rewards, ..super::Outputs::new(stats) };
    let scales = Scales {
        denominator: options.denominator.unwrap_or(0.0),
        sft_coef: 0.0,
        sft_denominator: 0.0,
    };
    let shape = (BatchShape::new(2 * pairs, 1, false), pairs);
    run(stream, inputs, shape, Terms::reward_model(options), scales, outputs, &workspace)
}

/// The launches, of what has been checked.
fn run<'a>(
    stream: &Stream,
    inputs: super::Inputs<'a, Pointers>,
    (shape, units): (BatchShape, usize),
    terms: Terms,
    scales: Scales,
    outputs: super::Outputs<'a, Pointers>,
    workspace: &SliceMut<f64>,
) -> Result<()> {
    if units == 0 && scales.denominator == 0.0 {
        return Err(Error::Mask { op: OP, arg: "logp", expected: 1, got: 0 });
    }
    let rows = shape.batch();
    Error::check_workspace(OP, workspace.len(), workspace_of(rows, units, terms.sorted))?;
    let (tokens, sorts) = (shape.count_tokens(), terms.sorted != Sorted::Nothing);
    let sums: *mut RowSums = workspace.as_mut_ptr().cast();
    let gradients: *mut RowGradient = sums.wrapping_add(rows).cast();
    let sorted: *mut f64 = gradients.wrapping_add(rows).cast();
    let ranks: *mut i64 = sorted.wrapping_add(if sorts { rows } else { 0 }).cast();
    let partials: *mut f64 = ranks.wrapping_add(if sorts { rows } else { 0 }).cast();
    let parts = units.div_ceil(PART_UNITS);
    // Of a pack the mean.
    let by_warp = tokens.div_ceil(rows.max(1)) <= WARP_ROW;
    let args = PassArgs {
        inputs,
        outputs,
        sums,
        gradients,
        sorted,
        ranks,
        partials,
        factors: partials.wrapping_add(parts * PARTIAL_SUMS).cast(),
        rows: rows as i64,
        columns: shape.seq_len() as i64,
        units: units as i64,
        parts: parts as i32,
        row_threads: if by_warp { WARP } else { THREADS } as i32,
        scales,
        terms,
    };
    let launch = |pass, blocks: usize| stream.launch_f32([OP, pass], blocks, THREADS, &args);
    let by_warps = rows.div_ceil(THREADS / WARP);
    let blocks = if by_warp { by_warps } else { rows };
    if units > 0 {
        launch("sums", blocks)?;
        if terms.ld_alpha != 1.0 {
            launch("merge_tails", by_warps)?;
        }
        if sorts {
            launch("merge_ranks", 2 * units.div_ceil(THREADS))?;
        }
        launch("merge_pairs", parts)?;
    }
    launch("finish", 1)?;
    if args.outputs.grad_logp.is_some() && tokens > 0 {
        launch("finish_tokens", blocks)?;
    }
    Ok(())
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RowSums {
    plain: f64,
    policy: f64,
    reference: f64,
    length: f64,
    tail: i64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RowGradient {
    head: f32,
    rest: f32,
    sft: f32,
    unused: f32,
}

/// The divisors of the sums in the end; 0 is for what is counted.
#[repr(C)]
#[derive(Clone, Copy)]
struct Scales {
    denominator: f64,
    sft_coef: f64,
    sft_denominator: f64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PassArgs<'a> {
    inputs: super::Inputs<'a, Pointers>,
    outputs: super::Outputs<'a, Pointers>,
    sums: *mut RowSums,
    gradients: *mut RowGradient,
    sorted: *mut f64,
    ranks: *mut i64,
    partials: *mut f64,
    factors: *mut f32,
    rows: i64,
    columns: i64,
    units: i64,
    parts: i32,
    row_threads: i32,
    scales: Scales,
    terms: Terms,
}

// SAFETY: it has the kernels' fields, in order; tests/kernel_arguments.rs compares them.
unsafe impl Args for PassArgs<'_> {}
