//! The C entry points of the op.

use std::ffi::c_void;

#[cfg(any(feature = "cuda", feature = "simt"))]
use super::cuda;
use super::{cpu, FullKlOptions, KlDirection, KlEstimator, KlOptions, FULL_OP, TOKEN_OP};
use crate::capi::arguments::{
    check_reserved, choose, elements, initialise, optional, or_none, read_or_default, with_logits,
    Growing, Host, Memory, Space, Workspace,
};
#[cfg(any(feature = "cuda", feature = "simt"))]
use crate::capi::arguments::{write_no_size, write_size, Device};
use crate::capi::{call, on_device, Result};
use crate::cpu::Logit;
#[cfg(any(feature = "cuda", feature = "simt"))]
use crate::cuda::Stream;

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

/// The estimators, by these numbers.
pub(crate) const ESTIMATORS: [KlEstimator; 5] = [
    KlEstimator::K1,
    KlEstimator::Abs,
    KlEstimator::K2,
    KlEstimator::K3,
    KlEstimator::K3StraightThrough,
];

/// KL(policy || reference), the mean over the policy: what the estimators from samples estimate.
pub const PPOK_KL_FORWARD: i32 = 0;
/// KL(reference || policy), the mean over the reference, as in distillation.
pub const PPOK_KL_REVERSE: i32 = 1;

/// Values a row that ppok_kl_full_forward_* leaves.
pub const PPOK_KL_FULL_STATS: usize = 6;

/// Options of ppok_kl_token_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
#[allow(non_camel_case_types)]
pub struct ppok_kl_token_options {
    /// `sizeof` of this struct.
    pub struct_size: usize,
    /// Clamps d to plus or minus this before the estimator sees it; above 0, or `PPOK_NONE`, which is
    /// the default. 20 in verl and NeMo-RL.
    pub log_ratio_clamp: f64,
    /// Clamps the estimate likewise; above 0, or `PPOK_NONE`, which is the default. 10 in verl, OpenRLHF
    /// and NeMo-RL.
    pub output_clamp: f64,
    /// `PPOK_KL_K1`, the default, to `PPOK_KL_K3_STRAIGHT_THROUGH`.
    pub estimator: i32,
    /// 0.
    pub reserved: i32,
}

// SAFETY: of numbers without padding, its size first.
unsafe impl Growing for ppok_kl_token_options {
    const FIRST_SIZE: usize = size_of::<Self>();

    fn initial() -> Self {
        let options = KlOptions::default();
        Self {
            struct_size: size_of::<Self>(),
            log_ratio_clamp: or_none(options.log_ratio_clamp),
            output_clamp: or_none(options.output_clamp),
            estimator: options.estimator as i32,
            reserved: 0,
        }
    }
}

impl ppok_kl_token_options {
    fn options(&self) -> Result<KlOptions> {
        check_reserved(TOKEN_OP, "options", self.reserved)?;
        Ok(KlOptions {
            estimator: choose(TOKEN_OP, "estimator", self.estimator, &ESTIMATORS)?,
            log_ratio_clamp: optional(self.log_ratio_clamp),
            output_clamp: optional(self.output_clamp),
        })
    }
}

/// Options of ppok_kl_full_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
#[allow(non_camel_case_types)]
pub struct ppok_kl_full_options {
    /// `sizeof` of this struct.
    pub struct_size: usize,
    /// Divides both logits; 1e-30 to 1e30, 1 by default.
    pub temperature: f64,
    /// `PPOK_KL_FORWARD`, the default, or `PPOK_KL_REVERSE`.
    pub direction: i32,
    /// 0.
    pub reserved: i32,
}

// SAFETY: of numbers without padding, its size first.
unsafe impl Growing for ppok_kl_full_options {
    const FIRST_SIZE: usize = size_of::<Self>();

    fn initial() -> Self {
        let FullKlOptions { direction, temperature } = FullKlOptions::default();
        Self {
            struct_size: size_of::<Self>(),
            temperature,
            direction: direction as i32,
            reserved: 0,
        }
    }
}

