//! What a response is worth: one trait, five rewards.
//!
//! | `--reward` | score |
//! |---|---|
//! | `sentiment` | [`sentiment`]: positive and negative English words, in [-1, 1] |
//! | `length` | [`nearness`] of the number of words to `--reward-length`, in [0, 1] |
//! | `regex` | 1 if `--reward-pattern` matches anywhere in the response, else 0 |
//! | `command` | [`CommandReward`]: what the program `--reward-command` answers |
//! | `model:DIR` | [`ModelReward`]: what the reward model in that folder says |
//!
//! The first three look at the response alone, the others see the prompt too.

mod command;
mod model;
mod sentiment;

use std::time::Duration;

use anyhow::{Context, Result};
use candle_core::Device;
use regex::Regex;
use serde::Serialize;

use super::config::{RewardKind, Settings};
use super::load::load_reward;
use super::tokenizer::Tokenizer;

pub use command::CommandReward;
pub use model::ModelReward;
pub use sentiment::sentiment;

/// A prompt and the response to be scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Sample<'a> {
    /// The prompt's text.
    pub prompt: &'a str,
    /// The response's text, without the prompt.
    pub response: &'a str,
    /// The prompt's tokens, for a reward model; programs do not see them.
    #[serde(skip)]
    pub prompt_ids: &'a [u32],
    /// The response's tokens, its end of sequence among them if it has one.
    #[serde(skip)]
    pub response_ids: &'a [u32],
}

/// Scores responses, one finite number each; more is better.
pub trait Reward: Send {
    /// The name, as in `--reward NAME`.
    fn name(&self) -> &str;

    /// One score a sample, in order.
    fn score(&mut self, samples: &[Sample]) -> Result<Vec<f32>>;

    /// The longest prompt and response together, in tokens of the policy.
    ///
    /// # Errors
    /// If the reward reads tokens, and other ones than the policy's.
    fn context(&self, _policy: &Tokenizer) -> Result<usize> {
        Ok(usize::MAX)
    }
}

/// The reward that the settings ask for. A pattern is compiled and a command tried on a sample, so
/// that neither fails only when the first rollout is done; a model is loaded onto `device`.
///
/// # Errors
/// Names `--reward`, `--reward-pattern` or `--reward-command`, and says what is wrong with it.
pub fn build(settings: &Settings, device: &Device) -> Result<Box<dyn Reward>> {
    Ok(match &settings.reward {
        RewardKind::Sentiment => Box::new(Sentiment),
        RewardKind::Length => Box::new(Length { target: settings.reward_length }),
        RewardKind::Regex => {
            let pattern = settings.reward_pattern.as_deref();
            let pattern = pattern.context("--reward-pattern is missing")?;
            let regex = Regex::new(pattern)
                .with_context(|| format!("--reward-pattern `{pattern}` is refused"))?;
            Box::new(Pattern { regex })
        }
        RewardKind::Command => {
            let command = settings.reward_command.as_deref();
            let command = command.context("--reward-command is missing")?;
            let timeout = Duration::try_from_secs_f64(settings.reward_timeout)
                .context("--reward-timeout is refused")?;
            let mut reward = CommandReward::new(command, timeout);
            reward.probe()?;
            Box::new(reward)
        }
        RewardKind::Model(dir) => {
            let model = load_reward(dir, device).context("--reward model is refused")?;
            Box::new(ModelReward::new(model))
        }
    })
}

struct Sentiment;

impl Reward for Sentiment {
    fn name(&self) -> &str {
        "sentiment"
    }

    fn score(&mut self, samples: &[Sample]) -> Result<Vec<f32>> {
        Ok(samples.iter().map(|sample| sentiment(sample.response)).collect())
    }
}

struct Length {
    target: usize,
}

impl Reward for Length {
    fn name(&self) -> &str {
        "length"
    }

    fn score(&mut self, samples: &[Sample]) -> Result<Vec<f32>> {
        let words = |sample: &Sample| sample.response.split_whitespace().count();
        Ok(samples.iter().map(|sample| nearness(words(sample), self.target)).collect())
    }
}

/// min(n, target) / max(n, target): 1 at the target, falling linearly to 0 below it and as
/// target / n above, so that a shorter way back always scores more.
pub fn nearness(n: usize, target: usize) -> f32 {
    if n == target {
        return 1.0;
    }
    n.min(target) as f32 / n.max(target) as f32
}

struct Pattern {
    regex: Regex,
}

impl Reward for Pattern {
    fn name(&self) -> &str {
        "regex"
    }

    fn score(&mut self, samples: &[Sample]) -> Result<Vec<f32>> {
        let matched = |sample: &Sample| self.regex.is_match(sample.response);
        Ok(samples.iter().map(|sample| f32::from(u8::from(matched(sample)))).collect())
    }
}
