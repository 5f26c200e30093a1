//! The logprob op: the reference against other projects' functions, the CPU and the tensor layer
//! against the reference, and what must hold for any input.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::logprob_cases::{rows_of, unlikely, Case};
use common::*;
use half::{bf16, f16};
use ppo_kernels::logprob::cpu::{
    self, BackwardInputs, BackwardOutputs, FinishInputs, FinishOutputs, ForwardInputs,
    ForwardOutputs, InPlaceInputs, MergeInputs, RunningSums,
};
use ppo_kernels::logprob::{logprobs, logprobs_and_entropy, reference, Columns, LogprobOptions};
use ppo_kernels::tolerance;
use ppo_kernels::Error;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::Rng;

const REL: f64 = tolerance::LOGPROB.tests.rel;
const ABS: f64 = tolerance::LOGPROB.tests.abs;

fn options(temperature: f64) -> LogprobOptions {
    LogprobOptions { temperature, ..Default::default() }
}

/// How well a peer's own arithmetic agrees with f64: relative, absolute.
fn golden_tolerance(case: &Golden) -> (f64, f64) {
    match case.dtype.as_str() {
        "float64" => (1e-9, 1e-10),
        "float32" => (1e-5, 1e-5),
        // Inputs are exact, but the peer's result has 8 bits.
        "bfloat16" => (1e-2, 1e-2),
        other => panic!("{other}"),
    }
}

#[test]
fn reference_equals_the_peers_log_probabilities() {
    let cases = golden("logprob");
    for case in &cases {
        let (mut logits, vocab) = (case.input("logits"), *case.shape("logits").last().unwrap());
        let targets = if case.inputs.contains_key("index") {
            // TRL's form with K indices a position is K targets on the same row.
            let k = *case.shape("index").last().unwrap();
            let rows = logits.chunks(vocab).flat_map(|row| std::iter::repeat_n(row, k));
            logits = rows.flatten().copied().collect();
            case.input("index")
        } else {
            case.input("labels")
        };
        let targets: Vec<i64> = targets.iter().map(|&t| t as i64).collect();
        let options = options(case.optional("temperature").unwrap_or(1.0));

        let (logp, _) = reference::forward(&logits, &targets, vocab, &options);
        let (rel, abs) = golden_tolerance(case);
        for key in case.outputs.keys() {
            let (what, want) = (format!("{} {key}", case.id), case.output(key));
            if key.starts_with("logp") {
                assert_close(&what, &logp, &want, rel, abs);
            } else {
                let (up, zeros) = (case.input("grad_out"), vec![0.0; targets.len()]);
                let grad = reference::backward(&logits, &targets, vocab, &options, &up, &zeros);
                assert_close(&what, &grad, &want, rel, abs);
            }
        }
    }
    assert_eq!(cases.len(), 32);
}

#[test]
fn reference_equals_the_peers_entropy() {
    let (mut ran, mut nan_at_the_peer) = (0, 0);
    for case in golden("entropy") {
        // sum_pi_squared is another quantity; compute_entropy_loss is a masked mean of this one.
        if !case.outputs.contains_key("entropy") {
            continue;
        }
        let (logits, vocab) = (case.input("logits"), *case.shape("logits").last().unwrap());
        let targets = vec![0; logits.len() / vocab];
        let options = options(case.optional("temperature").unwrap_or(1.0));
        let (_, entropy) = reference::forward(&logits, &targets, vocab, &options);
        let (rel, abs) = golden_tolerance(&case);
        let mut want = case.output("entropy");
        if case.inputs.get("kind").is_some_and(|kind| kind == "neginf") {
            // The peers make NaN of a -inf logit; where they do, any number of ours will do.
            nan_at_the_peer += 1;
            for (w, &ours) in want.iter_mut().zip(&entropy).filter(|(w, _)| w.is_nan()) {
                assert!(ours.is_finite());
                *w = ours;
            }
        } else if case.outputs.contains_key("grad_logits") {
            let (up, zeros) = (case.input("grad_out"), vec![0.0; targets.len()]);
            let grad = reference::backward(&logits, &targets, vocab, &options, &zeros, &up);
            let what = format!("{} grad", case.id);
            assert_close(&what, &grad, &case.output("grad_logits"), rel, abs);
        }
        assert_close(&case.id, &entropy, &want, rel, abs);
        ran += 1;
    }
    assert_eq!((ran, nan_at_the_peer), (34, 4));
}

#[test]
fn reference_gradient_is_the_derivative_of_the_reference() {
    let mut rng = rng(1);
    for temperature in [1.0, 0.6, 2.5] {
        let (rows, vocab) = (3, 7);
        let logits = wide(&uniform(&mut rng, rows * vocab, 3.0));
        let targets = [4, -100, 0];
        let options = LogprobOptions { temperature, ignore_index: Some(-100) };
        let up_logp = wide(&uniform(&mut rng, rows, 1.0));
        let up_entropy = wide(&uniform(&mut rng, rows, 1.0));
        let numeric = finite_difference(&logits, |z| {
            let (logp, entropy) = reference::forward(z, &targets, vocab, &options);
            dot(&up_logp, &logp) + dot(&up_entropy, &entropy)
        });
        let grad = reference::backward(&logits, &targets, vocab, &options, &up_logp, &up_entropy);
        assert_close("grad", &grad, &numeric, 1e-7, 1e-8);
    }
}

