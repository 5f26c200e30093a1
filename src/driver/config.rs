//! The settings of a run: for each subcommand one flat struct that is at once its flags, the keys of
//! a TOML file and the `config.toml` of the run folder. [`Settings`] are those of `train`, and
//! [`tuning`] has those of the subcommands that learn from a file of examples.
//!
//! Layers, the later one wins:
//!
//! 1. the defaults at the fields, chosen for a real model;
//! 2. the settings of the embedded run, when neither the file nor the flags name a model;
//! 3. the file of `--config FILE`;
//! 4. the flags that were really given.
//!
//! The keys of the file are the flags with `_` for `-`: `--clip-range 0.1` is `clip_range = 0.1`.
//! Paths are relative to the working directory, in the file too. [`RunSettings::to_toml`] writes every
//! setting but `out`, so that `train --config OLD_RUN/config.toml` is the same run again, in a new
//! folder.

mod algorithm;
pub mod tuning;

use std::fmt::{self, Display, Formatter};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{bail, ensure, Context, Result};
use candle_core::Device;
use clap::builder::PossibleValuesParser;
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, ValueEnum};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use toml::Table;

use self::algorithm::name;
pub use self::algorithm::{AdvantageEstimator, Algorithm, KlPlacement};
use super::generate::Sampling;
use super::model::Lora;
use super::report::CONFIG;
use crate::correction::{CorrectionOptions, RejectionMetric};
use crate::kl::{KlEstimator, KlOptions};
use crate::ppo_loss::{Aggregation, PpoLossOptions, Surrogate};

/// Where the tensors live: `cpu`, `cuda` or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceName {
    /// The processor.
    Cpu,
    /// The CUDA device of that number.
    Cuda(usize),
}

impl DeviceName {
    /// The device of that name.
    ///
    /// # Errors
    /// If this program has no kernels for it, or the machine has no such device.
    pub fn open(self) -> Result<Device> {
        match self {
            DeviceName::Cpu => Ok(Device::Cpu),
            DeviceName::Cuda(number) => {
                open_cuda(number).with_context(|| format!("--device {self} cannot be used"))
            }
        }
    }
}

#[cfg(feature = "cuda")]
fn open_cuda(number: usize) -> Result<Device> {
    // candle panics where there is no driver.
    let count = crate::cuda::device_count()?;
    ensure!(number < count, "this machine has {count} CUDA device(s), counted from 0");
    Ok(Device::new_cuda(number)?)
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_: usize) -> Result<Device> {
    bail!("this program was built without CUDA; build it with --features cuda,driver")
}

impl Display for DeviceName {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        match self {
            DeviceName::Cpu => f.write_str("cpu"),
            DeviceName::Cuda(0) => f.write_str("cuda"),
            DeviceName::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let cuda = |number: &str| number.parse().ok().map(DeviceName::Cuda);
        let device = match text {
            "cpu" => Some(DeviceName::Cpu),
            "cuda" => Some(DeviceName::Cuda(0)),
            _ => text.strip_prefix("cuda:").and_then(cuda),
        };
        device.ok_or_else(|| format!("device {text:?}: expected cpu, cuda or cuda:N"))
    }
}

impl TryFrom<String> for DeviceName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceName> for String {
    fn from(device: DeviceName) -> String {
        device.to_string()
    }
}

/// What a response is scored by: `sentiment`, `length`, `regex`, `command`, `model:DIR`, or several of them
/// with commas between, each with its weight behind a `*` if that is not 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum RewardKind {
    /// Positive and negative English words, in [-1, 1].
    Sentiment,
    /// Nearness to --reward-length words, in [0, 1].
    Length,
    /// 1 if --reward-pattern matches, else 0.
    Regex,
    /// Whatever the program --reward-command answers.
    Command,
    /// The reward model in that folder.
    Model(PathBuf),
    /// The sum of others, which are no sums, with these finite weights.
    Sum(Vec<(RewardKind, f64)>),
}

impl RewardKind {
    /// The rewards that are summed up, itself if it is no sum.
    pub fn parts(&self) -> Vec<(&RewardKind, f64)> {
        match self {
            RewardKind::Sum(parts) => parts.iter().map(|(kind, weight)| (kind, *weight)).collect(),
            one => vec![(one, 1.0)],
        }
    }
}

/// The names of the rewards, but for the one with a folder and sums.
const REWARDS: [(&str, RewardKind); 4] = [
    ("sentiment", RewardKind::Sentiment),
    ("length", RewardKind::Length),
    ("regex", RewardKind::Regex),
    ("command", RewardKind::Command),
];

impl Display for RewardKind {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        if let RewardKind::Model(dir) = self {
            return write!(f, "model:{}", dir.display());
        }
        if let RewardKind::Sum(parts) = self {
            let part = |(kind, weight): &(RewardKind, f64)| match weight {
                1.0 => kind.to_string(),
                weight => format!("{kind}*{weight}"),
            };
            return f.write_str(&parts.iter().map(part).collect::<Vec<_>>().join(","));
        }
        let named = REWARDS.iter().find(|(_, kind)| kind == self);
        f.write_str(named.expect("all others have a name").0)
    }
}

