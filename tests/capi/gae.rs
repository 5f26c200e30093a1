//! The functions of the gae op.

use ppo_kernels::capi::functions::*;
use ppo_kernels::gae::capi::*;
use ppo_kernels::gae::cpu::{self, Inputs, Outputs};
use ppo_kernels::gae::{
    GaeOptions, MaskMode, MissingEos, RewardShaping, ScoreOrder, ScorePlacement, ScoreScale,
};

use super::*;

/// Every option away from its default, and every number of the enumerations.
fn gae_option_sets() -> Vec<(GaeOptions, ppok_gae_options)> {
    let init = || defaults(ppok_gae_options_init);
    let default = GaeOptions::default();
    let shaped = |shaping| GaeOptions { shaping, ..default };
    let shaping = RewardShaping::default();
    let scale = Some(ScoreScale { mean: 0.4, std: 1.7 });
    let clipped = RewardShaping { score_scale: scale, score_min: -0.7, score_max: 1.1, ..shaping };
    vec![
        (default, init()),
        (
            GaeOptions {
                gamma: 0.97,
                lambda: 0.8,
                value_lambda: Some(0.6),
                mask_mode: MaskMode::Multiply,
                shaping: RewardShaping { kl_coef: 0.3, ..shaping },
            },
            ppok_gae_options {
                gamma: 0.97,
                lambda: 0.8,
                value_lambda: 0.6,
                mask_mode: PPOK_GAE_MASK_MULTIPLY,
                kl_coef: 0.3,
                ..init()
            },
        ),
        (
            shaped(RewardShaping { score_placement: ScorePlacement::AfterLastToken, ..clipped }),
            ppok_gae_options {
                score_placement: PPOK_GAE_SCORE_AFTER_LAST,
                score_mean: 0.4,
                score_std: 1.7,
                score_min: -0.7,
                score_max: 1.1,
                ..init()
            },
        ),
        (
            shaped(RewardShaping {
                score_order: ScoreOrder::ClipThenScale,
                missing_eos: MissingEos::Subtract(0.8),
                ..clipped
            }),
            ppok_gae_options {
                score_order: PPOK_GAE_CLIP_THEN_SCALE,
                score_mean: 0.4,
                score_std: 1.7,
                score_min: -0.7,
                score_max: 1.1,
                missing_eos: PPOK_GAE_MISSING_EOS_SUBTRACT,
                missing_eos_value: 0.8,
                ..init()
            },
        ),
        (
            shaped(RewardShaping { missing_eos: MissingEos::Replace(-2.0), ..shaping }),
            ppok_gae_options {
                missing_eos: PPOK_GAE_MISSING_EOS_REPLACE,
                missing_eos_value: -2.0,
                ..init()
            },
        ),
    ]
}

/// The three arrays of tokens, and the moments.
type Written = ([Vec<f32>; 3], [Moments; 1]);

fn unwritten(inputs: &Inputs) -> Written {
    let tokens = inputs.values.len();
    let moments = Moments { count: -1.0, mean: f64::NAN, m2: f64::NAN };
    ([(); 3].map(|()| vec![f32::NAN; tokens]), [moments])
}

fn args(
    inputs: &Inputs,
    [batch, seq_len]: [usize; 2],
    options: &ppok_gae_options,
    (tokens, moments): &mut Written,
) -> ppok_gae_args {
    let [advantages, returns, shaped_rewards] = tokens.each_mut().map(Vec::as_mut_ptr);
    ppok_gae_args {
        struct_size: size_of::<ppok_gae_args>(),
        batch,
        seq_len,
        values: inputs.values.as_ptr(),
        rewards: pointer(inputs.rewards),
        kl: pointer(inputs.kl),
        scores: pointer(inputs.scores),
        has_eos: pointer(inputs.has_eos),
        mask: pointer(inputs.mask),
        dones: pointer(inputs.dones),
        bootstrap: pointer(inputs.bootstrap),
        offsets: pointer(inputs.offsets),
        lambda_per_row: pointer(inputs.lambda_per_row),
        options,
        advantages,
        returns,
        shaped_rewards,
        moments: moments.as_mut_ptr(),
    }
}

#[track_caller]
fn assert_same(got: &Written, want: &Written, options: &GaeOptions) {
    let bits_of = |written: &Written| written.0.each_ref().map(|x| bits(x));
    assert_eq!(bits_of(got), bits_of(want), "{options:?}");
    assert_eq!(got.1, want.1, "{options:?}");
}

