//! The PPO loss: the reference against other projects' losses, the CPU and the tensor layer against
//! the reference, and what must hold for any input.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::*;
use ppo_kernels::kl::reference::token_kl;
use ppo_kernels::kl::{KlEstimator, KlOptions};
use ppo_kernels::ppo_loss::cpu::{self, Gradients};
use ppo_kernels::ppo_loss::{
    ppo_loss, reference, Aggregation, ClipFractionKind, Inputs, PpoLossInputs, PpoLossOptions,
    PpoLossValueInputs, PpoStats, ValueInputs,
};
use ppo_kernels::Error;
use rand::rngs::StdRng;
use serde_json::Value;

/// The peers' arithmetic is f64 like the reference's: relative, absolute.
const EXACT: (f64, f64) = (1e-9, 1e-10);

/// The peer adds 1e-8 to a divisor of 1 or more, once or twice.
const EPSILON: (f64, f64) = (2.1e-8, 1e-10);

/// The peer rounds this number to f32.
const SINGLE: (f64, f64) = (1e-7, 0.0);

/// f32 against f64: exp to 2 ulp, a product of a few factors.
const REL: f64 = 2e-6;

/// The same for sums of terms that cancel, as a share of the largest of them.
const ABS: f64 = 1e-6;

/// Inputs that own what [`Inputs`] borrows.
#[derive(Clone, Default)]
struct Data<T> {
    batch: usize,
    seq_len: usize,
    logp: Vec<T>,
    old_logp: Vec<T>,
    advantages: Vec<T>,
    values: Option<Vec<T>>,
    old_values: Option<Vec<T>>,
    returns: Option<Vec<T>>,
    entropy: Option<Vec<T>>,
    ref_logp: Option<Vec<T>>,
    mask: Option<Vec<u8>>,
}

impl<T: Copy> Data<T> {
    fn inputs(&self) -> Inputs<'_, T> {
        let values = self.values.as_deref().zip(self.returns.as_deref());
        Inputs {
            batch: self.batch,
            seq_len: self.seq_len,
            logp: &self.logp,
            old_logp: &self.old_logp,
            advantages: &self.advantages,
            value: values.map(|(values, returns)| ValueInputs {
                values,
                old_values: self.old_values.as_deref(),
                returns,
            }),
            entropy: self.entropy.as_deref(),
            ref_logp: self.ref_logp.as_deref(),
            mask: self.mask.as_deref(),
        }
    }

    fn map<U>(&self, f: impl Fn(T) -> U) -> Data<U> {
        let all = |x: &Vec<T>| x.iter().map(|&x| f(x)).collect();
        Data {
            batch: self.batch,
            seq_len: self.seq_len,
            logp: all(&self.logp),
            old_logp: all(&self.old_logp),
            advantages: all(&self.advantages),
            values: self.values.as_ref().map(all),
            old_values: self.old_values.as_ref().map(all),
            returns: self.returns.as_ref().map(all),
            entropy: self.entropy.as_ref().map(all),
            ref_logp: self.ref_logp.as_ref().map(all),
            mask: self.mask.clone(),
        }
    }
}

/// A rollout with everything given, on the scale of real ones, all tokens unmasked.
fn rollout(rng: &mut StdRng, batch: usize, seq_len: usize) -> Data<f32> {
    let n = batch * seq_len;
    let mut near = |x: &[f32], scale| -> Vec<f32> {
        x.iter().zip(uniform(rng, n, scale)).map(|(x, noise)| x + noise).collect()
    };
    let logp = near(&vec![-2.0; n], 1.9);
    let values = near(&vec![0.5; n], 1.0);
    Data {
        batch,
        seq_len,
        old_logp: near(&logp, 0.6),
        ref_logp: Some(near(&logp, 0.9)),
        advantages: near(&vec![0.1; n], 1.5),
        old_values: Some(near(&values, 0.4)),
        returns: Some(near(&values, 0.7)),
        entropy: Some(near(&vec![1.5; n], 1.4)),
        logp,
        values: Some(values),
        mask: None,
    }
}

