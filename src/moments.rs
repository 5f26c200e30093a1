//! Count, mean and sum of squared deviations, which several ops make and read.

pub(crate) mod cpu;
pub(crate) mod cuda;
#[cfg(feature = "candle")]
mod tensor;

use bytemuck::{Pod, Zeroable};

use crate::memory::Element;
#[cfg(feature = "candle")]
pub use tensor::MomentsTensor;

/// Count, mean and sum of squared deviations of a set of numbers; sets can be merged.
#[derive(Debug, Clone, Copy, PartialEq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct Moments {
    /// How many numbers: a whole number, exact up to 2^53.
    pub count: f64,
    /// Their mean; 0 for none.
    pub mean: f64,
    /// The sum of (x - mean)^2.
    pub m2: f64,
}

impl Element for Moments {
    type Wide = Moments;
    #[cfg(feature = "candle")]
    type Number = f64;
}

impl Moments {
    /// The moments of both sets together (Chan, Golub, LeVeque 1979).
    #[must_use]
    pub fn merge(self, other: Moments) -> Moments {
        if self.count == 0.0 || other.count == 0.0 {
            return if self.count == 0.0 { other } else { self };
        }
        let count = self.count + other.count;
        let delta = other.mean - self.mean;
        let share = other.count / count;
        Moments {
            count,
            mean: self.mean + delta * share,
            m2: self.m2 + other.m2 + delta * delta * self.count * share,
        }
    }

    /// The variance, dividing by n - 1 if `unbiased`, else by n; NaN where that is undefined.
    pub fn variance(&self, unbiased: bool) -> f64 {
        let divisor = self.count - f64::from(u8::from(unbiased));
        if divisor <= 0.0 {
            return f64::NAN;
        }
        self.m2 / divisor
    }

    /// The square root of [`Moments::variance`].
    pub fn std(&self, unbiased: bool) -> f64 {
        self.variance(unbiased).sqrt()
    }
}

/// Mean and standard deviation of all scores seen so far, batch after batch, as TRL and trlx keep
/// them to scale the scores of a reward model.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RunningMoments {
    moments: Moments,
}

impl RunningMoments {
    /// Nothing seen yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Goes on from saved moments, for a run that is resumed.
    pub fn resume(moments: Moments) -> Self {
        RunningMoments { moments }
    }

    /// Takes a batch of scores in, and returns the moments of that batch alone.
    pub fn update(&mut self, scores: &[f32]) -> Moments {
        let batch = cpu::moments(scores, None);
        self.moments = self.moments.merge(batch);
        batch
    }

    /// The moments of all scores so far.
    pub fn moments(&self) -> Moments {
        self.moments
    }

    /// The mean of all scores so far; 0 before the first.
    pub fn mean(&self) -> f64 {
        self.moments.mean
    }

    /// The unbiased standard deviation of all scores so far; 1 before the second, so that dividing
    /// by it does nothing.
    pub fn std(&self) -> f64 {
        if self.moments.count < 2.0 {
            return 1.0;
        }
        self.moments.std(true)
    }
}
