//! The CUDA kernels of the kl op, on a GPU or on the CPU stand-in: every option, dtype, mapping and
//! thread order against the f64 reference, and bugs planted in the kernels, which must not go
//! unseen.
#![cfg(any(feature = "simt", feature = "cuda"))]

mod common;

use approx::abs_diff_eq;
use common::device::{
    blocks_and_kinds, machine, orders, stream, vocabularies, Buffer, Machine, Order, FEW, MANY,
};
use common::kl_cases::{
    all_full_options, all_token_options, check_unlikely, pairs_of, special_row, ROWS, UNLIKELY,
};
use common::*;
use half::{bf16, f16};
use ppo_kernels::cpu::Logit;
use ppo_kernels::kl::cuda::{
    self, FullBackwardInputs, FullBackwardOutputs, FullForwardInputs, FullForwardOutputs,
    TokenBackwardInputs, TokenBackwardOutputs, TokenForwardInputs, TokenForwardOutputs,
};
use ppo_kernels::kl::{cpu, reference, Divergence, FullKlOptions, KlEstimator, KlOptions, STATS};
use ppo_kernels::tolerance;
use ppo_kernels::{Error, Result};

const REL: f64 = tolerance::FULL_KL.tests.rel;
const ABS: f64 = tolerance::FULL_KL.tests.abs;

/// With every NaN as one: which of two an instruction passes on is the machine's business.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() }).collect()
}

/// f32 values rounded to `T`.
fn narrow<T: Logit>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&x| T::from_f32(x)).collect()
}

fn to_f32<T: Logit>(values: &[T]) -> Vec<f32> {
    values.iter().map(|x| x.to_f32()).collect()
}

fn to_f64<T: Logit>(values: &[T]) -> Vec<f64> {
    wide(&to_f32(values))
}

/// One call of each pass of the sampled KL.
struct TokenCall<'a> {
    machine: Machine,
    /// Elements from a 16-byte boundary to logp, ref_logp, mask and gradient.
    offsets: [usize; 4],
    logp: &'a [f32],
    ref_logp: &'a [f32],
    mask: Option<&'a [u8]>,
    up: &'a [f32],
    options: KlOptions,
    in_place: bool,
}

impl TokenCall<'_> {
    /// The KL, and the gradients to logp and ref_logp.
    fn run(&self) -> Result<[Vec<f32>; 3]> {
        let stream = stream(self.machine);
        let [at_logp, at_ref, at_mask, at_up] = self.offsets;
        let mut logp = Buffer::new(self.logp, at_logp);
        let mut ref_logp = Buffer::new(self.ref_logp, at_ref);
        let mask = self.mask.map(|mask| Buffer::new(mask, at_mask));
        let up = Buffer::new(self.up, at_up);
        let empty = |offset| Buffer::new(&vec![f32::NAN; self.logp.len()], offset);
        let (mut kl, mut grad, mut grad_ref) = (empty(at_logp), empty(at_logp), empty(at_up));
        let inputs = TokenForwardInputs {
            logp: logp.slice(),
            ref_logp: ref_logp.slice(),
            mask: mask.as_ref().map(Buffer::slice),
        };
        let (tokens, options) = (self.logp.len(), &self.options);
        let outputs = TokenForwardOutputs { kl: kl.slice_mut() };
        cuda::token_forward(&stream, inputs, tokens, options, outputs)?;
        let inputs = TokenBackwardInputs { forward: inputs, grad_kl: up.slice() };
        let backward = |grad_logp, grad_ref_logp| {
            let outputs = TokenBackwardOutputs { grad_logp, grad_ref_logp };
            cuda::token_backward(&stream, inputs, tokens, options, outputs)
        };
        backward(Some(grad.slice_mut()), None)?;
        backward(None, Some(grad_ref.slice_mut()))?;
        let (apart, apart_ref) = (grad.read(), grad_ref.read());
        if self.in_place {
            backward(Some(logp.slice_mut()), Some(ref_logp.slice_mut()))?;
            assert!(bits(&logp.read()) == bits(&apart), "both, and in place");
            assert!(bits(&ref_logp.read()) == bits(&apart_ref), "both, and in place");
        } else {
            backward(Some(grad.slice_mut()), Some(grad_ref.slice_mut()))?;
            assert!(bits(&grad.read()) == bits(&apart), "one and both");
            assert!(bits(&grad_ref.read()) == bits(&apart_ref), "one and both");
        }
        Ok([kl.read(), apart, apart_ref])
    }
}

