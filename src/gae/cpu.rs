//! The fused CPU implementation. Rows are shared out to threads; a row is walked from its end in
//! chunks that stay in the L1 cache. A chunk without masked tokens and ends of
//! episodes is vectorised throughout, the recurrence included; of any other the steps are put together
//! first.
//!
//! A step's bits depend on the steps after it in its chunk and on what came of the chunks after that.
//! Chunks are counted from the start of the row. So a row's bits depend neither on other rows nor on
//! padding behind it.

use std::ops::Range;

use super::{check_missing_eos, GaeOptions, Inputs, Lengths, MaskMode, ScorePlacement};
use crate::cpu::math::LANES;
use crate::cpu::{prefetch, reduce, vectorise, RowsMut};
use crate::error::Result;
use crate::whiten::cpu::leaf_moments;
use crate::whiten::Moments;

/// Tokens of a chunk: rewards, values, advantages and returns of one, and the scratch, are 12 KiB.
const CHUNK: usize = 512;

/// How many tokens earlier in memory, and later in time, what is asked for ahead is.
const AHEAD: isize = -1024;

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
    let shaped = outputs.rewards.as_ref();
    Lengths {
        values: inputs.values.len(),
        rewards: inputs.rewards.map(<[f32]>::len),
        kl: inputs.kl.map(<[f32]>::len),
        scores: inputs.scores.map(<[f32]>::len),
        has_eos: inputs.has_eos.map(<[u8]>::len),
        mask: inputs.mask.map(<[u8]>::len),
        dones: inputs.dones.map(<[u8]>::len),
        bootstrap: inputs.bootstrap.map(<[f32]>::len),
        advantages: outputs.advantages.len(),
        returns: outputs.returns.len(),
        shaped: shaped.map(|shaped| shaped.len()),
    }
    .check(batch, seq_len)?;
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
                // From the last row, so that all goes one way through memory.
                for i in (0..count).rev() {
                    let row = Row::new(&inputs, first + i, seq_len, options);
                    let (advantages, returns) = (advantages.row(i), returns.row(i));
                    let rewards = rewards.as_mut().map(|rewards| rewards.row(i));
                    let scanned = scan(&row, &coefficients, advantages, returns, rewards);
                    moments = scanned.merge(moments);
                }
                moments
            },
        )
    };
    // Rows of nothing need no walk, however many there are.
    let batch = if seq_len == 0 { 0 } else { batch };
    Ok(reduce(batch, GRAIN / seq_len.max(1), items, leaf, Moments::merge))
}

/// The options as the recurrence uses them.
struct Coefficients {
    gamma: f32,
    /// Powers of γ λ.
    decay: Decay,
    /// Those for the returns.
    value_decay: Decay,
    minus_kl_coef: f32,
    mask_mode: MaskMode,
}

impl Coefficients {
    fn new(options: &GaeOptions) -> Self {
        Self {
            gamma: options.gamma as f32,
            decay: Decay::new(options.gamma * options.lambda),
            value_decay: Decay::new(options.gamma * options.lambda_of_returns()),
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
            Some(mask) => last_kept(mask),
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

    /// The chunk from `start` on, of a part of the row up to `end`.
    #[inline(always)]
    fn chunk(&self, start: usize, end: usize) -> Chunk<'a> {
        let at = start..(start + CHUNK).min(end);
        Chunk {
            values: &self.values[at.clone()],
            rewards: self.rewards.map(|rewards| &rewards[at.clone()]),
            kl: self.kl.map(|kl| &kl[at.clone()]),
            mask: self.mask.map(|mask| &mask[at.clone()]),
            dones: self.dones.map(|dones| &dones[at.clone()]),
            at,
        }
    }
}

/// The last unmasked token. Padding is skipped many tokens at a time.
#[inline(always)]
fn last_kept(mask: &[u8]) -> Option<usize> {
    let mut end = mask.len();
    while let Some((before, chunk)) = mask[..end].split_last_chunk::<64>() {
        if chunk.iter().fold(0, |any, m| any | m) != 0 {
            break;
        }
        end = before.len();
    }
    mask[..end].iter().rposition(|&m| m != 0)
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
        let delta = self.delta(reward, value, c);
        self.advantage = c.decay.once().mul_add(self.advantage, delta);
        self.value_advantage = c.value_decay.once().mul_add(self.value_advantage, delta);
    }

    /// Scans the δ in the scratch.
    #[inline(always)]
    fn scan(&mut self, c: &Coefficients, scratch: &mut Scratch, len: usize) {
        let Scratch { deltas, value_deltas, sums } = scratch;
        if c.value_decay.once() == c.decay.once() {
            self.advantage = c.decay.discount(self.advantage, deltas, sums, len);
            self.value_advantage = self.advantage;
        } else {
            *value_deltas = *deltas;
            self.advantage = c.decay.discount(self.advantage, deltas, sums, len);
            self.value_advantage =
                c.value_decay.discount(self.value_advantage, value_deltas, sums, len);
        }
    }

