//! The fused CPU implementation. Rows are shared out to threads, and long rows are cut into segments
//! that are. A segment is walked once, with running maxima and sums; those of a row's
//! segments are merged in an order that depends on the row's length only.

use super::{Columns, LogprobOptions, OP};
use crate::cpu::math::{
    exp, exp_m1, for_logits, larger, max, max_lanes, sum_lanes, Exp, LOGIT_LANES,
};
use crate::cpu::{
    for_each, map, reduce, vectorise, with_stores, Logit, Rows, RowsMut, Stores, TokenId,
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

in_space!(
    Host: ForwardInputs<T, I>,
    ForwardOutputs,
    BackwardInputs<T, I>,
    BackwardOutputs<T>,
    InPlaceInputs<I>,
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
            let (sums, ln, lp) = if ignored {
                (Sums::NONE, f32::NAN, 0.0)
            } else {
                let sums = Sums::of_row(z, scale, entropy.is_some());
                let ln = sums.log_sum();
                (sums, ln, sums.logp(z[target as usize].to_f32(), scale, ln))
            };
            logp[row] = lp;
            if let Some(entropy) = &mut entropy {
                entropy[row] = if ignored { 0.0 } else { sums.entropy(ln) };
            }
            if let Some((max, log_sum)) = &mut stats {
                max[row] = sums.max;
                log_sum[row] = ln;
            }
        }
    });
    Ok(())
}

/// Folds a tile of columns into the running sums of `rows` rows, or begins them with it. Reads the logits
/// once. The inputs' `logits` are `[rows, columns.count]`.
///
/// # Errors
/// If a length does not fit, the columns are not in the vocabulary, an option is out of range, or a target
/// is outside the vocabulary. Nothing is written then.
pub fn partial<T: Logit, I: TokenId>(
    inputs: ForwardInputs<T, I>,
    rows: usize,
    columns: Columns,
    options: &LogprobOptions,
    begins: bool,
    mut sums: RunningSums,
) -> Result<()> {
    options.validate()?;
    columns.check()?;
    Error::check_logits(OP, inputs.logits.len(), rows, columns.count)?;
    inputs.try_map((&[rows], columns.count), &mut Lengths(OP))?;
    check_targets(inputs.targets, columns.vocab, options)?;
    sums.try_map(&[rows], &mut Lengths(OP))?;

    let ForwardInputs { logits, targets } = inputs;
    let RunningSums { max, rest, logit, weighted } = sums;
    let logits = Rows { data: logits, width: columns.count };
    let scale = (1.0 / options.temperature) as f32;
    let items = (logits, targets, max, rest, logit, weighted);
    for_each(rows, GRAIN / columns.count, items, |_, _, items| {
        let (logits, targets, max, rest, logit, weighted) = items;
        let mut sums = RunningSums { max, rest, logit, weighted };
        for (row, target) in targets.iter().enumerate() {
            let id = target.id();
            let mut now = Seen { sums: Sums::NONE, logit: f32::NAN };
            if options.ignore_index != Some(id) {
                let z = logits.row(row);
                now.sums = Sums::of_row(z, scale, sums.weighted.is_some());
                now.logit = columns.place(id).map_or(f32::NAN, |place| z[place].to_f32());
            }
            let seen = if begins { now } else { Seen::read(&sums, row).merge(now, scale) };
            seen.write(&mut sums, row);
        }
    });
    Ok(())
}

/// Adds the running sums over other columns of `rows` rows to those over some.
///
/// # Errors
/// If a length does not fit, an option is out of range, or one of the weighted sums is missing.
pub fn merge(
    inputs: MergeInputs,
    rows: usize,
    options: &LogprobOptions,
    mut sums: RunningSums,
) -> Result<()> {
    options.validate()?;
    inputs.try_map(&[rows], &mut Lengths(OP))?;
    sums.try_map(&[rows], &mut Lengths(OP))?;
    sums.check_pair(&inputs)?;

    let scale = (1.0 / options.temperature) as f32;
    for row in 0..rows {
        let other = Seen {
            sums: Sums {
                max: inputs.other_max[row],
                rest: inputs.other_rest[row],
                weighted: inputs.other_weighted.map_or(0.0, |weighted| weighted[row]),
            },
            logit: inputs.other_logit[row],
        };
        Seen::read(&sums, row).merge(other, scale).write(&mut sums, row);
    }
    Ok(())
}

