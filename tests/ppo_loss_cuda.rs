//! The CUDA kernels of the PPO loss, on a GPU or on the CPU stand-in: every option and thread order
//! against the f64 reference, and bugs planted in the kernels, which must not go unseen.
#![cfg(any(feature = "simt", feature = "cuda"))]

mod common;

use common::device::{machine, orders, stream, Buffer, Machine, Order, ORDERS};
use common::pack::WILD_OFFSETS;
use common::ppo_loss_cases::*;
use common::*;
use half::{bf16, f16};
use ppo_kernels::cpu::Logit;
use ppo_kernels::ppo_loss::cuda::{
    self, Inputs, LogitsInputs, LogitsOutputs, Outputs, ScaleInputs, ScaleOutputs,
};
use ppo_kernels::ppo_loss::{cpu, Aggregation, PpoLossOptions, PpoStats};
use ppo_kernels::{Error, Result};

/// A call with every gradient that there is an input for.
#[derive(Clone, Copy)]
struct Call {
    machine: Machine,
    /// Elements from a 16-byte boundary to the first token, of each buffer another number.
    offset: usize,
}

impl Call {
    /// Aligned, with a grid so small that blocks loop over their parts.
    fn new(order: Order) -> Self {
        Self { machine: machine(order, 9, 3), offset: 0 }
    }

    fn run(self, data: &Data<f32>, options: &PpoLossOptions) -> Result<Found> {
        self.run_with(data, options, true)
    }

    fn run_with(self, data: &Data<f32>, options: &PpoLossOptions, grads: bool) -> Result<Found> {
        let device = DeviceData::new(data, self.offset);
        let n = data.logp.len();
        // Filled with NaN, to see that every element is written.
        let room = |given: bool, at: usize| {
            let room = vec![f32::NAN; if given { n } else { 0 }];
            Buffer::new(&room, self.offset * at)
        };
        let mut out =
            [room(true, 9), room(data.values.is_some(), 10), room(data.entropy.is_some(), 11)];
        let [logp, values, entropy] = &mut out;
        let (mut stats, mut loss) = (Buffer::new(&[unwritten()], 0), Buffer::new(&[f32::NAN], 1));
        let outputs = Outputs {
            stats: stats.slice_mut(),
            loss: Some(loss.slice_mut()),
            grad_logp: grads.then(|| logp.slice_mut()),
            grad_values: grads.then(|| values.slice_mut()).filter(|_| data.values.is_some()),
            grad_entropy: grads.then(|| entropy.slice_mut()).filter(|_| data.entropy.is_some()),
        };
        let (batch, seq_len) = (data.batch, data.seq_len);
        let length = cuda::workspace_len(batch, n, options);
        let mut workspace = Buffer::workspace(length, 0);
        let (stream, inputs) = (stream(self.machine), device.inputs());
        let scratch = workspace.slice_mut();
        cuda::ppo_loss(&stream, inputs, batch, seq_len, options, outputs, scratch)?;
        let stats = stats.read()[0];
        assert_eq!(loss.read()[0].to_bits(), (stats.loss as f32).to_bits());
        Ok((stats, out.each_ref().map(Buffer::read)))
    }
}

/// The inputs in device memory.
struct DeviceData {
    logp: Buffer<f32>,
    old_logp: Buffer<f32>,
    advantages: Buffer<f32>,
    values: Option<Buffer<f32>>,
    old_values: Option<Buffer<f32>>,
    returns: Option<Buffer<f32>>,
    entropy: Option<Buffer<f32>>,
    ref_logp: Option<Buffer<f32>>,
    rollout_logp: Option<Buffer<f32>>,
    weights: Option<Buffer<f32>>,
    mask: Option<Buffer<u8>>,
    offsets: Option<Buffer<i64>>,
}

impl DeviceData {
    fn new(data: &Data<f32>, offset: usize) -> Self {
        let buffer = |x: &Vec<f32>, at: usize| Buffer::new(x, offset * at);
        let optional = |x: &Option<Vec<f32>>, at| x.as_ref().map(|x| buffer(x, at));
        Self {
            logp: buffer(&data.logp, 1),
            old_logp: buffer(&data.old_logp, 2),
            advantages: buffer(&data.advantages, 3),
            values: optional(&data.values, 4),
            old_values: optional(&data.old_values, 5),
            returns: optional(&data.returns, 6),
            entropy: optional(&data.entropy, 7),
            ref_logp: optional(&data.ref_logp, 8),
            rollout_logp: optional(&data.rollout_logp, 9),
            weights: optional(&data.weights, 10),
            mask: data.mask.as_ref().map(|mask| Buffer::new(mask, offset)),
            offsets: data.offsets.as_ref().map(|offsets| Buffer::new(offsets, offset)),
        }
    }

