//! GGUF files of llama.cpp, of the architectures `llama`, `qwen2` and `qwen3`.

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufReader, Read, Seek};
use std::path::Path;

use anyhow::{bail, ensure, Context, Result};
use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};

use super::{check_vocabulary, Loaded};
use crate::driver::model::{Architecture, Decoder, DecoderConfig, RopeScaling};
use crate::driver::tokenizer::{integer, string, Tokenizer};

pub(super) fn load_gguf(path: &Path, device: &Device) -> Result<Loaded> {
    let file = BufReader::new(fs::File::open(path)?);
    let mut file = AlignmentGuard { file, before: Before::Other };
    let content = Content::read(&mut file)
        .context("expected a Hugging Face folder or a GGUF file; this is damaged or neither")?;
    refuse_part(path, &content)?;
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

/// Refuses a part of a model that is split into several files, by the number of parts that it tells, or
/// that its name ends in.
fn refuse_part(path: &Path, content: &Content) -> Result<()> {
    let told =
        content.metadata.get("split.count").map(integer).transpose().context("split.count")?;
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let named = stem.rsplit_once("-of-").and_then(|(rest, count)| {
        let (_, number) = rest.rsplit_once('-')?;
        let is_number = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_digit());
        (is_number(number) && is_number(count)).then(|| count.parse().ok())?
    });
    let parts = told.or(named).unwrap_or(1);
    ensure!(
        parts <= 1,
        "{}: one of the {parts} files of a split model; join them first, with llama-gguf-split --merge",
        path.file_name().unwrap_or_default().display()
    );
    Ok(())
}

/// A reader of a GGUF file that refuses an alignment of 0, by which candle would divide. candle
/// reads the key, the type of the value and the value in a read each.
struct AlignmentGuard<R> {
    file: R,
    before: Before,
}

