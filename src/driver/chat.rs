//! Conversations, and the templates that make texts of them: the Jinja that tokenizers of chat models
//! carry, rendered as transformers renders it.
//!
//! As in TRL, what is given decides: a prompt that is text stays as it is, one that is a list of messages
//! goes through the template, which writes the special tokens itself, so none are added to it.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{bail, ensure, Context, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Rest;
use minijinja::{Environment, Error, ErrorKind, Value as Jinja};
use regex::Regex;
use serde::Serialize;
use serde_json::Value;

use super::tokenizer::Tokenizer;

/// A message of a conversation: its `role` and `content`, and what else a template reads, all of it text.
pub type Message = BTreeMap<String, String>;

/// A prompt: a text or a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Text {
    /// A text that goes on.
    Plain(String),
    /// A conversation, of which the next message is wanted; at least one.
    Chat(Vec<Message>),
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self::Plain(text.to_owned())
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self::Plain(text)
    }
}

impl Text {
    /// A prompt in a file: text, or messages of which the last is not the assistant's.
    ///
    /// # Errors
    /// Anything else; it shows the message.
    pub fn from_json(value: &Value) -> Result<Self> {
        if let Some(text) = value.as_str() {
            return Ok(Self::Plain(text.to_owned()));
        }
        let messages = messages(value)?;
        let last = messages.last().context("expected at least one message")?;
        ensure!(
            last["role"] != ASSISTANT,
            "the last message is the assistant's, which leaves none to be answered"
        );
        Ok(Self::Chat(messages))
    }

    /// A conversation in a file as what was answered, and the assistant's last message.
    ///
    /// # Errors
    /// What is no such conversation.
    pub fn answered(value: &Value) -> Result<(Self, String)> {
        let mut messages = messages(value)?;
        let last = messages.pop().filter(|last| last["role"] == ASSISTANT && !messages.is_empty());
        let mut last =
            last.context("expected several messages, and the assistant's as the last")?;
        Ok((Self::Chat(messages), last.remove(CONTENT).unwrap_or_default()))
    }

    /// A response in a file: text, or the one message of the assistant.
    ///
    /// # Errors
    /// Anything else.
    pub fn response(value: &Value) -> Result<String> {
        if let Some(text) = value.as_str() {
            return Ok(text.to_owned());
        }
        match messages(value)?.as_slice() {
            [message] if message["role"] == ASSISTANT => Ok(message[CONTENT].clone()),
            _ => bail!("expected one message, the assistant's, got {value}"),
        }
    }

    /// The text that is shown and that a reward reads: the whole, or that of the last message.
    pub fn last(&self) -> &str {
        match self {
            Self::Plain(text) => text,
            Self::Chat(messages) => {
                messages.last().and_then(|last| last.get(CONTENT)).map_or("", String::as_str)
            }
        }
    }

    /// Token ids of the prompt.
    ///
    /// # Errors
    /// A conversation for a tokenizer without a template, one that its template refuses, and what the
    /// tokenizer does not know.
    pub fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        match self {
            Self::Plain(text) => tokenizer.encode(text),
            Self::Chat(messages) => {
                let text = tokenizer.chat_template()?.render(messages, true)?;
                tokenizer.encode_continuation(&text)
            }
        }
    }

    /// Token ids of the prompt, and of that response to it.
    ///
    /// # Errors
    /// Those of [`Self::encode`].
    pub fn encode_with(
        &self,
        response: &str,
        tokenizer: &Tokenizer,
    ) -> Result<(Vec<u32>, Vec<u32>)> {
        let Self::Chat(messages) = self else {
            return Ok((self.encode(tokenizer)?, tokenizer.encode_continuation(response)?));
        };
        let template = tokenizer.chat_template()?;
        let prompt = template.render(messages, true)?;
        let answer = [("role", ASSISTANT), (CONTENT, response)];
        let answer = Message::from(answer.map(|(key, value)| (key.to_owned(), value.to_owned())));
        let all = [messages.as_slice(), &[answer]].concat();
        let whole = template.render(&all, false)?;
        // What both have: some templates start the answer with more than they keep of it.
        let same = prompt.char_indices().zip(whole.chars()).find(|((_, a), b)| a != b);
        let len = same.map_or(prompt.len().min(whole.len()), |((at, _), _)| at);
        let (prompt, response) = whole.split_at(len);
        Ok((tokenizer.encode_continuation(prompt)?, tokenizer.encode_continuation(response)?))
    }
}

