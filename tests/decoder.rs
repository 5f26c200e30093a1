//! The driver's language model: against transformers' numbers, its gradients, its cache, what is
//! on disk, and sampling.

use approx::abs_diff_eq;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor, Var};
use ppo_kernels::driver::generate::{generate, sample, Drawn, Sampling};
use ppo_kernels::driver::load::{
    load, load_critic, load_reward, save, save_adapter, save_critic, save_reward, Loaded,
};
use ppo_kernels::driver::model::{
    Architecture, Critic, Decoder, DecoderConfig, KvCache, LayerType, Lora, RopeScaling,
};
use ppo_kernels::driver::tokenizer::Tokenizer;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// f32 against transformers' f32 (rounded to 1e-6 in the file), and between ways to compute the
/// same in another order of sums. Logits are of size 10.
const TOLERANCE: f32 = 3e-5;
const DEVICE: Device = Device::Cpu;
/// Damaged copies of each file of a model.
const DAMAGES: usize = 300;
/// Models of each kind, and how many weights they have.
const FIXTURES: [(&str, usize); 7] = [
    ("tiny-llama", 20),
    ("tiny-llama-shards", 21),
    ("tiny-mistral", 20),
    ("tiny-qwen2", 27),
    ("tiny-qwen3", 24),
    ("tiny-smollm3", 20),
    ("tiny-gemma", 20),
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn open(name: &str) -> Loaded {
    spoilt(name, |_| ()).unwrap()
}

fn tiny() -> Loaded {
    open("tiny-llama")
}

fn tiny_config() -> DecoderConfig {
    tiny().decoder.config().clone()
}

/// Left-padded ids, pads, and transformers' logits and hidden states, 0 at pads.
struct Expected {
    ids: Tensor,
    pads: Vec<usize>,
    logits: Vec<f32>,
    hidden: Vec<f32>,
}

fn expected(name: &str) -> Expected {
    let text = fs::read(fixture(name).join("expected.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let read = |key: &str| json[key].clone();
    let ids: Vec<Vec<u32>> = serde_json::from_value(read("ids")).unwrap();
    Expected {
        ids: Tensor::new(ids, &DEVICE).unwrap(),
        pads: serde_json::from_value(read("pads")).unwrap(),
        logits: serde_json::from_value(read("logits")).unwrap(),
        hidden: serde_json::from_value(read("hidden")).unwrap(),
    }
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[track_caller]
fn assert_near(got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    let worst =
        got.iter().zip(want).map(|(g, w)| if g.is_nan() { f32::NAN } else { (g - w).abs() });
    let worst = worst.fold(0f32, |a, b| if b.is_nan() { b } else { a.max(b) });
    assert!(worst <= TOLERANCE, "differs by {worst}");
}

/// Rows `[.., W]` of the tokens that are no pads, other rows 0.
fn without_pads(tensor: &Tensor, pads: &[usize]) -> Vec<f32> {
    let (_, len, width) = tensor.dims3().unwrap();
    let mut values = values(tensor);
    for (row, &pad) in values.chunks_exact_mut(len * width).zip(pads) {
        assert!(row.iter().all(|v| v.is_finite()), "pads must stay finite");
        row[..pad * width].fill(0.0);
    }
    values
}

fn assert_matches_transformers(decoder: &Decoder, name: &str) {
    let expected = expected(name);
    let hidden = decoder.hidden(&expected.ids, &expected.pads).unwrap();
    let logits = decoder.logits(&hidden).unwrap();
    assert_near(&without_pads(&hidden, &expected.pads), &expected.hidden);
    assert_near(&without_pads(&logits, &expected.pads), &expected.logits);
}

#[track_caller]
fn assert_refused<T>(result: anyhow::Result<T>, names: &[&str]) {
    let message = match result {
        Ok(_) => panic!("accepted, expected an error with {names:?}"),
        Err(error) => format!("{error:#}"),
    };
    for name in names {
        assert!(message.contains(name), "{message:?} does not name {name:?}");
    }
}

// ---- the model ----

#[test]
fn hidden_states_and_logits_are_those_of_transformers() {
    for (name, _) in FIXTURES {
        assert_matches_transformers(&open(name).decoder, name);
    }
}

#[test]
fn logits_of_chosen_positions_are_those_of_all() {
    let (decoder, expected) = (tiny().decoder, expected("tiny-llama"));
    let hidden = decoder.hidden(&expected.ids, &expected.pads).unwrap();
    let all = decoder.logits(&hidden).unwrap().narrow(1, 4, 3).unwrap();
    let some = decoder.logits(&hidden.narrow(1, 4, 3).unwrap()).unwrap();
    assert_eq!(some.dims(), [3, 3, 64]);
    assert_near(&values(&some), &values(&all));
}

#[test]
fn padding_changes_no_result() {
    let decoder = tiny().decoder;
    let expected = expected("tiny-llama");
    let len = expected.ids.dim(1).unwrap();
    let padded = decoder.hidden(&expected.ids, &expected.pads).unwrap();
    for (row, &pad) in expected.pads.iter().enumerate() {
        let tokens = |t: &Tensor| t.narrow(0, row, 1).unwrap().narrow(1, pad, len - pad).unwrap();
        let alone = decoder.hidden(&tokens(&expected.ids), &[0]).unwrap();
        assert_near(&values(&alone), &values(&tokens(&padded)));
    }
}

#[test]
fn steps_with_the_cache_are_the_full_pass() {
    for (name, _) in FIXTURES {
        let decoder = open(name).decoder;
        let Expected { ids, pads, .. } = expected(name);
        let (batch, len) = ids.dims2().unwrap();
        let full = decoder.logits(&decoder.hidden(&ids, &pads).unwrap()).unwrap();
        // Prompts and then one token at a time, in chunks, and all at once.
        let one_by_one = [vec![5], vec![1; len - 5]].concat();
        for chunks in [one_by_one, vec![5, 1, 2, len - 8], vec![len]] {
            let mut cache = KvCache::new(len + 3);
            let mut end = 0;
            for chunk in chunks {
                let part = ids.narrow(1, end, chunk).unwrap();
                end += chunk;
                let logits = decoder.step(&part, &pads, &mut cache).unwrap();
                assert_eq!(logits.dims(), [batch, 64]);
                assert_eq!(cache.len(), end);
                assert!(!logits.track_op());
                let want = full.narrow(1, end - 1, 1).unwrap();
                assert_near(&values(&logits), &values(&want));
            }
        }
    }
}

/// A loss that depends on every token, and its gradient at random points and directions.
fn loss(output: &Tensor) -> Tensor {
    let weights: Vec<f32> = (0..output.elem_count())
        .map(|i| ((i * 7919 % 1000) as f32 / 500.0 - 1.0) / output.elem_count() as f32)
        .collect();
    let weights = Tensor::from_vec(weights, output.shape(), &DEVICE).unwrap();
    (output * weights).unwrap().sum_all().unwrap()
}

fn assert_gradients_are_right(
    parameters: &[(String, Var)],
    expected: usize,
    forward: impl Fn() -> Tensor,
) {
    assert_eq!(parameters.len(), expected);
    let scalar = || f64::from(loss(&forward()).to_scalar::<f32>().unwrap());
    let grads = loss(&forward()).backward().unwrap();
    for (name, var) in parameters {
        let grad = grads.get(var).unwrap_or_else(|| panic!("{name}: no gradient"));
        let norm = grad.sqr().unwrap().sum_all().unwrap().sqrt().unwrap();
        let norm = f64::from(norm.to_scalar::<f32>().unwrap());
        assert!(norm > 0.0 && norm.is_finite(), "{name}: gradient of norm {norm}");
        // Along the gradient the loss changes by its norm; f32 leaves three digits of that.
        let start = var.as_tensor().copy().unwrap();
        let step = 2e-3;
        let moved = |by: f64| {
            var.set(&(&start + (grad * (by / norm)).unwrap()).unwrap()).unwrap();
            scalar()
        };
        let slope = (moved(step) - moved(-step)) / (2.0 * step);
        var.set(&start).unwrap();
        assert!(
            abs_diff_eq!(slope / norm, 1.0, epsilon = 2e-2),
            "{name}: slope {slope}, gradient {norm}"
        );
    }
}

#[test]
fn every_weight_of_the_policy_gets_its_gradient_through_the_logits() {
    for (name, weights) in FIXTURES {
        let decoder = open(name).decoder;
        let Expected { ids, pads, .. } = expected(name);
        // Pads give no gradient: only the last tokens, which no row pads, count.
        assert_gradients_are_right(&decoder.parameters(), weights, || {
            let hidden = decoder.hidden(&ids, &pads).unwrap().narrow(1, 4, 7).unwrap();
            decoder.logits(&hidden).unwrap()
        });
    }
}

#[test]
fn every_weight_of_the_critic_gets_its_gradient() {
    for (name, weights) in FIXTURES {
        let decoder = open(name).decoder;
        let Expected { ids, pads, .. } = expected(name);
        // The language-model head is no part of a critic.
        let backbone = weights - usize::from(!decoder.config().tie_word_embeddings);
        let critic = Critic::new(decoder, 3).unwrap();
        assert_gradients_are_right(&critic.parameters(), backbone + 1, || {
            let values = critic.values(&ids, &pads).unwrap();
            assert_eq!(values.dims(), ids.dims());
            values.narrow(1, 4, 7).unwrap()
        });
    }
}

#[test]
fn copies_are_their_own_and_views_follow() {
    let decoder = tiny().decoder;
    let Expected { ids, pads, .. } = expected("tiny-llama");
    let hidden = |decoder: &Decoder| decoder.hidden(&ids, &pads).unwrap();
    let before = values(&hidden(&decoder));
    let (copy, frozen, view) =
        (decoder.duplicate().unwrap(), decoder.frozen().unwrap(), decoder.no_grad());
    assert_eq!(copy.parameters().len(), decoder.parameters().len());
    assert!(frozen.parameters().is_empty() && view.parameters().is_empty());
    assert!(hidden(&decoder).track_op());
    assert!(!hidden(&frozen).track_op() && !hidden(&view).track_op());

    for (_, var) in decoder.parameters() {
        var.set(&(var.as_tensor() * 1.1).unwrap()).unwrap();
    }
    let after = values(&hidden(&decoder));
    assert_ne!(before, after);
    assert_eq!(values(&hidden(&view)), after);
    assert_eq!(values(&hidden(&frozen)), before);
    assert_eq!(values(&hidden(&copy)), before);

    let critic = Critic::new(copy, 0).unwrap();
    let view = critic.no_grad();
    assert!(view.parameters().is_empty());
    let head = critic.parameters().pop().unwrap().1;
    head.set(&head.ones_like().unwrap()).unwrap();
    let (a, b) = (critic.values(&ids, &pads), view.values(&ids, &pads));
    assert_eq!(values(&a.unwrap()), values(&b.unwrap()));
}

#[test]
fn a_random_model_is_its_seeds_and_near_uniform() {
    let weights = |seed| {
        let decoder = Decoder::random(tiny_config(), seed, &DEVICE).unwrap();
        let all: Vec<f32> = decoder.tensors().iter().flat_map(|(_, t)| values(t)).collect();
        all
    };
    assert_eq!(weights(1), weights(1));
    assert_ne!(weights(1), weights(2));
    let config = DecoderConfig { initializer_range: 0.02, ..tiny_config() };
    let decoder = Decoder::random(config, 1, &DEVICE).unwrap();
    let embedding = values(&decoder.tensors()[0].1);
    let mean = embedding.iter().sum::<f32>() / embedding.len() as f32;
    let square = embedding.iter().map(|v| v * v).sum::<f32>() / embedding.len() as f32;
    assert!(mean.abs() < 2e-3, "{mean}");
    assert!((square.sqrt() / 0.02 - 1.0).abs() < 0.1, "{square}");
}

#[test]
fn bad_arguments_of_a_pass_are_refused_by_name() {
    let decoder = tiny().decoder;
    let ids = Tensor::zeros((2, 5), DType::U32, &DEVICE).unwrap();
    assert_refused(decoder.hidden(&ids, &[0]), &["pads"]);
    assert_refused(decoder.hidden(&ids, &[0, 5]), &["pads"]);
    let floats = ids.to_dtype(DType::F32).unwrap();
    assert_refused(decoder.hidden(&floats, &[0, 0]), &["ids", "u32"]);
    assert_refused(decoder.hidden(&ids.flatten_all().unwrap(), &[0]), &["ids"]);
    let long = Tensor::zeros((1, 65), DType::U32, &DEVICE).unwrap();
    assert_refused(decoder.hidden(&long, &[0]), &["65", "64"]);
    let foreign = Tensor::new(&[[64u32]], &DEVICE).unwrap();
    assert_refused(decoder.hidden(&foreign, &[0]), &["token id", "64"]);
    assert_refused(decoder.logits(&floats), &["hidden", "32"]);
    assert_refused(decoder.step(&ids, &[0, 0], &mut KvCache::new(4)), &["cache"]);
    let mut cache = KvCache::new(64);
    decoder.step(&ids, &[0, 0], &mut cache).unwrap();
    let one = ids.narrow(0, 0, 1).unwrap();
    assert_refused(decoder.step(&one, &[0], &mut cache), &["2 rows"]);
}

#[test]
fn impossible_shapes_are_refused_by_key() {
    let change = |f: fn(&mut DecoderConfig)| {
        let mut config = tiny_config();
        f(&mut config);
        Decoder::random(config, 0, &DEVICE)
    };
    assert_refused(change(|c| c.hidden_size = 0), &["hidden_size"]);
    assert_refused(change(|c| c.head_dim = 7), &["head_dim"]);
    assert_refused(change(|c| c.num_key_value_heads = 3), &["num_key_value_heads"]);
    assert_refused(change(|c| c.rms_norm_eps = f64::NAN), &["rms_norm_eps"]);
    assert_refused(change(|c| c.rope_theta = -1.0), &["rope_theta"]);
    let scaling = |c: &mut DecoderConfig| {
        c.rope_scaling = Some(RopeScaling::Llama3 {
            factor: f64::NAN,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 16,
        })
    };
    assert_refused(change(scaling), &["rope_scaling"]);
}

// ---- on disk ----

#[test]
fn what_is_saved_loads_again() {
    for (name, _) in FIXTURES {
        let Loaded { decoder, tokenizer } = open(name);
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("new/folder");
        save(&dir, &decoder, &tokenizer).unwrap();
        let again = load(&dir, &DEVICE).unwrap();
        assert_eq!(again.decoder.config(), decoder.config());
        assert_eq!(again.tokenizer.eos(), [2]);
        assert_eq!(again.tokenizer.pad(), 0);
        assert_eq!(again.tokenizer.encode("the cat").unwrap(), [4, 5]);
        assert_eq!(again.tokenizer.decode(&[4, 5, 2]).unwrap(), "the cat");
        assert_matches_transformers(&again.decoder, name);

        let critic = Critic::new(decoder, 5).unwrap();
        save_critic(&dir, &critic).unwrap();
        let again = load_critic(&dir, &DEVICE).unwrap();
        for ((name, a), (known, b)) in again.tensors().iter().zip(critic.tensors()) {
            assert_eq!(*name, known);
            assert_eq!(values(a), values(&b));
        }
        assert_eq!(again.parameters().len(), critic.parameters().len());

        save_reward(&dir, &critic, &tokenizer).unwrap();
        let text = fs::read(dir.join("config.json")).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let class = critic.config().model_type.class();
        assert_eq!(json["architectures"][0], format!("{class}ForSequenceClassification"));
        let reward = load_reward(&dir, &DEVICE).unwrap().critic;
        assert_eq!(reward.config(), critic.config());
        for ((_, a), (_, b)) in reward.tensors().iter().zip(critic.tensors()) {
            assert_eq!(values(a), values(&b));
        }
        assert_refused(load(&dir, &DEVICE), &["unknown architecture", class, "ForCausalLM"]);
    }
}

#[test]
fn weights_are_whole_or_not_there() {
    let Loaded { decoder, tokenizer } = tiny();
    let dir = tempfile::tempdir().unwrap();
    let names = || {
        let names = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    };
    save(dir.path(), &decoder, &tokenizer).unwrap();
    let whole = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names(), whole);

    // A folder cannot be replaced by a file: all is written but the last move.
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert_refused(save(dir.path(), &decoder, &tokenizer), &["cannot write", "model.safetensors"]);
    assert_eq!(names(), whole);
}

/// A copy of a fixture to spoil.
fn spoilt(name: &str, spoil: impl Fn(&Path)) -> anyhow::Result<Loaded> {
    let dir = tempfile::tempdir().unwrap();
    // The tokenizer is one for all.
    let tokenizer = "tokenizer.json";
    fs::copy(fixture("tiny-llama").join(tokenizer), dir.path().join(tokenizer)).unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    spoil(dir.path());
    load(dir.path(), &DEVICE)
}

fn edit_json(path: &Path, edit: impl Fn(&mut serde_json::Value)) {
    let mut json = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

fn with_config(key: &str, value: serde_json::Value) -> anyhow::Result<Loaded> {
    spoilt("tiny-llama", |dir| {
        edit_json(&dir.join("config.json"), |json| json[key] = value.clone())
    })
}

fn with_tensors(edit: impl Fn(&mut HashMap<String, Tensor>)) -> anyhow::Result<Loaded> {
    spoilt("tiny-llama", |dir| {
        let path = dir.join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &DEVICE).unwrap();
        edit(&mut tensors);
        candle_core::safetensors::save(&tensors, &path).unwrap();
    })
}

#[test]
fn missing_truncated_and_foreign_files_are_refused_by_name() {
    assert_refused(load(Path::new("no/such/model"), &DEVICE), &["no/such/model"]);
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let path = |dir: &Path| dir.join(file);
        let gone = spoilt("tiny-llama", |dir| fs::remove_file(path(dir)).unwrap());
        assert_refused(gone, &[file]);
        for keep in [0, 5, 900] {
            let cut = spoilt("tiny-llama", |dir| {
                let bytes = fs::read(path(dir)).unwrap();
                fs::write(path(dir), &bytes[..keep.min(bytes.len() - 20)]).unwrap();
            });
            assert_refused(cut, &[file]);
        }
        let foreign =
            spoilt("tiny-llama", |dir| fs::write(path(dir), "PK\x03\x04 foreign").unwrap());
        assert_refused(foreign, &[file]);
    }
    let shard = "model-00002-of-00003.safetensors";
    let gone = spoilt("tiny-llama-shards", |dir| fs::remove_file(dir.join(shard)).unwrap());
    assert_refused(gone, &[shard]);
    let index = |edit: fn(&mut serde_json::Value)| {
        spoilt("tiny-llama-shards", |dir| {
            edit_json(&dir.join("model.safetensors.index.json"), edit)
        })
    };
    let wrong = index(|json| {
        json["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors".into()
    });
    assert_refused(wrong, &["model.norm.weight", "model-00001-of-00003"]);
    let outside = index(|json| json["weight_map"]["model.norm.weight"] = "../x.safetensors".into());
    assert_refused(outside, &["weight_map", "../x.safetensors"]);
    assert_refused(index(|json| *json = 3.into()), &["index.json"]);
    assert_refused(index(|json| json["weight_map"] = 3.into()), &["weight_map"]);
}

#[test]
fn tensors_that_do_not_fit_are_refused_by_name() {
    let name = "model.layers.1.mlp.up_proj.weight";
    assert_refused(with_tensors(|t| drop(t.remove(name))), &[name, "missing"]);
    let transposed = with_tensors(|t| {
        let turned = t[name].t().unwrap().contiguous().unwrap();
        t.insert(name.into(), turned);
    });
    assert_refused(transposed, &[name, "[48, 32]", "[32, 48]"]);
    let integers = with_tensors(|t| {
        let integers = t[name].to_dtype(DType::U8).unwrap();
        t.insert(name.into(), integers);
    });
    assert_refused(integers, &[name, "float"]);
    let bias = "model.layers.0.self_attn.q_proj.bias";
    let extra = with_tensors(|t| {
        t.insert(bias.into(), Tensor::zeros(32, DType::F32, &DEVICE).unwrap());
    });
    assert_refused(extra, &[bias, "no place"]);
    // Old files hold the rotary frequencies, and some repeat the tied head.
    let harmless = with_tensors(|t| {
        let freq = Tensor::zeros(4, DType::F32, &DEVICE).unwrap();
        t.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), freq);
        t.insert("lm_head.weight".into(), t["model.embed_tokens.weight"].clone());
    });
    assert_matches_transformers(&harmless.unwrap().decoder, "tiny-llama");
}

#[test]
fn half_precision_weights_are_widened() {
    for dtype in [DType::F16, DType::BF16, DType::F64] {
        let loaded = with_tensors(|tensors| {
            for tensor in tensors.values_mut() {
                *tensor = tensor.to_dtype(dtype).unwrap();
            }
        })
        .unwrap();
        for ((_, got), (_, full)) in loaded.decoder.tensors().iter().zip(tiny().decoder.tensors()) {
            assert_eq!(got.dtype(), DType::F32);
            let rounded = full.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap();
            assert_eq!(values(got), values(&rounded));
        }
    }
}

#[test]
fn what_cannot_be_computed_exactly_is_refused_by_key() {
    use serde_json::json;
    let gpt2 = with_config("architectures", json!(["GPT2LMHeadModel"]));
    assert_refused(gpt2, &["unknown architecture", "GPT2LMHeadModel"]);
    assert_refused(with_config("model_type", json!("qwen2")), &["qwen2"]);
    assert_refused(with_config("hidden_act", json!("gelu")), &["hidden_act"]);
    assert_refused(with_config("attention_bias", json!(true)), &["attention_bias"]);
    assert_refused(with_config("sliding_window", json!(8)), &["sliding_window"]);
    assert_refused(with_config("model_type", json!("mistral")), &["LlamaForCausalLM", "mistral"]);
    for kind in ["dynamic", "longrope"] {
        let scaling = json!({ "rope_type": kind, "factor": 2.0 });
        assert_refused(with_config("rope_scaling", scaling), &["rope_scaling", kind]);
    }
    let quantised = json!({ "quant_method": "gptq" });
    assert_refused(with_config("quantization_config", quantised), &["quantization_config"]);
    assert_refused(with_config("vocab_size", json!(63)), &["64", "63", "vocab_size"]);
    assert_refused(with_config("eos_token_id", json!(64)), &["eos_token_id", "64"]);
    assert_refused(with_config("eos_token_id", json!("two")), &["eos_token_id"]);
    assert_refused(with_config("hidden_size", json!("wide")), &["config.json"]);
    assert_refused(with_config("num_attention_heads", json!(0)), &["config.json"]);

    for (key, value) in [
        ("sliding_window", json!(64)),
        ("rope_scaling", json!({ "rope_type": "default" })),
        ("rope_parameters", json!({ "rope_type": "default", "rope_theta": 10000.0 })),
        ("head_dim", json!(null)),
        ("eos_token_id", json!([2, 3])),
    ] {
        let loaded = with_config(key, value).unwrap();
        assert_matches_transformers(&loaded.decoder, "tiny-llama");
    }
}

fn rope_of(edit: impl Fn(&mut serde_json::Value)) -> anyhow::Result<(f64, Option<RopeScaling>)> {
    let loaded = spoilt("tiny-llama", |dir| edit_json(&dir.join("config.json"), &edit))?;
    let config = loaded.decoder.config();
    Ok((config.rope_theta, config.rope_scaling.clone()))
}

#[test]
fn rotary_settings_are_read_wherever_they_are_and_never_two_ways() {
    use serde_json::json;
    let linear = json!({ "rope_type": "linear", "factor": 2.0 });
    let scaled = Some(RopeScaling::Linear { factor: 2.0 });
    let both = |theta| json!({ "type": "linear", "factor": 2.0, "rope_theta": theta });
    let inside = rope_of(|json| {
        json.as_object_mut().unwrap().remove("rope_theta");
        json["rope_parameters"] = both(500.0);
    });
    assert_eq!(inside.unwrap(), (500.0, scaled.clone()));
    let apart = rope_of(|json| json["rope_scaling"] = linear.clone());
    assert_eq!(apart.unwrap(), (10000.0, scaled.clone()));
    let twice = rope_of(|json| {
        json["rope_scaling"] = linear.clone();
        json["rope_parameters"] = both(10000.0);
    });
    assert_eq!(twice.unwrap(), (10000.0, scaled));

    let two_bases = rope_of(|json| json["rope_parameters"] = both(500.0));
    assert_refused(two_bases, &["rope_theta", "10000", "rope_parameters.rope_theta", "500"]);
    let two_scalings = rope_of(|json| {
        json["rope_scaling"] = linear.clone();
        json["rope_parameters"] = json!({ "rope_type": "default" });
    });
    assert_refused(two_scalings, &["rope_scaling", "contradicts", "rope_parameters"]);
    let two_types = json!({ "type": "linear", "rope_type": "yarn", "factor": 2.0 });
    let two_types = rope_of(|json| json["rope_scaling"] = two_types.clone());
    assert_refused(two_types, &["rope_scaling", "linear", "yarn"]);
    let nested = json!({ "full_attention": { "rope_type": "default" } });
    let nested = rope_of(|json| json["rope_parameters"] = nested.clone());
    assert_refused(nested, &["rope_parameters.full_attention"]);
    let partial = json!({ "rope_type": "default", "partial_rotary_factor": 0.5 });
    let partial = rope_of(|json| json["rope_parameters"] = partial.clone());
    assert_refused(partial, &["rope_parameters.partial_rotary_factor", "0.5"]);
    let bare = rope_of(|json| json["rope_scaling"] = json!({ "type": "linear" }));
    assert_refused(bare, &["rope_scaling.factor"]);
    let shrunk = rope_of(|json| json["rope_scaling"] = json!({ "type": "linear", "factor": 0.5 }));
    assert_refused(shrunk, &["rope_scaling", "0.5"]);
}

/// What transformers computes of the keys that say how strongly YaRN sharpens the attention.
#[test]
fn the_attention_factor_of_yarn_is_given_or_made() {
    use serde_json::json;
    let factor = |edit: fn(&mut serde_json::Value)| {
        let (_, scaling) = rope_of(|json| {
            json["rope_scaling"] = json!({ "type": "yarn", "factor": 4.0 });
            edit(&mut json["rope_scaling"]);
        })
        .unwrap();
        match scaling {
            Some(RopeScaling::Yarn {
                attention_factor, original_max_position_embeddings, ..
            }) => {
                assert_eq!(original_max_position_embeddings, 64, "that of the model");
                attention_factor
            }
            other => panic!("{other:?}"),
        }
    };
    let near = |got: f64, want: f64| assert!(abs_diff_eq!(got, want, epsilon = 1e-12), "{got}");
    near(factor(|_| ()), 0.1 * 4f64.ln() + 1.0);
    near(factor(|yarn| yarn["attention_factor"] = json!(1.5)), 1.5);
    near(factor(|yarn| yarn["mscale"] = json!(0.5)), 0.1 * 4f64.ln() + 1.0);
    let both = factor(|yarn| {
        yarn["mscale"] = json!(1.0);
        yarn["mscale_all_dim"] = json!(0.5);
    });
    near(both, (0.1 * 4f64.ln() + 1.0) / (0.05 * 4f64.ln() + 1.0));
}

#[test]
fn windows_are_those_of_the_architecture() {
    use serde_json::json;
    let window = |name: &str, edit: &dyn Fn(&mut serde_json::Map<String, serde_json::Value>)| {
        let loaded = spoilt(name, |dir| {
            edit_json(&dir.join("config.json"), |json| edit(json.as_object_mut().unwrap()))
        })?;
        let DecoderConfig { sliding_window, layer_types, .. } = loaded.decoder.config();
        anyhow::Ok((*sliding_window, layer_types.clone()))
    };
    let (full, slides) = (LayerType::FullAttention, LayerType::SlidingAttention);
    // Mistral has a window unless the file says that it has none.
    let absent = window("tiny-mistral", &|json| drop(json.remove("sliding_window")));
    assert_eq!(absent.unwrap(), (Some(4096), None));
    let null =
        window("tiny-mistral", &|json| drop(json.insert("sliding_window".into(), json!(null))));
    assert_eq!(null.unwrap(), (None, None));
    let none = window("tiny-mistral", &|json| drop(json.insert("sliding_window".into(), json!(0))));
    assert_refused(none, &["sliding_window", "0"]);

    let by_number = window("tiny-qwen2", &|json| drop(json.remove("layer_types")));
    assert_eq!(by_number.unwrap(), (Some(4), Some(vec![full, slides])));
    let off = |json: &mut serde_json::Map<String, serde_json::Value>| {
        drop(json.insert("use_sliding_window".into(), json!(false)));
    };
    assert_refused(window("tiny-qwen2", &off), &["layer_types", "use_sliding_window"]);
    let unused = window("tiny-qwen2", &|json| {
        off(json);
        drop(json.remove("layer_types"));
    });
    assert_eq!(unused.unwrap(), (None, None));
    let too_few = window("tiny-qwen2", &|json| {
        drop(json.insert("layer_types".into(), json!(["full_attention"])));
    });
    assert_refused(too_few, &["layer_types", "2", "1"]);

    let smol = window("tiny-smollm3", &|json| {
        json.remove("layer_types");
        json.insert("use_sliding_window".into(), json!(true));
        json.insert("sliding_window".into(), json!(3));
    });
    assert_eq!(smol.unwrap(), (Some(3), Some(vec![full, slides])));
    let layers = |edit: fn(&mut serde_json::Value)| {
        let loaded = spoilt("tiny-smollm3", |dir| edit_json(&dir.join("config.json"), edit))?;
        anyhow::Ok(loaded.decoder.config().no_rope_layers.clone())
    };
    let every = layers(|json| {
        json["no_rope_layers"] = json!(null);
        json["no_rope_layer_interval"] = json!(2);
    });
    assert_eq!(every.unwrap(), Some(vec![1, 0]));
    assert_refused(
        layers(|json| json["no_rope_layers"] = json!([1])),
        &["no_rope_layers", "2", "1"],
    );
}

#[test]
fn a_head_beside_a_config_that_ties_it_is_kept() {
    let head = tiny().decoder.tensors()[0].1.affine(0.5, 0.1).unwrap();
    let own = with_tensors(|t| drop(t.insert("lm_head.weight".into(), head.clone()))).unwrap();
    assert!(!own.decoder.config().tie_word_embeddings);
    let (name, kept) = own.decoder.tensors().pop().unwrap();
    assert_eq!((name.as_str(), values(&kept)), ("lm_head.weight", values(&head)));
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &own.decoder, &own.tokenizer).unwrap();
    let again = load(dir.path(), &DEVICE).unwrap();
    assert_eq!(values(&again.decoder.tensors().pop().unwrap().1), values(&head));

    // The only one of the two is both.
    let alone = with_tensors(|t| {
        let embedding = t.remove("model.embed_tokens.weight").unwrap();
        t.insert("lm_head.weight".into(), embedding);
    });
    assert_matches_transformers(&alone.unwrap().decoder, "tiny-llama");
}

