//! The kl op: the reference against other projects' functions, the CPU and the tensor layer against
//! the reference, and what must hold for any input.

mod common;

use approx::abs_diff_eq;
use candle_core::{DType, Device, Tensor, Var};
use common::kl_cases::{
    all_full_options, all_token_options, check_unlikely, pairs_of, special_row, Pair, ROWS,
    UNLIKELY,
};
use common::*;
use ppo_kernels::kl::cpu::{
    self, FullBackwardInputs, FullBackwardOutputs, FullForwardInputs, FullForwardOutputs,
    TokenBackwardInputs, TokenBackwardOutputs, TokenForwardInputs, TokenForwardOutputs,
};
use ppo_kernels::kl::{
    full_kl, reference, token_kl, Divergence, FullKlOptions, KlEstimator, KlOptions, STATS,
};
use ppo_kernels::tolerance;
use ppo_kernels::Error;
use rand::rngs::StdRng;
use rand::Rng;

const REL: f64 = tolerance::FULL_KL.tests.rel;
const ABS: f64 = tolerance::FULL_KL.tests.abs;

#[test]
fn reference_equals_the_peers_token_kl() {
    let (mut ran, mut gradients, mut skipped) = (0, 0, Vec::new());
    for case in golden("kl") {
        let first = |keys: [&'static str; 3]| {
            keys.into_iter().find(|key| case.inputs.contains_key(*key)).unwrap_or_default()
        };
        let kind = first(["kl_penalty", "kl_type", "kl_estimator"]);
        // Another form of the same, below; full has a test of its own; what verl's kl_penalty
        // refuses ("kl+" and its like) has no vectors.
        let refused = case.outputs.contains_key("raises");
        if kind.is_empty() || case.text(kind) == "full" || refused {
            skipped.push(case.id);
            continue;
        }
        let weighted = case.function.contains("importance_sampling_weights");
        let estimator = match case.text(kind) {
            "kl" | "k1" => KlEstimator::K1,
            "abs" => KlEstimator::Abs,
            "mse" | "k2" => KlEstimator::K2,
            // A weight of value 1 with the gradient of logp makes the gradient of k3 that of k2.
            "low_var_kl" | "k3" if weighted => KlEstimator::K3StraightThrough,
            "low_var_kl" | "k3" => KlEstimator::K3,
            other => panic!("{other}"),
        };
        let (log_ratio_clamp, output_clamp) = match case.peer.as_str() {
            "verl" if estimator == KlEstimator::K3 => (Some(20.0), Some(10.0)),
            "verl" | "trl-v0.11.4" => (None, None),
            "openrlhf" => (None, Some(10.0)),
            "nemo-rl" => (case.optional("input_clamp_value"), case.optional("output_clamp_value")),
            other => panic!("{other}"),
        };
        let options = KlOptions { estimator, log_ratio_clamp, output_clamp };
        let logp = case.input(first(["logprob", "log_probs", "logprobs"]));
        let base = case.input(first(["ref_logprob", "log_probs_base", "logprobs_reference"]));
        let (rel, abs) = if case.dtype == "float32" { (1e-5, 1e-5) } else { (1e-9, 1e-10) };

        let kl = reference::token_kl(&logp, &base, None, &options);
        assert_close(&format!("{} kl", case.id), &kl, &case.output("kl"), rel, abs);
        ran += 1;
        if weighted && estimator != KlEstimator::K3StraightThrough {
            // The weight's gradient is that of a ratio times k1 or k2, not one of this op.
            continue;
        }
        let up = case.input("grad_out");
        let (a, b) = reference::token_kl_backward(&logp, &base, None, &up, &options);
        for (key, grad) in [
            ("grad_logprob", &a),
            ("grad_log_probs", &a),
            ("grad_logprobs", &a),
            ("grad_ref_logprob", &b),
        ] {
            if case.outputs.contains_key(key) {
                assert_close(&format!("{} {key}", case.id), grad, &case.output(key), rel, abs);
                gradients += 1;
            }
        }
    }
    // Gradients to logp but for NeMo's k1 and k2 with weights, and verl's 22 to ref_logp as well.
    assert_eq!((ran, gradients), (67, 63 + 22));
    let skipped: Vec<&str> = skipped.iter().map(|id| &id[id.len() - 2..]).collect();
    assert_eq!(skipped, ["07", "08", "09", "10", "71", "72", "73"]);
}

#[test]
fn reference_equals_the_kl_in_verls_rewards() {
    let cases = golden("kl");
    let case = cases.iter().find(|case| case.function.ends_with("compute_rewards")).unwrap();
    let (logp, base) = (case.input("old_log_prob"), case.input("ref_log_prob"));
    let kl = reference::token_kl(&logp, &base, None, &KlOptions::default());
    let scores = case.input("token_level_scores");
    let rewards: Vec<f64> =
        scores.iter().zip(&kl).map(|(score, kl)| score - case.number("kl_ratio") * kl).collect();
    assert_close(&case.id, &rewards, &case.output("rewards"), 1e-9, 1e-10);
}

