//! The functions of the kl op.

use ppo_kernels::capi::functions::*;
use ppo_kernels::kl::capi::*;
use ppo_kernels::kl::cpu::{
    self, FullBackwardInputs, FullBackwardOutputs, FullForwardInputs, FullForwardOutputs,
    TokenBackwardInputs, TokenBackwardOutputs, TokenForwardInputs, TokenForwardOutputs,
};
use ppo_kernels::kl::{Divergence, FullKlOptions, KlEstimator, KlOptions};

use super::common::kl_cases::{all_full_options, all_token_options};
use super::*;

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
    ppok_kl_token_options {
        estimator: estimator(options.estimator),
        log_ratio_clamp: or_none(options.log_ratio_clamp),
        output_clamp: or_none(options.output_clamp),
        ..defaults(ppok_kl_token_options_init)
    }
}

fn full_options(options: &FullKlOptions) -> ppok_kl_full_options {
    ppok_kl_full_options {
        temperature: options.temperature,
        beta: options.beta,
        skew: options.skew,
        divergence: match options.divergence {
            Divergence::Forward => PPOK_KL_FORWARD,
            Divergence::Reverse => PPOK_KL_REVERSE,
            Divergence::Jsd => PPOK_KL_JSD,
            Divergence::SkewForward => PPOK_KL_SKEW_FORWARD,
            Divergence::SkewReverse => PPOK_KL_SKEW_REVERSE,
            Divergence::TotalVariation => PPOK_KL_TOTAL_VARIATION,
        },
        ..defaults(ppok_kl_full_options_init)
    }
}

fn token_forward_args(
    inputs: &TokenForwardInputs,
    options: &ppok_kl_token_options,
    kl: *mut f32,
) -> ppok_kl_token_forward_args {
    ppok_kl_token_forward_args {
        struct_size: size_of::<ppok_kl_token_forward_args>(),
        tokens: inputs.logp.len(),
        logp: inputs.logp.as_ptr(),
        ref_logp: inputs.ref_logp.as_ptr(),
        mask: pointer(inputs.mask),
        options,
        kl,
    }
}

fn token_backward_args(
    inputs: &TokenBackwardInputs,
    options: &ppok_kl_token_options,
    grad_logp: *mut f32,
    grad_ref_logp: *mut f32,
) -> ppok_kl_token_backward_args {
    let TokenBackwardInputs { forward, grad_kl } = inputs;
    ppok_kl_token_backward_args {
        struct_size: size_of::<ppok_kl_token_backward_args>(),
        tokens: forward.logp.len(),
        logp: forward.logp.as_ptr(),
        ref_logp: forward.ref_logp.as_ptr(),
        mask: pointer(forward.mask),
        grad_kl: grad_kl.as_ptr(),
        options,
        grad_logp,
        grad_ref_logp,
    }
}

fn full_forward_args<T: Logit>(
    inputs: &FullForwardInputs<T>,
    [rows, vocab]: [usize; 2],
    options: &ppok_kl_full_options,
    stats: *mut f32,
) -> ppok_kl_full_forward_args {
    ppok_kl_full_forward_args {
        struct_size: size_of::<ppok_kl_full_forward_args>(),
        rows,
        vocab,
        logits_type: logits_type::<T>(),
        reserved: 0,
        logits: inputs.logits.as_ptr().cast(),
        ref_logits: inputs.ref_logits.as_ptr().cast(),
        mask: pointer(inputs.mask),
        options,
        stats,
    }
}

fn full_backward_args<T: Logit>(
    inputs: &FullBackwardInputs<T>,
    [rows, vocab]: [usize; 2],
    options: &ppok_kl_full_options,
    grad_logits: *mut T,
    grad_ref_logits: *mut T,
) -> ppok_kl_full_backward_args {
    let FullBackwardInputs { forward, stats, grad_kl } = inputs;
    ppok_kl_full_backward_args {
        struct_size: size_of::<ppok_kl_full_backward_args>(),
        rows,
        vocab,
        logits_type: logits_type::<T>(),
        reserved: 0,
        logits: forward.logits.as_ptr().cast(),
        ref_logits: forward.ref_logits.as_ptr().cast(),
        mask: pointer(forward.mask),
        stats: stats.as_ptr(),
        grad_kl: grad_kl.as_ptr(),
        options,
        grad_logits: grad_logits.cast(),
        grad_ref_logits: grad_ref_logits.cast(),
    }
}

