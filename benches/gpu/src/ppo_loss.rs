//! The ppo_loss op.

use ppo_kernels::ppo_loss::cuda::{self, Inputs, Outputs};
use ppo_kernels::ppo_loss::{PpoLossOptions, PpoStats};

use crate::gpu::Buffer;
use crate::inputs::{mask, tokens};
use crate::table::{Pass, Shape, Table};

pub fn time(table: &Table) {
    for (batch, seq_len) in [(8192, 2048), (512, 1024), (64, 2048)] {
        time_shape(table, batch, seq_len);
    }
}

/// Inputs, and all outputs.
struct Set {
    logp: Buffer<f32>,
    old_logp: Buffer<f32>,
    advantages: Buffer<f32>,
    values: Buffer<f32>,
    old_values: Buffer<f32>,
    returns: Buffer<f32>,
    mask: Buffer<u8>,
    grad_logp: Buffer<f32>,
    grad_values: Buffer<f32>,
    stats: Buffer<PpoStats>,
    workspace: Buffer<f32>,
}

impl Set {
    fn new(batch: usize, seq_len: usize, options: &PpoLossOptions) -> Self {
        let count = batch * seq_len;
        Self {
            logp: tokens(0, count),
            old_logp: tokens(1, count),
            advantages: tokens(2, count),
            values: tokens(3, count),
            old_values: tokens(4, count),
            returns: tokens(5, count),
            mask: mask(batch, seq_len),
            grad_logp: Buffer::uninit(count, 0),
            grad_values: Buffer::uninit(count, 0),
            stats: Buffer::uninit(1, 0),
            workspace: Buffer::uninit(cuda::workspace_len(batch, batch * seq_len, options), 0),
        }
    }
}

fn time_shape(table: &Table, batch: usize, seq_len: usize) {
    if !table.wants(&[Pass::PpoLoss], "f32") {
        return;
    }
    let stream = table.stream();
    let options = PpoLossOptions::default();
    let shape = Shape { dtype: "f32", rows: batch, columns: seq_len };
    // Six inputs, two gradients, and the mask, which is also counted.
    let bytes = 34 * batch * seq_len;
    let sets = &mut table.sets(bytes, || Set::new(batch, seq_len, &options));
    table.row(Pass::PpoLoss, shape, bytes, sets, |set| {
        let inputs = Inputs {
            values: Some(set.values.slice()),
            old_values: Some(set.old_values.slice()),
            returns: Some(set.returns.slice()),
            mask: Some(set.mask.slice()),
            ..Inputs::new(set.logp.slice(), set.old_logp.slice(), set.advantages.slice())
        };
        let outputs = Outputs {
            grad_logp: Some(set.grad_logp.slice_mut()),
            grad_values: Some(set.grad_values.slice_mut()),
            ..Outputs::new(set.stats.slice_mut())
        };
        let workspace = set.workspace.slice_mut();
        cuda::ppo_loss(&stream, inputs, batch, seq_len, &options, outputs, workspace).unwrap();
    });
}
