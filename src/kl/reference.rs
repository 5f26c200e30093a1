//! The KL divergences in plain f64 loops, to be checked by eye. See [`super`] for the formulas.

use super::{KlEstimator, KlOptions};

/// The sampled KL of one token and its derivative, both by d = logp - ref_logp.
pub fn token(d: f64, options: &KlOptions) -> (f64, f64) {
    let (d, d_clamped) = clamp(d, options.log_ratio_clamp);
    let k2 = 0.5 * d * d;
    let k3 = (-d).exp_m1() + d;
    let (value, derivative) = match options.estimator {
        KlEstimator::K1 => (d, 1.0),
        KlEstimator::Abs if d == 0.0 => (0.0, 0.0),
        KlEstimator::Abs => (d.abs(), d.signum()),
        KlEstimator::K2 => (k2, d),
        KlEstimator::K3 => (k3, -(-d).exp_m1()),
        KlEstimator::K3StraightThrough => (k3, d),
    };
    let (value, value_clamped) = clamp(value, options.output_clamp);
    let flows = !d_clamped && !value_clamped;
    (value, if flows { derivative } else { 0.0 })
}

/// `x` within ± the limit, and whether that changed it. NaN stays NaN.
fn clamp(x: f64, limit: Option<f32>) -> (f64, bool) {
    match limit.map(f64::from) {
        Some(limit) if x.abs() > limit => (limit.copysign(x), true),
        _ => (x, false),
    }
}
