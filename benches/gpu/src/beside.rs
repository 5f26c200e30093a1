//! The same passes by candle's own ops, on inputs of the same shape.

use std::time::Instant;

use candle_core::{DType, Result, Tensor, Var};
use ppo_kernels::gae::GaeOptions;
use ppo_kernels::whiten::WhitenOptions;

use crate::common::minibatch::Minibatch;
use crate::common::{compositions, device, padding, rng, uniform};
use crate::table::{Pass, Shape};

type Composition = Box<dyn FnMut() -> Result<()>>;

/// The median time of the pass on candle's tensors; of a backward pass candle's own, of a graph that is
/// there. `None` where ours does another part of the work, and where candle fails, as it does for want
/// of memory.
pub fn seconds(pass: Pass, shape: Shape) -> Option<f64> {
    let made = match pass {
        Pass::LogprobForward => logprob(shape),
        Pass::LogprobBackward => logprob_backward(shape),
        Pass::LogprobEntropyForward => logprob_entropy(shape),
        Pass::LogprobEntropyBackward => logprob_entropy_backward(shape),
        Pass::FullKlForward => full_kl(shape),
        Pass::FullKlBackward => full_kl_backward(shape),
        Pass::TokenKlForward => token_kl(shape),
        Pass::TokenKlBackward => token_kl_backward(shape),
        Pass::Gae => gae(shape),
        // Without the moments.
        Pass::GaeShaped => gae_shaped(shape),
        Pass::Moments | Pass::Whiten | Pass::LogitsPpoLoss => return None,
        Pass::Advantages | Pass::AdvantagesByIds => return None,
        // Without the statistics.
        Pass::Correction | Pass::CorrectionOfRows => return None,
        Pass::WhitenBackward => whiten_backward(shape),
        Pass::PpoLoss => ppo_loss(shape),
    };
    made.and_then(median).inspect_err(|error| eprintln!("candle, {}: {error}", pass.name())).ok()
}

/// By the host's clock: candle waits for the host more than for the device.
fn median(mut composition: Composition) -> Result<f64> {
    let mut once = || {
        let start = Instant::now();
        composition()?;
        device().synchronize()?;
        Ok(start.elapsed().as_secs_f64())
    };
    // The first one also loads kernels and fills candle's memory pool.
    once()?;
    let mut times = (0..5).map(|_| once()).collect::<Result<Vec<f64>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn call<T>(mut f: impl FnMut() -> Result<T> + 'static) -> Result<Composition> {
    Ok(Box::new(move || f().map(drop)))
}

/// Logits in [-8, 8): the same sixteen million over and over.
fn logits(shape: Shape) -> Result<Tensor> {
    let Shape { dtype, rows, columns } = shape;
    let dtype = match dtype {
        "f32" => DType::F32,
        "f16" => DType::F16,
        "bf16" => DType::BF16,
        other => unreachable!("no logits are {other}"),
    };
    let count = rows * columns;
    let piece = Tensor::rand(-8.0_f32, 8.0, count.min(1 << 24), device())?.to_dtype(dtype)?;
    let pieces = vec![&piece; count.div_ceil(piece.elem_count())];
    Tensor::cat(&pieces, 0)?.narrow(0, 0, count)?.contiguous()?.reshape((rows, columns))
}

fn targets(shape: Shape) -> Result<Tensor> {
    let ids: Vec<i64> = (0..shape.rows).map(|row| (row * 7919 % shape.columns) as i64).collect();
    Tensor::new(ids, device())
}

fn logprob(shape: Shape) -> Result<Composition> {
    let (logits, targets) = (logits(shape)?, targets(shape)?);
    call(move || compositions::logprobs(&logits, &targets))
}

fn logprob_backward(shape: Shape) -> Result<Composition> {
    let logits = Var::from_tensor(&logits(shape)?)?;
    let loss = compositions::logprobs(&logits, &targets(shape)?)?.sum_all()?;
    call(move || loss.backward())
}

fn logprob_entropy(shape: Shape) -> Result<Composition> {
    let (logits, targets) = (logits(shape)?, targets(shape)?);
    call(move || compositions::logprobs_and_entropy(&logits, &targets))
}

fn logprob_entropy_backward(shape: Shape) -> Result<Composition> {
    let logits = Var::from_tensor(&logits(shape)?)?;
    let (logp, entropy) = compositions::logprobs_and_entropy(&logits, &targets(shape)?)?;
    let loss = (logp + entropy)?.sum_all()?;
    call(move || loss.backward())
}

fn full_kl(shape: Shape) -> Result<Composition> {
    let (policy, reference) = (logits(shape)?, logits(shape)?);
    call(move || compositions::full_kl(&policy, &reference))
}

fn full_kl_backward(shape: Shape) -> Result<Composition> {
    let policy = Var::from_tensor(&logits(shape)?)?;
    let loss = compositions::full_kl(&policy, &logits(shape)?)?.sum_all()?;
    call(move || loss.backward())
}

/// One value a token, in [-1, 1).
fn tokens(shape: Shape) -> Result<Tensor> {
    Tensor::rand(-1.0_f32, 1.0, (shape.rows, shape.columns), device())
}

fn token_kl(shape: Shape) -> Result<Composition> {
    let (logp, ref_logp) = (tokens(shape)?, tokens(shape)?);
    call(move || compositions::token_kl(&logp, &ref_logp))
}

fn token_kl_backward(shape: Shape) -> Result<Composition> {
    let logp = Var::from_tensor(&tokens(shape)?)?;
    let loss = compositions::token_kl(&logp, &tokens(shape)?)?.mul(&tokens(shape)?)?.sum_all()?;
    call(move || loss.backward())
}

fn gae(shape: Shape) -> Result<Composition> {
    let (rewards, values) = (tokens(shape)?, tokens(shape)?);
    call(move || compositions::gae(&rewards, &values, &GaeOptions::default()))
}

fn gae_shaped(shape: Shape) -> Result<Composition> {
    let Shape { rows, columns, .. } = shape;
    let (values, kl) = (tokens(shape)?, tokens(shape)?);
    let scores = Tensor::new(uniform(&mut rng(1), rows, 0.0, 1.0), device())?;
    let (mask, last) = padding(&mut rng(2), rows, columns);
    let mask = Tensor::from_vec(mask, (rows, columns), device())?.to_dtype(DType::F32)?;
    let last = Tensor::new(last, device())?;
    let options = GaeOptions::default();
    call(move || compositions::masked_gae(&values, &kl, &scores, &last, &mask, &options))
}

fn whiten_backward(shape: Shape) -> Result<Composition> {
    let Shape { rows, columns, .. } = shape;
    let x = Var::from_tensor(&tokens(shape)?)?;
    let (mask, _) = padding(&mut rng(2), rows, columns);
    let mask = Tensor::from_vec(mask, (rows, columns), device())?.to_dtype(DType::F32)?;
    let whitened = compositions::masked_whiten(&x, &mask, WhitenOptions::default().eps)?;
    let loss = whitened.mul(&tokens(shape)?)?.sum_all()?;
    call(move || loss.backward())
}

fn ppo_loss(shape: Shape) -> Result<Composition> {
    let logp = Var::from_tensor(&tokens(shape)?)?;
    let minibatch = Minibatch::new(&logp);
    call(move || Ok(minibatch.gradients(&minibatch.composition(&logp)?, &logp)))
}