/// Log-probabilities, and entropies if asked for, of running sums over all columns of `vocab`.
///
/// # Errors
/// If a length does not fit, an option is out of range, what the entropy needs is missing, or a target is
/// outside the vocabulary. Nothing is written then.
pub fn finish<I: TokenId>(
    inputs: FinishInputs<I>,
    rows: usize,
    vocab: usize,
    options: &LogprobOptions,
    mut outputs: FinishOutputs,
) -> Result<()> {
    options.validate()?;
    Columns::check_vocab(vocab)?;
    inputs.try_map(&[rows], &mut Lengths(OP))?;
    check_targets(inputs.targets, vocab, options)?;
    outputs.try_map(&[rows], &mut Lengths(OP))?;
    outputs.check_given(&inputs)?;

    let scale = (1.0 / options.temperature) as f32;
    for row in 0..rows {
        let ignored = options.ignore_index == Some(inputs.targets[row].id());
        let sums = Sums {
            max: inputs.max[row],
            rest: inputs.rest[row],
            weighted: inputs.weighted.map_or(0.0, |weighted| weighted[row]),
        };
        let ln = sums.log_sum();
        let logp = sums.logp(inputs.logit[row], scale, ln);
        outputs.logp[row] = if ignored { 0.0 } else { logp };
        outputs.log_sum[row] = if ignored { f32::NAN } else { ln };
        if let Some(entropy) = &mut outputs.entropy {
            entropy[row] = if ignored { 0.0 } else { sums.entropy(ln) };
        }
    }
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
    backward_of_columns(inputs, rows, Columns::all(vocab), options, outputs)
}

/// [`backward`] of a tile of columns: logits and gradient are `[rows, columns.count]`.
///
/// # Errors
/// As [`backward`], or if the columns are not in the vocabulary.
pub fn backward_of_columns<T: Logit, I: TokenId>(
    inputs: BackwardInputs<T, I>,
    rows: usize,
    columns: Columns,
    options: &LogprobOptions,
    outputs: BackwardOutputs<T>,
) -> Result<()> {
    let stores = Stores::of(size_of_val(outputs.grad_logits));
    backward_of_part(inputs, rows, columns, options, outputs, stores)
}

/// [`backward_of_columns`] with the gradient in the place of the logits.
///
/// # Errors
/// As [`backward_of_columns`].
pub fn backward_in_place<T: Logit, I: TokenId>(
    inputs: InPlaceInputs<I>,
    rows: usize,
    columns: Columns,
    options: &LogprobOptions,
    mut outputs: BackwardOutputs<T>,
) -> Result<()> {
    Error::check_logits(OP, outputs.grad_logits.len(), rows, columns.count)?;
    outputs.try_map((&[rows], columns.count), &mut Lengths(OP))?;
    let grads = RowsMut { data: outputs.grad_logits, width: columns.count };
    // It is in the caches, or on its way there.
    write_gradients(None, inputs, rows, columns, options, grads, Stores::Cached)
}

/// [`backward_of_columns`] for some of the rows of a gradient of which the whole is written past the
/// caches or not.
pub(crate) fn backward_of_part<T: Logit, I: TokenId>(
    inputs: BackwardInputs<T, I>,
    rows: usize,
    columns: Columns,
    options: &LogprobOptions,
    mut outputs: BackwardOutputs<T>,
    stores: Stores,
) -> Result<()> {
    let logits = inputs.forward.logits;
    Error::check_logits(OP, logits.len(), rows, columns.count)?;
    inputs.try_map((&[rows], columns.count), &mut Lengths(OP))?;
    outputs.try_map((&[rows], columns.count), &mut Lengths(OP))?;
    let inputs = inputs.without_logits();
    let grads = RowsMut { data: outputs.grad_logits, width: columns.count };
    write_gradients(Some(logits), inputs, rows, columns, options, grads, stores)
}

