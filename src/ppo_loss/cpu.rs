//! The fused CPU implementation. The tokens are cut into blocks that stay in the cache; each term
//! walks its own inputs of a block once, for its loss, its gradient and its statistics. Sums are
//! kept in lanes of f32 within a block and in f64, over a fixed tree, between blocks.

use std::ops::Range;

use super::surrogate::{with_surrogate, Clip, Of, Token};
use super::{
    Aggregation, ClipFractionKind, KlAgainst, KlGradient, KlRatio, LossShape, PpoLossOptions,
    PpoStats, RatioLevel, Surrogate, TrustRegion, TrustRegionSides, OP,
};
use crate::cpu::math::{clip, count_nonzero, exp, exp_m1, select, sum_lanes, LANES};
use crate::cpu::store::CACHED;
use crate::cpu::{
    for_each, prefetch, reduce, reduce_by, vectorise, with_stores, Logit, Rows, RowsMut, Split,
    Stores, Tiles, TokenId,
};
use crate::error::{Error, Result};
use crate::kl::cpu::{binary_kl, k3_and_slope, probability_moved, TokenKl};
use crate::kl::limit;
use crate::logprob::{self, Columns, LogprobOptions};
use crate::memory::{in_space, Lengths};
use crate::moments::Moments;
use crate::pack::{BatchShape, RowRanges};

/// Tokens of a block: some 10 us of work, and a few hundred additions in f32.
const BLOCK_TOKENS: usize = 4096;

/// Tokens that one loop leaves to the next in the L1 cache.
const STRETCH: usize = 512;

/// How many tokens ahead of the loops memory is asked for. They do so much for a token that the
/// machine does not see far enough ahead by itself.
const AHEAD: isize = 512;

in_space!(
    Host: Inputs, Outputs, LogitsInputs<T, I>, LogitsOutputs<T>, ScaleInputs, ScaleOutputs
);

/// Loss, statistics and gradients, for an upstream gradient of 1, of `batch` rows of `seq_len` tokens, or with
/// offsets, of `seq_len` tokens in all. Reads the mask twice and every other input once; where something of a
/// whole row is needed, what makes it once more. Allocates some numbers a row then, and where the rows of a
/// pack have weights, and nothing otherwise.
///
/// # Errors
/// If a length does not fit, an option is out of range, an input is missing that another one or an
/// option needs, the offsets are not those of a [pack](crate::pack), a weight is negative, or no token is unmasked and the denominator is not given. Nothing is
/// written then.
pub fn ppo_loss(
    inputs: Inputs,
    batch: usize,
    seq_len: usize,
    options: &PpoLossOptions,
    mut outputs: Outputs,
) -> Result<()> {
    options.validate()?;
    let shape = BatchShape::new(batch, seq_len, inputs.offsets.is_some());
    inputs.try_map(LossShape::new(shape, options), &mut Lengths(OP))?;
    inputs.check_given(options)?;
    outputs.try_map(shape, &mut Lengths(OP))?;
    let ranges = RowRanges::new(OP, seq_len, inputs.offsets)?;
    let n = inputs.logp.len();
    outputs.check_wanted(&inputs, n)?;
    check_weights(inputs.weights, inputs.mask, options.weights_per_row.then_some(ranges))?;
    let (kept, rows) = count(inputs.mask, batch, ranges, options.aggregation);
    let divisor = options.divisor(kept, rows, [batch, ranges.longest(batch)])?;
    let entropy_divisor = options.entropy_divisor(kept, divisor);

    let terms = Terms::new(options, divisor, entropy_divisor);
    let has_row_weights = options.aggregation.has_row_weights();
    let [advantages_per_row, weights_per_row] =
        [options.advantages_per_row, options.weights_per_row && inputs.weights.is_some()];
    let per_row = advantages_per_row || weights_per_row;
    let splits = options.needs_rows() || (ranges.is_packed() && has_row_weights);
    let rows = match splits || per_row {
        true => terms.rows(&inputs, batch, ranges, options),
        false => Vec::new(),
    };
    let gradients = [&outputs.grad_logp, &outputs.grad_values, &outputs.grad_entropy];
    let bytes = |gradient: &Option<&mut [f32]>| gradient.as_deref().map_or(0, size_of_val);
    let stores = Stores::of(gradients.map(bytes).iter().sum());
    // The rows that a block has tokens of, by their numbers if those are needed.
    let sum_of_tokens =
        |block: Tokens, weight, rows| terms.sum(block, weight, rows, options, stores);
    let sum = |first: usize, block: Tokens, weight| {
        let rows = RowsOf { rows: &rows, first, ranges };
        match per_row {
            false => sum_of_tokens(block, weight, rows),
            true => block.with_numbers_of_rows(rows, weights_per_row, |block| {
                // Nothing else of rows leaves the loop as long as it is.
                let rows = if splits { rows } else { RowsOf { rows: &[], ..rows } };
                sum_of_tokens(block, weight, rows)
            }),
        }
    };
    let value = inputs.values.zip(inputs.returns);
    let tokens = Tokens {
        policy: (inputs.logp, inputs.old_logp),
        advantages: (!advantages_per_row).then_some(inputs.advantages),
        value: value.map(|(values, returns)| (values, inputs.old_values, returns)),
        entropy: inputs.entropy,
        against: against(&inputs, options),
        weights: inputs.weights.filter(|_| !weights_per_row),
        mask: inputs.mask,
        grad_logp: outputs.grad_logp,
        grad_values: outputs.grad_values,
        grad_entropy: outputs.grad_entropy,
    };
    let blocks = |from: usize, tokens: Tokens, weight: RowWeight| {
        let leaf = |first, _, block: Tokens| sum(from + first, block, weight);
        reduce(tokens.len(), BLOCK_TOKENS, tokens, leaf, Sums::merge)
    };
    let sums = if has_row_weights && ranges.is_packed() {
        blocks(0, tokens, RowWeight::OfRows)
    } else if has_row_weights && seq_len > BLOCK_TOKENS {
        let row = |first, len, row: Tokens| {
            let weight = 1.0 / count_kept(row.mask, len) as f32;
            blocks(first, row, RowWeight::Given(weight))
        };
        reduce(n, seq_len, tokens, row, Sums::merge)
    } else if has_row_weights && seq_len > 0 {
        let whole_rows = BLOCK_TOKENS / seq_len * seq_len;
        let leaf = |first, _, block: Tokens| sum(first, block, RowWeight::OneOverLength(seq_len));
        reduce(n, whole_rows, tokens, leaf, Sums::merge)
    } else {
        blocks(0, tokens, RowWeight::Given(1.0))
    };
    let mut stats = sums.stats(&inputs, options, [divisor, entropy_divisor]);
    if options.row_extremes {
        let [high_max, low_min] = terms.row_extremes(&inputs, &rows, batch, ranges, options);
        (stats.clip_high_row_max, stats.clip_low_row_min) = (high_max, low_min);
    }
    outputs.stats[0] = stats;
    if let Some(loss) = outputs.loss {
        loss[0] = stats.loss as f32;
    }
    Ok(())
}

/// Bytes of logits whose gradient a thread writes while they are in its cache.
const CACHED_LOGITS: usize = 512 << 10;