impl ppok_kl_full_options {
    fn options(&self) -> Result<FullKlOptions> {
        check_reserved(FULL_OP, "options", self.reserved)?;
        let directions = [KlDirection::Forward, KlDirection::Reverse];
        Ok(FullKlOptions {
            direction: choose(FULL_OP, "direction", self.direction, &directions)?,
            temperature: self.temperature,
        })
    }
}

/// Sets the defaults. `struct_size` is `sizeof *options`.
#[no_mangle]
pub unsafe extern "C" fn ppok_kl_token_options_init(
    options: *mut ppok_kl_token_options,
    struct_size: usize,
) -> i32 {
    // SAFETY: the header's.
    call(|| unsafe { initialise(TOKEN_OP, "options", options, struct_size) })
}

/// Sets the defaults. `struct_size` is `sizeof *options`.
#[no_mangle]
pub unsafe extern "C" fn ppok_kl_full_options_init(
    options: *mut ppok_kl_full_options,
    struct_size: usize,
) -> i32 {
    // SAFETY: the header's.
    call(|| unsafe { initialise(FULL_OP, "options", options, struct_size) })
}

/// KL divergence of the policy from the reference model, estimated for each token from the
/// log-probabilities d = logp - ref_logp of what was sampled, in nats.
///
/// - `logp`, `ref_logp`: `[tokens]`.
/// - `mask`: `[tokens]`; null if all count. What is left out gives 0.
/// - `options`: null for the defaults.
/// - `kl`: `[tokens]`, written.
#[no_mangle]
pub unsafe extern "C" fn ppok_kl_token_forward_cpu(
    logp: *const f32,
    ref_logp: *const f32,
    mask: *const u8,
    tokens: usize,
    options: *const ppok_kl_token_options,
    kl: *mut f32,
) -> i32 {
    let inputs = Token { logp, ref_logp, mask, tokens, options };
    // SAFETY: the header's.
    call(|| unsafe { TokenForward { inputs, kl }.on_cpu() })
}

/// ppok_kl_token_forward_cpu() on device memory and `stream`, where `kl` may be `logp` or `ref_logp`.
/// `workspace` has the bytes that ppok_kl_token_forward_cuda_workspace_size() says.
#[no_mangle]
pub unsafe extern "C" fn ppok_kl_token_forward_cuda(
    logp: *const f32,
    ref_logp: *const f32,
    mask: *const u8,
    tokens: usize,
    options: *const ppok_kl_token_options,
    kl: *mut f32,
    workspace: *mut c_void,
    workspace_size: usize,
    stream: *mut c_void,
) -> i32 {
    let inputs = Token { logp, ref_logp, mask, tokens, options };
    let pass = TokenForward { inputs, kl };
    let workspace = Workspace { address: workspace, bytes: workspace_size };
    call(|| {
        on_device!(TOKEN_OP, stream, [pass, workspace], |stream| {
            // SAFETY: the header's.
            unsafe { pass.on_cuda(stream, workspace) }
        })
    })
}

/// Writes the bytes of workspace that ppok_kl_token_forward_cuda() needs to `size`: 0 in this version.
#[no_mangle]
pub unsafe extern "C" fn ppok_kl_token_forward_cuda_workspace_size(
    tokens: usize,
    stream: *mut c_void,
    size: *mut usize,
) -> i32 {
    call(|| {
        on_device!(TOKEN_OP, stream, [tokens, size], |_stream| {
            // SAFETY: the header's.
            unsafe { write_no_size::<f32>(TOKEN_OP, &[tokens], size) }
        })
    })
}

