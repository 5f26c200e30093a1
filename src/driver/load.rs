//! Models on disk: a Hugging Face folder (`config.json`, `tokenizer.json`, `model.safetensors` or
//! its shards), or a GGUF file. Weights of any float type or quantisation become f32.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io::{self, BufReader, Read, Seek};
use std::path::Path;

use anyhow::{bail, ensure, Context, Result};
use candle_core::quantized::gguf_file::{Content, Value as Gguf};
use candle_core::safetensors::BufferedSafetensors;
use candle_core::{DType, Device, Tensor};
use serde_json::{json, Map, Value};

use super::model::{Critic, Decoder, DecoderConfig, RopeScaling};
use super::tokenizer::{integer, string, Tokenizer};

/// What a folder or file holds.
pub struct Loaded {
    /// The trainable model.
    pub decoder: Decoder,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
}

/// A reward model: what a folder with a scalar head in place of the language model's holds.
pub struct RewardModel {
    /// The backbone and the head.
    pub critic: Critic,
    /// The tokenizer of the texts that it scores.
    pub tokenizer: Tokenizer,
}

/// Loads a Hugging Face folder or a GGUF file onto `device`.
///
/// Only the Llama family; everything that it cannot do exactly is refused by name. Errors name the
/// file, and the key or tensor.
pub fn load(path: &Path, device: &Device) -> Result<Loaded> {
    let kind = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    let loaded = if kind.is_dir() { load_folder(path, device) } else { load_gguf(path, device) };
    loaded.with_context(|| format!("cannot load the model {}", path.display()))
}

/// Loads a Hugging Face folder of a sequence classifier with one label: the form of reward models,
/// and what [`save_reward`] writes.
pub fn load_reward(dir: &Path, device: &Device) -> Result<RewardModel> {
    let read = || {
        let (config, json) = read_config(dir, &CLASSIFIERS)?;
        let tokenizer = read_tokenizer(dir, &json)?;
        check_vocabulary(&config, &tokenizer)?;
        let critic = Critic::from_tensors(config, read_weights(dir, device)?)?;
        anyhow::Ok(RewardModel { critic, tokenizer })
    };
    read().with_context(|| format!("cannot load the reward model {}", dir.display()))
}

/// Writes `config.json`, `tokenizer.json` and `model.safetensors` into `dir`, which is made when
/// it is missing; [`load`] reads them back, and so does transformers.
pub fn save(dir: &Path, decoder: &Decoder, tokenizer: &Tokenizer) -> Result<()> {
    let architecture = json!({"architectures": ["LlamaForCausalLM"]});
    save_folder(dir, decoder.config(), architecture, decoder.tensors(), tokenizer)
}

/// Writes a reward model into `dir`, as [`save`] does a decoder; [`load_reward`] reads it back, and
/// so does transformers.
pub fn save_reward(dir: &Path, model: &Critic, tokenizer: &Tokenizer) -> Result<()> {
    let architecture = json!({
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
    });
    save_folder(dir, model.config(), architecture, model.tensors(), tokenizer)
}

fn save_folder(
    dir: &Path,
    config: &DecoderConfig,
    architecture: Value,
    tensors: Vec<(String, Tensor)>,
    tokenizer: &Tokenizer,
) -> Result<()> {
    let (Value::Object(mut config), Value::Object(architecture)) =
        (serde_json::to_value(config)?, architecture)
    else {
        unreachable!("both are objects")
    };
    config.extend(architecture);
    config.insert("model_type".into(), json!("llama"));
    config.insert("hidden_act".into(), json!("silu"));
    config.insert("torch_dtype".into(), json!("float32"));
    config.insert("eos_token_id".into(), json!(tokenizer.eos()));
    config.insert("pad_token_id".into(), json!(tokenizer.pad()));
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    write_text(&dir.join(CONFIG), serde_json::to_string_pretty(&config)?)?;
    write_text(&dir.join(TOKENIZER), tokenizer.to_json()?)?;
    // Without it transformers takes the tokenizer for SentencePiece and adds tokens of its own.
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.eos().first().and_then(|&id| tokenizer.token(id)),
        "pad_token": tokenizer.token(tokenizer.pad()),
        "clean_up_tokenization_spaces": false,
    });
    write_text(
        &dir.join("tokenizer_config.json"),
        serde_json::to_string_pretty(&tokenizer_config)?,
    )?;
    save_tensors(&dir.join(WEIGHTS), tensors)
}

