//! The driver's settings, rewards, prompt files and run folder.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::Device;
use clap::{Args, Command, FromArgMatches, ValueEnum};
use ppo_kernels::correction::CorrectionOptions;
use ppo_kernels::driver::chat::{ChatTemplate, Message, Text};
use ppo_kernels::driver::config::{
    AdvantageEstimator, Algorithm, KlPlacement, RewardKind, RunSettings, Settings, TrainArgs,
};
use ppo_kernels::driver::examples::{
    read_demonstrations, read_preferences, Demonstration, Example,
};
use ppo_kernels::driver::model::Lora;
use ppo_kernels::driver::prompts;
use ppo_kernels::driver::report::{heading, step_line, train_columns, Run, SampleRecord};
use ppo_kernels::driver::reward::{build, nearness, sentiment, CommandReward, Reward, Sample};
use ppo_kernels::driver::rollout::Prompts;
use ppo_kernels::driver::tokenizer::Tokenizer;
use ppo_kernels::kl::KlEstimator;
use ppo_kernels::ppo_loss::{Aggregation, PpoLossOptions, RatioLevel};
use serde_json::{json, Map, Value};

// ---------------------------------------------------------------- settings

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
    fs::write(path, text).unwrap();
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
    let kept = resolve(&["--whiten-advantages", "false", "--steps", "3"]).unwrap();
    assert!(!kept.whiten_advantages());
    refused(&["--whiten-rewards", "perhaps"], "--whiten-rewards");
}

#[test]
fn every_estimator_and_aggregation_of_the_ops_can_be_set_and_saved() {
    let dir = tempfile::tempdir().unwrap();
    let saved = |settings: &Settings| {
        let file = write(&dir.path().join("config.toml"), settings.to_toml().unwrap());
        resolve(&["--config", &file]).unwrap()
    };
    for (name, estimator) in [
        ("k1", KlEstimator::K1),
        ("abs", KlEstimator::Abs),
        ("k2", KlEstimator::K2),
        ("k3", KlEstimator::K3),
        ("k3-straight-through", KlEstimator::K3StraightThrough),
    ] {
        let settings = resolve(&["--kl-estimator", name]).unwrap();
        assert_eq!(settings.kl_estimator(), estimator);
        assert!(settings.to_toml().unwrap().contains(&format!("kl_estimator = \"{name}\"")));
        assert_eq!(saved(&settings), settings);
    }
    for (name, aggregation) in [
        ("token-mean", Aggregation::TokenMean),
        ("seq-mean-token-sum", Aggregation::SeqMeanTokenSum),
        ("seq-mean-token-mean", Aggregation::SeqMeanTokenMean),
        ("seq-mean-token-sum-norm", Aggregation::SeqMeanTokenSumNorm),
        ("batch-mean-token-sum", Aggregation::BatchMeanTokenSum),
        ("batch-mean-token-mean", Aggregation::BatchMeanTokenMean),
        ("seq-mean-token-sum-norm-rows", Aggregation::SeqMeanTokenSumNormRows),
        ("constant:1024", Aggregation::Constant(1024.0)),
        ("constant:0.30000000000000004", Aggregation::Constant(0.1 + 0.2)),
    ] {
        let settings = resolve(&["--aggregation", name]).unwrap();
        assert_eq!(settings.aggregation, Some(aggregation));
        assert!(settings.to_toml().unwrap().contains(&format!("aggregation = \"{name}\"")));
        assert_eq!(saved(&settings), settings);
    }
    refused(&["--kl-estimator", "k4"], "k3-straight-through");
    for name in ["mean", "constant", "constant:", "constant:x", "TokenMean"] {
        refused(&["--aggregation", name], "seq-mean-token-sum-norm-rows or constant:X");
    }
    for divisor in ["0", "-1", "inf", "NaN", "1e-50"] {
        refused(&["--aggregation", &format!("constant:{divisor}")], "--aggregation constant is");
    }
}

#[test]
fn an_algorithm_sets_what_is_not_said() {
    let (gae, ppo) = (AdvantageEstimator::Gae, "ppo");
    let (reward, loss) = (KlPlacement::Reward, KlPlacement::Loss);
    let (k1, k3) = (KlEstimator::K1, KlEstimator::K3);
    let plus_plus = AdvantageEstimator::ReinforcePlusPlus;
    let (grpo, rloo) = (AdvantageEstimator::Grpo, AdvantageEstimator::Rloo);
    let baseline = AdvantageEstimator::ReinforcePlusPlusBaseline;
    for (flags, estimator, group_size, named, kl_in, kl_estimator, whitened) in [
        (&[] as &[&str], gae, 1, ppo, reward, k1, true),
        (&["--algorithm", "grpo"], grpo, 8, "grpo", loss, k3, false),
        (&["--algorithm", "rloo"], rloo, 8, "rloo", reward, k1, false),
        (&["--algorithm", "reinforce++"], plus_plus, 1, ppo, reward, k1, true),
        (&["--advantages", "reinforce++-baseline"], baseline, 8, ppo, reward, k1, true),
        (&["--algorithm", "grpo", "--loss", "gspo"], grpo, 8, "gspo", loss, k3, false),
        (&["--algorithm", "grpo", "--kl-in", "reward"], grpo, 8, "grpo", reward, k1, false),
        (
            &["--algorithm", "grpo", "--kl-estimator", "k2"],
            grpo,
            8,
            "grpo",
            loss,
            KlEstimator::K2,
            false,
        ),
        (&["--algorithm", "grpo", "--advantages", "gae"], gae, 1, "grpo", loss, k3, true),
        (&["--algorithm", "rloo", "--whiten-advantages"], rloo, 8, "rloo", reward, k1, true),
        (&["--algorithm", "rloo", "--batch-size", "12"], rloo, 6, "rloo", reward, k1, false),
        (&["--group-size", "4"], gae, 4, ppo, reward, k1, true),
    ] {
        let settings = resolve(flags).unwrap();
        assert_eq!(settings.estimator(), estimator, "{flags:?}");
        assert_eq!(settings.group_size(), group_size, "{flags:?}");
        assert_eq!(settings.loss(), named, "{flags:?}");
        assert_eq!(settings.kl_placement(), kl_in, "{flags:?}");
        assert_eq!(settings.kl_estimator(), kl_estimator, "{flags:?}");
        assert_eq!(settings.whiten_advantages(), whitened, "{flags:?}");
        let term = settings.loss_options().unwrap().kl;
        assert!(kl_in == reward || term.estimator == kl_estimator, "{flags:?}");
    }
}

