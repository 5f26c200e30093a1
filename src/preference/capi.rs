//! The C entry points of the op.

use super::{
    cpu, cuda, FDivergence, Inputs, Outputs, PreferenceLoss, PreferenceOptions, PreferenceStats,
    RewardModelInputs, RewardModelOptions, RewardModelOutputs, OP,
};
use crate::capi::arguments::{choose, list_of, options, Encoded, Memory, Raw};
use crate::capi::{self, run, On, Pass, Result};
use crate::pack::BatchShape;

/// -(1 - e) ls(h) - e ls(-h): DPO, with label smoothing e cDPO.
pub const PPOK_PREFERENCE_SIGMOID: i32 = 0;
/// (-(1 - e) ls(h) + e ls(-h)) / (1 - 2 e).
pub const PPOK_PREFERENCE_ROBUST: i32 = 1;
/// max(0, 1 - h).
pub const PPOK_PREFERENCE_HINGE: i32 = 2;
/// (x - y - 1 / (2 beta))^2. TRL averages x and y.
pub const PPOK_PREFERENCE_IPO: i32 = 3;
/// `PPOK_PREFERENCE_SIGMOID`, always averaged.
pub const PPOK_PREFERENCE_SIGMOID_NORM: i32 = 4;
/// KL of (s(h), s(-h)) to (1 - e, e), e above 0.
pub const PPOK_PREFERENCE_EXO_PAIR: i32 = 5;
/// -ls(a) - (ls(-a) + ls(-b)) / 2.
pub const PPOK_PREFERENCE_NCA_PAIR: i32 = 6;
/// -ls(a) - ls(-b).
pub const PPOK_PREFERENCE_BCO_PAIR: i32 = 7;
/// (x - 1 / (2 beta))^2 + (y + 1 / (2 beta))^2.
pub const PPOK_PREFERENCE_SPPO_HARD: i32 = 8;
/// 1 - s(a) + s(b).
pub const PPOK_PREFERENCE_APO_ZERO: i32 = 9;
/// s(a) + 1 - s(h).
pub const PPOK_PREFERENCE_APO_DOWN: i32 = 10;
/// -ls(h) (1 - g) + exp(-h) g, g = s(h / discopop_tau).
pub const PPOK_PREFERENCE_DISCOPOP: i32 = 11;
/// `PPOK_PREFERENCE_SIGMOID` of the sorted log-ratios of policy and reference.
pub const PPOK_PREFERENCE_AOT: i32 = 12;
/// `PPOK_PREFERENCE_SIGMOID` of the sorted x and the sorted y.
pub const PPOK_PREFERENCE_AOT_UNPAIRED: i32 = 13;
/// `PPOK_PREFERENCE_SIGMOID` without a reference, always averaged, with margin `gamma`.
pub const PPOK_PREFERENCE_SIMPO: i32 = 14;
/// `PPOK_PREFERENCE_SIGMOID` without a reference.
pub const PPOK_PREFERENCE_CPO: i32 = 15;
/// -beta ls(o(x) - o(y)), o(t) = t - ln(1 - exp(t)), without a reference, always averaged.
pub const PPOK_PREFERENCE_ORPO: i32 = 16;
/// `PPOK_PREFERENCE_SIMPO` of (1 - exp(-alpha t)) / alpha.
pub const PPOK_PREFERENCE_ALPHAPO: i32 = 17;
/// w_d (1 - s(beta (x - kl))) where desirable, w_u (1 - s(beta (kl - x))) elsewhere.
pub const PPOK_PREFERENCE_KTO: i32 = 18;

/// The log-ratio x itself.
pub const PPOK_F_DIVERGENCE_REVERSE_KL: i32 = 0;
/// 1 - exp(-x) in its place.
pub const PPOK_F_DIVERGENCE_FORWARD_KL: i32 = 1;
/// ln 2 + ls(x).
pub const PPOK_F_DIVERGENCE_JENSEN_SHANNON: i32 = 2;
/// (exp((f_alpha - 1) x) - 1) / (f_alpha - 1).
pub const PPOK_F_DIVERGENCE_ALPHA: i32 = 3;

