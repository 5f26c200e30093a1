//! The C entry points of the op.

use std::ffi::c_void;

use super::{
    cpu, cuda, Divergence, FullBackwardInputs, FullBackwardOutputs, FullForwardInputs,
    FullForwardOutputs, FullKlOptions, KlEstimator, KlOptions, TokenBackwardInputs,
    TokenBackwardOutputs, TokenForwardInputs, TokenForwardOutputs, FULL_OP, TOKEN_OP,
};
use crate::capi::arguments::{check_reserved, choices, list_of, options, with_logits, Memory, Raw};
use crate::capi::{self, run, On, Pass, Result};
use crate::cpu::Logit;

/// d = logp - ref_logp: unbiased, may be negative. What goes into the reward everywhere.
pub const PPOK_KL_K1: i32 = 0;
/// |d|.
pub const PPOK_KL_ABS: i32 = 1;
/// d^2 / 2: low variance, biased; its gradient is an unbiased estimate of that of the exact KL.
pub const PPOK_KL_K2: i32 = 2;
/// exp(-d) - 1 + d: unbiased and never negative. What goes into the loss.
pub const PPOK_KL_K3: i32 = 3;
/// The value of `PPOK_KL_K3` with the gradient of `PPOK_KL_K2`.
pub const PPOK_KL_K3_STRAIGHT_THROUGH: i32 = 4;

/// KL(policy || reference), the mean over the policy: what the estimators from samples estimate.
pub const PPOK_KL_FORWARD: i32 = 0;
/// KL(reference || policy), the mean over the reference, as in distillation.
pub const PPOK_KL_REVERSE: i32 = 1;
/// beta KL(reference || m) + (1 - beta) KL(policy || m), m = (1 - beta) policy + beta reference: the generalised
/// Jensen-Shannon divergence (GKD).
pub const PPOK_KL_JSD: i32 = 2;
/// KL(policy || skew policy + (1 - skew) reference).
pub const PPOK_KL_SKEW_FORWARD: i32 = 3;
/// KL(reference || skew reference + (1 - skew) policy).
pub const PPOK_KL_SKEW_REVERSE: i32 = 4;
/// 1 - sum_i min(p_i, q_i).
pub const PPOK_KL_TOTAL_VARIATION: i32 = 5;

/// Values a row that ppok_kl_full_forward_* leaves.
pub const PPOK_KL_FULL_STATS: usize = 7;

/// Options of ppok_kl_token_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_kl_token_options {
    pub struct_size: usize,
    /// Clamps d to plus or minus this before the estimator sees it; above 0, or `PPOK_NONE`, which is
    /// the default. 20 in verl and NeMo-RL.
    pub log_ratio_clamp: f64,
    /// Clamps the estimate likewise; above 0, or `PPOK_NONE`, which is the default. 10 in verl, OpenRLHF
    /// and NeMo-RL.
    pub output_clamp: f64,
    /// `PPOK_KL_K1`, the default, to `PPOK_KL_K3_STRAIGHT_THROUGH`.
    pub estimator: i32,
    pub reserved: i32,
}

choices! {
    KlEstimator { K1, Abs, K2, K3, K3StraightThrough }
    Divergence { Forward, Reverse, Jsd, SkewForward, SkewReverse, TotalVariation }
}

options!(ppok_kl_token_options, KlOptions, TOKEN_OP, [reserved], {
    estimator => estimator,
    log_ratio_clamp => log_ratio_clamp,
    output_clamp => output_clamp,
});

/// Options of ppok_kl_full_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_kl_full_options {
    pub struct_size: usize,
    /// Divides both logits; 1e-30 to 1e30, 1 by default.
    pub temperature: f64,
    /// The weight of the reference in the mixture of `PPOK_KL_JSD`; above 0 and below 1, 0.5 by default.
    pub beta: f64,
    /// The skew of the skewed KLs; above 0 and below 1, 0.1 by default (DistiLLM).
    pub skew: f64,
    /// `PPOK_KL_FORWARD`, the default, to `PPOK_KL_TOTAL_VARIATION`.
    pub divergence: i32,
    pub reserved: i32,
}

