//! The fused CPU implementation: sums over the tokens of each row, the losses of the pairs, and their
//! gradients spread over the tokens. Between them some numbers a row are kept.

use std::ops::Range;

use super::{
    check_values, no_tokens, Link, PreferenceOptions, PreferenceStats, RewardModelOptions, Sorted,
    Terms, Transform, OP,
};
use crate::cpu::math::{count_nonzero, exp, ln_1p, sum_lanes};
use crate::cpu::{fill, map, prefetch, reduce, reduce_by, vectorise, with_stores, Split, Stores};
use crate::error::{Error, Result};
use crate::memory::{in_space, Lengths};
use crate::pack::{BatchShape, RangesMut, RowRanges};

/// Tokens of a leaf of the loops over rows: some 10 us of work.
const BLOCK_TOKENS: usize = 16 << 10;

/// Pairs of a leaf.
const BLOCK_UNITS: usize = 128;

/// How many tokens ahead of the sums memory is asked for.
const AHEAD: isize = 512;

in_space!(Host: Inputs, Outputs, RewardModelInputs, RewardModelOutputs);

/// Loss, statistics and the gradient, for an upstream gradient of 1, of `rows` responses of up to `seq_len`
/// tokens, or with offsets, of `seq_len` tokens in all. Reads every input once but for the mask, which is read once more for the gradient and for
/// LD-DPO. Allocates 60 bytes a row, and 40 more for losses of sorted log-ratios.
///
/// # Errors
/// If a length does not fit, the rows are no pairs, an option is out of range, something is given that does
/// not go with the loss, a label is neither 0 nor 1, or no pair counts and the denominator is not given.
/// Nothing is written then.
pub fn preference_loss(
    inputs: Inputs,
    rows: usize,
    seq_len: usize,
    options: &PreferenceOptions,
    mut outputs: Outputs,
) -> Result<()> {
    options.validate()?;
    let units = options.units(rows)?;
    let shape = BatchShape::new(rows, seq_len, inputs.offsets.is_some());
    inputs.try_map((shape, units), &mut Lengths(OP))?;
    inputs.check_given(options)?;
    outputs.try_map((shape, units), &mut Lengths(OP))?;
    check_values(inputs.labels, inputs.lengths)?;
    let ranges = RowRanges::new(OP, seq_len, inputs.offsets)?;
    let (terms, scales) = (Terms::new(options), Scales::of(options));
    run(&inputs, (rows, ranges), units, &terms, &scales, outputs)
}

/// Loss, statistics and the gradient, for an upstream gradient of 1, of the rewards of `pairs` pairs:
/// the mean of -ls(chosen - rejected - margin) + center_coef (chosen + rejected)².
///
/// # Errors
/// If a length does not fit, an option is out of range, or no pair counts and the denominator is not given.
/// Nothing is written then.
pub fn reward_model_loss(
    inputs: RewardModelInputs,
    pairs: usize,
    options: &RewardModelOptions,
    mut outputs: RewardModelOutputs,
) -> Result<()> {
    options.validate()?;
    inputs.try_map(pairs, &mut Lengths(OP))?;
    outputs.try_map(pairs, &mut Lengths(OP))?;
    let RewardModelInputs { rewards, margin, weights } = inputs;
    let RewardModelOutputs { stats, loss, losses, grad_rewards } = outputs;
    let inputs = Inputs { margin, weights, ..Inputs::new(rewards) };
    let outputs = Outputs { loss, losses, grad_logp: grad_rewards, ..Outputs::new(stats) };
    let scales = Scales { denominator: options.denominator, ..Scales::default() };
    let rows = (2 * pairs, RowRanges::new(OP, 1, None)?);
    run(&inputs, rows, pairs, &Terms::reward_model(options), &scales, outputs)
}

/// The factors of the sums in the end.
#[derive(Default)]
struct Scales {
    denominator: Option<f64>,
    sft_coef: f64,
    sft_denominator: Option<f64>,
}

impl Scales {
    fn of(options: &PreferenceOptions) -> Self {
        let PreferenceOptions { denominator, sft_coef, sft_denominator, .. } = *options;
        Self { denominator, sft_coef, sft_denominator }
    }
}

