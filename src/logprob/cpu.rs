//! The fused CPU implementation. Rows are shared out to threads; a row is walked once, in blocks
//! that stay in the L1 cache, with a running (maximum, sum, weighted sum).

use super::{LogprobOptions, OP};
use crate::cpu::math::{exp, max, sum_lanes, LANES};
use crate::cpu::{for_each, vectorise, Logit, Rows, RowsMut, TokenId};
use crate::error::{Error, Result};

/// Columns of a block: 8 KiB of f32, a quarter of the smallest L1 in use.
const BLOCK: usize = 2048;

/// Elements a thread takes at a time: some 10 us of work, far above the cost of handing it out.
const GRAIN: usize = 32 * 1024;

/// Logits of probability below e^-150 count as if at e^-150, which is 0 in f32: so that
/// p x is 0 and not 0 * inf.
const FLOOR: f32 = -150.0;

/// What the forward pass writes, one value a row.
pub struct Outputs<'a> {
    /// Log-probability of the target.
    pub logp: &'a mut [f32],
    /// Entropy of the row's distribution.
    pub entropy: Option<&'a mut [f32]>,
    /// What [`backward`] needs to know of the rows.
    pub stats: Option<RowStatsMut<'a>>,
}

/// Where the forward pass leaves what the backward pass needs.
pub struct RowStatsMut<'a> {
    /// The row's largest logit.
    pub max: &'a mut [f32],
    /// ln Σ e^{(z - max) / temperature}.
    pub log_sum: &'a mut [f32],
}

/// What the forward pass left.
#[derive(Clone, Copy)]
pub struct RowStats<'a> {
    /// The row's largest logit.
    pub max: &'a [f32],
    /// ln Σ e^{(z - max) / temperature}.
    pub log_sum: &'a [f32],
    /// The row's entropy; zeros will do where no gradient comes from it.
    pub entropy: &'a [f32],
}

/// Upstream gradients, one value a row; `None` stands for zeros.
#[derive(Clone, Copy)]
pub struct Upstream<'a> {
    /// With respect to the log-probabilities.
    pub logp: Option<&'a [f32]>,
    /// With respect to the entropies.
    pub entropy: Option<&'a [f32]>,
}

/// Log-probabilities of the targets, and the entropies if asked for, from `logits [N, vocab]` and
/// `targets [N]`. Reads the logits once.
///
/// # Errors
/// If a length does not fit, an option is out of range, or a target is outside the vocabulary.
/// Nothing is written then.
pub fn forward<T: Logit, I: TokenId>(
    logits: &[T],
    targets: &[I],
    vocab: usize,
    options: &LogprobOptions,
    outputs: Outputs,
) -> Result<()> {
    let rows = targets.len();
    validate(logits.len(), targets, vocab, options)?;
    let Outputs { logp, entropy, stats } = outputs;
    Error::check_len(OP, "logp", logp.len(), rows)?;
    if let Some(entropy) = &entropy {
        Error::check_len(OP, "entropy", entropy.len(), rows)?;
    }
    if let Some(stats) = &stats {
        Error::check_len(OP, "max", stats.max.len(), rows)?;
        Error::check_len(OP, "log_sum", stats.log_sum.len(), rows)?;
    }

    let logits = Rows { data: logits, width: vocab };
    let stats = stats.map(|stats| (stats.max, stats.log_sum));
    let scale = (1.0 / options.temperature) as f32;
    let items = (logits, targets, logp, entropy, stats);
    for_each(rows, GRAIN / vocab, items, |_, count, items| {
        let (logits, targets, logp, mut entropy, mut stats) = items;
        for row in 0..count {
            let target = targets[row].id();
            let ignored = options.ignore_index == Some(target);
            let z = logits.row(row);
            let (sums, lp) = if ignored {
                (Sums::NONE, 0.0)
            } else {
                let sums = if entropy.is_some() {
                    Sums::of_row::<T, true>(z, scale)
                } else {
                    Sums::of_row::<T, false>(z, scale)
                };
                let x = (z[target as usize].to_f32() - sums.max) * scale;
                (sums, x - sums.log_sum())
            };
            logp[row] = lp;
            if let Some(entropy) = &mut entropy {
                entropy[row] = if ignored { 0.0 } else { sums.entropy() };
            }
            if let Some((max, log_sum)) = &mut stats {
                max[row] = sums.max;
                log_sum[row] = sums.log_sum();
            }
        }
    });
    Ok(())
}

