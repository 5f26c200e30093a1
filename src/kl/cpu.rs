//! The fused CPU implementation, see [`super`] for the formulas. The exact KL walks the two rows once,
//! side by side, with running (maximum, sum, weighted sum). Long rows are cut into segments that are
//! shared out to threads, and merged in an order that depends on the rows' length only.

use super::{
    limit, Divergence, FullKlOptions, KlEstimator, KlOptions, FULL_OP, GAP, GAP_W, KL, MAX_W,
    MAX_Z, STATS, SUM_W, SUM_Z, TOKEN_OP,
};
use crate::cpu::math::{
    clip, exp, exp_m1, for_logits2, larger, less_ln_1p, ln_1p, max, max_lanes, select, sum_lanes,
    Exp, LOGIT_LANES,
};
use crate::cpu::store::CACHED;
use crate::cpu::{for_each, map, reduce, vectorise, with_stores, Logit, Rows, RowsMut, Stores};
use crate::error::{Error, Result};
use crate::memory::{in_space, Lengths};

/// Columns between two looks at the maxima, and of one pass of the gradient: 8 KiB of f32 in each
/// row, which are in the L1 cache still when they are read again.
const BLOCK: usize = 2048;

/// Columns of a segment, and logits a thread takes at a time, of each of the two tensors.
const GRAIN: usize = 32 * 1024;

/// How far above the maximum so far x may be before its sums are taken anew: e^8 costs them no
/// digits.
const HEADROOM: f32 = 8.0;

/// Tokens a thread takes at a time: what it writes stays in the L1 cache until it is masked.
const TOKEN_GRAIN: usize = 4096;

in_space!(
    Host:
    TokenForwardInputs, TokenForwardOutputs, TokenBackwardInputs, TokenBackwardOutputs,
    FullForwardInputs<T>, FullForwardOutputs, FullBackwardInputs<T>, FullBackwardOutputs<T>
);

/// Sampled KL of every one of `tokens` tokens.
///
/// # Errors
/// If a length does not fit or an option is out of range. Nothing is written then.
pub fn token_forward(
    inputs: TokenForwardInputs,
    tokens: usize,
    options: &KlOptions,
    mut outputs: TokenForwardOutputs,
) -> Result<()> {
    options.validate(TOKEN_OP)?;
    inputs.try_map(&[tokens], &mut Lengths(TOKEN_OP))?;
    outputs.try_map(&[tokens], &mut Lengths(TOKEN_OP))?;

    let token = TokenKl::new(options);
    let stores = Stores::of(size_of_val(outputs.kl));
    for_each(tokens, TOKEN_GRAIN, outputs.kl, |first, count, kl| {
        with_stores!(stores, STORES => {
            let part = inputs.part(first, count);
            match part.mask {
                None => map::<STORES, _, _>(
                    kl,
                    (part.logp, part.ref_logp),
                    #[inline(always)]
                    |(logp, ref_logp)| token.at(logp - ref_logp).0,
                ),
                // 0 whatever NaN was computed there.
                Some(mask) => map::<STORES, _, _>(
                    kl,
                    ((part.logp, part.ref_logp), mask),
                    #[inline(always)]
                    |((logp, ref_logp), keep)| select(keep != 0, token.at(logp - ref_logp).0, 0.0),
                ),
            }
        });
    });
    Ok(())
}

/// Gradients of the sampled KL of every one of `tokens` tokens, as far as wanted.
///
/// # Errors
/// As [`token_forward`].
pub fn token_backward(
    inputs: TokenBackwardInputs,
    tokens: usize,
    options: &KlOptions,
    mut outputs: TokenBackwardOutputs,
) -> Result<()> {
    options.validate(TOKEN_OP)?;
    inputs.try_map(&[tokens], &mut Lengths(TOKEN_OP))?;
    outputs.try_map(&[tokens], &mut Lengths(TOKEN_OP))?;

    let TokenBackwardInputs { forward: inputs, grad_kl } = inputs;
    let TokenBackwardOutputs { grad_logp, grad_ref_logp } = outputs;
    let token = TokenKl::new(options);
    let bytes = |grad: &Option<&mut [f32]>| grad.as_deref().map_or(0, size_of_val);
    let stores = Stores::of(bytes(&grad_logp) + bytes(&grad_ref_logp));
    for_each(tokens, TOKEN_GRAIN, (grad_logp, grad_ref_logp), |first, count, grads| {
        let part = inputs.part(first, count);
        let upstream = &grad_kl[first..][..count];
        with_stores!(stores, STORES => {
            match grads {
                (Some(grad_logp), Some(grad_ref_logp)) if STORES == CACHED => {
                    token.write_gradient::<STORES>(part, upstream, grad_logp, 1.0);
                    map::<STORES, _, _>(
                        grad_ref_logp,
                        &*grad_logp,
                        #[inline(always)]
                        |grad| -grad,
                    );
                }
                // Of gradients past the caches each is made by itself: they are not to be read again.
                (grad_logp, grad_ref_logp) => {
                    for (grad, sign) in [(grad_logp, 1.0), (grad_ref_logp, -1.0)] {
                        if let Some(grad) = grad {
                            token.write_gradient::<STORES>(part, upstream, grad, sign);
                        }
                    }
                }
            }
        });
    });
    Ok(())
}

