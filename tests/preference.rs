//! The preference losses: the reference against other projects' losses and its own finite differences, the
//! CPU and the tensor layer against the reference, and what must hold for any input.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::pack::BAD_OFFSETS;
use common::preference_cases::*;
use common::*;
use ppo_kernels::preference::cpu::{self, Outputs, RewardModelInputs, RewardModelOutputs};
use ppo_kernels::preference::{
    preference_loss, reference, reward_model_loss, FDivergence, PreferenceInputs, PreferenceLoss,
    PreferenceOptions, PreferenceStats, RewardModelOptions, RewardModelTensors,
};
use ppo_kernels::{Error, Result};
use rand::rngs::StdRng;
use serde_json::Value;

/// The peers' arithmetic is f64 like the reference's: relative, absolute.
const EXACT: (f64, f64) = (1e-9, 1e-10);

/// The peer computed in f32.
const SINGLE: (f64, f64) = (1e-5, 1e-6);

/// The peer adds 1e-8 to a divisor of 1 or more, once or twice.
const EPSILON: (f64, f64) = (2.1e-8, 1e-10);

/// Everything that the raw layer writes.
fn try_cpu(data: &Data<f32>, options: &PreferenceOptions) -> Result<Found> {
    let (mut stats, mut loss) = ([unwritten()], [f32::NAN]);
    // Filled with NaN, to see that every element is written.
    let room = |n: usize| vec![f32::NAN; n];
    let (mut losses, mut rewards) = (room(data.units()), room(data.rows));
    let tokens = data.seq_len * if data.offsets.is_some() { 1 } else { data.rows };
    let mut grad = room(tokens);
    let outputs = Outputs {
        loss: Some(&mut loss),
        losses: Some(&mut losses),
        rewards: Some(&mut rewards),
        grad_logp: Some(&mut grad),
        ..Outputs::new(&mut stats)
    };
    cpu::preference_loss(data.inputs(), data.rows, data.seq_len, options, outputs)?;
    assert_eq!(loss[0].to_bits(), (stats[0].loss as f32).to_bits());
    Ok(Found { stats: stats[0], losses, rewards, grad })
}

fn run_cpu(data: &Data<f32>, options: &PreferenceOptions) -> Found {
    try_cpu(data, options).unwrap()
}

/// What the raw layer says against rows, and the reference too.
fn refused(data: &Data<f32>, options: &PreferenceOptions) -> Error {
    let mut stats = [unwritten()];
    let outputs = Outputs::new(&mut stats);
    let of_cpu = cpu::preference_loss(data.inputs(), data.rows, data.seq_len, options, outputs);
    assert_eq!(stats[0], unwritten());
    let wide = data.map(f64::from);
    let of_reference = reference::preference_loss(&wide.inputs(), data.rows, data.seq_len, options);
    let of_cpu = of_cpu.unwrap_err();
    assert_eq!(of_reference.unwrap_err().to_string(), of_cpu.to_string());
    of_cpu
}

// ---- other projects' vectors ----

#[track_caller]
fn expect(case: &Golden, key: &str, ours: &[f64], want: &[f64], (rel, abs): (f64, f64)) {
    assert_close(&format!("{} {key}", case.id), ours, want, rel, abs);
}

fn last_of(case: &Golden) -> &str {
    case.function.rsplit('.').next().unwrap()
}

fn loss_named(name: &str) -> PreferenceLoss {
    match name {
        "sigmoid" | "sft" => PreferenceLoss::Sigmoid,
        "robust" => PreferenceLoss::Robust,
        "hinge" => PreferenceLoss::Hinge,
        "ipo" => PreferenceLoss::Ipo,
        "sigmoid_norm" => PreferenceLoss::SigmoidNorm,
        "exo_pair" => PreferenceLoss::ExoPair,
        "nca_pair" => PreferenceLoss::NcaPair,
        "bco_pair" => PreferenceLoss::BcoPair,
        "sppo_hard" => PreferenceLoss::SppoHard,
        "apo_zero" => PreferenceLoss::ApoZero,
        "apo_down" => PreferenceLoss::ApoDown,
        "discopop" => PreferenceLoss::Discopop,
        "aot" => PreferenceLoss::Aot,
        // The latter is the older name.
        "aot_unpaired" | "aot_pair" => PreferenceLoss::AotUnpaired,
        other => panic!("{other}"),
    }
}

/// Tokens of TRL's trainers, with the mask of those that are predicted.
fn trl_tokens(case: &Golden) -> Data<f64> {
    let shape = case.shape("per_token_logps");
    let mask = case.mask("completion_mask");
    let shifted = mask.chunks(shape[1] + 1).flat_map(|row| row[1..].to_vec()).collect();
    Data {
        rows: shape[0],
        seq_len: shape[1],
        logp: case.input("per_token_logps"),
        mask: Some(shifted),
        ..Default::default()
    }
}

/// A gradient with 0 where the mask is 0: TRL's trainers zero the tokens there before what is differentiated
/// here, and let it flow to all.
fn kept(data: &Data<f64>, mut grad: Vec<f64>) -> Vec<f64> {
    for (g, _) in grad.iter_mut().zip(data.mask.iter().flatten()).filter(|(_, &m)| m == 0) {
        *g = 0.0;
    }
    grad
}

fn add(to: &mut [f64], factor: f64, from: &[f64]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += factor * from;
    }
}

