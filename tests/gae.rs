//! The gae op: the reference against other projects' functions, the CPU and the tensor layer against
//! the reference, and what must hold for any input.

mod common;

use std::slice::from_mut;

use candle_core::{DType, Device, Tensor, Var};
use common::gae_cases::*;
use common::pack::BAD_OFFSETS;
use common::*;
use ppo_kernels::gae::cpu::{self, Inputs, Outputs};
use ppo_kernels::gae::{
    gae, reference, GaeInputs, GaeOptions, MaskMode, MissingEos, RewardShaping, ScoreOrder,
    ScorePlacement, ScoreScale,
};
use ppo_kernels::moments::{Moments, RunningMoments};
use ppo_kernels::whiten::{self, WhitenOptions};
use ppo_kernels::{Error, Result};

/// The peers' float64.
const GOLDEN_REL: f64 = 1e-9;
const GOLDEN_ABS: f64 = 1e-10;

/// Whitened by verl and NeMo, who add 1e-8 to the number of tokens.
const WHITENED: f64 = 5e-8;

// ---- the peers ----

fn options(gamma: f64, lambda: f64, mask_mode: MaskMode) -> GaeOptions {
    GaeOptions { gamma, lambda, mask_mode, ..Default::default() }
}

/// What the mask keeps; some peers leave other things where it is 0.
fn kept(values: &[f64], mask: &[u8]) -> Vec<f64> {
    let pairs = values.iter().zip(mask);
    pairs.map(|(&v, &m)| if m != 0 { v } else { 0.0 }).collect()
}

/// The peer's advantages and returns where the mask keeps them, from the reference and the CPU.
#[track_caller]
fn check_peer(
    case: &Golden,
    inputs: &reference::Inputs,
    seq_len: usize,
    options: &GaeOptions,
    advantages: &str,
    returns: &str,
) -> reference::Gae {
    let got = check_reference_and_cpu(&case.id, inputs, seq_len, options);
    let mask = inputs.mask.map_or_else(|| vec![1; inputs.values.len()], <[u8]>::to_vec);
    for (key, got) in [(advantages, &got.advantages), (returns, &got.returns)] {
        if !key.is_empty() {
            let (got, want) = (kept(got, &mask), kept(&case.output(key), &mask));
            assert_close(&format!("{} {key}", case.id), &got, &want, GOLDEN_REL, GOLDEN_ABS);
        }
    }
    got
}

/// The reference's result, after the CPU's has been compared with it.
#[track_caller]
fn check_reference_and_cpu(
    what: &str,
    inputs: &reference::Inputs,
    seq_len: usize,
    options: &GaeOptions,
) -> reference::Gae {
    let batch = match inputs.offsets {
        Some(offsets) => offsets.len() - 1,
        None => inputs.values.len().checked_div(seq_len).unwrap_or(0),
    };
    let want = reference::gae(inputs, batch, seq_len, options);
    let narrow = |v: Option<&[f64]>| v.map(|v| v.iter().map(|&v| v as f32).collect::<Vec<_>>());
    let values = narrow(Some(inputs.values)).unwrap();
    let (rewards, kl) = (narrow(inputs.rewards), narrow(inputs.kl));
    let (scores, bootstrap) = (narrow(inputs.scores), narrow(inputs.bootstrap));
    let lambda_per_row = narrow(inputs.lambda_per_row);
    let narrowed = Inputs {
        values: &values,
        rewards: rewards.as_deref(),
        kl: kl.as_deref(),
        scores: scores.as_deref(),
        has_eos: inputs.has_eos,
        mask: inputs.mask,
        dones: inputs.dones,
        bootstrap: bootstrap.as_deref(),
        offsets: inputs.offsets,
        lambda_per_row: lambda_per_row.as_deref(),
    };
    let got = run_cpu(narrowed, batch, seq_len, options).unwrap();
    check_output(what, &got, &want);
    want
}

fn run_cpu(inputs: Inputs, batch: usize, seq_len: usize, options: &GaeOptions) -> Result<Output> {
    // Whatever was there must be overwritten.
    let tokens = if inputs.offsets.is_some() { seq_len } else { batch * seq_len };
    let garbage = || vec![f32::NAN; tokens];
    let (mut advantages, mut returns, mut rewards) = (garbage(), garbage(), garbage());
    let mut moments = Moments { count: f64::NAN, mean: f64::NAN, m2: f64::NAN };
    let outputs = Outputs {
        advantages: &mut advantages,
        returns: &mut returns,
        shaped_rewards: Some(&mut rewards),
        moments: Some(from_mut(&mut moments)),
    };
    cpu::gae(inputs, batch, seq_len, options, outputs)?;
    Ok(Output { advantages, returns, rewards, moments })
}