impl FromStr for RewardKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains([',', '*']) {
            let mut parts = text.split(',').map(weighted).collect::<Result<Vec<_>, _>>()?;
            let alone = parts.len() == 1 && parts[0].1 == 1.0;
            return Ok(if alone { parts.remove(0).0 } else { RewardKind::Sum(parts) });
        }
        let named = REWARDS.into_iter().find(|(name, _)| *name == text);
        let dir = || text.strip_prefix("model:").filter(|dir| !dir.is_empty());
        let model = || dir().map(|dir| RewardKind::Model(dir.into()));
        named.map(|(_, kind)| kind).or_else(model).ok_or_else(|| {
            let names = REWARDS.map(|(name, _)| name).join(", ");
            format!("reward {text:?}: expected {names} or model:DIR")
        })
    }
}

/// Reads `NAME` or `NAME*WEIGHT`.
fn weighted(text: &str) -> Result<(RewardKind, f64), String> {
    let Some((name, weight)) = text.rsplit_once('*') else {
        return Ok((text.trim().parse()?, 1.0));
    };
    match weight.trim().parse::<f64>() {
        Ok(weight) if (weight as f32).is_finite() && !name.contains('*') => {
            Ok((name.trim().parse()?, weight))
        }
        _ => Err(format!(
            "reward {text:?}: expected NAME*WEIGHT, the weight a finite number in 32 bits, and no * or \
             comma in the name of a folder"
        )),
    }
}

impl TryFrom<String> for RewardKind {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<RewardKind> for String {
    fn from(kind: RewardKind) -> String {
        kind.to_string()
    }
}

/// The names of the aggregations, but for the one with a number.
const AGGREGATIONS: [(&str, Aggregation); 7] = [
    ("token-mean", Aggregation::TokenMean),
    ("seq-mean-token-sum", Aggregation::SeqMeanTokenSum),
    ("seq-mean-token-mean", Aggregation::SeqMeanTokenMean),
    ("seq-mean-token-sum-norm", Aggregation::SeqMeanTokenSumNorm),
    ("batch-mean-token-sum", Aggregation::BatchMeanTokenSum),
    ("batch-mean-token-mean", Aggregation::BatchMeanTokenMean),
    ("seq-mean-token-sum-norm-rows", Aggregation::SeqMeanTokenSumNormRows),
];

impl Display for Aggregation {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        if let Aggregation::Constant(divisor) = self {
            return write!(f, "constant:{divisor}");
        }
        let named = AGGREGATIONS.iter().find(|(_, aggregation)| aggregation == self);
        f.write_str(named.expect("all others have a name").0)
    }
}

impl FromStr for Aggregation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = AGGREGATIONS.iter().find(|(name, _)| *name == text);
        let number = || text.strip_prefix("constant:")?.parse().ok().map(Aggregation::Constant);
        named.map(|&(_, aggregation)| aggregation).or_else(number).ok_or_else(|| {
            let names = AGGREGATIONS.map(|(name, _)| name).join(", ");
            format!("aggregation {text:?}: expected {names} or constant:X")
        })
    }
}

impl TryFrom<String> for Aggregation {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Aggregation> for String {
    fn from(aggregation: Aggregation) -> String {
        aggregation.to_string()
    }
}

/// How the KL coefficient moves during the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KlControllerKind {
    /// Stays at --kl-coef
    Constant,
    /// Starts at --kl-coef and steers the measured KL towards --kl-target
    Adaptive,
}

/// The network that the critic starts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CriticFrom {
    /// The policy's backbone with a random head
    Policy,
    /// The reward model, head and all
    Reward,
}

/// The learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LrScheduleKind {
    /// Falls linearly to 0 at the last step
    Linear,
    /// Stays
    Constant,
}

/// Every setting of a run. The defaults are stated once, at the fields; [`Settings::default`] reads
/// them from there.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[command(allow_negative_numbers = true)]
pub struct Settings {
    /// Model to train: a Hugging Face folder or a GGUF file. Without it, a small embedded model is
    /// fitted to an embedded text first
    #[arg(long, value_name = "PATH", value_parser = utf8_path, help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<PathBuf>,

    /// Prompts: a text file with one a line, or a .jsonl file with one {"prompt": ".."} a line, where
    /// a list of messages goes through the chat template. Needed with --model
    #[arg(long, value_name = "FILE", value_parser = utf8_path, help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompts: Option<PathBuf>,

    /// Folder for metrics, samples, settings and weights; it must not hold a run [default: the next
    /// free runs/train-N]
    #[arg(long, value_name = "DIR", value_parser = utf8_path, help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub out: Option<PathBuf>,

