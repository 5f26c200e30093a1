//! Train-inference corrections: importance weights for tokens that one engine sampled and another one
//! trains on, rejections of those that the two disagree on too much, and statistics of how they differ.
//!
//! With d = old_logp - rollout_logp, the trainer's log-probability of a token less the rollout engine's,
//! n the unmasked tokens of a row and clamp(x) = x within ±[`log_ratio_clamp`]:
//!
//! ```text
//! w      = e^clamp(d), e^clamp(Σ d), e^clamp(Σ d / n) or 1                       by the level
//! weight = w where low <= w <= high, else the nearer bound or 0                  by what is outside
//! weight = 0 where a rejection's metric, of the token or its row, is out of its bounds
//! ```
//!
//! Weights go into [`ppo_loss`](crate::ppo_loss) as its input `weights`, where 0 drops a token from the sum
//! and not from the denominator. Where rejected tokens shall leave that too (verl), give the loss the mask
//! `kept` in place of its own.
//!
//! The other way is no weight at all: rollout_logp in the place of old_logp, so that the loss's own ratio is
//! the correction (verl's `bypass_mode`). Both together correct twice.
//!
//! | argument | shape | type | absent means |
//! |---|---|---|---|
//! | old_logp | `[B, T]` | f32, as the trainer computes it before the update | - |
//! | rollout_logp | `[B, T]` | f32, as the rollout engine computed it | - |
//! | mask | `[B, T]` | u8, 0 where masked | nothing is masked |
//! | offsets | `[B + 1]` | i64, where the rows of a [pack](crate::pack) begin; then `[N]` stands for `[B, T]` | rows of T tokens |
//! | weights (out) | `[B, T]` | f32, 0 where masked or rejected | |
//! | kept (out) | `[B, T]` | u8, the mask without what is rejected | |
//!
//! - **Masked** tokens of all inputs may hold NaN, and count for nothing.
//! - **NaN in rollout_logp**, where the engine could not say, counts as d = 0: of a token alone, weight 1.
//!   Such a token is in no statistic but `unscored_tokens`.
//! - **Outside the bounds of the weight** is not rejected: a weight of 0 by [`Outside::Zero`] stays in `kept`.
//! - **Gradient**: none. Everything here is a constant to the loss.
//!
//! # Metrics of rejections
//!
//! With p the token's probability by the rollout engine and q by the trainer, and k the clamped d:
//!
//! | [`RejectionMetric`] | value | who has it |
//! |---|---|---|
//! | `Ratio` | q / p; of a row the product, the geometric mean, or the extremes | all |
//! | `K2` | k²/2 | verl, Unsloth, AReaL |
//! | `K3` | e^k - 1 - k, an estimate of KL(rollout ‖ trainer) | verl, Unsloth, prime-rl |
//! | `ReverseK3` | e^-k - 1 + k, the same of KL(trainer ‖ rollout) | AReaL |
//! | `BinaryKl` | p ln(p/q) + (1 - p) ln((1 - p)/(1 - q)) | OpenRLHF |
//! | `BinaryKlMax` | the larger of that and of it with p and q exchanged | AReaL |
//! | `TotalVariation` | \|p - q\| | OpenRLHF |
//!
//! There is no `K1`: it is the logarithm of `Ratio`, and systems disagree on its sign. verl's and Unsloth's
//! bounds of `k1` are of p / q, the inverse of the weight, AReaL's are logarithms of q / p;
//! [`Rejection::verl`] and [`Rejection::areal_k1`] take their numbers as they are.
//!
//! Cost in bytes per token: 8, 1 for the mask, read once, or twice where something of a whole row decides;
//! 4 written, and 1 for `kept`. A normalisation reads and writes the weights once more.
//!
//! [`log_ratio_clamp`]: CorrectionOptions::log_ratio_clamp

#[cfg(feature = "capi")]
#[allow(missing_docs, clippy::missing_safety_doc)]
pub mod capi;
pub mod cpu;
pub mod cuda;
pub mod reference;
#[cfg(feature = "candle")]
mod tensor;

#[cfg(feature = "candle")]
pub use tensor::{correction, CorrectionInputs, CorrectionOutput, CorrectionStatsTensor};

use bytemuck::{Pod, Zeroable};

use crate::error::{Error, Result};
use crate::memory::{list, Element};
use crate::pack::BatchShape;

const OP: &str = "correction";