/// Loss, statistics and the logits' gradient, for an upstream gradient of 1, of `batch` rows of `seq_len`
/// tokens, or with offsets, of `seq_len` in all, from their logits over `vocab` tokens: what [`logprob`](logprob::cpu) and [`ppo_loss`] give, of
/// which the values have a loss of their own. Some rows of logits at a time are read twice, the second
/// time from the cache; where an option looks at a whole row, all of them twice from memory. Logits of masked
/// tokens are not read.
///
/// # Errors
/// As [`ppo_loss`], and of [`logprob`](logprob::cpu::forward). Nothing is written then.
pub fn logits_ppo_loss<T: Logit, I: TokenId>(
    inputs: LogitsInputs<T, I>,
    [batch, seq_len, vocab]: [usize; 3],
    logprob_options: &LogprobOptions,
    options: &PpoLossOptions,
    mut outputs: LogitsOutputs<T>,
) -> Result<()> {
    logprob_options.validate()?;
    options.validate()?;
    let shape = BatchShape::new(batch, seq_len, inputs.offsets.is_some());
    let tokens = shape.count_tokens();
    Error::check_logits(OP, inputs.logits.len(), tokens, vocab)?;
    inputs.try_map((LossShape::new(shape, options), vocab), &mut Lengths(OP))?;
    outputs.try_map((shape, vocab), &mut Lengths(OP))?;
    outputs.check_entropy(options)?;
    let LogitsInputs {
        logits,
        targets,
        old_logp,
        advantages,
        ref_logp,
        rollout_logp,
        weights,
        mask,
        offsets,
    } = inputs;
    let LogitsOutputs { logp, stats, grad_logits, mut entropy, loss } = outputs;
    let ranges = RowRanges::new(OP, seq_len, offsets)?;
    check_weights(weights, mask, options.weights_per_row.then_some(ranges))?;
    let (kept, rows) = count(mask, batch, ranges, options.aggregation);
    let divisor = options.divisor(kept, rows, [batch, ranges.longest(batch)])?;
    let entropy_divisor = options.entropy_divisor(kept, divisor);
    // Without what comes of the logits.
    let given = Inputs {
        ref_logp,
        rollout_logp,
        weights,
        mask,
        offsets,
        ..Inputs::new(&[], old_logp, advantages)
    };
    Inputs { entropy: entropy.as_deref(), ..given }.check_given(options)?;

    // Masked tokens are rows to ignore, by an id that no other token has: the others are looked at first.
    const IGNORED: i64 = -1;
    let mut ids = vec![IGNORED; tokens];
    for (row, (id, target)) in ids.iter_mut().zip(targets).enumerate() {
        let target = target.id();
        let masked = mask.is_some_and(|mask| mask[row] == 0);
        if masked || logprob_options.ignore_index == Some(target) {
            continue;
        }
        if !usize::try_from(target).is_ok_and(|column| column < vocab) {
            return Err(Error::Target { op: OP, row, target, vocab });
        }
        *id = target;
    }
    let logprob_options = LogprobOptions { ignore_index: Some(IGNORED), ..*logprob_options };
    let wants_entropy = options.entropy_coef != 0.0;
    let stores = Stores::of(size_of_val(grad_logits));
    let of_logits = OfLogits { vocab, options: &logprob_options, wants_entropy, stores };
    if options.needs_rows() {
        let forward = logprob::cpu::ForwardInputs { logits, targets: &ids };
        let mut kept = Kept::new(tokens);
        of_logits.forward(forward, logp, entropy.as_deref_mut(), &mut kept)?;
        let entropy = entropy.as_deref();
        let outputs = Outputs {
            loss,
            grad_logp: Some(&mut kept.grad_logp),
            grad_entropy: wants_entropy.then_some(&mut kept.grad_entropy),
            ..Outputs::new(stats)
        };
        ppo_loss(Inputs { logp, entropy, ..given }, batch, seq_len, options, outputs)?;
        return of_logits.backward(forward, entropy, &kept, grad_logits);
    }
    let row_weights: Vec<f64> = match options.aggregation.has_row_weights() {
        true => (0..batch)
            .map(|row| {
                let range = ranges.range(row);
                let mask = mask.map(|mask| &mask[range.clone()]);
                1.0 / count_kept(mask, range.len()) as f64
            })
            .collect(),
        false => Vec::new(),
    };
    // Of one token, before weight and denominator.
    let plain = PpoLossOptions {
        aggregation: Aggregation::Constant(1.0),
        denominator: None,
        entropy_own_mean: false,
        advantages_per_row: false,
        weights_per_row: false,
        row_extremes: false,
        ..*options
    };
    let of_tokens =
        |per_row: bool, numbers: &[f32]| per_row.then(|| spread_over_rows(numbers, batch, ranges));
    let of_rows = [
        of_tokens(options.advantages_per_row, advantages),
        weights.and_then(|weights| of_tokens(options.weights_per_row, weights)),
    ];
    let advantages = of_rows[0].as_deref().unwrap_or(advantages);
    let weights = of_rows[1].as_deref().or(weights);
    let at_once = CACHED_LOGITS / vocab.saturating_mul(size_of::<T>());
    let logits = Rows { data: logits, width: vocab };
    let grads = RowsMut { data: grad_logits, width: vocab };
    let items = (logits, grads, &mut *logp, entropy.as_deref_mut());
    let rows = |first: usize, count: usize, items: (Rows<T>, RowsMut<T>, &mut [f32], _)| {
        let (logits, grads, logp, mut entropy): (_, _, _, Option<&mut [f32]>) = items;
        let range = first..first + count;
        let forward =
            logprob::cpu::ForwardInputs { logits: logits.data, targets: &ids[range.clone()] };
        let mut kept = Kept::new(count);
        of_logits.forward(forward, logp, entropy.as_deref_mut(), &mut kept)?;

        let mut stats = [PpoStats::from_array([0.0; PpoStats::LEN])];
        let part = Inputs {
            entropy: entropy.as_deref().filter(|_| wants_entropy),
            ref_logp: ref_logp.map(|ref_logp| &ref_logp[range.clone()]),
            rollout_logp: rollout_logp.map(|rollout_logp| &rollout_logp[range.clone()]),
            weights: weights.map(|weights| &weights[range.clone()]),
            mask: mask.map(|mask| &mask[range.clone()]),
            ..Inputs::new(logp, &old_logp[range.clone()], &advantages[range.clone()])
        };
        let outputs = Outputs {
            grad_logp: Some(&mut kept.grad_logp),
            grad_entropy: wants_entropy.then_some(&mut kept.grad_entropy),
            ..Outputs::new(&mut stats)
        };
        ppo_loss(part, 1, count, &plain, outputs)?;
        for (i, t) in range.enumerate() {
            let weight = if row_weights.is_empty() { 1.0 } else { row_weights[ranges.row_of(t)] };
            let of_entropy = if options.entropy_own_mean { 1.0 } else { weight };
            for (gradient, factor) in [
                (&mut kept.grad_logp[i], weight / divisor),
                (&mut kept.grad_entropy[i], of_entropy / entropy_divisor),
            ] {
                *gradient = scaled(*gradient, factor as f32);
            }
        }
        of_logits.backward(forward, entropy.as_deref(), &kept, grads.data)
    };
    // All is checked, and no row fails.
    reduce(tokens, at_once, items, rows, Result::and)?;
    let inputs = Inputs { logp, entropy: entropy.as_deref(), ..given };
    ppo_loss(inputs, batch, seq_len, options, Outputs { loss, ..Outputs::new(stats) })
}

/// The statistics of tokens that are kept between the passes over their logits.
struct Kept {
    max: Vec<f32>,
    log_sum: Vec<f32>,
    grad_logp: Vec<f32>,
    grad_entropy: Vec<f32>,
}

impl Kept {
    fn new(tokens: usize) -> Self {
        let [max, log_sum, grad_logp, grad_entropy] = [(); 4].map(|()| vec![0.0; tokens]);
        Self { max, log_sum, grad_logp, grad_entropy }
    }
}

/// The passes over the logits of some tokens, before and after their loss.
struct OfLogits<'a> {
    vocab: usize,
    options: &'a LogprobOptions,
    wants_entropy: bool,
    stores: Stores,
}

impl OfLogits<'_> {
    fn forward<T: Logit>(
        &self,
        inputs: logprob::cpu::ForwardInputs<T, i64>,
        logp: &mut [f32],
        entropy: Option<&mut [f32]>,
        kept: &mut Kept,
    ) -> Result<()> {
        let tokens = logp.len();
        let outputs = logprob::cpu::ForwardOutputs {
            entropy,
            max: Some(&mut kept.max),
            log_sum: Some(&mut kept.log_sum),
            ..logprob::cpu::ForwardOutputs::new(logp)
        };
        logprob::cpu::forward(inputs, tokens, self.vocab, self.options, outputs)
    }

    fn backward<'a, T: Logit>(
        &self,
        forward: logprob::cpu::ForwardInputs<'a, T, i64>,
        entropy: Option<&'a [f32]>,
        kept: &'a Kept,
        grad_logits: &mut [T],
    ) -> Result<()> {
        let Kept { max, log_sum, grad_logp, grad_entropy } = kept;
        let inputs = logprob::cpu::BackwardInputs {
            entropy,
            grad_logp: Some(grad_logp),
            grad_entropy: self.wants_entropy.then_some(grad_entropy),
            ..logprob::cpu::BackwardInputs::new(forward, max, log_sum)
        };
        logprob::cpu::backward_of_part(
            inputs,
            grad_logp.len(),
            Columns::all(self.vocab),
            self.options,
            logprob::cpu::BackwardOutputs { grad_logits },
            self.stores,
        )
    }
}

/// Writes gradients of [`ppo_loss`] times `upstream`, the gradient of whatever came of the loss. A 0
/// stays 0, whatever `upstream` is.
///
/// # Errors
/// If a length does not fit, or a gradient is stored that is not wanted, or the other way round. Nothing
/// is written then.
pub fn scale(inputs: ScaleInputs, tokens: usize, mut outputs: ScaleOutputs) -> Result<()> {
    inputs.try_map(tokens, &mut Lengths(OP))?;
    outputs.try_map(tokens, &mut Lengths(OP))?;
    inputs.check_pairs(&outputs)?;
    let upstream = inputs.upstream[0];
    for (stored, gradient) in [
        (inputs.stored_logp, outputs.grad_logp),
        (inputs.stored_values, outputs.grad_values),
        (inputs.stored_entropy, outputs.grad_entropy),
    ] {
        let Some((stored, gradient)) = stored.zip(gradient) else {
            continue;
        };
        if upstream == 1.0 {
            gradient.copy_from_slice(stored);
            continue;
        }
        for_each(tokens, BLOCK_TOKENS, (stored, gradient), |_, _, (stored, gradient)| {
            vectorise(
                #[inline(always)]
                || {
                    for (g, &stored) in gradient.iter_mut().zip(stored) {
                        *g = scaled(stored, upstream);
                    }
                },
            );
        });
    }
    Ok(())
}

/// [`scale`] of a gradient where it is stored.
pub fn scale_in_place(upstream: f32, gradient: &mut [f32]) {
    if upstream == 1.0 {
        return;
    }
    for_each(gradient.len(), BLOCK_TOKENS, gradient, |_, _, gradient| {
        vectorise(
            #[inline(always)]
            || {
                for g in gradient {
                    *g = scaled(*g, upstream);
                }
            },
        );
    });
}

#[inline(always)]
fn scaled(gradient: f32, upstream: f32) -> f32 {
    select(gradient == 0.0, 0.0, gradient * upstream)
}

