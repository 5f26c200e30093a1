//! AdamW behind gradient clipping by global norm, and the learning rate over the run.
//!
//! With g the gradient, scaled by min(1, max_grad_norm / norm), and t the step, counted from 1:
//!
//! ```text
//! m <- β1 m + (1 - β1) g        v <- β2 v + (1 - β2) g²
//! θ <- θ - lr (m / (1 - β1^t) / (sqrt(v / (1 - β2^t)) + eps) + λ θ)
//! ```
//!
//! The norm is a value of its own, so that the caller can look at it before anything is applied: a
//! step whose loss or norm is not finite must not touch the weights or the moments.
//!
//! `candle_nn`'s AdamW makes a new tensor at each operation: for a model of 135M parameters it takes
//! longer than the model's forward and backward together. This one works in place.

use std::ops::Range;

use anyhow::{ensure, Result};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, InplaceOp2, InplaceOp3, Layout, Tensor, Var};

use crate::cpu::for_each;

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPS: f64 = 1e-8;

/// Elements that one thread takes at a time.
const GRAIN: usize = 1 << 14;

/// The learning rate's course: linear warm-up, then linear decay or none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The highest learning rate.
    pub peak: f64,
    /// Steps until it is reached.
    pub warmup: usize,
    /// Steps of the run.
    pub total: usize,
    /// Whether it falls towards 0 after the warm-up. The last step still has a rate above 0.
    pub decay: bool,
}

impl Schedule {
    /// The learning rate of `step`, counted from 0.
    pub fn at(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        if !self.decay {
            return self.peak;
        }
        let left = self.total.saturating_sub(step) as f64;
        self.peak * left / self.total.saturating_sub(self.warmup).max(1) as f64
    }
}

/// AdamW over one network's parameters, f32.
pub struct Optimizer {
    weights: Vec<Weight>,
    steps: i32,
    weight_decay: f64,
    max_grad_norm: f64,
}

struct Weight {
    theta: Var,
    first: Tensor,
    second: Tensor,
}

impl Optimizer {
    /// For these parameters. Gradients of a global norm above `max_grad_norm` are scaled down to it.
    pub fn new(
        parameters: &[(String, Var)],
        weight_decay: f64,
        max_grad_norm: f64,
    ) -> Result<Self> {
        let weight = |(_, theta): &(String, Var)| {
            Ok(Weight {
                theta: theta.clone(),
                first: theta.zeros_like()?.detach(),
                second: theta.zeros_like()?.detach(),
            })
        };
        let weights = parameters.iter().map(weight).collect::<Result<_>>()?;
        Ok(Self { weights, steps: 0, weight_decay, max_grad_norm })
    }

    /// The L2 norm of all gradients of this network together; not finite if any of them is not.
    pub fn grad_norm(&self, grads: &GradStore) -> Result<f64> {
        let mut squares = 0.0;
        for grad in self.weights.iter().filter_map(|weight| grads.get(&weight.theta)) {
            squares += sum_of_squares(grad)?;
        }
        Ok(squares.sqrt())
    }

    /// Clips by `norm`, the [`Self::grad_norm`] of the same gradients, and takes one step. Parameters
    /// without a gradient stay as they are.
    pub fn apply(&mut self, grads: &GradStore, norm: f64, learning_rate: f64) -> Result<()> {
        ensure!(norm.is_finite(), "a gradient of norm {norm} cannot be applied");
        let scale = if norm > self.max_grad_norm { self.max_grad_norm / norm } else { 1.0 };
        self.steps += 1;
        let first = Average { power: 1, keep: BETA1 as f32, take: ((1.0 - BETA1) * scale) as f32 };
        let take = (1.0 - BETA2) * scale * scale;
        let second = Average { power: 2, keep: BETA2 as f32, take: take as f32 };
        let step = Step {
            keep: (1.0 - learning_rate * self.weight_decay) as f32,
            size: (learning_rate / (1.0 - BETA1.powi(self.steps))) as f32,
            correction: (1.0 / (1.0 - BETA2.powi(self.steps))) as f32,
        };
        for weight in &self.weights {
            if let Some(grad) = grads.get(&weight.theta) {
                let grad = grad.contiguous()?;
                weight.first.inplace_op2(&grad, &first)?;
                weight.second.inplace_op2(&grad, &second)?;
                weight.theta.inplace_op3(&weight.first, &weight.second, &step)?;
            }
        }
        Ok(())
    }
}

/// Rows in f32, their sums in f64: an embedding has too many elements for one f32 sum.
fn sum_of_squares(grad: &Tensor) -> Result<f64> {
    let rows = match grad.rank() {
        0 => grad.sqr()?,
        rank => grad.sqr()?.sum(rank - 1)?,
    };
    Ok(rows.to_dtype(DType::F64)?.sum_all()?.to_scalar()?)
}

/// m <- keep m + take g^power: a moment, in place.
struct Average {
    power: i32,
    keep: f32,
    take: f32,
}

impl InplaceOp2 for Average {
    fn name(&self) -> &'static str {
        "adamw-moment"
    }

    fn cpu_fwd(
        &self,
        moment: &mut CpuStorage,
        moment_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> candle_core::Result<()> {
        let moment = elements_mut(moment, moment_layout)?;
        let grad = elements(grad, grad_layout)?;
        for_each(moment.len(), GRAIN, (moment, grad), |_, _, (moment, grad)| {
            for (m, &g) in moment.iter_mut().zip(grad) {
                let g = if self.power == 2 { g * g } else { g };
                *m = self.keep * *m + self.take * g;
            }
        });
        Ok(())
    }
}

/// θ <- keep θ - size m / (sqrt(correction v) + eps), in place.
struct Step {
    keep: f32,
    size: f32,
    correction: f32,
}

impl InplaceOp3 for Step {
    fn name(&self) -> &'static str {
        "adamw-step"
    }

    fn cpu_fwd(
        &self,
        theta: &mut CpuStorage,
        theta_layout: &Layout,
        first: &CpuStorage,
        first_layout: &Layout,
        second: &CpuStorage,
        second_layout: &Layout,
    ) -> candle_core::Result<()> {
        let theta = elements_mut(theta, theta_layout)?;
        let first = elements(first, first_layout)?;
        let second = elements(second, second_layout)?;
        for_each(theta.len(), GRAIN, (theta, first, second), |_, _, (theta, first, second)| {
            for ((theta, m), v) in theta.iter_mut().zip(first).zip(second) {
                let scale = (self.correction * v).sqrt() + EPS as f32;
                *theta = self.keep * *theta - self.size * m / scale;
            }
        });
        Ok(())
    }
}

fn elements<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    Ok(&storage.as_slice::<f32>()?[range(layout)?])
}

fn elements_mut<'a>(
    storage: &'a mut CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a mut [f32]> {
    match storage {
        CpuStorage::F32(data) => Ok(&mut data[range(layout)?]),
        _ => candle_core::bail!("the optimiser takes f32 parameters"),
    }
}

fn range(layout: &Layout) -> candle_core::Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => candle_core::bail!("the optimiser takes contiguous parameters"),
    }
}