#[test]
fn gradients_of_unlikely_tokens_are_right_down_to_the_least_float() {
    let case = unlikely();
    let (rows, vocab, options) = (case.targets.len(), case.vocab, LogprobOptions::default());
    let (_, entropy, max, log_sum) = forward(&case.logits, &case.targets, vocab, &options);
    let inputs = BackwardInputs {
        entropy: Some(&entropy),
        grad_logp: Some(&case.up_logp),
        grad_entropy: Some(&case.up_entropy),
        ..BackwardInputs::new(
            ForwardInputs { logits: &case.logits, targets: &case.targets },
            &max,
            &log_sum,
        )
    };
    let mut grad = vec![f32::NAN; rows * vocab];
    let outputs = BackwardOutputs { grad_logits: &mut grad };
    cpu::backward(inputs, rows, vocab, &options, outputs).unwrap();
    case.check(&grad, false);
}

/// Odd vocabularies around every block and lane boundary.
fn cases(rng: &mut StdRng) -> Vec<Case> {
    let vocabularies = [1, 2, 3, 15, 16, 17, 257, 1000, 2047, 2048, 2049, 5003];
    vocabularies.into_iter().flat_map(|vocab| rows_of(rng, vocab)).collect()
}

#[test]
fn tensors_agree_with_the_reference_in_every_dtype() {
    let mut rng = rng(2);
    for case in cases(&mut rng) {
        for (dtype, temperature) in
            [(DType::F32, 1.0), (DType::F32, 0.7), (DType::BF16, 1.0), (DType::F16, 1.3)]
        {
            for device in devices() {
                check_against_reference(&case, dtype, temperature, &device, &mut rng);
            }
        }
    }
}

fn check_against_reference(
    case: &Case,
    dtype: DType,
    temperature: f64,
    device: &Device,
    rng: &mut StdRng,
) {
    let (rows, vocab) = (case.count(), case.vocab);
    let what = format!("{} V={vocab} {dtype:?} τ={temperature}", case.name);
    let targets: Vec<i64> = (0..rows).map(|_| rng.random_range(0..vocab as i64)).collect();
    let options = options(temperature);
    let logits = Tensor::from_slice(&case.rows, (rows, vocab), device).unwrap();
    let logits = Var::from_tensor(&logits.to_dtype(dtype).unwrap()).unwrap();
    let (up_logp, up_entropy) = (uniform(rng, rows, 1.0), uniform(rng, rows, 1.0));

    let ids = Tensor::from_slice(&targets, rows, device).unwrap();
    let (logp, entropy) = logprobs_and_entropy(&logits, &ids, &options).unwrap();
    // What the op reads, after rounding to its dtype.
    let z = to_vec(&logits);
    let (want_logp, want_entropy) = reference::forward(&z, &targets, vocab, &options);
    assert_close(&format!("{what} logp"), &to_vec(&logp), &want_logp, REL, ABS);
    assert_close(&format!("{what} entropy"), &to_vec(&entropy), &want_entropy, REL, ABS);
    let ids = ids.to_dtype(DType::U32).unwrap();
    let alone = logprobs(&logits, &ids, &options).unwrap();
    assert_eq!(to_vec(&alone), to_vec(&logp), "{what}: with and without entropy");

    let up = |g: &[f32]| Tensor::from_slice(g, rows, device).unwrap();
    let loss = ((logp * up(&up_logp)).unwrap() + (entropy * up(&up_entropy)).unwrap()).unwrap();
    let grads = loss.sum_all().unwrap().backward().unwrap();
    let grad = grads.get(&logits).unwrap();
    assert_eq!(grad.dtype(), dtype);
    let (a, b) = (wide(&up_logp), wide(&up_entropy));
    let want = reference::backward(&z, &targets, vocab, &options, &a, &b);
    // Half a unit in the last place of the gradient's own type.
    let (rel, abs) = match dtype {
        DType::BF16 => (2f64.powi(-8), ABS),
        DType::F16 => (2f64.powi(-11), ABS),
        _ => (REL, ABS),
    };
    assert_close(&format!("{what} grad"), &to_vec(grad), &want, rel, abs);
}

#[test]
fn log_probabilities_are_never_positive() {
    for vocab in [50257, 255, 257, 1001] {
        let mut rows = vec![-30.0_f32; 2 * vocab];
        rows[vocab - 1] = 60.0;
        rows[vocab] = 60.0;
        let targets = [vocab as i64 - 1, 0];
        let logp = forward(&rows, &targets, vocab, &options(1.0)).0;
        assert!(logp.iter().all(|&l| l <= 0.0 && l > -1e-6), "{logp:?}");
    }
}

#[test]
fn excluded_tokens_are_legal_at_every_temperature() {
    let logits = [0.0, 1.0, f32::NEG_INFINITY];
    for temperature in [1e-30, 0.01, 1.0, 100.0, 1e30] {
        let options = options(temperature);
        let (logp, entropy, ..) = forward(&logits, &[1], 3, &options);
        let (want_logp, want_entropy) = reference::forward(&wide(&logits), &[1], 3, &options);
        let what = format!("temperature {temperature}");
        assert_close(&what, &wide(&logp), &want_logp, REL, ABS);
        assert_close(&what, &wide(&entropy), &want_entropy, REL, ABS);
    }
}

