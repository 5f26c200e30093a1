//! Advantages from one score a sequence: what GRPO, RLOO and their relatives have in the place of a value
//! function.
//!
//! Rows are sequences, and a group is the rows of one prompt. With x_i = clip(score_i) - score_baselines_i, row
//! i of group g, which has n rows, gets
//!
//! ```text
//! A_i = (x_i - b_i) / (s_i + eps)        A_it = m_it A_i
//! ```
//!
//! | [`Baseline`] | b_i | | [`Scale`] | s_i |
//! |---|---|---|---|---|
//! | `None` | 0 | | `None` | 1, without eps |
//! | `Group` | mean of the group | | `Group` | standard deviation of the group |
//! | `LeaveOneOut` | mean of the others in it | | `LeaveOneOut` | that of the others in it |
//! | `Batch` | mean of all rows | | `Batch` | that of all rows |
//! | `LengthWeighted` | Σ len x / Σ len in the group | | `Mean` | mean of the group |
//! | `RunnerUp` | second best of the group, for the best; others get 0 | | `Nonzero` | share of all rows with x ≠ 0 |
//!
//! The estimators of the field are combinations of these, which [`AdvantageOptions`] has by name:
//!
//! | | baseline | scale | |
//! |---|---|---|---|
//! | [`grpo`](AdvantageOptions::grpo) | `Group` | `Group` | the default; arXiv 2402.03300 |
//! | [`dr_grpo`](AdvantageOptions::dr_grpo) | `Group` | `None` | arXiv 2503.20783 |
//! | [`rloo`](AdvantageOptions::rloo) | `LeaveOneOut` | `None` | arXiv 2402.14740 |
//! | [`reinforce_plus_plus_baseline`](AdvantageOptions::reinforce_plus_plus_baseline) | `Group` | `None` | then [`masked_whiten`](crate::whiten) over tokens; arXiv 2501.03262 |
//! | [`opo`](AdvantageOptions::opo) | `LengthWeighted` | `None` | arXiv 2505.23585 |
//! | [`pass_at_k`](AdvantageOptions::pass_at_k) | `RunnerUp` | `Group` | arXiv 2503.19595 |
//! | [`max_rl`](AdvantageOptions::max_rl) | `Group` | `Mean` | SkyRL |
//! | [`gpg`](AdvantageOptions::gpg) | `Group` | `Nonzero` | arXiv 2504.02546 |
//! | [`remax`](AdvantageOptions::remax) | `None` | `None` | with the scores of greedy answers as `score_baselines`; arXiv 2310.10505 |
//!
//! Several rewards, each normalised by itself before they are added up (GDPO), are a call for each and one
//! with `Baseline::Batch` and `Scale::Batch` of their weighted sum: `gdpo`. REINFORCE++ is
//! [`gae`](crate::gae) with values of 0 and λ = 1, whitened.
//!
//! verl's optimal token baseline, another number for each token of a group, is a function of its own,
//! `optimal_token_baseline`. With G_it the sum of the rewards from token t on, and W_it that of w² ‖onehot - p‖²,
//! the squared norms of the gradients to the logits, up to it,
//!
//! ```text
//! A_it = G_it - Σ_i W_it G_it / (Σ_i W_it + eps)      over the rows i of the group
//! ```
//!
//! with ‖onehot - p‖² = (1 - p_t)² + (Σ_v p_v² - p_t²), where a sum of squares up to 1e-5 of it below p_t² is
//! taken for p_t²: it is rounding.
//!
//! | argument | shape | type | absent means |
//! |---|---|---|---|
//! | scores | `[B]` | f32 | - |
//! | groups | `[B]` | i64, of any values in any order; equal ones are a group | `group_size` rows after each other are a group |
//! | lengths | `[B]` | f32, 0 or above | an error where they are the weights |
//! | score_baselines | `[B]` | f32 | 0 |
//! | mask | `[B, T]` | u8, 0 where masked | nothing is masked |
//! | offsets | `[B + 1]` | i64, where the rows of a [pack](crate::pack) begin; then `[N]` stands for `[B, T]` | rows of T tokens |
//! | advantages (out) | `[B]` | f32 | |
//! | token_advantages (out) | `[B, T]` | f32, the row's advantage on its unmasked tokens, 0 elsewhere | |
//! | stats (out) | `[1]` | [`AdvantageStats`] | |
//!
//! - **Equal scores** give exactly 0: sums are of differences from one of the scores, in f64. A naive mean
//!   in f32 makes advantages of up to 0.8 of eight times 0.1.
//! - **A standard deviation or another scale of 0**, or of too few scores to have one, divides nothing.
//! - **NaN scores** are left out of everything, and their rows get 0. What a group's statistics need is
//!   counted without them.
//! - **A group of one**: see [`Singleton`].
//! - **Infinite scores** make every row NaN that is compared with them; clip them.
//! - **Gradient**: none. Advantages are constants.
//!
//! Cost: what comes of a row is a few dozen bytes, and `token_advantages` 1 byte read where there is a mask
//! and 4 written a token. Where groups are given by ids their rows are brought together first, in the
//! order that they have, so that no bit of an advantage depends on the ids or on where those rows stand.

