//! The members of the PPO loss's family: the reference against other projects' losses.

mod common;

use common::loss_golden::*;
use common::ppo_loss_cases::{run, Data};
use common::*;
use ppo_kernels::kl::{KlEstimator, KlOptions};
use ppo_kernels::ppo_loss::reference::Output;
use ppo_kernels::ppo_loss::{
    Aggregation, KlAgainst, KlGradient, KlRatio, PpoLossOptions, RatioGradient, RatioLevel,
    Surrogate, TrustRegion, TrustRegionSides,
};
use serde_json::Value;

/// verl adds 1e-8 inside the logarithm of its binary KL, which decides what is inside a region, and to
/// the lengths of rows.
const VERL: (f64, f64) = (3e-8, 1e-9);

/// The unmasked positions of each row.
fn rows(data: &Data<f64>) -> impl Iterator<Item = Vec<usize>> + '_ {
    let keeps = |&t: &usize| data.mask.as_ref().is_none_or(|mask| mask[t] != 0);
    (0..data.batch).map(move |b| (b * data.seq_len..(b + 1) * data.seq_len).filter(keeps).collect())
}

/// `row`, a number for each row, as one for each token.
fn spread(row: &[f64], seq_len: usize) -> Vec<f64> {
    row.iter().flat_map(|&x| vec![x; seq_len]).collect()
}

/// An input with a number a token or a row, as one for each token.
fn by_token(case: &Golden, key: &str, seq_len: usize) -> Option<Vec<f64>> {
    if matches!(case.inputs.get(key), None | Some(Value::Null)) {
        return None;
    }
    let x = case.input(key);
    let is_row = case.shape(key).get(1).is_none_or(|&width| width == 1 && seq_len != 1);
    Some(if is_row { spread(&x, seq_len) } else { x })
}

// ---- verl ----

/// verl's clipped surrogate of log-ratios within ±20.
fn verl_clip(case: &Golden, bound: &str) -> PpoLossOptions {
    let both = case.number(bound);
    PpoLossOptions {
        clip_range: case.optional(&format!("{bound}_low")).unwrap_or(both),
        clip_range_high: Some(case.optional(&format!("{bound}_high")).unwrap_or(both)),
        log_ratio_clamp: Some(20.0),
        ..plain()
    }
}

/// verl's aggregation; from 0.9 on one of them divides by the rows as well.
fn aggregate_as_verl(case: &Golden, is_09: bool, options: PpoLossOptions) -> PpoLossOptions {
    let mode = case.text("loss_agg_mode");
    let size = |key: &str| setting(case, "global_batch_info", key);
    let named = match mode {
        "token-sum" => PpoLossOptions { aggregation: Aggregation::Constant(1.0), ..plain() },
        "seq-mean-token-sum-norm" if is_09 => PpoLossOptions {
            aggregation: Aggregation::SeqMeanTokenSumNormRows,
            denominator: size("loss_scale_factor").map(|scale| {
                scale * size("global_batch_size").unwrap() / size("dp_size").unwrap_or(1.0)
            }),
            ..plain()
        },
        _ => verl_aggregation(mode, size),
    };
    let PpoLossOptions { aggregation, denominator, .. } = named;
    PpoLossOptions { aggregation, denominator, ..options }
}

fn by_rows(options: PpoLossOptions) -> PpoLossOptions {
    PpoLossOptions { aggregation: Aggregation::SeqMeanTokenMean, denominator: None, ..options }
}

/// verl's covariance of advantage and log-probability, of every token.
fn covariances(data: &Data<f64>) -> Vec<f64> {
    let kept: Vec<usize> = rows(data).flatten().collect();
    let mean = |x: &[f64]| kept.iter().map(|&t| x[t]).sum::<f64>() / kept.len() as f64;
    let (a, logp) = (mean(&data.advantages), mean(&data.logp));
    (0..data.logp.len()).map(|t| (data.advantages[t] - a) * (data.logp[t] - logp)).collect()
}

