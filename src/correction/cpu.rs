//! The fused CPU implementation. Rows are shared out to threads by their tokens; a row is walked in chunks that stay in the
//! L1 cache: once for what is decided by the whole of it, if anything is, and once for its weights. Sums are
//! kept in lanes of f32 within a chunk, and in f64 beyond.

use super::{
    CorrectionOptions, CorrectionStats, Outside, RejectionArgs, RejectionLevel, RejectionMetric,
    Sums, WeightLevel, OP,
};
use crate::cpu::math::{clip, exp, select, sum_lanes, LANES};
use crate::cpu::{for_each, reduce_by, vectorise};
use crate::error::Result;
use crate::kl::cpu::{binary_kl, k3_and_slope, probability_moved};
use crate::kl::limit;
use crate::memory::{in_space, Lengths};
use crate::pack::{BatchShape, RangesMut, RowRanges};

/// Tokens of a chunk.
const CHUNK: usize = 512;

/// Tokens a thread takes at a time: some 10 us of work, far above the cost of handing it out.
const GRAIN: usize = 8 * 1024;

in_space!(Host: Inputs, Outputs);

/// Weights and statistics of `batch` rows of `seq_len` tokens, or with offsets, of `seq_len` tokens in all.
///
/// # Errors
/// If a length does not fit, an option is out of range, or the offsets are not those of a
/// [pack](crate::pack). Nothing is written then.
pub fn correction(
    inputs: Inputs,
    batch: usize,
    seq_len: usize,
    options: &CorrectionOptions,
    mut outputs: Outputs,
) -> Result<()> {
    options.validate()?;
    let shape = BatchShape::new(batch, seq_len, inputs.offsets.is_some());
    inputs.try_map(shape, &mut Lengths(OP))?;
    outputs.try_map(shape, &mut Lengths(OP))?;
    let ranges = RowRanges::new(OP, seq_len, inputs.offsets)?;

    let rule = Rule::new(options);
    let Outputs { weights, stats, kept } = outputs;
    let items =
        (RangesMut::new(&mut *weights, ranges), kept.map(|kept| RangesMut::new(kept, ranges)));
    // Rows of nothing need no walk, however many there are.
    let batch = if seq_len == 0 { 0 } else { batch };
    let leaf = |first, count, (mut weights, mut kept): Items| {
        let mut sums = Sums::none();
        for i in 0..count {
            let range = ranges.range(first + i);
            if range.is_empty() {
                continue;
            }
            let row = Row {
                old_logp: &inputs.old_logp[range.clone()],
                rollout_logp: &inputs.rollout_logp[range.clone()],
                mask: inputs.mask.map(|mask| &mask[range]),
            };
            let kept = kept.as_mut().map(|kept| kept.row(i));
            sums = sums.merge(rule.correct(row, weights.row(i), kept));
        }
        sums
    };
    let cut = move |first, count| ranges.middle(first, count, GRAIN);
    let sums = reduce_by(batch, cut, items, leaf, Sums::merge);
    let factor = sums.factor(options);
    if factor != 1.0 {
        scale(weights, factor as f32);
    }
    stats[0] = sums.stats(factor);
    Ok(())
}

/// Rows of the outputs.
type Items<'a> = (RangesMut<'a, f32>, Option<RangesMut<'a, u8>>);

fn scale(weights: &mut [f32], factor: f32) {
    for_each(weights.len(), GRAIN, weights, |_, _, weights| {
        vectorise(
            #[inline(always)]
            || weights.iter_mut().for_each(|weight| *weight *= factor),
        );
    });
}

/// One row's inputs.
#[derive(Clone, Copy)]
struct Row<'a> {
    old_logp: &'a [f32],
    rollout_logp: &'a [f32],
    mask: Option<&'a [u8]>,
}

/// One f32 for each lane.
type Lanes = [f32; LANES];

/// A number for every token of a chunk.
type Tokens = [Lanes; CHUNK / LANES];

const ZEROS: Tokens = [[0.0; LANES]; CHUNK / LANES];

