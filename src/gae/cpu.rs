//! The fused CPU implementation. Rows are shared out to threads; a row is walked from its end in
//! chunks that stay in the L1 cache. Within a chunk all but the recurrence itself is vectorised, and
//! a chunk without masked tokens and ends of episodes takes no branch per token.
//!
//! Both paths round alike, and chunks are counted from the start of the row, so a row's bits depend
//! neither on other rows nor on padding behind it.

use super::{check_missing_eos, GaeOptions, Inputs, MaskMode, ScorePlacement, OP};
use crate::cpu::{reduce, vectorise, RowsMut};
use crate::error::{Error, Result};
use crate::whiten::cpu::leaf_moments;
use crate::whiten::Moments;

/// Tokens of a chunk: rewards, deltas, values, advantages and returns of one are 10 KiB.
const CHUNK: usize = 512;

/// Tokens a thread takes at a time: some 10 us of work, far above the cost of handing it out.
const GRAIN: usize = 16 * 1024;

/// What [`gae`] writes, each `[B, T]`, and 0 where masked.
#[derive(Debug)]
pub struct Outputs<'a> {
    /// Advantages.
    pub advantages: &'a mut [f32],
    /// Returns: the targets of the value function.
    pub returns: &'a mut [f32],
    /// The rewards after shaping, if wanted.
    pub rewards: Option<&'a mut [f32]>,
}

/// Advantages and returns of `batch` rows of `seq_len` tokens; returns the moments of the unmasked
/// advantages.
///
/// # Errors
/// If a length does not fit, an option is out of range, or [`MissingEos`](super::MissingEos) has no
/// `scores` and `has_eos` to work on. Nothing is written then.
pub fn gae(
    inputs: Inputs<f32>,
    batch: usize,
    seq_len: usize,
    options: &GaeOptions,
    outputs: Outputs,
) -> Result<Moments> {
    options.validate()?;
    check_lengths(&inputs, batch, seq_len, &outputs)?;
    let (scores, has_eos) = (inputs.scores.is_some(), inputs.has_eos.is_some());
    check_missing_eos(options.shaping.missing_eos, scores, has_eos)?;

    let coefficients = Coefficients::new(options);
    let rows = |data| RowsMut { data, width: seq_len };
    let items = (rows(outputs.advantages), rows(outputs.returns), outputs.rewards.map(rows));
    let leaf = |first: usize, count: usize, items: (RowsMut<f32>, RowsMut<f32>, _)| {
        let (mut advantages, mut returns, mut rewards): (_, _, Option<RowsMut<f32>>) = items;
        vectorise(
            #[inline(always)]
            || {
                let mut moments = Moments::default();
                for i in 0..count {
                    let row = Row::new(&inputs, first + i, seq_len, options);
                    let (advantages, returns) = (advantages.row(i), returns.row(i));
                    let rewards = rewards.as_mut().map(|rewards| rewards.row(i));
                    let scanned = scan(&row, &coefficients, advantages, returns, rewards);
                    moments = moments.merge(scanned);
                }
                moments
            },
        )
    };
    // Rows of nothing need no walk, however many there are.
    let batch = if seq_len == 0 { 0 } else { batch };
    Ok(reduce(batch, GRAIN / seq_len.max(1), items, leaf, Moments::merge))
}

fn check_lengths(
    inputs: &Inputs<f32>,
    batch: usize,
    seq_len: usize,
    outputs: &Outputs,
) -> Result<()> {
    let tokens = batch.saturating_mul(seq_len);
    let check = |arg, length: Option<usize>, expected| {
        Error::check_len(OP, arg, length.unwrap_or(expected), expected)
    };
    check("values", Some(inputs.values.len()), tokens)?;
    check("rewards", inputs.rewards.map(<[f32]>::len), tokens)?;
    check("kl", inputs.kl.map(<[f32]>::len), tokens)?;
    check("scores", inputs.scores.map(<[f32]>::len), batch)?;
    check("has_eos", inputs.has_eos.map(<[u8]>::len), batch)?;
    check("mask", inputs.mask.map(<[u8]>::len), tokens)?;
    check("dones", inputs.dones.map(<[u8]>::len), tokens)?;
    check("bootstrap", inputs.bootstrap.map(<[f32]>::len), batch)?;
    check("advantages", Some(outputs.advantages.len()), tokens)?;
    check("returns", Some(outputs.returns.len()), tokens)?;
    check("rewards (out)", outputs.rewards.as_ref().map(|rewards| rewards.len()), tokens)
}

