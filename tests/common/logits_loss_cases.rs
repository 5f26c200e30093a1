//! The batches with which every backend of the PPO loss from logits is tested, and what comes of them by
//! the references of both ops.

use ppo_kernels::cpu::Logit;
use ppo_kernels::logprob::{self, LogprobOptions};
use ppo_kernels::ppo_loss::{
    reference, Aggregation, KlGradient, KlRatio, PpoLossOptions, PpoStats, Surrogate,
};
use rand::rngs::StdRng;
use rand::Rng;

use super::pack::Pack;
use super::ppo_loss_cases::some_weights;
use super::{assert_close, random_mask, uniform, wide};

/// Sums of both ops.
const REL: f64 = 1e-5;
const ABS: f64 = 1e-5;

/// A masked token, to the reference of the log-probabilities.
const MASKED: i64 = -1;

/// A row of logits for each of `[B, T]` tokens, or of a pack's.
pub struct Case<T> {
    /// B and T; B and the tokens of all rows where there are offsets.
    pub shape: [usize; 2],
    pub vocab: usize,
    pub logits: Vec<T>,
    pub targets: Vec<i64>,
    pub old_logp: Vec<f32>,
    pub advantages: Vec<f32>,
    pub ref_logp: Option<Vec<f32>>,
    pub rollout_logp: Option<Vec<f32>>,
    pub weights: Option<Vec<f32>>,
    pub mask: Option<Vec<u8>>,
    pub offsets: Option<Vec<i64>>,
    pub logprob_options: LogprobOptions,
    pub options: PpoLossOptions,
}

/// What is written.
pub struct Found {
    pub logp: Vec<f32>,
    pub entropy: Vec<f32>,
    pub stats: PpoStats,
    pub grad_logits: Vec<f32>,
}

impl<T: Logit> Case<T> {
    /// Every aggregation in turn, the other options and what is optional with it. Where it is a pack, its
    /// rows are at most as long as the shape says.
    pub fn new(
        rng: &mut StdRng,
        [batch, seq_len]: [usize; 2],
        vocab: usize,
        number: usize,
    ) -> Self {
        let pack = Some(Pack::random(rng, batch, seq_len));
        let pack = pack.filter(|pack| number % 4 >= 2 && pack.tokens() > 0);
        let n = pack.as_ref().map_or(batch * seq_len, Pack::tokens);
        let shape = [batch, if pack.is_some() { n } else { seq_len }];
        let logits: Vec<T> =
            uniform(rng, n * vocab, 6.0).into_iter().map(|z| T::from_f32(z)).collect();
        let targets: Vec<i64> = (0..n).map(|_| rng.random_range(0..vocab as i64)).collect();
        let logprob_options = LogprobOptions { temperature: 0.8, ignore_index: None };
        let z: Vec<f64> = logits.iter().map(|z| f64::from(z.to_f32())).collect();
        let (logp, _) = logprob::reference::forward(&z, &targets, vocab, &logprob_options);
        // Ratios on both sides of the clip range.
        let near = |rng: &mut StdRng| -> Vec<f32> {
            let moves = uniform(rng, n, 0.5);
            logp.iter().zip(moves).map(|(&logp, by)| logp as f32 + by).collect()
        };
        let old_logp = near(rng);
        let ref_logp = (number % 2 == 1).then(|| near(rng));
        let rollout_logp = (number % 6 == 1).then(|| near(rng));
        let has_weights = number % 3 == 1;
        let aggregation = [
            Aggregation::TokenMean,
            Aggregation::SeqMeanTokenSum,
            Aggregation::SeqMeanTokenMean,
            Aggregation::SeqMeanTokenSumNorm,
            Aggregation::Constant(7.0),
        ][number % 5];
        let mut mask = (!number.is_multiple_of(3)).then(|| random_mask(rng, n, 0.6));
        if let Some(first) = mask.as_mut().and_then(|mask| mask.first_mut()) {
            *first = 1;
        }
        // Every surrogate in turn, of tokens and of rows.
        let members =
            ["ppo", "cispo", "sapo", "reinforce", "dppo", "gspo", "vespo", "gmpo", "gspo_token"];
        let member = PpoLossOptions::of(members[number % 9]).unwrap();
        let is_clip = member.surrogate == Surrogate::Clip;
        let options = PpoLossOptions {
            aggregation,
            kl_coef: if ref_logp.is_some() { 0.1 } else { 0.0 },
            entropy_coef: if number % 4 == 2 { 0.05 } else { 0.0 },
            dual_clip: (is_clip && number.is_multiple_of(2)).then_some(1.2),
            off_policy_threshold: (number % 11 == 3).then_some(0.05),
            trust_region_low: 0.02,
            kl_gradient: if number % 4 == 1 { KlGradient::Reverse } else { KlGradient::Own },
            kl_ratio: if number % 4 == 3 { KlRatio::Term } else { KlRatio::None },
            entropy_own_mean: number % 8 == 2,
            advantages_per_row: number % 5 == 3,
            weights_per_row: number % 4 == 1,
            ..member
        };
        let advantages = uniform(rng, if options.advantages_per_row { batch } else { n }, 2.0);
        let weights =
            has_weights.then(|| some_weights(rng, if options.weights_per_row { batch } else { n }));
        Self {
            shape,
            vocab,
            logits,
            targets,
            old_logp,
            advantages,
            ref_logp,
            rollout_logp,
            weights,
            mask,
            offsets: pack.map(|pack| pack.offsets),
            logprob_options,
            options,
        }
    }

