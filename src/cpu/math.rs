//! Branch-free `f32` math that the compiler can vectorise; call it inside [`super::vectorise`].

use super::Logit;

/// Independent accumulators of a reduction: enough lanes to fill the vector unit, and a fixed
/// number, so that the order of additions does not depend on the machine's width.
pub(crate) const LANES: usize = 16;

/// Below this [`exp_factors`] gives 0.
pub(crate) const EXP_FLOOR: f32 = -88.0;

const OVERFLOW: f32 = 88.722_84;
const UNDERFLOW: f32 = -87.336_54;

/// e^x within 2 ulp for every x with a normal result; 0 where e^x < 2^-126, +inf above 88.73,
/// NaN for NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let (p, exponent) = exp_parts(x);
    // An addition to the exponent, not a product: 2^128 is not a float, e^88.5 is.
    let y = f32::from_bits(p.to_bits().wrapping_add(exponent.wrapping_sub(127) << 23));
    let y = if x < UNDERFLOW { 0.0 } else { y };
    // Of NaN the sum is NaN.
    if x <= OVERFLOW {
        y
    } else {
        x + f32::INFINITY
    }
}

/// Two factors of e^x, for x from [`EXP_FLOOR`] to 88 and NaN: a sum takes them in with one fused
/// multiply-add. Their product is within 2 ulp where it is normal, and 0 from -87.7 down.
#[inline(always)]
pub(crate) fn exp_factors(x: f32) -> (f32, f32) {
    let (p, exponent) = exp_parts(x);
    (p, f32::from_bits(exponent << 23))
}

/// e^x = p 2^n with p in 0.7..1.42: p, and n + 127 in the lowest 9 bits.
///
/// n is the integer next to x log2(e), and p the polynomial of degree 6 with the least relative
/// error to 2^r over |r| <= 1/2, 2.6e-9, among those that are 1 at r = 0.
#[inline(always)]
fn exp_parts(x: f32) -> (f32, u32) {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LOG2_E_LOW: f32 = (std::f64::consts::LOG2_E - LOG2_E as f64) as f32;
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    const ROUND: f32 = 12_582_912.0 + 127.0;

    let shifted = x.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = x.mul_add(LOG2_E, -n);
    let r = x.mul_add(LOG2_E_LOW, r);

    let p = 1.559_467_8e-4_f32;
    let p = p.mul_add(r, 1.340_664_4e-3);
    let p = p.mul_add(r, 9.617_693e-3);
    let p = p.mul_add(r, 5.550_310_5e-2);
    let p = p.mul_add(r, 2.402_265_3e-1);
    let p = p.mul_add(r, 6.931_472_2e-1);
    let p = p.mul_add(r, 1.0);
    (p, shifted.to_bits())
}

/// `x`, or `floor` if that is larger. A comparison, not `f32::max`: NaN stays NaN.
#[inline(always)]
pub(crate) fn at_least(x: f32, floor: f32) -> f32 {
    if x < floor {
        floor
    } else {
        x
    }
}

/// Calls `body` on `LANES` logits at a time, the last of them filled up with -inf.
#[inline(always)]
pub(crate) fn for_lanes<T: Logit>(z: &[T], mut body: impl FnMut(&[T; LANES])) {
    let (chunks, rest) = z.as_chunks();
    for z in chunks {
        body(z);
    }
    if !rest.is_empty() {
        body(&filled_up(rest));
    }
}

/// [`for_lanes`] over two rows side by side.
#[inline(always)]
pub(crate) fn for_lanes2<T: Logit>(
    z: &[T],
    w: &[T],
    mut body: impl FnMut(&[T; LANES], &[T; LANES]),
) {
    let ((chunks_z, rest_z), (chunks_w, rest_w)) = (z.as_chunks(), w.as_chunks());
    for (z, w) in chunks_z.iter().zip(chunks_w) {
        body(z, w);
    }
    if !rest_z.is_empty() {
        body(&filled_up(rest_z), &filled_up(rest_w));
    }
}

#[inline(always)]
fn filled_up<T: Logit>(rest: &[T]) -> [T; LANES] {
    let mut lanes = [T::from_f32(f32::NEG_INFINITY); LANES];
    lanes[..rest.len()].copy_from_slice(rest);
    lanes
}

/// `x`, or `max` if that is larger or x is NaN.
#[inline(always)]
pub(crate) fn larger(x: f32, max: f32) -> f32 {
    if x > max {
        x
    } else {
        max
    }
}

/// The largest element, or -inf for none. NaN is skipped: its `exp` brings it back.
#[inline(always)]
pub(crate) fn max<T: Logit>(values: &[T]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for_lanes(
        values,
        #[inline(always)]
        |values| {
            for lane in 0..LANES {
                lanes[lane] = larger(values[lane].to_f32(), lanes[lane]);
            }
        },
    );
    max_lanes(lanes)
}

/// The largest lane.
#[inline(always)]
pub(crate) fn max_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = larger(lanes[i + width], lanes[i]);
        }
        width /= 2;
    }
    lanes[0]
}

/// Adds the lanes up as a balanced tree.
#[inline(always)]
pub(crate) fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_wherever_the_result_is_normal() {
        // Every 97th float: a quarter of a minute less than all, and no pattern of the bits.
        let mut worst = 0.0_f64;
        for bits in (0..=u32::MAX).step_by(97) {
            let x = f32::from_bits(bits);
            let y = exp(x);
            let exact = f64::from(x).exp();
            if x.is_nan() {
                assert!(y.is_nan());
            } else if exact < f64::from(f32::MIN_POSITIVE) {
                assert!(y <= f32::MIN_POSITIVE, "exp({x}) = {y}");
            } else if exact > f64::from(f32::MAX) {
                assert!(y == f32::INFINITY || f64::from(f32::MAX) * 1.000_001 > exact);
            } else {
                let rounded = exact as f32;
                let ulp = f64::from(f32::from_bits(rounded.to_bits() + 1)) - f64::from(rounded);
                let error = if y.is_infinite() { 0.5 } else { (f64::from(y) - exact).abs() / ulp };
                worst = worst.max(error);
            }
        }
        assert!(worst <= 2.0, "worst error {worst} ulp");
    }

    #[test]
    fn exp_at_the_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(-1e30), 0.0);
        assert!(exp(88.72).is_finite());
    }

    #[test]
    fn max_skips_nan_and_takes_the_remainder() {
        assert_eq!(max::<f32>(&[]), f32::NEG_INFINITY);
        let mut values = vec![f32::NAN; 37];
        values[36] = 3.0;
        values[5] = -1.0;
        assert_eq!(max(&values), 3.0);
    }
}
