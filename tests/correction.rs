//! Train-inference corrections: the reference against other projects' functions and by itself, the CPU
//! implementation and the candle function against the reference.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::correction_cases::*;
use common::loss_golden::*;
use common::pack::BAD_OFFSETS;
use common::ppo_loss_cases::{self, run};
use common::*;
use ppo_kernels::correction::reference::{self, Output};
use ppo_kernels::correction::{
    correction, cpu, CorrectionInputs, CorrectionOptions, CorrectionStats, Outside, Rejection,
    RejectionLevel, RejectionMetric, WeightLevel,
};
use ppo_kernels::ppo_loss::{Aggregation, PpoLossOptions, RatioLevel, Surrogate};
use ppo_kernels::Error;
use serde_json::Value;

// ---- other projects ----

/// verl divides by counts to which it adds 1e-8.
const VERL: (f64, f64) = (3e-8, 1e-9);

/// A case's log-probabilities and mask, by the names of its inputs.
struct Case<'a> {
    case: &'a Golden,
    old_logp: Vec<f64>,
    rollout_logp: Vec<f64>,
    mask: Option<Vec<u8>>,
    shape: [usize; 2],
}

impl<'a> Case<'a> {
    fn new(case: &'a Golden, [old_logp, rollout_logp, mask]: [&str; 3]) -> Self {
        let shape = case.shape(old_logp);
        Self {
            case,
            old_logp: case.input(old_logp),
            rollout_logp: case.input(rollout_logp),
            mask: case.inputs.contains_key(mask).then(|| case.mask(mask)),
            shape: [shape[0], shape[1]],
        }
    }

    fn run(&self, options: &CorrectionOptions) -> Output {
        let inputs = reference::Inputs {
            mask: self.mask.as_deref(),
            ..reference::Inputs::new(&self.old_logp, &self.rollout_logp)
        };
        let [batch, seq_len] = self.shape;
        reference::correction(&inputs, batch, seq_len, options).unwrap()
    }

    /// The output of that name, where `mask` keeps.
    #[track_caller]
    fn expect_kept(&self, key: &str, mask: &[u8], ours: &[f64], tolerance: (f64, f64)) {
        let theirs: Vec<f64> = self.case.output(key);
        let pick = |x: &[f64]| -> Vec<f64> {
            x.iter().zip(mask).filter(|(_, &m)| m != 0).map(|(&x, _)| x).collect()
        };
        let what = format!("{} {key}", self.case.id);
        assert_close(&what, &pick(ours), &pick(&theirs), tolerance.0, tolerance.1);
    }
}

const NAMES: [&str; 3] = ["old_log_prob", "rollout_log_prob", "response_mask"];

/// "x", or "low_high".
fn threshold(text: &str) -> (Option<f64>, f64) {
    let number = |x: &str| x.parse::<f64>().unwrap();
    match text.split_once('_') {
        Some((low, high)) => (Some(number(low)), number(high)),
        None => (None, number(text)),
    }
}

/// A setting as text, whether it is a number or not; `None` where it is missing or null.
fn text(settings: &serde_json::Map<String, Value>, key: &str) -> Option<String> {
    match settings.get(key)? {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        number => Some(number.to_string()),
    }
}

/// verl's `rollout_is` and `rollout_rs`, the names of several rules with commas between them.
fn of_verl(settings: &serde_json::Map<String, Value>) -> CorrectionOptions {
    let mut options = match text(settings, "rollout_is") {
        None => CorrectionOptions::reject(Rejection::NONE),
        Some(level) => {
            let bounds = text(settings, "rollout_is_threshold").unwrap_or("2.0".into());
            let (low, high) = threshold(&bounds);
            CorrectionOptions {
                level: match level.as_str() {
                    "token" => WeightLevel::Token,
                    "sequence" => WeightLevel::SequenceSum,
                    other => panic!("{other}"),
                },
                low,
                // A single number truncates.
                outside: if low.is_some() { Outside::Zero } else { Outside::Truncate },
                normalise: settings.get("rollout_is_batch_normalize") == Some(&Value::Bool(true)),
                ..CorrectionOptions::tis(high)
            }
        }
    };
    if let Some(names) = text(settings, "rollout_rs") {
        let thresholds = text(settings, "rollout_rs_threshold").unwrap();
        let mut rules = names.split(',').zip(thresholds.split(',')).map(|(name, bounds)| {
            let (low, high) = threshold(bounds);
            Rejection::verl(name, low, high).unwrap()
        });
        options.rejection = rules.next().unwrap();
        options.second_rejection = rules.next().unwrap_or(Rejection::NONE);
        assert!(rules.next().is_none());
    }
    options
}

