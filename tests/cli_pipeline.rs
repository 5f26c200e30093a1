//! The subcommands that lead from demonstrations to a policy, from outside.

use std::fs;
use std::path::Path;

use assert_cmd::assert::Assert;
use assert_cmd::Command;
use serde_json::Value;

fn program(dir: &Path, args: &[&str]) -> Assert {
    Command::new(env!("CARGO_BIN_EXE_ppo-kernels"))
        .current_dir(dir)
        .args(args)
        .timeout(std::time::Duration::from_secs(300))
        .assert()
}

fn stdout(assert: &Assert) -> String {
    String::from_utf8(assert.get_output().stdout.clone()).unwrap()
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Refused with one line on stderr that has `message`, and nothing left behind.
fn refused(dir: &Path, args: &[&str], message: &str) {
    let count = || fs::read_dir(dir).unwrap().count();
    let before = count();
    let assert = program(dir, args).code(1).stdout("");
    let stderr = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
    assert!(
        stderr.starts_with("error: ") && stderr.lines().count() == 1,
        "{args:?} gave: {stderr}"
    );
    assert!(stderr.contains(message), "{args:?} gave: {stderr}");
    assert_eq!(count(), before, "{args:?} left something behind");
}

/// The README's way, each step from the folder of the one before.
#[test]
fn each_step_takes_what_the_one_before_has_left() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let run = |args: &str| {
        let args: Vec<&str> = args.split(' ').collect();
        stdout(&program(dir, &args).success().stderr(""))
    };
    let shown = run("sft --steps 40 --learning-rate 0.003");
    assert!(shown.lines().any(|line| line.trim_start().starts_with("40/40")), "{shown}");
    assert!(shown.contains("are in runs/sft-1"), "{shown}");

    let pair = |chosen: &str, rejected: &str| {
        let prompt = "The cat sat on the";
        let pair = serde_json::json!({"prompt": prompt, "chosen": chosen, "rejected": rejected});
        format!("{pair}\n")
    };
    let pairs = pair("mat and was happy.", "mat and was sad.") + &pair("roof.", "roof and cried.");
    fs::write(dir.join("pairs.jsonl"), pairs).unwrap();
    fs::write(dir.join("prompts.txt"), "The cat sat on the\nThe dog\n").unwrap();
    let from = "--model runs/sft-1/weights --steps 2 --batch-size 2";
    let pairs = "--preferences pairs.jsonl --held-out 0.5";
    let shown = run(&format!("reward {from} {pairs}"));
    assert!(shown.contains("| mat and was happy."), "{shown}");
    run(&format!("dpo {from} {pairs} --out dpo"));
    let rest = "--minibatch-size 2 --max-new-tokens 4 --score-scaling --prompts prompts.txt";
    run(&format!("train {from} --reward model:runs/reward-1/weights {rest} --out ppo"));
    assert!(fs::read_to_string(dir.join("ppo/config.toml"))
        .unwrap()
        .contains("score_scaling = true"));

    // The same again, of the config.toml that it left.
    run("reward --config runs/reward-1/config.toml");
    for name in ["config.toml", "samples.jsonl"] {
        let read = |run: &str| fs::read_to_string(dir.join(run).join(name)).unwrap();
        assert_eq!(read("runs/reward-1"), read("runs/reward-2"), "{name}");
    }

    let models = "--model runs/sft-1/weights --model ppo/weights --max-new-tokens 4";
    let shown = run(&format!("generate {models} --prompts prompts.txt --out said.jsonl"));
    for line in ["The cat sat on the", "The dog"] {
        assert!(shown.lines().any(|shown| shown == line), "{shown}");
    }
    assert!(
        shown.contains("  runs/sft-1/weights | ") && shown.contains("  ppo/weights | "),
        "{shown}"
    );
    let said = lines(&dir.join("said.jsonl"));
    assert_eq!(said.len(), 4);
    assert_eq!(said[0]["model"], "runs/sft-1/weights");
    // What was said can be learned.
    run("sft --demonstrations said.jsonl --steps 1 --out again");

    let shown = run(&format!(
        "eval {models} --reference runs/sft-1/weights --reward model:runs/reward-1/weights --out scored.jsonl"
    ));
    let rows: Vec<&str> = shown.lines().filter(|line| line.contains("/weights ")).collect();
    assert_eq!(rows.len(), 2, "{shown}");
    assert!(shown.contains("24 prompts, --reward model:runs/reward-1/weights"), "{shown}");
    let scored = lines(&dir.join("scored.jsonl"));
    assert_eq!(scored.len(), 48);
    let mean = |model: &str| {
        let scores: Vec<f64> = (scored.iter())
            .filter(|line| line["model"] == model)
            .map(|line| line["score"].as_f64().unwrap())
            .collect();
        scores.iter().sum::<f64>() / scores.len() as f64
    };
    for (row, model) in rows.iter().zip(["runs/sft-1/weights", "ppo/weights"]) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        assert!(
            cells[1] == model && cells[2].starts_with(&format!("{:+.3}", mean(model))),
            "{row}"
        );
    }
    // A model does not differ from itself.
    assert!(rows[0].contains("| 0.00 |"), "{}", rows[0]);
}

