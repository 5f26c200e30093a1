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

fn time_shape(table: &Table, batch: usize, seq_len: usize) {
    let stream = table.stream();
    let count = batch * seq_len;
    let [logp, old_logp, advantages, values, old_values, returns] = [(); 6].map(|()| tokens(count));
    let mask = mask(batch, seq_len);
    let [mut grad_logp, mut grad_values] = [(); 2].map(|()| Buffer::<f32>::uninit(count, 0));
    let mut stats = Buffer::<PpoStats>::uninit(1, 0);
    let options = PpoLossOptions::default();
    let workspace_len = cuda::workspace_len(batch, seq_len, &options);
    let mut workspace = Buffer::<f32>::uninit(workspace_len, 0);
    let inputs = Inputs {
        values: Some(values.slice()),
        old_values: Some(old_values.slice()),
        returns: Some(returns.slice()),
        mask: Some(mask.slice()),
        ..Inputs::new(logp.slice(), old_logp.slice(), advantages.slice())
    };
    let shape = Shape { dtype: "f32", rows: batch, columns: seq_len };
    // Six inputs, two gradients, and the mask, which is also counted.
    table.row(Pass::PpoLoss, shape, 34 * count, || {
        let outputs = Outputs {
            grad_logp: Some(grad_logp.slice_mut()),
            grad_values: Some(grad_values.slice_mut()),
            ..Outputs::new(stats.slice_mut())
        };
        let workspace = workspace.slice_mut();
        cuda::ppo_loss(&stream, inputs, batch, seq_len, &options, outputs, workspace).unwrap();
    });
}
