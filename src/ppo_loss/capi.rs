//! The C entry points of the op.

use std::ffi::{c_char, c_void};

use super::{
    cpu, cuda, Aggregation, ClipFractionKind, Inputs, KlAgainst, KlGradient, KlRatio, LogitsInputs,
    LogitsOutputs, LossShape, Outputs, PpoLossOptions, PpoStats, RatioGradient, RatioLevel,
    ScaleInputs, ScaleOutputs, Surrogate, TrustRegion, TrustRegionSides, OP,
};
use crate::capi::arguments::{
    choices, choose, list_of, options, with_logits, with_targets, Encoded, Memory, Raw,
};
use crate::capi::{self, run, On, Pass, Result};
use crate::cpu::{Logit, TokenId};
use crate::logprob::capi::ppok_logprob_options;
use crate::pack::BatchShape;

/// sum m L / sum m: every token counts the same.
pub const PPOK_PPO_LOSS_TOKEN_MEAN: i32 = 0;
/// The mean over rows of sum_t m L. The denominator is the number of rows with an unmasked token.
pub const PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_SUM: i32 = 1;
/// The mean over rows of the row's mean.
pub const PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_MEAN: i32 = 2;
/// sum m L / seq_len, not divided by the batch (verl's seq-mean-token-sum-norm).
pub const PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_SUM_NORM: i32 = 3;
/// sum m L / aggregation_divisor (Dr. GRPO).
pub const PPOK_PPO_LOSS_CONSTANT: i32 = 4;
/// sum m L / batch (TRL's luspo).
pub const PPOK_PPO_LOSS_BATCH_MEAN_TOKEN_SUM: i32 = 5;
/// The mean of the rows' means over all rows, those without an unmasked token too (TRL's grpo).
pub const PPOK_PPO_LOSS_BATCH_MEAN_TOKEN_MEAN: i32 = 6;
/// sum m L / (rows with an unmasked token times seq_len) (verl's seq-mean-token-sum-norm from 0.9 on).
pub const PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_SUM_NORM_ROWS: i32 = 7;

/// max(-r A, -clip(r, 1 - low, 1 + high) A), with dual clip and ratio cap (PPO, DAPO, GRPO, GSPO).
pub const PPOK_SURROGATE_CLIP: i32 = 0;
/// -r A of a row's ratio, made of log-ratios that are clipped by the sign of A (GMPO).
pub const PPOK_SURROGATE_LOG_CLIP: i32 = 1;
/// -A logp (REINFORCE, GPG, DRO).
pub const PPOK_SURROGATE_REINFORCE: i32 = 2;
/// -clip(r, 1 - low, 1 + high) A logp, the clipped ratio a constant (CISPO, DPPO).
pub const PPOK_SURROGATE_CLIPPED_WEIGHT: i32 = 3;
/// -w A logp with the constant w = exp(lambda) r^k exp(-lambda r) (VESPO).
pub const PPOK_SURROGATE_GAMMA_WEIGHT: i32 = 4;
/// -(4 / tau) sigmoid(tau (r - 1)) A (SAPO).
pub const PPOK_SURROGATE_SOFT_GATE: i32 = 5;

/// A ratio a token.
pub const PPOK_RATIO_TOKEN: i32 = 0;
/// A ratio a row: exp of the mean of its log-ratios (GSPO).
pub const PPOK_RATIO_SEQUENCE_MEAN: i32 = 1;
/// A ratio a row: exp of the sum of its log-ratios (RLOO, VESPO).
pub const PPOK_RATIO_SEQUENCE_SUM: i32 = 2;

/// The gradient of a row's ratio goes through the mean or the sum, the same to every token.
pub const PPOK_RATIO_GRADIENT_SPREAD: i32 = 0;
/// Each token gets that of its own term (GSPO-token).
pub const PPOK_RATIO_GRADIENT_OWN_TOKEN: i32 = 1;