/// The options as the recurrence uses them.
struct Coefficients {
    gamma: f32,
    /// γ λ.
    decay: f32,
    /// γ λ of the returns.
    value_decay: f32,
    minus_kl_coef: f32,
    mask_mode: MaskMode,
}

impl Coefficients {
    fn new(options: &GaeOptions) -> Self {
        Self {
            gamma: options.gamma as f32,
            decay: (options.gamma * options.lambda) as f32,
            value_decay: (options.gamma * options.lambda_of_returns()) as f32,
            minus_kl_coef: -options.shaping.kl_coef as f32,
            mask_mode: options.mask_mode,
        }
    }
}

/// One row's inputs.
struct Row<'a> {
    values: &'a [f32],
    rewards: Option<&'a [f32]>,
    kl: Option<&'a [f32]>,
    mask: Option<&'a [u8]>,
    dones: Option<&'a [u8]>,
    bootstrap: f32,
    /// The last unmasked token.
    last: Option<usize>,
    /// Where the score goes, and the score.
    score: Option<(usize, f32)>,
}

impl<'a> Row<'a> {
    #[inline(always)]
    fn new(inputs: &Inputs<'a, f32>, row: usize, seq_len: usize, options: &GaeOptions) -> Self {
        let at = row * seq_len..(row + 1) * seq_len;
        let mask = inputs.mask.map(|mask| &mask[at.clone()]);
        let last = match mask {
            None => seq_len.checked_sub(1),
            Some(mask) => mask.iter().rposition(|&m| m != 0),
        };
        let score = inputs.scores.zip(last).map(|(scores, last)| {
            let has_eos = inputs.has_eos.is_none_or(|has_eos| has_eos[row] != 0);
            let score = options.shaping.score(f64::from(scores[row]), has_eos);
            let place = match options.shaping.placement {
                ScorePlacement::LastToken => last,
                ScorePlacement::AfterLastToken => (last + 1).min(seq_len - 1),
            };
            (place, score as f32)
        });
        Self {
            values: &inputs.values[at.clone()],
            rewards: inputs.rewards.map(|rewards| &rewards[at.clone()]),
            kl: inputs.kl.filter(|_| options.shaping.kl_coef != 0.0).map(|kl| &kl[at.clone()]),
            mask,
            dones: inputs.dones.map(|dones| &dones[at]),
            bootstrap: inputs.bootstrap.map_or(0.0, |bootstrap| bootstrap[row]),
            last,
            score,
        }
    }
}

/// What a step sees of the steps after it.
struct State {
    next_value: f32,
    advantage: f32,
    /// The advantage with the λ of the returns.
    value_advantage: f32,
}

impl State {
    #[inline(always)]
    fn step(&mut self, reward: f32, value: f32, c: &Coefficients) {
        let delta = c.gamma.mul_add(self.next_value, reward) - value;
        self.advantage = c.decay.mul_add(self.advantage, delta);
        self.value_advantage = c.value_decay.mul_add(self.value_advantage, delta);
        self.next_value = value;
    }
}

/// One row, and the moments of its advantages.
#[inline(always)]
fn scan(
    row: &Row,
    c: &Coefficients,
    advantages: &mut [f32],
    returns: &mut [f32],
    mut rewards: Option<&mut [f32]>,
) -> Moments {
    let mut end = row.last.map_or(0, |last| last + 1);
    advantages[end..].fill(0.0);
    returns[end..].fill(0.0);
    if let Some(rewards) = &mut rewards {
        rewards[end..].fill(0.0);
    }
    let mut state = State { next_value: row.bootstrap, advantage: 0.0, value_advantage: 0.0 };
    if let Some((place, score)) = row.score.filter(|&(place, _)| place == end) {
        let value = row.values[place];
        state.step(score, value, c);
        returns[place] = state.value_advantage + value;
        if let Some(rewards) = &mut rewards {
            rewards[place] = score;
        }
    }

    let mut moments = Moments::default();
    let mut shaped = [0.0; CHUNK];
    while end > 0 {
        let at = (end - 1) / CHUNK * CHUNK..end;
        let shaped = &mut shaped[..at.len()];
        shape_rewards(
            row.rewards.map(|rewards| &rewards[at.clone()]),
            row.kl.map(|kl| &kl[at.clone()]),
            c.minus_kl_coef,
            shaped,
        );
        if let Some((place, score)) = row.score.filter(|(place, _)| at.contains(place)) {
            shaped[place - at.start] += score;
        }

        let chunk = Chunk {
            values: &row.values[at.clone()],
            mask: row.mask.map(|mask| &mask[at.clone()]),
            dones: row.dones.map(|dones| &dones[at.clone()]),
        };
        let (advantages, returns) = (&mut advantages[at.clone()], &mut returns[at.clone()]);
        if chunk.is_plain() {
            chunk.scan_plain(&mut state, c, shaped, advantages, returns);
        } else {
            chunk.scan_any(&mut state, c, shaped, advantages, returns);
        }
        if let Some(rewards) = &mut rewards {
            rewards[at.clone()].copy_from_slice(shaped);
        }
        moments = moments.merge(leaf_moments(advantages, chunk.mask));
        end = at.start;
    }
    moments
}

