//! The PPO loss: clipped surrogate, clipped value loss, entropy bonus and KL penalty, with their
//! gradients and the statistics a run is watched by, from one pass over the tokens.
//!
//! For every unmasked token, with d = logp - old_logp clamped to ±[`log_ratio_clamp`], ratio
//! r = e^d and advantage A:
//!
//! ```text
//! policy  = max(-r A, -clip(r, 1 - low, 1 + high) A)        Schulman et al. 2017
//!           min(that, -c A) where A < 0, with dual clip c   Ye et al. 2020
//! value   = max((v - R)², (clip(v, v_old - ε, v_old + ε) - R)²) / 2
//! kl      = an estimate from logp - ref_logp, see `ppo_kernels::kl`
//!
//! loss = agg(policy) + value_coef agg(value) - entropy_coef agg(entropy) + kl_coef agg(kl)
//!
//! ∂policy/∂logp = -r A where the unclipped branch is taken and d is not clamped, else 0
//! ∂value/∂v     = v - R where the unclipped branch is taken, else 0
//! ```
//!
//! Where both branches are equal the unclipped one is taken, so at r = 1 the gradient flows.
//! Clipping does not bound the ratio: it zeroes the gradient where it would push further out.
//! [`Aggregation`] says what agg is, the same for all four terms. The total is TRL's and verl's,
//! the value loss with its factor 1/2 included.
//!
//! | argument | shape | type | gradient |
//! |---|---|---|---|
//! | logp | `[B, T]` | f32 | yes |
//! | old_logp, advantages | `[B, T]` | f32 | no |
//! | values | `[B, T]` | f32 | yes |
//! | returns, old_values (for the clip) | `[B, T]` | f32 | no |
//! | entropy | `[B, T]` | f32 | yes |
//! | ref_logp | `[B, T]` | f32 | no |
//! | mask | `[B, T]` | u8, 0 = masked | no |
//!
//! Only the first three are needed; the value term falls away without values, and values, entropy and
//! KL are only reported where their coefficient is 0. Masked tokens may hold anything, NaN included:
//! they count nowhere and get gradient 0. NaN in an unmasked token makes the loss NaN.
//!
//! Cost per token: 12 bytes read, 12 more for the value term (8 without its clip), 4 for the
//! entropy and for the KL each, 2 for the mask (it is counted first); 4 bytes written a gradient.
//!
//! # From logits
//!
//! [`cpu::logits_ppo_loss`] and [`cuda::logits_ppo_loss`] begin a step earlier: logits `[B, T, V]` and
//! targets in, the loss with its statistics and the logits' gradient out, for an upstream gradient of 1.
//! They do what [`logprob`](crate::logprob), the loss without values and the backward pass of `logprob`
//! do, but read the logits from memory once where the cache or a multiprocessor's shared memory holds
//! them that long. Logits of masked tokens are not read.
//!
//! [`log_ratio_clamp`]: PpoLossOptions::log_ratio_clamp

#[cfg(feature = "capi")]
#[allow(missing_docs, clippy::missing_safety_doc)]
pub mod capi;
pub mod cpu;
pub mod cuda;
pub mod reference;
#[cfg(feature = "candle")]
mod tensor;

#[cfg(feature = "candle")]
pub use tensor::{ppo_loss, PpoLossInputs, PpoLossOutput, PpoStatsTensor};

use bytemuck::{Pod, Zeroable};

use crate::error::{Error, Result};
use crate::kl::{KlEstimator, KlOptions};
use crate::memory::{list, Element, Space};

const OP: &str = "ppo_loss";

/// How the terms of the tokens become one number. m is the mask, L a term.
///
/// Each is Σ w m L / D with a weight w of the row and a denominator D, which
/// [`PpoLossOptions::denominator`] replaces.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[cfg_attr(feature = "driver", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "driver", serde(try_from = "String", into = "String"))]
pub enum Aggregation {
    /// Σ m L / Σ m: every token counts the same. w = 1, D = unmasked tokens.
    #[default]
    TokenMean,
    /// The mean over rows of Σ_t m L. w = 1, D = rows with an unmasked token.
    SeqMeanTokenSum,
    /// The mean over rows of the row's mean. w = 1 / unmasked tokens of the row, D = rows with an
    /// unmasked token.
    SeqMeanTokenMean,
    /// Σ m L / T, not divided by the batch (verl's `seq-mean-token-sum-norm`). w = 1, D = T, or
    /// verl's `loss_scale_factor` given as the denominator.
    SeqMeanTokenSumNorm,
    /// Σ m L / this (Dr. GRPO: batch size times the longest response allowed).
    Constant(f64),
}

