//! The C entry points of the op.

use std::ffi::c_void;

#[cfg(any(feature = "cuda", feature = "simt"))]
use super::cuda;
use super::{
    cpu, Aggregation, ClipFractionKind, Inputs, PpoLossOptions, PpoStats, ValueInputs, OP,
};
use crate::capi::arguments::{
    both, check_reserved, choose, elements, initialise, optional, or_none, read, read_or_default,
    Growing, Host, Memory, Space, Workspace,
};
#[cfg(any(feature = "cuda", feature = "simt"))]
use crate::capi::arguments::{write_no_size, write_size, Device};
use crate::capi::{call, on_device, Fault, Result};
#[cfg(any(feature = "cuda", feature = "simt"))]
use crate::cuda::Stream;
use crate::kl::capi::ESTIMATORS;
use crate::kl::KlOptions;

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

/// The clip fraction counts tokens whose clipped branch is the larger one (TRL, verl).
pub const PPOK_PPO_LOSS_CLIPPED_BRANCH: i32 = 0;
/// It counts tokens whose ratio is outside of the bounds (CleanRL).
pub const PPOK_PPO_LOSS_RATIO_OUTSIDE: i32 = 1;

/// The total, as it is minimised.
pub const PPOK_PPO_STAT_LOSS: usize = 0;
/// The aggregated policy term.
pub const PPOK_PPO_STAT_POLICY_LOSS: usize = 1;
/// The aggregated value term, before `value_coef`.
pub const PPOK_PPO_STAT_VALUE_LOSS: usize = 2;
/// Share of tokens that are clipped.
pub const PPOK_PPO_STAT_CLIP_FRACTION: usize = 3;
/// Share of tokens bounded by the dual clip.
pub const PPOK_PPO_STAT_LOWER_CLIP_FRACTION: usize = 4;
/// Share of tokens whose clipped value has the larger error.
pub const PPOK_PPO_STAT_VALUE_CLIP_FRACTION: usize = 5;
/// Mean of -d, the first estimate of KL(old || new).
pub const PPOK_PPO_STAT_APPROX_KL_K1: usize = 6;
/// Mean of d^2 / 2.
pub const PPOK_PPO_STAT_APPROX_KL_K2: usize = 7;
/// Mean of ratio - 1 - d.
pub const PPOK_PPO_STAT_APPROX_KL_K3: usize = 8;
/// Mean of the ratio.
pub const PPOK_PPO_STAT_RATIO_MEAN: usize = 9;
/// Variance of the ratio, biased.
pub const PPOK_PPO_STAT_RATIO_VAR: usize = 10;
/// Smallest ratio.
pub const PPOK_PPO_STAT_RATIO_MIN: usize = 11;
/// Largest ratio.
pub const PPOK_PPO_STAT_RATIO_MAX: usize = 12;
/// Mean entropy.
pub const PPOK_PPO_STAT_ENTROPY_MEAN: usize = 13;
/// Mean of the KL estimate against the reference model.
pub const PPOK_PPO_STAT_KL_MEAN: usize = 14;
/// Mean advantage.
pub const PPOK_PPO_STAT_ADVANTAGE_MEAN: usize = 15;
/// Mean return.
pub const PPOK_PPO_STAT_RETURN_MEAN: usize = 16;
/// Mean value.
pub const PPOK_PPO_STAT_VALUE_MEAN: usize = 17;
/// 1 - Var(returns - values) / Var(returns); NaN where the returns do not vary.
pub const PPOK_PPO_STAT_EXPLAINED_VARIANCE: usize = 18;
/// Number of unmasked tokens.
pub const PPOK_PPO_STAT_TOKENS: usize = 19;
/// How many statistics there are.
pub const PPOK_PPO_STATS: usize = 20;

