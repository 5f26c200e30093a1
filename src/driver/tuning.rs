//! Training on examples: gradient steps on the loss of a few at a time, and a look at those held out.

use std::time::Instant;

use anyhow::{ensure, Context, Result};
use candle_core::{Tensor, Var};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::SeedableRng;
use rand_chacha::ChaCha12Rng;
use serde::{Deserialize, Serialize};
use serde_json::{json, Map, Value};

use super::checkpoint::{prefixed, Fingerprint, Resumable, Tensors};
use super::config::tuning::Tuning;
use super::config::LrScheduleKind;
use super::model::Decoder;
use super::optim::{Optimizer, Schedule};
use super::report::Column;
use super::session::Session;

/// Something that is learned from examples.
pub trait Objective {
    /// The parameters that learn.
    fn parameters(&self) -> Vec<(String, Var)>;

    /// The loss of these examples.
    fn loss(&self, rows: &[usize]) -> Result<Loss>;

    /// The network that the learned one is held against, if there is one.
    fn reference(&self) -> Option<&Decoder> {
        None
    }

    /// Weights that the parameters adapt and that never change.
    fn constants(&self) -> Vec<(String, Tensor)> {
        Vec::new()
    }
}

/// The loss of some examples.
pub struct Loss {
    /// The mean loss, with its graph: f32, a scalar.
    pub loss: Tensor,
    /// The number of elements that the mean is over, tokens for instance.
    pub count: usize,
    /// Further means over the same, by name.
    pub metrics: Vec<(&'static str, f64)>,
}

/// The results of an optimiser step.
pub struct Learned {
    /// Steps so far.
    pub step: usize,
    /// Whether nothing was changed, as the loss or the gradient was not finite.
    pub skipped: bool,
    /// The metrics of the step.
    pub metrics: Map<String, Value>,
}

/// A training on examples: they come in random order, each once before any comes again.
pub struct Course<'a, O> {
    objective: &'a O,
    rows: &'a [usize],
    tuning: &'a Tuning,
    optimizer: Optimizer,
    rng: ChaCha12Rng,
    /// The examples that are left before all come again.
    left: Vec<usize>,
    step: usize,
    fingerprint: Fingerprint,
}

/// The checkpoint of a training on examples, besides tensors.
#[derive(Debug, Serialize, Deserialize)]
pub struct CourseState {
    rng: ChaCha12Rng,
    left: Vec<usize>,
    step: usize,
    optimizer_steps: usize,
    /// How many examples are learned from.
    examples: usize,
    /// The fingerprint of the weights that the learned ones are held against or adapt, which are not saved.
    reference: u64,
}

impl<'a, O: Objective> Course<'a, O> {
    /// The course from its beginning.
    pub fn new(objective: &'a O, rows: &'a [usize], tuning: &'a Tuning) -> Result<Self> {
        let parameters = objective.parameters();
        Ok(Self {
            objective,
            rows,
            tuning,
            optimizer: Optimizer::new(&parameters, tuning.weight_decay, tuning.max_grad_norm)?,
            rng: ChaCha12Rng::seed_from_u64(tuning.seed),
            left: Vec::new(),
            step: 0,
            fingerprint: Fingerprint::default(),
        })
    }

    /// The next optimiser step.
    pub fn step(&mut self) -> Result<Learned> {
        let start = Instant::now();
        let tuning = self.tuning;
        let schedule = Schedule {
            peak: tuning.learning_rate,
            warmup: tuning.warmup_steps,
            total: tuning.steps,
            decay: tuning.lr_schedule == LrScheduleKind::Linear,
        };
        let learning_rate = schedule.at(self.step);
        self.step += 1;
        let batch_size = tuning.batch_size.min(self.rows.len());
        if self.left.len() < batch_size {
            self.left = self.rows.to_vec();
            self.left.shuffle(&mut self.rng);
        }
        let batch: Vec<usize> = self.left.drain(..batch_size).collect();
        let learned = step_on(self.objective, &batch, &mut self.optimizer, learning_rate);
        let (norm, mut metrics) = learned.with_context(|| format!("step {}", self.step))?;
        for (name, value) in [
            ("grad_norm", json!(norm)),
            ("lr", json!(learning_rate)),
            ("update/skipped", json!(usize::from(norm.is_none()))),
            ("timing_s/step", json!(start.elapsed().as_secs_f64())),
        ] {
            metrics.insert(name.into(), value);
        }
        Ok(Learned { step: self.step, skipped: norm.is_none(), metrics })
    }

