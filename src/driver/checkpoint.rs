//! Checkpoints: all that a run needs to go on as if it had never been stopped.
//!
//! | file in `checkpoint-STEP/` | content |
//! |---|---|
//! | `state.json` | step, lengths of the run's lines, generator, and what else the command keeps |
//! | `state.safetensors` | weights of all networks and moments of their optimisers |
//!
//! One is written beside the last and gets its name when it is whole, then the last one goes: a kill or a full
//! disk leaves one of them. A run that came to its end has weights and no checkpoint.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, ensure, Context, Result};
use candle_core::{Device, Tensor, Var};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Something that goes on from a checkpoint.
pub trait Resumable {
    /// The state besides tensors.
    type State: Serialize + DeserializeOwned;

    /// Its tensors by name.
    fn tensors(&self) -> Vec<(String, Tensor)>;

    /// What it keeps besides.
    ///
    /// # Errors
    /// If something cannot be read from its device.
    fn state(&self) -> Result<Self::State>;

    /// Takes the place of that which was saved.
    ///
    /// # Errors
    /// If it was another one: of another shape, from another model or from other data.
    fn restore(&mut self, state: Self::State, tensors: &Tensors) -> Result<()>;
}

/// Where a run was when the checkpoint was made.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Saved<S> {
    /// The program's version: another one may compute other numbers.
    version: String,
    #[serde(flatten)]
    position: Position,
    state: S,
}

/// How far a run had come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Steps that are done.
    pub step: usize,
    /// Bytes of `metrics.jsonl`.
    pub metrics_len: u64,
    /// Bytes of `samples.jsonl`.
    pub samples_len: u64,
}

/// The tensors of a checkpoint.
#[derive(Debug)]
pub struct Tensors(HashMap<String, Tensor>);

impl Tensors {
    /// Gives variables the values that were saved under `prefix` and their name.
    ///
    /// # Errors
    /// If one is missing or of another shape.
    pub fn set(&self, prefix: &str, vars: &[(String, Var)]) -> Result<()> {
        for (name, var) in vars {
            let name = format!("{prefix}{name}");
            let saved = self.0.get(&name).with_context(|| format!("tensor {name} is missing"))?;
            ensure!(
                saved.dims() == var.dims() && saved.dtype() == var.dtype(),
                "tensor {name} is {:?} of {:?}, expected {:?} of {:?}",
                saved.dtype(),
                saved.dims(),
                var.dtype(),
                var.dims()
            );
            var.set(&saved.to_device(var.device())?)?;
        }
        Ok(())
    }
}

/// Variables with their names behind `prefix`.
pub fn prefixed<'a>(
    prefix: &'a str,
    vars: &'a [(String, Var)],
) -> impl Iterator<Item = (String, Tensor)> + 'a {
    vars.iter().map(move |(name, var)| (format!("{prefix}{name}"), var.as_tensor().clone()))
}

/// A number that says whether weights that never change, and are not saved, are those that a run started from.
/// It is made when it is first asked for.
#[derive(Debug, Default)]
pub struct Fingerprint(OnceCell<u64>);

impl Fingerprint {
    /// The fingerprint of the weights.
    ///
    /// # Errors
    /// If they cannot be read from their device.
    pub fn of(&self, weights: impl FnOnce() -> Vec<(String, Tensor)>) -> Result<u64> {
        if let Some(&known) = self.0.get() {
            return Ok(known);
        }
        let made = fingerprint(&weights())?;
        Ok(*self.0.get_or_init(|| made))
    }

    /// Checks that they are those of a checkpoint.
    ///
    /// # Errors
    /// If they are others.
    pub fn check(&self, saved: u64, weights: impl FnOnce() -> Vec<(String, Tensor)>) -> Result<()> {
        let is_same = self.of(weights)? == saved;
        ensure!(is_same, "the model is another one than the run started from");
        Ok(())
    }
}

