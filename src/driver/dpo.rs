//! `dpo`: direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and its family, a policy
//! learned from preferences without a reward model and without sampling. The losses are those of
//! [`crate::preference`]; their reference is the model as it was before the run.

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::Result;
use candle_core::Var;

use super::config::tuning::DpoSettings;
use super::config::RunSettings;
use super::embedded;
use super::examples::{self, Example, Pair};
use super::load::{check_adapter_base, save_trained, Loaded};
use super::model::Decoder;
use super::report::{Column, Progress};
use super::sequences::Sequences;
use super::session::{open_model, Session, Showcase};
use super::tuning::{self, Loss, Objective};
use crate::preference::{preference_loss, PreferenceInputs, PreferenceOptions, PreferenceOutput};

/// A policy that learns to prefer chosen responses to rejected ones.
pub struct Dpo<'a> {
    /// The policy.
    pub policy: &'a Decoder,
    /// The policy before the run, if the loss has a reference; does not learn.
    pub reference: Option<Decoder>,
    /// The pairs.
    pub pairs: Vec<Pair>,
    /// Fills a batch.
    pub pad: u32,
    /// The loss.
    pub options: PreferenceOptions,
}

impl Objective for Dpo<'_> {
    fn parameters(&self) -> Vec<(String, Var)> {
        self.policy.parameters()
    }

    fn reference(&self) -> Option<&Decoder> {
        self.reference.as_ref()
    }

    fn loss(&self, rows: &[usize]) -> Result<Loss> {
        let count = rows.len();
        let pairs = || rows.iter().map(|&row| &self.pairs[row]);
        let chosen = pairs().map(|pair| &pair.chosen);
        let examples: Vec<&Example> = chosen.chain(pairs().map(|pair| &pair.rejected)).collect();
        let sequences = Sequences::of(&examples, self.pad, self.policy.device())?;
        let logp = sequences.logp(self.policy)?;
        let reference = self.reference.as_ref();
        let ref_logp = reference.map(|reference| sequences.logp(reference)).transpose()?;
        let offsets = sequences.offsets()?;
        let inputs = PreferenceInputs {
            ref_logp: ref_logp.as_ref(),
            offsets: Some(&offsets),
            ..PreferenceInputs::new(&logp)
        };
        let PreferenceOutput { loss, stats, .. } = preference_loss(&inputs, &self.options)?;
        let stats = stats.to_host()?;
        let metrics = vec![
            ("accuracy", stats.accuracy),
            ("margin", stats.reward_margin),
            ("rewards/chosen", stats.chosen_reward),
            ("rewards/rejected", stats.rejected_reward),
            ("logp/chosen", stats.chosen_logp),
            ("logp/rejected", stats.rejected_logp),
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
    check_adapter_base(settings.adapter_base())?;
    let preferences = match &settings.preferences {
        Some(path) => examples::read_preferences(path)?,
        None => embedded::preferences(),
    };
    let device = settings.device.open()?;
    let model = open_model(settings.model.as_deref(), settings.seed, &device)?;
    let context = model.decoder.config().max_position_embeddings;
    let pairs = examples::encode_preferences(&preferences, &model.tokenizer, context)?;
    let tuning = settings.tuning();
    let rows = tuning::split(pairs.len(), tuning.held_out, tuning.seed)?;
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
    session.describe("policy", &model.decoder);
    if settings.model.is_none() {
        session.fit(&model.decoder, &model.tokenizer, settings.lm_steps, settings.seed)?;
    }
    let model = model.with_lora(settings.lora(), settings.seed)?;
    let Loaded { decoder, tokenizer } = &model;
    if !session.goes_on() {
        showcase.show(&mut session, 0, &model)?;
    }
    let dpo = Dpo {
        policy: decoder,
        reference: match settings.loss.is_reference_free() {
            true => None,
            false => Some(decoder.frozen()?),
        },
        pairs,
        pad: tokenizer.pad(),
        options: settings.options(),
    };
    let trained = tuning::train(&dpo, &rows, &tuning, &COLUMNS, &mut session);
    let steps = session.save(trained, |weights| {
        save_trained(weights, decoder, tokenizer, settings.adapter_base())
    })?;
    showcase.show(&mut session, steps, &model)?;
    session.end();
    Ok(())
}