/// The level of a weight: a token or a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(i32)]
pub enum WeightLevel {
    /// One a token: w = e^d.
    #[default]
    Token,
    /// One a row: the geometric mean of its tokens' e^d (AReaL).
    SequenceMean,
    /// One a row: the product of its tokens' e^d (TRL, verl's `sequence`).
    SequenceSum,
    /// None: all weights are 1, but those of what is rejected.
    None,
}

/// The treatment of a weight that is outside its bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(i32)]
pub enum Outside {
    /// The bound itself: truncated importance sampling.
    #[default]
    Truncate,
    /// 0: IcePop, and TRL's modes that end in `mask`.
    Zero,
}

/// The quantity that a rejection looks at: see [the module](self).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(i32)]
pub enum RejectionMetric {
    /// Nothing is rejected.
    #[default]
    None,
    /// The ratio e^d.
    Ratio,
    /// d²/2.
    K2,
    /// e^d - 1 - d, an estimate of KL(rollout ‖ trainer).
    K3,
    /// e^-d - 1 + d, an estimate of KL(trainer ‖ rollout).
    ReverseK3,
    /// The KL of (p, 1 - p) of the rollout from (q, 1 - q) of the trainer.
    BinaryKl,
    /// The larger one of the two directions of that.
    BinaryKlMax,
    /// |p - q|.
    TotalVariation,
}

impl RejectionMetric {
    /// Whether something is rejected by it, token by token.
    fn is_of_tokens(self, level: RejectionLevel) -> bool {
        self != Self::None && level == RejectionLevel::Token
    }

    /// Whether something is rejected by it, row by row.
    fn is_of_rows(self, level: RejectionLevel) -> bool {
        self != Self::None && level != RejectionLevel::Token
    }
}

/// The part of a row that a rejection's bounds hold for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(i32)]
pub enum RejectionLevel {
    /// The token's metric; the token is rejected.
    #[default]
    Token,
    /// The mean over the row's unmasked tokens, of ratios the geometric mean; the row is rejected, as in the
    /// next two.
    SequenceMean,
    /// The sum over the row's unmasked tokens, of ratios the product.
    SequenceSum,
    /// Every unmasked token of the row: the largest to the upper bound, the smallest to the lower one.
    SequenceMax,
}

/// A rule by which tokens or rows are rejected.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Rejection {
    /// The quantity that is looked at; `None`, nothing, by default.
    pub metric: RejectionMetric,
    /// Whether it is of a token or of its row; `Token` by default.
    pub level: RejectionLevel,
    /// The lower bound of what is kept; 0 or more, of `Ratio` above 0; `None` by default.
    pub low: Option<f64>,
    /// The upper bound of what is kept; 0 or more, of `Ratio` above 0; `None` by default.
    pub high: Option<f64>,
}

impl Rejection {
    /// No rejection.
    pub const NONE: Self =
        Self { metric: RejectionMetric::None, level: RejectionLevel::Token, low: None, high: None };

    /// The rule of that name of verl's `rollout_rs`, which Unsloth has too: `token`, `seq_sum`, `seq_mean` or
    /// `seq_max`, and `_k1`, `_k2` or `_k3`. The bounds are verl's: of `k1` those of the rollout's probability
    /// over the trainer's, the inverse of the weight, and `low` is one over `high` where it is left out.
    ///
    /// # Errors
    /// If there is none of that name, or of `k1` a bound is not above 0.
    pub fn verl(name: &str, low: Option<f64>, high: f64) -> Result<Self> {
        let levels = [
            ("token_", RejectionLevel::Token),
            ("seq_sum_", RejectionLevel::SequenceSum),
            ("seq_mean_", RejectionLevel::SequenceMean),
            ("seq_max_", RejectionLevel::SequenceMax),
        ];
        let parts = levels.iter().find_map(|&(prefix, level)| {
            let metric = match name.strip_prefix(prefix)? {
                "k1" => RejectionMetric::Ratio,
                "k2" => RejectionMetric::K2,
                "k3" => RejectionMetric::K3,
                _ => return None,
            };
            Some((metric, level))
        });
        let Some((metric, level)) = parts else {
            let expected = "token, seq_sum, seq_mean or seq_max, and _k1, _k2 or _k3".to_string();
            return Err(Error::Option {
                op: OP,
                option: "name",
                expected,
                got: format!("{name:?}"),
            });
        };
        if metric != RejectionMetric::Ratio {
            return Ok(Self { metric, level, low, high: Some(high) });
        }
        for (option, bound) in [("low", low), ("high", Some(high))] {
            let bound = bound.unwrap_or(1.0);
            Error::check_option(OP, option, bound, bound > 0.0, ABOVE_0)?;
        }
        let (low, high) = (low.unwrap_or(1.0 / high), high);
        Ok(Self { metric, level, low: Some(1.0 / high), high: Some(1.0 / low) })
    }

