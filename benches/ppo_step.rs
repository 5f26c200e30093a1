//! Everything between logits and their gradient for one minibatch: log-probabilities of the tokens,
//! the clipped loss with its value term, and `backward` to logits and values. `fused` is the two
//! candle functions; their statistics come with them, and candle's composition has none.
//!
//! The limit is that of separate passes: the logits read forward, read backward, and their gradient
//! written. The per-token tensors are a thousandth of that.

mod common;

use std::rc::Rc;

use candle_core::{DType, Tensor, Var};
use common::minibatch::Minibatch;
use common::*;
use criterion::{criterion_group, criterion_main, Criterion};
use ppo_kernels::logprob::{logprobs, LogprobOptions};
use ppo_kernels::tolerance;

const BATCH: usize = 8;
const SEQ_LEN: usize = 128;
const VOCAB: usize = 49152;

fn tolerance(dtype: DType) -> f32 {
    let tolerance = match dtype {
        DType::F32 => tolerance::PPO_LOSS.benches,
        _ => tolerance::BENCHES_16_BITS,
    };
    tolerance.rel as f32
}

struct Step {
    logits: Var,
    targets: Tensor,
    minibatch: Minibatch,
}

impl Step {
    fn new(dtype: DType) -> Self {
        let z = logits(BATCH * SEQ_LEN, VOCAB, 1);
        let targets = targets(&z, VOCAB, 2);
        let targets = Tensor::from_vec(targets, (BATCH, SEQ_LEN), device()).unwrap();
        let z = tensor(z, &[BATCH, SEQ_LEN, VOCAB], dtype);
        let logp = logprobs(&z, &targets, &LogprobOptions::default()).unwrap();
        let logits = Var::from_tensor(&z).unwrap();
        Self { logits, targets, minibatch: Minibatch::new(&logp) }
    }

    fn fused(&self) -> [Tensor; 2] {
        let logp = logprobs(&self.logits, &self.targets, &LogprobOptions::default()).unwrap();
        self.minibatch.gradients(&self.minibatch.fused(&logp), &self.logits)
    }

    fn candle(&self) -> candle_core::Result<[Tensor; 2]> {
        let logp = compositions::logprobs(&self.logits, &self.targets)?;
        let loss = self.minibatch.composition(&logp)?;
        Ok(self.minibatch.gradients(&loss, &self.logits))
    }
}

fn ppo_step(criterion: &mut Criterion, dtype: DType) {
    let bytes = BATCH * SEQ_LEN * VOCAB * dtype.size_in_bytes();
    let walks = [Walk { read: bytes, write: 0 }, Walk { read: bytes, write: bytes }];
    let shape = format!("{}_{BATCH}x{SEQ_LEN}x{VOCAB}", dtype.as_str());
    compare(criterion, "ppo_step", &shape, &walks, || {
        let step = Rc::new(Step::new(dtype));
        let [grad_logits, grad_values] = step.fused().map(|gradient| to_vec(&gradient));
        let fused = [grad_logits.as_slice(), &grad_values];
        step.minibatch.gradients_agree(fused, &step.candle().unwrap(), tolerance(dtype));
        let same = step.clone();
        (move || step.fused(), move || same.candle().unwrap())
    });
}

fn benches(criterion: &mut Criterion) {
    ppo_step(criterion, DType::F32);
    ppo_step(criterion, DType::BF16);
}

criterion_group!(group, benches);
criterion_main!(group);