#[test]
fn reference_equals_verl_weights_rejections_and_metrics() {
    let (mut ran, mut raised) = (0, 0);
    for case in golden("rollout_correction").iter().filter(|case| case.peer == "verl") {
        let of = Case::new(case, NAMES);
        let options = of_verl(&case.inputs);
        let ours = of.run(&options);
        if case.outputs.contains_key("raises") {
            // There is no token: no weight, and nothing that is not a number.
            assert_eq!(ours.stats, CorrectionStats::none());
            raised += 1;
            continue;
        }
        if case.outputs.contains_key("response_mask") {
            let kept: Vec<f64> = ours.kept.iter().map(|&m| f64::from(m)).collect();
            expect(case, "response_mask", &kept, EXACT);
        }
        if case.outputs.get("weights").is_some_and(|weights| !weights.is_null()) {
            // What verl rejects keeps its weight, which no mask has any more.
            of.expect_kept("weights", &ours.kept, &ours.weights, VERL);
        }
        let stats = ours.stats;
        let metrics = case.outputs["metrics"].as_object().unwrap();
        let check = |key: &str, ours: f64, (rel, abs): (f64, f64)| {
            let names = [key.to_string(), format!("rollout_corr/{key}")];
            if let Some(theirs) = names.iter().find_map(|name| metrics.get(name)) {
                let what = format!("{} {key}", case.id);
                assert_close(&what, &[ours], &[theirs.as_f64().unwrap()], rel, abs);
            }
        };
        let mean = |sum: f64| sum / stats.tokens;
        check("kl", -mean(stats.log_ratio_sum), VERL);
        check("k3_kl", mean(stats.k3_sum), VERL);
        check("chi2_token", mean(stats.ratio_square_sum) - 1.0, (1e-7, 1e-7));
        check("chi2_seq", stats.row_ratio_square_sum / stats.rows - 1.0, (1e-7, 1e-7));
        check("training_log_ppl", stats.log_ppl_sum / stats.rows, (1e-7, 1e-8));
        check("rollout_log_ppl", stats.rollout_log_ppl_sum / stats.rows, (1e-7, 1e-8));
        let per_token = options.level == WeightLevel::Token;
        if per_token {
            check("rollout_is_ratio_fraction_high", mean(stats.above_tokens), VERL);
        }
        if per_token && options.outside == Outside::Truncate && !options.normalise {
            // verl's are of the bounded weights, before rejections and normalisation.
            let alone = CorrectionOptions { rejection: Rejection::NONE, ..options };
            let stats = of.run(&alone).stats;
            check("rollout_is_mean", mean(stats.weight_sum), VERL);
            check("rollout_is_max", stats.weight_max, VERL);
            check("rollout_is_min", stats.weight_min, VERL);
            check("rollout_is_eff_sample_size", stats.ess, (1e-7, 1e-7));
        }
        if options.rejection != Rejection::NONE && options.level == WeightLevel::None {
            check("rollout_rs_masked_fraction", mean(stats.rejected_tokens), VERL);
            // Over all rows, those without a token too.
            let rows = stats.rejected_rows / of.shape[0] as f64;
            check("rollout_rs_seq_masked_fraction", rows, (1e-7, 0.0));
        }
        ran += 1;
    }
    assert_eq!((ran, raised), (27, 1));
}

#[test]
fn reference_equals_trl_importance_sampling_ratios() {
    let mut ran = 0;
    for case in golden("rollout_correction").iter().filter(|case| case.peer == "trl") {
        let of = Case::new(case, NAMES);
        let (level, kind) = case.text("mode").split_once('_').unwrap();
        let options = CorrectionOptions {
            level: if level == "token" { WeightLevel::Token } else { WeightLevel::SequenceSum },
            outside: if kind == "mask" { Outside::Zero } else { Outside::Truncate },
            low: case.optional("clip_min"),
            high: case.optional("clip_max"),
            ..CorrectionOptions::sequence_mask(3.0)
        };
        let ours = of.run(&options).weights;
        let mask = of.mask.as_ref().unwrap();
        // TRL has 1 where masked, and one number a row where that is the level.
        let width = case.output("weights").len() / of.shape[0];
        let theirs = case.output("weights");
        for (t, &ours) in ours.iter().enumerate().filter(|(t, _)| mask[*t] != 0) {
            let (row, column) = (t / of.shape[1], t % of.shape[1]);
            let theirs = theirs[row * width + column.min(width - 1)];
            assert_close(&format!("{} {t}", case.id), &[ours], &[theirs], 1e-9, 1e-10);
        }
        ran += 1;
    }
    assert_eq!(ran, 12);
}

/// A loss whose weights are those of a correction.
fn corrected(
    of: &Case,
    logp: &str,
    options: &CorrectionOptions,
    loss: &PpoLossOptions,
) -> ppo_kernels::ppo_loss::reference::Output {
    let data = ppo_loss_cases::Data {
        batch: of.shape[0],
        seq_len: of.shape[1],
        logp: of.case.input(logp),
        old_logp: of.old_logp.clone(),
        advantages: of.case.input("advantages"),
        rollout_logp: Some(of.rollout_logp.clone()),
        weights: Some(of.run(options).weights),
        mask: of.mask.clone(),
        ..Default::default()
    };
    run(&data, loss)
}

