//! The CUDA kernels of the preference losses, on a GPU or on the CPU stand-in: every loss, option and thread
//! order against the f64 reference, and bugs planted in the kernels, which must not go unseen.
#![cfg(any(feature = "simt", feature = "cuda"))]

mod common;

use common::device::{machine, orders, stream, Buffer, Machine, Order, ORDERS};
use common::pack::WILD_OFFSETS;
use common::preference_cases::*;
use common::*;
use ppo_kernels::preference::cuda::{self, Inputs, Outputs, RewardModelInputs, RewardModelOutputs};
use ppo_kernels::preference::{FDivergence, PreferenceLoss, PreferenceOptions, RewardModelOptions};
use ppo_kernels::{Error, Result};

#[derive(Clone, Copy)]
struct Call {
    machine: Machine,
    /// Elements from a 16-byte boundary to the first token, of each buffer another number.
    offset: usize,
}

impl Call {
    /// Aligned, with a grid so small that blocks loop over their rows.
    fn new(order: Order) -> Self {
        Self { machine: machine(order, 9, 3), offset: 0 }
    }

    fn run(self, data: &Data<f32>, options: &PreferenceOptions) -> Result<Found> {
        let device = DeviceData::new(data, self.offset);
        let room = |n: usize, at: usize| Buffer::new(&vec![f32::NAN; n], self.offset * at);
        let (mut losses, mut rewards) = (room(data.units(), 3), room(data.rows, 1));
        let mut grad = room(data.logp.len(), 2);
        let (mut stats, mut loss) = (Buffer::new(&[unwritten()], 0), Buffer::new(&[f32::NAN], 1));
        let outputs = Outputs {
            loss: Some(loss.slice_mut()),
            losses: Some(losses.slice_mut()),
            rewards: Some(rewards.slice_mut()),
            grad_logp: Some(grad.slice_mut()),
            ..Outputs::new(stats.slice_mut())
        };
        let mut workspace = Buffer::workspace(cuda::workspace_len(data.rows, options), 0);
        let (stream, inputs) = (stream(self.machine), device.inputs());
        let (rows, seq_len) = (data.rows, data.seq_len);
        let room = workspace.slice_mut();
        cuda::preference_loss(&stream, inputs, rows, seq_len, options, outputs, room)?;
        let stats = stats.read()[0];
        assert_eq!(loss.read()[0].to_bits(), (stats.loss as f32).to_bits());
        let (losses, rewards, grad) = (losses.read(), rewards.read(), grad.read());
        Ok(Found { stats, losses, rewards, grad })
    }
}

/// The inputs in device memory.
struct DeviceData {
    logp: Buffer<f32>,
    ref_logp: Option<Buffer<f32>>,
    ref_sums: Option<Buffer<f32>>,
    mask: Option<Buffer<u8>>,
    lengths: Option<Buffer<i64>>,
    weights: Option<Buffer<f32>>,
    margin: Option<Buffer<f32>>,
    labels: Option<Buffer<u8>>,
    kl: Option<Buffer<f32>>,
    offsets: Option<Buffer<i64>>,
}

impl DeviceData {
    fn new(data: &Data<f32>, offset: usize) -> Self {
        let optional = |x: &Option<Vec<f32>>, at| x.as_ref().map(|x| Buffer::new(x, offset * at));
        Self {
            logp: Buffer::new(&data.logp, offset),
            ref_logp: optional(&data.ref_logp, 2),
            ref_sums: optional(&data.ref_sums, 3),
            mask: data.mask.as_ref().map(|mask| Buffer::new(mask, offset)),
            lengths: data.lengths.as_ref().map(|lengths| Buffer::new(lengths, offset)),
            weights: optional(&data.weights, 4),
            margin: optional(&data.margin, 5),
            labels: data.labels.as_ref().map(|labels| Buffer::new(labels, offset)),
            kl: optional(&data.kl, 1),
            offsets: data.offsets.as_ref().map(|offsets| Buffer::new(offsets, offset)),
        }
    }

    fn inputs(&self) -> Inputs<'static> {
        let optional = |x: &Option<Buffer<f32>>| x.as_ref().map(Buffer::slice);
        Inputs {
            ref_logp: optional(&self.ref_logp),
            ref_sums: optional(&self.ref_sums),
            mask: self.mask.as_ref().map(Buffer::slice),
            lengths: self.lengths.as_ref().map(Buffer::slice),
            weights: optional(&self.weights),
            margin: optional(&self.margin),
            labels: self.labels.as_ref().map(Buffer::slice),
            kl: optional(&self.kl),
            offsets: self.offsets.as_ref().map(Buffer::slice),
            ..Inputs::new(self.logp.slice())
        }
    }
}