#[test]
fn a_new_model_of_each_architecture_starts_from_norms_and_biases_that_do_nothing() {
    for (name, offset) in [("tiny-gemma", 0.0), ("tiny-qwen2", 1.0), ("tiny-qwen3", 1.0)] {
        let decoder = Decoder::random(open(name).decoder.config().clone(), 0, &DEVICE).unwrap();
        for (name, tensor) in decoder.tensors() {
            let want = if name.ends_with(".bias") { 0.0 } else { offset };
            assert!(tensor.rank() > 1 || values(&tensor).iter().all(|&v| v == want), "{name}");
        }
    }
}

/// A folder as people have it: several ends, a template, and keys that nothing here reads.
#[test]
fn what_lies_beside_the_weights_is_kept_as_it_was() {
    use serde_json::json;
    let files = [
        ("generation_config.json", r#"{ "eos_token_id": [5, 3], "top_p": 0.9 }"#),
        ("tokenizer_config.json", r#"{"eos_token": {"content": "cat"}, "bos_token": "<s>"}"#),
        ("special_tokens_map.json", "{}\n"),
        ("chat_template.jinja", "{{ messages[0].content }}\n"),
    ];
    let Loaded { decoder, tokenizer } = spoilt("tiny-llama", |dir| {
        edit_json(&dir.join("config.json"), |json| {
            json["eos_token_id"] = json!([9, 2]);
            json["pad_token_id"] = json!(null);
            json["something_else"] = json!({ "kept": 1.5 });
        });
        for (name, text) in files {
            fs::write(dir.join(name), text).unwrap();
        }
    })
    .unwrap();
    // The tokenizer's own end first, then those of the files in their order.
    assert_eq!((tokenizer.eos(), tokenizer.pad()), (&[5, 9, 2, 3][..], 5));
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &decoder, &tokenizer).unwrap();
    for (name, text) in files {
        assert_eq!(fs::read_to_string(dir.path().join(name)).unwrap(), text);
    }
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.path().join("config.json")).unwrap()).unwrap();
    for (key, value) in [
        ("eos_token_id", json!([9, 2])),
        ("pad_token_id", json!(null)),
        ("bos_token_id", json!(1)),
        ("something_else", json!({ "kept": 1.5 })),
        ("attention_dropout", json!(0.0)),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    let again = load(dir.path(), &DEVICE).unwrap().tokenizer;
    assert_eq!((again.eos(), again.pad()), (&[5, 9, 2, 3][..], 5));

    let broken = spoilt("tiny-llama", |dir| {
        fs::write(dir.join("tokenizer_config.json"), "{").unwrap();
    });
    assert_refused(broken, &["tokenizer_config.json"]);
}