#[test]
fn reference_equals_trl_dpo() {
    let mut ran = 0;
    for case in golden("preference") {
        if !case.inputs.contains_key("loss_types") {
            continue;
        }
        let mut data = trl_tokens(&case);
        let pairs = data.rows / 2;
        data.ref_sums =
            Some([case.input("ref_chosen_logps"), case.input("ref_rejected_logps")].concat());
        if case.inputs["use_weighting"] == true {
            // WPO: of each pair e to the mean of logp - ln Σ p², of both responses.
            let (mask, norm) = (data.mask.clone().unwrap(), case.input("log_sum_sq_probs"));
            let mean = |row: usize| {
                let kept = (row * data.seq_len..(row + 1) * data.seq_len).filter(|&t| mask[t] != 0);
                let all: Vec<f64> = kept.map(|t| data.logp[t] - norm[t]).collect();
                all.iter().sum::<f64>() / all.len() as f64
            };
            data.weights = Some((0..pairs).map(|i| (mean(i) + mean(i + pairs)).exp()).collect());
        }
        let f_divergence = match case.text("f_divergence_type") {
            "reverse_kl" => FDivergence::ReverseKl,
            "forward_kl" => FDivergence::ForwardKl,
            "js_divergence" => FDivergence::JensenShannon,
            "alpha_divergence" => FDivergence::Alpha(case.number("f_alpha_divergence_coef")),
            other => panic!("{other}"),
        };
        let names = case.inputs["loss_types"].as_array().unwrap();
        let weights = match &case.inputs["loss_weights"] {
            Value::Null => vec![1.0; names.len()],
            weights => flatten(weights),
        };
        let (mut loss, mut grad) = (0.0, vec![0.0; data.logp.len()]);
        let mut first = None;
        for (name, weight) in names.iter().zip(weights) {
            let name = name.as_str().unwrap();
            let kind = loss_named(name);
            // TRL has no label smoothing in its sigmoid loss.
            let smoothed = ["robust", "exo_pair", "aot", "aot_unpaired"].contains(&name);
            let options = PreferenceOptions {
                beta: case.number("beta"),
                label_smoothing: if smoothed { case.number("label_smoothing") } else { 0.0 },
                average_log_prob: kind == PreferenceLoss::Ipo,
                discopop_tau: case.number("discopop_tau"),
                f_divergence,
                ld_alpha: case.optional("ld_alpha"),
                loss: kind,
                ..Default::default()
            };
            let ours = run(&data, &options);
            if name == "sft" {
                let with = run(&data, &PreferenceOptions { sft_coef: 1.0, ..options });
                loss += weight * with.stats.sft_loss;
                add(&mut grad, weight, &with.grad);
                add(&mut grad, -weight, &ours.grad);
            } else {
                loss += weight * ours.stats.loss;
                add(&mut grad, weight, &ours.grad);
            }
            first.get_or_insert((kind, ours.stats));
        }
        let tolerance = if case.dtype == "float32" { SINGLE } else { EXACT };
        expect(&case, "loss", &[loss], &case.output("loss"), tolerance);
        expect(&case, "grad", &grad, &kept(&data, case.output("grad_per_token_logps")), tolerance);
        let (kind, stats) = first.unwrap();
        let metric = |key: &str| flatten(&case.outputs["metrics"][key]);
        expect(&case, "logps/chosen", &[stats.chosen_logp], &metric("logps/chosen"), tolerance);
        let want = metric("logps/rejected");
        expect(&case, "logps/rejected", &[stats.rejected_logp], &want, tolerance);
        // TRL's rewards are of sums also where the loss averages.
        if !matches!(kind, PreferenceLoss::Ipo | PreferenceLoss::SigmoidNorm) {
            for (key, ours) in [
                ("rewards/chosen", stats.chosen_reward),
                ("rewards/rejected", stats.rejected_reward),
                ("rewards/accuracies", stats.accuracy),
                ("rewards/margins", stats.reward_margin),
            ] {
                expect(&case, key, &[ours], &metric(key), tolerance);
            }
        }
        ran += 1;
    }
    assert_eq!(ran, 24);
}

#[test]
fn reference_equals_trl_and_liger_kto() {
    let mut ran = 0;
    for case in golden("preference") {
        if !case.inputs.contains_key("labels") {
            continue;
        }
        let labels = case.mask("labels");
        let (mut data, grad) = if case.peer == "liger" {
            let logp = case.input("logps");
            let rows = logp.len();
            (Data { rows, seq_len: 1, logp, ..Default::default() }, "grad_logps")
        } else {
            (trl_tokens(&case), "grad_per_token_logps")
        };
        data.labels = Some(labels.clone());
        data.ref_sums = Some(case.input("ref_logps"));
        data.kl = match case.inputs.get("KL_logps") {
            Some(Value::Array(_)) => {
                let (policy, reference) = (case.input("KL_logps"), case.input("ref_KL_logps"));
                let sum: f64 = policy.iter().zip(reference).map(|(a, b)| a - b).sum();
                Some(vec![(sum / policy.len() as f64).max(0.0)])
            }
            _ => case.optional("kl").map(|kl| vec![kl]),
        };
        let weight = |key: &str| case.optional(key).unwrap_or(1.0);
        let options = PreferenceOptions {
            loss: PreferenceLoss::Kto,
            beta: case.number("beta"),
            desirable_weight: weight("desirable_weight"),
            undesirable_weight: weight("undesirable_weight"),
            ..Default::default()
        };
        let ours = run(&data, &options);
        expect(&case, "loss", &[ours.stats.loss], &case.output("loss"), EXACT);
        expect(&case, grad, &ours.grad, &kept(&data, case.output(grad)), EXACT);
        let stats = ours.stats;
        for (key, ours, sum) in [
            ("rewards/chosen", stats.chosen_reward, stats.chosen),
            ("rewards/rejected", stats.rejected_reward, stats.rejected),
            ("logps/chosen", stats.chosen_logp, 1.0),
            ("logps/rejected", stats.rejected_logp, 1.0),
            ("rewards/margins", stats.reward_margin, 1.0),
        ] {
            if case.peer == "liger" {
                let sums = ["chosen_rewards_sum", "rejected_rewards_sum"];
                if let Some(side) = key.strip_prefix("rewards/").filter(|side| *side != "margins") {
                    let key = sums[usize::from(side == "rejected")];
                    expect(&case, key, &[ours * sum], &case.output(key), EXACT);
                }
                continue;
            }
            // TRL has no metric of a class without responses.
            match case.outputs["metrics"].get(key) {
                Some(want) => expect(&case, key, &[ours], &flatten(want), EXACT),
                None => assert!(ours.is_nan(), "{} {key}", case.id),
            }
        }
        ran += 1;
    }
    assert_eq!(ran, 10);
}

/// Asserts that the losses of pairs of sums, with an upstream gradient for each, are the case's.
#[track_caller]
fn expect_pairs(case: &Golden, mut data: Data<f64>, options: PreferenceOptions) {
    let pairs = data.rows / 2;
    let tolerance = if case.dtype == "float32" { SINGLE } else { EXACT };
    let plain = run(&data, &options);
    // The sign is the trainer's business in TRL's ORPO.
    let sign = if options.loss == PreferenceLoss::Orpo { -1.0 } else { 1.0 };
    let losses: Vec<f64> = plain.losses.iter().map(|loss| sign * loss).collect();
    expect(case, "losses", &losses, &case.output("losses"), tolerance);
    // Of a loss without a reference the older TRL's rewards are still with one.
    if case.inputs.get("reference_free") != Some(&Value::Bool(true)) {
        let rewards = [case.output("chosen_rewards"), case.output("rejected_rewards")].concat();
        expect(case, "rewards", &plain.rewards, &rewards, tolerance);
    }

    data.weights = Some(case.input("grad_out").iter().map(|g| sign * g).collect());
    let weighted = run(&data, &PreferenceOptions { denominator: Some(1.0), ..options });
    let (chosen, rejected) = weighted.grad.split_at(pairs);
    let want = case.output("grad_policy_chosen_logps");
    expect(case, "grad_policy_chosen_logps", chosen, &want, tolerance);
    let want = case.output("grad_policy_rejected_logps");
    expect(case, "grad_policy_rejected_logps", rejected, &want, tolerance);
}

/// Sums of chosen and rejected responses.
fn policy_sums(case: &Golden) -> Data<f64> {
    let logp = [case.input("policy_chosen_logps"), case.input("policy_rejected_logps")].concat();
    Data { rows: logp.len(), seq_len: 1, logp, ..Default::default() }
}

#[test]
fn reference_equals_trl_cpo_simpo_alphapo_and_orpo() {
    let mut ran = 0;
    for case in golden("preference") {
        let base = PreferenceOptions {
            beta: case.number("beta"),
            label_smoothing: case.optional("label_smoothing").unwrap_or(0.0),
            ..Default::default()
        };
        let options = match last_of(&case) {
            "cpo_loss" => {
                let (alpha, name) = (case.number("alpha"), case.text("loss_type"));
                let loss = match (alpha != 0.0, name) {
                    (true, _) => PreferenceLoss::AlphaPo,
                    (false, "simpo") => PreferenceLoss::SimPo,
                    (false, "sigmoid") => PreferenceLoss::Cpo,
                    (false, name) => loss_named(name),
                };
                let gamma = if name == "simpo" { case.number("simpo_gamma") } else { 0.0 };
                PreferenceOptions { loss, alpha, gamma, ..base }
            }
            "odds_ratio_loss" => PreferenceOptions { loss: PreferenceLoss::Orpo, ..base },
            _ => continue,
        };
        expect_pairs(&case, policy_sums(&case), options);
        ran += 1;
    }
    assert_eq!(ran, 10);
}

