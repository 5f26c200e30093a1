//! Whitening in plain f64 loops. Where the variance is undefined the result is NaN.

use super::{EpsPlacement, WhitenOptions};
use crate::moments::Moments;

/// Count, mean and sum of squared deviations of the unmasked elements, in two passes.
pub fn masked_moments(x: &[f64], mask: Option<&[u8]>) -> Moments {
    let kept: Vec<f64> = (0..x.len()).filter(|&i| keeps(mask, i)).map(|i| x[i]).collect();
    if kept.is_empty() {
        return Moments::default();
    }
    let mean = kept.iter().sum::<f64>() / kept.len() as f64;
    let m2 = kept.iter().map(|v| (v - mean).powi(2)).sum();
    Moments { count: kept.len() as f64, mean, m2 }
}

/// Whitens `x` with its own moments.
pub fn masked_whiten(x: &[f64], mask: Option<&[u8]>, options: &WhitenOptions) -> Vec<f64> {
    masked_whiten_with(x, mask, &masked_moments(x, mask), options)
}

/// Whitens `x` with the given moments.
pub fn masked_whiten_with(
    x: &[f64],
    mask: Option<&[u8]>,
    moments: &Moments,
    options: &WhitenOptions,
) -> Vec<f64> {
    let mean = moments.mean;
    let inv = inverse(moments, options);
    let back = if options.shift_mean { 0.0 } else { mean };
    let whiten = |i: usize| (x[i] - mean) * inv + back;
    (0..x.len()).map(|i| if keeps(mask, i) { whiten(i) } else { 0.0 }).collect()
}

/// The gradient of [`masked_whiten`]: with d_i = x_i - mean and inv = 1 / divisor,
///
/// ```text
/// ∂L/∂x_j = inv (g_j - Σ g / n) + (Σ g d) ∂inv/∂var 2 d_j / (n - 1)  [+ Σ g / n]
/// ```
///
/// where the last term is there if the mean is added back. Where all elements are equal the middle
/// term is 0 times something that can be infinite; it counts as 0.
pub fn masked_whiten_backward(
    x: &[f64],
    mask: Option<&[u8]>,
    grad_y: &[f64],
    options: &WhitenOptions,
) -> Vec<f64> {
    let moments = masked_moments(x, mask);
    let inv = inverse(&moments, options);
    let variance = moments.variance(options.unbiased);
    let n = moments.count;
    let divisor = if options.unbiased { n - 1.0 } else { n };

    let (mut sum_g, mut sum_gd) = (0.0, 0.0);
    for i in (0..x.len()).filter(|&i| keeps(mask, i)) {
        sum_g += grad_y[i];
        sum_gd += grad_y[i] * (x[i] - moments.mean);
    }
    let d_inv_d_var = match options.eps_placement {
        _ if variance == 0.0 => 0.0,
        EpsPlacement::Variance => -0.5 * inv.powi(3),
        EpsPlacement::Std => -0.5 * inv.powi(2) / variance.sqrt(),
    };
    let back = if options.shift_mean { 0.0 } else { sum_g / n };
    let gradient = |i: usize| {
        let d_var_d_x = 2.0 * (x[i] - moments.mean) / divisor;
        inv * (grad_y[i] - sum_g / n) + sum_gd * d_inv_d_var * d_var_d_x + back
    };
    (0..x.len()).map(|i| if keeps(mask, i) { gradient(i) } else { 0.0 }).collect()
}

/// The gradient of [`masked_whiten_with`], to which the moments are constants.
pub fn masked_whiten_with_backward(
    mask: Option<&[u8]>,
    moments: &Moments,
    grad_y: &[f64],
    options: &WhitenOptions,
) -> Vec<f64> {
    let inv = inverse(moments, options);
    let gradient = |i: usize| inv * grad_y[i];
    (0..grad_y.len()).map(|i| if keeps(mask, i) { gradient(i) } else { 0.0 }).collect()
}

fn inverse(moments: &Moments, options: &WhitenOptions) -> f64 {
    let variance = moments.variance(options.unbiased);
    let eps = options.eps;
    match options.eps_placement {
        EpsPlacement::Variance => 1.0 / (variance + eps).sqrt(),
        EpsPlacement::Std => 1.0 / (variance.sqrt() + eps),
    }
}

fn keeps(mask: Option<&[u8]>, i: usize) -> bool {
    mask.is_none_or(|mask| mask[i] != 0)
}
