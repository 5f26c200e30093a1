//! `ppo-kernels check`: every op, pass and dtype on the chosen device against the f64 references, on
//! fresh random inputs.
//!
//! The inputs have what training has: peaked logits, -inf logits, masks with gaps, padding, ignored
//! targets, NaN wherever a mask forbids to look, vocabularies that are no multiple of anything, and
//! random options. The reference sees the same values, those of 16 bits after rounding to them.
//!
//! # Bounds
//! An element passes if |computed - reference| <= abs + rel |reference|; NaN must meet NaN, and an
//! infinity itself. [`bound`] has the numbers, which allow for these errors of f32, whose rounding is
//! u = 6e-8:
//!
//! - `logprob` and `full_kl`, forward: x = (z - max) / temperature is rounded three times, and ln of a
//!   sum of exps, each good to 2 ulp, is taken from it: 2e-6 is 32 u of either. For a likely token, and
//!   for entropy and KL, numbers of magnitude 10 cancel: 100 u.
//! - The same, backward: x, of magnitude up to 60, is good to 60 u, which exp makes a relative error of
//!   p: 8e-6. The terms of a gradient, of magnitude up to 5, may cancel.
//! - 16-bit logits: the same in f32, forward, from the values as they were rounded to 16 bits. Their
//!   gradients are rounded once more, to 11 bits (f16) or 8 (bf16): 2^-11 and 2^-8 relative, and for
//!   f16 half of its smallest number, 2^-25.
//! - `token_kl`: the error of e^-d, and of differences of numbers of magnitude 1 to 10.
//! - `gae`: some roundings of each delta, of magnitude up to 10, add up over the 1 / (1 - γ λ) steps
//!   that a discounted sum sees, or over the whole row where γ λ = 1.
//! - `whiten`: mean and variance are merged in f64, so what remains are some roundings of values of
//!   magnitude up to 5; the gradient is a difference of three such terms.
//! - `ppo_loss`: exp, and products of few factors; terms of opposite sign are added up.
//!
//! Where a loss has a kink (a clip range, a clamp), f32 and f64 may rightly be on different sides of it,
//! with different gradients. Inputs within 1e-3 of a kink are drawn again.

mod cases;

use std::fmt::Write as _;

use anyhow::{ensure, Result};
use candle_core::DType;
use clap::Args;

use super::config::DeviceName;

/// The command line of `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Device whose kernels are checked: cpu, or with the feature cuda also cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
    /// Seed of the random inputs; a new one every time if not given
    #[arg(long)]
    pub seed: Option<u64>,
    /// Multiplies every bound: below 1 to see how much room there is, or that the check can fail
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    pub bound_scale: f64,
}

/// What an element may differ by: abs + rel |reference|.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bound {
    /// Absolute.
    pub abs: f64,
    /// Relative.
    pub rel: f64,
}

/// The direction of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// Outputs from inputs.
    Forward,
    /// Gradients of inputs from those of outputs, of magnitude 1.
    Backward,
}

impl Pass {
    fn name(self) -> &'static str {
        match self {
            Pass::Forward => "forward",
            Pass::Backward => "backward",
        }
    }
}

/// The ops as they are checked; the KL has two forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// `logprobs` and `logprobs_and_entropy`.
    Logprob,
    /// `token_kl`.
    TokenKl,
    /// `full_kl`.
    FullKl,
    /// `gae`, with its rewards and moments.
    Gae,
    /// `masked_whiten`, `masked_whiten_with`.
    Whiten,
    /// `ppo_loss` with its statistics.
    PpoLoss,
}

impl Op {
    fn name(self) -> &'static str {
        match self {
            Op::Logprob => "logprob",
            Op::TokenKl => "token_kl",
            Op::FullKl => "full_kl",
            Op::Gae => "gae",
            Op::Whiten => "whiten",
            Op::PpoLoss => "ppo_loss",
        }
    }
}

/// The documented bound of an op; see [the module](self) for the reasons.
pub fn bound(op: Op, pass: Pass, dtype: DType) -> Bound {
    let (abs, rel) = match (op, pass) {
        (Op::Logprob, Pass::Forward) => (6e-6, 2e-6),
        (Op::Logprob, Pass::Backward) => (2e-6, 8e-6),
        (Op::TokenKl, _) => (1e-6, 1e-6),
        (Op::FullKl, Pass::Forward) => (4e-6, 2e-6),
        (Op::FullKl, Pass::Backward) => (2e-6, 8e-6),
        (Op::Gae, _) => (2e-5, 1e-5),
        (Op::Whiten, _) => (1e-6, 1e-6),
        (Op::PpoLoss, Pass::Forward) => (2e-6, 2e-6),
        (Op::PpoLoss, Pass::Backward) => (1e-6, 2e-6),
    };
    match (pass, dtype) {
        (Pass::Backward, DType::F16) => {
            Bound { abs: abs + 2f64.powi(-25), rel: rel + 2f64.powi(-11) }
        }
        (Pass::Backward, DType::BF16) => Bound { abs, rel: rel + 2f64.powi(-8) },
        _ => Bound { abs, rel },
    }
}