/// The kind of read before the next one of an [`AlignmentGuard`].
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
    let name = string(metadata, "general.architecture")?;
    let known = [Architecture::Llama, Architecture::Qwen2, Architecture::Qwen3];
    let architecture = known.into_iter().find(|known| known.class().to_lowercase() == name);
    let model_type = architecture.with_context(|| {
        format!(
            "unknown architecture {name}: expected llama, qwen2 or qwen3 (general.architecture)"
        )
    })?;
    let find = |key: &str| metadata.get(&format!("{name}.{key}"));
    let size = |key: &str| -> Result<Option<usize>> {
        find(key)
            .map(|value| anyhow::Ok(usize::try_from(integer(value)?)?))
            .transpose()
            .with_context(|| format!("{name}.{key}"))
    };
    let need = |key: &str| size(key)?.with_context(|| format!("{name}.{key} is missing"));
    let float = |key: &str| -> Result<Option<f64>> {
        find(key)
            .map(|value| anyhow::Ok(f64::from(value.to_f32()?)))
            .transpose()
            .with_context(|| format!("{name}.{key}"))
    };
    let hidden_size = need("embedding_length")?;
    let num_attention_heads = need("attention.head_count")?;
    let embedding = content
        .tensor_infos
        .get("token_embd.weight")
        .context("tensor token_embd.weight is missing")?;
    let head_dim = match size("attention.key_length")? {
        Some(dim) => dim,
        None => (hidden_size.checked_div(num_attention_heads)).with_context(|| {
            format!("{name}.attention.head_count: expected a positive number, got 0")
        })?,
    };
    let mut config = DecoderConfig {
        model_type,
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
                .with_context(|| format!("{name}.attention.layer_norm_rms_epsilon is missing"))?,
        ),
        rope_theta: float("rope.freq_base")?.unwrap_or(10000.0),
        rope_scaling: None,
        no_rope_layers: None,
        sliding_window: None,
        layer_types: None,
        max_position_embeddings: need("context_length")?,
        tie_word_embeddings: !content.tensor_infos.contains_key("output.weight"),
        initializer_range: 0.02,
        file: None,
        lora: None,
    };
    config.validate()?;

    let experts = size("expert_count")?.unwrap_or(0);
    ensure!(experts == 0, "{name}.expert_count: mixtures of experts are not supported");
    let rotary = size("rope.dimension_count")?.unwrap_or(head_dim);
    ensure!(
        rotary == head_dim,
        "{name}.rope.dimension_count: only the whole head ({head_dim}) is supported, got {rotary}"
    );
    let window = size("attention.sliding_window")?;
    ensure!(
        window.is_none_or(|window| window >= config.max_position_embeddings),
        "{name}.attention.sliding_window: not supported in a GGUF file, got {}",
        window.unwrap_or(0)
    );
    let kind = format!("{name}.rope.scaling.type");
    let kind = metadata.get(&kind).map(|_| string(metadata, &kind));
    // The second is its old name. 0 is as good as none.
    let [factor, old] = ["rope.scaling.factor", "rope.scale_linear"]
        .map(|key| anyhow::Ok(float(key)?.filter(|&factor| factor != 0.0)));
    let (factor, old) = (factor?, old?);
    if let (Some(factor), Some(old)) = (factor, old) {
        ensure!(
            factor == old,
            "{name}.rope.scaling.factor {factor} contradicts {name}.rope.scale_linear {old}"
        );
    }
    let factor = factor.or(old).map_or(1.0, shortest);
    // llama.cpp takes a factor without a type for the linear one.
    config.rope_scaling = match kind.transpose()?.unwrap_or("linear") {
        "none" => None,
        "linear" => (factor != 1.0).then_some(RopeScaling::Linear { factor }),
        "yarn" => {
            for key in ["attn_factor", "yarn_log_multiplier", "yarn_ext_factor", "yarn_attn_factor"]
            {
                let key = format!("rope.scaling.{key}");
                ensure!(find(&key).is_none(), "{name}.{key}: not supported");
            }
            let original = size("rope.scaling.original_context_length")?;
            Some(RopeScaling::yarn(factor, original.unwrap_or(config.max_position_embeddings)))
        }
        other => bail!(
            "{name}.rope.scaling.type: only none, linear and yarn are supported, got {other:?}"
        ),
    };
    if content.tensor_infos.contains_key(ROPE_FACTORS) {
        ensure!(
            config.rope_scaling.is_none(),
            "tensor {ROPE_FACTORS} beside {name}.rope.scaling.factor {factor} is not supported"
        );
        let factors = read_gguf_tensor(content, file, ROPE_FACTORS, &Device::Cpu)?;
        config.rope_scaling = Some(llama3_scaling(&config, &factors.flatten_all()?.to_vec1()?)?);
    }
    config.validate()?;
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
    let unknown = || format!("tensor {name} has no place in a {}", config.model_type.class());
    // The converter turns the rows of Llama's queries and keys alone.
    let turned = |heads: usize| (config.model_type == Architecture::Llama).then_some(heads);
    let part = |part: &str| {
        Some(match part {
            "attn_norm" => ("input_layernorm", None),
            "attn_q" => ("self_attn.q_proj", turned(config.num_attention_heads)),
            "attn_k" => ("self_attn.k_proj", turned(config.num_key_value_heads)),
            "attn_q_norm" => ("self_attn.q_norm", None),
            "attn_k_norm" => ("self_attn.k_norm", None),
            "attn_v" => ("self_attn.v_proj", None),
            "attn_output" => ("self_attn.o_proj", None),
            "ffn_norm" => ("post_attention_layernorm", None),
            "ffn_gate" => ("mlp.gate_proj", None),
            "ffn_up" => ("mlp.up_proj", None),
            "ffn_down" => ("mlp.down_proj", None),
            _ => return None,
        })
    };
    let (stem, kind) = name.rsplit_once('.').with_context(unknown)?;
    ensure!(kind == "weight" || kind == "bias", unknown());
    Ok(match stem {
        "token_embd" => (format!("model.embed_tokens.{kind}"), None),
        "output_norm" => (format!("model.norm.{kind}"), None),
        "output" => (format!("lm_head.{kind}"), None),
        _ => {
            let (layer, rest) = (stem.strip_prefix("blk."))
                .and_then(|stem| stem.split_once('.'))
                .with_context(unknown)?;
            let (rest, heads) = part(rest).with_context(unknown)?;
            (format!("model.layers.{layer}.{rest}.{kind}"), heads)
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
