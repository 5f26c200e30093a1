//! The implementation on slices. Products are the `gemm` crate's, on rayon's threads; what is between them
//! are the tile passes of [`logprob::cpu`](crate::logprob::cpu). Allocates a tile and what is in f32 of 16-bit
//! arguments.
//!
//! All rows that take part go through together, and a tile has as many columns as its bytes allow, 64 at
//! least: so a weight is read once a product, and its gradient is written once.

use std::borrow::Cow;
use std::ops::Range;

use super::{LinearOptions, Sizes, OP};
use crate::cpu::math::exp_m1;
use crate::cpu::{for_each, num_threads, vectorise, Logit, RowsMut, TokenId};
use crate::error::{Error, Result};
use crate::logprob::cpu as rows;
use crate::logprob::{Columns, LogprobOptions};
use crate::memory::{in_space, Lengths};

/// The fewest columns of a tile that is not the last.
const LEAST_COLUMNS: usize = 64;

/// Elements that a thread converts at a time.
const GRAIN: usize = 64 * 1024;

in_space!(
    Host: ForwardInputs<T, I>,
    ForwardOutputs,
    BackwardInputs<T, I>,
    BackwardOutputs<T>,
);

/// Log-probabilities of the targets of `sizes.rows` hidden states, and the entropies if asked for.
///
/// # Errors
/// If a length does not fit, an option is out of range, or a target is outside the vocabulary. Nothing is
/// written then.
pub fn forward<T: Logit, I: TokenId>(
    inputs: ForwardInputs<T, I>,
    sizes: Sizes,
    options: &LinearOptions,
    mut outputs: ForwardOutputs,
) -> Result<()> {
    let work = Work::of(&inputs, sizes, options)?;
    outputs.try_map(&[sizes.rows], &mut Lengths(OP))?;

    let count = work.targets.len();
    let mut sums = [(); 4].map(|()| vec![0.0; count]);
    let mut tile = work.tile();
    for columns in work.columns() {
        let logits = work.logits(columns.clone(), &mut tile);
        let inputs = rows::ForwardInputs { logits, targets: &work.targets };
        let [max, rest, logit, weighted] = &mut sums;
        let weighted = outputs.entropy.is_some().then_some(&mut weighted[..]);
        let running = rows::RunningSums { max, rest, logit, weighted };
        let (begins, columns) = (columns.start == 0, work.of_vocab(columns));
        rows::partial(inputs, count, columns, &work.options, begins, running)?;
    }
    let [max, rest, logit, weighted] = &sums;
    let mut found = [(); 3].map(|()| vec![0.0; count]);
    let [logp, log_sum, entropy] = &mut found;
    let wanted = outputs.entropy.is_some();
    let inputs = rows::FinishInputs {
        weighted: wanted.then_some(weighted),
        ..rows::FinishInputs::new(&work.targets, max, rest, logit)
    };
    let finished = rows::FinishOutputs { logp, log_sum, entropy: wanted.then_some(entropy) };
    rows::finish(inputs, count, sizes.vocab, &work.options, finished)?;

    let [logp, log_sum, entropy] = &found;
    work.spread(logp, outputs.logp);
    work.spread(max, outputs.max);
    work.spread(log_sum, outputs.log_sum);
    if let Some(output) = outputs.entropy {
        work.spread(entropy, output);
    }
    Ok(())
}

