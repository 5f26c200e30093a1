//! Non-temporal stores, for outputs that would not stay in the caches.
//!
//! A store into a cache first reads the line it is about to change, so that of a pass which reads as
//! much as it writes a third of the traffic is for nothing. A non-temporal store (on x86-64) goes past
//! the caches, and only what is written moves. Where the output fits into the last cache that would be a
//! loss: whoever reads it next would find it in memory only.
//!
//! A line must be filled at once, best by one store: one that is not whole when its buffer is wanted for another
//! goes to memory in pieces, and a loop that writes several outputs, or from the end, is several times slower
//! for it. With AVX-512 such a loop puts lines together ([`Tiles`]), without it writes to a [`Buffer`] in the L1
//! cache, from which lines are copied.

use std::sync::OnceLock;

use bytemuck::Pod;

use super::math::LANES;
use super::{prefetch, Split};

/// How a pass writes its outputs, once chosen for all its loops: see [`with_stores`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Stores {
    /// Into the caches.
    Cached,
    /// Past them, 16 bytes at a time. The machine has AVX2.
    #[cfg(target_arch = "x86_64")]
    NonTemporal,
    /// Past them, a line at a time. The machine has AVX-512.
    #[cfg(all(target_arch = "x86_64", ppo_avx512))]
    Lines,
}

/// The same as constants, for loops that are compiled for each.
pub(crate) const CACHED: u8 = 0;
pub(crate) const NON_TEMPORAL: u8 = 1;
pub(crate) const LINES: u8 = 2;

impl Stores {
    /// Those for outputs of so many bytes in all.
    pub(crate) fn of(bytes: usize) -> Self {
        if bytes < last_cache() {
            return Self::Cached;
        }
        Self::past_the_caches()
    }

    /// The widest stores past the caches.
    pub(crate) fn past_the_caches() -> Self {
        #[cfg(all(target_arch = "x86_64", ppo_avx512))]
        if super::has_avx512() {
            return Self::Lines;
        }
        #[cfg(target_arch = "x86_64")]
        if pulp::x86::V3::try_new().is_some() {
            return Self::NonTemporal;
        }
        Self::Cached
    }
}

#[cfg(test)]
impl Stores {
    /// All that this machine has.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![Self::Cached, Self::past_the_caches()];
        #[cfg(target_arch = "x86_64")]
        all.extend(pulp::x86::V3::try_new().map(|_| Self::NonTemporal));
        all
    }
}

/// Runs `$body`, in which `$stores` is a constant, compiled for the widest vector unit of this machine. What it wrote
/// past the caches is written before what follows; until then it is not to be read, or written again.
macro_rules! with_stores {
    ($chosen:expr, $stores:ident => $body:expr) => {
        match $chosen {
            $crate::cpu::Stores::Cached => $crate::cpu::vectorise(
                #[inline(always)]
                || {
                    const $stores: u8 = $crate::cpu::store::CACHED;
                    $body
                },
            ),
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::Stores::NonTemporal => $crate::cpu::with_avx2(
                #[inline(always)]
                || {
                    const $stores: u8 = $crate::cpu::store::NON_TEMPORAL;
                    let _fence = $crate::cpu::store::Fence;
                    $body
                },
            ),
            // SAFETY: the machine has AVX-512 where these stores are chosen.
            #[cfg(all(target_arch = "x86_64", ppo_avx512))]
            $crate::cpu::Stores::Lines => unsafe {
                $crate::cpu::with_avx512(
                    #[inline(always)]
                    || {
                        const $stores: u8 = $crate::cpu::store::LINES;
                        let _fence = $crate::cpu::store::Fence;
                        $body
                    },
                )
            },
        }
    };
}
pub(crate) use with_stores;

/// Elements that are stored past the caches at a time: a line of 16-bit ones, two of others.
const TILE: usize = 32;

/// How many elements ahead [`map`] asks for its inputs, when memory is what it waits for.
const AHEAD: isize = 1024;

/// Slices that are walked side by side.
pub(crate) trait Inputs: Split + Copy {
    /// An element of each.
    type Item;

    fn elements(self) -> impl Iterator<Item = Self::Item>;

    fn at(self, i: usize) -> Self::Item;

    fn prefetch(self, ahead: isize);
}

impl<T: Copy + Sync> Inputs for &[T] {
    type Item = T;

    #[inline(always)]
    fn elements(self) -> impl Iterator<Item = T> {
        self.iter().copied()
    }

    #[inline(always)]
    fn at(self, i: usize) -> T {
        self[i]
    }

    #[inline(always)]
    fn prefetch(self, ahead: isize) {
        prefetch(self, ahead);
    }
}

