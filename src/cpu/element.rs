//! The element types the ops take.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
    impl Sealed for u32 {}
    impl Sealed for i64 {}
}

/// An element type of logits: `f32`, `f16` or `bf16`. Arithmetic is in `f32` whatever it is.
pub trait Logit: sealed::Sealed + Copy + Send + Sync + 'static {
    /// The values of `source` as `f32`: itself, or `buffer` filled with them.
    ///
    /// `buffer` must be at least as long as `source`.
    fn widen<'a>(source: &'a [Self], buffer: &'a mut [f32]) -> &'a [f32];

    /// One value as `f32`.
    fn to_f32(self) -> f32;

    /// Rounds `source` to nearest even into `target`, of the same length.
    fn narrow(source: &[f32], target: &mut [Self]);

    /// The value zero.
    const ZERO: Self;
}

impl Logit for f32 {
    const ZERO: Self = 0.0;

    #[inline(always)]
    fn widen<'a>(source: &'a [f32], _buffer: &'a mut [f32]) -> &'a [f32] {
        source
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(source: &[f32], target: &mut [f32]) {
        target.copy_from_slice(source);
    }
}

impl Logit for bf16 {
    const ZERO: Self = bf16::ZERO;

    #[inline(always)]
    fn widen<'a>(source: &'a [bf16], buffer: &'a mut [f32]) -> &'a [f32] {
        let buffer = &mut buffer[..source.len()];
        for (wide, narrow) in buffer.iter_mut().zip(source) {
            *wide = f32::from_bits(u32::from(narrow.to_bits()) << 16);
        }
        buffer
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn narrow(source: &[f32], target: &mut [bf16]) {
        for (narrow, wide) in target.iter_mut().zip(source) {
            let bits = wide.to_bits();
            let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
            // Rounding could carry a NaN's payload into infinity.
            let quiet = (bits >> 16) | 0x40;
            *narrow = bf16::from_bits(if wide.is_nan() { quiet } else { rounded } as u16);
        }
    }
}

impl Logit for f16 {
    const ZERO: Self = f16::ZERO;

    #[inline(always)]
    fn widen<'a>(source: &'a [f16], buffer: &'a mut [f32]) -> &'a [f32] {
        let buffer = &mut buffer[..source.len()];
        source.convert_to_f32_slice(buffer);
        buffer
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }

    #[inline(always)]
    fn narrow(source: &[f32], target: &mut [f16]) {
        target.convert_from_f32_slice(source);
    }
}

/// An integer type of token ids: `u32` or `i64`.
pub trait TokenId: sealed::Sealed + Copy + Send + Sync + 'static {
    /// The id as a signed integer, in which `ignore_index` is given.
    fn id(self) -> i64;
}

impl TokenId for u32 {
    #[inline(always)]
    fn id(self) -> i64 {
        i64::from(self)
    }
}

impl TokenId for i64 {
    #[inline(always)]
    fn id(self) -> i64 {
        self
    }
}
