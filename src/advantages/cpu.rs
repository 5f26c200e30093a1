//! Advantages on slices. Sums are taken in f64, of one row of a group after the other by the caller's thread:
//! there is nothing to share out in a number a row. The tokens are written in parallel.

use std::ops::Range;

use super::{
    no_runner_up, AdvantageOptions, AdvantageStats, Baseline, Scale, Singleton, Sizes, OP,
};
use crate::cpu::math::{sum_lanes, LANES};
use crate::cpu::{prefers_non_temporal, reduce, reduce_by, vectorise, Writer};
use crate::error::Result;
use crate::memory::{in_space, Lengths};
use crate::moments::Moments;
use crate::pack::{RangesMut, RowRanges};

in_space!(Host: Inputs, Outputs);

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
    let places = Places::new(&inputs, sizes, by_group);
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
        if prefers_non_temporal(size_of_val(tokens)) {
            spread::<true>(outputs.advantages, inputs.mask, ranges, tokens);
        } else {
            spread::<false>(outputs.advantages, inputs.mask, ranges, tokens);
        }
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
    /// What tells groups apart, if anything does.
    ids: Option<&'a [i64]>,
    /// The rows in these places, where they are not those of the batch.
    order: Option<Vec<usize>>,
    batch: usize,
    /// Rows of a group without ids. If nothing is asked of groups every row is one.
    group_size: usize,
}

impl<'a> Places<'a> {
    fn new(inputs: &Inputs<'a>, sizes: Sizes, by_group: bool) -> Self {
        let Sizes { batch, group_size, .. } = sizes;
        let ids = inputs.groups.filter(|_| by_group);
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
    /// Those of rows and their scores.
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

    /// What a score less its baseline is.
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

    /// What a difference is divided by, if that is not another number for each row.
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

/// Writes the advantage of each row to its unmasked tokens.
fn spread<const NON_TEMPORAL: bool>(
    advantages: &[f32],
    mask: Option<&[u8]>,
    ranges: RowRanges,
    tokens: &mut [f32],
) {
    // Rows of nothing need no walk.
    let rows = if tokens.is_empty() { 0 } else { advantages.len() };
    let cut = move |first, count| ranges.middle(first, count, TOKENS_LEAF);
    let items = (advantages, RangesMut::new(tokens, ranges));
    let leaf = |first: usize, _, (advantages, mut tokens): (&[f32], RangesMut<f32>)| {
        let writer = Writer::<NON_TEMPORAL>;
        vectorise(
            #[inline(always)]
            || {
                for (row, &advantage) in advantages.iter().enumerate() {
                    let out = tokens.row(row);
                    match mask {
                        None => writer.fill(out, advantage),
                        Some(mask) if NON_TEMPORAL => {
                            let kept = |keep| if keep != 0 { advantage } else { 0.0 };
                            writer.map(out, &mask[ranges.range(first + row)], kept);
                        }
                        // Without what the writer asks of each row, which would be felt in short ones.
                        Some(mask) => {
                            let mask = &mask[ranges.range(first + row)];
                            for (out, &keep) in out.iter_mut().zip(mask) {
                                *out = if keep != 0 { advantage } else { 0.0 };
                            }
                        }
                    }
                }
            },
        );
    };
    reduce_by(rows, cut, items, leaf, |(), ()| ());
}
