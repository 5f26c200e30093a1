//! The whiten op: the reference against other projects' functions, the CPU and the tensor layer
//! against the reference, and what must hold for any input.

mod common;

use candle_core::{DType, Tensor, Var};
use common::whiten_cases::*;
use common::*;
use ppo_kernels::moments::{Moments, MomentsTensor, RunningMoments};
use ppo_kernels::whiten::cpu::{
    self, GradOutputs, Inputs, MomentsInputs, MomentsOutputs, Outputs, OwnBackwardInputs,
    WithBackwardInputs,
};
use ppo_kernels::whiten::{
    masked_moments, masked_whiten, masked_whiten_with, reference, EpsPlacement, WhitenOptions,
};
use ppo_kernels::Error;

/// The peers' float64, and verl's and NeMo's 1e-8 added to the number of tokens.
const GOLDEN_REL: f64 = 2e-8;
const GOLDEN_ABS: f64 = 2e-8;

/// What the mask keeps; the peers whiten masked elements too, with the same mean and variance.
fn kept(values: &[f64], mask: &[u8]) -> Vec<f64> {
    let pairs = values.iter().zip(mask);
    pairs.map(|(&v, &m)| if m != 0 { v } else { 0.0 }).collect()
}

#[test]
fn reference_equals_the_peers_whitening() {
    let mut ran = 0;
    for case in golden("masked_stats") {
        let function = case.function.as_str();
        if function.ends_with("agg_loss") || function.ends_with("aggregate_loss") {
            continue; // aggregation belongs to the ppo_loss op
        }
        let close = |what: &str, got: &[f64], want: &[f64]| {
            assert_close(&format!("{} {what}", case.id), got, want, GOLDEN_REL, GOLDEN_ABS);
        };
        let x = case.input("values");
        let masked = case.inputs.contains_key("mask");
        let mask = if masked { case.mask("mask") } else { vec![1; x.len()] };
        let moments = reference::masked_moments(&x, Some(&mask));
        ran += 1;

        if case.outputs.contains_key("mean") {
            let mean = case.output("mean");
            if mean[0].is_nan() {
                // TRL v0.11 lets NaN through the mask; we do not.
                assert!(case.id.ends_with("-081") && moments.mean.is_finite());
            } else {
                close("mean", &[moments.mean], &mean);
            }
        }
        for (key, unbiased) in [("var_unbiased", true), ("var_biased", false)] {
            if case.outputs.contains_key(key) {
                close(key, &[moments.variance(unbiased)], &case.output(key));
            }
        }
        if function == "trl.core.whiten" {
            for (key, shift_mean) in [("whitened", true), ("whitened_noshift", false)] {
                let options = WhitenOptions { shift_mean, ..Default::default() };
                close(key, &reference::masked_whiten(&x, None, &options), &case.output(key));
            }
        } else if case.outputs.contains_key("whitened") {
            let shift_mean = case.inputs["shift_mean"].as_bool().unwrap();
            let options = WhitenOptions { shift_mean, ..Default::default() };
            let got = reference::masked_whiten(&x, Some(&mask), &options);
            close("whitened", &got, &kept(&case.output("whitened"), &mask));
            check_peer_gradient(&case, &x, &mask, &options);
        } else if case.outputs.contains_key("normalized_dim1") {
            // OpenRLHF: row by row, biased, and the variance is bounded rather than added to.
            let width = case.shape("values")[1];
            let options = WhitenOptions {
                eps: f64::from(f32::MIN_POSITIVE),
                unbiased: false,
                ..Default::default()
            };
            let (up, want) = (case.input("grad_out"), case.output("normalized_dim1"));
            let want_grad = case.output("grad_values");
            for at in (0..x.len()).step_by(width) {
                let row = at..at + width;
                let (x, mask) = (&x[row.clone()], &mask[row.clone()]);
                if reference::masked_moments(x, Some(mask)).variance(false) <= 1e-8 {
                    continue; // the bound is reached
                }
                let got = reference::masked_whiten(x, Some(mask), &options);
                close("normalized", &got, &want[row.clone()]);
                let up = &up[row.clone()];
                let got = reference::masked_whiten_backward(x, Some(mask), up, &options);
                close("gradient", &got, &want_grad[row]);
            }
        }
    }
    assert_eq!(ran, 82 - 48);
}

