//! The fused CPU implementation. Rows are shared out to threads, and long rows are cut into segments
//! that are. A segment is walked once, with a running (maximum, sum, weighted sum); those of a row's
//! segments are merged in an order that depends on the row's length only.

use super::{LogprobOptions, OP};
use crate::cpu::math::{
    at_least, exp, exp_factors, for_logits, larger, max, max_lanes, sum_lanes, Exp, EXP_FLOOR,
    LOGIT_LANES,
};
use crate::cpu::{
    for_each, prefers_non_temporal, reduce, vectorise, Logit, Rows, RowsMut, TokenId, Writer,
};
use crate::error::{Error, Result};
use crate::memory::{in_space, Lengths};

/// Columns between two looks at the maximum: 8 KiB of f32, which are in the L1 cache still should
/// they have to be read again.
const BLOCK: usize = 2048;

/// Columns of a segment, and elements a thread takes at a time: some 5 us of work, far above the cost
/// of handing it out.
const GRAIN: usize = 32 * 1024;

/// How far above the number that is subtracted x may be before its sums are taken anew: e^8 costs
/// them no digits.
const HEADROOM: f32 = 8.0;

in_space!(Host: ForwardInputs<T, I>, ForwardOutputs, BackwardInputs<T, I>, BackwardOutputs<T>);

/// Log-probabilities of the targets of `rows` rows, and the entropies if asked for. Reads the logits
/// once.
///
/// # Errors
/// If a length does not fit, an option is out of range, one of `max` and `log_sum` is missing, or a
/// target is outside the vocabulary. Nothing is written then.
pub fn forward<T: Logit, I: TokenId>(
    inputs: ForwardInputs<T, I>,
    rows: usize,
    vocab: usize,
    options: &LogprobOptions,
    mut outputs: ForwardOutputs,
) -> Result<()> {
    options.validate()?;
    Error::check_logits(OP, inputs.logits.len(), rows, vocab)?;
    inputs.try_map((&[rows], vocab), &mut Lengths(OP))?;
    check_targets(inputs.targets, vocab, options)?;
    outputs.try_map(&[rows], &mut Lengths(OP))?;
    outputs.check_pair()?;

    let ForwardInputs { logits, targets } = inputs;
    let ForwardOutputs { logp, entropy, max, log_sum } = outputs;
    let logits = Rows { data: logits, width: vocab };
    let stats = max.zip(log_sum);
    let scale = (1.0 / options.temperature) as f32;
    let items = (logits, targets, logp, entropy, stats);
    for_each(rows, GRAIN / vocab, items, |_, count, items| {
        let (logits, targets, logp, mut entropy, mut stats) = items;
        for row in 0..count {
            let target = targets[row].id();
            let ignored = options.ignore_index == Some(target);
            let z = logits.row(row);
            let (sums, lp) = if ignored {
                (Sums::NONE, 0.0)
            } else {
                let sums = if entropy.is_some() {
                    Sums::of_row::<T, true>(z, scale)
                } else {
                    Sums::of_row::<T, false>(z, scale)
                };
                let x = (z[target as usize].to_f32() - sums.max) * scale;
                (sums, x - sums.log_sum())
            };
            logp[row] = lp;
            if let Some(entropy) = &mut entropy {
                entropy[row] = if ignored { 0.0 } else { sums.entropy() };
            }
            if let Some((max, log_sum)) = &mut stats {
                max[row] = sums.max;
                log_sum[row] = sums.log_sum();
            }
        }
    });
    Ok(())
}

/// Gradient of the logits of `rows` rows, in their own type. Reads the logits once and writes their
/// gradient once.
///
/// # Errors
/// As [`forward`]; it is `entropy` that may be missing, where `grad_entropy` needs it.
pub fn backward<T: Logit, I: TokenId>(
    inputs: BackwardInputs<T, I>,
    rows: usize,
    vocab: usize,
    options: &LogprobOptions,
    outputs: BackwardOutputs<T>,
) -> Result<()> {
    let non_temporal = prefers_non_temporal(size_of_val(outputs.grad_logits));
    backward_of_part(inputs, rows, vocab, options, outputs, non_temporal)
}

