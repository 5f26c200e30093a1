//! The options of the loss, and the losses that have names.

use super::OP;
use crate::error::{Error, Result};
use crate::kl::{KlEstimator, KlOptions};

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
    /// Σ m L / T, not divided by the batch (verl's `seq-mean-token-sum-norm` before 0.9). w = 1, D = T,
    /// of a pack the length of its longest row, or verl's `loss_scale_factor` given as the denominator.
    SeqMeanTokenSumNorm,
    /// Σ m L / this (Dr. GRPO: batch size times the longest response allowed). 1 is the plain sum.
    Constant(f64),
    /// Σ m L / B (TRL's `luspo`). w = 1, D = all rows, those without an unmasked token too.
    BatchMeanTokenSum,
    /// The mean of the rows' means over all rows (TRL's `grpo`). w = 1 / unmasked tokens of the row,
    /// D = all rows, of which those without an unmasked token add 0.
    BatchMeanTokenMean,
    /// Σ m L / (rows T) (verl's `seq-mean-token-sum-norm` from 0.9 on). w = 1, D = T times the rows
    /// with an unmasked token.
    SeqMeanTokenSumNormRows,
}

impl Aggregation {
    /// Whether a row's terms are divided by its number of unmasked tokens.
    pub(crate) fn has_row_weights(self) -> bool {
        matches!(self, Self::SeqMeanTokenMean | Self::BatchMeanTokenMean)
    }

    /// Whether the denominator is made of the rows that have an unmasked token.
    pub(crate) fn counts_rows(self) -> bool {
        matches!(
            self,
            Self::SeqMeanTokenSum | Self::SeqMeanTokenMean | Self::SeqMeanTokenSumNormRows
        )
    }
}

/// The tokens that [`PpoStats::clip_fraction`](super::PpoStats::clip_fraction) counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClipFractionKind {
    /// Tokens whose clipped branch is the larger one, so without gradient (TRL, verl); of the other
    /// surrogates, tokens whose ratio or log-ratio is clipped.
    #[default]
    ClippedBranch,
    /// Tokens whose ratio is outside 1 - low .. 1 + high, whatever their advantage (CleanRL).
    RatioOutside,
}

/// The policy term of the ratio r = e^l, the advantage A and logp of a token. sg stops the
/// gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(i32)]
pub enum Surrogate {
    /// max(-r A, -clip(r, 1 - low, 1 + high) A), with dual clip and ratio cap: PPO, DAPO, GRPO, GSPO.
    /// With infinite clip ranges -r A.
    #[default]
    Clip,
    /// -r A of a sequence's ratio, made of log-ratios that are clipped by the sign of A before the mean:
    /// min(d, high) where A > 0, else max(d, -low): GMPO.
    LogClip,
    /// -A logp, whatever the ratio: REINFORCE, GPG, and DRO with a KL term against the old policy.
    Reinforce,
    /// -sg(clip(r, 1 - low, 1 + high)) A logp: CISPO, DPPO.
    ClippedWeight,
    /// -sg(e^λ r^k e^(-λ r)) A logp with k and λ by the sign of A, r no less than 1e-8: VESPO.
    GammaWeight,
    /// -(4/τ) sigmoid(τ (r - 1)) A with τ by the sign of A: SAPO.
    SoftGate,
}

impl Surrogate {
    /// Whether it is a weight without gradient times logp.
    pub(crate) fn weighs_logp(self) -> bool {
        matches!(self, Self::Reinforce | Self::ClippedWeight | Self::GammaWeight)
    }
}

/// The level of a ratio: a token or a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RatioLevel {
    /// One a token: l = d.
    #[default]
    Token,
    /// One a row: l is the mean of d over the row's unmasked tokens (GSPO).
    SequenceMean,
    /// One a row: l is the sum of d over the row's unmasked tokens (RLOO, VESPO).
    SequenceSum,
}

/// How the gradient of a row's ratio gets to the tokens. Without effect where the ratio is a token's, or
/// a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RatioGradient {
    /// Through the mean or the sum: every unmasked token of the row gets the same (TRL, OpenRLHF,
    /// NeMo-RL, AReaL).
    #[default]
    Spread,
    /// l = sg(l) + logp - sg(logp): each token gets that of its own term (GSPO-token; verl, SkyRL).
    OwnToken,
}