#[test]
fn reference_equals_older_trl_dpo() {
    let mut ran = 0;
    for case in golden("dpo").iter().filter(|case| case.peer == "trl-v0.11.4") {
        let mut data = policy_sums(case);
        if case.inputs["reference_free"] == false {
            let (chosen, rejected) = ("reference_chosen_logps", "reference_rejected_logps");
            data.ref_sums = Some([case.input(chosen), case.input(rejected)].concat());
        }
        let options = PreferenceOptions {
            loss: loss_named(case.text("loss_type")),
            beta: case.number("beta"),
            label_smoothing: case.number("label_smoothing"),
            ..Default::default()
        };
        if options.loss.sorts() {
            // There losses are in order of rank, here in that of the pairs.
            let sorted = |mut x: Vec<f64>| {
                x.sort_by(f64::total_cmp);
                x
            };
            let ours = sorted(run(&data, &options).losses);
            expect(case, "losses", &ours, &sorted(case.output("losses")), EXACT);
        } else {
            expect_pairs(case, data, options);
        }
        ran += 1;
    }
    assert_eq!(ran, 42);
}

#[test]
fn reference_equals_openrlhf_dpo() {
    let mut ran = 0;
    for case in golden("dpo").iter().filter(|case| case.peer == "openrlhf") {
        let mut data = policy_sums(case);
        let (chosen, rejected) = ("reference_chosen_logps", "reference_rejected_logps");
        data.ref_sums = Some([case.input(chosen), case.input(rejected)].concat());
        let ipo = case.inputs["ipo"] == true;
        let options = PreferenceOptions {
            loss: if ipo { PreferenceLoss::Ipo } else { PreferenceLoss::Sigmoid },
            beta: case.number("beta"),
            label_smoothing: case.number("label_smoothing"),
            ..Default::default()
        };
        let ours = run(&data, &options);
        expect(case, "loss", &[ours.stats.loss], &case.output("loss"), EXACT);
        let (chosen, rejected) = ("grad_policy_chosen_logps", "grad_policy_rejected_logps");
        let want = [case.output(chosen), case.output(rejected)].concat();
        expect(case, "grad", &ours.grad, &want, EXACT);
        let want = [case.output("chosen_rewards"), case.output("rejected_rewards")].concat();
        expect(case, "rewards", &ours.rewards, &want, EXACT);
        ran += 1;
    }
    assert_eq!(ran, 9);
}

#[test]
fn reference_equals_nemo_dpo() {
    let mut ran = 0;
    for case in golden("dpo").iter().filter(|case| case.peer == "nemo-rl") {
        let [rows, seq_len] = case.shape("next_token_logprobs")[..] else { panic!() };
        // Its rows alternate.
        let order: Vec<usize> = (0..rows).step_by(2).chain((1..rows).step_by(2)).collect();
        let rows_of = |values: &[f64], width: usize, first: usize| -> Vec<f64> {
            let row = |&row: &usize| values[row * width + first..][..seq_len].to_vec();
            order.iter().flat_map(row).collect()
        };
        let mask = rows_of(&case.input("token_mask"), seq_len + 1, 1);
        let reference = rows_of(&case.input("reference_policy_logprobs"), seq_len + 1, 0);
        let data = Data {
            rows,
            seq_len,
            logp: rows_of(&case.input("next_token_logprobs"), seq_len, 0),
            ref_logp: Some(reference),
            mask: Some(mask.iter().map(|&m| u8::from(m != 0.0)).collect()),
            ..Default::default()
        };
        let option = |key: &str| case.inputs["options"].get(key);
        let options = PreferenceOptions {
            beta: option("reference_policy_kl_penalty").unwrap().as_f64().unwrap(),
            average_log_prob: option("preference_average_log_probs") == Some(&Value::Bool(true)),
            ..Default::default()
        };
        let ours = run(&data, &options);
        let metric = |key: &str| flatten(&case.outputs["metrics"][key]);
        for (key, ours) in [
            ("preference_loss", ours.stats.preference_loss),
            ("accuracy", ours.stats.accuracy),
            // Log-ratios, before the scale.
            ("rewards_chosen_mean", ours.stats.chosen_reward / options.beta),
            ("rewards_rejected_mean", ours.stats.rejected_reward / options.beta),
        ] {
            expect(case, key, &[ours], &metric(key), EPSILON);
        }
        // Its likelihood term is a mean of rows' means: -w / n of each token of a chosen row.
        let weight = option("sft_loss_weight").map_or(0.0, |weight| weight.as_f64().unwrap());
        let mut grad = ours.grad.clone();
        for (row, grad) in grad.chunks_mut(seq_len).take(rows / 2).enumerate() {
            let mask = &mask[row * seq_len..][..seq_len];
            let by_token = weight / mask.iter().sum::<f64>() / (rows / 2) as f64;
            grad.iter_mut().zip(mask).for_each(|(g, m)| *g -= m * by_token);
        }
        let want = rows_of(&case.output("grad_next_token_logprobs"), seq_len, 0);
        expect(case, "grad", &grad, &want, EPSILON);
        ran += 1;
    }
    assert_eq!(ran, 2);
}

#[test]
fn reference_equals_trl_dpo_from_logits() {
    let mut ran = 0;
    for case in golden("dpo").iter().filter(|case| case.inputs.contains_key("logits")) {
        let [rows, length, vocab] = case.shape("logits")[..] else { panic!() };
        let (logits, ids) = (case.input("logits"), case.input("input_ids"));
        let mask = case.mask("completion_mask");
        let seq_len = length - 1;
        let (mut logp, mut kept, mut softmax) = (Vec::new(), Vec::new(), Vec::new());
        for row in 0..rows {
            for t in 0..seq_len {
                let z = &logits[(row * length + t) * vocab..][..vocab];
                let sum: f64 = z.iter().map(|z| z.exp()).sum();
                let target = ids[row * length + t + 1] as usize;
                logp.push(z[target] - sum.ln());
                kept.push(mask[row * length + t + 1]);
                softmax.push((target, z.iter().map(|z| z.exp() / sum).collect::<Vec<f64>>()));
            }
        }
        let reference = [case.input("ref_chosen_logps"), case.input("ref_rejected_logps")].concat();
        let (mask, ref_sums) = (Some(kept), Some(reference));
        let data = Data { rows, seq_len, logp, mask, ref_sums, ..Default::default() };
        let loss = loss_named(case.text("loss_type"));
        let options = PreferenceOptions {
            loss,
            beta: case.number("beta"),
            label_smoothing: case.number("label_smoothing"),
            average_log_prob: loss == PreferenceLoss::Ipo,
            ..Default::default()
        };
        let ours = run(&data, &options);
        expect(case, "loss", &[ours.stats.loss], &case.output("loss"), EXACT);
        let mut grad = vec![0.0; logits.len()];
        for (t, (target, p)) in softmax.iter().enumerate() {
            let at = (t / seq_len * length + t % seq_len) * vocab;
            for (v, p) in p.iter().enumerate() {
                let one = if v == *target { 1.0 } else { 0.0 };
                grad[at + v] = ours.grad[t] * (one - p);
            }
        }
        expect(case, "grad_logits", &grad, &case.output("grad_logits"), EXACT);
        ran += 1;
    }
    assert_eq!(ran, 5);
}

