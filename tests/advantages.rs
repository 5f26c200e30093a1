//! The advantages op: the reference against other projects' functions, the CPU and the tensor layer
//! against the reference, and what must hold for any input.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::advantages_cases::*;
use common::*;
use ppo_kernels::advantages::cpu::{self, Inputs, Outputs};
use ppo_kernels::advantages::{
    gdpo, optimal_token_baseline, outcome_advantages, reference, AdvantageInputs, AdvantageOptions,
    AdvantageStats, Baseline, Scale, Singleton, Sizes, TokenBaselineInputs, TokenBaselineOptions,
    TokenStep,
};
use ppo_kernels::gae::{self, GaeOptions, RewardShaping};
use ppo_kernels::whiten::{self, EpsPlacement, WhitenOptions};
use ppo_kernels::Error;

// ---- the reference ----

/// The peers' float64.
const GOLDEN: f64 = 1e-9;

/// Peers that compute in float32 inside.
const GOLDEN_F32: f64 = 3e-6;

/// What the reference is given.
#[derive(Clone, Default)]
struct Given {
    scores: Vec<f64>,
    groups: Option<Vec<i64>>,
    group_size: usize,
    lengths: Option<Vec<f64>>,
    score_baselines: Option<Vec<f64>>,
    mask: Vec<u8>,
}

impl Given {
    fn run(&self, options: &AdvantageOptions) -> reference::Advantages {
        let batch = self.scores.len();
        let seq_len = self.mask.len() / batch;
        let inputs = reference::Inputs {
            scores: &self.scores,
            groups: self.groups.as_deref(),
            lengths: self.lengths.as_deref(),
            score_baselines: self.score_baselines.as_deref(),
            mask: Some(&self.mask),
            offsets: None,
        };
        let sizes = Sizes { batch, seq_len, group_size: self.group_size };
        reference::outcome_advantages(&inputs, sizes, options)
    }

    fn rows(&self, options: &AdvantageOptions) -> Vec<f64> {
        self.run(options).advantages
    }

    /// Whether a row has no other in its group.
    fn single(&self, row: usize) -> bool {
        let groups = self.groups.as_ref().unwrap();
        groups.iter().filter(|&&id| id == groups[row]).count() == 1
    }
}

fn ids(case: &Golden, key: &str) -> Vec<i64> {
    case.input(key).into_iter().map(|id| id as i64).collect()
}

fn sums(values: &[f64], width: usize) -> Vec<f64> {
    values.chunks(width).map(|row| row.iter().sum()).collect()
}

/// The inputs of one of verl's functions.
fn given_to_verl(case: &Golden) -> Given {
    let (mask, width) = (case.mask("response_mask"), case.shape("response_mask")[1]);
    Given {
        scores: sums(&case.input("token_level_rewards"), width),
        groups: Some(ids(case, "index")),
        lengths: Some(sums(&case.input("response_mask"), width)),
        mask,
        ..Given::default()
    }
}

#[test]
fn reference_equals_verls_functions() {
    let keep = |options| AdvantageOptions { singleton: Singleton::Keep, ..options };
    let with_eps = |options| AdvantageOptions { eps: 1e-6, ..options };
    let mut ran = std::collections::BTreeMap::new();
    for case in golden("outcome_advantages").into_iter().chain(golden("advantages2")) {
        let function = case.function.rsplit('.').next().unwrap().to_string();
        let by_std = case.inputs.get("norm_adv_by_std_in_grpo").is_none_or(|by| by == true);
        let mut within = GOLDEN;
        let options = match function.as_str() {
            "compute_grpo_outcome_advantage" => keep(AdvantageOptions::grpo()),
            "compute_grpo_vectorized_outcome_advantage" => {
                within = GOLDEN_F32;
                keep(AdvantageOptions::grpo())
            }
            "compute_grpo_passk_outcome_advantage" => AdvantageOptions::pass_at_k(),
            "compute_rloo_outcome_advantage" => keep(AdvantageOptions::rloo()),
            "compute_rloo_vectorized_outcome_advantage" => AdvantageOptions::rloo(),
            "compute_opo_outcome_advantage" => keep(AdvantageOptions::opo()),
            "compute_gpg_outcome_advantage" => keep(AdvantageOptions::gpg()),
            "compute_remax_outcome_advantage" => AdvantageOptions::remax(),
            "compute_reinforce_plus_plus_baseline_outcome_advantage" => {
                AdvantageOptions::reinforce_plus_plus_baseline()
            }
            _ => continue,
        };
        *ran.entry(function.clone()).or_insert(0) += 1;
        let mut given = given_to_verl(&case);
        let options = match options.scale {
            Scale::Group if by_std => with_eps(options),
            Scale::Group => AdvantageOptions { scale: Scale::None, ..options },
            _ => options,
        };
        if function.contains("remax") {
            given.score_baselines = Some(case.input("reward_baselines"));
        }
        let out = given.run(&options);
        let mut got = out.token_advantages;
        let mut want = case.output("advantages");
        let width = got.len() / given.scores.len();
        if function.contains("reinforce_plus_plus") {
            // It adds 1e-8 to the number of tokens.
            within = 5e-8;
            let whiten = WhitenOptions::default();
            got = whiten::reference::masked_whiten(&got, Some(&given.mask), &whiten);
        } else if function.contains("remax") {
            // Theirs is the return, and the score is not at the last token of every row.
            let rewards = case.input("token_level_rewards");
            let before = |at: usize| rewards[at / width * width..at].iter().sum::<f64>();
            want = (0..got.len())
                .map(|at| match given.mask[at] {
                    0 => 0.0,
                    _ => want[at] + before(at),
                })
                .collect();
        } else if options.scale == Scale::Group {
            // They divide a group of one by 1 + eps.
            for at in (0..got.len()).filter(|&at| given.single(at / width)) {
                want[at] *= 1.0 + options.eps;
            }
        }
        assert_close(&case.id, &got, &want, within, within);
    }
    assert_eq!(ran.len(), 9, "{ran:?}");
    assert_eq!(ran.values().sum::<i32>(), 53, "{ran:?}");
}

