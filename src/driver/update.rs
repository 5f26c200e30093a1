//! The third phase of a step: several passes of clipped gradient steps over the experience, in
//! shuffled minibatches. Policy and critic share one loss and one backward pass, and have an
//! optimiser, a learning rate and a gradient norm each.

use anyhow::Result;
use candle_core::Tensor;
use rand::seq::SliceRandom;
use rand::Rng;
use serde_json::{json, Map, Value};

use super::checkpoint::{prefixed, Tensors};
use super::config::Settings;
use super::experience::{kept, Experience};
use super::model::{Critic, Decoder};
use super::optim::Optimizer;
use super::sequences::select_rows;
use crate::moments::{Moments, RunningMoments};
use crate::ppo_loss::{ppo_loss, PpoLossInputs, PpoLossOptions, PpoLossOutput, PpoStats};

/// Learning rates of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// The policy's.
    pub policy: f64,
    /// The critic's.
    pub value: f64,
}

/// The networks that learn, and how.
pub struct Learner {
    /// The policy.
    pub policy: Decoder,
    /// The critic.
    pub critic: Critic,
    policy_optimizer: Optimizer,
    value_optimizer: Optimizer,
    options: PpoLossOptions,
    epochs: usize,
    minibatch_size: usize,
    temperature: f64,
}

/// What an optimiser step left behind.
struct MinibatchStep {
    stats: PpoStats,
    fit: ValueFit,
    policy_norm: f64,
    value_norm: f64,
}

/// How well the values fit the returns: what the explained variance is made of. That of several
/// minibatches is no mean of theirs.
#[derive(Debug, Clone, Copy, Default)]
pub struct ValueFit {
    returns: Moments,
    errors: Moments,
}

impl ValueFit {
    /// The fit at the unmasked tokens; all are `[B, R]`.
    fn new(values: &Tensor, returns: &Tensor, mask: &Tensor) -> Result<Self> {
        let moments = |x: &Tensor| anyhow::Ok(RunningMoments::new().update(&kept(x, mask)?));
        let errors = (returns - values.detach())?;
        Ok(Self { returns: moments(returns)?, errors: moments(&errors)? })
    }

    fn merge(self, other: Self) -> Self {
        Self { returns: self.returns.merge(other.returns), errors: self.errors.merge(other.errors) }
    }

    /// 1 - Var(returns - values) / Var(returns); NaN where the returns do not vary.
    pub fn explained_variance(&self) -> f64 {
        match self.returns.m2 {
            0.0 => f64::NAN,
            m2 => 1.0 - self.errors.m2 / m2,
        }
    }
}

/// What the optimiser steps of one update did.
pub struct Update {
    /// Optimiser steps that were not applied, as their loss or a gradient norm was not finite.
    pub skipped: usize,
    /// Optimiser steps that were applied.
    pub applied: usize,
    /// The metrics of this phase, over the applied steps; null where there is none.
    pub metrics: Map<String, Value>,
}

impl Learner {
    /// For a trainable policy and critic.
    pub fn new(policy: Decoder, critic: Critic, settings: &Settings) -> Result<Self> {
        let optimizer = |parameters: Vec<_>| {
            Optimizer::new(&parameters, settings.weight_decay, settings.max_grad_norm)
        };
        Ok(Self {
            policy_optimizer: optimizer(policy.parameters())?,
            value_optimizer: optimizer(critic.parameters())?,
            policy,
            critic,
            options: settings.loss_options()?,
            epochs: settings.ppo_epochs,
            minibatch_size: settings.minibatch_size,
            temperature: settings.temperature,
        })
    }