// ---- GGUF ----

/// Metadata of a byte-level BPE over the tiny model's 64 tokens.
fn gguf_metadata(config: &DecoderConfig) -> Vec<(&'static str, Value)> {
    let text = |s: &str| Value::String(s.into());
    let number = |n: usize| Value::U32(n as u32);
    let mut tokens: Vec<Value> = ["<pad>", "<s>", "</s>", "<unk>"].map(text).into();
    tokens.extend(["t", "h", "e", "Ġ", "c", "a", "th", "the", "Ġc", "at", "Ġcat", "1"].map(text));
    while tokens.len() < 64 {
        tokens.push(text(&format!("w{}", tokens.len())));
    }
    let merges = ["t h", "th e", "Ġ c", "a t", "Ġc at"].map(text).into();
    let kinds = (0..64).map(|id| Value::I32(if id < 4 { 3 } else { 1 })).collect();
    vec![
        ("general.architecture", text("llama")),
        ("llama.block_count", number(config.num_hidden_layers)),
        ("llama.context_length", number(config.max_position_embeddings)),
        ("llama.embedding_length", number(config.hidden_size)),
        ("llama.feed_forward_length", number(config.intermediate_size)),
        ("llama.attention.head_count", number(config.num_attention_heads)),
        ("llama.attention.head_count_kv", number(config.num_key_value_heads)),
        ("llama.attention.key_length", number(config.head_dim)),
        ("llama.rope.dimension_count", number(config.head_dim)),
        ("llama.rope.freq_base", Value::F32(config.rope_theta as f32)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("smollm")),
        ("tokenizer.ggml.tokens", Value::Array(tokens)),
        ("tokenizer.ggml.token_type", Value::Array(kinds)),
        ("tokenizer.ggml.merges", Value::Array(merges)),
        ("tokenizer.ggml.bos_token_id", number(1)),
        ("tokenizer.ggml.eos_token_id", number(2)),
        ("tokenizer.ggml.padding_token_id", number(0)),
    ]
}