/// All tokens have a policy term.
pub const PPOK_TRUST_REGION_NONE: i32 = 0;
/// Tokens with p - p_old within the bounds (DPPO-TV).
pub const PPOK_TRUST_REGION_TOTAL_VARIATION: i32 = 1;
/// Tokens with the KL of (p_old, 1 - p_old) from (p, 1 - p) within the bounds (DPPO-KL).
pub const PPOK_TRUST_REGION_BINARY_KL: i32 = 2;
/// Tokens with r of the token within 1 - low and 1 + high (IcePop).
pub const PPOK_TRUST_REGION_RATIO: i32 = 3;

/// The upper bound holds where A > 0, else the lower one.
pub const PPOK_TRUST_REGION_SIDES_BY_ADVANTAGE: i32 = 0;
/// Both bounds hold.
pub const PPOK_TRUST_REGION_SIDES_BOTH: i32 = 1;

/// The KL term is against `ref_logp`.
pub const PPOK_KL_AGAINST_REFERENCE: i32 = 0;
/// Against `old_logp` (DRO).
pub const PPOK_KL_AGAINST_OLD: i32 = 1;
/// Against `rollout_logp`.
pub const PPOK_KL_AGAINST_ROLLOUT: i32 = 2;

/// The KL term has its estimator's gradient.
pub const PPOK_KL_GRADIENT_OWN: i32 = 0;
/// Its gradient is the log-ratio, which no clamp stops.
pub const PPOK_KL_GRADIENT_REVERSE: i32 = 1;

/// The ratio is no factor of the KL term.
pub const PPOK_KL_RATIO_NONE: i32 = 0;
/// The token's ratio is a factor of its gradient (OpenRLHF).
pub const PPOK_KL_RATIO_GRADIENT: i32 = 1;
/// It is a factor of value and gradient (TRL's use_bias_correction_kl).
pub const PPOK_KL_RATIO_TERM: i32 = 2;

/// The clip fraction counts tokens whose clipped branch is the larger one (TRL, verl).
pub const PPOK_PPO_LOSS_CLIPPED_BRANCH: i32 = 0;
/// It counts tokens whose ratio is outside of the bounds (CleanRL).
pub const PPOK_PPO_LOSS_RATIO_OUTSIDE: i32 = 1;

