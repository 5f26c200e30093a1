//! The functions of the whiten op.

use super::*;

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
    let other = Moments { count: 12.0, mean: 0.5, m2: 3.0 };
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

#[cfg(feature = "simt")]
mod on_the_stand_in {
    use super::*;
    use crate::on_the_stand_in::*;

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
}