/// Writes those of the gradients of hidden states, weight and bias that are wanted, each in the type of its
/// argument: sums are in f32 and rounded once.
///
/// # Errors
/// As [`forward`], or if the entropy is missing where its gradient needs it.
pub fn backward<T: Logit, I: TokenId>(
    inputs: BackwardInputs<T, I>,
    sizes: Sizes,
    options: &LinearOptions,
    mut outputs: BackwardOutputs<T>,
) -> Result<()> {
    let Sizes { hidden_size, vocab, .. } = sizes;
    let work = Work::of(&inputs.forward, sizes, options)?;
    let shape = (&[sizes.rows][..], hidden_size, vocab);
    inputs.try_map(shape, &mut Lengths(OP))?;
    outputs.try_map(shape, &mut Lengths(OP))?;
    let given = [inputs.grad_entropy.is_some(), inputs.entropy.is_some()];
    Error::check_given(OP, ["grad_entropy", "entropy"], given)?;

    let count = work.targets.len();
    let gather = |values: &[f32]| work.gather(values);
    let [max, log_sum] = [inputs.max, inputs.log_sum].map(gather);
    let [entropy, grad_logp, grad_entropy] =
        [inputs.entropy, inputs.grad_logp, inputs.grad_entropy].map(|given| given.map(gather));
    let known = rows::InPlaceInputs {
        entropy: entropy.as_deref(),
        grad_logp: grad_logp.as_deref(),
        grad_entropy: grad_entropy.as_deref(),
        ..rows::InPlaceInputs::new(&work.targets, &max, &log_sum)
    };
    let BackwardOutputs { grad_hidden, mut grad_weight, mut grad_bias } = outputs;
    let mut hidden_sums = vec![0.0; if grad_hidden.is_some() { count * hidden_size } else { 0 }];
    let mut capped = Vec::new();
    let ones = vec![1.0; if grad_bias.is_some() { count } else { 0 }];
    let mut tile = work.tile();
    for columns in work.columns() {
        let (first, width) = (columns.start, columns.len());
        work.logits(columns.clone(), &mut tile);
        let grad = &mut tile[..count * width];
        if work.limit.is_some() {
            capped.clear();
            capped.extend_from_slice(grad);
        }
        let outputs = rows::BackwardOutputs { grad_logits: &mut *grad };
        let place = work.of_vocab(columns.clone());
        rows::backward_in_place(known, count, place, &work.options, outputs)?;
        work.gradient_of_products(grad, &capped, width);
        let grad = Matrix { data: grad, rows: count, columns: width };
        if grad_hidden.is_some() {
            grad.times(work.weight(columns.clone()).matrix(hidden_size), true, &mut hidden_sums);
        }
        if let Some(grad_weight) = &mut grad_weight {
            let into = &mut grad_weight[first * hidden_size..][..width * hidden_size];
            grad.transposed_times(work.hidden.matrix(hidden_size), into);
        }
        if let Some(grad_bias) = &mut grad_bias {
            let ones = Matrix { data: &ones, rows: count, columns: 1 };
            grad.transposed_times(ones, &mut grad_bias[first..][..width]);
        }
    }
    if let Some(grad) = grad_hidden {
        match &work.kept {
            None => round(&hidden_sums, grad),
            Some(kept) => {
                grad.fill(T::ZERO);
                for (&row, sums) in kept.iter().zip(hidden_sums.chunks(hidden_size)) {
                    round(sums, &mut grad[row * hidden_size..][..hidden_size]);
                }
            }
        }
    }
    Ok(())
}

fn round<T: Logit>(from: &[f32], to: &mut [T]) {
    for_each(to.len(), GRAIN, (from, to), |_, _, (from, to)| {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = T::from_f32(from);
        }
    });
}

/// The rows that take part, in f32, and what they are worked on with.
struct Work<'a, T> {
    hidden: Numbers<'a>,
    weight: &'a [T],
    bias: Option<&'a [T]>,
    targets: Vec<i64>,
    /// Which rows take part; all of them if it is `None`.
    kept: Option<Vec<usize>>,
    sizes: Sizes,
    tile_bytes: usize,
    /// The factor of each row's products, where the row passes do not know it.
    scales: Option<Vec<f32>>,
    /// The largest number that a logit of each row may be.
    limit: Option<Vec<f32>>,
    options: LogprobOptions,
}

