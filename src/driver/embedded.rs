//! The run that needs nothing: a corpus of simple sentences, a tokenizer made of its words, and a
//! small decoder that is fitted to it by ordinary language modelling before PPO starts.
//!
//! The corpus tells of people and animals; a third of its sentences end well, a third badly. PPO
//! then shifts the balance towards what the reward prefers.

use std::collections::BTreeSet;

use anyhow::{anyhow, Context, Result};
use candle_core::Device;
use serde_json::json;

use super::chat::Text;
use super::config::tuning::{SftSettings, Tuning};
use super::config::RunSettings;
use super::examples::{encode_demonstrations, Demonstration, Preference};
use super::load::Loaded;
use super::model::{Architecture, Decoder, DecoderConfig};
use super::sft::Sft;
use super::tokenizer::Tokenizer;
use super::tuning;

const CORPUS: &str = include_str!("embedded/corpus.txt");
const PROMPTS: &str = include_str!("embedded/prompts.txt");

/// The settings of `train` without a model, as TOML.
pub const TRAIN: &str = include_str!("embedded/train.toml");
/// The settings of `sft` on embedded data.
pub const SFT: &str = include_str!("embedded/sft.toml");
/// The settings of `reward` on embedded data.
pub const REWARD: &str = include_str!("embedded/reward.toml");
/// The settings of `dpo` on embedded data.
pub const DPO: &str = include_str!("embedded/dpo.toml");

/// The settings in one of these texts.
pub fn settings<S: RunSettings>(text: &str) -> Result<S> {
    toml::from_str(text).context("settings of the embedded run")
}

const PAD: &str = "<pad>";
const EOS: &str = "</s>";

/// The prompts of the embedded run.
pub fn prompts() -> Vec<Text> {
    PROMPTS.lines().map(Text::from).collect()
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
        model_type: Architecture::Llama,
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
        no_rope_layers: None,
        sliding_window: None,
        layer_types: None,
        max_position_embeddings: 64,
        tie_word_embeddings: true,
        initializer_range: 0.05,
        file: None,
        lora: None,
    };
    Ok(Loaded { decoder: Decoder::random(config, seed, device)?, tokenizer })
}

/// The sentences of the corpus, as demonstrations that are learned as a whole.
pub fn demonstrations() -> Vec<Demonstration> {
    let sentence = |line: &str| Demonstration { prompt: "".into(), response: line.to_owned() };
    CORPUS.lines().map(sentence).collect()
}

/// Sentences of the corpus as a prompt and its response: the place where something happens, and what.
pub fn questions() -> Vec<(&'static str, &'static str)> {
    const THE: &str = " the ";
    let cut = |line: &'static str| line.split_at(line.find(THE).map_or(0, |at| at + THE.len()));
    CORPUS.lines().map(cut).map(|(prompt, response)| (prompt.trim_end(), response)).collect()
}

/// Preferences for what the sentiment reward prefers: for each sentence of the corpus its own end and
/// that of the next one that does the same in the same kind of place and scores differently.
pub fn preferences() -> Vec<Preference> {
    let questions = questions();
    let deed = |prompt: &'static str| {
        let mut words = prompt.rsplit(' ');
        (words.nth(1), words.next())
    };
    let len = questions.len();
    let pair = |i: usize| {
        let (prompt, response) = questions[i];
        let others = (1..len).map(|ahead| questions[(i + ahead) % len]);
        others
            .filter(|(other, _)| deed(other) == deed(prompt))
            .find_map(|(_, other)| Preference::judge(prompt, response, other))
    };
    (0..len).filter_map(pair).collect()
}

/// Fits the decoder to the corpus as `sft` does, and tells `on_step` the loss of each step, in nats a
/// token, which answers whether to go on.
pub fn fit(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    steps: usize,
    seed: u64,
    mut on_step: impl FnMut(f64) -> bool,
) -> Result<()> {
    let context = decoder.config().max_position_embeddings;
    let examples = encode_demonstrations(&demonstrations(), tokenizer, context)?;
    let rows: Vec<usize> = (0..examples.len()).collect();
    let sft = Sft { decoder, examples, pad: tokenizer.pad() };
    let tuning = Tuning { steps, seed, ..settings::<SftSettings>(SFT)?.tuning() };
    tuning::learn(&sft, &rows, &tuning, |learned| {
        Ok(on_step(learned.metrics["loss"].as_f64().unwrap_or(f64::NAN)))
    })
}
