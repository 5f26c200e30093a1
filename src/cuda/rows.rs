//! How rows of logits are shared out to warps and blocks, the same for every op that reads them.
//! `kernels/common/rows.cuh` and `kernels/common/map.cuh` are the device's side.

use std::cell::Cell;

use super::{Args, Device, Kernel, Launch, Stream};
use crate::error::{Error, Result};

/// The longest rows, in bytes, of a warp, and of one part. A part is 256 threads', and several times the
/// 16 KiB that they have in flight. These must not depend on the number of rows, nor on the device: they
/// decide the order of additions.
const ONE_WARP: usize = 4 << 10;
const ONE_PART: usize = 64 << 10;

/// The longest rows, in bytes, of which a warp takes ranges of columns, and half a block; no sum depends
/// on it.
const WARP_RANGES: usize = 2 << 10;
const HALF_BLOCK_RANGES: usize = 8 << 10;

const WARP: usize = 32;

/// Threads of a block that several rows or column ranges share.
const BLOCK_THREADS: usize = 256;

/// Bytes of a load.
const VECTOR_BYTES: usize = 16;

thread_local! {
    static FORCED_WIDE: Cell<Option<bool>> = const { Cell::new(None) };
}

/// Takes the parts of every row that has several side by side, or one after the other; `None` leaves
/// that to the number of rows again. For this thread's calls, and for measuring and tests: the results
/// are the same.
pub fn force_wide(wide: Option<bool>) {
    FORCED_WIDE.set(wide);
}

/// Sums over the columns of each row.
#[derive(Clone, Copy)]
pub(crate) struct Reduction {
    rows: usize,
    threads: usize,
    /// Ranges of the columns of a row.
    pub parts: i32,
    /// Whether a thread of a block has so few tiles of a row that the next one is brought into L2 while
    /// one is computed. On an H200 that takes 5 to 14 % off rows of 100 KB, and costs long ones 2 to 6.
    pub ahead: bool,
    /// Whether a block takes all parts of a row at once.
    wide: bool,
}

/// The most tiles for which [`Reduction::ahead`] pays.
const FEW_TILES: usize = 10;

/// The kernels of a reduction.
pub(crate) struct Passes {
    /// A warp takes a row.
    pub warp: Kernel,
    /// A block takes a row, its parts one after the other.
    pub block: Kernel,
    /// A block of as many threads for each part takes a row, its parts side by side.
    pub wide: Kernel,
}

impl Reduction {
    /// The reduction of `rows` rows of `vocab` columns, in `most_parts` parts, the kernels'
    /// `MOST_PARTS`, if they are long.
    pub fn new<T>(device: Device, rows: usize, vocab: usize, most_parts: i32) -> Self {
        let (threads, parts) = match vocab.saturating_mul(size_of::<T>()) {
            bytes if bytes <= ONE_WARP => (WARP, 1),
            bytes if bytes <= ONE_PART => (BLOCK_THREADS, 1),
            _ => (BLOCK_THREADS, most_parts),
        };
        // A multiprocessor has room for one wide block or for several others. These have enough loads in
        // flight when there are two or more of them.
        let few = rows < 2 * device.multiprocessors as usize;
        let wide = FORCED_WIDE.get().unwrap_or(few) && parts > 1;
        Self { rows, threads, parts, ahead: false, wide }.with_width::<T>(vocab, wide)
    }

    /// The layout with all parts of a row side by side in a block, however many rows there are.
    pub fn side_by_side<T>(device: Device, rows: usize, vocab: usize, most_parts: i32) -> Self {
        let found = Self::new::<T>(device, rows, vocab, most_parts);
        found.with_width::<T>(vocab, found.parts > 1)
    }

    fn with_width<T>(self, vocab: usize, wide: bool) -> Self {
        let tile =
            BLOCK_THREADS * if wide { self.parts as usize } else { 1 } * vectors(1) * VECTOR_BYTES;
        let ahead = vocab.saturating_mul(size_of::<T>()) <= FEW_TILES * tile;
        Self { wide, ahead, ..self }
    }

    /// Threads of a block.
    pub fn block_threads(&self) -> usize {
        BLOCK_THREADS * if self.wide { self.parts as usize } else { 1 }
    }

    /// Launches what the geometry asks for.
    pub fn launch<A: Args>(&self, stream: &Stream, passes: &Passes, args: &A) -> Result<()> {
        let device = stream.device();
        if self.threads == WARP {
            let blocks = self.rows.div_ceil(BLOCK_THREADS / WARP);
            let launch = Launch::new(device, blocks, BLOCK_THREADS);
            return stream.launch(&passes.warp, launch, args);
        }
        let kernel = if self.wide { &passes.wide } else { &passes.block };
        stream.launch(kernel, Launch::new(device, self.rows, self.block_threads()), args)
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

/// Ranges that a multiprocessor gets of a map, if there are as many: enough that all end at about the
/// same time, and few, since each begins with what has to be known of its row.
const RANGES: usize = 96;

impl Map {
    /// The map over `rows` rows of `vocab` columns, from `inputs` tensors.
    pub fn new<T>(device: Device, rows: usize, vocab: usize, inputs: usize) -> Self {
        let threads = match vocab.saturating_mul(size_of::<T>()) {
            bytes if bytes <= WARP_RANGES => WARP,
            bytes if bytes <= HALF_BLOCK_RANGES => BLOCK_THREADS / 2,
            _ => BLOCK_THREADS,
        };
        let tile = threads * vectors(inputs) * VECTOR_BYTES / size_of::<T>();
        let wanted = (RANGES * device.multiprocessors as usize).div_ceil(rows.max(1));
        let chunks = vocab.div_ceil(tile).min(wanted.max(1));
        Self { rows, chunks: chunks as i32, threads: threads as i32 }
    }

    /// Launches a unit of threads for every range of every row.
    pub fn launch<A: Args>(&self, stream: &Stream, kernel: &Kernel, args: &A) -> Result<()> {
        let units = self.rows.saturating_mul(self.chunks as usize);
        let blocks = units.div_ceil(BLOCK_THREADS / self.threads as usize);
        stream.launch(kernel, Launch::new(stream.device(), blocks, BLOCK_THREADS), args)
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
