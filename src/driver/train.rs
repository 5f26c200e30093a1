//! The story of a run of `train`: refuse what cannot work, fit the embedded model if no other is named,
//! show what the policy says, train it, show what it says now, save it.

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, Result};

use super::config::{RunSettings, Settings};
use super::embedded;
use super::load::{check_adapter_base, load_reward, save_critic, save_trained, Loaded};
use super::model::Critic;
use super::prompts;
use super::report::{train_columns, Progress};
use super::reward;
use super::rollout::{Prompts, Sampler};
use super::session::{open_model, Session, SHOWN};
use super::trainer::{Step, Trainer};
use super::tuning::measures;

/// Trains as the settings say. Once `stop` is set, the run ends after the current step, with
/// everything written; a run that has not begun by then leaves nothing.
///
/// # Errors
/// A setting, device, model, prompt file, reward or output folder that cannot be used, before any
/// long work. When a later step fails, its error comes after the weights so far are written.
pub fn run(settings: &Settings, stop: &AtomicBool, progress: &Progress) -> Result<()> {
    let start = Instant::now();
    settings.validate()?;
    check_adapter_base(settings.adapter_base())?;
    let device = settings.device.open()?;
    let reward = reward::build(settings, &device)?;
    let texts = match &settings.prompts {
        Some(path) => prompts::read(path)?,
        None => embedded::prompts(),
    };
    let Loaded { decoder: policy, tokenizer } =
        open_model(settings.model.as_deref(), settings.seed, &device)?;
    let context = policy.config().max_position_embeddings.min(reward.context(&tokenizer)?);
    let prompts = Prompts::new(texts, &tokenizer, context, settings.max_new_tokens);
    let mut prompts = match &settings.model {
        Some(_) => prompts?,
        None => prompts.context("the embedded model knows few words; --model names another")?,
    };
    if settings.eval_every > 0 {
        prompts.hold_out(settings.held_out, settings.seed)?;
    }
    let Some(mut session) = Session::begin(settings, progress, stop, start)? else {
        return Ok(());
    };
    session.describe("policy", &policy);
    if settings.model.is_none() {
        session.fit(&policy, &tokenizer, settings.lm_steps, settings.seed)?;
    }

    let sampler = Sampler { tokenizer, sampling: settings.sampling(), reward };
    let critic = match settings.critic_dir() {
        _ if !settings.estimator().has_critic() => None,
        Some(dir) => Some(load_reward(dir, &device)?.critic),
        // Where only adapters learn, the two networks share the rest.
        None if settings.lora().is_some() => Some(Critic::new(policy.no_grad(), settings.seed)?),
        None => Some(Critic::new(policy.duplicate()?, settings.seed)?),
    };
    let (policy, critic) = match settings.lora() {
        Some(lora) => (
            policy.with_lora(lora.clone(), settings.seed)?,
            critic.map(|critic| critic.with_lora(lora, settings.seed)).transpose()?,
        ),
        None => (policy, critic),
    };
    let mut trainer = Trainer::new(policy, critic, sampler, prompts, settings)?;
    session.restore(&mut trainer)?;
    if !session.goes_on() {
        let before = trainer.show(SHOWN)?;
        session.show("before", &before.answers, Some(&before.scores));
        session.record(0, &before.answers, Some(&before.scores), None)?;
    }

    let trained = train(&mut trainer, settings, &mut session);
    session.save(trained, |weights| {
        let (policy, tokenizer) = (&trainer.learner.policy, &trainer.sampler.tokenizer);
        save_trained(weights, policy, tokenizer, settings.adapter_base())?;
        trainer.learner.critic.as_ref().map_or(Ok(()), |critic| save_critic(weights, critic))
    })?;
    let after = trainer.show(SHOWN)?;
    session.show("after", &after.answers, Some(&after.scores));
    session.end();
    Ok(())
}

/// All steps that are left, or those until the run is stopped; the steps that were made.
fn train(trainer: &mut Trainer, settings: &Settings, session: &mut Session) -> Result<usize> {
    let progress = session.progress;
    let columns = train_columns(settings);
    let mut table = progress.table(&columns);
    let tokens = settings.batch_size * settings.max_new_tokens;
    let minibatches = trainer.learner.steps(settings.batch_size);
    let mut skipped = 0;
    while !session.ends_at(trainer.steps(), trainer)? {
        let number = trainer.steps() + 1;
        let rollout_bar = progress.bar("rollout", tokens, "tokens");
        let update_bar = progress.bar("update", minibatches, "minibatches");
        let mut on_token = |n| {
            rollout_bar.inc(n);
            update_bar.restart();
        };
        let mut on_minibatch = || {
            rollout_bar.complete(); // responses may end before the longest
            update_bar.inc(1);
        };
        let done = trainer.step(&mut on_token, &mut on_minibatch);
        drop((rollout_bar, update_bar));
        let Step { rollout, kl, mut metrics, skipped: now } =
            done.with_context(|| format!("step {number}"))?;
        if settings.eval_every > 0 && measures(number, settings.steps, settings.eval_every) {
            let held_out = trainer.evaluate();
            metrics.extend(held_out.with_context(|| format!("--eval-every after step {number}"))?);
        }
        session.run.metrics(number, &metrics)?;
        session.record(number, &rollout.answers, Some(&rollout.scores), Some(&kl))?;
        table.step(number, settings.steps, &metrics);
        if now > 0 {
            skipped += now;
            progress.line(&format!(
                "step {number}: {now} of {minibatches} minibatches skipped, as their loss or gradient \
                 was not finite; {skipped} in this run"
            ));
        }
    }
    Ok(trainer.steps())
}