#[cfg(feature = "capi")]
#[allow(missing_docs, non_camel_case_types, clippy::missing_safety_doc)]
pub mod capi;
pub mod cpu;
pub mod cuda;
pub mod reference;
#[cfg(feature = "candle")]
mod tensor;

use bytemuck::{Pod, Zeroable};
#[cfg(feature = "candle")]
pub use tensor::{
    gdpo, optimal_token_baseline, outcome_advantages, AdvantageInputs, AdvantageOutput,
    AdvantageStatsTensor, TokenBaselineInputs,
};

use crate::error::{Error, Result};
use crate::memory::{list, Element, Space};
use crate::moments::Moments;
use crate::pack::BatchShape;
use crate::whiten::EpsPlacement;

const OP: &str = "advantages";

/// What is subtracted from a score.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(i32)]
pub enum Baseline {
    /// Nothing.
    None,
    /// The mean of the group (GRPO, Dr. GRPO).
    #[default]
    Group,
    /// The mean of the others in the group (RLOO).
    LeaveOneOut,
    /// The mean of all rows (REINFORCE).
    Batch,
    /// The mean of the group, every row as often as it is long (OPO).
    LengthWeighted,
    /// The second best of the group, for the best one; all others get 0 (pass@k).
    RunnerUp,
}

impl Baseline {
    /// Whether it is a number of the group.
    fn of_group(self) -> bool {
        !matches!(self, Baseline::None | Baseline::Batch)
    }
}

/// What the difference is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(i32)]
pub enum Scale {
    /// Nothing.
    None,
    /// The standard deviation of the group (GRPO).
    #[default]
    Group,
    /// The standard deviation of the others in the group (NeMo-RL with its leave-one-out baseline).
    LeaveOneOut,
    /// The standard deviation of all rows (TRL's `scale_rewards="batch"`).
    Batch,
    /// The mean of the group (MaxRL), for scores of 0 and above.
    Mean,
    /// The share of all rows whose score is not 0 (GPG).
    Nonzero,
}

impl Scale {
    /// Whether it is a number of the group.
    fn of_group(self) -> bool {
        matches!(self, Scale::Group | Scale::LeaveOneOut | Scale::Mean)
    }
}

/// What becomes of a row that is the only one of its group with a score, where the baseline is a number of
/// the group. No number of the group divides it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(i32)]
pub enum Singleton {
    /// Its advantage is 0 (TRL, NeMo-RL, verl's vectorised forms).
    #[default]
    Zero,
    /// Nothing is subtracted from it (verl's loops).
    Keep,
}

