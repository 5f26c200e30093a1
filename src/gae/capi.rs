//! The C entry points of the op.

use std::ffi::c_void;

#[cfg(any(feature = "cuda", feature = "simt"))]
use super::cuda;
use super::{
    cpu, GaeOptions, Inputs, MaskMode, MissingEos, RewardShaping, ScoreOrder, ScorePlacement,
    ScoreScale, OP,
};
use crate::capi::arguments::{
    choose, elements, initialise, optional, or_none, read, read_or_default, Growing, Host, Memory,
    Space, Workspace,
};
#[cfg(any(feature = "cuda", feature = "simt"))]
use crate::capi::arguments::{write_size, Device};
use crate::capi::{call, on_device, Result};
#[cfg(any(feature = "cuda", feature = "simt"))]
use crate::cuda::Stream;
#[cfg(any(feature = "cuda", feature = "simt"))]
use crate::whiten;
use crate::whiten::capi::ppok_moments;

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
#[allow(non_camel_case_types)]
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
    const FIRST_SIZE: usize = size_of::<Self>();

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

impl ppok_gae_options {
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

/// Inputs of ppok_gae_*. All but `values` may be null.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
#[allow(non_camel_case_types)]
pub struct ppok_gae_inputs {
    /// `sizeof` of this struct.
    pub struct_size: usize,
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
}

// SAFETY: of pointers without padding, its size first.
unsafe impl Growing for ppok_gae_inputs {
    const FIRST_SIZE: usize = size_of::<Self>();

    fn initial() -> Self {
        use std::ptr::null;
        Self {
            struct_size: size_of::<Self>(),
            values: null(),
            rewards: null(),
            kl: null(),
            scores: null(),
            has_eos: null(),
            mask: null(),
            dones: null(),
            bootstrap: null(),
        }
    }
}

/// Outputs of ppok_gae_*, each `[batch, seq_len]` and 0 where masked, but for the moments.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
#[allow(non_camel_case_types)]
pub struct ppok_gae_outputs {
    /// `sizeof` of this struct.
    pub struct_size: usize,
    /// Advantages, not whitened.
    pub advantages: *mut f32,
    /// Returns, the targets of the value function.
    pub returns: *mut f32,
    /// The rewards after shaping; null if not wanted.
    pub rewards: *mut f32,
    /// One: the moments of the unmasked advantages, for ppok_whiten_forward_*; null if not wanted.
    pub moments: *mut ppok_moments,
}

// SAFETY: of pointers without padding, its size first.
unsafe impl Growing for ppok_gae_outputs {
    const FIRST_SIZE: usize = size_of::<Self>();

