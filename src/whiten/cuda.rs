//! Launches of `kernels/whiten.cu` on device memory and the caller's stream. Nothing is allocated
//! and nothing waits for the device.
//!
//! Moments on the device are three f64: count, mean, and the sum of squared deviations.
//! [`masked_moments`] and [`gae`](crate::gae::cuda::gae) write them, and the passes that whiten read
//! them there, so that they need not come to the host.
//!
//! Refuses what [`cpu`](super::cpu) refuses, but for [`Given::OnDevice`] moments of too few
//! elements: to look at them here would cost a wait. What they whiten comes out as NaN where it is
//! not masked.

use std::ptr::null;

use super::{check_mask, EpsPlacement, WhitenOptions, OP};
use crate::cuda::{Args, Kernel, Launch, Slice, SliceMut, Stream};
use crate::error::{Error, Result};
use crate::moments::cuda::{merge, merge_workspace_len};
use crate::moments::Moments;

/// Threads of a block.
const BLOCK: usize = 256;

/// Threads of the block that merges sums.
const MERGE_BLOCK: usize = 512;

/// Elements that the threads of a block hold, as in the kernels.
const TILE: usize = 16 * BLOCK;
const PAIRS_TILE: usize = 8 * BLOCK;

/// The most partials that a sum over all elements has, and the most blocks that go through elements
/// one by one: on the largest chips each multiprocessor gets several. Not the device's own number,
/// since the order of additions depends on it.
const RUNS: usize = 2048;

/// Values of f64 that a run leaves for the gradient.
const SUMS: usize = 2;

/// Moments to whiten with.
#[derive(Clone, Copy)]
pub enum Given<'a> {
    /// One that an earlier launch on the same stream wrote.
    OnDevice(Slice<'a, Moments>),
    /// Of all shards, say.
    Known(Moments),
}

/// The least length of the workspace of [`masked_moments`] and [`masked_whiten_backward`] for so many
/// elements: 48 KiB of f64 at most.
pub fn workspace_len(len: usize) -> usize {
    let runs = |tile| len.div_ceil(run_len(len, tile));
    merge_workspace_len(runs(TILE)).max((runs(PAIRS_TILE) + 1) * SUMS)
}

/// Count, mean and sum of squared deviations of the unmasked elements of `x` into `moments`, which
/// has one element. Reads `x` once. `workspace` has [`workspace_len`] values or more, of any
/// content, and can be used again for the next call on the same stream.
///
/// # Errors
/// If a length does not fit, or a kernel cannot be launched.
pub fn masked_moments(
    stream: &Stream,
    x: Slice<f32>,
    mask: Option<Slice<u8>>,
    moments: SliceMut<Moments>,
    workspace: SliceMut<f64>,
) -> Result<()> {
    check_mask(x.len(), mask.map(|mask| mask.len()))?;
    Error::check_len(OP, "moments", moments.len(), 1)?;
    let run = run_len(x.len(), TILE);
    let partials = x.len().div_ceil(run);
    Error::check_workspace(OP, workspace.len(), merge_workspace_len(partials))?;

    let workspace: *mut Moments = workspace.as_mut_ptr().cast();
    if partials > 0 {
        let args = MomentsArgs {
            x: x.as_ptr(),
            mask: pointer(mask),
            partials: workspace,
            count: x.len() as i64,
            run: run as i64,
        };
        launch(stream, "moments", partials, BLOCK, &args)?;
    }
    merge(stream, OP, workspace, partials, moments.as_mut_ptr())
}

/// Whitens `x` into `out` with the given moments: its own, or those of a larger set. `out` may be
/// the memory of `x`.
///
/// # Errors
/// If a length does not fit, `eps` is out of range, moments that are known are of too few elements,
/// or a kernel cannot be launched.
pub fn masked_whiten(
    stream: &Stream,
    x: Slice<f32>,
    mask: Option<Slice<u8>>,
    moments: Given,
    options: &WhitenOptions,
    out: SliceMut<f32>,
) -> Result<()> {
    options.validate()?;
    check_mask(x.len(), mask.map(|mask| mask.len()))?;
    let given = GivenArgs::new(moments, options)?;
    Error::check_len(OP, "out", out.len(), x.len())?;
    forward(stream, x, mask, given, options, out, false)
}

/// The gradient with respect to `x` of [`masked_whiten`] with `x`'s own moments. `grad_x` may be
/// the memory of `grad_out`; reads both twice. `workspace` as for [`masked_moments`].
///
/// # Errors
/// As [`masked_whiten`].
#[allow(clippy::too_many_arguments)] // those of the CPU's, the stream, and the workspace
pub fn masked_whiten_backward(
    stream: &Stream,
    x: Slice<f32>,
    mask: Option<Slice<u8>>,
    moments: Given,
    grad_out: Slice<f32>,
    options: &WhitenOptions,
    grad_x: SliceMut<f32>,
    workspace: SliceMut<f64>,
) -> Result<()> {
    options.validate()?;
    check_mask(x.len(), mask.map(|mask| mask.len()))?;
    let given = GivenArgs::new(moments, options)?;
    Error::check_len(OP, "grad_out", grad_out.len(), x.len())?;
    Error::check_len(OP, "grad_x", grad_x.len(), x.len())?;
    let run = run_len(x.len(), PAIRS_TILE);
    let partials = x.len().div_ceil(run);
    Error::check_workspace(OP, workspace.len(), (partials + 1) * SUMS)?;
    if x.len() == 0 {
        return Ok(());
    }

    let count = x.len() as i64;
    let (x, grad_out, mask) = (x.as_ptr(), grad_out.as_ptr(), pointer(mask));
    // The sums of all come before those of the runs.
    let sums = workspace.as_mut_ptr();
    let run_sums = sums.wrapping_add(SUMS);
    let run = run as i64;
    let args = SumsArgs { x, grad_out, mask, partials: run_sums, count, run, given };
    launch(stream, "sums", partials, BLOCK, &args)?;
    let args = MergeSumsArgs { partials: run_sums, sums, count: partials as i64 };
    launch(stream, "merge_sums", 1, MERGE_BLOCK, &args)?;
    let options = OptionsArgs::new(options);
    let grad = grad_x.as_mut_ptr();
    let args = BackwardArgs { x, grad_out, mask, grad_x: grad, sums, count, given, options };
    launch(stream, "backward", blocks(grad_x.len(), PAIRS_TILE), BLOCK, &args)
}

