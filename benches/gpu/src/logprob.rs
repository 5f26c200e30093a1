//! The logprob op.

use std::sync::LazyLock;

use half::{bf16, f16};
use ppo_kernels::cpu::Logit;
use ppo_kernels::cuda::Stream;
use ppo_kernels::logprob::cuda::{
    self, BackwardInputs, BackwardOutputs, ForwardInputs, ForwardOutputs,
};
use ppo_kernels::logprob::LogprobOptions;
use ppo_kernels::ppo_loss::cuda as ppo_loss;
use ppo_kernels::ppo_loss::cuda::{LogitsInputs, LogitsOutputs};
use ppo_kernels::ppo_loss::{Aggregation, PpoLossOptions, PpoStats};

use crate::gpu::Buffer;
use crate::inputs::logits;
use crate::table::{Pass, Shape, Table};

/// Rows and columns of language models' logits in training.
pub const SHAPES: [(usize, usize); 6] = [
    (8192, 151_936),
    (16_384, 128_256),
    (32_768, 50_257),
    (4096, 262_144),
    (512, 49_152),
    (64, 151_936),
];

/// A denominator that is given, as where a batch is in parts.
static LOSS: LazyLock<PpoLossOptions> = LazyLock::new(|| PpoLossOptions {
    aggregation: Aggregation::Constant(8192.0),
    ..PpoLossOptions::default()
});

/// Logits, targets and all outputs of both passes.
struct Op<T> {
    stream: Stream<'static>,
    rows: usize,
    vocab: usize,
    options: LogprobOptions,
    logits: Buffer<T>,
    targets: Buffer<i64>,
    up: Buffer<f32>,
    logp: Buffer<f32>,
    entropy: Buffer<f32>,
    max: Buffer<f32>,
    log_sum: Buffer<f32>,
    grad: Buffer<T>,
    new_logp: Buffer<f32>,
    stats: Buffer<PpoStats>,
    workspace: Buffer<f32>,
}

impl<T: Logit> Op<T> {
    fn new(stream: Stream<'static>, rows: usize, vocab: usize) -> Self {
        let targets: Vec<i64> = (0..rows).map(|row| ((row * 7919) % vocab) as i64).collect();
        Self {
            stream,
            rows,
            vocab,
            options: LogprobOptions::default(),
            logits: logits(0, rows * vocab),
            targets: Buffer::new(&targets, 0),
            up: Buffer::new(&vec![1.0; rows], 0),
            logp: Buffer::uninit(rows, 0),
            entropy: Buffer::uninit(rows, 0),
            max: Buffer::uninit(rows, 0),
            log_sum: Buffer::uninit(rows, 0),
            grad: Buffer::uninit(rows * vocab, 0),
            new_logp: Buffer::uninit(rows, 0),
            stats: Buffer::uninit(1, 0),
            workspace: Buffer::uninit(ppo_loss::workspace_len(1, rows, &LOSS), 0),
        }
    }

    fn forward(&mut self, entropy: bool) {
        let inputs = ForwardInputs { logits: self.logits.slice(), targets: self.targets.slice() };
        let outputs = ForwardOutputs {
            logp: self.logp.slice_mut(),
            entropy: entropy.then(|| self.entropy.slice_mut()),
            max: Some(self.max.slice_mut()),
            log_sum: Some(self.log_sum.slice_mut()),
        };
        let (stream, options) = (&self.stream, &self.options);
        cuda::forward(stream, inputs, self.rows, self.vocab, options, outputs).unwrap();
    }

    fn backward(&mut self, entropy: bool) {
        let up = self.up.slice();
        let inputs = BackwardInputs {
            forward: ForwardInputs { logits: self.logits.slice(), targets: self.targets.slice() },
            max: self.max.slice(),
            log_sum: self.log_sum.slice(),
            entropy: Some(self.entropy.slice()),
            grad_logp: Some(up),
            grad_entropy: entropy.then_some(up),
        };
        let outputs = BackwardOutputs { grad_logits: self.grad.slice_mut() };
        let (stream, options) = (&self.stream, &self.options);
        cuda::backward(stream, inputs, self.rows, self.vocab, options, outputs).unwrap();
    }
}

impl<T: Logit> Op<T> {
    /// At ratios of 1, so that every row has a gradient.
    fn loss(&mut self) {
        let (logits, targets) = (self.logits.slice(), self.targets.slice());
        let inputs = LogitsInputs::new(logits, targets, self.logp.slice(), self.up.slice());
        let (logp, stats) = (self.new_logp.slice_mut(), self.stats.slice_mut());
        let outputs = LogitsOutputs::new(logp, stats, self.grad.slice_mut());
        let sizes = [1, self.rows, self.vocab];
        let (stream, options, room) = (&self.stream, &self.options, self.workspace.slice_mut());
        ppo_loss::logits_ppo_loss(stream, inputs, sizes, options, &LOSS, outputs, room).unwrap();
    }
}

pub fn time(table: &Table) {
    time_dtype::<bf16>(table);
    time_dtype::<f16>(table);
    time_dtype::<f32>(table);
}

fn time_dtype<T: Logit>(table: &Table) {
    for (rows, vocab) in SHAPES {
        time_shape::<T>(table, rows, vocab);
    }
}

fn time_shape<T: Logit>(table: &Table, rows: usize, vocab: usize) {
    let passes = [
        Pass::LogprobForward,
        Pass::LogprobBackward,
        Pass::LogprobEntropyForward,
        Pass::LogprobEntropyBackward,
        Pass::LogitsPpoLoss,
    ];
    if !table.wants(&passes, T::NAME) {
        return;
    }
    let shape = Shape { dtype: T::NAME, rows, columns: vocab };
    let bytes = rows * vocab * size_of::<T>();
    let sets = &mut table.sets(bytes, || {
        let mut op = Op::<T>::new(table.stream(), rows, vocab);
        // What the backward passes read.
        op.forward(true);
        op
    });
    table.row(Pass::LogprobForward, shape, bytes, sets, |op| op.forward(false));
    table.row(Pass::LogprobBackward, shape, 2 * bytes, sets, |op| op.backward(false));
    table.row(Pass::LogprobEntropyForward, shape, bytes, sets, |op| op.forward(true));
    table.row(Pass::LogprobEntropyBackward, shape, 2 * bytes, sets, |op| op.backward(true));
    table.row(Pass::LogitsPpoLoss, shape, 2 * bytes, sets, Op::loss);
}