/// Options of ppok_ppo_loss_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
#[allow(non_camel_case_types)]
pub struct ppok_ppo_loss_options {
    /// `sizeof` of this struct.
    pub struct_size: usize,
    /// The ratio is clipped from below at 1 - this, and from above at 1 + this unless
    /// `clip_range_high` is given; 0 or above, 0.2 by default.
    pub clip_range: f64,
    /// The ratio is clipped from above at 1 + this; 0 or above, or `PPOK_NONE`, which is the default.
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
    /// As in `ppok_kl_token_options`; above 0, or `PPOK_NONE`. 20 by default.
    pub kl_log_ratio_clamp: f64,
    /// As in `ppok_kl_token_options`; `PPOK_NONE` by default.
    pub kl_output_clamp: f64,
    /// The divisor of `PPOK_PPO_LOSS_CONSTANT`, above 0; not looked at with others.
    pub aggregation_divisor: f64,
    /// Replaces the denominator of the aggregation, above 0, for gradient accumulation and data
    /// parallelism; not with `PPOK_PPO_LOSS_CONSTANT`. `PPOK_NONE` by default.
    pub denominator: f64,
    /// `PPOK_PPO_LOSS_TOKEN_MEAN`, the default, to `PPOK_PPO_LOSS_CONSTANT`.
    pub aggregation: i32,
    /// `PPOK_PPO_LOSS_CLIPPED_BRANCH`, the default, or `PPOK_PPO_LOSS_RATIO_OUTSIDE`.
    pub clip_fraction: i32,
    /// `PPOK_KL_K3`, the default, or another of `PPOK_KL_K1` to `PPOK_KL_K3_STRAIGHT_THROUGH`.
    pub kl_estimator: i32,
    /// 0.
    pub reserved: i32,
}

// SAFETY: of numbers without padding, its size first.
unsafe impl Growing for ppok_ppo_loss_options {
    const FIRST_SIZE: usize = size_of::<Self>();

    fn initial() -> Self {
        let options = PpoLossOptions::default();
        let (aggregation, aggregation_divisor) = match options.aggregation {
            Aggregation::TokenMean => (PPOK_PPO_LOSS_TOKEN_MEAN, 0.0),
            Aggregation::SeqMeanTokenSum => (PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_SUM, 0.0),
            Aggregation::SeqMeanTokenMean => (PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_MEAN, 0.0),
            Aggregation::SeqMeanTokenSumNorm => (PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_SUM_NORM, 0.0),
            Aggregation::Constant(divisor) => (PPOK_PPO_LOSS_CONSTANT, divisor),
        };
        Self {
            struct_size: size_of::<Self>(),
            clip_range: options.clip_range,
            clip_range_high: or_none(options.clip_range_high),
            dual_clip: or_none(options.dual_clip),
            log_ratio_clamp: or_none(options.log_ratio_clamp),
            value_clip_range: or_none(options.value_clip_range),
            value_coef: options.value_coef,
            entropy_coef: options.entropy_coef,
            kl_coef: options.kl_coef,
            kl_log_ratio_clamp: or_none(options.kl.log_ratio_clamp),
            kl_output_clamp: or_none(options.kl.output_clamp),
            aggregation_divisor,
            denominator: or_none(options.denominator),
            aggregation,
            clip_fraction: options.clip_fraction as i32,
            kl_estimator: options.kl.estimator as i32,
            reserved: 0,
        }
    }
}

impl ppok_ppo_loss_options {
    fn options(&self) -> Result<PpoLossOptions> {
        check_reserved(OP, "options", self.reserved)?;
        let aggregations = [
            Aggregation::TokenMean,
            Aggregation::SeqMeanTokenSum,
            Aggregation::SeqMeanTokenMean,
            Aggregation::SeqMeanTokenSumNorm,
            Aggregation::Constant(self.aggregation_divisor),
        ];
        let counts = [ClipFractionKind::ClippedBranch, ClipFractionKind::RatioOutside];
        Ok(PpoLossOptions {
            clip_range: self.clip_range,
            clip_range_high: optional(self.clip_range_high),
            dual_clip: optional(self.dual_clip),
            log_ratio_clamp: optional(self.log_ratio_clamp),
            value_clip_range: optional(self.value_clip_range),
            value_coef: self.value_coef,
            entropy_coef: self.entropy_coef,
            kl_coef: self.kl_coef,
            kl: KlOptions {
                estimator: choose(OP, "kl_estimator", self.kl_estimator, &ESTIMATORS)?,
                log_ratio_clamp: optional(self.kl_log_ratio_clamp),
                output_clamp: optional(self.kl_output_clamp),
            },
            aggregation: choose(OP, "aggregation", self.aggregation, &aggregations)?,
            denominator: optional(self.denominator),
            clip_fraction: choose(OP, "clip_fraction", self.clip_fraction, &counts)?,
        })
    }
}

