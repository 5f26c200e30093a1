//! The driver's PPO: optimiser, KL controller, experience, update, and whole short runs of the
//! embedded model.

mod common;

use approx::abs_diff_eq;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor, Var, D};
use common::{assert_close, golden, rng, to_vec, uniform};
use ppo_kernels::driver::chat::Text;
use ppo_kernels::driver::config::{
    AdvantageEstimator, Algorithm, KlControllerKind, KlPlacement, RewardKind, Settings,
};
use ppo_kernels::driver::embedded;
use ppo_kernels::driver::experience::{Experience, Shaping};
use ppo_kernels::driver::kl_controller::KlController;
use ppo_kernels::driver::load::{load, load_critic, Loaded};
use ppo_kernels::driver::model::Critic;
use ppo_kernels::driver::optim::{Optimizer, Schedule};
use ppo_kernels::driver::report::Progress;
use ppo_kernels::driver::reward::{self, sentiment, Reward, Sample, Scores};
use ppo_kernels::driver::rollout::{Prompts, Rollout, Sampler};
use ppo_kernels::driver::sequences::Sequences;
use ppo_kernels::driver::train;
use ppo_kernels::driver::trainer::{Step, Trainer};
use ppo_kernels::driver::update::Learner;
use ppo_kernels::kl::KlEstimator;
use ppo_kernels::ppo_loss::Aggregation;
use serde_json::{Map, Value};

/// Rewards of the scores as they are.
const SHAPING: Shaping = Shaping { kl_coef: 0.05, score_scale: None };

/// f32 sums of a few hundred terms in two different orders.
const REL: f64 = 1e-5;
const ABS: f64 = 1e-5;

#[test]
fn the_kl_controller_is_that_of_four_projects() {
    let cases = golden("kl_controller");
    assert_eq!(cases.len(), 15);
    for case in cases {
        let coef = case.number("init_kl_coef");
        let mut controller = match case.function.ends_with("AdaptiveKLController") {
            true => KlController::Adaptive {
                coef,
                target: case.number("target"),
                horizon: case.number("horizon"),
            },
            false => KlController::Constant { coef },
        };
        let mut got = Vec::new();
        for (kl, n) in case.input("current_kl").into_iter().zip(case.input("n_steps")) {
            controller.update(kl, n as usize);
            got.push(controller.coef());
        }
        assert_close(&case.id, &got, &case.output("value_after_each_update"), 1e-12, 0.0);
    }
}

/// candle's own kernels, in our order: every parameter gets a gradient, and the CPU's.
#[cfg(feature = "cuda")]
#[test]
fn a_gpu_computes_what_the_cpu_does() {
    let compute = |device: &Device| {
        let Loaded { decoder, .. } = embedded::model(3, device).unwrap();
        let critic = Critic::new(decoder.duplicate().unwrap(), 4).unwrap();
        let sequences = Sequences {
            ids: Tensor::new(&[[0u32, 5, 6, 7, 8, 1], [9, 10, 11, 12, 1, 0]], device).unwrap(),
            pads: vec![1, 0],
            prompt_len: 3,
            lengths: vec![3, 2],
        };
        let (logp, entropy) = sequences.logp_and_entropy(&decoder, 0.7).unwrap();
        let values = sequences.values(&critic).unwrap();
        let sum = ((&logp + &entropy).unwrap() + &values).unwrap().sum_all().unwrap();
        let grads = sum.backward().unwrap();
        let parameters = decoder.parameters().into_iter().chain(critic.parameters());
        let grads = parameters.map(|(name, var)| {
            let grad = grads.get(&var).unwrap_or_else(|| panic!("{name} has no gradient"));
            (name, to_vec(grad))
        });
        let outputs = [("logp", logp), ("entropy", entropy), ("values", values)];
        let outputs = outputs.map(|(name, tensor)| (name.to_string(), to_vec(&tensor)));
        outputs.into_iter().chain(grads).collect::<Vec<_>>()
    };
    let devices = common::devices();
    for ((name, cpu), (_, gpu)) in compute(&devices[0]).into_iter().zip(compute(&devices[1])) {
        assert_close(&name, &gpu, &cpu, 1e-4, 1e-4);
    }
}

#[test]
fn the_kl_controller_ignores_a_kl_that_is_not_finite() {
    let before = KlController::Adaptive { coef: 0.1, target: 6.0, horizon: 100.0 };
    for kl in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let mut controller = before;
        controller.update(kl, 8);
        assert_eq!(controller, before);
    }
}

#[test]
fn the_learning_rate_rises_linearly_then_falls_linearly_and_is_never_0() {
    let schedule = Schedule { peak: 8.0, warmup: 4, total: 8, decay: true };
    let rates: Vec<f64> = (0..8).map(|step| schedule.at(step)).collect();
    assert_eq!(rates, [2.0, 4.0, 6.0, 8.0, 8.0, 6.0, 4.0, 2.0]);
    let constant = Schedule { decay: false, ..schedule };
    assert_eq!(constant.at(7), 8.0);
    let all_warmup = Schedule { warmup: 9, ..schedule };
    assert!(all_warmup.at(7) < 8.0);
}

fn named(vars: &[Var]) -> Vec<(String, Var)> {
    vars.iter().enumerate().map(|(i, var)| (i.to_string(), var.clone())).collect()
}

fn random_vars(seed: u64) -> Vec<Var> {
    let mut rng = rng(seed);
    let shapes: [&[usize]; 3] = [&[40, 700], &[5], &[2, 3, 4]];
    let var = |shape: &[usize]| {
        let data = uniform(&mut rng, shape.iter().product(), 1.0);
        Var::from_vec(data, shape, &Device::Cpu).unwrap()
    };
    shapes.into_iter().map(var).collect()
}

/// Some loss with a gradient that is different for each element and at each call.
fn loss_of(vars: &[Var], scale: f64) -> Tensor {
    let terms: Vec<Tensor> = (vars.iter())
        .map(|var| (var.as_tensor().sin().unwrap().sum_all().unwrap() * scale).unwrap())
        .collect();
    Tensor::stack(&terms, 0).unwrap().sum_all().unwrap()
}

#[test]
fn gradients_are_clipped_by_their_norm_over_all_parameters() {
    let (clipped, scaled) = (random_vars(2), random_vars(2));
    let grads = loss_of(&clipped, 1.0).backward().unwrap();
    let mut squares = 0.0;
    for var in &clipped {
        squares += to_vec(grads.get(var).unwrap()).iter().map(|g| g * g).sum::<f64>();
    }
    let mut optimizer = Optimizer::new(&named(&clipped), 0.0, 2.0).unwrap();
    let norm = optimizer.grad_norm(&grads).unwrap();
    assert_close("norm", &[norm], &[squares.sqrt()], 1e-6, 0.0);
    assert!(norm > 2.0);

    // Adam forgets a constant factor, but not one that changes from step to step.
    let mut plain = Optimizer::new(&named(&scaled), 0.0, 1e9).unwrap();
    for scale in [1.0, 1e-3, 2.0] {
        let mut grads = loss_of(&clipped, scale).backward().unwrap();
        let norm = optimizer.grad_norm(&grads).unwrap();
        optimizer.apply(&mut grads, norm, 0.1).unwrap();
        let mut grads = loss_of(&scaled, scale * (2.0 / norm).min(1.0)).backward().unwrap();
        let norm = plain.grad_norm(&grads).unwrap();
        plain.apply(&mut grads, norm, 0.1).unwrap();
    }
    for (a, b) in clipped.iter().zip(&scaled) {
        assert_close("weights", &to_vec(a), &to_vec(b), REL, 1e-5);
    }
}

