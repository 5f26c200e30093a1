//! The CUDA kernels of the logprob op, on a GPU or on the CPU stand-in: every dtype, mapping and
//! thread order against the f64 reference, and bugs planted in the kernels, which must not go unseen.
#![cfg(any(feature = "simt", feature = "cuda"))]

mod common;

use common::device::{
    blocks_and_kinds, machine, orders, stream, vocabularies, Buffer, Machine, Order, FEW, MANY,
};
use common::*;
use half::{bf16, f16};
use ppo_kernels::cpu::{Logit, TokenId};
use ppo_kernels::logprob::cuda::{
    self, BackwardInputs, BackwardOutputs, FinishInputs, FinishOutputs, ForwardInputs,
    ForwardOutputs, MergeInputs, RunningSums,
};
use ppo_kernels::logprob::{cpu, reference, Columns, LogprobOptions};
use ppo_kernels::tolerance;
use ppo_kernels::{Error, Result};
use rand::Rng;

const REL: f64 = tolerance::LOGPROB.tests.rel;
const ABS: f64 = tolerance::LOGPROB.tests.abs;

/// What both passes write.
#[derive(Debug, Clone, PartialEq)]
struct Run {
    logp: Vec<f32>,
    entropy: Vec<f32>,
    max: Vec<f32>,
    log_sum: Vec<f32>,
    grad: Vec<f32>,
}

impl Run {
    fn bits(&self) -> Vec<u32> {
        let all = [&self.logp, &self.entropy, &self.max, &self.log_sum, &self.grad];
        all.into_iter().flatten().map(|x| x.to_bits()).collect()
    }
}

/// One call of each pass.
struct Call<'a, T, I> {
    machine: Machine,
    /// Elements from a 16-byte boundary to the first row.
    offset: usize,
    logits: &'a [T],
    targets: &'a [I],
    vocab: usize,
    options: LogprobOptions,
    up_logp: &'a [f32],
    up_entropy: &'a [f32],
    in_place: bool,
}

impl<T: Logit, I: TokenId> Call<'_, T, I> {
    fn run(&self) -> Result<Run> {
        let stream = stream(self.machine);
        let (rows, vocab) = (self.targets.len(), self.vocab);
        let mut logits = Buffer::new(self.logits, self.offset);
        let targets = Buffer::new(self.targets, 0);
        let mut out = [(); 4].map(|()| Buffer::new(&vec![f32::NAN; rows], 0));
        let [logp, entropy, max, log_sum] = &mut out;
        let outputs = ForwardOutputs {
            logp: logp.slice_mut(),
            entropy: Some(entropy.slice_mut()),
            max: Some(max.slice_mut()),
            log_sum: Some(log_sum.slice_mut()),
        };
        let inputs = ForwardInputs { logits: logits.slice(), targets: targets.slice() };
        let options = &self.options;
        cuda::forward(&stream, inputs, rows, vocab, options, outputs)?;

        let mut alone = Buffer::new(&vec![f32::NAN; rows], 0);
        let outputs = only(&mut alone);
        cuda::forward(&stream, inputs, rows, vocab, options, outputs)?;
        let same = alone.read().iter().zip(&logp.read()).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "with and without entropy");

        let (up_logp, up_entropy) = (Buffer::new(self.up_logp, 0), Buffer::new(self.up_entropy, 0));
        let inputs = BackwardInputs {
            forward: inputs,
            max: max.slice(),
            log_sum: log_sum.slice(),
            entropy: Some(entropy.slice()),
            grad_logp: Some(up_logp.slice()),
            grad_entropy: Some(up_entropy.slice()),
        };
        let mut separate = Buffer::new(&vec![T::ZERO; self.logits.len()], self.offset);
        let grad = if self.in_place { logits.slice_mut() } else { separate.slice_mut() };
        let outputs = BackwardOutputs { grad_logits: grad };
        cuda::backward(&stream, inputs, rows, vocab, options, outputs)?;
        let grad = if self.in_place { &logits } else { &separate };
        Ok(Run {
            logp: logp.read(),
            entropy: entropy.read(),
            max: max.read(),
            log_sum: log_sum.read(),
            grad: grad.read().iter().map(|g| g.to_f32()).collect(),
        })
    }
}

