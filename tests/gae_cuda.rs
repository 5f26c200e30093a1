//! The CUDA kernels of the gae op, on a GPU or on the CPU stand-in: every mapping, option and kind
//! of mask in every thread order against the f64 reference, what its bits must not depend on, and
//! bugs planted in the kernels, which must not go unseen.
#![cfg(any(feature = "simt", feature = "cuda"))]

mod common;

use common::device::{machine, orders, stream, Buffer, Machine, Order};
use common::gae_cases::*;
use common::pack::WILD_OFFSETS;
use common::*;
use ppo_kernels::gae::cpu::Inputs;
use ppo_kernels::gae::cuda::{self, Outputs};
use ppo_kernels::gae::{GaeOptions, MissingEos, RewardShaping, ScorePlacement, ScoreScale};
use ppo_kernels::moments::Moments;
use ppo_kernels::{Error, Result};

/// Elements from a 16-byte boundary to the first of each array, times 1, 2, 3 and so on.
const OFFSETS: [usize; 3] = [0, 1, 3];

/// The largest error of an advantage in rows of up to a million steps, relative to the row's
/// largest. Measured were 8.7e-7 at most, and 6.6e-5 for the loop in f32: a segment's sum rounds
/// seven times, a row of a million adds up 8192 of them, and powers of gamma lambda are rounded
/// once each.
const LONG_ROW: f64 = 2e-6;

/// Moments that nothing has written.
const NOTHING: Moments = Moments { count: f64::NAN, mean: f64::NAN, m2: f64::NAN };

/// One call.
#[derive(Clone, Copy)]
struct Call<'a, 'b> {
    machine: Machine,
    offset: usize,
    inputs: Inputs<'a>,
    batch: usize,
    seq_len: usize,
    options: &'b GaeOptions,
}

impl Call<'_, '_> {
    /// What comes out, which must not depend on whether rewards and moments are asked for.
    fn run(&self) -> Result<Output> {
        let output = self.run_with(true)?;
        let fewer = self.run_with(false)?;
        let same =
            |a: &[f32], b: &[f32]| a.iter().map(|x| x.to_bits()).eq(b.iter().map(|x| x.to_bits()));
        assert!(
            same(&output.advantages, &fewer.advantages) && same(&output.returns, &fewer.returns)
        );
        Ok(output)
    }

    fn run_with(&self, all: bool) -> Result<Output> {
        let stream = stream(self.machine);
        let Inputs {
            values,
            rewards,
            kl,
            scores,
            has_eos,
            mask,
            dones,
            bootstrap,
            offsets,
            lambda_per_row,
        } = self.inputs;
        let floats = |v: Option<&[f32]>, i| v.map(|v| Buffer::new(v, i * self.offset));
        let flags = |v: Option<&[u8]>, i| v.map(|v| Buffer::new(v, i * self.offset));
        let values = Buffer::new(values, self.offset);
        let (rewards, kl) = (floats(rewards, 2), floats(kl, 3));
        let (scores, bootstrap) = (floats(scores, 1), floats(bootstrap, 1));
        let lambda_per_row = floats(lambda_per_row, 1);
        let offsets = offsets.map(|offsets| Buffer::new(offsets, self.offset));
        let (has_eos, mask, dones) = (flags(has_eos, 1), flags(mask, 1), flags(dones, 2));
        let inputs = cuda::Inputs {
            values: values.slice(),
            rewards: rewards.as_ref().map(Buffer::slice),
            kl: kl.as_ref().map(Buffer::slice),
            scores: scores.as_ref().map(Buffer::slice),
            has_eos: has_eos.as_ref().map(Buffer::slice),
            mask: mask.as_ref().map(Buffer::slice),
            dones: dones.as_ref().map(Buffer::slice),
            bootstrap: bootstrap.as_ref().map(Buffer::slice),
            offsets: offsets.as_ref().map(Buffer::slice),
            lambda_per_row: lambda_per_row.as_ref().map(Buffer::slice),
        };
        // Whatever was there must be overwritten.
        let tokens = if offsets.is_some() { self.seq_len } else { self.batch * self.seq_len };
        let garbage = vec![f32::NAN; tokens];
        let mut out = [1, 2, 3].map(|i| Buffer::new(&garbage, i * self.offset));
        let [advantages, returns, shaped] = &mut out;
        let mut moments = Buffer::new(&[NOTHING], 0);
        let length = cuda::workspace_len(&inputs, self.batch, self.seq_len);
        let mut workspace = Buffer::workspace(length, 1);
        let outputs = Outputs {
            advantages: advantages.slice_mut(),
            returns: returns.slice_mut(),
            shaped_rewards: all.then(|| shaped.slice_mut()),
            moments: all.then(|| moments.slice_mut()),
        };
        let (batch, seq_len) = (self.batch, self.seq_len);
        cuda::gae(&stream, inputs, batch, seq_len, self.options, outputs, workspace.slice_mut())?;
        Ok(Output {
            advantages: advantages.read().to_vec(),
            returns: returns.read().to_vec(),
            rewards: shaped.read().to_vec(),
            moments: moments.read()[0],
        })
    }
}

