//! The functions of the ppo_loss op.

use ppo_kernels::capi::functions::*;
use ppo_kernels::logprob::capi::ppok_logprob_options;
use ppo_kernels::ppo_loss::capi::*;
use ppo_kernels::ppo_loss::cpu::{self, Outputs};
use ppo_kernels::ppo_loss::PpoStats;

use super::*;
#[cfg(feature = "simt")]
use crate::common::logits_loss_cases::Found;
use crate::common::logits_loss_cases::{Case, SHAPES};
use crate::common::ppo_loss_cases::{
    c_options as loss_options, option_sets, rollout, unwritten, Data,
};

/// What the pass writes: statistics, loss, and gradients.
type Written = ([PpoStats; 1], [f32; 1], [Vec<f32>; 3]);

fn nothing_written(tokens: usize) -> Written {
    ([unwritten()], [f32::NAN], [(); 3].map(|()| vec![f32::NAN; tokens]))
}

fn args(
    data: &Data<f32>,
    options: &ppok_ppo_loss_options,
    (stats, loss, gradients): &mut Written,
) -> ppok_ppo_loss_args {
    let [grad_logp, grad_values, grad_entropy] = gradients.each_mut().map(Vec::as_mut_ptr);
    let only = |given: bool, gradient| if given { gradient } else { null_mut() };
    ppok_ppo_loss_args {
        struct_size: size_of::<ppok_ppo_loss_args>(),
        batch: data.batch,
        seq_len: data.seq_len,
        logp: data.logp.as_ptr(),
        old_logp: data.old_logp.as_ptr(),
        advantages: data.advantages.as_ptr(),
        values: pointer(data.values.as_deref()),
        old_values: pointer(data.old_values.as_deref()),
        returns: pointer(data.returns.as_deref()),
        entropy: pointer(data.entropy.as_deref()),
        ref_logp: pointer(data.ref_logp.as_deref()),
        rollout_logp: pointer(data.rollout_logp.as_deref()),
        weights: pointer(data.weights.as_deref()),
        mask: pointer(data.mask.as_deref()),
        offsets: pointer(data.offsets.as_deref()),
        options,
        stats: stats.as_mut_ptr(),
        loss: loss.as_mut_ptr(),
        grad_logp,
        grad_values: only(data.values.is_some(), grad_values),
        grad_entropy: only(data.entropy.is_some(), grad_entropy),
    }
}

/// Of gradients with respect to logp alone, or to all three.
fn scale_args(
    upstream: &f32,
    tokens: usize,
    stored: &[*const f32],
    to: &[*mut f32],
) -> ppok_ppo_loss_scale_args {
    let stored = |i: usize| stored.get(i).copied().unwrap_or(null());
    let to = |i: usize| to.get(i).copied().unwrap_or(null_mut());
    ppok_ppo_loss_scale_args {
        struct_size: size_of::<ppok_ppo_loss_scale_args>(),
        tokens,
        upstream,
        stored_logp: stored(0),
        stored_values: stored(1),
        stored_entropy: stored(2),
        grad_logp: to(0),
        grad_values: to(1),
        grad_entropy: to(2),
    }
}

#[track_caller]
fn assert_same(what: &str, got: &Written, want: &Written) {
    let all = |(stats, loss, gradients): &Written| {
        let stats = stats[0].to_array().map(f64::to_bits);
        (stats, loss[0].to_bits(), gradients.each_ref().map(|x| bits(x)))
    };
    assert_eq!(all(got), all(want), "{what}");
}

/// Rollouts with all inputs, padded and as a pack, and with those alone that are needed.
fn rollouts() -> [Data<f32>; 3] {
    let rng = &mut rng(6);
    let (batch, seq_len) = (5, 37);
    let mask = Some(random_mask(rng, batch * seq_len, 0.8));
    let all = Data { mask, ..rollout(rng, batch, seq_len) };
    let offsets = Some(vec![0, 7, 7, 80, 81, (batch * seq_len) as i64]);
    let packed = Data { offsets, seq_len: batch * seq_len, ..all.clone() };
    let Data { logp, old_logp, advantages, .. } = all.clone();
    [all, packed, Data { batch, seq_len, logp, old_logp, advantages, ..Data::default() }]
}

