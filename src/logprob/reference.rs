//! The oracle: plain f64 loops, one row at a time, checked by eye against the formulas of
//! [the op](super).

use super::LogprobOptions;

/// Log-probability of the target and entropy of each row.
///
/// `logits` is `[N, vocab]`, `targets` is `[N]` with ids in `0..vocab` or `ignore_index`.
///
/// # Panics
/// If a target is outside the vocabulary and is not `ignore_index`.
pub fn forward(
    logits: &[f64],
    targets: &[i64],
    vocab: usize,
    options: &LogprobOptions,
) -> (Vec<f64>, Vec<f64>) {
    let (mut logps, mut entropies) = (Vec::new(), Vec::new());
    for (row, &target) in targets.iter().enumerate() {
        if options.ignore_index == Some(target) {
            logps.push(0.0);
            entropies.push(0.0);
            continue;
        }
        let ln_p = log_softmax(&logits[row * vocab..][..vocab], options);
        logps.push(ln_p[target as usize]);
        entropies.push(entropy(&ln_p));
    }
    (logps, entropies)
}

/// Gradient with respect to the logits, from the upstream gradients of both outputs.
///
/// # Panics
/// If a target is outside the vocabulary and is not `ignore_index`.
pub fn backward(
    logits: &[f64],
    targets: &[i64],
    vocab: usize,
    options: &LogprobOptions,
    grad_logp: &[f64],
    grad_entropy: &[f64],
) -> Vec<f64> {
    let temperature = options.temperature;
    let mut grad = vec![0.0; logits.len()];
    for (row, &target) in targets.iter().enumerate() {
        let unused = grad_logp[row] == 0.0 && grad_entropy[row] == 0.0;
        if unused || options.ignore_index == Some(target) {
            continue;
        }
        let ln_p = log_softmax(&logits[row * vocab..][..vocab], options);
        let h = entropy(&ln_p);
        for (j, &l) in ln_p.iter().enumerate() {
            let p = l.exp();
            // 1 - p of a likely target would lose its digits.
            let dlogp = if j == target as usize { -l.exp_m1() } else { -p };
            // p ln p is 0 at p = 0, though ln p is -inf.
            let dh = if p == 0.0 { 0.0 } else { -p * (l + h) };
            grad[row * vocab + j] = (grad_logp[row] * dlogp + grad_entropy[row] * dh) / temperature;
        }
    }
    grad
}

/// ln p of every column of one row; all NaN if the row has NaN or +inf, or is -inf throughout.
fn log_softmax(row: &[f64], options: &LogprobOptions) -> Vec<f64> {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if !max.is_finite() {
        return vec![f64::NAN; row.len()];
    }
    let x = |z: &f64| (z - max) / options.temperature;
    // Without one of the largest: beside its 1 the others may be rounded away.
    let first = row.iter().position(|&z| z == max);
    let others = row.iter().enumerate().filter(|&(j, _)| Some(j) != first);
    let log_sum = others.map(|(_, z)| x(z).exp()).sum::<f64>().ln_1p();
    row.iter().map(|z| x(z) - log_sum).collect()
}

fn entropy(ln_p: &[f64]) -> f64 {
    // p ln p is 0 at p = 0, though ln p is -inf.
    let term = |&l: &f64| if l == f64::NEG_INFINITY { 0.0 } else { -l.exp() * l };
    ln_p.iter().map(term).sum()
}
