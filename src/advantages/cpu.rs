//! Advantages on slices. Sums are taken in f64, of one row of a group after the other by the caller's thread:
//! there is nothing to share out in a number a row. The tokens are written in parallel.

use std::ops::Range;

use super::{
    no_runner_up, AdvantageOptions, AdvantageStats, Baseline, Scale, Singleton, Sizes,
    TokenBaselineOptions, TokenStep, OP,
};
use crate::cpu::math::{exp_m1, select, sum_lanes, LANES};
use crate::cpu::{fill, map, reduce, reduce_by, vectorise, with_stores, Stores};
use crate::error::Result;
use crate::kl::cpu::probability_moved;
use crate::memory::{in_space, Lengths};
use crate::moments::Moments;
use crate::pack::{RangesMut, RowRanges};

in_space!(Host: Inputs, Outputs, TokenInputs, TokenOutputs);

/// Rows of a leaf of the batch's moments, and tokens of one of those that are written.
const ROWS_LEAF: usize = 2048;
const TOKENS_LEAF: usize = 1 << 15;

/// The advantages of a batch, on its tokens too if wanted, and statistics of the scores. See
/// [the module](super). Allocates some numbers a row where `groups` is given and does not ascend.
///
/// # Errors
/// If a length does not fit, an option is out of range, or what it looks at is not there: groups, lengths,
/// or for [`Baseline::RunnerUp`] a second row of a group. Nothing is written then.
pub fn outcome_advantages(
    inputs: Inputs,
    sizes: Sizes,
    options: &AdvantageOptions,
    mut outputs: Outputs,
) -> Result<()> {
    options.check(&inputs, sizes)?;
    let shape = sizes.shape(inputs.offsets.is_some());
    inputs.try_map(shape, &mut Lengths(OP))?;
    outputs.try_map(shape, &mut Lengths(OP))?;
    let ranges = RowRanges::new(OP, sizes.seq_len, inputs.offsets)?;
    let (wants_stats, grouped) =
        (outputs.stats.is_some(), inputs.groups.is_some() || sizes.group_size > 0);
    let by_group = options.by_group() || (wants_stats && grouped);
    let places = Places::new(inputs.groups, sizes, by_group);
    if options.baseline == Baseline::RunnerUp {
        if let Some(single) = places.groups().find(|group| group.len() == 1) {
            return Err(no_runner_up(places.row(single.start)));
        }
    }

    let batch = match options.by_batch() || wants_stats {
        true => Batch::new(&inputs, options),
        false => Batch::default(),
    };
    let score = |row: usize| score(&inputs, options, row);
    let (mut scored, mut zero_std) = (0.0, 0.0);
    for group in places.groups() {
        let rows = group.map(|place| places.row(place));
        let mut of_group = Group::default();
        if by_group {
            of_group = Group::new(rows.clone().map(|row| (row, score(row))), &inputs, options);
            let Moments { count, m2, .. } = of_group.moments;
            scored += f64::from(u8::from(count > 0.0));
            zero_std += f64::from(u8::from(count > 0.0 && m2 == 0.0));
        }
        let difference = of_group.difference(options, &batch);
        let divisor = of_group.divisor(options, &batch);
        for row in rows.clone() {
            let x = score(row);
            let mut divisor = divisor;
            if options.scale == Scale::LeaveOneOut {
                let others = || moments(rows.clone().filter(|&other| other != row).map(score));
                divisor = options.by_std(options.variance(&of_group.others(x, others)));
            }
            let advantage = (difference.of(x) / divisor) as f32;
            outputs.advantages[row] = if x.is_nan() { 0.0 } else { advantage };
        }
    }

    if let Some(stats) = outputs.stats {
        let Moments { count, mean, .. } = batch.moments;
        stats[0] = AdvantageStats {
            score_mean: if count > 0.0 { mean } else { f64::NAN },
            score_std: batch.moments.std(options.unbiased),
            zero_std_fraction: if grouped { zero_std / scored } else { f64::NAN },
        };
    }
    if let Some(tokens) = outputs.token_advantages {
        spread(outputs.advantages, inputs.mask, ranges, tokens);
    }
    Ok(())
}

