//! Launches of `kernels/gae.cu` on device memory and the caller's stream. Nothing is allocated and
//! nothing waits for the device.
//!
//! Refuses what [`cpu`](super::cpu) refuses, but for the offsets of a pack and the λ of rows, which to look at
//! would cost a wait: rows are brought back into the tokens that there are, and a λ out of range makes its row
//! NaN. A row's bits depend neither on other rows, nor on
//! padding behind it, nor on which of the kernels takes it, so that this can be chosen by the whole
//! shape. The moments depend on the shape as well.

use std::ptr::null_mut;

use super::{
    check_missing_eos, GaeOptions, MaskMode, MissingEos, RewardShaping, ScoreOrder, ScorePlacement,
    OP,
};
use crate::cuda::{Args, SliceMut, Stream};
use crate::error::{Error, Result};
use crate::memory::{in_space, Lengths, Pointer, Pointers, Space};
use crate::moments::cuda::{merge, merge_workspace_len};
use crate::moments::Moments;
use crate::pack::BatchShape;

const WARP: usize = 32;

/// Tokens of a segment, and tokens of a warp's segments that a thread has in registers.
const SEGMENT: usize = 128;
const THREAD_TOKENS: usize = 8;

/// The threads that rows of up to so many tokens take.
struct RowThreads {
    max_tokens: usize,
    threads: usize,
}

/// A block a row, but for the shortest, of which a warp has one. Longer ones take several turns.
const ROWS: [RowThreads; 4] = [
    RowThreads { max_tokens: WARP * THREAD_TOKENS, threads: WARP },
    RowThreads { max_tokens: 512, threads: 64 },
    RowThreads { max_tokens: 1024, threads: 128 },
    RowThreads { max_tokens: usize::MAX, threads: MAX_THREADS },
];

/// Threads of a block that several rows share, or a tile of a long one.
const MAX_THREADS: usize = 256;
const TILE: usize = MAX_THREADS * THREAD_TOKENS;

/// At most so many rows of more than so many tokens are split over blocks: it costs some launches
/// and reads the inputs again, which are in L2 then. More rows are enough for every multiprocessor.
const SPLIT_ROWS: usize = 64;
const SPLIT_TOKENS: usize = 8 * TILE;

/// Values of f64 that hold the maps of so many segments.
fn maps_len(segments: usize) -> usize {
    segments.saturating_mul(size_of::<Total>()).div_ceil(size_of::<f64>())
}

/// How the kernels share out a batch.
enum Mapping {
    /// A row a warp.
    Warp,
    /// A row a block of so many threads.
    Block(usize),
    /// A tile a block.
    Split,
}

impl Mapping {
    fn new<S: Space>(inputs: &super::Inputs<S>, batch: usize, seq_len: usize) -> Self {
        let is_packed = inputs.offsets.is_some();
        // A block has the powers of one row's λ.
        let by_block = inputs.lambda_per_row.is_some();
        // How long a pack's rows are is not known here. Those of twice the mean length or less take one turn.
        let tokens = match is_packed {
            true => seq_len.min(seq_len.div_ceil(batch.max(1)).saturating_mul(2)),
            false => seq_len,
        };
        if batch <= SPLIT_ROWS && seq_len > SPLIT_TOKENS && !is_packed && !by_block {
            return Mapping::Split;
        }
        // None of the pack's rows is longer than all of them.
        let by_block = by_block || (is_packed && seq_len > ROWS[0].max_tokens);
        let rows = &ROWS[usize::from(by_block)..];
        let last = &rows[rows.len() - 1];
        match rows.iter().find(|entry| tokens <= entry.max_tokens).unwrap_or(last).threads {
            WARP => Mapping::Warp,
            threads => Mapping::Block(threads),
        }
    }

    /// Blocks' worth of work, of which each leaves its moments.
    fn blocks(&self, batch: usize, seq_len: usize) -> usize {
        match self {
            Mapping::Warp => batch.div_ceil(MAX_THREADS / WARP),
            Mapping::Block(_) => batch,
            Mapping::Split => batch.saturating_mul(seq_len.div_ceil(TILE)),
        }
    }
}

in_space!(Device: Inputs, Outputs);

