//! `sft`: language modelling on demonstrations. The loss is the mean of -log p over the tokens of the
//! responses; what is given, the prompts, is not learned.

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Tensor, Var};

use super::config::tuning::SftSettings;
use super::config::RunSettings;
use super::embedded;
use super::examples::{self, Example};
use super::load::{check_adapter_base, save_trained, Loaded};
use super::model::Decoder;
use super::report::{Column, Progress};
use super::sequences::Sequences;
use super::session::{open_model, Session, Showcase};
use super::tuning::{self, Loss, Objective};

/// A decoder that learns to respond as in the demonstrations.
pub struct Sft<'a> {
    /// The decoder.
    pub decoder: &'a Decoder,
    /// The demonstrations.
    pub examples: Vec<Example>,
    /// Fills a batch.
    pub pad: u32,
}

impl Objective for Sft<'_> {
    fn parameters(&self) -> Vec<(String, Var)> {
        self.decoder.parameters()
    }

    fn constants(&self) -> Vec<(String, Tensor)> {
        self.decoder.constants()
    }

    fn loss(&self, rows: &[usize]) -> Result<Loss> {
        let examples: Vec<&Example> = rows.iter().map(|&row| &self.examples[row]).collect();
        let sequences = Sequences::of(&examples, self.pad, self.decoder.device())?;
        let count = sequences.count_tokens();
        let logp = sequences.logp(self.decoder)?;
        let loss = (logp.sum_all()? * (-1.0 / count as f64))?.to_dtype(DType::F32)?;
        Ok(Loss { loss, count, metrics: Vec::new() })
    }
}

const COLUMNS: [Column; 4] = [
    Column::new("loss", "loss", 8, 4),
    Column::new("held out", "eval/loss", 9, 4),
    Column::new("grad norm", "grad_norm", 10, 3),
    Column::new("step s", "timing_s/step", 8, 2),
];

/// Trains as the settings say; ends and fails as [`super::train::run`] does.
pub fn run(settings: &SftSettings, stop: &AtomicBool, progress: &Progress) -> Result<()> {
    let start = Instant::now();
    settings.validate()?;
    check_adapter_base(settings.adapter_base())?;
    let demonstrations = match &settings.demonstrations {
        Some(path) => examples::read_demonstrations(path)?,
        None => embedded::demonstrations(),
    };
    let device = settings.device.open()?;
    let model = open_model(settings.model.as_deref(), settings.seed, &device)?;
    let context = model.decoder.config().max_position_embeddings;
    let examples = examples::encode_demonstrations(&demonstrations, &model.tokenizer, context)?;
    let tuning = settings.tuning();
    let rows = tuning::split(examples.len(), tuning.held_out, tuning.seed)?;
    let showcase = Showcase::new(
        settings.prompts.as_ref(),
        &model,
        settings.model.is_none(),
        examples.iter().map(|example| example.prompt.as_slice()),
        settings.max_new_tokens,
        settings.seed,
    )?;
    let Some(mut session) = Session::begin(settings, progress, stop, start)? else {
        return Ok(());
    };
    session.describe("model", &model.decoder);
    let model = model.with_lora(settings.lora(), settings.seed)?;
    let Loaded { decoder, tokenizer } = &model;
    if !session.goes_on() {
        showcase.show(&mut session, 0, &model)?;
    }
    let sft = Sft { decoder, examples, pad: tokenizer.pad() };
    let trained = tuning::train(&sft, &rows, &tuning, &COLUMNS, &mut session);
    let steps = session.save(trained, |weights| {
        save_trained(weights, decoder, tokenizer, settings.adapter_base())
    })?;
    showcase.show(&mut session, steps, &model)?;
    session.end();
    Ok(())
}
