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
//!
//! # Exact ([`FullKlOptions`])
//! From two tensors of logits [.., V], f32, f16 or bf16, z of the policy and w of the reference,
//! with p = softmax(z/temperature) and q = softmax(w/temperature), one f32 for each row [..]:
//!
//! - [`KlDirection::Forward`]: KL(p || q) = sum_i p_i (ln p_i - ln q_i)
//! - [`KlDirection::Reverse`]: KL(q || p) = sum_i q_i (ln q_i - ln p_i)
//!
//! Reverse is forward with the two exchanged, so the rest is said for forward. With each row's
//! maximum taken off before anything else, x = (z - max z)/temperature and
//! y = (w - max w)/temperature, P = sum e^x, Q = sum e^y and gap = sum e^x (x - y) / P:
//!
//! - KL(p || q) = gap + ln(Q/P)
//! - dKL/dz_i = p_i (x_i - y_i - gap)/temperature, which is p_i (ln p_i - ln q_i - KL)/temperature
//! - dKL/dw_i = (q_i - p_i)/temperature
//!
//! A logit of -inf is probability 0: p_i = 0 adds nothing, and q_i = 0 under p_i > 0 makes the KL
//! +inf. There dKL/dw is still as above, but dKL/dz does not exist: it is NaN in that row, except
//! 0 where z_i = -inf. A row with NaN or +inf, or all -inf, in either tensor gives NaN in that
//! row's value and gradients, and in no other. Rows masked out (mask byte 0 of [..]) are not
//! read; they give 0 and gradient 0. Nor is a row read in backward whose upstream gradient is 0.
//!
//! Cost, for logits of S bytes in each tensor and N rows: forward reads 2 S and writes 24 N (six
//! f32 per row, kept for backward); backward reads 2 S + 28 N and writes S for each gradient, in
//! the dtype of the logits.

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
pub use tensor::{full_kl, token_kl};

use crate::error::{Error, Result};

const TOKEN_OP: &str = "token_kl";
const FULL_OP: &str = "full_kl";

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

#[cfg(feature = "capi")]
impl KlEstimator {
    /// In the order of the C library's numbers.
    pub(crate) const ALL: [Self; 5] =
        [Self::K1, Self::Abs, Self::K2, Self::K3, Self::K3StraightThrough];
}

/// How the sampled KL is estimated from log-probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct KlOptions {
    /// The estimator; `K1` by default.
    pub estimator: KlEstimator,
    /// Clamps d to ± this before the estimator sees it (20 in verl and NeMo-RL); none by default.
    pub log_ratio_clamp: Option<f64>,
    /// Clamps the estimate to ± this (10 in verl, OpenRLHF and NeMo-RL); none by default.
    pub output_clamp: Option<f64>,
}

impl KlOptions {
    /// `Ok` when both clamps are positive and finite; the error names `op`.
    pub(crate) fn validate(&self, op: &'static str) -> Result<()> {
        self.validate_as(op, ["log_ratio_clamp", "output_clamp"])
    }

    /// [`KlOptions::validate`] for an op that has these among other options: the names that its
    /// caller knows them by.
    pub(crate) fn validate_as(&self, op: &'static str, names: [&'static str; 2]) -> Result<()> {
        for (option, clamp) in names.into_iter().zip([self.log_ratio_clamp, self.output_clamp]) {
            if let Some(limit) = clamp {
                Error::check_option(op, option, limit, limit > 0.0, "none or positive")?;
            }
        }
        Ok(())
    }
}

/// Over which of the two distributions the exact KL takes its mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KlDirection {
    /// KL(policy || reference), the mean over the policy: what the sampled estimators estimate.
    #[default]
    Forward,
    /// KL(reference || policy), the mean over the reference, as in distillation.
    Reverse,
}

/// How the exact KL is computed from two tensors of logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FullKlOptions {
    /// The direction; `Forward` by default.
    pub direction: KlDirection,
    /// Divides both logits; 1e-30 to 1e30, 1 by default.
    pub temperature: f64,
}

impl Default for FullKlOptions {
    fn default() -> Self {
        Self { direction: KlDirection::Forward, temperature: 1.0 }
    }
}

impl FullKlOptions {
    /// `Ok` when the temperature is in range; the error names `op`.
    pub(crate) fn validate(&self, op: &'static str) -> Result<()> {
        let t = self.temperature;
        // Its inverse has to fit into f32: a scale of 0 or infinity makes NaN of legal logits.
        Error::check_option(op, "temperature", t, (1e-30..=1e30).contains(&t), "1e-30 to 1e30")
    }

    /// The pair as (the distribution of the mean, the other one), from (policy, reference) and
    /// back.
    pub(crate) fn order<T>(&self, policy: T, reference: T) -> (T, T) {
        match self.direction {
            KlDirection::Forward => (policy, reference),
            KlDirection::Reverse => (reference, policy),
        }
    }
}

/// The number of tokens, when the inputs have as many and the options are in range.
fn check_tokens(
    options: &KlOptions,
    logp: usize,
    ref_logp: usize,
    mask: Option<usize>,
) -> Result<usize> {
    options.validate(TOKEN_OP)?;
    Error::check_len(TOKEN_OP, "ref_logp", ref_logp, logp)?;
    Error::check_len(TOKEN_OP, "mask", mask.unwrap_or(logp), logp)?;
    Ok(logp)
}

/// `Ok` when what the backward pass takes and makes, as far as wanted, has so many tokens.
fn check_token_grads(
    tokens: usize,
    grad_kl: usize,
    grad_logp: Option<usize>,
    grad_ref_logp: Option<usize>,
) -> Result<()> {
    Error::check_len(TOKEN_OP, "grad_kl", grad_kl, tokens)?;
    Error::check_len(TOKEN_OP, "grad_logp", grad_logp.unwrap_or(tokens), tokens)?;
    Error::check_len(TOKEN_OP, "grad_ref_logp", grad_ref_logp.unwrap_or(tokens), tokens)
}

/// The number of rows, when the logits make rows of a vocabulary that is not empty, the mask fits
/// and the options are in range.
fn check_rows(
    options: &FullKlOptions,
    logits: usize,
    ref_logits: usize,
    vocab: usize,
    mask: Option<usize>,
) -> Result<usize> {
    options.validate(FULL_OP)?;
    if vocab == 0 || !logits.is_multiple_of(vocab) {
        return Err(Error::Shape {
            op: FULL_OP,
            arg: "logits",
            expected: format!("[N, {}]", vocab.max(1)),
            got: format!("[{logits}] for a vocabulary of {vocab}"),
        });
    }
    let rows = logits / vocab;
    Error::check_len(FULL_OP, "ref_logits", ref_logits, logits)?;
    Error::check_len(FULL_OP, "mask", mask.unwrap_or(rows), rows)?;
    Ok(rows)
}

fn check_stats(len: usize, rows: usize) -> Result<()> {
    Error::check_len(FULL_OP, "stats", len, cpu::STATS * rows)
}

/// `Ok` when what the backward pass takes and makes, as far as wanted, fits so many rows and logits.
fn check_full_grads(
    rows: usize,
    logits: usize,
    grad_kl: usize,
    grad_logits: Option<usize>,
    grad_ref_logits: Option<usize>,
) -> Result<()> {
    Error::check_len(FULL_OP, "grad_kl", grad_kl, rows)?;
    Error::check_len(FULL_OP, "grad_logits", grad_logits.unwrap_or(logits), logits)?;
    Error::check_len(FULL_OP, "grad_ref_logits", grad_ref_logits.unwrap_or(logits), logits)
}
