//! The functions of the preference op.

use ppo_kernels::capi::functions::*;
use ppo_kernels::preference::capi::*;
use ppo_kernels::preference::cpu::{self, Outputs, RewardModelInputs, RewardModelOutputs};
use ppo_kernels::preference::{PreferenceLoss, PreferenceStats, RewardModelOptions};

use super::*;
use crate::common::preference_cases::{
    c_options, option_sets, responses, reward_model_options, sums, unwritten, Data, Packed, Rewards,
};

/// What a pass writes: statistics, loss, losses, rewards, and the gradient.
type Written = ([PreferenceStats; 1], [f32; 1], [Vec<f32>; 3]);

fn nothing_written(lengths: [usize; 3]) -> Written {
    ([unwritten()], [f32::NAN], lengths.map(|n| vec![f32::NAN; n]))
}

fn lengths(data: &Data<f32>) -> [usize; 3] {
    [data.units(), data.rows, data.logp.len()]
}

fn args(
    data: &Data<f32>,
    options: &ppok_preference_options,
    (stats, loss, arrays): &mut Written,
) -> ppok_preference_loss_args {
    let [losses, rewards, grad_logp] = arrays.each_mut().map(Vec::as_mut_ptr);
    ppok_preference_loss_args {
        struct_size: size_of::<ppok_preference_loss_args>(),
        rows: data.rows,
        seq_len: data.seq_len,
        logp: data.logp.as_ptr(),
        ref_logp: pointer(data.ref_logp.as_deref()),
        ref_sums: pointer(data.ref_sums.as_deref()),
        mask: pointer(data.mask.as_deref()),
        lengths: pointer(data.lengths.as_deref()),
        weights: pointer(data.weights.as_deref()),
        margin: pointer(data.margin.as_deref()),
        labels: pointer(data.labels.as_deref()),
        kl: pointer(data.kl.as_deref()),
        offsets: pointer(data.offsets.as_deref()),
        options,
        stats: stats.as_mut_ptr(),
        loss: loss.as_mut_ptr(),
        losses,
        rewards,
        grad_logp,
    }
}

fn reward_args(
    given: &Rewards,
    options: &ppok_reward_model_options,
    (stats, loss, arrays): &mut Written,
) -> ppok_reward_model_loss_args {
    let [losses, _, grad_rewards] = arrays.each_mut().map(Vec::as_mut_ptr);
    ppok_reward_model_loss_args {
        struct_size: size_of::<ppok_reward_model_loss_args>(),
        pairs: given.pairs(),
        rewards: given.rewards.as_ptr(),
        margin: pointer(given.margin.as_deref()),
        weights: pointer(given.weights.as_deref()),
        options,
        stats: stats.as_mut_ptr(),
        loss: loss.as_mut_ptr(),
        losses,
        grad_rewards,
    }
}

fn c_reward_options(options: &RewardModelOptions) -> ppok_reward_model_options {
    let mut c = defaults(ppok_reward_model_options_init);
    c.center_coef = options.center_coef;
    c.denominator = or_none(options.denominator);
    c
}

#[track_caller]
fn assert_same(what: &str, got: &Written, want: &Written) {
    let all = |(stats, loss, arrays): &Written| {
        let stats = stats[0].to_array().map(f64::to_bits);
        (stats, loss[0].to_bits(), arrays.each_ref().map(|x| bits(x)))
    };
    assert_eq!(all(got), all(want), "{what}");
}