fn run(data: &Data<f64>, options: &PpoLossOptions) -> reference::Output {
    reference::ppo_loss(&data.inputs(), options).unwrap()
}

/// Stats and gradients of the raw layer; empty gradients for what is not given.
fn run_cpu(data: &Data<f32>, options: &PpoLossOptions) -> (PpoStats, [Vec<f32>; 3]) {
    let n = data.logp.len();
    // Filled with NaN, to see that every element is written.
    let room = |given: bool| vec![f32::NAN; if given { n } else { 0 }];
    let mut grads = [room(true), room(data.values.is_some()), room(data.entropy.is_some())];
    let [logp, values, entropy] = grads.each_mut().map(|g| Some(g.as_mut_slice()));
    let stats = cpu::ppo_loss(&data.inputs(), options, Gradients { logp, values, entropy });
    (stats.unwrap(), grads)
}

// ---- other projects' vectors ----

/// Everything off that not every project has: no clamp, no value clip, no coefficients.
fn plain() -> PpoLossOptions {
    PpoLossOptions {
        log_ratio_clamp: None,
        value_clip_range: None,
        value_coef: 1.0,
        ..Default::default()
    }
}

/// A policy-only batch of a case, by the names of its inputs.
fn policy_data(case: &Golden, logp: &str, old: &str, mask: Option<&str>) -> Data<f64> {
    let shape = case.shape(logp);
    // CleanRL's batches are flat.
    let (batch, seq_len) = if shape.len() == 1 { (1, shape[0]) } else { (shape[0], shape[1]) };
    Data {
        batch,
        seq_len,
        logp: case.input(logp),
        old_logp: case.input(old),
        advantages: case.input("advantages"),
        mask: mask.map(|key| case.mask(key)),
        ..Default::default()
    }
}

/// A batch for the value term alone: ratio 1 and advantage 0 make the policy term 0.
fn value_data(case: &Golden, values: &str, old: &str, mask: Option<&str>) -> Data<f64> {
    let shape = case.shape(values);
    let zeros = vec![0.0; shape[0] * shape[1]];
    Data {
        batch: shape[0],
        seq_len: shape[1],
        logp: zeros.clone(),
        old_logp: zeros.clone(),
        advantages: zeros,
        values: Some(case.input(values)),
        old_values: Some(case.input(old)),
        returns: Some(case.input("returns")),
        mask: mask.map(|key| case.mask(key)),
        ..Default::default()
    }
}

/// A number in a case's nested settings; `None` if it or the settings are missing.
fn setting(case: &Golden, group: &str, key: &str) -> Option<f64> {
    case.inputs.get(group)?.get(key)?.as_f64()
}

/// verl's aggregation by name, with the sizes of the whole batch if given.
fn verl_aggregation(mode: &str, size: impl Fn(&str) -> Option<f64>) -> PpoLossOptions {
    let per_rank = |key| size(key).map(|whole: f64| whole / size("dp_size").unwrap_or(1.0));
    let (aggregation, denominator) = match mode {
        "token-mean" => (Aggregation::TokenMean, per_rank("batch_num_tokens")),
        "seq-mean-token-sum" => (Aggregation::SeqMeanTokenSum, per_rank("global_batch_size")),
        "seq-mean-token-mean" => (Aggregation::SeqMeanTokenMean, per_rank("global_batch_size")),
        "seq-mean-token-sum-norm" => (Aggregation::SeqMeanTokenSumNorm, size("loss_scale_factor")),
        other => panic!("{other}"),
    };
    PpoLossOptions { aggregation, denominator, ..plain() }
}

