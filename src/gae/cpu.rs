//! The fused CPU implementation. Rows are shared out to threads by their tokens; a row is walked from its end in
//! chunks. A chunk without masked tokens and ends of episodes is taken a vector of tokens at a time,
//! from inputs to outputs in registers, the recurrence included; of any other the steps are put
//! together first.
//!
//! A step's bits depend on the steps after it in its chunk and on what came of the chunks after that.
//! Chunks are counted from the start of the row. So a row's bits depend neither on other rows nor on
//! padding behind it.

use std::ops::Range;

use super::{check_missing_eos, GaeOptions, MaskMode, ScorePlacement, OP};
use crate::cpu::math::LANES;
use crate::cpu::store::{CACHED, LINES};
use crate::cpu::{
    gather, nonzero, prefetch, reduce_by, spread, vectorise, with_stores, Buffer, Stores, Tiles,
};
use crate::error::{Error, Result};
use crate::memory::{in_space, Lengths};
use crate::moments::cpu::{leaf_moments, LaneMoments, LEAF};
use crate::moments::Moments;
use crate::pack::{BatchShape, RangesMut, RowRanges};

/// Tokens of a chunk: rewards, values, advantages and returns of one are 8 KiB.
const CHUNK: usize = 512;
const _: () = assert!(CHUNK <= LEAF, "the moments of a chunk are taken at once");

/// How many tokens earlier in memory, and later in time, what is asked for ahead is.
const AHEAD: isize = -1024;

/// Tokens a thread takes at a time: some 10 us of work, far above the cost of handing it out.
const GRAIN: usize = 16 * 1024;

in_space!(Host: Inputs, Outputs);

/// Advantages and returns of `batch` rows of `seq_len` tokens, or with offsets, of `seq_len` tokens in all.
///
/// # Errors
/// If a length does not fit, an option or a row's λ is out of range, the offsets are not those of a
/// [pack](crate::pack), or [`MissingEos`](super::MissingEos) has no `scores` and `has_eos` to work on.
/// Nothing is written then.
pub fn gae(
    inputs: Inputs,
    batch: usize,
    seq_len: usize,
    options: &GaeOptions,
    mut outputs: Outputs,
) -> Result<()> {
    options.validate()?;
    let shape = BatchShape::new(batch, seq_len, inputs.offsets.is_some());
    inputs.try_map(shape, &mut Lengths(OP))?;
    outputs.try_map(shape, &mut Lengths(OP))?;
    check_missing_eos(options.shaping.missing_eos, &inputs)?;
    let ranges = RowRanges::new(OP, seq_len, inputs.offsets)?;
    check_lambdas(inputs.lambda_per_row)?;

    let coefficients = Coefficients::new(options);
    let job = Job { inputs, ranges, options, coefficients };
    let rows = |data| RangesMut::new(data, ranges);
    let bytes =
        size_of_val(outputs.advantages) * if outputs.shaped_rewards.is_some() { 3 } else { 2 };
    let stores = Stores::of(bytes);
    let items = (rows(outputs.advantages), rows(outputs.returns), outputs.shaped_rewards.map(rows));
    let leaf = |first, count, items| with_stores!(stores, STORES => job.scan_rows::<STORES>(first, count, items));
    // Rows of nothing need no walk, however many there are.
    let batch = if seq_len == 0 { 0 } else { batch };
    let cut = move |first, count| ranges.middle(first, count, GRAIN);
    let moments = reduce_by(batch, cut, items, leaf, Moments::merge);
    if let Some(wanted) = outputs.moments {
        wanted[0] = moments;
    }
    Ok(())
}

/// `Ok` when every row's λ is in range.
fn check_lambdas(lambdas: Option<&[f32]>) -> Result<()> {
    let bad = |lambda: &f32| !(0.0..=1.0).contains(lambda);
    let Some(row) = lambdas.and_then(|lambdas| lambdas.iter().position(bad)) else {
        return Ok(());
    };
    Err(Error::Option {
        op: OP,
        option: "lambda_per_row",
        expected: "0 to 1".into(),
        got: format!("{} for row {row}", lambdas.unwrap_or_default()[row]),
    })
}