/// Which tokens a trust region keeps, of the probabilities p of the trained and p_old of the old policy.
/// The others have policy term 0. No gradient flows through the choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(i32)]
pub enum TrustRegion {
    /// All.
    #[default]
    None,
    /// Tokens with p - p_old in -low ..= high (DPPO-TV).
    TotalVariation,
    /// Tokens whose KL of (p_old, 1 - p_old) from (p, 1 - p) is at most high, or low on the side of
    /// p < p_old (DPPO-KL).
    BinaryKl,
    /// Tokens with r of the token in 1 - low ..= 1 + high (IcePop).
    Ratio,
}

/// Which bounds of a trust region hold for a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrustRegionSides {
    /// The upper one where A > 0, else the lower one: what moves back is kept (DPPO).
    #[default]
    ByAdvantage,
    /// Both.
    Both,
}

/// The policy that the KL term is against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KlAgainst {
    /// The reference model: `ref_logp`.
    #[default]
    Reference,
    /// The old policy: `old_logp` (DRO).
    Old,
    /// The policy as the rollout engine computed it: `rollout_logp`.
    Rollout,
}

/// The gradient of the KL term.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KlGradient {
    /// The estimator's own.
    #[default]
    Own,
    /// logp - ref_logp, an unbiased estimate of the gradient of the exact KL, whatever the estimator. No
    /// clamp stops it (OpenRLHF's `unbiased_gradient`, verl's estimators with a `+`).
    Reverse,
}

/// The part of a token's KL term that its ratio e^d, without gradient, multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(i32)]
pub enum KlRatio {
    /// Nothing.
    #[default]
    None,
    /// The gradient alone (OpenRLHF).
    Gradient,
    /// Value and gradient: with `K3` and [`KlGradient::Reverse`] TRL's `use_bias_correction_kl` and
    /// slime's `use_unbiased_kl`.
    Term,
}

