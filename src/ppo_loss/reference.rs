//! The loss in plain f64 loops, to be checked by eye. See [`super`] for the formulas.

use super::{
    Aggregation, ClipFractionKind, KlAgainst, KlGradient, KlRatio, LossShape, PpoLossOptions,
    PpoStats, RatioLevel, Surrogate, TrustRegion, TrustRegionSides, OP,
};
use crate::error::Result;
use crate::kl::reference::{binary_kl, clamp, token as token_kl};
use crate::kl::{KlEstimator, KlOptions};
use crate::memory::{in_space, Lengths};
use crate::pack::{BatchShape, RowRanges};

in_space!(HostF64: Inputs);

const K3: KlOptions =
    KlOptions { estimator: KlEstimator::K3, log_ratio_clamp: None, output_clamp: None };

/// The loss with its gradients, for an upstream gradient of 1.
#[derive(Debug, Clone)]
pub struct Output {
    /// The loss and the statistics.
    pub stats: PpoStats,
    /// The gradient with respect to logp.
    pub grad_logp: Vec<f64>,
    /// The gradient with respect to values; empty without them.
    pub grad_values: Vec<f64>,
    /// The gradient with respect to entropy; empty without it.
    pub grad_entropy: Vec<f64>,
}

/// Loss, statistics and gradients of `batch` rows of `seq_len` tokens, or with offsets, of `seq_len` tokens in
/// all.
///
/// # Errors
/// If a length does not fit, an option is out of range, an input is missing that another one or an
/// option needs, the offsets are not those of a pack, or no token is unmasked and the denominator is not given.
pub fn ppo_loss(
    inputs: &Inputs,
    batch: usize,
    seq_len: usize,
    options: &PpoLossOptions,
) -> Result<Output> {
    options.validate()?;
    let shape = BatchShape::new(batch, seq_len, inputs.offsets.is_some());
    inputs.try_map(LossShape::new(shape, options), &mut Lengths(OP))?;
    inputs.check_given(options)?;
    let n = inputs.logp.len();
    let ranges = RowRanges::new(OP, seq_len, inputs.offsets)?;
    let of_tokens = |x: &[f64], per_row: bool| match per_row {
        true => (0..batch).flat_map(|b| vec![x[b]; ranges.range(b).len()]).collect(),
        false => x.to_vec(),
    };
    let advantages: Vec<f64> = of_tokens(inputs.advantages, options.advantages_per_row);
    let given = inputs.weights.map(|weights| of_tokens(weights, options.weights_per_row));
    let inputs = &Inputs { advantages: &advantages, weights: given.as_deref(), ..*inputs };
    let aggregation = weights(inputs.mask, batch, seq_len, inputs.offsets, options)?;
    let has_value = inputs.values.is_some();
    let has_kl = match options.kl_against {
        KlAgainst::Reference => inputs.ref_logp.is_some(),
        KlAgainst::Old => true,
        KlAgainst::Rollout => inputs.rollout_logp.is_some(),
    };

    let (mut policy_loss, mut value_loss, mut entropy_loss, mut kl_loss) = (0.0, 0.0, 0.0, 0.0);
    let mut seen = Seen::default();
    let (mut high_row_max, mut low_row_min) = (f64::NAN, f64::NAN);
    let kept_tokens = (0..n).filter(|&t| keeps(inputs.mask, t)).count();
    let mut grad_logp = vec![0.0; n];
    let mut grad_values = vec![0.0; inputs.values.map_or(0, |_| n)];
    let mut grad_entropy = vec![0.0; inputs.entropy.map_or(0, |_| n)];
    for b in 0..batch {
        let kept = |&t: &usize| keeps(inputs.mask, t);
        let tokens: Vec<usize> = ranges.range(b).filter(kept).collect();
        let row = Row::new(inputs, &tokens, options);
        let (mut clipped_high, mut clipped_low) = (0.0, 0.0);
        // The sum over the row of what its ratio's logarithm changes, where all tokens share it.
        let mut shared = 0.0;
        for &t in &tokens {
            let (logp, a) = (inputs.logp[t], inputs.advantages[t]);
            let d = logp - inputs.old_logp[t];
            let term = policy_term(row.log_ratio.unwrap_or(d), logp, a, options);
            let outside = !inside_trust_region(logp, inputs.old_logp[t], a, options);
            let off_policy = row.off_policy && a < 0.0;
            let given = inputs.weights.map_or(1.0, |weights| weights[t]);
            let dropped = outside || off_policy || given == 0.0;
            let weight = if dropped { 0.0 } else { given * aggregation[t] };
            if weight != 0.0 {
                policy_loss += weight * term.loss;
                shared += weight * term.slope;
                grad_logp[t] = weight * term.slope;
            }

            let (d_clamped, _) = clamp(d, options.log_ratio_clamp);
            let (_, log_clipped) = log_clip(d, a, options);
            let clipped = match options.clip_fraction {
                ClipFractionKind::ClippedBranch => term.clipped || log_clipped,
                ClipFractionKind::RatioOutside => term.outside,
            };
            clipped_high += f64::from(clipped && a > 0.0);
            clipped_low += f64::from(clipped && a <= 0.0);
            seen.log_ratio.push(d_clamped);
            seen.ratio.push(term.ratio);
            seen.advantage.push(a);
            seen.clipped.push(clipped);
            seen.clipped_high.push(clipped && a > 0.0);
            seen.lower_clipped.push(term.lower_clipped);
            seen.outside.push(outside);
            seen.off_policy.push(off_policy);
        }
        if options.row_extremes && !tokens.is_empty() {
            high_row_max = f64::max(high_row_max, clipped_high / tokens.len() as f64);
            low_row_min = f64::min(low_row_min, clipped_low / tokens.len() as f64);
        }
        if options.spreads() {
            let share = match options.ratio {
                RatioLevel::SequenceMean => 1.0 / tokens.len() as f64,
                _ => 1.0,
            };
            for &t in &tokens {
                let d = inputs.logp[t] - inputs.old_logp[t];
                let (_, clipped) = log_clip(d, inputs.advantages[t], options);
                grad_logp[t] = if clipped { 0.0 } else { share * shared };
            }
        }

        for &t in &tokens {
            if has_kl {
                let (value, slope) = kl_term(inputs, t, options);
                let given = inputs.weights.filter(|_| options.kl_weighted);
                let weight = aggregation[t] * given.map_or(1.0, |weights| weights[t]);
                seen.kl.push(value);
                if weight != 0.0 && options.kl_coef != 0.0 {
                    kl_loss += weight * value;
                    grad_logp[t] += options.kl_coef * weight * slope;
                }
            }
            if let (Some(values), Some(returns)) = (inputs.values, inputs.returns) {
                let old = inputs.old_values.map_or(f64::NAN, |old_values| old_values[t]);
                let term = value_term(values[t], old, returns[t], options.value_clip_range);
                value_loss += aggregation[t] * term.loss;
                if options.value_coef != 0.0 {
                    grad_values[t] = options.value_coef * aggregation[t] * term.grad;
                }
                seen.value_clipped.push(term.clipped);
                seen.value.push(values[t]);
                seen.returns.push(returns[t]);
                seen.residual.push(returns[t] - values[t]);
            }
            if let Some(entropy) = inputs.entropy {
                let weight = match options.entropy_own_mean {
                    true => 1.0 / kept_tokens as f64,
                    false => aggregation[t],
                };
                entropy_loss += weight * entropy[t];
                grad_entropy[t] = -options.entropy_coef * weight;
                seen.entropy.push(entropy[t]);
            }
        }
    }

    // A term whose coefficient is 0 stays out, so that its NaN does.
    let mut loss = policy_loss;
    if has_value && options.value_coef != 0.0 {
        loss += options.value_coef * value_loss;
    }
    if options.entropy_coef != 0.0 {
        loss -= options.entropy_coef * entropy_loss;
    }
    if options.kl_coef != 0.0 {
        loss += options.kl_coef * kl_loss;
    }
    let k2: Vec<f64> = seen.log_ratio.iter().map(|d| d * d / 2.0).collect();
    let k3: Vec<f64> = seen.log_ratio.iter().map(|&d| token_kl(-d, &K3).0).collect();
    let extreme =
        |pick: fn(f64, f64) -> f64| seen.ratio.iter().copied().reduce(pick).unwrap_or(f64::NAN);
    let return_var = variance(&seen.returns);
    let stats = PpoStats {
        loss,
        policy_loss,
        value_loss: if has_value { value_loss } else { f64::NAN },
        clip_fraction: share(&seen.clipped),
        lower_clip_fraction: share(&seen.lower_clipped),
        clip_high_fraction: share(&seen.clipped_high),
        clip_low_fraction: share(&seen.clipped) - share(&seen.clipped_high),
        clip_high_row_max: high_row_max,
        clip_low_row_min: low_row_min,
        outside_fraction: share(&seen.outside),
        off_policy_fraction: share(&seen.off_policy),
        value_clip_fraction: share(&seen.value_clipped),
        approx_kl_k1: -mean(&seen.log_ratio),
        approx_kl_k2: mean(&k2),
        approx_kl_k3: mean(&k3),
        ratio_mean: mean(&seen.ratio),
        ratio_var: variance(&seen.ratio),
        ratio_min: extreme(f64::min),
        ratio_max: extreme(f64::max),
        entropy_mean: mean(&seen.entropy),
        kl_mean: mean(&seen.kl),
        advantage_mean: mean(&seen.advantage),
        return_mean: mean(&seen.returns),
        value_mean: mean(&seen.value),
        explained_variance: match return_var {
            0.0 => f64::NAN,
            _ => 1.0 - variance(&seen.residual) / return_var,
        },
        tokens: seen.ratio.len() as f64,
    };
    Ok(Output { stats, grad_logp, grad_values, grad_entropy })
}

