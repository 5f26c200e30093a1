//! Preference losses: the DPO family, on pairs of a chosen and a rejected response or on labelled ones,
//! and the pairwise loss of a reward model. From the log-probabilities of tokens, or of whole responses,
//! come the loss, its gradient, implicit rewards and statistics.
//!
//! For the response in row `i` with mask m, weight w of a token (1 but for LD-DPO) and reference ref
//! (0 without one)
//!
//! ```text
//! x_i = Σ_t w m logp - Σ_t w m ref            y likewise, of the rejected response of the pair
//! a = β x, b = β y, h = a - b - γ - margin    x and y over the responses' lengths where averaged
//!
//! loss = Σ weight ℓ(a, b, h) / D + sft_coef (-Σ m logp / tokens)    the latter of chosen responses
//! ∂loss/∂logp_t = weight ∂ℓ/∂x w m / D                              one number, spread over the tokens
//! ```
//!
//! [`PreferenceLoss`] says what ℓ is, with s the logistic function and ls its logarithm. D is the number
//! of pairs (of responses in KTO), or [`PreferenceOptions::denominator`].
//!
//! | argument | shape | type | gradient |
//! |---|---|---|---|
//! | logp | `[rows, T]` | f32 | yes |
//! | ref_logp | `[rows, T]` | f32 | no |
//! | ref_sums, in its place | `[rows]` | f32 | no |
//! | mask | `[rows, T]` | u8, 0 = masked | no |
//! | lengths | `[rows]` | i64 | no |
//! | weights, margin | `[pairs]`, in KTO weights `[rows]` | f32 | no |
//! | labels, kl | `[rows]`, `[1]` | u8, f32 | no |
//! | offsets | `[rows + 1]` | i64, where the rows of a [pack](crate::pack) begin; then `[N]` stands for `[rows, T]` | no |
//!
//! Rows are the chosen responses of all pairs, and then the rejected ones in the same order. Log-probabilities
//! of whole responses are rows of one token; their `lengths` say what to average by, if the loss averages and
//! they are not averages already. KTO has any number of rows, each with a label.
//!
//! Masked tokens may hold anything, NaN included: they count nowhere and get gradient 0. So does a pair
//! of weight 0, which is left out of D and the statistics too. A response without a token has the sum 0,
//! and the average 0. Sums over tokens are in f64, since a log-ratio is the small difference of two that
//! may be in the thousands.
//!
//! Bytes of a token: 4 read, 4 more for `ref_logp`, 2 for the mask (1 without the gradient); 4 written.

#[cfg(feature = "capi")]
#[allow(missing_docs, clippy::missing_safety_doc)]
pub mod capi;
pub mod cpu;
pub mod cuda;
pub mod reference;
#[cfg(feature = "candle")]
mod tensor;

#[cfg(feature = "candle")]
pub use tensor::{
    preference_loss, reward_model_loss, PreferenceInputs, PreferenceOutput, PreferenceStatsTensor,
    RewardModelOutput, RewardModelTensors,
};

use bytemuck::{Pod, Zeroable};

use crate::error::{Error, Result};
use crate::memory::{list, Element, Space};
use crate::pack::BatchShape;

const OP: &str = "preference";