#[test]
fn reference_equals_the_peers_divergences() {
    let mut ran = 0;
    for case in golden("divergence") {
        let vocab = *case.shape("student_logits").last().unwrap();
        let (z, w) = (case.input("student_logits"), case.input("teacher_logits"));
        let of = |divergence, beta, temperature| {
            let options =
                FullKlOptions { divergence, beta, temperature, ..FullKlOptions::default() };
            let values = reference::full_kl(&z, &w, vocab, None, &options);
            (values, options)
        };
        let gradient = |up: &[f64], options: &FullKlOptions| {
            reference::full_kl_backward(&z, &w, vocab, None, up, options).0
        };
        let close = |key: &str, got: &[f64]| {
            assert_close(&format!("{} {key}", case.id), got, &case.output(key), 1e-6, 1e-7);
        };
        ran += 1;
        if case.function.ends_with("generalized_jsd_loss") {
            let (beta, temperature) = (case.number("beta"), case.number("temperature"));
            let (values, options) = match beta {
                0.0 => of(Divergence::Reverse, 0.5, temperature),
                1.0 => of(Divergence::Forward, 0.5, temperature),
                _ => of(Divergence::Jsd, beta, temperature),
            };
            let labels = case.input("labels");
            let kept = || labels.iter().map(|&label| f64::from(label != -100.0));
            let count = case.optional("num_items_in_batch").unwrap_or_else(|| kept().sum());
            let up: Vec<f64> = kept().map(|kept| kept / count).collect();
            let loss: f64 = values.iter().zip(&up).map(|(value, up)| value * up).sum();
            close("loss", &[loss]);
            close("grad_student_logits", &gradient(&up, &options));
            continue;
        }
        // speculators; the last two are made of the total variation and the KL.
        let up = case.input("grad_out");
        let (tv, tv_options) = of(Divergence::TotalVariation, 0.5, 1.0);
        let (kl, kl_options) = of(Divergence::Reverse, 0.5, 1.0);
        let overlap = || tv.iter().map(|tv| 1.0 - tv);
        let (values, gradient) = match case.function.rsplit('.').next().unwrap() {
            "kl_div_loss" => (kl.clone(), gradient(&up, &kl_options)),
            "reverse_kl_div_loss" => {
                let (values, options) = of(Divergence::Forward, 0.5, 1.0);
                (values, gradient(&up, &options))
            }
            "js_div_loss" => {
                let (values, options) = of(Divergence::Jsd, 0.5, 1.0);
                (values, gradient(&up, &options))
            }
            "tv_loss" => (tv.clone(), gradient(&up, &tv_options)),
            "neg_log_acceptance_loss" => {
                let up: Vec<f64> = up.iter().zip(overlap()).map(|(up, a)| up / a).collect();
                (overlap().map(|a| -a.ln()).collect(), gradient(&up, &tv_options))
            }
            "lk_hybrid_loss" => {
                let shares: Vec<f64> = overlap().map(|a| (-3.0 * a).exp()).collect();
                let mixed = |i: usize| shares[i] * kl[i] + (1.0 - shares[i]) * tv[i];
                let up_kl: Vec<f64> = up.iter().zip(&shares).map(|(up, s)| up * s).collect();
                let up_tv: Vec<f64> =
                    up.iter().zip(&shares).map(|(up, s)| up * (1.0 - s)).collect();
                let of_kl = gradient(&up_kl, &kl_options);
                let of_tv = gradient(&up_tv, &tv_options);
                let sum = of_kl.iter().zip(&of_tv).map(|(a, b)| a + b).collect();
                ((0..kl.len()).map(mixed).collect(), sum)
            }
            other => panic!("{other}"),
        };
        close("divergence", &values);
        close("grad_student_logits", &gradient);
    }
    assert_eq!(ran, 14);
}

#[test]
fn reference_equals_trls_full_kl() {
    let mut ran = 0;
    for case in golden("kl") {
        if case.inputs.get("kl_penalty").is_none_or(|kind| kind != "full") {
            continue;
        }
        let vocab = *case.shape("logits").last().unwrap();
        let (z, w, up) = (case.input("logits"), case.input("ref_logits"), case.input("grad_out"));
        let options = FullKlOptions::default();
        let kl = reference::full_kl(&z, &w, vocab, None, &options);
        assert_close(&case.id, &kl, &case.output("kl"), 1e-9, 1e-10);

        // TRL's gradient stops at the log-probabilities: through their log-softmax by hand.
        let (grad, _) = reference::full_kl_backward(&z, &w, vocab, None, &up, &options);
        let (logp, mut want) = (case.input("logprob"), case.output("grad_logprob"));
        for (g, logp) in want.chunks_mut(vocab).zip(logp.chunks(vocab)) {
            let sum: f64 = g.iter().sum();
            g.iter_mut().zip(logp).for_each(|(g, logp)| *g -= logp.exp() * sum);
        }
        assert_close(&format!("{} grad", case.id), &grad, &want, 1e-9, 1e-10);
        ran += 1;
    }
    assert_eq!(ran, 2);
}

#[test]
fn reference_gradients_are_the_derivatives_of_the_reference() {
    let mut rng = rng(1);
    let n = 24;
    for options in all_token_options() {
        if options.estimator == KlEstimator::K3StraightThrough {
            continue; // by design not the derivative of its value
        }
        let logp = wide(&uniform(&mut rng, n, 5.0));
        let base = wide(&uniform(&mut rng, n, 5.0));
        let mask = random_mask(&mut rng, n, 0.8);
        let up = wide(&uniform(&mut rng, n, 1.0));
        let value =
            |a: &[f64], b: &[f64]| dot(&up, &reference::token_kl(a, b, Some(&mask), &options));
        let (a, b) = reference::token_kl_backward(&logp, &base, Some(&mask), &up, &options);
        let what = format!("{options:?}");
        assert_close(&what, &a, &finite_difference(&logp, |x| value(x, &base)), 1e-6, 1e-6);
        assert_close(&what, &b, &finite_difference(&base, |x| value(&logp, x)), 1e-6, 1e-6);
    }
    for options in all_full_options() {
        let (rows, vocab) = (4, 7);
        let z = wide(&uniform(&mut rng, rows * vocab, 3.0));
        let w = wide(&uniform(&mut rng, rows * vocab, 3.0));
        let (mask, up) = ([1, 0, 1, 1], wide(&uniform(&mut rng, rows, 1.0)));
        let value = |z: &[f64], w: &[f64]| {
            dot(&up, &reference::full_kl(z, w, vocab, Some(&mask), &options))
        };
        let (a, b) = reference::full_kl_backward(&z, &w, vocab, Some(&mask), &up, &options);
        let what = format!("{options:?}");
        assert_close(&what, &a, &finite_difference(&z, |x| value(x, &w)), 1e-7, 1e-8);
        assert_close(&what, &b, &finite_difference(&w, |x| value(&z, x)), 1e-7, 1e-8);
    }
}

#[test]
fn straight_through_has_the_value_of_k3_and_the_gradient_of_k2() {
    let of = |estimator| KlOptions { estimator, ..KlOptions::default() };
    for d in [-3.0, -0.01, 0.0, 0.2, 5.0] {
        let (value, slope) = reference::token(d, &of(KlEstimator::K3StraightThrough));
        assert_eq!(value, reference::token(d, &of(KlEstimator::K3)).0);
        assert_eq!(slope, reference::token(d, &of(KlEstimator::K2)).1);
    }
}

