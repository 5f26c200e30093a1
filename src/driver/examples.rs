//! Texts that a model learns from: demonstrations, and pairs of responses of which one is preferred.
//!
//! | file | a line |
//! |---|---|
//! | `--demonstrations` | `{"prompt": "..", "response": ".."}`, or a whole text |
//! | `--preferences` | `{"prompt": "..", "chosen": "..", "rejected": ".."}`, and a `margin` if there is one |
//!
//! Prompts and responses may be lists of messages instead, a demonstration one list of `messages` that ends
//! with the assistant's: the chat template makes texts of them (see [`chat`](super::chat)).
//!
//! The tokens of a response follow those of its prompt, so a response starts with the space that
//! stands between the two, where the tokenizer makes one of it; the end of sequence is added.

use std::cmp::Ordering;
use std::path::Path;

use anyhow::{ensure, Context, Result};
use serde_json::Value;

use super::chat::Text;
use super::lines::{self, Format, Line};
use super::reward::sentiment;
use super::tokenizer::Tokenizer;

/// A prompt and the response that is learned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demonstration {
    /// Empty where the whole text is learned.
    pub prompt: Text,
    /// The response, or the whole text.
    pub response: String,
}

/// A prompt and two responses to it.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Preference {
    /// The prompt.
    pub prompt: Text,
    /// The better response.
    pub chosen: String,
    /// The other one.
    pub rejected: String,
    /// By how much the chosen one should score more at least, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub margin: Option<f64>,
}

impl Preference {
    /// The answer that the sentiment reward prefers; nothing if it gives both the same score.
    pub fn judge(prompt: &str, one: &str, other: &str) -> Option<Self> {
        let (chosen, rejected) = match sentiment(one).partial_cmp(&sentiment(other))? {
            Ordering::Greater => (one, other),
            Ordering::Less => (other, one),
            Ordering::Equal => return None,
        };
        Some(Self {
            prompt: prompt.into(),
            chosen: chosen.to_owned(),
            rejected: rejected.to_owned(),
            margin: None,
        })
    }
}

const DEMONSTRATIONS: Format = Format {
    flag: "--demonstrations",
    item: "demonstration",
    shape: r#"{"prompt": "..", "response": ".."}"#,
    or_text: true,
};

const PREFERENCES: Format = Format {
    flag: "--preferences",
    item: "pair",
    shape: r#"{"prompt": "..", "chosen": "..", "rejected": ".."}"#,
    or_text: false,
};

/// The demonstrations of a file, in order; at least one, none of them blank.
///
/// # Errors
/// Those of [`lines::read`]; they name `--demonstrations`.
pub fn read_demonstrations(path: &Path) -> Result<Vec<Demonstration>> {
    lines::read(path, &DEMONSTRATIONS, |line| {
        let object = match line {
            Line::Text(text) => {
                return Ok(Demonstration { prompt: "".into(), response: text.to_owned() })
            }
            Line::Object(object) => object,
        };
        let demonstration = match object.get(lines::MESSAGES) {
            Some(messages) if !object.contains_key("prompt") => {
                let (prompt, response) = Text::answered(messages).context(lines::MESSAGES)?;
                Demonstration { prompt, response }
            }
            _ => Demonstration {
                prompt: DEMONSTRATIONS.prompt(&object, "prompt")?,
                response: DEMONSTRATIONS.response(&object, "response")?,
            },
        };
        ensure!(!demonstration.prompt.last().trim().is_empty(), "the prompt is empty");
        ensure!(!demonstration.response.trim().is_empty(), "the response is empty");
        Ok(demonstration)
    })
}

/// The pairs of a file, in order; at least one, and the two responses of each differ.
///
/// # Errors
/// Those of [`lines::read`]; they name `--preferences`.
pub fn read_preferences(path: &Path) -> Result<Vec<Preference>> {
    lines::read(path, &PREFERENCES, |line| {
        let Line::Object(object) = line else { unreachable!("the format has no text") };
        let margin = match object.get("margin") {
            None | Some(Value::Null) => None,
            Some(margin) => {
                let number = margin.as_f64().filter(|x| (*x as f32).is_finite());
                Some(number.with_context(|| format!("margin: expected a number, got {margin}"))?)
            }
        };
        let pair = Preference {
            prompt: PREFERENCES.prompt(&object, "prompt")?,
            chosen: PREFERENCES.response(&object, "chosen")?,
            rejected: PREFERENCES.response(&object, "rejected")?,
            margin,
        };
        ensure!(!pair.prompt.last().trim().is_empty(), "the prompt is empty");
        ensure!(pair.chosen != pair.rejected, "chosen and rejected are the same");
        Ok(pair)
    })
}

