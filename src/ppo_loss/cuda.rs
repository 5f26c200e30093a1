//! Launches of `kernels/ppo_loss.cu` on device memory and the caller's stream. Nothing is allocated
//! and nothing waits for the device.
//!
//! Refuses what [`cpu`](mod@super::cpu) refuses, but for masks, negative weights and the offsets of a pack: to
//! look at them here would cost a wait. Where the mask keeps no token and the denominator is not given, the loss comes
//! out as NaN, and the gradients as 0; where an unmasked token has a negative weight, the loss comes out as NaN.
//!
//! Up to four launches: a look at the mask alone, if the denominator or the weights of the rows
//! depend on it; one at the rows, where the ratio is that of a row or rows may be dropped; the pass over
//! the tokens; and one that adds up what its blocks found. Up to 4096 tokens take a single one, and those
//! for rows.

use std::array::from_fn;
use std::convert::Infallible;
use std::ptr::{null, null_mut};

use super::{
    Aggregation, ClipFractionKind, KlAgainst, KlGradient, KlRatio, LossShape, PpoLossOptions,
    RatioLevel, Surrogate, TrustRegion, TrustRegionSides, OP,
};
use crate::cpu::{Logit, TokenId};
use crate::cuda::rows::{check_logits, Reduction};
use crate::cuda::{Args, Kernel, Launch, Slice, SliceMut, Stream};
use crate::error::{Error, Result};
use crate::kl::cuda::TokenKl;
use crate::kl::limit;
use crate::logprob::cuda::{ForwardArgs, MOST_PARTS};
use crate::logprob::{self, Columns, ForwardInputs, ForwardOutputs, LogprobOptions};
use crate::memory::{
    in_space, Array, Element, Lengths, Nowhere, Pointer, Pointers, Reads, Space, Writes,
};
use crate::pack::BatchShape;

/// Tokens that a block of the pass takes at a time.
const TILE: usize = 1024;

/// How many tiles a part has, which a block adds up, by how many there are. It must not depend on the device: it
/// decides the order of additions.
struct PartSize {
    max_tiles: usize,
    part_tiles: usize,
}

/// A single part needs no merge; up to 1024 parts are merged in no time; and a thread adds up, and counts, no
/// more than 32 tokens.
const PARTS: [PartSize; 5] = [
    PartSize { max_tiles: 4, part_tiles: 4 },
    PartSize { max_tiles: 1 << 10, part_tiles: 1 },
    PartSize { max_tiles: 2 << 10, part_tiles: 2 },
    PartSize { max_tiles: 4 << 10, part_tiles: 4 },
    PartSize { max_tiles: usize::MAX, part_tiles: 8 },
];

/// Tiles of a part, and how many parts there are.
fn parts(tokens: usize) -> (usize, usize) {
    let tiles = tokens.div_ceil(TILE);
    let last = PARTS.len() - 1;
    let entry = PARTS.iter().find(|entry| tiles <= entry.max_tiles).unwrap_or(&PARTS[last]);
    (entry.part_tiles, tiles.div_ceil(entry.part_tiles))
}

/// Values of f32 that a part leaves for the merge, which has a warp for each.
const PARTIAL_SUMS: usize = 28;

const WARP: usize = 32;

/// Threads of a block, by what it does.
const PASS_THREADS: usize = 256;
const ROWS_THREADS: usize = 256;
const COUNT_THREADS: usize = 512;
const MERGE_THREADS: usize = PARTIAL_SUMS * WARP;
const SCALE_THREADS: usize = 256;

/// Elements of f32 that a thread of the scaling has in flight.
const SCALE_IN_FLIGHT: usize = 16;

/// The most parts that the mask is counted in: every block of the pass adds them up.
const COUNT_PARTS: usize = 256;

/// The fewest bytes of the mask in a part: a vector a thread.
const COUNT_BYTES: usize = 16 * COUNT_THREADS;

/// Bytes of a row that one warp counts; a longer one takes a block.
const WARP_ROW: usize = 8 << 10;

/// Up to so many tokens it is cheaper that every block of the pass counts them than to launch.
const COUNT_IN_PASS: usize = 16 << 10;

/// The most threads of a block that takes a row of logits, and of those that run at once.
const LOGITS_THREADS: usize = 768;

/// Bytes of shared memory that such a block has besides the row: the kernel's variables, and what the
/// system keeps.
const LOGITS_SHARED: usize = 11 << 10;

in_space!(
    Device: Inputs, Outputs, LogitsInputs<T, I>, LogitsOutputs<T>, ScaleInputs, ScaleOutputs
);

