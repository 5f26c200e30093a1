//! The arrays on which every backend of the whiten op is tested, and how its results are compared.

use ppo_kernels::moments::Moments;
use ppo_kernels::tolerance;
use ppo_kernels::whiten::{EpsPlacement, WhitenOptions};
use rand::rngs::StdRng;

use super::{assert_close, random_mask, uniform};

pub const REL: f64 = tolerance::WHITEN.tests.rel;
pub const ABS: f64 = tolerance::WHITEN.tests.abs;

pub fn all_options() -> Vec<WhitenOptions> {
    let mut all = Vec::new();
    for eps_placement in [EpsPlacement::Variance, EpsPlacement::Std] {
        for unbiased in [true, false] {
            for shift_mean in [true, false] {
                for eps in [1e-8, 0.1] {
                    all.push(WhitenOptions { eps, eps_placement, unbiased, shift_mean });
                }
            }
        }
    }
    all
}

#[track_caller]
pub fn check_moments(what: &str, got: Moments, want: Moments, rel: f64) {
    assert_eq!(got.count, want.count, "{what}");
    assert_close(&format!("{what} mean"), &[got.mean], &[want.mean], rel, 1e-14);
    assert_close(&format!("{what} m2"), &[got.m2], &[want.m2], rel, 1e-14);
}

/// Numbers, a mask and an upstream gradient; what is masked is NaN.
pub struct Sample {
    pub x: Vec<f32>,
    pub up: Vec<f32>,
    pub mask: Option<Vec<u8>>,
}

impl Sample {
    pub fn new(rng: &mut StdRng, n: usize, masked: bool) -> Self {
        let (mut x, mut up) = (uniform(rng, n, 3.0), uniform(rng, n, 1.0));
        if !masked {
            return Self { x, up, mask: None };
        }
        let mut mask = random_mask(rng, n, 0.7);
        mask[..n.min(2)].fill(1);
        for i in (0..n).filter(|&i| mask[i] == 0) {
            (x[i], up[i]) = (f32::NAN, f32::NAN);
        }
        Self { x, up, mask: Some(mask) }
    }
}

/// A tiny spread around a large mean: steps of 1/64 around 2^17, exact in f32.
pub fn far_from_zero(rng: &mut StdRng, n: usize) -> Vec<f32> {
    uniform(rng, n, 8.0).into_iter().map(|v| 131_072.0 + v.round() / 64.0).collect()
}