    /// All weights that never change.
    fn unsaved(&self) -> Vec<(String, Tensor)> {
        let mut unsaved = self.objective.constants();
        unsaved.extend(self.objective.reference().into_iter().flat_map(Decoder::tensors));
        unsaved
    }
}

impl<O: Objective> Resumable for Course<'_, O> {
    type State = CourseState;

    fn tensors(&self) -> Vec<(String, Tensor)> {
        let parameters = self.objective.parameters();
        prefixed("model.", &parameters).chain(self.optimizer.tensors("optimizer.")).collect()
    }

    fn state(&self) -> Result<CourseState> {
        Ok(CourseState {
            rng: self.rng.clone(),
            left: self.left.clone(),
            step: self.step,
            optimizer_steps: self.optimizer.steps(),
            examples: self.rows.len(),
            reference: self.fingerprint.of(|| self.unsaved())?,
        })
    }

    fn restore(&mut self, state: CourseState, tensors: &Tensors) -> Result<()> {
        ensure!(
            state.examples == self.rows.len(),
            "there are {} examples to learn from, and were {}",
            self.rows.len(),
            state.examples
        );
        self.fingerprint.check(state.reference, || self.unsaved())?;
        tensors.set("model.", &self.objective.parameters())?;
        self.optimizer.restore("optimizer.", state.optimizer_steps, tensors)?;
        (self.rng, self.left, self.step) = (state.rng, state.left, state.step);
        Ok(())
    }
}

/// Learns from `rows` as long as `on_step` says so.
pub fn learn(
    objective: &impl Objective,
    rows: &[usize],
    tuning: &Tuning,
    mut on_step: impl FnMut(Learned) -> Result<bool>,
) -> Result<()> {
    let mut course = Course::new(objective, rows, tuning)?;
    while course.step < tuning.steps && on_step(course.step()?)? {}
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
pub fn split(len: usize, share: f64, seed: u64) -> Result<(Vec<usize>, Vec<usize>)> {
    let mut rows: Vec<usize> = (0..len).collect();
    rows.shuffle(&mut StdRng::seed_from_u64(seed));
    let held_out = rows.split_off(len - (share * len as f64).round() as usize);
    ensure!(
        !rows.is_empty(),
        "--held-out is {share}, which leaves none of {len} examples to learn from"
    );
    Ok((rows, held_out))
}

/// Whether what is held out is measured after a step: the first, the last, and one of so many.
pub fn measures(step: usize, steps: usize, every: usize) -> bool {
    step == 1 || step == steps || step.is_multiple_of(every)
}

/// The whole training, with bar, lines, metrics and checkpoints, until it is over or the run is stopped; the
/// steps that were made.
pub fn train(
    objective: &impl Objective,
    (rows, held_out): &(Vec<usize>, Vec<usize>),
    tuning: &Tuning,
    columns: &[Column],
    session: &mut Session,
) -> Result<usize> {
    let steps = tuning.steps;
    let progress = session.progress;
    let mut course = Course::new(objective, rows, tuning)?;
    session.restore(&mut course)?;
    let bar = progress.bar("training", steps, "steps");
    bar.inc(course.step);
    let mut table = progress.table(columns);
    let mut skipped = 0;
    while !session.ends_at(course.step, &course)? {
        let Learned { step, skipped: now, mut metrics } = course.step()?;
        bar.inc(1);
        let shown = measures(step, steps, tuning.eval_every);
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
    }
    Ok(course.step)
}
