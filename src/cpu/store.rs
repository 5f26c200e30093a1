//! Non-temporal stores, for outputs that would not stay in the caches.
//!
//! A store into a cache first reads the line it is about to change, so that of a pass which reads as
//! much as it writes a third of the traffic is for nothing. A non-temporal store (on x86-64) goes past
//! the caches, and only what is written moves. Where the output fits into the last cache that would be a
//! loss: whoever reads it next would find it in memory only.

use std::sync::OnceLock;

use super::math::LANES;
use super::prefetch;

/// Tells whether outputs of so many bytes in all are better written by non-temporal stores. The answer
/// chooses the [`Writer`], once a leaf of a parallel loop, so that its loops have no branch in them.
pub(crate) fn prefers_non_temporal(bytes: usize) -> bool {
    bytes > last_cache()
}

/// Writes outputs, by non-temporal stores or plain ones, and when dropped lets nothing follow before they are written. Until then what was
/// written is not to be read or written again.
pub(crate) struct Writer<const NON_TEMPORAL: bool>;

impl<const NON_TEMPORAL: bool> Writer<NON_TEMPORAL> {
    /// How many elements of `out` are before the first that starts a line, if lines are of consequence.
    #[inline(always)]
    fn before_line<T>(&self, out: &[T]) -> usize {
        if NON_TEMPORAL {
            out.as_ptr().align_offset(64).min(out.len())
        } else {
            0
        }
    }

    /// `out = f(x)`, element by element.
    #[inline(always)]
    pub(crate) fn map<T: Copy, U: Copy>(&self, out: &mut [U], x: &[T], f: impl Fn(T) -> U) {
        let head = self.before_line(out);
        let ((first, out), (first_x, x)) = (out.split_at_mut(head), x.split_at(head));
        for (out, x) in first.iter_mut().zip(first_x) {
            *out = f(*x);
        }
        let ((out, last), (x, last_x)) = (out.as_chunks_mut::<LANES>(), x.as_chunks::<LANES>());
        for (out, x) in out.iter_mut().zip(x) {
            let mut lanes = [out[0]; LANES];
            for i in 0..LANES {
                lanes[i] = f(x[i]);
            }
            self.write(out, lanes);
        }
        for (out, x) in last.iter_mut().zip(last_x) {
            *out = f(*x);
        }
    }

    /// Asks for the memory `offset` elements from `out` ahead of writing it, if it is to be in a cache.
    #[inline(always)]
    pub(crate) fn prefetch<T>(&self, out: &[T], offset: isize) {
        if !NON_TEMPORAL {
            prefetch(out, offset);
        }
    }

    /// `out = lanes`. Lines are written in one piece where calls follow each other in memory, in
    /// either direction.
    #[inline(always)]
    pub(crate) fn write<T: Copy>(&self, out: &mut [T; LANES], lanes: [T; LANES]) {
        #[cfg(target_arch = "x86_64")]
        let whole = size_of_val(out).is_multiple_of(16);
        #[cfg(target_arch = "x86_64")]
        if NON_TEMPORAL && whole && out.as_ptr().addr().is_multiple_of(16) {
            use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
            let (from, to) = (lanes.as_ptr().cast::<__m128i>(), out.as_mut_ptr().cast::<__m128i>());
            for i in 0..size_of_val(out) / 16 {
                // SAFETY: both are of that size, and the target is aligned. What is behind it is
                // ordered before the end of the borrow's thread by the fence in `drop`.
                unsafe { _mm_stream_si128(to.add(i), _mm_loadu_si128(from.add(i))) };
            }
            return;
        }
        *out = lanes;
    }

    /// `out = x` in every element, from the end.
    #[inline(always)]
    pub(crate) fn fill<T: Copy>(&self, out: &mut [T], x: T) {
        let (first, out) = out.as_rchunks_mut();
        for out in out.iter_mut().rev() {
            self.write(out, [x; LANES]);
        }
        first.fill(x);
    }

    /// `out = from`, from the end.
    #[inline(always)]
    pub(crate) fn copy<T: Copy>(&self, out: &mut [T], from: &[T]) {
        let ((out, last_out), (from, last)) = (out.as_chunks_mut(), from.as_chunks());
        last_out.copy_from_slice(last);
        for (out, from) in out.iter_mut().zip(from).rev() {
            self.write(out, *from);
        }
    }
}

impl<const NON_TEMPORAL: bool> Drop for Writer<NON_TEMPORAL> {
    #[inline(always)]
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if NON_TEMPORAL {
            // SAFETY: every x86-64 has it. Non-temporal stores are in no order with later ones.
            unsafe { std::arch::x86_64::_mm_sfence() };
        }
    }
}

/// Bytes of the largest cache; more than anything where there is no way to write past it, or the
/// machine does not say.
fn last_cache() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    *BYTES.get_or_init(|| largest_cache().unwrap_or(usize::MAX))
}

#[cfg(target_arch = "x86_64")]
fn largest_cache() -> Option<usize> {
    use std::arch::x86_64::{__cpuid, __cpuid_count, CpuidResult};
    /// "Deterministic cache parameters" of Intel, and the same of AMD.
    const LEAVES: [u32; 2] = [4, 0x8000_001d];

    // SAFETY: every x86-64 has the instruction.
    #[allow(unused_unsafe)] // since Rust 1.94
    let (cpuid, count) =
        (|leaf| unsafe { __cpuid(leaf) }, |leaf, i| unsafe { __cpuid_count(leaf, i) });
    let bytes = |cache: CpuidResult| {
        let field = |shift: u32, bits: u32| (cache.ebx >> shift & ((1 << bits) - 1)) as usize + 1;
        field(0, 12) * field(12, 10) * field(22, 10) * (cache.ecx as usize + 1)
    };
    // Loops: of flattened iterators the compiler makes code at which valgrind takes offence.
    let mut largest = None;
    for leaf in LEAVES.into_iter().filter(|&leaf| leaf <= cpuid(leaf & 0x8000_0000).eax) {
        for cache in (0..8).map(|i| count(leaf, i)).take_while(|cache| cache.eax & 0x1f != 0) {
            largest = largest.max(Some(bytes(cache)));
        }
    }
    largest
}

#[cfg(not(target_arch = "x86_64"))]
fn largest_cache() -> Option<usize> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_stores_write_the_same_at_any_address() {
        fn write<const NON_TEMPORAL: bool>(out: &mut [u32]) {
            let writer = Writer::<NON_TEMPORAL>;
            for (i, line) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate().rev() {
                writer.write(line, std::array::from_fn(|lane| (100 * i + lane) as u32));
            }
        }
        for offset in 0..5 {
            let (mut cached, mut past) = ([0_u32; 6 * LANES], [0_u32; 6 * LANES]);
            write::<false>(&mut cached[offset..]);
            write::<true>(&mut past[offset..]);
            assert_eq!(cached, past);
            assert_eq!((past[offset + 1], past[offset + 5 * LANES - 1]), (1, 415));

            let from: Vec<u32> = (7..).take(6 * LANES - offset).collect();
            Writer::<true>.copy(&mut past[offset..], &from);
            assert_eq!(past[offset..], from);
            Writer::<true>.fill(&mut past[offset..], 3);
            assert!(past[offset..].iter().all(|&x| x == 3));
        }
    }

    #[test]
    fn the_largest_cache_is_of_a_size_that_exists() {
        if let Some(bytes) = largest_cache() {
            assert!((1 << 18..1 << 33).contains(&bytes), "{bytes}");
        }
    }
}