    /// Asserts that this is what the references give.
    #[track_caller]
    pub fn check(&self, what: &str, found: &Found) {
        let Self { shape: [batch, seq_len], vocab, .. } = *self;
        let what = format!("{what} {batch}x{seq_len}x{vocab} {} {:?}", T::NAME, self.options);
        let z: Vec<f64> = self.logits.iter().map(|z| f64::from(z.to_f32())).collect();
        let keeps = |t: usize| self.mask.as_ref().is_none_or(|mask| mask[t] != 0);
        let targets: Vec<i64> = (self.targets.iter().enumerate())
            .map(|(t, &target)| if keeps(t) { target } else { MASKED })
            .collect();
        let options = LogprobOptions { ignore_index: Some(MASKED), ..self.logprob_options };
        let (logp, entropy) = logprob::reference::forward(&z, &targets, vocab, &options);
        let [ref_logp, rollout_logp, weights] =
            [&self.ref_logp, &self.rollout_logp, &self.weights].map(|x| x.as_deref().map(wide));
        let (old_logp, advantages) = (wide(&self.old_logp), wide(&self.advantages));
        let inputs = reference::Inputs {
            entropy: Some(&entropy),
            ref_logp: ref_logp.as_deref(),
            rollout_logp: rollout_logp.as_deref(),
            weights: weights.as_deref(),
            mask: self.mask.as_deref(),
            offsets: self.offsets.as_deref(),
            ..reference::Inputs::new(&logp, &old_logp, &advantages)
        };
        let want = reference::ppo_loss(&inputs, batch, seq_len, &self.options).unwrap();
        let grad = logprob::reference::backward(
            &z,
            &targets,
            vocab,
            &options,
            &want.grad_logp,
            &want.grad_entropy,
        );
        assert_close(&format!("{what}: logp"), &wide(&found.logp), &logp, REL, ABS);
        assert_close(&format!("{what}: entropy"), &wide(&found.entropy), &entropy, REL, ABS);
        let (got, want) = (found.stats.to_array(), want.stats.to_array());
        // Where a loss is a weight times logp, it has the size of that.
        let largest = logp.iter().fold(1.0, |most: f64, x| most.max(x.abs()));
        assert_close(&format!("{what}: statistics"), &got, &want, REL, ABS * largest);
        // Half a unit in the last place of the gradient's own type.
        let rel = match T::NAME {
            "bf16" => 2f64.powi(-8),
            "f16" => 2f64.powi(-11),
            _ => REL,
        };
        // The policy's gradient of a token and that of the KL may cancel, each good for some units in the
        // last place. Below its normal range f16 has no more than units of 2^-24.
        let largest = grad.iter().fold(0.0, |most: f64, g| most.max(g.abs()));
        // A weight e^x is as good as x, in which e^d is a term: an error of d is as many times as large there.
        let exponent = match self.options.surrogate {
            Surrogate::GammaWeight => largest.max(f64::MIN_POSITIVE).ln().abs().max(1.0),
            _ => 1.0,
        };
        let abs = 1e-5 * largest * exponent + if T::NAME == "f16" { 1e-7 } else { 0.0 };
        assert_close(&format!("{what}: gradient"), &wide(&found.grad_logits), &grad, rel, abs);
    }
}

/// Asserts that nothing is looked at of masked tokens; the case.
pub fn masked(rng: &mut StdRng, number: usize, run: impl Fn(&Case<f32>) -> Found) -> Case<f32> {
    let mut case = Case::<f32>::new(rng, [2, 3], 300, number);
    let vocab = case.vocab;
    case.mask = Some(vec![1, 0, 1, 1, 1, 0]);
    for masked in [1, 5] {
        case.logits[masked * vocab..][..vocab].fill(f32::NAN);
        case.old_logp[masked] = f32::NAN;
        case.targets[masked] = 1 << 40;
    }
    case.check("masked", &run(&case));
    case
}

/// The shapes: rows of a warp's length, of a block's and of several parts, aligned and not; the last of
/// f32 are longer than a block's shared memory.
pub const SHAPES: [([usize; 2], usize); 8] = [
    ([3, 5], 7),
    ([2, 3], 1),
    ([4, 9], 257),
    ([3, 3], 4096),
    ([1, 6], 5003),
    ([2, 2], 50_257),
    ([3, 1], 70_001),
    ([2, 2], 70_016),
];
