//! The CUDA kernels of the whiten op, on a GPU or on the CPU stand-in: every pass and option in
//! every thread order against the f64 reference, and bugs planted in the kernels, which must not go
//! unseen.
#![cfg(any(feature = "simt", feature = "cuda"))]

mod common;

use common::device::{machine, orders, stream, Buffer, Machine, Order};
use common::whiten_cases::*;
use common::*;
use ppo_kernels::moments::Moments;
use ppo_kernels::whiten::cuda::{
    self, GradOutputs, Inputs, MomentsInputs, MomentsOutputs, Outputs, OwnBackwardInputs,
    WithBackwardInputs,
};
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
        let mut moments = Buffer::new(&[NO_MOMENTS], 0);
        let mut workspace = Buffer::workspace(cuda::workspace_len(n), 1);
        let (to, space) = (MomentsOutputs { moments: moments.slice_mut() }, workspace.slice_mut());
        cuda::masked_moments(&stream, MomentsInputs { x: x.slice(), mask }, n, to, space)?;

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
        // Moments on the device, or known to the host.
        let own = (Some(moments.slice()), None);
        let known = (None, Some(self.given));
        let forward = |(moments, known)| {
            run(&x, &self.sample.x, self.offset, &move |x, y| {
                let inputs = Inputs { x, mask, moments };
                cuda::masked_whiten(&stream, inputs, known, n, options, Outputs { y })
            })
        };
        let (y, y_with) = (forward(own)?, forward(known)?);
        let space = std::cell::RefCell::new(workspace);
        let grad = run(&up, &self.sample.up, 2 * self.offset, &|grad_y, grad_x| {
            let (x, space) = (x.slice(), space.borrow_mut().slice_mut());
            let inputs = OwnBackwardInputs { x, mask, moments: own.0, grad_y };
            let outputs = GradOutputs { grad_x };
            cuda::masked_whiten_backward(&stream, inputs, own.1, n, options, outputs, space)
        })?;
        let grad_with = run(&up, &self.sample.up, 2 * self.offset, &|grad_y, grad_x| {
            let inputs = WithBackwardInputs { mask, moments: known.0, grad_y };
            let outputs = GradOutputs { grad_x };
            cuda::masked_whiten_with_backward(&stream, inputs, known.1, n, options, outputs)
        })?;
        Ok(Run { moments: moments.read()[0], y, grad, y_with, grad_with })
    }
}

const NO_MOMENTS: Moments = Moments { count: f64::NAN, mean: f64::NAN, m2: f64::NAN };

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
    agrees_with_the_reference("", orders()).unwrap();
}

fn run(x: &[f32], mask: Option<&[u8]>, options: &WhitenOptions) -> Run {
    run_with(vec![1.0; x.len()], x, mask, options)
}

fn run_with(up: Vec<f32>, x: &[f32], mask: Option<&[u8]>, options: &WhitenOptions) -> Run {
    let sample = &Sample { x: x.to_vec(), up, mask: mask.map(<[u8]>::to_vec) };
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
    let mut moments = Buffer::new(&[NO_MOMENTS], 0);
    let mut space = Buffer::workspace(cuda::workspace_len(n), 0);
    let inputs = MomentsInputs { x: x.slice(), mask: Some(bytes.slice()) };
    let (to, space) = (MomentsOutputs { moments: moments.slice_mut() }, space.slice_mut());
    cuda::masked_moments(&stream, inputs, n, to, space).unwrap();
    let got = moments.read()[0];
    check_moments("many", got, reference::masked_moments(&wide(&sample.x), Some(mask)), 1e-11);
}

