//! The PPO loss: the reference against other projects' losses, the CPU and the tensor layer against
//! the reference, and what must hold for any input.

mod common;

use approx::abs_diff_eq;
use candle_core::{DType, Device, Tensor, Var};
use common::logits_loss_cases::Case;
use common::loss_golden::*;
use common::pack::BAD_OFFSETS;
use common::ppo_loss_cases::*;
use common::*;
use half::{bf16, f16};
use ppo_kernels::cpu::Logit;
use ppo_kernels::kl::{KlEstimator, KlOptions};
use ppo_kernels::logprob::{self, LogprobOptions};
use ppo_kernels::ppo_loss::cpu::{
    self, LogitsInputs, LogitsOutputs, Outputs, ScaleInputs, ScaleOutputs,
};
use ppo_kernels::ppo_loss::{
    ppo_loss, reference, Aggregation, ClipFractionKind, KlAgainst, KlGradient, KlRatio,
    PpoLossInputs, PpoLossOptions, PpoStats, RatioGradient, RatioLevel, Surrogate,
};
use ppo_kernels::{Error, Result};
use serde_json::Value;

/// The loss from logits on the CPU.
fn from_logits<T: Logit>(case: &Case<T>) -> Result<logits_loss_cases::Found> {
    let n = case.targets.len();
    let (mut logp, mut entropy) = (vec![f32::NAN; n], vec![f32::NAN; n]);
    let (mut stats, mut loss) = ([unwritten()], [f32::NAN]);
    let mut grad = vec![T::from_f32(f32::NAN); case.logits.len()];
    let inputs = LogitsInputs {
        ref_logp: case.ref_logp.as_deref(),
        rollout_logp: case.rollout_logp.as_deref(),
        weights: case.weights.as_deref(),
        mask: case.mask.as_deref(),
        offsets: case.offsets.as_deref(),
        ..LogitsInputs::new(&case.logits, &case.targets, &case.old_logp, &case.advantages)
    };
    let outputs = LogitsOutputs {
        entropy: Some(&mut entropy),
        loss: Some(&mut loss),
        ..LogitsOutputs::new(&mut logp, &mut stats, &mut grad)
    };
    let sizes = [case.shape[0], case.shape[1], case.vocab];
    cpu::logits_ppo_loss(inputs, sizes, &case.logprob_options, &case.options, outputs)?;
    assert_eq!(loss[0].to_bits(), (stats[0].loss as f32).to_bits());
    let grad_logits = grad.iter().map(|g| g.to_f32()).collect();
    Ok(logits_loss_cases::Found { logp, entropy, stats: stats[0], grad_logits })
}

fn from_logits_agrees_with_the_references<T: Logit>() {
    let mut rng = rng(12);
    for (i, (shape, vocab)) in logits_loss_cases::SHAPES.into_iter().enumerate() {
        for number in i..i + 5 {
            let case = Case::<T>::new(&mut rng, shape, vocab, number);
            let found = from_logits(&case).unwrap();
            case.check("cpu", &found);
            // Those of the ops by themselves, to the bit, but for what is masked.
            let n = case.targets.len();
            let (mut logp, mut entropy) = (vec![0.0; n], vec![0.0; n]);
            let inputs = logprob::cpu::ForwardInputs::new(&case.logits[..], &case.targets[..]);
            let outputs = logprob::cpu::ForwardOutputs {
                entropy: Some(&mut entropy),
                ..logprob::cpu::ForwardOutputs::new(&mut logp)
            };
            logprob::cpu::forward(inputs, n, vocab, &case.logprob_options, outputs).unwrap();
            for t in (0..n).filter(|&t| case.mask.as_ref().is_none_or(|mask| mask[t] != 0)) {
                assert_eq!(found.logp[t].to_bits(), logp[t].to_bits(), "{vocab} {t}");
                assert_eq!(found.entropy[t].to_bits(), entropy[t].to_bits(), "{vocab} {t}");
            }
        }
    }
}

#[test]
fn from_logits_f32_agrees_with_the_references() {
    from_logits_agrees_with_the_references::<f32>();
}

#[test]
fn from_logits_f16_agrees_with_the_references() {
    from_logits_agrees_with_the_references::<f16>();
}

#[test]
fn from_logits_bf16_agrees_with_the_references() {
    from_logits_agrees_with_the_references::<bf16>();
}

#[test]
fn from_logits_reads_no_masked_row_and_refuses_targets_of_others() {
    let run = |case: &_| from_logits(case).unwrap();
    // With GSPO's ratio of rows, and of tokens.
    logits_loss_cases::masked(&mut rng(13), 5, run);
    let mut case = logits_loss_cases::masked(&mut rng(13), 0, run);
    let vocab = case.vocab;
    for target in [vocab as i64, -1, i64::MIN] {
        case.targets[2] = target;
        let error = from_logits(&case).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Target { row: 2, .. }), "{error}");
    }
    case.targets[2] = 0;
    case.options.kl_coef = 1.0;
    let error = from_logits(&case).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Option { option: "kl_coef", .. }), "{error}");
    case.options.kl_coef = 0.0;
    case.vocab = 299;
    let error = from_logits(&case).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Shape { arg: "logits", .. }), "{error}");
}

#[test]
fn from_logits_of_no_token_at_all_is_a_loss_of_0_where_the_denominator_is_given() {
    let options = PpoLossOptions { denominator: Some(3.0), ..PpoLossOptions::default() };
    for sizes in [[0, 5, 7], [5, 0, 7], [0, 1, 1 << 62], [0, 1 << 40, 1 << 40]] {
        let mut stats = [unwritten()];
        let inputs = LogitsInputs::<f32, i64>::new(&[], &[], &[], &[]);
        let outputs = LogitsOutputs::new(&mut [], &mut stats, &mut []);
        cpu::logits_ppo_loss(inputs, sizes, &LogprobOptions::default(), &options, outputs).unwrap();
        assert_eq!((stats[0].loss, stats[0].tokens), (0.0, 0.0), "{sizes:?}");
    }
    let inputs = LogitsInputs::<f32, i64>::new(&[0.0], &[0], &[0.0], &[0.0]);
    let (mut stats, mut logp, mut grad) = ([unwritten()], [0.0], [0.0]);
    let outputs = LogitsOutputs::new(&mut logp, &mut stats, &mut grad);
    let sizes = [1 << 32, 1 << 32, 7];
    let error = cpu::logits_ppo_loss(inputs, sizes, &LogprobOptions::default(), &options, outputs);
    assert!(matches!(error, Err(Error::Shape { .. })), "{error:?}");
}

