//! Scores from any program: JSON lines in, JSON lines out.
//!
//! For each batch `sh -c COMMAND` is started once. Its standard input gets one line
//! `{"prompt": "..", "response": ".."}` a sample and is then closed; its standard output must hold
//! one line `{"score": 0.5}` a sample, in the same order (blank lines and further keys are passed
//! over), and it must exit with status 0 within the timeout. Anything else is an error that quotes
//! the end of its standard error.

use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure, Context, Result};
use serde_json::{Map, Value};
use wait_timeout::ChildExt;

use super::{Reward, Sample};

/// The longest answer in bytes, in all and for each sample.
const OUTPUT_LIMIT: (usize, usize) = (1 << 20, 1 << 12);
/// How much of the command's standard error is kept and shown, in bytes.
const STDERR_TAIL: usize = 2000;
/// How long a killed or finished command's pipes may take to close.
const GRACE: Duration = Duration::from_secs(1);

/// A reward that a program computes; see the module.
pub struct CommandReward {
    command: String,
    timeout: Duration,
}

impl CommandReward {
    /// A reward from the shell command `command`, which may take `timeout` for a batch.
    pub fn new(command: &str, timeout: Duration) -> Self {
        Self { command: command.to_owned(), timeout }
    }

    /// Scores one made-up sample, so that a command that cannot work fails before the run.
    pub fn probe(&mut self) -> Result<()> {
        let sample = Sample {
            prompt: "The cat sat on the",
            response: "mat.",
            prompt_ids: &[],
            response_ids: &[],
        };
        self.score(&[sample]).context("the reward command was tried before the run")?;
        Ok(())
    }

    fn answer(&self, samples: &[Sample]) -> Result<Vec<f32>> {
        let mut input = Vec::new();
        for sample in samples {
            serde_json::to_writer(&mut input, sample)?;
            input.push(b'\n');
        }
        let limit = OUTPUT_LIMIT.0 + OUTPUT_LIMIT.1 * samples.len();
        let finished = run(&self.command, self.timeout, input, limit)?;
        scores(&finished.stdout, samples.len()).map_err(|error| finished.blame(error))
    }
}

impl Reward for CommandReward {
    fn name(&self) -> &str {
        "command"
    }

    fn score(&mut self, samples: &[Sample]) -> Result<Vec<f32>> {
        if samples.is_empty() {
            return Ok(Vec::new());
        }
        self.answer(samples).with_context(|| format!("--reward-command `{}`", self.command))
    }
}

fn scores(stdout: &[u8], expected: usize) -> Result<Vec<f32>> {
    let text = std::str::from_utf8(stdout).context("the answer is not UTF-8")?;
    let lines = || text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let mut scores = Vec::with_capacity(expected);
    for (i, line) in lines() {
        let place = || {
            format!("line {} of the answer is not {{\"score\": NUMBER}}: {}", i + 1, quote(line))
        };
        let answer: Map<String, Value> = serde_json::from_str(line).with_context(place)?;
        let score = answer.get("score").and_then(Value::as_f64).with_context(place)? as f32;
        ensure!(score.is_finite(), "line {} of the answer has a score past 32 bits", i + 1);
        scores.push(score);
    }
    ensure!(
        scores.len() == expected,
        "the answer has {} lines for {expected} samples",
        scores.len()
    );
    Ok(scores)
}

fn quote(line: &str) -> String {
    const LONGEST: usize = 120;
    let mut shown: String = line.chars().take(LONGEST).collect();
    if line.chars().nth(LONGEST).is_some() {
        shown.push_str("...");
    }
    format!("`{shown}`")
}

/// The output of a command that ended by itself with status 0.
struct Finished {
    stdout: Vec<u8>,
    stderr: Tail,
}

impl Finished {
    fn blame(&self, error: anyhow::Error) -> anyhow::Error {
        self.stderr.blame(error)
    }
}

/// Runs a shell command to its end, or kills it with all that it started in its process group.
fn run(command: &str, timeout: Duration, input: Vec<u8>, limit: usize) -> Result<Finished> {
    let start = Instant::now();
    let mut shell = Command::new("sh");
    shell.args(["-c", command]);
    shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // A group of its own: the timeout reaches the shell's children, and the terminal's Ctrl-C,
    // which lets the current step end, does not.
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut shell, 0);
    let mut child = shell.spawn().context("cannot start sh")?;

    let stderr = Tail::of(child.stderr.take());
    let outcome = converse(&mut child, start, timeout, input, limit);
    if outcome.is_err() {
        kill(&mut child);
    }
    match outcome {
        Ok((stdout, status)) if status.success() => Ok(Finished { stdout, stderr }),
        Ok((_, status)) => Err(stderr.blame(anyhow!("it ended with {status}"))),
        Err(error) => Err(stderr.blame(error)),
    }
}

/// Feeds the command and collects its answer. Both pipes have a thread, for either may be full
/// while the command waits on the other; the threads are not joined, for a process that left the
/// group could hold a pipe open for ever.
fn converse(
    child: &mut Child,
    start: Instant,
    timeout: Duration,
    input: Vec<u8>,
    limit: usize,
) -> Result<(Vec<u8>, ExitStatus)> {
    let late = || anyhow!("it did not end within {} s (--reward-timeout)", timeout.as_secs_f64());
    let mut stdin = child.stdin.take().context("no standard input")?;
    // A command need not read its input: the answer is what counts, so a broken pipe is none.
    thread::spawn(move || stdin.write_all(&input).ok());

    let stdout = child.stdout.take().context("no standard output")?;
    let answer = in_background(move || {
        let mut answer = Vec::new();
        stdout.take(limit as u64 + 1).read_to_end(&mut answer).map(|_| answer)
    });
    let answer = answer.recv_timeout(timeout).map_err(|_| late())?;
    let answer = answer.context("cannot read its answer")?;
    ensure!(answer.len() <= limit, "its answer is longer than {limit} bytes");

    let left = timeout.saturating_sub(start.elapsed());
    let status = child.wait_timeout(left).context("cannot wait for it")?.ok_or_else(late)?;
    Ok((answer, status))
}

fn in_background<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(work()).ok());
    receiver
}

/// Ends the process group of `child`, and waits for the child itself.
fn kill(child: &mut Child) {
    #[cfg(unix)]
    let _ = Command::new("sh")
        .args(["-c", &format!("kill -s KILL -- -{}", child.id())])
        .stderr(Stdio::null())
        .status();
    let _ = child.kill();
    let _ = child.wait();
}

/// The last bytes of a pipe, which a thread keeps empty.
struct Tail {
    bytes: Arc<Mutex<Vec<u8>>>,
    closed: Receiver<()>,
}

impl Tail {
    fn of(pipe: Option<impl Read + Send + 'static>) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&bytes);
        let closed = in_background(move || {
            let mut buffer = [0; 4096];
            let mut pipe = pipe;
            while let Some(Ok(n @ 1..)) = pipe.as_mut().map(|pipe| pipe.read(&mut buffer)) {
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend_from_slice(&buffer[..n]);
                let surplus = kept.len().saturating_sub(STDERR_TAIL);
                kept.drain(..surplus);
            }
        });
        Self { bytes, closed }
    }

    /// Adds the tail to an error.
    fn blame(&self, error: anyhow::Error) -> anyhow::Error {
        let _ = self.closed.recv_timeout(GRACE);
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&bytes);
        match text.trim() {
            "" => error,
            text => anyhow!("{error:#}; its standard error ends:\n{text}"),
        }
    }
}
