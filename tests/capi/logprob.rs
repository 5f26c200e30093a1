//! The functions of the logprob op.

use ppo_kernels::capi::functions::*;
use ppo_kernels::logprob::capi::*;
use ppo_kernels::logprob::cpu::{
    self, BackwardInputs, BackwardOutputs, FinishInputs, FinishOutputs, ForwardInputs,
    ForwardOutputs, MergeInputs, RunningSums,
};
use ppo_kernels::logprob::{Columns, LogprobOptions};
use rand::Rng;

use super::*;
use crate::common::logprob_cases;

pub fn c_options(options: &LogprobOptions) -> ppok_logprob_options {
    ppok_logprob_options {
        temperature: options.temperature,
        has_ignore_index: i32::from(options.ignore_index.is_some()),
        ignore_index: options.ignore_index.unwrap_or(0),
        ..defaults(ppok_logprob_options_init)
    }
}

/// Log-probabilities, entropies, maxima and logarithms of the sums.
type Written = [Vec<f32>; 4];

fn unwritten(rows: usize) -> Written {
    [(); 4].map(|()| vec![f32::NAN; rows])
}

fn forward_args<T: Logit, I: TokenId>(
    inputs: &ForwardInputs<T, I>,
    [rows, vocab]: [usize; 2],
    options: &ppok_logprob_options,
    written: &mut Written,
) -> ppok_logprob_forward_args {
    let [logp, entropy, max, log_sum] = written.each_mut().map(Vec::as_mut_ptr);
    ppok_logprob_forward_args {
        struct_size: size_of::<ppok_logprob_forward_args>(),
        rows,
        vocab,
        logits_type: logits_type::<T>(),
        targets_type: targets_type::<I>(),
        logits: inputs.logits.as_ptr().cast(),
        targets: inputs.targets.as_ptr().cast(),
        options,
        logp,
        entropy,
        max,
        log_sum,
    }
}

fn backward_args<T: Logit, I: TokenId>(
    inputs: &BackwardInputs<T, I>,
    [rows, vocab]: [usize; 2],
    options: &ppok_logprob_options,
    grad_logits: *mut T,
) -> ppok_logprob_backward_args {
    ppok_logprob_backward_args {
        struct_size: size_of::<ppok_logprob_backward_args>(),
        rows,
        vocab,
        columns: 0,
        first_column: 0,
        logits_type: logits_type::<T>(),
        targets_type: targets_type::<I>(),
        logits: inputs.forward.logits.as_ptr().cast(),
        targets: inputs.forward.targets.as_ptr().cast(),
        max: inputs.max.as_ptr(),
        log_sum: inputs.log_sum.as_ptr(),
        entropy: pointer(inputs.entropy),
        grad_logp: pointer(inputs.grad_logp),
        grad_entropy: pointer(inputs.grad_entropy),
        options,
        grad_logits: grad_logits.cast(),
    }
}

fn all_bits(written: &Written) -> [Vec<u32>; 4] {
    written.each_ref().map(|x| bits(x))
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
    let (c, shape) = (c_options(options), [rows, vocab]);

    let forward = ForwardInputs { logits: &logits, targets: &targets };
    let mut want = unwritten(rows);
    let [logp, entropy, max, log_sum] = &mut want;
    let outputs =
        ForwardOutputs { logp, entropy: Some(entropy), max: Some(max), log_sum: Some(log_sum) };
    cpu::forward(forward, rows, vocab, options, outputs).unwrap();
    let mut got = unwritten(rows);
    // SAFETY: lengths as said.
    ok(unsafe { ppok_logprob_forward_cpu(&forward_args(&forward, shape, &c, &mut got)) });
    assert_eq!(all_bits(&got), all_bits(&want));

    let [_, entropy, max, log_sum] = &want;
    let inputs = BackwardInputs {
        forward,
        max,
        log_sum,
        entropy: Some(entropy),
        grad_logp: Some(&up_logp),
        grad_entropy: Some(&up_entropy),
    };
    // And without the entropy, where no gradient comes from it.
    let alone = BackwardInputs { entropy: None, grad_entropy: None, ..inputs };
    for inputs in [inputs, alone] {
        let mut want = vec![T::ZERO; rows * vocab];
        let outputs = BackwardOutputs { grad_logits: &mut want };
        cpu::backward(inputs, rows, vocab, options, outputs).unwrap();
        let mut got = vec![T::ZERO; rows * vocab];
        let args = backward_args(&inputs, shape, &c, got.as_mut_ptr());
        // SAFETY: lengths as said.
        ok(unsafe { ppok_logprob_backward_cpu(&args) });
        assert_eq!(bits(&wide(&got)), bits(&wide(&want)));
        // And over the logits.
        let mut over = logits.clone();
        let mut args = backward_args(&inputs, shape, &c, over.as_mut_ptr());
        args.logits = args.grad_logits;
        // SAFETY: lengths as said.
        ok(unsafe { ppok_logprob_backward_cpu(&args) });
        assert_eq!(bits(&wide(&over)), bits(&wide(&want)));
    }
}

