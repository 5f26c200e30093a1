//! A pack of 64 rows of 1 to 2048 tokens, 512 in the mean, and the same rows with padding.

pub const ROWS: usize = 64;
pub const WIDTH: usize = 2048;

/// The group of an op's rows, packed or padded.
pub fn group(op: &str, packed: bool) -> (String, String) {
    match packed {
        true => (format!("{op}_packed"), format!("f32_{ROWS}x512")),
        false => (format!("{op}_padded"), format!("f32_{ROWS}x{WIDTH}")),
    }
}

/// Where the rows begin.
pub fn offsets() -> Vec<i64> {
    let mut offsets = vec![0];
    for row in 0..ROWS {
        // Few long ones among many short ones, in no order.
        let share = ((row * 37 + 5) % ROWS) as f64 / (ROWS - 1) as f64;
        let length = 1.0 + (WIDTH - 1) as f64 * share.powi(3);
        offsets.push(offsets[row] + length as i64);
    }
    offsets
}

/// The rows' tokens, of what every token of the padded batch has.
pub fn pack<T: Copy>(offsets: &[i64], padded: &[T]) -> Vec<T> {
    let rows = padded.chunks(WIDTH).zip(offsets.windows(2));
    rows.flat_map(|(row, at)| &row[..(at[1] - at[0]) as usize]).copied().collect()
}

/// 1 for the rows' tokens, and 0 for the padding.
pub fn mask(offsets: &[i64]) -> Vec<u8> {
    let row = |at: &[i64]| {
        let length = (at[1] - at[0]) as usize;
        (0..WIDTH).map(move |t| u8::from(t < length))
    };
    offsets.windows(2).flat_map(row).collect()
}