    /// δ of a step, which becomes the next one seen.
    #[inline(always)]
    fn delta(&mut self, reward: f32, value: f32, c: &Coefficients) -> f32 {
        let delta = c.gamma.mul_add(self.next_value, reward) - value;
        self.next_value = value;
        delta
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
    let mut scratch = Scratch::default();
    while end > 0 {
        let chunk = row.chunk((end - 1) / CHUNK * CHUNK, end);
        let at = chunk.at.clone();
        let (advantages, returns) = (&mut advantages[at.clone()], &mut returns[at.clone()]);
        prefetch(chunk.values, AHEAD);
        let shaped = &mut scratch.deltas.0[..at.len()];
        chunk.shape_rewards(c.minus_kl_coef, shaped);
        if let Some((place, score)) = row.score.filter(|(place, _)| at.contains(place)) {
            shaped[place - at.start] += score;
        }
        for x in [chunk.rewards, chunk.kl].into_iter().flatten() {
            prefetch(x, AHEAD);
        }
        let rewards = match &mut rewards {
            Some(rewards) => {
                let rewards = &mut rewards[at.clone()];
                rewards.copy_from_slice(shaped);
                prefetch(rewards, AHEAD);
                Some(rewards)
            }
            None => None,
        };
        if chunk.is_plain() {
            chunk.scan_plain(&mut state, c, &mut scratch, advantages, returns);
        } else {
            chunk.scan_any(&mut state, c, &mut scratch, advantages, returns, rewards);
        }
        prefetch(returns, AHEAD);
        moments = moments.merge(leaf_moments(advantages, chunk.mask));
        end = at.start;
    }
    moments
}

/// As many floats as a chunk has tokens, what comes after them, and zeros up to a multiple of
/// [`LANES`] and as many again. Aligned, since the scan reads them at four places for each it writes.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Buffer([f32; CHUNK + 2 * LANES]);

impl Default for Buffer {
    fn default() -> Self {
        Self([0.0; CHUNK + 2 * LANES])
    }
}

/// What a scan works in.
#[derive(Default)]
struct Scratch {
    /// The rewards, then δ, then the advantages.
    deltas: Buffer,
    /// The same for the returns, if they have a λ of their own.
    value_deltas: Buffer,
    sums: Buffer,
}

/// Some tokens of a row.
struct Chunk<'a> {
    /// Where in the row.
    at: Range<usize>,
    values: &'a [f32],
    rewards: Option<&'a [f32]>,
    kl: Option<&'a [f32]>,
    mask: Option<&'a [u8]>,
    dones: Option<&'a [u8]>,
}

impl Chunk<'_> {
    /// Dense rewards less the KL penalty.
    #[inline(always)]
    fn shape_rewards(&self, minus_kl_coef: f32, shaped: &mut [f32]) {
        match self.rewards {
            Some(rewards) => shaped.copy_from_slice(rewards),
            None => shaped.fill(0.0),
        }
        if let Some(kl) = self.kl {
            for (shaped, kl) in shaped.iter_mut().zip(kl) {
                *shaped = minus_kl_coef.mul_add(*kl, *shaped);
            }
        }
    }

    /// Nothing is masked, and no episode ends. Folds, since `all` would not be vectorised.
    #[inline(always)]
    fn is_plain(&self) -> bool {
        let masked = |mask: &[u8]| mask.iter().fold(false, |any, &m| any | (m == 0));
        let done = |dones: &[u8]| dones.iter().fold(0, |any, &d| any | d) != 0;
        !self.mask.is_some_and(masked) && !self.dones.is_some_and(done)
    }

    /// The scratch holds the rewards.
    #[inline(always)]
    fn scan_plain(
        &self,
        state: &mut State,
        c: &Coefficients,
        scratch: &mut Scratch,
        advantages: &mut [f32],
        returns: &mut [f32],
    ) {
        let values = self.values;
        let len = values.len();
        let deltas = &mut scratch.deltas.0[..len];
        for (delta, (next, value)) in deltas.iter_mut().zip(values[1..].iter().zip(values)) {
            *delta = c.gamma.mul_add(*next, *delta) - value;
        }
        deltas[len - 1] = c.gamma.mul_add(state.next_value, deltas[len - 1]) - values[len - 1];
        state.next_value = values[0];

        state.scan(c, scratch, len);
        prefetch(advantages, AHEAD);
        advantages.copy_from_slice(&scratch.deltas.0[..len]);
        let value_advantages = scratch.value_advantages(c);
        for ((target, value), advantage) in returns.iter_mut().zip(values).zip(value_advantages) {
            *target = advantage + value;
        }
    }

    /// The scratch holds the rewards. Sets masked rewards to 0 as well.
    ///
    /// The steps of each episode are put together, without what is no step, and scanned like a plain
    /// chunk.
    #[inline(always)]
    fn scan_any(
        &self,
        state: &mut State,
        c: &Coefficients,
        scratch: &mut Scratch,
        advantages: &mut [f32],
        returns: &mut [f32],
        rewards: Option<&mut [f32]>,
    ) {
        advantages.copy_from_slice(&scratch.deltas.0[..advantages.len()]);
        returns.copy_from_slice(self.values);
        let mut steps = Steps { deltas: [0.0; CHUNK], tokens: [0; CHUNK], first: CHUNK };
        for i in (0..self.values.len()).rev() {
            let keep = self.mask.is_none_or(|mask| mask[i] != 0);
            if keep && self.dones.is_some_and(|dones| dones[i] != 0) {
                steps.scan(state, c, scratch, advantages, returns);
                *state = State { next_value: 0.0, advantage: 0.0, value_advantage: 0.0 };
            }
            if keep {
                steps.push(i, state.delta(advantages[i], self.values[i], c));
            } else if c.mask_mode == MaskMode::Multiply {
                steps.push(i, state.delta(0.0, 0.0, c));
            }
        }
        steps.scan(state, c, scratch, advantages, returns);

        let Some(mask) = self.mask else { return };
        for x in [Some(advantages), Some(returns), rewards].into_iter().flatten() {
            for (x, keep) in x.iter_mut().zip(mask) {
                *x = if *keep == 0 { 0.0 } else { *x };
            }
        }
    }
}

