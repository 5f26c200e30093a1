//! Log-probabilities from hidden states, forward and backward, beside the product with the head's weight
//! and candle's own ops on the logits. `products` are the four bare products, which are the least there
//! is to do.

mod common;

use candle_core::{DType, Tensor, Var};
use common::*;
use criterion::{criterion_group, criterion_main, Criterion};
use ppo_kernels::linear::{linear_logprobs, LinearInputs, LinearOptions};
use ppo_kernels::tolerance;

#[derive(Clone, Copy)]
struct Size {
    rows: usize,
    hidden_size: usize,
    vocab: usize,
}

impl Size {
    fn name(&self) -> String {
        format!("f32_{}x{}x{}", self.rows, self.hidden_size, self.vocab)
    }

    /// Hidden states and weight twice, their gradients once.
    fn walk(&self) -> Walk {
        let bytes = 4 * self.hidden_size * (self.rows + self.vocab);
        Walk { read: 2 * bytes, write: bytes }
    }
}

fn forward_backward(criterion: &mut Criterion, size: Size) {
    compare(criterion, "linear_logprobs", &size.name(), &[size.walk()], || {
        let Size { rows, hidden_size, vocab } = size;
        let scale = (hidden_size as f32).powf(-0.5);
        let hidden = tensor(
            uniform(&mut rng(1), rows * hidden_size, -1.0, 1.0),
            &[rows, hidden_size],
            DType::F32,
        );
        let weight = uniform(&mut rng(2), vocab * hidden_size, -scale, scale);
        let weight = tensor(weight, &[vocab, hidden_size], DType::F32);
        let targets: Vec<i64> = (0..rows).map(|row| (row * 7919 % vocab) as i64).collect();
        let targets = Tensor::new(targets.as_slice(), device()).unwrap();
        let [hidden, weight] = [hidden, weight].map(|x| Var::from_tensor(&x).unwrap());
        let gradient = |logp: Tensor, weight: &Var| {
            logp.sum_all().unwrap().backward().unwrap().remove(weight).unwrap()
        };
        let (h, w, t) = (hidden.clone(), weight.clone(), targets.clone());
        let fused = move || {
            let options = LinearOptions::default();
            let inputs = LinearInputs::new(&h, &w, &t);
            gradient(linear_logprobs(&inputs, &options, false).unwrap().logp, &w)
        };
        let candle = move || {
            let logits = hidden.matmul(&weight.t().unwrap()).unwrap();
            gradient(compositions::logprobs(&logits, &targets).unwrap(), &weight)
        };
        tensors_agree("gradient", &fused(), &candle(), tolerance::LINEAR.benches.rel as f32);
        (fused, candle)
    });
}

fn products(criterion: &mut Criterion, size: Size) {
    let Size { rows, hidden_size, vocab } = size;
    let matrix = |rows, columns| {
        tensor(uniform(&mut rng(3), rows * columns, -1.0, 1.0), &[rows, columns], DType::F32)
    };
    let (h, w) = (matrix(rows, hidden_size), matrix(vocab, hidden_size));
    criterion.bench_function(&format!("linear_logprobs/{}/products", size.name()), |bencher| {
        bencher.iter(|| {
            let logits = h.matmul(&w.t().unwrap()).unwrap();
            drop(logits);
            let logits = h.matmul(&w.t().unwrap()).unwrap();
            let grad_hidden = logits.matmul(&w).unwrap();
            (grad_hidden, logits.t().unwrap().matmul(&h).unwrap())
        });
    });
}

fn benches(criterion: &mut Criterion) {
    let size = |rows, hidden_size, vocab| Size { rows, hidden_size, vocab };
    let sizes = [size(4, 32, 100), size(512, 576, 49152)];
    for size in sizes.iter().take(if quick() { 1 } else { 2 }) {
        forward_backward(criterion, *size);
        products(criterion, *size);
    }
}

criterion_group!(group, benches);
criterion_main!(group);
