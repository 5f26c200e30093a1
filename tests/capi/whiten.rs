//! The functions of the whiten op.

use ppo_kernels::capi::functions::*;
use ppo_kernels::whiten::capi::*;
use ppo_kernels::whiten::cpu::{
    self, GradOutputs, Inputs, MomentsInputs, MomentsOutputs, Outputs, OwnBackwardInputs,
    WithBackwardInputs,
};
use ppo_kernels::whiten::{EpsPlacement, WhitenOptions};

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

/// The arrays that the passes share, as C has them.
#[derive(Clone, Copy)]
struct Arrays {
    elements: usize,
    x: *const f32,
    mask: *const u8,
    grad_y: *const f32,
    moments: *mut Moments,
}

impl Arrays {
    fn moments(self) -> ppok_whiten_moments_args {
        let Self { elements, x, mask, moments, .. } = self;
        let struct_size = size_of::<ppok_whiten_moments_args>();
        ppok_whiten_moments_args { struct_size, elements, x, mask, moments }
    }

    fn forward(self, options: &ppok_whiten_options, y: *mut f32) -> ppok_whiten_forward_args {
        let Self { elements, x, mask, moments, .. } = self;
        let struct_size = size_of::<ppok_whiten_forward_args>();
        ppok_whiten_forward_args { struct_size, elements, x, mask, moments, options, y }
    }

    fn backward(self, options: &ppok_whiten_options, to: *mut f32) -> ppok_whiten_backward_args {
        ppok_whiten_backward_args {
            struct_size: size_of::<ppok_whiten_backward_args>(),
            elements: self.elements,
            x: self.x,
            mask: self.mask,
            moments: self.moments,
            grad_y: self.grad_y,
            options,
            grad_x: to,
        }
    }

    fn with_backward(
        self,
        options: &ppok_whiten_options,
        to: *mut f32,
    ) -> ppok_whiten_with_backward_args {
        ppok_whiten_with_backward_args {
            struct_size: size_of::<ppok_whiten_with_backward_args>(),
            elements: self.elements,
            mask: self.mask,
            moments: self.moments,
            grad_y: self.grad_y,
            options,
            grad_x: to,
        }
    }
}

#[test]
fn whitening_is_that_of_rust() {
    let (rng, n) = (&mut rng(5), 3000);
    let (x, mask, up) = (uniform(rng, n, 2.0), random_mask(rng, n, 0.7), uniform(rng, n, 1.0));
    let (x, keep, grad_y) = (&x[..], Some(&mask[..]), &up[..]);
    let mut want_moments = [Moments::default()];
    let outputs = MomentsOutputs { moments: &mut want_moments };
    cpu::masked_moments(MomentsInputs { x, mask: keep }, n, outputs).unwrap();
    let other = Moments { count: 12.0, mean: 0.5, m2: 3.0 };
    let mut moments = Moments { count: -1.0, mean: 0.0, m2: 0.0 };
    let (moments_at, mut merged) = (&raw mut moments, other);
    let arrays = Arrays {
        elements: n,
        x: x.as_ptr(),
        mask: mask.as_ptr(),
        grad_y: up.as_ptr(),
        moments: moments_at,
    };
    let merged_at = &raw mut merged;
    // SAFETY: lengths as said.
    unsafe {
        ok(ppok_whiten_moments_cpu(&arrays.moments()));
        assert_eq!(moments_at.read(), want_moments[0]);
        ok(ppok_moments_merge(moments_at, merged_at, merged_at));
        assert_eq!(merged_at.read(), want_moments[0].merge(other));
    }
    for (options, c) in whiten_option_sets() {
        let mut want = [(); 3].map(|()| vec![0.0; n]);
        let [y, grad, with_grad] = &mut want;
        let moments = Some(&want_moments[..]);
        let inputs = Inputs { x, mask: keep, moments };
        cpu::masked_whiten(inputs, n, &options, Outputs { y }).unwrap();
        let inputs = OwnBackwardInputs { x, mask: keep, moments, grad_y };
        let outputs = GradOutputs { grad_x: grad };
        cpu::masked_whiten_backward(inputs, n, &options, outputs).unwrap();
        let inputs = WithBackwardInputs { mask: keep, moments, grad_y };
        let outputs = GradOutputs { grad_x: with_grad };
        cpu::masked_whiten_with_backward(inputs, n, &options, outputs).unwrap();

        let mut got = [(); 3].map(|()| vec![f32::NAN; n]);
        let [y, grad, with_grad] = got.each_mut().map(Vec::as_mut_ptr);
        // SAFETY: lengths as said.
        unsafe {
            ok(ppok_whiten_forward_cpu(&arrays.forward(&c, y)));
            ok(ppok_whiten_backward_cpu(&arrays.backward(&c, grad)));
            ok(ppok_whiten_with_backward_cpu(&arrays.with_backward(&c, with_grad)));
        }
        assert_eq!(got.map(|x| bits(&x)), want.map(|x| bits(&x)), "{options:?}");
    }
}