    /// Algorithm: what the other settings are where they are not given; of --advantages, --group-size,
    /// --loss and --kl-in
    #[arg(long, value_enum, value_name = "NAME", default_value_t = Algorithm::Ppo,
        help_heading = "Run")]
    pub algorithm: Algorithm,

    /// Steps; each is one rollout and its update
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 20, help_heading = "Run")]
    pub steps: usize,

    /// Steps from one checkpoint to the next, from which --resume goes on; 0 makes one only where
    /// the run is stopped
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 10, help_heading = "Run")]
    pub save_every: usize,

    /// Steps from one look at the prompts held out to the next; 0 holds out none
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 0, help_heading = "Run")]
    pub eval_every: usize,

    /// Share of the prompts that is held out, in (0, 1); with --eval-every
    #[arg(long, value_name = "X", default_value_t = 0.1, help_heading = "Run")]
    pub held_out: f64,

    /// The folder of a run that these go on with.
    #[arg(skip)]
    #[serde(skip)]
    pub resume: Option<PathBuf>,

    /// Seed of everything random; on the CPU the same seed gives the same run
    #[arg(long, value_name = "N", value_parser = seed, default_value_t = 0, help_heading = "Run")]
    pub seed: u64,

    /// Device to compute on: cpu, or with the feature cuda also cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceName::Cpu, help_heading = "Run")]
    pub device: DeviceName,

    /// Steps of language modelling that fit the embedded model first; no effect with --model
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 300,
        help_heading = "Run")]
    pub lm_steps: usize,

    /// Responses sampled a step
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 8,
        help_heading = "Rollout")]
    pub batch_size: usize,

    /// Responses to each prompt; divides --batch-size [default: 1, or where --advantages compares the
    /// responses to a prompt the largest that fits, at most 8]
    #[arg(long, value_name = "N", value_parser = count, help_heading = "Rollout")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_size: Option<usize>,

    /// Longest response, in tokens
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 24,
        help_heading = "Rollout")]
    pub max_new_tokens: usize,

    /// Sampling temperature, above 0; the log-probabilities are taken at the same temperature
    #[arg(long, value_name = "X", default_value_t = 1.0, help_heading = "Rollout")]
    pub temperature: f64,

    /// Sample from the K most likely tokens; 0 means all
    #[arg(long, value_name = "K", value_parser = count, default_value_t = 0,
        help_heading = "Rollout")]
    pub top_k: usize,

    /// Sample from the fewest tokens whose probabilities reach this sum; 1 means all
    #[arg(long, value_name = "P", default_value_t = 1.0, help_heading = "Rollout")]
    pub top_p: f64,

    /// What a response is scored by: sentiment, positive and negative English words, in [-1, 1];
    /// length, nearness to --reward-length words, in [0, 1]; regex, 1 if --reward-pattern matches,
    /// else 0; command, whatever the program --reward-command answers; model:DIR, the reward model
    /// in that folder, such as the weights of `reward`; or the sum of several with their weights, as
    /// in sentiment,length*0.5
    #[arg(long, value_name = "NAME", default_value_t = RewardKind::Sentiment,
        help_heading = "Reward")]
    pub reward: RewardKind,

    /// Response length that scores 1 with --reward length, in words
    #[arg(long, value_name = "WORDS", value_parser = count, default_value_t = 12,
        help_heading = "Reward")]
    pub reward_length: usize,

    /// Regular expression of --reward regex, in the syntax of the Rust crate regex
    #[arg(long, value_name = "REGEX", allow_hyphen_values = true, help_heading = "Reward")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reward_pattern: Option<String>,

    /// Shell command of --reward command: reads one {"prompt": .., "response": ..} a line, writes
    /// one {"score": ..} a line in the same order
    #[arg(long, value_name = "COMMAND", help_heading = "Reward")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reward_command: Option<String>,

    /// Longest time the command may take for one batch, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0, help_heading = "Reward")]
    pub reward_timeout: f64,

    /// Divide the scores by the standard deviation of all scores of the run so far
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true",
        action = clap::ArgAction::Set, default_value_t = false, help_heading = "Reward")]
    pub score_scaling: bool,

    /// Subtract their mean first; with --score-scaling
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true",
        action = clap::ArgAction::Set, default_value_t = false, help_heading = "Reward")]
    pub score_norm: bool,

    /// Bound on |score|, applied after --score-scaling and before the KL penalty [default: off]
    #[arg(long, value_name = "X", help_heading = "Reward")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score_clip: Option<f64>,

    /// Subtracted from the score of a response that does not end by itself [default: off]
    #[arg(long, value_name = "X", help_heading = "Reward")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing_eos_penalty: Option<f64>,

    /// KL coefficient: the weight of the KL in the reward or the loss
    #[arg(long, value_name = "X", default_value_t = 0.05, help_heading = "KL penalty")]
    pub kl_coef: f64,

    /// Where the KL goes [default: loss of grpo, else reward]
    #[arg(long, value_enum, help_heading = "KL penalty")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_in: Option<KlPlacement>,

    /// Per-token KL estimator, of d = logp - ref_logp [default: k1 in the reward, k3 in the loss]
    #[arg(long, value_enum, help_heading = "KL penalty")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_estimator: Option<KlEstimator>,

    /// How the KL coefficient moves
    #[arg(long, value_enum, default_value_t = KlControllerKind::Constant,
        help_heading = "KL penalty")]
    pub kl_controller: KlControllerKind,

    /// KL that the adaptive controller steers to, in nats a response
    #[arg(long, value_name = "NATS", default_value_t = 6.0, help_heading = "KL penalty")]
    pub kl_target: f64,

    /// Time constant of the adaptive controller, in responses; at least --batch-size
    #[arg(long, value_name = "N", default_value_t = 10000.0, help_heading = "KL penalty")]
    pub kl_horizon: f64,

    /// Estimator of the advantages [default: that of --algorithm; gae of ppo]
    #[arg(long, value_enum, value_name = "NAME", help_heading = "Advantages")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advantages: Option<AdvantageEstimator>,

    /// Discount factor, in [0, 1], of gae and reinforce++
    #[arg(long, value_name = "X", default_value_t = 1.0, help_heading = "Advantages")]
    pub gamma: f64,

    /// Trace decay of GAE, in [0, 1]
    #[arg(long, value_name = "X", default_value_t = 0.95, help_heading = "Advantages")]
    pub lambda: f64,

    /// Whiten the advantages over the batch [default: true of gae, reinforce++ and
    /// reinforce++-baseline, else false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true",
        action = clap::ArgAction::Set, help_heading = "Advantages")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub whiten_advantages: Option<bool>,

    /// Divide the rewards by their standard deviation over the batch
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true",
        action = clap::ArgAction::Set, default_value_t = false, help_heading = "Advantages")]
    pub whiten_rewards: bool,

    /// Passes over each rollout
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 2, help_heading = "Loss")]
    pub ppo_epochs: usize,

    /// Responses in one optimiser step; divides --batch-size
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 4, help_heading = "Loss")]
    pub minibatch_size: usize,

    /// Parts of a minibatch whose gradients are added up, which bounds the memory; divides
    /// --minibatch-size
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 1, help_heading = "Loss")]
    pub gradient_accumulation: usize,

    /// Policy loss, one of the family's [default: that of --algorithm; ppo of ppo and reinforce++]
    #[arg(long, value_name = "NAME",
        value_parser = PossibleValuesParser::new(PpoLossOptions::NAMES), help_heading = "Loss")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<String>,

    /// Clip range of the probability ratio: 1 - X to 1 + X [default: the loss's own; 0.2 of ppo]
    #[arg(long, value_name = "X", help_heading = "Loss")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_range: Option<f64>,

    /// Upper clip range, where it differs from the lower [default: --clip-range, or the loss's own]
    #[arg(long, value_name = "X", help_heading = "Loss")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_range_high: Option<f64>,

    /// Bound of the dual clip, above 1: for negative advantages the loss is at most X |A| [default:
    /// off]
    #[arg(long, value_name = "X", help_heading = "Loss")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dual_clip: Option<f64>,

    /// Correction for tokens that were not drawn by the policy's own probabilities, as with --top-p
    /// or --top-k: tis, importance weights truncated at 2; sequence_tis, the same of whole responses;
    /// icepop, 0 outside of 0.5 to 5; sequence_mask, those of responses, 0 above 3; geometric_mask, 0
    /// where the geometric mean of a response is outside of 0.999 to 1.002 [default: off]
    #[arg(long, value_name = "NAME", help_heading = "Loss",
        value_parser = PossibleValuesParser::new(CorrectionOptions::NAMES))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub correction: Option<String>,

    /// Upper bound of the correction, where it is not to be its own; with --correction
    #[arg(long, value_name = "X", help_heading = "Loss")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub correction_cap: Option<f64>,

    /// Clip range of the value around the old value
    #[arg(long, value_name = "X", default_value_t = 0.2, help_heading = "Loss")]
    pub value_clip_range: f64,

    /// Network that the critic starts from [default: reward with --reward model:DIR, else policy]
    #[arg(long, value_enum, help_heading = "Loss")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub critic_from: Option<CriticFrom>,

    /// Weight of the value loss
    #[arg(long, value_name = "X", default_value_t = 0.1, help_heading = "Loss")]
    pub value_coef: f64,

    /// Weight of the entropy bonus
    #[arg(long, value_name = "X", default_value_t = 0.0, help_heading = "Loss")]
    pub entropy_coef: f64,

    /// How the per-token losses become one number: token-mean, the mean over all tokens of the
    /// minibatch; seq-mean-token-sum and seq-mean-token-mean, the mean over responses of the sum or
    /// mean over each response's tokens; seq-mean-token-sum-norm, the sum over all tokens divided by
    /// the rollout's longest response, and seq-mean-token-sum-norm-rows, by that and the responses;
    /// batch-mean-token-sum and batch-mean-token-mean, as those with seq, but over empty responses too;
    /// or constant:X, divided by X [default: the loss's own; token-mean of ppo]
    #[arg(long, value_name = "NAME", help_heading = "Loss")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aggregation: Option<Aggregation>,

    /// Train low-rank adapters (LoRA) of that rank in policy and critic, and nothing else of them but
    /// the critic's head. The policy's are saved in PEFT's format [default: off]
    #[arg(long, value_name = "N", value_parser = count, help_heading = "LoRA")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_rank: Option<usize>,

    /// Weight of the adapters, times their rank [default: twice the rank]
    #[arg(long, value_name = "X", help_heading = "LoRA")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_alpha: Option<f64>,

    /// Projections that have adapters, separated by commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_values = Lora::TARGETS,
        value_parser = PossibleValuesParser::new(Lora::TARGETS), help_heading = "LoRA")]
    pub lora_targets: Vec<String>,

    /// Add the adapters to the weights at the end, and save a whole model
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true",
        action = clap::ArgAction::Set, default_value_t = false, help_heading = "LoRA")]
    pub lora_merge: bool,

    /// Learning rate of the policy
    #[arg(long, value_name = "X", default_value_t = 1e-5, help_heading = "Optimiser")]
    pub learning_rate: f64,

    /// Learning rate of the critic
    #[arg(long, value_name = "X", default_value_t = 1e-5, help_heading = "Optimiser")]
    pub value_learning_rate: f64,

    /// Decoupled weight decay of AdamW
    #[arg(long, value_name = "X", default_value_t = 0.0, help_heading = "Optimiser")]
    pub weight_decay: f64,

    /// Steps over which the learning rates rise linearly from 0
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 0,
        help_heading = "Optimiser")]
    pub warmup_steps: usize,

    /// Learning rates after the warm-up
    #[arg(long, value_enum, default_value_t = LrScheduleKind::Linear, help_heading = "Optimiser")]
    pub lr_schedule: LrScheduleKind,

    /// Largest global norm of a gradient; larger ones are scaled down to it
    #[arg(long, value_name = "X", default_value_t = 1.0, help_heading = "Optimiser")]
    pub max_grad_norm: f64,
}

