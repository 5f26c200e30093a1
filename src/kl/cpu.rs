//! The KL divergences on slices, fused and parallel. See [`super`] for the formulas.

use super::{KlEstimator, KlOptions};
use crate::cpu::math;

/// The sampled KL of one token: [`KlOptions`] with "no clamp" written as infinity, so that a loop
/// over tokens has no branch but the one on the estimator, which the compiler takes out of it.
#[derive(Clone, Copy)]
pub(crate) struct TokenKl {
    estimator: KlEstimator,
    log_ratio_limit: f32,
    output_limit: f32,
}

impl TokenKl {
    /// Of validated options.
    pub(crate) fn new(options: &KlOptions) -> Self {
        let limit = |clamp: Option<f64>| clamp.map_or(f32::INFINITY, |c| c as f32);
        Self {
            estimator: options.estimator,
            log_ratio_limit: limit(options.log_ratio_clamp),
            output_limit: limit(options.output_clamp),
        }
    }

    /// The value and its derivative by d = logp - ref_logp. Call it inside `vectorise`.
    #[inline(always)]
    pub(crate) fn at(self, d: f32) -> (f32, f32) {
        let (d, d_clamped) = clamp(d, self.log_ratio_limit);
        let (value, derivative) = match self.estimator {
            KlEstimator::K1 => (d, 1.0),
            KlEstimator::Abs => (d.abs(), sign(d)),
            KlEstimator::K2 => (0.5 * d * d, d),
            KlEstimator::K3 => k3(d),
            KlEstimator::K3StraightThrough => (k3(d).0, d),
        };
        let (value, value_clamped) = clamp(value, self.output_limit);
        let blocked = d_clamped | value_clamped;
        (value, if blocked { 0.0 } else { derivative })
    }
}

/// `x` within ± the limit, and whether that changed it. Comparisons, so that NaN stays NaN.
#[inline(always)]
fn clamp(x: f32, limit: f32) -> (f32, bool) {
    let above = x > limit;
    let below = x < -limit;
    let x = if above { limit } else { x };
    (if below { -limit } else { x }, above | below)
}

#[inline(always)]
fn sign(x: f32) -> f32 {
    if x == 0.0 {
        0.0
    } else {
        1.0_f32.copysign(x)
    }
}

/// e^-d - 1 + d and 1 - e^-d.
///
/// In PPO d is small, and there the three terms cancel: at d = 1e-3 the value is 5e-7, eight units
/// in the last place of 1. So below |d| = 1 it is summed as the series d²/2! - d³/3! + ...
#[inline(always)]
fn k3(d: f32) -> (f32, f32) {
    // Through d^12/12!, which is below half a unit in the last place of the sum.
    let series = 2.087_675_7e-9_f32;
    let series = series.mul_add(d, -2.505_210_8e-8);
    let series = series.mul_add(d, 2.755_731_9e-7);
    let series = series.mul_add(d, -2.755_731_9e-6);
    let series = series.mul_add(d, 2.480_158_7e-5);
    let series = series.mul_add(d, -1.984_127e-4);
    let series = series.mul_add(d, 1.388_888_9e-3);
    let series = series.mul_add(d, -8.333_333_3e-3);
    let series = series.mul_add(d, 4.166_666_7e-2);
    let series = series.mul_add(d, -1.666_666_7e-1);
    let series = series.mul_add(d, 0.5) * (d * d);

    let e = math::exp(-d);
    let small = d.abs() < 1.0;
    let value = if small { series } else { e - 1.0 + d };
    let derivative = if small { d - series } else { 1.0 - e };
    (value, derivative)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kl::reference;

    #[test]
    fn k3_is_accurate_however_small_the_log_ratio() {
        let options = KlOptions { estimator: KlEstimator::K3, ..KlOptions::default() };
        for i in -80_000..=80_000 {
            let d = i as f32 / 1000.0;
            for d in [d, d * 1e-3, d * 1e-7] {
                let (value, derivative) = TokenKl::new(&options).at(d);
                let (want, want_derivative) = reference::token(f64::from(d), &options);
                // exp is good for 2 ulp, 2.4e-7; next to |d| = 1 the sum costs as much again.
                let close =
                    |got: f32, want: f64| (f64::from(got) - want).abs() <= 5e-7 * want.abs();
                // At d = 1e-10 even the f64 reference has lost k3, which is 5e-21.
                if d.abs() > 1e-6 {
                    assert!(close(value, want), "d {d}: {value} {want}");
                }
                assert!(
                    close(derivative, want_derivative),
                    "d {d}: {derivative} {want_derivative}"
                );
            }
        }
    }
}
