//! The per-token tensors of a PPO minibatch, and its loss by this crate and by candle's own ops.

use approx::abs_diff_eq;
use candle_core::{DType, Tensor, Var};
use ppo_kernels::ppo_loss::{ppo_loss, PpoLossInputs, PpoLossOptions};

use super::{device, padding, rng, tensor, to_vec, uniform};

/// All `[B, T]`, with some tokens beyond each of the clip ranges.
pub struct Minibatch {
    pub values: Var,
    pub old_logp: Tensor,
    pub advantages: Tensor,
    pub old_values: Tensor,
    pub returns: Tensor,
    pub mask: Tensor,
    /// The mask as f32, for candle to multiply by.
    factors: Tensor,
}

impl Minibatch {
    /// Around the log-probabilities that the policy has now.
    pub fn new(logp: &Tensor) -> Self {
        let (batch, seq_len) = logp.dims2().unwrap();
        Self::masked(logp, padding(&mut rng(10), batch, seq_len).0)
    }

    /// With this mask, `[B T]`.
    pub fn masked(logp: &Tensor, mask: Vec<u8>) -> Self {
        let (batch, seq_len) = logp.dims2().unwrap();
        let random = |seed, spread| {
            let values = uniform(&mut rng(seed), batch * seq_len, 0.0, spread);
            tensor(values, &[batch, seq_len], DType::F32)
        };
        let mask = Tensor::from_vec(mask, (batch, seq_len), device()).unwrap();
        let values = random(11, 1.0);
        Self {
            old_logp: (logp.detach() + random(12, 0.4)).unwrap(),
            advantages: random(13, 2.0),
            old_values: (&values + random(14, 0.4)).unwrap(),
            returns: (&values + random(15, 0.4)).unwrap(),
            values: Var::from_tensor(&values).unwrap(),
            factors: mask.to_dtype(DType::F32).unwrap(),
            mask,
        }
    }

    /// The loss by this crate.
    pub fn fused(&self, logp: &Tensor) -> Tensor {
        let inputs = PpoLossInputs {
            values: Some(&self.values),
            old_values: Some(&self.old_values),
            returns: Some(&self.returns),
            mask: Some(&self.mask),
            ..PpoLossInputs::new(logp, &self.old_logp, &self.advantages)
        };
        ppo_loss(&inputs, &PpoLossOptions::default()).unwrap().loss
    }

    /// The same loss elementwise, without the statistics.
    pub fn composition(&self, logp: &Tensor) -> candle_core::Result<Tensor> {
        let options = PpoLossOptions::default();
        let clip = options.clip_range;

        let ratio = (logp - &self.old_logp)?.clamp(-20.0, 20.0)?.exp()?;
        let minus = self.advantages.neg()?;
        let clipped = (ratio.clamp(1.0 - clip, 1.0 + clip)? * &minus)?;
        let policy = (ratio * &minus)?.maximum(&clipped)?;

        let clip = options.value_clip_range.unwrap_or(f64::INFINITY);
        let moved = (self.values.as_tensor() - &self.old_values)?.clamp(-clip, clip)?;
        let clipped = ((&self.old_values + moved)? - &self.returns)?.sqr()?;
        let error = (self.values.as_tensor() - &self.returns)?.sqr()?.maximum(&clipped)?;

        let tokens = ((policy + (error * (0.5 * options.value_coef))?)? * &self.factors)?;
        tokens.sum_all()? / self.factors.sum_all()?
    }

    /// The loss of that name, without a value term, elementwise; without the statistics.
    pub fn member(&self, name: &str, logp: &Tensor) -> candle_core::Result<Tensor> {
        let options = PpoLossOptions::of(name).unwrap();
        let (low, high) = (options.clip_range, options.clip_range_high);
        let (low, high) = (1.0 - low, 1.0 + high.unwrap_or(low));
        let minus = self.advantages.neg()?;
        let d = (logp - &self.old_logp)?;
        let lengths = self.factors.sum_keepdim(1)?;
        let mean_of_means = |tokens: Tensor| {
            let rows = (tokens * &self.factors)?.sum_keepdim(1)?.div(&lengths)?;
            rows.mean_all()
        };
        match name {
            "gspo" => {
                let d = (d * &self.factors)?.sum_keepdim(1)?.div(&lengths)?;
                let ratio = d.exp()?;
                let clipped = minus.broadcast_mul(&ratio.clamp(low, high)?)?;
                mean_of_means(minus.broadcast_mul(&ratio)?.maximum(&clipped)?)
            }
            "cispo" => {
                let weight = d.clamp(-20.0, 20.0)?.exp()?.clamp(low, high)?.detach();
                let tokens = (weight * minus * logp)? * &self.factors;
                tokens?.sum_all()? / self.factors.sum_all()?
            }
            "sapo" => {
                let is_pos = self.advantages.gt(0.0)?.to_dtype(DType::F32)?;
                let (pos, neg) = (options.soft_gate_tau_pos, options.soft_gate_tau_neg);
                let tau = is_pos.affine(pos - neg, neg)?;
                let ratio = d.clamp(-20.0, 20.0)?.exp()?;
                let gate = candle_nn::ops::sigmoid(&(&tau * (ratio - 1.0)?)?)?;
                mean_of_means((gate * 4.0)?.div(&tau)?.mul(&minus)?)
            }
            other => panic!("{other}"),
        }
    }

    /// The gradients of a loss to `var`, logits or log-probabilities, and to the values.
    pub fn gradients(&self, loss: &Tensor, var: &Var) -> [Tensor; 2] {
        let mut grads = loss.backward().unwrap();
        [var, &self.values].map(|var| grads.remove(var).unwrap())
    }

    /// Compares gradients times the number of tokens, which they are divided by. One in a million
    /// may differ: a token exactly at a clip bound, where candle's `maximum` splits the gradient.
    #[track_caller]
    pub fn gradients_agree(&self, fused: [&[f32]; 2], candle: &[Tensor; 2], tolerance: f32) {
        let tokens = self.mask.elem_count();
        for (fused, candle) in fused.iter().zip(candle) {
            let candle = to_vec(candle);
            assert_eq!(fused.len(), candle.len(), "gradients differ in length");
            let agrees = |(f, c): &(&f32, &f32)| {
                let [f, c] = [*f, *c].map(|gradient| gradient * tokens as f32);
                abs_diff_eq!(f, c, epsilon = tolerance * (1.0 + c.abs()))
            };
            let pairs = fused.iter().zip(&candle);
            let differing = fused.len() - pairs.filter(agrees).count();
            assert!(differing <= tokens / 1_000_000, "{differing} of {tokens} gradients differ");
        }
    }
}