/// The numbers that statistics are made of: one for every unmasked token, in order.
#[derive(Default)]
struct Seen {
    log_ratio: Vec<f64>,
    ratio: Vec<f64>,
    advantage: Vec<f64>,
    clipped: Vec<bool>,
    clipped_high: Vec<bool>,
    lower_clipped: Vec<bool>,
    outside: Vec<bool>,
    off_policy: Vec<bool>,
    kl: Vec<f64>,
    value_clipped: Vec<bool>,
    value: Vec<f64>,
    returns: Vec<f64>,
    residual: Vec<f64>,
    entropy: Vec<f64>,
}

/// NaN of nothing, and so are the next two.
fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

fn variance(x: &[f64]) -> f64 {
    let m = mean(x);
    x.iter().map(|x| (x - m).powi(2)).sum::<f64>() / x.len() as f64
}

fn share(x: &[bool]) -> f64 {
    x.iter().filter(|&&x| x).count() as f64 / x.len() as f64
}

/// The weight of each token's terms in their sum: the aggregation is this
/// weighted sum, and these are its gradients. 0 where masked.
///
/// # Errors
/// If no token is unmasked and the denominator is not given, or the offsets are not those of a pack.
///
/// # Panics
/// If the mask is shorter than there are tokens.
pub fn weights(
    mask: Option<&[u8]>,
    batch: usize,
    seq_len: usize,
    offsets: Option<&[i64]>,
    options: &PpoLossOptions,
) -> Result<Vec<f64>> {
    let ranges = RowRanges::new(OP, seq_len, offsets)?;
    let row = |b: usize| ranges.range(b);
    let lengths = (0..batch).map(|b| row(b).filter(|&t| keeps(mask, t)).count());
    let lengths: Vec<usize> = lengths.collect();
    let tokens = lengths.iter().sum();
    let rows = lengths.iter().filter(|&&length| length > 0).count();
    let divisor = options.divisor(tokens, rows, [batch, ranges.longest(batch)])?;

    let mut weights = vec![0.0; ranges.start(batch)];
    for (b, &length) in lengths.iter().enumerate() {
        let row_weight = match options.aggregation {
            Aggregation::SeqMeanTokenMean | Aggregation::BatchMeanTokenMean => 1.0 / length as f64,
            _ => 1.0,
        };
        for t in row(b).filter(|&t| keeps(mask, t)) {
            weights[t] = row_weight / divisor;
        }
    }
    Ok(weights)
}