/// What [`PpoStats::clip_fraction`] counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClipFractionKind {
    /// Tokens whose clipped branch is the larger one, so without gradient (TRL, verl).
    #[default]
    ClippedBranch,
    /// Tokens whose ratio is outside 1 - low .. 1 + high, whatever their advantage (CleanRL).
    RatioOutside,
}

/// Options of the loss. Default: TRL's coefficients, everything else as in most systems.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PpoLossOptions {
    /// The ratio is clipped from below at 1 - this, and from above at 1 + this unless
    /// `clip_range_high` is given; 0.2 by default.
    pub clip_range: f64,
    /// The ratio is clipped from above at 1 + this; `None`, the default, is `clip_range`.
    pub clip_range_high: Option<f64>,
    /// Bounds the policy term at -c A where A < 0; above 1 (3 in verl), `None` by default.
    pub dual_clip: Option<f64>,
    /// Clamps the log-ratio to ± this before e^x, with gradient 0 where it bites; `None` leaves it
    /// as it is, and then a ratio above e^88 is infinite in f32. 20 by default, as in verl and
    /// OpenRLHF: e^20 is far outside every clip range, and one stray token cannot make the loss
    /// infinite.
    pub log_ratio_clamp: Option<f64>,
    /// Clips the values to the old values ± this; `None` is the plain squared error. 0.2 by
    /// default.
    pub value_clip_range: Option<f64>,
    /// Factor of the value term, which is there when values are given; 0.1 by default.
    pub value_coef: f64,
    /// Factor of the entropy, subtracted; 0 by default.
    pub entropy_coef: f64,
    /// Factor of the KL term; 0 by default.
    pub kl_coef: f64,
    /// How the KL term is estimated: `K3` by default, its log-ratio clamped to ±20.
    pub kl: KlOptions,
    /// How tokens become one number; `TokenMean` by default.
    pub aggregation: Aggregation,
    /// Replaces the denominator of the aggregation, above 0; not with `Aggregation::Constant`.
    ///
    /// For gradient accumulation and data parallelism, where a call sees a part of the batch: give
    /// every call the denominator of the whole batch, and the losses and gradients add up to the
    /// whole batch's. Where gradients are averaged over W ranks, give 1/W of it (verl multiplies
    /// by `dp_size`). With a denominator given, a part may be fully masked: its loss and its
    /// gradients are 0.
    pub denominator: Option<f64>,
    /// What the clip fraction counts; `ClippedBranch` by default.
    pub clip_fraction: ClipFractionKind,
}

impl Default for PpoLossOptions {
    fn default() -> Self {
        Self {
            clip_range: 0.2,
            clip_range_high: None,
            dual_clip: None,
            log_ratio_clamp: Some(20.0),
            value_clip_range: Some(0.2),
            value_coef: 0.1,
            entropy_coef: 0.0,
            kl_coef: 0.0,
            kl: KlOptions {
                estimator: KlEstimator::K3,
                log_ratio_clamp: Some(20.0),
                ..KlOptions::default()
            },
            aggregation: Aggregation::TokenMean,
            denominator: None,
            clip_fraction: ClipFractionKind::ClippedBranch,
        }
    }
}