/// The least length of the workspace of [`ppo_loss`] for `batch` rows with so many tokens in all: some 108
/// bytes for every 1024 tokens or more, 3 KiB, 4 bytes a row where rows have weights, 12 a row where the
/// ratio is that of a row or rows may be dropped, and 8 a row for the extremes over rows.
pub fn workspace_len(batch: usize, tokens: usize, options: &PpoLossOptions) -> usize {
    Room::new(batch, tokens, options).len
}

/// Where what is in the workspace begins, in elements of f32.
struct Room {
    counts: usize,
    longest: usize,
    entropy_counts: usize,
    weights: usize,
    row_terms: usize,
    row_clips: usize,
    len: usize,
}

impl Room {
    fn new(batch: usize, tokens: usize, options: &PpoLossOptions) -> Self {
        let mut end = 0_usize;
        // Where so many elements begin, behind all before.
        let mut take = |elements: usize| {
            let first = end;
            end = end.saturating_add(elements);
            first
        };
        let a_row = |there: bool, elements| if there { batch.saturating_mul(elements) } else { 0 };
        take(PARTIAL_SUMS.saturating_mul(parts(tokens).1));
        Self {
            counts: take(COUNT_PARTS),
            longest: take(COUNT_PARTS),
            entropy_counts: take(COUNT_PARTS),
            weights: take(a_row(options.aggregation.has_row_weights(), 1)),
            row_terms: take(a_row(options.needs_rows(), ROW_TERMS)),
            row_clips: take(a_row(options.row_extremes, ROW_CLIPS)),
            len: take(0),
        }
    }
}

/// The least length of the workspace of [`logits_ppo_loss`]: that of [`workspace_len`], and 16 bytes a token
/// where something of a whole row is looked at.
pub fn logits_workspace_len(batch: usize, tokens: usize, options: &PpoLossOptions) -> usize {
    let kept = if options.needs_rows() { tokens.saturating_mul(KEPT_OF_TOKENS) } else { 0 };
    workspace_len(batch, tokens, options).saturating_add(kept)
}

/// Numbers of a token that are kept between the passes over its logits: maximum, sum, and two gradients.
const KEPT_OF_TOKENS: usize = 4;

/// Numbers of a row for the extremes over rows.
const ROW_CLIPS: usize = 2;

/// Elements of f32 of the workspace that a row's terms take.
const ROW_TERMS: usize = size_of::<RowTerms>() / size_of::<f32>();

/// Loss, statistics and gradients, for an upstream gradient of 1, of `batch` rows of `seq_len` tokens, or with
/// offsets, of `seq_len` tokens in all. Reads the mask up to twice and every other input once.
///
/// `workspace` has [`workspace_len`] elements or more, of any content, and can be used again for the
/// next call on the same stream.
///
/// # Errors
/// If a length does not fit, an option is out of range, an input is missing that another one or an
/// option needs, there is no token and the denominator is not given, or a kernel cannot be launched.
pub fn ppo_loss(
    stream: &Stream,
    inputs: Inputs,
    batch: usize,
    seq_len: usize,
    options: &PpoLossOptions,
    mut outputs: Outputs,
    workspace: SliceMut<f32>,
) -> Result<()> {
    options.validate()?;
    let shape = BatchShape::new(batch, seq_len, inputs.offsets.is_some());
    let given = inputs.try_map(LossShape::new(shape, options), &mut Lengths(OP))?;
    inputs.check_given(options)?;
    outputs.try_map(shape, &mut Lengths(OP))?;
    let tokens = shape.count_tokens();
    outputs.check_wanted(&inputs, tokens)?;
    Error::check_workspace(OP, workspace.len(), workspace_len(batch, tokens, options))?;
    let counted = AllCounted::new(stream, &given, shape, options, &workspace)?;
    pass(stream, inputs, shape, options, outputs, &workspace, &counted)
}