/// The gradient with respect to `x` of [`masked_whiten`] with moments that are constants. `grad_x`
/// may be the memory of `grad_out`.
///
/// # Errors
/// As [`masked_whiten`].
pub fn masked_whiten_with_backward(
    stream: &Stream,
    mask: Option<Slice<u8>>,
    moments: Given,
    grad_out: Slice<f32>,
    options: &WhitenOptions,
    grad_x: SliceMut<f32>,
) -> Result<()> {
    options.validate()?;
    check_mask(grad_out.len(), mask.map(|mask| mask.len()))?;
    let given = GivenArgs::new(moments, options)?;
    Error::check_len(OP, "grad_x", grad_x.len(), grad_out.len())?;
    forward(stream, grad_out, mask, given, options, grad_x, true)
}

fn forward(
    stream: &Stream,
    x: Slice<f32>,
    mask: Option<Slice<u8>>,
    given: GivenArgs,
    options: &WhitenOptions,
    out: SliceMut<f32>,
    scale_only: bool,
) -> Result<()> {
    if x.len() == 0 {
        return Ok(());
    }
    let args = ForwardArgs {
        x: x.as_ptr(),
        mask: pointer(mask),
        out: out.as_mut_ptr(),
        count: x.len() as i64,
        given,
        options: OptionsArgs::new(options),
        scale_only: i32::from(scale_only),
    };
    launch(stream, "forward", blocks(x.len(), TILE), BLOCK, &args)
}

fn launch<A: Args>(
    stream: &Stream,
    pass: &'static str,
    blocks: usize,
    threads: usize,
    args: &A,
) -> Result<()> {
    let launch = Launch::new(stream.device(), blocks, 1, threads as u32);
    stream.launch(&Kernel { op: OP, pass, dtype: "f32" }, launch, args)
}

/// Elements of a run: whole tiles of a block, and [`RUNS`] runs at most.
fn run_len(len: usize, tile: usize) -> usize {
    len.div_ceil(RUNS).next_multiple_of(tile).max(tile)
}

/// Blocks that go through so many elements one by one.
fn blocks(len: usize, tile: usize) -> usize {
    len.div_ceil(tile).min(RUNS)
}

fn pointer<T>(slice: Option<Slice<T>>) -> *const T {
    slice.map_or(null(), |slice| slice.as_ptr())
}

/// As in the kernels, and so are the next ones.
#[repr(C)]
#[derive(Clone, Copy)]
struct OptionsArgs {
    eps: f64,
    eps_at_std: i32,
    unbiased: i32,
    shift_mean: i32,
}

impl OptionsArgs {
    fn new(options: &WhitenOptions) -> Self {
        Self {
            eps: options.eps,
            eps_at_std: i32::from(options.eps_placement == EpsPlacement::Std),
            unbiased: i32::from(options.unbiased),
            shift_mean: i32::from(options.shift_mean),
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct GivenArgs {
    moments: *const Moments,
    values: Moments,
}

impl GivenArgs {
    /// An error if it can be seen that the moments are of too few elements.
    fn new(given: Given, options: &WhitenOptions) -> Result<Self> {
        match given {
            Given::OnDevice(moments) => {
                Error::check_len(OP, "moments", moments.len(), 1)?;
                Ok(Self { moments: moments.as_ptr(), values: Moments::default() })
            }
            Given::Known(moments) => {
                options.divisor("moments", &moments)?;
                Ok(Self { moments: null(), values: moments })
            }
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MomentsArgs {
    x: *const f32,
    mask: *const u8,
    partials: *mut Moments,
    count: i64,
    run: i64,
}

// SAFETY: the fields of the kernels' struct, in order.
unsafe impl Args for MomentsArgs {}

#[repr(C)]
#[derive(Clone, Copy)]
struct ForwardArgs {
    x: *const f32,
    mask: *const u8,
    out: *mut f32,
    count: i64,
    given: GivenArgs,
    options: OptionsArgs,
    scale_only: i32,
}

// SAFETY: the fields of the kernels' struct, in order.
unsafe impl Args for ForwardArgs {}

#[repr(C)]
#[derive(Clone, Copy)]
struct SumsArgs {
    x: *const f32,
    grad_out: *const f32,
    mask: *const u8,
    partials: *mut f64,
    count: i64,
    run: i64,
    given: GivenArgs,
}

// SAFETY: the fields of the kernels' struct, in order.
unsafe impl Args for SumsArgs {}

#[repr(C)]
#[derive(Clone, Copy)]
struct MergeSumsArgs {
    partials: *const f64,
    sums: *mut f64,
    count: i64,
}

// SAFETY: the fields of the kernels' struct, in order.
unsafe impl Args for MergeSumsArgs {}

#[repr(C)]
#[derive(Clone, Copy)]
struct BackwardArgs {
    x: *const f32,
    grad_out: *const f32,
    mask: *const u8,
    grad_x: *mut f32,
    sums: *const f64,
    count: i64,
    given: GivenArgs,
    options: OptionsArgs,
}

// SAFETY: the fields of the kernels' struct, in order.
unsafe impl Args for BackwardArgs {}