#[test]
fn a_gradient_that_is_not_finite_is_refused_by_the_optimiser() {
    let vars = random_vars(3);
    let before: Vec<_> = vars.iter().map(|var| to_vec(var)).collect();
    let mut optimizer = Optimizer::new(&named(&vars), 0.0, 1.0).unwrap();
    let mut grads = loss_of(&vars, f64::NAN).backward().unwrap();
    let norm = optimizer.grad_norm(&grads).unwrap();
    assert!(norm.is_nan());
    assert!(optimizer.apply(&mut grads, norm, 0.1).is_err());
    for (var, before) in vars.iter().zip(&before) {
        assert_eq!(&to_vec(var), before);
    }
}

/// A small, fast run; the model is hardly fitted.
fn short(out: &Path) -> Settings {
    Settings {
        out: Some(out.into()),
        lm_steps: 10,
        steps: 2,
        batch_size: 8,
        minibatch_size: 4,
        max_new_tokens: 8,
        learning_rate: 1e-3,
        value_learning_rate: 1e-3,
        ..Settings::default()
    }
}

fn go(settings: &Settings) -> anyhow::Result<()> {
    train::run(settings, &AtomicBool::new(false), &Progress::lines_to(std::io::sink()))
}

fn lines(path: PathBuf) -> Vec<Map<String, Value>> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn trainer(settings: &Settings, reward: Box<dyn Reward>) -> Trainer {
    let Loaded { decoder, tokenizer } = embedded::model(settings.seed, &Device::Cpu).unwrap();
    embedded::fit(&decoder, &tokenizer, settings.lm_steps, 0, |_| true).unwrap();
    let max_new_tokens = settings.max_new_tokens;
    let prompts = Prompts::new(embedded::prompts(), &tokenizer, 64, max_new_tokens).unwrap();
    let sampler = Sampler { tokenizer, sampling: settings.sampling(), reward };
    let has_critic = settings.estimator().has_critic();
    let critic =
        has_critic.then(|| Critic::new(decoder.duplicate().unwrap(), settings.seed).unwrap());
    Trainer::new(decoder, critic, sampler, prompts, settings).unwrap()
}

fn weights(trainer: &Trainer) -> Vec<Vec<f64>> {
    let mut all = trainer.learner.policy.parameters();
    all.extend(trainer.learner.critic.iter().flat_map(Critic::parameters));
    all.iter().map(|(_, var)| to_vec(var)).collect()
}

#[test]
fn the_embedded_tokenizer_gives_the_corpus_back_and_refuses_other_words() {
    let Loaded { decoder, tokenizer } = embedded::model(0, &Device::Cpu).unwrap();
    for text in embedded::prompts().iter().chain(&["The cat sat on the mat.".into()]) {
        let ids = text.encode(&tokenizer).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), text.last());
        assert!(ids.iter().all(|&id| (id as usize) < decoder.config().vocab_size));
    }
    let error = tokenizer.encode("The walrus sat on the mat.").unwrap_err();
    assert!(format!("{error:#}").contains("walrus"), "{error:#}");
}

/// What the models say of each response must come from the state before each of its tokens.
#[test]
fn logp_entropy_and_values_belong_to_the_state_before_each_token() {
    let Loaded { decoder, tokenizer } = embedded::model(3, &Device::Cpu).unwrap();
    let critic = Critic::new(decoder.duplicate().unwrap(), 4).unwrap();
    let temperature = 0.7;
    // Prompts of 2 and 3 tokens (so one pad), responses of 3 and 2.
    let sequences = Sequences {
        ids: Tensor::new(&[[0u32, 5, 6, 7, 8, 1], [9, 10, 11, 12, 1, 0]], &Device::Cpu).unwrap(),
        pads: vec![1, 0],
        prompt_len: 3,
        lengths: vec![3, 2],
    };
    assert_eq!(tokenizer.pad(), 0);
    let (logp, entropy) = sequences.logp_and_entropy(&decoder, temperature).unwrap();
    let values = sequences.values(&critic).unwrap();
    assert_eq!(logp.dims(), [5]);

    for (row, text, prompt) in [(0, vec![5u32, 6, 7, 8, 1], 2), (1, vec![9, 10, 11, 12, 1], 3)] {
        // Each row by itself, without any padding.
        let ids = Tensor::new(vec![text.clone()], &Device::Cpu).unwrap();
        let logits = decoder.logits(&decoder.hidden(&ids, &[0]).unwrap()).unwrap();
        let logits = (logits.squeeze(0).unwrap() / temperature).unwrap();
        let all = candle_nn::ops::log_softmax(&logits, D::Minus1).unwrap();
        let all = all.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
        let own_values = to_vec(&critic.values(&ids, &[0]).unwrap());
        for (t, at) in (prompt..text.len()).enumerate() {
            let before = &all[at - 1];
            let want_entropy: f64 = before.iter().map(|&l| -l.exp() * l).sum();
            let got = |tensor: &Tensor| to_vec(&tensor.get(3 * row + t).unwrap());
            assert_close("logp", &got(&logp), &[before[text[at] as usize]], REL, ABS);
            assert_close("entropy", &got(&entropy), &[want_entropy], REL, ABS);
            assert_close("values", &got(&values), &[own_values[at - 1]], REL, ABS);
        }
    }
}

#[test]
fn every_parameter_of_policy_and_critic_gets_a_gradient() {
    let settings = short(Path::new("unused"));
    let mut trainer = trainer(&settings, reward::build(&settings, &Device::Cpu).unwrap());
    // A step first: right after the rollout the ratio is 1 everywhere.
    trainer.step(&mut |_| {}, &mut || {}).unwrap();
    let rollout = trainer.show(4).unwrap();
    let Learner { policy, critic, .. } = &trainer.learner;
    let critic = critic.as_ref().unwrap();
    let reference = policy.frozen().unwrap();
    let experience =
        Experience::collect(&rollout, policy, &reference, Some(critic), &SHAPING, &settings)
            .unwrap();
    let (output, _) = trainer.learner.loss(&experience, &[0, 1, 2, 3], &[0, 1, 2, 3]).unwrap();
    let grads = output.loss.backward().unwrap();
    let parameters = [policy.parameters(), critic.parameters()].concat();
    assert!(parameters.len() > 40);
    for (name, var) in parameters {
        let grad = grads.get(&var).unwrap_or_else(|| panic!("{name} has no gradient"));
        let grad = to_vec(grad);
        assert!(grad.iter().all(|g| g.is_finite()), "{name}");
        assert!(grad.iter().any(|&g| g != 0.0), "{name} has a gradient of 0");
    }
}

