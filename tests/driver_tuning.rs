//! The driver's subcommands that learn from examples: their files, their losses, and whole short runs
//! of the embedded model.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor, Var, D};
use clap::{Args, Command, FromArgMatches};
use common::{assert_close, to_vec};
use ppo_kernels::driver::config::tuning::{DpoSettings, RewardModelSettings, SftSettings, Tuning};
use ppo_kernels::driver::config::{ConfigArgs, CriticFrom, RewardKind, RunSettings, Settings};
use ppo_kernels::driver::dpo::{self, Dpo};
use ppo_kernels::driver::embedded;
use ppo_kernels::driver::examples::{
    encode_demonstrations, encode_preferences, read_demonstrations, read_preferences,
    Demonstration, Example, Preference,
};
use ppo_kernels::driver::load::{
    load, load_critic, load_reward, save, save_reward, Loaded, RewardModel,
};
use ppo_kernels::driver::model::{Critic, Decoder, DecoderConfig};
use ppo_kernels::driver::report::Progress;
use ppo_kernels::driver::reward::sentiment;
use ppo_kernels::driver::reward_model::{self, RewardLearner};
use ppo_kernels::driver::sequences::Sequences;
use ppo_kernels::driver::sft::{self, Sft};
use ppo_kernels::driver::tokenizer::Tokenizer;
use ppo_kernels::driver::train;
use ppo_kernels::driver::tuning::{evaluate, learn, split, Loss, Objective};
use ppo_kernels::preference::{PreferenceLoss, PreferenceOptions};
use serde_json::{Map, Value};

/// f32 sums of a few hundred terms in two different orders.
const REL: f64 = 1e-5;
const ABS: f64 = 1e-5;

fn silent() -> Progress {
    Progress::lines_to(std::io::sink())
}

fn lines(path: PathBuf) -> Vec<Map<String, Value>> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The metrics of a run, without what depends on the clock.
fn metrics(run: &Path) -> Vec<Map<String, Value>> {
    let mut all = lines(run.join("metrics.jsonl"));
    for line in &mut all {
        line.retain(|name, _| !name.starts_with("timing_s/"));
    }
    all
}

/// Refused with these words in its message, and nothing left behind.
fn refused<S>(run: impl Fn(&S) -> anyhow::Result<()>, settings: &S, out: &Path, words: &[&str]) {
    let error = format!("{:#}", run(settings).unwrap_err());
    for word in words {
        assert!(error.contains(word), "{error} does not name {word}");
    }
    assert!(!error.contains('\n'), "{error}");
    assert!(!out.exists(), "{error}, but the folder is there");
}

fn write(path: PathBuf, text: impl AsRef<[u8]>) -> PathBuf {
    fs::write(&path, text).unwrap();
    path
}

// ---------------------------------------------------------------- files

#[test]
fn demonstrations_are_read_from_text_and_jsonl() {
    let dir = tempfile::tempdir().unwrap();
    let read =
        |name: &str, text: &str| read_demonstrations(&write(dir.path().join(name), text)).unwrap();
    let demonstration = |prompt: &str, response: &str| Demonstration {
        prompt: prompt.into(),
        response: response.to_owned(),
    };
    assert_eq!(
        read("d.txt", "\u{feff}one\r\n\n  two \n"),
        [demonstration("", "one"), demonstration("", "two")]
    );
    assert_eq!(
        read("d.jsonl", "{\"prompt\": \"Say\", \"response\": \" it \", \"id\": 3}\n\n"),
        [demonstration("Say", " it ")]
    );
}

#[test]
fn pairs_are_read_from_jsonl_with_their_margins() {
    let dir = tempfile::tempdir().unwrap();
    let text = "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"\"}\n\
                {\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\", \"margin\": 0.5}\n\
                {\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\", \"margin\": null}\n";
    let pairs = read_preferences(&write(dir.path().join("p.jsonl"), text)).unwrap();
    let pair = |rejected: &str, margin| Preference {
        prompt: "a".into(),
        chosen: "b".to_owned(),
        rejected: rejected.to_owned(),
        margin,
    };
    assert_eq!(pairs, [pair("", None), pair("c", Some(0.5)), pair("c", None)]);
}

#[test]
fn a_bad_file_is_refused_with_flag_file_and_line() {
    let dir = tempfile::tempdir().unwrap();
    let good = r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#;
    for (name, text, message) in [
        ("empty.txt", "\n", " holds no demonstration"),
        (
            "a.jsonl",
            "{\"prompt\": \"a\"}",
            ":1: expected {\"prompt\": \"..\", \"response\": \"..\"}",
        ),
        ("b.jsonl", "\n{\"prompt\": \" \", \"response\": \"b\"}", ":2: the prompt is empty"),
        ("c.jsonl", "{\"prompt\": \"a\", \"response\": \"\"}", ":1: the response is empty"),
    ] {
        let path = write(dir.path().join(name), text);
        let error = format!("{:#}", read_demonstrations(&path).unwrap_err());
        assert!(
            error.starts_with(&format!("--demonstrations {}{message}", path.display())),
            "{error}"
        );
    }
    for (name, text, message) in [
        ("empty.jsonl", "\n".to_owned(), " holds no pair"),
        ("text.txt", good.to_owned(), ": expected a .jsonl file with one {\"prompt\""),
        ("a.jsonl", format!("{good}\n[1]"), ":2: expected {\"prompt\": \"..\", \"chosen\": \"..\""),
        ("b.jsonl", format!("{good}\n{}", good.replace('c', "b")), ":2: expected"),
        (
            "same.jsonl",
            r#"{"prompt": "a", "chosen": "b", "rejected": "b"}"#.to_owned(),
            ":1: chosen and rejected are the same",
        ),
        ("blank.jsonl", good.replace("\"a\"", "\"\""), ":1: the prompt is empty"),
        (
            "margin.jsonl",
            good.replace('}', ", \"margin\": \"much\"}"),
            ":1: margin: expected a number, got \"much\"",
        ),
        ("vast.jsonl", good.replace('}', ", \"margin\": 1e99}"), ":1: margin: expected a number"),
    ] {
        let path = write(dir.path().join(name), text);
        let error = format!("{:#}", read_preferences(&path).unwrap_err());
        assert!(
            error.starts_with(&format!("--preferences {}{message}", path.display())),
            "{error}"
        );
    }
    let missing = dir.path().join("none.jsonl");
    let error = format!("{:#}", read_preferences(&missing).unwrap_err());
    assert!(
        error.starts_with(&format!("cannot read --preferences {}", missing.display())),
        "{error}"
    );
}