/// The loss of a pair, or in KTO of a response. ε is `label_smoothing`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "driver", derive(clap::ValueEnum, serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "driver", serde(rename_all = "kebab-case"))]
pub enum PreferenceLoss {
    /// -(1 - ε) ls(h) - ε ls(-h): DPO (Rafailov et al. 2023), and with ε cDPO.
    #[default]
    Sigmoid,
    /// (-(1 - ε) ls(h) + ε ls(-h)) / (1 - 2 ε): unbiased under flipped labels (Chowdhury et al. 2024).
    Robust,
    /// max(0, 1 - h): SLiC.
    Hinge,
    /// (x - y - 1 / (2 β))²: IPO (Azar et al. 2023). TRL averages x and y, OpenRLHF does not:
    /// `average_log_prob`.
    Ipo,
    /// `Sigmoid`, always averaged (TRL's `sigmoid_norm`).
    SigmoidNorm,
    /// KL of (s(h), s(-h)) to (1 - ε, ε): EXO (Ji et al. 2024); ε above 0.
    ExoPair,
    /// -ls(a) - (ls(-a) + ls(-b)) / 2: NCA (Chen et al. 2024).
    NcaPair,
    /// -ls(a) - ls(-b): BCO (Jung et al. 2024), without its running shift.
    BcoPair,
    /// (x - 1 / (2 β))² + (y + 1 / (2 β))²: SPPO with hard labels (Wu et al. 2024).
    SppoHard,
    /// 1 - s(a) + s(b): APO-zero (D'Oosterlinck et al. 2024).
    ApoZero,
    /// s(a) + 1 - s(h): APO-down.
    ApoDown,
    /// -ls(h) (1 - g) + e^-h g, g = s(h / τ): DiscoPOP (Lu et al. 2024), with `discopop_tau`.
    Discopop,
    /// `Sigmoid` of the sorted log-ratios of policy (chosen - rejected) and reference: AOT
    /// (Melnyk et al. 2024). The batch is the sample, and has no weights.
    Aot,
    /// `Sigmoid` of the sorted x less the sorted y.
    AotUnpaired,
    /// `Sigmoid` without a reference and always averaged: SimPO (Meng et al. 2024), with
    /// `gamma`, its target margin. TRL's margin is inside of β: γ / β there is this γ over β.
    #[cfg_attr(feature = "driver", value(name = "simpo"), serde(rename = "simpo"))]
    SimPo,
    /// `Sigmoid` without a reference: CPO (Xu et al. 2024); its likelihood term is `sft_coef`.
    Cpo,
    /// -β ls(o(x) - o(y)), o(t) = t - ln(1 - e^t), without a reference and always averaged: ORPO
    /// (Hong et al. 2024); its likelihood term is `sft_coef` 1.
    Orpo,
    /// `SimPo` of (1 - e^(-α t)) / α in place of the average t: AlphaPO (Gupta et al. 2025),
    /// with `alpha`.
    #[cfg_attr(feature = "driver", value(name = "alphapo"), serde(rename = "alphapo"))]
    AlphaPo,
    /// w_d (1 - s(β (x - kl))) of a desirable response, w_u (1 - s(β (kl - x))) of another: KTO
    /// (Ethayarajh et al. 2024). kl is max(0, mean log-ratio of mismatched prompts and responses),
    /// a constant; without it 0, which is APO-zero unpaired.
    Kto,
}

/// The replacement of the log-ratio x in h: f-DPO (Wang et al. 2023).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum FDivergence {
    /// x itself.
    #[default]
    ReverseKl,
    /// 1 - e^-x.
    ForwardKl,
    /// ln 2 + ls(x).
    JensenShannon,
    /// (e^((α - 1) x) - 1) / (α - 1), of this α other than 1.
    Alpha(f64),
}

/// Options of the preference loss. Default: DPO with β 0.1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PreferenceOptions {
    /// The loss of a pair; `Sigmoid` by default.
    pub loss: PreferenceLoss,
    /// Scale of the log-ratios, above 0; 0.1 by default (2 in SimPO).
    pub beta: f64,
    /// The share of labels taken to be wrong, 0 to 0.5: below 0.5 in `Robust` and above 0 in
    /// `ExoPair`, and 0 for losses that have none. 0 by default.
    pub label_smoothing: f64,
    /// Divides x and y, or what the f-divergence makes of them, by the responses' lengths (NeMo's
    /// `preference_average_log_probs`); false by default. Some losses always do.
    pub average_log_prob: bool,
    /// Target margin γ, subtracted from h, of losses that are as `Sigmoid`; 0 by default (0.5 to 1.4 in
    /// SimPO).
    pub gamma: f64,
    /// α of `AlphaPo`, of which 0 is `SimPo`; 0 by default, and for other losses.
    pub alpha: f64,
    /// τ of `Discopop`, above 0; 0.05 by default.
    pub discopop_tau: f64,
    /// The replacement of the log-ratio in losses of h with a reference; `ReverseKl` by default.
    pub f_divergence: FDivergence,
    /// Weight of tokens beyond the length of the shorter response of the pair, 0 to 1: LD-DPO (Liu et
    /// al. 2024). `None`, the default, is 1.
    pub ld_alpha: Option<f64>,
    /// w_d of `Kto`, 0 or above; 1 by default.
    pub desirable_weight: f64,
    /// w_u of `Kto`, 0 or above; 1 by default.
    pub undesirable_weight: f64,
    /// Factor of the mean negative log-likelihood of the chosen responses' tokens (RPO, CPO, ORPO, MPO);
    /// 0 by default, and in `Kto`.
    pub sft_coef: f64,
    /// Replaces the number of pairs D, above 0.
    ///
    /// For gradient accumulation and data parallelism, where a call sees a part of the batch: give
    /// every call the number of the whole batch, and losses and gradients add up to the whole
    /// batch's. With it a part may be without pairs.
    pub denominator: Option<f64>,
    /// Replaces the number of the chosen responses' tokens in the likelihood term, above 0.
    pub sft_denominator: Option<f64>,
}

