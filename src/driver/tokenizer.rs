//! Text to token ids and back, for the tokenizer of a Hugging Face folder or of a GGUF file.
//!
//! A GGUF file holds the vocabulary and names the way text is cut; both become the value of a
//! `tokenizer.json`, so that there is one way to read a tokenizer, and one to save it.

use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;

use anyhow::{anyhow, bail, ensure, Context, Result};
use candle_core::quantized::gguf_file::Value as Gguf;
use serde_json::{json, Map, Value};

use super::chat::ChatTemplate;

/// A tokenizer that knows which tokens end a text and which one fills a batch.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    eos: Vec<u32>,
    pad: u32,
    vocab_size: usize,
    files: Vec<(String, String)>,
    /// Compiled when it is first needed: most runs need none.
    chat: OnceLock<Result<ChatTemplate, String>>,
}

impl Tokenizer {
    /// Wraps a tokenizer; `eos` are the ids that end a text, the usual one first, and `pad` fills a
    /// batch.
    pub fn from_tokenizers(mut inner: tokenizers::Tokenizer, eos: Vec<u32>, pad: u32) -> Self {
        // Lengths and padding of a batch are the rollout's to decide.
        inner.with_padding(None);
        inner.with_truncation(None).expect("nothing to check");
        let mut distinct = Vec::new();
        for id in eos {
            if !distinct.contains(&id) {
                distinct.push(id);
            }
        }
        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        Self { inner, eos: distinct, pad, vocab_size, files: Vec::new(), chat: OnceLock::new() }
    }

    /// Reads a `tokenizer.json` and the files beside it, `files` by name and text, which say more of
    /// the tokens and are kept as they are. `eos` are the ends of a text that other files name, and
    /// `pad` what fills a batch.
    ///
    /// The end that `tokenizer_config.json` names is the usual one; `pad` is that file's, or the usual
    /// end, where no other is given.
    pub fn from_json(
        json: &[u8],
        files: Vec<(String, String)>,
        mut eos: Vec<u32>,
        pad: Option<u32>,
    ) -> Result<Self> {
        let inner = parse(json)?;
        let tokens = special_tokens(&files);
        let special = |key: &str| inner.token_to_id(tokens.get(key)?);
        if let Some(end) = special("eos_token") {
            eos.insert(0, end);
        }
        let pad = pad.or(special("pad_token")).or(eos.first().copied()).unwrap_or(0);
        Ok(Self { files, ..Self::from_tokenizers(inner, eos, pad) })
    }

    /// Reads the tokenizer in the metadata of a GGUF file.
    pub fn from_gguf(metadata: &HashMap<String, Gguf>) -> Result<Self> {
        let vocabulary = Vocabulary::read(metadata)?;
        let (mut value, adds_bos) = match string(metadata, "tokenizer.ggml.model")? {
            "gpt2" => byte_level_bpe(metadata, &vocabulary)?,
            "llama" => sentence_piece(metadata, &vocabulary)?,
            other => bail!("tokenizer.ggml.model: expected \"gpt2\" or \"llama\", got {other:?}"),
        };
        value["version"] = json!("1.0");
        value["added_tokens"] = vocabulary.added_tokens();
        let bos = vocabulary.id(metadata, "bos")?;
        let adds_bos = flag(metadata, "tokenizer.ggml.add_bos_token")?.unwrap_or(adds_bos);
        if let (true, Some(bos)) = (adds_bos, bos) {
            value["post_processor"] = starts_with(&vocabulary.tokens[bos as usize], bos);
        }
        let mut eos = Vec::new();
        for kind in ["eos", "eot"] {
            eos.extend(vocabulary.id(metadata, kind)?);
        }
        eos.extend(vocabulary.ends());
        let pad = vocabulary.id(metadata, "padding")?.or(eos.first().copied()).unwrap_or(0);
        let inner = parse(&serde_json::to_vec(&value)?)?;
        let tokenizer = Self::from_tokenizers(inner, eos, pad);
        let mut config = tokenizer.config();
        config["bos_token"] = json!(bos.map(|bos| &vocabulary.tokens[bos as usize]));
        if metadata.contains_key("tokenizer.chat_template") {
            config["chat_template"] = json!(string(metadata, "tokenizer.chat_template")?);
        }
        let files = vec![(TOKENIZER_CONFIG.to_owned(), serde_json::to_string_pretty(&config)?)];
        Ok(Self { files, ..tokenizer })
    }

