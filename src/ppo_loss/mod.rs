//! The PPO loss and its family: a policy term of the ratio between new and old policy, clipped value
//! loss, entropy bonus and KL penalty, with their gradients and the statistics a run is watched by, from
//! one pass over the tokens.
//!
//! For every unmasked token, with d = logp - old_logp, l = d clamped to ±[`log_ratio_clamp`], ratio
//! r = e^l and advantage A:
//!
//! ```text
//! policy  = max(-r A, -clip(r, 1 - low, 1 + high) A)        Schulman et al. 2017
//!           min(that, -c A) where A < 0, with dual clip c   Ye et al. 2020
//! value   = max((v - R)², (clip(v, v_old - ε, v_old + ε) - R)²) / 2
//! kl      = an estimate from logp - ref_logp, see `ppo_kernels::kl`
//!
//! loss = agg(weights policy) + value_coef agg(value) - entropy_coef agg(entropy) + kl_coef agg(kl)
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
//! # The family
//!
//! Other losses are options of the policy term, each by itself; [`PpoLossOptions`] has constructors for
//! those with names (DAPO, GRPO, GSPO, GMPO, CISPO, DPPO, SAPO, VESPO, REINFORCE, ..).
//!
//! | option | says |
//! |---|---|
//! | [`ratio`](PpoLossOptions::ratio) | whether l is a token's d, or the mean or the sum of d over its row |
//! | [`surrogate`](PpoLossOptions::surrogate) | what is made of r, A and logp: the clip above, or another one |
//! | [`trust_region`](PpoLossOptions::trust_region) | which tokens have a policy term at all |
//! | [`off_policy_threshold`](PpoLossOptions::off_policy_threshold) | which rows have one |
//! | `weights` (an input) | a factor of each token's policy term: importance weights, rejections, masks by entropy or covariance |
//! | `kl_*` | which policy the KL term is against, its gradient, and whether the ratio weighs it |
//!
//! What an option takes away, or a weight of 0, still counts in the denominator. A token with weight 0
//! may hold NaN as far as the policy term is concerned, if the ratio is the token's; the ratio of a row and the
//! statistics are of all unmasked tokens.
//!
//! | argument | shape | type | gradient |
//! |---|---|---|---|
//! | logp | `[B, T]` | f32 | yes |
//! | old_logp | `[B, T]` | f32 | no |
//! | advantages, weights | `[B, T]`, or `[B]` if the options say so | f32 | no |
//! | values | `[B, T]` | f32 | yes |
//! | returns, old_values (for the clip) | `[B, T]` | f32 | no |
//! | entropy | `[B, T]` | f32 | yes |
//! | ref_logp, rollout_logp | `[B, T]` | f32 | no |
//! | mask | `[B, T]` | u8, 0 = masked | no |
//! | offsets | `[B + 1]` | i64, where the rows of a [pack](crate::pack) begin; then `[N]` stands for `[B, T]` | no |
//!
//! Only the first three are needed; the value term falls away without values, and values, entropy and
//! KL are only reported where their coefficient is 0. Masked tokens may hold anything, NaN included:
//! they count nowhere and get gradient 0. NaN in an unmasked token makes the loss NaN.
//!
//! Cost per token: 12 bytes read, 12 more for the value term (8 without its clip), 4 for the
//! entropy, the KL, the weights and rollout_logp each, 2 for the mask (it is counted first); 4 bytes
//! written a gradient. A ratio of rows reads the first 12 and the mask once more, and again with the
//! weights where its gradient is spread; on the CPU it allocates some numbers a row.
//!
//! # From logits
//!
//! [`cpu::logits_ppo_loss`] and [`cuda::logits_ppo_loss`] begin a step earlier: logits `[B, T, V]` and
//! targets in, the loss with its statistics and the logits' gradient out, for an upstream gradient of 1.
//! They do what [`logprob`](crate::logprob), the loss without values and the backward pass of `logprob`
//! do, but read the logits from memory once where the cache or a multiprocessor's shared memory holds
//! them that long; twice where an option looks at a whole row, whose log-probabilities must all be there
//! first. Logits of masked tokens are not read.
//!
//! [`log_ratio_clamp`]: PpoLossOptions::log_ratio_clamp

