//! Files of prompts: one `{"prompt": "The cat sat on the"}` a line, or text with one prompt a line;
//! see [`lines`].

use std::path::Path;

use anyhow::{ensure, Result};

use super::lines::{self, Format, Line};

const FORMAT: Format =
    Format { flag: "--prompts", item: "prompt", shape: r#"{"prompt": ".."}"#, or_text: true };

/// The prompts of a file, in order; at least one, none of them blank.
///
/// # Errors
/// A file that cannot be read, is not UTF-8 or holds no prompt, and a line of a `.jsonl` file that
/// is no object with a `prompt` that holds text. The message has `--prompts`, file and line.
pub fn read(path: &Path) -> Result<Vec<String>> {
    lines::read(path, &FORMAT, |line| {
        let prompt = match line {
            Line::Text(text) => text.to_owned(),
            Line::Object(object) => FORMAT.text(&object, "prompt")?,
        };
        ensure!(!prompt.trim().is_empty(), "the prompt is empty");
        Ok(prompt)
    })
}