/// FNV-1a over the weights' bits.
fn fingerprint(tensors: &[(String, Tensor)]) -> Result<u64> {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for (_, tensor) in tensors {
        for x in tensor.flatten_all()?.to_vec1::<f32>()? {
            hash = (hash ^ u64::from(x.to_bits())).wrapping_mul(0x100_0000_01b3);
        }
    }
    Ok(hash)
}

const NAME: &str = "checkpoint-";
const STATE: &str = "state.json";
const TENSORS: &str = "state.safetensors";
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Writes a checkpoint into the folder of a run, and removes those before it.
///
/// # Errors
/// If it cannot be written. The last one is there still.
pub fn save<R: Resumable>(run: &Path, position: Position, resumable: &R) -> Result<()> {
    let dir = run.join(format!("{NAME}{}", position.step));
    let partial = dir.with_extension("partial");
    let write = || -> Result<()> {
        let _ = fs::remove_dir_all(&partial); // of a run that was killed here
        fs::create_dir(&partial)?;
        let state = resumable.state()?;
        let saved = Saved { version: VERSION.to_owned(), position, state };
        fs::write(partial.join(STATE), serde_json::to_vec(&saved)?)?;
        let tensors: HashMap<String, Tensor> = resumable.tensors().into_iter().collect();
        candle_core::safetensors::save(&tensors, partial.join(TENSORS))?;
        // Of a run that stopped where it had been saved.
        let _ = fs::remove_dir_all(&dir);
        Ok(fs::rename(&partial, &dir)?)
    };
    let written = write();
    if written.is_err() {
        let _ = fs::remove_dir_all(&partial);
    }
    written.with_context(|| format!("cannot write {}", dir.display()))?;
    for (step, old) in all(run)? {
        if step != position.step {
            let _ = fs::remove_dir_all(old);
        }
    }
    Ok(())
}

/// Removes all checkpoints of a run that came to its end.
pub fn remove(run: &Path) {
    for (_, dir) in all(run).unwrap_or_default() {
        let _ = fs::remove_dir_all(dir);
    }
}

/// The checkpoints of a run with their steps, the last one at the end.
fn all(run: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let entries = fs::read_dir(run).with_context(|| format!("cannot read {}", run.display()))?;
    let mut found: Vec<(usize, PathBuf)> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let step = entry.file_name().to_str()?.strip_prefix(NAME)?.parse().ok()?;
            Some((step, entry.path()))
        })
        .collect();
    found.sort();
    Ok(found)
}

/// The last checkpoint of a run, if there is one, and where the run was.
///
/// # Errors
/// One that cannot be read, or that another version of the program wrote.
pub fn last(run: &Path) -> Result<Option<(PathBuf, Position)>> {
    let Some((_, dir)) = all(run)?.pop() else {
        return Ok(None);
    };
    let Saved { position, .. } = read::<serde::de::IgnoredAny>(&dir)?;
    Ok(Some((dir, position)))
}

fn read<S: DeserializeOwned>(dir: &Path) -> Result<Saved<S>> {
    let path = dir.join(STATE);
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    // The version first: what else is there may be another one's.
    let of_version = serde_json::from_slice::<serde_json::Value>(&text)
        .with_context(|| format!("{} is damaged", path.display()))?;
    match of_version["version"].as_str() {
        Some(VERSION) => {}
        Some(other) => bail!("{} is of version {other}, this is {VERSION}", path.display()),
        None => bail!("{} has no version", path.display()),
    }
    serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))
}

/// Puts `resumable` in the place of that which was saved in a checkpoint.
///
/// # Errors
/// A checkpoint that is damaged, or of something else.
pub fn restore<R: Resumable>(dir: &Path, resumable: &mut R) -> Result<()> {
    let Saved { state, .. } = read(dir)?;
    let path = dir.join(TENSORS);
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu)
        .with_context(|| format!("{} cannot be read", path.display()))?;
    resumable
        .restore(state, &Tensors(tensors))
        .with_context(|| format!("{} does not fit", dir.display()))
}
