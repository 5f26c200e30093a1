//! The C entry points of the op.

use std::ffi::c_char;

use super::{
    cpu, cuda, CorrectionOptions, CorrectionStats, Inputs, Outputs, Outside, RejectionLevel,
    RejectionMetric, WeightLevel, OP,
};
use crate::capi::arguments::{choices, list_of, options, Memory};
use crate::capi::{self, run, On, Pass, Result};
use crate::pack::BatchShape;

/// A weight a token: e^d with d = old_logp - rollout_logp.
pub const PPOK_CORRECTION_LEVEL_TOKEN: i32 = 0;
/// A weight a row: the geometric mean of its tokens' e^d (AReaL).
pub const PPOK_CORRECTION_LEVEL_SEQUENCE_MEAN: i32 = 1;
/// A weight a row: the product of its tokens' e^d (TRL, verl's sequence).
pub const PPOK_CORRECTION_LEVEL_SEQUENCE_SUM: i32 = 2;
/// No weight but 1, and 0 for what is rejected.
pub const PPOK_CORRECTION_LEVEL_NONE: i32 = 3;

/// A weight outside its bounds becomes the bound.
pub const PPOK_CORRECTION_OUTSIDE_TRUNCATE: i32 = 0;
/// It becomes 0 (IcePop).
pub const PPOK_CORRECTION_OUTSIDE_ZERO: i32 = 1;

/// Nothing is rejected.
pub const PPOK_REJECTION_METRIC_NONE: i32 = 0;
/// The ratio e^d, its bounds above 0; of a row the geometric mean, the product, or the extremes.
pub const PPOK_REJECTION_METRIC_RATIO: i32 = 1;
/// d^2 / 2.
pub const PPOK_REJECTION_METRIC_K2: i32 = 2;
/// e^d - 1 - d, an estimate of KL(rollout || trainer).
pub const PPOK_REJECTION_METRIC_K3: i32 = 3;
/// e^-d - 1 + d, an estimate of KL(trainer || rollout) (AReaL).
pub const PPOK_REJECTION_METRIC_REVERSE_K3: i32 = 4;
/// The KL of (p, 1 - p) of the rollout from (q, 1 - q) of the trainer (OpenRLHF).
pub const PPOK_REJECTION_METRIC_BINARY_KL: i32 = 5;
/// The larger one of the two directions of that (AReaL).
pub const PPOK_REJECTION_METRIC_BINARY_KL_MAX: i32 = 6;
/// |p - q| (OpenRLHF).
pub const PPOK_REJECTION_METRIC_TOTAL_VARIATION: i32 = 7;

/// The token's metric; the token is rejected.
pub const PPOK_REJECTION_LEVEL_TOKEN: i32 = 0;
/// The mean over the row; the row is rejected, as in the next two.
pub const PPOK_REJECTION_LEVEL_SEQUENCE_MEAN: i32 = 1;
/// The sum over the row.
pub const PPOK_REJECTION_LEVEL_SEQUENCE_SUM: i32 = 2;
/// Every token of the row.
pub const PPOK_REJECTION_LEVEL_SEQUENCE_MAX: i32 = 3;

/// Options of ppok_correction_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_correction_options {
    pub struct_size: usize,
    /// Clamps d, its sum or its mean to plus or minus this; above 0, or `PPOK_NONE`. 20 by default.
    pub log_ratio_clamp: f64,
    /// The lower bound of the weight; 0 or above, or `PPOK_NONE`, which is the default.
    pub low: f64,
    /// The upper bound of the weight; 0 or above, or `PPOK_NONE`. 2 by default.
    pub high: f64,
    /// The lower bound of what is kept; 0 or above, or `PPOK_NONE`, which is the default, as in the next three.
    pub rejection_low: f64,
    /// The upper bound of what is kept; 0 or above, or `PPOK_NONE`.
    pub rejection_high: f64,
    /// The lower bound of the second rejection, or `PPOK_NONE`.
    pub second_rejection_low: f64,
    /// The upper bound of the second rejection, or `PPOK_NONE`.
    pub second_rejection_high: f64,
    /// `PPOK_CORRECTION_LEVEL_TOKEN`, the default, to `PPOK_CORRECTION_LEVEL_NONE`.
    pub level: i32,
    /// `PPOK_CORRECTION_OUTSIDE_TRUNCATE`, the default, or `PPOK_CORRECTION_OUTSIDE_ZERO`.
    pub outside: i32,
    /// Whether all weights are divided by the mean of those before rejections, over tokens, or of a row's
    /// weights over rows; 0 by default, or 1.
    pub normalise: i32,
    /// `PPOK_REJECTION_METRIC_NONE`, the default, to `PPOK_REJECTION_METRIC_TOTAL_VARIATION`.
    pub rejection_metric: i32,
    /// `PPOK_REJECTION_LEVEL_TOKEN`, the default, to `PPOK_REJECTION_LEVEL_SEQUENCE_MAX`.
    pub rejection_level: i32,
    /// `PPOK_REJECTION_METRIC_NONE`, the default, to `PPOK_REJECTION_METRIC_TOTAL_VARIATION`: what either
    /// of the two rejects is.
    pub second_rejection_metric: i32,
    /// `PPOK_REJECTION_LEVEL_TOKEN`, the default, to `PPOK_REJECTION_LEVEL_SEQUENCE_MAX`.
    pub second_rejection_level: i32,
    pub reserved: i32,
}

