//! Launches of `kernels/ppo_loss.cu` on device memory and the caller's stream. Nothing is allocated
//! and nothing waits for the device.
//!
//! Refuses what [`cpu`](mod@super::cpu) refuses, but for masks: to look at them here would cost a
//! wait. Where the mask keeps no token and the denominator is not given, the loss comes out as NaN,
//! and the gradients as 0.
//!
//! Up to three launches: a look at the mask alone, if the denominator or the weights of the rows
//! depend on it; the pass over the tokens; and one that adds up what its blocks found. Up to 4096
//! tokens take a single one, or two where rows are counted.

use std::ptr::{null, null_mut};

use super::{
    check_gradients, Aggregation, ClipFractionKind, Lengths, PpoLossOptions, PpoStats, OP,
};
use crate::cuda::{Args, Kernel, Launch, Slice, SliceMut, Stream};
use crate::error::{Error, Result};
use crate::kl::cuda::TokenKl;

/// Tokens that a block of the pass takes at a time.
const TILE: usize = 1024;

/// How many tiles a block adds up, by how many there are. It must not depend on the device: it
/// decides the order of additions.
struct Geometry {
    max_tiles: usize,
    part_tiles: usize,
}

/// A single part needs no merge; up to 1024 parts are merged in no time; and a thread adds up no
/// more than 128 tokens in f32.
const PARTS: [Geometry; 7] = [
    Geometry { max_tiles: 4, part_tiles: 4 },
    Geometry { max_tiles: 1 << 10, part_tiles: 1 },
    Geometry { max_tiles: 2 << 10, part_tiles: 2 },
    Geometry { max_tiles: 4 << 10, part_tiles: 4 },
    Geometry { max_tiles: 8 << 10, part_tiles: 8 },
    Geometry { max_tiles: 16 << 10, part_tiles: 16 },
    Geometry { max_tiles: usize::MAX, part_tiles: 32 },
];

/// Tiles of a part, and how many parts there are.
fn parts(tokens: usize) -> (usize, usize) {
    let tiles = tokens.div_ceil(TILE);
    let last = PARTS.len() - 1;
    let entry = PARTS.iter().find(|entry| tiles <= entry.max_tiles).unwrap_or(&PARTS[last]);
    (entry.part_tiles, tiles.div_ceil(entry.part_tiles))
}

/// Values of f32 that a part leaves for the merge, which has a warp for each.
const SUMS: usize = 24;

const WARP: usize = 32;

/// Threads of a block, by what it does.
const PASS_THREADS: u32 = 256;
const COUNT_THREADS: usize = 512;
const MERGE_THREADS: u32 = (SUMS * WARP) as u32;
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

/// The inputs of the value term, each `[batch * seq_len]`.
#[derive(Clone, Copy)]
pub struct ValueInputs<'a> {
    /// The critic's predictions, which get the gradient.
    pub values: Slice<'a, f32>,
    /// Its predictions at the time of the rollout; may be `None` when values are not clipped.
    pub old_values: Option<Slice<'a, f32>>,
    /// The targets of the regression.
    pub returns: Slice<'a, f32>,
}

/// The inputs of the loss, each `[batch * seq_len]`, row by row; as those of the
/// [CPU](super::Inputs).
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// B, the number of responses.
    pub batch: usize,
    /// T, the length they are padded to.
    pub seq_len: usize,
    /// Log-probabilities under the policy that is trained, which get the gradient.
    pub logp: Slice<'a, f32>,
    /// Log-probabilities under the policy that made the rollout.
    pub old_logp: Slice<'a, f32>,
    /// Advantages, already whitened if they are to be.
    pub advantages: Slice<'a, f32>,
    /// For the value term.
    pub value: Option<ValueInputs<'a>>,
    /// Entropy of the policy's distribution at each token, which gets the gradient.
    pub entropy: Option<Slice<'a, f32>>,
    /// Log-probabilities under the reference model, for the KL term.
    pub ref_logp: Option<Slice<'a, f32>>,
    /// 0 masks a token out; `None` keeps all.
    pub mask: Option<Slice<'a, u8>>,
}

impl Inputs<'_> {
    fn lengths(&self) -> Lengths {
        let value = self.value.as_ref();
        let len = |slice: Option<Slice<f32>>| slice.map(|slice| slice.len());
        Lengths {
            batch: self.batch,
            seq_len: self.seq_len,
            logp: self.logp.len(),
            old_logp: self.old_logp.len(),
            advantages: self.advantages.len(),
            values: value.map(|v| v.values.len()),
            old_values: len(value.and_then(|v| v.old_values)),
            returns: value.map(|v| v.returns.len()),
            entropy: len(self.entropy),
            ref_logp: len(self.ref_logp),
            mask: self.mask.map(|mask| mask.len()),
        }
    }
}