/// The log-probabilities that the KL term is against, if there are any.
fn against<'a>(inputs: &Inputs<'a>, options: &PpoLossOptions) -> Option<&'a [f32]> {
    match options.kl_against {
        KlAgainst::Reference => inputs.ref_logp,
        KlAgainst::Old => Some(inputs.old_logp),
        KlAgainst::Rollout => inputs.rollout_logp,
    }
}

/// Numbers for rows as numbers for tokens.
fn spread_over_rows(numbers: &[f32], batch: usize, ranges: RowRanges) -> Vec<f32> {
    let mut spread = vec![0.0; ranges.start(batch)];
    for (row, &number) in numbers.iter().enumerate() {
        spread[ranges.range(row)].fill(number);
    }
    spread
}

/// `Ok` when no unmasked token's weight is negative, or that of a row with one, where weights are of `rows`.
fn check_weights(
    weights: Option<&[f32]>,
    mask: Option<&[u8]>,
    rows: Option<RowRanges>,
) -> Result<()> {
    let Some(weights) = weights else {
        return Ok(());
    };
    let any = |_, _, part: &[f32]| {
        vectorise(
            #[inline(always)]
            || part.iter().fold(0, |any, &weight| any | u32::from(weight < 0.0)),
        )
    };
    if reduce(weights.len(), BLOCK_TOKENS, weights, any, |a, b| a | b) == 0 {
        return Ok(());
    }
    let is_kept = |t: usize| mask.is_none_or(|mask| mask[t] != 0);
    let counts = |i: usize| rows.map_or(is_kept(i), |rows| rows.range(i).any(is_kept));
    match (0..weights.len()).find(|&i| weights[i] < 0.0 && counts(i)) {
        Some(i) => Err(Error::Option {
            op: OP,
            option: "weights",
            expected: "0 or more".to_string(),
            got: format!("{} at {} {i}", weights[i], if rows.is_some() { "row" } else { "token" }),
        }),
        None => Ok(()),
    }
}

/// How many tokens are unmasked, and how many rows have one if the aggregation asks.
fn count(
    mask: Option<&[u8]>,
    batch: usize,
    ranges: RowRanges,
    aggregation: Aggregation,
) -> (usize, usize) {
    let tokens = ranges.start(batch);
    // Rows of nothing need no walk, however many there are.
    let batch = if tokens == 0 { 0 } else { batch };
    let Some(mask) = mask else {
        let rows = match ranges.is_packed() && aggregation.counts_rows() {
            true => (0..batch).filter(|&row| !ranges.range(row).is_empty()).count(),
            false => batch,
        };
        return (tokens, rows);
    };
    let add = |a: usize, b: usize| a + b;
    // A mask is one byte a token.
    let grain = 16 * BLOCK_TOKENS;
    let leaf = |_, len, part: &[u8]| count_kept(Some(part), len);
    let tokens = reduce(mask.len(), grain, mask, leaf, add);
    if !aggregation.counts_rows() {
        return (tokens, 0);
    }
    let keeps_any = |row: &usize| mask[ranges.range(*row)].iter().any(|&m| m != 0);
    let leaf = |first, count, ()| (first..first + count).filter(keeps_any).count();
    let cut = move |first, count| ranges.middle(first, count, grain);
    (tokens, reduce_by(batch, cut, (), leaf, add))
}

/// How many of the `len` tokens are unmasked.
fn count_kept(mask: Option<&[u8]>, len: usize) -> usize {
    match mask {
        Some(mask) => vectorise(
            #[inline(always)]
            || count_nonzero(mask),
        ),
        None => len,
    }
}

/// Values, old values and returns.
type Value<'a> = (&'a [f32], Option<&'a [f32]>, &'a [f32]);

/// A run of tokens: its part of every input and gradient.
struct Tokens<'a> {
    /// logp, old_logp.
    policy: (&'a [f32], &'a [f32]),
    /// `None`, as the weights, where they are of rows.
    advantages: Option<&'a [f32]>,
    value: Option<Value<'a>>,
    entropy: Option<&'a [f32]>,
    /// The log-probabilities that the KL term is against.
    against: Option<&'a [f32]>,
    weights: Option<&'a [f32]>,
    mask: Option<&'a [u8]>,
    grad_logp: Option<&'a mut [f32]>,
    grad_values: Option<&'a mut [f32]>,
    grad_entropy: Option<&'a mut [f32]>,
}

impl Tokens<'_> {
    fn len(&self) -> usize {
        self.policy.0.len()
    }

    /// Calls `f` with a block in which what is there of rows is there of tokens.
    fn with_numbers_of_rows<R>(
        self,
        rows: RowsOf,
        weights_per_row: bool,
        f: impl FnOnce(Tokens) -> R,
    ) -> R {
        let mut of_tokens = [[0.0; BLOCK_TOKENS]; 2];
        let len = self.len();
        let [advantages, weights] = of_tokens.each_mut().map(|numbers| &mut numbers[..len]);
        for (range, row) in rows.runs(len) {
            advantages[range.clone()].fill(row.advantage.unwrap_or_default());
            weights[range].fill(row.given_weight.unwrap_or_default());
        }
        f(Tokens {
            advantages: self.advantages.or(Some(advantages)),
            weights: if weights_per_row { Some(weights) } else { self.weights },
            ..self
        })
    }
}

impl Split for Tokens<'_> {
    fn split(self, mid: usize) -> (Self, Self) {
        let policy = self.policy.split(mid);
        let advantages = self.advantages.split(mid);
        let value = self.value.split(mid);
        let entropy = self.entropy.split(mid);
        let against = self.against.split(mid);
        let weights = self.weights.split(mid);
        let mask = self.mask.split(mid);
        let grad_logp = self.grad_logp.split(mid);
        let grad_values = self.grad_values.split(mid);
        let grad_entropy = self.grad_entropy.split(mid);
        (
            Self {
                policy: policy.0,
                advantages: advantages.0,
                value: value.0,
                entropy: entropy.0,
                against: against.0,
                weights: weights.0,
                mask: mask.0,
                grad_logp: grad_logp.0,
                grad_values: grad_values.0,
                grad_entropy: grad_entropy.0,
            },
            Self {
                policy: policy.1,
                advantages: advantages.1,
                value: value.1,
                entropy: entropy.1,
                against: against.1,
                weights: weights.1,
                mask: mask.1,
                grad_logp: grad_logp.1,
                grad_values: grad_values.1,
                grad_entropy: grad_entropy.1,
            },
        )
    }
}

/// The weight of a token in its aggregation, but for the denominator.
#[derive(Clone, Copy)]
enum RowWeight {
    /// This one.
    Given(f32),
    /// One over the number of unmasked tokens in the row, of rows of this length.
    OneOverLength(usize),
    /// The weight of its row, which is known.
    OfRows,
}

impl RowWeight {
    /// The weights of whole rows, or of any run of tokens but for `OneOverLength`; 0 where masked.
    fn write(self, mask: Option<&[u8]>, rows: RowsOf, weights: &mut [f32]) {
        match self {
            Self::Given(weight) => fill(weight, mask, weights),
            Self::OneOverLength(seq_len) => {
                for (row, weights) in weights.chunks_mut(seq_len).enumerate() {
                    let mask = mask.map(|mask| &mask[row * seq_len..][..seq_len]);
                    fill(1.0 / count_kept(mask, seq_len) as f32, mask, weights);
                }
            }
            Self::OfRows => {
                for (range, row) in rows.runs(weights.len()) {
                    let mask = mask.map(|mask| &mask[range.clone()]);
                    fill(row.weight, mask, &mut weights[range]);
                }
            }
        }
    }
}

/// Writes a weight for every token; 0 where masked.
fn fill(weight: f32, mask: Option<&[u8]>, weights: &mut [f32]) {
    let Some(mask) = mask else {
        weights.fill(weight);
        return;
    };
    // A copy: from behind a reference the compiler would gather what is one number.
    vectorise(
        #[inline(always)]
        move || {
            for (w, &m) in weights.iter_mut().zip(mask) {
                *w = if m != 0 { weight } else { 0.0 };
            }
        },
    );
}

/// One f32 for each lane.
type Lanes = [f32; LANES];

const ZERO: Lanes = [0.0; LANES];

/// Calls `body(at, full)` for every [`LANES`] of `len` tokens; the last may not be full. The compiler
/// makes two bodies of it, one of them without looks at the end.
#[inline(always)]
fn for_lanes(len: usize, mut body: impl FnMut(usize, bool)) {
    let rest = len % LANES;
    for at in (0..len - rest).step_by(LANES) {
        body(at, true);
    }
    if rest > 0 {
        body(len - rest, false);
    }
}

/// The lanes of `x` from `at` on; 0 past its end.
#[inline(always)]
fn load(x: &[f32], at: usize, full: bool) -> Lanes {
    let mut lanes = ZERO;
    if full {
        prefetch(&x[at..][..LANES], AHEAD);
        lanes.copy_from_slice(&x[at..][..LANES]);
    } else {
        lanes[..x.len() - at].copy_from_slice(&x[at..]);
    }
    lanes
}

/// Writes the lanes to `x` from `at` on, up to its end.
#[inline(always)]
fn store<const STORES: u8>(
    x: &mut [f32],
    at: usize,
    full: bool,
    lanes: Lanes,
    tiles: &mut Tiles<STORES>,
) {
    if full {
        if STORES == CACHED {
            prefetch(&x[at..][..LANES], AHEAD);
        }
        tiles.put_after(x, at, lanes);
    } else {
        let rest = x.len() - at;
        x[at..].copy_from_slice(&lanes[..rest]);
    }
}