#[test]
fn tokens_may_be_excluded_with_the_smallest_float() {
    // As transformers does. Blocks of nothing else come before, between and after the legal ones.
    let vocab = 20_000;
    for legal in [vec![0], vec![vocab - 1], vec![9000, 9001, 15_000], vec![3, vocab / 2]] {
        let mut logits = vec![f32::MIN; vocab];
        for (i, &column) in legal.iter().enumerate() {
            logits[column] = i as f32;
        }
        for temperature in [0.5, 1.0, 2.0] {
            let (options, target) = (options(temperature), [legal[0] as i64]);
            let (logp, entropy, ..) = forward(&logits, &target, vocab, &options);
            let (want_logp, want_entropy) =
                reference::forward(&wide(&logits), &target, vocab, &options);
            let what = format!("{legal:?} at {temperature}");
            assert_close(&what, &wide(&logp), &want_logp, REL, ABS);
            assert_close(&what, &wide(&entropy), &want_entropy, REL, ABS);
        }
    }
}

/// Values that a model in trouble, or a mask, may leave in a row.
const SPECIAL: [f32; 14] = [
    f32::NAN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::MAX,
    f32::MIN,
    1e30,
    -1e30,
    -0.0,
    1e-40,
    88.0,
    -88.0,
    200.0,
    -200.0,
    1e4,
];

#[test]
fn special_values_anywhere_give_what_the_reference_gives() {
    let mut rng = rng(5);
    for _ in 0..5000 {
        let vocab = [1, 2, 5, 16, 17, 40, 2050][rng.random_range(0..7)];
        let mut z = uniform(&mut rng, vocab, 5.0);
        for _ in 0..rng.random_range(0..4) {
            let special = SPECIAL[rng.random_range(0..SPECIAL.len())];
            z[rng.random_range(0..vocab)] = special;
        }
        let target = [rng.random_range(0..vocab as i64)];
        let options = options([1.0, 0.5, 2.0][rng.random_range(0..3)]);
        let (logp, entropy, max, log_sum) = forward(&z, &target, vocab, &options);
        let inputs = BackwardInputs {
            forward: ForwardInputs { logits: &z, targets: &target },
            max: &max,
            log_sum: &log_sum,
            entropy: Some(&entropy),
            grad_logp: Some(&[1.0]),
            grad_entropy: Some(&[0.75]),
        };
        let mut grad = vec![0.0; vocab];
        let outputs = BackwardOutputs { grad_logits: &mut grad };
        cpu::backward(inputs, 1, vocab, &options, outputs).unwrap();

        let z = wide(&z);
        let (want_logp, want_entropy) = reference::forward(&z, &target, vocab, &options);
        let want = reference::backward(&z, &target, vocab, &options, &[1.0], &[0.75]);
        // What is beyond f32's range is infinite.
        let want_logp =
            if want_logp[0] < f64::from(f32::MIN) { f64::NEG_INFINITY } else { want_logp[0] };
        let what = format!("target {target:?} of {z:?}");
        assert_close(&what, &wide(&logp), &[want_logp], REL, 2.0 * ABS);
        assert_close(&what, &wide(&entropy), &want_entropy, REL, 2.0 * ABS);
        assert_close(&what, &wide(&grad), &want, REL, 2.0 * ABS);
    }
}

#[test]
fn results_may_be_used_twice_and_with_any_upstream_gradient() {
    let mut rng = rng(6);
    let (rows, vocab) = (6, 7);
    let z = uniform(&mut rng, rows * vocab, 2.0);
    let targets = [0, 6, 3, 3, 1, 5];
    let (a, b) = (wide(&uniform(&mut rng, rows, 1.0)), wide(&uniform(&mut rng, rows, 1.0)));
    for device in devices() {
        let logits = Var::from_tensor(&Tensor::from_slice(&z, (2, 3, vocab), &device).unwrap());
        let logits = logits.unwrap();
        let ids = Tensor::from_slice(&targets, (2, 3), &device).unwrap();
        let (logp, entropy) = logprobs_and_entropy(&logits, &ids, &options(0.8)).unwrap();
        // Through a transpose; both outputs in two terms.
        let weights = |g: &[f64]| Tensor::new(g, &device).unwrap().reshape((3, 2)).unwrap();
        let (a, b) = (weights(&a), weights(&b));
        let single = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
        let first = (logp.t().unwrap() * single(&a)).unwrap().sum_all().unwrap();
        let second = (entropy.t().unwrap() * single(&b)).unwrap().sum_all().unwrap();
        let third = (&logp * &entropy).unwrap().mean_all().unwrap();
        let loss = ((first + second).unwrap() + third).unwrap();
        let grads = loss.backward().unwrap();

        let (a, b) = (to_vec(&a.t().unwrap()), to_vec(&b.t().unwrap()));
        let want = finite_difference(&wide(&z), |z| {
            let (logp, entropy) = reference::forward(z, &targets, vocab, &options(0.8));
            dot(&a, &logp) + dot(&b, &entropy) + dot(&logp, &entropy) / rows as f64
        });
        assert_close("grad", &to_vec(grads.get(&logits).unwrap()), &want, REL, 2.0 * ABS);
    }
}

/// logp, entropy and the row statistics (max, log_sum) of the raw layer.
fn forward(
    logits: &[f32],
    targets: &[i64],
    vocab: usize,
    options: &LogprobOptions,
) -> (Vec<f32>, Vec<f32>, Vec<f32>, Vec<f32>) {
    let mut out = [(); 4].map(|()| vec![0.0; targets.len()]);
    let [logp, entropy, max, log_sum] = &mut out;
    let (entropy, max, log_sum) =
        (Some(&mut entropy[..]), Some(&mut max[..]), Some(&mut log_sum[..]));
    let outputs = ForwardOutputs { logp, entropy, max, log_sum };
    cpu::forward(ForwardInputs { logits, targets }, targets.len(), vocab, options, outputs)
        .unwrap();
    let [logp, entropy, max, log_sum] = out;
    (logp, entropy, max, log_sum)
}