#[cfg(feature = "capi")]
#[allow(missing_docs, clippy::missing_safety_doc)]
pub mod capi;
pub mod cpu;
pub mod cuda;
mod options;
pub mod reference;
mod surrogate;
#[cfg(feature = "candle")]
mod tensor;

pub use options::{
    Aggregation, ClipFractionKind, KlAgainst, KlGradient, KlRatio, PpoLossOptions, RatioGradient,
    RatioLevel, Surrogate, TrustRegion, TrustRegionSides,
};
#[cfg(feature = "candle")]
pub(crate) use tensor::scaled;
#[cfg(feature = "candle")]
pub use tensor::{ppo_loss, PpoLossInputs, PpoLossOutput, PpoStatsTensor};

use bytemuck::{Pod, Zeroable};

use crate::error::{Error, Result};
use crate::memory::{list, Element, Space};
use crate::pack::BatchShape;

const OP: &str = "ppo_loss";

/// The sizes that the shapes of the inputs are made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LossShape {
    batch: BatchShape,
    advantages_per_row: bool,
    weights_per_row: bool,
}

impl LossShape {
    pub(crate) fn new(batch: BatchShape, options: &PpoLossOptions) -> Self {
        let PpoLossOptions { advantages_per_row, weights_per_row, .. } = *options;
        Self { batch, advantages_per_row, weights_per_row }
    }

    fn tokens(&self) -> &[usize] {
        self.batch.tokens()
    }

    fn offsets(&self) -> [usize; 1] {
        self.batch.offsets()
    }

    fn advantages(&self) -> &[usize] {
        if self.advantages_per_row {
            self.batch.rows()
        } else {
            self.tokens()
        }
    }

    fn weights(&self) -> &[usize] {
        if self.weights_per_row {
            self.batch.rows()
        } else {
            self.tokens()
        }
    }
}

list! {
    /// The inputs in some memory, each `[B, T]` but for the offsets.
    inputs Inputs(shape: LossShape) {
        /// Log-probabilities under the policy that is trained, which get the gradient.
        logp: f32 [shape.tokens()],
        /// Log-probabilities under the policy that made the rollout.
        old_logp: f32 [shape.tokens()],
        /// Advantages, already whitened if they are to be; `[B]` with
        /// [`advantages_per_row`](PpoLossOptions::advantages_per_row).
        advantages: f32 [shape.advantages()],
    } optional {
        /// The critic's predictions, which get the gradient; without them there is no value term.
        values: f32 [shape.tokens()],
        /// Its predictions at the time of the rollout; may be left out where values are not clipped.
        old_values: f32 [shape.tokens()],
        /// The targets of the values' regression, given where they are.
        returns: f32 [shape.tokens()],
        /// Entropy of the policy's distribution at each token, which gets the gradient.
        entropy: f32 [shape.tokens()],
        /// Log-probabilities under the reference model, for the KL term.
        ref_logp: f32 [shape.tokens()],
        /// Log-probabilities of the rollout as its engine computed them.
        rollout_logp: f32 [shape.tokens()],
        /// Factors of the policy term, 0 or more; 0 drops it, whatever the token holds; `[B]` with
        /// [`weights_per_row`](PpoLossOptions::weights_per_row).
        weights: f32 [shape.weights()],
        /// 0 where masked; `None` keeps all.
        mask: u8 [shape.tokens()],
        /// Where the rows of a [pack](crate::pack) begin, `[B + 1]`; all that is `[B, T]` is `[N]` then.
        offsets: i64 [&shape.offsets()],
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
        let (valid, expected) = match options.kl_against {
            KlAgainst::Reference => (self.ref_logp.is_some(), "0 without ref_logp"),
            KlAgainst::Old => (true, ""),
            KlAgainst::Rollout => (self.rollout_logp.is_some(), "0 without rollout_logp"),
        };
        check("kl_coef", kl, valid || kl == 0.0, expected)
    }
}