#[test]
fn reference_equals_verl_policy_losses() {
    let (mut ran, mut skipped) = (0, 0);
    for (file, is_09) in [("policy_loss_verl", false), ("policy_loss_verl2", true)] {
        for case in golden(file).iter().filter(|case| case.peer == "verl") {
            let function = case.function.rsplit('.').next().unwrap();
            // The old one has its own names for the bounds.
            let (mode, bound) = match function.strip_prefix("compute_policy_loss_") {
                Some(mode) => (mode, "clip_ratio"),
                None => ("vanilla", "cliprange"),
            };
            // It raises; or it is in tests/correction.rs.
            if case.outputs.contains_key("raises") || mode == "bypass_mode" {
                skipped += 1;
                continue;
            }
            let mut data = policy_data(case, "log_prob", "old_log_prob", Some("response_mask"));
            let seq_len = data.seq_len;
            data.weights = by_token(case, "rollout_is_weights", seq_len);
            let mut options = aggregate_as_verl(case, is_09, verl_clip(case, bound));
            let mut more = None;
            match mode {
                "vanilla" => {
                    options.dual_clip = Some(case.optional("clip_ratio_c").unwrap_or(3.0));
                }
                "gspo" => {
                    options.ratio = RatioLevel::SequenceMean;
                    options.ratio_gradient = RatioGradient::OwnToken;
                    options.log_ratio_clamp = Some(10.0);
                    options = if is_09 { options } else { by_rows(options) };
                }
                "sapo" => {
                    options.surrogate = Surrogate::SoftGate;
                    options.soft_gate_tau_pos = case.optional("tau_pos").unwrap_or(1.0);
                    options.soft_gate_tau_neg = case.optional("tau_neg").unwrap_or(1.05);
                    options = by_rows(options);
                }
                "cispo" => options.surrogate = Surrogate::ClippedWeight,
                "gpg" | "reinforce" => {
                    options.surrogate = Surrogate::Reinforce;
                    options.clip_range_high = None;
                }
                "dppo_tv" | "dppo_kl" => {
                    options.surrogate = Surrogate::ClippedWeight;
                    options.trust_region = match mode {
                        "dppo_tv" => TrustRegion::TotalVariation,
                        _ => TrustRegion::BinaryKl,
                    };
                    options.trust_region_low = options.clip_range;
                    options.trust_region_high = options.clip_range_high.unwrap();
                    options.clip_range = 1.0;
                    options.clip_range_high = Some(case.number("clip_ratio_c") - 1.0);
                }
                "dro" => {
                    let PpoLossOptions { surrogate, kl, kl_coef, kl_against, kl_weighted, .. } =
                        PpoLossOptions::dro(case.number("dro_beta"));
                    options = PpoLossOptions {
                        surrogate,
                        kl,
                        kl_coef,
                        kl_against,
                        kl_weighted,
                        ..options
                    };
                }
                "clip_cov" => {
                    // Of what is not clipped anyway, the tokens with a covariance within bounds.
                    let bound = |key| setting(case, "policy_loss_config", key).unwrap();
                    let covariance = covariances(&data);
                    let inside = bound("clip_cov_lb")..bound("clip_cov_ub");
                    let (low, high) =
                        (1.0 - options.clip_range, 1.0 + options.clip_range_high.unwrap());
                    let drops = |t: usize| {
                        let (r, a) = ((data.logp[t] - data.old_logp[t]).exp(), data.advantages[t]);
                        let clipped = -r.clamp(low, high) * a > -r * a;
                        !clipped && covariance[t] > inside.start && covariance[t] < inside.end
                    };
                    let weights = (0..covariance.len()).map(|t| if drops(t) { 0.0 } else { 1.0 });
                    data.weights = Some(weights.collect());
                    options.log_ratio_clamp = None;
                }
                "kl_cov" => {
                    // |d| on the tokens of the largest covariances: a call of its own.
                    let bound = |key| setting(case, "policy_loss_config", key).unwrap();
                    let covariance = covariances(&data);
                    let mut kept: Vec<usize> = rows(&data).flatten().collect();
                    let count = ((kept.len() as f64 * bound("kl_cov_ratio")) as usize).max(1);
                    kept.sort_by(|&a, &b| covariance[b].total_cmp(&covariance[a]));
                    let mut weights = vec![0.0; covariance.len()];
                    kept[..count].iter().for_each(|&t| weights[t] = 1.0);
                    options.log_ratio_clamp = None;
                    options.clip_range = f64::INFINITY;
                    options.clip_range_high = None;
                    let kl = KlOptions { estimator: KlEstimator::Abs, ..Default::default() };
                    let only_kl = PpoLossOptions {
                        kl,
                        kl_coef: bound("ppo_kl_coef"),
                        kl_against: KlAgainst::Old,
                        kl_weighted: true,
                        ..options
                    };
                    let mut of_kl = data.clone();
                    of_kl.weights = Some(weights);
                    of_kl.advantages = vec![0.0; of_kl.advantages.len()];
                    more = Some(run(&of_kl, &only_kl));
                }
                "geo_mean" => {
                    // A is averaged over a row, weights by their geometric mean, and all rows count.
                    let mut of_rows = data.clone();
                    for row in rows(&data).filter(|row| !row.is_empty()) {
                        let mean = |x: &dyn Fn(usize) -> f64| {
                            row.iter().map(|&t| x(t)).sum::<f64>() / row.len() as f64
                        };
                        let a = mean(&|t| data.advantages[t]);
                        let w = data.weights.as_ref().map(|w| mean(&|t| w[t].ln()).exp());
                        for &t in &row {
                            of_rows.advantages[t] = a;
                            if let (Some(weights), Some(w)) = (&mut of_rows.weights, w) {
                                weights[t] = w;
                            }
                        }
                    }
                    // What is clipped goes by the sign of each token's own A: not ours if that differs.
                    let pairs = rows(&data).flatten();
                    let mut pairs = pairs.map(|t| data.advantages[t] * of_rows.advantages[t]);
                    if pairs.any(|product| product < 0.0) {
                        skipped += 1;
                        continue;
                    }
                    drop(pairs);
                    data = of_rows;
                    options.surrogate = Surrogate::LogClip;
                    options.ratio = RatioLevel::SequenceMean;
                    options.aggregation = Aggregation::BatchMeanTokenMean;
                    options.denominator = None;
                }
                other => panic!("{other}"),
            }
            let ours = run(&data, &options);
            let extra = more.as_ref().map_or(0.0, |more: &Output| more.stats.loss);
            expect(case, "loss", &[ours.stats.loss + extra], VERL);
            let mut grad = ours.grad_logp;
            if let Some(more) = &more {
                grad.iter_mut().zip(&more.grad_logp).for_each(|(g, more)| *g += more);
            }
            expect_grad(case, "grad_log_prob", &grad, VERL);
            if mode.starts_with("dppo") {
                expect(case, "pg_clipfrac", &[ours.stats.outside_fraction], VERL);
            } else if matches!(mode, "vanilla" | "gspo" | "cispo") {
                expect(case, "pg_clipfrac", &[ours.stats.clip_fraction], VERL);
            }
            if mode == "vanilla" {
                let lower = ours.stats.lower_clip_fraction;
                expect(case, "pg_clipfrac_lower", &[lower], VERL);
            }
            if case.outputs.contains_key("ppo_kl") && mode != "kl_cov" {
                let unclamped = PpoLossOptions { log_ratio_clamp: None, ..options };
                let of_kl =
                    if mode == "gspo" { run(&data, &unclamped) } else { run(&data, &options) };
                expect(case, "ppo_kl", &[of_kl.stats.approx_kl_k1], VERL);
            }
            ran += 1;
        }
    }
    assert_eq!((ran, skipped), (80, 7));
}

