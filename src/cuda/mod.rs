//! The CUDA backend, shared by all ops: streams, device memory as slices, and the one call that launches
//! a kernel. It knows nothing of any op.
//!
//! Nothing here allocates device memory or waits for the device: what is launched on a stream runs
//! when the stream comes to it. The first launch of a kernel in a context loads it; which kernels an
//! op launches depends on dtype, shape and options, so run once with the same before capturing a graph.
//!
//! Two backends run the same launches of the same kernels: the CUDA driver (feature `cuda`), looked
//! for when the first stream is made, and a stand-in on the CPU (feature `simt`) for tests where
//! there is no GPU. Without either the launches are compiled all the same, and [`Stream::from_raw`]
//! refuses.
#![cfg_attr(not(any(feature = "cuda", feature = "simt")), allow(dead_code, unused_variables))]

#[cfg(feature = "cuda")]
mod driver;
pub(crate) mod rows;
#[cfg(feature = "simt")]
#[doc(hidden)]
pub mod simt;

use std::ffi::c_void;
use std::marker::PhantomData;
#[cfg(any(feature = "cuda", feature = "simt"))]
use std::ptr;

#[cfg(not(feature = "cuda"))]
use crate::error::Error;
use crate::error::Result;

#[cfg(all(feature = "cuda", feature = "candle"))]
pub(crate) use driver::{allocation_error, device_error};
#[doc(hidden)]
pub use rows::force_wide;

/// How many CUDA devices there are.
///
/// # Errors
/// If there is no driver or no device.
#[cfg(feature = "cuda")]
pub fn device_count() -> Result<usize> {
    driver::device_count()
}

/// The properties of a device that launches need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// Major and minor number.
    pub compute_capability: (u32, u32),
    /// The most blocks of a grid; kernels loop over what is left.
    pub max_blocks: u32,
    /// How many multiprocessors it has.
    pub multiprocessors: u32,
    /// The most shared memory that a block can have, in bytes.
    pub shared_bytes: u32,
}

/// A stream to launch on.
#[derive(Debug, Clone, Copy)]
pub struct Stream<'a> {
    device: Device,
    backend: Backend,
    lifetime: PhantomData<&'a ()>,
}

#[derive(Debug, Clone, Copy)]
enum Backend {
    #[cfg(feature = "cuda")]
    Driver(driver::Stream),
    #[cfg(feature = "simt")]
    Simt(simt::Machine),
}

impl Stream<'_> {
    /// A stream by its handle (`CUstream` or `cudaStream_t`). Null is the default stream of the
    /// thread's current context, or where there is none, as in a thread that has made no CUDA call,
    /// of the first device's primary context.
    ///
    /// # Errors
    /// If there is no driver or no device, or the kernels were not built for it; always without the
    /// feature `cuda`.
    ///
    /// # Safety
    /// The handle is of a stream that lives as long as the lifetime says.
    pub unsafe fn from_raw(handle: *mut c_void) -> Result<Self> {
        #[cfg(feature = "cuda")]
        {
            // SAFETY: the caller's.
            let (stream, device) = unsafe { driver::Stream::new(handle.cast()) }?;
            Ok(Self { device, backend: Backend::Driver(stream), lifetime: PhantomData })
        }
        #[cfg(not(feature = "cuda"))]
        {
            let _ = handle;
            Err(Error::CudaDriver { reason: "built without the feature `cuda`".into() })
        }
    }

    /// A stream of the CPU stand-in: a launch has ended when the call returns.
    #[cfg(feature = "simt")]
    #[doc(hidden)]
    pub fn simt(machine: simt::Machine) -> Self {
        Self { device: machine.device, backend: Backend::Simt(machine), lifetime: PhantomData }
    }

    /// The stream, with launches that use no more of the device than `device` has. For tests.
    #[doc(hidden)]
    #[must_use]
    pub fn limited_to(self, device: Device) -> Self {
        let device = Device {
            compute_capability: device.compute_capability.min(self.device.compute_capability),
            max_blocks: device.max_blocks.min(self.device.max_blocks),
            multiprocessors: device.multiprocessors.min(self.device.multiprocessors),
            shared_bytes: device.shared_bytes.min(self.device.shared_bytes),
        };
        Self { device, ..self }
    }

    /// The device that the stream is on.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Launches a kernel.
    pub(crate) fn launch<A: Args>(&self, kernel: &Kernel, launch: Launch, args: &A) -> Result<()> {
        match self.backend {
            #[cfg(feature = "cuda")]
            Backend::Driver(stream) => {
                stream.launch(kernel, launch, self.device, ptr::from_ref(args).cast())
            }
            #[cfg(feature = "simt")]
            Backend::Simt(machine) => {
                machine.launch(kernel, launch, ptr::from_ref(args).cast(), size_of::<A>())
            }
        }
    }

    /// Launches a pass of f32 in so many blocks, or as many as the grid takes.
    pub(crate) fn launch_f32<A: Args>(
        &self,
        [op, pass]: [&'static str; 2],
        blocks: usize,
        threads: usize,
        args: &A,
    ) -> Result<()> {
        let launch = Launch::new(self.device, blocks, threads);
        self.launch(&Kernel { op, pass, dtype: "f32" }, launch, args)
    }
}

