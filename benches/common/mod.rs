//! What the benches of all ops share: the three functions of a group, the memory traffic that bounds
//! a pass, and inputs from fixed seeds.
//!
//! A group is `OP_PASS/DTYPE_SHAPE`, and does one piece of work three ways:
//!
//! - `fused`: this crate;
//! - `candle`: what is written with candle's own ops today, with its autograd where the pass is a
//!   backward;
//! - `limit`: the least memory traffic that the pass can do with, in vectorised loops on all threads
//!   that compute next to nothing, in memory that is already there. It asks for memory ahead and
//!   writes past the caches where that is faster.
//!
//! Before anything is timed, `fused` and `candle` are run once and compared, so that it is the same
//! work. With `--quick` the larger ones of the sizes that show linear cost are left out.
//!
//! With the feature `cuda` the groups that go through candle run on the first GPU, each call until the
//! device has ended, and the limit is a copy there. Those on slices are of the CPU; benches/gpu
//! measures the kernels in their place.
#![allow(dead_code)] // each bench uses its own part

pub mod compositions;
pub mod minibatch;
pub mod pack;

use std::hint::black_box;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use approx::abs_diff_eq;
use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, SamplingMode, Throughput};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;

/// One walk over memory, in bytes.
#[derive(Clone, Copy)]
pub struct Walk {
    pub read: usize,
    pub write: usize,
}

/// Where the tensors are.
pub fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| match cfg!(feature = "cuda") {
        true => Device::new_cuda(0).expect("the feature `cuda` is measured on a GPU"),
        false => Device::Cpu,
    })
}

/// [`compare`] where `fused` is a function on slices, unless the tensors are elsewhere.
pub fn on_cpu<Fused, Candle, F, C>(
    criterion: &mut Criterion,
    pass: &str,
    shape: &str,
    walks: &[Walk],
    setup: impl FnOnce() -> (Fused, Candle),
) where
    Fused: FnMut() -> F,
    Candle: FnMut() -> C,
{
    if device().is_cpu() {
        compare(criterion, pass, shape, walks, setup);
    }
}

/// The group `pass/shape`. `walks` is the least traffic of the pass; `setup` makes the inputs, checks
/// that both agree, and returns `fused` and `candle`. It runs only if the group is asked for.
pub fn compare<Fused, Candle, F, C>(
    criterion: &mut Criterion,
    pass: &str,
    shape: &str,
    walks: &[Walk],
    setup: impl FnOnce() -> (Fused, Candle),
) where
    Fused: FnMut() -> F,
    Candle: FnMut() -> C,
{
    let bytes: usize = walks.iter().map(|walk| walk.read + walk.write).sum();
    // Some cases of candle take a second a call.
    let slow = bytes > 8 << 20;
    let mut group = criterion.benchmark_group(format!("{pass}/{shape}"));
    group.throughput(Throughput::Bytes(bytes as u64));
    group.warm_up_time(Duration::from_millis(300));
    // Of the short form it is the longest that a function is run, however noisy.
    group.measurement_time(Duration::from_millis(if quick() { 150 } else { 2000 }));
    group.sample_size(40);
    if slow {
        group.sampling_mode(SamplingMode::Flat);
    }

    // Made by the first of the two that the command line's filter lets run.
    let (mut setup, mut work) = (Some(setup), None);
    let mut prepare = move || setup.take().expect("asked for once")();
    group.bench_function("fused", |bencher| {
        let (fused, _) = work.get_or_insert_with(&mut prepare);
        bencher.iter(|| ended(fused()));
    });
    group.bench_function("limit", |bencher| {
        if device().is_cpu() {
            let mut limit = Limit::new(walks);
            bencher.iter(|| limit.run());
        } else {
            // Half of it read, half of it written.
            let half = Tensor::zeros(bytes.div_ceil(2), DType::U8, device()).unwrap();
            bencher.iter(|| ended(half.copy().unwrap()));
        }
    });
    if slow {
        group.sample_size(10);
    }
    group.bench_function("candle", |bencher| {
        let (_, candle) = work.get_or_insert_with(&mut prepare);
        bencher.iter(|| ended(candle()));
    });
    group.finish();
}

/// What was computed, once the device has computed it.
fn ended<T>(computed: T) -> T {
    device().synchronize().unwrap();
    computed
}

/// Whether this is the short form, `cargo bench -- --quick`.
pub fn quick() -> bool {
    std::env::args().any(|arg| arg == "--quick")
}

/// Panics if candle's composition and ours are not the same work: if any element differs by more
/// than `tolerance` times 1 + its magnitude.
#[track_caller]
pub fn agree(what: &str, fused: &[f32], candle: &[f32], tolerance: f32) {
    assert_eq!(fused.len(), candle.len(), "{what}: lengths differ");
    for (i, (f, c)) in fused.iter().zip(candle).enumerate() {
        let close = abs_diff_eq!(f, c, epsilon = tolerance * (1.0 + c.abs()));
        assert!(close, "{what}: element {i} is {f}, and {c} by candle");
    }
}