/// Options of ppok_ppo_loss_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_ppo_loss_options {
    pub struct_size: usize,
    /// The ratio is clipped from below at 1 - this, and from above at 1 + this unless
    /// `clip_range_high` is given; 0 or above, infinity for no clip, 0.2 by default. Of
    /// `PPOK_SURROGATE_LOG_CLIP` the bounds of the log-ratio.
    pub clip_range: f64,
    /// The ratio is clipped from above at 1 + this; 0 or above, or `PPOK_NONE`, which is the default. Of
    /// `PPOK_SURROGATE_CLIPPED_WEIGHT` it may be below 0.
    pub clip_range_high: f64,
    /// Bounds the policy term at -c A where A < 0; above 1 (3 in verl), or `PPOK_NONE`, which is the
    /// default.
    pub dual_clip: f64,
    /// Clamps the log-ratio to plus or minus this; above 0, or `PPOK_NONE`. 20 by default.
    pub log_ratio_clamp: f64,
    /// Clips the values to the old values plus or minus this; 0 or above, or `PPOK_NONE`, which is
    /// needed without `old_values`. 0.2 by default.
    pub value_clip_range: f64,
    /// Factor of the value term; 0.1 by default.
    pub value_coef: f64,
    /// Factor of the entropy, subtracted; 0 by default.
    pub entropy_coef: f64,
    /// Factor of the KL term; 0 by default.
    pub kl_coef: f64,
    /// The clamp of the log-ratio, as in `ppok_kl_token_options`; above 0, or `PPOK_NONE`. 20 by default.
    pub kl_log_ratio_clamp: f64,
    /// The clamp of the estimate, as in `ppok_kl_token_options`; `PPOK_NONE` by default.
    pub kl_output_clamp: f64,
    /// The divisor of `PPOK_PPO_LOSS_CONSTANT`, above 0; not looked at with others.
    pub aggregation_divisor: f64,
    /// Replaces the denominator of the aggregation, above 0, for gradient accumulation and data
    /// parallelism; not with `PPOK_PPO_LOSS_CONSTANT`. `PPOK_NONE` by default.
    pub denominator: f64,
    /// Bounds the ratio from above in the unclipped branch of `PPOK_SURROGATE_CLIP` (TRL's delta); above
    /// 0, or `PPOK_NONE`, which is the default.
    pub ratio_cap: f64,
    /// tau of `PPOK_SURROGATE_SOFT_GATE` where A > 0; above 0, 1 by default.
    pub soft_gate_tau_pos: f64,
    /// tau of `PPOK_SURROGATE_SOFT_GATE` elsewhere; above 0, 1.05 by default.
    pub soft_gate_tau_neg: f64,
    /// k of `PPOK_SURROGATE_GAMMA_WEIGHT` where A >= 0; 0 or above, 2 by default.
    pub gamma_k_pos: f64,
    /// lambda of `PPOK_SURROGATE_GAMMA_WEIGHT` where A >= 0; 0 or above, 3 by default.
    pub gamma_lambda_pos: f64,
    /// k of `PPOK_SURROGATE_GAMMA_WEIGHT` where A < 0; 0 or above, 3 by default.
    pub gamma_k_neg: f64,
    /// lambda of `PPOK_SURROGATE_GAMMA_WEIGHT` where A < 0; 0 or above, 2 by default.
    pub gamma_lambda_neg: f64,
    /// The lower bound of the trust region; 0 or above, 0.2 by default.
    pub trust_region_low: f64,
    /// The upper bound of the trust region; 0 or above, 0.2 by default.
    pub trust_region_high: f64,
    /// Drops the policy term of tokens with A < 0 in rows whose mean of rollout_logp - logp is above this;
    /// without `rollout_logp` `old_logp` is taken. `PPOK_NONE` by default.
    pub off_policy_threshold: f64,
    /// Bounds the ratio as a factor of the KL term from above; above 0, or `PPOK_NONE`, which is the
    /// default.
    pub kl_ratio_cap: f64,
    /// `PPOK_PPO_LOSS_TOKEN_MEAN`, the default, to `PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_SUM_NORM_ROWS`.
    pub aggregation: i32,
    /// `PPOK_PPO_LOSS_CLIPPED_BRANCH`, the default, or `PPOK_PPO_LOSS_RATIO_OUTSIDE`.
    pub clip_fraction: i32,
    /// `PPOK_KL_K3`, the default, or another of `PPOK_KL_K1` to `PPOK_KL_K3_STRAIGHT_THROUGH`.
    pub kl_estimator: i32,
    /// `PPOK_SURROGATE_CLIP`, the default, to `PPOK_SURROGATE_SOFT_GATE`.
    pub surrogate: i32,
    /// `PPOK_RATIO_TOKEN`, the default, `PPOK_RATIO_SEQUENCE_MEAN` or `PPOK_RATIO_SEQUENCE_SUM`.
    pub ratio: i32,
    /// `PPOK_RATIO_GRADIENT_SPREAD`, the default, or `PPOK_RATIO_GRADIENT_OWN_TOKEN`.
    pub ratio_gradient: i32,
    /// `PPOK_TRUST_REGION_NONE`, the default, to `PPOK_TRUST_REGION_RATIO`.
    pub trust_region: i32,
    /// `PPOK_TRUST_REGION_SIDES_BY_ADVANTAGE`, the default, or `PPOK_TRUST_REGION_SIDES_BOTH`.
    pub trust_region_sides: i32,
    /// `PPOK_KL_AGAINST_REFERENCE`, the default, to `PPOK_KL_AGAINST_ROLLOUT`.
    pub kl_against: i32,
    /// `PPOK_KL_GRADIENT_OWN`, the default, or `PPOK_KL_GRADIENT_REVERSE`.
    pub kl_gradient: i32,
    /// `PPOK_KL_RATIO_NONE`, the default, to `PPOK_KL_RATIO_TERM`.
    pub kl_ratio: i32,
    /// Whether `weights` are a factor of the KL term too (DRO); 0 by default, or 1.
    pub kl_weighted: i32,
    /// Whether the entropy bonus is the mean over the unmasked tokens, whatever `aggregation` and `denominator`
    /// are; 0 by default, or 1, and so are the next three.
    pub entropy_own_mean: i32,
    /// Whether `advantages` are `[batch]`, one for all tokens of a row.
    pub advantages_per_row: i32,
    /// Whether `weights` are `[batch]`, one for all tokens of a row.
    pub weights_per_row: i32,
    /// Whether the statistics have the extremes over rows of the clip fractions, which takes another look at
    /// the tokens.
    pub row_extremes: i32,
}