#[test]
fn an_example_is_prompt_response_and_end() {
    let Loaded { tokenizer, .. } = embedded::model(0, &Device::Cpu).unwrap();
    let ids = |text: &str| tokenizer.encode(text).unwrap();
    let eos = tokenizer.eos().to_vec();
    let with_prompt = Example::encode(&tokenizer, &"The cat sat on the".into(), "mat.").unwrap();
    assert_eq!(with_prompt.prompt, ids("The cat sat on the"));
    assert_eq!(with_prompt.response, [ids("mat."), eos.clone()].concat());
    let whole = Example::encode(&tokenizer, &"".into(), "The cat sat on the mat.").unwrap();
    assert_eq!(whole.prompt, ids("The"));
    assert_eq!(whole.response, [ids("cat sat on the mat."), eos].concat());
    assert_eq!(whole.tokens(), with_prompt.tokens());
}

#[test]
fn examples_are_laid_out_with_pads_before_and_behind() {
    let example = |prompt: &[u32], response: &[u32]| Example {
        prompt: prompt.to_vec(),
        response: response.to_vec(),
    };
    let (a, b) = (example(&[5, 6, 7], &[8]), example(&[9], &[10, 11]));
    let sequences = Sequences::of(&[&a, &b], 0, &Device::Cpu).unwrap();
    let ids = [[5u32, 6, 7, 8, 0], [0, 0, 9, 10, 11]];
    assert_eq!(sequences.ids.to_vec2::<u32>().unwrap(), ids);
    assert_eq!((&sequences.pads[..], sequences.prompt_len), (&[0, 2][..], 3));
    assert_eq!(sequences.lengths, [1, 2]);
    assert_eq!(sequences.offsets().unwrap().to_vec1::<i64>().unwrap(), [0, 1, 3]);
    assert_eq!(sequences.tokens_of(&[1, 0]).unwrap().to_vec1::<u32>().unwrap(), [1, 2, 0]);
    let values = Tensor::new(&[1f32, 2.0, 3.0], &Device::Cpu).unwrap();
    assert_eq!(sequences.sums(&values).unwrap(), [1.0, 5.0]);
    // A row by itself has no padding.
    let alone = sequences.select(&[1]).unwrap();
    assert_eq!(alone.ids.to_vec2::<u32>().unwrap(), [[9, 10, 11]]);
    assert_eq!((alone.pads, alone.prompt_len, alone.lengths), (vec![0], 1, vec![2]));
}

// ---------------------------------------------------------------- course

fn tuning() -> Tuning {
    SftSettings::default().tuning()
}

#[test]
fn a_share_of_the_examples_is_held_out_and_none_is_in_both() {
    let (rows, held_out) = split(10, 0.25, 0).unwrap();
    assert_eq!((rows.len(), held_out.len()), (7, 3));
    let mut all = [rows.clone(), held_out.clone()].concat();
    all.sort_unstable();
    assert_eq!(all, (0..10).collect::<Vec<_>>());
    assert_eq!(split(10, 0.25, 0).unwrap().1, held_out);
    assert_ne!(split(10, 0.25, 1).unwrap().1, held_out);
    assert!(split(10, 0.0, 0).unwrap().1.is_empty());
    let error = split(2, 0.9, 0).unwrap_err().to_string();
    assert_eq!(error, "--held-out is 0.9, which leaves none of 2 examples to learn from");
}

fn sft_of<'a>(model: &'a Loaded, texts: &[(&str, &str)]) -> Sft<'a> {
    let demonstrations: Vec<Demonstration> = (texts.iter())
        .map(|(prompt, response)| Demonstration {
            prompt: (*prompt).into(),
            response: (*response).to_owned(),
        })
        .collect();
    let Loaded { decoder, tokenizer } = model;
    let examples = encode_demonstrations(&demonstrations, tokenizer, 64).unwrap();
    Sft { decoder, examples, pad: tokenizer.pad() }
}

/// Each by itself, without any padding, and the mean over the tokens of the responses alone.
#[test]
fn the_loss_of_sft_is_that_of_the_responses_tokens() {
    let model = embedded::model(3, &Device::Cpu).unwrap();
    let sft = sft_of(
        &model,
        &[("The cat sat on the", "mat."), ("The", "dog ran to the river and drank some water.")],
    );
    let (mut sum, mut count) = (0.0, 0);
    for example in &sft.examples {
        let tokens = example.tokens();
        let ids = Tensor::new(vec![tokens.clone()], &Device::Cpu).unwrap();
        let logits = model.decoder.logits(&model.decoder.hidden(&ids, &[0]).unwrap()).unwrap();
        let logp = candle_nn::ops::log_softmax(&logits.squeeze(0).unwrap(), D::Minus1).unwrap();
        let logp = logp.to_vec2::<f32>().unwrap();
        for at in example.prompt.len()..tokens.len() {
            sum -= f64::from(logp[at - 1][tokens[at] as usize]);
            count += 1;
        }
    }
    let loss = sft.loss(&[0, 1]).unwrap();
    assert_eq!(loss.count, count);
    assert_close("loss", &to_vec(&loss.loss), &[sum / count as f64], REL, ABS);
    // The mean over all rows, however they are taken.
    for batch_size in [1, 2] {
        let eval = evaluate(&sft, &[0, 1], batch_size).unwrap();
        let eval = eval["eval/loss"].as_f64().unwrap();
        assert_close("eval", &[eval], &[sum / count as f64], REL, ABS);
    }
    assert!(evaluate(&sft, &[], 2).unwrap().is_empty());
}

