//! The tensor layer, shared by all ops: checks of candle tensors, access to their elements where they
//! are, buffers for outputs, and the way into candle's graph. It knows nothing of any op.
//!
//! A pass of an op reads as follows, on any device. The lists are those of the op, in four spaces:
//! the caller's [`Tensors`], checked and contiguous ones ([`Owned`]), held for reading ([`Views`]), and
//! the memory that the backend takes:
//!
//! ```text
//! let backend = Backend::of(OP, "x", x.device())?;
//! let tensors: Inputs<Owned> = inputs.try_map(shape, &mut Constants::new(OP, x.device()))?;
//! let mut buffers = Outputs { out: backend.buffer::<f32>(n)? };
//! run!(
//!     (OP, backend),
//!     [tensors, shape],
//!     [buffers, shape],
//!     |i, o| cpu::forward(i, n, o),
//!     |stream, w = [cuda::workspace_len(n)]| cuda::forward(stream, i, n, o, w),
//! );
//! node("ppo-op", &[x], buffers.out, shape, |output, upstream| ..)
//! ```

#[cfg(feature = "cuda")]
mod cuda;
mod node;

use std::alloc::{alloc_zeroed, handle_alloc_error, Layout};
use std::convert::Infallible;
use std::marker::PhantomData;
use std::ops::Range;

#[cfg(not(feature = "cuda"))]
use bytemuck::Pod;
use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Shape, Storage, StorageRef, Tensor, WithDType};

use crate::error::{Error, Result};
use crate::memory::{Array, Element, Host, Reads, Space, Tensors, Writes};

#[cfg(feature = "cuda")]
pub(crate) use cuda::OnCuda;
pub(crate) use node::node;

/// `Ok` when the tensor has these dimensions.
pub(crate) fn check_shape(
    op: &'static str,
    arg: &'static str,
    tensor: &Tensor,
    expected: &[usize],
) -> Result<()> {
    if tensor.dims() == expected {
        return Ok(());
    }
    Err(Error::Shape {
        op,
        arg,
        expected: format!("{expected:?}"),
        got: format!("{:?}", tensor.dims()),
    })
}

/// `Ok` when the tensor's dtype is one of `expected`.
pub(crate) fn check_dtype(
    op: &'static str,
    arg: &'static str,
    tensor: &Tensor,
    expected: &[DType],
) -> Result<()> {
    if expected.contains(&tensor.dtype()) {
        return Ok(());
    }
    let names: Vec<&str> = expected.iter().map(DType::as_str).collect();
    Err(Error::Dtype { op, arg, expected: names.join(", "), got: tensor.dtype().as_str().into() })
}

/// `Ok` when the tensor is on the device of the op's first argument.
pub(crate) fn check_device(
    op: &'static str,
    arg: &'static str,
    tensor: &Tensor,
    expected: &Device,
) -> Result<()> {
    if tensor.device().same_device(expected) {
        return Ok(());
    }
    Err(Error::Device {
        op,
        arg,
        expected: format!("{:?}", expected.location()),
        got: format!("{:?}", tensor.device().location()),
    })
}

/// Rows and tokens of a tensor that has no other dimension; with offsets, the rows that they are of, and the
/// tokens of all.
pub(crate) fn batch_and_seq_len(
    op: &'static str,
    arg: &'static str,
    tensor: &Tensor,
    offsets: Option<&Tensor>,
) -> Result<[usize; 2]> {
    let refuse = |arg, expected: &str, tensor: &Tensor| {
        let (expected, got) = (expected.into(), format!("{:?}", tensor.dims()));
        Err(Error::Shape { op, arg, expected, got })
    };
    let Some(offsets) = offsets else {
        return match *tensor.dims() {
            [batch, seq_len] => Ok([batch, seq_len]),
            _ => refuse(arg, "[B, T]", tensor),
        };
    };
    match (tensor.dims(), offsets.dims()) {
        (&[tokens], &[count]) if count > 0 => Ok([count - 1, tokens]),
        (&[_], _) => refuse("offsets", "[B + 1]", offsets),
        _ => refuse(arg, "[N], the tokens of all rows, with offsets", tensor),
    }
}

