//! What a run shows and leaves behind.
//!
//! The run folder:
//!
//! | file | content |
//! |---|---|
//! | `config.toml` | the settings as resolved; `--config` reads them |
//! | `metrics.jsonl` | one object a step |
//! | `samples.jsonl` | one object a response |
//! | `weights/` | the trained model, written by the trainer |
//! | `checkpoint-STEP/` | what the run goes on from, until it comes to its end |
//!
//! Each line is on the disk before the next step starts. A number that is not finite is `null`, as
//! JSON has no other way to say it.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{bail, ensure, Context, Result};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use serde::Serialize;
use serde_json::{Map, Value};

use super::checkpoint::Position;
use super::config::{RunSettings, Settings};

pub(super) const CONFIG: &str = "config.toml";
const METRICS: &str = "metrics.jsonl";
const SAMPLES: &str = "samples.jsonl";
const WEIGHTS: &str = "weights";

/// The folder of a run. Dropped before anything was recorded, it takes its own empty files with it,
/// so that a run that fails at the start does not block its folder.
#[derive(Debug)]
pub struct Run {
    dir: PathBuf,
    /// The folders that did not exist before, outermost first.
    created: Vec<PathBuf>,
    metrics: File,
    samples: File,
    recorded: bool,
}

/// One line of `samples.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SampleRecord<'a> {
    /// The step that the response was sampled in, from 1; 0 before training.
    pub step: usize,
    /// The prompt's text.
    pub prompt: &'a str,
    /// The response's text.
    pub response: &'a str,
    /// The score, where there is a reward.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f32>,
    /// KL to the reference, in nats over the response, where it was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl: Option<f32>,
    /// Whether the response ended by itself.
    pub finished: bool,
}

impl Run {
    /// Makes the folder `--out`, or the next free `runs/COMMAND-N`, with the settings in it.
    ///
    /// # Errors
    /// A folder that holds a run already, or that cannot be made or written. Names `--out`.
    pub fn create<S: RunSettings>(settings: &S) -> Result<Self> {
        let config = settings.to_toml()?;
        let (dir, created) = match settings.clone().out() {
            Some(dir) => (dir.clone(), make_folder(dir)?),
            None => make_next_free(Path::new("runs"), S::COMMAND)?,
        };
        let made = Self::fill(&dir, &config);
        if made.is_err() {
            remove_folders(&created);
        }
        let (metrics, samples) = made?;
        Ok(Self { dir, created, metrics, samples, recorded: false })
    }

    /// Opens the folder of a run that is to go on from `position`.
    ///
    /// # Errors
    /// A folder that does not hold a run up to there. Names `--resume`.
    pub fn reopen(dir: &Path, position: Position) -> Result<Self> {
        let reopen = |name: &str, len: u64| -> Result<File> {
            // What was killed before it made this file starts over.
            let create = len == 0;
            let open = OpenOptions::new().create(create).append(true).open(dir.join(name));
            let file = open.with_context(|| format!("cannot write {name}"))?;
            let found = file.metadata()?.len();
            ensure!(
                found >= len,
                "{name} has {found} bytes, and the checkpoint is from after {len}"
            );
            Ok(file)
        };
        let Position { metrics_len, samples_len, .. } = position;
        let files = || anyhow::Ok((reopen(METRICS, metrics_len)?, reopen(SAMPLES, samples_len)?));
        let (metrics, samples) =
            files().with_context(|| format!("--resume {} is refused", dir.display()))?;
        Ok(Self { dir: dir.to_owned(), created: Vec::new(), metrics, samples, recorded: true })
    }

