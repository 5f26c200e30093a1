//! Files of prompts.
//!
//! A file whose name ends in `.jsonl` holds one object `{"prompt": "The cat sat on the"}` a line
//! (further keys are passed over); any other file is text, with one prompt a line. Blank lines are
//! skipped, a byte order mark and carriage returns are dropped, and white space around a prompt of a
//! text file is trimmed: a tokenizer would see a space at the end as a token of its own.

use std::path::Path;

use anyhow::{anyhow, ensure, Context, Result};
use serde_json::{Map, Value};

/// The prompts of a file, in order; at least one, none of them blank.
///
/// # Errors
/// A file that cannot be read, is not UTF-8 or holds no prompt, and a line of a `.jsonl` file that
/// is no object with a `prompt` that holds text. The message has `--prompts`, file and line.
pub fn read(path: &Path) -> Result<Vec<String>> {
    let shown = path.display();
    let bytes = std::fs::read(path).with_context(|| format!("cannot read --prompts {shown}"))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + valid.iter().filter(|&&byte| byte == b'\n').count();
        anyhow!("--prompts {shown}:{line}: not UTF-8")
    })?;
    let jsonl = path.extension().is_some_and(|ext| ext.eq_ignore_ascii_case("jsonl"));
    let text = text.trim_start_matches('\u{feff}');

    let mut prompts = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        let prompt = if jsonl {
            let place = || format!("--prompts {shown}:{}: expected {{\"prompt\": \"..\"}}", i + 1);
            let object: Map<String, Value> = serde_json::from_str(line).with_context(place)?;
            object.get("prompt").and_then(Value::as_str).with_context(place)?.to_owned()
        } else {
            line.to_owned()
        };
        ensure!(!prompt.trim().is_empty(), "--prompts {shown}:{}: the prompt is empty", i + 1);
        prompts.push(prompt);
    }
    ensure!(!prompts.is_empty(), "--prompts {shown} holds no prompt");
    Ok(prompts)
}