/// The leading dimensions of logits, and the vocabulary, which is not empty.
pub(crate) fn leading_and_vocab<'a>(
    op: &'static str,
    arg: &'static str,
    logits: &'a Tensor,
) -> Result<(&'a [usize], usize)> {
    check_dtype(op, arg, logits, &[DType::F32, DType::F16, DType::BF16])?;
    match logits.dims() {
        [leading @ .., vocab] if *vocab > 0 => Ok((leading, *vocab)),
        dims => Err(Error::Shape {
            op,
            arg,
            expected: "[.., V] with V > 0".into(),
            got: format!("{dims:?}"),
        }),
    }
}

/// Shape, dtype and device in one: what every further argument of an op must match.
pub(crate) fn check_arg(
    op: &'static str,
    arg: &'static str,
    tensor: &Tensor,
    shape: &[usize],
    dtypes: &[DType],
    device: &Device,
) -> Result<()> {
    check_device(op, arg, tensor, device)?;
    check_dtype(op, arg, tensor, dtypes)?;
    check_shape(op, arg, tensor, shape)
}

/// A row of outputs that travel together, `[1, ..]`: to take its first dimension off is a tensor more.
pub(crate) fn row(rows: &Tensor, i: usize) -> candle_core::Result<Tensor> {
    rows.narrow(0, i, 1)
}

/// The numbers that tensors of the ops hold.
#[cfg(not(feature = "cuda"))]
pub trait Number: candle_core::WithDType + Pod {}
#[cfg(not(feature = "cuda"))]
impl<T: candle_core::WithDType + Pod> Number for T {}

#[cfg(feature = "cuda")]
pub use cuda::Number;

/// How many numbers an element is made of.
fn numbers<T: Element>() -> usize {
    size_of::<T>() / size_of::<T::Number>()
}

/// Which kernels run: those of the device that the tensors are on.
pub(crate) enum Backend {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(cuda::Cuda),
}

impl Backend {
    /// The backend of the argument's device; an error that names the argument if there is none.
    pub(crate) fn of(op: &'static str, arg: &'static str, device: &Device) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Backend::Cpu),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Backend::Cuda(cuda::Cuda::new(op, device))),
            _ => Err(Error::Device {
                op,
                arg,
                expected: if cfg!(feature = "cuda") { "cpu or cuda" } else { "cpu" }.into(),
                got: format!("{:?}", device.location()),
            }),
        }
    }

    /// A buffer of `len` elements that the op is to write; what is in it before is anything.
    pub(crate) fn buffer<T: Element>(&self, len: usize) -> Result<Buffer<T>> {
        match self {
            Backend::Cpu => Ok(Buffer::Cpu(zeros(len * numbers::<T>()))),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => Ok(Buffer::Cuda(cuda.buffer(len)?)),
        }
    }

    /// [`Backend::buffer`] if it is wanted.
    pub(crate) fn optional_buffer<T: Element>(
        &self,
        wanted: bool,
        len: usize,
    ) -> Result<Option<Buffer<T>>> {
        wanted.then(|| self.buffer(len)).transpose()
    }
}

/// Zeros that the system writes where they are first touched, so that the threads that write over them
/// share the cost. `vec!` would fill 16-bit floats itself.
fn zeros<T: Number>(len: usize) -> Vec<T> {
    let layout = Layout::array::<T>(len).expect("a tensor's size");
    if layout.size() == 0 {
        return Vec::new();
    }
    // SAFETY: the layout is that of a vector of this capacity, and candle's types are plain numbers,
    // for which zero bits are 0. Where there is memory it is that of the layout.
    unsafe {
        let memory = alloc_zeroed(layout);
        if memory.is_null() {
            handle_alloc_error(layout);
        }
        ask_for_large_pages(memory, layout.size());
        Vec::from_raw_parts(memory.cast(), len, len)
    }
}