options!(ppok_kl_full_options, FullKlOptions, FULL_OP, [reserved], {
    divergence => divergence,
    temperature => temperature,
    beta => beta,
    skew => skew,
});

/// Arguments of ppok_kl_token_forward_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_kl_token_forward_args {
    pub struct_size: usize,
    /// Tokens, of any number of sequences.
    pub tokens: usize,
    /// Log-probabilities under the policy, `[tokens]`.
    pub logp: *const f32,
    /// Log-probabilities under the reference, `[tokens]`.
    pub ref_logp: *const f32,
    /// `[tokens]`; null if all count. What is left out gives 0.
    pub mask: *const u8,
    pub options: *const ppok_kl_token_options,
    /// The estimate, `[tokens]`, written. For CUDA it may be `logp` or `ref_logp`.
    pub kl: *mut f32,
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_kl_token_forward_args {
    const OP: &'static str = TOKEN_OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        let (tokens, options) = (self.tokens, memory.options(self.options)?);
        run!(
            (on, memory),
            [list_of!(self, TokenForwardInputs, [logp, ref_logp], [mask]), &[tokens]],
            [list_of!(self, TokenForwardOutputs, [kl], []), &[tokens]],
            |i, o| cpu::token_forward(i, tokens, &options, o),
            |stream| cuda::token_forward(stream, i, tokens, &options, o),
        )
    }
}

/// Arguments of ppok_kl_token_backward_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_kl_token_backward_args {
    pub struct_size: usize,
    /// As in the forward pass, and so are the next three.
    pub tokens: usize,
    pub logp: *const f32,
    pub ref_logp: *const f32,
    pub mask: *const u8,
    /// Upstream gradient, `[tokens]`. Where it is 0, so are the gradients.
    pub grad_kl: *const f32,
    pub options: *const ppok_kl_token_options,
    /// Gradient of `logp`, `[tokens]`, written; null if not wanted. For CUDA it may be `logp`, `ref_logp`
    /// or `grad_kl`, and so may the next one.
    pub grad_logp: *mut f32,
    /// Gradient of `ref_logp`, `[tokens]`, written; null if not wanted.
    pub grad_ref_logp: *mut f32,
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_kl_token_backward_args {
    const OP: &'static str = TOKEN_OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        let (tokens, options) = (self.tokens, memory.options(self.options)?);
        let forward = list_of!(self, TokenForwardInputs, [logp, ref_logp], [mask]);
        run!(
            (on, memory),
            [TokenBackwardInputs { forward, grad_kl: self.grad_kl }, &[tokens]],
            [list_of!(self, TokenBackwardOutputs, [], [grad_logp, grad_ref_logp]), &[tokens]],
            |i, o| cpu::token_backward(i, tokens, &options, o),
            |stream| cuda::token_backward(stream, i, tokens, &options, o),
        )
    }
}

/// Arguments of ppok_kl_full_forward_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_kl_full_forward_args {
    pub struct_size: usize,
    /// Rows of logits, one a token.
    pub rows: usize,
    /// Logits of a row; above 0, and for CUDA below 2^32.
    pub vocab: usize,
    /// `PPOK_F32`, `PPOK_F16` or `PPOK_BF16`.
    pub logits_type: i32,
    pub reserved: i32,
    /// Logits of the policy, `[rows, vocab]` of `logits_type`.
    pub logits: *const c_void,
    /// Logits of the reference, `[rows, vocab]` of `logits_type`.
    pub ref_logits: *const c_void,
    /// `[rows]`; null if all count. Rows that are left out are not read, and give 0.
    pub mask: *const u8,
    pub options: *const ppok_kl_full_options,
    /// `[PPOK_KL_FULL_STATS, rows]`, written: the first `rows` values are the KL, and the rest is what the
    /// backward pass needs.
    pub stats: *mut f32,
}

impl ppok_kl_full_forward_args {
    fn typed<T: Logit>(&self, memory: &mut Memory, on: On) -> Result<()> {
        check_reserved(FULL_OP, "args", self.reserved)?;
        let (rows, vocab, options) = (self.rows, self.vocab, memory.options(self.options)?);
        let inputs = list_of!(self, FullForwardInputs::<Raw, T>, [logits, ref_logits], [mask]);
        run!(
            (on, memory),
            [inputs, (&[rows], vocab)],
            [list_of!(self, FullForwardOutputs, [stats], []), &[rows]],
            |i, o| cpu::full_forward(i, rows, vocab, &options, o),
            |stream| cuda::full_forward(stream, i, rows, vocab, &options, o),
        )
    }
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_kl_full_forward_args {
    const OP: &'static str = FULL_OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        with_logits!(FULL_OP, self.logits_type, T => self.typed::<T>(memory, on))
    }
}