#[test]
fn reference_equals_the_peers_advantages_and_returns() {
    let mut ran = std::collections::BTreeMap::new();
    for case in golden("gae").into_iter().chain(golden("gae_long")) {
        let seq_len = case.shape("values")[1];
        let (mut rewards, mut values) = (case.input("rewards"), case.input("values"));
        let mask = case.mask("mask");
        let (gamma, lambda) = (case.number("gamma"), case.number("lam"));
        let multiply = options(gamma, lambda, MaskMode::Multiply);
        let carry = options(gamma, lambda, MaskMode::Carry);
        let function = case.function.rsplit('.').next().unwrap();
        *ran.entry((case.peer.clone(), function.to_string())).or_insert(0) += 1;

        if case.peer == "trlx" {
            // Has no mask.
            let inputs =
                reference::Inputs { rewards: Some(&rewards), ..reference::Inputs::new(&values) };
            let whitens = case.inputs["use_whitening"].as_bool().unwrap();
            let key = if whitens { "" } else { "advantages" };
            let got = check_peer(&case, &inputs, seq_len, &carry, key, "returns");
            if whitens {
                check_whitened(&case, &got, None);
            }
            continue;
        }
        if case.peer == "deepspeed-chat" {
            // It starts in the middle of the row, with what is left of it.
            let start = case.number("start") as usize;
            let from = |all: &[f64]| -> Vec<f64> {
                all.chunks(seq_len).flat_map(|row| &row[start..]).copied().collect()
            };
            (rewards, values) = (from(&rewards), from(&values));
            let wide_mask: Vec<f64> = mask.iter().map(|&m| f64::from(m)).collect();
            let mask: Vec<u8> = from(&wide_mask).iter().map(|&m| m as u8).collect();
            let inputs = reference::Inputs {
                rewards: Some(&rewards),
                mask: Some(&mask),
                ..reference::Inputs::new(&values)
            };
            let width = seq_len - start;
            check_peer(&case, &inputs, width, &multiply, "advantages", "returns");
            continue;
        }
        if function == "get_cumulative_returns" {
            // Advantages with λ = 1 and no values.
            let zeros = vec![0.0; values.len()];
            let inputs = reference::Inputs {
                rewards: Some(&rewards),
                mask: Some(&mask),
                ..reference::Inputs::new(&zeros)
            };
            let options = GaeOptions { lambda: 1.0, ..multiply };
            check_peer(&case, &inputs, seq_len, &options, "returns", "returns");
            continue;
        }
        let inputs = reference::Inputs {
            rewards: Some(&rewards),
            mask: Some(&mask),
            ..reference::Inputs::new(&values)
        };
        let (options, advantages) = match case.peer.as_str() {
            "verl" => (carry, "advantages_unwhitened"),
            "nemo-rl" => (carry, "advantages"),
            "trl-v0.11.4" => (multiply, "advantages_unwhitened"),
            "openrlhf" => (multiply, "advantages"),
            other => panic!("{other}"),
        };
        let whitens_rewards = case.inputs.get("whiten_rewards").is_some_and(|w| w == true);
        if whitens_rewards {
            // TRL whitens all rewards, masked ones (zeroed) too, and GAE masks nothing after that.
            let zeroed = kept(&rewards, &mask);
            let options = WhitenOptions { shift_mean: false, ..Default::default() };
            let moments = whiten::reference::masked_moments(&zeroed, Some(&mask));
            let rewards = whiten::reference::masked_whiten_with(&zeroed, None, &moments, &options);
            let values = kept(&values, &mask);
            let inputs =
                reference::Inputs { rewards: Some(&rewards), ..reference::Inputs::new(&values) };
            check_peer(&case, &inputs, seq_len, &carry, advantages, "returns");
            continue;
        }
        let got = check_peer(&case, &inputs, seq_len, &options, advantages, "returns");
        if advantages == "advantages_unwhitened" {
            check_whitened(&case, &got, Some(&mask));
        }
    }
    let count = |peer: &str, function: &str| ran[&(peer.to_string(), function.to_string())];
    assert_eq!(count("verl", "compute_gae_advantage_return"), 28);
    assert_eq!(count("trl-v0.11.4", "compute_advantages"), 38);
    assert_eq!(count("openrlhf", "get_advantages_and_returns"), 28);
    assert_eq!(count("openrlhf", "get_cumulative_returns"), 14);
    assert_eq!(count("nemo-rl", "_compute_gae"), 25);
    assert_eq!(count("deepspeed-chat", "get_advantages_and_returns"), 25);
    assert_eq!(count("trlx", "get_advantages_and_returns"), 12);
    assert_eq!(ran.values().sum::<i32>(), 170);
}

/// The peer's whitened advantages, made with the moments of the same pass.
fn check_whitened(case: &Golden, got: &reference::Gae, mask: Option<&[u8]>) {
    let peer_has_none = case.outputs["advantages"].is_null() || got.moments.count == 1.0;
    if peer_has_none {
        assert_eq!(got.moments.count, 1.0, "{}", case.id);
        return;
    }
    let options = WhitenOptions::default();
    let whitened =
        whiten::reference::masked_whiten_with(&got.advantages, mask, &got.moments, &options);
    let want = match mask {
        Some(mask) => kept(&case.output("advantages"), mask),
        None => case.output("advantages"),
    };
    assert_close(&format!("{} whitened", case.id), &whitened, &want, WHITENED, WHITENED);
}

#[test]
fn reference_equals_cleanrl_with_dones_and_bootstrap() {
    let mut ran = 0;
    for case in golden("gae_episodes").iter().filter(|case| case.peer == "cleanrl") {
        let &[seq_len, batch] = case.shape("rewards").as_slice() else { panic!() };
        // [T, B] to [B, T].
        let transposed = |time_major: &[f64]| -> Vec<f64> {
            (0..batch * seq_len).map(|i| time_major[i % seq_len * batch + i / seq_len]).collect()
        };
        let (rewards, values) =
            (transposed(&case.input("rewards")), transposed(&case.input("values")));
        // An episode ended with step t if one starts at t + 1.
        let starts = [case.input("dones"), case.input("next_done")].concat();
        let dones = transposed(&starts[batch..]);
        let dones: Vec<u8> = dones.iter().map(|&d| u8::from(d != 0.0)).collect();
        let bootstrap = case.input("next_value");
        let inputs = reference::Inputs {
            rewards: Some(&rewards),
            dones: Some(&dones),
            bootstrap: Some(&bootstrap),
            ..reference::Inputs::new(&values)
        };
        let options = options(case.number("gamma"), case.number("lam"), MaskMode::Carry);
        let got = check_reference_and_cpu(&case.id, &inputs, seq_len, &options);
        for (key, got) in [("advantages", got.advantages), ("returns", got.returns)] {
            let want = transposed(&case.output(key));
            assert_close(&format!("{} {key}", case.id), &got, &want, GOLDEN_REL, GOLDEN_ABS);
        }
        ran += 1;
    }
    assert_eq!(ran, 6);
}

#[test]
fn reference_equals_nemos_estimator() {
    let mut ran = 0;
    for case in golden("gae_episodes").iter().filter(|case| case.peer == "nemo-rl") {
        let seq_len = case.shape("values")[1];
        let (values, scores, mask) =
            (case.input("values"), case.input("rewards"), case.mask("mask"));
        assert_eq!(case.text("kl_type"), "k1");
        let kl = difference(&case.input("logprobs"), &case.input("reference_logprobs"));
        // Its λ by length.
        let alpha = case.number("length_adaptive_alpha");
        let of_row = |mask: &[u8]| {
            let tokens = mask.iter().filter(|&&m| m != 0).count() as f64;
            (1.0 - 1.0 / (alpha * tokens)).max(0.0)
        };
        let lambdas: Vec<f64> = mask.chunks(seq_len).map(of_row).collect();
        let options = GaeOptions {
            gamma: case.number("gae_gamma"),
            lambda: case.optional("gae_lambda_policy").unwrap_or(case.number("gae_lambda")),
            value_lambda: case.optional("gae_lambda_value"),
            shaping: RewardShaping {
                kl_coef: case.number("kl_coef_in_reward"),
                ..Default::default()
            },
            ..Default::default()
        };
        let inputs = reference::Inputs {
            scores: Some(&scores),
            kl: Some(&kl),
            mask: Some(&mask),
            lambda_per_row: (alpha > 0.0).then_some(&lambdas[..]),
            ..reference::Inputs::new(&values)
        };
        let normalized = case.inputs["normalize_advantages"].as_bool().unwrap();
        let key = if normalized { "" } else { "advantages" };
        let got = check_peer(case, &inputs, seq_len, &options, key, "returns");
        let want = case.output("token_level_rewards");
        assert_close(&case.id, &got.rewards, &want, GOLDEN_REL, GOLDEN_ABS);
        if normalized {
            check_whitened(case, &got, Some(&mask));
        }
        ran += 1;
    }
    assert_eq!(ran, 4);
}

