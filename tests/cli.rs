//! The program from outside: what it prints, where it stops, what it leaves.

use std::fs;
use std::path::Path;

use assert_cmd::assert::Assert;
use assert_cmd::Command;
use serde_json::Value;

/// Flags of a run of the embedded model that takes a second or two.
fn small(steps: &'static str) -> Vec<&'static str> {
    let flags = [
        ["--steps", steps],
        ["--lm-steps", "2"],
        ["--batch-size", "4"],
        ["--minibatch-size", "2"],
        ["--max-new-tokens", "4"],
    ];
    flags.concat()
}

fn train(dir: &Path, flags: &[&str]) -> Assert {
    Command::new(env!("CARGO_BIN_EXE_ppo-kernels"))
        .current_dir(dir)
        .arg("train")
        .args(flags)
        .timeout(std::time::Duration::from_secs(300))
        .assert()
}

fn stdout(assert: &Assert) -> String {
    String::from_utf8(assert.get_output().stdout.clone()).unwrap()
}

fn stderr(assert: &Assert) -> String {
    String::from_utf8(assert.get_output().stderr.clone()).unwrap()
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The run is refused with one `error:` on stderr that has `message`, before anything is made.
fn refused(dir: &Path, flags: &[&str], message: &str) {
    let entries = || {
        let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    };
    let before = entries();
    let assert = train(dir, flags).code(1).stdout("");
    let stderr = stderr(&assert);
    assert!(stderr.starts_with("error: "), "{flags:?} gave: {stderr}");
    assert!(stderr.contains(message), "{flags:?} gave: {stderr}");
    assert_eq!(entries(), before, "{flags:?} left something behind");
}

#[test]
fn usage_is_shown_and_wrong_usage_ends_with_2() {
    let program = || Command::new(env!("CARGO_BIN_EXE_ppo-kernels"));
    program().assert().code(2);
    program().arg("--version").assert().success();
    let dir = tempfile::tempdir().unwrap();
    let help = stdout(&train(dir.path(), &["--help"]).success());
    for flag in ["--config", "--model", "--clip-range", "--reward-command", "[default: 0.2]"] {
        assert!(help.contains(flag), "{help}");
    }
    for flags in [
        &["--clip-rage", "0.1"][..],
        &["--steps", "many"],
        &["--steps", "-1"],
        &["--reward", "kindness"],
        &["--device", "abacus"],
        &["--device", "cuda:-1"],
        &["--steps"],
        &["stray"],
    ] {
        let assert = train(dir.path(), flags).code(2).stdout("");
        let argument = flags.iter().find(|flag| !flag.starts_with("--steps")).unwrap_or(&flags[0]);
        assert!(stderr(&assert).contains(argument), "{}", stderr(&assert));
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn settings_are_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    refused(dir, &["--clip-range", "nan"], "--clip-range is NaN, expected a finite number above 0");
    refused(dir, &["--learning-rate", "inf"], "--learning-rate is inf");
    refused(dir, &["--kl-coef", "-1"], "--kl-coef is -1");
    refused(dir, &["--batch-size", "6", "--minibatch-size", "4"], "--minibatch-size is 4");
    refused(dir, &["--model", "m.gguf"], "--prompts is missing");
    fs::write(dir.join("c.toml"), "steps = 2\nclip_rage = 0.1\n").unwrap();
    refused(dir, &["--config", "c.toml"], "--config c.toml is refused: TOML parse error at line 2");
    refused(dir, &["--config", "none.toml"], "cannot read --config none.toml: ");
}

#[test]
fn a_device_that_is_not_there_is_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let why = if cfg!(feature = "cuda") {
        "CUDA d" // river or device
    } else {
        "this program was built without CUDA; build it with --features cuda,driver"
    };
    for flag in ["--device=cuda:99", "--config=c.toml"] {
        fs::write(dir.path().join("c.toml"), "device = \"cuda:99\"\n").unwrap();
        refused(dir.path(), &[flag], "--device cuda:99 cannot be used: ");
        refused(dir.path(), &[flag], why);
    }
}

#[cfg(feature = "cuda")]
#[test]
fn a_run_on_a_gpu_writes_what_a_run_on_the_cpu_does() {
    let dir = tempfile::tempdir().unwrap();
    train(dir.path(), &[small("2"), vec!["--device", "cuda", "--out", "run"]].concat()).success();
    let run = dir.path().join("run");
    let metrics = lines(&run.join("metrics.jsonl"));
    assert_eq!(metrics.len(), 2);
    for line in metrics {
        let null: Vec<_> = line.as_object().unwrap().iter().filter(|(_, v)| v.is_null()).collect();
        assert!(null.is_empty(), "{null:?}");
    }
    let config = fs::read_to_string(run.join("config.toml")).unwrap();
    assert!(config.contains("device = \"cuda\""), "{config}");
    assert!(run.join("weights/model.safetensors").exists());
}

#[test]
fn inputs_are_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(dir.join("empty.txt"), "\n\n").unwrap();
    refused(dir, &["--prompts", "empty.txt"], "--prompts empty.txt holds no prompt");
    refused(dir, &["--prompts", "none.txt"], "cannot read --prompts none.txt: ");
    fs::write(dir.join("p.jsonl"), "{\"prompt\": \"The cat\"}\n{\"text\": 1}\n").unwrap();
    refused(dir, &["--prompts", "p.jsonl"], "--prompts p.jsonl:2: expected {\"prompt\": \"..\"}");

    refused(dir, &["--reward", "regex", "--reward-pattern", "("], "--reward-pattern `(`");
    for (command, message) in [
        ("exit 3", "it ended with exit status: 3"),
        ("echo hello", "line 1 of the answer is not"),
        ("sleep 60", "it did not end within 0.5 s (--reward-timeout)"),
    ] {
        let flags = ["--reward", "command", "--reward-timeout", "0.5", "--reward-command", command];
        refused(dir, &flags, &format!("--reward-command `{command}`: {message}"));
    }

    fs::write(dir.join("p.txt"), "The cat\n").unwrap();
    for (model, message) in [("none.gguf", "cannot read none.gguf"), ("p.txt", "or a GGUF file")] {
        let flags = ["--prompts", "p.txt", "--model", model];
        refused(dir, &flags, "error: --model is refused: ");
        refused(dir, &flags, message);
    }

    refused(dir, &["--out", "empty.txt"], "--out empty.txt");
    refused(dir, &["--out", "empty.txt/below"], "--out empty.txt/below");
    fs::create_dir(dir.join("old")).unwrap();
    fs::write(dir.join("old/metrics.jsonl"), "precious").unwrap();
    refused(dir, &["--out", "old"], "--out old already holds a run");
    assert_eq!(fs::read_to_string(dir.join("old/metrics.jsonl")).unwrap(), "precious");
}

#[test]
fn a_run_reports_each_step_and_repeats_from_its_config() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let first = train(dir, &[small("2"), vec!["--seed", "7"]].concat()).success();
    let shown = stdout(&first);
    assert!(shown.contains("policy loss"), "{shown}");
    for step in ["1/2", "2/2"] {
        assert!(shown.lines().any(|line| line.trim_start().starts_with(step)), "{shown}");
    }
    // No bar, no escape sequence where there is no terminal.
    assert!(!shown.contains('\u{1b}') && !shown.contains('\r'), "{shown:?}");
    assert_eq!(stderr(&first), "");

    let run = dir.join("runs/train-1");
    let metrics = lines(&run.join("metrics.jsonl"));
    assert_eq!(metrics.len(), 2);
    assert_eq!((&metrics[0]["step"], &metrics[1]["step"]), (&1.into(), &2.into()));
    for name in ["objective/scores", "objective/kl", "loss/policy_avg", "perf/throughput"] {
        assert!(metrics[0][name].is_number(), "{name} in {}", metrics[0]);
    }
    let samples = lines(&run.join("samples.jsonl"));
    assert!(samples.iter().any(|sample| sample["step"] == 2), "{samples:?}");

    // The same run again, into the next free folder.
    train(dir, &["--config", "runs/train-1/config.toml"]).success();
    let again = dir.join("runs/train-2");
    let read = |run: &Path, name: &str| fs::read_to_string(run.join(name)).unwrap();
    for name in ["config.toml", "samples.jsonl"] {
        assert_eq!(read(&run, name), read(&again, name), "{name}");
    }
    let timeless = |run: &Path| {
        let mut metrics = lines(&run.join("metrics.jsonl"));
        for line in &mut metrics {
            let timed = |key: &str| key.starts_with("timing_s/") || key.starts_with("perf/");
            line.as_object_mut().unwrap().retain(|key, _| !timed(key));
        }
        metrics
    };
    assert_eq!(timeless(&run), timeless(&again));
}