/// The peers' output has masked elements in it, so their gradient has too: it is linear in the
/// upstream gradient, whose masked part is taken off by hand.
fn check_peer_gradient(case: &Golden, x: &[f64], mask: &[u8], options: &WhitenOptions) {
    let up = case.input("grad_out_whiten");
    let want = case.output("grad_values_whiten");
    let moments = reference::masked_moments(x, Some(mask));
    let everything = |x: &[f64]| {
        let moments = reference::masked_moments(x, Some(mask));
        reference::masked_whiten_with(x, None, &moments, options)
    };
    let masked_up: Vec<f64> =
        up.iter().zip(mask).map(|(&g, &m)| if m == 0 { g } else { 0.0 }).collect();
    let from_masked = finite_difference(x, |x| dot(&masked_up, &everything(x)));
    let got = reference::masked_whiten_backward(x, Some(mask), &up, options);
    let got: Vec<f64> = got.iter().zip(&from_masked).map(|(a, b)| a + b).collect();
    assert!(moments.count > 1.0);
    // Half of it is a finite difference.
    assert_close(&format!("{} gradient", case.id), &got, &want, 1e-7, 1e-7);
}

#[test]
fn reference_gradient_is_the_derivative_of_the_reference() {
    let mut rng = rng(1);
    for options in all_options() {
        let x = wide(&uniform(&mut rng, 9, 2.0));
        let up = wide(&uniform(&mut rng, 9, 1.0));
        let mask = [1, 0, 1, 1, 0, 1, 1, 1, 0];
        for mask in [None, Some(&mask[..])] {
            let numeric =
                finite_difference(&x, |x| dot(&up, &reference::masked_whiten(x, mask, &options)));
            let grad = reference::masked_whiten_backward(&x, mask, &up, &options);
            assert_close("grad", &grad, &numeric, 1e-7, 1e-8);

            let moments = Moments { count: 7.0, mean: 0.3, m2: 11.0 };
            let whiten = |x: &[f64]| reference::masked_whiten_with(x, mask, &moments, &options);
            let numeric = finite_difference(&x, |x| dot(&up, &whiten(x)));
            let grad = reference::masked_whiten_with_backward(mask, &moments, &up, &options);
            assert_close("grad with", &grad, &numeric, 1e-7, 1e-8);
        }
    }
}

fn moments_on_cpu(x: &[f32], mask: Option<&[u8]>) -> Moments {
    let mut moments = [Moments { count: -1.0, mean: f64::NAN, m2: f64::NAN }];
    let outputs = MomentsOutputs { moments: &mut moments };
    cpu::masked_moments(MomentsInputs { x, mask }, x.len(), outputs).unwrap();
    moments[0]
}

/// Lengths around the boundaries of lanes and leaves.
const LENGTHS: [usize; 9] = [2, 3, 15, 16, 17, 2047, 2048, 2049, 10_007];

#[test]
fn tensors_agree_with_the_reference_and_nan_behind_the_mask_does_no_harm() {
    let mut rng = rng(2);
    for device in devices() {
        for n in LENGTHS {
            for options in all_options() {
                for masked in [false, true] {
                    let Sample { x, up, mask } = Sample::new(&mut rng, n, masked);
                    let bytes = mask.as_deref();
                    let mask = bytes.map(|mask| Tensor::from_slice(mask, n, &device).unwrap());
                    let mask = mask.as_ref();
                    let what = format!("n={n} masked={masked} {options:?}");
                    let (x64, up64) = (wide(&x), wide(&up));
                    let var = Var::from_slice(&x, n, &device).unwrap();
                    let up = Tensor::from_slice(&up, n, &device).unwrap();

                    let check = |y: &Tensor, want: &[f64], want_grad: &[f64]| {
                        assert_close(&what, &to_vec(y), want, REL, ABS);
                        // NaN upstream must not be multiplied on the way in either.
                        let loss = y.mul(&up).unwrap().sum_all().unwrap();
                        let grads = loss.backward().unwrap();
                        assert_close(
                            &what,
                            &to_vec(grads.get(&var).unwrap()),
                            want_grad,
                            REL,
                            3.0 * ABS,
                        );
                    };
                    let y = masked_whiten(&var, mask, &options).unwrap();
                    check(
                        &y,
                        &reference::masked_whiten(&x64, bytes, &options),
                        &reference::masked_whiten_backward(&x64, bytes, &up64, &options),
                    );
                    let moments = Moments { count: 5.0, mean: -0.7, m2: 9.0 };
                    let given = MomentsTensor::new(&moments, &device).unwrap();
                    let y = masked_whiten_with(&var, mask, &given, &options).unwrap();
                    check(
                        &y,
                        &reference::masked_whiten_with(&x64, bytes, &moments, &options),
                        &reference::masked_whiten_with_backward(bytes, &moments, &up64, &options),
                    );
                    let got = masked_moments(&var, mask).unwrap().to_host().unwrap();
                    check_moments(&what, got, reference::masked_moments(&x64, bytes), 1e-12);
                }
            }
        }
    }
}

