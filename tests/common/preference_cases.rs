//! The pairs, options and tolerances with which every backend of the preference losses is tested.

use ppo_kernels::preference::{
    cpu, reference, FDivergence, PreferenceLoss, PreferenceOptions, PreferenceStats,
    RewardModelOptions,
};
use ppo_kernels::tolerance;
use rand::rngs::StdRng;
use rand::Rng;

use super::pack::Pack;
use super::{assert_close, uniform, wide};

pub const REL: f64 = tolerance::PREFERENCE.tests.rel;
pub const ABS: f64 = tolerance::PREFERENCE.tests.abs;

/// What [`cpu::Inputs`] and [`reference::Inputs`] borrow, with the shape.
#[derive(Clone, Default)]
pub struct Data<T> {
    pub rows: usize,
    pub seq_len: usize,
    pub logp: Vec<T>,
    pub ref_logp: Option<Vec<T>>,
    pub ref_sums: Option<Vec<T>>,
    pub mask: Option<Vec<u8>>,
    pub lengths: Option<Vec<i64>>,
    pub weights: Option<Vec<T>>,
    pub margin: Option<Vec<T>>,
    pub labels: Option<Vec<u8>>,
    pub kl: Option<Vec<T>>,
    /// Of a pack, whose `seq_len` is that of all rows.
    pub offsets: Option<Vec<i64>>,
}

impl<T: Copy> Data<T> {
    pub fn map<U>(&self, f: impl Fn(T) -> U) -> Data<U> {
        let all = |x: &Vec<T>| x.iter().map(|&x| f(x)).collect();
        Data {
            rows: self.rows,
            seq_len: self.seq_len,
            logp: all(&self.logp),
            ref_logp: self.ref_logp.as_ref().map(all),
            ref_sums: self.ref_sums.as_ref().map(all),
            mask: self.mask.clone(),
            lengths: self.lengths.clone(),
            weights: self.weights.as_ref().map(all),
            margin: self.margin.as_ref().map(all),
            labels: self.labels.clone(),
            kl: self.kl.as_ref().map(all),
            offsets: self.offsets.clone(),
        }
    }

    /// Pairs, or in KTO rows.
    pub fn units(&self) -> usize {
        if self.labels.is_some() {
            self.rows
        } else {
            self.rows / 2
        }
    }
}

macro_rules! inputs {
    ($($number:ty, $backend:ident;)*) => {$(
        impl Data<$number> {
            pub fn inputs(&self) -> $backend::Inputs<'_> {
                $backend::Inputs {
                    ref_logp: self.ref_logp.as_deref(),
                    ref_sums: self.ref_sums.as_deref(),
                    mask: self.mask.as_deref(),
                    lengths: self.lengths.as_deref(),
                    weights: self.weights.as_deref(),
                    margin: self.margin.as_deref(),
                    labels: self.labels.as_deref(),
                    kl: self.kl.as_deref(),
                    offsets: self.offsets.as_deref(),
                    ..$backend::Inputs::new(&self.logp)
                }
            }
        }
    )*};
}

inputs! {
    f32, cpu;
    f64, reference;
}

pub fn takes_margin(loss: PreferenceLoss) -> bool {
    loss.is_sigmoid() && !loss.sorts()
}

/// Responses on the scale of real ones, with a mask of a prompt, gaps and padding, and everything that
/// the loss takes. No number is masked twice in a row of one token.
pub fn responses(
    rng: &mut StdRng,
    rows: usize,
    seq_len: usize,
    options: &PreferenceOptions,
) -> Data<f32> {
    let n = rows * seq_len;
    let loss = options.loss;
    let logp: Vec<f32> = uniform(rng, n, 1.4).into_iter().map(|x| x - 1.5).collect();
    let near = |x: &[f32], noise: Vec<f32>| x.iter().zip(noise).map(|(x, e)| x + e).collect();
    let reference: Vec<f32> = near(&logp, uniform(rng, n, 0.8));
    let units = if loss == PreferenceLoss::Kto { rows } else { rows / 2 };
    Data {
        rows,
        seq_len,
        ref_logp: (!loss.is_reference_free()).then_some(reference),
        mask: Some(padded_mask(rng, rows, seq_len)),
        weights: (!loss.sorts()).then(|| (0..units).map(|_| rng.random_range(0.2..2.0)).collect()),
        margin: takes_margin(loss).then(|| uniform(rng, units, 0.5)),
        labels: (loss == PreferenceLoss::Kto)
            .then(|| (0..rows).map(|_| u8::from(rng.random_bool(0.4))).collect()),
        kl: (loss == PreferenceLoss::Kto).then(|| vec![0.7]),
        logp,
        ..Default::default()
    }
}