/// The gradients of logits, or of those that they take the place of.
fn write_gradients<T: Logit, I: TokenId>(
    logits: Option<&[T]>,
    inputs: InPlaceInputs<I>,
    rows: usize,
    columns: Columns,
    options: &LogprobOptions,
    grads: RowsMut<T>,
    stores: Stores,
) -> Result<()> {
    options.validate()?;
    columns.check()?;
    inputs.try_map(&[rows], &mut Lengths(OP))?;
    check_targets(inputs.targets, columns.vocab, options)?;
    let entropy = inputs.entropy_or_any()?;

    let InPlaceInputs { targets, max, log_sum, grad_logp, grad_entropy, .. } = inputs;
    let width = columns.count;
    let scale = (1.0 / options.temperature) as f32;
    for_each(rows, GRAIN / width, grads, |first, count, mut grads| {
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
            let slope = Slope::new([max[row], log_sum[row], entropy[row]], scale, g, h);
            let place = columns.place(target);
            match logits.map(|logits| &logits[row * width..][..width]) {
                None => slope.write_over(grad, place),
                Some(z) => slope.write_row(z, place, grad, stores),
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

/// Sums over some columns of a row, one occurrence of their maximum left out: where that stands far above
/// all others, what they add up to would be rounded away beside its 1.
#[derive(Clone, Copy)]
struct Sums {
    /// The largest logit.
    max: f32,
    /// Σ' e^-d over the others, with d = (max - z) * scale.
    rest: f32,
    /// Σ' e^-d d.
    weighted: f32,
}

impl Sums {
    const NONE: Sums = Sums { max: f32::NEG_INFINITY, rest: 0.0, weighted: 0.0 };

    /// The sums of a row, the weighted one if asked for.
    fn of_row<T: Logit>(row: &[T], scale: f32, weighted: bool) -> Sums {
        if weighted {
            Sums::of_columns::<T, true>(row, scale)
        } else {
            Sums::of_columns::<T, false>(row, scale)
        }
    }

    fn of_columns<T: Logit, const ENTROPY: bool>(row: &[T], scale: f32) -> Sums {
        let of_segment = |_, _, segment: &[T]| {
            if segment.len() <= BLOCK {
                return vectorise(
                    #[inline(always)]
                    || Sums::of_block::<T, ENTROPY>(segment, scale),
                );
            }
            vectorise(
                #[inline(always)]
                || {
                    let mut lanes = Lanes::NONE;
                    for block in segment.chunks(BLOCK) {
                        lanes = lanes.add::<T, ENTROPY>(block, scale);
                    }
                    lanes.total::<ENTROPY>(scale)
                },
            )
        };
        reduce(row.len(), GRAIN, row, of_segment, |a, b| a.merge(b, scale))
    }

    /// The sums of few columns, from a second look at them.
    #[inline(always)]
    fn of_block<T: Logit, const ENTROPY: bool>(z: &[T], scale: f32) -> Sums {
        let largest = max(z);
        let base = origin(largest);
        let exp = Exp::new(scale);
        // Of those that are the largest all but one count, e^0 each.
        let mut at_largest = [0.0; LOGIT_LANES];
        let mut rest = [0.0; LOGIT_LANES];
        let mut weighted = [0.0; LOGIT_LANES];
        for_logits(
            z,
            #[inline(always)]
            |z| {
                let z = T::widen(z);
                for lane in 0..LOGIT_LANES {
                    let equal = z[lane] == largest;
                    let x = exp.clamp(z[lane] - base);
                    let (p, power) = exp.factors(x);
                    at_largest[lane] += if equal { 1.0 } else { 0.0 };
                    rest[lane] += if equal { 0.0 } else { p * power };
                    if ENTROPY {
                        weighted[lane] = (p * power).mul_add(x, weighted[lane]);
                    }
                }
            },
        );
        if largest == f32::NEG_INFINITY {
            // The sums are 0, or NaN and stay so.
            return Sums { max: largest, rest: sum_lanes(rest), weighted: 0.0 };
        }
        let others = sum_lanes(at_largest) - 1.0;
        let weighted = -scale * sum_lanes(weighted);
        Sums { max: largest, rest: sum_lanes(rest) + others, weighted }
    }

    fn merge(self, other: Sums, scale: f32) -> Sums {
        let (high, low) = if other.max > self.max { (other, self) } else { (self, other) };
        if low.max == f32::NEG_INFINITY {
            // Nothing finite: its sums are 0, or NaN and stay so.
            return Sums { rest: high.rest + low.rest, ..high };
        }
        let d = (high.max - low.max) * scale;
        let factor = exp(-d);
        let rest = high.rest + factor * (1.0 + low.rest);
        // Where the factor is 0 d may be infinite.
        let weighted = if factor == 0.0 { 0.0 } else { d.mul_add(1.0 + low.rest, low.weighted) };
        Sums { max: high.max, rest, weighted: factor.mul_add(weighted, high.weighted) }
    }

    /// ln Σ e^-d over all columns; NaN for a row that has no distribution.
    fn log_sum(&self) -> f32 {
        if self.max.is_finite() {
            ln_1p(self.rest)
        } else {
            f32::NAN
        }
    }

    /// The log-probability of a column, of the logarithm of the sum.
    fn logp(&self, z: f32, scale: f32, log_sum: f32) -> f32 {
        (z - self.max) * scale - log_sum
    }

    /// The entropy, of the logarithm of the sum.
    fn entropy(&self, log_sum: f32) -> f32 {
        log_sum + self.weighted / (1.0 + self.rest)
    }
}

/// The running sums of a row over the columns seen so far.
#[derive(Clone, Copy)]
struct Seen {
    sums: Sums,
    /// The target's; NaN while it has not been seen.
    logit: f32,
}

impl Seen {
    /// Reads the running sums of a row.
    fn read(sums: &RunningSums, row: usize) -> Seen {
        let weighted = sums.weighted.as_ref().map_or(0.0, |weighted| weighted[row]);
        let logit = sums.logit[row];
        Seen { sums: Sums { max: sums.max[row], rest: sums.rest[row], weighted }, logit }
    }

    fn write(self, sums: &mut RunningSums, row: usize) {
        sums.max[row] = self.sums.max;
        sums.rest[row] = self.sums.rest;
        sums.logit[row] = self.logit;
        if let Some(weighted) = &mut sums.weighted {
            weighted[row] = self.sums.weighted;
        }
    }

    fn merge(self, other: Seen, scale: f32) -> Seen {
        let logit = if self.logit.is_nan() { other.logit } else { self.logit };
        Seen { sums: self.sums.merge(other.sums, scale), logit }
    }
}

/// Running sums in lanes, every lane's maximum left out of its own.
#[derive(Clone, Copy)]
struct Lanes {
    /// The number that x = z - base is counted from: no less than the maxima by more than [`HEADROOM`], so that no
    /// block has to wait for the maximum of the one before it. -inf until there is a finite logit.
    base: f32,
    /// The largest logits.
    max: [f32; LOGIT_LANES],
    /// Σ' e^(x scale).
    rest: [f32; LOGIT_LANES],
    /// Σ' e^(x scale) x.
    weighted: [f32; LOGIT_LANES],
}

impl Lanes {
    const NONE: Lanes = Lanes {
        base: f32::NEG_INFINITY,
        max: [f32::NEG_INFINITY; LOGIT_LANES],
        rest: [0.0; LOGIT_LANES],
        weighted: [0.0; LOGIT_LANES],
    };

    /// Adds one more block.
    #[inline(always)]
    fn add<T: Logit, const ENTROPY: bool>(mut self, z: &[T], scale: f32) -> Lanes {
        if self.base == f32::NEG_INFINITY {
            // Nothing finite yet: the sums are 0, or NaN and stay so.
            self.base = max(z);
        }
        let found = self.add_below::<T, ENTROPY>(z, scale);
        let largest = max_lanes(found.max);
        if (largest - self.base) * scale > HEADROOM {
            self.rebase(largest, scale).add_below::<T, ENTROPY>(z, scale)
        } else {
            found
        }
    }

    /// Moves the sums to a higher base.
    #[inline(always)]
    fn rebase(mut self, base: f32, scale: f32) -> Lanes {
        let shift = self.base - base;
        let factor = exp(shift * scale);
        for lane in 0..LOGIT_LANES {
            let weighted = shift.mul_add(self.rest[lane], self.weighted[lane]) * factor;
            self.weighted[lane] = if factor == 0.0 { 0.0 } else { weighted };
            self.rest[lane] *= factor;
        }
        Lanes { base, ..self }
    }

    /// Adds one more block whose logits are not far above the base.
    #[inline(always)]
    fn add_below<T: Logit, const ENTROPY: bool>(self, z: &[T], scale: f32) -> Lanes {
        let base = origin(self.base);
        let exp = Exp::new(scale);
        let Lanes { mut max, mut rest, mut weighted, .. } = self;
        for_logits(
            z,
            #[inline(always)]
            |z| {
                let z = T::widen(z);
                for lane in 0..LOGIT_LANES {
                    // Of the new logit and the maximum so far, the sum gets the lesser; and NaN.
                    let lesser = if max[lane] < z[lane] { max[lane] } else { z[lane] };
                    max[lane] = larger(z[lane], max[lane]);
                    let x = exp.clamp(lesser - base);
                    let (p, power) = exp.factors(x);
                    rest[lane] = p.mul_add(power, rest[lane]);
                    if ENTROPY {
                        weighted[lane] = (p * power).mul_add(x, weighted[lane]);
                    }
                }
            },
        );
        Lanes { base: self.base, max, rest, weighted }
    }

    /// The sums of all lanes, the maximum of one of them left out.
    #[inline(always)]
    fn total<const ENTROPY: bool>(self, scale: f32) -> Sums {
        let (base, largest) = (origin(self.base), max_lanes(self.max));
        let exp_scaled = Exp::new(scale);
        let Lanes { mut rest, mut weighted, .. } = self;
        let mut at_largest = [0.0; LOGIT_LANES];
        for lane in 0..LOGIT_LANES {
            let below = self.max[lane] < largest;
            at_largest[lane] = if below { 0.0 } else { 1.0 };
            let max = if below { self.max[lane] } else { f32::NEG_INFINITY };
            let x = exp_scaled.clamp(max - base);
            let (p, power) = exp_scaled.factors(x);
            rest[lane] = p.mul_add(power, rest[lane]);
            if ENTROPY {
                weighted[lane] = (p * power).mul_add(x, weighted[lane]);
            }
        }
        let (rest, weighted) = (sum_lanes(rest), sum_lanes(weighted));
        let others = sum_lanes(at_largest) - 1.0;
        if largest == f32::NEG_INFINITY {
            return Sums { max: largest, rest, weighted };
        }
        // From the base to the maximum.
        let shift = base - largest;
        let factor = exp(shift * scale);
        let weighted = -shift.mul_add(rest, weighted) * scale * factor;
        Sums { max: largest, rest: rest.mul_add(factor, others), weighted }
    }
}

/// The number that logits are counted from. With -inf throughout, -inf - -inf would make NaN of legal masked columns.
#[inline(always)]
fn origin(base: f32) -> f32 {
    if base == f32::NEG_INFINITY {
        0.0
    } else {
        base
    }
}

/// ln (1 + x), for x not below 0.
fn ln_1p(x: f32) -> f32 {
    // Several times as fast, and 1 + x has all its digits.
    if x >= 1.0 {
        (1.0 + x).ln()
    } else {
        x.ln_1p()
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
    /// The upstream gradient of logp, the temperature's factor included.
    grad_logp: f32,
    /// Makes probabilities that are lifted, and both upstream gradients, brought down by as much.
    exp: Exp,
    low_grad_logp: f32,
    low_grad_entropy: f32,
}

impl Slope {
    /// Takes the upstream gradients of logp and entropy, the temperature's factor included.
    fn new(
        [max, log_sum, entropy]: [f32; 3],
        scale: f32,
        grad_logp: f32,
        grad_entropy: f32,
    ) -> Slope {
        let (exp, down) = Exp::beside(grad_logp.abs().max(grad_entropy.abs()));
        Slope {
            max,
            scale,
            log_sum,
            entropy,
            grad_logp,
            exp,
            low_grad_logp: grad_logp * down,
            low_grad_entropy: grad_entropy * down,
        }
    }

    fn write_row<T: Logit>(self, z: &[T], target: Option<usize>, grad: &mut [T], stores: Stores) {
        for_each(z.len(), GRAIN, (z, &mut *grad), |_, _, (z, grad)| {
            with_stores!(stores, STORES => {
                let slope = self;
                map::<STORES, _, _>(
                    grad,
                    z,
                    #[inline(always)]
                    |z: T| T::from_f32(slope.at(z.to_f32())),
                );
            });
        });
        if let Some(target) = target {
            grad[target] = self.target_gradient(z[target]);
        }
    }

    /// The gradients in the place of the logits.
    fn write_over<T: Logit>(self, z: &mut [T], target: Option<usize>) {
        let at_target = target.map(|target| (target, self.target_gradient(z[target])));
        for_each(z.len(), GRAIN, &mut *z, |_, _, z| {
            vectorise(
                #[inline(always)]
                || {
                    for z in z {
                        *z = T::from_f32(self.at(z.to_f32()));
                    }
                },
            );
        });
        if let Some((target, grad)) = at_target {
            z[target] = grad;
        }
    }

    fn target_gradient<T: Logit>(self, z: T) -> T {
        vectorise(
            #[inline(always)]
            || T::from_f32(self.at_target(z.to_f32())),
        )
    }

    /// g (1 - p) - p h (ln p + H). Where p is near 1, 1 - p would lose its digits.
    #[inline(always)]
    fn at_target(self, z: f32) -> f32 {
        let ln_p = self.ln_p(z);
        let of_entropy = Slope { low_grad_logp: 0.0, ..self };
        self.grad_logp.mul_add(-exp_m1(ln_p), of_entropy.at(z))
    }

    #[inline(always)]
    fn ln_p(self, z: f32) -> f32 {
        (z - self.max).mul_add(self.scale, -self.log_sum)
    }

    /// -p (g + h (ln p + H)), the gradient of every column but the target's.
    #[inline(always)]
    fn at(self, z: f32) -> f32 {
        let ln_p = self.exp.clamp(self.ln_p(z));
        let (p, power) = self.exp.factors(ln_p);
        -p * power * self.low_grad_entropy.mul_add(ln_p + self.entropy, self.low_grad_logp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    fn gradients_past_the_caches_have_the_same_bits<T: Logit>() {
        let z: Vec<T> = (0..301).map(|i| T::from_f32((i as f32).sin())).collect();
        let slope = Slope::new([1.0, 5.0, 5.5], 0.8, 0.7, -0.1);
        let bits = |x: &[T]| x.iter().map(|x| x.to_f32().to_bits()).collect::<Vec<_>>();
        let mut over = z.clone();
        slope.write_over(&mut over, Some(300));
        for (offset, stores) in (0..3).flat_map(|i| Stores::all().into_iter().map(move |s| (i, s)))
        {
            let mut grad = [T::ZERO; 304];
            slope.write_row(&z, Some(300), &mut grad[offset..][..301], stores);
            assert!(grad[offset].to_f32() != 0.0 && grad[offset + 300].to_f32() != 0.0);
            assert_eq!(bits(&grad[offset..][..301]), bits(&over), "{stores:?}");
        }
    }

    #[test]
    fn gradients_of_every_type_past_the_caches_have_the_same_bits() {
        gradients_past_the_caches_have_the_same_bits::<f32>();
        gradients_past_the_caches_have_the_same_bits::<f16>();
        gradients_past_the_caches_have_the_same_bits::<bf16>();
    }
}
