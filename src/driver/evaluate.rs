//! `generate` and `eval`: answers of saved models and their scores, several models side by side.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use candle_core::Device;
use clap::Args;
use rand::rngs::StdRng;
use rand::SeedableRng;
use serde::Serialize;

use super::config::tuning::SftSettings;
use super::config::{count, seed, utf8_path, DeviceName, RewardKind, RunSettings, Settings};
use super::embedded;
use super::generate::Sampling;
use super::load::{load, Loaded};
use super::model::Decoder;
use super::prompts;
use super::report::Progress;
use super::reward::{self, weighted_sum, Reward};
use super::rollout::{answer, Answers, Prompt, Prompts};
use super::sequences::Sequences;
use super::session::fit;
use super::tokenizer::Tokenizer;

/// Prompts answered at a time, which bounds the memory of keys and values.
const CHUNK: usize = 64;

/// The command line of `generate`.
#[derive(Debug, Clone, Args)]
#[command(allow_negative_numbers = true)]
pub struct GenerateArgs {
    /// Model that answers: a Hugging Face folder or a GGUF file. Named twice or more, the answers of
    /// all of them stand side by side. Without it, the small embedded model, fitted first
    #[arg(long = "model", value_name = "PATH", value_parser = utf8_path)]
    pub models: Vec<PathBuf>,

    /// Prompts, a file as in `train` [default: those of the embedded run]
    #[arg(long, value_name = "FILE", value_parser = utf8_path)]
    pub prompts: Option<PathBuf>,

    /// Answer the first N prompts only
    #[arg(long, value_name = "N", value_parser = count)]
    pub limit: Option<usize>,

    /// Longest response, in tokens
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 24)]
    pub max_new_tokens: usize,

    /// Sampling temperature; 0 takes the likeliest token
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub temperature: f64,

    /// Sample from the K most likely tokens; 0 means all
    #[arg(long, value_name = "K", value_parser = count, default_value_t = 0)]
    pub top_k: usize,

    /// Sample from the fewest tokens whose probabilities reach this sum; 1 means all
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f64,

    /// Seed of the sampling; on the CPU the same seed gives the same answers
    #[arg(long, value_name = "N", value_parser = seed, default_value_t = 0)]
    pub seed: u64,

    /// Device to compute on: cpu, or with the feature cuda also cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,

    /// File for the answers, one {"model": .., "prompt": .., "response": ..} a line; it must not exist
    #[arg(long, value_name = "FILE", value_parser = utf8_path)]
    pub out: Option<PathBuf>,
}

/// The command line of `eval`.
#[derive(Debug, Clone, Args)]
pub struct EvalArgs {
    /// Models, prompts and sampling.
    #[command(flatten)]
    pub generate: GenerateArgs,

    /// Model that the KL of each is measured to, on its own answers
    #[arg(long, value_name = "PATH", value_parser = utf8_path)]
    pub reference: Option<PathBuf>,

    /// What a response is scored by, as in `train`: sentiment, length, regex, command, model:DIR, or the
    /// sum of several
    #[arg(long, value_name = "NAME", default_value_t = RewardKind::Sentiment)]
    pub reward: RewardKind,

    /// Response length of --reward length, in words
    #[arg(long, value_name = "WORDS", value_parser = count, default_value_t = 12)]
    pub reward_length: usize,

    /// Regular expression of --reward regex
    #[arg(long, value_name = "REGEX", allow_hyphen_values = true)]
    pub reward_pattern: Option<String>,

    /// Shell command of --reward command
    #[arg(long, value_name = "COMMAND")]
    pub reward_command: Option<String>,

    /// Longest time the command may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
    pub reward_timeout: f64,
}

impl EvalArgs {
    fn reward(&self, device: &Device) -> Result<Box<dyn Reward>> {
        let settings = Settings {
            reward: self.reward.clone(),
            reward_length: self.reward_length,
            reward_pattern: self.reward_pattern.clone(),
            reward_command: self.reward_command.clone(),
            reward_timeout: self.reward_timeout,
            ..Settings::default()
        };
        settings.validate()?;
        reward::build(&settings, device)
    }
}