    /// The template that makes a text of a conversation.
    ///
    /// # Errors
    /// If there is none, or it is no Jinja.
    pub fn chat_template(&self) -> Result<&ChatTemplate> {
        let compile = || {
            let file = self.files.iter().find(|(name, _)| name == TEMPLATE);
            let template = file.map(|(_, text)| text.clone());
            let template = template.or_else(|| configured_template(&self.files)).with_context(|| {
                format!(
                    "messages need a chat template, and the tokenizer has none: neither {TEMPLATE} nor \
                     chat_template in {TOKENIZER_CONFIG}"
                )
            })?;
            ChatTemplate::new(&template, special_tokens(&self.files))
        };
        let compiled = self.chat.get_or_init(|| compile().map_err(|error| format!("{error:#}")));
        compiled.as_ref().map_err(|error| anyhow!("{error}"))
    }

    /// The files beside `tokenizer.json`, by name and text.
    pub fn files(&self) -> Result<Vec<(String, String)>> {
        let mut files = self.files.clone();
        if files.iter().all(|(name, _)| name != TOKENIZER_CONFIG) {
            files.push((TOKENIZER_CONFIG.into(), serde_json::to_string_pretty(&self.config())?));
        }
        Ok(files)
    }

    /// A `tokenizer_config.json`. Without it transformers takes the tokenizer for SentencePiece and adds
    /// tokens of its own.
    fn config(&self) -> Value {
        json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos.first().and_then(|&id| self.token(id)),
            "pad_token": self.token(self.pad),
            "clean_up_tokenization_spaces": false,
        })
    }

    /// The `tokenizer.json` of this tokenizer.
    pub fn to_json(&self) -> Result<String> {
        self.inner.to_string(true).map_err(|error| anyhow!(error))
    }

    /// Token ids of a text, with the special tokens that the model expects around it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text, true)
    }

    /// Token ids of a text that goes on from another, without special tokens around it.
    pub fn encode_continuation(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text, false)
    }

    fn ids(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode(text, special).map_err(|error| {
            let start: String = text.chars().take(80).collect();
            anyhow!(error).context(format!("cannot encode {start:?}"))
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of token ids, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|error| anyhow!(error).context("cannot decode"))
    }

    /// The text of one token as the vocabulary has it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether both give the same ids to the same tokens.
    pub fn has_vocabulary_of(&self, other: &Tokenizer) -> bool {
        self.inner.get_vocab(true) == other.inner.get_vocab(true)
    }

    /// The ids that end a text, the usual one first; may be empty.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The id that fills a batch.
    pub fn pad(&self) -> u32 {
        self.pad
    }

    /// The highest id and one: what a model's vocabulary must hold at least.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }
}

/// The files beside `tokenizer.json` that are kept.
pub(super) const FILES: [&str; 4] =
    [TOKENIZER_CONFIG, SPECIAL_TOKENS, TEMPLATE, "generation_config.json"];

const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS: &str = "special_tokens_map.json";
const TEMPLATE: &str = "chat_template.jinja";

fn parse(json: &[u8]) -> Result<tokenizers::Tokenizer> {
    // `tokenizers` panics on some text that is no JSON at all.
    serde_json::from_slice::<serde::de::IgnoredAny>(json)?;
    tokenizers::Tokenizer::from_bytes(json).map_err(|error| anyhow!(error))
}

fn json_of(files: &[(String, String)], name: &str) -> Option<Map<String, Value>> {
    let (_, text) = files.iter().find(|(known, _)| known == name)?;
    serde_json::from_str(text).ok()
}

/// The texts of the special tokens by name: `bos_token`, and so on. In a file they are that, or objects
/// with their content.
fn special_tokens(files: &[(String, String)]) -> BTreeMap<String, String> {
    let mut tokens = BTreeMap::new();
    // The second goes before the first, which older files have.
    for name in [SPECIAL_TOKENS, TOKENIZER_CONFIG] {
        for (key, token) in json_of(files, name).unwrap_or_default() {
            let text = token.as_str().or_else(|| token["content"].as_str());
            if let Some(text) = text.filter(|_| key.ends_with("_token")) {
                tokens.insert(key, text.to_owned());
            }
        }
    }
    tokens
}

/// The template in `tokenizer_config.json`, or the default one of several there.
fn configured_template(files: &[(String, String)]) -> Option<String> {
    let config = json_of(files, TOKENIZER_CONFIG)?;
    let template = config.get("chat_template")?;
    let named = || template.as_array()?.iter().find(|one| one["name"] == "default");
    let text = template.as_str().or_else(|| named()?["template"].as_str())?;
    Some(text.to_owned())
}