#[test]
fn verl_refuses_to_compare_a_single_row_and_so_do_we() {
    let case = golden("outcome_advantages");
    let raises = case.iter().filter(|case| case.outputs.contains_key("raises"));
    assert_eq!(raises.count(), 0, "cases that were not here before");
    let alone = Given { groups: Some(vec![1, 2, 2]), ..scores(&[1.0, 2.0, 4.0]) };
    let got = alone.rows(&AdvantageOptions::pass_at_k());
    assert!(got[0].is_nan() && got[1] == 0.0 && got[2] > 0.0);
}

fn scores(scores: &[f64]) -> Given {
    Given { scores: scores.to_vec(), mask: vec![1; scores.len()], ..Given::default() }
}

#[test]
fn reference_equals_nemos_functions() {
    let mut ran = 0;
    for case in golden("outcome_advantages").iter().filter(|case| case.peer == "nemo-rl") {
        let groups = Some(ids(case, "prompt_index"));
        let given = Given { groups, ..scores(&case.input("rewards")) };
        let leaves_out = |key: &str| case.inputs[key].as_bool().unwrap();
        let baseline = |leaves_out| match leaves_out {
            true => Baseline::LeaveOneOut,
            false => Baseline::Group,
        };
        let options = |leave_one_out: bool, normalise: bool| AdvantageOptions {
            eps: 1e-6,
            baseline: baseline(leave_one_out),
            scale: match (normalise, leave_one_out) {
                (false, _) => Scale::None,
                (true, false) => Scale::Group,
                (true, true) => Scale::LeaveOneOut,
            },
            ..AdvantageOptions::default()
        };
        if case.outputs.contains_key("baseline") {
            let leave_one_out = leaves_out("leave_one_out_baseline");
            let plain = given.rows(&options(leave_one_out, false));
            let got: Vec<f64> = given.scores.iter().zip(&plain).map(|(x, a)| x - a).collect();
            assert_close(&case.id, &got, &case.output("baseline"), GOLDEN, GOLDEN);
            // Their standard deviation, of which 0 divides nothing.
            let exact = AdvantageOptions { eps: 0.0, ..options(leave_one_out, true) };
            let (divided, std) = (given.rows(&exact), case.output("std"));
            for i in 0..std.len() {
                let want = if std[i] > 0.0 { plain[i] / std[i] } else { plain[i] };
                assert_close(&case.id, &[divided[i]], &[want], 1e-7, 1e-7);
            }
            ran += 1;
        } else if case.outputs.contains_key("advantages_per_sequence") {
            let options =
                options(leaves_out("use_leave_one_out_baseline"), leaves_out("normalize_rewards"));
            let want = case.output("advantages_per_sequence");
            assert_close(&case.id, &given.rows(&options), &want, 1e-7, 1e-7);
            ran += 1;
        }
    }
    assert_eq!(ran, 24);
}

/// TRL's weighted sum of rewards `[B, K]`, without those that are NaN.
fn weighted_sums(rewards: &[f64], weights: &[f64]) -> Vec<f64> {
    let sum = |row: &[f64]| {
        let there = row.iter().zip(weights).filter(|(reward, _)| !reward.is_nan());
        let terms: Vec<f64> = there.map(|(reward, weight)| reward * weight).collect();
        if terms.is_empty() {
            f64::NAN
        } else {
            terms.iter().sum()
        }
    };
    rewards.chunks(weights.len()).map(sum).collect()
}

/// The weighted sum of the advantages of each of several rewards; NaN in rows without any.
fn sum_of_advantages(rewards: &[Given], weights: &[f64], options: &AdvantageOptions) -> Vec<f64> {
    let of_each: Vec<_> = rewards.iter().map(|given| given.rows(options)).collect();
    let sum = |i: usize| match rewards.iter().all(|given| given.scores[i].is_nan()) {
        true => f64::NAN,
        false => of_each.iter().zip(weights).map(|(rows, weight)| rows[i] * weight).sum(),
    };
    (0..rewards[0].scores.len()).map(sum).collect()
}

const OVER_BATCH: fn() -> AdvantageOptions = || AdvantageOptions {
    baseline: Baseline::Batch,
    scale: Scale::Batch,
    ..AdvantageOptions::default()
};

#[test]
fn reference_equals_trls_trainers() {
    let (mut ran, mut zero_std) = (0, 0);
    for case in golden("outcome_advantages").into_iter().chain(golden("advantages2")) {
        if case.peer != "trl" {
            continue;
        }
        let group_size = case.number("num_generations") as usize;
        let grouped = |scores_of: &[f64]| Given { group_size, ..scores(scores_of) };
        let got = if case.function.contains("RLOOTrainer") {
            let given = grouped(&case.input("rewards"));
            let mut plain = given.rows(&AdvantageOptions::rloo());
            match case.inputs["normalize_advantages"].as_bool().unwrap() {
                false => plain,
                true => {
                    // Rows that are compared with no other do not count.
                    let x = &given.scores;
                    let there = |i: &usize| !x[*i].is_nan();
                    for i in 0..x.len() {
                        let first = i / group_size * group_size;
                        if x[i].is_nan() || (first..first + group_size).filter(there).count() < 2 {
                            plain[i] = f64::NAN;
                        }
                    }
                    scores(&plain).rows(&OVER_BATCH())
                }
            }
        } else {
            let scale = match case.text("scale_rewards") {
                "group" => Scale::Group,
                "batch" => Scale::Batch,
                _ => Scale::None,
            };
            let options = AdvantageOptions { scale, ..AdvantageOptions::grpo() };
            match case.inputs.get("multi_objective_aggregation").and_then(|how| how.as_str()) {
                None => grouped(&case.input("rewards")).rows(&options),
                Some("sum_then_normalize") => {
                    let rewards = case.input("rewards_per_func");
                    let given = grouped(&weighted_sums(&rewards, &case.input("weights")));
                    let out = given.run(&options);
                    let share = case.output("is_std_zero").iter().sum::<f64>();
                    zero_std += usize::from(share > 0.0);
                    out.advantages
                }
                _ => {
                    let (rewards, weights) =
                        (case.input("rewards_per_func"), case.input("weights"));
                    let count = weights.len();
                    let of = |k| rewards.iter().skip(k).step_by(count).copied().collect::<Vec<_>>();
                    let each: Vec<Given> = (0..count).map(|k| grouped(&of(k))).collect();
                    let total = sum_of_advantages(&each, &weights, &AdvantageOptions::grpo());
                    scores(&total).rows(&OVER_BATCH())
                }
            }
        };
        assert_close(&case.id, &got, &case.output("advantages"), GOLDEN, GOLDEN);
        ran += 1;
    }
    assert_eq!(ran, 6 + 12);
    assert_eq!(zero_std, 0, "cases that were not here before");
}

