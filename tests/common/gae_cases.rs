//! The batches on which every backend of the gae op is tested, and how its results are compared.

use ppo_kernels::gae::cpu::Inputs;
use ppo_kernels::gae::{
    reference, GaeOptions, MaskMode, MissingEos, RewardShaping, ScoreOrder, ScorePlacement,
    ScoreScale,
};
use ppo_kernels::moments::Moments;
use ppo_kernels::tolerance;
use rand::rngs::StdRng;
use rand::Rng;

use super::pack::Pack;
use super::{assert_close, random_mask, uniform, wide};

pub const REL: f64 = tolerance::GAE.tests.rel;
pub const ABS: f64 = tolerance::GAE.tests.abs;

/// What a backend writes.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    pub advantages: Vec<f32>,
    pub returns: Vec<f32>,
    pub rewards: Vec<f32>,
    pub moments: Moments,
}

#[track_caller]
pub fn check_output(what: &str, got: &Output, want: &reference::Gae) {
    let close = |key: &str, got: &[f32], want: &[f64]| {
        assert_close(&format!("{what} {key}"), &wide(got), want, REL, ABS);
    };
    close("rewards", &got.rewards, &want.rewards);
    close("advantages", &got.advantages, &want.advantages);
    close("returns", &got.returns, &want.returns);
    assert_eq!(got.moments.count, want.moments.count, "{what}");
    let n = want.moments.count.max(1.0);
    let pair = |m: &Moments| [m.mean, m.m2 / n];
    assert_close(&format!("{what} moments"), &pair(&got.moments), &pair(&want.moments), REL, ABS);
}

/// All inputs at random; what is masked is NaN.
pub struct Sample {
    pub batch: usize,
    pub seq_len: usize,
    pub values: Vec<f32>,
    pub rewards: Vec<f32>,
    pub kl: Vec<f32>,
    pub scores: Vec<f32>,
    pub has_eos: Vec<u8>,
    pub mask: Vec<u8>,
    pub dones: Vec<u8>,
    pub bootstrap: Vec<f32>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Masked {
    Nothing,
    Right,
    Left,
    Gaps,
    Rows,
}

impl Sample {
    pub fn new(rng: &mut StdRng, batch: usize, seq_len: usize, masked: Masked) -> Self {
        let tokens = batch * seq_len;
        let mut mask = vec![1; tokens];
        for row in 0..batch {
            let row = &mut mask[row * seq_len..(row + 1) * seq_len];
            let cut = rng.random_range(0..=seq_len);
            match masked {
                Masked::Nothing => {}
                Masked::Right => row[cut..].fill(0),
                Masked::Left => row[..cut].fill(0),
                Masked::Gaps => row.copy_from_slice(&random_mask(rng, seq_len, 0.7)),
                Masked::Rows => row.fill(rng.random_range(0..=1)),
            }
        }
        let mut sample = Self {
            batch,
            seq_len,
            values: uniform(rng, tokens, 1.0),
            rewards: uniform(rng, tokens, 0.5),
            kl: uniform(rng, tokens, 1.0),
            scores: uniform(rng, batch, 8.0),
            has_eos: random_mask(rng, batch, 0.5),
            dones: random_mask(rng, tokens, 0.02),
            bootstrap: uniform(rng, batch, 2.0),
            mask,
        };
        for i in (0..tokens).filter(|&i| sample.mask[i] == 0) {
            // The value after the last token may be read: AfterLastToken.
            if i % seq_len == 0 || sample.mask[i - 1] == 0 {
                sample.values[i] = f32::NAN;
            }
            (sample.rewards[i], sample.kl[i], sample.dones[i]) = (f32::NAN, f32::NAN, 1);
        }
        sample
    }

    /// Everything, or (`fewer`) only what a plain PPO has.
    pub fn inputs(&self, fewer: bool, masked: bool) -> Inputs<'_> {
        let all = Inputs {
            values: &self.values,
            rewards: Some(&self.rewards),
            kl: Some(&self.kl),
            scores: Some(&self.scores),
            has_eos: Some(&self.has_eos),
            mask: masked.then_some(self.mask.as_slice()),
            dones: Some(&self.dones),
            bootstrap: Some(&self.bootstrap),
            offsets: None,
            lambda_per_row: None,
        };
        if fewer {
            return Inputs { rewards: None, dones: None, bootstrap: None, ..all };
        }
        all
    }
}

/// The reference on f32 inputs.
pub fn run_reference(
    inputs: &Inputs,
    batch: usize,
    seq_len: usize,
    options: &GaeOptions,
) -> reference::Gae {
    let widened = |v: Option<&[f32]>| v.map(wide);
    let (values, rewards, kl) = (wide(inputs.values), widened(inputs.rewards), widened(inputs.kl));
    let (scores, bootstrap) = (widened(inputs.scores), widened(inputs.bootstrap));
    let lambda_per_row = widened(inputs.lambda_per_row);
    let inputs = reference::Inputs {
        values: &values,
        rewards: rewards.as_deref(),
        kl: kl.as_deref(),
        scores: scores.as_deref(),
        has_eos: inputs.has_eos,
        mask: inputs.mask,
        dones: inputs.dones,
        bootstrap: bootstrap.as_deref(),
        offsets: inputs.offsets,
        lambda_per_row: lambda_per_row.as_deref(),
    };
    reference::gae(&inputs, batch, seq_len, options)
}

