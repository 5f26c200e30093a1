//! The C entry points of the op.

use super::{
    cpu, cuda, AdvantageOptions, AdvantageStats, Baseline, Inputs, Outputs, Scale, Singleton,
    Sizes, TokenBaselineOptions, TokenInputs, TokenOutputs, TokenStep, OP,
};
use crate::capi::arguments::{choices, list_of, options, Memory};
use crate::capi::{self, run, On, Pass, Result};

/// Nothing is subtracted from a score.
pub const PPOK_ADVANTAGES_BASELINE_NONE: i32 = 0;
/// The mean of the group (GRPO, Dr. GRPO).
pub const PPOK_ADVANTAGES_BASELINE_GROUP: i32 = 1;
/// The mean of the others in the group (RLOO).
pub const PPOK_ADVANTAGES_BASELINE_LEAVE_ONE_OUT: i32 = 2;
/// The mean of all rows (REINFORCE).
pub const PPOK_ADVANTAGES_BASELINE_BATCH: i32 = 3;
/// The mean of the group, every row as often as it is long (OPO).
pub const PPOK_ADVANTAGES_BASELINE_LENGTH_WEIGHTED: i32 = 4;
/// The second best of the group, for the best one; all others get 0 (pass@k).
pub const PPOK_ADVANTAGES_BASELINE_RUNNER_UP: i32 = 5;

/// The difference is divided by nothing.
pub const PPOK_ADVANTAGES_SCALE_NONE: i32 = 0;
/// By the standard deviation of the group (GRPO).
pub const PPOK_ADVANTAGES_SCALE_GROUP: i32 = 1;
/// By the standard deviation of the others in the group (NeMo-RL with its leave-one-out baseline).
pub const PPOK_ADVANTAGES_SCALE_LEAVE_ONE_OUT: i32 = 2;
/// By the standard deviation of all rows (TRL's scale_rewards="batch").
pub const PPOK_ADVANTAGES_SCALE_BATCH: i32 = 3;
/// By the mean of the group (MaxRL), for scores of 0 and above.
pub const PPOK_ADVANTAGES_SCALE_MEAN: i32 = 4;
/// By the share of all rows whose score is not 0 (GPG).
pub const PPOK_ADVANTAGES_SCALE_NONZERO: i32 = 5;

/// The advantage of a row that is the only one of its group with a score is 0 (TRL, NeMo-RL, verl's
/// vectorised forms).
pub const PPOK_ADVANTAGES_SINGLETON_ZERO: i32 = 0;
/// Nothing is subtracted from its score, and no number of the group divides it (verl's loops).
pub const PPOK_ADVANTAGES_SINGLETON_KEEP: i32 = 1;

/// Options of ppok_advantages_*; the defaults are TRL's GRPO. Estimators by their baseline and scale: Dr. GRPO
/// GROUP and NONE; RLOO LEAVE_ONE_OUT and NONE; OPO LENGTH_WEIGHTED and NONE; pass@k RUNNER_UP and GROUP;
/// MaxRL GROUP and MEAN with an eps of 1e-6; GPG GROUP and NONZERO with an eps of 0; ReMax NONE and NONE with
/// `score_baselines`; REINFORCE++-baseline GROUP, NONE and SINGLETON_KEEP, then ppok_whiten_* of token_advantages.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_advantages_options {
    pub struct_size: usize,
    /// Added to the scale; finite, 0 or above; 1e-4 by default.
    pub eps: f64,
    /// The least that scores are clipped to; -INFINITY by default.
    pub score_min: f64,
    /// The most that scores are clipped to; not below `score_min`; INFINITY by default.
    pub score_max: f64,
    /// What is subtracted: `PPOK_ADVANTAGES_BASELINE_GROUP`, the default, or one of the others.
    pub baseline: i32,
    /// What is divided by: `PPOK_ADVANTAGES_SCALE_GROUP`, the default, or one of the others. One that is 0, or
    /// of too few scores to have it, divides nothing.
    pub scale: i32,
    /// What a group of one gets where the baseline is of the group: `PPOK_ADVANTAGES_SINGLETON_ZERO`, the
    /// default, or `PPOK_ADVANTAGES_SINGLETON_KEEP`.
    pub singleton: i32,
    /// What of a standard deviation `eps` is added to: `PPOK_WHITEN_EPS_IN_STD`, the default, or
    /// `PPOK_WHITEN_EPS_IN_VARIANCE`.
    pub eps_placement: i32,
    /// 1, the default: sums of squares are divided by n - 1; 0: by n.
    pub unbiased: i32,
    pub reserved: i32,
}