/// The least length of the workspace of [`gae`] for inputs in any memory: 24 bytes a row or less, and for
/// few long rows some 24 bytes every 128 tokens.
pub fn workspace_len<S: Space>(inputs: &super::Inputs<S>, batch: usize, seq_len: usize) -> usize {
    if batch == 0 || seq_len == 0 {
        return 0;
    }
    let mapping = Mapping::new(inputs, batch, seq_len);
    let partials = merge_workspace_len(mapping.blocks(batch, seq_len));
    match mapping {
        Mapping::Split => {
            let segments = batch.saturating_mul(seq_len.div_ceil(SEGMENT));
            let scan = batch.saturating_add(segments).saturating_add(maps_len(segments));
            partials.saturating_add(scan)
        }
        _ => partials,
    }
}

/// Advantages and returns of `batch` rows of `seq_len` tokens, or with offsets, of `seq_len` tokens in all.
/// Reads every input once, or twice if there are few long rows. `workspace` has [`workspace_len`] values or
/// more, of any content, and can be used again for the next call on the same stream.
///
/// # Errors
/// If a length does not fit, an option is out of range, [`MissingEos`] has no `scores` and `has_eos`
/// to work on, or a kernel cannot be launched.
pub fn gae(
    stream: &Stream,
    inputs: Inputs,
    batch: usize,
    seq_len: usize,
    options: &GaeOptions,
    mut outputs: Outputs,
    workspace: SliceMut<f64>,
) -> Result<()> {
    options.validate()?;
    let shape = BatchShape::new(batch, seq_len, inputs.offsets.is_some());
    let inputs = inputs.try_map(shape, &mut Lengths(OP))?;
    let outputs = outputs.try_map(shape, &mut Lengths(OP))?;
    check_missing_eos(options.shaping.missing_eos, &inputs)?;
    Error::check_workspace(OP, workspace.len(), workspace_len(&inputs, batch, seq_len))?;

    let moments = outputs.moments.map(Pointer::as_ptr);
    let workspace: *mut Moments = workspace.as_mut_ptr().cast();
    if batch == 0 || seq_len == 0 {
        return moments.map_or(Ok(()), |moments| merge(stream, OP, workspace, 0, moments));
    }
    let mapping = Mapping::new(&inputs, batch, seq_len);
    let blocks = mapping.blocks(batch, seq_len);
    let partials = if moments.is_some() { workspace } else { null_mut() };
    let mut args = GaeArgs::new(inputs, [batch, seq_len], options, outputs, partials);

    let launch = |pass, blocks, threads, args: &GaeArgs| {
        stream.launch_f32([OP, pass], blocks, threads, args)
    };
    // The kernels that know the decay in their types, for one and for two.
    let either = |one, two| if args.two != 0 { two } else { one };
    let warp = either("warp", "warp_two");
    let block = match args.inputs.lambda_per_row.is_some() || args.inputs.offsets.is_some() {
        false => either("block", "block_two"),
        true => either("block_own", "block_two_own"),
    };
    let [totals, apply] = [either("totals", "totals_two"), either("apply", "apply_two")];
    match mapping {
        Mapping::Warp => launch(warp, blocks, MAX_THREADS, &args)?,
        Mapping::Block(threads) => {
            if u32::try_from(batch).is_err() {
                let expected = "fewer than 2^32 rows".into();
                let got = format!("{batch} rows");
                return Err(Error::Shape { op: OP, arg: "values", expected, got });
            }
            args.tiles = seq_len.div_ceil(threads * THREAD_TOKENS) as i32;
            launch(block, blocks, threads, &args)?;
        }
        Mapping::Split => {
            let segments = seq_len.div_ceil(SEGMENT);
            args.segments = segments as i64;
            args.tiles = seq_len.div_ceil(TILE) as i32;
            args.last = workspace.cast::<f64>().wrapping_add(merge_workspace_len(blocks)).cast();
            args.carries = args.last.wrapping_add(batch).cast();
            args.totals = args.carries.wrapping_add(batch * segments).cast();
            if args.inputs.mask.is_some() {
                launch("last", batch, MAX_THREADS, &args)?;
            }
            launch(totals, blocks, MAX_THREADS, &args)?;
            launch("carry", batch, MAX_THREADS, &args)?;
            launch(apply, blocks, MAX_THREADS, &args)?;
        }
    }
    moments.map_or(Ok(()), |moments| merge(stream, OP, workspace, blocks, moments))
}