#[test]
fn reference_equals_openrlhf_corrected_losses() {
    let mut ran = 0;
    let names = ["old_log_probs", "rollout_log_probs", "action_mask"];
    for case in golden("rollout_correction").iter().filter(|case| case.peer == "openrlhf") {
        let of = Case::new(case, names);
        if case.function.contains("gspo") {
            // Where there is a correction, the ratio is against the rollout.
            let is_on = case.text("is_correction_level") != "off";
            let against = if is_on { &of.rollout_logp } else { &of.old_logp };
            let data = ppo_loss_cases::Data {
                batch: of.shape[0],
                seq_len: of.shape[1],
                logp: case.input("log_probs"),
                old_logp: against.clone(),
                advantages: case.input("advantages"),
                mask: of.mask.clone(),
                ..Default::default()
            };
            let options = PpoLossOptions {
                ratio: RatioLevel::SequenceMean,
                clip_range: case.number("clip_eps_low"),
                clip_range_high: case.optional("clip_eps_high"),
                aggregation: Aggregation::SeqMeanTokenMean,
                ..plain()
            };
            let ours = run(&data, &options);
            expect(case, "loss", &[ours.stats.loss], EPSILON);
            expect(case, "grad_log_probs", &ours.grad_logp, EPSILON);
            ran += 1;
            continue;
        }
        let bounds = case.input("is_correction_threshold");
        let (low, high) = (Some(bounds[0]).filter(|&low| low > 0.0), Some(bounds[1]));
        let options = if case.text("is_correction_mode") == "clip" {
            CorrectionOptions { low, ..CorrectionOptions::tis(bounds[1]) }
        } else {
            let rejection = Rejection {
                metric: match case.text("is_correction_gating") {
                    "ratio" => RejectionMetric::Ratio,
                    "binary_kl" => RejectionMetric::BinaryKl,
                    "tv" => RejectionMetric::TotalVariation,
                    other => panic!("{other}"),
                },
                level: match case.text("is_correction_level") {
                    "token" => RejectionLevel::Token,
                    "seq" => RejectionLevel::SequenceMean,
                    other => panic!("{other}"),
                },
                low,
                high,
            };
            // Tokens' own weights, without a bound.
            CorrectionOptions { high: None, rejection, ..CorrectionOptions::default() }
        };
        let by_token = case.inputs["token_level_loss"].as_bool().unwrap();
        let loss =
            PpoLossOptions { log_ratio_clamp: Some(20.0), ..openrlhf_aggregation(case, by_token) };
        let ours = corrected(&of, "log_probs", &options, &loss);
        let tolerance = tolerance_of(loss.aggregation);
        expect(case, "loss", &[ours.stats.loss], tolerance);
        expect(case, "grad_log_probs", &ours.grad_logp, tolerance);
        expect(case, "clip_ratio", &[ours.stats.clip_fraction], EXACT);
        let stats = of.run(&options).stats;
        expect(case, "vllm_kl", &[-stats.log_ratio_sum / stats.tokens], EXACT);
        let outside = if options.rejection == Rejection::NONE {
            (stats.below_tokens + stats.above_tokens) / stats.tokens
        } else if case.text("is_correction_level") == "seq" {
            // A share of the rows.
            stats.rejected_rows / of.shape[0] as f64
        } else {
            stats.rejected_tokens / stats.tokens
        };
        expect(case, "is_filter_ratio", &[outside], EXACT);
        ran += 1;
    }
    assert_eq!(ran, 16);
}

#[test]
fn reference_equals_openrlhf_vllm_corrections() {
    let mut ran = 0;
    let names = ["old_log_probs", "rollout_log_probs", "action_mask"];
    for case in golden("policy_loss_others") {
        if case.peer != "openrlhf" || !case.function.contains("vLLM") {
            continue;
        }
        let of = Case::new(&case, names);
        let bounds = case.input("vllm_is_truncated_threshold");
        let options = match case.text("vllm_is_correction_type") {
            "tis" => {
                CorrectionOptions { low: Some(bounds[0]), ..CorrectionOptions::tis(bounds[1]) }
            }
            "icepop" => CorrectionOptions::icepop(bounds[0], bounds[1]),
            "seq-mask-tis" => CorrectionOptions::geometric_mask(bounds[0], bounds[1]),
            other => panic!("{other}"),
        };
        let loss =
            PpoLossOptions { log_ratio_clamp: Some(20.0), ..openrlhf_aggregation(&case, true) };
        let ours = corrected(&of, "log_probs", &options, &loss);
        expect(&case, "loss", &[ours.stats.loss], EXACT);
        expect(&case, "grad_log_probs", &ours.grad_logp, EXACT);
        let stats = of.run(&options).stats;
        expect(&case, "vllm_kl", &[-stats.log_ratio_sum / stats.tokens], EXACT);
        ran += 1;
    }
    assert_eq!(ran, 6);
}

#[test]
fn reference_equals_slime_weights() {
    let mut ran = 0;
    for case in golden("rollout_correction").iter().filter(|case| case.peer == "slime") {
        let of = Case::new(case, NAMES);
        let (low, high) = (case.number("tis_clip_low"), case.number("tis_clip"));
        let options = match case.function.ends_with("icepop_function") {
            true => CorrectionOptions::icepop(low, high),
            false => CorrectionOptions { low: Some(low), ..CorrectionOptions::tis(high) },
        };
        let ours = of.run(&options);
        let losses = case.input("pg_loss");
        let weighted: Vec<f64> = ours.weights.iter().zip(losses).map(|(w, l)| w * l).collect();
        expect(case, "pg_loss", &weighted, EXACT);
        let clipped = flatten(&case.outputs["metrics"]["tis_clipfrac"]);
        let outside = ours.stats.below_tokens + ours.stats.above_tokens;
        assert_eq!(outside, clipped.iter().sum::<f64>(), "{}", case.id);
        ran += 1;
    }
    assert_eq!(ran, 4);
}

