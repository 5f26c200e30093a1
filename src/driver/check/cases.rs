//! The inputs of every op, and both sides of the comparison.

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::{Op, Pass, Row};
use crate::advantages::{
    self, optimal_token_baseline, outcome_advantages, AdvantageInputs, AdvantageOptions, Baseline,
    Scale, Singleton, Sizes, TokenBaselineInputs, TokenBaselineOptions, TokenStep,
};
use crate::correction::{
    self, correction, CorrectionInputs, CorrectionOptions, CorrectionStats, Outside, Rejection,
    RejectionLevel, RejectionMetric, WeightLevel,
};
use crate::gae::{
    self, gae, GaeInputs, GaeOptions, MaskMode, MissingEos, RewardShaping, ScoreOrder,
    ScorePlacement, ScoreScale,
};
use crate::kl::{self, full_kl, token_kl, Divergence, FullKlOptions, KlEstimator, KlOptions};
use crate::linear::{self, linear_logprobs, LinearInputs, LinearOptions};
use crate::logprob::{self, logprobs, logprobs_and_entropy, LogprobOptions};
use crate::moments::{Moments, MomentsTensor};
use crate::ppo_loss::{
    self, ppo_loss, Aggregation, ClipFractionKind, KlAgainst, KlGradient, KlRatio, PpoLossInputs,
    PpoLossOptions, PpoStats,
};
use crate::preference::{
    self, preference_loss, reward_model_loss, FDivergence, PreferenceInputs, PreferenceLoss,
    PreferenceOptions, RewardModelOptions, RewardModelTensors,
};
use crate::whiten::{self, masked_whiten, masked_whiten_with, EpsPlacement, WhitenOptions};

const LOGITS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Rows and vocabulary: one column, fewer columns than a vector, and more than a block of any kernel.
const LOGIT_SHAPES: [(usize, usize); 5] = [(3, 1), (9, 7), (16, 1000), (4, 50257), (2, 151_936)];

/// Rows, hidden size and vocabulary.
const HEAD_SHAPES: [(usize, usize, usize); 3] = [(3, 1, 1), (9, 24, 1000), (17, 64, 5003)];

/// Rows and tokens: one token, rows shorter and longer than a block of any kernel.
const TOKEN_SHAPES: [(usize, usize); 4] = [(1, 2), (3, 17), (8, 700), (5, 2051)];

/// Rows and the most rows of a group: one group, groups of any size, and more rows than a block sorts.
const GROUP_SHAPES: [(usize, usize); 4] = [(8, 8), (64, 8), (500, 40), (1500, 16)];

/// How often the options of an op without an option list of its own are drawn anew.
const DRAWS: usize = 4;

const IGNORE: i64 = -100;

/// How near an input may be to where a gradient jumps.
const MARGIN: f64 = 1e-3;

/// Every op, pass and dtype.
pub(super) fn all(device: &Device, seed: u64, bound_scale: f64) -> Result<Vec<Row>> {
    let mut draw = Draw { rng: StdRng::seed_from_u64(seed), device };
    let mut rows = Vec::new();
    let mut check = |op, dtype, case: &dyn Fn(&mut Draw, DType, &mut Pair) -> Result<()>| {
        let row = |pass| Row::new(op, pass, dtype, bound_scale);
        let mut pair = Pair { forward: row(Pass::Forward), backward: row(Pass::Backward) };
        case(&mut draw, dtype, &mut pair)
            .with_context(|| format!("{} in {}", op.name(), dtype.as_str()))?;
        // Not every op has a backward.
        rows.extend([pair.forward, pair.backward].into_iter().filter(|row| row.elements > 0));
        anyhow::Ok(())
    };
    for dtype in LOGITS {
        check(Op::Logprob, dtype, &check_logprob)?;
    }
    if device.is_cpu() {
        for dtype in LOGITS {
            check(Op::Linear, dtype, &check_linear)?;
        }
    }
    check(Op::TokenKl, DType::F32, &check_token_kl)?;
    for dtype in LOGITS {
        check(Op::FullKl, dtype, &check_full_kl)?;
    }
    check(Op::Gae, DType::F32, &check_gae)?;
    check(Op::Advantages, DType::F32, &check_advantages)?;
    check(Op::TokenBaseline, DType::F32, &check_token_baseline)?;
    check(Op::Whiten, DType::F32, &check_whiten)?;
    check(Op::PpoLoss, DType::F32, &check_ppo_loss)?;
    check(Op::Preference, DType::F32, &check_preference)?;
    check(Op::Correction, DType::F32, &check_correction)?;
    Ok(rows)
}

/// The two rows of an op and dtype.
struct Pair {
    forward: Row,
    backward: Row,
}

/// Where inputs come from, and the device they go to.
struct Draw<'a> {
    rng: StdRng,
    device: &'a Device,
}

impl Draw<'_> {
    /// Evenly from -spread .. spread.
    fn f32(&mut self, spread: f32) -> f32 {
        spread * self.rng.random_range(-1.0..1.0f32)
    }

    fn values(&mut self, n: usize, center: f32, spread: f32) -> Vec<f32> {
        (0..n).map(|_| center + self.f32(spread)).collect()
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.rng.random_range(0..choices.len())]
    }

    fn flags(&mut self, n: usize, share: f64) -> Vec<u8> {
        (0..n).map(|_| u8::from(self.rng.random_bool(share))).collect()
    }

    /// Padding and gaps; the first token of every row is kept, so that every result is defined.
    fn mask(&mut self, [rows, width]: [usize; 2]) -> Vec<u8> {
        let mut mask = Vec::with_capacity(rows * width);
        for _ in 0..rows {
            let end = self.rng.random_range(width.div_ceil(2)..=width);
            let keep = |t| t == 0 || (t < end && self.rng.random_bool(0.9));
            mask.extend((0..width).map(keep).map(u8::from));
        }
        mask
    }

    /// Where rows begin in a pack of as many tokens, or nothing, which leaves the batch as it is; the shape of
    /// one value a token, and what is the row length then.
    fn packed(&mut self, [batch, seq_len]: [usize; 2]) -> (Option<Vec<i64>>, Vec<usize>, usize) {
        let tokens = batch * seq_len;
        if self.rng.random_bool(0.5) {
            return (None, vec![batch, seq_len], seq_len);
        }
        let mut offsets = vec![0, tokens as i64];
        offsets.extend((1..batch).map(|_| self.rng.random_range(0..=tokens as i64)));
        offsets.sort_unstable();
        (Some(offsets), vec![tokens], tokens)
    }

    /// Values that are NaN where the mask is 0.
    fn masked(&mut self, mask: &[u8], center: f32, spread: f32) -> Vec<f32> {
        let values = self.values(mask.len(), center, spread);
        values.iter().zip(mask).map(|(&v, &m)| if m == 0 { f32::NAN } else { v }).collect()
    }

    /// Peaked rows with some -inf, the same columns in all rows: tokens that may not be sampled.
    fn logits(&mut self, rows: usize, vocab: usize) -> Vec<f32> {
        let offset = self.pick(&[0.0, -30.0, 20.0]);
        let mut logits = self.values(rows * vocab, offset, 5.0);
        for row in logits.chunks_mut(vocab) {
            for _ in 0..3 {
                row[self.rng.random_range(0..vocab)] = offset + self.rng.random_range(8.0..20.0);
            }
            // Column 0 is never one of them.
            row.iter_mut().skip(1).step_by(11).for_each(|z| *z = f32::NEG_INFINITY);
        }
        logits
    }

    fn tensor(&self, values: &[f32], shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::from_slice(values, shape, self.device)?)
    }

    fn var(&self, values: &[f32], shape: &[usize]) -> Result<Var> {
        Ok(Var::from_tensor(&self.tensor(values, shape)?)?)
    }

    fn bytes(&self, values: &[u8], shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::from_slice(values, shape, self.device)?)
    }

    fn offsets(&self, offsets: Option<&[i64]>) -> Result<Option<Tensor>> {
        let tensor = |offsets: &[i64]| Tensor::from_slice(offsets, offsets.len(), self.device);
        Ok(offsets.map(tensor).transpose()?)
    }
}