/// A model's answers.
pub struct Answered {
    /// The model's name.
    pub name: String,
    /// Its answers, some at a time.
    pub answers: Vec<Answers>,
}

/// One line of the file of answers.
#[derive(Serialize)]
struct Record<'a> {
    model: &'a str,
    prompt: &'a str,
    response: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    score: Option<f32>,
    finished: bool,
}

impl Answered {
    /// Answers the prompts, at least one, with chances that depend on the seed alone.
    pub fn new(
        name: &str,
        Loaded { decoder, tokenizer }: &Loaded,
        prompts: &[Prompt],
        sampling: &Sampling,
        seed: u64,
        on_token: &mut dyn FnMut(usize),
    ) -> Result<Self> {
        let mut rng = StdRng::seed_from_u64(seed);
        let decoder = decoder.no_grad();
        let answers = (prompts.chunks(CHUNK))
            .map(|some| answer(&decoder, tokenizer, sampling, some.to_vec(), &mut rng, on_token))
            .collect::<Result<_>>()?;
        Ok(Self { name: name.to_owned(), answers })
    }

    /// One score an answer.
    pub fn scores(&self, reward: &mut dyn Reward) -> Result<Vec<f32>> {
        let mut scores = Vec::new();
        for answers in &self.answers {
            scores.extend(weighted_sum(&reward.parts(&answers.samples())?));
        }
        Ok(scores)
    }

    /// ln p(response) - ln p_reference(response) of each answer: its mean estimates the KL.
    pub fn log_ratios(&self, policy: &Decoder, reference: &Decoder) -> Result<Vec<f32>> {
        let (policy, reference) = (policy.no_grad(), reference.no_grad());
        let mut all = Vec::new();
        for answers in &self.answers {
            let sequences = Sequences::from(&answers.generation);
            let ratios = (sequences.logp(&policy)? - sequences.logp(&reference)?)?;
            all.extend(sequences.sums(&ratios)?);
        }
        Ok(all)
    }

    /// Tokens of each answer.
    pub fn lengths(&self) -> Vec<f32> {
        let responses = self.answers.iter().flat_map(|some| &some.generation.responses);
        responses.map(|ids| ids.len() as f32).collect()
    }

    /// The share that ended by itself.
    pub fn finished(&self) -> f64 {
        let all: Vec<f32> = (self.answers.iter())
            .flat_map(|some| &some.generation.finished)
            .map(|&finished| f32::from(u8::from(finished)))
            .collect();
        Mean::of(&all).mean
    }

    fn records<'a>(&'a self, scores: Option<&[f32]>) -> Vec<Record<'a>> {
        let all = self.answers.iter().flat_map(|some| {
            (some.prompts.iter().zip(&some.responses)).zip(&some.generation.finished)
        });
        all.enumerate()
            .map(|(i, ((prompt, response), &finished))| Record {
                model: &self.name,
                prompt: &prompt.text,
                response,
                score: scores.map(|scores| scores[i]),
                finished,
            })
            .collect()
    }
}

/// A mean and its standard error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mean {
    /// The mean.
    pub mean: f64,
    /// Its standard error; NaN for one number.
    pub error: f64,
}

impl Mean {
    /// The mean of some numbers.
    pub fn of(values: &[f32]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let squares: f64 = values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum();
        Self { mean, error: (squares / (n - 1.0) / n).sqrt() }
    }

    /// The mean of the differences of two lists, one a prompt.
    pub fn of_gain(after: &[f32], before: &[f32]) -> Self {
        let gains: Vec<f32> =
            after.iter().zip(before).map(|(after, before)| after - before).collect();
        Self::of(&gains)
    }
}

