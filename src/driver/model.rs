//! A trainable decoder of the Llama family (see [`Architecture`]), made of differentiable candle
//! operations:
//!
//! ```text
//! x = embed(ids)
//! for each layer:  x = x + o(attention(rope(q(norm(x))), rope(k(norm(x))), v(norm(x))))
//!                  x = x + down(silu(gate(norm(x))) * up(norm(x)))
//! hidden = norm(x)      logits = hidden · headᵀ      norm(x) = x / sqrt(mean(x²) + eps) * weight
//! ```
//!
//! Weights carry the names, shapes and rotary layout (half rotation) of Hugging Face's classes;
//! everything is f32. Sequences of a batch are left-padded: `pads[b]` says how
//! many leading tokens of row `b` count for nothing, and position 0 is the first real token.
//!
//! candle-nn's own `softmax_last_dim`, `rms_norm` and `rope` have no backward and would cut the
//! graph in silence, so they are spelled out here.

mod config;
mod lora;

use std::collections::HashMap;
use std::f64::consts::PI;
use std::iter::repeat_n;

use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Device, Tensor, Var, D};
use candle_nn::ops::silu;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

pub(super) use config::yarn_mscale;
pub use config::{Architecture, DecoderConfig, LayerType, RopeScaling};
pub use lora::Lora;
use lora::{is_adapter, Adapter};

/// Added to the attention score of a key that must not be seen. Finite, so that a row without any
/// visible key (a pad) is a mean and not NaN.
const MASKED: f32 = -1e30;

/// A decoder with its language-model head. Its weights are trainable ([`Var`]s), or plain tensors
/// after [`frozen`](Self::frozen) and [`no_grad`](Self::no_grad).
pub struct Decoder {
    config: DecoderConfig,
    frequencies: Vec<f32>,
    /// `[head_dim, head_dim]`: `q · rotation` puts `-q[i + head_dim / 2]` at `i` and `q[i]` at
    /// `i + head_dim / 2`. A product of matrices, because its backward is one too, while slices
    /// and concatenations come back as sums of zero-padded copies.
    rotation: Tensor,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    /// `None` when the head is the embedding, or in a critic.
    head: Option<Tensor>,
    /// Every weight under its Hugging Face name, in a fixed order.
    named: Vec<(String, Tensor)>,
}

struct Layer {
    input_norm: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    /// The weights of the norms of each query and each key, in architectures that have them.
    head_norms: Option<(Tensor, Tensor)>,
    o: Linear,
    post_attention_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
    has_rope: bool,
    has_window: bool,
}

/// A projection `[in]` to `[out]`.
struct Linear {
    /// `[out, in]`.
    weight: Tensor,
    /// `[out]`.
    bias: Option<Tensor>,
    adapter: Option<Adapter>,
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut y = linear(x, &self.weight)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        if let Some(adapter) = &self.adapter {
            y = (y + adapter.forward(x)?)?;
        }
        Ok(y)
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Keys and values of the tokens that [`Decoder::step`] has seen.
pub struct KvCache {
    capacity: usize,
    len: usize,
    /// The keys and values of each layer, `[B, key heads, capacity, head_dim]`.
    layers: Vec<(Tensor, Tensor)>,
}

impl KvCache {
    /// An empty cache with room for `capacity` tokens of each row, pads included.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, len: 0, layers: Vec::new() }
    }

    /// Tokens of each row that are in the cache, pads included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token has been seen yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// The state that all layers of one pass share.
struct Pass {
    batch: usize,
    len: usize,
    /// cos and sin `[B, 1, T, head_dim]`; for queries they hold the attention scale too.
    query_rope: (Tensor, Tensor),
    key_rope: (Tensor, Tensor),
    /// `[B, 1, T, S]`, 0 where the key is seen; `None` when every query sees every key.
    mask: Option<Tensor>,
    /// The mask of layers with a window.
    window_mask: Option<Tensor>,
}

/// Asks for the weights of a layer's parts, by their names and shapes.
struct Parts<'a> {
    lora: Option<&'a Lora>,
    weight: &'a mut dyn FnMut(&str, &[usize]) -> Result<Tensor>,
}