fn the_embedded_run_raises_the_score_and_keeps_the_kl_finite(algorithm: Algorithm) {
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings {
        algorithm,
        lm_steps: 300,
        steps: 15,
        batch_size: 48,
        minibatch_size: 12,
        max_new_tokens: 12,
        ..short(&dir.path().join("run"))
    };
    go(&settings).unwrap();
    let metrics = lines(dir.path().join("run/metrics.jsonl"));
    assert_eq!(metrics.len(), 15);
    let column = |name: &str| -> Vec<f64> {
        metrics.iter().map(|m| m[name].as_f64().unwrap_or(f64::NAN)).collect()
    };
    let scores = column("objective/scores");
    let (first, last) =
        (scores[..3].iter().sum::<f64>() / 3.0, scores[12..].iter().sum::<f64>() / 3.0);
    assert!(last > first + 0.25, "scores {scores:?}");
    assert!(column("objective/kl").iter().all(|kl| kl.is_finite()));
    assert!(column("objective/kl")[14] > 0.1);
    assert_eq!(column("objective/kl")[0], 0.0, "the policy starts as the reference");
}

#[test]
fn ppo_learns_the_embedded_task() {
    the_embedded_run_raises_the_score_and_keeps_the_kl_finite(Algorithm::Ppo);
}

#[test]
fn grpo_learns_the_embedded_task() {
    the_embedded_run_raises_the_score_and_keeps_the_kl_finite(Algorithm::Grpo);
}

#[test]
fn rloo_learns_the_embedded_task() {
    the_embedded_run_raises_the_score_and_keeps_the_kl_finite(Algorithm::Rloo);
}

#[test]
fn reinforce_plus_plus_learns_the_embedded_task() {
    the_embedded_run_raises_the_score_and_keeps_the_kl_finite(Algorithm::ReinforcePlusPlus);
}

#[test]
fn the_responses_to_a_prompt_stand_together() {
    let settings = Settings { group_size: Some(4), ..short(Path::new("unused")) };
    let mut trainer = trainer(&settings, reward::build(&settings, &Device::Cpu).unwrap());
    for _ in 0..2 {
        let answers = trainer.step(&mut |_| {}, &mut || {}).unwrap().rollout.answers;
        let prompts: Vec<_> = answers.prompts.iter().map(|prompt| &prompt.text).collect();
        assert!(prompts.len() == 8 && prompts[..4].iter().all(|&text| text == prompts[0]));
        assert!(prompts[4..].iter().all(|&text| text == prompts[4]) && prompts[0] != prompts[4]);
        let some = &answers.responses[..4];
        assert!(some.iter().any(|text| text != &some[0]), "each is drawn by itself");
    }
}

/// The experience of eight responses after a step, and their scores.
fn collected(settings: &Settings, shaping: &Shaping) -> (Trainer, Experience, Vec<f64>) {
    let mut trainer = trainer(settings, Box::new(Failing { calls: 0, bad: 0, score: 0.0 }));
    let reference = trainer.learner.policy.frozen().unwrap();
    trainer.step(&mut |_| {}, &mut || {}).unwrap();
    let rollout = trainer.show(8).unwrap();
    let Learner { policy, critic, .. } = &trainer.learner;
    let collect = Experience::collect;
    let experience =
        collect(&rollout, policy, &reference, critic.as_ref(), shaping, settings).unwrap();
    let scores = rollout.scores.iter().map(|&score| f64::from(score)).collect();
    (trainer, experience, scores)
}

/// Advantages of each response's tokens.
fn advantages(experience: &Experience) -> Vec<Vec<f64>> {
    let mut left = to_vec(&experience.advantages).into_iter();
    experience.sequences.lengths.iter().map(|&len| left.by_ref().take(len).collect()).collect()
}

/// By the formulas, from the score less the KL of the whole response where that is in the reward.
#[test]
fn outcome_advantages_compare_the_responses_to_a_prompt() {
    let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len() as f64;
    // Responses of several lengths.
    let plain = Settings {
        group_size: Some(4),
        lm_steps: 100,
        max_new_tokens: 16,
        ..short(Path::new("unused"))
    };
    for (algorithm, estimator) in [
        (Algorithm::Grpo, None),
        (Algorithm::Grpo, Some(AdvantageEstimator::DrGrpo)),
        (Algorithm::Rloo, None),
        (Algorithm::Rloo, Some(AdvantageEstimator::Grpo)),
        (Algorithm::Rloo, Some(AdvantageEstimator::Opo)),
    ] {
        let settings = Settings { algorithm, advantages: estimator, ..plain.clone() };
        let (trainer, experience, mut rewards) = collected(&settings, &SHAPING);
        assert!(trainer.learner.critic.is_none() && experience.critic.is_none());
        assert!(experience.kl.iter().any(|&kl| kl.abs() > 1e-3), "{:?}", experience.kl);
        if algorithm == Algorithm::Rloo {
            for (reward, &kl) in rewards.iter_mut().zip(&experience.kl) {
                *reward -= SHAPING.kl_coef * f64::from(kl);
            }
        }
        let got = advantages(&experience);
        let mut stds = 0.0;
        for (group, (rewards, got)) in rewards.chunks(4).zip(got.chunks(4)).enumerate() {
            let lengths: Vec<f64> = got.iter().map(|row| row.len() as f64).collect();
            let centre = mean(rewards);
            let squares: f64 = rewards.iter().map(|x| (x - centre).powi(2)).sum();
            let std = (squares / 3.0).sqrt();
            stds += std / 2.0;
            let weighted: f64 = rewards.iter().zip(&lengths).map(|(x, len)| x * len).sum();
            for (i, row) in got.iter().enumerate() {
                let x = rewards[i];
                let want = match settings.estimator() {
                    AdvantageEstimator::Grpo => (x - centre) / (std + 1e-4),
                    AdvantageEstimator::DrGrpo => x - centre,
                    AdvantageEstimator::Rloo => x - (4.0 * centre - x) / 3.0,
                    _ => x - weighted / lengths.iter().sum::<f64>(),
                };
                let what = format!("{:?} {group} {i}", settings.estimator());
                assert_close(&what, row, &vec![want; row.len()], 1e-4, 1e-5);
            }
        }
        let metric = |name: &str| experience.metrics[name].as_f64().unwrap();
        assert_close("reward", &[metric("reward")], &[mean(&rewards)], REL, ABS);
        assert_close("reward_std", &[metric("reward_std")], &[stds], REL, ABS);
        assert_eq!(metric("frac_reward_zero_std"), 0.0);
    }
}