    fn inputs(&self) -> Inputs<'static> {
        let optional = |x: &Option<Buffer<f32>>| x.as_ref().map(Buffer::slice);
        let has_values = self.values.is_some();
        Inputs {
            logp: self.logp.slice(),
            old_logp: self.old_logp.slice(),
            advantages: self.advantages.slice(),
            values: optional(&self.values),
            old_values: optional(&self.old_values).filter(|_| has_values),
            returns: optional(&self.returns).filter(|_| has_values),
            entropy: optional(&self.entropy),
            ref_logp: optional(&self.ref_logp),
            rollout_logp: optional(&self.rollout_logp),
            weights: optional(&self.weights),
            mask: self.mask.as_ref().map(Buffer::slice),
            offsets: self.offsets.as_ref().map(Buffer::slice),
        }
    }
}

fn run_cuda(data: &Data<f32>, options: &PpoLossOptions) -> Found {
    Call::new(Order::Fifo).run(data, options).unwrap()
}

#[track_caller]
fn check_cuda(what: &str, data: &Data<f32>, options: &PpoLossOptions) {
    check(what, data, options, &run_cuda(data, options));
}

#[test]
fn agrees_with_the_reference_for_every_option() {
    for (i, (name, options)) in option_sets().into_iter().enumerate() {
        // Its own, so that another set of options leaves these tokens as they are.
        let mut rng = rng(1);
        // One part, and several.
        for (batch, seq_len) in [(5, 17), (3, 1700)] {
            let mut data = rollout(&mut rng, batch, seq_len);
            let call = Call { offset: i % 2, ..Call::new(ORDERS[i % 3]) };
            let what = format!("{name} [{batch}, {seq_len}] {:?}", call.machine.order);
            let agrees = |what: &str, data: &Data<f32>| {
                let data = data.for_options(&options);
                check(what, &data, &options, &call.run(&data, &options).unwrap());
            };
            agrees(&what, &data);
            data.mask = Some(padded_mask(&mut rng, batch, seq_len));
            agrees(&format!("{what} masked"), &data);
            data.weights = Some(some_weights(&mut rng, batch * seq_len));
            agrees(&format!("{what} weighted"), &data);
        }
    }
}

/// Around every boundary: of a vector, a tile, the single part, the counting in the pass, a row
/// that takes a block to count; one row, one column.
const SHAPES: [(usize, usize); 14] = [
    (1, 1),
    (3, 7),
    (1, 1024),
    (5, 205),
    (41, 99),
    (1, 4096),
    (1, 4097),
    (2, 2050),
    (300, 1),
    (2051, 2),
    (1100, 9),
    (2, 8193),
    (3, 8200),
    (40, 501),
];

fn aggregated(aggregation: Aggregation) -> PpoLossOptions {
    PpoLossOptions { entropy_coef: 0.03, kl_coef: 0.2, aggregation, ..Default::default() }
}

/// Every shape against the reference, with the same bits in all orders, wherever the data begin and
/// for any grid.
fn agrees_for_every_shape(planted_bug: &'static str, orders: &[Order]) -> Result<()> {
    let mut rng = rng(2);
    for (batch, seq_len) in SHAPES {
        let of_rows = PpoLossOptions {
            clip_range: 0.02,
            off_policy_threshold: Some(0.01),
            kl_coef: 0.2,
            ..PpoLossOptions::gspo()
        };
        for options in [
            aggregated(Aggregation::SeqMeanTokenMean),
            aggregated(Aggregation::TokenMean),
            aggregated(Aggregation::SeqMeanTokenSum),
            of_rows,
        ] {
            let mut data = rollout(&mut rng, batch, seq_len);
            data.mask = Some(padded_mask(&mut rng, batch, seq_len));
            if options == of_rows {
                data.weights = Some(some_weights(&mut rng, batch * seq_len));
            }
            let mut first = None;
            for (i, &order) in orders.iter().enumerate() {
                let machine = machine(order, 9, [3, 1 << 20, 1][i % 3]);
                let call = Call { machine: Machine { planted_bug, ..machine }, offset: i % 3 };
                let found = call.run(&data, &options)?;
                let what = format!(
                    "{:?} {:?} [{batch}, {seq_len}] {order:?}",
                    options.aggregation, options.ratio
                );
                check(&what, &data, &options, &found);
                let bits = bits(&found);
                let first = first.get_or_insert_with(|| bits.clone());
                assert!(*first == bits, "{what}: bits depend on order, alignment or grid");
            }
        }
    }
    Ok(())
}

#[test]
fn agrees_with_the_reference_for_every_shape_and_order() {
    agrees_for_every_shape("", orders()).unwrap();
}