fn write_text(path: &Path, text: String) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Writes a critic into the folder of its model, as `value_model.safetensors` and, as its shape may be
/// that of a reward model, `value_config.json`.
pub fn save_critic(dir: &Path, critic: &Critic) -> Result<()> {
    write_text(&dir.join(CRITIC_CONFIG), serde_json::to_string_pretty(critic.config())?)?;
    save_tensors(&dir.join(CRITIC_WEIGHTS), critic.tensors())
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

/// The architectures of language models, and those of reward models.
const DECODERS: [&str; 2] = ["LlamaForCausalLM", "MistralForCausalLM"];
const CLASSIFIERS: [&str; 2] =
    ["LlamaForSequenceClassification", "MistralForSequenceClassification"];

fn load_folder(dir: &Path, device: &Device) -> Result<Loaded> {
    let (config, json) = read_config(dir, &DECODERS)?;
    let tokenizer = read_tokenizer(dir, &json)?;
    check_vocabulary(&config, &tokenizer)?;
    let tensors = read_weights(dir, device)?;
    let decoder = Decoder::from_tensors(config, tensors)?;
    Ok(Loaded { decoder, tokenizer })
}

fn read_json(path: &Path) -> Result<Map<String, Value>> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not valid", path.display()))
}

fn read_config(
    dir: &Path,
    architectures: &[&str; 2],
) -> Result<(DecoderConfig, Map<String, Value>)> {
    let path = dir.join(CONFIG);
    let json = read_json(&path)?;
    let config = parse_config(&json, architectures).with_context(|| path.display().to_string())?;
    Ok((config, json))
}

/// The shape in a `config.json`, whose writers leave out what has its default.
fn parse_config(json: &Map<String, Value>, expected: &[&str; 2]) -> Result<DecoderConfig> {
    let set = |key: &str| json.get(key).filter(|value| !value.is_null());
    let architectures = set("architectures").cloned().unwrap_or(json!([]));
    let architecture = architectures.get(0).and_then(Value::as_str);
    let model_type = set("model_type").and_then(Value::as_str);
    let known =
        |name: Option<&str>, names: &[&str; 2]| name.is_none_or(|name| names.contains(&name));
    ensure!(
        (architecture.is_some() || model_type.is_some())
            && known(architecture, expected)
            && known(model_type, &["llama", "mistral"]),
        "unknown architecture {} (model_type {}): expected {} or {}",
        architecture.unwrap_or("none"),
        model_type.unwrap_or("none"),
        expected[0],
        expected[1],
    );

    // What changes the arithmetic and is not implemented.
    for (key, plain) in [
        ("hidden_act", json!("silu")),
        ("attention_bias", json!(false)),
        ("mlp_bias", json!(false)),
        ("partial_rotary_factor", json!(1.0)),
    ] {
        if let Some(value) = set(key) {
            ensure!(*value == plain, "{key}: only {plain} is supported, got {value}");
        }
    }
    ensure!(
        set("quantization_config").is_none(),
        "quantization_config: quantised safetensors are not supported; use the GGUF file"
    );

    let mut full = json.clone();
    let mut default = |key: &str, value: Option<Value>| {
        if full.get(key).is_none_or(Value::is_null) {
            full.insert(key.into(), value.unwrap_or(Value::Null));
        }
    };
    let heads = set("num_attention_heads").and_then(Value::as_u64);
    let width = set("hidden_size").and_then(Value::as_u64);
    default("num_key_value_heads", heads.map(|heads| json!(heads)));
    let head_dim = width.zip(heads).and_then(|(width, heads)| width.checked_div(heads));
    default("head_dim", head_dim.map(|dim| json!(dim)));
    default("rms_norm_eps", Some(json!(1e-6)));
    default("max_position_embeddings", Some(json!(2048)));
    default("tie_word_embeddings", Some(json!(false)));
    default("initializer_range", Some(json!(0.02)));
    // transformers 5 keeps the base and the scaling together, 4 apart.
    let rope = set("rope_parameters").or(set("rope_scaling"));
    let theta = rope.and_then(|rope| rope.get("rope_theta"));
    default("rope_theta", Some(theta.cloned().unwrap_or(json!(10000.0))));
    full.insert("rope_scaling".into(), rope_scaling(rope)?);

    let config: DecoderConfig = serde_json::from_value(Value::Object(full))?;
    config.validate()?;
    if let Some(window) = set("sliding_window") {
        ensure!(
            window.as_u64() >= Some(config.max_position_embeddings as u64),
            "sliding_window: attention over part of the context is not supported, got {window}"
        );
    }
    Ok(config)
}