/// Options of the loss. Default: TRL's coefficients, everything else as in most systems.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PpoLossOptions {
    /// The ratio is clipped from below at 1 - this, and from above at 1 + this unless
    /// `clip_range_high` is given; infinity does not clip; 0.2 by default. Of [`Surrogate::LogClip`] the
    /// bounds of the log-ratio.
    pub clip_range: f64,
    /// The ratio is clipped from above at 1 + this; `None`, the default, is `clip_range`. Of
    /// [`Surrogate::ClippedWeight`] it may be below 0.
    pub clip_range_high: Option<f64>,
    /// Bounds the policy term at -c A where A < 0; above 1 (3 in verl), `None` by default.
    pub dual_clip: Option<f64>,
    /// Clamps the log-ratio to ± this before e^x, with gradient 0 where it bites; `None` leaves it
    /// as it is, and then a ratio above e^88 is infinite in f32. 20 by default, as in verl and
    /// OpenRLHF: e^20 is far outside every clip range, and one stray token cannot make the loss
    /// infinite. Of a row's ratio it clamps that of the row (10 in verl).
    pub log_ratio_clamp: Option<f64>,
    /// Clips the values to the old values ± this; `None` is the plain squared error. 0.2 by
    /// default.
    pub value_clip_range: Option<f64>,
    /// Factor of the value term, which is there when values are given; 0.1 by default.
    pub value_coef: f64,
    /// Factor of the entropy, subtracted; 0 by default. It is aggregated as the policy term is, or as
    /// [`PpoLossOptions::entropy_own_mean`] says.
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
    /// The tokens that the clip fraction counts; `ClippedBranch` by default.
    pub clip_fraction: ClipFractionKind,
    /// The policy term; `Clip` by default.
    pub surrogate: Surrogate,
    /// The level of the ratio, a token or a row; `Token` by default.
    pub ratio: RatioLevel,
    /// How the gradient of a row's ratio gets to the tokens; `Spread` by default.
    pub ratio_gradient: RatioGradient,
    /// Bounds the ratio from above in the unclipped branch of [`Surrogate::Clip`], with gradient 0 where
    /// it bites (TRL's `delta`); above 0, `None` by default.
    pub ratio_cap: Option<f64>,
    /// τ of [`Surrogate::SoftGate`] where A > 0; above 0, 1 by default.
    pub soft_gate_tau_pos: f64,
    /// τ of [`Surrogate::SoftGate`] elsewhere; above 0, 1.05 by default.
    pub soft_gate_tau_neg: f64,
    /// k of [`Surrogate::GammaWeight`] where A >= 0; 0 or more, 2 by default.
    pub gamma_k_pos: f64,
    /// λ of [`Surrogate::GammaWeight`] where A >= 0; 0 or more, 3 by default.
    pub gamma_lambda_pos: f64,
    /// k of [`Surrogate::GammaWeight`] where A < 0; 0 or more, 3 by default.
    pub gamma_k_neg: f64,
    /// λ of [`Surrogate::GammaWeight`] where A < 0; 0 or more, 2 by default.
    pub gamma_lambda_neg: f64,
    /// Which tokens the policy term is taken of; `None`, all, by default.
    pub trust_region: TrustRegion,
    /// The lower bound of the trust region; 0 or more, 0.2 by default.
    pub trust_region_low: f64,
    /// The upper bound of the trust region; 0 or more, 0.2 by default.
    pub trust_region_high: f64,
    /// Which of the two bounds holds; `ByAdvantage` by default.
    pub trust_region_sides: TrustRegionSides,
    /// Drops the policy term of tokens with A < 0 in rows whose mean of rollout_logp - logp, an estimate
    /// of KL(rollout || trained), is above this (DeepSeek-V3.2's off-policy sequence mask); NaN in
    /// rollout_logp counts as 0; without rollout_logp old_logp is taken. `None` by default.
    pub off_policy_threshold: Option<f64>,
    /// The policy that the KL term is against; `Reference` by default.
    pub kl_against: KlAgainst,
    /// The gradient of the KL term; `Own` by default.
    pub kl_gradient: KlGradient,
    /// The part of the KL term that the ratio multiplies; `None`, nothing, by default.
    pub kl_ratio: KlRatio,
    /// Bounds that factor from above (10 in OpenRLHF); above 0, `None` by default.
    pub kl_ratio_cap: Option<f64>,
    /// Whether `weights` are a factor of the KL term too (DRO); `false` by default.
    pub kl_weighted: bool,
    /// Whether the entropy bonus is the mean over the unmasked tokens (TRL), whatever aggregation and
    /// denominator are; 0 where there are none. `false` by default.
    pub entropy_own_mean: bool,
    /// Whether `advantages` are `[B]`, one for all tokens of a row; `false` by default.
    pub advantages_per_row: bool,
    /// Whether `weights` are `[B]`, one for all tokens of a row; `false` by default.
    pub weights_per_row: bool,
    /// Whether the statistics have the extremes over rows of the clip fractions, which takes another look
    /// at the tokens; `false` by default.
    pub row_extremes: bool,
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
            surrogate: Surrogate::Clip,
            ratio: RatioLevel::Token,
            ratio_gradient: RatioGradient::Spread,
            ratio_cap: None,
            soft_gate_tau_pos: 1.0,
            soft_gate_tau_neg: 1.05,
            gamma_k_pos: 2.0,
            gamma_lambda_pos: 3.0,
            gamma_k_neg: 3.0,
            gamma_lambda_neg: 2.0,
            trust_region: TrustRegion::None,
            trust_region_low: 0.2,
            trust_region_high: 0.2,
            trust_region_sides: TrustRegionSides::ByAdvantage,
            off_policy_threshold: None,
            kl_against: KlAgainst::Reference,
            kl_gradient: KlGradient::Own,
            kl_ratio: KlRatio::None,
            kl_ratio_cap: None,
            kl_weighted: false,
            entropy_own_mean: false,
            advantages_per_row: false,
            weights_per_row: false,
            row_extremes: false,
        }
    }
}

/// The losses that have names, as their papers or the systems named have them. The KL term is off in all
/// of them; `kl_coef` turns it on.
impl PpoLossOptions {
    /// The names that [`PpoLossOptions::of`] knows.
    pub const NAMES: [&'static str; 16] = [
        "ppo",
        "dapo",
        "grpo",
        "dr_grpo",
        "bnpo",
        "luspo",
        "rloo",
        "gspo",
        "gspo_token",
        "gmpo",
        "cispo",
        "dppo",
        "sapo",
        "vespo",
        "reinforce",
        "gpg",
    ];