choices! {
    ClipFractionKind { ClippedBranch, RatioOutside }
    Surrogate { Clip, LogClip, Reinforce, ClippedWeight, GammaWeight, SoftGate }
    RatioLevel { Token, SequenceMean, SequenceSum }
    RatioGradient { Spread, OwnToken }
    TrustRegion { None, TotalVariation, BinaryKl, Ratio }
    TrustRegionSides { ByAdvantage, Both }
    KlAgainst { Reference, Old, Rollout }
    KlGradient { Own, Reverse }
    KlRatio { None, Gradient, Term }
}

impl Encoded for Aggregation {
    type Code = (i32, f64);

    fn encode(self) -> (i32, f64) {
        match self {
            Aggregation::TokenMean => (PPOK_PPO_LOSS_TOKEN_MEAN, 0.0),
            Aggregation::SeqMeanTokenSum => (PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_SUM, 0.0),
            Aggregation::SeqMeanTokenMean => (PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_MEAN, 0.0),
            Aggregation::SeqMeanTokenSumNorm => (PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_SUM_NORM, 0.0),
            Aggregation::Constant(divisor) => (PPOK_PPO_LOSS_CONSTANT, divisor),
            Aggregation::BatchMeanTokenSum => (PPOK_PPO_LOSS_BATCH_MEAN_TOKEN_SUM, 0.0),
            Aggregation::BatchMeanTokenMean => (PPOK_PPO_LOSS_BATCH_MEAN_TOKEN_MEAN, 0.0),
            Aggregation::SeqMeanTokenSumNormRows => {
                (PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_SUM_NORM_ROWS, 0.0)
            }
        }
    }

    fn decode(op: &'static str, option: &'static str, (kind, divisor): (i32, f64)) -> Result<Self> {
        let kinds = [
            Aggregation::TokenMean,
            Aggregation::SeqMeanTokenSum,
            Aggregation::SeqMeanTokenMean,
            Aggregation::SeqMeanTokenSumNorm,
            Aggregation::Constant(divisor),
            Aggregation::BatchMeanTokenSum,
            Aggregation::BatchMeanTokenMean,
            Aggregation::SeqMeanTokenSumNormRows,
        ];
        choose(op, option, kind, &kinds)
    }
}

options!(ppok_ppo_loss_options, PpoLossOptions, OP, [], {
    clip_range => clip_range,
    clip_range_high => clip_range_high,
    dual_clip => dual_clip,
    log_ratio_clamp => log_ratio_clamp,
    value_clip_range => value_clip_range,
    value_coef => value_coef,
    entropy_coef => entropy_coef,
    kl_coef => kl_coef,
    kl_estimator => kl.estimator,
    kl_log_ratio_clamp => kl.log_ratio_clamp,
    kl_output_clamp => kl.output_clamp,
    aggregation & aggregation_divisor => aggregation,
    denominator => denominator,
    clip_fraction => clip_fraction,
    ratio_cap => ratio_cap,
    soft_gate_tau_pos => soft_gate_tau_pos,
    soft_gate_tau_neg => soft_gate_tau_neg,
    gamma_k_pos => gamma_k_pos,
    gamma_lambda_pos => gamma_lambda_pos,
    gamma_k_neg => gamma_k_neg,
    gamma_lambda_neg => gamma_lambda_neg,
    trust_region_low => trust_region_low,
    trust_region_high => trust_region_high,
    off_policy_threshold => off_policy_threshold,
    kl_ratio_cap => kl_ratio_cap,
    surrogate => surrogate,
    ratio => ratio,
    ratio_gradient => ratio_gradient,
    trust_region => trust_region,
    trust_region_sides => trust_region_sides,
    kl_against => kl_against,
    kl_gradient => kl_gradient,
    kl_ratio => kl_ratio,
    kl_weighted => kl_weighted,
    entropy_own_mean => entropy_own_mean,
    advantages_per_row => advantages_per_row,
    weights_per_row => weights_per_row,
    row_extremes => row_extremes,
});