/// Gradients of ppok_kl_token_forward_cpu(). Where a clamp changed anything they are 0.
///
/// - `logp` to `options`: as in the forward pass.
/// - `grad_kl`: `[tokens]`, the upstream gradient. Where it is 0, so are the gradients.
/// - `grad_logp`, `grad_ref_logp`: `[tokens]`, written; null if not wanted.
#[no_mangle]
pub unsafe extern "C" fn ppok_kl_token_backward_cpu(
    logp: *const f32,
    ref_logp: *const f32,
    mask: *const u8,
    tokens: usize,
    options: *const ppok_kl_token_options,
    grad_kl: *const f32,
    grad_logp: *mut f32,
    grad_ref_logp: *mut f32,
) -> i32 {
    let inputs = Token { logp, ref_logp, mask, tokens, options };
    // SAFETY: the header's.
    call(|| unsafe { TokenBackward { inputs, grad_kl, grad_logp, grad_ref_logp }.on_cpu() })
}

/// ppok_kl_token_backward_cpu() on device memory and `stream`, where each gradient may be `logp`,
/// `ref_logp` or `grad_kl`. `workspace` has the bytes that
/// ppok_kl_token_backward_cuda_workspace_size() says.
#[no_mangle]
pub unsafe extern "C" fn ppok_kl_token_backward_cuda(
    logp: *const f32,
    ref_logp: *const f32,
    mask: *const u8,
    tokens: usize,
    options: *const ppok_kl_token_options,
    grad_kl: *const f32,
    grad_logp: *mut f32,
    grad_ref_logp: *mut f32,
    workspace: *mut c_void,
    workspace_size: usize,
    stream: *mut c_void,
) -> i32 {
    let inputs = Token { logp, ref_logp, mask, tokens, options };
    let pass = TokenBackward { inputs, grad_kl, grad_logp, grad_ref_logp };
    let workspace = Workspace { address: workspace, bytes: workspace_size };
    call(|| {
        on_device!(TOKEN_OP, stream, [pass, workspace], |stream| {
            // SAFETY: the header's.
            unsafe { pass.on_cuda(stream, workspace) }
        })
    })
}

/// Writes the bytes of workspace that ppok_kl_token_backward_cuda() needs to `size`: 0 in this
/// version.
#[no_mangle]
pub unsafe extern "C" fn ppok_kl_token_backward_cuda_workspace_size(
    tokens: usize,
    stream: *mut c_void,
    size: *mut usize,
) -> i32 {
    call(|| {
        on_device!(TOKEN_OP, stream, [tokens, size], |_stream| {
            // SAFETY: the header's.
            unsafe { write_no_size::<f32>(TOKEN_OP, &[tokens], size) }
        })
    })
}

/// Exact KL divergence between the distributions of two rows of logits, in nats: with
/// p = softmax(logits / temperature) and q = softmax(ref_logits / temperature), forward
/// sum_i p_i (ln p_i - ln q_i), or reverse with the two exchanged. Reads both logits once.
///
/// - `logits`, `ref_logits`: `[rows, vocab]` of `logits_type`: `PPOK_F32`, `PPOK_F16` or `PPOK_BF16`.
/// - `mask`: `[rows]`; null if all count. Rows that are left out are not read, and give 0.
/// - `vocab`: above 0.
/// - `options`: null for the defaults.
/// - `stats`: `[PPOK_KL_FULL_STATS, rows]`, written: the first `rows` values are the KL, and the rest
///   is what the backward pass needs.
///
/// A logit of -inf is a token of probability 0: under q where p is above 0 the KL is +inf. A row with
/// NaN or +inf, or of -inf only, in either tensor gives NaN in that row and in no other.
#[no_mangle]
pub unsafe extern "C" fn ppok_kl_full_forward_cpu(
    logits: *const c_void,
    ref_logits: *const c_void,
    logits_type: i32,
    mask: *const u8,
    rows: usize,
    vocab: usize,
    options: *const ppok_kl_full_options,
    stats: *mut f32,
) -> i32 {
    let inputs = Full { logits, ref_logits, mask, rows, vocab, options };
    let pass = FullForward { inputs, stats };
    // SAFETY: the header's.
    call(|| with_logits!(FULL_OP, "logits", logits_type, T => unsafe { pass.on_cpu::<T>() }))
}