/// Rows that keep from one token to nearly all, with a prompt, gaps and padding; any byte but 0 keeps.
pub fn padded_mask(rng: &mut StdRng, rows: usize, seq_len: usize) -> Vec<u8> {
    let mut mask = Vec::with_capacity(rows * seq_len);
    for _ in 0..rows {
        let end = rng.random_range(seq_len.div_ceil(3)..=seq_len);
        let start = rng.random_range(0..end.div_ceil(2));
        for t in 0..seq_len {
            let keep = t == start || (t > start && t < end && rng.random_bool(0.9));
            mask.push(if keep { rng.random_range(1..=255) } else { 0 });
        }
    }
    mask
}

/// Responses of any length with gaps, padded and as a pack.
pub struct Packed {
    pub pack: Pack,
    pub padded: Data<f32>,
    pub packed: Data<f32>,
}

impl Packed {
    pub fn new(rng: &mut StdRng, rows: usize, seq_len: usize, options: &PreferenceOptions) -> Self {
        let mut lengths: Vec<usize> = (0..rows).map(|_| rng.random_range(1..=seq_len)).collect();
        lengths[rows - 1] = seq_len;
        // A pair without a chosen response, where that leaves others.
        lengths[0] = if rows > 2 { 0 } else { 1 };
        let pack = Pack::new(&lengths, seq_len);
        let mut padded = responses(rng, rows, seq_len, options);
        for row in padded.mask.iter_mut().flat_map(|mask| mask.chunks_mut(seq_len)) {
            row[0] = 1;
        }
        padded.mask = padded.mask.map(|mask| pack.hide(&mask));
        let padded = with_nan_where_nothing_counts(&padded);
        let packed = Data {
            seq_len: pack.tokens(),
            logp: pack.pack(&padded.logp),
            ref_logp: padded.ref_logp.as_ref().map(|x| pack.pack(x)),
            mask: padded.mask.as_ref().map(|mask| pack.pack(mask)),
            offsets: Some(pack.offsets.clone()),
            ..padded.clone()
        };
        Self { pack, padded, packed }
    }

    /// Checks that what there is of rows and tokens has the same bits, and that sums are as good as the same.
    #[track_caller]
    pub fn check(&self, what: &str, padded: &Found, packed: &Found) {
        let same = |name: &str, a: &[f32], b: &[f32]| {
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert!(bits(a) == bits(b), "{what}: {name}");
        };
        same("losses", &padded.losses, &packed.losses);
        same("rewards", &padded.rewards, &packed.rewards);
        same("gradient", &self.pack.pack(&padded.grad), &packed.grad);
        assert_close(what, &packed.stats.to_array(), &padded.stats.to_array(), 1e-6, 1e-6);
    }
}

/// Log-probabilities of whole responses.
pub fn sums(rng: &mut StdRng, rows: usize, options: &PreferenceOptions) -> Data<f32> {
    let mut data = responses(rng, rows, 1, options);
    let scale = if options.loss.is_reference_free() { 1.0 } else { 20.0 };
    data.logp.iter_mut().for_each(|x| *x *= scale);
    data.ref_sums = data.ref_logp.take().map(|of| of.iter().map(|x| x * scale).collect());
    data.lengths = Some((0..rows).map(|_| rng.random_range(1..40)).collect());
    data.mask = None;
    data
}

/// `data` with NaN in every input at every masked token, and in what belongs to units of weight 0.
pub fn with_nan_where_nothing_counts(data: &Data<f32>) -> Data<f32> {
    let (mut data, units, width) = (data.clone(), data.units(), data.seq_len);
    let nothing = |t: usize| {
        let row = t / width;
        let weight = data.weights.as_ref().map_or(1.0, |weights| weights[row % units]);
        weight == 0.0 || data.mask.as_ref().is_some_and(|mask| mask[t] == 0)
    };
    let counts_not: Vec<usize> = (0..data.logp.len()).filter(|&t| nothing(t)).collect();
    for t in counts_not {
        data.logp[t] = f32::NAN;
        if let Some(reference) = &mut data.ref_logp {
            reference[t] = f32::NAN;
        }
    }
    data
}

pub fn run(data: &Data<f64>, options: &PreferenceOptions) -> reference::PreferenceFound {
    reference::preference_loss(&data.inputs(), data.rows, data.seq_len, options).unwrap()
}

/// Statistics that nobody has written.
pub fn unwritten() -> PreferenceStats {
    PreferenceStats::from_array([-7.0; PreferenceStats::LEN])
}