/// Tokens of a row, those that are masked made tokens of probability 1 by both engines, and filled up with such
/// to whole lanes.
struct Chunk {
    /// How many lanes' worth.
    len: usize,
    old_logp: Tokens,
    /// The trainer's, where there is none.
    rollout_logp: Tokens,
    /// Their difference, before the clamp.
    d: Tokens,
    /// 1 where unmasked, else 0.
    keep: Tokens,
    /// 1 where unmasked and with a log-probability of the rollout, else 0.
    scored: Tokens,
}

/// Sums over a row.
#[derive(Clone, Copy, Default)]
struct RowSums {
    kept: f64,
    scored: f64,
    /// The sum of the log-ratios before the clamp, exact differences: thousands of them may go into one exponential.
    d: f64,
    /// The sum over scored tokens, as the next.
    old_logp: f64,
    rollout_logp: f64,
}

impl Chunk {
    const EMPTY: Self =
        Self { len: 0, old_logp: ZEROS, rollout_logp: ZEROS, d: ZEROS, keep: ZEROS, scored: ZEROS };

    /// The tokens of a row from `first` on, which are added to its sums.
    #[inline(always)]
    fn load(&mut self, row: Row, first: usize, sums: &mut RowSums) {
        let end = row.old_logp.len().min(first + CHUNK);
        let count = end - first;
        self.len = count.div_ceil(LANES);
        let fill = |tokens: &mut Tokens, from: &[f32]| {
            tokens[self.len - 1] = [0.0; LANES];
            tokens.as_flattened_mut()[..count].copy_from_slice(&from[first..end]);
        };
        fill(&mut self.old_logp, row.old_logp);
        fill(&mut self.rollout_logp, row.rollout_logp);
        let keep = self.keep.as_flattened_mut();
        match row.mask {
            None => keep[..count].fill(1.0),
            Some(mask) => {
                for (keep, &m) in keep.iter_mut().zip(&mask[first..end]) {
                    *keep = if m != 0 { 1.0 } else { 0.0 };
                }
            }
        }
        keep[count..self.len * LANES].fill(0.0);

        let (mut kept, mut scored) = ([0.0_f32; LANES], [0.0_f32; LANES]);
        let [mut d, mut old_sum, mut rollout_sum] = [[0.0_f64; LANES]; 3];
        for j in 0..self.len {
            let (old_logp, rollout_logp) = (self.old_logp[j], self.rollout_logp[j]);
            for i in 0..LANES {
                let keep = self.keep[j][i] != 0.0;
                let is_scored = keep & !rollout_logp[i].is_nan();
                let old = select(keep, old_logp[i], 0.0);
                let rollout = select(is_scored, rollout_logp[i], old);
                self.old_logp[j][i] = old;
                self.rollout_logp[j][i] = rollout;
                // Not that of two infinities where there is one.
                self.d[j][i] = select(is_scored, old - rollout, 0.0);
                self.scored[j][i] = select(is_scored, 1.0, 0.0);
                kept[i] += self.keep[j][i];
                scored[i] += self.scored[j][i];
                let (old, rollout) = (f64::from(old), f64::from(rollout));
                d[i] += if is_scored { old - rollout } else { 0.0 };
                old_sum[i] += if is_scored { old } else { 0.0 };
                rollout_sum[i] += if is_scored { rollout } else { 0.0 };
            }
        }
        sums.kept += f64::from(sum_lanes(kept));
        sums.scored += f64::from(sum_lanes(scored));
        sums.d += sum_lanes(d);
        sums.old_logp += sum_lanes(old_sum);
        sums.rollout_logp += sum_lanes(rollout_sum);
    }

