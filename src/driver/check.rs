//! `ppo-kernels check`: every op, pass and dtype on the chosen device against the f64 references, on
//! fresh random inputs.
//!
//! The inputs have what training has: peaked logits, -inf logits, masks with gaps, padding, ignored
//! targets, NaN wherever a mask forbids to look, vocabularies that are no multiple of anything, and
//! random options. The reference sees the same values, those of 16 bits after rounding to them.
//!
//! An element passes if it is within [`crate::tolerance`], which says why.
//!
//! Where a loss has a kink (a clip range, a clamp), f32 and f64 may rightly be on different sides of it,
//! with different gradients. Inputs within 1e-3 of a kink are drawn again.

mod cases;

use std::fmt::Write as _;

use anyhow::{ensure, Result};
use candle_core::DType;
use clap::Args;

use super::config::DeviceName;
use crate::tolerance::{self, Tolerance};

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
    /// `linear_logprobs`, on the CPU.
    Linear,
    /// `token_kl`.
    TokenKl,
    /// `full_kl`.
    FullKl,
    /// `gae`, with its rewards and moments.
    Gae,
    /// `outcome_advantages`, with its statistics.
    Advantages,
    /// `optimal_token_baseline`.
    TokenBaseline,
    /// `masked_whiten`, `masked_whiten_with`.
    Whiten,
    /// `correction` with its statistics.
    Correction,
    /// `ppo_loss` with its statistics.
    PpoLoss,
    /// `preference_loss` with its statistics and rewards, and `reward_model_loss`.
    Preference,
}

impl Op {
    fn name(self) -> &'static str {
        match self {
            Op::Logprob => "logprob",
            Op::Linear => "linear",
            Op::TokenKl => "token_kl",
            Op::FullKl => "full_kl",
            Op::Gae => "gae",
            Op::Advantages => "advantages",
            Op::TokenBaseline => "token_baseline",
            Op::Whiten => "whiten",
            Op::Correction => "correction",
            Op::PpoLoss => "ppo_loss",
            Op::Preference => "preference",
        }
    }
}

/// The tolerance of an op's results.
pub fn tolerance(op: Op, pass: Pass, dtype: DType) -> Tolerance {
    let tolerances = match op {
        Op::Logprob => tolerance::LOGPROB,
        Op::Linear => tolerance::LINEAR,
        Op::TokenKl => tolerance::TOKEN_KL,
        Op::FullKl => tolerance::FULL_KL,
        Op::Gae => tolerance::GAE,
        Op::Advantages => tolerance::ADVANTAGES,
        Op::TokenBaseline => tolerance::TOKEN_BASELINE,
        Op::Whiten => tolerance::WHITEN,
        Op::Correction => tolerance::CORRECTION,
        Op::PpoLoss => tolerance::PPO_LOSS,
        Op::Preference => tolerance::PREFERENCE,
    };
    match (pass, dtype) {
        (Pass::Forward, _) => tolerances.forward,
        (Pass::Backward, DType::F16) => tolerances.backward.rounded_to_f16(),
        (Pass::Backward, DType::BF16) => tolerances.backward.rounded_to_bf16(),
        (Pass::Backward, _) => tolerances.backward,
    }
}

/// The worst of all elements of one op, pass and dtype.
#[derive(Debug, Clone)]
struct Row {
    op: Op,
    pass: Pass,
    dtype: DType,
    bound: Tolerance,
    elements: usize,
    worst_abs: f64,
    /// The worst relative error of elements for which the relative part of the bound is the larger one.
    worst_rel: f64,
    /// The worst error as a share of what the bound allows that element.
    share: f64,
}

impl Row {
    fn new(op: Op, pass: Pass, dtype: DType, bound_scale: f64) -> Self {
        let Tolerance { abs, rel } = tolerance(op, pass, dtype);
        let bound = Tolerance { abs: abs * bound_scale, rel: rel * bound_scale };
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

/// The findings of a check.
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
            let Tolerance { abs, rel } = row.bound;
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
