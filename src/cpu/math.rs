//! Branch-free `f32` math that the compiler can vectorise; call it inside [`super::vectorise`].

use std::hint::black_box;
use std::ops::AddAssign;

use super::{prefetch, Logit};

/// Independent accumulators of a reduction: enough lanes to fill the vector unit, and a fixed
/// number, so that the order of additions does not depend on the machine's width.
pub(crate) const LANES: usize = 16;

/// Accumulators of a reduction over logits: two of the widest registers, so that one's exponentials hide
/// the latency of the other's.
pub(crate) const LOGIT_LANES: usize = 32;

/// The largest argument for which the factors of [`Exp`] are 0.
const EXP_FLOOR: f32 = -88.0;

/// Below the first the exponential is less than half of the least float, above the second more than the largest.
const EXP_RANGE: [f32; 2] = [-104.0, 89.0];

/// e^x within 2 ulp for every x with a normal result, and below 2^-126 next to it; +inf from 88.72284
/// up, NaN for NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // 2^n in two factors, of half of n each: both are normal, and only the last product is rounded to what is
    // below the normal numbers, or to +inf.
    const BIASED_TWICE: Exp = Exp { round: Exp::NATURAL.round + 127.0, ..Exp::NATURAL };
    let (p, exponent) = BIASED_TWICE.parts(clip(x, EXP_RANGE[0], EXP_RANGE[1]));
    let half = exponent >> 1;
    let power = |n: u32| f32::from_bits(n << 23);
    p * power(half) * power(exponent.wrapping_sub(half))
}

/// e^x - 1 within 4 ulp, for x up to 0; NaN for NaN.
#[inline(always)]
pub(crate) fn exp_m1(x: f32) -> f32 {
    if x > -0.34 {
        let r = x * std::f32::consts::LOG2_E;
        r * slope_of_exp2(r)
    } else {
        exp(x) - 1.0
    }
}

/// ln(1 + x) within 3 ulp, for x from -1 up; -inf where 1 + x is below 2^-126, NaN for less and NaN.
#[inline(always)]
pub(crate) fn ln_1p(x: f32) -> f32 {
    let y = 1.0 + x;
    // What the sum has lost of x, as a share of it.
    let lost = (x - (y - 1.0)) / y;
    ln(y) + select(y > 0.0 && y < f32::INFINITY, lost, 0.0)
}

/// g - ln(1 + g) for g from -1 up, without what would cancel near 0; +inf at -1, NaN for NaN.
#[inline(always)]
pub(crate) fn less_ln_1p(g: f32) -> f32 {
    let near = (g * g) * (-g).mul_add(ln_tail(g), 0.5);
    select(g.abs() < 0.29, near, g - ln_1p(g))
}

/// (ln(1 + f) - f + f²/2) / f³ for 1 + f in sqrt(1/2)..sqrt(2): Cephes' polynomial.
#[inline(always)]
fn ln_tail(f: f32) -> f32 {
    let p = 7.037_683_6e-2_f32;
    let p = p.mul_add(f, -1.151_461e-1);
    let p = p.mul_add(f, 1.167_699_9e-1);
    let p = p.mul_add(f, -1.242_014_1e-1);
    let p = p.mul_add(f, 1.424_932_3e-1);
    let p = p.mul_add(f, -1.666_805_8e-1);
    let p = p.mul_add(f, 2.000_071_5e-1);
    let p = p.mul_add(f, -2.499_999_4e-1);
    p.mul_add(f, 3.333_333e-1)
}

/// ln x within 2 ulp; -inf below 2^-126, NaN below 0 and for NaN.
#[inline(always)]
fn ln(x: f32) -> f32 {
    // x = 2^n (1 + f) with 1 + f in sqrt(1/2)..sqrt(2).
    const SQRT_HALF: u32 = 0x3f35_04f3;
    let shifted = x.to_bits().wrapping_sub(SQRT_HALF);
    let n = (shifted as i32 >> 23) as f32;
    let f = f32::from_bits((shifted & 0x007f_ffff) + SQRT_HALF) - 1.0;
    let p = ln_tail(f);
    // ln 2 in two parts, the first of which has a few bits only.
    let tail = (p * f).mul_add(f * f, n * -2.121_944_4e-4);
    let y = n.mul_add(0.693_359_4, f + (-0.5 * f).mul_add(f, tail));
    let y = select(x < f32::MIN_POSITIVE, f32::NEG_INFINITY, y);
    let y = select(x < 0.0, f32::NAN, y);
    // Of infinity and NaN themselves.
    select(x < f32::INFINITY, y, x)
}