impl<'a> TokenForwardInputs<'a> {
    #[inline(always)]
    fn part(&self, first: usize, count: usize) -> TokenForwardInputs<'a> {
        TokenForwardInputs {
            logp: &self.logp[first..][..count],
            ref_logp: &self.ref_logp[first..][..count],
            mask: self.mask.map(|mask| &mask[first..][..count]),
        }
    }
}

/// The sampled KL of one token: [`KlOptions`] made ready for a loop over tokens. No clamp is a clamp
/// at infinity, and the estimator is a set of flags to select by: of a `match` the compiler makes a
/// jump, and a loop with a jump in it is not vectorised.
#[derive(Clone, Copy)]
pub(crate) struct TokenKl {
    k1: bool,
    abs: bool,
    k2: bool,
    k3: bool,
    log_ratio_limit: f32,
    output_limit: f32,
}

impl TokenKl {
    /// Takes validated options.
    pub(crate) fn new(options: &KlOptions) -> Self {
        let is = |estimator| options.estimator == estimator;
        Self {
            k1: is(KlEstimator::K1),
            abs: is(KlEstimator::Abs),
            k2: is(KlEstimator::K2),
            k3: is(KlEstimator::K3),
            log_ratio_limit: limit(options.log_ratio_clamp),
            output_limit: limit(options.output_clamp),
        }
    }

    /// The value and its derivative by d = logp - ref_logp. Call it inside `vectorise`.
    #[inline(always)]
    pub(crate) fn at(self, d: f32) -> (f32, f32) {
        let (d, d_clamped) = clamp(d, self.log_ratio_limit);
        let (k3, k3_slope) = k3_and_slope(d);
        // Of d = -inf the exponential is the larger one.
        let k3 = if d == f32::NEG_INFINITY { f32::INFINITY } else { k3 };
        let value = if self.k1 { d } else { k3 };
        let value = if self.abs { d.abs() } else { value };
        let value = if self.k2 { 0.5 * d * d } else { value };
        let derivative = if self.k1 { 1.0 } else { d };
        let derivative = if self.abs { sign(d) } else { derivative };
        let derivative = if self.k3 { k3_slope } else { derivative };
        let (value, value_clamped) = clamp(value, self.output_limit);
        let blocked = d_clamped | value_clamped;
        (value, if blocked { 0.0 } else { derivative })
    }

    /// Writes the gradients of tokens with respect to logp, times `sign`.
    #[inline(always)]
    fn write_gradient<const STORES: u8>(
        self,
        tokens: TokenForwardInputs,
        grad_kl: &[f32],
        out: &mut [f32],
        sign: f32,
    ) {
        let TokenForwardInputs { logp, ref_logp, mask } = tokens;
        match mask {
            None => map::<STORES, _, _>(
                out,
                ((logp, ref_logp), grad_kl),
                #[inline(always)]
                |((logp, ref_logp), g)| self.gradient(logp - ref_logp, sign * g),
            ),
            // 0 whatever NaN was computed there.
            Some(mask) => map::<STORES, _, _>(
                out,
                (((logp, ref_logp), grad_kl), mask),
                #[inline(always)]
                |(((logp, ref_logp), g), keep)| {
                    select(keep != 0, self.gradient(logp - ref_logp, sign * g), 0.0)
                },
            ),
        }
    }

    /// The gradient of a token, of the upstream one: 0 for 0, whatever the derivative.
    #[inline(always)]
    fn gradient(self, d: f32, grad_kl: f32) -> f32 {
        select(grad_kl == 0.0, 0.0, grad_kl * self.at(d).1)
    }
}

/// `x` within ± the limit, and whether that changed it. Comparisons, so that NaN stays NaN.
#[inline(always)]
fn clamp(x: f32, limit: f32) -> (f32, bool) {
    let above = x > limit;
    let below = x < -limit;
    let x = if above { limit } else { x };
    (if below { -limit } else { x }, above | below)
}

#[inline(always)]
fn sign(x: f32) -> f32 {
    if x == 0.0 {
        0.0
    } else {
        1.0_f32.copysign(x)
    }
}

