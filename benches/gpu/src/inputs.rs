//! Inputs from a fixed seed, made on the device: a piece is copied there, and doubled until it fills
//! the buffer.

use std::sync::OnceLock;

use cudarc::driver::result;
use ppo_kernels::cpu::Logit;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::gpu::{Buffer, Gpu};

/// Elements of a piece. Odd, so that rows begin at different places of it.
const PIECE: usize = (1 << 20) - 1;

/// Numbers in [-1, 1). Each `seed` has others at the same place.
fn piece(seed: usize, len: usize) -> Vec<f32> {
    static NUMBERS: OnceLock<Vec<f32>> = OnceLock::new();
    let numbers = NUMBERS.get_or_init(|| {
        let mut rng = StdRng::seed_from_u64(PIECE as u64);
        (0..PIECE).map(|_| rng.random_range(-1.0..1.0)).collect()
    });
    let first = seed * 7919 % PIECE;
    numbers.iter().cycle().skip(first).take(len.min(PIECE)).copied().collect()
}

/// Logits in [-8, 8).
pub fn logits<T: Logit>(seed: usize, len: usize) -> Buffer<T> {
    let piece: Vec<T> = piece(seed, len).into_iter().map(|x| T::from_f32(8.0 * x)).collect();
    repeated(&piece, len)
}

/// Tokens in f32, in [-1, 1).
pub fn tokens(seed: usize, len: usize) -> Buffer<f32> {
    repeated(&piece(seed, len), len)
}

/// A mask of responses in [batch, seq_len], each half to all of the length.
pub fn mask(batch: usize, seq_len: usize) -> Buffer<u8> {
    let kept = |row: usize| seq_len / 2 + row * 7919 % (seq_len / 2 + 1);
    let row = |row| (0..seq_len).map(move |t| u8::from(t < kept(row)));
    let rows = batch.min(PIECE.div_ceil(seq_len));
    repeated(&(0..rows).flat_map(row).collect::<Vec<_>>(), batch * seq_len)
}

/// `len` elements in device memory: the piece over and over.
fn repeated<T: Copy>(piece: &[T], len: usize) -> Buffer<T> {
    let buffer = Buffer::uninit(len, 0);
    let stream = Gpu::get().cuda_stream.cu_stream();
    let mut filled = piece.len().min(len);
    buffer.write(0, &piece[..filled]);
    while filled < len {
        let more = filled.min(len - filled);
        let (to, from) = (buffer.at(filled), buffer.at(0));
        // SAFETY: both lie in the buffer, and the second begins where the first ends.
        let copied = unsafe { result::memcpy_dtod_async(to, from, more * size_of::<T>(), stream) };
        copied.expect("the memory lives");
        filled += more;
    }
    buffer
}