/// A rope entry of a `config.json` in the form that [`RopeScaling`] has.
fn rope_scaling(rope: Option<&Value>) -> Result<Value> {
    let Some(rope) = rope else {
        return Ok(Value::Null);
    };
    let kind = rope.get("rope_type").or(rope.get("type"));
    match kind.and_then(Value::as_str) {
        None | Some("default") => Ok(Value::Null),
        Some("llama3") => {
            let mut rope = rope.clone();
            rope["rope_type"] = json!("llama3");
            Ok(rope)
        }
        Some(other) => {
            bail!("rope_scaling: expected the type \"default\" or \"llama3\", got {other:?}")
        }
    }
}

fn read_tokenizer(dir: &Path, config: &Map<String, Value>) -> Result<Tokenizer> {
    // Chat models often name further ends in generation_config.json only.
    let generation = dir.join("generation_config.json");
    let generation = if generation.exists() { read_json(&generation)? } else { Map::new() };
    let mut eos = Vec::new();
    for json in [config, &generation] {
        eos.extend(token_ids(json, "eos_token_id")?);
    }
    let pad = match token_ids(config, "pad_token_id")?.first() {
        Some(&pad) => pad,
        None => eos.first().copied().unwrap_or(0),
    };
    let path = dir.join(TOKENIZER);
    let json = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Tokenizer::from_json(&json, eos, pad)
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

fn load_gguf(path: &Path, device: &Device) -> Result<Loaded> {
    let file = BufReader::new(fs::File::open(path)?);
    let mut file = AlignmentGuard { file, before: Before::Other };
    let content = Content::read(&mut file)
        .context("expected a Hugging Face folder or a GGUF file; this is damaged or neither")?;
    let config = gguf_config(&content, &mut file)?;
    let tokenizer = Tokenizer::from_gguf(&content.metadata)?;
    check_vocabulary(&config, &tokenizer)?;

    let mut names: Vec<&String> = content.tensor_infos.keys().collect();
    names.sort();
    let mut tensors = HashMap::new();
    for name in names.into_iter().filter(|name| *name != ROPE_FACTORS) {
        let (hf_name, heads) = hf_name(name, &config)?;
        let tensor = read_gguf_tensor(&content, &mut file, name, device)?;
        let tensor = match heads {
            Some(heads) => half_rotation(&tensor, heads, config.head_dim)
                .with_context(|| format!("tensor {name}"))?,
            None => tensor,
        };
        tensors.insert(hf_name, tensor);
    }
    let decoder = Decoder::from_tensors(config, tensors)?;
    Ok(Loaded { decoder, tokenizer })
}

/// A reader of a GGUF file that refuses an alignment of 0, by which candle would divide. candle
/// reads the key, the type of the value and the value in a read each.
struct AlignmentGuard<R> {
    file: R,
    before: Before,
}

/// What the next read of an [`AlignmentGuard`] follows.
enum Before {
    Other,
    Key,
    Type,
}

impl<R: Read> Read for AlignmentGuard<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }

    fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact(buffer)?;
        let zeros = buffer.iter().rev().take_while(|&&byte| byte == 0).count();
        self.before = match self.before {
            Before::Type if !buffer.is_empty() && zeros == buffer.len() => {
                return Err(io::Error::other("general.alignment: expected at least 1, got 0"));
            }
            Before::Key if buffer.len() == 4 => Before::Type,
            // candle drops zeros at the end of a key.
            _ if buffer[..buffer.len() - zeros] == *b"general.alignment" => Before::Key,
            _ => Before::Other,
        };
        Ok(())
    }
}