fn tokens_agree_with_the_reference(planted_bug: &'static str, orders: &[Order]) -> Result<()> {
    let mut rng = rng(1);
    for n in [1, 3, 4, 7, 1023, 2048, 2053, 10_007] {
        let (mut logp, base) = (uniform(&mut rng, n, 6.0), uniform(&mut rng, n, 6.0));
        let (mask, up) = (random_mask(&mut rng, n, 0.7), uniform(&mut rng, n, 1.0));
        let plain = logp.clone();
        for (logp, &keep) in logp.iter_mut().zip(&mask) {
            *logp = if keep == 0 { f32::NAN } else { *logp };
        }
        for (case, options) in all_token_options().into_iter().enumerate() {
            let (logp, mask) =
                if case % 2 == 0 { (&plain, None) } else { (&logp, Some(mask.as_slice())) };
            let mut first = None;
            for (i, &order) in orders.iter().enumerate() {
                let call = TokenCall {
                    machine: Machine { planted_bug, ..machine(order, MANY, 2) },
                    // Aligned, alike, and each in its own way.
                    offsets: [[0; 4], [1; 4], [1, 2, 3, 3], [3, 0, 4, 1]][(i + case) % 4],
                    logp,
                    ref_logp: &base,
                    mask,
                    up: &up,
                    options,
                    in_place: i % 2 == 1,
                };
                let run = call.run()?;
                let what = format!("{options:?} n={n} {order:?}");
                let (a, b, g) = (wide(logp), wide(&base), wide(&up));
                let kl = reference::token_kl(&a, &b, mask, &options);
                let (grad, grad_ref) = reference::token_kl_backward(&a, &b, mask, &g, &options);
                for (got, want) in run.iter().zip([kl, grad, grad_ref]) {
                    assert_close(&what, &wide(got), &want, REL, ABS);
                }
                let bits = run.map(|values| bits(&values));
                let first = first.get_or_insert_with(|| bits.clone());
                assert!(*first == bits, "{what}: bits depend on order or alignment");
            }
        }
    }
    Ok(())
}

#[test]
fn tokens_agree_with_the_reference_in_every_order() {
    tokens_agree_with_the_reference("", orders()).unwrap();
}

#[test]
fn tokens_come_out_as_on_the_cpu_at_any_size_of_the_log_ratio() {
    let line = |step: f32| (0..6000).map(move |i| (i - 3000) as f32 * step);
    let special = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.0, -0.0, 1.0, -1.0, 3.0, -4.0];
    let d: Vec<f32> = special.into_iter().chain(line(0.03)).chain(line(3e-6)).collect();
    let zeros = vec![0.0; d.len()];
    let up: Vec<f32> = (0..d.len()).map(|i| if i % 7 == 0 { 0.0 } else { 1.5 }).collect();
    for options in all_token_options() {
        let call = TokenCall {
            machine: machine(Order::Fifo, MANY, 1 << 20),
            offsets: [0; 4],
            logp: &d,
            ref_logp: &zeros,
            mask: None,
            up: &up,
            options,
            in_place: false,
        };
        let [kl, grad, grad_ref] = call.run().unwrap();
        let inputs = cpu::TokenForwardInputs { logp: &d, ref_logp: &zeros, mask: None };
        let mut want = [(); 3].map(|()| zeros.clone());
        let [want_kl, want_grad, want_ref] = &mut want;
        let outputs = cpu::TokenForwardOutputs { kl: want_kl };
        cpu::token_forward(inputs, d.len(), &options, outputs).unwrap();
        let inputs = cpu::TokenBackwardInputs { forward: inputs, grad_kl: &up };
        let outputs =
            cpu::TokenBackwardOutputs { grad_logp: Some(want_grad), grad_ref_logp: Some(want_ref) };
        cpu::token_backward(inputs, d.len(), &options, outputs).unwrap();
        // Relative throughout: k3 of a small log-ratio is smaller than any absolute bound. The exp of
        // each is good for 2 ulp, of which the sum next to d = -1 makes four times as much.
        for (got, want) in [(kl, want_kl), (grad, want_grad), (grad_ref, want_ref)] {
            assert_close(&format!("{options:?}"), &wide(&got), &wide(want), 2e-6, 0.0);
        }
    }
}

/// One call of each pass of the exact KL.
struct FullCall<'a, T> {
    machine: Machine,
    /// Elements from a 16-byte boundary to the first row of logits, reference logits, and their
    /// gradients.
    offsets: [usize; 4],
    logits: &'a [T],
    ref_logits: &'a [T],
    vocab: usize,
    mask: Option<&'a [u8]>,
    up: &'a [f32],
    options: FullKlOptions,
    in_place: bool,
}

/// What both passes write.
struct FullRun {
    stats: Vec<f32>,
    grad: Vec<f32>,
    grad_ref: Vec<f32>,
}