#[test]
fn every_example_is_learned_once_before_any_comes_again() {
    let model = embedded::model(3, &Device::Cpu).unwrap();
    /// Remembers what it is asked for.
    struct Spy<'a>(Sft<'a>, std::cell::RefCell<Vec<Vec<usize>>>);
    impl Objective for Spy<'_> {
        fn parameters(&self) -> Vec<(String, Var)> {
            self.0.parameters()
        }
        fn loss(&self, rows: &[usize]) -> anyhow::Result<Loss> {
            self.1.borrow_mut().push(rows.to_vec());
            self.0.loss(rows)
        }
    }
    let texts = vec![("The cat sat on the", "mat."); 7];
    let spy = Spy(sft_of(&model, &texts), Vec::new().into());
    let rows = [0, 1, 2, 3, 5, 6];
    learn(&spy, &rows, &Tuning { steps: 6, batch_size: 2, ..tuning() }, |_| Ok(true)).unwrap();
    let asked = spy.1.into_inner();
    assert_eq!(asked.len(), 6);
    for epoch in asked.chunks(3) {
        let mut seen = epoch.concat();
        seen.sort_unstable();
        assert_eq!(seen, rows);
    }
    assert_ne!(asked[..3], asked[3..]);
}

// ---------------------------------------------------------------- sft

fn short_sft(out: &Path) -> SftSettings {
    SftSettings {
        out: Some(out.into()),
        steps: 6,
        batch_size: 8,
        learning_rate: 3e-3,
        max_new_tokens: 8,
        eval_every: 4,
        ..SftSettings::default()
    }
}

fn go_sft(settings: &SftSettings) -> anyhow::Result<()> {
    sft::run(settings, &AtomicBool::new(false), &silent())
}

#[test]
fn sft_learns_writes_its_files_and_repeats_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, seed: u64| {
        let out = dir.path().join(name);
        go_sft(&SftSettings { seed, ..short_sft(&out) }).unwrap();
        (
            metrics(&out),
            fs::read(out.join("samples.jsonl")).unwrap(),
            fs::read(out.join("weights/model.safetensors")).unwrap(),
        )
    };
    let (a, b, other) = (run("a", 5), run("b", 5), run("c", 6));
    assert!(a == b, "two runs of one seed differ");
    assert!(a.2 != other.2);

    let number = |step: usize, name: &str| a.0[step - 1].get(name).and_then(Value::as_f64);
    assert_eq!(a.0.len(), 6);
    assert!(number(6, "loss") < number(1, "loss"));
    assert!(number(6, "eval/loss") < number(1, "eval/loss"));
    let evaluated: Vec<usize> = (1..=6).filter(|&s| number(s, "eval/loss").is_some()).collect();
    assert_eq!(evaluated, [1, 4, 6]);
    let samples = lines(dir.path().join("a/samples.jsonl"));
    assert_eq!(samples.iter().filter(|s| s["step"] == 0).count(), 8);
    assert_eq!(samples.iter().filter(|s| s["step"] == 6).count(), 8);
    assert!(samples[0].get("score").is_none());
    load(&dir.path().join("a/weights"), &Device::Cpu).unwrap();
}

#[test]
fn a_run_that_is_stopped_ends_after_the_step_with_everything_written() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let settings = SftSettings { steps: 100_000, ..short_sft(&out) };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let run = scope.spawn(|| sft::run(&settings, &stop, &silent()));
        let start = Instant::now();
        let metrics = out.join("metrics.jsonl");
        while fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < 2 {
            assert!(start.elapsed() < Duration::from_secs(120), "no two steps in two minutes");
            assert!(!run.is_finished(), "ended before it was stopped");
            std::thread::sleep(Duration::from_millis(5));
        }
        stop.store(true, Ordering::Relaxed);
        run.join().unwrap().unwrap();
    });
    let steps = metrics(&out).len();
    assert!(steps < 10_000);
    let samples = lines(out.join("samples.jsonl"));
    assert_eq!(samples.iter().filter(|sample| sample["step"] == steps).count(), 8);
    load(&out.join("weights"), &Device::Cpu).unwrap();

    // A run that has not begun leaves nothing.
    let out = dir.path().join("none");
    sft::run(&short_sft(&out), &stop, &silent()).unwrap();
    assert!(!out.exists());
}

/// A step whose loss is not finite changes nothing, and the next one counts.
#[test]
fn a_step_that_is_not_finite_is_skipped() {
    /// The square of a parameter, but NaN in the first step.
    struct Once(Var, std::cell::Cell<usize>);
    impl Objective for Once {
        fn parameters(&self) -> Vec<(String, Var)> {
            vec![("x".to_owned(), self.0.clone())]
        }
        fn loss(&self, _: &[usize]) -> anyhow::Result<Loss> {
            self.1.set(self.1.get() + 1);
            let factor = if self.1.get() == 1 { f64::NAN } else { 1.0 };
            let loss = (self.0.sqr()? * factor)?.sum_all()?;
            Ok(Loss { loss, count: 1, metrics: Vec::new() })
        }
    }
    let x = Var::from_tensor(&Tensor::new(&[1f32], &Device::Cpu).unwrap()).unwrap();
    let mut steps = Vec::new();
    let tuning = Tuning { steps: 2, learning_rate: 0.1, ..tuning() };
    learn(&Once(x.clone(), 0.into()), &[0], &tuning, |learned| {
        steps.push((learned.skipped, learned.metrics["loss"].clone(), to_vec(&x)[0]));
        Ok(true)
    })
    .unwrap();
    assert_eq!(steps[0], (true, Value::Null, 1.0));
    assert_eq!((steps[1].0, &steps[1].1), (false, &Value::from(1.0)));
    assert!(steps[1].2 < 1.0);
}