/// The tokens of a GGUF file and their kinds.
struct Vocabulary {
    tokens: Vec<String>,
    kinds: Vec<i64>,
}

/// Kinds of tokens in `tokenizer.ggml.token_type`.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Control tokens that end a text in the families of chat models, whatever the file calls its eos.
const ENDS: [&str; 5] = ["<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "</s>"];

impl Vocabulary {
    fn read(metadata: &HashMap<String, Gguf>) -> Result<Self> {
        let tokens = strings(metadata, "tokenizer.ggml.tokens")?;
        ensure!(!tokens.is_empty(), "tokenizer.ggml.tokens: empty");
        let kinds = match metadata.get("tokenizer.ggml.token_type") {
            None => vec![1; tokens.len()],
            Some(_) => array(metadata, "tokenizer.ggml.token_type")?
                .iter()
                .map(|kind| integer(kind).context("tokenizer.ggml.token_type"))
                .collect::<Result<_>>()?,
        };
        ensure!(
            kinds.len() == tokens.len(),
            "tokenizer.ggml.token_type: expected {}, one a token, got {}",
            tokens.len(),
            kinds.len()
        );
        Ok(Self { tokens, kinds })
    }

    fn id(&self, metadata: &HashMap<String, Gguf>, kind: &str) -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{kind}_token_id");
        let Some(value) = metadata.get(&key) else {
            return Ok(None);
        };
        let id = integer(value).context(key.clone())?;
        ensure!(
            (0..self.tokens.len() as i64).contains(&id),
            "{key}: expected an id below {}, got {id}",
            self.tokens.len()
        );
        Ok(Some(id as u32))
    }

    fn ends(&self) -> Vec<u32> {
        (0..self.tokens.len())
            .filter(|&i| self.kinds[i] == CONTROL && ENDS.contains(&self.tokens[i].as_str()))
            .map(|i| i as u32)
            .collect()
    }

    fn ids(&self) -> Map<String, Value> {
        (self.tokens.iter().enumerate()).map(|(id, token)| (token.clone(), json!(id))).collect()
    }

    fn added_tokens(&self) -> Value {
        (self.tokens.iter().zip(&self.kinds).enumerate())
            .filter(|(_, (_, kind))| [UNKNOWN, CONTROL, USER_DEFINED].contains(kind))
            .map(|(id, (token, &kind))| {
                json!({
                    "id": id, "content": token, "special": kind != USER_DEFINED,
                    "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                })
            })
            .collect()
    }
}

/// Byte-level BPE (GPT-2's), and whether it puts the bos token first by default.
fn byte_level_bpe(
    metadata: &HashMap<String, Gguf>,
    vocabulary: &Vocabulary,
) -> Result<(Value, bool)> {
    const CONTRACTIONS_WORDS_NUMBERS: &str =
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
    const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let split = |regex: &str| {
        json!({
            "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false
        })
    };
    let bytes = |use_regex: bool| {
        json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": use_regex,
        })
    };
    let pre = match metadata.get("tokenizer.ggml.pre") {
        None => "default",
        Some(_) => string(metadata, "tokenizer.ggml.pre")?,
    };
    let llama3 = matches!(pre, "llama-bpe" | "llama3" | "llama-v3");
    let steps = match pre {
        "gpt-2" => vec![bytes(true)],
        "smollm" => vec![json!({ "type": "Digits", "individual_digits": true }), bytes(true)],
        "default" => vec![
            split(r"[\p{P}\$\+<=>\^~\|]+"),
            split(CONTRACTIONS_WORDS_NUMBERS),
            split(r"\p{N}+"),
            split("[0-9][0-9][0-9]"),
            bytes(false),
        ],
        "qwen2" => vec![split(QWEN2), bytes(false)],
        _ if llama3 => vec![split(LLAMA3), bytes(false)],
        other => {
            bail!("tokenizer.ggml.pre: expected gpt-2, smollm, qwen2, llama-bpe or default, got {other:?}")
        }
    };
    let merges = strings(metadata, "tokenizer.ggml.merges")?;
    let value = json!({
        "normalizer": (pre == "qwen2").then(|| json!({ "type": "NFC" })),
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": steps },
        "decoder": bytes(true),
        "model": {
            "type": "BPE", "vocab": vocabulary.ids(), "merges": merges,
            "ignore_merges": llama3, "fuse_unk": false, "byte_fallback": false,
        },
    });
    Ok((value, llama3))
}

