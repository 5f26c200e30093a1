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
//! - [`Divergence::Forward`]: KL(p || q) = sum_i p_i (ln p_i - ln q_i)
//! - [`Divergence::Reverse`]: KL(q || p) = sum_i q_i (ln q_i - ln p_i)
//! - [`Divergence::Jsd`]: β KL(q || m) + (1 - β) KL(p || m) with m = (1 - β) p + β q
//! - [`Divergence::SkewForward`]: KL(p || m) with m = λ p + (1 - λ) q
//! - [`Divergence::SkewReverse`]: KL(q || m) with m = λ q + (1 - λ) p
//! - [`Divergence::TotalVariation`]: 1 - sum_i min(p_i, q_i)
//!
//! Reverse is forward with the two exchanged, so the rest is said for forward. With each row's
//! maximum taken off before anything else, x = (z - max z)/temperature and
//! y = (w - max w)/temperature, P = sum e^x, Q = sum e^y and gap = sum e^x (x - y) / P:
//!
//! - KL(p || q) = gap + ln(Q/P)
//! - dKL/dz_i = p_i (x_i - y_i - gap)/temperature, which is p_i (ln p_i - ln q_i - KL)/temperature
//! - dKL/dw_i = (q_i - p_i)/temperature
//!
//! Those of a mixture m = a p + (1 - a) q are c_p KL(p || m) + c_q KL(q || m). Their terms are
//! p_i (ln(p_i/m_i) - 1 + m_i/p_i), and q's likewise: never negative, so that nothing cancels where p and q are
//! nearly equal. Of the gradients only what differs between columns counts, so that in
//!
//! - dD/dz_i = p_i (h_i - sum_j p_j h_j)/temperature
//!
//! h_i is c_p (ln(p_i/m_i) - a (p_i/m_i - 1)) - c_q a (q_i/m_i - 1); that of w is the same with p, q, c_p, c_q and
//! a, 1 - a exchanged. Of the total variation h_i is -1 where p_i <= q_i and 0 elsewhere, and to w -1 where
//! q_i < p_i. All are finite. They are from the papers of GKD (arXiv 2306.13649, whose JSD has teacher and β as
//! here q and β), DistiLLM (arXiv 2402.03898, which calls the teacher's mean forward), and TRL.
//!
//! A logit of -inf is probability 0: p_i = 0 adds nothing, and q_i = 0 under p_i > 0 makes the KL
//! +inf. There dKL/dw is still as above, but dKL/dz does not exist: it is NaN in that row, except
//! 0 where z_i = -inf. A row with NaN or +inf, or all -inf, in either tensor gives NaN in that
//! row's value and gradients, and in no other. Rows masked out (mask byte 0 of [..]) are not
//! read; they give 0 and gradient 0. Nor is a row read in backward whose upstream gradient is 0.
//!
//! Cost, for logits of S bytes in each tensor and N rows: forward reads 2 S, or of a mixture or the total
//! variation 4 S, the second half of it again what was just read, and writes 28 N (seven f32 per row, kept for
//! backward); backward reads 2 S + 32 N and writes S for each gradient, in the dtype of the logits.

#[cfg(feature = "capi")]
#[allow(missing_docs, clippy::missing_safety_doc)]
pub mod capi;
pub mod cpu;
pub mod cuda;
pub mod reference;
#[cfg(feature = "candle")]
mod tensor;

#[cfg(feature = "candle")]
pub use tensor::{full_kl, token_kl};

use crate::error::{Error, Result};
use crate::memory::list;

const TOKEN_OP: &str = "token_kl";
const FULL_OP: &str = "full_kl";

/// Values a row that the forward pass of the exact KL leaves, in this order: KL, gap, max z, P, max w,
/// Q in the terms of [the module](self), z being the policy's logits, and the reference's in reverse; of a mixture
/// and the total variation KL is the divergence, gap sum p h, and the last one sum q h.
pub const STATS: usize = 7;