/// e^-d - 1 + d and 1 - e^-d, of a d above -inf.
///
/// In PPO d is small, and there the three terms cancel: at d = 1e-3 the value is 5e-7, eight units
/// in the last place of 1. So below |d| = 1 it is summed as the series d²/2! - d³/3! + ...
#[inline(always)]
pub(crate) fn k3_and_slope(d: f32) -> (f32, f32) {
    // Through d^12/12!, which is below half a unit in the last place of the sum.
    let series = 2.087_675_7e-9_f32;
    let series = series.mul_add(d, -2.505_210_8e-8);
    let series = series.mul_add(d, 2.755_732e-7);
    let series = series.mul_add(d, -2.755_731_9e-6);
    let series = series.mul_add(d, 2.480_158_7e-5);
    let series = series.mul_add(d, -1.984_127e-4);
    let series = series.mul_add(d, 1.388_888_9e-3);
    let series = series.mul_add(d, -8.333_333e-3);
    let series = series.mul_add(d, 4.166_666_7e-2);
    let series = series.mul_add(d, -1.666_666_7e-1);
    let series = series.mul_add(d, 0.5) * (d * d);

    let e = exp(-d);
    let small = d.abs() < 1.0;
    let value = if small { series } else { e - 1.0 + d };
    let derivative = if small { d - series } else { 1.0 - e };
    (value, derivative)
}

/// p - p_old, from the logarithms and their difference d.
#[inline(always)]
pub(crate) fn probability_moved(logp: f32, old_logp: f32, d: f32) -> f32 {
    // The larger one times 1 - e^-|d|, with the sign of d.
    let larger = exp(select(d > 0.0, logp, old_logp));
    let moved = larger * exp_m1(-d.abs());
    select(d > 0.0, -moved, moved)
}

/// KL of (p_old, 1 - p_old) from (p, 1 - p).
#[inline(always)]
pub(crate) fn binary_kl(logp: f32, old_logp: f32, d: f32) -> f32 {
    let rest_old = -exp_m1(old_logp);
    // Beyond 1 by its rounding only, where nothing is left beside the token.
    let grown = clip(probability_moved(logp, old_logp, d) / rest_old, f32::NEG_INFINITY, 1.0);
    let of_rest = select(rest_old > 0.0, -rest_old * ln_1p(-grown), 0.0);
    let p_old = exp(old_logp);
    of_rest - select(p_old > 0.0, p_old * d, 0.0)
}

/// Exact KL, or another divergence, of every one of `rows` rows, with what the backward pass needs to know of
/// them. Reads both logits once, or where that is not the KL twice, the second time from the caches.
///
/// # Errors
/// If a length does not fit or an option is out of range. Nothing is written then.
pub fn full_forward<T: Logit>(
    inputs: FullForwardInputs<T>,
    rows: usize,
    vocab: usize,
    options: &FullKlOptions,
    mut outputs: FullForwardOutputs,
) -> Result<()> {
    options.validate(FULL_OP)?;
    Error::check_logits(FULL_OP, inputs.logits.len(), rows, vocab)?;
    inputs.try_map((&[rows], vocab), &mut Lengths(FULL_OP))?;
    outputs.try_map(&[rows], &mut Lengths(FULL_OP))?;

    let scale = (1.0 / options.temperature) as f32;
    let (z, w) = inputs.in_order(vocab, options);
    let stats = RowsMut { data: outputs.stats, width: rows };
    let [kl, gap, max_z, sum_z, max_w, sum_w, gap_w] =
        stats.disjoint([KL, GAP, MAX_Z, SUM_Z, MAX_W, SUM_W, GAP_W]);
    let items = ((kl, gap, gap_w), (max_z, sum_z, max_w, sum_w));
    let pairwise = Pairwise::new(options);
    for_each(rows, GRAIN / vocab, items, |first, count, items| {
        let ((kl, gap, gap_w), (max_z, sum_z, max_w, sum_w)) = items;
        for i in 0..count {
            let row = first + i;
            let of_row = if inputs.keeps(row) {
                let (z, w) = (z.row(row), w.row(row));
                let mut stats = Sums::of_rows(z, w, scale).stats();
                if let Some(divergence) = pairwise {
                    divergence.look_again(z, w, scale, &mut stats);
                }
                stats
            } else {
                [0.0; STATS]
            };
            kl[i] = of_row[KL];
            gap[i] = of_row[GAP];
            max_z[i] = of_row[MAX_Z];
            sum_z[i] = of_row[SUM_Z];
            max_w[i] = of_row[MAX_W];
            sum_w[i] = of_row[SUM_W];
            gap_w[i] = of_row[GAP_W];
        }
    });
    Ok(())
}