/// A tensor's elements, whatever its dtype, which f64 holds exactly.
fn wide(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

fn gradient(grads: &GradStore, var: &Var) -> Result<Vec<f64>> {
    wide(grads.get(var).context("an argument got no gradient")?)
}

fn check_logprob(draw: &mut Draw, dtype: DType, pair: &mut Pair) -> Result<()> {
    for (rows, vocab) in LOGIT_SHAPES {
        let options =
            LogprobOptions { temperature: draw.pick(&[1.0, 0.7, 1.6]), ignore_index: Some(IGNORE) };
        let logits = draw.logits(rows, vocab);
        let logits = Var::from_tensor(&draw.tensor(&logits, &[rows, vocab])?.to_dtype(dtype)?)?;
        let mut targets: Vec<i64> =
            (0..rows).map(|_| draw.rng.random_range(0..vocab) as i64).collect();
        targets[1] = IGNORE;
        let ids = Tensor::new(targets.as_slice(), draw.device)?;
        let ups = [draw.values(rows, 0.0, 1.0), draw.values(rows, 0.0, 1.0)];
        let [up_logp, up_entropy] = &ups;

        let z = wide(&logits)?;
        let (want_logp, want_entropy) = logprob::reference::forward(&z, &targets, vocab, &options);
        let alone = logprobs(&logits, &ids, &options)?;
        let (logp, entropy) = logprobs_and_entropy(&logits, &ids, &options)?;
        pair.forward.compare(&wide(&alone)?, &want_logp)?;
        pair.forward.compare(&wide(&logp)?, &want_logp)?;
        pair.forward.compare(&wide(&entropy)?, &want_entropy)?;

        let zeros = vec![0.0; rows];
        let want =
            logprob::reference::backward(&z, &targets, vocab, &options, &widen(up_logp), &zeros);
        let weighted =
            |output: &Tensor, up: &[f32]| anyhow::Ok(output.mul(&draw.tensor(up, &[rows])?)?);
        // A log-probability of -inf times its weight is -inf or NaN, but the gradient is defined.
        let grads = weighted(&alone, up_logp)?.sum_all()?.backward()?;
        pair.backward.compare(&gradient(&grads, &logits)?, &want)?;

        let want = logprob::reference::backward(
            &z,
            &targets,
            vocab,
            &options,
            &widen(up_logp),
            &widen(up_entropy),
        );
        let both = (weighted(&logp, up_logp)? + weighted(&entropy, up_entropy)?)?;
        let grads = both.sum_all()?.backward()?;
        pair.backward.compare(&gradient(&grads, &logits)?, &want)?;
    }
    Ok(())
}

fn check_linear(draw: &mut Draw, dtype: DType, pair: &mut Pair) -> Result<()> {
    for (rows, hidden_size, vocab) in HEAD_SHAPES {
        let options = LinearOptions {
            temperature: draw.pick(&[1.0, 0.7, 1.6]),
            ignore_index: Some(IGNORE),
            logit_scale: draw.pick(&[1.0, 0.3]),
            softcap: draw.pick(&[None, Some(3.0)]),
            tile_bytes: draw.pick(&[0, 32 << 20]),
        };
        let device = draw.device;
        let var = |values: &[f32], shape: &[usize]| {
            Var::from_tensor(&Tensor::from_slice(values, shape, device)?.to_dtype(dtype)?)
        };
        let spread = (hidden_size as f32).powf(-0.5);
        let values = [
            draw.values(rows * hidden_size, 0.0, 3.0),
            draw.values(vocab * hidden_size, 0.0, 3.0 * spread),
            draw.values(vocab, 0.0, 1.0),
        ];
        let hidden = var(&values[0], &[rows, hidden_size])?;
        let weight = var(&values[1], &[vocab, hidden_size])?;
        let bias = var(&values[2], &[vocab])?;
        let mut targets: Vec<i64> =
            (0..rows).map(|_| draw.rng.random_range(0..vocab) as i64).collect();
        targets[1] = IGNORE;
        let ids = Tensor::new(targets.as_slice(), draw.device)?;
        let ups = [draw.values(rows, 0.0, 1.0), draw.values(rows, 0.0, 1.0)];

        let (h, w, b) = (wide(&hidden)?, wide(&weight)?, wide(&bias)?);
        let inputs = linear::reference::Arguments {
            hidden: &h,
            weight: &w,
            bias: Some(&b),
            temperatures: None,
            targets: &targets,
        };
        let sizes = linear::Sizes { rows, hidden_size, vocab };
        let (want_logp, want_entropy) = linear::reference::forward(inputs, sizes, &options);
        let given = LinearInputs::new(&hidden, &weight, &ids);
        let output = linear_logprobs(&LinearInputs { bias: Some(&bias), ..given }, &options, true)?;
        let entropy = output.entropy.context("it was asked for")?;
        pair.forward.compare(&wide(&output.logp)?, &want_logp)?;
        pair.forward.compare(&wide(&entropy)?, &want_entropy)?;

        let [a, b] = ups.each_ref().map(|up| widen(up));
        let want = linear::reference::backward(inputs, sizes, &options, &a, &b);
        let weighted =
            |output: &Tensor, up: &[f32]| anyhow::Ok(output.mul(&draw.tensor(up, &[rows])?)?);
        let both = (weighted(&output.logp, &ups[0])? + weighted(&entropy, &ups[1])?)?;
        let grads = both.sum_all()?.backward()?;
        pair.backward.compare(&gradient(&grads, &hidden)?, &want.hidden)?;
        pair.backward.compare(&gradient(&grads, &weight)?, &want.weight)?;
        pair.backward.compare(&gradient(&grads, &bias)?, &want.bias)?;
    }
    Ok(())
}

fn check_token_kl(draw: &mut Draw, _: DType, pair: &mut Pair) -> Result<()> {
    for estimator in [
        KlEstimator::K1,
        KlEstimator::Abs,
        KlEstimator::K2,
        KlEstimator::K3,
        KlEstimator::K3StraightThrough,
    ] {
        for (log_ratio_clamp, output_clamp) in [(None, None), (Some(2.0), Some(1.5))] {
            let options = KlOptions { estimator, log_ratio_clamp, output_clamp };
            for (batch, seq_len) in TOKEN_SHAPES {
                token_kl_case(draw, pair, &options, [batch, seq_len])?;
            }
        }
    }
    Ok(())
}

fn token_kl_case(
    draw: &mut Draw,
    pair: &mut Pair,
    options: &KlOptions,
    shape: [usize; 2],
) -> Result<()> {
    let free = KlOptions { estimator: options.estimator, ..KlOptions::default() };
    let off_kinks = |d: f64| {
        let value = kl::reference::token(d, &free).0;
        is_clear(d, options.log_ratio_clamp) && is_clear(value, options.output_clamp)
    };
    let mask = draw.mask(shape);
    let logp = draw.masked(&mask, -4.0, 4.0);
    let ref_logp = logp.iter().map(|&logp| {
        draw.until(|draw| logp - draw.f32(3.0), |r| off_kinks(f64::from(logp) - f64::from(r)))
    });
    let ref_logp: Vec<f32> = ref_logp.collect();
    let up = draw.values(logp.len(), 0.0, 1.0);

    let (x, y) = (draw.var(&logp, &shape)?, draw.var(&ref_logp, &shape)?);
    let computed = token_kl(&x, &y, Some(&draw.bytes(&mask, &shape)?), options)?;
    let grads = computed.mul(&draw.tensor(&up, &shape)?)?.sum_all()?.backward()?;

    let (logp, ref_logp, mask) = (widen(&logp), widen(&ref_logp), Some(mask.as_slice()));
    let want = kl::reference::token_kl(&logp, &ref_logp, mask, options);
    pair.forward.compare(&wide(&computed)?, &want)?;
    let want = kl::reference::token_kl_backward(&logp, &ref_logp, mask, &widen(&up), options);
    pair.backward.compare(&gradient(&grads, &x)?, &want.0)?;
    pair.backward.compare(&gradient(&grads, &y)?, &want.1)
}

fn check_full_kl(draw: &mut Draw, dtype: DType, pair: &mut Pair) -> Result<()> {
    for (rows, vocab) in LOGIT_SHAPES {
        for divergence in Divergence::ALL {
            let options = FullKlOptions {
                divergence,
                temperature: draw.pick(&[1.0, 0.7, 1.6]),
                beta: draw.pick(&[0.1, 0.5, 0.9]),
                skew: draw.pick(&[0.1, 0.5]),
            };
            let shape = [rows, vocab];
            let mut z = draw.logits(rows, vocab);
            let mut w: Vec<f32> = z.iter().map(|&z| z + draw.f32(1.0)).collect();
            // The last row is masked out and may hold anything.
            let mut mask = vec![1; rows];
            mask[rows - 1] = 0;
            z[(rows - 1) * vocab..].fill(f32::NAN);
            w[(rows - 1) * vocab..].fill(f32::NAN);
            let up = draw.values(rows, 0.0, 1.0);

            let var = |values: &[f32]| {
                anyhow::Ok(Var::from_tensor(&draw.tensor(values, &shape)?.to_dtype(dtype)?)?)
            };
            let (x, y) = (var(&z)?, var(&w)?);
            let computed = full_kl(&x, &y, Some(&draw.bytes(&mask, &[rows])?), &options)?;
            let grads = computed.mul(&draw.tensor(&up, &[rows])?)?.sum_all()?.backward()?;

            let (z, w, mask, up) = (wide(&x)?, wide(&y)?, Some(mask.as_slice()), widen(&up));
            let want = kl::reference::full_kl(&z, &w, vocab, mask, &options);
            pair.forward.compare(&wide(&computed)?, &want)?;
            let want = kl::reference::full_kl_backward(&z, &w, vocab, mask, &up, &options);
            pair.backward.compare(&gradient(&grads, &x)?, &want.0)?;
            pair.backward.compare(&gradient(&grads, &y)?, &want.1)?;
        }
    }
    Ok(())
}

fn check_gae(draw: &mut Draw, _: DType, pair: &mut Pair) -> Result<()> {
    for [batch, seq_len] in TOKEN_SHAPES.map(|(batch, seq_len)| [batch, seq_len]) {
        for _ in 0..DRAWS {
            let options = draw.gae_options();
            let mask = draw.mask([batch, seq_len]);
            let (offsets, shape, seq_len) = draw.packed([batch, seq_len]);
            let values = match options.shaping.score_placement {
                ScorePlacement::LastToken => draw.masked(&mask, 0.0, 1.0),
                // The value behind the last token is read.
                ScorePlacement::AfterLastToken => draw.values(mask.len(), 0.0, 1.0),
            };
            let rewards = draw.masked(&mask, 0.0, 0.5);
            let kl = draw.masked(&mask, 0.1, 1.0);
            let (scores, bootstrap) = (draw.values(batch, 0.0, 3.0), draw.values(batch, 0.0, 1.0));
            let has_eos = draw.flags(batch, 0.5);
            let dones = draw.flags(mask.len(), 0.02);
            let lambdas = draw.values(batch, 0.5, 0.5);
            let own_lambdas = draw.pick(&[false, true]);
            let offsets_tensor = draw.offsets(offsets.as_deref())?;
            let lambdas_tensor = draw.tensor(&lambdas, &[batch])?;
            let lambdas = widen(&lambdas);

            let (values, rewards) = (draw.tensor(&values, &shape)?, draw.tensor(&rewards, &shape)?);
            let kl = draw.tensor(&kl, &shape)?;
            let (scores, bootstrap) =
                (draw.tensor(&scores, &[batch])?, draw.tensor(&bootstrap, &[batch])?);
            let inputs = GaeInputs {
                values: &values,
                rewards: Some(&rewards),
                kl: Some(&kl),
                scores: Some(&scores),
                has_eos: Some(&draw.bytes(&has_eos, &[batch])?),
                mask: Some(&draw.bytes(&mask, &shape)?),
                dones: Some(&draw.bytes(&dones, &shape)?),
                bootstrap: Some(&bootstrap),
                offsets: offsets_tensor.as_ref(),
                lambda_per_row: own_lambdas.then_some(&lambdas_tensor),
            };
            let computed = gae(&inputs, &options)?;

            let (rewards, kl) = (wide(&rewards)?, wide(&kl)?);
            let (scores, bootstrap) = (wide(&scores)?, wide(&bootstrap)?);
            let inputs = gae::reference::Inputs {
                values: &wide(&values)?,
                rewards: Some(&rewards),
                kl: Some(&kl),
                scores: Some(&scores),
                has_eos: Some(&has_eos),
                mask: Some(&mask),
                dones: Some(&dones),
                bootstrap: Some(&bootstrap),
                offsets: offsets.as_deref(),
                lambda_per_row: own_lambdas.then_some(&lambdas[..]),
            };
            let want = gae::reference::gae(&inputs, batch, seq_len, &options);
            let row = &mut pair.forward;
            row.compare(&wide(&computed.advantages)?, &want.advantages)?;
            row.compare(&wide(&computed.returns)?, &want.returns)?;
            row.compare(&wide(&computed.rewards)?, &want.rewards)?;
            let numbers = |m: Moments| [m.count, m.mean, m.variance(false).sqrt()];
            row.compare(&numbers(computed.moments.to_host()?), &numbers(want.moments))?;
        }
    }
    Ok(())
}

fn check_advantages(draw: &mut Draw, _: DType, pair: &mut Pair) -> Result<()> {
    for (batch, most) in GROUP_SHAPES {
        for _ in 0..3 * DRAWS {
            let (options, seq_len) = (draw.advantage_options(), draw.pick(&[1, 7, 60]));
            let by_size = draw.rng.random_bool(0.5) && batch.is_multiple_of(most);
            let group_size = if by_size { most } else { 0 };
            // Of two rows or more each.
            let count = (batch / most).max(1) as i64;
            let groups: Vec<i64> = (0..batch as i64).map(|row| row % count * 7919 - 40).collect();
            let mut scores = draw.values(batch, 0.3, 2.0);
            for score in &mut scores {
                *score = match draw.rng.random_range(0..8) {
                    0 => f32::NAN,
                    1 => 0.0,
                    2 => 0.1,
                    _ => *score,
                };
            }
            let lengths = draw.flags(batch, 0.9);
            let lengths: Vec<f32> = lengths.iter().map(|&x| f32::from(x) * 30.0).collect();
            let score_baselines = draw.values(batch, 0.0, 0.5);
            let mask = draw.mask([batch, seq_len]);
            let (offsets, shape, seq_len) = draw.packed([batch, seq_len]);
            let offsets_tensor = draw.offsets(offsets.as_deref())?;
            let sizes = Sizes { batch, seq_len, group_size };

            let tensor = |x: &[f32]| draw.tensor(x, &[batch]);
            let (x, l, b) = (tensor(&scores)?, tensor(&lengths)?, tensor(&score_baselines)?);
            let ids = Tensor::from_slice(&groups, batch, draw.device)?;
            let inputs = AdvantageInputs {
                groups: (!by_size).then_some(&ids),
                lengths: Some(&l),
                score_baselines: Some(&b),
                mask: Some(&draw.bytes(&mask, &shape)?),
                offsets: offsets_tensor.as_ref(),
                ..AdvantageInputs::new(&x)
            };
            let computed = outcome_advantages(&inputs, sizes.group_size, &options)?;

            let [scores, lengths, score_baselines] =
                [scores, lengths, score_baselines].map(|x| widen(&x));
            let inputs = advantages::reference::Inputs {
                scores: &scores,
                groups: (!by_size).then_some(&groups),
                lengths: Some(&lengths),
                score_baselines: Some(&score_baselines),
                mask: Some(&mask),
                offsets: offsets.as_deref(),
            };
            let want = advantages::reference::outcome_advantages(&inputs, sizes, &options);
            let row = &mut pair.forward;
            row.compare(&wide(&computed.advantages)?, &want.advantages)?;
            let tokens = computed.token_advantages.expect("there is a mask");
            row.compare(&wide(&tokens)?, &want.token_advantages)?;
            let stats = computed.stats.to_host()?;
            let numbers: [f64; 3] = bytemuck::cast(stats);
            row.compare(&numbers, &bytemuck::cast::<_, [f64; 3]>(want.stats))?;
        }
    }
    Ok(())
}

fn check_token_baseline(draw: &mut Draw, _: DType, pair: &mut Pair) -> Result<()> {
    // What the reference takes goes with the square of the longer ones.
    for &padded in &TOKEN_SHAPES[..3] {
        for _ in 0..DRAWS {
            token_baseline_case(draw, &mut pair.forward, padded.into())?;
        }
    }
    Ok(())
}

fn token_baseline_case(
    draw: &mut Draw,
    row: &mut Row,
    padded @ [batch, _]: [usize; 2],
) -> Result<()> {
    let mask = draw.mask(padded);
    let groups: Vec<i64> = (0..batch).map(|_| draw.rng.random_range(-1..1)).collect();
    let (offsets, shape, seq_len) = draw.packed(padded);
    let n = mask.len();
    let (rewards, weights) = (draw.values(n, 0.0, 1.0), draw.values(n, 1.0, 1.0));
    let logp = draw.values(n, -2.0, 2.0);
    // Of the token's own probability and more, up to 1.
    let log_sum = |&logp: &f32| {
        let own = (2.0 * logp).exp();
        (own + draw.rng.random_range(0.0..1.0) * (1.0 - own)).ln()
    };
    let log_sums: Vec<f32> = logp.iter().map(log_sum).collect();
    let options = TokenBaselineOptions {
        eps: draw.pick(&[1e-8, 0.1]),
        step: draw.pick(&[TokenStep::Column, TokenStep::Unmasked]),
        lone_tail: draw.rng.random_bool(0.5),
    };
    let tensor = |x: &[f32]| draw.tensor(x, &shape);
    let (r, l, s, w) = (tensor(&rewards)?, tensor(&logp)?, tensor(&log_sums)?, tensor(&weights)?);
    let offsets_tensor = draw.offsets(offsets.as_deref())?;
    let inputs = TokenBaselineInputs {
        groups: Some(&Tensor::from_slice(&groups, batch, draw.device)?),
        weights: Some(&w),
        mask: Some(&draw.bytes(&mask, &shape)?),
        offsets: offsets_tensor.as_ref(),
        ..TokenBaselineInputs::new(&r, &l, &s)
    };
    let computed = optimal_token_baseline(&inputs, 0, &options)?;

    let [rewards, logp, log_sums, weights] = [rewards, logp, log_sums, weights].map(|x| widen(&x));
    let inputs = advantages::reference::TokenInputs {
        groups: Some(&groups),
        weights: Some(&weights),
        mask: Some(&mask),
        offsets: offsets.as_deref(),
        ..advantages::reference::TokenInputs::new(&rewards, &logp, &log_sums)
    };
    let sizes = Sizes { batch, seq_len, group_size: 0 };
    let want = advantages::reference::optimal_token_baseline(&inputs, sizes, &options);
    for (computed, want) in computed.iter().zip(&want) {
        row.compare(&wide(computed)?, want)?;
    }
    Ok(())
}

fn check_whiten(draw: &mut Draw, _: DType, pair: &mut Pair) -> Result<()> {
    for [batch, seq_len] in TOKEN_SHAPES.map(|(batch, seq_len)| [batch, seq_len]) {
        for eps_placement in [EpsPlacement::Variance, EpsPlacement::Std] {
            for (unbiased, shift_mean) in [(true, true), (true, false), (false, true)] {
                let options =
                    WhitenOptions { eps_placement, unbiased, shift_mean, ..Default::default() };
                whiten_case(draw, pair, &options, [batch, seq_len])?;
            }
        }
    }
    Ok(())
}

fn whiten_case(
    draw: &mut Draw,
    pair: &mut Pair,
    options: &WhitenOptions,
    shape: [usize; 2],
) -> Result<()> {
    let mut mask = draw.mask(shape);
    mask[1] = 1; // a variance needs two
    let mut x = draw.masked(&mask, 0.3, 2.0);
    // And two that are apart, for a divisor that is not 0.
    (x[0], x[1]) = (-1.0, 1.5);
    let up = draw.values(x.len(), 0.0, 1.0);
    let given = Moments { count: 100.0, mean: 0.2, m2: 150.0 };

    let var = draw.var(&x, &shape)?;
    let (bytes, weights) = (draw.bytes(&mask, &shape)?, draw.tensor(&up, &shape)?);
    let own = masked_whiten(&var, Some(&bytes), options)?;
    let given_tensor = MomentsTensor::new(&given, draw.device)?;
    let with = masked_whiten_with(&var, Some(&bytes), &given_tensor, options)?;

    let (x, mask, up) = (widen(&x), Some(mask.as_slice()), widen(&up));
    pair.forward.compare(&wide(&own)?, &whiten::reference::masked_whiten(&x, mask, options))?;
    let want = whiten::reference::masked_whiten_with(&x, mask, &given, options);
    pair.forward.compare(&wide(&with)?, &want)?;

    let grads = own.mul(&weights)?.sum_all()?.backward()?;
    let want = whiten::reference::masked_whiten_backward(&x, mask, &up, options);
    pair.backward.compare(&gradient(&grads, &var)?, &want)?;
    let grads = with.mul(&weights)?.sum_all()?.backward()?;
    let want = whiten::reference::masked_whiten_with_backward(mask, &given, &up, options);
    pair.backward.compare(&gradient(&grads, &var)?, &want)
}

fn check_correction(draw: &mut Draw, _: DType, pair: &mut Pair) -> Result<()> {
    for padded @ [batch, _] in TOKEN_SHAPES.map(|(batch, seq_len)| [batch, seq_len]) {
        for _ in 0..4 * DRAWS {
            let options = draw.correction_options();
            let mask = draw.mask(padded);
            let (offsets, shape, seq_len) = draw.packed(padded);
            let offsets_tensor = draw.offsets(offsets.as_deref())?;
            let rows = (offsets.as_deref(), [batch, seq_len]);
            let (old_logp, rollout_logp) = draw.engines(&mask, rows, &options)?;
            let (x, y) = (draw.tensor(&old_logp, &shape)?, draw.tensor(&rollout_logp, &shape)?);
            let bytes = draw.bytes(&mask, &shape)?;
            let inputs = CorrectionInputs {
                mask: Some(&bytes),
                offsets: offsets_tensor.as_ref(),
                ..CorrectionInputs::new(&x, &y)
            };
            let computed = correction(&inputs, &options)?;

            let want = correct(&old_logp, &rollout_logp, &mask, rows, &options)?;
            let row = &mut pair.forward;
            row.compare(&wide(&computed.weights)?, &want.weights)?;
            let kept: Vec<f64> = want.kept.iter().map(|&m| f64::from(m)).collect();
            row.compare(&wide(&computed.kept)?, &kept)?;
            // Sums as means, of magnitude 1 whatever they are over.
            let means = |stats: CorrectionStats| {
                let tokens = stats.tokens.max(1.0);
                let mut array = stats.to_array();
                array[..CorrectionStats::LEN - 5].iter_mut().for_each(|sum| *sum /= tokens);
                array
            };
            row.compare(&means(computed.stats.to_host()?), &means(want.stats))?;
        }
    }
    Ok(())
}

/// The offsets of a pack, rows, and tokens of a row or of all.
type Rows<'a> = (Option<&'a [i64]>, [usize; 2]);

