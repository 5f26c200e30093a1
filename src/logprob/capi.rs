//! The C entry points of the op.

use std::ffi::c_void;

#[cfg(any(feature = "cuda", feature = "simt"))]
use super::cuda;
use super::{cpu, LogprobOptions, OP};
use crate::capi::arguments::{
    both, check_reserved, elements, flag, initialise, read_or_default, with_ids, with_logits,
    Growing, Host, Memory, Space, Workspace,
};
#[cfg(any(feature = "cuda", feature = "simt"))]
use crate::capi::arguments::{write_no_size, write_size, Device};
use crate::capi::{call, on_device, Result};
use crate::cpu::{Logit, TokenId};
#[cfg(any(feature = "cuda", feature = "simt"))]
use crate::cuda::Stream;

/// Options of ppok_logprob_forward_* and ppok_logprob_backward_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
#[allow(non_camel_case_types)]
pub struct ppok_logprob_options {
    /// `sizeof` of this struct.
    pub struct_size: usize,
    /// The logits are divided by it; 1e-30 to 1e30, 1 by default. The temperature that the tokens were
    /// sampled at.
    pub temperature: f64,
    /// Rows with this target are skipped, if `has_ignore_index`. PyTorch's custom is -100.
    pub ignore_index: i64,
    /// 1 or 0, which is the default.
    pub has_ignore_index: i32,
    /// 0.
    pub reserved: i32,
}

// SAFETY: of numbers without padding, its size first.
unsafe impl Growing for ppok_logprob_options {
    const FIRST_SIZE: usize = size_of::<Self>();

    fn initial() -> Self {
        let LogprobOptions { temperature, ignore_index } = LogprobOptions::default();
        Self {
            struct_size: size_of::<Self>(),
            temperature,
            ignore_index: ignore_index.unwrap_or_default(),
            has_ignore_index: i32::from(ignore_index.is_some()),
            reserved: 0,
        }
    }
}

impl ppok_logprob_options {
    fn options(&self) -> Result<LogprobOptions> {
        check_reserved(OP, "options", self.reserved)?;
        let has_ignore_index = flag(OP, "has_ignore_index", self.has_ignore_index)?;
        Ok(LogprobOptions {
            temperature: self.temperature,
            ignore_index: has_ignore_index.then_some(self.ignore_index),
        })
    }
}

/// Sets the defaults. `struct_size` is `sizeof *options`.
#[no_mangle]
pub unsafe extern "C" fn ppok_logprob_options_init(
    options: *mut ppok_logprob_options,
    struct_size: usize,
) -> i32 {
    // SAFETY: the header's.
    call(|| unsafe { initialise(OP, "options", options, struct_size) })
}

/// Log-probability of one token a row, and the entropy of the row's distribution, from logits: with
/// `z[n, 0..V]`, target `t[n]` and temperature T,
///
/// ```text
/// x_j = (z_j - max z) / T       s = sum_j exp(x_j)       p_j = exp(x_j) / s
/// logp = x_t - ln s             entropy = ln s - sum_j p_j x_j
/// ```
///
/// in nats. The logits are read once, and sums are kept in single precision.
///
/// - `logits`: `[rows, vocab]` of `logits_type`: `PPOK_F32`, `PPOK_F16` or `PPOK_BF16`.
/// - `targets`: `[rows]` of `targets_type`: `PPOK_U32` or `PPOK_I64`; each in `0..vocab` or
///   `ignore_index`, else `PPOK_STATUS_TARGET`, and nothing is written.
/// - `vocab`: above 0.
/// - `options`: null for the defaults.
/// - `logp`: `[rows]`, written.
/// - `entropy`: `[rows]`, written; null if not wanted.
/// - `max`, `log_sum`: `[rows]`, written: what ppok_logprob_backward_cpu() needs to know, namely the
///   largest logit and ln s. Both or neither may be null.
///
/// A logit of -inf is a token of probability 0. A row with NaN or +inf, or of -inf only, gives NaN in
/// that row and in no other. A row with target `ignore_index` is not read: logp and entropy are 0.
#[no_mangle]
pub unsafe extern "C" fn ppok_logprob_forward_cpu(
    logits: *const c_void,
    logits_type: i32,
    targets: *const c_void,
    targets_type: i32,
    rows: usize,
    vocab: usize,
    options: *const ppok_logprob_options,
    logp: *mut f32,
    entropy: *mut f32,
    max: *mut f32,
    log_sum: *mut f32,
) -> i32 {
    let rows = Rows { logits, targets, rows, vocab, options };
    let pass = Forward { rows, logp, entropy, max, log_sum };
    call(|| {
        with_logits!(OP, "logits", logits_type, T => {
            // SAFETY: the header's.
            with_ids!(OP, "targets", targets_type, I => unsafe { pass.on_cpu::<T, I>() })
        })
    })
}

