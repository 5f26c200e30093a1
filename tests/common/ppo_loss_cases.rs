//! The batches, options and tolerances with which every backend of the PPO loss is tested.

use ppo_kernels::kl::{KlEstimator, KlOptions};
use ppo_kernels::ppo_loss::{
    cpu, reference, Aggregation, ClipFractionKind, KlAgainst, KlGradient, KlRatio, PpoLossOptions,
    PpoStats, RatioGradient, RatioLevel, Surrogate, TrustRegion, TrustRegionSides,
};
use ppo_kernels::tolerance;
use rand::rngs::StdRng;

use super::pack::Pack;
use super::{assert_close, random_mask, uniform, wide};

pub const REL: f64 = tolerance::PPO_LOSS.tests.rel;
pub const ABS: f64 = tolerance::PPO_LOSS.tests.abs;

/// What [`cpu::Inputs`] and [`reference::Inputs`] borrow, with the shape.
#[derive(Clone, Default)]
pub struct Data<T> {
    pub batch: usize,
    pub seq_len: usize,
    pub logp: Vec<T>,
    pub old_logp: Vec<T>,
    pub advantages: Vec<T>,
    pub values: Option<Vec<T>>,
    pub old_values: Option<Vec<T>>,
    pub returns: Option<Vec<T>>,
    pub entropy: Option<Vec<T>>,
    pub ref_logp: Option<Vec<T>>,
    pub rollout_logp: Option<Vec<T>>,
    pub weights: Option<Vec<T>>,
    pub mask: Option<Vec<u8>>,
    /// Of a pack, whose `seq_len` is that of all rows.
    pub offsets: Option<Vec<i64>>,
}

impl<T: Copy> Data<T> {
    pub fn map<U>(&self, f: impl Fn(T) -> U) -> Data<U> {
        let all = |x: &Vec<T>| x.iter().map(|&x| f(x)).collect();
        Data {
            batch: self.batch,
            seq_len: self.seq_len,
            logp: all(&self.logp),
            old_logp: all(&self.old_logp),
            advantages: all(&self.advantages),
            values: self.values.as_ref().map(all),
            old_values: self.old_values.as_ref().map(all),
            returns: self.returns.as_ref().map(all),
            entropy: self.entropy.as_ref().map(all),
            ref_logp: self.ref_logp.as_ref().map(all),
            rollout_logp: self.rollout_logp.as_ref().map(all),
            weights: self.weights.as_ref().map(all),
            mask: self.mask.clone(),
            offsets: self.offsets.clone(),
        }
    }
}

impl<T: Copy + From<f32>> Data<T> {
    /// The same, with numbers for rows where the options ask for them; some weights are 0.
    pub fn for_options(&self, options: &PpoLossOptions) -> Self {
        let of_rows = |f: fn(f32) -> f32| (0..self.batch).map(|b| f(b as f32).into()).collect();
        let mut data = self.clone();
        if options.advantages_per_row {
            data.advantages = of_rows(|b| 1.5 * (1.7 * b + 0.3).sin());
        }
        if options.weights_per_row {
            data.weights =
                data.weights.map(|_| of_rows(|b| (1.2 + (2.3 * b).sin()).max(0.5) - 0.5));
        }
        data
    }
}

macro_rules! inputs {
    ($($number:ty, $backend:ident;)*) => {$(
        impl Data<$number> {
            /// Without what goes with the values, where those are not there.
            pub fn inputs(&self) -> $backend::Inputs<'_> {
                let has_values = self.values.is_some();
                $backend::Inputs {
                    values: self.values.as_deref(),
                    old_values: self.old_values.as_deref().filter(|_| has_values),
                    returns: self.returns.as_deref().filter(|_| has_values),
                    entropy: self.entropy.as_deref(),
                    ref_logp: self.ref_logp.as_deref(),
                    rollout_logp: self.rollout_logp.as_deref(),
                    weights: self.weights.as_deref(),
                    mask: self.mask.as_deref(),
                    offsets: self.offsets.as_deref(),
                    ..$backend::Inputs::new(&self.logp, &self.old_logp, &self.advantages)
                }
            }
        }
    )*};
}

inputs! {
    f32, cpu;
    f64, reference;
}

/// Something done to a batch before it is used.
pub type Change = fn(&mut Data<f32>);

