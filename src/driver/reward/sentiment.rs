//! A lexical sentiment score in [-1, 1].
//!
//! Every word of the response that stands in `lexicon.txt` counts with its weight, from -3 to 3.
//! Among the three words before it, in the same clause,
//!
//! * an odd number of negations ("not", "never", "don't") turns the weight round and weakens it:
//!   "not good" is bad, but less so than "bad";
//! * each intensifier ("very", "slightly") strengthens or weakens it.
//!
//! With s the sum, the score is tanh(s / 4): 0 for a response without feeling, 0.46 for one plain
//! good word, and never past 1 however often the word is said.

use std::collections::HashMap;
use std::sync::LazyLock;

/// Words before a word of feeling that can change it.
const REACH: usize = 3;
/// "Not good" is less bad than "good" is good.
const NEGATED: f32 = -0.75;
/// The sum of weights at which the score is tanh(1) = 0.76: two plain words.
const SCALE: f32 = 4.0;

static LEXICON: LazyLock<HashMap<&str, f32>> =
    LazyLock::new(|| parse(include_str!("lexicon.txt")).collect());

/// The score of a text, in [-1, 1]; 0 if it has no word of feeling.
pub fn sentiment(text: &str) -> f32 {
    let text = text.to_lowercase().replace('\u{2019}', "'");
    let mut sum = 0.0;
    for clause in text.split(|c| ".,;:!?()\n\"".contains(c)) {
        let words: Vec<&str> = clause
            .split(|c: char| !c.is_alphanumeric() && c != '\'')
            .map(|word| word.trim_matches('\''))
            .filter(|word| !word.is_empty())
            .collect();
        // What follows "but" is a clause of its own.
        for words in words.split(|&word| word == "but") {
            for (i, word) in words.iter().enumerate() {
                if let Some(weight) = LEXICON.get(word) {
                    sum += weight * change(&words[i.saturating_sub(REACH)..i]);
                }
            }
        }
    }
    (sum / SCALE).tanh()
}

/// The factor that the words before a word of feeling put on its weight.
fn change(before: &[&str]) -> f32 {
    let negations = before.iter().filter(|word| is_negation(word)).count();
    let intensity: f32 = before.iter().map(|word| intensity(word)).product();
    if negations % 2 == 1 {
        NEGATED * intensity
    } else {
        intensity
    }
}

fn is_negation(word: &str) -> bool {
    word.ends_with("n't")
        || matches!(
            word,
            "not"
                | "no"
                | "never"
                | "none"
                | "nobody"
                | "nothing"
                | "neither"
                | "nor"
                | "without"
                | "hardly"
                | "barely"
                | "scarcely"
                | "cannot"
                | "dont"
                | "isnt"
                | "wasnt"
        )
}

fn intensity(word: &str) -> f32 {
    match word {
        "extremely" | "incredibly" | "absolutely" | "completely" | "totally" | "utterly" => 2.0,
        "very" | "really" | "so" | "truly" | "deeply" | "most" | "too" | "especially" => 1.5,
        "somewhat" | "rather" | "quite" | "mostly" => 0.75,
        "slightly" | "little" | "bit" | "almost" | "partly" => 0.5,
        _ => 1.0,
    }
}

fn parse(lexicon: &str) -> impl Iterator<Item = (&str, f32)> {
    lexicon.lines().filter(|line| !line.starts_with('#')).flat_map(|line| {
        let mut fields = line.split_whitespace();
        let weight = fields.next().and_then(|weight| weight.parse().ok()).unwrap_or(0.0);
        fields.map(move |word| (word, weight))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lexicon_has_each_word_once_with_a_weight_from_1_to_3() {
        let words: Vec<_> = parse(include_str!("lexicon.txt")).collect();
        assert!(words.len() > 600, "{}", words.len());
        let mut seen = HashMap::new();
        for (word, weight) in words {
            assert!([1.0, 2.0, 3.0].contains(&weight.abs()), "{word} {weight}");
            assert!(word.chars().all(|c| c.is_ascii_lowercase()), "{word}");
            assert!(!is_negation(word) && intensity(word) == 1.0, "{word} changes others");
            assert_eq!(seen.insert(word, weight), None, "{word} stands twice");
        }
    }
}
