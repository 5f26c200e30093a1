//! The settings of the subcommands that learn from a file of examples.

use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use clap::builder::PossibleValuesParser;
use clap::Args;
use serde::{Deserialize, Serialize};

use super::{
    adapters_of_settings, at_least_one, check_lora_given, count, defaults, in_range, run_of_steps,
    seed, utf8_path, valid_batch_size, valid_lora, valid_paths, valid_seed, DeviceName,
    LrScheduleKind, RunSettings,
};
use crate::driver::model::Lora;
use crate::preference::{preference_loss, PreferenceInputs, PreferenceLoss, PreferenceOptions};

/// The course of a training on examples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tuning {
    /// Optimiser steps.
    pub steps: usize,
    /// Examples in one of them.
    pub batch_size: usize,
    /// Seed of the order of examples.
    pub seed: u64,
    /// Share of the examples that is held out.
    pub held_out: f64,
    /// Steps between two looks at those held out.
    pub eval_every: usize,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Decoupled weight decay of AdamW.
    pub weight_decay: f64,
    /// Steps over which the learning rate rises linearly from 0.
    pub warmup_steps: usize,
    /// Learning rate after the warm-up.
    pub lr_schedule: LrScheduleKind,
    /// Largest global norm of a gradient.
    pub max_grad_norm: f64,
}

impl Tuning {
    fn validate(&self) -> Result<()> {
        at_least_one("--steps", self.steps)?;
        valid_batch_size(self.batch_size)?;
        at_least_one("--eval-every", self.eval_every)?;
        valid_seed(self.seed)?;
        in_range("--held-out", Some(self.held_out), |x| (0.0..1.0).contains(&x), "in [0, 1)")?;
        in_range("--learning-rate", Some(self.learning_rate), |x| x >= 0.0, "of at least 0")?;
        in_range("--weight-decay", Some(self.weight_decay), |x| x >= 0.0, "of at least 0")?;
        in_range("--max-grad-norm", Some(self.max_grad_norm), |x| x > 0.0, "above 0")
    }
}