/// A sample's rows without their ends, and as they are in the padded batch.
pub struct Packed {
    pub pack: Pack,
    pub padded: Sample,
    pub packed: Sample,
    pub lambda_per_row: Vec<f32>,
}

impl Packed {
    /// Rows of any length with gaps. The last token of each is masked, so that it has room for a score
    /// behind the last unmasked one in both.
    pub fn new(rng: &mut StdRng, batch: usize, seq_len: usize) -> Self {
        let pack = Pack::random(rng, batch, seq_len);
        let mut padded = Sample::new(rng, batch, seq_len, Masked::Gaps);
        for row in (0..batch).filter(|&row| pack.length(row) > 0) {
            padded.mask[row * seq_len + pack.length(row) - 1] = 0;
        }
        padded.mask = pack.hide(&padded.mask);
        let packed = Sample {
            batch,
            seq_len: pack.tokens(),
            values: pack.pack(&padded.values),
            rewards: pack.pack(&padded.rewards),
            kl: pack.pack(&padded.kl),
            scores: padded.scores.clone(),
            has_eos: padded.has_eos.clone(),
            mask: pack.pack(&padded.mask),
            dones: pack.pack(&padded.dones),
            bootstrap: padded.bootstrap.clone(),
        };
        let lambda_per_row = (0..batch).map(|_| rng.random_range(0.0..=1.0)).collect();
        Self { pack, padded, packed, lambda_per_row }
    }

    /// The inputs of the padded batch, and those of the pack.
    pub fn inputs(&self, own_lambdas: bool) -> [Inputs<'_>; 2] {
        let lambda_per_row = own_lambdas.then_some(&self.lambda_per_row[..]);
        let padded = Inputs { lambda_per_row, ..self.padded.inputs(false, true) };
        let offsets = Some(&self.pack.offsets[..]);
        [padded, Inputs { offsets, lambda_per_row, ..self.packed.inputs(false, true) }]
    }

    /// Checks that the rows have the same bits, and that the moments are as good as the same.
    #[track_caller]
    pub fn check(&self, what: &str, padded: &Output, packed: &Output) {
        let same = |key: &str, padded: &[f32], packed: &[f32]| {
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert!(bits(&self.pack.pack(padded)) == bits(packed), "{what}: {key}");
        };
        same("advantages", &padded.advantages, &packed.advantages);
        same("returns", &padded.returns, &packed.returns);
        same("rewards", &padded.rewards, &packed.rewards);
        let [a, b] = [padded.moments, packed.moments];
        assert_eq!(a.count, b.count, "{what}");
        let (a, b) = ([a.mean, a.m2], [b.mean, b.m2]);
        assert_close(&format!("{what} moments"), &a, &b, 1e-6, 1e-9);
    }
}

pub fn all_options() -> Vec<GaeOptions> {
    let mut all = Vec::new();
    let scale = Some(ScoreScale { mean: 0.5, std: 2.0 });
    const NO_CLIP: [f64; 2] = [f64::NEG_INFINITY, f64::INFINITY];
    for (gamma, lambda, value_lambda) in
        [(1.0, 0.95, None), (0.99, 0.9, Some(1.0)), (1.0, 1.0, None), (0.9, 0.0, Some(0.5))]
    {
        for mask_mode in [MaskMode::Carry, MaskMode::Multiply] {
            for placement in [ScorePlacement::LastToken, ScorePlacement::AfterLastToken] {
                for (scale, [score_min, score_max], order, missing_eos) in [
                    (None, NO_CLIP, ScoreOrder::ScaleThenClip, MissingEos::Keep),
                    (scale, [-1.5, 1.5], ScoreOrder::ScaleThenClip, MissingEos::Subtract(1.0)),
                    (scale, [-0.4, 0.8], ScoreOrder::ClipThenScale, MissingEos::Replace(-3.0)),
                ] {
                    let shaping = RewardShaping {
                        kl_coef: 0.1,
                        score_placement: placement,
                        score_scale: scale,
                        score_min,
                        score_max,
                        score_order: order,
                        missing_eos,
                    };
                    all.push(GaeOptions { gamma, lambda, value_lambda, mask_mode, shaping });
                }
            }
        }
    }
    all
}

pub const ALL_MASKED: [Masked; 5] =
    [Masked::Nothing, Masked::Right, Masked::Left, Masked::Gaps, Masked::Rows];

pub fn bits(output: &Output) -> (Vec<u32>, u64, u64) {
    let all = [&output.advantages, &output.returns, &output.rewards];
    let bits = all.into_iter().flatten().map(|v| v.to_bits()).collect();
    (bits, output.moments.mean.to_bits(), output.moments.m2.to_bits())
}
