//! Masked whitening of advantages. `fused` is the function on slices, writing where there is memory;
//! that of `whiten_tensor` is the candle function, which allocates. Backward is against the backward
//! of candle's graph.

mod common;

use candle_core::{DType, Tensor, Var};
use common::*;
use criterion::{criterion_group, criterion_main, Criterion};
use ppo_kernels::whiten::{cpu, masked_whiten, WhitenOptions};

/// Sums of up to eight million numbers in f32, candle's one after the other.
const TOLERANCE: f32 = 1e-3;

struct Inputs {
    x: Tensor,
    mask: Tensor,
}

fn inputs(batch: usize, seq_len: usize) -> Inputs {
    let x = uniform(&mut rng(1), batch * seq_len, 0.3, 2.0);
    let (mask, _) = padding(&mut rng(2), batch, seq_len);
    Inputs {
        x: tensor(x, &[batch, seq_len], DType::F32),
        mask: Tensor::from_vec(mask, (batch, seq_len), device()).unwrap(),
    }
}

/// The moments are those of all elements, so the elements are read twice.
fn walks(tokens: usize) -> [Walk; 2] {
    [Walk { read: 5 * tokens, write: 0 }, Walk { read: 5 * tokens, write: 4 * tokens }]
}

fn forward(criterion: &mut Criterion, batch: usize, seq_len: usize) {
    let (shape, tokens) = (format!("f32_{batch}x{seq_len}"), batch * seq_len);
    on_cpu(criterion, "whiten", &shape, &walks(tokens), || {
        let Inputs { x, mask } = inputs(batch, seq_len);
        let options = WhitenOptions::default();
        let factors = mask.to_dtype(DType::F32).unwrap();
        let raw = (to_vec(&x), mask.flatten_all().unwrap().to_vec1::<u8>().unwrap());
        let candle = move || compositions::masked_whiten(&x, &factors, options.eps).unwrap();
        let fused = move |out: &mut [f32]| {
            let (x, mask) = (&raw.0, Some(raw.1.as_slice()));
            let moments = cpu::masked_moments(x, mask).unwrap();
            cpu::masked_whiten(x, mask, &moments, &options, out).unwrap();
        };
        let mut out = vec![0.0; tokens];
        fused(&mut out);
        agree("whitened", &out, &to_vec(&candle()), TOLERANCE);
        (move || fused(&mut out), candle)
    });
}

fn tensors(criterion: &mut Criterion, batch: usize, seq_len: usize) {
    let (shape, tokens) = (format!("f32_{batch}x{seq_len}"), batch * seq_len);
    compare(criterion, "whiten_tensor", &shape, &walks(tokens), || {
        let Inputs { x, mask } = inputs(batch, seq_len);
        let options = WhitenOptions::default();
        let theirs = (x.clone(), mask.to_dtype(DType::F32).unwrap());
        let candle =
            move || compositions::masked_whiten(&theirs.0, &theirs.1, options.eps).unwrap();
        let fused = move || masked_whiten(&x, Some(&mask), &options).unwrap();
        tensors_agree("whitened", &fused(), &candle(), TOLERANCE);
        (fused, candle)
    });
}

fn backward(criterion: &mut Criterion, batch: usize, seq_len: usize) {
    let tokens = batch * seq_len;
    // x, mask and the upstream gradient, for their sums and then for the gradient.
    let walks = [Walk { read: 9 * tokens, write: 0 }, Walk { read: 9 * tokens, write: 4 * tokens }];
    on_cpu(criterion, "whiten_backward", &format!("f32_{batch}x{seq_len}"), &walks, || {
        let Inputs { x, mask } = inputs(batch, seq_len);
        let options = WhitenOptions::default();
        let upstream = uniform(&mut rng(3), tokens, 0.1, 1.0);
        let var = Var::from_tensor(&x).unwrap();
        let y = compositions::masked_whiten(&var, &mask.to_dtype(DType::F32).unwrap(), options.eps)
            .unwrap();
        let weights = tensor(upstream.clone(), &[batch, seq_len], DType::F32);
        let loss = y.mul(&weights).unwrap().sum_all().unwrap();
        let candle = move || loss.backward().unwrap().remove(&var).unwrap();

        let x = to_vec(&x);
        let mask: Vec<u8> = mask.flatten_all().unwrap().to_vec1().unwrap();
        let moments = cpu::masked_moments(&x, Some(&mask)).unwrap();
        let fused = move |grad: &mut [f32]| {
            let mask = Some(mask.as_slice());
            cpu::masked_whiten_backward(&x, mask, &moments, &upstream, &options, grad).unwrap();
        };
        let mut grad = vec![0.0; tokens];
        fused(&mut grad);
        agree("whiten gradient", &grad, &to_vec(&candle()), TOLERANCE);
        (move || fused(&mut grad), candle)
    });
}

fn benches(criterion: &mut Criterion) {
    // Linear in B; in T it is the same number of elements in other words.
    let batches: &[usize] = if quick() { &[64, 4096] } else { &[64, 512, 4096] };
    for &batch in batches {
        forward(criterion, batch, 2048);
    }
    for &batch in batches {
        backward(criterion, batch, 2048);
    }
    tensors(criterion, 64, 2048);
    tensors(criterion, 4096, 2048);
}

criterion_group!(group, benches);
criterion_main!(group);
