//! The functions of the kl op.

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

#[cfg(feature = "simt")]
mod on_the_stand_in {
    use super::*;
    use crate::on_the_stand_in::*;

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
}