/// The log-probabilities, and nothing else.
fn only(logp: &mut [f32]) -> ForwardOutputs<'_> {
    ForwardOutputs { logp, entropy: None, max: None, log_sum: None }
}

/// Outputs and gradient of the raw layer as bits.
fn all_bits(logits: &[f32], targets: &[i64], vocab: usize, up: &[f32]) -> Vec<Vec<u32>> {
    let options = options(0.9);
    let (logp, entropy, max, log_sum) = forward(logits, targets, vocab, &options);
    let inputs = BackwardInputs {
        forward: ForwardInputs { logits, targets },
        max: &max,
        log_sum: &log_sum,
        entropy: Some(&entropy),
        grad_logp: Some(up),
        grad_entropy: Some(up),
    };
    let mut grad = vec![0.0; logits.len()];
    let outputs = BackwardOutputs { grad_logits: &mut grad };
    cpu::backward(inputs, targets.len(), vocab, &options, outputs).unwrap();
    let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect();
    vec![bits(&logp), bits(&entropy), bits(&grad)]
}

#[test]
fn bits_depend_neither_on_threads_nor_on_the_other_rows() {
    let mut rng = rng(3);
    let (rows, vocab) = (37, 4099);
    let logits = uniform(&mut rng, rows * vocab, 8.0);
    let targets: Vec<i64> = (0..rows).map(|_| rng.random_range(0..vocab as i64)).collect();
    let up = uniform(&mut rng, rows, 1.0);
    let whole = with_threads(1, || all_bits(&logits, &targets, vocab, &up));
    for threads in [2, 3, 8] {
        assert!(whole == with_threads(threads, || all_bits(&logits, &targets, vocab, &up)));
    }
    for row in [0, 17, 36] {
        let z = &logits[row * vocab..][..vocab];
        let alone = all_bits(z, &targets[row..=row], vocab, &up[row..=row]);
        assert_eq!(alone[0][0], whole[0][row]);
        assert_eq!(alone[1][0], whole[1][row]);
        assert!(alone[2][..] == whole[2][row * vocab..][..vocab]);
    }
}

#[test]
fn rows_that_are_split_have_the_same_bits_in_any_company() {
    let mut rng = rng(11);
    let (rows, vocab) = (3, 100_003);
    let logits = uniform(&mut rng, rows * vocab, 8.0);
    let (targets, up) = ([5, 40_000, 100_002], [1.0; 3]);
    let whole = with_threads(1, || all_bits(&logits, &targets, vocab, &up));
    for threads in [2, 3, 8] {
        assert!(whole == with_threads(threads, || all_bits(&logits, &targets, vocab, &up)));
        let z = &logits[vocab..2 * vocab];
        let alone = with_threads(threads, || all_bits(z, &targets[1..2], vocab, &up[1..2]));
        assert_eq!((alone[0][0], alone[1][0]), (whole[0][1], whole[1][1]));
        assert!(alone[2][..] == whole[2][vocab..2 * vocab]);
    }
}

