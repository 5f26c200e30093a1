//! `reward`: a reward model, which is a decoder with a scalar head at the last token, learned from pairs
//! of responses of which one is preferred.
//!
//! ```text
//! loss = -ln sigmoid(score(chosen) - score(rejected) - margin)
//!        + center_coef (score(chosen) + score(rejected))²        the mean over the pairs
//! ```

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::Result;
use candle_core::{Tensor, Var};

use super::config::tuning::RewardModelSettings;
use super::config::RunSettings;
use super::embedded;
use super::examples::{self, Pair};
use super::load::{save_reward, Loaded};
use super::model::Critic;
use super::report::{Column, Progress, SampleRecord};
use super::session::{open_model, Session, SHOWN};
use super::tokenizer::Tokenizer;
use super::tuning::{self, Loss, Objective};
use crate::preference::{
    reward_model_loss, RewardModelOptions, RewardModelOutput, RewardModelTensors,
};

/// A reward model that learns to score chosen responses above rejected ones.
pub struct RewardLearner<'a> {
    /// The model.
    pub model: &'a Critic,
    /// The pairs.
    pub pairs: Vec<Pair>,
    /// Fills a batch.
    pub pad: u32,
    /// Weight of the squared sum of a pair's scores.
    pub center_coef: f64,
}

impl RewardLearner<'_> {
    /// Scores of the chosen responses, and of the rejected ones, of these pairs: f32 `[2, P]`.
    fn scores(&self, model: &Critic, rows: &[usize]) -> Result<Tensor> {
        let pairs = || rows.iter().map(|&row| &self.pairs[row]);
        let chosen = pairs().map(|pair| pair.chosen.tokens());
        let texts: Vec<Vec<u32>> =
            chosen.chain(pairs().map(|pair| pair.rejected.tokens())).collect();
        Ok(model.scores(&texts, self.pad)?.reshape((2, rows.len()))?)
    }
}

impl Objective for RewardLearner<'_> {
    fn parameters(&self) -> Vec<(String, Var)> {
        self.model.parameters()
    }

    fn constants(&self) -> Vec<(String, Tensor)> {
        self.model.constants()
    }

    fn loss(&self, rows: &[usize]) -> Result<Loss> {
        let scores = self.scores(self.model, rows)?;
        let margins: Vec<f32> =
            rows.iter().map(|&row| self.pairs[row].margin.unwrap_or(0.0) as f32).collect();
        let margins = Tensor::new(margins, scores.device())?;
        let inputs =
            RewardModelTensors { margin: Some(&margins), ..RewardModelTensors::new(&scores) };
        let options =
            RewardModelOptions { center_coef: self.center_coef, ..RewardModelOptions::default() };
        let RewardModelOutput { loss, stats, .. } = reward_model_loss(&inputs, &options)?;
        let stats = stats.to_host()?;
        let metrics = vec![
            ("accuracy", stats.accuracy),
            ("margin", stats.reward_margin),
            ("score", (stats.chosen_reward + stats.rejected_reward) / 2.0),
        ];
        Ok(Loss { loss, count: rows.len(), metrics })
    }
}

const COLUMNS: [Column; 7] = [
    Column::new("loss", "loss", 8, 4),
    Column::new("accuracy", "accuracy", 9, 3),
    Column::new("held out", "eval/loss", 9, 4),
    Column::new("accuracy", "eval/accuracy", 9, 3),
    Column::new("margin", "eval/margin", 8, 3),
    Column::new("grad norm", "grad_norm", 10, 3),
    Column::new("step s", "timing_s/step", 8, 2),
];

/// Trains as the settings say; ends and fails as [`super::train::run`] does.
pub fn run(settings: &RewardModelSettings, stop: &AtomicBool, progress: &Progress) -> Result<()> {
    let start = Instant::now();
    settings.validate()?;
    let preferences = match &settings.preferences {
        Some(path) => examples::read_preferences(path)?,
        None => embedded::preferences(),
    };
    let device = settings.device.open()?;
    let Loaded { decoder, tokenizer } =
        open_model(settings.model.as_deref(), settings.seed, &device)?;
    let context = decoder.config().max_position_embeddings;
    let pairs = examples::encode_preferences(&preferences, &tokenizer, context)?;
    let tuning = settings.tuning();
    let rows = tuning::split(pairs.len(), tuning.held_out, tuning.seed)?;
    let Some(mut session) = Session::begin(settings, progress, stop, start)? else {
        return Ok(());
    };
    session.describe("backbone", &decoder);
    if settings.model.is_none() {
        session.fit(&decoder, &tokenizer, settings.lm_steps, settings.seed)?;
    }

    let mut model = Critic::new(decoder, settings.seed)?;
    if let Some(lora) = settings.lora() {
        model = model.with_lora(lora, settings.seed)?;
    }
    let (pad, center_coef) = (tokenizer.pad(), settings.center_coef);
    let learner = RewardLearner { model: &model, pairs, pad, center_coef };
    let trained = tuning::train(&learner, &rows, &tuning, &COLUMNS, &mut session);
    let steps = session.save(trained, |weights| save_reward(weights, &model, &tokenizer))?;
    let (learned, held_out) = rows;
    let shown = if held_out.is_empty() { learned } else { held_out };
    show(&learner, &shown[..SHOWN.min(shown.len())], steps, &tokenizer, &mut session)?;
    session.end();
    Ok(())
}

/// Shows and records the scores of pairs, the chosen response above the rejected one.
fn show(
    learner: &RewardLearner,
    rows: &[usize],
    step: usize,
    tokenizer: &Tokenizer,
    session: &mut Session,
) -> Result<()> {
    session
        .progress
        .line("pairs after training (score, prompt | response), chosen above rejected:");
    let scores = learner.scores(&learner.model.no_grad(), rows)?.to_vec2::<f32>()?;
    for (i, &row) in rows.iter().enumerate() {
        let pair = &learner.pairs[row];
        let prompt = tokenizer.decode(&pair.chosen.prompt)?;
        for (response, score) in [(&pair.chosen, scores[0][i]), (&pair.rejected, scores[1][i])] {
            let response = tokenizer.decode(&response.response)?;
            session.progress.line(&format!("  {score:+.2}  {prompt} | {}", response.trim()));
            let (prompt, response) = (prompt.as_str(), response.as_str());
            let score = Some(score);
            session.run.samples(&[SampleRecord {
                step,
                prompt,
                response,
                score,
                kl: None,
                finished: true,
            }])?;
        }
    }
    Ok(())
}
