//! The options and inputs on which every backend of the kl op is tested.

use ppo_kernels::kl::{reference, Divergence, FullKlOptions, KlEstimator, KlOptions};
use rand::rngs::StdRng;
use rand::Rng;

use super::{uniform, wide};

pub const ESTIMATORS: [KlEstimator; 5] = [
    KlEstimator::K1,
    KlEstimator::Abs,
    KlEstimator::K2,
    KlEstimator::K3,
    KlEstimator::K3StraightThrough,
];

/// Every estimator with and without each clamp; the clamps bite for |d| of some units.
pub fn all_token_options() -> Vec<KlOptions> {
    let mut all = Vec::new();
    for estimator in ESTIMATORS {
        for log_ratio_clamp in [None, Some(4.0)] {
            for output_clamp in [None, Some(3.0)] {
                all.push(KlOptions { estimator, log_ratio_clamp, output_clamp });
            }
        }
    }
    all
}

pub fn all_full_options() -> Vec<FullKlOptions> {
    let of =
        |divergence, temperature| FullKlOptions { divergence, temperature, ..Default::default() };
    vec![
        of(Divergence::Forward, 1.0),
        of(Divergence::Reverse, 1.0),
        of(Divergence::Forward, 0.7),
        of(Divergence::Reverse, 2.5),
        FullKlOptions { beta: 0.1, ..of(Divergence::Jsd, 0.7) },
        FullKlOptions { beta: 0.9, ..of(Divergence::Jsd, 1.0) },
        FullKlOptions { skew: 0.3, ..of(Divergence::SkewForward, 1.0) },
        of(Divergence::SkewReverse, 2.5),
        of(Divergence::TotalVariation, 0.7),
    ]
}

/// Two rows of logits whose probabilities go down through the least floats.
pub const UNLIKELY: [[f32; 8]; 2] = [
    [0.0, -1.0, -20.0, -80.0, -88.0, -90.0, -95.0, -100.0],
    [0.0, -2.0, -19.0, -85.0, -84.0, -92.0, -90.0, -101.0],
];

/// Asserts what the gradients of the exact KL of [`UNLIKELY`] can be, as in the cases of logprob.
#[track_caller]
pub fn check_unlikely(grads: [&[f32]; 2], up: f32, twice: bool) {
    let [z, w] = UNLIKELY.map(|z| wide(&z));
    let options = FullKlOptions::default();
    let (a, b) = reference::full_kl_backward(&z, &w, 8, None, &[f64::from(up)], &options);
    let least = f64::from(f32::from_bits(1));
    let factor = if twice { 20.0 * f64::from(up) } else { 0.0 };
    for (got, want) in grads.into_iter().zip([a, b]) {
        for i in 2..8 {
            let bound = 2e-5 * want[i].abs() + least * (1.0 + factor);
            let error = (f64::from(got[i]) - want[i]).abs();
            assert!(
                error <= bound,
                "logit {}, times {up:e}: {:e}, not {:e}",
                z[i],
                got[i],
                want[i]
            );
        }
    }
}

/// A pair of logits as it is met in practice, or worse.
pub struct Pair {
    pub name: &'static str,
    pub vocab: usize,
    pub z: Vec<f32>,
    pub w: Vec<f32>,
}

/// Rows of a pair.
pub const ROWS: usize = 3;

/// Near and far, peaked and far from 0, with columns masked, and with maxima that move.
pub fn pairs_of(rng: &mut StdRng, vocab: usize) -> Vec<Pair> {
    let mut pairs = Vec::new();
    let n = ROWS * vocab;
    let mut add = |name, z: &[f32], w: &[f32]| {
        pairs.push(Pair { name, vocab, z: z.to_vec(), w: w.to_vec() });
    };
    let (flat, other) = (uniform(rng, n, 4.0), uniform(rng, n, 4.0));
    add("flat", &flat, &other);
    add("equal", &flat, &flat);
    let nudge = uniform(rng, n, 0.05);
    let near: Vec<f32> = flat.iter().zip(&nudge).map(|(z, nudge)| z + nudge).collect();
    add("near", &flat, &near);

    let mut peaked = flat.clone();
    for row in 0..ROWS {
        peaked[row * vocab + rng.random_range(0..vocab)] += 20.0;
    }
    add("peaked", &peaked, &other);

    // Rounded, so that adding the offset is exact and only our arithmetic is tested.
    let moved = |values: &[f32], by: f32| -> Vec<f32> {
        values.iter().map(|z| (z * 64.0).round() / 64.0 + by).collect()
    };
    add("offset", &moved(&flat, 1e4), &moved(&other, -2e4));

    // The policy's support within the reference's; the other way round the KL is +inf.
    let (mut z, mut w) = (flat.clone(), other.clone());
    for (i, (z, w)) in z.iter_mut().zip(&mut w).enumerate() {
        if i % vocab != vocab / 2 && rng.random_bool(0.7) {
            *z = f32::NEG_INFINITY;
            *w = if rng.random_bool(0.5) { f32::NEG_INFINITY } else { *w };
        }
    }
    add("masked", &z, &w);

    // The maxima are at opposite ends: in every block one of them moves.
    let slope = 60.0 / vocab as f32;
    let rising: Vec<f32> = (0..n).map(|i| (i % vocab) as f32 * slope).collect();
    let falling: Vec<f32> = rising.iter().map(|z| 3.0 - z * 0.5).collect();
    add("rising", &rising, &falling);
    add("falling", &falling, &rising);
    pairs
}

/// Values that a model in trouble, or a mask, may leave in a row.
const SPECIAL: [f32; 11] = [
    f32::NAN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NEG_INFINITY,
    f32::NEG_INFINITY,
    -0.0,
    1e-40,
    88.0,
    -88.0,
    30.0,
    1e4,
];

/// One row with up to three such values in one tensor or both.
pub fn special_row(rng: &mut StdRng, vocab: usize) -> (Vec<f32>, Vec<f32>) {
    let (mut z, mut w) = (uniform(rng, vocab, 5.0), uniform(rng, vocab, 5.0));
    for _ in 0..rng.random_range(0..4) {
        let special = SPECIAL[rng.random_range(0..SPECIAL.len())];
        let column = rng.random_range(0..vocab);
        match rng.random_range(0..3) {
            0 => z[column] = special,
            1 => w[column] = special,
            _ => (z[column], w[column]) = (special, special),
        }
    }
    if rng.random_bool(0.2) {
        // How some mask a token out; with f32::MIN a KL may be beyond f32.
        let column = rng.random_range(0..vocab);
        (z[column], w[column]) = (-1e9, -1e9);
    }
    (z, w)
}
