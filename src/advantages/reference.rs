//! Advantages in plain f64 loops: every row looks through the batch for its group.

use super::{
    AdvantageOptions, AdvantageStats, Baseline, Scale, Singleton, Sizes, TokenBaselineOptions,
    TokenStep, OP,
};
use crate::memory::in_space;
use crate::moments::Moments;
use crate::pack::RowRanges;
use crate::whiten::EpsPlacement;

in_space!(HostF64: Inputs, TokenInputs);

/// The results of [`outcome_advantages`].
#[derive(Debug, Clone)]
pub struct Advantages {
    /// `[B]`.
    pub advantages: Vec<f64>,
    /// `[B, T]`, or `[N]` of a pack; 0 where masked.
    pub token_advantages: Vec<f64>,
    /// Statistics of the scores.
    pub stats: AdvantageStats,
}

/// The advantages of a batch. Where a group has no runner-up for want of a second row, its row is NaN.
pub fn outcome_advantages(inputs: &Inputs, sizes: Sizes, options: &AdvantageOptions) -> Advantages {
    let Sizes { batch, seq_len, group_size } = sizes;
    let x: Vec<f64> = (0..batch)
        .map(|i| {
            let score = inputs.scores[i];
            let clipped = if score < options.score_min {
                options.score_min
            } else if score > options.score_max {
                options.score_max
            } else {
                score
            };
            clipped - inputs.score_baselines.map_or(0.0, |score_baselines| score_baselines[i])
        })
        .collect();
    let together = |i: usize, j: usize| match inputs.groups {
        Some(groups) => groups[i] == groups[j],
        None => group_size > 0 && i / group_size == j / group_size,
    };
    let grouped = inputs.groups.is_some() || group_size > 0;
    let has_score = |&i: &usize| !x[i].is_nan();
    let all: Vec<usize> = (0..batch).filter(has_score).collect();
    let values = |rows: &[usize]| rows.iter().map(|&i| x[i]).collect::<Vec<_>>();
    let of_batch = moments(&values(&all));
    let nonzero = all.iter().filter(|&&i| x[i] != 0.0).count() as f64 / all.len() as f64;

    let advantage = |i: usize| {
        let rows = (0..batch).filter(|&j| together(i, j)).count();
        let group: Vec<usize> = all.iter().copied().filter(|&j| together(i, j)).collect();
        let others: Vec<usize> = group.iter().copied().filter(|&j| j != i).collect();
        let of_group = moments(&values(&group));
        let mut of_others = moments(&values(&others));
        if of_group.mean.is_nan() {
            of_others.m2 = f64::NAN;
        }
        if options.baseline == Baseline::RunnerUp && rows == 1 {
            return f64::NAN;
        }
        if x[i].is_nan() {
            return 0.0;
        }
        let alone = group.len() == 1 && options.baseline.of_group();
        let difference = match options.baseline {
            // Of a score that is infinite.
            baseline if baseline.of_group() && of_group.mean.is_nan() => f64::NAN,
            _ if alone && options.singleton == Singleton::Zero => 0.0,
            _ if alone => x[i],
            Baseline::None => x[i],
            Baseline::Group => x[i] - of_group.mean,
            Baseline::LeaveOneOut => {
                x[i] - (of_group.mean * of_group.count - x[i]) / (of_group.count - 1.0)
            }
            Baseline::Batch => x[i] - of_batch.mean,
            Baseline::LengthWeighted => {
                let lengths = inputs.lengths.expect("checked");
                let total: f64 = group.iter().map(|&j| lengths[j]).sum();
                let weighted: f64 = group.iter().map(|&j| lengths[j] * x[j]).sum();
                match total {
                    0.0 => 0.0,
                    total => x[i] - weighted / total,
                }
            }
            Baseline::RunnerUp => {
                let second = values(&others).into_iter().fold(f64::NEG_INFINITY, f64::max);
                (x[i] - second).max(0.0)
            }
        };
        // Of equal scores a mean may be off by a rounding.
        let equal = |rows: &[usize]| rows.iter().all(|&j| x[j] == x[i]);
        let difference = match options.baseline {
            Baseline::Batch if equal(&all) && x[i].is_finite() => 0.0,
            baseline if baseline.of_group() && !alone && equal(&group) && x[i].is_finite() => 0.0,
            _ => difference,
        };
        let by_std = |of: Moments| match of.variance(options.unbiased) {
            _ if of.count <= f64::from(u8::from(options.unbiased)) => difference,
            0.0 => difference,
            variance => match options.eps_placement {
                EpsPlacement::Variance => difference / (variance + options.eps).sqrt(),
                EpsPlacement::Std => difference / (variance.sqrt() + options.eps),
            },
        };
        match options.scale {
            Scale::None => difference,
            Scale::Group => by_std(of_group),
            Scale::LeaveOneOut => by_std(of_others),
            Scale::Batch => by_std(of_batch),
            Scale::Mean if group.len() == 1 || of_group.mean == 0.0 => difference,
            Scale::Mean => difference / (of_group.mean + options.eps),
            Scale::Nonzero if nonzero == 0.0 => difference,
            Scale::Nonzero => difference / (nonzero + options.eps),
        }
    };
    let advantages: Vec<f64> = (0..batch).map(advantage).collect();

    let kept = |at: usize| inputs.mask.is_none_or(|mask| mask[at] != 0);
    let rows = RowRanges::new(OP, seq_len, inputs.offsets).expect("offsets");
    let token = |at: usize| if kept(at) { advantages[rows.row_of(at)] } else { 0.0 };
    let token_advantages = (0..rows.start(batch)).map(token).collect();

    // A group is told by its first row with a score.
    let leads = |&i: &usize| !all.iter().any(|&j| j < i && together(i, j));
    let leaders: Vec<usize> = all.iter().copied().filter(leads).collect();
    let group = |i: usize| all.iter().copied().filter(|&j| together(i, j)).collect::<Vec<_>>();
    let zero = leaders.iter().filter(|&&i| moments(&values(&group(i))).m2 == 0.0).count();
    let zero = zero as f64 / leaders.len() as f64;
    let stats = AdvantageStats {
        score_mean: if all.is_empty() { f64::NAN } else { of_batch.mean },
        score_std: of_batch.std(options.unbiased),
        zero_std_fraction: if grouped { zero } else { f64::NAN },
    };
    Advantages { advantages, token_advantages, stats }
}