const CONTENT: &str = "content";
const ASSISTANT: &str = "assistant";

fn messages(value: &Value) -> Result<Vec<Message>> {
    const SHAPE: &str = r#"[{"role": "..", "content": ".."}, ..]"#;
    let messages = value.as_array().with_context(|| format!("expected {SHAPE}, got {value}"))?;
    let read = |message: &Value| {
        let read = serde_json::from_value::<Message>(message.clone()).ok();
        read.filter(|read| ["role", CONTENT].iter().all(|&key| read.contains_key(key)))
            .with_context(|| format!("expected {SHAPE} with nothing but text, got {message}"))
    };
    messages.iter().map(read).collect()
}

/// The template of a tokenizer.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Texts of the special tokens, by their names in `tokenizer_config.json`.
    special: BTreeMap<String, String>,
}

const NAME: &str = "chat template";

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// Names the line that is no Jinja.
    pub fn new(source: &str, special: BTreeMap<String, String>) -> Result<Self> {
        // Only transformers has this tag, around what an assistant says; it changes no text.
        let generation = Regex::new(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")?;
        let source = generation.replace_all(source, |found: &regex::Captures| {
            let tag = if found.get(2).is_some() { "endif" } else { "if true" };
            format!("{}{tag}{}", &found[1], &found[3])
        });
        let mut environment = Environment::new();
        environment
            .set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        // Its own escapes what HTML would read.
        environment.add_filter("tojson", |value: Jinja, _: Rest<Jinja>| {
            serde_json::to_string(&value).map_err(|error| {
                Error::new(ErrorKind::BadSerialization, "tojson").with_source(error)
            })
        });
        environment.add_function("strftime_now", |format: String| strftime(&format, now()));
        let added = environment.add_template_owned(NAME, source.into_owned());
        added.context("the chat template of the tokenizer is not valid")?;
        Ok(Self { environment, special })
    }

    /// The text of a conversation; with `add_generation_prompt` it ends where the assistant's next message starts.
    ///
    /// # Errors
    /// What the template refuses, in its words.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let mut context: BTreeMap<&str, Jinja> =
            self.special.iter().map(|(name, token)| (name.as_str(), token.into())).collect();
        context.extend([
            ("messages", messages.to_vec().into()),
            ("add_generation_prompt", add_generation_prompt.into()),
            ("tools", ().into()),
            ("documents", ().into()),
        ]);
        let text =
            self.environment.get_template(NAME).and_then(|template| template.render(context));
        text.context("the chat template refuses the messages")
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// A time in UTC as C's `strftime` writes it, for what templates ask of it.
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] =
        ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, time) = (seconds / 86400, seconds % 86400);
    let (mut year, mut day) = (1970, days);
    let is_leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    while day >= 365 + u64::from(is_leap(year)) {
        day -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    let (day, weekday) = (day + 1, DAYS[(days % 7) as usize]);
    let mut text = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let code = rest.next();
        text += &match code {
            Some('Y') => year.to_string(),
            Some('m') => format!("{:02}", month + 1),
            Some('d') => format!("{day:02}"),
            Some('B') => MONTHS[month].to_owned(),
            Some('b') => MONTHS[month][..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('H') => format!("{:02}", time / 3600),
            Some('M') => format!("{:02}", time / 60 % 60),
            Some('S') => format!("{:02}", time % 60),
            Some('%') => "%".to_owned(),
            _ => {
                let message = format!("strftime_now: {format:?} is not supported");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        };
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::strftime;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, want) in [
            (0, "Thu 01 Jan 1970 00:00:00"),
            (951_782_400 + 86_399, "Tue 29 Feb 2000 23:59:59"),
            (4_107_542_400, "Mon 01 Mar 2100 00:00:00"),
            (1_735_689_599, "Tue 31 Dec 2024 23:59:59"),
        ] {
            assert_eq!(strftime("%a %d %b %Y %H:%M:%S", seconds).unwrap(), want);
        }
        assert_eq!(strftime("%A %B %m %%", 0).unwrap(), "Thursday January 01 %");
        assert!(strftime("%Q", 0).is_err() && strftime("%", 0).is_err());
    }
}