#[test]
fn a_maximum_that_grows_along_the_row_costs_no_digits() {
    let vocab = 100_003;
    let slopes = [1e-3_f32, -1e-3, 2e-5, -2e-5];
    let rising = slopes.map(|slope| (0..vocab).map(|i| i as f32 * slope).collect::<Vec<f32>>());
    for (z, slope) in rising.iter().zip(slopes) {
        // Lone logits in front, which everything after them is far below or far above.
        for first in [None, Some(200.0), Some(-200.0), Some(f32::NEG_INFINITY)] {
            let mut z = z.clone();
            z[0] = first.unwrap_or(z[0]);
            let top = if slope > 0.0 { vocab - 1 } else { 1 };
            let options = options(1.0);
            let (logp, entropy, ..) = forward(&z, &[top as i64], vocab, &options);
            let want = reference::forward(&wide(&z), &[top as i64], vocab, &options);
            assert_close("logp", &wide(&logp), &want.0, REL, ABS);
            assert_close("entropy", &wide(&entropy), &want.1, REL, ABS);
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Running sums: max, rest, logit, weighted.
type Sums = [Vec<f32>; 4];

fn running(sums: &mut Sums, entropy: bool) -> RunningSums<'_> {
    let [max, rest, logit, weighted] = sums;
    RunningSums { max, rest, logit, weighted: entropy.then_some(weighted) }
}

/// Log-probabilities, entropies and ln s of running sums.
fn finish(sums: &Sums, targets: &[i64], vocab: usize, options: &LogprobOptions) -> [Vec<f32>; 3] {
    let [max, rest, logit, weighted] = sums;
    let mut out = [(); 3].map(|()| vec![f32::NAN; targets.len()]);
    let [logp, entropy, log_sum] = &mut out;
    let inputs =
        FinishInputs { weighted: Some(weighted), ..FinishInputs::new(targets, max, rest, logit) };
    let outputs = FinishOutputs { logp, log_sum, entropy: Some(entropy) };
    cpu::finish(inputs, targets.len(), vocab, options, outputs).unwrap();
    out
}

#[test]
fn tiles_give_what_whole_rows_give() {
    let mut rng = rng(41);
    let options = LogprobOptions { temperature: 0.7, ignore_index: Some(-100) };
    for case in cases(&mut rng) {
        let (rows, vocab) = (case.count(), case.vocab);
        let mut targets: Vec<i64> = (0..rows).map(|_| rng.random_range(0..vocab as i64)).collect();
        targets[1] = -100;
        let tiles = logprob_cases::tiles_of(&mut rng, vocab);
        let z = &case.rows;
        // One after the other, and each on its own, merged in any order.
        let mut sums = [(); 4].map(|()| vec![f32::NAN; rows]);
        let mut merged = sums.clone();
        let mut shards = Vec::new();
        for (i, &columns) in tiles.iter().enumerate() {
            let logits = &logprob_cases::tile(z, columns);
            let inputs = ForwardInputs { logits, targets: &targets };
            let partial = |begins, sums: &mut Sums| {
                cpu::partial(inputs, rows, columns, &options, begins, running(sums, true)).unwrap();
            };
            partial(i == 0, &mut sums);
            let mut shard = [(); 4].map(|()| vec![f32::NAN; rows]);
            partial(true, &mut shard);
            // Without the entropy the others are the same.
            let mut alone = shard.clone();
            let outputs = running(&mut alone, false);
            cpu::partial(inputs, rows, columns, &options, true, outputs).unwrap();
            for (alone, shard) in alone.iter().zip(&shard).take(3) {
                assert_eq!(bits(alone), bits(shard));
            }
            shards.push(shard);
        }
        shards.shuffle(&mut rng);
        for (i, shard) in shards.into_iter().enumerate() {
            if i == 0 {
                merged = shard;
                continue;
            }
            let [max, rest, logit, weighted] = &shard;
            let inputs = MergeInputs {
                other_weighted: Some(weighted),
                ..MergeInputs::new(max, rest, logit)
            };
            cpu::merge(inputs, rows, &options, running(&mut merged, true)).unwrap();
        }
        let (logp, entropy) = reference::forward(&wide(z), &targets, vocab, &options);
        for sums in [&sums, &merged] {
            let out = finish(sums, &targets, vocab, &options);
            let what = format!("{} V={vocab}", case.name);
            assert_close(&format!("{what} logp"), &wide(&out[0]), &logp, REL, ABS);
            assert_close(&format!("{what} entropy"), &wide(&out[1]), &entropy, REL, ABS);
        }

        // A gradient has the bits of the whole one, also in the place of the logits.
        let (_, entropy, max, log_sum) = forward(z, &targets, vocab, &options);
        let up = [uniform(&mut rng, rows, 1.0), uniform(&mut rng, rows, 1.0)];
        let parts: Vec<_> = tiles.iter().map(|&tile| logprob_cases::tile(z, tile)).collect();
        let inputs = InPlaceInputs {
            entropy: Some(&entropy),
            grad_logp: Some(&up[0]),
            grad_entropy: Some(&up[1]),
            ..InPlaceInputs::new(&targets, &max, &log_sum)
        };
        let with = |logits| BackwardInputs {
            entropy: inputs.entropy,
            grad_logp: inputs.grad_logp,
            grad_entropy: inputs.grad_entropy,
            ..BackwardInputs::new(ForwardInputs { logits, targets: &targets }, &max, &log_sum)
        };
        let mut whole = vec![f32::NAN; z.len()];
        let outputs = BackwardOutputs { grad_logits: &mut whole };
        cpu::backward(with(z), rows, vocab, &options, outputs).unwrap();
        for (&columns, tile) in tiles.iter().zip(&parts) {
            let mut grad = vec![f32::NAN; tile.len()];
            let outputs = BackwardOutputs { grad_logits: &mut grad };
            cpu::backward_of_columns(with(tile), rows, columns, &options, outputs).unwrap();
            let mut tile = tile.clone();
            let outputs = BackwardOutputs { grad_logits: &mut tile };
            cpu::backward_in_place(inputs, rows, columns, &options, outputs).unwrap();
            let whole = logprob_cases::tile(&whole, columns);
            assert_eq!((bits(&grad), bits(&tile)), (bits(&whole), bits(&whole)));
        }
    }
}

#[test]
fn tiles_with_special_values_give_what_whole_rows_give() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let row = [[-inf, -inf, 1.0, -inf], [-inf; 4], [0.5, inf, 1.0, 2.0], [0.5, 1.0, 2.0, nan]];
    let (z, targets) = (row.concat(), [2, 0, 0, 1]);
    let options = options(1.0);
    for width in 1..=4 {
        let mut sums = [(); 4].map(|()| vec![f32::NAN; 4]);
        for first in (0..4).step_by(width) {
            let columns = Columns { first, count: width.min(4 - first), vocab: 4 };
            let logits = &logprob_cases::tile(&z, columns);
            let inputs = ForwardInputs { logits, targets: &targets };
            let sums = running(&mut sums, true);
            cpu::partial(inputs, 4, columns, &options, first == 0, sums).unwrap();
        }
        let [logp, entropy, _] = finish(&sums, &targets, 4, &options);
        assert_eq!((logp[0], entropy[0]), (0.0, 0.0), "{width}");
        assert!(logp[1..].iter().chain(&entropy[1..]).all(|x| x.is_nan()), "{width}");
    }
}

#[test]
fn a_target_that_no_tile_has_is_nan() {
    let mut sums = [(); 4].map(|()| vec![f32::NAN; 2]);
    let columns = Columns { first: 0, count: 3, vocab: 5 };
    let inputs = ForwardInputs { logits: &[0.0f32; 6][..], targets: &[4i64, 1][..] };
    cpu::partial(inputs, 2, columns, &options(1.0), true, running(&mut sums, true)).unwrap();
    let [logp, ..] = finish(&sums, &[4, 1], 5, &options(1.0));
    assert!(logp[0].is_nan() && logp[1].is_finite());
}

#[test]
fn tiles_that_do_not_fit_are_refused_by_name() {
    let columns = |first, count| Columns { first, count, vocab: 5 };
    let refused = |columns: Columns, targets: &[i64], len: usize| {
        let logits = vec![0.0f32; 2 * len];
        let inputs = ForwardInputs { logits: &logits, targets };
        let mut sums = [(); 4].map(|()| vec![7.0; 2]);
        let sums_of = running(&mut sums, true);
        let error =
            cpu::partial(inputs, 2, columns, &options(1.0), true, sums_of).unwrap_err().to_string();
        assert!(sums.iter().flatten().all(|&x| x == 7.0), "nothing is written");
        error
    };
    for (columns, targets, len, said) in [
        (columns(3, 3), [0, 1], 3, "columns` has shape 3..6, expected a range of 0..5"),
        (columns(usize::MAX, 2), [0, 1], 2, "expected a range of 0..5"),
        (columns(0, 3), [0, 1], 2, "logits"),
        (columns(0, 0), [0, 1], 0, "logits"),
        (columns(0, 3), [0, 5], 3, "target"),
    ] {
        let error = refused(columns, &targets, len);
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn likely_tokens_keep_their_digits() {
    let mut rng = rng(31);
    for (vocab, temperature) in [(7, 1.0), (2049, 0.7), (5003, 1.0), (100_003, 0.7)] {
        let (case, targets) = logprob_cases::confident(&mut rng, vocab);
        let options = options(temperature);
        let (logp, entropy, max, log_sum) = forward(&case.rows, &targets, vocab, &options);
        let z = wide(&case.rows);
        let want = reference::forward(&z, &targets, vocab, &options);
        // Relative: the least of them are 1e-24.
        let rel = tolerance::LOGPROB.backward.rel;
        assert_close("logp", &wide(&logp), &want.0, rel, 0.0);
        assert_close("entropy", &wide(&entropy), &want.1, rel, 0.0);

        let (up, zeros) = (vec![1.0; case.count()], vec![0.0; case.count()]);
        let mut grad = vec![f32::NAN; z.len()];
        let forward = ForwardInputs { logits: &case.rows, targets: &targets };
        let inputs =
            BackwardInputs { grad_logp: Some(&up), ..BackwardInputs::new(forward, &max, &log_sum) };
        let outputs = BackwardOutputs { grad_logits: &mut grad };
        cpu::backward(inputs, case.count(), vocab, &options, outputs).unwrap();
        let want = reference::backward(&z, &targets, vocab, &options, &wide(&up), &zeros);
        assert_close("grad", &wide(&grad), &want, rel, 0.0);
        assert!(want.iter().all(|g| g.abs() > 1e-35));
    }
}

#[test]
fn the_reference_keeps_the_digits_of_likely_tokens_as_unsloth_does() {
    let mut ran = 0;
    // The others lose them, as they say.
    for case in golden("confident").iter().filter(|case| case.peer == "unsloth") {
        let (logits, vocab) = (case.input("logits"), *case.shape("logits").last().unwrap());
        let targets: Vec<i64> = case.input("targets").iter().map(|&t| t as i64).collect();
        let zeros = vec![0.0; targets.len()];
        let (logp, _) = reference::forward(&logits, &targets, vocab, &options(1.0));
        assert_close(&case.id, &logp, &case.output("logp"), 2e-6, 0.0);
        let up = case.input("grad_out");
        let grad = reference::backward(&logits, &targets, vocab, &options(1.0), &up, &zeros);
        assert_close(&case.id, &grad, &case.output("grad_logits"), 2e-5, 1e-37);
        ran += 1;
    }
    assert_eq!(ran, 2);
}

#[test]
fn a_bad_row_is_nan_and_spoils_no_other() {
    for vocab in [5, 3000] {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut logits = vec![0.5; 3 * vocab];
            logits[vocab + vocab / 2] = bad;
            let (logp, entropy, ..) = forward(&logits, &[0, 0, 0], vocab, &options(1.0));
            assert!(logp[1].is_nan() && entropy[1].is_nan());
            assert!(logp[0].is_finite() && logp[2].is_finite() && entropy[2].is_finite());
        }
        let logits = vec![f32::NEG_INFINITY; vocab];
        let (logp, entropy, ..) = forward(&logits, &[0], vocab, &options(1.0));
        assert!(logp[0].is_nan() && entropy[0].is_nan());
        // Blocks of -inf before the first finite logit are legal.
        let mut logits = vec![f32::NEG_INFINITY; vocab];
        logits[vocab - 1] = 2.0;
        let (logp, entropy, ..) = forward(&logits, &[vocab as i64 - 1], vocab, &options(1.0));
        assert_eq!((logp[0], entropy[0]), (0.0, 0.0));
        let (logp, ..) = forward(&logits, &[0], vocab, &options(1.0));
        assert_eq!(logp[0], f32::NEG_INFINITY);
        // NaN among -inf in a block of its own.
        logits[0] = f32::NAN;
        let (logp, ..) = forward(&logits, &[vocab as i64 - 1], vocab, &options(1.0));
        assert!(logp[0].is_nan());
    }
}

#[test]
fn ignored_rows_are_not_read() {
    let options = LogprobOptions { ignore_index: Some(-100), ..Default::default() };
    for device in devices() {
        let logits = Tensor::new(&[[f32::NAN, 1.0], [0.0, 0.0]], &device).unwrap();
        let logits = Var::from_tensor(&logits).unwrap();
        let targets = Tensor::new(&[-100_i64, 1], &device).unwrap();
        let (logp, entropy) = logprobs_and_entropy(&logits, &targets, &options).unwrap();
        let half = 0.5_f64.ln();
        assert_close("logp", &to_vec(&logp), &[0.0, half], REL, ABS);
        assert_close("entropy", &to_vec(&entropy), &[0.0, -half], REL, ABS);
        let grads = (logp + entropy).unwrap().sum_all().unwrap().backward().unwrap();
        assert_close("grad", &to_vec(grads.get(&logits).unwrap()), &[0., 0., -0.5, 0.5], REL, ABS);
    }
}

#[test]
fn a_row_without_upstream_gradient_gets_zeros_whatever_it_holds() {
    for device in devices() {
        let logits = Tensor::new(&[[f32::NAN, 1.0], [0.0, 0.0]], &device).unwrap();
        let logits = Var::from_tensor(&logits).unwrap();
        let targets = Tensor::new(&[0_u32, 0], &device).unwrap();
        let logp = logprobs(&logits, &targets, &options(1.0)).unwrap();
        let grads = logp.get(1).unwrap().backward().unwrap();
        assert_close("grad", &to_vec(grads.get(&logits).unwrap()), &[0., 0., 0.5, -0.5], REL, ABS);
    }
}

#[test]
fn strided_and_offset_tensors_give_the_same() {
    let mut rng = rng(4);
    for device in devices() {
        let logits = uniform(&mut rng, 2 * 3 * 11, 2.0);
        let logits = Tensor::from_vec(logits, (2, 3, 11), &device).unwrap();
        let targets = Tensor::new(&[[1_i64, 10, 4], [0, 7, 2]], &device).unwrap();
        let plain = logprobs(&logits, &targets, &options(1.0)).unwrap();
        let other = logprobs(&strided(&logits), &strided(&targets), &options(1.0)).unwrap();
        assert_eq!(other.dims(), [2, 3]);
        assert_eq!(to_vec(&plain), to_vec(&other));
        let swapped = logits.transpose(0, 1).unwrap();
        let other = logprobs(&swapped, &targets.t().unwrap(), &options(1.0)).unwrap();
        assert_eq!(to_vec(&plain), to_vec(&other.t().unwrap()));
    }
}

#[test]
fn the_gradient_reaches_a_strided_leaf() {
    for device in devices() {
        let logits = Tensor::new(&[[0.0_f32, 1.0, 2.0], [3.0, 1.0, 0.0]], &device).unwrap();
        let logits = Var::from_tensor(&logits).unwrap();
        let targets = Tensor::new(&[0_u32, 1, 1], &device).unwrap();
        let logp = logprobs(&logits.t().unwrap(), &targets, &options(1.0)).unwrap();
        let grads = logp.sum_all().unwrap().backward().unwrap();
        let z = to_vec(&logits.t().unwrap());
        let want = reference::backward(&z, &[0, 1, 1], 2, &options(1.0), &[1.0; 3], &[0.0; 3]);
        let grad = grads.get(&logits).unwrap().t().unwrap();
        assert_close("grad", &to_vec(&grad), &want, REL, ABS);
    }
}

#[test]
fn empty_batches_and_single_elements_work() {
    for device in devices_with_empty_tensors() {
        let logits = Tensor::zeros((0, 5), DType::F32, &device).unwrap();
        let targets = Tensor::zeros(0, DType::U32, &device).unwrap();
        assert_eq!(logprobs(&logits, &targets, &options(1.0)).unwrap().dims(), [0]);
    }
    for device in devices() {
        let logits = Tensor::new(&[3.0_f32], &device).unwrap();
        let targets = Tensor::new(0_u32, &device).unwrap();
        let (logp, entropy) = logprobs_and_entropy(&logits, &targets, &options(1.0)).unwrap();
        assert_eq!((to_vec(&logp), to_vec(&entropy)), (vec![0.0], vec![0.0]));
        assert!(logp.dims().is_empty());
    }
}

#[test]
fn half_precision_slices_work_in_the_raw_layer() {
    let targets = [2_u32];
    let mut logp = [0.0];
    let z = [0.0, 1.0, 2.0].map(bf16::from_f32);
    let inputs = ForwardInputs { logits: &z, targets: &targets };
    cpu::forward(inputs, 1, 3, &options(1.0), only(&mut logp)).unwrap();
    let bf16_logp = logp[0];
    let z = [0.0, 1.0, 2.0].map(f16::from_f32);
    let inputs = ForwardInputs { logits: &z, targets: &targets };
    cpu::forward(inputs, 1, 3, &options(1.0), only(&mut logp)).unwrap();
    assert_eq!(logp[0], bf16_logp);
}

/// On the CPU it is an error.
#[cfg(feature = "cuda")]
#[test]
fn a_target_outside_the_vocabulary_is_nan_in_its_row_where_looking_would_be_a_wait() {
    for device in devices().iter().filter(|device| device.is_cuda()) {
        let logits = Tensor::new(&[[0.0_f32, 0.0], [0.0, 0.0], [0.0, 0.0]], device).unwrap();
        let logits = Var::from_tensor(&logits).unwrap();
        let targets = Tensor::new(&[2_i64, 1, -1], device).unwrap();
        let (logp, entropy) = logprobs_and_entropy(&logits, &targets, &options(1.0)).unwrap();
        let (nan, half) = (f64::NAN, 0.5_f64.ln());
        assert_close("logp", &to_vec(&logp), &[nan, half, nan], REL, ABS);
        let grads = (logp + entropy).unwrap().sum_all().unwrap().backward().unwrap();
        let want = [nan, nan, -0.5, 0.5, nan, nan];
        assert_close("grad", &to_vec(grads.get(&logits).unwrap()), &want, REL, ABS);
    }
}

#[test]
fn errors_say_the_same_through_the_result_of_candle() {
    let logits = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    let targets = Tensor::new(&[0_u32, 9], &Device::Cpu).unwrap();
    let of_candle = || -> candle_core::Result<Tensor> {
        Ok(logprobs(&logits, &targets, &LogprobOptions::default())?)
    };
    // candle may add a backtrace.
    let says = |text: String| {
        assert!(text.starts_with("logprob: `targets`[1] is 9, expected 0..3 or ignore_index"))
    };
    says(of_candle().unwrap_err().to_string());
    // There and back again.
    let back = Error::from(candle_core::Error::from(Error::from(of_candle().unwrap_err())));
    assert!(matches!(back, Error::Candle(_)));
    says(back.to_string());
}

#[test]
fn bad_input_is_refused_by_name() {
    let z = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    let t = Tensor::zeros(2, DType::U32, &Device::Cpu).unwrap();
    let fails = |z: &Tensor, t: &Tensor, o: &LogprobOptions| logprobs(z, t, o).unwrap_err();
    let ok = options(1.0);

    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-40, 1e300] {
        let error = fails(&z, &t, &options(bad));
        assert!(matches!(error, Error::Option { option: "temperature", .. }), "{error}");
    }
    let error = fails(&z.to_dtype(DType::F64).unwrap(), &t, &ok);
    assert!(matches!(error, Error::Dtype { arg: "logits", .. }), "{error}");
    let error = fails(&z, &t.to_dtype(DType::F32).unwrap(), &ok);
    assert!(matches!(error, Error::Dtype { arg: "targets", .. }), "{error}");
    let error = fails(&z, &t.reshape((1, 2)).unwrap(), &ok);
    assert!(matches!(error, Error::Shape { arg: "targets", .. }), "{error}");
    let error = fails(&Tensor::new(1.0_f32, &Device::Cpu).unwrap(), &t, &ok);
    assert!(matches!(error, Error::Shape { arg: "logits", .. }), "{error}");
    let error = fails(&Tensor::zeros((2, 0), DType::F32, &Device::Cpu).unwrap(), &t, &ok);
    assert!(matches!(error, Error::Shape { arg: "logits", .. }), "{error}");
    for bad in [3_i64, -1, -100, i64::MAX, i64::MIN] {
        let error = fails(&z, &Tensor::new(&[0, bad], &Device::Cpu).unwrap(), &ok);
        let named =
            matches!(error, Error::Target { row: 1, target, vocab: 3, .. } if target == bad);
        assert!(named, "{error}");
    }
    let mut logp = [0.0; 2];
    let inputs = ForwardInputs { logits: &[0.0_f32; 5][..], targets: &[0_u32, 0][..] };
    let error = cpu::forward(inputs, 2, 3, &ok, only(&mut logp)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "logprob: `logits` has shape [5] for a vocabulary of 3, expected [2, 3]"
    );
    let inputs = ForwardInputs { logits: &[0.0_f32; 0], targets: &[0_u32, 0] };
    let error = cpu::forward(inputs, 2, 0, &ok, only(&mut logp)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "logprob: `logits` has shape [0] for a vocabulary of 0, expected [2, 1]"
    );
}

#[test]
fn what_goes_together_is_given_together() {
    let (z, targets) = ([0.0_f32, 1.0, 2.0], [1_u32]);
    let forward = ForwardInputs { logits: &z, targets: &targets };
    let (mut logp, mut max, mut log_sum) = ([0.0], [0.0], [0.0]);
    let outputs = ForwardOutputs { max: Some(&mut max), ..only(&mut logp) };
    let error = cpu::forward(forward, 1, 3, &options(1.0), outputs).unwrap_err();
    assert_eq!(error.to_string(), "logprob: `log_sum` is missing, which `max` needs");
    let outputs = ForwardOutputs { log_sum: Some(&mut log_sum), ..only(&mut logp) };
    let error = cpu::forward(forward, 1, 3, &options(1.0), outputs).unwrap_err();
    assert_eq!(error.to_string(), "logprob: `max` is missing, which `log_sum` needs");

    let inputs = BackwardInputs {
        forward,
        max: &[2.0],
        log_sum: &[0.5],
        entropy: None,
        grad_logp: None,
        grad_entropy: Some(&[1.0]),
    };
    let mut grad = [0.0; 3];
    let outputs = BackwardOutputs { grad_logits: &mut grad };
    let error = cpu::backward(inputs, 1, 3, &options(1.0), outputs).unwrap_err();
    assert_eq!(error.to_string(), "logprob: `entropy` is missing, which `grad_entropy` needs");
}