/// Stats and gradients of the raw layer; empty gradients for what is not given.
fn run_cpu(data: &Data<f32>, options: &PpoLossOptions) -> Found {
    let n = data.logp.len();
    // Filled with NaN, to see that every element is written.
    let room = |given: bool| vec![f32::NAN; if given { n } else { 0 }];
    let mut grads = [room(true), room(data.values.is_some()), room(data.entropy.is_some())];
    let [logp, values, entropy] = grads.each_mut().map(|grad| Some(grad.as_mut_slice()));
    let (mut stats, mut loss) = ([unwritten()], [f32::NAN]);
    let outputs = Outputs {
        loss: Some(&mut loss),
        grad_logp: logp,
        grad_values: values.filter(|_| data.values.is_some()),
        grad_entropy: entropy.filter(|_| data.entropy.is_some()),
        ..Outputs::new(&mut stats)
    };
    cpu::ppo_loss(data.inputs(), data.batch, data.seq_len, options, outputs).unwrap();
    assert_eq!(loss[0].to_bits(), (stats[0].loss as f32).to_bits());
    (stats[0], grads)
}

/// What the raw layer says against a batch, from which nothing but statistics are wanted.
fn cpu_refuses(data: &Data<f32>, options: &PpoLossOptions) -> Error {
    refuses(data, data.inputs(), options)
}

fn refuses(data: &Data<f32>, inputs: cpu::Inputs, options: &PpoLossOptions) -> Error {
    let mut stats = [unwritten()];
    let outputs = Outputs::new(&mut stats);
    let error = cpu::ppo_loss(inputs, data.batch, data.seq_len, options, outputs).unwrap_err();
    assert_eq!(stats[0], unwritten());
    error
}

fn reference_refuses(data: &Data<f32>, options: &PpoLossOptions) -> Error {
    let wide = data.map(f64::from);
    reference::ppo_loss(&wide.inputs(), data.batch, data.seq_len, options).unwrap_err()
}

// ---- other projects' vectors ----

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
        let weights = reference::weights(Some(&mask), shape[0], shape[1], None, &options).unwrap();
        let tolerance = tolerance_of(options.aggregation);
        expect(&case, "loss", &[dot(&weights, &terms)], tolerance);
        expect_grad(&case, &format!("grad_{key}"), &weights, tolerance);
        ran += 1;
    }
    assert_eq!(ran, 48);
}

