//! The functions of the ppo_loss op.

use super::*;

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

#[cfg(feature = "simt")]
mod on_the_stand_in {
    use super::*;
    use crate::on_the_stand_in::*;

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
