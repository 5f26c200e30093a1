//! The batches on which every backend of the advantages op is tested.

use ppo_kernels::advantages::cpu::{self, Inputs};
use ppo_kernels::advantages::{
    reference, AdvantageOptions, AdvantageStats, Baseline, Scale, Singleton, Sizes,
    TokenBaselineOptions, TokenStep,
};
use ppo_kernels::tolerance;
use ppo_kernels::whiten::EpsPlacement;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::Rng;

use super::pack::Pack;
use super::{assert_close, random_mask, uniform, wide};

pub const REL: f64 = tolerance::ADVANTAGES.tests.rel;
pub const ABS: f64 = tolerance::ADVANTAGES.tests.abs;

pub const BASELINES: [Baseline; 6] = [
    Baseline::None,
    Baseline::Group,
    Baseline::LeaveOneOut,
    Baseline::Batch,
    Baseline::LengthWeighted,
    Baseline::RunnerUp,
];

pub const SCALES: [Scale; 6] =
    [Scale::None, Scale::Group, Scale::LeaveOneOut, Scale::Batch, Scale::Mean, Scale::Nonzero];

/// Every baseline with every scale, the other options in turn.
pub fn all_options() -> Vec<AdvantageOptions> {
    let mut all = Vec::new();
    for baseline in BASELINES {
        for scale in SCALES {
            let n = all.len();
            all.push(AdvantageOptions {
                eps: [1e-4, 0.1, 0.0][n % 3],
                score_min: [f64::NEG_INFINITY, -1.5][n / 2 % 2],
                score_max: [f64::INFINITY, 1.0][n / 3 % 2],
                baseline,
                scale,
                singleton: [Singleton::Zero, Singleton::Keep][n % 2],
                eps_placement: [EpsPlacement::Std, EpsPlacement::Variance][n / 5 % 2],
                unbiased: n % 4 != 3,
            });
        }
    }
    all
}

/// How rows are put into groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grouping {
    /// Not at all.
    Nothing,
    /// So many after each other.
    Size(usize),
    /// By ids that ascend, of up to so many rows.
    Ascending(usize),
    /// By ids in any order, of up to so many rows.
    Shuffled(usize),
}

pub const GROUPINGS: [Grouping; 8] = [
    Grouping::Nothing,
    Grouping::Size(1),
    Grouping::Size(3),
    Grouping::Size(8),
    Grouping::Ascending(9),
    Grouping::Shuffled(1),
    Grouping::Shuffled(9),
    Grouping::Shuffled(150),
];

/// A batch: scores of which some are equal, some 0, and some NaN.
pub struct Sample {
    pub sizes: Sizes,
    pub scores: Vec<f32>,
    pub groups: Option<Vec<i64>>,
    pub lengths: Vec<f32>,
    pub score_baselines: Option<Vec<f32>>,
    pub mask: Option<Vec<u8>>,
    /// Of a pack, of which `sizes` has the tokens of all rows.
    pub offsets: Option<Vec<i64>>,
}

impl Sample {
    /// About so many rows, and so many tokens each.
    pub fn new(rng: &mut StdRng, grouping: Grouping, rows: usize, seq_len: usize) -> Self {
        let (batch, group_size) = match grouping {
            Grouping::Size(n) => (rows.next_multiple_of(n), n),
            _ => (rows, 0),
        };
        let groups = match grouping {
            Grouping::Ascending(most) | Grouping::Shuffled(most) => {
                let mut ids = Vec::new();
                while ids.len() < batch {
                    // All of i64, both ends among them.
                    let id = match ids.len() {
                        0 => i64::MAX,
                        n if n > batch / 2 && !ids.contains(&i64::MIN) => i64::MIN,
                        _ => rng.random(),
                    };
                    let n = rng.random_range(1..=most).min(batch - ids.len());
                    ids.extend(vec![id; n]);
                }
                if matches!(grouping, Grouping::Ascending(_)) {
                    ids.sort_unstable();
                } else {
                    ids.shuffle(rng);
                }
                Some(ids)
            }
            _ => None,
        };
        let kind = rng.random_range(0..4);
        let scores = uniform(rng, batch, 3.0);
        let scores = scores.into_iter().map(|x| match rng.random_range(0..12) {
            // Right or wrong.
            _ if kind == 0 => f32::from(u8::from(x > 1.5)),
            // Around a number that is large beside their differences.
            _ if kind == 1 => 1000.0 + x,
            0 => f32::NAN,
            1 | 2 => 0.0,
            3 | 4 => 0.1,
            _ => x,
        });
        let scores = scores.collect();
        let lengths = (0..batch).map(|_| rng.random_range(0..50) as f32).collect();
        let score_baselines = rng.random_bool(0.3).then(|| uniform(rng, batch, 0.5));
        let mask = rng.random_bool(0.7).then(|| random_mask(rng, batch * seq_len, 0.6));
        let sizes = Sizes { batch, seq_len, group_size };
        Self { sizes, scores, groups, lengths, score_baselines, mask, offsets: None }
    }