/// OpenRLHF's: by token, or by sequence.
fn openrlhf_aggregation(case: &Golden, by_token: bool) -> PpoLossOptions {
    let mode = if by_token { "token-mean" } else { "seq-mean-token-mean" };
    verl_aggregation(mode, |key| case.optional(key))
}

/// verl, OpenRLHF and ours divide a row by its length; theirs adds 1e-8 to it.
fn tolerance_of(aggregation: Aggregation) -> (f64, f64) {
    if aggregation == Aggregation::SeqMeanTokenMean {
        EPSILON
    } else {
        EXACT
    }
}

fn is_true(case: &Golden, key: &str) -> bool {
    case.inputs[key].as_bool().unwrap()
}

/// Asserts that ours is the case's output of that name.
#[track_caller]
fn expect(case: &Golden, key: &str, ours: &[f64], (rel, abs): (f64, f64)) {
    assert_close(&format!("{} {key}", case.id), ours, &case.output(key), rel, abs);
}

/// The gradient of an output whose upstream gradient is in `grad_out`.
#[track_caller]
fn expect_grad(case: &Golden, key: &str, ours: &[f64], tolerance: (f64, f64)) {
    let upstream = case.optional("grad_out").unwrap_or(1.0);
    let scaled: Vec<f64> = ours.iter().map(|g| g * upstream).collect();
    expect(case, key, &scaled, tolerance);
}

/// Asserts that ours is an entry of a case's nested output.
#[track_caller]
fn expect_stat(case: &Golden, group: &str, key: &str, ours: f64, (rel, abs): (f64, f64)) {
    let want = flatten(&case.outputs[group][key]);
    assert_close(&format!("{} {group} {key}", case.id), &[ours], &want, rel, abs);
}

#[test]
fn aggregation_equals_verl_and_openrlhf() {
    let mut ran = 0;
    for case in golden("masked_stats") {
        let (key, mask, options) = match case.function.rsplit('.').next().unwrap() {
            "agg_loss" => {
                let options =
                    verl_aggregation(case.text("loss_agg_mode"), |key| case.optional(key));
                ("loss_mat", "loss_mask", options)
            }
            "aggregate_loss" => {
                let options = openrlhf_aggregation(&case, is_true(&case, "token_level_loss"));
                ("loss", "loss_mask", options)
            }
            // Masked means and whitening: other ops.
            _ => continue,
        };
        let (terms, shape) = (case.input(key), case.shape(key));
        let mask = case.mask(mask);
        let weights = reference::weights(Some(&mask), shape[0], shape[1], &options).unwrap();
        let tolerance = tolerance_of(options.aggregation);
        expect(&case, "loss", &[dot(&weights, &terms)], tolerance);
        expect_grad(&case, &format!("grad_{key}"), &weights, tolerance);
        ran += 1;
    }
    assert_eq!(ran, 48);
}

#[test]
fn reference_equals_verl_policy_losses() {
    let (mut ran, mut skipped) = (0, 0);
    for case in golden("policy_loss_verl") {
        let function = case.function.rsplit('.').next().unwrap();
        let prefix = match function {
            "compute_policy_loss_vanilla" => "clip_ratio",
            "compute_policy_loss" => "cliprange",
            // Other objectives than the clipped surrogate: gspo, sapo, cispo, geo_mean, gpg,
            // clip_cov, kl_cov, reinforce.
            _ => {
                skipped += 1;
                continue;
            }
        };
        // Importance weights for the rollout engine's log-probabilities are no part of this loss.
        if case.inputs.contains_key("rollout_is_weights") {
            skipped += 1;
            continue;
        }
        let data = policy_data(&case, "log_prob", "old_log_prob", Some("response_mask"));
        let both = case.number(prefix);
        let size = |key: &str| setting(&case, "global_batch_info", key);
        let options = PpoLossOptions {
            clip_range: case.optional(&format!("{prefix}_low")).unwrap_or(both),
            clip_range_high: Some(case.optional(&format!("{prefix}_high")).unwrap_or(both)),
            dual_clip: Some(case.optional("clip_ratio_c").unwrap_or(3.0)),
            log_ratio_clamp: Some(20.0),
            ..verl_aggregation(case.text("loss_agg_mode"), size)
        };
        let ours = run(&data, &options);
        let tolerance = tolerance_of(options.aggregation);
        expect(&case, "loss", &[ours.stats.loss], tolerance);
        expect_grad(&case, "grad_log_prob", &ours.grad_logp, tolerance);
        expect(&case, "pg_clipfrac", &[ours.stats.clip_fraction], EPSILON);
        expect(&case, "pg_clipfrac_lower", &[ours.stats.lower_clip_fraction], EPSILON);
        expect(&case, "ppo_kl", &[ours.stats.approx_kl_k1], EPSILON);
        ran += 1;
    }
    assert_eq!((ran, skipped), (20, 33));
}

