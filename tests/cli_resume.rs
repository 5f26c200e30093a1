//! Runs that are killed or stopped, and go on as if they had not been.
#![cfg(unix)]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

const TRAIN: &str =
    "train --lm-steps 2 --batch-size 4 --minibatch-size 2 --max-new-tokens 4 --score-scaling \
    --kl-controller adaptive --steps 6 --save-every 2";

fn command(dir: &Path, args: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ppo-kernels"));
    command.current_dir(dir).args(args.split_whitespace());
    command
}

fn run(dir: &Path, args: &str) -> Output {
    command(dir, args).output().unwrap()
}

/// The run's stdout, of one that succeeds.
#[track_caller]
fn succeeds(dir: &Path, args: &str) -> String {
    let output = run(dir, args);
    assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Refused with one line on stderr that has `message`.
#[track_caller]
fn refused(dir: &Path, args: &str, message: &str) {
    let output = run(dir, args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{args}: {stderr}");
    assert!(stderr.starts_with("error: ") && stderr.lines().count() == 1, "{stderr}");
    assert!(stderr.contains(message), "{stderr}");
}

fn spawn(dir: &Path, args: &str) -> Child {
    command(dir, args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn signal(name: &str, child: &Child) {
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
}

fn steps_of(run: &Path) -> usize {
    fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

/// Waits until so many steps are recorded.
fn wait_for(steps: usize, run: &Path) {
    let start = Instant::now();
    while steps_of(run) < steps {
        assert!(start.elapsed() < Duration::from_secs(120), "no {steps} steps in two minutes");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What a run leaves: weights by file, samples, and metrics but for how long it took.
type Left = (Vec<(String, Vec<u8>)>, String, Vec<Map<String, Value>>);

fn left_by(run: &Path) -> Left {
    let mut weights: Vec<(String, Vec<u8>)> = fs::read_dir(run.join("weights"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into(), fs::read(path).unwrap()))
        .collect();
    weights.sort();
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let metrics = metrics.lines().map(|line| {
        let mut line: Map<String, Value> = serde_json::from_str(line).unwrap();
        line.keys().for_each(|name| assert_described(name));
        line.retain(|key, _| !key.starts_with("timing_s/") && !key.starts_with("perf/"));
        line
    });
    let samples = fs::read_to_string(run.join("samples.jsonl")).unwrap();
    (weights, samples, metrics.collect())
}

/// A metric has a row of its own in the docs; one of the examples held out that of its name without `eval/`.
#[track_caller]
fn assert_described(metric: &str) {
    let described = include_str!("../docs/metrics.md");
    let names = [metric, metric.trim_start_matches("eval/")];
    assert!(names.iter().any(|name| described.contains(&format!("`{name}`"))), "{metric}");
}

#[track_caller]
fn assert_same(what: &str, got: &Path, want: &Path) {
    let ((got_weights, got_samples, got_metrics), (weights, samples, metrics)) =
        (left_by(got), left_by(want));
    assert_eq!(got_metrics, metrics, "{what}");
    assert_eq!(got_samples, samples, "{what}");
    // Not printed, were they to differ.
    assert!(got_weights == weights, "{what}: other weights");
    let names = |dir: &Path| -> Vec<_> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(got), names(want), "{what}");
}

#[test]
fn a_run_killed_at_any_moment_goes_on_to_the_same_end() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let start = Instant::now();
    succeeds(dir, &format!("{TRAIN} --out whole"));
    let length = start.elapsed();
    let shown = succeeds(dir, "train --resume whole");
    assert!(shown.contains("came to its end; nothing to do"), "{shown}");
    assert_eq!(steps_of(&dir.join("whole")), 6);
    for i in 0..4 {
        let run = format!("killed-{i}");
        let mut child = spawn(dir, &format!("{TRAIN} --out {run}"));
        std::thread::sleep(length.mul_f64((f64::from(i) + 0.7) / 5.0));
        let _ = child.kill();
        child.wait().unwrap();
        if !dir.join(&run).join("config.toml").exists() {
            continue; // it had not begun
        }
        // Killed once more on the way.
        let mut child = spawn(dir, &format!("train --resume {run}"));
        std::thread::sleep(length / 4);
        let _ = child.kill();
        child.wait().unwrap();
        succeeds(dir, &format!("train --resume {run}"));
        assert_same(&run, &dir.join(&run), &dir.join("whole"));
    }
}

#[test]
fn a_run_that_is_told_to_stop_goes_on_to_the_same_end() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let of =
        |algorithm: &str| format!("{TRAIN} --algorithm {algorithm} --group-size 2 --eval-every 2");
    let (grpo, rloo, plus_plus) = (of("grpo"), of("rloo"), of("reinforce++"));
    for (i, (name, args)) in [
        ("TERM", TRAIN),
        ("TERM", &grpo),
        ("INT", &rloo),
        ("HUP", &plus_plus),
        ("HUP", "sft --steps 40 --save-every 0"),
        ("INT", "reward --lm-steps 2 --steps 12 --save-every 5"),
        ("TERM", "dpo --lm-steps 2 --steps 12 --save-every 5 --lora-rank 2 --lora-merge"),
    ]
    .into_iter()
    .enumerate()
    {
        let command = args.split(' ').next().unwrap();
        let [stopped, whole] = [format!("stopped-{i}"), format!("whole-{i}")];
        succeeds(dir, &format!("{args} --out {whole}"));
        let mut child = spawn(dir, &format!("{args} --out {stopped}"));
        wait_for(3, &dir.join(&stopped));
        signal(name, &child);
        assert!(child.wait().unwrap().success());
        let done = steps_of(&dir.join(&stopped));
        let checkpoint = dir.join(format!("{stopped}/checkpoint-{done}/state.safetensors"));
        if let Ok(bytes) = fs::read(checkpoint) {
            // The names of the tensors are at its beginning.
            let has_critic = bytes.windows(6).any(|bytes| bytes == b"value.");
            assert_eq!(has_critic, args == TRAIN, "{args}");
        }
        let shown = succeeds(dir, &format!("{command} --resume {stopped}"));
        if done < steps_of(&dir.join(&whole)) {
            let expected = format!("going on in {stopped} after step {done}");
            assert!(shown.contains(&expected), "{shown}");
        }
        assert_same(args, &dir.join(&stopped), &dir.join(&whole));
    }
}

#[test]
fn a_run_without_a_checkpoint_starts_over() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    succeeds(dir, &format!("{TRAIN} --out run"));
    let before = left_by(&dir.join("run"));
    fs::remove_dir_all(dir.join("run/weights")).unwrap();
    let shown = succeeds(dir, "train --resume run");
    assert!(shown.contains("no checkpoint is in run; the run starts over"), "{shown}");
    assert_eq!(left_by(&dir.join("run")), before);
}

#[test]
fn what_does_not_fit_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::create_dir(dir.join("empty")).unwrap();
    refused(dir, "train --resume nowhere", "--resume is refused: ");
    refused(dir, "train --resume empty", "empty/config.toml");
    refused(dir, "demo --resume empty", "--resume is refused: demo makes no checkpoint");
    refused(dir, "train --resume empty --steps 3", "--steps does not go with --resume");
    refused(dir, "train --resume empty --config x.toml", "--config does not go with --resume");

    // A run with a checkpoint, as if it had been killed.
    let mut child = spawn(dir, &format!("{TRAIN} --out run"));
    wait_for(3, &dir.join("run"));
    let _ = child.kill();
    child.wait().unwrap();
    let state = dir.join("run/checkpoint-2/state.json");
    let metrics = fs::read(dir.join("run/metrics.jsonl")).unwrap();
    let text = fs::read_to_string(&state).unwrap();
    let other = String::from_utf8(run(dir, "sft --resume run").stderr).unwrap();
    assert!(other.contains("run/config.toml is refused"), "{other}");
    for (from, to, message) in [
        (r#""version":""#, r#""version":"0.0."#, "is of version 0.0."),
        (r#""reference":"#, r#""reference":1,"was":"#, "the model is another one"),
        ("{", "[", "state.json is damaged"),
        (r#""kl_coef""#, r#""coef""#, "missing field `kl_coef`"),
        (r#""metrics_len":"#, r#""metrics_len":9"#, "metrics.jsonl has"),
        (r#""prompts_left":["#, r#""prompts_left":[9999,"#, "fewer than it had"),
    ] {
        fs::write(&state, text.replacen(from, to, 1)).unwrap();
        refused(dir, "train --resume run", message);
    }
    fs::write(&state, &text).unwrap();
    assert!(fs::read(dir.join("run/metrics.jsonl")).unwrap() == metrics);
    let tensors = dir.join("run/checkpoint-2/state.safetensors");
    let bytes = fs::read(&tensors).unwrap();
    fs::write(&tensors, &bytes[..bytes.len() / 2]).unwrap();
    refused(dir, "train --resume run", "state.safetensors cannot be read");
    fs::write(&tensors, &bytes).unwrap();
    succeeds(dir, "train --resume run");
}