choices! {
    WeightLevel { Token, SequenceMean, SequenceSum, None }
    Outside { Truncate, Zero }
    RejectionMetric { None, Ratio, K2, K3, ReverseK3, BinaryKl, BinaryKlMax, TotalVariation }
    RejectionLevel { Token, SequenceMean, SequenceSum, SequenceMax }
}

options!(ppok_correction_options, CorrectionOptions, OP, [reserved], {
    log_ratio_clamp => log_ratio_clamp,
    low => low,
    high => high,
    rejection_low => rejection.low,
    rejection_high => rejection.high,
    second_rejection_low => second_rejection.low,
    second_rejection_high => second_rejection.high,
    level => level,
    outside => outside,
    normalise => normalise,
    rejection_metric => rejection.metric,
    rejection_level => rejection.level,
    second_rejection_metric => second_rejection.metric,
    second_rejection_level => second_rejection.level,
});

/// Arguments of ppok_correction_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_correction_args {
    pub struct_size: usize,
    /// Rows.
    pub batch: usize,
    /// Tokens of a row; with `offsets`, of all rows.
    pub seq_len: usize,
    /// Log-probabilities as the trainer computes them before the update, `[batch, seq_len]`, or with `offsets`
    /// `[seq_len]`, as are all of that shape.
    pub old_logp: *const f32,
    /// Log-probabilities as the rollout engine computed them, `[batch, seq_len]`; NaN where it could not.
    pub rollout_logp: *const f32,
    /// `[batch, seq_len]`; null if nothing is masked.
    pub mask: *const u8,
    /// Where the rows of a pack begin, `[batch + 1]`: row b is the tokens from `offsets[b]` up to
    /// `offsets[b + 1]`; 0 first, never falling, `seq_len` last. Not checked on CUDA. Null if all rows have
    /// `seq_len` tokens.
    pub offsets: *const i64,
    pub options: *const ppok_correction_options,
    /// Weights for ppok_ppo_loss_*, `[batch, seq_len]`, written; 0 where masked or rejected.
    pub weights: *mut f32,
    /// The statistics, one, written.
    pub stats: *mut CorrectionStats,
    /// 1 where unmasked and not rejected, else 0, `[batch, seq_len]`, written; null if not wanted.
    pub kept: *mut u8,
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_correction_args {
    const OP: &'static str = OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        let (batch, seq_len) = (self.batch, self.seq_len);
        let options = memory.options(self.options)?;
        let shape = BatchShape::new(batch, seq_len, !self.offsets.is_null());
        run!(
            (on, memory),
            [list_of!(self, Inputs, [old_logp, rollout_logp], [mask, offsets]), shape],
            [list_of!(self, Outputs, [weights, stats], [kept]), shape],
            |i, o| cpu::correction(i, batch, seq_len, &options, o),
            |stream, w| cuda::correction(stream, i, batch, seq_len, &options, o, w),
        )
    }

    fn workspace_size(&self, _: &Memory) -> Result<usize> {
        let len = cuda::workspace_len(self.batch);
        Ok(size_of::<f64>().saturating_mul(len))
    }
}

/// Gives options those of the correction of that name: "tis", "sequence_tis", "icepop", "sequence_mask" (TRL) or
/// "geometric_mask" (NeMo-RL), with the bounds that are usual. `struct_size` is as of
/// ppok_correction_options_init().
#[no_mangle]
pub unsafe extern "C" fn ppok_correction_options_named(
    options: *mut ppok_correction_options,
    struct_size: usize,
    name: *const c_char,
) -> i32 {
    capi::init_named(options, struct_size, name, CorrectionOptions::of)
}

/// Importance weights that correct for a rollout by another engine than the trainer's: with
/// d = old_logp - rollout_logp
///
/// ```text
/// w      = exp(d), exp(sum d), exp(mean d) or 1       by the level
/// weight = w where low <= w <= high, else the nearer bound or 0
/// weight = 0 where a rejection's metric, of the token or its row, is out of its bounds
/// ```
///
/// NaN in `rollout_logp` counts as d = 0. Nothing is NaN because there is no token.
#[no_mangle]
pub unsafe extern "C" fn ppok_correction_cpu(args: *const ppok_correction_args) -> i32 {
    capi::cpu(args)
}
