//! The functions of the correction op.

use ppo_kernels::capi::functions::*;
use ppo_kernels::correction::capi::*;
use ppo_kernels::correction::{
    cpu, CorrectionOptions, Outside, Rejection, RejectionLevel, RejectionMetric, WeightLevel,
};

use super::*;
use crate::common::correction_cases::{rollout, unwritten, Data, Found};

/// Every option away from its default, and every number of the enumerations.
fn option_sets() -> Vec<(CorrectionOptions, ppok_correction_options)> {
    let init = || defaults(ppok_correction_options_init);
    let levels = [
        (WeightLevel::Token, PPOK_CORRECTION_LEVEL_TOKEN),
        (WeightLevel::SequenceMean, PPOK_CORRECTION_LEVEL_SEQUENCE_MEAN),
        (WeightLevel::SequenceSum, PPOK_CORRECTION_LEVEL_SEQUENCE_SUM),
        (WeightLevel::None, PPOK_CORRECTION_LEVEL_NONE),
    ];
    let outsides = [
        (Outside::Truncate, PPOK_CORRECTION_OUTSIDE_TRUNCATE),
        (Outside::Zero, PPOK_CORRECTION_OUTSIDE_ZERO),
    ];
    let metrics = [
        (RejectionMetric::Ratio, PPOK_REJECTION_METRIC_RATIO),
        (RejectionMetric::K2, PPOK_REJECTION_METRIC_K2),
        (RejectionMetric::K3, PPOK_REJECTION_METRIC_K3),
        (RejectionMetric::ReverseK3, PPOK_REJECTION_METRIC_REVERSE_K3),
        (RejectionMetric::BinaryKl, PPOK_REJECTION_METRIC_BINARY_KL),
        (RejectionMetric::BinaryKlMax, PPOK_REJECTION_METRIC_BINARY_KL_MAX),
        (RejectionMetric::TotalVariation, PPOK_REJECTION_METRIC_TOTAL_VARIATION),
    ];
    let rejection_levels = [
        (RejectionLevel::Token, PPOK_REJECTION_LEVEL_TOKEN),
        (RejectionLevel::SequenceMean, PPOK_REJECTION_LEVEL_SEQUENCE_MEAN),
        (RejectionLevel::SequenceSum, PPOK_REJECTION_LEVEL_SEQUENCE_SUM),
        (RejectionLevel::SequenceMax, PPOK_REJECTION_LEVEL_SEQUENCE_MAX),
    ];
    let mut sets = vec![(CorrectionOptions::default(), init())];
    for i in 0..8 {
        let (level, level_number) = levels[i % 4];
        let (outside, outside_number) = outsides[i / 4];
        let (metric, metric_number) = metrics[i % 7];
        let (of, of_number) = rejection_levels[i / 2];
        let (second, second_number) = metrics[(i + 3) % 7];
        let (second_of, second_of_number) = rejection_levels[(i + 1) % 4];
        let (low, high) = (Some(0.9), (i % 3 > 0).then_some(1.1));
        let (rejection_low, rejection_high) = ((i % 2 > 0).then_some(0.001), Some(1.5));
        let own = CorrectionOptions {
            level,
            log_ratio_clamp: (i != 3).then_some(0.4),
            low,
            high,
            outside,
            normalise: i % 3 == 1,
            rejection: Rejection { metric, level: of, low: rejection_low, high: rejection_high },
            second_rejection: Rejection {
                metric: second,
                level: second_of,
                low: Some(0.0002),
                high: None,
            },
        };
        let c = ppok_correction_options {
            level: level_number,
            log_ratio_clamp: or_none(own.log_ratio_clamp),
            low: or_none(low),
            high: or_none(high),
            outside: outside_number,
            normalise: i32::from(own.normalise),
            rejection_metric: metric_number,
            rejection_level: of_number,
            rejection_low: or_none(rejection_low),
            rejection_high: or_none(rejection_high),
            second_rejection_metric: second_number,
            second_rejection_level: second_of_number,
            second_rejection_low: 0.0002,
            second_rejection_high: PPOK_NONE,
            ..init()
        };
        sets.push((own, c));
    }
    sets
}

fn unwritten_of(data: &Data) -> Found {
    let n = data.old_logp.len();
    Found { weights: vec![f32::NAN; n], kept: vec![7; n], stats: unwritten() }
}

fn args(
    data: &Data,
    options: &ppok_correction_options,
    found: &mut Found,
    wants_kept: bool,
) -> ppok_correction_args {
    ppok_correction_args {
        struct_size: size_of::<ppok_correction_args>(),
        batch: data.batch,
        seq_len: data.seq_len,
        old_logp: data.old_logp.as_ptr(),
        rollout_logp: data.rollout_logp.as_ptr(),
        mask: pointer(data.mask.as_deref()),
        offsets: pointer(data.offsets.as_deref()),
        options,
        weights: found.weights.as_mut_ptr(),
        stats: &mut found.stats,
        kept: if wants_kept { found.kept.as_mut_ptr() } else { null_mut() },
    }
}

