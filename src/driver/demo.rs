//! `demo`: RLHF from end to end on the embedded data. A model is fitted to the corpus; it answers prompts
//! twice, and the sentiment reward, in the place of people, says which answer is better; of these
//! preferences a reward model is learned, and then a policy by PPO from that model's scores, beside one by
//! PPO from the sentiment reward itself, and one by DPO from the same preferences. A table compares them,
//! on prompts that none of them was trained on.
//!
//! The folder holds those of the runs, `preferences.jsonl`, `prompts.txt` (of both PPO runs), the table as
//! `comparison.md`, and besides `metrics.jsonl` and `samples.jsonl` of the comparison, whose steps are the
//! rows of the table.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use candle_core::Device;
use clap::Args;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::SeedableRng;
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};

use super::config::tuning::{DpoSettings, RewardModelSettings, SftSettings};
use super::config::{
    at_least_one, count, defaults, seed, utf8_path, valid_paths, valid_seed, RewardKind,
    RunSettings, Settings,
};
use super::embedded::{self, settings as embedded_settings};
use super::evaluate::{plus_minus, table, Answered, Mean};
use super::examples::Preference;
use super::generate::Sampling;
use super::load::{load, load_reward, Loaded};
use super::report::Progress;
use super::reward::{self, ModelReward};
use super::rollout::{Prompt, Prompts};
use super::session::Session;
use super::{dpo, reward_model, sft, train};

/// The settings of `demo`.
#[derive(Debug, Clone, PartialEq, Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DemoSettings {
    /// Folder for everything; it must not hold a run [default: the next free runs/demo-N]
    #[arg(long, value_name = "DIR", value_parser = utf8_path)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub out: Option<PathBuf>,

    /// Seed of everything random; the same seed gives the same run
    #[arg(long, value_name = "N", value_parser = seed, default_value_t = 0)]
    pub seed: u64,

    /// Prompts that are answered twice for a preference
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 1500)]
    pub pairs: usize,

    /// Prompts of the comparison
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 256)]
    pub prompts: usize,

    /// Steps of sft
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 400)]
    pub sft_steps: usize,

    /// Steps of reward
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 150)]
    pub reward_steps: usize,

    /// Steps of train, both times
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 40)]
    pub ppo_steps: usize,

    /// Steps of dpo
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 150)]
    pub dpo_steps: usize,
}

impl Default for DemoSettings {
    fn default() -> Self {
        defaults()
    }
}

impl RunSettings for DemoSettings {
    const COMMAND: &'static str = "demo";

    fn out(&mut self) -> &mut Option<PathBuf> {
        &mut self.out
    }

    fn validate(&self) -> Result<()> {
        for (flag, number) in [
            ("--pairs", self.pairs),
            ("--prompts", self.prompts),
            ("--sft-steps", self.sft_steps),
            ("--reward-steps", self.reward_steps),
            ("--ppo-steps", self.ppo_steps),
            ("--dpo-steps", self.dpo_steps),
        ] {
            at_least_one(flag, number)?;
        }
        let most = embedded::questions().len() / 4;
        ensure!(self.prompts <= most, "--prompts is {}, expected at most {most}", self.prompts);
        valid_seed(self.seed)?;
        valid_paths(&[("--out", &self.out)])
    }
}

/// Longest answer; the corpus has none of more than 9 tokens.
const MAX_NEW_TOKENS: usize = 16;

/// Runs it all; ends as [`super::train::run`] does.
///
/// # Errors
/// An output folder that cannot be used; and whatever goes wrong later, with what is done left there.
pub fn run(settings: &DemoSettings, stop: &AtomicBool, progress: &Progress) -> Result<()> {
    let start = Instant::now();
    settings.validate()?;
    let Some(mut session) = Session::begin(settings, progress, stop, start)? else {
        return Ok(());
    };
    let dir = session.run.dir().to_owned();
    let demo = Demo { settings, dir, prompts: Split::new(settings) };
    if !demo.train(&mut session, stop)? {
        progress.line(&format!("stopped; what is done is in {}", demo.dir.display()));
        return Ok(());
    }
    demo.compare(&mut session)?;
    session.end();
    Ok(())
}

/// Prompts of the corpus, each once: those of the comparison, and those to learn from.
struct Split {
    compared: Vec<String>,
    learned: Vec<String>,
}

impl Split {
    fn new(settings: &DemoSettings) -> Self {
        let mut all: Vec<String> =
            embedded::questions().iter().map(|(prompt, _)| (*prompt).to_owned()).collect();
        all.sort_unstable();
        all.dedup();
        all.shuffle(&mut StdRng::seed_from_u64(settings.seed));
        let learned = all.split_off(settings.prompts.min(all.len() / 2));
        Self { compared: all, learned }
    }
}

