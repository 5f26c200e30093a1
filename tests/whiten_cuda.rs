//! The CUDA kernels of the whiten op, on a GPU or on the CPU stand-in: every pass and option in
//! every thread order against the f64 reference, and bugs planted in the kernels, which must not go
//! unseen.
#![cfg(any(feature = "simt", feature = "cuda"))]

mod common;

use common::device::{machine, stream, Buffer, Machine, Order, ORDERS};
use common::whiten_cases::*;
use common::*;
use ppo_kernels::moments::Moments;
use ppo_kernels::whiten::cuda::{self, Given};
use ppo_kernels::whiten::{reference, WhitenOptions};
use ppo_kernels::{Error, Result};

/// What the passes write.
#[derive(Debug, Clone, PartialEq)]
struct Run {
    moments: Moments,
    y: Vec<f32>,
    grad: Vec<f32>,
    /// With moments that were given, and are constants.
    y_with: Vec<f32>,
    grad_with: Vec<f32>,
}

impl Run {
    fn bits(&self) -> (Vec<u32>, [u64; 2]) {
        let all = [&self.y, &self.grad, &self.y_with, &self.grad_with];
        let bits = all.into_iter().flatten().map(|v| v.to_bits()).collect();
        (bits, [self.moments.mean.to_bits(), self.moments.m2.to_bits()])
    }
}

/// One call of each pass.
struct Call<'a> {
    machine: Machine,
    /// Elements from a 16-byte boundary to the first of each array.
    offset: usize,
    sample: &'a Sample,
    given: Moments,
    options: &'a WhitenOptions,
    in_place: bool,
}

impl Call<'_> {
    fn run(&self) -> Result<Run> {
        let stream = stream(self.machine);
        let (n, options) = (self.sample.x.len(), self.options);
        let x = Buffer::new(&self.sample.x, self.offset);
        let up = Buffer::new(&self.sample.up, 2 * self.offset);
        let mask = self.sample.mask.as_ref().map(|mask| Buffer::new(mask, self.offset));
        let mask = mask.as_ref().map(Buffer::slice);
        let mut moments = Buffer::new(&[f64::NAN; 3], 0);
        let mut workspace = Buffer::workspace(cuda::workspace_len(n), 1);
        let (to, space) = (moments.slice_mut(), workspace.slice_mut());
        cuda::masked_moments(&stream, x.slice(), mask, to, space)?;

        // What is read, or a copy of it, and where the result goes.
        let run =
            |input: &Buffer<f32>, values: &[f32], offset, pass: &dyn Fn(_, _) -> Result<()>| {
                let mut copy = Buffer::new(values, offset);
                let mut out = Buffer::new(&vec![f32::NAN; n], offset + 1);
                if self.in_place {
                    pass(copy.slice(), copy.slice_mut())?;
                    return Ok(copy.read().to_vec());
                }
                pass(input.slice(), out.slice_mut())?;
                Ok::<_, Error>(out.read().to_vec())
            };
        let own = Given::OnDevice(moments.slice());
        let forward = |given| {
            run(&x, &self.sample.x, self.offset, &move |x, y| {
                cuda::masked_whiten(&stream, x, mask, given, options, y)
            })
        };
        let (y, y_with) = (forward(own)?, forward(Given::Known(self.given))?);
        let space = std::cell::RefCell::new(workspace);
        let grad = run(&up, &self.sample.up, 2 * self.offset, &|g, dx| {
            let (x, space) = (x.slice(), space.borrow_mut().slice_mut());
            cuda::masked_whiten_backward(&stream, x, mask, own, g, options, dx, space)
        })?;
        let grad_with = run(&up, &self.sample.up, 2 * self.offset, &|g, dx| {
            let given = Given::Known(self.given);
            cuda::masked_whiten_with_backward(&stream, mask, given, g, options, dx)
        })?;
        let moments = moments.read();
        let moments = Moments { count: moments[0] as u64, mean: moments[1], m2: moments[2] };
        Ok(Run { moments, y, grad, y_with, grad_with })
    }
}

/// Lengths around the boundaries of vectors, segments, tiles and runs.
const LENGTHS: [usize; 11] = [2, 3, 5, 127, 128, 129, 2049, 4096, 4097, 12_291, 70_001];