/// ppok_logprob_forward_cpu() on device memory and `stream`. A target that is neither in the
/// vocabulary nor `ignore_index` is no error here: its row comes out as NaN. `vocab` is below 2^32.
/// `workspace` has the bytes that ppok_logprob_forward_cuda_workspace_size() says.
#[no_mangle]
pub unsafe extern "C" fn ppok_logprob_forward_cuda(
    logits: *const c_void,
    logits_type: i32,
    targets: *const c_void,
    targets_type: i32,
    rows: usize,
    vocab: usize,
    options: *const ppok_logprob_options,
    logp: *mut f32,
    entropy: *mut f32,
    max: *mut f32,
    log_sum: *mut f32,
    workspace: *mut c_void,
    workspace_size: usize,
    stream: *mut c_void,
) -> i32 {
    let rows = Rows { logits, targets, rows, vocab, options };
    let pass = Forward { rows, logp, entropy, max, log_sum };
    let workspace = Workspace { address: workspace, bytes: workspace_size };
    call(|| {
        on_device!(OP, stream, [logits_type, targets_type, pass, workspace], |stream| {
            with_logits!(OP, "logits", logits_type, T => {
                with_ids!(OP, "targets", targets_type, I => {
                    // SAFETY: the header's.
                    unsafe { pass.on_cuda::<T, I>(stream, workspace) }
                })
            })
        })
    })
}

/// Writes the bytes of workspace that ppok_logprob_forward_cuda() needs to `size`. They depend on the
/// device of the stream.
#[no_mangle]
pub unsafe extern "C" fn ppok_logprob_forward_cuda_workspace_size(
    logits_type: i32,
    rows: usize,
    vocab: usize,
    stream: *mut c_void,
    size: *mut usize,
) -> i32 {
    call(|| {
        on_device!(OP, stream, [logits_type, rows, vocab, size], |stream| {
            let length = with_logits!(OP, "logits", logits_type, T => {
                Ok(cuda::workspace_len::<T>(stream.device(), rows, vocab))
            })?;
            // SAFETY: the header's.
            unsafe { write_size::<f32>(OP, size, length) }
        })
    })
}

/// Gradient with respect to the logits, in their own type: with the upstream gradients g of logp and
/// h of the entropy,
///
/// ```text
/// d/dz_j = (g (1[j = t] - p_j) - h p_j (ln p_j + entropy)) / T
/// ```
///
/// - `logits` to `options`: as in the forward pass.
/// - `max`, `log_sum`: `[rows]`, as the forward pass wrote them.
/// - `entropy`: `[rows]`, as the forward pass wrote it; may be null if `grad_entropy` is.
/// - `grad_logp`, `grad_entropy`: `[rows]`, the upstream gradients; null stands for zeros.
/// - `grad_logits`: `[rows, vocab]` of `logits_type`, written.
///
/// A row that is ignored, or whose upstream gradients are 0, gets gradient 0 and is not read.
#[no_mangle]
pub unsafe extern "C" fn ppok_logprob_backward_cpu(
    logits: *const c_void,
    logits_type: i32,
    targets: *const c_void,
    targets_type: i32,
    rows: usize,
    vocab: usize,
    options: *const ppok_logprob_options,
    max: *const f32,
    log_sum: *const f32,
    entropy: *const f32,
    grad_logp: *const f32,
    grad_entropy: *const f32,
    grad_logits: *mut c_void,
) -> i32 {
    let rows = Rows { logits, targets, rows, vocab, options };
    let pass = Backward { rows, max, log_sum, entropy, grad_logp, grad_entropy, grad_logits };
    call(|| {
        with_logits!(OP, "logits", logits_type, T => {
            // SAFETY: the header's.
            with_ids!(OP, "targets", targets_type, I => unsafe { pass.on_cpu::<T, I>() })
        })
    })
}

