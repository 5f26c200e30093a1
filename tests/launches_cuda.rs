//! Launches of the CUDA kernels, whatever the op: parts of a row side by side or one after the
//! other, and the handles of the default stream. On a GPU or on the CPU stand-in; the streams of a GPU only there.
#![cfg(any(feature = "simt", feature = "cuda"))]

mod common;

use common::device::{machine, stream, Buffer, Order, FEW, MANY};
use common::*;
use ppo_kernels::cuda::{force_wide, Stream};
use ppo_kernels::logprob::cuda::{self, ForwardInputs, ForwardOutputs};
use ppo_kernels::logprob::{reference, LogprobOptions};
use ppo_kernels::tolerance::{self, Tolerance};

const ROWS: usize = 3;

struct Case {
    vocab: usize,
    logits: Vec<f32>,
    targets: Vec<i64>,
}

impl Case {
    fn new(vocab: usize) -> Self {
        let logits = uniform(&mut rng(vocab as u64), ROWS * vocab, 8.0);
        let targets = (0..ROWS).map(|row| (row * 7919 % vocab) as i64).collect();
        Self { vocab, logits, targets }
    }

    /// Asserts that what the stream computes is what the reference gives.
    #[track_caller]
    fn agrees(
        &self,
        what: &str,
        stream: &Stream,
        before: impl FnOnce(),
        after: impl FnOnce(),
    ) -> Vec<u32> {
        let options = LogprobOptions::default();
        let (logits, targets) = (Buffer::new(&self.logits, 0), Buffer::new(&self.targets, 0));
        let mut logp = Buffer::new(&[f32::NAN; ROWS], 0);
        let inputs = ForwardInputs { logits: logits.slice(), targets: targets.slice() };
        let logp_out = logp.slice_mut();
        let outputs = ForwardOutputs { logp: logp_out, entropy: None, max: None, log_sum: None };
        before();
        cuda::forward(stream, inputs, ROWS, self.vocab, &options, outputs).expect(what);
        after();
        let got = logp.read();
        let (want, _) =
            reference::forward(&wide(&self.logits), &self.targets, self.vocab, &options);
        let Tolerance { rel, abs } = tolerance::LOGPROB.tests;
        assert_close(what, &wide(&got), &want, rel, abs);
        got.iter().map(|x| x.to_bits()).collect()
    }
}

#[test]
fn parts_of_a_row_have_the_same_bits_side_by_side_and_one_after_the_other() {
    // The first two have one part.
    for vocab in [1030, 16 * 1024, 17 * 1024 + 1, 33 * 1024 + 3] {
        let case = Case::new(vocab);
        let run = |wide, multiprocessors| {
            force_wide(wide);
            let what = format!("V={vocab}, {wide:?}, {multiprocessors} multiprocessors");
            let stream = stream(machine(Order::Fifo, multiprocessors, 8));
            let bits = case.agrees(&what, &stream, || (), || ());
            force_wide(None);
            bits
        };
        let narrow = run(None, FEW);
        for (wide, multiprocessors) in [(None, MANY), (Some(false), MANY), (Some(true), FEW)] {
            assert_eq!(run(wide, multiprocessors), narrow, "V={vocab}, {wide:?}");
        }
    }
}

/// PyTorch's backward thread of the first device is such a thread.
#[cfg(not(feature = "simt"))]
#[test]
fn the_default_stream_needs_no_context_in_its_thread() {
    use common::gpu::Gpu;
    use cudarc::driver::result::ctx;

    let current = || ctx::get_current().expect("the driver has started");
    let device = Gpu::get().stream().device();
    // Null, CU_STREAM_LEGACY, CU_STREAM_PER_THREAD.
    for handle in 0..=2_usize {
        let what = format!("the stream {handle}");
        let computed = std::thread::spawn(move || {
            assert!(current().is_none(), "{what}: a new thread has no context");
            // SAFETY: a handle of the default stream.
            let stream = unsafe { Stream::from_raw(handle as *mut _) }.expect(&what);
            assert!(current().is_none(), "{what}: the thread has got a context");
            assert_eq!(stream.device(), device, "{what}");

            // Making buffers has given the thread a context.
            // SAFETY: no context is one to set.
            let before = || unsafe { ctx::set_current(std::ptr::null_mut()) }.expect("no context");
            let after = || {
                assert!(current().is_none(), "{what}: a launch has left a context");
                Gpu::get();
                ctx::synchronize().expect("no launch failed");
            };
            Case::new(40_000).agrees(&what, &stream, before, after);
        });
        computed.join().expect("as above");
    }
}