    /// AReaL's `kl_k1`, whose bounds are of ln(q / p): those of the ratio are their exponentials.
    pub fn areal_k1(level: RejectionLevel, low: Option<f64>, high: Option<f64>) -> Self {
        let metric = RejectionMetric::Ratio;
        Self { metric, level, low: low.map(f64::exp), high: high.map(f64::exp) }
    }

    /// Rows whose geometric mean of ratios is outside (OpenRLHF's `seq` level, NeMo-RL's `seq-mask-tis`,
    /// SkyRL); the tokens of the others keep their own weights.
    pub fn geometric(low: f64, high: f64) -> Self {
        Self {
            metric: RejectionMetric::Ratio,
            level: RejectionLevel::SequenceMean,
            low: Some(low),
            high: Some(high),
        }
    }

    /// The bounds as they are compared: of ratios their logarithms.
    pub(crate) fn bounds(&self) -> (f64, f64) {
        let of = |bound: f64| match self.metric {
            RejectionMetric::Ratio => bound.ln(),
            _ => bound,
        };
        (self.low.map_or(f64::NEG_INFINITY, of), self.high.map_or(f64::INFINITY, of))
    }

    /// Whether a whole row has to be seen first.
    pub(crate) fn is_of_row(&self) -> bool {
        self.metric.is_of_rows(self.level)
    }

    fn validate(&self, [metric, low, high]: [&'static str; 3]) -> Result<()> {
        let refuse = |option, expected: &str, got: String| {
            Err(Error::Option { op: OP, option, expected: expected.to_string(), got })
        };
        if self.metric == RejectionMetric::None {
            for (option, bound) in [(low, self.low), (high, self.high)] {
                if let Some(bound) = bound {
                    return refuse(option, "none without a metric", format!("{bound:?}"));
                }
            }
            return Ok(());
        }
        if self.low.is_none() && self.high.is_none() {
            let expected = "one with a lower or an upper bound";
            return refuse(metric, expected, format!("{:?} without", self.metric));
        }
        let takes_log = self.metric == RejectionMetric::Ratio;
        check_bounds([low, high], [self.low, self.high], takes_log)
    }
}

/// A rejection as it is compared, on both backends: its bounds in f32, of ratios their logarithms, infinity
/// where there is none.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct RejectionArgs {
    metric: RejectionMetric,
    level: RejectionLevel,
    low: f32,
    high: f32,
}

impl RejectionArgs {
    fn new(rejection: &Rejection) -> Self {
        let (low, high) = rejection.bounds();
        Self {
            metric: rejection.metric,
            level: rejection.level,
            low: low as f32,
            high: high as f32,
        }
    }
}

const ABOVE_0: &str = "above 0, for its logarithm is taken; none for no bound";

/// `Ok` when bounds are in their range and do not cross.
fn check_bounds(names: [&'static str; 2], bounds: [Option<f64>; 2], takes_log: bool) -> Result<()> {
    for (option, bound) in names.into_iter().zip(bounds) {
        let Some(bound) = bound else {
            continue;
        };
        if takes_log {
            Error::check_option(OP, option, bound, bound > 0.0, ABOVE_0)?;
        } else {
            Error::check_option(OP, option, bound, bound >= 0.0, "0 or more, or none")?;
        }
    }
    if let [Some(low), Some(high)] = bounds {
        let expected = format!("{low:?} or more, the lower bound");
        Error::check_option(OP, names[1], high, high >= low, &expected)?;
    }
    Ok(())
}

/// Options of the op. Default: truncated importance sampling of tokens at 2, as in verl.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CorrectionOptions {
    /// The level of a weight, a token or a row; `Token` by default.
    pub level: WeightLevel,
    /// Clamps d, its sum or its mean to ± this before e^x; above 0. `None` clamps nothing, and then w above
    /// e^88 is infinite in f32. 20 by default, as in verl. Metrics and statistics are of the clamped d as
    /// well, but for sums over rows and probabilities.
    pub log_ratio_clamp: Option<f64>,
    /// The lower bound of the weight; 0 or more, `None` by default.
    pub low: Option<f64>,
    /// The upper bound of the weight; 0 or more, 2 by default.
    pub high: Option<f64>,
    /// The treatment of a weight that is outside; `Truncate` by default.
    pub outside: Outside,
    /// Divides all weights by the mean of those that there are before rejections, over tokens, or of a row's
    /// weights over rows (verl's `rollout_is_batch_normalize`); weights that are all 0 stay so. `false` by
    /// default.
    pub normalise: bool,
    /// A rule by which tokens or rows are rejected; none by default.
    pub rejection: Rejection,
    /// Another one: what either rejects is. Further ones are further calls, on the mask before rejection.
    pub second_rejection: Rejection,
}

