//! The algorithms that `train` has, and what each of them sets where nothing else is said.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::Settings;
use crate::advantages::AdvantageOptions;
use crate::kl::KlEstimator;

/// A set of defaults: advantages, loss, and where the KL goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// GAE with a critic, clipped ratios, the KL in the reward
    Ppo,
    /// Scores against those of the same prompt in standard deviations, the KL in the loss
    Grpo,
    /// Scores against the mean of the others of the same prompt, ratios of responses, the KL in the
    /// reward
    Rloo,
    /// Returns whitened over the batch, clipped ratios, the KL in the reward
    #[value(name = "reinforce++")]
    #[serde(rename = "reinforce++")]
    ReinforcePlusPlus,
}

/// How rewards become advantages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum AdvantageEstimator {
    /// Generalised advantage estimation by a critic, which learns beside the policy; all others have none
    Gae,
    /// The return from each token on
    #[value(name = "reinforce++")]
    #[serde(rename = "reinforce++")]
    ReinforcePlusPlus,
    /// Less the mean of the answers to the prompt, whitened over tokens
    #[value(name = "reinforce++-baseline")]
    #[serde(rename = "reinforce++-baseline")]
    ReinforcePlusPlusBaseline,
    /// Less the mean of the answers to the prompt, divided by their standard deviation
    Grpo,
    /// Less the mean of the answers to the prompt
    DrGrpo,
    /// Less the mean of the other answers to the prompt
    Rloo,
    /// Less the mean of the answers to the prompt weighted by their lengths
    Opo,
    /// The lead of the best answer to the prompt over the second, in standard deviations
    PassAtK,
    /// Less the mean of the answers to the prompt, divided by it; for scores of 0 and above
    MaxRl,
    /// Less the mean of the answers to the prompt, divided by the share of scores that are not 0
    Gpg,
    /// Less the score of the answer of the likeliest tokens to the prompt, which is made besides
    Remax,
    /// The return from each token on, less the mean of the answers to the prompt weighted for the least
    /// variance
    OptimalTokenBaseline,
    /// Each of several rewards by itself as in grpo; their weighted sum in standard deviations of the
    /// batch
    Gdpo,
}

impl AdvantageEstimator {
    /// Whether it is made of the values of a critic.
    pub fn has_critic(self) -> bool {
        self == Self::Gae
    }

    /// Whether what comes later counts for less, by gamma.
    pub fn discounts(self) -> bool {
        matches!(self, Self::Gae | Self::ReinforcePlusPlus)
    }

    /// Whether the answers to a prompt are compared, of which there must be two then.
    pub fn has_groups(self) -> bool {
        !(self.discounts() || self == Self::Remax)
    }

    /// The estimator of the op for one score a response; none where each token has an advantage of its
    /// own.
    pub fn outcome(self) -> Option<AdvantageOptions> {
        match self {
            Self::Gae | Self::ReinforcePlusPlus | Self::OptimalTokenBaseline => None,
            Self::ReinforcePlusPlusBaseline => {
                Some(AdvantageOptions::reinforce_plus_plus_baseline())
            }
            Self::Grpo | Self::Gdpo => Some(AdvantageOptions::grpo()),
            Self::DrGrpo => Some(AdvantageOptions::dr_grpo()),
            Self::Rloo => Some(AdvantageOptions::rloo()),
            Self::Opo => Some(AdvantageOptions::opo()),
            Self::PassAtK => Some(AdvantageOptions::pass_at_k()),
            Self::MaxRl => Some(AdvantageOptions::max_rl()),
            Self::Gpg => Some(AdvantageOptions::gpg()),
            Self::Remax => Some(AdvantageOptions::remax()),
        }
    }

    /// Whether whitening over the tokens of the batch is a part of it.
    fn whitens(self) -> bool {
        matches!(self, Self::Gae | Self::ReinforcePlusPlus | Self::ReinforcePlusPlusBaseline)
    }
}

/// Where the KL to the reference is held down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KlPlacement {
    /// A penalty of each token's reward
    Reward,
    /// A term of the loss
    Loss,
}

/// The name of a value on the command line.
pub(super) fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned())
}

/// The settings that the algorithm decides where they are not given.
impl Settings {
    /// The largest group that is made without being asked for.
    const MAX_GROUP: usize = 8;

    /// How rewards become advantages.
    pub fn estimator(&self) -> AdvantageEstimator {
        self.advantages.unwrap_or(match self.algorithm {
            Algorithm::Ppo => AdvantageEstimator::Gae,
            Algorithm::Grpo => AdvantageEstimator::Grpo,
            Algorithm::Rloo => AdvantageEstimator::Rloo,
            Algorithm::ReinforcePlusPlus => AdvantageEstimator::ReinforcePlusPlus,
        })
    }

    /// Responses to each prompt.
    pub fn group_size(&self) -> usize {
        self.group_size.unwrap_or_else(|| match self.estimator().has_groups() {
            true => {
                let fits = |size: &usize| self.batch_size.is_multiple_of(*size);
                (1..=Self::MAX_GROUP).rev().find(fits).unwrap_or(1)
            }
            false => 1,
        })
    }

    /// The name of the policy loss.
    pub fn loss(&self) -> &str {
        self.loss.as_deref().unwrap_or(match self.algorithm {
            Algorithm::Ppo | Algorithm::ReinforcePlusPlus => "ppo",
            Algorithm::Grpo => "grpo",
            Algorithm::Rloo => "rloo",
        })
    }

    /// Where the KL goes.
    pub fn kl_placement(&self) -> KlPlacement {
        self.kl_in.unwrap_or(match self.algorithm {
            Algorithm::Grpo => KlPlacement::Loss,
            Algorithm::Ppo | Algorithm::Rloo | Algorithm::ReinforcePlusPlus => KlPlacement::Reward,
        })
    }

    /// How the KL is estimated there.
    pub fn kl_estimator(&self) -> KlEstimator {
        self.kl_estimator.unwrap_or(match self.kl_placement() {
            KlPlacement::Reward => KlEstimator::K1,
            KlPlacement::Loss => KlEstimator::K3,
        })
    }

    /// Whether the advantages are whitened over the batch.
    pub fn whiten_advantages(&self) -> bool {
        self.whiten_advantages.unwrap_or_else(|| self.estimator().whitens())
    }
}