impl<A: Inputs, B: Inputs> Inputs for (A, B) {
    type Item = (A::Item, B::Item);

    #[inline(always)]
    fn elements(self) -> impl Iterator<Item = Self::Item> {
        self.0.elements().zip(self.1.elements())
    }

    #[inline(always)]
    fn at(self, i: usize) -> Self::Item {
        (self.0.at(i), self.1.at(i))
    }

    #[inline(always)]
    fn prefetch(self, ahead: isize) {
        self.0.prefetch(ahead);
        self.1.prefetch(ahead);
    }
}

/// `out = f(inputs)`, element by element. All are of one length.
#[inline(always)]
pub(crate) fn map<const STORES: u8, I: Inputs, T: Pod>(
    out: &mut [T],
    inputs: I,
    f: impl Fn(I::Item) -> T,
) {
    if STORES == CACHED {
        return map_cached(out, inputs, f);
    }
    let head = before_line(out);
    let ((head_out, out), (head_inputs, mut inputs)) = (out.split_at_mut(head), inputs.split(head));
    map_cached(head_out, head_inputs, &f);
    let (tiles, last) = out.as_chunks_mut::<TILE>();
    for out in tiles {
        let (of_tile, rest) = inputs.split(TILE);
        of_tile.prefetch(AHEAD);
        let mut tile = [T::zeroed(); TILE];
        #[allow(clippy::needless_range_loop)] // of an iterator the compiler makes calls of `f`
        for i in 0..TILE {
            tile[i] = f(of_tile.at(i));
        }
        store_lines::<STORES, _>(out, &tile);
        inputs = rest;
    }
    map_cached(last, inputs, f);
}

#[inline(always)]
fn map_cached<I: Inputs, T>(out: &mut [T], inputs: I, f: impl Fn(I::Item) -> T) {
    for (out, item) in out.iter_mut().zip(inputs.elements()) {
        *out = f(item);
    }
}

/// `out = x` in every element.
#[inline(always)]
pub(crate) fn fill<const STORES: u8, T: Pod>(out: &mut [T], x: T) {
    if STORES == CACHED {
        return out.fill(x);
    }
    let (head, out) = out.split_at_mut(before_line(out));
    let (tiles, last) = out.as_chunks_mut::<TILE>();
    head.fill(x);
    tiles.iter_mut().for_each(|tile| store_lines::<STORES, _>(tile, &[x; TILE]));
    last.fill(x);
}

/// How many elements are before the first that begins a line.
#[inline(always)]
fn before_line<T>(out: &[T]) -> usize {
    out.as_ptr().align_offset(LINE).min(out.len())
}

/// Writes tiles of an output that lie side by side, by lines that are put together of two tiles where these
/// do not begin with one.
pub(crate) struct Tiles<const STORES: u8> {
    /// How many elements behind the beginning of a line a tile begins.
    shift: usize,
    /// The elements of a line in two tiles.
    line: [i32; LANES],
    /// The tile that was written last, if there was one.
    last: [f32; LANES],
    begun: bool,
}

impl<const STORES: u8> Tiles<STORES> {
    /// For tiles that begin at multiples of [`LANES`] in `out`.
    #[inline(always)]
    pub(crate) fn new(out: &[f32]) -> Self {
        let shift = out.as_ptr().addr() / size_of::<f32>() % LANES;
        let line = std::array::from_fn(|i| (LANES - shift + i) as i32);
        Self { shift, line, last: [0.0; LANES], begun: false }
    }

    /// Writes the tile at `at`, which is behind the last one.
    #[inline(always)]
    pub(crate) fn put_after(&mut self, out: &mut [f32], at: usize, tile: [f32; LANES]) {
        if STORES == LINES {
            if self.begun {
                let line = &mut out[at - self.shift..][..LANES];
                store_joined::<STORES>(line, [&self.last, &tile], &self.line);
            } else {
                let in_line = LANES - self.shift;
                out[at..][..in_line].copy_from_slice(&tile[..in_line]);
            }
            (self.last, self.begun) = (tile, true);
            return;
        }
        let out = &mut out[at..][..LANES];
        if STORES == NON_TEMPORAL && out.as_ptr().addr().is_multiple_of(16) {
            return store_lines::<STORES, _>(out, &tile);
        }
        out.copy_from_slice(&tile);
    }

    /// Writes the tile at `at`, which is in front of the last one; into the caches if not by whole lines.
    #[inline(always)]
    pub(crate) fn put_before(&mut self, out: &mut [f32], at: usize, tile: [f32; LANES]) {
        if STORES != LINES {
            return out[at..][..LANES].copy_from_slice(&tile);
        }
        let in_line = LANES - self.shift;
        if self.begun {
            let line = &mut out[at + in_line..][..LANES];
            store_joined::<STORES>(line, [&tile, &self.last], &self.line);
        } else {
            out[at + in_line..][..self.shift].copy_from_slice(&tile[in_line..]);
        }
        (self.last, self.begun) = (tile, true);
    }