#[test]
fn a_large_mean_costs_a_tiny_variance_no_digits() {
    let mut rng = rng(3);
    let n = 5000;
    let mut x = far_from_zero(&mut rng, n);
    let want = reference::masked_moments(&wide(&x), None);
    check_moments("offset", moments_on_cpu(&x, None), want, 1e-10);

    let options = WhitenOptions::default();
    let mut y = vec![0.0; n];
    let inputs = Inputs { x: &x, mask: None, moments: Some(&[want]) };
    cpu::masked_whiten(inputs, n, &options, Outputs { y: &mut y }).unwrap();
    assert_close(
        "offset",
        &wide(&y),
        &reference::masked_whiten(&wide(&x), None, &options),
        REL,
        ABS,
    );
    let up = uniform(&mut rng, n, 1.0);
    let inputs = OwnBackwardInputs { x: &x, mask: None, moments: Some(&[want]), grad_y: &up };
    let outputs = GradOutputs { grad_x: &mut y };
    cpu::masked_whiten_backward(inputs, n, &options, outputs).unwrap();
    let grad = reference::masked_whiten_backward(&wide(&x), None, &wide(&up), &options);
    let scale = grad.iter().fold(0.0_f64, |a, g| a.max(g.abs()));
    assert_close("offset grad", &wide(&y), &grad, REL, ABS * scale);

    // One value far off, at the place the sums are shifted by.
    x[0] = -3e9;
    let want = reference::masked_moments(&wide(&x), None);
    check_moments("outlier", moments_on_cpu(&x, None), want, 1e-10);
}

#[test]
fn equal_elements_come_out_as_zero_with_a_finite_gradient() {
    for (options, n) in all_options().into_iter().flat_map(|options| [(options, 1), (options, 5)]) {
        if options.unbiased && n == 1 {
            continue;
        }
        let var = Var::new(&[2.5f32; 5][..n], &candle_core::Device::Cpu).unwrap();
        let y = masked_whiten(&var, None, &options).unwrap();
        let mean = if options.shift_mean { 0.0 } else { 2.5 };
        assert_eq!(to_vec(&y), vec![mean; n]);
        // The mean of five is no f32, and 1 / eps is a factor of 1e8 on deviations from it.
        let up = &[1.0, -2.0, 0.5, 0.25, 3.0][..n];
        let weights = Tensor::new(up, var.device()).unwrap().to_dtype(DType::F32).unwrap();
        let grads = y.mul(&weights).unwrap().sum_all().unwrap().backward().unwrap();
        let want = reference::masked_whiten_backward(&[2.5; 5][..n], None, up, &options);
        assert!(want.iter().all(|g| g.is_finite()));
        assert_close("grad", &to_vec(grads.get(&var).unwrap()), &want, REL, ABS);
    }
}

#[test]
fn without_eps_the_divisor_is_the_deviation_alone() {
    for eps_placement in [EpsPlacement::Variance, EpsPlacement::Std] {
        let options = WhitenOptions { eps: 0.0, eps_placement, ..Default::default() };
        let x = Tensor::new(&[1_f32, 2.0, 4.5], &candle_core::Device::Cpu).unwrap();
        let want = reference::masked_whiten(&to_vec(&x), None, &options);
        let got = to_vec(&masked_whiten(&x, None, &options).unwrap());
        assert_close("whitened", &got, &want, REL, 0.0);
        let equal = Tensor::new(&[2_f32, 2.0], x.device()).unwrap();
        let got = to_vec(&masked_whiten(&equal, None, &options).unwrap());
        assert!(got.iter().all(|y| y.is_nan()), "{got:?}");
    }
}