impl<R: Seek> Seek for AlignmentGuard<R> {
    fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

fn read_gguf_tensor(
    content: &Content,
    file: &mut (impl Read + Seek),
    name: &str,
    device: &Device,
) -> Result<Tensor> {
    // candle trusts the shape: a damaged one would overflow there, or be an empty slice.
    let shape = content.tensor_infos[name].shape.dims();
    let elements = (shape.iter()).try_fold(1usize, |product, &dim| product.checked_mul(dim));
    ensure!(
        elements.is_some_and(|elements| (1..1 << 40).contains(&elements)),
        "tensor {name}: {shape:?} is no shape of a weight"
    );
    // Unpacked on the CPU: the same weights on every device.
    (content.tensor(file, name, &Device::Cpu))
        .and_then(|tensor| tensor.dequantize(&Device::Cpu)?.to_device(device))
        .with_context(|| format!("tensor {name}"))
}

fn gguf_config(content: &Content, file: &mut (impl Read + Seek)) -> Result<DecoderConfig> {
    let metadata = &content.metadata;
    let architecture = string(metadata, "general.architecture")?;
    ensure!(
        architecture == "llama",
        "unknown architecture {architecture}: expected llama (general.architecture)"
    );
    let find = |key: &str| metadata.get(&format!("llama.{key}"));
    let size = |key: &str| -> Result<Option<usize>> {
        find(key)
            .map(|value| anyhow::Ok(usize::try_from(integer(value)?)?))
            .transpose()
            .with_context(|| format!("llama.{key}"))
    };
    let need = |key: &str| size(key)?.with_context(|| format!("llama.{key} is missing"));
    let float = |key: &str| -> Result<Option<f64>> {
        find(key)
            .map(|value| anyhow::Ok(f64::from(value.to_f32()?)))
            .transpose()
            .with_context(|| format!("llama.{key}"))
    };
    let hidden_size = need("embedding_length")?;
    let num_attention_heads = need("attention.head_count")?;
    let embedding = content
        .tensor_infos
        .get("token_embd.weight")
        .context("tensor token_embd.weight is missing")?;
    let head_dim = match size("attention.key_length")? {
        Some(dim) => dim,
        None => (hidden_size.checked_div(num_attention_heads))
            .context("llama.attention.head_count: expected a positive number, got 0")?,
    };
    let mut config = DecoderConfig {
        vocab_size: embedding.shape.dims().first().copied().unwrap_or(0),
        hidden_size,
        intermediate_size: need("feed_forward_length")?,
        num_hidden_layers: need("block_count")?,
        num_attention_heads,
        num_key_value_heads: size("attention.head_count_kv")?.unwrap_or(num_attention_heads),
        head_dim,
        // Stored as f32; the shortest decimal that reads back the same is what was meant.
        rms_norm_eps: shortest(
            float("attention.layer_norm_rms_epsilon")?
                .context("llama.attention.layer_norm_rms_epsilon is missing")?,
        ),
        rope_theta: float("rope.freq_base")?.unwrap_or(10000.0),
        rope_scaling: None,
        max_position_embeddings: need("context_length")?,
        tie_word_embeddings: !content.tensor_infos.contains_key("output.weight"),
        initializer_range: 0.02,
    };
    config.validate()?;

    let experts = size("expert_count")?.unwrap_or(0);
    ensure!(experts == 0, "llama.expert_count: mixtures of experts are not supported");
    let rotary = size("rope.dimension_count")?.unwrap_or(head_dim);
    ensure!(
        rotary == head_dim,
        "llama.rope.dimension_count: only the whole head ({head_dim}) is supported, got {rotary}"
    );
    if let Some(Gguf::String(kind)) = find("rope.scaling.type") {
        ensure!(
            kind == "none",
            "llama.rope.scaling.type: only \"none\" is supported, got {kind:?}"
        );
    }
    if content.tensor_infos.contains_key(ROPE_FACTORS) {
        let factors = read_gguf_tensor(content, file, ROPE_FACTORS, &Device::Cpu)?;
        config.rope_scaling = Some(llama3_scaling(&config, &factors.flatten_all()?.to_vec1()?)?);
    }
    Ok(config)
}

fn shortest(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}

/// A GGUF file holds what Llama 3's scaling divides each rotary frequency by.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Llama 3's settings from the divisors of the frequencies. All released models differ in the
/// factor alone.
fn llama3_scaling(config: &DecoderConfig, divisors: &[f32]) -> Result<RopeScaling> {
    let scaling = RopeScaling::Llama3 {
        factor: f64::from(divisors.iter().copied().fold(1.0, f32::max)),
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let scaled = DecoderConfig { rope_scaling: Some(scaling.clone()), ..config.clone() };
    scaled.validate()?;
    let (plain, scaled) = (config.frequencies(), scaled.frequencies());
    let same = divisors.len() == plain.len()
        && (plain.iter().zip(&scaled).zip(divisors))
            .all(|((plain, scaled), divisor)| (plain / scaled / divisor - 1.0).abs() < 1e-3);
    ensure!(same, "tensor {ROPE_FACTORS}: not the rotary scaling of Llama 3");
    Ok(scaling)
}

/// The Hugging Face name of a GGUF tensor, and the number of heads when its rows hold them.
fn hf_name(name: &str, config: &DecoderConfig) -> Result<(String, Option<usize>)> {
    let unknown = || format!("tensor {name} has no place in a Llama");
    let part = |part: &str| {
        Some(match part {
            "attn_norm" => ("input_layernorm", None),
            "attn_q" => ("self_attn.q_proj", Some(config.num_attention_heads)),
            "attn_k" => ("self_attn.k_proj", Some(config.num_key_value_heads)),
            "attn_v" => ("self_attn.v_proj", None),
            "attn_output" => ("self_attn.o_proj", None),
            "ffn_norm" => ("post_attention_layernorm", None),
            "ffn_gate" => ("mlp.gate_proj", None),
            "ffn_up" => ("mlp.up_proj", None),
            "ffn_down" => ("mlp.down_proj", None),
            _ => return None,
        })
    };
    let stem = name.strip_suffix(".weight").with_context(unknown)?;
    Ok(match stem {
        "token_embd" => ("model.embed_tokens.weight".into(), None),
        "output_norm" => ("model.norm.weight".into(), None),
        "output" => ("lm_head.weight".into(), None),
        _ => {
            let (layer, rest) = (stem.strip_prefix("blk."))
                .and_then(|stem| stem.split_once('.'))
                .with_context(unknown)?;
            let (rest, heads) = part(rest).with_context(unknown)?;
            (format!("model.layers.{layer}.{rest}.weight"), heads)
        }
    })
}

/// Rows of a query or key projection from llama.cpp's order, in which the two dimensions that
/// rotate together are neighbours, to that in which they are half a head apart.
fn half_rotation(weight: &Tensor, heads: usize, head_dim: usize) -> Result<Tensor> {
    let (rows, width) = weight.dims2()?;
    ensure!(rows == heads * head_dim, "expected {heads} heads of {head_dim} rows, got {rows} rows");
    Ok(weight.reshape((heads, head_dim / 2, 2, width))?.transpose(1, 2)?.reshape((rows, width))?)
}