#[test]
fn the_loss_is_that_of_rust() {
    for data in rollouts() {
        let (full, n) = (data.values.is_some(), data.logp.len());
        for (name, options) in option_sets() {
            if !full && (options.entropy_coef != 0.0 || options.kl_coef != 0.0) {
                continue;
            }
            let data = data.for_options(&options);
            let mut want = nothing_written(n);
            let (stats, loss, [grad_logp, grad_values, grad_entropy]) = &mut want;
            let outputs = Outputs {
                stats,
                loss: Some(loss),
                grad_logp: Some(grad_logp),
                grad_values: full.then_some(grad_values),
                grad_entropy: full.then_some(grad_entropy),
            };
            cpu::ppo_loss(data.inputs(), data.batch, data.seq_len, &options, outputs).unwrap();

            let (c, mut got) = (loss_options(&options), nothing_written(n));
            // SAFETY: lengths as said.
            ok(unsafe { ppok_ppo_loss_cpu(&args(&data, &c, &mut got)) });
            assert_same(name, &got, &want);
        }
    }
}

/// What the loss from logits writes.
struct FromLogits<T> {
    logp: Vec<f32>,
    entropy: Vec<f32>,
    stats: [PpoStats; 1],
    loss: [f32; 1],
    grad_logits: Vec<T>,
}

impl<T: Logit> FromLogits<T> {
    fn unwritten(case: &Case<T>) -> Self {
        let n = case.targets.len();
        Self {
            logp: vec![f32::NAN; n],
            entropy: vec![f32::NAN; n],
            stats: [unwritten()],
            loss: [f32::NAN],
            grad_logits: vec![T::ZERO; case.logits.len()],
        }
    }

    fn bits(&self) -> [Vec<u32>; 4] {
        let numbers = [&self.logp, &self.entropy, &wide(&self.grad_logits)].map(|x| bits(x));
        let [logp, entropy, grad] = numbers;
        let mut stats: Vec<u32> = bits(&self.loss);
        stats.extend(self.stats[0].to_array().map(|x| (x as f32).to_bits()));
        [logp, entropy, grad, stats]
    }
}

fn from_logits_args<T: Logit>(
    case: &Case<T>,
    options: (&ppok_logprob_options, &ppok_ppo_loss_options),
    written: &mut FromLogits<T>,
) -> ppok_logits_ppo_loss_args {
    ppok_logits_ppo_loss_args {
        struct_size: size_of::<ppok_logits_ppo_loss_args>(),
        batch: case.shape[0],
        seq_len: case.shape[1],
        vocab: case.vocab,
        logits_type: logits_type::<T>(),
        targets_type: PPOK_I64,
        logits: case.logits.as_ptr().cast(),
        targets: case.targets.as_ptr().cast(),
        old_logp: case.old_logp.as_ptr(),
        advantages: case.advantages.as_ptr(),
        ref_logp: pointer(case.ref_logp.as_deref()),
        rollout_logp: pointer(case.rollout_logp.as_deref()),
        weights: pointer(case.weights.as_deref()),
        mask: pointer(case.mask.as_deref()),
        offsets: pointer(case.offsets.as_deref()),
        logprob_options: options.0,
        options: options.1,
        logp: written.logp.as_mut_ptr(),
        stats: written.stats.as_mut_ptr(),
        grad_logits: written.grad_logits.as_mut_ptr().cast(),
        entropy: written.entropy.as_mut_ptr(),
        loss: written.loss.as_mut_ptr(),
    }
}

