//! Where the arrays of a pass are. A pass has one struct of inputs and one of outputs, generic over a
//! [`Space`]: the same list of fields holds slices for the CPU, device pointers for CUDA, tensors, and
//! what a C caller gave.
//!
//! The macro `list!` makes such a struct of the names, element types and shapes of its arrays. Whatever
//! takes the arrays from one space to another is a `Reads` (inputs) or `Writes` (outputs) that does so
//! for a single array, once for all ops: the check of lengths is here, that of a C caller's pointers
//! in `capi`, that of candle's tensors in `tensor`.

use std::fmt::Debug;
use std::ptr::NonNull;

use bytemuck::Pod;

use crate::cuda::{Slice, SliceMut};
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
#[derive(Debug, Clone, Copy)]
pub struct Device;

impl Space for Device {
    type In<'a, T: Element> = Slice<'a, T>;
    type Out<'a, T: Element> = SliceMut<'a, T>;
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

/// Makes a list of the arrays that a pass reads or writes, in any space, of what it names once:
///
/// ```text
/// list! {
///     /// What the inputs are.
///     inputs Inputs<T>((rows, vocab): (usize, usize)) {
///         /// Logits, `[rows, vocab]`.
///         logits: T [&[rows, vocab]],
///     } optional {
///         /// 0 where masked, `[rows]`.
///         mask: u8 [&[rows]],
///     }
/// }
/// ```
///
/// After the name come the types of elements that the list leaves open, and the sizes that shapes are
/// made of; a shape is in parts, as in [`Shape`]. `outputs` are written, and those of a pass that works
/// in place say `over ["x"]`: on a device an output may be the memory of that input. `with forward:
/// ForwardInputs<'a, S, T>`, before the braces, begins a list with another one.
///
/// The struct has the layout that the kernels take, `new` for what is not optional, and `try_map`,
/// which takes it to another space.
macro_rules! list {
    (@In $array:expr) => {
        &$array
    };
    (@Out $array:expr) => {
        &mut $array
    };
    (@array $name:ident $shape:tt $over:tt) => {
        &$crate::memory::Array { name: stringify!($name), shape: &$shape, over: &$over }
    };
    ($(#[$doc:meta])* inputs $($list:tt)*) => {
        $crate::memory::list! { @ [$(#[$doc])*] In Reads input [] $($list)* }
    };
    ($(#[$doc:meta])* outputs $($list:tt)*) => {
        $crate::memory::list! { @ [$(#[$doc])*] Out Writes output [mut] $($list)* }
    };
    (
        @ [$(#[$doc:meta])*] $Way:ident $Maps:ident $map:ident [$($mut:tt)?]
        $List:ident $(<$($T:ident),+>)? ($sizes:tt: $Sizes:ty)
        $(with $(#[$with_doc:meta])* $with:ident: $With:ty)?
        {$(
            $(#[$field_doc:meta])*
            $field:ident: $of:ty [$($part:expr),+] $(over [$($over:literal),+])?
        ),* $(,)?}
        $(optional {$(
            $(#[$optional_doc:meta])*
            $optional:ident: $optional_of:ty [$($optional_part:expr),+]
                $(over [$($optional_over:literal),+])?
        ),* $(,)?})?
    ) => {
        $(#[$doc])*
        #[repr(C)]
        pub struct $List<'a, S: $crate::memory::Space $($(, $T: $crate::memory::Element)+)?> {
            $($(#[$with_doc])* pub $with: $With,)?
            $($(#[$field_doc])* pub $field: S::$Way<'a, $of>,)*
            $($($(#[$optional_doc])* pub $optional: Option<S::$Way<'a, $optional_of>>,)*)?
        }

        impl<'a, S: $crate::memory::Space $($(, $T: $crate::memory::Element)+)?>
            $List<'a, S $($(, $T)+)?>
        {
            #[doc = concat!("What is not optional, to be filled in with `", stringify!($List),
                " { mask: Some(..), ..", stringify!($List), "::new(..) }`, say.")]
            #[allow(clippy::new_without_default)]
            pub fn new($($with: $With,)? $($field: S::$Way<'a, $of>),*) -> Self {
                Self { $($with,)? $($field,)* $($($optional: None,)*)? }
            }

            /// The list in another space.
            pub(crate) fn try_map<'b, To, C>(
                &'b $($mut)? self,
                $sizes: $Sizes,
                c: &mut C,
            ) -> $crate::error::Result<$List<'b, To $($(, $T)+)?>, C::Error>
            where
                To: $crate::memory::Space,
                C: $crate::memory::$Maps<S, To>,
            {
                Ok($List {
                    $($with: self.$with.try_map($sizes, c)?,)?
                    $($field: c.$map(
                        $crate::memory::list!(@array $field [$($part),+] [$($($over),+)?]),
                        $crate::memory::list!(@$Way self.$field),
                    )?,)*
                    $($($optional: match $crate::memory::list!(@$Way self.$optional) {
                        None => None,
                        Some(given) => Some(c.$map($crate::memory::list!(
                            @array $optional [$($optional_part),+] [$($($optional_over),+)?]
                        ), given)?),
                    },)*)?
                })
            }
        }

        // `derive` would ask too much of the space and too little of the arrays.
        impl<'a, S: $crate::memory::Space $($(, $T: $crate::memory::Element)+)?> Clone
            for $List<'a, S $($(, $T)+)?>
        where
            $($With: Clone,)?
            $(S::$Way<'a, $of>: Clone,)*
            $($(S::$Way<'a, $optional_of>: Clone,)*)?
        {
            fn clone(&self) -> Self {
                Self {
                    $($with: self.$with.clone(),)?
                    $($field: self.$field.clone(),)*
                    $($($optional: self.$optional.clone(),)*)?
                }
            }
        }

        impl<'a, S: $crate::memory::Space $($(, $T: $crate::memory::Element)+)?> Copy
            for $List<'a, S $($(, $T)+)?>
        where
            $($With: Copy,)?
            $(S::$Way<'a, $of>: Copy,)*
            $($(S::$Way<'a, $optional_of>: Copy,)*)?
        {
        }

        impl<'a, S: $crate::memory::Space $($(, $T: $crate::memory::Element)+)?> std::fmt::Debug
            for $List<'a, S $($(, $T)+)?>
        where
            $($With: std::fmt::Debug,)?
            $(S::$Way<'a, $of>: std::fmt::Debug,)*
            $($(S::$Way<'a, $optional_of>: std::fmt::Debug,)*)?
        {
            fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.debug_struct(stringify!($List))
                    $(.field(stringify!($with), &self.$with))?
                    $(.field(stringify!($field), &self.$field))*
                    $($(.field(stringify!($optional), &self.$optional))*)?
                    .finish()
            }
        }
    };
}
pub(crate) use list;

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

/// One of the arrays of a list.
pub(crate) struct Array<'a> {
    pub name: &'static str,
    pub shape: Shape<'a>,
    /// The inputs whose very memory an output may be on a device; C callers need it.
    #[cfg_attr(not(feature = "capi"), allow(dead_code))]
    pub over: &'a [&'static str],
}

impl Array<'_> {
    /// The number of elements, `None` if there is no such number.
    #[inline(always)]
    pub(crate) fn len(&self) -> Option<usize> {
        let mut sizes = self.shape.iter().copied().flatten();
        sizes.try_fold(1, |product: usize, &size| product.checked_mul(size))
    }
}

/// Takes inputs from one space to another.
pub(crate) trait Reads<From: Space, To: Space> {
    type Error;

    fn input<'b, T: Element>(
        &mut self,
        array: &Array,
        from: &'b From::In<'_, T>,
    ) -> Result<To::In<'b, T>, Self::Error>;
}

/// Takes outputs from one space to another.
pub(crate) trait Writes<From: Space, To: Space> {
    type Error;

    fn output<'b, T: Element>(
        &mut self,
        array: &Array,
        to: &'b mut From::Out<'_, T>,
    ) -> Result<To::Out<'b, T>, Self::Error>;
}

/// A space whose arrays know their length.
pub(crate) trait HasLen: Space {
    fn input_len<T: Element>(array: &Self::In<'_, T>) -> usize;
    fn output_len<T: Element>(array: &Self::Out<'_, T>) -> usize;
}

macro_rules! has_len {
    ($($space:ident),*) => {$(
        impl HasLen for $space {
            fn input_len<T: Element>(array: &Self::In<'_, T>) -> usize {
                array.len()
            }

            fn output_len<T: Element>(array: &Self::Out<'_, T>) -> usize {
                array.len()
            }
        }
    )*};
}

has_len!(Host, HostF64);

/// Nowhere: what is left of arrays that were only to be checked.
pub(crate) struct Nowhere;

impl Space for Nowhere {
    type In<'a, T: Element> = ();
    type Out<'a, T: Element> = ();
}

/// Checks that every array of the op has as many elements as its shape says.
pub(crate) struct Lengths(pub &'static str);

impl Lengths {
    #[inline(always)]
    fn check(&self, array: &Array, got: usize) -> Result<()> {
        Error::check_len(self.0, array.name, got, array.len().unwrap_or(usize::MAX))
    }
}

impl<S: HasLen> Reads<S, Nowhere> for Lengths {
    type Error = Error;

    fn input<T: Element>(&mut self, array: &Array, from: &S::In<'_, T>) -> Result<()> {
        self.check(array, S::input_len(from))
    }
}

impl<S: HasLen> Writes<S, Nowhere> for Lengths {
    type Error = Error;

    fn output<T: Element>(&mut self, array: &Array, to: &mut S::Out<'_, T>) -> Result<()> {
        self.check(array, S::output_len(to))
    }
}

/// The arguments of kernels: device pointers without lengths. In a `repr(C)` list, an array that is not
/// given is a null pointer, so that the list has the layout of the kernel's.
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
    pub(crate) fn new(address: *mut T) -> Self {
        Self(NonNull::new(address).unwrap_or(NonNull::dangling()))
    }

    pub(crate) fn as_ptr(self) -> *mut T {
        self.0.as_ptr()
    }
}

impl Reads<Device, Pointers> for Lengths {
    type Error = Error;

    fn input<T: Element>(&mut self, array: &Array, from: &Slice<T>) -> Result<Pointer<T>> {
        self.check(array, from.len())?;
        Ok(Pointer::new(from.as_ptr().cast_mut()))
    }
}

impl Writes<Device, Pointers> for Lengths {
    type Error = Error;

    fn output<T: Element>(&mut self, array: &Array, to: &mut SliceMut<T>) -> Result<Pointer<T>> {
        self.check(array, to.len())?;
        Ok(Pointer::new(to.as_mut_ptr()))
    }
}
