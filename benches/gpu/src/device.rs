//! A device, its memory, and its clock.

use std::sync::Arc;

use cudarc::driver::{result, sys, CudaContext, CudaStream};
use ppo_kernels::cuda::{Slice, SliceMut, Stream};

pub struct Device {
    context: Arc<CudaContext>,
    cuda_stream: Arc<CudaStream>,
    /// The stream that everything is launched on.
    pub stream: Stream<'static>,
}

impl Device {
    pub fn new() -> ppo_kernels::Result<Self> {
        // First through the crate, whose error says what is missing.
        // SAFETY: null is the default stream.
        if let Err(error @ ppo_kernels::Error::CudaDriver { .. }) =
            unsafe { Stream::from_raw(std::ptr::null_mut()) }
        {
            return Err(error);
        }
        let context = CudaContext::new(0).expect("a first device");
        let cuda_stream = context.new_stream().expect("a stream");
        // SAFETY: the stream lives as long as `self`.
        let stream = unsafe { Stream::from_raw(cuda_stream.cu_stream().cast()) }?;
        Ok(Self { context, cuda_stream, stream })
    }

    pub fn describe(&self) -> String {
        let mut driver = 0;
        // SAFETY: writes one number.
        unsafe { sys::cuDriverGetVersion(&mut driver) };
        let (major, minor) = self.stream.device().compute_capability;
        let name = self.context.name().unwrap_or_default();
        let (version, patch) = (driver / 1000, driver % 1000 / 10);
        format!("{name}, compute capability {major}.{minor}, driver for CUDA {version}.{patch}")
    }

    pub fn finish(&self) {
        self.cuda_stream.synchronize().expect("no launch failed");
    }

    /// Bytes read and written a second, in GB, by a copy within the device.
    pub fn copy_bandwidth(&self) -> f64 {
        let bytes = 2 << 30;
        let (from, to) = (Memory::<u8>::new(bytes), Memory::<u8>::new(bytes));
        let stream = self.cuda_stream.cu_stream();
        let seconds = self.seconds(|| {
            // SAFETY: both have so many bytes.
            unsafe { result::memcpy_dtod_async(to.address, from.address, bytes, stream) }.unwrap();
        });
        2.0 * bytes as f64 / seconds * 1e-9
    }

    /// The median time of one call of `launch`.
    pub fn seconds(&self, launch: impl Fn()) -> f64 {
        let stream = self.cuda_stream.cu_stream();
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
}

/// Elements in device memory.
pub struct Memory<T> {
    address: sys::CUdeviceptr,
    /// Elements left free before the first, to misalign it.
    offset: usize,
    len: usize,
    element: std::marker::PhantomData<T>,
}

impl<T: Copy + Default> Memory<T> {
    /// Uninitialised memory.
    pub fn new(len: usize) -> Self {
        Self::at_offset(len, 0)
    }

    fn at_offset(len: usize, offset: usize) -> Self {
        let bytes = ((len + offset) * size_of::<T>()).max(1);
        // SAFETY: of any size.
        let address = unsafe { result::malloc_sync(bytes) }.expect("enough device memory");
        Self { address, offset, len, element: std::marker::PhantomData }
    }

    /// Memory that holds `values`, `offset` elements after an aligned address.
    pub fn from(values: &[T], offset: usize) -> Self {
        let memory = Self::at_offset(values.len(), offset);
        // SAFETY: there is room for them.
        unsafe { result::memcpy_htod_sync(memory.first(), values) }.unwrap();
        memory
    }

    /// `len` elements: `values` over and over.
    pub fn repeat(values: &[T], len: usize) -> Self {
        let memory = Self::new(len);
        for chunk in (0..len).step_by(values.len()) {
            let count = values.len().min(len - chunk);
            let to = memory.address + (chunk * size_of::<T>()) as u64;
            // SAFETY: within the memory.
            unsafe { result::memcpy_htod_sync(to, &values[..count]) }.unwrap();
        }
        memory
    }

    fn first(&self) -> sys::CUdeviceptr {
        self.address + (self.offset * size_of::<T>()) as u64
    }

    pub fn read(&self) -> Vec<T> {
        let mut values = vec![T::default(); self.len];
        // SAFETY: so many elements are there.
        unsafe { result::memcpy_dtoh_sync(&mut values, self.first()) }.unwrap();
        values
    }

    pub fn slice(&self) -> Slice<'static, T> {
        // SAFETY: callers finish the stream before they drop the memory.
        unsafe { Slice::from_raw(self.first() as *const T, self.len) }
    }

    pub fn slice_mut(&self) -> SliceMut<'static, T> {
        // SAFETY: as above.
        unsafe { SliceMut::from_raw(self.first() as *mut T, self.len) }
    }
}

impl<T> Drop for Memory<T> {
    fn drop(&mut self) {
        // SAFETY: allocated by `at_offset`; freeing waits for what uses it.
        let _ = unsafe { result::free_sync(self.address) };
    }
}
