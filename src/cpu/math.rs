//! Branch-free `f32` math that the compiler can vectorise; call it inside [`super::vectorise`].

/// Independent accumulators of a reduction: enough lanes to fill the vector unit, and a fixed
/// number, so that the order of additions does not depend on the machine's width.
pub(crate) const LANES: usize = 16;

/// e^x within 2 ulp for every x with a normal result; 0 where e^x < 2^-126, +inf above 88.73,
/// NaN for NaN.
///
/// Cody-Waite reduction to |r| <= ln(2)/2, then a degree-6 polynomial (coefficients of Cephes'
/// `expf`), then a multiplication by 2^n in two steps, since 2^128 is not a float.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const OVERFLOW: f32 = 88.722_84;
    const UNDERFLOW: f32 = -87.336_54;

    // Comparisons, not min and max: those would drop NaN.
    let clamped = if x > OVERFLOW { OVERFLOW } else { x };
    let clamped = if clamped < UNDERFLOW { UNDERFLOW } else { clamped };

    let shifted = clamped.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_HI, clamped);
    let r = n.mul_add(-LN2_LO, r);

    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_5e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 5e-1);
    let p = p.mul_add(r * r, r) + 1.0;

    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    let scale = |k: i32| f32::from_bits((k.wrapping_add(127) as u32) << 23);
    let y = p * scale(half) * scale(n.wrapping_sub(half));

    let y = if x > OVERFLOW { f32::INFINITY } else { y };
    if x < UNDERFLOW {
        0.0
    } else {
        y
    }
}

/// The largest element, or -inf for none. NaN is skipped: its `exp` brings it back.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = values.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, x);
        }
    }
    let rest = chunks.remainder().iter().copied();
    lanes.into_iter().chain(rest).fold(f32::NEG_INFINITY, larger)
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
        assert_eq!(max(&[]), f32::NEG_INFINITY);
        let mut values = vec![f32::NAN; 37];
        values[36] = 3.0;
        values[5] = -1.0;
        assert_eq!(max(&values), 3.0);
    }
}
