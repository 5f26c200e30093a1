//! A batch of prompts with their responses, and what the models say of the response's tokens.
//!
//! Row b of `ids` `[B, P + R]` is: pads, prompt (both together P tokens), response, fill. The state
//! at position P + t - 1 predicts response token t and is the one before it, so the log-probability
//! and the value of response token t both come from there.
//!
//! Padding ends at the last hidden states. From there on everything is a [pack](crate::pack): the N tokens of
//! the responses one behind the other, so that logits, the largest tensor of PPO, are `[N, vocab_size]`.

use std::iter::{once, repeat_n};

use anyhow::Result;
use candle_core::{DType, Device, Tensor, D};

use super::examples::Example;
use super::generate::Generation;
use super::model::{Critic, Decoder};
use crate::logprob::{logprobs, logprobs_and_entropy, LogprobOptions};

/// Prompts with their responses.
pub struct Sequences {
    /// u32 `[B, P + R]`.
    pub ids: Tensor,
    /// Pads at the start of each row.
    pub pads: Vec<usize>,
    /// P.
    pub prompt_len: usize,
    /// Tokens of each response, the end of sequence among them; at least 1.
    pub lengths: Vec<usize>,
}

impl From<&Generation> for Sequences {
    fn from(generation: &Generation) -> Self {
        Self {
            ids: generation.ids.clone(),
            pads: generation.pads.clone(),
            prompt_len: generation.prompt_len,
            lengths: generation.responses.iter().map(Vec::len).collect(),
        }
    }
}

impl Sequences {
    /// Lays examples, at least one, out as a batch; `pad` fills it.
    pub fn of(examples: &[&Example], pad: u32, device: &Device) -> Result<Self> {
        let longest =
            |len: fn(&Example) -> usize| examples.iter().map(|e| len(e)).max().unwrap_or(0);
        let (prompt_len, response_len) =
            (longest(|e| e.prompt.len()), longest(|e| e.response.len()));
        let pads: Vec<usize> = examples.iter().map(|e| prompt_len - e.prompt.len()).collect();
        let mut ids = Vec::new();
        for (example, &pads) in examples.iter().zip(&pads) {
            ids.extend(repeat_n(pad, pads));
            ids.extend(&example.prompt);
            ids.extend(&example.response);
            ids.extend(repeat_n(pad, response_len - example.response.len()));
        }
        let rows = examples.len();
        Ok(Self {
            ids: Tensor::from_vec(ids, (rows, prompt_len + response_len), device)?,
            pads,
            prompt_len,
            lengths: examples.iter().map(|example| example.response.len()).collect(),
        })
    }

    /// B.
    pub fn len(&self) -> usize {
        self.pads.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pads.is_empty()
    }

    /// N.
    pub fn count_tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Where each response begins among the tokens, and N.
    fn starts(&self) -> Vec<usize> {
        let ends = self.lengths.iter().scan(0, |end, len| {
            *end += len;
            Some(*end)
        });
        once(0).chain(ends).collect()
    }

    /// The offsets of the pack: i64 `[B + 1]`.
    pub fn offsets(&self) -> Result<Tensor> {
        let offsets: Vec<i64> = self.starts().into_iter().map(|start| start as i64).collect();
        Ok(Tensor::new(offsets, self.ids.device())?)
    }

    /// The places of the responses' first tokens in the pack: u32 `[B]`.
    pub fn first_tokens(&self) -> Result<Tensor> {
        let starts = self.starts();
        self.index(starts[..self.len()].iter().copied())
    }

    /// The places of the tokens of the given rows in the pack, in the rows' order: u32.
    pub fn tokens_of(&self, rows: &[usize]) -> Result<Tensor> {
        let starts = self.starts();
        self.index(rows.iter().flat_map(|&row| starts[row]..starts[row + 1]))
    }

    /// The sum over each response of values `[N]`.
    pub fn sums(&self, per_token: &Tensor) -> Result<Vec<f32>> {
        let values: Vec<f32> = per_token.to_vec1()?;
        let sum = |row: &[usize]| values[row[0]..row[1]].iter().map(|&x| f64::from(x)).sum::<f64>();
        Ok(self.starts().windows(2).map(|row| sum(row) as f32).collect())
    }