/// The log-probabilities, and nothing else.
fn only(logp: &mut Buffer<f32>) -> ForwardOutputs<'_> {
    ForwardOutputs { logp: logp.slice_mut(), entropy: None, max: None, log_sum: None }
}

/// f32 values rounded to `T`.
fn narrow<T: Logit>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&x| T::from_f32(x)).collect()
}

/// Every case against the reference, all orders, parts side by side and one after the other.
fn agrees_with_the_reference<T: Logit>(planted_bug: &'static str, orders: &[Order]) -> Result<()> {
    let mut rng = rng(1);
    for vocab in vocabularies::<T>() {
        let (blocks, kinds) = blocks_and_kinds::<T>(vocab);
        for case in logprob_cases::rows_of(&mut rng, vocab).into_iter().take(kinds) {
            let rows = case.count();
            let logits = narrow::<T>(&case.rows);
            let z: Vec<f64> = logits.iter().map(|z| f64::from(z.to_f32())).collect();
            let targets: Vec<i64> = (0..rows).map(|_| rng.random_range(0..vocab as i64)).collect();
            let up_logp = uniform(&mut rng, rows, 1.0);
            let up_entropy = uniform(&mut rng, rows, 1.0);
            let options = LogprobOptions { temperature: 0.7, ..Default::default() };
            let mut first: Option<Vec<u32>> = None;
            for (i, &order) in orders.iter().enumerate() {
                let call = Call {
                    // Parts of a row side by side, and one after the other.
                    machine: Machine { planted_bug, ..machine(order, [MANY, FEW][i % 2], blocks) },
                    offset: i,
                    logits: &logits,
                    targets: &targets,
                    vocab,
                    options,
                    up_logp: &up_logp,
                    up_entropy: &up_entropy,
                    in_place: i == 1,
                };
                let run = call.run()?;
                let what = format!("{} V={vocab} {} {order:?}", case.name, T::NAME);
                let (logp, entropy) = reference::forward(&z, &targets, vocab, &options);
                assert_close(&format!("{what} logp"), &wide(&run.logp), &logp, REL, ABS);
                assert_close(&format!("{what} entropy"), &wide(&run.entropy), &entropy, REL, ABS);
                let (a, b) = (wide(&up_logp), wide(&up_entropy));
                let grad = reference::backward(&z, &targets, vocab, &options, &a, &b);
                let (rel, abs) = match T::NAME {
                    "bf16" => (2f64.powi(-8), ABS),
                    "f16" => (2f64.powi(-11), ABS),
                    _ => (REL, ABS),
                };
                assert_close(&format!("{what} grad"), &wide(&run.grad), &grad, rel, abs);
                let bits = run.bits();
                let first = first.get_or_insert_with(|| bits.clone());
                assert!(*first == bits, "{what}: bits depend on order, alignment or width");
            }
        }
    }
    Ok(())
}

#[test]
fn f32_agrees_with_the_reference_in_every_order() {
    agrees_with_the_reference::<f32>("", orders()).unwrap();
}

#[test]
fn f16_agrees_with_the_reference_in_every_order() {
    agrees_with_the_reference::<f16>("", orders()).unwrap();
}

#[test]
fn bf16_agrees_with_the_reference_in_every_order() {
    agrees_with_the_reference::<bf16>("", orders()).unwrap();
}

#[test]
fn gradients_of_unlikely_tokens_are_right_down_to_the_least_float() {
    let case = logprob_cases::unlikely();
    let call = Call {
        machine: machine(Order::Fifo, MANY, 4),
        offset: 0,
        logits: &case.logits,
        targets: &case.targets,
        vocab: case.vocab,
        options: LogprobOptions::default(),
        up_logp: &case.up_logp,
        up_entropy: &case.up_entropy,
        in_place: false,
    };
    case.check(&call.run().unwrap().grad, true);
}