list! {
    /// The outputs in some memory. None may be the memory of an input.
    outputs Outputs(shape: BatchShape) {
        /// The loss and the statistics, `[1]`.
        stats: PpoStats [&[1]],
    } optional {
        /// The loss once more, rounded to f32, `[1]`, if wanted.
        loss: f32 [&[1]],
        /// Gradient with respect to logp, for an upstream gradient of 1, `[B, T]`, if wanted.
        grad_logp: f32 [shape.tokens()],
        /// Gradient with respect to values, `[B, T]`, if wanted; only with values.
        grad_values: f32 [shape.tokens()],
        /// Gradient with respect to entropy, `[B, T]`, if wanted; only with entropy.
        grad_entropy: f32 [shape.tokens()],
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
    inputs LogitsInputs<T, I>((shape, vocab): (LossShape, usize)) {
        /// Logits of the policy that is trained, which get the gradient, `[B, T, vocab]`.
        logits: T [shape.tokens(), &[vocab]],
        /// Ids of the tokens, `[B, T]`.
        targets: I [shape.tokens()],
        /// Log-probabilities under the policy that made the rollout, `[B, T]`.
        old_logp: f32 [shape.tokens()],
        /// Advantages, already whitened if they are to be, `[B, T]` or `[B]`.
        advantages: f32 [shape.advantages()],
    } optional {
        /// Log-probabilities under the reference model, for the KL term, `[B, T]`.
        ref_logp: f32 [shape.tokens()],
        /// Log-probabilities of the rollout as its engine computed them, `[B, T]`.
        rollout_logp: f32 [shape.tokens()],
        /// Factors of the policy term, 0 or more; 0 drops it, `[B, T]` or `[B]`.
        weights: f32 [shape.weights()],
        /// 0 where masked, `[B, T]`; `None` keeps all.
        mask: u8 [shape.tokens()],
        /// Where the rows of a [pack](crate::pack) begin, `[B + 1]`; all that is `[B, T]` is `[N]` then.
        offsets: i64 [&shape.offsets()],
    }
}

list! {
    /// The outputs of the loss from logits in some memory.
    outputs LogitsOutputs<T>((shape, vocab): (BatchShape, usize)) {
        /// Log-probabilities of the targets, `[B, T]`; 0 where masked.
        logp: f32 [shape.tokens()],
        /// The loss and the statistics, `[1]`.
        stats: PpoStats [&[1]],
        /// Gradient with respect to the logits, for an upstream gradient of 1, `[B, T, vocab]`; on a
        /// device it may be the memory of the logits.
        grad_logits: T [shape.tokens(), &[vocab]] over ["logits"],
    } optional {
        /// Entropies, `[B, T]`, 0 where masked; wanted where `entropy_coef` is not 0.
        entropy: f32 [shape.tokens()],
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
/// the aggregation; those of weight 0, and those that an option takes away, count too. NaN stands for
/// what is not defined: the input was not given, or there is no unmasked token. The ratio is that of the
/// loss, and d = logp - old_logp the token's, both after the clamp.
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
    /// Share of tokens that are clipped, as above, and have A > 0.
    pub clip_high_fraction: f64,
    /// Share of tokens that are clipped, as above, and do not have A > 0.
    pub clip_low_fraction: f64,
    /// Largest share of a row's tokens that are clipped and have A > 0, over rows with an unmasked token;
    /// NaN without `row_extremes`.
    pub clip_high_row_max: f64,
    /// Smallest share of a row's tokens that are clipped and do not have A > 0, likewise.
    pub clip_low_row_min: f64,
    /// Share of tokens outside the trust region.
    pub outside_fraction: f64,
    /// Share of tokens with A < 0 in rows that are too far off the policy.
    pub off_policy_fraction: f64,
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
        "clip_high_fraction",
        "clip_low_fraction",
        "clip_high_row_max",
        "clip_low_row_min",
        "outside_fraction",
        "off_policy_fraction",
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