fn run_cuda(data: &Data<f32>, options: &PreferenceOptions) -> Found {
    Call::new(Order::Fifo).run(data, options).unwrap()
}

#[test]
fn agrees_with_the_reference_for_every_option() {
    let mut rng = rng(1);
    for (i, (name, options)) in option_sets().into_iter().enumerate() {
        for (rows, seq_len) in [(8, 5), (6, 150)] {
            let mut data = responses(&mut rng, rows, seq_len, &options);
            let call = Call { offset: i % 3, ..Call::new(ORDERS[i % 3]) };
            let what = format!("{name} [{rows}, {seq_len}] {:?}", call.machine.order);
            check(&what, &data, &options, &call.run(&data, &options).unwrap());
            data.mask = None;
            data.ref_sums = data.ref_logp.take().map(|_| uniform(&mut rng, rows, 9.0));
            if options.f_divergence == FDivergence::ReverseKl || seq_len < 20 {
                let found = call.run(&data, &options).unwrap();
                check(&format!("{what} unmasked"), &data, &options, &found);
            }
        }
        let data = sums(&mut rng, 22, &options);
        check(&format!("{name} sums"), &data, &options, &run_cuda(&data, &options));
    }
}

#[test]
fn packs_agree_with_the_reference_and_with_padded_batches() {
    let mut rng = rng(20);
    for (i, (name, options)) in option_sets().into_iter().enumerate() {
        // A row a warp, and a row a block.
        let (rows, seq_len) = [(8, 40), (4, 700), (4, 6000)][i % 3];
        let sample = Packed::new(&mut rng, rows, seq_len, &options);
        let mut first = None;
        for (i, order) in ORDERS.into_iter().take(2).enumerate() {
            let call = Call { offset: i % 3, machine: machine(order, 9, [3, 1 << 20][i % 2]) };
            let what = format!("{name} [{rows}, {seq_len}] {order:?}");
            let padded = call.run(&sample.padded, &options).unwrap();
            let packed = call.run(&sample.packed, &options).unwrap();
            sample.check(&what, &padded, &packed);
            // Sums of long rows beside short ones saturate the loss, and few digits are left of 1 - s(h).
            if seq_len < 100 {
                check(&what, &sample.packed, &options, &packed);
            }
            let bits = packed.bits();
            let first = first.get_or_insert_with(|| bits.clone());
            assert!(*first == bits, "{what}: bits depend on order, alignment or grid");
        }
    }
}

#[test]
fn no_offsets_lead_out_of_bounds() {
    let options = PreferenceOptions { ld_alpha: Some(0.3), ..Default::default() };
    for offsets in WILD_OFFSETS {
        for seq_len in [6, 9000] {
            let mut data = responses(&mut rng(21), 2, seq_len / 2, &options);
            (data.seq_len, data.offsets) = (seq_len, Some(offsets.to_vec()));
            // Under a sanitizer what is out of bounds would be seen; elsewhere that it returns.
            run_cuda(&data, &options);
        }
    }
}

/// Around every boundary: of a vector, a segment, a warp's tile, a warp's row; several parts of pairs.
const SHAPES: [(usize, usize); 12] = [
    (2, 1),
    (6, 3),
    (4, 127),
    (4, 128),
    (10, 129),
    (4, 511),
    (18, 513),
    (4, 2048),
    (6, 2049),
    (2, 8195),
    (2100, 4),
    (600, 33),
];

