//! Fused log-softmax gather: the log-probability of one token a row, without the `[N, V]`
//! softmax, and the entropy of the row's distribution in the same pass.
//!
//! With logits `z[n, 0..V]`, a target `t[n]` and a temperature `τ`, per row:
//!
//! ```text
//! x_j  = (z_j - max z) / τ              s = Σ e^{x_j}
//! logp = x_t - ln s                     p_j = e^{x_j} / s
//! H    = ln s - Σ p_j x_j               (= -Σ p_j ln p_j)
//!
//! ∂logp/∂z_j = (1[j = t] - p_j) / τ     ∂H/∂z_j = -p_j (ln p_j + H) / τ
//! ```
//!
//! The maximum is subtracted before anything is scaled, so a large offset common to a row costs no
//! digits. This is `selective_log_softmax` of TRL and `logprobs_from_logits` of verl, with
//! `entropy_from_logits` of both.
//!
//! | argument | shape | type |
//! |---|---|---|
//! | logits | `[.., V]` | f32, f16 or bf16; sums are kept in f32 |
//! | targets | `[..]` | u32 or i64, in `0..V` or `ignore_index` |
//! | logp, entropy | `[..]` | f32, in nats |
//!
//! - A logit of -inf is a token of probability 0: it adds nothing, and its gradient is 0, unless it
//!   is the target: then logp is -inf, with the gradient of the formula.
//! - A row with NaN or +inf, or of -inf only, gives NaN in that row and in no other.
//! - A row whose target is [`LogprobOptions::ignore_index`] is not read: logp and entropy are 0, and
//!   so is its gradient. Any other target outside `0..V` is an error on the CPU, and NaN in its row on
//!   CUDA, where looking would cost a wait for the device.
//! - A row whose upstream gradient is exactly 0 gets a zero gradient without being read, so what
//!   a loss masks out may hold anything.
//!
//! Cost, with S the bytes of the logits: forward reads S once; backward reads S once and writes S
//! once. All else is one value a row.

#[cfg(any())] // TODO
#[allow(clippy::missing_safety_doc, clippy::too_many_arguments, clippy::type_complexity)]
pub mod capi;
pub mod cpu;
#[cfg(any(feature = "cuda", feature = "simt"))]
pub mod cuda;
pub mod reference;
#[cfg(feature = "candle")]
mod tensor;

#[cfg(feature = "candle")]
pub use tensor::{logprobs, logprobs_and_entropy};

use crate::error::{Error, Result};

const OP: &str = "logprob";

/// Options of the op; the default is a temperature of 1 and no ignored target.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogprobOptions {
    /// The logits are divided by it; 1e-30 to 1e30. The temperature that the tokens were sampled at.
    pub temperature: f64,
    /// Rows with this target are skipped. PyTorch's custom is -100.
    pub ignore_index: Option<i64>,
}

impl Default for LogprobOptions {
    fn default() -> Self {
        Self { temperature: 1.0, ignore_index: None }
    }
}

impl LogprobOptions {
    pub(crate) fn validate(&self) -> Result<()> {
        // Its inverse has to fit into f32: a scale of 0 or infinity makes NaN of legal logits.
        let valid = (1e-30..=1e30).contains(&self.temperature);
        Error::check_option(OP, "temperature", self.temperature, valid, "1e-30 to 1e30")
    }
}

/// `Ok` when so many logits make `rows` rows of a vocabulary that is not empty.
fn check_logits(logits: usize, rows: usize, vocab: usize) -> Result<()> {
    if vocab > 0 && rows.checked_mul(vocab) == Some(logits) {
        return Ok(());
    }
    Err(Error::Shape {
        op: OP,
        arg: "logits",
        expected: format!("[{rows}, {}]", vocab.max(1)),
        got: format!("[{logits}] for a vocabulary of {vocab}"),
    })
}
