//! Generalised advantage estimation, with the shaping of the rewards in the same pass.
//!
//! For a batch of token sequences `[B, T]`, per row, from the last token backwards:
//!
//! ```text
//! r_t     = rewards_t - kl_coef kl_t + score   (the score at one place of the row only)
//! δ_t     = r_t + γ V_{t+1} - V_t
//! A_t     = δ_t + γ λ A_{t+1}
//! returns = A_t + V_t                          (A not whitened)
//! ```
//!
//! (Schulman et al., arXiv 1506.02438; the rewards as in Ziegler et al., arXiv 1909.08593.)
//!
//! | argument | shape | type | absent means |
//! |---|---|---|---|
//! | values | `[B, T]` | f32 | - |
//! | rewards | `[B, T]` | f32, dense rewards or scores per token | 0 |
//! | kl | `[B, T]` | f32, per token, in nats | 0 |
//! | scores | `[B]` | f32, one a sequence | 0 |
//! | has_eos | `[B]` | u8, non-zero where the sequence ended by itself | all did |
//! | mask | `[B, T]` | u8, 0 where masked | nothing is masked |
//! | dones | `[B, T]` | u8, non-zero where an episode ended *with* step t | none did |
//! | bootstrap | `[B]` | f32, value of the state after the last unmasked token | 0 |
//! | offsets | `[B + 1]` | i64, where the rows of a [pack](crate::pack) begin; then `[N]` stands for `[B, T]` | rows of T tokens |
//! | lambda_per_row | `[B]` | f32, λ of the advantages of each row, in 0..=1 | the option's |
//! | advantages, returns, shaped_rewards (out) | `[B, T]` | f32 | |
//!
//! - **Masks** may have padding left and right, and gaps. Masked elements of all inputs, `dones`
//!   included, are not looked at and may hold NaN; they come out as 0. The scan starts at the last
//!   unmasked token, so the amount of padding behind it changes no bit. [`MaskMode`] says what a gap
//!   is. A row without any unmasked token comes out as zeros, its score dropped.
//! - **Dones**: neither V nor A of step t + 1 (or the bootstrap) is seen by a step with `dones` set.
//!   CleanRL's flags say that an episode *started* at t: ours at t is CleanRL's at t + 1, and in the
//!   last column its `next_done`.
//! - **The score** is scaled and clipped, then the rule for a missing end of sequence is applied, then
//!   it is added at the place [`ScorePlacement`] says. See [`RewardShaping`].
//! - **λ of rows** that adapts to their length (VAPO, arXiv 2504.05118: 1 - 1 / (α n) of n tokens, with
//!   λ = 1 for the returns) is the input `lambda_per_row`. The returns follow it where they have no λ of
//!   their own. A λ outside of 0..=1 is refused on the CPU, and makes the row NaN on CUDA.
//! - **Gradient**: none. Advantages and returns are targets, so the tensors are constants.
//! - **Moments** of the unmasked advantages come from the same pass, in an order that depends on the
//!   shape, and on the offsets, alone, ready for [`masked_whiten_with`](crate::whiten::masked_whiten_with).
//!
//! Cost in bytes per token: values 4, and 4 for each of rewards and kl, 1 for each of mask and dones,
//! read once; 4 for each output, written once.

#[cfg(feature = "capi")]
#[allow(missing_docs, non_camel_case_types, clippy::missing_safety_doc)]
pub mod capi;
pub mod cpu;
pub mod cuda;
pub mod reference;
#[cfg(feature = "candle")]
mod tensor;

#[cfg(feature = "candle")]
pub use tensor::{gae, GaeInputs, GaeOutput};

use crate::error::{Error, Result};
use crate::memory::{list, Space};
use crate::moments::{Moments, RunningMoments};
use crate::pack::BatchShape;

const OP: &str = "gae";

/// Options of the op; the default is that of TRL and most others: γ = 1, λ = 0.95, gaps skipped, the
/// score at the last unmasked token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GaeOptions {
    /// Discount γ, in 0..=1. Default 1.
    pub gamma: f64,
    /// λ of the advantages, in 0..=1. Default 0.95.
    pub lambda: f64,
    /// λ of the advantages that the returns are made of, if it is another (NeMo's
    /// `gae_lambda_value`). Default none.
    pub value_lambda: Option<f64>,
    /// The treatment of a masked token between unmasked ones. Default [`MaskMode::Carry`].
    pub mask_mode: MaskMode,
    /// How the rewards are made.
    pub shaping: RewardShaping,
}