/// A rollout with everything given but weights, on the scale of real ones, all tokens unmasked.
pub fn rollout(rng: &mut StdRng, batch: usize, seq_len: usize) -> Data<f32> {
    let n = batch * seq_len;
    let mut near = |x: &[f32], scale| -> Vec<f32> {
        x.iter().zip(uniform(rng, n, scale)).map(|(x, noise)| x + noise).collect()
    };
    let mut logp = near(&vec![-2.0; n], 1.9);
    // One that is certain.
    logp[n / 2] = 0.0;
    let values = near(&vec![0.5; n], 1.0);
    Data {
        batch,
        seq_len,
        old_logp: near(&logp, 0.6),
        ref_logp: Some(near(&logp, 0.9)),
        rollout_logp: Some(near(&logp, 0.3)),
        advantages: near(&vec![0.1; n], 1.5),
        old_values: Some(near(&values, 0.4)),
        returns: Some(near(&values, 0.7)),
        entropy: Some(near(&vec![1.5; n], 1.4)),
        logp,
        values: Some(values),
        weights: None,
        mask: None,
        offsets: None,
    }
}

/// Weights as corrections and masks leave them: some 0, the others around 1.
pub fn some_weights(rng: &mut StdRng, n: usize) -> Vec<f32> {
    let weights = uniform(rng, n, 1.0).into_iter().map(|x| (x + 0.8).max(0.0));
    weights.collect()
}

/// A batch whose statistics sums in f32 lose that are not taken around a number of their own: ratios
/// that agree but are not 1, and a return that is an outlier, the first. Without and with a masked token
/// beside it.
pub fn hard_to_sum(batch: usize, seq_len: usize) -> [Data<f32>; 4] {
    let n = batch * seq_len;
    // Multiples of 2^-21, so that differences are exact in f32.
    let step = |i: usize| ((i * 7) % 32) as f32 * 2_f32.powi(-17);
    let returns: Vec<f32> = (0..n).map(|i| 0.75 + step(i)).collect();
    [(1e8, None), (-1e8, None), (1e8, Some(1)), (-1e8, Some(3))].map(|(outlier, masked)| {
        let mut returns = returns.clone();
        returns[0] = outlier;
        let keep = |token: usize| (0..n).map(|i| u8::from(i != token)).collect();
        Data {
            batch,
            seq_len,
            logp: vec![-2.0; n],
            old_logp: (0..n).map(|i| -0.28125 + step(i)).collect(),
            advantages: vec![1.0; n],
            values: Some((0..n).map(|i| 0.5 + step(3 * i)).collect()),
            old_values: Some(vec![0.5; n]),
            returns: Some(returns),
            mask: masked.map(keep),
            ..Default::default()
        }
    })
}

/// Asserts what the statistics of [`hard_to_sum`] can be: means to a few units in the last place of the
/// sum of magnitudes, the variance of the ratio to the share that the rounding of e^x leaves.
#[track_caller]
pub fn check_hard_to_sum(data: &Data<f32>, stats: &PpoStats) {
    let want = run(&data.map(f64::from), &PpoLossOptions::default()).stats;
    let ulp = f64::from(f32::EPSILON) / 2.0;
    let close = |what, got, want, rel| assert_close(what, &[got], &[want], rel, 0.0);
    close("ratio_mean", stats.ratio_mean, want.ratio_mean, 4.0 * ulp);
    close("ratio_var", stats.ratio_var, want.ratio_var, 0.05);
    close("return_mean", stats.return_mean, want.return_mean, 4.0 * ulp);
}

/// Ratios down to the least floats, which advantages make normal numbers of, and the options that clip
/// nothing.
pub fn unlikely() -> (Data<f32>, PpoLossOptions) {
    let d = [-1.0, -20.0, -80.0, -87.0, -87.5, -88.0, -90.0, -95.0, -100.0];
    let data = Data {
        batch: 1,
        seq_len: d.len(),
        logp: d.iter().map(|d| d - 2.0).collect(),
        old_logp: vec![-2.0; d.len()],
        advantages: vec![-1e20; d.len()],
        ..Default::default()
    };
    let options = PpoLossOptions {
        clip_range: f64::INFINITY,
        log_ratio_clamp: None,
        aggregation: Aggregation::Constant(1.0),
        ..Default::default()
    };
    (data, options)
}