/// A prompt and a response as tokens, at least one each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// The tokens that are given.
    pub prompt: Vec<u32>,
    /// The tokens that are learned, the end of sequence with them.
    pub response: Vec<u32>,
}

impl Example {
    /// Encodes a prompt and a response, and ends it; without a prompt the first token of the response
    /// is what is given.
    ///
    /// # Errors
    /// What the tokenizer does not know, or has no token for.
    pub fn encode(tokenizer: &Tokenizer, prompt: &Text, response: &str) -> Result<Self> {
        let is_chat = matches!(prompt, Text::Chat(_));
        let (prompt, mut response) = if prompt.last().is_empty() {
            let mut prompt = tokenizer.encode(response)?;
            ensure!(!prompt.is_empty(), "it has no token");
            let response = prompt.split_off(1);
            (prompt, response)
        } else {
            let (prompt, response) = prompt.encode_with(response, tokenizer)?;
            ensure!(!prompt.is_empty(), "its prompt has no token");
            (prompt, response)
        };
        // A template ends its messages by itself.
        let eos = tokenizer.eos();
        if !is_chat || !response.iter().any(|id| eos.contains(id)) {
            response.extend(eos.first());
        }
        ensure!(!response.is_empty(), "its response has no token");
        Ok(Self { prompt, response })
    }

    /// Tokens of both.
    pub fn tokens(&self) -> Vec<u32> {
        [self.prompt.as_slice(), &self.response].concat()
    }

    fn fits(self, context: usize) -> Result<Self> {
        let len = self.prompt.len() + self.response.len();
        ensure!(
            len <= context,
            "it has {len} tokens, its end among them, and does not fit the model's context of {context}"
        );
        Ok(self)
    }
}

/// Encodes demonstrations for a model of that context.
///
/// # Errors
/// Names `--demonstrations` and the one that cannot be encoded or does not fit.
pub fn encode_demonstrations(
    demonstrations: &[Demonstration],
    tokenizer: &Tokenizer,
    context: usize,
) -> Result<Vec<Example>> {
    encode_all(&DEMONSTRATIONS, demonstrations, |demonstration| {
        let Demonstration { prompt, response } = demonstration;
        Example::encode(tokenizer, prompt, response)?.fits(context)
    })
}

/// A pair as tokens.
pub struct Pair {
    /// The better response.
    pub chosen: Example,
    /// The other one, to the same prompt.
    pub rejected: Example,
    /// By how much the chosen one should score more at least.
    pub margin: Option<f64>,
}

/// Encodes pairs for a model of that context.
///
/// # Errors
/// Names `--preferences` and the pair that cannot be encoded, does not fit or whose two responses are
/// the same tokens.
pub fn encode_preferences(
    preferences: &[Preference],
    tokenizer: &Tokenizer,
    context: usize,
) -> Result<Vec<Pair>> {
    encode_all(&PREFERENCES, preferences, |pair| {
        let encode =
            |response: &str| Example::encode(tokenizer, &pair.prompt, response)?.fits(context);
        let (chosen, rejected) = (encode(&pair.chosen)?, encode(&pair.rejected)?);
        ensure!(chosen != rejected, "chosen and rejected are the same tokens");
        Ok(Pair { chosen, rejected, margin: pair.margin })
    })
}

fn encode_all<T, E>(
    format: &Format,
    items: &[T],
    encode: impl Fn(&T) -> Result<E>,
) -> Result<Vec<E>> {
    let numbered = items.iter().enumerate();
    numbered
        .map(|(i, item)| {
            encode(item).with_context(|| format!("{}: {} {}", format.flag, format.item, i + 1))
        })
        .collect()
}
