//! The KL coefficient over the run: constant, or the adaptive controller of Ziegler et al. 2019
//! (arXiv 1909.08593, section 2.2), which raises the coefficient while the KL is above its target
//! and lowers it while it is below:
//!
//! e = clip(kl / target - 1, ±0.2), coef <- coef (1 + e n / horizon), n = episodes of the step.

/// Holds the KL coefficient and moves it after each step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum KlController {
    /// The coefficient stays what it is.
    Constant {
        /// The KL coefficient.
        coef: f64,
    },
    /// The coefficient follows the measured KL.
    Adaptive {
        /// The KL coefficient now.
        coef: f64,
        /// The wanted KL, in nats a sequence.
        target: f64,
        /// Episodes over which the full correction would be made; larger is slower.
        horizon: f64,
    },
}

impl KlController {
    /// The share of the target beyond which a larger error counts no more.
    const MAX_ERROR: f64 = 0.2;

    /// The KL coefficient of the coming step.
    pub fn coef(&self) -> f64 {
        match *self {
            Self::Constant { coef } | Self::Adaptive { coef, .. } => coef,
        }
    }

    /// Goes on with this coefficient. A constant one stays what it is.
    pub fn resume(&mut self, saved: f64) {
        if let Self::Adaptive { coef, .. } = self {
            *coef = saved;
        }
    }

    /// Takes in the mean KL of a step's sequences (nats, summed over tokens) and how many there
    /// were. A KL that is not finite leaves the coefficient as it is.
    pub fn update(&mut self, kl: f64, episodes: usize) {
        if let Self::Adaptive { coef, target, horizon } = self {
            if kl.is_finite() {
                let error = (kl / *target - 1.0).clamp(-Self::MAX_ERROR, Self::MAX_ERROR);
                *coef *= 1.0 + error * episodes as f64 / *horizon;
            }
        }
    }
}
