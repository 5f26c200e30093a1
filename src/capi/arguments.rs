//! What a C caller hands over, made into slices and values, or refused.

use std::marker::PhantomData;
use std::ptr::NonNull;

use super::{Fault, Result, PPOK_NONE};
use crate::error::Error;

/// Where the memory is, and the slices that lead to it.
pub(crate) trait Space {
    type In<'a, T: 'a>: Copy;
    type Out<'a, T: 'a>;

    /// Whether an op may write to the very memory it reads, where it says so.
    const IN_PLACE: bool;

    /// # Safety
    /// As of the slice's own constructor.
    unsafe fn input<'a, T: 'a>(address: *const T, len: usize) -> Self::In<'a, T>;

    /// # Safety
    /// As of the slice's own constructor.
    unsafe fn output<'a, T: 'a>(address: *mut T, len: usize) -> Self::Out<'a, T>;
}

/// The memory of the process.
pub(crate) struct Host;

impl Space for Host {
    type In<'a, T: 'a> = &'a [T];
    type Out<'a, T: 'a> = &'a mut [T];
    const IN_PLACE: bool = false;

    unsafe fn input<'a, T: 'a>(address: *const T, len: usize) -> &'a [T] {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts(address, len) }
    }

    unsafe fn output<'a, T: 'a>(address: *mut T, len: usize) -> &'a mut [T] {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts_mut(address, len) }
    }
}

/// The memory of a CUDA device.
#[cfg(any(feature = "cuda", feature = "simt"))]
pub(crate) struct Device;

#[cfg(any(feature = "cuda", feature = "simt"))]
impl Space for Device {
    type In<'a, T: 'a> = crate::cuda::Slice<'a, T>;
    type Out<'a, T: 'a> = crate::cuda::SliceMut<'a, T>;
    const IN_PLACE: bool = true;

    unsafe fn input<'a, T: 'a>(address: *const T, len: usize) -> Self::In<'a, T> {
        // SAFETY: the caller's.
        unsafe { crate::cuda::Slice::from_raw(address, len) }
    }

    unsafe fn output<'a, T: 'a>(address: *mut T, len: usize) -> Self::Out<'a, T> {
        // SAFETY: the caller's.
        unsafe { crate::cuda::SliceMut::from_raw(address, len) }
    }
}

/// The arrays of one call: each is looked at before a slice is made of it, and what is written must
/// overlap nothing else.
pub(crate) struct Memory<'a, S> {
    op: &'static str,
    spans: [Span; MOST_ARRAYS],
    count: usize,
    space: PhantomData<(&'a (), S)>,
}

/// The most arrays that an op takes.
const MOST_ARRAYS: usize = 16;

#[derive(Clone, Copy)]
struct Span {
    arg: &'static str,
    start: usize,
    end: usize,
    written: bool,
}

impl<'a, S: Space> Memory<'a, S> {
    /// # Safety
    /// Every address it is then given leads to as many elements as are asked of it, in the space, for
    /// `'a`, if it is neither null nor misaligned.
    pub(crate) unsafe fn new(op: &'static str) -> Self {
        let none = Span { arg: "", start: 0, end: 0, written: false };
        Self { op, spans: [none; MOST_ARRAYS], count: 0, space: PhantomData }
    }