/// Packs and padded batches in all orders: the reference, and the same bits where there are no sums.
fn packs_agree_with_the_reference(planted_bug: &'static str, orders: &[Order]) -> Result<()> {
    let mut rng = rng(40);
    for (i, (name, options)) in option_sets().into_iter().enumerate() {
        // A single part and several, rows longer than a block takes at a time, and many short ones.
        let (batch, seq_len) = [(3, 5), (9, 40), (4, 1500), (300, 30)][i % 4];
        let sample = Packed::new(&mut rng, batch, seq_len, i % 3 != 0);
        let sample = match options.entropy_coef == 0.0 && options.value_clip_range.is_some() {
            true if i % 2 == 0 => sample.fewer(),
            _ => sample,
        };
        let sample = sample.for_options(&options);
        let mut first = None;
        for (i, &order) in orders.iter().enumerate() {
            let machine = Machine { planted_bug, ..machine(order, 9, [3, 1 << 20][i % 2]) };
            let call = Call { machine, offset: i % 3 };
            let what = format!("{name}: {batch}x{seq_len} {order:?}");
            let padded = call.run(&sample.padded, &options)?;
            let packed = call.run(&sample.packed, &options)?;
            sample.check(&what, &padded, &packed);
            check(&what, &sample.packed, &options, &packed);
            let bits = bits(&packed);
            let first = first.get_or_insert_with(|| bits.clone());
            assert!(*first == bits, "{what}: bits depend on order, alignment or grid");
        }
    }
    Ok(())
}

#[test]
fn packs_agree_with_the_reference_and_with_padded_batches() {
    packs_agree_with_the_reference("", orders()).unwrap();
}

/// The extremes of more rows than a warp has lanes, the largest share in the last of them.
fn extremes_of_many_rows(planted_bug: &'static str, orders: &[Order]) -> Result<()> {
    let mut data = rollout(&mut rng(42), 100, 3);
    data.logp[3 * 99..].fill(0.0);
    data.old_logp[3 * 99..].fill(-1.0);
    data.advantages[3 * 99..].fill(1.0);
    let options = PpoLossOptions { row_extremes: true, ..Default::default() };
    for &order in orders {
        let machine = Machine { planted_bug, ..machine(order, 9, 3) };
        let found = Call { machine, offset: 0 }.run(&data, &options)?;
        check(&format!("{order:?}"), &data, &options, &found);
        assert_eq!(found.0.clip_high_row_max, 1.0);
    }
    Ok(())
}

#[test]
fn extremes_of_many_rows_agree_with_the_reference() {
    extremes_of_many_rows("", orders()).unwrap();
}

#[test]
fn no_offsets_lead_out_of_bounds() {
    for (_, options) in option_sets().into_iter().rev().step_by(4) {
        for offsets in WILD_OFFSETS {
            for batch in [1, 2] {
                let mut data = rollout(&mut rng(41), 1, 6);
                (data.batch, data.offsets) = (batch, Some(offsets[..=batch].to_vec()));
                let data = data.for_options(&options);
                // Under a sanitizer what is out of bounds would be seen; elsewhere that it returns.
                Call { machine: machine(Order::Fifo, 9, 3), offset: 1 }
                    .run(&data, &options)
                    .unwrap();
            }
        }
    }
}

#[test]
fn parts_of_more_than_one_tile_agree_with_the_reference() {
    let mut data = rollout(&mut rng(3), 1025, 1024);
    (data.values, data.entropy, data.ref_logp) = (None, None, None);
    let options = PpoLossOptions::default();
    let call = Call { machine: machine(Order::Fifo, 9, 1 << 20), offset: 0 };
    check("long", &data, &options, &call.run(&data, &options).unwrap());
}

#[test]
fn what_is_masked_may_hold_nan_and_gets_zero() {
    let mut rng = rng(4);
    for (i, (name, options)) in option_sets().into_iter().enumerate() {
        let mut data = rollout(&mut rng, 3, 1500);
        let mut mask = random_mask(&mut rng, 3 * 1500, 0.5);
        // All of the first part.
        mask[..1024].fill(0);
        data.mask = Some(mask.clone());
        let data = data.for_options(&options);
        let call = Call::new(ORDERS[i % 3]);
        let found = call.run(&data, &options).unwrap();
        let with_nan = call.run(&with_nan_under_the_mask(&data), &options).unwrap();
        assert_eq!(bits(&with_nan), bits(&found), "{name}");
        for grad in &found.1 {
            let masked = grad.iter().zip(&mask).filter(|(_, &m)| m == 0);
            assert!(masked.into_iter().all(|(g, _)| g.to_bits() == 0), "{name}");
        }
    }
}

/// A batch whose values are far from 0, with a first part and some threads that have no token.
fn far_from_zero() -> Data<f32> {
    let mut data = rollout(&mut rng(5), 7, 900);
    // Exact in f32, so that both see the same deviations.
    let offset =
        |x: &mut Vec<f32>| x.iter_mut().for_each(|x| *x = (*x * 64.0).round() / 64.0 + 1e4);
    offset(data.values.as_mut().unwrap());
    offset(data.returns.as_mut().unwrap());
    offset(data.old_values.as_mut().unwrap());
    let mut mask = random_mask(&mut rng(6), 7 * 900, 0.3);
    mask[..1500].fill(0);
    data.mask = Some(mask);
    data
}

#[test]
fn gradients_of_unlikely_ratios_are_right_down_to_the_least_float() {
    let (data, options) = unlikely();
    check_unlikely(&run_cuda(&data, &options));
}

