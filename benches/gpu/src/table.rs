//! The table, and the device's own clock.

use cudarc::driver::{result, sys, CudaGraph, DriverError};
use ppo_kernels::cuda::{force_wide, Stream};

use crate::arguments::Arguments;
use crate::gpu::{Buffer, Gpu};

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Pass {
    LogprobForward,
    LogprobBackward,
    LogprobEntropyForward,
    LogprobEntropyBackward,
    LogitsPpoLoss,
    FullKlForward,
    FullKlBackward,
    TokenKlForward,
    TokenKlBackward,
    Gae,
    GaeShaped,
    Advantages,
    AdvantagesByIds,
    Moments,
    Whiten,
    WhitenBackward,
    Correction,
    CorrectionOfRows,
    PpoLoss,
}

impl Pass {
    pub fn name(self) -> &'static str {
        match self {
            Pass::LogprobForward => "logprob forward",
            Pass::LogprobBackward => "logprob backward",
            Pass::LogprobEntropyForward => "logprob + entropy forward",
            Pass::LogprobEntropyBackward => "logprob + entropy backward",
            Pass::LogitsPpoLoss => "PPO loss and gradient from logits",
            Pass::FullKlForward => "exact KL forward",
            Pass::FullKlBackward => "exact KL backward",
            Pass::TokenKlForward => "sampled KL forward",
            Pass::TokenKlBackward => "sampled KL backward",
            Pass::Gae => "GAE",
            Pass::GaeShaped => "GAE with shaping, mask, moments",
            Pass::Advantages => "advantages, groups of 8, mask",
            Pass::AdvantagesByIds => "advantages, groups by ids, mask",
            Pass::Moments => "moments, mask",
            Pass::Whiten => "whiten by known moments, mask",
            Pass::WhitenBackward => "whiten backward, mask",
            Pass::Correction => "correction, mask",
            Pass::CorrectionOfRows => "correction, rows rejected, mask",
            Pass::PpoLoss => "PPO loss forward + backward, mask",
        }
    }
}

/// What an op works on.
#[derive(Clone, Copy)]
pub struct Shape {
    pub dtype: &'static str,
    pub rows: usize,
    pub columns: usize,
}

pub struct Table {
    gpu: &'static Gpu,
    arguments: Arguments,
    /// GB/s of a copy.
    copy: f64,
}

impl Table {
    /// Prints what stands above the rows.
    pub fn new(gpu: &'static Gpu, arguments: Arguments) -> Self {
        println!("{}", describe(gpu));
        if let Some(wide) = arguments.wide {
            let how = if wide { "side by side" } else { "one after the other" };
            println!("parts of a row {how}");
        }
        force_wide(arguments.wide);
        let copy = copy_bandwidth(gpu);
        println!("copy, read + written: {copy:.0} GB/s");
        if !arguments.device_only {
            println!("\n| pass | dtype | shape | us | GB/s | of copy | from L2, us | candle, us |");
            println!("|---|---|---|--:|--:|--:|--:|--:|");
        }
        Self { gpu, arguments, copy }
    }

    /// What to launch on.
    pub fn stream(&self) -> Stream<'static> {
        self.gpu.stream()
    }

    /// Whether one of the passes is to be measured: for others no inputs are made.
    pub fn wants(&self, passes: &[Pass], dtype: &str) -> bool {
        passes.iter().any(|pass| self.arguments.wants(pass.name(), dtype))
    }

    /// The buffers of a shape of which a pass moves `bytes` or more. Where they could stay in the L2
    /// cache there are several sets, which take turns and together are too large for it.
    pub fn sets<S>(&self, bytes: usize, make: impl FnMut() -> S) -> Vec<S> {
        std::iter::repeat_with(make).take(set_count(bytes)).collect()
    }

    /// Prints the row of a pass that moves at least so many bytes: its time with buffers that come from
    /// memory, and with those that stay in the L2 cache.
    pub fn row<S>(
        &self,
        pass: Pass,
        shape: Shape,
        bytes: usize,
        sets: &mut [S],
        mut launch: impl FnMut(&mut S),
    ) {
        if !self.wants(&[pass], shape.dtype) {
            return;
        }
        let mut measure = |sets: &mut [S]| seconds(self.gpu, sets.len(), |i| launch(&mut sets[i]));
        let seconds = measure(sets);
        let from_cache = (sets.len() > 1).then(|| measure(&mut sets[..1]));
        let rate = bytes as f64 / seconds * 1e-9;
        let share = 100.0 * rate / self.copy;
        let us = |seconds: Option<f64>| seconds.map_or("-".into(), |s| format!("{:.1}", s * 1e6));
        let Shape { dtype, rows, columns } = shape;
        let row = format!("{} | {dtype} | {rows} x {columns}", pass.name());
        let (time, warm, candle) = (us(Some(seconds)), us(from_cache), us(candle(pass, shape)));
        println!("| {row} | {time} | {rate:.0} | {share:.0} % | {warm} | {candle} |");
    }
}

