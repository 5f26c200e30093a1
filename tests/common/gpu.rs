//! Streams and memory of the first GPU, for the tests and for the program under benches/gpu.

use std::marker::PhantomData;
use std::sync::{Arc, OnceLock};

use cudarc::driver::{result, sys, CudaContext, CudaStream};
use ppo_kernels::cuda::{Slice, SliceMut, Stream};

use super::device::Machine;

/// The stand-in's orders of threads. Here the hardware has its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Fifo,
    Lifo,
    Random(u64),
}

/// The first GPU, and the stream that everything of this process is launched on.
pub struct Gpu {
    pub context: Arc<CudaContext>,
    pub cuda_stream: Arc<CudaStream>,
}

impl Gpu {
    /// Panics with the crate's words where there is no GPU: a test that needs one has failed.
    pub fn get() -> &'static Self {
        static GPU: OnceLock<Gpu> = OnceLock::new();
        let gpu = GPU.get_or_init(|| {
            // First through the crate, whose error says what is missing; only the driver must be
            // there already.
            // SAFETY: null is the default stream.
            let found = unsafe { Stream::from_raw(std::ptr::null_mut()) };
            if let Err(error @ ppo_kernels::Error::CudaDriver { .. }) = found {
                panic!("{error}");
            }
            let context = CudaContext::new(0).expect("a first device");
            let cuda_stream = context.new_stream().expect("a stream");
            Self { context, cuda_stream }
        });
        gpu.context.bind_to_thread().expect("the context lives");
        gpu
    }

    pub fn stream(&self) -> Stream<'static> {
        // SAFETY: the stream lives as long as the process.
        unsafe { Stream::from_raw(self.cuda_stream.cu_stream().cast()) }.expect("a device to use")
    }

    pub fn finish(&self) {
        self.cuda_stream.synchronize().expect("no launch failed");
    }
}

pub fn stream(machine: Machine) -> Stream<'static> {
    Gpu::get().stream().limited_to(machine.device)
}

/// Elements in device memory that begin `offset` elements after an aligned address, and end where
/// their allocation ends, so that compute-sanitizer sees who reads on.
pub struct Buffer<T> {
    address: sys::CUdeviceptr,
    offset: usize,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Copy> Buffer<T> {
    pub fn new(values: &[T], offset: usize) -> Self {
        let buffer = Self::uninit(values.len(), offset);
        buffer.write(0, values);
        buffer
    }

    /// Zero bits.
    pub fn zeroed(len: usize, offset: usize) -> Self {
        let buffer = Self::uninit(len, offset);
        let stream = Gpu::get().cuda_stream.cu_stream();
        // SAFETY: so many bytes are there.
        let filled =
            unsafe { result::memset_d8_async(buffer.at(0), 0, len * size_of::<T>(), stream) };
        filled.expect("the memory lives");
        buffer
    }

    /// Memory of any content.
    pub fn uninit(len: usize, offset: usize) -> Self {
        Gpu::get();
        let offset = offset % (16 / size_of::<T>()).max(1);
        let bytes = ((len + offset) * size_of::<T>()).max(1);
        // SAFETY: of any size.
        let address = unsafe { result::malloc_sync(bytes) }.expect("enough device memory");
        Self { address, offset, len, element: PhantomData }
    }

    /// NaN, which shows in the results of who reads what was not written; under compute-sanitizer's
    /// initcheck, which looks for such reads, nothing is written.
    pub fn workspace(len: usize, offset: usize) -> Self
    where
        T: From<f32>,
    {
        if std::env::var_os("PPO_KERNELS_INITCHECK").is_some() {
            return Self::uninit(len, offset);
        }
        Self::new(&vec![f32::NAN.into(); len], offset)
    }

    /// Where the element is.
    pub fn at(&self, index: usize) -> sys::CUdeviceptr {
        self.address + ((self.offset + index) * size_of::<T>()) as u64
    }

    /// Overwrites the elements from `index` on.
    pub fn write(&self, index: usize, values: &[T]) {
        assert!(index + values.len() <= self.len);
        if values.is_empty() {
            return;
        }
        // On the stream that reads them: a copy from pageable memory that is said to be synchronous
        // may still be on its way when the call returns, and our stream does not wait for it.
        let gpu = Gpu::get();
        let stream = gpu.cuda_stream.cu_stream();
        // SAFETY: within the memory, as just asserted; the values live until the copy has ended.
        let copied = unsafe { result::memcpy_htod_async(self.at(index), values, stream) };
        copied.expect("the memory lives");
        gpu.finish();
    }

    pub fn read(&self) -> Vec<T> {
        Gpu::get().finish();
        let mut values = Vec::with_capacity(self.len);
        if self.len > 0 {
            // SAFETY: so many elements are there, and the copy writes them all.
            unsafe {
                let to = std::slice::from_raw_parts_mut(values.as_mut_ptr(), self.len);
                result::memcpy_dtoh_sync(to, self.at(0)).expect("the memory lives");
                values.set_len(self.len);
            }
        }
        values
    }

    pub fn slice(&self) -> Slice<'static, T> {
        // SAFETY: freeing the memory waits for what uses it.
        unsafe { Slice::from_raw(self.at(0) as *const T, self.len) }
    }

    pub fn slice_mut(&mut self) -> SliceMut<'static, T> {
        // SAFETY: as above.
        unsafe { SliceMut::from_raw(self.at(0) as *mut T, self.len) }
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: from `uninit`; nothing else frees it.
        let _ = unsafe { result::free_sync(self.address) };
    }
}