/// Chooses without a branch: an `if` may become two ways through a loop, which is not vectorised well.
#[inline(always)]
pub(crate) fn select(condition: bool, yes: f32, no: f32) -> f32 {
    std::hint::select_unpredictable(condition, yes, no)
}

/// `x` within the bounds. Comparisons, so that NaN stays NaN and a NaN bound is none.
#[inline(always)]
pub(crate) fn clip(x: f32, low: f32, high: f32) -> f32 {
    let x = select(x < low, low, x);
    select(x > high, high, x)
}

/// How many bytes are not 0: in lanes of a byte, which is as many as there are, emptied before they are full.
#[inline(always)]
pub(crate) fn count_nonzero(bytes: &[u8]) -> usize {
    const WIDTH: usize = 64;
    let mut count = 0;
    for bytes in bytes.chunks(WIDTH * usize::from(u8::MAX)) {
        let (chunks, rest) = bytes.as_chunks::<WIDTH>();
        let mut lanes = [0_u8; WIDTH];
        for chunk in chunks {
            for (lane, &byte) in lanes.iter_mut().zip(chunk) {
                *lane += u8::from(byte != 0);
            }
        }
        count += lanes.iter().map(|&lane| usize::from(lane)).sum::<usize>();
        count += rest.iter().filter(|&&byte| byte != 0).count();
    }
    count
}

/// e^(scale x), at no more cost than e^x.
#[derive(Clone, Copy)]
pub(crate) struct Exp {
    /// scale log2(e), and what of it f32 does not hold.
    log2: f32,
    log2_low: f32,
    /// Below it e^(scale x) counts as 0.
    floor: f32,
    /// Added to a number below 2^22, it leaves the nearest integer in the low bits, and 127 more, and the lift.
    round: f32,
}

impl Exp {
    const NATURAL: Self = Self::new(1.0);

    /// The exponential of x times a scale above 0.
    pub(crate) const fn new(scale: f32) -> Self {
        let exact = scale as f64 * std::f64::consts::LOG2_E;
        let log2 = exact as f32;
        Self {
            log2,
            log2_low: (exact - log2 as f64) as f32,
            floor: EXP_FLOOR / scale,
            round: 12_582_912.0 + 127.0,
        }
    }

    /// e^x for x up to 0, beside a factor in a product: both are made normal numbers, by a power of 2 that
    /// goes from the one to the other, so that only the product is rounded to what is below them. Returns
    /// 2^lift e^x and 2^-lift.
    pub(crate) fn beside(factor: f32) -> (Self, f32) {
        const MOST: i32 = 100;
        // Lifted, the least float is normal; brought down, so is what is next to `factor`.
        let exponent = (factor.to_bits() >> 23 & 0xff) as i32 - 127;
        let lift = (exponent + MOST).clamp(0, MOST);
        let natural = Self::NATURAL;
        let lifted = Self {
            floor: natural.floor - lift as f32 * std::f32::consts::LN_2,
            round: natural.round + lift as f32,
            ..natural
        };
        (lifted, f32::from_bits(((127 - lift) as u32) << 23))
    }

    /// `x`, or the floor if that is larger, for [`Exp::factors`].
    #[inline(always)]
    pub(crate) fn clamp(self, x: f32) -> f32 {
        at_least(x, self.floor)
    }

    /// Two factors of e^(scale x), for x from the floor to 88 / scale, and NaN: a sum takes them in with one
    /// fused multiply-add. Their product is within 2 ulp where it is normal, and 0 from -87.7 / scale down.
    #[inline(always)]
    pub(crate) fn factors(self, x: f32) -> (f32, f32) {
        let (p, exponent) = self.parts(x);
        (p, f32::from_bits(exponent << 23))
    }