/// Options of ppok_preference_loss_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_preference_options {
    pub struct_size: usize,
    /// Scale of the log-ratios, above 0; 0.1 by default.
    pub beta: f64,
    /// e, the share of labels taken to be wrong, 0 to 0.5, of losses that have it; 0 by default.
    pub label_smoothing: f64,
    /// Subtracted from h, of losses that are as `PPOK_PREFERENCE_SIGMOID`; 0 by default.
    pub gamma: f64,
    /// alpha of `PPOK_PREFERENCE_ALPHAPO`; 0 by default, and for other losses.
    pub alpha: f64,
    /// Above 0; 0.05 by default.
    pub discopop_tau: f64,
    /// alpha of `PPOK_F_DIVERGENCE_ALPHA`, other than 1; not looked at with others. 0.5 by default.
    pub f_alpha: f64,
    /// Weight of tokens beyond the length of the shorter response of the pair (LD-DPO), 0 to 1, or
    /// `PPOK_NONE`, which is the default.
    pub ld_alpha: f64,
    /// w_d of `PPOK_PREFERENCE_KTO`, 0 or above; 1 by default.
    pub desirable_weight: f64,
    /// w_u of `PPOK_PREFERENCE_KTO`, 0 or above; 1 by default.
    pub undesirable_weight: f64,
    /// Factor of the mean negative log-likelihood of the chosen responses' tokens; 0 by default, and in
    /// `PPOK_PREFERENCE_KTO`.
    pub sft_coef: f64,
    /// Replaces the number of pairs, or in `PPOK_PREFERENCE_KTO` of responses, above 0, for gradient
    /// accumulation and data parallelism. `PPOK_NONE` by default.
    pub denominator: f64,
    /// Replaces the number of tokens of the chosen responses likewise. `PPOK_NONE` by default.
    pub sft_denominator: f64,
    /// `PPOK_PREFERENCE_SIGMOID`, the default, to `PPOK_PREFERENCE_KTO`.
    pub loss: i32,
    /// `PPOK_F_DIVERGENCE_REVERSE_KL`, the default, to `PPOK_F_DIVERGENCE_ALPHA`, the latter three for
    /// losses of h alone that have a reference and do not sort.
    pub f_divergence: i32,
    /// 1: sums are divided by lengths; 0, the default: in losses that always do.
    pub average_log_prob: i32,
    pub reserved: i32,
}

impl Encoded for PreferenceLoss {
    type Code = i32;

    fn encode(self) -> i32 {
        self as i32
    }

    fn decode(op: &'static str, option: &'static str, number: i32) -> Result<Self> {
        choose(op, option, number, &Self::ALL)
    }
}

impl Encoded for FDivergence {
    type Code = (i32, f64);

    fn encode(self) -> (i32, f64) {
        const ALPHA: f64 = 0.5;
        match self {
            FDivergence::ReverseKl => (PPOK_F_DIVERGENCE_REVERSE_KL, ALPHA),
            FDivergence::ForwardKl => (PPOK_F_DIVERGENCE_FORWARD_KL, ALPHA),
            FDivergence::JensenShannon => (PPOK_F_DIVERGENCE_JENSEN_SHANNON, ALPHA),
            FDivergence::Alpha(alpha) => (PPOK_F_DIVERGENCE_ALPHA, alpha),
        }
    }

    fn decode(op: &'static str, option: &'static str, (kind, alpha): (i32, f64)) -> Result<Self> {
        let kinds = [
            FDivergence::ReverseKl,
            FDivergence::ForwardKl,
            FDivergence::JensenShannon,
            FDivergence::Alpha(alpha),
        ];
        choose(op, option, kind, &kinds)
    }
}

