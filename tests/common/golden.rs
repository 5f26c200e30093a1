//! Golden vectors: what other projects' functions returned.

use serde_json::{Map, Value};

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
    // From the package's folder, where tests are run.
    let path = format!("tests/golden/{file}.json");
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
