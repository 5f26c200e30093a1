//! Fused kernels for the token-level arithmetic of PPO.
#![warn(missing_docs)]

pub mod cpu;
mod error;
#[cfg(feature = "candle")]
mod tensor;

pub use error::{Error, Result};