impl Default for CorrectionOptions {
    fn default() -> Self {
        Self::tis(2.0)
    }
}

/// The corrections that systems have.
impl CorrectionOptions {
    /// The names that [`CorrectionOptions::of`] knows.
    pub const NAMES: [&'static str; 5] =
        ["tis", "sequence_tis", "icepop", "sequence_mask", "geometric_mask"];

    /// The correction of that name, one of [`CorrectionOptions::NAMES`], with the bounds that are usual:
    /// truncated at 2 (verl), IcePop within 0.5 .. 5 (OpenRLHF), the sequence mask at 3 (TRL), the geometric
    /// mask within 0.999 .. 1.002 (NeMo-RL).
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn of(name: &str) -> Result<Self> {
        Ok(match name {
            "tis" => Self::tis(2.0),
            "sequence_tis" => Self::sequence_tis(2.0),
            "icepop" => Self::icepop(0.5, 5.0),
            "sequence_mask" => Self::sequence_mask(3.0),
            "geometric_mask" => Self::geometric_mask(0.999, 1.002),
            _ => {
                let (expected, got) = (Self::NAMES.join(", "), format!("{name:?}"));
                return Err(Error::Option { op: OP, option: "name", expected, got });
            }
        })
    }

    /// Truncated importance sampling (Yao et al. 2025): a token's min(w, cap). verl's `token`, slime's, NeMo-RL's
    /// and OpenRLHF's `tis`, SkyRL's `token`; TRL's `token_truncate`.
    pub const fn tis(cap: f64) -> Self {
        Self {
            level: WeightLevel::Token,
            log_ratio_clamp: Some(20.0),
            low: None,
            high: Some(cap),
            outside: Outside::Truncate,
            normalise: false,
            rejection: Rejection::NONE,
            second_rejection: Rejection::NONE,
        }
    }

    /// TIS of the whole row's ratio: verl's and SkyRL's `sequence`, TRL's `sequence_truncate`.
    pub const fn sequence_tis(cap: f64) -> Self {
        Self { level: WeightLevel::SequenceSum, ..Self::tis(cap) }
    }

    /// IcePop (Ling team 2025): a token's w within the bounds, else 0. verl's `low_high`, slime's, NeMo-RL's and
    /// OpenRLHF's `icepop`, TRL's `token_mask`.
    pub const fn icepop(low: f64, high: f64) -> Self {
        Self { low: Some(low), outside: Outside::Zero, ..Self::tis(high) }
    }

    /// TRL's default, `sequence_mask`: the row's w up to the cap, 3 there, else 0.
    pub const fn sequence_mask(cap: f64) -> Self {
        Self { outside: Outside::Zero, log_ratio_clamp: None, ..Self::sequence_tis(cap) }
    }

    /// Tokens' own w, where the row's geometric mean is within the bounds, else 0: NeMo-RL's `seq-mask-tis`,
    /// OpenRLHF's `seq` level.
    pub fn geometric_mask(low: f64, high: f64) -> Self {
        Self { high: None, rejection: Rejection::geometric(low, high), ..Self::tis(high) }
    }

    /// AReaL's ratio of a row: its geometric mean as the weight of all its tokens, 0 outside the bounds.
    pub const fn geometric(low: f64, high: f64) -> Self {
        Self { level: WeightLevel::SequenceMean, ..Self::icepop(low, high) }
    }

    /// Rejections alone, weights of 1 elsewhere: verl's `rollout_rs`.
    pub const fn reject(rejection: Rejection) -> Self {
        Self { level: WeightLevel::None, rejection, ..Self::tis(2.0) }
    }
}

impl CorrectionOptions {
    pub(crate) fn validate(&self) -> Result<()> {
        self.log_ratio_clamp.map_or(Ok(()), |limit| {
            let expected = "above 0, or none";
            Error::check_option(OP, "log_ratio_clamp", limit, limit > 0.0, expected)
        })?;
        check_bounds(["low", "high"], [self.low, self.high], false)?;
        self.rejection.validate(["rejection.metric", "rejection.low", "rejection.high"])?;
        self.second_rejection.validate([
            "second_rejection.metric",
            "second_rejection.low",
            "second_rejection.high",
        ])
    }

