//! The functions of the advantages op.

use ppo_kernels::advantages::capi::*;
use ppo_kernels::advantages::cpu::{self, Inputs, Outputs, TokenOutputs};
use ppo_kernels::advantages::{
    AdvantageOptions, Baseline, Scale, Singleton, Sizes, TokenBaselineOptions, TokenStep,
};
use ppo_kernels::capi::functions::*;
use ppo_kernels::whiten::capi::{PPOK_WHITEN_EPS_IN_STD, PPOK_WHITEN_EPS_IN_VARIANCE};
use ppo_kernels::whiten::EpsPlacement;

use super::*;
use crate::common::advantages_cases::{Grouping, Run, Sample, Tokens, NO_STATS};

/// Every option away from its default, and every number of the enumerations.
fn option_sets() -> Vec<(AdvantageOptions, ppok_advantages_options)> {
    let init = || defaults(ppok_advantages_options_init);
    let mut sets = vec![(AdvantageOptions::default(), init())];
    let baselines = [
        (Baseline::None, PPOK_ADVANTAGES_BASELINE_NONE),
        (Baseline::Group, PPOK_ADVANTAGES_BASELINE_GROUP),
        (Baseline::LeaveOneOut, PPOK_ADVANTAGES_BASELINE_LEAVE_ONE_OUT),
        (Baseline::Batch, PPOK_ADVANTAGES_BASELINE_BATCH),
        (Baseline::LengthWeighted, PPOK_ADVANTAGES_BASELINE_LENGTH_WEIGHTED),
        (Baseline::RunnerUp, PPOK_ADVANTAGES_BASELINE_RUNNER_UP),
    ];
    let scales = [
        (Scale::None, PPOK_ADVANTAGES_SCALE_NONE),
        (Scale::Group, PPOK_ADVANTAGES_SCALE_GROUP),
        (Scale::LeaveOneOut, PPOK_ADVANTAGES_SCALE_LEAVE_ONE_OUT),
        (Scale::Batch, PPOK_ADVANTAGES_SCALE_BATCH),
        (Scale::Mean, PPOK_ADVANTAGES_SCALE_MEAN),
        (Scale::Nonzero, PPOK_ADVANTAGES_SCALE_NONZERO),
    ];
    let singletons = [
        (Singleton::Zero, PPOK_ADVANTAGES_SINGLETON_ZERO),
        (Singleton::Keep, PPOK_ADVANTAGES_SINGLETON_KEEP),
    ];
    let placements = [
        (EpsPlacement::Variance, PPOK_WHITEN_EPS_IN_VARIANCE),
        (EpsPlacement::Std, PPOK_WHITEN_EPS_IN_STD),
    ];
    for (i, (baseline, baseline_number)) in baselines.into_iter().enumerate() {
        for (j, (scale, scale_number)) in scales.into_iter().enumerate() {
            let (singleton, singleton_number) = singletons[(i + j) % 2];
            let (eps_placement, placement_number) = placements[(i + j / 2) % 2];
            let (eps, score_min, score_max, unbiased) = (0.3, -1.1, 0.9, i % 2 == 1);
            let own = AdvantageOptions {
                eps,
                score_min,
                score_max,
                baseline,
                scale,
                singleton,
                eps_placement,
                unbiased,
            };
            let c = ppok_advantages_options {
                eps,
                score_min,
                score_max,
                baseline: baseline_number,
                scale: scale_number,
                singleton: singleton_number,
                eps_placement: placement_number,
                unbiased: i32::from(unbiased),
                ..init()
            };
            sets.push((own, c));
        }
    }
    sets
}

fn unwritten(sample: &Sample) -> Run {
    Run {
        advantages: vec![f32::NAN; sample.sizes.batch],
        token_advantages: vec![f32::NAN; sample.tokens()],
        stats: NO_STATS,
    }
}

fn args(
    inputs: &Inputs,
    sizes: Sizes,
    options: &ppok_advantages_options,
    run: &mut Run,
) -> ppok_advantages_args {
    ppok_advantages_args {
        struct_size: size_of::<ppok_advantages_args>(),
        batch: sizes.batch,
        seq_len: sizes.seq_len,
        group_size: sizes.group_size,
        scores: inputs.scores.as_ptr(),
        groups: pointer(inputs.groups),
        lengths: pointer(inputs.lengths),
        score_baselines: pointer(inputs.score_baselines),
        mask: pointer(inputs.mask),
        offsets: pointer(inputs.offsets),
        options,
        advantages: run.advantages.as_mut_ptr(),
        token_advantages: run.token_advantages.as_mut_ptr(),
        stats: &mut run.stats,
    }
}