/// Below this, buffers are taken to stay in the L2 cache, of 40 to 126 MB, from one launch to the next.
const IN_CACHE: usize = 100_000_000;

/// What all sets together move at least, unless they would be too many.
const BEYOND_CACHE: usize = 400_000_000;

fn set_count(bytes: usize) -> usize {
    if bytes >= IN_CACHE {
        return 1;
    }
    BEYOND_CACHE.div_ceil(bytes.max(1)).min(256)
}

/// The time of candle's ops for the same, if they are there.
#[cfg(feature = "candle")]
fn candle(pass: Pass, shape: Shape) -> Option<f64> {
    crate::beside::seconds(pass, shape)
}

#[cfg(not(feature = "candle"))]
fn candle(_: Pass, _: Shape) -> Option<f64> {
    None
}

fn describe(gpu: &Gpu) -> String {
    let mut driver = 0;
    // SAFETY: writes one number.
    unsafe { sys::cuDriverGetVersion(&mut driver) };
    let (major, minor) = gpu.stream().device().compute_capability;
    let name = gpu.context.name().unwrap_or_default();
    let (version, patch) = (driver / 1000, driver % 1000 / 10);
    format!("{name}, compute capability {major}.{minor}, driver for CUDA {version}.{patch}")
}

/// Bytes read and written a second, in GB, by a copy within the device.
fn copy_bandwidth(gpu: &Gpu) -> f64 {
    let bytes = 2 << 30;
    let buffers = [(); 2].map(|()| Buffer::<u8>::uninit(bytes, 0));
    let [from, to] = [0, 1].map(|i| buffers[i].at(0));
    let stream = gpu.cuda_stream.cu_stream();
    let seconds = seconds(gpu, 1, |_| {
        // SAFETY: both have so many bytes.
        unsafe { result::memcpy_dtod_async(to, from, bytes, stream) }.unwrap();
    });
    2.0 * bytes as f64 / seconds * 1e-9
}

/// Below this the host may need longer for a launch than the device for what it launches.
const SHORT: f64 = 200e-6;

/// Launches between two looks at the clock, at least, and such looks, of what is short and of all else.
/// A single launch would be timed with its start and its end.
const SHORT_BURST: (usize, usize) = (20, 25);
const BURST: (usize, usize) = (4, 7);

/// The median time of one call of `launch`, which is given the numbers of the sets in turn; what is
/// short is launched by the device itself, from a graph.
fn seconds(gpu: &Gpu, sets: usize, mut launch: impl FnMut(usize)) -> f64 {
    let mut burst = |launches: usize| (0..launches).for_each(|i| launch(i % sets));
    // The first launch loads the kernel.
    burst(2);
    let estimate = median(gpu, 3, || burst(1));
    if estimate > SHORT {
        let (launches, samples) = BURST;
        return median(gpu, samples, || burst(launches)) / launches as f64;
    }
    let (launches, samples) = SHORT_BURST;
    let launches = launches.next_multiple_of(sets);
    let seconds = match graph(gpu, || burst(launches)) {
        Ok(graph) => {
            graph.launch().unwrap();
            median(gpu, samples, || graph.launch().unwrap())
        }
        Err(error) => {
            eprintln!("no graph, so the host's time counts: {error}");
            median(gpu, samples, || burst(launches))
        }
    };
    seconds / launches as f64
}

fn graph(gpu: &Gpu, launches: impl FnOnce()) -> Result<CudaGraph, DriverError> {
    let stream = &gpu.cuda_stream;
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    launches();
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0))?;
    graph.ok_or(DriverError(sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED))
}

/// The median time of so many calls, by the device's clock.
fn median(gpu: &Gpu, samples: usize, mut launch: impl FnMut()) -> f64 {
    let stream = gpu.cuda_stream.cu_stream();
    let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap();
    let (start, end) = (event(), event());
    let mut times: Vec<f64> = (0..samples)
        .map(|_| {
            // SAFETY: events and stream live.
            unsafe {
                result::event::record(start, stream).unwrap();
                launch();
                result::event::record(end, stream).unwrap();
                result::event::synchronize(end).unwrap();
                f64::from(result::event::elapsed(start, end).unwrap()) * 1e-3
            }
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::{set_count, BEYOND_CACHE, IN_CACHE};

    #[test]
    fn what_fits_the_cache_has_sets_that_do_not() {
        assert_eq!(set_count(IN_CACHE), 1);
        for bytes in [IN_CACHE - 1, 50_000_000, 2_000_000] {
            assert!(set_count(bytes) > 1 && set_count(bytes) * bytes >= BEYOND_CACHE, "{bytes}");
        }
        assert_eq!(set_count(0), 256);
    }
}
