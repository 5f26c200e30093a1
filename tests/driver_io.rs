//! The driver's settings, rewards, prompt files and run folder.

use std::path::Path;

use clap::{Args, Command, FromArgMatches};
use ppo_kernels::driver::config::{RewardKind, Settings, TrainArgs};

// ---------------------------------------------------------------------------------------------------------- settings

const EMBEDDED: &str = "steps = 11\nreward = \"length\"\n";

/// The settings that `train FLAGS` resolves to, or the error's whole chain.
fn resolve(flags: &[&str]) -> Result<Settings, String> {
    let matches = TrainArgs::augment_args(Command::new("train"))
        .try_get_matches_from([&["train"], flags].concat())
        .map_err(|error| error.to_string())?;
    let args = TrainArgs::from_arg_matches(&matches).map_err(|error| error.to_string())?;
    args.resolve(&matches, EMBEDDED).map_err(|error| format!("{error:#}"))
}

fn refused(flags: &[&str], message: &str) {
    let error = resolve(flags).expect_err(&format!("{flags:?} should be refused"));
    assert!(error.contains(message), "{flags:?} gave: {error}");
}

fn write(path: &Path, text: impl AsRef<[u8]>) -> String {
    std::fs::write(path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn later_layers_win() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(&dir.path().join("c.toml"), "steps = 5\nseed = 3\nkl_coef = 1\n");

    let defaults = Settings::default();
    assert_eq!(defaults.steps, 20);
    assert_eq!(defaults.reward, RewardKind::Sentiment);

    let embedded = resolve(&[]).unwrap();
    assert_eq!((embedded.steps, embedded.reward), (11, RewardKind::Length));
    assert_eq!(embedded.batch_size, defaults.batch_size);

    let from_file = resolve(&["--config", &file]).unwrap();
    assert_eq!((from_file.steps, from_file.seed, from_file.kl_coef), (5, 3, 1.0));
    assert_eq!(from_file.reward, RewardKind::Length);

    // A flag wins even where it says the default.
    let flags = resolve(&["--config", &file, "--steps", "20", "--kl-coef=0.5"]).unwrap();
    assert_eq!((flags.steps, flags.seed, flags.kl_coef), (20, 3, 0.5));

    let real = resolve(&["--model", "m.gguf", "--prompts", "p.txt"]).unwrap();
    assert_eq!((real.steps, real.reward), (20, RewardKind::Sentiment));
    let model = write(&dir.path().join("m.toml"), "model = \"m.gguf\"\nprompts = \"p.txt\"\n");
    assert_eq!(resolve(&["--config", &model]).unwrap().steps, 20);
}

#[test]
fn switches_take_an_optional_value() {
    assert!(resolve(&["--whiten-rewards"]).unwrap().whiten_rewards);
    assert!(!resolve(&["--whiten-advantages", "false", "--steps", "3"]).unwrap().whiten_advantages);
    refused(&["--whiten-rewards", "perhaps"], "--whiten-rewards");
}

#[test]
fn resolved_settings_load_again_unchanged_but_for_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    let flags = [
        "--out",
        "runs/somewhere",
        "--clip-range",
        "0.1",
        "--clip-range-high",
        "0.30000000000000004",
        "--dual-clip",
        "3",
        "--score-clip",
        "1e-7",
        "--missing-eos-penalty",
        "1",
        "--seed",
        "9223372036854775807",
        "--reward",
        "regex",
        "--reward-pattern",
        "-\"'\\w+ \u{e9}\n",
        "--kl-estimator",
        "k3",
        "--kl-controller",
        "adaptive",
        "--aggregation",
        "seq-mean-token-sum-norm",
        "--lr-schedule",
        "constant",
        "--learning-rate",
        "3.3e-6",
        "--whiten-rewards",
    ];
    let first = resolve(&flags).unwrap();
    let file = write(&dir.path().join("config.toml"), first.to_toml().unwrap());
    let again = resolve(&["--config", &file]).unwrap();
    assert_eq!(again.out, None);
    assert_eq!(Settings { out: None, ..first }, again);

    let defaults = Settings::default();
    let file = write(&dir.path().join("defaults.toml"), defaults.to_toml().unwrap());
    assert_eq!(resolve(&["--config", &file]).unwrap(), defaults);
}