/// Calls `check` with and without a mask.
fn with_data(check: impl Fn(&Data, bool)) {
    for masked in [true, false] {
        let mut data = rollout(&mut rng(6), 7, 60, masked);
        check(&data, masked);
        (data.seq_len, data.offsets) = (420, Some(vec![0, 0, 50, 51, 200, 333, 333, 420]));
        check(&data, masked);
    }
}

#[test]
fn correction_is_that_of_rust() {
    with_data(|data, wants_kept| {
        for (options, c) in option_sets() {
            let mut want = unwritten_of(data);
            let outputs = cpu::Outputs {
                weights: &mut want.weights,
                stats: std::slice::from_mut(&mut want.stats),
                kept: wants_kept.then_some(&mut want.kept),
            };
            cpu::correction(data.inputs(), 7, data.seq_len, &options, outputs).unwrap();
            let mut got = unwritten_of(data);
            // SAFETY: lengths as said.
            ok(unsafe { ppok_correction_cpu(&args(data, &c, &mut got, wants_kept)) });
            assert_eq!(got.bits(), want.bits(), "{options:?}");
        }
    });
}

#[cfg(feature = "simt")]
mod on_the_stand_in {
    use ppo_kernels::correction::cuda;
    use ppo_kernels::cuda::Stream;

    use super::*;
    use crate::on_the_stand_in::*;

    #[test]
    fn correction_is_that_of_rust() {
        let machine = machines()[0];
        let stream = Stream::simt(machine);
        with_data(|data, wants_kept| {
            for (options, c) in option_sets() {
                let mut want = unwritten_of(data);
                let inputs = cuda::Inputs {
                    mask: data.mask.as_deref().map(slice),
                    offsets: data.offsets.as_deref().map(slice),
                    ..cuda::Inputs::new(slice(&data.old_logp), slice(&data.rollout_logp))
                };
                let outputs = cuda::Outputs {
                    weights: out(&mut want.weights),
                    stats: out(std::slice::from_mut(&mut want.stats)),
                    kept: wants_kept.then_some(out(&mut want.kept)),
                };
                let workspace = &mut vec![f64::NAN; cuda::workspace_len(7)][..];
                cuda::correction(
                    &stream,
                    inputs,
                    7,
                    data.seq_len,
                    &options,
                    outputs,
                    out(workspace),
                )
                .unwrap();
                let mut got = unwritten_of(data);
                let args = args(data, &c, &mut got, wants_kept);
                let size = ppok_correction_cuda_workspace_size;
                // SAFETY: lengths as said.
                unsafe { run(ppok_correction_cuda, size, &args, &machine) };
                assert_eq!(got.bits(), want.bits(), "{options:?}");
            }
        });
    }
}

#[test]
fn named_options_are_those_of_rust() {
    for name in CorrectionOptions::NAMES {
        let mut named = defaults(ppok_correction_options_init);
        let text = std::ffi::CString::new(name).unwrap();
        // SAFETY: there is room, and the text ends in zero.
        ok(unsafe {
            ppok_correction_options_named(&mut named, size_of_val(&named), text.as_ptr())
        });
        let own = CorrectionOptions::of(name).unwrap();
        assert_eq!((named.low, named.high), (or_none(own.low), or_none(own.high)), "{name}");
        assert_eq!(named.level, own.level as i32, "{name}");
        assert_eq!(named.outside, own.outside as i32, "{name}");
        assert_eq!(named.rejection_metric, own.rejection.metric as i32, "{name}");
        assert_eq!(named.rejection_high, or_none(own.rejection.high), "{name}");
    }
}

#[test]
fn errors_name_the_field_of_the_struct() {
    type Change = fn(&mut ppok_correction_options);
    let changes: &[(&str, Change)] = &[
        ("log_ratio_clamp", |options| options.log_ratio_clamp = 0.0),
        ("low", |options| options.low = -0.5),
        ("high", |options| options.low = 3.0),
        ("level", |options| options.level = 4),
        ("outside", |options| options.outside = -1),
        ("normalise", |options| options.normalise = 2),
        ("rejection_metric", |options| options.rejection_metric = PPOK_REJECTION_METRIC_K2),
        ("rejection_high", |options| options.rejection_high = 1.0),
        ("rejection_low", |options| {
            options.rejection_metric = PPOK_REJECTION_METRIC_RATIO;
            options.rejection_low = 0.0;
        }),
        ("second_rejection_metric", |options| options.second_rejection_metric = 9),
        ("second_rejection_level", |options| options.second_rejection_level = 4),
        ("second_rejection_low", |options| options.second_rejection_low = 1.0),
        ("second_rejection_high", |options| {
            options.second_rejection_metric = PPOK_REJECTION_METRIC_K3;
            options.second_rejection_high = f64::NAN;
        }),
    ];
    for &(field, change) in changes {
        let mut options = defaults(ppok_correction_options_init);
        change(&mut options);
        let data = rollout(&mut rng(1), 1, 1, false);
        let mut found = unwritten_of(&data);
        // SAFETY: the arrays are as long as the sizes say.
        refused(unsafe { ppok_correction_cpu(&args(&data, &options, &mut found, true)) }, field);
    }
}
