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
//! digits. One occurrence of it is left out of the sum: `ln s = ln(1 + Σ' e^{x_j})`, and at the target
//! the gradient has `1 - p_t = -expm1(logp)`. So of a token that the model is sure of, log-probability,
//! entropy and gradient keep their digits, where a sum that holds its 1 rounds them to 0. This is
//! `selective_log_softmax` of TRL and `logprobs_from_logits` of verl, with `entropy_from_logits` of both.
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
//! The logits may come in tiles of columns, one after the other or each at another place (vocabulary
//! shards): `partial` folds a tile into running sums of its rows, `merge` adds those of other columns,
//! `finish` makes the values of them, and the backward pass takes the same tiles.
//!
//! Cost, with S the bytes of the logits: forward reads S once; backward reads S once and writes S
//! once. All else is one value a row.

#[cfg(feature = "capi")]
#[allow(missing_docs, clippy::missing_safety_doc)]
pub mod capi;
pub mod cpu;
pub mod cuda;
pub mod reference;
#[cfg(feature = "candle")]
mod tensor;

#[cfg(feature = "candle")]
pub use tensor::{logprobs, logprobs_and_entropy};

use crate::error::{Error, Result};
use crate::memory::{list, Element, Space};

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

/// The columns of a vocabulary that some logits are of: all of them, a tile or a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Columns {
    /// The id of the first column.
    pub first: usize,
    /// Columns; above 0.
    pub count: usize,
    /// Columns of the whole vocabulary, from `first + count` to 2^32 - 1. Targets are in `0..vocab`.
    pub vocab: usize,
}

impl Columns {
    /// All columns of a vocabulary.
    pub fn all(vocab: usize) -> Self {
        Self { first: 0, count: vocab, vocab }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let Self { first, count, vocab } = *self;
        if *self == Self::all(vocab) {
            return Ok(());
        }
        Self::check_vocab(vocab)?;
        let end = first.saturating_add(count);
        if end > vocab {
            let (expected, got) = (format!("a range of 0..{vocab}"), format!("{first}..{end}"));
            return Err(Error::Shape { op: OP, arg: "columns", expected, got });
        }
        Ok(())
    }

    /// `Ok` when a vocabulary of which no array has all columns is one that tiles can be of.
    pub(crate) fn check_vocab(vocab: usize) -> Result<()> {
        if u32::try_from(vocab).is_ok() {
            return Ok(());
        }
        let (expected, got) = (format!("{} or less", u32::MAX), vocab.to_string());
        Err(Error::Shape { op: OP, arg: "vocab", expected, got })
    }

    /// The place of a target in these columns, if it is there.
    pub(crate) fn place(&self, target: i64) -> Option<usize> {
        let place = usize::try_from(target).ok()?.checked_sub(self.first)?;
        (place < self.count).then_some(place)
    }
}

list! {
    /// The inputs of the forward pass in some memory; see [the module](self) for their meaning.
    inputs ForwardInputs<T, I>((leading, vocab): (&[usize], usize)) {
        /// Logits, `[rows, vocab]`.
        logits: T [leading, &[vocab]],
        /// Ids of the tokens, `[rows]`.
        targets: I [leading],
    }
}

list! {
    /// The outputs of the forward pass in some memory, one value a row. The maximum and the logarithm
    /// of the sum, which the backward pass needs, are wanted both or neither.
    outputs ForwardOutputs(leading: &[usize]) {
        /// Log-probability of the target, `[rows]`.
        logp: f32 [leading],
    } optional {
        /// Entropy of the row's distribution, `[rows]`, if wanted.
        entropy: f32 [leading],
        /// The row's largest logit, `[rows]`, if wanted.
        max: f32 [leading],
        /// ln Σ e^{(z - max) / temperature}, `[rows]`, if wanted.
        log_sum: f32 [leading],
    }
}

impl<S: Space> ForwardOutputs<'_, S> {
    /// `Ok` when what the backward pass needs is wanted as a whole or not at all.
    fn check_pair(&self) -> Result<()> {
        Error::check_both(OP, ["max", "log_sum"], [self.max.is_some(), self.log_sum.is_some()])
    }
}

