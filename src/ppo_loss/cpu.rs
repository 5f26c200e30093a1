//! The fused CPU implementation. The tokens are cut into blocks that stay in the cache; each term
//! walks its own inputs of a block once, for its loss, its gradient and its statistics. Sums are
//! kept in lanes of f32 within a block and in f64, over a fixed tree, between blocks.

use super::{Aggregation, ClipFractionKind, PpoLossOptions, PpoStats, OP};
use crate::cpu::math::{exp, sum_lanes, LANES};
use crate::cpu::{
    for_each, prefers_non_temporal, prefetch, reduce, vectorise, Logit, Rows, RowsMut, Split,
    TokenId, Writer,
};
use crate::error::{Error, Result};
use crate::kl::cpu::{k3_and_slope, TokenKl};
use crate::kl::limit;
use crate::logprob::{self, Columns, LogprobOptions};
use crate::memory::{in_space, Lengths};
use crate::moments::Moments;

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

/// Loss, statistics and gradients, for an upstream gradient of 1, of `batch` rows of `seq_len` tokens.
/// Reads the mask twice and every other input once.
///
/// # Errors
/// If a length does not fit, an option is out of range, an input is missing that another one or an
/// option needs, or no token is unmasked and the denominator is not given. Nothing is written then.
pub fn ppo_loss(
    inputs: Inputs,
    batch: usize,
    seq_len: usize,
    options: &PpoLossOptions,
    mut outputs: Outputs,
) -> Result<()> {
    options.validate()?;
    inputs.try_map([batch, seq_len], &mut Lengths(OP))?;
    inputs.check_given(options)?;
    outputs.try_map([batch, seq_len], &mut Lengths(OP))?;
    let n = inputs.logp.len();
    outputs.check_wanted(&inputs, n)?;
    let (kept, rows) = count(inputs.mask, [batch, seq_len], options.aggregation);
    let divisor = options.divisor(kept, rows, seq_len)?;

    let terms = Terms::new(options, divisor);
    let gradients = [&outputs.grad_logp, &outputs.grad_values, &outputs.grad_entropy];
    let bytes = |gradient: &Option<&mut [f32]>| gradient.as_deref().map_or(0, size_of_val);
    let non_temporal = prefers_non_temporal(gradients.map(bytes).iter().sum());
    let sum = |block: Tokens, weight| match non_temporal {
        false => terms.sum::<false>(block, weight),
        true => terms.sum::<true>(block, weight),
    };
    let value = inputs.values.zip(inputs.returns);
    let tokens = Tokens {
        policy: (inputs.logp, inputs.old_logp, inputs.advantages),
        value: value.map(|(values, returns)| (values, inputs.old_values, returns)),
        entropy: inputs.entropy,
        ref_logp: inputs.ref_logp,
        mask: inputs.mask,
        grad_logp: outputs.grad_logp,
        grad_values: outputs.grad_values,
        grad_entropy: outputs.grad_entropy,
    };
    let blocks = |tokens: Tokens, weight: f32| {
        let leaf = |_, _, block: Tokens| sum(block, RowWeight::Given(weight));
        reduce(tokens.len(), BLOCK_TOKENS, tokens, leaf, Sums::merge)
    };
    let sums = match options.aggregation {
        Aggregation::SeqMeanTokenMean if seq_len > BLOCK_TOKENS => {
            let row = |_, len, row: Tokens| {
                let weight = 1.0 / count_kept(row.mask, len) as f32;
                blocks(row, weight)
            };
            reduce(n, seq_len, tokens, row, Sums::merge)
        }
        Aggregation::SeqMeanTokenMean if seq_len > 0 => {
            let whole_rows = BLOCK_TOKENS / seq_len * seq_len;
            let leaf = |_, _, block: Tokens| sum(block, RowWeight::OneOverLength(seq_len));
            reduce(n, whole_rows, tokens, leaf, Sums::merge)
        }
        _ => blocks(tokens, 1.0),
    };
    let stats = sums.stats(&inputs, options, divisor);
    outputs.stats[0] = stats;
    if let Some(loss) = outputs.loss {
        loss[0] = stats.loss as f32;
    }
    Ok(())
}

