//! What every run does before and after its training: open the model, fit the embedded one if no
//! other is named, make the folder, show and save.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use candle_core::Device;
use rand::rngs::StdRng;
use rand::SeedableRng;

use super::checkpoint::{self, Position, Resumable};
use super::config::RunSettings;
use super::embedded;
use super::generate::Sampling;
use super::load::{load, Loaded};
use super::model::{Decoder, DecoderConfig};
use super::prompts;
use super::report::{Progress, Run, SampleRecord};
use super::rollout::{answer, Answers, Prompt, Prompts};
use super::tokenizer::Tokenizer;

/// Responses shown before and after a training.
pub(super) const SHOWN: usize = 8;
/// Steps of language modelling between two lines about them.
const LM_LINE_EVERY: usize = 100;

/// The model of `--model`, or the embedded one, as it is before it is fitted.
pub fn open_model(model: Option<&Path>, seed: u64, device: &Device) -> Result<Loaded> {
    match model {
        Some(path) => load(path, device).context("--model is refused"),
        None => embedded::model(seed, device),
    }
}

/// Fits the embedded model to its corpus, with a bar and a line every few steps.
pub fn fit(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    steps: usize,
    seed: u64,
    progress: &Progress,
    stop: &AtomicBool,
) -> Result<()> {
    let bar = progress.bar("fitting", steps, "steps");
    embedded::fit(decoder, tokenizer, steps, seed, |loss| {
        bar.inc(1);
        let step = bar.position();
        if step == 1 || step == steps || step.is_multiple_of(LM_LINE_EVERY) {
            progress.line(&format!("language modelling {step}/{steps}: {loss:.3} nats a token"));
        }
        !stop.load(Ordering::Relaxed)
    })
}

/// A run with a folder.
pub struct Session<'a> {
    /// The folder.
    pub run: Run,
    /// Where its lines go.
    pub progress: &'a Progress,
    stop: &'a AtomicBool,
    start: Instant,
    /// Steps of the run, and from one checkpoint to the next.
    steps: usize,
    save_every: usize,
    /// The checkpoint that it goes on from.
    checkpoint: Option<(PathBuf, Position)>,
    /// The step of the last checkpoint; 0 needs none.
    saved: usize,
}

impl<'a> Session<'a> {
    /// Makes the folder, unless `stop` is set already: then there is nothing to do.
    ///
    /// # Errors
    /// Those of [`Run::create`].
    pub fn begin(
        settings: &impl RunSettings,
        progress: &'a Progress,
        stop: &'a AtomicBool,
        start: Instant,
    ) -> Result<Option<Self>> {
        if stop.load(Ordering::Relaxed) {
            progress.line("stopped before the first step; nothing is written");
            return Ok(None);
        }
        let (steps, save_every) = (settings.steps(), settings.save_every());
        let (mut checkpoint, mut saved) = (None, 0);
        let run = match settings.resumed() {
            None => Run::create(settings)?,
            Some(dir) => {
                checkpoint = checkpoint::last(dir).context("--resume is refused")?;
                let position = checkpoint.as_ref().map_or(Position::default(), |(_, at)| *at);
                saved = position.step;
                let shown = dir.display();
                if checkpoint.is_none() && Run::is_complete(dir, steps) {
                    progress.line(&format!("the run in {shown} came to its end; nothing to do"));
                    return Ok(None);
                }
                let mut run = Run::reopen(dir, position)?;
                progress.line(&match checkpoint {
                    Some(_) => format!("going on in {shown} after step {}", position.step),
                    None => format!("no checkpoint is in {shown}; the run starts over"),
                });
                if checkpoint.is_none() {
                    run.cut(position)?;
                }
                run
            }
        };
        Ok(Some(Self { run, progress, stop, start, steps, save_every, checkpoint, saved }))
    }

    /// Whether the run goes on from a checkpoint: what comes before the first step is done.
    pub fn goes_on(&self) -> bool {
        self.checkpoint.is_some()
    }

    /// Puts what learns where the run was, if this goes on from a checkpoint.
    ///
    /// # Errors
    /// A checkpoint that does not fit.
    pub fn restore(&mut self, learner: &mut impl Resumable) -> Result<()> {
        if let Some((dir, position)) = &self.checkpoint {
            checkpoint::restore(dir, learner).context("--resume is refused")?;
            self.run.cut(*position)?;
        }
        Ok(())
    }

    /// Whether the run is to end after the current step.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Whether the run ends after so many steps, all of them or because it is stopped. Makes a checkpoint
    /// where one is due.
    ///
    /// # Errors
    /// A checkpoint that cannot be written.
    pub fn ends_at(&mut self, step: usize, learner: &impl Resumable) -> Result<bool> {
        if step == self.steps {
            return Ok(true);
        }
        let stopped = self.stopped();
        let is_due = self.save_every > 0 && step.is_multiple_of(self.save_every);
        if (stopped || is_due) && self.saved != step {
            checkpoint::save(self.run.dir(), self.run.position(step)?, learner)?;
            self.saved = step;
        }
        if stopped {
            let (steps, dir) = (self.steps, self.run.dir().display());
            let then = if step == 0 { "starts over" } else { "goes on from there" };
            self.progress
                .line(&format!("stopped after {step} of {steps} steps; --resume {dir} {then}"));
        }
        Ok(stopped)
    }