/// The inputs and options that all rows have in common.
struct Job<'a, 'b> {
    inputs: Inputs<'a>,
    ranges: RowRanges<'a>,
    options: &'b GaeOptions,
    coefficients: Coefficients,
}

/// Rows of [`Outputs`].
type OutRows<'a> = (RangesMut<'a, f32>, RangesMut<'a, f32>, Option<RangesMut<'a, f32>>);

impl Job<'_, '_> {
    /// `count` rows from `first` on, and the moments of their advantages.
    #[inline(always)]
    fn scan_rows<const STORES: u8>(&self, first: usize, count: usize, out: OutRows) -> Moments {
        let (mut advantages, mut returns, mut rewards) = out;
        let mut moments = Moments::default();
        let mut buffers = [(); 3].map(|()| Buffer::<STORES, f32, CHUNK>::new(STORES != CACHED));
        let has_gaps = self.inputs.mask.is_some() || self.inputs.dones.is_some();
        let mut table = has_gaps.then_some(Table::EMPTY);
        // From the last row, so that all goes one way through memory.
        for i in (0..count).rev() {
            let range = self.ranges.range(first + i);
            let row = Row::new(&self.inputs, first + i, range, self.options);
            let of_row;
            let coefficients = match self.inputs.lambda_per_row {
                None => &self.coefficients,
                Some(lambdas) => {
                    let lambda = f64::from(lambdas[first + i]);
                    of_row = Coefficients::new(&self.options.with_lambda(lambda));
                    &of_row
                }
            };
            let out = Outputs {
                advantages: advantages.row(i),
                returns: returns.row(i),
                shaped_rewards: rewards.as_mut().map(|rewards| rewards.row(i)),
                moments: None,
            };
            moments =
                scan::<STORES>(&row, coefficients, out, &mut table, &mut buffers).merge(moments);
        }
        moments
    }
}

/// The options as the recurrence uses them.
#[derive(Clone, Copy)]
struct Coefficients {
    gamma: f32,
    /// Powers of γ λ.
    decay: Decay,
    /// Powers of γ times the λ of the returns.
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