fn difference(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// The per-token KL estimates that the peers' rewards are made of.
fn kl(kind: &str, logp: &[f64], ref_logp: &[f64]) -> Vec<f64> {
    let estimate = |d: f64| match kind {
        "k1" | "kl" => d,
        "abs" => d.abs(),
        "mse" => d * d / 2.0,
        "k3" => (-d).exp() - 1.0 + d,
        // verl bounds its result.
        "low_var_kl" => ((-d).exp() - 1.0 + d).clamp(-10.0, 10.0),
        other => panic!("{other}"),
    };
    difference(logp, ref_logp).into_iter().map(estimate).collect()
}

#[test]
fn reference_equals_current_trl_with_the_score_after_the_last_token() {
    let mut ran = 0;
    for case in golden("gae_episodes").iter().filter(|case| case.peer == "trl") {
        let seq_len = case.shape("values")[1];
        let (values, scores) = (case.input("values"), case.input("scores"));
        let kl =
            kl(case.text("kl_estimator"), &case.input("logprobs"), &case.input("ref_logprobs"));
        let not = |key: &str| -> Vec<u8> {
            case.output(key).iter().map(|&padding| u8::from(padding == 0.0)).collect()
        };
        // Up to the last token for the policy, one further for the values.
        let (mask, mask_p1) = (not("padding_mask"), not("padding_mask_p1"));
        let options = GaeOptions {
            gamma: case.number("gamma"),
            lambda: case.number("lam"),
            shaping: RewardShaping {
                kl_coef: case.number("kl_coef"),
                score_placement: ScorePlacement::AfterLastToken,
                ..Default::default()
            },
            ..Default::default()
        };
        let inputs = reference::Inputs {
            scores: Some(&scores),
            kl: Some(&kl),
            mask: Some(&mask),
            ..reference::Inputs::new(&values)
        };
        let mut got = check_reference_and_cpu(&case.id, &inputs, seq_len, &options);
        if case.inputs["whiten_rewards"].as_bool().unwrap() {
            // Then shaping and the recurrence are two calls, the second on dense rewards.
            let options = WhitenOptions { shift_mean: false, ..Default::default() };
            let rewards = whiten::reference::masked_whiten(&got.rewards, Some(&mask_p1), &options);
            let options = options_of(case);
            let inputs = reference::Inputs {
                rewards: Some(&rewards),
                mask: Some(&mask_p1),
                ..reference::Inputs::new(&values)
            };
            got = check_reference_and_cpu(&case.id, &inputs, seq_len, &options);
            got.advantages = kept(&got.advantages, &mask);
            got.moments = whiten::reference::masked_moments(&got.advantages, Some(&mask));
        }
        for (key, got) in [("rewards", &got.rewards), ("returns", &got.returns)] {
            let want = case.output(key);
            assert_close(&format!("{} {key}", case.id), got, &want, GOLDEN_REL, GOLDEN_ABS);
        }
        check_whitened(case, &got, Some(&mask));
        ran += 1;
    }
    assert_eq!(ran, 3);
}

fn options_of(case: &Golden) -> GaeOptions {
    options(case.number("gamma"), case.number("lam"), MaskMode::Carry)
}

#[test]
fn reference_equals_the_peers_rewards() {
    let mut ran = std::collections::BTreeMap::new();
    for case in golden("reward_shaping") {
        *ran.entry(case.peer.clone()).or_insert(0) += 1;
        let mut shaping = RewardShaping::default();
        let (kl, mut mask, key);
        let (mut scores, mut dense) = (None, None);
        match case.peer.as_str() {
            "trl-v0.11.4" => {
                kl = kl_of(&case, "kl_penalty", "logprobs", "ref_logprobs");
                (scores, mask) = (Some(case.input("scores")), case.mask("masks"));
                shaping.kl_coef = case.number("kl_coef");
                key = "rewards";
            }
            "verl" => {
                kl = kl_of(&case, "kl_penalty", "old_log_probs", "ref_log_prob");
                (dense, mask) =
                    (Some(case.input("token_level_scores")), case.mask("response_mask"));
                shaping.kl_coef = case.number("init_kl_coef");
                key = "token_level_rewards";
            }
            "openrlhf" => {
                kl = case.input("kl");
                (scores, mask) = (Some(case.input("r")), case.mask("action_mask"));
                shaping.kl_coef = case.number("kl_coef");
                if !case.inputs["reward_clip_range"].is_null() {
                    let range = case.input("reward_clip_range");
                    (shaping.score_min, shaping.score_max) = (range[0], range[1]);
                }
                key = "reward";
            }
            "deepspeed-chat" => {
                kl = difference(&case.input("log_probs"), &case.input("ref_log_probs"));
                (scores, mask) = (Some(case.input("reward_score")), case.mask("action_mask"));
                // What is before the response is not the policy's.
                let (width, start) =
                    (case.shape("log_probs")[1], case.number("prompt_length") as usize - 1);
                mask.chunks_mut(width).for_each(|row| row[..start].fill(0));
                shaping.kl_coef = case.number("kl_ctl");
                let clip = case.number("clip_reward_value");
                (shaping.score_min, shaping.score_max) = (-clip, clip);
                shaping.score_placement = ScorePlacement::AfterLastToken;
                key = "rewards";
            }
            other => panic!("{other}"),
        }
        let seq_len = mask.len() / case.shape(key_of_rows(&case.peer))[0];
        let values = vec![0.0; mask.len()];
        let inputs = reference::Inputs {
            rewards: dense.as_deref(),
            scores: scores.as_deref(),
            kl: Some(&kl),
            mask: Some(&mask),
            ..reference::Inputs::new(&values)
        };
        let options = GaeOptions { shaping, ..Default::default() };
        let got = check_reference_and_cpu(&case.id, &inputs, seq_len, &options);

        let mut want = kept(&case.output(key), &mask);
        if case.peer == "deepspeed-chat" {
            // It takes the KL of the padding token too, where the score is.
            for (row, tokens) in mask.chunks(seq_len).enumerate() {
                let last = tokens.iter().rposition(|&m| m != 0).unwrap();
                if last + 1 < seq_len {
                    let i = row * seq_len + last + 1;
                    want[i] = case.output(key)[i] + shaping.kl_coef * kl[i];
                }
            }
        }
        assert_close(&case.id, &got.rewards, &want, GOLDEN_REL, GOLDEN_ABS);
    }
    let ran: Vec<(&str, i32)> = ran.iter().map(|(peer, n)| (peer.as_str(), *n)).collect();
    assert_eq!(ran, [("deepspeed-chat", 2), ("openrlhf", 9), ("trl-v0.11.4", 9), ("verl", 12)]);
}

fn kl_of(case: &Golden, kind: &str, logp: &str, ref_logp: &str) -> Vec<f64> {
    kl(case.text(kind), &case.input(logp), &case.input(ref_logp))
}

/// An input of the peer with one row a sequence.
fn key_of_rows(peer: &str) -> &'static str {
    match peer {
        "trl-v0.11.4" => "logprobs",
        "verl" => "response_mask",
        "openrlhf" => "action_mask",
        _ => "log_probs",
    }
}

