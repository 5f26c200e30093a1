//! The clipped loss with its value term and a mask, and its gradients to logp and values. `fused` of
//! `ppo_loss_forward_backward` is the function on slices, which makes loss, gradients and twenty
//! statistics in one pass, writing where there is memory; that of `ppo_loss_autograd` is the candle
//! function and `backward`, which allocate. candle's composition is the same in both: forward, then
//! `backward`, without statistics. Then some losses of the family, in the same way.

mod common;

use candle_core::{DType, Tensor, Var};
use common::minibatch::Minibatch;
use common::*;
use criterion::{criterion_group, criterion_main, Criterion};
use ppo_kernels::ppo_loss::cpu::{self, Inputs, Outputs};
use ppo_kernels::ppo_loss::{PpoLossOptions, PpoStats};
use ppo_kernels::tolerance;

const TOLERANCE: f32 = tolerance::PPO_LOSS.benches.rel as f32;

/// Logp, old logp, advantages, values, old values, returns and mask in; two gradients out.
fn walk(tokens: usize) -> Walk {
    Walk { read: 25 * tokens, write: 8 * tokens }
}

fn minibatch(batch: usize, seq_len: usize) -> (Var, Minibatch) {
    let logp = uniform(&mut rng(1), batch * seq_len, -3.0, 2.0);
    let logp = Var::from_tensor(&tensor(logp, &[batch, seq_len], DType::F32)).unwrap();
    let minibatch = Minibatch::new(&logp);
    (logp, minibatch)
}

fn forward_backward(criterion: &mut Criterion, batch: usize, seq_len: usize) {
    let (tokens, shape) = (batch * seq_len, format!("f32_{batch}x{seq_len}"));
    on_cpu(criterion, "ppo_loss_forward_backward", &shape, &[walk(tokens)], || {
        let (var, data) = minibatch(batch, seq_len);
        let [logp, values] = [&var, &data.values].map(|var| to_vec(var));
        let [old_logp, advantages, old_values, returns] =
            [&data.old_logp, &data.advantages, &data.old_values, &data.returns].map(to_vec);
        let mask: Vec<u8> = data.mask.flatten_all().unwrap().to_vec1().unwrap();
        let fused = move |grad_logp: &mut [f32], grad_values: &mut [f32]| {
            let inputs = Inputs {
                values: Some(&values),
                old_values: Some(&old_values),
                returns: Some(&returns),
                mask: Some(&mask),
                ..Inputs::new(&logp, &old_logp, &advantages)
            };
            let mut stats = [PpoStats::from_array([0.0; PpoStats::LEN])];
            let outputs = Outputs {
                grad_logp: Some(grad_logp),
                grad_values: Some(grad_values),
                ..Outputs::new(&mut stats)
            };
            cpu::ppo_loss(inputs, batch, seq_len, &PpoLossOptions::default(), outputs).unwrap();
            stats
        };

        let [mut grad_logp, mut grad_values] = [(); 2].map(|()| vec![0.0; tokens]);
        fused(&mut grad_logp, &mut grad_values);
        let theirs = data.gradients(&data.composition(&var).unwrap(), &var);
        data.gradients_agree([&grad_logp, &grad_values], &theirs, TOLERANCE);
        let candle = move || data.gradients(&data.composition(&var).unwrap(), &var);
        (move || fused(&mut grad_logp, &mut grad_values), candle)
    });
}

/// A loss of the family by itself, its gradient to logp, and all statistics on our side.
fn member(criterion: &mut Criterion, name: &'static str, batch: usize, seq_len: usize) {
    let (tokens, shape) = (batch * seq_len, format!("f32_{batch}x{seq_len}"));
    // Logp, old logp, advantages and mask in; a gradient out.
    let walk = Walk { read: 13 * tokens, write: 4 * tokens };
    on_cpu(criterion, &format!("{name}_forward_backward"), &shape, &[walk], || {
        let (var, data) = minibatch(batch, seq_len);
        let [logp, old_logp, advantages] =
            [var.as_tensor(), &data.old_logp, &data.advantages].map(to_vec);
        let mask: Vec<u8> = data.mask.flatten_all().unwrap().to_vec1().unwrap();
        let options = PpoLossOptions::of(name).unwrap();
        let fused = move |grad_logp: &mut [f32]| {
            let inputs = Inputs { mask: Some(&mask), ..Inputs::new(&logp, &old_logp, &advantages) };
            let mut stats = [PpoStats::from_array([0.0; PpoStats::LEN])];
            let outputs = Outputs { grad_logp: Some(grad_logp), ..Outputs::new(&mut stats) };
            let options = PpoLossOptions { value_clip_range: None, ..options };
            cpu::ppo_loss(inputs, batch, seq_len, &options, outputs).unwrap();
            stats
        };
        let candle = move || {
            data.member(name, &var).unwrap().backward().unwrap().remove(var.as_tensor()).unwrap()
        };
        let mut grad_logp = vec![0.0; tokens];
        fused(&mut grad_logp);
        let scale = tokens as f32;
        let [ours, theirs] = [grad_logp.clone(), to_vec(&candle())]
            .map(|gradient| gradient.into_iter().map(|g| g * scale).collect::<Vec<f32>>());
        agree("gradient", &ours, &theirs, TOLERANCE);
        (move || fused(&mut grad_logp), candle)
    });
}

