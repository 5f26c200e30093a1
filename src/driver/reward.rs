//! What a response is worth: one trait, five rewards, and their weighted sums.
//!
//! | `--reward` | score |
//! |---|---|
//! | `sentiment` | [`sentiment`]: positive and negative English words, in [-1, 1] |
//! | `length` | [`nearness`] of the number of words to `--reward-length`, in [0, 1] |
//! | `regex` | 1 if `--reward-pattern` matches anywhere in the response, else 0 |
//! | `command` | [`CommandReward`]: what the program `--reward-command` answers |
//! | `model:DIR` | [`ModelReward`]: what the reward model in that folder says |
//! | `NAME*WEIGHT,..` | the sum of several with their weights |
//!
//! The first three look at the response alone, the others see the prompt too.

mod command;
mod model;
mod sentiment;

use std::time::Duration;

use anyhow::{ensure, Context, Result};
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

    /// The scores of all rewards whose weighted sum this is: its own, of weight 1, if it is none.
    fn parts(&mut self, samples: &[Sample]) -> Result<Vec<Scores>> {
        let scores = self.score(samples)?;
        let name = self.name().to_owned();
        ensure!(
            scores.len() == samples.len(),
            "the reward {name} gave {} scores for {} responses",
            scores.len(),
            samples.len()
        );
        Ok(vec![Scores { name, weight: 1.0, scores }])
    }

    /// The longest prompt and response together, in tokens of the policy.
    ///
    /// # Errors
    /// If the reward reads tokens, and other ones than the policy's.
    fn context(&self, _policy: &Tokenizer) -> Result<usize> {
        Ok(usize::MAX)
    }
}

/// The scores of some samples by one reward.
#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    /// The reward's name.
    pub name: String,
    /// Its weight in the sum.
    pub weight: f64,
    /// One score a sample, without the weight.
    pub scores: Vec<f32>,
}

/// The sums of the scores with their weights; as they are where there is one of weight 1.
pub fn weighted_sum(parts: &[Scores]) -> Vec<f32> {
    let count = parts.first().map_or(0, |part| part.scores.len());
    let of_sample =
        |i| parts.iter().map(|part| part.weight * f64::from(part.scores[i])).sum::<f64>();
    let largest = f64::from(f32::MAX);
    // What is beyond the largest number of 32 bits stays finite.
    (0..count).map(|i| of_sample(i).clamp(-largest, largest) as f32).collect()
}

/// The reward that the settings ask for. A pattern is compiled and a command tried on a sample, so
/// that neither fails only when the first rollout is done; a model is loaded onto `device`.
///
/// # Errors
/// Names `--reward`, `--reward-pattern` or `--reward-command`, and says what is wrong with it.
pub fn build(settings: &Settings, device: &Device) -> Result<Box<dyn Reward>> {
    build_kind(&settings.reward, settings, device)
}

fn build_kind(kind: &RewardKind, settings: &Settings, device: &Device) -> Result<Box<dyn Reward>> {
    Ok(match kind {
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
        RewardKind::Sum(parts) => {
            let part = |(kind, weight): &(RewardKind, f64)| {
                Ok((kind.to_string(), *weight, build_kind(kind, settings, device)?))
            };
            Box::new(Sum {
                name: kind.to_string(),
                parts: parts.iter().map(part).collect::<Result<_>>()?,
            })
        }
    })
}

/// Rewards with their names and weights.
struct Sum {
    name: String,
    parts: Vec<(String, f64, Box<dyn Reward>)>,
}

impl Reward for Sum {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, samples: &[Sample]) -> Result<Vec<f32>> {
        Ok(weighted_sum(&self.parts(samples)?))
    }

    fn parts(&mut self, samples: &[Sample]) -> Result<Vec<Scores>> {
        let mut all = Vec::new();
        for (name, weight, reward) in &mut self.parts {
            let parts = reward.parts(samples)?;
            all.push(Scores { name: name.clone(), weight: *weight, scores: weighted_sum(&parts) });
        }
        Ok(all)
    }

    fn context(&self, policy: &Tokenizer) -> Result<usize> {
        let mut least = usize::MAX;
        for (_, _, reward) in &self.parts {
            least = least.min(reward.context(policy)?);
        }
        Ok(least)
    }
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
