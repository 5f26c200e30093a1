//! AdamW behind gradient clipping by global norm, and the learning rate over the run.
//!
//! The norm is a value of its own, so that the caller can look at it before anything is applied: a
//! step whose loss or norm is not finite must not touch the weights or the moments.

use anyhow::{ensure, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_nn::{AdamW, Optimizer as _, ParamsAdamW};

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

/// AdamW over one network's parameters.
pub struct Optimizer {
    vars: Vec<Var>,
    adam: AdamW,
    max_grad_norm: f64,
}

impl Optimizer {
    /// For these parameters. Gradients of a global norm above `max_grad_norm` are scaled down to it.
    pub fn new(
        parameters: &[(String, Var)],
        weight_decay: f64,
        max_grad_norm: f64,
    ) -> Result<Self> {
        let vars: Vec<Var> = parameters.iter().map(|(_, var)| var.clone()).collect();
        let params = ParamsAdamW { weight_decay, ..ParamsAdamW::default() };
        Ok(Self { adam: AdamW::new(vars.clone(), params)?, vars, max_grad_norm })
    }

    /// The L2 norm of all gradients of this network together; not finite if any of them is not.
    pub fn grad_norm(&self, grads: &GradStore) -> Result<f64> {
        // Added up on the device: a wait for it, and not one a parameter.
        let mut squares = None;
        for grad in self.vars.iter().filter_map(|var| grads.get(var)) {
            let more = sum_of_squares(grad)?;
            squares = Some(match squares {
                Some(squares) => (squares + more)?,
                None => more,
            });
        }
        let squares = squares.map_or(Ok(0.0), |squares: Tensor| squares.to_scalar::<f64>())?;
        Ok(squares.sqrt())
    }

    /// Clips by `norm`, the [`Self::grad_norm`] of the same gradients, and takes one step. Parameters
    /// without a gradient stay as they are.
    ///
    /// # Errors
    /// If the norm is not finite; nothing is changed then.
    pub fn apply(&mut self, grads: &mut GradStore, norm: f64, learning_rate: f64) -> Result<()> {
        ensure!(norm.is_finite(), "a gradient of norm {norm} cannot be applied");
        if norm > self.max_grad_norm {
            let scale = self.max_grad_norm / norm;
            for var in &self.vars {
                if let Some(grad) = grads.remove(var) {
                    grads.insert(var, (grad * scale)?);
                }
            }
        }
        self.adam.set_learning_rate(learning_rate);
        Ok(self.adam.step(grads)?)
    }
}

/// Rows in f32, their sums in f64: an embedding has too many elements for one f32 sum.
fn sum_of_squares(grad: &Tensor) -> candle_core::Result<Tensor> {
    let rows = match grad.rank() {
        0 => grad.sqr()?,
        rank => grad.sqr()?.sum(rank - 1)?,
    };
    rows.to_dtype(DType::F64)?.sum_all()
}
