//! The table, and the device's own clock.

use cudarc::driver::{result, sys, CudaGraph, DriverError};
use ppo_kernels::cuda::{Device, Stream};

use crate::gpu::{Buffer, Gpu};

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Pass {
    LogprobForward,
    LogprobBackward,
    LogprobEntropyForward,
    LogprobEntropyBackward,
    FullKlForward,
    FullKlBackward,
    TokenKlForward,
    TokenKlBackward,
    Gae,
    GaeShaped,
    Moments,
    Whiten,
    WhitenBackward,
    PpoLoss,
}

impl Pass {
    pub fn name(self) -> &'static str {
        match self {
            Pass::LogprobForward => "logprob forward",
            Pass::LogprobBackward => "logprob backward",
            Pass::LogprobEntropyForward => "logprob + entropy forward",
            Pass::LogprobEntropyBackward => "logprob + entropy backward",
            Pass::FullKlForward => "exact KL forward",
            Pass::FullKlBackward => "exact KL backward",
            Pass::TokenKlForward => "sampled KL forward",
            Pass::TokenKlBackward => "sampled KL backward",
            Pass::Gae => "GAE",
            Pass::GaeShaped => "GAE with shaping, mask, moments",
            Pass::Moments => "moments, mask",
            Pass::Whiten => "whiten by known moments, mask",
            Pass::WhitenBackward => "whiten backward, mask",
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

/// What is asked for.
#[derive(Default)]
pub struct Arguments {
    /// Part of a pass's name: of others nothing is measured.
    pub only: String,
    /// Whether the parts of a row are merged by a launch of its own, as on chips without clusters.
    pub no_clusters: bool,
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
        if arguments.no_clusters {
            println!("without clusters");
        }
        let copy = copy_bandwidth(gpu);
        println!("copy, read + written: {copy:.0} GB/s");
        println!("\n| pass | dtype | shape | us | GB/s | of copy | candle, us |");
        println!("|---|---|---|--:|--:|--:|--:|");
        Self { gpu, arguments, copy }
    }

    /// What to launch on.
    pub fn stream(&self) -> Stream<'static> {
        let stream = self.gpu.stream();
        let clusters = !self.arguments.no_clusters;
        stream.limited_to(Device { clusters, ..stream.device() })
    }

    /// Prints the row of a pass that moves at least so many bytes. Where they fit into the L2 cache its
    /// share of a copy can be above 100 %.
    pub fn row(&self, pass: Pass, shape: Shape, bytes: usize, launch: impl FnMut()) {
        if !pass.name().contains(&self.arguments.only) {
            return;
        }
        let seconds = seconds(self.gpu, launch);
        let rate = bytes as f64 / seconds * 1e-9;
        let (us, share) = (seconds * 1e6, 100.0 * rate / self.copy);
        let Shape { dtype, rows, columns } = shape;
        let row = format!("{} | {dtype} | {rows} x {columns}", pass.name());
        let candle =
            candle(pass, shape).map_or("-".into(), |seconds| format!("{:.1}", seconds * 1e6));
        println!("| {row} | {us:.1} | {rate:.0} | {share:.0} % | {candle} |");
    }
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
    let seconds = seconds(gpu, || {
        // SAFETY: both have so many bytes.
        unsafe { result::memcpy_dtod_async(to, from, bytes, stream) }.unwrap();
    });
    2.0 * bytes as f64 / seconds * 1e-9
}

/// Below this the host may need longer for a launch than the device for what it launches.
const SHORT: f64 = 200e-6;

/// Launches of what is short between two looks at the clock.
const BURST: usize = 20;

/// The median time of one call of `launch`; what is short is launched by the device itself, from a
/// graph, many times one after the other.
fn seconds(gpu: &Gpu, mut launch: impl FnMut()) -> f64 {
    (0..3).for_each(|_| launch());
    let seconds = median(gpu, &mut launch);
    if seconds > SHORT {
        return seconds;
    }
    let burst = || (0..BURST).for_each(|_| launch());
    match graph(gpu, burst) {
        Ok(graph) => median(gpu, || graph.launch().unwrap()) / BURST as f64,
        Err(error) => {
            eprintln!("no graph, so the host's time counts: {error}");
            seconds
        }
    }
}

fn graph(gpu: &Gpu, launches: impl FnOnce()) -> Result<CudaGraph, DriverError> {
    let stream = &gpu.cuda_stream;
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    launches();
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0))?;
    graph.ok_or(DriverError(sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED))
}

fn median(gpu: &Gpu, mut launch: impl FnMut()) -> f64 {
    let stream = gpu.cuda_stream.cu_stream();
    let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap();
    let (start, end) = (event(), event());
    let mut times: Vec<f64> = (0..25)
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