#[test]
fn reference_equals_openrlhf_policy_losses() {
    let (mut ran, mut skipped) = (0, 0);
    for case in golden("policy_loss_others").iter().filter(|case| case.peer == "openrlhf") {
        let settings = &case.inputs.get("options");
        let sequence_ratio = settings.is_some_and(|s| s.get("policy_loss_type").is_some());
        // Importance weights for vLLM's log-probabilities; GSPO.
        if case.function.contains("vLLM") || sequence_ratio {
            skipped += 1;
            continue;
        }
        let data = policy_data(case, "log_probs", "old_log_probs", Some("action_mask"));
        let by_token =
            settings.and_then(|s| s.get("token_level_loss")) != Some(&Value::Bool(false));
        let options = PpoLossOptions {
            clip_range_high: setting(case, "options", "clip_eps_high"),
            dual_clip: setting(case, "options", "dual_clip"),
            log_ratio_clamp: Some(20.0),
            ..openrlhf_aggregation(case, by_token)
        };
        let ours = run(&data, &options);
        let tolerance = tolerance_of(options.aggregation);
        expect(case, "loss", &[ours.stats.loss], tolerance);
        expect_grad(case, "grad_log_probs", &ours.grad_logp, tolerance);
        expect(case, "clip_ratio", &[ours.stats.clip_fraction], EXACT);
        // OpenRLHF clamps for the loss, but not for this number.
        let unclamped = PpoLossOptions { log_ratio_clamp: None, ..options };
        expect(case, "ppo_kl", &[run(&data, &unclamped).stats.approx_kl_k1], EXACT);
        ran += 1;
    }
    assert_eq!((ran, skipped), (11, 7));
}