#[test]
fn tiles_are_those_of_rust() {
    let (rng, rows, vocab) = (&mut rng(5), 5, 300);
    let logits = uniform(rng, rows * vocab, 6.0);
    let mut targets: Vec<i64> = (0..rows).map(|_| rng.random_range(0..vocab as i64)).collect();
    targets[2] = -100;
    let options = LogprobOptions { temperature: 0.7, ignore_index: Some(-100) };
    let c = c_options(&options);
    let (mut want, mut got) = (unwritten(rows), unwritten(rows));
    let mut others = unwritten(rows);
    for (i, (first, count)) in [(0, 100), (100, 150), (250, 50)].into_iter().enumerate() {
        let columns = Columns { first, count, vocab };
        let tile = logprob_cases::tile(&logits, columns);
        let inputs = ForwardInputs { logits: &tile, targets: &targets };
        let partial = |begins: bool, written: &mut Written| {
            let [max, rest, logit, weighted] = written;
            let sums = RunningSums { max, rest, logit, weighted: Some(weighted) };
            cpu::partial(inputs, rows, columns, &options, begins, sums).unwrap();
        };
        let partial_of_c = |begins: bool, written: &mut Written| {
            let [max, rest, logit, weighted] = written.each_mut().map(Vec::as_mut_ptr);
            let args = ppok_logprob_partial_args {
                struct_size: size_of::<ppok_logprob_partial_args>(),
                rows,
                columns: count,
                first_column: first,
                vocab,
                logits_type: PPOK_F32,
                targets_type: PPOK_I64,
                begins: begins.into(),
                reserved: 0,
                logits: tile.as_ptr().cast(),
                targets: targets.as_ptr().cast(),
                options: &c,
                max,
                rest,
                logit,
                weighted,
            };
            // SAFETY: lengths as said.
            ok(unsafe { ppok_logprob_partial_cpu(&args) });
        };
        if i < 2 {
            partial(i == 0, &mut want);
            partial_of_c(i == 0, &mut got);
            continue;
        }
        partial_of_c(true, &mut others);
        let [max, rest, logit, weighted] = &others;
        let inputs =
            MergeInputs { other_weighted: Some(weighted), ..MergeInputs::new(max, rest, logit) };
        let [max, rest, logit, weighted] = &mut want;
        let sums = RunningSums { max, rest, logit, weighted: Some(weighted) };
        cpu::merge(inputs, rows, &options, sums).unwrap();
        let [max, rest, logit, weighted] = got.each_mut().map(Vec::as_mut_ptr);
        let args = ppok_logprob_merge_args {
            struct_size: size_of::<ppok_logprob_merge_args>(),
            rows,
            other_max: inputs.other_max.as_ptr(),
            other_rest: inputs.other_rest.as_ptr(),
            other_logit: inputs.other_logit.as_ptr(),
            other_weighted: pointer(inputs.other_weighted),
            options: &c,
            max,
            rest,
            logit,
            weighted,
        };
        // SAFETY: lengths as said.
        ok(unsafe { ppok_logprob_merge_cpu(&args) });
    }
    assert_eq!(all_bits(&got), all_bits(&want));

    let [max, rest, logit, weighted] = &want;
    let inputs = FinishInputs {
        weighted: Some(weighted),
        ..FinishInputs::new(targets.as_slice(), max, rest, logit)
    };
    let mut want = [(); 3].map(|()| vec![f32::NAN; rows]);
    let mut found = want.clone();
    let [logp, log_sum, entropy] = &mut want;
    let outputs = FinishOutputs { logp, log_sum, entropy: Some(entropy) };
    cpu::finish(inputs, rows, vocab, &options, outputs).unwrap();
    let [logp, log_sum, entropy] = found.each_mut().map(Vec::as_mut_ptr);
    let args = ppok_logprob_finish_args {
        struct_size: size_of::<ppok_logprob_finish_args>(),
        rows,
        vocab,
        targets_type: PPOK_I64,
        reserved: 0,
        targets: targets.as_ptr().cast(),
        max: inputs.max.as_ptr(),
        rest: inputs.rest.as_ptr(),
        logit: inputs.logit.as_ptr(),
        weighted: pointer(inputs.weighted),
        options: &c,
        logp,
        log_sum,
        entropy,
    };
    // SAFETY: lengths as said.
    ok(unsafe { ppok_logprob_finish_cpu(&args) });
    assert_eq!(found.map(|x| bits(&x)), want.map(|x| bits(&x)));
}

