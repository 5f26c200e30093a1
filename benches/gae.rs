//! Advantages and returns. `gae` has rewards and values of whole rows; `gae_shaping` makes the
//! rewards of KL and scores, in padded rows; `gae_spans` and `gae_gaps` have masked tokens between others;
//! `gae_packed` and `gae_padded` are the same rows of 1 to 2048 tokens. `fused` is the function on slices,
//! writing where there is memory; that of `gae_tensor` is the candle function, which allocates its three
//! outputs.

mod common;

use candle_core::{DType, Tensor};
use common::*;
use criterion::{criterion_group, criterion_main, Criterion};
use ppo_kernels::gae::cpu::{self, Inputs, Outputs};
use ppo_kernels::gae::{gae, GaeInputs, GaeOptions};
use ppo_kernels::moments::Moments;
use ppo_kernels::tolerance;

const TOLERANCE: f32 = tolerance::GAE.benches.rel as f32;

fn options() -> GaeOptions {
    GaeOptions { gamma: 0.99, lambda: 0.95, ..Default::default() }
}

fn random(seed: u64, batch: usize, seq_len: usize) -> Tensor {
    tensor(uniform(&mut rng(seed), batch * seq_len, 0.0, 1.0), &[batch, seq_len], DType::F32)
}

fn check(advantages: &[f32], returns: &[f32], candle: &(Tensor, Tensor)) {
    agree("advantages", advantages, &to_vec(&candle.0), TOLERANCE);
    agree("returns", returns, &to_vec(&candle.1), TOLERANCE);
}

/// Rewards and values in, advantages and returns out.
fn walk(batch: usize, seq_len: usize) -> Walk {
    Walk { read: 8 * batch * seq_len, write: 8 * batch * seq_len }
}

/// The function on slices, with the moments.
fn fill(inputs: Inputs, batch: usize, seq_len: usize, advantages: &mut [f32], returns: &mut [f32]) {
    let mut moments = [Moments::default()];
    let moments = Some(&mut moments[..]);
    let outputs = Outputs { advantages, returns, shaped_rewards: None, moments };
    cpu::gae(inputs, batch, seq_len, &options(), outputs).unwrap();
}

fn plain(criterion: &mut Criterion, batch: usize, seq_len: usize) {
    let (shape, walk) = (format!("f32_{batch}x{seq_len}"), walk(batch, seq_len));
    on_cpu(criterion, "gae", &shape, &[walk], || {
        let (rewards, values) = (random(1, batch, seq_len), random(2, batch, seq_len));
        let inputs = (to_vec(&rewards), to_vec(&values));
        let fused = move |advantages: &mut [f32], returns: &mut [f32]| {
            let inputs = Inputs { rewards: Some(&inputs.0), ..Inputs::new(&inputs.1) };
            fill(inputs, batch, seq_len, advantages, returns);
        };
        let candle = move || compositions::gae(&rewards, &values, &options()).unwrap();
        let [mut advantages, mut returns] = [(); 2].map(|()| vec![0.0; batch * seq_len]);
        fused(&mut advantages, &mut returns);
        check(&advantages, &returns, &candle());
        (move || fused(&mut advantages, &mut returns), candle)
    });
}

fn tensors(criterion: &mut Criterion, batch: usize, seq_len: usize) {
    let (shape, walk) = (format!("f32_{batch}x{seq_len}"), walk(batch, seq_len));
    compare(criterion, "gae_tensor", &shape, &[walk], || {
        let (rewards, values) = (random(1, batch, seq_len), random(2, batch, seq_len));
        let inputs = (rewards.clone(), values.clone());
        let fused = move || {
            let inputs = GaeInputs { rewards: Some(&rewards), ..GaeInputs::new(&values) };
            gae(&inputs, &options()).unwrap()
        };
        let candle = move || compositions::gae(&inputs.0, &inputs.1, &options()).unwrap();
        let ours = fused();
        check(&to_vec(&ours.advantages), &to_vec(&ours.returns), &candle());
        (fused, candle)
    });
}

fn shaping(criterion: &mut Criterion, batch: usize, seq_len: usize) {
    let tokens = batch * seq_len;
    // Values, KL and mask in; advantages and returns out.
    let walk = Walk { read: 9 * tokens, write: 8 * tokens };
    on_cpu(criterion, "gae_shaping", &format!("f32_{batch}x{seq_len}"), &[walk], || {
        let (values, kl) = (random(1, batch, seq_len), random(2, batch, seq_len));
        let scores = tensor(uniform(&mut rng(3), batch, 0.0, 3.0), &[batch], DType::F32);
        let (mask, last) = padding(&mut rng(4), batch, seq_len);
        let mask = Tensor::from_vec(mask, (batch, seq_len), device()).unwrap();
        let last = Tensor::from_vec(last, batch, device()).unwrap();

        let raw = (to_vec(&values), to_vec(&kl), to_vec(&scores));
        let factors = mask.to_dtype(DType::F32).unwrap();
        let mask: Vec<u8> = mask.flatten_all().unwrap().to_vec1().unwrap();
        let fused = move |advantages: &mut [f32], returns: &mut [f32]| {
            let (values, kl, scores) = &raw;
            let inputs = Inputs {
                kl: Some(kl),
                scores: Some(scores),
                mask: Some(&mask),
                ..Inputs::new(values)
            };
            fill(inputs, batch, seq_len, advantages, returns);
        };
        let candle = move || {
            compositions::masked_gae(&values, &kl, &scores, &last, &factors, &options()).unwrap()
        };
        let [mut advantages, mut returns] = [(); 2].map(|()| vec![0.0; tokens]);
        fused(&mut advantages, &mut returns);
        check(&advantages, &returns, &candle());
        (move || fused(&mut advantages, &mut returns), candle)
    });
}