    /// The loss of that name, one of [`PpoLossOptions::NAMES`]. Of Dr. GRPO, whose paper divides by the
    /// longest response allowed, it is the one that divides by a row's length; see
    /// [`PpoLossOptions::dr_grpo`].
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn of(name: &str) -> Result<Self> {
        Ok(match name {
            "ppo" => Self::default(),
            "dapo" => Self::dapo(),
            "grpo" => Self::grpo(),
            "dr_grpo" => Self { aggregation: Aggregation::SeqMeanTokenSumNormRows, ..Self::grpo() },
            "bnpo" => Self::bnpo(),
            "luspo" => Self::luspo(),
            "rloo" => Self::rloo(),
            "gspo" => Self::gspo(),
            "gspo_token" => Self::gspo_token(),
            "gmpo" => Self::gmpo(),
            "cispo" => Self::cispo(),
            "dppo" => Self::dppo(),
            "sapo" => Self::sapo(),
            "vespo" => Self::vespo(),
            "reinforce" => Self::reinforce(),
            "gpg" => Self::gpg(),
            _ => {
                let (expected, got) = (Self::NAMES.join(", "), format!("{name:?}"));
                return Err(Error::Option { op: OP, option: "name", expected, got });
            }
        })
    }

    /// DAPO (Yu et al. 2025): clip-higher, 0.2 and 0.28; every token of the batch counts the same, so give
    /// the whole batch's number of tokens as the denominator.
    pub fn dapo() -> Self {
        Self { clip_range_high: Some(0.28), ..Self::default() }
    }

    /// GRPO (Shao et al. 2024): the mean of the rows' means, over all rows.
    pub fn grpo() -> Self {
        Self { aggregation: Aggregation::BatchMeanTokenMean, ..Self::default() }
    }

    /// Dr. GRPO (Liu et al. 2025): the sum over tokens, divided by `rows` of the whole batch times the
    /// longest response allowed.
    pub fn dr_grpo(rows: usize, max_response_len: usize) -> Self {
        let divisor = rows as f64 * max_response_len as f64;
        Self { aggregation: Aggregation::Constant(divisor), ..Self::default() }
    }

    /// BNPO (TRL): the mean over the tokens of the call.
    pub fn bnpo() -> Self {
        Self::default()
    }

    /// LUSPO (TRL): GSPO's ratio and clip range, the sum over a row's tokens, the mean over all rows.
    pub fn luspo() -> Self {
        Self { aggregation: Aggregation::BatchMeanTokenSum, ..Self::gspo() }
    }

    /// RLOO (TRL): the ratio of the whole row, clipped, and the mean over all rows.
    pub fn rloo() -> Self {
        Self { ratio: RatioLevel::SequenceSum, ..Self::grpo() }
    }

    /// GSPO (Zheng et al. 2025): the ratio is the geometric mean over the row's tokens, clipped to
    /// 1 - 3e-4 .. 1 + 4e-4.
    pub fn gspo() -> Self {
        Self {
            ratio: RatioLevel::SequenceMean,
            clip_range: 3e-4,
            clip_range_high: Some(4e-4),
            ..Self::grpo()
        }
    }

    /// GSPO-token: GSPO's ratio, of which each token gets the gradient of its own term (verl, where the
    /// log-ratio is clamped at 10).
    pub fn gspo_token() -> Self {
        Self {
            ratio_gradient: RatioGradient::OwnToken,
            log_ratio_clamp: Some(10.0),
            ..Self::gspo()
        }
    }

    /// GMPO (Zhao et al. 2025): the geometric mean of ratios that are clipped in the logarithm, to ±0.4.
    pub fn gmpo() -> Self {
        Self {
            surrogate: Surrogate::LogClip,
            ratio: RatioLevel::SequenceMean,
            clip_range: 0.4,
            ..Self::grpo()
        }
    }

    /// CISPO (MiniMax-M1, 2025): -sg(min(r, 5)) A logp. TRL advises this bound; verl has 1 ± 0.2.
    pub fn cispo() -> Self {
        Self {
            surrogate: Surrogate::ClippedWeight,
            clip_range: 1.0,
            clip_range_high: Some(4.0),
            ..Self::default()
        }
    }

    /// DPPO (verl): -sg(min(r, 20)) A logp on tokens whose probability has not moved by more than 0.2 the
    /// way that the advantage pushes it.
    pub fn dppo() -> Self {
        Self {
            clip_range_high: Some(19.0),
            trust_region: TrustRegion::TotalVariation,
            ..Self::cispo()
        }
    }

