//! The batches on which every backend of the advantages op is tested.

use ppo_kernels::advantages::cpu::Inputs;
use ppo_kernels::advantages::{
    reference, AdvantageOptions, AdvantageStats, Baseline, Scale, Singleton, Sizes,
};
use ppo_kernels::tolerance;
use ppo_kernels::whiten::EpsPlacement;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::Rng;

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
