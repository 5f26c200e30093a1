//! The functions of the ppo_loss op.

use ppo_kernels::capi::functions::*;
use ppo_kernels::ppo_loss::capi::*;
use ppo_kernels::ppo_loss::cpu::{self, Outputs};
use ppo_kernels::ppo_loss::{Aggregation, ClipFractionKind, PpoLossOptions, PpoStats};

use super::*;
use crate::common::ppo_loss_cases::{option_sets, rollout, unwritten, Data};

fn loss_options(options: &PpoLossOptions) -> ppok_ppo_loss_options {
    let mut c = defaults(ppok_ppo_loss_options_init);
    c.clip_range = options.clip_range;
    c.clip_range_high = or_none(options.clip_range_high);
    c.dual_clip = or_none(options.dual_clip);
    c.log_ratio_clamp = or_none(options.log_ratio_clamp);
    c.value_clip_range = or_none(options.value_clip_range);
    c.value_coef = options.value_coef;
    c.entropy_coef = options.entropy_coef;
    c.kl_coef = options.kl_coef;
    c.kl_log_ratio_clamp = or_none(options.kl.log_ratio_clamp);
    c.kl_output_clamp = or_none(options.kl.output_clamp);
    c.kl_estimator = options.kl.estimator as i32;
    c.aggregation = match options.aggregation {
        Aggregation::TokenMean => PPOK_PPO_LOSS_TOKEN_MEAN,
        Aggregation::SeqMeanTokenSum => PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_SUM,
        Aggregation::SeqMeanTokenMean => PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_MEAN,
        Aggregation::SeqMeanTokenSumNorm => PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_SUM_NORM,
        Aggregation::Constant(divisor) => {
            c.aggregation_divisor = divisor;
            PPOK_PPO_LOSS_CONSTANT
        }
    };
    c.denominator = or_none(options.denominator);
    c.clip_fraction = match options.clip_fraction {
        ClipFractionKind::ClippedBranch => PPOK_PPO_LOSS_CLIPPED_BRANCH,
        ClipFractionKind::RatioOutside => PPOK_PPO_LOSS_RATIO_OUTSIDE,
    };
    c
}

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
        mask: pointer(data.mask.as_deref()),
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

/// Rollouts with all inputs, and with those alone that are needed.
fn rollouts() -> [Data<f32>; 2] {
    let rng = &mut rng(6);
    let (batch, seq_len) = (5, 37);
    let mask = Some(random_mask(rng, batch * seq_len, 0.8));
    let all = Data { mask, ..rollout(rng, batch, seq_len) };
    let Data { logp, old_logp, advantages, .. } = all.clone();
    [all, Data { batch, seq_len, logp, old_logp, advantages, ..Data::default() }]
}

#[test]
fn the_loss_is_that_of_rust() {
    for data in rollouts() {
        let (full, n) = (data.values.is_some(), data.logp.len());
        for (name, options) in option_sets() {
            if !full && (options.entropy_coef != 0.0 || options.kl_coef != 0.0) {
                continue;
            }
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
    use ppo_kernels::cuda::Stream;
    use ppo_kernels::ppo_loss::cuda;

    use super::*;
    use crate::on_the_stand_in::*;

    #[test]
    fn the_loss_is_that_of_rust() {
        let machine = machines()[0];
        let stream = Stream::simt(machine);
        let [data, _] = rollouts();
        let (n, batch, seq_len) = (data.logp.len(), data.batch, data.seq_len);
        let inputs = cuda::Inputs {
            logp: slice(&data.logp),
            old_logp: slice(&data.old_logp),
            advantages: slice(&data.advantages),
            values: data.values.as_deref().map(slice),
            old_values: data.old_values.as_deref().map(slice),
            returns: data.returns.as_deref().map(slice),
            entropy: data.entropy.as_deref().map(slice),
            ref_logp: data.ref_logp.as_deref().map(slice),
            mask: data.mask.as_deref().map(slice),
        };
        for (name, options) in option_sets() {
            let mut want = nothing_written(n);
            let (stats, loss, gradients) = &mut want;
            let [grad_logp, grad_values, grad_entropy] =
                gradients.each_mut().map(|gradient| Some(out(gradient)));
            let (stats, loss) = (out(stats), Some(out(loss)));
            let outputs = cuda::Outputs { stats, loss, grad_logp, grad_values, grad_entropy };
            let space = &mut vec![f32::NAN; cuda::workspace_len(batch, seq_len, &options)][..];
            cuda::ppo_loss(&stream, inputs, batch, seq_len, &options, outputs, out(space)).unwrap();

            let (c, mut got) = (loss_options(&options), nothing_written(n));
            let args = args(&data, &c, &mut got);
            let (upstream, to) = (2.0_f32, [args.grad_logp, args.grad_values, args.grad_entropy]);
            let scale_args = scale_args(&upstream, n, &to.map(<*mut f32>::cast_const), &to);
            // SAFETY: lengths as said.
            unsafe {
                run(ppok_ppo_loss_cuda, ppok_ppo_loss_cuda_workspace_size, &args, &machine);
                let size = ppok_ppo_loss_scale_cuda_workspace_size;
                assert_eq!(run(ppok_ppo_loss_scale_cuda, size, &scale_args, &machine), 0);
            }
            for gradient in want.2.iter_mut().flatten() {
                // Of -0 the scaling makes 0.
                *gradient = if *gradient == 0.0 { 0.0 } else { 2.0 * *gradient };
            }
            assert_same(name, &got, &want);
        }
    }
}

#[test]
fn errors_name_the_field_of_the_struct() {
    let [data, _] = rollouts();
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