/// The tensors of a decoder as llama.cpp's converter writes them.
fn gguf_tensors(decoder: &Decoder) -> Vec<(String, Tensor)> {
    let config = decoder.config();
    (decoder.tensors().into_iter())
        .map(|(name, tensor)| {
            // convert_hf_to_gguf.py: the halves of each head are interleaved.
            let permuted = |heads: usize| {
                let (rows, width) = tensor.dims2().unwrap();
                let halves = tensor.reshape((heads, 2, rows / heads / 2, width)).unwrap();
                let pairs = halves.transpose(1, 2).unwrap().contiguous().unwrap();
                pairs.reshape((rows, width)).unwrap()
            };
            let tensor = if config.model_type != Architecture::Llama {
                tensor.clone()
            } else if name.contains("q_proj") {
                permuted(config.num_attention_heads)
            } else if name.contains("k_proj") {
                permuted(config.num_key_value_heads)
            } else {
                tensor.clone()
            };
            let mut name = name;
            for (from, to) in [
                ("model.embed_tokens", "token_embd"),
                ("model.layers", "blk"),
                ("model.norm", "output_norm"),
                ("lm_head", "output"),
                ("input_layernorm", "attn_norm"),
                ("post_attention_layernorm", "ffn_norm"),
                ("self_attn.o_proj", "attn_output"),
                ("self_attn.", "attn_"),
                ("mlp.", "ffn_"),
                ("_proj", ""),
            ] {
                name = name.replace(from, to);
            }
            (name, tensor)
        })
        .collect()
}