/// Every shape against the reference, with the same bits in all orders, wherever the data begin and
/// for any grid.
fn agrees_for_every_shape(planted_bug: &'static str, orders: &[Order]) -> Result<()> {
    let mut rng = rng(2);
    for (i, (rows, seq_len)) in SHAPES.into_iter().enumerate() {
        let ld = PreferenceOptions { ld_alpha: Some(0.3), sft_coef: 0.2, ..Default::default() };
        let sorted = [PreferenceLoss::Aot, PreferenceLoss::AotUnpaired][i % 2];
        let kto = plain(PreferenceLoss::Kto);
        for (options, masked) in [(ld, true), (ld, false), (plain(sorted), true), (kto, true)] {
            let mut data = responses(&mut rng, rows, seq_len, &options);
            if let Some(weights) = &mut data.weights {
                weights[rows / 4] = if rows > 2 { 0.0 } else { 1.0 };
            }
            if options.loss.sorts() && rows > 2 {
                // Two pairs that are equal.
                for row in [0, rows / 2] {
                    let first = row * seq_len..(row + 1) * seq_len;
                    let Data { logp, ref_logp, mask, .. } = &mut data;
                    for x in [logp, ref_logp.as_mut().unwrap()] {
                        x.copy_within(first.clone(), first.end);
                    }
                    mask.as_mut().unwrap().copy_within(first.clone(), first.end);
                }
            }
            data.mask = data.mask.filter(|_| masked);
            let data = if masked { with_nan_where_nothing_counts(&data) } else { data };
            let mut first = None;
            for (i, &order) in orders.iter().enumerate() {
                let machine = machine(order, 9, [3, 1 << 20, 1][i % 3]);
                let call = Call { machine: Machine { planted_bug, ..machine }, offset: i % 3 };
                let found = call.run(&data, &options)?;
                let what = format!("{:?} [{rows}, {seq_len}] {order:?}", options.loss);
                check(&what, &without_nan(&data), &options, &found);
                let bits = found.bits();
                let first = first.get_or_insert_with(|| bits.clone());
                assert!(*first == bits, "{what}: bits depend on order, alignment or grid");
            }
        }
    }
    Ok(())
}

/// `data` with 0 for NaN, which the reference multiplies where a weight is 0.
fn without_nan(data: &Data<f32>) -> Data<f32> {
    data.map(|x| if x.is_nan() { 0.0 } else { x })
}

#[test]
fn agrees_with_the_reference_for_every_shape_and_order() {
    agrees_for_every_shape("", orders()).unwrap();
}

#[test]
fn rewards_agree_with_the_reference() {
    let mut rng = rng(3);
    for (i, pairs) in [1, 5, 1025].into_iter().enumerate() {
        let rewards = Rewards::new(&mut rng, pairs);
        for options in reward_model_options() {
            let device = Buffer::new(&rewards.rewards, i);
            let margin = Buffer::new(rewards.margin.as_ref().unwrap(), i);
            let weights = Buffer::new(rewards.weights.as_ref().unwrap(), i);
            let mut stats = Buffer::new(&[unwritten()], 0);
            let mut losses = Buffer::new(&vec![f32::NAN; pairs], 1);
            let mut grad = Buffer::new(&vec![f32::NAN; 2 * pairs], i);
            let inputs = RewardModelInputs {
                margin: Some(margin.slice()),
                weights: Some(weights.slice()),
                ..RewardModelInputs::new(device.slice())
            };
            let outputs = RewardModelOutputs {
                losses: Some(losses.slice_mut()),
                grad_rewards: Some(grad.slice_mut()),
                ..RewardModelOutputs::new(stats.slice_mut())
            };
            let stream = stream(machine(ORDERS[i % 3], 9, 3));
            let mut space = Buffer::workspace(cuda::reward_model_workspace_len(pairs), 0);
            let space = space.slice_mut();
            cuda::reward_model_loss(&stream, inputs, pairs, &options, outputs, space).unwrap();
            let want = rewards.run(&options);
            assert_stats_close("rewards", &stats.read()[0], &want.stats);
            assert_close_scaled("losses", &losses.read(), &want.losses);
            assert_close_scaled("grad", &grad.read(), &want.grad);
        }
    }
}

#[test]
fn nan_in_a_token_that_counts_reaches_the_loss() {
    for loss in PreferenceLoss::ALL {
        let options = plain(loss);
        let mut data = responses(&mut rng(4), 6, 20, &options);
        data.mask = None;
        data.logp[65] = f32::NAN;
        assert!(run_cuda(&data, &options).stats.loss.is_nan(), "{loss:?}");
    }
}

