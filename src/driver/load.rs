//! Models on disk: a Hugging Face folder (`config.json`, `tokenizer.json`, `model.safetensors` or
//! its shards), a GGUF file, or adapters for one of the two. Weights of any float type or quantisation become f32.

mod adapter;
mod config;
mod gguf;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::Path;

use anyhow::{bail, ensure, Context, Result};
use candle_core::safetensors::BufferedSafetensors;
use candle_core::{DType, Device, Tensor};
use serde_json::{json, Map, Value};

pub use self::adapter::{check_adapter_base, save_adapter};
use self::config::Task;
use super::model::{Critic, Decoder, DecoderConfig, Lora};
use super::tokenizer::{self, Tokenizer};

/// The model and tokenizer of a folder or file.
pub struct Loaded {
    /// The trainable model.
    pub decoder: Decoder,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
}

impl Loaded {
    /// Adds new adapters, if any are wanted, which alone are trainable from now on.
    ///
    /// # Errors
    /// Those of [`Decoder::with_lora`].
    pub fn with_lora(self, lora: Option<Lora>, seed: u64) -> Result<Self> {
        let Some(lora) = lora else {
            return Ok(self);
        };
        Ok(Self { decoder: self.decoder.with_lora(lora, seed)?, ..self })
    }
}

/// A reward model: what a folder with a scalar head in place of the language model's holds.
pub struct RewardModel {
    /// The backbone and the head.
    pub critic: Critic,
    /// The tokenizer of the texts that it scores.
    pub tokenizer: Tokenizer,
}

/// Loads a Hugging Face folder, a GGUF file or a folder of PEFT's with adapters, which are added to the
/// weights of the model that it names, onto `device`.
///
/// Only the architectures of [`Architecture`](super::model::Architecture); everything that they cannot do
/// exactly is refused by name. Errors name the file, and the key or tensor.
pub fn load(path: &Path, device: &Device) -> Result<Loaded> {
    let kind = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    let loaded =
        if kind.is_dir() { load_folder(path, device) } else { gguf::load_gguf(path, device) };
    loaded.with_context(|| format!("cannot load the model {}", path.display()))
}

/// Loads a Hugging Face folder of a sequence classifier with one label: the form of reward models,
/// and what [`save_reward`] writes.
pub fn load_reward(dir: &Path, device: &Device) -> Result<RewardModel> {
    let read = || {
        let (config, tokenizer) = read_shape(dir, Task::Reward)?;
        let critic = Critic::from_tensors(config, read_weights(dir, device)?)?;
        anyhow::Ok(RewardModel { critic, tokenizer })
    };
    read().with_context(|| format!("cannot load the reward model {}", dir.display()))
}

/// Writes `config.json`, `tokenizer.json` and `model.safetensors` into `dir`, which is made when
/// it is missing; [`load`] reads them back, and so does transformers. Adapters are added to the weights.
pub fn save(dir: &Path, decoder: &Decoder, tokenizer: &Tokenizer) -> Result<()> {
    save_folder(dir, decoder.config(), Task::LanguageModel, decoder.merged_tensors()?, tokenizer)
}

/// Writes what was trained: adapters for the model `adapter_base`, or a whole model.
///
/// # Errors
/// Those of [`save_adapter`] and [`save`].
pub fn save_trained(
    dir: &Path,
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    adapter_base: Option<&Path>,
) -> Result<()> {
    match adapter_base {
        Some(base) => save_adapter(dir, decoder, tokenizer, base),
        None => save(dir, decoder, tokenizer),
    }
}

/// Writes a reward model into `dir`, as [`save`] does a decoder; [`load_reward`] reads it back, and
/// so does transformers.
pub fn save_reward(dir: &Path, model: &Critic, tokenizer: &Tokenizer) -> Result<()> {
    save_folder(dir, model.config(), Task::Reward, model.merged_tensors()?, tokenizer)
}

