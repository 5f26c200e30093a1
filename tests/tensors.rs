//! What holds for the candle functions of all ops.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::to_vec;
use ppo_kernels::advantages::{outcome_advantages, AdvantageInputs, AdvantageOptions};
use ppo_kernels::correction::{correction, CorrectionInputs, CorrectionOptions};
use ppo_kernels::gae::{gae, GaeInputs, GaeOptions};
use ppo_kernels::kl::{full_kl, token_kl, FullKlOptions, KlOptions};
use ppo_kernels::logprob::{logprobs, logprobs_and_entropy, LogprobOptions};
use ppo_kernels::ppo_loss::{ppo_loss, PpoLossInputs, PpoLossOptions};
use ppo_kernels::whiten::{masked_moments, masked_whiten, masked_whiten_with, WhitenOptions};
use ppo_kernels::Result;

/// A slice of a batch of no rows, which begins behind its storage's end.
fn sliced(dtype: DType, dims: &[usize]) -> Tensor {
    let mut whole = dims.to_vec();
    whole[1] += 1;
    let tensor = Tensor::zeros(whole, dtype, &Device::Cpu).unwrap();
    tensor.narrow(1, 1, dims[1]).unwrap()
}

#[test]
fn a_sliced_empty_batch_is_a_batch() {
    let dims = [0, 3];
    let (x, mask) = (sliced(DType::F32, &dims), sliced(DType::U8, &dims));
    let var = Var::from_tensor(&x).unwrap();
    let (logits, targets) = (sliced(DType::F32, &[0, 3, 5]), sliced(DType::U32, &dims));
    let empty = |tensor: Result<Tensor>| assert_eq!(tensor.unwrap().dims(), dims);

    empty(logprobs(&logits, &targets, &LogprobOptions::default()));
    empty(token_kl(&x, &x, Some(&mask), &KlOptions::default()));
    empty(full_kl(&logits, &logits, Some(&mask), &FullKlOptions::default()));
    let inputs = GaeInputs { mask: Some(&mask), ..GaeInputs::new(&x) };
    empty(gae(&inputs, &GaeOptions::default()).map(|out| out.advantages));
    let scores = x.narrow(1, 0, 1).unwrap().squeeze(1).unwrap();
    let inputs = AdvantageInputs { mask: Some(&mask), ..AdvantageInputs::new(&scores) };
    let out = outcome_advantages(&inputs, 8, &AdvantageOptions::default());
    empty(out.map(|out| out.token_advantages.unwrap()));
    let inputs = CorrectionInputs { mask: Some(&mask), ..CorrectionInputs::new(&x, &x) };
    empty(correction(&inputs, &CorrectionOptions::default()).map(|out| out.weights));
    let moments = masked_moments(&x, Some(&mask)).unwrap();
    assert_eq!(moments.to_host().unwrap().count, 0.0);
    let options = WhitenOptions::default();
    let two = ppo_kernels::moments::Moments { count: 2.0, mean: 0.0, m2: 1.0 };
    let two = ppo_kernels::moments::MomentsTensor::new(&two, &Device::Cpu).unwrap();
    empty(masked_whiten_with(&x, Some(&mask), &two, &options));
    let inputs = PpoLossInputs { mask: Some(&mask), ..PpoLossInputs::new(&var, &x, &x) };
    let options = PpoLossOptions { denominator: Some(1.0), ..Default::default() };
    let loss = ppo_loss(&inputs, &options).unwrap().loss;
    assert_eq!(loss.to_scalar::<f32>().unwrap(), 0.0);
    assert_eq!(loss.backward().unwrap().get(&var).unwrap().dims(), dims);
}

