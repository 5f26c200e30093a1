//! `config.json` of Hugging Face: read as transformers reads it. What changes the arithmetic and is not
//! implemented, and what contradicts itself, is refused by its key.

use anyhow::{bail, ensure, Context, Result};
use serde::de::DeserializeOwned;
use serde_json::{json, Map, Value};

use crate::driver::model::{yarn_mscale, Architecture, DecoderConfig, LayerType, RopeScaling};

/// The task of a model: how its class ends in transformers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    LanguageModel,
    Reward,
}

impl Task {
    fn suffix(self) -> &'static str {
        match self {
            Self::LanguageModel => "ForCausalLM",
            Self::Reward => "ForSequenceClassification",
        }
    }

    /// The class of transformers.
    pub(super) fn class(self, architecture: Architecture) -> String {
        format!("{}{}", architecture.class(), self.suffix())
    }
}

/// Settings that writers leave out where they have the default of their architecture.
struct Defaults {
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    max_position_embeddings: u64,
    tie_word_embeddings: bool,
    rope_theta: f64,
}

impl Defaults {
    fn of(architecture: Architecture) -> Self {
        let llama = Self {
            num_key_value_heads: None,
            head_dim: None,
            max_position_embeddings: 2048,
            tie_word_embeddings: false,
            rope_theta: 1e4,
        };
        match architecture {
            Architecture::Llama => llama,
            Architecture::Mistral => {
                Self { num_key_value_heads: Some(8), max_position_embeddings: 1 << 17, ..llama }
            }
            Architecture::Qwen2 => {
                Self { num_key_value_heads: Some(32), max_position_embeddings: 1 << 15, ..llama }
            }
            Architecture::Qwen3 => Self {
                num_key_value_heads: Some(32),
                head_dim: Some(128),
                max_position_embeddings: 1 << 15,
                ..llama
            },
            Architecture::SmolLm3 => Self {
                num_key_value_heads: Some(4),
                max_position_embeddings: 1 << 15,
                tie_word_embeddings: true,
                rope_theta: 2e6,
                ..llama
            },
            Architecture::Gemma => Self {
                num_key_value_heads: Some(16),
                head_dim: Some(256),
                max_position_embeddings: 8192,
                tie_word_embeddings: true,
                ..llama
            },
        }
    }
}

/// Keys that tell how the weights lie in the folder, and which the writer of another sets anew.
const OF_THE_FOLDER: [&str; 6] =
    ["architectures", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id"];

/// The shape in a `config.json`.
pub(super) fn parse(json: &Map<String, Value>, task: Task) -> Result<DecoderConfig> {
    let architecture = architecture(json, task)?;
    let file = File { json };
    refuse_unknown_arithmetic(&file, architecture)?;

    let defaults = Defaults::of(architecture);
    let mut full = json.clone();
    full.insert("model_type".into(), serde_json::to_value(architecture)?);
    let mut default = |key: &str, value: Option<Value>| {
        if full.get(key).is_none_or(Value::is_null) {
            full.insert(key.into(), value.unwrap_or(Value::Null));
        }
    };
    let heads = file.set("num_attention_heads").and_then(Value::as_u64);
    let width = file.set("hidden_size").and_then(Value::as_u64);
    // Null is one for each query head; transformers tells it from a key that is not there.
    let groups = defaults.num_key_value_heads.filter(|_| !json.contains_key("num_key_value_heads"));
    default("num_key_value_heads", groups.or(heads).map(Value::from));
    let head_dim = width.zip(heads).and_then(|(width, heads)| width.checked_div(heads));
    let head_dim = defaults.head_dim.filter(|_| !json.contains_key("head_dim")).or(head_dim);
    default("head_dim", head_dim.map(Value::from));
    default("rms_norm_eps", Some(json!(1e-6)));
    default("max_position_embeddings", Some(json!(defaults.max_position_embeddings)));
    default("tie_word_embeddings", Some(json!(defaults.tie_word_embeddings)));
    default("initializer_range", Some(json!(0.02)));
    // These have meanings of their own, below.
    full.insert("rope_theta".into(), json!(defaults.rope_theta));
    for key in ["rope_scaling", "no_rope_layers", "sliding_window", "layer_types"] {
        full.remove(key);
    }
    let mut config: DecoderConfig = serde_json::from_value(Value::Object(full))?;

    let rope = rope(&file, defaults.rope_theta, config.max_position_embeddings)?;
    (config.rope_theta, config.rope_scaling) = (rope.theta, rope.scaling);
    // Before lists of as many as it has layers are made.
    config.validate()?;
    config.no_rope_layers = no_rope_layers(&file, &config)?;
    (config.sliding_window, config.layer_types) = windows(&file, &config)?;
    config.validate()?;
    let mut kept = json.clone();
    kept.retain(|key, _| !OF_THE_FOLDER.contains(&key.as_str()));
    config.file = Some(kept);
    Ok(config)
}

/// A `config.json`, in which null is as good as nothing.
struct File<'a> {
    json: &'a Map<String, Value>,
}

