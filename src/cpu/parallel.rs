//! Parallel loops whose result does not depend on the number of threads.
//!
//! The work is split in halves at places that depend on its size alone, so a reduction adds its
//! parts in the same order on one thread and on sixty-four: those of rayon's pool, those that the
//! program lends ([`use_team`]), or the caller's alone where there are no others, in the child of a fork
//! and where the system has no threads to give.

use std::cell::Cell;
use std::error::Error;
use std::ffi::{c_uint, c_void};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::process;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

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
#[inline(always)]
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
#[inline(always)]
pub fn reduce<S: Split, A: Send>(
    len: usize,
    grain: usize,
    items: S,
    leaf: impl Fn(usize, usize, S) -> A + Sync,
    merge: impl Fn(A, A) -> A + Sync,
) -> A {
    let grain = grain.max(1);
    reduce_by(len, move |_, len| middle(len, grain), items, leaf, merge)
}

/// [`reduce`] of items that are not cut where their number is halved: `cut(first, len)` says how many of the
/// `len` items from `first` on go to the left, or that they are a leaf's.
#[inline(always)]
pub fn reduce_by<S: Split, A: Send>(
    len: usize,
    cut: impl Fn(usize, usize) -> Option<usize> + Sync,
    items: S,
    leaf: impl Fn(usize, usize, S) -> A + Sync,
    merge: impl Fn(A, A) -> A + Sync,
) -> A {
    if cut(0, len).is_none() {
        return leaf(0, len, items);
    }
    let mut root = Node::new(items, &leaf, &merge);
    share_out(len, &cut, &mut root);
    root.into_result()
}

/// Where work is cut in two: see [`reduce_by`].
type Cut<'a> = dyn Fn(usize, usize) -> Option<usize> + Sync + 'a;

/// A node of the tree as those see it who walk it: they are compiled once for all work.
trait Branch: Send {
    /// Does the work on the items, which are `len` from `first` on.
    fn leaf(&mut self, first: usize, len: usize);

    /// Gives its items to two nodes, `mid` of them to the first.
    fn split(&mut self, mid: usize) -> [&mut dyn Branch; 2];

    /// Merges the results of the nodes below it, if it was split.
    fn merge(&mut self);
}

/// Work on the items `S` that comes to an `A`.
struct Node<'a, S, A, L, M> {
    state: State<S, A, Box<[Self; 2]>>,
    leaf: &'a L,
    merge: &'a M,
}

/// The contents of a node: its items, two nodes or its result.
enum State<S, A, N> {
    Todo(S),
    Split(N),
    Done(A),
    /// Nothing: its work has begun, or ended in a panic.
    Begun,
}

impl<'a, S, A, L, M> Node<'a, S, A, L, M> {
    fn new(items: S, leaf: &'a L, merge: &'a M) -> Self {
        Self { state: State::Todo(items), leaf, merge }
    }

    fn into_result(self) -> A {
        match self.state {
            State::Done(result) => result,
            _ => not_done(),
        }
    }
}

fn not_done() -> ! {
    panic!("a part of the work was not done")
}

impl<S, A, L, M> Branch for Node<'_, S, A, L, M>
where
    S: Split,
    A: Send,
    L: Fn(usize, usize, S) -> A + Sync,
    M: Fn(A, A) -> A + Sync,
{
    fn leaf(&mut self, first: usize, len: usize) {
        let State::Todo(items) = std::mem::replace(&mut self.state, State::Begun) else {
            not_done()
        };
        self.state = State::Done((self.leaf)(first, len, items));
    }

    fn split(&mut self, mid: usize) -> [&mut dyn Branch; 2] {
        let State::Todo(items) = std::mem::replace(&mut self.state, State::Begun) else {
            not_done()
        };
        let (left, right) = items.split(mid);
        let node = |items| Self::new(items, self.leaf, self.merge);
        self.state = State::Split(Box::new([node(left), node(right)]));
        match &mut self.state {
            State::Split(nodes) => {
                let [left, right] = &mut **nodes;
                [left, right]
            }
            _ => not_done(),
        }
    }

    fn merge(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Begun) {
            State::Split(nodes) => {
                let [mut left, mut right] = *nodes;
                left.merge();
                right.merge();
                State::Done((self.merge)(left.into_result(), right.into_result()))
            }
            state => state,
        };
    }
}

/// Apart, so that what is not shared out has nothing to do with it.
#[inline(never)]
fn share_out(len: usize, cut: &Cut, root: &mut dyn Branch) {
    match Threads::now() {
        Threads::Callers => alone(0, len, cut, root),
        Threads::Pool => in_pool(0, len, cut, root),
        Threads::Team(team) => in_team(team, len, cut, root),
    }
}

