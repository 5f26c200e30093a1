//! Loops over elements of which only some are wanted, without branches, which nobody would foresee.

use super::math::{select, LANES};
use super::prefetch;

/// Writes a bit for each byte that is not 0, the first one's lowest, into as many words as there are
/// [`LANES`] of them.
pub(crate) fn nonzero(bytes: &[u8], bits: &mut [u16]) {
    #[cfg(all(target_arch = "x86_64", ppo_avx512))]
    if super::has_avx512() {
        // SAFETY: this machine has the instructions.
        return unsafe { avx512::nonzero(bytes, bits) };
    }
    nonzero_by(bytes, bits, nonzero_lanes);
}

#[inline(always)]
fn nonzero_by(bytes: &[u8], bits: &mut [u16], of_lanes: impl Fn(&[u8; LANES]) -> u16) {
    let (chunks, rest) = bytes.as_chunks();
    for (bits, chunk) in bits.iter_mut().zip(chunks) {
        *bits = of_lanes(chunk);
    }
    if !rest.is_empty() {
        let mut last = [0; LANES];
        last[..rest.len()].copy_from_slice(rest);
        bits[chunks.len()] = of_lanes(&last);
    }
}

fn nonzero_lanes(bytes: &[u8; LANES]) -> u16 {
    let of_half = |half: u128| {
        const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
        let x = half as u64;
        // The highest bit of each byte, by carries that stay within it.
        let highest = (((x & LOW) + LOW) | x) & !LOW;
        // A product that brings bit 8 i to bit 56 + i.
        ((highest >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u16
    };
    let all = u128::from_le_bytes(*bytes);
    of_half(all) | of_half(all >> 64) << 8
}

/// Puts the elements of two slices whose bit is set one behind the other; returns how many. `to` is [`LANES`]
/// longer than those can be: something is written behind them. Asks for what is `ahead` elements from those that it
/// reads.
pub(crate) fn gather(from: [&[f32]; 2], bits: &[u16], ahead: isize, to: [&mut [f32]; 2]) -> usize {
    #[cfg(all(target_arch = "x86_64", ppo_avx512))]
    if super::has_avx512() {
        // SAFETY: this machine has the instructions.
        return unsafe { avx512::gather(from, bits, ahead, to) };
    }
    gather_lanes(from, bits, ahead, to, gather_on_any)
}

fn gather_on_any(x: &[f32; LANES], bits: u16, out: &mut [f32; LANES]) {
    let mut place = 0;
    for (i, &x) in x.iter().enumerate() {
        // What is not wanted is written over by the next, or behind all that is.
        out[place % LANES] = x;
        place += usize::from(bits >> i & 1);
    }
}

/// Puts elements back to where [`gather`] had them from, and 0 elsewhere.
pub(crate) fn spread(from: [&[f32]; 2], bits: &[u16], ahead: isize, to: [&mut [f32]; 2]) {
    #[cfg(all(target_arch = "x86_64", ppo_avx512))]
    if super::has_avx512() {
        // SAFETY: this machine has the instructions.
        return unsafe { avx512::spread(from, bits, ahead, to) };
    }
    spread_lanes(from, bits, ahead, to, spread_on_any);
}

fn spread_on_any(x: &[f32; LANES], bits: u16) -> [f32; LANES] {
    let (mut y, mut place) = ([0.0; LANES], 0);
    for (i, y) in y.iter_mut().enumerate() {
        let bit = usize::from(bits >> i & 1);
        *y = select(bit == 1, x[place % LANES], 0.0);
        place += bit;
    }
    y
}

#[inline(always)]
fn gather_lanes(
    [x, y]: [&[f32]; 2],
    bits: &[u16],
    ahead: isize,
    [to_x, to_y]: [&mut [f32]; 2],
    lanes: impl Fn(&[f32; LANES], u16, &mut [f32; LANES]),
) -> usize {
    let (mut count, (chunks_x, rest_x), (chunks_y, rest_y)) = (0, x.as_chunks(), y.as_chunks());
    for ((x, y), &bits) in chunks_x.iter().zip(chunks_y).zip(bits) {
        prefetch(x, ahead);
        prefetch(y, ahead);
        lanes(x, bits, to_x[count..].first_chunk_mut().expect("as much room behind them"));
        lanes(y, bits, to_y[count..].first_chunk_mut().expect("as much room behind them"));
        count += bits.count_ones() as usize;
    }
    // By what any machine does: it is one vector.
    if let Some(&bits) = bits.get(chunks_x.len()).filter(|_| !rest_x.is_empty()) {
        let [mut last_x, mut last_y] = [[0.0; LANES]; 2];
        last_x[..rest_x.len()].copy_from_slice(rest_x);
        last_y[..rest_y.len()].copy_from_slice(rest_y);
        for (last, to) in [(last_x, to_x), (last_y, to_y)] {
            let to = to[count..].first_chunk_mut().expect("as much room behind them");
            gather_on_any(&last, bits, to);
        }
        count += bits.count_ones() as usize;
    }
    count
}

#[inline(always)]
fn spread_lanes(
    [x, y]: [&[f32]; 2],
    bits: &[u16],
    ahead: isize,
    [to_x, to_y]: [&mut [f32]; 2],
    lanes: impl Fn(&[f32; LANES], u16) -> [f32; LANES],
) {
    let (mut count, (chunks_x, rest_x)) = (0, to_x.as_chunks_mut());
    let (chunks_y, rest_y) = to_y.as_chunks_mut();
    let full = chunks_x.len();
    for ((to_x, to_y), &bits) in chunks_x.iter_mut().zip(chunks_y).zip(bits) {
        prefetch(to_x, ahead);
        prefetch(to_y, ahead);
        *to_x = lanes(x[count..].first_chunk().expect("as much room behind them"), bits);
        *to_y = lanes(y[count..].first_chunk().expect("as much room behind them"), bits);
        count += bits.count_ones() as usize;
    }
    if let Some(&bits) = bits.get(full).filter(|_| !rest_x.is_empty()) {
        for (x, to) in [(x, rest_x), (y, rest_y)] {
            let last = x[count..].first_chunk().expect("as much room behind them");
            to.copy_from_slice(&spread_on_any(last, bits)[..to.len()]);
        }
    }
}

#[cfg(all(target_arch = "x86_64", ppo_avx512))]
#[allow(clippy::incompatible_msrv)] // only where Rust has them
mod avx512 {
    use std::arch::x86_64::{
        _mm512_loadu_ps, _mm512_maskz_compress_ps, _mm512_maskz_expand_ps, _mm512_storeu_ps,
        _mm_loadu_si128, _mm_test_epi8_mask,
    };

    use super::LANES;

    /// # Safety
    /// The machine must have AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn nonzero(bytes: &[u8], bits: &mut [u16]) {
        super::nonzero_by(
            bytes,
            bits,
            #[inline(always)]
            |bytes| {
                // SAFETY: there are as many bytes.
                unsafe {
                    let bytes = _mm_loadu_si128(bytes.as_ptr().cast());
                    _mm_test_epi8_mask(bytes, bytes)
                }
            },
        );
    }

    /// # Safety
    /// The machine must have AVX-512.
    #[target_feature(enable = "avx512f,popcnt")]
    pub(super) unsafe fn gather(
        from: [&[f32]; 2],
        bits: &[u16],
        ahead: isize,
        to: [&mut [f32]; 2],
    ) -> usize {
        super::gather_lanes(
            from,
            bits,
            ahead,
            to,
            #[inline(always)]
            |x, bits, out| {
                // SAFETY: both have as many lanes. In a register: stores of some lanes are slow.
                unsafe {
                    let x = _mm512_maskz_compress_ps(bits, _mm512_loadu_ps(x.as_ptr()));
                    _mm512_storeu_ps(out.as_mut_ptr(), x);
                }
            },
        )
    }

    /// # Safety
    /// The machine must have AVX-512.
    #[target_feature(enable = "avx512f,popcnt")]
    pub(super) unsafe fn spread(
        from: [&[f32]; 2],
        bits: &[u16],
        ahead: isize,
        to: [&mut [f32]; 2],
    ) {
        super::spread_lanes(
            from,
            bits,
            ahead,
            to,
            #[inline(always)]
            |x, bits| {
                let mut y = [0.0; LANES];
                // SAFETY: both have as many lanes.
                unsafe {
                    let x = _mm512_maskz_expand_ps(bits, _mm512_loadu_ps(x.as_ptr()));
                    _mm512_storeu_ps(y.as_mut_ptr(), x);
                }
                y
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every word of bits, and a vector that is not full behind it.
    #[test]
    fn elements_are_gathered_and_spread_on_any_machine() {
        const LEN: usize = 2 * LANES + 5;
        let x: [f32; LEN] = std::array::from_fn(|i| i as f32 + 1.0);
        for word in 0..=u16::MAX {
            let is_set = |i: usize| (word.rotate_left(5 * (i / LANES) as u32) >> (i % LANES)) & 1;
            let flags: [u8; LEN] = std::array::from_fn(|i| is_set(i) as u8 * (1 << (i % 8)));
            let mut bits = [0; 3];
            nonzero(&flags, &mut bits);
            let mut other = [0; 3];
            nonzero_by(&flags, &mut other, nonzero_lanes);
            assert_eq!(bits, other);
            let y = x.map(|x| -x);
            let kept = |x: f32, i: usize| if flags[i] != 0 { x } else { 0.0 };
            let wanted: [f32; LEN] = std::array::from_fn(|i| kept(x[i], i));
            let together: Vec<f32> = wanted.iter().copied().filter(|&x| x != 0.0).collect();
            for machine in [true, false] {
                let [mut a, mut b] = [[f32::NAN; LEN + LANES]; 2];
                let to = [&mut a[..], &mut b[..]];
                let count = match machine {
                    true => gather([&x, &y], &bits, 0, to),
                    false => gather_lanes([&x, &y], &bits, 0, to, gather_on_any),
                };
                assert_eq!(a[..count], together, "{bits:?}");
                assert!(a[..count].iter().zip(&b).all(|(a, b)| *a == -b), "{bits:?}");
                for machine in [true, false] {
                    let [mut x, mut y] = [[f32::NAN; LEN]; 2];
                    let to = [&mut x[..], &mut y[..]];
                    match machine {
                        true => spread([&a, &b], &bits, 0, to),
                        false => spread_lanes([&a, &b], &bits, 0, to, spread_on_any),
                    }
                    assert_eq!(x, wanted, "{bits:?}");
                    assert_eq!(y, wanted.map(|x| if x == 0.0 { 0.0 } else { -x }), "{bits:?}");
                }
            }
        }
    }
}
