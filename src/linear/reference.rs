//! The oracle: plain f64 loops, and the reference of [`logprob`](crate::logprob::reference) on the logits.

use super::{LinearOptions, Sizes};
use crate::logprob::{reference, LogprobOptions};

/// The arguments of the op, in f64; see [the op](super).
#[derive(Debug, Clone, Copy)]
pub struct Arguments<'a> {
    /// `[rows, hidden_size]`.
    pub hidden: &'a [f64],
    /// `[vocab, hidden_size]`.
    pub weight: &'a [f64],
    /// `[vocab]`.
    pub bias: Option<&'a [f64]>,
    /// `[rows]`.
    pub temperatures: Option<&'a [f64]>,
    /// `[rows]`.
    pub targets: &'a [i64],
}

/// Gradients of hidden states, weight and bias.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    /// `[rows, hidden_size]`.
    pub hidden: Vec<f64>,
    /// `[vocab, hidden_size]`.
    pub weight: Vec<f64>,
    /// `[vocab]`.
    pub bias: Vec<f64>,
}

/// Log-probability of the target and entropy of each row.
///
/// # Panics
/// If a target is outside the vocabulary and is not `ignore_index`.
pub fn forward(inputs: Arguments, sizes: Sizes, options: &LinearOptions) -> (Vec<f64>, Vec<f64>) {
    let (logits, _) = logits(inputs, sizes, options);
    reference::forward(&logits, inputs.targets, sizes.vocab, &of_rows(options))
}

/// Gradients, from the upstream gradients of both outputs.
///
/// # Panics
/// If a target is outside the vocabulary and is not `ignore_index`.
pub fn backward(
    inputs: Arguments,
    sizes: Sizes,
    options: &LinearOptions,
    grad_logp: &[f64],
    grad_entropy: &[f64],
) -> Gradients {
    let Sizes { hidden_size, vocab, .. } = sizes;
    let ((logits, slopes), rows) = (logits(inputs, sizes, options), of_rows(options));
    let grad = reference::backward(&logits, inputs.targets, vocab, &rows, grad_logp, grad_entropy);
    let mut found = Gradients {
        hidden: vec![0.0; inputs.hidden.len()],
        weight: vec![0.0; inputs.weight.len()],
        bias: vec![0.0; vocab],
    };
    for (n, grad) in grad.chunks(vocab).enumerate() {
        // What an ignored row holds counts for nothing.
        for (v, &g) in grad.iter().enumerate().filter(|(_, &g)| g != 0.0) {
            let g = g * slopes[n * vocab + v];
            found.bias[v] += g;
            for i in 0..hidden_size {
                found.hidden[n * hidden_size + i] += g * inputs.weight[v * hidden_size + i];
                found.weight[v * hidden_size + i] += g * inputs.hidden[n * hidden_size + i];
            }
        }
    }
    found
}

/// z, `[rows, vocab]`, and its derivatives with respect to h Wᵀ + b.
fn logits(inputs: Arguments, sizes: Sizes, options: &LinearOptions) -> (Vec<f64>, Vec<f64>) {
    let Sizes { rows, hidden_size, vocab } = sizes;
    let (mut logits, mut slopes) = (Vec::new(), Vec::new());
    for n in 0..rows {
        let temperature = options.temperature * inputs.temperatures.map_or(1.0, |t| t[n]);
        for v in 0..vocab {
            let h = &inputs.hidden[n * hidden_size..][..hidden_size];
            let w = &inputs.weight[v * hidden_size..][..hidden_size];
            let product: f64 = h.iter().zip(w).map(|(h, w)| h * w).sum();
            let y = product + inputs.bias.map_or(0.0, |bias| bias[v]);
            let scaled = options.logit_scale * y;
            let (capped, slope) = match options.softcap {
                None => (scaled, 1.0),
                Some(cap) => {
                    let tanh = (scaled / cap).tanh();
                    (cap * tanh, 1.0 - tanh * tanh)
                }
            };
            logits.push(capped / temperature);
            slopes.push(options.logit_scale * slope / temperature);
        }
    }
    (logits, slopes)
}

/// The temperature has been taken care of.
fn of_rows(options: &LinearOptions) -> LogprobOptions {
    LogprobOptions { temperature: 1.0, ignore_index: options.ignore_index }
}
