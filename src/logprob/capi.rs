//! The C entry points of the op.

use std::ffi::c_void;

use super::{
    cpu, cuda, BackwardInputs, BackwardOutputs, Columns, FinishInputs, FinishOutputs,
    ForwardInputs, ForwardOutputs, InPlaceInputs, LogprobOptions, MergeInputs, RunningSums, OP,
};
use crate::capi::arguments::{
    check_reserved, list_of, options, with_logits, with_targets, Encoded, Given, Memory, Raw,
};
use crate::capi::{self, run, On, Pass, Result};
use crate::cpu::{Logit, TokenId};

/// Options of ppok_logprob_forward_* and ppok_logprob_backward_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_logprob_options {
    pub struct_size: usize,
    /// The logits are divided by it; 1e-30 to 1e30, 1 by default. The temperature that the tokens were
    /// sampled at.
    pub temperature: f64,
    /// Rows with this target are skipped, if `has_ignore_index`. PyTorch's custom is -100.
    pub ignore_index: i64,
    /// 1 or 0, which is the default.
    pub has_ignore_index: i32,
    pub reserved: i32,
}

impl Encoded for Option<i64> {
    type Code = (i32, i64);

    fn encode(self) -> (i32, i64) {
        (i32::from(self.is_some()), self.unwrap_or_default())
    }

    fn decode(op: &'static str, option: &'static str, (given, id): (i32, i64)) -> Result<Self> {
        Ok(bool::decode(op, option, given)?.then_some(id))
    }
}

options!(ppok_logprob_options, LogprobOptions, OP, [reserved], {
    temperature => temperature,
    has_ignore_index & ignore_index => ignore_index,
});

/// Arguments of ppok_logprob_forward_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_logprob_forward_args {
    pub struct_size: usize,
    /// Rows of logits, one a token.
    pub rows: usize,
    /// Logits of a row; above 0, and for CUDA below 2^32.
    pub vocab: usize,
    /// `PPOK_F32`, `PPOK_F16` or `PPOK_BF16`.
    pub logits_type: i32,
    /// `PPOK_U32` or `PPOK_I64`.
    pub targets_type: i32,
    /// Logits, `[rows, vocab]` of `logits_type`.
    pub logits: *const c_void,
    /// Ids of the tokens, `[rows]` of `targets_type`; each in `0..vocab` or `ignore_index`.
    pub targets: *const c_void,
    pub options: *const ppok_logprob_options,
    /// Log-probability of the target, `[rows]`, written.
    pub logp: *mut f32,
    /// Entropy of the row's distribution, `[rows]`, written; null if not wanted.
    pub entropy: *mut f32,
    /// The row's largest logit, `[rows]`, written, for the backward pass; null if not wanted.
    pub max: *mut f32,
    /// ln s, `[rows]`, written, for the backward pass; null if `max` is.
    pub log_sum: *mut f32,
}

impl ppok_logprob_forward_args {
    fn typed<T: Logit, I: TokenId>(&self, memory: &mut Memory, on: On) -> Result<()> {
        let (rows, vocab, options) = (self.rows, self.vocab, memory.options(self.options)?);
        let inputs: ForwardInputs<Raw, T, I> = list_of!(self, ForwardInputs, [logits, targets], []);
        run!(
            (on, memory),
            [inputs, (&[rows], vocab)],
            [list_of!(self, ForwardOutputs, [logp], [entropy, max, log_sum]), &[rows]],
            |i, o| cpu::forward(i, rows, vocab, &options, o),
            |stream| cuda::forward(stream, i, rows, vocab, &options, o),
        )
    }
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_logprob_forward_args {
    const OP: &'static str = OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        with_logits!(OP, self.logits_type, T => {
            with_targets!(OP, self.targets_type, I => self.typed::<T, I>(memory, on))
        })
    }
}