impl Default for PreferenceOptions {
    fn default() -> Self {
        Self {
            loss: PreferenceLoss::Sigmoid,
            beta: 0.1,
            label_smoothing: 0.0,
            average_log_prob: false,
            gamma: 0.0,
            alpha: 0.0,
            discopop_tau: 0.05,
            f_divergence: FDivergence::ReverseKl,
            ld_alpha: None,
            desirable_weight: 1.0,
            undesirable_weight: 1.0,
            sft_coef: 0.0,
            denominator: None,
            sft_denominator: None,
        }
    }
}

use PreferenceLoss as Loss;

impl PreferenceLoss {
    /// Every loss, in order.
    pub const ALL: [Self; 19] = [
        Loss::Sigmoid,
        Loss::Robust,
        Loss::Hinge,
        Loss::Ipo,
        Loss::SigmoidNorm,
        Loss::ExoPair,
        Loss::NcaPair,
        Loss::BcoPair,
        Loss::SppoHard,
        Loss::ApoZero,
        Loss::ApoDown,
        Loss::Discopop,
        Loss::Aot,
        Loss::AotUnpaired,
        Loss::SimPo,
        Loss::Cpo,
        Loss::Orpo,
        Loss::AlphaPo,
        Loss::Kto,
    ];

    /// Whether it is as `Sigmoid`, whatever is done to x and y before: then there may be label smoothing,
    /// `gamma` and, if it does not sort, margins.
    pub fn is_sigmoid(self) -> bool {
        use Loss::{AlphaPo, Aot, AotUnpaired, Cpo, Sigmoid, SigmoidNorm, SimPo};
        matches!(self, Sigmoid | SigmoidNorm | Aot | AotUnpaired | SimPo | Cpo | AlphaPo)
    }

    /// Whether it has no reference, and refuses one.
    pub fn is_reference_free(self) -> bool {
        matches!(self, Loss::SimPo | Loss::Cpo | Loss::Orpo | Loss::AlphaPo)
    }

    /// Whether x and y are averages without `average_log_prob` too.
    pub fn always_averages(self) -> bool {
        matches!(self, Loss::SigmoidNorm | Loss::SimPo | Loss::Orpo | Loss::AlphaPo)
    }

    /// Whether it is of sorted log-ratios, which are the whole batch's, so that pairs have no weights.
    pub fn sorts(self) -> bool {
        matches!(self, Loss::Aot | Loss::AotUnpaired)
    }

    /// Whether an f-divergence may stand in place of the reverse KL.
    pub fn takes_f_divergence(self) -> bool {
        use Loss::{Discopop, ExoPair, Hinge, Ipo, Robust, Sigmoid, SigmoidNorm};
        matches!(self, Sigmoid | SigmoidNorm | Robust | Hinge | Ipo | ExoPair | Discopop)
    }
}

