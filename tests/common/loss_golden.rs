//! What tests against other projects' losses share: batches and options from golden cases.

use ppo_kernels::kl::reference::token_kl;
use ppo_kernels::kl::{KlEstimator, KlOptions};
use ppo_kernels::ppo_loss::{
    reference, Aggregation, KlRatio, PpoLossOptions, RatioLevel, Surrogate,
};
use serde_json::Value;

use super::ppo_loss_cases::{run, Data};
use super::{assert_close, flatten, Golden};

/// The peers' arithmetic is f64 like the reference's: relative, absolute.
pub const EXACT: (f64, f64) = (1e-9, 1e-10);

/// The peer adds 1e-8 to a divisor of 1 or more, once or twice.
pub const EPSILON: (f64, f64) = (2.1e-8, 1e-10);

/// The peer rounds this number to f32.
pub const SINGLE: (f64, f64) = (1e-7, 0.0);

/// Everything off that not every project has: no clamp, no value clip, no coefficients.
pub fn plain() -> PpoLossOptions {
    PpoLossOptions {
        log_ratio_clamp: None,
        value_clip_range: None,
        value_coef: 1.0,
        ..Default::default()
    }
}

/// A policy-only batch of a case, by the names of its inputs.
pub fn policy_data(case: &Golden, logp: &str, old: &str, mask: Option<&str>) -> Data<f64> {
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
pub fn value_data(case: &Golden, values: &str, old: &str, mask: Option<&str>) -> Data<f64> {
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
pub fn setting(case: &Golden, group: &str, key: &str) -> Option<f64> {
    case.inputs.get(group)?.get(key)?.as_f64()
}

/// verl's aggregation by name, with the sizes of the whole batch if given.
pub fn verl_aggregation(mode: &str, size: impl Fn(&str) -> Option<f64>) -> PpoLossOptions {
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
pub fn openrlhf_aggregation(case: &Golden, by_token: bool) -> PpoLossOptions {
    let mode = if by_token { "token-mean" } else { "seq-mean-token-mean" };
    verl_aggregation(mode, |key| case.optional(key))
}

/// verl, OpenRLHF and ours divide a row by its length; theirs adds 1e-8 to it.
pub fn tolerance_of(aggregation: Aggregation) -> (f64, f64) {
    if aggregation == Aggregation::SeqMeanTokenMean {
        EPSILON
    } else {
        EXACT
    }
}

pub fn is_true(case: &Golden, key: &str) -> bool {
    case.inputs[key].as_bool().unwrap()
}

/// Asserts that ours is the case's output of that name.
#[track_caller]
pub fn expect(case: &Golden, key: &str, ours: &[f64], (rel, abs): (f64, f64)) {
    assert_close(&format!("{} {key}", case.id), ours, &case.output(key), rel, abs);
}

/// The gradient of an output whose upstream gradient is in `grad_out`.
#[track_caller]
pub fn expect_grad(case: &Golden, key: &str, ours: &[f64], tolerance: (f64, f64)) {
    let upstream = case.optional("grad_out").unwrap_or(1.0);
    let scaled: Vec<f64> = ours.iter().map(|g| g * upstream).collect();
    expect(case, key, &scaled, tolerance);
}

/// Asserts that ours is an entry of a case's nested output.
#[track_caller]
pub fn expect_stat(case: &Golden, group: &str, key: &str, ours: f64, (rel, abs): (f64, f64)) {
    let want = flatten(&case.outputs[group][key]);
    assert_close(&format!("{} {group} {key}", case.id), &[ours], &want, rel, abs);
}

/// Whether one of a case's nested settings is there and true.
pub fn setting_is_true(case: &Golden, key: &str) -> bool {
    case.inputs["options"].get(key) == Some(&Value::Bool(true))
}

/// A NeMo-RL batch. Its `[B, S]` tensors start one position before the log-probabilities.
pub fn nemo_data(case: &Golden) -> Data<f64> {
    let [batch, seq_len] = case.shape("next_token_logprobs")[..] else { panic!() };
    let after_first = |key: &str| -> Vec<f64> {
        case.input(key).chunks(seq_len + 1).flat_map(|row| row[1..].to_vec()).collect()
    };
    let samples = case.input("sample_mask");
    let mask = after_first("token_mask").into_iter().enumerate();
    let mask = mask.map(|(t, m)| u8::from(m * samples[t / seq_len] != 0.0)).collect();
    let logp = case.input("next_token_logprobs");
    let on_policy = setting_is_true(case, "force_on_policy_ratio");
    Data {
        batch,
        seq_len,
        old_logp: if on_policy { logp.clone() } else { after_first("prev_logprobs") },
        logp,
        advantages: after_first("advantages"),
        ref_logp: Some(after_first("reference_policy_logprobs")),
        rollout_logp: Some(after_first("generation_logprobs")),
        mask: Some(mask),
        ..Default::default()
    }
}

/// Asserts that NeMo-RL's loss of this batch, which may have weights, is ours.
#[track_caller]
pub fn expect_nemo(case: &Golden, data: &Data<f64>) {
    let number = |key| setting(case, "options", key);
    let text = |key| case.inputs["options"].get(key).and_then(Value::as_str);
    let by_token = case.inputs["options"].get("token_level_loss") != Some(&Value::Bool(false));
    let (aggregation, denominator) = match by_token {
        true => (Aggregation::TokenMean, "global_valid_toks"),
        false => (Aggregation::SeqMeanTokenMean, "global_valid_seqs"),
    };
    let estimator = match text("reference_policy_kl_type") {
        None => KlEstimator::K3,
        Some("k1") => KlEstimator::K1,
        Some("k2") => KlEstimator::K2,
        Some(other) => panic!("{other}"),
    };
    let is = |key| setting_is_true(case, key);
    // A third time where a row's log-ratio is a mean.
    let by_row = is("sequence_level_importance_ratios");
    let tolerance = if by_row { (3.2e-8, 1e-10) } else { EPSILON };
    let options = PpoLossOptions {
        ratio: if by_row { RatioLevel::SequenceMean } else { RatioLevel::Token },
        surrogate: match (is("use_cispo"), is("disable_ppo_ratio")) {
            (true, _) => Surrogate::ClippedWeight,
            (_, true) => Surrogate::Reinforce,
            _ => Surrogate::Clip,
        },
        clip_range: number("ratio_clip_min").unwrap_or(0.2),
        clip_range_high: number("ratio_clip_max"),
        dual_clip: number("ratio_clip_c"),
        aggregation,
        denominator: Some(case.number(denominator)),
        ..plain()
    };
    // Another call, for its ratio may be another one.
    let kl_coef = number("reference_policy_kl_penalty").unwrap_or(0.01);
    let by_rollout = is("use_on_policy_kl_approximation");
    let of_kl = PpoLossOptions {
        kl_coef,
        kl: KlOptions { estimator, log_ratio_clamp: Some(20.0), output_clamp: Some(10.0) },
        kl_ratio: if by_rollout { KlRatio::Term } else { KlRatio::None },
        aggregation,
        denominator: options.denominator,
        ..plain()
    };
    let rollout_logp = data.rollout_logp.clone();
    let kl_data = Data {
        advantages: vec![0.0; data.logp.len()],
        old_logp: if by_rollout { rollout_logp.unwrap() } else { data.old_logp.clone() },
        weights: None,
        ..data.clone()
    };
    let (ours, kl) = (run(data, &options), run(&kl_data, &of_kl));
    expect(case, "loss", &[ours.stats.loss + kl.stats.loss], tolerance);
    // Its ratio in the KL term is e^(logp - detached logp), times a constant, which has a gradient, the score
    // function's: the KL itself.
    let kl_of = token_kl(&data.logp, data.ref_logp.as_ref().unwrap(), None, &of_kl.kl);
    let weights =
        reference::weights(data.mask.as_deref(), data.batch, data.seq_len, None, &of_kl).unwrap();
    let gradient = |t: usize| {
        let d = data.logp[t] - kl_data.old_logp[t];
        let ratio = if by_rollout { d.exp() } else { 1.0 };
        ours.grad_logp[t] + kl.grad_logp[t] + weights[t] * kl_coef * ratio * kl_of[t]
    };
    let gradients: Vec<f64> = (0..kl_of.len()).map(gradient).collect();
    expect_grad(case, "grad_next_token_logprobs", &gradients, tolerance);
    if !is("disable_ppo_ratio") {
        expect_stat(case, "metrics", "probs_ratio", ours.stats.ratio_mean, EPSILON);
        expect_stat(case, "metrics", "probs_ratio_min", ours.stats.ratio_min, EXACT);
        expect_stat(case, "metrics", "probs_ratio_max", ours.stats.ratio_max, EXACT);
    }
    if by_token && kl_coef != 0.0 {
        expect_stat(case, "metrics", "kl_penalty", kl.stats.loss / kl_coef, EPSILON);
    }
}