/// The sample through the kernels in all orders, with rows aligned in different ways and with grids
/// of different size, and through the reference.
fn agrees(
    planted_bug: &'static str,
    orders: &[Order],
    sample: &Sample,
    masked: Masked,
    fewer: bool,
    options: &GaeOptions,
) -> Result<()> {
    let (batch, seq_len) = (sample.batch, sample.seq_len);
    let inputs = sample.inputs(fewer, masked != Masked::Nothing);
    let want = run_reference(&inputs, batch, seq_len, options);
    let mut first = None;
    for (i, &order) in orders.iter().enumerate() {
        let machine = Machine { planted_bug, ..machine(order, 9, [1 << 20, 3, 2][i % 3]) };
        let offset = OFFSETS[i % OFFSETS.len()];
        let call = Call { machine, offset, inputs, batch, seq_len, options };
        let got = if i == 0 { call.run()? } else { call.run_with(true)? };
        let what = format!("{batch}x{seq_len} {masked:?} {fewer} {order:?} {options:?}");
        check_output(&what, &got, &want);
        let bits = bits(&got);
        let first = first.get_or_insert_with(|| bits.clone());
        assert!(*first == bits, "{what}: bits depend on order, alignment or grid");
    }
    Ok(())
}

/// Shapes for every mapping: a warp a row, blocks of all sizes, several tiles a row, and rows that
/// are split; around the boundaries of vectors, segments and tiles.
const SHAPES: [(usize, usize); 17] = [
    (9, 1),
    (17, 2),
    (8, 37),
    (3, 128),
    (2, 129),
    (3, 255),
    (2, 256),
    (3, 257),
    (2, 512),
    (2, 513),
    (2, 1024),
    (3, 1100),
    (2, 2048),
    (2, 2049),
    (3, 4096),
    (2, 5003),
    (2, 16_389),
];

/// Every shape and kind of mask, with some of the options each, all of them in turn.
fn agrees_with_the_reference(planted_bug: &'static str, orders: &[Order]) -> Result<()> {
    let mut rng = rng(1);
    let all = all_options();
    let mut options = all.iter().cycle();
    for (batch, seq_len) in SHAPES {
        for masked in ALL_MASKED {
            for fewer in [false, true] {
                let sample = Sample::new(&mut rng, batch, seq_len, masked);
                // Goes round all of them, since 48 and 5 have no factor in common.
                let options = options.nth(4).unwrap();
                agrees(planted_bug, orders, &sample, masked, fewer, options)?;
            }
        }
    }
    Ok(())
}

#[test]
fn every_shape_and_mask_agrees_with_the_reference_in_every_order() {
    agrees_with_the_reference("", orders()).unwrap();
}

#[test]
fn all_options_agree_with_the_reference() {
    let mut rng = rng(2);
    for options in all_options() {
        for masked in ALL_MASKED {
            for (batch, seq_len) in [(3, 41), (2, 300)] {
                let sample = Sample::new(&mut rng, batch, seq_len, masked);
                let order = Order::Random(seq_len as u64);
                agrees("", &[order], &sample, masked, false, &options).unwrap();
            }
        }
    }
}