#[test]
fn token_tensors_agree_with_the_reference_for_every_option() {
    let mut rng = rng(2);
    let shape = (3, 4099);
    let n = shape.0 * shape.1;
    for device in devices() {
        for options in all_token_options() {
            for masked in [false, true] {
                let (mut logp, base) = (uniform(&mut rng, n, 6.0), uniform(&mut rng, n, 6.0));
                let mask = random_mask(&mut rng, n, 0.7);
                let bytes = masked.then_some(mask.as_slice());
                if masked {
                    for (logp, &keep) in logp.iter_mut().zip(&mask) {
                        *logp = if keep == 0 { f32::NAN } else { *logp };
                    }
                }
                let up = uniform(&mut rng, n, 1.0);
                let tensor = |v: &[f32]| Tensor::from_slice(v, shape, &device).unwrap();
                let (a, b) = (var(&tensor(&logp)), var(&tensor(&base)));
                let keep = Tensor::from_slice(&mask, shape, &device).unwrap();
                let kl = token_kl(&a, &b, masked.then_some(&keep), &options).unwrap();
                let loss = (&kl * tensor(&up)).unwrap().sum_all().unwrap();
                let grads = loss.backward().unwrap();

                let what = format!("{options:?} masked {masked}");
                let (logp, base, up) = (wide(&logp), wide(&base), wide(&up));
                let want = reference::token_kl(&logp, &base, bytes, &options);
                assert_eq!(kl.dims(), [3, 4099]);
                assert_close(&what, &to_vec(&kl), &want, REL, ABS);
                let want = reference::token_kl_backward(&logp, &base, bytes, &up, &options);
                assert_close(&what, &to_vec(grads.get(&a).unwrap()), &want.0, REL, ABS);
                assert_close(&what, &to_vec(grads.get(&b).unwrap()), &want.1, REL, ABS);
            }
        }
    }
}

#[test]
fn a_clamp_keeps_the_gradient_of_a_hopeless_token_finite() {
    let logp = [-500.0_f32, 0.0, -0.5];
    let base = [0.0_f32, -500.0, -0.5];
    let inputs = TokenForwardInputs { logp: &logp, ref_logp: &base, mask: None };
    let options =
        KlOptions { estimator: KlEstimator::K3, log_ratio_clamp: Some(20.0), output_clamp: None };
    let (mut kl, mut grad) = ([0.0; 3], [0.0; 3]);
    cpu::token_forward(inputs, 3, &options, TokenForwardOutputs { kl: &mut kl }).unwrap();
    let inputs = TokenBackwardInputs { forward: inputs, grad_kl: &[1.0; 3] };
    let outputs = TokenBackwardOutputs { grad_logp: Some(&mut grad), grad_ref_logp: None };
    cpu::token_backward(inputs, 3, &options, outputs).unwrap();
    assert!(kl.iter().all(|kl| kl.is_finite()));
    assert_eq!(grad, [0.0; 3]);
}

fn var(tensor: &Tensor) -> Var {
    Var::from_tensor(tensor).unwrap()
}

/// Odd vocabularies around every block and lane boundary.
const VOCABULARIES: [usize; 12] = [1, 2, 3, 15, 16, 17, 257, 1000, 1023, 1024, 1025, 5003];

#[test]
fn full_tensors_agree_with_the_reference_in_every_dtype() {
    let mut rng = rng(3);
    let pairs: Vec<Pair> = VOCABULARIES.iter().flat_map(|&v| pairs_of(&mut rng, v)).collect();
    for pair in pairs {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            for options in all_full_options() {
                for device in devices() {
                    check_against_reference(&pair, dtype, &options, &device, &mut rng);
                }
            }
        }
    }
}

fn check_against_reference(
    pair: &Pair,
    dtype: DType,
    options: &FullKlOptions,
    device: &Device,
    rng: &mut StdRng,
) {
    let vocab = pair.vocab;
    let what = format!("{} V={vocab} {dtype:?} {options:?}", pair.name);
    let logits = |values: &[f32]| {
        let logits = Tensor::from_slice(values, (ROWS, vocab), device).unwrap();
        var(&logits.to_dtype(dtype).unwrap())
    };
    let (z, w) = (logits(&pair.z), logits(&pair.w));
    let up = uniform(rng, ROWS, 1.0);
    let kl = full_kl(&z, &w, None, options).unwrap();
    assert_eq!((kl.dims(), kl.dtype()), (&[ROWS][..], DType::F32));
    // What the op reads, after rounding to its dtype.
    let (z64, w64) = (to_vec(&z), to_vec(&w));
    let want = reference::full_kl(&z64, &w64, vocab, None, options);
    assert_close(&what, &to_vec(&kl), &want, REL, ABS);
    // x - y - gap is a difference of terms as large as the KL, and gap a mean of 64 such per lane,
    // good for 4 units in the last place.
    let largest = want.into_iter().filter(|kl| kl.is_finite()).fold(0.0, f64::max);
    let abs = ABS + 4.0 * f64::from(f32::EPSILON) * largest;

    let upstream = Tensor::from_slice(&up, ROWS, device).unwrap();
    let grads = (kl * upstream).unwrap().sum_all().unwrap().backward().unwrap();
    let want = reference::full_kl_backward(&z64, &w64, vocab, None, &wide(&up), options);
    // Half a unit in the last place of the gradient's own type.
    let rel = match dtype {
        DType::BF16 => 2f64.powi(-8),
        DType::F16 => 2f64.powi(-11),
        _ => REL,
    };
    for (which, logits, want) in [("policy", &z, want.0), ("reference", &w, want.1)] {
        let grad = grads.get(logits).unwrap();
        assert_eq!(grad.dtype(), dtype);
        assert_close(&format!("{what} {which}"), &to_vec(grad), &want, rel, abs);
    }
}

/// The statistics of the raw layer, the KL in front.
fn forward(z: &[f32], w: &[f32], vocab: usize, options: &FullKlOptions) -> Vec<f32> {
    let inputs = FullForwardInputs { logits: z, ref_logits: w, mask: None };
    let rows = z.len() / vocab;
    let mut stats = vec![0.0; STATS * rows];
    let outputs = FullForwardOutputs { stats: &mut stats };
    cpu::full_forward(inputs, rows, vocab, options, outputs).unwrap();
    stats
}

/// Gradients of the raw layer.
fn backward(
    z: &[f32],
    w: &[f32],
    vocab: usize,
    up: &[f32],
    options: &FullKlOptions,
) -> (Vec<f32>, Vec<f32>) {
    let stats = forward(z, w, vocab, options);
    let forward = FullForwardInputs { logits: z, ref_logits: w, mask: None };
    let inputs = FullBackwardInputs { forward, stats: &stats, grad_kl: up };
    let (mut a, mut b) = (vec![0.0; z.len()], vec![0.0; z.len()]);
    let outputs = FullBackwardOutputs { grad_logits: Some(&mut a), grad_ref_logits: Some(&mut b) };
    cpu::full_backward(inputs, z.len() / vocab, vocab, options, outputs).unwrap();
    (a, b)
}