/// Defines the settings of a subcommand that learns from examples: its own ones, given here, and
/// those that all have. A macro, as serde cannot refuse unknown keys of a struct that is flattened
/// into another.
macro_rules! tuning_settings {
    (
        $(#[$doc:meta])*
        $name:ident {
            command: $command:literal,
            steps: $steps:literal,
            batch_size: $batch_size:literal,
            learning_rate: $learning_rate:literal,
        }
        $($own:tt)*
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        #[command(allow_negative_numbers = true)]
        pub struct $name {
            /// Model to start from: a Hugging Face folder or a GGUF file. Without it, the small
            /// embedded model
            #[arg(long, value_name = "PATH", value_parser = utf8_path, help_heading = "Run")]
            #[serde(skip_serializing_if = "Option::is_none")]
            pub model: Option<PathBuf>,

            $($own)*

            /// Folder for metrics, samples, settings and weights; it must not hold a run [default:
            /// the next free folder of runs/ that is named for the command]
            #[arg(long, value_name = "DIR", value_parser = utf8_path, help_heading = "Run")]
            #[serde(skip_serializing_if = "Option::is_none")]
            pub out: Option<PathBuf>,

            /// Optimiser steps
            #[arg(long, value_name = "N", value_parser = count, default_value_t = $steps,
                help_heading = "Run")]
            pub steps: usize,

            /// Steps from one checkpoint to the next, from which --resume goes on; 0 makes one only
            /// where the run is stopped
            #[arg(long, value_name = "N", value_parser = count, default_value_t = 50,
                help_heading = "Run")]
            pub save_every: usize,

            /// The folder of a run that these go on with.
            #[arg(skip)]
            #[serde(skip)]
            pub resume: Option<PathBuf>,

            /// Seed of everything random; on the CPU the same seed gives the same run
            #[arg(long, value_name = "N", value_parser = seed, default_value_t = 0,
                help_heading = "Run")]
            pub seed: u64,

            /// Device to compute on: cpu, or with the feature cuda also cuda or cuda:N
            #[arg(long, value_name = "DEVICE", default_value_t = DeviceName::Cpu,
                help_heading = "Run")]
            pub device: DeviceName,

            /// Share of the examples that is held out: nothing is learned from them, they show how
            /// well the rest is learned
            #[arg(long, value_name = "X", default_value_t = 0.1, help_heading = "Evaluation")]
            pub held_out: f64,

            /// Steps between two looks at the examples held out
            #[arg(long, value_name = "N", value_parser = count, default_value_t = 50,
                help_heading = "Evaluation")]
            pub eval_every: usize,

            /// Train low-rank adapters (LoRA) of that rank, and nothing else but the head of a reward
            /// model. They are saved in PEFT's format [default: off]
            #[arg(long, value_name = "N", value_parser = count, help_heading = "LoRA")]
            #[serde(skip_serializing_if = "Option::is_none")]
            pub lora_rank: Option<usize>,

            /// Weight of the adapters, times their rank [default: twice the rank]
            #[arg(long, value_name = "X", help_heading = "LoRA")]
            #[serde(skip_serializing_if = "Option::is_none")]
            pub lora_alpha: Option<f64>,

            /// Projections that have adapters, separated by commas
            #[arg(long, value_name = "NAMES", value_delimiter = ',',
                default_values = Lora::TARGETS,
                value_parser = PossibleValuesParser::new(Lora::TARGETS), help_heading = "LoRA")]
            pub lora_targets: Vec<String>,

            /// Add the adapters to the weights at the end, and save a whole model
            #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true",
                action = clap::ArgAction::Set, default_value_t = false, help_heading = "LoRA")]
            pub lora_merge: bool,

            /// Examples in one optimiser step
            #[arg(long, value_name = "N", value_parser = count, default_value_t = $batch_size,
                help_heading = "Optimiser")]
            pub batch_size: usize,

            /// Learning rate
            #[arg(long, value_name = "X", default_value_t = $learning_rate,
                help_heading = "Optimiser")]
            pub learning_rate: f64,

            /// Decoupled weight decay of AdamW
            #[arg(long, value_name = "X", default_value_t = 0.0, help_heading = "Optimiser")]
            pub weight_decay: f64,

            /// Steps over which the learning rate rises linearly from 0
            #[arg(long, value_name = "N", value_parser = count, default_value_t = 0,
                help_heading = "Optimiser")]
            pub warmup_steps: usize,

            /// Learning rate after the warm-up
            #[arg(long, value_enum, default_value_t = LrScheduleKind::Linear,
                help_heading = "Optimiser")]
            pub lr_schedule: LrScheduleKind,

            /// Largest global norm of a gradient; larger ones are scaled down to it
            #[arg(long, value_name = "X", default_value_t = 1.0, help_heading = "Optimiser")]
            pub max_grad_norm: f64,
        }

        impl Default for $name {
            fn default() -> Self {
                defaults()
            }
        }

        impl $name {
            adapters_of_settings!();

            /// The course of the training.
            pub fn tuning(&self) -> Tuning {
                Tuning {
                    steps: self.steps,
                    batch_size: self.batch_size,
                    seed: self.seed,
                    held_out: self.held_out,
                    eval_every: self.eval_every,
                    learning_rate: self.learning_rate,
                    weight_decay: self.weight_decay,
                    warmup_steps: self.warmup_steps,
                    lr_schedule: self.lr_schedule,
                    max_grad_norm: self.max_grad_norm,
                }
            }
        }

        impl RunSettings for $name {
            const COMMAND: &'static str = $command;

            run_of_steps!();

            fn out(&mut self) -> &mut Option<PathBuf> {
                &mut self.out
            }

            fn validate(&self) -> Result<()> {
                self.tuning().validate()?;
                valid_paths(&[("--model", &self.model), ("--out", &self.out)])?;
                valid_lora(self.lora(), self.lora_alpha, &self.model, self.lora_merge)?;
                self.validate_own()
            }

            fn check_given(&self, given: &dyn Fn(&str) -> bool) -> Result<()> {
                check_lora_given(self.lora_rank, given)
            }
        }
    };
}

tuning_settings! {
    /// The settings of `sft`.
    SftSettings {
        command: "sft",
        steps: 200,
        batch_size: 8,
        learning_rate: 2e-5,
    }

    /// Demonstrations: a .jsonl file with one {"prompt": "..", "response": ".."} a line, of which
    /// the responses are learned, or one {"messages": [..]}, of which the assistant's last one is, or
    /// a text file with one text a line. Needed with --model
    #[arg(long, value_name = "FILE", value_parser = utf8_path, help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub demonstrations: Option<PathBuf>,

    /// Prompts that are answered before and after, as in `train` [default: those of the embedded
    /// run, or with --model the first ones of --demonstrations]
    #[arg(long, value_name = "FILE", value_parser = utf8_path, help_heading = "Samples")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompts: Option<PathBuf>,

    /// Longest response to them, in tokens
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 24,
        help_heading = "Samples")]
    pub max_new_tokens: usize,
}

impl SftSettings {
    fn validate_own(&self) -> Result<()> {
        at_least_one("--max-new-tokens", self.max_new_tokens)?;
        valid_paths(&[("--demonstrations", &self.demonstrations), ("--prompts", &self.prompts)])?;
        needs_data("--demonstrations", &self.demonstrations, &self.model)
    }
}

fn needs_data(flag: &str, data: &Option<PathBuf>, model: &Option<PathBuf>) -> Result<()> {
    ensure!(
        model.is_none() || data.is_some(),
        "{flag} is missing: with --model, name a file of them"
    );
    Ok(())
}