/// Gradients of the exact KL of every one of `rows` rows, as far as wanted, in the type of the logits.
/// Reads both logits once for each gradient, the second time from the L1 cache.
///
/// # Errors
/// As [`full_forward`].
pub fn full_backward<T: Logit>(
    inputs: FullBackwardInputs<T>,
    rows: usize,
    vocab: usize,
    options: &FullKlOptions,
    mut outputs: FullBackwardOutputs<T>,
) -> Result<()> {
    options.validate(FULL_OP)?;
    Error::check_logits(FULL_OP, inputs.forward.logits.len(), rows, vocab)?;
    inputs.try_map((&[rows], vocab), &mut Lengths(FULL_OP))?;
    outputs.try_map((&[rows], vocab), &mut Lengths(FULL_OP))?;

    let FullBackwardInputs { forward: inputs, stats, grad_kl } = inputs;
    let FullBackwardOutputs { grad_logits, grad_ref_logits } = outputs;
    let scale = (1.0 / options.temperature) as f32;
    let (z, w) = inputs.in_order(vocab, options);
    let wanted = usize::from(grad_logits.is_some()) + usize::from(grad_ref_logits.is_some());
    let bytes = wanted * size_of_val(inputs.logits);
    let (grad_z, grad_w) = options.order(grad_logits, grad_ref_logits);
    let in_rows = |grad: Option<_>| grad.map(|data| RowsMut { data, width: vocab });
    let grads = (in_rows(grad_z), in_rows(grad_w));
    let pairwise = Pairwise::new(options);
    let stores = Stores::of(bytes);
    for_each(rows, GRAIN / vocab, grads, |first, count, (mut grad_z, mut grad_w)| {
        for i in 0..count {
            let row = first + i;
            let grad_z = grad_z.as_mut().map(|grad| grad.row(i));
            let grad_w = grad_w.as_mut().map(|grad| grad.row(i));
            let of_row = std::array::from_fn(|stat| stats[stat * rows + row]);
            if !inputs.keeps(row) || grad_kl[row] == 0.0 {
                fill(grad_z, grad_w, T::ZERO);
            } else if of_row[KL].is_nan() {
                fill(grad_z, grad_w, T::from_f32(f32::NAN));
            } else {
                let (z, w, upstream) = (z.row(row), w.row(row), grad_kl[row]);
                match pairwise {
                    None => Slopes::new(of_row, scale, upstream)
                        .write_rows(z, w, grad_z, grad_w, stores),
                    Some(Pairwise::Mixture(of)) => {
                        of.slopes(of_row, scale, upstream).write_rows(z, w, grad_z, grad_w, stores)
                    }
                    Some(Pairwise::TotalVariation(of)) => {
                        of.slopes(of_row, scale, upstream).write_rows(z, w, grad_z, grad_w, stores)
                    }
                }
            }
        }
    });
    Ok(())
}

impl<'a, T: Logit> FullForwardInputs<'a, T> {
    fn keeps(&self, row: usize) -> bool {
        self.mask.is_none_or(|mask| mask[row] != 0)
    }

    /// The rows of z and those of w.
    fn in_order(&self, vocab: usize, options: &FullKlOptions) -> (Rows<'a, T>, Rows<'a, T>) {
        let rows = |data| Rows { data, width: vocab };
        options.order(rows(self.logits), rows(self.ref_logits))
    }
}

fn fill<T: Logit>(grad_z: Option<&mut [T]>, grad_w: Option<&mut [T]>, value: T) {
    for grad in [grad_z, grad_w].into_iter().flatten() {
        grad.fill(value);
    }
}

/// Running sums over the columns of a pair of rows, with x = (z - max z) scale and
/// y = (w - max w) scale.
///
/// Across blocks they are f64: for nearly equal rows the KL is a small difference of them, of which
/// f32 would leave few digits.
#[derive(Clone, Copy)]
struct Sums {
    max_z: f32,
    max_w: f32,
    /// Σ e^x.
    sum_z: f64,
    /// Σ e^y.
    sum_w: f64,
    /// Σ e^x (x - y); +inf once a column had p > 0 and q = 0.
    weighted: f64,
}

impl Sums {
    const NONE: Sums = Sums {
        max_z: f32::NEG_INFINITY,
        max_w: f32::NEG_INFINITY,
        sum_z: 0.0,
        sum_w: 0.0,
        weighted: 0.0,
    };

    fn of_rows<T: Logit>(z: &[T], w: &[T], scale: f32) -> Sums {
        let of_segment = |_, _, (z, w): (&[T], &[T])| {
            vectorise(
                #[inline(always)]
                || {
                    let mut sums = Sums::NONE;
                    for (z, w) in z.chunks(BLOCK).zip(w.chunks(BLOCK)) {
                        sums = sums.add(z, w, scale);
                    }
                    sums
                },
            )
        };
        reduce(z.len(), GRAIN, (z, w), of_segment, |a, b| a.merge(b, scale))
    }

