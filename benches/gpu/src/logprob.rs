//! The logprob op.

use half::{bf16, f16};
use ppo_kernels::cpu::Logit;
use ppo_kernels::logprob::cuda::{self, Outputs, RowStats, RowStatsMut, Upstream};
use ppo_kernels::logprob::LogprobOptions;

use crate::clock::seconds;
use crate::gpu::{Buffer, Gpu};

/// Rows and columns of language models' logits in training.
const SHAPES: [(usize, usize); 6] = [
    (8192, 151_936),
    (16_384, 128_256),
    (32_768, 50_257),
    (4096, 262_144),
    (512, 49_152),
    (64, 151_936),
];

/// Logits, targets and all outputs of both passes.
struct Op<T> {
    gpu: &'static Gpu,
    vocab: usize,
    options: LogprobOptions,
    logits: Buffer<T>,
    targets: Buffer<i64>,
    up: Buffer<f32>,
    logp: Buffer<f32>,
    entropy: Buffer<f32>,
    max: Buffer<f32>,
    log_sum: Buffer<f32>,
    workspace: Buffer<f32>,
    grad: Buffer<T>,
}

impl<T: Logit> Op<T> {
    fn new(gpu: &'static Gpu, rows: usize, vocab: usize) -> Self {
        let targets: Vec<i64> = (0..rows).map(|row| ((row * 7919) % vocab) as i64).collect();
        let workspace = cuda::workspace_len::<T>(gpu.stream().device(), rows, vocab);
        Self {
            gpu,
            vocab,
            options: LogprobOptions { temperature: 0.7, ..Default::default() },
            logits: repeat(&logits(1 << 24), rows * vocab),
            targets: Buffer::new(&targets, 0),
            up: Buffer::new(&vec![1.0; rows], 0),
            logp: Buffer::uninit(rows, 0),
            entropy: Buffer::uninit(rows, 0),
            max: Buffer::uninit(rows, 0),
            log_sum: Buffer::uninit(rows, 0),
            workspace: Buffer::uninit(workspace, 0),
            grad: Buffer::uninit(rows * vocab, 0),
        }
    }

    fn forward(&mut self, entropy: bool) {
        let stats = RowStatsMut { max: self.max.slice_mut(), log_sum: self.log_sum.slice_mut() };
        let outputs = Outputs {
            logp: self.logp.slice_mut(),
            entropy: entropy.then(|| self.entropy.slice_mut()),
            stats: Some(stats),
        };
        let (z, ids, work) =
            (self.logits.slice(), self.targets.slice(), self.workspace.slice_mut());
        let stream = self.gpu.stream();
        cuda::forward(&stream, z, ids, self.vocab, &self.options, outputs, work).unwrap();
    }

    fn backward(&mut self) {
        let stats = RowStats {
            max: self.max.slice(),
            log_sum: self.log_sum.slice(),
            entropy: self.entropy.slice(),
        };
        let upstream = Upstream { logp: Some(self.up.slice()), entropy: Some(self.up.slice()) };
        let (z, ids, grad) = (self.logits.slice(), self.targets.slice(), self.grad.slice_mut());
        let (stream, options) = (self.gpu.stream(), &self.options);
        cuda::backward(&stream, z, ids, self.vocab, options, stats, upstream, grad).unwrap();
    }
}

/// `len` elements: `values` over and over.
fn repeat<T: Copy>(values: &[T], len: usize) -> Buffer<T> {
    let buffer = Buffer::uninit(len, 0);
    for first in (0..len).step_by(values.len()) {
        buffer.write(first, &values[..values.len().min(len - first)]);
    }
    buffer
}

/// Logits in [-8, 8), the same every time.
fn logits<T: Logit>(count: usize) -> Vec<T> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let unit = (state >> 40) as f32 / (1 << 24) as f32;
        T::from_f32(16.0 * unit - 8.0)
    };
    (0..count).map(|_| next()).collect()
}

pub fn time(gpu: &'static Gpu, copy: f64) {
    for (rows, vocab) in SHAPES {
        time_shape::<bf16>(gpu, copy, rows, vocab);
    }
    for (rows, vocab) in [(8192, 50_257), (512, 49_152)] {
        time_shape::<f32>(gpu, copy, rows, vocab);
        time_shape::<f16>(gpu, copy, rows, vocab);
    }
}

fn time_shape<T: Logit>(gpu: &'static Gpu, copy: f64, rows: usize, vocab: usize) {
    let mut op = Op::<T>::new(gpu, rows, vocab);
    let bytes = (rows * vocab * size_of::<T>()) as f64;
    let report = |pass: &str, bytes: f64, seconds: f64| {
        let rate = bytes / seconds * 1e-9;
        let (us, share) = (seconds * 1e6, 100.0 * rate / copy);
        println!(
            "| {pass} | {} | {rows} x {vocab} | {us:.0} | {rate:.0} | {share:.0} % |",
            T::NAME
        );
    };
    report("logprob forward", bytes, seconds(gpu, || op.forward(false)));
    report("logprob + entropy forward", bytes, seconds(gpu, || op.forward(true)));
    report("logprob + entropy backward", 2.0 * bytes, seconds(gpu, || op.backward()));
    gpu.finish();
}
