//! The logits on which every backend of the logprob op is tested.

use rand::rngs::StdRng;
use rand::Rng;

use ppo_kernels::logprob::Columns;

use super::uniform;

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