#[test]
fn reference_equals_openrlhfs_pipeline() {
    let mut ran = 0;
    for case in golden("outcome_advantages").iter().filter(|case| case.peer == "openrlhf") {
        let options = match case.text("estimator") {
            "rloo" => AdvantageOptions::rloo(),
            "dr_grpo" => AdvantageOptions::dr_grpo(),
            "group_norm" => AdvantageOptions { eps: 1e-9, ..AdvantageOptions::grpo() },
            _ => continue,
        };
        let rewards = case.input("rewards");
        let group_size = case.number("n_samples_per_prompt") as usize;
        let advantages = Given { group_size, ..scores(&rewards) }.rows(&options);
        // Then KL is subtracted from each token's reward, and rewards to go are added up.
        let (mask, kl) = (case.mask("action_mask"), case.input("kl"));
        let shape = case.shape("kl");
        let values = vec![0.0; kl.len()];
        let inputs = gae::reference::Inputs {
            kl: Some(&kl),
            scores: Some(&advantages),
            mask: Some(&mask),
            ..gae::reference::Inputs::new(&values)
        };
        let shaping = RewardShaping { kl_coef: case.number("kl_coef"), ..RewardShaping::default() };
        let gamma = case.number("gamma");
        let options = GaeOptions { gamma, lambda: 1.0, shaping, ..GaeOptions::default() };
        let got = gae::reference::gae(&inputs, shape[0], shape[1], &options);
        let kept = |x: Vec<f64>| {
            x.iter().zip(&mask).map(|(&x, &m)| if m == 0 { 0.0 } else { x }).collect::<Vec<_>>()
        };
        let want = kept(case.output("advantages"));
        assert_close(&case.id, &got.advantages, &want, 1e-7, 1e-7);
        ran += 1;
    }
    assert_eq!(ran, 6);
}

#[test]
fn reference_equals_verls_gdpo() {
    let mut ran = 0;
    for case in golden("advantages2")
        .iter()
        .filter(|case| case.function.ends_with("gdpo_outcome_advantage"))
    {
        let mask = case.mask("response_mask");
        let rewards = case.inputs["rewards"].as_object().unwrap();
        let groups = Some(ids(case, "index"));
        let each: Vec<Given> = rewards
            .values()
            .map(|rewards| Given { groups: groups.clone(), ..scores(&flatten(rewards)) })
            .collect();
        let weights = match &case.inputs["weights"] {
            serde_json::Value::Null => vec![1.0; each.len()],
            weights => flatten(weights),
        };
        let options =
            AdvantageOptions { eps: 1e-6, singleton: Singleton::Keep, ..AdvantageOptions::grpo() };
        let total =
            Given { mask: mask.clone(), ..scores(&sum_of_advantages(&each, &weights, &options)) };
        let tokens = total.run(&AdvantageOptions::remax()).token_advantages;
        let got = whiten::reference::masked_whiten(&tokens, Some(&mask), &WhitenOptions::default());
        assert_close(&case.id, &got, &case.output("advantages"), GOLDEN_F32, GOLDEN_F32);
        ran += 1;
    }
    assert_eq!(ran, 2);
}

#[test]
fn the_formula_by_hand() {
    let four = Given { group_size: 4, ..scores(&[1.0, 0.0, 0.0, 3.0]) };
    let exact = |options| AdvantageOptions { eps: 0.0, ..options };
    let close = |options: AdvantageOptions, want: [f64; 4]| {
        assert_close(&format!("{options:?}"), &four.rows(&options), &want, 1e-12, 1e-12);
    };
    close(AdvantageOptions::dr_grpo(), [0.0, -1.0, -1.0, 2.0]);
    let std = 2f64.sqrt();
    close(exact(AdvantageOptions::grpo()), [0.0, -1.0 / std, -1.0 / std, 2.0 / std]);
    let biased = AdvantageOptions { unbiased: false, ..exact(AdvantageOptions::grpo()) };
    let std = 1.5f64.sqrt();
    close(biased, [0.0, -1.0 / std, -1.0 / std, 2.0 / std]);
    let in_variance = AdvantageOptions {
        eps: 2.0,
        eps_placement: EpsPlacement::Variance,
        ..AdvantageOptions::grpo()
    };
    close(in_variance, [0.0, -0.5, -0.5, 1.0]);
    close(AdvantageOptions::rloo(), [0.0, -4.0 / 3.0, -4.0 / 3.0, 8.0 / 3.0]);
    close(exact(AdvantageOptions::max_rl()), [0.0, -1.0, -1.0, 2.0]);
    close(AdvantageOptions::gpg(), [0.0, -2.0, -2.0, 4.0]);
    close(
        AdvantageOptions { scale: Scale::None, ..AdvantageOptions::pass_at_k() },
        [0.0, 0.0, 0.0, 2.0],
    );
    let clipped = AdvantageOptions { score_min: 0.5, score_max: 2.5, ..AdvantageOptions::remax() };
    close(clipped, [1.0, 0.5, 0.5, 2.5]);
    // Of the others of the last, two are equal to it less one.
    let without = exact(AdvantageOptions { scale: Scale::LeaveOneOut, ..AdvantageOptions::rloo() });
    let std = |x: [f64; 3]| {
        let mean = x.iter().sum::<f64>() / 3.0;
        (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 2.0).sqrt()
    };
    let zero = -4.0 / 3.0 / std([1.0, 0.0, 3.0]);
    close(without, [0.0, zero, zero, 8.0 / 3.0 / std([1.0, 0.0, 0.0])]);
    let lengths = Some(vec![1.0, 1.0, 4.0, 2.0]);
    let weighted = Given { lengths, ..four.clone() };
    let want = [1.0 - 7.0 / 8.0, -7.0 / 8.0, -7.0 / 8.0, 3.0 - 7.0 / 8.0];
    assert_close("opo", &weighted.rows(&AdvantageOptions::opo()), &want, 1e-12, 1e-12);
}