#[test]
fn the_loss_is_that_of_rust() {
    let rng = &mut rng(30);
    for (name, options) in option_sets() {
        let Packed { packed, .. } = Packed::new(rng, 10, 13, &options);
        for data in [responses(rng, 10, 13, &options), packed, sums(rng, 12, &options)] {
            let mut want = nothing_written(lengths(&data));
            let (stats, loss, [losses, rewards, grad_logp]) = &mut want;
            let outputs = Outputs {
                loss: Some(loss),
                losses: Some(losses),
                rewards: Some(rewards),
                grad_logp: Some(grad_logp),
                ..Outputs::new(stats)
            };
            cpu::preference_loss(data.inputs(), data.rows, data.seq_len, &options, outputs)
                .unwrap();

            let (c, mut got) = (c_options(&options), nothing_written(lengths(&data)));
            // SAFETY: lengths as said.
            ok(unsafe { ppok_preference_loss_cpu(&args(&data, &c, &mut got)) });
            assert_same(&name, &got, &want);
        }
    }
}

#[test]
fn the_reward_model_loss_is_that_of_rust() {
    let given = Rewards::new(&mut rng(31), 11);
    for options in reward_model_options() {
        let mut want = nothing_written([11, 0, 22]);
        let (stats, loss, [losses, _, grad_rewards]) = &mut want;
        let inputs = RewardModelInputs {
            margin: given.margin.as_deref(),
            weights: given.weights.as_deref(),
            ..RewardModelInputs::new(&given.rewards)
        };
        let outputs = RewardModelOutputs {
            loss: Some(loss),
            losses: Some(losses),
            grad_rewards: Some(grad_rewards),
            ..RewardModelOutputs::new(stats)
        };
        cpu::reward_model_loss(inputs, 11, &options, outputs).unwrap();

        let (c, mut got) = (c_reward_options(&options), nothing_written([11, 0, 22]));
        // SAFETY: lengths as said.
        ok(unsafe { ppok_reward_model_loss_cpu(&reward_args(&given, &c, &mut got)) });
        assert_same("reward model", &got, &want);
    }
}

#[cfg(feature = "simt")]
mod on_the_stand_in {
    use ppo_kernels::cuda::Stream;
    use ppo_kernels::preference::cuda;

    use super::*;
    use crate::on_the_stand_in::*;

    #[test]
    fn the_loss_is_that_of_rust() {
        let (rng, machine) = (&mut rng(32), machines()[0]);
        for (i, (name, options)) in option_sets().into_iter().enumerate() {
            let data = match i % 2 {
                0 => responses(rng, 6, 150, &options),
                _ => Packed::new(rng, 6, 150, &options).packed,
            };
            let seq_len = data.seq_len;
            let inputs = cuda::Inputs {
                ref_logp: data.ref_logp.as_deref().map(slice),
                ref_sums: data.ref_sums.as_deref().map(slice),
                mask: data.mask.as_deref().map(slice),
                lengths: data.lengths.as_deref().map(slice),
                weights: data.weights.as_deref().map(slice),
                margin: data.margin.as_deref().map(slice),
                labels: data.labels.as_deref().map(slice),
                kl: data.kl.as_deref().map(slice),
                offsets: data.offsets.as_deref().map(slice),
                ..cuda::Inputs::new(slice(&data.logp))
            };
            let mut want = nothing_written(lengths(&data));
            let (stats, loss, [losses, rewards, grad_logp]) = &mut want;
            let outputs = cuda::Outputs {
                loss: Some(out(loss)),
                losses: Some(out(losses)),
                rewards: Some(out(rewards)),
                grad_logp: Some(out(grad_logp)),
                ..cuda::Outputs::new(out(stats))
            };
            let space = &mut vec![f64::NAN; cuda::workspace_len(6, &options)][..];
            let stream = Stream::simt(machine);
            cuda::preference_loss(&stream, inputs, 6, seq_len, &options, outputs, out(space))
                .unwrap();

            let (c, mut got) = (c_options(&options), nothing_written(lengths(&data)));
            let (pass, size) =
                (ppok_preference_loss_cuda, ppok_preference_loss_cuda_workspace_size);
            // SAFETY: lengths as said.
            unsafe { run(pass, size, &args(&data, &c, &mut got), &machine) };
            assert_same(&name, &got, &want);
        }
    }