/// Bytes of logits whose gradient a thread writes while they are in its cache.
const CACHED_LOGITS: usize = 512 << 10;

/// Loss, statistics and the logits' gradient, for an upstream gradient of 1, of `batch` rows of `seq_len`
/// tokens, from their logits over `vocab` tokens: what [`logprob`](logprob::cpu) and [`ppo_loss`] give, of
/// which the values have a loss of their own. Some rows of logits at a time are read twice, the second
/// time from the cache. Logits of masked tokens are not read.
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
    let (shape, tokens) = ([batch, seq_len], batch.saturating_mul(seq_len));
    Error::check_logits(OP, inputs.logits.len(), tokens, vocab)?;
    inputs.try_map((shape, vocab), &mut Lengths(OP))?;
    outputs.try_map((shape, vocab), &mut Lengths(OP))?;
    outputs.check_entropy(options)?;
    let LogitsInputs { logits, targets, old_logp, advantages, ref_logp, mask } = inputs;
    let LogitsOutputs { logp, stats, grad_logits, mut entropy, loss } = outputs;
    let (kept, rows) = count(mask, shape, options.aggregation);
    let divisor = options.divisor(kept, rows, seq_len)?;
    Inputs { entropy: entropy.as_deref(), ref_logp, ..Inputs::new(logp, old_logp, advantages) }
        .check_given(options)?;

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
    let weights = match options.aggregation {
        Aggregation::SeqMeanTokenMean => (0..batch)
            .map(|row| {
                let mask = mask.map(|mask| &mask[row * seq_len..][..seq_len]);
                1.0 / count_kept(mask, seq_len) as f64
            })
            .collect(),
        _ => Vec::new(),
    };
    // Of one token, before weight and denominator.
    let plain =
        PpoLossOptions { aggregation: Aggregation::Constant(1.0), denominator: None, ..*options };
    let at_once = CACHED_LOGITS / vocab.saturating_mul(size_of::<T>());
    let wants_entropy = options.entropy_coef != 0.0;
    let non_temporal = prefers_non_temporal(size_of_val(grad_logits));
    let logits = Rows { data: logits, width: vocab };
    let grads = RowsMut { data: grad_logits, width: vocab };
    let items = (logits, grads, &mut *logp, entropy.as_deref_mut());
    let rows = |first: usize, count: usize, items: (Rows<T>, RowsMut<T>, &mut [f32], _)| {
        let (logits, grads, logp, mut entropy): (_, _, _, Option<&mut [f32]>) = items;
        let range = first..first + count;
        let [mut max, mut log_sum, mut grad_logp, mut grad_entropy] =
            [(); 4].map(|()| vec![0.0; count]);
        let forward =
            logprob::cpu::ForwardInputs { logits: logits.data, targets: &ids[range.clone()] };
        let outputs = logprob::cpu::ForwardOutputs {
            entropy: entropy.as_deref_mut(),
            max: Some(&mut max),
            log_sum: Some(&mut log_sum),
            ..logprob::cpu::ForwardOutputs::new(logp)
        };
        logprob::cpu::forward(forward, count, vocab, &logprob_options, outputs)?;

        let mut stats = [PpoStats::from_array([0.0; PpoStats::LEN])];
        let part = Inputs {
            entropy: entropy.as_deref().filter(|_| wants_entropy),
            ref_logp: ref_logp.map(|ref_logp| &ref_logp[range.clone()]),
            mask: mask.map(|mask| &mask[range.clone()]),
            ..Inputs::new(logp, &old_logp[range.clone()], &advantages[range.clone()])
        };
        let outputs = Outputs {
            grad_logp: Some(&mut grad_logp),
            grad_entropy: wants_entropy.then_some(&mut grad_entropy),
            ..Outputs::new(&mut stats)
        };
        ppo_loss(part, 1, count, &plain, outputs)?;
        for (i, t) in range.enumerate() {
            let weight = weights.get(t / seq_len).copied().unwrap_or(1.0);
            grad_logp[i] = scaled(grad_logp[i], (weight / divisor) as f32);
            grad_entropy[i] = scaled(grad_entropy[i], (weight / divisor) as f32);
        }

        let inputs = logprob::cpu::BackwardInputs {
            entropy: entropy.as_deref(),
            grad_logp: Some(&grad_logp),
            grad_entropy: wants_entropy.then_some(&grad_entropy),
            ..logprob::cpu::BackwardInputs::new(forward, &max, &log_sum)
        };
        let outputs = logprob::cpu::BackwardOutputs { grad_logits: grads.data };
        logprob::cpu::backward_of_part(
            inputs,
            count,
            Columns::all(vocab),
            &logprob_options,
            outputs,
            non_temporal,
        )
    };
    // All is checked, and no row fails.
    reduce(tokens, at_once, items, rows, Result::and)?;
    let inputs = Inputs {
        entropy: entropy.as_deref(),
        ref_logp,
        mask,
        ..Inputs::new(logp, old_logp, advantages)
    };
    ppo_loss(inputs, batch, seq_len, options, Outputs { loss, ..Outputs::new(stats) })
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