#[test]
fn reference_equals_the_peers_reward_model_losses() {
    let mut ran = 0;
    for case in golden("reward_model") {
        let of = |names: &[&str]| {
            let name = names.iter().find(|name| case.inputs.contains_key(**name)).unwrap();
            case.input(name)
        };
        let nemo = case.peer == "nemo-rl";
        let by_side = |alternating: Vec<f64>| -> Vec<f64> {
            let side = |from: usize| alternating.iter().skip(from).step_by(2).copied();
            side(0).chain(side(1)).collect()
        };
        let rewards = if nemo {
            by_side(case.input("rewards"))
        } else {
            [of(&["chosen_reward", "rewards_chosen"]), of(&["reject_reward", "rewards_rejected"])]
                .concat()
        };
        let margin = match case.inputs.get("margin") {
            Some(Value::Array(_)) => Some(case.input("margin")),
            _ => None,
        };
        let options = RewardModelOptions {
            center_coef: case.optional("center_rewards_coefficient").unwrap_or(0.0),
            denominator: None,
        };
        let inputs = reference::RewardModelInputs {
            margin: margin.as_deref(),
            ..reference::RewardModelInputs::new(&rewards)
        };
        let ours = reference::reward_model_loss(&inputs, rewards.len() / 2, &options).unwrap();
        let tolerance = if nemo { EPSILON } else { EXACT };
        expect(&case, "loss", &[ours.stats.loss], &case.output("loss"), tolerance);
        let want = if nemo {
            by_side(case.output("grad_rewards"))
        } else {
            let rejected = if case.peer == "openrlhf" { "grad_reject" } else { "grad_rejected" };
            [case.output("grad_chosen"), case.output(rejected)].concat()
        };
        expect(&case, "grad", &ours.grad, &want, tolerance);
        if case.outputs.contains_key("accuracy") {
            let want = case.output("accuracy");
            expect(&case, "accuracy", &[ours.stats.accuracy], &want, (1e-7, 0.0));
            let want = case.output("mean_margin");
            expect(&case, "mean_margin", &[ours.stats.reward_margin], &want, EXACT);
        }
        ran += 1;
    }
    assert_eq!(ran, 15);
}

// ---- the reference by itself ----

#[test]
fn reference_gradient_is_the_derivative_of_the_reference() {
    let mut rng = rng(1);
    for (name, options) in option_sets() {
        let data = responses(&mut rng, 6, 7, &options).map(f64::from);
        let mask = data.mask.clone().unwrap();
        let ours = run(&data, &options);
        let logp = data.logp.clone();
        let numeric = finite_difference(&logp, |x| {
            run(&Data { logp: x.to_vec(), ..data.clone() }, &options).stats.loss
        });
        let largest = numeric.iter().fold(1.0_f64, |m, g| m.max(g.abs()));
        assert_close(&name, &ours.grad, &numeric, 1e-6, 1e-8 * largest);
        assert!(ours.grad.iter().zip(&mask).all(|(&g, &m)| m != 0 || g == 0.0), "{name}");
        assert!(ours.grad.iter().any(|&g| g != 0.0), "{name}");
    }
}

#[test]
fn reward_model_gradient_is_the_derivative() {
    let rewards = Rewards::new(&mut rng(2), 9);
    for options in reward_model_options() {
        let [margin, weights] =
            [&rewards.margin, &rewards.weights].map(|x| wide(x.as_deref().unwrap()));
        let at = |x: &[f64]| {
            let inputs = reference::RewardModelInputs {
                margin: Some(&margin),
                weights: Some(&weights),
                ..reference::RewardModelInputs::new(x)
            };
            reference::reward_model_loss(&inputs, 9, &options).unwrap()
        };
        let x = wide(&rewards.rewards);
        let numeric = finite_difference(&x, |x| at(x).stats.loss);
        assert_close("reward model", &at(&x).grad, &numeric, 1e-6, 1e-9);
    }
}

#[test]
fn what_can_be_checked_by_eye() {
    // A pair of log-ratios 3 and -1, averages 1.5 and -0.5.
    let data = Data::<f64> {
        rows: 2,
        seq_len: 3,
        logp: vec![-1.0, -1.0, f64::NAN, -2.0, f64::NAN, -2.0],
        ref_logp: Some(vec![-2.0, -3.0, f64::NAN, -1.5, f64::NAN, -1.5]),
        mask: Some(vec![1, 1, 0, 1, 0, 1]),
        ..Default::default()
    };
    let options = PreferenceOptions { beta: 0.5, ..Default::default() };
    let found = run(&data, &options);
    let p = 1.0 / (1.0 + 2.0_f64.exp());
    assert_close("loss", &[found.stats.loss], &[-(1.0 - p).ln()], 1e-15, 0.0);
    let g = 0.5 * p;
    assert_close("grad", &found.grad, &[-g, -g, 0.0, g, 0.0, g], 1e-14, 0.0);
    assert_eq!(found.rewards, [1.5, -0.5]);
    let stats = found.stats;
    assert_eq!((stats.chosen_logp, stats.rejected_logp), (-2.0, -4.0));
    assert_eq!((stats.accuracy, stats.reward_margin), (1.0, 2.0));
    assert_eq!((stats.sft_loss, stats.chosen, stats.rejected), (1.0, 1.0, 1.0));
    let hinge = PreferenceOptions { loss: PreferenceLoss::Hinge, beta: 0.125, ..options };
    assert_eq!(run(&data, &hinge).stats.loss, 0.5);
    let average = PreferenceOptions { average_log_prob: true, ..hinge };
    assert_eq!(run(&data, &average).grad, [-0.0625, -0.0625, 0.0, 0.0625, 0.0, 0.0625]);
}

#[test]
fn tokens_that_the_shorter_response_does_not_have_are_discounted() {
    // The third of its kept tokens is one of the longer response alone.
    let data = Data::<f64> {
        rows: 2,
        seq_len: 4,
        logp: vec![-1.0, -2.0, -4.0, -8.0, -1.0, -1.0, -1.0, -1.0],
        mask: Some(vec![1, 0, 1, 1, 0, 1, 1, 0]),
        ..Default::default()
    };
    let options = PreferenceOptions { ld_alpha: Some(0.25), ..Default::default() };
    let found = run(&data, &options);
    assert_eq!((found.stats.chosen_logp, found.stats.rejected_logp), (-7.0, -2.0));
    let ratios: Vec<f64> = found.grad.iter().map(|g| g / found.grad[0].abs()).collect();
    assert_eq!(ratios, [-1.0, 0.0, -1.0, -0.25, 0.0, 1.0, 1.0, 0.0]);
}

// ---- the CPU ----

#[track_caller]
fn check_cpu(what: &str, data: &Data<f32>, options: &PreferenceOptions) {
    check(what, data, options, &run_cpu(data, options));
}