impl Parts<'_> {
    fn norm(&mut self, name: &str, len: usize) -> Result<Tensor> {
        (self.weight)(&format!("{name}.weight"), &[len])
    }

    fn linear(&mut self, name: &str, shape: [usize; 2], has_bias: bool) -> Result<Linear> {
        let weight = (self.weight)(&format!("{name}.weight"), &shape)?;
        let bias = match has_bias {
            true => Some((self.weight)(&format!("{name}.bias"), &shape[..1])?),
            false => None,
        };
        let adapter = match self.lora.filter(|lora| lora.adapts(name)) {
            Some(lora) => {
                let ([a, b], [out, inner]) = (lora::names(name), shape);
                let a = (self.weight)(&a, &[lora.rank, inner])?;
                let b = (self.weight)(&b, &[out, lora.rank])?;
                Some(Adapter { a, b, scale: lora.scale() })
            }
            None => None,
        };
        Ok(Linear { weight, bias, adapter })
    }
}

impl Decoder {
    /// A new trainable decoder: norms that change nothing, biases 0, everything else normal with a
    /// standard deviation of `config.initializer_range`.
    pub fn random(config: DecoderConfig, seed: u64, device: &Device) -> Result<Self> {
        let mut rng = StdRng::seed_from_u64(seed);
        let std = config.initializer_range;
        let norm = 1.0 - config.norm_offset();
        Self::build(config, true, device, |name, shape| {
            let start = if name.ends_with(".bias") { 0.0 } else { norm };
            Ok(Var::from_tensor(&match shape {
                [len] => Tensor::full(start as f32, *len, device)?,
                _ => normal(shape, std, &mut rng, device)?,
            })?
            .into_inner())
        })
    }

    /// A trainable decoder from tensors under their Hugging Face names, of any float type.
    ///
    /// A missing tensor, one of another shape, and one that this architecture does not have are
    /// errors that name it.
    ///
    /// A head beside a config that ties it to the embedding is kept if it is another: as
    /// transformers 5 does, it makes the decoder one that is not tied.
    pub fn from_tensors(
        mut config: DecoderConfig,
        mut tensors: HashMap<String, Tensor>,
    ) -> Result<Self> {
        let device = match tensors.values().next() {
            Some(tensor) => tensor.device().clone(),
            None => bail!("no tensors"),
        };
        if config.tie_word_embeddings {
            if let Some(head) = tensors.remove(HEAD) {
                // Some checkpoints repeat the tied tensor, some have it under the other name.
                let embedding = tensors.entry(EMBEDDING.into()).or_insert_with(|| head.clone());
                config.tie_word_embeddings = is_same(embedding, &head)?;
                if !config.tie_word_embeddings {
                    tensors.insert(HEAD.into(), head);
                }
            }
        }
        // Old files store what is computed here.
        tensors.retain(|name, _| !name.ends_with(".rotary_emb.inv_freq"));
        let decoder =
            Self::build(config, true, &device, |name, shape| take(&mut tensors, name, shape))?;
        refuse_rest(&decoder.config, &tensors)?;
        Ok(decoder)
    }

    /// The shape.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The device of the weights.
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// The trainable weights under their Hugging Face names, always in the same order: all, or the
    /// adapters, where there are some; none for a decoder that is [`frozen`](Self::frozen) or
    /// [`no_grad`](Self::no_grad).
    pub fn parameters(&self) -> Vec<(String, Var)> {
        variables(&self.named)
    }

