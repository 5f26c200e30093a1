//! What a C caller hands over, made into slices and values, or refused.

use std::ffi::c_void;
use std::ptr::NonNull;

use super::{Fault, Pass, Result, PPOK_NONE};
use crate::cuda::{Slice, SliceMut};
use crate::error::Error;
use crate::memory::{Array, Device, Element, Host, Reads, Space, Writes};

/// The memory of a C caller: pointers that have not been looked at.
pub(crate) struct Raw;

impl Space for Raw {
    type In<'a, T: Element> = *const T;
    type Out<'a, T: Element> = *mut T;
}

/// A pointer of the header's to what may be any type of elements, as one of [`Raw`].
pub(crate) trait Given<P>: Copy {
    fn pointer(self) -> P;

    /// `None` where it is null.
    fn given(self) -> Option<P>;
}

macro_rules! given {
    ($($pointer:ty => $given:ty),*) => {$(
        impl<T: Element> Given<$given> for $pointer {
            fn pointer(self) -> $given {
                self.cast()
            }

            fn given(self) -> Option<$given> {
                (!self.is_null()).then_some(self.cast())
            }
        }
    )*};
}

given!(*const T => *const T, *mut T => *mut T, *const c_void => *const T, *mut c_void => *mut T);

/// A list of what the caller gave: the fields of that name, those that are not optional first.
macro_rules! list_of {
    (
        $args:expr, $List:ident $(::<$($of:ty),+>)?,
        [$($field:ident),*], [$($optional:ident),*]
    ) => {
        $List $(::<$($of),+>)? {
            $($field: $crate::capi::arguments::Given::pointer($args.$field),)*
            $($optional: $crate::capi::arguments::Given::given($args.$optional),)*
        }
    };
}
pub(crate) use list_of;

/// The arrays of one call: each is looked at before a slice is made of it, and what is written must
/// overlap nothing else.
pub(crate) struct Memory {
    op: &'static str,
    spans: [Span; MOST_ARRAYS],
    count: usize,
}

/// The most arrays of a pass; [`Memory::new`] does not compile for one that could have more.
const MOST_ARRAYS: usize = 32;

#[derive(Clone, Copy)]
struct Span {
    arg: &'static str,
    start: usize,
    end: usize,
    written: bool,
}

impl Memory {
    /// Checks the arrays of the pass with these arguments.
    ///
    /// # Safety
    /// Every pointer it is then given leads to as many elements as are asked of it, in the memory that it
    /// is to be in, for as long as the call runs, if it is neither null nor misaligned.
    pub(crate) unsafe fn new<A: Pass>() -> Self {
        // An array is a word of the struct, and the workspace makes up for that of the size.
        const { assert!(size_of::<A>() / size_of::<usize>() <= MOST_ARRAYS) };
        // SAFETY: the caller's.
        unsafe { Self::of(A::OP) }
    }

    /// Checks up to [`MOST_ARRAYS`] arrays of a function that is no pass.
    ///
    /// # Safety
    /// As of [`Memory::new`].
    pub(crate) unsafe fn of(op: &'static str) -> Self {
        let none = Span { arg: "", start: 0, end: 0, written: false };
        Self { op, spans: [none; MOST_ARRAYS], count: 0 }
    }

    /// The options that the caller gave, or the defaults where the pointer is null.
    pub(crate) fn options<O: Options>(&self, options: *const O) -> Result<O::Options> {
        // SAFETY: `new` was promised it.
        unsafe { read_or_default(self.op, "options", options) }?.options()
    }

    /// The elements of an array, and where they are.
    fn array<T>(
        &mut self,
        array: &Array,
        address: *const T,
        written: bool,
    ) -> Result<(NonNull<T>, usize)> {
        let Some(len) = array.len() else {
            return Err(too_large(self.op, array.name, &array.shape.concat()));
        };
        Ok((self.add(array.name, address, len, written, array.over)?, len))
    }