/// Where the gradients go, each `[batch * seq_len]`; what is `None` is not computed.
#[derive(Default)]
pub struct Gradients<'a> {
    /// With respect to logp.
    pub logp: Option<SliceMut<'a, f32>>,
    /// With respect to values; only with values.
    pub values: Option<SliceMut<'a, f32>>,
    /// With respect to entropy; only with entropy.
    pub entropy: Option<SliceMut<'a, f32>>,
}

impl Gradients<'_> {
    fn each(&self) -> [Option<&SliceMut<'_, f32>>; GRADIENTS] {
        [self.logp.as_ref(), self.values.as_ref(), self.entropy.as_ref()]
    }

    fn lengths(&self) -> [Option<usize>; GRADIENTS] {
        self.each().map(|slice| slice.map(SliceMut::len))
    }

    fn pointers(&self) -> [*mut f32; GRADIENTS] {
        self.each().map(|slice| slice.map_or(null_mut(), SliceMut::as_mut_ptr))
    }
}

/// What [`ppo_loss`] left in the gradients.
#[derive(Clone, Copy, Default)]
pub struct StoredGradients<'a> {
    /// With respect to logp.
    pub logp: Option<Slice<'a, f32>>,
    /// With respect to values.
    pub values: Option<Slice<'a, f32>>,
    /// With respect to entropy.
    pub entropy: Option<Slice<'a, f32>>,
}

const GRADIENTS: usize = 3;

/// The least length of the workspace of [`ppo_loss`]: some 96 bytes for every 1024 tokens or more,
/// 1 KiB, and with [`Aggregation::SeqMeanTokenMean`] 4 bytes a row.
pub fn workspace_len(batch: usize, seq_len: usize, options: &PpoLossOptions) -> usize {
    let (_, parts) = parts(batch.saturating_mul(seq_len));
    let weights = match options.aggregation {
        Aggregation::SeqMeanTokenMean => batch,
        _ => 0,
    };
    SUMS.saturating_mul(parts).saturating_add(COUNT_PARTS).saturating_add(weights)
}

