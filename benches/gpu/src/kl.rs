//! The kl op.

use half::{bf16, f16};
use ppo_kernels::cpu::Logit;
use ppo_kernels::kl::cuda::{
    self, FullBackwardInputs, FullBackwardOutputs, FullForwardInputs, FullForwardOutputs,
    TokenBackwardInputs, TokenBackwardOutputs, TokenForwardInputs, TokenForwardOutputs,
};
use ppo_kernels::kl::{FullKlOptions, KlEstimator, KlOptions, STATS};

use crate::gpu::Buffer;
use crate::inputs::{logits, tiled, tokens};
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

fn time_full<T: Logit>(table: &Table, rows: usize, vocab: usize) {
    let stream = table.stream();
    let options = FullKlOptions::default();
    let policy = tiled(&logits::<T>(1 << 24), rows * vocab);
    let reference = tiled(&logits::<T>((1 << 24) - 1), rows * vocab);
    let mut stats = Buffer::<f32>::uninit(STATS * rows, 0);
    let workspace_len = cuda::full_workspace_len::<T>(stream.device(), rows, vocab);
    let mut workspace = Buffer::<f32>::uninit(workspace_len, 0);
    let up = Buffer::new(&vec![1.0_f32; rows], 0);
    let mut grad = Buffer::<T>::uninit(rows * vocab, 0);

    let (logits, ref_logits) = (policy.slice(), reference.slice());
    let forward = FullForwardInputs { logits, ref_logits, mask: None };
    let shape = Shape { dtype: T::NAME, rows, columns: vocab };
    let bytes = rows * vocab * size_of::<T>();
    table.row(Pass::FullKlForward, shape, 2 * bytes, || {
        let outputs = FullForwardOutputs { stats: stats.slice_mut() };
        let workspace = workspace.slice_mut();
        cuda::full_forward(&stream, forward, rows, vocab, &options, outputs, workspace).unwrap();
    });
    table.row(Pass::FullKlBackward, shape, 3 * bytes, || {
        let inputs = FullBackwardInputs { forward, stats: stats.slice(), grad_kl: up.slice() };
        let outputs =
            FullBackwardOutputs { grad_logits: Some(grad.slice_mut()), grad_ref_logits: None };
        cuda::full_backward(&stream, inputs, rows, vocab, &options, outputs).unwrap();
    });
}

fn time_sampled(table: &Table, batch: usize, seq_len: usize) {
    let stream = table.stream();
    let count = batch * seq_len;
    let options = KlOptions { estimator: KlEstimator::K3, ..Default::default() };
    let (logp, ref_logp) = (tokens(count), tokens(count));
    let up = tokens(count);
    let [mut kl, mut grad] = [(); 2].map(|()| Buffer::<f32>::uninit(count, 0));
    let (logp, ref_logp) = (logp.slice(), ref_logp.slice());
    let forward = TokenForwardInputs { logp, ref_logp, mask: None };
    let shape = Shape { dtype: "f32", rows: batch, columns: seq_len };
    table.row(Pass::TokenKlForward, shape, 12 * count, || {
        let outputs = TokenForwardOutputs { kl: kl.slice_mut() };
        cuda::token_forward(&stream, forward, count, &options, outputs).unwrap();
    });
    table.row(Pass::TokenKlBackward, shape, 16 * count, || {
        let inputs = TokenBackwardInputs { forward, grad_kl: up.slice() };
        let outputs =
            TokenBackwardOutputs { grad_logp: Some(grad.slice_mut()), grad_ref_logp: None };
        cuda::token_backward(&stream, inputs, count, &options, outputs).unwrap();
    });
}