    /// Takes away what was recorded after `position`.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn cut(&mut self, position: Position) -> Result<()> {
        self.metrics.set_len(position.metrics_len)?;
        Ok(self.samples.set_len(position.samples_len)?)
    }

    /// Whether a folder holds a run of so many steps that came to its end: it has weights, and the line of
    /// its last step.
    pub fn is_complete(dir: &Path, steps: usize) -> bool {
        let metrics = fs::read_to_string(dir.join(METRICS)).unwrap_or_default();
        let last = metrics.lines().last().and_then(|line| serde_json::from_str::<Value>(line).ok());
        let step = last.and_then(|line| line["step"].as_u64());
        dir.join(WEIGHTS).exists() && step == Some(steps as u64)
    }

    /// Where the run is after a step.
    ///
    /// # Errors
    /// If its files cannot be looked at.
    pub fn position(&self, step: usize) -> Result<Position> {
        let (metrics_len, samples_len) =
            (self.metrics.metadata()?.len(), self.samples.metadata()?.len());
        Ok(Position { step, metrics_len, samples_len })
    }

    /// Makes the three files, or none.
    fn fill(dir: &Path, config: &str) -> Result<(File, File)> {
        for name in [CONFIG, METRICS, SAMPLES, WEIGHTS] {
            ensure!(
                fs::symlink_metadata(dir.join(name)).is_err(),
                "--out {} already holds a run (it has {name}); name another folder",
                dir.display()
            );
        }
        let mut made = Vec::new();
        let mut make = |name: &'static str| {
            made.push(name);
            OpenOptions::new().write(true).create_new(true).open(dir.join(name))
        };
        let files = make(CONFIG).and_then(|mut file| {
            file.write_all(config.as_bytes())?;
            Ok((make(METRICS)?, make(SAMPLES)?))
        });
        files.with_context(|| {
            // The last one is that which could not be made.
            made.pop();
            remove_files(dir, &made);
            format!("--out {} cannot be written", dir.display())
        })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The folder for the trained weights, inside the run folder; not made yet.
    pub fn weights_dir(&self) -> PathBuf {
        self.dir.join(WEIGHTS)
    }

    /// Keeps the folder from now on, though nothing is recorded yet: something else is in it.
    pub fn keep(&mut self) {
        self.recorded = true;
    }

    /// Adds one line to `metrics.jsonl`: `values` and `step`, which counts from 1.
    pub fn metrics(&mut self, step: usize, values: &Map<String, Value>) -> Result<()> {
        let mut line = Map::from_iter([("step".to_owned(), Value::from(step))]);
        line.extend(values.clone());
        self.recorded = true;
        append(&mut self.metrics, &[line])
            .with_context(|| format!("cannot write {}", self.dir.join(METRICS).display()))
    }

    /// Adds lines to `samples.jsonl`.
    pub fn samples(&mut self, records: &[SampleRecord]) -> Result<()> {
        self.recorded = true;
        append(&mut self.samples, records)
            .with_context(|| format!("cannot write {}", self.dir.join(SAMPLES).display()))
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if !self.recorded && !self.weights_dir().exists() {
            remove_files(&self.dir, &[CONFIG, METRICS, SAMPLES]);
            remove_folders(&self.created);
        }
    }
}

/// Writes whole lines in one call, so that a run that is killed leaves no half line; nor does a
/// disk that is full.
fn append(file: &mut File, records: &[impl Serialize]) -> Result<()> {
    let mut lines = Vec::new();
    for record in records {
        serde_json::to_writer(&mut lines, record)?;
        lines.push(b'\n');
    }
    let len = file.metadata()?.len();
    let written = file.write_all(&lines);
    if written.is_err() {
        let _ = file.set_len(len);
    }
    Ok(written?)
}

/// Makes `dir` and its parents; returns those that did not exist, outermost first.
fn make_folder(dir: &Path) -> Result<Vec<PathBuf>> {
    let missing = |path: &&Path| !path.as_os_str().is_empty() && !path.exists();
    let mut created: Vec<PathBuf> =
        dir.ancestors().take_while(missing).map(Path::to_path_buf).collect();
    created.reverse();
    let made = fs::create_dir_all(dir);
    if made.is_err() {
        remove_folders(&created);
    }
    made.with_context(|| format!("--out {} cannot be made", dir.display()))?;
    Ok(created)
}