/// The reference's results for f32 inputs.
fn correct(
    old_logp: &[f32],
    rollout_logp: &[f32],
    mask: &[u8],
    (offsets, [batch, seq_len]): Rows,
    options: &CorrectionOptions,
) -> Result<correction::reference::Output> {
    let (old_logp, rollout_logp) = (widen(old_logp), widen(rollout_logp));
    let inputs = correction::reference::Inputs {
        mask: Some(mask),
        offsets,
        ..correction::reference::Inputs::new(&old_logp, &rollout_logp)
    };
    Ok(correction::reference::correction(&inputs, batch, seq_len, options)?)
}

fn check_ppo_loss(draw: &mut Draw, _: DType, pair: &mut Pair) -> Result<()> {
    let aggregations = [
        Aggregation::TokenMean,
        Aggregation::SeqMeanTokenSum,
        Aggregation::SeqMeanTokenMean,
        Aggregation::SeqMeanTokenSumNorm,
        Aggregation::Constant(100.0),
        Aggregation::BatchMeanTokenSum,
        Aggregation::BatchMeanTokenMean,
        Aggregation::SeqMeanTokenSumNormRows,
    ];
    for shape in TOKEN_SHAPES.map(|(batch, seq_len)| [batch, seq_len]) {
        for aggregation in aggregations {
            let options = draw.ppo_loss_options(aggregation);
            ppo_loss_case(draw, pair, &options, shape)?;
        }
        for name in PpoLossOptions::NAMES {
            let options = draw.named_loss(name);
            ppo_loss_case(draw, pair, &options, shape)?;
        }
    }
    Ok(())
}