#[test]
fn the_loss_from_logits_is_that_of_rust() {
    fn of_type<T: Logit>() {
        for (number, (shape, vocab)) in SHAPES.into_iter().enumerate() {
            let case = Case::<T>::new(&mut rng(20), shape, vocab, number);
            let mut want = FromLogits::unwritten(&case);
            let FromLogits { logp, entropy, stats, loss, grad_logits } = &mut want;
            let inputs = cpu::LogitsInputs {
                ref_logp: case.ref_logp.as_deref(),
                rollout_logp: case.rollout_logp.as_deref(),
                weights: case.weights.as_deref(),
                mask: case.mask.as_deref(),
                offsets: case.offsets.as_deref(),
                ..cpu::LogitsInputs::new(
                    &case.logits,
                    &case.targets,
                    &case.old_logp,
                    &case.advantages,
                )
            };
            let outputs = cpu::LogitsOutputs {
                entropy: Some(entropy),
                loss: Some(loss),
                ..cpu::LogitsOutputs::new(logp, stats, grad_logits)
            };
            let sizes = [case.shape[0], case.shape[1], vocab];
            let (first, second) = (&case.logprob_options, &case.options);
            cpu::logits_ppo_loss(inputs, sizes, first, second, outputs).unwrap();

            let mut got = FromLogits::unwritten(&case);
            let options = (&super::logprob::c_options(first), &loss_options(second));
            let args = from_logits_args(&case, options, &mut got);
            // SAFETY: lengths as said.
            ok(unsafe { ppok_logits_ppo_loss_cpu(&args) });
            assert_eq!(got.bits(), want.bits(), "{shape:?} {vocab}");
        }
    }
    every_type!(of_type);
}

#[test]
fn gradients_are_scaled() {
    let stored = [0.0_f32, 1.5, -2.0, f32::MIN_POSITIVE];
    for upstream in [1.0_f32, -0.5, f32::INFINITY] {
        let want = stored.map(|g| if g == 0.0 { 0.0 } else { g * upstream });
        let (mut from, mut to, mut other) = (stored, [f32::NAN; 4], [f32::NAN; 4]);
        let (from_at, to_at) = (from.as_mut_ptr(), to.as_mut_ptr());
        // SAFETY: lengths as said.
        unsafe {
            let args = scale_args(&upstream, 4, &[from_at], &[to_at]);
            ok(ppok_ppo_loss_scale_cpu(&args));
            // One in place, and one apart.
            let other_at = other.as_mut_ptr();
            let args = scale_args(&upstream, 4, &[from_at, stored.as_ptr()], &[from_at, other_at]);
            ok(ppok_ppo_loss_scale_cpu(&args));
        }
        assert_eq!([from, to, other].map(|x| bits(&x)), [(); 3].map(|()| bits(&want)));
    }
}

#[cfg(feature = "simt")]
mod on_the_stand_in {
    use ppo_kernels::cuda::simt::Machine;
    use ppo_kernels::cuda::Stream;
    use ppo_kernels::ppo_loss::cuda;

    use super::*;
    use crate::on_the_stand_in::*;

    #[test]
    fn the_loss_is_that_of_rust() {
        let machine = machines()[0];
        let stream = Stream::simt(machine);
        for data in &rollouts()[..2] {
            the_loss_of(data, &machine, &stream);
        }
    }