    /// An array that is read.
    pub(crate) fn input<T>(
        &mut self,
        arg: &'static str,
        address: *const T,
        len: usize,
    ) -> Result<S::In<'a, T>> {
        let address = self.add(arg, address, len, false, &[])?;
        // SAFETY: `new` was promised it, and `add` has looked at it.
        Ok(unsafe { S::input(address.as_ptr(), len) })
    }

    /// An array that is read, and absent where the pointer is null.
    pub(crate) fn optional_input<T>(
        &mut self,
        arg: &'static str,
        address: *const T,
        len: usize,
    ) -> Result<Option<S::In<'a, T>>> {
        (!address.is_null()).then(|| self.input(arg, address, len)).transpose()
    }

    /// An array that is written.
    pub(crate) fn output<T>(
        &mut self,
        arg: &'static str,
        address: *mut T,
        len: usize,
    ) -> Result<S::Out<'a, T>> {
        self.output_over(arg, address, len, &[])
    }

    /// An array that is written, and not wanted where the pointer is null.
    pub(crate) fn optional_output<T>(
        &mut self,
        arg: &'static str,
        address: *mut T,
        len: usize,
    ) -> Result<Option<S::Out<'a, T>>> {
        self.optional_output_over(arg, address, len, &[])
    }

    /// An array that is written, and may be the very memory of one of the inputs `over` if the space
    /// allows.
    pub(crate) fn output_over<T>(
        &mut self,
        arg: &'static str,
        address: *mut T,
        len: usize,
        over: &[&'static str],
    ) -> Result<S::Out<'a, T>> {
        let over = if S::IN_PLACE { over } else { &[] };
        let address = self.add(arg, address, len, true, over)?;
        // SAFETY: `new` was promised it, and `add` has looked at it.
        Ok(unsafe { S::output(address.as_ptr(), len) })
    }

    /// [`Memory::output_over`], and not wanted where the pointer is null.
    pub(crate) fn optional_output_over<T>(
        &mut self,
        arg: &'static str,
        address: *mut T,
        len: usize,
        over: &[&'static str],
    ) -> Result<Option<S::Out<'a, T>>> {
        (!address.is_null()).then(|| self.output_over(arg, address, len, over)).transpose()
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

#[cfg(any(feature = "cuda", feature = "simt"))]
impl<'a> Memory<'a, Device> {
    /// The first `needed` elements of the caller's workspace.
    pub(crate) fn workspace<T>(
        &mut self,
        workspace: Workspace,
        needed: usize,
    ) -> Result<crate::cuda::SliceMut<'a, T>> {
        let bytes = needed.saturating_mul(size_of::<T>());
        if workspace.bytes < bytes {
            return Err(Fault::Workspace { op: self.op, needed: bytes, got: workspace.bytes });
        }
        let address = workspace.address as usize;
        if needed > 0 && !address.is_multiple_of(WORKSPACE_ALIGN) {
            let (op, align) = (self.op, WORKSPACE_ALIGN);
            return Err(Fault::Misaligned { op, arg: "workspace", address, align });
        }
        self.output("workspace", workspace.address.cast(), needed)
    }
}

/// What the header asks of every workspace, whatever is kept there today.
#[cfg(any(feature = "cuda", feature = "simt"))]
const WORKSPACE_ALIGN: usize = 16;

/// Memory for whatever a function keeps there while it runs.
#[derive(Clone, Copy)]
#[cfg_attr(not(any(feature = "cuda", feature = "simt")), expect(dead_code))]
pub(crate) struct Workspace {
    pub address: *mut std::ffi::c_void,
    pub bytes: usize,
}

/// Writes the bytes of `len` elements of workspace where the caller asked for them.
///
/// # Safety
/// The address is null, or misaligned, or leads to room for the number.
#[cfg(any(feature = "cuda", feature = "simt"))]
pub(crate) unsafe fn write_size<T>(op: &'static str, to: *mut usize, len: usize) -> Result<()> {
    if to.is_null() {
        return Err(Fault::Null { op, arg: "size" });
    }
    check_aligned(op, "size", to)?;
    // SAFETY: the caller's.
    unsafe { to.write(len.saturating_mul(size_of::<T>())) };
    Ok(())
}

/// [`write_size`] of a pass that needs no workspace for arguments of those sizes, nor for any others.
///
/// # Safety
/// As there.
#[cfg(any(feature = "cuda", feature = "simt"))]
pub(crate) unsafe fn write_no_size<T>(
    op: &'static str,
    _sizes: &[usize],
    to: *mut usize,
) -> Result<()> {
    // SAFETY: the caller's.
    unsafe { write_size::<T>(op, to, 0) }
}

/// Both or neither.
pub(crate) fn both<A>(
    op: &'static str,
    args: [&'static str; 2],
    a: Option<A>,
    b: Option<A>,
) -> Result<Option<[A; 2]>> {
    match (a, b) {
        (Some(a), Some(b)) => Ok(Some([a, b])),
        (None, None) => Ok(None),
        (None, Some(_)) => Err(Fault::Null { op, arg: args[0] }),
        (Some(_), None) => Err(Fault::Null { op, arg: args[1] }),
    }
}

/// How many elements an array of that shape has.
pub(crate) fn elements(op: &'static str, arg: &'static str, shape: &[usize]) -> Result<usize> {
    let product = shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(size));
    product.ok_or_else(|| too_large(op, arg, shape))
}

fn too_large(op: &'static str, arg: &'static str, shape: &[usize]) -> Fault {
    let expected = "a size that a process can address".into();
    Fault::Op(Error::Shape { op, arg, expected, got: format!("{shape:?}") })
}

/// An option of which [`PPOK_NONE`] says that it is left out.
pub(crate) fn optional(value: f64) -> Option<f64> {
    (value != PPOK_NONE).then_some(value)
}