/// Inputs of ppok_ppo_loss_*, each `[batch, seq_len]`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
#[allow(non_camel_case_types)]
pub struct ppok_ppo_loss_inputs {
    /// `sizeof` of this struct.
    pub struct_size: usize,
    /// Log-probabilities under the policy that is trained, which get the gradient.
    pub logp: *const f32,
    /// Log-probabilities under the policy that made the rollout.
    pub old_logp: *const f32,
    /// Advantages, already whitened if they are to be.
    pub advantages: *const f32,
    /// The critic's predictions, which get the gradient; null for no value term.
    pub values: *const f32,
    /// Its predictions at the time of the rollout; may be null where `value_clip_range` is
    /// `PPOK_NONE`.
    pub old_values: *const f32,
    /// The targets of the regression; null if `values` is.
    pub returns: *const f32,
    /// Entropy of the policy at each token, which gets the gradient; may be null where `entropy_coef`
    /// is 0.
    pub entropy: *const f32,
    /// Log-probabilities under the reference model; may be null where `kl_coef` is 0.
    pub ref_logp: *const f32,
    /// Null if nothing is masked.
    pub mask: *const u8,
}

// SAFETY: of pointers without padding, its size first.
unsafe impl Growing for ppok_ppo_loss_inputs {
    const FIRST_SIZE: usize = size_of::<Self>();

    fn initial() -> Self {
        use std::ptr::null;
        Self {
            struct_size: size_of::<Self>(),
            logp: null(),
            old_logp: null(),
            advantages: null(),
            values: null(),
            old_values: null(),
            returns: null(),
            entropy: null(),
            ref_logp: null(),
            mask: null(),
        }
    }
}

/// Gradients of ppok_ppo_loss_*, each `[batch, seq_len]`, written; null if not wanted.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
#[allow(non_camel_case_types)]
pub struct ppok_ppo_loss_gradients {
    /// `sizeof` of this struct.
    pub struct_size: usize,
    /// With respect to logp.
    pub logp: *mut f32,
    /// With respect to values; only with values.
    pub values: *mut f32,
    /// With respect to entropy; only with entropy.
    pub entropy: *mut f32,
}

// SAFETY: of pointers without padding, its size first.
unsafe impl Growing for ppok_ppo_loss_gradients {
    const FIRST_SIZE: usize = size_of::<Self>();

    fn initial() -> Self {
        let null = std::ptr::null_mut();
        Self { struct_size: size_of::<Self>(), logp: null, values: null, entropy: null }
    }
}

/// Sets the defaults. `struct_size` is `sizeof *options`.
#[no_mangle]
pub unsafe extern "C" fn ppok_ppo_loss_options_init(
    options: *mut ppok_ppo_loss_options,
    struct_size: usize,
) -> i32 {
    // SAFETY: the header's.
    call(|| unsafe { initialise(OP, "options", options, struct_size) })
}