/// What a backend makes of some rows: statistics, losses, rewards and the gradient.
#[derive(Clone)]
pub struct Found {
    pub stats: PreferenceStats,
    pub losses: Vec<f32>,
    pub rewards: Vec<f32>,
    pub grad: Vec<f32>,
}

impl Found {
    pub fn bits(&self) -> (Vec<u64>, Vec<u32>) {
        let stats = self.stats.to_array().iter().map(|x| x.to_bits()).collect();
        let all = [&self.losses, &self.rewards, &self.grad];
        (stats, all.into_iter().flatten().map(|x| x.to_bits()).collect())
    }
}

/// Options under which a loss is defined, others at their defaults.
pub fn plain(loss: PreferenceLoss) -> PreferenceOptions {
    let label_smoothing = match loss {
        PreferenceLoss::Robust | PreferenceLoss::ExoPair => 0.1,
        _ => 0.0,
    };
    let alpha = if loss == PreferenceLoss::AlphaPo { 0.4 } else { 0.0 };
    PreferenceOptions { loss, label_smoothing, alpha, ..Default::default() }
}

/// Every loss, and every option away from its default with those that take it.
pub fn option_sets() -> Vec<(String, PreferenceOptions)> {
    let mut sets = Vec::new();
    for loss in PreferenceLoss::ALL {
        let (plain, name) = (plain(loss), format!("{loss:?}"));
        sets.push((name.clone(), plain));
        let mut more = |what: &str, options| sets.push((format!("{name} {what}"), options));
        more("average", PreferenceOptions { average_log_prob: true, beta: 0.7, ..plain });
        more("denominator", PreferenceOptions { denominator: Some(7.5), ..plain });
        let smoothing = PreferenceOptions { label_smoothing: 0.25, gamma: 0.4, ..plain };
        if takes_margin(loss) || loss.sorts() {
            more("smoothing", smoothing);
        }
        if loss == PreferenceLoss::Kto {
            let weights = (1.5, 0.7);
            let (desirable_weight, undesirable_weight) = weights;
            more("weights", PreferenceOptions { desirable_weight, undesirable_weight, ..plain });
            continue;
        }
        more("ld", PreferenceOptions { ld_alpha: Some(0.3), sft_coef: 0.2, ..plain });
        let sft = PreferenceOptions { sft_coef: 0.7, sft_denominator: Some(19.0), ..plain };
        more("sft", sft);
    }
    for loss in [
        PreferenceLoss::Sigmoid,
        PreferenceLoss::SigmoidNorm,
        PreferenceLoss::Robust,
        PreferenceLoss::Hinge,
        PreferenceLoss::Ipo,
        PreferenceLoss::ExoPair,
        PreferenceLoss::Discopop,
    ] {
        for f_divergence in
            [FDivergence::ForwardKl, FDivergence::JensenShannon, FDivergence::Alpha(0.6)]
        {
            let options = PreferenceOptions { f_divergence, ..plain(loss) };
            sets.push((format!("{loss:?} {f_divergence:?}"), options));
        }
    }
    let discopop = plain(PreferenceLoss::Discopop);
    sets.push(("tau".into(), PreferenceOptions { discopop_tau: 0.5, ..discopop }));
    sets
}

/// Asserts closeness as a share of the largest element; below the normal numbers of f32 there is 0.
#[track_caller]
pub fn assert_close_scaled(what: &str, got: &[f32], want: &[f64]) {
    let finite = want.iter().filter(|w| w.is_finite());
    let largest = finite.fold(f64::from(f32::MIN_POSITIVE) / ABS, |m, w| m.max(w.abs()));
    assert_close(what, &wide(got), want, REL, ABS * largest);
}

#[track_caller]
pub fn assert_stats_close(what: &str, got: &PreferenceStats, want: &PreferenceStats) {
    // Terms of the loss may be of opposite sign.
    let scale = want.preference_loss.abs().max(1.0);
    for ((name, g), w) in PreferenceStats::NAMES.iter().zip(got.to_array()).zip(want.to_array()) {
        let abs = ABS * if name.contains("loss") && scale.is_finite() { scale } else { 1.0 };
        assert_close(&format!("{what} {name}"), &[g], &[w], REL, abs);
    }
}

/// Asserts that a backend found what the reference does.
#[track_caller]
pub fn check(what: &str, data: &Data<f32>, options: &PreferenceOptions, found: &Found) {
    check_found(what, found, &run(&data.map(f64::from), options));
}

#[track_caller]
pub fn check_found(what: &str, found: &Found, want: &reference::PreferenceFound) {
    assert_stats_close(what, &found.stats, &want.stats);
    assert_close_scaled(&format!("{what} losses"), &found.losses, &want.losses);
    assert_close_scaled(&format!("{what} rewards"), &found.rewards, &want.rewards);
    assert_close_scaled(&format!("{what} grad"), &found.grad, &want.grad);
}