// ---- the CPU ----

fn on_cpu(inputs: Inputs, sizes: Sizes, options: &AdvantageOptions) -> Result<Run, Error> {
    let mut run = Run {
        advantages: vec![7.0; sizes.batch],
        token_advantages: vec![
            7.0;
            if inputs.offsets.is_some() {
                sizes.seq_len
            } else {
                sizes.batch * sizes.seq_len
            }
        ],
        stats: NO_STATS,
    };
    let outputs = Outputs {
        advantages: &mut run.advantages,
        token_advantages: Some(&mut run.token_advantages),
        stats: Some(std::slice::from_mut(&mut run.stats)),
    };
    cpu::outcome_advantages(inputs, sizes, options, outputs)?;
    Ok(run)
}

fn rows_on_cpu(inputs: Inputs, group_size: usize, options: &AdvantageOptions) -> Vec<f32> {
    let sizes = Sizes { batch: inputs.scores.len(), seq_len: 0, group_size };
    on_cpu(inputs, sizes, options).unwrap().advantages
}

#[test]
fn cpu_agrees_with_the_reference() {
    let rng = &mut rng(1);
    let mut compared = 0;
    for round in 0..6 {
        for grouping in GROUPINGS {
            let (rows, seq_len) = [(1, 3), (29, 17), (150, 1), (333, 5), (64, 0), (48, 700)][round];
            let sample = Sample::new(rng, grouping, rows, seq_len);
            let sample = if round % 2 == 1 { sample.packed(rng) } else { sample };
            for options in all_options().iter().filter(|options| sample.fits(options)) {
                let inputs = sample.inputs();
                let got = on_cpu(inputs, sample.sizes, options).unwrap();
                let want = run_reference(&inputs, sample.sizes, options);
                got.check(&format!("{grouping:?} {rows} {options:?}"), &want);
                compared += 1;
            }
        }
    }
    assert!(compared > 800, "{compared}");
}

#[test]
fn no_rows_are_no_error() {
    for grouping in [Sizes::default(), Sizes { group_size: 4, ..Sizes::default() }] {
        let got = on_cpu(Inputs::new(&[]), grouping, &AdvantageOptions::remax()).unwrap();
        assert!(numbers(&got.stats).iter().all(|x| x.is_nan()), "{:?}", got.stats);
    }
    let groups = Some(&[][..]);
    on_cpu(Inputs { groups, ..Inputs::new(&[]) }, Sizes::default(), &AdvantageOptions::grpo())
        .unwrap();
}

#[test]
fn equal_scores_give_exactly_zero() {
    for score in [0.1, 0.7, 1.0 / 3.0, 1e6 + 0.1, -2.3e-30, 3e38, 0.0] {
        for n in [2, 3, 7, 8, 64] {
            let (scores, lengths) =
                (vec![score; n], (0..n).map(|i| i as f32 * 1.7).collect::<Vec<_>>());
            for options in all_options() {
                let options = AdvantageOptions { eps: 0.0, ..options };
                let inputs = Inputs { lengths: Some(&lengths), ..Inputs::new(&scores) };
                let got = rows_on_cpu(inputs, n, &options);
                match options.baseline {
                    Baseline::None => continue,
                    _ => assert_eq!(got, vec![0.0; n], "{score} {options:?}"),
                }
            }
            let sizes = Sizes { batch: n, seq_len: 0, group_size: n };
            let got = on_cpu(Inputs::new(&scores), sizes, &AdvantageOptions::grpo()).unwrap();
            assert_eq!((got.stats.zero_std_fraction, got.stats.score_std), (1.0, 0.0));
        }
    }
}

#[test]
fn the_others_of_one_that_is_apart_have_the_standard_deviation_that_they_have() {
    let options = AdvantageOptions { scale: Scale::LeaveOneOut, ..AdvantageOptions::rloo() };
    // Equal: it divides nothing, and does not make 1e4 of 1.
    for apart in [1.0, 0.3, 1e6, -7.7e30] {
        for base in [0.0, 0.1, 123.4] {
            let scores = [base, base, apart, base, base];
            let got = rows_on_cpu(Inputs::new(&scores), 5, &options);
            assert_eq!(got[2], (f64::from(apart) - f64::from(base)) as f32, "{apart} {base}");
        }
    }
    // Close together beside it.
    let scores = [0.0, 1e-3, 2e-3, 1e6];
    let got = rows_on_cpu(Inputs::new(&scores), 4, &AdvantageOptions { eps: 0.0, ..options });
    assert_close("apart", &[f64::from(got[3])], &[(1e6 - 1e-3) / 1e-3], 1e-6, 0.0);
}