/// Fresh memory is handed over by the page when it is first written, which for pages of 4 KiB takes ten
/// times as long as the writing: what is large asks for large pages. A hint, and where it is refused
/// all is as before.
///
/// # Safety
/// The memory is an allocation of so many bytes.
unsafe fn ask_for_large_pages(memory: *mut u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        const LARGE_PAGE: usize = 2 << 20;
        /// The size from which on glibc gives every allocation a mapping of its own; a smaller one may have its pages.
        const OWN_MAPPING: usize = 32 << 20;
        if bytes >= OWN_MAPPING {
            let head = memory.align_offset(LARGE_PAGE);
            let whole_pages = (bytes - head) / LARGE_PAGE * LARGE_PAGE;
            libc::madvise(memory.add(head).cast(), whole_pages, libc::MADV_HUGEPAGE);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (memory, bytes);
}

/// The memory of an output, not yet a tensor.
pub(crate) enum Buffer<T: Element> {
    Cpu(Vec<T::Number>),
    #[cfg(feature = "cuda")]
    Cuda(cuda::Buffer<T>),
}

impl<T: Element> Buffer<T> {
    /// The elements, on [`Backend::Cpu`].
    pub(crate) fn cpu(&mut self) -> &mut [T] {
        match self {
            Buffer::Cpu(numbers) => bytemuck::cast_slice_mut(numbers),
            #[cfg(feature = "cuda")]
            Buffer::Cuda(_) => unreachable!("made by another backend"),
        }
    }

    /// The elements, on [`Backend::Cuda`].
    #[cfg(feature = "cuda")]
    pub(crate) fn cuda(&mut self) -> crate::cuda::SliceMut<'_, T> {
        match self {
            Buffer::Cuda(elements) => elements.slice(),
            Buffer::Cpu(_) => unreachable!("made by another backend"),
        }
    }

    fn into_storage(self) -> Storage {
        match self {
            Buffer::Cpu(numbers) => Storage::Cpu(T::Number::to_cpu_storage_owned(numbers)),
            #[cfg(feature = "cuda")]
            Buffer::Cuda(elements) => Storage::Cuda(elements.into_storage()),
        }
    }

    /// A tensor of the elements' numbers that takes no part in gradients.
    pub(crate) fn into_tensor(self, shape: impl Into<Shape>) -> Tensor {
        Tensor::from_storage(self.into_storage(), shape, BackpropOp::none(), false)
    }
}

/// Statistics, a struct of doubles, where they were computed, so that nobody has to wait for them.
#[derive(Debug, Clone)]
pub struct StatsTensor<S> {
    tensor: Tensor,
    stats: PhantomData<S>,
}

impl<S: Element<Number = f64>> StatsTensor<S> {
    /// Wraps statistics that an op has written.
    pub(crate) fn from_buffer(buffer: Buffer<S>) -> Result<Self> {
        let tensor = buffer.into_tensor(numbers::<S>()).to_dtype(DType::F32)?;
        Ok(Self { tensor, stats: PhantomData })
    }

    /// f32, in the order of the statistics' `NAMES`; counts are exact up to 2^24.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Brings them to the host, which waits for the device.
    ///
    /// # Errors
    /// If the device fails.
    pub fn to_host(&self) -> Result<S> {
        let stats: Vec<f64> = self.tensor.to_vec1::<f32>()?.into_iter().map(f64::from).collect();
        Ok(bytemuck::cast_slice(&stats)[0])
    }
}

/// The elements of a contiguous tensor, held for reading.
pub(crate) struct View<'a, T: Element> {
    storage: StorageRef<'a>,
    /// The elements' place among the tensor's numbers.
    range: Range<usize>,
    element: PhantomData<T>,
}

#[cfg(feature = "cuda")]
impl<T: Element> Drop for View<'_, T> {
    fn drop(&mut self) {
        if let Storage::Cuda(storage) = &*self.storage {
            cuda::mark_read::<T::Number>(storage);
        }
    }
}

impl<T: Element> View<'_, T> {
    /// The elements, if the tensor is on the CPU.
    pub(crate) fn cpu(&self) -> &[T] {
        match &*self.storage {
            Storage::Cpu(storage) => {
                let numbers = storage.as_slice::<T::Number>().expect("checked by view");
                bytemuck::cast_slice(&numbers[self.range.clone()])
            }
            _ => unreachable!("all arguments are on the device of the first"),
        }
    }

    /// The elements, if the tensor is on a CUDA device.
    #[cfg(feature = "cuda")]
    pub(crate) fn cuda(&self) -> crate::cuda::Slice<'_, T> {
        match &*self.storage {
            Storage::Cuda(storage) => cuda::slice(storage, &self.range),
            _ => unreachable!("all arguments are on the device of the first"),
        }
    }
}

/// The elements of a contiguous tensor of the dtype of `T`.
pub(crate) fn view<'a, T: Element>(
    op: &'static str,
    arg: &'static str,
    tensor: &'a Tensor,
) -> Result<View<'a, T>> {
    check_dtype(op, arg, tensor, &[T::Number::DTYPE])?;
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(Error::Shape {
            op,
            arg,
            expected: "contiguous elements".into(),
            got: format!("{layout:?}"),
        });
    };
    // A slice of nothing may begin behind the storage's end.
    let range = if start == end { 0..0 } else { start..end };
    Ok(View { storage, range, element: PhantomData })
}