/// Loss, statistics and the logits' gradient, for an upstream gradient of 1, of `batch` rows of `seq_len`
/// tokens, or with offsets, of `seq_len` in all, from their logits over `vocab` tokens: what [`logprob`](crate::logprob::cuda) and
/// [`ppo_loss`] give, of which the values have a loss of their own. Reads the logits from memory once,
/// and writes their gradient once, as far as a row fits a multiprocessor's shared memory or the rows in
/// work fit the L2 cache. Logits of masked tokens are not read.
///
/// The log-probabilities have the bits of [`logprob`](crate::logprob::cuda::forward)'s where a row has more
/// than 4 KiB, and for shorter ones those of another order of additions.
///
/// Where an option looks at a whole row, the logits are read twice, the second time when all
/// log-probabilities are there.
///
/// `workspace` has [`logits_workspace_len`] elements or more, of any content.
///
/// # Errors
/// As [`ppo_loss`], and of [`logprob`](crate::logprob::cuda::forward).
pub fn logits_ppo_loss<T: Logit, I: TokenId>(
    stream: &Stream,
    inputs: LogitsInputs<T, I>,
    [batch, seq_len, vocab]: [usize; 3],
    logprob_options: &LogprobOptions,
    options: &PpoLossOptions,
    mut outputs: LogitsOutputs<T>,
    workspace: SliceMut<f32>,
) -> Result<()> {
    logprob_options.validate()?;
    options.validate()?;
    let shape = BatchShape::new(batch, seq_len, inputs.offsets.is_some());
    let tokens = shape.count_tokens();
    check_logits(OP, inputs.logits.len(), tokens, vocab)?;
    let of_inputs = LossShape::new(shape, options);
    let given = inputs.try_map((of_inputs, vocab), &mut Lengths(OP))?;
    outputs.check_entropy(options)?;
    // SAFETY: outputs of a launch before the one that reads them as inputs, on the same stream.
    let [logp, entropy] = [Some(&outputs.logp), outputs.entropy.as_ref()].map(|written| {
        written.map(|written| unsafe { Slice::from_raw(written.as_mut_ptr(), written.len()) })
    });
    let logp = logp.expect("given");
    let wanted = outputs.try_map((shape, vocab), &mut Lengths(OP))?;
    let needed = logits_workspace_len(batch, tokens, options);
    Error::check_workspace(OP, workspace.len(), needed)?;
    let of_pass = Inputs {
        entropy,
        ref_logp: inputs.ref_logp,
        rollout_logp: inputs.rollout_logp,
        weights: inputs.weights,
        mask: inputs.mask,
        offsets: inputs.offsets,
        ..Inputs::new(logp, inputs.old_logp, inputs.advantages)
    };
    of_pass.check_given(options)?;
    // With options of whole rows all log-probabilities must be there before the first gradient: what of the
    // tokens is kept in between.
    let needs_rows = options.needs_rows();
    let kept_at = workspace.as_mut_ptr().wrapping_add(workspace_len(batch, tokens, options));
    let kept: [_; KEPT_OF_TOKENS] = from_fn(|which| kept_at.wrapping_add(which * tokens));
    let [max, log_sum, grad_logp, grad_entropy] = kept;

    let of_rows = of_pass.try_map(of_inputs, &mut Lengths(OP))?;
    let counted = AllCounted::new(stream, &of_rows, shape, options, &workspace)?;
    if tokens > 0 {
        let device = stream.device();
        let rows = Reduction::side_by_side::<T>(device, tokens, vocab, MOST_PARTS);
        let at_once = LOGITS_THREADS / rows.block_threads();
        // The row, or what a block of so many can have.
        let room = (device.shared_bytes as usize / at_once).saturating_sub(LOGITS_SHARED);
        let kept = vocab.saturating_mul(size_of::<T>()).min(room) / 16 * 16;
        let forward_inputs = ForwardInputs { logits: given.logits, targets: given.targets };
        let forward_outputs = ForwardOutputs {
            entropy: wanted.entropy,
            max: needs_rows.then(|| Pointer::new(max)),
            log_sum: needs_rows.then(|| Pointer::new(log_sum)),
            ..ForwardOutputs::new(wanted.logp)
        };
        let args = LogitsArgs::<Pointers, T, I> {
            forward: ForwardArgs::new(
                forward_inputs,
                tokens,
                Columns::all(vocab),
                logprob_options,
                forward_outputs,
                &rows,
            ),
            old_logp: given.old_logp,
            advantages: given.advantages,
            ref_logp: match options.kl_against {
                KlAgainst::Reference => given.ref_logp,
                KlAgainst::Old => Some(given.old_logp),
                KlAgainst::Rollout => given.rollout_logp,
            },
            weights: given.weights,
            mask: given.mask,
            offsets: given.offsets,
            row_weights: counted.terms.row_weights,
            grad_logits: (!needs_rows).then_some(wanted.grad_logits),
            divisor: counted.terms.divisor,
            entropy_divisor: counted.entropy,
            entropy_coef: options.entropy_coef,
            kl_coef: options.kl_coef,
            batch: batch as i64,
            columns: seq_len as i64,
            kept_groups: (kept / 16) as i32,
            entropy_own_mean: i32::from(options.entropy_own_mean),
            per_row: PerRow::new(options),
            clip: Clip::new(options),
            kl: TokenKl::new(&options.kl),
            family: Family::new(options),
        };
        // No more than run at once, so that a row is in L2 still when it is read again.
        let blocks = tokens.min((at_once * device.multiprocessors as usize).max(1));
        let launch = Launch::new(device, blocks, rows.block_threads()).with_shared(kept);
        stream.launch(&Kernel { op: OP, pass: "from_logits", dtype: T::NAME }, launch, &args)?;
    }
    let mut of_loss = Outputs { loss: outputs.loss, ..Outputs::new(outputs.stats) };
    if !needs_rows {
        return pass(stream, of_pass, shape, options, of_loss, &workspace, &counted);
    }
    let wants_entropy = options.entropy_coef != 0.0;
    // SAFETY: parts of the workspace, which is as long, that nothing else uses.
    let written = |kept| unsafe { SliceMut::from_raw(kept, tokens) };
    of_loss.grad_logp = Some(written(grad_logp));
    of_loss.grad_entropy = wants_entropy.then(|| written(grad_entropy));
    pass(stream, of_pass, shape, options, of_loss, &workspace, &counted)?;
    // SAFETY: outputs of launches before the one that reads them as inputs, on the same stream.
    let known = |kept: *mut f32| unsafe { Slice::from_raw(kept, tokens) };
    let forward = logprob::cuda::ForwardInputs { logits: inputs.logits, targets: inputs.targets };
    let of_backward = logprob::cuda::BackwardInputs {
        entropy,
        grad_logp: Some(known(grad_logp)),
        grad_entropy: wants_entropy.then(|| known(grad_entropy)),
        ..logprob::cuda::BackwardInputs::new(forward, known(max), known(log_sum))
    };
    let gradient = logprob::cuda::BackwardOutputs { grad_logits: outputs.grad_logits };
    logprob::cuda::backward(stream, of_backward, tokens, vocab, logprob_options, gradient)
}