#[cfg(feature = "simt")]
mod on_the_stand_in {
    use ppo_kernels::cuda::Stream;
    use ppo_kernels::whiten::cuda;

    use super::*;
    use crate::on_the_stand_in::*;

    #[test]
    fn whitening_is_that_of_rust() {
        let machine = machines()[0];
        let stream = Stream::simt(machine);
        let (rng, n) = (&mut rng(10), 9000);
        let (x, mask, up) = (uniform(rng, n, 2.0), random_mask(rng, n, 0.7), uniform(rng, n, 1.0));
        let (x_in, keep, up_in) = (slice(&x), Some(slice(&mask)), slice(&up));
        let space = &mut vec![f64::NAN; cuda::workspace_len(n)][..];
        let mut want_moments = [Moments::default()];
        let outputs = cuda::MomentsOutputs { moments: out(&mut want_moments) };
        let inputs = cuda::MomentsInputs { x: x_in, mask: keep };
        cuda::masked_moments(&stream, inputs, n, outputs, out(space)).unwrap();
        let given = Some(slice(&want_moments));

        let mut moments = Moments { count: -1.0, mean: 0.0, m2: 0.0 };
        let moments_at = &raw mut moments;
        let arrays = Arrays {
            elements: n,
            x: x.as_ptr(),
            mask: mask.as_ptr(),
            grad_y: up.as_ptr(),
            moments: moments_at,
        };
        // SAFETY: lengths as said.
        unsafe {
            let (pass, size) = (ppok_whiten_moments_cuda, ppok_whiten_moments_cuda_workspace_size);
            run(pass, size, &arrays.moments(), &machine);
            assert_eq!(moments_at.read(), want_moments[0]);
        }
        for (options, c) in whiten_option_sets() {
            let mut want = [(); 3].map(|()| vec![0.0; n]);
            let [y, grad, with_grad] = want.each_mut().map(|x| out(x));
            let inputs = cuda::Inputs { x: x_in, mask: keep, moments: given };
            let outputs = cuda::Outputs { y };
            cuda::masked_whiten(&stream, inputs, None, n, &options, outputs).unwrap();
            let inputs =
                cuda::OwnBackwardInputs { x: x_in, mask: keep, moments: given, grad_y: up_in };
            let (outputs, space) = (cuda::GradOutputs { grad_x: grad }, out(space));
            cuda::masked_whiten_backward(&stream, inputs, None, n, &options, outputs, space)
                .unwrap();
            let inputs = cuda::WithBackwardInputs { mask: keep, moments: given, grad_y: up_in };
            let outputs = cuda::GradOutputs { grad_x: with_grad };
            cuda::masked_whiten_with_backward(&stream, inputs, None, n, &options, outputs).unwrap();

            // In place, all of them.
            let mut got = [x.clone(), up.clone(), up.clone()];
            let [y, grad, with] = got.each_mut().map(Vec::as_mut_ptr);
            // SAFETY: lengths as said.
            unsafe {
                let args = Arrays { x: y, ..arrays }.forward(&c, y);
                let size = ppok_whiten_forward_cuda_workspace_size;
                assert_eq!(run(ppok_whiten_forward_cuda, size, &args, &machine), 0);
                let args = Arrays { grad_y: grad, ..arrays }.backward(&c, grad);
                let size = ppok_whiten_backward_cuda_workspace_size;
                run(ppok_whiten_backward_cuda, size, &args, &machine);
                let args = Arrays { grad_y: with, ..arrays }.with_backward(&c, with);
                let size = ppok_whiten_with_backward_cuda_workspace_size;
                assert_eq!(run(ppok_whiten_with_backward_cuda, size, &args, &machine), 0);
            }
            assert_eq!(got.map(|x| bits(&x)), want.map(|x| bits(&x)), "{options:?}");
        }
    }
}