    /// All weights, trainable or not, as plain tensors under their Hugging Face names.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        (self.named.iter()).map(|(name, tensor)| (name.clone(), tensor.detach())).collect()
    }

    /// The weights that never change, as only their adapters learn: all others, if there are any.
    pub fn constants(&self) -> Vec<(String, Tensor)> {
        self.tensors().into_iter().filter(|(name, _)| self.is_constant(name)).collect()
    }

    /// A trainable copy.
    pub fn duplicate(&self) -> Result<Self> {
        self.map(|name, tensor| match self.is_constant(name) {
            true => Ok(tensor.clone()),
            false => Ok(Var::from_tensor(&tensor.detach())?.into_inner()),
        })
    }

    /// A copy that does not train: the reference model.
    pub fn frozen(&self) -> Result<Self> {
        self.map(|name, tensor| match self.is_constant(name) {
            true => Ok(tensor.clone()),
            false => Ok(tensor.detach().copy()?),
        })
    }

    /// The model with the same weights, seen without building a graph; later updates of the variables show.
    pub fn no_grad(&self) -> Self {
        self.map(|_, tensor| Ok(tensor.detach())).expect("detaching cannot fail")
    }

    /// Hidden states `[B, T, hidden_size]` after the final norm, of tokens `ids` (u32 `[B, T]`),
    /// of which the first `pads[b]` of row `b` are padding (what comes out there is meaningless).
    pub fn hidden(&self, ids: &Tensor, pads: &[usize]) -> Result<Tensor> {
        let hidden = self.layers(ids, pads, None)?;
        self.rms_norm(&hidden, &self.norm)
    }

    /// Logits `[.., vocab_size]` of hidden states `[.., hidden_size]`. They are large: take only
    /// the positions that count.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let mut dims = hidden.dims().to_vec();
        match dims.last_mut() {
            Some(last) if *last == self.config.hidden_size => *last = self.config.vocab_size,
            _ => {
                bail!("hidden: expected [.., {}], got {:?}", self.config.hidden_size, hidden.dims())
            }
        }
        let rows = hidden.reshape(((), self.config.hidden_size))?;
        let logits = linear(&rows, self.head.as_ref().unwrap_or(&self.embedding))?;
        Ok(logits.reshape(dims)?)
    }

    /// Logits `[B, vocab_size]` that follow the last of the tokens `ids` (u32 `[B, t]`), which
    /// continue those in the cache. `pads` are those of the whole rows. Carries no gradient.
    pub fn step(&self, ids: &Tensor, pads: &[usize], cache: &mut KvCache) -> Result<Tensor> {
        let hidden = self.layers(ids, pads, Some(cache))?;
        let last = hidden.narrow(1, hidden.dim(1)? - 1, 1)?.contiguous()?;
        let logits = self.logits(&self.rms_norm(&last, &self.norm)?)?;
        Ok(logits.squeeze(1)?.detach())
    }

    /// Asks `weight` for each weight by name and shape, in the fixed order.
    fn build(
        config: DecoderConfig,
        with_head: bool,
        device: &Device,
        mut weight: impl FnMut(&str, &[usize]) -> Result<Tensor>,
    ) -> Result<Self> {
        config.validate()?;
        let hidden = config.hidden_size;
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        let mut named = Vec::new();
        let mut weight = |name: String, shape: &[usize]| {
            let tensor = weight(&name, shape)?;
            named.push((name, tensor.clone()));
            anyhow::Ok(tensor)
        };

        let embedding = weight(EMBEDDING.into(), &[config.vocab_size, hidden])?;
        let mut layers = Vec::new();
        for i in 0..config.num_hidden_layers {
            let mut weight =
                |name: &str, shape: &[usize]| weight(format!("model.layers.{i}.{name}"), shape);
            let mut layer = Parts { lora: config.lora.as_ref(), weight: &mut weight };
            let biases = config.model_type.has_biases();
            let inner = config.intermediate_size;
            layers.push(Layer {
                input_norm: layer.norm("input_layernorm", hidden)?,
                q: layer.linear("self_attn.q_proj", [queries, hidden], biases)?,
                k: layer.linear("self_attn.k_proj", [keys, hidden], biases)?,
                v: layer.linear("self_attn.v_proj", [keys, hidden], biases)?,
                head_norms: match config.model_type.has_head_norms() {
                    true => Some((
                        layer.norm("self_attn.q_norm", config.head_dim)?,
                        layer.norm("self_attn.k_norm", config.head_dim)?,
                    )),
                    false => None,
                },
                o: layer.linear("self_attn.o_proj", [hidden, queries], false)?,
                post_attention_norm: layer.norm("post_attention_layernorm", hidden)?,
                gate: layer.linear("mlp.gate_proj", [inner, hidden], false)?,
                up: layer.linear("mlp.up_proj", [inner, hidden], false)?,
                down: layer.linear("mlp.down_proj", [hidden, inner], false)?,
                has_rope: config.has_rope(i),
                has_window: config.window(i).is_some(),
            });
        }
        let norm = weight("model.norm.weight".into(), &[hidden])?;
        let head = if with_head && !config.tie_word_embeddings {
            Some(weight(HEAD.into(), &[config.vocab_size, hidden])?)
        } else {
            None
        };

        Ok(Self {
            frequencies: config.frequencies(),
            rotation: half_rotation(config.head_dim, device)?,
            config,
            embedding,
            layers,
            norm,
            head,
            named,
        })
    }

    /// Whether that weight never changes, as only its adapters learn, and can be shared by copies.
    fn is_constant(&self, name: &str) -> bool {
        self.config.lora.is_some() && !is_adapter(name)
    }

    fn map(&self, f: impl FnMut(&str, &Tensor) -> Result<Tensor>) -> Result<Self> {
        self.map_with_head(self.head.is_some(), f)
    }

    fn map_with_head(
        &self,
        with_head: bool,
        mut f: impl FnMut(&str, &Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut named = self.named.iter();
        Self::build(self.config.clone(), with_head, self.device(), |name, _| {
            let (known, tensor) = named.next().expect("the order is fixed");
            debug_assert_eq!(known, name);
            f(name, tensor)
        })
    }

    /// The residual stream `[B, T, hidden_size]` after the last layer, before the final norm.
    fn layers(
        &self,
        ids: &Tensor,
        pads: &[usize],
        mut cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let pass = self.pass(ids, pads, cache.as_deref())?;
        if let Some(cache) = cache.as_deref_mut() {
            self.allocate(cache, pass.batch)?;
        }
        let ids = ids.flatten_all()?.contiguous()?;
        let mut x = self
            .embedding
            .index_select(&ids, 0)
            .with_context(|| format!("a token id outside 0..{}", self.config.vocab_size))?;
        if self.config.model_type == Architecture::Gemma {
            x = (x * (self.config.hidden_size as f64).sqrt())?;
        }
        for (i, layer) in self.layers.iter().enumerate() {
            let normed = self.rms_norm(&x, &layer.input_norm)?;
            let kept = cache.as_deref().map(|cache| (&cache.layers[i], cache.len));
            x = (x + self.attention(layer, &normed, &pass, kept)?)?;
            let normed = self.rms_norm(&x, &layer.post_attention_norm)?;
            let gate = layer.gate.forward(&normed)?;
            let gate = match self.config.model_type {
                Architecture::Gemma => gate.gelu()?, // the approximation by tanh
                _ => silu(&gate)?,
            };
            let inner = (gate * layer.up.forward(&normed)?)?;
            x = (x + layer.down.forward(&inner)?)?;
        }
        if let Some(cache) = cache {
            cache.len += pass.len;
        }
        Ok(x.reshape((pass.batch, pass.len, self.config.hidden_size))?)
    }

    /// Checks the arguments and computes what the layers share.
    fn pass(&self, ids: &Tensor, pads: &[usize], cache: Option<&KvCache>) -> Result<Pass> {
        ensure!(
            ids.dtype() == DType::U32 && ids.rank() == 2 && ids.elem_count() > 0,
            "ids: expected u32 [B, T] of at least one token, got {:?} {:?}",
            ids.dtype(),
            ids.dims()
        );
        let (batch, len) = ids.dims2()?;
        let start = cache.map_or(0, |cache| cache.len);
        let total = start + len;
        ensure!(
            total <= self.config.max_position_embeddings,
            "ids: {total} tokens do not fit the context of {}",
            self.config.max_position_embeddings
        );
        if let Some(cache) = cache {
            ensure!(
                total <= cache.capacity,
                "ids: {total} tokens do not fit the cache of {}",
                cache.capacity
            );
            let rows = cache.layers.first().map_or(Ok(batch), |(k, _)| k.dim(0))?;
            ensure!(rows == batch, "ids: expected {rows} rows as in the cache, got {batch}");
        }
        ensure!(pads.len() == batch, "pads: expected {batch}, one a row, got {}", pads.len());
        if let Some(pad) = pads.iter().find(|&&pad| pad >= total) {
            bail!("pads: a row of {total} tokens cannot have {pad} pads");
        }

        let dim = self.config.head_dim;
        let mut angles = Vec::with_capacity(batch * len * dim);
        for &pad in pads {
            for position in start..total {
                let position = position.saturating_sub(pad) as f32;
                for _half in 0..2 {
                    angles.extend(self.frequencies.iter().map(|f| position * f));
                }
            }
        }
        let angles = Tensor::from_vec(angles, (batch, 1, len, dim), self.device())?;
        let factor = self.config.attention_factor();
        let (cos, sin) = ((angles.cos()? * factor)?, (angles.sin()? * factor)?);
        let scale = self.attention_scale();
        let query_rope = ((&cos * scale)?, (&sin * scale)?);

        let needs = |windowed: bool| self.layers.iter().any(|l| l.has_window == windowed);
        let mask = |window: Option<usize>| match needs(window.is_some()) {
            true => self.mask(pads, start, len, window),
            false => Ok(None),
        };
        Ok(Pass {
            batch,
            len,
            query_rope,
            key_rope: (cos, sin),
            mask: mask(None)?,
            window_mask: match self.config.sliding_window {
                Some(window) => mask(Some(window))?,
                None => None,
            },
        })
    }

    /// The mask of the `len` tokens behind the first `start`: they see those so far that are no pads, and of them
    /// the last `window`, if there is one.
    fn mask(
        &self,
        pads: &[usize],
        start: usize,
        len: usize,
        window: Option<usize>,
    ) -> Result<Option<Tensor>> {
        let total = start + len;
        let window = window.unwrap_or(total);
        if len == 1 && window >= total && pads.iter().all(|&pad| pad == 0) {
            return Ok(None);
        }
        let mut mask = vec![MASKED; pads.len() * len * total];
        for (row, seen) in mask.chunks_exact_mut(total).enumerate() {
            let (pad, last) = (pads[row / len], start + row % len);
            if pad <= last {
                seen[pad.max((last + 1).saturating_sub(window))..=last].fill(0.0);
            }
        }
        Ok(Some(Tensor::from_vec(mask, (pads.len(), 1, len, total), self.device())?))
    }

    /// The factor of the scores of attention.
    fn attention_scale(&self) -> f64 {
        1.0 / (self.config.head_dim as f64).sqrt()
    }

    fn allocate(&self, cache: &mut KvCache, batch: usize) -> Result<()> {
        let shape = (batch, self.config.num_key_value_heads, cache.capacity, self.config.head_dim);
        while cache.layers.len() < self.layers.len() {
            let zeros = || Tensor::zeros(shape, DType::F32, self.device());
            cache.layers.push((zeros()?, zeros()?));
        }
        Ok(())
    }

    /// Grouped-query attention of `x [B * T, hidden_size]`, with the cached keys and values and
    /// their number when there is a cache.
    fn attention(
        &self,
        layer: &Layer,
        x: &Tensor,
        pass: &Pass,
        cached: Option<(&(Tensor, Tensor), usize)>,
    ) -> Result<Tensor> {
        let (batch, len, dim) = (pass.batch, pass.len, self.config.head_dim);
        let (heads, groups) = (self.config.num_attention_heads, self.config.num_key_value_heads);
        // [B * T, n * dim] -> [B, n, T, dim]
        let split = |x: Tensor, n: usize| {
            let x = x.reshape((batch, len, n, dim))?;
            x.transpose(1, 2)?.contiguous()
        };
        let mut q = split(layer.q.forward(x)?, heads)?;
        let mut k = split(layer.k.forward(x)?, groups)?;
        let mut v = split(layer.v.forward(x)?, groups)?;
        if let Some((q_norm, k_norm)) = &layer.head_norms {
            q = self.rms_norm(&q, q_norm)?;
            k = self.rms_norm(&k, k_norm)?;
        }
        if layer.has_rope {
            q = self.rope(&q, &pass.query_rope)?;
            k = self.rope(&k, &pass.key_rope)?;
        } else {
            q = (q * self.attention_scale())?;
        }
        if let Some(((keys, values), start)) = cached {
            keys.slice_set(&k, 2, start)?;
            values.slice_set(&v, 2, start)?;
            k = keys.narrow(2, 0, start + len)?;
            v = values.narrow(2, 0, start + len)?;
        }

        // The query heads that share a key head are neighbours: as rows of one matrix they need
        // no copies of the keys and values.
        let total = k.dim(2)?;
        let rows = heads / groups * len;
        let scores = q.reshape((batch, groups, rows, dim))?.matmul(&k.t()?)?;
        let scores = scores.reshape((batch, heads, len, total))?;
        let mask = if layer.has_window { &pass.window_mask } else { &pass.mask };
        let scores = match mask {
            Some(mask) => scores.broadcast_add(mask)?,
            None => scores,
        };
        let weights = softmax(&scores)?.reshape((batch, groups, rows, total))?;
        let mixed = weights.matmul(&v)?.reshape((batch, heads, len, dim))?;
        let mixed = mixed.transpose(1, 2)?.reshape((batch * len, heads * dim))?;
        layer.o.forward(&mixed)
    }

    /// Rotates `x [B, heads, T, head_dim]`.
    fn rope(&self, x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<Tensor> {
        let rotated =
            x.reshape(((), self.config.head_dim))?.matmul(&self.rotation)?.reshape(x.dims())?;
        Ok((x.broadcast_mul(cos)? + rotated.broadcast_mul(sin)?)?)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
        let inverse = (mean_square + self.config.rms_norm_eps)?.sqrt()?.recip()?;
        let normed = x.broadcast_mul(&inverse)?;
        Ok(match self.config.norm_offset() {
            0.0 => normed.broadcast_mul(weight)?,
            offset => normed.broadcast_mul(&(weight + offset)?)?,
        })
    }
}

/// A value model: the backbone of a [`Decoder`] of its own and a linear head `hidden -> 1`.
pub struct Critic {
    backbone: Decoder,
    head: Tensor,
}

/// The name of a critic's head, as in Hugging Face's `LlamaForSequenceClassification`.
const VALUE_HEAD: &str = "score.weight";

impl Critic {
    /// A trainable critic on the weights of `backbone` (give it a
    /// [`duplicate`](Decoder::duplicate)), with a new head: normal, with a standard deviation of
    /// `1 / sqrt(hidden_size + 1)`.
    pub fn new(backbone: Decoder, seed: u64) -> Result<Self> {
        let hidden = backbone.config.hidden_size;
        let mut rng = StdRng::seed_from_u64(seed);
        let std = 1.0 / ((hidden + 1) as f64).sqrt();
        let head = normal(&[1, hidden], std, &mut rng, backbone.device())?;
        Ok(Self {
            head: Var::from_tensor(&head)?.into_inner(),
            backbone: backbone.map_with_head(false, |_, tensor| Ok(tensor.clone()))?,
        })
    }

    /// A trainable critic from the tensors of [`tensors`](Self::tensors).
    pub fn from_tensors(
        config: DecoderConfig,
        mut tensors: HashMap<String, Tensor>,
    ) -> Result<Self> {
        let head = take(&mut tensors, VALUE_HEAD, &[1, config.hidden_size])?;
        let device = head.device().clone();
        let backbone =
            Decoder::build(config, false, &device, |name, shape| take(&mut tensors, name, shape))?;
        refuse_rest(&backbone.config, &tensors)?;
        Ok(Self { backbone, head })
    }

    /// The shape of the backbone.
    pub fn config(&self) -> &DecoderConfig {
        &self.backbone.config
    }

    /// Values f32 `[B, T]` of tokens `ids` (u32 `[B, T]`), of which the first `pads[b]` of row `b`
    /// are padding.
    pub fn values(&self, ids: &Tensor, pads: &[usize]) -> Result<Tensor> {
        let hidden = self.backbone.hidden(ids, pads)?;
        let (batch, len, width) = hidden.dims3()?;
        let values = linear(&hidden.reshape((batch * len, width))?, &self.head)?;
        Ok(values.reshape((batch, len))?)
    }

    /// Scores f32 `[B]` of texts of at least one token each: the values at their last tokens. `pad`
    /// fills the batch.
    pub fn scores(&self, texts: &[Vec<u32>], pad: u32) -> Result<Tensor> {
        let len = texts.iter().map(Vec::len).max().unwrap_or(0);
        let pads: Vec<usize> = texts.iter().map(|text| len - text.len()).collect();
        let ids: Vec<u32> = (texts.iter().zip(&pads))
            .flat_map(|(text, &pads)| repeat_n(pad, pads).chain(text.iter().copied()))
            .collect();
        let ids = Tensor::from_vec(ids, (texts.len(), len), self.head.device())?;
        let hidden = self.backbone.hidden(&ids, &pads)?;
        let last = hidden.narrow(1, len - 1, 1)?.squeeze(1)?.contiguous()?;
        Ok(linear(&last, &self.head)?.squeeze(1)?)
    }

    /// The trainable weights, always in the same order.
    pub fn parameters(&self) -> Vec<(String, Var)> {
        let mut parameters = self.backbone.parameters();
        parameters.extend(variables(&[(VALUE_HEAD.into(), self.head.clone())]));
        parameters
    }

    /// All weights, trainable or not, as plain tensors.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = self.backbone.tensors();
        tensors.push((VALUE_HEAD.into(), self.head.detach()));
        tensors
    }

    /// The model with the same weights, seen without building a graph; later updates of the variables show.
    pub fn no_grad(&self) -> Self {
        Self { backbone: self.backbone.no_grad(), head: self.head.detach() }
    }
}

