//! The first phase of a step: draw prompts, sample a response to each from the policy, score them.

use anyhow::{ensure, Context, Result};
use rand::seq::SliceRandom;
use rand::Rng;

use super::chat::Text;
use super::generate::{generate, Generation, Sampling};
use super::model::Decoder;
use super::reward::{weighted_sum, Reward, Sample, Scores};
use super::tokenizer::Tokenizer;
use super::tuning;

/// A prompt as text and as tokens.
#[derive(Debug, Clone)]
pub struct Prompt {
    /// The text as it was given; of a conversation the last message.
    pub text: String,
    /// Its token ids; at least one.
    pub ids: Vec<u32>,
}

/// The prompts of the run, drawn in random order, each once before any comes again.
pub struct Prompts {
    all: Vec<Prompt>,
    held_out: Vec<Prompt>,
    order: Vec<usize>,
}

impl Prompts {
    /// Encodes the prompts and refuses those to which the longest response would not fit `context`.
    pub fn new(
        texts: Vec<impl Into<Text>>,
        tokenizer: &Tokenizer,
        context: usize,
        max_new_tokens: usize,
    ) -> Result<Self> {
        ensure!(!texts.is_empty(), "--prompts holds no prompt");
        let encode = |(i, text): (usize, Text)| {
            let number = i + 1;
            let ids = text
                .encode(tokenizer)
                .with_context(|| format!("--prompts: prompt {number} cannot be encoded"))?;
            ensure!(!ids.is_empty(), "--prompts: prompt {number} has no token");
            ensure!(
                ids.len() + max_new_tokens <= context,
                "--prompts: prompt {number} has {} tokens; with --max-new-tokens {max_new_tokens} \
                 it does not fit the model's context of {context}",
                ids.len()
            );
            Ok(Prompt { text: text.last().to_owned(), ids })
        };
        let all =
            texts.into_iter().map(Into::into).enumerate().map(encode).collect::<Result<_>>()?;
        Ok(Self { all, held_out: Vec::new(), order: Vec::new() })
    }

    /// Holds out a share of the prompts, drawn by the seed: these are not drawn any more.
    ///
    /// # Errors
    /// If that is none of them, or all; names `--held-out`.
    pub fn hold_out(&mut self, share: f64, seed: u64) -> Result<()> {
        let len = self.all.len();
        let (mut kept, held_out) = tuning::split(len, share, seed)?;
        ensure!(!held_out.is_empty(), "--held-out is {share}, which is none of {len} prompts");
        kept.sort_unstable();
        let of = |rows: &[usize]| rows.iter().map(|&row| self.all[row].clone()).collect();
        (self.all, self.held_out) = (of(&kept), of(&held_out));
        Ok(())
    }

    /// The prompts that are held out.
    pub fn held_out(&self) -> &[Prompt] {
        &self.held_out
    }

    /// The prompts that are left before all come again, the next one at the end.
    pub fn left(&self) -> &[usize] {
        &self.order
    }

    /// Goes on with these left.
    ///
    /// # Errors
    /// If there are fewer prompts than that.
    pub fn resume(&mut self, left: Vec<usize>) -> Result<()> {
        let len = self.all.len();
        ensure!(left.iter().all(|&i| i < len), "--prompts has {len} prompts, fewer than it had");
        self.order = left;
        Ok(())
    }

    /// The first `n` prompts, or all if there are fewer.
    pub fn first(&self, n: usize) -> &[Prompt] {
        &self.all[..n.min(self.all.len())]
    }

    /// The next `n` prompts; they repeat when there are fewer.
    pub fn draw(&mut self, n: usize, rng: &mut impl Rng) -> Vec<Prompt> {
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

/// Prompts with their responses.
pub struct Answers {
    /// The prompts.
    pub prompts: Vec<Prompt>,
    /// The responses as text.
    pub responses: Vec<String>,
    /// The responses as tokens.
    pub generation: Generation,
}

impl Answers {
    /// The samples for a reward, in order.
    pub fn samples(&self) -> Vec<Sample<'_>> {
        (self.prompts.iter().zip(&self.responses).zip(&self.generation.responses))
            .map(|((prompt, response), ids)| Sample {
                prompt: &prompt.text,
                response,
                prompt_ids: &prompt.ids,
                response_ids: ids,
            })
            .collect()
    }
}

/// Answers the prompts. `on_token` is told after each position how many tokens it added.
pub fn answer(
    policy: &Decoder,
    tokenizer: &Tokenizer,
    sampling: &Sampling,
    prompts: Vec<Prompt>,
    rng: &mut impl Rng,
    on_token: &mut dyn FnMut(usize),
) -> Result<Answers> {
    let ids: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.ids.clone()).collect();
    let (eos, pad) = (tokenizer.eos(), tokenizer.pad());
    let generation = generate(policy, &ids, sampling, eos, pad, rng, on_token)?;
    let responses =
        generation.responses.iter().map(|ids| tokenizer.decode(ids)).collect::<Result<_>>()?;
    Ok(Answers { prompts, responses, generation })
}

/// Answers with their scores.
pub struct Rollout {
    /// The answers.
    pub answers: Answers,
    /// The score of each response.
    pub scores: Vec<f32>,
    /// The scores by each reward, of which `scores` are the weighted sums.
    pub parts: Vec<Scores>,
    /// The answers of the likeliest tokens, where they are asked for: one to so many of these after each
    /// other as have a prompt in common.
    pub greedy: Option<Box<Rollout>>,
}

/// Everything that turns prompts into a [`Rollout`] besides the policy.
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
        rng: &mut impl Rng,
        on_token: &mut dyn FnMut(usize),
    ) -> Result<Rollout> {
        let answers = answer(policy, &self.tokenizer, &self.sampling, prompts, rng, on_token)?;
        self.scored(answers)
    }

    /// Answers the prompts with the likeliest tokens, and scores the answers.
    pub fn answer_greedily(
        &mut self,
        policy: &Decoder,
        prompts: Vec<Prompt>,
        rng: &mut impl Rng,
    ) -> Result<Rollout> {
        let likeliest = Sampling { temperature: 0.0, ..self.sampling.clone() };
        let answers = answer(policy, &self.tokenizer, &likeliest, prompts, rng, &mut |_| {})?;
        self.scored(answers)
    }

    fn scored(&mut self, answers: Answers) -> Result<Rollout> {
        let parts = self.reward.parts(&answers.samples())?;
        Ok(Rollout { answers, scores: weighted_sum(&parts), parts, greedy: None })
    }
}
