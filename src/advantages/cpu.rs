//! Advantages on slices. Sums are taken in f64, of one row of a group after the other; the tokens are
//! written in parallel.

use super::{
    no_runner_up, AdvantageOptions, AdvantageStats, Baseline, Scale, Singleton, Sizes, OP,
};
use crate::cpu::{for_each, prefers_non_temporal, vectorise, Rows, RowsMut, Writer};
use crate::error::Result;
use crate::memory::{in_space, Lengths};
use crate::moments::Moments;

in_space!(Host: Inputs, Outputs);

/// Tokens of a leaf.
const LEAF: usize = 1 << 15;

/// The advantages of a batch, on its tokens too if wanted, and statistics of the scores. See
/// [the module](super). Allocates a number a row where `groups` is given and not in ascending order.
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
    inputs.try_map(sizes.shape(), &mut Lengths(OP))?;
    outputs.try_map(sizes.shape(), &mut Lengths(OP))?;
    let (wants_stats, grouped) =
        (outputs.stats.is_some(), inputs.groups.is_some() || sizes.group_size > 0);
    let groups = Groups::new(&inputs, sizes);
    if options.baseline == Baseline::RunnerUp {
        if let Some(single) = groups.starts().find(|&start| groups.end(start) == start + 1) {
            return Err(no_runner_up(groups.row(single)));
        }
    }

    let score = |row: usize| score(&inputs, options, row);
    let all = (0..sizes.batch).map(score);
    let batch = match options.by_batch() || wants_stats {
        true => Batch { moments: moments(all.clone()), nonzero: share_of_nonzero(all) },
        false => Batch { moments: Moments::default(), nonzero: f64::NAN },
    };
    let by_group = options.by_group() || (wants_stats && grouped);
    let (mut scored, mut zero_std) = (0.0, 0.0);
    for start in groups.starts() {
        let rows = (start..groups.end(start)).map(|place| groups.row(place));
        let mut group = Group::default();
        if by_group {
            group = Group::new(rows.clone().map(|row| (row, score(row))), &inputs, options);
            scored += f64::from(u8::from(group.moments.count > 0.0));
            zero_std += f64::from(u8::from(group.moments.count > 0.0 && group.moments.m2 == 0.0));
        }
        for row in rows.clone() {
            let others = || moments(rows.clone().filter(|&other| other != row).map(score));
            let advantage = advantage(options, score(row), &group, &batch, others);
            outputs.advantages[row] = advantage as f32;
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
            spread::<true>(outputs.advantages, inputs.mask, sizes, tokens);
        } else {
            spread::<false>(outputs.advantages, inputs.mask, sizes, tokens);
        }
    }
    Ok(())
}

/// The score of a row as it counts; NaN if it does not.
#[inline(always)]
fn score(inputs: &Inputs, options: &AdvantageOptions, row: usize) -> f64 {
    // NaN stays.
    let clipped = f64::from(inputs.scores[row]).clamp(options.score_min, options.score_max);
    clipped - inputs.baselines.map_or(0.0, |baselines| f64::from(baselines[row]))
}

/// The rows of a batch in places, in which those of a group stand after each other, in their order.
struct Groups<'a> {
    ids: Option<&'a [i64]>,
    /// The rows in these places, where they are not those of the batch.
    order: Option<Vec<usize>>,
    sizes: Sizes,
}

impl<'a> Groups<'a> {
    fn new(inputs: &Inputs<'a>, sizes: Sizes) -> Self {
        let ids = inputs.groups;
        let order = ids.filter(|ids| !ids.is_sorted()).map(|ids| {
            let mut order: Vec<usize> = (0..ids.len()).collect();
            order.sort_by_key(|&row| ids[row]);
            order
        });
        Self { ids, order, sizes }
    }

    fn row(&self, place: usize) -> usize {
        self.order.as_ref().map_or(place, |order| order[place])
    }

    /// The place behind the last of a group. Without groups every row is by itself.
    fn end(&self, start: usize) -> usize {
        let Some(ids) = self.ids else {
            return start + self.sizes.group_size.max(1);
        };
        let id = ids[self.row(start)];
        let other = (start..ids.len()).find(|&place| ids[self.row(place)] != id);
        other.unwrap_or(ids.len())
    }

    /// The first place of every group.
    fn starts(&self) -> impl Iterator<Item = usize> + '_ {
        let first = (self.sizes.batch > 0).then_some(0);
        std::iter::successors(first, |&start| {
            Some(self.end(start)).filter(|&end| end < self.sizes.batch)
        })
    }
}