/// Arguments of ppok_logprob_partial_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_logprob_partial_args {
    pub struct_size: usize,
    /// Rows of logits, one a token.
    pub rows: usize,
    /// Columns of the tile: logits of a row; above 0.
    pub columns: usize,
    /// The id of the tile's first column.
    pub first_column: usize,
    /// Columns of the whole vocabulary, at least `first_column + columns` and below 2^32.
    pub vocab: usize,
    /// `PPOK_F32`, `PPOK_F16` or `PPOK_BF16`.
    pub logits_type: i32,
    /// `PPOK_U32` or `PPOK_I64`.
    pub targets_type: i32,
    /// 1 if the sums begin with this tile, and what they hold is not looked at; 0 if they go on.
    pub begins: i32,
    pub reserved: i32,
    /// Logits of the tile, `[rows, columns]` of `logits_type`.
    pub logits: *const c_void,
    /// Ids of the tokens, `[rows]` of `targets_type`; each in `0..vocab` or `ignore_index`.
    pub targets: *const c_void,
    pub options: *const ppok_logprob_options,
    /// The largest logit so far, `[rows]`, read and written, and so are the next three.
    pub max: *mut f32,
    /// Sum of exp((z - max) / T) over the columns so far but one that holds the maximum, `[rows]`.
    pub rest: *mut f32,
    /// The target's logit, `[rows]`; NaN while its column is not among those so far.
    pub logit: *mut f32,
    /// The sum of the exponentials weighted by (max - z) / T, `[rows]`; null if no entropy is wanted.
    pub weighted: *mut f32,
}

impl ppok_logprob_partial_args {
    fn typed<T: Logit, I: TokenId>(&self, memory: &mut Memory, on: On) -> Result<()> {
        let (rows, options) = (self.rows, memory.options(self.options)?);
        let columns = Columns { first: self.first_column, count: self.columns, vocab: self.vocab };
        let begins = bool::decode(OP, "begins", self.begins)?;
        let inputs: ForwardInputs<Raw, T, I> = list_of!(self, ForwardInputs, [logits, targets], []);
        run!(
            (on, memory),
            [inputs, (&[rows], columns.count)],
            [list_of!(self, RunningSums, [max, rest, logit], [weighted]), &[rows]],
            |i, o| cpu::partial(i, rows, columns, &options, begins, o),
            |stream| cuda::partial(stream, i, rows, columns, &options, begins, o),
        )
    }
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_logprob_partial_args {
    const OP: &'static str = OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        check_reserved(OP, "args", self.reserved)?;
        with_logits!(OP, self.logits_type, T => {
            with_targets!(OP, self.targets_type, I => self.typed::<T, I>(memory, on))
        })
    }
}

/// Arguments of ppok_logprob_merge_*. Where one of the weighted sums is null, so is the other.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_logprob_merge_args {
    pub struct_size: usize,
    /// Rows.
    pub rows: usize,
    /// The running sums over other columns, as ppok_logprob_partial_* wrote them: the largest logit,
    /// `[rows]`.
    pub other_max: *const f32,
    /// The sum, `[rows]`.
    pub other_rest: *const f32,
    /// The target's logit, `[rows]`.
    pub other_logit: *const f32,
    /// The weighted sum, `[rows]`; may be null.
    pub other_weighted: *const f32,
    pub options: *const ppok_logprob_options,
    /// The running sums that they are added to: the largest logit, `[rows]`, read and written, and so
    /// are the next three.
    pub max: *mut f32,
    /// The sum, `[rows]`.
    pub rest: *mut f32,
    /// The target's logit, `[rows]`.
    pub logit: *mut f32,
    /// The weighted sum, `[rows]`; may be null.
    pub weighted: *mut f32,
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_logprob_merge_args {
    const OP: &'static str = OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        let (rows, options) = (self.rows, memory.options(self.options)?);
        let inputs = list_of!(
            self,
            MergeInputs::<Raw>,
            [other_max, other_rest, other_logit],
            [other_weighted]
        );
        run!(
            (on, memory),
            [inputs, &[rows]],
            [list_of!(self, RunningSums::<Raw>, [max, rest, logit], [weighted]), &[rows]],
            |i, o| cpu::merge(i, rows, &options, o),
            |stream| cuda::merge(stream, i, rows, &options, o),
        )
    }
}