/// ppok_logprob_backward_cpu() on device memory and `stream`, where `grad_logits` may be `logits`. A
/// target that is neither in the vocabulary nor `ignore_index` makes its row NaN. `workspace` has the
/// bytes that ppok_logprob_backward_cuda_workspace_size() says.
#[no_mangle]
pub unsafe extern "C" fn ppok_logprob_backward_cuda(
    logits: *const c_void,
    logits_type: i32,
    targets: *const c_void,
    targets_type: i32,
    rows: usize,
    vocab: usize,
    options: *const ppok_logprob_options,
    max: *const f32,
    log_sum: *const f32,
    entropy: *const f32,
    grad_logp: *const f32,
    grad_entropy: *const f32,
    grad_logits: *mut c_void,
    workspace: *mut c_void,
    workspace_size: usize,
    stream: *mut c_void,
) -> i32 {
    let rows = Rows { logits, targets, rows, vocab, options };
    let pass = Backward { rows, max, log_sum, entropy, grad_logp, grad_entropy, grad_logits };
    let workspace = Workspace { address: workspace, bytes: workspace_size };
    call(|| {
        on_device!(OP, stream, [logits_type, targets_type, pass, workspace], |stream| {
            with_logits!(OP, "logits", logits_type, T => {
                with_ids!(OP, "targets", targets_type, I => {
                    // SAFETY: the header's.
                    unsafe { pass.on_cuda::<T, I>(stream, workspace) }
                })
            })
        })
    })
}

/// Writes the bytes of workspace that ppok_logprob_backward_cuda() needs to `size`: 0 in this version.
#[no_mangle]
pub unsafe extern "C" fn ppok_logprob_backward_cuda_workspace_size(
    logits_type: i32,
    rows: usize,
    vocab: usize,
    stream: *mut c_void,
    size: *mut usize,
) -> i32 {
    call(|| {
        on_device!(OP, stream, [logits_type, rows, vocab, size], |_stream| {
            with_logits!(OP, "logits", logits_type, T => {
                // SAFETY: the header's.
                unsafe { write_no_size::<T>(OP, &[rows, vocab], size) }
            })
        })
    })
}

/// What both passes are about, as it came.
#[derive(Clone, Copy)]
struct Rows {
    logits: *const c_void,
    targets: *const c_void,
    rows: usize,
    vocab: usize,
    options: *const ppok_logprob_options,
}

impl Rows {
    /// Logits, targets and options.
    fn take<'a, S: Space, T: Logit, I: TokenId>(
        &self,
        memory: &mut Memory<'a, S>,
    ) -> Result<(S::In<'a, T>, S::In<'a, I>, LogprobOptions)> {
        // SAFETY: the header's.
        let options = unsafe { read_or_default(OP, "options", self.options) }?.options()?;
        let logits = memory.input("logits", self.logits.cast(), self.logits()?)?;
        let targets = memory.input("targets", self.targets.cast(), self.rows)?;
        Ok((logits, targets, options))
    }

    /// How many logits there are.
    fn logits(&self) -> Result<usize> {
        elements(OP, "logits", &[self.rows, self.vocab])
    }
}

/// The arguments of the forward pass, as they came.
#[derive(Clone, Copy)]
struct Forward {
    rows: Rows,
    logp: *mut f32,
    entropy: *mut f32,
    max: *mut f32,
    log_sum: *mut f32,
}

impl Forward {
    /// # Safety
    /// The pointers are what the header asks for.
    unsafe fn on_cpu<T: Logit, I: TokenId>(&self) -> Result<()> {
        // SAFETY: the caller's.
        let mut memory = unsafe { Memory::<Host>::new(OP) };
        let (logits, targets, options) = self.rows.take::<_, T, I>(&mut memory)?;
        let (logp, entropy, stats) = self.outputs(&mut memory)?;
        let stats = stats.map(|[max, log_sum]| cpu::RowStatsMut { max, log_sum });
        let outputs = cpu::Outputs { logp, entropy, stats };
        Ok(cpu::forward(logits, targets, self.rows.vocab, &options, outputs)?)
    }

    /// # Safety
    /// The pointers are what the header asks for.
    #[cfg(any(feature = "cuda", feature = "simt"))]
    unsafe fn on_cuda<T: Logit, I: TokenId>(
        &self,
        stream: &Stream,
        workspace: Workspace,
    ) -> Result<()> {
        // SAFETY: the caller's.
        let mut memory = unsafe { Memory::<Device>::new(OP) };
        let (logits, targets, options) = self.rows.take::<_, T, I>(&mut memory)?;
        let (logp, entropy, stats) = self.outputs(&mut memory)?;
        let stats = stats.map(|[max, log_sum]| cuda::RowStatsMut { max, log_sum });
        let outputs = cuda::Outputs { logp, entropy, stats };
        let Rows { rows, vocab, .. } = self.rows;
        let needed = cuda::workspace_len::<T>(stream.device(), rows, vocab);
        let workspace = memory.workspace(workspace, needed)?;
        Ok(cuda::forward(stream, logits, targets, vocab, &options, outputs, workspace)?)
    }