fn save_folder(
    dir: &Path,
    config: &DecoderConfig,
    task: Task,
    tensors: Vec<(String, Tensor)>,
    tokenizer: &Tokenizer,
) -> Result<()> {
    let mut json = match &config.file {
        Some(file) => file.clone(),
        None => {
            let Value::Object(mut json) = serde_json::to_value(config)? else {
                unreachable!("a struct is an object")
            };
            json.insert("hidden_act".into(), json!(config.model_type.hidden_act()));
            json.insert("eos_token_id".into(), json!(tokenizer.eos()));
            json.insert("pad_token_id".into(), json!(tokenizer.pad()));
            json
        }
    };
    json.insert("architectures".into(), json!([task.class(config.model_type)]));
    json.insert("torch_dtype".into(), json!("float32"));
    json.insert("tie_word_embeddings".into(), json!(config.tie_word_embeddings));
    if task == Task::Reward {
        json.insert("id2label".into(), json!({"0": "score"}));
        json.insert("label2id".into(), json!({"score": 0}));
        // Where the text ends, transformers finds by what fills the batch behind it.
        json.insert("pad_token_id".into(), json!(tokenizer.pad()));
    }
    save_tokenizer(dir, tokenizer)?;
    write_text(&dir.join(CONFIG), serde_json::to_string_pretty(&json)?)?;
    save_tensors(&dir.join(WEIGHTS), tensors)
}

/// Makes the folder and writes the tokenizer into it.
fn save_tokenizer(dir: &Path, tokenizer: &Tokenizer) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    write_text(&dir.join(TOKENIZER), tokenizer.to_json()?)?;
    for (name, text) in tokenizer.files()? {
        write_text(&dir.join(name), text)?;
    }
    Ok(())
}

fn write_text(path: &Path, text: String) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Writes a critic into the folder of its model, as `value_model.safetensors` and, as its shape may be
/// that of a reward model, `value_config.json`.
pub fn save_critic(dir: &Path, critic: &Critic) -> Result<()> {
    write_text(&dir.join(CRITIC_CONFIG), serde_json::to_string_pretty(critic.config())?)?;
    save_tensors(&dir.join(CRITIC_WEIGHTS), critic.merged_tensors()?)
}

/// Reads the critic in a folder written by [`save`] and [`save_critic`].
pub fn load_critic(dir: &Path, device: &Device) -> Result<Critic> {
    let path = dir.join(CRITIC_CONFIG);
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let config = serde_json::from_slice(&text)
        .with_context(|| format!("{} is not valid", path.display()))?;
    let mut tensors = HashMap::new();
    read_tensors(&dir.join(CRITIC_WEIGHTS), device, |_| true, &mut tensors)?;
    Critic::from_tensors(config, tensors)
        .with_context(|| dir.join(CRITIC_WEIGHTS).display().to_string())
}

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";
const WEIGHTS_INDEX: &str = "model.safetensors.index.json";
const CRITIC_WEIGHTS: &str = "value_model.safetensors";
const CRITIC_CONFIG: &str = "value_config.json";

fn load_folder(dir: &Path, device: &Device) -> Result<Loaded> {
    if adapter::is_there(dir) {
        return adapter::load(dir, device);
    }
    load_whole(dir, device)
}

fn load_whole(dir: &Path, device: &Device) -> Result<Loaded> {
    let (config, tokenizer) = read_shape(dir, Task::LanguageModel)?;
    let decoder = Decoder::from_tensors(config, read_weights(dir, device)?)?;
    Ok(Loaded { decoder, tokenizer })
}

/// Reads what can be refused of a folder before its weights are read.
fn read_shape(dir: &Path, task: Task) -> Result<(DecoderConfig, Tokenizer)> {
    let path = dir.join(CONFIG);
    let json = read_json(&path)?;
    let config = config::parse(&json, task).with_context(|| path.display().to_string())?;
    let tokenizer = read_tokenizer(dir, &json)?;
    check_vocabulary(&config, &tokenizer)?;
    Ok((config, tokenizer))
}

fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn read_json(path: &Path) -> Result<Map<String, Value>> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse_json(path, &text)
}

fn parse_json(path: &Path, text: &[u8]) -> Result<Map<String, Value>> {
    serde_json::from_slice(text).with_context(|| format!("{} is not valid", path.display()))
}