/// Makes the first of `parent/name-1`, `parent/name-2`, .. that does not exist.
fn make_next_free(parent: &Path, name: &str) -> Result<(PathBuf, Vec<PathBuf>)> {
    let mut created = make_folder(parent)?;
    for n in 1_u64.. {
        let dir = parent.join(format!("{name}-{n}"));
        match fs::create_dir(&dir) {
            Ok(()) => {
                created.push(dir.clone());
                return Ok((dir, created));
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                remove_folders(&created);
                return Err(error)
                    .with_context(|| format!("--out {} cannot be made", dir.display()));
            }
        }
    }
    bail!("--out: no runs/{name}-N is free")
}

fn remove_files(dir: &Path, names: &[&str]) {
    for name in names {
        let _ = fs::remove_file(dir.join(name));
    }
}

/// Removes folders, innermost first, as far as they are empty.
fn remove_folders(outermost_first: &[PathBuf]) {
    for dir in outermost_first.iter().rev() {
        let _ = fs::remove_dir(dir);
    }
}

/// A column of the step lines.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    /// Its heading.
    pub heading: &'static str,
    /// The metric in it.
    pub metric: &'static str,
    /// Characters.
    pub width: usize,
    /// Digits behind the point.
    pub decimals: usize,
}

impl Column {
    /// A column.
    pub const fn new(
        heading: &'static str,
        metric: &'static str,
        width: usize,
        decimals: usize,
    ) -> Self {
        Self { heading, metric, width, decimals }
    }
}

/// The columns of `train`, with those of prompts held out, of groups that are compared and of a critic
/// where there are any.
pub fn train_columns(settings: &Settings) -> Vec<Column> {
    let wanted = |column: &Column| match column.metric {
        HELD_OUT => settings.eval_every > 0,
        ZERO_STD => settings.estimator().outcome().is_some(),
        VALUE_LOSS => settings.estimator().has_critic(),
        _ => true,
    };
    TRAIN_COLUMNS.into_iter().filter(wanted).collect()
}

const HELD_OUT: &str = "eval/scores";
const ZERO_STD: &str = "frac_reward_zero_std";
const VALUE_LOSS: &str = "loss/value_avg";
const TRAIN_COLUMNS: [Column; 13] = [
    Column::new("score", "objective/scores", 8, 3),
    Column::new("held out", HELD_OUT, 8, 3),
    Column::new("zero std", ZERO_STD, 8, 3),
    Column::new("kl", "objective/kl", 8, 3),
    Column::new("policy loss", "loss/policy_avg", 12, 4),
    Column::new("value loss", VALUE_LOSS, 11, 4),
    Column::new("clipped", "policy/clipfrac_avg", 8, 3),
    Column::new("entropy", "objective/entropy", 8, 3),
    Column::new("tokens/s", "perf/throughput", 9, 0),
    Column::new("rollout s", "timing_s/rollout", 10, 2),
    Column::new("experience s", "timing_s/experience", 13, 2),
    Column::new("update s", "timing_s/update", 9, 2),
    Column::new("step s", "timing_s/step", 8, 2),
];
/// Steps after which the heading is shown again.
const HEADING_EVERY: usize = 25;

/// The heading over the step lines.
pub fn heading(columns: &[Column]) -> String {
    let mut line = format!("{:>9}", "step");
    for Column { heading, width, .. } in columns {
        let _ = write!(line, " {heading:>width$}");
    }
    line
}

/// One line for a step: `step/steps`, then the columns of [`heading`]. A metric that is not finite
/// (`null`) shows as `nan`, one that is missing as `-`.
pub fn step_line(
    columns: &[Column],
    step: usize,
    steps: usize,
    values: &Map<String, Value>,
) -> String {
    let mut line = format!("{:>9}", format!("{step}/{steps}"));
    for &Column { metric, width, decimals, .. } in columns {
        let cell = match values.get(metric) {
            None => "-".to_owned(),
            Some(value) => value.as_f64().map_or("nan".to_owned(), |x| number(x, width, decimals)),
        };
        let _ = write!(line, " {cell:>width$}");
    }
    line
}