impl Default for Settings {
    fn default() -> Self {
        defaults()
    }
}

/// Bounds what a slip of the keyboard can ask for; more would not fit any memory.
const MAX_BATCH_SIZE: usize = 1 << 20;

/// Where settings have the steps and the checkpoints of a run.
macro_rules! run_of_steps {
    () => {
        fn steps(&self) -> usize {
            self.steps
        }

        fn save_every(&self) -> usize {
            self.save_every
        }

        fn resumed(&self) -> Option<&Path> {
            self.resume.as_deref()
        }

        fn resume(&mut self, dir: PathBuf) -> Result<()> {
            self.resume = Some(dir);
            Ok(())
        }
    };
}
use run_of_steps;

/// Where settings have adapters.
macro_rules! adapters_of_settings {
    () => {
        /// The adapters that are trained, if not the whole networks are.
        pub fn lora(&self) -> Option<Lora> {
            self.lora_rank.map(|rank| Lora {
                rank,
                alpha: self.lora_alpha.unwrap_or(2.0 * rank as f64),
                targets: self.lora_targets.clone(),
            })
        }

        /// The model that the adapters are saved for, if they are by themselves.
        pub fn adapter_base(&self) -> Option<&Path> {
            self.model.as_deref().filter(|_| self.lora_rank.is_some() && !self.lora_merge)
        }
    };
}
use adapters_of_settings;