/// The pass over the tokens, and the merge of what its blocks found.
fn pass(
    stream: &Stream,
    inputs: Inputs,
    shape: BatchShape,
    options: &PpoLossOptions,
    mut outputs: Outputs,
    workspace: &SliceMut<f32>,
    counted: &AllCounted,
) -> Result<()> {
    let tokens = shape.count_tokens();
    let mut inputs = inputs.try_map(LossShape::new(shape, options), &mut Lengths(OP))?;
    let outputs = outputs.try_map(shape, &mut Lengths(OP))?;
    let (part_tiles, parts) = parts(tokens);
    let aligned = Aligned::all(&inputs, outputs, shape, options);
    let room = Room::new(shape.batch(), tokens, options);
    let row_terms = match options.needs_rows() && tokens > 0 {
        true => rows(stream, &inputs, shape, options, workspace, counted, aligned)?,
        false => null(),
    };
    // To the kernels it is all the same what the KL is against.
    inputs.ref_logp = match options.kl_against {
        KlAgainst::Reference => inputs.ref_logp,
        KlAgainst::Old => Some(inputs.old_logp),
        KlAgainst::Rollout => inputs.rollout_logp,
    };
    let args = PassArgs {
        inputs,
        outputs,
        row_weights: counted.terms.row_weights,
        row_terms,
        row_clips: match options.row_extremes {
            true => workspace.as_mut_ptr().wrapping_add(room.row_clips),
            false => null_mut(),
        },
        partials: workspace.as_mut_ptr(),
        divisor: counted.terms.divisor,
        entropy_divisor: counted.entropy,
        value_coef: options.value_coef,
        entropy_coef: options.entropy_coef,
        kl_coef: options.kl_coef,
        tokens: tokens as i64,
        rows: shape.batch() as i64,
        columns: shape.seq_len() as i64,
        parts: parts as i32,
        part_tiles: part_tiles as i32,
        aligned: i32::from(aligned),
        entropy_own_mean: i32::from(options.entropy_own_mean),
        per_row: PerRow::new(options),
        count_outside: i32::from(options.clip_fraction == ClipFractionKind::RatioOutside),
        value_range: limit(options.value_clip_range),
        clip: Clip::new(options),
        kl: TokenKl::new(&options.kl),
        family: Family::new(options),
    };
    if parts > 0 {
        let more = inputs.entropy.is_some() || inputs.ref_logp.is_some();
        let is_plain = options.is_clip_of_tokens() && options.is_plain_kl();
        let is_family = inputs.weights.is_some() || options.advantages_per_row;
        let pass = if !is_plain || is_family {
            "pass_family"
        } else if more || !args.row_weights.is_null() {
            "pass_full"
        } else {
            "pass"
        };
        stream.launch_f32([OP, pass], parts, PASS_THREADS, &args)?;
    }
    if parts != 1 {
        stream.launch_f32([OP, "merge"], 1, MERGE_THREADS, &args)?;
    }
    if options.row_extremes {
        stream.launch_f32([OP, "row_clips"], shape.batch(), ROWS_THREADS, &args)?;
        stream.launch_f32([OP, "row_extremes"], 1, ROWS_THREADS, &args)?;
    }
    Ok(())
}