    fn initial() -> Self {
        use std::ptr::null_mut;
        Self {
            struct_size: size_of::<Self>(),
            advantages: null_mut(),
            returns: null_mut(),
            rewards: null_mut(),
            moments: null_mut(),
        }
    }
}

/// Sets the defaults. `struct_size` is `sizeof *options`.
#[no_mangle]
pub unsafe extern "C" fn ppok_gae_options_init(
    options: *mut ppok_gae_options,
    struct_size: usize,
) -> i32 {
    // SAFETY: the header's.
    call(|| unsafe { initialise(OP, "options", options, struct_size) })
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
///
/// - `inputs`, `outputs`: not null.
/// - `batch`, `seq_len`: rows and tokens in each.
/// - `options`: null for the defaults.
#[no_mangle]
pub unsafe extern "C" fn ppok_gae_cpu(
    inputs: *const ppok_gae_inputs,
    batch: usize,
    seq_len: usize,
    options: *const ppok_gae_options,
    outputs: *const ppok_gae_outputs,
) -> i32 {
    let pass = Gae { inputs, batch, seq_len, options, outputs };
    // SAFETY: the header's.
    call(|| unsafe { pass.on_cpu() })
}

/// ppok_gae_cpu() on device memory, to which the pointers in `inputs` and `outputs` lead, and `stream`.
/// `workspace` has the bytes that ppok_gae_cuda_workspace_size() says.
#[no_mangle]
pub unsafe extern "C" fn ppok_gae_cuda(
    inputs: *const ppok_gae_inputs,
    batch: usize,
    seq_len: usize,
    options: *const ppok_gae_options,
    outputs: *const ppok_gae_outputs,
    workspace: *mut c_void,
    workspace_size: usize,
    stream: *mut c_void,
) -> i32 {
    let pass = Gae { inputs, batch, seq_len, options, outputs };
    let workspace = Workspace { address: workspace, bytes: workspace_size };
    call(|| {
        on_device!(OP, stream, [pass, workspace], |stream| {
            // SAFETY: the header's.
            unsafe { pass.on_cuda(stream, workspace) }
        })
    })
}

/// Writes the bytes of workspace that ppok_gae_cuda() needs to `size`.
#[no_mangle]
pub unsafe extern "C" fn ppok_gae_cuda_workspace_size(
    batch: usize,
    seq_len: usize,
    stream: *mut c_void,
    size: *mut usize,
) -> i32 {
    call(|| {
        on_device!(OP, stream, [batch, seq_len, size], |_stream| {
            // SAFETY: the header's.
            unsafe { write_size::<f64>(OP, size, cuda::workspace_len(batch, seq_len)) }
        })
    })
}

/// The arguments of the pass, as they came.
#[derive(Clone, Copy)]
struct Gae {
    inputs: *const ppok_gae_inputs,
    batch: usize,
    seq_len: usize,
    options: *const ppok_gae_options,
    outputs: *const ppok_gae_outputs,
}

/// The arguments of the pass, looked at.
struct Taken<'a, S: Space> {
    options: GaeOptions,
    values: S::In<'a, f32>,
    rewards: Option<S::In<'a, f32>>,
    kl: Option<S::In<'a, f32>>,
    scores: Option<S::In<'a, f32>>,
    has_eos: Option<S::In<'a, u8>>,
    mask: Option<S::In<'a, u8>>,
    dones: Option<S::In<'a, u8>>,
    bootstrap: Option<S::In<'a, f32>>,
    advantages: S::Out<'a, f32>,
    returns: S::Out<'a, f32>,
    shaped: Option<S::Out<'a, f32>>,
    /// Null if not wanted.
    moments: *mut ppok_moments,
}

impl Gae {
    /// # Safety
    /// The pointers are what the header asks for.
    unsafe fn on_cpu(&self) -> Result<()> {
        // SAFETY: the caller's.
        let mut memory = unsafe { Memory::<Host>::new(OP) };
        let taken = self.take(&mut memory)?;
        let wanted = memory.optional_output("moments", taken.moments, 1)?;
        let Taken { values, rewards, kl, scores, has_eos, mask, dones, bootstrap, .. } = taken;
        let inputs = Inputs { values, rewards, kl, scores, has_eos, mask, dones, bootstrap };
        let Taken { advantages, returns, shaped: rewards, .. } = taken;
        let outputs = cpu::Outputs { advantages, returns, rewards };
        let moments = cpu::gae(inputs, self.batch, self.seq_len, &taken.options, outputs)?;
        if let Some(wanted) = wanted {
            wanted[0] = moments.into();
        }
        Ok(())
    }

    /// # Safety
    /// The pointers are what the header asks for.
    #[cfg(any(feature = "cuda", feature = "simt"))]
    unsafe fn on_cuda(&self, stream: &Stream, workspace: Workspace) -> Result<()> {
        // SAFETY: the caller's.
        let mut memory = unsafe { Memory::<Device>::new(OP) };
        let taken = self.take(&mut memory)?;
        let moments =
            memory.optional_output("moments", taken.moments.cast(), whiten::cuda::MOMENTS)?;
        let &Gae { batch, seq_len, .. } = self;
        let workspace = memory.workspace(workspace, cuda::workspace_len(batch, seq_len))?;
        let Taken { values, rewards, kl, scores, has_eos, mask, dones, bootstrap, .. } = taken;
        let inputs = cuda::Inputs { values, rewards, kl, scores, has_eos, mask, dones, bootstrap };
        let Taken { advantages, returns, shaped: rewards, .. } = taken;
        let outputs = cuda::Outputs { advantages, returns, rewards, moments };
        Ok(cuda::gae(stream, inputs, batch, seq_len, &taken.options, outputs, workspace)?)
    }

    fn take<'a, S: Space>(&self, memory: &mut Memory<'a, S>) -> Result<Taken<'a, S>> {
        // SAFETY: the header's.
        let (options, inputs, outputs) = unsafe {
            let options = read_or_default(OP, "options", self.options)?.options()?;
            (options, read(OP, "inputs", self.inputs)?, read(OP, "outputs", self.outputs)?)
        };
        let batch = self.batch;
        let tokens = elements(OP, "values", &[batch, self.seq_len])?;
        Ok(Taken {
            options,
            values: memory.input("values", inputs.values, tokens)?,
            rewards: memory.optional_input("rewards", inputs.rewards, tokens)?,
            kl: memory.optional_input("kl", inputs.kl, tokens)?,
            scores: memory.optional_input("scores", inputs.scores, batch)?,
            has_eos: memory.optional_input("has_eos", inputs.has_eos, batch)?,
            mask: memory.optional_input("mask", inputs.mask, tokens)?,
            dones: memory.optional_input("dones", inputs.dones, tokens)?,
            bootstrap: memory.optional_input("bootstrap", inputs.bootstrap, batch)?,
            advantages: memory.output("advantages", outputs.advantages, tokens)?,
            returns: memory.output("returns", outputs.returns, tokens)?,
            shaped: memory.optional_output("rewards (out)", outputs.rewards, tokens)?,
            moments: outputs.moments,
        })
    }
}
