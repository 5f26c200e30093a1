//! What f32 results may differ from the f64 references by. The tests, `ppo-kernels check` and the benches
//! read this one table.
//!
//! An element passes if |computed - reference| <= abs + rel |reference|; NaN must meet NaN, and an
//! infinity itself. The rounding of f32 is u = 6e-8, and the numbers allow for these errors:
//!
//! - `logprob` and the exact KL, forward: x = (z - max) / temperature is rounded three times, and ln of a
//!   sum of exps, each good to 2 ulp, is taken from it: 2e-6 is 32 u of either. For a likely token, and
//!   for entropy and KL, numbers of magnitude 10 cancel: 100 u.
//! - The same, backward: x, of magnitude up to 60, is good to 60 u, which exp makes a relative error of
//!   p: 8e-6. The terms of a gradient, of magnitude up to 5, may cancel.
//! - The sampled KL: the error of e^-d, and of differences of numbers of magnitude 1 to 10.
//! - `gae`: some roundings of each delta, of magnitude up to 10, add up over the 1 / (1 - γ λ) steps
//!   that a discounted sum sees, or over the whole row where γ λ = 1.
//! - `advantages`: all is in f64, and one result rounded to f32: 2 u.
//! - The optimal token baseline: weights good to 8 u, by which the baseline is a mean of returns, of magnitude up
//!   to 20; the sums are in f64.
//! - `whiten`: mean and variance are merged in f64, so what remains are some roundings of values of
//!   magnitude up to 5; the gradient is a difference of three such terms.
//! - `correction`: exp of a log-ratio of magnitude up to 20, good to its rounding, 10 u; what is summed over
//!   a row is in f64, but for metrics, of which each is good to some u of its terms.
//! - `ppo_loss`: exp, and products of few factors; terms of opposite sign are added up.
//! - `preference`: sums are in f64, so what remains is the rounding of a score of magnitude up to 20, which
//!   an exponential makes a relative error of its result, and that of a few products.

/// The bound of an element's error: abs + rel |reference|.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// The absolute part.
    pub abs: f64,
    /// The relative part.
    pub rel: f64,
}

impl Tolerance {
    const fn new(abs: f64, rel: f64) -> Self {
        Self { abs, rel }
    }

    /// The tolerance of a result that is rounded once more, to f16: 11 bits, and half of its smallest
    /// number.
    pub fn rounded_to_f16(self) -> Self {
        Self { abs: self.abs + 2f64.powi(-25), rel: self.rel + 2f64.powi(-11) }
    }

    /// The tolerance of a result that is rounded once more, to bf16: 8 bits.
    pub fn rounded_to_bf16(self) -> Self {
        Self { rel: self.rel + 2f64.powi(-8), ..self }
    }
}

/// The tolerances of an op.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerances {
    /// Outputs in the tests, whose inputs are of moderate size, and gradients there.
    pub tests: Tolerance,
    /// Outputs of what `check` draws: peaked logits, vocabularies of 150 thousand, random options.
    pub forward: Tolerance,
    /// Gradients of the same, for upstream gradients of magnitude 1.
    pub backward: Tolerance,
    /// The tolerance of the benches, against candle's own f32 arithmetic.
    pub benches: Tolerance,
}

/// Tolerances of `logprob`.
pub const LOGPROB: Tolerances = Tolerances {
    tests: Tolerance::new(4e-6, 2e-6),
    forward: Tolerance::new(6e-6, 2e-6),
    backward: Tolerance::new(2e-6, 8e-6),
    benches: Tolerance::new(2e-5, 2e-5),
};

/// Tolerances of `linear`: those of `logprob`, and the products' sums of hundreds of terms of magnitude 1.
pub const LINEAR: Tolerances = Tolerances {
    tests: Tolerance::new(6e-6, 2e-6),
    forward: Tolerance::new(1e-5, 2e-6),
    backward: Tolerance::new(2e-5, 1e-5),
    benches: Tolerance::new(2e-5, 2e-5),
};

/// Tolerances of the KL estimated from samples.
pub const TOKEN_KL: Tolerances = Tolerances {
    tests: Tolerance::new(1e-6, 3e-6),
    forward: Tolerance::new(1e-6, 1e-6),
    backward: Tolerance::new(1e-6, 1e-6),
    benches: Tolerance::new(5e-5, 5e-5),
};

/// Tolerances of the exact KL.
pub const FULL_KL: Tolerances = Tolerances {
    tests: Tolerance::new(1e-6, 3e-6),
    forward: Tolerance::new(4e-6, 2e-6),
    backward: Tolerance::new(2e-6, 8e-6),
    benches: Tolerance::new(5e-5, 5e-5),
};

/// Tolerances of `gae`: advantages, returns and rewards.
pub const GAE: Tolerances = Tolerances {
    tests: Tolerance::new(2e-5, 1e-5),
    forward: Tolerance::new(2e-5, 1e-5),
    backward: Tolerance::new(2e-5, 1e-5),
    benches: Tolerance::new(1e-4, 1e-4),
};

/// Tolerances of `advantages`.
pub const ADVANTAGES: Tolerances = Tolerances {
    tests: Tolerance::new(1e-9, 1.2e-7),
    forward: Tolerance::new(1e-9, 1.2e-7),
    backward: Tolerance::new(1e-9, 1.2e-7),
    benches: Tolerance::new(1e-4, 1e-4),
};

/// Tolerances of the optimal token baseline, which [`advantages`](crate::advantages) has.
pub const TOKEN_BASELINE: Tolerances = Tolerances {
    tests: Tolerance::new(5e-6, 5e-7),
    forward: Tolerance::new(1e-5, 5e-7),
    backward: Tolerance::new(1e-5, 5e-7),
    benches: Tolerance::new(1e-4, 1e-4),
};

/// Tolerances of `whiten`.
pub const WHITEN: Tolerances = Tolerances {
    tests: Tolerance::new(1e-6, 1e-6),
    forward: Tolerance::new(1e-6, 1e-6),
    backward: Tolerance::new(1e-6, 1e-6),
    benches: Tolerance::new(1e-3, 1e-3),
};

/// Tolerances of `correction`: weights and statistics.
pub const CORRECTION: Tolerances = Tolerances {
    tests: Tolerance::new(1e-6, 2e-6),
    forward: Tolerance::new(2e-6, 4e-6),
    backward: Tolerance::new(2e-6, 4e-6),
    benches: Tolerance::new(1e-4, 1e-4),
};

/// Tolerances of `ppo_loss`: the loss, its statistics and its gradients.
pub const PPO_LOSS: Tolerances = Tolerances {
    tests: Tolerance::new(1e-6, 2e-6),
    forward: Tolerance::new(2e-6, 2e-6),
    backward: Tolerance::new(1e-6, 2e-6),
    benches: Tolerance::new(1e-4, 1e-4),
};

/// Tolerances of `preference`: the loss, rewards, statistics and gradients.
pub const PREFERENCE: Tolerances = Tolerances {
    tests: Tolerance::new(1e-6, 3e-6),
    forward: Tolerance::new(2e-6, 4e-6),
    backward: Tolerance::new(1e-6, 4e-6),
    benches: Tolerance::new(1e-4, 1e-4),
};

/// Tolerance of gradients in 16 bits in the benches, where candle rounds between its ops too.
pub const BENCHES_16_BITS: Tolerance = Tolerance::new(1e-2, 1e-2);