/// Ends what [`store`] has written to `x`, all of it.
#[inline(always)]
fn end<const STORES: u8>(tiles: Tiles<STORES>, x: Option<&mut [f32]>) {
    if let Some(x) = x {
        let full = x.len() / LANES * LANES;
        tiles.end_after(x, full);
    }
}

#[inline(always)]
fn sum(lanes: Lanes) -> f64 {
    f64::from(sum_lanes(lanes))
}

/// The sum of what `lanes(at, full)` gives for every [`LANES`] of `len` tokens.
#[inline(always)]
fn sum_of(len: usize, lanes: impl Fn(usize, bool) -> [f64; LANES]) -> f64 {
    let mut total = [0.0; LANES];
    for_lanes(
        len,
        #[inline(always)]
        |at, full| {
            for (total, x) in total.iter_mut().zip(lanes(at, full)) {
                *total += x;
            }
        },
    );
    sum_lanes(total)
}

/// [`select`] of conditions.
#[inline(always)]
fn select_bool(condition: bool, yes: bool, no: bool) -> bool {
    (condition & yes) | (!condition & no)
}

#[inline(always)]
fn count_of(lanes: [u32; LANES]) -> f64 {
    f64::from(lanes.iter().sum::<u32>())
}

/// The rows of a batch of which a block of tokens is a part, from its token `first` on.
#[derive(Clone, Copy)]
struct RowsOf<'a> {
    /// None where nothing is needed of them.
    rows: &'a [Row],
    first: usize,
    ranges: RowRanges<'a>,
}

impl<'a> RowsOf<'a> {
    /// Runs of the block's tokens that are in one row, with what is known of that; one run where
    /// nothing is needed of rows.
    fn runs(self, len: usize) -> impl Iterator<Item = (Range<usize>, Row)> + use<'a> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let from = at;
            if from == len {
                return None;
            }
            if self.rows.is_empty() {
                at = len;
                return Some((from..len, Row::default()));
            }
            let row = self.ranges.row_of(self.first + from);
            at = len.min(self.ranges.start(row + 1) - self.first);
            Some((from..at, self.rows[row]))
        })
    }
}

/// The numbers that the tokens of a row share.
#[derive(Clone, Copy, Default)]
struct Row {
    /// The weight of its tokens in the aggregation, but for the denominator, where rows have one.
    weight: f32,
    /// The logarithm of the row's ratio, before the clamp.
    log_ratio: f32,
    /// The gradient that all tokens get of it.
    spread: f32,
    off_policy: bool,
    /// The row's own, where advantages and weights are of rows.
    advantage: Option<f32>,
    given_weight: Option<f32>,
}

impl Row {
    /// Copies of its own advantage and weight, as many as a block has of its tokens.
    fn copies(&self, tokens: usize) -> [Option<Vec<f32>>; 2] {
        [self.advantage, self.given_weight]
            .map(|number| number.map(|number| vec![number; tokens.min(BLOCK_TOKENS)]))
    }
}

/// A run of tokens, as the policy term's loop takes it.
#[derive(Clone, Copy)]
struct Run<'a> {
    logp: &'a [f32],
    old_logp: &'a [f32],
    advantages: &'a [f32],
    weights: Option<&'a [f32]>,
}

impl<'a> Run<'a> {
    /// The tokens of a row in a range of them. Where advantages and weights are of rows, `of_row` has at least
    /// as many copies of its own.
    fn of<'b: 'a>(
        inputs: &Inputs<'b>,
        tokens: Range<usize>,
        of_row: [Option<&'a [f32]>; 2],
    ) -> Self {
        let part = |x: &'b [f32], own: Option<&'a [f32]>| match own {
            Some(own) => &own[..tokens.len()],
            None => &x[tokens.clone()],
        };
        let Inputs { logp, old_logp, advantages, weights, .. } = *inputs;
        Self {
            logp: part(logp, None),
            old_logp: part(old_logp, None),
            advantages: part(advantages, of_row[0]),
            weights: weights.map(|weights| part(weights, of_row[1])),
        }
    }

    fn part(self, range: Range<usize>) -> Self {
        Run {
            logp: &self.logp[range.clone()],
            old_logp: &self.old_logp[range.clone()],
            advantages: &self.advantages[range.clone()],
            weights: self.weights.map(|weights| &weights[range]),
        }
    }
}

/// The sums of the policy term's loop, a lane each.
#[derive(Clone, Copy)]
struct PolicyLanes {
    loss: Lanes,
    clipped: [u32; LANES],
    clipped_high: [u32; LANES],
    lower_clipped: [u32; LANES],
    outside: [u32; LANES],
    off_policy: [u32; LANES],
    /// d, d², and the third estimate of the KL.
    d: Lanes,
    d_squares: Lanes,
    k3: Lanes,
    /// The ratio less a number of its size.
    excess: Lanes,
    excess_squares: Lanes,
    /// The sums of rows' ratios: of one number many times sums in f32 go astray.
    of_rows: [f64; 2],
    min: Lanes,
    max: Lanes,
    advantages: Lanes,
}

impl PolicyLanes {
    const NONE: Self = Self {
        loss: ZERO,
        clipped: [0; LANES],
        clipped_high: [0; LANES],
        lower_clipped: [0; LANES],
        outside: [0; LANES],
        off_policy: [0; LANES],
        d: ZERO,
        d_squares: ZERO,
        k3: ZERO,
        excess: ZERO,
        excess_squares: ZERO,
        of_rows: [0.0; 2],
        min: [f32::INFINITY; LANES],
        max: [f32::NEG_INFINITY; LANES],
        advantages: ZERO,
    };

    /// Writes the lanes' sums to those of a run of tokens, the ratios' less `centre`.
    fn add_to(self, sums: &mut Sums, centre: f32) {
        sums.policy_loss = sum(self.loss);
        sums.clipped = count_of(self.clipped);
        sums.clipped_high = count_of(self.clipped_high);
        sums.lower_clipped = count_of(self.lower_clipped);
        sums.outside = count_of(self.outside);
        sums.off_policy = count_of(self.off_policy);
        sums.k1 = -sum(self.d);
        sums.k2 = 0.5 * sum(self.d_squares);
        sums.k3 = sum(self.k3);
        if sums.k3.is_nan() && sums.k1 == f64::NEG_INFINITY {
            // e^d - 1 - d of d = inf, of which the exponential is the larger one.
            sums.k3 = f64::INFINITY;
        }
        let excess = sum(self.excess) + self.of_rows[0];
        let squares = sum(self.excess_squares) + self.of_rows[1];
        sums.ratio = moments(centre, sums.tokens, excess, squares);
        sums.ratio_min = f64::from(self.min.into_iter().fold(f32::INFINITY, f32::min));
        sums.ratio_max = f64::from(self.max.into_iter().fold(f32::NEG_INFINITY, f32::max));
        sums.advantages = sum(self.advantages);
    }
}

/// A pass of the policy term's loop: loss, gradient and statistics of the clipped surrogate by itself.
const PLAIN: u8 = 0;
/// The loop of any surrogate, with all options.
const FULL: u8 = 1;
/// The gradient alone, each token's own.
const OWN_GRADIENT: u8 = 2;

/// The options in f32, "off" written as infinity, so that the loops over tokens have no branch.
/// Passed by value: behind a reference they would have to be reloaded after every store.
#[derive(Clone, Copy)]
struct Terms {
    log_ratio_limit: f32,
    /// Bounds of the ratio, or of the log-ratio where that is clipped.
    low: f32,
    high: f32,
    count_outside: bool,
    /// Whether the ratio is that of the row.
    of_rows: bool,
    spreads: bool,
    trust_region: TrustRegion,
    region_low: f32,
    region_high: f32,
    region_by_advantage: bool,
    value_range: f32,
    kl: TokenKl,
    kl_reverse: bool,
    kl_ratio: KlRatio,
    kl_ratio_cap: f32,
    kl_weighted: bool,
    entropy_own_mean: bool,
    /// Factors of the gradients: coefficient over denominator.
    policy_scale: f32,
    value_scale: f32,
    entropy_scale: f32,
    kl_scale: f32,
}

impl Terms {
    /// Takes validated options.
    fn new(options: &PpoLossOptions, divisor: f64, entropy_divisor: f64) -> Self {
        let (low, high) = options.ratio_bounds();
        Self {
            log_ratio_limit: limit(options.log_ratio_clamp),
            low: low as f32,
            high: high as f32,
            count_outside: options.clip_fraction == ClipFractionKind::RatioOutside,
            of_rows: options.ratio != RatioLevel::Token,
            spreads: options.spreads(),
            trust_region: options.trust_region,
            region_low: options.trust_region_low as f32,
            region_high: options.trust_region_high as f32,
            region_by_advantage: options.trust_region_sides == TrustRegionSides::ByAdvantage,
            value_range: limit(options.value_clip_range),
            kl: TokenKl::new(&options.kl),
            kl_reverse: options.kl_gradient == KlGradient::Reverse,
            kl_ratio: options.kl_ratio,
            kl_ratio_cap: limit(options.kl_ratio_cap),
            kl_weighted: options.kl_weighted,
            entropy_own_mean: options.entropy_own_mean,
            policy_scale: (1.0 / divisor) as f32,
            value_scale: (options.value_coef / divisor) as f32,
            entropy_scale: (-options.entropy_coef / entropy_divisor) as f32,
            kl_scale: (options.kl_coef / divisor) as f32,
        }
    }