struct Demo<'a> {
    settings: &'a DemoSettings,
    dir: PathBuf,
    prompts: Split,
}

impl Demo<'_> {
    fn weights(&self, run: &str) -> PathBuf {
        self.dir.join(run).join("weights")
    }

    /// All runs in their order; whether they came to their end.
    fn train(&self, session: &mut Session, stop: &AtomicBool) -> Result<bool> {
        let progress = session.progress;
        let (seed, sft_weights) = (self.settings.seed, self.weights("sft"));
        let out = |run: &str| Some(self.dir.join(run));
        let model = Some(sft_weights.clone());

        progress.line("\n== sft: a model of the corpus");
        let settings = SftSettings {
            out: out("sft"),
            seed,
            steps: self.settings.sft_steps,
            ..embedded_settings(embedded::SFT)?
        };
        sft::run(&settings, stop, progress).context("sft")?;
        session.run.keep();
        if session.stopped() {
            return Ok(false);
        }

        progress.line("\n== preferences: two answers to each prompt, and which one is better");
        let preferences = Some(self.ask(&sft_weights, progress)?);

        progress.line("\n== reward: a reward model of the preferences");
        let settings = RewardModelSettings {
            out: out("reward"),
            model: model.clone(),
            preferences: preferences.clone(),
            seed,
            steps: self.settings.reward_steps,
            ..embedded_settings(embedded::REWARD)?
        };
        reward_model::run(&settings, stop, progress).context("reward")?;
        if session.stopped() {
            return Ok(false);
        }

        let prompts = self.dir.join("prompts.txt");
        write(&prompts, self.prompts.learned.join("\n") + "\n")?;
        for (run, reward) in [
            ("ppo-reward-model", RewardKind::Model(self.weights("reward"))),
            ("ppo-built-in", RewardKind::Sentiment),
        ] {
            progress.line(&format!("\n== train: PPO with --reward {reward}"));
            let settings = Settings {
                out: out(run),
                model: model.clone(),
                prompts: Some(prompts.clone()),
                score_scaling: matches!(reward, RewardKind::Model(_)),
                reward,
                seed,
                steps: self.settings.ppo_steps,
                ..embedded_settings(embedded::TRAIN)?
            };
            train::run(&settings, stop, progress).context(run)?;
            if session.stopped() {
                return Ok(false);
            }
        }

        progress.line("\n== dpo: the same preferences without a reward model");
        let settings = DpoSettings {
            out: out("dpo"),
            model,
            preferences,
            seed,
            steps: self.settings.dpo_steps,
            ..embedded_settings(embedded::DPO)?
        };
        dpo::run(&settings, stop, progress).context("dpo")?;
        Ok(!session.stopped())
    }

    /// Two answers to each prompt, in the file of preferences where one is better.
    fn ask(&self, weights: &Path, progress: &Progress) -> Result<PathBuf> {
        let model = load(weights, &Device::Cpu)?;
        let prompts = encode(&self.prompts.learned, &model)?;
        let twice: Vec<Prompt> =
            (0..2 * self.settings.pairs).map(|i| prompts[i / 2 % prompts.len()].clone()).collect();
        let answered = self.answer("sft", &model, &twice, self.settings.seed, progress)?;
        let said: Vec<(&Prompt, &String)> = (answered.answers.iter())
            .flat_map(|some| some.prompts.iter().zip(&some.responses))
            .collect();
        let preferences: Vec<Preference> = (said.chunks_exact(2))
            .filter_map(|two| Preference::judge(&two[0].0.text, two[0].1, two[1].1))
            .collect();
        ensure!(!preferences.is_empty(), "no answer is better than another; raise --pairs");
        progress.line(&format!(
            "{} pairs; no preference in {} others",
            preferences.len(),
            self.settings.pairs - preferences.len()
        ));
        let path = self.dir.join("preferences.jsonl");
        let mut lines = String::new();
        for preference in &preferences {
            lines += &serde_json::to_string(preference)?;
            lines.push('\n');
        }
        write(&path, lines)?;
        Ok(path)
    }

    fn answer(
        &self,
        name: &str,
        model: &Loaded,
        prompts: &[Prompt],
        seed: u64,
        progress: &Progress,
    ) -> Result<Answered> {
        let sampling = Sampling { max_new_tokens: MAX_NEW_TOKENS, ..Sampling::default() };
        let bar = progress.bar("answers", prompts.len() * MAX_NEW_TOKENS, "tokens");
        Answered::new(name, model, prompts, &sampling, seed, &mut |n| bar.inc(n))
    }

    /// The table, and what it says.
    fn compare(&self, session: &mut Session) -> Result<()> {
        let progress = session.progress;
        let reference = load(&self.weights("sft"), &Device::Cpu)?;
        let mut learned = ModelReward::new(load_reward(&self.weights("reward"), &Device::Cpu)?);
        let mut built_in = reward::build(&Settings::default(), &Device::Cpu)?;
        let prompts = encode(&self.prompts.compared, &reference)?;

        let (mut rows, mut all) = (Vec::new(), Vec::new());
        for (step, (name, run)) in [
            ("SFT", "sft"),
            ("PPO, built-in reward", "ppo-built-in"),
            ("PPO, reward model", "ppo-reward-model"),
            ("DPO", "dpo"),
        ]
        .into_iter()
        .enumerate()
        {
            let model = load(&self.weights(run), &Device::Cpu)?;
            let answered = self.answer(name, &model, &prompts, self.settings.seed + 1, progress)?;
            let scores = answered.scores(built_in.as_mut())?;
            let learned_scores = answered.scores(&mut learned)?;
            let ratios = answered.log_ratios(&model.decoder, &reference.decoder)?;
            all.push(scores.clone());
            let better =
                scores.iter().zip(&all[0]).filter(|(score, before)| score > before).count();
            let (score, gain) = (Mean::of(&scores), Mean::of_gain(&scores, &all[0]));
            let kl = Mean::of(&ratios);
            let metrics = json!({
                "model": run,
                "score": score.mean,
                "score/error": score.error,
                "gain": gain.mean,
                "gain/error": gain.error,
                "better": better as f64 / scores.len() as f64,
                "score/reward_model": Mean::of(&learned_scores).mean,
                "kl": kl.mean,
                "response_length/mean": Mean::of(&answered.lengths()).mean,
            });
            let metrics = metrics.as_object().cloned().unwrap_or_default();
            session.run.metrics(step, &metrics)?;
            rows.push(vec![
                name.to_owned(),
                plus_minus(score),
                if step == 0 { "-".to_owned() } else { plus_minus(gain) },
                if step == 0 {
                    "-".to_owned()
                } else {
                    format!("{:.0}%", 100.0 * metrics["better"].as_f64().unwrap_or(f64::NAN))
                },
                format!("{:+.2}", Mean::of(&learned_scores).mean),
                format!("{:.2}", kl.mean),
                format!("{:.1}", Mean::of(&answered.lengths()).mean),
            ]);
            let mut from = 0;
            for some in &answered.answers {
                let to = from + some.prompts.len();
                session.record(step, some, Some(&scores[from..to]), Some(&ratios[from..to]))?;
                from = to;
            }
        }
        let headings = [
            "model",
            "built-in score",
            "over SFT",
            "better",
            "reward model",
            "KL to SFT",
            "tokens",
        ];
        let table = table(&headings, &rows);
        write(&self.dir.join("comparison.md"), table.clone())?;
        progress.line(&format!(
            "\n== {} prompts that none was trained on: means with their standard errors\n\n{}",
            prompts.len(),
            table
        ));
        let gains: Vec<Mean> = all.iter().map(|scores| Mean::of_gain(scores, &all[0])).collect();
        if let Some(accuracy) = self.accuracy()? {
            progress.line(&format!(
                "The reward model is right about {:.1}% of the pairs held out.",
                100.0 * accuracy
            ));
        }
        progress.line(&format!(
            "By the built-in score PPO gains {:.2} times as much with the reward model as with that score \
             itself, and DPO is {:.0} standard errors above SFT.",
            gains[2].mean / gains[1].mean,
            gains[3].mean / gains[3].error
        ));
        Ok(())
    }

    /// The reward model's accuracy on the pairs held out, if any were, after its last step.
    fn accuracy(&self) -> Result<Option<f64>> {
        let path = self.dir.join("reward/metrics.jsonl");
        let shown = path.display();
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {shown}"))?;
        let last: Value = serde_json::from_str(text.lines().last().unwrap_or_default())
            .with_context(|| format!("{shown} is not valid"))?;
        Ok(last["eval/accuracy"].as_f64())
    }
}

fn encode(prompts: &[String], Loaded { decoder, tokenizer }: &Loaded) -> Result<Vec<Prompt>> {
    let context = decoder.config().max_position_embeddings;
    let all = Prompts::new(prompts.to_vec(), tokenizer, context, MAX_NEW_TOKENS)?;
    Ok(all.first(prompts.len()).to_vec())
}

fn write(path: &Path, text: String) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