    /// The workspace as elements of the type that the pass keeps there.
    pub(crate) fn workspace<'a, T>(&mut self, workspace: Workspace) -> Result<SliceMut<'a, T>> {
        let (op, align) = (self.op, WORKSPACE_ALIGN);
        let Workspace { address, bytes, needed } = workspace;
        if bytes < needed {
            return Err(Fault::Workspace { op, needed, got: bytes });
        }
        if needed > 0 && !(address as usize).is_multiple_of(align) {
            let address = address as usize;
            return Err(Fault::Misaligned { op, arg: "workspace", address, align });
        }
        let len = needed / size_of::<T>();
        let address = self.add("workspace", address.cast::<T>(), len, true, &[])?;
        // SAFETY: `new` was promised it, and `add` has looked at it.
        Ok(unsafe { SliceMut::from_raw(address.as_ptr(), len) })
    }

    fn add<T>(
        &mut self,
        arg: &'static str,
        address: *const T,
        len: usize,
        written: bool,
        over: &[&'static str],
    ) -> Result<NonNull<T>> {
        let op = self.op;
        if len == 0 {
            return Ok(NonNull::dangling());
        }
        let Some(found) = NonNull::new(address.cast_mut()) else {
            return Err(Fault::Null { op, arg });
        };
        check_aligned(op, arg, address)?;
        let start = address as usize;
        let bytes = len.checked_mul(size_of::<T>()).filter(|&bytes| isize::try_from(bytes).is_ok());
        let Some(end) = bytes.and_then(|bytes| start.checked_add(bytes)) else {
            return Err(too_large(op, arg, &[len]));
        };
        let span = Span { arg, start, end, written };
        for other in &self.spans[..self.count] {
            let overlap = start < other.end && other.start < end;
            let same = (start, end) == (other.start, other.end);
            let allowed = same && over.contains(&other.arg);
            if overlap && (written || other.written) && !allowed {
                return Err(Fault::Overlap { op, arg, other: other.arg });
            }
        }
        self.spans[self.count] = span;
        self.count += 1;
        Ok(found)
    }
}

impl Reads<Raw, Host> for Memory {
    type Error = Fault;

    fn input<'b, T: Element>(&mut self, array: &Array, from: &'b *const T) -> Result<&'b [T]> {
        let (address, len) = self.array(array, *from, false)?;
        // SAFETY: `new` was promised it, and `array` has looked at it.
        Ok(unsafe { std::slice::from_raw_parts(address.as_ptr(), len) })
    }
}

impl Writes<Raw, Host> for Memory {
    type Error = Fault;

    fn output<'b, T: Element>(&mut self, array: &Array, to: &'b mut *mut T) -> Result<&'b mut [T]> {
        // Nothing is written over an input here, where slices would be of the same.
        let (address, len) = self.array(&Array { over: &[], ..*array }, *to, true)?;
        // SAFETY: `new` was promised it, and `array` has looked at it.
        Ok(unsafe { std::slice::from_raw_parts_mut(address.as_ptr(), len) })
    }
}

impl Reads<Raw, Device> for Memory {
    type Error = Fault;

    fn input<'b, T: Element>(&mut self, array: &Array, from: &'b *const T) -> Result<Slice<'b, T>> {
        let (address, len) = self.array(array, *from, false)?;
        // SAFETY: `new` was promised it, and `array` has looked at it.
        Ok(unsafe { Slice::from_raw(address.as_ptr(), len) })
    }
}

impl Writes<Raw, Device> for Memory {
    type Error = Fault;

    fn output<'b, T: Element>(
        &mut self,
        array: &Array,
        to: &'b mut *mut T,
    ) -> Result<SliceMut<'b, T>> {
        let (address, len) = self.array(array, *to, true)?;
        // SAFETY: `new` was promised it, and `array` has looked at it.
        Ok(unsafe { SliceMut::from_raw(address.as_ptr(), len) })
    }
}

/// Device memory for whatever a pass keeps there while it runs, as the caller gave it.
#[derive(Clone, Copy)]
pub(crate) struct Workspace {
    pub address: *mut c_void,
    pub bytes: usize,
    /// The bytes that the pass asked for.
    pub needed: usize,
}