#[test]
fn a_reward_command_scores_a_whole_run() {
    let dir = tempfile::tempdir().unwrap();
    let command = r#"awk '{ print "{\"score\": " length($0) / 100 "}" }'"#;
    let flags = ["--reward", "command", "--reward-command", command, "--out", "deep/run"];
    train(dir.path(), &[small("2"), flags.to_vec()].concat()).success();
    let samples = lines(&dir.path().join("deep/run/samples.jsonl"));
    assert!(samples.iter().all(|sample| sample["score"].as_f64().is_some_and(|x| x > 0.0)));
}

/// A limit on the size of a file, which is what a full disk looks like to a program.
#[cfg(unix)]
#[test]
fn a_disk_that_fills_up_leaves_whole_lines_and_is_told_with_what_it_cost() {
    let dir = tempfile::tempdir().unwrap();
    // 512-byte blocks: room for the settings, the samples and one line of metrics.
    let limited = "trap '' XFSZ; ulimit -f 4; exec \"$0\" train --out run \"$@\"";
    let assert = Command::new("sh")
        .current_dir(dir.path())
        .args(["-c", limited, env!("CARGO_BIN_EXE_ppo-kernels")])
        .args(small("3"))
        .assert()
        .code(1);
    let stderr = stderr(&assert);
    for part in ["left no weights (cannot save", "cannot write run/metrics.jsonl: "] {
        assert!(stderr.contains(part), "{stderr}");
    }
    let run = dir.path().join("run");
    assert_eq!(lines(&run.join("metrics.jsonl")).len(), 1);
    assert!(!lines(&run.join("samples.jsonl")).is_empty());
    assert!(!run.join("weights/model.safetensors").exists());
    assert!(!run.join("weights/model.partial").exists());
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_after_the_step_with_everything_written() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    let dir = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_ppo-kernels"))
        .current_dir(dir.path())
        .args(["train", "--out", "run"])
        .args(small("100000"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut shown = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(shown.any(|line| line.trim_start().starts_with("2/100000")));
    let interrupt = format!("kill -s INT {}", child.id());
    assert!(Command::new("sh").args(["-c", &interrupt]).status().unwrap().success());
    let after: Vec<String> = shown.collect();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("stopping after this step"), "{stderr}");

    let steps = lines(&dir.path().join("run/metrics.jsonl")).len();
    assert!((2..1000).contains(&steps), "{steps}");
    assert!(after.iter().any(|line| line.contains("stopped after")), "{after:?}");
    let weights = dir.path().join("run/weights/model.safetensors");
    assert!(fs::metadata(weights).unwrap().len() > 0);
}

#[cfg(unix)]
#[test]
fn a_second_ctrl_c_quits_at_once() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("mark");
    let mut child = Command::new(env!("CARGO_BIN_EXE_ppo-kernels"))
        .current_dir(dir.path())
        .args(["train", "--reward", "command", "--reward-command", "touch mark; sleep 5"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while !mark.exists() && start.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let interrupt = format!("kill -s INT {}", child.id());
    let interrupt = || Command::new("sh").args(["-c", &interrupt]).status().unwrap();
    interrupt();
    let mut said = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut said).unwrap();
    assert!(said.contains("Ctrl-C again quits at once"), "{said}");
    interrupt();
    assert_eq!(child.wait().unwrap().code(), Some(130));
}