impl Scratch {
    /// The advantages that the returns are made of, after a scan.
    #[inline(always)]
    fn value_advantages(&self, c: &Coefficients) -> &[f32] {
        let same = c.value_decay.once() == c.decay.once();
        &(if same { &self.deltas } else { &self.value_deltas }).0
    }
}

/// The steps of a chunk up to the end of an episode, from `first` on.
struct Steps {
    deltas: [f32; CHUNK],
    /// Where in the chunk each is.
    tokens: [u16; CHUNK],
    first: usize,
}

impl Steps {
    #[inline(always)]
    fn push(&mut self, token: usize, delta: f32) {
        self.first -= 1;
        self.deltas[self.first] = delta;
        self.tokens[self.first] = token as u16;
    }

    /// Scans the steps, writes their advantages, adds to their returns, and forgets them.
    #[inline(always)]
    fn scan(
        &mut self,
        state: &mut State,
        c: &Coefficients,
        scratch: &mut Scratch,
        advantages: &mut [f32],
        returns: &mut [f32],
    ) {
        let (deltas, tokens) = (&self.deltas[self.first..], &self.tokens[self.first..]);
        scratch.deltas.0[..deltas.len()].copy_from_slice(deltas);
        state.scan(c, scratch, deltas.len());
        let scanned = scratch.deltas.0.iter().zip(scratch.value_advantages(c));
        for (token, (advantage, value_advantage)) in tokens.iter().zip(scanned) {
            advantages[usize::from(*token)] = *advantage;
            returns[usize::from(*token)] += *value_advantage;
        }
        self.first = CHUNK;
    }
}

/// γλ and its powers.
#[derive(Clone, Copy)]
struct Decay {
    /// The first to the third.
    near: [f32; 3],
    /// The 4th, 8th and 12th.
    far: [f32; 3],
    /// The power of [`LANES`], 16.
    lanes: f32,
}

impl Decay {
    fn new(decay: f64) -> Self {
        let power = |n| decay.powi(n) as f32;
        Self { near: [1, 2, 3].map(power), far: [4, 8, 12].map(power), lanes: power(LANES as i32) }
    }

    /// γλ itself.
    #[inline(always)]
    fn once(&self) -> f32 {
        self.near[0]
    }

    /// x_i += γλ x_{i+1} over the first `len` of a chunk, from the right, where `after` comes next;
    /// returns the leftmost.
    ///
    /// One after the other, every token would wait for the one after it. So, with d = γλ, first
    /// y_i = x_i + d x_{i+1} + d² x_{i+2} + d³ x_{i+3}, then
    /// z_i = y_i + d⁴ y_{i+4} + d⁸ y_{i+8} + d¹² y_{i+12}, which is x over the next 16 tokens, then
    /// out_i = z_i + d¹⁶ out_{i+16}: 16 tokens at a time in all three.
    #[inline(always)]
    fn discount(self, after: f32, x: &mut Buffer, sums: &mut Buffer, len: usize) -> f32 {
        let (x, sums) = (&mut x.0, &mut sums.0);
        let steps = len / LANES + 1;
        let padded = steps * LANES;
        x[len..padded + LANES].fill(0.0);
        x[len] = after;
        sums[padded..][..LANES].fill(0.0);

        let [d1, d2, d3] = self.near;
        let (x0, x1) = (&x[..padded], &x[1..][..padded]);
        let (x2, x3) = (&x[2..][..padded], &x[3..][..padded]);
        for (i, sum) in sums[..padded].iter_mut().enumerate() {
            *sum = d1.mul_add(x1[i], x0[i]) + d3.mul_add(x3[i], d2 * x2[i]);
        }

        let [d4, d8, d12] = self.far;
        let mut out = [0.0; LANES];
        for (step, x) in x.as_chunks_mut::<LANES>().0[..steps].iter_mut().enumerate().rev() {
            let y = &sums[step * LANES..][..2 * LANES];
            for i in 0..LANES {
                let sum = d4.mul_add(y[i + 4], y[i]) + d12.mul_add(y[i + 12], d8 * y[i + 8]);
                out[i] = self.lanes.mul_add(out[i], sum);
            }
            *x = out;
        }
        out[0]
    }
}
