//! The losses in plain f64 loops, to be checked by eye. See [`super`] for the formulas.

use super::{FDivergence, Loss, PreferenceOptions, PreferenceStats, RewardModelOptions, OP};
use crate::error::{Error, Result};
use crate::memory::{in_space, Lengths};
use crate::pack::{BatchShape, RowRanges};

in_space!(HostF64: Inputs, RewardModelInputs);

/// The loss with its gradient, for an upstream gradient of 1.
#[derive(Debug, Clone)]
pub struct PreferenceFound {
    /// The loss and the statistics.
    pub stats: PreferenceStats,
    /// The losses of the units, times their weights.
    pub losses: Vec<f64>,
    /// Implicit rewards of the rows.
    pub rewards: Vec<f64>,
    /// The gradient with respect to logp, or the rewards of a reward model.
    pub grad: Vec<f64>,
}

/// Loss, statistics and gradient of `rows` responses of up to `seq_len` tokens, or with offsets, of `seq_len`
/// tokens in all.
///
/// # Errors
/// If a length does not fit, an option is out of range, something is given that does not go with the
/// loss, a label is neither 0 nor 1, or no pair counts and the denominator is not given.
pub fn preference_loss(
    inputs: &Inputs,
    rows: usize,
    seq_len: usize,
    options: &PreferenceOptions,
) -> Result<PreferenceFound> {
    options.validate()?;
    let units = options.units(rows)?;
    let shape = BatchShape::new(rows, seq_len, inputs.offsets.is_some());
    inputs.try_map((shape, units), &mut Lengths(OP))?;
    inputs.check_given(options)?;
    super::check_values(inputs.labels, inputs.lengths)?;
    let ranges = RowRanges::new(OP, seq_len, inputs.offsets)?;

    let kept = |&t: &usize| inputs.mask.is_none_or(|mask| mask[t] != 0);
    let tokens = |row: usize| ranges.range(row).filter(kept).collect::<Vec<_>>();
    let counts: Vec<usize> = (0..rows).map(|row| tokens(row).len()).collect();
    let length = |row: usize| match inputs.lengths {
        Some(lengths) => lengths[row] as f64,
        None => counts[row] as f64,
    };
    // The weights of a row's tokens, in order.
    let weight_of = |row: usize, position: usize| match options.ld_alpha {
        Some(alpha) => {
            let shorter = counts[row].min(counts[(row + units) % rows]);
            if position < shorter {
                1.0
            } else {
                alpha
            }
        }
        None => 1.0,
    };
    let sum = |row: usize, values: &[f64], weight: &dyn Fn(usize) -> f64| -> f64 {
        let tokens = tokens(row).into_iter().enumerate();
        tokens.map(|(position, t)| weight(position) * values[t]).sum()
    };
    let policy = |row: usize| sum(row, inputs.logp, &|position| weight_of(row, position));
    let reference = |row: usize| match (inputs.ref_logp, inputs.ref_sums) {
        (Some(ref_logp), _) => sum(row, ref_logp, &|position| weight_of(row, position)),
        (None, Some(sums)) => sums[row],
        (None, None) => 0.0,
    };
    let averages = options.average_log_prob || options.loss.always_averages();
    let divisor = |row: usize| if averages { length(row).max(1.0) } else { 1.0 };

    // What stands for x, and its derivative by the sum.
    let score = |row: usize| {
        let (x, n) = (policy(row) - reference(row), divisor(row));
        let mean = x / n;
        match (options.loss, options.f_divergence) {
            (Loss::Orpo, _) => (mean - ln_one_minus_exp(mean), 1.0 / (0.0 - mean.exp_m1()) / n),
            (Loss::AlphaPo, _) if options.alpha != 0.0 => {
                let e = (-options.alpha * mean).exp_m1();
                (-e / options.alpha, (1.0 + e) / n)
            }
            (_, FDivergence::ReverseKl) => (mean, 1.0 / n),
            (_, FDivergence::ForwardKl) => (-(-x).exp_m1() / n, (-x).exp() / n),
            (_, FDivergence::JensenShannon) => {
                ((2.0_f64.ln() + ln_logistic(x)) / n, logistic(-x) / n)
            }
            (_, FDivergence::Alpha(alpha)) => {
                let exponent = (alpha - 1.0) * x;
                (exponent.exp_m1() / (alpha - 1.0) / n, exponent.exp() / n)
            }
        }
    };
    let reward = |row: usize| match options.loss {
        Loss::AlphaPo => options.beta * score(row).0,
        _ => options.beta * (policy(row) - reference(row)) / divisor(row),
    };

    let weight = |unit: usize| inputs.weights.map_or(1.0, |weights| weights[unit]);
    let counted: Vec<usize> = (0..units).filter(|&unit| weight(unit) != 0.0).collect();
    let count = denominator(options.denominator, counted.len(), inputs.weights.is_some())?;
    let margin = |unit: usize| inputs.margin.map_or(0.0, |margin| margin[unit]);

    // What the losses of sorted log-ratios compare with: by row, what stands in the other one's place.
    let other = match options.loss {
        Loss::Aot => {
            let ratio = |of: &dyn Fn(usize) -> f64, i: usize| {
                of(i) / divisor(i) - of(i + units) / divisor(i + units)
            };
            let of_policy: Vec<f64> = (0..units).map(|i| ratio(&policy, i)).collect();
            let of_reference: Vec<f64> = (0..units).map(|i| ratio(&reference, i)).collect();
            let matched = in_the_order_of(&of_policy, &of_reference);
            let delta = |i: usize| of_policy[i] - matched[i];
            let chosen = (0..units).map(|i| score(i).0 - delta(i));
            chosen.chain((0..units).map(|i| score(i + units).0 + delta(i))).collect()
        }
        Loss::AotUnpaired => {
            let x: Vec<f64> = (0..units).map(|i| score(i).0).collect();
            let y: Vec<f64> = (0..units).map(|i| score(i + units).0).collect();
            [in_the_order_of(&x, &y), in_the_order_of(&y, &x)].concat()
        }
        Loss::Kto => Vec::new(),
        _ => (0..rows).map(|row| score((row + units) % rows).0).collect(),
    };

    let sft_tokens: f64 = counted.iter().map(|&i| length(i)).sum();
    let plain = |row: usize| sum(row, inputs.logp, &|_| 1.0);
    let has_sft = options.sft_coef != 0.0;
    let sft_count = match options.sft_denominator {
        Some(given) => given,
        None if has_sft && sft_tokens == 0.0 => return Err(super::no_tokens()),
        None => sft_tokens,
    };
    let sft_loss = match options.loss {
        Loss::Kto => f64::NAN,
        _ => -counted.iter().map(|&i| plain(i)).sum::<f64>() / sft_count,
    };

    let mut losses = vec![0.0; units];
    let mut by_row = vec![0.0; rows];
    for &i in &counted {
        let w = weight(i);
        let (loss, gradients) = if options.loss == Loss::Kto {
            let kl = inputs.kl.map_or(0.0, |kl| kl[0]);
            let label = inputs.labels.is_some_and(|labels| labels[i] == 1);
            let (loss, slope) = kto(options, score(i).0 - kl, label);
            (loss, vec![(i, slope)])
        } else {
            let (x, y) = (score(i).0, score(i + units).0);
            let by_x = pair(options, x, other[i], margin(i));
            let by_y = pair(options, other[i + units], y, margin(i));
            (by_x.loss, vec![(i, by_x.x), (i + units, by_y.y)])
        };
        losses[i] = w * loss;
        for (row, slope) in gradients {
            // A slope of 0 is one of 0, however steep the score is.
            by_row[row] = if slope == 0.0 { 0.0 } else { w * slope * score(row).1 };
        }
    }

    let mut grad = vec![0.0; inputs.logp.len()];
    for unit in &counted {
        let of_unit = match options.loss {
            Loss::Kto => vec![*unit],
            _ => vec![*unit, unit + units],
        };
        for row in of_unit {
            for (position, t) in tokens(row).into_iter().enumerate() {
                let g = &mut grad[t];
                *g = by_row[row] * weight_of(row, position) / count;
                if has_sft && row < units {
                    *g -= options.sft_coef / sft_count;
                }
            }
        }
    }

    let desirable = |row: usize| inputs.labels.map_or(row < units, |labels| labels[row] == 1);
    let row_counts = |row: usize| weight(row % units.max(1)) != 0.0;
    let (chosen, rejected): (Vec<usize>, Vec<usize>) =
        (0..rows).filter(|&row| row_counts(row)).partition(|&row| desirable(row));
    let mean = |rows: &[usize], of: &dyn Fn(usize) -> f64| {
        rows.iter().map(|&row| of(row)).sum::<f64>() / rows.len() as f64
    };
    let preference_loss = losses.iter().sum::<f64>() / count;
    let correct = |&&i: &&usize| reward(i) > reward(i + units);
    let stats = PreferenceStats {
        loss: preference_loss + if has_sft { options.sft_coef * sft_loss } else { 0.0 },
        preference_loss,
        sft_loss,
        accuracy: match options.loss {
            Loss::Kto => f64::NAN,
            _ => counted.iter().filter(correct).count() as f64 / counted.len() as f64,
        },
        reward_margin: mean(&chosen, &reward) - mean(&rejected, &reward),
        chosen_reward: mean(&chosen, &reward),
        rejected_reward: mean(&rejected, &reward),
        chosen_logp: mean(&chosen, &policy),
        rejected_logp: mean(&rejected, &policy),
        chosen: chosen.len() as f64,
        rejected: rejected.len() as f64,
    };
    let rewards = (0..rows).map(|row| if row_counts(row) { reward(row) } else { 0.0 }).collect();
    Ok(PreferenceFound { stats, losses, rewards, grad })
}