/// Bytes of the workspace of the loss, from logits or not, by its length.
fn loss_workspace_size(
    memory: &Memory,
    options: *const ppok_ppo_loss_options,
    [batch, tokens]: [usize; 2],
    len: fn(usize, usize, &PpoLossOptions) -> usize,
) -> Result<usize> {
    let len = len(batch, tokens, &memory.options(options)?);
    Ok(size_of::<f32>().saturating_mul(len))
}

/// Arguments of ppok_ppo_loss_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_ppo_loss_args {
    pub struct_size: usize,
    /// Rows.
    pub batch: usize,
    /// Tokens of a row; with `offsets`, of all rows.
    pub seq_len: usize,
    /// Log-probabilities under the policy that is trained, which get the gradient, `[batch, seq_len]`, or with
    /// `offsets` `[seq_len]`, as are all of that shape.
    pub logp: *const f32,
    /// Log-probabilities under the policy that made the rollout, `[batch, seq_len]`.
    pub old_logp: *const f32,
    /// Advantages, already whitened if they are to be, `[batch, seq_len]`, or `[batch]` with
    /// `advantages_per_row`.
    pub advantages: *const f32,
    /// The critic's predictions, which get the gradient, `[batch, seq_len]`; null for no value term.
    pub values: *const f32,
    /// Its predictions at the time of the rollout, `[batch, seq_len]`; may be null where
    /// `value_clip_range` is `PPOK_NONE`, and is where `values` is.
    pub old_values: *const f32,
    /// The targets of the regression, `[batch, seq_len]`; null if `values` is.
    pub returns: *const f32,
    /// Entropy of the policy at each token, which gets the gradient, `[batch, seq_len]`; may be null
    /// where `entropy_coef` is 0.
    pub entropy: *const f32,
    /// Log-probabilities under the reference model, `[batch, seq_len]`; may be null where `kl_coef` is
    /// 0.
    pub ref_logp: *const f32,
    /// Log-probabilities of the rollout as its engine computed them, `[batch, seq_len]`; may be null.
    pub rollout_logp: *const f32,
    /// Factors of the policy term, `[batch, seq_len]`, or `[batch]` with `weights_per_row`, 0 or above; null if
    /// all are 1.
    pub weights: *const f32,
    /// `[batch, seq_len]`; null if nothing is masked.
    pub mask: *const u8,
    /// Where the rows of a pack begin, `[batch + 1]`: row b is the tokens from `offsets[b]` up to
    /// `offsets[b + 1]`; 0 first, never falling, `seq_len` last. Not checked on CUDA. Null if all rows have
    /// `seq_len` tokens.
    pub offsets: *const i64,
    pub options: *const ppok_ppo_loss_options,
    /// The loss and the statistics, one, written.
    pub stats: *mut PpoStats,
    /// The loss once more, one, written; null if not wanted.
    pub loss: *mut f32,
    /// Gradient with respect to `logp`, for an upstream gradient of 1, `[batch, seq_len]`, written; null
    /// if not wanted, and so are the next two.
    pub grad_logp: *mut f32,
    /// Gradient with respect to `values`, `[batch, seq_len]`; only with `values`.
    pub grad_values: *mut f32,
    /// Gradient with respect to `entropy`, `[batch, seq_len]`; only with `entropy`.
    pub grad_entropy: *mut f32,
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_ppo_loss_args {
    const OP: &'static str = OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        let (batch, seq_len) = (self.batch, self.seq_len);
        let options = memory.options(self.options)?;
        let shape = self.shape();
        let of_inputs = LossShape::new(shape, &options);
        let inputs = list_of!(
            self,
            Inputs,
            [logp, old_logp, advantages],
            [values, old_values, returns, entropy, ref_logp, rollout_logp, weights, mask, offsets]
        );
        let outputs =
            list_of!(self, Outputs, [stats], [loss, grad_logp, grad_values, grad_entropy]);
        run!(
            (on, memory),
            [inputs, of_inputs],
            [outputs, shape],
            |i, o| cpu::ppo_loss(i, batch, seq_len, &options, o),
            |stream, w| cuda::ppo_loss(stream, i, batch, seq_len, &options, o, w),
        )
    }

    fn workspace_size(&self, memory: &Memory) -> Result<usize> {
        let sizes = [self.batch, self.shape().count_tokens()];
        loss_workspace_size(memory, self.options, sizes, cuda::workspace_len)
    }
}