/// ppok_kl_full_forward_cpu() on device memory and `stream`. `vocab` is below 2^32. `workspace` has the
/// bytes that ppok_kl_full_forward_cuda_workspace_size() says.
#[no_mangle]
pub unsafe extern "C" fn ppok_kl_full_forward_cuda(
    logits: *const c_void,
    ref_logits: *const c_void,
    logits_type: i32,
    mask: *const u8,
    rows: usize,
    vocab: usize,
    options: *const ppok_kl_full_options,
    stats: *mut f32,
    workspace: *mut c_void,
    workspace_size: usize,
    stream: *mut c_void,
) -> i32 {
    let inputs = Full { logits, ref_logits, mask, rows, vocab, options };
    let pass = FullForward { inputs, stats };
    let workspace = Workspace { address: workspace, bytes: workspace_size };
    call(|| {
        on_device!(FULL_OP, stream, [logits_type, pass, workspace], |stream| {
            with_logits!(FULL_OP, "logits", logits_type, T => {
                // SAFETY: the header's.
                unsafe { pass.on_cuda::<T>(stream, workspace) }
            })
        })
    })
}

/// Writes the bytes of workspace that ppok_kl_full_forward_cuda() needs to `size`. They depend on the
/// device of the stream.
#[no_mangle]
pub unsafe extern "C" fn ppok_kl_full_forward_cuda_workspace_size(
    logits_type: i32,
    rows: usize,
    vocab: usize,
    stream: *mut c_void,
    size: *mut usize,
) -> i32 {
    call(|| {
        on_device!(FULL_OP, stream, [logits_type, rows, vocab, size], |stream| {
            let length = with_logits!(FULL_OP, "logits", logits_type, T => {
                Ok(cuda::full_workspace_len::<T>(stream.device(), rows, vocab))
            })?;
            // SAFETY: the header's.
            unsafe { write_size::<f32>(FULL_OP, size, length) }
        })
    })
}

/// Gradients of ppok_kl_full_forward_cpu() with respect to the logits, in their own type.
///
/// - `logits` to `options`: as in the forward pass.
/// - `stats`: `[PPOK_KL_FULL_STATS, rows]`, as the forward pass wrote them.
/// - `grad_kl`: `[rows]`, the upstream gradient. A row where it is 0 is not read, and gets gradient 0.
/// - `grad_logits`, `grad_ref_logits`: `[rows, vocab]` of `logits_type`, written; null if not wanted.
#[no_mangle]
pub unsafe extern "C" fn ppok_kl_full_backward_cpu(
    logits: *const c_void,
    ref_logits: *const c_void,
    logits_type: i32,
    mask: *const u8,
    rows: usize,
    vocab: usize,
    options: *const ppok_kl_full_options,
    stats: *const f32,
    grad_kl: *const f32,
    grad_logits: *mut c_void,
    grad_ref_logits: *mut c_void,
) -> i32 {
    let inputs = Full { logits, ref_logits, mask, rows, vocab, options };
    let pass = FullBackward { inputs, stats, grad_kl, grad_logits, grad_ref_logits };
    // SAFETY: the header's.
    call(|| with_logits!(FULL_OP, "logits", logits_type, T => unsafe { pass.on_cpu::<T>() }))
}

/// ppok_kl_full_backward_cpu() on device memory and `stream`, where `grad_logits` may be `logits`, and
/// `grad_ref_logits` may be `ref_logits`. `workspace` has the bytes that
/// ppok_kl_full_backward_cuda_workspace_size() says.
#[no_mangle]
pub unsafe extern "C" fn ppok_kl_full_backward_cuda(
    logits: *const c_void,
    ref_logits: *const c_void,
    logits_type: i32,
    mask: *const u8,
    rows: usize,
    vocab: usize,
    options: *const ppok_kl_full_options,
    stats: *const f32,
    grad_kl: *const f32,
    grad_logits: *mut c_void,
    grad_ref_logits: *mut c_void,
    workspace: *mut c_void,
    workspace_size: usize,
    stream: *mut c_void,
) -> i32 {
    let inputs = Full { logits, ref_logits, mask, rows, vocab, options };
    let pass = FullBackward { inputs, stats, grad_kl, grad_logits, grad_ref_logits };
    let workspace = Workspace { address: workspace, bytes: workspace_size };
    call(|| {
        on_device!(FULL_OP, stream, [logits_type, pass, workspace], |stream| {
            with_logits!(FULL_OP, "logits", logits_type, T => {
                // SAFETY: the header's.
                unsafe { pass.on_cuda::<T>(stream, workspace) }
            })
        })
    })
}