impl FullRun {
    fn kl(&self) -> &[f32] {
        &self.stats[..self.stats.len() / STATS]
    }

    fn bits(&self) -> Vec<u32> {
        [&self.stats, &self.grad, &self.grad_ref].into_iter().flat_map(|x| bits(x)).collect()
    }
}

impl<T: Logit> FullCall<'_, T> {
    fn run(&self) -> Result<FullRun> {
        let stream = stream(self.machine);
        let (len, vocab) = (self.logits.len(), self.vocab);
        let rows = len / vocab;
        let [at_z, at_w, at_grad, at_ref] = self.offsets;
        let mut z = Buffer::new(self.logits, at_z);
        let mut w = Buffer::new(self.ref_logits, at_w);
        let mask = self.mask.map(|mask| Buffer::new(mask, at_w));
        let up = Buffer::new(self.up, 0);
        let mut stats = Buffer::new(&vec![f32::NAN; STATS * rows], 0);
        let forward = FullForwardInputs {
            logits: z.slice(),
            ref_logits: w.slice(),
            mask: mask.as_ref().map(Buffer::slice),
        };
        let options = &self.options;
        let outputs = FullForwardOutputs { stats: stats.slice_mut() };
        cuda::full_forward(&stream, forward, rows, vocab, options, outputs)?;

        let empty = |offset| Buffer::new(&vec![T::from_f32(1.0); len], offset);
        let (mut grad, mut grad_ref) = (empty(at_grad), empty(at_ref));
        let inputs = FullBackwardInputs { forward, stats: stats.slice(), grad_kl: up.slice() };
        let backward = |grad_logits, grad_ref_logits| {
            let outputs = FullBackwardOutputs { grad_logits, grad_ref_logits };
            cuda::full_backward(&stream, inputs, rows, vocab, options, outputs)
        };
        backward(Some(grad.slice_mut()), None)?;
        backward(None, Some(grad_ref.slice_mut()))?;
        let (apart, apart_ref) = (to_f32(&grad.read()), to_f32(&grad_ref.read()));
        let (a, b) = if self.in_place { (&mut z, &mut w) } else { (&mut grad, &mut grad_ref) };
        backward(Some(a.slice_mut()), Some(b.slice_mut()))?;
        assert!(bits(&to_f32(&a.read())) == bits(&apart), "both, and in place");
        assert!(bits(&to_f32(&b.read())) == bits(&apart_ref), "both, and in place");
        Ok(FullRun { stats: stats.read(), grad: apart, grad_ref: apart_ref })
    }
}

#[test]
fn gradients_of_unlikely_tokens_are_right_down_to_the_least_float() {
    for up in [1.0, 1e20, 1e-15] {
        let call = FullCall {
            machine: machine(Order::Fifo, MANY, 4),
            offsets: [0; 4],
            logits: &UNLIKELY[0],
            ref_logits: &UNLIKELY[1],
            vocab: 8,
            mask: None,
            up: &[up],
            options: FullKlOptions::default(),
            in_place: false,
        };
        let run = call.run().unwrap();
        check_unlikely([&run.grad, &run.grad_ref], up, true);
    }
}

