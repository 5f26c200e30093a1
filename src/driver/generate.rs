//! Rollout: samples a continuation of each prompt of a batch, token by token with a key/value cache.

use anyhow::{bail, ensure, Context, Result};
use candle_core::Tensor;
use rand::Rng;

use super::model::{Decoder, KvCache};

/// How the next token is drawn from its logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Draw among the `k` likeliest tokens only.
    pub top_k: Option<usize>,
    /// Draw among the fewest tokens (of the `top_k`) that together reach this probability.
    pub top_p: Option<f64>,
    /// Longest response.
    pub max_new_tokens: usize,
}

impl Default for Sampling {
    /// The model's own distribution, 24 tokens at most.
    fn default() -> Self {
        Self { temperature: 1.0, top_k: None, top_p: None, max_new_tokens: 24 }
    }
}

impl Sampling {
    /// `Ok` when every option is in its range; the error names it.
    pub fn validate(&self) -> Result<()> {
        ensure!(
            self.temperature.is_finite() && self.temperature >= 0.0,
            "--temperature: expected a number of at least 0, got {}",
            self.temperature
        );
        ensure!(self.top_k != Some(0), "--top-k: expected at least 1 token, got 0");
        if let Some(p) = self.top_p {
            ensure!(
                p > 0.0 && p <= 1.0,
                "--top-p: expected a probability above 0, at most 1, got {p}"
            );
        }
        ensure!(self.max_new_tokens > 0, "--max-new-tokens: expected at least 1, got 0");
        Ok(())
    }
}

/// Prompts and their sampled responses, `P` tokens (left-padded) and `R` (right-padded).
pub struct Generation {
    /// Prompts and responses, u32 `[B, P + R]`.
    pub ids: Tensor,
    /// Left pads of each row.
    pub pads: Vec<usize>,
    /// `P`, the longest prompt.
    pub prompt_len: usize,
    /// f32 `[N]`, of the responses one behind the other: logarithm of the probability with which each token
    /// was drawn, after temperature, top-k and top-p.
    pub logp: Tensor,
    /// The responses without padding, their eos included.
    pub responses: Vec<Vec<u32>>,
    /// Whether the response ended by an eos, and not for its length.
    pub finished: Vec<bool>,
}

/// Samples one response to each prompt. It ends with one of `eos`, or after
/// `sampling.max_new_tokens`; `R` is the longest response. `on_token` gets the number of tokens
/// drawn in each step. The same `rng` gives the same responses.
///
/// Errors: an empty prompt, one that leaves no room in the context, a token id out of range, and
/// logits that are no distribution.
pub fn generate(
    decoder: &Decoder,
    prompts: &[Vec<u32>],
    sampling: &Sampling,
    eos: &[u32],
    pad: u32,
    rng: &mut impl Rng,
    on_token: &mut dyn FnMut(usize),
) -> Result<Generation> {
    sampling.validate()?;
    let prompt_len = check_prompts(decoder, prompts, sampling)?;
    let batch = prompts.len();
    let device = decoder.device();
    let decoder = decoder.no_grad();

    let pads: Vec<usize> = prompts.iter().map(|p| prompt_len - p.len()).collect();
    let mut rows: Vec<Vec<u32>> = (prompts.iter().zip(&pads))
        .map(|(prompt, &pads)| [vec![pad; pads], prompt.clone()].concat())
        .collect();
    let mut finished = vec![false; batch];
    let mut lengths = vec![0; batch];
    let mut logps: Vec<Vec<f32>> = vec![Vec::new(); batch];

    let mut cache = KvCache::new(prompt_len + sampling.max_new_tokens);
    let mut next = Tensor::from_vec(rows.concat(), (batch, prompt_len), device)?;
    for step in 0..sampling.max_new_tokens {
        let logits = decoder.step(&next, &pads, &mut cache)?.to_vec2::<f32>()?;
        let mut drawn = Vec::with_capacity(batch);
        for (row, logits) in logits.iter().enumerate() {
            if finished[row] {
                drawn.push(pad);
                continue;
            }
            let Drawn { token, logp } = sample(logits, sampling, rng)
                .with_context(|| format!("response {row}, token {step}"))?;
            finished[row] = eos.contains(&token);
            lengths[row] += 1;
            drawn.push(token);
            logps[row].push(logp as f32);
        }
        on_token(lengths.iter().filter(|&&len| len == step + 1).count());
        for (row, &token) in rows.iter_mut().zip(&drawn) {
            row.push(token);
        }
        if finished.iter().all(|&ended| ended) {
            break;
        }
        next = Tensor::from_vec(drawn, (batch, 1), device)?;
    }

    let response_len = rows[0].len() - prompt_len;
    let responses = (rows.iter().zip(&lengths))
        .map(|(row, len)| row[prompt_len..prompt_len + len].to_vec())
        .collect();
    Ok(Generation {
        ids: Tensor::from_vec(rows.concat(), (batch, prompt_len + response_len), device)?,
        pads,
        prompt_len,
        logp: Tensor::new(logps.concat(), device)?,
        responses,
        finished,
    })
}