#[test]
fn equal_elements_come_out_as_zero_with_a_finite_gradient() {
    for (options, n) in all_options().into_iter().flat_map(|options| [(options, 1), (options, 300)])
    {
        if options.unbiased && n == 1 {
            continue;
        }
        let up = uniform(&mut rng(5), n, 3.0);
        let got = run_with(up.clone(), &[2.5; 300][..n], None, &options);
        let mean = if options.shift_mean { 0.0 } else { 2.5 };
        assert!(got.y.iter().all(|&y| y == mean));
        // 1 / eps is a factor of 1e8 on the deviations of the upstream gradient.
        let want = reference::masked_whiten_backward(&[2.5; 300][..n], None, &wide(&up), &options);
        assert_close("grad", &wide(&got.grad), &want, REL, ABS);
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
    let (two_moments, one_moments) = (
        Buffer::new(&[Moments::default(); 2], 0),
        Buffer::new(&[Moments { count: 2.0, mean: 1.0, m2: 1.0 }], 0),
    );
    let (two_moments, one_moments) = (Some(two_moments.slice()), Some(one_moments.slice()));
    let known = Some(Moments { count: 2.0, mean: 1.0, m2: 1.0 });
    let few = Some(Moments { count: 1.0, mean: 1.0, m2: 0.0 });
    let (mut out2, mut out1) = (Buffer::new(&[0_f32; 2], 0), Buffer::new(&[0_f32], 0));
    let mut space = [0, 3, 4].map(|len| Buffer::new(&vec![0_f64; len], 0));
    let [empty, three, many] = &mut space;

    let moments = |mask, len, space: &mut Buffer<f64>| {
        let mut moments = Buffer::new(&vec![Moments::default(); len], 0);
        let outputs = MomentsOutputs { moments: moments.slice_mut() };
        cuda::masked_moments(&stream, MomentsInputs { x, mask }, 2, outputs, space.slice_mut())
    };
    says(moments(mask, 1, many), &["`mask`", "[1]", "[2]"]);
    says(moments(None, 0, many), &["`moments`", "[0]", "[1]"]);
    says(moments(None, 1, empty), &["`workspace`", "[0]", "[3] or more"]);
    assert_eq!(cuda::workspace_len(2), 4);

    let whiten = |mask, moments, known, options, out: &mut Buffer<f32>| {
        let (inputs, outputs) = (Inputs { x, mask, moments }, Outputs { y: out.slice_mut() });
        cuda::masked_whiten(&stream, inputs, known, 2, options, outputs)
    };
    says(whiten(mask, None, known, &options, &mut out2), &["`mask`", "[1]", "[2]"]);
    says(whiten(None, None, few, &options, &mut out2), &["`moments`", "1 element", "2"]);
    says(whiten(None, None, None, &options, &mut out2), &["`moments`", "missing", "`x`"]);
    says(whiten(None, two_moments, known, &options, &mut out2), &["`moments`", "[2]", "[1]"]);
    says(whiten(None, None, known, &options, &mut out1), &["`y`", "[1]", "[2]"]);
    let bad = WhitenOptions { eps: -1.0, ..options };
    says(whiten(None, None, known, &bad, &mut out2), &["`eps`"]);
    // Those on the device are the ones that count.
    whiten(None, one_moments, few, &options, &mut out2).unwrap();
    assert_eq!(out2.read(), [0.0; 2]);

    let backward = |grad_y, known, dx: &mut Buffer<f32>, space: &mut Buffer<f64>| {
        let inputs = OwnBackwardInputs { x, mask: None, moments: None, grad_y };
        let (outputs, space) = (GradOutputs { grad_x: dx.slice_mut() }, space.slice_mut());
        cuda::masked_whiten_backward(&stream, inputs, known, 2, &options, outputs, space)
    };
    says(backward(short, known, &mut out2, many), &["`grad_y`", "[1]", "[2]"]);
    says(backward(x, known, &mut out1, many), &["`grad_x`", "[1]", "[2]"]);
    says(backward(x, few, &mut out2, many), &["`moments`", "1 element", "2"]);
    says(backward(x, None, &mut out2, many), &["`moments`", "missing", "`x`"]);
    says(backward(x, known, &mut out2, three), &["`workspace`", "[3]", "[4] or more"]);

    let with = |mask, known, dx: &mut Buffer<f32>| {
        let inputs = WithBackwardInputs { mask, moments: None, grad_y: x };
        let outputs = GradOutputs { grad_x: dx.slice_mut() };
        cuda::masked_whiten_with_backward(&stream, inputs, known, 2, &options, outputs)
    };
    says(with(mask, known, &mut out2), &["`mask`", "[1]", "[2]"]);
    says(with(None, few, &mut out2), &["`moments`", "1 element", "2"]);
    says(with(None, None, &mut out2), &["`moments`", "missing", "`grad_y`"]);
    says(with(None, known, &mut out1), &["`grad_x`", "[1]", "[2]"]);
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
        agrees_with_the_reference(name, &[Order::Lifo]).unwrap();
    }
}