    /// Adds one more block.
    #[inline(always)]
    fn add<T: Logit>(self, z: &[T], w: &[T], scale: f32) -> Sums {
        let empty = self.max_z == f32::NEG_INFINITY || self.max_w == f32::NEG_INFINITY;
        let start = if empty { self.rebase(max(z), max(w), scale) } else { self };
        let (sums, max_z, max_w) = start.add_below(z, w, scale);
        let above_z = (max_z - start.max_z) * scale;
        let above_w = (max_w - start.max_w) * scale;
        if above_z > HEADROOM || above_w > HEADROOM {
            start.rebase(max_z, max_w, scale).add_below(z, w, scale).0
        } else {
            sums.rebase(max_z, max_w, scale)
        }
    }

    fn merge(self, other: Sums, scale: f32) -> Sums {
        let a = self.rebase(other.max_z, other.max_w, scale);
        let b = other.rebase(self.max_z, self.max_w, scale);
        Sums {
            sum_z: a.sum_z + b.sum_z,
            sum_w: a.sum_w + b.sum_w,
            weighted: a.weighted + b.weighted,
            ..a
        }
    }

    /// Moves the sums to maxima that include these.
    fn rebase(self, max_z: f32, max_w: f32, scale: f32) -> Sums {
        if !(max_z > self.max_z || max_w > self.max_w) {
            return self;
        }
        let shift = |from: f32, to: f32| {
            // From -inf there is nothing to shift: the sums are 0, or NaN or +inf and stay so.
            if to > from && from > f32::NEG_INFINITY {
                (f64::from(from) - f64::from(to)) * f64::from(scale)
            } else {
                0.0
            }
        };
        let (shift_z, shift_w) = (shift(self.max_z, max_z), shift(self.max_w, max_w));
        let moved = (self.weighted + (shift_z - shift_w) * self.sum_z) * shift_z.exp();
        Sums {
            max_z: if max_z > self.max_z { max_z } else { self.max_z },
            max_w: if max_w > self.max_w { max_w } else { self.max_w },
            sum_z: self.sum_z * shift_z.exp(),
            sum_w: self.sum_w * shift_w.exp(),
            weighted: if self.weighted == f64::INFINITY { self.weighted } else { moved },
        }
    }

    /// Adds one more block whose logits are not far above the maxima, and their own maxima.
    #[inline(always)]
    fn add_below<T: Logit>(self, z: &[T], w: &[T], scale: f32) -> (Sums, f32, f32) {
        // With -inf throughout, -inf - -inf would make NaN of legal columns of probability 0.
        let base = |max: f32| if max == f32::NEG_INFINITY { 0.0 } else { max };
        let (base_z, base_w) = (base(self.max_z), base(self.max_w));
        let exp = Exp::new(scale);
        let mut max_z = [f32::NEG_INFINITY; LOGIT_LANES];
        let mut max_w = [f32::NEG_INFINITY; LOGIT_LANES];
        let mut max_gap = [f32::NEG_INFINITY; LOGIT_LANES];
        let mut sum_z = [0.0; LOGIT_LANES];
        let mut sum_w = [0.0; LOGIT_LANES];
        let mut weighted = [0.0; LOGIT_LANES];
        for_logits2(
            z,
            w,
            #[inline(always)]
            |z, w| {
                let (z, w) = (T::widen(z), T::widen(w));
                for lane in 0..LOGIT_LANES {
                    let (z, w) = (z[lane], w[lane]);
                    max_z[lane] = larger(z, max_z[lane]);
                    max_w[lane] = larger(w, max_w[lane]);
                    let (x, y) = (z - base_z, w - base_w);
                    let (p, power) = exp.factors(exp.clamp(x));
                    let p = p * power;
                    let (q, power) = exp.factors(exp.clamp(y));
                    let gap = x - y;
                    max_gap[lane] = larger(gap, max_gap[lane]);
                    sum_z[lane] += p;
                    sum_w[lane] = q.mul_add(power, sum_w[lane]);
                    let more = p.mul_add(gap, weighted[lane]);
                    weighted[lane] = if p == 0.0 { weighted[lane] } else { more };
                }
            },
        );
        // Where q = 0 and p is not. Not left to the sum: p may be too small for f32.
        let outside = max_lanes(max_gap) == f32::INFINITY;
        let weighted = f64::from(sum_lanes(weighted)) * f64::from(scale);
        let weighted = if outside { f64::INFINITY } else { weighted };
        let sums = Sums {
            sum_z: self.sum_z + f64::from(sum_lanes(sum_z)),
            sum_w: self.sum_w + f64::from(sum_lanes(sum_w)),
            weighted: self.weighted + weighted,
            ..self
        };
        (sums, max_lanes(max_z), max_lanes(max_w))
    }

