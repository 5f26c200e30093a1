//! The gae and whiten ops.

use ppo_kernels::gae::cuda::{self, Inputs, Outputs};
use ppo_kernels::gae::GaeOptions;
use ppo_kernels::moments::Moments;
use ppo_kernels::whiten::cuda as whiten;
use ppo_kernels::whiten::WhitenOptions;

use crate::gpu::Buffer;
use crate::inputs::{mask, tokens};
use crate::table::{Pass, Shape, Table};

const SHAPES: [(usize, usize); 4] = [(8192, 2048), (512, 1024), (64, 2048), (16, 131_072)];

pub fn time(table: &Table) {
    for (batch, seq_len) in SHAPES {
        time_shape(table, batch, seq_len);
    }
}

fn time_shape(table: &Table, batch: usize, seq_len: usize) {
    let stream = table.stream();
    let count = batch * seq_len;
    let (values, rewards, kl, scores) =
        (tokens(count), tokens(count), tokens(count), tokens(batch));
    let mask = mask(batch, seq_len);
    let [mut advantages, mut returns] = [(); 2].map(|()| Buffer::<f32>::uninit(count, 0));
    let mut moments = Buffer::<Moments>::uninit(1, 0);
    let mut workspace = Buffer::<f64>::uninit(cuda::workspace_len(batch, seq_len), 0);
    let mut whiten_workspace = Buffer::<f64>::uninit(whiten::workspace_len(count), 0);
    let shape = Shape { dtype: "f32", rows: batch, columns: seq_len };

    let plain = Inputs { rewards: Some(rewards.slice()), ..Inputs::new(values.slice()) };
    let shaped = Inputs {
        kl: Some(kl.slice()),
        scores: Some(scores.slice()),
        mask: Some(mask.slice()),
        ..Inputs::new(values.slice())
    };
    let mut gae = |pass, inputs, bytes: usize, with_moments: bool| {
        table.row(pass, shape, bytes * count, || {
            let outputs = Outputs {
                advantages: advantages.slice_mut(),
                returns: returns.slice_mut(),
                shaped_rewards: None,
                moments: with_moments.then(|| moments.slice_mut()),
            };
            let (options, workspace) = (GaeOptions::default(), workspace.slice_mut());
            cuda::gae(&stream, inputs, batch, seq_len, &options, outputs, workspace).unwrap();
        });
    };
    gae(Pass::Gae, plain, 16, false);
    gae(Pass::GaeShaped, shaped, 17, true);
    let mut whitened = Buffer::<f32>::uninit(count, 0);
    let options = WhitenOptions::default();
    let (x, kept) = (advantages.slice(), Some(mask.slice()));
    table.row(Pass::Moments, shape, 5 * count, || {
        let inputs = whiten::MomentsInputs { x, mask: kept };
        let outputs = whiten::MomentsOutputs { moments: moments.slice_mut() };
        let workspace = whiten_workspace.slice_mut();
        whiten::masked_moments(&stream, inputs, count, outputs, workspace).unwrap();
    });
    table.row(Pass::Whiten, shape, 9 * count, || {
        let inputs = whiten::Inputs { x, mask: kept, moments: Some(moments.slice()) };
        let outputs = whiten::Outputs { y: whitened.slice_mut() };
        whiten::masked_whiten(&stream, inputs, None, count, &options, outputs).unwrap();
    });
    // What it reads it reads twice: for its sums, and for the gradient.
    table.row(Pass::WhitenBackward, shape, 22 * count, || {
        let inputs = whiten::BackwardInputs {
            x,
            mask: kept,
            moments: Some(moments.slice()),
            grad_y: values.slice(),
        };
        let outputs = whiten::BackwardOutputs { grad_x: whitened.slice_mut() };
        let workspace = whiten_workspace.slice_mut();
        whiten::masked_whiten_backward(&stream, inputs, None, count, &options, outputs, workspace)
            .unwrap();
    });
}