/// The alignment that the header asks of every workspace, whatever is kept there today.
const WORKSPACE_ALIGN: usize = 16;

fn too_large(op: &'static str, arg: &'static str, shape: &[usize]) -> Fault {
    let expected = "a size that a process can address".into();
    Fault::Op(Error::Shape { op, arg, expected, got: format!("{shape:?}") })
}

/// An option in the form that the header has it in: one number, or two of which one says what the
/// other means.
pub(crate) trait Encoded: Sized {
    type Code;

    fn encode(self) -> Self::Code;

    /// An error, naming the option, for a number that stands for nothing.
    fn decode(op: &'static str, option: &'static str, code: Self::Code) -> Result<Self>;
}

impl Encoded for f64 {
    type Code = f64;

    fn encode(self) -> f64 {
        self
    }

    fn decode(_: &'static str, _: &'static str, number: f64) -> Result<f64> {
        Ok(number)
    }
}

/// One that may be left out, of which [`PPOK_NONE`] says that it is.
impl Encoded for Option<f64> {
    type Code = f64;

    fn encode(self) -> f64 {
        self.unwrap_or(PPOK_NONE)
    }

    fn decode(_: &'static str, _: &'static str, number: f64) -> Result<Self> {
        Ok((number != PPOK_NONE).then_some(number))
    }
}

impl Encoded for bool {
    type Code = i32;

    fn encode(self) -> i32 {
        i32::from(self)
    }

    fn decode(op: &'static str, option: &'static str, number: i32) -> Result<Self> {
        choose(op, option, number, &[false, true])
    }
}

/// Enums whose values the header numbers from 0 on, in the order in which they are declared.
macro_rules! choices {
    ($($Enum:ident { $($value:ident),+ })*) => {$(
        impl $crate::capi::arguments::Encoded for $Enum {
            type Code = i32;

            fn encode(self) -> i32 {
                self as i32
            }

            fn decode(op: &'static str, option: &'static str, number: i32) -> Result<Self> {
                $crate::capi::arguments::choose(op, option, number, &[$($Enum::$value),+])
            }
        }
    )*};
}
pub(crate) use choices;

/// One of the values that an option's numbers from 0 on stand for.
pub(crate) fn choose<T: Copy>(
    op: &'static str,
    option: &'static str,
    number: i32,
    values: &[T],
) -> Result<T> {
    let value = usize::try_from(number).ok().and_then(|index| values.get(index));
    value.copied().ok_or_else(|| {
        let expected = format!("0 to {}", values.len() - 1);
        Fault::Op(Error::Option { op, option, expected, got: number.to_string() })
    })
}

/// Says which fields of the header's struct of options an op's own ones are [`Encoded`] in. A field
/// without a meaning so far, in brackets, must be 0.
///
/// The struct is of numbers without padding, and its first field is its size.
macro_rules! options {
    ($Options:ident, $Own:ty, $op:expr, [$($reserved:ident)?], {
        $($field:ident $(& $second:ident)? => $($own:ident).+),+ $(,)?
    }) => {
        // SAFETY: as said above.
        unsafe impl $crate::capi::arguments::Growing for $Options {
            fn initial() -> Self {
                $crate::capi::arguments::Options::encoded(<$Own>::default())
            }
        }

        impl $crate::capi::arguments::Options for $Options {
            const OP: &'static str = $op;
            type Options = $Own;

            fn encoded(own: $Own) -> Self {
                use $crate::capi::arguments::Encoded;
                // SAFETY: of numbers only.
                let mut options: Self = unsafe { std::mem::zeroed() };
                options.struct_size = size_of::<Self>();
                $((options.$field $(, options.$second)?) = own.$($own).+.encode();)+
                options
            }

            fn options(&self) -> Result<$Own> {
                use $crate::capi::arguments::Encoded;
                $($crate::capi::arguments::check_reserved($op, "options", self.$reserved)?;)?
                let mut own = <$Own>::default();
                $(
                    let code = (self.$field $(, self.$second)?);
                    own.$($own).+ = Encoded::decode($op, stringify!($field), code)?;
                )+
                Ok(own)
            }
        }
    };
}
pub(crate) use options;

