//! The third phase of a step: several passes of clipped gradient steps over the experience, in
//! shuffled minibatches. Policy and critic, if there is one, share one loss and one backward pass, and
//! have an optimiser, a learning rate and a gradient norm each.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::Tensor;
use rand::seq::SliceRandom;
use rand::Rng;
use serde_json::{Map, Value};

use super::checkpoint::{prefixed, Tensors};
use super::config::Settings;
use super::experience::{named, Experience};
use super::model::{Critic, Decoder};
use super::optim::Optimizer;
use super::sequences::Sequences;
use crate::moments::{Moments, RunningMoments};
use crate::ppo_loss::{
    ppo_loss, Aggregation, PpoLossInputs, PpoLossOptions, PpoLossOutput, PpoStats,
};

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
    /// The critic, if there is one.
    pub critic: Option<Critic>,
    policy_optimizer: Optimizer,
    value_optimizer: Option<Optimizer>,
    options: PpoLossOptions,
    epochs: usize,
    minibatch_size: usize,
    /// Rows whose gradients are computed at once.
    part_size: usize,
    temperature: f64,
}

/// The results of an optimiser step.
struct MinibatchStep {
    of_loss: MinibatchStats,
    policy_norm: f64,
    value_norm: Option<f64>,
}

impl MinibatchStep {
    /// The sum of a term of the loss over its parts.
    fn sum(&self, of: impl Fn(&PpoStats) -> f64) -> f64 {
        self.of_loss.parts.iter().map(of).sum()
    }

    /// The mean of a statistic over tokens.
    fn over_tokens(&self, of: impl Fn(&PpoStats) -> f64) -> f64 {
        self.sum(|part| of(part) * part.tokens) / self.sum(|part| part.tokens)
    }
}

/// The statistics of a minibatch's loss.
pub struct MinibatchStats {
    /// The statistics of its parts, whose losses add up.
    pub parts: Vec<PpoStats>,
    /// The fit of the critic's values.
    pub fit: ValueFit,
}

/// How well the values fit the returns: what the explained variance is made of. That of several
/// minibatches is no mean of theirs.
#[derive(Debug, Clone, Copy, Default)]
pub struct ValueFit {
    returns: Moments,
    errors: Moments,
}