    /// Writes what is left of the last tile, which ends at `end` and has all others in front of it.
    #[inline(always)]
    pub(crate) fn end_after(self, out: &mut [f32], end: usize) {
        if self.begun {
            out[end - self.shift..end].copy_from_slice(&self.last[LANES - self.shift..]);
        }
    }

    /// Writes what is left of the last tile, which begins at `begin` and has all others behind it.
    #[inline(always)]
    pub(crate) fn end_before(self, out: &mut [f32], begin: usize) {
        if self.begun {
            let in_line = LANES - self.shift;
            out[begin..][..in_line].copy_from_slice(&self.last[..in_line]);
        }
    }
}

/// Memory for parts of an output on their way past the caches, of at most `N` elements; none where it is
/// written by plain stores.
pub(crate) struct Buffer<const STORES: u8, T, const N: usize>(Option<[T; N]>);

impl<const STORES: u8, T: Pod, const N: usize> Buffer<STORES, T, N> {
    #[inline(always)]
    pub(crate) fn new(past_the_caches: bool) -> Self {
        Self(past_the_caches.then(|| [T::zeroed(); N]))
    }

    /// What to write in place of `out`: its memory or itself.
    #[inline(always)]
    pub(crate) fn target<'a>(&'a mut self, out: &'a mut [T]) -> &'a mut [T] {
        match &mut self.0 {
            Some(buffer) => &mut buffer[..out.len()],
            None => out,
        }
    }

    /// Writes `out` as its target was.
    #[inline(always)]
    pub(crate) fn flush(&self, out: &mut [T]) {
        if let Some(buffer) = &self.0 {
            stream::<STORES, _>(out, &buffer[..out.len()]);
        }
    }
}

/// Bytes of a line of the caches.
const LINE: usize = 64;

/// `out = from` past the caches, but for what is before its first line and behind its last.
#[inline(always)]
fn stream<const STORES: u8, T: Pod>(out: &mut [T], from: &[T]) {
    let (head, of_line) = (before_line(out), LINE / size_of::<T>());
    let end = head + (out.len() - head) / of_line * of_line;
    out[..head].copy_from_slice(&from[..head]);
    out[end..].copy_from_slice(&from[end..]);
    store_lines::<STORES, _>(&mut out[head..end], &from[head..end]);
}

/// `out = from`; past the caches `out` is whole lines, or by 16 bytes at a time such pieces.
#[inline(always)]
fn store_lines<const STORES: u8, T: Pod>(out: &mut [T], from: &[T]) {
    assert_eq!(out.len(), from.len());
    match STORES {
        // SAFETY: both are of that size, and the target is aligned. What is written is ordered before the end of
        // the borrow's thread by the fence that follows. Who has chosen LINES has AVX-512.
        #[cfg(all(target_arch = "x86_64", ppo_avx512))]
        LINES => {
            debug_assert!(is_pieces(out, LINE));
            let (to, from) = (out.as_mut_ptr(), from.as_ptr());
            for i in 0..size_of_val(out) / LINE {
                unsafe { store_line(to.cast(), from.cast(), i) };
            }
        }
        #[cfg(target_arch = "x86_64")]
        NON_TEMPORAL => {
            use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
            debug_assert!(is_pieces(out, size_of::<__m128i>()));
            let (to, from) = (out.as_mut_ptr().cast::<__m128i>(), from.as_ptr().cast::<__m128i>());
            for i in 0..size_of_val(out) / size_of::<__m128i>() {
                // SAFETY: as above.
                unsafe { _mm_stream_si128(to.add(i), _mm_loadu_si128(from.add(i))) };
            }
        }
        _ => out.copy_from_slice(from),
    }
}

/// Tells whether a slice is made of aligned pieces of so many bytes.
#[cfg(target_arch = "x86_64")]
fn is_pieces<T>(x: &[T], bytes: usize) -> bool {
    x.is_empty() || [size_of_val(x), x.as_ptr().addr()].iter().all(|n| n.is_multiple_of(bytes))
}

