//! Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685) of a decoder's projections:
//!
//! ```text
//! y = W x + alpha / rank · B A x        A [rank, in], B [out, rank]
//! ```
//!
//! Only A and B learn, B from 0, so that training starts from the decoder as it is. Their names are those
//! of PEFT, `base_model.model.` before them.

use std::collections::HashMap;

use anyhow::{bail, ensure, Result};
use candle_core::{DType, Tensor, Var};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::{linear, refuse_rest, take, Critic, Decoder, DecoderConfig};

/// Which projections are adapted, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct Lora {
    /// Rows of A.
    pub rank: usize,
    /// Weight of the adapters, times their rank.
    pub alpha: f64,
    /// Projections that are adapted, in every layer; of [`TARGETS`](Self::TARGETS).
    pub targets: Vec<String>,
}

impl Lora {
    /// All projections.
    pub const TARGETS: [&str; 7] =
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

    /// `Ok` when a decoder can have such adapters; the error names what is wrong.
    pub fn validate(&self) -> Result<()> {
        // The bound keeps products of two sizes from overflowing.
        ensure!(
            (1..=1 << 16).contains(&self.rank),
            "the rank of LoRA: expected 1 to 65536, got {}",
            self.rank
        );
        ensure!(
            self.alpha.is_finite() && self.alpha > 0.0,
            "alpha of LoRA: expected a positive number, got {}",
            self.alpha
        );
        ensure!(!self.targets.is_empty(), "targets of LoRA: expected at least one");
        for target in &self.targets {
            ensure!(
                Self::TARGETS.contains(&target.as_str()),
                "targets of LoRA: expected some of {}, got {target}",
                Self::TARGETS.join(", ")
            );
        }
        Ok(())
    }

    pub(super) fn adapts(&self, projection: &str) -> bool {
        self.targets.iter().any(|target| projection.rsplit('.').next() == Some(target))
    }

    pub(super) fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }
}

/// The adapter of a projection.
pub(super) struct Adapter {
    pub(super) a: Tensor,
    pub(super) b: Tensor,
    pub(super) scale: f64,
}

impl Adapter {
    /// The adapter's part of the projection of `x`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok((linear(&linear(x, &self.a)?, &self.b)? * self.scale)?)
    }
}

const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";
const PEFT: &str = "base_model.model.";

/// The names of a projection's A and B.
pub(super) fn names(projection: &str) -> [String; 2] {
    [A, B].map(|part| format!("{projection}{part}"))
}

/// Whether that weight is an adapter's.
pub(super) fn is_adapter(name: &str) -> bool {
    name.ends_with(A) || name.ends_with(B)
}

impl Decoder {
    /// The decoder with new adapters, which alone are trainable from now on.
    ///
    /// # Errors
    /// Adapters that cannot be, and a decoder that has some.
    pub fn with_lora(self, lora: Lora, seed: u64) -> Result<Self> {
        let mut rng = StdRng::seed_from_u64(seed);
        let device = self.device().clone();
        self.with_adapters(lora, |name, shape| {
            let tensor = match name.ends_with(A) {
                // As PEFT starts: uniform, up to the square root of 1 / in.
                true => {
                    let bound = 1.0 / (shape[1] as f32).sqrt();
                    let mut draw = || bound * (2.0 * rng.random::<f32>() - 1.0);
                    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| draw()).collect();
                    Tensor::from_vec(values, shape, &device)?
                }
                false => Tensor::zeros(shape, DType::F32, &device)?,
            };
            Ok(Var::from_tensor(&tensor)?.into_inner())
        })
    }

    /// The decoder with adapters under their names in PEFT's files.
    ///
    /// # Errors
    /// Those of [`Self::with_lora`]; a tensor that is missing, has another shape, or has no place.
    pub fn with_lora_tensors(
        self,
        lora: Lora,
        mut tensors: HashMap<String, Tensor>,
    ) -> Result<Self> {
        let decoder = self.with_adapters(lora, |name, shape| {
            take(&mut tensors, &format!("{PEFT}{name}"), shape)
        })?;
        refuse_rest(&decoder.config, &tensors)?;
        Ok(decoder)
    }

    fn with_adapters(
        self,
        lora: Lora,
        mut adapter: impl FnMut(&str, &[usize]) -> Result<Tensor>,
    ) -> Result<Self> {
        lora.validate()?;
        if self.config.lora.is_some() {
            bail!("the decoder has adapters already");
        }
        let config = DecoderConfig { lora: Some(lora), ..self.config.clone() };
        let mut weights: HashMap<String, Tensor> = self.tensors().into_iter().collect();
        Self::build(config, self.head.is_some(), self.device(), |name, shape| {
            weights.remove(name).map_or_else(|| adapter(name, shape), Ok)
        })
    }

    /// The adapters under their names in PEFT's files; none for a decoder without.
    pub fn adapters(&self) -> Vec<(String, Tensor)> {
        let adapters = self.tensors().into_iter().filter(|(name, _)| is_adapter(name));
        adapters.map(|(name, tensor)| (format!("{PEFT}{name}"), tensor)).collect()
    }

    /// A trainable copy without adapters, which does the same: they are added to the weights.
    pub fn merged(&self) -> Result<Self> {
        let config = DecoderConfig { lora: None, ..self.config.clone() };
        let mut weights: HashMap<String, Tensor> = self.merged_tensors()?.into_iter().collect();
        Self::build(config, self.head.is_some(), self.device(), |name, shape| {
            take(&mut weights, name, shape)
        })
    }

    /// The weights of [`Self::merged`], as plain tensors under their Hugging Face names.
    pub fn merged_tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let Some(lora) = &self.config.lora else {
            return Ok(self.tensors());
        };
        let all: HashMap<&str, &Tensor> =
            self.named.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let merge = |(name, tensor): (String, Tensor)| {
            let pair = names(name.strip_suffix(".weight").unwrap_or(&name));
            let [a, b] = pair.map(|name| all.get(name.as_str()));
            let tensor = match a.zip(b) {
                Some((a, b)) => (tensor + (b.detach().matmul(&a.detach())? * lora.scale())?)?,
                None => tensor,
            };
            Ok((name, tensor))
        };
        self.tensors().into_iter().filter(|(name, _)| !is_adapter(name)).map(merge).collect()
    }
}

impl Critic {
    /// The critic with new adapters, which with its head are trainable from now on.
    ///
    /// # Errors
    /// Those of [`Decoder::with_lora`].
    pub fn with_lora(self, lora: Lora, seed: u64) -> Result<Self> {
        Ok(Self { backbone: self.backbone.with_lora(lora, seed)?, head: self.head })
    }

    /// The weights that never change, as [`Decoder::constants`].
    pub fn constants(&self) -> Vec<(String, Tensor)> {
        self.backbone.constants()
    }

    /// All weights, adapters added to what they adapt, as plain tensors.
    pub fn merged_tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = self.backbone.merged_tensors()?;
        tensors.push((super::VALUE_HEAD.into(), self.head.detach()));
        Ok(tensors)
    }
}
