//! The shape of a decoder, as a Hugging Face `config.json` has it.

use std::f64::consts::PI;

use anyhow::{ensure, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::lora::Lora;

/// The architectures of a [`Decoder`](super::Decoder), by the `model_type` of Hugging Face.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// Llama, SmolLM and SmolLM2.
    #[default]
    Llama,
    /// Mistral: Llama, where tokens may see a window of those before them.
    Mistral,
    /// Qwen2 and Qwen2.5: Llama, with biases of queries, keys and values.
    Qwen2,
    /// Qwen3: Llama, with norms of each query and key.
    Qwen3,
    /// SmolLM3: Llama, with layers that know no positions.
    SmolLm3,
    /// The first Gemma: a scaled embedding, norms around 1, and GELU in the place of SiLU.
    Gemma,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3, Self::SmolLm3, Self::Gemma];

    /// The name that transformers' classes start with.
    pub fn class(self) -> &'static str {
        match self {
            Self::Llama => "Llama",
            Self::Mistral => "Mistral",
            Self::Qwen2 => "Qwen2",
            Self::Qwen3 => "Qwen3",
            Self::SmolLm3 => "SmolLM3",
            Self::Gemma => "Gemma",
        }
    }

    /// The activation of the feed-forward layer, in transformers' words.
    pub fn hidden_act(self) -> &'static str {
        match self {
            Self::Gemma => "gelu_pytorch_tanh",
            _ => "silu",
        }
    }

    /// Whether queries, keys and values have biases.
    pub(super) fn has_biases(self) -> bool {
        self == Self::Qwen2
    }

    /// Whether each query and key is normalised before it is rotated.
    pub(super) fn has_head_norms(self) -> bool {
        self == Self::Qwen3
    }
}

/// Which tokens the attention of a layer sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerType {
    /// All tokens so far.
    FullAttention,
    /// The last `sliding_window` tokens.
    SlidingAttention,
}

/// The shape of a decoder, under the key names of a Hugging Face `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DecoderConfig {
    /// The architecture.
    #[serde(default)]
    pub model_type: Architecture,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Query heads of a layer.
    pub num_attention_heads: usize,
    /// Key and value heads of a layer; each serves an equal share of the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Added to the mean square in the norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Change of the rotary frequencies for long contexts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Whether a layer rotates its queries and keys, 1 or 0 for each; without it all do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_rope_layers: Option<Vec<u8>>,
    /// How many tokens one sees, itself among them, in the layers that slide; all without it.
    #[serde(default)]
    pub sliding_window: Option<usize>,
    /// Which layers slide; without it all do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer_types: Option<Vec<LayerType>>,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of the weights of a new model.
    #[serde(default = "default_initializer_range")]
    pub initializer_range: f64,
    /// The file that it was read from, but for what tells how the weights lie there: with it a model
    /// is saved as what it was.
    #[serde(skip)]
    pub file: Option<Map<String, Value>>,
    /// Adapters of its projections.
    #[serde(skip)]
    pub lora: Option<Lora>,
}

fn default_initializer_range() -> f64 {
    0.02
}

/// How rotary frequencies are changed for contexts longer than those first trained on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// All wavelengths are stretched by `factor`.
    Linear {
        /// Stretch of the wavelengths.
        factor: f64,
    },
    /// Llama 3: wavelengths beyond the original context are stretched by `factor`, short ones are
    /// kept, and those between are blended.
    Llama3 {
        /// Stretch of the long wavelengths.
        factor: f64,
        /// Wavelengths longer than `original_max_position_embeddings / low_freq_factor` are stretched.
        low_freq_factor: f64,
        /// Wavelengths shorter than `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context of the original training.
        original_max_position_embeddings: usize,
    },
    /// YaRN (Peng et al. 2023, arXiv 2309.00071): as Llama 3, but blended along the dimensions, and
    /// the attention is sharpened.
    Yarn {
        /// Stretch of the long wavelengths.
        factor: f64,
        /// Context of the original training.
        original_max_position_embeddings: usize,
        /// Multiplies rotated queries and keys.
        attention_factor: f64,
        /// Turns within the original context above which a wavelength is kept.
        beta_fast: f64,
        /// Turns below which it is stretched.
        beta_slow: f64,
        /// Whether the dimensions between which is blended are whole numbers.
        truncate: bool,
    },
}

impl RopeScaling {
    /// YaRN as its paper has it.
    pub fn yarn(factor: f64, original_max_position_embeddings: usize) -> Self {
        Self::Yarn {
            factor,
            original_max_position_embeddings,
            attention_factor: yarn_mscale(factor, 1.0),
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
        }
    }

    fn is_valid(&self) -> bool {
        let stretch = |factor: f64| factor.is_finite() && factor >= 1.0;
        match *self {
            Self::Linear { factor } => stretch(factor),
            Self::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                stretch(factor)
                    && low_freq_factor > 0.0
                    && high_freq_factor.is_finite()
                    && high_freq_factor > low_freq_factor
                    && original_max_position_embeddings > 0
            }
            Self::Yarn {
                factor,
                original_max_position_embeddings,
                attention_factor,
                beta_fast,
                beta_slow,
                ..
            } => {
                stretch(factor)
                    && attention_factor.is_finite()
                    && attention_factor > 0.0
                    && beta_slow > 0.0
                    && beta_fast.is_finite()
                    && beta_fast >= beta_slow
                    && original_max_position_embeddings > 0
            }
        }
    }
}