/// Loss, statistics and gradients, for an upstream gradient of 1. Reads the mask up to twice and
/// every other input once.
///
/// `stats` has [`PpoStats::LEN`] elements, in the order of [`PpoStats::NAMES`], so the first is the
/// loss; [`PpoStats::from_array`] makes the struct of them. `workspace` has [`workspace_len`]
/// elements or more, of any content, and can be used again for the next call on the same stream.
///
/// # Errors
/// If a length does not fit, an option is out of range or asks for an input that is missing, there
/// is no token and the denominator is not given, or a kernel cannot be launched.
pub fn ppo_loss(
    stream: &Stream,
    inputs: &Inputs,
    options: &PpoLossOptions,
    gradients: Gradients,
    stats: SliceMut<f32>,
    workspace: SliceMut<f32>,
) -> Result<()> {
    let tokens = inputs.lengths().validate(options)?;
    let (value, entropy) = (inputs.value, inputs.entropy);
    check_gradients(gradients.lengths(), tokens, value.is_some(), entropy.is_some())?;
    Error::check_len(OP, "stats", stats.len(), PpoStats::LEN)?;
    let needed = workspace_len(inputs.batch, inputs.seq_len, options);
    Error::check_workspace(OP, workspace.len(), needed)?;
    let given = given_divisor(inputs, options, tokens)?;

    let (part_tiles, parts) = parts(tokens);
    let partials = workspace.as_mut_ptr();
    let counts = partials.wrapping_add(SUMS * parts);
    let weights = counts.wrapping_add(COUNT_PARTS);
    let counting = Counting::new(inputs, options, given.is_none());
    let pointer = |slice: Option<Slice<f32>>| slice.map_or(null(), |slice| slice.as_ptr());
    let [grad_logp, grad_values, grad_entropy] = gradients.pointers();
    let off = |limit: Option<f64>| limit.map_or(f32::INFINITY, |limit| limit as f32);
    let (low, high) = options.ratio_bounds();
    let mut args = PassArgs {
        logp: inputs.logp.as_ptr(),
        old_logp: inputs.old_logp.as_ptr(),
        advantages: inputs.advantages.as_ptr(),
        values: pointer(value.map(|v| v.values)),
        old_values: pointer(value.and_then(|v| v.old_values)),
        returns: pointer(value.map(|v| v.returns)),
        entropy: pointer(entropy),
        ref_logp: pointer(inputs.ref_logp),
        mask: inputs.mask.map_or(null(), |mask| mask.as_ptr()),
        row_weights: null(),
        grad_logp,
        grad_values,
        grad_entropy,
        partials,
        stats: stats.as_mut_ptr(),
        divisor: Divisor {
            given: given.unwrap_or(0.0),
            counts: null(),
            parts: 0,
            needs_tokens: i32::from(needs_tokens(options)),
        },
        value_coef: options.value_coef,
        entropy_coef: options.entropy_coef,
        kl_coef: options.kl_coef,
        tokens: tokens as i64,
        columns: inputs.seq_len as i64,
        parts: parts as i32,
        part_tiles: part_tiles as i32,
        aligned: 0,
        count_outside: i32::from(options.clip_fraction == ClipFractionKind::RatioOutside),
        log_ratio_limit: off(options.log_ratio_clamp),
        low: low as f32,
        high: high as f32,
        dual_clip: off(options.dual_clip),
        value_range: off(options.value_clip_range),
        kl: TokenKl::new(&options.kl),
    };
    args.aligned = i32::from(args.is_aligned());

    let device = stream.device();
    let kernel = |pass| Kernel { op: OP, pass, dtype: "f32" };
    if let Some(counting) = counting {
        let launch = Launch::new(device, counting.parts, 1, COUNT_THREADS as u32);
        let count_args = CountArgs {
            mask: args.mask,
            counts: counts.cast(),
            row_weights: if counting.weights { weights } else { null_mut() },
            tokens: args.tokens,
            width: counting.width as i64,
            rows: counting.rows as i64,
            part_rows: counting.part_rows as i64,
            parts: counting.parts as i32,
            team: counting.team as i32,
            count_rows: i32::from(counting.count_rows),
        };
        stream.launch(&kernel("count"), launch, &count_args)?;
        args.row_weights = count_args.row_weights;
        args.divisor.counts = counts.cast();
        args.divisor.parts = count_args.parts;
    }
    if parts > 0 {
        let full = entropy.is_some() || inputs.ref_logp.is_some() || !args.row_weights.is_null();
        let pass = if full { "pass_full" } else { "pass" };
        stream.launch(&kernel(pass), Launch::new(device, parts, 1, PASS_THREADS), &args)?;
    }
    if parts != 1 {
        stream.launch(&kernel("merge"), Launch::new(device, 1, 1, MERGE_THREADS), &args)?;
    }
    Ok(())
}

/// Writes the stored gradients times `upstream [1]`, the gradient of whatever came of the loss.
/// Each may be written to where it is stored; where `upstream` is 1, that costs nothing. What is
/// `None` on one side must be `None` on the other. A 0 stays 0, whatever `upstream` is.
///
/// # Errors
/// If a length does not fit, or the kernel cannot be launched.
pub fn scale(
    stream: &Stream,
    upstream: Slice<f32>,
    stored: StoredGradients,
    gradients: Gradients,
) -> Result<()> {
    Error::check_len(OP, "upstream", upstream.len(), 1)?;
    let from = [stored.logp, stored.values, stored.entropy];
    let names = ["grad_logp", "grad_values", "grad_entropy"];
    for ((arg, from), len) in names.into_iter().zip(from).zip(gradients.lengths()) {
        let expected = from.map_or(0, |from| from.len());
        Error::check_len(OP, arg, len.unwrap_or(0), expected)?;
    }
    let tokens = from.map(|from| from.map_or(0, |from| from.len()));
    let most = tokens.into_iter().max().unwrap_or(0);
    if most == 0 {
        return Ok(());
    }
    let args = ScaleArgs {
        from: from.map(|from| from.map_or(null(), |from| from.as_ptr())),
        to: gradients.pointers(),
        tokens: tokens.map(|tokens| tokens as i64),
        factor: upstream.as_ptr(),
    };
    let blocks = most.div_ceil(SCALE_THREADS * SCALE_IN_FLIGHT);
    let launch = Launch::new(stream.device(), blocks, 1, SCALE_THREADS as u32);
    stream.launch(&Kernel { op: OP, pass: "scale", dtype: "f32" }, launch, &args)
}

