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
//! [`log_ratio_clamp`]: PpoLossOptions::log_ratio_clamp

#[cfg(any())] // TODO
#[allow(clippy::missing_safety_doc, clippy::too_many_arguments, clippy::type_complexity)]
pub mod capi;
pub mod cpu;
#[cfg(any(feature = "cuda", feature = "simt"))]
pub mod cuda;
pub mod reference;
#[cfg(feature = "candle")]
mod tensor;

#[cfg(feature = "candle")]
pub use tensor::{ppo_loss, PpoLossInputs, PpoLossOutput, PpoLossValueInputs, PpoStatsTensor};

use crate::error::{Error, Result};
use crate::kl::{KlEstimator, KlOptions};

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
            positive("aggregation", divisor)?;
            let expected = "none with Aggregation::Constant";
            self.denominator.map_or(Ok(()), |x| check("denominator", x, false, expected))?;
        }
        Ok(())
    }

    /// The options that need an input which may be missing.
    pub(crate) fn validate_inputs(
        &self,
        values_without_old: bool,
        entropy: bool,
        ref_logp: bool,
    ) -> Result<()> {
        if let Some(range) = self.value_clip_range.filter(|_| values_without_old) {
            let expected = "none without old_values";
            Error::check_option(OP, "value_clip_range", range, false, expected)?;
        }
        let valid = entropy || self.entropy_coef == 0.0;
        Error::check_option(OP, "entropy_coef", self.entropy_coef, valid, "0 without entropy")?;
        let valid = ref_logp || self.kl_coef == 0.0;
        Error::check_option(OP, "kl_coef", self.kl_coef, valid, "0 without ref_logp")
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

/// The inputs of the value term, each `[batch * seq_len]`.
#[derive(Debug, Clone, Copy)]
pub struct ValueInputs<'a, T> {
    /// The critic's predictions, which get the gradient.
    pub values: &'a [T],
    /// Its predictions at the time of the rollout; may be `None` when values are not clipped.
    pub old_values: Option<&'a [T]>,
    /// The targets of the regression.
    pub returns: &'a [T],
}

/// The inputs of the loss as slices of `[batch * seq_len]`, row by row: f32 for [`mod@cpu`], f64 for
/// [`mod@reference`].
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a, T> {
    /// B, the number of responses.
    pub batch: usize,
    /// T, the length they are padded to.
    pub seq_len: usize,
    /// Log-probabilities under the policy that is trained, which get the gradient.
    pub logp: &'a [T],
    /// Log-probabilities under the policy that made the rollout.
    pub old_logp: &'a [T],
    /// Advantages, already whitened if they are to be.
    pub advantages: &'a [T],
    /// For the value term.
    pub value: Option<ValueInputs<'a, T>>,
    /// Entropy of the policy's distribution at each token, which gets the gradient.
    pub entropy: Option<&'a [T]>,
    /// Log-probabilities under the reference model, for the KL term.
    pub ref_logp: Option<&'a [T]>,
    /// 0 masks a token out; `None` keeps all.
    pub mask: Option<&'a [u8]>,
}

impl<T> Inputs<'_, T> {
    /// B * T, when every length is that and no option asks for an input that is missing.
    pub(crate) fn validate(&self, options: &PpoLossOptions) -> Result<usize> {
        let value = self.value.as_ref();
        let lengths = Lengths {
            batch: self.batch,
            seq_len: self.seq_len,
            logp: self.logp.len(),
            old_logp: self.old_logp.len(),
            advantages: self.advantages.len(),
            values: value.map(|v| v.values.len()),
            old_values: value.and_then(|v| v.old_values).map(<[T]>::len),
            returns: value.map(|v| v.returns.len()),
            entropy: self.entropy.map(<[T]>::len),
            ref_logp: self.ref_logp.map(<[T]>::len),
            mask: self.mask.map(<[u8]>::len),
        };
        lengths.validate(options)
    }
}

/// How many elements each input has, wherever it is; `None` for those that are not given.
pub(crate) struct Lengths {
    pub batch: usize,
    pub seq_len: usize,
    pub logp: usize,
    pub old_logp: usize,
    pub advantages: usize,
    pub values: Option<usize>,
    pub old_values: Option<usize>,
    pub returns: Option<usize>,
    pub entropy: Option<usize>,
    pub ref_logp: Option<usize>,
    pub mask: Option<usize>,
}