    /// The row's values, in the order of [`STATS`].
    fn stats(&self) -> [f32; STATS] {
        let gap = self.weighted / self.sum_z;
        let kl = gap + (self.sum_w / self.sum_z).ln();
        // Rounding may take a KL of nearly 0 below it; NaN is to stay.
        let kl = if kl < 0.0 { 0.0 } else { kl };
        let mut stats = [0.0; STATS];
        stats[KL] = kl as f32;
        stats[GAP] = gap as f32;
        stats[MAX_Z] = self.max_z;
        stats[SUM_Z] = self.sum_z as f32;
        stats[MAX_W] = self.max_w;
        stats[SUM_W] = self.sum_w as f32;
        stats
    }
}

/// The gradients of a pair of rows as functions of the logits. Passed by value: behind a reference
/// the compiler would have to reload it after every store, and would not vectorise.
#[derive(Clone, Copy)]
struct Slopes {
    scale: f32,
    gap: f32,
    max_z: f32,
    max_w: f32,
    /// 1/P and 1/Q.
    norm_z: f32,
    norm_w: f32,
    /// Makes probabilities that are lifted.
    exp: Exp,
    /// Upstream gradient over the temperature, brought down by as much; to z it is NaN where the KL is +inf.
    grad_z: f32,
    grad_w: f32,
}

impl Slopes {
    fn new(stats: [f32; STATS], scale: f32, grad_kl: f32) -> Slopes {
        let (exp, down) = Exp::beside(grad_kl * scale);
        let grad = grad_kl * scale * down;
        Slopes {
            scale,
            exp,
            gap: stats[GAP],
            max_z: stats[MAX_Z],
            max_w: stats[MAX_W],
            norm_z: 1.0 / stats[SUM_Z],
            norm_w: 1.0 / stats[SUM_W],
            grad_z: if stats[KL] == f32::INFINITY { f32::NAN } else { grad },
            grad_w: grad,
        }
    }
}

/// The gradients of a pair of rows as functions of the logits.
trait Gradients: Copy + Sync {
    fn z_slope(self, z: f32, w: f32) -> f32;

    fn w_slope(self, z: f32, w: f32) -> f32;

    fn write_rows<T: Logit>(
        self,
        z: &[T],
        w: &[T],
        grad_z: Option<&mut [T]>,
        grad_w: Option<&mut [T]>,
        stores: Stores,
    ) {
        // A block at a time, so that the second gradient finds the logits in the L1 cache.
        for_each(z.len(), BLOCK, ((z, w), grad_z, grad_w), |_, _, ((z, w), grad_z, grad_w)| {
            with_stores!(stores, STORES => {
                if let Some(grad) = grad_z {
                    map::<STORES, _, _>(
                        grad,
                        (z, w),
                        #[inline(always)]
                        |(z, w): (T, T)| T::from_f32(self.z_slope(z.to_f32(), w.to_f32())),
                    );
                }
                if let Some(grad) = grad_w {
                    map::<STORES, _, _>(
                        grad,
                        (z, w),
                        #[inline(always)]
                        |(z, w): (T, T)| T::from_f32(self.w_slope(z.to_f32(), w.to_f32())),
                    );
                }
            });
        });
    }
}

impl Gradients for Slopes {
    /// p (x - y - gap), and 0 where z is -inf.
    #[inline(always)]
    fn z_slope(self, z: f32, w: f32) -> f32 {
        let (x, y) = ((z - self.max_z) * self.scale, (w - self.max_w) * self.scale);
        let p = exp_by(self.exp, x) * self.norm_z;
        let excess = if p == 0.0 { 0.0 } else { x - y - self.gap };
        if z == f32::NEG_INFINITY {
            0.0
        } else {
            // In this order: a lifted p times a large excess may be none.
            p * (self.grad_z * excess)
        }
    }

    /// q - p.
    #[inline(always)]
    fn w_slope(self, z: f32, w: f32) -> f32 {
        let (x, y) = ((z - self.max_z) * self.scale, (w - self.max_w) * self.scale);
        self.grad_w * (exp_by(self.exp, y) * self.norm_w - exp_by(self.exp, x) * self.norm_z)
    }
}

/// A divergence whose columns need the sums over both rows first, from a second look at them.
#[derive(Clone, Copy)]
enum Pairwise {
    Mixture(OfMixture),
    TotalVariation(OfTotalVariation),
}

impl Pairwise {
    /// `None` for a KL, for which one look is enough.
    fn new(options: &FullKlOptions) -> Option<Self> {
        if options.divergence == Divergence::TotalVariation {
            return Some(Self::TotalVariation(OfTotalVariation));
        }
        let [share, rest, coef_z, coef_w] = options.mixture()?.in_f32();
        Some(Self::Mixture(OfMixture { share, rest, coef_z, coef_w }))
    }

    fn look_again<T: Logit>(self, z: &[T], w: &[T], scale: f32, stats: &mut [f32; STATS]) {
        match self {
            Self::Mixture(of) => of.look_again(z, w, scale, stats),
            Self::TotalVariation(of) => of.look_again(z, w, scale, stats),
        }
    }
}

