//! The loss in plain f64 loops, to be checked by eye. See [`super`] for the formulas.

use super::{Aggregation, ClipFractionKind, PpoLossOptions, PpoStats, OP};
use crate::error::Result;
use crate::kl::reference::token as token_kl;
use crate::kl::{KlEstimator, KlOptions};
use crate::memory::{in_space, Lengths};

in_space!(HostF64: Inputs);

const K3: KlOptions =
    KlOptions { estimator: KlEstimator::K3, log_ratio_clamp: None, output_clamp: None };

/// The loss with its gradients, for an upstream gradient of 1.
#[derive(Debug, Clone)]
pub struct Output {
    /// The loss and the statistics.
    pub stats: PpoStats,
    /// With respect to logp.
    pub grad_logp: Vec<f64>,
    /// With respect to values; empty without them.
    pub grad_values: Vec<f64>,
    /// With respect to entropy; empty without it.
    pub grad_entropy: Vec<f64>,
}

/// Loss, statistics and gradients of `batch` rows of `seq_len` tokens.
///
/// # Errors
/// If a length does not fit, an option is out of range, an input is missing that another one or an
/// option needs, or no token is unmasked and the denominator is not given.
pub fn ppo_loss(
    inputs: &Inputs,
    batch: usize,
    seq_len: usize,
    options: &PpoLossOptions,
) -> Result<Output> {
    options.validate()?;
    inputs.try_map([batch, seq_len], &mut Lengths(OP))?;
    inputs.check_given(options)?;
    let n = inputs.logp.len();
    let weights = weights(inputs.mask, batch, seq_len, options)?;
    let kept: Vec<usize> = (0..n).filter(|&t| keeps(inputs.mask, t)).collect();
    // Over the unmasked tokens: the aggregation, and the plain mean.
    let aggregate = |f: &dyn Fn(usize) -> f64| kept.iter().map(|&t| weights[t] * f(t)).sum::<f64>();
    let mean =
        |f: &dyn Fn(usize) -> f64| kept.iter().map(|&t| f(t)).sum::<f64>() / kept.len() as f64;
    let variance = |f: &dyn Fn(usize) -> f64| {
        let m = mean(f);
        mean(&|t| (f(t) - m).powi(2))
    };
    let share = |f: &dyn Fn(usize) -> bool| mean(&|t| f64::from(u8::from(f(t))));

    let policy =
        |t: usize| policy_term(inputs.logp[t] - inputs.old_logp[t], inputs.advantages[t], options);
    let kl = |t: usize| match inputs.ref_logp {
        Some(ref_logp) => token_kl(inputs.logp[t] - ref_logp[t], &options.kl),
        None => (f64::NAN, f64::NAN),
    };
    let values = |t: usize| inputs.values.map_or(f64::NAN, |values| values[t]);
    let returns = |t: usize| inputs.returns.map_or(f64::NAN, |returns| returns[t]);
    let value = |t: usize| {
        let old = inputs.old_values.map_or(f64::NAN, |old_values| old_values[t]);
        value_term(values(t), old, returns(t), options.value_clip_range)
    };
    let entropy = |t: usize| inputs.entropy.map_or(f64::NAN, |h| h[t]);

    let policy_loss = aggregate(&|t| policy(t).loss);
    let value_loss = match inputs.values {
        Some(_) => aggregate(&|t| value(t).loss),
        None => f64::NAN,
    };
    let mut loss = policy_loss;
    if inputs.values.is_some() && options.value_coef != 0.0 {
        loss += options.value_coef * value_loss;
    }
    if options.entropy_coef != 0.0 {
        loss -= options.entropy_coef * aggregate(&entropy);
    }
    if options.kl_coef != 0.0 {
        loss += options.kl_coef * aggregate(&|t| kl(t).0);
    }

    let return_var = variance(&returns);
    let residual_var = variance(&|t| returns(t) - values(t));
    let extreme = |pick: fn(f64, f64) -> f64| {
        kept.iter().map(|&t| policy(t).ratio).reduce(pick).unwrap_or(f64::NAN)
    };
    let stats = PpoStats {
        loss,
        policy_loss,
        value_loss,
        clip_fraction: share(&|t| match options.clip_fraction {
            ClipFractionKind::ClippedBranch => policy(t).clipped,
            ClipFractionKind::RatioOutside => policy(t).outside,
        }),
        lower_clip_fraction: share(&|t| policy(t).lower_clipped),
        value_clip_fraction: match inputs.values {
            Some(_) => share(&|t| value(t).clipped),
            None => f64::NAN,
        },
        approx_kl_k1: mean(&|t| -policy(t).log_ratio),
        approx_kl_k2: mean(&|t| policy(t).log_ratio.powi(2) / 2.0),
        approx_kl_k3: mean(&|t| token_kl(-policy(t).log_ratio, &K3).0),
        ratio_mean: mean(&|t| policy(t).ratio),
        ratio_var: variance(&|t| policy(t).ratio),
        ratio_min: extreme(f64::min),
        ratio_max: extreme(f64::max),
        entropy_mean: mean(&entropy),
        kl_mean: mean(&|t| kl(t).0),
        advantage_mean: mean(&|t| inputs.advantages[t]),
        return_mean: mean(&returns),
        value_mean: mean(&values),
        explained_variance: match return_var {
            0.0 => f64::NAN,
            _ => 1.0 - residual_var / return_var,
        },
        tokens: kept.len() as f64,
    };

    let mut grad_logp = vec![0.0; n];
    let mut grad_values = vec![0.0; inputs.values.map_or(0, |_| n)];
    let mut grad_entropy = vec![0.0; inputs.entropy.map_or(0, |_| n)];
    for &t in &kept {
        grad_logp[t] = weights[t] * policy(t).grad;
        if options.kl_coef != 0.0 {
            grad_logp[t] += weights[t] * options.kl_coef * kl(t).1;
        }
        if inputs.values.is_some() && options.value_coef != 0.0 {
            grad_values[t] = weights[t] * options.value_coef * value(t).grad;
        }
        if inputs.entropy.is_some() {
            grad_entropy[t] = -weights[t] * options.entropy_coef;
        }
    }
    Ok(Output { stats, grad_logp, grad_values, grad_entropy })
}

