//! How rows of logits are shared out to warps and blocks, the same for every op that reads them.
//! `kernels/common/rows.cuh` and `kernels/common/map.cuh` are the device's side.

use std::cell::Cell;

use super::{Args, Device, Kernel, Launch, Stream};
use crate::error::{Error, Result};

/// How rows of up to so many bytes are shared out. It must not depend on the number of rows, nor on
/// the device: it decides the order of additions.
struct RowGeometry {
    max_row_bytes: usize,
    /// Threads for each part of a row: a warp, or all of a block.
    threads: usize,
    /// Blocks for a row.
    parts: usize,
}

const REDUCTION: [RowGeometry; 6] = [
    RowGeometry { max_row_bytes: 2 << 10, threads: WARP, parts: 1 },
    RowGeometry { max_row_bytes: 16 << 10, threads: 128, parts: 1 },
    RowGeometry { max_row_bytes: 64 << 10, threads: 256, parts: 1 },
    RowGeometry { max_row_bytes: 128 << 10, threads: 256, parts: 2 },
    RowGeometry { max_row_bytes: 256 << 10, threads: 256, parts: 4 },
    RowGeometry { max_row_bytes: usize::MAX, threads: 256, parts: 8 },
];

/// Threads that share a range of columns, by the row's bytes; no sum depends on it.
const MAP: [RowGeometry; 3] = [
    RowGeometry { max_row_bytes: 2 << 10, threads: WARP, parts: 1 },
    RowGeometry { max_row_bytes: 8 << 10, threads: 128, parts: 1 },
    RowGeometry { max_row_bytes: usize::MAX, threads: BLOCK_THREADS, parts: 1 },
];

const WARP: usize = 32;

/// Threads of a block that several rows or column ranges share.
const BLOCK_THREADS: usize = 256;

/// Bytes of a load.
const VECTOR_BYTES: usize = 16;

thread_local! {
    /// See [`force_parts`].
    static FORCED_PARTS: Cell<usize> = const { Cell::new(0) };
}

/// Splits every row that blocks take over so many of them (8 at most), whatever its length; 0 leaves
/// that to the length again. For this thread's calls, and for measuring only: it changes the order of
/// additions, and with it the last bits.
pub fn force_parts(parts: usize) {
    FORCED_PARTS.set(parts.min(8));
}