/// By the formulas, from the scores of two rewards.
#[test]
fn gdpo_normalises_each_reward_by_itself() {
    let settings = Settings {
        algorithm: Algorithm::Grpo,
        advantages: Some(AdvantageEstimator::Gdpo),
        reward: "sentiment,length*-0.5".parse().unwrap(),
        reward_length: 5,
        group_size: Some(4),
        lm_steps: 100,
        max_new_tokens: 16,
        ..short(Path::new("unused"))
    };
    let reward = reward::build(&settings, &Device::Cpu).unwrap();
    assert_eq!(reward.name(), "sentiment,length*-0.5");
    let mut trainer = trainer(&settings, reward);
    let reference = trainer.learner.policy.frozen().unwrap();
    let rollout = trainer.show(8).unwrap();
    let policy = &trainer.learner.policy;
    let experience =
        Experience::collect(&rollout, policy, &reference, None, &SHAPING, &settings).unwrap();

    let [of_words, of_lengths] = [0, 1].map(|k| &rollout.parts[k]);
    assert_eq!((&of_words.name[..], of_words.weight), ("sentiment", 1.0));
    assert_eq!((&of_lengths.name[..], of_lengths.weight), ("length", -0.5));
    for (i, response) in rollout.answers.responses.iter().enumerate() {
        let near = reward::nearness(response.split_whitespace().count(), 5);
        assert_eq!([of_words.scores[i], of_lengths.scores[i]], [sentiment(response), near]);
        assert_eq!(rollout.scores[i], sentiment(response) - 0.5 * near);
    }
    let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len() as f64;
    let normalised = |of: &[f64]| -> Vec<f64> {
        let centre = mean(of);
        let squares: f64 = of.iter().map(|x| (x - centre).powi(2)).sum();
        let std = (squares / (of.len() as f64 - 1.0)).sqrt();
        of.iter().map(|x| (x - centre) / (std + 1e-4)).collect()
    };
    let by_group = |part: &Scores| -> Vec<f64> {
        let scores: Vec<f64> = part.scores.iter().map(|&x| f64::from(x)).collect();
        scores.chunks(4).flat_map(normalised).collect()
    };
    let sums: Vec<f64> = by_group(of_words)
        .iter()
        .zip(by_group(of_lengths))
        .map(|(words, lengths)| words - 0.5 * lengths)
        .collect();
    for (row, want) in advantages(&experience).iter().zip(normalised(&sums)) {
        assert_close("advantages", row, &vec![want; row.len()], 1e-4, 1e-5);
    }
    let metric = |name: &str| experience.metrics[name].as_f64().unwrap();
    let [words, lengths] =
        ["sentiment", "length"].map(|name| metric(&format!("rewards/{name}/mean")));
    assert_close("sum", &[metric("objective/scores")], &[words - 0.5 * lengths], 1e-6, 1e-7);
}

/// By the formula, from the probabilities of the whole vocabulary.
#[test]
fn the_optimal_token_baseline_weighs_with_the_norms_of_gradients() {
    // The KL is in the loss, and the reward of a token but the last 0.
    let settings = Settings {
        algorithm: Algorithm::Grpo,
        advantages: Some(AdvantageEstimator::OptimalTokenBaseline),
        group_size: Some(4),
        lm_steps: 100,
        max_new_tokens: 16,
        temperature: 0.8,
        ..short(Path::new("unused"))
    };
    let (trainer, experience, scores) = collected(&settings, &SHAPING);
    let (policy, sequences) = (&trainer.learner.policy, &experience.sequences);
    let hidden = policy.hidden(&sequences.ids, &sequences.pads).unwrap();
    let logits = (policy.logits(&hidden).unwrap() / settings.temperature).unwrap();
    let probabilities = candle_nn::ops::softmax(&logits, D::Minus1).unwrap();
    let squares = probabilities.sqr().unwrap().sum(D::Minus1).unwrap().to_vec2::<f32>().unwrap();
    let got = advantages(&experience);
    let (lengths, mut old_logp) = (&sequences.lengths, to_vec(&experience.old_logp).into_iter());
    let mut weights = Vec::new();
    for (row, &length) in lengths.iter().enumerate() {
        let (mut total, mut of_row) = (0.0, Vec::new());
        for t in 0..length {
            let p = old_logp.next().unwrap().exp();
            let square = f64::from(squares[row][sequences.prompt_len + t - 1]);
            total += 1.0 - 2.0 * p + square;
            of_row.push(total);
        }
        weights.push(of_row);
    }
    for group in 0..2 {
        let rows: Vec<usize> = (4 * group..4 * group + 4).collect();
        for &row in &rows {
            let others = rows.iter().filter(|&&other| other != row);
            let longest_other = others.map(|&other| lengths[other]).max().unwrap();
            for t in 0..lengths[row] {
                let there = rows.iter().filter(|&&row| t < lengths[row]);
                let sum: f64 = there.clone().map(|&r| weights[r][t] * scores[r]).sum();
                let total: f64 = there.map(|&r| weights[r][t]).sum();
                let baseline = if t < longest_other { sum / (total + 1e-8) } else { 0.0 };
                let what = format!("{row} {t}");
                assert_close(&what, &[got[row][t]], &[scores[row] - baseline], 1e-4, 1e-5);
            }
        }
    }
    let metric = |name: &str| experience.metrics[name].as_f64().unwrap();
    assert!(metric("reward").is_finite() && metric("reward_std") > 0.0);
}

#[test]
fn remax_compares_each_answer_with_that_of_the_likeliest_tokens() {
    let settings = Settings {
        algorithm: Algorithm::Grpo,
        advantages: Some(AdvantageEstimator::Remax),
        group_size: Some(2),
        score_clip: Some(2.0),
        missing_eos_penalty: Some(0.5),
        ..short(Path::new("unused"))
    };
    let mut trainer = trainer(&settings, reward::build(&settings, &Device::Cpu).unwrap());
    let rollout = trainer.step(&mut |_| {}, &mut || {}).unwrap().rollout;
    let greedy = rollout.greedy.as_ref().expect("it is made");
    let text = |rollout: &Rollout, row: usize| rollout.answers.prompts[row].text.clone();
    for row in 0..8 {
        assert_eq!(text(&rollout, row), text(greedy, row / 2));
    }
    assert_eq!((greedy.scores.len(), settings.group_size()), (4, 2));

    // One that has ended, one that has not, and one whose score is clipped.
    let mut rollout = trainer.show(8).unwrap();
    let mut greedy = trainer.show(4).unwrap();
    greedy.scores = vec![0.25, 0.25, 3.0, -1.0];
    greedy.answers.generation.finished = vec![true, false, true, true];
    rollout.scores = vec![1.0, 0.5, 0.0, -0.5, 1.5, 2.5, 0.0, 0.75];
    rollout.answers.generation.finished = vec![true; 8];
    rollout.greedy = Some(Box::new(greedy));
    let policy = &trainer.learner.policy;
    let reference = policy.frozen().unwrap();
    let experience =
        Experience::collect(&rollout, policy, &reference, None, &SHAPING, &settings).unwrap();
    let want = [0.75, 0.25, 0.25, -0.25, -0.5, 0.0, 1.0, 1.75];
    for (row, want) in advantages(&experience).iter().zip(want) {
        assert_close("advantages", row, &vec![want; row.len()], 1e-6, 1e-6);
    }
    let metric = |name: &str| experience.metrics[name].as_f64().unwrap();
    assert_close("reward", &[metric("greedy_reward")], &[0.25], 1e-6, 0.0);
}

#[test]
fn a_length_to_divide_by_is_that_of_the_longest_response_of_the_rollout() {
    for (aggregation, rows) in
        [(Aggregation::SeqMeanTokenSumNorm, 1.0), (Aggregation::SeqMeanTokenSumNormRows, 2.0)]
    {
        let settings = Settings {
            algorithm: Algorithm::Rloo,
            loss: Some("ppo".into()),
            aggregation: Some(aggregation),
            learning_rate: 0.0,
            lm_steps: 100,
            max_new_tokens: 16,
            ..short(Path::new("unused"))
        };
        let (trainer, experience, _) = collected(&settings, &SHAPING);
        let lengths = &experience.sequences.lengths;
        let longest = *lengths.iter().max().unwrap();
        let mut shorter = (0..8).filter(|&row| lengths[row] < longest);
        let some = [shorter.next().unwrap(), shorter.next().unwrap()];
        // The ratio is 1.
        let all = advantages(&experience);
        let sum: f64 = some.iter().flat_map(|&row| &all[row]).sum();
        let stats =
            trainer.learner.loss(&experience, &some, &some).unwrap().0.stats.to_host().unwrap();
        let want = -sum / (rows * longest as f64);
        assert_close("loss", &[stats.policy_loss], &[want], 1e-4, 1e-6);
    }
}

