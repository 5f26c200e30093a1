//! Inputs from a fixed seed.

use ppo_kernels::cpu::Logit;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::gpu::Buffer;

/// Logits in [-8, 8).
pub fn logits<T: Logit>(count: usize) -> Vec<T> {
    uniform(count).into_iter().map(|x| T::from_f32(8.0 * x)).collect()
}

/// Numbers in [-1, 1).
pub fn uniform(count: usize) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(count as u64);
    (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// A mask of responses in [batch, seq_len], each half to all of the length.
pub fn mask(batch: usize, seq_len: usize) -> Buffer<u8> {
    let kept = |row: usize| seq_len / 2 + row * 7919 % (seq_len / 2 + 1);
    let row = |row| (0..seq_len).map(move |t| u8::from(t < kept(row)));
    Buffer::new(&(0..batch).flat_map(row).collect::<Vec<_>>(), 0)
}

/// `len` elements in device memory: `values` over and over.
pub fn tiled<T: Copy>(values: &[T], len: usize) -> Buffer<T> {
    let buffer = Buffer::uninit(len, 0);
    for first in (0..len).step_by(values.len()) {
        buffer.write(first, &values[..values.len().min(len - first)]);
    }
    buffer
}

/// Tokens [count] in f32.
pub fn tokens(count: usize) -> Buffer<f32> {
    tiled(&uniform(count.min(1 << 20)), count)
}
