//! Masked whitening: advantages (or rewards) brought to mean 0 and variance 1.
//!
//! ```text
//! mean = Σ m x / n      var = Σ m (x - mean)² / (n - 1)      n = Σ m
//! y    = (x - mean) / sqrt(var + eps)
//! ```
//!
//! `x` is f32 of any shape, the mask u8 of the same shape (0 = masked); mean and variance are taken
//! over all unmasked elements. [`WhitenOptions`] has the variants of the field: biased variance
//! (OpenRLHF, MOSS, lm-human-preferences), the mean added back (TRL's `shift_mean=False`, for
//! rewards), `eps` added to the standard deviation (CleanRL).
//!
//! Masked elements are not looked at, may hold NaN, and come out as 0 with gradient 0. A NaN or an
//! infinity that is not masked makes every element NaN. Fewer unmasked elements than the variance
//! needs (2 when unbiased, else 1) are an [`Error::Mask`].
//!
//! The gradient goes through mean and variance. To whiten with statistics of more than one tensor
//! (shards, data parallelism), take [`Moments`] out, [`Moments::merge`] them, and whiten with the
//! result, which then is a constant to the gradient. Between tensor functions the moments stay on the
//! device, as a `MomentsTensor`.
//!
//! Traffic with a mask, bytes per element: moments 5 read; whitening 5 read, 4 written; backward 18
//! read (x, mask and the gradient twice), 4 written.

#[cfg(feature = "capi")]
#[allow(missing_docs, clippy::missing_safety_doc)]
pub mod capi;
pub mod cpu;
pub mod cuda;
pub mod reference;
#[cfg(feature = "candle")]
mod tensor;
#[cfg(feature = "candle")]
pub use tensor::{masked_moments, masked_whiten, masked_whiten_with};

use crate::error::{Error, Result};
use crate::memory::list;
use crate::moments::Moments;

const OP: &str = "whiten";

/// The place where `eps` keeps the divisor from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EpsPlacement {
    /// Divide by `sqrt(var + eps)` (TRL, verl, NeMo, OpenRLHF, lm-human-preferences).
    #[default]
    Variance,
    /// Divide by `sqrt(var) + eps` (CleanRL).
    Std,
}

/// How to whiten; the default is what TRL and verl do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WhitenOptions {
    /// Keeps the divisor from 0: at least [`f32::MIN_POSITIVE`], or 0, with which equal elements come
    /// out as NaN. Default 1e-8.
    pub eps: f64,
    /// The place where `eps` is added. Default the variance.
    pub eps_placement: EpsPlacement,
    /// Divide the sum of squares by n - 1 rather than n. Default true.
    pub unbiased: bool,
    /// Let the result have mean 0; if false, the mean is added back after scaling. Default true.
    pub shift_mean: bool,
}

impl Default for WhitenOptions {
    fn default() -> Self {
        WhitenOptions {
            eps: 1e-8,
            eps_placement: EpsPlacement::Variance,
            unbiased: true,
            shift_mean: true,
        }
    }
}

impl WhitenOptions {
    pub(crate) fn validate(&self) -> Result<()> {
        let valid = self.eps == 0.0 || self.eps >= f64::from(f32::MIN_POSITIVE);
        Error::check_option(OP, "eps", self.eps, valid, "0 or a finite number above 1.2e-38")
    }

    /// The divisor of the sum of squares, which is at least 1; else an error that names `arg`,
    /// which the moments are of.
    fn divisor(&self, arg: &'static str, moments: &Moments) -> Result<f64> {
        let expected = if self.unbiased { 2 } else { 1 };
        let got = moments.count as usize;
        if got < expected {
            return Err(Error::Mask { op: OP, arg, expected, got });
        }
        Ok(moments.count - f64::from(u8::from(self.unbiased)))
    }
}

list! {
    /// Elements to take moments of, in some memory.
    inputs MomentsInputs(shape: &[usize]) {
        /// The elements, `[elements]`.
        x: f32 [shape],
    } optional {
        /// 0 where masked, `[elements]`.
        mask: u8 [shape],
    }
}

list! {
    /// The moments, in some memory.
    outputs MomentsOutputs(_: ()) {
        /// Count, mean and sum of squared deviations, `[1]`.
        moments: Moments [&[1]],
    }
}

list! {
    /// Elements to whiten, in some memory.
    inputs Inputs(shape: &[usize]) {
        /// The elements, `[elements]`.
        x: f32 [shape],
    } optional {
        /// 0 where masked, `[elements]`.
        mask: u8 [shape],
        /// The moments to whiten with, `[1]`: those of `x`, or of a larger set. Left out only where a
        /// CUDA pass has them from the host.
        moments: Moments [&[1]],
    }
}

list! {
    /// The whitened elements, in some memory.
    outputs Outputs(shape: &[usize]) {
        /// The whitened elements, `[elements]`, 0 where masked. On a device it may be the memory of `x`.
        y: f32 [shape] over ["x"],
    }
}

list! {
    /// The inputs of the gradient through the moments, in some memory.
    inputs OwnBackwardInputs(shape: &[usize]) {
        /// The elements, `[elements]`.
        x: f32 [shape],
        /// The upstream gradient, `[elements]`.
        grad_y: f32 [shape],
    } optional {
        /// 0 where masked, `[elements]`.
        mask: u8 [shape],
        /// The moments of `x`, `[1]`. Left out only where a CUDA pass has them from the host.
        moments: Moments [&[1]],
    }
}

list! {
    /// The inputs of the gradient with constant moments, in some memory.
    inputs WithBackwardInputs(shape: &[usize]) {
        /// The upstream gradient, `[elements]`.
        grad_y: f32 [shape],
    } optional {
        /// 0 where masked, `[elements]`.
        mask: u8 [shape],
        /// The moments that were whitened with, `[1]`. Left out only where a CUDA pass has them from
        /// the host.
        moments: Moments [&[1]],
    }
}

list! {
    /// The gradient, in some memory; of both backward passes.
    outputs GradOutputs(shape: &[usize]) {
        /// The gradient with respect to `x`, `[elements]`, 0 where masked. On a device it may be the
        /// memory of `grad_y`.
        grad_x: f32 [shape] over ["grad_y"],
    }
}
