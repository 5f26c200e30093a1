//! Where the arrays of a pass are. A pass has one struct of inputs and one of outputs, generic over a
//! [`Space`]: the same list of fields holds slices for the CPU, device pointers for CUDA, tensors, and
//! what a C caller gave.
//!
//! Each struct has one method, `try_map`, that names every field once, with its shape. Whatever takes
//! the arrays from one space to another is a `Reads` (inputs) or `Writes` (outputs) that does so for
//! a single array, once for all ops: the check of lengths is here, that of a C caller's pointers in
//! `capi`, that of candle's tensors in `tensor`.

use std::fmt::Debug;

use bytemuck::Pod;

use crate::error::{Error, Result};

/// An element of an array that a pass reads or writes.
pub trait Element: Pod + Debug + Send + Sync {
    /// The type that the f64 references have in its place.
    type Wide: Copy + Debug;

    /// The numbers that it is made of, as candle has them.
    #[cfg(feature = "candle")]
    #[doc(hidden)]
    type Number: crate::tensor::Number;
}

macro_rules! elements {
    ($($element:ty, $wide:ty, $number:ty;)*) => {$(
        impl Element for $element {
            type Wide = $wide;
            #[cfg(feature = "candle")]
            type Number = $number;
        }
    )*};
}

elements! {
    f32, f64, f32;
    half::f16, f64, half::f16;
    half::bf16, f64, half::bf16;
    f64, f64, f64;
    u8, u8, u8;
    u32, u32, u32;
    i64, i64, i64;
}

/// A place where arrays are.
pub trait Space {
    /// An array that is read.
    type In<'a, T: Element>;
    /// An array that is written.
    type Out<'a, T: Element>;
}

/// The memory of the process: what the CPU passes take.
#[derive(Debug, Clone, Copy)]
pub struct Host;

impl Space for Host {
    type In<'a, T: Element> = &'a [T];
    type Out<'a, T: Element> = &'a mut [T];
}

/// The memory of the process in f64: what the references take.
#[derive(Debug, Clone, Copy)]
pub struct HostF64;

impl Space for HostF64 {
    type In<'a, T: Element> = &'a [T::Wide];
    type Out<'a, T: Element> = &'a mut [T::Wide];
}

/// The memory of a CUDA device: what the CUDA passes take.
#[cfg(any(feature = "cuda", feature = "simt"))]
#[derive(Debug, Clone, Copy)]
pub struct Device;

#[cfg(any(feature = "cuda", feature = "simt"))]
impl Space for Device {
    type In<'a, T: Element> = crate::cuda::Slice<'a, T>;
    type Out<'a, T: Element> = crate::cuda::SliceMut<'a, T>;
}

/// Candle's tensors, as a caller has them.
#[cfg(feature = "candle")]
#[derive(Debug, Clone, Copy)]
pub struct Tensors;

#[cfg(feature = "candle")]
impl Space for Tensors {
    type In<'a, T: Element> = &'a candle_core::Tensor;
    type Out<'a, T: Element> = ();
}

/// Names an op's lists in one space, where a struct literal then knows what its fields are.
macro_rules! in_space {
    ($space:ident: $($list:ident $(<$($element:ident),*>)?),* $(,)?) => {$(
        #[doc = concat!("[`", stringify!($list), "`](super::", stringify!($list), ") in [`",
            stringify!($space), "`](crate::memory::", stringify!($space), ").")]
        pub type $list<'a $(, $($element),*)?> =
            super::$list<'a, $crate::memory::$space $(, $($element),*)?>;
    )*};
}
pub(crate) use in_space;

/// A shape in parts: leading dimensions, say, and those behind them.
pub(crate) type Shape<'a> = &'a [&'a [usize]];

/// The number of elements, `None` if there is no such number.
pub(crate) fn elements(shape: Shape) -> Option<usize> {
    shape.iter().copied().flatten().try_fold(1, |product: usize, &size| product.checked_mul(size))
}

/// Takes inputs from one space to another.
pub(crate) trait Reads<From: Space, To: Space> {
    type Error;

    fn input<'a, 'b, T: Element>(
        &mut self,
        arg: &'static str,
        shape: Shape,
        from: &'b From::In<'a, T>,
    ) -> std::result::Result<To::In<'b, T>, Self::Error>;

    /// [`Reads::input`] if there is one.
    fn optional_input<'a, 'b, T: Element>(
        &mut self,
        arg: &'static str,
        shape: Shape,
        from: &'b Option<From::In<'a, T>>,
    ) -> std::result::Result<Option<To::In<'b, T>>, Self::Error> {
        from.as_ref().map(|from| self.input(arg, shape, from)).transpose()
    }
}

/// Takes outputs from one space to another.
pub(crate) trait Writes<From: Space, To: Space> {
    type Error;