/// The numbers that the tokens of each row share, where the pass finds them.
fn rows(
    stream: &Stream,
    inputs: &super::Inputs<Pointers>,
    shape: BatchShape,
    options: &PpoLossOptions,
    workspace: &SliceMut<f32>,
    counted: &AllCounted,
    aligned: bool,
) -> Result<*const RowTerms> {
    let batch = shape.batch();
    let room = Room::new(batch, shape.count_tokens(), options);
    let row_terms: *mut RowTerms = workspace.as_mut_ptr().wrapping_add(room.row_terms).cast();
    let args = RowsArgs {
        logp: inputs.logp,
        old_logp: inputs.old_logp,
        advantages: inputs.advantages,
        rollout_logp: inputs.rollout_logp.unwrap_or(inputs.old_logp),
        weights: inputs.weights,
        mask: inputs.mask,
        offsets: inputs.offsets,
        row_weights: counted.terms.row_weights,
        row_terms,
        off_policy_threshold: options.off_policy_threshold.unwrap_or(f64::INFINITY),
        rows: batch as i64,
        columns: shape.seq_len() as i64,
        aligned: i32::from(aligned),
        per_row: PerRow::new(options),
        of_mean: i32::from(options.ratio == RatioLevel::SequenceMean),
        clip: Clip::new(options),
        family: Family::new(options),
    };
    stream.launch_f32([OP, "rows"], batch, ROWS_THREADS, &args)?;
    Ok(row_terms)
}

/// The counts of mask and offsets, for the kernels: D, and the weights of rows, if they have any.
struct Counted {
    divisor: Divisor,
    row_weights: *const f32,
}

/// The counts of all terms, and of an entropy that has a mean of its own.
struct AllCounted {
    terms: Counted,
    /// The divisor of the entropy: that of all terms, if there is no other.
    entropy: Divisor,
}

impl AllCounted {
    fn new(
        stream: &Stream,
        inputs: &super::Inputs<Pointers>,
        shape: BatchShape,
        options: &PpoLossOptions,
        workspace: &SliceMut<f32>,
    ) -> Result<Self> {
        let Room { counts, longest, entropy_counts, weights, .. } =
            Room::new(shape.batch(), shape.count_tokens(), options);
        let [counts, longest, entropy_counts, weights] = [counts, longest, entropy_counts, weights]
            .map(|first| workspace.as_mut_ptr().wrapping_add(first));
        let terms = Counted::new(stream, inputs, shape, options, [counts, longest, weights])?;
        let by_tokens =
            PpoLossOptions { aggregation: Aggregation::TokenMean, denominator: None, ..*options };
        let is_same = options.aggregation == by_tokens.aggregation && options.denominator.is_none();
        let entropy = match options.entropy_own_mean && !is_same && shape.count_tokens() > 0 {
            true => {
                let rooms = [entropy_counts, null_mut(), null_mut()];
                Counted::new(stream, inputs, shape, &by_tokens, rooms)?.divisor
            }
            false => terms.divisor,
        };
        Ok(Self { terms, entropy })
    }
}