#[test]
fn token_kl_is_that_of_rust() {
    let (rng, n) = (&mut rng(2), 300);
    let (logp, ref_logp) = (uniform(rng, n, 5.0), uniform(rng, n, 5.0));
    let (mask, up) = (random_mask(rng, n, 0.8), uniform(rng, n, 1.0));
    let forward = TokenForwardInputs { logp: &logp, ref_logp: &ref_logp, mask: Some(&mask) };
    let backward = TokenBackwardInputs { forward, grad_kl: &up };
    for options in all_token_options() {
        let mut want = [(); 3].map(|()| vec![0.0; n]);
        let [kl, grad, ref_grad] = &mut want;
        cpu::token_forward(forward, n, &options, TokenForwardOutputs { kl }).unwrap();
        let outputs = TokenBackwardOutputs { grad_logp: Some(grad), grad_ref_logp: Some(ref_grad) };
        cpu::token_backward(backward, n, &options, outputs).unwrap();

        let c = token_options(&options);
        let mut got = [(); 3].map(|()| vec![f32::NAN; n]);
        let [kl, grad, ref_grad] = got.each_mut().map(Vec::as_mut_ptr);
        // SAFETY: lengths as said.
        unsafe {
            ok(ppok_kl_token_forward_cpu(&token_forward_args(&forward, &c, kl)));
            ok(ppok_kl_token_backward_cpu(&token_backward_args(&backward, &c, grad, ref_grad)));
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
        let forward = FullForwardInputs { logits: &z, ref_logits: &w, mask: Some(&mask) };
        let mut want = vec![0.0; PPOK_KL_FULL_STATS * rows];
        let outputs = FullForwardOutputs { stats: &mut want };
        cpu::full_forward(forward, rows, vocab, &options, outputs).unwrap();
        let backward = FullBackwardInputs { forward, stats: &want, grad_kl: &up };
        let mut want_grads = [(); 2].map(|()| vec![T::ZERO; rows * vocab]);
        let [grad, ref_grad] = &mut want_grads;
        let outputs =
            FullBackwardOutputs { grad_logits: Some(grad), grad_ref_logits: Some(ref_grad) };
        cpu::full_backward(backward, rows, vocab, &options, outputs).unwrap();

        let (c, shape) = (full_options(&options), [rows, vocab]);
        let mut got = vec![f32::NAN; PPOK_KL_FULL_STATS * rows];
        let args = full_forward_args(&forward, shape, &c, got.as_mut_ptr());
        // SAFETY: lengths as said.
        ok(unsafe { ppok_kl_full_forward_cpu(&args) });
        let backward = FullBackwardInputs { forward, stats: &got, grad_kl: &up };
        let mut grads = [(); 2].map(|()| vec![T::ZERO; rows * vocab]);
        let [grad, ref_grad] = grads.each_mut().map(Vec::as_mut_ptr);
        // SAFETY: lengths as said.
        ok(unsafe {
            ppok_kl_full_backward_cpu(&full_backward_args(&backward, shape, &c, grad, ref_grad))
        });
        assert_eq!(bits(&got), bits(&want), "{options:?}");
        assert_eq!(grads.map(|x| bits(&wide(&x))), want_grads.map(|x| bits(&wide(&x))));
    }
}

#[cfg(feature = "simt")]
mod on_the_stand_in {
    use ppo_kernels::cuda::Stream;
    use ppo_kernels::kl::cuda;

    use super::*;
    use crate::on_the_stand_in::*;

    #[test]
    fn token_kl_is_that_of_rust() {
        let (rng, n) = (&mut rng(8), 300);
        let (logp, ref_logp) = (uniform(rng, n, 5.0), uniform(rng, n, 5.0));
        let (mask, up) = (random_mask(rng, n, 0.8), uniform(rng, n, 1.0));
        let machine = machines()[0];
        let stream = Stream::simt(machine);
        for options in all_token_options() {
            let forward = cuda::TokenForwardInputs {
                logp: slice(&logp),
                ref_logp: slice(&ref_logp),
                mask: Some(slice(&mask)),
            };
            let mut want = [(); 3].map(|()| vec![0.0; n]);
            let [kl, grad, ref_grad] = want.each_mut().map(|x| out(x));
            let outputs = cuda::TokenForwardOutputs { kl };
            cuda::token_forward(&stream, forward, n, &options, outputs).unwrap();
            let inputs = cuda::TokenBackwardInputs { forward, grad_kl: slice(&up) };
            let outputs =
                cuda::TokenBackwardOutputs { grad_logp: Some(grad), grad_ref_logp: Some(ref_grad) };
            cuda::token_backward(&stream, inputs, n, &options, outputs).unwrap();

            let c = token_options(&options);
            // In place, all of them.
            let mut got = [logp.clone(), logp.clone(), ref_logp.clone()];
            let [kl, grad, ref_grad] = got.each_mut().map(Vec::as_mut_ptr);
            let forward =
                TokenForwardInputs { logp: &logp, ref_logp: &ref_logp, mask: Some(&mask) };
            let mut args = token_forward_args(&forward, &c, kl);
            args.logp = kl;
            let size = ppok_kl_token_forward_cuda_workspace_size;
            // SAFETY: lengths as said.
            unsafe { run(ppok_kl_token_forward_cuda, size, &args, &machine) };
            let inputs = TokenBackwardInputs { forward, grad_kl: &up };
            let mut args = token_backward_args(&inputs, &c, grad, ref_grad);
            (args.logp, args.ref_logp) = (grad, ref_grad);
            let size = ppok_kl_token_backward_cuda_workspace_size;
            // SAFETY: lengths as said.
            unsafe { run(ppok_kl_token_backward_cuda, size, &args, &machine) };
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
        let (c, shape) = (full_options(&options), [rows, vocab]);
        for machine in machines() {
            let stream = Stream::simt(machine);
            let forward =
                cuda::FullForwardInputs { logits: slice(&z), ref_logits: slice(&w), mask: None };
            let mut want = vec![0.0; PPOK_KL_FULL_STATS * rows];
            let outputs = cuda::FullForwardOutputs { stats: out(&mut want) };
            cuda::full_forward(&stream, forward, rows, vocab, &options, outputs).unwrap();
            let (stats, grad_kl) = (slice(&want), slice(&up));
            let inputs = cuda::FullBackwardInputs { forward, stats, grad_kl };
            let mut want_grads = [(); 2].map(|()| vec![T::ZERO; rows * vocab]);
            let [grad_logits, grad_ref_logits] = want_grads.each_mut().map(|x| Some(out(x)));
            let outputs = cuda::FullBackwardOutputs { grad_logits, grad_ref_logits };
            cuda::full_backward(&stream, inputs, rows, vocab, &options, outputs).unwrap();

            let mut got = vec![f32::NAN; PPOK_KL_FULL_STATS * rows];
            let forward = FullForwardInputs { logits: &z, ref_logits: &w, mask: None };
            let args = full_forward_args(&forward, shape, &c, got.as_mut_ptr());
            let size = ppok_kl_full_forward_cuda_workspace_size;
            // SAFETY: lengths as said.
            unsafe { run(ppok_kl_full_forward_cuda, size, &args, &machine) };
            // The gradients go over the logits.
            let mut grads = [z.clone(), w.clone()];
            let [grad, ref_grad] = grads.each_mut().map(Vec::as_mut_ptr);
            let inputs = FullBackwardInputs { forward, stats: &got, grad_kl: &up };
            let mut args = full_backward_args(&inputs, shape, &c, grad, ref_grad);
            (args.logits, args.ref_logits) = (grad.cast(), ref_grad.cast());
            let size = ppok_kl_full_backward_cuda_workspace_size;
            // SAFETY: lengths as said.
            unsafe { run(ppok_kl_full_backward_cuda, size, &args, &machine) };
            assert_eq!(bits(&got), bits(&want));
            assert_eq!(grads.map(|x| bits(&wide(&x))), want_grads.map(|x| bits(&wide(&x))));
        }
    }
}