// ---- the CPU and the tensors against the reference ----

#[test]
fn cpu_agrees_with_the_reference_for_all_options_and_masks() {
    let mut rng = rng(1);
    for options in all_options() {
        for masked in ALL_MASKED {
            // Around the boundaries of chunks.
            for (batch, seq_len) in [(5, 1), (4, 2), (3, 37), (2, 512), (2, 513), (2, 1100)] {
                for fewer in [false, true] {
                    let sample = Sample::new(&mut rng, batch, seq_len, masked);
                    let inputs = sample.inputs(fewer, masked != Masked::Nothing);
                    let want = run_reference(&inputs, batch, seq_len, &options);
                    let got = run_cpu(inputs, batch, seq_len, &options).unwrap();
                    let what = format!("{batch}x{seq_len} {masked:?} {fewer} {options:?}");
                    check_output(&what, &got, &want);
                    let finite = |v: &[f32]| v.iter().all(|v| v.is_finite());
                    assert!(finite(&got.advantages) && finite(&got.returns), "{what}");
                }
            }
        }
    }
}

#[test]
fn dense_rewards_alone_agree_with_the_reference() {
    let mut rng = rng(11);
    for options in all_options() {
        if options.shaping.missing_eos != MissingEos::Keep {
            continue;
        }
        for (batch, seq_len) in [(4, 2), (3, 37), (2, 513), (2, 1100)] {
            let sample = Sample::new(&mut rng, batch, seq_len, Masked::Right);
            for mask in [None, Some(&sample.mask[..])] {
                // Without a mask what it hides would be NaN.
                let finite =
                    |x: &[f32]| x.iter().map(|x| if x.is_nan() { 0.5 } else { *x }).collect();
                let (values, rewards): (Vec<f32>, Vec<f32>) =
                    (finite(&sample.values), finite(&sample.rewards));
                let inputs = Inputs { rewards: Some(&rewards), mask, ..Inputs::new(&values) };
                let want = run_reference(&inputs, batch, seq_len, &options);
                let got = run_cpu(inputs, batch, seq_len, &options).unwrap();
                check_output(&format!("{batch}x{seq_len} {options:?}"), &got, &want);
            }
        }
    }
}

/// The tensors of a sample, changed by `layout`.
fn run_tensors(
    sample: &Sample,
    options: &GaeOptions,
    device: &Device,
    layout: impl Fn(&Tensor) -> Tensor,
) -> (Output, [Tensor; 3]) {
    let tokens = (sample.batch, sample.seq_len);
    let f32s = |v: &[f32]| layout(&Tensor::from_slice(v, tokens, device).unwrap());
    let bytes = |v: &[u8]| layout(&Tensor::from_slice(v, tokens, device).unwrap());
    let row = |v: &[f32]| layout(&Tensor::from_slice(v, sample.batch, device).unwrap());
    let (values, rewards, kl) = (f32s(&sample.values), f32s(&sample.rewards), f32s(&sample.kl));
    let (mask, dones) = (bytes(&sample.mask), bytes(&sample.dones));
    let (scores, bootstrap) = (row(&sample.scores), row(&sample.bootstrap));
    let has_eos = layout(&Tensor::from_slice(&sample.has_eos, sample.batch, device).unwrap());
    let inputs = GaeInputs {
        values: &values,
        rewards: Some(&rewards),
        kl: Some(&kl),
        scores: Some(&scores),
        has_eos: Some(&has_eos),
        mask: Some(&mask),
        dones: Some(&dones),
        bootstrap: Some(&bootstrap),
        offsets: None,
        lambda_per_row: None,
    };
    let out = gae(&inputs, options).unwrap();
    let vec = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let output = Output {
        advantages: vec(&out.advantages),
        returns: vec(&out.returns),
        rewards: vec(&out.rewards),
        moments: out.moments.to_host().unwrap(),
    };
    (output, [out.advantages, out.returns, out.rewards])
}

#[test]
fn tensors_of_any_layout_agree_with_the_reference() {
    let mut rng = rng(2);
    for device in devices() {
        for options in all_options() {
            let sample = Sample::new(&mut rng, 4, 33, Masked::Gaps);
            let inputs = sample.inputs(false, true);
            let want = run_reference(&inputs, 4, 33, &options);
            let (got, tensors) = run_tensors(&sample, &options, &device, Tensor::clone);
            assert!(tensors.iter().all(|t| t.dims() == [4, 33] && !t.track_op()));
            let (got_strided, _) = run_tensors(&sample, &options, &device, strided);
            assert_eq!(got_strided, got);
            check_output(&format!("{device:?} {options:?}"), &got, &want);
            if device.is_cpu() {
                assert_eq!(got, run_cpu(inputs, 4, 33, &options).unwrap());
            }
        }
    }
}

#[test]
fn outputs_are_constants_even_if_the_values_are_not() {
    for device in devices() {
        let values = Var::new(&[[0.5f32, 1.0]], &device).unwrap();
        let values = values.affine(2.0, 0.0).unwrap();
        assert!(values.track_op());
        let out = gae(&GaeInputs::new(&values), &GaeOptions::default()).unwrap();
        assert!(!out.advantages.track_op() && !out.returns.track_op());
    }
}

// ---- what the options mean ----

/// One row of f32, through the CPU.
fn one_row(inputs: Inputs, options: &GaeOptions) -> Output {
    run_cpu(inputs, 1, inputs.values.len(), options).unwrap()
}

