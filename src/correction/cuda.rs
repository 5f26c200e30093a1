//! Launches of `kernels/correction.cu` on device memory and the caller's stream. Nothing is allocated and
//! nothing waits for the device. Refuses what [`cpu`](super::cpu) refuses, but for the offsets of a pack, which
//! to look at would cost a wait: rows are brought back into the tokens that there are.
//!
//! A row is added up by a warp, or by a block where rows are long in the mean, which padding changes. Sums are
//! in f64: a weight of a row may differ in its last bit.

use super::{CorrectionOptions, Outside, RejectionArgs, RejectionMetric, WeightLevel, OP};
use crate::cuda::{Args, SliceMut, Stream};
use crate::error::{Error, Result};
use crate::kl::limit;
use crate::memory::{in_space, Lengths, Pointers};
use crate::pack::BatchShape;

const WARP: usize = 32;

/// Threads of a block, by what it does.
const PASS_THREADS: usize = 256;
const MERGE_THREADS: usize = PARTIAL_SUMS * WARP;

/// The longest row that a warp takes; a longer one takes a block.
const WARP_ROW: usize = 512;

/// The most parts, which one block merges. It must not depend on the device: parts decide the order of
/// additions.
const PARTS: usize = 1024;

/// Values of f64 that a part leaves for the merge, which has a warp for each.
const PARTIAL_SUMS: usize = 23;

/// Elements of f32 that a thread of the scaling has in flight.
const SCALE_IN_FLIGHT: usize = 16;

/// The most blocks that scale.
const SCALE_BLOCKS: usize = 2048;

in_space!(Device: Inputs, Outputs);

/// How rows are shared out.
struct Mapping {
    by_warps: bool,
    part_rows: usize,
    parts: usize,
}

impl Mapping {
    fn new(shape: BatchShape) -> Self {
        // Of a pack the mean.
        let rows = if shape.count_tokens() == 0 { 0 } else { shape.batch() };
        let by_warps = shape.count_tokens().div_ceil(rows.max(1)) <= WARP_ROW;
        // A row for each warp of a block, or one for the block.
        let least = if by_warps { PASS_THREADS / WARP } else { 1 };
        let part_rows = rows.div_ceil(PARTS).next_multiple_of(least).max(least);
        Self { by_warps, part_rows, parts: rows.div_ceil(part_rows) }
    }
}

/// The least length of the workspace of [`correction`] for so many rows: 184 KiB of f64 at most.
pub fn workspace_len(batch: usize) -> usize {
    1 + PARTIAL_SUMS * batch.min(PARTS)
}

/// Weights and statistics of `batch` rows of `seq_len` tokens, or with offsets, of `seq_len` tokens in all. Reads
/// every input once, or twice where something of a whole row decides. `workspace` has [`workspace_len`] values or more, of any content, and
/// can be used again for the next call on the same stream.
///
/// # Errors
/// If a length does not fit, an option is out of range, or a kernel cannot be launched.
pub fn correction(
    stream: &Stream,
    inputs: Inputs,
    batch: usize,
    seq_len: usize,
    options: &CorrectionOptions,
    mut outputs: Outputs,
    workspace: SliceMut<f64>,
) -> Result<()> {
    options.validate()?;
    let shape = BatchShape::new(batch, seq_len, inputs.offsets.is_some());
    let inputs = inputs.try_map(shape, &mut Lengths(OP))?;
    let outputs = outputs.try_map(shape, &mut Lengths(OP))?;
    Error::check_workspace(OP, workspace.len(), workspace_len(batch))?;
    let mapping = Mapping::new(shape);
    let (factor, weights) = (workspace.as_mut_ptr(), outputs.weights.as_ptr());
    let args = PassArgs {
        inputs,
        outputs,
        partials: factor.wrapping_add(1),
        factor,
        rows: batch as i64,
        columns: seq_len as i64,
        part_rows: mapping.part_rows as i64,
        parts: mapping.parts as i32,
        normalise: i32::from(options.normalise),
        rule: RuleArgs::new(options),
    };
    if mapping.parts > 0 {
        let rejects = options.rejections().iter().any(|r| r.metric != RejectionMetric::None);
        let pass = match (mapping.by_warps, rejects) {
            (true, false) => "warp",
            (false, false) => "block",
            (true, true) => "warp_rejects",
            (false, true) => "block_rejects",
        };
        stream.launch_f32([OP, pass], mapping.parts, PASS_THREADS, &args)?;
    }
    stream.launch_f32([OP, "merge"], 1, MERGE_THREADS, &args)?;
    let tokens = shape.count_tokens();
    if options.normalise && tokens > 0 {
        let args = ScaleArgs { weights, factor, tokens: tokens as i64 };
        let blocks = tokens.div_ceil(PASS_THREADS * SCALE_IN_FLIGHT).min(SCALE_BLOCKS);
        stream.launch_f32([OP, "scale"], blocks, PASS_THREADS, &args)?;
    }
    Ok(())
}

/// The options as the kernels take them.
#[repr(C)]
#[derive(Clone, Copy)]
struct RuleArgs {
    level: WeightLevel,
    outside: Outside,
    needs_rows: i32,
    log_ratio_limit: f32,
    low: f32,
    high: f32,
    rejections: [RejectionArgs; 2],
}

impl RuleArgs {
    fn new(options: &CorrectionOptions) -> Self {
        let (low, high) = options.bounds();
        Self {
            level: options.level,
            outside: options.outside,
            needs_rows: i32::from(options.needs_rows()),
            log_ratio_limit: limit(options.log_ratio_clamp),
            low: low as f32,
            high: high as f32,
            rejections: options.rejections().map(RejectionArgs::new),
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PassArgs<'a> {
    inputs: super::Inputs<'a, Pointers>,
    outputs: super::Outputs<'a, Pointers>,
    partials: *mut f64,
    factor: *mut f64,
    rows: i64,
    columns: i64,
    part_rows: i64,
    parts: i32,
    normalise: i32,
    rule: RuleArgs,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ScaleArgs {
    weights: *mut f32,
    factor: *const f64,
    tokens: i64,
}

// SAFETY: each has the kernels' fields, in order; tests/kernel_arguments.rs compares them.
unsafe impl Args for PassArgs<'_> {}
unsafe impl Args for ScaleArgs {}