/// The PPO loss: clipped surrogate, clipped value loss, entropy bonus and KL penalty, with their
/// gradients and statistics, from one pass over the tokens. With d = logp - old_logp, clamped, ratio
/// r = exp(d) and advantage A,
///
/// ```text
/// policy = max(-r A, -clip(r, 1 - low, 1 + high) A), at most -c A where A < 0 with dual clip c
/// value  = max((v - R)^2, (clip(v, v_old - e, v_old + e) - R)^2) / 2
/// loss   = agg(policy) + value_coef agg(value) - entropy_coef agg(entropy) + kl_coef agg(kl)
/// ```
///
/// - `inputs`: not null.
/// - `batch`, `seq_len`: rows and tokens in each.
/// - `options`: null for the defaults.
/// - `stats`: `[PPOK_PPO_STATS]`, written, in the order of `PPOK_PPO_STAT_*`; the first is the loss.
///   NaN stands for what is not defined, where an input is not given, say.
/// - `gradients`: for an upstream gradient of 1; null if none are wanted.
///
/// If no token is unmasked and no denominator is given, `PPOK_STATUS_MASK`.
#[no_mangle]
pub unsafe extern "C" fn ppok_ppo_loss_cpu(
    inputs: *const ppok_ppo_loss_inputs,
    batch: usize,
    seq_len: usize,
    options: *const ppok_ppo_loss_options,
    stats: *mut f64,
    gradients: *const ppok_ppo_loss_gradients,
) -> i32 {
    let pass = Loss { inputs, batch, seq_len, options, gradients };
    // SAFETY: the header's.
    call(|| unsafe { pass.on_cpu(stats) })
}

/// ppok_ppo_loss_cpu() on device memory, to which the pointers in `inputs` and `gradients` lead, and
/// `stream`; `stats` are of `float`. That no token is unmasked is no error here: without a denominator
/// the loss is NaN then, and the gradients are 0. `workspace` has the bytes that
/// ppok_ppo_loss_cuda_workspace_size() says.
#[no_mangle]
pub unsafe extern "C" fn ppok_ppo_loss_cuda(
    inputs: *const ppok_ppo_loss_inputs,
    batch: usize,
    seq_len: usize,
    options: *const ppok_ppo_loss_options,
    stats: *mut f32,
    gradients: *const ppok_ppo_loss_gradients,
    workspace: *mut c_void,
    workspace_size: usize,
    stream: *mut c_void,
) -> i32 {
    let pass = Loss { inputs, batch, seq_len, options, gradients };
    let workspace = Workspace { address: workspace, bytes: workspace_size };
    call(|| {
        on_device!(OP, stream, [pass, stats, workspace], |stream| {
            // SAFETY: the header's.
            unsafe { pass.on_cuda(stream, stats, workspace) }
        })
    })
}

/// Writes the bytes of workspace that ppok_ppo_loss_cuda() needs with these `options` to `size`.
#[no_mangle]
pub unsafe extern "C" fn ppok_ppo_loss_cuda_workspace_size(
    batch: usize,
    seq_len: usize,
    options: *const ppok_ppo_loss_options,
    stream: *mut c_void,
    size: *mut usize,
) -> i32 {
    call(|| {
        on_device!(OP, stream, [batch, seq_len, options, size], |_stream| {
            // SAFETY: the header's.
            let options = unsafe { read_or_default(OP, "options", options) }?.options()?;
            // SAFETY: the header's.
            unsafe { write_size::<f32>(OP, size, cuda::workspace_len(batch, seq_len, &options)) }
        })
    })
}

/// Multiplies stored gradients of ppok_ppo_loss_cpu() by the gradient of whatever came of the loss. A 0
/// stays 0, whatever that is.
///
/// - `upstream`: one number.
/// - `tokens`: `batch` times `seq_len`.
/// - `stored`, `gradients`: not null. What is null in one is null in the other; each gradient may be
///   written to where it is stored.
#[no_mangle]
pub unsafe extern "C" fn ppok_ppo_loss_scale_cpu(
    upstream: *const f32,
    tokens: usize,
    stored: *const ppok_ppo_loss_gradients,
    gradients: *const ppok_ppo_loss_gradients,
) -> i32 {
    let pass = Scale { upstream, tokens, stored, gradients };
    // SAFETY: the header's.
    call(|| unsafe { pass.on_cpu() })
}