    /// Weights of both networks, and moments of their optimisers.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        prefixed("policy.", &self.policy.parameters())
            .chain(prefixed("value.", &self.critic.parameters()))
            .chain(self.policy_optimizer.tensors("policy_optimizer."))
            .chain(self.value_optimizer.tensors("value_optimizer."))
            .collect()
    }

    /// Optimiser steps so far, of policy and critic.
    pub fn optimizer_steps(&self) -> [usize; 2] {
        [self.policy_optimizer.steps(), self.value_optimizer.steps()]
    }

    /// Goes on from such tensors after so many optimiser steps.
    ///
    /// # Errors
    /// If one is missing or of another shape.
    pub fn restore(&mut self, [policy, value]: [usize; 2], tensors: &Tensors) -> Result<()> {
        tensors.set("policy.", &self.policy.parameters())?;
        tensors.set("value.", &self.critic.parameters())?;
        self.policy_optimizer.restore("policy_optimizer.", policy, tensors)?;
        self.value_optimizer.restore("value_optimizer.", value, tensors)
    }

    /// Optimiser steps of one update of `batch_size` responses.
    pub fn steps(&self, batch_size: usize) -> usize {
        self.epochs.saturating_mul(batch_size.div_ceil(self.minibatch_size))
    }

    /// Learns from the experience. `on_minibatch` is called after each optimiser step.
    pub fn update(
        &mut self,
        experience: &Experience,
        rates: Rates,
        rng: &mut impl Rng,
        on_minibatch: &mut dyn FnMut(),
    ) -> Result<Update> {
        let mut rows: Vec<usize> = (0..experience.sequences.len()).collect();
        let mut taken = Vec::new();
        let mut skipped = 0;
        for _ in 0..self.epochs {
            rows.shuffle(rng);
            for rows in rows.chunks(self.minibatch_size) {
                match self.minibatch(experience, rows, rates)? {
                    Some(step) => taken.push(step),
                    None => skipped += 1,
                }
                on_minibatch();
            }
        }
        Ok(Update { skipped, applied: taken.len(), metrics: metrics(&taken) })
    }

    /// One optimiser step of both networks, or none if it would not be finite.
    fn minibatch(
        &mut self,
        experience: &Experience,
        rows: &[usize],
        rates: Rates,
    ) -> Result<Option<MinibatchStep>> {
        let (PpoLossOutput { loss, stats }, fit) = self.loss(experience, rows)?;
        let stats = stats.to_host()?;
        if !stats.loss.is_finite() {
            return Ok(None);
        }
        let mut grads = loss.backward()?;
        drop(loss); // and with it the graph, before the optimiser's temporaries are made
        let policy_norm = self.policy_optimizer.grad_norm(&grads)?;
        let value_norm = self.value_optimizer.grad_norm(&grads)?;
        if !(policy_norm.is_finite() && value_norm.is_finite()) {
            return Ok(None);
        }
        self.policy_optimizer.apply(&mut grads, policy_norm, rates.policy)?;
        self.value_optimizer.apply(&mut grads, value_norm, rates.value)?;
        Ok(Some(MinibatchStep { stats, fit, policy_norm, value_norm }))
    }

    /// The loss of these rows of the experience, with its graph into policy and critic, and the fit of
    /// the critic's values.
    pub fn loss(
        &self,
        experience: &Experience,
        rows: &[usize],
    ) -> Result<(PpoLossOutput, ValueFit)> {
        let sequences = experience.sequences.select(rows)?;
        let weights =
            experience.weights.as_ref().map(|weights| select_rows(weights, rows)).transpose()?;
        let (logp, entropy) = sequences.logp_and_entropy(&self.policy, self.temperature)?;
        let values = sequences.values(&self.critic)?;
        let returns = select_rows(&experience.returns, rows)?;
        let inputs = PpoLossInputs {
            logp: &logp,
            old_logp: &select_rows(&experience.old_logp, rows)?,
            advantages: &select_rows(&experience.advantages, rows)?,
            values: Some(&values),
            old_values: Some(&select_rows(&experience.values, rows)?),
            returns: Some(&returns),
            entropy: Some(&entropy),
            ref_logp: None,
            rollout_logp: None,
            weights: weights.as_ref(),
            mask: Some(&sequences.mask),
            offsets: None,
        };
        let fit = ValueFit::new(&values, &returns, &sequences.mask)?;
        Ok((ppo_loss(&inputs, &self.options)?, fit))
    }
}

fn metrics(taken: &[MinibatchStep]) -> Map<String, Value> {
    let mean =
        |of: &dyn Fn(&MinibatchStep) -> f64| taken.iter().map(of).sum::<f64>() / taken.len() as f64;
    let fit = taken.iter().map(|t| t.fit).fold(ValueFit::default(), ValueFit::merge);
    let ratio = mean(&|t| t.stats.ratio_mean);
    // TRL's: the variance of the minibatches' means.
    let squares = taken.iter().map(|t| (t.stats.ratio_mean - ratio).powi(2)).sum::<f64>();
    let ratio_var = squares / (taken.len() as f64 - 1.0).max(1.0);
    let all = [
        ("loss/policy_avg", mean(&|t| t.stats.policy_loss)),
        ("loss/value_avg", mean(&|t| t.stats.value_loss)),
        ("policy/approxkl_avg", mean(&|t| t.stats.approx_kl_k2)),
        ("policy/clipfrac_avg", mean(&|t| t.stats.clip_fraction)),
        ("policy/entropy_avg", mean(&|t| t.stats.entropy_mean)),
        ("val/clipfrac_avg", mean(&|t| t.stats.value_clip_fraction)),
        ("val/ratio", ratio),
        ("val/ratio_var", ratio_var),
        ("val/explained_var", fit.explained_variance()),
        ("grad_norm/policy", mean(&|t| t.policy_norm)),
        ("grad_norm/value", mean(&|t| t.value_norm)),
    ];
    all.into_iter().map(|(name, value)| (name.to_owned(), json!(value))).collect()
}