#[test]
fn sft_goes_on_from_its_own_weights_with_demonstrations_of_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    go_sft(&short_sft(&path("first"))).unwrap();
    let text = r#"{"prompt": "The cat sat on the", "response": "roof and smiled."}"#;
    let second = SftSettings {
        model: Some(path("first/weights")),
        demonstrations: Some(write(path("d.jsonl"), text)),
        held_out: 0.0,
        steps: 30,
        ..short_sft(&path("second"))
    };
    go_sft(&second).unwrap();
    let samples = lines(path("second/samples.jsonl"));
    assert_eq!(samples.len(), 2, "the one prompt, before and after");
    assert_eq!(samples[1]["prompt"], "The cat sat on the");
    let metrics = metrics(&path("second"));
    assert!(metrics[29]["loss"].as_f64().unwrap() < 0.5, "{:?}", metrics[29]);
    assert!(metrics[29].get("eval/loss").is_none());
}

fn tiny_llama() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama")
}

fn logits(weights: &Path) -> Vec<f64> {
    let Loaded { decoder, tokenizer } = load(weights, &Device::Cpu).unwrap();
    let ids = Tensor::new(vec![tokenizer.encode("the cat sat").unwrap()], &Device::Cpu).unwrap();
    to_vec(&decoder.logits(&decoder.hidden(&ids, &[0]).unwrap()).unwrap())
}

#[test]
fn adapters_learn_and_are_saved_by_themselves_or_merged() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let settings = |out: &str| SftSettings {
        model: Some(tiny_llama()),
        demonstrations: Some(write(path("d.txt"), "the cat sat on the mat .")),
        held_out: 0.0,
        learning_rate: 1e-2,
        lora_rank: Some(2),
        ..short_sft(&path(out))
    };
    go_sft(&settings("apart")).unwrap();
    go_sft(&SftSettings { lora_merge: true, ..settings("merged") }).unwrap();
    assert_eq!(metrics(&path("apart")), metrics(&path("merged")));
    let (apart, merged) = (path("apart/weights"), path("merged/weights"));
    assert!(apart.join("adapter_model.safetensors").exists());
    assert!(!apart.join("model.safetensors").exists() && !apart.join("config.json").exists());
    assert!(merged.join("model.safetensors").exists());
    assert!(!merged.join("adapter_config.json").exists());
    let learned = logits(&merged);
    assert_close("adapters", &logits(&apart), &learned, REL, ABS);
    let change = |(a, b): (&f64, &f64)| (a - b).abs();
    let most = learned.iter().zip(&logits(&tiny_llama())).map(change).fold(0.0, f64::max);
    assert!(most > 0.1, "{most}");

    // A model made of adapters goes on as a whole one.
    let on = SftSettings { model: Some(apart), ..settings("on") };
    refused(go_sft, &on, &path("on"), &["--model", "adapters of adapters", "--lora-merge"]);
    go_sft(&SftSettings { lora_merge: true, ..on }).unwrap();
    // DPO starts from its own reference, with adapters that do nothing yet.
    let pair = r#"{"prompt": "the cat sat on the", "chosen": "mat .", "rejected": "dog ."}"#;
    let dpo = DpoSettings {
        model: Some(tiny_llama()),
        preferences: Some(write(path("p.jsonl"), pair)),
        held_out: 0.0,
        learning_rate: 1e-2,
        lora_rank: Some(2),
        ..short_dpo(&path("dpo"))
    };
    go_dpo(&dpo).unwrap();
    let metrics = metrics(&path("dpo"));
    assert!((metrics[0]["loss"].as_f64().unwrap() - 2f64.ln()).abs() < 1e-6);
    assert!(metrics.last().unwrap()["loss"].as_f64().unwrap() < 0.6);
    load(&path("dpo/weights"), &Device::Cpu).unwrap();
    let reward = RewardModelSettings { lora_rank: Some(2), ..short_reward(&path("reward")) };
    let merge = RewardModelSettings { lora_merge: true, ..reward.clone() };
    refused(go_reward, &reward, &path("reward"), &["--lora-rank", "--lora-merge"]);
    go_reward(&merge).unwrap();
    load_reward(&path("reward/weights"), &Device::Cpu).unwrap();
}

#[test]
fn ppo_trains_adapters_and_shares_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let settings = Settings {
        model: Some(tiny_llama()),
        prompts: Some(write(dir.path().join("p.txt"), "the cat\nthe dog ran\n")),
        reward: RewardKind::Length,
        lora_rank: Some(2),
        learning_rate: 1e-2,
        value_learning_rate: 1e-2,
        ..short_train(&out, Path::new("unused"))
    };
    go_train(&settings).unwrap();
    assert!(out.join("weights/adapter_model.safetensors").exists());
    assert_ne!(logits(&out.join("weights")), logits(&tiny_llama()));
    let critic = load_critic(&out.join("weights"), &Device::Cpu).unwrap();
    assert_eq!(critic.parameters().len(), 20 + 1, "whole, with its head");
    let metrics = metrics(&out);
    assert_eq!(metrics[0]["objective/kl"], 0.0);
    assert_ne!(metrics.last().unwrap()["objective/kl"], 0.0);
}