/// All of it, of what has been checked.
fn run(
    inputs: &Inputs,
    (rows, ranges): (usize, RowRanges),
    units: usize,
    terms: &Terms,
    scales: &Scales,
    outputs: Outputs,
) -> Result<()> {
    let counted = inputs.weights.map_or(units, |w| w.iter().filter(|&&w| w != 0.0).count());
    if counted == 0 && scales.denominator.is_none() {
        let arg = if inputs.weights.is_some() { "weights" } else { "logp" };
        return Err(Error::Mask { op: OP, arg, expected: 1, got: 0 });
    }
    let mut sums = vec![RowSums::default(); rows];
    sum_rows(inputs, ranges, terms, &mut sums);
    let paired = terms.link != Link::Kto;
    let has_sft = scales.sft_coef != 0.0;
    if has_sft && scales.sft_denominator.is_none() {
        let keeps = |unit: usize| inputs.weights.is_none_or(|weights| weights[unit] != 0.0);
        if !(0..units).any(|unit| keeps(unit) && sums[unit].length > 0.0) {
            return Err(no_tokens());
        }
    }
    let others = others(terms, &sums);

    let mut gradients = vec![RowGradient::default(); rows];
    let found = {
        let (sums, rejected_sums) = sums.split_at(units);
        let (chosen, rejected) = gradients.split_at_mut(units);
        let (others, rejected_others) = others.as_deref().split(units);
        let (rewards, rejected_rewards) = outputs.rewards.split(units);
        let chosen = (sums, others, chosen, rewards);
        let rejected = (rejected_sums, rejected_others, rejected, rejected_rewards);
        let items = (
            chosen,
            paired.then_some(rejected),
            inputs.weights,
            inputs.margin,
            inputs.labels,
            outputs.losses,
        );
        let kl = inputs.kl.map_or(0.0, |kl| f64::from(kl[0]));
        let leaf = |_, count, items| terms.units(count, kl, items);
        reduce(units, BLOCK_UNITS, items, leaf, Found::merge)
    };

    let stats = found.stats(scales, paired);
    outputs.stats[0] = stats;
    if let Some(loss) = outputs.loss {
        loss[0] = stats.loss as f32;
    }
    if let Some(grad) = outputs.grad_logp {
        let sft = if has_sft { scales.sft_coef / found.sft_divisor(scales) } else { 0.0 };
        let factors = [found.divisor(scales).recip() as f32, -sft as f32];
        let stores = Stores::of(size_of_val(grad));
        let items = (RangesMut::new(grad, ranges), gradients.as_slice());
        for_rows(rows, ranges, items, |first, _, (mut grad, gradients)| {
            let mask = |row: usize| of_row(inputs.mask, ranges.range(first + row));
            with_stores!(stores, STORES => spread::<STORES>(&mut grad, mask, gradients, factors));
        });
    }
    Ok(())
}

/// Calls `leaf(first, count, items)` on runs of rows, in parallel.
fn for_rows<S: Split>(
    rows: usize,
    ranges: RowRanges,
    items: S,
    leaf: impl Fn(usize, usize, S) + Sync,
) {
    // Rows of some tokens are as much work as those of a few more.
    let short = ranges.start(rows) / rows.max(1) * (BLOCK_TOKENS / 16);
    let grain = short.clamp(1, BLOCK_TOKENS);
    let cut = move |first, count| ranges.middle(first, count, grain);
    reduce_by(rows, cut, items, leaf, |(), ()| ());
}

// ---- sums over tokens ----

/// Sums over the tokens of a row.
#[derive(Clone, Copy, Default)]
struct RowSums {
    /// The sum of the log-probabilities.
    plain: f64,
    /// The sum of the log-probabilities, and that of the reference's, with LD-DPO's weights.
    policy: f64,
    reference: f64,
    length: f64,
    /// The first of the tokens that the other response of the pair does not have.
    tail: usize,
}