/// The score of a row as it counts; NaN if it does not.
#[inline(always)]
fn score(inputs: &Inputs, options: &AdvantageOptions, row: usize) -> f64 {
    let score = f64::from(inputs.scores[row]);
    // Not `clamp`, which looks at its bounds each time. NaN stays.
    let raised = if score < options.score_min { options.score_min } else { score };
    let clipped = if raised > options.score_max { options.score_max } else { raised };
    clipped - inputs.score_baselines.map_or(0.0, |baselines| f64::from(baselines[row]))
}

/// The rows of a batch in places, in which those of a group stand after each other, in their order.
struct Places<'a> {
    /// The rows' group ids, if groups are told apart by ids.
    ids: Option<&'a [i64]>,
    /// The rows in these places, where they are not those of the batch.
    order: Option<Vec<usize>>,
    batch: usize,
    /// Rows of a group without ids. If nothing is asked of groups every row is one.
    group_size: usize,
}

impl<'a> Places<'a> {
    fn new(groups: Option<&'a [i64]>, sizes: Sizes, by_group: bool) -> Self {
        let Sizes { batch, group_size, .. } = sizes;
        let ids = groups.filter(|_| by_group);
        let order = ids.filter(|ids| !ids.is_sorted()).map(in_groups);
        Self { ids, order, batch, group_size: group_size.max(1) }
    }

    #[inline(always)]
    fn row(&self, place: usize) -> usize {
        self.order.as_ref().map_or(place, |order| order[place])
    }

    /// The places of each group.
    fn groups(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let mut end = 0;
        std::iter::from_fn(move || {
            let start = end;
            if start == self.batch {
                return None;
            }
            end = match self.ids {
                None => start + self.group_size,
                Some(ids) => {
                    let id = ids[self.row(start)];
                    let other = (start..self.batch).find(|&place| ids[self.row(place)] != id);
                    other.unwrap_or(self.batch)
                }
            };
            Some(start..end)
        })
    }
}