#[test]
fn reference_equals_areal_rejection_sampling() {
    let mut ran = 0;
    let names = ["proximal_logprobs", "old_logprobs", "loss_mask"];
    for case in golden("rollout_correction").iter().filter(|case| case.peer == "areal") {
        let of = Case::new(case, names);
        let (low, high) = (case.optional("lower"), case.optional("upper"));
        let level = match (case.text("level"), case.text("agg")) {
            ("token", _) => RejectionLevel::Token,
            (_, "mean") => RejectionLevel::SequenceMean,
            (_, "sum") => RejectionLevel::SequenceSum,
            _ => RejectionLevel::SequenceMax,
        };
        let rule = |metric| Rejection { metric, level, low, high };
        // Of a row's ratio the weight is its geometric mean.
        let weight = match case.text("metric") {
            "ratio" if level != RejectionLevel::Token => WeightLevel::SequenceMean,
            _ => WeightLevel::Token,
        };
        let clamps = case.text("action") == "clamp";
        let free = CorrectionOptions { level: weight, high: None, ..CorrectionOptions::default() };
        let options = if clamps {
            CorrectionOptions { low, high, ..free }
        } else {
            let rejection = match case.text("metric") {
                "ratio" => rule(RejectionMetric::Ratio),
                "kl_k1" => Rejection::areal_k1(level, low, high),
                "kl_k2" => rule(RejectionMetric::K2),
                "kl_k3" => rule(RejectionMetric::ReverseK3),
                "binary_kl" => rule(RejectionMetric::BinaryKlMax),
                other => panic!("{other}"),
            };
            CorrectionOptions { rejection, ..free }
        };
        let ours = of.run(&options);
        let kept: Vec<f64> = ours.kept.iter().map(|&m| f64::from(m)).collect();
        expect(case, "loss_mask", &kept, EXACT);
        expect(case, "weights", &ours.weights, (2e-5, 1e-6));
        let stats = ours.stats;
        let outside = match clamps {
            true => stats.below_tokens + stats.above_tokens,
            false => stats.rejected_tokens,
        };
        expect(case, "filtered_fraction", &[outside / stats.tokens], (1e-6, 0.0));
        ran += 1;
    }
    assert_eq!(ran, 11);
}

#[test]
fn reference_equals_unsloth_mismatch_sums() {
    let mut ran = 0;
    for case in golden("rollout_correction").iter().filter(|case| case.peer == "unsloth") {
        let of = Case::new(case, NAMES);
        let any = CorrectionOptions { high: None, log_ratio_clamp: None, ..Default::default() };
        let stats = of.run(&any).stats;
        // Its weights are given: those of a trainer with these logarithms, where the rollout has 0.
        let given = Case {
            old_logp: case.input("weights").iter().map(|w| w.ln()).collect(),
            rollout_logp: of.rollout_logp.iter().map(|x| x * 0.0).collect(),
            mask: of.mask.clone(),
            ..of
        };
        let weights = given.run(&any).stats;
        let sums = [
            stats.tokens,
            -stats.log_ratio_sum,
            stats.k3_sum,
            stats.k3_max,
            weights.weight_sum,
            weights.weight_square_sum,
            weights.rejected_tokens,
            stats.rows,
            weights.rejected_rows,
        ];
        expect(case, "sums", &sums, EXACT);
        let metrics = case.outputs["metrics"].as_object().unwrap();
        let ess = metrics["sampling/importance_sampling_ess"].as_f64().unwrap();
        assert_close(&case.id, &[weights.ess], &[ess], 1e-9, 0.0);
        ran += 1;
    }
    assert_eq!(ran, 2);
}

#[test]
fn reference_equals_nemo_corrected_losses() {
    let mut ran = 0;
    for case in golden("policy_loss_others").iter().filter(|case| case.peer == "nemo-rl") {
        let settings = case.inputs["options"].as_object().unwrap();
        if !setting_is_true(case, "use_importance_sampling_correction") {
            continue;
        }
        let number = |key| setting(case, "options", key);
        let (low, high) = (
            number("truncated_importance_sampling_ratio_min"),
            number("truncated_importance_sampling_ratio"),
        );
        let kind = settings.get("truncated_importance_sampling_type").and_then(Value::as_str);
        let options = match kind {
            None => CorrectionOptions { high: None, ..CorrectionOptions::default() },
            Some("tis") => CorrectionOptions::tis(high.unwrap()),
            Some("icepop") => CorrectionOptions::icepop(low.unwrap(), high.unwrap()),
            Some("seq-mask-tis") => CorrectionOptions::geometric_mask(low.unwrap(), high.unwrap()),
            Some(other) => panic!("{other}"),
        };
        let data = nemo_data(case);
        let of = Case {
            case,
            old_logp: data.old_logp.clone(),
            rollout_logp: data.rollout_logp.clone().unwrap(),
            mask: data.mask.clone(),
            shape: [data.batch, data.seq_len],
        };
        let corrected = of.run(&options);
        expect_nemo(case, &ppo_loss_cases::Data { weights: Some(corrected.weights), ..data });
        let stats = corrected.stats;
        for (key, ours) in [
            ("token_mult_prob_error", stats.mult_prob_error_sum / stats.tokens),
            ("sampling_importance_ratio", stats.weight_sum / stats.tokens),
        ] {
            expect_stat(case, "metrics", key, ours, EPSILON);
        }
        let outside = match kind {
            None => None,
            Some("seq-mask-tis") => Some(stats.rejected_rows / stats.rows),
            Some(_) => Some((stats.below_tokens + stats.above_tokens) / stats.tokens),
        };
        if let Some(outside) = outside {
            expect_stat(case, "metrics", "is_oob_ratio", outside, EPSILON);
        }
        ran += 1;
    }
    assert_eq!(ran, 4);
}

