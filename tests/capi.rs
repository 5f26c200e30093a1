//! The C functions against the Rust ones that they call: every type, every option, the same bits; on
//! the CPU, and with the feature `simt` on the stand-in for CUDA. What they refuse is in tests/capi.c.
#![cfg(feature = "capi")]

mod common;

use std::ptr::{null, null_mut};

use common::kl_cases::{all_full_options, all_token_options};
use common::ppo_loss_cases::{option_sets, rollout, Data};
use common::{random_mask, rng, uniform};
use half::{bf16, f16};
use ppo_kernels::capi::*;
use ppo_kernels::cpu::{Logit, TokenId};
use ppo_kernels::gae::{capi::*, GaeOptions, Inputs};
use ppo_kernels::gae::{
    MaskMode, MissingEos, RewardShaping, ScoreOrder, ScorePlacement, ScoreScale,
};
use ppo_kernels::kl::{capi::*, FullKlOptions, KlEstimator, KlOptions};
use ppo_kernels::logprob::{capi::*, LogprobOptions};
use ppo_kernels::ppo_loss::{capi::*, Aggregation, PpoLossOptions, PpoStats};
use ppo_kernels::whiten::{capi::*, EpsPlacement, Moments, WhitenOptions};
use ppo_kernels::{gae, kl, logprob, ppo_loss, whiten};
use rand::Rng;

#[track_caller]
fn ok(status: i32) {
    // SAFETY: the text ends in zero.
    let said = unsafe { std::ffi::CStr::from_ptr(ppok_last_error()) };
    assert_eq!(status, PPOK_STATUS_OK, "{said:?}");
}

/// A struct of options with its defaults.
fn defaults<T>(init: unsafe extern "C" fn(*mut T, usize) -> i32) -> T {
    let mut options = std::mem::MaybeUninit::<T>::uninit();
    // SAFETY: there is room, and all of it is written.
    unsafe {
        ok(init(options.as_mut_ptr(), size_of::<T>()));
        options.assume_init()
    }
}

fn or_none(option: Option<f64>) -> f64 {
    option.unwrap_or(PPOK_NONE)
}

fn pointer<T>(slice: Option<&[T]>) -> *const T {
    slice.map_or(null(), <[T]>::as_ptr)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn narrow<T: Logit>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&x| T::from_f32(x)).collect()
}

fn wide<T: Logit>(values: &[T]) -> Vec<f32> {
    values.iter().map(|x| x.to_f32()).collect()
}

fn logits_type<T: Logit>() -> i32 {
    match T::NAME {
        "f32" => PPOK_F32,
        "f16" => PPOK_F16,
        _ => PPOK_BF16,
    }
}

fn targets_type<I: TokenId>() -> i32 {
    if I::WIDE {
        PPOK_I64
    } else {
        PPOK_U32
    }
}

/// Runs `$test::<T>` for every type of logits.
macro_rules! every_type {
    ($test:ident) => {
        $test::<f32>();
        $test::<f16>();
        $test::<bf16>();
    };
}

#[test]
fn logprob_is_that_of_rust() {
    let options = LogprobOptions { temperature: 0.7, ignore_index: Some(3) };
    fn every_target<T: Logit>(options: &LogprobOptions) {
        logprob_of::<T, u32>(options, |id| id as u32);
        logprob_of::<T, i64>(options, |id| id);
    }
    for options in [LogprobOptions::default(), options] {
        every_target::<f32>(&options);
        every_target::<f16>(&options);
        every_target::<bf16>(&options);
    }
}