/// Calls `check` with inputs in groups by ids, and in groups of rows after each other.
fn with_inputs(check: impl Fn(&Sample)) {
    let rng = &mut rng(4);
    for grouping in [Grouping::Shuffled(9), Grouping::Size(4)] {
        let mut sample = Sample::new(rng, grouping, 48, 10);
        if let Some(ids) = &mut sample.groups {
            // Of each two or more.
            *ids = ids.iter().enumerate().map(|(i, id)| id % 3 + 10 * (i as i64 % 2)).collect();
        }
        check(&sample);
        check(&sample.packed(rng));
    }
}

#[test]
fn advantages_are_those_of_rust() {
    with_inputs(|sample| {
        let (inputs, sizes) = (sample.inputs(), sample.sizes);
        for (options, c) in option_sets() {
            let mut want = unwritten(sample);
            let outputs = Outputs {
                advantages: &mut want.advantages,
                token_advantages: Some(&mut want.token_advantages),
                stats: Some(std::slice::from_mut(&mut want.stats)),
            };
            cpu::outcome_advantages(inputs, sizes, &options, outputs).unwrap();

            let mut got = unwritten(sample);
            // SAFETY: lengths as said.
            ok(unsafe { ppok_advantages_cpu(&args(&inputs, sizes, &c, &mut got)) });
            assert_eq!(got.bits(), want.bits(), "{options:?}");
        }
    });
}

type TokenPair = (TokenBaselineOptions, ppok_optimal_token_baseline_options);

fn token_option_sets() -> [TokenPair; 2] {
    let init = || defaults(ppok_optimal_token_baseline_options_init);
    let own = TokenBaselineOptions { eps: 0.3, step: TokenStep::Unmasked, lone_tail: false };
    let c = ppok_optimal_token_baseline_options {
        eps: 0.3,
        step: PPOK_TOKEN_STEP_UNMASKED,
        lone_tail: 0,
        ..init()
    };
    assert_eq!(init().step, PPOK_TOKEN_STEP_COLUMN);
    [(TokenBaselineOptions::default(), init()), (own, c)]
}

fn token_args(
    tokens: &Tokens,
    options: &ppok_optimal_token_baseline_options,
    [advantages, returns]: &mut [Vec<f32>; 2],
) -> ppok_optimal_token_baseline_args {
    let (inputs, Sizes { batch, seq_len, group_size }) = (tokens.inputs(), tokens.sizes);
    ppok_optimal_token_baseline_args {
        struct_size: size_of::<ppok_optimal_token_baseline_args>(),
        batch,
        seq_len,
        group_size,
        rewards: inputs.rewards.as_ptr(),
        logp: inputs.logp.as_ptr(),
        log_sum_sq_probs: inputs.log_sum_sq_probs.as_ptr(),
        groups: pointer(inputs.groups),
        weights: pointer(inputs.weights),
        mask: pointer(inputs.mask),
        offsets: pointer(inputs.offsets),
        options,
        advantages: advantages.as_mut_ptr(),
        returns: returns.as_mut_ptr(),
    }
}

/// Calls `check` with padded rows and with packs, in groups by ids and of rows after each other.
fn with_tokens(check: impl Fn(&Tokens)) {
    let rng = &mut rng(5);
    for number in 0..4 {
        let (padded, packed, _) = Tokens::padded_and_packed(rng, number);
        check(&padded);
        check(&packed);
    }
}

#[test]
fn optimal_token_baselines_are_those_of_rust() {
    with_tokens(|tokens| {
        let unwritten = || [(); 2].map(|()| vec![f32::NAN; tokens.rewards.len()]);
        for (options, c) in token_option_sets() {
            let mut want = unwritten();
            let [advantages, returns] = &mut want;
            let outputs = TokenOutputs { returns: Some(returns), ..TokenOutputs::new(advantages) };
            cpu::optimal_token_baseline(tokens.inputs(), tokens.sizes, &options, outputs).unwrap();

            let mut got = unwritten();
            // SAFETY: lengths as said.
            ok(unsafe { ppok_optimal_token_baseline_cpu(&token_args(tokens, &c, &mut got)) });
            assert_eq!(got, want, "{options:?}");
        }
    });
}

#[cfg(feature = "simt")]
mod on_the_stand_in {
    use ppo_kernels::advantages::cuda;
    use ppo_kernels::cuda::Stream;

    use super::*;
    use crate::on_the_stand_in::*;