/// The attention factor of YaRN for a stretch.
pub(in super::super) fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 {
        return 1.0;
    }
    0.1 * mscale * factor.ln() + 1.0
}

impl DecoderConfig {
    /// `Ok` when a decoder of this shape can be built; the error names the key.
    pub fn validate(&self) -> Result<()> {
        for (key, size) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            // The bound keeps products of two sizes from overflowing.
            ensure!((1..=1 << 28).contains(&size), "{key}: expected 1 to 2^28, got {size}");
        }
        ensure!(
            self.num_attention_heads.is_multiple_of(self.num_key_value_heads),
            "num_key_value_heads: expected a divisor of num_attention_heads ({}), got {}",
            self.num_attention_heads,
            self.num_key_value_heads
        );
        ensure!(
            self.head_dim.is_multiple_of(2),
            "head_dim: expected an even number, got {}",
            self.head_dim
        );
        for (key, value) in [
            ("rms_norm_eps", self.rms_norm_eps),
            ("rope_theta", self.rope_theta),
            ("initializer_range", self.initializer_range),
        ] {
            ensure!(
                value.is_finite() && value > 0.0,
                "{key}: expected a positive number, got {value}"
            );
        }
        if let Some(scaling) = &self.rope_scaling {
            ensure!(
                scaling.is_valid(),
                "rope_scaling: expected a factor of at least 1 and positive numbers in their order, got \
                 {scaling:?}"
            );
        }
        let layers = self.num_hidden_layers;
        for (key, len) in [
            ("no_rope_layers", self.no_rope_layers.as_ref().map(Vec::len)),
            ("layer_types", self.layer_types.as_ref().map(Vec::len)),
        ] {
            if let Some(len) = len {
                ensure!(len == layers, "{key}: expected {layers}, one a layer, got {len}");
            }
        }
        ensure!(self.sliding_window != Some(0), "sliding_window: expected at least 1, got 0");
        Ok(())
    }

    /// How many tokens one sees in that layer, if not all.
    pub(super) fn window(&self, layer: usize) -> Option<usize> {
        let full = |types: &Vec<LayerType>| types.get(layer) == Some(&LayerType::FullAttention);
        self.sliding_window.filter(|_| !self.layer_types.as_ref().is_some_and(full))
    }

    /// Whether that layer rotates its queries and keys.
    pub(in super::super) fn has_rope(&self, layer: usize) -> bool {
        self.no_rope_layers.as_ref().is_none_or(|layers| layers.get(layer) != Some(&0))
    }

    /// The number that is added to the weights of norms.
    pub(super) fn norm_offset(&self) -> f64 {
        f64::from(u8::from(self.model_type == Architecture::Gemma))
    }

    /// The factor of rotated queries and keys.
    pub(super) fn attention_factor(&self) -> f64 {
        match self.rope_scaling {
            Some(RopeScaling::Yarn { attention_factor, .. }) => attention_factor,
            _ => 1.0,
        }
    }

    /// Rotary frequencies, one for each pair of dimensions of a head, in radians a token.
    pub(in super::super) fn frequencies(&self) -> Vec<f32> {
        let dim = self.head_dim as f64;
        let frequency = |i: usize| self.rope_theta.powf(-((2 * i) as f64) / dim);
        // The share of a frequency that is kept; the rest is stretched.
        let blend =
            |i: usize, keep: f64, factor: f64| frequency(i) * (keep + (1.0 - keep) / factor);
        let scaled = |i: usize| match self.rope_scaling {
            None => frequency(i),
            Some(RopeScaling::Linear { factor }) => frequency(i) / factor,
            Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            }) => {
                // Turns that this frequency makes within the original context.
                let turns = original_max_position_embeddings as f64 * frequency(i) / (2.0 * PI);
                let keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                blend(i, keep.clamp(0.0, 1.0), factor)
            }
            Some(RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                truncate,
                ..
            }) => {
                // The dimension, a real number, that makes so many turns within the original context.
                let dimension = |turns: f64| {
                    let wavelength = original_max_position_embeddings as f64 / turns;
                    dim * (wavelength / (2.0 * PI)).ln() / (2.0 * self.rope_theta.ln())
                };
                let (low, high) = (dimension(beta_fast), dimension(beta_slow));
                let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
                let (low, high) = (low.max(0.0), high.min(dim - 1.0));
                // Two equal bounds are a step.
                let width = if high == low { 0.001 } else { high - low };
                let stretched = ((i as f64 - low) / width).clamp(0.0, 1.0);
                blend(i, 1.0 - stretched, factor)
            }
        };
        (0..self.head_dim / 2).map(|i| scaled(i) as f32).collect()
    }
}