/// Around the boundaries of lanes, of leaves of rows and of pairs.
const SHAPES: [(usize, usize); 6] = [(2, 1), (6, 5), (10, 16), (8, 700), (4, 5001), (1030, 17)];

#[test]
fn cpu_agrees_with_the_reference_for_every_option_and_shape() {
    let mut rng = rng(3);
    for (name, options) in option_sets() {
        for (rows, seq_len) in SHAPES {
            // The reference sorts, but it is no faster than it reads.
            if rows > 1000 && options.ld_alpha.is_some() && !options.loss.sorts() {
                continue;
            }
            let mut data = responses(&mut rng, rows, seq_len, &options);
            let what = format!("{name} [{rows}, {seq_len}]");
            check_cpu(&what, &data, &options);
            data.mask = None;
            check_cpu(&format!("{what} unmasked"), &data, &options);
            if let Some(reference) = data.ref_logp.take() {
                // Without one, exponentials of long sums are none of f32's.
                if options.f_divergence == FDivergence::ReverseKl || seq_len < 20 {
                    check_cpu(&format!("{what} without a reference"), &data, &options);
                }
                let sum = |row: &[f32]| row.iter().sum::<f32>();
                data.ref_sums = Some(reference.chunks(seq_len).map(sum).collect());
                check_cpu(&format!("{what} reference sums"), &data, &options);
            }
        }
    }
}

#[test]
fn cpu_agrees_with_the_reference_on_sums() {
    let mut rng = rng(4);
    for (name, options) in option_sets() {
        for rows in [2, 30, 514, 4098] {
            let data = sums(&mut rng, rows, &options);
            check_cpu(&format!("{name} {rows} sums"), &data, &options);
        }
    }
}

#[test]
fn cpu_agrees_with_the_reference_on_rewards() {
    let mut rng = rng(5);
    for pairs in [1, 5, 256, 1025] {
        let rewards = Rewards::new(&mut rng, pairs);
        for options in reward_model_options() {
            let (mut stats, mut loss) = ([unwritten()], [f32::NAN]);
            let (mut losses, mut grad) = (vec![f32::NAN; pairs], vec![f32::NAN; 2 * pairs]);
            let inputs = RewardModelInputs {
                margin: rewards.margin.as_deref(),
                weights: rewards.weights.as_deref(),
                ..RewardModelInputs::new(&rewards.rewards)
            };
            let outputs = RewardModelOutputs {
                loss: Some(&mut loss),
                losses: Some(&mut losses),
                grad_rewards: Some(&mut grad),
                ..RewardModelOutputs::new(&mut stats)
            };
            cpu::reward_model_loss(inputs, pairs, &options, outputs).unwrap();
            let want = rewards.run(&options);
            assert_stats_close("rewards", &stats[0], &want.stats);
            assert_close_scaled("losses", &losses, &want.losses);
            assert_close_scaled("grad", &grad, &want.grad);
            assert_eq!(loss[0].to_bits(), (stats[0].loss as f32).to_bits());
        }
    }
}

#[test]
fn what_does_not_count_may_hold_nan_and_gets_zero() {
    let mut rng = rng(6);
    for (name, options) in option_sets() {
        let mut data = responses(&mut rng, 12, 33, &options);
        if let Some(weights) = &mut data.weights {
            weights[2] = 0.0;
        }
        let found = run_cpu(&data, &options);
        check(&name, &data, &options, &found);
        let with_nan = run_cpu(&with_nan_where_nothing_counts(&data), &options);
        assert_eq!(with_nan.bits(), found.bits(), "{name}");
        let mask = data.mask.unwrap();
        let masked = found.grad.iter().zip(mask).filter(|(_, m)| *m == 0);
        assert!(masked.into_iter().all(|(g, _)| g.to_bits() == 0), "{name}");
    }
}

#[test]
fn a_pair_of_weight_zero_is_as_if_it_were_not_there() {
    let mut rng = rng(7);
    for loss in PreferenceLoss::ALL.into_iter().filter(|&loss| !loss.sorts()) {
        let options = PreferenceOptions { sft_coef: 0.0, ..plain(loss) };
        let mut data = responses(&mut rng, 8, 9, &options);
        let units = data.units();
        data.weights.as_mut().unwrap()[units - 1] = 0.0;
        let all = run_cpu(&data, &options);
        // Without the last unit.
        let keep: Vec<usize> = (0..8).filter(|row| row % units != units - 1).collect();
        let rows = |x: &[f32]| keep.iter().flat_map(|&r| x[r * 9..][..9].to_vec()).collect();
        let bytes = |x: &[u8]| keep.iter().flat_map(|&r| x[r * 9..][..9].to_vec()).collect();
        let short = |x: &Vec<f32>| x[..units - 1].to_vec();
        let rest = Data {
            rows: keep.len(),
            seq_len: 9,
            logp: rows(&data.logp),
            ref_logp: data.ref_logp.as_deref().map(rows),
            mask: data.mask.as_deref().map(bytes),
            weights: data.weights.as_ref().map(short),
            margin: data.margin.as_ref().map(short),
            labels: data.labels.as_ref().map(|labels| labels[..units - 1].to_vec()),
            kl: data.kl.clone(),
            ..Default::default()
        };
        let some = run_cpu(&rest, &options);
        let array = |found: &Found| found.stats.to_array().map(f64::to_bits);
        assert_eq!(array(&all), array(&some), "{loss:?}");
        let grad: Vec<f32> = rows(&all.grad);
        assert_eq!(grad, some.grad, "{loss:?}");
    }
}

#[test]
fn nan_in_a_token_that_counts_reaches_the_loss() {
    for loss in PreferenceLoss::ALL {
        let options = plain(loss);
        let mut data = responses(&mut rng(8), 6, 20, &options);
        data.mask = None;
        for token in [0, 65, 119] {
            let mut data = data.clone();
            data.logp[token] = f32::NAN;
            let found = run_cpu(&data, &options);
            assert!(found.stats.loss.is_nan(), "{loss:?} {token}");
        }
    }
}

#[test]
fn far_log_ratios_come_out_as_in_the_reference() {
    let far = [500.0, -500.0, 90.0, -90.0, 0.0, 20.0, -20.0, 1e4];
    // What exponentials of them are in f32.
    let near = [30.0, -30.0, 9.0, -9.0, 0.0, 2.0, -2.0, 20.0];
    for (name, options) in option_sets() {
        let mut data = sums(&mut rng(9), 16, &options);
        if options.loss == PreferenceLoss::Orpo {
            continue; // of probabilities, which are below 1
        }
        let is_exponential = options.f_divergence != FDivergence::ReverseKl;
        let ratios = match is_exponential || options.loss == PreferenceLoss::AlphaPo {
            true => near,
            false => far,
        };
        data.lengths = None;
        data.logp = ratios.iter().chain(ratios.iter().rev()).copied().collect();
        data.ref_sums = data.ref_sums.map(|_| vec![0.0; 16]);
        let want = run(&data.map(f64::from), &options);
        let found = run_cpu(&data, &options);
        assert_close_scaled(&format!("{name} losses"), &found.losses, &want.losses);
        assert_close_scaled(&format!("{name} grad"), &found.grad, &want.grad);
    }
    // One that is not finite.
    let mut data = sums(&mut rng(9), 2, &plain(PreferenceLoss::Sigmoid));
    data.logp[0] = f32::NEG_INFINITY;
    let found = run_cpu(&data, &PreferenceOptions::default());
    assert_eq!(found.stats.loss, f64::INFINITY);
    assert_eq!(found.grad.iter().map(|g| g.abs()).sum::<f32>(), 0.2 * data.weights.unwrap()[0]);
}