    /// `over` are the inputs whose very memory the output may be on a device.
    fn output<'a, 'b, T: Element>(
        &mut self,
        arg: &'static str,
        shape: Shape,
        over: &[&'static str],
        to: &'b mut From::Out<'a, T>,
    ) -> std::result::Result<To::Out<'b, T>, Self::Error>;

    /// [`Writes::output`] if it is wanted.
    fn optional_output<'a, 'b, T: Element>(
        &mut self,
        arg: &'static str,
        shape: Shape,
        over: &[&'static str],
        to: &'b mut Option<From::Out<'a, T>>,
    ) -> std::result::Result<Option<To::Out<'b, T>>, Self::Error> {
        to.as_mut().map(|to| self.output(arg, shape, over, to)).transpose()
    }
}

/// A space whose arrays know their length.
pub(crate) trait HasLen: Space {
    fn input_len<T: Element>(array: &Self::In<'_, T>) -> usize;
    fn output_len<T: Element>(array: &Self::Out<'_, T>) -> usize;
}

impl HasLen for Host {
    fn input_len<T: Element>(array: &&[T]) -> usize {
        array.len()
    }

    fn output_len<T: Element>(array: &&mut [T]) -> usize {
        array.len()
    }
}

impl HasLen for HostF64 {
    fn input_len<T: Element>(array: &&[T::Wide]) -> usize {
        array.len()
    }

    fn output_len<T: Element>(array: &&mut [T::Wide]) -> usize {
        array.len()
    }
}

#[cfg(any(feature = "cuda", feature = "simt"))]
impl HasLen for Device {
    fn input_len<T: Element>(array: &crate::cuda::Slice<T>) -> usize {
        array.len()
    }

    fn output_len<T: Element>(array: &crate::cuda::SliceMut<T>) -> usize {
        array.len()
    }
}

/// Nowhere: what is left of arrays that were only to be checked.
pub(crate) struct Nowhere;

impl Space for Nowhere {
    type In<'a, T: Element> = ();
    type Out<'a, T: Element> = ();
}

/// Checks that every array of the op has as many elements as its shape says.
pub(crate) struct Lengths(pub &'static str);

impl Lengths {
    fn check(&self, arg: &'static str, shape: Shape, got: usize) -> Result<()> {
        Error::check_len(self.0, arg, got, elements(shape).unwrap_or(usize::MAX))
    }
}

impl<S: HasLen> Reads<S, Nowhere> for Lengths {
    type Error = Error;

    fn input<'a, 'b, T: Element>(
        &mut self,
        arg: &'static str,
        shape: Shape,
        from: &'b S::In<'a, T>,
    ) -> Result<()> {
        self.check(arg, shape, S::input_len(from))
    }
}

impl<S: HasLen> Writes<S, Nowhere> for Lengths {
    type Error = Error;

    fn output<'a, 'b, T: Element>(
        &mut self,
        arg: &'static str,
        shape: Shape,
        _: &[&'static str],
        to: &'b mut S::Out<'a, T>,
    ) -> Result<()> {
        self.check(arg, shape, S::output_len(to))
    }
}

/// The arguments of kernels: pointers, null for what is not given.
#[cfg(any(feature = "cuda", feature = "simt"))]
pub(crate) use device::{Pointer, Pointers};

#[cfg(any(feature = "cuda", feature = "simt"))]
mod device {
    use std::ptr::NonNull;

    use super::*;
    use crate::cuda::{Slice, SliceMut};

    /// Device pointers without lengths. In a `repr(C)` list, an array that is not given is a null
    /// pointer, so that the list has the layout of the kernel's.
    #[derive(Clone, Copy)]
    pub(crate) struct Pointers;

    impl Space for Pointers {
        type In<'a, T: Element> = Pointer<T>;
        type Out<'a, T: Element> = Pointer<T>;
    }

    /// A device pointer that is not null. `Option` of it is one that may be.
    #[repr(transparent)]
    pub(crate) struct Pointer<T>(NonNull<T>);

    impl<T> Clone for Pointer<T> {
        fn clone(&self) -> Self {
            *self
        }
    }

    impl<T> Copy for Pointer<T> {}

    impl<T> Pointer<T> {
        /// The pointer; any for an array without elements, which may have none.
        fn new(address: *mut T) -> Self {
            Self(NonNull::new(address).unwrap_or(NonNull::dangling()))
        }

        pub(crate) fn as_ptr(self) -> *mut T {
            self.0.as_ptr()
        }
    }

    impl Reads<Device, Pointers> for Lengths {
        type Error = Error;

        fn input<'a, 'b, T: Element>(
            &mut self,
            arg: &'static str,
            shape: Shape,
            from: &'b Slice<'a, T>,
        ) -> Result<Pointer<T>> {
            self.check(arg, shape, from.len())?;
            Ok(Pointer::new(from.as_ptr().cast_mut()))
        }
    }

    impl Writes<Device, Pointers> for Lengths {
        type Error = Error;

        fn output<'a, 'b, T: Element>(
            &mut self,
            arg: &'static str,
            shape: Shape,
            _: &[&'static str],
            to: &'b mut SliceMut<'a, T>,
        ) -> Result<Pointer<T>> {
            self.check(arg, shape, to.len())?;
            Ok(Pointer::new(to.as_mut_ptr()))
        }
    }
}
