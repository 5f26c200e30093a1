//! Log-probabilities from hidden states: the reference against other projects' functions, the CPU and the
//! tensor layer against the reference, and what must hold for any input.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::*;
use half::{bf16, f16};
use ppo_kernels::cpu::Logit;
use ppo_kernels::linear::cpu::{
    self, BackwardInputs, BackwardOutputs, ForwardInputs, ForwardOutputs,
};
use ppo_kernels::linear::reference::{self, Arguments, Gradients};
use ppo_kernels::linear::{linear_logprobs, LinearInputs, LinearOptions, Sizes};
use ppo_kernels::tolerance;
use rand::Rng;

const REL: f64 = tolerance::LINEAR.tests.rel;
const ABS: f64 = tolerance::LINEAR.tests.abs;
const GRAD_REL: f64 = tolerance::LINEAR.backward.rel;
const GRAD_ABS: f64 = tolerance::LINEAR.backward.abs;

#[test]
fn reference_equals_the_peers_heads() {
    let mut ran = 0;
    for case in golden("linear_logprob") {
        let number = |key: &str, default| {
            case.inputs.get(key).and_then(|value| value.as_f64()).unwrap_or(default)
        };
        let given = |key: &str| case.inputs.get(key).is_some_and(|value| !value.is_null());
        // Of rounded tiles only so many digits are right; the labels are those of a trainer's wrapper.
        let other = ["autocast", "labels"];
        if case.dtype != "float32" || other.into_iter().any(given) {
            continue;
        }
        let (hidden, weight) = (case.input("hidden"), case.input("weight"));
        let bias = given("bias").then(|| case.input("bias"));
        let targets: Vec<i64> = case.input("targets").iter().map(|&t| t as i64).collect();
        let sizes = Sizes {
            rows: targets.len(),
            hidden_size: *case.shape("hidden").last().unwrap(),
            vocab: case.shape("weight")[0],
        };
        let options = LinearOptions {
            temperature: number("temperature", 1.0),
            logit_scale: number("logit_scale", 1.0),
            ignore_index: given("ignore_index").then_some(-100),
            softcap: given("final_logit_softcapping")
                .then(|| number("final_logit_softcapping", 0.0)),
            ..Default::default()
        };
        let inputs = Arguments {
            hidden: &hidden,
            weight: &weight,
            bias: bias.as_deref(),
            temperatures: None,
            targets: &targets,
        };
        let (mut logp, entropy) = reference::forward(inputs, sizes, &options);
        // A row that is offset by 1000 costs them three digits.
        let far = hidden.iter().any(|&h| h > 500.0);
        let (rel, abs) = if far { (5e-4, 2e-4) } else { (1e-5, 2e-5) };
        let negated = case.outputs.contains_key("nll");
        if negated {
            logp.iter_mut().for_each(|logp| *logp = -*logp);
        }
        let key = if negated { "nll" } else { "log_probs" };
        assert_close(&case.id, &logp, &case.output(key), rel, abs);
        if case.outputs.contains_key("entropy") {
            assert_close(&case.id, &entropy, &case.output("entropy"), rel, abs);
        }
        ran += 1;
        if given("grad_out_selected") {
            continue;
        }
        let upstream = |key: &str| match given(key) {
            true => case.input(key),
            false => vec![0.0; targets.len()],
        };
        let up = [upstream("grad_out_log_probs"), upstream("grad_out_entropy")];
        let found = reference::backward(inputs, sizes, &options, &up[0], &up[1]);
        let named = [
            ("grad_hidden", found.hidden),
            ("grad_weight", found.weight),
            ("grad_bias", found.bias),
        ];
        for (key, grad) in named.into_iter().filter(|(key, _)| case.outputs.contains_key(*key)) {
            assert_close(&format!("{} {key}", case.id), &grad, &case.output(key), rel, abs);
        }
    }
    assert_eq!(ran, 21);
}

/// Hidden states, weight and bias in `T`, and in f64.
struct Case<T> {
    sizes: Sizes,
    hidden: Vec<T>,
    weight: Vec<T>,
    bias: Option<Vec<T>>,
    temperatures: Option<Vec<f32>>,
    targets: Vec<i64>,
    up: [Vec<f32>; 2],
    options: LinearOptions,
}