/// The state that a step passes to the step before it.
#[allow(dead_code)] // only its size is looked at here
#[repr(C)]
struct State {
    u: f32,
    of_returns: f32,
}

/// The map from the state after a segment to that before it.
#[allow(dead_code)] // only its size is looked at here
#[repr(C)]
struct Total {
    factor: State,
    add: State,
}

/// γλ in the forms that the kernels use.
#[repr(C)]
#[derive(Clone, Copy)]
struct Decay {
    /// γ (1 - λ)
    rest: f32,
    /// Powers of γλ.
    powers: [f32; SEGMENT + 1],
}

impl Decay {
    fn new(gamma: f64, lambda: f64) -> Self {
        let power = |n: usize| (gamma * lambda).powi(n as i32) as f32;
        let powers = std::array::from_fn(power);
        Self { rest: (gamma - gamma * lambda) as f32, powers }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Shaping {
    mean: f64,
    inverse_std: f64,
    min: f64,
    max: f64,
    missing: f64,
    clips_first: i32,
    replaces: i32,
}

impl Shaping {
    fn new(shaping: &RewardShaping) -> Self {
        let (missing, replaces) = match shaping.missing_eos {
            MissingEos::Keep => (0.0, false),
            MissingEos::Subtract(penalty) => (penalty, false),
            MissingEos::Replace(value) => (value, true),
        };
        Self {
            mean: shaping.score_scale.map_or(0.0, |scale| scale.mean),
            inverse_std: shaping.score_scale.map_or(1.0, |scale| 1.0 / scale.std),
            min: shaping.score_min,
            max: shaping.score_max,
            missing,
            clips_first: i32::from(shaping.score_order == ScoreOrder::ClipThenScale),
            replaces: i32::from(replaces),
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct GaeArgs<'a> {
    inputs: super::Inputs<'a, Pointers>,
    outputs: super::Outputs<'a, Pointers>,
    partials: *mut Moments,
    last: *mut i64,
    totals: *mut Total,
    carries: *mut State,
    rows: i64,
    tokens: i64,
    segments: i64,
    tiles: i32,
    shaping: Shaping,
    gamma: f64,
    minus_kl_coef: f32,
    multiply: i32,
    after_last: i32,
    two: i32,
    decay: Decay,
    returns_decay: Decay,
}

// SAFETY: the fields of the kernels' struct, in order; tests/kernel_arguments.rs compares them.
unsafe impl Args for GaeArgs<'_> {}

impl<'a> GaeArgs<'a> {
    /// Without what only some mappings have.
    fn new(
        mut inputs: super::Inputs<'a, Pointers>,
        [batch, seq_len]: [usize; 2],
        options: &GaeOptions,
        outputs: super::Outputs<'a, Pointers>,
        partials: *mut Moments,
    ) -> Self {
        let shaping = &options.shaping;
        // What the options make nothing of is not read.
        inputs.kl = inputs.kl.filter(|_| shaping.kl_coef != 0.0);
        inputs.has_eos = inputs.has_eos.filter(|_| shaping.missing_eos != MissingEos::Keep);
        Self {
            inputs,
            outputs,
            partials,
            last: null_mut(),
            totals: null_mut(),
            carries: null_mut(),
            rows: batch as i64,
            tokens: seq_len as i64,
            segments: 0,
            tiles: 0,
            shaping: Shaping::new(shaping),
            gamma: options.gamma,
            minus_kl_coef: -shaping.kl_coef as f32,
            multiply: i32::from(options.mask_mode == MaskMode::Multiply),
            after_last: i32::from(shaping.score_placement == ScorePlacement::AfterLastToken),
            two: i32::from(match inputs.lambda_per_row {
                None => options.lambda_of_returns() != options.lambda,
                Some(_) => options.value_lambda.is_some(),
            }),
            decay: Decay::new(options.gamma, options.lambda),
            returns_decay: Decay::new(options.gamma, options.lambda_of_returns()),
        }
    }
}