#[test]
fn a_clamp_bounds_the_estimate_of_a_token_that_cannot_be() {
    let options =
        KlOptions { estimator: KlEstimator::K3, log_ratio_clamp: None, output_clamp: Some(10.0) };
    let inputs = TokenForwardInputs { logp: &[f32::NEG_INFINITY], ref_logp: &[-1.0], mask: None };
    let (mut kl, mut grad) = ([f32::NAN], [f32::NAN]);
    cpu::token_forward(inputs, 1, &options, TokenForwardOutputs { kl: &mut kl }).unwrap();
    let inputs = TokenBackwardInputs { forward: inputs, grad_kl: &[1.0] };
    let outputs = TokenBackwardOutputs { grad_logp: Some(&mut grad), grad_ref_logp: None };
    cpu::token_backward(inputs, 1, &options, outputs).unwrap();
    assert_eq!((kl, grad), ([10.0], [0.0]));
}

#[test]
fn gradients_of_unlikely_tokens_are_right_down_to_the_least_float() {
    let [z, w] = &UNLIKELY;
    for up in [1.0, 1e20, 1e-15] {
        let (a, b) = backward(z, w, 8, &[up], &FullKlOptions::default());
        check_unlikely([&a, &b], up, false);
    }
}

#[test]
fn full_kl_of_nearly_equal_models_keeps_its_digits() {
    let mut rng = rng(4);
    let vocab = 50_257;
    let z = uniform(&mut rng, vocab, 8.0);
    for nudge in [1e-1, 1e-2, 1e-3] {
        let shift = uniform(&mut rng, vocab, nudge);
        let w: Vec<f32> = z.iter().zip(&shift).map(|(z, shift)| z + shift).collect();
        for options in all_full_options() {
            let kl = f64::from(forward(&z, &w, vocab, &options)[0]);
            let want = reference::full_kl(&wide(&z), &wide(&w), vocab, None, &options)[0];
            // Well under a rounding of ln Q, which is about 10.
            assert!(abs_diff_eq!(kl, want, epsilon = 1e-7 + 1e-6 * want), "{kl} {want}");
        }
    }
    // And none of it is lost to an offset between the two.
    let z: Vec<f32> = z.iter().map(|z| (z * 64.0).round() / 64.0).collect();
    let w: Vec<f32> = z.iter().map(|z| z + 1e4).collect();
    assert_eq!(forward(&z, &w, vocab, &FullKlOptions::default())[0], 0.0);
    let (a, b) = backward(&z, &w, vocab, &[1.0], &FullKlOptions::default());
    assert!(a.iter().chain(&b).all(|&g| g == 0.0));
}

#[test]
fn a_token_the_reference_excludes_makes_the_kl_infinite() {
    for vocab in [3, 40, 5003] {
        let (mut z, mut w) = (vec![0.0; vocab], vec![1.0; vocab]);
        w[0] = f32::NEG_INFINITY;
        // Later blocks are larger by more than any exp can carry, and p[0] is nothing in f32.
        z[vocab - 1] = 2000.0;
        let (z64, w64) = (wide(&z), wide(&w));
        for options in all_full_options() {
            let up = [0.5];
            let kl = wide(&forward(&z, &w, vocab, &options)[..1]);
            assert_close(
                "kl",
                &kl,
                &reference::full_kl(&z64, &w64, vocab, None, &options),
                REL,
                ABS,
            );
            let got = backward(&z, &w, vocab, &up, &options);
            let want = reference::full_kl_backward(&z64, &w64, vocab, None, &wide(&up), &options);
            assert_close("grad", &wide(&got.0), &want.0, REL, ABS);
            assert_close("grad ref", &wide(&got.1), &want.1, REL, ABS);
            if options.divergence == Divergence::Forward {
                assert_eq!(kl, [f64::INFINITY]);
                assert!(got.0.iter().all(|g| g.is_nan()) && got.1.iter().all(|g| g.is_finite()));
            } else {
                // Others are finite always.
                assert!(kl[0].is_finite());
            }
        }
        // Excluded by both is no difference.
        z[0] = f32::NEG_INFINITY;
        assert!(forward(&z, &w, vocab, &FullKlOptions::default())[0].is_finite());
    }
}

/// Against series in d, the difference of the logits, of which p and q are nearly the same.
#[test]
fn divergences_of_nearly_equal_rows_keep_their_digits() {
    let (vocab, mut rng) = (5000, rng(17));
    let z = uniform(&mut rng, vocab, 3.0);
    for size in [1e-2_f32, 1e-3, 1e-4] {
        let w: Vec<f32> = z.iter().map(|z| z + size * rng.random_range(-1.0..1.0f32)).collect();
        let (z64, w64) = (wide(&z), wide(&w));
        for options in all_full_options().into_iter().filter(|options| {
            !matches!(options.divergence, Divergence::Forward | Divergence::Reverse)
        }) {
            let options = FullKlOptions { temperature: 1.0, ..options };
            let got = f64::from(forward(&z, &w, vocab, &options)[0]);
            let want = reference::full_kl(&z64, &w64, vocab, None, &options)[0];
            // The total variation is of the first order in d, and so is what rounding of d does to it.
            let is_first = options.divergence == Divergence::TotalVariation;
            let within = 1e-4 * want + if is_first { 1e-7 } else { 0.0 };
            assert!((got - want).abs() <= within, "{options:?} {size}: {got:e} {want:e}");
            if is_first {
                // Its gradient jumps where p = q.
                continue;
            }
            let grads = backward(&z, &w, vocab, &[1.0], &options);
            let want = reference::full_kl_backward(&z64, &w64, vocab, None, &[1.0], &options);
            for (got, want) in [(grads.0, want.0), (grads.1, want.1)] {
                let largest = want.iter().fold(0.0_f64, |most, g| most.max(g.abs()));
                assert_close("gradient", &wide(&got), &want, 1e-3, 1e-3 * largest);
            }
        }
    }
}

/// Of probabilities that can be worked out by eye.
#[test]
fn divergences_by_hand() {
    let (z, w) = ([3f32.ln(), 0.0], [0.0, 0.0]);
    let of = |divergence, beta, skew| {
        let options = FullKlOptions { divergence, beta, skew, ..Default::default() };
        f64::from(forward(&z, &w, 2, &options)[0])
    };
    let kl = |p: [f64; 2], m: [f64; 2]| p[0] * (p[0] / m[0]).ln() + p[1] * (p[1] / m[1]).ln();
    let (p, q) = ([0.75, 0.25], [0.5, 0.5]);
    let mixed = |a: f64| [a * p[0] + (1.0 - a) * q[0], a * p[1] + (1.0 - a) * q[1]];
    for (got, want) in [
        (of(Divergence::TotalVariation, 0.5, 0.5), 0.25),
        (of(Divergence::Jsd, 0.1, 0.5), 0.1 * kl(q, mixed(0.9)) + 0.9 * kl(p, mixed(0.9))),
        (of(Divergence::SkewForward, 0.5, 0.1), kl(p, mixed(0.1))),
        (of(Divergence::SkewReverse, 0.5, 0.1), kl(q, mixed(0.9))),
    ] {
        assert_close("divergence", &[got], &[want], 1e-6, 1e-7);
    }
}