fn logprob_of<T: Logit, I: TokenId>(options: &LogprobOptions, id: fn(i64) -> I) {
    let (rng, rows, vocab) = (&mut rng(1), 7, 1000);
    let logits = narrow::<T>(&uniform(rng, rows * vocab, 6.0));
    let mut targets: Vec<I> = (0..rows).map(|_| id(rng.random_range(0..vocab as i64))).collect();
    targets[2] = id(3);
    let (up_logp, up_entropy) = (uniform(rng, rows, 1.0), uniform(rng, rows, 1.0));

    let mut want = [(); 4].map(|()| vec![0.0; rows]);
    let mut want_grad = vec![T::ZERO; rows * vocab];
    let [logp, entropy, max, log_sum] = &mut want;
    let stats = Some(logprob::cpu::RowStatsMut { max, log_sum });
    let outputs = logprob::cpu::Outputs { logp, entropy: Some(entropy), stats };
    logprob::cpu::forward(&logits, &targets, vocab, options, outputs).unwrap();
    let [_, entropy, max, log_sum] = &want;
    let stats = logprob::cpu::RowStats { max, log_sum, entropy };
    let upstream = logprob::cpu::Upstream { logp: Some(&up_logp), entropy: Some(&up_entropy) };
    let grad = &mut want_grad[..];
    logprob::cpu::backward(&logits, &targets, vocab, options, stats, upstream, grad).unwrap();

    let mut c = defaults(ppok_logprob_options_init);
    c.temperature = options.temperature;
    c.has_ignore_index = i32::from(options.ignore_index.is_some());
    c.ignore_index = options.ignore_index.unwrap_or(0);
    let mut got = [(); 4].map(|()| vec![f32::NAN; rows]);
    let mut grad = vec![T::ZERO; rows * vocab];
    let (z, ids) = (logits.as_ptr().cast(), targets.as_ptr().cast());
    let (z_type, ids_type) = (logits_type::<T>(), targets_type::<I>());
    let [logp, entropy, max, log_sum] = got.each_mut().map(Vec::as_mut_ptr);
    // SAFETY: lengths as said.
    unsafe {
        ok(ppok_logprob_forward_cpu(
            z, z_type, ids, ids_type, rows, vocab, &c, logp, entropy, max, log_sum,
        ));
        let (up_logp, up_entropy) = (up_logp.as_ptr(), up_entropy.as_ptr());
        let to = grad.as_mut_ptr().cast();
        ok(ppok_logprob_backward_cpu(
            z, z_type, ids, ids_type, rows, vocab, &c, max, log_sum, entropy, up_logp, up_entropy,
            to,
        ));
    }
    assert_eq!(got.each_ref().map(|x| bits(x)), want.each_ref().map(|x| bits(x)));
    assert_eq!(bits(&wide(&grad)), bits(&wide(&want_grad)));

    // Without the entropy, where no gradient comes from it.
    let mut alone = vec![T::ZERO; rows * vocab];
    let upstream = logprob::cpu::Upstream { logp: Some(&up_logp), entropy: None };
    logprob::cpu::backward(&logits, &targets, vocab, options, stats, upstream, &mut want_grad)
        .unwrap();
    // SAFETY: lengths as said.
    ok(unsafe {
        let (up_logp, to) = (up_logp.as_ptr(), alone.as_mut_ptr().cast());
        ppok_logprob_backward_cpu(
            z,
            z_type,
            ids,
            ids_type,
            rows,
            vocab,
            &c,
            max,
            log_sum,
            null(),
            up_logp,
            null(),
            to,
        )
    });
    assert_eq!(bits(&wide(&alone)), bits(&wide(&want_grad)));
}

fn estimator(estimator: KlEstimator) -> i32 {
    match estimator {
        KlEstimator::K1 => PPOK_KL_K1,
        KlEstimator::Abs => PPOK_KL_ABS,
        KlEstimator::K2 => PPOK_KL_K2,
        KlEstimator::K3 => PPOK_KL_K3,
        KlEstimator::K3StraightThrough => PPOK_KL_K3_STRAIGHT_THROUGH,
    }
}

fn token_options(options: &KlOptions) -> ppok_kl_token_options {
    let mut c = defaults(ppok_kl_token_options_init);
    c.estimator = estimator(options.estimator);
    c.log_ratio_clamp = or_none(options.log_ratio_clamp);
    c.output_clamp = or_none(options.output_clamp);
    c
}

fn full_options(options: &FullKlOptions) -> ppok_kl_full_options {
    let mut c = defaults(ppok_kl_full_options_init);
    c.temperature = options.temperature;
    c.direction = match options.direction {
        kl::KlDirection::Forward => PPOK_KL_FORWARD,
        kl::KlDirection::Reverse => PPOK_KL_REVERSE,
    };
    c
}

#[test]
fn token_kl_is_that_of_rust() {
    let (rng, n) = (&mut rng(2), 300);
    let (logp, ref_logp) = (uniform(rng, n, 5.0), uniform(rng, n, 5.0));
    let (mask, up) = (random_mask(rng, n, 0.8), uniform(rng, n, 1.0));
    for options in all_token_options() {
        let inputs = kl::cpu::TokenInputs { logp: &logp, ref_logp: &ref_logp, mask: Some(&mask) };
        let mut want = [(); 3].map(|()| vec![0.0; n]);
        let [out, grad, ref_grad] = &mut want;
        kl::cpu::token_forward(inputs, &options, out).unwrap();
        kl::cpu::token_backward(inputs, &options, &up, Some(grad), Some(ref_grad)).unwrap();

        let c = token_options(&options);
        let mut got = [(); 3].map(|()| vec![f32::NAN; n]);
        let [out, grad, ref_grad] = got.each_mut().map(Vec::as_mut_ptr);
        let (logp, ref_logp, mask) = (logp.as_ptr(), ref_logp.as_ptr(), mask.as_ptr());
        // SAFETY: lengths as said.
        unsafe {
            ok(ppok_kl_token_forward_cpu(logp, ref_logp, mask, n, &c, out));
            let up = up.as_ptr();
            ok(ppok_kl_token_backward_cpu(logp, ref_logp, mask, n, &c, up, grad, ref_grad));
        }
        assert_eq!(got.map(|x| bits(&x)), want.map(|x| bits(&x)), "{options:?}");
    }
}

#[test]
fn full_kl_is_that_of_rust() {
    every_type!(full_kl_of);
}