#[test]
fn statistics_keep_their_digits_far_from_zero() {
    let mut data = far_from_zero();
    check_cuda("offset", &data, &PpoLossOptions::default());
    // A ratio next to 1, where r - 1 - d is eight digits below r.
    data.old_logp = data.logp.iter().map(|&l| l + 1.0 / 8192.0).collect();
    let want = run(&data.map(f64::from), &PpoLossOptions::default()).stats;
    let (got, _) = run_cuda(&data, &PpoLossOptions::default());
    assert_close("k3", &[got.approx_kl_k3], &[want.approx_kl_k3], 1e-5, 0.0);
}

#[test]
fn statistics_of_numbers_that_agree_and_of_outliers_keep_their_digits() {
    for (batch, seq_len) in [(1, 40), (3, 1001), (16, 2048)] {
        for data in hard_to_sum(batch, seq_len) {
            check_hard_to_sum(&data, &run_cuda(&data, &PpoLossOptions::default()).0);
        }
    }
}

#[test]
fn optional_terms_fall_away() {
    for seq_len in [30, 2000] {
        let full = rollout(&mut rng(7), 3, seq_len);
        let options = PpoLossOptions::default();
        let mut data = full.clone();
        (data.entropy, data.ref_logp) = (None, None);
        check_cuda("without entropy and reference", &data, &options);
        data.values = None;
        check_cuda("policy only", &data, &options);
        let (stats, _) = run_cuda(&data, &options);
        assert_eq!(stats.loss, stats.policy_loss);
        let absent =
            ["value", "return", "entropy", "kl_mean", "explained", "clip_high_row", "clip_low_row"];
        for (name, x) in PpoStats::NAMES.iter().zip(stats.to_array()) {
            assert_eq!(x.is_nan(), absent.iter().any(|a| name.starts_with(a)), "{name}");
        }
        // Gradients that nobody wants change nothing, and are not written.
        let (none, grads) = Call::new(Order::Fifo).run_with(&full, &options, false).unwrap();
        let bits = |stats: PpoStats| stats.to_array().map(f64::to_bits);
        assert_eq!(bits(none), bits(run_cuda(&full, &options).0));
        assert!(grads.iter().flatten().all(|g| g.is_nan()));
        // No clip, no old values.
        let mut full = full;
        full.old_values = None;
        let options = PpoLossOptions { value_clip_range: None, ..options };
        check_cuda("no old values", &full, &options);
    }
}

#[test]
fn an_input_that_is_only_reported_cannot_spoil_the_loss() {
    let mut data = rollout(&mut rng(8), 2, 9);
    data.ref_logp.as_mut().unwrap()[3] = f32::NEG_INFINITY;
    data.entropy.as_mut().unwrap()[4] = f32::NAN;
    data.values.as_mut().unwrap()[5] = f32::NAN;
    let options = PpoLossOptions { value_coef: 0.0, ..Default::default() };
    let (stats, grads) = run_cuda(&data, &options);
    assert!(stats.loss.is_finite() && stats.entropy_mean.is_nan() && stats.value_loss.is_nan());
    assert!(grads.iter().flatten().all(|g| g.is_finite()));
    check_cuda("only reported", &data, &options);
}

#[test]
fn nan_in_an_unmasked_token_reaches_the_loss() {
    for n in [9, 5000] {
        let data = rollout(&mut rng(9), 1, n);
        let spoilt: [Change; 5] = [
            |d| d.logp[5] = f32::NAN,
            |d| d.old_logp[5] = f32::NAN,
            |d| d.advantages[5] = f32::NAN,
            |d| d.values.as_mut().unwrap()[5] = f32::NAN,
            |d| d.returns.as_mut().unwrap()[5] = f32::NAN,
        ];
        for spoil in spoilt {
            let mut data = data.clone();
            spoil(&mut data);
            assert!(run_cuda(&data, &PpoLossOptions::default()).0.loss.is_nan());
        }
    }
}

/// What the CPU refuses. The others may be anything.
#[test]
fn a_negative_weight_of_an_unmasked_token_makes_the_loss_nan() {
    for n in [9, 5000] {
        let mut data = rollout(&mut rng(21), 1, n);
        data.weights = Some(vec![1.0; n]);
        data.weights.as_mut().unwrap()[5] = -0.5;
        let mut mask = vec![1; n];
        let options = PpoLossOptions::default();
        data.mask = Some(mask.clone());
        assert!(run_cuda(&data, &options).0.loss.is_nan());
        mask[5] = 0;
        data.mask = Some(mask);
        check_cuda("masked", &data, &options);
    }
}

#[test]
fn infinite_and_far_ratios_come_out_as_in_the_reference() {
    let mut data = rollout(&mut rng(10), 1, 8);
    data.logp = vec![500.0, -500.0, f32::NEG_INFINITY, 30.0, -30.0, 0.0, 2.5, -2.5];
    data.old_logp = vec![0.0; 8];
    for options in [
        PpoLossOptions::default(),
        PpoLossOptions { dual_clip: Some(3.0), ..Default::default() },
        PpoLossOptions { log_ratio_clamp: Some(30.0), ..Default::default() },
    ] {
        check_cuda("far", &data, &options);
    }
}