fn read_tokenizer(dir: &Path, config: &Map<String, Value>) -> Result<Tokenizer> {
    let (mut files, mut eos) = (Vec::new(), token_ids(config, "eos_token_id")?);
    for name in tokenizer::FILES {
        let path = dir.join(name);
        if !path.exists() {
            continue;
        }
        let text = read_text(&path)?;
        if name.ends_with(".json") {
            let json = parse_json(&path, text.as_bytes())?;
            // Chat models often name further ends in generation_config.json only.
            let ends = token_ids(&json, "eos_token_id");
            eos.extend(ends.with_context(|| path.display().to_string())?);
        }
        files.push((name.to_owned(), text));
    }
    let pad = token_ids(config, "pad_token_id")?.first().copied();
    let path = dir.join(TOKENIZER);
    Tokenizer::from_json(read_text(&path)?.as_bytes(), files, eos, pad)
        .with_context(|| format!("{} is not valid", path.display()))
}

/// Token ids under a key: none, one, or a list. -1 is an old way to write none.
fn token_ids(json: &Map<String, Value>, key: &str) -> Result<Vec<u32>> {
    let values = match json.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(values)) => values.clone(),
        Some(value) => vec![value.clone()],
    };
    values
        .iter()
        .filter(|value| value.as_i64() != Some(-1))
        .map(|value| {
            (value.as_u64().and_then(|id| u32::try_from(id).ok()))
                .with_context(|| format!("{key}: expected a token id, got {value}"))
        })
        .collect()
}

fn check_vocabulary(config: &DecoderConfig, tokenizer: &Tokenizer) -> Result<()> {
    ensure!(
        tokenizer.vocab_size() <= config.vocab_size,
        "the tokenizer has {} tokens, but vocab_size is {}",
        tokenizer.vocab_size(),
        config.vocab_size
    );
    for &id in tokenizer.eos().iter().chain([&tokenizer.pad()]) {
        ensure!(
            (id as usize) < config.vocab_size,
            "eos_token_id or pad_token_id {id} is not below vocab_size {}",
            config.vocab_size
        );
    }
    Ok(())
}

fn read_weights(dir: &Path, device: &Device) -> Result<HashMap<String, Tensor>> {
    let mut tensors = HashMap::new();
    let single = dir.join(WEIGHTS);
    if single.exists() {
        read_tensors(&single, device, |_| true, &mut tensors)?;
        return Ok(tensors);
    }
    let index = dir.join(WEIGHTS_INDEX);
    ensure!(index.exists(), "neither {WEIGHTS} nor {WEIGHTS_INDEX} is there");
    let context = || format!("{}: weight_map", index.display());
    let map = read_json(&index)?.remove("weight_map");
    let map: BTreeMap<String, String> =
        serde_json::from_value(map.unwrap_or_default()).with_context(context)?;
    for shard in map.values().collect::<BTreeSet<_>>() {
        ensure!(
            Path::new(shard).file_name() == Some(shard.as_ref()),
            "{}: expected file names, got {shard:?}",
            context()
        );
        let belongs = |name: &str| map.get(name) == Some(shard);
        read_tensors(&dir.join(shard), device, belongs, &mut tensors)?;
    }
    match map.iter().find(|(name, _)| !tensors.contains_key(*name)) {
        Some((name, shard)) => {
            bail!("tensor {name} is not in {shard}, where {WEIGHTS_INDEX} has it")
        }
        None => Ok(tensors),
    }
}

/// Adds the wanted tensors of a safetensors file, as f32.
fn read_tensors(
    path: &Path,
    device: &Device,
    wanted: impl Fn(&str) -> bool,
    tensors: &mut HashMap<String, Tensor>,
) -> Result<()> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let file = BufferedSafetensors::new(bytes)
        .with_context(|| format!("{} is damaged or no safetensors file", path.display()))?;
    for (name, _) in file.tensors() {
        if wanted(&name) {
            let tensor = file
                .load(&name, device)
                .and_then(|tensor| match tensor.dtype().is_float() {
                    true => tensor.to_dtype(DType::F32),
                    false => Ok(tensor),
                })
                .with_context(|| format!("{}: tensor {name}", path.display()))?;
            tensors.insert(name, tensor);
        }
    }
    Ok(())
}

fn save_tensors(path: &Path, tensors: Vec<(String, Tensor)>) -> Result<()> {
    let tensors: HashMap<String, Tensor> = tensors.into_iter().collect();
    // Under another name until it is whole: a full disk or a kill leaves no half model.
    let partial = path.with_extension("partial");
    let written = candle_core::safetensors::save(&tensors, &partial)
        .map_err(anyhow::Error::from)
        .and_then(|()| Ok(fs::rename(&partial, path)?));
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}
