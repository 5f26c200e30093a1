//! The correction in plain f64 loops, to be checked by eye. See [`super`] for the formulas.

use super::{
    CorrectionOptions, CorrectionStats, Outside, Rejection, RejectionLevel, RejectionMetric, Sums,
    WeightLevel, OP,
};
use crate::error::Result;
use crate::kl::reference::{binary_kl, clamp};
use crate::memory::{in_space, Lengths};
use crate::pack::{BatchShape, RowRanges};

in_space!(HostF64: Inputs);

/// The weights with what goes with them.
#[derive(Debug, Clone)]
pub struct Output {
    /// Weights of the tokens.
    pub weights: Vec<f64>,
    /// 1 where unmasked and not rejected, else 0.
    pub kept: Vec<u8>,
    /// The statistics.
    pub stats: CorrectionStats,
}

/// Weights and statistics of `batch` rows of `seq_len` tokens, or with offsets, of `seq_len` tokens in all.
///
/// # Errors
/// If a length does not fit, an option is out of range, or the offsets are not those of a pack.
pub fn correction(
    inputs: &Inputs,
    batch: usize,
    seq_len: usize,
    options: &CorrectionOptions,
) -> Result<Output> {
    options.validate()?;
    let shape = BatchShape::new(batch, seq_len, inputs.offsets.is_some());
    inputs.try_map(shape, &mut Lengths(OP))?;
    let ranges = RowRanges::new(OP, seq_len, inputs.offsets)?;
    let n = inputs.old_logp.len();
    let (mut weights, mut kept, mut sums) = (vec![0.0; n], vec![0; n], Sums::none());
    for b in 0..batch {
        let is_kept = |&t: &usize| inputs.mask.is_none_or(|mask| mask[t] != 0);
        let token = |t| Token::new(t, inputs.old_logp[t], inputs.rollout_logp[t], options);
        let row: Vec<Token> = ranges.range(b).filter(is_kept).map(token).collect();
        if !row.is_empty() {
            sums = sums.merge(correct(&row, options, &mut weights, &mut kept));
        }
    }
    let factor = sums.factor(options);
    weights.iter_mut().for_each(|weight| *weight *= factor);
    Ok(Output { weights, kept, stats: sums.stats(factor) })
}

/// One unmasked token.
struct Token {
    at: usize,
    old_logp: f64,
    /// The rollout's log-probability, or the trainer's where there is none.
    rollout_logp: f64,
    is_scored: bool,
    /// Before the clamp.
    d: f64,
    clamped: f64,
}

impl Token {
    fn new(at: usize, old_logp: f64, rollout_logp: f64, options: &CorrectionOptions) -> Self {
        let is_scored = !rollout_logp.is_nan();
        let d = if is_scored { old_logp - rollout_logp } else { 0.0 };
        Self {
            at,
            old_logp,
            rollout_logp: if is_scored { rollout_logp } else { old_logp },
            is_scored,
            d,
            clamped: clamp(d, options.log_ratio_clamp).0,
        }
    }

    fn metric(&self, metric: RejectionMetric) -> f64 {
        let k = self.clamped;
        let (train, rollout) = (self.old_logp, self.rollout_logp);
        match metric {
            RejectionMetric::None => 0.0,
            RejectionMetric::Ratio => k,
            RejectionMetric::K2 => 0.5 * k * k,
            RejectionMetric::K3 => k3(k),
            RejectionMetric::ReverseK3 => k3(-k),
            RejectionMetric::BinaryKl => binary_kl(rollout, train),
            RejectionMetric::BinaryKlMax => {
                binary_kl(rollout, train).max(binary_kl(train, rollout))
            }
            RejectionMetric::TotalVariation => (train.exp() - rollout.exp()).abs(),
        }
    }
}

/// e^k - 1 - k; of k = inf the exponential is the larger one.
fn k3(k: f64) -> f64 {
    if k == f64::INFINITY {
        k
    } else {
        k.exp_m1() - k
    }
}