    /// The metric of every token, 0 where masked. Not in `vectorise`: a loop for each metric is.
    fn metric(&self, metric: RejectionMetric, log_ratio_limit: f32, to: &mut Tokens) {
        let limit = log_ratio_limit;
        match metric {
            RejectionMetric::None => {}
            RejectionMetric::Ratio => self.map(
                to,
                #[inline(always)]
                |_, _, d| clip(d, -limit, limit),
            ),
            RejectionMetric::K2 => self.map(
                to,
                #[inline(always)]
                |_, _, d| 0.5 * clip(d, -limit, limit) * clip(d, -limit, limit),
            ),
            RejectionMetric::K3 => self.map(
                to,
                #[inline(always)]
                |_, _, d| k3(clip(d, -limit, limit)),
            ),
            RejectionMetric::ReverseK3 => self.map(
                to,
                #[inline(always)]
                |_, _, d| k3(-clip(d, -limit, limit)),
            ),
            RejectionMetric::BinaryKl => self.map(to, binary_kl),
            RejectionMetric::BinaryKlMax => self.map(
                to,
                #[inline(always)]
                |old, rollout, d| {
                    let (a, b) = (binary_kl(old, rollout, d), binary_kl(rollout, old, -d));
                    select(b > a, b, a)
                },
            ),
            RejectionMetric::TotalVariation => self.map(
                to,
                #[inline(always)]
                |old, rollout, d| probability_moved(old, rollout, d).abs(),
            ),
        }
    }

    /// `to = f(old_logp, rollout_logp, d)`.
    #[inline(always)]
    fn map(&self, to: &mut Tokens, f: impl Fn(f32, f32, f32) -> f32) {
        vectorise(
            #[inline(always)]
            || {
                let logp = self.old_logp.iter().zip(&self.rollout_logp);
                let tokens = to.iter_mut().zip(logp.zip(&self.d));
                for (to, ((old_logp, rollout_logp), d)) in tokens.take(self.len) {
                    for i in 0..LANES {
                        to[i] = f(old_logp[i], rollout_logp[i], d[i]);
                    }
                }
            },
        );
    }
}

/// e^k - 1 - k.
#[inline(always)]
fn k3(k: f32) -> f32 {
    // Of k = inf the exponential is the larger one.
    select(k == f32::INFINITY, k, k3_and_slope(-k).0)
}

/// A metric of the tokens of a row.
#[derive(Clone, Copy)]
struct RowMetric {
    sum: f64,
    low: f32,
    high: f32,
}

impl RowMetric {
    const NONE: Self = Self { sum: 0.0, low: f32::INFINITY, high: f32::NEG_INFINITY };

    #[inline(always)]
    fn add(&mut self, chunk: &Chunk, values: &Tokens) {
        let mut sum = [0.0_f64; LANES];
        let (mut low, mut high) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
        for (values, keep) in values.iter().zip(&chunk.keep).take(chunk.len) {
            for i in 0..LANES {
                let (x, keep) = (values[i], keep[i] != 0.0);
                sum[i] += f64::from(x);
                low[i] = select(keep & (x < low[i]), x, low[i]);
                high[i] = select(keep & (x > high[i]), x, high[i]);
            }
        }
        self.sum += sum_lanes(sum);
        self.low = low.into_iter().fold(self.low, f32::min);
        self.high = high.into_iter().fold(self.high, f32::max);
    }
}

impl RejectionArgs {
    fn rejects_row(&self, metric: &RowMetric, sums: &RowSums) -> bool {
        let sum = match self.metric {
            RejectionMetric::Ratio => sums.d,
            _ => metric.sum,
        };
        let outside = |x: f64| x < f64::from(self.low) || x > f64::from(self.high);
        match self.level {
            RejectionLevel::Token => false,
            RejectionLevel::SequenceMean => outside(sum / sums.kept),
            RejectionLevel::SequenceSum => outside(sum),
            RejectionLevel::SequenceMax => metric.low < self.low || metric.high > self.high,
        }
    }
}

/// The options in f32, "off" written as infinity, so that the loops over tokens have no branch.
#[derive(Clone, Copy)]
struct Rule {
    level: WeightLevel,
    weighs_rows: bool,
    needs_rows: bool,
    log_ratio_limit: f32,
    low: f32,
    high: f32,
    truncates: bool,
    rejections: [RejectionArgs; 2],
}

impl Rule {
    /// Takes validated options.
    fn new(options: &CorrectionOptions) -> Self {
        let (low, high) = match options.level {
            WeightLevel::None => (f64::NEG_INFINITY, f64::INFINITY),
            _ => options.bounds(),
        };
        Self {
            level: options.level,
            weighs_rows: options.weighs_rows(),
            needs_rows: options.needs_rows(),
            log_ratio_limit: limit(options.log_ratio_clamp),
            low: low as f32,
            high: high as f32,
            truncates: options.outside == Outside::Truncate,
            rejections: options.rejections().map(RejectionArgs::new),
        }
    }