/// Writes the bytes of workspace that ppok_kl_full_backward_cuda() needs to `size`: 0 in this version.
#[no_mangle]
pub unsafe extern "C" fn ppok_kl_full_backward_cuda_workspace_size(
    logits_type: i32,
    rows: usize,
    vocab: usize,
    stream: *mut c_void,
    size: *mut usize,
) -> i32 {
    call(|| {
        on_device!(FULL_OP, stream, [logits_type, rows, vocab, size], |_stream| {
            with_logits!(FULL_OP, "logits", logits_type, T => {
                // SAFETY: the header's.
                unsafe { write_no_size::<T>(FULL_OP, &[rows, vocab], size) }
            })
        })
    })
}

/// What both passes over tokens are about, as it came.
#[derive(Clone, Copy)]
struct Token {
    logp: *const f32,
    ref_logp: *const f32,
    mask: *const u8,
    tokens: usize,
    options: *const ppok_kl_token_options,
}

impl Token {
    /// The two log-probabilities, the mask and the options.
    fn take<'a, S: Space>(
        &self,
        memory: &mut Memory<'a, S>,
    ) -> Result<([S::In<'a, f32>; 2], Option<S::In<'a, u8>>, KlOptions)> {
        // SAFETY: the header's.
        let options = unsafe { read_or_default(TOKEN_OP, "options", self.options) }?.options()?;
        let logp = memory.input("logp", self.logp, self.tokens)?;
        let ref_logp = memory.input("ref_logp", self.ref_logp, self.tokens)?;
        Ok(([logp, ref_logp], memory.optional_input("mask", self.mask, self.tokens)?, options))
    }
}

/// The arguments of the forward pass over tokens, as they came.
#[derive(Clone, Copy)]
struct TokenForward {
    inputs: Token,
    kl: *mut f32,
}

impl TokenForward {
    /// # Safety
    /// The pointers are what the header asks for.
    unsafe fn on_cpu(&self) -> Result<()> {
        // SAFETY: the caller's.
        let mut memory = unsafe { Memory::<Host>::new(TOKEN_OP) };
        let ([logp, ref_logp], mask, options) = self.inputs.take(&mut memory)?;
        let kl = self.kl(&mut memory)?;
        Ok(cpu::token_forward(cpu::TokenInputs { logp, ref_logp, mask }, &options, kl)?)
    }

    /// # Safety
    /// The pointers are what the header asks for.
    #[cfg(any(feature = "cuda", feature = "simt"))]
    unsafe fn on_cuda(&self, stream: &Stream, workspace: Workspace) -> Result<()> {
        // SAFETY: the caller's.
        let mut memory = unsafe { Memory::<Device>::new(TOKEN_OP) };
        let ([logp, ref_logp], mask, options) = self.inputs.take(&mut memory)?;
        let kl = self.kl(&mut memory)?;
        memory.workspace::<f32>(workspace, 0)?;
        let inputs = cuda::TokenInputs { logp, ref_logp, mask };
        Ok(cuda::token_forward(stream, inputs, &options, kl)?)
    }

    fn kl<'a, S: Space>(&self, memory: &mut Memory<'a, S>) -> Result<S::Out<'a, f32>> {
        memory.output_over("kl", self.kl, self.inputs.tokens, &["logp", "ref_logp"])
    }
}

/// The arguments of the backward pass over tokens, as they came.
#[derive(Clone, Copy)]
struct TokenBackward {
    inputs: Token,
    grad_kl: *const f32,
    grad_logp: *mut f32,
    grad_ref_logp: *mut f32,
}