#[test]
fn reference_equals_openrlhf_policy_losses() {
    let mut ran = 0;
    for case in golden("policy_loss_others").iter().filter(|case| case.peer == "openrlhf") {
        // Importance weights for vLLM's log-probabilities are in tests/correction.rs.
        if case.function.contains("vLLM") {
            continue;
        }
        let settings = &case.inputs.get("options");
        let is_gspo = settings.is_some_and(|s| s.get("policy_loss_type").is_some());
        let data = policy_data(case, "log_probs", "old_log_probs", Some("action_mask"));
        let by_token = !is_gspo
            && settings.and_then(|s| s.get("token_level_loss")) != Some(&Value::Bool(false));
        let ratio = if is_gspo { RatioLevel::SequenceMean } else { RatioLevel::Token };
        let options = PpoLossOptions {
            ratio,
            clip_range: setting(case, "options", "clip_eps_low").unwrap_or(0.2),
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
    assert_eq!(ran, 12);
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
    let mut ran = 0;
    for case in golden("policy_loss_others").iter().filter(|case| case.peer == "nemo-rl") {
        // Those are in tests/correction.rs.
        if setting_is_true(case, "use_importance_sampling_correction") {
            continue;
        }
        expect_nemo(case, &nemo_data(case));
        ran += 1;
    }
    assert_eq!(ran, 10);
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

// ---- the reference itself ----

/// The loss as a function of (logp, values, entropy), laid end to end.
fn loss_at(data: &Data<f64>, options: &PpoLossOptions, x: &[f64]) -> f64 {
    let n = data.logp.len();
    let mut data = data.clone();
    data.logp = x[..n].to_vec();
    data.values = Some(x[n..2 * n].to_vec());
    data.entropy = Some(x[2 * n..].to_vec());
    run(&data, options).stats.loss
}

#[test]
fn what_is_of_rows_and_of_the_entropy_alone_can_be_checked_by_eye() {
    // Ratios 2, 1 and 1 | 1/2, 1/2 and a masked token | nothing.
    let half = 0.5_f64.ln();
    let data = Data::<f64> {
        batch: 3,
        seq_len: 3,
        logp: vec![0.0, half, half, half, half, 9.0, 9.0, 9.0, 9.0],
        old_logp: vec![half, half, half, 0.0, 0.0, 9.0, 9.0, 9.0, 9.0],
        advantages: vec![1.0, -1.0, 5.0],
        entropy: Some(vec![1.0, 2.0, 3.0, 4.0, 5.0, 9.0, 9.0, 9.0, 9.0]),
        weights: Some(vec![1.0, 2.0, 5.0]),
        mask: Some(vec![1, 1, 1, 1, 1, 0, 0, 0, 0]),
        ..Default::default()
    };
    let options = PpoLossOptions {
        aggregation: Aggregation::SeqMeanTokenMean,
        entropy_coef: 0.5,
        entropy_own_mean: true,
        advantages_per_row: true,
        weights_per_row: true,
        row_extremes: true,
        ..Default::default()
    };
    let ours = run(&data, &options);
    // Policy terms -1.2, -1 and -1 | 0.8 and 0.8, twice; the mean over rows of their means.
    let policy = ((-1.2 - 1.0 - 1.0) / 3.0 + 2.0 * 0.8) / 2.0;
    assert_close("policy", &[ours.stats.policy_loss], &[policy], 1e-12, 0.0);
    assert_close("loss", &[ours.stats.loss], &[policy - 0.5 * 3.0], 1e-12, 0.0);
    assert_eq!(ours.grad_entropy[..6], [-0.1, -0.1, -0.1, -0.1, -0.1, 0.0]);
    // A third of the first row is clipped with A > 0, all of the second without.
    assert_close("high", &[ours.stats.clip_high_row_max], &[1.0 / 3.0], 1e-12, 0.0);
    assert_eq!(ours.stats.clip_low_row_min, 0.0);
    let masked = Data { mask: Some(vec![0; 9]), ..data };
    let ours = run(&masked, &PpoLossOptions { denominator: Some(1.0), ..options });
    assert_eq!(ours.stats.loss, 0.0);
    assert!(ours.stats.clip_high_row_max.is_nan() && ours.stats.clip_low_row_min.is_nan());
    let masked = masked.map(|x| x as f32);
    let (stats, _) = run_cpu(&masked, &PpoLossOptions { denominator: Some(1.0), ..options });
    assert_eq!(stats.loss, 0.0);
}

#[test]
fn reference_gradient_is_the_derivative_of_the_reference() {
    for (name, mut options) in option_sets() {
        // Its own, so that another set of options leaves these tokens as they are.
        let mut rng = rng(1);
        let (batch, seq_len) = (4, 6);
        let mut data = rollout(&mut rng, batch, seq_len).map(f64::from);
        data.mask = Some(random_mask(&mut rng, batch * seq_len, 0.7));
        data.weights = Some(wide(&some_weights(&mut rng, batch * seq_len)));
        let mut data = data.for_options(&options);
        // A certain token is where a region ends.
        data.logp[batch * seq_len / 2] = -1.0;
        // By design no derivatives: what is a constant to the gradient, and one estimate's value with
        // another one's gradient.
        let surrogate = options.surrogate;
        let is_weight = matches!(surrogate, Surrogate::ClippedWeight | Surrogate::GammaWeight);
        if is_weight || options.ratio_gradient == RatioGradient::OwnToken {
            continue;
        }
        if options.kl.estimator == KlEstimator::K3StraightThrough {
            options.kl.estimator = KlEstimator::K3;
        }
        (options.kl_gradient, options.kl_ratio) = (KlGradient::Own, KlRatio::None);
        options.kl_ratio_cap = None;
        let upstream = f64::from(uniform(&mut rng, 1, 2.0)[0]);
        let x = [&data.logp, data.values.as_ref().unwrap(), data.entropy.as_ref().unwrap()];
        let x: Vec<f64> = x.into_iter().flatten().copied().collect();
        let numeric = finite_difference(&x, |x| upstream * loss_at(&data, &options, x));
        let ours = run(&data, &options);
        let grad = [ours.grad_logp, ours.grad_values, ours.grad_entropy].concat();
        let grad: Vec<f64> = grad.iter().map(|g| g * upstream).collect();
        assert_close(name, &grad, &numeric, 1e-7, 1e-9);
    }
}

#[test]
fn the_gradient_of_the_straight_through_kl_is_that_of_k2() {
    let data = rollout(&mut rng(2), 3, 5).map(f64::from);
    let grad = |estimator| {
        let kl = KlOptions { estimator, ..KlOptions::default() };
        run(&data, &PpoLossOptions { kl_coef: 0.5, kl, ..Default::default() }).grad_logp
    };
    assert_eq!(grad(KlEstimator::K3StraightThrough), grad(KlEstimator::K2));
}

#[test]
fn at_ratio_one_the_gradient_flows() {
    let mut data = rollout(&mut rng(3), 2, 20);
    data.old_logp = data.logp.clone();
    data.old_values = data.values.clone();
    // Even with nothing but the point itself inside the clip ranges.
    for clip_range in [0.2, 0.0] {
        let options = PpoLossOptions {
            clip_range,
            value_clip_range: Some(clip_range),
            dual_clip: Some(3.0),
            ..Default::default()
        };
        let (stats, [grad, grad_values, _]) = run_cpu(&data, &options);
        let want: Vec<f64> = data.advantages.iter().map(|&a| -f64::from(a) / 40.0).collect();
        assert_close("grad", &wide(&grad), &want, REL, 0.0);
        assert!(grad_values.iter().all(|&g| g != 0.0));
        assert_eq!((stats.clip_fraction, stats.ratio_var, stats.approx_kl_k3), (0.0, 0.0, 0.0));
        assert_eq!((stats.ratio_min, stats.ratio_max, stats.value_clip_fraction), (1.0, 1.0, 0.0));
    }
}

/// One token: loss and gradient with respect to logp, from both implementations.
fn one_token(log_ratio: f64, advantage: f64, options: &PpoLossOptions) -> (f64, f64) {
    let data = Data {
        batch: 1,
        seq_len: 1,
        logp: vec![log_ratio],
        old_logp: vec![0.0],
        advantages: vec![advantage],
        ..Default::default()
    };
    let want = run(&data, options);
    let (stats, [grad, ..]) = run_cpu(&data.map(|x| x as f32), options);
    assert_close("loss", &[stats.loss], &[want.stats.loss], REL, 0.0);
    assert_close("grad", &wide(&grad), &want.grad_logp, REL, 0.0);
    (want.stats.loss, want.grad_logp[0])
}

#[test]
fn the_clip_stops_only_what_would_push_further_out() {
    let options =
        PpoLossOptions { clip_range: 0.1, clip_range_high: Some(0.4), ..Default::default() };
    let (above, inside, below) = (1.5_f64.ln(), 1.3_f64.ln(), 0.8_f64.ln());
    let (loss, grad) = one_token(above, 2.0, &options);
    assert!(abs_diff_eq!(loss, -2.8, epsilon = 1e-12) && grad == 0.0);
    let (loss, grad) = one_token(above, -2.0, &options);
    assert!(abs_diff_eq!(loss, 3.0, epsilon = 1e-12) && abs_diff_eq!(grad, 3.0, epsilon = 1e-12));
    let (loss, grad) = one_token(inside, 2.0, &options);
    assert!(abs_diff_eq!(loss, -2.6, epsilon = 1e-12) && abs_diff_eq!(grad, -2.6, epsilon = 1e-12));
    let (loss, grad) = one_token(below, -2.0, &options);
    assert!(abs_diff_eq!(loss, 1.8, epsilon = 1e-12) && grad == 0.0);
    let (loss, grad) = one_token(below, 2.0, &options);
    assert!(abs_diff_eq!(loss, -1.6, epsilon = 1e-12) && abs_diff_eq!(grad, -1.6, epsilon = 1e-12));
}

#[test]
fn the_dual_clip_bounds_the_loss_of_negative_advantages_only() {
    let options = PpoLossOptions { dual_clip: Some(3.0), ..Default::default() };
    let far = 10.0_f64.ln();
    assert_eq!(one_token(far, -2.0, &options), (6.0, 0.0));
    let (loss, grad) = one_token(far, -2.0, &PpoLossOptions::default());
    assert!(abs_diff_eq!(loss, 20.0, epsilon = 1e-12) && abs_diff_eq!(grad, 20.0, epsilon = 1e-12));
    let (loss, grad) = one_token(far, 2.0, &options);
    assert!(abs_diff_eq!(loss, -2.4, epsilon = 1e-12) && grad == 0.0);
    let (loss, grad) = one_token(2.5_f64.ln(), -2.0, &options);
    assert!(abs_diff_eq!(loss, 5.0, epsilon = 1e-12) && abs_diff_eq!(grad, 5.0, epsilon = 1e-12));
}

#[test]
fn the_log_ratio_clamp_keeps_the_loss_finite_and_stops_the_gradient() {
    let (loss, grad) = one_token(500.0, -1.0, &PpoLossOptions::default());
    assert!(abs_diff_eq!(loss, 20_f64.exp(), epsilon = 1e-3) && grad == 0.0);
    let (_, grad) = one_token(f64::NEG_INFINITY, 1.0, &PpoLossOptions::default());
    assert_eq!(grad, 0.0);
    let off = PpoLossOptions { log_ratio_clamp: None, ..Default::default() };
    let (loss, grad) = one_token(30.0, -1.0, &off);
    assert!(loss > 1e13 && grad > 1e13);
}

// ---- the CPU against the reference ----

#[track_caller]
fn check_cpu(what: &str, data: &Data<f32>, options: &PpoLossOptions) {
    check(what, data, options, &run_cpu(data, options));
}

/// Around every lane and block boundary: short rows, long rows, one row, one column.
const SHAPES: [(usize, usize); 11] = [
    (1, 1),
    (3, 7),
    (1, 16),
    (5, 17),
    (40, 130),
    (1, 4097),
    (3, 4096),
    (2, 5000),
    (300, 1),
    (2049, 2),
    (2, 13000),
];

#[test]
fn cpu_agrees_with_the_reference_for_every_option_and_shape() {
    for (batch, seq_len) in SHAPES {
        for (name, options) in option_sets() {
            // Its own, so that another set of options leaves these tokens as they are.
            let mut rng = rng(4);
            let mut data = rollout(&mut rng, batch, seq_len);
            let what = format!("{name} [{batch}, {seq_len}]");
            check_cpu(&what, &data.for_options(&options), &options);
            data.mask = Some(padded_mask(&mut rng, batch, seq_len));
            check_cpu(&format!("{what} masked"), &data.for_options(&options), &options);
            data.weights = Some(some_weights(&mut rng, batch * seq_len));
            check_cpu(&format!("{what} weighted"), &data.for_options(&options), &options);
        }
    }
}

#[test]
fn packed_rows_have_the_bits_of_padded_ones() {
    let mut rng = rng(30);
    for (i, (name, options)) in option_sets().into_iter().enumerate() {
        for (batch, seq_len) in [(3, 8), (9, 40), (4, 1500), (5, 5000)] {
            let sample = Packed::new(&mut rng, batch, seq_len, i % 3 != 0).for_options(&options);
            let what = format!("{name}: {batch}x{seq_len}");
            let padded = run_cpu(&sample.padded, &options);
            let packed = run_cpu(&sample.packed, &options);
            sample.check(&what, &padded, &packed);
            check(&what, &sample.packed, &options, &packed);
            check(&what, &sample.padded, &options, &padded);
        }
    }
}

#[test]
fn a_packs_bits_do_not_depend_on_the_number_of_threads() {
    let sample = Packed::new(&mut rng(31), 64, 2048, true);
    for (name, options) in option_sets() {
        let packed = sample.packed.for_options(&options);
        let run = || bits(&run_cpu(&packed, &options));
        let one = with_threads(1, run);
        for threads in [2, 3, 8] {
            assert!(with_threads(threads, run) == one, "{name}: {threads} threads");
        }
    }
}

#[test]
fn offsets_that_are_none_are_refused() {
    let mut data = rollout(&mut rng(32), 2, 3);
    (data.seq_len, data.offsets) = (6, Some(vec![0, 0, 6]));
    let default = PpoLossOptions::default();
    run_cpu(&data, &default);
    let says = |data: &Data<f32>, words: &[&str]| {
        for error in [cpu_refuses(data, &default), reference_refuses(data, &default)] {
            let text = error.to_string();
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        }
    };
    for (offsets, words) in BAD_OFFSETS {
        data.offsets = Some(offsets.to_vec());
        says(&data, &words);
    }
    data.offsets = Some(vec![0, 6]);
    says(&data, &["`offsets`", "[2]", "[3]"]);
}

#[test]
fn a_negative_weight_of_an_unmasked_token_is_refused() {
    let default = PpoLossOptions::default();
    let mut data = rollout(&mut rng(34), 2, 3);
    data.weights = Some(vec![1.0, 1.0, 1.0, 1.0, -0.5, 1.0]);
    data.mask = Some(vec![1; 6]);
    let error = cpu_refuses(&data, &default).to_string();
    assert!(error.contains("option `weights` is -0.5 at token 4, expected 0 or more"), "{error}");
    data.mask = Some(vec![1, 1, 1, 1, 0, 1]);
    run_cpu(&data, &default);
}

#[test]
fn statistics_of_numbers_that_agree_and_of_outliers_keep_their_digits() {
    for (batch, seq_len) in [(1, 40), (64, 2048), (3, 1001)] {
        for data in hard_to_sum(batch, seq_len) {
            check_hard_to_sum(&data, &run_cpu(&data, &PpoLossOptions::default()).0);
        }
    }
}

#[test]
fn gradients_of_unlikely_ratios_are_right_down_to_the_least_float() {
    let (data, options) = unlikely();
    check_unlikely(&run_cpu(&data, &options));
}

#[test]
fn statistics_keep_their_digits_far_from_zero() {
    let mut data = rollout(&mut rng(5), 7, 900);
    // Exact in f32, so that both see the same deviations.
    let offset =
        |x: &mut Vec<f32>| x.iter_mut().for_each(|x| *x = (*x * 64.0).round() / 64.0 + 1e4);
    offset(data.values.as_mut().unwrap());
    offset(data.returns.as_mut().unwrap());
    offset(data.old_values.as_mut().unwrap());
    check_cpu("offset", &data, &PpoLossOptions::default());
    // A ratio next to 1, where r - 1 - d is eight digits below r.
    data.old_logp = data.logp.iter().map(|&l| l + 1.0 / 8192.0).collect();
    let want = run(&data.map(f64::from), &PpoLossOptions::default()).stats;
    let (got, _) = run_cpu(&data, &PpoLossOptions::default());
    assert_close("k3", &[got.approx_kl_k3], &[want.approx_kl_k3], 1e-5, 0.0);
}

#[test]
fn optional_terms_fall_away() {
    let mut data = rollout(&mut rng(6), 3, 30);
    (data.values, data.entropy, data.ref_logp) = (None, None, None);
    check_cpu("policy only", &data, &PpoLossOptions::default());
    let (stats, _) = run_cpu(&data, &PpoLossOptions::default());
    assert_eq!(stats.loss, stats.policy_loss);
    let absent =
        ["value", "return", "entropy", "kl_mean", "explained", "clip_high_row", "clip_low_row"];
    for (name, x) in PpoStats::NAMES.iter().zip(stats.to_array()) {
        assert_eq!(x.is_nan(), absent.iter().any(|a| name.starts_with(a)), "{name}");
    }
    // Gradients that nobody wants change nothing.
    let full = rollout(&mut rng(6), 3, 30);
    let (mut none, options) = ([unwritten()], PpoLossOptions::default());
    cpu::ppo_loss(full.inputs(), 3, 30, &options, Outputs::new(&mut none)).unwrap();
    let stats = |stats: PpoStats| stats.to_array().map(f64::to_bits);
    assert_eq!(stats(none[0]), stats(run_cpu(&full, &options).0));
    // No clip, no old values.
    let mut full = full;
    full.old_values = None;
    let options = PpoLossOptions { value_clip_range: None, ..Default::default() };
    check_cpu("no old values", &full, &options);
}

#[test]
fn an_input_that_is_only_reported_cannot_spoil_the_loss() {
    let mut data = rollout(&mut rng(7), 2, 9);
    data.ref_logp.as_mut().unwrap()[3] = f32::NEG_INFINITY;
    data.entropy.as_mut().unwrap()[4] = f32::NAN;
    data.values.as_mut().unwrap()[5] = f32::NAN;
    let options = PpoLossOptions { value_coef: 0.0, ..Default::default() };
    let (stats, grads) = run_cpu(&data, &options);
    assert!(stats.loss.is_finite() && stats.entropy_mean.is_nan() && stats.value_loss.is_nan());
    assert!(grads.iter().flatten().all(|g| g.is_finite()));
    check_cpu("only reported", &data, &options);
}

#[test]
fn nan_in_an_unmasked_token_reaches_the_loss() {
    let data = rollout(&mut rng(8), 2, 9);
    let spoilt: [Change; 5] = [
        |d| d.logp[5] = f32::NAN,
        |d| d.old_logp[5] = f32::NAN,
        |d| d.advantages[5] = f32::NAN,
        |d| d.values.as_mut().unwrap()[5] = f32::NAN,
        |d| d.returns.as_mut().unwrap()[5] = f32::NAN,
    ];
    for spoil in spoilt {
        let mut data = data.clone();
        spoil(&mut data);
        assert!(run_cpu(&data, &PpoLossOptions::default()).0.loss.is_nan());
        assert!(run(&data.map(f64::from), &PpoLossOptions::default()).stats.loss.is_nan());
    }
}

#[test]
fn what_is_masked_may_hold_nan_and_gets_zero() {
    let mut rng = rng(9);
    for (name, options) in option_sets() {
        for (batch, seq_len) in [(3, 37), (2, 5000)] {
            let mut data = rollout(&mut rng, batch, seq_len);
            let mut mask = random_mask(&mut rng, batch * seq_len, 0.5);
            // The first token of a block too.
            mask[0] = 0;
            data.mask = Some(mask.clone());
            let data = data.for_options(&options);
            let found = run_cpu(&data, &options);
            let with_nan = run_cpu(&with_nan_under_the_mask(&data), &options);
            assert_eq!(bits(&with_nan), bits(&found), "{name}");
            for grad in &found.1 {
                let masked = grad.iter().zip(&mask).filter(|(_, &m)| m == 0);
                assert!(masked.into_iter().all(|(g, _)| g.to_bits() == 0), "{name}");
            }
            let wide = with_nan_under_the_mask(&data).map(f64::from);
            assert!(run(&wide, &options).stats.loss.is_finite());
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let mut rng = rng(10);
    for (batch, seq_len) in [(1, 100_003), (900, 131), (5, 20_000)] {
        let mut data = rollout(&mut rng, batch, seq_len);
        data.mask = Some(random_mask(&mut rng, batch * seq_len, 0.8));
        for aggregation in [Aggregation::TokenMean, Aggregation::SeqMeanTokenMean] {
            let options = PpoLossOptions {
                aggregation,
                kl_coef: 0.1,
                entropy_coef: 0.1,
                ..Default::default()
            };
            let on = |threads| with_threads(threads, || bits(&run_cpu(&data, &options)));
            let one = on(1);
            for threads in [2, 3, 8] {
                assert!(on(threads) == one, "{threads} threads, [{batch}, {seq_len}]");
            }
        }
    }
}

#[test]
fn parts_with_the_whole_denominator_add_up_to_the_whole() {
    let mut rng = rng(11);
    let (batch, seq_len) = (6, 50);
    let mut data = rollout(&mut rng, batch, seq_len);
    let mut mask = random_mask(&mut rng, batch * seq_len, 0.6);
    mask[2 * seq_len..3 * seq_len].fill(0);
    data.mask = Some(mask.clone());
    let tokens = mask.iter().filter(|&&m| m != 0).count() as f64;
    for (aggregation, denominator) in [
        (Aggregation::TokenMean, tokens),
        (Aggregation::SeqMeanTokenSum, 5.0),
        (Aggregation::SeqMeanTokenMean, 5.0),
        (Aggregation::SeqMeanTokenSumNorm, 50.0),
    ] {
        let options = PpoLossOptions { aggregation, ..Default::default() };
        let (whole, [whole_grad, ..]) = run_cpu(&data, &options);
        let given = PpoLossOptions { denominator: Some(denominator), ..options };
        let (mut loss, mut grad) = (0.0, Vec::new());
        for b in 0..batch {
            let part = row(&data, b);
            let (stats, [part_grad, ..]) = run_cpu(&part, &given);
            loss += stats.loss;
            grad.extend(part_grad);
        }
        assert_close("loss", &[loss], &[whole.loss], REL, ABS);
        assert_eq!(grad, whole_grad);
    }
}

#[test]
fn a_batch_without_tokens_needs_a_denominator() {
    let mut data = rollout(&mut rng(12), 2, 5);
    data.mask = Some(vec![0; 10]);
    for aggregation in [
        Aggregation::TokenMean,
        Aggregation::SeqMeanTokenSum,
        Aggregation::SeqMeanTokenMean,
        Aggregation::SeqMeanTokenSumNorm,
    ] {
        let options = PpoLossOptions { aggregation, ..Default::default() };
        let error = cpu_refuses(&data, &options);
        assert!(matches!(error, Error::Mask { arg: "mask", expected: 1, got: 0, .. }));
        assert!(matches!(reference_refuses(&data, &options), Error::Mask { .. }));
        for options in [
            PpoLossOptions { denominator: Some(8.0), ..options },
            PpoLossOptions { aggregation: Aggregation::Constant(8.0), ..options },
        ] {
            let (stats, grads) = run_cpu(&data, &options);
            assert_eq!((stats.loss, stats.policy_loss, stats.tokens), (0.0, 0.0, 0.0));
            assert!(grads.iter().flatten().all(|g| g.to_bits() == 0));
            assert!(stats.clip_fraction.is_nan() && stats.ratio_min.is_nan());
            check_cpu("no tokens", &data, &options);
        }
    }
}

#[test]
fn empty_shapes_are_batches_without_tokens() {
    for (batch, seq_len) in [(0, 0), (0, 5), (5, 0)] {
        let data = Data::<f32> { batch, seq_len, ..Default::default() };
        for aggregation in [Aggregation::TokenMean, Aggregation::SeqMeanTokenMean] {
            let options = PpoLossOptions { aggregation, ..Default::default() };
            let error = cpu_refuses(&data, &options);
            assert!(matches!(error, Error::Mask { .. }));
            let options = PpoLossOptions { denominator: Some(1.0), ..options };
            assert_eq!(run_cpu(&data, &options).0.loss, 0.0);
        }
    }
}

// ---- the tensor layer ----

/// The tensors of a batch; those that take a gradient are variables.
struct Tensors {
    logp: Var,
    values: Option<Var>,
    entropy: Option<Var>,
    old_logp: Tensor,
    advantages: Tensor,
    old_values: Option<Tensor>,
    returns: Option<Tensor>,
    ref_logp: Option<Tensor>,
    rollout_logp: Option<Tensor>,
    weights: Option<Tensor>,
    mask: Option<Tensor>,
    offsets: Option<Tensor>,
}

impl Tensors {
    fn new(data: &Data<f32>, device: &Device) -> Self {
        let shape = match data.offsets {
            None => &[data.batch, data.seq_len][..],
            Some(_) => &[data.seq_len],
        };
        let rows = [data.batch];
        let tensor = |x: &Vec<f32>| {
            let shape = if x.len() == data.logp.len() { shape } else { &rows[..] };
            Tensor::from_slice(x, shape, device).unwrap()
        };
        let offsets = |x: &Vec<i64>| Tensor::from_slice(x, x.len(), device).unwrap();
        let var = |x: &Vec<f32>| Var::from_tensor(&tensor(x)).unwrap();
        Self {
            logp: var(&data.logp),
            values: data.values.as_ref().map(var),
            entropy: data.entropy.as_ref().map(var),
            old_logp: tensor(&data.old_logp),
            advantages: tensor(&data.advantages),
            old_values: data.old_values.as_ref().map(tensor),
            returns: data.returns.as_ref().map(tensor),
            ref_logp: data.ref_logp.as_ref().map(tensor),
            rollout_logp: data.rollout_logp.as_ref().map(tensor),
            weights: data.weights.as_ref().map(tensor),
            mask: data.mask.as_ref().map(|m| Tensor::from_slice(m, shape, device).unwrap()),
            offsets: data.offsets.as_ref().map(offsets),
        }
    }

    fn inputs(&self) -> PpoLossInputs<'_> {
        let has_values = self.values.is_some();
        PpoLossInputs {
            logp: &self.logp,
            old_logp: &self.old_logp,
            advantages: &self.advantages,
            values: self.values.as_deref(),
            old_values: self.old_values.as_ref().filter(|_| has_values),
            returns: self.returns.as_ref().filter(|_| has_values),
            entropy: self.entropy.as_deref(),
            ref_logp: self.ref_logp.as_ref(),
            rollout_logp: self.rollout_logp.as_ref(),
            weights: self.weights.as_ref(),
            mask: self.mask.as_ref(),
            offsets: self.offsets.as_ref(),
        }
    }
}

#[test]
fn tensors_agree_with_the_reference() {
    for device in devices() {
        for (name, options) in option_sets() {
            // Its own, so that another set of options leaves these tokens as they are.
            let mut rng = rng(13);
            let mut data = rollout(&mut rng, 5, 23);
            data.mask = Some(random_mask(&mut rng, 5 * 23, 0.7));
            data.weights = name.contains("k").then(|| some_weights(&mut rng, 5 * 23));
            let data = data.for_options(&options);
            let want = run(&data.map(f64::from), &options);
            let tensors = Tensors::new(&with_nan_under_the_mask(&data), &device);
            let output = ppo_loss(&tensors.inputs(), &options).unwrap();
            assert!(output.loss.dims().is_empty() && output.loss.dtype() == DType::F32);
            assert_eq!(output.stats.tensor().dims(), [PpoStats::LEN]);
            let stats = output.stats.to_host().unwrap();
            assert_eq!(to_vec(&output.loss)[0], stats.loss, "{name}");
            let weights = reference::weights(data.mask.as_deref(), 5, 23, None, &options).unwrap();
            assert_stats_close(name, &stats, &want.stats, weights.iter().sum());

            let upstream = -1.75;
            let grads = (output.loss * upstream).unwrap().backward().unwrap();
            let check = |what: &str, var: &Var, want: &[f64]| {
                let want: Vec<f64> = want.iter().map(|g| g * upstream).collect();
                let got = grads.get(var).unwrap().flatten_all().unwrap();
                assert_close_scaled(&format!("{name} {what}"), &got.to_vec1().unwrap(), &want);
            };
            check("logp", &tensors.logp, &want.grad_logp);
            check("values", tensors.values.as_ref().unwrap(), &want.grad_values);
            if options.entropy_coef != 0.0 {
                check("entropy", tensors.entropy.as_ref().unwrap(), &want.grad_entropy);
            }
        }
    }
}

#[test]
fn tensors_may_be_packed() {
    for device in devices() {
        for (name, options) in option_sets() {
            let sample = Packed::new(&mut rng(33), 5, 23, true).for_options(&options);
            let tensors = Tensors::new(&sample.packed, &device);
            let output = ppo_loss(&tensors.inputs(), &options).unwrap();
            let grads = output.loss.backward().unwrap();
            let of = |var: &Option<Var>| grads.get(var.as_ref()?).map(to_vec_f32);
            let found = (
                output.stats.to_host().unwrap(),
                [
                    to_vec_f32(grads.get(&tensors.logp).unwrap()),
                    of(&tensors.values).unwrap_or_default(),
                    of(&tensors.entropy).unwrap_or_default(),
                ],
            );
            let want = run(&sample.packed.map(f64::from), &options);
            assert_close_scaled(name, &found.1[0], &want.grad_logp);
            assert_close_scaled(name, &found.1[1], &want.grad_values);
            let Data { mask, offsets, seq_len, .. } = &sample.packed;
            let weights =
                reference::weights(mask.as_deref(), 5, *seq_len, offsets.as_deref(), &options);
            let weights = weights.unwrap().iter().sum();
            assert_stats_close(name, &found.0, &want.stats, weights);
        }
    }
    let data = rollout(&mut rng(34), 2, 3);
    let tensors = Tensors::new(&data, &Device::Cpu);
    let offsets = Tensor::new(&[0_i64, 3, 6], &Device::Cpu).unwrap();
    let inputs = PpoLossInputs { offsets: Some(&offsets), ..tensors.inputs() };
    let error = ppo_loss(&inputs, &PpoLossOptions::default()).unwrap_err().to_string();
    assert!(error.contains("`logp`") && error.contains("[N]"), "{error}");
}

fn to_vec_f32(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_combination_of_tracked_tensors_gets_its_gradients() {
    let data = rollout(&mut rng(14), 2, 6);
    let options = PpoLossOptions { entropy_coef: 0.1, ..Default::default() };
    let want = run(&data.map(f64::from), &options);
    for device in devices() {
        for tracked in 0..8 {
            let tensors = Tensors::new(&data, &device);
            let pick = |bit: usize, var: &Var| {
                if tracked >> bit & 1 == 1 {
                    var.as_tensor().clone()
                } else {
                    var.as_detached_tensor()
                }
            };
            let vars = [
                &tensors.logp,
                tensors.values.as_ref().unwrap(),
                tensors.entropy.as_ref().unwrap(),
            ];
            let [logp, values, entropy] = [0, 1, 2].map(|i| pick(i, vars[i]));
            let mut inputs = tensors.inputs();
            (inputs.logp, inputs.entropy) = (&logp, Some(&entropy));
            inputs.values = Some(&values);
            let loss = ppo_loss(&inputs, &options).unwrap().loss;
            assert_eq!(loss.track_op(), tracked != 0);
            let grads = loss.backward().unwrap();
            let wants = [&want.grad_logp, &want.grad_values, &want.grad_entropy];
            for (i, (var, want)) in vars.into_iter().zip(wants).enumerate() {
                let grad = grads.get(var).filter(|_| tracked != 0);
                assert_eq!(grad.is_some(), tracked >> i & 1 == 1);
                if let Some(grad) = grad {
                    let grad = grad.flatten_all().unwrap().to_vec1().unwrap();
                    assert_close_scaled("grad", &grad, want);
                }
            }
        }
    }
}

#[test]
fn strided_and_offset_tensors_give_the_same() {
    let mut data = rollout(&mut rng(15), 4, 9);
    data.mask = Some(random_mask(&mut rng(16), 36, 0.7));
    data.weights = Some(some_weights(&mut rng(17), 36));
    for device in devices() {
        let t = Tensors::new(&data, &device);
        let options = PpoLossOptions {
            entropy_coef: 0.1,
            kl_coef: 0.1,
            kl_against: KlAgainst::Rollout,
            ..Default::default()
        };
        let plain = ppo_loss(&t.inputs(), &options).unwrap();
        let optional = |x: &Option<Tensor>| x.as_ref().map(strided);
        let (old_values, returns) = (optional(&t.old_values), optional(&t.returns));
        let (ref_logp, mask) = (optional(&t.ref_logp), optional(&t.mask));
        let (rollout_logp, weights) = (optional(&t.rollout_logp), optional(&t.weights));
        let [logp, values, entropy, old_logp, advantages] = [
            &t.logp,
            t.values.as_deref().unwrap(),
            t.entropy.as_deref().unwrap(),
            &t.old_logp,
            &t.advantages,
        ]
        .map(strided);
        let inputs = PpoLossInputs {
            logp: &logp,
            old_logp: &old_logp,
            advantages: &advantages,
            values: Some(&values),
            old_values: old_values.as_ref(),
            returns: returns.as_ref(),
            entropy: Some(&entropy),
            ref_logp: ref_logp.as_ref(),
            rollout_logp: rollout_logp.as_ref(),
            weights: weights.as_ref(),
            mask: mask.as_ref(),
            offsets: None,
        };
        let other = ppo_loss(&inputs, &options).unwrap();
        let [other_stats, plain_stats] = [&other, &plain].map(|output| {
            let stats = to_vec(output.stats.tensor());
            stats.into_iter().map(f64::to_bits).collect::<Vec<_>>()
        });
        assert_eq!(other_stats, plain_stats);
        let (plain, other) = (plain.loss.backward().unwrap(), other.loss.backward().unwrap());
        for var in [&t.logp, t.values.as_ref().unwrap(), t.entropy.as_ref().unwrap()] {
            assert_eq!(to_vec(other.get(var).unwrap()), to_vec(plain.get(var).unwrap()));
        }
    }
}

#[test]
fn inputs_may_share_a_tensor_and_the_loss_be_used_twice() {
    for device in devices() {
        let x = Tensor::from_vec(uniform(&mut rng(21), 6, 1.0), (2, 3), &device).unwrap();
        let x = Var::from_tensor(&x).unwrap();
        let inputs = PpoLossInputs {
            values: Some(&x),
            old_values: Some(&x),
            returns: Some(&x),
            entropy: Some(&x),
            ref_logp: Some(&x),
            ..PpoLossInputs::new(&x, &x, &x)
        };
        let options = PpoLossOptions { entropy_coef: 0.5, kl_coef: 0.1, ..Default::default() };
        let loss = ppo_loss(&inputs, &options).unwrap().loss;
        let twice = (loss.sqr().unwrap() + &loss).unwrap();
        let grads = twice.backward().unwrap();
        // The ratio is 1, so the policy term has the gradient -A, which is -x here.
        let upstream = 2.0 * to_vec(&loss)[0] + 1.0;
        let want: Vec<f64> = to_vec(&x).iter().map(|x| upstream * (-x - 0.5) / 6.0).collect();
        assert_close("grad", &to_vec(grads.get(&x).unwrap()), &want, REL, ABS);
    }
}

#[test]
fn the_loss_trains_a_graph_behind_its_inputs() {
    for device in devices() {
        let x = Var::from_tensor(&Tensor::new(&[[-1.0_f32, -2.0]], &device).unwrap()).unwrap();
        let (logp, values) = ((&*x * 0.5).unwrap(), (&*x * 3.0).unwrap());
        let (zeros, ones) = (x.zeros_like().unwrap(), x.ones_like().unwrap());
        let inputs = PpoLossInputs {
            values: Some(&values),
            returns: Some(&zeros),
            ..PpoLossInputs::new(&logp, &logp, &ones)
        };
        let options =
            PpoLossOptions { value_clip_range: None, value_coef: 1.0, ..Default::default() };
        let grads = ppo_loss(&inputs, &options).unwrap().loss.backward().unwrap();
        // Per token (-1 * 0.5 + 3 x * 3) / 2; old_logp is detached although it is tracked.
        assert_close("grad", &to_vec(grads.get(&x).unwrap()), &[-4.75, -9.25], REL, 0.0);
    }
}

// ---- errors ----

#[test]
fn options_out_of_range_are_refused_by_name() {
    let data = rollout(&mut rng(17), 2, 3);
    for (name, options) in bad_options() {
        let tensors = Tensors::new(&data, &Device::Cpu);
        for error in [
            cpu_refuses(&data, &options),
            reference_refuses(&data, &options),
            ppo_loss(&tensors.inputs(), &options).unwrap_err(),
        ] {
            assert!(matches!(&error, Error::Option { option, .. } if *option == name), "{error}");
            assert!(error.to_string().starts_with("ppo_loss: option"), "{error}");
        }
    }
}

#[test]
fn options_that_need_a_missing_input_are_refused_by_name() {
    let full = rollout(&mut rng(18), 2, 3);
    for (name, options, remove) in missing_inputs() {
        let mut data = full.clone();
        remove(&mut data);
        let tensors = Tensors::new(&data, &Device::Cpu);
        for error in [
            cpu_refuses(&data, &options),
            reference_refuses(&data, &options),
            ppo_loss(&tensors.inputs(), &options).unwrap_err(),
        ] {
            assert!(matches!(&error, Error::Option { option, .. } if *option == name), "{error}");
        }
    }
}

#[test]
fn values_without_returns_and_returns_without_values_are_refused_by_name() {
    let data = rollout(&mut rng(18), 2, 3);
    let options = PpoLossOptions { value_clip_range: None, ..Default::default() };
    for (name, remove) in missing_partners() {
        let mut inputs = data.inputs();
        remove(&mut inputs);
        let error = refuses(&data, inputs, &options);
        assert!(matches!(&error, Error::Missing { arg, .. } if *arg == name), "{error}");
    }
    let tensors = Tensors::new(&data, &Device::Cpu);
    let inputs = PpoLossInputs { returns: None, ..tensors.inputs() };
    let error = ppo_loss(&inputs, &options).unwrap_err();
    assert!(matches!(error, Error::Missing { arg: "returns", .. }), "{error}");
}

#[test]
fn slices_of_the_wrong_length_are_refused_by_name() {
    let full = rollout(&mut rng(19), 2, 3);
    let fails = |data: &Data<f32>, lengths: [Option<usize>; 3], one: [usize; 2], name: &str| {
        let mut out = lengths.map(|n| n.map(|n| vec![0.0; n]));
        let [logp, values, entropy] = out.each_mut().map(|x| x.as_deref_mut());
        let (mut stats, mut loss) = (vec![unwritten(); one[0]], vec![0.0; one[1]]);
        let outputs = Outputs {
            loss: Some(&mut loss),
            grad_logp: logp,
            grad_values: values,
            grad_entropy: entropy,
            ..Outputs::new(&mut stats)
        };
        let options = PpoLossOptions::default();
        let (batch, seq_len) = (data.batch, data.seq_len);
        let error = cpu::ppo_loss(data.inputs(), batch, seq_len, &options, outputs).unwrap_err();
        assert!(matches!(&error, Error::Shape { arg, .. } if *arg == name), "{name}: {error}");
    };
    let (none, one) = ([None; 3], [1, 1]);
    for (name, cut) in wrong_lengths() {
        let mut data = full.clone();
        cut(&mut data);
        fails(&data, none, one, name);
        let error = reference_refuses(&data, &PpoLossOptions::default());
        assert!(matches!(&error, Error::Shape { arg, .. } if *arg == name), "{name}: {error}");
    }
    fails(&full, [Some(5), None, None], one, "grad_logp");
    fails(&full, [None, Some(5), None], one, "grad_values");
    fails(&full, [None, None, Some(5)], one, "grad_entropy");
    fails(&full, none, [0, 1], "stats");
    fails(&full, none, [1, 2], "loss");
    // A gradient for what is not there.
    let mut data = full.clone();
    data.values = None;
    fails(&data, [None, Some(6), None], one, "grad_values");
    data.batch = usize::MAX;
    fails(&data, none, one, "logp");
}

#[test]
fn stored_gradients_are_scaled() {
    let stored = [0.0_f32, 1.5, -2.0, f32::MIN_POSITIVE, -0.0];
    for upstream in [1.0_f32, -0.5, f32::INFINITY, f32::NAN] {
        let scaled = |g: f32| if g == 0.0 { 0.0 } else { g * upstream };
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let want = if upstream == 1.0 { stored } else { stored.map(scaled) };
        let (upstreams, mut to) = ([upstream], [[f32::NAN; 5]; 2]);
        let [logp, entropy] = to.each_mut().map(|x| Some(&mut x[..]));
        let inputs = ScaleInputs {
            stored_logp: Some(&stored),
            stored_entropy: Some(&stored),
            ..ScaleInputs::new(&upstreams)
        };
        let outputs = ScaleOutputs { grad_logp: logp, grad_values: None, grad_entropy: entropy };
        cpu::scale(inputs, 5, outputs).unwrap();
        let mut in_place = stored;
        cpu::scale_in_place(upstream, &mut in_place);
        assert_eq!([bits(&to[0]), bits(&to[1]), bits(&in_place)], [(); 3].map(|()| bits(&want)));
    }
    let mut to = [0.0; 5];
    let inputs = ScaleInputs { stored_logp: Some(&stored), ..ScaleInputs::new(&[1.0]) };
    let outputs = ScaleOutputs { grad_values: Some(&mut to), ..ScaleOutputs::new() };
    let error = cpu::scale(inputs, 5, outputs).unwrap_err();
    assert!(matches!(error, Error::Missing { arg: "grad_logp", needed_by: "stored_logp", .. }));
    let outputs = ScaleOutputs { grad_logp: Some(&mut to[1..]), ..ScaleOutputs::new() };
    let error = cpu::scale(inputs, 5, outputs).unwrap_err();
    assert!(matches!(error, Error::Shape { arg: "grad_logp", .. }));
}

#[test]
fn tensors_of_the_wrong_shape_or_dtype_are_refused_by_name() {
    let data = rollout(&mut rng(20), 2, 3);
    let mut tensors = Tensors::new(&data, &Device::Cpu);
    tensors.mask = Some(Tensor::ones((2, 3), DType::U8, &Device::Cpu).unwrap());
    let options = PpoLossOptions::default();
    let names = [
        "old_logp",
        "advantages",
        "values",
        "old_values",
        "returns",
        "entropy",
        "ref_logp",
        "mask",
    ];
    let narrow = Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap();
    let narrow_mask = narrow.to_dtype(DType::U8).unwrap();
    let double = Tensor::zeros((2, 3), DType::F64, &Device::Cpu).unwrap();
    for name in names {
        let wrong_shape = if name == "mask" { &narrow_mask } else { &narrow };
        for (wrong, is_shape) in [(wrong_shape, true), (&double, false)] {
            let mut inputs = tensors.inputs();
            match name {
                "old_logp" => inputs.old_logp = wrong,
                "advantages" => inputs.advantages = wrong,
                "values" => inputs.values = Some(wrong),
                "old_values" => inputs.old_values = Some(wrong),
                "returns" => inputs.returns = Some(wrong),
                "entropy" => inputs.entropy = Some(wrong),
                "ref_logp" => inputs.ref_logp = Some(wrong),
                _ => inputs.mask = Some(wrong),
            }
            let error = ppo_loss(&inputs, &options).unwrap_err();
            let named = match &error {
                Error::Shape { arg, .. } => is_shape && *arg == name,
                Error::Dtype { arg, .. } => !is_shape && *arg == name,
                _ => false,
            };
            assert!(named, "{name}: {error}");
        }
    }
    let mut inputs = tensors.inputs();
    let flat = Tensor::zeros(6, DType::F32, &Device::Cpu).unwrap();
    inputs.logp = &flat;
    let error = ppo_loss(&inputs, &options).unwrap_err();
    assert!(matches!(error, Error::Shape { arg: "logp", .. }), "{error}");
    inputs.logp = &double;
    let error = ppo_loss(&inputs, &options).unwrap_err();
    assert!(matches!(error, Error::Dtype { arg: "logp", .. }), "{error}");
    // An error of the pass itself keeps its type.
    tensors.mask = Some(Tensor::zeros((2, 3), DType::U8, &Device::Cpu).unwrap());
    let error = ppo_loss(&tensors.inputs(), &options).unwrap_err();
    assert!(matches!(error, Error::Mask { arg: "mask", .. }), "{error}");
}

#[test]
fn statistics_have_one_name_each_and_come_back_as_they_went() {
    let array: [f64; PpoStats::LEN] = std::array::from_fn(|i| i as f64);
    let stats = PpoStats::from_array(array);
    assert_eq!(stats.to_array(), array);
    // The fields by their names, as the derived Debug writes them.
    let fields = PpoStats::NAMES.iter().enumerate().map(|(i, name)| format!("{name}: {i}.0"));
    let fields: Vec<String> = fields.collect();
    assert_eq!(format!("{stats:?}"), format!("PpoStats {{ {} }}", fields.join(", ")));
}
