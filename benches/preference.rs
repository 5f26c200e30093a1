//! DPO from log-probabilities of tokens with a mask, and of whole responses, and the gradient. `fused` of
//! `preference_forward_backward` is the function on slices, which makes loss, gradient, rewards and statistics;
//! that of `preference_autograd` is the candle function and `backward`, which allocate. candle's composition
//! is the same in both: forward, then `backward`, without rewards and statistics.

mod common;

use candle_core::{DType, Result, Tensor, Var};
use common::*;
use criterion::{criterion_group, criterion_main, Criterion};
use ppo_kernels::preference::cpu::{self, Inputs, Outputs};
use ppo_kernels::preference::{
    preference_loss, PreferenceInputs, PreferenceOptions, PreferenceStats,
};
use ppo_kernels::tolerance;

const TOLERANCE: f32 = tolerance::PREFERENCE.benches.rel as f32;

/// Chosen and rejected responses, and what the reference model says of each.
struct Pairs {
    logp: Var,
    ref_sums: Tensor,
    mask: Tensor,
}

impl Pairs {
    fn new(rows: usize, seq_len: usize) -> Self {
        let logp = uniform(&mut rng(1), rows * seq_len, -3.0, 0.0);
        let (mask, _) = padding(&mut rng(2), rows, seq_len);
        let kept = logp.chunks(seq_len).zip(mask.chunks(seq_len));
        let sum = |(x, m): (&[f32], &[u8])| x.iter().zip(m).map(|(x, &m)| x * f32::from(m)).sum();
        let ref_sums: Vec<f32> = kept.map(sum).collect();
        let noise = uniform(&mut rng(3), rows, -5.0, 5.0);
        let ref_sums: Vec<f32> = ref_sums.iter().zip(noise).map(|(sum, e)| sum + e).collect();
        Self {
            logp: Var::from_tensor(&tensor(logp, &[rows, seq_len], DType::F32)).unwrap(),
            ref_sums: tensor(ref_sums, &[rows], DType::F32),
            mask: Tensor::from_vec(mask, (rows, seq_len), device()).unwrap(),
        }
    }

    /// The gradient of DPO as candle's ops make it.
    fn composition(&self) -> Result<Tensor> {
        let pairs = self.logp.dims()[0] / 2;
        let sums = self.logp.mul(&self.mask.to_dtype(DType::F32)?)?.sum(1)?;
        let ratios = (sums - &self.ref_sums)?;
        let h = ((ratios.narrow(0, 0, pairs)? - ratios.narrow(0, pairs, pairs)?)? * 0.1)?;
        let loss = (h.neg()?.exp()? + 1.0)?.log()?.mean_all()?;
        Ok(loss.backward()?.get(&self.logp).expect("a gradient").clone())
    }

    fn fused(&self) -> Tensor {
        let inputs = PreferenceInputs {
            ref_sums: Some(&self.ref_sums),
            mask: Some(&self.mask),
            ..PreferenceInputs::new(&self.logp)
        };
        let output = preference_loss(&inputs, &PreferenceOptions::default()).unwrap();
        output.loss.backward().unwrap().get(&self.logp).expect("a gradient").clone()
    }
}

/// Logp and mask in, the gradient out; the mask once more.
fn walk(rows: usize, seq_len: usize) -> Walk {
    Walk { read: rows * (6 * seq_len + 4), write: 4 * rows * seq_len }
}

fn forward_backward(criterion: &mut Criterion, rows: usize, seq_len: usize) {
    let shape = format!("f32_{rows}x{seq_len}");
    on_cpu(criterion, "preference_forward_backward", &shape, &[walk(rows, seq_len)], || {
        let pairs = Pairs::new(rows, seq_len);
        let (logp, ref_sums) = (to_vec(&pairs.logp), to_vec(&pairs.ref_sums));
        let mask: Vec<u8> = pairs.mask.flatten_all().unwrap().to_vec1().unwrap();
        let fused = move |rewards: &mut [f32], grad: &mut [f32]| {
            let inputs =
                Inputs { ref_sums: Some(&ref_sums), mask: Some(&mask), ..Inputs::new(&logp) };
            let mut stats = [PreferenceStats::from_array([0.0; PreferenceStats::LEN])];
            let outputs = Outputs {
                rewards: Some(rewards),
                grad_logp: Some(grad),
                ..Outputs::new(&mut stats)
            };
            let options = PreferenceOptions::default();
            cpu::preference_loss(inputs, rows, seq_len, &options, outputs).unwrap();
            stats
        };

        let (mut rewards, mut grad) = (vec![0.0; rows], vec![0.0; rows * seq_len]);
        fused(&mut rewards, &mut grad);
        agree("preference", &grad, &to_vec(&pairs.composition().unwrap()), TOLERANCE);
        (move || fused(&mut rewards, &mut grad), move || pairs.composition().unwrap())
    });
}

fn autograd(criterion: &mut Criterion, rows: usize, seq_len: usize) {
    let shape = format!("f32_{rows}x{seq_len}");
    compare(criterion, "preference_autograd", &shape, &[walk(rows, seq_len)], || {
        let [ours, theirs] = [(); 2].map(|()| Pairs::new(rows, seq_len));
        tensors_agree("preference", &ours.fused(), &theirs.composition().unwrap(), TOLERANCE);
        (move || ours.fused(), move || theirs.composition().unwrap())
    });
}

fn benches(criterion: &mut Criterion) {
    forward_backward(criterion, 8192, 512);
    forward_backward(criterion, 4096, 1);
    if !quick() {
        // Linear in rows and in T.
        forward_backward(criterion, 1024, 512);
        forward_backward(criterion, 1024, 4096);
    }
    autograd(criterion, 8192, 512);
    autograd(criterion, 4096, 1);
}

criterion_group!(group, benches);
criterion_main!(group);
