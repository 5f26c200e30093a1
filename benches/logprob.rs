//! Log-probabilities of sampled tokens. `fused` is the candle function forward and through autograd;
//! for the pure backward it is the function on slices, writing where there is memory, against the
//! backward of candle's graph.

mod common;

use candle_core::{DType, Tensor, Var};
use common::*;
use criterion::{criterion_group, criterion_main, Criterion};
use half::{bf16, f16};
use ppo_kernels::cpu::Logit;
use ppo_kernels::logprob::cpu::{
    self, BackwardInputs, BackwardOutputs, ForwardInputs, ForwardOutputs,
};
use ppo_kernels::logprob::{logprobs, LogprobOptions};
use ppo_kernels::tolerance;

const OPTIONS: LogprobOptions = LogprobOptions { temperature: 1.0, ignore_index: None };

fn tolerance(dtype: DType) -> f32 {
    let tolerance = match dtype {
        DType::F32 => tolerance::LOGPROB.benches,
        _ => tolerance::BENCHES_16_BITS,
    };
    tolerance.rel as f32
}

#[derive(Clone, Copy)]
struct Size {
    dtype: DType,
    rows: usize,
    vocab: usize,
}

impl Size {
    fn name(&self) -> String {
        format!("{}_{}x{}", self.dtype.as_str(), self.rows, self.vocab)
    }

    fn bytes(&self) -> usize {
        self.rows * self.vocab * self.dtype.size_in_bytes()
    }

    /// One read of the logits and the targets, and one value a row.
    fn forward(&self) -> Walk {
        Walk { read: self.bytes() + 8 * self.rows, write: 4 * self.rows }
    }

    /// One read of the logits, one write of their gradient.
    fn backward(&self) -> Walk {
        Walk { read: self.bytes() + 8 * self.rows, write: self.bytes() }
    }

    fn inputs(&self) -> Inputs {
        let logits = logits(self.rows, self.vocab, 1);
        let targets = targets(&logits, self.vocab, 2);
        let upstream = uniform(&mut rng(3), self.rows, 0.0, 1.0);
        Inputs {
            targets: Tensor::new(targets.as_slice(), device()).unwrap(),
            logits: tensor(logits, &[self.rows, self.vocab], self.dtype),
            upstream: tensor(upstream, &[self.rows], DType::F32),
        }
    }
}

struct Inputs {
    logits: Tensor,
    targets: Tensor,
    upstream: Tensor,
}

fn forward(criterion: &mut Criterion, size: Size) {
    compare(criterion, "logprob_forward", &size.name(), &[size.forward()], || {
        let Inputs { logits, targets, .. } = size.inputs();
        let inputs = (logits.clone(), targets.clone());
        let fused = move || logprobs(&logits, &targets, &OPTIONS).unwrap();
        let candle = move || compositions::logprobs(&inputs.0, &inputs.1).unwrap();
        tensors_agree("logprob", &fused(), &candle(), tolerance(DType::F32));
        (fused, candle)
    });
}

fn backward<T: Logit + candle_core::WithDType>(criterion: &mut Criterion, size: Size) {
    on_cpu(criterion, "logprob_backward", &size.name(), &[size.backward()], || {
        let Size { rows, vocab, .. } = size;
        let Inputs { logits, targets, upstream } = size.inputs();
        let var = Var::from_tensor(&logits).unwrap();
        let loss = compositions::logprobs(&var, &targets).unwrap().mul(&upstream).unwrap();
        let loss = loss.sum_all().unwrap();
        let candle = move || loss.backward().unwrap().remove(&var).unwrap();

        let logits: Vec<T> = logits.flatten_all().unwrap().to_vec1().unwrap();
        let targets: Vec<i64> = targets.to_vec1().unwrap();
        let upstream: Vec<f32> = upstream.to_vec1().unwrap();
        let [mut logp, mut max, mut log_sum] = [(); 3].map(|()| vec![0.0; rows]);
        let outputs = ForwardOutputs {
            logp: &mut logp,
            entropy: None,
            max: Some(&mut max),
            log_sum: Some(&mut log_sum),
        };
        let inputs = ForwardInputs { logits: &logits, targets: &targets };
        cpu::forward(inputs, rows, vocab, &OPTIONS, outputs).unwrap();
        let fused = move |grad_logits: &mut [T]| {
            let inputs = BackwardInputs {
                forward: ForwardInputs { logits: &logits, targets: &targets },
                max: &max,
                log_sum: &log_sum,
                entropy: None,
                grad_logp: Some(&upstream),
                grad_entropy: None,
            };
            let outputs = BackwardOutputs { grad_logits };
            cpu::backward(inputs, rows, vocab, &OPTIONS, outputs).unwrap();
        };

        let mut grad = vec![T::ZERO; rows * vocab];
        fused(&mut grad);
        let ours: Vec<f32> = grad.iter().map(|g| g.to_f32()).collect();
        agree("logprob gradient", &ours, &to_vec(&candle()), tolerance(size.dtype));
        (move || fused(&mut grad), candle)
    });
}

/// Both through autograd: the logits are read in both passes.
fn forward_backward(criterion: &mut Criterion, size: Size) {
    let walks = [size.forward(), size.backward()];
    compare(criterion, "logprob_forward_backward", &size.name(), &walks, || {
        let Inputs { logits, targets, upstream } = size.inputs();
        let var = Var::from_tensor(&logits).unwrap();
        let gradient = |logp: Tensor, var: &Var, upstream: &Tensor| {
            let loss = logp.mul(upstream).unwrap().sum_all().unwrap();
            loss.backward().unwrap().remove(var).unwrap()
        };
        let inputs = (var.clone(), targets.clone(), upstream.clone());
        let fused = move || gradient(logprobs(&var, &targets, &OPTIONS).unwrap(), &var, &upstream);
        let candle = move || {
            gradient(compositions::logprobs(&inputs.0, &inputs.1).unwrap(), &inputs.0, &inputs.2)
        };
        tensors_agree("logprob gradient", &fused(), &candle(), tolerance(size.dtype));
        (fused, candle)
    });
}

fn benches(criterion: &mut Criterion) {
    let size = |dtype, rows, vocab| Size { dtype, rows, vocab };
    let main = size(DType::F32, 512, 49152);
    // Linear in N, and in V; a size of its own for what is no multiple of anything.
    let larger = [(256, 49152), (1024, 49152), (512, 24576), (512, 98304), (512, 50257)]
        .map(|(rows, vocab)| size(DType::F32, rows, vocab));
    let larger = if quick() { &larger[..0] } else { &larger };
    let tiny = size(DType::F32, 4, 32);

    for size in [tiny, main].iter().chain(larger) {
        forward(criterion, *size);
    }
    forward(criterion, size(DType::F16, 512, 49152));
    forward(criterion, size(DType::BF16, 512, 49152));

    for size in [tiny, main].iter().chain(larger) {
        backward::<f32>(criterion, *size);
    }
    backward::<f16>(criterion, size(DType::F16, 512, 49152));
    backward::<bf16>(criterion, size(DType::BF16, 512, 49152));

    forward_backward(criterion, tiny);
    forward_backward(criterion, main);
    forward_backward(criterion, size(DType::BF16, 512, 49152));
}

criterion_group!(group, benches);
criterion_main!(group);