#[test]
fn reference_equals_trl_losses() {
    let (mut ran, mut skipped) = (0, 0);
    for case in golden("policy_loss_others").iter().filter(|case| case.peer == "trl-v0.11.4") {
        // There TRL drops the batch; the caller can, by `ratio_mean`.
        if case.function.contains("ratio_threshold exceeded") {
            skipped += 1;
            continue;
        }
        let mut data = policy_data(case, "logprobs", "old_logprobs", Some("mask"));
        data.values = Some(case.input("vpreds"));
        data.old_values = Some(case.input("values"));
        data.returns = Some(case.input("returns"));
        let coef = case.number("vf_coef");
        let options = PpoLossOptions {
            clip_range: case.number("cliprange"),
            value_clip_range: case.optional("cliprange_value"),
            value_coef: coef,
            ..plain()
        };
        let ours = run(&data, &options);
        let stats = ours.stats;
        expect(case, "pg_loss", &[stats.policy_loss], EXACT);
        expect(case, "vf_loss_times_coef", &[coef * stats.value_loss], EXACT);
        expect(case, "grad_logprobs", &ours.grad_logp, EXACT);
        expect(case, "grad_vpreds", &ours.grad_values, EXACT);
        for (key, ours) in [
            ("loss/total", stats.loss),
            ("loss/policy", stats.policy_loss),
            ("loss/value", stats.value_loss),
            ("policy/approxkl", stats.approx_kl_k2),
            ("policy/policykl", stats.approx_kl_k1),
            ("policy/clipfrac", stats.clip_fraction),
            ("policy/advantages_mean", stats.advantage_mean),
            ("returns/mean", stats.return_mean),
            ("val/vpred", stats.value_mean),
            ("val/clipfrac", stats.value_clip_fraction),
        ] {
            expect_stat(case, "stats", key, ours, EXACT);
        }
        ran += 1;
    }
    for case in golden("policy_loss_others").iter().filter(|case| case.peer == "trl") {
        // The value mean reaches one token further than the policy mean: two masks, two calls.
        let lengths = case.input("sequence_lengths");
        let shape = case.shape("new_logprobs");
        let mask = |extra: f64| -> Vec<u8> {
            let row = |&len: &f64| (0..shape[1]).map(move |t| u8::from(t as f64 <= len + extra));
            lengths.iter().flat_map(row).collect()
        };
        let options = PpoLossOptions {
            clip_range: case.number("cliprange"),
            value_clip_range: case.optional("cliprange_value"),
            value_coef: case.number("vf_coef"),
            ..plain()
        };
        let mut data = policy_data(case, "new_logprobs", "old_logprobs", None);
        data.mask = Some(mask(0.0));
        let policy = run(&data, &options);
        let mut data = value_data(case, "vpred", "values", None);
        data.mask = Some(mask(1.0));
        let value = run(&data, &options);
        expect(case, "pg_loss", &[policy.stats.policy_loss], EXACT);
        expect(case, "vf_loss", &[value.stats.value_loss], EXACT);
        expect(case, "vf_clipfrac", &[value.stats.value_clip_fraction], SINGLE);
        expect(case, "loss", &[policy.stats.loss + value.stats.loss], EXACT);
        expect(case, "grad_new_logprobs", &policy.grad_logp, EXACT);
        expect(case, "grad_vpred", &value.grad_values, EXACT);
        ran += 1;
    }
    assert_eq!((ran, skipped), (4, 1));
}

#[test]
fn reference_equals_cleanrl_losses() {
    let mut ran = 0;
    for case in golden("policy_loss_others").iter().filter(|case| case.peer == "cleanrl") {
        let data = Data {
            batch: 1,
            seq_len: case.shape("newlogprob")[0],
            logp: case.input("newlogprob"),
            old_logp: case.input("b_logprobs"),
            // Whitened before the loss.
            advantages: case.output("mb_advantages"),
            values: Some(case.input("newvalue")),
            old_values: Some(case.input("b_values")),
            returns: Some(case.input("b_returns")),
            entropy: Some(case.input("entropy")),
            ..Default::default()
        };
        let clip = case.number("clip_coef");
        let options = PpoLossOptions {
            clip_range: clip,
            value_clip_range: is_true(case, "clip_vloss").then_some(clip),
            value_coef: case.number("vf_coef"),
            entropy_coef: case.number("ent_coef"),
            clip_fraction: ClipFractionKind::RatioOutside,
            ..plain()
        };
        let ours = run(&data, &options);
        for (key, ours) in [
            ("loss", ours.stats.loss),
            ("pg_loss", ours.stats.policy_loss),
            ("v_loss", ours.stats.value_loss),
            ("entropy_loss", ours.stats.entropy_mean),
            ("old_approx_kl", ours.stats.approx_kl_k1),
            ("approx_kl", ours.stats.approx_kl_k3),
        ] {
            expect(case, key, &[ours], EXACT);
        }
        expect(case, "clipfrac", &[ours.stats.clip_fraction], SINGLE);
        expect(case, "grad_newlogprob", &ours.grad_logp, EXACT);
        expect(case, "grad_newvalue", &ours.grad_values, EXACT);
        expect(case, "grad_entropy", &ours.grad_entropy, EXACT);
        ran += 1;
    }
    assert_eq!(ran, 3);
}

