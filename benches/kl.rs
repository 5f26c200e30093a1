//! KL divergences. `fused` is the function on slices, writing where there is memory, and for the exact
//! KL forward, which writes next to nothing, the candle function. Backward is against the backward of
//! candle's graph.
//!
//! Sampled is the estimator K3, exp(-d) - 1 + d, of a loss. Exact reads two tensors of logits, and
//! its gradient goes to the policy's.

mod common;

use candle_core::{DType, Tensor, Var};
use common::*;
use criterion::{criterion_group, criterion_main, Criterion};
use half::bf16;
use ppo_kernels::cpu::Logit;
use ppo_kernels::kl::cpu::{
    self, FullBackwardInputs, FullBackwardOutputs, FullForwardInputs, FullForwardOutputs,
    TokenBackwardInputs, TokenBackwardOutputs, TokenForwardInputs, TokenForwardOutputs,
};
use ppo_kernels::kl::{full_kl, Divergence, FullKlOptions, KlEstimator, KlOptions, STATS};
use ppo_kernels::tolerance;

const SAMPLED: KlOptions =
    KlOptions { estimator: KlEstimator::K3, log_ratio_clamp: None, output_clamp: None };
const FULL: FullKlOptions =
    FullKlOptions { divergence: Divergence::Forward, temperature: 1.0, beta: 0.5, skew: 0.1 };

const TOLERANCE: f32 = tolerance::FULL_KL.benches.rel as f32;

/// d = logp - ref_logp is of magnitude 0.3.
fn log_probabilities(tokens: usize) -> (Tensor, Tensor) {
    let mut rng = rng(1);
    let logp = uniform(&mut rng, tokens, -3.0, 2.0);
    let d = uniform(&mut rng, tokens, 0.0, 0.6);
    let ref_logp = logp.iter().zip(d).map(|(logp, d)| logp - d).collect();
    let tensor = |values| tensor(values, &[tokens], DType::F32);
    (tensor(logp), tensor(ref_logp))
}

fn sampled_forward(criterion: &mut Criterion, batch: usize, seq_len: usize) {
    let tokens = batch * seq_len;
    let walk = Walk { read: 8 * tokens, write: 4 * tokens };
    on_cpu(criterion, "kl_sampled_forward", &format!("f32_{batch}x{seq_len}"), &[walk], || {
        let (logp, ref_logp) = log_probabilities(tokens);
        let raw = (to_vec(&logp), to_vec(&ref_logp));
        let fused = move |kl: &mut [f32]| {
            let inputs = TokenForwardInputs { logp: &raw.0, ref_logp: &raw.1, mask: None };
            cpu::token_forward(inputs, tokens, &SAMPLED, TokenForwardOutputs { kl }).unwrap();
        };
        let candle = move || compositions::token_kl(&logp, &ref_logp).unwrap();
        let mut kl = vec![0.0; tokens];
        fused(&mut kl);
        agree("token_kl", &kl, &to_vec(&candle()), TOLERANCE);
        (move || fused(&mut kl), candle)
    });
}

fn sampled_backward(criterion: &mut Criterion, batch: usize, seq_len: usize) {
    let tokens = batch * seq_len;
    let walk = Walk { read: 12 * tokens, write: 4 * tokens };
    on_cpu(criterion, "kl_sampled_backward", &format!("f32_{batch}x{seq_len}"), &[walk], || {
        let (logp, ref_logp) = log_probabilities(tokens);
        let upstream = tensor(uniform(&mut rng(2), tokens, 0.0, 1.0), &[tokens], DType::F32);
        let var = Var::from_tensor(&logp).unwrap();
        let loss = compositions::token_kl(&var, &ref_logp)
            .unwrap()
            .mul(&upstream)
            .unwrap()
            .sum_all()
            .unwrap();
        let candle = move || loss.backward().unwrap().remove(&var).unwrap();

        let [logp, ref_logp, upstream] = [logp, ref_logp, upstream].map(|t| to_vec(&t));
        let fused = move |grad: &mut [f32]| {
            let forward = TokenForwardInputs { logp: &logp, ref_logp: &ref_logp, mask: None };
            let inputs = TokenBackwardInputs { forward, grad_kl: &upstream };
            let outputs = TokenBackwardOutputs { grad_logp: Some(grad), grad_ref_logp: None };
            cpu::token_backward(inputs, tokens, &SAMPLED, outputs).unwrap();
        };
        let mut grad = vec![0.0; tokens];
        fused(&mut grad);
        agree("token_kl gradient", &grad, &to_vec(&candle()), TOLERANCE);
        (move || fused(&mut grad), candle)
    });
}

#[derive(Clone, Copy)]
struct Full {
    dtype: DType,
    rows: usize,
    vocab: usize,
}

impl Full {
    fn name(&self) -> String {
        format!("{}_{}x{}", self.dtype.as_str(), self.rows, self.vocab)
    }

    fn bytes(&self) -> usize {
        self.rows * self.vocab * self.dtype.size_in_bytes()
    }

    /// A reference that is the policy a while ago: the same logits, each moved a little.
    fn logits(&self) -> (Tensor, Tensor) {
        let (shape, z) = ([self.rows, self.vocab], logits(self.rows, self.vocab, 1));
        let moved = uniform(&mut rng(2), z.len(), 0.0, 0.3);
        let w = z.iter().zip(moved).map(|(z, m)| z + m).collect();
        (tensor(z, &shape, self.dtype), tensor(w, &shape, self.dtype))
    }
}