impl ppok_ppo_loss_args {
    fn shape(&self) -> BatchShape {
        BatchShape::new(self.batch, self.seq_len, !self.offsets.is_null())
    }
}

/// Arguments of ppok_logits_ppo_loss_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_logits_ppo_loss_args {
    pub struct_size: usize,
    /// Rows.
    pub batch: usize,
    /// Tokens of a row; with `offsets`, of all rows.
    pub seq_len: usize,
    /// Logits of a token; above 0, and for CUDA below 2^32.
    pub vocab: usize,
    /// `PPOK_F32`, `PPOK_F16` or `PPOK_BF16`.
    pub logits_type: i32,
    /// `PPOK_U32` or `PPOK_I64`.
    pub targets_type: i32,
    /// Logits of the policy that is trained, which get the gradient, `[batch, seq_len, vocab]` of
    /// `logits_type`.
    pub logits: *const c_void,
    /// Ids of the tokens, `[batch, seq_len]` of `targets_type`; each in `0..vocab` or `ignore_index`,
    /// but for masked ones.
    pub targets: *const c_void,
    /// Log-probabilities under the policy that made the rollout, `[batch, seq_len]`.
    pub old_logp: *const f32,
    /// Advantages, already whitened if they are to be, `[batch, seq_len]`, or `[batch]` with
    /// `advantages_per_row`.
    pub advantages: *const f32,
    /// Log-probabilities under the reference model, `[batch, seq_len]`; may be null where `kl_coef` is
    /// 0.
    pub ref_logp: *const f32,
    /// Log-probabilities of the rollout as its engine computed them, `[batch, seq_len]`; may be null.
    pub rollout_logp: *const f32,
    /// Factors of the policy term, `[batch, seq_len]`, or `[batch]` with `weights_per_row`, 0 or above; null if
    /// all are 1.
    pub weights: *const f32,
    /// `[batch, seq_len]`; null if nothing is masked.
    pub mask: *const u8,
    /// Where the rows of a pack begin, `[batch + 1]`: row b is the tokens from `offsets[b]` up to
    /// `offsets[b + 1]`; 0 first, never falling, `seq_len` last. Not checked on CUDA. Null if all rows have
    /// `seq_len` tokens.
    pub offsets: *const i64,
    pub logprob_options: *const ppok_logprob_options,
    pub options: *const ppok_ppo_loss_options,
    /// Log-probabilities of the targets, `[batch, seq_len]`, written; 0 where masked.
    pub logp: *mut f32,
    /// The loss and the statistics, one, written.
    pub stats: *mut PpoStats,
    /// Gradient with respect to `logits`, for an upstream gradient of 1, `[batch, seq_len, vocab]` of
    /// `logits_type`, written; on CUDA it may be `logits`.
    pub grad_logits: *mut c_void,
    /// Entropies, `[batch, seq_len]`, written, 0 where masked; may be null where `entropy_coef` is 0.
    pub entropy: *mut f32,
    /// The loss once more, one, written; null if not wanted.
    pub loss: *mut f32,
}