    /// Writes the weights of a row, and adds up what there is to say of them.
    fn correct(&self, row: Row, weights: &mut [f32], mut kept: Option<&mut [u8]>) -> Sums {
        let (mut chunk, mut values) = (Chunk::EMPTY, ZEROS);
        let mut of_row = RowSums::default();
        let chunks = (0..row.old_logp.len()).step_by(CHUNK);
        let mut rejected = false;
        if self.needs_rows {
            let mut metrics = [RowMetric::NONE; 2];
            for first in chunks.clone() {
                vectorise(
                    #[inline(always)]
                    || chunk.load(row, first, &mut of_row),
                );
                for (rejection, of_row) in self.rejections.iter().zip(&mut metrics) {
                    if rejection.metric.is_of_rows(rejection.level) {
                        chunk.metric(rejection.metric, self.log_ratio_limit, &mut values);
                        vectorise(
                            #[inline(always)]
                            || of_row.add(&chunk, &values),
                        );
                    }
                }
            }
            let pairs = self.rejections.iter().zip(&metrics);
            rejected = of_row.kept > 0.0
                && pairs.into_iter().any(|(rule, metric)| rule.rejects_row(metric, &of_row));
        }
        let limit = f64::from(self.log_ratio_limit);
        let ratio_of = |log_ratio: f64| {
            // Comparisons, so that NaN stays NaN.
            let clamped = if log_ratio < -limit { -limit } else { log_ratio };
            (if clamped > limit { limit } else { clamped }).exp()
        };
        let ratio = match self.level {
            WeightLevel::SequenceMean => ratio_of(of_row.d / of_row.kept) as f32,
            WeightLevel::SequenceSum => ratio_of(of_row.d) as f32,
            WeightLevel::Token | WeightLevel::None => 1.0,
        };

        let (mut sums, mut again) = (Sums::none(), RowSums::default());
        for first in chunks {
            vectorise(
                #[inline(always)]
                || chunk.load(row, first, &mut again),
            );
            let mut survives = chunk.keep;
            if rejected {
                survives = ZEROS;
            }
            for rejection in &self.rejections {
                if rejection.metric.is_of_tokens(rejection.level) {
                    chunk.metric(rejection.metric, self.log_ratio_limit, &mut values);
                    vectorise(
                        #[inline(always)]
                        || {
                            for j in 0..chunk.len {
                                for i in 0..LANES {
                                    let x = values[j][i];
                                    let outside = (x < rejection.low) | (x > rejection.high);
                                    survives[j][i] = select(outside, 0.0, survives[j][i]);
                                }
                            }
                        },
                    );
                }
            }
            let count = weights.len().min(first + CHUNK) - first;
            let weights = &mut weights[first..][..count];
            let kept = kept.as_mut().map(|kept| &mut kept[first..][..count]);
            let of_chunk = vectorise(
                #[inline(always)]
                || self.weigh(&chunk, &survives, ratio, &mut values),
            );
            weights.copy_from_slice(&values.as_flattened()[..count]);
            if let Some(kept) = kept {
                for (kept, &survives) in kept.iter_mut().zip(survives.as_flattened()) {
                    *kept = u8::from(survives != 0.0);
                }
            }
            sums = sums.merge(of_chunk);
        }
        let stats = &mut sums.stats;
        if self.weighs_rows {
            // The weight of any of its tokens before rejections.
            let bounded = f64::from(self.bounded(ratio).0);
            sums.normaliser = if again.kept > 0.0 { [bounded, 1.0] } else { [0.0; 2] };
        }
        stats.tokens = again.scored;
        stats.unscored_tokens = again.kept - again.scored;
        if again.scored > 0.0 {
            stats.rows = 1.0;
            stats.rejected_rows = if stats.rejected_tokens > 0.0 { 1.0 } else { 0.0 };
            stats.row_ratio_square_sum = ratio_of(again.d).powi(2);
            stats.log_ppl_sum = -again.old_logp / again.scored;
            stats.rollout_log_ppl_sum = -again.rollout_logp / again.scored;
        }
        sums
    }