#[test]
fn reference_equals_deepspeed_chat_and_trlx_losses() {
    let mut ran = 0;
    for case in golden("policy_loss_others") {
        let mut data = match case.peer.as_str() {
            "deepspeed-chat" | "trlx" => {
                policy_data(&case, "logprobs", "old_logprobs", Some("mask"))
            }
            _ => continue,
        };
        let mut options = PpoLossOptions { clip_range: case.number("cliprange"), ..plain() };
        if case.peer == "trlx" {
            data.values = Some(case.input("values"));
            data.old_values = Some(case.input("old_values"));
            data.returns = Some(case.input("returns"));
            options.value_clip_range = case.optional("cliprange_value");
            options.value_coef = case.number("vf_coef");
        }
        let ours = run(&data, &options);
        expect(&case, "loss", &[ours.stats.loss], EXACT);
        expect_grad(&case, "grad_logprobs", &ours.grad_logp, EXACT);
        if case.peer == "trlx" {
            expect_grad(&case, "grad_values", &ours.grad_values, EXACT);
            // trlx divides by all positions, padding included.
            let kept_share = ours.stats.tokens / data.logp.len() as f64;
            for (key, ours) in [
                ("losses/policy_loss", ours.stats.policy_loss),
                ("losses/value_loss", ours.stats.value_loss),
                ("values/mean", ours.stats.value_mean),
                ("values/clipfrac", ours.stats.value_clip_fraction),
                ("returns/mean", ours.stats.return_mean),
                ("policy/clipfrac", ours.stats.clip_fraction),
                ("policy/approx_kl", ours.stats.approx_kl_k3 * kept_share),
                ("ratio", ours.stats.ratio_mean),
            ] {
                expect_stat(&case, "stats", key, ours, EXACT);
            }
        }
        ran += 1;
    }
    assert_eq!(ran, 4);
}