/// Checked tensors, and buffers for outputs.
#[derive(Clone)]
pub(crate) struct Owned;

impl Space for Owned {
    type In<'a, T: Element> = Tensor;
    type Out<'a, T: Element> = Buffer<T>;
}

/// Tensors held for reading.
pub(crate) struct Views;

impl Space for Views {
    type In<'a, T: Element> = View<'a, T>;
    type Out<'a, T: Element> = ();
}

/// Checks tensors against shape, dtype and the op's device, and makes them contiguous constants.
pub(crate) struct Constants<'a> {
    op: &'static str,
    device: &'a Device,
}

impl<'a> Constants<'a> {
    pub(crate) fn new(op: &'static str, device: &'a Device) -> Self {
        Self { op, device }
    }
}

impl Reads<Tensors, Owned> for Constants<'_> {
    type Error = Error;

    fn input<T: Element>(&mut self, array: &Array, from: &&Tensor) -> Result<Tensor> {
        let mut dims = array.shape.concat();
        // An element of several numbers is so many of the tensor's.
        if let Some(last) = dims.last_mut() {
            *last *= numbers::<T>();
        }
        check_arg(self.op, array.name, from, &dims, &[T::Number::DTYPE], self.device)?;
        Ok(from.detach().contiguous()?)
    }
}

/// Holds tensors for reading.
pub(crate) struct Held(pub &'static str);

impl Reads<Owned, Views> for Held {
    type Error = Error;

    fn input<'b, T: Element>(&mut self, array: &Array, from: &'b Tensor) -> Result<View<'b, T>> {
        view(self.0, array.name, from)
    }
}

/// Runs `body` with `T` the type of logits that [`leading_and_vocab`] has looked at.
macro_rules! with_logits {
    ($logits:expr, $T:ident => $body:expr) => {
        match $logits.dtype() {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F16 => {
                type $T = half::f16;
                $body
            }
            _ => {
                type $T = half::bf16;
                $body
            }
        }
    };
}
pub(crate) use with_logits;

/// Runs a pass on the backend: holds its inputs for reading, takes them and the buffers of its outputs, of
/// the sizes of their `try_map`, into the backend's memory, and calls the op's function for it, with a
/// workspace of as many elements as are asked for.
macro_rules! run {
    (
        ($op:expr, $backend:expr),
        [$tensors:expr, $in_sizes:expr], [$buffers:expr, $out_sizes:expr],
        |$i:ident, $o:ident| $cpu:expr,
        |$stream:ident $(, $workspace:ident = [$len:expr])?| $cuda:expr $(,)?
    ) => {{
        let views = $tensors.try_map($in_sizes, &mut $crate::tensor::Held($op))?;
        match &$backend {
            $crate::tensor::Backend::Cpu => {
                let Ok($i) = views.try_map($in_sizes, &mut $crate::tensor::OnCpu);
                let Ok($o) = $buffers.try_map($out_sizes, &mut $crate::tensor::OnCpu);
                $cpu?;
            }
            #[cfg(feature = "cuda")]
            $crate::tensor::Backend::Cuda(gpu) => {
                let $stream = &gpu.stream()?;
                $(let mut workspace = gpu.buffer($len)?;)?
                let Ok($i) = views.try_map($in_sizes, &mut $crate::tensor::OnCuda);
                let Ok($o) = $buffers.try_map($out_sizes, &mut $crate::tensor::OnCuda);
                $(let $workspace = workspace.slice();)?
                $cuda?;
            }
        }
    }};
}
pub(crate) use run;

/// The elements of views and buffers, on [`Backend::Cpu`].
pub(crate) struct OnCpu;

impl Reads<Views, Host> for OnCpu {
    type Error = Infallible;

    fn input<'b, T: Element>(
        &mut self,
        _: &Array,
        from: &'b View<T>,
    ) -> Result<&'b [T], Infallible> {
        Ok(from.cpu())
    }
}

impl Writes<Owned, Host> for OnCpu {
    type Error = Infallible;

    fn output<'b, T: Element>(
        &mut self,
        _: &Array,
        to: &'b mut Buffer<T>,
    ) -> Result<&'b mut [T], Infallible> {
        Ok(to.cpu())
    }
}