/// The settings of a subcommand that makes a run folder.
pub trait RunSettings: Args + Clone + Default + Serialize + DeserializeOwned {
    /// The subcommand's name. Its folders are `runs/COMMAND-N`.
    const COMMAND: &'static str;

    /// The folder of the run.
    fn out(&mut self) -> &mut Option<PathBuf>;

    /// Steps of the run.
    fn steps(&self) -> usize {
        1
    }

    /// Steps from one checkpoint to the next; 0 is none but where the run is stopped.
    fn save_every(&self) -> usize {
        0
    }

    /// The folder of the run that goes on, if it does.
    fn resumed(&self) -> Option<&Path> {
        None
    }

    /// Goes on with the run in a folder.
    ///
    /// # Errors
    /// If runs of this command cannot.
    fn resume(&mut self, _dir: PathBuf) -> Result<()> {
        bail!("--resume is refused: {} makes no checkpoint, but the runs in it do", Self::COMMAND)
    }

    /// Checks every value that can be judged without opening a file.
    ///
    /// # Errors
    /// Names the flag, its value and what was expected.
    fn validate(&self) -> Result<()>;

    /// Checks that no flag was given that has no effect beside the others.
    fn check_given(&self, _given: &dyn Fn(&str) -> bool) -> Result<()> {
        Ok(())
    }

    /// The settings as a TOML file that `--config` reads. `out` is left out: the file lies in it,
    /// and the same run again needs another.
    fn to_toml(&self) -> Result<String> {
        let mut settings = self.clone();
        settings.out().take();
        toml::to_string(&settings).context("cannot write the settings as TOML")
    }
}

/// The flags of such a subcommand: the settings and the file they start from.
#[derive(Debug, Clone, Args)]
pub struct ConfigArgs<S: Args> {
    /// TOML file of settings; a flag beside it overrides its value. The config.toml of a run
    /// repeats that run
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    pub config: Option<PathBuf>,

    /// Folder of a run to go on with, from its last checkpoint and with its settings; no other flag
    /// goes with it
    #[arg(long, value_name = "DIR", value_parser = utf8_path, help_heading = "Run")]
    pub resume: Option<PathBuf>,

    /// The settings as parsed, with defaults where a flag was not given.
    #[command(flatten)]
    pub settings: S,
}

/// The flags of `train`.
pub type TrainArgs = ConfigArgs<Settings>;

impl<S: RunSettings> ConfigArgs<S> {
    /// Lays the layers over each other and validates the result.
    ///
    /// `matches` is what `self` was parsed from: it knows which flags were really given. `embedded`
    /// is the TOML text of the embedded run's settings.
    ///
    /// # Errors
    /// A file that cannot be read, is not TOML, or has an unknown key or a value of the wrong type
    /// (the message has file, line and key); a setting out of its range (the message has the flag).
    pub fn resolve(&self, matches: &ArgMatches, embedded: &str) -> Result<S> {
        let given = |key: &str| matches.value_source(key) == Some(ValueSource::CommandLine);
        if let Some(dir) = &self.resume {
            return self.resumed(dir, matches, &given);
        }
        let file = match &self.config {
            Some(path) => read_config::<S>(path)?,
            None => Table::new(),
        };
        let mut flags = Table::try_from(&self.settings).context("cannot lay out the flags")?;
        flags.retain(|key, _| given(key));

        let mut table = Table::new();
        if !file.contains_key("model") && !flags.contains_key("model") {
            table.extend(parse_settings::<S>(embedded).context("settings of the embedded run")?);
        }
        table.extend(file);
        table.extend(flags);
        let settings: S = table.try_into().context("cannot put the settings together")?;
        settings.validate()?;
        settings.check_given(&given)?;
        Ok(settings)
    }

