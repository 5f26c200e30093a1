//! Fused kernels for the token-level arithmetic of PPO.
#![warn(missing_docs)]

pub mod cpu;
#[cfg(feature = "driver")]
pub mod driver;
mod error;
pub mod gae;
pub mod kl;
pub mod logprob;
pub mod ppo_loss;
#[cfg(feature = "candle")]
mod tensor;
pub mod whiten;

pub use error::{Error, Result};
