//! Whitening on slices. Sums are taken in f64, over leaves of a fixed size that a fixed tree merges.

use super::{EpsPlacement, WhitenOptions, OP};
use crate::cpu::math::{select, sum_lanes, LANES};
use crate::cpu::store::CACHED;
use crate::cpu::{for_each, reduce, store, vectorise, with_stores, Stores};
use crate::error::{Error, Result};
use crate::memory::{in_space, Lengths};
use crate::moments::cpu::{moments, LEAF};
use crate::moments::Moments;

/// Elements that a thread maps at a time.
const MAP_GRAIN: usize = 8 * LEAF;

in_space!(
    Host:
    MomentsInputs, MomentsOutputs, Inputs, Outputs, OwnBackwardInputs, WithBackwardInputs,
    GradOutputs
);

/// Count, mean and sum of squared deviations of the unmasked elements.
///
/// # Errors
/// If a length does not fit. Nothing is written then.
pub fn masked_moments(
    inputs: MomentsInputs,
    elements: usize,
    mut outputs: MomentsOutputs,
) -> Result<()> {
    inputs.try_map(&[elements], &mut Lengths(OP))?;
    outputs.try_map((), &mut Lengths(OP))?;
    outputs.moments[0] = moments(inputs.x, inputs.mask);
    Ok(())
}

/// Whitens the elements with the given moments: their own, or those of a larger set.
///
/// # Errors
/// If a length does not fit, `eps` is out of range, or the moments are missing or of too few elements.
/// Nothing is written then.
pub fn masked_whiten(
    inputs: Inputs,
    elements: usize,
    options: &WhitenOptions,
    mut outputs: Outputs,
) -> Result<()> {
    options.validate()?;
    inputs.try_map(&[elements], &mut Lengths(OP))?;
    outputs.try_map(&[elements], &mut Lengths(OP))?;
    let scale = Scale::new(given(inputs.moments, "x")?, options)?;

    let (x, mask, y) = (inputs.x, inputs.mask, outputs.y);
    let inv = scale.inv as f32;
    let back = if options.shift_mean { 0.0 } else { scale.mean.high };
    map_all(x, x, mask, y, |x, _| scale.mean.deviation(x) * inv + back);
    Ok(())
}

/// The gradient with respect to `x` of [`masked_whiten`] with `x`'s own moments.
///
/// # Errors
/// As [`masked_whiten`].
pub fn masked_whiten_backward(
    inputs: OwnBackwardInputs,
    elements: usize,
    options: &WhitenOptions,
    mut outputs: GradOutputs,
) -> Result<()> {
    options.validate()?;
    inputs.try_map(&[elements], &mut Lengths(OP))?;
    outputs.try_map(&[elements], &mut Lengths(OP))?;
    let moments = given(inputs.moments, "x")?;
    let scale = Scale::new(moments, options)?;

    let (x, mask, grad_y, grad_x) = (inputs.x, inputs.mask, inputs.grad_y, outputs.grad_x);
    let (sum_g, sum_gd) = reduce(
        elements,
        LEAF,
        (x, grad_y, mask),
        |_, _, (x, g, mask)| {
            vectorise(
                #[inline(always)]
                || gradient_sums(x, g, mask, &scale.mean),
            )
        },
        |a, b| (a.0 + b.0, a.1 + b.1),
    );

    let mean_g = Mean::new(sum_g / moments.count);
    let inv = scale.inv as f32;
    let back = if options.shift_mean { 0.0 } else { mean_g.high };
    let slope = (sum_gd * scale.slope) as f32;
    // The deviation of g first: without one in x, inv may be as large as 1 / eps.
    map_all(x, grad_y, mask, grad_x, |x, g| {
        scale.mean.deviation(x) * slope + (mean_g.deviation(g) * inv + back)
    });
    Ok(())
}

/// The gradient with respect to `x` of [`masked_whiten`] with moments that are constants.
///
/// # Errors
/// As [`masked_whiten`].
pub fn masked_whiten_with_backward(
    inputs: WithBackwardInputs,
    elements: usize,
    options: &WhitenOptions,
    mut outputs: GradOutputs,
) -> Result<()> {
    options.validate()?;
    inputs.try_map(&[elements], &mut Lengths(OP))?;
    outputs.try_map(&[elements], &mut Lengths(OP))?;

    let inv = Scale::new(given(inputs.moments, "grad_y")?, options)?.inv as f32;
    let (mask, grad_y, grad_x) = (inputs.mask, inputs.grad_y, outputs.grad_x);
    map_all(grad_y, grad_y, mask, grad_x, |g, _| g * inv);
    Ok(())
}