/// A pass over tiles one after the other, and over shards that are merged, with the gradient by tiles and
/// in place.
fn tiles_give_what_whole_rows_give_in<T: Logit>() {
    let mut rng = rng(41);
    let options = LogprobOptions { temperature: 0.7, ignore_index: Some(-100) };
    for vocab in vocabularies::<T>() {
        let (blocks, kinds) = blocks_and_kinds::<T>(vocab);
        for case in logprob_cases::rows_of(&mut rng, vocab).into_iter().take(kinds) {
            let rows = case.count();
            let stream = stream(machine(Order::Fifo, FEW, blocks));
            let z = narrow::<T>(&case.rows);
            let mut ids: Vec<i64> = (0..rows).map(|_| rng.random_range(0..vocab as i64)).collect();
            ids[1] = -100;
            let targets = Buffer::new(&ids, 0);
            let nan = || Buffer::new(&vec![f32::NAN; rows], 0);
            let mut sums = [(); 4].map(|()| nan());
            let mut merged = [(); 4].map(|()| nan());
            let tiles = logprob_cases::tiles_of(&mut rng, vocab);
            for (i, &columns) in tiles.iter().enumerate() {
                let logits = Buffer::new(&logprob_cases::tile(&z, columns), i % 3);
                let inputs = ForwardInputs { logits: logits.slice(), targets: targets.slice() };
                let partial = |begins, sums: &mut [Buffer<f32>; 4]| {
                    let sums = running(sums);
                    cuda::partial(&stream, inputs, rows, columns, &options, begins, sums).unwrap();
                };
                partial(i == 0, &mut sums);
                if i == 0 {
                    partial(true, &mut merged);
                    continue;
                }
                let mut shard = [(); 4].map(|()| nan());
                partial(true, &mut shard);
                let [max, rest, logit, weighted] = shard.each_ref().map(Buffer::slice);
                let inputs = MergeInputs {
                    other_weighted: Some(weighted),
                    ..MergeInputs::new(max, rest, logit)
                };
                cuda::merge(&stream, inputs, rows, &options, running(&mut merged)).unwrap();
            }
            let wide_z: Vec<f64> = z.iter().map(|z| f64::from(z.to_f32())).collect();
            let want = reference::forward(&wide_z, &ids, vocab, &options);
            let mut log_sum = nan();
            let mut entropy = nan();
            for sums in [&sums, &merged] {
                let [max, rest, logit, weighted] = sums.each_ref().map(Buffer::slice);
                let inputs = FinishInputs {
                    weighted: Some(weighted),
                    ..FinishInputs::new(targets.slice(), max, rest, logit)
                };
                let mut logp = nan();
                let outputs = FinishOutputs {
                    logp: logp.slice_mut(),
                    log_sum: log_sum.slice_mut(),
                    entropy: Some(entropy.slice_mut()),
                };
                cuda::finish(&stream, inputs, rows, vocab, &options, outputs).unwrap();
                let what = format!("{} V={vocab} {}", case.name, T::NAME);
                assert_close(&format!("{what} logp"), &wide(&logp.read()), &want.0, REL, ABS);
                assert_close(&what, &wide(&entropy.read()), &want.1, REL, ABS);
            }

            let up = [(); 2].map(|()| Buffer::new(&uniform(&mut rng, rows, 1.0), 0));
            let gradient = |logits: &mut Buffer<T>, columns: Columns| {
                let forward = ForwardInputs { logits: logits.slice(), targets: targets.slice() };
                let inputs = BackwardInputs {
                    entropy: Some(entropy.slice()),
                    grad_logp: Some(up[0].slice()),
                    grad_entropy: Some(up[1].slice()),
                    ..BackwardInputs::new(forward, merged[0].slice(), log_sum.slice())
                };
                let outputs = BackwardOutputs { grad_logits: logits.slice_mut() };
                cuda::backward_of_columns(&stream, inputs, rows, columns, &options, outputs)
                    .unwrap();
                logits.read().iter().map(|g| g.to_f32().to_bits()).collect::<Vec<_>>()
            };
            let whole = gradient(&mut Buffer::new(&z, 0), Columns::all(vocab));
            for &columns in &tiles {
                let mut logits = Buffer::new(&logprob_cases::tile(&z, columns), 1);
                let found = gradient(&mut logits, columns);
                assert!(found == logprob_cases::tile(&whole, columns), "{columns:?}");
            }
        }
    }
}

fn running(sums: &mut [Buffer<f32>; 4]) -> RunningSums<'_> {
    let [max, rest, logit, weighted] = sums.each_mut().map(Buffer::slice_mut);
    RunningSums { max, rest, logit, weighted: Some(weighted) }
}