impl ppok_logits_ppo_loss_args {
    fn shape(&self) -> BatchShape {
        BatchShape::new(self.batch, self.seq_len, !self.offsets.is_null())
    }

    fn typed<T: Logit, I: TokenId>(&self, memory: &mut Memory, on: On) -> Result<()> {
        let Self { batch, seq_len, vocab, .. } = *self;
        let (sizes, shape) = ([batch, seq_len, vocab], (self.shape(), vocab));
        let logprob_options = memory.options(self.logprob_options)?;
        let options = memory.options(self.options)?;
        let of_inputs = (LossShape::new(shape.0, &options), vocab);
        let inputs: LogitsInputs<Raw, T, I> = list_of!(
            self,
            LogitsInputs,
            [logits, targets, old_logp, advantages],
            [ref_logp, rollout_logp, weights, mask, offsets]
        );
        let outputs: LogitsOutputs<Raw, T> =
            list_of!(self, LogitsOutputs, [logp, stats, grad_logits], [entropy, loss]);
        run!(
            (on, memory),
            [inputs, of_inputs],
            [outputs, shape],
            |i, o| cpu::logits_ppo_loss(i, sizes, &logprob_options, &options, o),
            |stream, w| cuda::logits_ppo_loss(stream, i, sizes, &logprob_options, &options, o, w),
        )
    }
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_logits_ppo_loss_args {
    const OP: &'static str = OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        with_logits!(OP, self.logits_type, T => {
            with_targets!(OP, self.targets_type, I => self.typed::<T, I>(memory, on))
        })
    }

    fn workspace_size(&self, memory: &Memory) -> Result<usize> {
        let sizes = [self.batch, self.shape().count_tokens()];
        loss_workspace_size(memory, self.options, sizes, cuda::logits_workspace_len)
    }
}

/// Arguments of ppok_ppo_loss_scale_*. Where one of a stored and a written gradient is null, so is the
/// other.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_ppo_loss_scale_args {
    pub struct_size: usize,
    /// Elements of each gradient: `batch` times `seq_len`.
    pub tokens: usize,
    /// The gradient of whatever came of the loss, one number.
    pub upstream: *const f32,
    /// The gradient with respect to logp that ppok_ppo_loss_* left, `[tokens]`.
    pub stored_logp: *const f32,
    /// The gradient with respect to values, `[tokens]`.
    pub stored_values: *const f32,
    /// The gradient with respect to entropy, `[tokens]`.
    pub stored_entropy: *const f32,
    /// Gradient with respect to logp, `[tokens]`, written; may be `stored_logp`.
    pub grad_logp: *mut f32,
    /// Gradient with respect to values, `[tokens]`, written; may be `stored_values`.
    pub grad_values: *mut f32,
    /// Gradient with respect to entropy, `[tokens]`, written; may be `stored_entropy`.
    pub grad_entropy: *mut f32,
}

/// Takes out what is to be scaled in place.
fn take_in_place(stored: &mut Option<*const f32>, gradient: Option<*mut f32>) -> bool {
    stored.take_if(|stored| gradient == Some(stored.cast_mut())).is_some()
}

