//! `dpo`: direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), a policy learned from
//! preferences without a reward model and without sampling.
//!
//! ```text
//! reward = beta (ln p(response) - ln p_reference(response))
//! h      = reward(chosen) - reward(rejected)
//! loss   = -(1 - label_smoothing) ln sigmoid(h) - label_smoothing ln sigmoid(-h)     the mean over pairs
//! ```
//!
//! The reference is the model as it was before the run.

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::Result;
use candle_core::Var;

use super::config::tuning::DpoSettings;
use super::config::RunSettings;
use super::embedded;
use super::examples::{self, Example, Pair};
use super::experience::mean;
use super::load::{save, Loaded};
use super::model::Decoder;
use super::report::{Column, Progress};
use super::reward_model::logistic_loss;
use super::sequences::Sequences;
use super::session::{open_model, Session, Showcase};
use super::tuning::{self, Loss, Objective};

/// A policy that learns to prefer chosen responses to rejected ones.
pub struct Dpo<'a> {
    /// The policy.
    pub policy: &'a Decoder,
    /// What it starts from; does not learn.
    pub reference: Decoder,
    /// The pairs.
    pub pairs: Vec<Pair>,
    /// Fills a batch.
    pub pad: u32,
    /// Weight of the log-ratios.
    pub beta: f64,
    /// Share of the pairs that are taken to be the wrong way round.
    pub label_smoothing: f64,
}

impl Objective for Dpo<'_> {
    fn parameters(&self) -> Vec<(String, Var)> {
        self.policy.parameters()
    }

    fn loss(&self, rows: &[usize]) -> Result<Loss> {
        let count = rows.len();
        let pairs = || rows.iter().map(|&row| &self.pairs[row]);
        let chosen = pairs().map(|pair| &pair.chosen);
        let examples: Vec<&Example> = chosen.chain(pairs().map(|pair| &pair.rejected)).collect();
        let sequences = Sequences::of(&examples, self.pad, self.policy.device())?;
        let logp = sequences.logp(self.policy)?.sum(1)?;
        let ref_logp = sequences.logp(&self.reference)?.sum(1)?;

        let rewards = ((&logp - ref_logp)? * self.beta)?;
        let (chosen, rejected) = (rewards.narrow(0, 0, count)?, rewards.narrow(0, count, count)?);
        let loss = logistic_loss(&(&chosen - &rejected)?, self.label_smoothing)?.mean_all()?;

        let (chosen, rejected) = (chosen.to_vec1::<f32>()?, rejected.to_vec1::<f32>()?);
        let right = chosen.iter().zip(&rejected).filter(|(chosen, rejected)| chosen > rejected);
        let logp: Vec<f32> = logp.to_vec1()?;
        let metrics = vec![
            ("accuracy", right.count() as f64 / count as f64),
            ("margin", mean(&chosen) - mean(&rejected)),
            ("rewards/chosen", mean(&chosen)),
            ("rewards/rejected", mean(&rejected)),
            ("logp/chosen", mean(&logp[..count])),
            ("logp/rejected", mean(&logp[count..])),
        ];
        Ok(Loss { loss, count, metrics })
    }
}

const COLUMNS: [Column; 8] = [
    Column::new("loss", "loss", 8, 4),
    Column::new("accuracy", "accuracy", 9, 3),
    Column::new("held out", "eval/loss", 9, 4),
    Column::new("accuracy", "eval/accuracy", 9, 3),
    Column::new("margin", "eval/margin", 8, 3),
    Column::new("logp chosen", "eval/logp/chosen", 12, 2),
    Column::new("grad norm", "grad_norm", 10, 3),
    Column::new("step s", "timing_s/step", 8, 2),
];

/// Trains as the settings say; ends and fails as [`super::train::run`] does.
pub fn run(settings: &DpoSettings, stop: &AtomicBool, progress: &Progress) -> Result<()> {
    let start = Instant::now();
    settings.validate()?;
    let preferences = match &settings.preferences {
        Some(path) => examples::read_preferences(path)?,
        None => embedded::preferences(),
    };
    let device = settings.device.open()?;
    let model = open_model(settings.model.as_deref(), settings.seed, &device)?;
    let Loaded { decoder, tokenizer } = &model;
    let context = decoder.config().max_position_embeddings;
    let pairs = examples::encode_preferences(&preferences, tokenizer, context)?;
    let tuning = settings.tuning();
    let rows = tuning::split(pairs.len(), &tuning)?;
    let showcase = Showcase::new(
        settings.prompts.as_ref(),
        &model,
        settings.model.is_none(),
        pairs.iter().map(|pair| pair.chosen.prompt.as_slice()),
        settings.max_new_tokens,
        settings.seed,
    )?;
    let Some(mut session) = Session::begin(settings, progress, stop, start)? else {
        return Ok(());
    };
    session.describe("policy", decoder);
    if settings.model.is_none() {
        session.fit(decoder, tokenizer, settings.lm_steps, settings.seed)?;
    }
    showcase.show(&mut session, 0, &model)?;
    let dpo = Dpo {
        policy: decoder,
        reference: decoder.frozen()?,
        pairs,
        pad: tokenizer.pad(),
        beta: settings.beta,
        label_smoothing: settings.label_smoothing,
    };
    let trained = tuning::train(&dpo, &rows, &tuning, &COLUMNS, &mut session);
    let steps = session.save(trained, |weights| save(weights, decoder, tokenizer))?;
    showcase.show(&mut session, steps, &model)?;
    session.end();
    Ok(())
}