/// The rows of those values, by the names that the kernels have for them too.
pub(crate) const KL: usize = 0;
pub(crate) const GAP: usize = 1;
pub(crate) const MAX_Z: usize = 2;
pub(crate) const SUM_Z: usize = 3;
pub(crate) const MAX_W: usize = 4;
pub(crate) const SUM_W: usize = 5;
pub(crate) const GAP_W: usize = 6;

/// Which estimator of the KL divergence is made of d = logp - ref_logp.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "driver", derive(clap::ValueEnum, serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "driver", serde(rename_all = "kebab-case"))]
#[repr(i32)]
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

/// Which divergence of the two distributions is computed; p is the policy's and q the reference's, the teacher's
/// in distillation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(i32)]
pub enum Divergence {
    /// KL(p || q), the mean over the policy: what the sampled estimators estimate.
    #[default]
    Forward,
    /// KL(q || p), the mean over the reference, as in distillation.
    Reverse,
    /// The Jensen-Shannon divergence, generalised by β: β KL(q || m) + (1 - β) KL(p || m) with
    /// m = (1 - β) p + β q (GKD). Towards the ends of β it goes to 0, and not to the KLs.
    Jsd,
    /// KL(p || λ p + (1 - λ) q): the skewed KL, which stays finite.
    SkewForward,
    /// KL(q || λ q + (1 - λ) p).
    SkewReverse,
    /// 1 - sum min(p, q), which is half of sum |p - q|.
    TotalVariation,
}

impl Divergence {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Forward,
        Self::Reverse,
        Self::Jsd,
        Self::SkewForward,
        Self::SkewReverse,
        Self::TotalVariation,
    ];
}

/// How the exact KL, or another divergence, is computed from two tensors of logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FullKlOptions {
    /// The divergence; `Forward` by default.
    pub divergence: Divergence,
    /// Divides both logits; 1e-30 to 1e30, 1 by default.
    pub temperature: f64,
    /// β of [`Divergence::Jsd`], above 0 and below 1; 0.5 by default.
    pub beta: f64,
    /// λ of the skewed KLs, above 0 and below 1; 0.1 by default (DistiLLM).
    pub skew: f64,
}

impl Default for FullKlOptions {
    fn default() -> Self {
        Self { divergence: Divergence::Forward, temperature: 1.0, beta: 0.5, skew: 0.1 }
    }
}

/// The mixture m = a p + (1 - a) q, and how much the KLs to it count.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Mixture {
    /// a.
    pub share: f64,
    /// c_p.
    pub coef_z: f64,
    /// c_q.
    pub coef_w: f64,
}

impl Mixture {
    /// a, 1 - a, c_p and c_q, as the passes have them.
    pub(crate) fn in_f32(&self) -> [f32; 4] {
        [self.share, 1.0 - self.share, self.coef_z, self.coef_w].map(|x| x as f32)
    }
}

impl FullKlOptions {
    /// `Ok` when the options are in range; the error names `op`.
    pub(crate) fn validate(&self, op: &'static str) -> Result<()> {
        let t = self.temperature;
        // Its inverse has to fit into f32: a scale of 0 or infinity makes NaN of legal logits.
        Error::check_option(op, "temperature", t, (1e-30..=1e30).contains(&t), "1e-30 to 1e30")?;
        let inside = |x: f64| x > 0.0 && x < 1.0;
        let expected = "above 0 and below 1, of which the KLs themselves are the ends";
        Error::check_option(op, "beta", self.beta, inside(self.beta), expected)?;
        Error::check_option(op, "skew", self.skew, inside(self.skew), expected)
    }

    /// The pair as (the distribution of the mean, the other one), from (policy, reference) and
    /// back.
    pub(crate) fn order<T>(&self, policy: T, reference: T) -> (T, T) {
        match self.divergence {
            Divergence::Reverse | Divergence::SkewReverse => (reference, policy),
            _ => (policy, reference),
        }
    }

    /// Whether the divergence is one of the KLs, for which one look at the logits is enough.
    pub(crate) fn is_kl(&self) -> bool {
        matches!(self.divergence, Divergence::Forward | Divergence::Reverse)
    }