/// Gradient with respect to the logits, in their own type, from what [`forward`] left in `stats`.
/// Reads the logits once and writes `grad_logits [N, vocab]` once.
///
/// # Errors
/// As [`forward`].
pub fn backward<T: Logit, I: TokenId>(
    logits: &[T],
    targets: &[I],
    vocab: usize,
    options: &LogprobOptions,
    stats: RowStats,
    upstream: Upstream,
    grad_logits: &mut [T],
) -> Result<()> {
    let rows = targets.len();
    validate(logits.len(), targets, vocab, options)?;
    Error::check_len(OP, "max", stats.max.len(), rows)?;
    Error::check_len(OP, "log_sum", stats.log_sum.len(), rows)?;
    Error::check_len(OP, "entropy", stats.entropy.len(), rows)?;
    Error::check_len(OP, "grad_logp", upstream.logp.map_or(rows, <[f32]>::len), rows)?;
    Error::check_len(OP, "grad_entropy", upstream.entropy.map_or(rows, <[f32]>::len), rows)?;
    Error::check_len(OP, "grad_logits", grad_logits.len(), logits.len())?;

    let scale = (1.0 / options.temperature) as f32;
    let grads = RowsMut { data: grad_logits, width: vocab };
    for_each(rows, GRAIN / vocab, grads, |first, count, mut grads| {
        for i in 0..count {
            let row = first + i;
            let grad = grads.row(i);
            let g = upstream.logp.map_or(0.0, |g| g[row]) * scale;
            let h = upstream.entropy.map_or(0.0, |g| g[row]) * scale;
            let target = targets[row].id();
            if options.ignore_index == Some(target) || (g == 0.0 && h == 0.0) {
                grad.fill(T::ZERO);
                continue;
            }
            let slope = Slope {
                max: stats.max[row],
                scale,
                log_sum: stats.log_sum[row],
                entropy: stats.entropy[row],
                grad_logp: g,
                grad_entropy: h,
            };
            let z = &logits[row * vocab..][..vocab];
            slope.write_row(z, target as usize, grad);
        }
    });
    Ok(())
}

fn validate<I: TokenId>(
    logits: usize,
    targets: &[I],
    vocab: usize,
    options: &LogprobOptions,
) -> Result<()> {
    options.validate()?;
    let fits = vocab > 0 && targets.len().checked_mul(vocab) == Some(logits);
    if !fits {
        return Err(Error::Shape {
            op: OP,
            arg: "logits",
            expected: format!("[{}, {}]", targets.len(), vocab.max(1)),
            got: format!("[{logits}] for a vocabulary of {vocab}"),
        });
    }
    check_targets(targets, vocab, options)
}

/// `Ok` when every target is in the vocabulary or ignored.
pub(crate) fn check_targets<I: TokenId>(
    targets: &[I],
    vocab: usize,
    options: &LogprobOptions,
) -> Result<()> {
    for (row, target) in targets.iter().enumerate() {
        let id = target.id();
        let inside = usize::try_from(id).is_ok_and(|column| column < vocab);
        if !inside && options.ignore_index != Some(id) {
            return Err(Error::Target { op: OP, row, target: id, vocab });
        }
    }
    Ok(())
}

/// Running sums over the columns of one row, with x = (z - max) * scale.
#[derive(Clone, Copy)]
struct Sums {
    /// The largest logit so far.
    max: f32,
    /// Σ e^x.
    sum: f32,
    /// Σ e^x x.
    weighted: f32,
}

impl Sums {
    const NONE: Sums = Sums { max: f32::NEG_INFINITY, sum: 0.0, weighted: 0.0 };