    /// The numbers that the tokens of each row share.
    fn rows(
        self,
        inputs: &Inputs,
        batch: usize,
        ranges: RowRanges,
        options: &PpoLossOptions,
    ) -> Vec<Row> {
        let mut rows = vec![Row::default(); batch];
        let cut = move |first, count| ranges.middle(first, count, BLOCK_TOKENS);
        let leaf = |first, _, rows: &mut [Row]| {
            for (b, row) in (first..).zip(rows) {
                *row = self.row(inputs, b, ranges.range(b), options);
            }
        };
        reduce_by(batch, cut, &mut rows[..], leaf, |(), ()| ());
        rows
    }

    /// The numbers that the tokens of one row share.
    fn row(self, inputs: &Inputs, b: usize, tokens: Range<usize>, options: &PpoLossOptions) -> Row {
        let kept = count_kept(inputs.mask.map(|mask| &mask[tokens.clone()]), tokens.len());
        let weight = 1.0 / kept as f32;
        let weights = inputs.weights.filter(|_| options.weights_per_row);
        let of_row = Row {
            weight,
            advantage: options.advantages_per_row.then(|| inputs.advantages[b]),
            given_weight: weights.map(|weights| weights[b]),
            ..Row::default()
        };
        if !options.needs_rows() {
            return of_row;
        }
        let copies = of_row.copies(tokens.len());
        let copies = copies.each_ref().map(Option::as_deref);
        let kept = kept as f64;
        let chunk = |first| first..tokens.end.min(first + BLOCK_TOKENS);
        let chunks = tokens.clone().step_by(BLOCK_TOKENS).map(chunk);
        let mut weights = [0.0; BLOCK_TOKENS];
        let write_weights = |weight: f64, chunk: Range<usize>, weights: &mut [f32]| {
            let mask = inputs.mask.map(|mask| &mask[chunk]);
            fill(weight as f32, mask, weights);
        };

        let clips_log = options.surrogate == Surrogate::LogClip;
        let wants_excess = options.off_policy_threshold.is_some();
        let (mut log_ratio, mut excess) = (0.0, 0.0);
        for chunk in chunks.clone() {
            let weights = &mut weights[..chunk.len()];
            write_weights(1.0, chunk.clone(), weights);
            let run = Run::of(inputs, chunk.clone(), copies);
            let rollout_logp = inputs.rollout_logp.unwrap_or(inputs.old_logp);
            vectorise(
                #[inline(always)]
                || {
                    log_ratio += self.log_ratios(weights, run, clips_log);
                    if wants_excess {
                        excess += off_policy(weights, run.logp, &rollout_logp[chunk]);
                    }
                },
            );
        }
        let mut row = Row {
            log_ratio: match options.ratio {
                RatioLevel::Token => 0.0,
                RatioLevel::SequenceMean => (log_ratio / kept) as f32,
                RatioLevel::SequenceSum => log_ratio as f32,
            },
            off_policy: options.off_policy_threshold.is_some_and(|limit| excess / kept > limit),
            ..of_row
        };
        if !self.spreads || kept == 0.0 {
            return row;
        }

        // Each token's own gradient, added up and given to all of them.
        let weight = if options.aggregation.has_row_weights() { 1.0 / kept } else { 1.0 };
        let mut spread = 0.0;
        for chunk in chunks {
            let weights = &mut weights[..chunk.len()];
            write_weights(weight, chunk.clone(), weights);
            let run = Run::of(inputs, chunk.clone(), copies);
            let mut grad = [0.0; BLOCK_TOKENS];
            let grad = &mut grad[..chunk.len()];
            with_surrogate!(options, surrogate => vectorise(
                #[inline(always)]
                || {
                    let (lanes, grad) = (&mut { PolicyLanes::NONE }, Some(&mut *grad));
                    self.policy::<_, OWN_GRADIENT, CACHED>(
                        surrogate, weights, run, None, row, 0.0, grad, lanes,
                    );
                },
            ));
            spread += vectorise(
                #[inline(always)]
                || sum_of(grad.len(), |at, full| load(grad, at, full).map(f64::from)),
            );
        }
        let share = if options.ratio == RatioLevel::SequenceMean { 1.0 / kept } else { 1.0 };
        row.spread = (spread * share) as f32;
        row
    }

    /// The extremes over rows of the share of a row's tokens that are clipped: the largest of those with A > 0,
    /// the smallest of the others. NaN where no token is unmasked.
    fn row_extremes(
        self,
        inputs: &Inputs,
        rows: &[Row],
        batch: usize,
        ranges: RowRanges,
        options: &PpoLossOptions,
    ) -> [f64; 2] {
        let cut = move |first, count| ranges.middle(first, count, BLOCK_TOKENS);
        let merge = |a: [f64; 2], b: [f64; 2]| [a[0].max(b[0]), a[1].min(b[1])];
        let leaf = |first, count, ()| {
            let of_row = |b: usize| {
                let row = rows.get(b).copied().unwrap_or_default();
                self.clip_fractions_of_row(inputs, row, ranges.range(b), options)
            };
            (first..first + count).map(of_row).fold([f64::NAN; 2], merge)
        };
        reduce_by(if ranges.start(batch) == 0 { 0 } else { batch }, cut, (), leaf, merge)
    }

    /// The shares of one row's tokens that are clipped and have A > 0, and of those that are clipped and do
    /// not; NaN without tokens.
    fn clip_fractions_of_row(
        self,
        inputs: &Inputs,
        row: Row,
        tokens: Range<usize>,
        options: &PpoLossOptions,
    ) -> [f64; 2] {
        let copies = row.copies(tokens.len());
        let copies = copies.each_ref().map(Option::as_deref);
        let mut weights = [0.0; BLOCK_TOKENS];
        let (mut lanes, mut kept) = (PolicyLanes::NONE, 0);
        for first in tokens.clone().step_by(BLOCK_TOKENS) {
            let chunk = first..tokens.end.min(first + BLOCK_TOKENS);
            let mask = inputs.mask.map(|mask| &mask[chunk.clone()]);
            let weights = &mut weights[..chunk.len()];
            fill(1.0, mask, weights);
            kept += count_kept(mask, chunk.len());
            let run = Run::of(inputs, chunk, copies);
            self.policy_of_any(options, weights, run, None, row, 0.0, None, &mut lanes);
        }
        let [clipped, high] = [lanes.clipped, lanes.clipped_high].map(count_of);
        [high, clipped - high].map(|count| count / kept as f64)
    }

    /// The sum of the log-ratios of unmasked tokens, exact differences: thousands of them may go into
    /// one exponential.
    #[inline(always)]
    fn log_ratios(self, weights: &[f32], run: Run, clips_log: bool) -> f64 {
        sum_of(
            weights.len(),
            #[inline(always)]
            |at, full| {
                let (w, a) = (load(weights, at, full), load(run.advantages, at, full));
                let (new, old) = (load(run.logp, at, full), load(run.old_logp, at, full));
                let mut d = [0.0; LANES];
                for i in 0..LANES {
                    let raw = f64::from(new[i]) - f64::from(old[i]);
                    let is_clipped = clips_log & self.is_log_clipped(new[i] - old[i], a[i]);
                    let bound = if a[i] > 0.0 { self.high } else { self.low };
                    let of_token = if is_clipped { f64::from(bound) } else { raw };
                    d[i] = if w[i] != 0.0 { of_token } else { 0.0 };
                }
                d
            },
        )
    }

    #[inline(always)]
    fn is_log_clipped(self, d: f32, advantage: f32) -> bool {
        select_bool(advantage > 0.0, d > self.high, d < self.low)
    }

