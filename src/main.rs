//! The command line: `ppo-kernels train`, `sft`, `reward` and `dpo` train a model, `generate` and `eval` look
//! at it, `demo` does it all; `check` holds the kernels against their references, `bench-table` prints what
//! the benches measured.
//!
//! Exit status: 0 when the run ended, also after Ctrl-C, SIGTERM or SIGHUP; 1 for an error, or when a bound is exceeded;
//! 2 for a command line that cannot be read; 130 when a second Ctrl-C quits at once.

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{ensure, Context, Result};
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};
use ppo_kernels::driver::bench_table::{self, BenchTableArgs};
use ppo_kernels::driver::check::{CheckArgs, Report};
use ppo_kernels::driver::config::tuning::{DpoSettings, RewardModelSettings, SftSettings};
use ppo_kernels::driver::config::{ConfigArgs, RunSettings, TrainArgs};
use ppo_kernels::driver::demo::DemoSettings;
use ppo_kernels::driver::evaluate::{EvalArgs, GenerateArgs};
use ppo_kernels::driver::report::Progress;
use ppo_kernels::driver::{demo, dpo, embedded, evaluate, reward_model, sft, train};

const EMBEDDED: &str =
    "The defaults are for a real model. Without --model the embedded run has settings of its own; \
the config.toml of its folder shows them.";

/// PPO for language models, from fused kernels
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a language model with PPO, GRPO, RLOO or REINFORCE++; with no option, a small embedded one
    #[command(after_help = EMBEDDED)]
    Train(Box<TrainArgs>),
    /// Train a language model on demonstrations; with no option, the embedded one on its corpus
    #[command(after_help = EMBEDDED)]
    Sft(Box<ConfigArgs<SftSettings>>),
    /// Train a reward model on preferences; with no option, on pairs of the embedded sentences
    #[command(after_help = EMBEDDED)]
    Reward(Box<ConfigArgs<RewardModelSettings>>),
    /// Train a language model on preferences by DPO; with no option, on those of `reward`
    #[command(after_help = EMBEDDED)]
    Dpo(Box<ConfigArgs<DpoSettings>>),
    /// Answer prompts with a saved model, or with several side by side
    Generate(GenerateArgs),
    /// Score the answers of a saved model, or of several side by side
    Eval(EvalArgs),
    /// RLHF from end to end on the embedded data: SFT, preferences, reward model, PPO, DPO, and a table
    Demo(Box<ConfigArgs<DemoSettings>>),
    /// Compare every op, pass and dtype with its f64 reference on random inputs
    Check(CheckArgs),
    /// Print the results of `cargo bench` as a Markdown table
    BenchTable(BenchTableArgs),
}

fn main() -> ExitCode {
    // The matches are kept: they know which flags were given and which are defaults.
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    match run(&cli.command, &matches) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(format!("error: {error:#}").trim_end());
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command, matches: &ArgMatches) -> Result<()> {
    match command {
        Command::Train(args) => go(args, matches, embedded::TRAIN, train::run),
        Command::Sft(args) => go(args, matches, embedded::SFT, sft::run),
        Command::Dpo(args) => go(args, matches, embedded::DPO, dpo::run),
        Command::Reward(args) => go(args, matches, embedded::REWARD, reward_model::run),
        Command::Demo(args) => go(args, matches, "", demo::run),
        Command::Generate(args) => evaluate::generate(args, &Progress::new()),
        Command::Eval(args) => evaluate::eval(args, &Progress::new()),
        Command::Check(args) => {
            let report = Report::new(args)?;
            print(&report.table());
            ensure!(report.passed(), "{} rows exceed their bound", report.exceeded());
            Ok(())
        }
        Command::BenchTable(args) => {
            print(&bench_table::table(&args.dir)?);
            Ok(())
        }
    }
}

/// Resolves the settings and runs with them.
fn go<S: RunSettings>(
    args: &ConfigArgs<S>,
    matches: &ArgMatches,
    embedded: &str,
    run: impl FnOnce(&S, &AtomicBool, &Progress) -> Result<()>,
) -> Result<()> {
    let matches = matches.subcommand_matches(S::COMMAND).context("no flags of the command")?;
    let settings = args.resolve(matches, embedded)?;
    let progress = Progress::new();
    run(&settings, stop_on_ctrl_c(&progress)?, &progress)
}

/// A flag that the first Ctrl-C sets; the second one quits.
fn stop_on_ctrl_c(progress: &Progress) -> Result<&'static AtomicBool> {
    static STOP: AtomicBool = AtomicBool::new(false);
    let bars = progress.bars();
    ctrlc::set_handler(move || {
        if STOP.swap(true, Ordering::SeqCst) {
            say("\nquit");
            std::process::exit(130);
        }
        // Not here: the bars are locked while a line waits for a reader of stdout that is slow, and
        // the second Ctrl-C must not wait.
        let bars = bars.clone();
        std::thread::spawn(move || {
            bars.suspend(|| {
                say("stopping after this step; Ctrl-C again quits at once, back to the last checkpoint");
            });
        });
    })
    .context("cannot listen for Ctrl-C")?;
    Ok(&STOP)
}

/// Text on stdout; a reader that went away is no reason to panic.
fn print(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}

/// A line on stderr; that it cannot be written is no reason to panic.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}