fn ppo_loss_case(
    draw: &mut Draw,
    pair: &mut Pair,
    options: &PpoLossOptions,
    padded @ [batch, _]: [usize; 2],
) -> Result<()> {
    let mask = draw.mask(padded);
    let (offsets, shape, seq_len) = draw.packed(padded);
    let offsets_tensor = draw.offsets(offsets.as_deref())?;
    let logp = draw.masked(&mask, -4.0, 3.0);
    let values = draw.masked(&mask, 0.0, 1.0);
    let advantages = draw.masked(&mask, 0.0, 2.0);
    let entropy = draw.masked(&mask, 2.0, 2.0);
    let ref_logp: Vec<f32> = logp.iter().map(|&logp| logp - draw.f32(1.0)).collect();
    let old_logp: Vec<f32> = logp.iter().map(|&logp| draw.old_logp(logp, options)).collect();
    let rollout_logp: Vec<f32> = old_logp.iter().map(|&logp| logp - draw.f32(0.2)).collect();
    let given = draw.pick(&[false, true]);
    let token_weights: Vec<f32> = mask.iter().map(|_| (draw.f32(1.0) + 0.8).max(0.0)).collect();
    let (old_values, returns): (Vec<f32>, Vec<f32>) =
        values.iter().map(|&value| draw.value_targets(value, options)).unzip();

    let var = |values: &[f32]| draw.var(values, &shape);
    let (x, v, h) = (var(&logp)?, var(&values)?, var(&entropy)?);
    let (old, a) = (draw.tensor(&old_logp, &shape)?, draw.tensor(&advantages, &shape)?);
    let (old_v, r) = (draw.tensor(&old_values, &shape)?, draw.tensor(&returns, &shape)?);
    let w = draw.tensor(&token_weights, &shape)?;
    let inputs = PpoLossInputs {
        values: Some(&v),
        old_values: Some(&old_v),
        returns: Some(&r),
        entropy: Some(&h),
        ref_logp: Some(&draw.tensor(&ref_logp, &shape)?),
        rollout_logp: Some(&draw.tensor(&rollout_logp, &shape)?),
        weights: Some(&w).filter(|_| given),
        mask: Some(&draw.bytes(&mask, &shape)?),
        offsets: offsets_tensor.as_ref(),
        ..PpoLossInputs::new(&x, &old, &a)
    };
    let computed = ppo_loss(&inputs, options)?;

    let [logp, old_logp, advantages] = [logp, old_logp, advantages].map(|v| widen(&v));
    let [values, old_values, returns] = [values, old_values, returns].map(|v| widen(&v));
    let [entropy, ref_logp] = [entropy, ref_logp].map(|v| widen(&v));
    let [rollout_logp, token_weights] = [rollout_logp, token_weights].map(|v| widen(&v));
    let inputs = ppo_loss::reference::Inputs {
        logp: &logp,
        old_logp: &old_logp,
        advantages: &advantages,
        values: Some(&values),
        old_values: Some(&old_values),
        returns: Some(&returns),
        entropy: Some(&entropy),
        ref_logp: Some(&ref_logp),
        rollout_logp: Some(&rollout_logp),
        weights: Some(&token_weights[..]).filter(|_| given),
        mask: Some(&mask),
        offsets: offsets.as_deref(),
    };
    let want = ppo_loss::reference::ppo_loss(&inputs, batch, seq_len, options)?;
    let weights =
        ppo_loss::reference::weights(Some(&mask), batch, seq_len, offsets.as_deref(), options)?;

    // The aggregated terms as weighted means, of magnitude 1 whatever the weights add up to.
    let total: f64 = weights.iter().sum();
    let means = |stats: &PpoStats| {
        let mut array = stats.to_array();
        array[..3].iter_mut().for_each(|aggregated| *aggregated /= total);
        array
    };
    pair.forward.compare(&means(&computed.stats.to_host()?), &means(&want.stats))?;
    let loss = f64::from(computed.loss.to_scalar::<f32>()?);
    pair.forward.compare(&[loss / total], &[want.stats.loss / total])?;

    // Likewise the gradients: an upstream gradient that makes the largest weight 1.
    let scale = weights.iter().copied().fold(0.0, f64::max).recip();
    let grads = (&computed.loss * scale)?.backward()?;
    let scaled = |gradient: &[f64]| gradient.iter().map(|g| g * scale).collect::<Vec<_>>();
    pair.backward.compare(&gradient(&grads, &x)?, &scaled(&want.grad_logp))?;
    pair.backward.compare(&gradient(&grads, &v)?, &scaled(&want.grad_values))?;
    if options.entropy_coef != 0.0 {
        pair.backward.compare(&gradient(&grads, &h)?, &scaled(&want.grad_entropy))?;
    }
    Ok(())
}