fn full_kl_of<T: Logit>() {
    let (rng, rows, vocab) = (&mut rng(3), 5, 700);
    let z = narrow::<T>(&uniform(rng, rows * vocab, 4.0));
    let w = narrow::<T>(&uniform(rng, rows * vocab, 4.0));
    let (mask, up) = (vec![1, 0, 1, 1, 1], uniform(rng, rows, 1.0));
    for options in all_full_options() {
        let inputs = kl::cpu::FullInputs { logits: &z, ref_logits: &w, vocab, mask: Some(&mask) };
        let mut want = vec![0.0; PPOK_KL_FULL_STATS * rows];
        kl::cpu::full_forward(inputs, &options, &mut want).unwrap();
        let mut want_grads = [(); 2].map(|()| vec![T::ZERO; rows * vocab]);
        let [grad, ref_grad] = &mut want_grads;
        kl::cpu::full_backward(inputs, &options, &want, &up, Some(grad), Some(ref_grad)).unwrap();

        let (c, kind) = (full_options(&options), logits_type::<T>());
        let mut got = vec![f32::NAN; PPOK_KL_FULL_STATS * rows];
        let mut grads = [(); 2].map(|()| vec![T::ZERO; rows * vocab]);
        let (z, w, mask) = (z.as_ptr().cast(), w.as_ptr().cast(), mask.as_ptr());
        let [grad, ref_grad] = grads.each_mut().map(|grad| grad.as_mut_ptr().cast());
        // SAFETY: lengths as said.
        unsafe {
            let stats = got.as_mut_ptr();
            ok(ppok_kl_full_forward_cpu(z, w, kind, mask, rows, vocab, &c, stats));
            let up = up.as_ptr();
            ok(ppok_kl_full_backward_cpu(
                z, w, kind, mask, rows, vocab, &c, stats, up, grad, ref_grad,
            ));
        }
        assert_eq!(bits(&got), bits(&want), "{options:?}");
        assert_eq!(grads.map(|x| bits(&wide(&x))), want_grads.map(|x| bits(&wide(&x))));
    }
}

