//! The KL divergences in plain f64 loops, to be checked by eye. See [`super`] for the formulas.

use super::{Divergence, FullKlOptions, KlEstimator, KlOptions, Mixture};

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

/// The exact KL, or another divergence, of every row of `vocab` logits; 0 where the row's `mask` is 0.
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
            if options.divergence == Divergence::TotalVariation {
                return total_variation(&ln_p, &ln_q);
            }
            match options.mixture() {
                None => divergence(&ln_p, &ln_q),
                Some(of) => {
                    let ln_m = ln_mixture(&of, &ln_p, &ln_q);
                    of.coef_z * divergence(&ln_p, &ln_m) + of.coef_w * divergence(&ln_q, &ln_m)
                }
            }
        })
        .collect()
}

/// ln(a p + (1 - a) q).
fn ln_mixture(of: &Mixture, ln_p: &[f64], ln_q: &[f64]) -> Vec<f64> {
    let ln_m = |(a, b): (&f64, &f64)| {
        let (a, b) = (a + of.share.ln(), b + (1.0 - of.share).ln());
        // Not from the probabilities, which may be less than f64 has.
        match a.max(b) {
            f64::NEG_INFINITY => f64::NEG_INFINITY,
            larger => larger + ((a - larger).exp() + (b - larger).exp()).ln(),
        }
    };
    ln_p.iter().zip(ln_q).map(ln_m).collect()
}

/// 1 - sum min(p, q), as the sum of what p is above q.
fn total_variation(ln_p: &[f64], ln_q: &[f64]) -> f64 {
    let above = |(a, b): (&f64, &f64)| {
        let above = a.exp() - b.exp();
        if above < 0.0 {
            0.0
        } else {
            above
        }
    };
    ln_p.iter().zip(ln_q).map(above).sum()
}

/// The slopes that dD/dz and dD/dw are made of at every column, where D is to a mixture or the total
/// variation: p (h - sum p h) and q (h - sum q h) are the gradients for a temperature of 1.
fn slopes(options: &FullKlOptions, ln_p: &[f64], ln_q: &[f64]) -> [Vec<f64>; 2] {
    let pairs = ln_p.iter().zip(ln_q);
    let Some(Mixture { share: a, coef_z, coef_w }) = options.mixture() else {
        let is_below = |below: bool| if below { -1.0 } else { 0.0 };
        return [
            pairs.clone().map(|(p, q)| is_below(p <= q)).collect(),
            pairs.map(|(p, q)| is_below(q < p)).collect(),
        ];
    };
    // d/dp of c_p p ln(p/m) + c_q q ln(q/m), with dm/dp = a; and by q.
    let by_one = |[ln_p, ln_q]: [f64; 2], a: f64, [coef_p, coef_q]: [f64; 2]| {
        let (p, q) = (ln_p.exp(), ln_q.exp());
        let m = a * p + (1.0 - a) * q;
        if p == 0.0 {
            0.0
        } else {
            coef_p * ((p / m).ln() + 1.0 - a * p / m) - coef_q * a * q / m
        }
    };
    [
        pairs.clone().map(|(&p, &q)| by_one([p, q], a, [coef_z, coef_w])).collect(),
        pairs.map(|(&p, &q)| by_one([q, p], 1.0 - a, [coef_w, coef_z])).collect(),
    ]
}

/// p (h - sum p h).
fn through_softmax(ln_p: &[f64], h: &[f64]) -> Vec<f64> {
    let mean: f64 = ln_p.iter().zip(h).map(|(p, h)| p.exp() * h).sum();
    ln_p.iter().zip(h).map(|(p, h)| p.exp() * (h - mean)).collect()
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
        if !options.is_kl() {
            let [h_z, h_w] = slopes(options, &ln_p, &ln_q);
            // A NaN in either is one in both.
            let nan = if ln_p.iter().chain(&ln_q).any(|x| x.is_nan()) { f64::NAN } else { 0.0 };
            for (grads, ln, h) in [(&mut grad_z, &ln_p, &h_z), (&mut grad_w, &ln_q, &h_w)] {
                let of_row = through_softmax(ln, h);
                for (to, from) in grads[row.clone()].iter_mut().zip(of_row) {
                    *to = g * from + nan;
                }
            }
            continue;
        }
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
