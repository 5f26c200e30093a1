//! The logits on which every backend of the logprob op is tested.

use rand::rngs::StdRng;
use rand::Rng;

use ppo_kernels::logprob::{reference, Columns, LogprobOptions};

use super::{uniform, wide};

/// Rows as they are met in practice, and worse.
pub struct Case {
    pub name: &'static str,
    pub vocab: usize,
    pub rows: Vec<f32>,
}

impl Case {
    pub fn count(&self) -> usize {
        self.rows.len() / self.vocab
    }
}

/// Three rows of each kind: flat, peaked, rising, far from 0, and with most columns masked.
pub fn rows_of(rng: &mut StdRng, vocab: usize) -> Vec<Case> {
    let rows = 3;
    let flat = uniform(rng, rows * vocab, 4.0);
    let mut peaked = flat.clone();
    for row in 0..rows {
        peaked[row * vocab + rng.random_range(0..vocab)] += 60.0;
    }
    // Rounded, so that adding the offset is exact and only our arithmetic is tested.
    let offset = flat.iter().map(|z| (z * 64.0).round() / 64.0 + 1e4).collect();
    let mut masked = flat.clone();
    for z in &mut masked {
        if rng.random_bool(0.7) {
            *z = f32::NEG_INFINITY;
        }
    }
    for row in 0..rows {
        masked[row * vocab] = 1.0;
    }
    // The maximum is last: everything before it must be rescaled.
    let rising = (0..rows * vocab).map(|i| (i % vocab) as f32 * (90.0 / vocab as f32)).collect();
    let case = |name, rows| Case { name, vocab, rows };
    vec![
        case("rising", rising),
        case("flat", flat),
        case("peaked", peaked),
        case("offset", offset),
        case("masked", masked),
    ]
}

/// A row for each of these leads of its target over everything else, and the targets. What is left to
/// the others is down to 1e-24 at a temperature of 0.7.
pub fn confident(rng: &mut StdRng, vocab: usize) -> (Case, Vec<i64>) {
    let leads = [3.0, 8.0, 14.0, 20.0, 30.0, 38.0];
    let mut rows = Vec::new();
    let mut targets = Vec::new();
    for lead in leads {
        let row = uniform(rng, vocab, 1.0);
        let target = rng.random_range(0..vocab);
        rows.extend(row);
        let from = rows.len() - vocab;
        // Exact in bf16 too.
        rows[from + target] = lead + 2.0;
        targets.push(target as i64);
    }
    (Case { name: "confident", vocab, rows }, targets)
}

/// A vocabulary cut into up to five tiles at random, in order.
pub fn tiles_of(rng: &mut StdRng, vocab: usize) -> Vec<Columns> {
    let mut ends: Vec<usize> = (0..4).map(|_| rng.random_range(0..=vocab)).collect();
    ends.extend([0, vocab]);
    ends.sort_unstable();
    ends.dedup();
    ends.windows(2)
        .map(|ends| Columns { first: ends[0], count: ends[1] - ends[0], vocab })
        .collect()
}

/// The columns of a tile of every row.
pub fn tile<T: Copy>(rows: &[T], columns: Columns) -> Vec<T> {
    let of_row = |row: &[T]| row[columns.first..][..columns.count].to_vec();
    rows.chunks(columns.vocab).flat_map(of_row).collect()
}

/// Writes the columns of a tile into every row.
pub fn put_tile<T: Copy>(rows: &mut [T], columns: Columns, tile: &[T]) {
    for (row, tile) in rows.chunks_mut(columns.vocab).zip(tile.chunks(columns.count)) {
        row[columns.first..][..columns.count].copy_from_slice(tile);
    }
}

/// Rows of columns whose probabilities go down through the least floats, with their targets, and upstream
/// gradients of log-probability and entropy.
pub struct Unlikely {
    pub vocab: usize,
    pub logits: Vec<f32>,
    pub targets: Vec<i64>,
    pub up_logp: Vec<f32>,
    pub up_entropy: Vec<f32>,
}

pub fn unlikely() -> Unlikely {
    let row = [0.0, -1.0, -20.0, -60.0, -80.0, -86.0, -87.0, -87.5, -88.0, -90.0, -95.0, -100.0];
    let up_logp = vec![1.0, -0.3, 0.0, 1e20, 1e-15, 1e-30];
    Unlikely {
        vocab: row.len(),
        logits: row.repeat(up_logp.len()),
        targets: vec![1; up_logp.len()],
        up_entropy: vec![0.0, 0.2, 1.0, 0.0, 0.0, 0.0],
        up_logp,
    }
}

impl Unlikely {
    /// Asserts what the gradients of the unlikely columns can be: some units in the last place of x = -100
    /// make 1e-5 of e^x, and a result below the normal range is rounded to one of the least floats. A
    /// backend that rounds the probability there too (`twice`) does it times the upstream gradient.
    #[track_caller]
    pub fn check(&self, grad: &[f32], twice: bool) {
        let (z, a, b) = (wide(&self.logits), wide(&self.up_logp), wide(&self.up_entropy));
        let options = LogprobOptions::default();
        let want = reference::backward(&z, &self.targets, self.vocab, &options, &a, &b);
        let least = f64::from(f32::from_bits(1));
        for (i, (&got, &want)) in grad.iter().zip(&want).enumerate() {
            if i % self.vocab < 2 {
                continue;
            }
            let row = i / self.vocab;
            let factor = if twice { a[row].abs() + 110.0 * b[row].abs() } else { 0.0 };
            let bound = 1e-5 * want.abs() + least * (1.0 + factor);
            let error = (f64::from(got) - want).abs();
            assert!(error <= bound, "row {row}, logit {}: {got:e}, not {want:e}", z[i]);
        }
    }
}