tuning_settings! {
    /// The settings of `reward`.
    RewardModelSettings {
        command: "reward",
        steps: 200,
        batch_size: 8,
        learning_rate: 1e-5,
    }

    /// Preferences: a .jsonl file with one {"prompt": "..", "chosen": "..", "rejected": ".."} a line;
    /// a "margin" beside them is what the chosen one should score more at least. Needed with --model
    #[arg(long, value_name = "FILE", value_parser = utf8_path, help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preferences: Option<PathBuf>,

    /// Steps of language modelling that fit the embedded model before; no effect with --model
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 300,
        help_heading = "Run")]
    pub lm_steps: usize,

    /// Weight of the squared sum of a pair's scores, which keeps their mean near 0
    #[arg(long, value_name = "X", default_value_t = 0.0, help_heading = "Loss")]
    pub center_coef: f64,
}

impl RewardModelSettings {
    fn validate_own(&self) -> Result<()> {
        ensure!(
            self.lora_rank.is_none() || self.lora_merge,
            "--lora-rank without --lora-merge: a reward model is saved as a whole"
        );
        in_range("--center-coef", Some(self.center_coef), |x| x >= 0.0, "of at least 0")?;
        valid_paths(&[("--preferences", &self.preferences)])?;
        needs_data("--preferences", &self.preferences, &self.model)
    }
}

tuning_settings! {
    /// The settings of `dpo`.
    DpoSettings {
        command: "dpo",
        steps: 200,
        batch_size: 8,
        learning_rate: 1e-6,
    }

    /// Preferences: a .jsonl file with one {"prompt": "..", "chosen": "..", "rejected": ".."} a line.
    /// Needed with --model
    #[arg(long, value_name = "FILE", value_parser = utf8_path, help_heading = "Run")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preferences: Option<PathBuf>,

    /// Steps of language modelling that fit the embedded model before; no effect with --model
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 300,
        help_heading = "Run")]
    pub lm_steps: usize,

    /// Prompts that are answered before and after, as in `train` [default: those of the embedded
    /// run, or with --model the first ones of --preferences]
    #[arg(long, value_name = "FILE", value_parser = utf8_path, help_heading = "Samples")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompts: Option<PathBuf>,

    /// Longest response to them, in tokens
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 24,
        help_heading = "Samples")]
    pub max_new_tokens: usize,

    /// Loss of a pair
    #[arg(long, value_enum, default_value_t = PreferenceLoss::Sigmoid, help_heading = "Loss")]
    pub loss: PreferenceLoss,

    /// Scale of the log-ratios to the reference: the larger, the nearer the policy stays to it
    #[arg(long, value_name = "X", default_value_t = 0.1, help_heading = "Loss")]
    pub beta: f64,

    /// Share of the pairs that are taken to be the wrong way round, for losses that have one
    #[arg(long, value_name = "X", default_value_t = 0.0, help_heading = "Loss")]
    pub label_smoothing: f64,

    /// Divide the log-ratios by the lengths of the responses, as some losses always do
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true",
        action = clap::ArgAction::Set, default_value_t = false, help_heading = "Loss")]
    pub average_log_prob: bool,

    /// Target margin, for losses that have one
    #[arg(long, value_name = "X", default_value_t = 0.0, help_heading = "Loss")]
    pub gamma: f64,

    /// Weight of language modelling on the chosen responses
    #[arg(long, value_name = "X", default_value_t = 0.0, help_heading = "Loss")]
    pub sft_coef: f64,
}

impl DpoSettings {
    /// Options of the loss.
    pub fn options(&self) -> PreferenceOptions {
        PreferenceOptions {
            loss: self.loss,
            beta: self.beta,
            label_smoothing: self.label_smoothing,
            average_log_prob: self.average_log_prob,
            gamma: self.gamma,
            sft_coef: self.sft_coef,
            ..PreferenceOptions::default()
        }
    }

    fn validate_own(&self) -> Result<()> {
        at_least_one("--max-new-tokens", self.max_new_tokens)?;
        in_range("--beta", Some(self.beta), |x| x > 0.0, "above 0")?;
        let smoothing = Some(self.label_smoothing);
        in_range("--label-smoothing", smoothing, |x| (0.0..=0.5).contains(&x), "in [0, 0.5]")?;
        in_range("--gamma", Some(self.gamma), |x| x >= 0.0, "of at least 0")?;
        in_range("--sft-coef", Some(self.sft_coef), |x| x >= 0.0, "of at least 0")?;
        ensure!(self.loss != PreferenceLoss::Kto, "--loss kto is refused: it has no pairs");
        // The rest is the op's to say: what goes with which loss.
        let logp = Tensor::zeros((2, 1), DType::F32, &Device::Cpu)?;
        let inputs = PreferenceInputs {
            ref_logp: Some(&logp).filter(|_| !self.loss.is_reference_free()),
            ..PreferenceInputs::new(&logp)
        };
        preference_loss(&inputs, &self.options()).context("--loss is refused")?;
        valid_paths(&[("--preferences", &self.preferences), ("--prompts", &self.prompts)])?;
        needs_data("--preferences", &self.preferences, &self.model)
    }
}