    /// A weight within its bounds, and on which side it was outside.
    #[inline(always)]
    fn bounded(self, w: f32) -> (f32, bool, bool) {
        let (below, above) = (w < self.low, w > self.high);
        let truncated = clip(w, self.low, self.high);
        (select(self.truncates | !(below | above), truncated, 0.0), below, above)
    }

    /// The weights of a chunk, of which `ratio` is that of the row, and what they add up to.
    #[inline(always)]
    fn weigh(self, chunk: &Chunk, survives: &Tokens, ratio: f32, weights: &mut Tokens) -> Sums {
        const ZERO: Lanes = [0.0; LANES];
        let of_token = self.level == WeightLevel::Token;
        let [mut rejected, mut below, mut above] = [ZERO; 3];
        let [mut sum, mut before] = [ZERO; 2];
        let [mut d_sum, mut d_abs, mut k3_sum, mut error] = [ZERO; 4];
        // Squares of what f32 holds, and without a clamp only just.
        let [mut squares, mut r_squares] = [[0.0_f64; LANES]; 2];
        let [mut d_max, mut k3_max, mut most] = [ZERO; 3];
        let mut least = [f32::INFINITY; LANES];
        let limit = self.log_ratio_limit;
        for j in 0..chunk.len {
            for i in 0..LANES {
                let (keep, scored) = (chunk.keep[j][i] != 0.0, chunk.scored[j][i]);
                let counts = scored != 0.0;
                let d = clip(chunk.d[j][i], -limit, limit);
                let r = exp(d);
                let (bounded, is_below, is_above) = self.bounded(select(of_token, r, ratio));
                let weight = select(survives[j][i] != 0.0, bounded, 0.0);
                weights[j][i] = weight;
                before[i] += select(keep, bounded, 0.0);

                let counted = select(counts, weight, 0.0);
                sum[i] += counted;
                squares[i] += f64::from(counted) * f64::from(counted);
                rejected[i] += select(weight == 0.0, scored, 0.0);
                below[i] += select(is_below, scored, 0.0);
                above[i] += select(is_above, scored, 0.0);
                most[i] = select(counts & (weight > most[i]), weight, most[i]);
                least[i] = select(counts & (weight < least[i]), weight, least[i]);
                // Where not scored d is 0, and of these only the powers are not.
                let k3 = k3(d);
                d_sum[i] += d;
                d_abs[i] += d.abs();
                k3_sum[i] += k3;
                d_max[i] = select(d.abs() > d_max[i], d.abs(), d_max[i]);
                k3_max[i] = select(k3 > k3_max[i], k3, k3_max[i]);
                let counted = f64::from(select(counts, r, 0.0));
                r_squares[i] += counted * counted;
                error[i] += select(counts, select(d < 0.0, 1.0 / r, r), 0.0);
            }
        }
        let total = |lanes: Lanes| f64::from(sum_lanes(lanes));
        let largest = |lanes: Lanes| f64::from(lanes.into_iter().fold(0.0, f32::max));
        let kept: f64 = chunk.keep[..chunk.len].iter().map(|&keep| total(keep)).sum();
        Sums {
            stats: CorrectionStats {
                rejected_tokens: total(rejected),
                below_tokens: total(below),
                above_tokens: total(above),
                weight_sum: total(sum),
                weight_square_sum: sum_lanes(squares),
                log_ratio_sum: total(d_sum),
                log_ratio_abs_sum: total(d_abs),
                k3_sum: total(k3_sum),
                ratio_square_sum: sum_lanes(r_squares),
                mult_prob_error_sum: total(error),
                log_ratio_abs_max: largest(d_max),
                k3_max: largest(k3_max),
                weight_max: largest(most),
                weight_min: f64::from(least.into_iter().fold(f32::INFINITY, f32::min)),
                ..CorrectionStats::none()
            },
            normaliser: [total(before), kept],
        }
    }
}
