//! Launches of `kernels/whiten.cu` on device memory and the caller's stream. Nothing is allocated
//! and nothing waits for the device.
//!
//! [`masked_moments`] and [`gae`](crate::gae::cuda::gae) write moments on the device, and the passes
//! that whiten read them there, so that they need not come to the host. Moments that the host knows,
//! of all shards, say, are passed as `known` and left out of the inputs.
//!
//! Refuses what [`cpu`](super::cpu) refuses, but for moments on the device that are of too few
//! elements: to look at them here would cost a wait. What they whiten comes out as NaN where it is
//! not masked.

use super::{EpsPlacement, WhitenOptions, OP};
use crate::cuda::{Args, SliceMut, Stream};
use crate::error::{Error, Result};
use crate::memory::{in_space, Lengths, Pointer, Pointers};
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

in_space!(
    Device:
    MomentsInputs, MomentsOutputs, Inputs, Outputs, OwnBackwardInputs, WithBackwardInputs,
    GradOutputs
);

/// The least length of the workspace of [`masked_moments`] and [`masked_whiten_backward`] for so many
/// elements: 48 KiB of f64 at most.
pub fn workspace_len(elements: usize) -> usize {
    let runs = |tile| elements.div_ceil(run_len(elements, tile));
    merge_workspace_len(runs(TILE)).max(sums_len(runs(PAIRS_TILE)))
}

/// Count, mean and sum of squared deviations of the unmasked elements. Reads them once. `workspace`
/// has [`workspace_len`] values or more, of any content, and can be used again for the next call on
/// the same stream.
///
/// # Errors
/// If a length does not fit, or a kernel cannot be launched.
pub fn masked_moments(
    stream: &Stream,
    inputs: MomentsInputs,
    elements: usize,
    mut outputs: MomentsOutputs,
    workspace: SliceMut<f64>,
) -> Result<()> {
    let inputs = inputs.try_map(&[elements], &mut Lengths(OP))?;
    let outputs = outputs.try_map((), &mut Lengths(OP))?;
    let run = run_len(elements, TILE);
    let runs = elements.div_ceil(run);
    Error::check_workspace(OP, workspace.len(), merge_workspace_len(runs))?;

    let partials: *mut Moments = workspace.as_mut_ptr().cast();
    if runs > 0 {
        let args = MomentsArgs { inputs, partials, count: elements as i64, run: run as i64 };
        stream.launch_f32([OP, "moments"], runs, BLOCK, &args)?;
    }
    merge(stream, OP, partials, runs, outputs.moments.as_ptr())
}

/// Whitens the elements with the given moments: their own, or those of a larger set. `known` are
/// looked at where the inputs have no moments.
///
/// # Errors
/// If a length does not fit, `eps` is out of range, moments are missing or known to be of too few
/// elements, or a kernel cannot be launched.
pub fn masked_whiten(
    stream: &Stream,
    inputs: Inputs,
    known: Option<Moments>,
    elements: usize,
    options: &WhitenOptions,
    mut outputs: Outputs,
) -> Result<()> {
    options.validate()?;
    let inputs = inputs.try_map(&[elements], &mut Lengths(OP))?;
    let known = check_moments(inputs.moments, known, "x", options)?;
    let outputs = outputs.try_map(&[elements], &mut Lengths(OP))?;
    let (count, scale_only) = (elements as i64, 0);
    let options = OptionsArgs::new(options);
    launch_forward(stream, &ForwardArgs { inputs, outputs, known, count, options, scale_only })
}

/// The gradient with respect to `x` of [`masked_whiten`] with `x`'s own moments. Reads the elements
/// and the upstream gradient twice. `known` as for [`masked_whiten`], `workspace` as for
/// [`masked_moments`].
///
/// # Errors
/// As [`masked_whiten`].
pub fn masked_whiten_backward(
    stream: &Stream,
    inputs: OwnBackwardInputs,
    known: Option<Moments>,
    elements: usize,
    options: &WhitenOptions,
    mut outputs: GradOutputs,
    workspace: SliceMut<f64>,
) -> Result<()> {
    options.validate()?;
    let inputs = inputs.try_map(&[elements], &mut Lengths(OP))?;
    let known = check_moments(inputs.moments, known, "x", options)?;
    let outputs = outputs.try_map(&[elements], &mut Lengths(OP))?;
    let run = run_len(elements, PAIRS_TILE);
    let runs = elements.div_ceil(run);
    Error::check_workspace(OP, workspace.len(), sums_len(runs))?;
    if elements == 0 {
        return Ok(());
    }

    let count = elements as i64;
    // The sums of all come before those of the runs.
    let sums: *mut GradientSums = workspace.as_mut_ptr().cast();
    let partials = sums.wrapping_add(1);
    let args = SumsArgs { inputs, known, partials, count, run: run as i64 };
    stream.launch_f32([OP, "sums"], runs, BLOCK, &args)?;
    let args = MergeSumsArgs { partials, sums, count: runs as i64 };
    stream.launch_f32([OP, "merge_sums"], 1, MERGE_BLOCK, &args)?;
    let options = OptionsArgs::new(options);
    let args = BackwardArgs { inputs, outputs, known, sums, count, options };
    stream.launch_f32([OP, "backward"], blocks(elements, PAIRS_TILE), BLOCK, &args)
}