#[test]
fn parts_with_the_whole_denominator_add_up_to_the_whole() {
    let mut rng = rng(11);
    let (batch, seq_len) = (6, 50);
    let mut data = rollout(&mut rng, batch, seq_len);
    let mut mask = random_mask(&mut rng, batch * seq_len, 0.6);
    mask[2 * seq_len..3 * seq_len].fill(0);
    data.mask = Some(mask.clone());
    let tokens = mask.iter().filter(|&&m| m != 0).count() as f64;
    for (aggregation, denominator) in [
        (Aggregation::TokenMean, tokens),
        (Aggregation::SeqMeanTokenSum, 5.0),
        (Aggregation::SeqMeanTokenMean, 5.0),
        (Aggregation::SeqMeanTokenSumNorm, 50.0),
    ] {
        let options = PpoLossOptions { aggregation, ..Default::default() };
        let (whole, [whole_grad, ..]) = run_cuda(&data, &options);
        let given = PpoLossOptions { denominator: Some(denominator), ..options };
        let (mut loss, mut grad) = (0.0, Vec::new());
        for b in 0..batch {
            let (stats, [part_grad, ..]) = run_cuda(&row(&data, b), &given);
            loss += stats.loss;
            grad.extend(part_grad);
        }
        assert_close("loss", &[loss], &[whole.loss], REL, ABS);
        assert_eq!(grad, whole_grad);
    }
}

#[test]
fn a_batch_without_tokens_needs_a_denominator() {
    for seq_len in [5, 3000] {
        let mut data = rollout(&mut rng(12), 2, seq_len);
        data.mask = Some(vec![0; 2 * seq_len]);
        for aggregation in [
            Aggregation::TokenMean,
            Aggregation::SeqMeanTokenSum,
            Aggregation::SeqMeanTokenMean,
            Aggregation::SeqMeanTokenSumNorm,
        ] {
            // The CPU refuses; here nobody has looked.
            let options = PpoLossOptions { aggregation, ..Default::default() };
            let (stats, grads) = run_cuda(&data, &options);
            assert!(stats.loss.is_nan() && stats.tokens == 0.0);
            assert!(grads.iter().flatten().all(|g| g.to_bits() == 0));
            for options in [
                PpoLossOptions { denominator: Some(8.0), ..options },
                PpoLossOptions { aggregation: Aggregation::Constant(8.0), ..options },
            ] {
                let (stats, grads) = run_cuda(&data, &options);
                assert_eq!((stats.loss, stats.policy_loss, stats.tokens), (0.0, 0.0, 0.0));
                assert!(grads.iter().flatten().all(|g| g.to_bits() == 0));
                assert!(stats.clip_fraction.is_nan() && stats.ratio_min.is_nan());
                check_cuda("no tokens", &data, &options);
            }
        }
    }
}

#[test]
fn empty_shapes_are_batches_without_tokens() {
    for (batch, seq_len) in [(0, 0), (0, 5), (5, 0)] {
        for mask in [None, Some(Vec::new())] {
            let data = Data::<f32> { batch, seq_len, mask, ..Default::default() };
            for aggregation in [Aggregation::TokenMean, Aggregation::SeqMeanTokenMean] {
                let options = PpoLossOptions { aggregation, ..Default::default() };
                let error = Call::new(Order::Fifo).run(&data, &options).unwrap_err();
                assert!(matches!(error, Error::Mask { .. }));
                let options = PpoLossOptions { denominator: Some(1.0), ..options };
                assert_eq!(run_cuda(&data, &options).0.loss, 0.0);
            }
        }
    }
}

// ---- scaling ----

#[test]
fn gradients_are_scaled_wherever_they_are() {
    let mut rng = rng(13);
    for (i, n) in [1, 3, 4, 5, 63, 4096, 20_001].into_iter().enumerate() {
        for factor in [-1.75_f32, 1.0, 0.0] {
            for (from, to) in [(0, 0), (1, 1), (3, 0)] {
                let x = uniform(&mut rng, n, 1.0);
                let want: Vec<f32> = x.iter().map(|x| x * factor).collect();
                let stream = stream(machine(ORDERS[i % 3], 9, 3));
                let upstream = Buffer::new(&[factor], 0);
                let (stored, mut other) = (Buffer::new(&x, from), Buffer::new(&x, from));
                let mut out = Buffer::new(&vec![f32::NAN; n], to);
                let inputs = ScaleInputs {
                    stored_logp: Some(stored.slice()),
                    stored_entropy: Some(other.slice()),
                    ..ScaleInputs::new(upstream.slice())
                };
                let outputs = ScaleOutputs {
                    grad_logp: Some(out.slice_mut()),
                    grad_values: None,
                    grad_entropy: Some(other.slice_mut()),
                };
                cuda::scale(&stream, inputs, n, outputs).unwrap();
                assert_eq!(out.read(), want);
                assert_eq!(other.read(), want);
                assert_eq!(stored.read(), x);
            }
        }
    }
}