impl TokenBackward {
    /// # Safety
    /// The pointers are what the header asks for.
    unsafe fn on_cpu(&self) -> Result<()> {
        // SAFETY: the caller's.
        let mut memory = unsafe { Memory::<Host>::new(TOKEN_OP) };
        let ([logp, ref_logp], mask, options) = self.inputs.take(&mut memory)?;
        let (grad_kl, [grad_logp, grad_ref_logp]) = self.gradients(&mut memory)?;
        let inputs = cpu::TokenInputs { logp, ref_logp, mask };
        Ok(cpu::token_backward(inputs, &options, grad_kl, grad_logp, grad_ref_logp)?)
    }

    /// # Safety
    /// The pointers are what the header asks for.
    #[cfg(any(feature = "cuda", feature = "simt"))]
    unsafe fn on_cuda(&self, stream: &Stream, workspace: Workspace) -> Result<()> {
        // SAFETY: the caller's.
        let mut memory = unsafe { Memory::<Device>::new(TOKEN_OP) };
        let ([logp, ref_logp], mask, options) = self.inputs.take(&mut memory)?;
        let (grad_kl, [grad_logp, grad_ref_logp]) = self.gradients(&mut memory)?;
        memory.workspace::<f32>(workspace, 0)?;
        let inputs = cuda::TokenInputs { logp, ref_logp, mask };
        Ok(cuda::token_backward(stream, inputs, &options, grad_kl, grad_logp, grad_ref_logp)?)
    }

    /// The upstream gradient, and those that are written.
    fn gradients<'a, S: Space>(
        &self,
        memory: &mut Memory<'a, S>,
    ) -> Result<(S::In<'a, f32>, [Option<S::Out<'a, f32>>; 2])> {
        let tokens = self.inputs.tokens;
        let grad_kl = memory.input("grad_kl", self.grad_kl, tokens)?;
        let mut output = |arg, address| {
            memory.optional_output_over(arg, address, tokens, &["logp", "ref_logp", "grad_kl"])
        };
        let grad_logp = output("grad_logp", self.grad_logp)?;
        Ok((grad_kl, [grad_logp, output("grad_ref_logp", self.grad_ref_logp)?]))
    }
}

/// What both passes over logits are about, as it came.
#[derive(Clone, Copy)]
struct Full {
    logits: *const c_void,
    ref_logits: *const c_void,
    mask: *const u8,
    rows: usize,
    vocab: usize,
    options: *const ppok_kl_full_options,
}

impl Full {
    /// The two tensors of logits, the mask and the options.
    fn take<'a, S: Space, T: Logit>(
        &self,
        memory: &mut Memory<'a, S>,
    ) -> Result<([S::In<'a, T>; 2], Option<S::In<'a, u8>>, FullKlOptions)> {
        // SAFETY: the header's.
        let options = unsafe { read_or_default(FULL_OP, "options", self.options) }?.options()?;
        let len = self.logits()?;
        let logits = memory.input("logits", self.logits.cast(), len)?;
        let ref_logits = memory.input("ref_logits", self.ref_logits.cast(), len)?;
        Ok(([logits, ref_logits], memory.optional_input("mask", self.mask, self.rows)?, options))
    }

    /// How many logits there are in each tensor.
    fn logits(&self) -> Result<usize> {
        elements(FULL_OP, "logits", &[self.rows, self.vocab])
    }

    /// How many numbers the forward pass leaves.
    fn stats(&self) -> Result<usize> {
        elements(FULL_OP, "stats", &[PPOK_KL_FULL_STATS, self.rows])
    }
}

/// The arguments of the forward pass over logits, as they came.
#[derive(Clone, Copy)]
struct FullForward {
    inputs: Full,
    stats: *mut f32,
}

impl FullForward {
    /// # Safety
    /// The pointers are what the header asks for.
    unsafe fn on_cpu<T: Logit>(&self) -> Result<()> {
        // SAFETY: the caller's.
        let mut memory = unsafe { Memory::<Host>::new(FULL_OP) };
        let ([logits, ref_logits], mask, options) = self.inputs.take::<_, T>(&mut memory)?;
        let stats = memory.output("stats", self.stats, self.inputs.stats()?)?;
        let inputs = cpu::FullInputs { logits, ref_logits, vocab: self.inputs.vocab, mask };
        Ok(cpu::full_forward(inputs, &options, stats)?)
    }

