//! Shared room of the CPU backend: the element types that the ops take, vectorised math, and
//! fixed-order parallel loops. It knows nothing of any op.

mod element;
pub(crate) mod math;
mod parallel;

pub use element::{Logit, TokenId};
pub(crate) use parallel::{for_each, reduce, Rows, RowsMut, Split};

/// Runs `body` compiled for the widest vector unit of this machine.
///
/// The body is compiled once a vector unit, and only what is inlined into it benefits: write
/// `vectorise(#[inline(always)] || ..)`, a small loop over slices that calls `#[inline(always)]`
/// functions, at the leaves of a parallel loop and not around it. Without the attribute every
/// `mul_add` is a call into libm, thirty times slower.
#[inline(always)]
pub(crate) fn vectorise<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}