fn write_gguf(
    metadata: &[(&str, Value)],
    tensors: &[(String, Tensor)],
    dtype: GgmlDType,
) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
    let tensors: Vec<(&str, QTensor)> = (tensors.iter())
        .map(|(name, tensor)| {
            // As llama.cpp does: norms and rows that do not fill blocks stay f32.
            let width = *tensor.dims().last().unwrap();
            let fits = tensor.rank() == 2 && width % dtype.block_size() == 0;
            let dtype = if fits { dtype } else { GgmlDType::F32 };
            (name.as_str(), QTensor::quantize(tensor, dtype).unwrap())
        })
        .collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (*n, t)).collect();
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (*k, v)).collect();
    gguf_file::write(file.as_file_mut(), &metadata, &tensors).unwrap();
    file
}

#[test]
fn a_gguf_file_holds_the_same_model() {
    let decoder = tiny().decoder;
    let metadata = gguf_metadata(decoder.config());
    let file = write_gguf(&metadata, &gguf_tensors(&decoder), GgmlDType::F32);
    let loaded = load(file.path(), &DEVICE).unwrap();
    let expected =
        DecoderConfig { initializer_range: 0.02, file: None, ..decoder.config().clone() };
    assert_eq!(*loaded.decoder.config(), expected);
    assert_matches_transformers(&loaded.decoder, "tiny-llama");

    // And as a folder, with its tokenizer.
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &loaded.decoder, &loaded.tokenizer).unwrap();
    let again = load(dir.path(), &DEVICE).unwrap();
    assert_matches_transformers(&again.decoder, "tiny-llama");
    for tokenizer in [&loaded.tokenizer, &again.tokenizer] {
        assert_eq!(tokenizer.encode("the cat</s>11").unwrap(), [11, 14, 2, 15, 15]);
        assert_eq!(tokenizer.decode(&[1, 11, 14, 2]).unwrap(), "the cat");
        assert_eq!((tokenizer.eos(), tokenizer.pad()), (&[2][..], 0));
        assert_eq!(tokenizer.vocab_size(), 64);
    }
}

#[test]
fn a_gguf_file_with_a_head_of_its_own_and_quantised_weights_loads() {
    let decoder = load(&fixture("tiny-llama-shards"), &DEVICE).unwrap().decoder;
    let mut config = decoder.config().clone();
    config.rope_scaling = None;
    let plain: HashMap<_, _> = decoder.tensors().into_iter().collect();
    let plain = Decoder::from_tensors(config.clone(), plain).unwrap();
    let ids = expected("tiny-llama-shards").ids;
    let logits = |d: &Decoder| values(&d.logits(&d.hidden(&ids, &[0, 0]).unwrap()).unwrap());

    // bf16 weights fit f32 and bf16 exactly.
    for dtype in [GgmlDType::F32, GgmlDType::BF16] {
        let file = write_gguf(&gguf_metadata(&config), &gguf_tensors(&plain), dtype);
        let loaded = load(file.path(), &DEVICE).unwrap().decoder;
        assert!(!loaded.config().tie_word_embeddings);
        assert_near(&logits(&loaded), &logits(&plain));
    }
    let file = write_gguf(&gguf_metadata(&config), &gguf_tensors(&plain), GgmlDType::Q8_0);
    let loaded = load(file.path(), &DEVICE).unwrap().decoder;
    let (got, want) = (logits(&loaded), logits(&plain));
    let error: f32 = got.iter().zip(&want).map(|(a, b)| (a - b).powi(2)).sum();
    let size: f32 = want.iter().map(|b| b * b).sum();
    assert!((1e-8..1e-3).contains(&(error / size)), "{}", error / size);
}

#[test]
fn gguf_files_of_qwen_hold_the_same_models() {
    for name in ["tiny-qwen2", "tiny-qwen3"] {
        let decoder = open(name).decoder;
        // What such a file cannot say is left out.
        let plain = DecoderConfig {
            rope_scaling: None,
            sliding_window: None,
            layer_types: None,
            initializer_range: 0.02,
            file: None,
            ..decoder.config().clone()
        };
        let tensors = decoder.tensors().into_iter().collect();
        let plain = Decoder::from_tensors(plain, tensors).unwrap();
        let architecture = name.trim_start_matches("tiny-");
        let renamed: Vec<(String, Value)> = (gguf_metadata(plain.config()).into_iter())
            .map(|(key, value)| match key {
                "general.architecture" => (key.into(), Value::String(architecture.into())),
                "tokenizer.ggml.pre" => (key.into(), Value::String("qwen2".into())),
                _ => (key.replace("llama.", &format!("{architecture}.")), value),
            })
            .collect();
        let metadata: Vec<(&str, Value)> =
            renamed.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        let file = write_gguf(&metadata, &gguf_tensors(&plain), GgmlDType::F32);
        let loaded = load(file.path(), &DEVICE).unwrap();
        assert_eq!(loaded.decoder.config(), plain.config());
        assert_eq!(loaded.decoder.parameters().len(), plain.parameters().len());
        assert_eq!(logits_of(&loaded.decoder), logits_of(&plain));
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &loaded.decoder, &loaded.tokenizer).unwrap();
        assert_eq!(logits_of(&load(dir.path(), &DEVICE).unwrap().decoder), logits_of(&plain));
    }
}

#[test]
fn the_rotary_scaling_of_llama_3_is_read_from_its_divisors() {
    let mut config = tiny_config();
    config.rope_theta = 500_000.0;
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let decoder = Decoder::random(config.clone(), 0, &DEVICE).unwrap();
    let mut tensors = gguf_tensors(&decoder);
    // llama.cpp's formula: wavelengths 6, 167 and 4443 are kept, 118142 is stretched.
    let divisors = |values: [f32; 4]| Tensor::new(&values, &DEVICE).unwrap();
    let blended = {
        let turns = 8192.0 * 500_000f64.powf(-0.5) / std::f64::consts::TAU;
        let keep = ((turns - 1.0) / 3.0).clamp(0.0, 1.0);
        1.0 / (keep + (1.0 - keep) / 8.0)
    } as f32;
    tensors.push(("rope_freqs.weight".into(), divisors([1.0, 1.0, blended, 8.0])));
    let file = write_gguf(&gguf_metadata(&config), &tensors, GgmlDType::F32);
    let loaded = load(file.path(), &DEVICE).unwrap().decoder;
    assert_eq!(loaded.config().rope_scaling, Some(scaling));

    tensors.pop();
    tensors.push(("rope_freqs.weight".into(), divisors([1.0, 2.0, 2.0, 8.0])));
    let file = write_gguf(&gguf_metadata(&config), &tensors, GgmlDType::F32);
    assert_refused(load(file.path(), &DEVICE), &["rope_freqs.weight"]);
}

