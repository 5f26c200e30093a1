//! The CPU backend, shared by all ops: the element types that the ops take, vectorised math, and
//! fixed-order parallel loops. It knows nothing of any op.

mod compact;
mod element;
pub(crate) mod math;
mod parallel;
pub(crate) mod store;

pub(crate) use compact::{gather, nonzero, spread};
pub use element::{Logit, TokenId};
pub(crate) use parallel::{for_each, reduce, reduce_by, Rows, RowsMut, Split};
pub use parallel::{num_threads, use_team, Team};
pub(crate) use store::{fill, map, with_stores, Buffer, Stores, Tiles};

/// Runs `body` compiled for the widest vector unit of this machine.
///
/// The body is compiled once a vector unit, and only what is inlined into it benefits: write
/// `vectorise(#[inline(always)] || ..)`, a small loop over slices that calls `#[inline(always)]`
/// functions, at the leaves of a parallel loop and not around it. Without the attribute every
/// `mul_add` is a call into libm, thirty times slower.
///
/// AVX-512, AVX2 and NEON all have fused multiply-adds, and no loop's order of additions depends on
/// the width of a register, so the bits are the same on each.
#[inline(always)]
pub(crate) fn vectorise<R>(body: impl FnOnce() -> R) -> R {
    #[cfg(all(target_arch = "x86_64", ppo_avx512))]
    if has_avx512() {
        // SAFETY: this machine has what the function is compiled for.
        return unsafe { with_avx512(body) };
    }
    pulp::Arch::new().dispatch(body)
}

/// Runs `body` compiled for AVX2.
///
/// # Panics
/// If the machine has none.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn with_avx2<R>(body: impl FnOnce() -> R) -> R {
    pulp::x86::V3::try_new().expect("who asks for it has it").vectorize(body)
}

/// The vector instructions that the loops use on this machine: `avx512`, `avx2`, `neon` or `scalar`.
pub fn instruction_set() -> &'static str {
    #[cfg(all(target_arch = "x86_64", ppo_avx512))]
    if has_avx512() {
        return "avx512";
    }
    match pulp::Arch::new() {
        #[cfg(target_arch = "x86_64")]
        pulp::Arch::V3(_) => "avx2",
        #[cfg(target_arch = "aarch64")]
        pulp::Arch::Neon(_) => "neon",
        _ => "scalar",
    }
}

/// Tells whether [`with_avx512`] runs here. Not left to pulp, whose AVX-512 would ask a newer Rust of all
/// who use this crate.
#[cfg(all(target_arch = "x86_64", ppo_avx512))]
#[inline(always)]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("popcnt")
}

/// Calls `body`, compiled for AVX-512.
///
/// # Safety
/// The machine must have the features named here.
#[cfg(all(target_arch = "x86_64", ppo_avx512))]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt")]
pub(crate) unsafe fn with_avx512<R>(body: impl FnOnce() -> R) -> R {
    body()
}

/// Asks for the memory that lies `offset` elements from `data`, as much of it, to be brought into the
/// cache, where a loop does so much or goes such a way that the hardware does not foresee it. A hint:
/// there may be nothing of ours at that place, and where Rust has no way to say it nothing is done.
#[inline(always)]
pub(crate) fn prefetch<T>(data: &[T], offset: isize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..size_of_val(data)).step_by(64) {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        let address = data.as_ptr().wrapping_offset(offset).cast::<i8>().wrapping_add(line);
        // SAFETY: a prefetch reads nothing, and of an address that is not mapped it does nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (data, offset);
}