fn f64s<T: Logit>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| f64::from(x.to_f32())).collect()
}

/// What both passes write.
#[derive(Debug, Clone, PartialEq)]
struct Found<T> {
    logp: Vec<f32>,
    entropy: Vec<f32>,
    hidden: Vec<T>,
    weight: Vec<T>,
    bias: Vec<T>,
}

impl<T: Logit> Case<T> {
    fn new(seed: u64, [rows, hidden_size, vocab]: [usize; 3], bias: bool) -> Self {
        let rng = &mut rng(seed);
        let mut draw =
            |n, scale| -> Vec<T> { uniform(rng, n, scale).into_iter().map(T::from_f32).collect() };
        let (hidden, weight) = (draw(rows * hidden_size, 1.0), draw(vocab * hidden_size, 0.7));
        let bias = bias.then(|| draw(vocab, 1.0));
        let targets = (0..rows).map(|_| rng.random_range(0..vocab as i64)).collect();
        let up = [uniform(rng, rows, 1.0), uniform(rng, rows, 1.0)];
        let sizes = Sizes { rows, hidden_size, vocab };
        let (temperatures, options) = (None, LinearOptions::default());
        Self { sizes, hidden, weight, bias, temperatures, targets, up, options }
    }

    fn inputs(&self) -> ForwardInputs<'_, T, i64> {
        ForwardInputs {
            bias: self.bias.as_deref(),
            temperatures: self.temperatures.as_deref(),
            ..ForwardInputs::new(&self.hidden, &self.weight, &self.targets[..])
        }
    }

    /// Everything, or of the gradients those that are wanted.
    fn run(&self, wanted: [bool; 3]) -> Found<T> {
        let rows = self.sizes.rows;
        let mut out = [(); 4].map(|()| vec![f32::NAN; rows]);
        let [logp, entropy, max, log_sum] = &mut out;
        let outputs = ForwardOutputs { logp, max, log_sum, entropy: Some(entropy) };
        cpu::forward(self.inputs(), self.sizes, &self.options, outputs).unwrap();
        let [logp, entropy, max, log_sum] = out;
        let inputs = BackwardInputs {
            entropy: Some(&entropy),
            grad_logp: Some(&self.up[0]),
            grad_entropy: Some(&self.up[1]),
            ..BackwardInputs::new(self.inputs(), &max, &log_sum)
        };
        let lens = [self.hidden.len(), self.weight.len(), self.sizes.vocab];
        let mut grads = lens.map(|len| vec![T::from_f32(f32::NAN); len]);
        let [hidden, weight, bias] = &mut grads;
        let outputs = BackwardOutputs {
            grad_hidden: wanted[0].then_some(hidden),
            grad_weight: wanted[1].then_some(weight),
            grad_bias: wanted[2].then_some(bias),
        };
        cpu::backward(inputs, self.sizes, &self.options, outputs).unwrap();
        let [hidden, weight, bias] = grads;
        Found { logp, entropy, hidden, weight, bias }
    }

    fn wanted(&self) -> (Vec<f64>, Vec<f64>, Gradients) {
        let (hidden, weight) = (f64s(&self.hidden), f64s(&self.weight));
        let bias = self.bias.as_deref().map(f64s);
        let temperatures = self.temperatures.as_deref().map(wide);
        let inputs = Arguments {
            hidden: &hidden,
            weight: &weight,
            bias: bias.as_deref(),
            temperatures: temperatures.as_deref(),
            targets: &self.targets,
        };
        let (logp, entropy) = reference::forward(inputs, self.sizes, &self.options);
        let [a, b] = self.up.each_ref().map(|up| wide(up));
        let grads = reference::backward(inputs, self.sizes, &self.options, &a, &b);
        (logp, entropy, grads)
    }
}