/// Every case against the reference, all orders, parts side by side and one after the other.
fn agrees_with_the_reference<T: Logit>(planted_bug: &'static str, orders: &[Order]) -> Result<()> {
    let (mut rng, all) = (rng(2), all_full_options());
    for (round, vocab) in vocabularies::<T>().into_iter().enumerate() {
        let (blocks, kinds) = blocks_and_kinds::<T>(vocab);
        for (case, pair) in pairs_of(&mut rng, vocab).into_iter().enumerate().take(kinds) {
            let (logits, ref_logits) = (narrow::<T>(&pair.z), narrow::<T>(&pair.w));
            let up = uniform(&mut rng, ROWS, 1.0);
            let options = all[(round + case) % all.len()];
            let (z, w) = (to_f64(&logits), to_f64(&ref_logits));
            let kl = reference::full_kl(&z, &w, vocab, None, &options);
            let grads = reference::full_kl_backward(&z, &w, vocab, None, &wide(&up), &options);
            // x - y - gap is a difference of terms as large as the KL, each good for some units in
            // the last place.
            let largest = kl.iter().copied().filter(|kl| kl.is_finite()).fold(0.0, f64::max);
            let abs = ABS + 4.0 * f64::from(f32::EPSILON) * largest;
            // Half a unit in the last place of the gradient's own type.
            let rel = match T::NAME {
                "bf16" => 2f64.powi(-8),
                "f16" => 2f64.powi(-11),
                _ => REL,
            };
            let mut first: Option<Vec<u32>> = None;
            for (i, &order) in orders.iter().enumerate() {
                let call = FullCall {
                    // Parts of a row side by side, and one after the other.
                    machine: Machine { planted_bug, ..machine(order, [MANY, FEW][i % 2], blocks) },
                    // Aligned, alike, and each in its own way.
                    offsets: [[0; 4], [1; 4], [1, 3, 0, 0], [2, 1, 5, 6]][(i + case) % 4],
                    logits: &logits,
                    ref_logits: &ref_logits,
                    vocab,
                    mask: None,
                    up: &up,
                    options,
                    in_place: i == 1,
                };
                let run = call.run()?;
                let what = format!("{} V={vocab} {} {options:?} {order:?}", pair.name, T::NAME);
                assert_close(&what, &wide(run.kl()), &kl, REL, ABS);
                assert_close(&format!("{what} policy"), &wide(&run.grad), &grads.0, rel, abs);
                assert_close(
                    &format!("{what} reference"),
                    &wide(&run.grad_ref),
                    &grads.1,
                    rel,
                    abs,
                );
                if pair.name == "equal" {
                    assert!(run.kl().iter().all(|&kl| kl == 0.0), "{what}: {:?}", run.kl());
                }
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

/// A call on f32 logits with all that the tests below have in common.
fn call<'a>(
    machine: Machine,
    z: &'a [f32],
    w: &'a [f32],
    vocab: usize,
    up: &'a [f32],
    options: FullKlOptions,
) -> FullCall<'a, f32> {
    let offsets = [1, 2, 1, 3];
    let (mask, in_place) = (None, false);
    FullCall { machine, offsets, logits: z, ref_logits: w, vocab, mask, up, options, in_place }
}

/// Vocabularies of a warp, a block and several parts, these side by side and one after the other.
const MAPPINGS: [(usize, u32); 4] = [(5, MANY), (3000, MANY), (70_000, MANY), (70_000, FEW)];

#[test]
fn bits_do_not_depend_on_the_other_rows() {
    let mut rng = rng(3);
    for vocab in [37, 3001, 50_257] {
        let rows = 9;
        let z = narrow::<bf16>(&uniform(&mut rng, rows * vocab, 8.0));
        let w = narrow::<bf16>(&uniform(&mut rng, rows * vocab, 8.0));
        let up = uniform(&mut rng, rows, 1.0);
        let run = |from: usize, to: usize| {
            let call = FullCall {
                machine: machine(Order::Fifo, MANY, 1 << 20),
                offsets: [0; 4],
                logits: &z[from * vocab..to * vocab],
                ref_logits: &w[from * vocab..to * vocab],
                vocab,
                mask: None,
                up: &up[from..to],
                options: FullKlOptions::default(),
                in_place: false,
            };
            call.run().unwrap()
        };
        let whole = run(0, rows);
        for row in [0, 3, rows - 1] {
            let alone = run(row, row + 1);
            for stat in 0..STATS {
                assert_eq!(alone.stats[stat].to_bits(), whole.stats[stat * rows + row].to_bits());
            }
            let columns = row * vocab..(row + 1) * vocab;
            assert!(bits(&alone.grad) == bits(&whole.grad[columns.clone()]));
            assert!(bits(&alone.grad_ref) == bits(&whole.grad_ref[columns]));
        }
    }
}

#[test]
fn special_rows_come_out_as_on_the_cpu() {
    for (vocab, multiprocessors) in MAPPINGS {
        for options in all_full_options() {
            let rows = 10;
            let mut z = uniform(&mut rng(4), rows * vocab, 2.0);
            let mut w = uniform(&mut rng(5), rows * vocab, 2.0);
            let row = |i: usize| i * vocab..(i + 1) * vocab;
            z[vocab / 2] = f32::NAN;
            w[vocab + vocab / 2] = f32::INFINITY;
            w[row(2)].fill(f32::NEG_INFINITY);
            z[row(3)].fill(f32::NEG_INFINITY);
            z[row(4)].fill(f32::NAN); // masked
            w[row(5)].fill(f32::NAN); // no upstream gradient
            w[7 * vocab - 1] = f32::NEG_INFINITY; // excluded by one
            (z[8 * vocab - 1], w[8 * vocab - 1]) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
            z[9 * vocab - 2] = f32::NEG_INFINITY;
            let mut mask = vec![1; rows];
            mask[4] = 0;
            let mut up = vec![0.5; rows];
            up[5] = 0.0;
            let machine = machine(Order::Random(3), multiprocessors, 1 << 20);
            let run = FullCall {
                mask: Some(&mask),
                in_place: true,
                ..call(machine, &z, &w, vocab, &up, options)
            };
            let run = run.run().unwrap();

            let forward = cpu::FullForwardInputs { logits: &z, ref_logits: &w, mask: Some(&mask) };
            let mut stats = vec![0.0; STATS * rows];
            let outputs = cpu::FullForwardOutputs { stats: &mut stats };
            cpu::full_forward(forward, rows, vocab, &options, outputs).unwrap();
            assert_close("kl", &wide(run.kl()), &wide(&stats[..rows]), REL, ABS);
            let mut grads = (z.clone(), w.clone());
            let inputs = cpu::FullBackwardInputs { forward, stats: &stats, grad_kl: &up };
            let outputs = cpu::FullBackwardOutputs {
                grad_logits: Some(&mut grads.0),
                grad_ref_logits: Some(&mut grads.1),
            };
            cpu::full_backward(inputs, rows, vocab, &options, outputs).unwrap();
            assert_close("policy", &wide(&run.grad), &wide(&grads.0), REL, ABS);
            assert_close("reference", &wide(&run.grad_ref), &wide(&grads.1), REL, ABS);
            for i in [6, 7, 8, 9] {
                for (stat, rel) in [(2, 0.0), (3, REL), (4, 0.0), (5, REL)] {
                    let (got, want) = (run.stats[stat * rows + i], stats[stat * rows + i]);
                    assert_close("stats", &[f64::from(got)], &[f64::from(want)], rel, 0.0);
                }
            }
        }
    }
}

#[test]
fn special_values_anywhere_give_what_the_reference_gives() {
    let mut rng = rng(6);
    let (mut finite, mut infinite, mut nan) = (0, 0, 0);
    for vocab in [1, 2, 5, 16, 17, 40, 1030] {
        for options in all_full_options() {
            let rows = 60;
            let pairs: Vec<_> = (0..rows).map(|_| special_row(&mut rng, vocab)).collect();
            let (z, w): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
            let (z, w, up) = (z.concat(), w.concat(), vec![1.0; rows]);
            let run = call(machine(Order::Lifo, MANY, 3), &z, &w, vocab, &up, options);
            let run = run.run().unwrap();
            let (z, w, up) = (wide(&z), wide(&w), wide(&up));
            let kl = reference::full_kl(&z, &w, vocab, None, &options);
            let grads = reference::full_kl_backward(&z, &w, vocab, None, &up, &options);
            assert_close(&format!("{options:?} {vocab}"), &wide(run.kl()), &kl, REL, ABS);
            for (row, kl) in kl.into_iter().enumerate() {
                match kl {
                    x if x.is_finite() => finite += 1,
                    x if x.is_nan() => nan += 1,
                    _ => infinite += 1,
                }
                let columns = row * vocab..(row + 1) * vocab;
                // The gradient is p times differences of terms as large as the KL.
                let abs = 4.0 * ABS + REL * if kl.is_finite() { kl } else { 0.0 };
                for (got, want) in [(&run.grad, &grads.0), (&run.grad_ref, &grads.1)] {
                    let what =
                        format!("{options:?} {:?} {:?}", &z[columns.clone()], &w[columns.clone()]);
                    let (got, want) = (wide(&got[columns.clone()]), &want[columns.clone()]);
                    assert_close(&what, &got, want, REL, abs);
                }
            }
        }
    }
    assert!(finite > 300 && infinite > 100 && nan > 100, "{finite} {infinite} {nan}");
}

#[test]
fn a_token_the_reference_excludes_makes_the_kl_infinite() {
    for (vocab, multiprocessors) in MAPPINGS {
        let (mut z, mut w) = (vec![0.0; vocab], vec![1.0; vocab]);
        w[0] = f32::NEG_INFINITY;
        // Columns after it are larger by more than any exp can carry, and p[0] is nothing in f32.
        z[vocab - 1] = 2000.0;
        for options in all_full_options() {
            let machine = machine(Order::Fifo, multiprocessors, 1 << 20);
            let run = call(machine, &z, &w, vocab, &[0.5], options).run().unwrap();
            let (z64, w64) = (wide(&z), wide(&w));
            let kl = reference::full_kl(&z64, &w64, vocab, None, &options);
            let grads = reference::full_kl_backward(&z64, &w64, vocab, None, &[0.5], &options);
            assert_eq!(kl[0] == f64::INFINITY, options.divergence == Divergence::Forward);
            assert_close("kl", &wide(run.kl()), &kl, REL, ABS);
            assert_close("policy", &wide(&run.grad), &grads.0, REL, ABS);
            assert_close("reference", &wide(&run.grad_ref), &grads.1, REL, ABS);
        }
        z[0] = f32::NEG_INFINITY;
        let machine = machine(Order::Fifo, multiprocessors, 1 << 20);
        let run = call(machine, &z, &w, vocab, &[0.5], FullKlOptions::default()).run().unwrap();
        assert!(run.kl()[0].is_finite());
    }
}

#[test]
fn the_lowest_float_serves_as_a_mask() {
    for (vocab, multiprocessors) in MAPPINGS {
        // What the reference leaves out, the policy leaves out as well; and a row of nothing else.
        let (mut z, mut w) = (vec![f32::MIN; 2 * vocab], vec![f32::MIN; 2 * vocab]);
        for column in 0..vocab {
            z[column] = if column % 2000 == 4 { 0.5 } else { f32::MIN };
            w[column] = if column % 5 == 4 { column as f32 * 1e-5 } else { f32::MIN };
        }
        for temperature in [1.0, 0.7, 2.5] {
            let options = FullKlOptions { temperature, ..Default::default() };
            let machine = machine(Order::Fifo, multiprocessors, 1 << 20);
            let run = call(machine, &z, &w, vocab, &[1.0; 2], options).run().unwrap();
            let (z, w, up) = (wide(&z), wide(&w), [1.0; 2]);
            let kl = reference::full_kl(&z, &w, vocab, None, &options);
            let grads = reference::full_kl_backward(&z, &w, vocab, None, &up, &options);
            assert!(kl[0].is_finite() && kl[1] == 0.0);
            assert_close("kl", &wide(run.kl()), &kl, REL, ABS);
            assert_close("policy", &wide(&run.grad), &grads.0, REL, ABS);
            assert_close("reference", &wide(&run.grad_ref), &grads.1, REL, ABS);
        }
    }
}

#[test]
fn any_legal_temperature_is_taken() {
    let mut rng = rng(7);
    let vocab = 3000;
    let (z, w) = (uniform(&mut rng, vocab, 4.0), uniform(&mut rng, vocab, 4.0));
    for temperature in [1e-30, 1e-4, 1e4, 1e30] {
        for (z, w) in [(&z, &w), (&z, &z)] {
            let options = FullKlOptions { temperature, ..Default::default() };
            let run = call(machine(Order::Fifo, MANY, 1 << 20), z, w, vocab, &[1.0], options);
            let got = f64::from(run.run().unwrap().kl()[0]);
            let want = reference::full_kl(&wide(z), &wide(w), vocab, None, &options)[0];
            // With one column left, e^x of the others is as far off as x is large.
            assert!(
                abs_diff_eq!(got, want, epsilon = 1e-5 * want.abs() + ABS),
                "{temperature}: {got} {want}"
            );
        }
    }
}

#[test]
fn nearly_equal_models_keep_their_digits() {
    let mut rng = rng(8);
    let vocab = 50_257;
    let z = uniform(&mut rng, vocab, 8.0);
    for nudge in [1e-1, 1e-2, 1e-3, 1e-5] {
        let shift = uniform(&mut rng, vocab, nudge);
        let w: Vec<f32> = z.iter().zip(&shift).map(|(z, shift)| z + shift).collect();
        for options in all_full_options() {
            let machine = machine(Order::Fifo, MANY, 1 << 20);
            let run = call(machine, &z, &w, vocab, &[1.0], options).run().unwrap();
            let kl = f64::from(run.kl()[0]);
            let want = reference::full_kl(&wide(&z), &wide(&w), vocab, None, &options)[0];
            // Some roundings of P and Q, of which the KL is left when they have cancelled.
            assert!(
                kl >= 0.0 && abs_diff_eq!(kl, want, epsilon = 3e-7 + 1e-6 * want),
                "{nudge}: {kl} {want}"
            );
        }
    }
    // And none of it is lost to an offset between the two.
    let z: Vec<f32> = z.iter().map(|z| (z * 64.0).round() / 64.0).collect();
    let w: Vec<f32> = z.iter().map(|z| z + 1e4).collect();
    let machine = machine(Order::Fifo, MANY, 1 << 20);
    let run = call(machine, &z, &w, vocab, &[1.0], FullKlOptions::default()).run().unwrap();
    assert_eq!(run.kl(), [0.0]);
    assert!(run.grad.iter().chain(&run.grad_ref).all(|&g| g == 0.0));
}

#[test]
fn maxima_that_grow_along_the_rows_cost_no_digits() {
    let vocab = 100_003;
    let ramp = |slope: f32| (0..vocab).map(|i| i as f32 * slope).collect::<Vec<f32>>();
    let (slopes, all) = ([1e-3, -1e-3, 2e-5, -2e-5], all_full_options());
    for (i, (a, b)) in slopes.into_iter().flat_map(|a| slopes.map(|b| (a, b))).enumerate() {
        let (z, w) = (ramp(a), ramp(b));
        let options = all[(i + i / 4) % all.len()];
        let machine = machine(Order::Fifo, FEW, 1 << 20);
        let run = call(machine, &z, &w, vocab, &[1.0], options).run().unwrap();
        let kl = f64::from(run.kl()[0]);
        let want = reference::full_kl(&wide(&z), &wide(&w), vocab, None, &options)[0];
        assert!(abs_diff_eq!(kl, want, epsilon = ABS + REL * want), "{a} {b}: {kl} {want}");
    }
}

#[test]
fn a_vocabulary_of_a_million_and_nothing_at_all_work() {
    let mut rng = rng(9);
    let vocab = 1_000_000;
    let z = narrow::<bf16>(&uniform(&mut rng, vocab, 5.0));
    let w = narrow::<bf16>(&uniform(&mut rng, vocab, 5.0));
    let options = FullKlOptions::default();
    let run = |z: &[bf16], w: &[bf16], up: &[f32]| {
        let call = FullCall {
            machine: machine(Order::Fifo, MANY, 1 << 20),
            offsets: [0; 4],
            logits: z,
            ref_logits: w,
            vocab,
            mask: None,
            up,
            options,
            in_place: false,
        };
        call.run().unwrap()
    };
    let one = run(&z, &w, &[1.0]);
    let want = reference::full_kl(&to_f64(&z), &to_f64(&w), vocab, None, &options);
    assert_close("kl", &wide(one.kl()), &want, REL, ABS);
    assert!(run(&[], &[], &[]).kl().is_empty());
    let none = TokenCall {
        machine: machine(Order::Fifo, MANY, 1 << 20),
        offsets: [0; 4],
        logp: &[],
        ref_logp: &[],
        mask: Some(&[]),
        up: &[],
        options: KlOptions::default(),
        in_place: false,
    };
    assert!(none.run().unwrap().iter().all(Vec::is_empty));
}

#[test]
fn bad_token_input_is_refused_by_name() {
    let stream = stream(machine(Order::Fifo, MANY, 1 << 20));
    let ok = KlOptions { estimator: KlEstimator::K3, ..Default::default() };
    let buffer = |len: usize| Buffer::new(&vec![0.0_f32; len], 0);
    let forward = |base: usize, mask: usize, kl: usize, options: KlOptions| {
        let (a, b, mask) = (buffer(3), buffer(base), Buffer::new(&vec![1_u8; mask], 0));
        let (logp, ref_logp, mask) = (a.slice(), b.slice(), Some(mask.slice()));
        let inputs = TokenForwardInputs { logp, ref_logp, mask };
        let mut kl = buffer(kl);
        let outputs = TokenForwardOutputs { kl: kl.slice_mut() };
        cuda::token_forward(&stream, inputs, 3, &options, outputs).unwrap_err()
    };
    let backward = |up: usize, a: usize, b: usize| {
        let (three, up, mut a, mut b) = (buffer(3), buffer(up), buffer(a), buffer(b));
        let (logp, ref_logp) = (three.slice(), three.slice());
        let forward = TokenForwardInputs { logp, ref_logp, mask: None };
        let inputs = TokenBackwardInputs { forward, grad_kl: up.slice() };
        let (grad_logp, grad_ref_logp) = (Some(a.slice_mut()), Some(b.slice_mut()));
        let outputs = TokenBackwardOutputs { grad_logp, grad_ref_logp };
        cuda::token_backward(&stream, inputs, 3, &ok, outputs).unwrap_err()
    };
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let error = forward(3, 3, 3, KlOptions { log_ratio_clamp: Some(bad), ..ok });
        assert!(matches!(error, Error::Option { option: "log_ratio_clamp", .. }), "{error}");
        let error = forward(3, 3, 3, KlOptions { output_clamp: Some(bad), ..ok });
        assert!(matches!(error, Error::Option { option: "output_clamp", .. }), "{error}");
    }
    for (error, name) in [
        (forward(2, 3, 3, ok), "ref_logp"),
        (forward(3, 2, 3, ok), "mask"),
        (forward(3, 3, 2, ok), "kl"),
        (backward(2, 3, 3), "grad_kl"),
        (backward(3, 2, 3), "grad_logp"),
        (backward(3, 3, 2), "grad_ref_logp"),
    ] {
        assert_eq!(error.to_string(), format!("token_kl: `{name}` has shape [2], expected [3]"));
    }
}

#[test]
fn bad_full_input_is_refused_by_name() {
    let stream = stream(machine(Order::Fifo, FEW, 1 << 20));
    let ok = FullKlOptions::default();
    let buffer = |len: usize| Buffer::new(&vec![0.0_f32; len], 0);
    let forward = |lens: [usize; 4], vocab: usize, options: FullKlOptions| {
        let [z, w, mask, stats] = lens;
        let (z, w, mask) = (buffer(z), buffer(w), Buffer::new(&vec![1_u8; mask], 0));
        let (logits, ref_logits, mask) = (z.slice(), w.slice(), Some(mask.slice()));
        let inputs = FullForwardInputs { logits, ref_logits, mask };
        let mut stats = buffer(stats);
        let outputs = FullForwardOutputs { stats: stats.slice_mut() };
        cuda::full_forward(&stream, inputs, 2, vocab, &options, outputs).unwrap_err()
    };
    let backward = |stats: usize, up: usize, a: usize, b: usize| {
        let six = buffer(6);
        let (logits, ref_logits) = (six.slice(), six.slice());
        let forward = FullForwardInputs { logits, ref_logits, mask: None };
        let (stats, up, mut a, mut b) = (buffer(stats), buffer(up), buffer(a), buffer(b));
        let inputs = FullBackwardInputs { forward, stats: stats.slice(), grad_kl: up.slice() };
        let (grad_logits, grad_ref_logits) = (Some(a.slice_mut()), Some(b.slice_mut()));
        let outputs = FullBackwardOutputs { grad_logits, grad_ref_logits };
        cuda::full_backward(&stream, inputs, 2, 3, &ok, outputs).unwrap_err()
    };
    for temperature in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-40, 1e300] {
        let error = forward([6, 6, 2, 14], 3, FullKlOptions { temperature, ..ok });
        assert!(matches!(error, Error::Option { option: "temperature", .. }), "{error}");
    }
    for (error, text) in [
        (
            forward([5, 6, 2, 14], 3, ok),
            "`logits` has shape [5] for a vocabulary of 3, expected [2, 3]",
        ),
        (
            forward([6, 6, 2, 14], 0, ok),
            "`logits` has shape [6] for a vocabulary of 0, expected [2, 1]",
        ),
        (forward([6, 5, 2, 14], 3, ok), "`ref_logits` has shape [5], expected [6]"),
        (forward([6, 6, 1, 14], 3, ok), "`mask` has shape [1], expected [2]"),
        (forward([6, 6, 2, 13], 3, ok), "`stats` has shape [13], expected [14]"),
        (backward(13, 2, 6, 6), "`stats` has shape [13], expected [14]"),
        (backward(14, 3, 6, 6), "`grad_kl` has shape [3], expected [2]"),
        (backward(14, 2, 5, 6), "`grad_logits` has shape [5], expected [6]"),
        (backward(14, 2, 6, 5), "`grad_ref_logits` has shape [5], expected [6]"),
    ] {
        assert_eq!(error.to_string(), format!("full_kl: {text}"));
    }
}

