//! The devices that the kernels are tested on: the CPU stand-in (feature `simt`), in several thread
//! orders, or else the first GPU, which has an order of its own.

use ppo_kernels::cuda::{Device, Stream};

#[cfg(not(feature = "simt"))]
use super::gpu as backend;
#[cfg(feature = "simt")]
use super::simt as backend;

#[cfg(feature = "simt")]
pub use backend::goes_unseen;
pub use backend::{Buffer, Order};

/// The orders that every case runs in.
pub const ORDERS: [Order; 3] = [Order::Fifo, Order::Lifo, Order::Random(7)];

/// Those that whole comparisons run in: ThreadSanitizer, under which a case takes minutes, sees most races in
/// whichever order.
pub fn orders() -> &'static [Order] {
    match std::env::var("PPO_KERNELS_SIMT").as_deref() {
        Ok("thread") => &ORDERS[1..],
        _ => &ORDERS,
    }
}

/// A device as the launches see it.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    pub order: Order,
    pub device: Device,
    /// The name of a bug of `tests/planted_bugs.txt` to run the kernels with, or nothing.
    pub planted_bug: &'static str,
}

/// So many multiprocessors that rows of several parts get wide blocks, and so few that none do.
pub const MANY: u32 = 1 << 16;
pub const FEW: u32 = 0;

/// A device of so many multiprocessors whose grids have so many blocks.
/// A GPU that is older or smaller stays so.
pub fn machine(order: Order, multiprocessors: u32, max_blocks: u32) -> Machine {
    let device =
        Device { compute_capability: (9, 0), max_blocks, multiprocessors, shared_bytes: 232_448 };
    Machine { order, device, planted_bug: "" }
}

/// A stream on it.
pub fn stream(machine: Machine) -> Stream<'static> {
    backend::stream(machine)
}

/// Vocabularies for every mapping of rows: a warp a row, blocks, and rows of several parts,
/// of which some have few tiles or none, all with rows that are not aligned.
pub fn vocabularies<T>() -> Vec<usize> {
    let kib = 1024 / size_of::<T>();
    let parts = [65 * kib + 5, 129 * kib + 3, 257 * kib + 1];
    [&[1, 2, 3, 7, 8, 9, 31, 257, 2 * kib, 2 * kib + 1, 5 * kib + 3, 17 * kib + 1][..], &parts]
        .concat()
}

/// How many blocks make a small grid, so that kernels loop over rows, and how many kinds of rows are
/// enough: those of several parts are long.
pub fn blocks_and_kinds<T>(vocab: usize) -> (u32, usize) {
    match vocab * size_of::<T>() {
        0..=65_536 => (2, usize::MAX),
        65_537..=131_072 => (8, usize::MAX),
        _ => (8, 2),
    }
}
