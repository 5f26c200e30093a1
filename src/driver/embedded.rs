//! The run that needs nothing: a corpus of simple sentences, a tokenizer made of its words, and a
//! small decoder that is fitted to it by ordinary language modelling before PPO starts.
//!
//! The corpus tells of people and animals; a third of its sentences end well, a third badly. PPO
//! then shifts the balance towards what the reward prefers.

use std::collections::BTreeSet;

use anyhow::{anyhow, Result};
use candle_core::{DType, Device, Tensor};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::SeedableRng;
use serde_json::json;

use super::load::Loaded;
use super::model::{Decoder, DecoderConfig};
use super::optim::{Optimizer, Schedule};
use super::tokenizer::Tokenizer;
use crate::logprob::{logprobs, LogprobOptions};

const CORPUS: &str = include_str!("embedded/corpus.txt");
const PROMPTS: &str = include_str!("embedded/prompts.txt");

/// The settings of the embedded run, as TOML.
pub const SETTINGS: &str = include_str!("embedded/config.toml");

const PAD: &str = "<pad>";
const EOS: &str = "</s>";

/// Sentences in a step of language modelling.
const LM_BATCH: usize = 32;
const LM_LEARNING_RATE: f64 = 3e-3;
const LM_WARMUP: usize = 20;
/// The target of what lies behind a sentence's end.
const IGNORE: i64 = -100;

/// The prompts of the embedded run.
pub fn prompts() -> Vec<String> {
    PROMPTS.lines().map(str::to_owned).collect()
}

/// A tokenizer of the corpus's words and its full stop. Any other word is an error of `encode`.
fn tokenizer() -> Result<Tokenizer> {
    let words: BTreeSet<&str> = CORPUS.split_whitespace().map(|w| w.trim_matches('.')).collect();
    let tokens = [PAD, EOS, "."].into_iter().chain(words);
    let vocab: serde_json::Map<_, _> =
        tokens.enumerate().map(|(id, token)| (token.to_owned(), id.into())).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "special": true, "single_word": false,
               "lstrip": false, "rstrip": false, "normalized": false})
    };
    // The word-piece decoder is what joins words with spaces and puts none before a full stop.
    let description = json!({
        "version": "1.0",
        "added_tokens": [special(0, PAD), special(1, EOS)],
        "pre_tokenizer": {"type": "Whitespace"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    });
    let inner = tokenizers::Tokenizer::from_bytes(description.to_string())
        .map_err(|error| anyhow!("the embedded tokenizer: {error}"))?;
    Ok(Tokenizer::from_tokenizers(inner, vec![1], 0))
}

/// The tokenizer, and a new decoder of the embedded run's shape.
pub fn model(seed: u64, device: &Device) -> Result<Loaded> {
    let tokenizer = tokenizer()?;
    let config = DecoderConfig {
        vocab_size: tokenizer.vocab_size(),
        hidden_size: 64,
        intermediate_size: 176,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 16,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: None,
        max_position_embeddings: 64,
        tie_word_embeddings: true,
        initializer_range: 0.05,
    };
    Ok(Loaded { decoder: Decoder::random(config, seed, device)?, tokenizer })
}

/// Fits the decoder to the corpus by next-token cross-entropy, in nats a token. `on_step` is told
/// the loss of each step and answers whether to go on.
pub fn fit(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    steps: usize,
    seed: u64,
    mut on_step: impl FnMut(f64) -> bool,
) -> Result<()> {
    let eos = tokenizer.eos()[0];
    let mut sentences = Vec::new();
    for line in CORPUS.lines() {
        let mut ids = tokenizer.encode(line)?;
        ids.push(eos);
        sentences.push(ids);
    }
    let schedule =
        Schedule { peak: LM_LEARNING_RATE, warmup: LM_WARMUP, total: steps, decay: true };
    let mut optimizer = Optimizer::new(&decoder.parameters(), 0.0, 1.0)?;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut order = Vec::new();
    for step in 0..steps {
        if order.len() < LM_BATCH {
            order = (0..sentences.len()).collect();
            order.shuffle(&mut rng);
        }
        let batch: Vec<&[u32]> = order.drain(..LM_BATCH).map(|i| sentences[i].as_slice()).collect();
        let loss = cross_entropy(decoder, &batch, tokenizer.pad())?;
        let mut grads = loss.backward()?;
        let norm = optimizer.grad_norm(&grads)?;
        optimizer.apply(&mut grads, norm, schedule.at(step))?;
        if !on_step(f64::from(loss.to_scalar::<f32>()?)) {
            break;
        }
    }
    Ok(())
}

/// The mean of -logp over all tokens but each sentence's first.
fn cross_entropy(decoder: &Decoder, sentences: &[&[u32]], pad: u32) -> Result<Tensor> {
    let len = sentences.iter().map(|s| s.len()).max().unwrap_or(0) - 1;
    let (mut ids, mut targets) = (Vec::new(), Vec::new());
    let mut count = 0;
    for sentence in sentences {
        let fill = len + 1 - sentence.len();
        ids.extend(&sentence[..sentence.len() - 1]);
        ids.extend(std::iter::repeat_n(pad, fill));
        targets.extend(sentence[1..].iter().map(|&id| i64::from(id)));
        targets.extend(std::iter::repeat_n(IGNORE, fill));
        count += sentence.len() - 1;
    }
    let shape = (sentences.len(), len);
    let device = decoder.device();
    let ids = Tensor::from_vec(ids, shape, device)?;
    let targets = Tensor::from_vec(targets, shape, device)?;
    let logits = decoder.logits(&decoder.hidden(&ids, &vec![0; sentences.len()])?)?;
    let options = LogprobOptions { ignore_index: Some(IGNORE), ..LogprobOptions::default() };
    let logp = logprobs(&logits, &targets, &options)?;
    Ok((logp.sum_all()? * (-1.0 / count as f64))?.to_dtype(DType::F32)?)
}
