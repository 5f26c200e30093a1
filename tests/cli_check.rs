//! `check` and `bench-table` from outside.

use std::fs;
use std::path::Path;

use assert_cmd::assert::Assert;
use assert_cmd::Command;

fn program(args: &[&str]) -> Assert {
    Command::new(env!("CARGO_BIN_EXE_ppo-kernels")).args(args).assert()
}

fn stdout(assert: &Assert) -> String {
    String::from_utf8(assert.get_output().stdout.clone()).unwrap()
}

fn stderr(assert: &Assert) -> String {
    String::from_utf8(assert.get_output().stderr.clone()).unwrap()
}

#[test]
fn check_passes_for_every_op_pass_and_dtype() {
    passes("cpu");
}

#[cfg(feature = "cuda")]
#[test]
fn check_passes_on_a_gpu() {
    passes("cuda");
}

fn passes(device: &str) {
    let table = stdout(&program(&["check", "--seed", "7", "--device", device]).success());
    assert!(table.starts_with(&format!("device {device}, seed 7\n")), "{table}");
    let mut rows = Vec::new();
    let by_dtype = ["logprob", "full_kl", "linear"];
    // The head is on the CPU alone.
    for op in &by_dtype[..if device == "cpu" { 3 } else { 2 }] {
        for dtype in ["f32", "f16", "bf16"] {
            rows.extend(["forward", "backward"].map(|pass| format!("| {op} | {pass} | {dtype} |")));
        }
    }
    for op in ["token_kl", "whiten", "ppo_loss", "preference"] {
        rows.extend(["forward", "backward"].map(|pass| format!("| {op} | {pass} | f32 |")));
    }
    rows.extend(
        ["gae", "advantages", "token_baseline", "correction"]
            .map(|op| format!("| {op} | forward | f32 |")),
    );
    for row in &rows {
        assert_eq!(table.matches(row).count(), 1, "{row} in\n{table}");
    }
    assert_eq!(table.matches("| ok |").count(), rows.len(), "{table}");
}

#[test]
fn check_fails_when_a_bound_is_exceeded() {
    let assert = program(&["check", "--seed", "7", "--bound-scale", "1e-3"]).code(1);
    let table = stdout(&assert);
    let exceeded = table.matches("| exceeded |").count();
    assert!(exceeded > 10, "{table}");
    assert_eq!(stderr(&assert), format!("error: {exceeded} rows exceed their bound\n"));
}

#[test]
fn check_draws_new_inputs_unless_given_a_seed() {
    let run = |args: &[&str]| stdout(&program(args).success());
    assert_eq!(run(&["check", "--seed", "3"]), run(&["check", "--seed", "3"]));
    assert_ne!(run(&["check"]).lines().next(), run(&["check"]).lines().next());
}

#[test]
fn check_refuses_a_scale_that_is_not_above_0() {
    for scale in ["0", "-1", "nan", "inf"] {
        let assert = program(&["check", &format!("--bound-scale={scale}")]).code(1).stdout("");
        assert!(stderr(&assert).contains("--bound-scale"), "{}", stderr(&assert));
    }
}

/// What criterion leaves for one function of a group.
fn measured(dir: &Path, group: &str, function: &str, nanoseconds: f64) {
    let new = dir.join(group.replace('/', "_")).join(function).join("new");
    fs::create_dir_all(&new).unwrap();
    let benchmark = format!(
        r#"{{"group_id":"{group}","function_id":"{function}","value_str":null,
            "throughput":{{"Bytes":2000000}},"full_id":"{group}/{function}"}}"#
    );
    let estimates = format!(
        r#"{{"mean":{{"point_estimate":1.0}},"median":{{"point_estimate":{nanoseconds}}}}}"#
    );
    fs::write(new.join("benchmark.json"), benchmark).unwrap();
    fs::write(new.join("estimates.json"), estimates).unwrap();
}

#[test]
fn bench_table_has_time_rate_factor_and_share_in_order_of_size() {
    let dir = tempfile::tempdir().unwrap();
    for (function, time) in [("fused", 100_000.0), ("candle", 3.21e6), ("limit", 71_000.0)] {
        measured(dir.path(), "gae/f32_512x2048", function, time);
    }
    measured(dir.path(), "gae/f32_64x2048", "fused", 12_345.0);
    fs::create_dir_all(dir.path().join("report")).unwrap();
    fs::create_dir_all(dir.path().join("gae_f32_64x2048/report")).unwrap();

    let assert = program(&["bench-table", dir.path().to_str().unwrap()]).success();
    let expected = "\
| op | shape | time | GB/s | over candle | of the limit |
|---|---|--:|--:|--:|--:|
| gae | f32_64x2048 | 12.3 µs | 162.0 | - | - |
| gae | f32_512x2048 | 100 µs | 20.0 | 32.1 | 71% |
";
    assert_eq!(stdout(&assert), expected);
}

#[test]
fn bench_table_says_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |path: &Path, words: &[&str]| {
        let assert = program(&["bench-table", path.to_str().unwrap()]).code(1).stdout("");
        let stderr = stderr(&assert);
        for word in words {
            assert!(stderr.contains(word), "{word} not in: {stderr}");
        }
    };
    refused(&dir.path().join("nowhere"), &["nowhere", "cargo bench"]);
    refused(dir.path(), &["no results", "cargo bench"]);

    measured(dir.path(), "gae/f32_64x2048", "limit", 1.0);
    refused(dir.path(), &["gae/f32_64x2048", "`fused`"]);

    measured(dir.path(), "gae/f32_64x2048", "fused", 1.0);
    let estimates = dir.path().join("gae_f32_64x2048/fused/new/estimates.json");
    fs::write(&estimates, "{}").unwrap();
    refused(dir.path(), &["fused/new/estimates.json", "criterion"]);
    fs::remove_file(&estimates).unwrap();
    refused(dir.path(), &["cannot read", "fused/new/estimates.json"]);
}
