//! The C entry points of the op.

use std::ffi::c_void;

#[cfg(any(feature = "cuda", feature = "simt"))]
use super::cuda;
use super::{
    cpu, GaeOptions, Inputs, MaskMode, MissingEos, Outputs, RewardShaping, ScoreOrder,
    ScorePlacement, ScoreScale, OP,
};
use crate::capi::arguments::{choose, optional, or_none, Given, Growing, Memory, Options, Raw};
use crate::capi::{self, run, On, Pass, Result};
#[cfg(any(feature = "cuda", feature = "simt"))]
use crate::cuda::Device;
use crate::moments::Moments;

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
    /// `sizeof` of this struct.
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
    /// Scores are clipped to plus or minus this; above 0, or `PPOK_NONE`, which is the default.
    pub score_clip: f64,
    /// What `missing_eos` subtracts or puts in place; 0 by default.
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

// SAFETY: of numbers without padding, its size first.
unsafe impl Growing for ppok_gae_options {
    fn initial() -> Self {
        let GaeOptions { gamma, lambda, value_lambda, mask_mode, shaping } = GaeOptions::default();
        let (missing_eos, missing_eos_value) = match shaping.missing_eos {
            MissingEos::Keep => (PPOK_GAE_MISSING_EOS_KEEP, 0.0),
            MissingEos::Subtract(by) => (PPOK_GAE_MISSING_EOS_SUBTRACT, by),
            MissingEos::Replace(with) => (PPOK_GAE_MISSING_EOS_REPLACE, with),
        };
        Self {
            struct_size: size_of::<Self>(),
            gamma,
            lambda,
            value_lambda: or_none(value_lambda),
            kl_coef: shaping.kl_coef,
            score_mean: shaping.scale.map_or(0.0, |scale| scale.mean),
            score_std: or_none(shaping.scale.map(|scale| scale.std)),
            score_clip: or_none(shaping.clip),
            missing_eos_value,
            mask_mode: mask_mode as i32,
            score_placement: shaping.placement as i32,
            score_order: shaping.order as i32,
            missing_eos,
        }
    }
}

impl Options for ppok_gae_options {
    type Options = GaeOptions;

    fn options(&self) -> Result<GaeOptions> {
        let mean = self.score_mean;
        let value = self.missing_eos_value;
        let modes = [MaskMode::Carry, MaskMode::Multiply];
        let placements = [ScorePlacement::LastToken, ScorePlacement::AfterLastToken];
        let orders = [ScoreOrder::ScaleThenClip, ScoreOrder::ClipThenScale];
        let rules = [MissingEos::Keep, MissingEos::Subtract(value), MissingEos::Replace(value)];
        Ok(GaeOptions {
            gamma: self.gamma,
            lambda: self.lambda,
            value_lambda: optional(self.value_lambda),
            mask_mode: choose(OP, "mask_mode", self.mask_mode, &modes)?,
            shaping: RewardShaping {
                kl_coef: self.kl_coef,
                placement: choose(OP, "score_placement", self.score_placement, &placements)?,
                scale: optional(self.score_std).map(|std| ScoreScale { mean, std }),
                clip: optional(self.score_clip),
                order: choose(OP, "score_order", self.score_order, &orders)?,
                missing_eos: choose(OP, "missing_eos", self.missing_eos, &rules)?,
            },
        })
    }
}

/// Arguments of ppok_gae_*. Set `struct_size`, and everything that is not used to zero.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_gae_args {
    /// `sizeof` of this struct.
    pub struct_size: usize,
    /// Rows.
    pub batch: usize,
    /// Tokens of a row.
    pub seq_len: usize,
    /// Values V, `[batch, seq_len]`.
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
    /// Null for the defaults. In the process's memory, also for CUDA.
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
unsafe impl Growing for ppok_gae_args {}

impl ppok_gae_args {
    fn inputs(&self) -> Inputs<'_, Raw> {
        Inputs {
            values: self.values,
            rewards: self.rewards.given(),
            kl: self.kl.given(),
            scores: self.scores.given(),
            has_eos: self.has_eos.given(),
            mask: self.mask.given(),
            dones: self.dones.given(),
            bootstrap: self.bootstrap.given(),
        }
    }

    fn outputs(&self) -> Outputs<'_, Raw> {
        Outputs {
            advantages: self.advantages,
            returns: self.returns,
            shaped_rewards: self.shaped_rewards.given(),
            moments: self.moments.given(),
        }
    }
}

impl Pass for ppok_gae_args {
    const OP: &'static str = OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        let (batch, seq_len) = (self.batch, self.seq_len);
        let (shape, options) = ([batch, seq_len], memory.options(self.options)?);
        run!(
            (on, memory),
            [self.inputs(), shape],
            [self.outputs(), shape],
            |i, o| cpu::gae(i, batch, seq_len, &options, o),
            |stream, w| { cuda::gae(stream, i, batch, seq_len, &options, o, memory.workspace(w)?) },
        )
    }

    #[cfg(any(feature = "cuda", feature = "simt"))]
    fn workspace_size(&self, _: &Memory, _: Device) -> Result<usize> {
        Ok(size_of::<f64>().saturating_mul(cuda::workspace_len(self.batch, self.seq_len)))
    }
}

/// Sets the defaults. `struct_size` is `sizeof *options`.
#[no_mangle]
pub unsafe extern "C" fn ppok_gae_options_init(
    options: *mut ppok_gae_options,
    struct_size: usize,
) -> i32 {
    capi::init(OP, options, struct_size)
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

/// ppok_gae_cpu() on device memory and `stream`.
#[no_mangle]
pub unsafe extern "C" fn ppok_gae_cuda(
    args: *const ppok_gae_args,
    workspace: *mut c_void,
    bytes: usize,
    stream: *mut c_void,
) -> i32 {
    capi::cuda(args, workspace, bytes, stream)
}

/// Writes the bytes of workspace that ppok_gae_cuda() needs to `bytes`.
#[no_mangle]
pub unsafe extern "C" fn ppok_gae_cuda_workspace_size(
    args: *const ppok_gae_args,
    stream: *mut c_void,
    bytes: *mut usize,
) -> i32 {
    capi::workspace_size(args, stream, bytes)
}