/// The denominator, as far as it is known here: `None` if it depends on the mask. Where rows have
/// weights, but all the same one, that is in it.
fn given_divisor(inputs: &Inputs, options: &PpoLossOptions, tokens: usize) -> Result<Option<f64>> {
    let (batch, seq_len) = (inputs.batch, inputs.seq_len);
    let rows = if seq_len > 0 { batch } else { 0 };
    let counted = matches!(
        options.aggregation,
        Aggregation::TokenMean | Aggregation::SeqMeanTokenSum | Aggregation::SeqMeanTokenMean
    );
    let masked = inputs.mask.is_some() && tokens > 0;
    if masked && counted && options.denominator.is_none() {
        return Ok(None);
    }
    let divisor = options.divisor(tokens, rows, seq_len)?;
    let same_weights = !masked && options.aggregation == Aggregation::SeqMeanTokenMean;
    Ok(Some(if same_weights { divisor * seq_len.max(1) as f64 } else { divisor }))
}

/// Whether the loss of no token at all is undefined, and not 0.
fn needs_tokens(options: &PpoLossOptions) -> bool {
    options.denominator.is_none() && !matches!(options.aggregation, Aggregation::Constant(_))
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
    fn new(inputs: &Inputs, options: &PpoLossOptions, divisor_depends: bool) -> Option<Self> {
        let mask = inputs.mask.filter(|mask| mask.len() > 0)?;
        let weights = options.aggregation == Aggregation::SeqMeanTokenMean;
        if !weights && !divisor_depends {
            return None;
        }
        if options.aggregation == Aggregation::TokenMean {
            if mask.len() <= COUNT_IN_PASS {
                return None;
            }
            let width = mask.len().div_ceil(COUNT_PARTS).next_multiple_of(16).max(COUNT_BYTES);
            let parts = mask.len().div_ceil(width);
            let (part_rows, team, count_rows) = (1, COUNT_THREADS, false);
            return Some(Self { width, rows: parts, part_rows, parts, team, count_rows, weights });
        }
        let (width, rows) = (inputs.seq_len, inputs.batch);
        let part_rows = rows.div_ceil(COUNT_PARTS);
        let parts = rows.div_ceil(part_rows);
        let lanes = width.div_ceil(16).next_power_of_two().min(WARP);
        let team = if width > WARP_ROW { COUNT_THREADS } else { lanes };
        Some(Self { width, rows, part_rows, parts, team, count_rows: true, weights })
    }
}

/// As in the kernels, and so are the next three.
#[repr(C)]
#[derive(Clone, Copy)]
struct Divisor {
    given: f64,
    counts: *const u32,
    parts: i32,
    needs_tokens: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PassArgs {
    logp: *const f32,
    old_logp: *const f32,
    advantages: *const f32,
    values: *const f32,
    old_values: *const f32,
    returns: *const f32,
    entropy: *const f32,
    ref_logp: *const f32,
    mask: *const u8,
    row_weights: *const f32,
    grad_logp: *mut f32,
    grad_values: *mut f32,
    grad_entropy: *mut f32,
    partials: *mut f32,
    stats: *mut f32,
    divisor: Divisor,
    value_coef: f64,
    entropy_coef: f64,
    kl_coef: f64,
    tokens: i64,
    columns: i64,
    parts: i32,
    part_tiles: i32,
    aligned: i32,
    count_outside: i32,
    log_ratio_limit: f32,
    low: f32,
    high: f32,
    dual_clip: f32,
    value_range: f32,
    kl: TokenKl,
}

impl PassArgs {
    /// Whether everything with a value a token begins where vectors of four tokens do.
    fn is_aligned(&self) -> bool {
        let inputs = [
            self.logp,
            self.old_logp,
            self.advantages,
            self.values,
            self.old_values,
            self.returns,
            self.entropy,
            self.ref_logp,
        ];
        let gradients = [self.grad_logp, self.grad_values, self.grad_entropy];
        let mut values = inputs.into_iter().chain(gradients.map(<*mut f32>::cast_const));
        values.all(|pointer| (pointer as usize).is_multiple_of(16))
            && (self.mask as usize).is_multiple_of(4)
    }
}

// SAFETY: the fields of the kernels' struct, in order.
unsafe impl Args for PassArgs {}

#[repr(C)]
#[derive(Clone, Copy)]
struct CountArgs {
    mask: *const u8,
    counts: *mut u32,
    row_weights: *mut f32,
    tokens: i64,
    width: i64,
    rows: i64,
    part_rows: i64,
    parts: i32,
    team: i32,
    count_rows: i32,
}

// SAFETY: the fields of the kernels' struct, in order.
unsafe impl Args for CountArgs {}

#[repr(C)]
#[derive(Clone, Copy)]
struct ScaleArgs {
    from: [*const f32; GRADIENTS],
    to: [*mut f32; GRADIENTS],
    tokens: [i64; GRADIENTS],
    factor: *const f32,
}

// SAFETY: the fields of the kernels' struct, in order.
unsafe impl Args for ScaleArgs {}