/// Sums of all rows.
fn sum_rows(inputs: &Inputs, ranges: RowRanges, terms: &Terms, sums: &mut [RowSums]) {
    let rows = sums.len();
    let mask = |row: usize| of_row(inputs.mask, ranges.range(row));
    let has_tails = terms.ld_alpha != 1.0;
    if has_tails {
        for_rows(rows, ranges, &mut *sums, |first, _, sums: &mut [RowSums]| {
            for (row, sums) in (first..).zip(sums) {
                sums.length = count_kept(mask(row), ranges.range(row).len());
            }
        });
        let lengths: Vec<f64> = sums.iter().map(|sums| sums.length).collect();
        for (row, sums) in sums.iter_mut().enumerate() {
            let (other, end) = (lengths[(row + rows / 2) % rows], ranges.range(row).len());
            sums.tail = match sums.length > other {
                true => nth_kept(mask(row), other as usize).unwrap_or(end),
                false => end,
            };
        }
    }
    for_rows(rows, ranges, sums, |first, _, sums: &mut [RowSums]| {
        for (row, sums) in (first..).zip(sums) {
            let (range, mask) = (ranges.range(row), mask(row));
            if !has_tails {
                (sums.length, sums.tail) = (count_kept(mask, range.len()), range.len());
            }
            let parts = sum_parts(&inputs.logp[range.clone()], mask, sums.tail);
            (sums.plain, sums.policy) = (parts[0] + parts[1], terms.weighted(parts));
            if let Some(ref_logp) = inputs.ref_logp {
                sums.reference = terms.weighted(sum_parts(&ref_logp[range], mask, sums.tail));
            }
            if let Some(ref_sums) = inputs.ref_sums {
                sums.reference = f64::from(ref_sums[row]);
            }
            if let Some(lengths) = inputs.lengths {
                sums.length = lengths[row] as f64;
            }
        }
    });
}

#[inline(always)]
fn of_row(mask: Option<&[u8]>, range: Range<usize>) -> Option<&[u8]> {
    mask.map(|mask| &mask[range])
}

/// How many of the tokens of a row are unmasked.
fn count_kept(mask: Option<&[u8]>, seq_len: usize) -> f64 {
    let count = |mask| {
        vectorise(
            #[inline(always)]
            || count_nonzero(mask),
        )
    };
    mask.map_or(seq_len, count) as f64
}

/// Where the token is that has `count` unmasked ones before it.
fn nth_kept(mask: Option<&[u8]>, count: usize) -> Option<usize> {
    let Some(mask) = mask else {
        return Some(count);
    };
    let kept = mask.iter().enumerate().filter(|(_, &m)| m != 0);
    kept.map(|(at, _)| at).nth(count)
}

/// The sums of what is before the tail, and of the tail.
fn sum_parts(x: &[f32], mask: Option<&[u8]>, tail: usize) -> [f64; 2] {
    let (head, rest) = x.split_at(tail);
    match mask {
        None => [sum_of(head, head, plain), sum_of(rest, rest, plain)],
        Some(mask) => {
            let (head_mask, rest_mask) = mask.split_at(tail);
            [sum_of(head, head_mask, kept), sum_of(rest, rest_mask, kept)]
        }
    }
}

#[inline(always)]
fn plain(x: f32, _: f32) -> f32 {
    x
}

#[inline(always)]
fn kept(x: f32, m: u8) -> f32 {
    if m != 0 {
        x
    } else {
        0.0
    }
}

/// Tokens that are summed at a time: as many sums hide the additions' latency.
const WIDE: usize = 64;

/// So many numbers, where a vector of them is in one line of the cache.
#[repr(align(64))]
struct Aligned([f32; WIDE]);

