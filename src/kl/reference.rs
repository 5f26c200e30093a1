//! The KL divergences in plain f64 loops, to be checked by eye. See [`super`] for the formulas.

use super::{FullKlOptions, KlEstimator, KlOptions};

/// The sampled KL of one token and its derivative, both by d = logp - ref_logp.
pub fn token(d: f64, options: &KlOptions) -> (f64, f64) {
    let (d, d_clamped) = clamp(d, options.log_ratio_clamp);
    let k2 = 0.5 * d * d;
    // Of d = -inf the exponential is the larger one.
    let k3 = if d == f64::NEG_INFINITY { f64::INFINITY } else { (-d).exp_m1() + d };
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

/// The KL of (p, 1 - p) from (q, 1 - q), from the logarithms of p and q.
pub fn binary_kl(log_p: f64, log_q: f64) -> f64 {
    // From 0, so that nothing is not -0.
    let (p, rest_p, rest_q) = (log_p.exp(), 0.0 - log_p.exp_m1(), 0.0 - log_q.exp_m1());
    let of_p = if p == 0.0 { 0.0 } else { p * (log_p - log_q) };
    let of_rest = if rest_p > 0.0 { rest_p * (rest_p / rest_q).ln() } else { 0.0 };
    of_p + of_rest
}

/// The sampled KL of every token; 0 where `mask` is 0.
pub fn token_kl(
    logp: &[f64],
    ref_logp: &[f64],
    mask: Option<&[u8]>,
    options: &KlOptions,
) -> Vec<f64> {
    (0..logp.len())
        .map(|t| match keeps(mask, t) {
            true => token(logp[t] - ref_logp[t], options).0,
            false => 0.0,
        })
        .collect()
}

/// The gradients of `token_kl` to `logp` and `ref_logp`, for the upstream gradient `grad`. A token
/// with upstream gradient 0 has gradient 0 whatever it holds.
pub fn token_kl_backward(
    logp: &[f64],
    ref_logp: &[f64],
    mask: Option<&[u8]>,
    grad: &[f64],
    options: &KlOptions,
) -> (Vec<f64>, Vec<f64>) {
    (0..logp.len())
        .map(|t| match keeps(mask, t) && grad[t] != 0.0 {
            true => grad[t] * token(logp[t] - ref_logp[t], options).1,
            false => 0.0,
        })
        .map(|g| (g, -g))
        .unzip()
}

/// The exact KL of every row of `vocab` logits; 0 where the row's `mask` is 0.
pub fn full_kl(
    logits: &[f64],
    ref_logits: &[f64],
    vocab: usize,
    mask: Option<&[u8]>,
    options: &FullKlOptions,
) -> Vec<f64> {
    let rows = logits.chunks_exact(vocab).zip(ref_logits.chunks_exact(vocab));
    rows.enumerate()
        .map(|(n, (z, w))| {
            if !keeps(mask, n) {
                return 0.0;
            }
            let (z, w) = options.order(z, w);
            let ln_p = log_softmax(z, options.temperature);
            let ln_q = log_softmax(w, options.temperature);
            divergence(&ln_p, &ln_q)
        })
        .collect()
}

/// The gradients of `full_kl` to `logits` and `ref_logits`, for the upstream gradient `grad` of
/// each row. A row with upstream gradient 0 has gradient 0 whatever it holds.
pub fn full_kl_backward(
    logits: &[f64],
    ref_logits: &[f64],
    vocab: usize,
    mask: Option<&[u8]>,
    grad: &[f64],
    options: &FullKlOptions,
) -> (Vec<f64>, Vec<f64>) {
    let mut grad_z = vec![0.0; logits.len()];
    let mut grad_w = vec![0.0; logits.len()];
    let (z, w) = options.order(logits, ref_logits);
    for (n, &g) in grad.iter().enumerate() {
        if !keeps(mask, n) || g == 0.0 {
            continue;
        }
        let row = n * vocab..(n + 1) * vocab;
        let g = g / options.temperature;
        let ln_p = log_softmax(&z[row.clone()], options.temperature);
        let ln_q = log_softmax(&w[row.clone()], options.temperature);
        let kl = divergence(&ln_p, &ln_q);
        for (i, (&a, &b)) in row.zip(ln_p.iter().zip(&ln_q)) {
            grad_z[i] = if kl == f64::INFINITY { f64::NAN } else { g * a.exp() * (a - b - kl) };
            if a == f64::NEG_INFINITY && !kl.is_nan() {
                grad_z[i] = 0.0;
            }
            grad_w[i] = if kl.is_nan() { f64::NAN } else { g * (b.exp() - a.exp()) };
        }
    }
    options.order(grad_z, grad_w)
}

/// sum p (ln p - ln q), with no term where p = 0.
fn divergence(ln_p: &[f64], ln_q: &[f64]) -> f64 {
    if ln_q.iter().any(|b| b.is_nan()) {
        return f64::NAN;
    }
    let term = |(&a, &b): (&f64, &f64)| match (a, b) {
        (f64::NEG_INFINITY, _) => 0.0,
        (a, f64::NEG_INFINITY) if !a.is_nan() => f64::INFINITY,
        (a, b) => a.exp() * (a - b),
    };
    ln_p.iter().zip(ln_q).map(term).sum()
}

/// ln softmax(z/temperature): NaN throughout for NaN, +inf or nothing but -inf in `z`.
fn log_softmax(z: &[f64], temperature: f64) -> Vec<f64> {
    let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let x = z.iter().map(|&z| (z - max) / temperature);
    let x: Vec<f64> = x.collect();
    let log_sum = x.iter().map(|x| x.exp()).sum::<f64>().ln();
    x.iter().map(|x| x - log_sum).collect()
}

/// Whether item `i` counts.
fn keeps(mask: Option<&[u8]>, i: usize) -> bool {
    mask.is_none_or(|mask| mask[i] != 0)
}

/// `x` within ± the limit, and whether that changed it. NaN stays NaN.
pub(crate) fn clamp(x: f64, limit: Option<f64>) -> (f64, bool) {
    match limit {
        Some(limit) if x.abs() > limit => (limit.copysign(x), true),
        _ => (x, false),
    }
}