    /// The same tokens in rows of any lengths.
    pub fn packed(mut self, rng: &mut StdRng) -> Self {
        let tokens = self.tokens();
        let mut offsets: Vec<i64> =
            (0..=self.sizes.batch).map(|_| rng.random_range(0..=tokens as i64)).collect();
        offsets.sort_unstable();
        (offsets[0], offsets[self.sizes.batch]) = (0, tokens as i64);
        self.offsets = Some(offsets);
        self.sizes.seq_len = tokens;
        self
    }

    pub fn tokens(&self) -> usize {
        match self.offsets {
            Some(_) => self.sizes.seq_len,
            None => self.sizes.batch * self.sizes.seq_len,
        }
    }

    pub fn inputs(&self) -> Inputs<'_> {
        Inputs {
            scores: &self.scores,
            groups: self.groups.as_deref(),
            lengths: Some(&self.lengths),
            score_baselines: self.score_baselines.as_deref(),
            mask: self.mask.as_deref(),
            offsets: self.offsets.as_deref(),
        }
    }

    /// Whether there are groups, if the options need any, and rows enough in each.
    pub fn fits(&self, options: &AdvantageOptions) -> bool {
        let grouped = self.groups.is_some() || self.sizes.group_size > 0;
        let of_group = matches!(
            options.baseline,
            Baseline::Group | Baseline::LeaveOneOut | Baseline::LengthWeighted | Baseline::RunnerUp
        ) || matches!(
            options.scale,
            Scale::Group | Scale::LeaveOneOut | Scale::Mean
        );
        (grouped || !of_group) && (options.baseline != Baseline::RunnerUp || !self.has_single())
    }

    fn has_single(&self) -> bool {
        match &self.groups {
            None => self.sizes.group_size == 1,
            Some(ids) => ids.iter().any(|id| ids.iter().filter(|other| *other == id).count() == 1),
        }
    }
}

pub fn run_reference(
    inputs: &Inputs,
    sizes: Sizes,
    options: &AdvantageOptions,
) -> reference::Advantages {
    let [lengths, score_baselines] = [inputs.lengths, inputs.score_baselines].map(|x| x.map(wide));
    let wide = reference::Inputs {
        scores: &wide(inputs.scores),
        groups: inputs.groups,
        lengths: lengths.as_deref(),
        score_baselines: score_baselines.as_deref(),
        mask: inputs.mask,
        offsets: inputs.offsets,
    };
    reference::outcome_advantages(&wide, sizes, options)
}

/// What a backend wrote.
#[derive(Debug, Clone)]
pub struct Run {
    pub advantages: Vec<f32>,
    pub token_advantages: Vec<f32>,
    pub stats: AdvantageStats,
}

pub const NO_STATS: AdvantageStats =
    AdvantageStats { score_mean: -7.0, score_std: -7.0, zero_std_fraction: -7.0 };

impl Run {
    pub fn bits(&self) -> (Vec<u32>, [u64; 3]) {
        let all = self.advantages.iter().chain(&self.token_advantages);
        (all.map(|x| x.to_bits()).collect(), numbers(&self.stats).map(f64::to_bits))
    }

    #[track_caller]
    pub fn check(&self, what: &str, want: &reference::Advantages) {
        let close = |name: &str, got: &[f32], want: &[f64]| {
            assert_close(&format!("{what} {name}"), &wide(got), want, REL, ABS);
        };
        close("advantages", &self.advantages, &want.advantages);
        close("token_advantages", &self.token_advantages, &want.token_advantages);
        let (got, want) = (numbers(&self.stats), numbers(&want.stats));
        assert_close(&format!("{what} stats"), &got, &want, 1e-12, 1e-12);
    }
}

pub fn numbers(stats: &AdvantageStats) -> [f64; 3] {
    [stats.score_mean, stats.score_std, stats.zero_std_fraction]
}

