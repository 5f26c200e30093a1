//! The training program, and an example of how the crate is used: language models trained with nothing
//! of the crate but its public functions.
//!
//! PPO is `ppo-kernels train`, and with `--algorithm` GRPO, RLOO and REINFORCE++:
//!
//! | phase | module | ops |
//! |---|---|---|
//! | sample a response to each prompt and score it | [`rollout`] | - |
//! | log-probabilities, KL, values, advantages | [`experience`] | `logprob`, `kl`, `gae`, `advantages`, `whiten` |
//! | clipped gradient steps in minibatches | [`update`] | `logprob`, `ppo_loss` |
//!
//! [`trainer`] does the three in a row, step by step; [`train`] is the whole run. The others learn from
//! files of [`examples`], each as one [`tuning::Objective`]:
//!
//! | subcommand | module | learns |
//! |---|---|---|
//! | `sft` | [`sft`] | to respond as in demonstrations |
//! | `reward` | [`reward_model`] | to score preferred responses above others |
//! | `dpo` | [`dpo`] | to respond as is preferred |
//!
//! [`session`] is what all runs do before and after their steps, [`demo`] does one after the other, and
//! [`evaluate`] looks at what they saved. The models are in [`model`], [`load`], [`tokenizer`] and
//! [`generate`]; what the user gives and gets in [`config`], [`prompts`], [`chat`], [`reward`] and
//! [`report`]; the run that needs no file at all in [`embedded`].
//!
//! Besides, [`check`] holds the kernels against their references, and [`bench_table`] makes a table of
//! what the benches measured.

pub mod bench_table;
pub mod chat;
pub mod check;
pub mod checkpoint;
pub mod config;
pub mod demo;
pub mod dpo;
pub mod embedded;
pub mod evaluate;
pub mod examples;
pub mod experience;
pub mod generate;
pub mod kl_controller;
pub mod lines;
pub mod load;
pub mod model;
pub mod optim;
pub mod prompts;
pub mod report;
pub mod reward;
pub mod reward_model;
pub mod rollout;
pub mod sequences;
pub mod session;
pub mod sft;
pub mod tokenizer;
pub mod train;
pub mod trainer;
pub mod tuning;
pub mod update;
