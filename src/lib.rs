//! Fused kernels for the token-level arithmetic of PPO and its family: everything between a language
//! model's logits and its optimiser.
//!
//! | op | what it replaces |
//! |---|---|
//! | [`logprob`] | a `[tokens, vocabulary]` log-softmax to read one number a row; the entropy with it |
//! | `linear` | the logits altogether: log-probabilities from hidden states (feature `linear`) |
//! | [`kl`] | per-token KL from log-probabilities, and exact KL over the vocabulary |
//! | [`gae`] | a loop over time for advantages and returns, with reward shaping before it |
//! | [`advantages`] | loops over groups of sequences: GRPO, RLOO and their relatives, from a score each |
//! | [`whiten`] | masked mean, variance and normalisation |
//! | [`correction`] | importance weights, rejections and statistics where another engine made the rollout |
//! | [`ppo_loss`] | the dozens of elementwise steps of the clipped loss, its gradients and statistics |
//! | [`preference`] | masked sums of log-probabilities, and the losses of the DPO family on them |
//!
//! Every op is one module with the same parts:
//! - `reference`: the oracle, plain f64 loops that can be checked by eye, for inputs of the right
//!   length (others panic);
//! - `cpu`: the fused implementation on slices, which allocates no buffer;
//! - `cuda`: launches of hand-written kernels on device pointers and the caller's stream (feature
//!   `cuda`);
//! - the functions of the module itself: candle tensors in and out, with gradients, on the CPU and on
//!   CUDA devices (feature `candle`, on by default);
//! - `capi`: the functions of the C library, see `include/ppo_kernels.h` (feature `capi`).
//!
//! All ops hold to the same rules. Sums are kept in f32 whatever the type of the logits. What a mask
//! leaves out counts for nothing and may hold anything, NaN included. The same inputs give the same
//! bits, for any number of threads, and a row's result does not depend on the rest of the batch.
//! The references aside, nothing panics on bad input: every function returns an [`Error`] that names
//! the argument.
#![warn(missing_docs)]

pub mod advantages;
#[cfg(feature = "capi")]
pub mod capi;
pub mod correction;
pub mod cpu;
pub mod cuda;
#[cfg(feature = "driver")]
pub mod driver;
mod error;
pub mod gae;
pub mod kl;
#[cfg(feature = "linear")]
pub mod linear;
pub mod logprob;
pub mod memory;
pub mod moments;
pub mod pack;
pub mod ppo_loss;
pub mod preference;
#[cfg(feature = "candle")]
mod tensor;
pub mod tolerance;
pub mod whiten;

pub use error::{Error, Result};

/// The example of the README, run as a test.
#[cfg(all(doctest, feature = "candle"))]
mod examples {
    #[doc = include_str!("../README.md")]
    struct Readme;
}