/// A Markdown table whose cells are as wide as their columns. The first column is text, the others are
/// numbers.
pub fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([headings[column].chars().count(), 3]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let cells = cells.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            if column == 0 {
                format!("{cell:<width$}")
            } else {
                format!("{cell:>width$}")
            }
        });
        format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
    };
    let rule = widths.iter().enumerate().map(|(column, &width)| match column {
        0 => "-".repeat(width + 2),
        _ => format!("{}:", "-".repeat(width + 1)),
    });
    let mut table = line(headings.to_vec());
    table += &format!("|{}|\n", rule.collect::<Vec<_>>().join("|"));
    for row in rows {
        table += &line(row.iter().map(String::as_str).collect());
    }
    table
}

/// The file of answers; taken away again if nothing was written to it.
struct Out {
    path: PathBuf,
    file: File,
    written: bool,
}

impl Out {
    fn create(path: &Path) -> Result<Self> {
        let file = File::create_new(path)
            .with_context(|| format!("--out {} cannot be made", path.display()))?;
        Ok(Self { path: path.to_owned(), file, written: false })
    }

    fn write(&mut self, records: &[Record]) -> Result<()> {
        let mut lines = Vec::new();
        for record in records {
            serde_json::to_writer(&mut lines, record)?;
            lines.push(b'\n');
        }
        self.written = true;
        let written = self.file.write_all(&lines);
        written.with_context(|| format!("cannot write {}", self.path.display()))
    }
}