#[test]
fn a_nan_score_is_as_if_its_row_were_not_there() {
    let rng = &mut rng(3);
    for options in all_options() {
        let scores = uniform(rng, 8, 2.0);
        let lengths = uniform(rng, 8, 3.0).iter().map(|x| x.abs()).collect::<Vec<_>>();
        let groups = vec![5; 8];
        let [mut more, mut longer] = [scores.clone(), lengths.clone()];
        more.insert(3, f32::NAN);
        longer.insert(3, f32::NAN);
        let without =
            Inputs { groups: Some(&groups), lengths: Some(&lengths), ..Inputs::new(&scores) };
        let groups = vec![5; 9];
        let with = Inputs { groups: Some(&groups), lengths: Some(&longer), ..Inputs::new(&more) };
        let (without, mut with) =
            (rows_on_cpu(without, 0, &options), rows_on_cpu(with, 0, &options));
        assert_eq!(with.remove(3), 0.0);
        assert_eq!(with, without, "{options:?}");
    }
    // Of a group in which one is left, and of one in which none is.
    let nan = f32::NAN;
    let scores = [nan, 2.0, nan, nan];
    for (singleton, kept) in [(Singleton::Zero, 0.0), (Singleton::Keep, 2.0)] {
        let options = AdvantageOptions { singleton, ..AdvantageOptions::grpo() };
        assert_eq!(rows_on_cpu(Inputs::new(&scores), 2, &options), [0.0, kept, 0.0, 0.0]);
    }
    let sizes = Sizes { batch: 4, seq_len: 0, group_size: 2 };
    let stats = on_cpu(Inputs::new(&scores), sizes, &AdvantageOptions::grpo()).unwrap().stats;
    assert_eq!((stats.score_mean, stats.zero_std_fraction), (2.0, 1.0));
    assert!(stats.score_std.is_nan());
}

#[test]
fn an_infinite_score_makes_nan_of_what_is_compared_with_it() {
    let inf = f32::INFINITY;
    for scores in [[1.0, inf, 3.0, 4.0], [-inf, 2.0, 3.0, 4.0]] {
        for options in all_options() {
            let clips = options.score_min.is_finite() && options.score_max.is_finite();
            let lengths = [1.0; 4];
            let inputs = Inputs { lengths: Some(&lengths), ..Inputs::new(&scores) };
            let sizes = Sizes { batch: 4, seq_len: 0, group_size: 2 };
            let got = on_cpu(inputs, sizes, &options).unwrap();
            let want = run_reference(&inputs, sizes, &options);
            got.check(&format!("{scores:?} {options:?}"), &want);
            assert!(!clips || got.advantages.iter().all(|x| x.is_finite()), "{options:?}");
        }
        let got = rows_on_cpu(Inputs::new(&scores), 2, &AdvantageOptions::grpo());
        assert!(got[0].is_nan() && got[1].is_nan() && got[2] == -got[3] && got[3] > 0.7);
    }
}

#[test]
fn bits_depend_on_neither_ids_nor_threads_nor_other_groups() {
    let rng = &mut rng(5);
    let sample = Sample::new(rng, Grouping::Shuffled(9), 300, 600);
    let (inputs, ids) = (sample.inputs(), sample.groups.as_ref().unwrap());
    for options in [AdvantageOptions::grpo(), AdvantageOptions::opo(), AdvantageOptions::rloo()] {
        let first = on_cpu(inputs, sample.sizes, &options).unwrap();
        for threads in [1, 2, 5] {
            let again = with_threads(threads, || on_cpu(inputs, sample.sizes, &options).unwrap());
            assert!(again.bits() == first.bits(), "{threads} threads");
        }
        // Other names for the same groups.
        let renamed: Vec<i64> = ids.iter().map(|id| id.wrapping_mul(-7_919)).collect();
        let other = Inputs { groups: Some(&renamed), ..inputs };
        assert!(on_cpu(other, sample.sizes, &options).unwrap().bits() == first.bits());
        // A group by itself.
        let rows: Vec<usize> = (0..ids.len()).filter(|&i| ids[i] == ids[20]).collect();
        let pick = |x: &[f32]| rows.iter().map(|&i| x[i]).collect::<Vec<_>>();
        let (scores, lengths) = (pick(inputs.scores), pick(inputs.lengths.unwrap()));
        let score_baselines = inputs.score_baselines.map(pick);
        let alone = Inputs {
            lengths: Some(&lengths),
            score_baselines: score_baselines.as_deref(),
            ..Inputs::new(&scores)
        };
        let got = rows_on_cpu(alone, rows.len(), &options);
        assert_eq!(got, pick(&first.advantages));
    }
}

#[test]
fn outputs_that_are_not_wanted_need_not_be_there() {
    let scores = [1.0, 2.0, 4.0, 4.0];
    let sizes = Sizes { batch: 4, seq_len: 0, group_size: 2 };
    let mut advantages = [0.0; 4];
    let outputs = Outputs { advantages: &mut advantages, token_advantages: None, stats: None };
    cpu::outcome_advantages(Inputs::new(&scores), sizes, &AdvantageOptions::dr_grpo(), outputs)
        .unwrap();
    assert_eq!(advantages, [-0.5, 0.5, 0.0, 0.0]);
}