#[test]
fn a_masked_gradient_stays_zero_whatever_comes_from_upstream() {
    let stream = stream(machine(Order::Fifo, 9, 3));
    let mut grad = Buffer::new(&[0.0_f32, 1.0, 0.0, -1.0, 0.0, 2.0], 0);
    let upstream = Buffer::new(&[f32::NAN], 0);
    let inputs =
        ScaleInputs { stored_values: Some(grad.slice()), ..ScaleInputs::new(upstream.slice()) };
    let outputs = ScaleOutputs { grad_values: Some(grad.slice_mut()), ..ScaleOutputs::new() };
    cuda::scale(&stream, inputs, 6, outputs).unwrap();
    let nan: Vec<bool> = grad.read().iter().map(|g| g.is_nan()).collect();
    assert_eq!(nan, [false, true, false, true, false, true]);
    let nothing = ScaleOutputs::new();
    cuda::scale(&stream, ScaleInputs::new(upstream.slice()), 6, nothing).unwrap();
}

// ---- errors ----

#[test]
fn options_out_of_range_are_refused_by_name() {
    let data = rollout(&mut rng(14), 2, 3);
    for (name, options) in bad_options() {
        let error = Call::new(Order::Fifo).run(&data, &options).unwrap_err();
        assert!(matches!(&error, Error::Option { option, .. } if *option == name), "{error}");
        assert!(error.to_string().starts_with("ppo_loss: option"), "{error}");
    }
}

#[test]
fn options_that_need_a_missing_input_are_refused_by_name() {
    for (name, options, remove) in missing_inputs() {
        let mut data = rollout(&mut rng(15), 2, 3);
        remove(&mut data);
        let error = Call::new(Order::Fifo).run(&data, &options).unwrap_err();
        assert!(matches!(&error, Error::Option { option, .. } if *option == name), "{error}");
    }
}

#[test]
fn slices_of_the_wrong_length_are_refused_by_name() {
    let full = rollout(&mut rng(16), 2, 3);
    let fails = |data: &Data<f32>, lengths: [Option<usize>; 3], room: [usize; 3], name: &str| {
        let device = DeviceData::new(data, 0);
        let mut out = lengths.map(|n| n.map(|n| Buffer::new(&vec![0.0_f32; n], 0)));
        let [grad_logp, grad_values, grad_entropy] =
            out.each_mut().map(|buffer| buffer.as_mut().map(Buffer::slice_mut));
        let mut stats = Buffer::new(&vec![unwritten(); room[0]], 0);
        let [mut loss, mut workspace] =
            [room[1], room[2]].map(|n| Buffer::new(&vec![0.0_f32; n], 0));
        let (stats, loss) = (stats.slice_mut(), Some(loss.slice_mut()));
        let error = cuda::ppo_loss(
            &stream(machine(Order::Fifo, 9, 3)),
            device.inputs(),
            data.batch,
            data.seq_len,
            &PpoLossOptions::default(),
            Outputs { stats, loss, grad_logp, grad_values, grad_entropy },
            workspace.slice_mut(),
        );
        let error = error.unwrap_err();
        assert!(matches!(&error, Error::Shape { arg, .. } if *arg == name), "{name}: {error}");
    };
    let (none, room) = ([None; 3], [1, 1, 10_000]);
    for (name, cut) in wrong_lengths() {
        let mut data = full.clone();
        cut(&mut data);
        fails(&data, none, room, name);
    }
    fails(&full, [Some(5), None, None], room, "grad_logp");
    fails(&full, [None, Some(5), None], room, "grad_values");
    fails(&full, [None, None, Some(5)], room, "grad_entropy");
    fails(&full, none, [0, 1, 10_000], "stats");
    fails(&full, none, [1, 2, 10_000], "loss");
    let needed = cuda::workspace_len(2, 3, &PpoLossOptions::default());
    fails(&full, none, [1, 1, needed - 1], "workspace");
    // A gradient for what is not there.
    let mut data = full.clone();
    data.values = None;
    fails(&data, [None, Some(6), None], room, "grad_values");
    data.batch = usize::MAX;
    fails(&data, none, room, "logp");
}

#[test]
fn values_without_returns_and_returns_without_values_are_refused_by_name() {
    let data = rollout(&mut rng(17), 2, 3);
    let device = DeviceData::new(&data, 0);
    let options = PpoLossOptions { value_clip_range: None, ..Default::default() };
    for (name, remove) in missing_partners() {
        let mut given: cpu::Inputs = data.inputs();
        remove(&mut given);
        let inputs = device.inputs();
        let inputs = Inputs {
            values: inputs.values.filter(|_| given.values.is_some()),
            returns: inputs.returns.filter(|_| given.returns.is_some()),
            ..inputs
        };
        let mut stats = Buffer::new(&[unwritten()], 0);
        let mut workspace = Buffer::workspace(cuda::workspace_len(2, 3, &options), 0);
        let (outputs, space) = (Outputs::new(stats.slice_mut()), workspace.slice_mut());
        let stream = stream(machine(Order::Fifo, 9, 3));
        let error = cuda::ppo_loss(&stream, inputs, 2, 3, &options, outputs, space).unwrap_err();
        assert!(matches!(&error, Error::Missing { arg, .. } if *arg == name), "{error}");
    }
}