    /// The mixture of the pair in that order, where the divergence is to one.
    pub(crate) fn mixture(&self) -> Option<Mixture> {
        match self.divergence {
            Divergence::Jsd => {
                let rest = 1.0 - self.beta;
                Some(Mixture { share: rest, coef_z: rest, coef_w: self.beta })
            }
            Divergence::SkewForward | Divergence::SkewReverse => {
                Some(Mixture { share: self.skew, coef_z: 1.0, coef_w: 0.0 })
            }
            _ => None,
        }
    }
}

/// A clamp or limit as the loops have it, without a branch: none is one at infinity.
pub(crate) fn limit(clamp: Option<f64>) -> f32 {
    clamp.map_or(f32::INFINITY, |c| c as f32)
}

list! {
    /// The inputs of the sampled KL in some memory, one value a token.
    inputs TokenForwardInputs(shape: &[usize]) {
        /// Log-probabilities under the policy, `[tokens]`.
        logp: f32 [shape],
        /// Log-probabilities under the reference, `[tokens]`.
        ref_logp: f32 [shape],
    } optional {
        /// 0 where masked, `[tokens]`.
        mask: u8 [shape],
    }
}

list! {
    /// The output of the sampled KL in some memory.
    outputs TokenForwardOutputs(shape: &[usize]) {
        /// The estimate, `[tokens]`; on a device it may be the memory of `logp` or `ref_logp`.
        kl: f32 [shape] over ["logp", "ref_logp"],
    }
}

list! {
    /// The inputs of the gradient of the sampled KL in some memory.
    inputs TokenBackwardInputs(shape: &[usize])
    with
        /// The inputs of the forward pass.
        forward: TokenForwardInputs<'a, S>
    {
        /// Upstream gradient, `[tokens]`. A token where it is 0 has gradient 0, whatever it holds.
        grad_kl: f32 [shape],
    }
}

list! {
    /// The gradients of the sampled KL in some memory, as far as wanted; on a device each may be the
    /// memory of `logp`, `ref_logp` or `grad_kl`.
    outputs TokenBackwardOutputs(shape: &[usize]) {} optional {
        /// Gradient of the policy's log-probabilities, `[tokens]`.
        grad_logp: f32 [shape] over ["logp", "ref_logp", "grad_kl"],
        /// Gradient of the reference's, `[tokens]`.
        grad_ref_logp: f32 [shape] over ["logp", "ref_logp", "grad_kl"],
    }
}

list! {
    /// The inputs of the exact KL in some memory.
    inputs FullForwardInputs<T>((leading, vocab): (&[usize], usize)) {
        /// Logits of the policy, `[rows, vocab]`.
        logits: T [leading, &[vocab]],
        /// Logits of the reference, `[rows, vocab]`.
        ref_logits: T [leading, &[vocab]],
    } optional {
        /// 0 where a row is masked, `[rows]`.
        mask: u8 [leading],
    }
}

list! {
    /// The output of the exact KL in some memory.
    outputs FullForwardOutputs(leading: &[usize]) {
        /// The values that [`STATS`] lists, `[STATS, rows]`: the first row is the KL, or the other divergence.
        stats: f32 [&[STATS], leading],
    }
}

list! {
    /// The inputs of the gradient of the exact KL in some memory.
    inputs FullBackwardInputs<T>((leading, vocab): (&[usize], usize))
    with
        /// The inputs of the forward pass.
        forward: FullForwardInputs<'a, S, T>
    {
        /// The statistics that the forward pass wrote, `[STATS, rows]`.
        stats: f32 [&[STATS], leading],
        /// Upstream gradient, `[rows]`. A row where it is 0 is not read, and has gradient 0.
        grad_kl: f32 [leading],
    }
}

list! {
    /// The gradients of the exact KL in some memory, as far as wanted, in the type of the logits.
    outputs FullBackwardOutputs<T>((leading, vocab): (&[usize], usize)) {} optional {
        /// Gradient of the policy's logits, `[rows, vocab]`; on a device it may be their memory.
        grad_logits: T [leading, &[vocab]] over ["logits"],
        /// Gradient of the reference's logits, `[rows, vocab]`; on a device it may be their memory.
        grad_ref_logits: T [leading, &[vocab]] over ["ref_logits"],
    }
}