    /// Sums and gradients of at most [`BLOCK_TOKENS`] tokens.
    fn sum(
        self,
        mut block: Tokens,
        row_weight: RowWeight,
        rows: RowsOf,
        options: &PpoLossOptions,
        stores: Stores,
    ) -> Sums {
        let mut weights = [0.0; BLOCK_TOKENS];
        let weights = &mut weights[..block.len()];
        row_weight.write(block.mask, rows, weights);
        let samples = samples(weights);
        let mut sums = Sums { tokens: count_kept(block.mask, weights.len()) as u64, ..Sums::NONE };

        let (logp, old_logp) = block.policy;
        let advantages = block.advantages.expect("each token's by now");
        let run = Run { logp, old_logp, advantages, weights: block.weights };
        let grad_logp = &mut block.grad_logp;
        // Without a clip the old values are not looked at, whatever they are.
        let value = block
            .value
            .map(|(values, old_values, returns)| [values, old_values.unwrap_or(values), returns]);
        // The ratio's variance is taken around that of a log-ratio, so that it keeps its digits.
        let log_ratio = centre(samples, |t| match self.of_rows {
            true => rows.rows[rows.ranges.row_of(rows.first + t)].log_ratio,
            false => logp[t] - old_logp[t],
        });
        let ratio = exp(clip(log_ratio, -self.log_ratio_limit, self.log_ratio_limit));
        let centre_of_ratio = if ratio.is_finite() { ratio } else { 1.0 };
        let mut lanes = PolicyLanes::NONE;
        // What the KL term is added to is to be in the cache still.
        let again = block.against.is_some() && self.kl_scale != 0.0;
        if block.weights.is_none() && options.is_clip_of_tokens() {
            let surrogate = Clip::<false>::new(options);
            let (row, lanes) = (Row::default(), &mut lanes);
            let grad = grad_logp.as_deref_mut();
            let stores = if again { Stores::Cached } else { stores };
            with_stores!(stores, STORES => self.policy::<_, PLAIN, STORES>(
                surrogate,
                weights,
                run,
                value,
                row,
                centre_of_ratio,
                grad,
                lanes,
            ));
        } else {
            for (range, row) in rows.runs(weights.len()) {
                let (weights, run) = (&weights[range.clone()], run.part(range.clone()));
                let value = value.map(|value| value.map(|x| &x[range.clone()]));
                let (lanes, grad) =
                    (&mut lanes, grad_logp.as_deref_mut().map(|grad| &mut grad[range]));
                self.policy_of_any(options, weights, run, value, row, centre_of_ratio, grad, lanes);
            }
        }
        lanes.add_to(&mut sums, centre_of_ratio);
        if let Some(against) = block.against {
            with_stores!(stores, STORES => {
                let grad = grad_logp.as_deref_mut();
                match options.is_plain_kl() {
                    true => self.kl::<true, STORES>(weights, run, against, grad, &mut sums),
                    false => self.kl::<false, STORES>(weights, run, against, grad, &mut sums),
                }
            });
        }
        if let Some(inputs @ [values, _, returns]) = value {
            let centres =
                [centre(samples, |t| returns[t]), centre(samples, |t| returns[t] - values[t])];
            with_stores!(stores, STORES => {
                self.value::<STORES>(weights, inputs, centres, block.grad_values, &mut sums)
            });
        }
        if let Some(entropy) = block.entropy {
            with_stores!(stores, STORES => {
                self.entropy::<STORES>(weights, entropy, block.grad_entropy, &mut sums)
            });
        }
        sums
    }

    /// [`Terms::policy`] of any surrogate, with all options. Not inlined: the loops for all surrogates and
    /// instruction sets are half a megabyte.
    #[inline(never)]
    #[allow(clippy::too_many_arguments)]
    fn policy_of_any(
        self,
        options: &PpoLossOptions,
        weights: &[f32],
        run: Run,
        value: Option<[&[f32]; 3]>,
        row: Row,
        centre_of_ratio: f32,
        grad: Option<&mut [f32]>,
        lanes: &mut PolicyLanes,
    ) {
        with_surrogate!(options, surrogate => vectorise(
            #[inline(always)]
            || {
                self.policy::<_, FULL, CACHED>(
                    surrogate, weights, run, value, row, centre_of_ratio, grad, lanes,
                );
            },
        ));
    }

    /// The policy term of a run of tokens, which are in one row if that has something to say.
    ///
    /// Asks for what the value loop reads: this one has so much to do for a token, and that one so
    /// little, that memory would be idle now and waited for then.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn policy<S: Of, const PASS: u8, const STORES: u8>(
        self,
        surrogate: S,
        weights: &[f32],
        run: Run,
        value: Option<[&[f32]; 3]>,
        row: Row,
        centre_of_ratio: f32,
        mut grad: Option<&mut [f32]>,
        lanes: &mut PolicyLanes,
    ) {
        let full_pass = PASS != PLAIN;
        let counts = PASS != OWN_GRADIENT;
        let limit = self.log_ratio_limit;
        let row_ratio = exp(clip(row.log_ratio, -limit, limit));
        let mut sums = *lanes;
        let mut kept = [0_u32; LANES];
        // Two loops a stretch, each of them short enough for the machine to work on several tokens
        // at once: from log-ratio to loss one operation waits for the other.
        let (mut raws, mut ratios) = ([0.0; STRETCH], [0.0; STRETCH]);
        let mut products = [0.0; STRETCH];
        let mut tiles = Tiles::<STORES>::new(grad.as_deref().unwrap_or_default());
        for first in (0..weights.len()).step_by(STRETCH) {
            let stretch = first..weights.len().min(first + STRETCH);
            let (weights, run) = (&weights[stretch.clone()], run.part(stretch.clone()));
            for_lanes(
                weights.len(),
                #[inline(always)]
                |at, full| {
                    let w = load(weights, at, full);
                    let (new, old) = (load(run.logp, at, full), load(run.old_logp, at, full));
                    for x in value.iter().flatten().filter(|_| full) {
                        prefetch(&x[first + at..][..LANES], 0);
                    }
                    let (mut raw, mut ratio) = (ZERO, ZERO);
                    for i in 0..LANES {
                        // A masked token becomes one with ratio 1, which adds nothing.
                        raw[i] = select(w[i] != 0.0, new[i] - old[i], 0.0);
                        let d = clip(raw[i], -limit, limit);
                        ratio[i] = exp(d);
                        if counts {
                            sums.d[i] += d;
                            sums.d_squares[i] = d.mul_add(d, sums.d_squares[i]);
                            sums.k3[i] += k3_and_slope(-d).0;
                        }
                    }
                    raws[at..][..LANES].copy_from_slice(&raw);
                    ratios[at..][..LANES].copy_from_slice(&ratio);
                },
            );
            if full_pass {
                self.weigh(weights, run, row, &raws, &mut products, &mut sums);
            }
            for_lanes(
                weights.len(),
                #[inline(always)]
                |at, full| {
                    let (w, a) = (load(weights, at, full), load(run.advantages, at, full));
                    let logp = if full_pass { load(run.logp, at, full) } else { ZERO };
                    let (raw, ratio) = (&raws[at..][..LANES], &ratios[at..][..LANES]);
                    let product = &products[at..][..LANES];
                    let mut g = ZERO;
                    for i in 0..LANES {
                        let keep = w[i] != 0.0;
                        let a = select(keep, a[i], 0.0);
                        let of_row = full_pass & self.of_rows;
                        let log_ratio = select(of_row, row.log_ratio, raw[i]);
                        // A masked token's ratio is 1 still.
                        let ratio = select(of_row & keep, row_ratio, ratio[i]);
                        let is_clamped = (log_ratio < -limit) | (log_ratio > limit);
                        let term = surrogate.of(Token {
                            log_ratio: clip(log_ratio, -limit, limit),
                            ratio,
                            logp: logp[i],
                            advantage: a,
                        });
                        // A product of 0 drops even NaN.
                        let w = if full_pass { product[i] } else { w[i] };
                        let counted = if full_pass { w != 0.0 } else { keep };
                        let flows = counted & (S::WEIGHS_LOGP | !is_clamped);
                        g[i] = select(flows, term.slope * w * self.policy_scale, 0.0);
                        let is_log_clipped = S::CLIPS_LOG & keep & self.is_log_clipped(raw[i], a);
                        if PASS == FULL && self.spreads {
                            g[i] = select(keep & !is_log_clipped, row.spread, 0.0);
                        }
                        if !counts {
                            continue;
                        }
                        sums.loss[i] = match full_pass {
                            true => sums.loss[i] + select(counted, w * term.loss, 0.0),
                            false => w.mul_add(term.loss, sums.loss[i]),
                        };

                        let is_outside = (ratio < self.low) | (ratio > self.high);
                        let is_clipped = (self.count_outside & is_outside)
                            | (!self.count_outside & (term.is_clipped | is_log_clipped));
                        sums.clipped[i] += u32::from(is_clipped & keep);
                        sums.clipped_high[i] += u32::from(is_clipped & (a > 0.0));
                        sums.lower_clipped[i] += u32::from(term.is_lower);
                        kept[i] += u32::from(keep);
                        let excess = select(keep & !of_row, ratio - centre_of_ratio, 0.0);
                        sums.excess[i] += excess;
                        sums.excess_squares[i] = excess.mul_add(excess, sums.excess_squares[i]);
                        let low = select(keep, ratio, sums.min[i]);
                        let high = select(keep, ratio, sums.max[i]);
                        sums.min[i] = select(low < sums.min[i], low, sums.min[i]);
                        sums.max[i] = select(high > sums.max[i], high, sums.max[i]);
                        sums.advantages[i] += a;
                    }
                    if let Some(grad) = &mut grad {
                        store(grad, first + at, full, g, &mut tiles);
                    }
                },
            );
        }
        end(tiles, grad);
        if full_pass && self.of_rows {
            let (count, excess) = (count_of(kept), f64::from(row_ratio - centre_of_ratio));
            // No token, no ratio, which may be NaN then.
            if count > 0.0 {
                sums.of_rows[0] += count * excess;
                sums.of_rows[1] += count * excess * excess;
            }
        }
        *lanes = sums;
    }