fn check_preference(draw: &mut Draw, _: DType, pair: &mut Pair) -> Result<()> {
    for loss in PreferenceLoss::ALL {
        for (pairs, seq_len) in TOKEN_SHAPES {
            preference_case(draw, pair, loss, [pairs, seq_len])
                .with_context(|| format!("{loss:?} of {pairs} pairs of {seq_len} tokens"))?;
        }
    }
    for pairs in [1, 17, 700] {
        reward_model_case(draw, pair, pairs)?;
    }
    Ok(())
}

fn preference_case(
    draw: &mut Draw,
    pair: &mut Pair,
    loss: PreferenceLoss,
    [pairs, seq_len]: [usize; 2],
) -> Result<()> {
    let options = draw.preference_options(loss);
    let kto = loss == PreferenceLoss::Kto;
    let (rows, units) = (2 * pairs, if kto { 2 * pairs } else { pairs });
    let shape = [rows, seq_len];
    let mask = draw.mask(shape);
    let (free, sorts) = (loss.is_reference_free(), loss.sorts());
    let takes_margin = loss.is_sigmoid() && !sorts;
    // Of weight 0, and NaN then, every seventh.
    let weights: Vec<f32> =
        (0..units).map(|i| if i % 7 == 3 { 0.0 } else { 1.0 + draw.f32(0.5) }).collect();
    let margin = draw.values(units, 0.0, 0.3);
    let labels = draw.flags(rows, 0.5);
    let (logp, ref_logp, want) = loop {
        let logp = draw.masked(&mask, -1.6, 1.5);
        let ref_logp: Vec<f32> = logp.iter().map(|x| x + draw.f32(0.8)).collect();
        let (wide_logp, wide_ref) = (widen(&logp), widen(&ref_logp));
        let (wide_weights, wide_margin) = (widen(&weights), widen(&margin));
        let inputs = preference::reference::Inputs {
            ref_logp: (!free).then_some(&wide_ref),
            mask: Some(&mask),
            weights: (!sorts).then_some(&wide_weights),
            margin: takes_margin.then_some(&wide_margin),
            labels: kto.then_some(&labels),
            kl: kto.then_some(&[0.25]),
            ..preference::reference::Inputs::new(&wide_logp)
        };
        let want = preference::reference::preference_loss(&inputs, rows, seq_len, &options)?;
        let kink = |i: usize| want.rewards[i] - want.rewards[i + pairs] - 1.0;
        let near = |i: usize| !is_clear(kink(i), Some(0.0));
        if loss != PreferenceLoss::Hinge || !(0..pairs).any(near) {
            break (logp, ref_logp, want);
        }
    };
    let var = draw.var(&logp, &shape)?;
    let tensors = [draw.tensor(&ref_logp, &shape)?, draw.tensor(&weights, &[units])?];
    let (margin, kl) = (draw.tensor(&margin, &[units])?, draw.tensor(&[0.25], &[1])?);
    let (mask, labels) = (draw.bytes(&mask, &shape)?, draw.bytes(&labels, &[rows])?);
    let inputs = PreferenceInputs {
        ref_logp: (!free).then_some(&tensors[0]),
        mask: Some(&mask),
        weights: (!sorts).then_some(&tensors[1]),
        margin: takes_margin.then_some(&margin),
        labels: kto.then_some(&labels),
        kl: kto.then_some(&kl),
        ..PreferenceInputs::new(&var)
    };
    let computed = preference_loss(&inputs, &options)?;
    pair.forward.compare(&computed.stats.to_host()?.to_array(), &want.stats.to_array())?;
    pair.forward.compare(&wide(&computed.losses)?, &want.losses)?;
    pair.forward.compare(&wide(&computed.rewards)?, &want.rewards)?;
    // The terms of a derivative are of the order of β over D, and over the length of an average.
    let averages = options.average_log_prob || loss.always_averages();
    let length = if averages { seq_len as f64 } else { 1.0 };
    let terms = options.beta / (options.denominator.unwrap_or(units as f64) * length);
    compare_scaled(pair, &computed.loss, &var, &want.grad, terms)
}

