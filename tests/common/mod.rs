//! What the tests of all ops share: golden vectors, random inputs, comparisons, devices.
#![allow(dead_code)] // each test binary uses its own part

pub mod logprob_cases;
#[cfg(feature = "simt")]
pub mod simt;

use candle_core::{DType, Device, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value};

/// The devices on which every case runs. With the feature `cuda` a machine without a GPU fails: what
/// was asked for is not skipped.
pub fn devices() -> Vec<Device> {
    let mut devices = vec![Device::Cpu];
    if cfg!(feature = "cuda") {
        devices.push(Device::new_cuda(0).expect("the feature `cuda` is tested on a GPU"));
    }
    devices
}

/// One golden case: what a peer's own function returned.
pub struct Golden {
    pub id: String,
    pub peer: String,
    pub function: String,
    pub dtype: String,
    pub inputs: Map<String, Value>,
    pub outputs: Map<String, Value>,
}

/// The cases of `tests/golden/FILE.json`, with `same_inputs_as` filled in.
pub fn golden(file: &str) -> Vec<Golden> {
    let path = format!("{}/tests/golden/{file}.json", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let raw: Vec<Value> = serde_json::from_str(&text).unwrap();
    let mut cases: Vec<Golden> = Vec::new();
    for case in &raw {
        let text = |key: &str| case[key].as_str().unwrap().to_string();
        let mut inputs = case["inputs"].as_object().unwrap().clone();
        if let Some(Value::String(id)) = inputs.remove("same_inputs_as") {
            let earlier = cases.iter().find(|c| c.id == id).unwrap();
            for (key, value) in &earlier.inputs {
                inputs.entry(key.clone()).or_insert_with(|| value.clone());
            }
        }
        cases.push(Golden {
            id: text("id"),
            peer: text("peer"),
            function: text("function"),
            dtype: text("dtype"),
            inputs,
            outputs: case["outputs"].as_object().unwrap().clone(),
        });
    }
    cases
}

impl Golden {
    /// An input array, flattened in row-major order.
    pub fn input(&self, key: &str) -> Vec<f64> {
        let value = self.inputs.get(key);
        flatten(value.unwrap_or_else(|| panic!("{}: no input {key}", self.id)))
    }

    /// An output array (or number), flattened in row-major order.
    pub fn output(&self, key: &str) -> Vec<f64> {
        let value = self.outputs.get(key);
        flatten(value.unwrap_or_else(|| panic!("{}: no output {key}", self.id)))
    }

    /// The shape of an input array.
    pub fn shape(&self, key: &str) -> Vec<usize> {
        let mut value = &self.inputs[key];
        let mut shape = Vec::new();
        while let Value::Array(items) = value {
            shape.push(items.len());
            match items.first() {
                Some(first) => value = first,
                None => break,
            }
        }
        shape
    }

    /// A scalar input.
    pub fn number(&self, key: &str) -> f64 {
        self.input(key)[0]
    }

    /// A scalar input that may be missing or null.
    pub fn optional(&self, key: &str) -> Option<f64> {
        match self.inputs.get(key) {
            None | Some(Value::Null) => None,
            Some(_) => Some(self.number(key)),
        }
    }

    /// A string input.
    pub fn text(&self, key: &str) -> &str {
        self.inputs[key].as_str().unwrap()
    }

    /// The mask input as bytes.
    pub fn mask(&self, key: &str) -> Vec<u8> {
        self.input(key).iter().map(|&m| u8::from(m != 0.0)).collect()
    }
}

/// The numbers of nested lists, in order.
pub fn flatten(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(items) => items.iter().flat_map(flatten).collect(),
        Value::Number(n) => vec![n.as_f64().unwrap()],
        Value::Bool(b) => vec![f64::from(u8::from(*b))],
        Value::String(s) => vec![match s.as_str() {
            "nan" => f64::NAN,
            "inf" => f64::INFINITY,
            "-inf" => f64::NEG_INFINITY,
            other => panic!("not a number: {other}"),
        }],
        other => panic!("not a number: {other}"),
    }
}

/// Asserts |got - want| <= abs + rel * |want|, elementwise; NaN equals NaN and inf equals inf.
#[track_caller]
pub fn assert_close(what: &str, got: &[f64], want: &[f64], rel: f64, abs: f64) {
    assert_eq!(got.len(), want.len(), "{what}: lengths differ");
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let same = g == w || (g.is_nan() && w.is_nan());
        assert!(
            same || (g - w).abs() <= abs + rel * w.abs(),
            "{what}: element {i} is {g}, expected {w} (rel {rel}, abs {abs})"
        );
    }
}

/// The derivative of `f` with respect to each element of `x`, by central differences in f64.
pub fn finite_difference(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let (at, step) = (x[i], 1e-5);
            x[i] = at + step;
            let above = f(&x);
            x[i] = at - step;
            let below = f(&x);
            x[i] = at;
            (above - below) / (2.0 * step)
        })
        .collect()
}

/// A generator with a fixed seed.
pub fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// `n` values drawn evenly from [-scale, scale).
pub fn uniform(rng: &mut StdRng, n: usize, scale: f32) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-1.0..1.0) * scale).collect()
}

/// `n` mask bytes, each 1 with probability `keep`.
pub fn random_mask(rng: &mut StdRng, n: usize, keep: f64) -> Vec<u8> {
    (0..n).map(|_| u8::from(rng.random_bool(keep))).collect()
}

/// f32 values as f64.
pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

/// The dot product, for a scalar loss with the upstream gradient `g`.
pub fn dot(g: &[f64], x: &[f64]) -> f64 {
    g.iter().zip(x).map(|(a, b)| a * b).sum()
}

/// A tensor's elements, whatever its dtype and layout, in row-major order as f64.
pub fn to_vec(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    flat.to_vec1().unwrap()
}

/// The same values behind strides that are not contiguous and an offset that is not zero.
pub fn strided(tensor: &Tensor) -> Tensor {
    let last = tensor.rank() - 1;
    let pad = tensor.zeros_like().unwrap();
    let wide = Tensor::cat(&[&pad, tensor], last).unwrap();
    let n = tensor.dim(last).unwrap();
    let view = wide.narrow(last, n, n).unwrap();
    assert_eq!(view.dims(), tensor.dims());
    view
}

/// Runs `f` on a pool of that many threads.
pub fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    pool.build().unwrap().install(f)
}