#[test]
fn reference_equals_verl_bypass_mode() {
    let mut ran = 0;
    for case in golden("policy_loss_verl2") {
        if !case.function.ends_with("bypass_mode") {
            continue;
        }
        // The policy that is trained against the rollout, which has the place of the old one.
        let of = Case::new(&case, ["log_prob", "old_log_prob", "response_mask"]);
        let settings = case.inputs["rollout_correction"].as_object().unwrap();
        let corrected = of.run(&of_verl(settings));
        let reinforce = settings["loss_type"] == "reinforce";
        // The ratio of the clipped surrogate is the correction: no weight besides.
        let weights = reinforce.then_some(corrected.weights);
        let data = ppo_loss_cases::Data {
            batch: of.shape[0],
            seq_len: of.shape[1],
            logp: of.old_logp.clone(),
            old_logp: of.rollout_logp.clone(),
            advantages: case.input("advantages"),
            weights,
            // What is rejected leaves the denominator too.
            mask: Some(corrected.kept),
            ..Default::default()
        };
        let loss = match reinforce {
            true => PpoLossOptions { surrogate: Surrogate::Reinforce, ..plain() },
            false => PpoLossOptions {
                clip_range: case.number("clip_ratio_low"),
                clip_range_high: case.optional("clip_ratio_high"),
                dual_clip: case.optional("clip_ratio_c"),
                log_ratio_clamp: Some(20.0),
                ..plain()
            },
        };
        assert_eq!(case.text("loss_agg_mode"), "token-mean");
        let ours = run(&data, &loss);
        expect(&case, "loss", &[ours.stats.loss], VERL);
        expect_grad(&case, "grad_log_prob", &ours.grad_logp, VERL);
        expect(&case, "ppo_kl", &[ours.stats.approx_kl_k1], VERL);
        ran += 1;
    }
    assert_eq!(ran, 3);
}

// ---- the reference by itself ----

/// Two rows that can be worked out by eye: ratios 1, 2 and 4, and 1/2 and one that was not scored; the last
/// token is masked.
fn by_eye() -> Data {
    let ln2 = std::f32::consts::LN_2;
    Data {
        batch: 2,
        seq_len: 3,
        old_logp: vec![-3.0; 6],
        rollout_logp: [0.0, ln2, 2.0 * ln2, -ln2, f32::NAN, 5.0].map(|d| -3.0 - d).to_vec(),
        mask: Some(vec![1, 1, 1, 1, 1, 0]),
        offsets: None,
    }
}

#[test]
fn weights_and_statistics_are_those_of_the_formulas() {
    let data = by_eye();
    let near = |what: &str, ours: &[f64], want: &[f64]| assert_close(what, ours, want, 1e-6, 1e-7);
    let free = CorrectionOptions { high: None, ..CorrectionOptions::default() };
    let ours = data.reference(&free);
    near("raw", &ours.weights, &[1.0, 2.0, 4.0, 0.5, 1.0, 0.0]);
    assert_eq!(ours.kept, [1, 1, 1, 1, 1, 0]);
    let stats = ours.stats;
    let (ln2, k3) = (std::f64::consts::LN_2, |r: f64| r - 1.0 - r.ln());
    for (name, ours, want) in [
        ("tokens", stats.tokens, 4.0),
        ("unscored", stats.unscored_tokens, 1.0),
        ("rejected", stats.rejected_tokens, 0.0),
        ("rows", stats.rows, 2.0),
        ("weight_sum", stats.weight_sum, 7.5),
        ("weight_square_sum", stats.weight_square_sum, 21.25),
        ("weight_min", stats.weight_min, 0.5),
        ("weight_max", stats.weight_max, 4.0),
        ("log_ratio_sum", stats.log_ratio_sum, 2.0 * ln2),
        ("log_ratio_abs_sum", stats.log_ratio_abs_sum, 4.0 * ln2),
        ("log_ratio_abs_max", stats.log_ratio_abs_max, 2.0 * ln2),
        ("k3_sum", stats.k3_sum, k3(2.0) + k3(4.0) + k3(0.5)),
        ("k3_max", stats.k3_max, k3(4.0)),
        ("ratio_square_sum", stats.ratio_square_sum, 1.0 + 4.0 + 16.0 + 0.25),
        ("mult_prob_error_sum", stats.mult_prob_error_sum, 1.0 + 2.0 + 4.0 + 2.0),
        ("row_ratio_square_sum", stats.row_ratio_square_sum, 64.0 + 0.25),
        ("log_ppl_sum", stats.log_ppl_sum, 6.0),
        ("rollout_log_ppl_sum", stats.rollout_log_ppl_sum, (3.0 + ln2) + (3.0 - ln2)),
        ("ess", stats.ess, 7.5 * 7.5 / (4.0 * 21.25)),
    ] {
        near(name, &[ours], &[want]);
    }
    let weights = |options| data.reference(&options).weights;
    let third = 1.0 / 3.0;
    near("tis", &weights(CorrectionOptions::tis(2.5)), &[1.0, 2.0, 2.5, 0.5, 1.0, 0.0]);
    near("icepop", &weights(CorrectionOptions::icepop(0.6, 3.0)), &[1.0, 2.0, 0.0, 0.0, 1.0, 0.0]);
    near(
        "sequence",
        &weights(CorrectionOptions::sequence_tis(7.0)),
        &[7.0, 7.0, 7.0, 0.5, 0.5, 0.0],
    );
    near(
        "geometric",
        &weights(CorrectionOptions::geometric(0.1, 3.0)),
        &[2.0, 2.0, 2.0, 0.5_f64.sqrt(), 0.5_f64.sqrt(), 0.0],
    );
    near(
        "geometric mask",
        &weights(CorrectionOptions::geometric_mask(0.75, 9.0)),
        &[1.0, 2.0, 4.0, 0.0, 0.0, 0.0],
    );
    // The mean of all unmasked tokens is 1, that of one that was not scored among them.
    let tis = CorrectionOptions { normalise: true, ..CorrectionOptions::tis(2.5) };
    near(
        "normalised",
        &weights(tis),
        &[5.0 / 7.0, 10.0 / 7.0, 12.5 / 7.0, 2.5 / 7.0, 5.0 / 7.0, 0.0],
    );
    // Of rows' weights, 3 and 1/2, over the rows.
    let sequence = CorrectionOptions { normalise: true, ..CorrectionOptions::sequence_tis(3.0) };
    let (a, b) = (12.0 / 7.0, 2.0 / 7.0);
    near("normalised rows", &weights(sequence), &[a, a, a, b, b, 0.0]);
    let none = CorrectionOptions::reject(Rejection::verl("token_k1", Some(third), 1.5).unwrap());
    let ours = data.reference(&none);
    // The inverse ratios are 1, 1/2, 1/4 and 2.
    near("verl's k1", &ours.weights, &[1.0, 1.0, 0.0, 0.0, 1.0, 0.0]);
    assert_eq!(ours.kept, [1, 1, 0, 0, 1, 0]);
    assert_eq!((ours.stats.rejected_tokens, ours.stats.rejected_rows), (2.0, 2.0));
}