/// ppok_ppo_loss_scale_cpu() on device memory, to which `upstream` and the pointers in the structs
/// lead, and `stream`. `workspace` has the bytes that ppok_ppo_loss_scale_cuda_workspace_size() says.
#[no_mangle]
pub unsafe extern "C" fn ppok_ppo_loss_scale_cuda(
    upstream: *const f32,
    tokens: usize,
    stored: *const ppok_ppo_loss_gradients,
    gradients: *const ppok_ppo_loss_gradients,
    workspace: *mut c_void,
    workspace_size: usize,
    stream: *mut c_void,
) -> i32 {
    let pass = Scale { upstream, tokens, stored, gradients };
    let workspace = Workspace { address: workspace, bytes: workspace_size };
    call(|| {
        on_device!(OP, stream, [pass, workspace], |stream| {
            // SAFETY: the header's.
            unsafe { pass.on_cuda(stream, workspace) }
        })
    })
}

/// Writes the bytes of workspace that ppok_ppo_loss_scale_cuda() needs to `size`: 0 in this version.
#[no_mangle]
pub unsafe extern "C" fn ppok_ppo_loss_scale_cuda_workspace_size(
    tokens: usize,
    stream: *mut c_void,
    size: *mut usize,
) -> i32 {
    call(|| {
        on_device!(OP, stream, [tokens, size], |_stream| {
            // SAFETY: the header's.
            unsafe { write_no_size::<f32>(OP, &[tokens], size) }
        })
    })
}

/// The arguments of the pass, as they came, but for the statistics.
#[derive(Clone, Copy)]
struct Loss {
    inputs: *const ppok_ppo_loss_inputs,
    batch: usize,
    seq_len: usize,
    options: *const ppok_ppo_loss_options,
    gradients: *const ppok_ppo_loss_gradients,
}

/// The same, looked at.
struct Taken<'a, S: Space> {
    options: PpoLossOptions,
    logp: S::In<'a, f32>,
    old_logp: S::In<'a, f32>,
    advantages: S::In<'a, f32>,
    /// Values and returns.
    value: Option<[S::In<'a, f32>; 2]>,
    old_values: Option<S::In<'a, f32>>,
    entropy: Option<S::In<'a, f32>>,
    ref_logp: Option<S::In<'a, f32>>,
    mask: Option<S::In<'a, u8>>,
    grad_logp: Option<S::Out<'a, f32>>,
    grad_values: Option<S::Out<'a, f32>>,
    grad_entropy: Option<S::Out<'a, f32>>,
}

impl Loss {
    /// # Safety
    /// The pointers are what the header asks for.
    unsafe fn on_cpu(&self, stats: *mut f64) -> Result<()> {
        // SAFETY: the caller's.
        let mut memory = unsafe { Memory::<Host>::new(OP) };
        let taken = self.take(&mut memory)?;
        let stats = memory.output("stats", stats, PPOK_PPO_STATS)?;
        let old_values = taken.old_values;
        let inputs = Inputs {
            batch: self.batch,
            seq_len: self.seq_len,
            logp: taken.logp,
            old_logp: taken.old_logp,
            advantages: taken.advantages,
            value: taken.value.map(|[values, returns]| ValueInputs { values, old_values, returns }),
            entropy: taken.entropy,
            ref_logp: taken.ref_logp,
            mask: taken.mask,
        };
        let gradients = cpu::Gradients {
            logp: taken.grad_logp,
            values: taken.grad_values,
            entropy: taken.grad_entropy,
        };
        let found: PpoStats = cpu::ppo_loss(&inputs, &taken.options, gradients)?;
        stats.copy_from_slice(&found.to_array());
        Ok(())
    }