#[test]
fn a_gap_is_skipped_or_discounts() {
    let nan = f32::NAN;
    let (values, rewards, mask) = ([0.0, nan, 0.0], [0.0, nan, 1.0], [1, 0, 1]);
    let inputs = Inputs { rewards: Some(&rewards), mask: Some(&mask), ..Inputs::new(&values) };
    let advantage = |mask_mode| one_row(inputs, &options(0.5, 1.0, mask_mode)).advantages[0];
    assert_eq!(advantage(MaskMode::Carry), 0.5);
    assert_eq!(advantage(MaskMode::Multiply), 0.25);
}

#[test]
fn a_done_step_sees_nothing_after_it() {
    let values = [1.0, 2.0, 4.0];
    let inputs = Inputs {
        rewards: Some(&[10.0, 20.0, 40.0]),
        dones: Some(&[0, 1, 0]),
        bootstrap: Some(&[8.0]),
        ..Inputs::new(&values)
    };
    let out = one_row(inputs, &options(1.0, 1.0, MaskMode::Carry));
    assert_eq!(out.returns, [30.0, 20.0, 48.0]);
}

#[test]
fn the_bootstrap_value_follows_the_last_unmasked_token() {
    let values = [1.0, 2.0, f32::NAN];
    let inputs = Inputs { mask: Some(&[1, 1, 0]), bootstrap: Some(&[8.0]), ..Inputs::new(&values) };
    for mask_mode in [MaskMode::Carry, MaskMode::Multiply] {
        let out = one_row(inputs, &options(0.5, 1.0, mask_mode));
        assert_eq!(out.returns, [2.0, 4.0, 0.0]);
    }
}

#[test]
fn the_score_lands_on_the_last_token_or_one_past_it() {
    let nan = f32::NAN;
    let (values, kl) = ([0.0, 0.25, 3.0, nan], [1.0, 2.0, nan, nan]);
    let inputs = Inputs {
        kl: Some(&kl),
        scores: Some(&[5.0]),
        mask: Some(&[1, 1, 0, 0]),
        ..Inputs::new(&values)
    };
    let with = |placement| GaeOptions {
        lambda: 1.0,
        shaping: RewardShaping { kl_coef: 0.5, score_placement: placement, ..Default::default() },
        ..Default::default()
    };
    let out = one_row(inputs, &with(ScorePlacement::LastToken));
    assert_eq!(out.rewards, [-0.5, 4.0, 0.0, 0.0]);
    assert_eq!(out.returns, [3.5, 4.0, 0.0, 0.0]);
    let out = one_row(inputs, &with(ScorePlacement::AfterLastToken));
    assert_eq!(out.rewards, [-0.5, -1.0, 5.0, 0.0]);
    assert_eq!(out.returns, [3.5, 4.0, 5.0, 0.0]);
    assert_eq!((out.advantages[2], out.moments.count), (0.0, 2.0));

    // No room, and no score.
    let full = Inputs { kl: Some(&kl[..2]), mask: None, ..inputs };
    let full = Inputs { values: &values[..2], ..full };
    let out = one_row(full, &with(ScorePlacement::AfterLastToken));
    assert_eq!(out.rewards, [-0.5, 4.0]);
    let unscored = Inputs { scores: None, ..inputs };
    let out = one_row(unscored, &with(ScorePlacement::AfterLastToken));
    assert_eq!(out.rewards, [-0.5, -1.0, 0.0, 0.0]);
    assert_eq!(out.returns[2], 0.0);
}

#[test]
fn without_a_kl_coefficient_the_kl_may_be_anything() {
    let (values, kl) = ([0.5; 2], [f64::INFINITY, f64::NAN]);
    let inputs = reference::Inputs {
        kl: Some(&kl),
        scores: Some(&[1.0]),
        ..reference::Inputs::new(&values)
    };
    let shaping = RewardShaping { kl_coef: 0.0, ..Default::default() };
    let options = GaeOptions { shaping, ..Default::default() };
    let got = check_reference_and_cpu("no coefficient", &inputs, 2, &options);
    assert_eq!(got.rewards, [0.0, 1.0]);
}

#[test]
fn scores_are_scaled_and_clipped_and_then_the_missing_end_counts() {
    let reward = |score: f32, has_eos: u8, shaping: RewardShaping| {
        let (scores, has_eos) = ([score], [has_eos]);
        let inputs =
            Inputs { scores: Some(&scores), has_eos: Some(&has_eos), ..Inputs::new(&[0.0]) };
        one_row(inputs, &GaeOptions { shaping, ..Default::default() }).rewards[0]
    };
    let scaled = RewardShaping {
        score_scale: Some(ScoreScale { mean: 1.0, std: 2.0 }),
        score_min: -2.0,
        score_max: 3.0,
        ..Default::default()
    };
    assert_eq!(reward(9.0, 1, scaled), 3.0);
    assert_eq!(reward(-9.0, 1, scaled), -2.0);
    assert_eq!(reward(2.0, 1, scaled), 0.5);
    let reversed = RewardShaping { score_order: ScoreOrder::ClipThenScale, ..scaled };
    assert_eq!(reward(9.0, 1, reversed), 1.0);
    let subtract = RewardShaping { missing_eos: MissingEos::Subtract(2.0), ..scaled };
    assert_eq!((reward(9.0, 1, subtract), reward(9.0, 0, subtract)), (3.0, 1.0));
    let replace = RewardShaping { missing_eos: MissingEos::Replace(-1.0), ..scaled };
    assert_eq!((reward(9.0, 1, replace), reward(f32::NAN, 0, replace)), (3.0, -1.0));
}

#[test]
fn running_moments_scale_scores_and_equal_scores_are_no_error() {
    let mut running = RunningMoments::new();
    running.update(&[2.0, 2.0, 2.0]);
    let scale = ScoreScale::from(&running);
    assert_eq!((scale.mean, scale.std), (2.0, f64::from(f32::EPSILON)));
    let shaping = RewardShaping { score_scale: Some(scale), ..Default::default() };
    let inputs = Inputs { scores: Some(&[2.0]), ..Inputs::new(&[0.0]) };
    let out = one_row(inputs, &GaeOptions { shaping, ..Default::default() });
    assert_eq!(out.rewards, [0.0]);
}