/// How scores become advantages; the default is TRL's GRPO.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdvantageOptions {
    /// Added to the scale; finite, 0 or above. Default 1e-4 (TRL); verl, SkyRL and NeMo-RL have 1e-6.
    pub eps: f64,
    /// The least that scores are clipped to; may be -∞, the default. OpenRLHF clips to ±10.
    pub score_min: f64,
    /// The most that scores are clipped to; may be ∞, the default; not below `score_min`.
    pub score_max: f64,
    /// What is subtracted. Default [`Baseline::Group`].
    pub baseline: Baseline,
    /// What is divided by. Default [`Scale::Group`].
    pub scale: Scale,
    /// What a group of one gets. Default [`Singleton::Zero`].
    pub singleton: Singleton,
    /// What of a standard deviation `eps` is added to. Default the standard deviation itself.
    pub eps_placement: EpsPlacement,
    /// Divide sums of squares by n - 1 rather than n. Default true.
    pub unbiased: bool,
}

impl Default for AdvantageOptions {
    fn default() -> Self {
        Self {
            eps: 1e-4,
            score_min: f64::NEG_INFINITY,
            score_max: f64::INFINITY,
            baseline: Baseline::Group,
            scale: Scale::Group,
            singleton: Singleton::Zero,
            eps_placement: EpsPlacement::Std,
            unbiased: true,
        }
    }
}

impl AdvantageOptions {
    fn of(baseline: Baseline, scale: Scale) -> Self {
        Self { baseline, scale, ..Self::default() }
    }

    /// GRPO: mean and standard deviation of the group.
    pub fn grpo() -> Self {
        Self::default()
    }

    /// Dr. GRPO: the mean of the group, and no scale.
    pub fn dr_grpo() -> Self {
        Self::of(Baseline::Group, Scale::None)
    }

    /// RLOO: the mean of the others in the group, and no scale.
    pub fn rloo() -> Self {
        Self::of(Baseline::LeaveOneOut, Scale::None)
    }

    /// The first step of REINFORCE++-baseline: the mean of the group, and a group of one as it is. The
    /// second is [`whiten`](crate::whiten) of `token_advantages`.
    pub fn reinforce_plus_plus_baseline() -> Self {
        Self { singleton: Singleton::Keep, ..Self::dr_grpo() }
    }

    /// OPO: the mean of the group weighted by lengths, and no scale.
    pub fn opo() -> Self {
        Self::of(Baseline::LengthWeighted, Scale::None)
    }

    /// Pass@k: the lead of the group's best row over the second, in standard deviations; 0 for all others.
    pub fn pass_at_k() -> Self {
        Self::of(Baseline::RunnerUp, Scale::Group)
    }

    /// MaxRL: the mean of the group, subtracted and divided by; eps 1e-6.
    pub fn max_rl() -> Self {
        Self { eps: 1e-6, ..Self::of(Baseline::Group, Scale::Mean) }
    }

    /// GPG: the mean of the group, divided by the share of all rows whose score is not 0.
    pub fn gpg() -> Self {
        Self { eps: 0.0, ..Self::of(Baseline::Group, Scale::Nonzero) }
    }

    /// ReMax: the difference from the scores of greedy answers, the input `score_baselines`.
    pub fn remax() -> Self {
        Self::of(Baseline::None, Scale::None)
    }

    /// Whether groups are looked at.
    fn by_group(&self) -> bool {
        self.baseline.of_group() || self.scale.of_group()
    }

    /// Whether statistics of all rows are looked at.
    fn by_batch(&self) -> bool {
        self.baseline == Baseline::Batch || matches!(self.scale, Scale::Batch | Scale::Nonzero)
    }

    pub(crate) fn validate(&self) -> Result<()> {
        let Self { eps, score_min, score_max, .. } = *self;
        Error::check_option(OP, "eps", eps, eps >= 0.0, "finite and 0 or above")?;
        Error::check_bounds(OP, ["score_min", "score_max"], [score_min, score_max])
    }

