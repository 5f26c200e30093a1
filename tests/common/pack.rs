//! Packs of padded batches: the same rows without what lies behind their ends.

use rand::rngs::StdRng;
use rand::Rng;

/// Where the tokens of a padded batch are in a pack, and the other way round.
#[derive(Debug, Clone)]
pub struct Pack {
    pub offsets: Vec<i64>,
    seq_len: usize,
}

impl Pack {
    /// Rows of these lengths, of a batch that is `seq_len` wide.
    pub fn new(lengths: &[usize], seq_len: usize) -> Self {
        assert!(lengths.iter().all(|&length| length <= seq_len));
        let mut offsets = vec![0];
        for &length in lengths {
            offsets.push(offsets[offsets.len() - 1] + length as i64);
        }
        Self { offsets, seq_len }
    }

    /// Rows of any length, one of them empty and one full where there are as many.
    pub fn random(rng: &mut StdRng, batch: usize, seq_len: usize) -> Self {
        let mut lengths: Vec<usize> = (0..batch).map(|_| rng.random_range(0..=seq_len)).collect();
        if let [first, .., last] = &mut lengths[..] {
            (*first, *last) = (0, seq_len);
        }
        Self::new(&lengths, seq_len)
    }

    pub fn batch(&self) -> usize {
        self.offsets.len() - 1
    }

    pub fn tokens(&self) -> usize {
        self.offsets[self.batch()] as usize
    }

    pub fn length(&self, row: usize) -> usize {
        (self.offsets[row + 1] - self.offsets[row]) as usize
    }

    /// The pack's tokens as places in the padded batch.
    fn places(&self) -> impl Iterator<Item = usize> + use<'_> {
        (0..self.batch()).flat_map(|row| {
            let start = row * self.seq_len;
            start..start + self.length(row)
        })
    }

    /// What is not padding.
    pub fn pack<T: Copy>(&self, padded: &[T]) -> Vec<T> {
        assert_eq!(padded.len(), self.batch() * self.seq_len);
        self.places().map(|place| padded[place]).collect()
    }

    /// The other way round, with something in the padding.
    pub fn pad<T: Copy>(&self, packed: &[T], padding: T) -> Vec<T> {
        let mut padded = vec![padding; self.batch() * self.seq_len];
        for (place, &x) in self.places().zip(packed) {
            padded[place] = x;
        }
        padded
    }

    /// A mask of the padded batch that hides the padding too.
    pub fn hide(&self, mask: &[u8]) -> Vec<u8> {
        self.pad(&self.pack(mask), 0)
    }
}

/// Offsets that are none of 6 tokens in two rows, and what is said of them.
pub const BAD_OFFSETS: [([i64; 3], [&str; 2]); 4] = [
    ([1, 2, 6], ["`offsets`[0] is 1", "expected 0"]),
    ([0, 7, 6], ["`offsets`[2] is 6", "no less than the one before"]),
    ([0, -1, 6], ["`offsets`[1] is -1", "no less than the one before"]),
    ([0, 2, 5], ["`offsets`[2] is 5", "number of tokens"]),
];

/// Offsets that no device may go astray with.
pub const WILD_OFFSETS: [[i64; 3]; 5] =
    [[i64::MIN, i64::MAX, 6], [0, 1 << 40, -5], [-7, 3, i64::MAX], [6, 0, 6], [2, 4, 5]];
