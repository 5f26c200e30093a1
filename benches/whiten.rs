//! Masked whitening of advantages. `fused` is the function on slices, writing where there is memory;
//! that of `whiten_tensor` is the candle function, which allocates. Backward is against the backward
//! of candle's graph.

mod common;

use candle_core::{DType, Tensor, Var};
use common::*;
use criterion::{criterion_group, criterion_main, Criterion};
use ppo_kernels::moments::Moments;
use ppo_kernels::tolerance;
use ppo_kernels::whiten::cpu::{
    self, GradOutputs, Inputs, MomentsInputs, MomentsOutputs, Outputs, OwnBackwardInputs,
};
use ppo_kernels::whiten::{masked_whiten, WhitenOptions};

const TOLERANCE: f32 = tolerance::WHITEN.benches.rel as f32;

struct Data {
    x: Tensor,
    mask: Tensor,
}

fn data(batch: usize, seq_len: usize) -> Data {
    let x = uniform(&mut rng(1), batch * seq_len, 0.3, 2.0);
    let (mask, _) = padding(&mut rng(2), batch, seq_len);
    Data {
        x: tensor(x, &[batch, seq_len], DType::F32),
        mask: Tensor::from_vec(mask, (batch, seq_len), device()).unwrap(),
    }
}

fn moments(x: &[f32], mask: Option<&[u8]>) -> [Moments; 1] {
    let mut moments = [Moments::default()];
    let outputs = MomentsOutputs { moments: &mut moments };
    cpu::masked_moments(MomentsInputs { x, mask }, x.len(), outputs).unwrap();
    moments
}

/// The moments are those of all elements, so the elements are read twice.
fn walks(tokens: usize) -> [Walk; 2] {
    [Walk { read: 5 * tokens, write: 0 }, Walk { read: 5 * tokens, write: 4 * tokens }]
}

fn forward(criterion: &mut Criterion, batch: usize, seq_len: usize) {
    let (shape, tokens) = (format!("f32_{batch}x{seq_len}"), batch * seq_len);
    on_cpu(criterion, "whiten", &shape, &walks(tokens), || {
        let Data { x, mask } = data(batch, seq_len);
        let options = WhitenOptions::default();
        let factors = mask.to_dtype(DType::F32).unwrap();
        let raw = (to_vec(&x), mask.flatten_all().unwrap().to_vec1::<u8>().unwrap());
        let candle = move || compositions::masked_whiten(&x, &factors, options.eps).unwrap();
        let fused = move |y: &mut [f32]| {
            let (x, mask) = (raw.0.as_slice(), Some(raw.1.as_slice()));
            let inputs = Inputs { x, mask, moments: Some(&moments(x, mask)) };
            cpu::masked_whiten(inputs, tokens, &options, Outputs { y }).unwrap();
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
        let Data { x, mask } = data(batch, seq_len);
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
        let Data { x, mask } = data(batch, seq_len);
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
        let moments = moments(&x, Some(&mask));
        let fused = move |grad_x: &mut [f32]| {
            let (mask, moments) = (Some(mask.as_slice()), Some(moments.as_slice()));
            let inputs = OwnBackwardInputs { x: &x, mask, moments, grad_y: &upstream };
            let outputs = GradOutputs { grad_x };
            cpu::masked_whiten_backward(inputs, tokens, &options, outputs).unwrap();
        };
        let mut grad = vec![0.0; tokens];
        fused(&mut grad);
        agree("whiten gradient", &grad, &to_vec(&candle()), TOLERANCE);
        (move || fused(&mut grad), candle)
    });
}

/// A pack, whose tokens need no mask, and the same rows with padding.
fn packs(criterion: &mut Criterion) {
    let (rows, width) = (pack::ROWS, pack::WIDTH);
    let offsets = pack::offsets();
    let (tokens, mask) = (offsets[rows] as usize, pack::mask(&offsets));
    for packed in [true, false] {
        let (pass, shape) = pack::group("whiten", packed);
        on_cpu(criterion, &pass, &shape, &walks(tokens), || {
            let x =
                tensor(uniform(&mut rng(1), rows * width, 0.3, 2.0), &[rows, width], DType::F32);
            let options = WhitenOptions::default();
            let factors = mask.iter().map(|&m| f32::from(m)).collect();
            let factors = tensor(factors, &[rows, width], DType::F32);
            let (offsets, mask, padded) = (offsets.clone(), mask.clone(), to_vec(&x));
            let rows_of = |x: &[f32]| match packed {
                true => pack::pack(&offsets, x),
                false => x.to_vec(),
            };
            let candle = move || compositions::masked_whiten(&x, &factors, options.eps).unwrap();
            let (elements, theirs) = (rows_of(&padded), rows_of(&to_vec(&candle())));
            let fused = move |y: &mut [f32]| {
                let (x, mask) = (&elements[..], (!packed).then_some(&mask[..]));
                let inputs = Inputs { x, mask, moments: Some(&moments(x, mask)) };
                cpu::masked_whiten(inputs, x.len(), &options, Outputs { y }).unwrap();
            };
            let mut out = vec![0.0; theirs.len()];
            fused(&mut out);
            agree("whitened", &out, &theirs, TOLERANCE);
            (move || fused(&mut out), candle)
        });
    }
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
    packs(criterion);
}

criterion_group!(group, benches);
criterion_main!(group);