/// Masked tokens of a row have gradient 0, whatever comes from above for the others.
#[test]
fn masked_gradients_are_0_under_any_upstream_gradient() {
    let cpu = &Device::Cpu;
    let x = Var::new(&[[0.3_f32, -0.6, 2.0]], cpu).unwrap();
    let other = Tensor::new(&[[0.25_f32, -0.5, 1.0]], cpu).unwrap();
    let mask = Tensor::new(&[[1_u8, 1, 0]], cpu).unwrap();
    let logits = Var::new(&[[[1_f32, 2.0], [3.0, 1.0], [0.0, 4.0]]], cpu).unwrap();
    let targets = Tensor::new(&[[0_i64, 1, -100]], cpu).unwrap();
    for factor in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let gradient = |output: Tensor, var: &Var| {
            let loss = (output * factor).unwrap().sum_all().unwrap();
            to_vec(loss.backward().unwrap().get(var).unwrap())
        };
        let y = Var::from_tensor(&x).unwrap();
        let inputs = PpoLossInputs {
            values: Some(&y),
            returns: Some(&other),
            entropy: Some(&y),
            mask: Some(&mask),
            ..PpoLossInputs::new(&x, &other, &other)
        };
        let options =
            PpoLossOptions { value_clip_range: None, entropy_coef: 0.5, ..Default::default() };
        let loss = ppo_loss(&inputs, &options).unwrap().loss;
        let found = gradient(loss.clone(), &y);
        assert!(found[2] == 0.0 && !found[0].is_finite(), "ppo_loss {factor}: {found:?}");
        let whitened = masked_whiten(&x, Some(&mask), &WhitenOptions::default()).unwrap();
        assert_eq!(gradient(whitened, &x)[2], 0.0, "masked_whiten {factor}");
        let kl = token_kl(&x, &other, Some(&mask), &KlOptions::default()).unwrap();
        for (op, found) in [("ppo_loss", gradient(loss, &x)), ("token_kl", gradient(kl, &x))] {
            assert_eq!(found[2], 0.0, "{op} {factor}: {found:?}");
            assert!(!found[0].is_finite(), "{op} {factor}: {found:?}");
        }
        let options = LogprobOptions { ignore_index: Some(-100), ..Default::default() };
        let logp = logprobs(&logits, &targets, &options).unwrap();
        let (_, entropy) = logprobs_and_entropy(&logits, &targets, &options).unwrap();
        for (op, found) in
            [("logp", gradient(logp, &logits)), ("entropy", gradient(entropy, &logits))]
        {
            assert_eq!(found[4..], [0.0, 0.0], "{op} {factor}: {found:?}");
            assert!(found[..4].iter().any(|g| !g.is_finite()), "{op} {factor}: {found:?}");
        }
        let options = FullKlOptions::default();
        let reference = Tensor::new(&[[[1_f32, 1.0], [0.0, 1.0], [0.0, 2.0]]], cpu).unwrap();
        let kl = full_kl(&logits, &reference, Some(&mask), &options).unwrap();
        let found = gradient(kl, &logits);
        assert_eq!(found[4..], [0.0, 0.0], "full_kl {factor}: {found:?}");
    }
}

#[test]
fn gradients_of_gradients_are_refused() {
    // candle asks for it once in each thread, at the first gradient.
    std::env::set_var("CANDLE_GRAD_DO_NOT_DETACH", "1");
    let cpu = &Device::Cpu;
    let x = Var::new(&[[0.3_f32, -0.6], [0.1, 0.2]], cpu).unwrap();
    let y = x.sin().unwrap();
    let logits = Tensor::stack(&[&y, &y.neg().unwrap(), &y.sqr().unwrap()], 2).unwrap();
    let targets = Tensor::new(&[[0_u32, 1], [2, 0]], cpu).unwrap();
    let options = LogprobOptions::default();
    let (logp, entropy) = logprobs_and_entropy(&logits, &targets, &options).unwrap();
    let inputs = PpoLossInputs::new(&y, &x, &x);
    for (op, output) in [
        ("logprobs", logp),
        ("entropy", entropy),
        ("token_kl", token_kl(&y, &x, None, &KlOptions::default()).unwrap()),
        ("full_kl", full_kl(&logits, &logits, None, &FullKlOptions::default()).unwrap()),
        ("masked_whiten", masked_whiten(&y, None, &WhitenOptions::default()).unwrap()),
        ("ppo_loss", ppo_loss(&inputs, &PpoLossOptions::default()).unwrap().loss),
    ] {
        let grads = output.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let penalty = grads.get(&x).unwrap().sqr().unwrap().sum_all().unwrap();
        let refused = penalty.backward().unwrap_err().to_string();
        assert!(refused.contains("gradients of gradients are not supported"), "{op}: {refused}");
    }
}