/// The rows of these ids, those of equal ones after each other, in the order of the first of each: by a
/// table of ids with open addressing.
fn in_groups(ids: &[i64]) -> Vec<usize> {
    const EMPTY: usize = usize::MAX;
    let bits = (2 * ids.len()).next_power_of_two().ilog2();
    // Of each group its first row, its number, and how many rows it has.
    let (mut table, mut firsts, mut counts) = (vec![EMPTY; 1 << bits], Vec::new(), Vec::new());
    let mut group_of = Vec::with_capacity(ids.len());
    for (row, &id) in ids.iter().enumerate() {
        // Fibonacci hashing: the upper bits of a product depend on all of the id's.
        let hash = (id as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut slot = (hash >> (64 - bits)) as usize;
        while table[slot] != EMPTY && ids[firsts[table[slot]]] != id {
            slot = (slot + 1) % table.len();
        }
        if table[slot] == EMPTY {
            table[slot] = firsts.len();
            firsts.push(row);
            counts.push(0);
        }
        counts[table[slot]] += 1;
        group_of.push(table[slot]);
    }
    // Where the next row of each group goes.
    let mut next = 0;
    for count in &mut counts {
        (*count, next) = (next, next + *count);
    }
    let mut order = vec![0; ids.len()];
    for (row, group) in group_of.into_iter().enumerate() {
        order[counts[group]] = row;
        counts[group] += 1;
    }
    order
}

/// Statistics of all rows.
#[derive(Default)]
struct Batch {
    moments: Moments,
    /// Scores that are not 0.
    nonzero: f64,
}

impl Batch {
    fn new(inputs: &Inputs, options: &AdvantageOptions) -> Self {
        let (moments, nonzero) = reduce(
            inputs.scores.len(),
            ROWS_LEAF,
            (),
            |first, count, ()| {
                let mut scores = [f64::NAN; ROWS_LEAF];
                for (i, x) in scores[..count].iter_mut().enumerate() {
                    *x = score(inputs, options, first + i);
                }
                vectorise(
                    #[inline(always)]
                    || (leaf_moments(&scores), nonzero(&scores)),
                )
            },
            |a, b| (a.0.merge(b.0), a.1 + b.1),
        );
        Self { moments, nonzero }
    }
}

/// [`moments`] of a leaf, in lanes.
#[inline(always)]
fn leaf_moments(x: &[f64; ROWS_LEAF]) -> Moments {
    let Some(&origin) = x.iter().find(|x| !x.is_nan()) else {
        return Moments::default();
    };
    let [mut counts, mut sums, mut squares] = [[0.0; LANES]; 3];
    for x in x.as_chunks::<LANES>().0 {
        for i in 0..LANES {
            let there = !x[i].is_nan();
            let off = if there { x[i] - origin } else { 0.0 };
            counts[i] += if there { 1.0 } else { 0.0 };
            sums[i] += off;
            squares[i] = off.mul_add(off, squares[i]);
        }
    }
    around(origin, sum_lanes(counts), sum_lanes(sums), sum_lanes(squares))
}

#[inline(always)]
fn nonzero(x: &[f64; ROWS_LEAF]) -> f64 {
    let mut counts = [0.0; LANES];
    for x in x.as_chunks::<LANES>().0 {
        for i in 0..LANES {
            counts[i] += if x[i].is_nan() || x[i] == 0.0 { 0.0 } else { 1.0 };
        }
    }
    sum_lanes(counts)
}

/// The moments of those that are not NaN, around the first: exact if all are equal, NaN if one is infinite.
#[inline(always)]
fn moments(x: impl Iterator<Item = f64>) -> Moments {
    let (mut origin, mut count, mut sum, mut squares) = (f64::NAN, 0.0, 0.0, 0.0);
    for x in x.filter(|x| !x.is_nan()) {
        if count == 0.0 {
            origin = x;
        }
        let off = x - origin;
        count += 1.0;
        sum += off;
        squares += off * off;
    }
    if count == 0.0 {
        return Moments::default();
    }
    around(origin, count, sum, squares)
}

/// The moments of numbers of which one is the origin, from the sums of their deviations from it and of the
/// squares of those. So the subtraction costs no more than a factor `count` in relative precision.
fn around(origin: f64, count: f64, sum: f64, squares: f64) -> Moments {
    if !f64::is_finite(sum) {
        return Moments { count, mean: f64::NAN, m2: f64::NAN };
    }
    let mean = sum / count;
    Moments { count, mean: origin + mean, m2: (squares - sum * mean).max(0.0) }
}

/// Statistics of a group.
#[derive(Default)]
struct Group {
    moments: Moments,
    /// The mean weighted by lengths, where that is the baseline; NaN if they are all 0.
    weighted: f64,
    /// The largest score and the next one, where that is the baseline.
    best: [f64; 2],
}

impl Group {
    /// Reads the rows' scores and finds their groups.
    #[inline(always)]
    fn new(
        rows: impl Iterator<Item = (usize, f64)> + Clone,
        inputs: &Inputs,
        options: &AdvantageOptions,
    ) -> Self {
        let moments = moments(rows.clone().map(|(_, x)| x));
        let mut group = Self { moments, ..Self::default() };
        let scored = rows.filter(|(_, x)| !x.is_nan());
        match (options.baseline, inputs.lengths) {
            (Baseline::LengthWeighted, Some(lengths)) => {
                // Around one of them, as the moments, so that equal ones leave nothing.
                let origin = scored.clone().next().map_or(0.0, |(_, x)| x);
                let (mut total, mut sum) = (0.0, 0.0);
                for (row, x) in scored {
                    let length = f64::from(lengths[row]);
                    total += length;
                    sum += length * (x - origin);
                }
                group.weighted = origin + sum / total;
            }
            (Baseline::RunnerUp, _) => {
                group.best = [f64::NEG_INFINITY; 2];
                for (_, x) in scored {
                    let [first, second] = group.best;
                    group.best = [x.max(first), x.min(first).max(second)];
                }
            }
            _ => {}
        }
        group
    }

    /// How a score less its baseline is computed.
    fn difference(&self, options: &AdvantageOptions, batch: &Batch) -> Difference {
        let Moments { count: n, mean, .. } = self.moments;
        let less = |baseline| Difference { baseline, factor: 1.0, only: None };
        match options.baseline {
            Baseline::None => less(0.0),
            Baseline::Batch => less(batch.moments.mean),
            // Of a score that is infinite.
            _ if mean.is_nan() => less(f64::NAN),
            _ if n == 1.0 => match options.singleton {
                Singleton::Zero => less(mean),
                Singleton::Keep => less(0.0),
            },
            Baseline::Group => less(mean),
            Baseline::LeaveOneOut => Difference { factor: n / (n - 1.0), ..less(mean) },
            Baseline::LengthWeighted if self.weighted.is_nan() => {
                Difference { factor: 0.0, ..less(0.0) }
            }
            Baseline::LengthWeighted => less(self.weighted),
            Baseline::RunnerUp => Difference { only: Some(self.best[0]), ..less(self.best[1]) },
        }
    }

    /// The divisor of a difference, where it is the same for every row.
    fn divisor(&self, options: &AdvantageOptions, batch: &Batch) -> f64 {
        match options.scale {
            Scale::None | Scale::LeaveOneOut => 1.0,
            Scale::Group => options.by_std(options.variance(&self.moments)),
            Scale::Batch => options.by_std(options.variance(&batch.moments)),
            Scale::Mean if self.moments.count == 1.0 => 1.0,
            Scale::Mean => options.by(self.moments.mean),
            Scale::Nonzero => options.by(batch.nonzero / batch.moments.count),
        }
    }

    /// The moments without one of the scores, which `anew` makes of the others; their mean may not be worked
    /// out.
    fn others(&self, x: f64, anew: impl Fn() -> Moments) -> Moments {
        let Moments { count, mean, m2 } = self.moments;
        let share = (x - mean) * (x - mean) * (count / (count - 1.0));
        // Of a difference that is small beside what it is taken from few digits would be right, and where
        // the others are equal it would not be 0. No more than three scores can make up so much.
        if share > m2 / 2.0 {
            return anew();
        }
        Moments { count: count - 1.0, mean: f64::NAN, m2: m2 - share }
    }
}

/// A score less a baseline, times a factor.
struct Difference {
    baseline: f64,
    factor: f64,
    /// The one score that it is of, if there is one; of all others it is 0.
    only: Option<f64>,
}

impl Difference {
    #[inline(always)]
    fn of(&self, x: f64) -> f64 {
        match self.only {
            Some(only) if x != only => 0.0,
            _ => (x - self.baseline) * self.factor,
        }
    }
}

/// Advantages against verl's optimal token baseline, and returns. See [the module](super). Allocates two f64
/// a token.
///
/// # Errors
/// If a length does not fit, an option is out of range, or rows are in no groups. Nothing is written then.
pub fn optimal_token_baseline(
    inputs: TokenInputs,
    sizes: Sizes,
    options: &TokenBaselineOptions,
    mut outputs: TokenOutputs,
) -> Result<()> {
    options.check(&inputs, sizes)?;
    let shape = sizes.shape(inputs.offsets.is_some());
    inputs.try_map(shape, &mut Lengths(OP))?;
    outputs.try_map(shape, &mut Lengths(OP))?;
    let ranges = RowRanges::new(OP, sizes.seq_len, inputs.offsets)?;
    let tokens = ranges.start(sizes.batch);
    let batch = if tokens == 0 { 0 } else { sizes.batch };
    let cut = move |first, count| ranges.middle(first, count, TOKENS_LEAF);

    // Of each row its steps from its first token's place on, and how many tokens are unmasked.
    let [mut returns, mut weights] = [(); 2].map(|()| vec![0.0; tokens]);
    let mut lengths = vec![0; batch];
    let rows = |first: usize, _, (mut returns, mut weights, lengths): StepsOfRows| {
        vectorise(
            #[inline(always)]
            || {
                for (i, length) in lengths.iter_mut().enumerate() {
                    let (range, returns) = (ranges.range(first + i), returns.row(i));
                    *length = steps_of_row(&inputs, range, options, returns, weights.row(i));
                }
            },
        );
    };
    let items = (
        RangesMut::new(&mut returns, ranges),
        RangesMut::new(&mut weights, ranges),
        &mut lengths[..],
    );
    reduce_by(batch, cut, items, rows, |(), ()| ());

    let places = Places::new(inputs.groups, Sizes { batch, ..sizes }, true);
    let groups: Vec<Range<usize>> = places.groups().collect();
    let mut baselines: Vec<Vec<f64>> = vec![Vec::new(); groups.len()];
    // Of each row its group, and the step from which it has no baseline.
    let mut of_rows = vec![(0, usize::MAX); batch];
    for (g, group) in groups.iter().enumerate() {
        let rows = group.clone().map(|place| places.row(place));
        let second = rows
            .clone()
            .map(|row| lengths[row])
            .fold([0; 2], |[a, b], length| [length.max(a), length.min(a).max(b)])[1];
        for row in rows {
            let is_longest = lengths[row] > second;
            of_rows[row] = (g, if options.lone_tail && is_longest { second } else { usize::MAX });
        }
    }
    let per_group = tokens / groups.len().max(1);
    let cut_groups =
        move |_, count: usize| (count > 1 && count * per_group > TOKENS_LEAF).then_some(count / 2);
    let of_groups = |first: usize, _, baselines: &mut [Vec<f64>]| {
        for (g, baseline) in (first..).zip(baselines) {
            let rows = groups[g].clone().map(|place| places.row(place));
            let rows = rows.filter(|&row| lengths[row] > 0);
            if rows.clone().count() > 1 {
                *baseline = vectorise(
                    #[inline(always)]
                    || baseline_of_group(rows, ranges, &returns, &weights, options.eps),
                );
            }
        }
    };
    reduce_by(groups.len(), cut_groups, &mut baselines[..], of_groups, |(), ()| ());

    let write = |first: usize, count: usize, (mut advantages, mut to): AdvantagesOfRows| {
        vectorise(
            #[inline(always)]
            || {
                for i in 0..count {
                    let range = ranges.range(first + i);
                    let (group, tail) = of_rows[first + i];
                    let baseline = &baselines[group][..tail.min(baselines[group].len())];
                    let returns = &returns[range.clone()];
                    let mask = inputs.mask.map(|mask| &mask[range]);
                    let to = to.as_mut().map(|to| to.row(i));
                    write_row(returns, baseline, mask, options.step, advantages.row(i), to);
                }
            },
        );
    };
    let of_returns = outputs.returns.map(|returns| RangesMut::new(returns, ranges));
    let items = (RangesMut::new(outputs.advantages, ranges), of_returns);
    reduce_by(batch, cut, items, write, |(), ()| ());
    Ok(())
}

type StepsOfRows<'a> = (RangesMut<'a, f64>, RangesMut<'a, f64>, &'a mut [usize]);
type AdvantagesOfRows<'a> = (RangesMut<'a, f32>, Option<RangesMut<'a, f32>>);

