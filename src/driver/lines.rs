//! Files with one item a line.
//!
//! A file whose name ends in `.jsonl` holds one JSON object a line (keys that nobody asks for are
//! passed over); any other file is text. Blank lines are skipped, a byte order mark and carriage
//! returns are dropped, and white space around a line of text is trimmed: a tokenizer would see a
//! space at the end as a token of its own.

use std::path::Path;

use anyhow::{anyhow, ensure, Context, Result};
use serde_json::{Map, Value};

use super::chat::Text;

/// The key of conversations in data sets of chats.
pub const MESSAGES: &str = "messages";

/// The contents of a file, as its errors call them.
pub struct Format {
    /// The flag that names the file.
    pub flag: &'static str,
    /// One item.
    pub item: &'static str,
    /// The JSON object of an item.
    pub shape: &'static str,
    /// Whether it may be text as well.
    pub or_text: bool,
}

/// One line.
pub enum Line<'a> {
    /// A line of a text file.
    Text(&'a str),
    /// A line of a `.jsonl` file.
    Object(Map<String, Value>),
}

impl Format {
    /// The text under a key.
    ///
    /// # Errors
    /// If there is none; shows the shape.
    pub fn text(&self, object: &Map<String, Value>, key: &str) -> Result<String> {
        let text = object.get(key).and_then(Value::as_str);
        Ok(text.with_context(|| self.expected())?.to_owned())
    }

    /// The prompt under a key: text, or messages; those may stand under `messages` as well.
    ///
    /// # Errors
    /// If there is none; shows the shape, or the message.
    pub fn prompt(&self, object: &Map<String, Value>, key: &'static str) -> Result<Text> {
        let found = [key, MESSAGES].into_iter().find_map(|key| Some((key, object.get(key)?)));
        match found {
            Some((key, value)) if value.is_string() || value.is_array() => {
                Text::from_json(value).context(key)
            }
            _ => Err(anyhow!(self.expected())),
        }
    }

    /// The response under a key: text, or the assistant's message.
    ///
    /// # Errors
    /// As [`Self::prompt`].
    pub fn response(&self, object: &Map<String, Value>, key: &'static str) -> Result<String> {
        match object.get(key) {
            Some(value) if value.is_string() || value.is_array() => {
                Text::response(value).context(key)
            }
            _ => Err(anyhow!(self.expected())),
        }
    }

    fn expected(&self) -> String {
        format!("expected {}", self.shape)
    }
}

/// The items of a file, in order; at least one.
///
/// # Errors
/// A file that cannot be read, is not UTF-8, holds no item or is text where it must not be, a line
/// that is no JSON object, and what `parse` says of a line. The message has flag, file and line.
pub fn read<T>(path: &Path, format: &Format, parse: impl Fn(Line) -> Result<T>) -> Result<Vec<T>> {
    let Format { flag, item, .. } = format;
    let shown = path.display();
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {flag} {shown}"))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + valid.iter().filter(|&&byte| byte == b'\n').count();
        anyhow!("{flag} {shown}:{line}: not UTF-8")
    })?;
    let jsonl = path.extension().is_some_and(|ext| ext.eq_ignore_ascii_case("jsonl"));
    ensure!(
        jsonl || format.or_text,
        "{flag} {shown}: expected a .jsonl file with one {} a line",
        format.shape
    );

    let text = text.trim_start_matches('\u{feff}');
    let lines = text.lines().map(str::trim).enumerate().filter(|(_, line)| !line.is_empty());
    let items: Vec<T> = lines
        .map(|(i, line)| {
            let line = match jsonl {
                true => serde_json::from_str(line).map(Line::Object).context(format.expected()),
                false => Ok(Line::Text(line)),
            };
            line.and_then(&parse).with_context(|| format!("{flag} {shown}:{}", i + 1))
        })
        .collect::<Result<_>>()?;
    ensure!(!items.is_empty(), "{flag} {shown} holds no {item}");
    Ok(items)
}