    /// # Safety
    /// The pointers are what the header asks for.
    #[cfg(any(feature = "cuda", feature = "simt"))]
    unsafe fn on_cuda(&self, stream: &Stream, stats: *mut f32, workspace: Workspace) -> Result<()> {
        // SAFETY: the caller's.
        let mut memory = unsafe { Memory::<Device>::new(OP) };
        let taken = self.take(&mut memory)?;
        let stats = memory.output("stats", stats, PPOK_PPO_STATS)?;
        let &Loss { batch, seq_len, .. } = self;
        let needed = cuda::workspace_len(batch, seq_len, &taken.options);
        let workspace = memory.workspace(workspace, needed)?;
        let old_values = taken.old_values;
        let value =
            taken.value.map(|[values, returns]| cuda::ValueInputs { values, old_values, returns });
        let inputs = cuda::Inputs {
            batch,
            seq_len,
            logp: taken.logp,
            old_logp: taken.old_logp,
            advantages: taken.advantages,
            value,
            entropy: taken.entropy,
            ref_logp: taken.ref_logp,
            mask: taken.mask,
        };
        let gradients = cuda::Gradients {
            logp: taken.grad_logp,
            values: taken.grad_values,
            entropy: taken.grad_entropy,
        };
        Ok(cuda::ppo_loss(stream, &inputs, &taken.options, gradients, stats, workspace)?)
    }

    fn take<'a, S: Space>(&self, memory: &mut Memory<'a, S>) -> Result<Taken<'a, S>> {
        // SAFETY: the header's.
        let (options, inputs, gradients) = unsafe {
            let options = read_or_default(OP, "options", self.options)?.options()?;
            let gradients = read_or_default(OP, "gradients", self.gradients)?;
            (options, read(OP, "inputs", self.inputs)?, gradients)
        };
        let tokens = elements(OP, "logp", &[self.batch, self.seq_len])?;
        let logp = memory.input("logp", inputs.logp, tokens)?;
        let old_logp = memory.input("old_logp", inputs.old_logp, tokens)?;
        let advantages = memory.input("advantages", inputs.advantages, tokens)?;
        let values = memory.optional_input("values", inputs.values, tokens)?;
        let old_values = memory.optional_input("old_values", inputs.old_values, tokens)?;
        let returns = memory.optional_input("returns", inputs.returns, tokens)?;
        let value = both(OP, ["values", "returns"], values, returns)?;
        if value.is_none() && old_values.is_some() {
            return Err(Fault::Null { op: OP, arg: "values" });
        }
        Ok(Taken {
            options,
            logp,
            old_logp,
            advantages,
            value,
            old_values,
            entropy: memory.optional_input("entropy", inputs.entropy, tokens)?,
            ref_logp: memory.optional_input("ref_logp", inputs.ref_logp, tokens)?,
            mask: memory.optional_input("mask", inputs.mask, tokens)?,
            grad_logp: memory.optional_output("grad_logp", gradients.logp, tokens)?,
            grad_values: memory.optional_output("grad_values", gradients.values, tokens)?,
            grad_entropy: memory.optional_output("grad_entropy", gradients.entropy, tokens)?,
        })
    }
}

/// The arguments of the scaling, as they came.
#[derive(Clone, Copy)]
struct Scale {
    upstream: *const f32,
    tokens: usize,
    stored: *const ppok_ppo_loss_gradients,
    gradients: *const ppok_ppo_loss_gradients,
}

impl Scale {
    /// # Safety
    /// The pointers are what the header asks for.
    unsafe fn on_cpu(&self) -> Result<()> {
        // SAFETY: the caller's.
        let mut memory = unsafe { Memory::<Host>::new(OP) };
        let upstream = memory.input("upstream", self.upstream, 1)?[0];
        let mut pairs = [None, None, None];
        for (found, (names, stored, gradient)) in pairs.iter_mut().zip(self.pairs()?) {
            let in_place = stored == gradient;
            let stored = match in_place {
                true => None,
                false => memory.optional_input(names[0], stored, self.tokens)?,
            };
            let gradient = memory.optional_output(names[1], gradient, self.tokens)?;
            *found = gradient.map(|gradient| (stored, gradient));
        }
        // Now that nothing will be refused.
        for (stored, gradient) in pairs.into_iter().flatten() {
            if let Some(stored) = stored {
                gradient.copy_from_slice(stored);
            }
            cpu::scale(upstream, gradient);
        }
        Ok(())
    }