/// Options out of range, by the name of the one that is.
pub fn bad_options() -> Vec<(&'static str, PreferenceOptions)> {
    use PreferenceLoss::{AlphaPo, Aot, ExoPair, Hinge, Kto, NcaPair, Orpo, Robust, Sigmoid};
    let (of, nan) = (plain, f64::NAN);
    let smoothed = |loss, label_smoothing| PreferenceOptions { label_smoothing, ..plain(loss) };
    let diverging = |loss, f_divergence| PreferenceOptions { f_divergence, ..plain(loss) };
    vec![
        ("beta", PreferenceOptions { beta: 0.0, ..of(Sigmoid) }),
        ("beta", PreferenceOptions { beta: -0.1, ..of(Hinge) }),
        ("beta", PreferenceOptions { beta: nan, ..of(Sigmoid) }),
        ("beta", PreferenceOptions { beta: 1e-30, ..of(Sigmoid) }),
        ("label_smoothing", smoothed(Sigmoid, -0.1)),
        ("label_smoothing", smoothed(Sigmoid, 0.6)),
        ("label_smoothing", smoothed(Robust, 0.5)),
        ("label_smoothing", smoothed(ExoPair, 0.0)),
        ("label_smoothing", smoothed(Hinge, 0.1)),
        ("label_smoothing", smoothed(Orpo, 0.1)),
        ("label_smoothing", smoothed(Kto, nan)),
        ("gamma", PreferenceOptions { gamma: 0.5, ..of(NcaPair) }),
        ("gamma", PreferenceOptions { gamma: nan, ..of(Sigmoid) }),
        ("alpha", PreferenceOptions { alpha: 0.5, ..of(Sigmoid) }),
        ("alpha", PreferenceOptions { alpha: nan, ..of(AlphaPo) }),
        ("discopop_tau", PreferenceOptions { discopop_tau: 0.0, ..of(Sigmoid) }),
        ("f_alpha", diverging(Sigmoid, FDivergence::Alpha(1.0))),
        ("f_divergence", diverging(NcaPair, FDivergence::ForwardKl)),
        ("f_divergence", diverging(AlphaPo, FDivergence::JensenShannon)),
        ("f_divergence", diverging(Aot, FDivergence::Alpha(0.5))),
        ("ld_alpha", PreferenceOptions { ld_alpha: Some(1.5), ..of(Sigmoid) }),
        ("ld_alpha", PreferenceOptions { ld_alpha: Some(-0.5), ..of(Sigmoid) }),
        ("ld_alpha", PreferenceOptions { ld_alpha: Some(0.5), ..of(Kto) }),
        ("desirable_weight", PreferenceOptions { desirable_weight: -1.0, ..of(Kto) }),
        ("desirable_weight", PreferenceOptions { desirable_weight: 2.0, ..of(Sigmoid) }),
        ("undesirable_weight", PreferenceOptions { undesirable_weight: nan, ..of(Kto) }),
        ("sft_coef", PreferenceOptions { sft_coef: f64::INFINITY, ..of(Sigmoid) }),
        ("sft_coef", PreferenceOptions { sft_coef: 1.0, ..of(Kto) }),
        ("denominator", PreferenceOptions { denominator: Some(0.0), ..of(Sigmoid) }),
        ("sft_denominator", PreferenceOptions { sft_denominator: Some(-1.5), ..of(Sigmoid) }),
    ]
}

/// Something done to rows before they are used.
pub type Change = fn(&mut Data<f32>);

