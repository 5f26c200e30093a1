//! The launch that merges moments in device memory. Every op that makes some has the kernel, of
//! `kernels/common/moments.cuh`, in its own file.

use super::Moments;
use crate::cuda::{Args, Stream};
use crate::error::Result;

/// Threads of the block that merges, and the partials it takes: 16 a thread.
const MERGE_BLOCK: usize = 512;
const MERGE_RUN: usize = 8192;

/// The least length in f64 of a workspace that begins with so many partial moments, for [`merge`].
pub(crate) fn merge_workspace_len(partials: usize) -> usize {
    let mut merged = partials;
    let mut all = partials;
    while merged > MERGE_RUN {
        merged = merged.div_ceil(MERGE_RUN);
        all = all.saturating_add(merged);
    }
    all.saturating_mul(size_of::<Moments>() / size_of::<f64>())
}

/// Launches the op's kernel `merge`, as often as it takes, on moments that lie one after the other:
/// those of all together go into `moments`. [`merge_workspace_len`] says how much memory there is
/// from `partials` on.
pub(crate) fn merge(
    stream: &Stream,
    op: &'static str,
    mut partials: *mut Moments,
    mut count: usize,
    moments: *mut Moments,
) -> Result<()> {
    loop {
        let runs = count.div_ceil(MERGE_RUN).max(1);
        let merged = if runs == 1 { moments } else { partials.wrapping_add(count) };
        let args =
            MergeArgs { partials, moments: merged, count: count as i64, run: MERGE_RUN as i64 };
        stream.launch_f32([op, "merge"], runs, MERGE_BLOCK, &args)?;
        if runs == 1 {
            return Ok(());
        }
        (partials, count) = (merged, runs);
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MergeArgs {
    partials: *const Moments,
    moments: *mut Moments,
    count: i64,
    run: i64,
}

// SAFETY: the fields of the kernels' struct, in order.
unsafe impl Args for MergeArgs {}