fn reward_model_case(draw: &mut Draw, pair: &mut Pair, pairs: usize) -> Result<()> {
    let options = RewardModelOptions {
        center_coef: draw.pick(&[0.0, 0.01]),
        denominator: draw.pick(&[None, Some(9.0)]),
    };
    let (rewards, margin) = (draw.values(2 * pairs, 0.0, 4.0), draw.values(pairs, 0.5, 0.5));
    let var = draw.var(&rewards, &[2, pairs])?;
    let tensor = draw.tensor(&margin, &[pairs])?;
    let inputs = RewardModelTensors { margin: Some(&tensor), ..RewardModelTensors::new(&var) };
    let computed = reward_model_loss(&inputs, &options)?;
    let (rewards, margin) = (widen(&rewards), widen(&margin));
    let inputs = preference::reference::RewardModelInputs {
        margin: Some(&margin),
        ..preference::reference::RewardModelInputs::new(&rewards)
    };
    let want = preference::reference::reward_model_loss(&inputs, pairs, &options)?;
    pair.forward.compare(&computed.stats.to_host()?.to_array(), &want.stats.to_array())?;
    pair.forward.compare(&wide(&computed.losses)?, &want.losses)?;
    let terms = options.denominator.unwrap_or(pairs as f64).recip();
    compare_scaled(pair, &computed.loss, &var, &want.grad, terms)
}

