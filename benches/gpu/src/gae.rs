//! The gae and whiten ops.

use ppo_kernels::gae::cpu;
use ppo_kernels::gae::cuda::{self, Inputs, Outputs};
use ppo_kernels::gae::GaeOptions;
use ppo_kernels::moments::Moments;
use ppo_kernels::whiten::cuda::{
    self as whiten, GradOutputs, MomentsInputs, MomentsOutputs, OwnBackwardInputs,
};
use ppo_kernels::whiten::WhitenOptions;

use crate::gpu::Buffer;
use crate::inputs::{mask, tokens};
use crate::table::{Pass, Shape, Table};

const SHAPES: [(usize, usize); 5] =
    [(8192, 2048), (4096, 2048), (512, 1024), (64, 2048), (16, 131_072)];

pub fn time(table: &Table) {
    for (batch, seq_len) in SHAPES {
        time_shape(table, batch, seq_len);
    }
}

/// Inputs, and the outputs of all passes.
struct Set {
    values: Buffer<f32>,
    rewards: Buffer<f32>,
    kl: Buffer<f32>,
    scores: Buffer<f32>,
    mask: Buffer<u8>,
    advantages: Buffer<f32>,
    returns: Buffer<f32>,
    whitened: Buffer<f32>,
    moments: Buffer<Moments>,
    workspace: Buffer<f64>,
    whiten_workspace: Buffer<f64>,
}

impl Set {
    fn new(batch: usize, seq_len: usize) -> Self {
        let count = batch * seq_len;
        Self {
            values: tokens(0, count),
            rewards: tokens(1, count),
            kl: tokens(2, count),
            scores: tokens(3, batch),
            mask: mask(batch, seq_len),
            advantages: Buffer::uninit(count, 0),
            returns: Buffer::uninit(count, 0),
            whitened: Buffer::uninit(count, 0),
            moments: Buffer::uninit(1, 0),
            workspace: Buffer::uninit(cuda::workspace_len(&cpu::Inputs::new(&[]), batch, seq_len), 0),
            whiten_workspace: Buffer::uninit(whiten::workspace_len(count), 0),
        }
    }
}

fn time_shape(table: &Table, batch: usize, seq_len: usize) {
    let passes = [Pass::Gae, Pass::GaeShaped, Pass::Moments, Pass::Whiten, Pass::WhitenBackward];
    if !table.wants(&passes, "f32") {
        return;
    }
    let stream = table.stream();
    let count = batch * seq_len;
    let shape = Shape { dtype: "f32", rows: batch, columns: seq_len };

    let gae = |set: &mut Set, inputs: Inputs, with_moments: bool| {
        let outputs = Outputs {
            advantages: set.advantages.slice_mut(),
            returns: set.returns.slice_mut(),
            shaped_rewards: None,
            moments: with_moments.then(|| set.moments.slice_mut()),
        };
        let (options, workspace) = (GaeOptions::default(), set.workspace.slice_mut());
        cuda::gae(&stream, inputs, batch, seq_len, &options, outputs, workspace).unwrap();
    };
    let plain = |set: &mut Set| {
        let inputs =
            Inputs { rewards: Some(set.rewards.slice()), ..Inputs::new(set.values.slice()) };
        gae(set, inputs, false);
    };
    let shaped = |set: &mut Set| {
        let inputs = Inputs {
            kl: Some(set.kl.slice()),
            scores: Some(set.scores.slice()),
            mask: Some(set.mask.slice()),
            ..Inputs::new(set.values.slice())
        };
        gae(set, inputs, true);
    };
    // The least that a pass moves, and what the passes behind GAE read.
    let sets = &mut table.sets(5 * count, || {
        let mut set = Set::new(batch, seq_len);
        shaped(&mut set);
        set
    });
    table.row(Pass::Gae, shape, 16 * count, sets, plain);
    table.row(Pass::GaeShaped, shape, 17 * count, sets, shaped);
    let options = WhitenOptions::default();
    table.row(Pass::Moments, shape, 5 * count, sets, |set| {
        let inputs = MomentsInputs { x: set.advantages.slice(), mask: Some(set.mask.slice()) };
        let outputs = MomentsOutputs { moments: set.moments.slice_mut() };
        let workspace = set.whiten_workspace.slice_mut();
        whiten::masked_moments(&stream, inputs, count, outputs, workspace).unwrap();
    });
    table.row(Pass::Whiten, shape, 9 * count, sets, |set| {
        let inputs = whiten::Inputs {
            x: set.advantages.slice(),
            mask: Some(set.mask.slice()),
            moments: Some(set.moments.slice()),
        };
        let outputs = whiten::Outputs { y: set.whitened.slice_mut() };
        whiten::masked_whiten(&stream, inputs, None, count, &options, outputs).unwrap();
    });
    // What it reads it reads twice: for its sums, and for the gradient.
    table.row(Pass::WhitenBackward, shape, 22 * count, sets, |set| {
        let inputs = OwnBackwardInputs {
            x: set.advantages.slice(),
            mask: Some(set.mask.slice()),
            moments: Some(set.moments.slice()),
            grad_y: set.values.slice(),
        };
        let outputs = GradOutputs { grad_x: set.whitened.slice_mut() };
        let workspace = set.whiten_workspace.slice_mut();
        whiten::masked_whiten_backward(&stream, inputs, None, count, &options, outputs, workspace)
            .unwrap();
    });
}
