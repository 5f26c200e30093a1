//! The first phase of a step: draw prompts, sample a response to each from the policy, score them.

use anyhow::{ensure, Context, Result};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use super::generate::{generate, Generation, Sampling};
use super::model::Decoder;
use super::reward::{Reward, Sample};
use super::tokenizer::Tokenizer;

/// A prompt as text and as tokens.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// As it was given.
    pub text: String,
    /// Its token ids; at least one.
    pub ids: Vec<u32>,
}

/// The prompts of the run, drawn in random order, each once before any comes again.
pub struct Prompts {
    all: Vec<Prompt>,
    order: Vec<usize>,
}

impl Prompts {
    /// Encodes the prompts and refuses those to which the longest response would not fit `context`.
    pub fn new(
        texts: Vec<String>,
        tokenizer: &Tokenizer,
        context: usize,
        max_new_tokens: usize,
    ) -> Result<Self> {
        ensure!(!texts.is_empty(), "--prompts holds no prompt");
        let encode = |(i, text): (usize, String)| {
            let number = i + 1;
            let ids = tokenizer
                .encode(&text)
                .with_context(|| format!("--prompts: prompt {number} cannot be encoded"))?;
            ensure!(!ids.is_empty(), "--prompts: prompt {number} has no token");
            ensure!(
                ids.len() + max_new_tokens <= context,
                "--prompts: prompt {number} has {} tokens; with --max-new-tokens {max_new_tokens} \
                 it does not fit the model's context of {context}",
                ids.len()
            );
            Ok(Prompt { text, ids })
        };
        let all = texts.into_iter().enumerate().map(encode).collect::<Result<_>>()?;
        Ok(Self { all, order: Vec::new() })
    }

    /// The first `n` prompts, or all if there are fewer.
    pub fn first(&self, n: usize) -> &[Prompt] {
        &self.all[..n.min(self.all.len())]
    }

    /// The next `n` prompts; they repeat when there are fewer.
    pub fn draw(&mut self, n: usize, rng: &mut StdRng) -> Vec<Prompt> {
        let mut drawn = Vec::with_capacity(n);
        while drawn.len() < n {
            if self.order.is_empty() {
                self.order = (0..self.all.len()).collect();
                self.order.shuffle(rng);
            }
            drawn.extend(self.order.pop().map(|i| self.all[i].clone()));
        }
        drawn
    }
}

/// Prompts with their responses and the scores of these.
pub struct Rollout {
    /// The prompts.
    pub prompts: Vec<Prompt>,
    /// The responses as text.
    pub responses: Vec<String>,
    /// The responses as tokens.
    pub generation: Generation,
    /// What the reward gave each response.
    pub scores: Vec<f32>,
}

/// What turns prompts into a [`Rollout`], besides the policy.
pub struct Sampler {
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Scores the responses.
    pub reward: Box<dyn Reward>,
}

impl Sampler {
    /// Answers the prompts and scores the answers. `on_token` is told after each position how many
    /// tokens it added.
    pub fn answer(
        &mut self,
        policy: &Decoder,
        prompts: Vec<Prompt>,
        rng: &mut StdRng,
        on_token: &mut dyn FnMut(usize),
    ) -> Result<Rollout> {
        let tokenizer = &self.tokenizer;
        let ids: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.ids.clone()).collect();
        let (eos, pad) = (tokenizer.eos(), tokenizer.pad());
        let generation =
            generate(&policy.no_grad(), &ids, &self.sampling, eos, pad, rng, on_token)?;
        let responses: Vec<String> =
            generation.responses.iter().map(|ids| tokenizer.decode(ids)).collect::<Result<_>>()?;

        let samples: Vec<Sample> = (prompts.iter().zip(&responses))
            .map(|(prompt, response)| Sample { prompt: &prompt.text, response })
            .collect();
        let scores = self.reward.score(&samples)?;
        ensure!(
            scores.len() == samples.len(),
            "the reward {} gave {} scores for {} responses",
            self.reward.name(),
            scores.len(),
            samples.len()
        );
        Ok(Rollout { prompts, responses, generation, scores })
    }
}