/// Writes the sum of a row's rewards from each step on, and that of its weights up to it, 0 where there is no
/// token; how many there are.
#[inline(always)]
fn steps_of_row(
    inputs: &TokenInputs,
    tokens: Range<usize>,
    options: &TokenBaselineOptions,
    returns: &mut [f64],
    weights: &mut [f64],
) -> usize {
    let (mut total, mut unmasked) = (0.0, 0);
    for first in tokens.clone().step_by(NORMS) {
        let chunk = first..tokens.end.min(first + NORMS);
        let of_chunk =
            inputs.logp[chunk.clone()].iter().zip(&inputs.log_sum_sq_probs[chunk.clone()]);
        let mut norms = [0.0; NORMS];
        for (norm, (&logp, &log_sum)) in norms.iter_mut().zip(of_chunk) {
            *norm = norm_of_gradient(logp, log_sum);
        }
        for (&norm, at) in norms.iter().zip(chunk) {
            if inputs.mask.is_some_and(|mask| mask[at] == 0) {
                continue;
            }
            let step = if options.step == TokenStep::Column { at - tokens.start } else { unmasked };
            unmasked += 1;
            let importance = inputs.weights.map_or(1.0, |weights| f64::from(weights[at]));
            total += f64::from(norm) * importance * importance;
            weights[step] = total;
            returns[step] = f64::from(inputs.rewards[at]);
        }
    }
    let mut rest = 0.0;
    for reward in returns.iter_mut().rev() {
        rest += *reward;
        *reward = rest;
    }
    unmasked
}