impl PpoLossOptions {
    pub(crate) fn validate(&self) -> Result<()> {
        let check = |option, value, valid, expected| {
            Error::check_option(OP, option, value, valid, expected)
        };
        let not_negative = |option, value: f64| check(option, value, value >= 0.0, "0 or more");
        let positive = |option, value: f64| check(option, value, value > 0.0, "above 0");
        let finite = |option, value| check(option, value, true, "a finite number");

        not_negative("clip_range", self.clip_range)?;
        self.clip_range_high.map_or(Ok(()), |x| not_negative("clip_range_high", x))?;
        self.dual_clip.map_or(Ok(()), |c| check("dual_clip", c, c > 1.0, "none or above 1"))?;
        self.log_ratio_clamp.map_or(Ok(()), |x| positive("log_ratio_clamp", x))?;
        self.value_clip_range.map_or(Ok(()), |x| not_negative("value_clip_range", x))?;
        finite("value_coef", self.value_coef)?;
        finite("entropy_coef", self.entropy_coef)?;
        finite("kl_coef", self.kl_coef)?;
        self.kl.validate_as(OP, ["kl.log_ratio_clamp", "kl.output_clamp"])?;
        self.denominator.map_or(Ok(()), |x| positive("denominator", x))?;
        if let Aggregation::Constant(divisor) = self.aggregation {
            positive("aggregation_divisor", divisor)?;
            let expected = "none with Aggregation::Constant";
            self.denominator.map_or(Ok(()), |x| check("denominator", x, false, expected))?;
        }
        Ok(())
    }

    /// The bounds of the clipped ratio.
    pub(crate) fn ratio_bounds(&self) -> (f64, f64) {
        (1.0 - self.clip_range, 1.0 + self.clip_range_high.unwrap_or(self.clip_range))
    }

    /// The D of the aggregation, of a batch with so many unmasked `tokens` and `rows` with one.
    pub(crate) fn divisor(&self, tokens: usize, rows: usize, seq_len: usize) -> Result<f64> {
        let own = match self.aggregation {
            Aggregation::Constant(divisor) => return Ok(divisor),
            Aggregation::TokenMean => tokens,
            Aggregation::SeqMeanTokenSum | Aggregation::SeqMeanTokenMean => rows,
            Aggregation::SeqMeanTokenSumNorm => seq_len,
        };
        match self.denominator {
            Some(given) => Ok(given),
            None if tokens == 0 => Err(Error::Mask { op: OP, arg: "mask", expected: 1, got: 0 }),
            None => Ok(own as f64),
        }
    }
}

list! {
    /// The inputs in some memory, each `[B, T]`.
    inputs Inputs(shape: [usize; 2]) {
        /// Log-probabilities under the policy that is trained, which get the gradient.
        logp: f32 [&shape],
        /// Log-probabilities under the policy that made the rollout.
        old_logp: f32 [&shape],
        /// Advantages, already whitened if they are to be.
        advantages: f32 [&shape],
    } optional {
        /// The critic's predictions, which get the gradient; without them there is no value term.
        values: f32 [&shape],
        /// Its predictions at the time of the rollout; may be left out where values are not clipped.
        old_values: f32 [&shape],
        /// The targets of the values' regression, given where they are.
        returns: f32 [&shape],
        /// Entropy of the policy's distribution at each token, which gets the gradient.
        entropy: f32 [&shape],
        /// Log-probabilities under the reference model, for the KL term.
        ref_logp: f32 [&shape],
        /// 0 where masked; `None` keeps all.
        mask: u8 [&shape],
    }
}

impl<S: Space> Inputs<'_, S> {
    /// `Ok` when no input is missing that another one or an option needs.
    fn check_given(&self, options: &PpoLossOptions) -> Result<()> {
        let (values, returns) = (self.values.is_some(), self.returns.is_some());
        let old_values = self.old_values.is_some();
        Error::check_both(OP, ["values", "returns"], [values, returns])?;
        Error::check_given(OP, ["old_values", "values"], [old_values, values])?;

        let check = |option, value, valid, expected| {
            Error::check_option(OP, option, value, valid, expected)
        };
        if let Some(range) = options.value_clip_range {
            check("value_clip_range", range, old_values || !values, "none without old_values")?;
        }
        let (entropy, kl) = (options.entropy_coef, options.kl_coef);
        let valid = self.entropy.is_some() || entropy == 0.0;
        check("entropy_coef", entropy, valid, "0 without entropy")?;
        let valid = self.ref_logp.is_some() || kl == 0.0;
        check("kl_coef", kl, valid, "0 without ref_logp")
    }
}