impl PreferenceOptions {
    pub(crate) fn validate(&self) -> Result<()> {
        let check = |option, value, valid, expected| {
            Error::check_option(OP, option, value, valid, expected)
        };
        let not_negative = |option, value: f64| check(option, value, value >= 0.0, "0 or more");
        let positive = |option, value: f64| check(option, value, value > 0.0, "above 0");
        let loss = self.loss;

        positive("beta", self.beta)?;
        // Some losses have 1 / β² as a factor.
        check("beta", self.beta, self.beta >= 1e-9, "1e-9 or above")?;
        let eps = self.label_smoothing;
        let (valid, expected) = match loss {
            Loss::Robust => ((0.0..0.5).contains(&eps), "0 or more and below 0.5 for this loss"),
            Loss::ExoPair => (eps > 0.0 && eps <= 0.5, "above 0 and up to 0.5 for this loss"),
            _ if loss.is_sigmoid() => ((0.0..=0.5).contains(&eps), "0 to 0.5"),
            _ => (eps == 0.0, "0 for this loss"),
        };
        check("label_smoothing", eps, valid, expected)?;
        let valid = loss.is_sigmoid() || self.gamma == 0.0;
        check("gamma", self.gamma, valid, "0 for this loss")?;
        let valid = loss == Loss::AlphaPo || self.alpha == 0.0;
        check("alpha", self.alpha, valid, "0 for this loss")?;
        positive("discopop_tau", self.discopop_tau)?;
        let code = match self.f_divergence {
            FDivergence::ReverseKl => None,
            FDivergence::ForwardKl => Some(1.0),
            FDivergence::JensenShannon => Some(2.0),
            FDivergence::Alpha(alpha) => {
                check("f_alpha", alpha, alpha != 1.0, "a number other than 1")?;
                Some(3.0)
            }
        };
        let expected = "the reverse KL, 0, for this loss";
        let allowed = loss.takes_f_divergence();
        code.map_or(Ok(()), |code| check("f_divergence", code, allowed, expected))?;
        let in_range = |x: f64| check("ld_alpha", x, (0.0..=1.0).contains(&x), "none or 0 to 1");
        self.ld_alpha.map_or(Ok(()), in_range)?;
        let expected = "none for this loss, which has no pairs";
        let paired = loss != Loss::Kto;
        self.ld_alpha.map_or(Ok(()), |x| check("ld_alpha", x, paired, expected))?;
        for (option, weight) in [
            ("desirable_weight", self.desirable_weight),
            ("undesirable_weight", self.undesirable_weight),
        ] {
            not_negative(option, weight)?;
            check(option, weight, !paired || weight == 1.0, "1 for this loss")?;
        }
        check("sft_coef", self.sft_coef, true, "a finite number")?;
        check("sft_coef", self.sft_coef, paired || self.sft_coef == 0.0, "0 for this loss")?;
        self.denominator.map_or(Ok(()), |x| positive("denominator", x))?;
        self.sft_denominator.map_or(Ok(()), |x| positive("sft_denominator", x))
    }

    /// How many units so many rows make: pairs, or in KTO rows.
    fn units(&self, rows: usize) -> Result<usize> {
        if self.loss == Loss::Kto {
            return Ok(rows);
        }
        if !rows.is_multiple_of(2) {
            let expected = "an even number of rows: as many rejected as chosen ones".into();
            let got = format!("{rows} rows");
            return Err(Error::Shape { op: OP, arg: "logp", expected, got });
        }
        Ok(rows / 2)
    }
}

/// `Ok` when labels are of a class, and lengths are none below 0.
fn check_values(labels: Option<&[u8]>, lengths: Option<&[i64]>) -> Result<()> {
    let wrong = |arg, expected, index: usize, got: i64| {
        Err(Error::Value { op: OP, arg, index, expected, got })
    };
    let wide = labels.unwrap_or_default().iter().map(|&label| i64::from(label));
    if let Some((index, label)) = wide.enumerate().find(|&(_, label)| label > 1) {
        return wrong("labels", "0 or 1", index, label);
    }
    let lengths = lengths.unwrap_or_default().iter().copied();
    if let Some((index, length)) = lengths.enumerate().find(|&(_, length)| length < 0) {
        return wrong("lengths", "0 or more", index, length);
    }
    Ok(())
}

/// No token to take the mean likelihood of.
fn no_tokens() -> Error {
    Error::Mask { op: OP, arg: "mask", expected: 1, got: 0 }
}