impl<'a> File<'a> {
    fn set(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        self.set(key).map(|value| read(key, value)).transpose()
    }
}

fn read<T: DeserializeOwned>(key: &str, value: &Value) -> Result<T> {
    serde_json::from_value(value.clone()).with_context(|| format!("{key}: {value}"))
}

fn architecture(json: &Map<String, Value>, task: Task) -> Result<Architecture> {
    let file = File { json };
    let class = file.set("architectures").and_then(|all| all.get(0)).and_then(Value::as_str);
    let model_type = file.set("model_type").and_then(Value::as_str);
    let named = |architecture: Architecture| {
        let own_type = architecture.class().to_lowercase();
        class.is_none_or(|class| class == task.class(architecture))
            && model_type.is_none_or(|model_type| model_type == own_type)
    };
    let found = Architecture::ALL.into_iter().find(|&architecture| named(architecture));
    found.filter(|_| class.is_some() || model_type.is_some()).with_context(|| {
        format!(
            "unknown architecture {} (model_type {}): expected {}",
            class.unwrap_or("none"),
            model_type.unwrap_or("none"),
            Architecture::ALL.map(|architecture| task.class(architecture)).join(", "),
        )
    })
}

fn refuse_unknown_arithmetic(file: &File, architecture: Architecture) -> Result<()> {
    let activation = architecture.hidden_act();
    let legacy = match architecture {
        // The first files of Gemma say so, and mean the approximation.
        Architecture::Gemma => "gelu",
        _ => activation,
    };
    if let Some(value) = file.set("hidden_act") {
        ensure!(
            value == activation || value == legacy,
            "hidden_act: only {activation:?} is supported, got {value}"
        );
    }
    for (key, plain) in [
        ("hidden_activation", json!(activation)),
        ("attention_bias", json!(false)),
        ("mlp_bias", json!(false)),
        ("partial_rotary_factor", json!(1.0)),
        ("use_bidirectional_attention", json!(false)),
    ] {
        if let Some(value) = file.set(key) {
            // Qwen2 has its biases whatever the key says.
            let ignored = key == "attention_bias" && architecture == Architecture::Qwen2;
            ensure!(ignored || *value == plain, "{key}: only {plain} is supported, got {value}");
        }
    }
    ensure!(
        file.set("quantization_config").is_none(),
        "quantization_config: quantised safetensors are not supported; use the GGUF file"
    );
    Ok(())
}

/// The rotary frequencies of a file.
#[derive(PartialEq)]
struct Rope {
    theta: f64,
    scaling: Option<RopeScaling>,
}

/// transformers 5 keeps the base and the scaling together in `rope_parameters`, 4 apart in `rope_theta`
/// and `rope_scaling`. Where a file has both they must agree.
fn rope(file: &File, default: f64, context: usize) -> Result<Rope> {
    let outside: Option<f64> = file.get("rope_theta")?;
    let original: Option<usize> = file.get("original_max_position_embeddings")?;
    let read_entry = |key: &'static str| -> Result<Option<(&'static str, Rope)>> {
        let Some(entry) = file.get::<Map<String, Value>>(key)?.filter(|entry| !entry.is_empty())
        else {
            return Ok(None);
        };
        if let Some((kind, _)) = entry.iter().find(|(_, value)| value.is_object()) {
            bail!("{key}.{kind}: settings for each kind of layer are not supported");
        }
        let entry = RopeEntry { key, entry: &entry };
        let inside: Option<f64> = entry.get("rope_theta")?;
        if let (Some(outside), Some(inside)) = (outside, inside) {
            ensure!(
                outside == inside,
                "rope_theta: {outside} contradicts {key}.rope_theta {inside}"
            );
        }
        let theta = inside.or(outside).unwrap_or(default);
        Ok(Some((key, Rope { theta, scaling: entry.scaling(original, context)? })))
    };
    let plain = Rope { theta: outside.unwrap_or(default), scaling: None };
    Ok(match (read_entry("rope_scaling")?, read_entry("rope_parameters")?) {
        (Some((one, first)), Some((other, second))) => {
            ensure!(first == second, "{one} contradicts {other}");
            first
        }
        (Some((_, rope)), None) | (None, Some((_, rope))) => rope,
        (None, None) => plain,
    })
}

/// An object of rotary settings.
struct RopeEntry<'a> {
    key: &'static str,
    entry: &'a Map<String, Value>,
}