#[test]
fn what_sft_cannot_use_is_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let out = path("run");
    let refused = |settings: SftSettings, words: &[&str]| refused(go_sft, &settings, &out, words);
    let with = |demonstrations: PathBuf| SftSettings {
        demonstrations: Some(demonstrations),
        ..short_sft(&out)
    };
    refused(with(path("none.txt")), &["cannot read --demonstrations", "none.txt"]);
    refused(
        with(write(path("empty.txt"), "\n \n")),
        &["--demonstrations", "holds no demonstration"],
    );
    refused(
        with(write(path("walrus.txt"), "The cat sat.\nThe walrus sat.")),
        &["--demonstrations: demonstration 2", "walrus"],
    );
    refused(with(write(path("long.txt"), "the cat ".repeat(40))), &["81 tokens", "context of 64"]);
    refused(
        SftSettings { held_out: 0.9, ..with(write(path("one.txt"), "The cat sat.")) },
        &["--held-out is 0.9"],
    );
    refused(SftSettings { max_new_tokens: 64, ..short_sft(&out) }, &["--max-new-tokens 64"]);
    refused(
        SftSettings { learning_rate: f64::NAN, ..short_sft(&out) },
        &["--learning-rate is NaN"],
    );
    refused(SftSettings { held_out: 1.0, ..short_sft(&out) }, &["--held-out is 1, expected"]);
    refused(
        SftSettings { model: Some(path("none")), ..short_sft(&out) },
        &["--demonstrations is missing"],
    );
    refused(
        SftSettings { model: Some(path("none")), ..with(path("one.txt")) },
        &["--model is refused: cannot read"],
    );
}

// ---------------------------------------------------------------- reward

#[test]
fn the_embedded_pairs_are_of_one_prompt_and_the_chosen_response_scores_more() {
    let pairs = embedded::preferences();
    assert!(pairs.len() > 1500, "{}", pairs.len());
    for pair in &pairs {
        assert!(sentiment(&pair.chosen) > sentiment(&pair.rejected), "{pair:?}");
        assert!(pair.prompt.last().ends_with(" the"), "{pair:?}");
    }
    assert_eq!(Preference::judge("", "a good day.", "a bad day.").unwrap().chosen, "a good day.");
    assert_eq!(Preference::judge("", "a bad day.", "a good day.").unwrap().chosen, "a good day.");
    assert_eq!(Preference::judge("", "a day.", "a night."), None);
}

/// Each text by itself, without padding: the value at its last token.
#[test]
fn scores_are_the_values_at_the_last_tokens() {
    let Loaded { decoder, .. } = embedded::model(3, &Device::Cpu).unwrap();
    let critic = Critic::new(decoder, 4).unwrap();
    let texts = [vec![5u32, 6, 7], vec![9, 10], vec![11, 12, 13, 14, 1]];
    let scores = to_vec(&critic.scores(&texts, 0).unwrap());
    for (text, score) in texts.into_iter().zip(scores) {
        let ids = Tensor::new(vec![text], &Device::Cpu).unwrap();
        let values = to_vec(&critic.values(&ids, &[0]).unwrap());
        assert_close("score", &[score], &values[values.len() - 1..], REL, ABS);
    }
}

#[test]
fn the_metrics_of_reward_are_made_of_its_scores() {
    let Loaded { decoder, tokenizer } = embedded::model(3, &Device::Cpu).unwrap();
    let model = Critic::new(decoder, 4).unwrap();
    let mut preferences = embedded::preferences();
    preferences.truncate(9);
    preferences[1].margin = Some(0.5);
    let pairs = encode_preferences(&preferences, &tokenizer, 64).unwrap();
    let score = |tokens: Vec<u32>| to_vec(&model.scores(&[tokens], 0).unwrap())[0];
    let mut want = [0.0; 4];
    for pair in &pairs {
        let (chosen, rejected) = (score(pair.chosen.tokens()), score(pair.rejected.tokens()));
        let gap = chosen - rejected;
        want[0] += (-(gap - pair.margin.unwrap_or(0.0))).exp().ln_1p();
        want[0] += 0.25 * (chosen + rejected).powi(2);
        want[1] += f64::from(u8::from(gap > 0.0));
        want[2] += gap;
        want[3] += (chosen + rejected) / 2.0;
    }
    let learner = RewardLearner { model: &model, pairs, pad: 0, center_coef: 0.25 };
    let rows: Vec<usize> = (0..9).collect();
    let eval = evaluate(&learner, &rows, 4).unwrap();
    let names = ["eval/loss", "eval/accuracy", "eval/margin", "eval/score"];
    let got = names.map(|name| eval[name].as_f64().unwrap());
    assert_close("metrics", &got, &want.map(|x| x / 9.0), REL, ABS);
}

fn short_reward(out: &Path) -> RewardModelSettings {
    RewardModelSettings {
        out: Some(out.into()),
        lm_steps: 10,
        steps: 30,
        batch_size: 16,
        learning_rate: 3e-3,
        held_out: 0.02,
        ..RewardModelSettings::default()
    }
}

fn go_reward(settings: &RewardModelSettings) -> anyhow::Result<()> {
    reward_model::run(settings, &AtomicBool::new(false), &silent())
}

#[test]
fn reward_learns_writes_its_files_and_repeats_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str| {
        let out = dir.path().join(name);
        go_reward(&RewardModelSettings { seed: 5, ..short_reward(&out) }).unwrap();
        (
            metrics(&out),
            fs::read(out.join("samples.jsonl")).unwrap(),
            fs::read(out.join("weights/model.safetensors")).unwrap(),
        )
    };
    let (a, b) = (run("a"), run("b"));
    assert!(a == b, "two runs of one seed differ");
    let accuracy = a.0[29]["eval/accuracy"].as_f64().unwrap();
    assert!(accuracy > 0.8, "{accuracy}");
    assert!(a.0[29]["eval/loss"].as_f64() < a.0[0]["eval/loss"].as_f64());

    // What was shown is what the saved model says.
    let weights = dir.path().join("a/weights");
    let RewardModel { critic, tokenizer } = load_reward(&weights, &Device::Cpu).unwrap();
    let samples = lines(dir.path().join("a/samples.jsonl"));
    assert_eq!(samples.len(), 16);
    for sample in samples {
        let text = |key: &str| sample[key].as_str().unwrap();
        let example =
            Example::encode(&tokenizer, &text("prompt").into(), text("response")).unwrap();
        let score = to_vec(&critic.scores(&[example.tokens()], tokenizer.pad()).unwrap());
        assert_close("score", &score, &[sample["score"].as_f64().unwrap()], 1e-4, 1e-4);
    }

    // A reward model is no language model, and the other way round.
    let error = format!("{:#}", load(&weights, &Device::Cpu).err().unwrap());
    assert!(error.contains("LlamaForSequenceClassification"), "{error}");
    go_sft(&short_sft(&dir.path().join("sft"))).unwrap();
    let error = load_reward(&dir.path().join("sft/weights"), &Device::Cpu).err().unwrap();
    let error = format!("{error:#}");
    assert!(error.contains("cannot load the reward model"), "{error}");
    assert!(error.contains("expected LlamaForSequenceClassification"), "{error}");
}