#[test]
fn a_bad_row_is_nan_and_spoils_no_other() {
    for vocab in [5, 3000] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for in_reference in [false, true] {
                for options in all_full_options() {
                    let (mut z, mut w) = (vec![0.5_f32; 3 * vocab], vec![0.0; 3 * vocab]);
                    let spoilt = if in_reference { &mut w } else { &mut z };
                    if bad == f32::NEG_INFINITY {
                        spoilt[vocab..2 * vocab].fill(bad); // throughout: no distribution
                    } else {
                        spoilt[vocab + vocab / 2] = bad;
                        spoilt[vocab] = f32::NEG_INFINITY; // legal, and no way out
                    }
                    let stats = forward(&z, &w, vocab, &options);
                    assert_eq!((stats[0], stats[2]), (0.0, 0.0));
                    assert!(stats[1].is_nan(), "{bad} in reference {in_reference} {options:?}");
                    let (a, b) = backward(&z, &w, vocab, &[1.0; 3], &options);
                    for grad in [a, b] {
                        for (row, grad) in grad.chunks(vocab).enumerate() {
                            assert!(grad.iter().all(|g| g.is_nan() == (row == 1)));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn blocks_of_excluded_tokens_before_the_first_legal_one_are_legal() {
    let vocab = 3000;
    let (mut z, mut w) = (vec![f32::NEG_INFINITY; vocab], vec![f32::NEG_INFINITY; vocab]);
    (z[vocab - 1], z[vocab - 2], w[vocab - 1], w[vocab - 2]) = (2.0, 2.0, -1.0, 0.0);
    w[0] = 5.0; // the reference's first block has a token, the policy's none
    for options in all_full_options() {
        let kl = wide(&forward(&z, &w, vocab, &options)[..1]);
        let want = reference::full_kl(&wide(&z), &wide(&w), vocab, None, &options);
        assert_close("kl", &kl, &want, REL, ABS);
    }
    z[0] = f32::NAN; // in a block with no number
    assert!(forward(&z, &w, vocab, &FullKlOptions::default())[0].is_nan());
}

#[test]
fn masked_rows_are_zero_whatever_they_hold() {
    for device in devices() {
        let z = [[f32::NAN, 1.0, 2.0], [0.0, 1.0, 2.0], [f32::INFINITY, 0.0, 0.0]];
        let w = [[0.0_f32, f32::NAN, 2.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]];
        let z = var(&Tensor::new(&z, &device).unwrap());
        let w = var(&Tensor::new(&w, &device).unwrap());
        let mask = Tensor::new(&[0_u8, 7, 0], &device).unwrap();
        for options in all_full_options() {
            let kl = full_kl(&z, &w, Some(&mask), &options).unwrap();
            let row = |t: &Var| to_vec(&t.get(1).unwrap());
            let want = reference::full_kl(&row(&z), &row(&w), 3, None, &options)[0];
            assert_close("kl", &to_vec(&kl), &[0.0, want, 0.0], REL, ABS);
            let grads = kl.sum_all().unwrap().backward().unwrap();
            let (a, b) = reference::full_kl_backward(&row(&z), &row(&w), 3, None, &[1.0], &options);
            for (logits, want) in [(&z, a), (&w, b)] {
                let want = [vec![0.0; 3], want, vec![0.0; 3]].concat();
                assert_close("grad", &to_vec(grads.get(logits).unwrap()), &want, REL, ABS);
            }
        }
    }
}

#[test]
fn what_has_no_upstream_gradient_gets_zero_whatever_it_holds() {
    for device in devices() {
        let z = var(&Tensor::new(&[[f32::NAN, 1.0], [0.0, 0.0]], &device).unwrap());
        let w = var(&Tensor::new(&[[0.0_f32, 0.0], [0.0, f32::INFINITY]], &device).unwrap());
        let kl = full_kl(&z, &w, None, &FullKlOptions::default()).unwrap();
        assert!(to_vec(&kl).iter().all(|kl| kl.is_nan()));
        let up = Tensor::new(&[0.0_f32, -0.0], &device).unwrap();
        let grads = (kl * up).unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(to_vec(grads.get(&z).unwrap()), [0.0; 4]);
        assert_eq!(to_vec(grads.get(&w).unwrap()), [0.0; 4]);

        let logp = var(&Tensor::new(&[f32::NAN, f32::NEG_INFINITY], &device).unwrap());
        let base = Tensor::new(&[0.0_f32, 0.0], &device).unwrap();
        for options in all_token_options() {
            let kl = token_kl(&logp, &base, None, &options).unwrap();
            let grads = (kl * &base).unwrap().sum_all().unwrap().backward().unwrap();
            assert_eq!(to_vec(grads.get(&logp).unwrap()), [0.0; 2]);
        }
    }
}

#[test]
fn only_tracked_arguments_get_a_gradient() {
    let mut rng = rng(5);
    for device in devices() {
        let mut random = || Tensor::from_vec(uniform(&mut rng, 20, 2.0), (4, 5), &device).unwrap();
        let (z, w) = (random(), random());
        for options in all_full_options() {
            let plain = full_kl(&z, &w, None, &options).unwrap();
            assert!(!plain.track_op());
            let (zv, wv) = (var(&z), var(&w));
            let both = full_kl(&zv, &wv, None, &options).unwrap().backward().unwrap();
            let policy = full_kl(&zv, &w, None, &options).unwrap().backward().unwrap();
            let other = full_kl(&z, &wv, None, &options).unwrap().backward().unwrap();
            let of = |grads: &candle_core::backprop::GradStore, v: &Var| grads.get(v).map(to_vec);
            assert_eq!(of(&policy, &zv), of(&both, &zv));
            assert_eq!(of(&other, &wv), of(&both, &wv));
            assert!(policy.get(&w).is_none() && other.get(&z).is_none());
        }
        for options in all_token_options() {
            assert!(!token_kl(&z, &w, None, &options).unwrap().track_op());
            let (zv, wv) = (var(&z), var(&w));
            let both = token_kl(&zv, &wv, None, &options).unwrap().backward().unwrap();
            let policy = token_kl(&zv, &w, None, &options).unwrap().backward().unwrap();
            let other = token_kl(&z, &wv, None, &options).unwrap().backward().unwrap();
            let of = |grads: &candle_core::backprop::GradStore, v: &Var| grads.get(v).map(to_vec);
            assert_eq!(of(&policy, &zv), of(&both, &zv));
            assert_eq!(of(&other, &wv), of(&both, &wv));
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn bits_depend_neither_on_threads_nor_on_the_other_rows() {
    let mut rng = rng(6);
    let (rows, vocab) = (37, 4099);
    let z = uniform(&mut rng, rows * vocab, 8.0);
    let w = uniform(&mut rng, rows * vocab, 8.0);
    let up = uniform(&mut rng, rows, 1.0);
    let options = FullKlOptions { temperature: 0.9, ..FullKlOptions::default() };
    let run = |z: &[f32], w: &[f32], up: &[f32]| {
        let (a, b) = backward(z, w, vocab, up, &options);
        [bits(&forward(z, w, vocab, &options)), bits(&a), bits(&b)]
    };
    let token = KlOptions { estimator: KlEstimator::K3, ..KlOptions::default() };
    let run_token = || {
        let inputs = TokenForwardInputs { logp: &z, ref_logp: &w, mask: None };
        let (mut kl, mut a, mut b) = (z.clone(), z.clone(), z.clone());
        cpu::token_forward(inputs, z.len(), &token, TokenForwardOutputs { kl: &mut kl }).unwrap();
        let inputs = TokenBackwardInputs { forward: inputs, grad_kl: &z };
        let outputs = TokenBackwardOutputs { grad_logp: Some(&mut a), grad_ref_logp: Some(&mut b) };
        cpu::token_backward(inputs, z.len(), &token, outputs).unwrap();
        [bits(&kl), bits(&a), bits(&b)]
    };
    let whole = with_threads(1, || run(&z, &w, &up));
    let tokens = with_threads(1, run_token);
    for threads in [2, 3, 8] {
        assert!(whole == with_threads(threads, || run(&z, &w, &up)));
        assert!(tokens == with_threads(threads, run_token));
    }
    for row in [0, 17, 36] {
        let columns = row * vocab..(row + 1) * vocab;
        let alone = run(&z[columns.clone()], &w[columns.clone()], &up[row..=row]);
        assert_eq!(alone[0][0], whole[0][row]);
        assert!(alone[1][..] == whole[1][columns.clone()]);
        assert!(alone[2][..] == whole[2][columns]);
    }
}

#[test]
fn the_exact_kl_is_never_negative() {
    let mut rng = rng(11);
    for vocab in [2, 17, 1000, 5003] {
        for scale in [1e-6, 1e-5, 1e-4] {
            for options in all_full_options() {
                let z = uniform(&mut rng, 20 * vocab, 4.0);
                let nudge = uniform(&mut rng, 20 * vocab, scale);
                let w: Vec<f32> = z.iter().zip(&nudge).map(|(z, nudge)| z + nudge).collect();
                let kl = &forward(&z, &w, vocab, &options)[..20];
                assert!(kl.iter().all(|&kl| kl >= 0.0), "{kl:?}");
            }
        }
    }
}

#[test]
fn special_values_anywhere_give_what_the_reference_gives() {
    let mut rng = rng(9);
    let (mut finite, mut infinite, mut nan) = (0, 0, 0);
    let all = all_full_options();
    for round in 0..10_000 {
        let vocab = [1, 2, 5, 16, 17, 40, 1030][rng.random_range(0..7)];
        let (z, w) = special_row(&mut rng, vocab);
        let options = all[round % all.len()];
        let kl = wide(&forward(&z, &w, vocab, &options)[..1]);
        let (a, b) = backward(&z, &w, vocab, &[1.0], &options);

        let (z, w) = (wide(&z), wide(&w));
        let want = reference::full_kl(&z, &w, vocab, None, &options);
        let (want_a, want_b) = reference::full_kl_backward(&z, &w, vocab, None, &[1.0], &options);
        match want[0] {
            x if x.is_finite() => finite += 1,
            x if x.is_nan() => nan += 1,
            _ => infinite += 1,
        }
        let what = format!("{options:?} {z:?} {w:?}");
        assert_close(&what, &kl, &want, REL, ABS);
        // The gradient is p times differences of terms as large as the KL.
        let abs = 4.0 * ABS + REL * if want[0].is_finite() { want[0] } else { 0.0 };
        assert_close(&what, &wide(&a), &want_a, REL, abs);
        assert_close(&what, &wide(&b), &want_b, REL, abs);
    }
    assert!(finite > 1000 && infinite > 200 && nan > 200, "{finite} {infinite} {nan}");
}

#[test]
fn arguments_may_share_a_tensor_and_results_be_used_twice() {
    let mut rng = rng(10);
    for device in devices() {
        let x = var(&Tensor::from_vec(uniform(&mut rng, 12, 2.0), (4, 3), &device).unwrap());
        // Of a tensor to itself: the two gradients cancel, or at the value 0 are 0.
        for options in all_full_options() {
            let grads = full_kl(&x, &x, None, &options).unwrap().backward().unwrap();
            assert_close("full", &to_vec(grads.get(&x).unwrap()), &[0.0; 12], REL, ABS);
        }
        for options in all_token_options() {
            let grads = token_kl(&x, &x, None, &options).unwrap().backward().unwrap();
            assert_eq!(to_vec(grads.get(&x).unwrap()), [0.0; 12]);
        }

        let other = Tensor::from_vec(uniform(&mut rng, 12, 2.0), (4, 3), &device).unwrap();
        let options = KlOptions { estimator: KlEstimator::K3, ..KlOptions::default() };
        let kl = token_kl(&x, &other, None, &options).unwrap();
        // Once through a transpose, once through a mean.
        let weights = Tensor::from_vec(uniform(&mut rng, 12, 1.0), (3, 4), &device).unwrap();
        let first = (kl.t().unwrap() * &weights).unwrap().sum_all().unwrap();
        let loss = (first + kl.mean_all().unwrap()).unwrap();
        let grads = loss.backward().unwrap();
        let up: Vec<f64> = to_vec(&weights.t().unwrap()).iter().map(|g| g + 1.0 / 12.0).collect();
        let (x64, other) = (to_vec(&x), to_vec(&other));
        let want = reference::token_kl_backward(&x64, &other, None, &up, &options).0;
        assert_close("token", &to_vec(grads.get(&x).unwrap()), &want, REL, ABS);
    }
}

#[test]
fn rows_that_are_split_have_the_same_bits_in_any_company() {
    let mut rng = rng(12);
    let (rows, vocab) = (3, 100_003);
    let z = uniform(&mut rng, rows * vocab, 8.0);
    let w = uniform(&mut rng, rows * vocab, 8.0);
    let options = FullKlOptions::default();
    let run = |z: &[f32], w: &[f32]| {
        let (a, b) = backward(z, w, vocab, &[1.0; 3][..z.len() / vocab], &options);
        [bits(&forward(z, w, vocab, &options)), bits(&a), bits(&b)]
    };
    let whole = with_threads(1, || run(&z, &w));
    let row = vocab..2 * vocab;
    for threads in [2, 3, 8] {
        assert!(whole == with_threads(threads, || run(&z, &w)));
        let alone = with_threads(threads, || run(&z[row.clone()], &w[row.clone()]));
        assert_eq!(alone[0][0], whole[0][1]);
        assert!(alone[1][..] == whole[1][row.clone()] && alone[2][..] == whole[2][row.clone()]);
    }
}

#[test]
fn maxima_that_grow_along_the_rows_cost_no_digits() {
    let vocab = 100_003;
    let ramp = |slope: f32| (0..vocab).map(|i| i as f32 * slope).collect::<Vec<f32>>();
    let slopes = [1e-3, -1e-3, 2e-5, -2e-5];
    for (a, b) in slopes.into_iter().flat_map(|a| slopes.map(|b| (a, b))) {
        let (z, w) = (ramp(a), ramp(b));
        for options in all_full_options() {
            let kl = f64::from(forward(&z, &w, vocab, &options)[0]);
            let want = reference::full_kl(&wide(&z), &wide(&w), vocab, None, &options)[0];
            assert!(abs_diff_eq!(kl, want, epsilon = 1e-6 + 2e-6 * want), "{a} {b}: {kl} {want}");
        }
    }
}

#[test]
fn strided_and_offset_tensors_give_the_same() {
    let mut rng = rng(7);
    for device in devices() {
        let shape = (2, 3, 11);
        let mut random = || Tensor::from_vec(uniform(&mut rng, 66, 2.0), shape, &device).unwrap();
        let (z, w) = (random(), random());
        let rows = Tensor::new(&[[1_u8, 0, 1], [1, 1, 0]], &device).unwrap();
        let options = FullKlOptions::default();
        let plain = full_kl(&z, &w, Some(&rows), &options).unwrap();
        assert_eq!(plain.dims(), [2, 3]);
        let other = full_kl(&strided(&z), &strided(&w), Some(&strided(&rows)), &options).unwrap();
        assert_eq!(to_vec(&plain), to_vec(&other));
        let swap = |t: &Tensor| t.transpose(0, 1).unwrap();
        let other = full_kl(&swap(&z), &swap(&w), Some(&swap(&rows)), &options).unwrap();
        assert_eq!(to_vec(&plain), to_vec(&swap(&other)));

        let options = KlOptions::default();
        let mask = Tensor::from_vec(random_mask(&mut rng, 66, 0.5), shape, &device).unwrap();
        let plain = token_kl(&z, &w, Some(&mask), &options).unwrap();
        let other = token_kl(&strided(&z), &swap(&swap(&w)), Some(&strided(&mask)), &options);
        assert_eq!(to_vec(&plain), to_vec(&other.unwrap()));
        let other = token_kl(&swap(&z), &swap(&w), Some(&swap(&mask)), &options).unwrap();
        assert_eq!(to_vec(&plain), to_vec(&swap(&other)));
    }
}

#[test]
fn the_gradient_reaches_a_strided_leaf() {
    let mut rng = rng(8);
    for device in devices() {
        let mut random =
            || var(&Tensor::from_vec(uniform(&mut rng, 15, 2.0), (5, 3), &device).unwrap());
        let (z, w) = (random(), random());
        let (zt, wt) = (z.t().unwrap(), w.t().unwrap());
        let options = FullKlOptions::default();
        let grads = full_kl(&zt, &wt, None, &options).unwrap().backward().unwrap();
        let (zs, ws) = (to_vec(&zt), to_vec(&wt));
        let want = reference::full_kl_backward(&zs, &ws, 5, None, &[1.0; 3], &options);
        for (logits, want) in [(&z, want.0), (&w, want.1)] {
            let grad = grads.get(logits).unwrap().t().unwrap();
            assert_close("grad", &to_vec(&grad), &want, REL, ABS);
        }
        let options = KlOptions { estimator: KlEstimator::K2, ..KlOptions::default() };
        let grads = token_kl(&zt, &wt, None, &options).unwrap().backward().unwrap();
        let want = reference::token_kl_backward(&zs, &ws, None, &[1.0; 15], &options);
        for (leaf, want) in [(&z, want.0), (&w, want.1)] {
            let grad = grads.get(leaf).unwrap().t().unwrap();
            assert_close("grad", &to_vec(&grad), &want, REL, ABS);
        }
    }
}

#[test]
fn empty_and_single_element_shapes_work() {
    for device in devices_with_empty_tensors() {
        let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &device).unwrap();
        for dims in [&[0][..], &[2, 0], &[], &[1, 1]] {
            let kl = token_kl(&zeros(dims), &zeros(dims), None, &KlOptions::default()).unwrap();
            assert_eq!(kl.dims(), dims);
        }
        for dims in [&[0, 5][..], &[2, 0, 5], &[1], &[1, 1], &[5]] {
            let (z, w) = (var(&zeros(dims)), var(&zeros(dims)));
            let kl = full_kl(&z, &w, None, &FullKlOptions::default()).unwrap();
            assert_eq!(kl.dims(), &dims[..dims.len() - 1]);
            assert!(to_vec(&kl).iter().all(|&kl| kl == 0.0));
            let grads = kl.sum_all().unwrap().backward().unwrap();
            assert_eq!(grads.get(&z).unwrap().dims(), dims);
        }
    }
}

#[test]
fn bad_token_input_is_refused_by_name() {
    let a = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    let mask = Tensor::zeros((2, 3), DType::U8, &Device::Cpu).unwrap();
    let ok = KlOptions::default();
    let fails =
        |a: &Tensor, b: &Tensor, m: &Tensor, o: &KlOptions| token_kl(a, b, Some(m), o).unwrap_err();
    let (half, flat) = (a.to_dtype(DType::F16).unwrap(), a.flatten_all().unwrap());

    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let error = fails(&a, &a, &mask, &KlOptions { log_ratio_clamp: Some(bad), ..ok });
        assert!(matches!(error, Error::Option { option: "log_ratio_clamp", .. }), "{error}");
        let error = fails(&a, &a, &mask, &KlOptions { output_clamp: Some(bad), ..ok });
        assert!(matches!(error, Error::Option { option: "output_clamp", .. }), "{error}");
    }
    let error = fails(&half, &a, &mask, &ok);
    assert!(matches!(error, Error::Dtype { arg: "logp", .. }), "{error}");
    let error = fails(&a, &half, &mask, &ok);
    assert!(matches!(error, Error::Dtype { arg: "ref_logp", .. }), "{error}");
    let error = fails(&a, &flat, &mask, &ok);
    assert!(matches!(error, Error::Shape { arg: "ref_logp", .. }), "{error}");
    let error = fails(&a, &a, &a, &ok);
    assert!(matches!(error, Error::Dtype { arg: "mask", .. }), "{error}");
    let error = fails(&a, &a, &mask.flatten_all().unwrap(), &ok);
    assert!(matches!(error, Error::Shape { arg: "mask", .. }), "{error}");

    let (two, three) = ([0.0_f32; 2], [0.0_f32; 3]);
    let plain = TokenForwardInputs { logp: &three, ref_logp: &three, mask: None };
    let run = |inputs, len| {
        let outputs = TokenForwardOutputs { kl: &mut vec![0.0; len] };
        cpu::token_forward(inputs, 3, &ok, outputs).unwrap_err()
    };
    let back = |up: &[f32], a: usize, b: usize| {
        let (mut a, mut b) = (vec![0.0; a], vec![0.0; b]);
        let inputs = TokenBackwardInputs {
            forward: TokenForwardInputs { logp: &three, ref_logp: &three, mask: None },
            grad_kl: up,
        };
        let outputs = TokenBackwardOutputs { grad_logp: Some(&mut a), grad_ref_logp: Some(&mut b) };
        cpu::token_backward(inputs, 3, &ok, outputs).unwrap_err()
    };
    for (error, name) in [
        (run(TokenForwardInputs { logp: &two, ..plain }, 3), "logp"),
        (run(TokenForwardInputs { ref_logp: &two, ..plain }, 3), "ref_logp"),
        (run(TokenForwardInputs { mask: Some(&[1, 1]), ..plain }, 3), "mask"),
        (run(plain, 2), "kl"),
        (back(&two, 3, 3), "grad_kl"),
        (back(&three, 2, 3), "grad_logp"),
        (back(&three, 3, 2), "grad_ref_logp"),
    ] {
        assert_eq!(error.to_string(), format!("token_kl: `{name}` has shape [2], expected [3]"));
    }
}

#[test]
fn bad_full_input_is_refused_by_name() {
    let a = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    let mask = Tensor::zeros(2, DType::U8, &Device::Cpu).unwrap();
    let ok = FullKlOptions::default();
    let fails = |a: &Tensor, b: &Tensor, m: &Tensor, o: &FullKlOptions| {
        full_kl(a, b, Some(m), o).unwrap_err()
    };
    let (half, flat) = (a.to_dtype(DType::F16).unwrap(), a.flatten_all().unwrap());

    for temperature in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-40, 1e300] {
        let error = fails(&a, &a, &mask, &FullKlOptions { temperature, ..ok });
        assert!(matches!(error, Error::Option { option: "temperature", .. }), "{error}");
    }
    for end in [0.0, 1.0, -0.1, f64::NAN] {
        let error = fails(&a, &a, &mask, &FullKlOptions { beta: end, ..ok });
        assert!(matches!(error, Error::Option { option: "beta", .. }), "{error}");
        let error = fails(&a, &a, &mask, &FullKlOptions { skew: end, ..ok });
        assert!(matches!(error, Error::Option { option: "skew", .. }), "{error}");
    }
    let error = fails(&a.to_dtype(DType::F64).unwrap(), &a, &mask, &ok);
    assert!(matches!(error, Error::Dtype { arg: "logits", .. }), "{error}");
    let error = fails(&a, &half, &mask, &ok);
    assert!(matches!(error, Error::Dtype { arg: "ref_logits", .. }), "{error}");
    let error = fails(&a, &flat, &mask, &ok);
    assert!(matches!(error, Error::Shape { arg: "ref_logits", .. }), "{error}");
    let error = fails(&a, &a, &a, &ok);
    assert!(matches!(error, Error::Dtype { arg: "mask", .. }), "{error}");
    let error = fails(&a, &a, &mask.reshape((2, 1)).unwrap(), &ok);
    assert!(matches!(error, Error::Shape { arg: "mask", .. }), "{error}");
    for dims in [&[][..], &[2, 0]] {
        let none = Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap();
        let error = fails(&none, &none, &mask, &ok);
        assert!(matches!(error, Error::Shape { arg: "logits", .. }), "{error}");
    }

    let (five, six) = ([0.0_f32; 5], [0.0_f32; 6]);
    let plain = FullForwardInputs { logits: &six[..], ref_logits: &six[..], mask: None };
    let run_wide = |inputs, vocab, len| {
        let outputs = FullForwardOutputs { stats: &mut vec![0.0; len] };
        cpu::full_forward(inputs, 2, vocab, &ok, outputs).unwrap_err()
    };
    let run = |inputs, len| run_wide(inputs, 3, len);
    let back = |stats: usize, up: &[f32], a: usize, b: usize| {
        let (stats, mut a, mut b) = (vec![0.0; stats], vec![0.0; a], vec![0.0; b]);
        let inputs = FullBackwardInputs {
            forward: FullForwardInputs { logits: &six[..], ref_logits: &six[..], mask: None },
            stats: &stats,
            grad_kl: up,
        };
        let outputs =
            FullBackwardOutputs { grad_logits: Some(&mut a), grad_ref_logits: Some(&mut b) };
        cpu::full_backward(inputs, 2, 3, &ok, outputs).unwrap_err()
    };
    for (error, text) in [
        (
            run(FullForwardInputs { logits: &five, ..plain }, 14),
            "`logits` has shape [5] for a vocabulary of 3, expected [2, 3]",
        ),
        (run_wide(plain, 0, 14), "`logits` has shape [6] for a vocabulary of 0, expected [2, 1]"),
        (
            run(FullForwardInputs { ref_logits: &five, ..plain }, 14),
            "`ref_logits` has shape [5], expected [6]",
        ),
        (
            run(FullForwardInputs { mask: Some(&[1]), ..plain }, 14),
            "`mask` has shape [1], expected [2]",
        ),
        (run(plain, 13), "`stats` has shape [13], expected [14]"),
        (back(13, &[1.0; 2], 6, 6), "`stats` has shape [13], expected [14]"),
        (back(14, &[1.0; 3], 6, 6), "`grad_kl` has shape [3], expected [2]"),
        (back(14, &[1.0; 2], 5, 6), "`grad_logits` has shape [5], expected [6]"),
        (back(14, &[1.0; 2], 6, 5), "`grad_ref_logits` has shape [5], expected [6]"),
    ] {
        assert_eq!(error.to_string(), format!("full_kl: {text}"));
    }
}