list! {
    /// The inputs of the backward pass in some memory: those of the forward pass, what it left, and the
    /// upstream gradients, of which a missing one stands for zeros.
    inputs BackwardInputs<T, I>((leading, vocab): (&[usize], usize))
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
    /// The running sums of each row over the columns seen so far, in some memory. With `d = (max - z) /
    /// temperature`, one occurrence of the maximum is left out of the sums. Of a row that is ignored they
    /// mean nothing.
    outputs RunningSums(leading: &[usize]) {
        /// The largest logit, `[rows]`; -inf before there is one.
        max: f32 [leading],
        /// Σ' e^-d, `[rows]`.
        rest: f32 [leading],
        /// The target's logit, `[rows]`; NaN while its column has not been seen.
        logit: f32 [leading],
    } optional {
        /// Σ' e^-d d, `[rows]`, which only the entropy needs.
        weighted: f32 [leading],
    }
}

list! {
    /// The running sums over other columns, in some memory: as [`RunningSums`].
    inputs MergeInputs(leading: &[usize]) {
        /// The largest logit, `[rows]`.
        other_max: f32 [leading],
        /// Σ' e^-d, `[rows]`.
        other_rest: f32 [leading],
        /// The target's logit, or NaN, `[rows]`.
        other_logit: f32 [leading],
    } optional {
        /// Σ' e^-d d, `[rows]`.
        other_weighted: f32 [leading],
    }
}

impl<S: Space> RunningSums<'_, S> {
    /// `Ok` when both have what the entropy needs or neither has.
    fn check_pair(&self, other: &MergeInputs<S>) -> Result<()> {
        let given = [self.weighted.is_some(), other.other_weighted.is_some()];
        Error::check_both(OP, ["weighted", "other_weighted"], given)
    }
}

list! {
    /// The running sums over all columns, in some memory: as [`RunningSums`].
    inputs FinishInputs<I>(leading: &[usize]) {
        /// Ids of the tokens, `[rows]`.
        targets: I [leading],
        /// The largest logit, `[rows]`.
        max: f32 [leading],
        /// Σ' e^-d, `[rows]`.
        rest: f32 [leading],
        /// The target's logit, `[rows]`.
        logit: f32 [leading],
    } optional {
        /// Σ' e^-d d, `[rows]`; needed by `entropy` alone.
        weighted: f32 [leading],
    }
}

list! {
    /// The results of running sums over all columns, in some memory.
    outputs FinishOutputs(leading: &[usize]) {
        /// Log-probability of the target, `[rows]`.
        logp: f32 [leading],
        /// ln Σ e^{(z - max) / temperature}, `[rows]`, which the backward pass needs.
        log_sum: f32 [leading],
    } optional {
        /// Entropy of the row's distribution, `[rows]`, if wanted.
        entropy: f32 [leading],
    }
}

impl<S: Space> FinishOutputs<'_, S> {
    /// `Ok` when the entropy has what it needs.
    fn check_given<I: Element>(&self, inputs: &FinishInputs<S, I>) -> Result<()> {
        let given = [self.entropy.is_some(), inputs.weighted.is_some()];
        Error::check_given(OP, ["entropy", "weighted"], given)
    }
}

list! {
    /// The inputs of the backward pass in place, in some memory: those of [`BackwardInputs`] but for the
    /// logits, which the gradient takes the place of.
    inputs InPlaceInputs<I>(leading: &[usize]) {
        /// Ids of the tokens, `[rows]`.
        targets: I [leading],
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

impl<'a, S: Space, T: Element, I: Element> BackwardInputs<'a, S, T, I> {
    /// The inputs without the logits.
    fn without_logits(self) -> InPlaceInputs<'a, S, I> {
        InPlaceInputs {
            targets: self.forward.targets,
            max: self.max,
            log_sum: self.log_sum,
            entropy: self.entropy,
            grad_logp: self.grad_logp,
            grad_entropy: self.grad_entropy,
        }
    }
}

impl<'a, S: Space, I: Element> InPlaceInputs<'a, S, I> {
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

list! {
    /// The output of the backward pass in some memory.
    outputs BackwardOutputs<T>((leading, vocab): (&[usize], usize)) {
        /// Gradient of the logits, `[rows, vocab]`; on a device it may be the memory of the logits.
        grad_logits: T [leading, &[vocab]] over ["logits"],
    }
}