    /// The factors of the policy terms of a stretch of tokens: that of the aggregation, the weight that is
    /// given, and 0 where something takes the token away.
    #[inline(always)]
    fn weigh(
        self,
        aggregation: &[f32],
        run: Run,
        row: Row,
        raws: &[f32; STRETCH],
        products: &mut [f32; STRETCH],
        sums: &mut PolicyLanes,
    ) {
        // One loop for each kind of region, with nothing in it of the others.
        match self.trust_region {
            TrustRegion::None if run.weights.is_none() && !row.off_policy => {
                products[..aggregation.len()].copy_from_slice(aggregation);
            }
            TrustRegion::None => {
                self.weigh_inside(
                    aggregation,
                    run,
                    row,
                    raws,
                    products,
                    sums,
                    #[inline(always)]
                    |_, _, _| [0.0; 2],
                );
            }
            TrustRegion::TotalVariation => {
                self.weigh_inside(
                    aggregation,
                    run,
                    row,
                    raws,
                    products,
                    sums,
                    #[inline(always)]
                    |logp, old_logp, d| {
                        let moved = probability_moved(logp, old_logp, d);
                        [moved, -moved]
                    },
                );
            }
            TrustRegion::BinaryKl => {
                self.weigh_inside(
                    aggregation,
                    run,
                    row,
                    raws,
                    products,
                    sums,
                    #[inline(always)]
                    |logp, old_logp, d| {
                        let kl = binary_kl(logp, old_logp, d);
                        [select(d > 0.0, kl, 0.0), select(d < 0.0, kl, 0.0)]
                    },
                );
            }
            TrustRegion::Ratio => {
                self.weigh_inside(
                    aggregation,
                    run,
                    row,
                    raws,
                    products,
                    sums,
                    #[inline(always)]
                    |_, _, d: f32| {
                        let d = clip(d, -self.log_ratio_limit, self.log_ratio_limit);
                        let m = exp_m1(-d.abs());
                        let excess = select(d > 0.0, -m * exp(d), m);
                        [excess, -excess]
                    },
                );
            }
        }
    }

    /// [`Terms::weigh`], with what is compared with the upper and the lower bound from (logp, old_logp, d).
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn weigh_inside(
        self,
        aggregation: &[f32],
        run: Run,
        row: Row,
        raws: &[f32; STRETCH],
        products: &mut [f32; STRETCH],
        sums: &mut PolicyLanes,
        moved: impl Fn(f32, f32, f32) -> [f32; 2],
    ) {
        let least_advantage = if row.off_policy { 0.0 } else { f32::NEG_INFINITY };
        for_lanes(
            aggregation.len(),
            #[inline(always)]
            |at, full| {
                let (w, a) = (load(aggregation, at, full), load(run.advantages, at, full));
                let (new, old) = (load(run.logp, at, full), load(run.old_logp, at, full));
                let given = run.weights.map_or([1.0; LANES], |given| load(given, at, full));
                let raw = &raws[at..][..LANES];
                let mut product = ZERO;
                for i in 0..LANES {
                    let keep = w[i] != 0.0;
                    let [above, below] = moved(new[i], old[i], raw[i]);
                    // Numbers and not conditions, which are not vectorised where there are many.
                    let (over, under) = (above - self.region_high, below - self.region_low);
                    let one = select(a[i] > 0.0, over, under);
                    let larger = select(under > over, under, over);
                    let past = select(self.region_by_advantage, one, larger);
                    let (is_outside, is_off_policy) = (past > 0.0, a[i] < least_advantage);
                    sums.outside[i] += u32::from(is_outside & keep);
                    sums.off_policy[i] += u32::from(is_off_policy & keep);
                    let weight = select(is_outside, 0.0, w[i]);
                    let weight = select(is_off_policy, 0.0, weight);
                    // 0 drops even NaN.
                    let factor = select(weight == 0.0, 0.0, given[i]);
                    product[i] = weight * factor;
                }
                products[at..][..LANES].copy_from_slice(&product);
            },
        );
    }

    /// Adds its gradient to the policy term's. `PLAIN` is without what
    /// [`is_plain_kl`](PpoLossOptions::is_plain_kl) excludes.
    #[inline(always)]
    fn kl<const PLAIN: bool, const STORES: u8>(
        self,
        weights: &[f32],
        run: Run,
        against: &[f32],
        grad: Option<&mut [f32]>,
        sums: &mut Sums,
    ) {
        // Where the coefficient is 0 the derivative, which may be infinite, is not wanted.
        let mut grad = grad.filter(|_| self.kl_scale != 0.0);
        let given = run.weights.filter(|_| !PLAIN && self.kl_weighted);
        let kl_ratio = if PLAIN { KlRatio::None } else { self.kl_ratio };
        let has_ratio = kl_ratio != KlRatio::None;
        let (mut loss, mut total) = (ZERO, ZERO);
        let mut tiles = Tiles::<STORES>::new(grad.as_deref().unwrap_or_default());
        for_lanes(
            weights.len(),
            #[inline(always)]
            |at, full| {
                let (w, new, reference) =
                    (load(weights, at, full), load(run.logp, at, full), load(against, at, full));
                let given = given.map_or([1.0; LANES], |given| load(given, at, full));
                let mut ratio = [1.0; LANES];
                if has_ratio {
                    let old = load(run.old_logp, at, full);
                    for i in 0..LANES {
                        let d = new[i] - old[i];
                        let r = exp(clip(d, -self.log_ratio_limit, self.log_ratio_limit));
                        ratio[i] = select(r > self.kl_ratio_cap, self.kl_ratio_cap, r);
                    }
                }
                let mut g = grad.as_ref().map_or(ZERO, |grad| load(grad, at, full));
                for i in 0..LANES {
                    // Every estimate of d = 0 is 0.
                    let keep = w[i] != 0.0;
                    let d = select(keep, new[i] - reference[i], 0.0);
                    let (value, own) = self.kl.at(d);
                    let derivative = select(!PLAIN & self.kl_reverse, d, own);
                    let ratio = select(keep, ratio[i], 1.0);
                    let value = select(kl_ratio == KlRatio::Term, value * ratio, value);
                    let drops = !keep | (given[i] == 0.0);
                    let w = select(drops, 0.0, w[i] * given[i]);
                    loss[i] += select(drops, 0.0, w * value);
                    total[i] += value;
                    let slope = derivative * w * self.kl_scale;
                    g[i] += select(drops, 0.0, select(has_ratio, slope * ratio, slope));
                }
                if let Some(grad) = &mut grad {
                    store(grad, at, full, g, &mut tiles);
                }
            },
        );
        end(tiles, grad);
        sums.kl_loss = sum(loss);
        sums.kl = sum(total);
    }

    /// The variances of returns and residuals are taken around these centres, so that they keep their
    /// digits far from 0.
    #[inline(always)]
    fn value<const STORES: u8>(
        self,
        weights: &[f32],
        [values, old_values, returns]: [&[f32]; 3],
        centres: [f32; 2],
        mut grad: Option<&mut [f32]>,
        sums: &mut Sums,
    ) {
        // Where the coefficient is 0 the error, which may be NaN, is not wanted.
        let wanted = self.value_scale != 0.0;
        let (mut loss, mut clipped) = (ZERO, [0_u32; LANES]);
        let (mut target, mut target_squares) = (ZERO, ZERO);
        let (mut residual, mut residual_squares) = (ZERO, ZERO);
        let mut tiles = Tiles::<STORES>::new(grad.as_deref().unwrap_or_default());
        for_lanes(
            weights.len(),
            #[inline(always)]
            |at, full| {
                let w = load(weights, at, full);
                let (v, old, r) =
                    (load(values, at, full), load(old_values, at, full), load(returns, at, full));
                let mut g = ZERO;
                for i in 0..LANES {
                    let keep = w[i] != 0.0;
                    let error = v[i] - r[i];
                    // From differences, which keep their digits where values are far from 0.
                    let moved = v[i] - old[i];
                    let kept_move = clip(moved, -self.value_range, self.value_range);
                    let clipped_error = error + (kept_move - moved);
                    let unclipped_loss = error * error;
                    let clipped_loss = clipped_error * clipped_error;
                    let is_clipped = clipped_loss > unclipped_loss;
                    let larger = select(is_clipped, clipped_loss, unclipped_loss);
                    let flows = wanted & keep & !is_clipped;
                    g[i] = select(flows, error * w[i] * self.value_scale, 0.0);

                    loss[i] += select(keep, w[i] * larger, 0.0);
                    clipped[i] += u32::from(is_clipped & keep);
                    let x = select(keep, r[i] - centres[0], 0.0);
                    target[i] += x;
                    target_squares[i] = x.mul_add(x, target_squares[i]);
                    let x = select(keep, -error - centres[1], 0.0);
                    residual[i] += x;
                    residual_squares[i] = x.mul_add(x, residual_squares[i]);
                }
                if let Some(grad) = &mut grad {
                    store(grad, at, full, g, &mut tiles);
                }
            },
        );
        end(tiles, grad);
        let around =
            |centre, total, squares| moments(centre, sums.tokens, sum(total), sum(squares));
        sums.returns = around(centres[0], target, target_squares);
        sums.residuals = around(centres[1], residual, residual_squares);
        sums.value_loss = 0.5 * sum(loss);
        sums.value_clipped = count_of(clipped);
    }

    #[inline(always)]
    fn entropy<const STORES: u8>(
        self,
        weights: &[f32],
        entropy: &[f32],
        mut grad: Option<&mut [f32]>,
        sums: &mut Sums,
    ) {
        let (mut loss, mut total) = (ZERO, ZERO);
        let mut tiles = Tiles::<STORES>::new(grad.as_deref().unwrap_or_default());
        for_lanes(
            weights.len(),
            #[inline(always)]
            |at, full| {
                let (w, h) = (load(weights, at, full), load(entropy, at, full));
                let mut g = ZERO;
                for i in 0..LANES {
                    let keep = w[i] != 0.0;
                    let w = select(self.entropy_own_mean, 1.0, w[i]);
                    let h = select(keep, h[i], 0.0);
                    loss[i] += w * h;
                    total[i] += h;
                    g[i] = select(keep, w * self.entropy_scale, 0.0);
                }
                if let Some(grad) = &mut grad {
                    store(grad, at, full, g, &mut tiles);
                }
            },
        );
        end(tiles, grad);
        sums.entropy_loss = sum(loss);
        sums.entropy = sum(total);
    }
}