#[test]
fn tiles_give_what_whole_rows_give() {
    tiles_give_what_whole_rows_give_in::<f32>();
    tiles_give_what_whole_rows_give_in::<f16>();
    tiles_give_what_whole_rows_give_in::<bf16>();
}

fn likely_tokens_keep_their_digits_in<T: Logit>() {
    let mut rng = rng(31);
    for vocab in vocabularies::<T>() {
        let (case, targets) = logprob_cases::confident(&mut rng, vocab);
        let logits = narrow::<T>(&case.rows);
        let z: Vec<f64> = logits.iter().map(|z| f64::from(z.to_f32())).collect();
        let up = vec![1.0; case.count()];
        let zeros = vec![0.0; case.count()];
        let options = LogprobOptions { temperature: 0.7, ..Default::default() };
        let call = Call {
            machine: machine(Order::Fifo, FEW, 8),
            offset: 0,
            logits: &logits,
            targets: &targets,
            vocab,
            options,
            up_logp: &up,
            up_entropy: &zeros,
            in_place: false,
        };
        let run = call.run().unwrap();
        // Relative: the least of them are 1e-24.
        let rel = tolerance::LOGPROB.backward.rel;
        let want = reference::forward(&z, &targets, vocab, &options);
        assert_close("logp", &wide(&run.logp), &want.0, rel, 0.0);
        assert_close("entropy", &wide(&run.entropy), &want.1, rel, 0.0);
        let want = reference::backward(&z, &targets, vocab, &options, &wide(&up), &wide(&zeros));
        // What f16 holds of such gradients is 0.
        if T::NAME != "f16" {
            let rel = if T::NAME == "bf16" { 2f64.powi(-8) } else { rel };
            assert_close("grad", &wide(&run.grad), &want, rel, 0.0);
        }
    }
}

#[test]
fn likely_tokens_keep_their_digits() {
    likely_tokens_keep_their_digits_in::<f32>();
    likely_tokens_keep_their_digits_in::<f16>();
    likely_tokens_keep_their_digits_in::<bf16>();
}

#[test]
fn rows_begin_beyond_two_to_the_31st_element() {
    let (rows, vocab, target) = ((1 << 11) + 2, 1 << 20, 5);
    let logits = Buffer::<bf16>::zeroed(rows * vocab, 0);
    logits.write((rows - 1) * vocab + target, &[bf16::from_f32(10.0)]);
    let mut ids = vec![-100; rows];
    ids[rows - 1] = target as i64;
    let ids = Buffer::new(&ids, 0);
    let mut logp = Buffer::new(&vec![f32::NAN; rows], 0);
    let stream = stream(machine(Order::Fifo, MANY, 8));
    let options = LogprobOptions { ignore_index: Some(-100), ..Default::default() };
    let outputs = only(&mut logp);
    let inputs = ForwardInputs { logits: logits.slice(), targets: ids.slice() };
    cuda::forward(&stream, inputs, rows, vocab, &options, outputs).unwrap();
    let expected = 10.0 - (vocab as f64 - 1.0 + 10f64.exp()).ln();
    let logp = wide(&logp.read());
    assert!(logp[..rows - 1].iter().all(|&logp| logp == 0.0));
    assert_close("last row", &logp[rows - 1..], &[expected], REL, ABS);
}

#[test]
fn bits_do_not_depend_on_the_other_rows() {
    let mut rng = rng(2);
    for vocab in [37, 3001, 50257] {
        let rows = 9;
        let logits = narrow::<bf16>(&uniform(&mut rng, rows * vocab, 8.0));
        let targets: Vec<u32> = (0..rows).map(|_| rng.random_range(0..vocab as u32)).collect();
        let up = uniform(&mut rng, rows, 1.0);
        let call = |from: usize, to: usize| {
            let call = Call {
                machine: machine(Order::Fifo, MANY, 1 << 20),
                offset: 0,
                logits: &logits[from * vocab..to * vocab],
                targets: &targets[from..to],
                vocab,
                options: LogprobOptions::default(),
                up_logp: &up[from..to],
                up_entropy: &up[from..to],
                in_place: false,
            };
            call.run().unwrap()
        };
        let whole = call(0, rows);
        for row in [0, 3, rows - 1] {
            let alone = call(row, row + 1);
            assert_eq!(alone.logp[0].to_bits(), whole.logp[row].to_bits());
            assert_eq!(alone.entropy[0].to_bits(), whole.entropy[row].to_bits());
            assert!(alone.grad[..] == whole.grad[row * vocab..][..vocab]);
        }
    }
}

