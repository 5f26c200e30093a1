//! Launches of `kernels/logprob.cu` on device memory and the caller's stream. Nothing is allocated
//! and nothing waits for the device.
//!
//! Refuses what [`cpu`](super::cpu) refuses, but for targets: to look at them here would cost a wait.
//! The row of a target that is neither in the vocabulary nor `ignore_index` comes out as NaN. A
//! vocabulary may have up to 2^32 - 1 columns.

use super::{Columns, LogprobOptions, OP};
use crate::cpu::{Logit, TokenId};
use crate::cuda::rows::{check_logits, Map, Passes, Reduction};
use crate::cuda::{Args, Kernel, Stream};
use crate::error::Result;
use crate::memory::{in_space, Element, Lengths, Pointers};

/// Parts of a long row, as in the kernels.
pub(crate) const MOST_PARTS: i32 = 3;

/// Rows a block of those passes that know running sums alone.
const ROWS_BLOCK: usize = 256;

in_space!(
    Device: ForwardInputs<T, I>,
    ForwardOutputs,
    BackwardInputs<T, I>,
    BackwardOutputs<T>,
    RunningSums,
    MergeInputs,
    FinishInputs<I>,
    FinishOutputs,
);

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

    let tile = Tile::Whole;
    reduce_rows::<T, I>(stream, inputs, rows, Columns::all(vocab), options, outputs, tile)
}

/// Folds a tile of columns into the running sums of `rows` rows, or begins them with it. Reads the logits
/// once. The inputs' `logits` are `[rows, columns.count]`.
///
/// # Errors
/// If a length does not fit, the columns are not in the vocabulary, an option is out of range, or a kernel
/// cannot be launched.
pub fn partial<T: Logit, I: TokenId>(
    stream: &Stream,
    inputs: ForwardInputs<T, I>,
    rows: usize,
    columns: Columns,
    options: &LogprobOptions,
    begins: bool,
    mut sums: RunningSums,
) -> Result<()> {
    options.validate()?;
    check_columns(inputs.logits.len(), rows, columns)?;
    let inputs = inputs.try_map((&[rows], columns.count), &mut Lengths(OP))?;
    let sums = sums.try_map(&[rows], &mut Lengths(OP))?;
    if rows == 0 {
        return Ok(());
    }

    let super::RunningSums { max, rest, logit, weighted } = sums;
    // The kernel has the same places for both.
    let (logp, entropy, max, log_sum) = (logit, weighted, Some(max), Some(rest));
    let outputs = super::ForwardOutputs { logp, entropy, max, log_sum };
    let tile = if begins { Tile::Begins } else { Tile::Continues };
    reduce_rows::<T, I>(stream, inputs, rows, columns, options, outputs, tile)
}

fn reduce_rows<'a, T: Logit, I: TokenId>(
    stream: &Stream,
    inputs: super::ForwardInputs<'a, Pointers, T, I>,
    rows: usize,
    columns: Columns,
    options: &LogprobOptions,
    outputs: super::ForwardOutputs<'a, Pointers>,
    tile: Tile,
) -> Result<()> {
    let reduction = Reduction::new::<T>(stream.device(), rows, columns.count, MOST_PARTS);
    let whole = ForwardArgs::new(inputs, rows, columns, options, outputs, &reduction);
    let args = ForwardArgs { tile: tile as i32, ..whole };
    let kernel = |pass| Kernel { op: OP, pass, dtype: T::NAME };
    let passes = Passes {
        warp: kernel("forward_warp"),
        block: kernel("forward_block"),
        wide: kernel("forward_wide"),
    };
    reduction.launch(stream, &passes, &args)
}

/// `Ok` when the logits are so many rows of these columns, whose places fit into 32 bits.
fn check_columns(logits: usize, rows: usize, columns: Columns) -> Result<()> {
    columns.check()?;
    check_logits(OP, logits, rows, columns.count)
}

/// Adds the running sums over other columns of `rows` rows to those over some.
///
/// # Errors
/// If a length does not fit, an option is out of range, one of the weighted sums is missing, or a kernel
/// cannot be launched.
pub fn merge(
    stream: &Stream,
    inputs: MergeInputs,
    rows: usize,
    options: &LogprobOptions,
    mut sums: RunningSums,
) -> Result<()> {
    options.validate()?;
    let inputs = inputs.try_map(&[rows], &mut Lengths(OP))?;
    let outputs = sums.try_map(&[rows], &mut Lengths(OP))?;
    outputs.check_pair(&inputs)?;
    if rows == 0 {
        return Ok(());
    }
    let inverse_temperature = (1.0 / options.temperature) as f32;
    let args = MergeSumsArgs { inputs, outputs, rows: rows as i64, inverse_temperature };
    stream.launch_f32([OP, "merge"], rows.div_ceil(ROWS_BLOCK), ROWS_BLOCK, &args)
}

