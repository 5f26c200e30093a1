//! The C entry points of the op.

use super::{
    cpu, cuda, GaeOptions, Inputs, MaskMode, MissingEos, Outputs, ScoreOrder, ScorePlacement,
    ScoreScale, OP,
};
use crate::capi::arguments::{choices, choose, list_of, options, Encoded, Memory, Raw};
use crate::capi::{self, run, On, Pass, Result};
use crate::moments::Moments;
use crate::pack::BatchShape;

/// A masked token between unmasked ones is no step: value and advantage are carried over it (verl,
/// NeMo).
pub const PPOK_GAE_MASK_CARRY: i32 = 0;
/// It is a step with reward 0 and value 0, which discounts (TRL 0.11, OpenRLHF).
pub const PPOK_GAE_MASK_MULTIPLY: i32 = 1;

/// The score is added at the last unmasked token (TRL 0.11, OpenRLHF, verl, NeMo, MOSS).
pub const PPOK_GAE_SCORE_AT_LAST: i32 = 0;
/// One past it if there is room, else at it (TRL since 0.12, DeepSpeed-Chat). The masked position
/// after the last unmasked token then is a step too, of reward score: its value is read, its return
/// and reward are written, and its advantage is 0 and not among the moments.
pub const PPOK_GAE_SCORE_AFTER_LAST: i32 = 1;

/// Scores are scaled, then clipped (TRL 0.11, MOSS).
pub const PPOK_GAE_SCALE_THEN_CLIP: i32 = 0;
/// Scores are clipped, then scaled (trlx).
pub const PPOK_GAE_CLIP_THEN_SCALE: i32 = 1;

/// The score of a sequence without end-of-sequence token stays as it is.
pub const PPOK_GAE_MISSING_EOS_KEEP: i32 = 0;
/// `missing_eos_value` is subtracted from it (TRL's `missing_eos_penalty`).
pub const PPOK_GAE_MISSING_EOS_SUBTRACT: i32 = 1;
/// `missing_eos_value` takes its place (lm-human-preferences' `penalty_reward_value`).
pub const PPOK_GAE_MISSING_EOS_REPLACE: i32 = 2;

/// Options of ppok_gae_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_gae_options {
    pub struct_size: usize,
    /// Discount, in 0..1; 1 by default.
    pub gamma: f64,
    /// Lambda of the advantages, in 0..1; 0.95 by default.
    pub lambda: f64,
    /// Lambda of the advantages that the returns are made of, if it is another; `PPOK_NONE` by default.
    pub value_lambda: f64,
    /// Weight of the KL penalty, 0 or above; 0.05 by default. At 0 `kl` is not looked at.
    pub kl_coef: f64,
    /// Subtracted from the scores where `score_std` is given; 0 by default.
    pub score_mean: f64,
    /// The scores are divided by it; above 0, or `PPOK_NONE`, which is the default: not scaled.
    pub score_std: f64,
    /// The least that scores are clipped to; -INFINITY by default.
    pub score_min: f64,
    /// The most that scores are clipped to; not below `score_min`; INFINITY by default.
    pub score_max: f64,
    /// The number that `missing_eos` subtracts or puts in place; 0 by default.
    pub missing_eos_value: f64,
    /// `PPOK_GAE_MASK_CARRY`, the default, or `PPOK_GAE_MASK_MULTIPLY`.
    pub mask_mode: i32,
    /// `PPOK_GAE_SCORE_AT_LAST`, the default, or `PPOK_GAE_SCORE_AFTER_LAST`.
    pub score_placement: i32,
    /// `PPOK_GAE_SCALE_THEN_CLIP`, the default, or `PPOK_GAE_CLIP_THEN_SCALE`.
    pub score_order: i32,
    /// `PPOK_GAE_MISSING_EOS_KEEP`, the default, or one of the others, which need `scores` and
    /// `has_eos`.
    pub missing_eos: i32,
}

choices! {
    MaskMode { Carry, Multiply }
    ScorePlacement { LastToken, AfterLastToken }
    ScoreOrder { ScaleThenClip, ClipThenScale }
}

impl Encoded for Option<ScoreScale> {
    type Code = (f64, f64);

    fn encode(self) -> (f64, f64) {
        (self.map(|scale| scale.std).encode(), self.map_or(0.0, |scale| scale.mean))
    }

    fn decode(_: &'static str, _: &'static str, (std, mean): (f64, f64)) -> Result<Self> {
        let std = Option::decode(OP, "score_std", std)?;
        Ok(std.map(|std| ScoreScale { mean, std }))
    }
}

impl Encoded for MissingEos {
    type Code = (i32, f64);

    fn encode(self) -> (i32, f64) {
        match self {
            MissingEos::Keep => (PPOK_GAE_MISSING_EOS_KEEP, 0.0),
            MissingEos::Subtract(by) => (PPOK_GAE_MISSING_EOS_SUBTRACT, by),
            MissingEos::Replace(with) => (PPOK_GAE_MISSING_EOS_REPLACE, with),
        }
    }