/// SentencePiece BPE: the score of a piece is the rank of the merges that make it; characters
/// outside the vocabulary become bytes.
fn sentence_piece(
    metadata: &HashMap<String, Gguf>,
    vocabulary: &Vocabulary,
) -> Result<(Value, bool)> {
    let scores: Vec<f32> = array(metadata, "tokenizer.ggml.scores")?
        .iter()
        .map(|score| Ok(score.to_f32()?))
        .collect::<Result<_>>()
        .context("tokenizer.ggml.scores")?;
    ensure!(
        scores.len() == vocabulary.tokens.len(),
        "tokenizer.ggml.scores: expected {}, one a token, got {}",
        vocabulary.tokens.len(),
        scores.len()
    );
    let ids: HashMap<&str, usize> = (vocabulary.tokens.iter().enumerate())
        .filter(|&(id, _)| ![UNKNOWN, CONTROL].contains(&vocabulary.kinds[id]))
        .map(|(id, token)| (token.as_str(), id))
        .collect();
    let mut merges = Vec::new();
    for (&piece, &id) in &ids {
        for (cut, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(cut);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                merges.push((scores[id], id, l, r));
            }
        }
    }
    merges.sort_by(|a, b| (b.0.total_cmp(&a.0)).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    let merges: Vec<_> = (merges.iter())
        .map(|&(_, _, l, r)| json!([vocabulary.tokens[l], vocabulary.tokens[r]]))
        .collect();

    let unknown = vocabulary.id(metadata, "unknown")?;
    let space_first = flag(metadata, "tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers =
        vec![json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" })];
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if space_first {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": "▁" }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    let value = json!({
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "type": "BPE", "vocab": vocabulary.ids(), "merges": merges,
            "unk_token": unknown.map(|id| &vocabulary.tokens[id as usize]),
            "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
        },
    });
    Ok((value, true))
}

/// The post-processor that puts the bos token first.
fn starts_with(token: &str, id: u32) -> Value {
    let text = |name: &str, type_id: u32| json!({ "Sequence": { "id": name, "type_id": type_id } });
    let bos = |type_id: u32| json!({ "SpecialToken": { "id": token, "type_id": type_id } });
    json!({
        "type": "TemplateProcessing",
        "single": [bos(0), text("A", 0)],
        "pair": [bos(0), text("A", 0), bos(1), text("B", 1)],
        "special_tokens": { token: { "id": token, "ids": [id], "tokens": [token] } },
    })
}

fn array<'a>(metadata: &'a HashMap<String, Gguf>, key: &str) -> Result<&'a [Gguf]> {
    match metadata.get(key) {
        Some(Gguf::Array(values)) => Ok(values),
        Some(_) => bail!("{key}: expected an array"),
        None => bail!("{key} is missing"),
    }
}

fn strings(metadata: &HashMap<String, Gguf>, key: &str) -> Result<Vec<String>> {
    array(metadata, key)?
        .iter()
        .map(|value| match value {
            Gguf::String(text) => Ok(text.clone()),
            _ => bail!("{key}: expected strings"),
        })
        .collect()
}

/// A text of a GGUF file's metadata.
pub(super) fn string<'a>(metadata: &'a HashMap<String, Gguf>, key: &str) -> Result<&'a str> {
    match metadata.get(key) {
        Some(Gguf::String(text)) => Ok(text),
        Some(_) => bail!("{key}: expected a string"),
        None => bail!("{key} is missing"),
    }
}

fn flag(metadata: &HashMap<String, Gguf>, key: &str) -> Result<Option<bool>> {
    match metadata.get(key) {
        None => Ok(None),
        Some(Gguf::Bool(value)) => Ok(Some(*value)),
        Some(_) => bail!("{key}: expected a boolean"),
    }
}

/// An integer of a GGUF file's metadata; writers differ in the width they choose.
pub(super) fn integer(value: &Gguf) -> Result<i64> {
    Ok(match *value {
        Gguf::U8(v) => v.into(),
        Gguf::I8(v) => v.into(),
        Gguf::U16(v) => v.into(),
        Gguf::I16(v) => v.into(),
        Gguf::U32(v) => v.into(),
        Gguf::I32(v) => v.into(),
        Gguf::U64(v) => i64::try_from(v)?,
        Gguf::I64(v) => v,
        _ => bail!("expected an integer"),
    })
}