#[test]
fn far_log_ratios_come_out_as_on_the_cpu() {
    for loss in PreferenceLoss::ALL.into_iter().filter(|&loss| loss != PreferenceLoss::Orpo) {
        let options = plain(loss);
        let mut data = sums(&mut rng(5), 16, &options);
        let far = [500.0, -500.0, 90.0, -90.0, 0.0, 20.0, -20.0, 1e4];
        let scale = if loss == PreferenceLoss::AlphaPo { 0.1 } else { 1.0 };
        data.logp = far.iter().chain(far.iter().rev()).map(|x| x * scale).collect();
        data.ref_sums = data.ref_sums.map(|_| vec![0.0; 16]);
        check(&format!("{loss:?}"), &data, &options, &run_cuda(&data, &options));
    }
}

#[test]
fn what_cannot_be_looked_at_makes_the_loss_nan() {
    let zero = |g: &f32| g.to_bits() == 0;
    // No pair counts.
    let mut data = responses(&mut rng(6), 4, 3, &PreferenceOptions::default());
    data.weights = Some(vec![0.0; 2]);
    let found = run_cuda(&data, &PreferenceOptions::default());
    assert!(found.stats.loss.is_nan() && found.grad.iter().all(zero));
    let options = PreferenceOptions { denominator: Some(3.0), ..Default::default() };
    let found = run_cuda(&data, &options);
    check("denominator", &data, &options, &found);
    // No token whose likelihood could be taken.
    let options = PreferenceOptions { sft_coef: 1.0, ..Default::default() };
    let mut data = responses(&mut rng(7), 4, 3, &options);
    data.mask = Some(vec![0; 12]);
    let found = run_cuda(&data, &options);
    assert!(found.stats.loss.is_nan() && found.stats.preference_loss.is_finite());
    assert!(found.grad.iter().all(zero));
    // Numbers that are none.
    let options = plain(PreferenceLoss::Kto);
    let mut data = responses(&mut rng(8), 4, 3, &options);
    data.labels = Some(vec![0, 1, 7, 1]);
    let found = run_cuda(&data, &options);
    assert!(found.stats.loss.is_nan() && found.losses[2].is_nan() && found.losses[1].is_finite());
    let options = PreferenceOptions { average_log_prob: true, ..Default::default() };
    let mut data = sums(&mut rng(9), 4, &options);
    data.lengths = Some(vec![3, -3, 3, 3]);
    let found = run_cuda(&data, &options);
    assert!(found.stats.loss.is_nan() && found.losses[1].is_nan() && found.losses[0].is_finite());
}

#[test]
fn empty_shapes_need_a_denominator() {
    for (rows, seq_len) in [(0, 0), (0, 5)] {
        let data = Data::<f32> { rows, seq_len, ..Default::default() };
        let options = PreferenceOptions::default();
        let error = Call::new(Order::Fifo).run(&data, &options).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Mask { .. }), "{error}");
        let options = PreferenceOptions { denominator: Some(1.0), ..options };
        assert_eq!(run_cuda(&data, &options).stats.loss, 0.0);
    }
    let data = Data::<f32> { rows: 4, seq_len: 0, ..Default::default() };
    check("no column", &data, &Default::default(), &run_cuda(&data, &Default::default()));
}

#[test]
fn statistics_alone_are_the_same() {
    let options = PreferenceOptions::default();
    let data = responses(&mut rng(10), 8, 30, &options);
    let device = DeviceData::new(&data, 0);
    let mut stats = Buffer::new(&[unwritten()], 0);
    let mut workspace = Buffer::workspace(cuda::workspace_len(8, &options), 0);
    let (outputs, space) = (Outputs::new(stats.slice_mut()), workspace.slice_mut());
    let stream = stream(machine(Order::Fifo, 9, 3));
    cuda::preference_loss(&stream, device.inputs(), 8, 30, &options, outputs, space).unwrap();
    assert_eq!(stats.read()[0], run_cuda(&data, &options).stats);
}

// ---- errors ----

/// Rows that `Sigmoid` takes, unmasked.
fn rows() -> Data<f32> {
    let mut data = responses(&mut rng(11), 4, 3, &PreferenceOptions::default());
    (data.mask, data.weights, data.margin) = (None, None, None);
    data
}

fn refused(data: &Data<f32>, options: &PreferenceOptions) -> Error {
    Call::new(Order::Fifo).run(data, options).map(|_| ()).unwrap_err()
}

#[test]
fn options_out_of_range_are_refused_by_name() {
    for (name, options) in bad_options() {
        let error = refused(&rows(), &options);
        assert!(matches!(&error, Error::Option { option, .. } if *option == name), "{error}");
    }
}