/// Asserts that the gradients of [`unlikely`] are good to what its ratios are: the least float.
#[track_caller]
pub fn check_unlikely(found: &Found) {
    let (data, options) = unlikely();
    let want = &run(&data.map(f64::from), &options).grad_logp;
    for (i, (&got, &want)) in found.1[0].iter().zip(want).enumerate() {
        let bound = 2e-6 * want.abs() + 1e20 * f64::from(f32::from_bits(1));
        let error = (f64::from(got) - want).abs();
        assert!(error <= bound, "logp {}: {got:e}, not {want:e}", data.logp[i]);
    }
}

pub fn run(data: &Data<f64>, options: &PpoLossOptions) -> reference::Output {
    reference::ppo_loss(&data.inputs(), data.batch, data.seq_len, options).unwrap()
}

/// Statistics that nobody has written.
pub fn unwritten() -> PpoStats {
    PpoStats::from_array([-7.0; PpoStats::LEN])
}

/// A mask with holes and right padding, in which any non-zero byte keeps, and the last row of
/// several is fully masked.
pub fn padded_mask(rng: &mut StdRng, batch: usize, seq_len: usize) -> Vec<u8> {
    let mut mask = random_mask(rng, batch * seq_len, 0.7);
    for row in mask.chunks_mut(seq_len) {
        row[seq_len - seq_len / 3..].fill(0);
        row[0] = 255;
    }
    if batch > 1 {
        mask[(batch - 1) * seq_len..].fill(0);
    }
    mask
}

/// `data` with NaN in every input at every masked token.
pub fn with_nan_under_the_mask(data: &Data<f32>) -> Data<f32> {
    let mut data = data.clone();
    let mask = data.mask.clone().unwrap();
    let tokens = mask.len();
    let Data {
        logp,
        old_logp,
        advantages,
        values,
        old_values,
        returns,
        entropy,
        ref_logp,
        rollout_logp,
        weights,
        ..
    } = &mut data;
    let optional = [values, old_values, returns, entropy, ref_logp, rollout_logp, weights];
    let optional = optional.into_iter().flatten();
    let all = [logp, old_logp, advantages].into_iter().chain(optional);
    for x in all.filter(|x| x.len() == tokens) {
        for (x, _) in x.iter_mut().zip(&mask).filter(|(_, &m)| m == 0) {
            *x = f32::NAN;
        }
    }
    data
}

/// What a backend makes of a batch: the statistics, and the gradients with respect to logp, values
/// and entropy, empty for what is not given.
pub type Found = (PpoStats, [Vec<f32>; 3]);

pub fn bits((stats, grads): &Found) -> (Vec<u64>, Vec<u32>) {
    let stats = stats.to_array().iter().map(|x| x.to_bits()).collect();
    (stats, grads.iter().flatten().map(|x| x.to_bits()).collect())
}

/// Row `b` as a batch of its own.
pub fn row(data: &Data<f32>, b: usize) -> Data<f32> {
    let range = b * data.seq_len..(b + 1) * data.seq_len;
    let cut = |x: &Vec<f32>| x[range.clone()].to_vec();
    Data {
        batch: 1,
        seq_len: data.seq_len,
        logp: cut(&data.logp),
        old_logp: cut(&data.old_logp),
        advantages: cut(&data.advantages),
        values: data.values.as_ref().map(cut),
        old_values: data.old_values.as_ref().map(cut),
        returns: data.returns.as_ref().map(cut),
        entropy: data.entropy.as_ref().map(cut),
        ref_logp: data.ref_logp.as_ref().map(cut),
        rollout_logp: data.rollout_logp.as_ref().map(cut),
        weights: data.weights.as_ref().map(cut),
        mask: data.mask.as_ref().map(|mask| mask[range.clone()].to_vec()),
        offsets: None,
    }
}

/// Rows of any length, with holes or without, padded and as a pack.
pub struct Packed {
    pub pack: Pack,
    pub padded: Data<f32>,
    pub packed: Data<f32>,
}