/// The name of a kernel, in the parts it is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Kernel {
    /// The op, and the name of its file.
    pub op: &'static str,
    /// The pass of the op.
    pub pass: &'static str,
    /// The type of the logits.
    pub dtype: &'static str,
}

impl Kernel {
    /// The name in the source.
    fn symbol(&self) -> String {
        format!("{}_{}_{}", self.op, self.pass, self.dtype)
    }
}

/// How a kernel is spread over the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    blocks: u32,
    threads: u32,
    /// The dynamic shared memory of a block, besides the kernel's own variables.
    shared_bytes: u32,
}

impl Launch {
    /// A launch of so many blocks of threads, or as many as the device's grid takes: the kernel loops over the rest.
    pub(crate) fn new(device: Device, blocks: usize, threads: usize) -> Self {
        let blocks = u32::try_from(blocks).map_or(device.max_blocks, |n| n.min(device.max_blocks));
        Self { blocks, threads: threads as u32, shared_bytes: 0 }
    }

    /// Adds so many bytes of dynamic shared memory, which the kernel knows of.
    pub(crate) fn with_shared(self, bytes: usize) -> Self {
        Self { shared_bytes: bytes as u32, ..self }
    }
}

/// A kernel's arguments.
///
/// # Safety
/// The type is `repr(C)` and has the layout of the struct that the kernels it is given to take.
pub(crate) unsafe trait Args: Copy {}

/// Elements in device memory, for reading.
#[derive(Debug)]
pub struct Slice<'a, T> {
    address: *const T,
    len: usize,
    lifetime: PhantomData<&'a T>,
}

impl<T> Clone for Slice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Slice<'_, T> {}

impl<T> Slice<'_, T> {
    /// `len` elements from `address` on.
    ///
    /// # Safety
    /// The device of the stream they are used with can read them, they are aligned to their size,
    /// and they stay as they are until what was launched with them has run.
    pub unsafe fn from_raw(address: *const T, len: usize) -> Self {
        Self { address, len, lifetime: PhantomData }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn as_ptr(&self) -> *const T {
        self.address
    }
}

/// Elements in device memory, for writing.
#[derive(Debug)]
pub struct SliceMut<'a, T> {
    address: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut T>,
}

impl<T> SliceMut<'_, T> {
    /// `len` elements from `address` on.
    ///
    /// # Safety
    /// The device of the stream they are used with can write them, they are aligned to their size,
    /// and nothing else uses them until what was launched with them has run. Where an op works in
    /// place, it says so, and they may be the same as its input.
    pub unsafe fn from_raw(address: *mut T, len: usize) -> Self {
        Self { address, len, lifetime: PhantomData }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn as_mut_ptr(&self) -> *mut T {
        self.address
    }

    /// Several of the rows of `width` elements, by their indices, of which none is there twice.
    #[cfg(all(feature = "cuda", feature = "candle"))]
    pub(crate) fn disjoint<const N: usize>(self, width: usize, indices: [usize; N]) -> [Self; N] {
        indices.map(|index| {
            assert!((index + 1) * width <= self.len, "a row that is there");
            let address = self.address.wrapping_add(index * width);
            Self { address, len: width, lifetime: PhantomData }
        })
    }
}
