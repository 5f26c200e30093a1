//! The functions of the logprob op.

use super::*;

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

#[cfg(feature = "simt")]
mod on_the_stand_in {
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
}