/// Arguments of ppok_kl_full_backward_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_kl_full_backward_args {
    pub struct_size: usize,
    /// As in the forward pass, and so are the next six.
    pub rows: usize,
    pub vocab: usize,
    pub logits_type: i32,
    pub reserved: i32,
    pub logits: *const c_void,
    pub ref_logits: *const c_void,
    pub mask: *const u8,
    /// `[PPOK_KL_FULL_STATS, rows]`, as the forward pass wrote them.
    pub stats: *const f32,
    /// Upstream gradient, `[rows]`. A row where it is 0 is not read, and gets gradient 0.
    pub grad_kl: *const f32,
    pub options: *const ppok_kl_full_options,
    /// Gradient of `logits`, `[rows, vocab]` of `logits_type`, written; null if not wanted. For CUDA it
    /// may be `logits`.
    pub grad_logits: *mut c_void,
    /// Gradient of `ref_logits`, likewise. For CUDA it may be `ref_logits`.
    pub grad_ref_logits: *mut c_void,
}

impl ppok_kl_full_backward_args {
    fn typed<T: Logit>(&self, memory: &mut Memory, on: On) -> Result<()> {
        check_reserved(FULL_OP, "args", self.reserved)?;
        let (rows, vocab, options) = (self.rows, self.vocab, memory.options(self.options)?);
        let forward = list_of!(self, FullForwardInputs::<Raw, T>, [logits, ref_logits], [mask]);
        let inputs = FullBackwardInputs { forward, stats: self.stats, grad_kl: self.grad_kl };
        let sizes = (&[rows][..], vocab);
        run!(
            (on, memory),
            [inputs, sizes],
            [list_of!(self, FullBackwardOutputs, [], [grad_logits, grad_ref_logits]), sizes],
            |i, o| cpu::full_backward(i, rows, vocab, &options, o),
            |stream| cuda::full_backward(stream, i, rows, vocab, &options, o),
        )
    }
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_kl_full_backward_args {
    const OP: &'static str = FULL_OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        with_logits!(FULL_OP, self.logits_type, T => self.typed::<T>(memory, on))
    }
}

/// KL divergence of the policy from the reference model, estimated for each token from the
/// log-probabilities d = logp - ref_logp of what was sampled, in nats.
#[no_mangle]
pub unsafe extern "C" fn ppok_kl_token_forward_cpu(args: *const ppok_kl_token_forward_args) -> i32 {
    capi::cpu(args)
}

/// Gradients of ppok_kl_token_forward_cpu(). Where a clamp changed anything they are 0.
#[no_mangle]
pub unsafe extern "C" fn ppok_kl_token_backward_cpu(
    args: *const ppok_kl_token_backward_args,
) -> i32 {
    capi::cpu(args)
}

/// Exact KL divergence between the distributions of two rows of logits, in nats: with
/// p = softmax(logits / temperature) and q = softmax(ref_logits / temperature), forward
/// sum_i p_i (ln p_i - ln q_i), or reverse with the two exchanged; or another divergence, as the options say.
/// Reads both logits once, or of another divergence twice.
///
/// A logit of -inf is a token of probability 0: under q where p is above 0 the KL is +inf. A row with
/// NaN or +inf, or of -inf only, in either tensor gives NaN in that row and in no other.
#[no_mangle]
pub unsafe extern "C" fn ppok_kl_full_forward_cpu(args: *const ppok_kl_full_forward_args) -> i32 {
    capi::cpu(args)
}

/// Gradients of ppok_kl_full_forward_cpu() with respect to the logits, in their own type.
#[no_mangle]
pub unsafe extern "C" fn ppok_kl_full_backward_cpu(args: *const ppok_kl_full_backward_args) -> i32 {
    capi::cpu(args)
}
