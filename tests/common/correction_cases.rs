//! The batches, options and tolerances with which every backend of the correction is tested.

use ppo_kernels::correction::{
    cpu, reference, CorrectionOptions, CorrectionStats, Outside, Rejection, RejectionLevel,
    RejectionMetric, WeightLevel,
};
use ppo_kernels::tolerance;
use rand::rngs::StdRng;
use rand::Rng;

use super::pack::Pack;
use super::{assert_close, random_mask, uniform, wide};

pub const REL: f64 = tolerance::CORRECTION.tests.rel;
pub const ABS: f64 = tolerance::CORRECTION.tests.abs;

/// What [`cpu::Inputs`] and [`reference::Inputs`] borrow, with the shape.
#[derive(Clone, Default)]
pub struct Data {
    pub batch: usize,
    pub seq_len: usize,
    pub old_logp: Vec<f32>,
    pub rollout_logp: Vec<f32>,
    pub mask: Option<Vec<u8>>,
    /// Of a pack, whose `seq_len` is that of all rows.
    pub offsets: Option<Vec<i64>>,
}

impl Data {
    pub fn inputs(&self) -> cpu::Inputs<'_> {
        cpu::Inputs {
            mask: self.mask.as_deref(),
            offsets: self.offsets.as_deref(),
            ..cpu::Inputs::new(&self.old_logp, &self.rollout_logp)
        }
    }

    pub fn reference(&self, options: &CorrectionOptions) -> reference::Output {
        let (old_logp, rollout_logp) = (wide(&self.old_logp), wide(&self.rollout_logp));
        let inputs = reference::Inputs {
            mask: self.mask.as_deref(),
            offsets: self.offsets.as_deref(),
            ..reference::Inputs::new(&old_logp, &rollout_logp)
        };
        reference::correction(&inputs, self.batch, self.seq_len, options).unwrap()
    }

    /// Row `b` as a batch of its own.
    pub fn row(&self, b: usize) -> Self {
        let at = b * self.seq_len..(b + 1) * self.seq_len;
        Self {
            batch: 1,
            seq_len: self.seq_len,
            old_logp: self.old_logp[at.clone()].to_vec(),
            rollout_logp: self.rollout_logp[at.clone()].to_vec(),
            mask: self.mask.as_ref().map(|mask| mask[at].to_vec()),
            offsets: None,
        }
    }
}

/// Rows of any length with gaps, padded, and as a pack.
pub struct Packed {
    pub pack: Pack,
    pub padded: Data,
    pub packed: Data,
}

impl Packed {
    /// Of which none is so near a bound of the options that rounding decides.
    pub fn new(
        rng: &mut StdRng,
        batch: usize,
        seq_len: usize,
        options: &CorrectionOptions,
    ) -> Self {
        let pack = Pack::random(rng, batch, seq_len);
        let mut padded = rollout(rng, batch, seq_len, false);
        padded.mask = Some(pack.hide(&random_mask(rng, batch * seq_len, 0.8)));
        let padded = clear_of_bounds(padded, options);
        let packed = Data {
            batch,
            seq_len: pack.tokens(),
            old_logp: pack.pack(&padded.old_logp),
            rollout_logp: pack.pack(&padded.rollout_logp),
            mask: padded.mask.as_ref().map(|mask| pack.pack(mask)),
            offsets: Some(pack.offsets.clone()),
        };
        Self { pack, padded, packed }
    }

    /// Checks that weights have the same bits, if no mean of all of them divides them, and that statistics
    /// are as good as the same.
    #[track_caller]
    pub fn check(&self, what: &str, options: &CorrectionOptions, padded: &Found, packed: &Found) {
        assert_eq!(self.pack.pack(&padded.kept), packed.kept, "{what}");
        let weights = self.pack.pack(&padded.weights);
        if options.normalise {
            assert_close(what, &wide(&packed.weights), &wide(&weights), 1e-6, 0.0);
        } else {
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert!(bits(&weights) == bits(&packed.weights), "{what}");
        }
        assert_close(what, &packed.stats.to_array(), &padded.stats.to_array(), 1e-6, 1e-6);
    }
}