/// The worst of all elements of one op, pass and dtype.
#[derive(Debug, Clone)]
struct Row {
    op: Op,
    pass: Pass,
    dtype: DType,
    bound: Bound,
    elements: usize,
    worst_abs: f64,
    /// Of the elements large enough for the relative part of the bound to be the larger one.
    worst_rel: f64,
    /// The worst error as a share of what the bound allows that element.
    share: f64,
}

impl Row {
    fn new(op: Op, pass: Pass, dtype: DType, bound_scale: f64) -> Self {
        let Bound { abs, rel } = bound(op, pass, dtype);
        let bound = Bound { abs: abs * bound_scale, rel: rel * bound_scale };
        Self { op, pass, dtype, bound, elements: 0, worst_abs: 0.0, worst_rel: 0.0, share: 0.0 }
    }

    /// Takes the elements of one result in.
    fn compare(&mut self, computed: &[f64], reference: &[f64]) -> Result<()> {
        let (op, pass) = (self.op.name(), self.pass.name());
        let (got, expected) = (computed.len(), reference.len());
        ensure!(got == expected, "{op} {pass} returned {got} elements, expected {expected}");
        self.elements += got;
        for (&c, &r) in computed.iter().zip(reference) {
            if c == r || (c.is_nan() && r.is_nan()) {
                continue;
            }
            if !(c.is_finite() && r.is_finite()) {
                (self.worst_abs, self.worst_rel, self.share) = [f64::INFINITY; 3].into();
                continue;
            }
            let error = (c - r).abs();
            self.worst_abs = self.worst_abs.max(error);
            self.share = self.share.max(error / (self.bound.abs + self.bound.rel * r.abs()));
            // Of an element near 0 the relative error says nothing.
            if self.bound.rel * r.abs() >= self.bound.abs {
                self.worst_rel = self.worst_rel.max(error / r.abs());
            }
        }
        Ok(())
    }
}

/// What a check found.
#[derive(Debug)]
pub struct Report {
    seed: u64,
    device: DeviceName,
    rows: Vec<Row>,
}

impl Report {
    /// Runs every op, pass and dtype.
    ///
    /// # Errors
    /// If the scale of the bounds is not above 0, the device cannot be used, or an op refuses its
    /// inputs.
    pub fn new(args: &CheckArgs) -> Result<Self> {
        let scale = args.bound_scale;
        ensure!(scale > 0.0 && scale.is_finite(), "--bound-scale is {scale}, expected above 0");
        let seed = args.seed.unwrap_or_else(rand::random);
        let rows = cases::all(&args.device.open()?, seed, scale)?;
        Ok(Self { seed, device: args.device, rows })
    }

    /// Whether every element is within its bound.
    pub fn passed(&self) -> bool {
        self.exceeded() == 0
    }

    /// How many rows of the table exceed their bound.
    pub fn exceeded(&self) -> usize {
        self.rows.iter().filter(|row| row.share > 1.0).count()
    }

    /// The seed, and a table of the worst errors.
    pub fn table(&self) -> String {
        let mut text = format!("device {}, seed {}\n\n", self.device, self.seed);
        text += "| op | pass | dtype | elements | worst abs | worst rel | bound | of it | |\n";
        text += "|---|---|---|--:|--:|--:|---|--:|---|\n";
        for row in &self.rows {
            let Bound { abs, rel } = row.bound;
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {:.1e} | {:.1e} | {abs:.1e} + {rel:.1e} x | {:.0}% | {} |",
                row.op.name(),
                row.pass.name(),
                row.dtype.as_str(),
                row.elements,
                row.worst_abs,
                row.worst_rel,
                100.0 * row.share,
                if row.share > 1.0 { "exceeded" } else { "ok" },
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(scale: f64) -> Row {
        Row::new(Op::Whiten, Pass::Forward, DType::F32, scale)
    }

    #[test]
    fn an_error_counts_as_a_share_of_what_its_element_is_allowed() {
        let mut row = row(1.0);
        row.compare(&[1.0, -2.0 + 1.5e-6], &[1.0, -2.0]).unwrap();
        assert_eq!(row.elements, 2);
        assert!((row.share - 0.5).abs() < 1e-6, "{row:?}");
        row.compare(&[1.0 + 3e-6], &[1.0]).unwrap();
        assert!(row.share > 1.0 && row.worst_abs > 2.9e-6 && row.worst_rel > 2.9e-6, "{row:?}");
    }

    #[test]
    fn nan_and_infinities_pass_only_against_themselves() {
        let (nan, inf) = (f64::NAN, f64::INFINITY);
        let mut same = row(1.0);
        same.compare(&[nan, inf, -inf], &[nan, inf, -inf]).unwrap();
        assert_eq!(same.share, 0.0);
        for (computed, reference) in [(nan, 1.0), (1.0, nan), (inf, 1.0), (1.0, inf), (inf, -inf)] {
            let mut other = row(1.0);
            other.compare(&[computed], &[reference]).unwrap();
            assert!(other.share > 1.0, "{computed} passed for {reference}");
        }
    }

    #[test]
    fn a_result_of_another_length_is_an_error() {
        assert!(row(1.0).compare(&[1.0], &[1.0, 2.0]).is_err());
    }
}