    /// Log-probabilities, entropies, and what is for the backward pass.
    fn outputs<'a, S: Space>(
        &self,
        memory: &mut Memory<'a, S>,
    ) -> Result<(S::Out<'a, f32>, Option<S::Out<'a, f32>>, Option<[S::Out<'a, f32>; 2]>)> {
        let rows = self.rows.rows;
        let logp = memory.output("logp", self.logp, rows)?;
        let entropy = memory.optional_output("entropy", self.entropy, rows)?;
        let max = memory.optional_output("max", self.max, rows)?;
        let log_sum = memory.optional_output("log_sum", self.log_sum, rows)?;
        Ok((logp, entropy, both(OP, ["max", "log_sum"], max, log_sum)?))
    }
}

/// The arguments of the backward pass, as they came.
#[derive(Clone, Copy)]
struct Backward {
    rows: Rows,
    max: *const f32,
    log_sum: *const f32,
    entropy: *const f32,
    grad_logp: *const f32,
    grad_entropy: *const f32,
    grad_logits: *mut c_void,
}

impl Backward {
    /// # Safety
    /// The pointers are what the header asks for.
    unsafe fn on_cpu<T: Logit, I: TokenId>(&self) -> Result<()> {
        // SAFETY: the caller's.
        let mut memory = unsafe { Memory::<Host>::new(OP) };
        let (logits, targets, options) = self.rows.take::<_, T, I>(&mut memory)?;
        let ([max, log_sum, entropy], [logp, grad_entropy]) = self.inputs(&mut memory)?;
        let grad = self.grad_logits::<_, T>(&mut memory)?;
        let stats = cpu::RowStats { max, log_sum, entropy };
        let upstream = cpu::Upstream { logp, entropy: grad_entropy };
        Ok(cpu::backward(logits, targets, self.rows.vocab, &options, stats, upstream, grad)?)
    }

    /// # Safety
    /// The pointers are what the header asks for.
    #[cfg(any(feature = "cuda", feature = "simt"))]
    unsafe fn on_cuda<T: Logit, I: TokenId>(
        &self,
        stream: &Stream,
        workspace: Workspace,
    ) -> Result<()> {
        // SAFETY: the caller's.
        let mut memory = unsafe { Memory::<Device>::new(OP) };
        let (logits, targets, options) = self.rows.take::<_, T, I>(&mut memory)?;
        let ([max, log_sum, entropy], [logp, grad_entropy]) = self.inputs(&mut memory)?;
        let grad = self.grad_logits::<_, T>(&mut memory)?;
        memory.workspace::<f32>(workspace, 0)?;
        let (stats, vocab) = (cuda::RowStats { max, log_sum, entropy }, self.rows.vocab);
        let upstream = cuda::Upstream { logp, entropy: grad_entropy };
        Ok(cuda::backward(stream, logits, targets, vocab, &options, stats, upstream, grad)?)
    }

    /// What the forward pass left, and the upstream gradients.
    fn inputs<'a, S: Space>(
        &self,
        memory: &mut Memory<'a, S>,
    ) -> Result<([S::In<'a, f32>; 3], [Option<S::In<'a, f32>>; 2])> {
        let rows = self.rows.rows;
        let max = memory.input("max", self.max, rows)?;
        let log_sum = memory.input("log_sum", self.log_sum, rows)?;
        // Without a gradient from it any number will do where the row has a distribution, and NaN
        // where it has none: the other's.
        let absent = self.entropy.is_null() && self.grad_entropy.is_null();
        let entropy = if absent { log_sum } else { memory.input("entropy", self.entropy, rows)? };
        let grad_logp = memory.optional_input("grad_logp", self.grad_logp, rows)?;
        let grad_entropy = memory.optional_input("grad_entropy", self.grad_entropy, rows)?;
        Ok(([max, log_sum, entropy], [grad_logp, grad_entropy]))
    }

    fn grad_logits<'a, S: Space, T>(&self, memory: &mut Memory<'a, S>) -> Result<S::Out<'a, T>> {
        let len = self.rows.logits()?;
        memory.output_over("grad_logits", self.grad_logits.cast(), len, &["logits"])
    }
}