/// Every option away from its default, and every number of the enumerations.
fn gae_option_sets() -> Vec<(GaeOptions, ppok_gae_options)> {
    let init = || defaults(ppok_gae_options_init);
    let default = GaeOptions::default();
    let shaped = |shaping| GaeOptions { shaping, ..default };
    let shaping = RewardShaping::default();
    let scale = Some(ScoreScale { mean: 0.4, std: 1.7 });
    let clipped = RewardShaping { scale, clip: Some(1.1), ..shaping };
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
            shaped(RewardShaping { placement: ScorePlacement::AfterLastToken, ..clipped }),
            ppok_gae_options {
                score_placement: PPOK_GAE_SCORE_AFTER_LAST,
                score_mean: 0.4,
                score_std: 1.7,
                score_clip: 1.1,
                ..init()
            },
        ),
        (
            shaped(RewardShaping {
                order: ScoreOrder::ClipThenScale,
                missing_eos: MissingEos::Subtract(0.8),
                ..clipped
            }),
            ppok_gae_options {
                score_order: PPOK_GAE_CLIP_THEN_SCALE,
                score_mean: 0.4,
                score_std: 1.7,
                score_clip: 1.1,
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

fn gae_inputs(inputs: &Inputs<f32>) -> ppok_gae_inputs {
    ppok_gae_inputs {
        struct_size: size_of::<ppok_gae_inputs>(),
        values: inputs.values.as_ptr(),
        rewards: pointer(inputs.rewards),
        kl: pointer(inputs.kl),
        scores: pointer(inputs.scores),
        has_eos: pointer(inputs.has_eos),
        mask: pointer(inputs.mask),
        dones: pointer(inputs.dones),
        bootstrap: pointer(inputs.bootstrap),
    }
}

/// Calls `check` with inputs that are all given, and with the values alone.
fn with_gae_inputs(check: impl Fn(Inputs<f32>, usize, usize)) {
    let (rng, batch, seq_len) = (&mut rng(4), 6, 50);
    let n = batch * seq_len;
    let [values, rewards, kl] = [(); 3].map(|()| uniform(rng, n, 1.0));
    let [scores, bootstrap] = [(); 2].map(|()| uniform(rng, batch, 2.0));
    let has_eos = random_mask(rng, batch, 0.5);
    let mut mask = random_mask(rng, n, 0.9);
    mask[seq_len - 7..seq_len].fill(0);
    let dones = random_mask(rng, n, 0.05);
    check(
        Inputs {
            values: &values,
            rewards: Some(&rewards),
            kl: Some(&kl),
            scores: Some(&scores),
            has_eos: Some(&has_eos),
            mask: Some(&mask),
            dones: Some(&dones),
            bootstrap: Some(&bootstrap),
        },
        batch,
        seq_len,
    );
    let (scores, has_eos) = (Some(&scores[..]), Some(&has_eos[..]));
    check(Inputs { scores, has_eos, ..Inputs::new(&values) }, batch, seq_len);
}

#[test]
fn gae_is_that_of_rust() {
    with_gae_inputs(|inputs, batch, seq_len| {
        for (options, c) in gae_option_sets() {
            let n = batch * seq_len;
            let mut want = [(); 3].map(|()| vec![0.0; n]);
            let [advantages, returns, rewards] = &mut want;
            let outputs = gae::cpu::Outputs { advantages, returns, rewards: Some(rewards) };
            let want_moments = gae::cpu::gae(inputs, batch, seq_len, &options, outputs).unwrap();

            let mut got = [(); 3].map(|()| vec![f32::NAN; n]);
            let mut moments = ppok_moments { count: -1.0, mean: 0.0, m2: 0.0 };
            let [advantages, returns, rewards] = got.each_mut().map(Vec::as_mut_ptr);
            let struct_size = size_of::<ppok_gae_outputs>();
            let moments_at = &raw mut moments;
            let outputs =
                ppok_gae_outputs { struct_size, advantages, returns, rewards, moments: moments_at };
            // SAFETY: lengths as said.
            ok(unsafe { ppok_gae_cpu(&gae_inputs(&inputs), batch, seq_len, &c, &outputs) });
            assert_eq!(got.map(|x| bits(&x)), want.map(|x| bits(&x)), "{options:?}");
            assert_eq!(moments, want_moments.into());
        }
    });
}

fn whiten_option_sets() -> Vec<(WhitenOptions, ppok_whiten_options)> {
    let mut sets = Vec::new();
    for (placement, number) in [
        (EpsPlacement::Variance, PPOK_WHITEN_EPS_IN_VARIANCE),
        (EpsPlacement::Std, PPOK_WHITEN_EPS_IN_STD),
    ] {
        for (unbiased, shift_mean) in [(true, true), (false, true), (true, false)] {
            let mut c = defaults(ppok_whiten_options_init);
            c.eps = 0.3;
            c.eps_placement = number;
            c.unbiased = i32::from(unbiased);
            c.shift_mean = i32::from(shift_mean);
            let options =
                WhitenOptions { eps: 0.3, eps_placement: placement, unbiased, shift_mean };
            sets.push((options, c));
        }
    }
    sets.push((WhitenOptions::default(), defaults(ppok_whiten_options_init)));
    sets
}

#[test]
fn whitening_is_that_of_rust() {
    let (rng, n) = (&mut rng(5), 3000);
    let (x, mask, up) = (uniform(rng, n, 2.0), random_mask(rng, n, 0.7), uniform(rng, n, 1.0));
    let keep = Some(&mask[..]);
    let want_moments = whiten::cpu::masked_moments(&x, keep).unwrap();
    let other = Moments { count: 12, mean: 0.5, m2: 3.0 };
    let mut moments = ppok_moments { count: 0.0, mean: 0.0, m2: 0.0 };
    // SAFETY: lengths as said.
    unsafe {
        ok(ppok_whiten_moments_cpu(x.as_ptr(), mask.as_ptr(), n, &mut moments));
        assert_eq!(moments, want_moments.into());
        let mut merged = other.into();
        ok(ppok_moments_merge(&moments, &merged, &mut merged));
        assert_eq!(merged, want_moments.merge(other).into());
    }
    for (options, c) in whiten_option_sets() {
        let mut want = [(); 3].map(|()| vec![0.0; n]);
        let [y, grad, with_grad] = &mut want;
        whiten::cpu::masked_whiten(&x, keep, &want_moments, &options, y).unwrap();
        whiten::cpu::masked_whiten_backward(&x, keep, &want_moments, &up, &options, grad).unwrap();
        whiten::cpu::masked_whiten_with_backward(keep, &want_moments, &up, &options, with_grad)
            .unwrap();

        let mut got = [(); 3].map(|()| vec![f32::NAN; n]);
        let [y, grad, with_grad] = got.each_mut().map(Vec::as_mut_ptr);
        let (x, mask, up) = (x.as_ptr(), mask.as_ptr(), up.as_ptr());
        // SAFETY: lengths as said.
        unsafe {
            ok(ppok_whiten_forward_cpu(x, mask, n, &c, &moments, y));
            ok(ppok_whiten_backward_cpu(x, mask, n, &c, &moments, up, grad));
            ok(ppok_whiten_with_backward_cpu(mask, n, &c, &moments, up, with_grad));
        }
        assert_eq!(got.map(|x| bits(&x)), want.map(|x| bits(&x)), "{options:?}");
    }
}

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
    c.kl_estimator = estimator(options.kl.estimator);
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
        ppo_loss::ClipFractionKind::ClippedBranch => PPOK_PPO_LOSS_CLIPPED_BRANCH,
        ppo_loss::ClipFractionKind::RatioOutside => PPOK_PPO_LOSS_RATIO_OUTSIDE,
    };
    c
}