list! {
    /// The outputs in some memory. None may be the memory of an input.
    outputs Outputs(shape: [usize; 2]) {
        /// The loss and the statistics, `[1]`.
        stats: PpoStats [&[1]],
    } optional {
        /// The loss once more, rounded to f32, `[1]`, if wanted.
        loss: f32 [&[1]],
        /// Gradient with respect to logp, for an upstream gradient of 1, `[B, T]`, if wanted.
        grad_logp: f32 [&shape],
        /// Gradient with respect to values, `[B, T]`, if wanted; only with values.
        grad_values: f32 [&shape],
        /// Gradient with respect to entropy, `[B, T]`, if wanted; only with entropy.
        grad_entropy: f32 [&shape],
    }
}

impl<S: Space> Outputs<'_, S> {
    /// `Ok` when no gradient of `tokens` elements is wanted of an input that is not given.
    fn check_wanted<T: Space>(&self, inputs: &Inputs<T>, tokens: usize) -> Result<()> {
        for (arg, wanted, given) in [
            ("grad_values", self.grad_values.is_some(), inputs.values.is_some()),
            ("grad_entropy", self.grad_entropy.is_some(), inputs.entropy.is_some()),
        ] {
            if wanted && !given {
                Error::check_len(OP, arg, tokens, 0)?;
            }
        }
        Ok(())
    }
}

list! {
    /// The inputs of the loss from logits in some memory: a row of logits for each of the `[B, T]` tokens.
    inputs LogitsInputs<T, I>((shape, vocab): ([usize; 2], usize)) {
        /// Logits of the policy that is trained, which get the gradient, `[B, T, vocab]`.
        logits: T [&shape, &[vocab]],
        /// Ids of the tokens, `[B, T]`.
        targets: I [&shape],
        /// Log-probabilities under the policy that made the rollout, `[B, T]`.
        old_logp: f32 [&shape],
        /// Advantages, already whitened if they are to be, `[B, T]`.
        advantages: f32 [&shape],
    } optional {
        /// Log-probabilities under the reference model, for the KL term, `[B, T]`.
        ref_logp: f32 [&shape],
        /// 0 where masked, `[B, T]`; `None` keeps all.
        mask: u8 [&shape],
    }
}

list! {
    /// The outputs of the loss from logits in some memory.
    outputs LogitsOutputs<T>((shape, vocab): ([usize; 2], usize)) {
        /// Log-probabilities of the targets, `[B, T]`; 0 where masked.
        logp: f32 [&shape],
        /// The loss and the statistics, `[1]`.
        stats: PpoStats [&[1]],
        /// Gradient with respect to the logits, for an upstream gradient of 1, `[B, T, vocab]`; on a
        /// device it may be the memory of the logits.
        grad_logits: T [&shape, &[vocab]] over ["logits"],
    } optional {
        /// Entropies, `[B, T]`, 0 where masked; wanted where `entropy_coef` is not 0.
        entropy: f32 [&shape],
        /// The loss once more, rounded to f32, `[1]`, if wanted.
        loss: f32 [&[1]],
    }
}

impl<S: Space, T: Element> LogitsOutputs<'_, S, T> {
    /// `Ok` when the entropy is there if it has a coefficient.
    fn check_entropy(&self, options: &PpoLossOptions) -> Result<()> {
        let coef = options.entropy_coef;
        let valid = self.entropy.is_some() || coef == 0.0;
        Error::check_option(OP, "entropy_coef", coef, valid, "0 without entropy")
    }
}

list! {
    /// Gradients that the loss left, and the gradient of whatever came of it, in some memory.
    inputs ScaleInputs(tokens: usize) {
        /// The upstream gradient, `[1]`.
        upstream: f32 [&[1]],
    } optional {
        /// The stored gradient with respect to logp, `[tokens]`.
        stored_logp: f32 [&[tokens]],
        /// The stored gradient with respect to values, `[tokens]`.
        stored_values: f32 [&[tokens]],
        /// The stored gradient with respect to entropy, `[tokens]`.
        stored_entropy: f32 [&[tokens]],
    }
}

