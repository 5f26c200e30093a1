//! A kernel of one's own, here a plain loop for GAE in f32, checked against the f64 reference as the
//! project's own kernels are: on random input, within the tolerance of the op.
//!
//! cargo run --release --example check_a_kernel

use ppo_kernels::gae::{reference, GaeOptions};
use ppo_kernels::tolerance::{self, Tolerance};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// The kernel: γ = 1, no mask.
fn my_gae(rewards: &[f32], values: &[f32], lambda: f32, advantages: &mut [f32]) {
    let (mut next_value, mut advantage) = (0.0, 0.0);
    for t in (0..values.len()).rev() {
        advantage = rewards[t] + next_value - values[t] + lambda * advantage;
        next_value = values[t];
        advantages[t] = advantage;
    }
}

fn main() {
    let mut rng = StdRng::seed_from_u64(7);
    let options = GaeOptions { gamma: 1.0, lambda: 0.95, ..GaeOptions::default() };
    let Tolerance { abs, rel } = tolerance::GAE.tests;
    let mut worst = 0.0f64;
    for seq_len in [1, 2, 17, 500] {
        let mut random = || (0..seq_len).map(|_| rng.random_range(-1.0..1.0)).collect::<Vec<f32>>();
        let (rewards, values) = (random(), random());
        let mut advantages = vec![0.0; seq_len];
        my_gae(&rewards, &values, options.lambda as f32, &mut advantages);

        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
        let (rewards, values) = (wide(&rewards), wide(&values));
        let inputs =
            reference::Inputs { rewards: Some(&rewards), ..reference::Inputs::new(&values) };
        let exact = reference::gae(&inputs, 1, seq_len, &options).advantages;
        for (t, (&got, &want)) in advantages.iter().zip(&exact).enumerate() {
            let share = (f64::from(got) - want).abs() / (abs + rel * want.abs());
            assert!(share <= 1.0, "token {t} of {seq_len}: {got}, expected {want}");
            worst = worst.max(share);
        }
    }
    println!("right: the worst error is {worst:.2} of what is allowed");
}