/// How many tokens are unmasked, and how many rows have one if the aggregation asks.
fn count(
    mask: Option<&[u8]>,
    [batch, seq_len]: [usize; 2],
    aggregation: Aggregation,
) -> (usize, usize) {
    let Some(mask) = mask else {
        return (batch * seq_len, if seq_len > 0 { batch } else { 0 });
    };
    let add = |a: usize, b: usize| a + b;
    // A mask is one byte a token.
    let grain = 16 * BLOCK_TOKENS;
    let leaf = |_, len, part: &[u8]| count_kept(Some(part), len);
    let tokens = reduce(mask.len(), grain, mask, leaf, add);
    let by_row =
        matches!(aggregation, Aggregation::SeqMeanTokenSum | Aggregation::SeqMeanTokenMean);
    if !by_row || seq_len == 0 {
        return (tokens, 0);
    }
    let grain = (grain / seq_len).max(1) * seq_len;
    let leaf = |_, _, part: &[u8]| {
        part.chunks_exact(seq_len).filter(|row| row.iter().any(|&m| m != 0)).count()
    };
    (tokens, reduce(mask.len(), grain, mask, leaf, add))
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

/// In lanes of a byte, which is as many as there are, emptied before they are full.
#[inline(always)]
fn count_nonzero(bytes: &[u8]) -> usize {
    const WIDTH: usize = 64;
    let mut count = 0;
    for bytes in bytes.chunks(WIDTH * usize::from(u8::MAX)) {
        let (chunks, rest) = bytes.as_chunks::<WIDTH>();
        let mut lanes = [0_u8; WIDTH];
        for chunk in chunks {
            for (lane, &byte) in lanes.iter_mut().zip(chunk) {
                *lane += u8::from(byte != 0);
            }
        }
        count += lanes.iter().map(|&lane| usize::from(lane)).sum::<usize>();
        count += rest.iter().filter(|&&byte| byte != 0).count();
    }
    count
}

/// Values, old values and returns.
type Value<'a> = (&'a [f32], Option<&'a [f32]>, &'a [f32]);

/// A run of tokens: its part of every input and gradient.
struct Tokens<'a> {
    /// logp, old_logp, advantages.
    policy: (&'a [f32], &'a [f32], &'a [f32]),
    value: Option<Value<'a>>,
    entropy: Option<&'a [f32]>,
    ref_logp: Option<&'a [f32]>,
    mask: Option<&'a [u8]>,
    grad_logp: Option<&'a mut [f32]>,
    grad_values: Option<&'a mut [f32]>,
    grad_entropy: Option<&'a mut [f32]>,
}