    #[test]
    fn the_reward_model_loss_is_near_that_of_the_cpu() {
        let given = Rewards::new(&mut rng(33), 9);
        for options in reward_model_options() {
            let c = c_reward_options(&options);
            let [mut got, mut want] = [(); 2].map(|()| nothing_written([9, 0, 18]));
            let (pass, size) =
                (ppok_reward_model_loss_cuda, ppok_reward_model_loss_cuda_workspace_size);
            // SAFETY: lengths as said.
            unsafe {
                run(pass, size, &reward_args(&given, &c, &mut got), &machines()[1]);
                ok(ppok_reward_model_loss_cpu(&reward_args(&given, &c, &mut want)));
            }
            let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(got.2.iter().zip(&want.2).all(|(a, b)| near(a, b)), "{got:?} {want:?}");
        }
    }
}

#[test]
fn errors_name_the_field_of_the_struct() {
    type Change = fn(&mut ppok_preference_options);
    let changes: &[(&str, Change)] = &[
        ("beta", |options| options.beta = 0.0),
        ("label_smoothing", |options| options.label_smoothing = 0.7),
        ("gamma", |options| options.gamma = f64::NAN),
        ("alpha", |options| options.alpha = 1.0),
        ("discopop_tau", |options| options.discopop_tau = 0.0),
        ("f_alpha", |options| {
            (options.f_divergence, options.f_alpha) = (PPOK_F_DIVERGENCE_ALPHA, 1.0);
        }),
        ("f_divergence", |options| options.f_divergence = 4),
        ("ld_alpha", |options| options.ld_alpha = 2.0),
        ("desirable_weight", |options| options.desirable_weight = 2.0),
        ("undesirable_weight", |options| options.undesirable_weight = -1.5),
        ("sft_coef", |options| options.sft_coef = f64::INFINITY),
        ("denominator", |options| options.denominator = 0.0),
        ("sft_denominator", |options| options.sft_denominator = -2.0),
        ("loss", |options| options.loss = PPOK_PREFERENCE_KTO + 1),
        ("average_log_prob", |options| options.average_log_prob = 2),
    ];
    let mut data = responses(&mut rng(34), 4, 3, &Default::default());
    for &(field, change) in changes {
        let mut options = defaults(ppok_preference_options_init);
        change(&mut options);
        let mut written = nothing_written(lengths(&data));
        // SAFETY: the arrays are as long as the sizes say.
        refused(unsafe { ppok_preference_loss_cpu(&args(&data, &options, &mut written)) }, field);
    }
    // A reference to a loss that has none, and a label of no class.
    let mut options = defaults(ppok_preference_options_init);
    options.loss = PPOK_PREFERENCE_SIMPO;
    let mut written = nothing_written(lengths(&data));
    // SAFETY: as above.
    let status = unsafe { ppok_preference_loss_cpu(&args(&data, &options, &mut written)) };
    refused(status, "ref_logp");
    options.loss = PPOK_PREFERENCE_KTO;
    (data.margin, data.weights, data.labels) = (None, None, Some(vec![0, 1, 3, 1]));
    assert_eq!(PreferenceLoss::Kto as i32, PPOK_PREFERENCE_KTO);
    let mut written = nothing_written(lengths(&data));
    // SAFETY: as above.
    unsafe {
        let status = ppok_preference_loss_cpu(&args(&data, &options, &mut written));
        assert_eq!(status, PPOK_STATUS_OPTION);
        let said = std::ffi::CStr::from_ptr(ppok_last_error()).to_str().unwrap();
        assert_eq!(said, "preference: `labels`[2] is 3, expected 0 or 1");
    }
    let mut options = defaults(ppok_reward_model_options_init);
    options.center_coef = -1.0;
    let given = Rewards::new(&mut rng(35), 3);
    let mut written = nothing_written([3, 0, 6]);
    // SAFETY: as above.
    let status =
        unsafe { ppok_reward_model_loss_cpu(&reward_args(&given, &options, &mut written)) };
    refused(status, "center_coef");
}