/// Options of the reward model's loss.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RewardModelOptions {
    /// Factor of (chosen + rejected)², which keeps rewards around 0 (TRL's
    /// `center_rewards_coefficient`); 0 or above, 0 by default.
    pub center_coef: f64,
    /// Replaces the number of pairs, above 0, as in [`PreferenceOptions`].
    pub denominator: Option<f64>,
}

impl RewardModelOptions {
    pub(crate) fn validate(&self) -> Result<()> {
        let check = |option, value, valid, expected| {
            Error::check_option(OP, option, value, valid, expected)
        };
        check("center_coef", self.center_coef, self.center_coef >= 0.0, "0 or more")?;
        self.denominator.map_or(Ok(()), |x| check("denominator", x, x > 0.0, "above 0"))
    }
}

list! {
    /// The inputs in some memory: rows of tokens, and units of rows, which are pairs, or in KTO rows.
    inputs Inputs((shape, units): (BatchShape, usize)) {
        /// Log-probabilities under the policy that is trained, which get the gradient, `[rows, T]`.
        logp: f32 [shape.tokens()],
    } optional {
        /// Log-probabilities under the reference model, `[rows, T]`; without them and `ref_sums` there is
        /// no reference.
        ref_logp: f32 [shape.tokens()],
        /// Their sums over the unmasked tokens, `[rows]`, in their place.
        ref_sums: f32 [shape.rows()],
        /// 0 where masked, `[rows, T]`; `None` keeps all.
        mask: u8 [shape.tokens()],
        /// The divisors of averages, `[rows]`, and the numbers of tokens in the likelihood term;
        /// without it, unmasked tokens.
        lengths: i64 [shape.rows()],
        /// Factors of the losses, constants, `[units]`: WPO's, say. A unit of weight 0 is left out
        /// altogether.
        weights: f32 [&[units]],
        /// Margins subtracted from h, `[units]`, of losses that are as `Sigmoid`.
        margin: f32 [&[units]],
        /// Classes of the responses, `[rows]`, 1 where desirable and else 0; given in KTO, and only there.
        labels: u8 [shape.rows()],
        /// kl of KTO, `[1]`.
        kl: f32 [&[1]],
        /// Where the rows of a [pack](crate::pack) begin, `[rows + 1]`; all that is `[rows, T]` is `[N]` then.
        offsets: i64 [&shape.offsets()],
    }
}

impl<S: Space> Inputs<'_, S> {
    /// `Ok` when what is given goes with the options and each other.
    fn check_given(&self, options: &PreferenceOptions) -> Result<()> {
        let loss = options.loss;
        // Words for what is given where it must not be.
        let refuse = |arg, given: bool, expected: &str| match given {
            false => Ok(()),
            true => {
                let (expected, got) = (expected.into(), "given".into());
                Err(Error::Option { op: OP, option: arg, expected, got })
            }
        };
        let [ref_logp, ref_sums] = [self.ref_logp.is_some(), self.ref_sums.is_some()];
        refuse("ref_sums", ref_sums && ref_logp, "none beside `ref_logp`")?;
        if loss.is_reference_free() {
            let expected = "none: this loss has no reference; take Sigmoid for one that has";
            refuse("ref_logp", ref_logp, expected)?;
            refuse("ref_sums", ref_sums, expected)?;
        }
        let expected =
            "none for a loss of the sorted batch, whose pairs are no longer the caller's";
        refuse("weights", loss.sorts() && self.weights.is_some(), expected)?;
        refuse("margin", loss.sorts() && self.margin.is_some(), expected)?;
        let expected = "none for this loss, which is not as Sigmoid";
        refuse("margin", !loss.is_sigmoid() && self.margin.is_some(), expected)?;
        if loss == Loss::Kto {
            return Error::check_given(OP, ["loss", "labels"], [true, self.labels.is_some()]);
        }
        let expected = "none for a loss of pairs; take Kto for labelled responses";
        refuse("labels", self.labels.is_some(), expected)?;
        refuse("kl", self.kl.is_some(), expected)
    }
}