// ---- prime-rl ----

#[test]
fn reference_equals_prime_rl_losses() {
    let mut ran = 0;
    for case in golden("policy_loss_verl2").iter().filter(|case| case.peer == "prime-rl") {
        let n = case.shape("trainer_logprobs")[0];
        let weights = case.input("loss_weights");
        let scaled = |factor: f64, x: &[f64]| x.iter().map(|x| factor * x).collect::<Vec<_>>();
        let logp = case.input("trainer_logprobs");
        let ref_logp = case.input("ref_logprobs");
        let tau = case.optional("adv_tau").unwrap_or(1.0);
        let mut advantages = scaled(tau, &case.input("advantages"));
        let mut options = PpoLossOptions {
            aggregation: Aggregation::Constant(1.0),
            clip_range: f64::INFINITY,
            // tau k² is twice the second estimate.
            kl_coef: 2.0 * case.optional("kl_tau").unwrap_or(1e-3),
            kl: KlOptions { estimator: KlEstimator::K2, ..Default::default() },
            kl_against: KlAgainst::Old,
            kl_weighted: true,
            trust_region: TrustRegion::TotalVariation,
            ..plain()
        };
        match case.function.rsplit('.').next().unwrap() {
            "default_loss_fn" => {
                options.trust_region_low = case.number("dppo_mask_low");
                options.trust_region_high = case.number("dppo_mask_high");
            }
            "ipo_loss_fn" => {
                options.trust_region_sides = TrustRegionSides::Both;
                options.trust_region_low = case.number("ipo_threshold");
                options.trust_region_high = options.trust_region_low;
            }
            _ => {
                advantages = ref_logp.iter().zip(&logp).map(|(r, l)| r - l).collect();
                options.trust_region_low = 0.2;
                options.trust_region_high = 0.2;
            }
        }
        let data = Data {
            batch: 1,
            seq_len: n,
            logp,
            old_logp: case.input("inference_logprobs"),
            advantages,
            weights: Some(weights),
            mask: Some(case.mask("loss_mask")),
            ..Default::default()
        };
        let ours = run(&data, &options);
        expect(case, "loss", &[ours.stats.loss], EXACT);
        expect_grad(case, "grad_trainer_logprobs", &ours.grad_logp, EXACT);
        ran += 1;
    }
    assert_eq!(ran, 4);
}

