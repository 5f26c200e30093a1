//! The logprob op.

use half::{bf16, f16};
use ppo_kernels::cpu::Logit;
use ppo_kernels::logprob::cuda::{self, Outputs, RowStats, RowStatsMut, Upstream};
use ppo_kernels::logprob::{reference, LogprobOptions};

use crate::device::{Device, Memory};

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
    vocab: usize,
    options: LogprobOptions,
    logits: Memory<T>,
    targets: Memory<i64>,
    up: Memory<f32>,
    logp: Memory<f32>,
    entropy: Memory<f32>,
    max: Memory<f32>,
    log_sum: Memory<f32>,
    workspace: Memory<f32>,
    grad: Memory<T>,
}

impl<T: Logit + Default> Op<T> {
    fn new(
        device: &Device,
        logits: Memory<T>,
        grad: Memory<T>,
        targets: &[i64],
        vocab: usize,
    ) -> Self {
        let rows = targets.len();
        let up: Vec<f32> = (0..rows).map(|row| 1.0 - row as f32 / (2 * rows) as f32).collect();
        Self {
            vocab,
            options: LogprobOptions { temperature: 0.7, ..Default::default() },
            logits,
            targets: Memory::from(targets, 0),
            up: Memory::from(&up, 0),
            logp: Memory::new(rows),
            entropy: Memory::new(rows),
            max: Memory::new(rows),
            log_sum: Memory::new(rows),
            workspace: Memory::new(cuda::workspace_len::<T>(device.stream.device(), rows, vocab)),
            grad,
        }
    }

    fn forward(&self, device: &Device, entropy: bool) {
        let stats = RowStatsMut { max: self.max.slice_mut(), log_sum: self.log_sum.slice_mut() };
        let outputs = Outputs {
            logp: self.logp.slice_mut(),
            entropy: entropy.then(|| self.entropy.slice_mut()),
            stats: Some(stats),
        };
        let (z, ids, work) =
            (self.logits.slice(), self.targets.slice(), self.workspace.slice_mut());
        cuda::forward(&device.stream, z, ids, self.vocab, &self.options, outputs, work).unwrap();
    }

    fn backward(&self, device: &Device, in_place: bool) {
        let stats = RowStats {
            max: self.max.slice(),
            log_sum: self.log_sum.slice(),
            entropy: self.entropy.slice(),
        };
        let upstream = Upstream { logp: Some(self.up.slice()), entropy: Some(self.up.slice()) };
        let grad = if in_place { self.logits.slice_mut() } else { self.grad.slice_mut() };
        let (z, ids) = (self.logits.slice(), self.targets.slice());
        let (vocab, options) = (self.vocab, &self.options);
        cuda::backward(&device.stream, z, ids, vocab, options, stats, upstream, grad).unwrap();
    }
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

pub fn check(device: &Device, small: bool) {
    check_dtype::<f32>(device, small, 2e-6);
    check_dtype::<f16>(device, small, 2f64.powi(-11));
    check_dtype::<bf16>(device, small, 2f64.powi(-8));
    println!("logprob agrees with the reference");
}

/// Every mapping and alignment, against the reference and against itself.
fn check_dtype<T: Logit + Default>(device: &Device, small: bool, gradient_error: f64) {
    let kib = 1024 / size_of::<T>();
    let mut vocabularies =
        vec![1, 2, 7, 9, 31, 257, 2 * kib, 2 * kib + 1, 5 * kib + 3, 17 * kib + 1];
    vocabularies.extend([65 * kib + 5, 129 * kib, 257 * kib + 3]);
    if !small {
        vocabularies.extend([151_936, 1_000_000]);
    }
    for vocab in vocabularies {
        let rows = 5;
        let logits = logits::<T>(rows * vocab);
        let targets: Vec<i64> = (0..rows).map(|row| ((row * 7919) % vocab) as i64).collect();
        let z: Vec<f64> = logits.iter().map(|z| f64::from(z.to_f32())).collect();
        let mut bits = Vec::new();
        for offset in 0..3 {
            let memory = Memory::from(&logits, offset);
            let grad = Memory::from(&vec![T::ZERO; logits.len()], offset);
            let op = Op::new(device, memory, grad, &targets, vocab);
            let in_place = offset == 2;
            op.forward(device, true);
            op.backward(device, in_place);
            device.finish();
            let what = format!("{} V={vocab} offset {offset}", T::NAME);
            let (logp, entropy) = reference::forward(&z, &targets, vocab, &op.options);
            let up: Vec<f64> = op.up.read().iter().map(|&x| f64::from(x)).collect();
            let want = reference::backward(&z, &targets, vocab, &op.options, &up, &up);
            let written = if in_place { op.logits.read() } else { op.grad.read() };
            let grad: Vec<f32> = written.iter().map(|g| g.to_f32()).collect();
            compare(&format!("{what} logp"), &op.logp.read(), &logp, 2e-6);
            compare(&format!("{what} entropy"), &op.entropy.read(), &entropy, 2e-6);
            compare(&format!("{what} grad"), &grad, &want, gradient_error);
            bits.push([op.logp.read(), op.entropy.read(), grad].concat());
        }
        let same =
            |a: &Vec<f32>, b: &Vec<f32>| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(bits.iter().all(|b| same(b, &bits[0])), "{} V={vocab}: bits differ", T::NAME);
    }
}

fn compare(what: &str, got: &[f32], want: &[f64], relative: f64) {
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(
            error <= 4e-6 + relative * want.abs(),
            "{what}: element {i} is {got}, expected {want}"
        );
    }
}

pub fn time(device: &Device, copy: f64) {
    for (rows, vocab) in SHAPES {
        time_shape::<bf16>(device, copy, rows, vocab);
    }
    for (rows, vocab) in [(8192, 50_257), (512, 49_152)] {
        time_shape::<f32>(device, copy, rows, vocab);
        time_shape::<f16>(device, copy, rows, vocab);
    }
}

fn time_shape<T: Logit + Default>(device: &Device, copy: f64, rows: usize, vocab: usize) {
    let memory = Memory::repeat(&logits::<T>(1 << 24), rows * vocab);
    let targets: Vec<i64> = (0..rows).map(|row| ((row * 7919) % vocab) as i64).collect();
    let op = Op::new(device, memory, Memory::new(rows * vocab), &targets, vocab);
    let bytes = (rows * vocab * size_of::<T>()) as f64;
    let report = |pass: &str, bytes: f64, seconds: f64| {
        let rate = bytes / seconds * 1e-9;
        let (us, share) = (seconds * 1e6, 100.0 * rate / copy);
        println!(
            "| {pass} | {} | {rows} x {vocab} | {us:.0} | {rate:.0} | {share:.0} % |",
            T::NAME
        );
    };
    report("logprob forward", bytes, device.seconds(|| op.forward(device, false)));
    report("logprob + entropy forward", bytes, device.seconds(|| op.forward(device, true)));
    report(
        "logprob + entropy backward",
        2.0 * bytes,
        device.seconds(|| op.backward(device, false)),
    );
    device.finish();
}