/// [`cpu::scale`], where some gradients have nothing stored but in themselves.
fn scale_on_cpu(
    inputs: cpu::ScaleInputs,
    tokens: usize,
    mut outputs: cpu::ScaleOutputs,
    in_place: [bool; 3],
) -> crate::Result<()> {
    let gradients = [&mut outputs.grad_logp, &mut outputs.grad_values, &mut outputs.grad_entropy];
    for (gradient, in_place) in gradients.into_iter().zip(in_place) {
        if let Some(gradient) = gradient.take_if(|_| in_place) {
            cpu::scale_in_place(inputs.upstream[0], gradient);
        }
    }
    cpu::scale(inputs, tokens, outputs)
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_ppo_loss_scale_args {
    const OP: &'static str = OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        let tokens = self.tokens;
        let mut inputs = list_of!(
            self,
            ScaleInputs::<Raw>,
            [upstream],
            [stored_logp, stored_values, stored_entropy]
        );
        let outputs =
            list_of!(self, ScaleOutputs::<Raw>, [], [grad_logp, grad_values, grad_entropy]);
        // Of the same memory there cannot be a slice to read and one to write.
        let mut in_place = [false; 3];
        if matches!(on, On::Cpu) {
            inputs.check_pairs(&outputs)?;
            in_place = [
                take_in_place(&mut inputs.stored_logp, outputs.grad_logp),
                take_in_place(&mut inputs.stored_values, outputs.grad_values),
                take_in_place(&mut inputs.stored_entropy, outputs.grad_entropy),
            ];
        }
        run!(
            (on, memory),
            [inputs, tokens],
            [outputs, tokens],
            |i, o| scale_on_cpu(i, tokens, o, in_place),
            |stream| cuda::scale(stream, i, tokens, o),
        )
    }
}

/// Gives options those of the loss of that name: "ppo", "dapo", "grpo", "dr_grpo", "bnpo", "luspo", "rloo",
/// "gspo", "gspo_token", "gmpo", "cispo", "dppo", "sapo", "vespo", "reinforce" or "gpg", as their papers or the
/// systems that have them do. `struct_size` is as of ppok_ppo_loss_options_init().
#[no_mangle]
pub unsafe extern "C" fn ppok_ppo_loss_options_named(
    options: *mut ppok_ppo_loss_options,
    struct_size: usize,
    name: *const c_char,
) -> i32 {
    capi::init_named(options, struct_size, name, PpoLossOptions::of)
}

/// The PPO loss: clipped surrogate, clipped value loss, entropy bonus and KL penalty, with their
/// gradients and statistics, from one pass over the tokens. With d = logp - old_logp, clamped, ratio
/// r = exp(d) and advantage A,
///
/// ```text
/// policy = max(-r A, -clip(r, 1 - low, 1 + high) A), at most -c A where A < 0 with dual clip c
/// value  = max((v - R)^2, (clip(v, v_old - e, v_old + e) - R)^2) / 2
/// loss   = agg(weights policy) + value_coef agg(value) - entropy_coef agg(entropy) + kl_coef agg(kl)
/// ```
///
/// The options have other policy terms than this clipped surrogate, ratios of whole rows, and trust
/// regions; ppok_ppo_loss_options_named() knows the losses that have names.
///
/// If no token is unmasked and no denominator is given, `PPOK_STATUS_MASK`; on CUDA the loss is NaN
/// then, and the gradients are 0. A negative weight of an unmasked token is `PPOK_STATUS_OPTION`; on CUDA
/// the loss is NaN.
#[no_mangle]
pub unsafe extern "C" fn ppok_ppo_loss_cpu(args: *const ppok_ppo_loss_args) -> i32 {
    capi::cpu(args)
}

/// The PPO loss from logits, with its statistics and the gradient of the logits, in one pass over them:
/// what ppok_logprob_forward_cpu(), ppok_ppo_loss_cpu() without values and ppok_logprob_backward_cpu()
/// do one after the other. Where an option looks at a whole row (`ratio`, `off_policy_threshold`), the logits
/// are read twice. Logits of masked tokens are not looked at. The gradient is for an upstream gradient of 1.
#[no_mangle]
pub unsafe extern "C" fn ppok_logits_ppo_loss_cpu(args: *const ppok_logits_ppo_loss_args) -> i32 {
    capi::cpu(args)
}

/// Multiplies stored gradients of ppok_ppo_loss_cpu() by the gradient of whatever came of the loss. A 0
/// stays 0, whatever that is.
#[no_mangle]
pub unsafe extern "C" fn ppok_ppo_loss_scale_cpu(args: *const ppok_ppo_loss_scale_args) -> i32 {
    capi::cpu(args)
}