/// Rows with masked tokens between the others: the same columns in every row, which candle's own ops are
/// given already taken out.
fn gaps(
    criterion: &mut Criterion,
    pass: &str,
    batch: usize,
    seq_len: usize,
    keep: fn(usize) -> bool,
) {
    let tokens = batch * seq_len;
    let walk = Walk { read: 9 * tokens, write: 8 * tokens };
    on_cpu(criterion, pass, &format!("f32_{batch}x{seq_len}"), &[walk], || {
        let (rewards, values) = (random(1, batch, seq_len), random(2, batch, seq_len));
        let columns: Vec<u32> = (0..seq_len).filter(|&t| keep(t)).map(|t| t as u32).collect();
        let kept = Tensor::new(&columns[..], device()).unwrap();
        let mask: Vec<u8> = (0..tokens).map(|i| u8::from(keep(i % seq_len))).collect();
        let inputs = (to_vec(&rewards), to_vec(&values));
        let fused = move |advantages: &mut [f32], returns: &mut [f32]| {
            let rewards = Some(&inputs.0[..]);
            let inputs = Inputs { rewards, mask: Some(&mask), ..Inputs::new(&inputs.1) };
            fill(inputs, batch, seq_len, advantages, returns);
        };
        let [rewards, values] =
            [rewards, values].map(|x| x.index_select(&kept, 1).unwrap().contiguous().unwrap());
        let candle = move || compositions::gae(&rewards, &values, &options()).unwrap();
        let [mut advantages, mut returns] = [(); 2].map(|()| vec![0.0; tokens]);
        fused(&mut advantages, &mut returns);
        let of_kept = |x: &[f32]| -> Vec<f32> {
            x.chunks(seq_len).flat_map(|row| columns.iter().map(|&t| row[t as usize])).collect()
        };
        check(&of_kept(&advantages), &of_kept(&returns), &candle());
        (move || fused(&mut advantages, &mut returns), candle)
    });
}

/// A pack, and the same rows with padding; candle's own ops have padding in both.
fn packs(criterion: &mut Criterion) {
    let (rows, width) = (pack::ROWS, pack::WIDTH);
    let offsets = pack::offsets();
    let (tokens, mask) = (offsets[rows] as usize, pack::mask(&offsets));
    for packed in [true, false] {
        let (pass, shape) = pack::group("gae", packed);
        // What the rows need; a mask is read once more.
        let walk = Walk { read: 8 * tokens, write: 8 * tokens };
        on_cpu(criterion, &pass, &shape, &[walk], || {
            let masked = |seed| {
                let factors = tensor(
                    mask.iter().map(|&m| f32::from(m)).collect(),
                    &[rows, width],
                    DType::F32,
                );
                (random(seed, rows, width) * factors).unwrap()
            };
            let (rewards, values) = (masked(1), masked(2));
            let given = [to_vec(&rewards), to_vec(&values)];
            let given = given.map(|x| if packed { pack::pack(&offsets, &x) } else { x });
            let (offsets, mask) = (offsets.clone(), mask.clone());
            let fused = {
                let (given, offsets, mask) = (given, offsets.clone(), mask);
                move |advantages: &mut [f32], returns: &mut [f32]| {
                    let inputs = Inputs {
                        rewards: Some(&given[0]),
                        mask: (!packed).then_some(&mask[..]),
                        offsets: packed.then_some(&offsets[..]),
                        ..Inputs::new(&given[1])
                    };
                    let seq_len = if packed { tokens } else { width };
                    fill(inputs, rows, seq_len, advantages, returns);
                }
            };
            let candle = move || compositions::gae(&rewards, &values, &options()).unwrap();
            let len = if packed { tokens } else { rows * width };
            let [mut advantages, mut returns] = [(); 2].map(|()| vec![0.0; len]);
            fused(&mut advantages, &mut returns);
            let (a, r) = candle();
            let [a, r] = [a, r].map(|x| match packed {
                true => pack::pack(&offsets, &to_vec(&x)),
                false => to_vec(&x),
            });
            agree("advantages", &advantages, &a, TOLERANCE);
            agree("returns", &returns, &r, TOLERANCE);
            (move || fused(&mut advantages, &mut returns), candle)
        });
    }
}

fn benches(criterion: &mut Criterion) {
    plain(criterion, 1, 16);
    plain(criterion, 64, 2048);
    plain(criterion, 4096, 2048);
    if !quick() {
        // Linear in B and in T.
        plain(criterion, 512, 2048);
        plain(criterion, 64, 512);
        plain(criterion, 64, 8192);
    }
    tensors(criterion, 1, 16);
    tensors(criterion, 64, 2048);
    tensors(criterion, 4096, 2048);
    shaping(criterion, 64, 2048);
    shaping(criterion, 4096, 2048);
    // Spans of 100 tokens, as of a tool's answers, and every other token by chance.
    gaps(criterion, "gae_spans", 64, 2048, |t| t % 400 < 300);
    gaps(criterion, "gae_gaps", 64, 2048, |t| (t * 0x9e37) >> 7 & 1 == 0);
    packs(criterion);
}

criterion_group!(group, benches);
criterion_main!(group);
