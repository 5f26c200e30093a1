//! The element types the ops take.

use half::{bf16, f16};

use super::math::LOGIT_LANES;
use crate::memory::Element;

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
    impl Sealed for u32 {}
    impl Sealed for i64 {}
}

/// An element type of logits: `f32`, `f16` or `bf16`. Arithmetic is in `f32` whatever it is.
///
/// The conversions are branch-free, so that a loop over logits widens and narrows in registers.
pub trait Logit: sealed::Sealed + Element {
    /// The value as `f32`, which holds it exactly.
    fn to_f32(self) -> f32;

    /// The value next to `x`; of two, the even one.
    fn from_f32(x: f32) -> Self;

    /// The values as `f32`, for sums and maxima: in whichever order costs least, the same for all values
    /// of the type.
    #[doc(hidden)]
    #[inline(always)]
    fn widen(lanes: &[Self; LOGIT_LANES]) -> [f32; LOGIT_LANES] {
        let mut wide = [0.0; LOGIT_LANES];
        for (wide, x) in wide.iter_mut().zip(lanes) {
            *wide = x.to_f32();
        }
        wide
    }

    /// The value zero.
    const ZERO: Self;

    /// The type's name: "f32", "f16" or "bf16".
    const NAME: &'static str;
}

impl Logit for f32 {
    const ZERO: Self = 0.0;
    const NAME: &'static str = "f32";

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }
}

impl Logit for bf16 {
    const ZERO: Self = bf16::ZERO;
    const NAME: &'static str = "bf16";

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn widen(lanes: &[Self; LOGIT_LANES]) -> [f32; LOGIT_LANES] {
        // Two at a time: an instruction each, where one after the other would take two.
        let pairs: [u32; LOGIT_LANES / 2] = bytemuck::cast(*lanes);
        let mut wide = [0.0; LOGIT_LANES];
        for (i, pair) in pairs.into_iter().enumerate() {
            wide[i] = f32::from_bits(pair << 16);
            wide[LOGIT_LANES / 2 + i] = f32::from_bits(pair & 0xffff_0000);
        }
        wide
    }

    #[inline(always)]
    fn from_f32(x: f32) -> bf16 {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        // Rounding could carry a NaN's payload into infinity.
        let quiet = (bits >> 16) | 0x40;
        bf16::from_bits(if x.is_nan() { quiet } else { rounded } as u16)
    }
}

impl Logit for f16 {
    const ZERO: Self = f16::ZERO;
    const NAME: &'static str = "f16";

    #[inline(always)]
    fn to_f32(self) -> f32 {
        const INFINITY: u32 = 0x7c00;
        let bits = u32::from(self.to_bits());
        let magnitude = bits & 0x7fff;
        // The exponent's bias is 112 less; a product also does subnormals.
        let scaled = f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23);
        let special = if magnitude >= INFINITY { f32::INFINITY.to_bits() } else { 0 };
        f32::from_bits(scaled.to_bits() | special | (bits & 0x8000) << 16)
    }

    #[inline(always)]
    fn from_f32(x: f32) -> f16 {
        const OVERFLOW: u32 = (127 + 16) << 23;
        const NORMAL: u32 = (127 - 14) << 23;
        let sign = x.to_bits() & 0x8000_0000;
        let magnitude = x.to_bits() ^ sign;
        let odd = (magnitude >> 13) & 1;
        let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + odd) >> 13;
        // The last bit of a number in 0.5..1 is the last one of a subnormal: the addition rounds.
        let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits());
        let special = if x.is_nan() { 0x7e00 } else { 0x7c00 };
        let rounded = if magnitude < NORMAL { subnormal } else { normal };
        let rounded = if magnitude >= OVERFLOW { special } else { rounded };
        f16::from_bits((rounded | sign >> 16) as u16)
    }
}

/// An integer type of token ids: `u32` or `i64`.
pub trait TokenId: sealed::Sealed + Element {
    /// Whether the type has 64 bits, and not 32.
    const WIDE: bool;

    /// The id as a signed integer, in which `ignore_index` is given.
    fn id(self) -> i64;
}

impl TokenId for u32 {
    const WIDE: bool = false;

    #[inline(always)]
    fn id(self) -> i64 {
        i64::from(self)
    }
}

impl TokenId for i64 {
    const WIDE: bool = true;

    #[inline(always)]
    fn id(self) -> i64 {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_is_widened_exactly() {
        for bits in 0..=u16::MAX {
            let (half, brain) = (f16::from_bits(bits), bf16::from_bits(bits));
            let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
            assert!(same(Logit::to_f32(half), half.to_f32()), "{bits:#x}");
            assert!(same(Logit::to_f32(brain), brain.to_f32()), "{bits:#x}");
        }
    }

    fn widening_keeps_every_value_in_an_order_of_the_type<T: Logit>(from_bits: fn(u16) -> T) {
        let ascending: [T; LOGIT_LANES] = std::array::from_fn(|i| T::from_f32(i as f32 - 7.0));
        let order = T::widen(&ascending).map(|x| (x + 7.0) as usize);
        let mut sorted = order;
        sorted.sort_unstable();
        assert_eq!(sorted, std::array::from_fn(|i| i));
        // Every half, and of the floats those with the same leading bits.
        for first in (0..=u16::MAX).step_by(LOGIT_LANES) {
            let values: [T; LOGIT_LANES] = std::array::from_fn(|i| from_bits(first + i as u16));
            let wide = T::widen(&values);
            for (lane, i) in order.into_iter().enumerate() {
                let (x, y) = (wide[lane], values[i].to_f32());
                let same = x.to_bits() == y.to_bits() || (x.is_nan() && y.is_nan());
                assert!(same, "{} {x} {y}", T::NAME);
            }
        }
    }

    #[test]
    fn widening_keeps_every_value() {
        widening_keeps_every_value_in_an_order_of_the_type(|bits| {
            f32::from_bits(u32::from(bits) << 16)
        });
        widening_keeps_every_value_in_an_order_of_the_type(f16::from_bits);
        widening_keeps_every_value_in_an_order_of_the_type(bf16::from_bits);
    }

    #[test]
    fn floats_are_rounded_to_the_nearest_half() {
        // Every 251st float, and around each half the floats at which rounding turns.
        let near = |x: f32| {
            [-0x1001_i32, -0x1000, -0xfff, -1, 0, 1, 0xfff, 0x1000, 0x1001]
                .map(|step| f32::from_bits(x.to_bits().wrapping_add_signed(step)))
        };
        let halves = (0..=u16::MAX).flat_map(|bits| near(f16::from_bits(bits).to_f32()));
        let floats = (0..=u32::MAX).step_by(251).map(f32::from_bits).chain(halves);
        for x in floats {
            let (half, brain) = (<f16 as Logit>::from_f32(x), <bf16 as Logit>::from_f32(x));
            if x.is_nan() {
                assert!(half.is_nan() && brain.is_nan());
            } else {
                assert_eq!(half.to_bits(), f16::from_f32(x).to_bits(), "{x:e}");
                assert_eq!(brain.to_bits(), bf16::from_f32(x).to_bits(), "{x:e}");
            }
        }
    }
}