#[test]
fn gradients_of_parts_add_up_to_those_of_the_minibatch() {
    let mut aggregations = vec![Aggregation::Constant(7.0)];
    for name in [
        "token-mean",
        "seq-mean-token-sum",
        "seq-mean-token-mean",
        "seq-mean-token-sum-norm",
        "batch-mean-token-sum",
        "batch-mean-token-mean",
        "seq-mean-token-sum-norm-rows",
    ] {
        aggregations.push(name.parse().unwrap());
    }
    let plain = Settings {
        entropy_coef: 0.01,
        kl_in: Some(KlPlacement::Loss),
        clip_range: Some(0.2),
        lm_steps: 100,
        max_new_tokens: 16,
        minibatch_size: 8,
        ..short(Path::new("unused"))
    };
    let (trainer, experience, _) = collected(&plain, &SHAPING);
    let rows: Vec<usize> = (0..8).rev().collect();
    let Learner { mut policy, mut critic, .. } = trainer.learner;
    let parameters = [policy.parameters(), critic.as_ref().unwrap().parameters()].concat();
    for (i, aggregation) in aggregations.into_iter().enumerate() {
        let loss = Some(["ppo", "gspo"][i % 2].into());
        let plain = Settings { aggregation: Some(aggregation), loss, ..plain.clone() };
        let mut whole: Option<(Vec<Vec<f64>>, f64)> = None;
        for gradient_accumulation in [1, 2, 8] {
            let settings = Settings { gradient_accumulation, ..plain.clone() };
            let learner = Learner::new(policy, critic, &settings).unwrap();
            let (grads, of_loss) = learner.gradients(&experience, &rows).unwrap().unwrap();
            assert_eq!(of_loss.parts.len(), gradient_accumulation);
            let loss = of_loss.parts.iter().map(|part| part.loss).sum::<f64>();
            let of = |(_, var): &(String, Var)| to_vec(grads.get(var).unwrap());
            let got: Vec<Vec<f64>> = parameters.iter().map(of).collect();
            match &whole {
                None => whole = Some((got, loss)),
                Some((want, whole)) => {
                    assert_close("loss", &[loss], &[*whole], 1e-5, 1e-7);
                    for ((got, want), (name, _)) in got.iter().zip(want).zip(&parameters) {
                        let largest = want.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
                        let what = format!("{aggregation} {name}");
                        assert_close(&what, got, want, 1e-4, 1e-5 * largest);
                    }
                }
            }
            (policy, critic) = (learner.policy, learner.critic);
        }
    }
}

#[test]
fn metrics_of_parts_are_those_of_the_minibatch() {
    let step = |gradient_accumulation| {
        let algorithm = Algorithm::Grpo;
        let settings = Settings {
            algorithm,
            gradient_accumulation,
            minibatch_size: 8,
            ppo_epochs: 1,
            ..short(Path::new("unused"))
        };
        let mut trainer = trainer(&settings, reward::build(&settings, &Device::Cpu).unwrap());
        let mut metrics = trainer.step(&mut |_| {}, &mut || {}).unwrap().metrics;
        metrics.retain(|name, _| !name.starts_with("timing_s/") && !name.starts_with("perf/"));
        metrics
    };
    let (whole, parts) = (step(1), step(4));
    assert_eq!(whole.len(), parts.len());
    for (name, want) in whole {
        let [got, want] = [&parts[&name], &want].map(|value| value.as_f64().unwrap());
        assert_close(&name, &[got], &[want], 1e-4, 1e-6);
    }
}

#[test]
fn equal_scores_of_a_prompt_teach_nothing() {
    struct ByHalves;
    impl Reward for ByHalves {
        fn name(&self) -> &str {
            "by halves"
        }
        fn score(&mut self, samples: &[Sample]) -> anyhow::Result<Vec<f32>> {
            Ok((0..samples.len()).map(|i| if i < 4 { 0.1 } else { i as f32 }).collect())
        }
    }
    let algorithm = Algorithm::Grpo;
    let settings = Settings { algorithm, group_size: Some(4), ..short(Path::new("unused")) };
    let metrics =
        trainer(&settings, Box::new(ByHalves)).step(&mut |_| {}, &mut || {}).unwrap().metrics;
    assert_eq!(metrics["frac_reward_zero_std"], 0.5);
}

/// Returns from each token on, discounted, and the KL of each token in them.
#[test]
fn reinforce_plus_plus_has_the_returns_without_a_critic() {
    let settings = Settings {
        algorithm: Algorithm::ReinforcePlusPlus,
        gamma: 0.9,
        whiten_advantages: Some(false),
        ..short(Path::new("unused"))
    };
    let (_, experience, scores) = collected(&settings, &Shaping { kl_coef: 0.0, ..SHAPING });
    assert!(experience.critic.is_none() && experience.kl_term.is_none());
    for (row, score) in advantages(&experience).iter().zip(&scores) {
        let len = row.len() as i32;
        let want: Vec<f64> = (0..len).map(|t| score * 0.9f64.powi(len - 1 - t)).collect();
        assert_close("returns", row, &want, REL, ABS);
    }
    let whitened = Settings { whiten_advantages: None, ..settings };
    let (_, experience, _) = collected(&whitened, &SHAPING);
    let all = advantages(&experience).concat();
    let mean = all.iter().sum::<f64>() / all.len() as f64;
    let var = all.iter().map(|a| (a - mean).powi(2)).sum::<f64>() / (all.len() as f64 - 1.0);
    assert_close("whitened", &[mean, var], &[0.0, 1.0], 1e-4, 1e-4);
}

#[test]
fn the_kl_is_in_the_reward_or_in_the_loss() {
    let settings = |kl_in| Settings {
        algorithm: Algorithm::Grpo,
        loss: Some("ppo".into()),
        kl_in: Some(kl_in),
        group_size: Some(4),
        ..short(Path::new("unused"))
    };
    for kl_in in [KlPlacement::Loss, KlPlacement::Reward] {
        let (trainer, experience, scores) = collected(&settings(kl_in), &SHAPING);
        let rows: Vec<usize> = (0..8).collect();
        let stats =
            trainer.learner.loss(&experience, &rows, &rows).unwrap().0.stats.to_host().unwrap();
        let term = stats.loss - stats.policy_loss;
        let metric = |name: &str| experience.metrics[name].as_f64().unwrap();
        let score = scores.iter().sum::<f64>() / 8.0;
        if kl_in == KlPlacement::Loss {
            assert!(stats.kl_mean > 1e-4, "{}", stats.kl_mean);
            assert_close("term", &[term], &[SHAPING.kl_coef * stats.kl_mean], REL, 1e-9);
            assert_eq!(metric("objective/non_score_reward"), 0.0);
            assert_close("reward", &[metric("reward")], &[score], REL, ABS);
        } else {
            assert_close("term", &[term], &[0.0], 0.0, 1e-9);
            let want = score - SHAPING.kl_coef * metric("objective/kl");
            assert_close("reward", &[metric("reward")], &[want], REL, ABS);
        }
    }
}