/// Writes the weights of a row of unmasked tokens, and adds up what there is to say of them.
fn correct(
    row: &[Token],
    options: &CorrectionOptions,
    weights: &mut [f64],
    kept: &mut [u8],
) -> Sums {
    let total: f64 = row.iter().map(|token| token.d).sum();
    let clamped_exp = |x| clamp(x, options.log_ratio_clamp).0.exp();
    let (low, high) = options.bounds();
    let rejected_row = options.rejections().iter().any(|rule| rejects_row(rule, row));
    let mut sums = Sums::none();
    let stats = &mut sums.stats;
    for token in row {
        let w = match options.level {
            WeightLevel::None => 1.0,
            WeightLevel::Token => token.clamped.exp(),
            WeightLevel::SequenceMean => clamped_exp(total / row.len() as f64),
            WeightLevel::SequenceSum => clamped_exp(total),
        };
        let has_bounds = options.level != WeightLevel::None;
        let (below, above) = (has_bounds && w < low, has_bounds && w > high);
        let bounded = match options.outside {
            Outside::Zero if below || above => 0.0,
            Outside::Truncate if below => low,
            Outside::Truncate if above => high,
            _ => w,
        };
        let rejected =
            rejected_row || options.rejections().iter().any(|rule| rejects_token(rule, token));
        let weight = if rejected { 0.0 } else { bounded };
        weights[token.at] = weight;
        kept[token.at] = u8::from(!rejected);

        match options.weighs_rows() {
            true => sums.normaliser = [bounded, 1.0],
            false => {
                sums.normaliser[0] += bounded;
                sums.normaliser[1] += 1.0;
            }
        }
        if !token.is_scored {
            stats.unscored_tokens += 1.0;
            continue;
        }
        let (k, count) = (token.clamped, |condition: bool| f64::from(u8::from(condition)));
        stats.tokens += 1.0;
        stats.rejected_tokens += count(weight == 0.0);
        stats.below_tokens += count(below);
        stats.above_tokens += count(above);
        stats.weight_sum += weight;
        stats.weight_square_sum += weight * weight;
        stats.log_ratio_sum += k;
        stats.log_ratio_abs_sum += k.abs();
        stats.k3_sum += k3(k);
        stats.ratio_square_sum += (2.0 * k).exp();
        stats.mult_prob_error_sum += k.abs().exp();
        stats.log_ppl_sum -= token.old_logp;
        stats.rollout_log_ppl_sum -= token.rollout_logp;
        stats.log_ratio_abs_max = stats.log_ratio_abs_max.max(k.abs());
        stats.k3_max = stats.k3_max.max(k3(k));
        stats.weight_max = stats.weight_max.max(weight);
        stats.weight_min = stats.weight_min.min(weight);
    }
    if stats.tokens > 0.0 {
        stats.rows = 1.0;
        stats.rejected_rows = f64::from(u8::from(stats.rejected_tokens > 0.0));
        stats.row_ratio_square_sum = clamped_exp(total).powi(2);
        stats.log_ppl_sum /= stats.tokens;
        stats.rollout_log_ppl_sum /= stats.tokens;
    }
    sums
}

/// Whether a value is out of a rule's bounds.
fn is_outside(rule: &Rejection, x: f64) -> bool {
    let (low, high) = rule.bounds();
    x < low || x > high
}

/// Whether a rule of tokens rejects one.
fn rejects_token(rule: &Rejection, token: &Token) -> bool {
    rule.metric.is_of_tokens(rule.level) && is_outside(rule, token.metric(rule.metric))
}

/// Whether a rule of rows rejects one.
fn rejects_row(rule: &Rejection, row: &[Token]) -> bool {
    if !rule.is_of_row() {
        return false;
    }
    let of_token = |token: &Token| token.metric(rule.metric);
    let sum: f64 = match rule.metric {
        // Not of the clamped ones.
        RejectionMetric::Ratio => row.iter().map(|token| token.d).sum(),
        _ => row.iter().map(of_token).sum(),
    };
    match rule.level {
        RejectionLevel::Token => false,
        RejectionLevel::SequenceMean => is_outside(rule, sum / row.len() as f64),
        RejectionLevel::SequenceSum => is_outside(rule, sum),
        RejectionLevel::SequenceMax => row.iter().any(|token| is_outside(rule, of_token(token))),
    }
}