    /// The returns have no λ of their own.
    fn is_one(&self) -> bool {
        self.value_decay.once() == self.decay.once()
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
    fn new(inputs: &Inputs<'a>, row: usize, at: Range<usize>, options: &GaeOptions) -> Self {
        let seq_len = at.len();
        let mask = inputs.mask.map(|mask| &mask[at.clone()]);
        let last = match mask {
            None => seq_len.checked_sub(1),
            Some(mask) => last_kept(mask),
        };
        let score = inputs.scores.zip(last).map(|(scores, last)| {
            let has_eos = inputs.has_eos.is_none_or(|has_eos| has_eos[row] != 0);
            let score = options.shaping.score(f64::from(scores[row]), has_eos);
            let place = match options.shaping.score_placement {
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
        let score = self.score.filter(|(place, _)| at.contains(place));
        Chunk {
            values: &self.values[at.clone()],
            rewards: self.rewards.map(|rewards| &rewards[at.clone()]),
            kl: self.kl.map(|kl| &kl[at.clone()]),
            mask: self.mask.map(|mask| &mask[at.clone()]),
            dones: self.dones.map(|dones| &dones[at.clone()]),
            score: score.map(|(place, score)| (place - start, score)),
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

/// The state that a step passes to the step before it.
#[derive(Clone, Copy)]
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
        self.next_value = value;
        self.advantage = c.decay.once().mul_add(self.advantage, delta);
        self.value_advantage = c.value_decay.once().mul_add(self.value_advantage, delta);
    }

    /// A of the steps in the last `count` lanes, which have these δ, and A of their returns: the same
    /// if ONE, else with a λ of its own.
    #[inline(always)]
    fn scan<const ONE: bool>(
        &mut self,
        deltas: Lanes,
        count: usize,
        c: &Coefficients,
    ) -> (Lanes, Lanes) {
        let advantages = c.decay.discount(deltas, self.advantage);
        self.advantage = advantages[LANES - count];
        let value_advantages =
            if ONE { advantages } else { c.value_decay.discount(deltas, self.value_advantage) };
        self.value_advantage = value_advantages[LANES - count];
        (advantages, value_advantages)
    }

    /// Advantages and returns of the tokens in the last `count` lanes.
    #[inline(always)]
    fn tokens<const ONE: bool>(
        &mut self,
        values: Lanes,
        rewards: Lanes,
        count: usize,
        c: &Coefficients,
    ) -> (Lanes, Lanes) {
        let mut next_values = [self.next_value; LANES];
        next_values[..LANES - 1].copy_from_slice(&values[1..]);
        self.next_value = values[LANES - count];
        let mut deltas = [0.0; LANES];
        for i in 0..LANES {
            deltas[i] = c.gamma.mul_add(next_values[i], rewards[i]) - values[i];
        }
        let (advantages, mut returns) = self.scan::<ONE>(deltas, count, c);
        for i in 0..LANES {
            returns[i] += values[i];
        }
        (advantages, returns)
    }

    /// Advantages and returns of steps of which some begin an episode, that of the last first.
    #[inline(always)]
    fn episodes<const ONE: bool>(
        &mut self,
        firsts: &[u16],
        [values, rewards]: [&[f32]; 2],
        [advantages, returns]: [&mut [f32]; 2],
        c: &Coefficients,
    ) {
        let mut end = values.len();
        for episode in (0..=firsts.len()).rev() {
            let first = if episode == 0 { 0 } else { usize::from(firsts[episode - 1]) };
            let at = first..end;
            let from = [&values[at.clone()], &rewards[at.clone()]];
            let to = [&mut advantages[at.clone()], &mut returns[at]];
            self.steps::<ONE, CACHED, false>(from, to, c);
            if episode > 0 {
                *self = State { next_value: 0.0, advantage: 0.0, value_advantage: 0.0 };
            }
            end = first;
        }
    }

    /// Advantages and returns of the steps of an episode, or of a part of it, and if wanted the moments of
    /// the advantages.
    #[inline(always)]
    fn steps<const ONE: bool, const STORES: u8, const MOMENTS: bool>(
        &mut self,
        [values, rewards]: [&[f32]; 2],
        [advantages, returns]: [&mut [f32]; 2],
        c: &Coefficients,
    ) -> Moments {
        // Copies, which stay in registers whatever is written.
        let (mut now, c) = (*self, *c);
        // From the end, so that a token's bits depend on those after it only.
        let (first_values, values) = values.as_rchunks();
        let (first_rewards, rewards) = rewards.as_rchunks();
        let (tiles, rest) = (values.len(), first_values.len());
        let (first_advantages, advantages) = advantages.split_at_mut(rest);
        let (first_returns, returns) = returns.split_at_mut(rest);
        let (rewards, advantages) = (&rewards[..tiles], &mut advantages[..LANES * tiles]);
        let returns = &mut returns[..LANES * tiles];
        let mut to_advantages = Tiles::<STORES>::new(advantages);
        let mut to_returns = Tiles::<STORES>::new(returns);
        let mut sums = LaneMoments::around(0.0);
        for i in (0..tiles).rev() {
            prefetch(&values[i], AHEAD);
            prefetch(&rewards[i], AHEAD);
            if STORES == CACHED {
                prefetch(&advantages[LANES * i..][..LANES], AHEAD);
                prefetch(&returns[LANES * i..][..LANES], AHEAD);
            }
            let (a, r) = now.tokens::<ONE>(values[i], rewards[i], LANES, &c);
            to_advantages.put_before(advantages, LANES * i, a);
            to_returns.put_before(returns, LANES * i, r);
            if !MOMENTS {
                continue;
            }
            if i + 1 == tiles {
                sums = LaneMoments::around(a[0]);
            }
            sums.add(a);
        }
        to_advantages.end_before(advantages, 0);
        to_returns.end_before(returns, 0);
        let mut moments = Moments::default();
        if rest > 0 {
            let (values, rewards) = (last_lanes(first_values), last_lanes(first_rewards));
            let (a, r) = now.tokens::<ONE>(values, rewards, rest, &c);
            first_advantages.copy_from_slice(&a[LANES - rest..]);
            first_returns.copy_from_slice(&r[LANES - rest..]);
            if MOMENTS {
                moments = leaf_moments(first_advantages, None);
            }
        }
        *self = now;
        if MOMENTS {
            sums.moments(LANES * tiles).merge(moments)
        } else {
            moments
        }
    }
}

/// One row, and the moments of its advantages.
#[inline(always)]
fn scan<const STORES: u8>(
    row: &Row,
    c: &Coefficients,
    mut out: Outputs,
    table: &mut Option<Table>,
    buffers: &mut [Buffer<STORES, f32, CHUNK>; 3],
) -> Moments {
    let mut end = row.last.map_or(0, |last| last + 1);
    let after = row.score.filter(|&(place, _)| place == end);
    let padding = out.part(end + usize::from(after.is_some())..row.values.len());
    let padding = [Some(padding.advantages), Some(padding.returns), padding.shaped_rewards];
    for (padding, buffer) in padding.into_iter().zip(&mut *buffers) {
        for padding in padding.unwrap_or_default().chunks_mut(CHUNK) {
            buffer.target(padding).fill(0.0);
            buffer.flush(padding);
        }
    }
    let mut state = State { next_value: row.bootstrap, advantage: 0.0, value_advantage: 0.0 };
    if let Some((place, score)) = after {
        let value = row.values[place];
        state.step(score, value, c);
        out.advantages[place] = 0.0;
        out.returns[place] = state.value_advantage + value;
        if let Some(rewards) = &mut out.shaped_rewards {
            rewards[place] = score;
        }
    }

    let mut moments = Moments::default();
    while end > 0 {
        let chunk = row.chunk((end - 1) / CHUNK * CHUNK, end);
        end = chunk.at.start;
        let mut out = out.part(chunk.at.clone());
        let has_gaps = table.is_some() && !chunk.is_plain();
        // From the end lines are filled by whole ones only; and no loop with gaps fills them.
        let mut unused = [(); 3].map(|()| Buffer::new(false));
        let buffered = STORES != LINES || has_gaps;
        let [advantages, returns, rewards] = if buffered { &mut *buffers } else { &mut unused };
        let to = Outputs {
            advantages: advantages.target(out.advantages),
            returns: returns.target(out.returns),
            shaped_rewards: out.shaped_rewards.as_deref_mut().map(|out| rewards.target(out)),
            moments: None,
        };
        let of_chunk = match (table.as_mut().filter(|_| has_gaps), c.is_one()) {
            (Some(table), _) => chunk.scan_any(table, &mut state, c, to),
            (None, true) => chunk.scan_plain::<true, STORES>(&mut state, c, to),
            (None, false) => chunk.scan_plain::<false, STORES>(&mut state, c, to),
        };
        advantages.flush(out.advantages);
        returns.flush(out.returns);
        if let Some(out) = out.shaped_rewards {
            rewards.flush(out);
        }
        moments = moments.merge(of_chunk);
    }
    moments
}

impl Outputs<'_> {
    #[inline(always)]
    fn part(&mut self, at: Range<usize>) -> Outputs<'_> {
        Outputs {
            advantages: &mut self.advantages[at.clone()],
            returns: &mut self.returns[at.clone()],
            shaped_rewards: self.shaped_rewards.as_mut().map(|rewards| &mut rewards[at]),
            moments: None,
        }
    }
}

/// One f32 for each lane.
type Lanes = [f32; LANES];

/// `x` in the last lanes. The others are 0, and of no consequence: what comes earlier is not looked at.
#[inline(always)]
fn last_lanes(x: &[f32]) -> Lanes {
    let mut lanes = [0.0; LANES];
    lanes[LANES - x.len()..].copy_from_slice(x);
    lanes
}

/// Some tokens of a row.
struct Chunk<'a> {
    /// The chunk's place in the row.
    at: Range<usize>,
    values: &'a [f32],
    rewards: Option<&'a [f32]>,
    kl: Option<&'a [f32]>,
    mask: Option<&'a [u8]>,
    dones: Option<&'a [u8]>,
    /// Where in the chunk the score goes, if it does, and the score.
    score: Option<(usize, f32)>,
}

impl Chunk<'_> {
    /// Nothing is masked, and no episode ends. Folds, since `all` would not be vectorised.
    #[inline(always)]
    fn is_plain(&self) -> bool {
        let masked = |mask: &[u8]| mask.iter().fold(false, |any, &m| any | (m == 0));
        let done = |dones: &[u8]| dones.iter().fold(0, |any, &d| any | d) != 0;
        !self.mask.is_some_and(masked) && !self.dones.is_some_and(done)
    }

    /// The dense rewards, where nothing is to be done about them.
    #[inline(always)]
    fn rewards_as_they_are(&self) -> Option<&[f32]> {
        self.rewards.filter(|_| self.kl.is_none() && self.score.is_none())
    }

    /// Dense rewards less the KL penalty, and the score in its place.
    #[inline(always)]
    fn shaped_rewards<'b>(&self, c: &Coefficients, shaped: &'b mut [f32; CHUNK]) -> &'b [f32] {
        let shaped = &mut shaped[..self.values.len()];
        match self.rewards {
            Some(rewards) => shaped.copy_from_slice(rewards),
            None => shaped.fill(0.0),
        }
        if let Some(kl) = self.kl {
            prefetch(kl, AHEAD);
            for (shaped, kl) in shaped.iter_mut().zip(kl) {
                *shaped = c.minus_kl_coef.mul_add(*kl, *shaped);
            }
        }
        if let Some((place, score)) = self.score {
            shaped[place] += score;
        }
        shaped
    }

    /// The rewards, in `shaped` if they are not as they were given.
    #[inline(always)]
    fn rewards<'a>(&'a self, c: &Coefficients, shaped: &'a mut Option<[f32; CHUNK]>) -> &'a [f32] {
        match self.rewards_as_they_are() {
            Some(rewards) => rewards,
            None => self.shaped_rewards(c, shaped.insert([0.0; CHUNK])),
        }
    }

    /// Returns the moments of the advantages, as does [`Self::scan_any`].
    #[inline(always)]
    fn scan_plain<const ONE: bool, const STORES: u8>(
        &self,
        state: &mut State,
        c: &Coefficients,
        out: Outputs,
    ) -> Moments {
        let mut shaped = None;
        let rewards = self.rewards(c, &mut shaped);
        if let Some(out) = out.shaped_rewards {
            out.copy_from_slice(rewards);
        }
        state.steps::<ONE, STORES, true>([self.values, rewards], [out.advantages, out.returns], c)
    }

    /// Scans a chunk where tokens are masked or episodes end. Compiled once, and not into every form of the loop
    /// over rows.
    #[inline(never)]
    fn scan_any(
        &self,
        table: &mut Table,
        state: &mut State,
        c: &Coefficients,
        out: Outputs,
    ) -> Moments {
        vectorise(
            #[inline(always)]
            || match c.is_one() {
                true => self.scan_steps::<true>(table, state, c, out),
                false => self.scan_steps::<false>(table, state, c, out),
            },
        )
    }

    #[inline(always)]
    fn scan_steps<const ONE: bool>(
        &self,
        table: &mut Table,
        state: &mut State,
        c: &Coefficients,
        out: Outputs,
    ) -> Moments {
        let mut shaped = None;
        let rewards = self.rewards(c, &mut shaped);
        if let Some(out) = out.shaped_rewards {
            out.copy_from_slice(rewards);
            self.zero_masked(out);
        }
        let Outputs { advantages, returns, .. } = out;
        let carry = c.mask_mode == MaskMode::Carry;
        table.kept = [!0; CHUNK / LANES];
        if let Some(mask) = self.mask {
            nonzero(mask, &mut table.kept);
        }
        let firsts = self.dones.map_or(0, |dones| table.find_firsts(dones, carry));
        if self.mask.is_some() && carry {
            // Without what is no step.
            let Table { values, rewards: to_rewards, kept, .. } = &mut *table;
            let to = [&mut values[..], &mut to_rewards[..]];
            let count = gather([self.values, rewards], kept, AHEAD, to);
            let moments = table.scan::<ONE>(count, firsts, state, c);
            let from = [&table.advantages[..], &table.returns[..]];
            spread(from, &table.kept, AHEAD, [advantages, returns]);
            return moments;
        }
        let (mut values, mut rewards) = (self.values, rewards);
        if self.mask.is_some() {
            // Masked tokens are steps too, of value and reward 0.
            let len = values.len();
            table.values[..len].copy_from_slice(values);
            table.rewards[..len].copy_from_slice(rewards);
            self.zero_masked(&mut table.values[..len]);
            self.zero_masked(&mut table.rewards[..len]);
            (values, rewards) = (&table.values[..len], &table.rewards[..len]);
        }
        let to = [&mut *advantages, &mut *returns];
        state.episodes::<ONE>(&table.firsts[..firsts], [values, rewards], to, c);
        if self.mask.is_some() {
            self.zero_masked(advantages);
            self.zero_masked(returns);
        }
        leaf_moments(advantages, self.mask)
    }

    #[inline(always)]
    fn zero_masked(&self, x: &mut [f32]) {
        for (x, &keep) in x.iter_mut().zip(self.mask.unwrap_or_default()) {
            *x = if keep != 0 { *x } else { 0.0 };
        }
    }
}