#[test]
fn every_number_out_of_range_names_its_flag() {
    refused(&["--clip-range", "nan"], "--clip-range is NaN, expected a finite number above 0");
    for flag in [
        "--temperature",
        "--top-p",
        "--reward-timeout",
        "--score-clip",
        "--missing-eos-penalty",
        "--kl-coef",
        "--kl-target",
        "--kl-horizon",
        "--gamma",
        "--lambda",
        "--clip-range",
        "--clip-range-high",
        "--dual-clip",
        "--value-clip-range",
        "--value-coef",
        "--entropy-coef",
        "--learning-rate",
        "--value-learning-rate",
        "--weight-decay",
        "--max-grad-norm",
    ] {
        for value in ["nan", "inf", "-1"] {
            refused(&[flag, value], &format!("{flag} is "));
        }
        // `-inf` apart from its flag reads as the flag -i.
        refused(&[&format!("{flag}=-inf")], &format!("{flag} is "));
    }
    for flag in ["--temperature", "--top-p", "--clip-range", "--max-grad-norm"] {
        refused(&[flag, "0"], &format!("{flag} is 0"));
    }
    refused(&["--gamma", "1.01"], "--gamma is 1.01");
    refused(&["--dual-clip", "1"], "--dual-clip is 1, expected");
    for flag in [
        "--steps",
        "--batch-size",
        "--minibatch-size",
        "--ppo-epochs",
        "--max-new-tokens",
        "--reward-length",
    ] {
        refused(&[flag, "0"], &format!("{flag} is 0"));
        refused(&[flag, "-1"], flag);
        refused(&[flag, "1.5"], flag);
        refused(&[flag, "9223372036854775808"], flag);
    }
    refused(&["--seed", "9223372036854775808"], "--seed");
}

#[test]
fn every_float_setting_is_checked() {
    // A float field that validate() forgets would let this NaN through.
    let table = toml::Table::try_from(Settings {
        score_clip: Some(1.0),
        missing_eos_penalty: Some(1.0),
        clip_range_high: Some(1.0),
        dual_clip: Some(2.0),
        ..Settings::default()
    })
    .unwrap();
    let floats: Vec<_> = table.iter().filter(|(_, v)| v.is_float()).collect();
    assert_eq!(floats.len(), 20);
    for (key, _) in floats {
        let mut table = table.clone();
        table.insert(key.clone(), toml::Value::Float(f64::NAN));
        let settings: Settings = table.try_into().unwrap();
        let error = settings.validate().unwrap_err().to_string();
        let flag = format!("--{} is NaN", key.replace('_', "-"));
        assert!(error.contains(&flag), "{error}");
    }
}

#[test]
fn settings_that_do_not_fit_together_are_refused() {
    refused(
        &["--batch-size", "6", "--minibatch-size", "4"],
        "--minibatch-size is 4, expected a divisor of --batch-size 6",
    );
    refused(&["--model", "m.gguf"], "--prompts is missing");
    refused(&["--reward", "regex"], "--reward-pattern is missing");
    refused(&["--reward", "command", "--reward-command", "  "], "--reward-command is missing");
    refused(
        &["--reward", "sentiment", "--reward-pattern", "a"],
        "--reward-pattern has no effect with --reward sentiment; add --reward regex",
    );
    refused(&["--out", ""], "--out");
    refused(&["--reward", "kindness"], "kindness");
    refused(&["--no-such-flag"], "--no-such-flag");
}

#[test]
fn a_config_file_is_refused_with_file_line_and_key() {
    let dir = tempfile::tempdir().unwrap();
    for (text, messages) in [
        ("steps = 3\nclip_rage = 0.1\n", ["line 2", "clip_rage"]),
        ("seed = 1\nsteps = \"many\"\n", ["line 2", "steps"]),
        ("steps = -1\n", ["line 1", "steps"]),
        ("reward = \"kindness\"\n", ["line 1", "kindness"]),
        ("[run]\nsteps = 3\n", ["line 1", "run"]),
        ("steps = \n", ["line 1", "steps"]),
        ("steps = 1\nsteps = 2\n", ["line 2", "steps"]),
    ] {
        let file = write(&dir.path().join("c.toml"), text);
        refused(&["--config", &file], &format!("--config {file}"));
        for message in messages {
            refused(&["--config", &file], message);
        }
    }
    let file = write(&dir.path().join("c.toml"), "clip_range = nan\n");
    refused(&["--config", &file], "--clip-range is NaN");

    let missing = dir.path().join("none.toml");
    refused(&["--config", missing.to_str().unwrap()], "none.toml");
    refused(&["--config", dir.path().to_str().unwrap()], "cannot read --config");
    let binary = write(&dir.path().join("b.toml"), [0xff, 0xfe, 0x00]);
    refused(&["--config", &binary], "cannot read --config");
}