/// A row alone, with that much padding behind it, must have the bits it has among the others.
fn same_alone(sample: &Sample, all: &Output, row: usize, padding: usize, options: &GaeOptions) {
    let seq_len = sample.seq_len;
    let padded = seq_len + padding;
    let at = row * seq_len..(row + 1) * seq_len;
    let f32s = |v: &[f32]| [&v[at.clone()], &vec![f32::NAN; padding]].concat();
    let bytes = |v: &[u8]| [&v[at.clone()], &vec![0; padding]].concat();
    let (values, rewards, kl) = (f32s(&sample.values), f32s(&sample.rewards), f32s(&sample.kl));
    let (mask, dones) = (bytes(&sample.mask), bytes(&sample.dones));
    let inputs = Inputs {
        values: &values,
        rewards: Some(&rewards),
        kl: Some(&kl),
        scores: Some(&sample.scores[row..=row]),
        has_eos: Some(&sample.has_eos[row..=row]),
        mask: Some(&mask),
        dones: Some(&dones),
        bootstrap: Some(&sample.bootstrap[row..=row]),
        ..Inputs::new(&values)
    };
    let machine = machine(Order::Lifo, 9, 1 << 20);
    let call = Call { machine, offset: 1, inputs, batch: 1, seq_len: padded, options };
    let alone = call.run().unwrap();
    let same = |alone: &[f32], all: &[f32]| {
        let all = all[at.clone()].iter().map(|v| v.to_bits());
        assert!(alone[..seq_len].iter().map(|v| v.to_bits()).eq(all), "row {row} + {padding}");
        assert!(alone[seq_len..].iter().all(|&v| v == 0.0));
    };
    same(&alone.advantages, &all.advantages);
    same(&alone.returns, &all.returns);
    same(&alone.rewards, &all.rewards);
}

#[test]
fn a_row_has_the_same_bits_in_any_batch_and_behind_any_padding() {
    let mut rng = rng(4);
    for (i, options) in all_options().iter().enumerate() {
        // From a warp a row to blocks of all sizes, and several tiles.
        let (batch, seq_len) = [(7, 100), (5, 250), (3, 700)][i % 3];
        let mut sample = Sample::new(&mut rng, batch, seq_len, Masked::Gaps);
        for row in 0..batch {
            // With room behind it, AfterLastToken is another thing.
            sample.mask[(row + 1) * seq_len - 1] = 0;
        }
        let machine = machine(Order::Fifo, 9, 1 << 20);
        let inputs = sample.inputs(false, true);
        let all = Call { machine, offset: 0, inputs, batch, seq_len, options }.run().unwrap();
        for (row, padding) in [(0, 1), (1, 27), (2, 600), (batch - 1, 2100)] {
            same_alone(&sample, &all, row, padding, options);
        }
    }
}

#[test]
fn rows_that_are_split_over_blocks_have_the_same_bits_as_others() {
    let mut rng = rng(5);
    let (batch, seq_len) = (65, 16_390);
    for (masked, i) in [(Masked::Nothing, 1), (Masked::Gaps, 21), (Masked::Right, 46)] {
        let sample = Sample::new(&mut rng, batch, seq_len, masked);
        let options = &all_options()[i];
        let machine = machine(Order::Fifo, 9, 1 << 20);
        let inputs = sample.inputs(false, true);
        // 65 rows take a block each.
        let call = Call { machine, offset: 0, inputs, batch, seq_len, options };
        let all = call.run_with(true).unwrap();
        for row in [0, 64] {
            same_alone(&sample, &all, row, 0, options);
        }
    }
}