/// The steps of a chunk one behind the other, with room for a vector behind them.
struct Table {
    values: [f32; CHUNK + LANES],
    rewards: [f32; CHUNK + LANES],
    advantages: [f32; CHUNK + LANES],
    returns: [f32; CHUNK + LANES],
    /// Which tokens are kept, a bit each.
    kept: [u16; CHUNK / LANES],
    /// The steps that begin an episode, but for the chunk's first.
    firsts: [u16; CHUNK],
}

impl Table {
    const EMPTY: Self = Self {
        values: [0.0; CHUNK + LANES],
        rewards: [0.0; CHUNK + LANES],
        advantages: [0.0; CHUNK + LANES],
        returns: [0.0; CHUNK + LANES],
        kept: [0; CHUNK / LANES],
        firsts: [0; CHUNK],
    };

    /// Finds the steps that begin an episode, which are the tokens that are kept or all, and returns how
    /// many.
    #[inline(always)]
    fn find_firsts(&mut self, dones: &[u8], only_kept: bool) -> usize {
        let (mut count, mut found, mut ends) = (0, 0, [0; CHUNK / LANES]);
        nonzero(dones, &mut ends);
        for (mut ends, &kept) in ends.into_iter().zip(&self.kept) {
            let steps = if only_kept { kept } else { !0 };
            ends &= kept;
            while ends != 0 {
                let until = steps & (ends ^ (ends - 1));
                self.firsts[found] = count + until.count_ones() as u16;
                found += 1;
                ends &= ends - 1;
            }
            count += steps.count_ones() as u16;
        }
        found
    }