/// The sum over unmasked tokens of rollout_logp - logp; NaN of the rollout counts as 0.
#[inline(always)]
fn off_policy(weights: &[f32], logp: &[f32], rollout_logp: &[f32]) -> f64 {
    sum_of(
        weights.len(),
        #[inline(always)]
        |at, full| {
            let (w, new) = (load(weights, at, full), load(logp, at, full));
            let rollout = load(rollout_logp, at, full);
            let mut excess = [0.0; LANES];
            for i in 0..LANES {
                let counts = (w[i] != 0.0) & !rollout[i].is_nan();
                let of_token = f64::from(rollout[i]) - f64::from(new[i]);
                excess[i] = if counts { of_token } else { 0.0 };
            }
            excess
        },
    )
}

/// The first unmasked token, the last, and one about half way.
fn samples(weights: &[f32]) -> Option<[usize; 3]> {
    let kept = |&token: &usize| weights[token] != 0.0;
    let first = (0..weights.len()).find(kept)?;
    let last = (first..weights.len()).rfind(kept)?;
    let middle = (first.midpoint(last)..=last).find(kept)?;
    Some([first, middle, last])
}

/// The median of `x` at some tokens, to take a variance around: of the size of the others, and no
/// outlier. 0 where it is not finite or there are none.
fn centre(samples: Option<[usize; 3]>, x: impl Fn(usize) -> f32) -> f32 {
    let [a, b, c] = samples.map_or([0.0; 3], |samples| samples.map(x));
    let median = a.min(b).max(a.max(b).min(c));
    if median.is_finite() {
        median
    } else {
        0.0
    }
}

/// The moments of `count` numbers x, from the sums of x - centre and (x - centre)².
fn moments(centre: f32, count: u64, sum: f64, squares: f64) -> Moments {
    if count == 0 {
        return Moments::default();
    }
    let shift = sum / count as f64;
    let m2 = squares - shift * sum;
    // Comparison, not max: NaN stays NaN.
    Moments {
        count: count as f64,
        mean: f64::from(centre) + shift,
        m2: if m2 < 0.0 { 0.0 } else { m2 },
    }
}

/// Sums over a run of tokens. The losses are weighted by row, the rest is plain.
#[derive(Clone, Copy)]
struct Sums {
    tokens: u64,
    policy_loss: f64,
    value_loss: f64,
    entropy_loss: f64,
    kl_loss: f64,
    clipped: f64,
    clipped_high: f64,
    lower_clipped: f64,
    outside: f64,
    off_policy: f64,
    value_clipped: f64,
    k1: f64,
    k2: f64,
    k3: f64,
    ratio: Moments,
    ratio_min: f64,
    ratio_max: f64,
    entropy: f64,
    kl: f64,
    advantages: f64,
    returns: Moments,
    residuals: Moments,
}

impl Sums {
    const NONE: Self = Self {
        tokens: 0,
        policy_loss: 0.0,
        value_loss: 0.0,
        entropy_loss: 0.0,
        kl_loss: 0.0,
        clipped: 0.0,
        clipped_high: 0.0,
        lower_clipped: 0.0,
        outside: 0.0,
        off_policy: 0.0,
        value_clipped: 0.0,
        k1: 0.0,
        k2: 0.0,
        k3: 0.0,
        ratio: Moments { count: 0.0, mean: 0.0, m2: 0.0 },
        ratio_min: f64::INFINITY,
        ratio_max: f64::NEG_INFINITY,
        entropy: 0.0,
        kl: 0.0,
        advantages: 0.0,
        returns: Moments { count: 0.0, mean: 0.0, m2: 0.0 },
        residuals: Moments { count: 0.0, mean: 0.0, m2: 0.0 },
    };

    fn merge(self, other: Self) -> Self {
        Self {
            tokens: self.tokens + other.tokens,
            policy_loss: self.policy_loss + other.policy_loss,
            value_loss: self.value_loss + other.value_loss,
            entropy_loss: self.entropy_loss + other.entropy_loss,
            kl_loss: self.kl_loss + other.kl_loss,
            clipped: self.clipped + other.clipped,
            clipped_high: self.clipped_high + other.clipped_high,
            lower_clipped: self.lower_clipped + other.lower_clipped,
            outside: self.outside + other.outside,
            off_policy: self.off_policy + other.off_policy,
            value_clipped: self.value_clipped + other.value_clipped,
            k1: self.k1 + other.k1,
            k2: self.k2 + other.k2,
            k3: self.k3 + other.k3,
            ratio: self.ratio.merge(other.ratio),
            ratio_min: self.ratio_min.min(other.ratio_min),
            ratio_max: self.ratio_max.max(other.ratio_max),
            entropy: self.entropy + other.entropy,
            kl: self.kl + other.kl,
            advantages: self.advantages + other.advantages,
            returns: self.returns.merge(other.returns),
            residuals: self.residuals.merge(other.residuals),
        }
    }

    /// But for the extremes over rows. The divisors are those of all terms, and of the entropy.
    fn stats(
        &self,
        inputs: &Inputs,
        options: &PpoLossOptions,
        [divisor, entropy_divisor]: [f64; 2],
    ) -> PpoStats {
        let given = |present: bool, x: f64| if present { x } else { f64::NAN };
        let (value, entropy) = (inputs.values.is_some(), inputs.entropy.is_some());
        // 0 / 0 is NaN where there is no token.
        let mean = |sum: f64| sum / self.tokens as f64;
        let any = self.tokens > 0;

        // A sum whose coefficient is 0 stays out, so that its NaN does.
        let term = |coef: f64, sum: f64, divisor: f64| match coef {
            0.0 => 0.0,
            _ => coef * (sum / divisor),
        };
        let policy_loss = self.policy_loss / divisor;
        let loss = policy_loss + term(options.value_coef, self.value_loss, divisor)
            - term(options.entropy_coef, self.entropy_loss, entropy_divisor)
            + term(options.kl_coef, self.kl_loss, divisor);
        let explained = given(self.returns.m2 != 0.0, self.residuals.m2);
        PpoStats {
            loss,
            policy_loss,
            value_loss: given(value, self.value_loss / divisor),
            clip_fraction: mean(self.clipped),
            lower_clip_fraction: mean(self.lower_clipped),
            clip_high_fraction: mean(self.clipped_high),
            clip_low_fraction: mean(self.clipped - self.clipped_high),
            clip_high_row_max: f64::NAN,
            clip_low_row_min: f64::NAN,
            outside_fraction: mean(self.outside),
            off_policy_fraction: mean(self.off_policy),
            value_clip_fraction: given(value, mean(self.value_clipped)),
            approx_kl_k1: mean(self.k1),
            approx_kl_k2: mean(self.k2),
            approx_kl_k3: mean(self.k3),
            ratio_mean: given(any, self.ratio.mean),
            ratio_var: self.ratio.variance(false),
            ratio_min: given(any, self.ratio_min),
            ratio_max: given(any, self.ratio_max),
            entropy_mean: given(entropy, mean(self.entropy)),
            kl_mean: given(against(inputs, options).is_some(), mean(self.kl)),
            advantage_mean: mean(self.advantages),
            return_mean: given(value && any, self.returns.mean),
            value_mean: given(value && any, self.returns.mean - self.residuals.mean),
            explained_variance: 1.0 - explained / self.returns.m2,
            tokens: self.tokens as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bits of all gradients of one block, with every term.
    fn bits(len: usize, offset: usize, stores: Stores) -> Vec<u32> {
        let wave = |step: usize| -> Vec<f32> {
            (0..len).map(|i| ((i * step) as f32 * 0.1).sin()).collect()
        };
        let inputs = [3, 5, 7, 11, 13, 17, 19, 23].map(wave);
        let [logp, old_logp, advantages, values, old_values, returns, entropy, ref_logp] = &inputs;
        let mask: Vec<u8> = (0..len).map(|i| u8::from(!i.is_multiple_of(9))).collect();
        let mut grads = [(); 3].map(|()| vec![0.0; offset + len]);
        let [grad_logp, grad_values, grad_entropy] =
            grads.each_mut().map(|grad| Some(&mut grad[offset..]));
        let tokens = Tokens {
            policy: (logp, old_logp),
            advantages: Some(advantages),
            value: Some((values, Some(old_values), returns)),
            entropy: Some(entropy),
            against: Some(ref_logp),
            weights: None,
            mask: Some(&mask),
            grad_logp,
            grad_values,
            grad_entropy,
        };
        let options = PpoLossOptions { kl_coef: 0.1, entropy_coef: 0.1, ..Default::default() };
        let ranges = RowRanges::new(OP, len, None).unwrap();
        let (terms, rows) =
            (Terms::new(&options, 1.0, 1.0), RowsOf { rows: &[], first: 0, ranges });
        terms.sum(tokens, RowWeight::Given(1.0), rows, &options, stores);
        grads.into_iter().flatten().map(f32::to_bits).collect()
    }

    #[test]
    fn gradients_past_the_caches_have_the_same_bits() {
        for (len, offset) in [(1024, 0), (1001, 1), (7, 0)] {
            let cached = bits(len, offset, Stores::Cached);
            assert!(Stores::all().iter().all(|&stores| bits(len, offset, stores) == cached));
        }
    }
}
