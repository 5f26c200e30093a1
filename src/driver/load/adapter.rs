//! Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{bail, ensure, Context, Result};
use candle_core::Device;
use serde_json::{json, Map, Value};

use super::{gguf, load_whole, read_json, read_tensors, save_tensors, save_tokenizer, write_text};
use super::{Loaded, WEIGHTS, WEIGHTS_INDEX};
use crate::driver::model::{Decoder, Lora};
use crate::driver::tokenizer::Tokenizer;

const CONFIG: &str = "adapter_config.json";
const ADAPTERS: &str = "adapter_model.safetensors";

/// Whether the folder holds adapters and no model.
pub(super) fn is_there(dir: &Path) -> bool {
    dir.join(CONFIG).exists()
        && ![WEIGHTS, WEIGHTS_INDEX].iter().any(|name| dir.join(name).exists())
}

/// Writes the adapters of a decoder, and its tokenizer, into `dir`, which is made when it is missing;
/// `base` is the model that they adapt. [`load`](super::load) reads them back, and so does PEFT.
///
/// # Errors
/// A decoder without adapters; what cannot be written.
pub fn save_adapter(
    dir: &Path,
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    base: &Path,
) -> Result<()> {
    let lora = decoder.config().lora.as_ref().context("the model has no adapters to save")?;
    let alpha = match lora.alpha.fract() {
        0.0 => json!(lora.alpha as u64),
        _ => json!(lora.alpha),
    };
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": lora.targets,
        "bias": "none",
        "inference_mode": true,
    });
    save_tokenizer(dir, tokenizer)?;
    write_text(&dir.join(CONFIG), serde_json::to_string_pretty(&config)?)?;
    save_tensors(&dir.join(ADAPTERS), decoder.adapters())
}

/// Refuses adapters as what other adapters are to be saved for.
///
/// # Errors
/// Names `--model`.
pub fn check_adapter_base(base: Option<&Path>) -> Result<()> {
    let adapters = base.filter(|base| is_there(base));
    ensure!(
        adapters.is_none(),
        "--model {} holds adapters itself, and adapters of adapters are nothing that PEFT reads; add \
         --lora-merge",
        adapters.unwrap_or(Path::new("")).display()
    );
    Ok(())
}

/// The model that the adapters in a folder name, with them.
pub(super) fn load(dir: &Path, device: &Device) -> Result<Loaded> {
    let path = dir.join(CONFIG);
    let json = read_json(&path)?;
    let (lora, base) = parse(&json).with_context(|| path.display().to_string())?;
    // As it was given to the run that wrote it, or beside the folder.
    let near = dir.join(&base);
    let base = if Path::new(&base).exists() { Path::new(&base) } else { &near };
    let Loaded { decoder, tokenizer } = match base.is_dir() {
        true => load_whole(base, device),
        false => gguf::load_gguf(base, device),
    }
    .with_context(|| format!("base_model_name_or_path {}", base.display()))?;
    let mut tensors = HashMap::new();
    let path = dir.join(ADAPTERS);
    read_tensors(&path, device, |_| true, &mut tensors)?;
    let adapted = decoder.with_lora_tensors(lora, tensors);
    let decoder = adapted.with_context(|| path.display().to_string())?.merged()?;
    Ok(Loaded { decoder, tokenizer })
}

/// The adapters, and what they adapt.
fn parse(json: &Map<String, Value>) -> Result<(Lora, String)> {
    let set = |key: &str| json.get(key).filter(|value| !value.is_null());
    let need = |key: &'static str| set(key).with_context(|| format!("{key} is missing"));
    let kind = need("peft_type")?;
    ensure!(kind == "LORA", "peft_type: only LORA is supported, got {kind}");
    // What says nothing of the arithmetic, or is read here. All else must be off.
    const KNOWN: [&str; 14] = [
        "peft_type",
        "task_type",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "bias",
        "init_lora_weights",
        "megatron_core",
        "qalora_group_size",
    ];
    for (key, value) in json.iter().filter(|(key, _)| !KNOWN.contains(&key.as_str())) {
        let off = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(values) => values.is_empty(),
            Value::Object(values) => values.is_empty(),
            _ => false,
        };
        ensure!(off, "{key}: not supported, got {value}");
    }
    for (key, plain) in [("bias", &["none"][..]), ("init_lora_weights", &["gaussian"])] {
        // Other ways to start change the weights beside the adapters.
        let other = set(key).filter(|value| !value.is_boolean());
        if let Some(value) = other.filter(|value| !plain.iter().any(|plain| *value == plain)) {
            bail!("{key}: only {:?} is supported, got {value}", plain[0]);
        }
    }
    let rank = need("r")?;
    let alpha = need("lora_alpha")?;
    let targets = need("target_modules")?;
    let lora = Lora {
        rank: serde_json::from_value(rank.clone()).with_context(|| format!("r: {rank}"))?,
        alpha: alpha.as_f64().with_context(|| format!("lora_alpha: {alpha}"))?,
        targets: match targets.as_str() {
            Some("all-linear") => Lora::TARGETS.map(String::from).into(),
            _ => serde_json::from_value(targets.clone()).with_context(|| {
                format!("target_modules: expected a list of names, got {targets}")
            })?,
        },
    };
    lora.validate()?;
    let base = need("base_model_name_or_path")?;
    let base = base.as_str().filter(|base| !base.is_empty());
    Ok((lora, base.context("base_model_name_or_path: expected a path")?.to_owned()))
}