    #[test]
    fn advantages_are_those_of_rust() {
        let machine = machines()[0];
        let stream = Stream::simt(machine);
        with_inputs(|sample| {
            let (inputs, sizes) = (sample.inputs(), sample.sizes);
            for (options, c) in option_sets() {
                let device_inputs = cuda::Inputs {
                    scores: slice(inputs.scores),
                    groups: inputs.groups.map(slice),
                    lengths: inputs.lengths.map(slice),
                    score_baselines: inputs.score_baselines.map(slice),
                    mask: inputs.mask.map(slice),
                    offsets: inputs.offsets.map(slice),
                };
                let mut want = unwritten(sample);
                let outputs = cuda::Outputs {
                    advantages: out(&mut want.advantages),
                    token_advantages: Some(out(&mut want.token_advantages)),
                    stats: Some(out(std::slice::from_mut(&mut want.stats))),
                };
                let workspace = &mut vec![f64::NAN; cuda::workspace_len(sizes.batch)][..];
                let workspace = out(workspace);
                cuda::outcome_advantages(
                    &stream,
                    device_inputs,
                    sizes,
                    &options,
                    outputs,
                    workspace,
                )
                .unwrap();

                let mut got = unwritten(sample);
                let args = args(&inputs, sizes, &c, &mut got);
                let (pass, size) = (ppok_advantages_cuda, ppok_advantages_cuda_workspace_size);
                // SAFETY: lengths as said.
                unsafe { run(pass, size, &args, &machine) };
                assert_eq!(got.bits(), want.bits(), "{options:?}");
            }
        });
    }

    #[test]
    fn optimal_token_baselines_are_those_of_rust() {
        let machine = machines()[0];
        let stream = Stream::simt(machine);
        with_tokens(|tokens| {
            let (inputs, sizes) = (tokens.inputs(), tokens.sizes);
            let unwritten = || [(); 2].map(|()| vec![f32::NAN; tokens.rewards.len()]);
            for (options, c) in token_option_sets() {
                let device_inputs = cuda::TokenInputs {
                    rewards: slice(inputs.rewards),
                    logp: slice(inputs.logp),
                    log_sum_sq_probs: slice(inputs.log_sum_sq_probs),
                    groups: inputs.groups.map(slice),
                    weights: inputs.weights.map(slice),
                    mask: inputs.mask.map(slice),
                    offsets: inputs.offsets.map(slice),
                };
                let mut want = unwritten();
                let [advantages, returns] = &mut want;
                let outputs =
                    cuda::TokenOutputs { advantages: out(advantages), returns: Some(out(returns)) };
                let len = cuda::token_workspace_len(sizes.batch, tokens.rewards.len());
                let workspace = &mut vec![f64::NAN; len][..];
                let workspace = out(workspace);
                cuda::optimal_token_baseline(
                    &stream,
                    device_inputs,
                    sizes,
                    &options,
                    outputs,
                    workspace,
                )
                .unwrap();

                let mut got = unwritten();
                let args = token_args(tokens, &c, &mut got);
                let pass = ppok_optimal_token_baseline_cuda;
                let size = ppok_optimal_token_baseline_cuda_workspace_size;
                // SAFETY: lengths as said.
                unsafe { run(pass, size, &args, &machine) };
                assert_eq!(got, want, "{options:?}");
            }
        });
    }
}

#[test]
fn errors_name_the_field_of_the_struct() {
    type Change = fn(&mut ppok_advantages_options);
    let changes: &[(&str, Change)] = &[
        ("eps", |options| options.eps = -1.0),
        ("score_min", |options| options.score_min = f64::NAN),
        ("score_max", |options| (options.score_min, options.score_max) = (2.0, 1.0)),
        ("baseline", |options| options.baseline = 6),
        ("scale", |options| options.scale = -1),
        ("singleton", |options| options.singleton = 2),
        ("eps_placement", |options| options.eps_placement = 2),
        ("unbiased", |options| options.unbiased = 2),
    ];
    for &(field, change) in changes {
        let mut options = defaults(ppok_advantages_options_init);
        change(&mut options);
        let (scores, mut advantages) = ([1.0, 2.0], [0.0; 2]);
        // SAFETY: of numbers and pointers only.
        let args = ppok_advantages_args {
            struct_size: size_of::<ppok_advantages_args>(),
            batch: 2,
            group_size: 2,
            scores: scores.as_ptr(),
            options: &options,
            advantages: advantages.as_mut_ptr(),
            ..unsafe { std::mem::zeroed() }
        };
        // SAFETY: the arrays are as long as the sizes say.
        refused(unsafe { ppok_advantages_cpu(&args) }, field);
    }
    type TokenChange = fn(&mut ppok_optimal_token_baseline_options);
    let changes: &[(&str, TokenChange)] = &[
        ("eps", |options| options.eps = f64::INFINITY),
        ("step", |options| options.step = 2),
        ("lone_tail", |options| options.lone_tail = -1),
    ];
    for &(field, change) in changes {
        let mut options = defaults(ppok_optimal_token_baseline_options_init);
        change(&mut options);
        let tokens = Tokens::new(&mut rng(6), 6, 2, 1);
        let mut found = [(); 2].map(|()| vec![0.0; 12]);
        // SAFETY: lengths as said.
        let status =
            unsafe { ppok_optimal_token_baseline_cpu(&token_args(&tokens, &options, &mut found)) };
        refused(status, field);
    }
}
