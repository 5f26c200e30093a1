//! candle's CUDA storage as device slices, and outputs from candle's allocator, all on the stream that
//! candle has for a device: what is launched there runs after what wrote the inputs, and before what
//! frees or reads them later. Nothing here waits for the device.
//!
//! The stream of `Device::new_cuda` is another one in every thread, so that with our ops as with
//! candle's a tensor is another thread's to use only after the device is synchronised; that of
//! `Device::new_cuda_with_stream` is the same in all.

use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;
use candle_core::cuda::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, ValidAsZeroBits,
};
use candle_core::cuda::CudaDType;
use candle_core::{CudaDevice, CudaStorage, WithDType};

use crate::cuda::{allocation_error, device_error, Slice, SliceMut, Stream};
use crate::error::Result;
use crate::memory::{Array, Device, Element, Reads, Writes};
use crate::tensor::{numbers, Owned, View, Views};

pub trait Number: WithDType + CudaDType + DeviceRepr + ValidAsZeroBits + Pod {}
impl<T: WithDType + CudaDType + DeviceRepr + ValidAsZeroBits + Pod> Number for T {}

/// An op's device, and candle's stream on it.
pub(crate) struct Cuda {
    op: &'static str,
    device: CudaDevice,
    stream: Arc<CudaStream>,
}

impl Cuda {
    pub(super) fn new(op: &'static str, device: &CudaDevice) -> Self {
        Self { op, device: device.clone(), stream: device.cuda_stream() }
    }

    /// The stream for the launches of one op.
    pub(crate) fn stream(&self) -> Result<Stream<'_>> {
        // candle's stream is one of those without a context of their own.
        self.stream.context().bind_to_thread().map_err(device_error)?;
        // SAFETY: `self` keeps the stream, and the stream its context.
        unsafe { Stream::from_raw(self.stream.cu_stream().cast()) }
    }

    /// A buffer of `len` elements, of any content.
    pub(crate) fn buffer<T: Element>(&self, len: usize) -> Result<Buffer<T>> {
        // SAFETY: every element is written before the op returns it. The driver has nothing to give
        // for a length of 0.
        let memory = unsafe { self.stream.alloc::<T::Number>((len * numbers::<T>()).max(1)) };
        let memory = memory.map_err(|error| allocation_error(self.op, error))?;
        Ok(Buffer { memory, len, device: self.device.clone() })
    }
}

/// The memory of an output or a workspace. Dropped, it is freed behind what was launched with it.
pub(crate) struct Buffer<T: Element> {
    memory: CudaSlice<T::Number>,
    len: usize,
    device: CudaDevice,
}

impl<T: Element> Buffer<T> {
    pub(crate) fn slice(&mut self) -> SliceMut<'_, T> {
        let stream = self.memory.stream().clone();
        let (address, _) = self.memory.device_ptr_mut(&stream);
        // SAFETY: memory of that length, which nobody else knows of.
        unsafe { SliceMut::from_raw(address as *mut T, self.len) }
    }

    pub(super) fn into_storage(mut self) -> CudaStorage {
        let stream = self.memory.stream().clone();
        // Marks the memory as written now, for other streams to wait for.
        drop(self.memory.device_ptr_mut(&stream));
        CudaStorage::wrap_cuda_slice(self.memory, self.device)
    }
}

/// The elements of views and buffers, on [`Backend::Cuda`](super::Backend::Cuda).
pub(crate) struct OnCuda;

impl Reads<Views, Device> for OnCuda {
    type Error = Infallible;

    fn input<'b, T: Element>(
        &mut self,
        _: &Array,
        from: &'b View<T>,
    ) -> Result<Slice<'b, T>, Infallible> {
        Ok(from.cuda())
    }
}

impl Writes<Owned, Device> for OnCuda {
    type Error = Infallible;

    fn output<'b, T: Element>(
        &mut self,
        _: &Array,
        to: &'b mut super::Buffer<T>,
    ) -> Result<SliceMut<'b, T>, Infallible> {
        Ok(to.cuda())
    }
}

/// Elements of a tensor, for what is launched on candle's stream.
pub(super) fn slice<'a, T: Element>(
    storage: &'a CudaStorage,
    range: &Range<usize>,
) -> Slice<'a, T> {
    let memory = storage.as_cuda_slice::<T::Number>().expect("checked by view");
    // Storage that was made on another stream has been written before what is launched on this one.
    let (address, _) = memory.device_ptr(&storage.device.cuda_stream());
    // SAFETY: the layout's range is within the storage. Whoever frees or overwrites it waits until it
    // was read.
    unsafe {
        let first = (address as *const T::Number).add(range.start);
        Slice::from_raw(first.cast(), range.len() / numbers::<T>())
    }
}

/// Marks a tensor as read by what was launched until now, for other streams to wait for.
pub(super) fn mark_read<T: Number>(storage: &CudaStorage) {
    let memory = storage.as_cuda_slice::<T>().expect("checked by view");
    drop(memory.device_ptr(&storage.device.cuda_stream()));
}