/// A number with fixed decimals, or in exponential form where that would break the column.
fn number(x: f64, width: usize, decimals: usize) -> String {
    let fixed = format!("{x:.decimals$}");
    if fixed.len() <= width {
        fixed
    } else {
        format!("{x:.1e}")
    }
}

/// Progress bars, and lines clear of them.
pub struct Progress {
    bars: MultiProgress,
    out: Mutex<Box<dyn Write + Send>>,
}

impl Progress {
    /// Bars on stderr, if that is a terminal, and lines on stdout.
    pub fn new() -> Self {
        let target = if io::stderr().is_terminal() {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        Self::to(io::stdout(), target)
    }

    /// No bars, and lines to `out`; [`io::sink`] makes a run silent.
    pub fn lines_to(out: impl Write + Send + 'static) -> Self {
        Self::to(out, ProgressDrawTarget::hidden())
    }

    fn to(out: impl Write + Send + 'static, target: ProgressDrawTarget) -> Self {
        let bars = MultiProgress::with_draw_target(target);
        Self { bars, out: Mutex::new(Box::new(out)) }
    }

    /// A bar that shows `phase`, how many of `len` `unit`s (such as "tokens") are done, their rate
    /// and the time that is left. It goes away when it is dropped.
    pub fn bar(&self, phase: &'static str, len: usize, unit: &'static str) -> Bar {
        let rate = move |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = write!(out, "{:.1} {unit}/s", state.per_sec());
        };
        let style = ProgressStyle::with_template(
            "{prefix:>10} [{bar:30}] {pos}/{len} {msg}, {rate}, {eta} left",
        )
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .with_key("rate", rate)
        .progress_chars("=> ");
        let bar = ProgressBar::new(len as u64).with_prefix(phase).with_message(unit);
        let bar = self.bars.add(bar.with_style(style));
        bar.tick();
        Bar(bar)
    }

    /// The bars: what another thread writes to the terminal goes into their `suspend`.
    pub fn bars(&self) -> MultiProgress {
        self.bars.clone()
    }

    /// Writes lines, clear of the bars. A reader that went away does not end the run.
    pub fn line(&self, text: &str) {
        self.bars.suspend(|| {
            let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = writeln!(out, "{text}").and_then(|()| out.flush());
        });
    }

    /// Lines of steps, with these columns.
    pub fn table<'a>(&'a self, columns: &'a [Column]) -> Table<'a> {
        Table { progress: self, columns, lines: 0 }
    }
}

/// Lines of steps, of [`Progress::table`].
pub struct Table<'a> {
    progress: &'a Progress,
    columns: &'a [Column],
    lines: usize,
}

impl Table<'_> {
    /// Writes the line of a step, under a heading at first and every few lines.
    pub fn step(&mut self, step: usize, steps: usize, values: &Map<String, Value>) {
        if self.lines.is_multiple_of(HEADING_EVERY) {
            self.progress.line(&heading(self.columns));
        }
        self.lines += 1;
        self.progress.line(&step_line(self.columns, step, steps, values));
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

/// A bar of [`Progress`].
#[derive(Debug)]
pub struct Bar(ProgressBar);

impl Bar {
    /// `n` more are done.
    pub fn inc(&self, n: usize) {
        self.0.inc(n as u64);
    }

    /// There is no more to do than what is done.
    pub fn complete(&self) {
        self.0.set_length(self.0.position());
    }

    /// Rate and time are counted from now on.
    pub fn restart(&self) {
        self.0.reset_elapsed();
        self.0.reset_eta();
    }

    /// How many are done.
    pub fn position(&self) -> usize {
        self.0.position() as usize
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