    /// `Ok` when the options are in range, and what they look at is there and fits.
    fn check<S: Space>(&self, inputs: &Inputs<S>, sizes: Sizes) -> Result<()> {
        self.validate()?;
        let Sizes { batch, group_size, .. } = sizes;
        check_groups("scores", inputs.groups.is_some(), sizes)?;
        let grouped = inputs.groups.is_some() || group_size != 0;
        let needed_by = if self.baseline.of_group() { "baseline" } else { "scale" };
        Error::check_given(OP, [needed_by, "groups"], [self.by_group(), grouped])?;
        let weighted = self.baseline == Baseline::LengthWeighted;
        Error::check_given(OP, ["baseline", "lengths"], [weighted, inputs.lengths.is_some()])?;
        if self.baseline == Baseline::RunnerUp && group_size == 1 && batch > 0 {
            return Err(no_runner_up(0));
        }
        Ok(())
    }

    /// `Some(variance)` if that many scores have one.
    fn variance(&self, moments: &Moments) -> Option<f64> {
        let least = if self.unbiased { 2.0 } else { 1.0 };
        (moments.count >= least).then(|| moments.variance(self.unbiased))
    }

    /// What a standard deviation divides by: 1 where there is none, or it is 0.
    fn by_std(&self, variance: Option<f64>) -> f64 {
        match variance {
            None | Some(0.0) => 1.0,
            Some(variance) => match self.eps_placement {
                EpsPlacement::Variance => (variance + self.eps).sqrt(),
                EpsPlacement::Std => variance.sqrt() + self.eps,
            },
        }
    }

    /// What another scale divides by: 1 where it is 0.
    fn by(&self, scale: f64) -> f64 {
        match scale {
            0.0 => 1.0,
            scale => scale + self.eps,
        }
    }
}

/// `Ok` when rows are in groups by their ids or by their places, not by both, and the batch is made of whole
/// ones; `arg` is the input of which there is too much or too little.
fn check_groups(arg: &'static str, has_ids: bool, sizes: Sizes) -> Result<()> {
    let Sizes { batch, group_size, .. } = sizes;
    if has_ids && group_size != 0 {
        return Err(Error::Option {
            op: OP,
            option: "group_size",
            expected: "0 where `groups` is given".into(),
            got: group_size.to_string(),
        });
    }
    if group_size != 0 && !batch.is_multiple_of(group_size) {
        return Err(Error::Shape {
            op: OP,
            arg,
            expected: format!("[k * {group_size}] for groups of {group_size}; or give `groups`"),
            got: format!("[{batch}]"),
        });
    }
    Ok(())
}

/// The error for a row that has no other to be better than.
fn no_runner_up(row: usize) -> Error {
    Error::Option {
        op: OP,
        option: "baseline",
        expected: format!("another where a group has a single row, as that of row {row}"),
        got: "RunnerUp".into(),
    }
}

/// The sizes of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sizes {
    /// Rows: sequences.
    pub batch: usize,
    /// Tokens of a row, or with offsets of all rows, where the mask or `token_advantages` is given.
    pub seq_len: usize,
    /// Rows of a group where those stand after each other; 0 where `groups` says which belong together, or
    /// nothing is asked of groups.
    pub group_size: usize,
}

impl Sizes {
    fn shape(self, is_packed: bool) -> BatchShape {
        BatchShape::new(self.batch, self.seq_len, is_packed)
    }
}

list! {
    /// The inputs in some memory; see [the module](self) for their meaning.
    inputs Inputs(shape: BatchShape) {
        /// Scores of the sequences, `[B]`.
        scores: f32 [shape.rows()],
    } optional {
        /// Which rows belong together, `[B]`: those of equal ids.
        groups: i64 [shape.rows()],
        /// Lengths of the sequences, `[B]`: the weights of [`Baseline::LengthWeighted`].
        lengths: f32 [shape.rows()],
        /// Subtracted from the clipped scores before all else, `[B]`.
        score_baselines: f32 [shape.rows()],
        /// 0 where masked, `[B, T]`; looked at for `token_advantages` only.
        mask: u8 [shape.tokens()],
        /// Where the rows of a [pack](crate::pack) begin, `[B + 1]`; all that is `[B, T]` is `[N]` then.
        offsets: i64 [&shape.offsets()],
    }
}