fn loss_inputs(data: &Data<f32>) -> ppok_ppo_loss_inputs {
    ppok_ppo_loss_inputs {
        struct_size: size_of::<ppok_ppo_loss_inputs>(),
        logp: data.logp.as_ptr(),
        old_logp: data.old_logp.as_ptr(),
        advantages: data.advantages.as_ptr(),
        values: pointer(data.values.as_deref()),
        old_values: pointer(data.old_values.as_deref()),
        returns: pointer(data.returns.as_deref()),
        entropy: pointer(data.entropy.as_deref()),
        ref_logp: pointer(data.ref_logp.as_deref()),
        mask: pointer(data.mask.as_deref()),
    }
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

fn gradients([logp, values, entropy]: [*mut f32; 3]) -> ppok_ppo_loss_gradients {
    ppok_ppo_loss_gradients {
        struct_size: size_of::<ppok_ppo_loss_gradients>(),
        logp,
        values,
        entropy,
    }
}

#[test]
fn the_loss_is_that_of_rust() {
    for data in rollouts() {
        let (full, n) = (data.values.is_some(), data.logp.len());
        for (name, options) in option_sets() {
            if !full && (options.entropy_coef != 0.0 || options.kl_coef != 0.0) {
                continue;
            }
            let mut want = [(); 3].map(|()| vec![0.0; n]);
            let [logp, values, entropy] = &mut want;
            let found = ppo_loss::cpu::Gradients {
                logp: Some(logp),
                values: full.then_some(values),
                entropy: full.then_some(entropy),
            };
            let want_stats = ppo_loss::cpu::ppo_loss(&data.inputs(), &options, found).unwrap();

            let c = loss_options(&options);
            let mut got = [(); 3].map(|()| vec![0.0; n]);
            let mut stats = [f64::NAN; PpoStats::LEN];
            let [logp, values, entropy] = got.each_mut().map(Vec::as_mut_ptr);
            let optional = |p| if full { p } else { null_mut() };
            let grads = gradients([logp, optional(values), optional(entropy)]);
            let (inputs, batch, seq_len) = (loss_inputs(&data), data.batch, data.seq_len);
            let stats_at = stats.as_mut_ptr();
            // SAFETY: lengths as said.
            ok(unsafe { ppok_ppo_loss_cpu(&inputs, batch, seq_len, &c, stats_at, &grads) });
            assert_eq!(got.map(|x| bits(&x)), want.map(|x| bits(&x)), "{name}");
            let same = |(a, b): (&f64, &f64)| a.to_bits() == b.to_bits();
            assert!(stats.iter().zip(&want_stats.to_array()).all(same), "{name}");
        }
    }
}

#[test]
fn gradients_are_scaled() {
    let stored = [0.0_f32, 1.5, -2.0, f32::MIN_POSITIVE];
    for upstream in [1.0_f32, -0.5, f32::INFINITY] {
        let want = stored.map(|g| if g == 0.0 { 0.0 } else { g * upstream });
        let mut from = stored;
        let mut to = [f32::NAN; 4];
        let nothing = null_mut();
        let apart = gradients([nothing, to.as_mut_ptr(), nothing]);
        let at = gradients([nothing, from.as_mut_ptr(), nothing]);
        // SAFETY: lengths as said.
        unsafe {
            ok(ppok_ppo_loss_scale_cpu(&upstream, 4, &at, &apart));
            assert_eq!(bits(&to), bits(&want));
            ok(ppok_ppo_loss_scale_cpu(&upstream, 4, &at, &at));
        }
        assert_eq!(bits(&from), bits(&want));
    }
}

/// The `_cuda` functions against those of `cuda.rs`, which tests/OP_cuda.rs hold to the references.
#[cfg(feature = "simt")]
mod on_the_stand_in {
    use std::ffi::c_void;

    use ppo_kernels::cuda::simt::{Machine, Order};
    use ppo_kernels::cuda::{Device, Slice, SliceMut, Stream};

    use super::*;

    /// With clusters and without, where sums of a row's parts go through the workspace.
    fn machines() -> [Machine; 2] {
        [9, 8].map(|major| {
            let device =
                Device { compute_capability: (major, 0), max_blocks: 64, clusters: major >= 9 };
            Machine { order: Order::Lifo, device, planted_bug: "" }
        })
    }

    fn handle(machine: &Machine) -> *mut c_void {
        std::ptr::from_ref(machine).cast_mut().cast()
    }

    fn slice<T>(values: &[T]) -> Slice<'_, T> {
        // SAFETY: a launch has ended when the call returns.
        unsafe { Slice::from_raw(values.as_ptr(), values.len()) }
    }

    fn out<T>(values: &mut [T]) -> SliceMut<'_, T> {
        // SAFETY: as above.
        unsafe { SliceMut::from_raw(values.as_mut_ptr(), values.len()) }
    }

    /// As much workspace as `query` says.
    fn workspace(query: impl FnOnce(*mut usize) -> i32) -> Vec<f64> {
        let mut size = usize::MAX;
        ok(query(&mut size));
        vec![f64::NAN; size.div_ceil(size_of::<f64>())]
    }

    /// The pointer and the size of a workspace.
    fn parts(workspace: &mut [f64]) -> (*mut c_void, usize) {
        (workspace.as_mut_ptr().cast(), size_of_val(workspace))
    }

    #[test]
    fn logprob_is_that_of_rust() {
        every_type!(logprob_of);
    }

    fn logprob_of<T: Logit>() {
        // 160 KiB a row, in parts.
        let (rng, rows, vocab) = (&mut rng(7), 2, (160 << 10) / size_of::<T>() + 3);
        let logits = narrow::<T>(&uniform(rng, rows * vocab, 6.0));
        let targets = [5_u32, vocab as u32 - 1];
        let (up_logp, up_entropy) = (uniform(rng, rows, 1.0), uniform(rng, rows, 1.0));
        let options = LogprobOptions { temperature: 0.7, ignore_index: None };
        let mut c = defaults(ppok_logprob_options_init);
        c.temperature = 0.7;
        for machine in machines() {
            let stream = Stream::simt(machine);
            let (z, ids) = (slice(&logits), slice(&targets));
            let mut want = [(); 4].map(|()| vec![0.0; rows]);
            let [logp, entropy, max, log_sum] = want.each_mut().map(|x| out(x));
            let stats = Some(logprob::cuda::RowStatsMut { max, log_sum });
            let outputs = logprob::cuda::Outputs { logp, entropy: Some(entropy), stats };
            let len = logprob::cuda::workspace_len::<T>(stream.device(), rows, vocab);
            let room = &mut vec![f32::NAN; len][..];
            logprob::cuda::forward(&stream, z, ids, vocab, &options, outputs, out(room)).unwrap();
            let [_, entropy, max, log_sum] = want.each_ref().map(|x| slice(x));
            let stats = logprob::cuda::RowStats { max, log_sum, entropy };
            let (logp, entropy) = (Some(slice(&up_logp)), Some(slice(&up_entropy)));
            let upstream = logprob::cuda::Upstream { logp, entropy };
            let mut want_grad = vec![T::ZERO; rows * vocab];
            let grad = out(&mut want_grad);
            logprob::cuda::backward(&stream, z, ids, vocab, &options, stats, upstream, grad)
                .unwrap();

            let (kind, stream) = (logits_type::<T>(), handle(&machine));
            let mut got = [(); 4].map(|()| vec![f32::NAN; rows]);
            let mut grad = logits.clone();
            let (z, ids) = (grad.as_mut_ptr().cast::<c_void>(), targets.as_ptr().cast());
            let [logp, entropy, max, log_sum] = got.each_mut().map(Vec::as_mut_ptr);
            // SAFETY: lengths as said. The gradient goes over the logits.
            unsafe {
                let mut room = workspace(|size| {
                    ppok_logprob_forward_cuda_workspace_size(kind, rows, vocab, stream, size)
                });
                assert_eq!(room.is_empty(), machine.device.compute_capability.0 == 9);
                let (room, size) = parts(&mut room);
                ok(ppok_logprob_forward_cuda(
                    z, kind, ids, PPOK_U32, rows, vocab, &c, logp, entropy, max, log_sum, room,
                    size, stream,
                ));
                let (up_logp, up_entropy) = (up_logp.as_ptr(), up_entropy.as_ptr());
                ok(ppok_logprob_backward_cuda(
                    z,
                    kind,
                    ids,
                    PPOK_U32,
                    rows,
                    vocab,
                    &c,
                    max,
                    log_sum,
                    entropy,
                    up_logp,
                    up_entropy,
                    z,
                    null_mut(),
                    0,
                    stream,
                ));
            }
            assert_eq!(got.each_ref().map(|x| bits(x)), want.each_ref().map(|x| bits(x)));
            assert_eq!(bits(&wide(&grad)), bits(&wide(&want_grad)));
        }
    }

    #[test]
    fn token_kl_is_that_of_rust() {
        let (rng, n) = (&mut rng(8), 300);
        let (logp, ref_logp) = (uniform(rng, n, 5.0), uniform(rng, n, 5.0));
        let (mask, up) = (random_mask(rng, n, 0.8), uniform(rng, n, 1.0));
        let machine = machines()[0];
        let (stream, at) = (Stream::simt(machine), handle(&machine));
        for options in all_token_options() {
            let (logp_in, ref_in) = (slice(&logp), slice(&ref_logp));
            let inputs =
                kl::cuda::TokenInputs { logp: logp_in, ref_logp: ref_in, mask: Some(slice(&mask)) };
            let mut want = [(); 3].map(|()| vec![0.0; n]);
            let [kl, grad, ref_grad] = want.each_mut().map(|x| out(x));
            kl::cuda::token_forward(&stream, inputs, &options, kl).unwrap();
            let grads = (Some(grad), Some(ref_grad));
            kl::cuda::token_backward(&stream, inputs, &options, slice(&up), grads.0, grads.1)
                .unwrap();

            let c = token_options(&options);
            // In place, all of them.
            let mut got = [logp.clone(), logp.clone(), ref_logp.clone()];
            let [kl, grad, ref_grad] = got.each_mut().map(Vec::as_mut_ptr);
            let (mask, up, room) = (mask.as_ptr(), up.as_ptr(), null_mut());
            // SAFETY: lengths as said.
            unsafe {
                let other = ref_logp.as_ptr();
                ok(ppok_kl_token_forward_cuda(kl, other, mask, n, &c, kl, room, 0, at));
                ok(ppok_kl_token_backward_cuda(
                    grad, ref_grad, mask, n, &c, up, grad, ref_grad, room, 0, at,
                ));
            }
            assert_eq!(got.map(|x| bits(&x)), want.map(|x| bits(&x)), "{options:?}");
        }
    }

    #[test]
    fn full_kl_is_that_of_rust() {
        every_type!(full_kl_of);
    }

    fn full_kl_of<T: Logit>() {
        let (rng, rows, vocab) = (&mut rng(9), 2, (160 << 10) / size_of::<T>() + 3);
        let z = narrow::<T>(&uniform(rng, rows * vocab, 4.0));
        let w = narrow::<T>(&uniform(rng, rows * vocab, 4.0));
        let up = uniform(rng, rows, 1.0);
        let options = all_full_options()[3];
        for machine in machines() {
            let stream = Stream::simt(machine);
            let inputs = kl::cuda::FullInputs {
                logits: slice(&z),
                ref_logits: slice(&w),
                vocab,
                mask: None,
            };
            let mut want = vec![0.0; PPOK_KL_FULL_STATS * rows];
            let len = kl::cuda::full_workspace_len::<T>(stream.device(), rows, vocab);
            let room = &mut vec![f32::NAN; len][..];
            kl::cuda::full_forward(&stream, inputs, &options, out(&mut want), out(room)).unwrap();
            let mut want_grads = [(); 2].map(|()| vec![T::ZERO; rows * vocab]);
            let [grad, ref_grad] = want_grads.each_mut().map(|x| Some(out(x)));
            let (stats, up_in) = (slice(&want), slice(&up));
            kl::cuda::full_backward(&stream, inputs, &options, stats, up_in, grad, ref_grad)
                .unwrap();

            let (c, kind, at) = (full_options(&options), logits_type::<T>(), handle(&machine));
            let mut got = vec![f32::NAN; PPOK_KL_FULL_STATS * rows];
            let mut grads = [z.clone(), w.clone()];
            let [z, w] = grads.each_mut().map(|grad| grad.as_mut_ptr().cast::<c_void>());
            let (stats, up, mask) = (got.as_mut_ptr(), up.as_ptr(), null());
            // SAFETY: lengths as said. The gradients go over the logits.
            unsafe {
                let mut room = workspace(|size| {
                    ppok_kl_full_forward_cuda_workspace_size(kind, rows, vocab, at, size)
                });
                let (room, size) = parts(&mut room);
                ok(ppok_kl_full_forward_cuda(
                    z, w, kind, mask, rows, vocab, &c, stats, room, size, at,
                ));
                ok(ppok_kl_full_backward_cuda(
                    z,
                    w,
                    kind,
                    mask,
                    rows,
                    vocab,
                    &c,
                    stats,
                    up,
                    z,
                    w,
                    null_mut(),
                    0,
                    at,
                ));
            }
            assert_eq!(bits(&got), bits(&want));
            assert_eq!(grads.map(|x| bits(&wide(&x))), want_grads.map(|x| bits(&wide(&x))));
        }
    }

    #[test]
    fn gae_is_that_of_rust() {
        let machine = machines()[0];
        let (stream, at) = (Stream::simt(machine), handle(&machine));
        with_gae_inputs(|inputs, batch, seq_len| {
            for (options, c) in gae_option_sets() {
                let n = batch * seq_len;
                let device_inputs = gae::cuda::Inputs {
                    values: slice(inputs.values),
                    rewards: inputs.rewards.map(slice),
                    kl: inputs.kl.map(slice),
                    scores: inputs.scores.map(slice),
                    has_eos: inputs.has_eos.map(slice),
                    mask: inputs.mask.map(slice),
                    dones: inputs.dones.map(slice),
                    bootstrap: inputs.bootstrap.map(slice),
                };
                let mut want = [(); 3].map(|()| vec![0.0; n]);
                let mut want_moments = [0.0; 3];
                let [advantages, returns, rewards] = want.each_mut().map(|x| out(x));
                let (rewards, moments) = (Some(rewards), Some(out(&mut want_moments)));
                let outputs = gae::cuda::Outputs { advantages, returns, rewards, moments };
                let room = &mut vec![f64::NAN; gae::cuda::workspace_len(batch, seq_len)][..];
                let room = out(room);
                gae::cuda::gae(&stream, device_inputs, batch, seq_len, &options, outputs, room)
                    .unwrap();

                let mut got = [(); 3].map(|()| vec![f32::NAN; n]);
                let mut moments = ppok_moments { count: -1.0, mean: 0.0, m2: 0.0 };
                let [advantages, returns, rewards] = got.each_mut().map(Vec::as_mut_ptr);
                let struct_size = size_of::<ppok_gae_outputs>();
                let to = &raw mut moments;
                let outputs =
                    ppok_gae_outputs { struct_size, advantages, returns, rewards, moments: to };
                let inputs = gae_inputs(&inputs);
                // SAFETY: lengths as said.
                unsafe {
                    let mut room =
                        workspace(|size| ppok_gae_cuda_workspace_size(batch, seq_len, at, size));
                    let (room, size) = parts(&mut room);
                    ok(ppok_gae_cuda(&inputs, batch, seq_len, &c, &outputs, room, size, at));
                }
                assert_eq!(got.map(|x| bits(&x)), want.map(|x| bits(&x)), "{options:?}");
                assert_eq!([moments.count, moments.mean, moments.m2], want_moments);
            }
        });
    }

    #[test]
    fn whitening_is_that_of_rust() {
        let machine = machines()[0];
        let (stream, at) = (Stream::simt(machine), handle(&machine));
        let (rng, n) = (&mut rng(10), 9000);
        let (x, mask, up) = (uniform(rng, n, 2.0), random_mask(rng, n, 0.7), uniform(rng, n, 1.0));
        let (x_in, keep, up_in) = (slice(&x), Some(slice(&mask)), slice(&up));
        let room = &mut vec![f64::NAN; whiten::cuda::workspace_len(n)][..];
        let mut want_moments = [0.0; 3];
        let to = out(&mut want_moments);
        whiten::cuda::masked_moments(&stream, x_in, keep, to, out(room)).unwrap();
        let given = whiten::cuda::Given::OnDevice(slice(&want_moments));

        let mut moments = ppok_moments { count: -1.0, mean: 0.0, m2: 0.0 };
        let mut space =
            // SAFETY: there is room for the size.
            workspace(|size| unsafe { ppok_whiten_moments_cuda_workspace_size(n, at, size) });
        let (ws, size) = parts(&mut space);
        // SAFETY: lengths as said.
        ok(unsafe {
            ppok_whiten_moments_cuda(x.as_ptr(), mask.as_ptr(), n, &mut moments, ws, size, at)
        });
        assert_eq!([moments.count, moments.mean, moments.m2], want_moments);
        for (options, c) in whiten_option_sets() {
            let mut want = [(); 3].map(|()| vec![0.0; n]);
            let [y, grad, with_grad] = want.each_mut().map(|x| out(x));
            whiten::cuda::masked_whiten(&stream, x_in, keep, given, &options, y).unwrap();
            let backward = whiten::cuda::masked_whiten_backward;
            backward(&stream, x_in, keep, given, up_in, &options, grad, out(room)).unwrap();
            let backward = whiten::cuda::masked_whiten_with_backward;
            backward(&stream, keep, given, up_in, &options, with_grad).unwrap();

            // In place, all of them.
            let mut got = [x.clone(), up.clone(), up.clone()];
            let [y, grad, with] = got.each_mut().map(Vec::as_mut_ptr);
            let (x, mask, none) = (x.as_ptr(), mask.as_ptr(), null_mut());
            // SAFETY: lengths as said.
            unsafe {
                ok(ppok_whiten_forward_cuda(y, mask, n, &c, &moments, y, none, 0, at));
                let mut space =
                    workspace(|size| ppok_whiten_backward_cuda_workspace_size(n, at, size));
                let (ws, size) = parts(&mut space);
                let m = &moments;
                ok(ppok_whiten_backward_cuda(x, mask, n, &c, m, grad, grad, ws, size, at));
                ok(ppok_whiten_with_backward_cuda(mask, n, &c, m, with, with, none, 0, at));
            }
            assert_eq!(got.map(|x| bits(&x)), want.map(|x| bits(&x)), "{options:?}");
        }
    }

    #[test]
    fn the_loss_is_that_of_rust() {
        let machine = machines()[0];
        let (stream, at) = (Stream::simt(machine), handle(&machine));
        let [data, _] = rollouts();
        let n = data.logp.len();
        let inputs = ppo_loss::cuda::Inputs {
            batch: data.batch,
            seq_len: data.seq_len,
            logp: slice(&data.logp),
            old_logp: slice(&data.old_logp),
            advantages: slice(&data.advantages),
            value: Some(ppo_loss::cuda::ValueInputs {
                values: data.values.as_deref().map(slice).unwrap(),
                old_values: data.old_values.as_deref().map(slice),
                returns: data.returns.as_deref().map(slice).unwrap(),
            }),
            entropy: data.entropy.as_deref().map(slice),
            ref_logp: data.ref_logp.as_deref().map(slice),
            mask: data.mask.as_deref().map(slice),
        };
        for (name, options) in option_sets() {
            let mut want = [(); 3].map(|()| vec![0.0; n]);
            let mut want_stats = [0.0; PpoStats::LEN];
            let [logp, values, entropy] = want.each_mut().map(|x| Some(out(x)));
            let grads = ppo_loss::cuda::Gradients { logp, values, entropy };
            let len = ppo_loss::cuda::workspace_len(data.batch, data.seq_len, &options);
            let room = &mut vec![f32::NAN; len][..];
            let (stats, room) = (out(&mut want_stats), out(room));
            ppo_loss::cuda::ppo_loss(&stream, &inputs, &options, grads, stats, room).unwrap();

            let c = loss_options(&options);
            let mut got = [(); 3].map(|()| vec![f32::NAN; n]);
            let mut stats = [f32::NAN; PpoStats::LEN];
            let grads = gradients(got.each_mut().map(Vec::as_mut_ptr));
            let (from, batch, seq_len) = (loss_inputs(&data), data.batch, data.seq_len);
            let (stats_at, upstream) = (stats.as_mut_ptr(), 2.0_f32);
            // SAFETY: lengths as said.
            unsafe {
                let mut room = workspace(|size| {
                    ppok_ppo_loss_cuda_workspace_size(batch, seq_len, &c, at, size)
                });
                let (room, size) = parts(&mut room);
                ok(ppok_ppo_loss_cuda(&from, batch, seq_len, &c, stats_at, &grads, room, size, at));
                ok(ppok_ppo_loss_scale_cuda(&upstream, n, &grads, &grads, null_mut(), 0, at));
            }
            assert_eq!(got, want.map(|x| x.iter().map(|g| 2.0 * g).collect::<Vec<_>>()), "{name}");
            assert_eq!(bits(&stats), bits(&want_stats), "{name}");
        }
    }
}