// ---- TRL ----

/// The entropy that a share of the tokens is below, by linear interpolation.
fn quantile(mut x: Vec<f64>, share: f64) -> f64 {
    x.sort_by(f64::total_cmp);
    let at = share * (x.len() - 1) as f64;
    let (low, high) = (x[at.floor() as usize], x[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

#[test]
fn reference_equals_trl_grpo_losses() {
    let (mut ran, mut skipped) = (0, 0);
    for file in ["grpo_loss_trl", "grpo_loss_trl2"] {
        for case in golden(file).iter().filter(|case| case.function.contains("GRPO")) {
            let shape = case.shape("per_token_logps");
            let (batch, seq_len) = (shape[0], shape[1]);
            let logp = case.input("per_token_logps");
            let mut mask = case.mask("completion_mask");
            if let Some(tool) = by_token(case, "tool_mask", seq_len) {
                mask.iter_mut().zip(tool).for_each(|(m, tool)| *m &= u8::from(tool != 0.0));
            }
            let mut data = Data {
                batch,
                seq_len,
                old_logp: by_token(case, "old_per_token_logps", seq_len)
                    .unwrap_or_else(|| logp.clone()),
                logp,
                advantages: by_token(case, "advantages", seq_len).unwrap(),
                ref_logp: by_token(case, "ref_per_token_logps", seq_len),
                rollout_logp: by_token(case, "sampling_per_token_logps", seq_len),
                weights: by_token(case, "importance_sampling_ratio", seq_len),
                mask: Some(mask),
                ..Default::default()
            };
            let kind = case.text("loss_type");
            let of_sequence = case.text("importance_sampling_level") == "sequence";
            let is_true = |key| case.inputs.get(key).and_then(Value::as_bool) == Some(true);
            let unbiased = is_true("use_bias_correction_kl");
            let beta = case.number("beta");
            // A row's ratio in the KL term, and importance weights inside of VESPO's: two calls.
            if (of_sequence && unbiased && beta != 0.0)
                || (kind == "vespo" && data.weights.is_some())
            {
                skipped += 1;
                continue;
            }
            let accumulation = case.optional("gradient_accumulation_steps").unwrap_or(1.0);
            let training = is_true("training");
            let items = case.number("num_items_in_batch");
            let of_generation = case.optional("steps_per_generation").unwrap_or(1.0);
            let (aggregation, denominator) = match kind {
                "grpo" | "sapo" => (Aggregation::BatchMeanTokenMean, None),
                "bnpo" => (Aggregation::TokenMean, None),
                "luspo" => (Aggregation::BatchMeanTokenSum, None),
                "dr_grpo" => {
                    let longest = case.number("max_completion_length");
                    (Aggregation::Constant(batch as f64 * longest), None)
                }
                // dapo, cispo, vespo
                _ if training => {
                    (Aggregation::TokenMean, Some(items * accumulation / of_generation))
                }
                _ => (Aggregation::TokenMean, Some(items)),
            };
            let named = match kind {
                "cispo" | "sapo" | "vespo" => PpoLossOptions::of(kind).unwrap(),
                _ => PpoLossOptions::default(),
            };
            let high = case.number("epsilon_high");
            let mut options = PpoLossOptions {
                surrogate: named.surrogate,
                ratio: if of_sequence { RatioLevel::SequenceMean } else { named.ratio },
                clip_range: case.number("epsilon_low"),
                clip_range_high: Some(high),
                ratio_cap: case.optional("delta"),
                kl_coef: beta,
                kl: KlOptions { estimator: KlEstimator::K3, ..Default::default() },
                off_policy_threshold: case.optional("off_policy_mask_threshold"),
                aggregation,
                denominator,
                ..plain()
            };
            if kind == "cispo" {
                (options.clip_range, options.clip_range_high) = (1.0, Some(high - 1.0));
            }
            if kind == "sapo" {
                options.soft_gate_tau_pos = case.optional("sapo_temperature_pos").unwrap_or(1.0);
                options.soft_gate_tau_neg = case.optional("sapo_temperature_neg").unwrap_or(1.05);
            }
            if kind == "vespo" {
                options.log_ratio_clamp = Some(20.0);
                options.gamma_k_pos = case.optional("vespo_k_pos").unwrap_or(2.0);
                options.gamma_lambda_pos = case.optional("vespo_lambda_pos").unwrap_or(3.0);
                options.gamma_k_neg = case.optional("vespo_k_neg").unwrap_or(3.0);
                options.gamma_lambda_neg = case.optional("vespo_lambda_neg").unwrap_or(2.0);
            }
            if unbiased && beta != 0.0 {
                (options.kl_ratio, options.kl_gradient) = (KlRatio::Term, KlGradient::Reverse);
            }
            let kept: Vec<usize> = rows(&data).flatten().collect();
            let entropies = case.input("entropies");
            let share = case.optional("top_entropy_quantile").unwrap_or(1.0);
            let mut selected = vec![1.0; entropies.len()];
            if share < 1.0 {
                let of_kept = kept.iter().map(|&t| entropies[t]).collect();
                let least = quantile(of_kept, 1.0 - share);
                selected = entropies.iter().map(|&h| f64::from(u8::from(h >= least))).collect();
                data.weights = Some(match &data.weights {
                    Some(weights) => weights.iter().zip(&selected).map(|(w, s)| w * s).collect(),
                    None => selected.clone(),
                });
            }
            let coef = case.optional("entropy_coef").unwrap_or(0.0);
            options.row_extremes = true;
            if share == 1.0 {
                (options.entropy_coef, options.entropy_own_mean) = (coef, true);
                data.entropy = Some(entropies.clone());
            }
            let ours = run_or_nothing(&data, &options);
            let mut loss = ours.stats.loss;
            let mut grad_entropy = ours.grad_entropy.clone();
            if share < 1.0 && coef != 0.0 {
                // The mean over the selected tokens: a call of its own.
                let of_mask = data.mask.as_ref().unwrap().iter().zip(&selected);
                let bonus = Data {
                    advantages: vec![0.0; entropies.len()],
                    entropy: Some(entropies),
                    mask: Some(of_mask.map(|(&m, &s)| m * s as u8).collect()),
                    ref_logp: None,
                    weights: None,
                    ..data.clone()
                };
                let options = PpoLossOptions { entropy_coef: coef, ..plain() };
                let bonus = run(&bonus, &options);
                loss += bonus.stats.loss;
                grad_entropy = bonus.grad_entropy;
            }
            // TRL divides by the steps of accumulation where the denominator does not know of them.
            let divisor = match denominator {
                None if training => accumulation,
                _ => 1.0,
            };
            expect(case, "loss", &[loss / divisor], EXACT);
            let scaled = |grad: &[f64]| grad.iter().map(|g| g / divisor).collect::<Vec<_>>();
            expect(case, "grad_per_token_logps", &scaled(&ours.grad_logp), EXACT);
            if coef != 0.0 && case.outputs.contains_key("grad_entropies") {
                expect(case, "grad_entropies", &scaled(&grad_entropy), EXACT);
            }
            let metrics = case.outputs["metrics"].as_object().unwrap();
            if kept.is_empty() || of_sequence {
                ran += 1;
                continue;
            }
            for (key, ours) in [
                ("clip_ratio/low_mean", ours.stats.clip_low_fraction),
                ("clip_ratio/high_mean", ours.stats.clip_high_fraction),
                ("clip_ratio/region_mean", ours.stats.clip_fraction),
                ("clip_ratio/low_min", ours.stats.clip_low_row_min),
                ("clip_ratio/high_max", ours.stats.clip_high_row_max),
                ("kl", ours.stats.kl_mean),
            ] {
                if metrics.contains_key(key) {
                    expect_stat(case, "metrics", key, ours, (1e-6, 1e-9));
                }
            }
            ran += 1;
        }
    }
    assert_eq!((ran, skipped), (46, 4));
}

/// [`run`], where there may be no token at all, of which TRL's loss is 0.
fn run_or_nothing(data: &Data<f64>, options: &PpoLossOptions) -> Output {
    let any = data.mask.as_ref().is_none_or(|mask| mask.iter().any(|&m| m != 0));
    let denominator = if any { options.denominator } else { Some(1.0) };
    let constant = matches!(options.aggregation, Aggregation::Constant(_));
    let denominator = if constant { None } else { denominator };
    run(data, &PpoLossOptions { denominator, ..*options })
}

#[test]
fn reference_equals_trl_gmpo_and_rloo_losses() {
    let mut ran = 0;
    for case in golden("grpo_loss_trl2") {
        let is_gmpo = case.function.contains("GMPO");
        if !is_gmpo && !case.function.contains("RLOO") {
            continue;
        }
        let shape = case.shape("per_token_logps");
        let (batch, seq_len) = (shape[0], shape[1]);
        let mask = case.mask("completion_mask");
        let logp = case.input("per_token_logps");
        let mut data = Data {
            batch,
            seq_len,
            old_logp: logp.clone(),
            logp,
            advantages: by_token(&case, "advantages", seq_len).unwrap(),
            ref_logp: by_token(&case, "ref_per_token_logps", seq_len),
            mask: Some(mask),
            ..Default::default()
        };
        let bounds = PpoLossOptions {
            clip_range: case.number("epsilon_low"),
            clip_range_high: Some(case.number("epsilon_high")),
            aggregation: Aggregation::BatchMeanTokenMean,
            ..plain()
        };
        let options = if is_gmpo {
            data.old_logp = case.input("old_per_token_logps");
            // Where tokens are selected by their entropy, that is inside of the mean: not ours.
            if case.number("top_entropy_quantile") < 1.0 {
                continue;
            }
            PpoLossOptions {
                surrogate: Surrogate::LogClip,
                ratio: RatioLevel::SequenceMean,
                ..bounds
            }
        } else {
            // The old policy's sum is known only: at the row's first token.
            let sums = case.input("old_logps");
            data.old_logp = vec![0.0; batch * seq_len];
            let firsts: Vec<usize> = rows(&data).map(|row| row[0]).collect();
            firsts.iter().zip(sums).for_each(|(&t, sum)| data.old_logp[t] = sum);
            PpoLossOptions { ratio: RatioLevel::SequenceSum, ..bounds }
        };
        let ours = run(&data, &options);
        expect(&case, "loss", &[ours.stats.loss], EXACT);
        expect(&case, "grad_per_token_logps", &ours.grad_logp, EXACT);
        ran += 1;
    }
    assert_eq!(ran, 3);
}

// ---- token by token: slime's CISPO, and KL terms ----

/// Value and gradient of one token's loss.
fn one_token(data: Data<f64>, options: &PpoLossOptions) -> (f64, f64) {
    let ours = run(&Data { batch: 1, seq_len: 1, ..data }, options);
    (ours.stats.loss, ours.grad_logp[0])
}

#[test]
fn reference_equals_slime_cispo_and_off_policy_mask() {
    let mut ran = 0;
    for case in golden("grpo_loss_trl2").iter().filter(|case| case.peer == "slime") {
        if case.function.ends_with("compute_cispo_loss") {
            let options = PpoLossOptions {
                surrogate: Surrogate::ClippedWeight,
                clip_range: case.number("eps_clip"),
                clip_range_high: Some(case.number("eps_clip_high")),
                ..plain()
            };
            let (logp, old_logp) = (case.input("log_prob"), case.input("old_log_prob"));
            let (advantages, upstream) = (case.input("advantages"), case.input("grad_out"));
            let token = |t: usize| Data {
                logp: vec![logp[t]],
                old_logp: vec![old_logp[t]],
                advantages: vec![advantages[t]],
                ..Default::default()
            };
            let (losses, grads): (Vec<_>, Vec<_>) =
                (0..logp.len()).map(|t| one_token(token(t), &options)).unzip();
            let grads: Vec<f64> = grads.iter().zip(upstream).map(|(g, up)| g * up).collect();
            expect(case, "loss_mat", &losses, EXACT);
            expect(case, "grad_log_prob", &grads, EXACT);
        } else {
            let data = policy_data(case, "log_prob", "old_log_prob", Some("loss_mask"));
            let options = PpoLossOptions {
                off_policy_threshold: Some(case.number("opsm_delta")),
                clip_range: f64::INFINITY,
                ..plain()
            };
            let ours = run(&data, &options);
            let keep = case.output("keep");
            for t in rows(&data).flatten().filter(|&t| data.advantages[t] != 0.0) {
                assert_eq!(ours.grad_logp[t] != 0.0, keep[t] != 0.0, "{} {t}", case.id);
            }
        }
        ran += 1;
    }
    assert_eq!(ran, 4);
}

#[test]
fn reference_equals_other_projects_kl_terms() {
    let mut ran = 0;
    for case in golden("kl2") {
        let (names, kind) = match case.peer.as_str() {
            "verl" => (["logprob", "ref_logprob", ""], "kl_penalty"),
            "slime" => (["log_probs", "log_probs_base", "log_probs_old"], "kl_loss_type"),
            _ => (["log_probs", "log_probs_base", "log_probs_old"], "kl_estimator"),
        };
        let kind = case.text(kind);
        let estimator = match kind.trim_end_matches('+') {
            "k1" | "kl" => KlEstimator::K1,
            "abs" => KlEstimator::Abs,
            "k2" | "mse" => KlEstimator::K2,
            "k3" | "low_var_kl" => KlEstimator::K3,
            other => panic!("{}: {other}", case.id),
        };
        let mut kl = KlOptions { estimator, ..Default::default() };
        let mut options = PpoLossOptions { kl_coef: 1.0, ..plain() };
        let has_old = !matches!(case.inputs.get(names[2]), None | Some(Value::Null));
        let mut differentiable_ratio = false;
        match case.peer.as_str() {
            "openrlhf" => {
                kl.output_clamp = Some(10.0);
                if is_true(&case, "unbiased_gradient") {
                    options.kl_gradient = KlGradient::Reverse;
                    options.kl_ratio = KlRatio::Gradient;
                    options.kl_ratio_cap = Some(10.0);
                }
            }
            "verl" => {
                if estimator == KlEstimator::K3 {
                    (kl.log_ratio_clamp, kl.output_clamp) = (Some(20.0), Some(10.0));
                }
                if kind.ends_with('+') {
                    options.kl_gradient = KlGradient::Reverse;
                }
            }
            _ if has_old => {
                options.kl_ratio = KlRatio::Term;
                differentiable_ratio = true;
                options.kl_gradient = match estimator {
                    KlEstimator::K3 => KlGradient::Reverse,
                    _ => KlGradient::Own,
                };
            }
            _ => {}
        }
        options.kl = kl;
        let logp = case.input(names[0]);
        let ref_logp = case.input(names[1]);
        let old_logp = if has_old { case.input(names[2]) } else { logp.clone() };
        let token = |t: usize| Data {
            logp: vec![logp[t]],
            old_logp: vec![old_logp[t]],
            advantages: vec![0.0],
            ref_logp: Some(vec![ref_logp[t]]),
            ..Default::default()
        };
        let (values, mut grads): (Vec<_>, Vec<_>) =
            (0..logp.len()).map(|t| one_token(token(t), &options)).unzip();
        if differentiable_ratio && estimator != KlEstimator::K3 {
            // By the product rule the ratio's gradient is the value once more.
            grads.iter_mut().zip(&values).for_each(|(g, value)| *g += value);
        }
        let upstream = case.input("grad_out");
        let at = |t: usize| if upstream.len() == 1 { upstream[0] } else { upstream[t] };
        let grads: Vec<f64> = grads.iter().enumerate().map(|(t, g)| g * at(t)).collect();
        let tolerance = if case.dtype == "float32" { (2e-5, 1e-6) } else { EXACT };
        expect(&case, "kl", &values, tolerance);
        let key = format!("grad_{}", names[0]);
        expect(&case, &key, &grads, tolerance);
        ran += 1;
    }
    assert_eq!(ran, 25);
}