/// The sum of f(x, m), in lanes of f64.
fn sum_of<M: Copy>(x: &[f32], m: &[M], f: impl Fn(f32, M) -> f32) -> f64 {
    // No more than one token: else a row's sum would depend on what pads it.
    if x.len() <= 1 {
        let tokens = x.iter().zip(m);
        return tokens.fold(0.0, |sum, (&x, &m)| sum + f64::from(f(x, m)));
    }
    // A row by itself: of more than its loop the compiler would keep the sums in memory.
    vectorise(
        #[inline(always)]
        || {
            let mut lanes = [0.0_f64; WIDE];
            let (chunks, last) = x.as_chunks::<WIDE>();
            let (chunks_m, last_m) = m.as_chunks::<WIDE>();
            // Apart: the compiler makes vectors of each loop, and none of both in one.
            let mut kept = Aligned([0.0; WIDE]);
            for (x, m) in chunks.iter().zip(chunks_m) {
                prefetch(x, AHEAD);
                for i in 0..WIDE {
                    kept.0[i] = f(x[i], m[i]);
                }
                for (lane, kept) in lanes.iter_mut().zip(kept.0) {
                    *lane += f64::from(kept);
                }
            }
            let mut kept = Aligned([0.0; WIDE]);
            for (kept, (&x, &m)) in kept.0.iter_mut().zip(last.iter().zip(last_m)) {
                *kept = f(x, m);
            }
            for (lane, kept) in lanes.iter_mut().zip(kept.0) {
                *lane += f64::from(kept);
            }
            sum_lanes(lanes)
        },
    )
}

/// The gradient of a row's tokens, but for the factors of the whole batch.
#[derive(Clone, Copy, Default)]
struct RowGradient {
    head: f32,
    /// The weight of the tokens from `tail` on.
    rest: f32,
    /// 1 where the likelihood term is of the row.
    sft: f32,
    tail: usize,
}

/// Writes the gradients of rows.
#[inline(always)]
fn spread<'a, const STORES: u8>(
    grad: &mut RangesMut<f32>,
    mask_of: impl Fn(usize) -> Option<&'a [u8]>,
    gradients: &[RowGradient],
    [factor, sft_factor]: [f32; 2],
) {
    for (row, from) in gradients.iter().enumerate() {
        let sft = from.sft * sft_factor;
        let (head, rest) = (from.head.mul_add(factor, sft), from.rest.mul_add(factor, sft));
        let (grad, mask) = (grad.row(row), mask_of(row));
        if let [grad] = grad {
            let masked = mask.is_some_and(|mask| mask[0] == 0);
            *grad = kept(if from.tail == 0 { rest } else { head }, u8::from(!masked));
            continue;
        }
        let (head_mask, rest_mask) = mask.map(|mask| mask.split_at(from.tail)).unzip();
        let (to_head, to_rest) = grad.split_at_mut(from.tail);
        for (grad, x, mask) in [(to_head, head, head_mask), (to_rest, rest, rest_mask)] {
            match mask {
                None => fill::<STORES, _>(grad, x),
                Some(mask) => map::<STORES, _, _>(
                    grad,
                    mask,
                    #[inline(always)]
                    |m| kept(x, m),
                ),
            }
        }
    }
}

// ---- sorted log-ratios ----

/// By row, the score in the place of the other response's, where log-ratios are sorted over the batch.
fn others(terms: &Terms, sums: &[RowSums]) -> Option<Vec<f64>> {
    let units = sums.len() / 2;
    let (chosen, rejected) = sums.split_at(units);
    let of = |f: &dyn Fn(&RowSums, &RowSums) -> f64| -> Vec<f64> {
        chosen.iter().zip(rejected).map(|(chosen, rejected)| f(chosen, rejected)).collect()
    };
    match terms.sorted {
        Sorted::Nothing => None,
        Sorted::Pairs => {
            let n = |row: &RowSums| terms.divisor(row.length);
            let policy = of(&|c, r| c.policy / n(c) - r.policy / n(r));
            let reference = of(&|c, r| c.reference / n(c) - r.reference / n(r));
            let [matched, _] = matched(&policy, &reference);
            let mut others = vec![0.0; 2 * units];
            for i in 0..units {
                let delta = policy[i] - matched[i];
                others[i] = terms.score(&chosen[i]).value - delta;
                others[i + units] = terms.score(&rejected[i]).value + delta;
            }
            Some(others)
        }
        Sorted::Sides => {
            let x = of(&|chosen, _| terms.score(chosen).value);
            let y = of(&|_, rejected| terms.score(rejected).value);
            Some(matched(&x, &y).concat())
        }
    }
}

