//! Train-inference corrections: weights of tokens truncated at 2, rows rejected by their mean of k3. `fused` is
//! the function on slices, writing where there is memory, with the mask that is left and all statistics, which
//! candle's side has not.

mod common;

use candle_core::{DType, Tensor};
use common::*;
use criterion::{criterion_group, criterion_main, Criterion};
use ppo_kernels::correction::cpu::{self, Inputs, Outputs};
use ppo_kernels::correction::{CorrectionOptions, CorrectionStats, Rejection};
use ppo_kernels::tolerance;

const TOLERANCE: f32 = tolerance::CORRECTION.benches.rel as f32;

/// Half way among the rows, whose log-ratios are of different size.
const MOST: f64 = 0.002;

fn forward(criterion: &mut Criterion, pass: &str, shape: (usize, usize), of_rows: bool) {
    let ((batch, seq_len), tokens) = (shape, shape.0 * shape.1);
    // The inputs once more where a row decides, which is in a cache then.
    let walk = Walk { read: 9 * tokens, write: 5 * tokens };
    on_cpu(criterion, pass, &format!("f32_{batch}x{seq_len}"), &[walk], || {
        let old_logp = uniform(&mut rng(1), tokens, -2.0, 1.5);
        let noise = uniform(&mut rng(2), tokens, 0.0, 1.0);
        let rollout_logp: Vec<f32> = (0..tokens)
            .map(|t| old_logp[t] - noise[t] * (0.02 + 0.18 * (t / seq_len % 7) as f32 / 6.0))
            .collect();
        let (mask, _) = padding(&mut rng(3), batch, seq_len);
        let rejection = Rejection::verl("seq_mean_k3", None, MOST).unwrap();
        let most = if of_rows { MOST } else { f64::INFINITY };
        let options = match of_rows {
            true => CorrectionOptions { rejection, ..CorrectionOptions::default() },
            false => CorrectionOptions::default(),
        };
        let tensors = [old_logp.clone(), rollout_logp.clone()]
            .map(|x| tensor(x, &[batch, seq_len], DType::F32));
        let factors = Tensor::from_vec(mask.clone(), (batch, seq_len), device()).unwrap();
        let factors = factors.to_dtype(DType::F32).unwrap();
        let candle = move || {
            let [old_logp, rollout_logp] = &tensors;
            compositions::correction(old_logp, rollout_logp, &factors, most).unwrap()
        };
        let (mut kept, mut stats) = (vec![0; tokens], [CorrectionStats::none()]);
        let mut fused = move |weights: &mut [f32]| {
            let inputs = Inputs { mask: Some(&mask), ..Inputs::new(&old_logp, &rollout_logp) };
            let outputs = Outputs { kept: Some(&mut kept), ..Outputs::new(weights, &mut stats) };
            cpu::correction(inputs, batch, seq_len, &options, outputs).unwrap();
        };
        let mut out = vec![0.0; tokens];
        fused(&mut out);
        agree("weights", &out, &to_vec(&candle()), TOLERANCE);
        (move || fused(&mut out), candle)
    });
}

fn benches(criterion: &mut Criterion) {
    // Linear in B; in T it is the same number of elements in other words.
    let batches: &[usize] = if quick() { &[64, 4096] } else { &[64, 512, 4096] };
    for &batch in batches {
        forward(criterion, "correction", (batch, 2048), false);
    }
    forward(criterion, "correction_of_rows", (64, 2048), true);
    forward(criterion, "correction_of_rows", (4096, 2048), true);
}

criterion_group!(group, benches);
criterion_main!(group);
