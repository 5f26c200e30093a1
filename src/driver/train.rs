//! The story of one run: refuse what cannot work, fit the embedded model if no other is named, show
//! what the policy says, train it, show what it says now, save it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};

use super::config::Settings;
use super::embedded;
use super::generate::Sampling;
use super::load::{load, save, save_critic, Loaded};
use super::model::Decoder;
use super::prompts;
use super::report::{Progress, Run, SampleRecord};
use super::reward;
use super::rollout::{Prompts, Rollout, Sampler};
use super::tokenizer::Tokenizer;
use super::trainer::{Step, Trainer};

/// Responses shown before and after the training.
const SHOWN: usize = 8;
/// Steps of language modelling between two lines about them.
const LM_LINE_EVERY: usize = 100;

/// Trains as the settings say. Once `stop` is set, the run ends after the current step, with
/// everything written; a run that has not begun by then leaves nothing.
///
/// # Errors
/// A setting, device, model, prompt file, reward or output folder that cannot be used, before any
/// long work. When a later step fails, its error comes after the weights so far are written.
pub fn run(settings: &Settings, stop: &AtomicBool, progress: Progress) -> Result<()> {
    let start = Instant::now();
    settings.validate()?;
    let reward = reward::build(settings)?;
    let texts = match &settings.prompts {
        Some(path) => prompts::read(path)?,
        None => embedded::prompts(),
    };
    let device = settings.device.open()?;
    let Loaded { decoder: policy, tokenizer } = match &settings.model {
        Some(path) => load(path, &device).context("--model is refused")?,
        None => embedded::model(settings.seed, &device)?,
    };
    let context = policy.config().max_position_embeddings;
    let prompts = Prompts::new(texts, &tokenizer, context, settings.max_new_tokens);
    let prompts = match &settings.model {
        Some(_) => prompts?,
        None => prompts.context("the embedded model knows few words; --model names another")?,
    };
    if stop.load(Ordering::Relaxed) {
        progress.line("stopped before the first step; nothing is written");
        return Ok(());
    }
    let mut run = Run::create(settings)?;
    progress.line(&describe(&policy));

    if settings.model.is_none() {
        fit(&policy, &tokenizer, settings, &progress, stop)?;
    }

    let sampling = Sampling {
        temperature: settings.temperature,
        top_k: Some(settings.top_k).filter(|&k| k > 0),
        top_p: Some(settings.top_p).filter(|&p| p < 1.0),
        max_new_tokens: settings.max_new_tokens,
    };
    let sampler = Sampler { tokenizer, sampling, reward };
    let mut trainer = Trainer::new(policy, sampler, prompts, settings)?;
    let before = trainer.show(SHOWN)?;
    show("before", &before, &progress);
    record(&mut run, 0, &before, None)?;

    let trained = train(&mut trainer, settings, &mut run, progress, stop);

    let weights = run.weights_dir();
    let saved = save(&weights, &trainer.learner.policy, &trainer.sampler.tokenizer)
        .and_then(|()| save_critic(&weights, &trainer.learner.critic))
        .with_context(|| format!("cannot save the weights in {}", weights.display()));
    let ended = match &saved {
        Ok(()) => format!("the run ended early; the weights so far are in {}", weights.display()),
        Err(error) => format!("the run ended early and left no weights ({error:#})"),
    };
    let progress = trained.context(ended)?;
    saved?;
    show("after", &trainer.show(SHOWN)?, &progress);
    progress.line(&format!(
        "{:.0} s in all; settings, metrics, samples and weights are in {}",
        start.elapsed().as_secs_f64(),
        run.dir().display()
    ));
    Ok(())
}

/// All steps, or those until `stop` is set.
fn train(
    trainer: &mut Trainer,
    settings: &Settings,
    run: &mut Run,
    mut progress: Progress,
    stop: &AtomicBool,
) -> Result<Progress> {
    let tokens = settings.batch_size * settings.max_new_tokens;
    let minibatches = trainer.learner.steps(settings.batch_size);
    let mut skipped = 0;
    for step in 0..settings.steps {
        if stop.load(Ordering::Relaxed) {
            progress.line(&format!("stopped after {step} of {} steps", settings.steps));
            break;
        }
        let number = step + 1;
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
        let done = trainer.step(step, &mut on_token, &mut on_minibatch);
        drop((rollout_bar, update_bar));
        let Step { rollout, kl, metrics, skipped: now } =
            done.with_context(|| format!("step {number}"))?;
        run.metrics(number, &metrics)?;
        record(run, number, &rollout, Some(&kl))?;
        progress.step(number, settings.steps, &metrics);
        if now > 0 {
            skipped += now;
            progress.line(&format!(
                "step {number}: {now} of {minibatches} minibatches skipped, as their loss or gradient \
                 was not finite; {skipped} in this run"
            ));
        }
    }
    Ok(progress)
}

/// Fits the embedded model to its corpus.
fn fit(
    policy: &Decoder,
    tokenizer: &Tokenizer,
    settings: &Settings,
    progress: &Progress,
    stop: &AtomicBool,
) -> Result<()> {
    let bar = progress.bar("fitting", settings.lm_steps, "steps");
    embedded::fit(policy, tokenizer, settings.lm_steps, settings.seed, |loss| {
        bar.inc(1);
        let step = bar.position();
        if step == 1 || step == settings.lm_steps || step.is_multiple_of(LM_LINE_EVERY) {
            let steps = settings.lm_steps;
            progress.line(&format!("language modelling {step}/{steps}: {loss:.3} nats a token"));
        }
        !stop.load(Ordering::Relaxed)
    })
}

fn describe(policy: &Decoder) -> String {
    let parameters: usize = policy.parameters().iter().map(|(_, var)| var.elem_count()).sum();
    let config = policy.config();
    format!(
        "policy: {:.1} million parameters, {} layers, {} tokens of vocabulary",
        parameters as f64 / 1e6,
        config.num_hidden_layers,
        config.vocab_size
    )
}

fn show(when: &str, rollout: &Rollout, progress: &Progress) {
    progress.line(&format!("samples {when} training (score, prompt | response):"));
    for ((prompt, response), score) in
        rollout.prompts.iter().zip(&rollout.responses).zip(&rollout.scores)
    {
        let response: Vec<&str> = response.split_whitespace().collect();
        progress.line(&format!("  {score:+.2}  {} | {}", prompt.text, response.join(" ")));
    }
}

fn record(run: &mut Run, step: usize, rollout: &Rollout, kl: Option<&[f32]>) -> Result<()> {
    let records: Vec<SampleRecord> = (0..rollout.prompts.len())
        .map(|i| SampleRecord {
            step,
            prompt: &rollout.prompts[i].text,
            response: &rollout.responses[i],
            score: rollout.scores[i],
            kl: kl.map(|kl| kl[i]),
            finished: rollout.generation.finished[i],
        })
        .collect();
    run.samples(&records)
}