options!(ppok_preference_options, PreferenceOptions, OP, [reserved], {
    beta => beta,
    label_smoothing => label_smoothing,
    gamma => gamma,
    alpha => alpha,
    discopop_tau => discopop_tau,
    f_divergence & f_alpha => f_divergence,
    ld_alpha => ld_alpha,
    desirable_weight => desirable_weight,
    undesirable_weight => undesirable_weight,
    sft_coef => sft_coef,
    denominator => denominator,
    sft_denominator => sft_denominator,
    loss => loss,
    average_log_prob => average_log_prob,
});

/// Options of ppok_reward_model_loss_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_reward_model_options {
    pub struct_size: usize,
    /// Factor of (chosen + rejected)^2, 0 or above; 0 by default.
    pub center_coef: f64,
    /// Replaces the number of pairs, above 0. `PPOK_NONE` by default.
    pub denominator: f64,
}

options!(ppok_reward_model_options, RewardModelOptions, OP, [], {
    center_coef => center_coef,
    denominator => denominator,
});

/// Arguments of ppok_preference_loss_*. Units are pairs, `rows` / 2, or in KTO rows. Rows are the chosen
/// responses of all pairs, and then the rejected ones in the same order.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_preference_loss_args {
    pub struct_size: usize,
    /// Responses; an even number of them but in KTO.
    pub rows: usize,
    /// Tokens of a row, or with `offsets` of all rows; 1 where rows are log-probabilities of whole responses.
    pub seq_len: usize,
    /// Log-probabilities under the policy that is trained, which get the gradient, `[rows, seq_len]`, or with
    /// `offsets` `[seq_len]`, as are all of that shape.
    pub logp: *const f32,
    /// Log-probabilities under the reference model, `[rows, seq_len]`; null if there are none, and for
    /// losses without a reference.
    pub ref_logp: *const f32,
    /// Their sums over the unmasked tokens, `[rows]`, in their place, or null.
    pub ref_sums: *const f32,
    /// `[rows, seq_len]`; null if nothing is masked.
    pub mask: *const u8,
    /// The divisors of averages, `[rows]`, 0 or above; null for the number of unmasked tokens.
    pub lengths: *const i64,
    /// Factors of the losses, `[units]`; null for ones. A unit of weight 0 is left out altogether. Not
    /// for losses that sort.
    pub weights: *const f32,
    /// Subtracted from h, `[units]`, or null; for losses that are as `PPOK_PREFERENCE_SIGMOID`.
    pub margin: *const f32,
    /// 1 for desirable responses and 0 for others, `[rows]`, in KTO; else null.
    pub labels: *const u8,
    /// kl of KTO, one number; null for 0.
    pub kl: *const f32,
    /// Where the rows of a pack begin, `[rows + 1]`: row b is the tokens from `offsets[b]` up to
    /// `offsets[b + 1]`; 0 first, never falling, `seq_len` last. Not checked on CUDA. Null if all rows have
    /// `seq_len` tokens.
    pub offsets: *const i64,
    pub options: *const ppok_preference_options,
    /// The loss and the statistics, one, written.
    pub stats: *mut PreferenceStats,
    /// The loss once more, one, written; null if not wanted.
    pub loss: *mut f32,
    /// The losses of the units, times their weights, `[units]`, written; null if not wanted.
    pub losses: *mut f32,
    /// Implicit rewards, `[rows]`, written: beta x, averaged if the loss averages; null if not wanted.
    pub rewards: *mut f32,
    /// Gradient with respect to `logp`, for an upstream gradient of 1, `[rows, seq_len]`, written; null
    /// if not wanted.
    pub grad_logp: *mut f32,
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_preference_loss_args {
    const OP: &'static str = OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        let (rows, seq_len) = (self.rows, self.seq_len);
        let options = memory.options(self.options)?;
        let shape = BatchShape::new(rows, seq_len, !self.offsets.is_null());
        let shape = (shape, options.units(rows)?);
        let inputs: Inputs<Raw> = list_of!(
            self,
            Inputs,
            [logp],
            [ref_logp, ref_sums, mask, lengths, weights, margin, labels, kl, offsets]
        );
        let outputs: Outputs<Raw> =
            list_of!(self, Outputs, [stats], [loss, losses, rewards, grad_logp]);
        run!(
            (on, memory),
            [inputs, shape],
            [outputs, shape],
            |i, o| cpu::preference_loss(i, rows, seq_len, &options, o),
            |stream, w| cuda::preference_loss(stream, i, rows, seq_len, &options, o, w),
        )
    }

    fn workspace_size(&self, memory: &Memory) -> Result<usize> {
        let len = cuda::workspace_len(self.rows, &memory.options(self.options)?);
        Ok(size_of::<f64>().saturating_mul(len))
    }
}