#[test]
fn merged_moments_are_those_of_the_whole() {
    let mut rng = rng(4);
    let x = wide(&uniform(&mut rng, 1000, 2.0));
    let whole = reference::masked_moments(&x, None);
    for cut in [0, 1, 2, 500, 999, 1000] {
        let a = reference::masked_moments(&x[..cut], None);
        let b = reference::masked_moments(&x[cut..], None);
        check_moments(&format!("cut at {cut}"), a.merge(b), whole, 1e-12);
        check_moments(&format!("cut at {cut}, swapped"), b.merge(a), whole, 1e-12);
    }
    assert_eq!(Moments::default().merge(Moments::default()), Moments::default());
    // As many as no integer counts.
    let of = |mean| Moments { count: u64::MAX as f64, mean, m2: 0.0 };
    let want = Moments { count: 2f64.powi(65), mean: 2.0, m2: 2f64.powi(65) };
    assert_eq!(of(1.0).merge(of(3.0)), want);
}

#[test]
fn running_moments_are_those_of_all_batches_together() {
    let mut rng = rng(5);
    let mut running = RunningMoments::new();
    assert_eq!((running.mean(), running.std()), (0.0, 1.0));
    running.update(&[]);
    running.update(&[4.0]);
    assert_eq!((running.mean(), running.std()), (4.0, 1.0));
    let mut all = vec![4.0];
    for n in [1, 8, 3] {
        let batch = uniform(&mut rng, n, 3.0);
        let moments = running.update(&batch);
        check_moments("batch", moments, reference::masked_moments(&wide(&batch), None), 1e-12);
        all.extend(batch);
    }
    let want = reference::masked_moments(&wide(&all), None);
    check_moments("running", running.moments(), want, 1e-12);
    assert_close("std", &[running.std()], &[want.std(true)], 1e-12, 0.0);
    assert_eq!(RunningMoments::resume(running.moments()), running);
}

#[test]
fn any_layout_and_any_rank_will_do() {
    let mut rng = rng(6);
    let options = WhitenOptions::default();
    for device in devices() {
        for shape in [vec![24], vec![4, 6], vec![2, 3, 4]] {
            let x = Tensor::from_vec(uniform(&mut rng, 24, 2.0), shape.clone(), &device).unwrap();
            let mask = Tensor::from_vec(random_mask(&mut rng, 24, 0.8), shape, &device).unwrap();
            let plain = masked_whiten(&x, Some(&mask), &options).unwrap();
            assert_eq!(plain.dims(), x.dims());

            let var = Var::from_tensor(&x).unwrap();
            let (x2, mask2) = (strided(&var), strided(&mask));
            let y = masked_whiten(&x2, Some(&mask2), &options).unwrap();
            assert_eq!(to_vec(&y), to_vec(&plain));
            assert_eq!(
                to_vec(masked_moments(&x2, Some(&mask2)).unwrap().tensor()),
                to_vec(masked_moments(&x, Some(&mask)).unwrap().tensor())
            );
            let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            let up: Vec<f64> = to_vec(&y).iter().map(|y| 2.0 * y).collect();
            let bytes: Vec<u8> = to_vec(&mask).iter().map(|&m| m as u8).collect();
            let want = reference::masked_whiten_backward(&to_vec(&x), Some(&bytes), &up, &options);
            assert_close("grad", &to_vec(grads.get(&var).unwrap()), &want, REL, 3.0 * ABS);
        }
    }
}

#[test]
fn results_may_be_used_twice_and_with_any_upstream_gradient() {
    let mut rng = rng(8);
    let options = WhitenOptions::default();
    let moments = Moments { count: 4.0, mean: 0.5, m2: 7.0 };
    for device in devices() {
        let x = Tensor::from_vec(uniform(&mut rng, 24, 2.0), (4, 6), &device).unwrap();
        let x = Var::from_tensor(&x).unwrap();
        let weights = Tensor::from_vec(uniform(&mut rng, 24, 1.0), (6, 4), &device).unwrap();
        // Once through a transpose, once through a mean.
        let loss = |y: Tensor| {
            let first = (y.t().unwrap() * &weights).unwrap().sum_all().unwrap();
            (first + y.mean_all().unwrap()).unwrap()
        };
        let up: Vec<f64> = to_vec(&weights.t().unwrap()).iter().map(|g| g + 1.0 / 24.0).collect();
        let grads = loss(masked_whiten(&x, None, &options).unwrap()).backward().unwrap();
        let want = reference::masked_whiten_backward(&to_vec(&x), None, &up, &options);
        assert_close("own", &to_vec(grads.get(&x).unwrap()), &want, REL, 3.0 * ABS);
        let given = MomentsTensor::new(&moments, &device).unwrap();
        let grads = loss(masked_whiten_with(&x, None, &given, &options).unwrap()).backward();
        let want = reference::masked_whiten_with_backward(None, &moments, &up, &options);
        assert_close("with", &to_vec(grads.unwrap().get(&x).unwrap()), &want, REL, 3.0 * ABS);
    }
}