/// The number of threads that work at a time, of those that a call by this thread would have.
pub fn num_threads() -> usize {
    match Threads::now() {
        Threads::Callers => 1,
        Threads::Pool => rayon::current_num_threads(),
        Threads::Team(team) => {
            let count = AtomicUsize::new(0);
            run(team, &|| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            count.into_inner()
        }
    }
}

/// Has several threads call `work(state)`, the caller's among them, and returns when all those calls
/// have: `GOMP_parallel` of the OpenMP runtimes is such a function. `threads` and `flags` are 0: the
/// number of threads is the team's to choose.
pub type Team = unsafe extern "C" fn(
    work: unsafe extern "C" fn(*mut c_void),
    state: *mut c_void,
    threads: c_uint,
    flags: c_uint,
);

/// The team in use, as an address, and the process that it was lent in.
static TEAM: AtomicUsize = AtomicUsize::new(0);
static TEAM_PROCESS: AtomicUsize = AtomicUsize::new(0);

/// From now on uses the threads of the program's team, or again the pool: two sets of threads that both
/// wait for work by spinning would take the cores from each other. Returns the team so far.
///
/// # Safety
/// The team does what [`Team`] says, and can be called from any thread.
pub unsafe fn use_team(team: Option<Team>) -> Option<Team> {
    TEAM_PROCESS.store(process::id() as usize, Ordering::Relaxed);
    as_team(TEAM.swap(team.map_or(0, |team| team as usize), Ordering::AcqRel))
}

/// The team whose address is stored in [`TEAM`].
fn as_team(address: usize) -> Option<Team> {
    // SAFETY: null is none, and all else was stored as a team.
    unsafe { std::mem::transmute::<usize, Option<Team>>(address) }
}

/// Who does the work of a call.
enum Threads {
    Callers,
    Pool,
    Team(Team),
}

thread_local! {
    /// Whether this thread does a part of a team's work, which it does alone.
    static IN_TEAM: Cell<bool> = const { Cell::new(false) };
}

impl Threads {
    fn now() -> Self {
        if IN_TEAM.get() {
            return Self::Callers;
        }
        if rayon::current_thread_index().is_some() {
            return Self::Pool;
        }
        // Of a process that forks, the child has the memory but not the threads.
        let process = process::id();
        match as_team(TEAM.load(Ordering::Acquire)) {
            None if pool_process() == Some(process) => Self::Pool,
            Some(team) if TEAM_PROCESS.load(Ordering::Relaxed) == process as usize => {
                Self::Team(team)
            }
            _ => Self::Callers,
        }
    }
}

/// The process that rayon's pool was started in, the first time by us; none if it could not be.
fn pool_process() -> Option<u32> {
    static STARTED_IN: OnceLock<Option<u32>> = OnceLock::new();
    *STARTED_IN.get_or_init(|| {
        let builder = rayon::ThreadPoolBuilder::new().num_threads(asked_for());
        match builder.build_global() {
            // The system gives no thread.
            Err(error) if error.source().is_some() => None,
            // An error without a source: the program has started it before us.
            _ => Some(process::id()),
        }
    })
}

/// Threads that OMP_NUM_THREADS asks for, as "4" or, with levels, "4,2"; 0 leaves it to rayon, which
/// looks at RAYON_NUM_THREADS and at the number of cores.
fn asked_for() -> usize {
    let of_openmp = std::env::var("OMP_NUM_THREADS").ok();
    let first = of_openmp.as_deref().and_then(|list| list.split(',').next()?.trim().parse().ok());
    let ours = std::env::var_os("RAYON_NUM_THREADS").is_some();
    first.filter(|_| !ours).unwrap_or(0)
}

/// Where the work of `len` items is cut in two, if they are more than `grain`.
fn middle(len: usize, grain: usize) -> Option<usize> {
    (len > grain).then(|| len.div_ceil(grain).div_ceil(2) * grain)
}

/// The tree, by this thread.
fn alone(first: usize, len: usize, cut: &Cut, node: &mut dyn Branch) {
    let Some(mid) = cut(first, len) else {
        return node.leaf(first, len);
    };
    let [left, right] = node.split(mid);
    alone(first, mid, cut, left);
    alone(first + mid, len - mid, cut, right);
    node.merge();
}

/// The tree, by rayon's threads.
fn in_pool(first: usize, len: usize, cut: &Cut, node: &mut dyn Branch) {
    let Some(mid) = cut(first, len) else {
        return node.leaf(first, len);
    };
    let [left, right] = node.split(mid);
    rayon::join(|| in_pool(first, mid, cut, left), || in_pool(first + mid, len - mid, cut, right));
    node.merge();
}

/// How often the work of a team is halved, at most: parts enough for many threads to end together.
const TEAM_LEVELS: u32 = 8;

/// A part of a team's work.
struct Part<'a> {
    first: usize,
    len: usize,
    node: &'a mut dyn Branch,
}