    /// Fits the embedded model to its corpus.
    pub fn fit(
        &self,
        decoder: &Decoder,
        tokenizer: &Tokenizer,
        steps: usize,
        seed: u64,
    ) -> Result<()> {
        fit(decoder, tokenizer, steps, seed, self.progress, self.stop)
    }

    /// Says what is trained.
    pub fn describe(&self, what: &str, decoder: &Decoder) {
        let parameters: usize = decoder.tensors().iter().map(|(_, t)| t.elem_count()).sum();
        let DecoderConfig { num_hidden_layers, vocab_size, .. } = decoder.config();
        self.progress.line(&format!(
            "{what}: {:.1} million parameters, {num_hidden_layers} layers, {vocab_size} tokens of \
             vocabulary",
            parameters as f64 / 1e6
        ));
    }

    /// Shows responses.
    pub fn show(&self, when: &str, answers: &Answers, scores: Option<&[f32]>) {
        let columns =
            if scores.is_some() { "score, prompt | response" } else { "prompt | response" };
        self.progress.line(&format!("samples {when} training ({columns}):"));
        for (i, (prompt, response)) in answers.prompts.iter().zip(&answers.responses).enumerate() {
            let response: Vec<&str> = response.split_whitespace().collect();
            let score = scores.map_or(String::new(), |scores| format!("{:+.2}  ", scores[i]));
            self.progress.line(&format!("  {score}{} | {}", prompt.text, response.join(" ")));
        }
    }

    /// Records the responses of a step.
    pub fn record(
        &mut self,
        step: usize,
        answers: &Answers,
        scores: Option<&[f32]>,
        kl: Option<&[f32]>,
    ) -> Result<()> {
        let records: Vec<SampleRecord> = (0..answers.prompts.len())
            .map(|i| SampleRecord {
                step,
                prompt: &answers.prompts[i].text,
                response: &answers.responses[i],
                score: scores.map(|scores| scores[i]),
                kl: kl.map(|kl| kl[i]),
                finished: answers.generation.finished[i],
            })
            .collect();
        self.run.samples(&records)
    }

    /// Saves the weights after a training of so many steps, those of one that failed too, whose error then
    /// says so. After the last step no checkpoint is needed.
    pub fn save(
        &self,
        trained: Result<usize>,
        save: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<usize> {
        let weights = self.run.weights_dir();
        let shown = weights.display();
        let saved = save(&weights).with_context(|| format!("cannot save the weights in {shown}"));
        let ended = match &saved {
            Ok(()) => format!("the run ended early; the weights so far are in {shown}"),
            Err(error) => format!("the run ended early and left no weights ({error:#})"),
        };
        let steps = trained.context(ended)?;
        saved?;
        if steps == self.steps {
            checkpoint::remove(self.run.dir());
        }
        Ok(steps)
    }

    /// Says where everything is.
    pub fn end(&self) {
        self.progress.line(&format!(
            "{:.0} s in all; settings, metrics, samples and weights are in {}",
            self.start.elapsed().as_secs_f64(),
            self.run.dir().display()
        ));
    }
}

/// Prompts that are answered before and after a training, with the same chances.
pub struct Showcase {
    prompts: Vec<Prompt>,
    sampling: Sampling,
    seed: u64,
}

impl Showcase {
    /// The first prompts of `file`, or those of the embedded run where no model is named, or those of
    /// the examples.
    ///
    /// # Errors
    /// A file of prompts that is refused, and `--max-new-tokens` past the model's context.
    pub fn new<'a>(
        file: Option<&PathBuf>,
        Loaded { decoder, tokenizer }: &Loaded,
        embedded: bool,
        examples: impl Iterator<Item = &'a [u32]>,
        max_new_tokens: usize,
        seed: u64,
    ) -> Result<Self> {
        let context = decoder.config().max_position_embeddings;
        ensure!(
            max_new_tokens < context,
            "--max-new-tokens {max_new_tokens} does not fit the model's context of {context}"
        );
        let texts = match file {
            Some(path) => Some(prompts::read(path)?),
            None => embedded.then(embedded::prompts),
        };
        let prompts = match texts {
            Some(texts) => {
                Prompts::new(texts, tokenizer, context, max_new_tokens)?.first(SHOWN).to_vec()
            }
            None => {
                let mut prompts: Vec<&[u32]> = Vec::new();
                for ids in examples.filter(|ids| ids.len() + max_new_tokens <= context) {
                    if prompts.len() < SHOWN && !prompts.contains(&ids) {
                        prompts.push(ids);
                    }
                }
                let prompt =
                    |ids: &[u32]| Ok(Prompt { text: tokenizer.decode(ids)?, ids: ids.to_vec() });
                prompts.into_iter().map(prompt).collect::<Result<_>>()?
            }
        };
        Ok(Self { prompts, sampling: Sampling { max_new_tokens, ..Sampling::default() }, seed })
    }

    /// Answers, shows and records them as those of step `step`, 0 before the training.
    pub fn show(
        &self,
        session: &mut Session,
        step: usize,
        Loaded { decoder, tokenizer }: &Loaded,
    ) -> Result<()> {
        if self.prompts.is_empty() {
            return Ok(()); // examples too long for any answer
        }
        let mut rng = StdRng::seed_from_u64(self.seed);
        let prompts = self.prompts.clone();
        let answers =
            answer(&decoder.no_grad(), tokenizer, &self.sampling, prompts, &mut rng, &mut |_| {})?;
        session.show(if step == 0 { "before" } else { "after" }, &answers, None);
        session.record(step, &answers, None, None)
    }
}
