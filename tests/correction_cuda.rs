//! The CUDA kernels of the correction, on a GPU or on the CPU stand-in: every option and thread order
//! against the f64 reference, and bugs planted in the kernels, which must not go unseen.
#![cfg(any(feature = "simt", feature = "cuda"))]

mod common;

use common::correction_cases::*;
use common::device::{machine, orders, stream, Buffer, Machine, Order, ORDERS};
use common::pack::WILD_OFFSETS;
use common::*;
use ppo_kernels::correction::cuda::{self, Inputs, Outputs};
use ppo_kernels::correction::{CorrectionOptions, CorrectionStats};
use ppo_kernels::{Error, Result};

/// One call.
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

    fn run(self, data: &Data, options: &CorrectionOptions) -> Result<Found> {
        let n = data.old_logp.len();
        let old_logp = Buffer::new(&data.old_logp, self.offset);
        let rollout_logp = Buffer::new(&data.rollout_logp, 2 * self.offset);
        let mask = data.mask.as_ref().map(|mask| Buffer::new(mask, self.offset));
        let offsets = data.offsets.as_ref().map(|offsets| Buffer::new(offsets, self.offset));
        // Filled with what is no result, to see that every element is written.
        let mut weights = Buffer::new(&vec![f32::NAN; n], 3 * self.offset);
        let mut kept = Buffer::new(&vec![7; n], 3 * self.offset);
        let mut stats = Buffer::new(&[unwritten()], 0);
        let (batch, seq_len) = (data.batch, data.seq_len);
        let mut workspace = Buffer::workspace(cuda::workspace_len(batch), 0);
        let inputs = Inputs {
            mask: mask.as_ref().map(Buffer::slice),
            offsets: offsets.as_ref().map(Buffer::slice),
            ..Inputs::new(old_logp.slice(), rollout_logp.slice())
        };
        let outputs = Outputs {
            kept: Some(kept.slice_mut()),
            ..Outputs::new(weights.slice_mut(), stats.slice_mut())
        };
        let (stream, scratch) = (stream(self.machine), workspace.slice_mut());
        cuda::correction(&stream, inputs, batch, seq_len, options, outputs, scratch)?;
        Ok(Found { weights: weights.read(), kept: kept.read(), stats: stats.read()[0] })
    }
}

#[test]
fn agrees_with_the_reference_for_every_option() {
    let mut rng = rng(1);
    for (i, (name, options)) in option_sets().into_iter().enumerate() {
        // A row a warp, and a row a block.
        for (batch, seq_len) in [(11, 37), (3, 1300)] {
            for masked in [false, true] {
                let data = clear_of_bounds(rollout(&mut rng, batch, seq_len, masked), &options);
                let call = Call { offset: i % 4, ..Call::new(ORDERS[i % 3]) };
                let what = format!("{name} [{batch}, {seq_len}] {:?}", call.machine.order);
                check(&what, &data, &options, &call.run(&data, &options).unwrap());
            }
        }
    }
}

/// Around every boundary: of a vector, a segment, a warp's chunk, the rows of a warp, a block's chunk; and
/// more rows than a part has.
const SHAPES: [(usize, usize); 13] = [
    (1, 1),
    (3, 7),
    (2, 127),
    (9, 128),
    (8, 257),
    (17, 300),
    (2, 512),
    (2, 513),
    (3, 2048),
    (2, 2051),
    (1, 5000),
    (8200, 2),
    (1030, 514),
];