impl Packed {
    pub fn new(rng: &mut StdRng, batch: usize, seq_len: usize, holes: bool) -> Self {
        let pack = Pack::random(rng, batch, seq_len);
        let n = batch * seq_len;
        let mut all = rollout(rng, batch, seq_len);
        all.weights = Some(some_weights(rng, n));
        let mask = random_mask(rng, n, if holes { 0.7 } else { 1.0 });
        all.mask = Some(pack.hide(&mask));
        let padded = with_nan_under_the_mask(&all);
        let cut = |x: &Vec<f32>| pack.pack(x);
        let packed = Data {
            batch,
            seq_len: pack.tokens(),
            logp: cut(&padded.logp),
            old_logp: cut(&padded.old_logp),
            advantages: cut(&padded.advantages),
            values: padded.values.as_ref().map(cut),
            old_values: padded.old_values.as_ref().map(cut),
            returns: padded.returns.as_ref().map(cut),
            entropy: padded.entropy.as_ref().map(cut),
            ref_logp: padded.ref_logp.as_ref().map(cut),
            rollout_logp: padded.rollout_logp.as_ref().map(cut),
            weights: padded.weights.as_ref().map(cut),
            mask: holes.then(|| pack.pack(&mask)),
            offsets: Some(pack.offsets.clone()),
        };
        Self { pack, padded, packed }
    }

    /// Without values, entropy and weights.
    pub fn fewer(mut self) -> Self {
        for data in [&mut self.padded, &mut self.packed] {
            (data.values, data.entropy, data.weights) = (None, None, None);
        }
        self
    }

    /// [`Data::for_options`] of both.
    pub fn for_options(mut self, options: &PpoLossOptions) -> Self {
        for data in [&mut self.padded, &mut self.packed] {
            *data = data.for_options(options);
        }
        self
    }

    /// Checks that gradients have the same bits, and that sums are as good as the same.
    #[track_caller]
    pub fn check(&self, what: &str, padded: &Found, packed: &Found) {
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        for (a, b) in padded.1.iter().zip(&packed.1).filter(|(a, _)| !a.is_empty()) {
            assert!(bits(&self.pack.pack(a)) == bits(b), "{what}");
        }
        assert_close(what, &packed.0.to_array(), &padded.0.to_array(), 1e-6, 1e-6);
    }
}