impl Default for GaeOptions {
    fn default() -> Self {
        Self {
            gamma: 1.0,
            lambda: 0.95,
            value_lambda: None,
            mask_mode: MaskMode::Carry,
            shaping: RewardShaping::default(),
        }
    }
}

/// The treatment of a masked token between unmasked ones. Padding is the same in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MaskMode {
    /// No step: V and A are carried over it, so that the output of a tool, say, does not discount
    /// what comes after (verl, NeMo).
    #[default]
    Carry,
    /// A step with reward 0 and value 0, which discounts (TRL 0.11, OpenRLHF).
    Multiply,
}

/// How the rewards are made of dense rewards, the KL to the reference policy and a score a sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RewardShaping {
    /// β, the weight of the KL penalty; 0 or above. Does nothing without `kl`; at 0 `kl` is not looked
    /// at, and may be infinite. Default 0.05 (TRL).
    pub kl_coef: f64,
    /// Where the score is added. Default [`ScorePlacement::LastToken`].
    pub score_placement: ScorePlacement,
    /// Scale the score: (score - mean) / std. Default none.
    pub score_scale: Option<ScoreScale>,
    /// The least that the score is clipped to; may be -∞, the default. DeepSpeed-Chat clips to ±5, trlx and
    /// OpenRLHF to ±10.
    pub score_min: f64,
    /// The most that the score is clipped to; may be ∞, the default; not below `score_min`.
    pub score_max: f64,
    /// Which of the two comes first. Default [`ScoreOrder::ScaleThenClip`].
    pub score_order: ScoreOrder,
    /// The treatment of the score of a sequence without end-of-sequence token. Default
    /// [`MissingEos::Keep`]; the others need `scores` and `has_eos`.
    pub missing_eos: MissingEos,
}

impl Default for RewardShaping {
    fn default() -> Self {
        Self {
            kl_coef: 0.05,
            score_placement: ScorePlacement::LastToken,
            score_scale: None,
            score_min: f64::NEG_INFINITY,
            score_max: f64::INFINITY,
            score_order: ScoreOrder::ScaleThenClip,
            missing_eos: MissingEos::Keep,
        }
    }
}

/// Where the score of a sequence is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ScorePlacement {
    /// At the last unmasked token (TRL 0.11, OpenRLHF, verl, NeMo, MOSS).
    #[default]
    LastToken,
    /// One past it if there is room, else at it (TRL since 0.12, DeepSpeed-Chat).
    ///
    /// The masked position after the last unmasked token then is a step too, of reward `score`. Its
    /// value is read, and its return and reward are written, since the value function is trained
    /// there: mask the value loss accordingly. Its kl and dense reward are not read, and its
    /// advantage is 0 and not among the moments, since the policy is not trained there. Without
    /// `scores` it is no step.
    AfterLastToken,
}

/// Mean and standard deviation to scale the scores by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoreScale {
    /// Subtracted first; 0 to only divide, as trlx does, and TRL without `use_score_norm`.
    pub mean: f64,
    /// Divided by; above 0.
    pub std: f64,
}

impl From<&RunningMoments> for ScoreScale {
    /// Mean and standard deviation of all scores so far. As in TRL, the machine epsilon is added to
    /// the latter, so that equal scores are no error.
    fn from(running: &RunningMoments) -> Self {
        Self { mean: running.mean(), std: running.std() + f64::from(f32::EPSILON) }
    }
}

/// Whether scores are scaled before they are clipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ScoreOrder {
    /// Scale, then clip: the bounds are in standard deviations (TRL 0.11, MOSS).
    #[default]
    ScaleThenClip,
    /// Clip, then scale: the bounds are in units of the reward model (trlx).
    ClipThenScale,
}

/// The treatment of the score, already scaled and clipped, of a sequence that was cut off before an
/// end-of-sequence token.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum MissingEos {
    /// Nothing.
    #[default]
    Keep,
    /// This is subtracted (TRL's `missing_eos_penalty`).
    Subtract(f64),
    /// This takes its place, even that of NaN (lm-human-preferences' `penalty_reward_value`).
    Replace(f64),
}