/// Arguments of ppok_logprob_finish_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_logprob_finish_args {
    pub struct_size: usize,
    /// Rows.
    pub rows: usize,
    /// Columns of the whole vocabulary, below 2^32.
    pub vocab: usize,
    /// `PPOK_U32` or `PPOK_I64`.
    pub targets_type: i32,
    pub reserved: i32,
    /// Ids of the tokens, `[rows]` of `targets_type`; each in `0..vocab` or `ignore_index`.
    pub targets: *const c_void,
    /// The running sums over all columns, as ppok_logprob_partial_* or ppok_logprob_merge_* wrote them:
    /// the largest logit, `[rows]`.
    pub max: *const f32,
    /// The sum, `[rows]`.
    pub rest: *const f32,
    /// The target's logit, `[rows]`.
    pub logit: *const f32,
    /// The weighted sum, `[rows]`; may be null if `entropy` is.
    pub weighted: *const f32,
    pub options: *const ppok_logprob_options,
    /// Log-probability of the target, `[rows]`, written.
    pub logp: *mut f32,
    /// ln s, `[rows]`, written, for the backward pass.
    pub log_sum: *mut f32,
    /// Entropy of the row's distribution, `[rows]`, written; null if not wanted.
    pub entropy: *mut f32,
}

impl ppok_logprob_finish_args {
    fn typed<I: TokenId>(&self, memory: &mut Memory, on: On) -> Result<()> {
        let (rows, vocab, options) = (self.rows, self.vocab, memory.options(self.options)?);
        let inputs: FinishInputs<Raw, I> =
            list_of!(self, FinishInputs, [targets, max, rest, logit], [weighted]);
        run!(
            (on, memory),
            [inputs, &[rows]],
            [list_of!(self, FinishOutputs::<Raw>, [logp, log_sum], [entropy]), &[rows]],
            |i, o| cpu::finish(i, rows, vocab, &options, o),
            |stream| cuda::finish(stream, i, rows, vocab, &options, o),
        )
    }
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_logprob_finish_args {
    const OP: &'static str = OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        check_reserved(OP, "args", self.reserved)?;
        with_targets!(OP, self.targets_type, I => self.typed::<I>(memory, on))
    }
}

/// Arguments of ppok_logprob_backward_*.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct ppok_logprob_backward_args {
    pub struct_size: usize,
    /// Rows of logits, one a token.
    pub rows: usize,
    /// Columns of the whole vocabulary, above 0 and below 2^32. Logits of a row, unless there are
    /// `columns`.
    pub vocab: usize,
    /// Logits of a row where they are a tile, and 0 where they are all.
    pub columns: usize,
    /// The id of the tile's first column; 0 where the logits are all.
    pub first_column: usize,
    /// `PPOK_F32`, `PPOK_F16` or `PPOK_BF16`.
    pub logits_type: i32,
    /// `PPOK_U32` or `PPOK_I64`.
    pub targets_type: i32,
    /// Logits, `[rows, vocab]` or `[rows, columns]` of `logits_type`.
    pub logits: *const c_void,
    /// Ids of the tokens, `[rows]` of `targets_type`.
    pub targets: *const c_void,
    /// The row's largest logit, `[rows]`, as the forward pass wrote it, and so are the next two.
    pub max: *const f32,
    /// ln s, `[rows]`.
    pub log_sum: *const f32,
    /// Entropy of the row's distribution, `[rows]`; may be null if `grad_entropy` is.
    pub entropy: *const f32,
    /// Upstream gradient of the log-probabilities, `[rows]`; null stands for zeros.
    pub grad_logp: *const f32,
    /// Upstream gradient of the entropies, `[rows]`; null stands for zeros.
    pub grad_entropy: *const f32,
    pub options: *const ppok_logprob_options,
    /// Gradient of the logits, of their shape and type, written; it may be `logits`.
    pub grad_logits: *mut c_void,
}