    /// The settings of the run in a folder, which go on there.
    fn resumed(&self, dir: &Path, matches: &ArgMatches, given: &dyn Fn(&str) -> bool) -> Result<S> {
        let other = matches.ids().map(|id| id.as_str()).find(|id| {
            // Groups of flags have names too.
            *id != "resume" && given(id) && matches.try_get_raw(id).is_ok()
        });
        if let Some(other) = other {
            bail!(
                "--{} does not go with --resume, which keeps its settings",
                other.replace('_', "-")
            );
        }
        S::default().resume(dir.to_owned())?; // whether the command can
        let table = read_config::<S>(&dir.join(CONFIG)).context("--resume is refused")?;
        let mut settings: S = table.try_into().context("cannot put the settings together")?;
        settings.resume(dir.to_owned())?;
        settings.validate()?;
        Ok(settings)
    }
}

impl Settings {
    /// The folder of the reward model that the critic starts from, if there is a critic and it does.
    pub fn critic_dir(&self) -> Option<&Path> {
        let mut models = self.reward.parts().into_iter().filter_map(|(kind, _)| match kind {
            RewardKind::Model(dir) => Some(dir.as_path()),
            _ => None,
        });
        // Of several models none is the one.
        let only = models.next().filter(|_| models.next().is_none());
        let wanted = matches!(self.critic_from, None | Some(CriticFrom::Reward));
        only.filter(|_| wanted && self.estimator().has_critic())
    }

    adapters_of_settings!();

    /// Responses that the models read at once.
    pub fn part_size(&self) -> usize {
        self.minibatch_size / self.gradient_accumulation
    }

    /// How the rollout draws tokens.
    pub fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: Some(self.top_k).filter(|&k| k > 0),
            top_p: Some(self.top_p).filter(|&p| p < 1.0),
            max_new_tokens: self.max_new_tokens,
        }
    }

    /// Options of the loss, but for the coefficient of its KL term, which may move during the run.
    ///
    /// # Errors
    /// If there is no loss of that name.
    pub fn loss_options(&self) -> Result<PpoLossOptions> {
        let named = PpoLossOptions::of(self.loss())?;
        // Its own upper range goes with its own lower one.
        let own_high = named.clip_range_high.filter(|_| self.clip_range.is_none());
        let kl = match self.kl_placement() {
            KlPlacement::Loss => KlOptions { estimator: self.kl_estimator(), ..named.kl },
            KlPlacement::Reward => named.kl,
        };
        Ok(PpoLossOptions {
            clip_range: self.clip_range.unwrap_or(named.clip_range),
            clip_range_high: self.clip_range_high.or(own_high),
            dual_clip: self.dual_clip,
            value_clip_range: Some(self.value_clip_range),
            value_coef: self.value_coef,
            entropy_coef: self.entropy_coef,
            kl,
            aggregation: self.aggregation.unwrap_or(named.aggregation),
            ..named
        })
    }

    fn validate_groups(&self) -> Result<()> {
        let (batch_size, group_size) = (self.batch_size, self.group_size());
        let estimator = self.estimator();
        at_least_one("--group-size", group_size)?;
        ensure!(
            batch_size.is_multiple_of(group_size),
            "--group-size is {group_size}, expected a divisor of --batch-size {batch_size}"
        );
        ensure!(
            group_size > 1 || !estimator.has_groups(),
            "--group-size is 1 (of --batch-size {batch_size}), expected at least 2 with --advantages \
             {}, which compares the responses to a prompt",
            name(estimator)
        );
        ensure!(
            estimator != AdvantageEstimator::MaxRl
                || self.kl_placement() == KlPlacement::Loss
                || self.kl_coef == 0.0,
            "--advantages max_rl is for rewards of 0 and above, and the KL makes them less; add \
             --kl-in loss or --kl-coef 0"
        );
        if estimator == AdvantageEstimator::Gdpo {
            ensure!(
                self.kl_placement() == KlPlacement::Loss || self.kl_coef == 0.0,
                "--advantages gdpo looks at each reward by itself, and the KL belongs to none; add \
                 --kl-in loss or --kl-coef 0"
            );
            for (flag, given) in [
                ("--score-scaling", self.score_scaling),
                ("--score-clip", self.score_clip.is_some()),
                ("--missing-eos-penalty", self.missing_eos_penalty.is_some()),
                ("--whiten-rewards", self.whiten_rewards),
            ] {
                ensure!(
                    !given,
                    "{flag} changes the sum of the rewards, and --advantages gdpo looks at each reward by \
                     itself"
                );
            }
        }
        Ok(())
    }

    /// Refuses settings of a critic where there is none.
    fn validate_critic(&self, given: &dyn Fn(&str) -> bool) -> Result<()> {
        let estimator = self.estimator();
        for key in
            ["critic_from", "lambda", "value_coef", "value_clip_range", "value_learning_rate"]
        {
            ensure!(
                estimator.has_critic() || !given(key),
                "{} has no effect with --advantages {}, which has no critic; add --advantages gae",
                flag_of(key),
                name(estimator)
            );
        }
        Ok(())
    }

    /// Options of the correction, if there is one.
    ///
    /// # Errors
    /// If there is no correction of that name.
    pub fn correction_options(&self) -> Result<Option<CorrectionOptions>> {
        let Some(name) = &self.correction else {
            return Ok(None);
        };
        let mut options = CorrectionOptions::of(name)?;
        if self.correction_cap.is_some() {
            match options.rejection.metric {
                RejectionMetric::None => options.high = self.correction_cap,
                _ => options.rejection.high = self.correction_cap,
            }
        }
        Ok(Some(options))
    }
}

impl RunSettings for Settings {
    const COMMAND: &'static str = "train";

    run_of_steps!();

    fn out(&mut self) -> &mut Option<PathBuf> {
        &mut self.out
    }