/// Every option away from its default, one or a few at a time.
pub fn option_sets() -> Vec<(&'static str, PpoLossOptions)> {
    let default = PpoLossOptions::default();
    let all_terms = PpoLossOptions { entropy_coef: 0.03, kl_coef: 0.2, ..default };
    let kl = |estimator, output_clamp| PpoLossOptions {
        kl: KlOptions { estimator, log_ratio_clamp: Some(0.6), output_clamp },
        ..all_terms
    };
    let aggregation = |aggregation| PpoLossOptions { aggregation, ..all_terms };
    // What random log-ratios fall on both sides of; a row's ratio is near its bounds too.
    let member = |name: &str| PpoLossOptions {
        entropy_coef: 0.03,
        kl_coef: 0.2,
        ..PpoLossOptions::of(name).unwrap()
    };
    let gspo = PpoLossOptions { clip_range: 0.02, clip_range_high: Some(0.03), ..member("gspo") };
    let region = |trust_region, trust_region_low, trust_region_high| PpoLossOptions {
        trust_region,
        trust_region_low,
        trust_region_high,
        ..all_terms
    };
    vec![
        ("default", default),
        ("all terms", all_terms),
        (
            "asymmetric clip",
            PpoLossOptions { clip_range: 0.1, clip_range_high: Some(0.4), ..default },
        ),
        ("dual clip", PpoLossOptions { dual_clip: Some(1.3), ..default }),
        ("tight clamp", PpoLossOptions { log_ratio_clamp: Some(0.25), ..default }),
        ("no clamp", PpoLossOptions { log_ratio_clamp: None, ..default }),
        ("no value clip", PpoLossOptions { value_clip_range: None, value_coef: 0.7, ..default }),
        ("no value coefficient", PpoLossOptions { value_coef: 0.0, ..default }),
        (
            "ratio outside",
            PpoLossOptions { clip_fraction: ClipFractionKind::RatioOutside, ..default },
        ),
        ("kl k1", kl(KlEstimator::K1, None)),
        ("kl abs", kl(KlEstimator::Abs, None)),
        ("kl k2", kl(KlEstimator::K2, Some(0.1))),
        ("kl k3", kl(KlEstimator::K3, Some(0.1))),
        ("kl k3 straight through", kl(KlEstimator::K3StraightThrough, None)),
        ("seq-mean-token-sum", aggregation(Aggregation::SeqMeanTokenSum)),
        ("seq-mean-token-mean", aggregation(Aggregation::SeqMeanTokenMean)),
        ("seq-mean-token-sum-norm", aggregation(Aggregation::SeqMeanTokenSumNorm)),
        ("constant", aggregation(Aggregation::Constant(77.0))),
        ("given denominator", PpoLossOptions { denominator: Some(123.0), ..all_terms }),
        (
            "given number of rows",
            PpoLossOptions { denominator: Some(9.0), ..aggregation(Aggregation::SeqMeanTokenMean) },
        ),
        ("batch-mean-token-sum", aggregation(Aggregation::BatchMeanTokenSum)),
        ("batch-mean-token-mean", aggregation(Aggregation::BatchMeanTokenMean)),
        ("seq-mean-token-sum-norm-rows", aggregation(Aggregation::SeqMeanTokenSumNormRows)),
        ("no clip", PpoLossOptions { clip_range: f64::INFINITY, ..all_terms }),
        ("ratio cap", PpoLossOptions { ratio_cap: Some(1.1), dual_clip: Some(1.3), ..all_terms }),
        ("gspo", gspo),
        ("gspo-token", PpoLossOptions { ratio_gradient: RatioGradient::OwnToken, ..gspo }),
        ("gspo clamped", PpoLossOptions { log_ratio_clamp: Some(0.01), ..gspo }),
        ("rloo", member("rloo")),
        ("luspo", PpoLossOptions { clip_range: 0.02, clip_range_high: None, ..member("luspo") }),
        ("gmpo", PpoLossOptions { clip_range: 0.3, clip_range_high: Some(0.4), ..member("gmpo") }),
        (
            "gmpo by token",
            PpoLossOptions {
                clip_range: 0.3,
                ratio_gradient: RatioGradient::OwnToken,
                ..member("gmpo")
            },
        ),
        (
            "cispo",
            PpoLossOptions { clip_range: 0.3, clip_range_high: Some(0.2), ..member("cispo") },
        ),
        ("cispo below one", PpoLossOptions { clip_range_high: Some(-0.8), ..member("cispo") }),
        ("sapo", member("sapo")),
        (
            "sapo, other temperatures",
            PpoLossOptions { soft_gate_tau_pos: 2.0, soft_gate_tau_neg: 3.0, ..member("sapo") },
        ),
        // A row's sum may be far from 0.
        ("vespo", PpoLossOptions { log_ratio_clamp: Some(3.0), ..member("vespo") }),
        (
            "vespo of tokens",
            PpoLossOptions {
                ratio: RatioLevel::Token,
                gamma_k_pos: 1.0,
                gamma_lambda_pos: 1.5,
                gamma_k_neg: 2.5,
                gamma_lambda_neg: 0.5,
                ..member("vespo")
            },
        ),
        ("reinforce", member("reinforce")),
        ("dro", PpoLossOptions { entropy_coef: 0.1, ..PpoLossOptions::dro(0.7) }),
        (
            "dppo",
            PpoLossOptions { trust_region_low: 0.02, trust_region_high: 0.03, ..member("dppo") },
        ),
        ("total variation", region(TrustRegion::TotalVariation, 0.05, 0.03)),
        ("binary kl", region(TrustRegion::BinaryKl, 0.01, 0.02)),
        ("ratio region", region(TrustRegion::Ratio, 0.2, 0.3)),
        (
            "both sides",
            PpoLossOptions {
                trust_region_sides: TrustRegionSides::Both,
                ..region(TrustRegion::BinaryKl, 0.01, 0.02)
            },
        ),
        ("off policy", PpoLossOptions { off_policy_threshold: Some(0.01), ..all_terms }),
        ("off policy by rows", PpoLossOptions { off_policy_threshold: Some(-0.02), ..gspo }),
        ("kl against old", PpoLossOptions { kl_against: KlAgainst::Old, ..all_terms }),
        ("kl against rollout", PpoLossOptions { kl_against: KlAgainst::Rollout, ..all_terms }),
        ("reverse kl", PpoLossOptions { kl_gradient: KlGradient::Reverse, ..all_terms }),
        (
            "kl times ratio",
            PpoLossOptions {
                kl_ratio: KlRatio::Term,
                kl_gradient: KlGradient::Reverse,
                ..all_terms
            },
        ),
        (
            "kl gradient times ratio",
            PpoLossOptions { kl_ratio: KlRatio::Gradient, kl_ratio_cap: Some(1.1), ..all_terms },
        ),
        ("weighted kl", PpoLossOptions { kl_weighted: true, ..all_terms }),
        (
            "entropy by its own mean",
            PpoLossOptions {
                entropy_own_mean: true,
                ..aggregation(Aggregation::BatchMeanTokenMean)
            },
        ),
        ("advantages of rows", PpoLossOptions { advantages_per_row: true, ..all_terms }),
        (
            "weights of rows",
            PpoLossOptions {
                weights_per_row: true,
                kl_weighted: true,
                ..aggregation(Aggregation::SeqMeanTokenMean)
            },
        ),
        ("extremes over rows", PpoLossOptions { row_extremes: true, clip_range: 0.1, ..all_terms }),
        (
            "gspo of rows",
            PpoLossOptions {
                advantages_per_row: true,
                weights_per_row: true,
                row_extremes: true,
                entropy_own_mean: true,
                denominator: Some(77.0),
                ..gspo
            },
        ),
        (
            "gmpo of rows",
            PpoLossOptions {
                clip_range: 0.3,
                advantages_per_row: true,
                row_extremes: true,
                ..member("gmpo")
            },
        ),
    ]
}