#[test]
fn sums_of_many_tokens_keep_their_digits() {
    // Sums of some -80,000, whose difference is what counts; exact in f64.
    let (rows, seq_len) = (2, 60_000);
    let step = |i: usize| ((i * 7) % 64) as f32 / 64.0;
    let logp: Vec<f32> = (0..rows * seq_len).map(|i| -1.0 - step(i)).collect();
    let near = |(i, x): (usize, &f32)| x + (step(3 * i) - 0.5) / 4096.0;
    let reference = logp.iter().enumerate().map(near).collect();
    let data = Data { rows, seq_len, logp, ref_logp: Some(reference), ..Default::default() };
    let found = run_cpu(&data, &PreferenceOptions::default());
    let want = run(&data.map(f64::from), &PreferenceOptions::default());
    assert_close("rewards", &wide(&found.rewards), &want.rewards, 1e-7, 0.0);
    assert_close("loss", &[found.stats.loss], &[want.stats.loss], 1e-7, 0.0);
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let mut rng = rng(10);
    for loss in PreferenceLoss::ALL {
        let options = plain(loss);
        for data in [responses(&mut rng, 1500, 40, &options), sums(&mut rng, 3000, &options)] {
            let found = |threads| with_threads(threads, || run_cpu(&data, &options)).bits();
            let alone = found(1);
            for threads in [2, 3, 8] {
                assert_eq!(found(threads), alone, "{loss:?}");
            }
        }
    }
}

#[test]
fn parts_with_the_whole_denominators_add_up_to_the_whole() {
    let mut rng = rng(11);
    for loss in
        PreferenceLoss::ALL.into_iter().filter(|&loss| !loss.sorts() && loss != PreferenceLoss::Kto)
    {
        let options = PreferenceOptions { sft_coef: 0.3, ..plain(loss) };
        let (pairs, seq_len) = (5, 13);
        let mut data = responses(&mut rng, 2 * pairs, seq_len, &options);
        data.weights.as_mut().unwrap()[3] = 0.0;
        let whole = run_cpu(&data, &options);
        let mask = data.mask.as_ref().unwrap();
        let of_chosen = (0..pairs).filter(|&i| i != 3);
        let tokens: usize = of_chosen
            .map(|i| mask[i * seq_len..][..seq_len].iter().filter(|&&m| m != 0).count())
            .sum();
        let given = PreferenceOptions {
            denominator: Some(4.0),
            sft_denominator: Some(tokens as f64),
            ..options
        };
        let (mut loss_sum, mut grad) = (0.0, vec![0.0; whole.grad.len()]);
        for i in 0..pairs {
            let both = |x: &[f32]| {
                [i, i + pairs].map(|row| x[row * seq_len..][..seq_len].to_vec()).concat()
            };
            let part = Data {
                rows: 2,
                seq_len,
                logp: both(&data.logp),
                ref_logp: data.ref_logp.as_deref().map(both),
                mask: Some(
                    [i, i + pairs].map(|r| mask[r * seq_len..][..seq_len].to_vec()).concat(),
                ),
                weights: data.weights.as_ref().map(|x| vec![x[i]]),
                margin: data.margin.as_ref().map(|x| vec![x[i]]),
                ..Default::default()
            };
            let found = run_cpu(&part, &given);
            loss_sum += found.stats.loss;
            grad[i * seq_len..][..seq_len].copy_from_slice(&found.grad[..seq_len]);
            grad[(i + pairs) * seq_len..][..seq_len].copy_from_slice(&found.grad[seq_len..]);
        }
        assert_close("loss", &[loss_sum], &[whole.stats.loss], 1e-6, 1e-6);
        assert_eq!(grad, whole.grad, "{loss:?}");
    }
}

#[test]
fn a_batch_without_pairs_needs_a_denominator() {
    for loss in PreferenceLoss::ALL {
        let options = plain(loss);
        for (rows, seq_len) in [(0, 0), (0, 5)] {
            let labels = (loss == PreferenceLoss::Kto).then(Vec::new);
            let data = Data::<f32> { rows, seq_len, labels, ..Default::default() };
            let error = refused(&data, &options);
            assert!(matches!(error, Error::Mask { arg: "logp", .. }), "{error}");
            let options = PreferenceOptions { denominator: Some(3.0), ..options };
            let found = run_cpu(&data, &options);
            assert_eq!((found.stats.loss, found.stats.chosen), (0.0, 0.0));
            check("no pairs", &data, &options, &found);
        }
        if loss.sorts() {
            continue;
        }
        let mut data = responses(&mut rng(12), 4, 3, &options);
        data.weights = data.weights.map(|weights| vec![0.0; weights.len()]);
        let error = refused(&data, &options);
        assert!(matches!(error, Error::Mask { arg: "weights", .. }), "{error}");
        let options = PreferenceOptions { denominator: Some(3.0), ..options };
        let found = run_cpu(&data, &options);
        check("no weights", &data, &options, &found);
        assert!(found.grad.iter().all(|g| g.to_bits() == 0));
    }
}

#[test]
fn responses_without_a_token_are_sums_of_zero() {
    for loss in PreferenceLoss::ALL {
        if loss == PreferenceLoss::Orpo {
            continue; // a probability of 1, whose odds are infinite
        }
        let options = PreferenceOptions { average_log_prob: true, ..plain(loss) };
        let mut data = responses(&mut rng(13), 6, 8, &options);
        data.mask.as_mut().unwrap()[..16].fill(0);
        check_cpu(&format!("{loss:?}"), &data, &options);
        data.mask.as_mut().unwrap().fill(0);
        check_cpu(&format!("{loss:?} no token at all"), &data, &options);
        if loss != PreferenceLoss::Kto {
            let error = refused(&data, &PreferenceOptions { sft_coef: 1.0, ..options });
            assert!(matches!(error, Error::Mask { arg: "mask", .. }), "{error}");
        }
        let empty = Data::<f32> {
            rows: 4,
            seq_len: 0,
            labels: data.labels.as_ref().map(|_| vec![0, 1, 1, 0]),
            ..Default::default()
        };
        check_cpu(&format!("{loss:?} no column"), &empty, &options);
    }
}

#[test]
fn what_is_not_wanted_is_not_needed() {
    let options = PreferenceOptions::default();
    let data = responses(&mut rng(14), 8, 30, &options);
    let mut stats = [unwritten()];
    let outputs = Outputs::new(&mut stats);
    cpu::preference_loss(data.inputs(), data.rows, data.seq_len, &options, outputs).unwrap();
    assert_eq!(stats[0], run_cpu(&data, &options).stats);
}

// ---- tensors ----