#[test]
fn every_algorithm_and_estimator_can_be_set_and_saved() {
    fn names<T: ValueEnum>() -> Vec<String> {
        let name = |value: &T| value.to_possible_value().unwrap().get_name().to_owned();
        T::value_variants().iter().map(name).collect()
    }
    let dir = tempfile::tempdir().unwrap();
    let algorithms = names::<Algorithm>().into_iter().map(|name| ("algorithm", name));
    let estimators = names::<AdvantageEstimator>().into_iter().map(|name| ("advantages", name));
    for (key, name) in algorithms.chain(estimators) {
        let settings = resolve(&[&format!("--{key}"), &name, "--kl-in", "loss"]).unwrap();
        let text = settings.to_toml().unwrap();
        assert!(text.contains(&format!("{key} = \"{name}\"")), "{text}");
        let file = write(&dir.path().join("config.toml"), text);
        assert_eq!(resolve(&["--config", &file]).unwrap(), settings);
    }
}

#[test]
fn what_means_nothing_beside_the_algorithm_is_refused() {
    let grpo = |flags: &[&'static str]| [&["--algorithm", "grpo"], flags].concat();
    refused(&["--group-size", "3"], "--group-size is 3, expected a divisor of --batch-size 8");
    refused(&["--group-size", "0"], "--group-size is 0, expected a whole number above 0");
    refused(
        &grpo(&["--group-size", "1"]),
        "--group-size is 1 (of --batch-size 8), expected at least 2 with --advantages grpo",
    );
    refused(
        &grpo(&["--batch-size", "1", "--minibatch-size", "1"]),
        "(of --batch-size 1), expected",
    );
    for flag in ["--value-coef", "--value-clip-range", "--value-learning-rate", "--lambda"] {
        for advantages in ["grpo", "reinforce++"] {
            let message = format!(
                "{flag} has no effect with --advantages {advantages}, which has no critic; add \
                 --advantages gae"
            );
            refused(&["--algorithm", advantages, flag, "0.5"], &message);
        }
        assert!(resolve(&grpo(&["--advantages", "gae", flag, "0.5"])).is_ok());
    }
    let dir = tempfile::tempdir().unwrap();
    let from_reward = "algorithm = \"grpo\"\ncritic_from = \"policy\"\n";
    let file = write(&dir.path().join("c.toml"), from_reward);
    for flags in [&grpo(&["--critic-from", "policy"])[..], &["--config", &file]] {
        refused(flags, "--critic-from has no effect with --advantages grpo");
    }
    refused(&grpo(&["--gamma", "0.9"]), "--gamma has no effect with --advantages grpo");
    assert!(resolve(&["--algorithm", "reinforce++", "--gamma", "0.9"]).is_ok());
    refused(&["--advantages", "max_rl"], "add --kl-in loss or --kl-coef 0");
    assert!(resolve(&["--advantages", "max_rl", "--kl-coef", "0"]).is_ok());
    refused(&["--algorithm", "grpp"], "possible values: ppo, grpo, rloo, reinforce++");
    refused(&["--advantages", "gdpp"], "possible values: gae, reinforce++, ");
    refused(&["--advantages", "gdpo"], "add --kl-in loss or --kl-coef 0");
    let gdpo = |flags: &[&'static str]| grpo(&[&["--advantages", "gdpo"], flags].concat());
    assert!(resolve(&gdpo(&["--reward", "sentiment,length"])).is_ok());
    for flags in [
        &["--score-scaling"][..],
        &["--score-clip", "1"],
        &["--missing-eos-penalty", "1"],
        &["--whiten-rewards"],
    ] {
        refused(&gdpo(flags), &format!("{} changes the sum of the rewards", flags[0]));
    }
    // One answer to a prompt is compared with the likeliest one, but with no other.
    let one = ["--group-size", "1", "--advantages"];
    assert!(resolve(&[&one[..], &["remax"]].concat()).is_ok());
    refused(
        &[&one[..], &["optimal_token_baseline"]].concat(),
        "--group-size is 1 (of --batch-size 8), expected at least 2",
    );
    for advantages in ["remax", "optimal_token_baseline"] {
        let flags = ["--gamma", "0.9", "--advantages", advantages];
        refused(&flags, "which discounts nothing; add");
    }
    let model = ["--algorithm", "rloo", "--reward", "model:some/where"];
    assert_eq!(resolve(&model).unwrap().critic_dir(), None);
}

#[test]
fn the_critic_starts_from_the_reward_model_if_there_is_one() {
    let dir = |flags: &[&str]| resolve(flags).unwrap().critic_dir().map(Path::to_path_buf);
    assert_eq!(dir(&[]), None);
    let model = ["--reward", "model:some/where"];
    assert_eq!(dir(&model).unwrap(), Path::new("some/where"));
    assert_eq!(dir(&[&model[..], &["--critic-from", "policy"]].concat()), None);
    assert!(dir(&[&model[..], &["--critic-from", "reward"]].concat()).is_some());
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
        "--score-scaling",
        "--score-norm",
        "--device",
        "cuda:1",
    ];
    let first = resolve(&flags).unwrap();
    let file = write(&dir.path().join("config.toml"), first.to_toml().unwrap());
    let again = resolve(&["--config", &file]).unwrap();
    assert_eq!(again.out, None);
    assert_eq!(Settings { out: None, ..first }, again);

    let model = ["--reward", "model:a dir", "--critic-from", "policy"];
    let model = resolve(&model).unwrap();
    let file = write(&dir.path().join("model.toml"), model.to_toml().unwrap());
    assert_eq!(resolve(&["--config", &file]).unwrap(), model);

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
    // Finite, but 0 or infinite in the f32 of the ops.
    refused(&["--temperature", "1e-60"], "expected a finite number above 0 in 32 bits");
    refused(&["--learning-rate", "1e39"], "expected a finite number of at least 0 in 32 bits");
    refused(&["--batch-size", "1048577"], "--batch-size is 1048577, expected at most 1048576");
    refused(&["--dual-clip", "1"], "--dual-clip is 1, expected");
    for flag in [
        "--steps",
        "--batch-size",
        "--minibatch-size",
        "--gradient-accumulation",
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
fn losses_with_names_bring_their_own_options() {
    let options = |flags: &[&str]| resolve(flags).unwrap().loss_options().unwrap();
    for name in PpoLossOptions::NAMES {
        let (ours, named) = (options(&["--loss", name]), PpoLossOptions::of(name).unwrap());
        // What goes with a critic is a setting of its own.
        assert_eq!(PpoLossOptions { value_coef: named.value_coef, ..ours }, named);
    }
    let gspo = options(&["--loss", "gspo", "--clip-range", "0.01", "--aggregation", "token-mean"]);
    assert_eq!((gspo.clip_range, gspo.clip_range_high), (0.01, None));
    assert_eq!((gspo.ratio, gspo.aggregation), (RatioLevel::SequenceMean, Aggregation::TokenMean));
    refused(&["--loss", "gpso"], "possible values: ppo, dapo");
    refused(&["--loss", "cispo", "--dual-clip", "3"], "which --loss cispo has not");
}

#[test]
fn corrections_with_names_have_their_own_bounds_or_a_cap() {
    let options = |flags: &[&str]| resolve(flags).unwrap().correction_options().unwrap();
    assert_eq!(options(&[]), None);
    for name in CorrectionOptions::NAMES {
        let named = CorrectionOptions::of(name).unwrap();
        assert_eq!(options(&["--correction", name]), Some(named));
        let capped = options(&["--correction", name, "--correction-cap", "1.5"]).unwrap();
        let bounds = [named, capped].map(|options| options.rejection.high.or(options.high));
        assert_eq!(bounds[1], Some(1.5));
        assert_ne!(bounds[0], bounds[1]);
    }
    refused(&["--correction", "trl"], "possible values: tis, sequence_tis");
    refused(&["--correction-cap", "2"], "has no effect without --correction");
    refused(
        &["--correction", "icepop", "--correction-cap", "0.4"],
        "--correction-cap is 0.4, expected a finite number of at least 0.5, the lower bound",
    );
}

#[test]
fn every_float_setting_is_checked() {
    // A float field that validate() forgets would let this NaN through.
    let table = toml::Table::try_from(Settings {
        score_clip: Some(1.0),
        missing_eos_penalty: Some(1.0),
        clip_range: Some(1.0),
        clip_range_high: Some(1.0),
        correction: Some("tis".into()),
        correction_cap: Some(1.0),
        dual_clip: Some(2.0),
        lora_alpha: Some(1.0),
        ..Settings::default()
    })
    .unwrap();
    let floats: Vec<_> = table.iter().filter(|(_, v)| v.is_float()).collect();
    assert_eq!(floats.len(), 23);
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
    refused(
        &["--gradient-accumulation", "3"],
        "--gradient-accumulation is 3, expected a divisor of --minibatch-size 4",
    );
    let adaptive = ["--kl-controller", "adaptive", "--batch-size", "8", "--minibatch-size", "8"];
    let message = "--kl-horizon is 7, expected at least --batch-size 8";
    refused(&[&adaptive[..], &["--kl-horizon", "7"]].concat(), message);
    assert!(resolve(&[&adaptive[..], &["--kl-horizon", "8"]].concat()).is_ok());
    refused(&["--model", "m.gguf"], "--prompts is missing");
    refused(&["--reward", "regex"], "--reward-pattern is missing");
    refused(&["--reward", "command", "--reward-command", "  "], "--reward-command is missing");
    refused(
        &["--reward", "sentiment", "--reward-pattern", "a"],
        "--reward-pattern has no effect with --reward sentiment; add --reward regex",
    );
    refused(&["--held-out", "0.2"], "--held-out has no effect without --eval-every");
    for share in ["0", "1", "nan"] {
        refused(&["--eval-every", "2", "--held-out", share], "--held-out is ");
    }
    refused(&["--out", ""], "--out");
    refused(&["--reward", "kindness"], "kindness");
    refused(&["--reward", "model:"], "command or model:DIR");
    for (text, wrong) in [
        ("sentiment,", "reward \"\": expected sentiment"),
        ("sentiment,sweetness", "reward \"sweetness\": expected sentiment"),
        ("sentiment*much", "reward \"sentiment*much\": expected NAME*WEIGHT"),
        ("sentiment*inf,length", "expected NAME*WEIGHT, the weight a finite number"),
        ("sentiment*1e300,length", "a finite number in 32 bits"),
        ("model:a*b", "no * or comma in the name of a folder"),
        ("length,sentiment,length*2", "--reward length,sentiment,length*2 has length twice"),
        ("sentiment*2*3", "expected NAME*WEIGHT"),
    ] {
        refused(&["--reward", text], wrong);
    }
    refused(
        &["--reward", "length,regex*2"],
        "--reward-pattern is missing: --reward regex needs it",
    );
    let several = ["--reward", "sentiment*0.5,regex,model:a/dir*-1", "--reward-pattern", "a"];
    let settings = resolve(&several).unwrap();
    assert_eq!(settings.reward.to_string(), several[1]);
    assert_eq!(settings.critic_dir(), Some(Path::new("a/dir")));
    let two = resolve(&["--reward", "model:a,model:b"]).unwrap();
    assert_eq!(two.critic_dir(), None);
    // As they are written they are read.
    for (text, written) in [
        ("model:a*1", "model:a"),
        ("sentiment*1", "sentiment"),
        (" sentiment , length * 0.5", "sentiment,length*0.5"),
        ("length*0.5", "length*0.5"),
    ] {
        let kind: RewardKind = text.parse().unwrap();
        assert_eq!(kind.to_string(), written);
        assert_eq!(written.parse::<RewardKind>().unwrap(), kind);
    }
    let dir = tempfile::tempdir().unwrap();
    let file = write(&dir.path().join("config.toml"), settings.to_toml().unwrap());
    assert_eq!(resolve(&["--config", &file]).unwrap(), settings);
    refused(&["--score-norm"], "--score-norm has no effect without --score-scaling");
    refused(&["--critic-from", "reward"], "--critic-from reward has no model with --reward length");
    refused(&["--no-such-flag"], "--no-such-flag");
    let model = ["--model", "m.gguf", "--prompts", "p.txt"];
    let lora = |flags: &[&'static str]| [&model[..], flags].concat();
    refused(&lora(&["--lora-rank", "0"]), "--lora-rank is 0, expected");
    refused(&lora(&["--lora-alpha", "4"]), "--lora-alpha has no effect without --lora-rank");
    refused(&lora(&["--lora-merge"]), "--lora-merge has no effect without --lora-rank");
    refused(&lora(&["--lora-rank", "4", "--lora-alpha", "0"]), "--lora-alpha is 0, expected");
    refused(&lora(&["--lora-rank", "4", "--lora-targets", "head"]), "--lora-targets");
    refused(&["--lora-rank", "4"], "--lora-rank without --model");
    assert!(resolve(&["--lora-rank", "4", "--lora-merge"]).is_ok());
    let some = resolve(&lora(&["--lora-rank", "4", "--lora-targets", "q_proj,o_proj"])).unwrap();
    let targets = vec!["q_proj".to_owned(), "o_proj".to_owned()];
    assert_eq!(some.lora(), Some(Lora { rank: 4, alpha: 8.0, targets }));
    assert_eq!(some.adapter_base(), Some(Path::new("m.gguf")));
}

#[test]
fn a_config_file_is_refused_with_file_line_and_key() {
    let dir = tempfile::tempdir().unwrap();
    for (text, messages) in [
        ("steps = 3\nclip_rage = 0.1\n", ["line 2", "clip_rage"]),
        ("seed = 1\nsteps = \"many\"\n", ["line 2", "steps"]),
        ("steps = -1\n", ["line 1", "steps"]),
        ("reward = \"kindness\"\n", ["line 1", "kindness"]),
        ("device = \"abacus\"\n", ["line 1", "abacus"]),
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

// ---------------------------------------------------------------- rewards

fn samples<'a>(responses: &[&'a str]) -> Vec<Sample<'a>> {
    let sample = |response| Sample { prompt: "Say", response, prompt_ids: &[], response_ids: &[] };
    responses.iter().map(|response| sample(*response)).collect()
}

fn score(settings: &Settings, responses: &[&str]) -> Vec<f32> {
    build(settings, &Device::Cpu).unwrap().score(&samples(responses)).unwrap()
}

#[test]
fn sentiment_follows_the_feeling_of_the_words() {
    for (worse, better) in [
        ("It was a bad day.", "It was a day."),
        ("It was a day.", "It was a good day."),
        ("It was a good day.", "It was a very good day."),
        ("It was a good day.", "It was a wonderful day."),
        ("It was a slightly good day.", "It was a good day."),
        ("It was not a good day.", "It was a day."),
        ("It was a bad day.", "It was not good."),
        ("It wasn\u{2019}t good.", "It wasn\u{2019}t bad."),
        ("It is good. Never again, though.", "It is good, and it is kind."),
        ("awful", "AWFULLY? No: wonderful!"),
        ("He was happy and felt sad.", "He was happy."),
        ("I never was not sad.", "I never was sad."),
    ] {
        assert!(sentiment(worse) < sentiment(better), "{worse:?} {better:?}");
    }
    // A negation holds for its clause only.
    assert!(sentiment("No, it is good.") > 0.4);
    assert!(sentiment("not sad but happy") > sentiment("not sad"));
    assert_eq!(sentiment("good"), (0.5f32).tanh());
    assert_eq!(sentiment("GOOD!"), sentiment("good"));
    for empty in ["", " ", "...", "the mat", "'", "\u{1f600}"] {
        assert_eq!(sentiment(empty), 0.0, "{empty:?}");
    }
    let much = "wonderful ".repeat(1000);
    assert!(sentiment(&much) <= 1.0 && sentiment(&much) > 0.99);
    assert!(sentiment(&"terrible ".repeat(1000)) >= -1.0);
}

#[test]
fn length_is_1_at_the_target_and_falls_on_both_sides() {
    assert_eq!(nearness(4, 4), 1.0);
    assert_eq!(nearness(2, 4), 0.5);
    assert_eq!(nearness(8, 4), 0.5);
    assert_eq!(nearness(0, 4), 0.0);
    assert!(nearness(100, 4) > nearness(101, 4));
    let settings = Settings { reward: RewardKind::Length, reward_length: 2, ..Settings::default() };
    assert_eq!(score(&settings, &["", "a", " a\n b ", "a b c d"]), [0.0, 0.5, 1.0, 0.5]);
}

#[test]
fn regex_is_1_where_the_pattern_matches() {
    let mut settings = Settings {
        reward: RewardKind::Regex,
        reward_pattern: Some(r"(?i)\bmat\b".to_owned()),
        ..Settings::default()
    };
    assert_eq!(score(&settings, &["the Mat.", "the matter", ""]), [1.0, 0.0, 0.0]);
    settings.reward_pattern = Some("(".to_owned());
    let error = format!("{:#}", build(&settings, &Device::Cpu).err().unwrap());
    assert!(error.contains("--reward-pattern `(` is refused"), "{error}");
}

const QUICK: Duration = Duration::from_secs(20);

fn command_scores(command: &str, timeout: Duration, n: usize) -> Result<Vec<f32>, String> {
    let responses = vec!["a \"quoted\"\nline \u{e9}"; n];
    CommandReward::new(command, timeout)
        .score(&samples(&responses))
        .map_err(|error| format!("{error:#}"))
}

#[test]
fn a_command_gets_every_sample_and_its_scores_come_back_in_order() {
    // Counts lines, and scores 100 where one is not the object that was promised.
    let command = r#"awk '{
        want = "{\"prompt\":\"Say\",\"response\":\"a \\\"quoted\\\"\\nline é\"}"
        print "{\"score\": " ($0 == want ? NR / 2 : 100) ", \"why\": \"because\"}\n"
    }'"#;
    assert_eq!(command_scores(command, QUICK, 3).unwrap(), [0.5, 1.0, 1.5]);
    assert!(command_scores("exit 1", QUICK, 0).unwrap().is_empty());
}

#[test]
fn a_command_may_read_all_before_it_writes_or_write_before_it_reads() {
    let n = 20_000; // 1 MB in, and 300 kB out: far above what a pipe holds
    let all = r#"cat > /dev/null; for i in $(seq 20000); do echo '{"score": 1}'; done"#;
    assert_eq!(command_scores(all, QUICK, n).unwrap().len(), n);
    let first = r#"for i in $(seq 20000); do echo '{"score": 1}'; done; cat > /dev/null"#;
    assert_eq!(command_scores(first, QUICK, n).unwrap().len(), n);
    let never = r#"for i in $(seq 20000); do echo '{"score": 1}'; done"#;
    assert_eq!(command_scores(never, QUICK, n).unwrap().len(), n);
    let noisy = r#"for i in $(seq 20000); do echo noise >&2; echo '{"score": 1}'; done"#;
    assert_eq!(command_scores(noisy, QUICK, n).unwrap().len(), n);
}

#[test]
fn nonsense_from_a_command_is_refused_and_quoted() {
    for (command, message) in [
        (r#"echo '{"score": 1}'"#, "the answer has 1 lines for 2 samples"),
        (r#"yes '{"score": 1}' | head -n 3"#, "the answer has 3 lines for 2 samples"),
        ("true", "the answer has 0 lines for 2 samples"),
        ("echo hello", "line 1 of the answer is not {\"score\": NUMBER}: `hello`"),
        (r#"yes '{"score": NaN}' | head -n 2"#, "line 1 of the answer is not"),
        (r#"yes '{"score": 1e99}' | head -n 2"#, "line 1 of the answer has a score past 32 bits"),
        (r#"yes '{"score": 1e999}' | head -n 2"#, "line 1 of the answer is not"),
        (r#"yes '{"score": null}' | head -n 2"#, "line 1 of the answer is not"),
        (r#"yes '{"score": "1"}' | head -n 2"#, "line 1 of the answer is not"),
        (r#"yes '{"Score": 1}' | head -n 2"#, "line 1 of the answer is not"),
        ("yes '[1]' | head -n 2", "line 1 of the answer is not"),
        (r"printf '\377\n'", "the answer is not UTF-8"),
        ("yes", "its answer is longer than"),
        ("head -c 5000000 /dev/zero", "its answer is longer than"),
        ("exit 3", "it ended with exit status: 3"),
        ("kill -s KILL $$", "it ended with signal: 9"),
        ("no-such-program-at-all", "its standard error ends:\n"),
        ("seq 100000 >&2; echo the cause >&2; exit 1", "the cause"),
        ("echo a word >&2; echo hello", "a word"),
    ] {
        let error = command_scores(command, QUICK, 2).expect_err(command);
        assert!(error.contains(&format!("--reward-command `{command}`")), "{error}");
        assert!(error.contains(message), "{command} gave: {error}");
        assert!(error.len() < 4000, "{} bytes", error.len());
    }
    let long = command_scores("head -c 9999 /dev/zero | tr '\\0' x", QUICK, 1).unwrap_err();
    assert!(long.len() < 1000, "{long}");
}

#[test]
fn a_command_that_hangs_is_ended_with_all_its_children() {
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("mark");
    let write_later = format!("(sleep 2; echo alive > {}) & ", mark.display());
    let timeout = Duration::from_millis(300);
    let start = Instant::now();
    for command in [
        "sleep 60".to_owned(),
        "sleep 60 < /dev/null > /dev/null".to_owned(),
        "exec > /dev/null; sleep 60".to_owned(),
        "sleep 60 & echo '{\"score\": 1}'".to_owned(),
        "trap '' TERM INT HUP; sleep 60; sleep 60".to_owned(),
        format!("{write_later} echo the reason >&2; wait"),
    ] {
        let error = command_scores(&command, timeout, 100_000).expect_err(&command);
        assert!(error.contains("it did not end within 0.3 s (--reward-timeout)"), "{error}");
        assert_eq!(error.contains("the reason"), command.contains("the reason"), "{error}");
    }
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    std::thread::sleep(Duration::from_millis(2500));
    assert!(!mark.exists(), "a child of the command lived on");
}

#[test]
fn a_command_is_tried_before_the_run() {
    let settings = |command: &str| Settings {
        reward: RewardKind::Command,
        reward_command: Some(command.to_owned()),
        reward_timeout: 20.0,
        ..Settings::default()
    };
    let error = format!("{:#}", build(&settings("echo no"), &Device::Cpu).err().unwrap());
    assert!(error.contains("was tried before the run: --reward-command `echo no`"), "{error}");
    let good = settings(r#"sed 's/.*/{"score": -0.25}/'"#);
    assert_eq!(score(&good, &["a", "b"]), [-0.25, -0.25]);
    assert_eq!(build(&good, &Device::Cpu).unwrap().name(), "command");
}

// ---------------------------------------------------------------- prompts

#[test]
fn prompts_are_read_from_text_and_jsonl() {
    let dir = tempfile::tempdir().unwrap();
    let read = |name: &str, text: &str| {
        let path = dir.path().join(name);
        write(&path, text);
        let all = prompts::read(&path).unwrap();
        all.iter().map(|text| text.last().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(
        read("p.txt", "\u{feff}one\r\n\r\n  two \n \n{\"prompt\": 3}"),
        ["one", "two", "{\"prompt\": 3}"]
    );
    assert_eq!(read("no-extension", "one"), ["one"]);
    let jsonl = "\u{feff}{\"prompt\": \"one\\ntwo \", \"id\": 3}\r\n\n{\"prompt\":\"\u{e9}\"}";
    assert_eq!(read("p.jsonl", jsonl), ["one\ntwo ", "\u{e9}"]);
}

#[test]
fn a_bad_prompt_file_is_refused_with_file_and_line() {
    let dir = tempfile::tempdir().unwrap();
    for (name, text, message) in [
        ("empty.txt", &b""[..], " holds no prompt"),
        ("blank.txt", b"\xef\xbb\xbf\n \r\n", " holds no prompt"),
        ("blank.jsonl", b"\n\n", " holds no prompt"),
        ("binary.txt", b"good\n\xff\xfe", ":2: not UTF-8"),
        ("a.jsonl", b"\n{\"prompt\": 1}", ":2: expected {\"prompt\": \"..\"}"),
        ("b.jsonl", b"{\"text\": \"a\"}", ":1: expected"),
        ("c.jsonl", b"{\"prompt\": \"a\"}\nplain", ":2: expected"),
        ("d.jsonl", b"[\"a\"]", ":1: expected"),
        ("e.jsonl", b"{\"prompt\": \" \"}", ":1: the prompt is empty"),
    ] {
        let path = dir.path().join(name);
        write(&path, text);
        let error = format!("{:#}", prompts::read(&path).unwrap_err());
        let place = format!("--prompts {}{message}", path.display());
        assert!(error.starts_with(&place), "{error}");
    }
    for path in [dir.path(), &dir.path().join("none.txt")] {
        let error = format!("{:#}", prompts::read(path).unwrap_err());
        let place = format!("cannot read --prompts {}: ", path.display());
        assert!(error.starts_with(&place), "{error}");
    }
}

// ---------------------------------------------------------------- conversations

fn message(role: &str, content: &str) -> Message {
    let entry = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    Message::from([entry("role", role), entry("content", content)])
}

#[test]
fn chat_templates_make_the_texts_that_transformers_makes() {
    let text = include_str!("fixtures/chat.json");
    let json: Value = serde_json::from_str(text).unwrap();
    let special: BTreeMap<String, String> =
        serde_json::from_value(json["special"].clone()).unwrap();
    let cases = json["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 36);
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let source = json["templates"][name].as_str().unwrap();
        let template = ChatTemplate::new(source, special.clone()).unwrap();
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let add_generation_prompt = case["add_generation_prompt"].as_bool().unwrap();
        match template.render(&messages, add_generation_prompt) {
            Ok(text) => assert_eq!(text, case["text"], "{name}"),
            Err(error) => {
                let message = format!("{error:#}");
                let words = case["error"].as_str().unwrap_or_else(|| panic!("{name}: {message}"));
                assert!(message.contains(words), "{name}: {message}");
            }
        }
    }
    let error = ChatTemplate::new("{% if %}", special.clone()).err().unwrap();
    assert!(format!("{error:#}").contains("chat template"), "{error:#}");
    let dated = ChatTemplate::new("{{ strftime_now('%Y') }}", special).unwrap();
    assert!(dated.render(&[], true).unwrap().parse::<u32>().unwrap() >= 2026);
}

#[test]
fn prompts_of_messages_are_read_from_jsonl() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.jsonl");
    let user = r#"{"role": "user", "content": "Hello"}"#;
    let assistant = r#"{"role": "assistant", "content": "Hi"}"#;
    write(
        &path,
        format!("{{\"prompt\": [{user}]}}\n{{\"messages\": [{user}, {assistant}, {user}]}}"),
    );
    let (hello, hi) = (message("user", "Hello"), message("assistant", "Hi"));
    let chat = |messages: &[&Message]| Text::Chat(messages.iter().map(|&m| m.clone()).collect());
    assert_eq!(prompts::read(&path).unwrap(), [chat(&[&hello]), chat(&[&hello, &hi, &hello])]);

    for (line, message) in [
        (r#"{"prompt": []}"#.to_owned(), "prompt: expected at least one message"),
        (format!(r#"{{"messages": [{user}, {assistant}]}}"#), "messages: the last message is the"),
        (
            r#"{"prompt": [{"role": "user"}]}"#.into(),
            r#"prompt: expected [{"role": "..", "content""#,
        ),
        (r#"{"prompt": [{"role": "user", "content": [1]}]}"#.into(), "nothing but text, got"),
        (r#"{"prompt": [{"role": "user", "content": " "}]}"#.into(), "the prompt is empty"),
        (r#"{"messages": 3}"#.into(), r#"expected {"prompt": ".."}"#),
    ] {
        write(&path, &line);
        let error = format!("{:#}", prompts::read(&path).unwrap_err());
        let place = format!("--prompts {}:1: ", path.display());
        assert!(error.starts_with(&place) && error.contains(message), "{error}");
    }

    // Of a demonstration the assistant's last message is learned.
    write(&path, format!("{{\"messages\": [{user}, {assistant}]}}"));
    let learned = || Demonstration { prompt: chat(&[&hello]), response: "Hi".into() };
    assert_eq!(read_demonstrations(&path).unwrap(), [learned()]);
    write(&path, format!("{{\"prompt\": [{user}], \"response\": [{assistant}]}}"));
    assert_eq!(read_demonstrations(&path).unwrap(), [learned()]);
    write(&path, format!("{{\"messages\": [{user}]}}"));
    let error = format!("{:#}", read_demonstrations(&path).unwrap_err());
    assert!(error.contains("messages: expected several messages"), "{error}");
    let no = r#"[{"role": "assistant", "content": "No"}]"#;
    write(
        &path,
        format!("{{\"prompt\": [{user}], \"chosen\": [{assistant}], \"rejected\": {no}}}"),
    );
    let pairs = read_preferences(&path).unwrap();
    assert_eq!(
        (&pairs[0].prompt, &*pairs[0].chosen, &*pairs[0].rejected),
        (&chat(&[&hello]), "Hi", "No")
    );
    write(&path, format!("{{\"prompt\": [{user}], \"chosen\": [{user}], \"rejected\": {no}}}"));
    let error = format!("{:#}", read_preferences(&path).unwrap_err());
    assert!(error.contains("chosen: expected one message, the assistant's"), "{error}");
}

/// A tokenizer of words that puts `<s>` first, with that template.
fn chatting(template: Option<&str>) -> Tokenizer {
    let words = ["<s>", "</s>", "user", "assistant", ":", "Hello", "Hi", "No"];
    let vocab: Map<String, Value> =
        words.iter().enumerate().map(|(id, &word)| (word.into(), id.into())).collect();
    let first = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let tokenizer = json!({
        "version": "1.0",
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing", "single": [first, text], "pair": [text],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        },
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    });
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template});
    let files = vec![("tokenizer_config.json".to_owned(), config.to_string())];
    Tokenizer::from_json(tokenizer.to_string().as_bytes(), files, vec![], None).unwrap()
}

#[test]
fn a_conversation_gets_its_special_tokens_from_the_template_alone() {
    const TEMPLATE: &str = "{{ bos_token }} {% for m in messages %}{{ m.role }} : {{ m.content }} \
                            {{ eos_token }} {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}";
    let tokenizer = chatting(Some(TEMPLATE));
    let chat = Text::Chat(vec![message("user", "Hello")]);
    let prompt = vec![0, 2, 4, 5, 1, 3, 4];
    assert_eq!(chat.encode(&tokenizer).unwrap(), prompt);
    assert_eq!(chat.last(), "Hello");
    assert_eq!(Text::from("Hello").encode(&tokenizer).unwrap(), [0, 5]);
    // The template ends a message, and it is not ended again; a text is.
    let learned = Example::encode(&tokenizer, &chat, "Hi").unwrap();
    assert_eq!(learned, Example { prompt: prompt.clone(), response: vec![6, 1] });
    let plain = Example::encode(&tokenizer, &"Hello".into(), "Hi").unwrap();
    assert_eq!(plain, Example { prompt: vec![0, 5], response: vec![6, 1] });
    let endless = chatting(Some(&TEMPLATE.replace("{{ eos_token }} ", "")));
    let learned = Example::encode(&endless, &chat, "Hi").unwrap();
    assert_eq!(learned, Example { prompt: vec![0, 2, 4, 5, 3, 4], response: vec![6, 1] });
    // A template may start an answer otherwise than it keeps it.
    let starts =
        chatting(Some(&TEMPLATE.replace("assistant : {% endif", "assistant : No {% endif")));
    assert_eq!(
        Example::encode(&starts, &chat, "Hi").unwrap().tokens(),
        [&prompt[..], &[6, 1]].concat()
    );

    let named = Prompts::new(vec![chat.clone()], &tokenizer, 64, 8).unwrap();
    assert_eq!((&*named.first(1)[0].text, &named.first(1)[0].ids), ("Hello", &prompt));
    let error = Prompts::new(vec![chat], &chatting(None), 64, 8).err().unwrap();
    let error = format!("{error:#}");
    for part in ["--prompts: prompt 1", "chat template", "chat_template.jinja"] {
        assert!(error.contains(part), "{error}");
    }
}

// ---------------------------------------------------------------- report

fn into(dir: &Path) -> Settings {
    Settings { out: Some(dir.to_owned()), ..Settings::default() }
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn metrics(values: Value) -> Map<String, Value> {
    values.as_object().unwrap().clone()
}

#[test]
fn a_run_folder_holds_what_was_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("deep/er/run");
    let settings = into(&out);
    let mut run = Run::create(&settings).unwrap();
    assert_eq!(run.dir(), out);
    assert_eq!(run.weights_dir(), out.join("weights"));

    let values = metrics(json!({"objective/kl": 0.5, "loss/value_avg": f64::NAN}));
    run.metrics(1, &values).unwrap();
    // On the disk while the run goes on.
    assert_eq!(
        lines(&out.join("metrics.jsonl")),
        [json!({"step": 1, "objective/kl": 0.5, "loss/value_avg": null})]
    );
    let record = SampleRecord {
        step: 0,
        prompt: "The \"cat\"\n",
        response: "sat",
        score: Some(f32::INFINITY),
        kl: None,
        finished: true,
    };
    run.samples(&[
        record.clone(),
        SampleRecord { step: 1, kl: Some(0.25), score: Some(1.0), ..record },
    ])
    .unwrap();
    assert_eq!(
        lines(&out.join("samples.jsonl")),
        [
            json!({"step": 0, "prompt": "The \"cat\"\n", "response": "sat", "score": null,
                "finished": true}),
            json!({"step": 1, "prompt": "The \"cat\"\n", "response": "sat", "score": 1.0,
                "kl": 0.25, "finished": true}),
        ]
    );
    drop(run);
    assert_eq!(lines(&out.join("metrics.jsonl")).len(), 1);
    let config = fs::read_to_string(out.join("config.toml")).unwrap();
    assert_eq!(toml::from_str::<Settings>(&config).unwrap(), Settings::default());
}

#[test]
fn a_folder_that_holds_a_run_is_refused_and_left_alone() {
    for name in ["metrics.jsonl", "config.toml", "samples.jsonl", "weights"] {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join(name), "precious");
        let error = Run::create(&into(dir.path())).unwrap_err().to_string();
        let message = format!("--out {} already holds a run (it has {name})", dir.path().display());
        assert!(error.starts_with(&message), "{error}");
        assert_eq!(fs::read_to_string(dir.path().join(name)).unwrap(), "precious");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
    // Files of another kind do not matter.
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("notes.txt"), "mine");
    drop(Run::create(&into(dir.path())).unwrap());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_folder_that_cannot_be_made_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    write(&file, "mine");
    for out in [file.clone(), file.join("below"), dir.path().join("a/\0/b")] {
        let error = format!("{:#}", Run::create(&into(&out)).unwrap_err());
        assert!(error.contains(&format!("--out {}", out.display())), "{error}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    // Root may write anywhere but here.
    if cfg!(target_os = "linux") {
        let error = format!("{:#}", Run::create(&into(Path::new("/proc/run"))).unwrap_err());
        assert!(error.contains("--out /proc/run"), "{error}");
    }
}

#[test]
fn a_run_without_a_record_takes_its_files_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("a/b");
    drop(Run::create(&into(&out)).unwrap());
    assert!(!dir.path().join("a").exists());
    let mut run = Run::create(&into(&out)).unwrap();
    run.metrics(1, &Map::new()).unwrap();
    drop(run);
    assert!(Run::create(&into(&out)).is_err());
    assert!(out.join("config.toml").exists());
}

#[test]
fn step_lines_stay_in_their_columns() {
    let grpo = Settings { algorithm: Algorithm::Grpo, eval_every: 5, ..Settings::default() };
    let (ppo, grpo) = (train_columns(&Settings::default()), train_columns(&grpo));
    assert!(heading(&grpo)
        .starts_with("     step    score held out zero std       kl  policy loss  clipped"));
    let values = metrics(json!({
        "objective/scores": 0.25, "objective/kl": f64::NAN, "loss/policy_avg": -1.5e-3,
        "loss/value_avg": 1e12, "policy/clipfrac_avg": 0, "perf/throughput": 1234.4,
        "timing_s/rollout": 12.345,
    }));
    assert_eq!(
        [
            heading(&ppo),
            step_line(&ppo, 3, 20, &values),
            step_line(&ppo, 1000, 1000, &Map::new()),
        ],
        [
            "     step    score       kl  policy loss  value loss  clipped  entropy  tokens/s  \
             rollout s  experience s  update s   step s",
            "     3/20    0.250      nan      -0.0015      1.0e12    0.000        -      1234      \
             12.35             -         -        -",
            "1000/1000        -        -            -           -        -        -         -          \
             -             -         -        -",
        ]
    );
}
