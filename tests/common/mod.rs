//! What the tests of all ops share: golden vectors, random inputs, comparisons, devices. Without candle
//! it is what the tests of the CUDA kernels need, on a GPU machine too (benches/gpu).
#![allow(dead_code, unused_imports)] // each test binary uses its own part

pub mod advantages_cases;
pub mod correction_cases;
#[cfg(any(feature = "simt", feature = "cuda"))]
pub mod device;
pub mod gae_cases;
#[cfg(feature = "candle")]
mod golden;
#[cfg(all(feature = "cuda", not(feature = "simt")))]
pub mod gpu;
pub mod kl_cases;
pub mod logits_loss_cases;
pub mod logprob_cases;
#[cfg(feature = "candle")]
pub mod loss_golden;
pub mod pack;
pub mod ppo_loss_cases;
pub mod preference_cases;
#[cfg(feature = "simt")]
mod simt;
#[cfg(feature = "candle")]
mod tensors;
pub mod whiten_cases;

use approx::abs_diff_eq;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

#[cfg(feature = "candle")]
pub use golden::*;
#[cfg(feature = "candle")]
pub use tensors::*;

/// Asserts |got - want| <= abs + rel * |want|, elementwise; NaN equals NaN and inf equals inf.
#[track_caller]
pub fn assert_close(what: &str, got: &[f64], want: &[f64], rel: f64, abs: f64) {
    assert_eq!(got.len(), want.len(), "{what}: lengths differ");
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let same = g == w || (g.is_nan() && w.is_nan());
        assert!(
            same || abs_diff_eq!(g, w, epsilon = abs + rel * w.abs()),
            "{what}: element {i} is {g}, expected {w} (rel {rel}, abs {abs})"
        );
    }
}

/// The derivative of `f` with respect to each element of `x`, by central differences in f64.
pub fn finite_difference(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let (at, step) = (x[i], 1e-5);
            x[i] = at + step;
            let above = f(&x);
            x[i] = at - step;
            let below = f(&x);
            x[i] = at;
            (above - below) / (2.0 * step)
        })
        .collect()
}

/// A generator with a fixed seed.
pub fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// `n` values drawn evenly from [-scale, scale).
pub fn uniform(rng: &mut StdRng, n: usize, scale: f32) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-1.0..1.0) * scale).collect()
}

/// `n` mask bytes, each 1 with probability `keep`.
pub fn random_mask(rng: &mut StdRng, n: usize, keep: f64) -> Vec<u8> {
    (0..n).map(|_| u8::from(rng.random_bool(keep))).collect()
}

/// f32 values as f64.
pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

/// The dot product, for a scalar loss with the upstream gradient `g`.
pub fn dot(g: &[f64], x: &[f64]) -> f64 {
    g.iter().zip(x).map(|(a, b)| a * b).sum()
}

/// Runs `f` on a pool of that many threads.
pub fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    pool.build().unwrap().install(f)
}
