//! A batch of prompts with their responses, and what the models say of the response's tokens.
//!
//! Row b of `ids` `[B, P + R]` is: pads, prompt (both together P tokens), response, fill. The state
//! at position P + t - 1 predicts response token t and is the one before it, so the log-probability
//! and the value of response token t both come from there. Logits, the largest tensor of PPO, are
//! made for these R positions only.

use std::iter::repeat_n;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};

use super::examples::Example;
use super::generate::Generation;
use super::model::{Critic, Decoder};
use crate::logprob::{logprobs, logprobs_and_entropy, LogprobOptions};

/// The target of what lies behind a response's end; the op does not read such rows.
const IGNORE: i64 = -100;

/// Prompts with their responses.
pub struct Sequences {
    /// u32 `[B, P + R]`.
    pub ids: Tensor,
    /// Pads at the start of each row.
    pub pads: Vec<usize>,
    /// P.
    pub prompt_len: usize,
    /// u8 `[B, R]`, 1 for the tokens of the response, the end of sequence among them.
    pub mask: Tensor,
}

impl From<&Generation> for Sequences {
    fn from(generation: &Generation) -> Self {
        Self {
            ids: generation.ids.clone(),
            pads: generation.pads.clone(),
            prompt_len: generation.prompt_len,
            mask: generation.mask.clone(),
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
        let (mut ids, mut mask) = (Vec::new(), Vec::new());
        for (example, &pads) in examples.iter().zip(&pads) {
            let len = example.response.len();
            ids.extend(repeat_n(pad, pads));
            ids.extend(&example.prompt);
            ids.extend(&example.response);
            ids.extend(repeat_n(pad, response_len - len));
            mask.extend((0..response_len).map(|t| u8::from(t < len)));
        }
        let rows = examples.len();
        Ok(Self {
            ids: Tensor::from_vec(ids, (rows, prompt_len + response_len), device)?,
            pads,
            prompt_len,
            mask: Tensor::from_vec(mask, (rows, response_len), device)?,
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

    /// Those of the given rows, in their order.
    pub fn select(&self, rows: &[usize]) -> Result<Self> {
        Ok(Self {
            ids: select_rows(&self.ids, rows)?,
            pads: rows.iter().map(|&row| self.pads[row]).collect(),
            prompt_len: self.prompt_len,
            mask: select_rows(&self.mask, rows)?,
        })
    }

    /// Log-probabilities of the response's tokens and entropies of the distributions they were drawn
    /// from, at the sampling temperature: f32 `[B, R]` both, 0 behind the response's end.
    pub fn logp_and_entropy(
        &self,
        decoder: &Decoder,
        temperature: f64,
    ) -> Result<(Tensor, Tensor)> {
        let options = LogprobOptions { temperature, ignore_index: Some(IGNORE) };
        Ok(logprobs_and_entropy(&self.logits(decoder)?, &self.targets()?, &options)?)
    }

    /// Log-probabilities of the response's tokens: f32 `[B, R]`, 0 behind the response's end.
    pub fn logp(&self, decoder: &Decoder) -> Result<Tensor> {
        let options = LogprobOptions { ignore_index: Some(IGNORE), ..LogprobOptions::default() };
        Ok(logprobs(&self.logits(decoder)?, &self.targets()?, &options)?)
    }

    /// Logits that the response's tokens were drawn from: f32 `[B, R, vocab_size]`.
    fn logits(&self, decoder: &Decoder) -> Result<Tensor> {
        let hidden = decoder.hidden(&self.ids, &self.pads)?;
        let before = hidden.narrow(1, self.prompt_len - 1, self.mask.dim(1)?)?.contiguous()?;
        decoder.logits(&before)
    }

    /// Values before each of the response's tokens: f32 `[B, R]`.
    pub fn values(&self, critic: &Critic) -> Result<Tensor> {
        let values = critic.values(&self.ids, &self.pads)?;
        Ok(values.narrow(1, self.prompt_len - 1, self.mask.dim(1)?)?.contiguous()?)
    }

    /// The response's tokens: i64 `[B, R]`, [`IGNORE`] behind its end.
    fn targets(&self) -> Result<Tensor> {
        let tokens = self.ids.narrow(1, self.prompt_len, self.mask.dim(1)?)?;
        let tokens = tokens.to_dtype(DType::I64)?;
        let ignored = Tensor::full(IGNORE, tokens.shape(), tokens.device())?;
        Ok(self.mask.where_cond(&tokens, &ignored)?)
    }
}

/// The given rows of a tensor, in their order.
pub fn select_rows(tensor: &Tensor, rows: &[usize]) -> Result<Tensor> {
    let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
    let rows = Tensor::new(rows, tensor.device())?;
    Ok(tensor.index_select(&rows, 0)?)
}
