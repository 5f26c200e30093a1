//! Streams and device memory of the CPU stand-in.

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::panic::{catch_unwind, UnwindSafe};

use ppo_kernels::cuda::{simt, Slice, SliceMut, Stream};
use ppo_kernels::{Error, Result};

pub use ppo_kernels::cuda::simt::Order;

use super::device::Machine;

pub fn stream(Machine { order, device, planted_bug }: Machine) -> Stream<'static> {
    Stream::simt(simt::Machine { order, device, planted_bug })
}

/// Whether a planted bug goes unseen in a run. It is seen by a panic, of a comparison with a reference, or
/// by a launch's report. A call that is refused sees nothing: the test is wrong.
pub fn goes_unseen(run: impl FnOnce() -> Result<()> + UnwindSafe) -> bool {
    match catch_unwind(run) {
        Ok(Ok(())) => true,
        Err(_) | Ok(Err(Error::CudaLaunch { .. })) => false,
        Ok(Err(refused)) => panic!("{refused}"),
    }
}

/// Elements that begin `offset` elements after a 16-byte boundary, and end where their allocation
/// ends, so that AddressSanitizer sees who reads on. A `Vec` would be longer.
pub struct Buffer<T> {
    memory: *mut T,
    first: usize,
    len: usize,
}

impl<T: Copy> Buffer<T> {
    pub fn new(values: &[T], offset: usize) -> Self {
        let buffer = Self::zeroed(values.len(), offset);
        buffer.write(0, values);
        buffer
    }

    /// Zero bits. Pages that nobody writes cost no memory.
    pub fn zeroed(len: usize, offset: usize) -> Self {
        let first = offset % (16 / size_of::<T>()).max(1);
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc_zeroed(Self::layout(first, len)) }.cast::<T>();
        assert!(!memory.is_null());
        Self { memory, first, len }
    }

    /// Overwrites the elements from `index` on.
    pub fn write(&self, index: usize, values: &[T]) {
        assert!(index + values.len() <= self.len);
        // SAFETY: within the memory, as just asserted, and no launch is under way.
        unsafe {
            let to = self.memory.add(self.first + index);
            to.copy_from_nonoverlapping(values.as_ptr(), values.len());
        }
    }

    /// NaN, which shows in the results of who reads what was not written.
    pub fn workspace(len: usize, offset: usize) -> Self
    where
        T: From<f32>,
    {
        Self::new(&vec![f32::NAN.into(); len], offset)
    }

    pub fn read(&self) -> Vec<T> {
        // SAFETY: `new` wrote the values there, and nobody writes while this is borrowed.
        unsafe { std::slice::from_raw_parts(self.memory.add(self.first), self.len) }.to_vec()
    }

    pub fn slice(&self) -> Slice<'static, T> {
        // SAFETY: a launch of the stand-in has ended when the call returns, and the tests keep the
        // buffer until then.
        unsafe { Slice::from_raw(self.memory.add(self.first), self.len) }
    }

    pub fn slice_mut(&mut self) -> SliceMut<'static, T> {
        // SAFETY: as above.
        unsafe { SliceMut::from_raw(self.memory.add(self.first), self.len) }
    }
}

impl<T> Buffer<T> {
    fn layout(first: usize, len: usize) -> Layout {
        Layout::from_size_align(((first + len) * size_of::<T>()).max(1), 16).unwrap()
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: as allocated.
        unsafe { dealloc(self.memory.cast(), Self::layout(self.first, self.len)) };
    }
}