    fn of_row<T: Logit, const ENTROPY: bool>(row: &[T], scale: f32) -> Sums {
        let mut sums = Sums::NONE;
        let mut buffer = [0.0; BLOCK];
        for block in row.chunks(BLOCK) {
            vectorise(
                #[inline(always)]
                || {
                    let z = T::widen(block, &mut buffer);
                    sums = sums.rebase(max(z), scale).add::<ENTROPY>(z, scale);
                },
            );
        }
        sums
    }

    /// The same sums with respect to a maximum that includes `other`.
    #[inline(always)]
    fn rebase(self, other: f32, scale: f32) -> Sums {
        if self.max >= other {
            return self;
        }
        if self.max == f32::NEG_INFINITY {
            // Nothing finite yet: the sums are 0, or NaN and stay so.
            return Sums { max: other, ..self };
        }
        let shift = (self.max - other) * scale;
        let factor = exp(shift);
        Sums {
            max: other,
            sum: self.sum * factor,
            weighted: if factor == 0.0 { 0.0 } else { (self.weighted + shift * self.sum) * factor },
        }
    }

    #[inline(always)]
    fn add<const ENTROPY: bool>(self, z: &[f32], scale: f32) -> Sums {
        // With -inf throughout, -inf - -inf would make NaN of legal masked columns.
        let max = if self.max == f32::NEG_INFINITY { 0.0 } else { self.max };
        let term = |z: f32| {
            let x = (z - max) * scale;
            let e = exp(x);
            (e, if ENTROPY { e * if x < FLOOR { FLOOR } else { x } } else { 0.0 })
        };
        let (mut sum, mut weighted) = ([0.0; LANES], [0.0; LANES]);
        let mut chunks = z.chunks_exact(LANES);
        for chunk in &mut chunks {
            for lane in 0..LANES {
                let (e, w) = term(chunk[lane]);
                sum[lane] += e;
                weighted[lane] += w;
            }
        }
        for (lane, &z) in chunks.remainder().iter().enumerate() {
            let (e, w) = term(z);
            sum[lane] += e;
            weighted[lane] += w;
        }
        Sums {
            max: self.max,
            sum: self.sum + sum_lanes(sum),
            weighted: self.weighted + sum_lanes(weighted),
        }
    }

    /// ln Σ e^x; NaN for a row that has no distribution.
    fn log_sum(&self) -> f32 {
        if self.max.is_finite() {
            self.sum.ln()
        } else {
            f32::NAN
        }
    }

    fn entropy(&self) -> f32 {
        self.log_sum() - self.weighted / self.sum
    }
}

/// The gradient of one row as a function of the logit.
struct Slope {
    max: f32,
    scale: f32,
    log_sum: f32,
    entropy: f32,
    /// Upstream gradients, the temperature's factor included.
    grad_logp: f32,
    grad_entropy: f32,
}

impl Slope {
    fn write_row<T: Logit>(&self, z: &[T], target: usize, grad: &mut [T]) {
        let (mut wide, mut out) = ([0.0; BLOCK], [0.0; BLOCK]);
        for (block, (z, grad)) in z.chunks(BLOCK).zip(grad.chunks_mut(BLOCK)).enumerate() {
            let out = &mut out[..z.len()];
            vectorise(
                #[inline(always)]
                || {
                    for (o, &z) in out.iter_mut().zip(T::widen(z, &mut wide)) {
                        *o = self.at(z);
                    }
                },
            );
            // In f32, before rounding: near p = 1 the two terms cancel.
            if let Some(o) = target.checked_sub(block * BLOCK).and_then(|t| out.get_mut(t)) {
                *o += self.grad_logp;
            }
            T::narrow(out, grad);
        }
    }

    /// -p (g + h (ln p + H)), the gradient of every column but the target's.
    #[inline(always)]
    fn at(&self, z: f32) -> f32 {
        let ln_p = (z - self.max) * self.scale - self.log_sum;
        let p = exp(ln_p);
        let ln_p = if ln_p < FLOOR { FLOOR } else { ln_p };
        -p * self.grad_entropy.mul_add(ln_p + self.entropy, self.grad_logp)
    }
}