    /// DRO (Richemond et al. 2024): -A logp + beta/2 (logp - old_logp)².
    pub fn dro(beta: f64) -> Self {
        Self {
            kl_coef: beta,
            kl: KlOptions { estimator: KlEstimator::K2, ..KlOptions::default() },
            kl_against: KlAgainst::Old,
            kl_weighted: true,
            ..Self::reinforce()
        }
    }

    /// SAPO (Gao et al. 2025): a soft gate in place of the clip.
    pub fn sapo() -> Self {
        Self { surrogate: Surrogate::SoftGate, ..Self::grpo() }
    }

    /// VESPO (TRL): a weight of the whole row's ratio, which goes to 0 where that is far from 1.
    pub fn vespo() -> Self {
        Self {
            surrogate: Surrogate::GammaWeight,
            ratio: RatioLevel::SequenceSum,
            ..Self::default()
        }
    }

    /// REINFORCE (Williams 1992): -A logp.
    pub fn reinforce() -> Self {
        Self { surrogate: Surrogate::Reinforce, ..Self::default() }
    }

    /// GPG (Chu et al. 2025): the loss of REINFORCE; its advantages are
    /// [its own](crate::advantages::AdvantageOptions::gpg).
    pub fn gpg() -> Self {
        Self::reinforce()
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

        self.validate_clip()?;
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
        positive("soft_gate_tau_pos", self.soft_gate_tau_pos)?;
        positive("soft_gate_tau_neg", self.soft_gate_tau_neg)?;
        not_negative("gamma_k_pos", self.gamma_k_pos)?;
        not_negative("gamma_lambda_pos", self.gamma_lambda_pos)?;
        not_negative("gamma_k_neg", self.gamma_k_neg)?;
        not_negative("gamma_lambda_neg", self.gamma_lambda_neg)?;
        not_negative("trust_region_low", self.trust_region_low)?;
        not_negative("trust_region_high", self.trust_region_high)?;
        self.off_policy_threshold.map_or(Ok(()), |x| finite("off_policy_threshold", x))?;
        self.kl_ratio_cap.map_or(Ok(()), |x| {
            positive("kl_ratio_cap", x)?;
            check("kl_ratio_cap", x, self.kl_ratio != KlRatio::None, "none without kl_ratio")
        })
    }

    /// `Ok` when the surrogate, the ratio and what clips them go together.
    fn validate_clip(&self) -> Result<()> {
        let refuse = |option, expected: &str, got: String| {
            Err(Error::Option { op: OP, option, expected: expected.to_string(), got })
        };
        let is_number = |option, x: f64| match x.is_nan() {
            true => refuse(option, "0 or more", x.to_string()),
            false => Ok(()),
        };
        is_number("clip_range", self.clip_range)?;
        self.clip_range_high.map_or(Ok(()), |x| is_number("clip_range_high", x))?;
        let (low, high) = (self.clip_range, self.clip_range_high.unwrap_or(self.clip_range));
        if low < 0.0 {
            return refuse("clip_range", "0 or more", low.to_string());
        }
        if self.surrogate == Surrogate::ClippedWeight && !(high >= -low && high >= -1.0) {
            return refuse(
                "clip_range_high",
                "-clip_range or more, and -1 or more",
                high.to_string(),
            );
        }
        if self.surrogate != Surrogate::ClippedWeight && high < 0.0 {
            return refuse("clip_range_high", "0 or more", high.to_string());
        }
        let of_clip = [("dual_clip", self.dual_clip), ("ratio_cap", self.ratio_cap)];
        for (option, bound) in of_clip {
            let Some(bound) = bound else {
                continue;
            };
            if self.surrogate != Surrogate::Clip {
                return refuse(option, "none but with Surrogate::Clip", bound.to_string());
            }
            let least = if option == "dual_clip" { 1.0 } else { 0.0 };
            let expected =
                if option == "dual_clip" { "none or above 1" } else { "none or above 0" };
            Error::check_option(OP, option, bound, bound > least, expected)?;
        }
        let kind = self.clip_fraction;
        if self.surrogate == Surrogate::LogClip && kind == ClipFractionKind::RatioOutside {
            let expected = "ClippedBranch with Surrogate::LogClip";
            return refuse("clip_fraction", expected, format!("{kind:?}"));
        }
        match (self.surrogate, self.ratio) {
            (Surrogate::LogClip, RatioLevel::Token) => {
                let expected = "SequenceMean or SequenceSum with Surrogate::LogClip";
                refuse("ratio", expected, format!("{:?}", self.ratio))
            }
            (Surrogate::Reinforce, RatioLevel::SequenceMean | RatioLevel::SequenceSum) => {
                let expected = "Token with Surrogate::Reinforce, which has no ratio";
                refuse("ratio", expected, format!("{:?}", self.ratio))
            }
            _ => Ok(()),
        }
    }