#[test]
fn no_token_and_no_weight_make_nothing_nan() {
    let mut data = by_eye();
    data.mask = Some(vec![0; 6]);
    for (name, options) in option_sets() {
        let ours = data.reference(&options);
        assert_eq!(ours.stats, CorrectionStats::none(), "{name}");
        assert!(ours.weights.iter().all(|&w| w == 0.0), "{name}");
        check(name, &data, &options, &run_cpu(&data, &options).unwrap());
    }
    // Every weight is 0.
    let data = Data { mask: None, ..by_eye() };
    let options = CorrectionOptions { normalise: true, ..CorrectionOptions::icepop(10.0, 20.0) };
    let found = run_cpu(&Data { rollout_logp: vec![-3.0; 6], ..data.clone() }, &options).unwrap();
    assert_eq!((found.stats.ess, found.stats.weight_max, found.stats.weight_min), (0.0, 0.0, 0.0));
    assert_eq!(found.stats.rejected_tokens, 6.0);
    assert_eq!(found.kept, [1; 6], "outside the bounds of the weight is not rejected");
    // No token was scored.
    let data = Data { rollout_logp: vec![f32::NAN; 6], ..data };
    let found = run_cpu(&data, &CorrectionOptions::default()).unwrap();
    assert_eq!(found.weights, [1.0; 6]);
    let want = CorrectionStats { unscored_tokens: 6.0, ..CorrectionStats::none() };
    assert_eq!(found.stats, want);
}

#[test]
fn ranks_can_merge_their_statistics() {
    let data = rollout(&mut rng(7), 6, 40, true);
    let options = CorrectionOptions::icepop(0.7, 1.3);
    let parts = (0..6).map(|b| data.row(b).reference(&options).stats);
    let merged = parts.fold(CorrectionStats::none(), CorrectionStats::merge);
    let whole = data.reference(&options).stats;
    assert_close("merged", &merged.to_array(), &whole.to_array(), 1e-12, 1e-12);
    assert!(whole.ess > 0.1 && whole.ess < 1.0);
    assert_eq!(CorrectionStats::from_array(whole.to_array()), whole);
}

// ---- the CPU ----

const SHAPES: [(usize, usize); 9] =
    [(1, 1), (3, 7), (2, 16), (5, 17), (1, 511), (4, 512), (3, 513), (2, 2500), (300, 3)];

#[test]
fn cpu_agrees_with_the_reference_for_every_option_and_shape() {
    let mut rng = rng(1);
    for (name, options) in option_sets() {
        for (batch, seq_len) in SHAPES {
            for masked in [false, true] {
                let data = rollout(&mut rng, batch, seq_len, masked);
                let data = clear_of_bounds(data, &options);
                let what = format!("{name} [{batch}, {seq_len}] masked={masked}");
                check(&what, &data, &options, &run_cpu(&data, &options).unwrap());
            }
        }
    }
}

#[test]
fn every_option_does_something() {
    let data = rollout(&mut rng(2), 40, 30, true);
    let plain = data.reference(&CorrectionOptions { high: None, ..Default::default() });
    for (name, options) in option_sets().into_iter().filter(|(name, _)| *name != "no bounds") {
        let ours = data.reference(&options);
        assert_ne!(ours.weights, plain.weights, "{name}");
        let some = ours.weights.iter().any(|&w| w != 0.0);
        assert!(some, "{name}: nothing is left");
        let rejections = [options.rejection, options.second_rejection];
        if rejections != [Rejection::NONE; 2] {
            assert_ne!(ours.kept, plain.kept, "{name}: nothing is rejected");
        }
    }
}

#[test]
fn bits_depend_on_the_row_alone_and_on_no_number_of_threads() {
    let data = rollout(&mut rng(3), 37, 700, true);
    for (name, options) in option_sets() {
        let found = with_threads(1, || run_cpu(&data, &options).unwrap());
        for threads in [2, 5] {
            let again = with_threads(threads, || run_cpu(&data, &options).unwrap());
            assert_eq!(again.bits(), found.bits(), "{name}");
        }
        if options.normalise {
            continue;
        }
        for b in [0, 17] {
            let alone = run_cpu(&data.row(b), &options).unwrap();
            let at = b * 700..(b + 1) * 700;
            assert_eq!(alone.weights, found.weights[at.clone()], "{name}");
            assert_eq!(alone.kept, found.kept[at], "{name}");
        }
    }
}

#[test]
fn packed_rows_have_the_bits_of_padded_ones() {
    let mut rng = rng(20);
    for (name, options) in option_sets() {
        for (batch, seq_len) in [(2, 3), (9, 40), (4, 1500)] {
            let sample = Packed::new(&mut rng, batch, seq_len, &options);
            let what = format!("{name}: {batch}x{seq_len}");
            let [padded, packed] =
                [&sample.padded, &sample.packed].map(|data| run_cpu(data, &options).unwrap());
            sample.check(&what, &options, &padded, &packed);
            check(&what, &sample.packed, &options, &packed);
        }
    }
}