#[test]
fn reward_learns_from_the_pairs_of_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    go_sft(&short_sft(&path("sft"))).unwrap();
    let pair =
        r#"{"prompt": "The cat sat on the", "chosen": "mat.", "rejected": "roof.", "margin": 1}"#;
    let settings = RewardModelSettings {
        model: Some(path("sft/weights")),
        preferences: Some(write(path("p.jsonl"), pair)),
        held_out: 0.0,
        steps: 20,
        ..short_reward(&path("run"))
    };
    go_reward(&settings).unwrap();
    let metrics = metrics(&path("run"));
    assert!(metrics[19]["margin"].as_f64().unwrap() > 2.0, "{:?}", metrics[19]);
    assert_eq!(metrics[19]["accuracy"], 1.0);
    let samples = lines(path("run/samples.jsonl"));
    assert!(samples[0]["score"].as_f64() > samples[1]["score"].as_f64());
}

#[test]
fn what_reward_cannot_use_is_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let out = path("run");
    let refused =
        |settings: RewardModelSettings, words: &[&str]| refused(go_reward, &settings, &out, words);
    let pair = |chosen: &str, rejected: &str| {
        let pair = serde_json::json!({"prompt": "The cat", "chosen": chosen, "rejected": rejected});
        let preferences = Some(write(path("p.jsonl"), format!("{pair}\n")));
        RewardModelSettings { preferences, held_out: 0.0, ..short_reward(&out) }
    };
    refused(pair("sat.", "sat."), &["--preferences", "p.jsonl:1", "are the same"]);
    refused(pair("sat.", " sat. "), &["--preferences: pair 1: ", "are the same tokens"]);
    refused(pair("sat.", "flew."), &["--preferences: pair 1: ", "flew"]);
    refused(pair("sat.", &"sat ".repeat(64)), &["--preferences: pair 1: ", "67 tokens"]);
    refused(
        RewardModelSettings { center_coef: -1.0, ..short_reward(&out) },
        &["--center-coef is -1"],
    );
    refused(
        RewardModelSettings { model: Some(path("none")), ..short_reward(&out) },
        &["--preferences is missing"],
    );
}

// ---------------------------------------------------------------- dpo

/// Each response by itself: the sums of its log-probabilities under policy and reference.
#[test]
fn the_loss_and_metrics_of_dpo_are_made_of_its_log_ratios() {
    let Loaded { decoder: policy, tokenizer } = embedded::model(3, &Device::Cpu).unwrap();
    let reference = embedded::model(4, &Device::Cpu).unwrap().decoder.frozen().unwrap();
    let mut preferences = embedded::preferences();
    preferences.truncate(5);
    let pairs = encode_preferences(&preferences, &tokenizer, 64).unwrap();
    let (beta, smoothing) = (0.3, 0.1);
    let options =
        PreferenceOptions { beta, label_smoothing: smoothing, ..PreferenceOptions::default() };
    let sum = |decoder: &Decoder, example: &Example| {
        let sequences = Sequences::of(&[example], 0, &Device::Cpu).unwrap();
        to_vec(&sequences.logp(decoder).unwrap()).iter().sum::<f64>()
    };
    let log_sigmoid = |x: f64| -(-x).exp().ln_1p();
    let mut want = [0.0; 7];
    for pair in &pairs {
        let logp = [&pair.chosen, &pair.rejected].map(|response| sum(&policy, response));
        let ref_logp = [&pair.chosen, &pair.rejected].map(|response| sum(&reference, response));
        let reward = [0, 1].map(|i| beta * (logp[i] - ref_logp[i]));
        let h = reward[0] - reward[1];
        want[0] -= (1.0 - smoothing) * log_sigmoid(h) + smoothing * log_sigmoid(-h);
        want[1] += f64::from(u8::from(h > 0.0));
        let more = [h, reward[0], reward[1], logp[0], logp[1]];
        want[2..].iter_mut().zip(more).for_each(|(sum, x)| *sum += x);
    }
    let dpo = Dpo { policy: &policy, reference: Some(reference), pairs, pad: 0, options };
    let eval = evaluate(&dpo, &[0, 1, 2, 3, 4], 3).unwrap();
    let names = [
        "eval/loss",
        "eval/accuracy",
        "eval/margin",
        "eval/rewards/chosen",
        "eval/rewards/rejected",
        "eval/logp/chosen",
        "eval/logp/rejected",
    ];
    let got = names.map(|name| eval[name].as_f64().unwrap());
    assert_close("metrics", &got, &want.map(|x| x / 5.0), 1e-5, 1e-5);
}

fn short_dpo(out: &Path) -> DpoSettings {
    DpoSettings {
        out: Some(out.into()),
        lm_steps: 10,
        steps: 12,
        batch_size: 16,
        learning_rate: 1e-3,
        held_out: 0.02,
        max_new_tokens: 8,
        ..DpoSettings::default()
    }
}

fn go_dpo(settings: &DpoSettings) -> anyhow::Result<()> {
    dpo::run(settings, &AtomicBool::new(false), &silent())
}