    /// e^(scale x) = p 2^n with p in 0.7..1.42: p, and n + 127 + lift in the lowest 9 bits.
    ///
    /// n is the integer next to scale x log2(e), and p the polynomial of degree 6 with the least relative
    /// error to 2^r over |r| <= 1/2, 2.6e-9, among those that are 1 at r = 0.
    #[inline(always)]
    fn parts(self, x: f32) -> (f32, u32) {
        let shifted = x.mul_add(self.log2, self.round);
        let n = shifted - self.round;
        let r = x.mul_add(self.log2, -n);
        let r = x.mul_add(self.log2_low, r);

        (slope_of_exp2(r).mul_add(r, 1.0), shifted.to_bits())
    }
}

/// (2^r - 1) / r for |r| <= 1/2, by the polynomial of [`Exp::parts`].
#[inline(always)]
fn slope_of_exp2(r: f32) -> f32 {
    let p = 1.559_467_8e-4_f32;
    let p = p.mul_add(r, 1.340_664_4e-3);
    let p = p.mul_add(r, 9.617_693e-3);
    let p = p.mul_add(r, 5.550_310_5e-2);
    let p = p.mul_add(r, 2.402_265_3e-1);
    p.mul_add(r, 6.931_472_2e-1)
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

/// How many logits ahead a loop asks for: one that does an exponential for each does not see far
/// enough ahead by itself.
const AHEAD: isize = 1024;

/// Calls `body` on [`LOGIT_LANES`] logits at a time, the last of them filled up with -inf.
#[inline(always)]
pub(crate) fn for_logits<T: Logit>(z: &[T], mut body: impl FnMut(&[T; LOGIT_LANES])) {
    let (chunks, rest) = z.as_chunks();
    for z in chunks {
        prefetch(z, AHEAD);
        body(z);
    }
    if !rest.is_empty() {
        body(&filled_up(rest));
    }
}

/// [`for_logits`] over two rows side by side.
#[inline(always)]
pub(crate) fn for_logits2<T: Logit>(
    z: &[T],
    w: &[T],
    mut body: impl FnMut(&[T; LOGIT_LANES], &[T; LOGIT_LANES]),
) {
    let ((chunks_z, rest_z), (chunks_w, rest_w)) = (z.as_chunks(), w.as_chunks());
    for (z, w) in chunks_z.iter().zip(chunks_w) {
        prefetch(z, AHEAD);
        prefetch(w, AHEAD);
        body(z, w);
    }
    if !rest_z.is_empty() {
        body(&filled_up(rest_z), &filled_up(rest_w));
    }
}

#[inline(always)]
fn filled_up<T: Logit>(rest: &[T]) -> [T; LOGIT_LANES] {
    let mut lanes = [T::from_f32(f32::NEG_INFINITY); LOGIT_LANES];
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
    let mut lanes = [f32::NEG_INFINITY; LOGIT_LANES];
    for_logits(
        values,
        #[inline(always)]
        |values| {
            let values = T::widen(values);
            for lane in 0..LOGIT_LANES {
                lanes[lane] = larger(values[lane], lanes[lane]);
            }
        },
    );
    max_lanes(lanes)
}

/// The largest lane.
#[inline(always)]
pub(crate) fn max_lanes<const N: usize>(mut lanes: [f32; N]) -> f32 {
    const { assert!(N.is_power_of_two()) };
    let mut width = N / 2;
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
pub(crate) fn sum_lanes<T: Copy + AddAssign, const N: usize>(mut lanes: [T; N]) -> T {
    const { assert!(N.is_power_of_two()) };
    // From memory: of lanes that it sees added up the compiler may take the loop before apart, into pairs and
    // single ones.
    lanes = black_box(lanes);
    let mut width = N / 2;
    while width > 0 {
        for i in 0..width {
            let other = lanes[i + width];
            lanes[i] += other;
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::vectorise;

    /// Every float in a release build, every 61st where that would take minutes.
    const STEP: usize = if cfg!(debug_assertions) { 61 } else { 1 };

    /// The largest error of `f` in units in the last place of the exact result, over the floats of
    /// these bits whose result is a normal float; for the others `f` must be next to it.
    fn worst_error(
        bits: std::ops::RangeInclusive<u32>,
        f: impl Fn(f32) -> f32 + Copy + Sync,
        exact: impl Fn(f64) -> f64 + Sync,
    ) -> f64 {
        const RUN: usize = 1 << 16;
        let first = *bits.start() as usize;
        let of_run = |from: usize, count: usize, ()| {
            let x = |i: usize| f32::from_bits((first + (from + i) * STEP) as u32);
            let x: Vec<f32> = (0..count).map(x).collect();
            let mut y = vec![0.0; count];
            vectorise(
                #[inline(always)]
                || {
                    for (y, &x) in y.iter_mut().zip(&x) {
                        *y = f(x);
                    }
                },
            );
            let mut worst = 0.0_f64;
            for (&x, &y) in x.iter().zip(&y) {
                let exact = exact(f64::from(x));
                let magnitude = (exact.abs() as f32).to_bits();
                if exact.abs() < f64::from(f32::MIN_POSITIVE) {
                    assert!((0.0..=f32::MIN_POSITIVE).contains(&y.abs()), "f({x:e}) = {y:e}");
                } else if magnitude < f32::MAX.to_bits() {
                    let ulp = f32::from_bits(magnitude + 1) - f32::from_bits(magnitude);
                    worst = worst.max((f64::from(y) - exact).abs() / f64::from(ulp));
                } else {
                    assert!(y >= f32::MAX, "f({x:e}) = {y:e}");
                }
            }
            worst
        };
        let len = (*bits.end() as usize - first) / STEP + 1;
        crate::cpu::reduce(len, RUN, (), of_run, f64::max)
    }

    /// Bits of the floats from 0 to 104, with either sign; e^-104 is 0 in f32, e^104 infinite.
    const TO_104: std::ops::RangeInclusive<u32> = 0..=0x42d0_0000;
    const TO_MINUS_104: std::ops::RangeInclusive<u32> = 0x8000_0000..=0xc2d0_0000;

    #[test]
    fn exp_is_within_two_ulp_wherever_the_result_is_normal() {
        for bits in [TO_104, TO_MINUS_104] {
            let worst = worst_error(bits, exp, f64::exp);
            assert!(worst <= 2.0, "worst error {worst} ulp");
        }
    }

    #[test]
    fn exp_below_the_normal_range_is_next_to_it() {
        for i in 0..200_000 {
            let x = -87.0 - i as f32 * 1e-4;
            let mut y = [x];
            vectorise(
                #[inline(always)]
                || y = y.map(exp),
            );
            let want = f64::from(x).exp();
            // Good to 2 ulp, and then rounded to a multiple of the least float.
            let rounding = if want < f64::from(f32::MIN_POSITIVE) {
                0.501 * f64::from(f32::from_bits(1))
            } else {
                0.0
            };
            let error = (f64::from(y[0]) - want).abs();
            let bound = 2.0 * f64::from(f32::EPSILON) * want + rounding;
            assert!(error <= bound, "e^{x} is {:e}, not {want:e}", y[0]);
            assert!(x < -87.336_54 || y[0] >= f32::MIN_POSITIVE);
        }
    }

    #[test]
    fn exponentials_beside_a_factor_are_rounded_once() {
        for factor in [1.0, -3e38, 1e20, 0.3, 1e-6, -1e-15, 1e-28, 1e-40, 0.0, f32::INFINITY] {
            for i in 0..30_000 {
                let x = i as f32 * -0.01;
                let (exp, down) = Exp::beside(factor);
                let (p, power) = exp.factors(exp.clamp(x));
                let (y, want) =
                    (p * power * (factor * down), f64::from(x).exp() * f64::from(factor));
                if factor.is_infinite() {
                    assert!(y == factor || x < -100.0, "{x}");
                    continue;
                }
                let error = (f64::from(y) - want).abs();
                // p is good to 2 ulp. Beyond 2^-226 it is 0.
                let least =
                    f64::from(f32::from_bits(1)).max(f64::from(factor).abs() * 2_f64.powi(-226));
                let bound = (2.0 * f64::from(f32::EPSILON) * want.abs()).max(least);
                assert!(error <= bound, "e^{x} times {factor:e} is {y:e}, not {want:e}");
            }
        }
    }

    #[test]
    fn the_factors_of_exp_are_within_two_ulp_wherever_their_product_is_normal() {
        let product = |x| {
            let (p, power) = Exp::NATURAL.factors(Exp::NATURAL.clamp(x));
            p * power
        };
        // Sums go no further than e^8.
        for bits in [0..=8.0_f32.to_bits(), TO_MINUS_104] {
            let worst = worst_error(bits, product, f64::exp);
            assert!(worst <= 2.0, "worst error {worst} ulp");
        }
    }

    #[test]
    fn ln_of_a_sum_is_within_two_ulp() {
        // Of numbers up to 1, one of which is 1, or nearly: near 1 the error is taken of 1.
        let ln = |x: f32| 1.0 + x.ln();
        assert!(worst_error(0.9_f32.to_bits()..=1.1_f32.to_bits(), ln, |x| 1.0 + x.ln()) <= 2.0);
        let worst = worst_error(1.1_f32.to_bits()..=1e12_f32.to_bits(), f32::ln, f64::ln);
        assert!(worst <= 2.0, "worst error {worst} ulp");
    }

    #[test]
    fn exp_m1_is_within_four_ulp() {
        let worst = worst_error(TO_MINUS_104, exp_m1, f64::exp_m1);
        assert!(worst <= 4.0, "worst error {worst} ulp");
        assert!(exp_m1(f32::NAN).is_nan());
        assert_eq!(exp_m1(f32::NEG_INFINITY), -1.0);
    }

    #[test]
    fn ln_1p_is_within_three_ulp() {
        // From the least normal number up, and from there down to -1.
        for bits in [0x0080_0000..=f32::MAX.to_bits(), 0x8080_0000..=0xbf7f_ffff] {
            let worst = worst_error(bits, ln_1p, f64::ln_1p);
            assert!(worst <= 3.0, "worst error {worst} ulp");
        }
        assert_eq!(ln_1p(0.0), 0.0);
        assert_eq!(ln_1p(-1.0), f32::NEG_INFINITY);
        assert_eq!(ln_1p(f32::INFINITY), f32::INFINITY);
        assert!(ln_1p(-1.5).is_nan() && ln_1p(f32::NAN).is_nan());
        assert!(ln_1p(f32::NEG_INFINITY).is_nan());
    }

    #[test]
    fn less_ln_1p_keeps_its_digits_near_0() {
        // Beyond the series in f64 too what cancels in g - ln(1 + g) is less than f32 sees.
        let exact = |g: f64| {
            if g.abs() < 1e-3 {
                g * g * (0.5 - g / 3.0 + g * g / 4.0 - g.powi(3) / 5.0)
            } else {
                g - g.ln_1p()
            }
        };
        for i in 0..=20_000 {
            let size = 10f32.powf(i as f32 * 6e-4 - 10.0);
            for g in [size, -size].into_iter().filter(|&g| g > -1.0) {
                let (got, want) = (f64::from(less_ln_1p(g)), exact(f64::from(g)));
                assert!((got - want).abs() <= 2e-6 * want, "{g}: {got:e} {want:e}");
            }
        }
        assert_eq!(less_ln_1p(-1.0), f32::INFINITY);
        assert!(less_ln_1p(f32::NAN).is_nan() && less_ln_1p(0.0) == 0.0);
    }

    #[test]
    fn exp_of_nan_is_nan_whatever_its_payload() {
        for bits in [0x7f80_0001_u32, 0x7fc0_0000, 0x7fff_ffff, 0xffc0_0123] {
            let x = f32::from_bits(bits);
            let (p, power) = Exp::NATURAL.factors(Exp::NATURAL.clamp(x));
            assert!(exp(x).is_nan() && (p * power).is_nan(), "{bits:#x}");
        }
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