/// Loss, statistics and gradient of a reward model's rewards of `pairs` pairs: the mean of
/// -ls(chosen - rejected - margin) + center_coef (chosen + rejected)².
///
/// # Errors
/// If a length does not fit, an option is out of range, or no pair counts and the denominator is not given.
pub fn reward_model_loss(
    inputs: &RewardModelInputs,
    pairs: usize,
    options: &RewardModelOptions,
) -> Result<PreferenceFound> {
    options.validate()?;
    inputs.try_map(pairs, &mut Lengths(OP))?;
    let plain = PreferenceOptions {
        beta: 1.0,
        denominator: options.denominator,
        ..PreferenceOptions::default()
    };
    let as_logp =
        Inputs { weights: inputs.weights, margin: inputs.margin, ..Inputs::new(inputs.rewards) };
    let mut found = preference_loss(&as_logp, 2 * pairs, 1, &plain)?;
    let weight = |i: usize| inputs.weights.map_or(1.0, |weights| weights[i]);
    let counted: Vec<usize> = (0..pairs).filter(|&i| weight(i) != 0.0).collect();
    let count = denominator(options.denominator, counted.len(), inputs.weights.is_some())?;
    for i in counted {
        let sum = inputs.rewards[i] + inputs.rewards[pairs + i];
        let (loss, slope) = (options.center_coef * sum * sum, 2.0 * options.center_coef * sum);
        found.losses[i] += weight(i) * loss;
        found.grad[i] += weight(i) * slope / count;
        found.grad[pairs + i] += weight(i) * slope / count;
    }
    found.stats.preference_loss = found.losses.iter().sum::<f64>() / count;
    found.stats.loss = found.stats.preference_loss;
    Ok(found)
}