/// Dense rewards less the KL penalty.
#[inline(always)]
fn shape_rewards(
    rewards: Option<&[f32]>,
    kl: Option<&[f32]>,
    minus_kl_coef: f32,
    shaped: &mut [f32],
) {
    match rewards {
        Some(rewards) => shaped.copy_from_slice(rewards),
        None => shaped.fill(0.0),
    }
    if let Some(kl) = kl {
        for (shaped, kl) in shaped.iter_mut().zip(kl) {
            *shaped = minus_kl_coef.mul_add(*kl, *shaped);
        }
    }
}

/// Some tokens of a row.
struct Chunk<'a> {
    values: &'a [f32],
    mask: Option<&'a [u8]>,
    dones: Option<&'a [u8]>,
}

impl Chunk<'_> {
    /// Nothing is masked, and no episode ends. Folds, since `all` would not be vectorised.
    #[inline(always)]
    fn is_plain(&self) -> bool {
        let masked = |mask: &[u8]| mask.iter().fold(false, |any, &m| any | (m == 0));
        let done = |dones: &[u8]| dones.iter().fold(0, |any, &d| any | d) != 0;
        !self.mask.is_some_and(masked) && !self.dones.is_some_and(done)
    }

    #[inline(always)]
    fn scan_plain(
        &self,
        state: &mut State,
        c: &Coefficients,
        rewards: &[f32],
        advantages: &mut [f32],
        returns: &mut [f32],
    ) {
        let values = self.values;
        let mut buffer = [0.0; CHUNK];
        let deltas = &mut buffer[..values.len()];
        let last = values.len() - 1;
        for (((delta, reward), value), next) in
            deltas.iter_mut().zip(rewards).zip(values).zip(&values[1..])
        {
            *delta = c.gamma.mul_add(*next, *reward) - value;
        }
        deltas[last] = c.gamma.mul_add(state.next_value, rewards[last]) - values[last];
        state.next_value = values[0];

        state.advantage = discount(deltas, c.decay, state.advantage, advantages);
        if c.value_decay == c.decay {
            state.value_advantage = state.advantage;
            returns.copy_from_slice(advantages);
        } else {
            state.value_advantage = discount(deltas, c.value_decay, state.value_advantage, returns);
        }
        for (target, value) in returns.iter_mut().zip(values) {
            *target += value;
        }
    }

    /// Sets masked rewards to 0 as well.
    #[inline(always)]
    fn scan_any(
        &self,
        state: &mut State,
        c: &Coefficients,
        rewards: &mut [f32],
        advantages: &mut [f32],
        returns: &mut [f32],
    ) {
        for i in (0..self.values.len()).rev() {
            if self.mask.is_none_or(|mask| mask[i] != 0) {
                if self.dones.is_some_and(|dones| dones[i] != 0) {
                    *state = State { next_value: 0.0, advantage: 0.0, value_advantage: 0.0 };
                }
                state.step(rewards[i], self.values[i], c);
                advantages[i] = state.advantage;
                returns[i] = state.value_advantage + self.values[i];
            } else {
                if c.mask_mode == MaskMode::Multiply {
                    state.step(0.0, 0.0, c);
                }
                (advantages[i], returns[i], rewards[i]) = (0.0, 0.0, 0.0);
            }
        }
    }
}

/// out_i = delta_i + decay out_{i+1}, from the right; returns the leftmost.
#[inline(always)]
fn discount(deltas: &[f32], decay: f32, mut sum: f32, out: &mut [f32]) -> f32 {
    for (out, delta) in out.iter_mut().zip(deltas).rev() {
        sum = decay.mul_add(sum, *delta);
        *out = sum;
    }
    sum
}