/// `Ok` where a field without a meaning so far is 0.
pub(crate) fn check_reserved(op: &'static str, arg: &'static str, number: i32) -> Result<()> {
    if number == 0 {
        return Ok(());
    }
    Err(Fault::UnknownFields { op, arg })
}

/// `Ok` where a pointer can be followed.
pub(crate) fn check_pointer<T>(op: &'static str, arg: &'static str, to: *const T) -> Result<()> {
    if to.is_null() {
        return Err(Fault::Null { op, arg });
    }
    check_aligned(op, arg, to)
}

fn check_aligned<T>(op: &'static str, arg: &'static str, address: *const T) -> Result<()> {
    if address.is_aligned() {
        return Ok(());
    }
    Err(Fault::Misaligned { op, arg, address: address as usize, align: align_of::<T>() })
}

/// A struct of the header that begins with its own size in bytes, so that later versions can add
/// fields at its end: older callers go on with the defaults there, and newer callers with an older
/// library as long as they leave those fields 0.
///
/// # Safety
/// `repr(C)`, of numbers and pointers only, without padding; the first is `struct_size: usize`.
pub(crate) unsafe trait Growing: Copy {
    /// Its size in the first version that had it.
    const FIRST_SIZE: usize = size_of::<Self>();

    /// The struct of a caller that sets nothing: zeros and null pointers, and in options the defaults.
    fn initial() -> Self {
        // SAFETY: of numbers and pointers only, by the trait.
        unsafe { std::mem::zeroed() }
    }
}

/// Options of the header, which begin as the defaults.
pub(crate) trait Options: Growing {
    /// The op as errors name it.
    const OP: &'static str;

    /// The op's own.
    type Options;

    fn options(&self) -> Result<Self::Options>;

    /// The options as a struct of the header.
    fn encoded(options: Self::Options) -> Self;
}

/// No struct will ever be as large, and what says so was not initialised.
const LARGEST: usize = 4096;

/// The caller's struct, in the form of this version.
///
/// # Safety
/// The address is null, or misaligned, or leads to as many bytes as the number there says.
pub(crate) unsafe fn read<T: Growing>(
    op: &'static str,
    arg: &'static str,
    from: *const T,
) -> Result<T> {
    check_pointer(op, arg, from)?;
    // SAFETY: the first field, by the trait.
    let size = unsafe { from.cast::<usize>().read() };
    check_size::<T>(op, arg, size)?;
    let mut value = T::initial();
    let known = size.min(size_of::<T>());
    let bytes = from.cast::<u8>();
    // SAFETY: both have so many bytes, and any bytes make a value.
    unsafe { bytes.copy_to_nonoverlapping((&raw mut value).cast(), known) };
    // SAFETY: the caller's struct is `size` long.
    let rest = unsafe { std::slice::from_raw_parts(bytes.add(known), size - known) };
    if rest.iter().any(|&byte| byte != 0) {
        return Err(Fault::UnknownFields { op, arg });
    }
    Ok(value)
}

/// [`read`] where null stands for the defaults.
///
/// # Safety
/// As there.
pub(crate) unsafe fn read_or_default<T: Growing>(
    op: &'static str,
    arg: &'static str,
    from: *const T,
) -> Result<T> {
    if from.is_null() {
        return Ok(T::initial());
    }
    // SAFETY: the caller's.
    unsafe { read(op, arg, from) }
}

/// Gives the caller's struct, of `size` bytes, this value.
///
/// # Safety
/// The address is null, or misaligned, or leads to as many bytes.
pub(crate) unsafe fn initialise<T: Growing>(
    op: &'static str,
    arg: &'static str,
    to: *mut T,
    size: usize,
    value: T,
) -> Result<()> {
    check_pointer(op, arg, to)?;
    check_size::<T>(op, arg, size)?;
    let known = size.min(size_of::<T>());
    let bytes = to.cast::<u8>();
    // SAFETY: both have so many bytes; the caller's has `size`; the first field is the size.
    unsafe {
        bytes.copy_from_nonoverlapping((&raw const value).cast(), known);
        bytes.add(known).write_bytes(0, size - known);
        to.cast::<usize>().write(size);
    }
    Ok(())
}