/// Compares a gradient for an upstream one that makes its largest element 1, or where that is what is left
/// of larger `terms` of opposite sign, those.
fn compare_scaled(
    pair: &mut Pair,
    loss: &Tensor,
    var: &Var,
    want: &[f64],
    terms: f64,
) -> Result<()> {
    let scale = want.iter().fold(terms, |max, g| max.max(g.abs())).recip();
    let grads = (loss * scale)?.backward()?;
    let scaled: Vec<f64> = want.iter().map(|g| g * scale).collect();
    pair.backward.compare(&gradient(&grads, var)?, &scaled)
}

/// Whether |x| is not near the limit.
fn is_clear(x: f64, limit: Option<f64>) -> bool {
    limit.is_none_or(|limit| (x.abs() - limit).abs() > MARGIN)
}

/// Options, and values that stay off the kinks that they make.
impl Draw<'_> {
    /// The first of a sequence of values that is right; a NaN is, since it is masked.
    fn until(&mut self, next: impl Fn(&mut Self) -> f32, right: impl Fn(f32) -> bool) -> f32 {
        loop {
            let value = next(self);
            if value.is_nan() || right(value) {
                return value;
            }
        }
    }

    fn gae_options(&mut self) -> GaeOptions {
        GaeOptions {
            gamma: self.pick(&[1.0, 0.99]),
            lambda: self.pick(&[0.95, 0.5, 1.0]),
            value_lambda: self.pick(&[None, Some(0.9)]),
            mask_mode: self.pick(&[MaskMode::Carry, MaskMode::Multiply]),
            shaping: RewardShaping {
                kl_coef: 0.05,
                score_placement: self
                    .pick(&[ScorePlacement::LastToken, ScorePlacement::AfterLastToken]),
                score_scale: self.pick(&[None, Some(ScoreScale { mean: 0.3, std: 1.7 })]),
                score_min: self.pick(&[f64::NEG_INFINITY, -1.0]),
                score_max: self.pick(&[f64::INFINITY, 1.5]),
                score_order: self.pick(&[ScoreOrder::ScaleThenClip, ScoreOrder::ClipThenScale]),
                missing_eos: self.pick(&[
                    MissingEos::Keep,
                    MissingEos::Subtract(1.0),
                    MissingEos::Replace(-1.0),
                ]),
            },
        }
    }

    fn advantage_options(&mut self) -> AdvantageOptions {
        use {Baseline as B, Scale as S};
        let baselines =
            [B::None, B::Group, B::LeaveOneOut, B::Batch, B::LengthWeighted, B::RunnerUp];
        let scales = [S::None, S::Group, S::LeaveOneOut, S::Batch, S::Mean, S::Nonzero];
        AdvantageOptions {
            eps: self.pick(&[1e-4, 1e-6, 0.0]),
            score_min: self.pick(&[f64::NEG_INFINITY, -1.0]),
            score_max: self.pick(&[f64::INFINITY, 1.0]),
            baseline: self.pick(&baselines),
            scale: self.pick(&scales),
            singleton: self.pick(&[Singleton::Zero, Singleton::Keep]),
            eps_placement: self.pick(&[EpsPlacement::Variance, EpsPlacement::Std]),
            unbiased: self.rng.random_bool(0.5),
        }
    }

    fn correction_options(&mut self) -> CorrectionOptions {
        use {RejectionLevel as L, RejectionMetric as M};
        let mut rejection = || {
            // Bounds that a share of tokens and rows is beyond.
            let metric = self.pick(&[
                M::None,
                M::Ratio,
                M::K2,
                M::K3,
                M::ReverseK3,
                M::BinaryKl,
                M::BinaryKlMax,
                M::TotalVariation,
            ]);
            let level = self.pick(&[L::Token, L::SequenceMean, L::SequenceSum, L::SequenceMax]);
            let (low, high) = match metric {
                M::None => return Rejection::NONE,
                M::Ratio => (Some(0.8), Some(1.3)),
                _ => (None, Some(self.pick(&[0.03, 0.1, 2.0]))),
            };
            Rejection { metric, level, low, high }
        };
        let (rejection, second_rejection) = (rejection(), rejection());
        CorrectionOptions {
            level: self.pick(&[
                WeightLevel::Token,
                WeightLevel::SequenceMean,
                WeightLevel::SequenceSum,
                WeightLevel::None,
            ]),
            log_ratio_clamp: self.pick(&[Some(20.0), Some(0.4)]),
            low: self.pick(&[None, Some(0.7)]),
            high: self.pick(&[None, Some(1.4)]),
            outside: self.pick(&[Outside::Truncate, Outside::Zero]),
            normalise: self.pick(&[false, true]),
            rejection,
            second_rejection,
        }
    }

    /// Log-probabilities of two engines, such that no metric is near a bound: NaN where masked, and in some
    /// places of the second.
    fn engines(
        &mut self,
        mask: &[u8],
        rows: Rows,
        options: &CorrectionOptions,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let near = |scale: f64| {
            let of = |bound: Option<f64>| bound.map(|bound| bound * scale);
            let rule = |r: Rejection| Rejection { low: of(r.low), high: of(r.high), ..r };
            CorrectionOptions {
                low: of(options.low),
                high: of(options.high),
                // What is truncated shows as well.
                outside: Outside::Zero,
                rejection: rule(options.rejection),
                second_rejection: rule(options.second_rejection),
                ..*options
            }
        };
        let mut old_logp = self.masked(mask, -2.5, 2.0);
        let rollout_logp: Vec<f32> = old_logp
            .iter()
            .map(|&logp| match self.rng.random_range(0..50) {
                0 => f32::NAN,
                1 => logp - self.f32(3.0),
                _ => logp - self.f32(0.5),
            })
            .map(|logp: f32| if logp > 0.0 { -0.01 } else { logp })
            .collect();
        loop {
            let [a, b] = [1.0 - MARGIN, 1.0 + MARGIN]
                .map(|scale| correct(&old_logp, &rollout_logp, mask, rows, &near(scale)));
            let (a, b) = (a?, b?);
            let differs = |&t: &usize| {
                a.kept[t] != b.kept[t] || (a.weights[t] == 0.0) != (b.weights[t] == 0.0)
            };
            let near: Vec<usize> = (0..mask.len()).filter(differs).collect();
            if near.is_empty() {
                return Ok((old_logp, rollout_logp));
            }
            for t in near {
                old_logp[t] -= self.rng.random_range(0.0..0.02f32);
            }
        }
    }

    fn ppo_loss_options(&mut self, aggregation: Aggregation) -> PpoLossOptions {
        let estimator = self.pick(&[KlEstimator::K1, KlEstimator::K2, KlEstimator::K3]);
        PpoLossOptions {
            clip_range_high: self.pick(&[None, Some(0.3)]),
            dual_clip: self.pick(&[None, Some(2.0)]),
            log_ratio_clamp: self.pick(&[None, Some(1.2), Some(20.0)]),
            value_clip_range: self.pick(&[None, Some(0.2)]),
            value_coef: 0.5,
            entropy_coef: self.pick(&[0.0, 0.01]),
            kl_coef: self.pick(&[0.0, 0.1]),
            kl: KlOptions { estimator, ..KlOptions::default() },
            clip_fraction: self
                .pick(&[ClipFractionKind::ClippedBranch, ClipFractionKind::RatioOutside]),
            aggregation,
            ..PpoLossOptions::default()
        }
    }

    fn named_loss(&mut self, name: &str) -> PpoLossOptions {
        PpoLossOptions {
            entropy_coef: self.pick(&[0.0, 0.01]),
            kl_coef: self.pick(&[0.0, 0.1]),
            kl_against: self.pick(&[KlAgainst::Reference, KlAgainst::Old, KlAgainst::Rollout]),
            kl_gradient: self.pick(&[KlGradient::Own, KlGradient::Reverse]),
            kl_ratio: self.pick(&[KlRatio::None, KlRatio::Gradient, KlRatio::Term]),
            kl_weighted: self.pick(&[false, true]),
            entropy_own_mean: self.pick(&[false, true]),
            row_extremes: self.pick(&[false, true]),
            // A row's sum may be far from 0, where f32 leaves its exponential fewer digits.
            log_ratio_clamp: Some(3.0),
            ..PpoLossOptions::of(name).expect("a name of its own")
        }
    }

    fn preference_options(&mut self, loss: PreferenceLoss) -> PreferenceOptions {
        let mut options = PreferenceOptions {
            loss,
            beta: self.pick(&[0.1, 0.5]),
            average_log_prob: self.pick(&[false, true]),
            denominator: self.pick(&[None, Some(9.0)]),
            ..PreferenceOptions::default()
        };
        match loss {
            PreferenceLoss::Robust | PreferenceLoss::ExoPair => options.label_smoothing = 0.1,
            PreferenceLoss::AlphaPo => options.alpha = 0.4,
            PreferenceLoss::Kto => options.undesirable_weight = 1.5,
            _ => {}
        }
        if loss.is_sigmoid() {
            options.label_smoothing = self.pick(&[0.0, 0.2]);
            options.gamma = self.pick(&[0.0, 0.5]);
        }
        if loss == PreferenceLoss::Sigmoid {
            options.f_divergence = self.pick(&[FDivergence::ReverseKl, FDivergence::JensenShannon]);
        }
        if loss != PreferenceLoss::Kto {
            options.ld_alpha = self.pick(&[None, Some(0.5)]);
            options.sft_coef = self.pick(&[0.0, 0.3]);
        }
        options
    }

    /// Such that the ratio is not near a bound.
    fn old_logp(&mut self, logp: f32, options: &PpoLossOptions) -> f32 {
        let high = 1.0 + options.clip_range_high.unwrap_or(options.clip_range);
        let bounds = [Some(1.0 - options.clip_range), Some(high), options.dual_clip];
        self.until(
            |draw| logp - draw.f32(1.5),
            |old_logp| {
                let d = f64::from(logp) - f64::from(old_logp);
                is_clear(d, options.log_ratio_clamp)
                    && bounds.iter().all(|&bound| is_clear(d.exp(), bound))
            },
        )
    }

    /// An old value and a return for which it is clear whether the clipped error is the larger one.
    fn value_targets(&mut self, value: f32, options: &PpoLossOptions) -> (f32, f32) {
        let Some(range) = options.value_clip_range else {
            return (value + self.f32(0.5), value + self.f32(1.0));
        };
        let moved = |old: f32| f64::from(value) - f64::from(old);
        let old = self.until(|draw| value + draw.f32(0.5), |old| is_clear(moved(old), Some(range)));
        let clipped = f64::from(old) + moved(old).clamp(-range, range);
        let error = |value: f64, target: f32| (value - f64::from(target)).abs();
        let target = self.until(
            |draw| value + draw.f32(1.0),
            |target| {
                let (free, bound) = (error(f64::from(value), target), error(clipped, target));
                moved(old).abs() < range || (free - bound).abs() > MARGIN
            },
        );
        (old, target)
    }
}
