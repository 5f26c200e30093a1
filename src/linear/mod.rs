//! From a model's last hidden states to log-probabilities: the product with the head's weight by tiles,
//! each of which is reduced before the next one is made. There is never an `[N, V]`.
//!
//! With hidden states `h[n, 0..H]`, the head's weight `W[0..V, 0..H]`, a bias `b`, a scale `s`, a softcap `c`
//! and a temperature `τ`, which may be one a row, the logits are, in this order,
//!
//! ```text
//! y = h Wᵀ + b         z = c tanh(s y / c) / τ
//! ```
//!
//! and log-probabilities, entropies and gradients those of [`logprob`](crate::logprob):
//!
//! ```text
//! forward, a tile      h [N, H] W[v..v+w]ᵀ         logits [N, w]
//!                      folded into running sums    [4, N]
//! forward, the end     running sums                logp, entropy, and two numbers a row for backward
//! backward, a tile     the product again           logits [N, w]
//!                      gradient in their place     G [N, w]
//!                      G W[v..v+w]                 added to the gradient of h [N, H], in f32
//!                      Gᵀ h                        the gradient of W[v..v+w]
//! never                                            [N, V]
//! ```
//!
//! This is TRL's `ChunkedLogProbFunction`, verl's `FusedLinearForPPO` and Liger's fused linear
//! cross-entropy, without their rounding of logits and sums to 16 bits: products and sums are in f32
//! whatever the type of `h` and `W`.
//!
//! | argument | shape | type |
//! |---|---|---|
//! | hidden | `[.., H]` | f32, f16 or bf16 |
//! | weight | `[V, H]` | the same |
//! | bias | `[V]` | the same |
//! | temperatures | `[..]` | f32, times the one of the options |
//! | targets | `[..]` | u32 or i64, in `0..V` or `ignore_index` |
//! | logp, entropy | `[..]` | f32, in nats |
//!
//! - A row whose target is [`LinearOptions::ignore_index`] takes part in no product: it gives 0, and so is
//!   its gradient, whatever its hidden state holds.
//! - A gradient that is not wanted costs no product.
//!
//! Cost: two products of 2 N H V operations forward and backward each, the latter two more; and memory for
//! one tile, hidden states in f32 and their gradient. On the CPU only: on CUDA the tile passes of
//! [`logprob::cuda`](crate::logprob::cuda) go with the products of the program's own library.

pub mod cpu;
pub mod reference;
#[cfg(feature = "candle")]
mod tensor;

#[cfg(feature = "candle")]
pub use tensor::{linear_logprobs, LinearInputs, LinearOutput};

use crate::error::{Error, Result};
use crate::logprob::LogprobOptions;
use crate::memory::list;

const OP: &str = "linear_logprobs";

/// Options of the op; the default is a temperature and a scale of 1, and no ignored target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinearOptions {
    /// The logits are divided by it. The temperature that the tokens were sampled at.
    pub temperature: f64,
    /// Rows with this target are skipped. PyTorch's custom is -100.
    pub ignore_index: Option<i64>,
    /// The logits are multiplied by it (`logit_scale` of Cohere's models, 1 / `logits_scaling` of
    /// Granite's); above 0.
    pub logit_scale: f64,
    /// Limits the logits, scaled and not yet divided, to plus or minus this (30 in Gemma 2); above 0.
    pub softcap: Option<f64>,
    /// Bytes of a tile of logits: 32 MiB, which stay in the caches of a server.
    pub tile_bytes: usize,
}

impl Default for LinearOptions {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            ignore_index: None,
            logit_scale: 1.0,
            softcap: None,
            tile_bytes: 32 << 20,
        }
    }
}

impl LinearOptions {
    pub(crate) fn validate(&self) -> Result<()> {
        let (scale, temperature) = (self.logit_scale, self.temperature);
        Error::check_option(OP, "logit_scale", scale, scale > 0.0, "above 0")?;
        Error::check_option(OP, "temperature", temperature, temperature > 0.0, "above 0")?;
        let cap = self.softcap.unwrap_or(1.0);
        Error::check_option(OP, "softcap", cap, cap > 0.0, "above 0")
    }

    /// The options of the row passes, which ignored rows do not reach, for logits that are the products, or that
    /// have been made of them.
    pub(crate) fn of_rows(&self, made: bool) -> Result<LogprobOptions> {
        let temperature = if made { 1.0 } else { self.temperature / self.logit_scale };
        let options = LogprobOptions { temperature, ignore_index: None };
        options.validate()?;
        Ok(options)
    }
}

/// Rows of hidden states, numbers in each, and columns of the vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Rows of hidden states, one a token.
    pub rows: usize,
    /// Numbers in a hidden state.
    pub hidden_size: usize,
    /// Columns of the vocabulary; above 0.
    pub vocab: usize,
}

list! {
    /// The inputs of the forward pass in some memory; see [the module](self) for their meaning.
    inputs ForwardInputs<T, I>((leading, hidden_size, vocab): (&[usize], usize, usize)) {
        /// Hidden states, `[rows, hidden_size]`.
        hidden: T [leading, &[hidden_size]],
        /// The head's weight, `[vocab, hidden_size]`.
        weight: T [&[vocab, hidden_size]],
        /// Ids of the tokens, `[rows]`.
        targets: I [leading],
    } optional {
        /// The head's bias, `[vocab]`.
        bias: T [&[vocab]],
        /// A temperature for each row, which the one of the options multiplies, `[rows]`; above 0.
        temperatures: f32 [leading],
    }
}

list! {
    /// The outputs of the forward pass in some memory, one value a row.
    outputs ForwardOutputs(leading: &[usize]) {
        /// Log-probability of the target, `[rows]`.
        logp: f32 [leading],
        /// The row's largest logit, `[rows]`, for the backward pass.
        max: f32 [leading],
        /// ln Σ e^{(z - max) / temperature}, `[rows]`, for the backward pass.
        log_sum: f32 [leading],
    } optional {
        /// Entropy of the row's distribution, `[rows]`, if wanted.
        entropy: f32 [leading],
    }
}

list! {
    /// The inputs of the backward pass in some memory: those of the forward pass, what it left, and the
    /// upstream gradients, of which a missing one stands for zeros.
    inputs BackwardInputs<T, I>((leading, hidden_size, vocab): (&[usize], usize, usize))
    with
        /// The inputs of the forward pass.
        forward: ForwardInputs<'a, S, T, I>
    {
        /// The row's largest logit, `[rows]`.
        max: f32 [leading],
        /// ln Σ e^{(z - max) / temperature}, `[rows]`.
        log_sum: f32 [leading],
    } optional {
        /// Entropy of the row's distribution, `[rows]`; needed by `grad_entropy` alone.
        entropy: f32 [leading],
        /// Upstream gradient of the log-probabilities, `[rows]`.
        grad_logp: f32 [leading],
        /// Upstream gradient of the entropies, `[rows]`.
        grad_entropy: f32 [leading],
    }
}

list! {
    /// The outputs of the backward pass in some memory, those that are wanted.
    outputs BackwardOutputs<T>((leading, hidden_size, vocab): (&[usize], usize, usize)) {
    } optional {
        /// Gradient of the hidden states, `[rows, hidden_size]`.
        grad_hidden: T [leading, &[hidden_size]],
        /// Gradient of the weight, `[vocab, hidden_size]`.
        grad_weight: T [&[vocab, hidden_size]],
        /// Gradient of the bias, `[vocab]`.
        grad_bias: T [&[vocab]],
    }
}