/// What each token's terms are multiplied by before they are added up, `[batch * seq_len]`: the
/// aggregation is this weighted sum, and these are its gradients. 0 where masked.
///
/// # Errors
/// If no token is unmasked and the denominator is not given.
///
/// # Panics
/// If the mask is shorter than `batch * seq_len`.
pub fn weights(
    mask: Option<&[u8]>,
    batch: usize,
    seq_len: usize,
    options: &PpoLossOptions,
) -> Result<Vec<f64>> {
    let row = |b: usize| b * seq_len..(b + 1) * seq_len;
    let lengths = (0..batch).map(|b| row(b).filter(|&t| keeps(mask, t)).count());
    let lengths: Vec<usize> = lengths.collect();
    let tokens = lengths.iter().sum();
    let rows = lengths.iter().filter(|&&length| length > 0).count();
    let divisor = options.divisor(tokens, rows, seq_len)?;

    let mut weights = vec![0.0; batch * seq_len];
    for (b, &length) in lengths.iter().enumerate() {
        let row_weight = match options.aggregation {
            Aggregation::SeqMeanTokenMean => 1.0 / length as f64,
            _ => 1.0,
        };
        for t in row(b).filter(|&t| keeps(mask, t)) {
            weights[t] = row_weight / divisor;
        }
    }
    Ok(weights)
}

/// The policy term of one token, and what the statistics need of it.
struct PolicyTerm {
    loss: f64,
    /// With respect to logp.
    grad: f64,
    log_ratio: f64,
    ratio: f64,
    clipped: bool,
    outside: bool,
    lower_clipped: bool,
}

fn policy_term(d: f64, advantage: f64, options: &PpoLossOptions) -> PolicyTerm {
    let (log_ratio, clamped) = match options.log_ratio_clamp {
        Some(limit) if d.abs() > limit => (limit.copysign(d), true),
        _ => (d, false),
    };
    let ratio = log_ratio.exp();
    let (low, high) = options.ratio_bounds();
    let unclipped_loss = -ratio * advantage;
    let clipped_loss = -ratio.clamp(low, high) * advantage;
    let clipped = clipped_loss > unclipped_loss;
    let mut loss = if clipped { clipped_loss } else { unclipped_loss };

    let mut lower_clipped = false;
    if let Some(c) = options.dual_clip.filter(|_| advantage < 0.0) {
        lower_clipped = loss > -c * advantage;
        if lower_clipped {
            loss = -c * advantage;
        }
    }

    let flows = !clipped && !lower_clipped && !clamped;
    PolicyTerm {
        loss,
        grad: if flows { unclipped_loss } else { 0.0 },
        log_ratio,
        ratio,
        clipped,
        outside: ratio < low || ratio > high,
        lower_clipped,
    }
}

/// The value term of one token.
struct ValueTerm {
    loss: f64,
    /// With respect to the value.
    grad: f64,
    clipped: bool,
}

fn value_term(value: f64, old: f64, target: f64, clip_range: Option<f64>) -> ValueTerm {
    let clipped_value = match clip_range {
        Some(range) if value < old - range => old - range,
        Some(range) if value > old + range => old + range,
        _ => value,
    };
    let unclipped_loss = 0.5 * (value - target).powi(2);
    let clipped_loss = 0.5 * (clipped_value - target).powi(2);
    let clipped = clipped_loss > unclipped_loss;
    ValueTerm {
        loss: if clipped { clipped_loss } else { unclipped_loss },
        grad: if clipped { 0.0 } else { value - target },
        clipped,
    }
}

/// Whether token `t` counts.
fn keeps(mask: Option<&[u8]>, t: usize) -> bool {
    mask.is_none_or(|mask| mask[t] != 0)
}