/// D, of so many units that count.
fn denominator(given: Option<f64>, counted: usize, weighted: bool) -> Result<f64> {
    match given {
        Some(given) => Ok(given),
        None if counted == 0 => {
            let arg = if weighted { "weights" } else { "logp" };
            Err(Error::Mask { op: OP, arg, expected: 1, got: 0 })
        }
        None => Ok(counted as f64),
    }
}

/// The loss of a pair, with its derivatives by the scores.
struct PairLoss {
    loss: f64,
    x: f64,
    y: f64,
}

/// The loss of a pair of these scores.
fn pair(options: &PreferenceOptions, x: f64, y: f64, margin: f64) -> PairLoss {
    let (beta, eps) = (options.beta, options.label_smoothing);
    let (a, b) = (beta * x, beta * y);
    let h = a - b - options.gamma - margin;
    let (ls, s) = (ln_logistic, logistic);
    // A loss of h and its derivative.
    let of_h = |loss: f64, slope: f64| PairLoss { loss, x: beta * slope, y: -beta * slope };
    match options.loss {
        Loss::Sigmoid
        | Loss::SigmoidNorm
        | Loss::Aot
        | Loss::AotUnpaired
        | Loss::SimPo
        | Loss::Cpo
        | Loss::AlphaPo => {
            of_h(-(1.0 - eps) * ls(h) - eps * ls(-h), -(1.0 - eps) * s(-h) + eps * s(h))
        }
        Loss::Robust => {
            let scale = 1.0 - 2.0 * eps;
            of_h(
                (-(1.0 - eps) * ls(h) + eps * ls(-h)) / scale,
                (-(1.0 - eps) * s(-h) - eps * s(h)) / scale,
            )
        }
        Loss::Hinge => of_h((1.0 - h).max(0.0), if h < 1.0 { -1.0 } else { 0.0 }),
        Loss::Ipo => {
            let off = (x - y) - 1.0 / (2.0 * beta);
            PairLoss { loss: off * off, x: 2.0 * off, y: -2.0 * off }
        }
        Loss::ExoPair => {
            let (right, wrong) = ((1.0 - eps).ln(), eps.ln());
            of_h(
                s(h) * (ls(h) - right) + s(-h) * (ls(-h) - wrong),
                s(h) * s(-h) * (h - right + wrong),
            )
        }
        Loss::NcaPair => PairLoss {
            loss: -ls(a) - 0.5 * ls(-a) - 0.5 * ls(-b),
            x: beta * (-s(-a) + 0.5 * s(a)),
            y: beta * 0.5 * s(b),
        },
        Loss::BcoPair => PairLoss { loss: -ls(a) - ls(-b), x: -beta * s(-a), y: beta * s(b) },
        Loss::SppoHard => {
            let half = 1.0 / (2.0 * beta);
            PairLoss {
                loss: (x - half).powi(2) + (y + half).powi(2),
                x: 2.0 * (x - half),
                y: 2.0 * (y + half),
            }
        }
        Loss::ApoZero => {
            PairLoss { loss: 1.0 - s(a) + s(b), x: -beta * s(a) * s(-a), y: beta * s(b) * s(-b) }
        }
        Loss::ApoDown => PairLoss {
            loss: s(a) + 1.0 - s(h),
            x: beta * (s(a) * s(-a) - s(h) * s(-h)),
            y: beta * s(h) * s(-h),
        },
        Loss::Discopop => {
            let tau = options.discopop_tau;
            let g = s(h / tau);
            let slope = g * s(-h / tau) / tau;
            // e^-h g, which of -inf is inf times 0.
            let exponential = |factor: f64| if factor == 0.0 { 0.0 } else { (-h).exp() * factor };
            of_h(
                -ls(h) * (1.0 - g) + exponential(g),
                -s(-h) * (1.0 - g) + ls(h) * slope - exponential(g) + exponential(slope),
            )
        }
        Loss::Orpo => {
            let odds = x - y;
            PairLoss { loss: -beta * ls(odds), x: -beta * s(-odds), y: beta * s(-odds) }
        }
        Loss::Kto => unreachable!("has no pairs"),
    }
}

/// The loss of a labelled response by its score less kl, and its derivative.
fn kto(options: &PreferenceOptions, x: f64, desirable: bool) -> (f64, f64) {
    let a = options.beta * x;
    let slope = options.beta * logistic(a) * logistic(-a);
    match desirable {
        true => {
            let weight = options.desirable_weight;
            (weight * logistic(-a), -weight * slope)
        }
        false => {
            let weight = options.undesirable_weight;
            (weight * logistic(a), weight * slope)
        }
    }
}

fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn ln_logistic(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// ln(1 - e^x) of x up to 0.
fn ln_one_minus_exp(x: f64) -> f64 {
    if x > -std::f64::consts::LN_2 {
        (-x.exp_m1()).ln()
    } else {
        (-x.exp()).ln_1p()
    }
}

/// `values` sorted, and then brought into the order of `like`: the least is where the least of that is.
fn in_the_order_of(like: &[f64], values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let mut order: Vec<usize> = (0..like.len()).collect();
    order.sort_by(|&i, &j| like[i].total_cmp(&like[j]));
    let mut matched = vec![0.0; like.len()];
    for (value, index) in sorted.into_iter().zip(order) {
        matched[index] = value;
    }
    matched
}
