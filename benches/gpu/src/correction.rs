//! The correction op: weights of tokens, with and without rows that are rejected as a whole.

use ppo_kernels::correction::cuda::{self, Inputs, Outputs};
use ppo_kernels::correction::{CorrectionOptions, CorrectionStats, Rejection};

use crate::gpu::Buffer;
use crate::inputs::{mask, tokens};
use crate::table::{Pass, Shape, Table};

pub fn time(table: &Table) {
    for (batch, seq_len) in [(8192, 2048), (512, 1024), (64, 2048), (16, 32_768)] {
        time_shape(table, batch, seq_len);
    }
}

/// Inputs, and all outputs.
struct Set {
    old_logp: Buffer<f32>,
    rollout_logp: Buffer<f32>,
    mask: Buffer<u8>,
    weights: Buffer<f32>,
    kept: Buffer<u8>,
    stats: Buffer<CorrectionStats>,
    workspace: Buffer<f64>,
}

impl Set {
    fn new(batch: usize, seq_len: usize) -> Self {
        let count = batch * seq_len;
        Self {
            old_logp: tokens(0, count),
            rollout_logp: tokens(1, count),
            mask: mask(batch, seq_len),
            weights: Buffer::uninit(count, 0),
            kept: Buffer::uninit(count, 0),
            stats: Buffer::uninit(1, 0),
            workspace: Buffer::uninit(cuda::workspace_len(batch), 0),
        }
    }
}

fn time_shape(table: &Table, batch: usize, seq_len: usize) {
    if !table.wants(&[Pass::Correction, Pass::CorrectionOfRows], "f32") {
        return;
    }
    let stream = table.stream();
    let shape = Shape { dtype: "f32", rows: batch, columns: seq_len };
    // Two inputs, the weights, and both masks.
    let bytes = 14 * batch * seq_len;
    let sets = &mut table.sets(bytes, || Set::new(batch, seq_len));
    let of_rows = Rejection::verl("seq_mean_k3", None, 0.5).unwrap();
    for (pass, rejection) in
        [(Pass::Correction, Rejection::NONE), (Pass::CorrectionOfRows, of_rows)]
    {
        let options = CorrectionOptions { rejection, ..CorrectionOptions::default() };
        table.row(pass, shape, bytes, sets, |set| {
            let inputs = Inputs {
                mask: Some(set.mask.slice()),
                ..Inputs::new(set.old_logp.slice(), set.rollout_logp.slice())
            };
            let outputs = Outputs {
                kept: Some(set.kept.slice_mut()),
                ..Outputs::new(set.weights.slice_mut(), set.stats.slice_mut())
            };
            let workspace = set.workspace.slice_mut();
            cuda::correction(&stream, inputs, batch, seq_len, &options, outputs, workspace)
                .unwrap();
        });
    }
}