#[test]
fn a_row_without_tokens_is_zeros_and_its_score_is_dropped() {
    let values = [f32::NAN; 3];
    for placement in [ScorePlacement::LastToken, ScorePlacement::AfterLastToken] {
        let inputs = Inputs {
            scores: Some(&[5.0]),
            bootstrap: Some(&[1.0]),
            mask: Some(&[0; 3]),
            ..Inputs::new(&values)
        };
        let shaping = RewardShaping { score_placement: placement, ..Default::default() };
        let out = one_row(inputs, &GaeOptions { shaping, ..Default::default() });
        assert_eq!((out.advantages, out.returns), (vec![0.0; 3], vec![0.0; 3]));
        assert_eq!((out.rewards, out.moments), (vec![0.0; 3], Moments::default()));
    }
}

#[test]
fn empty_batches_and_empty_rows_work() {
    for device in devices_with_empty_tensors() {
        for shape in [(0, 5), (3, 0), (0, 0)] {
            let values = Tensor::zeros(shape, DType::F32, &device).unwrap();
            let scores = Tensor::zeros(shape.0, DType::F32, &device).unwrap();
            let inputs = GaeInputs { scores: Some(&scores), ..GaeInputs::new(&values) };
            let out = gae(&inputs, &GaeOptions::default()).unwrap();
            assert_eq!(out.advantages.dims(), [shape.0, shape.1]);
            assert_eq!(out.moments.to_host().unwrap(), Moments::default());
        }
    }
}