list! {
    /// The outputs in some memory. None may be the memory of an input.
    outputs Outputs(shape: BatchShape) {
        /// Advantages of the rows, `[B]`.
        advantages: f32 [shape.rows()],
    } optional {
        /// The row's advantage on each of its tokens, `[B, T]`, 0 where masked; if wanted.
        token_advantages: f32 [shape.tokens()],
        /// Statistics, `[1]`, if wanted.
        stats: AdvantageStats [&[1]],
    }
}

/// Which tokens of a group's rows have a baseline in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(i32)]
pub enum TokenStep {
    /// Tokens of one column, as in verl's `optimal_token_baseline`.
    #[default]
    Column,
    /// Tokens with as many unmasked ones before them, as in its form for several turns.
    Unmasked,
}

/// How the optimal token baseline is made; the default is verl's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenBaselineOptions {
    /// Added to the sum of the weights; finite, 0 or above. Default 1e-8.
    pub eps: f64,
    /// Which tokens have a baseline in common. Default [`TokenStep::Column`].
    pub step: TokenStep,
    /// Whether the one longest row of a group has no baseline from where the second longest ends. There it
    /// would be compared with itself. Default true.
    pub lone_tail: bool,
}

impl Default for TokenBaselineOptions {
    fn default() -> Self {
        Self { eps: 1e-8, step: TokenStep::Column, lone_tail: true }
    }
}

impl TokenBaselineOptions {
    /// `Ok` when the options are in range, and what they look at is there and fits.
    fn check<S: Space>(&self, inputs: &TokenInputs<S>, sizes: Sizes) -> Result<()> {
        let eps = self.eps;
        Error::check_option(OP, "eps", eps, eps >= 0.0, "finite and 0 or above")?;
        check_groups("rewards", inputs.groups.is_some(), sizes)?;
        let grouped = inputs.groups.is_some() || sizes.group_size != 0;
        Error::check_given(OP, ["optimal_token_baseline", "groups"], [true, grouped])
    }
}

list! {
    /// The inputs of the optimal token baseline in some memory. Masked tokens may hold anything.
    inputs TokenInputs(shape: BatchShape) {
        /// Rewards, `[B, T]`.
        rewards: f32 [shape.tokens()],
        /// Log-probabilities of the tokens, `[B, T]`.
        logp: f32 [shape.tokens()],
        /// Logarithms of the sums of the squared probabilities of the whole vocabulary, `[B, T]`.
        log_sum_sq_probs: f32 [shape.tokens()],
    } optional {
        /// Which rows belong together, `[B]`: those of equal ids.
        groups: i64 [shape.rows()],
        /// Importance weights of the tokens, `[B, T]`, whose squares are factors of ‖onehot - p‖².
        weights: f32 [shape.tokens()],
        /// 0 where masked, `[B, T]`.
        mask: u8 [shape.tokens()],
        /// Where the rows of a [pack](crate::pack) begin, `[B + 1]`; all that is `[B, T]` is `[N]` then.
        offsets: i64 [&shape.offsets()],
    }
}

list! {
    /// The outputs of the optimal token baseline in some memory. None may be the memory of an input.
    outputs TokenOutputs(shape: BatchShape) {
        /// Advantages, `[B, T]`, 0 where masked.
        advantages: f32 [shape.tokens()],
    } optional {
        /// Sums of the rewards from a token on, `[B, T]`, 0 where masked; if wanted.
        returns: f32 [shape.tokens()],
    }
}

/// Statistics of a batch's scores, after clip and `score_baselines`. NaN stands for what is not
/// defined: there are too few scores, or no groups.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct AdvantageStats {
    /// Mean of the scores that are not NaN.
    pub score_mean: f64,
    /// Their standard deviation, unbiased or not by the option.
    pub score_std: f64,
    /// Share of groups without two different scores, from which nothing is learnt; groups without any score
    /// do not count.
    pub zero_std_fraction: f64,
}

impl AdvantageStats {
    /// How many numbers these are.
    pub const LEN: usize = size_of::<Self>() / size_of::<f64>();
}

impl Element for AdvantageStats {
    type Wide = AdvantageStats;
    #[cfg(feature = "candle")]
    type Number = f64;
}