#[test]
fn dpo_learns_writes_its_files_and_repeats_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str| {
        let out = dir.path().join(name);
        go_dpo(&DpoSettings { seed: 5, ..short_dpo(&out) }).unwrap();
        (
            metrics(&out),
            fs::read(out.join("samples.jsonl")).unwrap(),
            fs::read(out.join("weights/model.safetensors")).unwrap(),
        )
    };
    let (a, b) = (run("a"), run("b"));
    assert!(a == b, "two runs of one seed differ");
    let number = |step: usize, name: &str| a.0[step - 1][name].as_f64().unwrap();
    assert_close("loss of the reference", &[number(1, "loss")], &[2f64.ln()], 1e-5, 0.0);
    assert!(number(12, "eval/loss") < number(1, "eval/loss"));
    assert!(number(12, "eval/margin") > 0.1, "{}", number(12, "eval/margin"));
    load(&dir.path().join("a/weights"), &Device::Cpu).unwrap();
    let samples = lines(dir.path().join("a/samples.jsonl"));
    assert_eq!(samples.len(), 16);
}

#[test]
fn every_loss_of_pairs_can_be_learned_and_saved() {
    let dir = tempfile::tempdir().unwrap();
    for loss in PreferenceLoss::ALL {
        if loss == PreferenceLoss::Kto {
            continue;
        }
        let out = dir.path().join(format!("{loss:?}"));
        let label_smoothing = if loss == PreferenceLoss::ExoPair { 0.1 } else { 0.0 };
        let settings =
            DpoSettings { loss, label_smoothing, lm_steps: 1, steps: 1, ..short_dpo(&out) };
        go_dpo(&settings).unwrap();
        assert!(metrics(&out)[0]["loss"].is_number(), "{loss:?}");
        let text = fs::read_to_string(out.join("config.toml")).unwrap();
        let saved: DpoSettings = toml::from_str(&text).unwrap();
        assert_eq!(saved, DpoSettings { out: None, ..settings });
    }
}

#[test]
fn dpo_shows_answers_to_the_prompts_of_its_pairs() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    go_sft(&short_sft(&path("sft"))).unwrap();
    let pair = |prompt: &str| {
        format!(r#"{{"prompt": "{prompt}", "chosen": "mat.", "rejected": "roof."}}"#) + "\n"
    };
    let pairs = [pair("The cat sat on the"), pair("The dog"), pair("The dog")].concat();
    let settings = DpoSettings {
        model: Some(path("sft/weights")),
        preferences: Some(write(path("p.jsonl"), pairs)),
        held_out: 0.0,
        steps: 20,
        ..short_dpo(&path("run"))
    };
    go_dpo(&settings).unwrap();
    let samples = lines(path("run/samples.jsonl"));
    let prompts: Vec<_> = samples.iter().map(|sample| sample["prompt"].as_str().unwrap()).collect();
    assert_eq!(prompts, ["The cat sat on the", "The dog", "The cat sat on the", "The dog"]);
    let metrics = metrics(&path("run"));
    assert!(metrics[19]["logp/chosen"].as_f64() > metrics[0]["logp/chosen"].as_f64());
    assert!(metrics[19]["logp/rejected"].as_f64() < metrics[0]["logp/rejected"].as_f64());
}

#[test]
fn what_dpo_cannot_use_is_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let out = path("run");
    let refused = |settings: DpoSettings, words: &[&str]| refused(go_dpo, &settings, &out, words);
    refused(DpoSettings { beta: 0.0, ..short_dpo(&out) }, &["--beta is 0, expected"]);
    let label_smoothing = 0.6;
    refused(DpoSettings { label_smoothing, ..short_dpo(&out) }, &["--label-smoothing is 0.6"]);
    let loss = PreferenceLoss::Hinge;
    let hinge =
        |gamma, label_smoothing| DpoSettings { loss, gamma, label_smoothing, ..short_dpo(&out) };
    refused(hinge(0.0, 0.1), &["--loss is refused", "label_smoothing", "0 for this loss"]);
    refused(hinge(0.5, 0.0), &["--loss is refused", "gamma", "0 for this loss"]);
    let loss = PreferenceLoss::Kto;
    refused(DpoSettings { loss, ..short_dpo(&out) }, &["--loss kto is refused"]);
    let same = r#"{"prompt": "The", "chosen": "cat", "rejected": "cat"}"#;
    let preferences = Some(write(path("same.jsonl"), same));
    refused(DpoSettings { preferences, ..short_dpo(&out) }, &["same.jsonl:1", "are the same"]);
    let prompts = Some(write(path("walrus.txt"), "The walrus"));
    refused(DpoSettings { prompts, ..short_dpo(&out) }, &["--prompts: prompt 1", "walrus"]);
    let preferences = Some(path("none.jsonl"));
    refused(DpoSettings { preferences, ..short_dpo(&out) }, &["cannot read --preferences"]);
}

// ---------------------------------------------------------------- train with a reward model

fn short_train(out: &Path, reward: &Path) -> Settings {
    Settings {
        out: Some(out.into()),
        reward: RewardKind::Model(reward.into()),
        lm_steps: 10,
        steps: 2,
        batch_size: 8,
        minibatch_size: 4,
        max_new_tokens: 8,
        ..Settings::default()
    }
}

fn go_train(settings: &Settings) -> anyhow::Result<()> {
    train::run(settings, &AtomicBool::new(false), &silent())
}