#[test]
fn packed_rows_have_the_bits_of_padded_ones() {
    let mut rng = rng(40);
    for (name, options) in option_sets() {
        for (rows, seq_len) in [(6, 5), (8, 40), (4, 1500), (2, 9000)] {
            let sample = Packed::new(&mut rng, rows, seq_len, &options);
            let what = format!("{name}: {rows}x{seq_len}");
            let [padded, packed] =
                [&sample.padded, &sample.packed].map(|data| run_cpu(data, &options));
            sample.check(&what, &padded, &packed);
            // Sums of long rows beside short ones saturate the loss, and few digits are left of 1 - s(h).
            if seq_len < 100 {
                check(&what, &sample.packed, &options, &packed);
            }
        }
    }
}

#[test]
fn offsets_that_are_none_are_refused() {
    let options = PreferenceOptions::default();
    let mut data = responses(&mut rng(41), 2, 3, &options);
    (data.seq_len, data.offsets) = (6, Some(vec![0, 0, 6]));
    run_cpu(&data, &options);
    for (offsets, words) in BAD_OFFSETS {
        data.offsets = Some(offsets.to_vec());
        let mut stats = [unwritten()];
        let outputs = Outputs::new(&mut stats);
        let error = cpu::preference_loss(data.inputs(), 2, 6, &options, outputs).unwrap_err();
        let text = error.to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }
}