// ---- bits ----

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let mut rng = rng(3);
    let (batch, seq_len) = (67, 1500);
    let sample = Sample::new(&mut rng, batch, seq_len, Masked::Right);
    let run = || {
        let inputs = sample.inputs(false, true);
        bits(&run_cpu(inputs, batch, seq_len, &GaeOptions::default()).unwrap())
    };
    let one = with_threads(1, run);
    for threads in [2, 3, 8] {
        assert!(with_threads(threads, run) == one, "{threads} threads");
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_batch_and_behind_any_padding() {
    let mut rng = rng(4);
    let (batch, seq_len) = (7, 700);
    for options in all_options() {
        let sample = Sample::new(&mut rng, batch, seq_len, Masked::Gaps);
        let all = run_cpu(sample.inputs(false, true), batch, seq_len, &options).unwrap();
        for row in [0, 3, 6] {
            for padding in [0, 1, 600] {
                let padded = seq_len + padding;
                // With room behind it, AfterLastToken is another thing.
                let last = sample.mask[(row + 1) * seq_len - 1];
                if padding > 0 && last != 0 {
                    continue;
                }
                let at = row * seq_len..(row + 1) * seq_len;
                let f32s = |v: &[f32]| [&v[at.clone()], &vec![f32::NAN; padding]].concat();
                let bytes = |v: &[u8]| [&v[at.clone()], &vec![0; padding]].concat();
                let (values, rewards, kl) =
                    (f32s(&sample.values), f32s(&sample.rewards), f32s(&sample.kl));
                let (mask, dones) = (bytes(&sample.mask), bytes(&sample.dones));
                let inputs = Inputs {
                    values: &values,
                    rewards: Some(&rewards),
                    kl: Some(&kl),
                    scores: Some(&sample.scores[row..=row]),
                    has_eos: Some(&sample.has_eos[row..=row]),
                    mask: Some(&mask),
                    dones: Some(&dones),
                    bootstrap: Some(&sample.bootstrap[row..=row]),
                    ..Inputs::new(&values)
                };
                let alone = run_cpu(inputs, 1, padded, &options).unwrap();
                let same = |alone: &[f32], all: &[f32]| {
                    let all = all[at.clone()].iter().map(|v| v.to_bits());
                    assert!(alone[..seq_len].iter().map(|v| v.to_bits()).eq(all));
                    assert!(alone[seq_len..].iter().all(|&v| v == 0.0));
                };
                same(&alone.advantages, &all.advantages);
                same(&alone.returns, &all.returns);
                same(&alone.rewards, &all.rewards);
            }
        }
    }
}

#[test]
fn a_masked_chunk_rounds_like_a_plain_one() {
    // A gap far to the left makes the first chunk take the other path; nothing after it may change.
    let mut rng = rng(5);
    let seq_len = 400;
    let sample = Sample::new(&mut rng, 1, seq_len, Masked::Nothing);
    let mut mask = vec![1; seq_len];
    let plain = Inputs { dones: None, mask: Some(&mask), ..sample.inputs(false, false) };
    let plain = one_row(plain, &GaeOptions::default());
    mask[0] = 0;
    let branching = Inputs { dones: None, mask: Some(&mask), ..sample.inputs(false, false) };
    let branching = one_row(branching, &GaeOptions::default());
    assert_eq!(plain.advantages[1..], branching.advantages[1..]);
    assert_eq!(plain.returns[1..], branching.returns[1..]);
    assert_eq!(plain.rewards[1..], branching.rewards[1..]);
}

// ---- packs, and rows with a λ of their own ----

#[test]
fn packed_rows_have_the_bits_of_padded_ones() {
    let mut rng = rng(20);
    for options in all_options() {
        for (batch, seq_len) in [(1, 1), (9, 3), (7, 40), (5, 513), (4, 1301)] {
            for own_lambdas in [false, true] {
                let sample = Packed::new(&mut rng, batch, seq_len);
                let [padded, packed] = sample.inputs(own_lambdas);
                let tokens = sample.pack.tokens();
                let what = format!("{batch}x{seq_len} {own_lambdas} {options:?}");
                let of_padded = run_cpu(padded, batch, seq_len, &options).unwrap();
                let of_packed = run_cpu(packed, batch, tokens, &options).unwrap();
                sample.check(&what, &of_padded, &of_packed);
                check_output(&what, &of_padded, &run_reference(&padded, batch, seq_len, &options));
                check_output(&what, &of_packed, &run_reference(&packed, batch, tokens, &options));
            }
        }
    }
}

#[test]
fn a_packs_bits_do_not_depend_on_the_number_of_threads() {
    let sample = Packed::new(&mut rng(21), 90, 2048);
    let [_, packed] = sample.inputs(false);
    let run = || {
        let tokens = sample.pack.tokens();
        bits(&run_cpu(packed, 90, tokens, &GaeOptions::default()).unwrap())
    };
    let one = with_threads(1, run);
    for threads in [2, 3, 8] {
        assert!(with_threads(threads, run) == one, "{threads} threads");
    }
}

#[test]
fn reference_equals_slimes_rows_of_different_lengths() {
    let mut ran = 0;
    for case in golden("packed") {
        let slime = match case.function.rsplit('.').next().unwrap() {
            "get_advantages_and_returns_batch" => "advantages",
            "get_reinforce_plus_plus_returns" => "returns",
            _ => continue,
        };
        let mut offsets = vec![0];
        for length in case.input("lengths") {
            offsets.push(offsets[offsets.len() - 1] + length as i64);
        }
        let mut options = options(case.number("gamma"), 1.0, MaskMode::Multiply);
        let (values, rewards, kl, scores, mask);
        let inputs = if slime == "advantages" {
            options.lambda = case.number("lam");
            (values, rewards) = (case.input("values"), case.input("rewards"));
            reference::Inputs { rewards: Some(&rewards), ..reference::Inputs::new(&values) }
        } else {
            // No values, and so the returns are the advantages with λ = 1.
            options.shaping.kl_coef = case.number("kl_coef");
            (scores, kl, mask) = (case.input("scores"), case.input("kl"), case.mask("loss_mask"));
            values = vec![0.0; kl.len()];
            reference::Inputs {
                scores: Some(&scores),
                kl: Some(&kl),
                mask: Some(&mask),
                ..reference::Inputs::new(&values)
            }
        };
        let inputs = reference::Inputs { offsets: Some(&offsets), ..inputs };
        let tokens = inputs.values.len();
        check_peer(
            &case,
            &inputs,
            tokens,
            &options,
            if slime == "advantages" { slime } else { "" },
            "returns",
        );
        ran += 1;
    }
    assert_eq!(ran, 4);
}

#[test]
fn tensors_may_be_packed() {
    for device in devices() {
        let sample = Packed::new(&mut rng(22), 6, 50);
        let [_, packed] = sample.inputs(true);
        let tokens = sample.pack.tokens();
        let want = run_reference(&packed, 6, tokens, &GaeOptions::default());
        let f32s = |x: &[f32]| Tensor::from_slice(x, x.len(), &device).unwrap();
        let bytes = |x: &[u8]| Tensor::from_slice(x, x.len(), &device).unwrap();
        let (values, rewards) = (f32s(&sample.packed.values), f32s(&sample.packed.rewards));
        let (kl, scores) = (f32s(&sample.packed.kl), f32s(&sample.packed.scores));
        let (mask, dones) = (bytes(&sample.packed.mask), bytes(&sample.packed.dones));
        let (has_eos, bootstrap) = (bytes(&sample.packed.has_eos), f32s(&sample.packed.bootstrap));
        let offsets = Tensor::from_slice(&sample.pack.offsets, 7, &device).unwrap();
        let inputs = GaeInputs {
            values: &values,
            rewards: Some(&rewards),
            kl: Some(&kl),
            scores: Some(&scores),
            has_eos: Some(&has_eos),
            mask: Some(&mask),
            dones: Some(&dones),
            bootstrap: Some(&bootstrap),
            offsets: Some(&offsets),
            lambda_per_row: Some(&f32s(&sample.lambda_per_row)),
        };
        let out = gae(&inputs, &GaeOptions::default()).unwrap();
        assert_eq!(out.returns.dims(), [tokens]);
        let got = Output {
            advantages: out.advantages.to_vec1().unwrap(),
            returns: out.returns.to_vec1().unwrap(),
            rewards: out.rewards.to_vec1().unwrap(),
            moments: out.moments.to_host().unwrap(),
        };
        check_output(&format!("{device:?}"), &got, &want);

        let refused = |offsets: &Tensor, values: &Tensor, words: &[&str]| {
            let inputs = GaeInputs { offsets: Some(offsets), ..GaeInputs::new(values) };
            says(gae(&inputs, &GaeOptions::default()), words);
        };
        let square = Tensor::zeros((2, 3), DType::F32, &device).unwrap();
        refused(&offsets, &square, &["`values`", "[2, 3]", "[N]"]);
        refused(&square, &values, &["`offsets`", "[2, 3]", "[B + 1]"]);
        refused(&f32s(&[0.0, 1.0]), &values, &["`offsets`", "f32", "i64"]);
    }
}

#[test]
fn a_rows_own_lambda_is_that_of_the_options() {
    let (mut rng, batch, seq_len) = (rng(23), 5, 700);
    for options in all_options() {
        let sample = Sample::new(&mut rng, batch, seq_len, Masked::Gaps);
        // One that f32 has too.
        let options = GaeOptions { lambda: 0.75, ..options };
        let inputs = sample.inputs(false, true);
        let want = run_cpu(inputs, batch, seq_len, &options).unwrap();
        let inputs = Inputs { lambda_per_row: Some(&[0.75; 5]), ..inputs };
        let got = run_cpu(inputs, batch, seq_len, &GaeOptions { lambda: 0.1, ..options }).unwrap();
        assert_eq!(bits(&got), bits(&want));
    }
}

#[test]
fn offsets_and_lambdas_that_are_none_are_refused() {
    let (values, options) = ([0.0; 6], GaeOptions::default());
    let packed = |offsets: &[i64], batch| {
        let inputs = Inputs { offsets: Some(offsets), ..Inputs::new(&values) };
        run_cpu(inputs, batch, 6, &options)
    };
    packed(&[0, 6, 6], 2).unwrap();
    for (offsets, words) in BAD_OFFSETS {
        says(packed(&offsets, 2), &words);
    }
    says(packed(&[0, 6], 2), &["`offsets`", "[2]", "[3]"]);
    says(packed(&[], 0), &["`offsets`", "[0]", "[1]"]);
    says(packed(&[0], usize::MAX), &["`offsets`"]);
    for bad in [-0.1, 1.5, f32::NAN] {
        let inputs = Inputs { lambda_per_row: Some(&[1.0, bad]), ..Inputs::new(&values) };
        says(run_cpu(inputs, 2, 3, &options), &["`lambda_per_row`", "0 to 1", "for row 1"]);
    }
    let inputs = Inputs { lambda_per_row: Some(&[1.0]), ..Inputs::new(&values) };
    says(run_cpu(inputs, 2, 3, &options), &["`lambda_per_row`", "[1]", "[2]"]);
}

// ---- errors ----

#[track_caller]
fn says<T: std::fmt::Debug>(result: Result<T>, words: &[&str]) {
    let text = result.unwrap_err().to_string();
    assert!(text.starts_with("gae: "), "{text}");
    assert!(words.iter().all(|word| text.contains(word)), "{text}");
}

#[test]
fn errors_name_the_argument_of_the_wrong_length() {
    let (values, short) = ([0.0; 6], [0.0; 1]);
    let flags = [1; 1];
    let base = Inputs::new(&values);
    let run = |inputs| run_cpu(inputs, 2, 3, &GaeOptions::default());
    says(run(Inputs::new(&short)), &["`values`", "[1]", "[6]"]);
    says(run(Inputs { rewards: Some(&short), ..base }), &["`rewards`", "[1]", "[6]"]);
    says(run(Inputs { kl: Some(&short), ..base }), &["`kl`", "[1]", "[6]"]);
    says(run(Inputs { scores: Some(&short), ..base }), &["`scores`", "[1]", "[2]"]);
    says(run(Inputs { has_eos: Some(&flags), ..base }), &["`has_eos`", "[1]", "[2]"]);
    says(run(Inputs { mask: Some(&flags), ..base }), &["`mask`", "[1]", "[6]"]);
    says(run(Inputs { dones: Some(&flags), ..base }), &["`dones`", "[1]", "[6]"]);
    says(run(Inputs { bootstrap: Some(&short), ..base }), &["`bootstrap`", "[1]", "[2]"]);

    let sizes = |advantages: usize, returns: usize, rewards: usize| {
        let (mut a, mut r, mut s) = (vec![0.0; advantages], vec![0.0; returns], vec![0.0; rewards]);
        let outputs = Outputs {
            advantages: &mut a,
            returns: &mut r,
            shaped_rewards: Some(&mut s),
            moments: None,
        };
        cpu::gae(base, 2, 3, &GaeOptions::default(), outputs)
    };
    says(sizes(5, 6, 6), &["`advantages`", "[5]", "[6]"]);
    says(sizes(6, 5, 6), &["`returns`", "[5]", "[6]"]);
    says(sizes(6, 6, 5), &["`shaped_rewards`", "[5]", "[6]"]);
    says(run_huge(2), &["`values`"]);
    assert_eq!(run_huge(0).unwrap(), Moments::default());
}

/// A size that does not fit in memory is an error, not an overflow; of rows of nothing it does.
fn run_huge(seq_len: usize) -> Result<Moments> {
    let mut moments = [Moments::default()];
    let (advantages, returns) = (&mut [][..], &mut [][..]);
    let outputs =
        Outputs { advantages, returns, shaped_rewards: None, moments: Some(&mut moments) };
    cpu::gae(Inputs::new(&[]), usize::MAX, seq_len, &GaeOptions::default(), outputs)?;
    Ok(moments[0])
}

#[test]
fn errors_name_the_option_out_of_range() {
    let run = |options: GaeOptions| one_row_of(&options);
    let default = GaeOptions::default();
    for bad in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
        says(run(GaeOptions { gamma: bad, ..default }), &["`gamma`"]);
        says(run(GaeOptions { lambda: bad, ..default }), &["`lambda`"]);
        says(run(GaeOptions { value_lambda: Some(bad), ..default }), &["`value_lambda`"]);
    }
    let shaped = |shaping| one_row_of(&GaeOptions { shaping, ..default });
    let default = RewardShaping::default();
    let scaled =
        |mean, std| RewardShaping { score_scale: Some(ScoreScale { mean, std }), ..default };
    says(shaped(RewardShaping { kl_coef: -0.1, ..default }), &["`kl_coef`"]);
    says(shaped(RewardShaping { kl_coef: f64::NAN, ..default }), &["`kl_coef`"]);
    says(shaped(RewardShaping { kl_coef: 1e300, ..default }), &["`kl_coef` is 1e300", "f32"]);
    let bounds = |score_min, score_max| RewardShaping { score_min, score_max, ..default };
    says(shaped(bounds(f64::NAN, 1.0)), &["`score_min`"]);
    says(shaped(bounds(f64::INFINITY, f64::INFINITY)), &["`score_min`"]);
    says(shaped(bounds(-1.0, f64::NAN)), &["`score_max`"]);
    says(shaped(bounds(2.0, 1.0)), &["`score_max` is 1.0", "`score_min`, 2.0 or above"]);
    says(shaped(scaled(0.0, 0.0)), &["`score_std`"]);
    says(shaped(scaled(f64::NAN, 1.0)), &["`score_mean`"]);
    for bad in [MissingEos::Subtract(f64::NAN), MissingEos::Replace(f64::INFINITY)] {
        says(
            shaped(RewardShaping { missing_eos: bad, ..default }),
            &["`missing_eos_value`", "finite"],
        );
    }
    // Nothing to work on.
    let penalty = RewardShaping { missing_eos: MissingEos::Subtract(1.0), ..default };
    says(shaped(penalty), &["`missing_eos`", "`has_eos`", "Subtract(1.0)"]);
}