    /// The bounds of the clipped ratio, or of the clipped log-ratio.
    pub(crate) fn ratio_bounds(&self) -> (f64, f64) {
        let (low, high) = (self.clip_range, self.clip_range_high.unwrap_or(self.clip_range));
        match self.surrogate {
            Surrogate::LogClip => (-low, high),
            _ => (1.0 - low, 1.0 + high),
        }
    }

    /// The D of the aggregation, of a batch with so many unmasked `tokens` and `rows` with one. The rows of a
    /// pack are as long as the longest.
    pub(crate) fn divisor(
        &self,
        tokens: usize,
        rows: usize,
        [batch, seq_len]: [usize; 2],
    ) -> Result<f64> {
        let own = match self.aggregation {
            Aggregation::Constant(divisor) => return Ok(divisor),
            Aggregation::TokenMean => tokens as f64,
            Aggregation::SeqMeanTokenSum | Aggregation::SeqMeanTokenMean => rows as f64,
            Aggregation::SeqMeanTokenSumNorm => seq_len as f64,
            Aggregation::BatchMeanTokenSum | Aggregation::BatchMeanTokenMean => batch as f64,
            Aggregation::SeqMeanTokenSumNormRows => rows as f64 * seq_len as f64,
        };
        match self.denominator {
            Some(given) => Ok(given),
            None if tokens == 0 && (self.needs_tokens() || batch == 0) => {
                Err(Error::Mask { op: OP, arg: "mask", expected: 1, got: 0 })
            }
            None => Ok(own),
        }
    }

    /// Whether the denominator is made of the length of rows.
    pub(crate) fn needs_length(&self) -> bool {
        let of_length = matches!(
            self.aggregation,
            Aggregation::SeqMeanTokenSumNorm | Aggregation::SeqMeanTokenSumNormRows
        );
        self.denominator.is_none() && of_length
    }

    /// Whether the loss of no token at all is undefined, and not 0.
    pub(crate) fn needs_tokens(&self) -> bool {
        let over_all = matches!(
            self.aggregation,
            Aggregation::Constant(_)
                | Aggregation::BatchMeanTokenSum
                | Aggregation::BatchMeanTokenMean
        );
        self.denominator.is_none() && !over_all
    }

    /// Whether the policy term is the clipped surrogate of tokens, and there is nothing besides: what the
    /// fastest passes take.
    pub(crate) fn is_clip_of_tokens(&self) -> bool {
        self.surrogate == Surrogate::Clip
            && self.ratio_cap.is_none()
            && self.trust_region == TrustRegion::None
            && !self.needs_rows()
    }

    /// Whether the KL term is its estimate, with its own gradient.
    pub(crate) fn is_plain_kl(&self) -> bool {
        self.kl_gradient == KlGradient::Own && self.kl_ratio == KlRatio::None && !self.kl_weighted
    }

    /// The divisor of the entropy: the number of unmasked `tokens`, or the D of the other terms.
    pub(crate) fn entropy_divisor(&self, tokens: usize, divisor: f64) -> f64 {
        // The sum over no token is 0.
        if self.entropy_own_mean {
            tokens.max(1) as f64
        } else {
            divisor
        }
    }

    /// Whether something of a whole row is looked at before its tokens.
    pub(crate) fn needs_rows(&self) -> bool {
        self.ratio != RatioLevel::Token || self.off_policy_threshold.is_some()
    }

    /// Whether all tokens of a row get the gradient of its ratio.
    pub(crate) fn spreads(&self) -> bool {
        self.ratio != RatioLevel::Token
            && self.ratio_gradient == RatioGradient::Spread
            && !self.surrogate.weighs_logp()
    }
}