impl Counted {
    /// Looks at them, if D or the weights depend on them. The parts of the workspace are for counts, longest
    /// rows and weights.
    fn new(
        stream: &Stream,
        inputs: &super::Inputs<Pointers>,
        shape: BatchShape,
        options: &PpoLossOptions,
        [counts, longest, weights]: [*mut f32; 3],
    ) -> Result<Self> {
        let tokens = shape.count_tokens();
        let by_tokens = options.aggregation == Aggregation::TokenMean;
        // What of rows is not known here, of a pack's is neither.
        let unknown = inputs.mask.is_some() || (shape.is_packed() && !by_tokens);
        let unknown = unknown && tokens > 0;
        let given = given_divisor(unknown, shape, options)?;
        let needs_longest = shape.is_packed() && tokens > 0 && options.needs_length();
        let mut counted = Self {
            divisor: Divisor {
                given: given.unwrap_or(0.0),
                factor: match options.aggregation {
                    Aggregation::SeqMeanTokenSumNormRows if !needs_longest => {
                        shape.seq_len() as f64
                    }
                    _ => 1.0,
                },
                counts: null(),
                longest: null(),
                parts: 0,
                needs_tokens: i32::from(options.needs_tokens()),
            },
            row_weights: null(),
        };
        let depends = given.is_none() || needs_longest;
        if let Some(counting) = Counting::new(unknown, shape, options, depends) {
            let args = CountArgs {
                mask: inputs.mask,
                offsets: inputs.offsets.filter(|_| counting.count_rows),
                counts: counts.cast(),
                longest: if needs_longest { longest.cast() } else { null_mut() },
                row_weights: if counting.weights { weights } else { null_mut() },
                tokens: tokens as i64,
                width: counting.width as i64,
                rows: counting.rows as i64,
                part_rows: counting.part_rows as i64,
                parts: counting.parts as i32,
                team: counting.team as i32,
                count_rows: i32::from(counting.count_rows),
            };
            stream.launch_f32([OP, "count"], counting.parts, COUNT_THREADS, &args)?;
            counted.row_weights = args.row_weights;
            counted.divisor.counts = counts.cast();
            counted.divisor.longest = args.longest;
            counted.divisor.parts = args.parts;
        }
        Ok(counted)
    }
}

/// Writes the stored gradients, of `tokens` elements each, times `upstream`, the gradient of whatever
/// came of the loss. Each may be written to where it is stored; where `upstream` is 1, that costs
/// nothing. A 0 stays 0, whatever `upstream` is.
///
/// # Errors
/// If a length does not fit, a gradient is stored that is not wanted, or the other way round, or the
/// kernel cannot be launched.
pub fn scale(
    stream: &Stream,
    inputs: ScaleInputs,
    tokens: usize,
    mut outputs: ScaleOutputs,
) -> Result<()> {
    let inputs = inputs.try_map(tokens, &mut Lengths(OP))?;
    let outputs = outputs.try_map(tokens, &mut Lengths(OP))?;
    inputs.check_pairs(&outputs)?;
    let wanted = [outputs.grad_logp, outputs.grad_values, outputs.grad_entropy];
    if tokens == 0 || wanted.iter().all(Option::is_none) {
        return Ok(());
    }
    let args = ScaleArgs { inputs, outputs, tokens: tokens as i64 };
    let blocks = tokens.div_ceil(SCALE_THREADS * SCALE_IN_FLIGHT);
    stream.launch_f32([OP, "scale"], blocks, SCALE_THREADS, &args)
}

/// The denominator, as far as it is known here: `None` if it depends on the mask, or on the offsets of a
/// pack. Where rows have weights, but all the same one, that is in it; the length of the longest row is not.
fn given_divisor(
    unknown: bool,
    shape: BatchShape,
    options: &PpoLossOptions,
) -> Result<Option<f64>> {
    let (batch, seq_len) = (shape.batch(), shape.seq_len());
    let rows = if seq_len > 0 { batch } else { 0 };
    let counts_tokens = options.aggregation == Aggregation::TokenMean;
    let counted = counts_tokens || options.aggregation.counts_rows();
    if unknown && counted && options.denominator.is_none() {
        return Ok(None);
    }
    let length = if shape.is_packed() { 1 } else { seq_len };
    let divisor = options.divisor(shape.count_tokens(), rows, [batch, length])?;
    let same_weights = !unknown && options.aggregation.has_row_weights();
    Ok(Some(if same_weights { divisor * seq_len.max(1) as f64 } else { divisor }))
}

/// A look at the mask before the pass. A "row" of it is a row of the batch, or where only tokens
/// are counted, some run of bytes.
struct Counting {
    width: usize,
    rows: usize,
    part_rows: usize,
    parts: usize,
    /// Threads that share a row.
    team: usize,
    count_rows: bool,
    weights: bool,
}

