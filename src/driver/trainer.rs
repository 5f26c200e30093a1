//! PPO and its relatives, one step at a time: rollout, experience, update.

use std::iter::repeat_n;
use std::time::Instant;

use anyhow::Result;
use candle_core::Tensor;
use rand::rngs::StdRng;
use rand::SeedableRng;
use rand_chacha::ChaCha12Rng;
use serde::{Deserialize, Serialize};
use serde_json::{json, Map, Value};

use super::checkpoint::{Fingerprint, Resumable, Tensors};
use super::config::{AdvantageEstimator, KlControllerKind, LrScheduleKind, Settings};
use super::experience::{mean, named, Experience, Shaping};
use super::kl_controller::KlController;
use super::model::{Critic, Decoder};
use super::optim::Schedule;
use super::rollout::{Prompts, Rollout, Sampler};
use super::update::{Learner, Rates, Update};
use crate::gae::ScoreScale;
use crate::moments::{Moments, RunningMoments};

/// The state of a run.
pub struct Trainer {
    /// Policy, and the critic if there is one.
    pub learner: Learner,
    /// Tokenizer, sampling and reward.
    pub sampler: Sampler,
    /// The prompts that are left.
    pub prompts: Prompts,
    settings: Settings,
    reference: Decoder,
    fingerprint: Fingerprint,
    controller: KlController,
    /// The moments of all scores so far.
    scores: RunningMoments,
    /// The generator behind StdRng, with a state that can be saved.
    rng: ChaCha12Rng,
    steps: usize,
}

/// The checkpoint of a trainer, besides tensors.
#[derive(Debug, Serialize, Deserialize)]
pub struct TrainerState {
    steps: usize,
    rng: ChaCha12Rng,
    prompts_left: Vec<usize>,
    optimizer_steps: usize,
    kl_coef: f64,
    /// Count, mean and sum of squares of the scores so far.
    scores: [f64; 3],
    /// The fingerprint of the reference's weights, which are not saved.
    reference: u64,
}

/// The results of a step.
pub struct Step {
    /// The responses it sampled.
    pub rollout: Rollout,
    /// KL of each response to the reference, in nats.
    pub kl: Vec<f32>,
    /// Optimiser steps that were skipped, as their loss or a gradient norm was not finite.
    pub skipped: usize,
    /// All metrics of the step.
    pub metrics: Map<String, Value>,
}

impl Trainer {
    /// Starts from `policy`, of which the reference is a frozen copy, and `critic`, where the settings
    /// ask for one. The settings must be valid.
    pub fn new(
        policy: Decoder,
        critic: Option<Critic>,
        sampler: Sampler,
        prompts: Prompts,
        settings: &Settings,
    ) -> Result<Self> {
        let reference = policy.frozen()?;
        let coef = settings.kl_coef;
        let controller = match settings.kl_controller {
            KlControllerKind::Constant => KlController::Constant { coef },
            KlControllerKind::Adaptive => {
                let (target, horizon) = (settings.kl_target, settings.kl_horizon);
                KlController::Adaptive { coef, target, horizon }
            }
        };
        Ok(Self {
            learner: Learner::new(policy, critic, settings)?,
            sampler,
            prompts,
            settings: settings.clone(),
            reference,
            fingerprint: Fingerprint::default(),
            controller,
            scores: RunningMoments::new(),
            rng: ChaCha12Rng::seed_from_u64(settings.seed),
            steps: 0,
        })
    }

    /// Steps that are done.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The next step. `on_token` is told how many tokens the rollout added at each
    /// position, `on_minibatch` of each optimiser step.
    pub fn step(
        &mut self,
        on_token: &mut dyn FnMut(usize),
        on_minibatch: &mut dyn FnMut(),
    ) -> Result<Step> {
        let mut watch = Stopwatch::start();
        let step = self.steps;
        let batch_size = self.settings.batch_size;
        let group_size = self.settings.group_size();
        let drawn = self.prompts.draw(batch_size / group_size, &mut self.rng);
        let prompts = drawn.iter().flat_map(|prompt| repeat_n(prompt.clone(), group_size));
        let (policy, rng) = (&self.learner.policy, &mut self.rng);
        let mut rollout = self.sampler.answer(policy, prompts.collect(), rng, on_token)?;
        if self.settings.estimator() == AdvantageEstimator::Remax {
            let greedy = self.sampler.answer_greedily(policy, drawn, rng)?;
            rollout.greedy = Some(Box::new(greedy));
        }
        watch.lap("rollout");

        let Learner { policy, critic, .. } = &self.learner;
        let shaping = Shaping {
            kl_coef: self.controller.coef(),
            score_scale: self.settings.score_scaling.then(|| {
                self.scores.update(&rollout.scores);
                score_scale(&self.scores, self.settings.score_norm)
            }),
        };
        let experience = Experience::collect(
            &rollout,
            policy,
            &self.reference,
            critic.as_ref(),
            &shaping,
            &self.settings,
        )?;
        watch.lap("experience");

        let rates = Rates {
            policy: self.rate(self.settings.learning_rate, step),
            value: self.rate(self.settings.value_learning_rate, step),
        };
        let Update { skipped, metrics: update_metrics, .. } =
            self.learner.update(&experience, rates, &mut self.rng, on_minibatch)?;
        // The last minibatch may still be under way.
        self.learner.policy.device().synchronize()?;
        watch.lap("update");
        self.controller.update(mean(&experience.kl), batch_size);

        let mut metrics = experience.metrics;
        metrics.extend(update_metrics);
        let tokens: usize = rollout.answers.generation.responses.iter().map(Vec::len).sum();
        let seconds = watch.total();
        metrics.extend(watch.metrics());
        for (name, value) in [
            ("perf/throughput", json!(tokens as f64 / seconds)),
            ("update/skipped", json!(skipped)),
            ("lr", json!(rates.policy)),
            ("episode", json!((step + 1) * batch_size)),
        ] {
            metrics.insert(name.into(), value);
        }
        self.steps += 1;
        Ok(Step { rollout, kl: experience.kl, skipped, metrics })
    }