/// `x [N, in] · weightᵀ`, with `weight [out, in]`.
fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    // With few rows (a step of generation) the time goes into reading the weights, which gemm does
    // about twice as fast when they are on the left.
    if x.dim(0)? <= 32 {
        return Ok(weight.matmul(&x.t()?)?.t()?.contiguous()?);
    }
    Ok(x.matmul(&weight.t()?)?)
}

/// Softmax over the last dimension. The maximum is a mere shift and needs no gradient.
fn softmax(x: &Tensor) -> Result<Tensor> {
    let max = x.detach().max_keepdim(D::Minus1)?;
    let exp = x.broadcast_sub(&max)?.exp()?;
    let inverse = exp.sum_keepdim(D::Minus1)?.recip()?;
    Ok(exp.broadcast_mul(&inverse)?)
}

fn half_rotation(dim: usize, device: &Device) -> Result<Tensor> {
    let mut rotation = vec![0f32; dim * dim];
    for i in 0..dim / 2 {
        rotation[(i + dim / 2) * dim + i] = -1.0;
        rotation[i * dim + i + dim / 2] = 1.0;
    }
    Ok(Tensor::from_vec(rotation, (dim, dim), device)?)
}

/// Takes a tensor out of the map as a trainable f32 of the given shape.
fn take(tensors: &mut HashMap<String, Tensor>, name: &str, shape: &[usize]) -> Result<Tensor> {
    let tensor = tensors.remove(name).with_context(|| format!("tensor {name} is missing"))?;
    ensure!(
        tensor.dims() == shape,
        "tensor {name}: expected shape {shape:?}, got {:?}",
        tensor.dims()
    );
    ensure!(
        tensor.dtype().is_float(),
        "tensor {name}: expected a float type, got {}",
        tensor.dtype().as_str()
    );
    let tensor = tensor.to_dtype(DType::F32)?;
    Ok(Var::from_tensor(&tensor)?.into_inner())
}