    fn decode(op: &'static str, option: &'static str, (rule, x): (i32, f64)) -> Result<Self> {
        let rules = [MissingEos::Keep, MissingEos::Subtract(x), MissingEos::Replace(x)];
        choose(op, option, rule, &rules)
    }
}

options!(ppok_gae_options, GaeOptions, OP, [], {
    gamma => gamma,
    lambda => lambda,
    value_lambda => value_lambda,
    kl_coef => shaping.kl_coef,
    score_std & score_mean => shaping.score_scale,
    score_min => shaping.score_min,
    score_max => shaping.score_max,
    mask_mode => mask_mode,
    score_placement => shaping.score_placement,
    score_order => shaping.score_order,
    missing_eos & missing_eos_value => shaping.missing_eos,
});

/// Arguments of ppok_gae_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_gae_args {
    pub struct_size: usize,
    /// Rows.
    pub batch: usize,
    /// Tokens of a row; with `offsets`, of all rows.
    pub seq_len: usize,
    /// Values V, `[batch, seq_len]`, or with `offsets` `[seq_len]`, as are all of that shape.
    pub values: *const f32,
    /// Dense rewards, `[batch, seq_len]`; null stands for zeros.
    pub rewards: *const f32,
    /// KL to the reference model for each token, `[batch, seq_len]`; null stands for zeros.
    pub kl: *const f32,
    /// Scores of the sequences, `[batch]`; null stands for zeros.
    pub scores: *const f32,
    /// Not 0 where the sequence ended by itself, `[batch]`; null if all did.
    pub has_eos: *const u8,
    /// `[batch, seq_len]`; null if nothing is masked. Padding left and right, and gaps.
    pub mask: *const u8,
    /// Not 0 where an episode ended with step t, `[batch, seq_len]`; null if none did.
    pub dones: *const u8,
    /// Value of the state after the last unmasked token, `[batch]`; null stands for zeros.
    pub bootstrap: *const f32,
    /// Where the rows of a pack begin, `[batch + 1]`: row b is the tokens from `offsets[b]` up to
    /// `offsets[b + 1]`; 0 first, never falling, `seq_len` last. Not checked on CUDA. Null if all rows have
    /// `seq_len` tokens.
    pub offsets: *const i64,
    /// Lambda of the advantages of each row, `[batch]`, in 0..1; null if it is that of the options.
    pub lambda_per_row: *const f32,
    pub options: *const ppok_gae_options,
    /// Advantages, not whitened, `[batch, seq_len]`; written, and 0 where masked, as are the next two.
    pub advantages: *mut f32,
    /// Returns, the targets of the value function, `[batch, seq_len]`.
    pub returns: *mut f32,
    /// The rewards after shaping, `[batch, seq_len]`; null if not wanted.
    pub shaped_rewards: *mut f32,
    /// Moments of the unmasked advantages, one, written, for ppok_whiten_forward_*; null if not wanted.
    pub moments: *mut Moments,
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_gae_args {
    const OP: &'static str = OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        let (batch, seq_len) = (self.batch, self.seq_len);
        let options = memory.options(self.options)?;
        let shape = BatchShape::new(batch, seq_len, !self.offsets.is_null());
        run!(
            (on, memory),
            [self.inputs(), shape],
            [list_of!(self, Outputs, [advantages, returns], [shaped_rewards, moments]), shape],
            |i, o| cpu::gae(i, batch, seq_len, &options, o),
            |stream, w| cuda::gae(stream, i, batch, seq_len, &options, o, w),
        )
    }

    fn workspace_size(&self, _: &Memory) -> Result<usize> {
        let len = cuda::workspace_len(&self.inputs(), self.batch, self.seq_len);
        Ok(size_of::<f64>().saturating_mul(len))
    }
}

impl ppok_gae_args {
    fn inputs(&self) -> Inputs<'_, Raw> {
        list_of!(
            self,
            Inputs,
            [values],
            [rewards, kl, scores, has_eos, mask, dones, bootstrap, offsets, lambda_per_row]
        )
    }
}

/// Generalised advantage estimation, with the shaping of the rewards in the same pass: for each row,
/// from the last token backwards,
///
/// ```text
/// r_t       = rewards_t - kl_coef kl_t + score    (the score at one place of the row only)
/// delta_t   = r_t + gamma V_{t+1} - V_t
/// A_t       = delta_t + gamma lambda A_{t+1}
/// returns_t = A_t + V_t
/// ```
///
/// The scan starts at the last unmasked token. A row without one comes out as zeros, its score
/// dropped. A score is scaled and clipped, then the rule for a missing end of sequence is applied.
#[no_mangle]
pub unsafe extern "C" fn ppok_gae_cpu(args: *const ppok_gae_args) -> i32 {
    capi::cpu(args)
}