#[test]
fn gradients_to_scale_of_the_wrong_length_are_refused_by_name() {
    let error = |upstream: usize, stored: Option<usize>, out: Option<usize>| {
        let upstream = Buffer::new(&vec![1.0_f32; upstream], 0);
        let buffer = |n: usize| Buffer::new(&vec![1.0_f32; n], 0);
        let (stored, mut out) = (stored.map(buffer), out.map(buffer));
        let inputs = ScaleInputs {
            stored_values: stored.as_ref().map(Buffer::slice),
            ..ScaleInputs::new(upstream.slice())
        };
        let outputs = ScaleOutputs {
            grad_values: out.as_mut().map(Buffer::slice_mut),
            ..ScaleOutputs::new()
        };
        cuda::scale(&stream(machine(Order::Fifo, 9, 3)), inputs, 3, outputs).unwrap_err()
    };
    let fails = |upstream, stored, out, name: &str| {
        let error = error(upstream, stored, out);
        assert!(matches!(&error, Error::Shape { arg, .. } if *arg == name), "{name}: {error}");
    };
    fails(2, Some(3), Some(3), "upstream");
    fails(1, Some(4), Some(3), "stored_values");
    fails(1, Some(3), Some(4), "grad_values");
    fails(1, None, Some(4), "grad_values");
    let error_of = |stored, out| match error(1, stored, out) {
        Error::Missing { arg, needed_by, .. } => (arg, needed_by),
        other => panic!("{other}"),
    };
    assert_eq!(error_of(None, Some(3)), ("stored_values", "grad_values"));
    assert_eq!(error_of(Some(3), None), ("grad_values", "stored_values"));
}

/// The loss from logits on that machine, in place or not, the rows `offset` elements from a 16-byte
/// boundary.
fn from_logits<T: Logit>(
    case: &logits_loss_cases::Case<T>,
    machine: Machine,
    offset: usize,
    in_place: bool,
) -> Result<logits_loss_cases::Found> {
    let stream = stream(machine);
    let n = case.targets.len();
    let mut logits = Buffer::new(&case.logits, offset);
    let mut separate = Buffer::new(&vec![T::ZERO; case.logits.len()], offset);
    let (targets, old_logp) = (Buffer::new(&case.targets, 0), Buffer::new(&case.old_logp, offset));
    let advantages = Buffer::new(&case.advantages, 0);
    let [ref_logp, rollout_logp, weights] = [&case.ref_logp, &case.rollout_logp, &case.weights]
        .map(|x| x.as_ref().map(|x| Buffer::new(x, 0)));
    let mask = case.mask.as_ref().map(|x| Buffer::new(x, offset));
    let offsets = case.offsets.as_ref().map(|x| Buffer::new(x, 0));
    let [mut logp, mut entropy] = [(); 2].map(|()| Buffer::new(&vec![f32::NAN; n], 0));
    let (mut stats, mut loss) = (Buffer::new(&[unwritten()], 0), Buffer::new(&[f32::NAN], 1));
    let [batch, seq_len] = case.shape;
    let mut workspace = Buffer::workspace(cuda::logits_workspace_len(batch, n, &case.options), 0);
    let inputs = LogitsInputs {
        ref_logp: ref_logp.as_ref().map(Buffer::slice),
        rollout_logp: rollout_logp.as_ref().map(Buffer::slice),
        weights: weights.as_ref().map(Buffer::slice),
        mask: mask.as_ref().map(Buffer::slice),
        offsets: offsets.as_ref().map(Buffer::slice),
        ..LogitsInputs::new(logits.slice(), targets.slice(), old_logp.slice(), advantages.slice())
    };
    let grad = if in_place { logits.slice_mut() } else { separate.slice_mut() };
    let outputs = LogitsOutputs {
        entropy: Some(entropy.slice_mut()),
        loss: Some(loss.slice_mut()),
        ..LogitsOutputs::new(logp.slice_mut(), stats.slice_mut(), grad)
    };
    let sizes = [batch, seq_len, case.vocab];
    let (first, second, room) = (&case.logprob_options, &case.options, workspace.slice_mut());
    cuda::logits_ppo_loss(&stream, inputs, sizes, first, second, outputs, room)?;
    let grad = if in_place { &logits } else { &separate };
    let stats = stats.read()[0];
    assert_eq!(loss.read()[0].to_bits(), (stats.loss as f32).to_bits());
    Ok(logits_loss_cases::Found {
        logp: logp.read(),
        entropy: entropy.read(),
        stats,
        grad_logits: grad.read().iter().map(|g| g.to_f32()).collect(),
    })
}

fn from_logits_agrees_with_the_reference<T: Logit>(
    bug: &'static str,
    orders: &[Order],
) -> Result<()> {
    let mut rng = rng(12);
    for (i, (shape, vocab)) in logits_loss_cases::SHAPES.into_iter().enumerate() {
        for number in i..i + 5 {
            let case = logits_loss_cases::Case::<T>::new(&mut rng, shape, vocab, number);
            let order = orders[number % orders.len()];
            // A block takes several rows, or each has its own.
            let machine = machine(order, [1, 1 << 10][number % 2], 1 << 20);
            let mut machine = Machine { planted_bug: bug, ..machine };
            // All of the row stays in it, some, or nothing.
            machine.device.shared_bytes = [232_448, 101_376, 0][number % 3];
            let found = from_logits(&case, machine, number % 3, number % 2 == 0)?;
            case.check(&format!("{order:?}"), &found);
        }
    }
    Ok(())
}