#[test]
fn tokens_of_which_none_is_masked_or_done_have_the_bits_of_others() {
    let mut rng = rng(10);
    for options in &all_options() {
        // Warps of which the last has a done, and none has. It says what the row's end says.
        for seq_len in [256, 512, 2048, 4096, 16_640] {
            let mut sample = Sample::new(&mut rng, 1, seq_len, Masked::Nothing);
            sample.dones.fill(0);
            sample.bootstrap.fill(0.0);
            let run = |dones: &[u8]| {
                let inputs = Inputs { dones: Some(dones), ..sample.inputs(false, false) };
                let machine = machine(Order::Fifo, 9, 1 << 20);
                let call = Call { machine, offset: 0, inputs, batch: 1, seq_len, options };
                bits(&call.run_with(true).unwrap())
            };
            let mut last_is_done = sample.dones.clone();
            last_is_done[seq_len - 1] = 1;
            assert!(run(&sample.dones) == run(&last_is_done), "{seq_len} {options:?}");
        }
    }
}

/// Scores past a last token that is the last of its vector, segment or tile.
fn scores_past_the_last_token(planted_bug: &'static str, orders: &[Order]) -> Result<()> {
    let mut rng = rng(6);
    let shaping =
        RewardShaping { score_placement: ScorePlacement::AfterLastToken, ..Default::default() };
    let options = GaeOptions { shaping, gamma: 0.99, ..Default::default() };
    let lengths = [4, 127, 128, 129, 255, 256, 1024, 2047, 2048, 2049, 4096, 4099, 4100, 16_384];
    for seq_len in [256, 4100, 16_400] {
        let lengths: Vec<usize> = lengths.into_iter().filter(|&n| n <= seq_len).collect();
        let mut sample = Sample::new(&mut rng, lengths.len(), seq_len, Masked::Nothing);
        for (row, &length) in lengths.iter().enumerate() {
            sample.mask[row * seq_len + length..(row + 1) * seq_len].fill(0);
        }
        agrees(planted_bug, orders, &sample, Masked::Right, true, &options)?;
    }
    Ok(())
}

#[test]
fn a_score_past_the_last_token_may_fall_to_another_vector_segment_or_tile() {
    scores_past_the_last_token("", &orders()[..2]).unwrap();
}