/// The length of the longest prompt.
fn check_prompts(decoder: &Decoder, prompts: &[Vec<u32>], sampling: &Sampling) -> Result<usize> {
    let config = decoder.config();
    let longest = prompts.iter().map(Vec::len).max();
    let longest = longest.context("prompts: expected at least one")?;
    if let Some(row) = prompts.iter().position(Vec::is_empty) {
        bail!("prompts: prompt {row} has no token");
    }
    let total = longest.saturating_add(sampling.max_new_tokens);
    ensure!(
        total <= config.max_position_embeddings,
        "prompts: {longest} tokens and {} new ones (--max-new-tokens) do not fit the context of {}",
        sampling.max_new_tokens,
        config.max_position_embeddings
    );
    Ok(longest)
}

/// A token that was drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drawn {
    /// Its id.
    pub token: u32,
    /// Logarithm of the probability with which it was drawn.
    pub logp: f64,
}

/// Draws a token from its logits. -inf is a token that cannot come; NaN, +inf and nothing but -inf
/// are errors.
pub fn sample(logits: &[f32], sampling: &Sampling, rng: &mut impl Rng) -> Result<Drawn> {
    let mut best = 0;
    for (token, &logit) in logits.iter().enumerate() {
        ensure!(!logit.is_nan() && logit < f32::INFINITY, "the logit of token {token} is {logit}");
        if logit > logits[best] {
            best = token;
        }
    }
    ensure!(logits[best] > f32::NEG_INFINITY, "the logits of all tokens are -inf");
    if sampling.temperature == 0.0 {
        return Ok(Drawn { token: best as u32, logp: 0.0 });
    }

    let max = f64::from(logits[best]);
    let weight = |logit: f32| ((f64::from(logit) - max) / sampling.temperature).exp();
    let mut weights: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|&l| weight(l))).collect();
    // Likeliest first; ties by id, so that the order is one and the same.
    let order = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if let Some(k) = sampling.top_k.filter(|&k| k < weights.len()) {
        weights.select_nth_unstable_by(k - 1, order);
        weights.truncate(k);
    }
    if sampling.top_k.is_some() || sampling.top_p.is_some() {
        weights.sort_unstable_by(order);
    }
    let mut total: f64 = weights.iter().map(|(_, weight)| weight).sum();
    if let Some(p) = sampling.top_p.filter(|&p| p < 1.0) {
        let enough = p * total;
        total = 0.0;
        let mut kept = 0;
        while kept < weights.len() && total < enough {
            total += weights[kept].1;
            kept += 1;
        }
        weights.truncate(kept);
    }

    let mut left = rng.random::<f64>() * total;
    let mut drawn = (best as u32, 1.0);
    for &(token, weight) in weights.iter().filter(|(_, weight)| *weight > 0.0) {
        drawn = (token, weight);
        left -= weight;
        if left < 0.0 {
            break;
        }
    }
    let (token, weight) = drawn;
    Ok(Drawn { token, logp: (weight / total).ln() })
}
