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

#[cfg(feature = "capi")]
#[allow(clippy::missing_safety_doc)]
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
use crate::memory::{Element, Reads, Shape, Space, Writes};

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

/// The inputs of the forward pass in some memory; see [the module](self) for their meaning.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ForwardInputs<'a, S: Space, T: Element, I: Element> {
    /// Logits, `[rows, vocab]`.
    pub logits: S::In<'a, T>,
    /// Ids of the tokens, `[rows]`.
    pub targets: S::In<'a, I>,
}

impl<S: Space, T: Element, I: Element> ForwardInputs<'_, S, T, I> {
    /// The inputs in another space.
    pub(crate) fn try_map<'b, To: Space, C: Reads<S, To>>(
        &'b self,
        leading: &[usize],
        vocab: usize,
        c: &mut C,
    ) -> std::result::Result<ForwardInputs<'b, To, T, I>, C::Error> {
        let (logits, rows): (Shape, Shape) = (&[leading, &[vocab]], &[leading]);
        Ok(ForwardInputs {
            logits: c.input("logits", logits, &self.logits)?,
            targets: c.input("targets", rows, &self.targets)?,
        })
    }
}

/// The outputs of the forward pass in some memory, one value a row. The maximum and the logarithm of
/// the sum, which the backward pass needs, are wanted both or neither.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ForwardOutputs<'a, S: Space> {
    /// Log-probability of the target, `[rows]`.
    pub logp: S::Out<'a, f32>,
    /// Entropy of the row's distribution, `[rows]`, if wanted.
    pub entropy: Option<S::Out<'a, f32>>,
    /// The row's largest logit, `[rows]`, if wanted.
    pub max: Option<S::Out<'a, f32>>,
    /// ln Σ e^{(z - max) / temperature}, `[rows]`, if wanted.
    pub log_sum: Option<S::Out<'a, f32>>,
}

impl<S: Space> ForwardOutputs<'_, S> {
    /// The outputs in another space.
    pub(crate) fn try_map<'b, To: Space, C: Writes<S, To>>(
        &'b mut self,
        leading: &[usize],
        c: &mut C,
    ) -> std::result::Result<ForwardOutputs<'b, To>, C::Error> {
        let rows: Shape = &[leading];
        Ok(ForwardOutputs {
            logp: c.output("logp", rows, &[], &mut self.logp)?,
            entropy: c.optional_output("entropy", rows, &[], &mut self.entropy)?,
            max: c.optional_output("max", rows, &[], &mut self.max)?,
            log_sum: c.optional_output("log_sum", rows, &[], &mut self.log_sum)?,
        })
    }

    /// `Ok` when what the backward pass needs is wanted as a whole or not at all.
    fn check_pair(&self) -> Result<()> {
        let (max, log_sum) = (self.max.is_some(), self.log_sum.is_some());
        Error::check_given(OP, ["max", "log_sum"], [max, log_sum])?;
        Error::check_given(OP, ["log_sum", "max"], [log_sum, max])
    }
}

/// The inputs of the backward pass in some memory: those of the forward pass, what it left, and the
/// upstream gradients, of which a missing one stands for zeros.
#[repr(C)]
pub struct BackwardInputs<'a, S: Space, T: Element, I: Element> {
    /// The inputs of the forward pass.
    pub forward: ForwardInputs<'a, S, T, I>,
    /// The row's largest logit, `[rows]`.
    pub max: S::In<'a, f32>,
    /// ln Σ e^{(z - max) / temperature}, `[rows]`.
    pub log_sum: S::In<'a, f32>,
    /// Entropy of the row's distribution, `[rows]`; needed by `grad_entropy` alone.
    pub entropy: Option<S::In<'a, f32>>,
    /// Upstream gradient of the log-probabilities, `[rows]`.
    pub grad_logp: Option<S::In<'a, f32>>,
    /// Upstream gradient of the entropies, `[rows]`.
    pub grad_entropy: Option<S::In<'a, f32>>,
}

// `derive` would ask too little of the space for the list within.
impl<S: Space, T: Element, I: Element> Clone for BackwardInputs<'_, S, T, I>
where
    Self: Copy,
{
    fn clone(&self) -> Self {
        *self
    }
}

impl<'a, S: Space, T: Element, I: Element> Copy for BackwardInputs<'a, S, T, I>
where
    ForwardInputs<'a, S, T, I>: Copy,
    S::In<'a, f32>: Copy,
{
}

impl<'a, S: Space, T: Element, I: Element> BackwardInputs<'a, S, T, I> {
    /// The inputs in another space.
    pub(crate) fn try_map<'b, To: Space, C: Reads<S, To>>(
        &'b self,
        leading: &[usize],
        vocab: usize,
        c: &mut C,
    ) -> std::result::Result<BackwardInputs<'b, To, T, I>, C::Error> {
        let rows: Shape = &[leading];
        Ok(BackwardInputs {
            forward: self.forward.try_map(leading, vocab, c)?,
            max: c.input("max", rows, &self.max)?,
            log_sum: c.input("log_sum", rows, &self.log_sum)?,
            entropy: c.optional_input("entropy", rows, &self.entropy)?,
            grad_logp: c.optional_input("grad_logp", rows, &self.grad_logp)?,
            grad_entropy: c.optional_input("grad_entropy", rows, &self.grad_entropy)?,
        })
    }

    /// The entropies, or what may stand in their place where no gradient comes from them.
    fn entropy_or_any(&self) -> Result<S::In<'a, f32>>
    where
        S::In<'a, f32>: Copy,
    {
        let given = [self.grad_entropy.is_some(), self.entropy.is_some()];
        Error::check_given(OP, ["grad_entropy", "entropy"], given)?;
        // Times 0, so that any number will do where the row has a distribution; NaN where it has none.
        Ok(self.entropy.unwrap_or(self.log_sum))
    }
}

/// The output of the backward pass in some memory.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct BackwardOutputs<'a, S: Space, T: Element> {
    /// Gradient of the logits, `[rows, vocab]`; on a device it may be the memory of the logits.
    pub grad_logits: S::Out<'a, T>,
}

impl<S: Space, T: Element> BackwardOutputs<'_, S, T> {
    /// The output in another space.
    pub(crate) fn try_map<'b, To: Space, C: Writes<S, To>>(
        &'b mut self,
        leading: &[usize],
        vocab: usize,
        c: &mut C,
    ) -> std::result::Result<BackwardOutputs<'b, To, T>, C::Error> {
        let logits: Shape = &[leading, &[vocab]];
        Ok(BackwardOutputs {
            grad_logits: c.output("grad_logits", logits, &["logits"], &mut self.grad_logits)?,
        })
    }
}
