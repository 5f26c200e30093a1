//! What tests against other projects' losses share: batches and options from golden cases.

use ppo_kernels::ppo_loss::{Aggregation, PpoLossOptions};

use super::ppo_loss_cases::Data;
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