    fn validate(&self) -> Result<()> {
        at_least_one("--steps", self.steps)?;
        valid_batch_size(self.batch_size)?;
        at_least_one("--minibatch-size", self.minibatch_size)?;
        at_least_one("--gradient-accumulation", self.gradient_accumulation)?;
        at_least_one("--ppo-epochs", self.ppo_epochs)?;
        at_least_one("--max-new-tokens", self.max_new_tokens)?;
        at_least_one("--reward-length", self.reward_length)?;
        ensure!(
            self.batch_size.is_multiple_of(self.minibatch_size),
            "--minibatch-size is {}, expected a divisor of --batch-size {}",
            self.minibatch_size,
            self.batch_size
        );
        ensure!(
            self.minibatch_size.is_multiple_of(self.gradient_accumulation),
            "--gradient-accumulation is {}, expected a divisor of --minibatch-size {}",
            self.gradient_accumulation,
            self.minibatch_size
        );
        self.validate_groups()?;
        valid_seed(self.seed)?;

        for (flag, value) in [
            ("--temperature", Some(self.temperature)),
            ("--score-clip", self.score_clip),
            ("--kl-target", Some(self.kl_target)),
            ("--kl-horizon", Some(self.kl_horizon)),
            ("--clip-range", self.clip_range),
            ("--clip-range-high", self.clip_range_high),
            ("--correction-cap", self.correction_cap),
            ("--value-clip-range", Some(self.value_clip_range)),
            ("--max-grad-norm", Some(self.max_grad_norm)),
        ] {
            in_range(flag, value, |x| x > 0.0, "above 0")?;
        }
        for (flag, value) in [
            ("--missing-eos-penalty", self.missing_eos_penalty),
            ("--kl-coef", Some(self.kl_coef)),
            ("--value-coef", Some(self.value_coef)),
            ("--entropy-coef", Some(self.entropy_coef)),
            ("--learning-rate", Some(self.learning_rate)),
            ("--value-learning-rate", Some(self.value_learning_rate)),
            ("--weight-decay", Some(self.weight_decay)),
        ] {
            in_range(flag, value, |x| x >= 0.0, "of at least 0")?;
        }
        in_range("--gamma", Some(self.gamma), |x| (0.0..=1.0).contains(&x), "in [0, 1]")?;
        in_range("--lambda", Some(self.lambda), |x| (0.0..=1.0).contains(&x), "in [0, 1]")?;
        in_range("--held-out", Some(self.held_out), |x| x > 0.0 && x < 1.0, "in (0, 1)")?;
        in_range("--top-p", Some(self.top_p), |x| x > 0.0 && x <= 1.0, "in (0, 1]")?;
        // A larger share of the horizon in one step could turn the coefficient's sign.
        ensure!(
            self.kl_controller == KlControllerKind::Constant
                || self.kl_horizon >= self.batch_size as f64,
            "--kl-horizon is {}, expected at least --batch-size {} with --kl-controller adaptive",
            self.kl_horizon,
            self.batch_size
        );
        let timeout = Some(self.reward_timeout);
        in_range("--reward-timeout", timeout, |x| x > 0.0 && x <= 1e6, "in (0, 1e6]")?;
        in_range("--dual-clip", self.dual_clip, |x| x > 1.0, "above 1")?;
        let loss = self.loss_options()?;
        ensure!(
            self.dual_clip.is_none() || loss.surrogate == Surrogate::Clip,
            "--dual-clip goes with a clipped ratio, which --loss {} has not",
            self.loss()
        );
        ensure!(
            self.correction.is_some() || self.correction_cap.is_none(),
            "--correction-cap has no effect without --correction"
        );
        if let (Some(options), Some(cap)) = (self.correction_options()?, self.correction_cap) {
            let low = options.low.or(options.rejection.low).unwrap_or(0.0);
            let expected = format!("of at least {low}, the lower bound");
            in_range("--correction-cap", Some(cap), |cap| cap >= low, &expected)?;
        }
        if let Aggregation::Constant(divisor) = loss.aggregation {
            in_range("--aggregation constant", Some(divisor), |x| x > 0.0, "above 0")?;
        }

        valid_paths(&[
            ("--model", &self.model),
            ("--prompts", &self.prompts),
            ("--out", &self.out),
        ])?;
        valid_lora(self.lora(), self.lora_alpha, &self.model, self.lora_merge)?;
        ensure!(
            self.model.is_none() || self.prompts.is_some(),
            "--prompts is missing: with --model, name a file of prompts"
        );
        ensure!(
            self.score_scaling || !self.score_norm,
            "--score-norm has no effect without --score-scaling"
        );
        self.validate_critic(&|key| key == "critic_from" && self.critic_from.is_some())?;
        ensure!(
            self.critic_from != Some(CriticFrom::Reward) || self.critic_dir().is_some(),
            "--critic-from reward has no model with --reward {}; add --reward model:DIR",
            self.reward
        );
        let parts = self.reward.parts();
        for (i, (kind, _)) in parts.iter().enumerate() {
            ensure!(
                !parts[..i].iter().any(|(other, _)| other == kind),
                "--reward {} has {kind} twice",
                self.reward
            );
            match kind {
                RewardKind::Regex => needed("--reward-pattern", &self.reward_pattern, kind)?,
                RewardKind::Command => needed("--reward-command", &self.reward_command, kind)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn check_given(&self, given: &dyn Fn(&str) -> bool) -> Result<()> {
        check_lora_given(self.lora_rank, given)?;
        self.validate_critic(given)?;
        ensure!(
            self.eval_every > 0 || !given("held_out"),
            "--held-out has no effect without --eval-every"
        );
        let estimator = self.estimator();
        ensure!(
            estimator.discounts() || !given("gamma"),
            "--gamma has no effect with --advantages {}, which discounts nothing; add \
             --advantages reinforce++ or gae",
            name(estimator)
        );
        for (key, needs) in [
            ("reward_length", RewardKind::Length),
            ("reward_pattern", RewardKind::Regex),
            ("reward_command", RewardKind::Command),
        ] {
            ensure!(
                !given(key) || self.reward.parts().iter().any(|(kind, _)| **kind == needs),
                "{} has no effect with --reward {}; add --reward {needs}",
                flag_of(key),
                self.reward
            );
        }
        Ok(())
    }
}

/// Checks adapters, and that there is a model on disk that they could be saved for.
pub(super) fn valid_lora(
    lora: Option<Lora>,
    alpha: Option<f64>,
    model: &Option<PathBuf>,
    merge: bool,
) -> Result<()> {
    in_range("--lora-alpha", alpha, |x| x > 0.0, "above 0")?;
    let Some(lora) = lora else {
        return Ok(());
    };
    at_least_one("--lora-rank", lora.rank)?;
    lora.validate().context("--lora-rank, --lora-alpha or --lora-targets is refused")?;
    ensure!(
        model.is_some() || merge,
        "--lora-rank without --model: the embedded model has no file that adapters could be for; add \
         --lora-merge"
    );
    Ok(())
}

pub(super) fn check_lora_given(rank: Option<usize>, given: &dyn Fn(&str) -> bool) -> Result<()> {
    for key in ["lora_alpha", "lora_targets", "lora_merge"] {
        ensure!(
            rank.is_some() || !given(key),
            "{} has no effect without --lora-rank",
            flag_of(key)
        );
    }
    Ok(())
}

/// The defaults that are stated at the fields.
pub(super) fn defaults<S: Args>() -> S {
    S::augment_args(clap::Command::new("defaults"))
        .try_get_matches_from(["defaults"])
        .and_then(|matches| S::from_arg_matches(&matches))
        .expect("every setting has a default or is optional")
}

fn read_config<S: RunSettings>(path: &Path) -> Result<Table> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read --config {}", path.display()))?;
    parse_settings::<S>(&text).with_context(|| format!("--config {} is refused", path.display()))
}

/// The keys that `text` sets. It is read as `S` first: those errors show the line, key and value.
fn parse_settings<S: RunSettings>(text: &str) -> Result<Table> {
    toml::from_str::<S>(text)?;
    Ok(toml::from_str(text)?)
}

pub(super) fn at_least_one(flag: &str, value: usize) -> Result<()> {
    ensure!(value > 0, "{flag} is {value}, expected a whole number above 0");
    Ok(())
}

fn valid_batch_size(size: usize) -> Result<()> {
    at_least_one("--batch-size", size)?;
    ensure!(size <= MAX_BATCH_SIZE, "--batch-size is {size}, expected at most {MAX_BATCH_SIZE}");
    Ok(())
}

/// TOML holds nothing above `i64::MAX`.
pub(super) fn valid_seed(seed: u64) -> Result<()> {
    ensure!(i64::try_from(seed).is_ok(), "--seed is {seed}, expected at most {}", i64::MAX);
    Ok(())
}

pub(super) fn valid_paths(paths: &[(&str, &Option<PathBuf>)]) -> Result<()> {
    for (flag, path) in paths {
        if let Some(path) = path {
            ensure!(!path.as_os_str().is_empty(), "{flag} is empty");
            ensure!(path.to_str().is_some(), "{flag} is not UTF-8: {}", path.display());
        }
    }
    Ok(())
}

/// The ops compute in f32: what is 0 or infinite there is out of range too.
fn in_range(
    flag: &str,
    value: Option<f64>,
    valid: impl Fn(f64) -> bool,
    expected: &str,
) -> Result<()> {
    match value {
        Some(x) if !(x.is_finite() && valid(x)) => {
            bail!("{flag} is {x}, expected a finite number {expected}")
        }
        Some(x) if !((x as f32).is_finite() && valid(f64::from(x as f32))) => {
            bail!("{flag} is {x}, expected a finite number {expected} in 32 bits")
        }
        _ => Ok(()),
    }
}

fn needed(flag: &str, value: &Option<String>, reward: &RewardKind) -> Result<()> {
    ensure!(
        value.as_ref().is_some_and(|text| !text.trim().is_empty()),
        "{flag} is missing: --reward {reward} needs it"
    );
    Ok(())
}

fn flag_of(key: &str) -> String {
    format!("--{}", key.replace('_', "-"))
}

/// A whole number; TOML holds nothing above `i64::MAX`.
pub(super) fn count(text: &str) -> Result<usize, String> {
    text.parse::<usize>()
        .ok()
        .filter(|&n| i64::try_from(n).is_ok())
        .ok_or_else(|| "expected a whole number of at least 0".to_owned())
}

pub(super) fn seed(text: &str) -> Result<u64, String> {
    text.parse::<u64>()
        .ok()
        .filter(|&n| i64::try_from(n).is_ok())
        .ok_or_else(|| format!("expected a whole number from 0 to {}", i64::MAX))
}

/// A path that TOML can hold.
pub(super) fn utf8_path(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() {
        return Err("expected a path".to_owned());
    }
    Ok(PathBuf::from(text))
}
