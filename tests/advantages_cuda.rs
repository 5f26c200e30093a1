//! The CUDA kernels of the advantages op, on a GPU or on the CPU stand-in: every option and way to group in
//! every thread order against the f64 reference, and bugs planted in the kernels, which must not go unseen.
#![cfg(any(feature = "simt", feature = "cuda"))]

mod common;

use common::advantages_cases::*;
use common::device::{machine, orders, stream, Buffer, Machine, Order};
use common::pack::WILD_OFFSETS;
use common::*;
use ppo_kernels::advantages::cuda::{self, Inputs, Outputs};
use ppo_kernels::advantages::{
    AdvantageOptions, Baseline, Scale, Sizes, TokenBaselineOptions, TokenStep,
};
use ppo_kernels::Result;

/// One call.
struct Call<'a> {
    machine: Machine,
    /// Elements from a 16-byte boundary to the first of each array.
    offset: usize,
    sample: &'a Sample,
    options: &'a AdvantageOptions,
}

impl Call<'_> {
    fn run(&self) -> Result<Run> {
        let (stream, Sizes { batch, .. }) = (stream(self.machine), self.sample.sizes);
        let (host, offset) = (self.sample.inputs(), self.offset);
        let floats = |values: &[f32]| Buffer::new(values, offset);
        let scores = floats(host.scores);
        let groups = host.groups.map(|ids| Buffer::new(ids, offset % 2));
        let [lengths, score_baselines] =
            [host.lengths, host.score_baselines].map(|x| x.map(floats));
        let mask = host.mask.map(|mask| Buffer::new(mask, offset));
        let offsets = host.offsets.map(|offsets| Buffer::new(offsets, offset % 2));
        let mut advantages = floats(&vec![7.0; batch]);
        let mut tokens = Buffer::new(&vec![7_f32; self.sample.tokens()], offset);
        let mut stats = Buffer::new(&[NO_STATS], 0);
        let mut workspace = Buffer::workspace(cuda::workspace_len(batch), 1);
        let inputs = Inputs {
            scores: scores.slice(),
            groups: groups.as_ref().map(Buffer::slice),
            lengths: lengths.as_ref().map(Buffer::slice),
            score_baselines: score_baselines.as_ref().map(Buffer::slice),
            mask: mask.as_ref().map(Buffer::slice),
            offsets: offsets.as_ref().map(Buffer::slice),
        };
        let outputs = Outputs {
            advantages: advantages.slice_mut(),
            token_advantages: Some(tokens.slice_mut()),
            stats: Some(stats.slice_mut()),
        };
        let space = workspace.slice_mut();
        cuda::outcome_advantages(&stream, inputs, self.sample.sizes, self.options, outputs, space)?;
        Ok(Run {
            advantages: advantages.read().to_vec(),
            token_advantages: tokens.read().to_vec(),
            stats: stats.read()[0],
        })
    }
}

/// Rows and tokens: around the boundaries of warps and vectors, and of the tiles that are sorted.
const SHAPES: [(usize, usize); 6] = [(1, 3), (31, 129), (257, 5), (1023, 1), (1025, 0), (6, 5000)];