impl<'a, T: Logit> Work<'a, T> {
    fn of<I: TokenId>(
        inputs: &ForwardInputs<'a, T, I>,
        sizes: Sizes,
        options: &LinearOptions,
    ) -> Result<Self> {
        let Sizes { rows, hidden_size, vocab } = sizes;
        options.validate()?;
        let made = inputs.temperatures.is_some() || options.softcap.is_some();
        let of_rows = options.of_rows(made)?;
        for (arg, size) in [("hidden", hidden_size), ("weight", vocab)] {
            if size == 0 {
                let (expected, got) = ("sizes above 0".into(), format!("{sizes:?}"));
                return Err(Error::Shape { op: OP, arg, expected, got });
            }
        }
        inputs.try_map((&[rows], hidden_size, vocab), &mut Lengths(OP))?;
        let ignored = LogprobOptions { ignore_index: options.ignore_index, ..of_rows };
        rows::check_targets(inputs.targets, vocab, &ignored)?;

        let counts = |id: i64| options.ignore_index != Some(id);
        let ids = inputs.targets.iter().map(|target| target.id());
        let targets: Vec<i64> = ids.clone().filter(|&id| counts(id)).collect();
        let (kept, hidden) = if targets.len() == rows {
            (None, Numbers::of(inputs.hidden))
        } else {
            let places: Vec<usize> =
                ids.enumerate().filter(|&(_, id)| counts(id)).map(|(row, _)| row).collect();
            let rows = places.iter().map(|row| &inputs.hidden[row * hidden_size..][..hidden_size]);
            let numbers = rows.flatten().map(|x| x.to_f32()).collect();
            (Some(places), Numbers(Cow::Owned(numbers)))
        };
        let mut work = Self {
            hidden,
            weight: inputs.weight,
            bias: inputs.bias,
            targets,
            kept,
            sizes,
            tile_bytes: options.tile_bytes,
            scales: None,
            limit: None,
            options: of_rows,
        };
        if made {
            let given = inputs.temperatures.map(|given| work.gather(given));
            let given = given.unwrap_or_else(|| vec![1.0; work.targets.len()]);
            if let Some(&wrong) = given.iter().find(|t| !(t.is_finite() && **t > 0.0)) {
                let (wrong, expected) = (f64::from(wrong), "finite numbers above 0");
                Error::check_option(OP, "temperatures", wrong, false, expected)?;
            }
            let over = |x: f64| {
                let of_row = |&t: &f32| (x / (options.temperature * f64::from(t))) as f32;
                given.iter().map(of_row).collect::<Vec<f32>>()
            };
            work.scales = Some(over(options.logit_scale));
            work.limit = options.softcap.map(over);
        }
        Ok(work)
    }

    /// Makes logits of products: c tanh(s y / c) / τ, where the row passes do not do it.
    fn make_logits(&self, tile: &mut [f32], width: usize) {
        let Some(scales) = &self.scales else { return };
        self.each_row(tile, width, |row, z| {
            let (scale, limit) = (scales[row], self.limit.as_ref().map(|limit| limit[row]));
            match limit {
                None => z.iter_mut().for_each(|z| *z *= scale),
                Some(limit) => z.iter_mut().for_each(|z| *z = limit * tanh(*z * scale / limit)),
            }
        });
    }

    /// Makes gradients of products of those of the logits, of which `capped` has a copy if there is a limit.
    fn gradient_of_products(&self, grad: &mut [f32], capped: &[f32], width: usize) {
        let Some(scales) = &self.scales else { return };
        self.each_row(grad, width, |row, grad| {
            let scale = scales[row];
            match self.limit.as_ref().map(|limit| limit[row]) {
                None => grad.iter_mut().for_each(|grad| *grad *= scale),
                Some(limit) => {
                    for (grad, z) in grad.iter_mut().zip(&capped[row * width..]) {
                        let tanh = z / limit;
                        *grad *= scale * (1.0 - tanh * tanh);
                    }
                }
            }
        });
    }

    fn each_row(&self, tile: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
        let rows = RowsMut { data: tile, width };
        for_each(self.targets.len(), GRAIN / width, rows, |first, count, mut rows| {
            vectorise(
                #[inline(always)]
                || (0..count).for_each(|row| f(first + row, rows.row(row))),
            );
        });
    }

    /// Columns of a tile that is not the last.
    fn width(&self) -> usize {
        let most = self.tile_bytes / (size_of::<f32>() * self.targets.len().max(1));
        let most = most / LEAST_COLUMNS * LEAST_COLUMNS;
        most.max(LEAST_COLUMNS).min(self.sizes.vocab)
    }

    fn tile(&self) -> Vec<f32> {
        vec![0.0; self.targets.len() * self.width()]
    }

    fn columns(&self) -> impl Iterator<Item = Range<usize>> {
        let (width, vocab) = (self.width(), self.sizes.vocab);
        (0..vocab).step_by(width).map(move |first| first..vocab.min(first + width))
    }

    fn of_vocab(&self, columns: Range<usize>) -> Columns {
        Columns { first: columns.start, count: columns.len(), vocab: self.sizes.vocab }
    }