#[test]
fn reference_equals_nemo_policy_losses() {
    let (mut ran, mut skipped) = (0, 0);
    for case in golden("policy_loss_others").iter().filter(|case| case.peer == "nemo-rl") {
        let settings = case.inputs["options"].as_object().unwrap();
        // GSPO, CISPO, REINFORCE, importance weights for the rollout engine's log-probabilities.
        let other = [
            "sequence_level_importance_ratios",
            "use_cispo",
            "disable_ppo_ratio",
            "use_importance_sampling_correction",
            "use_on_policy_kl_approximation",
        ];
        if other.iter().any(|key| settings.contains_key(*key)) {
            skipped += 1;
            continue;
        }
        // [B, S] tensors start one position before the log-probabilities.
        let [batch, seq_len] = case.shape("next_token_logprobs")[..] else { panic!() };
        let after_first = |key: &str| -> Vec<f64> {
            case.input(key).chunks(seq_len + 1).flat_map(|row| row[1..].to_vec()).collect()
        };
        let samples = case.input("sample_mask");
        let mask = after_first("token_mask").into_iter().enumerate();
        let mask = mask.map(|(t, m)| u8::from(m * samples[t / seq_len] != 0.0)).collect();
        let logp = case.input("next_token_logprobs");
        let on_policy = settings.contains_key("force_on_policy_ratio");
        let data = Data {
            batch,
            seq_len,
            old_logp: if on_policy { logp.clone() } else { after_first("prev_logprobs") },
            logp,
            advantages: after_first("advantages"),
            ref_logp: Some(after_first("reference_policy_logprobs")),
            mask: Some(mask),
            ..Default::default()
        };
        let number = |key| setting(case, "options", key);
        let by_token = settings.get("token_level_loss") != Some(&Value::Bool(false));
        let (aggregation, denominator) = match by_token {
            true => (Aggregation::TokenMean, "global_valid_toks"),
            false => (Aggregation::SeqMeanTokenMean, "global_valid_seqs"),
        };
        let estimator = match settings.get("reference_policy_kl_type").and_then(Value::as_str) {
            None => KlEstimator::K3,
            Some("k2") => KlEstimator::K2,
            Some(other) => panic!("{other}"),
        };
        let kl_coef = number("reference_policy_kl_penalty").unwrap_or(0.01);
        let options = PpoLossOptions {
            clip_range_high: number("ratio_clip_max"),
            dual_clip: number("ratio_clip_c"),
            kl_coef,
            kl: KlOptions { estimator, log_ratio_clamp: Some(20.0), output_clamp: Some(10.0) },
            aggregation,
            denominator: Some(case.number(denominator)),
            ..plain()
        };
        let ours = run(&data, &options);
        expect(case, "loss", &[ours.stats.loss], EPSILON);
        // NeMo-RL weights the KL with e^(logp - detached logp), which is 1 but has a gradient, the
        // score function's: the KL itself.
        let kl = token_kl(&data.logp, data.ref_logp.as_ref().unwrap(), None, &options.kl);
        let weights = reference::weights(data.mask.as_deref(), batch, seq_len, &options).unwrap();
        let with_score: Vec<f64> =
            (0..kl.len()).map(|t| ours.grad_logp[t] + weights[t] * kl_coef * kl[t]).collect();
        expect_grad(case, "grad_next_token_logprobs", &with_score, EPSILON);
        expect_stat(case, "metrics", "probs_ratio", ours.stats.ratio_mean, EPSILON);
        expect_stat(case, "metrics", "probs_ratio_min", ours.stats.ratio_min, EXACT);
        expect_stat(case, "metrics", "probs_ratio_max", ours.stats.ratio_max, EXACT);
        if by_token && kl_coef != 0.0 {
            expect_stat(case, "metrics", "kl_penalty", ours.stats.kl_mean, EPSILON);
        }
        ran += 1;
    }
    assert_eq!((ran, skipped), (6, 8));
}

#[test]
fn reference_equals_the_peers_value_losses() {
    let mut ran = 0;
    for case in golden("value_loss") {
        let (names, range, mut options, clip_fraction) = match case.peer.as_str() {
            "verl" => {
                let options = verl_aggregation(case.text("loss_agg_mode"), |_| None);
                (["vpreds", "values", "response_mask"], "cliprange_value", options, true)
            }
            "openrlhf" => {
                let options = openrlhf_aggregation(&case, is_true(&case, "token_level_loss"));
                (["values", "old_values", "action_mask"], "clip_eps", options, false)
            }
            "deepspeed-chat" => {
                (["values", "old_values", "mask"], "cliprange_value", plain(), false)
            }
            "nemo-rl" => {
                let denominator = case.optional("global_valid_toks");
                let options = PpoLossOptions { denominator, ..plain() };
                (["values_pred", "values", "token_mask"], "cliprange", options, false)
            }
            other => panic!("{other}"),
        };
        options.value_clip_range = case.optional(range);
        let data = value_data(&case, names[0], names[1], Some(names[2]));
        let ours = run(&data, &options);
        let nemo = case.peer == "nemo-rl";
        let tolerance = if nemo { EPSILON } else { tolerance_of(options.aggregation) };
        expect(&case, "loss", &[ours.stats.loss], tolerance);
        expect_grad(&case, &format!("grad_{}", names[0]), &ours.grad_values, tolerance);
        if clip_fraction {
            expect(&case, "vf_clipfrac", &[ours.stats.value_clip_fraction], EPSILON);
        }
        if nemo {
            let clipped = ours.stats.value_clip_fraction;
            expect_stat(&case, "metrics", "vf_clipfrac", clipped, EPSILON);
            expect_stat(&case, "metrics", "returns_mean", ours.stats.return_mean, EPSILON);
        }
        ran += 1;
    }
    assert_eq!(ran, 39);
}