#[cfg(feature = "simt")]
mod planted {
    use super::*;
    use common::device::{goes_unseen, ORDERS};

    fn unseen(bug: &'static str, orders: &[Order]) -> bool {
        let run = || {
            tokens_agree_with_the_reference(bug, orders)?;
            agrees_with_the_reference::<bf16>(bug, orders)
        };
        goes_unseen(run)
    }

    #[test]
    fn planted_bugs_that_change_results_are_seen() {
        for bug in [
            "kl_unshifted_differences",
            "kl_misaligned_store",
            "kl_share_of_the_other",
            "kl_gap_of_the_other",
        ] {
            for order in ORDERS {
                assert!(!unseen(bug, &[order, order]), "{bug} {order:?}");
            }
        }
    }

    #[test]
    fn planted_races_are_seen_in_one_of_the_orders() {
        let seeds: Vec<Order> = (0..4).map(Order::Random).collect();
        let orders = [&ORDERS[..2], &seeds].concat();
        assert!(!unseen("kl_missing_barrier", &orders));
    }

    /// Run by `.ci/simt` under a sanitizer, which must end the process.
    #[test]
    #[ignore = "ends the process under a sanitizer"]
    fn a_planted_bug_for_a_sanitizer() {
        // An order that hides the race from the results.
        let orders = [Order::Lifo];
        let found = match std::env::var("PLANTED_BUG").unwrap().as_str() {
            "kl_read_past_the_mask" => {
                tokens_agree_with_the_reference("kl_read_past_the_mask", &orders)
            }
            "kl_missing_barrier" => {
                agrees_with_the_reference::<bf16>("kl_missing_barrier", &orders)
            }
            other => panic!("no test of {other}"),
        };
        found.unwrap();
    }
}