/// A column of a pair of rows: its term of the divergence, and h of z and of w in the terms of [the
/// module](super).
struct Column {
    term: f32,
    h_z: f32,
    h_w: f32,
}

trait Columns: Copy + Sync {
    /// The terms of a column of p, q and r = ln p - ln q, which may be NaN where both are 0.
    fn column(self, p: f32, q: f32, r: f32) -> Column;

    /// Puts the divergence and the means of h into the statistics of a row, which have the other sums.
    fn look_again<T: Logit>(self, z: &[T], w: &[T], scale: f32, stats: &mut [f32; STATS]) {
        let pair = Pair::new(stats, scale);
        let of_segment = |_, _, (z, w): (&[T], &[T])| {
            vectorise(
                #[inline(always)]
                || {
                    let mut totals = [0.0; 3];
                    for (z, w) in z.chunks(BLOCK).zip(w.chunks(BLOCK)) {
                        let of_block = pair.sums(self, z, w);
                        for (total, sum) in totals.iter_mut().zip(of_block) {
                            *total += f64::from(sum);
                        }
                    }
                    totals
                },
            )
        };
        let add = |a: [f64; 3], b: [f64; 3]| [a[0] + b[0], a[1] + b[1], a[2] + b[2]];
        let [value, of_z, of_w] = reduce(z.len(), GRAIN, (z, w), of_segment, add);
        // A row that has no distribution has no sums, and the divergence of the others is finite.
        let legal = stats[SUM_Z] + stats[SUM_W] < f32::INFINITY
            && stats[MAX_Z].is_finite()
            && stats[MAX_W].is_finite();
        stats[KL] = if legal { value as f32 } else { f32::NAN };
        (stats[GAP], stats[GAP_W]) = (of_z as f32, of_w as f32);
    }

    fn slopes(self, stats: [f32; STATS], scale: f32, upstream: f32) -> PairSlopes<Self> {
        let (exp, down) = Exp::beside(upstream * scale);
        PairSlopes {
            columns: self,
            pair: Pair::new(&stats, scale),
            exp,
            grad: upstream * scale * down,
            gap_z: stats[GAP],
            gap_w: stats[GAP_W],
        }
    }
}

/// The statistics of a pair of rows before a second look.
#[derive(Clone, Copy)]
struct Pair {
    exp: Exp,
    scale: f32,
    max_z: f32,
    max_w: f32,
    /// 1/P and 1/Q.
    norm_z: f32,
    norm_w: f32,
    /// ln(P/Q), which x - y is too much for ln p - ln q.
    offset: f32,
}

impl Pair {
    fn new(stats: &[f32; STATS], scale: f32) -> Pair {
        let [sum_z, sum_w] = [SUM_Z, SUM_W].map(|i| f64::from(stats[i]));
        Pair {
            exp: Exp::new(scale),
            scale,
            max_z: stats[MAX_Z],
            max_w: stats[MAX_W],
            norm_z: 1.0 / stats[SUM_Z],
            norm_w: 1.0 / stats[SUM_W],
            offset: (sum_z / sum_w).ln() as f32,
        }
    }

    /// The log-ratio of x and y over the scale.
    #[inline(always)]
    fn log_ratio(self, x: f32, y: f32) -> f32 {
        (x - y).mul_add(self.scale, -self.offset)
    }

    /// Sums over a block: of the terms, of p h and of q h.
    #[inline(always)]
    fn sums<T: Logit>(self, columns: impl Columns, z: &[T], w: &[T]) -> [f32; 3] {
        let [mut terms, mut of_z, mut of_w] = [[0.0; LOGIT_LANES]; 3];
        for_logits2(
            z,
            w,
            #[inline(always)]
            |z, w| {
                let (z, w) = (T::widen(z), T::widen(w));
                for lane in 0..LOGIT_LANES {
                    let (x, y) = (z[lane] - self.max_z, w[lane] - self.max_w);
                    let p = exp_by(self.exp, x) * self.norm_z;
                    let q = exp_by(self.exp, y) * self.norm_w;
                    let Column { term, h_z, h_w } = columns.column(p, q, self.log_ratio(x, y));
                    // Where both are 0 there is nothing; where one is, it has no h.
                    let none = p + q == 0.0;
                    terms[lane] += select(none, 0.0, term);
                    of_z[lane] += select(p == 0.0, 0.0, p * h_z);
                    of_w[lane] += select(q == 0.0, 0.0, q * h_w);
                }
            },
        );
        [terms, of_z, of_w].map(sum_lanes)
    }
}

#[derive(Clone, Copy)]
struct PairSlopes<C> {
    columns: C,
    pair: Pair,
    /// Makes probabilities that are lifted.
    exp: Exp,
    /// Upstream gradient over the temperature, brought down by as much.
    grad: f32,
    gap_z: f32,
    gap_w: f32,
}