/// A rollout whose engine is near the trainer, with tokens that one of them is sure of, some far off, and
/// some that were not scored. Masked are padding and gaps, of NaN, and the whole last row of several.
pub fn rollout(rng: &mut StdRng, batch: usize, seq_len: usize, masked: bool) -> Data {
    let n = batch * seq_len;
    let mut old_logp: Vec<f32> = uniform(rng, n, 1.4).into_iter().map(|x| -1.5 - x).collect();
    let mut rollout_logp: Vec<f32> = old_logp
        .iter()
        .zip(uniform(rng, n, 0.5))
        .map(|(logp, noise)| (logp - noise + 0.02).min(-1e-3))
        .collect();
    for t in 0..n {
        match rng.random_range(0..40) {
            0 => old_logp[t] = -1e-4,
            1 => rollout_logp[t] = -12.0,
            2 => rollout_logp[t] = f32::NAN,
            3 => (old_logp[t], rollout_logp[t]) = (-0.0, -0.01),
            _ => {}
        }
    }
    let mask = masked.then(|| {
        let mut mask = random_mask(rng, n, 0.8);
        for row in mask.chunks_mut(seq_len.max(1)) {
            row[seq_len - seq_len / 3..].fill(0);
            row[0] = 255;
        }
        if batch > 1 {
            mask[(batch - 1) * seq_len..].fill(0);
        }
        mask
    });
    for (t, _) in mask.iter().flatten().enumerate().filter(|(_, &m)| m == 0) {
        (old_logp[t], rollout_logp[t]) = (f32::NAN, f32::NAN);
    }
    Data { batch, seq_len, old_logp, rollout_logp, mask, offsets: None }
}

/// The same with all bounds and clamps moved by a share.
fn moved(options: &CorrectionOptions, by: f64) -> CorrectionOptions {
    let scaled = |bound: Option<f64>| bound.map(|bound| bound * (1.0 + by));
    let rejection = |r: Rejection| Rejection { low: scaled(r.low), high: scaled(r.high), ..r };
    CorrectionOptions {
        low: scaled(options.low),
        high: scaled(options.high),
        // What is truncated shows as well.
        outside: Outside::Zero,
        rejection: rejection(options.rejection),
        second_rejection: rejection(options.second_rejection),
        ..*options
    }
}

/// Moves tokens until none is so near a bound that rounding decides.
pub fn clear_of_bounds(mut data: Data, options: &CorrectionOptions) -> Data {
    const MARGIN: f64 = 1e-4;
    for _ in 0..50 {
        let [a, b] = [-MARGIN, MARGIN].map(|by| data.reference(&moved(options, by)));
        let differs = |t: &usize| {
            a.kept[*t] != b.kept[*t] || (a.weights[*t] == 0.0) != (b.weights[*t] == 0.0)
        };
        let near: Vec<usize> = (0..data.old_logp.len()).filter(differs).collect();
        if near.is_empty() {
            return data;
        }
        near.into_iter().for_each(|t| data.old_logp[t] -= 7e-3);
    }
    panic!("no batch is clear of the bounds of {options:?}");
}