/// Log-probabilities, and entropies if asked for, of running sums over all columns of `vocab`.
///
/// # Errors
/// If a length does not fit, an option is out of range, what the entropy needs is missing, or a kernel
/// cannot be launched.
pub fn finish<I: TokenId>(
    stream: &Stream,
    inputs: FinishInputs<I>,
    rows: usize,
    vocab: usize,
    options: &LogprobOptions,
    mut outputs: FinishOutputs,
) -> Result<()> {
    options.validate()?;
    Columns::check_vocab(vocab)?;
    let inputs = inputs.try_map(&[rows], &mut Lengths(OP))?;
    let outputs = outputs.try_map(&[rows], &mut Lengths(OP))?;
    outputs.check_given(&inputs)?;
    if rows == 0 {
        return Ok(());
    }
    let args = FinishSumsArgs {
        inputs,
        outputs,
        target_format: TargetFormat::new::<I>(options, Columns::all(vocab)),
        rows: rows as i64,
        inverse_temperature: (1.0 / options.temperature) as f32,
    };
    stream.launch_f32([OP, "finish"], rows.div_ceil(ROWS_BLOCK), ROWS_BLOCK, &args)
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
    outputs: BackwardOutputs<T>,
) -> Result<()> {
    backward_of_columns(stream, inputs, rows, Columns::all(vocab), options, outputs)
}

/// [`backward`] of a tile of columns: logits and gradient are `[rows, columns.count]`.
///
/// # Errors
/// As [`backward`], or if the columns are not in the vocabulary.
pub fn backward_of_columns<T: Logit, I: TokenId>(
    stream: &Stream,
    inputs: BackwardInputs<T, I>,
    rows: usize,
    columns: Columns,
    options: &LogprobOptions,
    mut outputs: BackwardOutputs<T>,
) -> Result<()> {
    options.validate()?;
    check_columns(inputs.forward.logits.len(), rows, columns)?;
    let shape = (&[rows][..], columns.count);
    let mut inputs = inputs.try_map(shape, &mut Lengths(OP))?;
    inputs.entropy = Some(inputs.without_logits().entropy_or_any()?);
    let outputs = outputs.try_map(shape, &mut Lengths(OP))?;
    if rows == 0 {
        return Ok(());
    }

    let map = Map::new::<T>(stream.device(), rows, columns.count, 1);
    let args = BackwardArgs {
        inputs,
        outputs,
        target_format: TargetFormat::new::<I>(options, columns),
        rows: rows as i64,
        columns: columns.count as i64,
        chunks: map.chunks,
        chunk_threads: map.threads,
        inverse_temperature: (1.0 / options.temperature) as f32,
    };
    map.launch(stream, &Kernel { op: OP, pass: "backward", dtype: T::NAME }, &args)
}

/// The columns that the forward kernel is given, and its outputs.
enum Tile {
    /// All of them: what they come to.
    Whole,
    /// The first: running sums.
    Begins,
    /// More: running sums, those before included.
    Continues,
}

/// How the kernels read targets.
#[repr(C)]
#[derive(Clone, Copy)]
struct TargetFormat {
    ignore_index: i64,
    first_column: i64,
    vocab: i64,
    wide: i32,
    has_ignore: i32,
}

impl TargetFormat {
    fn new<I: TokenId>(options: &LogprobOptions, columns: Columns) -> Self {
        Self {
            ignore_index: options.ignore_index.unwrap_or_default(),
            first_column: columns.first as i64,
            vocab: columns.vocab as i64,
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
    columns: i64,
    parts: i32,
    ahead: i32,
    inverse_temperature: f32,
    tile: i32,
}

impl<'a, T: Logit, I: TokenId> ForwardArgs<'a, T, I> {
    pub fn new(
        inputs: super::ForwardInputs<'a, Pointers, T, I>,
        rows: usize,
        columns: Columns,
        options: &LogprobOptions,
        outputs: super::ForwardOutputs<'a, Pointers>,
        reduction: &Reduction,
    ) -> Self {
        Self {
            inputs,
            outputs,
            target_format: TargetFormat::new::<I>(options, columns),
            rows: rows as i64,
            columns: columns.count as i64,
            parts: reduction.parts,
            ahead: reduction.ahead.into(),
            inverse_temperature: (1.0 / options.temperature) as f32,
            tile: Tile::Whole as i32,
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
    columns: i64,
    chunks: i32,
    chunk_threads: i32,
    inverse_temperature: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MergeSumsArgs<'a> {
    inputs: super::MergeInputs<'a, Pointers>,
    outputs: super::RunningSums<'a, Pointers>,
    rows: i64,
    inverse_temperature: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct FinishSumsArgs<'a, I: Element> {
    inputs: super::FinishInputs<'a, Pointers, I>,
    outputs: super::FinishOutputs<'a, Pointers>,
    target_format: TargetFormat,
    rows: i64,
    inverse_temperature: f32,
}

// SAFETY: each has the kernels' fields, in order; tests/kernel_arguments.rs compares them.
unsafe impl<T: Element, I: Element> Args for ForwardArgs<'_, T, I> {}
unsafe impl<T: Element, I: Element> Args for BackwardArgs<'_, T, I> {}
unsafe impl Args for MergeSumsArgs<'_> {}
unsafe impl<I: Element> Args for FinishSumsArgs<'_, I> {}