impl ValueFit {
    /// The fit at all tokens; both are `[N]`.
    fn new(values: &Tensor, returns: &Tensor) -> Result<Self> {
        let moments = |x: &Tensor| anyhow::Ok(RunningMoments::new().update(&x.to_vec1()?));
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

/// The results of the optimiser steps of one update.
pub struct Update {
    /// Optimiser steps that were not applied, as their loss or a gradient norm was not finite.
    pub skipped: usize,
    /// Optimiser steps that were applied.
    pub applied: usize,
    /// The metrics of this phase, over the applied steps; null where there is none.
    pub metrics: Map<String, Value>,
}

impl Learner {
    /// A learner of a trainable policy, and of a critic where the advantages are made of one.
    pub fn new(policy: Decoder, critic: Option<Critic>, settings: &Settings) -> Result<Self> {
        let optimizer = |parameters: Vec<_>| {
            Optimizer::new(&parameters, settings.weight_decay, settings.max_grad_norm)
        };
        Ok(Self {
            policy_optimizer: optimizer(policy.parameters())?,
            value_optimizer: critic.as_ref().map(|c| optimizer(c.parameters())).transpose()?,
            policy,
            critic,
            options: settings.loss_options()?,
            epochs: settings.ppo_epochs,
            minibatch_size: settings.minibatch_size,
            part_size: settings.part_size(),
            temperature: settings.temperature,
        })
    }

    /// Weights of the networks, and moments of their optimisers.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let value = self.critic.as_ref().map_or(Vec::new(), Critic::parameters);
        let value_optimizer =
            self.value_optimizer.as_ref().map(|optimizer| optimizer.tensors("value_optimizer."));
        prefixed("policy.", &self.policy.parameters())
            .chain(prefixed("value.", &value))
            .chain(self.policy_optimizer.tensors("policy_optimizer."))
            .chain(value_optimizer.unwrap_or_default())
            .collect()
    }

    /// Optimiser steps so far; policy and critic make theirs together.
    pub fn optimizer_steps(&self) -> usize {
        self.policy_optimizer.steps()
    }

    /// Goes on from such tensors after so many optimiser steps.
    ///
    /// # Errors
    /// If one is missing or of another shape.
    pub fn restore(&mut self, optimizer_steps: usize, tensors: &Tensors) -> Result<()> {
        tensors.set("policy.", &self.policy.parameters())?;
        self.policy_optimizer.restore("policy_optimizer.", optimizer_steps, tensors)?;
        if let (Some(critic), Some(optimizer)) = (&self.critic, &mut self.value_optimizer) {
            tensors.set("value.", &critic.parameters())?;
            optimizer.restore("value_optimizer.", optimizer_steps, tensors)?;
        }
        Ok(())
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
        let mut metrics = policy_metrics(&taken);
        if self.critic.is_some() {
            metrics.extend(critic_metrics(&taken));
        }
        if experience.kl_term.is_some() {
            metrics
                .extend(named([("loss/kl_avg", mean(&taken, |t| t.over_tokens(|s| s.kl_mean)))]));
        }
        Ok(Update { skipped, applied: taken.len(), metrics })
    }

    /// One optimiser step of the networks, or none if it would not be finite.
    fn minibatch(
        &mut self,
        experience: &Experience,
        rows: &[usize],
        rates: Rates,
    ) -> Result<Option<MinibatchStep>> {
        let Some((mut grads, of_loss)) = self.gradients(experience, rows)? else {
            return Ok(None);
        };
        let policy_norm = self.policy_optimizer.grad_norm(&grads)?;
        let value_norm = self
            .value_optimizer
            .as_ref()
            .map(|optimizer| optimizer.grad_norm(&grads))
            .transpose()?;
        if !(policy_norm.is_finite() && value_norm.is_none_or(f64::is_finite)) {
            return Ok(None);
        }
        self.policy_optimizer.apply(&mut grads, policy_norm, rates.policy)?;
        if let (Some(optimizer), Some(norm)) = (&mut self.value_optimizer, value_norm) {
            optimizer.apply(&mut grads, norm, rates.value)?;
        }
        Ok(Some(MinibatchStep { of_loss, policy_norm, value_norm }))
    }

    /// The gradients of the loss of these rows of the experience, those of one part after the other
    /// added up; none if the loss is not finite.
    pub fn gradients(
        &self,
        experience: &Experience,
        rows: &[usize],
    ) -> Result<Option<(GradStore, MinibatchStats)>> {
        let (mut sum, mut parts, mut fit) = (None::<GradStore>, Vec::new(), ValueFit::default());
        for part in rows.chunks(self.part_size) {
            let (PpoLossOutput { loss, stats }, of_part) = self.loss(experience, part, rows)?;
            let stats = stats.to_host()?;
            if !stats.loss.is_finite() {
                return Ok(None);
            }
            let grads = loss.backward()?;
            match &mut sum {
                Some(sum) => sum.extend(grads)?,
                None => sum = Some(grads),
            }
            parts.push(stats);
            fit = fit.merge(of_part);
        }
        // The graph is gone before the optimiser's temporaries are made.
        Ok(sum.map(|grads| (grads, MinibatchStats { parts, fit })))
    }

    /// The loss of these rows of the experience as a part of that of all rows of a minibatch, with its
    /// graph into policy and critic, and the fit of the critic's values.
    pub fn loss(
        &self,
        experience: &Experience,
        rows: &[usize],
        minibatch: &[usize],
    ) -> Result<(PpoLossOutput, ValueFit)> {
        let sequences = experience.sequences.select(rows)?;
        let offsets = sequences.offsets()?;
        let tokens = experience.sequences.tokens_of(rows)?;
        let select =
            |tensor: Option<&Tensor>| tensor.map(|all| all.index_select(&tokens, 0)).transpose();
        let (logp, entropy) = sequences.logp_and_entropy(&self.policy, self.temperature)?;
        let values = self.critic.as_ref().map(|critic| sequences.values(critic)).transpose()?;
        let targets = experience.critic.as_ref();
        let old_values = select(targets.map(|targets| &targets.values))?;
        let returns = select(targets.map(|targets| &targets.returns))?;
        let kl_term = experience.kl_term.as_ref();
        let ref_logp = select(kl_term.map(|term| &term.ref_logp))?;
        let weights = select(experience.weights.as_ref())?;
        let inputs = PpoLossInputs {
            logp: &logp,
            old_logp: &experience.old_logp.index_select(&tokens, 0)?,
            advantages: &experience.advantages.index_select(&tokens, 0)?,
            values: values.as_ref(),
            old_values: old_values.as_ref(),
            returns: returns.as_ref(),
            entropy: Some(&entropy),
            ref_logp: ref_logp.as_ref(),
            rollout_logp: None,
            weights: weights.as_ref(),
            mask: None,
            offsets: Some(&offsets),
        };
        let fit = match (&values, &returns) {
            (Some(values), Some(returns)) => ValueFit::new(values, returns)?,
            _ => ValueFit::default(),
        };
        let options = PpoLossOptions {
            kl_coef: kl_term.map_or(0.0, |term| term.coef),
            denominator: self.denominator(&experience.sequences, minibatch)?,
            ..self.options
        };
        Ok((ppo_loss(&inputs, &options)?, fit))
    }

    /// The divisor of the loss of all rows of a minibatch, which a part of them cannot know; nor the
    /// padded length, that of the longest response of the rollout.
    fn denominator(&self, sequences: &Sequences, minibatch: &[usize]) -> Result<Option<f64>> {
        if let Aggregation::Constant(_) = self.options.aggregation {
            return Ok(None);
        }
        let tokens = minibatch.iter().map(|&row| sequences.lengths[row]).sum();
        let longest = sequences.lengths.iter().max().copied().unwrap_or(0);
        // No response is empty.
        let rows = minibatch.len();
        Ok(Some(self.options.divisor(tokens, rows, [rows, longest])?))
    }
}

/// The mean over the steps; NaN of none.
fn mean(taken: &[MinibatchStep], of: impl Fn(&MinibatchStep) -> f64) -> f64 {
    taken.iter().map(of).sum::<f64>() / taken.len() as f64
}

fn policy_metrics(taken: &[MinibatchStep]) -> Map<String, Value> {
    let ratio = mean(taken, |t| t.over_tokens(|s| s.ratio_mean));
    // TRL's: the variance of the minibatches' means.
    let squares =
        taken.iter().map(|t| (t.over_tokens(|s| s.ratio_mean) - ratio).powi(2)).sum::<f64>();
    let ratio_var = squares / (taken.len() as f64 - 1.0).max(1.0);
    named([
        ("loss/policy_avg", mean(taken, |t| t.sum(|s| s.policy_loss))),
        ("policy/approxkl_avg", mean(taken, |t| t.over_tokens(|s| s.approx_kl_k2))),
        ("policy/clipfrac_avg", mean(taken, |t| t.over_tokens(|s| s.clip_fraction))),
        ("policy/entropy_avg", mean(taken, |t| t.over_tokens(|s| s.entropy_mean))),
        ("val/ratio", ratio),
        ("val/ratio_var", ratio_var),
        ("grad_norm/policy", mean(taken, |t| t.policy_norm)),
    ])
}

fn critic_metrics(taken: &[MinibatchStep]) -> Map<String, Value> {
    let fit = taken.iter().map(|t| t.of_loss.fit).fold(ValueFit::default(), ValueFit::merge);
    named([
        ("loss/value_avg", mean(taken, |t| t.sum(|s| s.value_loss))),
        ("val/clipfrac_avg", mean(taken, |t| t.over_tokens(|s| s.value_clip_fraction))),
        ("val/explained_var", fit.explained_variance()),
        ("grad_norm/value", mean(taken, |t| t.value_norm.unwrap_or(f64::NAN))),
    ])
}