impl Tokens<'_> {
    fn len(&self) -> usize {
        self.policy.0.len()
    }
}

impl Split for Tokens<'_> {
    fn split(self, mid: usize) -> (Self, Self) {
        let policy = self.policy.split(mid);
        let value = self.value.split(mid);
        let entropy = self.entropy.split(mid);
        let ref_logp = self.ref_logp.split(mid);
        let mask = self.mask.split(mid);
        let grad_logp = self.grad_logp.split(mid);
        let grad_values = self.grad_values.split(mid);
        let grad_entropy = self.grad_entropy.split(mid);
        (
            Self {
                policy: policy.0,
                value: value.0,
                entropy: entropy.0,
                ref_logp: ref_logp.0,
                mask: mask.0,
                grad_logp: grad_logp.0,
                grad_values: grad_values.0,
                grad_entropy: grad_entropy.0,
            },
            Self {
                policy: policy.1,
                value: value.1,
                entropy: entropy.1,
                ref_logp: ref_logp.1,
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
}

impl RowWeight {
    /// The weights of whole rows, or of any run of tokens for `Given`; 0 where masked.
    fn write(self, mask: Option<&[u8]>, weights: &mut [f32]) {
        let len = weights.len();
        let width = match self {
            Self::Given(_) => len.max(1),
            Self::OneOverLength(seq_len) => seq_len,
        };
        for (row, weights) in weights.chunks_mut(width).enumerate() {
            let mask = mask.map(|mask| &mask[row * width..][..weights.len()]);
            let weight = match self {
                Self::Given(weight) => weight,
                Self::OneOverLength(_) => 1.0 / count_kept(mask, width) as f32,
            };
            let Some(mask) = mask else {
                weights.fill(weight);
                continue;
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
    }
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
fn store<const NON_TEMPORAL: bool>(
    x: &mut [f32],
    at: usize,
    full: bool,
    lanes: Lanes,
    writer: &Writer<NON_TEMPORAL>,
) {
    if full {
        let x = &mut x[at..][..LANES].as_chunks_mut().0[0];
        writer.prefetch(x, AHEAD);
        writer.write(x, lanes);
    } else {
        let rest = x.len() - at;
        x[at..].copy_from_slice(&lanes[..rest]);
    }
}

/// Of an `if` the compiler may make two ways through a loop, which it does not vectorise well.
#[inline(always)]
fn select(condition: bool, yes: f32, no: f32) -> f32 {
    std::hint::select_unpredictable(condition, yes, no)
}

/// `x` within the bounds. Comparisons, so that NaN stays NaN and a NaN bound is none.
#[inline(always)]
fn clip(x: f32, low: f32, high: f32) -> f32 {
    let x = select(x < low, low, x);
    select(x > high, high, x)
}

#[inline(always)]
fn sum(lanes: Lanes) -> f64 {
    f64::from(sum_lanes(lanes))
}

#[inline(always)]
fn count_of(lanes: [u32; LANES]) -> f64 {
    f64::from(lanes.iter().sum::<u32>())
}

/// The options in f32, "off" written as infinity, so that the loops over tokens have no branch.
/// Passed by value: behind a reference they would have to be reloaded after every store.
#[derive(Clone, Copy)]
struct Terms {
    log_ratio_limit: f32,
    low: f32,
    high: f32,
    dual_clip: f32,
    count_outside: bool,
    value_range: f32,
    kl: TokenKl,
    /// Factors of the gradients: coefficient over denominator.
    policy_scale: f32,
    value_scale: f32,
    entropy_scale: f32,
    kl_scale: f32,
}

impl Terms {
    /// Of validated options.
    fn new(options: &PpoLossOptions, divisor: f64) -> Self {
        let (low, high) = options.ratio_bounds();
        Self {
            log_ratio_limit: limit(options.log_ratio_clamp),
            low: low as f32,
            high: high as f32,
            dual_clip: limit(options.dual_clip),
            count_outside: options.clip_fraction == ClipFractionKind::RatioOutside,
            value_range: limit(options.value_clip_range),
            kl: TokenKl::new(&options.kl),
            policy_scale: (1.0 / divisor) as f32,
            value_scale: (options.value_coef / divisor) as f32,
            entropy_scale: (-options.entropy_coef / divisor) as f32,
            kl_scale: (options.kl_coef / divisor) as f32,
        }
    }

    /// Sums and gradients of at most [`BLOCK_TOKENS`] tokens.
    fn sum<const NON_TEMPORAL: bool>(self, mut block: Tokens, row_weight: RowWeight) -> Sums {
        let mut weights = [0.0; BLOCK_TOKENS];
        let weights = &mut weights[..block.len()];
        row_weight.write(block.mask, weights);
        let samples = samples(weights);
        let mut sums = Sums { tokens: count_kept(block.mask, weights.len()) as u64, ..Sums::NONE };

        let writer = Writer::<NON_TEMPORAL>;
        let (logp, old_logp, advantages) = block.policy;
        let (policy, grad_logp) = ([weights, logp, old_logp, advantages], &mut block.grad_logp);
        // Without a clip the old values are not looked at, whatever they are.
        let value = block
            .value
            .map(|(values, old_values, returns)| [values, old_values.unwrap_or(values), returns]);
        let log_ratio = centre(samples, |t| logp[t] - old_logp[t]);
        // What the KL term is added to is to be in the cache still.
        let again = block.ref_logp.is_some() && self.kl_scale != 0.0;
        if again {
            vectorise(
                #[inline(always)]
                || {
                    let grad = grad_logp.as_deref_mut();
                    self.policy(policy, value, log_ratio, grad, &mut sums, &Writer::<false>);
                },
            );
        } else {
            vectorise(
                #[inline(always)]
                || {
                    let grad = grad_logp.as_deref_mut();
                    self.policy(policy, value, log_ratio, grad, &mut sums, &writer);
                },
            );
        }
        if let Some(ref_logp) = block.ref_logp {
            vectorise(
                #[inline(always)]
                || {
                    let grad = grad_logp.as_deref_mut();
                    self.kl(weights, (logp, ref_logp), grad, &mut sums, &writer);
                },
            );
        }
        if let Some(inputs @ [values, _, returns]) = value {
            let centres =
                [centre(samples, |t| returns[t]), centre(samples, |t| returns[t] - values[t])];
            vectorise(
                #[inline(always)]
                || self.value(weights, inputs, centres, block.grad_values, &mut sums, &writer),
            );
        }
        if let Some(entropy) = block.entropy {
            vectorise(
                #[inline(always)]
                || self.entropy(weights, entropy, block.grad_entropy, &mut sums, &writer),
            );
        }
        sums
    }

    /// Asks for what the value loop reads: this one has so much to do for a token, and that one so
    /// little, that memory would be idle now and waited for then. The ratio's variance is taken around
    /// that of a log-ratio, so that it keeps its digits.
    #[inline(always)]
    fn policy<const NON_TEMPORAL: bool>(
        self,
        [weights, logp, old_logp, advantages]: [&[f32]; 4],
        value: Option<[&[f32]; 3]>,
        log_ratio: f32,
        mut grad: Option<&mut [f32]>,
        sums: &mut Sums,
        writer: &Writer<NON_TEMPORAL>,
    ) {
        let centre = exp(clip(log_ratio, -self.log_ratio_limit, self.log_ratio_limit));
        let centre = if centre.is_finite() { centre } else { 1.0 };
        let (mut clipped, mut lower_clipped) = ([0_u32; LANES], [0_u32; LANES]);
        let mut loss = ZERO;
        let (mut total, mut total_squares, mut k3) = (ZERO, ZERO, ZERO);
        let (mut ratio_sum, mut squares, mut advantage) = (ZERO, ZERO, ZERO);
        let (mut min, mut max) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
        // Two loops a stretch, each of them short enough for the machine to work on several tokens
        // at once: from log-ratio to loss one operation waits for the other.
        let (mut raws, mut ratios) = ([0.0; STRETCH], [0.0; STRETCH]);
        for first in (0..weights.len()).step_by(STRETCH) {
            let stretch = first..weights.len().min(first + STRETCH);
            let (weights, logp, old_logp, advantages) = (
                &weights[stretch.clone()],
                &logp[stretch.clone()],
                &old_logp[stretch.clone()],
                &advantages[stretch.clone()],
            );
            for_lanes(
                weights.len(),
                #[inline(always)]
                |at, full| {
                    let w = load(weights, at, full);
                    let (new, old) = (load(logp, at, full), load(old_logp, at, full));
                    for x in value.iter().flatten().filter(|_| full) {
                        prefetch(&x[first + at..][..LANES], 0);
                    }
                    let (mut raw, mut ratio) = (ZERO, ZERO);
                    for i in 0..LANES {
                        // A masked token becomes one with ratio 1, which adds nothing.
                        raw[i] = select(w[i] != 0.0, new[i] - old[i], 0.0);
                        let d = clip(raw[i], -self.log_ratio_limit, self.log_ratio_limit);
                        ratio[i] = exp(d);
                        total[i] += d;
                        total_squares[i] = d.mul_add(d, total_squares[i]);
                        k3[i] += k3_and_slope(-d).0;
                    }
                    raws[at..][..LANES].copy_from_slice(&raw);
                    ratios[at..][..LANES].copy_from_slice(&ratio);
                },
            );
            let mut grad = grad.as_mut().map(|grad| &mut grad[stretch]);
            for_lanes(
                weights.len(),
                #[inline(always)]
                |at, full| {
                    let (w, a) = (load(weights, at, full), load(advantages, at, full));
                    let (raw, ratio) = (&raws[at..][..LANES], &ratios[at..][..LANES]);
                    let mut g = ZERO;
                    for i in 0..LANES {
                        let (raw, ratio) = (raw[i], ratio[i]);
                        let keep = w[i] != 0.0;
                        let a = select(keep, a[i], 0.0);
                        let clamped = (raw < -self.log_ratio_limit) | (raw > self.log_ratio_limit);

                        let unclipped_loss = -ratio * a;
                        let clipped_loss = -clip(ratio, self.low, self.high) * a;
                        let is_clipped = clipped_loss > unclipped_loss;
                        let larger = select(is_clipped, clipped_loss, unclipped_loss);
                        let bound = select(a < 0.0, -self.dual_clip * a, f32::INFINITY);
                        let is_lower = larger > bound;
                        let blocked = is_clipped | is_lower | clamped | !keep;
                        g[i] = select(blocked, 0.0, unclipped_loss * w[i] * self.policy_scale);

                        let is_outside = (ratio < self.low) | (ratio > self.high);
                        let counts =
                            (self.count_outside & is_outside) | (!self.count_outside & is_clipped);
                        loss[i] = w[i].mul_add(select(is_lower, bound, larger), loss[i]);
                        clipped[i] += u32::from(counts & keep);
                        lower_clipped[i] += u32::from(is_lower);
                        let excess = select(keep, ratio - centre, 0.0);
                        ratio_sum[i] += excess;
                        squares[i] = excess.mul_add(excess, squares[i]);
                        let low = select(keep, ratio, min[i]);
                        let high = select(keep, ratio, max[i]);
                        min[i] = select(low < min[i], low, min[i]);
                        max[i] = select(high > max[i], high, max[i]);
                        advantage[i] += a;
                    }
                    if let Some(grad) = &mut grad {
                        store(grad, at, full, g, writer);
                    }
                },
            );
        }
        sums.policy_loss = sum(loss);
        sums.clipped = count_of(clipped);
        sums.lower_clipped = count_of(lower_clipped);
        sums.k1 = -sum(total);
        sums.k2 = 0.5 * sum(total_squares);
        sums.k3 = sum(k3);
        if sums.k3.is_nan() && sums.k1 == f64::NEG_INFINITY {
            // e^d - 1 - d of d = inf, of which the exponential is the larger one.
            sums.k3 = f64::INFINITY;
        }
        sums.ratio = moments(centre, sums.tokens, sum(ratio_sum), sum(squares));
        sums.ratio_min = f64::from(min.into_iter().fold(f32::INFINITY, f32::min));
        sums.ratio_max = f64::from(max.into_iter().fold(f32::NEG_INFINITY, f32::max));
        sums.advantages = sum(advantage);
    }

    /// Adds its gradient to the policy term's.
    #[inline(always)]
    fn kl<const NON_TEMPORAL: bool>(
        self,
        weights: &[f32],
        (logp, ref_logp): (&[f32], &[f32]),
        grad: Option<&mut [f32]>,
        sums: &mut Sums,
        writer: &Writer<NON_TEMPORAL>,
    ) {
        // Where the coefficient is 0 the derivative, which may be infinite, is not wanted.
        let mut grad = grad.filter(|_| self.kl_scale != 0.0);
        let (mut loss, mut total) = (ZERO, ZERO);
        for_lanes(
            weights.len(),
            #[inline(always)]
            |at, full| {
                let (w, new, reference) =
                    (load(weights, at, full), load(logp, at, full), load(ref_logp, at, full));
                let mut g = grad.as_ref().map_or(ZERO, |grad| load(grad, at, full));
                for i in 0..LANES {
                    // Every estimate of d = 0 is 0.
                    let d = select(w[i] != 0.0, new[i] - reference[i], 0.0);
                    let (value, derivative) = self.kl.at(d);
                    loss[i] += w[i] * value;
                    total[i] += value;
                    g[i] += derivative * w[i] * self.kl_scale;
                }
                if let Some(grad) = &mut grad {
                    store(grad, at, full, g, writer);
                }
            },
        );
        sums.kl_loss = sum(loss);
        sums.kl = sum(total);
    }

    /// The variances of returns and residuals are taken around these centres, so that they keep their
    /// digits far from 0.
    #[inline(always)]
    fn value<const NON_TEMPORAL: bool>(
        self,
        weights: &[f32],
        [values, old_values, returns]: [&[f32]; 3],
        centres: [f32; 2],
        mut grad: Option<&mut [f32]>,
        sums: &mut Sums,
        writer: &Writer<NON_TEMPORAL>,
    ) {
        // Where the coefficient is 0 the error, which may be NaN, is not wanted.
        let wanted = self.value_scale != 0.0;
        let (mut loss, mut clipped) = (ZERO, [0_u32; LANES]);
        let (mut target, mut target_squares) = (ZERO, ZERO);
        let (mut residual, mut residual_squares) = (ZERO, ZERO);
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
                    store(grad, at, full, g, writer);
                }
            },
        );
        let around =
            |centre, total, squares| moments(centre, sums.tokens, sum(total), sum(squares));
        sums.returns = around(centres[0], target, target_squares);
        sums.residuals = around(centres[1], residual, residual_squares);
        sums.value_loss = 0.5 * sum(loss);
        sums.value_clipped = count_of(clipped);
    }

    #[inline(always)]
    fn entropy<const NON_TEMPORAL: bool>(
        self,
        weights: &[f32],
        entropy: &[f32],
        mut grad: Option<&mut [f32]>,
        sums: &mut Sums,
        writer: &Writer<NON_TEMPORAL>,
    ) {
        let (mut loss, mut total) = (ZERO, ZERO);
        for_lanes(
            weights.len(),
            #[inline(always)]
            |at, full| {
                let (w, h) = (load(weights, at, full), load(entropy, at, full));
                let mut g = ZERO;
                for i in 0..LANES {
                    let h = select(w[i] != 0.0, h[i], 0.0);
                    loss[i] += w[i] * h;
                    total[i] += h;
                    g[i] = select(w[i] != 0.0, w[i] * self.entropy_scale, 0.0);
                }
                if let Some(grad) = &mut grad {
                    store(grad, at, full, g, writer);
                }
            },
        );
        sums.entropy_loss = sum(loss);
        sums.entropy = sum(total);
    }
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

/// What a run of tokens adds up to. The losses are weighted by row, the rest is plain.
#[derive(Clone, Copy)]
struct Sums {
    tokens: u64,
    policy_loss: f64,
    value_loss: f64,
    entropy_loss: f64,
    kl_loss: f64,
    clipped: f64,
    lower_clipped: f64,
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
        lower_clipped: 0.0,
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
            lower_clipped: self.lower_clipped + other.lower_clipped,
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

    fn stats(&self, inputs: &Inputs, options: &PpoLossOptions, divisor: f64) -> PpoStats {
        let given = |present: bool, x: f64| if present { x } else { f64::NAN };
        let (value, entropy) = (inputs.values.is_some(), inputs.entropy.is_some());
        // 0 / 0 is NaN where there is no token.
        let mean = |sum: f64| sum / self.tokens as f64;
        let any = self.tokens > 0;

        // A sum whose coefficient is 0 stays out, so that its NaN does.
        let term = |coef: f64, sum: f64| if coef == 0.0 { 0.0 } else { coef * (sum / divisor) };
        let policy_loss = self.policy_loss / divisor;
        let loss = policy_loss + term(options.value_coef, self.value_loss)
            - term(options.entropy_coef, self.entropy_loss)
            + term(options.kl_coef, self.kl_loss);
        let explained = given(self.returns.m2 != 0.0, self.residuals.m2);
        PpoStats {
            loss,
            policy_loss,
            value_loss: given(value, self.value_loss / divisor),
            clip_fraction: mean(self.clipped),
            lower_clip_fraction: mean(self.lower_clipped),
            value_clip_fraction: given(value, mean(self.value_clipped)),
            approx_kl_k1: mean(self.k1),
            approx_kl_k2: mean(self.k2),
            approx_kl_k3: mean(self.k3),
            ratio_mean: given(any, self.ratio.mean),
            ratio_var: self.ratio.variance(false),
            ratio_min: given(any, self.ratio_min),
            ratio_max: given(any, self.ratio_max),
            entropy_mean: given(entropy, mean(self.entropy)),
            kl_mean: given(inputs.ref_logp.is_some(), mean(self.kl)),
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
    fn bits<const NON_TEMPORAL: bool>(len: usize, offset: usize) -> Vec<u32> {
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
            policy: (logp, old_logp, advantages),
            value: Some((values, Some(old_values), returns)),
            entropy: Some(entropy),
            ref_logp: Some(ref_logp),
            mask: Some(&mask),
            grad_logp,
            grad_values,
            grad_entropy,
        };
        let options = PpoLossOptions { kl_coef: 0.1, entropy_coef: 0.1, ..Default::default() };
        Terms::new(&options, 1.0).sum::<NON_TEMPORAL>(tokens, RowWeight::Given(1.0));
        grads.into_iter().flatten().map(f32::to_bits).collect()
    }

    #[test]
    fn gradients_past_the_caches_have_the_same_bits() {
        for (len, offset) in [(1024, 0), (1001, 1), (7, 0)] {
            assert_eq!(bits::<true>(len, offset), bits::<false>(len, offset));
        }
    }
}