#[test]
fn train_takes_scores_and_critic_from_a_reward_model() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    // Another seed: the reward model is not the policy with another head.
    go_reward(&RewardModelSettings { seed: 9, ..short_reward(&path("reward")) }).unwrap();
    let weights = path("reward/weights");
    let still =
        Settings { steps: 1, value_learning_rate: 0.0, ..short_train(&path("run"), &weights) };
    go_train(&still).unwrap();
    go_train(&Settings { out: Some(path("again")), ..still.clone() }).unwrap();
    let critic_from = Some(CriticFrom::Policy);
    go_train(&Settings { out: Some(path("policy")), critic_from, ..still }).unwrap();

    let RewardModel { critic, tokenizer } = load_reward(&weights, &Device::Cpu).unwrap();
    let samples = lines(path("run/samples.jsonl"));
    assert_eq!(samples.len(), 16);
    for sample in &samples {
        let text = |key: &str| sample[key].as_str().unwrap();
        let mut example =
            Example::encode(&tokenizer, &text("prompt").into(), text("response")).unwrap();
        if sample["finished"] == false {
            example.response.pop();
        }
        let score = to_vec(&critic.scores(&[example.tokens()], tokenizer.pad()).unwrap());
        assert_close("score", &score, &[sample["score"].as_f64().unwrap()], 1e-4, 1e-4);
    }
    for name in ["samples.jsonl", "weights/model.safetensors", "weights/value_model.safetensors"] {
        assert!(
            fs::read(path("run").join(name)).unwrap()
                == fs::read(path("again").join(name)).unwrap()
        );
    }

    // The critic did not learn: it is what it started from.
    let heads = ["run", "policy"].map(|run| {
        let critic = load_critic(&path(run).join("weights"), &Device::Cpu).unwrap();
        critic.tensors().into_iter().map(|(_, tensor)| to_vec(&tensor)).collect::<Vec<_>>()
    });
    let reward: Vec<_> = critic.tensors().into_iter().map(|(_, tensor)| to_vec(&tensor)).collect();
    assert!(heads[0] == reward);
    assert!(heads[1] != reward);
}

/// A reward model of another shape than the policy's, and of another vocabulary.
#[test]
fn a_reward_model_may_have_another_shape_but_no_other_vocabulary() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let Loaded { decoder, tokenizer } = embedded::model(0, &Device::Cpu).unwrap();
    let narrow =
        DecoderConfig { hidden_size: 32, num_hidden_layers: 1, ..decoder.config().clone() };
    let narrow = |context: usize| {
        let config = DecoderConfig { max_position_embeddings: context, ..narrow.clone() };
        Critic::new(Decoder::random(config, 1, &Device::Cpu).unwrap(), 2).unwrap()
    };
    save_reward(&path("narrow"), &narrow(64), &tokenizer).unwrap();
    go_train(&short_train(&path("run"), &path("narrow"))).unwrap();
    let critic = load_critic(&path("run/weights"), &Device::Cpu).unwrap();
    assert_eq!(critic.config().hidden_size, 32);
    load(&path("run/weights"), &Device::Cpu).unwrap();

    let out = path("refused");
    let refused = |words: &[&str]| {
        refused(go_train, &short_train(&out, &path("bad")), &out, words);
    };
    refused(&["--reward model is refused", "cannot read"]);
    save_reward(&path("bad"), &narrow(12), &tokenizer).unwrap();
    refused(&["--prompts", "context of 12"]);
    let json = tokenizer.to_json().unwrap().replace("\"cat\"", "\"walrus\"");
    let other = Tokenizer::from_json(json.as_bytes(), Vec::new(), vec![1], Some(0)).unwrap();
    save_reward(&path("bad"), &narrow(64), &other).unwrap();
    refused(&["--reward model reads another vocabulary (162 tokens) than the policy writes (162)"]);
    save(&path("bad"), &decoder, &tokenizer).unwrap();
    refused(&["--reward model is refused", "expected LlamaForSequenceClassification"]);
}

// ---------------------------------------------------------------- settings

/// The settings that `COMMAND FLAGS` resolves to.
fn resolve<S: RunSettings>(flags: &[&str], embedded: &str) -> Result<S, String> {
    let matches = ConfigArgs::<S>::augment_args(Command::new("it"))
        .try_get_matches_from([&["it"], flags].concat())
        .map_err(|error| error.to_string())?;
    let args = ConfigArgs::<S>::from_arg_matches(&matches).map_err(|error| error.to_string())?;
    args.resolve(&matches, embedded).map_err(|error| format!("{error:#}"))
}

/// Defaults, the embedded run's settings and what is written all load again, and a float that
/// `validate` forgets would let NaN through.
fn settings_are_whole<S: RunSettings + PartialEq + std::fmt::Debug>(embedded: &str, floats: usize) {
    let dir = tempfile::tempdir().unwrap();
    let without_model = resolve::<S>(&[], embedded).unwrap();
    assert_ne!(without_model, S::default(), "the embedded run has settings of its own");
    let file = write(dir.path().join("c.toml"), without_model.to_toml().unwrap());
    let file = file.to_str().unwrap();
    assert_eq!(resolve::<S>(&["--config", file], embedded).unwrap(), without_model);
    let flags = ["--config", file, "--steps", "7", "--out", "there"];
    let mut changed = resolve::<S>(&flags, embedded).unwrap();
    assert_eq!(changed.out().take().unwrap(), Path::new("there"));
    assert!(changed.to_toml().unwrap().contains("steps = 7"));

    let table = toml::Table::try_from(S::default()).unwrap();
    let keys: Vec<_> = table.iter().filter(|(_, v)| v.is_float()).map(|(k, _)| k.clone()).collect();
    assert_eq!(keys.len(), floats, "{keys:?}");
    for key in keys {
        let mut table = table.clone();
        table.insert(key.clone(), toml::Value::Float(f64::NAN));
        let settings: S = table.try_into().unwrap();
        let error = settings.validate().unwrap_err().to_string();
        assert!(error.contains(&format!("--{} is NaN", key.replace('_', "-"))), "{error}");
    }
    let bad = write(dir.path().join("bad.toml"), "steps = 1\nclip_rage = 2\n");
    let error = resolve::<S>(&["--config", bad.to_str().unwrap()], embedded).unwrap_err();
    assert!(error.contains("line 2") && error.contains("clip_rage"), "{error}");
}

#[test]
fn the_settings_of_sft_are_whole() {
    settings_are_whole::<SftSettings>(embedded::SFT, 4);
}

#[test]
fn the_settings_of_reward_are_whole() {
    settings_are_whole::<RewardModelSettings>(embedded::REWARD, 5);
}

#[test]
fn the_settings_of_dpo_are_whole() {
    settings_are_whole::<DpoSettings>(embedded::DPO, 8);
}