/// The numbers that the unmasked tokens of a row share.
struct Row {
    /// The logarithm of the row's ratio; `None` where each token has its own.
    log_ratio: Option<f64>,
    off_policy: bool,
}

impl Row {
    fn new(inputs: &Inputs, tokens: &[usize], options: &PpoLossOptions) -> Self {
        let (mut sum, mut excess) = (0.0, 0.0);
        for &t in tokens {
            let (logp, old_logp) = (inputs.logp[t], inputs.old_logp[t]);
            sum += log_clip(logp - old_logp, inputs.advantages[t], options).0;
            let rollout = inputs.rollout_logp.map_or(old_logp, |rollout_logp| rollout_logp[t]);
            excess += if rollout.is_nan() { 0.0 } else { rollout - logp };
        }
        let len = tokens.len() as f64;
        Self {
            log_ratio: match options.ratio {
                RatioLevel::Token => None,
                RatioLevel::SequenceMean => Some(sum / len),
                RatioLevel::SequenceSum => Some(sum),
            },
            off_policy: options.off_policy_threshold.is_some_and(|limit| excess / len > limit),
        }
    }
}

/// The log-ratio of a token as the mean or sum over its row has it, and whether it is clipped.
fn log_clip(d: f64, a: f64, options: &PpoLossOptions) -> (f64, bool) {
    let (low, high) = options.ratio_bounds();
    match options.surrogate {
        Surrogate::LogClip if a > 0.0 && d > high => (high, true),
        Surrogate::LogClip if a <= 0.0 && d < low => (low, true),
        _ => (d, false),
    }
}