#[test]
fn the_rotary_scaling_of_a_gguf_file_is_that_of_llama_cpp() {
    let decoder = tiny().decoder;
    let scaling = |entries: &[(&'static str, Value)]| {
        let metadata = [gguf_metadata(decoder.config()), entries.to_vec()].concat();
        let file = write_gguf(&metadata, &gguf_tensors(&decoder), GgmlDType::F32);
        anyhow::Ok(load(file.path(), &DEVICE)?.decoder.config().rope_scaling.clone())
    };
    let kind = |kind: &str| ("llama.rope.scaling.type", Value::String(kind.into()));
    let factor = |factor| ("llama.rope.scaling.factor", Value::F32(factor));
    let old = |factor| ("llama.rope.scale_linear", Value::F32(factor));
    let linear = |factor| Some(RopeScaling::Linear { factor });
    for (entries, want) in [
        (vec![factor(4.0)], linear(4.0)),
        (vec![old(1.1)], linear(1.1)),
        (vec![factor(0.0), old(4.0)], linear(4.0)),
        (vec![kind("linear"), factor(4.0), old(4.0)], linear(4.0)),
        (vec![kind("none"), factor(4.0)], None),
        (vec![factor(1.0)], None),
        (vec![kind("yarn"), factor(4.0)], Some(RopeScaling::yarn(4.0, 64))),
    ] {
        assert_eq!(scaling(&entries).unwrap(), want, "{entries:?}");
    }
    let original = ("llama.rope.scaling.original_context_length", Value::U32(16));
    let yarn = scaling(&[kind("yarn"), factor(4.0), original]).unwrap();
    assert_eq!(yarn, Some(RopeScaling::yarn(4.0, 16)));
    assert_refused(scaling(&[factor(4.0), old(2.0)]), &["scaling.factor 4", "scale_linear 2"]);
    let attention = ("llama.rope.scaling.attn_factor", Value::F32(1.0));
    assert_refused(scaling(&[kind("yarn"), factor(4.0), attention]), &["attn_factor"]);
}

#[test]
fn a_part_of_a_split_gguf_file_is_refused_by_its_name() {
    let decoder = tiny().decoder;
    let whole =
        write_gguf(&gguf_metadata(decoder.config()), &gguf_tensors(&decoder), GgmlDType::F32);
    let dir = tempfile::tempdir().unwrap();
    let named = |name: &str| {
        let path = dir.path().join(name);
        fs::copy(whole.path(), &path).unwrap();
        load(&path, &DEVICE)
    };
    let part = "big-00002-of-00003.gguf";
    assert_refused(named(part), &[part, "3 files", "--merge"]);
    for name in ["big-00001-of-00001.gguf", "one-of-us.gguf", "-of-.gguf", "best-of-3.gguf"] {
        named(name).unwrap();
    }
}

#[test]
fn damaged_and_foreign_gguf_files_are_refused() {
    let decoder = tiny().decoder;
    let metadata = gguf_metadata(decoder.config());
    let tensors = gguf_tensors(&decoder);
    let whole = fs::read(write_gguf(&metadata, &tensors, GgmlDType::F32).path()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    for keep in [0, 3, 4, 12, 100, 1000, 3000, 5000, whole.len() / 2, whole.len() - 64] {
        fs::write(&path, &whole[..keep]).unwrap();
        assert_refused(load(&path, &DEVICE), &["model.gguf"]);
    }
    fs::write(&path, "PK\x03\x04 a zip file, not a model").unwrap();
    assert_refused(load(&path, &DEVICE), &["model.gguf", "GGUF"]);

    let changed = |key: &str, value: Option<Value>| {
        let mut metadata = metadata.clone();
        metadata.retain(|(known, _)| *known != key);
        let entry = value.map(|value| (key, value));
        let metadata: Vec<(&str, Value)> = metadata.into_iter().chain(entry).collect();
        load(write_gguf(&metadata, &tensors, GgmlDType::F32).path(), &DEVICE)
    };
    let text = |s: &str| Some(Value::String(s.into()));
    for (key, value, names) in [
        ("general.architecture", text("gemma"), ["architecture", "gemma"]),
        ("general.architecture", text("qwen2"), ["qwen2.embedding_length", "missing"]),
        ("general.alignment", Some(Value::U8(0)), ["general.alignment", "0"]),
        ("general.alignment", Some(Value::U32(0)), ["general.alignment", "0"]),
        ("general.alignment\0", Some(Value::I16(0)), ["general.alignment", "0"]),
        ("llama.block_count", None, ["llama.block_count", "missing"]),
        ("llama.block_count", text("two"), ["llama.block_count", "integer"]),
        ("llama.block_count", Some(Value::U32(3)), ["model.layers.2", "missing"]),
        ("llama.block_count", Some(Value::U32(1)), ["model.layers.1", "no place"]),
        ("llama.attention.head_count", Some(Value::U32(0)), ["num_attention_heads", "0"]),
        ("llama.attention.head_count_kv", Some(Value::U32(4)), ["attn_k", "rows"]),
        ("llama.feed_forward_length", Some(Value::I32(-1)), ["feed_forward_length", "llama"]),
        ("llama.expert_count", Some(Value::U32(8)), ["expert_count", "mixtures"]),
        ("llama.rope.scaling.type", text("longrope"), ["rope.scaling", "longrope"]),
        ("llama.rope.scaling.factor", Some(Value::F32(0.5)), ["rope_scaling", "0.5"]),
        ("split.count", Some(Value::U16(3)), ["split model", "3 files"]),
        ("tokenizer.ggml.model", text("bert"), ["tokenizer.ggml.model", "bert"]),
        ("tokenizer.ggml.pre", text("tekken"), ["tokenizer.ggml.pre", "tekken"]),
        ("llama.attention.sliding_window", Some(Value::U32(8)), ["sliding_window", "8"]),
        ("tokenizer.ggml.merges", None, ["tokenizer.ggml.merges", "missing"]),
        ("tokenizer.ggml.tokens", text("a"), ["tokenizer.ggml.tokens", "array"]),
        ("tokenizer.ggml.eos_token_id", Some(Value::U32(64)), ["eos_token_id", "64"]),
        ("tokenizer.ggml.token_type", Some(Value::Array(vec![])), ["token_type", "64"]),
    ] {
        assert_refused(changed(key, value), &names);
    }
    let merges = Some(Value::Array(vec![Value::String("q q".into())]));
    assert!(changed("tokenizer.ggml.merges", merges).is_err());
    let tokens: Vec<Value> = (0..65).map(|i| Value::String(format!("t{i}"))).collect();
    let metadata: Vec<(&str, Value)> = metadata
        .iter()
        .filter(|(key, _)| !key.contains("token_type") && !key.contains("merges"))
        .map(|(key, value)| match *key {
            "tokenizer.ggml.tokens" => (*key, Value::Array(tokens.clone())),
            _ => (*key, value.clone()),
        })
        .chain([("tokenizer.ggml.merges", Value::Array(vec![]))])
        .collect();
    let file = write_gguf(&metadata, &tensors, GgmlDType::F32);
    assert_refused(load(file.path(), &DEVICE), &["65 tokens", "64"]);
}

#[test]
fn no_damaged_byte_of_a_model_file_makes_a_panic() {
    let decoder = tiny().decoder;
    let tensors = gguf_tensors(&decoder);
    let gguf = write_gguf(&gguf_metadata(decoder.config()), &tensors, GgmlDType::F32);
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        fs::copy(fixture("tiny-llama").join(file), folder.path().join(file)).unwrap();
    }
    let mut rng = rng(11);
    let mut damage = |file: &Path, model: &Path, header: usize| {
        let whole = fs::read(file).unwrap();
        for _ in 0..DAMAGES {
            let mut bytes = whole.clone();
            let at = rng.random_range(0..header.min(whole.len()));
            bytes[at] = rng.random();
            fs::write(file, bytes).unwrap();
            // Either is fine: most bytes of a name or a number may be others.
            let _ = load(model, &DEVICE);
        }
        fs::write(file, whole).unwrap();
    };
    damage(gguf.path(), gguf.path(), 4096);
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        damage(&folder.path().join(file), folder.path(), 2048);
    }
}

fn gguf_tokenizer(entries: Vec<(&str, Value)>) -> Tokenizer {
    let metadata = entries.into_iter().map(|(k, v)| (k.to_string(), v));
    Tokenizer::from_gguf(&metadata.collect()).unwrap()
}

#[test]
fn pre_tokenizers_cut_text_as_their_names_say() {
    // Every byte's character is a token, and so is every merge under test.
    let cuts = |pre: &str, input: &str, merges: &[&str]| -> Vec<String> {
        let mut tokens: Vec<String> = ('!'..='~').map(String::from).collect();
        tokens.extend(["Ġ", "Ċ"].map(String::from));
        tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
        let text = |s: &str| Value::String(s.into());
        let tokenizer = gguf_tokenizer(vec![
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.pre", text(pre)),
            ("tokenizer.ggml.tokens", Value::Array(tokens.iter().map(|t| text(t)).collect())),
            ("tokenizer.ggml.merges", Value::Array(merges.iter().map(|m| text(m)).collect())),
        ]);
        let ids = tokenizer.encode(input).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), input);
        ids.iter().map(|&id| tokens[id as usize].clone()).collect()
    };
    let merges = ["1 2", "12 3", "123 4", "Ġ 1", "a Ġ", "Ġ b"];
    assert_eq!(cuts("gpt-2", "a b 1234", &merges), ["a", "Ġb", "Ġ", "1234"]);
    assert_eq!(cuts("smollm", "a b 1234", &merges), ["a", "Ġb", "Ġ", "1", "2", "3", "4"]);
    assert_eq!(cuts("llama-bpe", "a b 1234", &merges), ["a", "Ġb", "Ġ", "123", "4"]);
    assert_eq!(cuts("qwen2", "a b 1234", &merges), ["a", "Ġb", "Ġ", "1", "2", "3", "4"]);
    assert_eq!(cuts("default", "a b1234", &merges), ["a", "Ġb", "123", "4"]);
}