fn check<T: Logit>(what: &str, case: &Case<T>) {
    let found = case.run([true; 3]);
    let (logp, entropy, grads) = case.wanted();
    assert_close(&format!("{what} logp"), &wide(&found.logp), &logp, REL, ABS);
    assert_close(&format!("{what} entropy"), &wide(&found.entropy), &entropy, REL, ABS);
    let rounded = match T::NAME {
        "bf16" => 2f64.powi(-8),
        "f16" => 2f64.powi(-11),
        _ => 0.0,
    };
    let (rel, abs) = (GRAD_REL + rounded, GRAD_ABS);
    assert_close(&format!("{what} hidden"), &f64s(&found.hidden), &grads.hidden, rel, abs);
    assert_close(&format!("{what} weight"), &f64s(&found.weight), &grads.weight, rel, abs);
    assert_close(&format!("{what} bias"), &f64s(&found.bias), &grads.bias, rel, abs);
}

fn agrees_with_the_reference<T: Logit>() {
    let sizes = [[1, 1, 1], [1, 5, 3], [7, 16, 300], [33, 24, 1001], [64, 3, 129]];
    for (i, sizes) in sizes.into_iter().enumerate() {
        for bias in [false, true] {
            let mut case = Case::<T>::new(i as u64, sizes, bias);
            for tile_bytes in [0, 20_000, 32 << 20] {
                case.options = LinearOptions { tile_bytes, ..Default::default() };
                check(&format!("{} {sizes:?} {bias} {tile_bytes}", T::NAME), &case);
                case.options = LinearOptions { temperature: 0.7, logit_scale: 0.4, ..case.options };
                check(&format!("{} {sizes:?} {bias} {tile_bytes} scaled", T::NAME), &case);
                case.options.softcap = Some(1.3);
                check(&format!("{} {sizes:?} {bias} {tile_bytes} capped", T::NAME), &case);
                case.temperatures = Some((0..sizes[0]).map(|row| 0.5 + row as f32 / 9.0).collect());
                check(&format!("{} {sizes:?} {bias} {tile_bytes} both", T::NAME), &case);
                case.options.softcap = None;
                check(&format!("{} {sizes:?} {bias} {tile_bytes} by row", T::NAME), &case);
                case.temperatures = None;
            }
        }
    }
}

#[test]
fn f32_agrees_with_the_reference() {
    agrees_with_the_reference::<f32>();
}

#[test]
fn halves_agree_with_the_reference_but_for_rounding_gradients() {
    agrees_with_the_reference::<f16>();
    agrees_with_the_reference::<bf16>();
}

#[test]
fn ignored_rows_take_no_part_whatever_they_hold() {
    for tile_bytes in [0, 32 << 20] {
        for ignored in [vec![2, 3, 6], (0..7).collect(), vec![]] {
            let mut case = Case::<f32>::new(3, [7, 16, 300], true);
            case.options =
                LinearOptions { ignore_index: Some(-100), tile_bytes, ..Default::default() };
            for &row in &ignored {
                case.targets[row] = -100;
            }
            let (logp, entropy, grads) = case.wanted();
            for &row in &ignored {
                case.hidden[row * 16..][..16].fill(f32::NAN);
            }
            let found = case.run([true; 3]);
            assert_close("logp", &wide(&found.logp), &logp, REL, ABS);
            assert_close("entropy", &wide(&found.entropy), &entropy, REL, ABS);
            assert_close("hidden", &wide(&found.hidden), &grads.hidden, GRAD_REL, GRAD_ABS);
            assert_close("weight", &wide(&found.weight), &grads.weight, GRAD_REL, GRAD_ABS);
            assert_close("bias", &wide(&found.bias), &grads.bias, GRAD_REL, GRAD_ABS);
        }
    }
}