    pub(crate) fn rejections(&self) -> [&Rejection; 2] {
        [&self.rejection, &self.second_rejection]
    }

    /// The bounds of the weight, infinity where there is none.
    pub(crate) fn bounds(&self) -> (f64, f64) {
        (self.low.unwrap_or(f64::NEG_INFINITY), self.high.unwrap_or(f64::INFINITY))
    }

    /// Whether a token's weight is that of its row.
    pub(crate) fn weighs_rows(&self) -> bool {
        matches!(self.level, WeightLevel::SequenceMean | WeightLevel::SequenceSum)
    }

    /// Whether something of a whole row is looked at before its tokens.
    pub(crate) fn needs_rows(&self) -> bool {
        self.weighs_rows() || self.rejections().iter().any(|rejection| rejection.is_of_row())
    }
}

list! {
    /// The inputs in some memory, each `[B, T]` but for the offsets.
    inputs Inputs(shape: BatchShape) {
        /// Log-probabilities as the trainer computes them before the update.
        old_logp: f32 [shape.tokens()],
        /// Log-probabilities as the rollout engine computed them; NaN where it could not.
        rollout_logp: f32 [shape.tokens()],
    } optional {
        /// 0 where masked; `None` keeps all.
        mask: u8 [shape.tokens()],
        /// Where the rows of a [pack](crate::pack) begin, `[B + 1]`; all that is `[B, T]` is `[N]` then.
        offsets: i64 [&shape.offsets()],
    }
}

list! {
    /// The outputs in some memory. None may be the memory of an input.
    outputs Outputs(shape: BatchShape) {
        /// Weights, `[B, T]`; 0 where masked or rejected.
        weights: f32 [shape.tokens()],
        /// The statistics, `[1]`.
        stats: CorrectionStats [&[1]],
    } optional {
        /// 1 where unmasked and not rejected, else 0, `[B, T]`, if wanted.
        kept: u8 [shape.tokens()],
    }
}

/// How the two engines differ, and what the weights are: sums that ranks can add, extremes that they can
/// compare, and the effective sample size, see [`CorrectionStats::merge`].
///
/// Sums are over `tokens`, the unmasked tokens of which the rollout engine gave a log-probability, and `rows`
/// that have such a token. Divided by those they are means: -`log_ratio_sum` / `tokens` is the first and
/// `k3_sum` / `tokens` the third estimate of KL(rollout ‖ trainer), `ratio_square_sum` / `tokens` - 1 the
/// χ² divergence, `mult_prob_error_sum` / `tokens` NeMo-RL's `token_mult_prob_error`. Nothing is NaN because
/// there is no token.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct CorrectionStats {
    /// Unmasked tokens with a log-probability of the rollout.
    pub tokens: f64,
    /// Unmasked tokens without, where it is NaN.
    pub unscored_tokens: f64,
    /// Tokens of weight 0.
    pub rejected_tokens: f64,
    /// Tokens whose w is below the lower bound of the weight.
    pub below_tokens: f64,
    /// Tokens whose w is above the upper bound of the weight.
    pub above_tokens: f64,
    /// Rows with a token.
    pub rows: f64,
    /// Rows with a token of weight 0.
    pub rejected_rows: f64,
    /// Sum of the weights.
    pub weight_sum: f64,
    /// Sum of their squares.
    pub weight_square_sum: f64,
    /// Sum of d, clamped as are the next.
    pub log_ratio_sum: f64,
    /// Sum of |d|.
    pub log_ratio_abs_sum: f64,
    /// Sum of e^d - 1 - d.
    pub k3_sum: f64,
    /// Sum of e^2d.
    pub ratio_square_sum: f64,
    /// Sum of e^|d|.
    pub mult_prob_error_sum: f64,
    /// Sum over rows of the square of their ratio, the product of e^d.
    pub row_ratio_square_sum: f64,
    /// Sum over rows of the mean of -old_logp: of logarithms of the trainer's perplexity.
    pub log_ppl_sum: f64,
    /// Sum over rows of the mean of -rollout_logp.
    pub rollout_log_ppl_sum: f64,
    /// Largest |d|; 0 of no token, as the next two.
    pub log_ratio_abs_max: f64,
    /// Largest e^d - 1 - d.
    pub k3_max: f64,
    /// Largest weight.
    pub weight_max: f64,
    /// Smallest weight; infinity of no token.
    pub weight_min: f64,
    /// Effective sample size as a share of the tokens, (Σ w)² / (tokens Σ w²); 0 where all weights are 0.
    pub ess: f64,
}