fn full_forward(criterion: &mut Criterion, size: Full) {
    let walk = Walk { read: 2 * size.bytes(), write: 4 * size.rows };
    compare(criterion, "kl_full_forward", &size.name(), &[walk], || {
        let (z, w) = size.logits();
        let inputs = (z.clone(), w.clone());
        let fused = move || full_kl(&z, &w, None, &FULL).unwrap();
        let candle = move || compositions::full_kl(&inputs.0, &inputs.1).unwrap();
        tensors_agree("full_kl", &fused(), &candle(), TOLERANCE);
        (fused, candle)
    });
}

/// The divergences that look at the rows twice, forward and backward.
fn divergences(criterion: &mut Criterion, size: Full) {
    type Composition = fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>;
    let all: [(_, _, Composition); 2] = [
        ("kl_jsd", Divergence::Jsd, compositions::jsd),
        ("kl_total_variation", Divergence::TotalVariation, compositions::total_variation),
    ];
    for (name, divergence, composition) in all {
        let walks = [
            Walk { read: 2 * size.bytes(), write: 4 * size.rows },
            Walk { read: 2 * size.bytes(), write: size.bytes() },
        ];
        compare(criterion, name, &size.name(), &walks, || {
            let (z, w) = size.logits();
            let options = FullKlOptions { divergence, ..FULL };
            let [of_fused, of_candle] = [(); 2].map(|()| Var::from_tensor(&z).unwrap());
            let theirs = w.clone();
            let fused = move || {
                let sum = full_kl(&of_fused, &w, None, &options).unwrap().sum_all().unwrap();
                sum.backward().unwrap().remove(&of_fused).unwrap()
            };
            let candle = move || {
                let values = composition(&of_candle, &theirs).unwrap();
                values.sum_all().unwrap().backward().unwrap().remove(&of_candle).unwrap()
            };
            tensors_agree("gradient", &fused(), &candle(), TOLERANCE);
            (fused, candle)
        });
    }
}

fn full_backward<T: Logit + candle_core::WithDType>(criterion: &mut Criterion, size: Full) {
    let walk = Walk { read: 2 * size.bytes(), write: size.bytes() };
    on_cpu(criterion, "kl_full_backward", &size.name(), &[walk], || {
        let (z, w) = size.logits();
        let upstream = uniform(&mut rng(3), size.rows, 0.0, 1.0);
        let var = Var::from_tensor(&z).unwrap();
        let kl = compositions::full_kl(&var, &w).unwrap();
        let weights = Tensor::new(upstream.as_slice(), device()).unwrap();
        let loss = kl.mul(&weights).unwrap().sum_all().unwrap();
        let candle = move || loss.backward().unwrap().remove(&var).unwrap();

        let [z, w]: [Vec<T>; 2] = [z, w].map(|t| t.flatten_all().unwrap().to_vec1().unwrap());
        let Full { rows, vocab, .. } = size;
        let mut stats = vec![0.0; STATS * rows];
        let inputs = FullForwardInputs { logits: &z, ref_logits: &w, mask: None };
        let outputs = FullForwardOutputs { stats: &mut stats };
        cpu::full_forward(inputs, rows, vocab, &FULL, outputs).unwrap();
        let fused = move |grad: &mut [T]| {
            let forward = FullForwardInputs { logits: &z, ref_logits: &w, mask: None };
            let inputs = FullBackwardInputs { forward, stats: &stats, grad_kl: &upstream };
            let outputs = FullBackwardOutputs { grad_logits: Some(grad), grad_ref_logits: None };
            cpu::full_backward(inputs, rows, vocab, &FULL, outputs).unwrap();
        };
        let mut grad = vec![T::ZERO; size.rows * size.vocab];
        fused(&mut grad);
        let ours: Vec<f32> = grad.iter().map(|g| g.to_f32()).collect();
        let tolerance = if size.dtype == DType::F32 {
            TOLERANCE
        } else {
            tolerance::BENCHES_16_BITS.rel as f32
        };
        agree("full_kl gradient", &ours, &to_vec(&candle()), tolerance);
        (move || fused(&mut grad), candle)
    });
}

fn benches(criterion: &mut Criterion) {
    // Linear in B; in T it is the same number of tokens in other words.
    let batches: &[usize] = if quick() { &[64, 4096] } else { &[64, 512, 4096] };
    for &batch in batches {
        sampled_forward(criterion, batch, 2048);
    }
    for &batch in batches {
        sampled_backward(criterion, batch, 2048);
    }

    let size = |dtype, rows, vocab| Full { dtype, rows, vocab };
    // Linear in N, and in V.
    let f32 = [(512, 49152), (128, 49152), (256, 49152), (512, 12288), (512, 24576)]
        .map(|(rows, vocab)| size(DType::F32, rows, vocab));
    let f32 = if quick() { &f32[..1] } else { &f32 };
    for size in f32 {
        full_forward(criterion, *size);
    }
    full_forward(criterion, size(DType::BF16, 512, 49152));
    for size in f32 {
        full_backward::<f32>(criterion, *size);
    }
    full_backward::<bf16>(criterion, size(DType::BF16, 512, 49152));
    divergences(criterion, size(DType::F32, if quick() { 64 } else { 512 }, 49152));
}

criterion_group!(group, benches);
criterion_main!(group);