/// Asserts closeness as a share of the largest element, and to what f32 can hold.
#[track_caller]
pub fn assert_close_scaled(what: &str, got: &[f32], want: &[f64]) {
    let largest = want.iter().fold(0.0_f64, |m, w| m.max(w.abs()));
    let abs = (ABS * largest).max(f64::from(f32::MIN_POSITIVE));
    assert_close(what, &wide(got), want, REL, abs);
}

#[track_caller]
pub fn assert_stats_close(what: &str, got: &PpoStats, want: &PpoStats, terms: f64) {
    for ((name, g), w) in PpoStats::NAMES.iter().zip(got.to_array()).zip(want.to_array()) {
        // Losses scale with the sum of the weights; the rest is of the order of 1.
        let scale = if name.contains("loss") { terms.max(1.0) } else { 1.0 };
        assert_close(&format!("{what} {name}"), &[g], &[w], 5.0 * REL, 2.0 * ABS * scale);
    }
}

/// Asserts that a backend found what the reference does.
#[track_caller]
pub fn check(what: &str, data: &Data<f32>, options: &PpoLossOptions, (stats, grads): &Found) {
    let want = run(&data.map(f64::from), options);
    let Data { batch, seq_len, mask, offsets, .. } = data;
    let weights =
        reference::weights(mask.as_deref(), *batch, *seq_len, offsets.as_deref(), options);
    let weights = weights.unwrap();
    assert_stats_close(what, stats, &want.stats, weights.iter().sum());
    let [logp, values, entropy] = grads;
    assert_close_scaled(&format!("{what} grad_logp"), logp, &want.grad_logp);
    assert_close_scaled(&format!("{what} grad_values"), values, &want.grad_values);
    assert_close_scaled(&format!("{what} grad_entropy"), entropy, &want.grad_entropy);
}