/// Cuts a part at most `levels` times, and appends what it becomes.
fn cut_into<'a>(parts: &mut Vec<Mutex<Part<'a>>>, levels: u32, part: Part<'a>, cut: &Cut) {
    let Part { first, len, node } = part;
    let Some(mid) = cut(first, len).filter(|_| levels > 0) else {
        return parts.push(Mutex::new(Part { first, len, node }));
    };
    let [left, right] = node.split(mid);
    cut_into(parts, levels - 1, Part { first, len: mid, node: left }, cut);
    cut_into(parts, levels - 1, Part { first: first + mid, len: len - mid, node: right }, cut);
}

/// The tree, by a team: its upper levels are cut beforehand, and merged afterwards.
fn in_team(team: Team, len: usize, cut: &Cut, root: &mut dyn Branch) {
    let mut parts = Vec::new();
    cut_into(&mut parts, TEAM_LEVELS, Part { first: 0, len, node: root }, cut);
    let next = AtomicUsize::new(0);
    run(team, &|| {
        while let Some(part) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut part = part.lock().unwrap_or_else(PoisonError::into_inner);
            alone(part.first, part.len, cut, &mut *part.node);
        }
    });
    root.merge();
}

/// Has the threads of a team do the work. A panic stays in its thread: it must not unwind through the
/// team, and what it was about is not done.
fn run<F: Fn() + Sync>(team: Team, work: &F) {
    unsafe extern "C" fn call<F: Fn()>(state: *mut c_void) {
        // SAFETY: `run` waits for all calls, and gave the address of its work.
        let work = unsafe { &*state.cast_const().cast::<F>() };
        IN_TEAM.set(true);
        let _ = catch_unwind(AssertUnwindSafe(work));
        IN_TEAM.set(false);
    }
    // SAFETY: by `use_team` it does what it should; the work may be done by several threads.
    unsafe { team(call::<F>, std::ptr::from_ref(work).cast_mut().cast(), 0, 0) };
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

    /// A team of as many threads, of which one is the caller's.
    unsafe extern "C" fn team<const THREADS: usize>(
        work: unsafe extern "C" fn(*mut c_void),
        state: *mut c_void,
        _threads: c_uint,
        _flags: c_uint,
    ) {
        let state = state as usize;
        std::thread::scope(|scope| {
            for _ in 1..THREADS {
                scope.spawn(move || unsafe { work(state as *mut c_void) });
            }
            unsafe { work(state as *mut c_void) };
        });
    }

    #[test]
    fn a_team_does_the_same_work_once() {
        let values: Vec<f32> = (0..100_000).map(|i| ((i * 7919) as f32).sin()).collect();
        let sum = |grain: usize| {
            let leaf = |first: usize, _, part: &[f32]| {
                // What is parallel within it is the thread's own.
                let sum = |_, _, part: &[f32]| part.iter().sum::<f32>();
                reduce(part.len(), 10, part, sum, |a, b| a + b) + first as f32
            };
            reduce(values.len(), grain, values.as_slice(), leaf, |a: f32, b: f32| a - b)
        };
        let with = |team: Option<Team>, grain| {
            // SAFETY: these are teams.
            unsafe { use_team(team) };
            let result = sum(grain).to_bits();
            unsafe { use_team(None) };
            result
        };
        for grain in [1, 3, 1000, 30_000, 99_999] {
            let alone = with(None, grain);
            for team in [team::<1> as Team, team::<2>, team::<5>] {
                assert_eq!(with(Some(team), grain), alone);
            }
        }
        unsafe { use_team(Some(team::<5>)) };
        let count = num_threads();
        let failed = catch_unwind(|| {
            for_each(100, 1, (), |first, _, ()| assert!(first != 70, "on purpose"));
        });
        unsafe { use_team(None) };
        assert_eq!(count, 5);
        assert!(failed.is_err());
        assert!(num_threads() > 0 && !IN_TEAM.get());
    }

    #[test]
    fn a_panic_of_a_leaf_or_a_merge_arrives() {
        let leaf = |first: usize, _, ()| assert!(first != 70, "of a leaf");
        let sum = |at: usize| {
            reduce(
                100,
                1,
                (),
                |first, _, ()| first,
                |a, b| {
                    assert!(b != at, "of a merge");
                    a + b
                },
            )
        };
        for pool in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(pool).build().unwrap();
            let of = |failed: Result<(), Box<dyn std::any::Any + Send>>| {
                *failed.unwrap_err().downcast::<&str>().unwrap()
            };
            let failed = |work: &(dyn Fn() + Sync)| {
                of(catch_unwind(AssertUnwindSafe(|| pool.install(work))))
            };
            assert_eq!(failed(&|| for_each(100, 1, (), leaf)), "of a leaf");
            assert_eq!(failed(&|| assert!(sum(71) > 0)), "of a merge");
        }
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