list! {
    /// The outputs in some memory. None may be the memory of an input.
    outputs Outputs((shape, units): (BatchShape, usize)) {
        /// The loss and the statistics, `[1]`.
        stats: PreferenceStats [&[1]],
    } optional {
        /// The loss once more, rounded to f32, `[1]`, if wanted.
        loss: f32 [&[1]],
        /// The losses of the units, times their weights, `[units]`, if wanted.
        losses: f32 [&[units]],
        /// Implicit rewards of the responses, `[rows]`, if wanted: β x, averaged if the loss averages, and
        /// in AlphaPO what stands in its place.
        rewards: f32 [shape.rows()],
        /// Gradient with respect to logp, for an upstream gradient of 1, `[rows, T]`, if wanted.
        grad_logp: f32 [shape.tokens()],
    }
}

list! {
    /// The inputs of the reward model's loss in some memory.
    inputs RewardModelInputs(pairs: usize) {
        /// Rewards, which get the gradient, `[2, pairs]`: of the chosen responses, and of the rejected ones.
        rewards: f32 [&[2], &[pairs]],
    } optional {
        /// How much more the chosen response is to get, `[pairs]`.
        margin: f32 [&[pairs]],
        /// Factors of the losses, constants, `[pairs]`. A pair of weight 0 is left out altogether.
        weights: f32 [&[pairs]],
    }
}

list! {
    /// The outputs of the reward model's loss in some memory.
    outputs RewardModelOutputs(pairs: usize) {
        /// The loss and the statistics, `[1]`.
        stats: PreferenceStats [&[1]],
    } optional {
        /// The loss once more, rounded to f32, `[1]`, if wanted.
        loss: f32 [&[1]],
        /// The losses of the pairs, times their weights, `[pairs]`, if wanted.
        losses: f32 [&[pairs]],
        /// Gradient with respect to rewards, for an upstream gradient of 1, `[2, pairs]`, if wanted.
        grad_rewards: f32 [&[2], &[pairs]],
    }
}

/// The function of the scores a, b and h of a pair, or of a labelled response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Link {
    Logistic,
    Hinge,
    Square,
    Exo,
    Nca,
    Bco,
    Sppo,
    ApoZero,
    ApoDown,
    Discopop,
    Kto,
}

/// The transform of a log-ratio into a score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Transform {
    Identity,
    ForwardKl,
    JensenShannon,
    Alpha,
    LogOdds,
    AlphaPo,
}

/// The scores that are sorted over the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Sorted {
    Nothing,
    /// The log-ratios of chosen to rejected, of the policy and of the reference.
    Pairs,
    /// x and y.
    Sides,
}

/// The options reduced to terms, for the passes of both backends: a new loss is one of these links with
/// other numbers, or one more.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Terms {
    /// Scale of the rewards.
    beta: f64,
    /// Factor of the scores in a, b and h, and of the loss.
    inner: f64,
    outer: f64,
    /// Factors of -ls(h) and -ls(-h); in EXO the logarithms of the shares.
    right: f64,
    wrong: f64,
    gamma: f64,
    /// The factor of x in the exponent of the transform.
    exponent: f64,
    tau: f64,
    desirable: f64,
    undesirable: f64,
    /// Factor of (a + b)².
    center: f64,
    /// Weight of the tokens that the shorter response does not have.
    ld_alpha: f64,
    link: Link,
    transform: Transform,
    sorted: Sorted,
    averages: i32,
}

