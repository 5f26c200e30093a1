//! Packs: rows of different lengths, one behind the other in flat arrays of tokens, without padding.
//!
//! An op that takes them has an optional input `offsets`, i64 `[B + 1]`. With it every array of one value a
//! token is `[N]` in the place of `[B, T]`, and row b is the tokens `offsets[b]..offsets[b + 1]`: the first
//! offset is 0, none is below the one before, and the last is N. Rows may be empty. It is the same for all ops:
//!
//! - A function of `batch` and `seq_len` takes B and N: the tokens of all rows, where padded rows have T each.
//!   So do the C structs. Tensors and NumPy arrays are `[N]`, and the offsets say what B is.
//! - What there is one of for a row, scores say, is `[B]` as before. A mask may be given as well, `[N]`.
//! - Where an option needs T, it is the longest row.
//! - No padded copy is made anywhere. What there is of tokens and of rows has the bits that it has in a padded
//!   batch, at the same denominator; sums over all rows add up in another order.
//! - On the CPU the offsets are checked, and rows shared out to threads by their tokens. On CUDA to look at
//!   them would cost a wait: there they are not checked, and what falls outside of 0..N is brought back to it, so
//!   that results may be wrong, but nothing else is touched.
//!
//! [`whiten`](crate::whiten) and [`kl`](crate::kl) take tokens of any shape, packs too, and need no offsets.

use std::ops::Range;

use crate::cpu::{Split, TokenId};
use crate::error::{Error, Result};

/// The sizes that the shapes of an op's arrays are made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BatchShape {
    sizes: [usize; 2],
    is_packed: bool,
}

impl BatchShape {
    /// B rows of T tokens, or of N in all if there are offsets.
    pub(crate) fn new(batch: usize, seq_len: usize, is_packed: bool) -> Self {
        Self { sizes: [batch, seq_len], is_packed }
    }

    /// B.
    pub(crate) fn batch(&self) -> usize {
        self.sizes[0]
    }

    /// T, or N.
    pub(crate) fn seq_len(&self) -> usize {
        self.sizes[1]
    }

    pub(crate) fn is_packed(&self) -> bool {
        self.is_packed
    }

    /// The tokens of all rows.
    pub(crate) fn count_tokens(&self) -> usize {
        self.tokens().iter().fold(1, |product: usize, &size| product.saturating_mul(size))
    }

    /// The shape of one value a token.
    pub(crate) fn tokens(&self) -> &[usize] {
        &self.sizes[usize::from(self.is_packed)..]
    }

    /// The shape of one value a row.
    pub(crate) fn rows(&self) -> &[usize] {
        &self.sizes[..1]
    }

    /// The shape of the offsets.
    pub(crate) fn offsets(&self) -> [usize; 1] {
        [self.sizes[0].saturating_add(1)]
    }
}

/// Where the rows of a batch are among its tokens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowRanges<'a> {
    seq_len: usize,
    offsets: Option<&'a [i64]>,
}

impl<'a> RowRanges<'a> {
    /// Rows of `seq_len` tokens, or those of a pack of `seq_len` in all, whose offsets are checked.
    pub(crate) fn new(
        op: &'static str,
        seq_len: usize,
        offsets: Option<&'a [i64]>,
    ) -> Result<Self> {
        if let Some(offsets) = offsets {
            check_offsets(op, offsets, seq_len)?;
        }
        Ok(Self { seq_len, offsets })
    }

    #[inline(always)]
    pub(crate) fn start(&self, row: usize) -> usize {
        match self.offsets {
            Some(offsets) => offsets[row] as usize,
            None => row * self.seq_len,
        }
    }

    #[inline(always)]
    pub(crate) fn range(&self, row: usize) -> Range<usize> {
        self.start(row)..self.start(row + 1)
    }

    /// Whether the rows are those of a pack.
    pub(crate) fn is_packed(&self) -> bool {
        self.offsets.is_some()
    }

    /// The row that a token is in.
    #[inline(always)]
    pub(crate) fn row_of(&self, token: usize) -> usize {
        match self.offsets {
            // The last that begins there or before: those before it, if they begin there too, are empty.
            Some(offsets) => offsets.partition_point(|&offset| offset <= token as i64) - 1,
            None => token / self.seq_len,
        }
    }

    /// The length of the longest of `count` rows.
    pub(crate) fn longest(&self, count: usize) -> usize {
        match self.offsets {
            Some(_) => (0..count).map(|row| self.range(row).len()).max().unwrap_or(0),
            None => self.seq_len,
        }
    }

    /// Where to cut `count` rows from `first` on in two of about as many tokens; `None` where they have no
    /// more than `grain`, or there is but one.
    pub(crate) fn middle(&self, first: usize, count: usize, grain: usize) -> Option<usize> {
        let (start, end) = (self.start(first), self.start(first + count));
        if count < 2 || end - start <= grain {
            return None;
        }
        let Some(offsets) = self.offsets else {
            let whole = (grain / self.seq_len).max(1);
            return (count > whole).then(|| count.div_ceil(whole).div_ceil(2) * whole);
        };
        // The first row that begins behind half of the tokens.
        let half = start.midpoint(end) as i64;
        let rows = offsets[first..first + count].partition_point(|&offset| offset <= half);
        Some(rows.clamp(1, count - 1))
    }
}

