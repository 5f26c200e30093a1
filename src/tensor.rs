//! Shared room of the tensor layer: checks of candle tensors and access to their storage. It knows
//! nothing of any op.

use std::marker::PhantomData;
use std::ops::{Deref, Range};

use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, DType, Device, Layout, Shape, Storage, StorageRef, Tensor, WithDType,
};

use crate::error::{Error, Result};

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

/// An argument that may be left out: checked like [`check_arg`], contiguous and out of the graph.
pub(crate) fn optional_arg(
    op: &'static str,
    arg: &'static str,
    tensor: Option<&Tensor>,
    shape: &[usize],
    dtype: DType,
    device: &Device,
) -> Result<Option<Tensor>> {
    let Some(tensor) = tensor else {
        return Ok(None);
    };
    check_arg(op, arg, tensor, shape, &[dtype], device)?;
    Ok(Some(tensor.detach().contiguous()?))
}

/// The error of an op that has no kernels for the tensor's device.
pub(crate) fn no_kernels(op: &'static str, arg: &'static str, device: &Device) -> Error {
    Error::Device { op, arg, expected: "cpu".into(), got: format!("{:?}", device.location()) }
}

/// A contiguous CPU tensor's elements, held for reading.
pub(crate) struct View<'a, T> {
    storage: StorageRef<'a>,
    range: Range<usize>,
    element: PhantomData<T>,
}

impl<T: WithDType> Deref for View<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &*self.storage {
            Storage::Cpu(storage) => {
                &storage.as_slice::<T>().expect("checked by view")[self.range.clone()]
            }
            _ => unreachable!("checked by view"),
        }
    }
}

/// The elements of a contiguous CPU tensor of dtype `T`.
pub(crate) fn view<'a, T: WithDType>(
    op: &'static str,
    arg: &'static str,
    tensor: &'a Tensor,
) -> Result<View<'a, T>> {
    check_dtype(op, arg, tensor, &[T::DTYPE])?;
    let (storage, layout) = tensor.storage_and_layout();
    if !matches!(&*storage, Storage::Cpu(_)) {
        return Err(no_kernels(op, arg, tensor.device()));
    }
    let range = contiguous_range(layout)?;
    Ok(View { storage, range, element: PhantomData })
}

/// [`view`] of an argument that may be left out.
pub(crate) fn optional_view<'a, T: WithDType>(
    op: &'static str,
    arg: &'static str,
    tensor: &'a Option<Tensor>,
) -> Result<Option<View<'a, T>>> {
    tensor.as_ref().map(|tensor| view(op, arg, tensor)).transpose()
}

/// The elements of a contiguous CPU storage inside a custom op.
pub(crate) fn slice<'a, T: WithDType>(
    storage: &'a CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a [T]> {
    Ok(&storage.as_slice::<T>()?[contiguous_range(layout)?])
}

fn contiguous_range(layout: &Layout) -> candle_core::Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => candle_core::bail!("the public functions make every argument contiguous"),
    }
}

/// A CPU tensor around `data` that takes no part in gradients.
pub(crate) fn constant<T: WithDType>(data: Vec<T>, shape: impl Into<Shape>) -> Tensor {
    let storage = Storage::Cpu(T::to_cpu_storage_owned(data));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}