/// By element of each, the one of the other that has the same rank.
fn matched(x: &[f64], y: &[f64]) -> [Vec<f64>; 2] {
    let order = |values: &[f64]| {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
        order
    };
    let mut matched = [x.to_vec(), y.to_vec()];
    for (i, j) in order(x).into_iter().zip(order(y)) {
        (matched[0][i], matched[1][j]) = (y[j], x[i]);
    }
    matched
}

// ---- losses ----

/// The score of a response, which stands for its log-ratio in the loss, and its derivative by the sum.
struct Score {
    value: f64,
    slope: f64,
    /// β x, which the statistics are of.
    reward: f64,
}

/// ln s(h), ln s(-h), s(h) and s(-h), with one exponential and one logarithm.
struct Logistic {
    ln: f32,
    ln_of_minus: f32,
    s: f32,
    of_minus: f32,
}

#[inline(always)]
fn logistic(h: f32) -> Logistic {
    let z = exp(-h.abs());
    let ln = ln_1p(z);
    let (large, small) = (1.0 / (1.0 + z), z / (1.0 + z));
    // NaN is on either side.
    let positive = h >= 0.0;
    Logistic {
        ln: if h > 0.0 { 0.0 } else { h } - ln,
        ln_of_minus: if h < 0.0 { 0.0 } else { -h } - ln,
        s: if positive { large } else { small },
        of_minus: if positive { small } else { large },
    }
}

/// One side of the pairs: sums, what takes the other side's place, and where gradients and rewards go.
type Side<'a> = (&'a [RowSums], Option<&'a [f64]>, &'a mut [RowGradient], Option<&'a mut [f32]>);

/// The sides, and of the units weights, margins, labels, and where losses go.
type Units<'a> = (
    Side<'a>,
    Option<Side<'a>>,
    Option<&'a [f32]>,
    Option<&'a [f32]>,
    Option<&'a [u8]>,
    Option<&'a mut [f32]>,
);

/// Scores of a block of units in f32, as the losses take them.
struct Scores {
    a: [f32; BLOCK_UNITS],
    b: [f32; BLOCK_UNITS],
    h: [f32; BLOCK_UNITS],
}

/// The losses of a block of units, and their derivatives by a and b.
struct Losses {
    loss: [f32; BLOCK_UNITS],
    a: [f32; BLOCK_UNITS],
    b: [f32; BLOCK_UNITS],
}

impl Losses {
    const NONE: Self =
        Self { loss: [0.0; BLOCK_UNITS], a: [0.0; BLOCK_UNITS], b: [0.0; BLOCK_UNITS] };

    /// f(i, a, b, h) of the first units.
    #[inline(always)]
    fn each(
        &mut self,
        scores: &Scores,
        count: usize,
        f: impl Fn(usize, f32, f32, f32) -> (f32, f32, f32),
    ) {
        for i in 0..count.min(BLOCK_UNITS) {
            let (loss, a, b) = f(i, scores.a[i], scores.b[i], scores.h[i]);
            (self.loss[i], self.a[i], self.b[i]) = (loss, a, b);
        }
    }
}

impl Terms {
    /// The sum of a row whose tail counts less.
    #[inline(always)]
    fn weighted(&self, [head, rest]: [f64; 2]) -> f64 {
        rest.mul_add(self.ld_alpha, head)
    }

    /// The divisor of the scores of a response of that length.
    #[inline(always)]
    fn divisor(&self, length: f64) -> f64 {
        if self.averages != 0 {
            length.max(1.0)
        } else {
            1.0
        }
    }