#[test]
fn a_gradient_is_the_same_alone() {
    let case = Case::<bf16>::new(4, [9, 16, 300], true);
    let all = case.run([true; 3]);
    for wanted in [[true, false, false], [false, true, false], [false, false, true]] {
        let found = case.run(wanted);
        let pairs =
            [(found.hidden, &all.hidden), (found.weight, &all.weight), (found.bias, &all.bias)];
        for ((found, all), wanted) in pairs.iter().zip(wanted) {
            if wanted {
                assert_eq!(&found, all);
            } else {
                assert!(found.iter().all(|x| x.is_nan()), "not written");
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let case = Case::<f32>::new(5, [65, 48, 3001], true);
    let one = with_threads(1, || case.run([true; 3]));
    for threads in [2, 5] {
        assert!(with_threads(threads, || case.run([true; 3])) == one, "{threads} threads");
    }
}

#[test]
fn no_rows_are_legal() {
    let case = Case::<f32>::new(6, [0, 16, 30], false);
    let found = case.run([true; 3]);
    assert!(found.weight.iter().chain(&found.bias).all(|&g| g == 0.0));
}

#[test]
fn reference_gradient_is_the_derivative_of_the_reference() {
    let case = Case::<f32>::new(7, [3, 4, 7], true);
    let options = LinearOptions { temperature: 0.7, softcap: Some(2.0), ..case.options };
    let case = Case { options, ..case };
    let (.., grads) = case.wanted();
    let (hidden, weight) = (f64s(&case.hidden), f64s(&case.weight));
    let bias = f64s(case.bias.as_deref().unwrap());
    let [a, b] = case.up.each_ref().map(|up| wide(up));
    let value = |hidden: &[f64], weight: &[f64], bias: &[f64]| {
        let inputs = Arguments {
            hidden,
            weight,
            bias: Some(bias),
            temperatures: None,
            targets: &case.targets,
        };
        let (logp, entropy) = reference::forward(inputs, case.sizes, &case.options);
        dot(&a, &logp) + dot(&b, &entropy)
    };
    let numeric = finite_difference(&hidden, |x| value(x, &weight, &bias));
    assert_close("hidden", &grads.hidden, &numeric, 1e-7, 1e-8);
    let numeric = finite_difference(&weight, |x| value(&hidden, x, &bias));
    assert_close("weight", &grads.weight, &numeric, 1e-7, 1e-8);
    let numeric = finite_difference(&bias, |x| value(&hidden, &weight, x));
    assert_close("bias", &grads.bias, &numeric, 1e-7, 1e-8);
}

#[test]
fn tensors_give_what_slices_give_with_gradients_to_those_that_are_tracked() {
    let case = Case::<f32>::new(8, [6, 16, 300], true);
    let all = case.run([true; 3]);
    let cpu = &Device::Cpu;
    let tensor = |values: &[f32], shape: &[usize]| Tensor::from_slice(values, shape, cpu).unwrap();
    let hidden = tensor(&case.hidden, &[2, 3, 16]);
    let weight = tensor(&case.weight, &[300, 16]);
    let bias = tensor(case.bias.as_deref().unwrap(), &[300]);
    let targets = Tensor::from_slice(&case.targets, &[2, 3], cpu).unwrap();
    let up = case.up.each_ref().map(|up| tensor(up, &[2, 3]));
    for tracked in [[true; 3], [true, false, false], [false, true, false], [false, false, true]] {
        let vars = [&hidden, &weight, &bias].map(|x| Var::from_tensor(x).unwrap());
        let [h, w, b] =
            [0, 1, 2]
                .map(|i| if tracked[i] { vars[i].as_tensor().clone() } else { vars[i].detach() });
        let inputs = LinearInputs { bias: Some(&b), ..LinearInputs::new(&h, &w, &targets) };
        let output = linear_logprobs(&inputs, &case.options, true).unwrap();
        let entropy = output.entropy.unwrap();
        assert_eq!(output.logp.flatten_all().unwrap().to_vec1::<f32>().unwrap(), all.logp);
        assert_eq!(entropy.flatten_all().unwrap().to_vec1::<f32>().unwrap(), all.entropy);
        let sum = ((output.logp * &up[0]).unwrap() + (entropy * &up[1]).unwrap()).unwrap();
        let grads = sum.sum_all().unwrap().backward().unwrap();
        for ((var, want), tracked) in
            vars.iter().zip([&all.hidden, &all.weight, &all.bias]).zip(tracked)
        {
            let grad = grads.get(var).map(|g| g.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            assert_eq!(grad.as_ref(), tracked.then_some(want));
        }
    }
    // Without bias and entropy, and of 16-bit floats.
    let inputs = LinearInputs::new(&hidden, &weight, &targets);
    let output = linear_logprobs(&inputs, &case.options, false).unwrap();
    // One temperature for each row is that of the options.
    let halves = Tensor::full(0.5f32, (2, 3), cpu).unwrap();
    let by_row = LinearInputs { temperatures: Some(&halves), ..inputs };
    let by_row = linear_logprobs(&by_row, &case.options, false).unwrap().logp;
    let options = LinearOptions { temperature: 0.5, ..case.options };
    let of_all = linear_logprobs(&inputs, &options, false).unwrap().logp;
    let [by_row, of_all] = [by_row, of_all].map(|x| x.flatten_all().unwrap().to_vec1().unwrap());
    assert_close("temperatures", &wide(&by_row), &wide(&of_all), REL, ABS);
    assert!(output.entropy.is_none());
    let [h, w] =
        [&hidden, &weight].map(|x| Var::from_tensor(&x.to_dtype(DType::BF16).unwrap()).unwrap());
    let inputs = LinearInputs::new(&h, &w, &targets);
    let output = linear_logprobs(&inputs, &case.options, false).unwrap();
    let grads = output.logp.sum_all().unwrap().backward().unwrap();
    assert_eq!(grads.get(&h).unwrap().dtype(), DType::BF16);
    assert_eq!(grads.get(&w).unwrap().dims(), [300, 16]);
}

#[test]
fn bad_input_is_refused_by_name() {
    let cpu = &Device::Cpu;
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, cpu).unwrap();
    let (hidden, weight) = (zeros(&[2, 4], DType::F32), zeros(&[5, 4], DType::F32));
    let targets = zeros(&[2], DType::U32);
    let options = LinearOptions::default();
    let said =
        |hidden: &Tensor, weight: &Tensor, bias: Option<&Tensor>, targets: &Tensor, options| {
            let inputs = LinearInputs { bias, ..LinearInputs::new(hidden, weight, targets) };
            linear_logprobs(&inputs, &options, true).unwrap_err().to_string()
        };
    let with = |change: fn(&mut LinearOptions)| {
        let mut options = options;
        change(&mut options);
        options
    };
    let far = Tensor::new(&[0i64, 5], cpu).unwrap();
    let (wrong_bias, f64s) = (zeros(&[4], DType::F32), zeros(&[2, 4], DType::F64));
    for (error, expected) in [
        (said(&hidden, &zeros(&[5, 3], DType::F32), None, &targets, options), "`weight` has shape"),
        (said(&hidden, &zeros(&[0, 4], DType::F32), None, &targets, options), "`weight` has shape"),
        (said(&hidden, &zeros(&[4], DType::F32), None, &targets, options), "`weight` has shape"),
        (said(&hidden, &zeros(&[5, 4], DType::F16), None, &targets, options), "`weight` has dtype"),
        (said(&f64s, &weight, None, &targets, options), "`hidden` has dtype"),
        (
            said(&zeros(&[2, 0], DType::F32), &zeros(&[5, 0], DType::F32), None, &targets, options),
            "hidden",
        ),
        (said(&hidden, &weight, Some(&wrong_bias), &targets, options), "`bias` has shape"),
        (said(&hidden, &weight, None, &zeros(&[3], DType::U32), options), "`targets` has shape"),
        (said(&hidden, &weight, None, &far, options), "5"),
        (said(&hidden, &weight, None, &targets, with(|o| o.temperature = 0.0)), "temperature"),
        (said(&hidden, &weight, None, &targets, with(|o| o.logit_scale = f64::NAN)), "logit_scale"),
        (said(&hidden, &weight, None, &targets, with(|o| o.logit_scale = 1e40)), "logit_scale"),
        (said(&hidden, &weight, None, &targets, with(|o| o.softcap = Some(0.0))), "softcap"),
    ] {
        assert!(error.contains(expected), "{error}");
    }
    let mut case = Case::<f32>::new(9, [2, 4, 5], false);
    for wrong in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        case.temperatures = Some(vec![1.0, wrong]);
        let mut out = [(); 3].map(|()| vec![7.0; 2]);
        let [logp, max, log_sum] = &mut out;
        let outputs = ForwardOutputs { logp, max, log_sum, entropy: None };
        let error = cpu::forward(case.inputs(), case.sizes, &case.options, outputs).unwrap_err();
        assert!(error.to_string().contains("temperatures"), "{error}");
        assert!(out.iter().flatten().all(|&x| x == 7.0), "nothing is written");
    }
}