impl ppok_logprob_backward_args {
    fn typed<T: Logit, I: TokenId>(&self, memory: &mut Memory, on: On) -> Result<()> {
        let (rows, options) = (self.rows, memory.options(self.options)?);
        let count = if self.columns == 0 { self.vocab } else { self.columns };
        let columns = Columns { first: self.first_column, count, vocab: self.vocab };
        let shape = (&[rows][..], count);
        let forward: ForwardInputs<Raw, T, I> =
            list_of!(self, ForwardInputs, [logits, targets], []);
        let inputs = BackwardInputs {
            entropy: self.entropy.given(),
            grad_logp: self.grad_logp.given(),
            grad_entropy: self.grad_entropy.given(),
            ..BackwardInputs::new(forward, self.max, self.log_sum)
        };
        let outputs: BackwardOutputs<Raw, T> = list_of!(self, BackwardOutputs, [grad_logits], []);
        // Of the same memory there cannot be a slice to read and one to write.
        if matches!(on, On::Cpu) && self.logits == self.grad_logits.cast_const() {
            let mut outputs = outputs;
            let inputs: InPlaceInputs<Raw, I> = inputs.without_logits();
            let inputs = inputs.try_map(&[rows], memory)?;
            let outputs = outputs.try_map(shape, memory)?;
            return Ok(cpu::backward_in_place(inputs, rows, columns, &options, outputs)?);
        }
        run!(
            (on, memory),
            [inputs, shape],
            [outputs, shape],
            |i, o| cpu::backward_of_columns(i, rows, columns, &options, o),
            |stream| cuda::backward_of_columns(stream, i, rows, columns, &options, o),
        )
    }
}

// SAFETY: of numbers and pointers without padding, its size first.
unsafe impl Pass for ppok_logprob_backward_args {
    const OP: &'static str = OP;

    fn run(&self, memory: &mut Memory, on: On) -> Result<()> {
        with_logits!(OP, self.logits_type, T => {
            with_targets!(OP, self.targets_type, I => self.typed::<T, I>(memory, on))
        })
    }
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
/// A logit of -inf is a token of probability 0. A row with NaN or +inf, or of -inf only, gives NaN in
/// that row and in no other. A row with target `ignore_index` is not read: logp and entropy are 0. Any
/// other target outside `0..vocab` is refused with `PPOK_STATUS_TARGET`, and nothing is written; on
/// CUDA its row comes out as NaN.
#[no_mangle]
pub unsafe extern "C" fn ppok_logprob_forward_cpu(args: *const ppok_logprob_forward_args) -> i32 {
    capi::cpu(args)
}

/// Folds a tile of columns into running sums of its rows, or begins them with it: the forward pass from
/// logits that come in pieces. The sums may be added to those over other columns, another process's say,
/// by ppok_logprob_merge_*, and ppok_logprob_finish_* makes log-probabilities and entropies of those over
/// all columns.
///
/// The bits depend on the widths of the tiles and their order. Targets are refused as in the forward pass.
#[no_mangle]
pub unsafe extern "C" fn ppok_logprob_partial_cpu(args: *const ppok_logprob_partial_args) -> i32 {
    capi::cpu(args)
}

/// Adds the running sums over other columns to those over some.
#[no_mangle]
pub unsafe extern "C" fn ppok_logprob_merge_cpu(args: *const ppok_logprob_merge_args) -> i32 {
    capi::cpu(args)
}

/// Log-probabilities, and entropies, of running sums over all columns. Of a target whose column was in
/// none of them the log-probability is NaN.
#[no_mangle]
pub unsafe extern "C" fn ppok_logprob_finish_cpu(args: *const ppok_logprob_finish_args) -> i32 {
    capi::cpu(args)
}

/// Gradient with respect to the logits, or to a tile of their columns, in their own type: with the
/// upstream gradients g of logp and h of the entropy,
///
/// ```text
/// d/dz_j = (g (1[j = t] - p_j) - h p_j (ln p_j + entropy)) / T
/// ```
///
/// A row that is ignored, or whose upstream gradients are 0, gets gradient 0 and is not read. Targets
/// are refused as in the forward pass.
#[no_mangle]
pub unsafe extern "C" fn ppok_logprob_backward_cpu(args: *const ppok_logprob_backward_args) -> i32 {
    capi::cpu(args)
}