    /// # Safety
    /// The pointers are what the header asks for.
    #[cfg(any(feature = "cuda", feature = "simt"))]
    unsafe fn on_cuda<T: Logit>(&self, stream: &Stream, workspace: Workspace) -> Result<()> {
        // SAFETY: the caller's.
        let mut memory = unsafe { Memory::<Device>::new(FULL_OP) };
        let ([logits, ref_logits], mask, options) = self.inputs.take::<_, T>(&mut memory)?;
        let stats = memory.output("stats", self.stats, self.inputs.stats()?)?;
        let Full { rows, vocab, .. } = self.inputs;
        let needed = cuda::full_workspace_len::<T>(stream.device(), rows, vocab);
        let workspace = memory.workspace(workspace, needed)?;
        let inputs = cuda::FullInputs { logits, ref_logits, vocab, mask };
        Ok(cuda::full_forward(stream, inputs, &options, stats, workspace)?)
    }
}

/// The arguments of the backward pass over logits, as they came.
#[derive(Clone, Copy)]
struct FullBackward {
    inputs: Full,
    stats: *const f32,
    grad_kl: *const f32,
    grad_logits: *mut c_void,
    grad_ref_logits: *mut c_void,
}

impl FullBackward {
    /// # Safety
    /// The pointers are what the header asks for.
    unsafe fn on_cpu<T: Logit>(&self) -> Result<()> {
        // SAFETY: the caller's.
        let mut memory = unsafe { Memory::<Host>::new(FULL_OP) };
        let ([logits, ref_logits], mask, options) = self.inputs.take::<_, T>(&mut memory)?;
        let ([stats, grad_kl], [grad, ref_grad]) = self.gradients::<_, T>(&mut memory)?;
        let inputs = cpu::FullInputs { logits, ref_logits, vocab: self.inputs.vocab, mask };
        Ok(cpu::full_backward(inputs, &options, stats, grad_kl, grad, ref_grad)?)
    }

    /// # Safety
    /// The pointers are what the header asks for.
    #[cfg(any(feature = "cuda", feature = "simt"))]
    unsafe fn on_cuda<T: Logit>(&self, stream: &Stream, workspace: Workspace) -> Result<()> {
        // SAFETY: the caller's.
        let mut memory = unsafe { Memory::<Device>::new(FULL_OP) };
        let ([logits, ref_logits], mask, options) = self.inputs.take::<_, T>(&mut memory)?;
        let ([stats, grad_kl], [grad, ref_grad]) = self.gradients::<_, T>(&mut memory)?;
        memory.workspace::<f32>(workspace, 0)?;
        let inputs = cuda::FullInputs { logits, ref_logits, vocab: self.inputs.vocab, mask };
        Ok(cuda::full_backward(stream, inputs, &options, stats, grad_kl, grad, ref_grad)?)
    }

    /// What the forward pass left and the upstream gradient, and the gradients that are written.
    fn gradients<'a, S: Space, T: Logit>(
        &self,
        memory: &mut Memory<'a, S>,
    ) -> Result<([S::In<'a, f32>; 2], [Option<S::Out<'a, T>>; 2])> {
        let len = self.inputs.logits()?;
        let stats = memory.input("stats", self.stats, self.inputs.stats()?)?;
        let grad_kl = memory.input("grad_kl", self.grad_kl, self.inputs.rows)?;
        let mut output = |arg, address: *mut c_void, over| {
            memory.optional_output_over(arg, address.cast(), len, &[over])
        };
        let grad = output("grad_logits", self.grad_logits, "logits")?;
        let ref_grad = output("grad_ref_logits", self.grad_ref_logits, "ref_logits")?;
        Ok(([stats, grad_kl], [grad, ref_grad]))
    }
}