    #[inline(always)]
    fn score(&self, sums: &RowSums) -> Score {
        let x = sums.policy - sums.reference;
        if self.transform == Transform::Identity && self.averages == 0 {
            // Most losses: without a division.
            return Score { value: x, slope: 1.0, reward: self.beta * x };
        }
        let n = self.divisor(sums.length);
        let (mean, e) = (x / n, self.exponent);
        let (value, slope) = match self.transform {
            Transform::Identity => (mean, 1.0 / n),
            Transform::ForwardKl | Transform::Alpha => {
                ((e * x).exp_m1() / e / n, (e * x).exp() / n)
            }
            Transform::JensenShannon => {
                let z = (-x.abs()).exp();
                let of_minus = if x < 0.0 { 1.0 / (1.0 + z) } else { z / (1.0 + z) };
                let ln = if x > 0.0 { 0.0 } else { x } - z.ln_1p();
                ((std::f64::consts::LN_2 + ln) / n, of_minus / n)
            }
            Transform::LogOdds => {
                let rest = 0.0 - mean.exp_m1();
                // Of a probability below a half ln(1 - p) is p itself, nearly.
                let ln = if mean < -0.7 { (-mean.exp()).ln_1p() } else { rest.ln() };
                (mean - ln, 1.0 / rest / n)
            }
            Transform::AlphaPo => ((e * mean).exp_m1() / e, (e * mean).exp() / n),
        };
        let rewarded = if self.transform == Transform::AlphaPo { value } else { mean };
        Score { value, slope, reward: self.beta * rewarded }
    }

    /// Losses, gradients and sums of at most [`BLOCK_UNITS`] units.
    fn units(&self, count: usize, kl: f64, items: Units) -> Found {
        let (mut chosen, mut rejected, weights, margin, labels, mut losses) = items;
        let zeros = || [0.0; BLOCK_UNITS];
        let mut by_x = Scores { a: zeros(), b: zeros(), h: zeros() };
        // Where log-ratios are sorted, the rejected response meets another one.
        let mut by_y = [0.0; BLOCK_UNITS];
        for i in 0..count {
            let shift = self.gamma + margin.map_or(0.0, |margin| f64::from(margin[i]));
            let x = self.score(&chosen.0[i]).value - kl;
            let y = rejected.as_ref().map_or(0.0, |side| self.score(&side.0[i]).value);
            let other = chosen.1.map_or(y, |others| others[i]);
            by_x.a[i] = (self.inner * x) as f32;
            by_x.b[i] = (self.inner * y) as f32;
            by_x.h[i] = (self.inner * (x - other) - shift) as f32;
            if let Some((_, Some(others), ..)) = &rejected {
                by_y[i] = (self.inner * (others[i] - y) - shift) as f32;
            }
        }
        let link = |scores: &Scores| {
            let mut out = Losses::NONE;
            vectorise(
                #[inline(always)]
                || self.link(scores, labels, count, &mut out),
            );
            out
        };
        let mut terms = link(&by_x);
        if chosen.1.is_some() {
            terms.b = link(&Scores { h: by_y, ..by_x }).b;
        }

        let mut found = Found::default();
        for i in 0..count {
            let (loss, by_a, by_b) = (terms.loss[i], terms.a[i], terms.b[i]);
            let weight = weights.map_or(1.0, |weights| f64::from(weights[i]));
            if weight == 0.0 {
                let sides = [Some(&mut chosen), rejected.as_mut()];
                for (sums, _, gradients, rewards) in sides.into_iter().flatten() {
                    gradients[i] = RowGradient { tail: sums[i].tail, ..RowGradient::default() };
                    set(rewards, i, 0.0);
                }
                set(&mut losses, i, 0.0);
                continue;
            }
            let loss = f64::from(loss) * self.outer * weight;
            found.units += 1.0;
            found.loss += loss;
            set(&mut losses, i, loss as f32);
            let scale = self.inner * self.outer * weight;
            let is_chosen = labels.is_none_or(|labels| labels[i] != 0);
            let sft = rejected.is_some();
            let reward = self.row(i, &mut chosen, scale * f64::from(by_a), sft);
            found.side(is_chosen, &chosen.0[i], reward);
            if let Some(side) = &mut rejected {
                found.sft -= chosen.0[i].plain;
                found.sft_tokens += chosen.0[i].length;
                let other = self.row(i, side, scale * f64::from(by_b), false);
                found.side(false, &side.0[i], other);
                found.correct += f64::from(u8::from(reward > other));
            }
        }
        found
    }