/// All orders, with arrays aligned in different ways and grids of different size.
fn agrees_with_the_reference(planted_bug: &'static str, orders: &[Order]) -> Result<()> {
    let mut rng = rng(1);
    let all = all_options();
    let mut options = all.iter().cycle();
    for (rows, seq_len) in SHAPES {
        for grouping in GROUPINGS {
            let sample = Sample::new(&mut rng, grouping, rows, seq_len);
            let packed = matches!(grouping, Grouping::Size(3 | 8) | Grouping::Shuffled(9));
            let sample = if packed { sample.packed(&mut rng) } else { sample };
            let fitting = options.by_ref().take(if rows < 100 { all.len() } else { 5 });
            for options in fitting.filter(|options| sample.fits(options)) {
                let want = run_reference(&sample.inputs(), sample.sizes, options);
                let mut first = None;
                for (i, &order) in orders.iter().enumerate() {
                    let blocks = [1 << 20, 3, 2][i % 3];
                    let machine = Machine { planted_bug, ..machine(order, 9, blocks) };
                    let (sample, offset) = (&sample, [0, 1, 3][i % 3]);
                    let got = Call { machine, offset, sample, options }.run()?;
                    let what = format!("{grouping:?} {rows}x{seq_len} {order:?} {options:?}");
                    got.check(&what, &want);
                    let bits = got.bits();
                    let first = first.get_or_insert_with(|| bits.clone());
                    assert!(*first == bits, "{what}: bits depend on order, alignment or grid");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn every_option_agrees_with_the_reference_in_every_order() {
    agrees_with_the_reference("", orders()).unwrap();
}

#[test]
fn no_offsets_lead_out_of_bounds() {
    for offsets in WILD_OFFSETS {
        for seq_len in [6, 3000] {
            let sizes = Sizes { batch: 2, seq_len, group_size: 2 };
            let packed =
                Sample { sizes, offsets: Some(offsets.to_vec()), ..sample(&[1.0, 2.0], 2, None) };
            // Under a sanitizer what is out of bounds would be seen; elsewhere that it returns.
            run(&packed, &AdvantageOptions::grpo());
        }
    }
}

fn fifo() -> Machine {
    machine(Order::Fifo, 9, 1 << 20)
}

fn run(sample: &Sample, options: &AdvantageOptions) -> Run {
    Call { machine: fifo(), offset: 0, sample, options }.run().unwrap()
}

/// Scores in groups of so many after each other, or of these ids.
fn sample(scores: &[f32], group_size: usize, groups: Option<&[i64]>) -> Sample {
    let batch = scores.len();
    Sample {
        sizes: Sizes { batch, seq_len: 0, group_size },
        scores: scores.to_vec(),
        groups: groups.map(<[i64]>::to_vec),
        lengths: vec![1.5; batch],
        score_baselines: None,
        mask: None,
        offsets: None,
    }
}

#[test]
fn many_rows_are_sorted_in_several_passes() {
    let mut rng = rng(2);
    for rows in [2048, 2049, 9000] {
        let many = Sample::new(&mut rng, Grouping::Shuffled(40), rows, 0);
        for options in [AdvantageOptions::grpo(), AdvantageOptions::opo()] {
            run(&many, &options)
                .check("many", &run_reference(&many.inputs(), many.sizes, &options));
        }
    }
    // Only the ids' order counts, not the ids: all in one group, and each in its own.
    let scores = uniform(&mut rng, 3000, 1.0);
    for ids in [vec![i64::MIN; 3000], (0..3000).rev().collect()] {
        let many = sample(&scores, 0, Some(&ids));
        let options = AdvantageOptions::rloo();
        run(&many, &options).check("ids", &run_reference(&many.inputs(), many.sizes, &options));
    }
}

#[test]
fn equal_scores_give_exactly_zero() {
    for score in [0.1, 0.7, 1e6 + 0.1, -2.3e-30, 3e38] {
        for n in [2, 7, 33] {
            let equal = sample(&vec![score; n], n, None);
            for options in all_options() {
                let options = AdvantageOptions { eps: 0.0, ..options };
                if options.baseline != Baseline::None {
                    let got = run(&equal, &options);
                    assert_eq!(got.advantages, vec![0.0; n], "{score} {options:?}");
                }
            }
        }
    }
}

#[test]
fn the_others_of_one_that_is_apart_have_the_standard_deviation_that_they_have() {
    let options = AdvantageOptions { scale: Scale::LeaveOneOut, ..AdvantageOptions::rloo() };
    for apart in [1.0, 0.3, 1e6, -7.7e30] {
        let got = run(&sample(&[0.1, 0.1, apart, 0.1, 0.1], 5, None), &options);
        assert_eq!(got.advantages[2], (f64::from(apart) - f64::from(0.1_f32)) as f32, "{apart}");
    }
    let mut scores = uniform(&mut rng(4), 70, 1e-3);
    scores[66] = 1e5;
    let many = sample(&scores, 70, None);
    run(&many, &options).check("many", &run_reference(&many.inputs(), many.sizes, &options));
}

#[test]
fn infinite_scores_and_single_rows_are_nan_where_they_are_compared() {
    let inf = f32::INFINITY;
    for scores in [[1.0, inf, 3.0, 4.0], [-inf, 2.0, 3.0, 4.0], [f32::NAN, inf, f32::NAN, 1.0]] {
        for options in all_options() {
            let sample = sample(&scores, 2, None);
            let want = run_reference(&sample.inputs(), sample.sizes, &options);
            run(&sample, &options).check(&format!("{scores:?} {options:?}"), &want);
        }
    }
    let singles = sample(&[1.0, 2.0, 4.0, f32::NAN], 0, Some(&[3, 5, 5, 9]));
    let got = run(&singles, &AdvantageOptions::pass_at_k()).advantages;
    assert!(got[0].is_nan() && got[1] == 0.0 && got[2] > 0.0 && got[3].is_nan(), "{got:?}");
}

#[test]
fn no_rows_are_no_error() {
    let got = run(&sample(&[], 0, Some(&[])), &AdvantageOptions::grpo());
    assert!(numbers(&got.stats).iter().all(|x| x.is_nan()), "{:?}", got.stats);
}

#[test]
fn bad_input_is_refused_by_name() {
    let stream = stream(fifo());
    let (three, ids) = (Buffer::new(&[1_f32; 3], 0), Buffer::new(&[1_i64; 3], 0));
    let short = Buffer::new(&[1_u8; 2], 0);
    let says = |inputs: Inputs, group_size, options: &AdvantageOptions, space, words: &[&str]| {
        let mut out = Buffer::new(&[7_f32; 3], 0);
        let mut space = Buffer::new(&vec![0_f64; space], 0);
        let outputs = Outputs { advantages: out.slice_mut(), token_advantages: None, stats: None };
        let sizes = Sizes { batch: 3, seq_len: 1, group_size };
        let space = space.slice_mut();
        let result = cuda::outcome_advantages(&stream, inputs, sizes, options, outputs, space);
        let text = result.unwrap_err().to_string();
        assert!(text.starts_with("advantages: "), "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
        assert_eq!(out.read(), [7.0; 3]);
    };
    let (plain, grpo, enough) =
        (Inputs::new(three.slice()), AdvantageOptions::grpo(), cuda::workspace_len(3));
    says(plain, 2, &grpo, enough, &["`scores`", "[3]", "[k * 2]"]);
    says(plain, 0, &grpo, enough, &["`groups` is missing", "`baseline`"]);
    let groups = Inputs { groups: Some(ids.slice()), ..plain };
    says(groups, 3, &grpo, enough, &["`group_size` is 3"]);
    says(
        Inputs { mask: Some(short.slice()), ..plain },
        3,
        &grpo,
        enough,
        &["`mask`", "[2]", "[3]"],
    );
    says(plain, 3, &AdvantageOptions::opo(), enough, &["`lengths` is missing"]);
    says(plain, 1, &AdvantageOptions::pass_at_k(), enough, &["`baseline` is RunnerUp"]);
    says(plain, 3, &AdvantageOptions { eps: -1.0, ..grpo }, enough, &["`eps`"]);
    says(plain, 3, &grpo, enough - 1, &["`workspace`", "or more"]);
}

// ---- the optimal token baseline ----

/// Advantages and returns.
fn run_baseline(
    machine: Machine,
    offset: usize,
    tokens: &Tokens,
    options: &TokenBaselineOptions,
) -> Result<[Vec<f32>; 2]> {
    let host = tokens.inputs();
    let floats = |values: &[f32]| Buffer::new(values, offset);
    let [rewards, logp, log_sums] = [host.rewards, host.logp, host.log_sum_sq_probs].map(floats);
    let groups = host.groups.map(|ids| Buffer::new(ids, offset % 2));
    let weights = host.weights.map(floats);
    let mask = host.mask.map(|mask| Buffer::new(mask, offset));
    let offsets = host.offsets.map(|offsets| Buffer::new(offsets, offset % 2));
    let n = tokens.rewards.len();
    let [mut advantages, mut returns] = [(); 2].map(|()| floats(&vec![7.0; n]));
    let len = cuda::token_workspace_len(tokens.sizes.batch, n);
    let mut workspace = Buffer::workspace(len, 1);
    let inputs = cuda::TokenInputs {
        groups: groups.as_ref().map(Buffer::slice),
        weights: weights.as_ref().map(Buffer::slice),
        mask: mask.as_ref().map(Buffer::slice),
        offsets: offsets.as_ref().map(Buffer::slice),
        ..cuda::TokenInputs::new(rewards.slice(), logp.slice(), log_sums.slice())
    };
    let outputs = cuda::TokenOutputs {
        returns: Some(returns.slice_mut()),
        ..cuda::TokenOutputs::new(advantages.slice_mut())
    };
    let (stream, space) = (stream(machine), workspace.slice_mut());
    cuda::optimal_token_baseline(&stream, inputs, tokens.sizes, options, outputs, space)?;
    Ok([advantages.read(), returns.read()])
}

/// Rows of less than a warp's chunk and of several, more steps than a block has threads, more rows than are
/// sorted at once, and packs, whose rows have the bits of padded ones.
fn baseline_agrees_with_the_reference(bug: &'static str, orders: &[Order]) -> Result<()> {
    let mut rng = rng(60);
    let machine = |i: usize, order| {
        let machine = machine(order, 9, [1 << 20, 3, 2][i % 3]);
        Machine { planted_bug: bug, ..machine }
    };
    let shapes = [(6, 5), (12, 33), (3, 1), (9, 100), (3, 600), (1026, 2)];
    for (number, (batch, seq_len)) in shapes.into_iter().cycle().take(18).enumerate() {
        let tokens = Tokens::new(&mut rng, batch, seq_len, number);
        let options = baseline_options()[number % 4];
        let mut first = None;
        for (i, &order) in orders.iter().enumerate() {
            let found = run_baseline(machine(i, order), i % 3, &tokens, &options)?;
            if batch < 1000 {
                tokens.check(&format!("{number} {order:?} {options:?}"), &options, &found);
            }
            let first = first.get_or_insert_with(|| found.clone());
            assert!(*first == found, "{number}: bits depend on order, alignment or grid");
        }
    }
    for number in 0..8 {
        let (padded, packed, pack) = Tokens::padded_and_packed(&mut rng, number);
        let (options, order) = (baseline_options()[number % 4], orders[number % orders.len()]);
        let [a, b] = [&padded, &packed]
            .map(|x| run_baseline(machine(number, order), number % 3, x, &options));
        let (a, b) = (a?, b?);
        packed.check(&format!("{number} {order:?} {options:?}"), &options, &b);
        for (a, b) in a.iter().zip(&b) {
            assert_eq!(pack.pack(a), *b, "{number} {order:?} {options:?}");
        }
    }
    Ok(())
}

#[test]
fn the_token_baseline_agrees_with_the_reference_in_every_order() {
    baseline_agrees_with_the_reference("", orders()).unwrap();
}

#[test]
fn no_offsets_lead_the_token_baseline_out_of_bounds() {
    for offsets in WILD_OFFSETS {
        for step in [TokenStep::Column, TokenStep::Unmasked] {
            let mut tokens = Tokens::new(&mut rng(61), 2, 3, 1);
            tokens.sizes = Sizes { batch: 2, seq_len: 6, group_size: 2 };
            tokens.offsets = Some(offsets.to_vec());
            let options = TokenBaselineOptions { step, ..TokenBaselineOptions::default() };
            run_baseline(machine(Order::Fifo, 9, 3), 1, &tokens, &options).unwrap();
        }
    }
}

#[test]
fn a_token_baseline_that_is_refused_writes_nothing() {
    let mut tokens = Tokens::new(&mut rng(62), 6, 2, 1);
    tokens.sizes.group_size = 0;
    let default = TokenBaselineOptions::default();
    let error = run_baseline(machine(Order::Fifo, 9, 3), 0, &tokens, &default).unwrap_err();
    assert!(error.to_string().contains("`groups`"), "{error}");
}

#[cfg(feature = "simt")]
mod planted {
    use super::*;
    use common::device::{goes_unseen, ORDERS};

    fn unseen(bug: &'static str, orders: &[Order]) -> bool {
        let run = || agrees_with_the_reference(bug, orders);
        goes_unseen(run)
    }

    #[test]
    fn planted_bugs_that_change_results_are_seen() {
        for bug in [
            "advantages_unstable_order",
            "advantages_lost_group",
            "advantages_others_by_difference",
            "advantages_nan_counted",
        ] {
            for order in ORDERS {
                assert!(!unseen(bug, &[order, order]), "{bug} {order:?}");
            }
        }
        for bug in ["advantages_tail_by_the_longest", "advantages_step_of_another_row"] {
            for order in ORDERS {
                let run = || baseline_agrees_with_the_reference(bug, &[order]);
                assert!(!goes_unseen(run), "{bug} {order:?}");
            }
        }
    }

    #[test]
    fn planted_races_are_seen_in_one_of_the_orders() {
        let seeds: Vec<Order> = (0..4).map(Order::Random).collect();
        let orders = [&ORDERS[..2], &seeds].concat();
        assert!(!unseen("advantages_missing_barrier", &orders));
    }

    /// Run by `.ci/simt` under a sanitizer, which must end the process.
    #[test]
    #[ignore = "ends the process under a sanitizer"]
    fn a_planted_bug_for_a_sanitizer() {
        let bug = std::env::var("PLANTED_BUG").unwrap();
        // An order that hides the bug from the results, where there is one.
        let order = [Order::Lifo];
        let found = match bug.as_str() {
            "advantages_read_past_the_end" => {
                agrees_with_the_reference("advantages_read_past_the_end", &order)
            }
            "advantages_missing_barrier" => {
                agrees_with_the_reference("advantages_missing_barrier", &order)
            }
            "advantages_steps_not_awaited" => {
                baseline_agrees_with_the_reference("advantages_steps_not_awaited", &order)
            }
            other => panic!("no test of {other}"),
        };
        found.unwrap();
    }
}