impl Drop for Out {
    fn drop(&mut self) {
        if !self.written {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Everything that could be refused, opened, of `generate` and `eval`.
struct Opened {
    models: Vec<(String, Loaded)>,
    prompts: Vec<Vec<Prompt>>,
    sampling: Sampling,
    out: Option<Out>,
}

/// Opens the models and encodes the prompts for each. `context` knows how long prompt and response may
/// be besides, and whether the tokens of a model's tokenizer will do.
fn open(
    args: &GenerateArgs,
    device: &Device,
    context: &dyn Fn(&Tokenizer) -> Result<usize>,
    progress: &Progress,
) -> Result<Opened> {
    let sampling = Sampling {
        temperature: args.temperature,
        top_k: Some(args.top_k).filter(|&k| k > 0),
        top_p: Some(args.top_p).filter(|&p| p != 1.0),
        max_new_tokens: args.max_new_tokens,
    };
    sampling.validate()?;
    ensure!(args.limit != Some(0), "--limit is 0, expected a whole number above 0");
    let texts = match &args.prompts {
        Some(path) => prompts::read(path)?,
        None => embedded::prompts(),
    };
    let mut models = Vec::new();
    for path in &args.models {
        let model = load(path, device).context("--model is refused")?;
        models.push((path.display().to_string(), model));
    }
    if models.is_empty() {
        models.push(("embedded".to_owned(), embedded::model(args.seed, device)?));
    }
    let mut prompts = Vec::new();
    for (name, Loaded { decoder, tokenizer }) in &models {
        let encode = || {
            let context = context(tokenizer)?.min(decoder.config().max_position_embeddings);
            Prompts::new(texts.clone(), tokenizer, context, args.max_new_tokens)
        };
        let all = encode().with_context(|| format!("--model {name}"))?;
        prompts.push(all.first(args.limit.unwrap_or(usize::MAX)).to_vec());
    }
    let out = args.out.as_deref().map(Out::create).transpose()?;
    if args.models.is_empty() {
        let Loaded { decoder, tokenizer } = &models[0].1;
        let steps = embedded::settings::<SftSettings>(embedded::SFT)?.steps;
        fit(decoder, tokenizer, steps, args.seed, progress, &AtomicBool::new(false))?;
    }
    Ok(Opened { models, prompts, sampling, out })
}

impl Opened {
    /// The answers of each model in turn.
    fn answers(&self, seed: u64, progress: &Progress) -> Result<Vec<Answered>> {
        (self.models.iter().zip(&self.prompts))
            .map(|((name, model), prompts)| {
                let tokens = prompts.len() * self.sampling.max_new_tokens;
                let bar = progress.bar("answers", tokens, "tokens");
                Answered::new(name, model, prompts, &self.sampling, seed, &mut |n| bar.inc(n))
            })
            .collect()
    }
}

/// Answers the prompts and shows the answers.
///
/// # Errors
/// A flag, device, model, prompt file or output file that cannot be used.
pub fn generate(args: &GenerateArgs, progress: &Progress) -> Result<()> {
    let device = args.device.open()?;
    let mut opened = open(args, &device, &|_| Ok(usize::MAX), progress)?;
    let answered = opened.answers(args.seed, progress)?;
    let all: Vec<Vec<Record>> = answered.iter().map(|a| a.records(None)).collect();
    for i in 0..all[0].len() {
        let said =
            |record: &Record| record.response.split_whitespace().collect::<Vec<_>>().join(" ");
        match all.as_slice() {
            [one] => progress.line(&format!("{} | {}", one[i].prompt, said(&one[i]))),
            several => {
                progress.line(several[0][i].prompt);
                for records in several {
                    progress.line(&format!("  {} | {}", records[i].model, said(&records[i])));
                }
            }
        }
    }
    if let Some(out) = &mut opened.out {
        out.write(&all.into_iter().flatten().collect::<Vec<_>>())?;
    }
    Ok(())
}

/// Answers the prompts, scores the answers, and shows a table with a line for each model.
///
/// # Errors
/// As [`generate`]; and a reward that cannot be used.
pub fn eval(args: &EvalArgs, progress: &Progress) -> Result<()> {
    let start = Instant::now();
    let device = args.generate.device.open()?;
    let mut reward = args.reward(&device)?;
    let reference = match &args.reference {
        Some(path) => Some(load(path, &device).context("--reference is refused")?),
        None => None,
    };
    let context = |tokenizer: &Tokenizer| {
        let context = reward.context(tokenizer)?;
        Ok(match &reference {
            None => context,
            Some(reference) => {
                ensure!(
                    reference.tokenizer.has_vocabulary_of(tokenizer),
                    "--reference has another vocabulary"
                );
                context.min(reference.decoder.config().max_position_embeddings)
            }
        })
    };
    let mut opened = open(&args.generate, &device, &context, progress)?;
    let answered = opened.answers(args.generate.seed, progress)?;
    let (mut rows, mut records, mut first) = (Vec::new(), Vec::new(), None);
    for (answered, (name, model)) in answered.iter().zip(&opened.models) {
        let scores = answered.scores(reward.as_mut())?;
        let score = Mean::of(&scores);
        let ratios = match &reference {
            Some(reference) => Some(answered.log_ratios(&model.decoder, &reference.decoder)?),
            None => None,
        };
        let first = first.get_or_insert_with(|| scores.clone());
        let gain = Mean::of_gain(&scores, first);
        rows.push(vec![
            name.clone(),
            plus_minus(score),
            if rows.is_empty() { "-".to_owned() } else { plus_minus(gain) },
            ratios.map_or("-".to_owned(), |ratios| format!("{:.2}", Mean::of(&ratios).mean)),
            format!("{:.1}", Mean::of(&answered.lengths()).mean),
            format!("{:.0}%", 100.0 * answered.finished()),
        ]);
        records.extend(answered.records(Some(&scores)));
    }
    let headings = ["model", "score", "over the first", "KL", "tokens", "ended"];
    progress.line(table(&headings, &rows).trim_end());
    progress.line(&format!(
        "{} prompts, --reward {}; means and their standard errors; {:.0} s",
        opened.prompts[0].len(),
        args.reward,
        start.elapsed().as_secs_f64()
    ));
    if let Some(out) = &mut opened.out {
        out.write(&records)?;
    }
    Ok(())
}

/// A mean with its standard error.
pub fn plus_minus(Mean { mean, error }: Mean) -> String {
    format!("{mean:+.3} ± {error:.3}")
}