/// Every shape against the reference, with the same bits in all orders, wherever the data begin and for any
/// grid.
fn agrees_for_every_shape(planted_bug: &'static str, orders: &[Order]) -> Result<()> {
    let mut rng = rng(2);
    let sets = option_sets();
    let pick = |name: &str| sets.iter().find(|(of, _)| *of == name).unwrap().1;
    for (batch, seq_len) in SHAPES {
        let large = batch * seq_len > 100_000;
        for name in ["icepop normalised", "token and row", "sequence normalised"] {
            if large && name != "icepop normalised" {
                continue;
            }
            let options = pick(name);
            let data = clear_of_bounds(rollout(&mut rng, batch, seq_len, true), &options);
            let mut first = None;
            for (i, &order) in orders.iter().take(if large { 1 } else { 9 }).enumerate() {
                let machine = machine(order, 9, [3, 1 << 20, 1][i % 3]);
                let call = Call { machine: Machine { planted_bug, ..machine }, offset: i % 4 };
                let found = call.run(&data, &options)?;
                let what = format!("{name} [{batch}, {seq_len}] {order:?}");
                check(&what, &data, &options, &found);
                let bits = found.bits();
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

#[test]
fn packs_agree_with_the_reference_and_with_padded_batches() {
    let mut rng = rng(20);
    for (i, (name, options)) in option_sets().into_iter().enumerate() {
        // A row a warp, and a row a block.
        let (batch, seq_len) = [(11, 37), (5, 1800), (300, 9)][i % 3];
        let sample = Packed::new(&mut rng, batch, seq_len, &options);
        let mut first = None;
        for (i, order) in ORDERS.into_iter().take(3).enumerate() {
            let call = Call { offset: i % 4, machine: machine(order, 9, [3, 1 << 20, 1][i % 3]) };
            let what = format!("{name} [{batch}, {seq_len}] {order:?}");
            let padded = call.run(&sample.padded, &options).unwrap();
            let packed = call.run(&sample.packed, &options).unwrap();
            sample.check(&what, &options, &padded, &packed);
            check(&what, &sample.packed, &options, &packed);
            let bits = packed.bits();
            let first = first.get_or_insert_with(|| bits.clone());
            assert!(*first == bits, "{what}: bits depend on order, alignment or grid");
        }
    }
}

#[test]
fn no_offsets_lead_out_of_bounds() {
    for (_, options) in option_sets().into_iter().step_by(9) {
        for offsets in WILD_OFFSETS {
            for seq_len in [6, 1200] {
                let mut data = rollout(&mut rng(21), 1, seq_len, false);
                (data.batch, data.offsets) = (2, Some(offsets.to_vec()));
                // Under a sanitizer what is out of bounds would be seen; elsewhere that it returns.
                Call::new(Order::Fifo).run(&data, &options).unwrap();
            }
        }
    }
}

#[test]
fn no_token_is_no_nan() {
    for (batch, seq_len) in [(0, 5), (5, 0), (0, 0)] {
        let data = Data { batch, seq_len, ..Default::default() };
        let options = CorrectionOptions { normalise: true, ..CorrectionOptions::default() };
        let found = Call::new(Order::Fifo).run(&data, &options).unwrap();
        assert_eq!(found.stats, CorrectionStats::none());
    }
    let mut data = rollout(&mut rng(3), 3, 600, false);
    data.mask = Some(vec![0; 3 * 600]);
    for (name, options) in option_sets() {
        let found = Call::new(Order::Lifo).run(&data, &options).unwrap();
        check(name, &data, &options, &found);
        assert_eq!(found.stats, CorrectionStats::none(), "{name}");
    }
}

#[test]
fn a_row_does_not_depend_on_the_others() {
    for (batch, seq_len) in [(20, 130), (5, 700)] {
        let data = rollout(&mut rng(4), batch, seq_len, true);
        for (name, options) in option_sets().into_iter().filter(|(_, o)| !o.normalise) {
            let found = Call::new(Order::Fifo).run(&data, &options).unwrap();
            let alone = Call { offset: 3, ..Call::new(Order::Lifo) };
            let alone = alone.run(&data.row(2), &options).unwrap();
            let at = 2 * seq_len..3 * seq_len;
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&alone.weights), bits(&found.weights[at.clone()]), "{name}");
            assert_eq!(alone.kept, found.kept[at], "{name}");
        }
    }
}

#[test]
fn infinities_are_clamped() {
    let inf = f32::INFINITY;
    let data = Data {
        batch: 1,
        seq_len: 3,
        old_logp: vec![-1.0, -inf, -1.0],
        rollout_logp: vec![-inf, -1.0, -1.0],
        mask: None,
        offsets: None,
    };
    for (name, options) in option_sets().into_iter().filter(|(_, o)| o.log_ratio_clamp.is_some()) {
        check(name, &data, &options, &Call::new(Order::Fifo).run(&data, &options).unwrap());
    }
}

#[test]
fn what_is_not_wanted_is_not_written() {
    let data = rollout(&mut rng(5), 4, 90, false);
    let options = CorrectionOptions::default();
    let (old_logp, rollout_logp) =
        (Buffer::new(&data.old_logp, 0), Buffer::new(&data.rollout_logp, 0));
    let mut weights = Buffer::new(&vec![f32::NAN; 360], 0);
    let mut stats = Buffer::new(&[unwritten()], 0);
    let mut workspace = Buffer::workspace(cuda::workspace_len(4), 0);
    let stream = stream(machine(Order::Fifo, 9, 3));
    let inputs = Inputs::new(old_logp.slice(), rollout_logp.slice());
    let outputs = Outputs::new(weights.slice_mut(), stats.slice_mut());
    cuda::correction(&stream, inputs, 4, 90, &options, outputs, workspace.slice_mut()).unwrap();
    let want = Call::new(Order::Fifo).run(&data, &options).unwrap();
    assert_eq!((weights.read(), stats.read()[0]), (want.weights, want.stats));

    // A workspace that is too small, and arrays that do not fit.
    let outputs = Outputs::new(weights.slice_mut(), stats.slice_mut());
    let mut small = Buffer::workspace(cuda::workspace_len(4) - 1, 0);
    let error = cuda::correction(&stream, inputs, 4, 90, &options, outputs, small.slice_mut());
    assert!(matches!(error, Err(Error::Shape { arg: "workspace", .. })));
    let outputs = Outputs::new(weights.slice_mut(), stats.slice_mut());
    let error = cuda::correction(&stream, inputs, 4, 91, &options, outputs, workspace.slice_mut());
    assert!(matches!(error, Err(Error::Shape { arg: "old_logp", .. })));
    let crossed = CorrectionOptions { low: Some(3.0), ..options };
    let outputs = Outputs::new(weights.slice_mut(), stats.slice_mut());
    let error = cuda::correction(&stream, inputs, 4, 90, &crossed, outputs, workspace.slice_mut());
    assert!(matches!(error, Err(Error::Option { option: "high", .. })));
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
        for bug in [
            "correction_flags_shifted",
            "correction_normaliser_after_rejections",
            "correction_row_counted_by_tokens",
        ] {
            for order in ORDERS {
                assert!(!unseen(bug, &[order]), "{bug} {order:?}");
            }
        }
    }

    #[test]
    fn planted_races_are_seen_in_one_of_the_orders() {
        let seeds: Vec<Order> = (0..4).map(Order::Random).collect();
        let orders = [&ORDERS[..2], &seeds].concat();
        for bug in ["correction_missing_barrier", "correction_shared_memory_race"] {
            assert!(!unseen(bug, &orders), "{bug}");
        }
    }

    /// Run by `.ci/simt` under a sanitizer, which must end the process.
    #[test]
    #[ignore = "ends the process under a sanitizer"]
    fn a_planted_bug_for_a_sanitizer() {
        let bug = std::env::var("PLANTED_BUG").unwrap();
        let bugs = [
            "correction_read_past_the_end",
            "correction_missing_barrier",
            "correction_shared_memory_race",
        ];
        let name = bugs.into_iter().find(|name| *name == bug).unwrap();
        // An order that hides the bug from the results, where there is one.
        agrees_for_every_shape(name, &[Order::Lifo]).unwrap();
    }
}