/// `Ok` when offsets begin at 0, never fall, and end at the number of tokens.
pub(crate) fn check_offsets(op: &'static str, offsets: &[i64], tokens: usize) -> Result<()> {
    let refuse = |index: usize, expected| {
        Err(Error::Value { op, arg: "offsets", index, expected, got: offsets[index] })
    };
    let (Some(first), Some(last)) = (offsets.first(), offsets.last()) else {
        let (expected, got) = ("[B + 1]".into(), "[0]".into());
        return Err(Error::Shape { op, arg: "offsets", expected, got });
    };
    if *first != 0 {
        return refuse(0, "0, where the first row begins");
    }
    if let Some(row) = offsets.windows(2).position(|pair| pair[1] < pair[0]) {
        return refuse(row + 1, "no less than the one before: rows come one behind the other");
    }
    if usize::try_from(*last) != Ok(tokens) {
        return refuse(offsets.len() - 1, "the number of tokens, where the last row ends");
    }
    Ok(())
}

/// Rows of a mutable slice of one value a token.
pub(crate) struct RangesMut<'a, T> {
    data: &'a mut [T],
    ranges: RowRanges<'a>,
    first: usize,
}

impl<'a, T> RangesMut<'a, T> {
    pub(crate) fn new(data: &'a mut [T], ranges: RowRanges<'a>) -> Self {
        Self { data, ranges, first: 0 }
    }

    /// Row `index` of these.
    #[inline(always)]
    pub(crate) fn row(&mut self, index: usize) -> &mut [T] {
        let Range { start, end } = self.ranges.range(self.first + index);
        let before = self.ranges.start(self.first);
        &mut self.data[start - before..end - before]
    }
}

impl<T: Send> Split for RangesMut<'_, T> {
    fn split(self, mid: usize) -> (Self, Self) {
        let Self { data, ranges, first } = self;
        let (a, b) = data.split_at_mut(ranges.start(first + mid) - ranges.start(first));
        (Self { data: a, ranges, first }, Self { data: b, ranges, first: first + mid })
    }
}

/// The targets of a pack's tokens: for each the next token of its row, and `ignore` for the last, which has
/// none. A label that crosses into the next row would train on another sequence.
///
/// # Errors
/// If the offsets do not begin at 0, fall, or do not end at the number of tokens.
///
/// ```
/// use ppo_kernels::pack::targets_from_tokens;
///
/// let targets = targets_from_tokens(&[5_i64, 6, 7, 8], &[0, 3, 3, 4], -100)?;
/// assert_eq!(targets, [6, 7, -100, -100]);
/// # Ok::<(), ppo_kernels::Error>(())
/// ```
pub fn targets_from_tokens<I: TokenId>(tokens: &[I], offsets: &[i64], ignore: I) -> Result<Vec<I>> {
    check_offsets("targets_from_tokens", offsets, tokens.len())?;
    let mut targets = tokens.to_vec();
    for row in offsets.windows(2).filter(|row| row[0] < row[1]) {
        let row = &mut targets[row[0] as usize..row[1] as usize];
        row.rotate_left(1);
        *row.last_mut().expect("not empty") = ignore;
    }
    Ok(targets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_cut_where_half_of_their_tokens_are() {
        let ranges = |offsets| RowRanges::new("op", 20, Some(offsets)).unwrap();
        let uneven = ranges(&[0, 1, 2, 3, 19, 20]);
        assert_eq!(uneven.middle(0, 5, 4), Some(4));
        assert_eq!(uneven.middle(0, 4, 4), Some(3));
        assert_eq!(uneven.middle(0, 3, 3), None, "no more than the grain");
        assert_eq!(uneven.middle(3, 1, 4), None, "a single row");
        // Empty ones at the ends go with others.
        let empty = ranges(&[0, 0, 0, 20, 20]);
        assert_eq!(empty.middle(0, 4, 4), Some(3));
        assert_eq!(empty.middle(2, 2, 4), Some(1));
        let padded = RowRanges::new("op", 10, None).unwrap();
        assert_eq!((padded.middle(0, 8, 20), padded.middle(0, 2, 20)), (Some(4), None));
    }

    #[test]
    fn every_token_is_in_its_row() {
        let offsets = [0, 0, 3, 3, 3, 5, 6, 6];
        let ranges = RowRanges::new("op", 6, Some(&offsets)).unwrap();
        let rows: Vec<usize> = (0..6).map(|token| ranges.row_of(token)).collect();
        assert_eq!(rows, [1, 1, 1, 4, 4, 5]);
        assert!((0..6).all(|token| ranges.range(rows[token]).contains(&token)));
        assert_eq!(ranges.longest(7), 3);
    }

    #[test]
    fn targets_of_what_is_no_pack_are_refused() {
        let refused = |offsets: &[i64], words: &str| {
            let error = targets_from_tokens(&[1_u32, 2], offsets, 0).unwrap_err().to_string();
            assert!(error.starts_with("targets_from_tokens: `offsets`"), "{error}");
            assert!(error.contains(words), "{error}");
        };
        refused(&[1, 2], "expected 0");
        refused(&[0, 2, 1, 2], "`offsets`[2] is 1");
        refused(&[0, 3], "number of tokens");
        refused(&[], "[B + 1]");
        let none: [u32; 0] = targets_from_tokens(&[], &[0, 0, 0], 9).unwrap().try_into().unwrap();
        assert!(none.is_empty());
    }
}