/// The gradient with respect to `x` of [`masked_whiten`] with moments that are constants. `known` as
/// for [`masked_whiten`].
///
/// # Errors
/// As [`masked_whiten`].
pub fn masked_whiten_with_backward(
    stream: &Stream,
    inputs: WithBackwardInputs,
    known: Option<Moments>,
    elements: usize,
    options: &WhitenOptions,
    mut outputs: GradOutputs,
) -> Result<()> {
    options.validate()?;
    let shape = &[elements];
    let inputs = inputs.try_map(shape, &mut Lengths(OP))?;
    let known = check_moments(inputs.moments, known, "grad_y", options)?;
    let outputs = outputs.try_map(shape, &mut Lengths(OP))?;
    // The forward pass without the mean, on the gradient.
    let inputs = super::Inputs { x: inputs.grad_y, mask: inputs.mask, moments: inputs.moments };
    let outputs = super::Outputs { y: outputs.grad_x };
    let (count, scale_only) = (elements as i64, 1);
    let options = OptionsArgs::new(options);
    launch_forward(stream, &ForwardArgs { inputs, outputs, known, count, options, scale_only })
}

fn launch_forward(stream: &Stream, args: &ForwardArgs) -> Result<()> {
    match args.count as usize {
        0 => Ok(()),
        elements => stream.launch_f32([OP, "forward"], blocks(elements, TILE), BLOCK, args),
    }
}

/// Elements of a run: whole tiles of a block, and [`RUNS`] runs at most.
fn run_len(elements: usize, tile: usize) -> usize {
    elements.div_ceil(RUNS).next_multiple_of(tile).max(tile)
}

/// Values of f64 that the sums of so many runs take, and those of all.
fn sums_len(runs: usize) -> usize {
    (runs + 1) * (size_of::<GradientSums>() / size_of::<f64>())
}

/// Blocks that go through so many elements one by one.
fn blocks(elements: usize, tile: usize) -> usize {
    elements.div_ceil(tile).min(RUNS)
}

/// The moments that the host knows, if the kernels are to use them; any otherwise. An error if there are
/// none at all, or if it can be seen that they are of too few elements.
fn check_moments(
    on_device: Option<Pointer<Moments>>,
    known: Option<Moments>,
    needed_by: &'static str,
    options: &WhitenOptions,
) -> Result<Moments> {
    match (on_device, known) {
        (Some(_), _) => Ok(Moments::default()),
        (None, Some(known)) => options.divisor("moments", &known).map(|_| known),
        (None, None) => Err(Error::Missing { op: OP, arg: "moments", needed_by }),
    }
}

/// The options as the kernels take them.
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

/// The sums of a run for the gradient.
#[repr(C)]
#[derive(Clone, Copy)]
struct GradientSums {
    g: f64,
    product: f64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MomentsArgs<'a> {
    inputs: super::MomentsInputs<'a, Pointers>,
    partials: *mut Moments,
    count: i64,
    run: i64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ForwardArgs<'a> {
    inputs: super::Inputs<'a, Pointers>,
    outputs: super::Outputs<'a, Pointers>,
    known: Moments,
    count: i64,
    options: OptionsArgs,
    scale_only: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SumsArgs<'a> {
    inputs: super::OwnBackwardInputs<'a, Pointers>,
    known: Moments,
    partials: *mut GradientSums,
    count: i64,
    run: i64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MergeSumsArgs {
    partials: *const GradientSums,
    sums: *mut GradientSums,
    count: i64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct BackwardArgs<'a> {
    inputs: super::OwnBackwardInputs<'a, Pointers>,
    outputs: super::GradOutputs<'a, Pointers>,
    known: Moments,
    sums: *const GradientSums,
    count: i64,
    options: OptionsArgs,
}

// SAFETY: each has the kernels' fields, in order; tests/kernel_arguments.rs compares them.
unsafe impl Args for MomentsArgs<'_> {}
unsafe impl Args for ForwardArgs<'_> {}
unsafe impl Args for SumsArgs<'_> {}
unsafe impl Args for MergeSumsArgs {}
unsafe impl Args for BackwardArgs<'_> {}
