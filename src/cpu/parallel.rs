//! Parallel loops whose result does not depend on the number of threads.
//!
//! The work is split in halves at places that depend on its size alone, so a reduction adds its
//! parts in the same order on one thread and on sixty-four, and on the caller's alone where there is no
//! pool of threads: in the child of a fork, and where the system has no threads to give.

use std::error::Error;
use std::process;
use std::sync::OnceLock;

/// Things that can be cut in two, to be worked on by two threads: slices, rows of slices, options
/// and tuples of them.
pub trait Split: Sized + Send {
    /// The first `mid` items, and the rest.
    fn split(self, mid: usize) -> (Self, Self);
}

impl Split for () {
    fn split(self, _mid: usize) -> (Self, Self) {
        ((), ())
    }
}

impl<T: Sync> Split for &[T] {
    fn split(self, mid: usize) -> (Self, Self) {
        self.split_at(mid)
    }
}

impl<T: Send> Split for &mut [T] {
    fn split(self, mid: usize) -> (Self, Self) {
        self.split_at_mut(mid)
    }
}

impl<S: Split> Split for Option<S> {
    fn split(self, mid: usize) -> (Self, Self) {
        self.map(|inner| inner.split(mid)).unzip()
    }
}

macro_rules! split_tuple {
    ($($name:ident),*) => {
        impl<$($name: Split),*> Split for ($($name,)*) {
            #[allow(non_snake_case)]
            fn split(self, mid: usize) -> (Self, Self) {
                let ($($name,)*) = self;
                $(let $name = $name.split(mid);)*
                (($($name.0,)*), ($($name.1,)*))
            }
        }
    };
}
split_tuple!(A, B);
split_tuple!(A, B, C);
split_tuple!(A, B, C, D);
split_tuple!(A, B, C, D, E);
split_tuple!(A, B, C, D, E, F);

/// A slice cut into rows of `width` elements; `width` may be 0.
#[derive(Clone, Copy)]
pub struct Rows<'a, T> {
    /// The rows, one after the other.
    pub data: &'a [T],
    /// Elements in a row.
    pub width: usize,
}

impl<'a, T> Rows<'a, T> {
    /// Row `index`.
    #[inline(always)]
    pub fn row(&self, index: usize) -> &'a [T] {
        &self.data[index * self.width..][..self.width]
    }
}

impl<T: Sync> Split for Rows<'_, T> {
    fn split(self, mid: usize) -> (Self, Self) {
        let Rows { data, width } = self;
        let (a, b) = data.split_at(mid * width);
        (Rows { data: a, width }, Rows { data: b, width })
    }
}

/// A mutable slice cut into rows of `width` elements; `width` may be 0.
pub struct RowsMut<'a, T> {
    /// The rows, one after the other.
    pub data: &'a mut [T],
    /// Elements in a row.
    pub width: usize,
}

impl<'a, T> RowsMut<'a, T> {
    /// Row `index`.
    #[inline(always)]
    pub fn row(&mut self, index: usize) -> &mut [T] {
        &mut self.data[index * self.width..][..self.width]
    }

    /// Several rows at once, by their indices.
    ///
    /// # Panics
    /// If there is no such row, or an index is there twice.
    pub fn disjoint<const N: usize>(self, indices: [usize; N]) -> [&'a mut [T]; N] {
        let Self { data, width } = self;
        let ranges = indices.map(|index| index * width..(index + 1) * width);
        data.get_disjoint_mut(ranges).expect("rows that are there, each once")
    }
}

impl<T: Send> Split for RowsMut<'_, T> {
    fn split(self, mid: usize) -> (Self, Self) {
        let RowsMut { data, width } = self;
        let (a, b) = data.split_at_mut(mid * width);
        (RowsMut { data: a, width }, RowsMut { data: b, width })
    }
}

/// Calls `leaf(first, count, items)` on runs of at most `grain` of the `len` items, in parallel.
pub fn for_each<S: Split>(
    len: usize,
    grain: usize,
    items: S,
    leaf: impl Fn(usize, usize, S) + Sync,
) {
    reduce(len, grain, items, leaf, |(), ()| ());
}