impl Counting {
    /// `None` where nothing is left to count before the pass.
    fn new(
        unknown: bool,
        shape: BatchShape,
        options: &PpoLossOptions,
        divisor_depends: bool,
    ) -> Option<Self> {
        let weights = options.aggregation.has_row_weights();
        if !unknown || (!weights && !divisor_depends) {
            return None;
        }
        let (tokens, batch) = (shape.count_tokens(), shape.batch());
        if options.aggregation == Aggregation::TokenMean {
            if tokens <= COUNT_IN_PASS {
                return None;
            }
            let width = tokens.div_ceil(COUNT_PARTS).next_multiple_of(16).max(COUNT_BYTES);
            let parts = tokens.div_ceil(width);
            let (part_rows, team, count_rows) = (1, COUNT_THREADS, false);
            return Some(Self { width, rows: parts, part_rows, parts, team, count_rows, weights });
        }
        // Of a pack the mean.
        let (width, rows) = (tokens.div_ceil(batch), batch);
        let part_rows = rows.div_ceil(COUNT_PARTS);
        let parts = rows.div_ceil(part_rows);
        let lanes = width.div_ceil(16).next_power_of_two().min(WARP);
        let team = if width > WARP_ROW { COUNT_THREADS } else { lanes };
        Some(Self { width, rows, part_rows, parts, team, count_rows: true, weights })
    }
}

/// Whether everything with a value a token begins where vectors of four tokens do.
struct Aligned {
    tokens: Option<usize>,
    so_far: bool,
}

impl Aligned {
    fn all(
        inputs: &super::Inputs<Pointers>,
        mut outputs: super::Outputs<Pointers>,
        shape: BatchShape,
        options: &PpoLossOptions,
    ) -> bool {
        let mut aligned = Self { tokens: Some(shape.count_tokens()), so_far: true };
        let of_inputs = LossShape::new(shape, options);
        let (Ok(_), Ok(_)) =
            (inputs.try_map(of_inputs, &mut aligned), outputs.try_map(shape, &mut aligned));
        aligned.so_far
    }

    fn look_at<T>(&mut self, array: &Array, pointer: Pointer<T>) -> Result<(), Infallible> {
        // What else there is has one element; where that is all the tokens, none are loaded by vectors.
        if array.len() == self.tokens && array.name != "offsets" {
            self.so_far &= (pointer.as_ptr() as usize).is_multiple_of(4 * size_of::<T>());
        }
        Ok(())
    }
}

impl Reads<Pointers, Nowhere> for Aligned {
    type Error = Infallible;

    fn input<T: Element>(&mut self, a: &Array, from: &Pointer<T>) -> Result<(), Infallible> {
        self.look_at(a, *from)
    }
}

impl Writes<Pointers, Nowhere> for Aligned {
    type Error = Infallible;

    fn output<T: Element>(&mut self, a: &Array, to: &mut Pointer<T>) -> Result<(), Infallible> {
        self.look_at(a, *to)
    }
}

/// Where the kernels have the denominator from.
#[repr(C)]
#[derive(Clone, Copy)]
struct Divisor {
    given: f64,
    factor: f64,
    counts: *const u32,
    longest: *const u32,
    parts: i32,
    needs_tokens: i32,
}

/// Which inputs are of rows.
#[repr(C)]
#[derive(Clone, Copy)]
struct PerRow {
    advantages: i32,
    weights: i32,
}

impl PerRow {
    fn new(options: &PpoLossOptions) -> Self {
        Self {
            advantages: i32::from(options.advantages_per_row),
            weights: i32::from(options.weights_per_row),
        }
    }
}

/// The struct of that name in `kernels/common/policy.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Clip {
    log_ratio_limit: f32,
    low: f32,
    high: f32,
    dual_clip: f32,
}

impl Clip {
    fn new(options: &PpoLossOptions) -> Self {
        let (low, high) = options.ratio_bounds();
        Self {
            log_ratio_limit: limit(options.log_ratio_clamp),
            low: low as f32,
            high: high as f32,
            dual_clip: limit(options.dual_clip),
        }
    }
}

/// The struct of that name in `kernels/common/policy.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Family {
    surrogate: Surrogate,
    of_rows: i32,
    spreads: i32,
    trust_region: TrustRegion,
    region_by_advantage: i32,
    kl_reverse: i32,
    kl_ratio: KlRatio,
    kl_weighted: i32,
    ratio_cap: f32,
    tau_pos: f32,
    tau_neg: f32,
    gamma_k_pos: f32,
    gamma_lambda_pos: f32,
    gamma_k_neg: f32,
    gamma_lambda_neg: f32,
    region_low: f32,
    region_high: f32,
    kl_ratio_cap: f32,
}

