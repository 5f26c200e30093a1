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
    /// Scores of the chosen responses and of the rejected ones of these pairs, f32 `[P]` each.
    fn scores(&self, model: &Critic, rows: &[usize]) -> Result<(Tensor, Tensor)> {
        let pairs = || rows.iter().map(|&row| &self.pairs[row]);
        let chosen = pairs().map(|pair| pair.chosen.tokens());
        let texts: Vec<Vec<u32>> =
            chosen.chain(pairs().map(|pair| pair.rejected.tokens())).collect();
        let scores = model.scores(&texts, self.pad)?;
        Ok((scores.narrow(0, 0, rows.len())?, scores.narrow(0, rows.len(), rows.len())?))
    }
}

impl Objective for RewardLearner<'_> {
    fn parameters(&self) -> Vec<(String, Var)> {
        self.model.parameters()
    }

    fn loss(&self, rows: &[usize]) -> Result<Loss> {
        let (chosen, rejected) = self.scores(self.model, rows)?;
        let margins: Vec<f32> =
            rows.iter().map(|&row| self.pairs[row].margin.unwrap_or(0.0) as f32).collect();
        let margins = Tensor::new(margins, chosen.device())?;
        let loss = pairwise_loss(&chosen, &rejected, &margins, self.center_coef)?;
        let gaps: Vec<f32> = (&chosen - &rejected)?.to_vec1()?;
        let count = rows.len();
        let right = gaps.iter().filter(|&&gap| gap > 0.0).count();
        let gap = gaps.iter().map(|&gap| f64::from(gap)).sum::<f64>() / count as f64;
        let score =
            f64::from(((chosen.mean_all()? + rejected.mean_all()?)? * 0.5)?.to_scalar::<f32>()?);
        let metrics =
            vec![("accuracy", right as f64 / count as f64), ("margin", gap), ("score", score)];
        Ok(Loss { loss, count, metrics })
    }
}

/// The mean of -ln sigmoid(chosen - rejected - margins) + center_coef (chosen + rejected)², of f32
/// `[P]` each.
pub fn pairwise_loss(
    chosen: &Tensor,
    rejected: &Tensor,
    margins: &Tensor,
    center_coef: f64,
) -> Result<Tensor> {
    let logistic = logistic_loss(&((chosen - rejected)? - margins)?, 0.0)?;
    let centred = ((chosen + rejected)?.sqr()? * center_coef)?;
    Ok((logistic + centred)?.mean_all()?)
}

/// -(1 - smoothing) ln sigmoid(x) - smoothing ln sigmoid(-x), elementwise.
pub(super) fn logistic_loss(x: &Tensor, smoothing: f64) -> Result<Tensor> {
    // max(-x, 0) + ln(1 + e^-|x|) overflows for no x; and ln sigmoid(-x) = ln sigmoid(x) - x.
    let loss = (x.neg()?.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
    Ok((loss + (x * smoothing)?)?)
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
    let rows = tuning::split(pairs.len(), &tuning)?;
    let Some(mut session) = Session::begin(settings, progress, stop, start)? else {
        return Ok(());
    };
    session.describe("backbone", &decoder);
    if settings.model.is_none() {
        session.fit(&decoder, &tokenizer, settings.lm_steps, settings.seed)?;
    }

    let model = Critic::new(decoder, settings.seed)?;
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
    let (chosen, rejected) = learner.scores(&learner.model.no_grad(), rows)?;
    let (chosen, rejected) = (chosen.to_vec1::<f32>()?, rejected.to_vec1::<f32>()?);
    for (i, &row) in rows.iter().enumerate() {
        let pair = &learner.pairs[row];
        let prompt = tokenizer.decode(&pair.chosen.prompt)?;
        for (response, score) in [(&pair.chosen, chosen[i]), (&pair.rejected, rejected[i])] {
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