choices! {
    Baseline { None, Group, LeaveOneOut, Batch, LengthWeighted, RunnerUp }
    Scale { None, Group, LeaveOneOut, Batch, Mean, Nonzero }
    Singleton { Zero, Keep }
    TokenStep { Column, Unmasked }
}

options!(ppok_advantages_options, AdvantageOptions, OP, [reserved], {
    eps => eps,
    score_min => score_min,
    score_max => score_max,
    baseline => baseline,
    scale => scale,
    singleton => singleton,
    eps_placement => eps_placement,
    unbiased => unbiased,
});

/// Arguments of ppok_advantages_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_advantages_args {
    pub struct_size: usize,
    /// Rows: sequences.
    pub batch: usize,
    /// Tokens of a row, or with `offsets` of all rows, where `mask` or `token_advantages` is given.
    pub seq_len: usize,
    /// Rows of a group where those stand after each other; it divides `batch`. 0 where `groups` is given,
    /// or nothing is asked of groups.
    pub group_size: usize,
    /// Scores of the sequences, `[batch]`. Those that are NaN are left out, and their rows get 0.
    pub scores: *const f32,
    /// Ids of any values in any order, `[batch]`: rows of equal ids are a group. May be null.
    pub groups: *const i64,
    /// Lengths of the sequences, `[batch]`: the weights of the length-weighted mean; else it may be null.
    pub lengths: *const f32,
    /// Subtracted from the clipped scores before all else, `[batch]`; null stands for zeros.
    pub score_baselines: *const f32,
    /// `[batch, seq_len]`, or with `offsets` `[seq_len]`; null if nothing is masked. Looked at for
    /// `token_advantages` only.
    pub mask: *const u8,
    /// Where the rows of a pack begin, `[batch + 1]`: row b is the tokens from `offsets[b]` up to
    /// `offsets[b + 1]`; 0 first, never falling, `seq_len` last. Not checked on CUDA. Null if all rows have
    /// `seq_len` tokens.
    pub offsets: *const i64,
    pub options: *const ppok_advantages_options,
    /// Advantages of the rows, `[batch]`; written.
    pub advantages: *mut f32,
    /// The row's advantage on each of its tokens, 0 where masked, `[batch, seq_len]`, or with `offsets`
    /// `[seq_len]`; written; null if not wanted.
    pub token_advantages: *mut f32,
    /// Statistics of the scores, one, written; null if not wanted.
    pub stats: *mut AdvantageStats,
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_advantages_args {
    const OP: &'static str = OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        let Self { batch, seq_len, group_size, .. } = *self;
        let (sizes, options) =
            (Sizes { batch, seq_len, group_size }, memory.options(self.options)?);
        let shape = sizes.shape(!self.offsets.is_null());
        run!(
            (on, memory),
            [
                list_of!(self, Inputs, [scores], [groups, lengths, score_baselines, mask, offsets]),
                shape
            ],
            [list_of!(self, Outputs, [advantages], [token_advantages, stats]), shape],
            |i, o| cpu::outcome_advantages(i, sizes, &options, o),
            |stream, w| cuda::outcome_advantages(stream, i, sizes, &options, o, w),
        )
    }

    fn workspace_size(&self, _: &Memory) -> Result<usize> {
        Ok(size_of::<f64>().saturating_mul(cuda::workspace_len(self.batch)))
    }
}

/// Advantages from one score a sequence: with x_i = clip(score_i) - score_baselines_i,
///
/// ```text
/// A_i = (x_i - b_i) / (s_i + eps)
/// ```
///
/// where the options say which number of the row's group, or of all rows, b and s are. Equal scores give
/// exactly 0. An infinite score makes every row NaN that is compared with it. Where the baseline is the
/// runner-up, a group of one row is `PPOK_STATUS_OPTION`; on CUDA, by `groups`, its advantage is NaN. The
/// function for the CPU allocates a number a row for `groups` that do not ascend.
#[no_mangle]
pub unsafe extern "C" fn ppok_advantages_cpu(args: *const ppok_advantages_args) -> i32 {
    capi::cpu(args)
}

/// Tokens of one column have a baseline in common (verl's `optimal_token_baseline`).
pub const PPOK_TOKEN_STEP_COLUMN: i32 = 0;
/// Tokens with as many unmasked ones before them have a baseline in common (verl's
/// `tir_optimal_token_baseline`, for several turns).
pub const PPOK_TOKEN_STEP_UNMASKED: i32 = 1;