/// The moments, which `needed_by` cannot do without.
fn given<'a>(moments: Option<&'a [Moments]>, needed_by: &'static str) -> Result<&'a Moments> {
    let missing = Error::Missing { op: OP, arg: "moments", needed_by };
    moments.map(|moments| &moments[0]).ok_or(missing)
}

/// The sums of g and of g (x - mean) over the unmasked elements of a leaf.
#[inline(always)]
fn gradient_sums(x: &[f32], g: &[f32], mask: Option<&[u8]>, mean: &Mean) -> (f64, f64) {
    let (mut deviations, mut gradients) = ([0.0; LEAF], [0.0; LEAF]);
    map::<CACHED>(x, x, mask, &mut deviations[..x.len()], |x, _| mean.deviation(x));
    map::<CACHED>(g, g, mask, &mut gradients[..g.len()], |g, _| g);
    // What is behind the last element is 0 in both.
    let len = x.len().next_multiple_of(LANES);
    let (deviations, _) = deviations[..len].as_chunks::<LANES>();
    let (gradients, _) = gradients[..len].as_chunks::<LANES>();
    let (mut sum_g, mut sum_gd) = ([0.0_f64; LANES], [0.0_f64; LANES]);
    for (d, g) in deviations.iter().zip(gradients) {
        for i in 0..LANES {
            let (d, g) = (f64::from(d[i]), f64::from(g[i]));
            sum_g[i] += g;
            sum_gd[i] = g.mul_add(d, sum_gd[i]);
        }
    }
    (sum_lanes(sum_g), sum_lanes(sum_gd))
}

/// `out = f(a, b)` where unmasked, else 0, in parallel.
#[inline(always)]
fn map_all(
    a: &[f32],
    b: &[f32],
    mask: Option<&[u8]>,
    out: &mut [f32],
    f: impl Fn(f32, f32) -> f32 + Copy + Sync,
) {
    let stores = Stores::of(size_of_val(out));
    for_each(out.len(), MAP_GRAIN, (a, b, mask, out), |_, _, (a, b, mask, out)| {
        with_stores!(stores, STORES => map::<STORES>(a, b, mask, out, f));
    });
}

/// `out = f(a, b)` where unmasked, else 0.
#[inline(always)]
fn map<const STORES: u8>(
    a: &[f32],
    b: &[f32],
    mask: Option<&[u8]>,
    out: &mut [f32],
    f: impl Fn(f32, f32) -> f32,
) {
    match mask {
        None => store::map::<STORES, _, _>(
            out,
            (a, b),
            #[inline(always)]
            |(a, b)| f(a, b),
        ),
        Some(mask) => store::map::<STORES, _, _>(
            out,
            ((a, b), mask),
            #[inline(always)]
            |((a, b), keep)| select(keep != 0, f(a, b), 0.0),
        ),
    }
}

/// A mean in two floats: x minus the first is exact where x is near, so that a large mean costs the
/// deviations no digits.
struct Mean {
    high: f32,
    low: f32,
}

impl Mean {
    fn new(mean: f64) -> Self {
        let high = mean as f32;
        Self { high, low: (mean - f64::from(high)) as f32 }
    }

    #[inline(always)]
    fn deviation(&self, x: f32) -> f32 {
        (x - self.high) - self.low
    }
}

/// Factor and offset that moments and options come down to.
struct Scale {
    mean: Mean,
    /// 1 / sqrt(var + eps), or 1 / (std + eps).
    inv: f64,
    /// d inv / d var * 2 / (n - 1): the gradient's slope in x - mean, per sum of g (x - mean).
    slope: f64,
}

impl Scale {
    fn new(moments: &Moments, options: &WhitenOptions) -> Result<Self> {
        let divisor = options.divisor("moments", moments)?;
        let variance = moments.m2 / divisor;
        let eps = options.eps;
        let (inv, d_inv_d_var) = match options.eps_placement {
            EpsPlacement::Variance => {
                let inv = (variance + eps).sqrt().recip();
                (inv, -0.5 * inv.powi(3))
            }
            EpsPlacement::Std => {
                let std = variance.sqrt();
                let inv = (std + eps).recip();
                (inv, -0.5 * inv.powi(2) / std)
            }
        };
        Ok(Scale {
            mean: Mean::new(moments.mean),
            inv,
            // All elements are equal: what it multiplies is 0.
            slope: if variance == 0.0 { 0.0 } else { 2.0 * d_inv_d_var / divisor },
        })
    }
}
