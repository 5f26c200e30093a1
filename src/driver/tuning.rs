//! Training on examples: gradient steps on the loss of a few at a time, and a look at those held out.

use std::time::Instant;

use anyhow::{ensure, Context, Result};
use candle_core::{Tensor, Var};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::SeedableRng;
use serde_json::{json, Map, Value};

use super::config::tuning::Tuning;
use super::config::LrScheduleKind;
use super::optim::{Optimizer, Schedule};
use super::report::Column;
use super::session::Session;

/// Something that is learned from examples.
pub trait Objective {
    /// The parameters that learn.
    fn parameters(&self) -> Vec<(String, Var)>;

    /// The loss of these examples.
    fn loss(&self, rows: &[usize]) -> Result<Loss>;
}

/// The loss of some examples.
pub struct Loss {
    /// The mean loss, with its graph: f32, a scalar.
    pub loss: Tensor,
    /// What the mean is over: how many tokens, say.
    pub count: usize,
    /// Further means over the same, by name.
    pub metrics: Vec<(&'static str, f64)>,
}

/// What an optimiser step did.
pub struct Learned {
    /// Steps so far.
    pub step: usize,
    /// Whether nothing was changed, as the loss or the gradient was not finite.
    pub skipped: bool,
    /// The metrics of the step.
    pub metrics: Map<String, Value>,
}

/// Learns from `rows` in random order, each once before any comes again. `on_step` answers whether to
/// go on.
pub fn learn(
    objective: &impl Objective,
    rows: &[usize],
    tuning: &Tuning,
    mut on_step: impl FnMut(Learned) -> Result<bool>,
) -> Result<()> {
    let schedule = Schedule {
        peak: tuning.learning_rate,
        warmup: tuning.warmup_steps,
        total: tuning.steps,
        decay: tuning.lr_schedule == LrScheduleKind::Linear,
    };
    let mut optimizer =
        Optimizer::new(&objective.parameters(), tuning.weight_decay, tuning.max_grad_norm)?;
    let mut rng = StdRng::seed_from_u64(tuning.seed);
    let batch_size = tuning.batch_size.min(rows.len());
    let mut order: Vec<usize> = Vec::new();
    for step in 1..=tuning.steps {
        let start = Instant::now();
        if order.len() < batch_size {
            order = rows.to_vec();
            order.shuffle(&mut rng);
        }
        let batch: Vec<usize> = order.drain(..batch_size).collect();
        let learning_rate = schedule.at(step - 1);
        let learned = step_on(objective, &batch, &mut optimizer, learning_rate);
        let (norm, mut metrics) = learned.with_context(|| format!("step {step}"))?;
        for (name, value) in [
            ("grad_norm", json!(norm)),
            ("lr", json!(learning_rate)),
            ("update/skipped", json!(usize::from(norm.is_none()))),
            ("timing_s/step", json!(start.elapsed().as_secs_f64())),
        ] {
            metrics.insert(name.into(), value);
        }
        if !on_step(Learned { step, skipped: norm.is_none(), metrics })? {
            break;
        }
    }
    Ok(())
}

/// One optimiser step; the norm of its gradient, if it was finite and applied.
fn step_on(
    objective: &impl Objective,
    batch: &[usize],
    optimizer: &mut Optimizer,
    learning_rate: f64,
) -> Result<(Option<f64>, Map<String, Value>)> {
    let Loss { loss, metrics, .. } = objective.loss(batch)?;
    let value = f64::from(loss.to_scalar::<f32>()?);
    let all = named("", [("loss", value)].into_iter().chain(metrics));
    if !value.is_finite() {
        return Ok((None, all));
    }
    let mut grads = loss.backward()?;
    drop(loss); // and with it the graph, before the optimiser's temporaries are made
    let norm = optimizer.grad_norm(&grads)?;
    if !norm.is_finite() {
        return Ok((None, all));
    }
    optimizer.apply(&mut grads, norm, learning_rate)?;
    Ok((Some(norm), all))
}

/// The loss and the other metrics over `rows`, a few at a time; names start with `eval/`. Nothing for
/// no rows.
pub fn evaluate(
    objective: &impl Objective,
    rows: &[usize],
    batch_size: usize,
) -> Result<Map<String, Value>> {
    let mut sums: Vec<(&str, f64)> = Vec::new();
    let mut total = 0.0;
    for rows in rows.chunks(batch_size) {
        let Loss { loss, count, metrics } = objective.loss(rows)?;
        let count = count as f64;
        total += count;
        let loss = f64::from(loss.to_scalar::<f32>()?);
        let means: Vec<_> = [("loss", loss)].into_iter().chain(metrics).collect();
        if sums.is_empty() {
            sums = means.iter().map(|&(name, _)| (name, 0.0)).collect();
        }
        for ((_, sum), (_, mean)) in sums.iter_mut().zip(means) {
            *sum += count * mean;
        }
    }
    Ok(named("eval/", sums.into_iter().map(|(name, sum)| (name, sum / total))))
}

fn named<'a>(prefix: &str, values: impl IntoIterator<Item = (&'a str, f64)>) -> Map<String, Value> {
    values.into_iter().map(|(name, value)| (format!("{prefix}{name}"), json!(value))).collect()
}

/// The examples to learn from, and those held out: a share of them, drawn by the seed.
///
/// # Errors
/// If nothing is left to learn from; names `--held-out`.
pub fn split(len: usize, tuning: &Tuning) -> Result<(Vec<usize>, Vec<usize>)> {
    let mut rows: Vec<usize> = (0..len).collect();
    rows.shuffle(&mut StdRng::seed_from_u64(tuning.seed));
    let held_out = rows.split_off(len - (tuning.held_out * len as f64).round() as usize);
    ensure!(
        !rows.is_empty(),
        "--held-out is {}, which leaves none of {len} examples to learn from",
        tuning.held_out
    );
    Ok((rows, held_out))
}

/// The whole training, with bar, lines and metrics, until it is over or the run is stopped; the steps
/// that were made.
pub fn train(
    objective: &impl Objective,
    (rows, held_out): &(Vec<usize>, Vec<usize>),
    tuning: &Tuning,
    columns: &[Column],
    session: &mut Session,
) -> Result<usize> {
    let steps = tuning.steps;
    let progress = session.progress;
    let bar = progress.bar("training", steps, "steps");
    let mut table = progress.table(columns);
    let (mut done, mut skipped) = (0, 0);
    learn(objective, rows, tuning, |learned| {
        bar.inc(1);
        let Learned { step, skipped: now, mut metrics } = learned;
        done = step;
        let shown = step == 1 || step == steps || step.is_multiple_of(tuning.eval_every);
        if shown {
            metrics.extend(evaluate(objective, held_out, tuning.batch_size)?);
        }
        session.run.metrics(step, &metrics)?;
        if shown {
            table.step(step, steps, &metrics);
        }
        if now {
            skipped += 1;
            progress.line(&format!(
                "step {step} skipped, as its loss or gradient was not finite; {skipped} in this run"
            ));
        }
        let stopped = step < steps && session.stopped();
        if stopped {
            progress.line(&format!("stopped after {step} of {steps} steps"));
        }
        Ok(!stopped)
    })?;
    Ok(done)
}
