//! The passes as they are written with candle's own ops today, to be measured beside this crate's.
//!
//! 16-bit logits are widened first: sums would have 8 bits otherwise. Masks are f32, to multiply by.

use candle_core::{DType, Result, Tensor, D};
use ppo_kernels::gae::GaeOptions;

/// Log-probabilities of the targets, of one dimension less than the logits.
pub fn logprobs(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    gather(&log_softmax(logits)?, targets)
}

/// And the entropies.
pub fn logprobs_and_entropy(logits: &Tensor, targets: &Tensor) -> Result<(Tensor, Tensor)> {
    let logp = log_softmax(logits)?;
    let entropy = logp.exp()?.mul(&logp)?.sum(D::Minus1)?.neg()?;
    Ok((gather(&logp, targets)?, entropy))
}

fn log_softmax(logits: &Tensor) -> Result<Tensor> {
    candle_nn::ops::log_softmax(&logits.to_dtype(DType::F32)?, D::Minus1)
}

fn gather(logp: &Tensor, targets: &Tensor) -> Result<Tensor> {
    logp.gather(&targets.unsqueeze(D::Minus1)?, D::Minus1)?.squeeze(D::Minus1)
}

/// The estimator K3, exp(-d) - 1 + d with d = logp - ref_logp.
pub fn token_kl(logp: &Tensor, ref_logp: &Tensor) -> Result<Tensor> {
    let d = logp.sub(ref_logp)?;
    d.neg()?.exp()?.add(&d)? - 1.0
}

/// KL(p || q) of the rows of two tensors of logits.
pub fn full_kl(logits: &Tensor, ref_logits: &Tensor) -> Result<Tensor> {
    let (ln_p, ln_q) = (log_softmax(logits)?, log_softmax(ref_logits)?);
    ln_p.exp()?.mul(&ln_p.sub(&ln_q)?)?.sum(D::Minus1)
}

/// The Jensen-Shannon divergence of the rows of two tensors of logits.
pub fn jsd(logits: &Tensor, ref_logits: &Tensor) -> Result<Tensor> {
    let (ln_p, ln_q) = (log_softmax(logits)?, log_softmax(ref_logits)?);
    let (p, q) = (ln_p.exp()?, ln_q.exp()?);
    let ln_m = ((&p + &q)? * 0.5)?.log()?;
    let of = |p: Tensor, ln_p: Tensor| p.mul(&(ln_p - &ln_m)?)?.sum(D::Minus1);
    (of(p, ln_p)? + of(q, ln_q)?)? * 0.5
}

/// Their total variation.
pub fn total_variation(logits: &Tensor, ref_logits: &Tensor) -> Result<Tensor> {
    let (ln_p, ln_q) = (log_softmax(logits)?, log_softmax(ref_logits)?);
    1.0 - ln_p.minimum(&ln_q)?.exp()?.sum(D::Minus1)?
}

/// Advantages and returns, column after column from the last one, as every loop over time in a tensor
/// library.
pub fn gae(rewards: &Tensor, values: &Tensor, options: &GaeOptions) -> Result<(Tensor, Tensor)> {
    let GaeOptions { gamma, lambda, .. } = *options;
    let (batch, seq_len) = values.dims2()?;
    let mut next_value = Tensor::zeros((batch, 1), DType::F32, values.device())?;
    let mut advantage = next_value.clone();
    let mut columns = Vec::with_capacity(seq_len);
    for t in (0..seq_len).rev() {
        let value = values.narrow(1, t, 1)?;
        let delta = ((rewards.narrow(1, t, 1)? + (next_value * gamma)?)? - &value)?;
        advantage = (delta + (advantage * (gamma * lambda))?)?;
        columns.push(advantage.clone());
        next_value = value;
    }
    columns.reverse();
    let advantages = Tensor::cat(&columns, 1)?;
    let returns = (&advantages + values)?;
    Ok((advantages, returns))
}

/// [`gae`] of rewards made of the KL penalty and of a score at each row's last token. As TRL does it:
/// rewards and values are multiplied by the mask, and so is what comes out.
pub fn masked_gae(
    values: &Tensor,
    kl: &Tensor,
    scores: &Tensor,
    last: &Tensor,
    mask: &Tensor,
    options: &GaeOptions,
) -> Result<(Tensor, Tensor)> {
    let penalty = ((kl * -options.shaping.kl_coef)? * mask)?;
    let rewards = penalty.scatter_add(&last.unsqueeze(1)?, &scores.unsqueeze(1)?, 1)?;
    let (advantages, returns) = gae(&rewards, &(values * mask)?, options)?;
    Ok(((advantages * mask)?, (returns * mask)?))
}

/// Weights of tokens, e^d truncated at 2, of rows whose mean of e^d - 1 - d is at most `most`.
pub fn correction(
    old_logp: &Tensor,
    rollout_logp: &Tensor,
    mask: &Tensor,
    most: f64,
) -> Result<Tensor> {
    let d = old_logp.sub(rollout_logp)?.clamp(-20f32, 20f32)?;
    let ratio = d.exp()?;
    let k3 = ((&ratio - 1.0)? - &d)?.mul(mask)?.sum_keepdim(1)?.div(&mask.sum_keepdim(1)?)?;
    let stays = k3.le(most)?.to_dtype(DType::F32)?;
    ratio.minimum(2f32)?.mul(mask)?.broadcast_mul(&stays)
}

/// By the moments of what the mask keeps.
pub fn masked_whiten(x: &Tensor, mask: &Tensor, eps: f64) -> Result<Tensor> {
    let count = mask.sum_all()?;
    let mean = x.mul(mask)?.sum_all()?.div(&count)?;
    let centred = x.broadcast_sub(&mean)?.mul(mask)?;
    let variance = centred.sqr()?.sum_all()?.div(&(count - 1.0)?)?;
    centred.broadcast_div(&(variance + eps)?.sqrt()?)
}
