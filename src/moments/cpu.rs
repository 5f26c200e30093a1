//! Moments of slices. Sums are taken in f64, over leaves of a fixed size that a fixed tree merges.

use std::hint::black_box;

use super::Moments;
use crate::cpu::math::LANES;
use crate::cpu::{reduce, vectorise};

/// Elements of a leaf: x, mask, gradient and result of one stay near the core, in 32 KiB or little more.
pub(crate) const LEAF: usize = 2048;

/// The moments of the unmasked elements; the mask, if there is one, is as long as `x`.
pub(crate) fn moments(x: &[f32], mask: Option<&[u8]>) -> Moments {
    let leaf = |_, _, (x, mask)| {
        vectorise(
            #[inline(always)]
            || leaf_moments(x, mask),
        )
    };
    reduce(x.len(), LEAF, (x, mask), leaf, Moments::merge)
}

/// The moments of up to [`LEAF`] elements, around the first unmasked one.
#[inline(always)]
pub(crate) fn leaf_moments(x: &[f32], mask: Option<&[u8]>) -> Moments {
    let first = match mask {
        None => 0,
        Some(mask) => mask.iter().position(|&m| m != 0).unwrap_or(x.len()),
    };
    let Some(&shift) = x.get(first) else {
        return Moments::default();
    };

    let Some(mask) = mask else {
        return lane_moments(x, shift).moments(x.len());
    };
    // Whole arrays one after the other: of a selection among the sums the compiler makes branches.
    let mut kept = [0.0; LEAF];
    let kept = &mut kept[..x.len()];
    select(x, mask, shift, kept);
    let count = mask.iter().map(|&keep| u32::from(keep != 0)).sum::<u32>();
    lane_moments(kept, shift).moments(count as usize)
}

/// The sums of the elements' deviations from `shift`.
#[inline(always)]
fn lane_moments(x: &[f32], shift: f32) -> LaneMoments {
    let mut sums = LaneMoments::around(shift);
    let (full, rest) = x.as_chunks();
    for x in full {
        sums.add(*x);
    }
    let mut last = [shift; LANES];
    last[..rest.len()].copy_from_slice(rest);
    sums.add(last);
    // From memory: of lanes that it sees added up the compiler takes the loop apart, with masks at least.
    black_box(sums)
}

/// `out = x` where unmasked, else `other`.
#[inline(always)]
fn select(x: &[f32], mask: &[u8], other: f32, out: &mut [f32]) {
    for ((out, &x), &keep) in out.iter_mut().zip(x).zip(mask) {
        *out = if keep != 0 { x } else { other };
    }
}

/// The sums of a few thousand deviations from a number, and of their squares, in f64.
///
/// That number must be one of the set: then (mean - shift)^2 <= m2, so that the subtraction at the end
/// costs at most a factor n in relative precision, whatever the mean: 2048 of 2^53.
pub(crate) struct LaneMoments {
    shift: f32,
    sums: [f64; LANES],
    squares: [f64; LANES],
}

impl LaneMoments {
    #[inline(always)]
    pub(crate) fn around(shift: f32) -> Self {
        Self { shift, sums: [0.0; LANES], squares: [0.0; LANES] }
    }

    /// Lanes that hold no element are to hold the number.
    #[inline(always)]
    pub(crate) fn add(&mut self, x: [f32; LANES]) {
        for (x, (sum, square)) in x.iter().zip(self.sums.iter_mut().zip(&mut self.squares)) {
            let d = f64::from(*x) - f64::from(self.shift);
            *sum += d;
            *square = d.mul_add(d, *square);
        }
    }

    /// The moments of the `count` elements that were added.
    #[inline(always)]
    pub(crate) fn moments(&self, count: usize) -> Moments {
        if count == 0 {
            return Moments::default();
        }
        // One after the other: for a tree the compiler pairs lanes in the loops before it already,
        // and takes GAE's apart, which halves its speed.
        let sum: f64 = self.sums.iter().sum();
        let n = count as f64;
        let m2 = self.squares.iter().sum::<f64>() - sum * sum / n;
        Moments {
            count: n,
            mean: f64::from(self.shift) + sum / n,
            // Comparison, not max: NaN stays NaN.
            m2: if m2 < 0.0 { 0.0 } else { m2 },
        }
    }
}