/// Calls `leaf(first, count, items)` on runs of at most `grain` of the `len` items, in parallel, and
/// merges the results pairwise, neighbours first, in an order that depends on `len` and `grain` only.
pub fn reduce<S: Split, A: Send>(
    len: usize,
    grain: usize,
    items: S,
    leaf: impl Fn(usize, usize, S) -> A + Sync,
    merge: impl Fn(A, A) -> A + Sync,
) -> A {
    let grain = grain.max(1);
    if len <= grain {
        return leaf(0, len, items);
    }
    subtree(0, len, grain, items, has_pool(), &leaf, &merge)
}

/// Tells whether rayon's pool can be waited for, and starts it the first time.
fn has_pool() -> bool {
    /// The process that it was started in; none if it could not be.
    static STARTED_IN: OnceLock<Option<u32>> = OnceLock::new();
    if rayon::current_thread_index().is_some() {
        return true;
    }
    let process = process::id();
    let started_in =
        STARTED_IN.get_or_init(|| match rayon::ThreadPoolBuilder::new().build_global() {
            // The system gives no thread.
            Err(error) if error.source().is_some() => None,
            // An error without a source: the program has started it before us.
            _ => Some(process),
        });
    // Of a process that forks, the child has the memory but not the threads.
    *started_in == Some(process)
}

fn subtree<S: Split, A: Send>(
    first: usize,
    len: usize,
    grain: usize,
    items: S,
    parallel: bool,
    leaf: &(impl Fn(usize, usize, S) -> A + Sync),
    merge: &(impl Fn(A, A) -> A + Sync),
) -> A {
    if len <= grain {
        return leaf(first, len, items);
    }
    let mid = len.div_ceil(grain).div_ceil(2) * grain;
    let (left, right) = items.split(mid);
    let left = || subtree(first, mid, grain, left, parallel, leaf, merge);
    let right = || subtree(first + mid, len - mid, grain, right, parallel, leaf, merge);
    let (a, b) = if parallel { rayon::join(left, right) } else { (left(), right()) };
    merge(a, b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_visited_once_and_in_place() {
        for len in [0, 1, 2, 7, 64, 1000] {
            for grain in [0, 1, 3, 64, 2000] {
                let mut seen = vec![0usize; len];
                for_each(len, grain, seen.as_mut_slice(), |first, count, out| {
                    assert_eq!(out.len(), count);
                    for (i, x) in out.iter_mut().enumerate() {
                        *x += first + i + 1;
                    }
                });
                assert!(seen.iter().enumerate().all(|(i, &x)| x == i + 1));
            }
        }
    }

    #[test]
    fn sums_have_the_same_bits_for_any_number_of_threads() {
        let values: Vec<f32> = (0..100_000).map(|i| ((i * 7919) as f32).sin()).collect();
        let sum = || {
            let leaf = |_, _, part: &[f32]| part.iter().sum::<f32>();
            reduce(values.len(), 1000, values.as_slice(), leaf, |a, b| a + b)
        };
        let bits: Vec<u32> = [1, 2, 3, 8]
            .map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                pool.build().unwrap().install(sum).to_bits()
            })
            .to_vec();
        assert!(bits.iter().all(|&b| b == bits[0]));
    }

    #[test]
    fn rows_may_be_empty() {
        let rows = Rows::<f32> { data: &[], width: 0 };
        let (a, b) = rows.split(3);
        assert!(a.row(2).is_empty() && b.data.is_empty());
        let none = RowsMut::<f32> { data: &mut [], width: 0 }.disjoint([1, 0]);
        assert!(none.iter().all(|row| row.is_empty()));
    }

    #[test]
    fn disjoint_rows_are_those_of_the_indices() {
        let rows = RowsMut { data: &mut [0, 1, 2, 3, 4, 5], width: 2 };
        assert_eq!(rows.disjoint([2, 0]), [&[4, 5], &[0, 1]]);
    }
}