/// [`agree`] for tensors of any dtype and shape.
#[track_caller]
pub fn tensors_agree(what: &str, fused: &Tensor, candle: &Tensor, tolerance: f32) {
    assert_eq!(fused.dims(), candle.dims(), "{what}: shapes differ");
    agree(what, &to_vec(fused), &to_vec(candle), tolerance);
}

/// The elements of a tensor in f32.
pub fn to_vec(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

/// As much memory as a cache holds in one piece.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u64; 8]);

/// Memory that is walked over and nothing else.
struct Limit {
    source: Vec<Line>,
    target: Vec<Line>,
    walks: Vec<Walk>,
    kind: Kind,
}

/// What can be done for a loop over memory. What helps depends on the machine, and on whether the
/// memory fits into its caches.
#[derive(Clone, Copy)]
struct Kind {
    /// Asks for lines before they are read.
    ahead: bool,
    stores: Stores,
}

#[derive(Clone, Copy, PartialEq)]
enum Stores {
    Cached,
    /// Past the caches, which otherwise read what they are about to write; 16 bytes at a time.
    Past,
    /// The same, a line at a time. The machine has AVX-512.
    PastByLines,
}

impl Stores {
    fn are_here(&self) -> bool {
        #[cfg(all(target_arch = "x86_64", ppo_avx512))]
        let by_lines = is_x86_feature_detected!("avx512f");
        #[cfg(not(all(target_arch = "x86_64", ppo_avx512)))]
        let by_lines = false;
        by_lines || *self != Self::PastByLines
    }
}

/// All kinds that this machine has.
fn kinds() -> Vec<Kind> {
    let stores = [Stores::Cached, Stores::Past, Stores::PastByLines];
    let kinds = |stores| [false, true].map(|ahead| Kind { ahead, stores });
    stores.into_iter().filter(Stores::are_here).flat_map(kinds).collect()
}

impl Limit {
    /// Of the fastest kind.
    fn new(walks: &[Walk]) -> Self {
        let room = |bytes: fn(&Walk) -> usize| {
            // Not zeros, which the kernel would hand out without memory behind them.
            vec![Line([1; 8]); walks.iter().map(bytes).max().unwrap_or(0).div_ceil(64)]
        };
        let walks = walks.to_vec();
        let kinds = kinds();
        let mut limit =
            Self { source: room(|w| w.read), target: room(|w| w.write), walks, kind: kinds[0] };
        let mut fastest = vec![Duration::MAX; kinds.len()];
        for _ in 0..8 {
            for (&kind, fastest) in kinds.iter().zip(&mut fastest) {
                limit.kind = kind;
                let start = Instant::now();
                black_box(limit.run());
                *fastest = start.elapsed().min(*fastest);
            }
        }
        let best = fastest.into_iter().zip(kinds).min_by_key(|(time, _)| *time);
        limit.kind = best.expect("there are some").1;
        limit
    }

    fn run(&mut self) -> u64 {
        let mut sum = 0;
        for walk in &self.walks {
            let source = &self.source[..walk.read.div_ceil(64)];
            let target = &mut self.target[..walk.write.div_ceil(64)];
            sum += stream(source, target, self.kind);
        }
        sum
    }
}

/// Reads one and writes the other in step, in parallel; returns a sum, so that nothing is left out.
fn stream(source: &[Line], target: &mut [Line], kind: Kind) -> u64 {
    // 256 KiB: far larger than the cost of a task.
    const PIECE: usize = 4096;
    if source.len().max(target.len()) <= PIECE {
        return pulp::Arch::new().dispatch(
            #[inline(always)]
            || match kind.ahead {
                false => stream_piece::<false>(source, target, kind.stores),
                true => stream_piece::<true>(source, target, kind.stores),
            },
        );
    }
    let (left, right) = source.split_at(source.len() / 2);
    let (left_out, right_out) = target.split_at_mut(target.len() / 2);
    let (a, b) = rayon::join(|| stream(left, left_out, kind), || stream(right, right_out, kind));
    a.wrapping_add(b)
}

#[inline(always)]
fn stream_piece<const AHEAD: bool>(source: &[Line], target: &mut [Line], stores: Stores) -> u64 {
    // 1 KiB at a time, so that reads and writes are under way together.
    let blocks = source.len().max(target.len()).div_ceil(16).max(1);
    let a_block = |len: usize| len.div_ceil(blocks).max(1);
    let mut targets = target.chunks_mut(a_block(target.len()));
    // Enough independent sums that the loads are waited for, and not the additions.
    let mut sums = [[0_u64; 8]; 4];
    for (block, lines) in source.chunks(a_block(source.len())).enumerate() {
        let (chunks, rest) = lines.as_chunks::<4>();
        for chunk in chunks {
            for (sum, line) in sums.iter_mut().zip(chunk) {
                add::<AHEAD>(sum, line);
            }
        }
        for line in rest {
            add::<AHEAD>(&mut sums[0], line);
        }
        write(targets.next().unwrap_or_default(), block as u64, stores);
    }
    targets.for_each(|lines| write(lines, 1, stores));
    #[cfg(target_arch = "x86_64")]
    if stores != Stores::Cached {
        // SAFETY: of every x86-64. Writes past the caches are in no order until then.
        unsafe { std::arch::x86_64::_mm_sfence() };
    }
    sums.iter().flatten().fold(0, |a: u64, b| a.wrapping_add(*b))
}

#[inline(always)]
fn add<const AHEAD: bool>(sum: &mut [u64; 8], line: &Line) {
    if AHEAD {
        ask_for(line, 64);
    }
    for (sum, x) in sum.iter_mut().zip(line.0) {
        *sum = sum.wrapping_add(x);
    }
}

#[inline(always)]
fn ask_for(line: &Line, lines_ahead: isize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        let address = std::ptr::from_ref(line).wrapping_offset(lines_ahead).cast();
        // SAFETY: a prefetch reads nothing, and of an address that is not mapped it does nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (line, lines_ahead);
}

#[inline(always)]
fn write(lines: &mut [Line], x: u64, stores: Stores) {
    #[cfg(all(target_arch = "x86_64", ppo_avx512))]
    if stores == Stores::PastByLines {
        // SAFETY: it is a kind only where there is AVX-512.
        return unsafe { write_by_lines(lines, x) };
    }
    for line in lines {
        #[cfg(target_arch = "x86_64")]
        if stores == Stores::Past {
            use std::arch::x86_64::{__m128i, _mm_set1_epi64x, _mm_stream_si128};
            let quarters = std::ptr::from_mut(line).cast::<__m128i>();
            for i in 0..4 {
                // SAFETY: four quarters of 16 bytes are the line, which is aligned.
                unsafe { _mm_stream_si128(quarters.add(i), _mm_set1_epi64x(x as i64)) };
            }
            continue;
        }
        line.0 = [x; 8];
    }
}

/// # Safety
/// The machine must have AVX-512.
#[cfg(all(target_arch = "x86_64", ppo_avx512))]
#[allow(clippy::incompatible_msrv)] // only where Rust has it
#[target_feature(enable = "avx512f")]
unsafe fn write_by_lines(lines: &mut [Line], x: u64) {
    use std::arch::x86_64::{_mm512_set1_epi64, _mm512_stream_si512};
    for line in lines {
        // SAFETY: a line is aligned.
        unsafe {
            _mm512_stream_si512(std::ptr::from_mut(line).cast(), _mm512_set1_epi64(x as i64))
        };
    }
}

/// A generator with a fixed seed.
pub fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// `n` values drawn evenly from `center - spread .. center + spread`.
pub fn uniform(rng: &mut StdRng, n: usize, center: f32, spread: f32) -> Vec<f32> {
    (0..n).map(|_| center + rng.random_range(-1.0..1.0) * spread).collect()
}

/// Logits as language models make them: a bell of width 2, and a few tokens far above it.
pub fn logits(rows: usize, vocab: usize, seed: u64) -> Vec<f32> {
    let mut logits = vec![0.0; rows * vocab];
    logits.par_chunks_mut(vocab).enumerate().for_each(|(row, logits)| {
        let mut rng = rng(seed + row as u64);
        for z in logits.iter_mut() {
            // Four of sixteen bits each: near enough to normal.
            let bits: u64 = rng.random();
            let sum: u64 = (0..4).map(|i| bits >> (16 * i) & 0xffff).sum();
            *z = (sum as f32 / 65536.0 - 2.0) * 3.5;
        }
        for height in [12.0, 11.0, 9.0, 8.0] {
            logits[rng.random_range(0..vocab)] = height;
        }
    });
    logits
}

/// A target a row: the likeliest token of every other row, any token of the rest.
pub fn targets(logits: &[f32], vocab: usize, seed: u64) -> Vec<i64> {
    let mut rng = rng(seed);
    let mut any = || rng.random_range(0..vocab) as i64;
    let likeliest = |row: &[f32]| {
        row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(i, _)| i as i64)
    };
    let rows = logits.chunks(vocab).enumerate();
    rows.map(|(i, row)| if i % 2 == 0 { likeliest(row) } else { any() }).collect()
}

/// A tensor of values rounded to `dtype`.
pub fn tensor(values: Vec<f32>, shape: &[usize], dtype: DType) -> Tensor {
    Tensor::from_vec(values, shape, device()).unwrap().to_dtype(dtype).unwrap()
}

/// Responses of at least half of `seq_len`, padded on the right: the mask `[batch * seq_len]`, 0 in
/// the padding, and each row's last token.
pub fn padding(rng: &mut StdRng, batch: usize, seq_len: usize) -> (Vec<u8>, Vec<u32>) {
    let lengths: Vec<usize> =
        (0..batch).map(|_| rng.random_range(seq_len.div_ceil(2)..=seq_len)).collect();
    let row = |&length: &usize| (0..seq_len).map(move |t| u8::from(t < length));
    (lengths.iter().flat_map(row).collect(), lengths.iter().map(|&l| l as u32 - 1).collect())
}