    /// Advantages and returns of the steps, and the moments of the advantages.
    #[inline(always)]
    fn scan<const ONE: bool>(
        &mut self,
        count: usize,
        firsts: usize,
        state: &mut State,
        c: &Coefficients,
    ) -> Moments {
        let Self { values, rewards, advantages, returns, .. } = self;
        let from = [&values[..count], &rewards[..count]];
        let to = [&mut advantages[..count], &mut returns[..count]];
        if firsts > 0 {
            state.episodes::<ONE>(&self.firsts[..firsts], from, to, c);
            return leaf_moments(&advantages[..count], None);
        }
        state.steps::<ONE, CACHED, true>(from, to, c)
    }
}

/// γλ and its powers.
#[derive(Clone, Copy)]
struct Decay {
    /// The first, second, fourth and eighth.
    doubled: [f32; 4],
    /// The powers that bring what comes after the lanes to each lane: from that of [`LANES`] down to the
    /// first.
    across: Lanes,
}

impl Decay {
    fn new(decay: f64) -> Self {
        let power = |n: usize| decay.powi(n as i32) as f32;
        let across = std::array::from_fn(|lane| power(LANES - lane));
        Self { doubled: [1, 2, 4, 8].map(power), across }
    }

    /// γλ itself.
    #[inline(always)]
    fn once(&self) -> f32 {
        self.doubled[0]
    }