    /// Leaves the gradient of a row of that derivative by its score; its reward.
    #[inline(always)]
    fn row(&self, i: usize, side: &mut Side, by_score: f64, sft: bool) -> f64 {
        let (sums, _, gradients, rewards) = side;
        let score = self.score(&sums[i]);
        // A derivative of 0 is one of 0, however steep the score is.
        let head = if by_score == 0.0 { 0.0 } else { by_score * score.slope };
        gradients[i] = RowGradient {
            head: head as f32,
            rest: (head * self.ld_alpha) as f32,
            sft: f32::from(u8::from(sft)),
            tail: sums[i].tail,
        };
        set(rewards, i, score.reward as f32);
        score.reward
    }

    /// The losses of the scores, before `outer`.
    #[inline(always)]
    fn link(&self, scores: &Scores, labels: Option<&[u8]>, count: usize, out: &mut Losses) {
        let (right, wrong) = (self.right as f32, self.wrong as f32);
        match self.link {
            Link::Logistic => out.each(
                scores,
                count,
                #[inline(always)]
                |_, _, _, h| {
                    let l = logistic(h);
                    // Where the share is 0 the logarithm, which may be infinite, is not wanted.
                    let of_wrong = if wrong == 0.0 { 0.0 } else { wrong * l.ln_of_minus };
                    of_h(-right * l.ln - of_wrong, wrong * l.s - right * l.of_minus)
                },
            ),
            Link::Hinge => out.each(
                scores,
                count,
                #[inline(always)]
                |_, _, _, h| {
                    let room = 1.0 - h;
                    // Comparisons that keep NaN.
                    of_h(if room < 0.0 { 0.0 } else { room }, if h < 1.0 { -1.0 } else { 0.0 })
                },
            ),
            Link::Square => out.each(
                scores,
                count,
                #[inline(always)]
                |_, _, _, h| {
                    let off = h - 0.5;
                    of_h(off * off, 2.0 * off)
                },
            ),
            Link::Exo => out.each(
                scores,
                count,
                #[inline(always)]
                |_, _, _, h| {
                    let l = logistic(h);
                    of_h(
                        l.s * (l.ln - right) + l.of_minus * (l.ln_of_minus - wrong),
                        l.s * l.of_minus * (h - right + wrong),
                    )
                },
            ),
            Link::Nca => out.each(
                scores,
                count,
                #[inline(always)]
                |_, a, b, _| {
                    let (a, b) = (logistic(a), logistic(b));
                    let loss = -a.ln - 0.5 * (a.ln_of_minus + b.ln_of_minus);
                    (loss, 0.5 * a.s - a.of_minus, 0.5 * b.s)
                },
            ),
            Link::Bco => out.each(
                scores,
                count,
                #[inline(always)]
                |_, a, b, _| {
                    let (a, b) = (logistic(a), logistic(b));
                    (-a.ln - b.ln_of_minus, -a.of_minus, b.s)
                },
            ),
            Link::Sppo => out.each(
                scores,
                count,
                #[inline(always)]
                |_, a, b, _| {
                    let (a, b) = (a - 0.5, b + 0.5);
                    (a * a + b * b, 2.0 * a, 2.0 * b)
                },
            ),
            Link::ApoZero => out.each(
                scores,
                count,
                #[inline(always)]
                |_, a, b, _| {
                    let (a, b) = (logistic(a), logistic(b));
                    (a.of_minus + b.s, -a.s * a.of_minus, b.s * b.of_minus)
                },
            ),
            Link::ApoDown => out.each(
                scores,
                count,
                #[inline(always)]
                |_, a, _, h| {
                    let (a, h) = (logistic(a), logistic(h));
                    let slope = h.s * h.of_minus;
                    (a.s + h.of_minus, a.s * a.of_minus - slope, slope)
                },
            ),
            Link::Discopop => {
                let tau = self.tau as f32;
                out.each(
                    scores,
                    count,
                    #[inline(always)]
                    |_, _, _, h| {
                        let (l, g) = (logistic(h), logistic(h / tau));
                        // e^-h g, whose factors may be infinite and 0: below 0 as one exponential.
                        let product = if h < 0.0 { exp(h / tau - h) } else { exp(-h) };
                        let product = product * if h < 0.0 { g.of_minus } else { g.s };
                        of_h(
                            product - l.ln * g.of_minus,
                            l.ln * (g.s * g.of_minus / tau) - l.of_minus * g.of_minus
                                + product * (g.of_minus / tau - 1.0),
                        )
                    },
                );
            }
            Link::Kto => {
                let (desirable, undesirable) = (self.desirable as f32, self.undesirable as f32);
                out.each(
                    scores,
                    count,
                    #[inline(always)]
                    |i, a, _, _| {
                        let a = logistic(a);
                        let slope = a.s * a.of_minus;
                        match labels.is_some_and(|labels| labels[i] != 0) {
                            true => (desirable * a.of_minus, -desirable * slope, 0.0),
                            false => (undesirable * a.s, undesirable * slope, 0.0),
                        }
                    },
                );
            }
        }
        if self.center != 0.0 {
            let center = self.center as f32;
            for i in 0..count {
                let sum = scores.a[i] + scores.b[i];
                out.loss[i] += center * sum * sum;
                out.a[i] += 2.0 * center * sum;
                out.b[i] += 2.0 * center * sum;
            }
        }
    }
}