impl Family {
    fn new(options: &PpoLossOptions) -> Self {
        let by_advantage = options.trust_region_sides == TrustRegionSides::ByAdvantage;
        Self {
            surrogate: options.surrogate,
            of_rows: i32::from(options.ratio != RatioLevel::Token),
            spreads: i32::from(options.spreads()),
            trust_region: options.trust_region,
            region_by_advantage: i32::from(by_advantage),
            kl_reverse: i32::from(options.kl_gradient == KlGradient::Reverse),
            kl_ratio: options.kl_ratio,
            kl_weighted: i32::from(options.kl_weighted),
            ratio_cap: limit(options.ratio_cap),
            tau_pos: options.soft_gate_tau_pos as f32,
            tau_neg: options.soft_gate_tau_neg as f32,
            gamma_k_pos: options.gamma_k_pos as f32,
            gamma_lambda_pos: options.gamma_lambda_pos as f32,
            gamma_k_neg: options.gamma_k_neg as f32,
            gamma_lambda_neg: options.gamma_lambda_neg as f32,
            region_low: options.trust_region_low as f32,
            region_high: options.trust_region_high as f32,
            kl_ratio_cap: limit(options.kl_ratio_cap),
        }
    }
}

/// The numbers that the tokens of a row share.
#[repr(C)]
#[derive(Clone, Copy)]
struct RowTerms {
    log_ratio: f32,
    spread: f32,
    off_policy: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RowsArgs<'a, S: Space> {
    logp: S::In<'a, f32>,
    old_logp: S::In<'a, f32>,
    advantages: S::In<'a, f32>,
    rollout_logp: S::In<'a, f32>,
    weights: Option<S::In<'a, f32>>,
    mask: Option<S::In<'a, u8>>,
    offsets: Option<S::In<'a, i64>>,
    row_weights: *const f32,
    row_terms: *mut RowTerms,
    off_policy_threshold: f64,
    rows: i64,
    columns: i64,
    aligned: i32,
    per_row: PerRow,
    of_mean: i32,
    clip: Clip,
    family: Family,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PassArgs<'a> {
    inputs: super::Inputs<'a, Pointers>,
    outputs: super::Outputs<'a, Pointers>,
    row_weights: *const f32,
    row_terms: *const RowTerms,
    partials: *mut f32,
    divisor: Divisor,
    value_coef: f64,
    entropy_coef: f64,
    kl_coef: f64,
    tokens: i64,
    rows: i64,
    columns: i64,
    parts: i32,
    part_tiles: i32,
    aligned: i32,
    count_outside: i32,
    value_range: f32,
    clip: Clip,
    kl: TokenKl,
    family: Family,
    row_clips: *mut f32,
    entropy_divisor: Divisor,
    entropy_own_mean: i32,
    per_row: PerRow,
}

/// Without the op's own lists: what the log-probabilities take of them is in their arguments.
#[repr(C)]
#[derive(Clone, Copy)]
struct LogitsArgs<'a, S: Space, T: Element, I: Element> {
    forward: ForwardArgs<'a, T, I>,
    old_logp: S::In<'a, f32>,
    advantages: S::In<'a, f32>,
    ref_logp: Option<S::In<'a, f32>>,
    weights: Option<S::In<'a, f32>>,
    mask: Option<S::In<'a, u8>>,
    offsets: Option<S::In<'a, i64>>,
    row_weights: *const f32,
    grad_logits: Option<S::Out<'a, T>>,
    divisor: Divisor,
    entropy_divisor: Divisor,
    entropy_coef: f64,
    kl_coef: f64,
    batch: i64,
    columns: i64,
    kept_groups: i32,
    entropy_own_mean: i32,
    per_row: PerRow,
    clip: Clip,
    kl: TokenKl,
    family: Family,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CountArgs<'a, S: Space> {
    mask: Option<S::In<'a, u8>>,
    offsets: Option<S::In<'a, i64>>,
    counts: *mut u32,
    longest: *mut u32,
    row_weights: *mut f32,
    tokens: i64,
    width: i64,
    rows: i64,
    part_rows: i64,
    parts: i32,
    team: i32,
    count_rows: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ScaleArgs<'a> {
    inputs: super::ScaleInputs<'a, Pointers>,
    outputs: super::ScaleOutputs<'a, Pointers>,
    tokens: i64,
}

// SAFETY: each has the kernels' fields, in order; tests/kernel_arguments.rs compares them.
unsafe impl Args for PassArgs<'_> {}
unsafe impl Args for RowsArgs<'_, Pointers> {}
unsafe impl<T: Element, I: Element> Args for LogitsArgs<'_, Pointers, T, I> {}
unsafe impl Args for CountArgs<'_, Pointers> {}
unsafe impl Args for ScaleArgs<'_> {}
