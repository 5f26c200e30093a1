//! Times on the device's own clock.

use cudarc::driver::{result, sys};

use crate::gpu::{Buffer, Gpu};

pub fn describe(gpu: &Gpu) -> String {
    let mut driver = 0;
    // SAFETY: writes one number.
    unsafe { sys::cuDriverGetVersion(&mut driver) };
    let (major, minor) = gpu.stream().device().compute_capability;
    let name = gpu.context.name().unwrap_or_default();
    let (version, patch) = (driver / 1000, driver % 1000 / 10);
    format!("{name}, compute capability {major}.{minor}, driver for CUDA {version}.{patch}")
}

/// Bytes read and written a second, in GB, by a copy within the device.
pub fn copy_bandwidth(gpu: &Gpu) -> f64 {
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
pub fn seconds(gpu: &Gpu, mut launch: impl FnMut()) -> f64 {
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