impl RopeEntry<'_> {
    fn get<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let value = self.entry.get(name).filter(|value| !value.is_null());
        value.map(|value| read(&format!("{}.{name}", self.key), value)).transpose()
    }

    fn need<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        self.get(name)?.with_context(|| format!("{}.{name} is missing", self.key))
    }

    /// The scaling. `original` stands outside of the entry, and goes before what it says.
    fn scaling(&self, original: Option<usize>, context: usize) -> Result<Option<RopeScaling>> {
        let key = self.key;
        let (new, old): (Option<String>, Option<String>) =
            (self.get("rope_type")?, self.get("type")?);
        if let (Some(new), Some(old)) = (&new, &old) {
            ensure!(new == old, "{key}: rope_type {new:?} contradicts type {old:?}");
        }
        let partial: f64 = self.get("partial_rotary_factor")?.unwrap_or(1.0);
        ensure!(
            partial == 1.0,
            "{key}.partial_rotary_factor: only 1.0 is supported, got {partial}"
        );
        let original = || -> Result<usize> {
            let inside = self.get("original_max_position_embeddings")?;
            Ok(original.or(inside).unwrap_or(context))
        };
        Ok(Some(match new.or(old).as_deref() {
            None | Some("default") => return Ok(None),
            Some("linear") => RopeScaling::Linear { factor: self.need("factor")? },
            Some("llama3") => RopeScaling::Llama3 {
                factor: self.need("factor")?,
                low_freq_factor: self.need("low_freq_factor")?,
                high_freq_factor: self.need("high_freq_factor")?,
                original_max_position_embeddings: original()?,
            },
            Some("yarn") => {
                let original = original()?;
                let factor = match self.get("factor")? {
                    Some(factor) => factor,
                    None => context as f64 / original as f64,
                };
                let scales: (Option<f64>, Option<f64>) =
                    (self.get("mscale")?, self.get("mscale_all_dim")?);
                let attention_factor = match (self.get("attention_factor")?, scales) {
                    (Some(factor), _) => factor,
                    // A scale of 0 is as good as none.
                    (None, (Some(one), Some(all))) if one != 0.0 && all != 0.0 => {
                        yarn_mscale(factor, one) / yarn_mscale(factor, all)
                    }
                    _ => yarn_mscale(factor, 1.0),
                };
                RopeScaling::Yarn {
                    factor,
                    original_max_position_embeddings: original,
                    attention_factor,
                    beta_fast: self.get("beta_fast")?.filter(|&beta| beta != 0.0).unwrap_or(32.0),
                    beta_slow: self.get("beta_slow")?.filter(|&beta| beta != 0.0).unwrap_or(1.0),
                    truncate: self.get("truncate")?.unwrap_or(true),
                }
            }
            Some(other) => {
                bail!("{key}: expected the type default, linear, llama3 or yarn, got {other:?}")
            }
        }))
    }
}

/// Every fourth layer of SmolLM3 knows no positions, unless the file says which.
fn no_rope_layers(file: &File, config: &DecoderConfig) -> Result<Option<Vec<u8>>> {
    if config.model_type != Architecture::SmolLm3 {
        return Ok(None);
    }
    let listed = file.get("no_rope_layers")?;
    let interval = file.get("no_rope_layer_interval")?.unwrap_or(4usize);
    ensure!(interval > 0, "no_rope_layer_interval: expected at least 1, got 0");
    let every = || {
        let layers = 1..=config.num_hidden_layers;
        layers.map(|layer| u8::from(!layer.is_multiple_of(interval))).collect()
    };
    Ok(Some(listed.unwrap_or_else(every)))
}

/// The sliding window, and the layers that have it.
fn windows(file: &File, config: &DecoderConfig) -> Result<(Option<usize>, Option<Vec<LayerType>>)> {
    const KEY: &str = "sliding_window";
    let given: Option<usize> = file.get(KEY)?;
    match config.model_type {
        Architecture::Llama | Architecture::Gemma => {
            ensure!(
                given.is_none_or(|window| window >= config.max_position_embeddings),
                "{KEY}: {} sees all of its context, got {}",
                config.model_type.class(),
                given.unwrap_or(0)
            );
            Ok((None, None))
        }
        Architecture::Mistral => {
            // Without the key there is a window; null is none.
            let default = (!file.json.contains_key(KEY)).then_some(4096);
            Ok((given.or(default), None))
        }
        Architecture::Qwen2 | Architecture::Qwen3 | Architecture::SmolLm3 => {
            let smol = config.model_type == Architecture::SmolLm3;
            let default = (!smol && !file.json.contains_key(KEY)).then_some(4096);
            let slides = file.get("use_sliding_window")?.unwrap_or(false);
            let window = given.or(default).filter(|_| slides);
            let first = file.get("max_window_layers")?.unwrap_or(28);
            let has_window = |layer| match smol {
                true => !config.has_rope(layer),
                false => layer >= first,
            };
            let types = match file.get::<Vec<LayerType>>("layer_types")? {
                Some(types) => types,
                None => (0..config.num_hidden_layers)
                    .map(|layer| match window.is_some() && has_window(layer) {
                        true => LayerType::SlidingAttention,
                        false => LayerType::FullAttention,
                    })
                    .collect(),
            };
            ensure!(
                window.is_some() || !types.contains(&LayerType::SlidingAttention),
                "layer_types: sliding_attention needs use_sliding_window and {KEY}"
            );
            Ok((window, window.map(|_| types)))
        }
    }
}