impl<S: Space> ScaleInputs<'_, S> {
    /// `Ok` when what is stored is wanted, and the other way round.
    fn check_pairs<T: Space>(&self, outputs: &ScaleOutputs<T>) -> Result<()> {
        let Self { stored_logp, stored_values, stored_entropy, .. } = self;
        let ScaleOutputs { grad_logp, grad_values, grad_entropy } = outputs;
        for (names, given) in [
            (["stored_logp", "grad_logp"], [stored_logp.is_some(), grad_logp.is_some()]),
            (["stored_values", "grad_values"], [stored_values.is_some(), grad_values.is_some()]),
            (
                ["stored_entropy", "grad_entropy"],
                [stored_entropy.is_some(), grad_entropy.is_some()],
            ),
        ] {
            Error::check_both(OP, names, given)?;
        }
        Ok(())
    }
}

list! {
    /// Where scaled gradients go, in some memory: as many as are stored, each of which may be on a
    /// device where it is stored.
    outputs ScaleOutputs(tokens: usize) {} optional {
        /// Gradient with respect to logp, `[tokens]`.
        grad_logp: f32 [&[tokens]] over ["stored_logp"],
        /// Gradient with respect to values, `[tokens]`.
        grad_values: f32 [&[tokens]] over ["stored_values"],
        /// Gradient with respect to entropy, `[tokens]`.
        grad_entropy: f32 [&[tokens]] over ["stored_entropy"],
    }
}

/// The loss and what else the pass over the tokens found.
///
/// Means, fractions and variances are over the unmasked tokens, each counting the same, whatever
/// the aggregation. NaN stands for what is not defined: the input was not given, or there is no
/// unmasked token. The ratio and d = logp - old_logp are those of the loss, after the clamp.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct PpoStats {
    /// The total, as it is minimised.
    pub loss: f64,
    /// The aggregated policy term.
    pub policy_loss: f64,
    /// The aggregated value term, before `value_coef`.
    pub value_loss: f64,
    /// Share of tokens that are clipped, as the option `clip_fraction` counts them.
    pub clip_fraction: f64,
    /// Share of tokens bounded by the dual clip.
    pub lower_clip_fraction: f64,
    /// Share of tokens whose clipped value has the larger error.
    pub value_clip_fraction: f64,
    /// Mean of -d, the first estimate of KL(old || new).
    pub approx_kl_k1: f64,
    /// Mean of d^2 / 2.
    pub approx_kl_k2: f64,
    /// Mean of ratio - 1 - d.
    pub approx_kl_k3: f64,
    /// Mean of the ratio.
    pub ratio_mean: f64,
    /// Variance of the ratio, biased.
    pub ratio_var: f64,
    /// Smallest ratio.
    pub ratio_min: f64,
    /// Largest ratio.
    pub ratio_max: f64,
    /// Mean entropy.
    pub entropy_mean: f64,
    /// Mean of the KL estimate against the reference model.
    pub kl_mean: f64,
    /// Mean advantage.
    pub advantage_mean: f64,
    /// Mean return.
    pub return_mean: f64,
    /// Mean value.
    pub value_mean: f64,
    /// 1 - Var(returns - values) / Var(returns), with the values that are trained; NaN where the
    /// returns do not vary.
    pub explained_variance: f64,
    /// Number of unmasked tokens.
    pub tokens: f64,
}

impl PpoStats {
    /// How many numbers these are.
    pub const LEN: usize = size_of::<Self>() / size_of::<f64>();

    /// The fields' names, in order.
    pub const NAMES: [&'static str; Self::LEN] = [
        "loss",
        "policy_loss",
        "value_loss",
        "clip_fraction",
        "lower_clip_fraction",
        "value_clip_fraction",
        "approx_kl_k1",
        "approx_kl_k2",
        "approx_kl_k3",
        "ratio_mean",
        "ratio_var",
        "ratio_min",
        "ratio_max",
        "entropy_mean",
        "kl_mean",
        "advantage_mean",
        "return_mean",
        "value_mean",
        "explained_variance",
        "tokens",
    ];

    /// The fields in order, as they lie in memory.
    pub fn to_array(&self) -> [f64; Self::LEN] {
        bytemuck::cast(*self)
    }

    /// The inverse of [`PpoStats::to_array`].
    pub fn from_array(array: [f64; Self::LEN]) -> Self {
        bytemuck::cast(array)
    }
}

impl Element for PpoStats {
    type Wide = PpoStats;
    #[cfg(feature = "candle")]
    type Number = f64;
}