/// How many of them are made at once.
const NORMS: usize = 64;

/// ‖onehot - p‖² of a token: that of itself and of all others, neither as a difference of numbers near 1.
#[inline(always)]
fn norm_of_gradient(logp: f32, log_sum_sq_probs: f32) -> f32 {
    let excess = log_sum_sq_probs - 2.0 * logp;
    let excess = select((-1e-5..0.0).contains(&excess), 0.0, excess);
    let own = exp_m1(logp);
    own.mul_add(own, probability_moved(log_sum_sq_probs, 2.0 * logp, excess))
}

/// Writes the advantages and returns of a row's tokens; `baseline` is of the steps that have one.
#[inline(always)]
fn write_row(
    returns: &[f64],
    baseline: &[f64],
    mask: Option<&[u8]>,
    step: TokenStep,
    advantages: &mut [f32],
    to: Option<&mut [f32]>,
) {
    let kept = |t: usize| mask.is_none_or(|mask| mask[t] != 0);
    match step {
        TokenStep::Column => {
            let count = baseline.len().min(returns.len());
            for t in 0..count {
                advantages[t] = select(kept(t), (returns[t] - baseline[t]) as f32, 0.0);
            }
            for t in count..returns.len() {
                advantages[t] = select(kept(t), returns[t] as f32, 0.0);
            }
            let Some(to) = to else { return };
            for (t, to) in to.iter_mut().enumerate() {
                *to = select(kept(t), returns[t] as f32, 0.0);
            }
        }
        TokenStep::Unmasked => {
            let (mut to, mut step) = (to, 0);
            for (t, advantage) in advantages.iter_mut().enumerate() {
                let (mut of_token, mut less) = (0.0, 0.0);
                if kept(t) {
                    (of_token, less) = (returns[step], *baseline.get(step).unwrap_or(&0.0));
                    step += 1;
                }
                *advantage = (of_token - less) as f32;
                if let Some(to) = &mut to {
                    to[t] = of_token as f32;
                }
            }
        }
    }
}