    /// The given rows, in their order, without the padding that they all have.
    pub fn select(&self, rows: &[usize]) -> Result<Self> {
        let of_rows = |all: &[usize]| -> Vec<usize> { rows.iter().map(|&row| all[row]).collect() };
        let (pads, lengths) = (of_rows(&self.pads), of_rows(&self.lengths));
        let spare = pads.iter().copied().min().unwrap_or(0);
        let prompt_len = self.prompt_len - spare;
        let response_len = lengths.iter().copied().max().unwrap_or(0);
        let ids = self.ids.index_select(&self.index(rows.iter().copied())?, 0)?;
        Ok(Self {
            ids: ids.narrow(1, spare, prompt_len + response_len)?.contiguous()?,
            pads: pads.into_iter().map(|pads| pads - spare).collect(),
            prompt_len,
            lengths,
        })
    }

    /// Log-probabilities of the response's tokens and entropies of the distributions they were drawn
    /// from, at the sampling temperature: f32 `[N]` both.
    pub fn logp_and_entropy(
        &self,
        decoder: &Decoder,
        temperature: f64,
    ) -> Result<(Tensor, Tensor)> {
        self.logp_and_entropy_of(&self.logits(decoder)?, temperature)
    }

    /// Log-probabilities, and the logarithms of the sums of the squared probabilities in the same
    /// distributions: f32 `[N]` both.
    pub fn logp_and_log_sum_sq_probs(
        &self,
        decoder: &Decoder,
        temperature: f64,
    ) -> Result<[Tensor; 2]> {
        let logits = self.logits(decoder)?;
        let (logp, _) = self.logp_and_entropy_of(&logits, temperature)?;
        let logits = (logits.to_dtype(DType::F32)? / temperature)?;
        let [of_squares, of_all] = [(&logits * 2.0)?, logits].map(|x| x.log_sum_exp(D::Minus1));
        Ok([logp, (of_squares? - (of_all? * 2.0)?)?])
    }

    fn logp_and_entropy_of(&self, logits: &Tensor, temperature: f64) -> Result<(Tensor, Tensor)> {
        let options = LogprobOptions { temperature, ..LogprobOptions::default() };
        Ok(logprobs_and_entropy(logits, &self.targets()?, &options)?)
    }

    /// Log-probabilities of the response's tokens: f32 `[N]`.
    pub fn logp(&self, decoder: &Decoder) -> Result<Tensor> {
        Ok(logprobs(&self.logits(decoder)?, &self.targets()?, &LogprobOptions::default())?)
    }

    /// Values before each of the response's tokens: f32 `[N]`.
    pub fn values(&self, critic: &Critic) -> Result<Tensor> {
        let values = critic.values(&self.ids, &self.pads)?.flatten_all()?;
        Ok(values.index_select(&self.positions(1)?, 0)?)
    }

    /// Logits that the response's tokens were drawn from: f32 `[N, vocab_size]`.
    fn logits(&self, decoder: &Decoder) -> Result<Tensor> {
        let hidden = decoder.hidden(&self.ids, &self.pads)?.flatten_to(1)?;
        decoder.logits(&hidden.index_select(&self.positions(1)?, 0)?)
    }

    /// The response's tokens: u32 `[N]`.
    fn targets(&self) -> Result<Tensor> {
        Ok(self.ids.flatten_all()?.index_select(&self.positions(0)?, 0)?)
    }

    /// The places in `[B (P + R)]` of what is that many positions before the response's tokens: u32 `[N]`.
    fn positions(&self, before: usize) -> Result<Tensor> {
        let width = self.ids.dim(1)?;
        self.index(self.lengths.iter().enumerate().flat_map(|(row, &len)| {
            let start = row * width + self.prompt_len - before;
            start..start + len
        }))
    }

    fn index(&self, places: impl Iterator<Item = usize>) -> Result<Tensor> {
        let places: Vec<u32> = places.map(|place| place as u32).collect();
        Ok(Tensor::new(places, self.ids.device())?)
    }
}
