//! The table, and the device's own clock.

use cudarc::driver::{result, sys};

use crate::gpu::{Buffer, Gpu};

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Pass {
    LogprobForward,
    LogprobEntropyForward,
    LogprobEntropyBackward,
    FullKlForward,
    FullKlBackward,
    TokenKlForward,
    Gae,
    GaeShaped,
    Whiten,
    PpoLoss,
}

impl Pass {
    fn name(self) -> &'static str {
        match self {
            Pass::LogprobForward => "logprob forward",
            Pass::LogprobEntropyForward => "logprob + entropy forward",
            Pass::LogprobEntropyBackward => "logprob + entropy backward",
            Pass::FullKlForward => "exact KL forward",
            Pass::FullKlBackward => "exact KL backward",
            Pass::TokenKlForward => "sampled KL forward",
            Pass::Gae => "GAE",
            Pass::GaeShaped => "GAE with shaping, mask, moments",
            Pass::Whiten => "whiten by known moments, mask",
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
    /// GB/s of a copy.
    copy: f64,
}

impl Table {
    /// Prints what stands above the rows.
    pub fn new(gpu: &'static Gpu) -> Self {
        println!("{}", describe(gpu));
        let copy = copy_bandwidth(gpu);
        println!("copy, read + written: {copy:.0} GB/s");
        println!("\n| pass | dtype | shape | us | GB/s | of copy | candle, us |");
        println!("|---|---|---|--:|--:|--:|--:|");
        Self { gpu, copy }
    }

    /// Prints the row of a pass that moves at least so many bytes. Where they fit into the L2 cache its
    /// share of a copy can be above 100 %.
    pub fn row(&self, pass: Pass, shape: Shape, bytes: usize, launch: impl FnMut()) {
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
    crate::beside::composition(pass, shape).map(crate::beside::seconds)
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

/// The median time of one call of `launch`.
fn seconds(gpu: &Gpu, mut launch: impl FnMut()) -> f64 {
    let stream = gpu.cuda_stream.cu_stream();
    let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap();
    let (start, end) = (event(), event());
    (0..3).for_each(|_| launch());
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
