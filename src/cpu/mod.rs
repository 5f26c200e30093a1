//! Shared room of the CPU backend: element types, vectorised math, and fixed-order parallel loops.
//! It knows nothing of any op.

mod element;
pub(crate) mod math;
mod parallel;

pub use element::{Logit, TokenId};
pub use parallel::{for_each, reduce, Rows, RowsMut, Split};

/// Runs `body` compiled for the widest vector unit of this machine.
///
/// The compiler can only vectorise what it inlines, so give it small loops over slices and
/// `#[inline(always)]` functions, and call it at the leaves of a parallel loop, not around it.
#[inline(always)]
pub(crate) fn vectorise<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}