#[cfg(feature = "simt")]
mod on_the_stand_in {
    use ppo_kernels::cuda::Stream;
    use ppo_kernels::logprob::cuda;

    use super::*;
    use crate::on_the_stand_in::*;

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
        let (c, shape) = (c_options(&options), [rows, vocab]);
        for machine in machines() {
            let stream = Stream::simt(machine);
            let forward = cuda::ForwardInputs { logits: slice(&logits), targets: slice(&targets) };
            let mut want = unwritten(rows);
            let [logp, entropy, max, log_sum] = want.each_mut().map(|x| out(x));
            let outputs = cuda::ForwardOutputs {
                logp,
                entropy: Some(entropy),
                max: Some(max),
                log_sum: Some(log_sum),
            };
            cuda::forward(&stream, forward, rows, vocab, &options, outputs).unwrap();
            let [_, entropy, max, log_sum] = want.each_ref().map(|x| slice(x));
            let inputs = cuda::BackwardInputs {
                forward,
                max,
                log_sum,
                entropy: Some(entropy),
                grad_logp: Some(slice(&up_logp)),
                grad_entropy: Some(slice(&up_entropy)),
            };
            let mut want_grad = vec![T::ZERO; rows * vocab];
            let outputs = cuda::BackwardOutputs { grad_logits: out(&mut want_grad) };
            cuda::backward(&stream, inputs, rows, vocab, &options, outputs).unwrap();

            let mut got = unwritten(rows);
            // The gradient goes over the logits.
            let mut grad = logits.clone();
            let forward = ForwardInputs { logits: &grad, targets: &targets };
            let args = forward_args(&forward, shape, &c, &mut got);
            let size = ppok_logprob_forward_cuda_workspace_size;
            // SAFETY: lengths as said.
            let bytes = unsafe { run(ppok_logprob_forward_cuda, size, &args, &machine) };
            assert_eq!(bytes, 0);
            let [_, entropy, max, log_sum] = &got;
            let inputs = BackwardInputs {
                forward,
                max,
                log_sum,
                entropy: Some(entropy),
                grad_logp: Some(&up_logp),
                grad_entropy: Some(&up_entropy),
            };
            let mut args = backward_args(&inputs, shape, &c, null_mut());
            let logits = grad.as_mut_ptr();
            (args.logits, args.grad_logits) = (logits.cast(), logits.cast());
            let size = ppok_logprob_backward_cuda_workspace_size;
            // SAFETY: lengths as said.
            unsafe { run(ppok_logprob_backward_cuda, size, &args, &machine) };
            assert_eq!(all_bits(&got), all_bits(&want));
            assert_eq!(bits(&wide(&grad)), bits(&wide(&want_grad)));
        }
    }
}