/// The policy term of one token, and what the statistics need of it.
struct PolicyTerm {
    loss: f64,
    /// The derivative by the log-ratio, or by logp where that has a weight without gradient.
    slope: f64,
    ratio: f64,
    clipped: bool,
    outside: bool,
    lower_clipped: bool,
}

fn policy_term(log_ratio: f64, logp: f64, a: f64, options: &PpoLossOptions) -> PolicyTerm {
    let (log_ratio, clamped) = clamp(log_ratio, options.log_ratio_clamp);
    let ratio = log_ratio.exp();
    let (low, high) = options.ratio_bounds();
    let outside = ratio < low || ratio > high;
    let term = |loss, slope| PolicyTerm {
        loss,
        slope,
        ratio,
        outside,
        clipped: false,
        lower_clipped: false,
    };
    let of_ratio = |loss, slope| term(loss, if clamped { 0.0 } else { slope });
    let weighted = |weight: f64| term(-weight * a * logp, -weight * a);
    match options.surrogate {
        Surrogate::Clip => {
            let capped = options.ratio_cap.map_or(ratio, |cap| at_most(ratio, cap));
            let unclipped_loss = -capped * a;
            let clipped_loss = -ratio.clamp(low, high) * a;
            let clipped = clipped_loss > unclipped_loss;
            let larger = if clipped { clipped_loss } else { unclipped_loss };
            let bound = options.dual_clip.filter(|_| a < 0.0).map_or(f64::INFINITY, |c| -c * a);
            let lower_clipped = larger > bound;
            // Below the upper bound, but above the cap, the clipped branch is -r A.
            let flows = if clipped { !outside } else { capped == ratio };
            let loss = if lower_clipped { bound } else { larger };
            PolicyTerm {
                clipped,
                lower_clipped,
                ..of_ratio(loss, if flows && !lower_clipped { -ratio * a } else { 0.0 })
            }
        }
        Surrogate::LogClip => of_ratio(-ratio * a, -ratio * a),
        Surrogate::Reinforce => weighted(1.0),
        Surrogate::ClippedWeight => {
            PolicyTerm { clipped: outside, ..weighted(ratio.clamp(low, high)) }
        }
        Surrogate::GammaWeight => {
            let (k, lambda) = match a >= 0.0 {
                true => (options.gamma_k_pos, options.gamma_lambda_pos),
                false => (options.gamma_k_neg, options.gamma_lambda_neg),
            };
            let log_ratio = -at_most(-log_ratio, -1e-8_f64.ln());
            // Without λ the ratio, which may be infinite, is not wanted.
            let of_ratio = if lambda == 0.0 { 0.0 } else { lambda * log_ratio.exp() };
            weighted((lambda + k * log_ratio - of_ratio).exp())
        }
        Surrogate::SoftGate => {
            let tau = if a > 0.0 { options.soft_gate_tau_pos } else { options.soft_gate_tau_neg };
            let gate = 1.0 / (1.0 + (-tau * (ratio - 1.0)).exp());
            of_ratio(-4.0 / tau * gate * a, -4.0 * gate * (1.0 - gate) * ratio * a)
        }
    }
}