#[test]
fn answers_of_a_seed_are_the_same_and_the_likeliest_do_not_depend_on_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let sft = ["sft", "--steps", "40", "--learning-rate", "0.003", "--out", "sft"];
    program(dir, &sft).success();
    let answers = |flags: &[&str]| {
        let args = [&["generate", "--model", "sft/weights", "--limit", "5"], flags].concat();
        stdout(&program(dir, &args).success())
    };
    let first = answers(&["--seed", "1"]);
    assert_eq!(first.lines().count(), 5);
    assert!(first.starts_with("The cat sat on the | "), "{first}");
    assert_eq!(first, answers(&["--seed", "1"]));
    assert_ne!(first, answers(&["--seed", "2"]));
    let greedy = |seed: &str| answers(&["--temperature", "0", "--seed", seed]);
    assert_eq!(greedy("1"), greedy("2"));
}

#[test]
fn what_generate_and_eval_cannot_use_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    program(dir, &["sft", "--steps", "1", "--out", "sft"]).success();
    fs::write(dir.join("there.jsonl"), "precious").unwrap();
    fs::write(dir.join("walrus.txt"), "The walrus\n").unwrap();
    let model = ["--model", "sft/weights", "--out", "new.jsonl"];
    for command in ["generate", "eval"] {
        let refused = |flags: &[&str], message: &str| {
            refused(dir, &[&[command], &model[..], flags].concat(), message);
        };
        refused(&["--model", "none"], "--model is refused: cannot read none");
        refused(&["--prompts", "walrus.txt"], "--model sft/weights: --prompts: prompt 1");
        refused(&["--max-new-tokens", "60"], "does not fit the model's context of 64");
        refused(&["--temperature", "-1"], "--temperature");
        refused(&["--top-p", "0"], "--top-p");
        refused(&["--limit", "0"], "--limit is 0");
        refused(&["--device", "cuda:99"], "--device cuda:99 cannot be used");
        let out = ["--model", "sft/weights", "--out", "there.jsonl"];
        super_refused(dir, command, &out);
    }
    let refused = |flags: &[&str], message: &str| {
        refused(dir, &[&["eval"], &model[..], flags].concat(), message);
    };
    refused(&["--reward", "regex"], "--reward-pattern is missing");
    refused(&["--reward", "model:sft/weights"], "expected LlamaForSequenceClassification");
    refused(&["--reference", "none"], "--reference is refused: cannot read none");
    assert_eq!(fs::read_to_string(dir.join("there.jsonl")).unwrap(), "precious");
}

fn super_refused(dir: &Path, command: &str, out: &[&str]) {
    refused(dir, &[&[command], out].concat(), "--out there.jsonl cannot be made");
}

/// All of the demo in small, twice.
#[test]
fn the_demo_compares_its_models_and_repeats() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let sizes =
        "--pairs 40 --prompts 12 --sft-steps 60 --reward-steps 5 --ppo-steps 2 --dpo-steps 5";
    let demo = |out: &str| {
        let args =
            [&["demo", "--seed", "3", "--out", out], &sizes.split(' ').collect::<Vec<_>>()[..]];
        stdout(&program(dir, &args.concat()).success().stderr(""))
    };
    let shown = demo("a");
    let table = fs::read_to_string(dir.join("a/comparison.md")).unwrap();
    assert!(shown.contains(&table), "{shown}");
    assert_eq!(table.lines().count(), 6);
    let metrics = lines(&dir.join("a/metrics.jsonl"));
    let models: Vec<_> = metrics.iter().map(|line| line["model"].as_str().unwrap()).collect();
    assert_eq!(models, ["sft", "ppo-built-in", "ppo-reward-model", "dpo"]);
    assert_eq!(metrics[0]["gain"], 0.0);
    assert_eq!(metrics[0]["kl"], 0.0);
    let samples = lines(&dir.join("a/samples.jsonl"));
    assert_eq!(samples.len(), 4 * 12);
    // No prompt of the comparison was learned from.
    let learned = fs::read_to_string(dir.join("a/prompts.txt")).unwrap();
    let learned: Vec<&str> = learned.lines().collect();
    assert!(samples.iter().all(|s| !learned.contains(&s["prompt"].as_str().unwrap())));
    let asked = lines(&dir.join("a/preferences.jsonl"));
    assert!(asked.iter().all(|pair| learned.contains(&pair["prompt"].as_str().unwrap())));

    demo("b");
    for name in ["comparison.md", "preferences.jsonl", "samples.jsonl", "metrics.jsonl"] {
        let read = |run: &str| fs::read(dir.join(run).join(name)).unwrap();
        assert!(read("a") == read("b"), "{name} differs");
    }
    for run in ["sft", "reward", "ppo-built-in", "ppo-reward-model", "dpo"] {
        let read = |demo: &str| {
            fs::read(dir.join(demo).join(run).join("weights/model.safetensors")).unwrap()
        };
        assert!(read("a") == read("b"), "the weights of {run} differ");
    }
    refused(dir, &["demo", "--out", "a"], "--out a already holds a run");
    refused(dir, &["demo", "--prompts", "2000"], "--prompts is 2000, expected at most");
    refused(dir, &["demo", "--pairs", "0"], "--pairs is 0");
}