#[test]
fn bad_input_is_refused_by_name() {
    let says = |inputs: Inputs, sizes: Sizes, options: &AdvantageOptions, words: &[&str]| {
        let mut advantages = vec![7.0; sizes.batch];
        let outputs = Outputs { advantages: &mut advantages, token_advantages: None, stats: None };
        let result = cpu::outcome_advantages(inputs, sizes, options, outputs);
        let text = result.unwrap_err().to_string();
        assert!(text.starts_with("advantages: "), "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
        assert!(advantages.iter().all(|&x| x == 7.0), "{text}: written");
    };
    let scores = [1.0, 2.0, 4.0];
    let plain = Inputs::new(&scores);
    let sizes = |group_size| Sizes { batch: 3, seq_len: 0, group_size };
    let grpo = AdvantageOptions::grpo();
    says(plain, sizes(2), &grpo, &["`scores`", "[3]", "[k * 2]", "give `groups`"]);
    says(plain, sizes(0), &grpo, &["`groups` is missing", "`baseline`"]);
    let by_scale = AdvantageOptions { baseline: Baseline::None, ..grpo };
    says(plain, sizes(0), &by_scale, &["`groups` is missing", "`scale`"]);
    let groups = Inputs { groups: Some(&[1, 1, 2]), ..plain };
    says(groups, sizes(3), &grpo, &["`group_size` is 3", "0 where `groups` is given"]);
    let short = Inputs { groups: Some(&[1, 1]), ..plain };
    says(short, sizes(0), &grpo, &["`groups`", "[2]", "[3]"]);
    says(plain, sizes(3), &AdvantageOptions::opo(), &["`lengths` is missing", "`baseline`"]);
    let short = Inputs { lengths: Some(&[1.0]), ..plain };
    says(short, sizes(3), &AdvantageOptions::opo(), &["`lengths`", "[1]", "[3]"]);
    let short = Inputs { score_baselines: Some(&[1.0]), ..plain };
    says(short, sizes(3), &grpo, &["`score_baselines`", "[1]", "[3]"]);
    let short = Inputs { mask: Some(&[1]), ..plain };
    says(short, sizes(3), &grpo, &["`mask`", "[1]", "[0]"]);
    let pass = AdvantageOptions::pass_at_k();
    says(groups, sizes(0), &pass, &["`baseline` is RunnerUp", "single row", "row 2"]);
    says(plain, sizes(1), &pass, &["`baseline` is RunnerUp", "single row", "row 0"]);
    for (change, words) in [
        (AdvantageOptions { eps: -1e-9, ..grpo }, ["`eps`", "-1e-9", "0 or above"]),
        (AdvantageOptions { eps: f64::NAN, ..grpo }, ["`eps`", "NaN", "finite"]),
        (AdvantageOptions { score_min: f64::NAN, ..grpo }, ["`score_min`", "NaN", "a number"]),
        (AdvantageOptions { score_max: f64::NAN, ..grpo }, ["`score_max`", "NaN", "inf"]),
        (
            AdvantageOptions { score_min: 1.0, score_max: 0.5, ..grpo },
            ["`score_max` is 0.5", "`score_min`", "1.0 or above"],
        ),
    ] {
        says(plain, sizes(3), &change, &words);
    }
}

#[test]
fn every_name_is_what_the_table_says() {
    let of = |options: AdvantageOptions| (options.baseline, options.scale);
    use {Baseline as B, Scale as S};
    let table = [
        (AdvantageOptions::grpo(), (B::Group, S::Group)),
        (AdvantageOptions::dr_grpo(), (B::Group, S::None)),
        (AdvantageOptions::rloo(), (B::LeaveOneOut, S::None)),
        (AdvantageOptions::reinforce_plus_plus_baseline(), (B::Group, S::None)),
        (AdvantageOptions::opo(), (B::LengthWeighted, S::None)),
        (AdvantageOptions::pass_at_k(), (B::RunnerUp, S::Group)),
        (AdvantageOptions::max_rl(), (B::Group, S::Mean)),
        (AdvantageOptions::gpg(), (B::Group, S::Nonzero)),
        (AdvantageOptions::remax(), (B::None, S::None)),
    ];
    for (options, want) in table {
        assert_eq!(of(options), want);
    }
    assert_eq!(AdvantageOptions::grpo(), AdvantageOptions::default());
}

// ---- tensors ----

#[test]
fn tensors_agree_with_the_cpu_and_are_constants() {
    let rng = &mut rng(9);
    for grouping in [Grouping::Size(8), Grouping::Shuffled(9)] {
        let sample = Sample::new(rng, grouping, 64, 30);
        let (inputs, Sizes { batch, seq_len, group_size }) = (sample.inputs(), sample.sizes);
        let cpu = &Device::Cpu;
        let scores = Var::from_slice(inputs.scores, batch, cpu).unwrap();
        let groups = inputs.groups.map(|ids| Tensor::from_slice(ids, batch, cpu).unwrap());
        let lengths = Tensor::from_slice(inputs.lengths.unwrap(), batch, cpu).unwrap();
        let mask = vec![1; batch * seq_len];
        let mask = inputs.mask.unwrap_or(&mask);
        let bytes = Tensor::from_slice(mask, (batch, seq_len), cpu).unwrap();
        let given = AdvantageInputs {
            groups: groups.as_ref(),
            lengths: Some(&lengths),
            mask: Some(&bytes),
            ..AdvantageInputs::new(&scores)
        };
        let options = AdvantageOptions::opo();
        let got = outcome_advantages(&given, group_size, &options).unwrap();
        let same = Inputs { mask: Some(mask), score_baselines: None, ..inputs };
        let want = on_cpu(same, sample.sizes, &options).unwrap();
        assert_eq!(got.advantages.to_vec1::<f32>().unwrap(), want.advantages);
        let tokens = got.token_advantages.unwrap();
        assert_eq!(tokens.dims(), [batch, seq_len]);
        assert_eq!(tokens.flatten_all().unwrap().to_vec1::<f32>().unwrap(), want.token_advantages);
        let stats: AdvantageStats = got.stats.to_host().unwrap();
        assert_eq!(numbers(&stats).map(f64::to_bits), numbers(&want.stats).map(f64::to_bits));
        assert!(!got.advantages.track_op() && !tokens.track_op());
        let none =
            outcome_advantages(&AdvantageInputs { mask: None, ..given }, group_size, &options);
        assert!(none.unwrap().token_advantages.is_none());
    }
}

#[test]
fn gdpo_is_trls() {
    let mut ran = 0;
    for case in golden("advantages2") {
        let how = case.inputs.get("multi_objective_aggregation").and_then(|how| how.as_str());
        if how != Some("normalize_then_sum") {
            continue;
        }
        let weights = case.input("weights");
        let rewards: Vec<f32> = case.input("rewards_per_func").iter().map(|&x| x as f32).collect();
        let shape = (rewards.len() / weights.len(), weights.len());
        let rewards = Tensor::from_vec(rewards, shape, &Device::Cpu).unwrap().t().unwrap();
        let group_size = case.number("num_generations") as usize;
        let got = gdpo(&rewards, &weights, None, group_size, &AdvantageOptions::grpo()).unwrap();
        let got = wide(&got.to_vec1::<f32>().unwrap());
        assert_close(&case.id, &got, &case.output("advantages"), 1e-6, 1e-6);
        // And by ids.
        let ids = (0..shape.0 as i64).map(|i| -(i / group_size as i64)).collect::<Vec<_>>();
        let ids = Tensor::from_vec(ids, shape.0, &Device::Cpu).unwrap();
        let by_ids = gdpo(&rewards, &weights, Some(&ids), 0, &AdvantageOptions::grpo()).unwrap();
        assert_eq!(wide(&by_ids.to_vec1::<f32>().unwrap()), got);
        ran += 1;
        let refused = gdpo(&rewards, &[1.0], None, group_size, &AdvantageOptions::grpo());
        let text = refused.unwrap_err().to_string();
        assert!(text.contains("`weights`") && text.contains("[1]"), "{text}");
    }
    assert_eq!(ran, 2);
}

#[test]
fn tensors_that_do_not_fit_are_refused_by_name() {
    let cpu = &Device::Cpu;
    let f32 = |shape: &[usize]| Tensor::zeros(shape, DType::F32, cpu).unwrap();
    let says = |inputs: &AdvantageInputs, words: &[&str]| {
        let text = outcome_advantages(inputs, 2, &AdvantageOptions::dr_grpo()).unwrap_err();
        let text = text.to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    };
    let (scores, matrix, mask) = (f32(&[4]), f32(&[4, 1]), f32(&[4, 3]));
    says(&AdvantageInputs::new(&matrix), &["`scores`", "[4, 1]", "[B]"]);
    let half = scores.to_dtype(DType::F16).unwrap();
    says(&AdvantageInputs::new(&half), &["`scores`", "f16", "f32"]);
    says(
        &AdvantageInputs { groups: Some(&scores), ..AdvantageInputs::new(&scores) },
        &["`groups`", "f32", "i64"],
    );
    says(
        &AdvantageInputs { mask: Some(&mask), ..AdvantageInputs::new(&scores) },
        &["`mask`", "f32", "u8"],
    );
    says(
        &AdvantageInputs { mask: Some(&scores), ..AdvantageInputs::new(&scores) },
        &["`mask`", "[4]", "[B, T]"],
    );
}

// ---- the optimal token baseline ----

#[test]
fn reference_equals_verls_optimal_token_baseline() {
    let mut ran = [0; 2];
    for case in golden("outcome_advantages").into_iter().chain(golden("advantages2")) {
        if !case.function.contains("optimal_token_baseline") {
            continue;
        }
        let several_turns = case.function.contains("multi_turn");
        let shape = case.shape("response_mask");
        let (mask, groups) = (case.mask("response_mask"), ids(&case, "index"));
        let ln = |x: Vec<f64>| x.into_iter().map(f64::ln).collect::<Vec<_>>();
        let log_sums = ln(case.input("sum_pi_squared"));
        let weights = case.inputs["rollout_is_weights"].is_array();
        let weights = weights.then(|| case.input("rollout_is_weights"));
        let (rewards, logp) = (case.input("token_level_rewards"), case.input("old_log_probs"));
        let inputs = reference::TokenInputs {
            groups: Some(&groups),
            weights: weights.as_deref(),
            mask: Some(&mask),
            ..reference::TokenInputs::new(&rewards, &logp, &log_sums)
        };
        let options = TokenBaselineOptions {
            step: if several_turns { TokenStep::Unmasked } else { TokenStep::Column },
            lone_tail: case.inputs["handle_zero_tail"] == true,
            ..TokenBaselineOptions::default()
        };
        let sizes = Sizes { batch: shape[0], seq_len: shape[1], group_size: 0 };
        let [advantages, returns] = reference::optimal_token_baseline(&inputs, sizes, &options);
        // Their returns go on over what is masked.
        let kept = |x: &[f64]| -> Vec<f64> {
            x.iter().zip(&mask).filter(|(_, &m)| m != 0).map(|(&x, _)| x).collect()
        };
        for (name, ours) in [("advantages", advantages), ("returns", returns)] {
            let what = format!("{} {name}", case.id);
            assert_close(&what, &kept(&ours), &kept(&case.output(name)), GOLDEN, GOLDEN);
        }
        ran[usize::from(several_turns)] += 1;
    }
    assert_eq!(ran, [16, 4]);
}

/// Advantages and returns on the CPU.
fn run_baseline(tokens: &Tokens, options: &TokenBaselineOptions) -> Result<[Vec<f32>; 2], Error> {
    let [mut advantages, mut returns] = [(); 2].map(|()| vec![f32::NAN; tokens.rewards.len()]);
    let outputs = cpu::TokenOutputs {
        returns: Some(&mut returns),
        ..cpu::TokenOutputs::new(&mut advantages)
    };
    cpu::optimal_token_baseline(tokens.inputs(), tokens.sizes, options, outputs)?;
    Ok([advantages, returns])
}

#[test]
fn the_token_baseline_on_the_cpu_is_that_of_the_reference() {
    let mut rng = rng(50);
    for number in 0..24 {
        let (batch, seq_len) = [(6, 5), (12, 33), (3, 1), (9, 20)][number % 4];
        let tokens = Tokens::new(&mut rng, batch, seq_len, number);
        for options in baseline_options() {
            let found = run_baseline(&tokens, &options).unwrap();
            tokens.check(&format!("{number} {options:?}"), &options, &found);
        }
    }
}

#[test]
fn the_token_baseline_of_tensors_is_that_of_the_cpu() {
    let (mut rng, device) = (rng(54), Device::Cpu);
    for number in 0..4 {
        let (padded, packed, _) = Tokens::padded_and_packed(&mut rng, number);
        for tokens in [padded, packed] {
            let Sizes { batch, seq_len, group_size } = tokens.sizes;
            let is_packed = tokens.offsets.is_some();
            let shape = if is_packed { vec![seq_len] } else { vec![batch, seq_len] };
            let of_tokens = |x: &[f32]| Tensor::from_slice(x, &shape[..], &device).unwrap();
            let rows = |x: &Vec<i64>| Tensor::from_slice(x, x.len(), &device).unwrap();
            let [rewards, logp, log_sums] =
                [&tokens.rewards, &tokens.logp, &tokens.log_sums].map(|x| of_tokens(x));
            let mask = tokens.mask.as_deref();
            let mask = mask.map(|x| Tensor::from_slice(x, &shape[..], &device).unwrap());
            let weights = tokens.weights.as_deref().map(of_tokens);
            let [groups, offsets] = [&tokens.groups, &tokens.offsets].map(|x| x.as_ref().map(rows));
            let inputs = TokenBaselineInputs {
                groups: groups.as_ref(),
                weights: weights.as_ref(),
                mask: mask.as_ref(),
                offsets: offsets.as_ref(),
                ..TokenBaselineInputs::new(&rewards, &logp, &log_sums)
            };
            let options = baseline_options()[number];
            let found = optimal_token_baseline(&inputs, group_size, &options).unwrap();
            let want = run_baseline(&tokens, &options).unwrap();
            for (found, want) in found.iter().zip(&want) {
                assert_eq!(found.dims(), &shape);
                let found: Vec<f32> = found.flatten_all().unwrap().to_vec1().unwrap();
                assert_eq!(found, *want);
            }
        }
    }
}

#[test]
fn the_token_baseline_of_a_pack_has_the_bits_of_padded_rows() {
    let mut rng = rng(51);
    for number in 0..8 {
        let (padded, packed, pack) = Tokens::padded_and_packed(&mut rng, number);
        for options in baseline_options() {
            let [a, b] = [&padded, &packed].map(|tokens| run_baseline(tokens, &options).unwrap());
            for (a, b) in a.iter().zip(&b) {
                assert_eq!(pack.pack(a), *b, "{number} {options:?}");
            }
            packed.check(&format!("{number} {options:?}"), &options, &b);
        }
    }
}

#[test]
fn the_token_baseline_does_not_depend_on_threads_or_on_what_is_masked() {
    let mut tokens = Tokens::new(&mut rng(52), 60, 3000, 5);
    let options = TokenBaselineOptions::default();
    let bits = |tokens: &Tokens| {
        let found = run_baseline(tokens, &options).unwrap();
        found.map(|x| x.into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    let one = with_threads(1, || bits(&tokens));
    for threads in [2, 5] {
        assert!(with_threads(threads, || bits(&tokens)) == one, "{threads} threads");
    }
    let mask = tokens.mask.clone().unwrap();
    for x in [&mut tokens.rewards, &mut tokens.logp, &mut tokens.log_sums] {
        x.iter_mut().zip(&mask).filter(|(_, &m)| m == 0).for_each(|(x, _)| *x = f32::NAN);
    }
    assert!(bits(&tokens) == one);
    let [advantages, returns] = run_baseline(&tokens, &options).unwrap();
    let masked = advantages.iter().zip(&returns).zip(&mask).filter(|(_, &m)| m == 0);
    assert!(masked.into_iter().all(|(x, _)| x == (&0.0, &0.0)));
}

#[test]
fn certain_tokens_keep_their_weight() {
    // 1 - p is 1e-6 and 2e-6, all of it at one other token: 2 (1 - p)^2 each.
    let p = [1.0 - 1e-6, 1.0 - 2e-6_f64];
    let sum = |p: f64| (p * p + (1.0 - p).powi(2)).ln() as f32;
    let tokens = Tokens {
        rewards: vec![1.0, 0.0],
        logp: p.map(|p| p.ln() as f32).to_vec(),
        log_sums: p.map(sum).to_vec(),
        groups: None,
        weights: None,
        mask: None,
        offsets: None,
        sizes: Sizes { batch: 2, seq_len: 1, group_size: 2 },
    };
    let options = TokenBaselineOptions { eps: 0.0, ..Default::default() };
    let [advantages, _] = run_baseline(&tokens, &options).unwrap();
    // The baseline is 1 / (1 + 4). What is not certain is as good as float32 has ln p.
    assert_close("advantages", &wide(&advantages), &[0.8, -0.2], 0.0, 0.1);
}

#[test]
fn a_token_baseline_without_groups_is_refused() {
    let mut tokens = Tokens::new(&mut rng(53), 6, 2, 1);
    let says = |tokens: &Tokens, options: &TokenBaselineOptions, words: &[&str]| {
        let text = run_baseline(tokens, options).unwrap_err().to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    };
    let default = TokenBaselineOptions::default();
    says(&tokens, &TokenBaselineOptions { eps: -1.0, ..default }, &["eps"]);
    tokens.sizes.group_size = 4;
    says(&tokens, &default, &["`rewards`", "[k * 4]", "[6]"]);
    tokens.sizes.group_size = 0;
    says(&tokens, &default, &["`groups`"]);
    (tokens.groups, tokens.sizes.group_size) = (Some(vec![0; 6]), 2);
    says(&tokens, &default, &["group_size"]);
}