fn tensor<T: candle_core::WithDType>(values: &[T], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

/// The rows as tensors, as far as they are given.
struct TensorData {
    offsets: Option<Tensor>,
    numbers: [Option<Tensor>; 5],
    mask: Option<Tensor>,
    lengths: Option<Tensor>,
    labels: Option<Tensor>,
}

impl TensorData {
    fn new(data: &Data<f32>) -> Self {
        let (rows, units) = (data.rows, data.units());
        let shape = &[rows, data.seq_len][usize::from(data.offsets.is_some())..];
        let numbers = |x: &Option<Vec<f32>>, shape: &[usize]| x.as_ref().map(|x| tensor(x, shape));
        Self {
            numbers: [
                numbers(&data.ref_logp, shape),
                numbers(&data.ref_sums, &[rows]),
                numbers(&data.weights, &[units]),
                numbers(&data.margin, &[units]),
                numbers(&data.kl, &[1]),
            ],
            offsets: data.offsets.as_ref().map(|offsets| tensor(offsets, &[rows + 1])),
            mask: data.mask.as_ref().map(|mask| tensor(mask, shape)),
            lengths: data.lengths.as_ref().map(|lengths| tensor(lengths, &[rows])),
            labels: data.labels.as_ref().map(|labels| tensor(labels, &[rows])),
        }
    }

    fn inputs<'a>(&'a self, logp: &'a Tensor) -> PreferenceInputs<'a> {
        let [ref_logp, ref_sums, weights, margin, kl] = self.numbers.each_ref().map(Option::as_ref);
        let [mask, lengths, labels] = [&self.mask, &self.lengths, &self.labels].map(Option::as_ref);
        let offsets = self.offsets.as_ref();
        PreferenceInputs {
            logp,
            ref_logp,
            ref_sums,
            mask,
            lengths,
            weights,
            margin,
            labels,
            kl,
            offsets,
        }
    }
}

#[test]
fn tensors_give_the_bits_of_the_cpu_and_a_gradient() {
    let mut rng = rng(22);
    for (name, options) in option_sets() {
        let Packed { packed, .. } = Packed::new(&mut rng, 6, 11, &options);
        for data in [responses(&mut rng, 6, 11, &options), packed, sums(&mut rng, 8, &options)] {
            let want = run_cpu(&data, &options);
            let shape = &[data.rows, data.seq_len][usize::from(data.offsets.is_some())..];
            let logp = tensor(&data.logp, shape);
            let tensors = TensorData::new(&data);
            let constant = preference_loss(&tensors.inputs(&logp), &options).unwrap();
            let var = Var::from_tensor(&logp).unwrap();
            let found = preference_loss(&tensors.inputs(&var), &options).unwrap();
            for found in [&constant, &found] {
                assert_eq!(
                    found.loss.to_scalar::<f32>().unwrap(),
                    want.stats.loss as f32,
                    "{name}"
                );
                assert_eq!(found.losses.to_vec1::<f32>().unwrap(), want.losses, "{name}");
                assert_eq!(found.rewards.to_vec1::<f32>().unwrap(), want.rewards, "{name}");
                let stats = found.stats.to_host().unwrap().to_array();
                let single = want.stats.to_array().map(|x| f64::from(x as f32).to_bits());
                assert_eq!(stats.map(f64::to_bits), single, "{name}");
            }
            let grads = (found.loss * 2.0).unwrap().backward().unwrap();
            let twice: Vec<f32> = want.grad.iter().map(|g| 2.0 * g).collect();
            let grad = grads.get(&var).unwrap().flatten_all().unwrap();
            assert_eq!(grad.to_vec1::<f32>().unwrap(), twice, "{name}");
        }
    }
}

#[test]
fn tensors_of_rewards_give_the_bits_of_the_cpu_and_a_gradient() {
    let rewards = Rewards::new(&mut rng(23), 7);
    for options in reward_model_options() {
        let var = Var::from_tensor(&tensor(&rewards.rewards, &[2, 7])).unwrap();
        let [margin, weights] =
            [&rewards.margin, &rewards.weights].map(|x| tensor(x.as_ref().unwrap(), &[7]));
        let inputs =
            RewardModelTensors { rewards: &var, margin: Some(&margin), weights: Some(&weights) };
        let found = reward_model_loss(&inputs, &options).unwrap();
        let want = rewards.run(&options);
        assert_stats_close("rewards", &found.stats.to_host().unwrap(), &want.stats);
        assert_close_scaled("losses", &found.losses.to_vec1().unwrap(), &want.losses);
        let grads = found.loss.backward().unwrap();
        let grad = grads.get(&var).unwrap().flatten_all().unwrap();
        assert_close_scaled("grad", &grad.to_vec1().unwrap(), &want.grad);
    }
}

#[test]
fn tensors_may_be_strided_and_the_gradient_goes_on_behind_them() {
    let options = PreferenceOptions::default();
    let data = responses(&mut rng(24), 4, 6, &options);
    let tensors = TensorData::new(&data);
    let transposed: Vec<f32> = (0..24).map(|i| data.logp[i % 4 * 6 + i / 4] / 2.0).collect();
    let var = Var::from_tensor(&tensor(&transposed, &[6, 4])).unwrap();
    let logp = (var.t().unwrap() * 2.0).unwrap();
    let found = preference_loss(&tensors.inputs(&logp), &options).unwrap();
    let want = run_cpu(&data, &options);
    assert_eq!(found.loss.to_scalar::<f32>().unwrap(), want.stats.loss as f32);
    let grads = found.loss.backward().unwrap();
    let grad = grads.get(&var).unwrap().t().unwrap().flatten_all().unwrap();
    let twice: Vec<f32> = want.grad.iter().map(|g| 2.0 * g).collect();
    assert_eq!(grad.to_vec1::<f32>().unwrap(), twice);
}

#[test]
fn tensors_of_the_wrong_shape_or_dtype_are_refused_by_name() {
    let options = PreferenceOptions::default();
    let data = rows(&mut rng(25));
    let logp = tensor(&data.logp, &[4, 3]);
    let refused = |inputs: &PreferenceInputs| {
        preference_loss(inputs, &options).map(|_| ()).unwrap_err().to_string()
    };
    let flat = logp.flatten_all().unwrap();
    assert!(
        refused(&PreferenceInputs::new(&flat)).contains("`logp` has shape [12], expected [B, T]")
    );
    let odd = logp.narrow(0, 0, 3).unwrap();
    assert!(refused(&PreferenceInputs::new(&odd)).contains("even"));
    let double = logp.to_dtype(DType::F64).unwrap();
    assert!(refused(&PreferenceInputs::new(&double)).contains("`logp` has dtype f64"));
    let mask = tensor(&[1_u8; 4], &[4]);
    let given = PreferenceInputs { mask: Some(&mask), ..PreferenceInputs::new(&logp) };
    assert!(refused(&given).contains("`mask` has shape [4], expected [4, 3]"));
    let lengths = tensor(&[3_u32; 4], &[4]);
    let given = PreferenceInputs { lengths: Some(&lengths), ..PreferenceInputs::new(&logp) };
    assert!(refused(&given).contains("`lengths` has dtype u32, expected i64"));
    let flat = tensor(&[1.0_f32; 4], &[4]);
    let inputs = RewardModelTensors::new(&flat);
    let error = reward_model_loss(&inputs, &RewardModelOptions::default()).unwrap_err();
    assert!(error.to_string().contains("`rewards` has shape [4], expected [2, pairs]"), "{error}");
}

// ---- errors ----

/// Rows that `Sigmoid` takes, unmasked.
fn rows(rng: &mut StdRng) -> Data<f32> {
    let mut data = responses(rng, 4, 3, &PreferenceOptions::default());
    (data.mask, data.weights, data.margin) = (None, None, None);
    data
}

#[test]
fn options_out_of_range_are_refused_by_name() {
    for (name, options) in bad_options() {
        let mut data = rows(&mut rng(15));
        if options.loss.is_reference_free() {
            data.ref_logp = None;
        }
        data.labels = (options.loss == PreferenceLoss::Kto).then(|| vec![1; 4]);
        let error = refused(&data, &options);
        assert!(matches!(&error, Error::Option { option, .. } if *option == name), "{error}");
        assert!(error.to_string().starts_with("preference: option"), "{error}");
    }
    for (name, options) in [
        ("center_coef", RewardModelOptions { center_coef: -1.0, ..Default::default() }),
        ("denominator", RewardModelOptions { denominator: Some(0.0), ..Default::default() }),
    ] {
        let mut stats = [unwritten()];
        let inputs = RewardModelInputs::new(&[1.0, 2.0]);
        let error =
            cpu::reward_model_loss(inputs, 1, &options, RewardModelOutputs::new(&mut stats));
        let error = error.unwrap_err();
        assert!(matches!(&error, Error::Option { option, .. } if *option == name), "{error}");
    }
}

#[test]
fn what_does_not_go_with_a_loss_is_refused_by_name() {
    for (name, loss, change) in misplaced() {
        let mut data = rows(&mut rng(16));
        if loss.is_reference_free() {
            data.ref_logp = None;
        }
        data.labels = (loss == PreferenceLoss::Kto).then(|| vec![1; 4]);
        change(&mut data);
        let error = refused(&data, &plain(loss));
        let text = error.to_string();
        match &error {
            Error::Option { option, .. } => assert_eq!(*option, name, "{text}"),
            Error::Missing { arg, .. } => assert_eq!(*arg, name, "{text}"),
            _ => panic!("{text}"),
        }
        if loss.is_reference_free() {
            assert!(text.contains("no reference; take Sigmoid"), "{text}");
        }
    }
}

#[test]
fn rows_that_are_no_pairs_and_numbers_that_are_none_are_refused_by_name() {
    let mut data = rows(&mut rng(17));
    data.rows = 3;
    data.logp.truncate(9);
    let text = refused(&data, &PreferenceOptions::default()).to_string();
    assert!(text.contains("`logp` has shape 3 rows") && text.contains("even"), "{text}");

    let mut data = rows(&mut rng(18));
    data.labels = Some(vec![0, 1, 2, 1]);
    let text = refused(&data, &plain(PreferenceLoss::Kto)).to_string();
    assert_eq!(text, "preference: `labels`[2] is 2, expected 0 or 1");
    let mut data = rows(&mut rng(19));
    data.lengths = Some(vec![3, 3, 3, -1]);
    let text = refused(&data, &PreferenceOptions::default()).to_string();
    assert_eq!(text, "preference: `lengths`[3] is -1, expected 0 or more");
}

#[test]
fn slices_of_the_wrong_length_are_refused_by_name() {
    for (name, change) in wrong_lengths() {
        let mut data = rows(&mut rng(20));
        change(&mut data);
        let error = refused(&data, &PreferenceOptions::default());
        assert!(matches!(&error, Error::Shape { arg, .. } if *arg == name), "{name}: {error}");
    }
    let data = rows(&mut rng(21));
    let fails = |lengths: [usize; 5], name: &str| {
        let [stats, loss, losses, rewards, grad] = lengths;
        let mut stats = vec![unwritten(); stats];
        let mut out = [loss, losses, rewards, grad].map(|n| vec![0.0_f32; n]);
        let [loss, losses, rewards, grad] = out.each_mut().map(|out| Some(out.as_mut_slice()));
        let outputs =
            Outputs { loss, losses, rewards, grad_logp: grad, ..Outputs::new(&mut stats) };
        let options = PreferenceOptions::default();
        let error = cpu::preference_loss(data.inputs(), 4, 3, &options, outputs).unwrap_err();
        assert!(matches!(&error, Error::Shape { arg, .. } if *arg == name), "{name}: {error}");
    };
    fails([0, 1, 2, 4, 12], "stats");
    fails([1, 2, 2, 4, 12], "loss");
    fails([1, 1, 4, 4, 12], "losses");
    fails([1, 1, 2, 2, 12], "rewards");
    fails([1, 1, 2, 4, 6], "grad_logp");
    let mut huge = data.clone();
    (huge.rows, huge.seq_len) = (usize::MAX - 1, usize::MAX);
    let error = refused(&huge, &PreferenceOptions::default());
    assert!(matches!(&error, Error::Shape { arg: "logp", .. }), "{error}");

    let mut stats = [unwritten()];
    for (rewards, margin, name) in [(3, 2, "rewards"), (4, 3, "margin")] {
        let (rewards, margin) = (vec![0.0; rewards], vec![0.0; margin]);
        let inputs =
            RewardModelInputs { margin: Some(&margin), ..RewardModelInputs::new(&rewards) };
        let options = RewardModelOptions::default();
        let error =
            cpu::reward_model_loss(inputs, 2, &options, RewardModelOutputs::new(&mut stats));
        let error = error.unwrap_err();
        assert!(matches!(&error, Error::Shape { arg, .. } if *arg == name), "{name}: {error}");
    }
}

#[test]
fn statistics_have_one_name_each_and_come_back_as_they_went() {
    let array: [f64; PreferenceStats::LEN] = std::array::from_fn(|i| i as f64);
    let stats = PreferenceStats::from_array(array);
    assert_eq!(stats.to_array(), array);
    let shown = format!("{stats:?}");
    for (i, name) in PreferenceStats::NAMES.iter().enumerate() {
        assert!(shown.contains(&format!(" {name}: {i}.0")), "{name}");
    }
}