/// What the optimal token baseline is made of.
#[derive(Clone)]
pub struct Tokens {
    pub rewards: Vec<f32>,
    pub logp: Vec<f32>,
    pub log_sums: Vec<f32>,
    pub groups: Option<Vec<i64>>,
    pub weights: Option<Vec<f32>>,
    pub mask: Option<Vec<u8>>,
    pub offsets: Option<Vec<i64>>,
    pub sizes: Sizes,
}

impl Tokens {
    /// With what may be left out there or not, by the number.
    pub fn new(rng: &mut StdRng, batch: usize, seq_len: usize, number: usize) -> Self {
        let n = batch * seq_len;
        let logp: Vec<f32> = uniform(rng, n, 2.0).into_iter().map(|x| x - 2.0).collect();
        // The square of the token's own probability and more, up to 1.
        let more = uniform(rng, n, 0.5).into_iter().map(|x| f64::from(x) + 0.5);
        let log_sum = |(&logp, more): (&f32, f64)| {
            let own = (2.0 * f64::from(logp)).exp();
            (own + more * (1.0 - own)).ln() as f32
        };
        let log_sums = logp.iter().zip(more).map(log_sum).collect();
        let by_ids = number.is_multiple_of(2);
        Self {
            rewards: uniform(rng, n, 1.0),
            logp,
            log_sums,
            groups: by_ids.then(|| (0..batch).map(|_| rng.random_range(-3..3)).collect()),
            weights: number.is_multiple_of(3).then(|| uniform(rng, n, 1.0)),
            mask: (!number.is_multiple_of(4)).then(|| random_mask(rng, n, 0.7)),
            offsets: None,
            sizes: Sizes {
                batch,
                seq_len,
                group_size: if by_ids { 0 } else { (batch / 3).max(1) },
            },
        }
    }

    /// Nine rows of up to 61 tokens, some masked, with padding and as a pack.
    pub fn padded_and_packed(rng: &mut StdRng, number: usize) -> (Self, Self, Pack) {
        let (batch, seq_len) = (9, 61);
        let mut padded = Self::new(rng, batch, seq_len, number);
        let pack = Pack::random(rng, batch, seq_len);
        let holes = random_mask(rng, batch * seq_len, 0.8);
        padded.mask = Some(pack.hide(&holes));
        let mut packed = padded.clone();
        for x in [&mut packed.rewards, &mut packed.logp, &mut packed.log_sums] {
            *x = pack.pack(x);
        }
        packed.weights = packed.weights.map(|x| pack.pack(&x));
        packed.mask = Some(pack.pack(&holes));
        packed.offsets = Some(pack.offsets.clone());
        packed.sizes.seq_len = pack.tokens();
        (padded, packed, pack)
    }

    pub fn inputs(&self) -> cpu::TokenInputs<'_> {
        cpu::TokenInputs {
            groups: self.groups.as_deref(),
            weights: self.weights.as_deref(),
            mask: self.mask.as_deref(),
            offsets: self.offsets.as_deref(),
            ..cpu::TokenInputs::new(&self.rewards, &self.logp, &self.log_sums)
        }
    }

    /// Asserts that advantages and returns are those of the reference.
    #[track_caller]
    pub fn check(&self, what: &str, options: &TokenBaselineOptions, found: &[Vec<f32>; 2]) {
        for (got, want) in found.iter().zip(baseline_of_reference(self, options)) {
            let within = tolerance::TOKEN_BASELINE.tests;
            assert_close(what, &wide(got), &want, within.rel, within.abs);
        }
    }
}

pub fn baseline_of_reference(tokens: &Tokens, options: &TokenBaselineOptions) -> [Vec<f64>; 2] {
    let [rewards, logp, log_sums] =
        [&tokens.rewards, &tokens.logp, &tokens.log_sums].map(|x| wide(x));
    let weights = tokens.weights.as_deref().map(wide);
    let inputs = reference::TokenInputs {
        groups: tokens.groups.as_deref(),
        weights: weights.as_deref(),
        mask: tokens.mask.as_deref(),
        offsets: tokens.offsets.as_deref(),
        ..reference::TokenInputs::new(&rewards, &logp, &log_sums)
    };
    reference::optimal_token_baseline(&inputs, tokens.sizes, options)
}

/// All that is not a number.
pub fn baseline_options() -> [TokenBaselineOptions; 4] {
    let of = |step, lone_tail| TokenBaselineOptions { step, lone_tail, ..Default::default() };
    [
        of(TokenStep::Column, true),
        of(TokenStep::Column, false),
        of(TokenStep::Unmasked, true),
        of(TokenStep::Unmasked, false),
    ]
}