    /// # Safety
    /// The pointers are what the header asks for.
    #[cfg(any(feature = "cuda", feature = "simt"))]
    unsafe fn on_cuda(&self, stream: &Stream, workspace: Workspace) -> Result<()> {
        // SAFETY: the caller's.
        let mut memory = unsafe { Memory::<Device>::new(OP) };
        let upstream = memory.input("upstream", self.upstream, 1)?;
        let (mut from, mut to) = ([None; 3], [None, None, None]);
        for (i, (names, stored, gradient)) in self.pairs()?.into_iter().enumerate() {
            from[i] = memory.optional_input(names[0], stored.cast_const(), self.tokens)?;
            to[i] = memory.optional_output_over(names[1], gradient, self.tokens, &[names[0]])?;
        }
        memory.workspace::<f32>(workspace, 0)?;
        let [logp, values, entropy] = from;
        let stored = cuda::StoredGradients { logp, values, entropy };
        let [logp, values, entropy] = to;
        let gradients = cuda::Gradients { logp, values, entropy };
        Ok(cuda::scale(stream, upstream, stored, gradients)?)
    }

    /// Where each gradient is, and where it goes, with the names of both. Neither is null or both are.
    fn pairs(&self) -> Result<[([&'static str; 2], *mut f32, *mut f32); 3]> {
        // SAFETY: the header's.
        let (stored, gradients) =
            unsafe { (read(OP, "stored", self.stored)?, read(OP, "gradients", self.gradients)?) };
        let pairs = [
            (["stored.logp", "grad_logp"], stored.logp, gradients.logp),
            (["stored.values", "grad_values"], stored.values, gradients.values),
            (["stored.entropy", "grad_entropy"], stored.entropy, gradients.entropy),
        ];
        for (names, stored, gradient) in pairs {
            let [stored, gradient] = [stored, gradient].map(|p| (!p.is_null()).then_some(()));
            both(OP, names, stored, gradient)?;
        }
        Ok(pairs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_statistics_are_numbered_as_they_are_named() {
        let numbers = [
            (PPOK_PPO_STAT_LOSS, "loss"),
            (PPOK_PPO_STAT_POLICY_LOSS, "policy_loss"),
            (PPOK_PPO_STAT_VALUE_LOSS, "value_loss"),
            (PPOK_PPO_STAT_CLIP_FRACTION, "clip_fraction"),
            (PPOK_PPO_STAT_LOWER_CLIP_FRACTION, "lower_clip_fraction"),
            (PPOK_PPO_STAT_VALUE_CLIP_FRACTION, "value_clip_fraction"),
            (PPOK_PPO_STAT_APPROX_KL_K1, "approx_kl_k1"),
            (PPOK_PPO_STAT_APPROX_KL_K2, "approx_kl_k2"),
            (PPOK_PPO_STAT_APPROX_KL_K3, "approx_kl_k3"),
            (PPOK_PPO_STAT_RATIO_MEAN, "ratio_mean"),
            (PPOK_PPO_STAT_RATIO_VAR, "ratio_var"),
            (PPOK_PPO_STAT_RATIO_MIN, "ratio_min"),
            (PPOK_PPO_STAT_RATIO_MAX, "ratio_max"),
            (PPOK_PPO_STAT_ENTROPY_MEAN, "entropy_mean"),
            (PPOK_PPO_STAT_KL_MEAN, "kl_mean"),
            (PPOK_PPO_STAT_ADVANTAGE_MEAN, "advantage_mean"),
            (PPOK_PPO_STAT_RETURN_MEAN, "return_mean"),
            (PPOK_PPO_STAT_VALUE_MEAN, "value_mean"),
            (PPOK_PPO_STAT_EXPLAINED_VARIANCE, "explained_variance"),
            (PPOK_PPO_STAT_TOKENS, "tokens"),
        ];
        assert_eq!(numbers.map(|(_, name)| name), PpoStats::NAMES);
        assert_eq!(numbers.map(|(number, _)| number), std::array::from_fn(|i| i));
        assert_eq!(PPOK_PPO_STATS, PpoStats::LEN);
    }
}