fn one_row_of(options: &GaeOptions) -> Result<Output> {
    run_cpu(Inputs { scores: Some(&[1.0]), ..Inputs::new(&[0.0, 1.0]) }, 1, 2, options)
}

#[test]
fn errors_name_the_tensor_that_does_not_fit() {
    let device = &Device::Cpu;
    let f32s = |shape: &[usize]| Tensor::zeros(shape, DType::F32, device).unwrap();
    let bytes = |shape: &[usize]| Tensor::zeros(shape, DType::U8, device).unwrap();
    let run = |inputs: GaeInputs| gae(&inputs, &GaeOptions::default());
    let values = f32s(&[2, 3]);
    let base = GaeInputs::new(&values);
    says(run(GaeInputs::new(&f32s(&[6]))), &["`values`", "[6]", "[B, T]"]);
    let double = values.to_dtype(DType::F64).unwrap();
    says(run(GaeInputs::new(&double)), &["`values`", "f64", "f32"]);
    let wrong = f32s(&[3, 2]);
    says(run(GaeInputs { rewards: Some(&wrong), ..base }), &["`rewards`", "[3, 2]", "[2, 3]"]);
    says(run(GaeInputs { kl: Some(&wrong), ..base }), &["`kl`", "[3, 2]", "[2, 3]"]);
    says(run(GaeInputs { scores: Some(&wrong), ..base }), &["`scores`", "[3, 2]", "[2]"]);
    says(run(GaeInputs { bootstrap: Some(&wrong), ..base }), &["`bootstrap`", "[3, 2]", "[2]"]);
    says(run(GaeInputs { mask: Some(&values), ..base }), &["`mask`", "f32", "u8"]);
    says(run(GaeInputs { dones: Some(&values), ..base }), &["`dones`", "f32", "u8"]);
    let wrong = bytes(&[3]);
    says(run(GaeInputs { has_eos: Some(&wrong), ..base }), &["`has_eos`", "[3]", "[2]"]);
    let error = run(GaeInputs { mask: Some(&wrong), ..base }).unwrap_err();
    assert!(matches!(error, Error::Shape { op: "gae", arg: "mask", .. }));
}