/// Options out of range, by the name of the one that is.
pub fn bad_options() -> Vec<(&'static str, PpoLossOptions)> {
    let default = PpoLossOptions::default();
    let nan = f64::NAN;
    let kl = |kl| PpoLossOptions { kl, ..default };
    let cispo = PpoLossOptions::cispo();
    vec![
        ("clip_range", PpoLossOptions { clip_range: -0.1, ..default }),
        ("clip_range", PpoLossOptions { clip_range: nan, ..default }),
        ("clip_range_high", PpoLossOptions { clip_range_high: Some(-0.1), ..default }),
        ("dual_clip", PpoLossOptions { dual_clip: Some(1.0), ..default }),
        ("log_ratio_clamp", PpoLossOptions { log_ratio_clamp: Some(0.0), ..default }),
        ("value_clip_range", PpoLossOptions { value_clip_range: Some(-1.0), ..default }),
        ("value_coef", PpoLossOptions { value_coef: f64::INFINITY, ..default }),
        ("entropy_coef", PpoLossOptions { entropy_coef: nan, ..default }),
        ("kl_coef", PpoLossOptions { kl_coef: nan, ..default }),
        ("kl.log_ratio_clamp", kl(KlOptions { log_ratio_clamp: Some(-1.0), ..default.kl })),
        ("kl.output_clamp", kl(KlOptions { output_clamp: Some(nan), ..default.kl })),
        ("denominator", PpoLossOptions { denominator: Some(0.0), ..default }),
        (
            "denominator",
            PpoLossOptions {
                aggregation: Aggregation::Constant(3.0),
                denominator: Some(3.0),
                ..default
            },
        ),
        (
            "aggregation_divisor",
            PpoLossOptions { aggregation: Aggregation::Constant(0.0), ..default },
        ),
        ("clip_range_high", PpoLossOptions { clip_range_high: Some(nan), ..default }),
        (
            "clip_range_high",
            PpoLossOptions { clip_range: 0.5, clip_range_high: Some(-0.6), ..cispo },
        ),
        ("dual_clip", PpoLossOptions { dual_clip: Some(3.0), ..cispo }),
        ("ratio_cap", PpoLossOptions { ratio_cap: Some(0.0), ..default }),
        ("ratio_cap", PpoLossOptions { ratio_cap: Some(2.0), ..cispo }),
        ("ratio", PpoLossOptions { surrogate: Surrogate::LogClip, ..default }),
        (
            "ratio",
            PpoLossOptions {
                surrogate: Surrogate::Reinforce,
                ratio: RatioLevel::SequenceSum,
                ..default
            },
        ),
        (
            "clip_fraction",
            PpoLossOptions {
                clip_fraction: ClipFractionKind::RatioOutside,
                ..PpoLossOptions::gmpo()
            },
        ),
        ("soft_gate_tau_pos", PpoLossOptions { soft_gate_tau_pos: 0.0, ..default }),
        ("soft_gate_tau_neg", PpoLossOptions { soft_gate_tau_neg: -1.0, ..default }),
        ("gamma_k_pos", PpoLossOptions { gamma_k_pos: -1.0, ..default }),
        ("gamma_lambda_pos", PpoLossOptions { gamma_lambda_pos: nan, ..default }),
        ("gamma_k_neg", PpoLossOptions { gamma_k_neg: -1.0, ..default }),
        ("gamma_lambda_neg", PpoLossOptions { gamma_lambda_neg: -1.0, ..default }),
        ("trust_region_low", PpoLossOptions { trust_region_low: -0.1, ..default }),
        ("trust_region_high", PpoLossOptions { trust_region_high: nan, ..default }),
        ("off_policy_threshold", PpoLossOptions { off_policy_threshold: Some(nan), ..default }),
        ("kl_ratio_cap", PpoLossOptions { kl_ratio_cap: Some(2.0), ..default }),
        (
            "kl_ratio_cap",
            PpoLossOptions { kl_ratio: KlRatio::Term, kl_ratio_cap: Some(0.0), ..default },
        ),
    ]
}