#[test]
fn an_adaptive_coefficient_moves_in_the_loss_too() {
    let settings = Settings {
        algorithm: Algorithm::Grpo,
        kl_controller: KlControllerKind::Adaptive,
        kl_horizon: 8.0,
        ..short(Path::new("unused"))
    };
    let mut trainer = trainer(&settings, reward::build(&settings, &Device::Cpu).unwrap());
    let mut coefs = Vec::new();
    for _ in 0..2 {
        let metrics = trainer.step(&mut |_| {}, &mut || {}).unwrap().metrics;
        coefs.push(metrics["objective/kl_coef"].as_f64().unwrap());
    }
    // The first KL, 0, is below any target.
    assert_close("coefficients", &coefs, &[0.05, 0.05 * 0.8], 1e-12, 0.0);
}

#[test]
fn max_rl_refuses_scores_below_0() {
    let settings = Settings {
        algorithm: Algorithm::Grpo,
        advantages: Some(AdvantageEstimator::MaxRl),
        ..short(Path::new("unused"))
    };
    let step = |score: f32| {
        let mut trainer = trainer(&settings, Box::new(Failing { calls: 0, bad: 1, score }));
        trainer.step(&mut |_| {}, &mut || {}).map(|step| step.skipped)
    };
    assert_eq!(step(0.5).unwrap(), 0);
    let error = step(-0.5).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("max_rl is for rewards of 0 and above") && error.contains("-0.5"));
}

#[test]
fn the_ratio_is_1_in_the_first_minibatch_of_a_rollout() {
    let settings = Settings { minibatch_size: 8, ppo_epochs: 1, ..short(Path::new("unused")) };
    let mut trainer = trainer(&settings, reward::build(&settings, &Device::Cpu).unwrap());
    for step in 0..2 {
        let metrics = trainer.step(&mut |_| {}, &mut || {}).unwrap().metrics;
        for (name, value) in [("val/ratio", 1.0), ("policy/approxkl_avg", 0.0)] {
            let got = metrics[name].as_f64().unwrap();
            assert!(abs_diff_eq!(got, value, epsilon = 1e-6), "{name} is {got} in step {step}");
        }
        assert_eq!(metrics["policy/clipfrac_avg"], 0.0);
        assert_eq!(metrics["val/clipfrac_avg"], 0.0);
    }
}

#[test]
fn the_reported_kl_is_the_same_for_every_penalty() {
    // The first step is the same for all: nothing has moved, and each estimate is 0.
    let second = |kl_estimator| {
        let settings = Settings {
            kl_estimator: Some(kl_estimator),
            kl_coef: 1.0,
            ..short(Path::new("unused"))
        };
        let mut trainer = trainer(&settings, reward::build(&settings, &Device::Cpu).unwrap());
        trainer.step(&mut |_| {}, &mut || {}).unwrap();
        let Step { metrics, kl, .. } = trainer.step(&mut |_| {}, &mut || {}).unwrap();
        (metrics["objective/kl"].clone(), kl, metrics["objective/non_score_reward"].clone())
    };
    let (kl, each, reward) = second(KlEstimator::K1);
    assert_ne!(kl, 0.0);
    assert_eq!(reward.as_f64().unwrap(), -kl.as_f64().unwrap());
    let (other_kl, other_each, other_reward) = second(KlEstimator::K2);
    assert_eq!((other_kl, other_each), (kl, each));
    assert_ne!(other_reward, reward);
}

#[test]
fn the_explained_variance_is_that_of_all_minibatches_together() {
    let explained = |minibatch_size| {
        let plain = short(Path::new("unused"));
        let settings = Settings {
            minibatch_size,
            batch_size: 8,
            learning_rate: 0.0,
            value_learning_rate: 0.0,
            ..plain
        };
        let mut trainer = trainer(&settings, reward::build(&settings, &Device::Cpu).unwrap());
        let metrics = trainer.step(&mut |_| {}, &mut || {}).unwrap().metrics;
        metrics["val/explained_var"].as_f64().unwrap()
    };
    let (together, apart) = (explained(8), explained(2));
    assert!(abs_diff_eq!(together, apart, epsilon = 1e-5), "{together} and {apart}");
}

#[test]
fn a_correction_weighs_tokens_by_how_they_were_drawn() {
    let plain = Settings { correction: Some("tis".into()), ..short(Path::new("unused")) };
    let step = |settings: &Settings| {
        let mut trainer = trainer(settings, reward::build(settings, &Device::Cpu).unwrap());
        let metrics = trainer.step(&mut |_| {}, &mut || {}).unwrap().metrics;
        move |name: &str| metrics[name].as_f64().unwrap()
    };
    let same = step(&plain);
    for (name, want) in [
        ("rollout_corr/kl", 0.0),
        ("rollout_corr/log_ratio_abs_max", 0.0),
        ("rollout_corr/rollout_is_mean", 1.0),
        ("rollout_corr/rollout_is_eff_sample_size", 1.0),
        ("rollout_corr/rejected", 0.0),
    ] {
        let got = same(name);
        assert!(abs_diff_eq!(got, want, epsilon = 1e-4), "{name} is {got}");
    }
    // What is left of the tokens is drawn more often than the policy says.
    let narrow = Settings { top_p: 0.5, ..plain };
    let some = step(&narrow);
    let kl = some("rollout_corr/kl");
    assert!((0.1..1.0).contains(&kl), "{kl}");
    let weight = some("rollout_corr/rollout_is_mean");
    assert!((0.5..0.9).contains(&weight), "{weight}");
    let uncorrected = step(&Settings { correction: None, ..narrow.clone() });
    assert_ne!(some("loss/policy_avg"), uncorrected("loss/policy_avg"));
    let all = Settings { correction: Some("geometric_mask".into()), ..narrow };
    assert_eq!(step(&all)("rollout_corr/rejected"), 1.0);
}

/// The names that semantics fixes, by the convention of TRL and verl.
const METRICS: [&str; 38] = [
    "objective/kl",
    "objective/kl_coef",
    "objective/entropy",
    "objective/scores",
    "objective/rlhf_reward",
    "objective/non_score_reward",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "val/clipfrac_avg",
    "val/ratio",
    "val/ratio_var",
    "val/num_eos_tokens",
    "val/explained_var",
    "critic/values/mean",
    "critic/values/min",
    "critic/values/max",
    "critic/returns/mean",
    "critic/returns/min",
    "critic/returns/max",
    "critic/advantages/mean",
    "critic/advantages/min",
    "critic/advantages/max",
    "response_length/mean",
    "response_length/clip_ratio",
    "timing_s/rollout",
    "timing_s/experience",
    "timing_s/update",
    "timing_s/step",
    "perf/throughput",
    "lr",
    "episode",
    "grad_norm/policy",
    "grad_norm/value",
    "update/skipped",
    "step",
];