/// A loss of h alone and its derivative, as what [`Losses::each`] takes.
#[inline(always)]
fn of_h(loss: f32, slope: f32) -> (f32, f32, f32) {
    (loss, slope, -slope)
}

/// Writes an element of what is wanted.
#[inline(always)]
fn set(out: &mut Option<&mut [f32]>, i: usize, x: f32) {
    if let Some(out) = out {
        out[i] = x;
    }
}

/// Sums over some units.
#[derive(Clone, Copy, Default)]
struct Found {
    units: f64,
    loss: f64,
    /// Negative log-likelihood of the chosen responses, and their tokens.
    sft: f64,
    sft_tokens: f64,
    correct: f64,
    /// The chosen responses and the rejected ones: their number, rewards and log-probabilities.
    count: [f64; 2],
    reward: [f64; 2],
    logp: [f64; 2],
}

impl Found {
    #[inline(always)]
    fn side(&mut self, is_chosen: bool, sums: &RowSums, reward: f64) {
        let side = usize::from(!is_chosen);
        self.count[side] += 1.0;
        self.reward[side] += reward;
        self.logp[side] += sums.policy;
    }

    fn merge(self, other: Self) -> Self {
        let both = |a: [f64; 2], b: [f64; 2]| [a[0] + b[0], a[1] + b[1]];
        Self {
            units: self.units + other.units,
            loss: self.loss + other.loss,
            sft: self.sft + other.sft,
            sft_tokens: self.sft_tokens + other.sft_tokens,
            correct: self.correct + other.correct,
            count: both(self.count, other.count),
            reward: both(self.reward, other.reward),
            logp: both(self.logp, other.logp),
        }
    }

    fn divisor(&self, scales: &Scales) -> f64 {
        scales.denominator.unwrap_or(self.units)
    }

    fn sft_divisor(&self, scales: &Scales) -> f64 {
        scales.sft_denominator.unwrap_or(self.sft_tokens)
    }

    fn stats(&self, scales: &Scales, paired: bool) -> PreferenceStats {
        // 0 / 0 is NaN where there is no response.
        let mean = |sums: [f64; 2], side: usize| sums[side] / self.count[side];
        let preference_loss = self.loss / self.divisor(scales);
        let sft_loss = self.sft / self.sft_divisor(scales);
        let sft = if scales.sft_coef == 0.0 { 0.0 } else { scales.sft_coef * sft_loss };
        let given = |x: f64| if paired { x } else { f64::NAN };
        PreferenceStats {
            loss: preference_loss + sft,
            preference_loss,
            sft_loss: given(sft_loss),
            accuracy: given(self.correct / self.units),
            reward_margin: mean(self.reward, 0) - mean(self.reward, 1),
            chosen_reward: mean(self.reward, 0),
            rejected_reward: mean(self.reward, 1),
            chosen_logp: mean(self.logp, 0),
            rejected_logp: mean(self.logp, 1),
            chosen: self.count[0],
            rejected: self.count[1],
        }
    }
}