/// Packs and padded batches with rows' own λ and without, in all orders: the reference, and for all of one
/// sample the same bits.
fn packs_agree_with_the_reference(planted_bug: &'static str, orders: &[Order]) -> Result<()> {
    let mut rng = rng(30);
    let mut options = all_options().into_iter().cycle();
    // All rows in a warp's reach, in blocks of all sizes, and several tiles; many rows of nothing.
    for (batch, seq_len) in [(1, 1), (9, 3), (7, 30), (5, 300), (5, 700), (3, 5003), (40, 90)] {
        for own_lambdas in [false, true] {
            for options in [options.nth(4).unwrap(), options.nth(4).unwrap()] {
                let sample = Packed::new(&mut rng, batch, seq_len);
                let [padded, packed] = sample.inputs(own_lambdas);
                let tokens = sample.pack.tokens();
                let mut first = None;
                for (i, &order) in orders.iter().enumerate() {
                    let machine =
                        Machine { planted_bug, ..machine(order, 9, [1 << 20, 3, 2][i % 3]) };
                    let offset = OFFSETS[i % OFFSETS.len()];
                    let run = |inputs, seq_len| {
                        let options = &options;
                        Call { machine, offset, inputs, batch, seq_len, options }.run_with(true)
                    };
                    let what = format!("{batch}x{seq_len} {own_lambdas} {order:?} {options:?}");
                    let [of_padded, of_packed] = [run(padded, seq_len)?, run(packed, tokens)?];
                    sample.check(&what, &of_padded, &of_packed);
                    let want = run_reference(&packed, batch, tokens, &options);
                    check_output(&what, &of_packed, &want);
                    let bits = bits(&of_packed);
                    let first = first.get_or_insert_with(|| bits.clone());
                    assert!(*first == bits, "{what}: bits depend on order, alignment or grid");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn packs_and_rows_with_their_own_lambda_agree_with_the_reference() {
    packs_agree_with_the_reference("", orders()).unwrap();
}

#[test]
fn no_offsets_lead_out_of_bounds() {
    for offsets in WILD_OFFSETS {
        let values = [0.5; 6];
        let inputs = Inputs { offsets: Some(&offsets), ..Inputs::new(&values) };
        let machine = machine(Order::Fifo, 9, 1 << 20);
        let options = &GaeOptions::default();
        // Under a sanitizer what is out of bounds would be seen; elsewhere that it returns.
        let call = Call { machine, offset: 1, inputs, batch: 2, seq_len: 6, options };
        call.run_with(true).unwrap();
        let long = vec![0.5; 3000];
        let inputs = Inputs { offsets: Some(&offsets), ..Inputs::new(&long) };
        Call { inputs, seq_len: 3000, ..call }.run_with(true).unwrap();
    }
}

#[test]
fn a_lambda_that_is_none_makes_its_row_nan() {
    let values = [0.5; 9];
    for bad in [-0.5, 1.5, f32::NAN] {
        let lambdas = [0.5, bad, 1.0];
        let inputs = Inputs { lambda_per_row: Some(&lambdas), ..Inputs::new(&values) };
        let machine = machine(Order::Fifo, 9, 1 << 20);
        let options = &GaeOptions::default();
        let call = Call { machine, offset: 0, inputs, batch: 3, seq_len: 3, options };
        let got = call.run().unwrap().advantages;
        assert!(got[3..6].iter().any(|a| a.is_nan()));
        assert!(got[..3].iter().chain(&got[6..]).all(|a| a.is_finite()));
    }
}

#[test]
fn special_values_stay_where_they_belong() {
    let seq_len = 600;
    for batch in [1, 2] {
        for long in [false, true] {
            let seq_len = if long { 17_000 } else { seq_len };
            let n = batch * seq_len;
            let (mut rewards, mut dones, mut mask) = (vec![0.25; n], vec![0; n], vec![1; n]);
            // A NaN is not seen before the end of the episode before it, nor behind a mask.
            rewards[400] = f32::NAN;
            dones[300] = 1;
            rewards[10] = f32::NAN;
            mask[10] = 0;
            let inputs = Inputs {
                rewards: Some(&rewards),
                dones: Some(&dones),
                mask: Some(&mask),
                scores: Some(&[f32::NAN, f32::NAN][..batch]),
                has_eos: Some(&[0, 0][..batch]),
                ..Inputs::new(&rewards[..n])
            };
            let values = vec![0.5; n];
            let inputs = Inputs { values: &values, ..inputs };
            let scale = Some(ScoreScale { mean: 0.0, std: 2.0 });
            let missing_eos = MissingEos::Replace(1.0);
            let shaping = RewardShaping { score_scale: scale, missing_eos, ..Default::default() };
            let options = &GaeOptions { shaping, ..Default::default() };
            let machine = machine(Order::Fifo, 9, 1 << 20);
            let got = Call { machine, offset: 0, inputs, batch, seq_len, options }.run().unwrap();
            let want = run_reference(&inputs, batch, seq_len, options);
            assert_close("advantages", &wide(&got.advantages), &want.advantages, REL, ABS);
            assert!(got.advantages[..301].iter().all(|a| a.is_finite()));
            assert!(got.advantages[301..=400].iter().all(|a| a.is_nan()));
            assert!(got.moments.mean.is_nan() && got.moments.m2.is_nan());
        }
    }
}

#[test]
fn many_rows_and_no_rows_at_all_work() {
    // So many that their moments are merged in two steps.
    let (mut rng, options) = (rng(7), GaeOptions::default());
    let (batch, seq_len) = (8200, 257);
    let sample = Sample::new(&mut rng, batch, seq_len, Masked::Right);
    let machine = machine(Order::Fifo, 9, 1 << 20);
    let inputs = sample.inputs(true, true);
    let call = Call { machine, offset: 0, inputs, batch, seq_len, options: &options };
    let want = run_reference(&inputs, batch, seq_len, &options);
    check_output("many rows", &call.run_with(true).unwrap(), &want);
    for (batch, seq_len) in [(0, 5), (3, 0), (0, 0), (usize::MAX, 0)] {
        let (inputs, options) = (Inputs::new(&[]), &options);
        let got = Call { machine, offset: 0, inputs, batch, seq_len, options }.run().unwrap();
        assert_eq!((got.advantages.len(), got.moments), (0, Moments::default()));
    }
}

/// The largest error of the advantages of one row of `seq_len` tokens, relative to the largest
/// advantage: through the kernels, and through the loop in f32.
fn errors_of_a_long_row(seq_len: usize, gamma: f64, lambda: f64) -> (f64, f64) {
    let sample = Sample::new(&mut rng(8), 1, seq_len, Masked::Nothing);
    let inputs = Inputs { rewards: Some(&sample.rewards), ..Inputs::new(&sample.values) };
    let options = GaeOptions { gamma, lambda, ..Default::default() };
    let want = run_reference(&inputs, 1, seq_len, &options).advantages;
    let machine = machine(Order::Fifo, 9, 1 << 20);
    let call = Call { machine, offset: 0, inputs, batch: 1, seq_len, options: &options };
    let got = call.run_with(true).unwrap().advantages;

    let mut looped = vec![0.0; seq_len];
    let (mut next_value, mut advantage) = (0.0, 0.0);
    let (gamma, decay) = (gamma as f32, (gamma * lambda) as f32);
    for t in (0..seq_len).rev() {
        let delta = sample.rewards[t] + gamma * next_value - sample.values[t];
        advantage = delta + decay * advantage;
        next_value = sample.values[t];
        looped[t] = advantage;
    }
    let largest = want.iter().fold(0.0_f64, |a, x| a.max(x.abs()));
    let error = |got: &[f32]| {
        let off = got.iter().zip(&want).map(|(&g, w)| (f64::from(g) - w).abs());
        off.fold(0.0_f64, f64::max) / largest
    };
    (error(&got), error(&looped))
}

#[test]
fn long_rows_are_more_exact_than_the_loop_in_f32() {
    for (seq_len, gamma, lambda) in [
        (131_072, 1.0, 1.0),
        (131_072, 1.0, 0.9999),
        (131_072, 0.999, 1.0),
        (131_072, 0.99, 0.95),
        (1_048_576, 1.0, 1.0),
    ] {
        let (ours, looped) = errors_of_a_long_row(seq_len, gamma, lambda);
        let what = format!("{seq_len} {gamma} {lambda}: {ours:.2e}, the loop {looped:.2e}");
        assert!(ours < LONG_ROW && ours < looped, "{what}");
    }
}

#[track_caller]
fn says<T: std::fmt::Debug>(result: Result<T>, words: &[&str]) {
    let text = result.unwrap_err().to_string();
    assert!(text.starts_with("gae: "), "{text}");
    assert!(words.iter().all(|word| text.contains(word)), "{text}");
}

#[test]
fn bad_input_is_refused_by_name() {
    let default = GaeOptions::default();
    let run = |inputs, options: &GaeOptions| {
        let machine = machine(Order::Fifo, 9, 1 << 20);
        Call { machine, offset: 0, inputs, batch: 2, seq_len: 3, options }.run()
    };
    let (values, short, flags) = ([0.0; 6], [0.0; 1], [1; 1]);
    let base = Inputs::new(&values);
    says(run(Inputs::new(&short), &default), &["`values`", "[1]", "[6]"]);
    says(run(Inputs { rewards: Some(&short), ..base }, &default), &["`rewards`", "[1]", "[6]"]);
    says(run(Inputs { kl: Some(&short), ..base }, &default), &["`kl`", "[1]", "[6]"]);
    says(run(Inputs { scores: Some(&short), ..base }, &default), &["`scores`", "[1]", "[2]"]);
    says(run(Inputs { has_eos: Some(&flags), ..base }, &default), &["`has_eos`", "[1]", "[2]"]);
    says(run(Inputs { mask: Some(&flags), ..base }, &default), &["`mask`", "[1]", "[6]"]);
    says(run(Inputs { dones: Some(&flags), ..base }, &default), &["`dones`", "[1]", "[6]"]);
    says(run(Inputs { bootstrap: Some(&short), ..base }, &default), &["`bootstrap`", "[1]", "[2]"]);
    says(run(base, &GaeOptions { gamma: 1.5, ..default }), &["`gamma`", "1.5"]);
    let missing_eos = MissingEos::Subtract(1.0);
    let shaping = RewardShaping { missing_eos, ..Default::default() };
    says(run(base, &GaeOptions { shaping, ..default }), &["`missing_eos`", "`has_eos`"]);

    // Of the outputs and the workspace.
    let sizes = |sizes: [usize; 5]| {
        let stream = stream(machine(Order::Fifo, 9, 1 << 20));
        let [advantages, returns, shaped, moments, workspace] = sizes;
        let mut floats = [advantages, returns, shaped].map(|n| Buffer::new(&vec![0_f32; n], 0));
        let mut moments = Buffer::new(&vec![NOTHING; moments], 0);
        let mut workspace = Buffer::new(&vec![0_f64; workspace], 0);
        let [advantages, returns, shaped] = &mut floats;
        let outputs = Outputs {
            advantages: advantages.slice_mut(),
            returns: returns.slice_mut(),
            shaped_rewards: Some(shaped.slice_mut()),
            moments: Some(moments.slice_mut()),
        };
        let values = Buffer::new(&values, 0);
        let inputs = cuda::Inputs::new(values.slice());
        cuda::gae(&stream, inputs, 2, 3, &default, outputs, workspace.slice_mut())
    };
    let needed = cuda::workspace_len(&Inputs::new(&values), 2, 3);
    assert_eq!(needed, 3);
    sizes([6, 6, 6, 1, needed]).unwrap();
    says(sizes([5, 6, 6, 1, needed]), &["`advantages`", "[5]", "[6]"]);
    says(sizes([6, 5, 6, 1, needed]), &["`returns`", "[5]", "[6]"]);
    says(sizes([6, 6, 5, 1, needed]), &["`shaped_rewards`", "[5]", "[6]"]);
    says(sizes([6, 6, 6, 2, needed]), &["`moments`", "[2]", "[1]"]);
    let error = sizes([6, 6, 6, 1, needed - 1]).unwrap_err();
    assert!(matches!(error, Error::Shape { op: "gae", arg: "workspace", .. }), "{error}");
    assert_eq!(error.to_string(), "gae: `workspace` has shape [2], expected [3] or more");
}

#[cfg(feature = "simt")]
mod planted {
    use super::*;
    use common::device::{goes_unseen, ORDERS};

    fn unseen(bug: &'static str, orders: &[Order]) -> bool {
        let run = || {
            scores_past_the_last_token(bug, orders)?;
            packs_agree_with_the_reference(bug, orders)?;
            agrees_with_the_reference(bug, orders)
        };
        goes_unseen(run)
    }

    #[test]
    fn planted_bugs_that_change_results_are_seen() {
        let bugs = [
            "gae_misaligned_vector",
            "gae_lost_carry",
            "gae_score_left_to_the_next_tile",
            "gae_row_of_a_pack_too_long",
        ];
        for bug in bugs {
            for order in ORDERS {
                assert!(!unseen(bug, &[order, order]), "{bug} {order:?}");
            }
        }
    }

    #[test]
    fn planted_races_are_seen_in_one_of_the_orders() {
        let seeds: Vec<Order> = (0..4).map(Order::Random).collect();
        let orders = [&ORDERS[..2], &seeds].concat();
        assert!(!unseen("gae_missing_barrier", &orders));
    }

    /// Run by `.ci/simt` under a sanitizer, which must end the process.
    #[test]
    #[ignore = "ends the process under a sanitizer"]
    fn a_planted_bug_for_a_sanitizer() {
        let bug = std::env::var("PLANTED_BUG").unwrap();
        let bugs = ["gae_read_past_the_row", "gae_missing_barrier"];
        let name = bugs.into_iter().find(|name| *name == bug).unwrap();
        // An order that hides the bug from the results, where there is one.
        agrees_with_the_reference(name, &[Order::Lifo]).unwrap();
    }
}