#[test]
fn from_logits_f32_agrees_with_the_references() {
    from_logits_agrees_with_the_reference::<f32>("", orders()).unwrap();
}

#[test]
fn from_logits_f16_agrees_with_the_references() {
    from_logits_agrees_with_the_reference::<f16>("", orders()).unwrap();
}

#[test]
fn from_logits_bf16_agrees_with_the_references() {
    from_logits_agrees_with_the_reference::<bf16>("", orders()).unwrap();
}

#[test]
fn from_logits_reads_no_masked_row_and_ignores_what_is_to_be_ignored() {
    let machine = machine(Order::Fifo, 4, 1 << 20);
    let run = |case: &_| from_logits(case, machine, 1, false).unwrap();
    // With GSPO's ratio of rows, and of tokens.
    logits_loss_cases::masked(&mut rng(13), 5, run);
    let mut case = logits_loss_cases::masked(&mut rng(13), 0, run);
    let vocab = case.vocab;

    // A target outside the vocabulary spoils its row and the loss, and no other row.
    case.targets[2] = vocab as i64;
    let found = from_logits(&case, machine, 1, false).unwrap();
    for row in 0..6 {
        let spoilt = found.grad_logits[row * vocab..][..vocab].iter().all(|g| g.is_nan());
        assert_eq!(spoilt, row == 2, "row {row}");
        assert_eq!(found.logp[row].is_nan(), row == 2, "row {row}");
    }
    assert!(found.stats.loss.is_nan());
}

#[test]
fn bad_input_from_logits_is_refused_by_name() {
    let machine = machine(Order::Fifo, 4, 1 << 20);
    let mut case = logits_loss_cases::Case::<f32>::new(&mut rng(14), [2, 3], 5, 0);
    let refused = |case: &logits_loss_cases::Case<f32>| {
        from_logits(case, machine, 0, false).map(|_| ()).unwrap_err().to_string()
    };
    case.vocab = 6;
    assert!(refused(&case).contains("`logits` has shape [30]"), "{}", refused(&case));
    case.vocab = 5;
    case.options.kl_coef = 1.0;
    assert!(refused(&case).contains("kl_coef"), "{}", refused(&case));
    case.options.kl_coef = 0.0;
    case.logprob_options.temperature = 0.0;
    assert!(refused(&case).contains("temperature"), "{}", refused(&case));
}

#[cfg(feature = "simt")]
mod planted {
    use super::*;
    use common::device::goes_unseen;

    /// The calls in which the bug would show.
    fn run(bug: &'static str, orders: &[Order]) -> Result<()> {
        match bug {
            "loss_extremes_missing_barrier" => extremes_of_many_rows(bug, orders),
            "loss_wrong_row_of_a_pack" | "loss_advantage_of_another_row" => {
                packs_agree_with_the_reference(bug, orders)
            }
            "loss_row_kept_too_short" => from_logits_agrees_with_the_reference::<bf16>(bug, orders),
            _ => agrees_for_every_shape(bug, orders),
        }
    }

    #[test]
    fn planted_bugs_that_change_results_are_seen() {
        let bugs = [
            "loss_wrong_centre",
            "loss_wrong_row",
            "loss_wrong_row_terms",
            "loss_wrong_row_of_a_pack",
            "loss_advantage_of_another_row",
        ];
        for bug in bugs {
            for order in ORDERS {
                assert!(!goes_unseen(|| run(bug, &[order])), "{bug} {order:?}");
            }
        }
    }

    #[test]
    fn a_planted_race_is_seen_in_one_of_the_orders() {
        let seeds: Vec<Order> = (0..4).map(Order::Random).collect();
        let orders = [&ORDERS[..2], &seeds].concat();
        for bug in [
            "loss_missing_barrier",
            "loss_rows_race",
            "loss_row_kept_too_short",
            "loss_extremes_missing_barrier",
        ] {
            assert!(!goes_unseen(|| run(bug, &orders)), "{bug}");
        }
    }

    /// Run by `.ci/simt` under a sanitizer, which must end the process.
    #[test]
    #[ignore = "ends the process under a sanitizer"]
    fn a_planted_bug_for_a_sanitizer() {
        let bug = std::env::var("PLANTED_BUG").unwrap();
        let name = [
            "loss_read_past_the_end",
            "loss_missing_barrier",
            "loss_shared_memory_race",
            "loss_rows_race",
            "loss_row_kept_too_short",
            "loss_extremes_missing_barrier",
        ]
        .into_iter()
        .find(|name| *name == bug)
        .unwrap();
        // An order that hides the bug from the results, where there is one.
        run(name, &[Order::Lifo]).unwrap();
    }
}