impl GaeOptions {
    pub(crate) fn validate(&self) -> Result<()> {
        let share = |option, value: f64| {
            Error::check_option(OP, option, value, (0.0..=1.0).contains(&value), "0 to 1")
        };
        share("gamma", self.gamma)?;
        share("lambda", self.lambda)?;
        if let Some(lambda) = self.value_lambda {
            share("value_lambda", lambda)?;
        }
        self.shaping.validate()
    }

    /// λ of the advantages that the returns are made of.
    fn lambda_of_returns(&self) -> f64 {
        self.value_lambda.unwrap_or(self.lambda)
    }

    /// The options for a row with this λ.
    fn with_lambda(&self, lambda: f64) -> Self {
        Self { lambda, ..*self }
    }
}

impl RewardShaping {
    fn validate(&self) -> Result<()> {
        let check = |option, value: f64, valid, expected| {
            Error::check_option(OP, option, value, valid, expected)
        };
        check("kl_coef", self.kl_coef, self.kl_coef >= 0.0, "finite and 0 or above")?;
        Error::check_bounds(OP, ["score_min", "score_max"], [self.score_min, self.score_max])?;
        if let Some(ScoreScale { mean, std }) = self.score_scale {
            check("score_mean", mean, true, "finite")?;
            check("score_std", std, std > 0.0, "finite and above 0")?;
        }
        match self.missing_eos {
            MissingEos::Keep => Ok(()),
            MissingEos::Subtract(by) => check("missing_eos_value", by, true, "finite"),
            MissingEos::Replace(with) => check("missing_eos_value", with, true, "finite"),
        }
    }

    /// The score of a sequence as it is added to the rewards.
    fn score(&self, raw: f64, has_eos: bool) -> f64 {
        let scale = |score: f64| self.score_scale.map_or(score, |s| (score - s.mean) / s.std);
        let clip = |score: f64| score.clamp(self.score_min, self.score_max);
        let score = match self.score_order {
            ScoreOrder::ScaleThenClip => clip(scale(raw)),
            ScoreOrder::ClipThenScale => scale(clip(raw)),
        };
        match self.missing_eos {
            MissingEos::Subtract(penalty) if !has_eos => score - penalty,
            MissingEos::Replace(value) if !has_eos => value,
            _ => score,
        }
    }
}

list! {
    /// The inputs in some memory; see [the module](self) for their meaning.
    inputs Inputs(shape: BatchShape) {
        /// Values, `[B, T]`.
        values: f32 [shape.tokens()],
    } optional {
        /// Dense rewards, `[B, T]`.
        rewards: f32 [shape.tokens()],
        /// KL to the reference policy, `[B, T]`.
        kl: f32 [shape.tokens()],
        /// Scores of the sequences, `[B]`.
        scores: f32 [shape.rows()],
        /// Whether the sequence has an end-of-sequence token, `[B]`.
        has_eos: u8 [shape.rows()],
        /// 0 where masked, `[B, T]`.
        mask: u8 [shape.tokens()],
        /// Non-zero where an episode ended with step t, `[B, T]`.
        dones: u8 [shape.tokens()],
        /// Value of the state after the last unmasked token, `[B]`.
        bootstrap: f32 [shape.rows()],
        /// Where the rows of a [pack](crate::pack) begin, `[B + 1]`; all that is `[B, T]` is `[N]` then.
        offsets: i64 [&shape.offsets()],
        /// λ of the advantages of each row, `[B]`.
        lambda_per_row: f32 [shape.rows()],
    }
}

list! {
    /// The outputs in some memory: `[B, T]` and 0 where masked, but for the moments. None may be the
    /// memory of an input.
    outputs Outputs(shape: BatchShape) {
        /// Advantages, not whitened.
        advantages: f32 [shape.tokens()],
        /// Returns: the targets of the value function.
        returns: f32 [shape.tokens()],
    } optional {
        /// The rewards after shaping, if wanted.
        shaped_rewards: f32 [shape.tokens()],
        /// Moments of the unmasked advantages, `[1]`, if wanted.
        moments: Moments [&[1]],
    }
}

/// An error if the rule for a missing end of sequence lacks the inputs it works on.
fn check_missing_eos<S: Space>(rule: MissingEos, inputs: &Inputs<S>) -> Result<()> {
    if rule == MissingEos::Keep || (inputs.scores.is_some() && inputs.has_eos.is_some()) {
        return Ok(());
    }
    Err(Error::Option {
        op: OP,
        option: "missing_eos",
        expected: "Keep where `scores` or `has_eos` is not given".into(),
        got: format!("{rule:?}"),
    })
}