#[test]
fn offsets_that_are_none_are_refused() {
    let mut data = by_eye();
    (data.seq_len, data.offsets) = (6, Some(vec![0, 0, 6]));
    run_cpu(&data, &CorrectionOptions::default()).unwrap();
    for (offsets, words) in BAD_OFFSETS {
        data.offsets = Some(offsets.to_vec());
        let error = run_cpu(&data, &CorrectionOptions::default()).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
}

#[test]
fn infinities_are_clamped_and_nan_of_the_trainer_shows() {
    let inf = f32::INFINITY;
    let data = Data {
        batch: 1,
        seq_len: 4,
        old_logp: vec![-1.0, -inf, -1.0, f32::NAN],
        rollout_logp: vec![-inf, -1.0, -1.0, -1.0],
        mask: None,
        offsets: None,
    };
    let found = run_cpu(&data, &CorrectionOptions::icepop(0.5, 2.0)).unwrap();
    assert_eq!(found.weights[..3], [0.0, 0.0, 1.0]);
    assert!(found.weights[3].is_nan() && found.stats.weight_sum.is_nan());
    let rows = Data { seq_len: 3, old_logp: data.old_logp[..3].to_vec(), ..data.clone() };
    let rows = Data { rollout_logp: data.rollout_logp[..3].to_vec(), ..rows };
    for (name, options) in option_sets().into_iter().filter(|(_, o)| o.log_ratio_clamp.is_some()) {
        check(name, &rows, &options, &run_cpu(&rows, &options).unwrap());
    }
    let rule = |metric| Rejection { metric, high: Some(0.1), ..Rejection::NONE };
    for metric in [
        RejectionMetric::K3,
        RejectionMetric::BinaryKl,
        RejectionMetric::BinaryKlMax,
        RejectionMetric::TotalVariation,
    ] {
        let found = run_cpu(&rows, &CorrectionOptions::reject(rule(metric))).unwrap();
        assert_eq!(found.kept, [0, 0, 1], "{metric:?}");
    }
    let free = CorrectionOptions { log_ratio_clamp: None, high: None, ..Default::default() };
    let found = run_cpu(&rows, &free).unwrap();
    assert_eq!(found.weights, [inf, 0.0, 1.0]);
}

#[test]
fn an_empty_batch_is_a_batch() {
    for (batch, seq_len) in [(0, 5), (5, 0), (0, 0)] {
        let data = Data { batch, seq_len, ..Default::default() };
        for (name, options) in option_sets() {
            let found = run_cpu(&data, &options).unwrap();
            assert_eq!(found.stats, CorrectionStats::none(), "{name}");
        }
    }
}

#[test]
fn corrections_are_known_by_name() {
    for name in CorrectionOptions::NAMES {
        CorrectionOptions::of(name).unwrap();
    }
    assert_eq!(CorrectionOptions::of("tis").unwrap(), CorrectionOptions::default());
    let error = CorrectionOptions::of("tiss").unwrap_err().to_string();
    assert!(error.contains("geometric_mask") && error.contains("\"tiss\""), "{error}");
}

// ---- refusals ----

#[track_caller]
fn refused(options: CorrectionOptions, option: &str, expected: &str) {
    let data = by_eye();
    let error = run_cpu(&data, &options).unwrap_err();
    let Error::Option { op: "correction", option: named, expected: ours, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(*named, option, "{error}");
    assert!(ours.contains(expected), "{error}");
}

#[test]
fn options_out_of_their_range_are_refused_by_name() {
    use RejectionMetric as M;
    let default = CorrectionOptions::default();
    let clamp = |log_ratio_clamp| CorrectionOptions { log_ratio_clamp, ..default };
    refused(clamp(Some(0.0)), "log_ratio_clamp", "above 0");
    refused(clamp(Some(f64::NAN)), "log_ratio_clamp", "above 0");
    let bounds = |low, high| CorrectionOptions { low, high, ..default };
    refused(bounds(Some(-0.5), None), "low", "0 or more, or none");
    refused(bounds(Some(f64::NAN), None), "low", "0 or more, or none");
    refused(bounds(None, Some(f64::INFINITY)), "high", "0 or more, or none");
    refused(bounds(Some(2.0), Some(1.0)), "high", "2.0 or more, the lower bound");
    let rule = |metric, low, high| Rejection { metric, low, high, ..Rejection::NONE };
    let first = |rejection| CorrectionOptions { rejection, ..default };
    let second = |second_rejection| CorrectionOptions { second_rejection, ..default };
    let ratio = |low, high| rule(M::Ratio, low, high);
    refused(first(ratio(Some(0.0), None)), "rejection.low", "above 0, for its logarithm");
    refused(first(ratio(None, Some(-1.0))), "rejection.high", "above 0, for its logarithm");
    refused(second(ratio(Some(1.5), Some(0.5))), "second_rejection.high", "1.5 or more");
    refused(first(rule(M::K2, None, Some(-0.1))), "rejection.high", "0 or more, or none");
    refused(first(rule(M::K3, None, None)), "rejection.metric", "a lower or an upper bound");
    refused(second(rule(M::K3, None, None)), "second_rejection.metric", "a lower or an upper");
    refused(first(rule(M::None, None, Some(0.1))), "rejection.high", "none without a metric");
    refused(second(rule(M::None, Some(0.1), None)), "second_rejection.low", "none without a");
    for name in ["k1", "seq_k1", "token_k4", "seq_min_k2", ""] {
        assert!(Rejection::verl(name, None, 1.0).is_err(), "{name}");
    }
    assert!(Rejection::verl("token_k1", Some(0.0), 1.0).is_err());
    assert!(Rejection::verl("seq_sum_k1", None, 0.0).is_err());
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let data = by_eye();
    let five = vec![0.0; 5];
    let (mut weights, mut kept, mut stats) = (vec![0.0; 6], vec![0; 6], [unwritten()]);
    let mut call = |inputs: cpu::Inputs, name: &str| {
        let outputs =
            cpu::Outputs { kept: Some(&mut kept), ..cpu::Outputs::new(&mut weights, &mut stats) };
        let error =
            cpu::correction(inputs, 2, 3, &CorrectionOptions::default(), outputs).unwrap_err();
        assert!(error.to_string().contains(&format!("`{name}` has shape [5], expected [6]")));
    };
    let inputs = data.inputs();
    call(cpu::Inputs { old_logp: &five, ..inputs }, "old_logp");
    call(cpu::Inputs { rollout_logp: &five, ..inputs }, "rollout_logp");
    call(cpu::Inputs { mask: Some(&[1; 5]), ..inputs }, "mask");
    assert_eq!(stats[0], unwritten());
    for (weights, kept, name) in [(5, 6, "weights"), (6, 5, "kept")] {
        let (mut weights, mut kept, mut stats) = (vec![0.0; weights], vec![0; kept], [unwritten()]);
        let outputs =
            cpu::Outputs { kept: Some(&mut kept), ..cpu::Outputs::new(&mut weights, &mut stats) };
        let error = cpu::correction(inputs, 2, 3, &CorrectionOptions::default(), outputs);
        let error = error.unwrap_err().to_string();
        assert!(error.contains(&format!("`{name}` has shape [5], expected [6]")), "{error}");
    }
}

// ---- candle ----

#[test]
fn tensors_give_constants_with_the_bits_of_slices() {
    let data = rollout(&mut rng(4), 5, 60, true);
    let tensor = |x: &[f32]| Tensor::from_slice(x, (5, 60), &Device::Cpu).unwrap();
    let (old_logp, rollout_logp) =
        (Var::from_tensor(&tensor(&data.old_logp)).unwrap(), tensor(&data.rollout_logp));
    let mask = Tensor::from_slice(data.mask.as_ref().unwrap(), (5, 60), &Device::Cpu).unwrap();
    let inputs =
        CorrectionInputs { mask: Some(&mask), ..CorrectionInputs::new(&old_logp, &rollout_logp) };
    for (name, options) in option_sets() {
        let out = correction(&inputs, &options).unwrap();
        let want = run_cpu(&data, &options).unwrap();
        assert!(!out.weights.is_variable() && !out.weights.track_op(), "{name}");
        assert_eq!(to_vec(&out.weights), wide(&want.weights), "{name}");
        let kept: Vec<u8> = out.kept.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(kept, want.kept, "{name}");
        let stats = out.stats.to_host().unwrap().to_array();
        let rounded = want.stats.to_array().map(|x| f64::from(x as f32));
        assert_eq!(stats.map(f64::to_bits), rounded.map(f64::to_bits), "{name}");
        assert_eq!(out.stats.tensor().dims(), &[CorrectionStats::LEN]);
    }
    let offsets = Tensor::new(&[0_i64, 7, 7, 100, 101, 300], &Device::Cpu).unwrap();
    let [old_logp, rollout_logp] = [&*old_logp, &rollout_logp].map(|x| x.flatten_all().unwrap());
    let mask = mask.flatten_all().unwrap();
    let inputs = CorrectionInputs {
        mask: Some(&mask),
        offsets: Some(&offsets),
        ..CorrectionInputs::new(&old_logp, &rollout_logp)
    };
    let out = correction(&inputs, &CorrectionOptions::sequence_tis(2.0)).unwrap();
    let packed = Data { seq_len: 300, offsets: Some(offsets.to_vec1().unwrap()), ..data };
    let want = run_cpu(&packed, &CorrectionOptions::sequence_tis(2.0)).unwrap();
    assert_eq!(to_vec(&out.weights), wide(&want.weights));
    assert_eq!((out.weights.dims(), out.kept.dims()), (&[300][..], &[300][..]));
}

#[test]
fn tensors_that_do_not_fit_are_refused() {
    let device = &Device::Cpu;
    let rows = Tensor::zeros((2, 3), DType::F32, device).unwrap();
    let options = CorrectionOptions::default();
    let refused = |inputs: &CorrectionInputs, expected: &str| {
        let error = correction(inputs, &options).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let flat = rows.flatten_all().unwrap();
    refused(&CorrectionInputs::new(&flat, &rows), "`old_logp` has shape [6], expected [B, T]");
    refused(&CorrectionInputs::new(&rows, &rows.t().unwrap()), "`rollout_logp` has shape [3, 2]");
    let wide = rows.to_dtype(DType::F64).unwrap();
    refused(&CorrectionInputs::new(&wide, &rows), "`old_logp` has dtype f64");
    refused(&CorrectionInputs::new(&rows, &wide), "`rollout_logp` has dtype f64");
    let masked = CorrectionInputs { mask: Some(&rows), ..CorrectionInputs::new(&rows, &rows) };
    refused(&masked, "`mask` has dtype f32, expected u8");
}

#[test]
fn the_names_of_the_statistics_are_the_fields() {
    let stats = CorrectionStats::from_array(std::array::from_fn(|i| i as f64));
    let said = format!("{stats:?}");
    for (i, name) in CorrectionStats::NAMES.into_iter().enumerate() {
        assert!(said.contains(&format!("{name}: {i}.0")), "{name}: {said}");
    }
}