/// The same for some of the rows of a gradient of which the whole is written past the caches or not.
pub(crate) fn backward_of_part<T: Logit, I: TokenId>(
    inputs: BackwardInputs<T, I>,
    rows: usize,
    vocab: usize,
    options: &LogprobOptions,
    mut outputs: BackwardOutputs<T>,
    non_temporal: bool,
) -> Result<()> {
    options.validate()?;
    Error::check_logits(OP, inputs.forward.logits.len(), rows, vocab)?;
    inputs.try_map((&[rows], vocab), &mut Lengths(OP))?;
    check_targets(inputs.forward.targets, vocab, options)?;
    let entropy = inputs.entropy_or_any()?;
    outputs.try_map((&[rows], vocab), &mut Lengths(OP))?;

    let BackwardInputs { forward, max, log_sum, grad_logp, grad_entropy, .. } = inputs;
    let ForwardInputs { logits, targets } = forward;
    let BackwardOutputs { grad_logits } = outputs;
    let scale = (1.0 / options.temperature) as f32;
    let grads = RowsMut { data: grad_logits, width: vocab };
    for_each(rows, GRAIN / vocab, grads, |first, count, mut grads| {
        for i in 0..count {
            let row = first + i;
            let grad = grads.row(i);
            let g = grad_logp.map_or(0.0, |g| g[row]) * scale;
            let h = grad_entropy.map_or(0.0, |g| g[row]) * scale;
            let target = targets[row].id();
            if options.ignore_index == Some(target) || (g == 0.0 && h == 0.0) {
                grad.fill(T::ZERO);
                continue;
            }
            let slope = Slope {
                max: max[row],
                scale,
                log_sum: log_sum[row],
                entropy: entropy[row],
                grad_logp: g,
                grad_entropy: h,
            };
            let z = &logits[row * vocab..][..vocab];
            if non_temporal {
                slope.write_row::<T, true>(z, target as usize, grad);
            } else {
                slope.write_row::<T, false>(z, target as usize, grad);
            }
        }
    });
    Ok(())
}

/// `Ok` when every target is in the vocabulary or ignored.
pub(crate) fn check_targets<I: TokenId>(
    targets: &[I],
    vocab: usize,
    options: &LogprobOptions,
) -> Result<()> {
    for (row, target) in targets.iter().enumerate() {
        let id = target.id();
        let inside = usize::try_from(id).is_ok_and(|column| column < vocab);
        if !inside && options.ignore_index != Some(id) {
            return Err(Error::Target { op: OP, row, target: id, vocab });
        }
    }
    Ok(())
}

/// Running sums over the columns of one row, with x = (z - max) * scale.
#[derive(Clone, Copy)]
struct Sums {
    /// The largest logit so far.
    max: f32,
    /// Σ e^x.
    sum: f32,
    /// Σ e^x x.
    weighted: f32,
}

impl Sums {
    const NONE: Sums = Sums { max: f32::NEG_INFINITY, sum: 0.0, weighted: 0.0 };

    fn of_row<T: Logit, const ENTROPY: bool>(row: &[T], scale: f32) -> Sums {
        let of_segment = |_, _, segment: &[T]| {
            vectorise(
                #[inline(always)]
                || {
                    let (mut sums, mut largest) = (Sums::NONE, f32::NEG_INFINITY);
                    for block in segment.chunks(BLOCK) {
                        let max;
                        (sums, max) = sums.add::<T, ENTROPY>(block, scale);
                        largest = larger(max, largest);
                    }
                    sums.rebase(largest, scale)
                },
            )
        };
        reduce(row.len(), GRAIN, row, of_segment, |a, b| a.merge(b, scale))
    }

    /// With one more block, and the block's maximum. `max` is that of a block before, unless this one
    /// is far above it: so no block has to wait for the sums of the one before it.
    #[inline(always)]
    fn add<T: Logit, const ENTROPY: bool>(self, z: &[T], scale: f32) -> (Sums, f32) {
        let start = if self.max > f32::NEG_INFINITY { self } else { self.rebase(max(z), scale) };
        let (sums, max) = start.add_below::<T, ENTROPY>(z, scale);
        if (max - start.max) * scale > HEADROOM {
            start.rebase(max, scale).add_below::<T, ENTROPY>(z, scale)
        } else {
            (sums, max)
        }
    }

    /// The same sums with respect to a maximum that includes `other`.
    #[inline(always)]
    fn rebase(self, other: f32, scale: f32) -> Sums {
        if self.max >= other {
            return self;
        }
        if self.max == f32::NEG_INFINITY {
            // Nothing finite yet: the sums are 0, or NaN and stay so.
            return Sums { max: other, ..self };
        }
        let shift = (self.max - other) * scale;
        let factor = exp(shift);
        Sums {
            max: other,
            sum: self.sum * factor,
            weighted: if factor == 0.0 { 0.0 } else { (self.weighted + shift * self.sum) * factor },
        }
    }