/// The other way round.
pub(crate) fn or_none(option: Option<f64>) -> f64 {
    option.unwrap_or(PPOK_NONE)
}

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

/// Whether an option is set.
pub(crate) fn flag(op: &'static str, option: &'static str, number: i32) -> Result<bool> {
    choose(op, option, number, &[false, true])
}

/// `Ok` where a field without a meaning so far is 0.
pub(crate) fn check_reserved(op: &'static str, arg: &'static str, number: i32) -> Result<()> {
    if number == 0 {
        return Ok(());
    }
    Err(Fault::UnknownFields { op, arg })
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
    const FIRST_SIZE: usize;

    /// What a caller has that sets nothing.
    fn initial() -> Self;
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
    if from.is_null() {
        return Err(Fault::Null { op, arg });
    }
    check_aligned(op, arg, from)?;
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

/// Gives the caller's struct, of `size` bytes, its initial values.
///
/// # Safety
/// The address is null, or misaligned, or leads to as many bytes.
pub(crate) unsafe fn initialise<T: Growing>(
    op: &'static str,
    arg: &'static str,
    to: *mut T,
    size: usize,
) -> Result<()> {
    if to.is_null() {
        return Err(Fault::Null { op, arg });
    }
    check_aligned(op, arg, to)?;
    check_size::<T>(op, arg, size)?;
    let value = T::initial();
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

/// Runs `body` with `T` the type of the logits.
macro_rules! with_logits {
    ($op:expr, $arg:expr, $number:expr, $T:ident => $body:expr) => {
        match $number {
            $crate::capi::PPOK_F32 => {
                type $T = f32;
                $body
            }
            $crate::capi::PPOK_F16 => {
                type $T = half::f16;
                $body
            }
            $crate::capi::PPOK_BF16 => {
                type $T = half::bf16;
                $body
            }
            other => Err($crate::capi::arguments::unknown_type(
                $op,
                $arg,
                "PPOK_F32, PPOK_F16 or PPOK_BF16",
                other,
            )),
        }
    };
}
pub(crate) use with_logits;

/// Runs `body` with `I` the type of the token ids.
macro_rules! with_ids {
    ($op:expr, $arg:expr, $number:expr, $I:ident => $body:expr) => {
        match $number {
            $crate::capi::PPOK_U32 => {
                type $I = u32;
                $body
            }
            $crate::capi::PPOK_I64 => {
                type $I = i64;
                $body
            }
            other => {
                Err($crate::capi::arguments::unknown_type($op, $arg, "PPOK_U32 or PPOK_I64", other))
            }
        }
    };
}
pub(crate) use with_ids;

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
            initialise::<Second>("op", "x", std::ptr::from_mut(to).cast(), size)
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
        let mut memory = unsafe { Memory::<Host>::new("op") };
        memory.input("a", p, 4).unwrap();
        memory.input("b", p.wrapping_add(2), 4).unwrap();
        memory.output("c", p.wrapping_add(6), 2).unwrap();
        memory.output("none", p, 0).unwrap();
        for refused in [
            memory.output("d", p.wrapping_add(5), 1).map(drop),
            memory.input("d", p.wrapping_add(7), 1).map(drop),
            // In place, which this space has not.
            memory.output_over("d", p, 4, &["a"]).map(drop),
        ] {
            assert!(matches!(refused, Err(Fault::Overlap { .. })), "{refused:?}");
        }
    }

    #[test]
    fn addresses_that_cannot_be_are_refused() {
        let x = [0.0_f64; 2];
        let p = x.as_ptr();
        // SAFETY: no slice is used.
        let mut memory = unsafe { Memory::<Host>::new("op") };
        let mut refused = |address: *const f64, len| memory.input("x", address, len).unwrap_err();
        assert!(matches!(refused(std::ptr::null(), 1), Fault::Null { .. }));
        assert!(matches!(refused(p.wrapping_byte_add(1), 1), Fault::Misaligned { .. }));
        for len in [usize::MAX, usize::MAX / 8, isize::MAX as usize / 8 + 1] {
            assert!(matches!(refused(p, len), Fault::Op(Error::Shape { .. })));
        }
        // The end is past the last address.
        let last = (usize::MAX - 7) as *const f64;
        assert!(matches!(refused(last, 2), Fault::Op(Error::Shape { .. })));
        assert!(elements("op", "x", &[1 << 40, 1 << 40]).is_err());
        assert_eq!(elements("op", "x", &[0, usize::MAX]).unwrap(), 0);
    }
}