/// Whether two tensors hold the same numbers.
fn is_same(a: &Tensor, b: &Tensor) -> Result<bool> {
    if a.dims() != b.dims() || a.dtype() != b.dtype() || a.elem_count() == 0 {
        return Ok(false);
    }
    Ok(a.eq(b)?.flatten_all()?.min(0)?.to_scalar::<u8>()? == 1)
}

fn refuse_rest(config: &DecoderConfig, tensors: &HashMap<String, Tensor>) -> Result<()> {
    match tensors.keys().min() {
        None => Ok(()),
        Some(name) => bail!(
            "tensor {name} has no place in a {} of this shape ({} such tensors)",
            config.model_type.class(),
            tensors.len()
        ),
    }
}

fn variables(named: &[(String, Tensor)]) -> Vec<(String, Var)> {
    (named.iter())
        .filter(|(_, tensor)| tensor.is_variable())
        .map(|(name, tensor)| {
            let variable = Var::from_tensor(tensor).expect("a variable is taken as it is");
            (name.clone(), variable)
        })
        .collect()
}

/// Normal numbers by Box and Muller's transform; candle's own cannot be seeded on the CPU.
fn normal(shape: &[usize], std: f64, rng: &mut impl Rng, device: &Device) -> Result<Tensor> {
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count)
        .map(|_| {
            let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
            let angle = 2.0 * PI * rng.random::<f64>();
            (std * radius * angle.cos()) as f32
        })
        .collect();
    Ok(Tensor::from_vec(values, shape, device)?)
}