    /// x_i + γλ x_{i+1} + (γλ)² x_{i+2} + .. over the lanes and then `after`.
    ///
    /// One after the other, every token would wait for the one after it. So, with d = γλ, first
    /// x_i += d x_{i+1}, which is the sum over two, then x_i += d² x_{i+2}, over four, and so on.
    #[inline(always)]
    fn discount(&self, mut x: Lanes, after: f32) -> Lanes {
        let [d1, d2, d4, d8] = self.doubled;
        x = add_later::<1>(x, d1);
        x = add_later::<2>(x, d2);
        x = add_later::<4>(x, d4);
        x = add_later::<8>(x, d8);
        for (x, across) in x.iter_mut().zip(&self.across) {
            *x = across.mul_add(after, *x);
        }
        x
    }
}

/// x_i + d x_{i+N}
#[inline(always)]
fn add_later<const N: usize>(x: Lanes, d: f32) -> Lanes {
    let (mut later, mut sum) = ([0.0; LANES], [0.0; LANES]);
    later[..LANES - N].copy_from_slice(&x[N..]);
    for i in 0..LANES {
        sum[i] = d.mul_add(later[i], x[i]);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bits of advantages, returns and rewards of rows with padding on both sides, gaps and a
    /// score, and their moments.
    fn bits(seq_len: usize, placement: ScorePlacement, stores: Stores) -> (Vec<u32>, Moments) {
        const BATCH: usize = 5;
        let tokens = BATCH * seq_len;
        let wave = |step: usize| -> Vec<f32> {
            (0..tokens).map(|i| ((i * step) as f32 * 0.1).sin()).collect()
        };
        let (values, rewards, kl) = (wave(3), wave(5), wave(7));
        let keep =
            |i: usize| i % seq_len > 3 && i % seq_len < seq_len - 9 && !i.is_multiple_of(701);
        let mask: Vec<u8> = (0..tokens).map(|i| u8::from(keep(i))).collect();
        let inputs = Inputs {
            rewards: Some(&rewards),
            kl: Some(&kl),
            scores: Some(&[1.0; BATCH]),
            mask: Some(&mask),
            ..Inputs::new(&values)
        };
        let mut options = GaeOptions::default();
        options.shaping.score_placement = placement;
        let coefficients = Coefficients::new(&options);
        let ranges = RowRanges::new(OP, seq_len, None).unwrap();
        let job = Job { inputs, ranges, options: &options, coefficients };
        let mut out = [(); 3].map(|()| vec![f32::NAN; tokens]);
        let [a, b, c] = out.each_mut().map(|data| RangesMut::new(data, ranges));
        let moments =
            with_stores!(stores, STORES => job.scan_rows::<STORES>(0, BATCH, (a, b, Some(c))));
        (out.into_iter().flatten().map(f32::to_bits).collect(), moments)
    }

    #[test]
    fn outputs_past_the_caches_have_the_same_bits() {
        for seq_len in [20, 1024, 1301] {
            for placement in [ScorePlacement::LastToken, ScorePlacement::AfterLastToken] {
                let bits = |&stores: &_| bits(seq_len, placement, stores);
                let cached = bits(&Stores::Cached);
                assert!(Stores::all().iter().all(|stores| bits(stores) == cached));
            }
        }
    }
}