/// A pack, and the same rows with padding; candle's own ops have padding in both.
fn packs(criterion: &mut Criterion) {
    let (rows, width) = (pack::ROWS, pack::WIDTH);
    let offsets = pack::offsets();
    let tokens = offsets[rows] as usize;
    for packed in [true, false] {
        let (pass, shape) = pack::group("ppo_loss", packed);
        on_cpu(criterion, &pass, &shape, &[walk(tokens)], || {
            let logp = uniform(&mut rng(1), rows * width, -3.0, 2.0);
            let var = Var::from_tensor(&tensor(logp, &[rows, width], DType::F32)).unwrap();
            let data = Minibatch::masked(&var, pack::mask(&offsets));
            let (offsets, mask) = (offsets.clone(), pack::mask(&offsets));
            let theirs = data.gradients(&data.composition(&var).unwrap(), &var);
            let given = [
                var.as_tensor(),
                &data.old_logp,
                &data.advantages,
                &data.values,
                &data.old_values,
                &data.returns,
            ];
            let rows_of = |x: &Tensor| match packed {
                true => pack::pack(&offsets, &to_vec(x)),
                false => to_vec(x),
            };
            let [logp, old_logp, advantages, values, old_values, returns] = given.map(rows_of);
            let theirs = theirs.map(|gradient| rows_of(&gradient));
            let seq_len = if packed { tokens } else { width };
            let fused = move |grad_logp: &mut [f32], grad_values: &mut [f32]| {
                let inputs = Inputs {
                    values: Some(&values),
                    old_values: Some(&old_values),
                    returns: Some(&returns),
                    mask: (!packed).then_some(&mask[..]),
                    offsets: packed.then_some(&offsets[..]),
                    ..Inputs::new(&logp, &old_logp, &advantages)
                };
                let mut stats = [PpoStats::from_array([0.0; PpoStats::LEN])];
                let outputs = Outputs {
                    grad_logp: Some(grad_logp),
                    grad_values: Some(grad_values),
                    ..Outputs::new(&mut stats)
                };
                cpu::ppo_loss(inputs, rows, seq_len, &PpoLossOptions::default(), outputs).unwrap();
                stats
            };
            let [mut grad_logp, mut grad_values] = [(); 2].map(|()| vec![0.0; theirs[0].len()]);
            fused(&mut grad_logp, &mut grad_values);
            let scaled = |x: &[f32]| x.iter().map(|x| x * tokens as f32).collect::<Vec<_>>();
            for (ours, theirs) in [&grad_logp, &grad_values].into_iter().zip(&theirs) {
                agree("gradient", &scaled(ours), &scaled(theirs), TOLERANCE);
            }
            let candle = move || data.gradients(&data.composition(&var).unwrap(), &var);
            (move || fused(&mut grad_logp, &mut grad_values), candle)
        });
    }
}

fn autograd(criterion: &mut Criterion, batch: usize, seq_len: usize) {
    let walks = [walk(batch * seq_len)];
    compare(criterion, "ppo_loss_autograd", &format!("f32_{batch}x{seq_len}"), &walks, || {
        let (logp, data) = minibatch(batch, seq_len);
        let (var, minibatch) = self::minibatch(batch, seq_len);
        let fused = move || data.gradients(&data.fused(&logp), &logp);
        let [grad_logp, grad_values] = fused().map(|gradient| to_vec(&gradient));
        let theirs = minibatch.gradients(&minibatch.composition(&var).unwrap(), &var);
        minibatch.gradients_agree([&grad_logp, &grad_values], &theirs, TOLERANCE);
        let candle = move || minibatch.gradients(&minibatch.composition(&var).unwrap(), &var);
        (fused, candle)
    });
}

fn benches(criterion: &mut Criterion) {
    forward_backward(criterion, 64, 2048);
    forward_backward(criterion, 4096, 2048);
    if !quick() {
        // Linear in B and in T.
        forward_backward(criterion, 512, 2048);
        forward_backward(criterion, 64, 512);
        forward_backward(criterion, 64, 8192);
    }
    for name in ["gspo", "cispo", "sapo"] {
        member(criterion, name, 64, 2048);
        if !quick() {
            member(criterion, name, 4096, 2048);
        }
    }
    packs(criterion);
    autograd(criterion, 64, 2048);
    autograd(criterion, 4096, 2048);
}

criterion_group!(group, benches);
criterion_main!(group);