#[test]
fn constants_stay_constants() {
    let x = Tensor::new(&[1f32, 2.0, 4.0], &candle_core::Device::Cpu).unwrap();
    assert!(!masked_whiten(&x, None, &WhitenOptions::default()).unwrap().track_op());
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let mut rng = rng(7);
    let n = 100_003;
    let (x, up) = (uniform(&mut rng, n, 2.0), uniform(&mut rng, n, 1.0));
    let mask = random_mask(&mut rng, n, 0.8);
    let options = WhitenOptions::default();
    let run = || {
        let (x, mask) = (&x[..], Some(&mask[..]));
        let moments = moments_on_cpu(x, mask);
        let (mut y, mut grad) = (vec![0.0; n], vec![0.0; n]);
        let inputs = Inputs { x, mask, moments: Some(&[moments]) };
        cpu::masked_whiten(inputs, n, &options, Outputs { y: &mut y }).unwrap();
        let inputs = OwnBackwardInputs { x, mask, moments: Some(&[moments]), grad_y: &up };
        let outputs = GradOutputs { grad_x: &mut grad };
        cpu::masked_whiten_backward(inputs, n, &options, outputs).unwrap();
        let bits = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        (moments.mean.to_bits(), moments.m2.to_bits(), bits(y), bits(grad))
    };
    let one = with_threads(1, run);
    for threads in [2, 3, 8] {
        assert!(with_threads(threads, run) == one, "{threads} threads");
    }
}

#[test]
fn a_nan_that_is_not_masked_shows() {
    for x in [[1f32, f32::NAN, 2.0], [f32::NAN, 1.0, 2.0], [1.0, f32::INFINITY, 2.0]] {
        let moments = moments_on_cpu(&x, None);
        assert!(moments.m2.is_nan() && moments.std(true).is_nan(), "{moments:?}");
        let x = Tensor::new(&x, &candle_core::Device::Cpu).unwrap();
        for options in all_options() {
            let y = masked_whiten(&x, None, &options).unwrap();
            assert!(to_vec(&y).iter().all(|y| y.is_nan()));
        }
    }
}

#[test]
fn too_few_elements_are_an_error() {
    let biased = WhitenOptions { unbiased: false, ..Default::default() };
    let unbiased = WhitenOptions::default();
    // Those that look: on CUDA it is another test's NaN.
    for device in devices_with_empty_tensors() {
        let x = Tensor::new(&[1f32, 2.0], &device).unwrap();
        let empty = Tensor::zeros((0, 3), DType::F32, &device).unwrap();
        let one = Tensor::new(&[0u8, 1], &device).unwrap();
        let none = Tensor::new(&[0u8, 0], &device).unwrap();
        let refused =
            |x: &Tensor, mask: Option<&Tensor>, options: &WhitenOptions| match masked_whiten(
                x, mask, options,
            ) {
                Err(Error::Mask { op: "whiten", arg, expected, got }) => (arg, expected, got),
                other => panic!("{other:?}"),
            };
        assert_eq!(refused(&x, Some(&one), &unbiased), ("mask", 2, 1));
        assert_eq!(refused(&x, Some(&none), &unbiased), ("mask", 2, 0));
        assert_eq!(refused(&x, Some(&none), &biased), ("mask", 1, 0));
        assert_eq!(refused(&empty, None, &unbiased), ("x", 2, 0));
        let few = Moments { count: 1.0, mean: 1.0, m2: 0.0 };
        let given = MomentsTensor::new(&few, &device).unwrap();
        let error = masked_whiten_with(&x, None, &given, &unbiased).unwrap_err();
        assert!(matches!(error, Error::Mask { arg: "moments", got: 1, .. }), "{error}");
        let inputs = Inputs { x: &[1.0], mask: None, moments: Some(&[few]) };
        let error = cpu::masked_whiten(inputs, 1, &unbiased, Outputs { y: &mut [0.0] });
        let error = error.unwrap_err();
        assert!(matches!(error, Error::Mask { arg: "moments", got: 1, .. }), "{error}");
        let y = masked_whiten(&x, Some(&one), &biased).unwrap();
        assert_eq!(to_vec(&y), [0.0, 0.0]);
        let of_none = masked_moments(&empty, None).unwrap().to_host().unwrap();
        assert_eq!(of_none, Moments::default());
        // No element to whiten, but moments to whiten with.
        let moments = Moments { count: 3.0, mean: 1.0, m2: 2.0 };
        let moments = MomentsTensor::new(&moments, &device).unwrap();
        let y = masked_whiten_with(&empty, None, &moments, &unbiased).unwrap();
        assert_eq!(y.dims(), [0, 3]);
    }
}