fn check_size<T: Growing>(op: &'static str, arg: &'static str, size: usize) -> Result<()> {
    if (T::FIRST_SIZE..=LARGEST).contains(&size) {
        return Ok(());
    }
    Err(Fault::StructSize { op, arg, least: T::FIRST_SIZE, most: LARGEST, got: size })
}

/// Runs `body` with `T` the type that a number of the header stands for.
macro_rules! with_type {
    (
        $op:expr, $arg:expr, $number:expr, $T:ident => $body:expr,
        $expected:literal, $($code:ident: $type:ty),+
    ) => {
        match $number {
            $($crate::capi::$code => {
                type $T = $type;
                $body
            })+
            other => Err($crate::capi::arguments::unknown_type($op, $arg, $expected, other)),
        }
    };
}
pub(crate) use with_type;

/// Runs `body` with `T` the type of the logits.
macro_rules! with_logits {
    ($op:expr, $number:expr, $T:ident => $body:expr) => {
        $crate::capi::arguments::with_type!(
            $op, "logits", $number, $T => $body,
            "PPOK_F32, PPOK_F16 or PPOK_BF16",
            PPOK_F32: f32, PPOK_F16: half::f16, PPOK_BF16: half::bf16
        )
    };
}
pub(crate) use with_logits;

/// Runs `body` with `I` the type of the token ids.
macro_rules! with_targets {
    ($op:expr, $number:expr, $I:ident => $body:expr) => {
        $crate::capi::arguments::with_type!(
            $op, "targets", $number, $I => $body,
            "PPOK_U32 or PPOK_I64",
            PPOK_U32: u32, PPOK_I64: i64
        )
    };
}
pub(crate) use with_targets;