/// Whether the token has a policy term.
fn inside_trust_region(logp: f64, old_logp: f64, a: f64, options: &PpoLossOptions) -> bool {
    let (low, high) = (options.trust_region_low, options.trust_region_high);
    let d = logp - old_logp;
    // How far p is above p_old, or below, in units of the bounds' own.
    let (above, below) = match options.trust_region {
        TrustRegion::None => return true,
        TrustRegion::TotalVariation => {
            let moved = old_logp.exp() * d.exp_m1();
            (moved, -moved)
        }
        TrustRegion::BinaryKl => {
            let kl = binary_kl(old_logp, logp);
            (if d > 0.0 { kl } else { 0.0 }, if d < 0.0 { kl } else { 0.0 })
        }
        TrustRegion::Ratio => {
            let (d, _) = clamp(d, options.log_ratio_clamp);
            (d.exp_m1(), -d.exp_m1())
        }
    };
    // NaN is inside, and so reaches the loss.
    let (over, under) = (above > high, below > low);
    !match options.trust_region_sides {
        TrustRegionSides::Both => over || under,
        TrustRegionSides::ByAdvantage if a > 0.0 => over,
        TrustRegionSides::ByAdvantage => under,
    }
}

/// The KL term of one token and its derivative by logp.
fn kl_term(inputs: &Inputs, t: usize, options: &PpoLossOptions) -> (f64, f64) {
    let against = match options.kl_against {
        KlAgainst::Reference => inputs.ref_logp,
        KlAgainst::Old => Some(inputs.old_logp),
        KlAgainst::Rollout => inputs.rollout_logp,
    };
    let d = inputs.logp[t] - against.map_or(f64::NAN, |against| against[t]);
    let (value, own) = token_kl(d, &options.kl);
    let slope = match options.kl_gradient {
        KlGradient::Own => own,
        KlGradient::Reverse => d,
    };
    let (log_ratio, _) = clamp(inputs.logp[t] - inputs.old_logp[t], options.log_ratio_clamp);
    let ratio = at_most(log_ratio.exp(), options.kl_ratio_cap.unwrap_or(f64::INFINITY));
    match options.kl_ratio {
        KlRatio::None => (value, slope),
        KlRatio::Gradient => (value, ratio * slope),
        KlRatio::Term => (ratio * value, ratio * slope),
    }
}

/// `x`, or the bound if that is smaller. NaN stays NaN.
fn at_most(x: f64, bound: f64) -> f64 {
    if x > bound {
        bound
    } else {
        x
    }
}

/// The value term of one token.
struct ValueTerm {
    loss: f64,
    /// The derivative by the value.
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
