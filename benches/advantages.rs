//! GRPO's advantages from a score a sequence, with those of the tokens. `advantages` has groups of rows after
//! each other and `advantages_by_ids` ids in any order; `fused` is the function on slices, writing where there
//! is memory. Candle's side is of groups after each other in both, to which ids would have to be sorted.

mod common;

use candle_core::{DType, Tensor, D};
use common::*;
use criterion::{criterion_group, criterion_main, Criterion};
use ppo_kernels::advantages::cpu::{self, Inputs, Outputs};
use ppo_kernels::advantages::{AdvantageOptions, Sizes};
use ppo_kernels::tolerance;

const TOLERANCE: f32 = tolerance::ADVANTAGES.benches.rel as f32;

/// Rows of a group.
const SIZE: usize = 8;

fn candle(scores: &Tensor, factors: &Tensor, eps: f64) -> candle_core::Result<Tensor> {
    let groups = scores.reshape(((), SIZE))?;
    let deviations = groups.broadcast_sub(&groups.mean_keepdim(D::Minus1)?)?;
    let std = groups.var_keepdim(D::Minus1)?.sqrt()?;
    let advantages = deviations.broadcast_div(&(std + eps)?)?;
    factors.broadcast_mul(&advantages.reshape(((), 1))?)
}

fn grpo(criterion: &mut Criterion, pass: &str, batch: usize, seq_len: usize, by_ids: bool) {
    let tokens = batch * seq_len;
    let walk = Walk { read: tokens + batch * if by_ids { 12 } else { 4 }, write: 4 * tokens };
    on_cpu(criterion, pass, &format!("f32_{batch}x{seq_len}"), &[walk], || {
        let scores = uniform(&mut rng(1), batch, 0.3, 2.0);
        let (mask, _) = padding(&mut rng(2), batch, seq_len);
        let mask = Tensor::from_vec(mask, (batch, seq_len), device()).unwrap();
        let factors = mask.to_dtype(DType::F32).unwrap();
        let mask: Vec<u8> = mask.flatten_all().unwrap().to_vec1().unwrap();
        let options = AdvantageOptions::grpo();

        let theirs = tensor(scores.clone(), &[batch], DType::F32);
        let candle = move || candle(&theirs, &factors, options.eps).unwrap();
        // Groups in an order that has nothing to do with their ids.
        let ids: Vec<i64> = (0..batch / SIZE)
            .flat_map(|group| [(group as i64).wrapping_mul(0x9e37_79b9_7f4a_7c15_u64 as i64); SIZE])
            .collect();
        let mut rows = vec![0.0; batch];
        let fused = move |out: &mut [f32]| {
            let (groups, group_size) = if by_ids { (Some(&ids[..]), 0) } else { (None, SIZE) };
            let inputs = Inputs { groups, mask: Some(&mask), ..Inputs::new(&scores) };
            let outputs =
                Outputs { advantages: &mut rows, token_advantages: Some(out), stats: None };
            let sizes = Sizes { batch, seq_len, group_size };
            cpu::outcome_advantages(inputs, sizes, &options, outputs).unwrap();
        };
        let (mut fused, mut out) = (fused, vec![0.0; tokens]);
        fused(&mut out);
        agree("advantages", &out, &to_vec(&candle()), TOLERANCE);
        (move || fused(&mut out), candle)
    });
}

fn benches(criterion: &mut Criterion) {
    // Linear in B and in T.
    let shapes: &[_] = match quick() {
        true => &[(4096, 32), (4096, 2048)],
        false => &[(512, 32), (4096, 32), (4096, 256), (4096, 2048)],
    };
    for &(batch, seq_len) in shapes {
        grpo(criterion, "advantages", batch, seq_len, false);
    }
    grpo(criterion, "advantages_by_ids", 4096, 32, true);
}

criterion_group!(group, benches);
criterion_main!(group);