#[test]
fn what_does_not_go_with_a_loss_is_refused_by_name() {
    for (name, loss, change) in misplaced() {
        let mut data = rows();
        if loss.is_reference_free() {
            data.ref_logp = None;
        }
        data.labels = (loss == PreferenceLoss::Kto).then(|| vec![1; 4]);
        change(&mut data);
        match refused(&data, &plain(loss)) {
            Error::Option { option, .. } => assert_eq!(option, name),
            Error::Missing { arg, .. } => assert_eq!(arg, name),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn lengths_that_do_not_fit_are_refused_by_name() {
    for (name, change) in wrong_lengths() {
        let mut data = rows();
        change(&mut data);
        let error = refused(&data, &PreferenceOptions::default());
        assert!(matches!(&error, Error::Shape { arg, .. } if *arg == name), "{name}: {error}");
    }
    let mut data = rows();
    (data.rows, data.logp) = (3, vec![0.0; 9]);
    let error = refused(&data, &PreferenceOptions::default());
    assert!(error.to_string().contains("even"), "{error}");

    let (data, options) = (rows(), PreferenceOptions::default());
    let device = DeviceData::new(&data, 0);
    let fails = |sizes: [usize; 3], name: &str| {
        let [stats, grad, workspace] = sizes;
        let mut stats = Buffer::new(&vec![unwritten(); stats], 0);
        let mut grad = Buffer::new(&vec![0.0_f32; grad], 0);
        let mut workspace = Buffer::workspace(workspace, 0);
        let outputs =
            Outputs { grad_logp: Some(grad.slice_mut()), ..Outputs::new(stats.slice_mut()) };
        let (stream, space) = (stream(machine(Order::Fifo, 9, 3)), workspace.slice_mut());
        let error = cuda::preference_loss(&stream, device.inputs(), 4, 3, &options, outputs, space);
        let error = error.unwrap_err();
        assert!(matches!(&error, Error::Shape { arg, .. } if *arg == name), "{name}: {error}");
    };
    let needed = cuda::workspace_len(4, &options);
    fails([0, 12, needed], "stats");
    fails([1, 6, needed], "grad_logp");
    fails([1, 12, needed - 1], "workspace");

    let rewards = Buffer::new(&[0.0_f32; 4], 0);
    let mut stats = Buffer::new(&[unwritten()], 0);
    let mut run = |pairs, needed| {
        let mut workspace = Buffer::workspace(needed, 0);
        let (inputs, stream) =
            (RewardModelInputs::new(rewards.slice()), stream(machine(Order::Fifo, 9, 3)));
        let outputs = RewardModelOutputs::new(stats.slice_mut());
        let (options, space) = (RewardModelOptions::default(), workspace.slice_mut());
        cuda::reward_model_loss(&stream, inputs, pairs, &options, outputs, space).unwrap_err()
    };
    assert!(matches!(run(3, 100), Error::Shape { arg: "rewards", .. }));
    assert!(matches!(run(2, 3), Error::Shape { arg: "workspace", .. }));
}

#[cfg(feature = "simt")]
mod planted {
    use super::*;
    use common::device::goes_unseen;

    fn unseen(bug: &'static str, orders: &[Order]) -> bool {
        let run = || agrees_for_every_shape(bug, orders);
        goes_unseen(run)
    }

    #[test]
    fn planted_bugs_that_change_results_are_seen() {
        for bug in ["preference_wrong_tail", "preference_tied_ranks", "preference_other_row"] {
            for order in ORDERS {
                assert!(!unseen(bug, &[order]), "{bug} {order:?}");
            }
        }
    }

    #[test]
    fn a_planted_race_is_seen_in_one_of_the_orders() {
        let seeds: Vec<Order> = (0..4).map(Order::Random).collect();
        let orders = [&ORDERS[..2], &seeds].concat();
        assert!(!unseen("preference_missing_barrier", &orders));
    }

    /// Run by `.ci/simt` under a sanitizer, which must end the process.
    #[test]
    #[ignore = "ends the process under a sanitizer"]
    fn a_planted_bug_for_a_sanitizer() {
        let bug = std::env::var("PLANTED_BUG").unwrap();
        let bugs = ["preference_read_past_the_end", "preference_missing_barrier"];
        let name = bugs.into_iter().find(|name| *name == bug).unwrap();
        // An order that hides the bug from the results, where there is one.
        agrees_for_every_shape(name, &[Order::Lifo]).unwrap();
    }
}
