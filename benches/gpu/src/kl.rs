//! The kl op.

use half::{bf16, f16};
use ppo_kernels::cpu::Logit;
use ppo_kernels::kl::cuda::{
    self, FullBackwardInputs, FullBackwardOutputs, FullForwardInputs, FullForwardOutputs,
    TokenBackwardInputs, TokenBackwardOutputs, TokenForwardInputs, TokenForwardOutputs,
};
use ppo_kernels::kl::{FullKlOptions, KlEstimator, KlOptions, STATS};

use crate::gpu::Buffer;
use crate::inputs::{logits, tokens};
use crate::logprob::SHAPES;
use crate::table::{Pass, Shape, Table};

pub fn time(table: &Table) {
    time_dtype::<bf16>(table);
    time_dtype::<f16>(table);
    time_dtype::<f32>(table);
    time_sampled(table, 8192, 2048);
}

fn time_dtype<T: Logit>(table: &Table) {
    for (rows, vocab) in SHAPES {
        time_full::<T>(table, rows, vocab);
    }
}

/// Logits, and all outputs of both passes.
struct Full<T> {
    policy: Buffer<T>,
    reference: Buffer<T>,
    stats: Buffer<f32>,
    grad: Buffer<T>,
}

fn time_full<T: Logit>(table: &Table, rows: usize, vocab: usize) {
    if !table.wants(&[Pass::FullKlForward, Pass::FullKlBackward], T::NAME) {
        return;
    }
    let stream = table.stream();
    let options = FullKlOptions::default();
    let up = Buffer::new(&vec![1.0_f32; rows], 0);
    let inputs = |set: &Full<T>| FullForwardInputs {
        logits: set.policy.slice(),
        ref_logits: set.reference.slice(),
        mask: None,
    };
    let forward = |set: &mut Full<T>| {
        let inputs = inputs(set);
        let outputs = FullForwardOutputs { stats: set.stats.slice_mut() };
        cuda::full_forward(&stream, inputs, rows, vocab, &options, outputs).unwrap();
    };

    let shape = Shape { dtype: T::NAME, rows, columns: vocab };
    let bytes = rows * vocab * size_of::<T>();
    let sets = &mut table.sets(2 * bytes, || {
        let mut set = Full {
            policy: logits(0, rows * vocab),
            reference: logits(1, rows * vocab),
            stats: Buffer::uninit(STATS * rows, 0),
            grad: Buffer::uninit(rows * vocab, 0),
        };
        // What the backward pass reads.
        forward(&mut set);
        set
    });
    table.row(Pass::FullKlForward, shape, 2 * bytes, sets, forward);
    table.row(Pass::FullKlBackward, shape, 3 * bytes, sets, |set| {
        let (forward, stats, grad_kl) = (inputs(set), set.stats.slice(), up.slice());
        let inputs = FullBackwardInputs { forward, stats, grad_kl };
        let grad_logits = Some(set.grad.slice_mut());
        let outputs = FullBackwardOutputs { grad_logits, grad_ref_logits: None };
        cuda::full_backward(&stream, inputs, rows, vocab, &options, outputs).unwrap();
    });
}

/// Log-probabilities, the upstream gradient, and an output.
struct Sampled {
    logp: Buffer<f32>,
    ref_logp: Buffer<f32>,
    up: Buffer<f32>,
    out: Buffer<f32>,
}

fn time_sampled(table: &Table, batch: usize, seq_len: usize) {
    if !table.wants(&[Pass::TokenKlForward, Pass::TokenKlBackward], "f32") {
        return;
    }
    let stream = table.stream();
    let count = batch * seq_len;
    let options = KlOptions { estimator: KlEstimator::K3, ..Default::default() };
    let inputs = |set: &Sampled| TokenForwardInputs {
        logp: set.logp.slice(),
        ref_logp: set.ref_logp.slice(),
        mask: None,
    };
    let shape = Shape { dtype: "f32", rows: batch, columns: seq_len };
    let sets = &mut table.sets(12 * count, || Sampled {
        logp: tokens(0, count),
        ref_logp: tokens(1, count),
        up: tokens(2, count),
        out: Buffer::uninit(count, 0),
    });
    table.row(Pass::TokenKlForward, shape, 12 * count, sets, |set| {
        let (inputs, outputs) = (inputs(set), TokenForwardOutputs { kl: set.out.slice_mut() });
        cuda::token_forward(&stream, inputs, count, &options, outputs).unwrap();
    });
    table.row(Pass::TokenKlBackward, shape, 16 * count, sets, |set| {
        let inputs = TokenBackwardInputs { forward: inputs(set), grad_kl: set.up.slice() };
        let grad_logp = Some(set.out.slice_mut());
        let outputs = TokenBackwardOutputs { grad_logp, grad_ref_logp: None };
        cuda::token_backward(&stream, inputs, count, &options, outputs).unwrap();
    });
}