/// Calls `check` with inputs that are all given, and with the values alone.
fn with_gae_inputs(check: impl Fn(Inputs, usize, usize)) {
    let (rng, batch, seq_len) = (&mut rng(4), 6, 50);
    let n = batch * seq_len;
    let [values, rewards, kl] = [(); 3].map(|()| uniform(rng, n, 1.0));
    let [scores, bootstrap] = [(); 2].map(|()| uniform(rng, batch, 2.0));
    let has_eos = random_mask(rng, batch, 0.5);
    let mut mask = random_mask(rng, n, 0.9);
    mask[seq_len - 7..seq_len].fill(0);
    let dones = random_mask(rng, n, 0.05);
    let lambda_per_row: Vec<f32> = uniform(rng, batch, 1.0).iter().map(|x| x.abs()).collect();
    let all = Inputs {
        values: &values,
        rewards: Some(&rewards),
        kl: Some(&kl),
        scores: Some(&scores),
        has_eos: Some(&has_eos),
        mask: Some(&mask),
        dones: Some(&dones),
        bootstrap: Some(&bootstrap),
        offsets: None,
        lambda_per_row: Some(&lambda_per_row),
    };
    check(all, batch, seq_len);
    let offsets = [0, 0, 20, 27, 130, 130, n as i64];
    check(Inputs { offsets: Some(&offsets), lambda_per_row: None, ..all }, batch, n);
    let (scores, has_eos) = (Some(&scores[..]), Some(&has_eos[..]));
    check(Inputs { scores, has_eos, ..Inputs::new(&values) }, batch, seq_len);
}

#[test]
fn gae_is_that_of_rust() {
    with_gae_inputs(|inputs, batch, seq_len| {
        for (options, c) in gae_option_sets() {
            let mut want = unwritten(&inputs);
            let ([advantages, returns, shaped_rewards], moments) = &mut want;
            let outputs = Outputs {
                advantages,
                returns,
                shaped_rewards: Some(shaped_rewards),
                moments: Some(moments),
            };
            cpu::gae(inputs, batch, seq_len, &options, outputs).unwrap();

            let mut got = unwritten(&inputs);
            // SAFETY: lengths as said.
            ok(unsafe { ppok_gae_cpu(&args(&inputs, [batch, seq_len], &c, &mut got)) });
            assert_same(&got, &want, &options);
        }
    });
}

#[cfg(feature = "simt")]
mod on_the_stand_in {
    use ppo_kernels::cuda::Stream;
    use ppo_kernels::gae::cuda;

    use super::*;
    use crate::on_the_stand_in::*;

    #[test]
    fn gae_is_that_of_rust() {
        let machine = machines()[0];
        let stream = Stream::simt(machine);
        with_gae_inputs(|inputs, batch, seq_len| {
            for (options, c) in gae_option_sets() {
                let device_inputs = cuda::Inputs {
                    values: slice(inputs.values),
                    rewards: inputs.rewards.map(slice),
                    kl: inputs.kl.map(slice),
                    scores: inputs.scores.map(slice),
                    has_eos: inputs.has_eos.map(slice),
                    mask: inputs.mask.map(slice),
                    dones: inputs.dones.map(slice),
                    bootstrap: inputs.bootstrap.map(slice),
                    offsets: inputs.offsets.map(slice),
                    lambda_per_row: inputs.lambda_per_row.map(slice),
                };
                let len = cuda::workspace_len(&device_inputs, batch, seq_len);
                let mut want = unwritten(&inputs);
                let ([advantages, returns, shaped_rewards], moments) = &mut want;
                let outputs = cuda::Outputs {
                    advantages: out(advantages),
                    returns: out(returns),
                    shaped_rewards: Some(out(shaped_rewards)),
                    moments: Some(out(moments)),
                };
                let workspace = &mut vec![f64::NAN; len][..];
                let workspace = out(workspace);
                cuda::gae(&stream, device_inputs, batch, seq_len, &options, outputs, workspace)
                    .unwrap();

                let mut got = unwritten(&inputs);
                let args = args(&inputs, [batch, seq_len], &c, &mut got);
                // SAFETY: lengths as said.
                unsafe { run(ppok_gae_cuda, ppok_gae_cuda_workspace_size, &args, &machine) };
                assert_same(&got, &want, &options);
            }
        });
    }
}

#[test]
fn errors_name_the_field_of_the_struct() {
    type Change = fn(&mut ppok_gae_options);
    let changes: &[(&str, Change)] = &[
        ("gamma", |options| options.gamma = 2.0),
        ("lambda", |options| options.lambda = 2.0),
        ("value_lambda", |options| options.value_lambda = 2.0),
        ("kl_coef", |options| options.kl_coef = -1.0),
        ("score_std", |options| options.score_std = 0.0),
        ("score_mean", |options| (options.score_std, options.score_mean) = (1.0, f64::NAN)),
        ("score_min", |options| options.score_min = f64::INFINITY),
        ("score_max", |options| (options.score_min, options.score_max) = (2.0, 1.0)),
        ("missing_eos_value", |options| {
            options.missing_eos = PPOK_GAE_MISSING_EOS_SUBTRACT;
            options.missing_eos_value = f64::NAN;
        }),
    ];
    for &(field, change) in changes {
        let mut options = defaults(ppok_gae_options_init);
        change(&mut options);
        let (values, mut advantages, mut returns) = ([1.0], [0.0], [0.0]);
        // SAFETY: of numbers and pointers only.
        let args = ppok_gae_args {
            struct_size: size_of::<ppok_gae_args>(),
            batch: 1,
            seq_len: 1,
            values: values.as_ptr(),
            options: &options,
            advantages: advantages.as_mut_ptr(),
            returns: returns.as_mut_ptr(),
            ..unsafe { std::mem::zeroed() }
        };
        // SAFETY: the arrays are as long as the sizes say.
        refused(unsafe { ppok_gae_cpu(&args) }, field);
    }
}