/// Stores the elements of the line `out` that `line` chooses of two tiles.
#[inline(always)]
fn store_joined<const STORES: u8>(out: &mut [f32], tiles: [&[f32; LANES]; 2], line: &[i32; LANES]) {
    debug_assert!(STORES == LINES && out.as_ptr().addr().is_multiple_of(LINE));
    assert_eq!(out.len(), LANES);
    // SAFETY: who has chosen LINES has AVX-512; the target is a line.
    #[cfg(all(target_arch = "x86_64", ppo_avx512))]
    unsafe {
        joined(out.as_mut_ptr(), tiles, line);
    }
    #[cfg(not(all(target_arch = "x86_64", ppo_avx512)))]
    let _ = (tiles, line);
}

/// # Safety
/// `to` is a line that can be written to, and the machine has AVX-512.
#[cfg(all(target_arch = "x86_64", ppo_avx512))]
#[allow(clippy::incompatible_msrv)] // only where Rust has them
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn joined(to: *mut f32, [low, high]: [&[f32; LANES]; 2], line: &[i32; LANES]) {
    use std::arch::x86_64::{
        _mm512_loadu_ps, _mm512_loadu_si512, _mm512_permutex2var_ps, _mm512_stream_ps,
    };
    // SAFETY: by this function's own contract; each array is of 16 elements.
    unsafe {
        let (low, high) = (_mm512_loadu_ps(low.as_ptr()), _mm512_loadu_ps(high.as_ptr()));
        let line = _mm512_loadu_si512(line.as_ptr().cast());
        _mm512_stream_ps(to, _mm512_permutex2var_ps(low, line, high));
    }
}

/// Line `i` of `to` = that of `from`.
///
/// # Safety
/// There are such lines, that of `to` begins where a line does, and the machine has AVX-512.
#[cfg(all(target_arch = "x86_64", ppo_avx512))]
#[allow(clippy::incompatible_msrv)] // only where Rust has them
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store_line(
    to: *mut std::arch::x86_64::__m512i,
    from: *const std::arch::x86_64::__m512i,
    i: usize,
) {
    use std::arch::x86_64::{_mm512_loadu_si512, _mm512_stream_si512};
    // SAFETY: by this function's own contract.
    unsafe { _mm512_stream_si512(to.add(i), _mm512_loadu_si512(from.add(i))) };
}

/// When dropped, lets no store follow before the non-temporal ones that were made: these are in no order by
/// themselves.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Fence;

#[cfg(target_arch = "x86_64")]
impl Drop for Fence {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: every x86-64 has it.
        unsafe { std::arch::x86_64::_mm_sfence() };
    }
}

/// Outputs of so many bytes and more go past the caches whatever their size: of a virtual machine it is that of
/// the host's, which others use too.
const MOST_CACHED: usize = 32 << 20;

/// Bytes of the largest cache; more than anything where there is no way to write past it, or the
/// machine does not say.
fn last_cache() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    *BYTES.get_or_init(|| largest_cache().map_or(usize::MAX, |bytes| bytes.min(MOST_CACHED)))
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
        fn check<T: Pod + PartialEq + std::fmt::Debug>(of: impl Fn(usize) -> T) {
            for (offset, len) in [(0, 0), (1, 1), (3, 40), (0, 512), (5, 511), (2, 3000)] {
                let inside = offset..offset + len;
                let i: Vec<u32> = (0..len as u32).collect();
                let want: Vec<T> = (0..offset + len + 9)
                    .map(|at| if inside.contains(&at) { of(at - offset) } else { T::zeroed() })
                    .collect();
                let zeros = vec![T::zeroed(); want.len()];
                for stores in Stores::all() {
                    let [mut mapped, mut filled, mut flushed] = [(); 3].map(|()| zeros.clone());
                    let out = &mut mapped[inside.clone()];
                    with_stores!(stores, STORES => {
                        map::<STORES, _, _>(out, &i[..], |i| of(i as usize));
                    });
                    assert_eq!(mapped, want);

                    let out = &mut filled[inside.clone()];
                    with_stores!(stores, STORES => fill::<STORES, _>(out, of(0)));
                    let is_filled = |at| filled[at] == of(0);
                    assert!((0..want.len()).all(|at| is_filled(at) == inside.contains(&at)));

                    let out = &mut flushed[inside.clone()];
                    with_stores!(stores, STORES => {
                        let mut buffer = Buffer::<STORES, T, 3000>::new(STORES != CACHED);
                        (0..).zip(buffer.target(out)).for_each(|(i, x)| *x = of(i));
                        buffer.flush(out);
                    });
                    assert_eq!(flushed, want);
                }
            }
        }
        check(|i| i as f32 + 1.0);
        check(|i| i as u16 + 1);
    }

    #[test]
    fn the_largest_cache_is_of_a_size_that_exists() {
        if let Some(bytes) = largest_cache() {
            assert!((1 << 18..1 << 33).contains(&bytes), "{bytes}");
        }
    }
}
