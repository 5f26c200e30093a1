//! `ppo-kernels bench-table`: what `cargo bench` left in target/criterion, as a Markdown table.
//!
//! | column | meaning |
//! |---|---|
//! | op | op and pass |
//! | shape | dtype of the logits or tokens, and shape |
//! | time | median time of a call of this crate |
//! | GB/s | least memory traffic of the pass over that time; a billion bytes is a GB |
//! | over candle | how many times as long the composition of candle's own ops takes |
//! | of the limit | share of the speed at which this machine moves the least traffic and does nothing else |
//!
//! A group of benches is `OP_PASS/DTYPE_SHAPE`, and its functions are `fused`, `candle` and `limit`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};
use clap::Args;
use serde::de::DeserializeOwned;
use serde::Deserialize;

/// The command line of `bench-table`.
#[derive(Debug, Args)]
pub struct BenchTableArgs {
    /// Where criterion left its results
    #[arg(default_value = "target/criterion")]
    pub dir: PathBuf,
}

/// criterion's benchmark.json, as far as it is needed.
#[derive(Deserialize)]
struct Benchmark {
    group_id: String,
    function_id: Option<String>,
    throughput: Option<Throughput>,
}

#[derive(Deserialize)]
struct Throughput {
    #[serde(rename = "Bytes")]
    bytes: Option<f64>,
}

/// criterion's estimates.json, as far as it is needed. Times are in nanoseconds.
#[derive(Deserialize)]
struct Estimates {
    median: Estimate,
}

#[derive(Deserialize)]
struct Estimate {
    point_estimate: f64,
}

/// The functions of a group: median nanoseconds each, and the bytes that all of them count.
#[derive(Default)]
struct Group {
    medians: BTreeMap<String, f64>,
    bytes: Option<f64>,
}

/// The table of the results below `dir`.
///
/// # Errors
/// If there are none, a file cannot be read, or a group lacks `fused`.
pub fn table(dir: &Path) -> Result<String> {
    let groups = read(dir)?;
    ensure!(!groups.is_empty(), "no results in {}; `cargo bench` makes them", dir.display());
    let mut table = String::from(
        "| op | shape | time | GB/s | over candle | of the limit |\n|---|---|--:|--:|--:|--:|\n",
    );
    for (name, group) in &groups {
        let (op, shape) = (&name.op, &name.shape);
        let median = |function: &str| group.medians.get(function).copied();
        let fused = median("fused").with_context(|| {
            format!("{op}/{shape} has no `fused`; run `cargo bench` without a filter for it")
        })?;
        let cell = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        let rate = cell(group.bytes.map(|bytes| format!("{:.1}", bytes / fused)));
        let factor = cell(median("candle").map(|candle| format!("{:.1}", candle / fused)));
        let share = cell(median("limit").map(|limit| format!("{:.0}%", 100.0 * limit / fused)));
        let time = duration(fused);
        table += &format!("| {op} | {shape} | {time} | {rate} | {factor} | {share} |\n");
    }
    Ok(table)
}

/// A group's id, in the order of the table: by op and dtype, then by the size of the shape.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    op: String,
    dtype: String,
    sizes: Vec<u64>,
    shape: String,
}

impl Name {
    fn new(group_id: &str) -> Self {
        let (op, shape) = group_id.split_once('/').unwrap_or((group_id, ""));
        let (dtype, sizes) = shape.split_once('_').unwrap_or((shape, ""));
        Self {
            op: op.into(),
            dtype: dtype.into(),
            sizes: sizes.split('x').filter_map(|size| size.parse().ok()).collect(),
            shape: shape.into(),
        }
    }
}

/// GROUP/FUNCTION/new/{benchmark,estimates}.json. Other directories are criterion's reports.
fn read(dir: &Path) -> Result<BTreeMap<Name, Group>> {
    let mut groups: BTreeMap<Name, Group> = BTreeMap::new();
    for group in directories(dir)? {
        for function in directories(&group)? {
            let new = function.join("new");
            if !new.is_dir() {
                continue;
            }
            let benchmark: Benchmark = json(&new.join("benchmark.json"))?;
            let estimates: Estimates = json(&new.join("estimates.json"))?;
            let group = groups.entry(Name::new(&benchmark.group_id)).or_default();
            group.bytes = group.bytes.or(benchmark.throughput.and_then(|t| t.bytes));
            let name = benchmark.function_id.unwrap_or_default();
            group.medians.insert(name, estimates.median.point_estimate);
        }
    }
    Ok(groups)
}

fn directories(dir: &Path) -> Result<Vec<PathBuf>> {
    let what = || format!("cannot list {}; `cargo bench` makes its results there", dir.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(what)? {
        let path = entry.with_context(what)?.path();
        if path.is_dir() {
            found.push(path);
        }
    }
    Ok(found)
}

fn json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text)
        .with_context(|| format!("{} is not what criterion writes", path.display()))
}

fn duration(nanoseconds: f64) -> String {
    let (value, unit) = match nanoseconds {
        n if n < 1e3 => (n, "ns"),
        n if n < 1e6 => (n / 1e3, "µs"),
        n if n < 1e9 => (n / 1e6, "ms"),
        n => (n / 1e9, "s"),
    };
    let digits = if value < 10.0 {
        2
    } else if value < 100.0 {
        1
    } else {
        0
    };
    format!("{value:.digits$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_three_digits_and_a_unit() {
        let got = [8.0, 999.0, 1234.0, 45_678_000.0, 2.5e9].map(duration);
        assert_eq!(got, ["8.00 ns", "999 ns", "1.23 µs", "45.7 ms", "2.50 s"]);
    }

    #[test]
    fn shapes_are_in_the_order_of_their_numbers() {
        let small = Name::new("gae/f32_64x2048");
        assert!(small < Name::new("gae/f32_512x2048"));
        assert!(small < Name::new("gae_shaping/f32_1x2"));
        assert!(Name::new("kl/bf16_512x8") < Name::new("kl/f32_1x8"));
    }
}