impl Lengths {
    /// B * T, when every length is that and no option asks for an input that is missing.
    pub(crate) fn validate(&self, options: &PpoLossOptions) -> Result<usize> {
        options.validate()?;
        let Some(tokens) = self.batch.checked_mul(self.seq_len) else {
            return Err(Error::Shape {
                op: OP,
                arg: "logp",
                expected: "batch * seq_len within usize".into(),
                got: format!("[{}, {}]", self.batch, self.seq_len),
            });
        };
        for (arg, len) in [
            ("logp", Some(self.logp)),
            ("old_logp", Some(self.old_logp)),
            ("advantages", Some(self.advantages)),
            ("values", self.values),
            ("old_values", self.old_values),
            ("returns", self.returns),
            ("entropy", self.entropy),
            ("ref_logp", self.ref_logp),
            ("mask", self.mask),
        ] {
            len.map_or(Ok(()), |len| Error::check_len(OP, arg, len, tokens))?;
        }
        let values_without_old = self.values.is_some() && self.old_values.is_none();
        options.validate_inputs(
            values_without_old,
            self.entropy.is_some(),
            self.ref_logp.is_some(),
        )?;
        Ok(tokens)
    }
}

/// `Ok` when the gradients with respect to logp, values and entropy have the length of what they
/// are of, which is 0 where that is not given.
pub(crate) fn check_gradients(
    lengths: [Option<usize>; 3],
    tokens: usize,
    values: bool,
    entropy: bool,
) -> Result<()> {
    let names = ["grad_logp", "grad_values", "grad_entropy"];
    for ((arg, len), given) in names.into_iter().zip(lengths).zip([true, values, entropy]) {
        let expected = if given { tokens } else { 0 };
        Error::check_len(OP, arg, len.unwrap_or(expected), expected)?;
    }
    Ok(())
}

/// The loss and what else the pass over the tokens found.
///
/// Means, fractions and variances are over the unmasked tokens, each counting the same, whatever
/// the aggregation. NaN stands for what is not defined: the input was not given, or there is no
/// unmasked token. The ratio and d = logp - old_logp are those of the loss, after the clamp.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PpoStats {
    /// The total, as it is minimised.
    pub loss: f64,
    /// The aggregated policy term.
    pub policy_loss: f64,
    /// The aggregated value term, before `value_coef`.
    pub value_loss: f64,
    /// Share of tokens that are clipped, see [`ClipFractionKind`].
    pub clip_fraction: f64,
    /// Share of tokens bounded by the dual clip.
    pub lower_clip_fraction: f64,
    /// Share of tokens whose clipped value has the larger error.
    pub value_clip_fraction: f64,
    /// Mean of -d, the first estimate of KL(old || new).
    pub approx_kl_k1: f64,
    /// Mean of d²/2.
    pub approx_kl_k2: f64,
    /// Mean of r - 1 - d.
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
    /// Number of unmasked tokens; in a statistics tensor, of f32, exact up to 2^24.
    pub tokens: f64,
}

impl PpoStats {
    /// How many numbers these are.
    pub const LEN: usize = 20;

    /// The fields' names in the order of [`PpoStats::to_array`].
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

    /// The fields in order, as they lie in a statistics tensor.
    pub fn to_array(&self) -> [f64; Self::LEN] {
        [
            self.loss,
            self.policy_loss,
            self.value_loss,
            self.clip_fraction,
            self.lower_clip_fraction,
            self.value_clip_fraction,
            self.approx_kl_k1,
            self.approx_kl_k2,
            self.approx_kl_k3,
            self.ratio_mean,
            self.ratio_var,
            self.ratio_min,
            self.ratio_max,
            self.entropy_mean,
            self.kl_mean,
            self.advantage_mean,
            self.return_mean,
            self.value_mean,
            self.explained_variance,
            self.tokens,
        ]
    }

    /// The inverse of [`PpoStats::to_array`].
    pub fn from_array(array: [f64; Self::LEN]) -> Self {
        Self {
            loss: array[0],
            policy_loss: array[1],
            value_loss: array[2],
            clip_fraction: array[3],
            lower_clip_fraction: array[4],
            value_clip_fraction: array[5],
            approx_kl_k1: array[6],
            approx_kl_k2: array[7],
            approx_kl_k3: array[8],
            ratio_mean: array[9],
            ratio_var: array[10],
            ratio_min: array[11],
            ratio_max: array[12],
            entropy_mean: array[13],
            kl_mean: array[14],
            advantage_mean: array[15],
            return_mean: array[16],
            value_mean: array[17],
            explained_variance: array[18],
            tokens: array[19],
        }
    }
}