/// Arguments of ppok_reward_model_loss_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_reward_model_loss_args {
    pub struct_size: usize,
    /// How many pairs there are.
    pub pairs: usize,
    /// Rewards of the chosen responses and of the rejected ones, which get the gradient, `[2, pairs]`.
    pub rewards: *const f32,
    /// How much more the chosen response is to get, `[pairs]`; null for 0.
    pub margin: *const f32,
    /// Factors of the losses, `[pairs]`; null for ones. A pair of weight 0 is left out altogether.
    pub weights: *const f32,
    pub options: *const ppok_reward_model_options,
    /// The loss and the statistics, one, written.
    pub stats: *mut PreferenceStats,
    /// The loss once more, one, written; null if not wanted.
    pub loss: *mut f32,
    /// The losses of the pairs, times their weights, `[pairs]`, written; null if not wanted.
    pub losses: *mut f32,
    /// Gradient with respect to `rewards`, for an upstream gradient of 1, `[2, pairs]`, written; null if
    /// not wanted.
    pub grad_rewards: *mut f32,
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_reward_model_loss_args {
    const OP: &'static str = OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        let (pairs, options) = (self.pairs, memory.options(self.options)?);
        run!(
            (on, memory),
            [list_of!(self, RewardModelInputs, [rewards], [margin, weights]), pairs],
            [list_of!(self, RewardModelOutputs, [stats], [loss, losses, grad_rewards]), pairs],
            |i, o| cpu::reward_model_loss(i, pairs, &options, o),
            |stream, w| cuda::reward_model_loss(stream, i, pairs, &options, o, w),
        )
    }

    fn workspace_size(&self, _: &Memory) -> Result<usize> {
        Ok(size_of::<f64>().saturating_mul(cuda::reward_model_workspace_len(self.pairs)))
    }
}

/// Preference losses: the DPO family on pairs of responses, and KTO on labelled ones, with their gradient,
/// implicit rewards and statistics. With x and y the sums of log-ratios of the chosen and the rejected
/// response over their unmasked tokens, averaged where the loss averages, s the logistic function and ls its
/// logarithm,
///
/// ```text
/// a = beta x, b = beta y, h = a - b - gamma - margin
/// loss = sum weight l(a, b, h) / units + sft_coef (-sum logp / tokens), the latter of chosen responses
/// ```
///
/// where the option `loss` says what l is. If no unit has a weight and no denominator is given,
/// `PPOK_STATUS_MASK`; on CUDA the loss is NaN then, and the gradient is 0. A label other than 0 and 1, and
/// a length below 0, are `PPOK_STATUS_OPTION`; on CUDA the loss is NaN.
#[no_mangle]
pub unsafe extern "C" fn ppok_preference_loss_cpu(args: *const ppok_preference_loss_args) -> i32 {
    capi::cpu(args)
}

/// The pairwise loss of a reward model, with its gradient and statistics: the mean of
/// -ls(chosen - rejected - margin) + center_coef (chosen + rejected)^2. If no pair has a weight and no
/// denominator is given, `PPOK_STATUS_MASK`; on CUDA the loss is NaN then, and the gradient is 0.
#[no_mangle]
pub unsafe extern "C" fn ppok_reward_model_loss_cpu(
    args: *const ppok_reward_model_loss_args,
) -> i32 {
    capi::cpu(args)
}