#[test]
fn a_run_writes_every_metric_and_the_same_seed_gives_the_same_run() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, seed: u64| {
        let out = dir.path().join(name);
        go(&Settings { seed, whiten_rewards: true, ..short(&out) }).unwrap();
        let mut metrics = lines(out.join("metrics.jsonl"));
        let mut names: Vec<&str> = metrics[0].keys().map(String::as_str).collect();
        names.sort_unstable();
        let mut expected: Vec<&str> = METRICS.to_vec();
        expected.sort_unstable();
        assert_eq!(names, expected);
        for line in &mut metrics {
            line.retain(|name, _| !name.starts_with("timing_s/") && name != "perf/throughput");
        }
        (
            metrics,
            fs::read(out.join("samples.jsonl")).unwrap(),
            fs::read(out.join("weights/model.safetensors")).unwrap(),
        )
    };
    let (a, b, other) = (run("a", 5), run("b", 5), run("c", 6));
    assert_eq!(a.0, b.0);
    assert_eq!(a.1, b.1);
    assert!(a.2 == b.2, "the weights differ");
    assert_ne!(a.1, other.1);
}

#[test]
fn a_run_without_a_critic_says_and_leaves_nothing_of_one() {
    let of_critic = ["loss/value_avg", "val/clipfrac_avg", "val/explained_var", "grad_norm/value"];
    for (algorithm, more) in [
        (
            Algorithm::Grpo,
            &["reward", "reward_std", "frac_reward_zero_std", "loss/kl_avg"] as &[&str],
        ),
        (Algorithm::Rloo, &["reward", "reward_std", "frac_reward_zero_std"]),
        (Algorithm::ReinforcePlusPlus, &[]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("run");
        go(&Settings { algorithm, group_size: Some(4), ..short(&out) }).unwrap();
        let metrics = lines(out.join("metrics.jsonl"));
        let mut names: Vec<&str> = metrics[0].keys().map(String::as_str).collect();
        names.sort_unstable();
        let mut expected: Vec<&str> = METRICS
            .into_iter()
            .filter(|name| !name.starts_with("critic/") && !of_critic.contains(name))
            .chain(more.iter().copied())
            .collect();
        expected.sort_unstable();
        assert_eq!(names, expected);
        assert!(metrics.iter().flatten().all(|(_, value)| value.is_number()), "{metrics:?}");
        assert!(!out.join("weights/value_model.safetensors").exists());
        load(&out.join("weights"), &Device::Cpu).unwrap();
    }
}

#[test]
fn the_weights_of_a_run_load_again_and_train_on() {
    let dir = tempfile::tempdir().unwrap();
    let first = short(&dir.path().join("first"));
    go(&first).unwrap();
    let weights = dir.path().join("first/weights");
    let Loaded { decoder, tokenizer } = load(&weights, &Device::Cpu).unwrap();
    load_critic(&weights, &Device::Cpu).unwrap();
    let ids = tokenizer.encode("The cat sat on the").unwrap();
    let ids = Tensor::new(vec![ids], &Device::Cpu).unwrap();
    let logits = decoder.logits(&decoder.hidden(&ids, &[0]).unwrap()).unwrap();
    assert!(to_vec(&logits).iter().all(|x| x.is_finite()));

    let prompts = dir.path().join("prompts.txt");
    fs::write(&prompts, "The cat sat on the\nThe dog\n").unwrap();
    let second = Settings {
        model: Some(weights),
        prompts: Some(prompts),
        kl_controller: KlControllerKind::Adaptive,
        ..short(&dir.path().join("second"))
    };
    go(&second).unwrap();
    assert_eq!(lines(dir.path().join("second/metrics.jsonl")).len(), 2);
}

/// Sentiment, but not a number in the given call.
struct Failing {
    calls: usize,
    bad: usize,
    score: f32,
}

impl Reward for Failing {
    fn name(&self) -> &str {
        "failing"
    }

    fn score(&mut self, samples: &[Sample]) -> anyhow::Result<Vec<f32>> {
        self.calls += 1;
        let bad = self.calls == self.bad;
        let score = |(i, _)| if bad { self.score } else { (i % 2) as f32 };
        Ok(samples.iter().enumerate().map(score).collect())
    }
}

#[test]
fn a_step_that_is_not_finite_is_skipped_and_the_next_one_counts() {
    for score in [f32::NAN, f32::INFINITY, f32::MAX] {
        let settings = short(Path::new("unused"));
        let mut trainer = trainer(&settings, Box::new(Failing { calls: 0, bad: 1, score }));
        let start = weights(&trainer);
        let step = trainer.step(&mut |_| {}, &mut || {}).unwrap();
        assert_eq!(step.skipped, 4, "2 epochs of 2 minibatches, all with score {score}");
        assert_eq!(step.metrics["update/skipped"], 4);
        assert_eq!(step.metrics["loss/policy_avg"], Value::Null);
        assert!(weights(&trainer) == start, "a skipped step changed the weights");

        let step = trainer.step(&mut |_| {}, &mut || {}).unwrap();
        assert_eq!(step.skipped, 0);
        assert!(step.metrics["loss/policy_avg"].is_number());
        let end = weights(&trainer);
        assert!(end != start);
        assert!(end.iter().flatten().all(|x| x.is_finite()));
    }
}

/// Scores that are larger at each call.
struct Growing {
    calls: usize,
}

impl Reward for Growing {
    fn name(&self) -> &str {
        "growing"
    }

    fn score(&mut self, samples: &[Sample]) -> anyhow::Result<Vec<f32>> {
        self.calls += 1;
        Ok((0..samples.len()).map(|i| (self.calls * (i + 1)) as f32).collect())
    }
}

/// Without KL penalty the sum of a response's rewards is its score as it was scaled and clipped.
#[test]
fn scores_are_scaled_by_all_so_far_and_then_clipped() {
    for (norm, clip) in [(false, None), (true, None), (false, Some(1.5)), (true, Some(0.5))] {
        let settings = Settings {
            kl_coef: 0.0,
            score_scaling: true,
            score_norm: norm,
            score_clip: clip,
            ..short(Path::new("unused"))
        };
        let mut trainer = trainer(&settings, Box::new(Growing { calls: 0 }));
        let mut all: Vec<f64> = Vec::new();
        for step in 0..2 {
            let metrics = trainer.step(&mut |_| {}, &mut || {}).unwrap().metrics;
            let scores: Vec<f64> = (1..=8).map(|i| ((step + 1) * i) as f64).collect();
            all.extend(&scores);
            let n = all.len() as f64;
            let mean = all.iter().sum::<f64>() / n;
            let std = (all.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
            let shift = if norm { mean } else { 0.0 };
            let clip = clip.unwrap_or(f64::INFINITY);
            let scaled = |x: &f64| ((x - shift) / std).clamp(-clip, clip);
            let want = scores.iter().map(scaled).sum::<f64>() / 8.0;
            let got = |name: &str| metrics[name].as_f64().unwrap();
            assert_close("reward", &[got("objective/rlhf_reward")], &[want], 1e-5, 1e-5);
            assert_close("std", &[got("objective/score_std")], &[std], 1e-6, 0.0);
            let mean = scores.iter().sum::<f64>() / 8.0;
            assert_close("scores", &[got("objective/scores")], &[mean], 1e-6, 0.0);
        }
    }
}

#[test]
fn equal_scores_have_no_deviation_to_be_scaled_by() {
    struct Same;
    impl Reward for Same {
        fn name(&self) -> &str {
            "same"
        }
        fn score(&mut self, samples: &[Sample]) -> anyhow::Result<Vec<f32>> {
            Ok(vec![3.0; samples.len()])
        }
    }
    let settings = Settings { kl_coef: 0.0, score_scaling: true, ..short(Path::new("unused")) };
    let metrics = trainer(&settings, Box::new(Same)).step(&mut |_| {}, &mut || {}).unwrap().metrics;
    assert_eq!(metrics["objective/rlhf_reward"], 3.0);
    assert_eq!(metrics["update/skipped"], 0);
}

#[test]
fn a_run_that_is_stopped_ends_after_the_step_with_everything_written() {
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings { steps: 100_000, ..short(&dir.path().join("run")) };
    let stop = AtomicBool::new(false);
    let metrics = dir.path().join("run/metrics.jsonl");
    std::thread::scope(|scope| {
        let run =
            scope.spawn(|| train::run(&settings, &stop, &Progress::lines_to(std::io::sink())));
        let start = Instant::now();
        while fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < 2 {
            assert!(start.elapsed() < Duration::from_secs(120), "no two steps in two minutes");
            assert!(!run.is_finished(), "ended before it was stopped");
            std::thread::sleep(Duration::from_millis(5));
        }
        stop.store(true, Ordering::Relaxed);
        run.join().unwrap().unwrap();
    });
    let steps = lines(metrics).len();
    assert!(steps < 1000);
    let samples = lines(dir.path().join("run/samples.jsonl"));
    assert_eq!(samples.iter().filter(|s| s["step"] == steps).count(), settings.batch_size);
    load(&dir.path().join("run/weights"), &Device::Cpu).unwrap();
}

#[test]
fn a_run_that_is_stopped_before_it_begins_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let settings = short(&dir.path().join("run"));
    let progress = Progress::lines_to(fs::File::create(dir.path().join("shown")).unwrap());
    train::run(&settings, &AtomicBool::new(true), &progress).unwrap();
    let shown = fs::read_to_string(dir.path().join("shown")).unwrap();
    assert_eq!(shown, "stopped before the first step; nothing is written\n");
    assert!(!dir.path().join("run").exists());
}

#[test]
fn a_reward_that_fails_in_the_middle_leaves_the_weights() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("calls");
    // Fails from the fifth call on: after the probe, the samples before training, and two steps.
    let command = format!(
        "echo >> {0}; if [ $(wc -l < {0}) -gt 4 ]; then exit 3; fi; sed 's/.*/{{\"score\": 1}}/'",
        log.display()
    );
    let settings = Settings {
        steps: 9,
        reward: RewardKind::Command,
        reward_command: Some(command),
        ..short(&dir.path().join("run"))
    };
    let error = format!("{:#}", go(&settings).unwrap_err());
    for part in ["the weights so far are in", "step 3", "--reward-command"] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(lines(dir.path().join("run/metrics.jsonl")).len(), 2);
    load(&dir.path().join("run/weights"), &Device::Cpu).unwrap();
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let refused = |settings: Settings, words: &[&str]| {
        let error = format!("{:#}", go(&settings).unwrap_err());
        for word in words {
            assert!(error.contains(word), "{error} does not name {word}");
        }
        assert!(!out.exists(), "{error}, but the folder is there");
    };
    refused(Settings { max_new_tokens: 60, ..short(&out) }, &["--max-new-tokens", "context"]);
    refused(Settings { minibatch_size: 3, ..short(&out) }, &["--minibatch-size"]);
    refused(Settings { learning_rate: f64::NAN, ..short(&out) }, &["--learning-rate"]);
    let prompts = dir.path().join("prompts.txt");
    let with_prompts = || Settings { prompts: Some(prompts.clone()), ..short(&out) };
    fs::write(&prompts, "The cat\nThe walrus sat\n").unwrap();
    refused(with_prompts(), &["--prompts", "prompt 2", "walrus"]);
    fs::write(&prompts, "the cat ".repeat(40)).unwrap();
    refused(with_prompts(), &["--prompts", "context"]);
}