impl<C: Columns> Gradients for PairSlopes<C> {
    #[inline(always)]
    fn z_slope(self, z: f32, w: f32) -> f32 {
        let (x, y) = (z - self.pair.max_z, w - self.pair.max_w);
        let p = exp_by(self.exp, x * self.pair.scale) * self.pair.norm_z;
        // Its term is not asked for.
        let h = self.columns.column(0.0, 0.0, self.pair.log_ratio(x, y)).h_z;
        select(p == 0.0, 0.0, p * (self.grad * (h - self.gap_z)))
    }

    #[inline(always)]
    fn w_slope(self, z: f32, w: f32) -> f32 {
        let (x, y) = (z - self.pair.max_z, w - self.pair.max_w);
        let q = exp_by(self.exp, y * self.pair.scale) * self.pair.norm_w;
        let h = self.columns.column(0.0, 0.0, self.pair.log_ratio(x, y)).h_w;
        select(q == 0.0, 0.0, q * (self.grad * (h - self.gap_w)))
    }
}

/// The exponential of x up to 0, scaled or lifted as `exp` is.
#[inline(always)]
fn exp_by(exp: Exp, x: f32) -> f32 {
    let (p, power) = exp.factors(exp.clamp(x));
    p * power
}

/// [`super::Mixture`] in f32.
#[derive(Clone, Copy)]
struct OfMixture {
    /// The shares of p in the mixture, and of q.
    share: f32,
    rest: f32,
    coef_z: f32,
    coef_w: f32,
}

impl Columns for OfMixture {
    #[inline(always)]
    fn column(self, p: f32, q: f32, r: f32) -> Column {
        // By the more probable side: all exponentials are of what is up to 0.
        let z_is_high = r >= 0.0;
        let (high, low) = (select(z_is_high, p, q), select(z_is_high, q, p));
        let share = select(z_is_high, self.share, self.rest);
        let d = r.abs();
        let e = exp_m1(-d); // low / high - 1
        let g = e - share * e; // m / high - 1
        let ln_high = -ln_1p(g); // ln(high / m)
        let ln_low = ln_high - d;
        let of_high = high * less_ln_1p(g);
        // m / low - 1 is without bound: from 1/4 on not to be multiplied with what may be 0.
        let beyond = -share * e;
        let g_low = beyond / (1.0 + e);
        let near = low * less_ln_1p(select(g_low < 0.25, g_low, 0.0));
        let far = high.mul_add(beyond, select(low == 0.0, 0.0, low * ln_low));
        let of_low = select(g_low < 0.25, near, far);

        let inverse = 1.0 / (1.0 + g); // high / m
        let (over_high, over_low) = (-g * inverse, (e - g) * inverse); // side / m - 1
        let pick = |high, low| (select(z_is_high, high, low), select(z_is_high, low, high));
        let (term_z, term_w) = pick(of_high, of_low);
        let (ln_z, ln_w) = pick(ln_high, ln_low);
        let (over_z, over_w) = pick(over_high, over_low);
        let common = self.share * (self.coef_w * over_w);
        let common_w = self.rest * (self.coef_z * over_z);
        Column {
            term: self.coef_z.mul_add(term_z, self.coef_w * term_w),
            h_z: self.coef_z * (ln_z - self.share * over_z) - common,
            h_w: self.coef_w * (ln_w - self.rest * over_w) - common_w,
        }
    }
}

#[derive(Clone, Copy)]
struct OfTotalVariation;

impl Columns for OfTotalVariation {
    #[inline(always)]
    fn column(self, p: f32, _: f32, r: f32) -> Column {
        let above = r > 0.0;
        Column {
            term: select(above, -p * exp_m1(-r.abs()), 0.0),
            h_z: select(above, 0.0, -1.0),
            h_w: select(above, -1.0, 0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kl::reference;

    #[test]
    fn k3_is_accurate_however_small_the_log_ratio() {
        let options = KlOptions { estimator: KlEstimator::K3, ..KlOptions::default() };
        for i in -80_000..=80_000 {
            let d = i as f32 / 1000.0;
            for d in [d, d * 1e-3, d * 1e-7] {
                let (value, derivative) = TokenKl::new(&options).at(d);
                let (want, want_derivative) = reference::token(f64::from(d), &options);
                // exp is good for 2 ulp, 2.4e-7; next to |d| = 1 the sum costs as much again.
                let close =
                    |got: f32, want: f64| (f64::from(got) - want).abs() <= 5e-7 * want.abs();
                // At d = 1e-10 even the f64 reference has lost k3, which is 5e-21.
                if d.abs() > 1e-6 {
                    assert!(close(value, want), "d {d}: {value} {want}");
                }
                assert!(
                    close(derivative, want_derivative),
                    "d {d}: {derivative} {want_derivative}"
                );
            }
        }
    }
}