/// Every option away from its default, one or a few at a time, and every constructor.
pub fn option_sets() -> Vec<(&'static str, CorrectionOptions)> {
    use RejectionLevel as L;
    use RejectionMetric as M;
    let rule = |metric, level, low, high| Rejection { metric, level, low, high };
    let reject = CorrectionOptions::reject;
    let default = CorrectionOptions::default();
    vec![
        ("default", default),
        ("no bounds", CorrectionOptions { high: None, ..default }),
        ("two bounds", CorrectionOptions { low: Some(0.8), high: Some(1.2), ..default }),
        ("normalised", CorrectionOptions { normalise: true, ..default }),
        ("icepop", CorrectionOptions::icepop(0.7, 1.3)),
        (
            "icepop normalised",
            CorrectionOptions { normalise: true, ..CorrectionOptions::icepop(0.7, 1.3) },
        ),
        ("clamp", CorrectionOptions { log_ratio_clamp: Some(0.3), high: None, ..default }),
        ("sequence_tis", CorrectionOptions::sequence_tis(1.5)),
        ("sequence_mask", CorrectionOptions::sequence_mask(3.0)),
        (
            "sequence normalised",
            CorrectionOptions {
                normalise: true,
                low: Some(0.2),
                ..CorrectionOptions::sequence_tis(1.5)
            },
        ),
        ("geometric", CorrectionOptions::geometric(0.95, 1.2)),
        ("geometric_mask", CorrectionOptions::geometric_mask(0.99, 1.2)),
        (
            "geometric mean truncated",
            CorrectionOptions {
                level: WeightLevel::SequenceMean,
                high: Some(1.05),
                normalise: true,
                ..default
            },
        ),
        ("token k1", reject(Rejection::verl("token_k1", Some(0.7), 1.4).unwrap())),
        ("token k2", reject(rule(M::K2, L::Token, None, Some(0.06)))),
        ("token k3", reject(rule(M::K3, L::Token, None, Some(0.06)))),
        ("token reverse k3", reject(rule(M::ReverseK3, L::Token, Some(0.001), Some(0.06)))),
        ("token binary kl", reject(rule(M::BinaryKl, L::Token, None, Some(0.02)))),
        ("token larger binary kl", reject(rule(M::BinaryKlMax, L::Token, None, Some(0.02)))),
        ("token tv", reject(rule(M::TotalVariation, L::Token, None, Some(0.08)))),
        ("row sum of ratios", reject(rule(M::Ratio, L::SequenceSum, Some(0.2), Some(5.0)))),
        ("row mean of k3", reject(rule(M::K3, L::SequenceMean, None, Some(0.5)))),
        ("row sum of k2", reject(rule(M::K2, L::SequenceSum, Some(0.1), Some(20.0)))),
        ("most and least ratio", reject(rule(M::Ratio, L::SequenceMax, Some(0.5), Some(1.9)))),
        ("row max of k2", reject(rule(M::K2, L::SequenceMax, None, Some(0.12)))),
        ("row mean of binary kl", reject(rule(M::BinaryKl, L::SequenceMean, None, Some(0.04)))),
        (
            "row mean of larger binary kl",
            reject(rule(M::BinaryKlMax, L::SequenceMean, None, Some(0.05))),
        ),
        (
            "row mean of tv",
            reject(rule(M::TotalVariation, L::SequenceMean, Some(0.01), Some(0.09))),
        ),
        (
            "token and row",
            CorrectionOptions {
                normalise: true,
                rejection: rule(M::Ratio, L::Token, Some(0.6), Some(1.6)),
                second_rejection: rule(M::K3, L::SequenceMean, None, Some(0.5)),
                ..CorrectionOptions::icepop(0.5, 1.5)
            },
        ),
        (
            "two of rows",
            CorrectionOptions {
                rejection: rule(M::ReverseK3, L::SequenceMean, None, Some(0.5)),
                second_rejection: rule(M::TotalVariation, L::SequenceMax, None, Some(0.9)),
                ..CorrectionOptions::sequence_tis(2.0)
            },
        ),
        (
            "second alone",
            CorrectionOptions {
                second_rejection: rule(M::K2, L::Token, None, Some(0.1)),
                ..CorrectionOptions { outside: Outside::Zero, ..default }
            },
        ),
    ]
}

/// What a backend makes of a batch: weights, the mask that is left, and the statistics.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    pub weights: Vec<f32>,
    pub kept: Vec<u8>,
    pub stats: CorrectionStats,
}

impl Found {
    pub fn bits(&self) -> (Vec<u32>, Vec<u8>, Vec<u64>) {
        let weights = self.weights.iter().map(|x| x.to_bits()).collect();
        let stats = self.stats.to_array().iter().map(|x| x.to_bits()).collect();
        (weights, self.kept.clone(), stats)
    }
}

/// Statistics that nobody has written.
pub fn unwritten() -> CorrectionStats {
    CorrectionStats::from_array([-7.0; CorrectionStats::LEN])
}

pub fn run_cpu(data: &Data, options: &CorrectionOptions) -> ppo_kernels::Result<Found> {
    let n = data.old_logp.len();
    let (mut weights, mut kept, mut stats) = (vec![f32::NAN; n], vec![7; n], [unwritten()]);
    let outputs =
        cpu::Outputs { kept: Some(&mut kept), ..cpu::Outputs::new(&mut weights, &mut stats) };
    cpu::correction(data.inputs(), data.batch, data.seq_len, options, outputs)?;
    Ok(Found { weights, kept, stats: stats[0] })
}

/// Asserts that a backend found what the reference does.
#[track_caller]
pub fn check(what: &str, data: &Data, options: &CorrectionOptions, found: &Found) {
    let want = data.reference(options);
    assert_eq!(found.kept, want.kept, "{what} kept");
    assert_close(&format!("{what} weights"), &wide(&found.weights), &want.weights, REL, ABS);
    let scale = want.stats.tokens.max(1.0);
    let (got, want) = (found.stats.to_array(), want.stats.to_array());
    for (i, name) in CorrectionStats::NAMES.into_iter().enumerate() {
        // Terms of either sign cancel in sums.
        let abs = if name.ends_with("_sum") { ABS * scale } else { ABS };
        assert_close(&format!("{what} {name}"), &[got[i]], &[want[i]], REL, abs);
    }
}