    fn merge(self, other: Sums, scale: f32) -> Sums {
        let (a, b) = (self.rebase(other.max, scale), other.rebase(self.max, scale));
        Sums { max: a.max, sum: a.sum + b.sum, weighted: a.weighted + b.weighted }
    }

    /// With one more block whose logits are not far above the maximum, and their own maximum.
    #[inline(always)]
    fn add_below<T: Logit, const ENTROPY: bool>(self, z: &[T], scale: f32) -> (Sums, f32) {
        // With -inf throughout, -inf - -inf would make NaN of legal masked columns.
        let base = if self.max == f32::NEG_INFINITY { 0.0 } else { self.max };
        let exp = Exp::new(scale);
        let mut max = [f32::NEG_INFINITY; LOGIT_LANES];
        let mut sum = [0.0; LOGIT_LANES];
        let mut weighted = [0.0; LOGIT_LANES];
        for_logits(
            z,
            #[inline(always)]
            |z| {
                let z = T::widen(z);
                for lane in 0..LOGIT_LANES {
                    let z = z[lane];
                    max[lane] = larger(z, max[lane]);
                    let x = exp.clamp(z - base);
                    let (p, power) = exp.factors(x);
                    sum[lane] = p.mul_add(power, sum[lane]);
                    if ENTROPY {
                        weighted[lane] = (p * power).mul_add(x, weighted[lane]);
                    }
                }
            },
        );
        let sums = Sums {
            max: self.max,
            sum: self.sum + sum_lanes(sum),
            weighted: self.weighted + sum_lanes(weighted) * scale,
        };
        (sums, max_lanes(max))
    }

    /// ln Σ e^x; NaN for a row that has no distribution.
    fn log_sum(&self) -> f32 {
        if self.max.is_finite() {
            self.sum.ln()
        } else {
            f32::NAN
        }
    }

    fn entropy(&self) -> f32 {
        self.log_sum() - self.weighted / self.sum
    }
}

/// The gradient of one row as a function of the logit. Passed by value: behind a reference the
/// compiler would have to reload it after every store, and would not vectorise.
#[derive(Clone, Copy)]
struct Slope {
    max: f32,
    scale: f32,
    log_sum: f32,
    entropy: f32,
    /// Upstream gradients, the temperature's factor included.
    grad_logp: f32,
    grad_entropy: f32,
}

impl Slope {
    fn write_row<T: Logit, const NON_TEMPORAL: bool>(self, z: &[T], target: usize, grad: &mut [T]) {
        for_each(z.len(), GRAIN, (z, &mut *grad), |_, _, (z, grad)| {
            vectorise(
                #[inline(always)]
                || {
                    Writer::<NON_TEMPORAL>.map(
                        grad,
                        z,
                        #[inline(always)]
                        |z: T| T::from_f32(self.at(z.to_f32())),
                    );
                },
            );
        });
        // In f32, before rounding: near p = 1 the two terms cancel.
        grad[target] = T::from_f32(self.at(z[target].to_f32()) + self.grad_logp);
    }

    /// -p (g + h (ln p + H)), the gradient of every column but the target's.
    #[inline(always)]
    fn at(self, z: f32) -> f32 {
        let ln_p = (z - self.max).mul_add(self.scale, -self.log_sum);
        let ln_p = at_least(ln_p, EXP_FLOOR);
        let (p, power) = exp_factors(ln_p);
        -p * power * self.grad_entropy.mul_add(ln_p + self.entropy, self.grad_logp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    fn gradients_past_the_caches_have_the_same_bits<T: Logit>() {
        let z: Vec<T> = (0..301).map(|i| T::from_f32((i as f32).sin())).collect();
        let slope = Slope {
            max: 1.0,
            scale: 0.8,
            log_sum: 5.0,
            entropy: 5.5,
            grad_logp: 0.7,
            grad_entropy: -0.1,
        };
        for offset in 0..3 {
            let (mut cached, mut past) = (vec![T::ZERO; 304], vec![T::ZERO; 304]);
            slope.write_row::<T, false>(&z, 300, &mut cached[offset..][..301]);
            slope.write_row::<T, true>(&z, 300, &mut past[offset..][..301]);
            let bits = |x: &[T]| x.iter().map(|x| x.to_f32().to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&cached), bits(&past));
            assert!(past[offset].to_f32() != 0.0 && past[offset + 300].to_f32() != 0.0);
        }
    }

    #[test]
    fn gradients_of_every_type_past_the_caches_have_the_same_bits() {
        gradients_past_the_caches_have_the_same_bits::<f32>();
        gradients_past_the_caches_have_the_same_bits::<f16>();
        gradients_past_the_caches_have_the_same_bits::<bf16>();
    }
}