impl CorrectionStats {
    /// How many numbers these are.
    pub const LEN: usize = size_of::<Self>() / size_of::<f64>();

    /// The fields' names, in order.
    pub const NAMES: [&'static str; Self::LEN] = [
        "tokens",
        "unscored_tokens",
        "rejected_tokens",
        "below_tokens",
        "above_tokens",
        "rows",
        "rejected_rows",
        "weight_sum",
        "weight_square_sum",
        "log_ratio_sum",
        "log_ratio_abs_sum",
        "k3_sum",
        "ratio_square_sum",
        "mult_prob_error_sum",
        "row_ratio_square_sum",
        "log_ppl_sum",
        "rollout_log_ppl_sum",
        "log_ratio_abs_max",
        "k3_max",
        "weight_max",
        "weight_min",
        "ess",
    ];

    /// The statistics of no token.
    pub fn none() -> Self {
        Self { weight_min: f64::INFINITY, ..Zeroable::zeroed() }
    }

    /// Adds the statistics of another batch, the weights of either as they are.
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        self.plus(other).with_ess()
    }

    /// The fields in order, as they lie in memory.
    pub fn to_array(&self) -> [f64; Self::LEN] {
        bytemuck::cast(*self)
    }

    /// The inverse of [`CorrectionStats::to_array`].
    pub fn from_array(array: [f64; Self::LEN]) -> Self {
        bytemuck::cast(array)
    }

    /// [`CorrectionStats::merge`], but for the effective sample size.
    fn plus(self, other: Self) -> Self {
        /// Fields before the extremes.
        const SUMS: usize = CorrectionStats::LEN - 5;
        let (mut all, others) = (self.to_array(), other.to_array());
        all[..SUMS].iter_mut().zip(&others).for_each(|(sum, x)| *sum += x);
        Self {
            log_ratio_abs_max: self.log_ratio_abs_max.max(other.log_ratio_abs_max),
            k3_max: self.k3_max.max(other.k3_max),
            weight_max: self.weight_max.max(other.weight_max),
            weight_min: self.weight_min.min(other.weight_min),
            ..Self::from_array(all)
        }
    }

    fn with_ess(self) -> Self {
        let (sum, squares) = (self.weight_sum, self.weight_square_sum);
        let ess = if squares == 0.0 { 0.0 } else { sum / self.tokens * (sum / squares) };
        Self { ess, ..self }
    }

    /// The statistics where all weights are multiplied by a factor.
    fn scaled(self, factor: f64) -> Self {
        Self {
            weight_sum: self.weight_sum * factor,
            weight_square_sum: self.weight_square_sum * factor * factor,
            weight_min: self.weight_min * factor,
            weight_max: self.weight_max * factor,
            ..self
        }
    }
}

impl Element for CorrectionStats {
    type Wide = CorrectionStats;
    #[cfg(feature = "candle")]
    type Number = f64;
}

/// Sums over a run of rows.
#[derive(Debug, Clone, Copy)]
struct Sums {
    stats: CorrectionStats,
    /// The weights before rejections, of all unmasked tokens, or of all rows with one, and how many.
    normaliser: [f64; 2],
}

impl Sums {
    fn none() -> Self {
        Self { stats: CorrectionStats::none(), normaliser: [0.0; 2] }
    }

    fn merge(self, other: Self) -> Self {
        let ([a, m], [b, n]) = (self.normaliser, other.normaliser);
        Self { stats: self.stats.plus(other.stats), normaliser: [a + b, m + n] }
    }

    /// The factor of all weights.
    fn factor(&self, options: &CorrectionOptions) -> f64 {
        match self.normaliser {
            [sum, count] if options.normalise && sum != 0.0 => count / sum,
            _ => 1.0,
        }
    }

    /// The statistics of weights that have been multiplied by the factor.
    fn stats(&self, factor: f64) -> CorrectionStats {
        self.stats.scaled(factor).with_ess()
    }
}