/// The baseline at each step of a group.
#[inline(always)]
fn baseline_of_group(
    rows: impl Iterator<Item = usize> + Clone,
    ranges: RowRanges,
    returns: &[f64],
    weights: &[f64],
    eps: f64,
) -> Vec<f64> {
    let steps = rows.clone().map(|row| ranges.range(row).len()).max().unwrap_or(0);
    let [mut sums, mut totals] = [(); 2].map(|()| vec![0.0; steps]);
    for row in rows {
        let range = ranges.range(row);
        let of_row = returns[range.clone()].iter().zip(&weights[range]);
        for ((sum, total), (g, w)) in sums.iter_mut().zip(&mut totals).zip(of_row) {
            *sum = w.mul_add(*g, *sum);
            *total += w;
        }
    }
    sums.iter().zip(totals).map(|(sum, total)| sum / (total + eps)).collect()
}

/// Writes the advantage of each row to its unmasked tokens.
fn spread(advantages: &[f32], mask: Option<&[u8]>, ranges: RowRanges, tokens: &mut [f32]) {
    // Rows of nothing need no walk.
    let rows = if tokens.is_empty() { 0 } else { advantages.len() };
    let stores = Stores::of(size_of_val(tokens));
    let cut = move |first, count| ranges.middle(first, count, TOKENS_LEAF);
    let items = (advantages, RangesMut::new(tokens, ranges));
    let leaf = |first: usize, _, (advantages, mut tokens): (&[f32], RangesMut<f32>)| {
        with_stores!(stores, STORES => {
            for (row, &advantage) in advantages.iter().enumerate() {
                let out = tokens.row(row);
                match mask.map(|mask| &mask[ranges.range(first + row)]) {
                    None => fill::<STORES, _>(out, advantage),
                    Some(mask) => map::<STORES, _, _>(
                        out,
                        mask,
                        #[inline(always)]
                        |keep| if keep != 0 { advantage } else { 0.0 },
                    ),
                }
            }
        });
    };
    reduce_by(rows, cut, items, leaf, |(), ()| ());
}