pub(crate) fn unknown_type(
    op: &'static str,
    arg: &'static str,
    expected: &str,
    number: i32,
) -> Fault {
    Fault::Op(Error::Dtype { op, arg, expected: expected.into(), got: number.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A struct as it was, as it is, and as it will be.
    #[derive(Debug, Clone, Copy, PartialEq)]
    #[repr(C)]
    struct First {
        struct_size: usize,
        a: u64,
    }

    #[derive(Debug, Clone, Copy, PartialEq)]
    #[repr(C)]
    struct Second {
        struct_size: usize,
        a: u64,
        b: f64,
    }

    #[derive(Debug, Clone, Copy, PartialEq)]
    #[repr(C)]
    struct Third {
        struct_size: usize,
        a: u64,
        b: f64,
        c: u64,
    }

    const SECOND: Second = Second { struct_size: size_of::<Second>(), a: 7, b: 0.5 };

    // SAFETY: numbers of 8 bytes, the size first.
    unsafe impl Growing for Second {
        const FIRST_SIZE: usize = size_of::<First>();

        fn initial() -> Self {
            SECOND
        }
    }

    #[test]
    fn structs_of_other_versions_are_read() {
        let first = First { struct_size: size_of::<First>(), a: 3 };
        let second = Second { b: 2.0, ..SECOND };
        let mut third = Third { struct_size: size_of::<Third>(), a: 4, b: 2.0, c: 0 };
        // SAFETY: each is as long as it says.
        unsafe {
            let older = read::<Second>("op", "x", (&raw const first).cast()).unwrap();
            assert_eq!((older.a, older.b), (3, 0.5));
            assert_eq!(read("op", "x", &second).unwrap(), second);
            let newer = read::<Second>("op", "x", (&raw const third).cast()).unwrap();
            assert_eq!((newer.a, newer.b), (4, 2.0));
            third.c = 1;
            let refused = read::<Second>("op", "x", (&raw const third).cast());
            assert!(matches!(refused, Err(Fault::UnknownFields { .. })), "{refused:?}");
            assert_eq!(read_or_default::<Second>("op", "x", std::ptr::null()).unwrap(), SECOND);
        }
    }

    #[test]
    fn structs_of_other_versions_are_initialised() {
        let mut third = Third { struct_size: 1, a: 1, b: 1.0, c: 1 };
        // SAFETY: it is as long as each of these.
        let initialise = |to: &mut Third, size| unsafe {
            let to = std::ptr::from_mut(to).cast();
            initialise::<Second>("op", "x", to, size, Second::initial())
        };
        initialise(&mut third, size_of::<First>()).unwrap();
        assert_eq!(third, Third { struct_size: size_of::<First>(), a: 7, b: 1.0, c: 1 });
        initialise(&mut third, size_of::<Third>()).unwrap();
        assert_eq!(third, Third { struct_size: size_of::<Third>(), a: 7, b: 0.5, c: 0 });
        for size in [0, size_of::<First>() - 1, LARGEST + 1, usize::MAX] {
            let refused = initialise(&mut third, size);
            assert!(matches!(refused, Err(Fault::StructSize { .. })), "{refused:?}");
            third.struct_size = size;
            // SAFETY: nothing but the size is read.
            let refused = unsafe { read::<Second>("op", "x", (&raw const third).cast()) };
            assert!(matches!(refused, Err(Fault::StructSize { .. })), "{refused:?}");
        }
    }

    #[test]
    fn arrays_that_are_written_overlap_nothing() {
        let mut x = [0.0_f32; 8];
        let p = x.as_mut_ptr();
        // SAFETY: no slice is used.
        let mut memory = unsafe { Memory::of("op") };
        let mut add = |arg, at, len, written, over: &[&'static str]| {
            let array = Array { name: arg, shape: &[&[len]], over };
            memory.array(&array, p.wrapping_add(at), written).map(drop)
        };
        add("a", 0, 4, false, &[]).unwrap();
        add("b", 2, 4, false, &[]).unwrap();
        add("c", 6, 2, true, &[]).unwrap();
        add("none", 0, 0, true, &[]).unwrap();
        for refused in [
            add("d", 5, 1, true, &[]),
            add("d", 7, 1, false, &[]),
            // Over an input, of which another is a part.
            add("d", 0, 4, true, &["a"]),
            add("d", 2, 4, true, &["a", "b"]),
        ] {
            assert!(matches!(refused, Err(Fault::Overlap { .. })), "{refused:?}");
        }
        // SAFETY: no slice is used.
        let mut memory = unsafe { Memory::of("op") };
        let mut p = p;
        let array = |name| Array { name, shape: &[&[4]], over: &["a"] };
        Reads::<Raw, Host>::input(&mut memory, &array("a"), &p.cast_const()).unwrap();
        let refused = Writes::<Raw, Host>::output(&mut memory, &array("d"), &mut p);
        assert!(matches!(refused, Err(Fault::Overlap { .. })), "not in place: {refused:?}");
    }

    #[test]
    fn addresses_that_cannot_be_are_refused() {
        let x = [0.0_f64; 2];
        let p = x.as_ptr();
        // SAFETY: no slice is used.
        let mut memory = unsafe { Memory::of("op") };
        let mut array = |shape: &[usize], address: *const f64| {
            memory.array(&Array { name: "x", shape: &[shape], over: &[] }, address, false)
        };
        let mut refused = |address, len| array(&[len], address).unwrap_err();
        assert!(matches!(refused(std::ptr::null(), 1), Fault::Null { .. }));
        assert!(matches!(refused(p.wrapping_byte_add(1), 1), Fault::Misaligned { .. }));
        for len in [usize::MAX, usize::MAX / 8, isize::MAX as usize / 8 + 1] {
            assert!(matches!(refused(p, len), Fault::Op(Error::Shape { .. })));
        }
        // The end is past the last address.
        let last = (usize::MAX - 7) as *const f64;
        assert!(matches!(refused(last, 2), Fault::Op(Error::Shape { .. })));
        assert!(matches!(array(&[1 << 40, 1 << 40], p), Err(Fault::Op(Error::Shape { .. }))));
        assert_eq!(array(&[0, usize::MAX], p).unwrap().1, 0);
    }
}