/// All orders, with arrays aligned in different ways, grids of different size, and in place.
fn agrees_with_the_reference(planted_bug: &'static str, orders: &[Order]) -> Result<()> {
    let mut rng = rng(1);
    let all = all_options();
    let mut options = all.iter().cycle();
    for n in LENGTHS {
        for masked in [false, true] {
            let sample = Sample::new(&mut rng, n, masked);
            let (x, up, mask) = (wide(&sample.x), wide(&sample.up), sample.mask.as_deref());
            for options in options.by_ref().take(if n < 1000 { all.len() } else { 3 }) {
                let given = Moments { count: 5.0, mean: -0.7, m2: 9.0 };
                let mut first = None;
                for (i, &order) in orders.iter().enumerate() {
                    let blocks = [1 << 20, 3, 2][i % 3];
                    let machine = Machine { planted_bug, ..machine(order, 9, blocks) };
                    let (offset, in_place) = ([0, 1, 3][i % 3], i % 2 == 1);
                    let sample = &sample;
                    let got = Call { machine, offset, sample, given, options, in_place }.run()?;
                    let what = format!("n={n} masked={masked} {order:?} {options:?}");
                    check_moments(&what, got.moments, reference::masked_moments(&x, mask), 1e-12);
                    let y = reference::masked_whiten(&x, mask, options);
                    assert_close(&format!("{what} y"), &wide(&got.y), &y, REL, ABS);
                    let grad = reference::masked_whiten_backward(&x, mask, &up, options);
                    assert_close(&format!("{what} grad"), &wide(&got.grad), &grad, REL, 3.0 * ABS);
                    let y = reference::masked_whiten_with(&x, mask, &given, options);
                    assert_close(&format!("{what} y with"), &wide(&got.y_with), &y, REL, ABS);
                    let grad = reference::masked_whiten_with_backward(mask, &given, &up, options);
                    let got_grad = wide(&got.grad_with);
                    assert_close(&format!("{what} grad with"), &got_grad, &grad, REL, ABS);
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
fn every_pass_agrees_with_the_reference_in_every_order() {
    agrees_with_the_reference("", &ORDERS).unwrap();
}

fn run(x: &[f32], mask: Option<&[u8]>, options: &WhitenOptions) -> Run {
    let mask = mask.map(<[u8]>::to_vec);
    let sample = &Sample { x: x.to_vec(), up: vec![1.0; x.len()], mask };
    let given = Moments { count: 5.0, mean: -0.7, m2: 9.0 };
    let machine = machine(Order::Fifo, 9, 1 << 20);
    Call { machine, offset: 0, sample, given, options, in_place: false }.run().unwrap()
}

#[test]
fn a_large_mean_costs_a_tiny_variance_no_digits() {
    let options = WhitenOptions::default();
    let mut x = far_from_zero(&mut rng(3), 10_000);
    let got = run(&x, None, &options);
    check_moments("offset", got.moments, reference::masked_moments(&wide(&x), None), 1e-10);
    let y = reference::masked_whiten(&wide(&x), None, &options);
    assert_close("offset", &wide(&got.y), &y, REL, ABS);
    // One value far off, at the place the sums are shifted by.
    x[0] = -3e9;
    let got = run(&x, None, &options);
    check_moments("outlier", got.moments, reference::masked_moments(&wide(&x), None), 1e-10);
}

#[test]
fn many_elements_are_merged_from_runs_of_several_tiles() {
    let n = 2048 * 4096 + 1;
    let sample = &Sample::new(&mut rng(4), n, true);
    let stream = stream(machine(Order::Fifo, 9, 1 << 20));
    let (x, mask) = (Buffer::new(&sample.x, 0), sample.mask.as_deref().unwrap());
    let bytes = Buffer::new(mask, 0);
    let mut moments = Buffer::new(&[f64::NAN; 3], 0);
    let mut space = Buffer::workspace(cuda::workspace_len(n), 0);
    let (to, space) = (moments.slice_mut(), space.slice_mut());
    cuda::masked_moments(&stream, x.slice(), Some(bytes.slice()), to, space).unwrap();
    let got = moments.read();
    let got = Moments { count: got[0] as u64, mean: got[1], m2: got[2] };
    check_moments("many", got, reference::masked_moments(&wide(&sample.x), Some(mask)), 1e-11);
}

#[test]
fn equal_elements_come_out_as_zero_with_a_finite_gradient() {
    for options in all_options() {
        let got = run(&[2.5; 300], None, &options);
        let mean = if options.shift_mean { 0.0 } else { 2.5 };
        assert!(got.y.iter().all(|&y| y == mean));
        assert!(got.grad.iter().all(|g| g.is_finite()));
    }
}

#[test]
fn a_nan_that_is_not_masked_shows() {
    for x in [[1.0, f32::NAN, 2.0], [f32::NAN, 1.0, 2.0], [1.0, f32::INFINITY, 2.0]] {
        for options in all_options() {
            let got = run(&x, None, &options);
            assert!(got.moments.m2.is_nan(), "{:?}", got.moments);
            assert!(got.y.iter().chain(&got.grad).all(|y| y.is_nan()));
        }
    }
}

#[test]
fn too_few_elements_are_nan_or_an_error_where_they_can_be_seen() {
    let biased = WhitenOptions { unbiased: false, ..Default::default() };
    let unbiased = WhitenOptions::default();
    let x = [1.0, 2.0];
    let got = run(&x, Some(&[0, 1]), &unbiased);
    assert!(got.y[0] == 0.0 && got.y[1].is_nan() && got.grad[0] == 0.0 && got.grad[1].is_nan());
    assert_eq!(run(&x, Some(&[0, 1]), &biased).y, [0.0, 0.0]);
    let got = run(&x, Some(&[0, 0]), &biased);
    assert_eq!((got.moments, got.y, got.grad), (Moments::default(), vec![0.0; 2], vec![0.0; 2]));
    let got = run(&[], None, &unbiased);
    assert_eq!((got.moments, got.y.len()), (Moments::default(), 0));
}

#[test]
fn bad_input_is_refused_by_name() {
    let stream = stream(machine(Order::Fifo, 9, 1 << 20));
    let options = WhitenOptions::default();
    let says = |result: Result<()>, words: &[&str]| {
        let text = result.unwrap_err().to_string();
        assert!(text.starts_with("whiten: "), "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    };
    let (two, one) = (Buffer::new(&[1_f32; 2], 0), Buffer::new(&[1_f32], 0));
    let (x, short) = (two.slice(), one.slice());
    let byte = Buffer::new(&[1_u8], 0);
    let mask = Some(byte.slice());
    let (mut three, mut many) = (Buffer::new(&[2_f64; 3], 0), Buffer::new(&[0_f64; 4], 0));
    let (mut out2, mut out1) = (Buffer::new(&[0_f32; 2], 0), Buffer::new(&[0_f32], 0));
    let known = Given::Known(Moments { count: 2.0, mean: 1.0, m2: 1.0 });
    let few = Given::Known(Moments { count: 1.0, mean: 1.0, m2: 0.0 });
    let on_device = Given::OnDevice(many.slice());

    let moments = |mask, moments: &mut Buffer<f64>, space: &mut Buffer<f64>| {
        cuda::masked_moments(&stream, x, mask, moments.slice_mut(), space.slice_mut())
    };
    says(moments(mask, &mut three, &mut many), &["`mask`", "[1]", "[2]"]);
    let mut empty = Buffer::new(&[], 0);
    says(moments(None, &mut empty, &mut many), &["`moments`", "[0]", "[3]"]);
    says(moments(None, &mut three, &mut empty), &["`workspace`", "[0]", "[3] or more"]);
    let space = cuda::workspace_len(2);
    assert_eq!(space, 4);

    let whiten = |mask, given, options, out: &mut Buffer<f32>| {
        cuda::masked_whiten(&stream, x, mask, given, options, out.slice_mut())
    };
    says(whiten(mask, known, &options, &mut out2), &["`mask`", "[1]", "[2]"]);
    says(whiten(None, few, &options, &mut out2), &["`moments`", "1 element", "2"]);
    says(whiten(None, on_device, &options, &mut out2), &["`moments`", "[4]", "[3]"]);
    says(whiten(None, known, &options, &mut out1), &["`out`", "[1]", "[2]"]);
    let bad = WhitenOptions { eps: 0.0, ..options };
    says(whiten(None, known, &bad, &mut out2), &["`eps`"]);

    let backward = |grad_out, given, dx: &mut Buffer<f32>, space: &mut Buffer<f64>| {
        let (dx, space) = (dx.slice_mut(), space.slice_mut());
        cuda::masked_whiten_backward(&stream, x, None, given, grad_out, &options, dx, space)
    };
    says(backward(short, known, &mut out2, &mut many), &["`grad_out`", "[1]", "[2]"]);
    says(backward(x, known, &mut out1, &mut many), &["`grad_x`", "[1]", "[2]"]);
    says(backward(x, few, &mut out2, &mut many), &["`moments`", "1 element", "2"]);
    says(backward(x, known, &mut out2, &mut three), &["`workspace`", "[3]", "[4] or more"]);

    let with = |mask, given, dx: &mut Buffer<f32>| {
        cuda::masked_whiten_with_backward(&stream, mask, given, x, &options, dx.slice_mut())
    };
    says(with(mask, known, &mut out2), &["`mask`", "[1]", "[2]"]);
    says(with(None, few, &mut out2), &["`moments`", "1 element", "2"]);
    says(with(None, known, &mut out1), &["`grad_x`", "[1]", "[2]"]);
}

#[cfg(feature = "simt")]
mod planted {
    use super::*;

    /// Whether a planted bug goes unseen; a run that panics or reports has seen it.
    fn unseen(bug: &'static str, orders: &[Order]) -> bool {
        let run = || agrees_with_the_reference(bug, orders);
        matches!(std::panic::catch_unwind(run), Ok(Ok(())))
    }

    #[test]
    fn planted_bugs_that_change_results_are_seen() {
        for order in ORDERS {
            assert!(!unseen("whiten_wrong_origin", &[order, order]), "{order:?}");
        }
    }

    #[test]
    fn planted_races_are_seen_in_one_of_the_orders() {
        let seeds: Vec<Order> = (0..4).map(Order::Random).collect();
        let orders = [&ORDERS[..2], &seeds].concat();
        assert!(!unseen("whiten_missing_barrier", &orders));
    }

    /// Run by `.ci/simt` under a sanitizer, which must end the process.
    #[test]
    #[ignore = "ends the process under a sanitizer"]
    fn a_planted_bug_for_a_sanitizer() {
        let bug = std::env::var("PLANTED_BUG").unwrap();
        let bugs = ["whiten_read_past_the_end", "whiten_missing_barrier"];
        let name = bugs.into_iter().find(|name| *name == bug).unwrap();
        // An order that hides the bug from the results, where there is one.
        let _ = agrees_with_the_reference(name, &[Order::Lifo]);
    }
}