    /// Answers the first prompts with the policy as it is now; the same ones, with the same chances,
    /// at each call.
    pub fn show(&mut self, count: usize) -> Result<Rollout> {
        let prompts = self.prompts.first(count).to_vec();
        let mut rng = StdRng::seed_from_u64(self.settings.seed);
        self.sampler.answer(&self.learner.policy, prompts, &mut rng, &mut |_| {})
    }

    /// Scores of the policy's answers to the prompts held out, with the same chances at each call.
    pub fn evaluate(&mut self) -> Result<Map<String, Value>> {
        let mut rng = StdRng::seed_from_u64(self.settings.seed);
        let mut scores = Vec::new();
        for some in self.prompts.held_out().chunks(self.settings.batch_size) {
            let policy = &self.learner.policy;
            let rollout = self.sampler.answer(policy, some.to_vec(), &mut rng, &mut |_| {})?;
            scores.extend(rollout.scores);
        }
        Ok(named([("eval/scores", mean(&scores))]))
    }

    fn rate(&self, peak: f64, step: usize) -> f64 {
        let schedule = Schedule {
            peak,
            warmup: self.settings.warmup_steps,
            total: self.settings.steps,
            decay: self.settings.lr_schedule == LrScheduleKind::Linear,
        };
        schedule.at(step)
    }
}

impl Resumable for Trainer {
    type State = TrainerState;

    fn tensors(&self) -> Vec<(String, Tensor)> {
        self.learner.tensors()
    }

    fn state(&self) -> Result<TrainerState> {
        let Moments { count, mean, m2 } = self.scores.moments();
        Ok(TrainerState {
            steps: self.steps,
            rng: self.rng.clone(),
            prompts_left: self.prompts.left().to_vec(),
            optimizer_steps: self.learner.optimizer_steps(),
            kl_coef: self.controller.coef(),
            scores: [count, mean, m2],
            reference: self.fingerprint.of(|| self.reference.tensors())?,
        })
    }

    fn restore(&mut self, state: TrainerState, tensors: &Tensors) -> Result<()> {
        self.fingerprint.check(state.reference, || self.reference.tensors())?;
        self.learner.restore(state.optimizer_steps, tensors)?;
        self.prompts.resume(state.prompts_left)?;
        self.controller.resume(state.kl_coef);
        let [count, mean, m2] = state.scores;
        self.scores = RunningMoments::resume(Moments { count, mean, m2 });
        (self.steps, self.rng) = (state.steps, state.rng);
        Ok(())
    }
}

/// The scale of the scores: the standard deviation of all so far, after their mean is subtracted
/// if `norm`. Equal scores, which have none, are left as they are.
fn score_scale(scores: &RunningMoments, norm: bool) -> ScoreScale {
    let ScoreScale { mean, std } = scores.into();
    ScoreScale {
        mean: if norm { mean } else { 0.0 },
        std: if scores.std() == 0.0 { 1.0 } else { std },
    }
}

/// Seconds of each phase.
struct Stopwatch {
    start: Instant,
    last: Instant,
    laps: Vec<(&'static str, f64)>,
}

impl Stopwatch {
    fn start() -> Self {
        let now = Instant::now();
        Self { start: now, last: now, laps: Vec::new() }
    }

    fn lap(&mut self, phase: &'static str) {
        self.laps.push((phase, self.last.elapsed().as_secs_f64()));
        self.last = Instant::now();
    }

    fn total(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    fn metrics(&self) -> Map<String, Value> {
        let laps = self.laps.iter().copied().chain([("step", self.total())]);
        laps.map(|(phase, seconds)| (format!("timing_s/{phase}"), json!(seconds))).collect()
    }
}