#[test]
fn prompts_come_in_random_order_each_once_before_any_comes_again() {
    let Loaded { tokenizer, .. } = embedded::model(0, &Device::Cpu).unwrap();
    let all = embedded::prompts();
    let mut prompts = Prompts::new(all.clone(), &tokenizer, 64, 8).unwrap();
    let mut rng = rng(1);
    let mut texts = |n: usize| -> Vec<String> {
        prompts.draw(n, &mut rng).into_iter().map(|prompt| prompt.text).collect()
    };
    let (mut first, mut second) = (texts(all.len()), texts(all.len()));
    assert_ne!(first, second);
    first.sort();
    second.sort();
    let mut sorted: Vec<&str> = all.iter().map(Text::last).collect();
    sorted.sort_unstable();
    assert_eq!(first, sorted);
    assert_eq!(second, sorted);
    assert_eq!(texts(2 * all.len() + 1).len(), 2 * all.len() + 1);
}

#[test]
fn prompts_held_out_are_never_drawn_and_measured_every_few_steps() {
    let Loaded { tokenizer, .. } = embedded::model(0, &Device::Cpu).unwrap();
    let len = embedded::prompts().len();
    let mut prompts = Prompts::new(embedded::prompts(), &tokenizer, 64, 8).unwrap();
    prompts.hold_out(0.25, 3).unwrap();
    let held_out: Vec<_> = prompts.held_out().iter().map(|prompt| prompt.text.clone()).collect();
    assert_eq!(held_out.len(), len / 4);
    let mut drawn: Vec<_> =
        prompts.draw(len - len / 4, &mut rng(1)).into_iter().map(|prompt| prompt.text).collect();
    drawn.extend(held_out);
    drawn.sort();
    drawn.dedup();
    assert_eq!(drawn.len(), len);
    let error = prompts.hold_out(1e-3, 3).unwrap_err().to_string();
    assert!(error.contains("--held-out is 0.001, which is none of"), "{error}");

    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, eval_every: usize| {
        let out = dir.path().join(name);
        go(&Settings { steps: 4, eval_every, held_out: 0.25, ..short(&out) }).unwrap();
        lines(out.join("metrics.jsonl"))
    };
    let (seldom, always) = (run("seldom", 3), run("always", 1));
    let of = |metrics: &[Map<String, Value>], name: &str| -> Vec<Value> {
        metrics.iter().map(|line| line.get(name).cloned().unwrap_or_default()).collect()
    };
    let scores = of(&seldom, "eval/scores");
    assert!(scores[1].is_null() && [0, 2, 3].iter().all(|&i| scores[i].is_number()), "{scores:?}");
    // A look changes nothing.
    assert_eq!(of(&seldom, "objective/scores"), of(&always, "objective/scores"));
    assert_eq!(scores[2], of(&always, "eval/scores")[2]);
}

#[test]
fn a_single_token_has_no_variance_and_is_not_whitened() {
    let settings = Settings {
        batch_size: 1,
        minibatch_size: 1,
        max_new_tokens: 1,
        whiten_rewards: true,
        ..short(Path::new("unused"))
    };
    let mut trainer = trainer(&settings, Box::new(Failing { calls: 0, bad: 0, score: 0.0 }));
    let step = trainer.step(&mut |_| {}, &mut || {}).unwrap();
    let generation = &step.rollout.answers.generation;
    assert_eq!(generation.responses[0].len(), 1);
    assert_eq!(step.skipped, 0);
}
