//! KL divergence of the policy from the reference model: sampled, per token, or exact, over the
//! vocabulary.
//!
//! # Sampled ([`KlOptions`])
//! From the log-probabilities of the sampled tokens, d = logp - ref_logp, both f32 of any one
//! shape:
//!
//! | [`KlEstimator`]    | value          | derivative by d |
//! |--------------------|----------------|-----------------|
//! | `K1`               | d              | 1               |
//! | `Abs`              | \|d\|          | sign(d)         |
//! | `K2`               | d²/2           | d               |
//! | `K3`               | e^-d - 1 + d   | 1 - e^-d        |
//! | `K3StraightThrough`| e^-d - 1 + d   | d               |
//!
//! The gradient to logp is the upstream gradient times the derivative, that to ref_logp its
//! negative. `log_ratio_clamp` = c clamps d to ±c before anything else (so e^-d cannot overflow),
//! `output_clamp` = c the value to ±c; where one of them bites, the gradient is 0, at a bound
//! itself it flows. Estimators: Schulman, "Approximating KL Divergence" (2020). In other systems:
//! verl's `mse` is `K2`, its `low_var_kl` is `K3` with the clamps 20 and 10, its `k3+` is
//! `K3StraightThrough` (there the gradient flows even where the value is clamped); the gradient of
//! `K2` and of `K3StraightThrough` is, on average over sampled tokens, that of the exact KL.
//!
//! Masked tokens (mask byte 0) give 0 and gradient 0, whatever they hold.
//!
//! Cost per token: forward reads 8 bytes and writes 4, backward reads 12 and writes 4 for each
//! gradient; a mask adds 1 byte read to both.
use crate::error::{Error, Result};

pub mod cpu;
pub mod reference;

/// Which estimator of the KL divergence is made of d = logp - ref_logp.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KlEstimator {
    /// d: unbiased, may be negative. What goes into the reward everywhere.
    #[default]
    K1,
    /// |d|.
    Abs,
    /// d²/2: low variance, biased; its gradient is an unbiased estimate of that of the exact KL.
    K2,
    /// e^-d - 1 + d: unbiased and never negative. What goes into the loss.
    K3,
    /// The value of `K3` with the gradient of `K2`.
    K3StraightThrough,
}

/// How the sampled KL is estimated from log-probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct KlOptions {
    /// The estimator; `K1` by default.
    pub estimator: KlEstimator,
    /// Clamps d to ± this before the estimator sees it (20 in verl and NeMo-RL); none by default.
    pub log_ratio_clamp: Option<f32>,
    /// Clamps the estimate to ± this (10 in verl, OpenRLHF and NeMo-RL); none by default.
    pub output_clamp: Option<f32>,
}

impl KlOptions {
    /// `Ok` when both clamps are positive and finite; the error names `op`.
    pub(crate) fn validate(&self, op: &'static str) -> Result<()> {
        for (option, clamp) in [
            ("log_ratio_clamp", self.log_ratio_clamp),
            ("output_clamp", self.output_clamp),
        ] {
            if let Some(limit) = clamp {
                Error::check_option(op, option, limit, limit > 0.0, "none or positive")?;
            }
        }
        Ok(())
    }
}