#[test]
fn special_rows_come_out_as_on_the_cpu() {
    for (vocab, multiprocessors) in [(5, MANY), (3000, MANY), (40_000, MANY), (40_000, FEW)] {
        let rows = 7;
        let mut logits = vec![0.5_f32; rows * vocab];
        let row = |i: usize| i * vocab..(i + 1) * vocab;
        logits[vocab / 2] = f32::NAN;
        logits[vocab + vocab / 2] = f32::INFINITY;
        logits[row(2)].fill(f32::NEG_INFINITY);
        logits[row(3)].fill(f32::NEG_INFINITY);
        logits[4 * vocab - 1] = 2.0;
        logits[row(4)].fill(f32::NAN); // ignored
        logits[row(5)].fill(f32::NAN); // no upstream gradient
        let last = vocab as i64 - 1;
        let targets = [0, 0, 0, last, -100, 0, last];
        let up_logp = [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0];
        let up_entropy = [0.5, 0.5, 0.5, 0.5, 0.5, 0.0, 0.5];
        let options = LogprobOptions { ignore_index: Some(-100), ..Default::default() };
        let machine = machine(Order::Random(3), multiprocessors, 1 << 20);
        let call = Call {
            machine,
            offset: 1,
            logits: &logits,
            targets: &targets,
            vocab,
            options,
            up_logp: &up_logp,
            up_entropy: &up_entropy,
            in_place: true,
        };
        let run = call.run().unwrap();

        let mut want = [(); 4].map(|()| vec![0.0; rows]);
        let [logp, entropy, max, log_sum] = &mut want;
        let outputs = cpu::ForwardOutputs {
            logp,
            entropy: Some(entropy),
            max: Some(max),
            log_sum: Some(log_sum),
        };
        let forward = cpu::ForwardInputs { logits: &logits, targets: &targets };
        cpu::forward(forward, rows, vocab, &options, outputs).unwrap();
        let [logp, entropy, max, log_sum] = &want;
        assert_close("logp", &wide(&run.logp), &wide(logp), REL, ABS);
        assert_close("entropy", &wide(&run.entropy), &wide(entropy), REL, ABS);
        assert_close("log_sum", &wide(&run.log_sum), &wide(log_sum), REL, ABS);
        let finite = [3, 4, 6];
        for i in finite {
            assert_eq!(run.max[i], max[i]);
        }
        let inputs = cpu::BackwardInputs {
            forward,
            max,
            log_sum,
            entropy: Some(entropy),
            grad_logp: Some(&up_logp),
            grad_entropy: Some(&up_entropy),
        };
        let mut grad = vec![0.0; logits.len()];
        let outputs = cpu::BackwardOutputs { grad_logits: &mut grad };
        cpu::backward(inputs, rows, vocab, &options, outputs).unwrap();
        assert_close("grad", &wide(&run.grad), &wide(&grad), REL, ABS);
    }
}

#[test]
fn a_target_outside_the_vocabulary_makes_its_row_nan() {
    for (vocab, multiprocessors) in [(5, MANY), (3000, MANY), (40_000, MANY), (40_000, FEW)] {
        let logits = vec![0.5_f32; 4 * vocab];
        let targets = [0, vocab as i64, i64::MIN, 1];
        let call = Call {
            machine: machine(Order::Lifo, multiprocessors, 1 << 20),
            offset: 0,
            logits: &logits,
            targets: &targets,
            vocab,
            options: LogprobOptions::default(),
            up_logp: &[1.0; 4],
            up_entropy: &[0.0; 4],
            in_place: false,
        };
        let run = call.run().unwrap();
        for row in 0..4 {
            let bad = row == 1 || row == 2;
            assert_eq!(run.logp[row].is_nan(), bad);
            assert_eq!(run.entropy[row].is_nan(), bad);
            assert!(run.grad[row * vocab..][..vocab].iter().all(|g| g.is_nan() == bad));
        }
    }
}