impl Terms {
    /// Takes validated options.
    fn new(options: &PreferenceOptions) -> Self {
        let PreferenceOptions { loss, beta, label_smoothing: eps, .. } = *options;
        let link = match loss {
            Loss::Hinge => Link::Hinge,
            Loss::Ipo => Link::Square,
            Loss::ExoPair => Link::Exo,
            Loss::NcaPair => Link::Nca,
            Loss::BcoPair => Link::Bco,
            Loss::SppoHard => Link::Sppo,
            Loss::ApoZero => Link::ApoZero,
            Loss::ApoDown => Link::ApoDown,
            Loss::Discopop => Link::Discopop,
            Loss::Kto => Link::Kto,
            _ => Link::Logistic,
        };
        let (right, wrong) = match loss {
            Loss::Robust => ((1.0 - eps) / (1.0 - 2.0 * eps), -eps / (1.0 - 2.0 * eps)),
            Loss::ExoPair => ((1.0 - eps).ln(), eps.ln()),
            _ => (1.0 - eps, eps),
        };
        let (inner, outer) = match loss {
            Loss::Ipo | Loss::SppoHard => (beta, 1.0 / (beta * beta)),
            Loss::Orpo => (1.0, beta),
            _ => (beta, 1.0),
        };
        let (transform, exponent) = match (loss, options.f_divergence) {
            (Loss::Orpo, _) => (Transform::LogOdds, 0.0),
            (Loss::AlphaPo, _) if options.alpha != 0.0 => (Transform::AlphaPo, -options.alpha),
            (_, FDivergence::ReverseKl) => (Transform::Identity, 0.0),
            (_, FDivergence::ForwardKl) => (Transform::ForwardKl, -1.0),
            (_, FDivergence::JensenShannon) => (Transform::JensenShannon, 0.0),
            (_, FDivergence::Alpha(alpha)) => (Transform::Alpha, alpha - 1.0),
        };
        Self {
            beta,
            inner,
            outer,
            right,
            wrong,
            gamma: options.gamma,
            exponent,
            tau: options.discopop_tau,
            desirable: options.desirable_weight,
            undesirable: options.undesirable_weight,
            center: 0.0,
            ld_alpha: options.ld_alpha.unwrap_or(1.0),
            link,
            transform,
            sorted: match loss {
                Loss::Aot => Sorted::Pairs,
                Loss::AotUnpaired => Sorted::Sides,
                _ => Sorted::Nothing,
            },
            averages: i32::from(options.average_log_prob || loss.always_averages()),
        }
    }

    /// The reward model's: DPO of rewards, without a reference, and with β 1.
    fn reward_model(options: &RewardModelOptions) -> Self {
        let own = PreferenceOptions { beta: 1.0, ..PreferenceOptions::default() };
        Self { center: options.center_coef, ..Self::new(&own) }
    }
}

/// The loss and what else was found of the responses that count.
///
/// NaN stands for what is not defined, the mean of no response. In KTO the desirable responses are the chosen
/// ones.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct PreferenceStats {
    /// The total, as it is minimised.
    pub loss: f64,
    /// The loss without the likelihood term.
    pub preference_loss: f64,
    /// Mean negative log-likelihood of the chosen responses' tokens, before `sft_coef`; in KTO NaN.
    pub sft_loss: f64,
    /// Share of pairs whose chosen response has the larger reward; in KTO NaN.
    pub accuracy: f64,
    /// `chosen_reward` less `rejected_reward`.
    pub reward_margin: f64,
    /// Mean implicit reward of the chosen responses.
    pub chosen_reward: f64,
    /// Mean implicit reward of the rejected responses.
    pub rejected_reward: f64,
    /// Mean sum of the chosen responses' log-probabilities.
    pub chosen_logp: f64,
    /// Mean sum of the rejected responses' log-probabilities.
    pub rejected_logp: f64,
    /// Number of chosen responses.
    pub chosen: f64,
    /// Number of rejected responses.
    pub rejected: f64,
}

impl PreferenceStats {
    /// How many numbers these are.
    pub const LEN: usize = size_of::<Self>() / size_of::<f64>();

    /// The fields' names, in order.
    pub const NAMES: [&'static str; Self::LEN] = [
        "loss",
        "preference_loss",
        "sft_loss",
        "accuracy",
        "reward_margin",
        "chosen_reward",
        "rejected_reward",
        "chosen_logp",
        "rejected_logp",
        "chosen",
        "rejected",
    ];

    /// The fields in order, as they lie in memory.
    pub fn to_array(&self) -> [f64; Self::LEN] {
        bytemuck::cast(*self)
    }

    /// The inverse of [`PreferenceStats::to_array`].
    pub fn from_array(array: [f64; Self::LEN]) -> Self {
        bytemuck::cast(array)
    }
}

impl Element for PreferenceStats {
    type Wide = PreferenceStats;
    #[cfg(feature = "candle")]
    type Number = f64;
}