#[test]
fn sentence_pieces_merge_by_score_and_fall_back_to_bytes() {
    let mut pieces = vec![("<unk>", 2, 0.0), ("<s>", 3, 0.0), ("</s>", 3, 0.0)];
    let bytes: Vec<String> = (0..256).map(|b| format!("<0x{b:02X}>")).collect();
    pieces.extend(bytes.iter().map(|byte| (byte.as_str(), 6, 0.0)));
    pieces.extend([
        ("▁t", 1, -1.0),
        ("he", 1, -2.0),
        ("▁the", 1, -3.0),
        ("th", 1, -4.0),
        ("▁", 1, -10.0),
        ("t", 1, -11.0),
        ("h", 1, -12.0),
        ("e", 1, -13.0),
    ]);
    let entry = |f: fn(&(&str, i32, f32)) -> Value| Value::Array(pieces.iter().map(f).collect());
    let tokenizer = gguf_tokenizer(vec![
        ("tokenizer.ggml.model", Value::String("llama".into())),
        ("tokenizer.ggml.tokens", entry(|p| Value::String(p.0.into()))),
        ("tokenizer.ggml.token_type", entry(|p| Value::I32(p.1))),
        ("tokenizer.ggml.scores", entry(|p| Value::F32(p.2))),
        ("tokenizer.ggml.unknown_token_id", Value::U32(0)),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
    ]);
    let texts =
        |ids: &[u32]| -> Vec<&str> { ids.iter().map(|&id| pieces[id as usize].0).collect() };
    let ids = tokenizer.encode("the teth é").unwrap();
    let want = ["<s>", "▁the", "▁t", "e", "th", "▁", "<0xC3>", "<0xA9>"];
    assert_eq!(texts(&ids), want);
    assert_eq!(tokenizer.decode(&ids).unwrap(), "the teth é");
    assert_eq!(tokenizer.eos(), [2]);
}

// ---- adapters ----

fn peft_tensors() -> HashMap<String, Tensor> {
    let path = fixture("tiny-lora").join("adapter_model.safetensors");
    candle_core::safetensors::load(path, &DEVICE).unwrap()
}

fn lora(rank: usize, alpha: f64, targets: &[&str]) -> Lora {
    Lora { rank, alpha, targets: targets.iter().map(|&target| target.to_owned()).collect() }
}

/// tiny-llama with the adapters of tiny-lora.
fn adapted() -> Decoder {
    let lora = lora(2, 6.0, &["q_proj", "v_proj", "down_proj"]);
    tiny().decoder.with_lora_tensors(lora, peft_tensors()).unwrap()
}

fn logits_of(decoder: &Decoder) -> Vec<f32> {
    let Expected { ids, pads, .. } = expected("tiny-lora");
    values(&decoder.logits(&decoder.hidden(&ids, &pads).unwrap()).unwrap())
}

#[test]
fn adapters_do_what_peft_says_apart_and_merged() {
    let apart = adapted();
    assert_matches_transformers(&apart, "tiny-lora");
    let merged = apart.merged().unwrap();
    assert_eq!(merged.parameters().len(), 20);
    assert_matches_transformers(&merged, "tiny-lora");
    // A folder of PEFT's loads as the model that it makes of another.
    let loaded = load(&fixture("tiny-lora"), &DEVICE).unwrap();
    assert_matches_transformers(&loaded.decoder, "tiny-lora");
    assert_eq!(loaded.tokenizer.encode("the cat").unwrap(), [4, 5]);
    // They do something.
    let apart = logits_of(&apart);
    let plain = logits_of(&tiny().decoder);
    assert!(apart.iter().zip(&plain).any(|(a, b)| (a - b).abs() > 1.0));
}

#[test]
fn only_adapters_learn_and_they_start_from_the_model_as_it_is() {
    let decoder = adapted();
    let Expected { ids, pads, .. } = expected("tiny-llama");
    // Two for each of three projections in two layers.
    assert_gradients_are_right(&decoder.parameters(), 12, || {
        let hidden = decoder.hidden(&ids, &pads).unwrap().narrow(1, 4, 7).unwrap();
        decoder.logits(&hidden).unwrap()
    });

    let plain = logits_of(&tiny().decoder);
    let all = lora(4, 8.0, &Lora::TARGETS);
    let fresh = tiny().decoder.with_lora(all.clone(), 1).unwrap();
    assert_eq!(fresh.parameters().len(), 28);
    assert_eq!(logits_of(&fresh), plain);
    let a = |seed| {
        let decoder = tiny().decoder.with_lora(all.clone(), seed).unwrap();
        values(decoder.parameters()[0].1.as_tensor())
    };
    assert_eq!(a(1), a(1));
    assert_ne!(a(1), a(2));
    let (frozen, copy) = (fresh.frozen().unwrap(), fresh.duplicate().unwrap());
    assert!(frozen.parameters().is_empty());
    assert_eq!(copy.parameters().len(), 28);
    for (_, var) in fresh.parameters() {
        var.set(&(var.as_tensor() + 0.1).unwrap()).unwrap();
    }
    assert_ne!(logits_of(&fresh), plain);
    assert_near(&logits_of(&fresh.merged().unwrap()), &logits_of(&fresh));
    assert_eq!(logits_of(&fresh.no_grad()), logits_of(&fresh));
    for other in [frozen, copy] {
        assert_eq!(logits_of(&other), plain);
    }

    // A critic learns its head besides.
    let critic = Critic::new(tiny().decoder, 3).unwrap().with_lora(all.clone(), 1).unwrap();
    assert_eq!(critic.parameters().len(), 28 + 1);
    assert_refused(fresh.with_lora(all, 0), &["adapters already"]);
    for (wrong, name) in [
        (lora(0, 1.0, &["q_proj"]), "rank"),
        (lora(1, f64::NAN, &["q_proj"]), "alpha"),
        (lora(1, 1.0, &[]), "targets"),
        (lora(1, 1.0, &["lm_head"]), "lm_head"),
    ] {
        assert_refused(tiny().decoder.with_lora(wrong, 0), &[name]);
    }
}

#[test]
fn adapters_are_saved_for_peft_and_load_again() {
    let dir = tempfile::tempdir().unwrap();
    let Loaded { decoder, tokenizer } = tiny();
    assert_refused(
        save_adapter(dir.path(), &decoder, &tokenizer, &fixture("tiny-llama")),
        &["no adapters"],
    );
    let decoder = adapted();
    save_adapter(dir.path(), &decoder, &tokenizer, &fixture("tiny-llama")).unwrap();
    assert!(!dir.path().join("config.json").exists());
    let written = dir.path().join("adapter_model.safetensors");
    let written = candle_core::safetensors::load(written, &DEVICE).unwrap();
    let theirs = peft_tensors();
    assert_eq!(written.len(), theirs.len());
    for (name, tensor) in theirs {
        assert_eq!(values(&written[&name]), values(&tensor), "{name}");
    }
    let again = load(dir.path(), &DEVICE).unwrap().decoder;
    assert_matches_transformers(&again, "tiny-lora");
    // As a whole model.
    let whole = tempfile::tempdir().unwrap();
    save(whole.path(), &decoder, &tokenizer).unwrap();
    assert_matches_transformers(&load(whole.path(), &DEVICE).unwrap().decoder, "tiny-lora");
}

#[test]
fn adapters_that_do_more_or_do_not_fit_are_refused_by_name() {
    use serde_json::{json, Value};
    let with = |edit: &dyn Fn(&mut Value)| {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("adapter_config.json");
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(fixture("tiny-lora").join(name), dir.path().join(name)).unwrap();
        }
        edit_json(&config, |json| {
            json["base_model_name_or_path"] = json!(fixture("tiny-llama"));
            edit(json);
        });
        load(dir.path(), &DEVICE)
    };
    with(&|_| ()).unwrap();
    for (key, value, names) in [
        ("peft_type", json!("LOHA"), ["peft_type", "LOHA"]),
        ("use_dora", json!(true), ["use_dora", "true"]),
        ("use_rslora", json!(true), ["use_rslora", "true"]),
        ("rank_pattern", json!({"q_proj": 4}), ["rank_pattern", "4"]),
        ("modules_to_save", json!(["lm_head"]), ["modules_to_save", "lm_head"]),
        ("some_later_kind", json!(3), ["some_later_kind", "3"]),
        ("bias", json!("all"), ["bias", "all"]),
        ("init_lora_weights", json!("pissa"), ["init_lora_weights", "pissa"]),
        ("r", json!(3), ["lora_A", "[3, 32]"]),
        ("r", json!("2"), ["adapter_config.json", "r: \"2\""]),
        ("lora_alpha", json!(null), ["lora_alpha", "missing"]),
        ("target_modules", json!(".*proj"), ["target_modules", ".*proj"]),
        ("target_modules", json!(["q_proj", "v_proj"]), ["down_proj", "no place"]),
        ("target_modules", json!("all-linear"), ["k_proj.lora_A.weight", "missing"]),
        ("base_model_name_or_path", json!("no/such"), ["base_model_name_or_path", "no/such"]),
    ] {
        assert_refused(with(&|json| json[key] = value.clone()), &names);
    }
}