/// Statistics of all rows.
struct Batch {
    moments: Moments,
    /// The share of scores that are not 0.
    nonzero: f64,
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
}

/// The advantage of a row with this score. `others` makes the moments of the group without it.
#[inline(always)]
fn advantage(
    options: &AdvantageOptions,
    x: f64,
    group: &Group,
    batch: &Batch,
    others: impl Fn() -> Moments,
) -> f64 {
    if x.is_nan() {
        return 0.0;
    }
    let Moments { count: n, mean, .. } = group.moments;
    let alone = n == 1.0 && options.baseline.of_group();
    let difference = match options.baseline {
        // Of a score that is infinite.
        baseline if baseline.of_group() && mean.is_nan() => f64::NAN,
        _ if alone && options.singleton == Singleton::Zero => 0.0,
        _ if alone => x,
        Baseline::None => x,
        Baseline::Group => x - mean,
        Baseline::LeaveOneOut => (x - mean) * (n / (n - 1.0)),
        Baseline::Batch => x - batch.moments.mean,
        Baseline::LengthWeighted if group.weighted.is_nan() => 0.0,
        Baseline::LengthWeighted => x - group.weighted,
        Baseline::RunnerUp => match group.best {
            [first, second] if x == first => first - second,
            _ => 0.0,
        },
    };
    match options.scale {
        Scale::None => difference,
        Scale::Group => options.divide(difference, options.variance(&group.moments)),
        Scale::LeaveOneOut => {
            let others = of_others(&group.moments, x, others);
            options.divide(difference, options.variance(&others))
        }
        Scale::Batch => options.divide(difference, options.variance(&batch.moments)),
        Scale::Mean if n == 1.0 => difference,
        Scale::Mean => options.divide_by(difference, mean),
        Scale::Nonzero => options.divide_by(difference, batch.nonzero),
    }
}

/// The moments of a group without one of its scores; their mean is not worked out.
fn of_others(group: &Moments, x: f64, anew: impl Fn() -> Moments) -> Moments {
    let Moments { count, mean, m2 } = *group;
    let share = (x - mean) * (x - mean) * (count / (count - 1.0));
    // Of a difference that is small beside what it is taken from few digits would be right, and where the
    // others are equal it would not be 0. No more than three scores can make up so much.
    if share > m2 / 2.0 {
        return anew();
    }
    Moments { count: count - 1.0, mean: f64::NAN, m2: m2 - share }
}

/// The moments of those that are not NaN, around the first: exact if all are equal, NaN if one is infinite.
fn moments(x: impl Iterator<Item = f64> + Clone) -> Moments {
    let scored = x.filter(|x| !x.is_nan());
    let Some(origin) = scored.clone().next() else {
        return Moments::default();
    };
    let (mut count, mut sum) = (0.0, 0.0);
    for x in scored.clone() {
        count += 1.0;
        sum += x - origin;
    }
    if !f64::is_finite(sum) {
        return Moments { count, mean: f64::NAN, m2: f64::NAN };
    }
    let mean = sum / count;
    let m2 = scored.map(|x| (x - origin - mean) * (x - origin - mean)).sum();
    Moments { count, mean: origin + mean, m2 }
}

fn share_of_nonzero(x: impl Iterator<Item = f64>) -> f64 {
    let (mut scored, mut nonzero) = (0.0, 0.0);
    for x in x.filter(|x| !x.is_nan()) {
        scored += 1.0;
        nonzero += f64::from(u8::from(x != 0.0));
    }
    nonzero / scored
}

/// Writes the advantage of each row to its unmasked tokens.
fn spread<const NON_TEMPORAL: bool>(
    advantages: &[f32],
    mask: Option<&[u8]>,
    Sizes { batch, seq_len, .. }: Sizes,
    tokens: &mut [f32],
) {
    let rows = LEAF.div_ceil(seq_len.max(1));
    let mask = mask.map(|data| Rows { data, width: seq_len });
    let tokens = RowsMut { data: tokens, width: seq_len };
    for_each(batch, rows, (advantages, mask, tokens), |_, _, (advantages, mask, mut tokens)| {
        let writer = Writer::<NON_TEMPORAL>;
        vectorise(
            #[inline(always)]
            || {
                for (row, &advantage) in advantages.iter().enumerate() {
                    let out = tokens.row(row);
                    match mask {
                        None => writer.fill(out, advantage),
                        Some(mask) => {
                            let kept = |keep| if keep != 0 { advantage } else { 0.0 };
                            writer.map(out, mask.row(row), kept);
                        }
                    }
                }
            },
        );
    });
}