/// What does not go with a loss, by its name.
pub fn misplaced() -> [(&'static str, PreferenceLoss, Change); 13] {
    use PreferenceLoss::{AlphaPo, Aot, AotUnpaired, Cpo, Hinge, Kto, Orpo, Sigmoid, SimPo};
    let reference: Change = |d| d.ref_logp = Some(d.logp.clone());
    let sums: Change = |d| d.ref_sums = Some(vec![0.0; d.rows]);
    let weights: Change = |d| d.weights = Some(vec![1.0; d.rows / 2]);
    let margin: Change = |d| d.margin = Some(vec![1.0; d.rows / 2]);
    let labels: Change = |d| d.labels = Some(vec![1; d.rows]);
    [
        ("ref_logp", SimPo, reference),
        ("ref_logp", Cpo, reference),
        ("ref_sums", Orpo, sums),
        ("ref_sums", AlphaPo, sums),
        ("ref_sums", Sigmoid, sums),
        ("weights", Aot, weights),
        ("weights", AotUnpaired, weights),
        ("margin", Aot, margin),
        ("margin", Hinge, margin),
        ("labels", Sigmoid, labels),
        ("kl", Sigmoid, |d| d.kl = Some(vec![0.5])),
        ("labels", Kto, |d| d.labels = None),
        ("margin", Kto, |d| d.margin = Some(vec![1.0; d.rows])),
    ]
}

/// What makes an input too short or too long, by its name, of rows that `Sigmoid` takes.
pub fn wrong_lengths() -> [(&'static str, Change); 7] {
    [
        ("logp", |d| d.logp.truncate(5)),
        ("ref_logp", |d| d.ref_logp.as_mut().unwrap().truncate(5)),
        ("ref_sums", |d| (d.ref_logp, d.ref_sums) = (None, Some(vec![0.0; 3]))),
        ("mask", |d| d.mask = Some(vec![1; 5])),
        ("lengths", |d| d.lengths = Some(vec![1; 5])),
        ("weights", |d| d.weights = Some(vec![1.0; 3])),
        ("margin", |d| d.margin = Some(vec![1.0; 4])),
    ]
}

/// A reward model's rewards, margins and weights.
#[derive(Clone)]
pub struct Rewards {
    pub rewards: Vec<f32>,
    pub margin: Option<Vec<f32>>,
    pub weights: Option<Vec<f32>>,
}

impl Rewards {
    pub fn new(rng: &mut StdRng, pairs: usize) -> Self {
        Self {
            rewards: uniform(rng, 2 * pairs, 4.0),
            margin: Some(uniform(rng, pairs, 1.0)),
            weights: Some((0..pairs).map(|i| if i % 5 == 3 { 0.0 } else { 0.7 }).collect()),
        }
    }

    pub fn pairs(&self) -> usize {
        self.rewards.len() / 2
    }

    pub fn run(&self, options: &RewardModelOptions) -> reference::PreferenceFound {
        let rewards = wide(&self.rewards);
        let [margin, weights] = [&self.margin, &self.weights].map(|x| x.as_deref().map(wide));
        let inputs = reference::RewardModelInputs {
            margin: margin.as_deref(),
            weights: weights.as_deref(),
            ..reference::RewardModelInputs::new(&rewards)
        };
        reference::reward_model_loss(&inputs, self.pairs(), options).unwrap()
    }
}

/// Options of the reward model.
pub fn reward_model_options() -> [RewardModelOptions; 3] {
    let default = RewardModelOptions::default();
    [
        default,
        RewardModelOptions { center_coef: 0.01, ..default },
        RewardModelOptions { center_coef: 0.3, denominator: Some(11.0) },
    ]
}

/// The options as C has them.
#[cfg(feature = "capi")]
pub fn c_options(
    options: &PreferenceOptions,
) -> ppo_kernels::preference::capi::ppok_preference_options {
    use ppo_kernels::capi::{functions::ppok_preference_options_init, PPOK_NONE, PPOK_STATUS_OK};
    use ppo_kernels::preference::capi::*;

    let or_none = |option: Option<f64>| option.unwrap_or(PPOK_NONE);
    let mut c = std::mem::MaybeUninit::<ppok_preference_options>::uninit();
    // SAFETY: there is room, and all of it is written.
    let mut c = unsafe {
        assert_eq!(ppok_preference_options_init(c.as_mut_ptr(), size_of_val(&c)), PPOK_STATUS_OK);
        c.assume_init()
    };
    c.beta = options.beta;
    c.label_smoothing = options.label_smoothing;
    c.gamma = options.gamma;
    c.alpha = options.alpha;
    c.discopop_tau = options.discopop_tau;
    c.f_divergence = match options.f_divergence {
        FDivergence::ReverseKl => PPOK_F_DIVERGENCE_REVERSE_KL,
        FDivergence::ForwardKl => PPOK_F_DIVERGENCE_FORWARD_KL,
        FDivergence::JensenShannon => PPOK_F_DIVERGENCE_JENSEN_SHANNON,
        FDivergence::Alpha(alpha) => {
            c.f_alpha = alpha;
            PPOK_F_DIVERGENCE_ALPHA
        }
    };
    c.ld_alpha = or_none(options.ld_alpha);
    c.desirable_weight = options.desirable_weight;
    c.undesirable_weight = options.undesirable_weight;
    c.sft_coef = options.sft_coef;
    c.denominator = or_none(options.denominator);
    c.sft_denominator = or_none(options.sft_denominator);
    c.loss = options.loss as i32;
    c.average_log_prob = i32::from(options.average_log_prob);
    c
}