// ---- sampling ----

fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

fn sampling(temperature: f64, max_new_tokens: usize) -> Sampling {
    Sampling { temperature, max_new_tokens, ..Sampling::default() }
}

const PROMPTS: [&[u32]; 3] = [&[4, 5, 6], &[9], &[4, 9, 10, 11, 12]];

fn prompts() -> Vec<Vec<u32>> {
    PROMPTS.map(Vec::from).into()
}

#[test]
fn generation_without_temperature_takes_the_likeliest_token_of_the_full_pass() {
    let decoder = tiny().decoder;
    let mut counts = Vec::new();
    let got = generate(&decoder, &prompts(), &sampling(0.0, 9), &[], 0, &mut rng(0), &mut |n| {
        counts.push(n)
    })
    .unwrap();
    assert_eq!(got.ids.dims(), [3, 5 + 9]);
    assert_eq!((got.prompt_len, &got.pads[..]), (5, &[2, 4, 0][..]));
    assert_eq!(counts, [3; 9]);
    assert_eq!(got.finished, [false; 3]);
    for (row, prompt) in PROMPTS.iter().enumerate() {
        let mut ids = prompt.to_vec();
        for _ in 0..9 {
            let t = Tensor::from_slice(&ids, (1, ids.len()), &DEVICE).unwrap();
            let logits = decoder.logits(&decoder.hidden(&t, &[0]).unwrap()).unwrap();
            let last = values(&logits.narrow(1, ids.len() - 1, 1).unwrap());
            let best = (0..64).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();
            ids.push(best as u32);
        }
        assert_eq!(got.responses[row], ids[prompt.len()..]);
        let whole = got.ids.get(row).unwrap().to_vec1::<u32>().unwrap();
        assert_eq!(whole[got.pads[row]..], ids);
        assert!(whole[..got.pads[row]].iter().all(|&id| id == 0));
    }
}

#[test]
fn generation_is_its_seeds_and_stops_at_the_ends() {
    let decoder = tiny().decoder;
    let run = |seed, eos: &[u32]| {
        generate(&decoder, &prompts(), &sampling(1.5, 40), eos, 0, &mut rng(seed), &mut |_| ())
            .unwrap()
    };
    assert_eq!(run(1, &[]).responses, run(1, &[]).responses);
    assert_ne!(run(1, &[]).responses, run(2, &[]).responses);

    let eos: Vec<u32> = (30..60).collect();
    let got = run(1, &eos);
    assert_eq!(got.finished, [true; 3], "half of the tokens end the text");
    let longest = got.responses.iter().map(Vec::len).max().unwrap();
    assert!(longest < 40);
    assert_eq!(got.ids.dims(), [3, 5 + longest]);
    assert_eq!(got.logp.dims(), [got.responses.concat().len()]);
    for (row, response) in got.responses.iter().enumerate() {
        let (last, rest) = response.split_last().unwrap();
        assert!(eos.contains(last) && rest.iter().all(|id| !eos.contains(id)));
        let ids = got.ids.get(row).unwrap().to_vec1::<u32>().unwrap();
        let len = response.len();
        assert_eq!(ids[5..5 + len], response[..]);
        assert!(ids[5 + len..].iter().all(|&id| id == 0));
    }
}

/// Shares of each token in many draws.
fn shares(logits: &[f32], sampling: &Sampling) -> Vec<f64> {
    let mut rng = rng(7);
    let mut counts = vec![0f64; logits.len()];
    const DRAWS: usize = 40_000;
    for _ in 0..DRAWS {
        counts[sample(logits, sampling, &mut rng).unwrap().token as usize] += 1.0 / DRAWS as f64;
    }
    counts
}

#[track_caller]
fn assert_shares(logits: &[f32], sampling: &Sampling, want: &[f64]) {
    for seed in 0..20 {
        let Drawn { token, logp } = sample(logits, sampling, &mut rng(seed)).unwrap();
        // The logits are rounded.
        assert!(abs_diff_eq!(logp, want[token as usize].ln(), epsilon = 1e-3), "{token}: {logp}");
    }
    // Four standard deviations of a share of 40 000 draws.
    for (token, (got, want)) in shares(logits, sampling).iter().zip(want).enumerate() {
        assert!(abs_diff_eq!(got, want, epsilon = 0.01), "token {token}: {got}, not {want}");
        assert!(*want > 0.0 || *got == 0.0, "token {token} cannot come");
    }
}

#[test]
fn draws_follow_the_distribution() {
    let ln = |p: f32| p.ln() + 500.0;
    let logits = [ln(0.1), f32::NEG_INFINITY, ln(0.4), ln(0.2), ln(0.3)];
    let at = |temperature, top_k, top_p| Sampling { temperature, top_k, top_p, max_new_tokens: 1 };
    assert_shares(&logits, &at(1.0, None, None), &[0.1, 0.0, 0.4, 0.2, 0.3]);
    let squares = [0.01, 0.0, 0.16, 0.04, 0.09].map(|p| p / 0.3);
    assert_shares(&logits, &at(0.5, None, None), &squares);
    let best_two = [0.0, 0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0];
    assert_shares(&logits, &at(1.0, Some(2), None), &best_two);
    assert_shares(&logits, &at(1.0, None, Some(0.6)), &best_two);
    // 0.4 of the 0.9 that three tokens share is not half: the second comes in.
    assert_shares(&logits, &at(1.0, Some(3), Some(0.5)), &best_two);
    let only_best = [0.0, 0.0, 1.0, 0.0, 0.0];
    for narrow in [
        at(0.0, None, None),
        at(1e-300, None, None),
        at(1.0, Some(1), None),
        at(1.0, None, Some(1e-9)),
    ] {
        assert_shares(&logits, &narrow, &only_best);
    }
    let whole = [0.1, 0.0, 0.4, 0.2, 0.3];
    assert_shares(&logits, &at(1.0, Some(99), Some(1.0)), &whole);
}

#[test]
fn logits_that_are_no_distribution_are_errors() {
    for temperature in [0.0, 1.0] {
        let draw = |logits: &[f32]| sample(logits, &sampling(temperature, 1), &mut rng(0));
        assert_refused(draw(&[0.0, f32::NAN]), &["token 1", "NaN"]);
        assert_refused(draw(&[f32::INFINITY, 0.0]), &["token 0", "inf"]);
        assert_refused(draw(&[f32::NEG_INFINITY; 3]), &["-inf"]);
        let certain = Drawn { token: 1, logp: 0.0 };
        assert_eq!(draw(&[f32::NEG_INFINITY, -3e38]).unwrap(), certain);
    }
    let decoder = tiny().decoder;
    let norm = &decoder.parameters()[19];
    assert_eq!(norm.0, "model.norm.weight");
    norm.1.set(&(norm.1.as_tensor() * f64::NAN).unwrap()).unwrap();
    let got = generate(&decoder, &prompts(), &sampling(1.0, 2), &[], 0, &mut rng(0), &mut |_| ());
    assert_refused(got, &["response 0", "NaN"]);
}

#[test]
fn bad_settings_and_prompts_are_refused_by_name() {
    let decoder = tiny().decoder;
    let run = |prompts: &[Vec<u32>], sampling: &Sampling| {
        generate(&decoder, prompts, sampling, &[], 0, &mut rng(0), &mut |_| ())
    };
    let plain = Sampling::default();
    let change = |f: fn(&mut Sampling)| {
        let mut sampling = plain.clone();
        f(&mut sampling);
        run(&prompts(), &sampling)
    };
    assert_refused(change(|s| s.temperature = f64::NAN), &["--temperature"]);
    assert_refused(change(|s| s.temperature = -1.0), &["--temperature"]);
    assert_refused(change(|s| s.top_k = Some(0)), &["--top-k"]);
    assert_refused(change(|s| s.top_p = Some(0.0)), &["--top-p"]);
    assert_refused(change(|s| s.top_p = Some(f64::NAN)), &["--top-p"]);
    assert_refused(change(|s| s.max_new_tokens = 0), &["--max-new-tokens"]);
    assert_refused(change(|s| s.max_new_tokens = 60), &["--max-new-tokens", "64"]);
    assert_refused(change(|s| s.max_new_tokens = usize::MAX), &["--max-new-tokens"]);
    assert_refused(run(&[], &plain), &["prompts"]);
    assert_refused(run(&[vec![4], vec![]], &plain), &["prompt 1"]);
    assert_refused(run(&[vec![64]], &plain), &["token id", "64"]);
}