fn geometry<T>(table: &'static [RowGeometry], vocab: usize) -> &'static RowGeometry {
    let bytes = vocab.saturating_mul(size_of::<T>());
    let last = table.len() - 1;
    table.iter().find(|entry| bytes <= entry.max_row_bytes).unwrap_or(&table[last])
}

/// Sums over the columns of each row.
#[derive(Clone, Copy)]
pub(crate) struct Reduction {
    rows: usize,
    threads: usize,
    /// Blocks that share a row.
    pub parts: i32,
    /// Vectors of columns that a block takes of it.
    pub part_groups: i32,
    /// Whether the parts' sums pass through the workspace, since blocks cannot read each other's
    /// shared memory.
    pub through_workspace: bool,
}

/// The kernels of a reduction.
pub(crate) struct Passes {
    /// A warp takes a row.
    pub warp: Kernel,
    /// A block takes a row, or a part of it.
    pub block: Kernel,
    /// Merges what parts left in the workspace.
    pub merge: Kernel,
}

impl Reduction {
    /// The reduction of `rows` rows of `vocab` columns.
    pub fn new<T>(device: Device, rows: usize, vocab: usize) -> Self {
        let &RowGeometry { threads, parts, .. } = geometry::<T>(&REDUCTION, vocab);
        let parts = match FORCED_PARTS.get() {
            forced if forced > 0 && threads > WARP => forced,
            _ => parts,
        };
        let groups = vocab.div_ceil(VECTOR_BYTES / size_of::<T>());
        Self {
            rows,
            threads,
            parts: parts as i32,
            // A warp's load is whole in one part.
            part_groups: groups.div_ceil(parts).next_multiple_of(WARP) as i32,
            through_workspace: parts > 1 && !device.clusters,
        }
    }

    /// The least length in f32 of a workspace for the sums `S` of every part.
    pub fn workspace_len<S>(&self) -> usize {
        let parts = if self.through_workspace { self.parts as usize } else { 0 };
        self.rows.saturating_mul(parts * size_of::<S>() / size_of::<f32>())
    }

    /// `Ok` when a workspace of `got` f32 is large enough for the sums `S`.
    pub fn check_workspace<S>(&self, op: &'static str, got: usize) -> Result<()> {
        Error::check_workspace(op, got, self.workspace_len::<S>())
    }

    /// Launches what the geometry asks for.
    pub fn launch<A: Args>(&self, stream: &Stream, passes: &Passes, args: &A) -> Result<()> {
        let device = stream.device();
        if self.threads == WARP {
            let blocks = self.rows.div_ceil(BLOCK_THREADS / WARP);
            return stream.launch(
                &passes.warp,
                Launch::new(device, blocks, 1, BLOCK_THREADS as u32),
                args,
            );
        }
        let launch = Launch::new(device, self.rows, self.parts as u32, self.threads as u32);
        if !self.through_workspace {
            return stream.launch(&passes.block, launch, args);
        }
        // Without clusters: the same blocks, and a second launch that merges what they left.
        stream.launch(&passes.block, launch.without_clusters(), args)?;
        let launch =
            Launch::new(device, self.rows.div_ceil(BLOCK_THREADS), 1, BLOCK_THREADS as u32);
        stream.launch(&passes.merge, launch, args)
    }
}

/// Columns of each row that are computed each by itself.
#[derive(Clone, Copy)]
pub(crate) struct Map {
    rows: usize,
    /// Ranges of columns of a row.
    pub chunks: i32,
    /// Threads that share a range: a warp, or the whole block.
    pub threads: i32,
}

impl Map {
    /// The map over `rows` rows of `vocab` columns, from `inputs` tensors.
    pub fn new<T>(rows: usize, vocab: usize, inputs: usize) -> Self {
        let threads = geometry::<T>(&MAP, vocab).threads;
        let columns = threads * vectors(inputs) * VECTOR_BYTES / size_of::<T>();
        Self { rows, chunks: vocab.div_ceil(columns) as i32, threads: threads as i32 }
    }

    /// Launches a unit of threads for every range of every row.
    pub fn launch<A: Args>(&self, stream: &Stream, kernel: &Kernel, args: &A) -> Result<()> {
        let units = self.rows.saturating_mul(self.chunks as usize);
        let blocks = units.div_ceil(BLOCK_THREADS / self.threads as usize);
        stream.launch(kernel, Launch::new(stream.device(), blocks, 1, BLOCK_THREADS as u32), args)
    }
}

/// Vectors of each of so many inputs that a thread of a map has in flight, as in the kernels.
fn vectors(inputs: usize) -> usize {
    if inputs == 1 {
        4
    } else {
        2
    }
}

/// Launches a map over tokens, of f32 from `inputs` tensors: a block takes a range of them.
pub(crate) fn launch_over_tokens<A: Args>(
    stream: &Stream,
    name: [&'static str; 2],
    tokens: usize,
    inputs: usize,
    args: &A,
) -> Result<()> {
    let blocks = tokens.div_ceil(BLOCK_THREADS * vectors(inputs) * VECTOR_BYTES / size_of::<f32>());
    stream.launch_f32(name, blocks, BLOCK_THREADS, args)
}

/// [`Error::check_logits`], and `Ok` when the vectors of a row can be counted in 32 bits.
pub(crate) fn check_logits(op: &'static str, got: usize, rows: usize, vocab: usize) -> Result<()> {
    Error::check_logits(op, got, rows, vocab)?;
    if u32::try_from(vocab).is_ok() {
        return Ok(());
    }
    Err(Error::Shape {
        op,
        arg: "logits",
        expected: format!("[N, {}] or narrower", u32::MAX),
        got: format!("[N, {vocab}]"),
    })
}