/// Options that need an input, and how to take that away.
pub fn missing_inputs() -> [(&'static str, PpoLossOptions, Change); 4] {
    let default = PpoLossOptions::default();
    [
        ("value_clip_range", default, |d| d.old_values = None),
        ("entropy_coef", PpoLossOptions { entropy_coef: 0.1, ..default }, |d| d.entropy = None),
        ("kl_coef", PpoLossOptions { kl_coef: 0.1, ..default }, |d| d.ref_logp = None),
        (
            "kl_coef",
            PpoLossOptions { kl_coef: 0.1, kl_against: KlAgainst::Rollout, ..default },
            |d| d.rollout_logp = None,
        ),
    ]
}

/// Takes inputs away of those that go together.
pub type Removal = fn(&mut cpu::Inputs);

/// What is taken away, after the name of the input that is missing then.
pub fn missing_partners() -> [(&'static str, Removal); 3] {
    [
        ("returns", |inputs| inputs.returns = None),
        ("values", |inputs| inputs.values = None),
        ("values", |inputs| (inputs.values, inputs.returns) = (None, None)),
    ]
}

/// What makes an input too short or too long, by its name.
pub fn wrong_lengths() -> [(&'static str, Change); 11] {
    [
        ("logp", |d| d.logp.truncate(5)),
        ("old_logp", |d| d.old_logp.truncate(5)),
        ("advantages", |d| d.advantages.push(0.0)),
        ("values", |d| d.values.as_mut().unwrap().truncate(5)),
        ("old_values", |d| d.old_values.as_mut().unwrap().truncate(5)),
        ("returns", |d| d.returns.as_mut().unwrap().truncate(5)),
        ("entropy", |d| d.entropy.as_mut().unwrap().truncate(5)),
        ("ref_logp", |d| d.ref_logp.as_mut().unwrap().truncate(5)),
        ("rollout_logp", |d| d.rollout_logp.as_mut().unwrap().truncate(5)),
        ("weights", |d| d.weights = Some(vec![1.0; 5])),
        ("mask", |d| d.mask = Some(vec![1; 5])),
    ]
}

/// The options as C has them.
#[cfg(feature = "capi")]
pub fn c_options(options: &PpoLossOptions) -> ppo_kernels::ppo_loss::capi::ppok_ppo_loss_options {
    use ppo_kernels::capi::{functions::ppok_ppo_loss_options_init, PPOK_NONE, PPOK_STATUS_OK};
    use ppo_kernels::ppo_loss::capi::*;

    let or_none = |option: Option<f64>| option.unwrap_or(PPOK_NONE);
    let mut c = std::mem::MaybeUninit::<ppok_ppo_loss_options>::uninit();
    // SAFETY: there is room, and all of it is written.
    let mut c = unsafe {
        assert_eq!(ppok_ppo_loss_options_init(c.as_mut_ptr(), size_of_val(&c)), PPOK_STATUS_OK);
        c.assume_init()
    };
    c.clip_range = options.clip_range;
    c.clip_range_high = or_none(options.clip_range_high);
    c.dual_clip = or_none(options.dual_clip);
    c.log_ratio_clamp = or_none(options.log_ratio_clamp);
    c.value_clip_range = or_none(options.value_clip_range);
    c.value_coef = options.value_coef;
    c.entropy_coef = options.entropy_coef;
    c.kl_coef = options.kl_coef;
    c.kl_log_ratio_clamp = or_none(options.kl.log_ratio_clamp);
    c.kl_output_clamp = or_none(options.kl.output_clamp);
    c.kl_estimator = options.kl.estimator as i32;
    c.aggregation = match options.aggregation {
        Aggregation::TokenMean => PPOK_PPO_LOSS_TOKEN_MEAN,
        Aggregation::SeqMeanTokenSum => PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_SUM,
        Aggregation::SeqMeanTokenMean => PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_MEAN,
        Aggregation::SeqMeanTokenSumNorm => PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_SUM_NORM,
        Aggregation::Constant(divisor) => {
            c.aggregation_divisor = divisor;
            PPOK_PPO_LOSS_CONSTANT
        }
        Aggregation::BatchMeanTokenSum => PPOK_PPO_LOSS_BATCH_MEAN_TOKEN_SUM,
        Aggregation::BatchMeanTokenMean => PPOK_PPO_LOSS_BATCH_MEAN_TOKEN_MEAN,
        Aggregation::SeqMeanTokenSumNormRows => PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_SUM_NORM_ROWS,
    };
    c.denominator = or_none(options.denominator);
    c.clip_fraction = match options.clip_fraction {
        ClipFractionKind::ClippedBranch => PPOK_PPO_LOSS_CLIPPED_BRANCH,
        ClipFractionKind::RatioOutside => PPOK_PPO_LOSS_RATIO_OUTSIDE,
    };
    c.surrogate = options.surrogate as i32;
    c.ratio = options.ratio as i32;
    c.ratio_gradient = options.ratio_gradient as i32;
    c.ratio_cap = or_none(options.ratio_cap);
    c.soft_gate_tau_pos = options.soft_gate_tau_pos;
    c.soft_gate_tau_neg = options.soft_gate_tau_neg;
    c.gamma_k_pos = options.gamma_k_pos;
    c.gamma_lambda_pos = options.gamma_lambda_pos;
    c.gamma_k_neg = options.gamma_k_neg;
    c.gamma_lambda_neg = options.gamma_lambda_neg;
    c.trust_region = options.trust_region as i32;
    c.trust_region_low = options.trust_region_low;
    c.trust_region_high = options.trust_region_high;
    c.trust_region_sides = options.trust_region_sides as i32;
    c.off_policy_threshold = or_none(options.off_policy_threshold);
    c.kl_against = options.kl_against as i32;
    c.kl_gradient = options.kl_gradient as i32;
    c.kl_ratio = options.kl_ratio as i32;
    c.kl_ratio_cap = or_none(options.kl_ratio_cap);
    c.kl_weighted = i32::from(options.kl_weighted);
    c.entropy_own_mean = i32::from(options.entropy_own_mean);
    c.advantages_per_row = i32::from(options.advantages_per_row);
    c.weights_per_row = i32::from(options.weights_per_row);
    c.row_extremes = i32::from(options.row_extremes);
    c
}