#[test]
fn a_vocabulary_of_a_million_and_no_rows_at_all_work() {
    let vocab = 1_000_000;
    let logits = narrow::<bf16>(&uniform(&mut rng(3), vocab, 5.0));
    let z: Vec<f64> = logits.iter().map(|z| f64::from(z.to_f32())).collect();
    let run = |logits: &[bf16], targets: &[u32], up: &[f32]| {
        let call = Call {
            machine: machine(Order::Fifo, MANY, 1 << 20),
            offset: 0,
            logits,
            targets,
            vocab,
            options: LogprobOptions::default(),
            up_logp: up,
            up_entropy: up,
            in_place: false,
        };
        call.run().unwrap()
    };
    let one = run(&logits, &[999_999], &[1.0]);
    let (logp, entropy) = reference::forward(&z, &[999_999], vocab, &LogprobOptions::default());
    assert_close("logp", &wide(&one.logp), &logp, REL, ABS);
    assert_close("entropy", &wide(&one.entropy), &entropy, REL, ABS);
    assert!(run(&[], &[], &[]).logp.is_empty());
}

#[test]
fn bad_input_is_refused_by_name() {
    let stream = stream(machine(Order::Fifo, FEW, 1 << 20));
    let (logits, targets) = (Buffer::new(&[0.0_f32; 6], 0), Buffer::new(&[0_u32; 2], 0));
    let forward = |logits, targets, vocab, temperature, logp: usize| {
        let inputs = ForwardInputs::<f32, u32> { logits, targets };
        let mut logp = Buffer::new(&vec![0.0; logp], 0);
        let options = LogprobOptions { temperature, ..Default::default() };
        cuda::forward(&stream, inputs, 2, vocab, &options, only(&mut logp))
    };
    let error = forward(logits.slice(), targets.slice(), 3, 0.0, 2).unwrap_err();
    assert!(matches!(error, Error::Option { option: "temperature", .. }), "{error}");
    let error = forward(logits.slice(), targets.slice(), 4, 1.0, 2).unwrap_err();
    assert!(matches!(error, Error::Shape { arg: "logits", .. }), "{error}");
    let error = forward(logits.slice(), targets.slice(), 0, 1.0, 2).unwrap_err();
    assert!(matches!(error, Error::Shape { arg: "logits", .. }), "{error}");
    let error = forward(logits.slice(), targets.slice(), 3, 1.0, 1).unwrap_err();
    assert!(matches!(error, Error::Shape { arg: "logp", .. }), "{error}");
}

#[cfg(feature = "simt")]
mod planted {
    use super::*;
    use common::device::{goes_unseen, ORDERS};

    fn unseen(bug: &'static str, orders: &[Order]) -> bool {
        let run = || agrees_with_the_reference::<bf16>(bug, orders);
        goes_unseen(run)
    }

    #[test]
    fn planted_bugs_that_change_results_are_seen() {
        let bugs = [
            "read_past_the_row",
            "dropped_tail",
            "misaligned_load",
            "maximum_counted_twice",
            "lost_loser",
        ];
        for bug in bugs {
            for order in ORDERS {
                assert!(!unseen(bug, &[order, order]), "{bug} {order:?}");
            }
        }
    }

    #[test]
    fn planted_races_are_seen_in_one_of_the_orders() {
        let seeds: Vec<Order> = (0..4).map(Order::Random).collect();
        let orders = [&ORDERS[..2], &seeds].concat();
        for bug in ["missing_barrier", "missing_barrier_of_parts", "shared_memory_race"] {
            assert!(!unseen(bug, &orders), "{bug}");
        }
    }

    /// Run by `.ci/simt` under a sanitizer, which must end the process.
    #[test]
    #[ignore = "ends the process under a sanitizer"]
    fn a_planted_bug_for_a_sanitizer() {
        let bug = std::env::var("PLANTED_BUG").unwrap();
        let name = [
            "read_past_the_row",
            "missing_barrier",
            "missing_barrier_of_parts",
            "shared_memory_race",
        ]
        .into_iter()
        .find(|name| *name == bug)
        .unwrap();
        // An order that hides the bug from the results, where there is one.
        agrees_with_the_reference::<bf16>(name, &[Order::Lifo]).unwrap();
    }
}
