//! AdamW behind gradient clipping by global norm, and the learning rate over the run.
//!
//! The norm is a value of its own, so that the caller can look at it before anything is applied: a
//! step whose loss or norm is not finite must not touch the weights or the moments.

use anyhow::{ensure, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};

use super::checkpoint::{prefixed, Tensors};

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

/// AdamW over one network's parameters. candle's own keeps its moments to itself, and a run that goes on
/// from a checkpoint needs them.
pub struct Optimizer {
    vars: Vec<Var>,
    /// Running means of gradients, and of their squares, by the parameters' names.
    means: Vec<(String, Var)>,
    squares: Vec<(String, Var)>,
    steps: usize,
    weight_decay: f64,
    max_grad_norm: f64,
}

/// Decay rates of the running means, and what keeps the divisor above 0: PyTorch's defaults.
const BETA_MEAN: f64 = 0.9;
const BETA_SQUARE: f64 = 0.999;
const EPS: f64 = 1e-8;

impl Optimizer {
    /// An optimiser of these parameters. Gradients of a global norm above `max_grad_norm` are scaled down to it.
    pub fn new(
        parameters: &[(String, Var)],
        weight_decay: f64,
        max_grad_norm: f64,
    ) -> Result<Self> {
        let zeros = || -> Result<Vec<(String, Var)>> {
            let zero = |var: &Var| Var::zeros(var.shape(), var.dtype(), var.device());
            parameters.iter().map(|(name, var)| Ok((name.clone(), zero(var)?))).collect()
        };
        Ok(Self {
            vars: parameters.iter().map(|(_, var)| var.clone()).collect(),
            means: zeros()?,
            squares: zeros()?,
            steps: 0,
            weight_decay,
            max_grad_norm,
        })
    }

    /// Steps so far.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The moments, their names behind `prefix`.
    pub fn tensors(&self, prefix: &str) -> Vec<(String, Tensor)> {
        let [mean, square] = Self::prefixes(prefix);
        prefixed(&mean, &self.means).chain(prefixed(&square, &self.squares)).collect()
    }

    /// Goes on from moments with such names after so many steps.
    ///
    /// # Errors
    /// If one is missing or of another shape.
    pub fn restore(&mut self, prefix: &str, steps: usize, tensors: &Tensors) -> Result<()> {
        let [mean, square] = Self::prefixes(prefix);
        tensors.set(&mean, &self.means)?;
        tensors.set(&square, &self.squares)?;
        self.steps = steps;
        Ok(())
    }

    fn prefixes(prefix: &str) -> [String; 2] {
        ["mean", "square"].map(|moment| format!("{prefix}{moment}."))
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
        self.steps += 1;
        let corrections =
            [BETA_MEAN, BETA_SQUARE].map(|beta| 1.0 / (1.0 - beta.powi(self.steps as i32)));
        for (i, var) in self.vars.iter().enumerate() {
            let Some(grad) = grads.get(var) else {
                continue;
            };
            let (mean, square) = (&self.means[i].1, &self.squares[i].1);
            let next_mean = ((mean.as_tensor() * BETA_MEAN)? + (grad * (1.0 - BETA_MEAN))?)?;
            let next_square =
                ((square.as_tensor() * BETA_SQUARE)? + (grad.sqr()? * (1.0 - BETA_SQUARE))?)?;
            let root = ((&next_square * corrections[1])?.sqrt()? + EPS)?;
            let direction = ((&next_mean * corrections[0])? / root)?;
            let decayed = (var.as_tensor() * (1.0 - learning_rate * self.weight_decay))?;
            mean.set(&next_mean)?;
            square.set(&next_square)?;
            var.set(&(decayed - (direction * learning_rate)?)?)?;
        }
        Ok(())
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