/// Advantages against the optimal token baseline, and returns, `[B, T]`, or `[N]` of a pack; 0 where masked.
pub fn optimal_token_baseline(
    inputs: &TokenInputs,
    sizes: Sizes,
    options: &TokenBaselineOptions,
) -> [Vec<f64>; 2] {
    let Sizes { batch, seq_len, group_size } = sizes;
    let ranges = RowRanges::new(OP, seq_len, inputs.offsets).expect("offsets");
    let kept = |&at: &usize| inputs.mask.is_none_or(|mask| mask[at] != 0);
    let row = |i: usize| ranges.range(i).filter(kept).collect::<Vec<_>>();
    let rows: Vec<Vec<usize>> = (0..batch).map(row).collect();
    // Those of no token are in no group.
    let together = |i: usize, j: usize| {
        !rows[j].is_empty()
            && match inputs.groups {
                Some(groups) => groups[i] == groups[j],
                None => i / group_size == j / group_size,
            }
    };
    let step = |i: usize, nth: usize| match options.step {
        TokenStep::Column => rows[i][nth] - ranges.start(i),
        TokenStep::Unmasked => nth,
    };
    let returns =
        |i: usize, nth: usize| -> f64 { rows[i][nth..].iter().map(|&at| inputs.rewards[at]).sum() };
    let weight = |i: usize, nth: usize| -> f64 {
        let of_token = |&at: &usize| {
            let (logp, log_sum) = (inputs.logp[at], inputs.log_sum_sq_probs[at]);
            let p = logp.exp();
            let is_rounding = (-1e-5..0.0).contains(&(log_sum - 2.0 * logp));
            let others = if is_rounding { 0.0 } else { log_sum.exp() - p * p };
            ((1.0 - p).powi(2) + others) * inputs.weights.map_or(1.0, |weights| weights[at]).powi(2)
        };
        rows[i][..=nth].iter().map(of_token).sum()
    };

    let all = vec![0.0; ranges.start(batch)];
    let [mut advantages, mut all_returns] = [all.clone(), all];
    for i in 0..batch {
        let group: Vec<usize> = (0..batch).filter(|&j| together(i, j)).collect();
        let longest_other =
            group.iter().filter(|&&j| j != i).map(|&j| rows[j].len()).max().unwrap_or(0);
        for nth in 0..rows[i].len() {
            let at = step(i, nth);
            let (mut sum, mut weights) = (0.0, 0.0);
            for &j in &group {
                for other in (0..rows[j].len()).filter(|&other| step(j, other) == at) {
                    sum += weight(j, other) * returns(j, other);
                    weights += weight(j, other);
                }
            }
            // Where all others have ended: those are as many steps as they have tokens.
            let is_tail = rows[i].len() > longest_other && at >= longest_other;
            let alone = group.len() == 1 || (options.lone_tail && is_tail);
            let baseline = if alone { 0.0 } else { sum / (weights + options.eps) };
            advantages[rows[i][nth]] = returns(i, nth) - baseline;
            all_returns[rows[i][nth]] = returns(i, nth);
        }
    }
    [advantages, all_returns]
}

/// Mean and sum of squared deviations; NaN if one of the values is infinite, and exact if all are equal.
fn moments(x: &[f64]) -> Moments {
    let count = x.len() as f64;
    if x.iter().any(|x| x.is_infinite()) {
        return Moments { count, mean: f64::NAN, m2: f64::NAN };
    }
    match x {
        [] => Moments::default(),
        [first, rest @ ..] if rest.iter().all(|x| x == first) => {
            Moments { count, mean: *first, m2: 0.0 }
        }
        _ => {
            let mean = x.iter().sum::<f64>() / count;
            Moments { count, mean, m2: x.iter().map(|x| (x - mean).powi(2)).sum() }
        }
    }
}