    fn the_loss_of(data: &Data<f32>, machine: &Machine, stream: &Stream) {
        let (n, batch, seq_len) = (data.logp.len(), data.batch, data.seq_len);
        for (name, options) in option_sets() {
            let data = &data.for_options(&options);
            let inputs = cuda::Inputs {
                logp: slice(&data.logp),
                old_logp: slice(&data.old_logp),
                advantages: slice(&data.advantages),
                values: data.values.as_deref().map(slice),
                old_values: data.old_values.as_deref().map(slice),
                returns: data.returns.as_deref().map(slice),
                entropy: data.entropy.as_deref().map(slice),
                ref_logp: data.ref_logp.as_deref().map(slice),
                rollout_logp: data.rollout_logp.as_deref().map(slice),
                weights: data.weights.as_deref().map(slice),
                mask: data.mask.as_deref().map(slice),
                offsets: data.offsets.as_deref().map(slice),
            };
            let mut want = nothing_written(n);
            let (stats, loss, gradients) = &mut want;
            let [grad_logp, grad_values, grad_entropy] =
                gradients.each_mut().map(|gradient| Some(out(gradient)));
            let (stats, loss) = (out(stats), Some(out(loss)));
            let outputs = cuda::Outputs { stats, loss, grad_logp, grad_values, grad_entropy };
            let space = &mut vec![f32::NAN; cuda::workspace_len(batch, n, &options)][..];
            cuda::ppo_loss(stream, inputs, batch, seq_len, &options, outputs, out(space)).unwrap();

            let (c, mut got) = (loss_options(&options), nothing_written(n));
            let args = args(data, &c, &mut got);
            let (upstream, to) = (2.0_f32, [args.grad_logp, args.grad_values, args.grad_entropy]);
            let scale_args = scale_args(&upstream, n, &to.map(<*mut f32>::cast_const), &to);
            // SAFETY: lengths as said.
            unsafe {
                run(ppok_ppo_loss_cuda, ppok_ppo_loss_cuda_workspace_size, &args, machine);
                let size = ppok_ppo_loss_scale_cuda_workspace_size;
                assert_eq!(run(ppok_ppo_loss_scale_cuda, size, &scale_args, machine), 0);
            }
            for gradient in want.2.iter_mut().flatten() {
                // Of -0 the scaling makes 0.
                *gradient = if *gradient == 0.0 { 0.0 } else { 2.0 * *gradient };
            }
            assert_same(name, &got, &want);
        }
    }
}

#[cfg(feature = "simt")]
#[test]
fn the_loss_from_logits_runs_on_the_stand_in() {
    use crate::on_the_stand_in::{machines, run};
    fn of_type<T: Logit>() {
        for (number, (shape, vocab)) in SHAPES.into_iter().enumerate() {
            let case = Case::<T>::new(&mut rng(21), shape, vocab, number);
            let (first, second) =
                (super::logprob::c_options(&case.logprob_options), loss_options(&case.options));
            let mut got = FromLogits::unwritten(&case);
            let args = from_logits_args(&case, (&first, &second), &mut got);
            let (pass, size) =
                (ppok_logits_ppo_loss_cuda, ppok_logits_ppo_loss_cuda_workspace_size);
            // SAFETY: lengths as said.
            unsafe { run(pass, size, &args, &machines()[number % 2]) };
            let FromLogits { logp, entropy, stats, grad_logits, .. } = got;
            let grad_logits = wide(&grad_logits);
            case.check("C", &Found { logp, entropy, stats: stats[0], grad_logits });
        }
    }
    every_type!(of_type);
}

#[test]
fn errors_name_the_field_of_the_struct() {
    let [data, ..] = rollouts();
    type Change = fn(&mut ppok_ppo_loss_options);
    let changes: &[(&str, Change)] = &[
        ("clip_range", |options| options.clip_range = -2.0),
        ("clip_range_high", |options| options.clip_range_high = -2.0),
        ("dual_clip", |options| options.dual_clip = 1.0),
        ("log_ratio_clamp", |options| options.log_ratio_clamp = 0.0),
        ("value_clip_range", |options| options.value_clip_range = -2.0),
        ("kl_log_ratio_clamp", |options| options.kl_log_ratio_clamp = 0.0),
        ("kl_output_clamp", |options| options.kl_output_clamp = 0.0),
        ("aggregation_divisor", |options| options.aggregation = PPOK_PPO_LOSS_CONSTANT),
        ("denominator", |options| options.denominator = 0.0),
    ];
    for &(field, change) in changes {
        let mut options = defaults(ppok_ppo_loss_options_init);
        change(&mut options);
        let mut written = nothing_written(data.logp.len());
        // SAFETY: the arrays are as long as the sizes say.
        refused(unsafe { ppok_ppo_loss_cpu(&args(&data, &options, &mut written)) }, field);
    }
}