    /// Rows of the weight.
    fn weight(&self, columns: Range<usize>) -> Numbers<'a> {
        let width = self.sizes.hidden_size;
        Numbers::of(&self.weight[columns.start * width..columns.end * width])
    }

    /// h Wᵀ + b of some columns, at the beginning of the tile.
    fn logits<'t>(&self, columns: Range<usize>, tile: &'t mut [f32]) -> &'t [f32] {
        let (count, width) = (self.targets.len(), columns.len());
        let tile = &mut tile[..count * width];
        if let Some(bias) = self.bias {
            let bias = Numbers::of(&bias[columns.clone()]);
            tile.chunks_mut(width).for_each(|row| row.copy_from_slice(&bias));
        }
        let hidden = self.hidden.matrix(self.sizes.hidden_size);
        let weight = self.weight(columns);
        hidden.times_transposed(weight.matrix(self.sizes.hidden_size), self.bias.is_some(), tile);
        self.make_logits(tile, width);
        tile
    }

    /// The values of the rows that take part, out of one for each row.
    fn gather(&self, values: &[f32]) -> Vec<f32> {
        match &self.kept {
            None => values.to_vec(),
            Some(kept) => kept.iter().map(|&row| values[row]).collect(),
        }
    }

    /// Values of the rows that take part in their places, 0 in all others.
    fn spread(&self, values: &[f32], output: &mut [f32]) {
        match &self.kept {
            None => output.copy_from_slice(values),
            Some(kept) => {
                output.fill(0.0);
                kept.iter().zip(values).for_each(|(&row, &value)| output[row] = value);
            }
        }
    }
}

/// tanh x to some ulp.
#[inline(always)]
fn tanh(x: f32) -> f32 {
    // Of -2|x|, which does not overflow.
    let e = exp_m1(-2.0 * x.abs());
    -e / (2.0 + e) * if x < 0.0 { -1.0 } else { 1.0 }
}

/// An argument in f32.
struct Numbers<'a>(Cow<'a, [f32]>);

impl std::ops::Deref for Numbers<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl<'a> Numbers<'a> {
    fn of<T: Logit>(numbers: &'a [T]) -> Self {
        if let Ok(same) = bytemuck::try_cast_slice(numbers) {
            if T::NAME == f32::NAME {
                return Self(Cow::Borrowed(same));
            }
        }
        let mut wide = vec![0.0; numbers.len()];
        for_each(numbers.len(), GRAIN, (numbers, &mut wide[..]), |_, _, (from, to)| {
            for (to, from) in to.iter_mut().zip(from) {
                *to = from.to_f32();
            }
        });
        Self(Cow::Owned(wide))
    }

    fn matrix(&self, columns: usize) -> Matrix<'_> {
        Matrix { data: &self.0, rows: self.0.len() / columns, columns }
    }
}

/// A matrix `[rows, columns]`, row by row.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
}

impl Matrix<'_> {
    /// `into = self otherᵀ`, or added to it.
    fn times_transposed(self, other: Matrix, adds: bool, into: &mut [f32]) {
        let strides = [[1, self.columns], [other.columns, 1]];
        product([self.rows, other.rows, self.columns], self.data, other.data, strides, adds, into);
    }

    /// `into = self other`, or added to it.
    fn times(self, other: Matrix, adds: bool, into: &mut [f32]) {
        let strides = [[1, self.columns], [1, other.columns]];
        let shape = [self.rows, other.columns, self.columns];
        product(shape, self.data, other.data, strides, adds, into);
    }

    /// `into = selfᵀ other`, rounded.
    fn transposed_times<T: Logit>(self, other: Matrix, into: &mut [T]) {
        let strides = [[self.columns, 1], [1, other.columns]];
        let shape = [self.columns, other.columns, self.rows];
        let product_into =
            |into: &mut [f32]| product(shape, self.data, other.data, strides, false, into);
        if T::NAME == f32::NAME {
            return product_into(bytemuck::cast_slice_mut(into));
        }
        let mut wide = vec![0.0; into.len()];
        product_into(&mut wide);
        round(&wide, into);
    }
}

/// `into = a b`, or added to it, of shape `[m, n]`, with sums over k; strides from column to column and
/// from row to row.
fn product(
    [m, n, k]: [usize; 3],
    a: &[f32],
    b: &[f32],
    strides: [[usize; 2]; 2],
    adds: bool,
    into: &mut [f32],
) {
    assert!(a.len() == m * k && b.len() == k * n && into.len() == m * n, "of these sizes");
    let [[a_column, a_row], [b_column, b_row]] = strides.map(|s| s.map(|stride| stride as isize));
    let threads = match num_threads() {
        1 => gemm::Parallelism::None,
        threads => gemm::Parallelism::Rayon(threads),
    };
    // SAFETY: the matrices are of these sizes, row by row or column by column, and `into` is another's.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            into.as_mut_ptr(),
            1,
            n as isize,
            adds,
            a.as_ptr(),
            a_column,
            a_row,
            b.as_ptr(),
            b_column,
            b_row,
            1.0,
            1.0,
            false,
            false,
            false,
            threads,
        );
    }
}