#[cfg(feature = "cuda")]
#[test]
fn too_few_elements_are_nan_where_looking_would_be_a_wait() {
    for device in devices().iter().filter(|device| device.is_cuda()) {
        let x = Tensor::new(&[1f32, 2.0], device).unwrap();
        let mask = Tensor::new(&[0u8, 1], device).unwrap();
        let y = masked_whiten(&x, Some(&mask), &WhitenOptions::default()).unwrap();
        let y = to_vec(&y);
        assert!(y[0] == 0.0 && y[1].is_nan(), "{y:?}");
        let few = Moments { count: 1.0, mean: 1.0, m2: 0.0 };
        let few = MomentsTensor::new(&few, device).unwrap();
        let y = masked_whiten_with(&x, None, &few, &WhitenOptions::default()).unwrap();
        assert!(to_vec(&y).iter().all(|y| y.is_nan()));
    }
}

#[test]
fn errors_name_the_argument() {
    let options = WhitenOptions::default();
    let x = Tensor::new(&[1f32, 2.0, 3.0], &candle_core::Device::Cpu).unwrap();
    let says = |error: Error, words: &[&str]| {
        let text = error.to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    };
    let short = Tensor::new(&[1u8, 1], x.device()).unwrap();
    let error = masked_whiten(&x, Some(&short), &options).unwrap_err();
    says(error, &["whiten", "`mask`", "[2]", "[3]"]);
    let error = masked_whiten(&x, Some(&x), &options).unwrap_err();
    says(error, &["whiten", "`mask`", "f32", "u8"]);
    let wide = x.to_dtype(DType::F64).unwrap();
    says(masked_moments(&wide, None).unwrap_err(), &["whiten", "`x`", "f64", "f32"]);
    for eps in [-0.1, -1.0, f64::NAN, f64::INFINITY, 1e-40] {
        let options = WhitenOptions { eps, ..options };
        says(masked_whiten(&x, None, &options).unwrap_err(), &["whiten", "`eps`"]);
    }

    let (x, moments) = ([1.0, 2.0], [Moments { count: 2.0, mean: 1.5, m2: 0.5 }]);
    let (x, moments, grad_y) = (&x[..], Some(&moments[..]), &[1.0][..]);
    let (mut out, mut taken) = ([0.0; 2], [Moments::default()]);
    let mut take = |mask, len| {
        let outputs = MomentsOutputs { moments: &mut taken[..len] };
        cpu::masked_moments(MomentsInputs { x, mask }, 2, outputs).unwrap_err()
    };
    says(take(Some(&[1]), 1), &["`mask`", "[1]", "[2]"]);
    says(take(None, 0), &["`moments`", "[0]", "[1]"]);
    let mut whiten = |moments, len| {
        let inputs = Inputs { x, mask: None, moments };
        cpu::masked_whiten(inputs, 2, &options, Outputs { y: &mut out[..len] }).unwrap_err()
    };
    says(whiten(moments, 1), &["`y`", "[1]", "[2]"]);
    says(whiten(Some(&[]), 2), &["`moments`", "[0]", "[1]"]);
    says(whiten(None, 2), &["`moments`", "missing", "`x`"]);
    let inputs = OwnBackwardInputs { x, mask: None, moments, grad_y };
    let outputs = GradOutputs { grad_x: &mut out };
    let error = cpu::masked_whiten_backward(inputs, 2, &options, outputs).unwrap_err();
    says(error, &["`grad_y`", "[1]", "[2]"]);
    let inputs = WithBackwardInputs { mask: None, moments, grad_y };
    let outputs = GradOutputs { grad_x: &mut out };
    let error = cpu::masked_whiten_with_backward(inputs, 1, &options, outputs).unwrap_err();
    says(error, &["`grad_x`", "[2]", "[1]"]);
}