/// Options of ppok_optimal_token_baseline_*; the defaults are verl's.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_optimal_token_baseline_options {
    pub struct_size: usize,
    /// Added to the sum of the weights; finite, 0 or above; 1e-8 by default.
    pub eps: f64,
    /// Which tokens of a group: `PPOK_TOKEN_STEP_COLUMN`, the default, or `PPOK_TOKEN_STEP_UNMASKED`.
    pub step: i32,
    /// 1, the default: the one longest row of a group has no baseline from where the second longest ends,
    /// where it would be compared with itself; 0: it has.
    pub lone_tail: i32,
}

options!(ppok_optimal_token_baseline_options, TokenBaselineOptions, OP, [], {
    eps => eps,
    step => step,
    lone_tail => lone_tail,
});

/// Arguments of ppok_optimal_token_baseline_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_optimal_token_baseline_args {
    pub struct_size: usize,
    /// Rows: sequences.
    pub batch: usize,
    /// Tokens of a row, or with `offsets` of all rows.
    pub seq_len: usize,
    /// Rows of a group where those stand after each other; it divides `batch`. 0 where `groups` is given.
    pub group_size: usize,
    /// Rewards of the tokens, `[batch, seq_len]`, or with `offsets` `[seq_len]`, as all that has a number a
    /// token.
    pub rewards: *const f32,
    /// Log-probabilities of the tokens, `[batch, seq_len]`.
    pub logp: *const f32,
    /// Logarithms of the sums of the squared probabilities of the whole vocabulary, `[batch, seq_len]`.
    pub log_sum_sq_probs: *const f32,
    /// Ids of any values in any order, `[batch]`: rows of equal ids are a group. May be null.
    pub groups: *const i64,
    /// Importance weights, `[batch, seq_len]`, whose squares are factors of the tokens' weights; null stands for
    /// ones.
    pub weights: *const f32,
    /// `[batch, seq_len]`, 0 where masked; null if nothing is.
    pub mask: *const u8,
    /// Where the rows of a pack begin, `[batch + 1]`, as of ppok_advantages_*. Null if all rows have `seq_len`
    /// tokens.
    pub offsets: *const i64,
    pub options: *const ppok_optimal_token_baseline_options,
    /// Advantages of the tokens, `[batch, seq_len]`, 0 where masked; written.
    pub advantages: *mut f32,
    /// Sums of the rewards from each token on, `[batch, seq_len]`, 0 where masked; written; null if not wanted.
    pub returns: *mut f32,
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_optimal_token_baseline_args {
    const OP: &'static str = OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        let Self { batch, seq_len, group_size, .. } = *self;
        let (sizes, options) =
            (Sizes { batch, seq_len, group_size }, memory.options(self.options)?);
        let shape = sizes.shape(!self.offsets.is_null());
        run!(
            (on, memory),
            [
                list_of!(
                    self,
                    TokenInputs,
                    [rewards, logp, log_sum_sq_probs],
                    [groups, weights, mask, offsets]
                ),
                shape
            ],
            [list_of!(self, TokenOutputs, [advantages], [returns]), shape],
            |i, o| cpu::optimal_token_baseline(i, sizes, &options, o),
            |stream, w| cuda::optimal_token_baseline(stream, i, sizes, &options, o, w),
        )
    }

    fn workspace_size(&self, _: &Memory) -> Result<usize> {
        let tokens = Sizes { batch: self.batch, seq_len: self.seq_len, group_size: 0 }
            .shape(!self.offsets.is_null())
            .count_tokens();
        let len = cuda::token_workspace_len(self.batch, tokens);
        Ok(size_of::<f64>().saturating_mul(len))
    }
}

/// Advantages of tokens against verl's optimal token baseline. With G_it the sum of the rewards of row i from
/// token t on, and W_it that of w^2 |onehot - p|^2 up to it,
///
/// ```text
/// A_it = G_it - sum_i W_it G_it / (sum_i W_it + eps)      over the rows i of the group
/// ```
///
/// The row of a group of one has no baseline: A = G. The function for the CPU allocates two f64 a token.
#[no_mangle]
pub unsafe extern "C" fn ppok_optimal_token_baseline_cpu(
    args: *const ppok_optimal_token_baseline_args,
) -> i32 {
    capi::cpu(args)
}
