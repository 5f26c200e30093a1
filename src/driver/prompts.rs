//! Files of prompts: one `{"prompt": "The cat sat on the"}` a line, or text with one prompt a line;
//! see [`lines`]. A conversation stands as a list of messages there, or under `messages`.

use std::path::Path;

use anyhow::{ensure, Result};

use super::chat::Text;
use super::lines::{self, Format, Line};

const FORMAT: Format =
    Format { flag: "--prompts", item: "prompt", shape: r#"{"prompt": ".."}"#, or_text: true };

/// The prompts of a file, in order; at least one, none of them blank.
///
/// # Errors
/// A file that cannot be read, is not UTF-8 or holds no prompt, and a line of a `.jsonl` file that
/// is no object with a prompt. The message has `--prompts`, file and line.
pub fn read(path: &Path) -> Result<Vec<Text>> {
    lines::read(path, &FORMAT, |line| {
        let prompt = match line {
            Line::Text(text) => text.into(),
            Line::Object(object) => FORMAT.prompt(&object, "prompt")?,
        };
        ensure!(!prompt.last().trim().is_empty(), "the prompt is empty");
        Ok(prompt)
    })
}
